"""What this project adds to Prefect in any shell of its environment: the service's address, and bare deployment names.

    prefect deployment run hubert-iteration      # means hubert-iteration/local, on the service that `hubert up` started

Prefect 3.8 loads it through the entry point group `prefect.plugins` wherever its setting `plugins.enabled` is true
(`tasks.service.profiles` says where that is), whenever Prefect is imported. An address that the user has configured stands.
"""

import os
from functools import wraps
from typing import Any

from prefect.client import orchestration
from prefect.plugins import HookContext, SetupResult, register_hook

from tasks.service.access import CLIENT_AUTH
from tasks.service.settings import environment, find_service

DEFAULT_DEPLOYMENT = "local"
SUPPLIED = (
    *("PREFECT_API_URL", CLIENT_AUTH, "PREFECT_UI_URL", "MLFLOW_TRACKING_URI", "NO_PROXY", "no_proxy"),
    *("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"),
)


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Let Prefect's clients accept bare names; give this process the addresses of the service, if one was started."""
    for name in ("PrefectClient", "SyncPrefectClient"):
        if not accept_bare_names(getattr(orchestration, name, None)):
            ctx.logger_factory(__name__).warning(
                "Prefect %s has no %s.read_deployment_by_name: write <flow>/<deployment> in full",
                ctx.prefect_version,
                name,
            )
    service = None if ctx.api_url else find_service()
    if service is None:
        return None
    variables = environment(service.settings)
    proxies = {"NO_PROXY", "no_proxy"}  # these hold what the user has set, with the service's host added
    missing = (name for name in SUPPLIED if name in proxies or name not in os.environ)
    supplied = {name: variables[name] for name in missing if name in variables}
    return SetupResult(env=supplied, note=f"service in {service.settings.folder}")


def accept_bare_names(client: Any) -> bool:
    """Let a client class look up the deployment `local` of a flow that is named without a deployment.

    Returns False, and changes nothing, if the class does not have the method that is wrapped.
    """
    original = getattr(client, "read_deployment_by_name", None)
    if original is None:
        return False
    if hasattr(original, "accepts_bare_names"):  # done before: the hook can run more than once
        return True

    @wraps(original)
    def read_deployment_by_name(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        return original(self, name if "/" in name else f"{name}/{DEFAULT_DEPLOYMENT}", *args, **kwargs)

    read_deployment_by_name.accepts_bare_names = True  # type: ignore[attr-defined]
    client.read_deployment_by_name = read_deployment_by_name
    return True
