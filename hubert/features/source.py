"""Which features are clustered: MFCC, or a layer of a checkpoint with the convention that it is read by."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubert.core.errors import ConfigError, DataError
from hubert.core.frames import FRAME_RATE, MFCC_DIMENSION, MFCC_FRAME_RATE
from hubert.model.weights import read_config
from hubert.settings.sections import FeatureSettings


@dataclass(frozen=True)
class FeatureSource:
    """Which features: MFCC (no checkpoint), or a layer of a checkpoint with the convention that the layer is read by.

    Mixing conventions goes wrong silently: units of `before_residual=False` clustered with centroids of `True` are
    noise. So the source is stored in the codebook, and a codebook refuses features of another source.
    """

    checkpoint: str = ""
    sha256: str = ""
    layer: int = 0
    before_residual: bool = False
    dtype: str = "float32"
    name: str = ""
    normalize_waveform: bool | None = None

    @classmethod
    def of_layer(
        cls, checkpoint: Path, sha256: str, layer: int, settings: FeatureSettings, *, name: str = ""
    ) -> "FeatureSource":
        """Return the source for a layer (from 1) of a checkpoint on this machine, in any format that `HuBERT` loads.

        Args:
            checkpoint: its folder or file.
            sha256: of its weights.
            layer: from 1.
            settings: the convention by which the layer is read.
            name: what people call it, such as a Hugging Face id; empty for the outcome of the run's own previous iteration,
                which says itself how it was trained.

        Raises:
            ConfigError: it has no such layer.
            DataError: it cannot be loaded.
        """
        normalize_waveform = settings.normalize_waveform if name else None
        num_layers = read_config(checkpoint, normalize_waveform=normalize_waveform).num_layers
        if not 1 <= layer <= num_layers:
            raise ConfigError(f"layer {layer}: the teacher {name or checkpoint} has layers 1 to {num_layers}")
        return cls(str(checkpoint), sha256, layer, settings.before_residual, settings.dtype, name, normalize_waveform)

    @property
    def is_mfcc(self) -> bool:
        """Whether the features are MFCCs."""
        return not self.checkpoint

    @property
    def files(self) -> list[Path]:
        """What the features are computed with, beside the audio: the checkpoint; nothing for MFCCs."""
        return [] if self.is_mfcc else [Path(self.checkpoint)]

    @property
    def frame_rate(self) -> int:
        """Frames per second."""
        return MFCC_FRAME_RATE if self.is_mfcc else FRAME_RATE

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two sources the same: the weights' hash, not the place where they lie."""
        if self.is_mfcc:
            return {"kind": "mfcc", "dimension": MFCC_DIMENSION}
        places = ("checkpoint", "name")
        return {"kind": "layer", **{name: value for name, value in self.record.items() if name not in places}}

    @property
    def record(self) -> dict[str, Any]:
        """The fields that are written down in a run's settings; TOML has no None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check_dimension(self, dimension: int, where: Path) -> None:
        """Compare a codebook's dimension with that of the features, where the checkpoint is here.

        Raises:
            DataError: they differ; names both.
        """
        if not self.is_mfcc and not Path(self.checkpoint).exists():
            return
        expected = self.identity["dimension"] if self.is_mfcc else self._model_dimension
        if dimension != expected:
            raise DataError(
                f"{where}: its centroids have {dimension} dimensions, {self.describe()} has {expected}; "
                "the codebook was fitted on other features"
            )

    @property
    def _model_dimension(self) -> int:
        return read_config(Path(self.checkpoint), normalize_waveform=self.normalize_waveform).dim

    def describe(self) -> str:
        """Return a short name for people."""
        return "MFCC" if self.is_mfcc else f"layer {self.layer} of {self.name or Path(self.checkpoint).name}"


def describe_source(identity: Mapping[str, Any]) -> str:
    """Return a source's identity as one line for errors and reports."""
    return ", ".join(f"{name}={value}" for name, value in identity.items())
