"""What a run's page in Prefect shows: figures of each stage, checkpoints, pictures, links; each one kept current in place.

All that comes out of an iteration stands on the page of its `hubert-iteration`, though flows below it do the work; only
the progress bars stand on the pages of those. An overview, on the same page, says how far every stage is and links to
all the rest: the cards of a page have no order.

An artifact's key is global in Prefect: its page shows the newest one of all runs of the server. So keys begin with the
run's name and a digest of its folder, and name the iteration: two runs at once never mix.

A page is for people: nothing here fails (`tasks.page.prefect_client`).
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext
from prefect.settings import get_current_settings

from hubert.core.hashing import digest
from hubert.core.stage import Figures, Stage
from hubert.core.text import markdown_table
from hubert.report.stage_summary import summarise_stage
from tasks.page import prefect_client
from tasks.page.prefect_client import SHOW_SECONDS, costs_nothing, path_of, reach, run_logger

if TYPE_CHECKING:
    from hubert.report.plots.style import Plot

Kind = Literal["markdown", "table", "progress", "link", "image"]

MAX_NAME = 40  # letters of the run's name in a key
MAX_PICTURE = 100_000  # bytes of a picture with its address; the server keeps every version

ARTIFACT = "artifacts/artifact"  # the page of one
DONE, AT_WORK, STOPPED = "done", "at work", "stopped"


@dataclass
class Page:
    """The page of a flow run, and the overview on it."""

    flow_run: UUID | None
    title: str = ""
    home: Path | None = None
    stages: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # by name: state, how far it is, address
    links: dict[str, str] = field(default_factory=dict)  # by what they lead to
    renewed: float = 0.0

    def note(self, name: str, state: str, text: str, address: str = "") -> None:
        """Record how far a stage is, and where its page is."""
        before = self.stages.get(name)
        self.stages[name] = (state, text, address)
        # Only how far a stage is can wait: another word on it will follow.
        is_news = before is None or state != before[0] or address != before[2]
        if is_news or time.monotonic() - self.renewed >= SHOW_SECONDS:
            self.renew()

    def link(self, what: str, address: str, text: str) -> None:
        """Add a link, or replace it."""
        self.links[what] = f"[{text}]({address})"
        self.renew()

    def renew(self) -> UUID | None:
        """Bring the overview up to date; return its artifact's id, None if there is no overview."""
        self.renewed = time.monotonic()
        if self.home is None:
            return None
        return show("markdown", key_of(self.home, "overview"), self.write(), self.describe())

    def describe(self) -> str:
        """Return the line on the overview's card."""
        num_done = sum(state == DONE for state, _, _ in self.stages.values())
        now = [f"{name}: {text}" for name, (state, text, _) in self.stages.items() if state != DONE]
        return f"{now[-1]}" if now else f"{num_done} stages are done" if num_done else "about to start"

    def write(self) -> str:
        """Return the overview as markdown."""
        rows = [
            (f"[{name}]({address})" if address else name, state, text)
            for name, (state, text, address) in self.stages.items()
        ]
        stages = [markdown_table(("stage", "", "how far it is, or what came out"), rows)] if rows else []
        links = ["\n".join(f"- {link}" for link in self.links.values())] if self.links else []
        return "\n\n".join([f"**{self.title}**", *stages, *links])


_here: ContextVar[Page | None] = ContextVar("page", default=None)


@costs_nothing("the overview")
def open_page(home: Path | None = None, title: str = "") -> None:
    """Show what follows on the page of the surrounding flow run, also what the flows below it have to show.

    Args:
        home: the iteration's folder; without it there is no overview.
        title: of the overview.
    """
    page = Page(_own_flow_run(), title, home)
    _here.set(page)
    overview = page.renew()
    if overview is not None and (ui := get_current_settings().ui_url):
        run_logger().info("How far this run is, with links: %s/%s/%s", ui, ARTIFACT, overview)


@costs_nothing("a link of an earlier start")
def recall_link(home: Path, what: str) -> None:
    """Put a link that an earlier start has shown into the overview: what is finished does not ask the other server again."""
    if (page := _here.get()) is None or what in page.links:
        return
    with reach() as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key_of(home, what)]))
        found = client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC, limit=1)
    if found:
        page.links[what] = str(found[0].data)
        page.renew()


def _own_flow_run() -> UUID | None:
    context = FlowRunContext.get()
    return context.flow_run.id if context is not None and context.flow_run is not None else None


def address_of(artifact: UUID | None) -> str:
    """Return where an artifact's page is, for links on pages of Prefect; empty if there is none."""
    return path_of(ARTIFACT, artifact) if artifact else ""


def key_of(home: Path, what: str) -> str:
    """Return the key of something that belongs to a run's folder or to that of one of its iterations.

    Prefect takes lower-case letters, digits and dashes. Two runs may differ in other letters only, or in their place.
    """
    number = re.fullmatch(r"it(\d+)", home.name)
    root = home.parent if number else home
    name = slug(root.name)[:MAX_NAME].strip("-")
    parts = (name, digest(str(root))[:8], home.name if number else "", what)
    return "-".join(part for part in parts if part)


@costs_nothing("how far a stage is")
def note(name: str, state: str, text: str, address: str = "") -> None:
    """Show in the overview how far a stage is, and where its page is."""
    if (page := _here.get()) is not None:
        page.note(name, state, text, address)


def slug(name: str) -> str:
    """Write a name with the letters that a key may have."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@costs_nothing("an artifact")
def show(
    kind: Kind, key: str, data: Any, description: str, *, below: bool = False, linked: bool = False
) -> UUID | None:
    """Show something on the page, or bring it up to date: there is one card per key. What the server has is not sent again.

    Args:
        kind: Prefect's type.
        key: from `key_of`.
        data: as Prefect wants it for this type.
        description: the line on the card.
        below: on the page of the flow that does the work, not on that of the iteration.
        linked: the overview links to it.

    Returns:
        The artifact's id; None if the server did not take it, which the next call tries again.
    """
    page = _here.get()
    flow_run = _own_flow_run() if below or page is None else page.flow_run
    cards, new = prefect_client.state.cards, hash((str(data), description))
    artifact, sent = cards.get((flow_run, key), (None, 0))
    if artifact is None and flow_run is not None:
        with reach() as client:
            wanted = ArtifactFilter(
                key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run])
            )
            for found in client.read_artifacts(artifact_filter=wanted, limit=1):
                artifact, sent = found.id, hash((str(found.data), found.description))
    if artifact is None or sent != new:
        with reach() as client:
            if artifact is None:
                made = ArtifactCreate(key=key, type=kind, description=description, data=data, flow_run_id=flow_run)
                artifact = client.create_artifact(made).id
            else:
                update = ArtifactUpdate(data=data, description=description).model_dump(mode="json", exclude_unset=True)
                # Not `update_artifact`: it also sends an event with all of the data, which the server keeps.
                client.request("PATCH", "/artifacts/{id}", json=update, path_params={"id": artifact})
    cards[flow_run, key] = artifact, new
    if linked and page is not None:
        page.link(key, address_of(artifact), description)
    return artifact


@costs_nothing("the figures of a finished stage", lambda stage, *_: stage.label)
def show_stage(stage: Stage, figures: Figures, name: str = "") -> None:
    """Show a finished stage: one sentence, its key figures in words and units, and where it is.

    Args:
        stage: the stage.
        figures: its figures.
        name: in the key and the title, where the stage's own does not tell it from another of the run.
    """
    summary = summarise_stage(stage, figures)
    label = name or stage.label
    parts = [f"**{label}: {summary.headline}**", *summary.as_markdown(), f"`{stage.folder}`"]
    key = key_of(stage.parent, slug(name or stage.name))
    artifact = show("markdown", key, "\n\n".join(parts), summary.headline)
    note(label, DONE, summary.headline, address_of(artifact))


@costs_nothing("a table")
def show_table(home: Path, what: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """Show rows under their columns' names."""
    show("table", key_of(home, what), json.dumps(list(rows)), description, linked=True)


@costs_nothing("a link")
def show_link(home: Path, what: str, address: str, text: str) -> None:
    """Show a link, also in the overview; `home` is where it belongs if no page is open."""
    page = _here.get()
    home = page.home or home if page is not None else home
    show("link", key_of(home, what), f"[{text}]({address})", f"[{text}]({address})")
    if page is not None:
        page.link(what, address, text)


@costs_nothing("a picture")
def show_picture(home: Path, what: str, plot: "Plot", description: str) -> None:
    """Show a plot."""
    address = plot.address
    if len(address) > MAX_PICTURE:
        run_logger().info("%s: a picture of %d bytes is left out here; the report has it", what, len(address))
        return
    show("image", key_of(home, f"picture-{what}"), address, description, linked=True)
