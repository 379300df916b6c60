"""How Prefect runs a stage: what is done shows as Cached, the rest is dealt out to the task runner's workers.

The stage's files are the truth (`hubert.core.stage`), so Prefect's own result caching stays off. A task carries a group of
shards, each with its receipt: a retry or a replaced worker redoes only what is missing.
"""

import time
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from distributed.scheduler import KilledWorker
from prefect import get_run_logger, task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.futures import PrefectFuture
from prefect.states import Completed, Crashed
from prefect.tasks import Task
from prefect_dask.task_runners import DaskTaskRunner, PrefectDaskFuture

from hubert.core.errors import ConfigError, DataError, TrainingCancelled, TrainingDiverged, TransientError, first_line
from hubert.core.stage import Figures, Plan, Stage, group
from hubert.runs.plan import MAX_GROUPS
from tasks.page.failure import describe_shard, noting
from tasks.page.page import show_link, show_stage
from tasks.page.prefect_client import connect, costs_nothing, run_logger
from tasks.page.progress import Bar

if TYPE_CHECKING:
    from tasks.slurm.workers import SlurmWorkers

MAX_ROUNDS = 3  # how often shards that were lost with their workers are dealt out again

WAIT_SECONDS = 2.0  # between two looks at what a task waits for
SAY_SECONDS = 300.0  # between two equal lines about it


def worth_retrying(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Return True if another try can end differently: never for wrong settings or data, a diverged or a cancelled training."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, ConfigError | DataError | TrainingCancelled | TrainingDiverged)


RETRIES: dict[str, Any] = {"retries": 2, "retry_delay_seconds": [2, 20], "retry_condition_fn": worth_retrying}


@task(task_run_name="{label}")
def cached(label: str, folder: str) -> State[str]:
    """Show a finished stage in the UI as Cached."""
    return Completed(name="Cached", message=f"{label} is finished in {folder}", data=folder)


@task(task_run_name="{label} plan", **RETRIES)
def plan_stage(label: str, stage: Stage) -> int:  # noqa: ARG001  (`label` names the run)
    """Make sure that what the stage reads is what was written, and fix its shards; returns their number."""
    stage.check(run_logger().info)
    return len(stage.plan())


@task(task_run_name="{label}", **RETRIES)
def work_on_shards(label: str, stage: Stage, indices: Sequence[int]) -> int:  # noqa: ARG001
    """Do some shards, one after the other; returns their number."""
    plan = stage.plan()
    for index in indices:
        with noting(stage=stage.label, shard=partial(describe_shard, stage, index, plan), folder=stage.folder):
            stage.run_shard(index, plan)
    return len(indices)


@task(task_run_name="{label} finish", **RETRIES)
def finish_stage(label: str, stage: Stage) -> Figures:  # noqa: ARG001
    """Put the shards together and write `done.json`; returns the figures."""
    figures: Figures = stage.complete(stage.plan())["figures"]
    return figures


class Patience:
    """Waits for tasks, and says what they wait for while no worker is there: in the log, and beside the progress bar."""

    def __init__(self, label: str, bar: Bar | None = None) -> None:
        self.label = label
        self.bar = bar
        self._text = ""
        self._said = 0.0

    def wait(self, future: PrefectFuture[Any]) -> None:
        """Wait until a task has ended, however it ended.

        Raises:
            TransientError: the cluster has given up to get workers; the caller takes its tasks back (`give_up`).
        """
        while not future.wrapped_future.done():  # type: ignore[attr-defined]  # all task runners' futures wrap one
            future.wait(WAIT_SECONDS)
            waits_for = ""
            if (cluster := slurm_workers()) is not None:
                if cluster.failure:
                    raise TransientError(f"{self.label}: {cluster.failure}")
                waits_for = cluster.waits_for()
                self._say(waits_for)
            if self.bar is not None:
                self.bar.look(waits_for)

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if text == self._text and (not text or now - self._said < SAY_SECONDS):
            return
        self._text, self._said = text, now
        if text:
            get_run_logger().info("%s: no worker yet: %s", self.label, text)


def slurm_workers() -> "SlurmWorkers | None":
    """Return the workers of the surrounding flow if they are Slurm jobs."""
    context = FlowRunContext.get()
    runner = context.task_runner if context is not None else None
    cluster = runner.client.cluster if isinstance(runner, DaskTaskRunner) else None
    return cluster if hasattr(cluster, "waits_for") else None


def run_stage(stage: Stage, name: str = "") -> Figures:
    """Run a stage with the task runner of the surrounding flow, and return its figures.

    Args:
        stage: the stage; what is already done of it is not done again.
        name: on the run's page, where the stage's own name does not tell it from another one of the run.

    Raises:
        DataError, ConfigError: the first error of a shard; all other shards were finished before it is raised.
        TransientError: shards were lost with their workers, MAX_ROUNDS times.
    """
    logger = get_run_logger()
    if (done := stage.settled(logger.info)) is not None:
        cached(stage.label, str(stage.folder))
        logger.info("%s: finished before, in %s", stage.label, stage.folder)
        figures = dict(done["figures"])
        show_stage(stage, figures, name)
        return figures
    with noting(stage=stage.label, folder=stage.folder), stage.lock(say=logger.info):
        if (done := stage.done()) is None:
            result_of(plan_stage.submit(stage.label, stage), Patience(stage.label))
            figures = _work(stage, stage.plan(), name)
        else:  # another process finished it while this one waited for the lock
            figures = dict(done["figures"])
    show_stage(stage, figures, name)
    return figures


@costs_nothing("the Dask dashboard", lambda stage: stage.label)
def show_dashboard(stage: Stage) -> None:
    """Show where the Dask dashboard of the surrounding flow's workers is."""
    context = FlowRunContext.get()
    runner = context.task_runner if context is not None else None
    if isinstance(runner, DaskTaskRunner) and (address := runner.client.dashboard_link):
        show_link(stage.parent, "dask", address, f"Dask dashboard of the workers of {stage.label}, as long as they run")


def _work(stage: Stage, plan: Plan, name: str) -> Figures:
    """Do what is missing, with a bar on the run's page, and finish the stage."""
    show_dashboard(stage)
    bar = Bar(stage, plan, name)
    try:
        _deal_out(stage, plan, bar)
        figures: Figures = result_of(finish_stage.submit(stage.label, stage), Patience(stage.label, bar))
    except BaseException:
        bar.stop()
        raise
    bar.end()
    return figures


def _deal_out(stage: Stage, plan: Plan, bar: Bar) -> None:
    """Deal the missing shards out until none is missing."""
    logger = get_run_logger()
    patience = Patience(stage.label, bar)
    for round_number in range(1, MAX_ROUNDS + 1):
        missing = stage.missing(plan)
        if not missing:
            return
        logger.info("%s: %d of %d shards to do in %s", stage.label, len(missing), len(plan), stage.folder)
        groups = group(missing, MAX_GROUPS)
        futures = [
            work_on_shards.submit(f"{stage.label} {name_group(indices, len(plan))}", stage, indices)
            for indices in groups
        ]
        errors = []
        for number, future in enumerate(futures, start=1):
            try:
                error = outcome(future, patience)
            except TransientError as end:  # there will be no workers: the others would stay pending for ever
                give_up(futures[number - 1 :], str(end))
                raise
            if error is not None:
                errors.append(error)
            else:
                bar.add(groups[number - 1])
        fatal = [error for error in errors if not isinstance(error, KilledWorker)]
        if fatal:
            raise fatal[0]
        if errors:
            logger.warning(
                "%s: workers died in round %d (%s); their shards are dealt out again",
                stage.label,
                round_number,
                errors[0],
            )
    if lost := stage.missing(plan):
        raise TransientError(
            f"{stage.label}: {len(lost)} shards were lost with their workers {MAX_ROUNDS} times, first {lost[:5]}; "
            "likely cause: too little memory per worker (see the Dask dashboard); give the section more memory and run again"
        )


def outcome(future: PrefectFuture[Any], patience: Patience) -> BaseException | None:
    """Wait for a task and return its error, if any. A task that died with its worker is marked Crashed: nobody else would.

    Raises:
        TransientError: no worker can be had for it.
    """
    patience.wait(future)
    try:
        future.result()  # the future keeps it
    except KilledWorker as error:
        mark_crashed([future], f"the Dask worker died several times while it ran this: {error}")
        return error
    except Exception as error:  # noqa: BLE001  (whatever the task raised is handed to the caller, who raises it)
        return error
    finally:
        if isinstance(future, PrefectDaskFuture):
            future.wrapped_future.release()  # else Dask would run it again when the worker that holds the result is lost
    return None


def result_of(future: PrefectFuture[Any], patience: Patience) -> Any:
    """Wait for a task and return its result.

    Raises:
        TransientError: its workers died, several times, or none can be had.
    """
    try:
        error = outcome(future, patience)
    except TransientError as end:
        give_up([future], str(end))
        raise
    if isinstance(error, KilledWorker):
        raise TransientError(
            f"{patience.label}: the workers died that ran this ({error}); likely cause: too little memory per worker; give the "
            "section more and run again"
        ) from error
    if error is not None:
        raise error
    return future.result()


def give_up(futures: Sequence[PrefectFuture[Any]], message: str) -> None:
    """Take back tasks that no worker will run; those that have ended stay as they are."""
    waiting = [future for future in futures if not future.wrapped_future.done()]  # type: ignore[attr-defined]  # as above
    for future in waiting:
        future.wrapped_future.cancel()  # type: ignore[attr-defined]
    mark_crashed(waiting, message)


def mark_crashed(futures: Sequence[PrefectFuture[Any]], message: str) -> None:
    """Set the states of task runs whose process is gone. One that no worker has started is unknown to the server.

    It is called on the way out of an error that must not be lost: if the server does not take it, a warning says so.
    """
    try:
        with connect(retries=2) as client:
            for future in futures:
                _mark_crashed(client, future, message)
    except Exception as error:  # noqa: BLE001  (it would stand in the place of the error that names the cause)
        run_logger().warning(
            "Prefect does not take that %d tasks have crashed, so its pages may show them as running (%s: %s)",
            len(futures),
            type(error).__name__,
            first_line(error),
        )


def _mark_crashed(client: SyncPrefectClient, future: PrefectFuture[Any], message: str) -> None:
    try:
        client.set_task_run_state(future.task_run_id, Crashed(message=message), force=True)
    except PrefectHTTPStatusError as error:
        if error.response.status_code != HTTPStatus.NOT_FOUND:
            raise


def name_group(indices: Sequence[int], num_shards: int) -> str:
    """Return a name such as `0003` or `0003-0007` for a group of shards."""
    width = len(str(max(num_shards - 1, 0)))
    first, last = f"{indices[0]:0{width}d}", f"{indices[-1]:0{width}d}"
    return first if first == last else f"{first}-{last}"
