"""What a run's page in Prefect shows: figures of each stage, checkpoints, pictures, links; each one kept current in place.

Everything stands on the page of the `hubert-iteration` (or other flow) that a person started or looks for, though flows
below it do the work. An artifact's key is global in Prefect: its page shows the newest one of all runs of the server. So
keys begin with the run's name and a digest of its folder, and name the iteration: two runs at once never mix.

A page is for people. If the server does not take it, a warning is logged and the work goes on.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectHTTPStatusError

from hubert.key_figures import key_figures
from hubert.stage import Figures, Stage, digest
from tasks.markdown import table

Kind = Literal["markdown", "table", "progress", "link", "image"]

MAX_NAME = 40  # letters of the run's name in a key
MAX_PICTURE = 100_000  # bytes of a picture with its address; the server keeps every version
UNREACHED = (httpx.HTTPError, PrefectHTTPStatusError)

_here: ContextVar[UUID | None] = ContextVar("page", default=None)


def open_page() -> None:
    """Show what follows on the page of the surrounding flow run, also what the flows below it have to show."""
    context = FlowRunContext.get()
    _here.set(context.flow_run.id if context is not None and context.flow_run is not None else None)


def key_of(home: Path, what: str) -> str:
    """Return the key of something that belongs to a run's folder or to that of one of its iterations.

    Prefect takes lower-case letters, digits and dashes. Two runs may differ in other letters only, or in their place.
    """
    number = re.fullmatch(r"it(\d+)", home.name)
    root = home.parent if number else home
    name = re.sub(r"[^a-z0-9]+", "-", root.name.lower())[:MAX_NAME].strip("-")
    parts = (name, digest(str(root))[:8], home.name if number else "", what)
    return "-".join(part for part in parts if part)


def show(kind: Kind, key: str, data: Any, description: str) -> UUID | None:
    """Show something on the page: what it shows under this key already is replaced.

    Returns:
        The artifact's id for `renew`; None if the server did not take it.
    """
    context = FlowRunContext.get()
    own = context.flow_run.id if context is not None and context.flow_run is not None else None
    page = _here.get() or own
    try:
        with get_client(sync_client=True) as client:
            wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
            if page is not None:
                wanted.flow_run_id = ArtifactFilterFlowRunId(any_=[page])
            found = client.read_artifacts(artifact_filter=wanted, limit=1) if page is not None else []
            if found:
                client.update_artifact(found[0].id, ArtifactUpdate(data=data, description=description))
                return found[0].id
            made = ArtifactCreate(key=key, type=kind, description=description, data=data, flow_run_id=page)
            return client.create_artifact(made).id
    except UNREACHED as error:
        get_run_logger().warning("The run's page does not show %s: Prefect does not answer (%s)", key, error)
        return None


def renew(artifact: UUID, data: Any, description: str) -> None:
    """Bring something that is shown up to date; if the server does not answer, the next time will do."""
    try:
        with get_client(sync_client=True) as client:
            client.update_artifact(artifact, ArtifactUpdate(data=data, description=description))
    except UNREACHED as error:
        get_run_logger().debug("The run's page is not up to date: %s", error)


def show_stage(stage: Stage, figures: Figures, name: str = "") -> None:
    """Show a finished stage: one sentence, its key figures in words and units, and where it is.

    Args:
        stage: the stage.
        figures: its figures.
        name: in the key and the title, where the stage's own does not tell it from another of the run.
    """
    found = key_figures(stage, figures)
    tables = [table(header, rows) for header, rows in found.tables]
    label = name or stage.label
    parts = [f"**{label}: {found.headline}**", *tables, *found.remarks, f"`{stage.folder}`"]
    key = key_of(stage.parent, re.sub(r"[^a-z0-9]+", "-", (name or stage.name).lower()))
    show("markdown", key, "\n\n".join(parts), f"{label}: {found.headline}")


def show_table(home: Path, what: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """Show rows under their columns' names."""
    show("table", key_of(home, what), list(rows), description)


def show_link(home: Path, what: str, address: str, text: str) -> None:
    """Show a link; the card on the page says the address too."""
    show("link", key_of(home, what), f"[{text}]({address})", f"[{text}]({address})")


def show_picture(home: Path, what: str, svg: str, description: str) -> None:
    """Show a picture that stands alone (`hubert.plots.standalone`)."""
    address = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    if len(address) > MAX_PICTURE:
        get_run_logger().info("%s: a picture of %d bytes is left out here; the report has it", what, len(address))
        return
    show("image", key_of(home, f"picture-{what}"), address, description)
