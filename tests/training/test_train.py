"""The trainer: exact resume, independence of threads, who may write, and how it ends."""

import json
import os
import re
import shutil
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hubert.core.errors import ConfigError, TrainingDiverged, TransientError
from hubert.core.files import read_json, write_json, write_record
from hubert.train import main
from hubert.training.checkpoint import checkpoint_path, list_checkpoints
from hubert.training.crops import Batch
from hubert.training.distributed import Gradients
from hubert.training.exit_states import Exit
from hubert.training.folder import LostOwnershipError, claim, log_is_whole, read_metrics
from hubert.training.job import learning_rate, read_job
from hubert.training.trainer import Counters, Trainer
from tests.support.corpus import write_corpus
from tests.support.training import ALONE, SETTINGS, TIMES, assert_same_training, job_of, metrics_of, train, write_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, table: Path) -> Path:
    """The folder of 20 steps without an interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(job_of(folder, table)) is Exit.FINISHED
    return folder


# Learning and metrics ---------------------------------------------------------------------------------------------


def test_a_training_learns_and_logs_each_interval_and_the_last_step(undisturbed):
    lines = read_metrics(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(2, 21, 2))
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert {"epoch", "accuracy", "feature_penalty", "learning_rate", "grad_norm", "max_grad_norm", *TIMES} <= set(
            line
        )
        assert line["num_nonfinite"] == 0
        assert line["grad_norm"] <= line["max_grad_norm"]
    assert [checkpoint.step for checkpoint in list_checkpoints(undisturbed)] == [10, 20]
    summary = read_json(undisturbed / "summary.json")
    assert summary is not None
    assert summary["steps"] == 20
    assert summary["num_files"] + summary["num_left_out"] == 40
    assert summary["num_left_out"] > 0


def test_a_logged_loss_is_the_mean_over_all_masked_frames_of_its_steps(tmp_path, table, undisturbed):
    """Against plain loops over the same crops and masks, with the gradient of one batch of everything."""
    trainer = Trainer(job_of(tmp_path, table, model=SETTINGS.model | {"dropout": 0.0, "layerdrop": 0.0}), ALONE)
    with closing(trainer._load_batches()) as loader:
        batches = [next(loader) for _ in range(trainer.plan.micro_batches_per_step)]
    losses, correct, squares, frames = [], 0, 0.0, 0
    for batch in batches:
        for waveform, labels, mask in zip(batch.waveforms, batch.labels, batch.mask, strict=True):
            loss, outputs = trainer.model(waveform[None], labels[None], mask=mask[None])
            losses += loss.tolist()
            correct += int(outputs["num_correct"])
            squares += outputs["feature_penalty"].item() * len(labels)
            frames += len(labels)
    with closing(trainer._load_batches()) as loader:
        trainer._step(loader)
    metrics = trainer.window.metrics()
    assert trainer.window.num_masked == len(losses)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["accuracy"] == correct / len(losses)
    assert metrics["feature_penalty"] == pytest.approx(squares / frames, rel=1e-5)


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
def test_the_gradient_is_that_of_the_mean_loss_and_the_weighted_penalty(tmp_path, table, unmasked_weight):
    """Micro-batches of other lengths weigh by their masked frames, and the penalty by its frames."""
    quiet = SETTINGS.model | {"dropout": 0.0, "layerdrop": 0.0}
    trainer = Trainer(job_of(tmp_path, table, model=quiet, clip_norm=1e9, unmasked_weight=unmasked_weight), ALONE)
    with closing(trainer._load_batches()) as loader:
        batches = [next(loader) for _ in range(trainer.plan.micro_batches_per_step)]
    with closing(trainer._load_batches()) as loader:
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer._step(loader)
    gradients = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    for parameter, value in zip(trainer.model.parameters(), before, strict=True):
        parameter.data.copy_(value)
    masked, unmasked, penalty, frames = [], [], torch.zeros(()), sum(batch.labels.numel() for batch in batches)
    for batch in batches:
        losses, outputs = trainer.model(batch.waveforms, batch.labels, mask=batch.mask, unmasked=True)
        masked.append(losses)
        unmasked.append(outputs["unmasked_losses"])
        penalty = penalty + outputs["feature_penalty"] * batch.labels.numel() / frames
    loss = torch.cat(masked).mean()
    if unmasked_weight:
        loss = (torch.cat(masked).sum() + unmasked_weight * torch.cat(unmasked).sum()) / frames
    expected = torch.autograd.grad(loss + 10 * penalty, list(trainer.model.parameters()), allow_unused=True)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_warms_up_falls_to_zero_and_remembers_its_horizons():
    settings = SETTINGS.model_copy(update={"warmup_steps": 10, "learning_rate": 1.0})
    rates = [learning_rate(settings, ((0, 100),), update) for update in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert np.allclose(np.diff(rates[9:]), -1 / 91)
    assert 0 < rates[-1] < 0.02
    longer = [learning_rate(settings, ((0, 100), (80, 200)), update) for update in range(1, 201)]
    assert longer[:80] == rates[:80]
    assert longer[80] > rates[80]
    assert 0 < longer[-1] < 0.01
    assert learning_rate(settings, ((0, 5),), 5) == 0.5  # a training that ends in its warm-up


# Independence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_reading_threads_changes_nothing(tmp_path, table, undisturbed, num_workers):
    train(job_of(tmp_path, table, num_workers=num_workers))
    assert_same_training(tmp_path, undisturbed)


def test_a_parameter_that_no_micro_batch_used_has_a_gradient_of_zeros():
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))
    gradients = Gradients([used, unused], num_extras=2)
    (used * torch.tensor([3.0, 0.0, 4.0])).sum().backward()
    gradients.extras[1] = 100.0
    assert gradients.norm() == 5.0
    assert torch.equal(unused.grad, torch.zeros(2, 2))
    gradients.scale(0.5)
    assert used.grad.tolist() == [1.5, 0.0, 2.0]
    assert gradients.extras.tolist() == [0.0, 100.0]
    gradients.zero()
    assert used.grad.tolist() == [0.0, 0.0, 0.0]


# Interruptions ----------------------------------------------------------------------------------------------------


def test_a_stop_between_two_log_lines_leaves_no_gap(tmp_path, table, undisturbed):
    """Step 13 is in the middle of a window: its sums travel with the checkpoint."""

    class Interrupted(Trainer):
        def _record(self, *, stopping: bool) -> None:
            self.stop_requested = self.counters.step == 12
            super()._record(stopping=stopping)

    job = job_of(tmp_path, table)
    attempt = job.model_copy(update={"attempt": "one"})
    assert Interrupted(attempt, ALONE, take_folder=True).run() is Exit.INTERRUPTED
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [10, 13]
    assert train(job) is Exit.FINISHED
    assert_same_training(tmp_path, undisturbed)
    # The interim checkpoint is gone: it must not take part in the choice, where an undisturbed training has none.
    steps = [checkpoint.step for checkpoint in list_checkpoints(tmp_path)]
    assert steps == [checkpoint.step for checkpoint in list_checkpoints(undisturbed)] == [10, 20]


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, table, undisturbed, capsys):
    job = job_of(tmp_path, table)
    train(job)
    path = checkpoint_path(tmp_path, 20) / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert train(job) is Exit.FINISHED
    said = capsys.readouterr().err
    assert "step-00000020 is damaged and is passed over: the content of state.pt" in said
    assert "resuming after step 10 of 20" in said
    assert_same_training(tmp_path, undisturbed)


def test_a_last_line_that_was_not_written_whole_is_cut(tmp_path, table, undisturbed):
    job = job_of(tmp_path, table)
    train(job.model_copy(update={"settings": job.settings.model_copy(update={"steps": 10})}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "loss": 1.0}\n{"step": 14, "lo')
    train(job)
    assert_same_training(tmp_path, undisturbed)


# Who may write ----------------------------------------------------------------------------------------------------


class Overtaken(Trainer):
    """Another attempt takes the folder over while step 7 is computed."""

    def _accumulate(self, batch: Batch, extras: torch.Tensor, *, num_masked: int, num_frames: int) -> None:
        if batch.plan.step == 6:
            claim(self.job.folder, "other")
        super()._accumulate(batch, extras, num_masked=num_masked, num_frames=num_frames)


def test_a_trainer_that_lost_its_folder_writes_nothing_more(tmp_path, table):
    job = job_of(tmp_path, table).model_copy(update={"attempt": "mine"})
    with pytest.raises(LostOwnershipError, match="belongs to attempt other now"):
        Overtaken(job, ALONE, take_folder=True).run()
    assert [line["step"] for line in metrics_of(tmp_path)] == [2, 4, 6]
    assert not list_checkpoints(tmp_path)
    assert not (tmp_path / "exit.json").exists()


def test_a_second_trainer_by_hand_is_refused_while_one_runs(tmp_path, table):
    class Second(Trainer):
        def _record(self, *, stopping: bool) -> None:
            with pytest.raises(TransientError, match=f"another trainer .pid {os.getpid()} on .*Fix: wait for it"):
                train(self.job)
            super()._record(stopping=stopping)

    job = job_of(tmp_path, table, steps=1).model_copy(update={"attempt": "first"})
    assert Second(job, ALONE, take_folder=True).run() is Exit.FINISHED


# Ends -------------------------------------------------------------------------------------------------------------


class Poisoned(Trainer):
    """One file of the corpus makes the model's arithmetic fail."""

    def _accumulate(self, batch: Batch, extras: torch.Tensor, *, num_masked: int, num_frames: int) -> None:
        if 7 in batch.plan.rows:
            batch = replace(batch, waveforms=batch.waveforms * torch.nan)
        super()._accumulate(batch, extras, num_masked=num_masked, num_frames=num_frames)


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(tmp_path, table):
    """About 38 files in steps of 6: one step per epoch meets the bad one."""
    trainer = Poisoned(job_of(tmp_path, table, max_nonfinite_steps=2, clip_norm=0.5), ALONE)
    poisoned = 0
    with closing(trainer._load_batches()) as loader:
        for step in range(20):
            before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
            is_poisoned = any(7 in trainer.plan.micro_batch(step, index).rows for index in range(4))
            poisoned += is_poisoned
            trainer._step(loader)
            same = all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
            assert same == is_poisoned
    assert 1 <= poisoned <= 6
    assert trainer.window.num_nonfinite == trainer.counters.num_nonfinite == poisoned
    assert trainer.window.num_steps == 20 - poisoned
    assert all(value is not None and np.isfinite(value) for value in trainer.window.metrics().values())


def test_many_steps_in_a_row_that_are_not_finite_end_the_training(tmp_path, table):
    job = job_of(tmp_path, table, learning_rate=1e30, warmup_steps=0, max_nonfinite_steps=3, weight_decay=0.0)
    with pytest.raises(TrainingDiverged, match=r"not finite in 3 steps in a row.*learning_rate \(1e\+30\)"):
        train(job)


def test_gpu_time_adds_up_over_starts_on_other_numbers_of_gpus_and_is_unknown_after_an_older_version():
    first = Counters()
    first.add_time(10.0, 4)
    again = Counters.of(asdict(first))
    again.add_time(5.0, 2)
    assert (again.seconds, again.gpu_seconds) == (15.0, 50.0)

    old = {name: number for name, number in asdict(first).items() if name != "gpu_seconds"}
    resumed = Counters.of(old)
    resumed.add_time(5.0, 2)
    assert (resumed.seconds, resumed.gpu_seconds) == (15.0, None)


def test_a_window_without_a_finite_step_is_logged_as_null(tmp_path, table):
    job = job_of(tmp_path, table, learning_rate=1e30, warmup_steps=0, max_nonfinite_steps=50, steps=6)
    train(job)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["loss"] is None
    assert lines[-1]["num_nonfinite"] == 2
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_the_command_says_by_its_exit_code_how_it_ended(tmp_path, table, capsys):
    assert main([str(tmp_path / "nowhere.json")]) == Exit.CONFIG
    job = job_of(tmp_path / "run", table, steps=2)
    path = tmp_path / "job.json"
    for number, (change, code, text) in enumerate(
        [
            ({}, Exit.FINISHED, ""),
            ({"num_units": 3}, Exit.CONFIG, "num_units is 3, but the table"),
            ({"table": tmp_path}, Exit.DATA, "expected a table"),
            ({"table_key": "another"}, Exit.CONFIG, "was trained with other settings"),
        ]
    ):
        claim(job.folder, str(number))
        write_json(path, job.model_copy(update={"attempt": str(number), **change}).model_dump(mode="json"))
        assert main([str(path)]) == code
        assert text in capsys.readouterr().err
        record = read_json(job.folder / "exit.json")
        assert record is not None
        assert (record["attempt"], record["code"]) == (str(number), code)
        assert text in record["message"]
    path.write_text('{"folder": "x"')
    with pytest.raises(ConfigError, match="neither JSON nor TOML"):
        read_job(path)
    write_json(path, job.model_dump(mode="json") | {"num_unit": 3})
    with pytest.raises(ConfigError, match="num_unit = 3"):
        read_job(path)


def test_a_missing_audio_file_ends_the_training_with_its_name(tmp_path, capsys):
    table = write_corpus(tmp_path / "corpus", [1.5, 1.6])
    (tmp_path / "corpus" / "audio" / "file 1.wav").unlink()
    write_json(tmp_path / "job.json", job_of(tmp_path / "run", table).model_dump(mode="json"))
    assert main([str(tmp_path / "job.json")]) == Exit.DATA
    record = read_json(tmp_path / "run" / "exit.json")
    assert record is not None
    assert re.search(r"speaker1/file 1.*file 1\.wav", record["message"])
    assert record["message"] in capsys.readouterr().err


def test_metrics_are_plain_json(undisturbed):
    for line in (undisturbed / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# Damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [10, 20])
def test_a_lost_checkpoint_is_trained_again_and_nothing_else_changes(tmp_path, table, undisturbed, step):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    other = checkpoint_path(folder, 30 - step) / "model.safetensors"
    before = other.stat().st_ino
    (checkpoint_path(folder, step) / "model.safetensors").unlink()
    write_record(folder / "done.json", {"outputs": {f"step-{number:08d}/config.json": 1 for number in (10, 20)}})
    assert train(job_of(folder, table)) is Exit.FINISHED
    assert [found.step for found in list_checkpoints(folder)] == [10, 20]
    for number in (10, 20):
        ours, theirs = (checkpoint_path(path, number) / "model.safetensors" for path in (folder, undisturbed))
        assert ours.read_bytes() == theirs.read_bytes()
    assert other.stat().st_ino == before  # it was not written again
    assert metrics_of(folder) == metrics_of(undisturbed)


def test_a_damaged_log_is_that_of_the_newest_checkpoint_again(tmp_path, table, undisturbed):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    log = folder / "metrics.jsonl"
    assert log_is_whole(folder)
    log.write_text(log.read_text().replace('"step": 4', '"step": 5'))
    assert not log_is_whole(folder)
    assert train(job_of(folder, table)) is Exit.FINISHED
    assert log_is_whole(folder)
    assert metrics_of(folder) == metrics_of(undisturbed)
