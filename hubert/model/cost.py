"""What a model costs: its parameters, the work per second of audio, and how fast GPUs are known to train it."""

from dataclasses import dataclass

from hubert.core.frames import FRAME_RATE, RECEPTIVE_FIELD, SAMPLE_RATE
from hubert.settings.model import SIZES, ModelConfig


@dataclass(frozen=True)
class Rate:
    """How much audio one GPU trains the base model on, in seconds per second, and who says so."""

    audio_seconds_per_second: float
    gpu: str
    source: str


ASSUMED = Rate(
    100_000 * 2800 / (9.5 * 3600 * 32),
    "GPU of 2021 (V100)",
    "the HuBERT paper: 100,000 steps of 2,800 s in 9.5 h on 32 GPUs",
)
OTHERS = (
    Rate(
        400_000 * 2800 / (10 * 3600 * 16),
        "H100",
        "minimal_hubert's README: 400,000 steps of 2,800 s in 10 h on 16 GPUs",
    ),
)


def training_rate(config: ModelConfig, given: float | None = None) -> float:
    """Return how much audio a GPU trains on per second: as given, or the base model's by the work per second of audio."""
    if given is not None:
        return given
    return ASSUMED.audio_seconds_per_second * multiplications(SIZES["base"]) / multiplications(config)


def num_parameters(config: ModelConfig, num_units: int) -> int:
    """Count the parameters of a model with its head for `num_units` classes."""
    total, inputs = 0, 1
    for index, (channels, kernel, _) in enumerate(config.conv_layers):
        normalised = config.extractor_norm == "layer" or index == 0
        total += channels * inputs * kernel + channels * config.conv_bias + 2 * channels * normalised
        inputs = channels
    dim, ffn = config.dim, config.ffn_dim
    total += 2 * inputs + inputs * dim + dim  # layer norm and projection of the features
    total += dim  # the masked frames' embedding
    total += dim * (dim // config.pos_conv_groups) * config.pos_conv_kernel + config.pos_conv_kernel + dim
    total += config.num_layers * (4 * (dim * dim + dim) + 2 * dim * ffn + ffn + dim + 4 * dim)
    total += 2 * dim  # last layer norm
    total += dim * config.final_dim + config.final_dim + num_units * config.final_dim
    return total


def multiplications(config: ModelConfig, seconds: float = 15.625) -> float:
    """Count the multiplications of a forward pass per second of audio, in crops of `seconds` (attention grows with them)."""
    total, inputs, samples = 0.0, 1, float(SAMPLE_RATE)
    for channels, kernel, stride in config.conv_layers:
        samples /= stride
        total += samples * inputs * channels * kernel
        inputs = channels
    frames = (seconds * SAMPLE_RATE - RECEPTIVE_FIELD) / SAMPLE_RATE * FRAME_RATE + 1
    dim = config.dim
    per_frame = float(inputs * dim + dim * (dim // config.pos_conv_groups) * config.pos_conv_kernel)
    per_frame += config.num_layers * (4 * dim * dim + 2 * dim * config.ffn_dim + 2 * frames * dim)
    return total + FRAME_RATE * per_frame
