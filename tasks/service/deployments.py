"""The deployments of `deployments/prefect.yaml`, registered with Prefect's own command.

`prefect deploy` runs in the project's folder, so that a deployment without a `pull` step gets that folder as its
working directory: the worker finds the code there, and no path of a machine stands in the file.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from hubert.core.errors import ConfigError
from hubert.core.paths import DEPLOYMENTS

PREFECT_FILE = DEPLOYMENTS / "prefect.yaml"


def read_deployments(prefect_file: Path) -> list[tuple[str, str]]:
    """Return the name and the entry point of each deployment of a file.

    Prefect itself skips a file that it cannot read, and succeeds.

    Raises:
        ConfigError: the file is missing or is no YAML, or a deployment lacks its name or entry point.
    """
    try:
        content = yaml.safe_load(prefect_file.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{prefect_file}: no such file; expected the deployments to register") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{prefect_file} is not valid YAML: {error}") from error
    deployments = content.get("deployments") if isinstance(content, dict) else None
    if not isinstance(deployments, list) or not deployments:
        raise ConfigError(f"{prefect_file}: expected a list `deployments` with at least one entry")
    found = []
    for number, deployment in enumerate(deployments, start=1):
        match deployment:
            case {"name": str(name), "entrypoint": str(entrypoint)}:
                found.append((name, entrypoint))
            case _:
                raise ConfigError(
                    f"{prefect_file}: deployment {number}: expected `name` and `entrypoint`, found {deployment}"
                )
    return found


def deploy_command(prefect_file: Path) -> list[str]:
    """Return the command that registers all deployments of a file; to be run in the project's folder."""
    file = str(prefect_file.resolve())
    return [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file]


def check_registered(prefect_file: Path, code: int | None, printed: str, registered: list[dict[str, Any]]) -> list[str]:
    """Check that `deploy_command` did its work; return the deployments' names, `flow/deployment`.

    Args:
        prefect_file: the deployments that it was to register.
        code: its exit status.
        printed: what it printed, or where that is, for the error.
        registered: the deployments that the server has now.

    Raises:
        ConfigError: it failed, or the server lacks a deployment of the file.
    """
    names = {(found["name"], found["entrypoint"]): f"{found['flow_name']}/{found['name']}" for found in registered}
    expected = read_deployments(prefect_file)
    missing = [f"{name} ({entrypoint})" for name, entrypoint in expected if (name, entrypoint) not in names]
    if code != 0 or missing:
        what = f"missing on the server: {', '.join(missing)}; " if missing else ""
        raise ConfigError(
            f"the deployments of {prefect_file} could not be registered ({what}usually an entry point that does not "
            f"exist); {printed}"
        )
    return [names[key] for key in expected]
