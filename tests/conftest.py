"""One real service for the whole test run: a Prefect server, an MLflow server and a worker on free ports."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.ports import free_ports

# Read by Prefect when it is imported: a test must not find the service that a developer has running in this project.
os.environ["PREFECT_PLUGINS_ENABLED"] = "false"

# A test run that a script starts with `&` ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def service_settings(root: Path, **changes: Any) -> "ServiceSettings":  # noqa: F821
    """Settings of a service of its own, below a folder; `changes` win."""
    from tasks.service.settings import ServiceSettings

    prefect_port, mlflow_port = free_ports(2)
    return ServiceSettings(
        folder=root / "data",
        prefect_port=prefect_port,
        mlflow_port=mlflow_port,
        query_seconds=1,
        profiles=root / "home" / ".prefect" / "profiles.toml",
        **changes,
    )


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Service"]:  # noqa: F821
    """A running service with the deployments of tests/flows; `environment(service.settings)` is what a flow needs."""
    from tasks.service.service import down, up

    settings = service_settings(tmp_path_factory.mktemp("the service"))  # with a space, as a user's folder may have
    project = Path(__file__).parent / "flows"
    yield up(settings, prefect_file=project / "prefect.yaml", project=project)
    down(settings)


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
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small corpus; what tests run on it lies beside it."""
    from tests.support.small import build_corpus

    return build_corpus(tmp_path_factory.mktemp("flows") / "corpus")


@pytest.fixture(scope="session")
def small_run(service: "Service", small_corpus: Path) -> "SmallRun":  # noqa: F821
    """A finished run of two iterations of the small recipe, by real flows: of use to several test files."""
    from tasks.service.settings import environment
    from tests.support.flow_runs import PRETRAINING, SmallRun, run_flow
    from tests.support.small import write_recipe

    folder = small_corpus.parent
    recipe = write_recipe(folder / "small.toml")
    parameters = {"run": str(folder / "run"), "recipe": str(recipe), "data": str(small_corpus)}
    run_flow(PRETRAINING, parameters, environment(service.settings), folder / "first.log")
    return SmallRun(folder / "run", parameters)
