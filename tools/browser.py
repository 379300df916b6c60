"""The pages of Prefect and MLflow in Chromium, used as a person uses them: by labels, roles and texts.

For tests/end_to_end/test_browser.py and for the pictures of the docs (`tools.screenshots`). Playwright drives the
system's Chromium (Debian: `apt-get install chromium`); it downloads none of its own.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Frame, Locator, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_SECONDS = 60.0  # for a page to show something
TRIES = 3
RUN_SECONDS = 900.0  # for a run of seconds, on a machine that does other things
STATE = re.compile(
    "^(Scheduled|Late|Pending|Running|Retrying|AwaitingRetry|Suspended|Paused|Completed|Failed|Crashed|Cancell?ing|Cancelled)$"
)
WIDE = 2900  # MLflow writes only those columns into the page that are in sight
TRAINING = "workflowType=machine_learning"  # MLflow's pages open for language models otherwise


def find_chromium() -> str | None:
    """Return the path of the system's Chromium; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_chromium() -> Iterator[Browser]:
    """Start Chromium without a window."""
    path = find_chromium()
    if path is None:
        raise FileNotFoundError(
            f"no Chromium: looked for {', '.join(NAMES)} on PATH (Debian: apt-get install chromium)"
        )
    # As root, as in a container, Chromium refuses to start its sandbox.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        try:
            yield browser
        finally:
            browser.close()


def new_page(browser: Browser, *, width: int = 1280, height: int = 900) -> Page:
    """Open a page, in a session of its own; what it waits for in vain is an error after a while."""
    page = browser.new_page(viewport={"width": width, "height": height}, locale="en-GB", timezone_id="UTC")
    page.set_default_timeout(1000 * WAIT_SECONDS)
    expect.set_options(timeout=1000 * WAIT_SECONDS)
    return page


class PrefectPages:
    """Prefect's pages (their second version) of one service."""

    def __init__(self, page: Page, ui_url: str) -> None:
        """Take a page of the browser, and the address that Prefect's pages start with."""
        self.page = page
        self.ui_url = ui_url

    # Forms --------------------------------------------------------------------------------------------------------

    def open_form(self, flow: str, deployment: str = "local") -> None:
        """Go from the list of deployments to the run form of one."""
        self.page.goto(f"{self.ui_url}/deployments")
        rows = self.page.get_by_role("row").filter(has=self.page.get_by_role("link", name=flow, exact=True))
        rows.get_by_role("link", name=deployment, exact=True).click()
        self.page.get_by_role("button", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Custom run").click()
        self.page.get_by_role("button", name="Submit").wait_for()

    def field(self, name: str) -> Locator:
        """Return a field of a form: its label, its description and its input."""
        words = re.compile(rf"^{re.escape(name)}( \(Optional\))?$", re.IGNORECASE)
        label = self.page.locator("label").filter(has_text=words)
        return label.locator("xpath=ancestor::div[fieldset][1]")

    def fill(self, name: str, value: str | int) -> None:
        """Fill in a field: a text, a number, a drop-down (`value` begins an option), or tabs for a name and for a file."""
        field = self.field(name)
        field.wait_for()
        kinds = field.get_by_role("tab", name="file" if "/" in str(value) else "name", exact=True)
        if kinds.count():
            kinds.click()
        chooser = field.get_by_role("button", name=re.compile("^Select "))
        if chooser.count():
            chooser.click()
            self.page.get_by_role("option", name=re.compile(f"^{re.escape(str(value))}")).first.click()
            expect(chooser).to_contain_text(str(value))
            return
        box = field.get_by_role("spinbutton" if isinstance(value, int) else "textbox")
        box.fill(str(value))
        expect(box).to_have_value(str(value))

    def submit(self) -> str:
        """Press Submit and go to the page of the run that it started; returns the run's id."""
        for _ in range(TRIES):
            with self.page.expect_response("**/create_flow_run") as answered:
                self.page.get_by_role("button", name="Submit").click()
            if answered.value.ok:
                break  # else SQLite was locked for long, on a busy machine; the form stays as it is
        run_id = str(answered.value.json()["id"])
        self.page.locator(f'a[href$="/runs/flow-run/{run_id}"]').first.click()
        self.page.wait_for_url(f"**/runs/flow-run/{run_id}*")
        return run_id

    # Runs ---------------------------------------------------------------------------------------------------------

    def open_run(self, run_id: str) -> None:
        """Go to the page of a run."""
        self.page.goto(f"{self.ui_url}/runs/flow-run/{run_id}")

    def wait_for_state(self, name: str) -> None:
        """Wait until the page says that its run is in a state: in its head, above the states of the runs below it."""
        head = self.page.get_by_role("main").get_by_text(STATE).first
        expect(head).to_have_text(name, timeout=1000 * RUN_SECONDS)

    def open_question(self) -> Locator:
        """Open the form of a run that waits for an answer; returns the dialog."""
        self.page.get_by_role("main").get_by_role("button", name="Open menu").click()
        self.page.get_by_role("menuitem", name="Resume").click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_role("button", name=re.compile("^Select ")).first.wait_for()
        return dialog

    def resume(self, **answers: str) -> None:
        """Answer what a run asks, and let it go on; what is not named keeps what is proposed."""
        dialog = self.open_question()
        for name, value in answers.items():
            self.fill(name, value)
        dialog.get_by_role("button", name="Resume").click()
        dialog.wait_for(state="hidden")

    def open_tab(self, name: str) -> Locator:
        """Go to a tab of the run's page (Logs, Artifacts, …); returns what it shows."""
        self.page.get_by_role("tab", name=name).click()
        return self.page.get_by_role("tabpanel", name=name)

    def open_artifact(self, description: str) -> None:
        """Go from the tab Artifacts to the newest version of one, by words of its card."""
        self.open_tab("Artifacts").get_by_role("link").filter(has_text=description).first.click()
        versions = self.page.get_by_role("link", name=re.compile("^[0-9a-f]{8}$"))  # the beginnings of their ids
        versions.first.click()
        self.page.wait_for_url("**/artifacts/artifact/**")


class MlflowPages:
    """MLflow's pages of one service."""

    def __init__(self, page: Page, url: str) -> None:
        """Take a page of the browser, and MLflow's address."""
        self.page = page
        self.url = url

    def open_experiment(self, name: str) -> None:
        """Go from the list of experiments to one."""
        self.page.goto(f"{self.url}/#/experiments?{TRAINING}")
        self.close_assistant()
        self.page.goto(f"{self.url}/{self._address(name)}/runs?{TRAINING}")
        self.page.reload()  # a list that was shown before is shown again, without what came since

    def close_assistant(self) -> None:
        """Close the panel that a first visit opens over a third of the page."""
        panel = self.page.get_by_text("MLflow Assistant")
        close = self.page.get_by_role("button", name="Close", exact=True)
        panel.first.wait_for(state="attached")
        if close.count():
            close.click()

    def open_checkpoints(self, experiment: str) -> None:
        """Go to the page that lists the checkpoints of an experiment."""
        self.open_experiment(experiment)
        self.page.get_by_role("link", name="Models", exact=True).click()
        self.page.get_by_role("columnheader", name="Model name").wait_for()

    def open_file(self, experiment: str, run: str, file: str) -> None:
        """Go to a file among the artifacts of an MLflow run."""
        self.open_experiment(experiment)
        self.page.goto(f"{self.url}/{self._address(run)}/artifacts/{file}")
        self.page.get_by_role("main").get_by_text("Path: ").wait_for()

    def _address(self, name: str) -> str:
        """Return where a link of a table leads; the bar at the left has links of the same names."""
        link = self.page.get_by_role("main").get_by_role("link", name=name, exact=True).first
        return str(link.get_attribute("href")).partition("?")[0]

    def read_report(self, experiment: str, run: str) -> Frame:
        """Go to the report of an iteration; returns the frame that shows it."""
        self.open_file(experiment, run, "report.html")
        frame = self.page.locator("iframe").element_handle().content_frame()
        if frame is None:
            raise LookupError("the page of report.html has no frame")
        return frame

    def sort_by(self, column: str) -> list[list[str]]:
        """Press the header of a column of the table that is shown; returns the rows."""
        self.page.get_by_role("columnheader", name=column).click()
        rows = self.page.get_by_role("row").filter(has=self.page.get_by_role("cell"))
        return [row.get_by_role("cell").all_inner_texts() for row in rows.all()]

    def version_of(self, model: str, step: int) -> Locator:
        """Go to a registered model; returns the row of the version of a checkpoint."""
        self.page.goto(f"{self.url}/#/models/{model}")
        tag = self.page.get_by_role("status").filter(has_text=re.compile(rf"^step\s*:\s*{step}$"))
        return self.page.get_by_role("row").filter(has=tag)

    def give_alias(self, alias: str, version: Locator) -> None:
        """Give an alias to a version; another version loses it."""
        version.get_by_role("button").last.click()
        dialog = self.page.get_by_role("dialog")
        names = dialog.get_by_role("combobox")
        names.fill(alias)
        names.press("Enter")
        expect(dialog.get_by_role("status", name=alias)).to_be_visible()
        dialog.get_by_role("button", name="Save").click()
        dialog.wait_for(state="hidden")
        self.page.reload()  # until then the page shows an alias that moved where it was
        expect(version.get_by_role("status", name=alias)).to_be_visible()
