"""The few requests that the service makes to its Prefect server, over Prefect's REST API.

Plain HTTP instead of Prefect's client: importing that takes longer than `hubert status` and `hubert down` take.
"""

import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import httpx

from hubert.core.errors import ConfigError, TransientError
from tasks.service.access import CLIENT_AUTH

REQUEST_SECONDS = 10.0
BUSY_SECONDS = 30.0
RETRY_SECONDS = 0.5
LOST_RUNS = "Crash runs that stopped sending heartbeats"
FOUND_RUNS = "Runs whose heartbeats come back are running again"
LOST = "Lost"  # the name of the state of such a run, which tells it from one that said itself that it crashed
# Runs send a heartbeat every 30 s (`service_settings`); six missing ones in a row are no hiccup of a busy machine.
HEARTBEATS_LOST_SECONDS = 180
FOUND_SECONDS = 7 * 24 * 3600  # how long after that a heartbeat may come back
GO_ON = "Retry it, or start it again with the same parameters: it goes on where it was."


class PrefectApi:
    """Requests to one Prefect server; use it as `with connect(url) as api`."""

    def __init__(self, client: httpx.Client) -> None:
        """Take a client whose base address is the API's."""
        self._client = client

    def is_healthy(self) -> bool:
        """Return True if the server answers and calls itself healthy."""
        try:
            return self._client.get("/health").is_success
        except httpx.HTTPError:
            return False

    def add_work_pool(self, name: str, limit: int, *, chosen: bool = False) -> None:
        """Create a work pool for a process worker, unless there is one of that name.

        Args:
            name: of the pool.
            limit: how many runs it takes at once; the others wait, as `Late` on their pages. A pool keeps the limit that it has.
            chosen: a person asked for this limit: a pool that is there gets it too.
        """
        pool = {"name": name, "type": "process", "concurrency_limit": limit}
        self.post("/work_pools/", pool, accepted=(httpx.codes.CONFLICT,))
        if chosen or self._pool(name)["concurrency_limit"] is None:
            self.patch(f"/work_pools/{name}", {"concurrency_limit": limit})

    def why_waiting(self, run: Mapping[str, Any]) -> str:
        """Return why no worker has started a flow run yet."""
        name = run.get("work_pool_name")
        limit = self._pool(name)["concurrency_limit"] if name else None
        if limit is not None:
            at_work = {
                "state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}},
                "id": {"not_any_": [run["id"]]},
            }
            count = self.post("/flow_runs/count", {"flow_runs": at_work, "work_pools": {"name": {"any_": [name]}}})
            if count >= limit:
                return (
                    f"this run waits for its turn: {count} others are under way, and the service does {limit} at once "
                    "(`hubert up --max-runs`)"
                )
        return "no worker has started this run yet; `hubert status` says whether there is one"

    def _pool(self, name: str) -> dict[str, Any]:
        """Return what the server knows of a work pool."""
        (pool,) = self.post("/work_pools/filter", {"work_pools": {"name": {"any_": [name]}}})
        return dict(pool)

    def worker_is_online(self, pool: str, name: str, since: float) -> bool:
        """Return True if a worker has reported after `since` (seconds since the epoch)."""
        try:
            workers = self.post(f"/work_pools/{pool}/workers/filter", {})
        except httpx.TransportError:
            return False
        heartbeats = (worker["last_heartbeat_time"] for worker in workers if worker["name"] == name)
        return any(datetime.fromisoformat(heartbeat).timestamp() >= since for heartbeat in heartbeats if heartbeat)

    def deployments(self) -> list[dict[str, Any]]:
        """Return the registered deployments, each with its flow's name as `flow_name`."""
        found = self.post("/deployments/filter", {})
        flows = self._flow_names({deployment["flow_id"] for deployment in found})
        return [{**deployment, "flow_name": flows[deployment["flow_id"]]} for deployment in found]

    def add_lost_run_automation(self) -> None:
        """Have the server mark a run as crashed when its heartbeats stop, unless that is set up already.

        Needed where the flow's process and its worker die together: nobody is left to say so. Any event of the run
        counts as a sign of life, so a run that ended or was suspended is left alone. A run that was wrongly given up
        (a laptop that slept) is running again with its next heartbeat, and can be cancelled again.
        """
        trigger = {
            "type": "event",
            "posture": "Proactive",
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "for_each": ["prefect.resource.id"],
            "after": ["prefect.flow-run.heartbeat"],
            "expect": ["prefect.flow-run.*"],
            "threshold": 1,
            "within": HEARTBEATS_LOST_SECONDS,
        }
        message = f"No heartbeat for {HEARTBEATS_LOST_SECONDS} s: the run's process and its worker are gone. {GO_ON}"
        action = {"type": "change-flow-run-state", "state": "CRASHED", "name": LOST, "message": message}
        self._put_automation(LOST_RUNS, trigger, action)
        trigger = {
            "type": "event",
            "posture": "Reactive",
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "for_each": ["prefect.resource.id"],
            "after": [f"prefect.flow-run.{LOST}"],
            "expect": ["prefect.flow-run.heartbeat"],
            "threshold": 1,
            "within": FOUND_SECONDS,
        }
        found: dict[str, Any] = {"type": "change-flow-run-state", "state": "RUNNING", "name": "Running", "force": True}
        self._put_automation(FOUND_RUNS, trigger, {**found, "message": "Its heartbeats are back."})

    def _put_automation(self, name: str, trigger: Mapping[str, Any], action: Mapping[str, Any]) -> None:
        """Create an automation, or replace that of an earlier version: one that is at work is not disturbed."""
        wanted = {"name": name, "trigger": trigger, "actions": [action]}
        for found in self.post("/automations/filter", {"automations": {"name": {"any_": [name]}}}):
            if found["actions"][0].get("name") == action["name"]:
                return
            self._send("PUT", f"/automations/{found['id']}", {**wanted, "enabled": True})
            return
        self.post("/automations/", wanted)

    def crash_unfinished_runs(self, pool: str, message: str) -> list[str]:
        """Mark the runs of a work pool whose processes are gone, and their subflows, as crashed, for the reason in `message`.

        Scheduled and suspended runs have no process: they stay as they are. Returns the names, `flow run (flow)`.
        """
        at_work = {
            "operator": "or_",
            "type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]},
            "name": {"any_": ["Paused"]},
        }
        runs = self.post(
            "/flow_runs/filter", {"flow_runs": {"state": at_work}, "work_pools": {"name": {"any_": [pool]}}}
        )
        parents = [run["id"] for run in runs]
        while parents:
            of_parents = {"state": at_work, "parent_flow_run_id": {"any_": parents}}
            subflows = self.post("/flow_runs/filter", {"flow_runs": of_parents})
            runs += subflows
            parents = [run["id"] for run in subflows]
        crashed = {"state": {"type": "CRASHED", "name": "Crashed", "message": f"{message} {GO_ON}"}, "force": True}
        for run in runs:
            self._crash_tasks(run["id"], crashed)
            self.post(f"/flow_runs/{run['id']}/set_state", crashed)
        flows = self._flow_names({run["flow_id"] for run in runs})
        return [f"{run['name']} ({flows[run['flow_id']]})" for run in runs]

    def _crash_tasks(self, flow_run: str, crashed: Mapping[str, Any]) -> None:
        """Mark the task runs of a flow run that were under way as crashed; those that have ended stay as they are."""
        under_way = {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}
        wanted = {"flow_runs": {"id": {"any_": [flow_run]}}, "task_runs": under_way}
        for task in self.post("/task_runs/filter", wanted):
            self.post(f"/task_runs/{task['id']}/set_state", crashed)

    def _flow_names(self, ids: set[str]) -> dict[str, str]:
        """Return the names of flows by their ids."""
        found = self.post("/flows/filter", {"flows": {"id": {"any_": sorted(ids)}}}) if ids else []
        return {flow["id"]: flow["name"] for flow in found}

    def post(self, path: str, content: Mapping[str, Any], *, accepted: Collection[int] = ()) -> Any:
        """Send a request, and return the answer."""
        return self._send("POST", path, content, accepted).json()

    def patch(self, path: str, content: Mapping[str, Any]) -> None:
        """Change something that is there."""
        self._send("PATCH", path, content)

    def _send(
        self, method: str, path: str, content: Mapping[str, Any], accepted: Collection[int] = ()
    ) -> httpx.Response:
        """Send a request; for a while again if the server is busy (SQLite's lock is held: it answers 503)."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            response = self._client.request(method, path, json=content)
            if response.is_success or response.status_code in accepted:
                return response
            if response.status_code == httpx.codes.UNAUTHORIZED:
                raise ConfigError(
                    f"{response.request.url} asks for another auth string than this command has. It is in the file `auth` of "
                    f"the folder of the service that runs there (--folder, HUBERT_SERVICE), or in {CLIENT_AUTH}"
                )
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                raise TransientError(f"{response.request.url} answered {response.status_code}: {response.text[:500]}")
            time.sleep(RETRY_SECONDS)


@contextmanager
def connect(api_url: str, auth: str | None = None) -> Iterator[PrefectApi]:
    """Open a connection to the API of a Prefect server.

    Args:
        api_url: the API's address.
        auth: what the server asks for, `user:password`; default: the variable that Prefect's own clients read.

    Raises:
        ConfigError: the server asks for another auth string.
        TransientError: the server does not answer, or refuses a request.
    """
    user, found, password = (auth or os.environ.get(CLIENT_AUTH) or "").partition(":")
    sign_in = httpx.BasicAuth(user, password) if found else None
    # The server is on this machine or in its network: a proxy from the environment would only be in the way.
    with httpx.Client(base_url=api_url, auth=sign_in, timeout=REQUEST_SECONDS, trust_env=False) as client:
        try:
            yield PrefectApi(client)
        except httpx.TransportError as error:
            raise TransientError(f"the Prefect server at {api_url} does not answer ({error})") from error
