"""The iteration's page, and the one of the whole run: `hubert.report.stage`, linked from the Prefect run and from MLflow."""

import os

from prefect import get_run_logger, task

from hubert.core.errors import TransientError
from hubert.core.paths import RunFolder
from hubert.report.stage import is_summarised, summarise_run
from hubert.runs.pipeline import Iteration
from tasks.page.page import key_of, open_page, recall_link, show, show_link
from tasks.stage import cached, run_stage
from tasks.train import link_of

SUMMARY = "report of the run"
LOGGED = "logged"  # names the MLflow server that has a report's figures


def run(iteration: Iteration) -> None:
    """Write the iteration's report, and log its figures to MLflow."""
    stage = iteration.report
    was_done = stage.done() is not None
    run_stage(stage)
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    logged = stage.folder / LOGGED
    link = link_of(iteration.train, "mlflow-checkpoints")
    if not server or (was_done and logged.exists() and logged.read_text() == server):
        recall_link(iteration.home, link)
        return
    from tasks.tracking.mirror import tracker_of
    from tasks.tracking.registry import log_evaluation  # as in tasks/train.py

    if (tracker := tracker_of(iteration)) is None:
        return
    try:
        address = log_evaluation(iteration, tracker)
    except TransientError as error:
        get_run_logger().warning("%s. Run this again when it answers, and it gets all that it misses", error)
    else:
        show_link(iteration.home, link, address, "checkpoints in MLflow: compare and choose")
        logged.write_text(server)


def summarise(run: str) -> str:
    """Write the page of the whole run and show its table; returns the page's path. Up to date, it is left as it is."""
    open_page()
    folder = RunFolder.of(run)
    if is_summarised(folder):
        cached(SUMMARY, str(folder.report))
    else:
        write_summary(SUMMARY, folder)
    return str(folder.report)


@task(task_run_name="{label}")
def write_summary(label: str, folder: RunFolder) -> None:  # noqa: ARG001  (`label` names the run)
    """Write the page of the whole run, and show its table."""
    path, text = summarise_run(folder)
    show(
        "markdown",
        key_of(folder.root, "comparison"),
        f"```\n{text}\n```\n\nreport: `{path}`",  # as text: browsers follow no link from a server's page to a file
        f"{folder.name}: MFCC and all iterations, side by side",
    )
    get_run_logger().info("%s", text)
