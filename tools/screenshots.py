"""Take the pictures of docs/images: a service and a small run of two iterations of their own, and Chromium on their pages.

    python -m tools.screenshots [FOLDER]

Needs Chromium, and the demo's speech (`hubert-flows[demo]`); takes some minutes. Look at each picture afterwards: a page
of another version of Prefect or MLflow may be cut elsewhere.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image
from playwright.sync_api import Error

from hubert.core.errors import HubertError
from hubert.core.paths import PROJECT, RunFolder
from tools.browser import RUN_SECONDS, WIDE, MlflowPages, PrefectPages, new_page, open_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    from tasks.service.prefect_api import PrefectApi
    from tasks.service.settings import ServiceSettings

RUN = "speech"
MAX_BYTES = 200_000
LOOKS, LOOK_MILLISECONDS = 10, 1500  # until two pictures in a row are the same
CARDS = 5  # of a finished run; the others look alike
MANY = 10  # lines of a training's log, so that there is something to see
TALL, MARGIN = 3000, 24  # pixels
PHONE = {"width": 390, "height": 844}
# The demo's recipe with fewer steps of smaller batches.
OVERRIDES = {
    "kmeans": {"num_units": 50},
    "train": {"steps": 80, "warmup_steps": 10, "batch_seconds": 8, "micro_batch_seconds": 8, "checkpoint_interval": 20}
    | {"log_interval": 2, "num_processes": 1},
}


def main() -> int:
    """Take all pictures; returns the exit code."""
    images = Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    from tasks.service.signals import interrupted_by

    # Whatever ends this program, its servers must not be left behind.
    stop_all = interrupted_by(signal.SIGTERM, signal.SIGHUP)
    with stop_all, TemporaryDirectory(prefix="hubert-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        os.environ |= {"HUBERT_RUNS": str(folder / "runs"), "PREFECT_PLUGINS_ENABLED": "false"}
        settings = start_service(folder, stack)
        from hubert.data.demo.corpus import build_demo_corpus

        data = build_demo_corpus(folder / "speech", num_train=40, num_validation=8, num_abx=30)
        camera = Camera(stack.enter_context(open_chromium()), images)
        take_all(camera, settings, data)
    return 1 if camera.failed else 0


def start_service(folder: Path, stack: ExitStack) -> "ServiceSettings":
    """Do what `hubert up` does, in a folder and on ports of its own; the stack stops it."""
    from tasks.service.service import down, up
    from tasks.service.settings import ServiceSettings

    settings = ServiceSettings(folder=folder / "service", prefect_port=4277, mlflow_port=5077, profiles=folder / "none")
    up(settings)
    stack.callback(down, settings)
    return settings


class Camera:
    """Takes pictures of pages, of at most 256 colours: text and plots lose nothing, and files get small."""

    def __init__(self, browser: "Browser", images: Path) -> None:
        """Take a browser, and the folder of the pictures."""
        self.browser = browser
        self.images = images
        self.failed: list[str] = []

    def attempt(self, take: Callable[..., None], *arguments: Any) -> bool:
        """Take pictures; if that fails say so, and go on to the next ones. Returns whether they were taken."""
        try:
            take(*arguments)
        except (Error, AssertionError, ValueError, HubertError) as error:
            print(f"{take.__name__}: {error}", file=sys.stderr, flush=True)
            self.failed.append(take.__name__)
            return False
        return True

    def page(self, **size: int) -> "Page":
        """Open a page of a size (default: that of a small screen)."""
        return new_page(self.browser, **size)

    def take(self, page: "Page", name: str) -> None:
        """Write the picture of what is in sight.

        Raises:
            ValueError: it would weigh too much for the README.
        """
        picture = Image.open(BytesIO(still(page)))
        path = self.images / f"{name}.png"
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB", flush=True)
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}: show less of it"
            )


def still(page: "Page") -> bytes:
    """Return a picture of a page that has stopped changing; of one that keeps moving, the last of several."""
    before = b""
    for _ in range(LOOKS):
        page.wait_for_timeout(LOOK_MILLISECONDS)
        picture = page.screenshot(animations="disabled")
        if picture == before:
            break
        before = picture
    return picture


def fit(page: "Page", last: "Locator") -> None:
    """Make the page as high as what it shows: down to the end of its last element."""
    box = last.bounding_box()
    if box is not None and page.viewport_size is not None:
        page.set_viewport_size(
            {"width": page.viewport_size["width"], "height": round(box["y"] + box["height"]) + MARGIN}
        )


def take_all(camera: Camera, settings: "ServiceSettings", data: Path) -> None:
    """Go through a run from its form to its report, and take a picture at each stop."""
    from tasks.service.follow import start_run
    from tasks.service.prefect_api import connect

    camera.attempt(take_form, camera, settings, data)
    with connect(settings.api_url) as api:
        wishes = {"run": RUN, "recipe": "demo", "data": str(data), "choose": "ask", "overrides": OVERRIDES}
        run_id = start_run(api, "hubert-pretraining", "local", wishes)
        camera.attempt(take_running, camera, settings, api, run_id)
        if not camera.attempt(take_question, camera, settings, run_id):
            answer_question(api, run_id)
        camera.attempt(take_finished, camera, settings, api, run_id)
    camera.attempt(take_checkpoints, camera, settings)
    camera.attempt(take_registry, camera, settings)
    camera.attempt(take_report, camera)


def take_form(camera: Camera, settings: "ServiceSettings", data: Path) -> None:
    """The run form, as somebody fills it in."""
    prefect = PrefectPages(camera.page(height=TALL), settings.ui_url)
    prefect.open_form("hubert-iteration")
    fields: dict[str, Any] = {"run": RUN, "data": str(data), "iteration": 1}
    for name, value in fields.items():
        prefect.fill(name, value)
    fit(prefect.page, prefect.page.get_by_role("button", name="Submit"))
    camera.take(prefect.page, "form")
    prefect.page.close()


def take_running(camera: Camera, settings: "ServiceSettings", api: "PrefectApi", run_id: str) -> None:
    """The page of an iteration while it trains, and its overview."""
    prefect = PrefectPages(camera.page(height=1100), settings.ui_url)
    iteration = iteration_of(api, run_id, 1)
    logs = RunFolder.of(RUN).iteration(1)
    wait_until("the training", lambda: any(num_lines(log) > MANY for log in logs.glob("train-*/metrics.jsonl")))
    prefect.open_run(iteration)
    show_cards(prefect)
    camera.take(prefect.page, "running")
    prefect.open_artifact("overview")
    prefect.page.get_by_role("columnheader", name="how far it is").wait_for()
    camera.take(prefect.page, "overview")
    prefect.page.close()


def show_cards(prefect: PrefectPages) -> "Locator":
    """Show a run's artifacts as a list, which has room for all of their words; returns the cards."""
    tab = prefect.open_tab("Artifacts")
    tab.get_by_role("radio", name="List view").click()
    cards = tab.get_by_role("link")
    cards.first.wait_for()
    return cards


def take_question(camera: Camera, settings: "ServiceSettings", run_id: str) -> None:
    """The form of `choose: ask`, which is then answered."""
    prefect = PrefectPages(camera.page(height=1000), settings.ui_url)
    prefect.open_run(run_id)
    prefect.wait_for_state("Suspended")
    dialog = prefect.open_question()
    camera.take(prefect.page, "ask")
    dialog.get_by_role("button", name="Resume").click()
    dialog.wait_for(state="hidden")
    prefect.page.close()


def answer_question(api: "PrefectApi", run_id: str) -> None:
    """Take what the form proposes, as nobody has answered it: the run waits for that, perhaps only in a while."""
    from tasks.service.follow import EXIT_CODES, read_family

    def goes_on() -> bool:
        answer = api.post(f"/flow_runs/{run_id}/resume", {"run_input": {}})
        return answer["status"] == "ACCEPT" or read_family(api, run_id)[0]["state_type"] in EXIT_CODES

    wait_until("the answer", goes_on)


def take_finished(camera: Camera, settings: "ServiceSettings", api: "PrefectApi", run_id: str) -> None:
    """The page of a finished iteration, with its artifacts."""
    prefect = PrefectPages(camera.page(height=TALL), settings.ui_url)
    prefect.open_run(run_id)
    prefect.wait_for_state("Completed")
    prefect.open_run(iteration_of(api, run_id, 2))
    prefect.wait_for_state("Completed")
    cards = show_cards(prefect)
    fit(prefect.page, cards.nth(CARDS - 1))
    camera.take(prefect.page, "finished")
    prefect.page.close()


def take_checkpoints(camera: Camera, settings: "ServiceSettings") -> None:
    """The table of checkpoints."""
    mlflow = MlflowPages(camera.page(width=WIDE, height=560), settings.mlflow_url)
    mlflow.open_checkpoints(RUN)
    mlflow.page.get_by_role("columnheader", name="validation_loss", exact=True).wait_for()
    camera.take(mlflow.page, "checkpoints")
    mlflow.page.close()


def take_registry(camera: Camera, settings: "ServiceSettings") -> None:
    """The same table sorted, and the registered model with its aliases."""
    mlflow = MlflowPages(camera.page(width=1600, height=640), settings.mlflow_url)
    mlflow.open_file(RUN, "it1/train", "checkpoints.csv")
    mlflow.sort_by("validation loss")
    mlflow.page.mouse.move(0, 0)  # or a hint covers the table's head
    camera.take(mlflow.page, "sorted")
    version = mlflow.version_of(f"{RUN}-it1", OVERRIDES["train"]["steps"])
    version.scroll_into_view_if_needed()
    camera.take(mlflow.page, "registry")
    mlflow.page.close()


def take_report(camera: Camera) -> None:
    """The report of the second iteration, on a screen and on a phone."""
    (report,) = RunFolder.of(RUN).iteration(2).glob("report-*/report.html")
    for name, size in {"report": {"width": 1100, "height": 1300}, "report-phone": PHONE}.items():
        page = camera.page(**size)
        page.goto(report.as_uri())
        camera.take(page, name)
        page.close()


def iteration_of(api: "PrefectApi", run_id: str, number: int) -> str:
    """Wait for the flow run of an iteration, and return its id."""
    from tasks.service.follow import read_family

    def find() -> list[str]:
        return [run["id"] for run in read_family(api, run_id) if run["parameters"].get("iteration") == number]

    wait_until(f"iteration {number}", lambda: bool(find()))
    return find()[0]


def wait_until(what: str, is_so: Callable[[], bool]) -> None:
    """Wait for something that a run does."""
    from hubert.core.process import wait_for

    wait_for({what: is_so}, [], RUN_SECONDS)


def num_lines(path: Path) -> int:
    """Count the lines of a file that grows."""
    return path.read_bytes().count(b"\n")


if __name__ == "__main__":
    sys.exit(main())
