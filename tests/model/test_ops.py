"""The encoder's arithmetic against torch's own modules, in every form that a machine may choose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hubert.model import ops


@given(
    rows=st.integers(12, 60),
    shape=st.sampled_from([(1, 10, 5), (6, 3, 2), (6, 2, 2), (4, 5, 2), (4, 1, 3), (4, 4, 1), (3, 7, 3)]),
    with_bias=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_strided_conv_equals_conv1d_with_all_gradients(rows, shape, with_bias):
    """As one convolution (CPU) and as matrix products on views (other devices), on the CPU and in float64."""
    channels, kernel, stride = shape
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in ((rows, channels), (5, channels, kernel), (5,))
    )
    inputs = [x, weight, bias] if with_bias else [x, weight]
    expected = F.conv1d(x.T[None], weight, bias if with_bias else None, stride=stride)[0].T
    actual = ops.strided_conv(x, weight, bias if with_bias else None, stride)
    gradient = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected, inputs, gradient)
    torch.testing.assert_close(actual, expected)
    for found, wanted in zip(torch.autograd.grad(actual, inputs, gradient), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted)

    with torch.no_grad():
        products = ops._conv_by_products(x, weight, bias if with_bias else None, stride)
        for_x = ops._input_gradient_by_products(gradient, x, weight, stride)
    torch.testing.assert_close(products, expected)
    torch.testing.assert_close(for_x, expected_gradients[0])


@given(
    frames=st.integers(1, 300),
    kernel=st.sampled_from([1, 2, 3, 16, 127, 128]),
    groups=st.sampled_from([1, 2, 4]),
)
@settings(deadline=None, max_examples=60)
def test_positional_conv_equals_padded_conv1d_with_all_gradients(frames, kernel, groups):
    generator = torch.Generator().manual_seed(frames)
    x, weight, bias = (
        torch.randn(size, generator=generator, requires_grad=True)
        for size in ((2, frames, 8), (8, 8 // groups, kernel), (8,))
    )
    expected = F.conv1d(x.transpose(1, 2), weight, bias, padding=kernel // 2, groups=groups)
    expected = expected[..., :frames].transpose(1, 2)
    actual = ops.positional_conv(x, weight, bias, groups)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    gradient = torch.randn(expected.shape, generator=generator)
    wanted = torch.autograd.grad(expected, [x, weight, bias], gradient)
    for found, value in zip(torch.autograd.grad(actual, [x, weight, bias], gradient), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("utterances", [ops._MIN_FFT_BATCH - 1, ops._MIN_FFT_BATCH, ops._MIN_FFT_BATCH_FORWARD])
def test_positional_conv_of_wide_groups_equals_padded_conv1d_in_small_and_large_batches(utterances, gradients):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(utterances, 21, 64), torch.randn(64, ops._MAX_FFT_WIDTH, 16), torch.randn(64)
    expected = F.conv1d(x.transpose(1, 2), weight, bias, padding=8, groups=2)[..., :21].transpose(1, 2)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(ops.positional_conv(x, weight, bias, 2), expected, rtol=1e-4, atol=1e-4)


@given(minimum=st.integers(1, 5000))
def test_fft_sizes_are_the_smallest_products_of_2_3_and_5(minimum):
    def is_smooth(number: int) -> bool:
        for prime in (2, 3, 5):
            while number % prime == 0:
                number //= prime
        return number == 1

    assert ops._fft_size(minimum) == next(size for size in range(minimum, 2 * minimum + 1) if is_smooth(size))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (1, 1, 12)])
def test_linear_equals_torchs_linear(monkeypatch, fast, shape):
    monkeypatch.setattr(ops, "_FAST_CONV", fast)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size, requires_grad=True) for size in (shape, (5, 12), (5,)))
    expected, actual = F.linear(x, weight, bias), ops.linear(x, weight, bias)
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn(expected.shape)
    wanted = torch.autograd.grad(expected, [x, weight, bias], gradient)
    torch.testing.assert_close(torch.autograd.grad(actual, [x, weight, bias], gradient), wanted)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_bfloat16_equals_that_in_float32_up_to_rounding(padded):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 20, 8) for _ in range(3))
    mask = (torch.arange(20) < torch.tensor([[20], [13]]))[:, None, None] if padded else None
    expected = ops.attention(query, key, value, mask, 0.0)
    actual = ops.attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask, 0.0)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.03)


def attend_plainly(query, key, value, key_mask, kept, factor):
    """Attend by torch's operators, with the given weights kept."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, float("-inf"))
    return (scores.softmax(-1) * kept.view_as(scores) * factor) @ value


@pytest.fixture
def drawn(monkeypatch):
    """What dropout kept, head by head."""
    found = []
    draw = ops._draw_kept

    def keep(kept, share):
        found.append(draw(kept, share))
        return kept

    monkeypatch.setattr(ops, "_draw_kept", keep)
    return found


def attention_inputs(dtype, *, offsets=(0.0, 0.0, 0.0)):
    """Return query, key and value of 14 heads, which are no multiple of those that are computed at once."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for width, offset in zip((8, 8, 12), offsets, strict=True):
        shift = offset * torch.randn(width, generator=generator)
        parts.append((torch.randn(2, 7, 33, width, generator=generator) + shift).to(dtype).requires_grad_())
    return parts, torch.randn(2, 7, 33, 12, generator=generator).to(dtype)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_with_dropout_equals_torchs_operators_with_the_same_weights_kept_with_all_gradients(
    drawn, padded, dtype, rtol
):
    inputs, upstream = attention_inputs(dtype)
    mask = (torch.arange(33) < torch.tensor([[33], [20]]))[:, None, None] if padded else None
    actual = ops.attention(*inputs, mask, 0.25)
    gradients = torch.autograd.grad(actual, inputs, upstream)
    kept = torch.stack(drawn)
    assert kept.float().mean() == pytest.approx(0.75, abs=0.02)
    wide = [part.detach().double().requires_grad_() for part in inputs]
    expected = attend_plainly(*wide, mask, kept, 1 / 0.75)
    assert actual.dtype == dtype
    for ours, theirs in zip(
        (actual, *gradients), (expected, *torch.autograd.grad(expected, wide, upstream.double())), strict=True
    ):
        assert torch.allclose(ours.double(), theirs, rtol=rtol, atol=rtol * float(theirs.detach().abs().max()))


def test_gradients_of_attention_in_bfloat16_are_as_exact_as_torchs_where_keys_and_values_are_far_from_zero(drawn):
    inputs, upstream = attention_inputs(torch.bfloat16, offsets=(0.0, 5.0, 3.0))
    ours = torch.autograd.grad(ops.attention(*inputs, None, 0.25), inputs, upstream)
    kept = torch.stack(drawn)
    plain = torch.autograd.grad(attend_plainly(*inputs, None, kept, 1 / 0.75), inputs, upstream)
    wide = [part.detach().double().requires_grad_() for part in inputs]
    exact = torch.autograd.grad(attend_plainly(*wide, None, kept, 1 / 0.75), wide, upstream.double())
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert float((mine - true).norm()) < 1.5 * float((theirs - true).norm()) + 1e-2 * float(true.norm())


def test_what_attention_drops_does_not_depend_on_the_number_of_threads():
    inputs, _ = attention_inputs(torch.float64)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        found.append(ops.attention(*inputs, None, 0.25))
    torch.set_num_threads(before)
    assert torch.allclose(found[0], found[1], rtol=1e-10)
    assert torch.allclose(found[0], found[2], rtol=1e-10)


def test_attention_with_dropout_computes_in_autocasts_precision_and_gives_gradients_in_that_of_its_inputs():
    inputs, upstream = attention_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.attention(*inputs, None, 0.25)
    assert output.dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in torch.autograd.grad(output, inputs, upstream.bfloat16()))


def test_attention_with_dropout_gives_the_gradients_that_are_asked_for_also_of_no_utterances():
    (query, key, value), upstream = attention_inputs(torch.float32)
    output = ops.attention(query, key.detach(), value.detach(), None, 0.25)
    (gradient,) = torch.autograd.grad(output, query, upstream)
    assert gradient.abs().sum() > 0
    nothing = [part[:0].detach().requires_grad_() for part in (query, key, value)]
    assert [len(part) for part in torch.autograd.grad(ops.attention(*nothing, None, 0.25).sum(), nothing)] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_attention_drops_weights_too(dtype):
    inputs, _ = attention_inputs(dtype)
    compiled = torch.compile(ops.attention, backend="eager")
    torch.manual_seed(0)
    one, other = (compiled(*inputs, None, 0.5) for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_dropout_drops_the_share_and_keeps_the_mean_and_the_gradient_follows(share):
    x = torch.ones(1001, 999, requires_grad=True)
    torch.manual_seed(0)
    y = ops.dropout(x, share)
    spread = (share * (1 - share) / x.numel()) ** 0.5
    assert float((y == 0).float().mean()) == pytest.approx(share, abs=5 * spread + 1 / 65_536)
    assert float(y.detach().mean()) == pytest.approx(1, abs=5 * spread / (1 - share))
    y.sum().backward()
    assert torch.equal(x.grad, y)  # of ones
    torch.manual_seed(0)
    assert torch.equal(ops.dropout(x, share), y)


def test_shares_that_16_bits_are_too_few_for_are_dropped_exactly():
    torch.manual_seed(0)
    x = torch.ones(1 << 20)
    assert torch.equal(ops.dropout(x, 0.0), x)
    assert torch.equal(ops.dropout(x, 1.0), torch.zeros(1 << 20))
    assert (
        float((ops.dropout(x, 1e-6) == 0).sum()) < 10
    )  # 1 of a million is expected, and would be 16 in steps of 1/65,536


def test_neighbours_are_dropped_independently():
    """Four elements share a random number: pairs of them are dropped together as often as others."""
    torch.manual_seed(0)
    dropped = (ops.dropout(torch.ones(1 << 20), 0.1) == 0).view(-1, 4).double()
    correlations = torch.corrcoef(dropped.T) - torch.eye(4)
    assert float(correlations.abs().max()) < 5 / len(dropped) ** 0.5


def test_scaled_gradients_leave_the_values_as_they_are():
    x = torch.randn(50, requires_grad=True)
    y = ops.scale_gradient(x, 0.1)
    assert y.equal(x)
    gradient = torch.randn(50)
    (found,) = torch.autograd.grad(y, x, gradient)
    assert found.equal(gradient * 0.1)
