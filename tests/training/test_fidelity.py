"""Training as the references train: 200 steps beside torchaudio's model, and what is dropped and masked on the way."""

import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubert.core.frames import num_frames
from hubert.model import ops
from hubert.model.hubert import HuBERTPretrain
from hubert.settings.sections import TrainSettings
from hubert.training.crops import Batch
from hubert.training.masks import expected_masked_frames
from hubert.training.trainer import Trainer
from tests.support.corpus import NUM_UNITS
from tests.support.reference import fairseq_mask, from_torchaudio, torchaudio_pretrain
from tests.support.training import ALONE, SETTINGS, job_of, write_table

pytestmark = pytest.mark.slow

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
        norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        for parameter in model.parameters():  # not `clip_grad_norm_`, whose 1e-6 beside the norm grows over the steps
            parameter.grad *= min(1.0, 10.0 / norm.item())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        yield entropy / count, sum(penalties) / len(penalties)


@pytest.mark.parametrize(
    ("kind", "steps", "peak", "tolerance"),
    [(Exact, 200, 1e-2, 1e-6), (Trainer, 100, 1e-3, 1e-5)],
    ids=["200 steps in float64", "100 steps in float32"],
)
def test_steps_lose_what_a_plain_loop_around_torchaudios_model_loses(
    tmp_path, table, monkeypatch, kind, steps, peak, tolerance
):
    """Same start, crops and masks, nothing dropped; two micro-batches per step, all crops of one length.

    (Where lengths differ, fairseq and torchaudio weigh the penalty of a batch by its masked frames, here all frames count.)
    In float32 ours goes the fast ways (`hubert.model.ops`), and a smaller rate keeps the two roundings from growing apart.
    """
    if kind is Exact:  # both models compute norms and cosines in at least float32: here float64 stays what it is
        original = Tensor.float
        monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else original(x))
    warmup = 20
    job = job_of(
        tmp_path,
        table,
        model=SETTINGS.model | QUIET | {"num_layers": 2},
        steps=steps,
        warmup_steps=warmup,
        learning_rate=peak,
        micro_batch_seconds=0.6,
        batch_seconds=1.2,
        num_crop_lengths=1,
        min_seconds=0.6,
        max_seconds=0.6,
    )
    trainer = kind(job, ALONE)
    with torch.no_grad():  # a cosine does not see its scale, its gradient does: the first steps are to be clipped
        trainer.model.final_projection.weight *= 0.1
        trainer.model.final_projection.bias *= 0.1
    reference = torchaudio_pretrain(trainer.model.config, NUM_UNITS).to(next(trainer.model.parameters()).dtype).train()
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
            assert found["loss"] == pytest.approx(loss, rel=tolerance), step
            assert found["feature_penalty"] == pytest.approx(penalty, rel=tolerance), step
            losses.append(loss)
            norms.append(found["grad_norm"])
    assert trainer.counters.step == steps
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert max(norms) > 10 > min(norms)  # some steps were clipped, and some were not


# What is dropped and masked -----------------------------------------------------------------------------------------

RATES = {"dropout": 0.1, "attention_dropout": 0.15, "activation_dropout": 0.2, "input_dropout": 0.25, "layerdrop": 0.3}


class Shares:
    """Counts how many of a number of things happened, by the name of the thing."""

    def __init__(self) -> None:
        self.happened: dict[str, int] = {}
        self.trials: dict[str, int] = {}

    def add(self, name: str, happened: int, trials: int) -> None:
        self.happened[name] = self.happened.get(name, 0) + happened
        self.trials[name] = self.trials.get(name, 0) + trials

    def check(self, name: str, rate: float) -> None:
        """Compare with a binomial share: within 4.5 standard deviations, which 7 of a million honest ones exceed."""
        found, deviation = self.happened[name] / self.trials[name], (rate * (1 - rate) / self.trials[name]) ** 0.5
        assert abs(found - rate) < 4.5 * deviation, f"{name}: {found:.4f} of {self.trials[name]}, expected {rate}"


def watch(model: HuBERTPretrain, shares: Shares, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count, in every forward pass of training: zeros that each dropout makes, layers that run, frames that are hidden."""

    def zeros(name: str, places: int = 1) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        calls = itertools.count()

        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            present = inputs[0] != 0
            place = f"{name} {next(calls) % places}" if places > 1 else name
            shares.add(place, int((output[present] == 0).sum()), int(present.sum()))

        return hook

    hubert = model.hubert
    hubert.input_dropout.register_forward_hook(zeros("input"))
    hubert.transformer.dropout.register_forward_hook(zeros("positions"))
    for layer in hubert.transformer.layers:
        layer.dropout.register_forward_hook(zeros("layer", places=2))  # after attention, after the feed-forward part
        layer.activation_dropout.register_forward_hook(zeros("activation"))
        layer.register_forward_hook(lambda *_: shares.add("layers run", 1, 0))
    hubert.transformer.register_forward_hook(lambda *_: shares.add("layers run", 0, len(hubert.transformer.layers)))

    def count_hidden(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden = (inputs[0] == model.mask_embedding).all(2)
        assert len(set(hidden.sum(1).tolist())) == 1, "all crops of a batch have as many"
        shares.add("masked", int(hidden.sum()), hidden.numel())

    hubert.transformer.register_forward_pre_hook(count_hidden)
    attention = ops.attention

    def count_weights(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dropout: float) -> Tensor:
        """Attend to one-hot values as well: the output is then the attention's weights, with those that were dropped."""
        with torch.random.fork_rng(), torch.no_grad():
            one_hot = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
            weights = attention(query, key, one_hot, key_mask, dropout)
        shares.add("attention", int((weights == 0).sum()), weights.numel())
        return attention(query, key, value, key_mask, dropout)

    monkeypatch.setattr(ops, "attention", count_weights)


def test_what_is_dropped_and_masked_in_training_is_what_the_settings_say(tmp_path, table, monkeypatch):
    """Ten steps of the trainer; each rate is another one, so that no two places can be confused."""
    trainer = Trainer(job_of(tmp_path, table, model=SETTINGS.model | RATES, steps=10, max_seconds=1.5), ALONE)
    shares = Shares()
    watch(trainer.model, shares, monkeypatch)
    expected_masked, all_frames = 0, 0
    with closing(trainer._load_batches()) as batches:
        for step in range(10):
            trainer._step(batches)
            expected_masked += trainer.plan.num_masked(step)
            all_frames += sum(crops * frames for crops, frames in trainer.plan.step_frames(step))
    assert (shares.happened["masked"], shares.trials["masked"]) == (expected_masked, all_frames)
    assert 0.56 < expected_masked / all_frames < 0.6, (
        "mask_prob 0.8 of spans that overlap: 57 % (tests/training/test_masks.py)"
    )
    shares.check("input", RATES["input_dropout"])
    shares.check("positions", RATES["dropout"])
    shares.check("layer 0", RATES["dropout"])
    shares.check("layer 1", RATES["dropout"])
    shares.check("activation", RATES["activation_dropout"])
    shares.check("attention", RATES["attention_dropout"])
    assert shares.trials["layers run"] == 10 * trainer.plan.micro_batches_per_step * 3
    with torch.no_grad():  # layers are few: more passes through the same transformer, of two frames each
        for _ in range(400):
            trainer.model.hubert.transformer(torch.ones(1, 2, trainer.model.config.dim))
    shares.check("layers run", 1 - RATES["layerdrop"])


def test_fairseqs_mask_rule_hides_in_training_what_its_expectation_says(tmp_path, table, monkeypatch):
    """Micro-batches of a single crop, which are not cut to the smallest row: the share's mean is known."""
    settings = {"mask_rule": "fairseq", "micro_batch_seconds": 1.0, "batch_seconds": 20.0, "max_seconds": 1.0}
    trainer = Trainer(job_of(tmp_path, table, model=SETTINGS.model | QUIET, num_crop_lengths=1, **settings), ALONE)
    shares = Shares()
    watch(trainer.model, shares, monkeypatch)
    with closing(trainer._load_batches()) as batches:
        for _ in range(5):
            trainer._step(batches)
    frames = num_frames(16_000)
    single = expected_masked_frames(frames, 0.8, 10, 2)
    draws = [int(fairseq_mask(np.random.default_rng(seed), frames, 0.8, 10, 2).sum()) for seed in range(300)]
    crops = shares.trials["masked"] // frames
    assert crops == 100
    assert abs(shares.happened["masked"] / crops - single) < 4.5 * float(np.std(draws)) / crops**0.5


# Activation checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_activation_checkpointing_loss_and_gradients_are_the_same_bit_for_bit(tmp_path, table, precision):
    """With all dropped that can be: the second pass must draw what the first one drew."""
    losses, gradients, computed = [], [], []
    for wanted in (False, True):
        changes = {"activation_checkpointing": wanted, "precision": precision}
        trainer = Trainer(job_of(tmp_path, table, model=SETTINGS.model | RATES, **changes), ALONE)
        calls = Shares()
        for layer in trainer.model.hubert.transformer.layers:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.add("layers", 1, 1))
        with closing(trainer._load_batches()) as batches:
            for _ in range(2):
                trainer._step(batches)
        losses.append(trainer.window.metrics())
        gradients.append([parameter.grad for parameter in trainer.model.parameters()])
        computed.append(calls.happened["layers"])
    assert losses[0] == losses[1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))
    assert computed[1] == 2 * computed[0], "each layer that was not skipped is computed again"


def test_activation_checkpointing_belongs_to_how_a_training_is_computed_not_to_what_it_is():
    assert TrainSettings(activation_checkpointing=True).key_settings() == {}
