"""What a failed run says: where it happened, why, and what to do, as a page of the run in the Prefect UI.

Where is noted on the error while it passes (`noting`): the notes travel with it from a Dask worker, stand in every
traceback, and `write_page` collects them. A process that was killed leaves no error: then the page says what was under way.
A run that goes on after that and ends well says so in the place of the page (`close_page`).
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from prefect.settings import PREFECT_API_URL

from hubert.core.errors import (
    ConfigError,
    DataError,
    HubertError,
    TrainingCancelled,
    TrainingDiverged,
    TransientError,
    first_line,
)
from hubert.core.paths import RunFolder
from hubert.core.stage import Plan, Stage
from hubert.core.text import markdown_table
from hubert.training.launch import find_running, unfinished_job
from tasks.page.page import key_of
from tasks.page.prefect_client import path_of
from tasks.service.follow import read_family
from tasks.service.prefect_api import PrefectApi, connect

WHAT_FAILED = "what-failed"  # how the key of a page ends
WENT_ON = "failed before, and went on: it has ended well since"
FACTS = ("stage", "shard", "folder", "log")

# What to do, by error; one point per line. {again} and {copy}: for a run that was started by a deployment, else the second.
ADVICE: dict[type[BaseException], str] = {
    ConfigError: "A setting cannot be obeyed; the message names it. If it stands in the form: {copy}\n"
    "If a file or folder is missing: put it there. {again}",
    DataError: "The data are not what they have to be; the message names the file. Restore, correct or remove it. {again}\n"
    "If the message names a setting, such as `data.max_rejected`, that is the other way. {copy}",
    TrainingDiverged: "The same training would end the same way. Try a lower `train.learning_rate`, more "
    "`train.warmup_steps`, or `train.precision` = fp32: that is another training, and this one stays. {copy}",
    TrainingCancelled: "Somebody stopped the training, so the service does not start it again by itself. To go on from its "
    "last checkpoint: {again}",
    TransientError: "Something around the program failed: a process, a machine, a disk, the network. {again}\n"
    "If it fails again, the message names the likely cause: often too little memory (the section of the cluster file) or a "
    "full disk.",
}
UNFORESEEN = (
    "Nobody foresaw this error: a fault of the program, or of a library. {again}\n"
    "If it fails again, report it with the traceback in the log and the settings (the run's artifact that says what it does)."
)
KILLED = (
    "The process of the run is gone. Likely cause: it used too much memory, somebody stopped it, or the machine or the "
    "service went down. {again}\n"
    "A training that still runs is found and followed."
)
KEPT = "It goes on where it was: finished shards, steps and stages are not done again."
RETRY = (
    "Press **Retry** in the menu at the top right of [the run's page]({page}), or type `prefect flow-run retry {id}`."
)
START = "Start it once more with the same parameters."
COPY = (
    "Press **Copy to new run** in the menu at the top right of [the run's page]({page}), change the field, and submit."
)
CHANGE = "Start it again with another value."
MARKDOWN = re.compile(r"([\\`*_<>\[\]|#])")


@contextmanager
def noting(**facts: Any) -> Iterator[None]:
    """Write on an error that passes where it happened (facts may be functions); what was noted before, nearer to it, stands.

    The message of an error of ours, which becomes the state of every run above it, begins with the place.
    """
    try:
        yield
    except Exception as error:
        known = facts_of(error)
        new = {name: _say(facts[name]) for name in FACTS if name in facts and name not in known}
        for name, value in new.items():
            error.add_note(f"{name}: {value}")
        if isinstance(error, HubertError) and "stage" in new and not str(error).startswith(new["stage"]):
            place = f"{new['stage']}, shard {new['shard']}" if "shard" in new else new["stage"]
            error.args = (f"{place}: {error}", *error.args[1:])
        raise


def _say(fact: Any) -> str:
    try:
        return str(fact() if callable(fact) else fact)
    except Exception as error:  # noqa: BLE001  (what explains an error must not stand in its place)
        return f"unknown ({first_line(error)})"


def facts_of(error: BaseException | None) -> dict[str, str]:
    """Return what was noted on an error."""
    notes = (note.partition(": ") for note in getattr(error, "__notes__", ()))
    return {name: value for name, colon, value in notes if colon and name in FACTS}


def describe_shard(stage: Stage, index: int, plan: Plan) -> str:
    """Return which shard that is, and the first and last file of it, if it is made of files."""
    spec = plan.specs[index]
    name = f"{index} (of {len(plan)}, counted from 0)"
    listing = stage.tables().get(spec.get("part", ""))
    if listing is None or not listing.exists():
        return name
    ids = pl.scan_parquet(listing).slice(spec["start"], spec["end"] - spec["start"]).select("fileid").collect()
    files = ids["fileid"].to_list()
    return f"{name}, files {files[0]} to {files[-1]}" if files else name


# The page ---------------------------------------------------------------------------------------------------------


def write_page(flow: Any, flow_run: Any, state: Any) -> None:  # noqa: ARG001  (Prefect passes all three by name)
    """Write the page of a run that has failed or crashed. Prefect calls it: in the run's process, or after its death."""
    error = state.result(raise_on_failure=False) if state.is_failed() else None
    with connect(PREFECT_API_URL.value() or "") as api:
        text = build_page(api, flow_run, error if isinstance(error, BaseException) else None, state.message or "")
        content = {"data": text, "description": "what failed, where, and what to do"}
        pages = _find_own(api, flow_run)
        for page in pages:
            api.patch(f"/artifacts/{page['id']}", content)
        if not pages:
            key = key_of_page(flow_run, read_family(api, str(flow_run.id))[0]["tags"])
            api.post("/artifacts/", {**content, "key": key, "type": "markdown", "flow_run_id": str(flow_run.id)})


def close_page(flow: Any, flow_run: Any, state: Any) -> None:  # noqa: ARG001  (Prefect passes all three by name)
    """Mark the pages of earlier failures of a run that has ended well. Prefect calls it."""
    if not PREFECT_API_URL.value():
        return  # a server within the flow's process, which nobody looks at
    with connect(PREFECT_API_URL.value() or "") as api:
        key = key_of_page(flow_run, read_family(api, str(flow_run.id))[0]["tags"])
        same = api.post("/artifacts/filter", {"artifacts": {"key": {"any_": [key]}}})
        for page in {page["id"] for page in (*same, *_find_own(api, flow_run)) if page["description"] != WENT_ON}:
            api.patch(f"/artifacts/{page}", {"data": f"It {WENT_ON}.", "description": WENT_ON})


def key_of_page(flow_run: Any, tags: Collection[str]) -> str:
    """Return the key of the page of a run, or of the iteration that its tags name: no other run has the same."""
    number = next((tag for tag in tags if re.fullmatch(r"it\d+", tag)), "")
    return key_of((_folder_of(flow_run) or Path(_name_of(flow_run))) / number, WHAT_FAILED)


def _find_own(api: PrefectApi, flow_run: Any) -> list[dict[str, Any]]:
    """Return the page of a flow run; its key may be another than now, if it failed before it knew its iteration."""
    own = {"flow_run_id": {"any_": [str(flow_run.id)]}, "key": {"like_": WHAT_FAILED}}
    found = api.post("/artifacts/filter", {"artifacts": own})
    return [page for page in found if page["key"].endswith(WHAT_FAILED)]  # a run may have that name


def build_page(api: PrefectApi, flow_run: Any, error: BaseException | None, message: str) -> str:
    """Return the page as markdown."""
    family = read_family(api, str(flow_run.id))
    facts = facts_of(error)
    reason, _, details = (f"{type(error).__name__}: {error}" if error else message).partition("\n")
    stage = f" in {facts['stage']}" if "stage" in facts else ""
    rows = [
        *((name, f"`{value}`") for name, value in facts.items()),
        *_links(api, family, error),
        *find_orphans(flow_run),
    ]
    parts = [
        f"## {family[0]['name']} {'failed' if error else 'crashed'}{stage}",
        MARKDOWN.sub(r"\\\1", reason),
        markdown_table(["", ""], rows),
        "### What to do",
        "\n".join(f"- {line}" for line in advise(error, find_start(api, family[0]))),
        f"`hubert status {_run_of(flow_run)}` says what of the run is done.",
        f"### The rest of the message\n\n```\n{details.strip()}\n```" if details.strip() else "",
    ]
    return "\n\n".join(part for part in parts if part)


def find_start(api: PrefectApi, run: dict[str, Any]) -> dict[str, Any]:
    """Return the run that somebody started: the one itself, or the outermost one above it."""
    while task_id := run["parent_task_run_id"]:
        (task,) = api.post("/task_runs/filter", {"task_runs": {"id": {"any_": [task_id]}}})
        run = read_family(api, task["flow_run_id"])[0]
    return run


def advise(error: BaseException | None, start: dict[str, Any]) -> list[str]:
    """Return what to do about an error; None: the process was killed. `start`: the run that somebody started."""
    text = next((found for kind, found in ADVICE.items() if isinstance(error, kind)), UNFORESEEN if error else KILLED)
    again, copy = (RETRY, COPY) if start["deployment_id"] else (START, CHANGE)
    place = {"page": path_of("runs/flow-run", start["id"]), "id": start["id"]}
    return text.format(again=f"{again.format(**place)} {KEPT}", copy=copy.format(**place)).splitlines()


def _links(api: PrefectApi, family: list[dict[str, Any]], error: BaseException | None) -> Iterator[tuple[str, str]]:
    """Give the innermost run that failed (its log has the traceback) and the tasks that failed, or were under way."""
    states = ("FAILED", "CRASHED") if error else ("RUNNING", "PENDING", "CRASHED")
    wanted = {
        "flow_runs": {"id": {"any_": [run["id"] for run in family]}},
        "task_runs": {"state": {"type": {"any_": states}}},
    }
    tasks = api.post("/task_runs/filter", {**wanted, "sort": "END_TIME_DESC"})
    own = [task for task in tasks if not (task["state"]["state_details"] or {}).get("child_flow_run_id")]
    inner = [run for run in family if run["state_type"] in states] or family[:1]
    yield "log of", f"[{inner[-1]['name']}]({path_of('runs/flow-run', inner[-1]['id'])}) (its tab Logs)"
    if own:
        shown = ", ".join(f"[{task['name']}]({path_of('runs/task-run', task['id'])})" for task in own[:5])
        yield "failed" if error else "under way", f"{shown}{', ...' if len(own) > 5 else ''}"


def find_orphans(flow_run: Any) -> Iterator[tuple[str, str]]:
    """Give the trainings that go on without their flow, and how they are stopped."""
    root = _folder_of(flow_run)
    for training in RunFolder(root).trainings() if root is not None else ():
        process, job = find_running(training), unfinished_job(training)
        if name := f"job {job}" if job else process.name if process else "":
            yield (
                "still trains",
                f"{name}, in `{training}`: `hubert stop {_run_of(flow_run)}` stops it after a checkpoint",
            )


def _run_of(flow_run: Any) -> str:
    """Return how the run is called in a shell: its name, or its path."""
    run, root = _name_of(flow_run), _folder_of(flow_run)
    if root is None:
        return "RUN"
    return run if run == root.name else f"'{root}'" if re.search(r"\s", run) else str(root)


def _name_of(flow_run: Any) -> str:
    return str(flow_run.parameters.get("run", "demo"))


def _folder_of(flow_run: Any) -> Path | None:
    """Return the run's folder; None if its name cannot be one."""
    try:
        return RunFolder.of(_name_of(flow_run)).root
    except ConfigError:
        return None
