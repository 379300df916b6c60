"""The data of an iteration's report, as a model: `report.json` is its dump, and is read back through it.

Shares (accuracy, purity, PNMI) run from 0 to 1; ABX error rates are in per cent, losses and entropies in nats, times in
seconds, sizes in bytes. None: it was not measured, or an older version did not write it down.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hubert.core.files import read_json, rename
from hubert.core.paths import RunFolder
from hubert.evaluation.checkpoints import Checkpoint
from hubert.evaluation.choice import MFCC, Outcome, read_outcome

FORMAT = 1


class Record(BaseModel):
    """A part of the report; fields that a newer version added are ignored."""

    model_config = ConfigDict(frozen=True)


class LayerRow(Record):
    """MFCC (layer 0) or a layer of the chosen checkpoint.

    `abx_*` is the rate that is reported, `selection_*` the one that chose the layer (on other items, if the recipe says so).
    """

    layer: int
    name: str
    chosen: bool = False
    abx_within: float | None = None
    abx_across: float | None = None
    abx_items: str | None = None
    num_items: int | None = None
    num_cells: int | None = None
    selection_within: float | None = None
    selection_across: float | None = None
    selection_items: str | None = None
    pnmi: float | None = None
    pnmi_units: int | None = None
    phone_purity: float | None = None
    cluster_purity: float | None = None


class ComparisonRow(Record):
    """A row of the table that compares MFCC and the iterations: the chosen checkpoint and layer of one.

    The previous iteration's row is a setting of the next one's report, so another field would change that stage's key.
    """

    name: str
    iteration: int | None = None
    layer: int | None = None
    step: int | None = None
    abx_within: float | None = None
    abx_across: float | None = None
    abx_items: str | None = None
    num_items: int | None = None
    num_cells: int | None = None
    pnmi: float | None = None
    pnmi_units: int | None = None
    validation_loss: float | None = None
    unigram_entropy: float | None = None
    masked_accuracy: float | None = None
    majority_accuracy: float | None = None


class Source(Record):
    """What the iteration clustered: MFCC, or a layer of a checkpoint; why, and who chose it."""

    name: str
    checkpoint: str = ""
    sha256: str = ""
    layer: int = MFCC
    why: str = ""
    by: str = ""


class ABXItems(Record):
    """What ABX was measured on."""

    item: str | None = None
    num_dropped_items: int | None = None
    before_residual: bool | None = None


class AudioAmount(Record):
    """Files and hours of a part of the data."""

    num_files: int | None = None
    hours: float | None = None


class Data(AudioAmount):
    """Files and hours of all audio and of each part, and how many files were rejected."""

    num_rejected: int | None = None
    parts: dict[str, AudioAmount] = {}


class RejectedFile(Record):
    """A file that was not used."""

    path: str
    reason: str


class Training(Record):
    """What the training took, and its folder's name."""

    steps: int | None = None
    seconds: float | None = None
    audio_hours: float | None = None
    slurm_jobs: list[str] | None = None
    device: str | None = None
    world_size: int | None = None
    folder: str | None = None


class StageRow(Record):
    """What a stage cost, where it is, and its plain figures."""

    name: str
    folder: str
    key: str = ""
    seconds: float = 0.0
    elapsed_seconds: float | None = None
    num_shards: int | None = None
    host: str | None = None
    finished_at: str | None = None
    jobs: list[str] = []
    device: str | None = None
    gpu_seconds: float | None = None
    bytes: int = 0
    settings: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    figures: dict[str, bool | int | float | str] = {}


class ReportData(Record):
    """Everything that the page of one iteration shows."""

    format: int = FORMAT
    run: str
    iteration: int
    recipe: str = ""
    description: str = ""
    data: str = ""
    source: Source
    outcome: Outcome | None = Field(None, description="None: the iteration is not finished")
    baseline: ComparisonRow
    previous: ComparisonRow | None = None
    row: ComparisonRow
    layers: list[LayerRow] = []
    checkpoints: list[Checkpoint] = []
    abx: ABXItems = ABXItems()
    units: dict[str, dict[str, Any] | None] = {}
    phones: dict[str, Any] | None = None
    data_figures: Data = Data()
    rejected: list[RejectedFile] = []
    training: Training = Training()
    hashes: dict[str, str] = {}
    stages: list[StageRow] = []
    hosts: list[str] = []
    environment: dict[str, str] = {}
    resolved: dict[str, Any] = {}
    statements: list[str] = []
    example: dict[str, Any] = {}

    @field_validator("units", "stages", mode="before")
    @classmethod
    def _rename(cls, content: Any) -> Any:
        return rename(content)

    @classmethod
    def load(cls, folder: Path) -> "ReportData | None":
        """Read `report.json` of a report's folder, also an older version's; None if there is none of this format."""
        content = read_json(folder / "report.json")
        return None if content is None or content.get("format") != FORMAT else cls.model_validate(content)

    def stage(self, name: str) -> StageRow | None:
        """Return a finished stage; None if it is not there."""
        return next((stage for stage in self.stages if stage.name == name), None)


def find_report(folder: RunFolder, number: int) -> tuple[Path, ReportData] | None:
    """Return page and data of an iteration's report: the newest that tells of its outcome, else the newest."""
    outcome = read_outcome(folder, number)
    reports = [(done, ReportData.load(done.parent)) for done in folder.iteration(number).glob("report-*/done.json")]
    found = [
        (data.outcome == outcome, done.stat().st_mtime, done.parent / "report.html", data)
        for done, data in reports
        if data is not None
    ]
    best = max(found, key=lambda one: one[:2], default=None)
    return best and best[2:]
