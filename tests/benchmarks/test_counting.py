"""FLOP, bytes and floors of a training step's parts: against what torch counts while the parts run."""

import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import build_cases
from benchmarks.studies import ceilings, counting, step_parts
from benchmarks.studies.counting import Batch, Product, count_parameters, count_parts
from benchmarks.studies.parts import ATTENTION, STEP, Inputs, our_pieces
from hubert.core.frames import num_frames
from hubert.model import ops
from hubert.model.hubert import HuBERTPretrain
from hubert.settings.model import SIZES, build_config
from hubert.training.masks import span_mask
from tests.model.test_model import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = Batch(crops=3, samples=12_345, num_classes=30)
# Dropout keeps the attention of CPUs apart from the fused kernel, which torch does not count.
CONFIGS = [build_config(size, SMALL | {"attention_dropout": 0.1, "layerdrop": 0.0}) for size in ("base", "large")]
BOTH = pytest.mark.parametrize("config", CONFIGS, ids=["base", "large"])


def counted(call, *arguments):
    """Return what the call returns, and how many FLOP torch counts in it."""
    with FlopCounterMode(display=False) as counter:
        found = call(*arguments)
    return found, counter.get_total_flops()


@pytest.fixture
def plain_positions(monkeypatch):
    """The positional convolution as a GPU computes it: a Fourier transform has no products to count."""

    def convolve(x, weight, bias, groups):
        padded = F.pad(x.transpose(1, 2), (weight.shape[2] // 2, weight.shape[2] - 1 - weight.shape[2] // 2))
        return F.conv1d(padded, weight, bias, groups=groups).transpose(1, 2)

    monkeypatch.setattr(ops, "positional_conv", convolve)


@BOTH
def test_each_part_multiplies_as_often_as_torch_counts_while_it_runs(config, plain_positions):
    """Forward and backward; what a GPU computes twice to save memory is no part of it. Window statistics come on top."""
    parts = count_parts(config, BATCH)
    model = HuBERTPretrain(BATCH.num_classes, config).train()
    seen = set()
    for piece in our_pieces(model, Inputs(model, BATCH, "cpu", torch.float32)):
        if piece.name == ATTENTION:
            continue
        part = parts[piece.name]
        outputs, forward = counted(piece.forward)
        statistics = 0.5 if piece.name == counting.FIRST_CONV and config.extractor_norm == "group" else 0.0
        assert piece.times * forward == pytest.approx(sum(part.forward.values()), rel=1e-9 + statistics), piece.name
        gradients = [torch.ones_like(output) for output in outputs]
        _, backward = counted(piece.backward, outputs, gradients)
        if piece.name == counting.POSITIONS:
            # torch's count forgets the groups in the weight's gradient.
            backward -= sum(part.forward.values()) * (config.pos_conv_groups - 1)
        wanted = sum(part.backward.values()) - part.recomputed
        assert piece.times * backward == pytest.approx(wanted, rel=1e-9 + statistics), piece.name
        seen.add(piece.name)
    assert seen | {counting.OPTIMIZER} == parts.keys()


@BOTH
def test_the_parts_together_multiply_as_often_as_a_whole_step(config, plain_positions):
    model = HuBERTPretrain(BATCH.num_classes, config).train()
    frames = num_frames(BATCH.samples)
    mask = span_mask(BATCH.crops, frames, seed=0)
    labels = torch.zeros(mask.shape, dtype=torch.int64)

    def step() -> None:
        losses, outputs = model(torch.randn(BATCH.crops, BATCH.samples), labels, mask=mask)
        (losses.sum() + outputs["feature_penalty"]).backward()

    parts = count_parts(config, BATCH)
    wanted = sum(part.flop - part.recomputed for part in parts.values())
    wanted += sum(parts[counting.POSITIONS].forward.values()) * (config.pos_conv_groups - 1)  # as above
    statistics = 0.02 if config.extractor_norm == "group" else 0.0
    assert counted(step)[1] == pytest.approx(wanted, rel=1e-9 + statistics)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config, BATCH.num_classes)


@pytest.mark.parametrize("size", SIZES)
def test_the_weights_of_all_sizes_are_counted(size):
    with torch.device("meta"):
        model = HuBERTPretrain(500, size)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(SIZES[size], 500)


def test_a_step_of_base_takes_the_published_number_of_multiplications():
    """2.7 TFLOP forward, 0.86 and 1.85 of them in extractor and transformer, with all frames in the last layer."""
    config, batch = SIZES["base"], Batch()
    options = next(case.options for case in build_cases("full", "cuda") if case.stage == "training_step")
    assert (batch.crops, batch.samples) == (options["crops"], round(16_000 * options["crop_seconds"]))
    parts = count_parts(config, batch)
    forward = {name: sum(part.forward.values()) / 1e12 for name, part in parts.items()}
    extractor = forward[counting.FIRST_CONV] + forward[counting.CONVS]
    saved = (batch.frames - batch.masked) * (2 * config.dim**2 + 4 * config.dim * config.ffn_dim) / 1e12
    assert extractor == pytest.approx(0.86, abs=0.005)
    assert sum(forward.values()) - extractor + saved == pytest.approx(1.85, abs=0.02)
    assert sum(forward.values()) + saved == pytest.approx(2.7, abs=0.02)
    assert sum(part.flop - part.recomputed for part in parts.values()) / 1e12 + 3 * saved == pytest.approx(
        8.1, abs=0.05
    )


def test_a_floor_is_the_larger_of_products_and_bytes():
    part = counting.Part("a part")
    part.add(Product("p", 10, 20, 30), again=1.0)
    assert part.flop == 4 * 2 * 10 * 20 * 30
    assert part.recomputed == part.flop / 4
    assert part.bytes == 3 * 2 * (200 + 600 + 300)
    rates = ceilings.Rates("made up", {"bfloat16": 48_000.0, "float32": 1.0}, 3_300.0)
    (row,) = ceilings.floors({"a part": part}, rates)
    assert (row["product_ms"], row["memory_ms"], row["floor_ms"]) == (1000.0, 2000.0, 2000.0)


def test_published_rates_give_floors_without_a_device(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ceilings", "--published", "h100"])
    ceilings.main()
    printed = capsys.readouterr().out
    assert "not measured" in printed
    for name in count_parts(SIZES["base"], Batch()):
        assert f"| {name} |" in printed


def test_rates_are_measured_for_the_products_of_the_step_in_both_directions():
    product = Product("p", 64, 32, 16)
    part = counting.Part("a part", products=[product, Product("many", 8, 8, 8, 100)])
    rates = ceilings.measure_rates("cpu", {"a part": part}, ("bfloat16", "float32"), least_seconds=1e-4)
    assert [(shape["rows"], shape["inner"], shape["columns"]) for shape in rates.shapes[:3]] == [
        (64, 32, 16),
        (64, 16, 32),
        (32, 64, 16),
    ]
    assert {shape["count"] for shape in rates.shapes[3:]} == {100}
    assert min(*rates.products.values(), rates.memory) > 1e6
    assert rates.to_device is None


def test_each_part_is_timed_beside_its_floor_and_beside_torchaudios_module():
    config = CONFIGS[0]
    rows = step_parts.measure(config, BATCH, "cpu", repeats=1, bf16=False, reference=True)
    rates = ceilings.Rates("made up", {"bfloat16": 1e12, "float32": 1e12}, 1e10)
    parts = count_parts(config, BATCH)
    step_parts.add_floors(rows, parts, rates)
    assert {row["part"] for row in rows} == parts.keys() | {ATTENTION, STEP}
    assert {row["part"] for row in rows if "torchaudio_ms" in row} == {
        counting.FIRST_CONV,
        counting.CONVS,
        counting.PROJECTION,
        counting.POSITIONS,
        counting.FEED_FORWARD,
        ATTENTION,
    }
    assert all(row["ms"] > 0 for row in rows)
    text = step_parts.render(rows, BATCH, rates)
    for row in rows:
        assert f"| {row['part']} |" in text
