"""The encoder's arithmetic against torch's own modules, in every form that a machine may choose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hubert import ops


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


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_with_dropout_equals_torchs_operators_with_the_same_weights_kept_with_all_gradients(
    monkeypatch, padded, dtype, rtol
):
    """14 heads are no multiple of those that are computed at once; values are wider than queries."""
    drawn = []
    draw = ops.draw_kept
    monkeypatch.setattr(ops, "draw_kept", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 7, 33, width, generator=generator).to(dtype).requires_grad_() for width in (8, 8, 12)]
    mask = (torch.arange(33) < torch.tensor([[33], [20]]))[:, None, None] if padded else None
    upstream = torch.randn(2, 7, 33, 12, generator=generator).to(dtype)
    actual = ops.attention(*inputs, mask, 0.25)
    gradients = torch.autograd.grad(actual, inputs, upstream)
    kept = torch.cat(drawn)
    assert kept.float().mean() == pytest.approx(0.75, abs=0.02)
    wide = [part.detach().double().requires_grad_() for part in inputs]
    expected = attend_plainly(*wide, mask, kept, 1 / 0.75)
    assert actual.dtype == dtype
    for ours, theirs in zip(
        (actual, *gradients), (expected, *torch.autograd.grad(expected, wide, upstream.double())), strict=True
    ):
        assert torch.allclose(ours.double(), theirs, rtol=rtol, atol=rtol * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.999999])
def test_dropout_drops_the_share_and_keeps_the_mean_and_the_gradient_follows(share):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, requires_grad=True)
    y = ops.dropout(x, share)
    dropped = float((y == 0).float().mean())
    spread = (share * (1 - share) / x.numel()) ** 0.5
    assert abs(dropped - share) < 5 * spread + 2 / 65_536
    y.sum().backward()
    assert torch.equal(x.grad, y)  # of ones
    if share <= 0.5:
        assert float(y.mean()) == pytest.approx(1, abs=5 * spread / (1 - share) + 1e-4)
    torch.manual_seed(0)
    assert torch.equal(ops.dropout(x, share), y)
    assert torch.equal(ops.dropout(x, 0.0), x)


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
