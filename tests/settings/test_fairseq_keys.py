"""Every science setting names fairseq's key, and its default is what fairseq's published configurations say there."""

import re

import pytest

from hubert.core.frames import SAMPLE_RATE
from hubert.core.paths import find_recipe
from hubert.settings.model import SIZES, ModelConfig
from hubert.settings.recipe import read_recipe
from hubert.settings.sections import TrainSettings, affects
from hubert.training.job import learning_rate

# Typed from examples/hubert/config/pretrain/hubert_{base_librispeech,large_librivox,xlarge_librivox}.yaml; the last rows
# are the defaults of HubertConfig (fairseq/models/hubert/hubert.py) that the files leave alone.
STACK = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
KEYS = {
    "task.normalize": (False, True, True),
    "task.min_sample_size": (32_000, 32_000, 32_000),
    "task.max_sample_size": (250_000, 250_000, 250_000),
    "dataset.max_tokens": (1_400_000, 900_000, 360_000),
    "distributed_training.distributed_world_size": (32, 128, 256),
    "criterion.pred_nomask_weight": (0.0, 0.0, 0.0),
    "criterion.loss_weights": (10, 10, 10),
    "optimization.max_update": (400_000, 400_000, 400_000),
    "optimization.lr": (0.0005, 0.0015, 0.003),
    "optimization.clip_norm": (10.0, 1.0, 1.0),
    "optimizer.adam_betas": ((0.9, 0.98),) * 3,
    "optimizer.adam_eps": (1e-6, 1e-6, 1e-6),
    "optimizer.weight_decay": (0.01, 0.01, 0.01),
    "lr_scheduler.warmup_updates": (32_000, 32_000, 32_000),
    "model.mask_prob": (0.8, 0.8, 0.8),
    "model.extractor_mode": ("default", "layer_norm", "layer_norm"),
    "model.conv_feature_layers": (STACK, STACK, STACK),
    "model.final_dim": (256, 768, 1024),
    "model.encoder_layerdrop": (0.05, 0.0, 0.0),
    "model.dropout_input": (0.1, 0.0, 0.0),
    "model.dropout": (0.1, 0.0, 0.0),
    "model.attention_dropout": (0.1, 0.0, 0.0),
    "model.feature_grad_mult": (0.1, 1.0, 1.0),
    "model.activation_dropout": (0.0, 0.0, 0.0),
    "model.encoder_layers": (12, 24, 48),
    "model.encoder_embed_dim": (768, 1024, 1280),
    "model.encoder_ffn_embed_dim": (3072, 4096, 5120),
    "model.encoder_attention_heads": (12, 16, 16),
    "model.layer_norm_first": (False, True, True),
    "model.mask_length": (10, 10, 10),
    "model.conv_bias": (False, False, False),
    "model.logit_temp": (0.1, 0.1, 0.1),
    "model.conv_pos": (128, 128, 128),
    "model.conv_pos_groups": (16, 16, 16),
}
# Keys whose value is another thing than the field's, or none that matters; the comment beside the field says what.
OTHERWISE = {"common.seed", "common.fp16", "common.min_loss_scale", "checkpoint.finetune_from_model"}
NO_KEY = {"num_crop_lengths", "mask_rule", "min_masks", "layer_norm_eps"}
NAMES = ("base", "large", "xlarge")


def key_of(description: str | None, group: str = "") -> str:
    """Return what stands in brackets at the end of a description; the model's fields leave out the group `model`."""
    match = re.search(r"\[([^\[\]]+)\]$", description or "")
    assert match, f"no key in brackets at the end: {description}"
    return match[1] if "." in match[1] else group + match[1].split(":")[0]


def found_values(settings: TrainSettings) -> dict[str, object]:
    """Return our settings under fairseq's keys, in fairseq's units."""
    ours = {**settings.model_dump(), **SIZES[settings.size].model_dump()}
    values = {key_of(field.description): ours[name] for name, field in TrainSettings.model_fields.items()}
    values |= {key_of(field.description, "model."): ours[name] for name, field in ModelConfig.model_fields.items()}
    for key in ("task.min_sample_size", "task.max_sample_size", "dataset.max_tokens"):
        values[key] = round(values[key] * SAMPLE_RATE)  # type: ignore[operator]
    values["model.extractor_mode"] = {"group": "default", "layer": "layer_norm"}[str(ours["extractor_norm"])]
    values["model.conv_feature_layers"] = STACK if list(ours["conv_layers"]) == eval(STACK) else ours["conv_layers"]  # noqa: S307
    return values


def test_every_science_setting_names_fairseqs_key_or_says_that_there_is_none():
    for name, field in TrainSettings.model_fields.items():
        key = key_of(field.description)
        if key.startswith("no key in fairseq"):
            assert name in NO_KEY or not affects(field), name
        elif affects(field) and name not in {"size", "model", "batch_seconds"}:
            assert key in KEYS.keys() | OTHERWISE, name
    for name, field in ModelConfig.model_fields.items():
        key = key_of(field.description, "model.")
        assert key in KEYS or ("no key in fairseq" in key and name in NO_KEY), name


@pytest.mark.parametrize(
    ("number", "recipe"), [(0, "librispeech-base"), (1, "libri-light-large"), (2, "libri-light-xlarge")], ids=NAMES
)
def test_the_recipe_of_a_published_model_is_fairseqs_configuration_of_it(number, recipe):
    settings = read_recipe(find_recipe(recipe)).iteration(2).train
    values = found_values(settings)
    assert settings.size == NAMES[number]
    for key, wanted in KEYS.items():
        if key != "distributed_training.distributed_world_size":
            assert values[key] == wanted[number], key
    samples = KEYS["dataset.max_tokens"][number] * KEYS["distributed_training.distributed_world_size"][number]
    assert settings.batch_seconds * SAMPLE_RATE == samples
    assert (settings.min_masks, settings.model) == (2, {})


def polynomial_decay(num_updates: int, peak: float, warmup: int, total: int) -> float:
    """fairseq's schedule with power 1 and end 0: the rate after `num_updates` updates, for the next one."""
    if num_updates <= warmup:
        return peak * num_updates / warmup
    return 0.0 if num_updates >= total else peak * (1 - (num_updates - warmup) / (total - warmup))


def test_the_learning_rate_is_fairseqs_one_update_earlier():
    """fairseq's first update has rate 0 and so changes no weight; nothing else differs but the slope, by one part in 368,000."""
    settings = TrainSettings()
    for update in (1, 2, 1000, 31_999, 32_000, 32_001, 100_000, 399_999, 400_000):
        ours = learning_rate(settings, ((0, 400_000),), update)
        assert ours == pytest.approx(polynomial_decay(update, 5e-4, 32_000, 400_001), rel=1e-9)
        assert abs(ours - polynomial_decay(update, 5e-4, 32_000, 400_000)) <= 5e-4 / 368_000
