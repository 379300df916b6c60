"""Start a deployed flow and follow it in a terminal: states of flow runs and tasks, warnings and errors, as lines.

Plain requests to Prefect's REST API, once a second (`tasks.service.prefect_api` says why). Who follows only reads: if it is
stopped, the run goes on.
"""

import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from hubert.core.errors import ConfigError, TransientError
from tasks.service.prefect_api import PrefectApi, connect

POLL_SECONDS = 1.0
OUTAGE_SECONDS = 60.0  # how long the server may fail to answer before following ends
WAIT_SECONDS = 60.0  # a run that no worker has taken by then is worth a word
LATE_SECONDS = 15.0  # logs are sent in batches, from several processes: this old ones may still arrive
PAGE = 200  # Prefect's own limit of rows per request

INFO, WARNING = 20, 30
EXIT_CODES = {"COMPLETED": 0, "FAILED": 1, "CANCELLED": 6, "CRASHED": 75}
"""Exit codes of the shell: a crashed run (its process was killed) is worth the same command again."""

# What Prefect and Dask say about themselves, which the lines of states say already; and the trainer's lines of single
# steps, of which the flow logs one every few seconds.
CHATTER = re.compile(
    r"Beginning |Created |Submit|Finished in state|View at|Connect|Creating a new Dask|The Dask dashboard|Executing|Task run|"
    r"Downloading|Opening process|Running \d+ deployment|Process .* exited cleanly|Starting temporary|Using task runner|"
    r"Worker '.*' submitting|.*: finished before, in |Flow run '.*' submitted|Deployment step|All deployment steps|"
    r"\d\d:\d\d:\d\d step \d"
)

# Errors that the line of the failed state holds too.
REPEATED = re.compile(
    r"Encountered exception during execution|Engine execution exited|Task run failed with exception|Finished in state"
)

Say = Callable[[str], object]
Json = dict[str, Any]
Line = tuple[datetime, str]


def start_run(api: PrefectApi, flow: str, deployment: str, parameters: Json) -> str:
    """Start a deployment with some of its parameters; returns the id of the flow run.

    Raises:
        ConfigError: there is no such deployment, or it refuses the parameters.
    """
    names = {f"{found['flow_name']}/{found['name']}": found["id"] for found in api.deployments()}
    name = f"{flow}/{deployment}"
    if name not in names:
        raise ConfigError(
            f"deployment {name} is not registered with this service (there are: {', '.join(sorted(names)) or 'none'}); "
            "`hubert down` and `hubert up` register those of deployments/prefect.yaml"
        )
    refused = (httpx.codes.CONFLICT, httpx.codes.UNPROCESSABLE_ENTITY)
    content = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    run = api.post(f"/deployments/{names[name]}/create_flow_run", content, accepted=refused)
    if "id" not in run:
        raise ConfigError(f"deployment {name} refuses the parameters {parameters}: {run}")
    return str(run["id"])


def read_family(api: PrefectApi, run_id: str) -> list[Json]:
    """Return a flow run and all below it, parents first.

    Raises:
        ConfigError: the server does not know the run.
    """
    runs = parents = api.post("/flow_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
    if not runs:
        raise ConfigError(f"the Prefect server knows no flow run {run_id}; it may have been deleted")
    while parents:
        below = {"parent_flow_run_id": {"any_": [parent["id"] for parent in parents]}}
        parents = list(_pages(api, "/flow_runs/filter", {"flow_runs": below, "sort": "START_TIME_ASC"}))
        runs = runs + parents
    return [run for run in runs if run["state"] is not None or run["id"] == run_id]


def ended_tasks(api: PrefectApi, run_ids: list[str]) -> Iterator[Json]:
    """Give the task runs that have ended, the newest first; those that stand for a flow run are left out."""
    wanted = {"flow_runs": {"id": {"any_": run_ids}}, "task_runs": {"state": {"type": {"any_": list(EXIT_CODES)}}}}
    for task in _pages(api, "/task_runs/filter", {**wanted, "sort": "END_TIME_DESC"}):
        state = task["state"]  # none yet in the moment between two of the server's writes; the next look finds it
        if state is not None and not (state.get("state_details") or {}).get("child_flow_run_id"):
            yield task


def read_logs(api: PrefectApi, run_ids: list[str], level: int, after: datetime) -> Iterator[Json]:
    """Give the log lines from `level` on that are newer than `after`, by time."""
    chosen = {"flow_run_id": {"any_": run_ids}, "level": {"ge_": level}, "timestamp": {"after_": after.isoformat()}}
    return _pages(api, "/logs/filter", {"logs": chosen, "sort": "TIMESTAMP_ASC"})


def _pages(api: PrefectApi, path: str, query: Json) -> Iterator[Json]:
    offset = 0
    while True:
        page = api.post(path, {**query, "limit": PAGE, "offset": offset})
        yield from page
        if len(page) < PAGE:
            return
        offset += PAGE


class Follower:
    """Says what is new in a flow run and all below it, each look's news in the order of their times."""

    def __init__(self, ui_url: str, say: Say, *, level: int = WARNING) -> None:
        """Show log lines from `level` on (10 debug, 20 info, 30 warnings); `ui_url` is where links lead."""
        self.ui_url = ui_url
        self.say = say
        self.level = level
        self._states: dict[str, str] = {}
        self._tasks: set[str] = set()
        self._logs: set[str] = set()
        self._flows: dict[str, str] = {}
        self._messages: set[str] = set()
        self._since = datetime.now(UTC) - timedelta(seconds=LATE_SECONDS)

    def look(self, api: PrefectApi, run_id: str) -> Json:
        """Print what has changed since the last look, and return the state of the run."""
        now = datetime.now(UTC)
        family = read_family(api, run_id)
        ids = [run["id"] for run in family]
        news = [*self._runs(api, family), *self._ended_tasks(api, ids), *self._log_lines(api, ids)]
        for at, text in sorted(news, key=lambda line: line[0]):
            self.say(f"{at.astimezone():%H:%M:%S} {text}")
        self._since = max(self._since, now - timedelta(seconds=LATE_SECONDS))
        state: Json = family[0]["state"]
        return state

    def _runs(self, api: PrefectApi, family: list[Json]) -> Iterator[Line]:
        """Give a line per flow run whose state has changed; a link with the first one and with each failure."""
        for run in reversed(family):  # those below first: it is they that say why something failed
            state = run["state"]
            if self._states.get(run["id"]) == state["name"]:
                continue
            if run["flow_id"] not in self._flows:
                (flow,) = api.post("/flows/filter", {"flows": {"id": {"any_": [run["flow_id"]]}}})
                self._flows[run["flow_id"]] = flow["name"]
            is_first = run is family[0] and run["id"] not in self._states
            self._states[run["id"]] = state["name"]
            failed = state["type"] in EXIT_CODES and state["type"] != "COMPLETED"
            link = f"  {self.ui_url}/runs/flow-run/{run['id']}" if is_first or failed else ""
            name = f"{'' if run is family[0] else '  '}{run['name']} ({self._flows[run['flow_id']]})"
            yield _time(state), f"{name} {state['name']}{self._message(state)}{link}"

    def _ended_tasks(self, api: PrefectApi, run_ids: list[str]) -> Iterator[Line]:
        """Give a line per task that failed, and one per stage for those that ended well."""
        well: dict[tuple[str, str], list[Json]] = {}
        for task in self._new_tasks(api, run_ids):
            state = task["state"]
            if state["type"] == "COMPLETED":
                stage, _, rest = task["name"].partition(" ")
                well.setdefault((stage, state["name"]), []).append({**task, "rest": rest})
            else:
                yield _time(state), f"    {task['name']} {state['name']}{self._message(state)}"
        for (stage, state_name), tasks in well.items():
            names = ", ".join(task["rest"] for task in tasks if task["rest"])
            longest = max(float(task.get("total_run_time") or 0) for task in tasks)
            seconds = f" ({longest:.0f} s)" if longest >= 1 else ""
            yield (
                max(_time(task["state"]) for task in tasks),
                f"    {stage} {names} {state_name}{seconds}".replace("  ", " "),
            )

    def _new_tasks(self, api: PrefectApi, run_ids: list[str]) -> list[Json]:
        """Return the tasks that have ended since the last look, by time."""
        new: list[Json] = []
        num_known = 0
        for task in ended_tasks(api, run_ids):
            if task["id"] in self._tasks:
                num_known += 1
                if num_known >= PAGE:
                    break  # the newest come first, so all others were shown
            else:
                self._tasks.add(task["id"])
                new.append(task)
        return new[::-1]

    def _message(self, state: Json) -> str:
        """Return why something failed; a flow above it, which failed for the same reason, does not repeat it."""
        message = str(state.get("message") or "")
        if state["type"] not in EXIT_CODES or state["type"] == "COMPLETED" or not message:
            return ""
        if message in self._messages:
            return ": as above"
        self._messages.add(message)
        return f": {message}"

    def _log_lines(self, api: PrefectApi, run_ids: list[str]) -> Iterator[Line]:
        """Give the new log lines; of those that are no warnings, or hold a traceback, only the first line of text."""
        for line in read_logs(api, run_ids, self.level, self._since):
            if line["id"] in self._logs:
                continue
            self._logs.add(line["id"])
            whole = line["level"] >= WARNING and "Traceback" not in line["message"]
            text = line["message"] if whole else line["message"].partition("\n")[0]
            if not REPEATED.match(text) and (whole or not CHATTER.match(text)):
                yield _time(line), f"      {text}"


def _time(content: Json) -> datetime:
    return datetime.fromisoformat(content["timestamp"])


def follow(
    api_url: str, ui_url: str, run_id: str, say: Say = print, *, level: int = WARNING, auth: str | None = None
) -> Json:
    """Follow a flow run until it ends, and return its last state (`type`, `name`, `message`).

    Raises:
        ConfigError: the server asks for another auth string than `auth`.
        TransientError: the server does not answer any more; the run itself may go on.
    """
    follower = Follower(ui_url, say, level=level)
    answered = said = time.monotonic()
    while True:
        try:
            with connect(api_url, auth) as api:
                state = follower.look(api, run_id)
                if state["type"] in EXIT_CODES:
                    time.sleep(POLL_SECONDS)  # the last lines of the log come after the state
                    return follower.look(api, run_id)
            answered = time.monotonic()
            if state["type"] in {"SCHEDULED", "PENDING"} and answered - said > WAIT_SECONDS:
                said = answered
                with connect(api_url, auth) as api:
                    say(f"         {api.why_waiting(read_family(api, run_id)[0])}")
        except TransientError as error:
            if time.monotonic() - answered > OUTAGE_SECONDS:
                raise TransientError(f"{error}. The run may go on: `hubert up` starts the server again") from error
        time.sleep(POLL_SECONDS)
