"""Trainings that outlive their flow: they are named on its page, and `hubert stop` stops them for good."""

import threading
from types import SimpleNamespace

from hubert.core.errors import TrainingCancelled
from hubert.core.files import read_json
from hubert.core.paths import RunFolder
from hubert.training.launch import Event, find_running, launch
from hubert.training.stage import TrainStage, train_until_done
from tasks.page.failure import find_orphans
from tests.support.corpus import NUM_UNITS
from tests.support.training import SETTINGS, write_table
from tests.tasks.service.test_follow import hubert
from tools.given_stages import labels_in


def test_a_training_without_a_flow_is_named_and_stopped_for_good_after_a_checkpoint(tmp_path):
    """Another flow that has adopted it meanwhile does not start it again."""
    run = tmp_path / "my run"
    table = write_table(tmp_path / "corpus")
    settings = SETTINGS.model_copy(update={"steps": 4000, "checkpoint_interval": 4000})
    stage = TrainStage(parent=RunFolder(run).iteration(1), labels=labels_in(table, NUM_UNITS), train=settings)
    trainer = launch(stage.job())
    flow_run = SimpleNamespace(parameters={"run": str(run)})
    ((_, text),) = find_orphans(flow_run)
    assert trainer.name in text
    assert f"`hubert stop '{run}'`" in text
    has_begun, ends = threading.Event(), []

    def take_note(event: Event) -> None:
        if event.metrics is not None:
            has_begun.set()

    def follow() -> None:
        try:
            train_until_done(stage, take_note)
        except TrainingCancelled as error:
            ends.append(str(error))

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        assert has_begun.wait(200)
        code, said, _ = hubert("stop", run)
        follower.join(200)
    finally:
        trainer.kill()
    assert code == 0
    assert f"stopping {trainer.name}" in said
    assert "cancelled in Prefect" in ends[0]
    assert "`hubert stop`" in ends[0]
    assert read_json(stage.folder / "exit.json")["name"] == "interrupted"
    assert stage.reached() > 0
    assert find_running(stage.folder) is None
    assert list(find_orphans(flow_run)) == []
    assert "nothing of run" in hubert("stop", run)[1]
    assert hubert("stop", tmp_path / "no such run")[0] == 2
