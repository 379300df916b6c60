"""Prepare a Prefect server for this project's worker: its work pool, its automation, its deployments.

    PREFECT_API_URL=http://prefect:4200/api python -m tasks.service.register

`hubert up` does this for the server that it starts; this is for one that something else starts, such as docker/compose.yaml.
"""

import os
import subprocess
import sys
from pathlib import Path

from hubert.core.errors import ConfigError, HubertError
from hubert.core.paths import PROJECT
from tasks.service.deployments import PREFECT_FILE, check_registered, deploy_command, read_deployments
from tasks.service.prefect_api import connect
from tasks.service.settings import ServiceSettings


def register(api_url: str, prefect_file: Path = PREFECT_FILE, *, project: Path = PROJECT) -> list[str]:
    """Register all deployments of a file with a server; return their names, `flow/deployment`.

    Raises:
        ConfigError: the file is wrong, a flow that it names does not exist, or the server asks for another auth string.
        TransientError: the server does not answer.
    """
    read_deployments(prefect_file)
    with connect(api_url) as api:
        api.add_work_pool(ServiceSettings().pool, ServiceSettings().run_limit)
        api.add_lost_run_automation()
        variables = {**os.environ, "PREFECT_API_URL": api_url}
        ended = subprocess.run(deploy_command(prefect_file), cwd=project, env=variables, check=False)
        return check_registered(
            prefect_file, ended.returncode, "what `prefect deploy` printed stands above", api.deployments()
        )


def main() -> int:
    """Register the project's deployments with the server that PREFECT_API_URL names; returns the exit code."""
    try:
        api_url = os.environ.get("PREFECT_API_URL")
        if not api_url:
            raise ConfigError("PREFECT_API_URL is not set: expected the address of a Prefect server's API")
        print(f"registered: {', '.join(register(api_url))}")
    except HubertError as error:
        print(f"hubert: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
