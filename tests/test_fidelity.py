"""Training as the references train: 200 steps beside torchaudio's model, and what is dropped and masked on the way."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F

from hubert.data import Batch
from hubert.model import HuBERTPretrain
from hubert.sizes import ModelConfig
from hubert.trainer import Trainer
from tests.corpus import NUM_UNITS
from tests.reference import from_torchaudio
from tests.training import ALONE, SETTINGS, job_of, write_table

QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "layerdrop": 0.0}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("corpus"))


# 200 steps beside torchaudio ----------------------------------------------------------------------------------------


class Exact(Trainer):
    """The trainer in float64: the model's weights and the waveforms are, and all else follows them."""

    def _build_model(self) -> HuBERTPretrain:
        return super()._build_model().double()

    def _load_batches(self) -> Generator[Batch]:
        with closing(super()._load_batches()) as batches:
            for batch in batches:
                yield replace(batch, waveforms=batch.waveforms.double())


def torchaudio_model(config: ModelConfig) -> nn.Module:
    """Return torchaudio's HuBERT with a head, of our dimensions; its head has a row per unit, as ours."""
    model = torchaudio.models.hubert_pretrain_model(
        extractor_mode={"group": "group_norm", "layer": "layer_norm"}[config.extractor_norm],
        extractor_conv_layer_config=[tuple(layer) for layer in config.conv_layers],
        extractor_conv_bias=config.conv_bias,
        encoder_embed_dim=config.dim,
        encoder_projection_dropout=config.input_dropout,
        encoder_pos_conv_kernel=config.pos_conv_kernel,
        encoder_pos_conv_groups=config.pos_conv_groups,
        encoder_num_layers=config.num_layers,
        encoder_num_heads=config.num_heads,
        encoder_attention_dropout=config.attention_dropout,
        encoder_ff_interm_features=config.ffn_dim,
        encoder_ff_interm_dropout=config.activation_dropout,
        encoder_dropout=config.dropout,
        encoder_layer_norm_first=config.layer_norm_first,
        encoder_layer_drop=config.layerdrop,
        mask_prob=0.8,
        mask_selection="static",
        mask_other=0.0,
        mask_length=10,
        no_mask_overlap=False,
        mask_min_space=1,
        mask_channel_prob=0.0,
        mask_channel_selection="static",
        mask_channel_other=0.0,
        mask_channel_length=10,
        no_mask_channel_overlap=False,
        mask_channel_min_space=1,
        skip_masked=False,
        skip_nomask=False,
        num_classes=NUM_UNITS,
        final_dim=config.final_dim,
        feature_grad_mult=config.feature_grad_mult if config.feature_grad_mult < 1 else None,
    )
    return model.double().train()


def copy_weights(model: HuBERTPretrain, reference: nn.Module) -> None:
    """Give the reference our weights."""
    ours = dict(model.named_parameters())
    names = {name: next(iter(from_torchaudio({name: value}))) for name, value in reference.named_parameters()}
    assert sorted(names.values()) == sorted(ours)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(ours[names[name]])


def rate_at(update: int, peak: float, warmup: int, last: int) -> float:
    """Return the learning rate of update `update` (from 1), by fairseq's rule one update later, where it is not 0."""
    return peak * min(update / warmup, 1 - (update - warmup) / (last + 1 - warmup))


def reference_losses(
    model: nn.Module, steps: Iterator[list[Batch]], rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> Generator[tuple[float, float]]:
    """Train torchaudio's model by the published recipe; yield each step's loss per masked frame, and its penalty.

    The loss of a batch is the sum of the masked frames' cross-entropies plus 10 times the penalty for each of them;
    gradients are summed over the step's batches and divided by its number of masked frames.
    """
    from torchaudio.models.wav2vec2 import components

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    for rate in rates:
        optimizer.zero_grad()
        entropy, penalties, count = 0.0, [], 0
        batches = next(steps)
        for batch in batches:
            monkeypatch.setattr(components, "_compute_mask_indices", lambda *_, mask=batch.mask, **__: mask)
            logits, _, penalty = model(batch.waveforms, batch.labels)
            loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum")
            (loss + 10 * penalty * len(logits)).backward()
            entropy, count = entropy + loss.item(), count + len(logits)
            penalties.append(penalty.item())
        for parameter in model.parameters():
            parameter.grad /= count
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        yield entropy / count, sum(penalties) / len(penalties)


def test_200_steps_in_float64_lose_what_a_plain_loop_around_torchaudios_model_loses(tmp_path, table, monkeypatch):
    """Same start, crops and masks, nothing dropped; two micro-batches per step, all crops of one length.

    (Where lengths differ, fairseq and torchaudio weigh the penalty of a batch by its masked frames, here all frames count.)
    """
    original = Tensor.float  # both models compute norms and cosines in at least float32: here float64 stays what it is
    monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else original(x))
    steps, warmup, peak = 200, 20, 1e-2
    job = job_of(
        tmp_path,
        table,
        model=SETTINGS.model | QUIET,
        steps=steps,
        warmup_steps=warmup,
        learning_rate=peak,
        micro_batch_seconds=1.0,
        batch_seconds=2.0,
        num_crop_lengths=1,
        min_seconds=1.0,
        max_seconds=1.0,
    )
    trainer = Exact(job, ALONE)
    with torch.no_grad():  # a cosine does not see its scale, its gradient does: the first steps are to be clipped
        trainer.model.final_projection.weight *= 0.1
        trainer.model.final_projection.bias *= 0.1
    reference = torchaudio_model(trainer.model.config)
    copy_weights(trainer.model, reference)

    def batches_of_steps() -> Iterator[list[Batch]]:
        with closing(trainer._load_batches()) as batches:
            while True:
                yield [next(batches) for _ in range(trainer.plan.micro_batches_per_step)]

    rates = [rate_at(update, peak, warmup, steps) for update in range(1, steps + 1)]
    expected = reference_losses(reference, batches_of_steps(), rates, monkeypatch)
    losses, norms = [], []
    with closing(trainer._load_batches()) as batches:
        for step, (loss, penalty) in enumerate(expected):
            trainer.window = type(trainer.window)()
            trainer._step(batches)
            found = trainer.window.metrics()
            assert found["loss"] == pytest.approx(loss, rel=1e-6), step
            assert found["feature_penalty"] == pytest.approx(penalty, rel=1e-6), step
            losses.append(loss)
            norms.append(found["grad_norm"])
    assert trainer.counters.step == steps
    # LEARNT
