"""One real service for the whole test run, however many processes it has: Prefect and MLflow servers and a worker.

`make test` runs several processes of tests (pytest-xdist), each of which takes one file of tests after the other.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from tools.ports import free_ports

# Read by Prefect when it is imported: a test must not find the service that a developer has running in this project.
os.environ["PREFECT_PLUGINS_ENABLED"] = "false"

# A test run that a script starts with `&` ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


IN_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if IN_WORKER:  # read by torch, NumPy and polars when they are imported: the processes of tests share the cores
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"), "1"))


ON_THE_SMALL_RUN = {
    "test_flows.py",
    "test_watch.py",
}  # files whose tests use `small_run`: it is made once, in one process
SLOW = {"service", "slurm", "small_run", "finished", "undisturbed"}  # fixtures that start servers or train


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts servers or trains, and let the tests of the small run, which take longest, come first."""
    for item in items:
        if SLOW.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    if IN_WORKER:
        items.sort(key=lambda item: item.path.name not in ON_THE_SMALL_RUN)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process, for its fixtures, and all files that use the small run in one.

    pytest-xdist's own groups go by marks, which it cannot hand over since pytest 9.2: each test would be a group.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "the small run" if Path(file).name in ON_THE_SMALL_RUN else file

    return ByFile(config, log)


def shared_folder(config: pytest.Config) -> Path:
    """Return the folder that all processes of this test run have in common."""
    folder = config._tmp_path_factory.getbasetemp()
    return folder.parent if IN_WORKER else folder


def service_settings(root: Path, **changes: Any) -> "ServiceSettings":  # noqa: F821
    """Settings of a service of its own, below a folder; `changes` win."""
    from tasks.service.settings import ServiceSettings

    prefect_port, mlflow_port = free_ports(2)
    return ServiceSettings(
        folder=root / "data",
        prefect_port=prefect_port,
        mlflow_port=mlflow_port,
        query_seconds=1,
        max_runs=8,
        profiles=root / "home" / ".prefect" / "profiles.toml",
        **changes,
    )


def service_root(config: pytest.Config) -> Path:
    """Return the folder of the service; it has a space, as a user's may have."""
    return shared_folder(config) / "the service"


@pytest.fixture(scope="session")
def service(pytestconfig: pytest.Config) -> "Service":  # noqa: F821
    """A running service with the deployments of tests/flows; `environment(service.settings)` is what a flow needs.

    All processes of a test run share it: the first that needs it starts it, and it is stopped when all have ended.
    """
    from tasks.service.service import up
    from tasks.service.settings import find_service

    root, project = service_root(pytestconfig), Path(__file__).parent / "flows"
    with FileLock(f"{root}.lock"):
        found = find_service(root / "data")
        settings = found.settings if found else service_settings(root)
        return up(settings, prefect_file=project / "prefect.yaml", project=project)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop what all processes of tests shared, and what one left that was interrupted: from the process that ends last."""
    if IN_WORKER:
        return
    if service_root(config).exists():
        from tasks.service.service import down

        down(service_settings(service_root(config)))
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("SLURM_CONF", "").startswith(f"{shared_folder(config)}/"):
                process.kill()


@pytest.fixture(scope="session")
def deployed(service: "Service") -> "Service":  # noqa: F821
    """The running service with the project's own deployments, beside those of tests/flows."""
    from tasks.service.service import deploy

    deploy(service.settings)
    return service


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread, and for long where other processes want the core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator["VirtualSlurm"]:  # noqa: F821
    """A real Slurm of three virtual nodes; SLURM_CONF is set, so this process and its children talk to it."""
    from tools.virtual_slurm import VirtualSlurm, missing_reason

    if reason := missing_reason():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch, VirtualSlurm(tmp_path_factory.mktemp("slurm")) as cluster:
        for name, value in cluster.environment().items():
            patch.setenv(name, value)
        yield cluster


@pytest.fixture(scope="session")
def small_corpus(pytestconfig: pytest.Config) -> Path:
    """The small corpus, to be read only: all processes of a test run share it."""
    from tests.support.small import build_corpus

    return build_corpus(shared_folder(pytestconfig) / "small corpus")


@pytest.fixture(scope="session")
def small_run(service: "Service", small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> "SmallRun":  # noqa: F821
    """A finished run of two iterations of the small recipe, by real flows: of use to several test files."""
    from tasks.service.settings import environment
    from tests.support.flow_runs import PRETRAINING, SmallRun, run_flow
    from tests.support.small import write_recipe

    folder = tmp_path_factory.mktemp("flows")
    recipe = write_recipe(folder / "small.toml")
    parameters = {"run": str(folder / "run"), "recipe": str(recipe), "data": str(small_corpus)}
    run_flow(PRETRAINING, parameters, environment(service.settings), folder / "first.log")
    return SmallRun(folder / "run", parameters)
