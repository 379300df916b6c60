"""What a training starts from: random weights, or the encoder of a checkpoint of the same dimensions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubert.core.errors import ConfigError
from hubert.model.weights import Origin, find_origin, read_config
from hubert.settings.model import SIZES, ModelConfig, build_config
from hubert.settings.sections import TrainSettings

FRESH = "fresh"

# What the weights' shapes or the encoder's arithmetic depend on. The rest (dropouts, layerdrop, gradient scaling, the head)
# is how a training is done, and the recipe says it.
ENCODER_FIELDS = (
    "conv_layers",
    "conv_bias",
    "extractor_norm",
    "dim",
    "num_layers",
    "num_heads",
    "ffn_dim",
    "pos_conv_kernel",
    "pos_conv_groups",
    "layer_norm_first",
    "layer_norm_eps",
    "normalize_waveform",
)


@dataclass(frozen=True)
class InitialWeights(Origin):
    """The encoder that a training starts from, with its dimensions (the fields of a `ModelConfig`)."""

    config: dict[str, Any]


def settle_init(train: TrainSettings, before: InitialWeights | None = None) -> InitialWeights | None:
    """Look up the encoder that a training starts from; None for a fresh start.

    Args:
        train: the settings, whose dimensions must be the checkpoint's.
        before: what an earlier call returned; the same name is not looked up again.

    Raises:
        ConfigError: there is no such model, or it has other dimensions.
    """
    if train.init == FRESH:
        return None
    if before is not None and before.name == train.init:
        settled = before
    else:
        origin = find_origin(train.init, "train.init")
        config = read_config(Path(origin.checkpoint), normalize_waveform=train.model.get("normalize_waveform"))
        settled = InitialWeights(**vars(origin), config=config.model_dump(mode="json"))
    check_dimensions(ModelConfig.model_validate(settled.config), train)
    return settled


def check_dimensions(found: ModelConfig, train: TrainSettings) -> None:
    """Make sure that a checkpoint's encoder is the one that the settings describe.

    Nothing is taken over silently: what `hubert plan` and the reports say of a run is worked out from its settings. Whether
    waveforms are normalised may be set against what the checkpoint's files say, which for some released models is wrong.

    Raises:
        ConfigError: the dimensions differ; names those of both sides, and the size that fits.
    """
    wanted = build_config(train.size, train.model)
    if train.model.get("normalize_waveform") is not None:
        found = found.model_copy(update={"normalize_waveform": wanted.normalize_waveform})
    differing = _differing(found, wanted)
    if not differing:
        return
    theirs, ours = (", ".join(f"{name} = {getattr(config, name)}" for name in differing) for config in (found, wanted))
    fitting = next((name for name, config in SIZES.items() if not _differing(found, config)), None)
    if fitting:
        fix = f"train.size = {fitting!r}, without these fields in train.model"
    else:
        fix = "set these fields in train.model to the checkpoint's values"
    raise ConfigError(
        f"train.init = {train.init!r} has {theirs}, but train.size = {train.size!r} with train.model has {ours}. Fix: {fix}"
    )


def _differing(found: ModelConfig, wanted: ModelConfig) -> list[str]:
    return [name for name in ENCODER_FIELDS if getattr(found, name) != getattr(wanted, name)]
