"""The script that takes the pictures of docs/images: what it does when one of them cannot be taken."""

from types import SimpleNamespace

from playwright.sync_api import Error

from tools import screenshots


class Waiting:
    """The API of a run that is suspended only at the second look."""

    def __init__(self) -> None:
        self.answers = iter(("ABORT", "ACCEPT"))
        self.asked: list[tuple[str, dict]] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def post(self, path, content):
        if path == "/flow_runs/filter":
            below = "parent_flow_run_id" in content["flow_runs"]
            return [] if below else [{"id": "1", "state": {}, "state_type": "RUNNING"}]
        self.asked.append((path, content))
        return {"status": next(self.answers)}


def test_a_question_that_cannot_be_pictured_is_answered_with_its_proposal_and_the_other_pictures_are_taken(
    tmp_path, monkeypatch
):
    api, taken = Waiting(), []
    monkeypatch.setattr("tasks.service.prefect_api.connect", lambda _url: api)
    monkeypatch.setattr("tasks.service.follow.start_run", lambda *_: "1")
    steps = ("form", "running", "question", "finished", "checkpoints", "registry", "report")
    for name in steps:

        def take(*_, name=name):
            taken.append((name, len(api.asked)))
            if name == "question":
                raise Error("the page is not there")

        monkeypatch.setattr(screenshots, f"take_{name}", take)
    camera = screenshots.Camera(None, tmp_path)
    screenshots.take_all(camera, SimpleNamespace(api_url="http://127.0.0.1:1"), tmp_path)
    assert [name for name, _ in taken] == list(steps)
    assert dict(taken)["finished"] == 2  # answered before anybody waits for the run's end
    assert api.asked[-1] == ("/flow_runs/1/resume", {"run_input": {}})
    assert len(camera.failed) == 1
