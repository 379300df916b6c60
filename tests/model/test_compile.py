"""What torch.compile can take as a whole: the parts of a training step that run on the device, each one graph.

Whole graphs are what CUDA graphs and fused kernels need (docs/gpu.md). The backend here traces forward and backward as
the real ones do, and generates no code.
"""

from copy import deepcopy

import pytest
import torch
from torch import nn

from hubert.core.frames import num_frames
from hubert.model import ops
from hubert.model.hubert import HuBERTPretrain
from hubert.settings.model import build_config
from hubert.training.masks import span_mask
from tests.model.test_model import QUIET, SMALL, speech_like

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WHOLE = {"backend": "aot_eager", "fullgraph": True, "dynamic": False}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_parts(model: HuBERTPretrain) -> list[nn.Module]:
    """The modules that a GPU would compile one by one, so that a layer may still be skipped: layerdrop breaks no graph."""
    transformer = model.hubert.transformer
    return [model.hubert.extractor, transformer.pos_conv, *transformer.layers]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", ["base", "large"])
def test_extractor_positions_layers_and_loss_are_one_graph_each_and_give_the_same_step(size, bf16):
    torch.manual_seed(0)
    plain = HuBERTPretrain(20, build_config(size, SMALL | QUIET)).train()
    model = deepcopy(plain)
    for part in compiled_parts(model):
        part.compile(**WHOLE)
    model._predict = torch.compile(model._predict, **WHOLE)
    model.hubert._project = torch.compile(model.hubert._project, **WHOLE)
    waveforms, frames = speech_like(2, 6_400), num_frames(6_400)
    labels, mask = torch.randint(20, (2, frames)), span_mask(2, frames, seed=1)
    found = []
    for each in (plain, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses, outputs = each(waveforms, labels, mask=mask)
        (losses.mean() + 10 * outputs["feature_penalty"]).backward()
        found.append((losses.detach(), {name: value.grad for name, value in each.named_parameters()}))
    (expected, wanted), (actual, gradients) = found
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(actual, expected, **tolerance)
    for name, gradient in wanted.items():
        largest = gradient.abs().max().item()
        assert (gradients[name] - gradient).abs().max().item() <= (0.03 if bf16 else 1e-4) * largest + 1e-6, name


def test_convolutions_as_matrix_products_are_one_graph():
    """The form that devices other than CPUs compute. Its backward pass adds to overlapping views, which no graph takes."""
    torch.manual_seed(0)
    x, weight = torch.randn(41, 6), torch.randn(5, 6, 3)
    expected = ops._conv_by_products(x, weight, None, 2)
    actual = torch.compile(ops._conv_by_products, **WHOLE)(x, weight, None, 2)
    torch.testing.assert_close(actual, expected)


def test_without_layerdrop_the_whole_transformer_is_one_graph():
    torch.manual_seed(0)
    model = HuBERTPretrain(20, build_config("base", SMALL | QUIET)).train()
    x, frames = torch.randn(2, 19, SMALL["dim"]), torch.tensor([0, 3, 4, 21])
    expected = model.hubert.transformer(x, None, frames)
    actual = torch.compile(model.hubert.transformer, **WHOLE)(x, None, frames)
    torch.testing.assert_close(actual, expected)
