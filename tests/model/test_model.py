"""HuBERT against torchaudio's with the same weights: every layer, the loss, all gradients; and its own promises."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torchaudio
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hubert.core.errors import ConfigError, DataError
from hubert.core.frames import max_samples, num_frames
from hubert.model.encoder import keep_products_in_bfloat16
from hubert.model.formats import hub
from hubert.model.formats.released import known_huberts
from hubert.model.hubert import HuBERT, HuBERTPretrain
from hubert.settings.model import SIZES, ModelConfig, build_config
from hubert.training.masks import span_mask
from tests.support.reference import count_frames, from_torchaudio, plain_normalize, torchaudio_pretrain

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CLASSES = 23
SMALL = {
    "conv_layers": [[24, 10, 5], *[[24, 3, 2]] * 4, *[[24, 2, 2]] * 2],
    "dim": 32,
    "num_layers": 3,
    "num_heads": 4,
    "ffn_dim": 48,
    "pos_conv_kernel": 16,
    "pos_conv_groups": 4,
    "final_dim": 12,
}
QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "layerdrop": 0.0}
BASE_LIKE = build_config("base", SMALL | QUIET)
LARGE_LIKE = build_config("large", SMALL | QUIET | {"normalize_waveform": False})
LARGE_LIKE_BIAS = build_config(LARGE_LIKE, {"conv_bias": True, "pos_conv_kernel": 15, "feature_grad_mult": 0.3})
BASE_LIKE_BIAS = build_config(BASE_LIKE, {"conv_bias": True})
ALL_CONFIGS = {"base": BASE_LIKE, "large": LARGE_LIKE, "bias": LARGE_LIKE_BIAS, "base bias": BASE_LIKE_BIAS}
CONFIGS = pytest.mark.parametrize("config", ALL_CONFIGS.values(), ids=ALL_CONFIGS.keys())


def torchaudio_encoder(config: ModelConfig) -> nn.Module:
    """Build torchaudio's encoder with our dimensions and random weights in every parameter."""
    return torchaudio_with_head(config).wav2vec2


def torchaudio_with_head(config: ModelConfig) -> nn.Module:
    """Build torchaudio's encoder and head with random weights in every parameter."""
    return shaken(torchaudio_pretrain(config, NUM_CLASSES))


def shaken(model: nn.Module) -> nn.Module:
    """Move every parameter away from its initial value, which for norms and biases would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def speech_like(batch: int, samples: int, seed: int = 0) -> Tensor:
    """Coloured noise with an offset: most energy at low frequencies, as in speech."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, samples, generator=generator)
    return 0.02 * noise + 0.003 * noise.cumsum(1) + 0.01


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Compare relative to the largest value."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * expected.abs().max().item() + 1e-7


@CONFIGS
@pytest.mark.parametrize("samples", [400, 719, 720, 16_000, 50_003])
def test_all_layers_equal_torchaudios(config, samples):
    reference = torchaudio_encoder(config).eval()
    model = HuBERT(config).eval()
    model.load_state_dict(from_torchaudio(reference.state_dict()))
    waveforms = speech_like(2, samples)
    with torch.inference_mode():
        layers, _ = reference.extract_features(waveforms)
        ours = model.get_intermediate_outputs(waveforms, before_residual=False)
        assert len(ours) == len(layers) == config.num_layers
        for actual, expected in zip(ours, layers, strict=True):
            assert_near(actual, expected)
        assert_near(model(waveforms), reference(waveforms)[0])


def test_the_base_model_equals_torchaudios():
    reference = torchaudio.models.hubert_base().eval()
    model = HuBERT("base").eval()
    model.load_state_dict(from_torchaudio(reference.state_dict()))
    waveforms = speech_like(1, 20_000)
    with torch.inference_mode():
        layers, _ = reference.extract_features(waveforms)
        for actual, expected in zip(
            model.get_intermediate_outputs(waveforms, before_residual=False), layers, strict=True
        ):
            assert_near(actual, expected)
        assert_near(model(waveforms), reference(waveforms)[0])


@pytest.mark.parametrize("size", ["base", "large", "xlarge"])
def test_the_published_sizes_have_the_shapes_of_torchaudios(size, monkeypatch):
    """Without memory for them: on the meta device, where torchaudio's initialisation cannot run."""
    monkeypatch.setattr(torchaudio.models.wav2vec2.model, "_init_hubert_pretrain_model", lambda _module: None)
    with torch.device("meta"):
        expected = getattr(torchaudio.models, f"hubert_pretrain_{size}")()
        actual = HuBERTPretrain(expected.logit_generator.label_embeddings.shape[0], size)
    assert {name: value.shape for name, value in actual.state_dict().items()} == {
        name: value.shape for name, value in from_torchaudio(expected.state_dict()).items()
    }


@CONFIGS
def test_loss_and_all_gradients_equal_torchaudios(config, monkeypatch):
    """The published recipe: cross-entropy of the masked frames plus 10 times the feature penalty, both summed."""
    from torchaudio.models.wav2vec2 import components

    reference = torchaudio_with_head(config).train()
    model = HuBERTPretrain(NUM_CLASSES, config).train()
    model.load_state_dict(from_torchaudio(reference.state_dict()))
    waveforms, frames = speech_like(3, 9_000), num_frames(9_000)
    labels = torch.randint(NUM_CLASSES, (3, frames), generator=torch.Generator().manual_seed(2))
    mask = span_mask(3, frames, seed=4)
    monkeypatch.setattr(components, "_compute_mask_indices", lambda *_, **__: mask)

    logits, logits_unmasked, penalty = reference(waveforms, labels)
    expected = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum")
    (expected + 10 * penalty * len(logits)).div(len(logits)).backward()

    losses, outputs = model(waveforms, labels, mask=mask)
    (losses.mean() + 10 * outputs["feature_penalty"]).backward()
    assert losses.shape == (mask.sum(),)
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-4)
    assert outputs["feature_penalty"].item() == pytest.approx(penalty.item(), rel=1e-4)
    assert outputs["num_correct"].item() == (logits.argmax(1) == 0).sum().item()
    assert outputs["num_frames"] == mask.numel()

    wanted = from_torchaudio({name: value.grad for name, value in reference.named_parameters()})
    found = {name: value.grad for name, value in model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # A key's bias moves all scores of a query alike, and a bias before a norm over time all that is normalised: the true
        # gradient is 0 and what is found is rounding.
        is_normalised_away = name == "hubert.extractor.layers.0.conv.bias" and config.extractor_norm == "group"
        if is_normalised_away:
            assert found[name] is None
        elif not name.endswith("attention.key.bias"):
            assert_near(found[name], gradient)

    with torch.no_grad():
        both, outputs = model(waveforms, labels, mask=mask, unmasked=True)
    assert_near(both, losses.detach())
    zeros = torch.zeros(len(logits_unmasked), dtype=torch.long)
    assert_near(outputs["unmasked_losses"], F.cross_entropy(logits_unmasked.detach(), zeros, reduction="none"))
    assert outputs["unmasked_num_correct"].item() == (logits_unmasked.argmax(1) == 0).sum().item()
    assert (outputs["predictions"] == labels[mask]).sum() == outputs["num_correct"]


@CONFIGS
def test_outputs_before_the_residual_are_those_of_the_feed_forward_part(config):
    """What a hook on torchaudio's feed-forward modules sees."""
    reference = torchaudio_encoder(config).eval()
    model = HuBERT(config).eval()
    model.load_state_dict(from_torchaudio(reference.state_dict()))
    seen: list[Tensor] = []
    for layer in reference.encoder.transformer.layers:
        layer.feed_forward.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    waveforms = speech_like(2, 12_345)
    with torch.inference_mode():
        reference(waveforms)
        ours = model.get_intermediate_outputs(waveforms)
        full = model.get_intermediate_outputs(waveforms, before_residual=False)
    for actual, expected in zip(ours, seen, strict=True):
        assert_near(actual, expected)
    assert not torch.allclose(ours[0], full[0], atol=1e-2)


@pytest.mark.parametrize("normalize", [False, True])
@CONFIGS
def test_a_padded_batch_equals_its_utterances_one_by_one(config, normalize):
    """Whatever the padding holds: layers, output, losses, penalty; also where the batch is longer than all of them."""
    torch.manual_seed(0)
    model = shaken(HuBERTPretrain(NUM_CLASSES, build_config(config, {"normalize_waveform": normalize}))).eval()
    lengths = [9_000, 400, 6_543, 719]
    singles = [speech_like(1, length, seed=length) for length in lengths]
    waveforms = torch.full((4, 9_400), torch.nan)
    for row, single in zip(waveforms, singles, strict=True):
        row[: single.shape[1]] = single[0]
    attention_mask = (torch.arange(9_400) < torch.tensor(lengths)[:, None]).long()
    frames = [num_frames(length) for length in lengths]
    labels = torch.randint(NUM_CLASSES, (4, num_frames(9_400)))
    mask = torch.rand(labels.shape) < 0.5
    with torch.inference_mode():
        batch = model.hubert(waveforms, attention_mask=attention_mask)
        layers = model.hubert.get_intermediate_outputs(waveforms, attention_mask=attention_mask)
        losses, outputs = model(waveforms, labels, mask=mask, attention_mask=attention_mask, unmasked=True)
        expected_losses, expected_others, squares = [], [], 0.0
        for index, (single, count) in enumerate(zip(singles, frames, strict=True)):
            assert_near(batch[index, :count], model.hubert(single)[0])
            alone = model.hubert.get_intermediate_outputs(single)
            for actual, expected in zip(layers, alone, strict=True):
                assert_near(actual[index, :count], expected[0])
            row = slice(index, index + 1)
            single_losses, single_outputs = model(single, labels[row, :count], mask=mask[row, :count], unmasked=True)
            expected_losses.append(single_losses)
            expected_others.append(single_outputs["unmasked_losses"])
            squares += single_outputs["feature_penalty"].item() * count
    assert_near(losses, torch.cat(expected_losses))
    assert_near(outputs["unmasked_losses"], torch.cat(expected_others))
    assert outputs["num_frames"] == sum(frames)
    assert outputs["feature_penalty"].item() == pytest.approx(squares / sum(frames), rel=1e-4)


def test_a_mask_without_padding_changes_nothing():
    model = HuBERT(BASE_LIKE).eval()
    waveforms = speech_like(2, 4_000)
    assert model(waveforms, attention_mask=torch.ones(2, 4_000)).equal(model(waveforms))


@pytest.mark.parametrize("config", [BASE_LIKE, LARGE_LIKE], ids=["base", "large"])
def test_waveforms_are_normalised_inside_the_model(config):
    torch.manual_seed(0)
    plain = HuBERT(config).eval()
    normalizing = HuBERT(build_config(config, {"normalize_waveform": True})).eval()
    normalizing.load_state_dict(plain.state_dict())
    waveforms = speech_like(2, 5_000)
    expected = plain(torch.stack([plain_normalize(waveform) for waveform in waveforms]))
    assert_near(normalizing(waveforms), expected)
    assert_near(normalizing(0.3 * waveforms + 0.2), expected, 1e-2)


@pytest.mark.parametrize("samples", [*range(396, 404), 719, 720, 721, 15_999, 16_000, 250_000])
def test_num_frames_counts_what_the_convolutions_give(samples):
    expected = count_frames(samples, SIZES["base"].conv_layers)
    assert num_frames(samples) == expected
    assert num_frames(np.array([samples], dtype=np.int32)).tolist() == [expected]
    if expected:
        assert HuBERT(BASE_LIKE)(torch.zeros(1, samples)).shape[1] == expected
        assert num_frames(max_samples(expected)) == expected == num_frames(max_samples(expected) + 1) - 1


def test_400_samples_are_one_frame_and_399_are_an_error_that_says_so():
    model = HuBERT(BASE_LIKE).eval()
    assert model(torch.zeros(1, 400)).shape == (1, 1, 32)
    with pytest.raises(DataError, match=r"at least 400 samples \(25 ms at 16 kHz\).*found 399 in utterance 0"):
        model(torch.zeros(1, 399))
    mask = torch.arange(1000) < torch.tensor([[1000], [399]])
    with pytest.raises(DataError, match="found 399 in utterance 1"):
        model(torch.zeros(2, 1000), attention_mask=mask)


def test_inputs_of_the_wrong_form_are_refused_with_the_fix():
    model = HuBERTPretrain(NUM_CLASSES, BASE_LIKE)
    labels, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
    waveforms = torch.zeros(1, max_samples(3))
    for wrong, message in (
        ((torch.zeros(1000), labels, mask, None), r"waveform\[None\]"),
        ((torch.zeros(1, 1000, dtype=torch.int16), labels, mask, None), "floats"),
        ((torch.zeros(0, 1000), labels, mask, None), "empty batch"),
        ((waveforms, labels[:, :2], mask, None), "labels of shape .1, 3.*found .1, 2"),
        ((waveforms, labels, mask[:, :2], None), "mask of shape"),
        ((waveforms, labels, mask.long(), None), "mask of bools"),
        ((waveforms, labels + NUM_CLASSES, mask, None), "labels below 23.*found 23"),
        ((waveforms, labels, mask, torch.ones(1, 3)), "marks samples, not frames"),
        ((waveforms, labels, mask, torch.arange(max_samples(3))[None] >= 10), "at the end of each row"),
    ):
        x, y, frames, attention_mask = wrong
        with pytest.raises(DataError, match=message):
            model(x, y, mask=frames, attention_mask=attention_mask)


def test_frames_without_a_label_enter_neither_losses_nor_counts():
    torch.manual_seed(0)
    model = HuBERTPretrain(NUM_CLASSES, BASE_LIKE).eval()
    waveforms = speech_like(2, max_samples(20))
    labels, mask = torch.randint(NUM_CLASSES, (2, 20)), span_mask(2, 20, seed=0)
    unlabelled = torch.rand(2, 20) < 0.3
    with torch.inference_mode():
        losses, outputs = model(waveforms, labels, mask=mask, unmasked=True)
        kept, kept_outputs = model(waveforms, labels.masked_fill(unlabelled, -1), mask=mask, unmasked=True)
    keep, keep_others = ~unlabelled[mask], ~unlabelled[~mask]
    assert_near(kept, losses[keep])
    assert_near(kept_outputs["unmasked_losses"], outputs["unmasked_losses"][keep_others])
    assert kept_outputs["num_correct"] == (outputs["predictions"] == labels[mask])[keep].sum()


def test_a_batch_without_masked_frames_has_no_losses():
    model = HuBERTPretrain(NUM_CLASSES, BASE_LIKE)
    labels = torch.zeros(1, 3, dtype=torch.long)
    losses, outputs = model(speech_like(1, max_samples(3)), labels, mask=labels > 0, unmasked=True)
    assert losses.shape == outputs["predictions"].shape == (0,)
    assert outputs["num_correct"] == 0
    assert outputs["unmasked_losses"].shape == (3,)
    assert model(speech_like(1, max_samples(3)), labels, mask=labels > 0)[0].shape == (0,)


def test_early_exit_computes_only_the_layers_that_were_asked_for():
    model = HuBERT(LARGE_LIKE).eval()
    computed: list[int] = []
    for index, layer in enumerate(model.transformer.layers, 1):
        layer.register_forward_hook(lambda _module, _inputs, _output, index=index: computed.append(index))
    waveforms = speech_like(1, 4_000)
    two = model.get_intermediate_outputs(waveforms, num_layers=2, before_residual=False)
    assert computed == [1, 2]
    everything = model.get_intermediate_outputs(waveforms, before_residual=False)
    assert all(short.equal(long) for short, long in zip(two, everything, strict=False))
    for wrong in (0, 4):
        with pytest.raises(ConfigError, match=f"num_layers = {wrong}: the model has layers 1 to 3"):
            model.get_intermediate_outputs(waveforms, num_layers=wrong)


def test_layers_are_dropped_at_the_given_rate_and_only_in_training():
    """From torch's CPU generator: the same seed drops the same layers. What was dropped gets no gradient at all."""
    torch.manual_seed(0)
    model = HuBERTPretrain(NUM_CLASSES, build_config(BASE_LIKE, {"layerdrop": 0.3, "num_layers": 6}))
    waveforms, labels, mask = speech_like(1, 2_000), torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 6) > 0

    def kept(seed: int) -> list[bool]:
        model.zero_grad()
        torch.manual_seed(seed)
        model(waveforms, labels, mask=mask)[0].sum().backward()
        gradients = [
            [weight.grad is not None for weight in layer.parameters()] for layer in model.hubert.transformer.layers
        ]
        assert all(len(set(row)) == 1 for row in gradients)
        return [row[0] for row in gradients]

    model.train()
    draws = [kept(seed) for seed in range(60)]
    rate = 1 - np.mean(draws)
    assert rate == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 360))
    assert kept(11) == draws[11]
    assert any(not row[-1] for row in draws), "the last layer, which computes masked frames only, can be dropped"
    model.eval()
    assert all(all(kept(seed)) for seed in range(5))


def test_the_gradient_into_the_convolutions_is_scaled_and_nothing_else_is():
    """The penalty is computed after the scaling, so its gradient is scaled too (fairseq)."""
    gradients, results = {}, {}
    waveforms, labels, mask = speech_like(2, 4_000), torch.zeros(2, 12, dtype=torch.long), span_mask(2, 12, seed=0)
    for factor in (1.0, 0.125, 0.0):
        torch.manual_seed(0)
        model = HuBERTPretrain(NUM_CLASSES, build_config(BASE_LIKE, {"feature_grad_mult": factor}))
        losses, outputs = model(waveforms, labels, mask=mask)
        (losses.mean() + 10 * outputs["feature_penalty"]).backward()
        results[factor] = losses.detach()
        gradients[factor] = {name: weight.grad for name, weight in model.named_parameters()}
    assert results[1.0].equal(results[0.125])
    assert results[1.0].equal(results[0.0])
    for name, whole in gradients[1.0].items():
        if "extractor" in name:
            assert gradients[0.125][name].equal(0.125 * whole), "a power of two scales without rounding"
            assert gradients[0.0][name] is None
        else:
            assert gradients[0.125][name].equal(whole)
            assert gradients[0.0][name].equal(whole)


@pytest.mark.parametrize("config", [BASE_LIKE, LARGE_LIKE], ids=["base", "large"])
def test_bfloat16_autocast_stays_near_float32_and_keeps_losses_in_float32(config):
    torch.manual_seed(0)
    model = HuBERTPretrain(NUM_CLASSES, config)
    waveforms, labels, mask = speech_like(2, 8_000), torch.randint(NUM_CLASSES, (2, 24)), span_mask(2, 24, seed=0)

    def step(*, bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses, outputs = model(waveforms, labels, mask=mask)
            loss = losses.mean() + 10 * outputs["feature_penalty"]
        loss.backward()
        return losses.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}

    losses, gradients = step(bf16=True)
    expected, expected_gradients = step(bf16=False)
    assert losses.dtype == torch.float32
    assert_near(losses, expected, 0.05)
    for name, gradient in expected_gradients.items():
        if not name.endswith("attention.key.bias"):
            similarity = F.cosine_similarity(gradients[name].flatten(), gradient.flatten(), dim=0)
            assert similarity > 0.98, name


@pytest.mark.parametrize("config", [BASE_LIKE, LARGE_LIKE], ids=["base", "large"])
def test_weights_that_are_kept_in_bfloat16_give_the_bits_that_autocast_gives(config):
    torch.manual_seed(0)
    model = HuBERT(config).eval()
    waveforms = speech_like(2, 8_000)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model.get_intermediate_outputs(waveforms)
        keep_products_in_bfloat16(model)
        for layer, frames in zip(model.get_intermediate_outputs(waveforms), expected, strict=True):
            assert layer.equal(frames)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, where other forms of the same sums are used")
@CONFIGS
def test_losses_and_gradients_on_a_gpu_equal_those_on_the_cpu(config):
    torch.manual_seed(0)
    model = shaken(HuBERTPretrain(NUM_CLASSES, config))
    waveforms, labels, mask = speech_like(2, 8_000), torch.randint(NUM_CLASSES, (2, 24)), span_mask(2, 24, seed=0)
    attention_mask = torch.arange(8_000) < torch.tensor([[8_000], [6_000]])
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        losses, outputs = model(waveforms.to(device), labels, mask=mask, attention_mask=attention_mask, unmasked=True)
        (losses.mean() + 10 * outputs["feature_penalty"]).backward()
        gradients = {name: weight.grad.cpu().clone() for name, weight in model.named_parameters()}
        results.append((losses.detach().cpu(), outputs["unmasked_losses"].detach().cpu(), gradients))
    (losses, others, gradients), (losses_gpu, others_gpu, gradients_gpu) = results
    assert_near(losses_gpu, losses, 1e-3)
    assert_near(others_gpu, others, 1e-3)
    for name, gradient in gradients.items():
        if not name.endswith("attention.key.bias"):
            assert_near(gradients_gpu[name], gradient, 1e-2)


def test_training_lowers_the_loss_and_dropout_is_off_in_evaluation():
    torch.manual_seed(0)
    model = HuBERTPretrain(NUM_CLASSES, build_config(BASE_LIKE, {"dropout": 0.1, "attention_dropout": 0.1}))
    waveforms, labels, mask = speech_like(2, 8_000), torch.randint(3, (2, 24)), span_mask(2, 24, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(30):
        losses, outputs = model(waveforms, labels, mask=mask)
        (losses.mean() + 10 * outputs["feature_penalty"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(losses.mean().item())
    assert values[-1] < 0.5 * values[0]
    assert not model(waveforms, labels, mask=mask)[0].equal(model(waveforms, labels, mask=mask)[0])
    model.eval()
    assert model(waveforms, labels, mask=mask)[0].equal(model(waveforms, labels, mask=mask)[0])


def test_initial_weights_are_fairseqs():
    torch.manual_seed(5)
    first = HuBERTPretrain(50, "tiny")
    torch.manual_seed(5)
    assert all(a.equal(b) for a, b in zip(first.parameters(), HuBERTPretrain(50, "tiny").parameters(), strict=True))
    hubert = first.hubert
    layer = hubert.transformer.layers[0]
    assert layer.ffn_in.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.attention.key.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not any(module.bias.any() for module in (layer.ffn_in, layer.ffn_out, layer.attention.output))
    conv = hubert.extractor.layers[1].conv.weight
    assert conv.std().item() == pytest.approx(np.sqrt(2 / (64 * 3)), rel=0.05), "kaiming normal"
    assert hubert.transformer.pos_conv.conv.weight.std().item() == pytest.approx(np.sqrt(4 / (128 * 192)), rel=0.02)
    for uniform in (first.mask_embedding, first.class_embeddings):
        assert 0 <= uniform.min() < 0.1
        assert 0.9 < uniform.max() <= 1


def test_saved_models_come_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model = shaken(HuBERTPretrain(NUM_CLASSES, BASE_LIKE))
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    state = torch.get_rng_state()
    whole, encoder = HuBERTPretrain.from_pretrained(tmp_path / "model"), HuBERT.from_pretrained(tmp_path / "model")
    assert torch.get_rng_state().equal(state), "loading draws no random numbers"
    assert whole.config == encoder.config == model.config
    assert not whole.training
    assert not encoder.training
    expected = model.state_dict()
    assert whole.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in whole.state_dict().items())
    assert all(weight.requires_grad for weight in whole.parameters())
    waveforms = speech_like(1, 3_000)
    assert encoder(waveforms).equal(model.eval().hubert(waveforms))

    encoder.save_pretrained(tmp_path / "encoder")
    again = HuBERT.from_pretrained(str(tmp_path / "encoder"))
    assert again(waveforms).equal(encoder(waveforms))
    model.save_pretrained(tmp_path / "encoder")
    assert HuBERTPretrain.from_pretrained(tmp_path / "encoder").num_classes == NUM_CLASSES, "written over"


def test_a_checkpoint_without_a_head_needs_num_classes(tmp_path):
    encoder = HuBERT(BASE_LIKE)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="without a head; expected num_classes"):
        HuBERTPretrain.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no head: the head of 7 classes is new"):
        model = HuBERTPretrain.from_pretrained(tmp_path, num_classes=7)
    assert model.class_embeddings.shape == (7, 12)
    assert all(value.equal(encoder.state_dict()[name]) for name, value in model.hubert.state_dict().items())

    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        HuBERTPretrain.from_pretrained(tmp_path, num_classes=7)
    with pytest.warns(UserWarning, match="a head of 7 classes: the head of 8 classes is new"):
        HuBERTPretrain.from_pretrained(tmp_path, num_classes=8)


def test_damaged_and_unknown_folders_are_named(tmp_path):
    HuBERT(BASE_LIKE).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    content, tensors = json.loads(config.read_text()), load_file(weights)

    def assert_refused(message: str) -> None:
        with pytest.raises(DataError, match=message) as error:
            HuBERT.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value)

    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused("expected weights as safetensors writes them; it is a safetensors file, damaged or cut off")
    save_file({name: value for name, value in tensors.items() if name != "projection.bias"}, weights)
    assert_refused("1 missing, such as projection.bias")
    save_file(tensors | {"projection.bias": torch.zeros(3), "other": torch.zeros(1)}, weights)
    assert_refused("1 unknown, such as other; 1 of another shape, such as projection.bias")
    weights.unlink()
    assert_refused("expected the weights of a checkpoint, found none of")
    config.write_text(json.dumps(content | {"model": content["model"] | {"dim": 33}}))
    assert_refused(r"dim \(33\) must be a multiple of num_heads \(4\)")
    config.write_text(json.dumps({"architectures": ["HubertModel"], "model_type": "hubert"}))
    assert_refused("found none of model.safetensors")
    config.write_text(json.dumps({"architectures": ["Wav2Vec2Model"], "model_type": "wav2vec2"}))
    save_file(tensors, weights)
    assert_refused("model_type = 'wav2vec2'")
    weights.unlink()
    config.write_text("{")
    assert_refused("expected a JSON object")
    with pytest.raises(DataError, match="nowhere: expected a checkpoint folder"):
        HuBERT.from_pretrained(tmp_path / "nowhere")


def test_what_is_no_path_here_is_looked_for_by_the_hub(tmp_path, monkeypatch):
    """With the same options for both classes; a missing path that can be no id is an error and no question to the Hub."""
    HuBERTPretrain(NUM_CLASSES, BASE_LIKE).save_pretrained(tmp_path / "model")
    calls: list[tuple[str, dict]] = []

    def locate(name, **options):
        calls.append((name, options))
        return tmp_path / "model"

    asked_in_truth = hub.locate
    monkeypatch.setattr("hubert.model.formats.hub.locate", locate)
    (tmp_path / "facebook").mkdir()
    monkeypatch.chdir(tmp_path)
    options = {"revision": "v1", "token": "secret", "cache_dir": tmp_path, "local_files_only": True}
    known = known_huberts()
    assert list(known) == ["base", "large", "xlarge"]
    assert known["base"]["huggingface"] == "facebook/hubert-base-ls960"
    for checkpoint in known.values():
        for name in (checkpoint["huggingface"], checkpoint["fairseq"], checkpoint["torchaudio"]):
            for kind in (HuBERT, HuBERTPretrain):
                assert kind.from_pretrained(name, **options).config == BASE_LIKE
                assert calls.pop() == (name, options)
    with pytest.raises(DataError, match="expected a checkpoint folder"):
        HuBERT.from_pretrained(tmp_path / "nothing")
    assert not calls
    monkeypatch.setattr("hubert.model.formats.hub.locate", asked_in_truth)
    for missing in ("./nothing", "runs/it1/train/step-1", "nothing", "facebook/nothing.pt"):
        with pytest.raises(ConfigError, match="expected a path that exists, a Hugging Face id"):
            HuBERT.from_pretrained(missing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="facebook/nothing: there is no such path here, it is not in the Hub's cache"):
        HuBERT.from_pretrained("facebook/nothing", cache_dir=tmp_path)


def test_torchaudios_addresses_are_those_of_its_bundles():
    for size, checkpoint in known_huberts().items():
        bundle = getattr(torchaudio.pipelines, f"HUBERT_{size.upper()}")
        assert checkpoint["torchaudio"] == f"https://download.pytorch.org/torchaudio/models/{bundle._path}"


def test_wrong_configurations_are_refused_with_field_and_value():
    for size, overrides, message in (
        ("huge", {}, "model size 'huge' does not exist; sizes: base, large, xlarge, tiny"),
        ("tiny", {"layers": 3}, "layers = 3"),
        ("tiny", {"num_heads": 5}, r"dim \(192\) must be a multiple of num_heads \(5\)"),
        ("tiny", {"pos_conv_groups": 5}, r"pos_conv_groups \(5\)"),
        ("tiny", {"dropout": 1.0}, "dropout = 1.0"),
        ("tiny", {"conv_layers": [[8, 10, 5], [8, 3, 2]]}, "20 samples every 10"),
    ):
        with pytest.raises(ConfigError, match=message):
            HuBERTPretrain(10, size, **overrides)
    with pytest.raises(ConfigError, match="num_classes = 0"):
        HuBERTPretrain(0, "tiny")


@pytest.mark.parametrize("layout", ["hubert-flows", "torchaudio"])
@pytest.mark.parametrize("kind", ["HuBERT", "HuBERTPretrain"])
def test_loading_a_model_does_not_import_torchs_compiler(tmp_path, kind, layout):
    HuBERTPretrain(NUM_CLASSES, BASE_LIKE).save_pretrained(tmp_path, layout)
    code = (
        f"import sys, hubert; hubert.{kind}.from_pretrained(sys.argv[1]);"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_importing_the_package_is_light():
    """The names load torch when they are used, and nothing that a GPU node need not have."""
    code = (
        "import sys, hubert; assert 'torch' not in sys.modules;"
        "hubert.HuBERT; assert 'torch' in sys.modules;"
        "heavy = {'polars', 'sklearn', 'torchaudio', 'fastabx', 'matplotlib', 'prefect', 'dask', 'mlflow'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert hubert.__all__ == ['HuBERT', 'HuBERTPretrain', 'ModelConfig', 'known_huberts']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import hubert

    with pytest.raises(AttributeError, match="no attribute 'Hubert'"):
        hubert.Hubert  # noqa: B018
