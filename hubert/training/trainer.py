"""The training loop: masked prediction of units (paper, sections III and IV-C), on one process or many.

    for each step:  gradients = sum over the step's micro-batches, divided by the step's number of masked frames
                    one all-reduce, clip, AdamW
                    a step whose loss or gradient is not finite changes no weight, and is counted

Every random number of a micro-batch comes from (seed, step, micro-batch), so a training that was killed and resumed
ends with the weights of an undisturbed one: bit for bit on a CPU with the same number of threads.
"""

import math
import os
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hubert.core.errors import ConfigError, TrainingDiverged
from hubert.core.frames import SAMPLE_RATE
from hubert.core.hashing import digest, mix
from hubert.model.hubert import HuBERT, HuBERTPretrain
from hubert.model.weights import check_weights
from hubert.training.checkpoint import checkpoint_path, find_start, mend, read_state
from hubert.training.crops import NOISE, Batch, CropPlan, load_batches, samples_of
from hubert.training.distributed import Gradients, World, share_integer
from hubert.training.exit_states import Exit
from hubert.training.folder import TrainingFolder
from hubert.training.init import FRESH, check_dimensions
from hubert.training.job import Job, learning_rate
from hubert.training.ranks import threads_per_process
from hubert.units.labels import Table

INITIALISE = 101  # what the model's seed is for

NUM_EXTRAS = 4  # numbers that are summed over the processes along with the gradients
LOSS, CORRECT, PENALTY, STOP = range(NUM_EXTRAS)


@dataclass
class Window:
    """Sums since the last line of metrics.jsonl. Saved with each checkpoint, so a resumed log has no gap."""

    loss: float = 0.0
    num_correct: float = 0.0
    num_masked: int = 0
    penalty: float = 0.0
    num_frames: int = 0
    norm: float = 0.0
    max_norm: float = 0.0
    num_steps: int = 0
    num_nonfinite: int = 0
    num_samples: int = 0
    seconds: float = 0.0

    def metrics(self) -> dict[str, float | None]:
        """Return the means over the finite steps; None where there was none."""
        masked, frames, steps = (max(1, count) for count in (self.num_masked, self.num_frames, self.num_steps))
        means = {
            "loss": self.loss / masked,
            "accuracy": self.num_correct / masked,
            "feature_penalty": self.penalty / frames,
            "grad_norm": self.norm / steps,
            "max_grad_norm": self.max_norm,
        }
        return {name: value if self.num_steps else None for name, value in means.items()}


@dataclass
class Counters:
    """Where a training stands. Saved with each checkpoint."""

    step: int = 0
    num_nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    num_samples: int = 0
    seconds: float = 0.0
    gpu_seconds: float | None = 0.0  # None: not known, since an older version did the first steps

    def add_time(self, seconds: float, num_gpus: int) -> None:
        """Count the time of a step; a training may go on with other GPUs than it began with."""
        self.seconds += seconds
        if self.gpu_seconds is not None:
            self.gpu_seconds += seconds * num_gpus

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Counters":
        """Return the counters of a saved state."""
        return cls(**{"gpu_seconds": None, **saved})


class Trainer:
    """One training on one process; `run` goes from the newest checkpoint to the last step."""

    def __init__(self, job: Job, world: World, *, take_folder: bool = False) -> None:
        self.job = job
        self.take_folder = take_folder
        self.world = world
        self.settings = settings = job.settings
        self.folder = TrainingFolder(job.folder, job.attempt)
        self.stop_requested = False
        self.stop_reason = ""
        self.table = Table(job.table)
        if self.table.num_units != job.num_units:
            raise ConfigError(
                f"num_units is {job.num_units}, but the table {job.table} has {self.table.num_units} units"
            )
        self.plan = CropPlan(self.table.num_samples, self.table.fileid_hash, self.table.frame_rate, settings)
        torch.set_num_threads(settings.num_threads or threads_per_process(os.environ, settings.num_processes))
        self.model = self._build_model().to(world.device).train()
        self.model.hubert.transformer.checkpointing = settings.activation_checkpointing
        self.gradients = Gradients(self.model.parameters(), NUM_EXTRAS)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.counters = Counters()
        self.window = Window()
        self.lost: list[int] = []  # steps of checkpoints that this start makes again (main process only)

    def _build_model(self) -> HuBERTPretrain:
        torch.manual_seed(mix(self.settings.seed, INITIALISE))
        return HuBERTPretrain(self.job.num_units, self.settings.size, **self.settings.model)

    # The loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Exit:
        """Train from the newest checkpoint to the last step; the main process writes metrics and checkpoints.

        Raises:
            TrainingDiverged: `max_nonfinite_steps` steps in a row were not finite.
            ConfigError: the folder holds a training with other settings.
            DataError, TransientError: from reading, writing, or the other processes.
        """
        with ExitStack() as stack:
            if self.world.is_main:
                stack.enter_context(self.folder.hold(take=self.take_folder))
            lost = self._resume()
            self.say(self._describe())
            if lost:
                if not self._train_to(lost):
                    return Exit.INTERRUPTED
                self._resume()
            if not self._train_to(self.settings.steps):
                return Exit.INTERRUPTED
            if self.world.is_main:
                self.folder.write_summary(self._summary())
        return Exit.FINISHED

    def _train_to(self, last: int) -> bool:
        """Do the steps up to `last`. Returns False if the training was asked to stop before."""
        disable = None if self.world.is_main else True
        with (
            closing(self._load_batches()) as batches,
            tqdm(total=last, initial=self.counters.step, unit="step", disable=disable) as bar,
        ):
            stopping = False
            while self.counters.step < last and not stopping:
                start = time.perf_counter()
                stopping = self._step(batches)
                seconds = time.perf_counter() - start
                self.window.seconds += seconds
                self.counters.add_time(seconds, self.world.num_gpus)
                bar.update()
                self._record(stopping=stopping)
        if self.counters.step < last:
            self.say(f"asked to stop: step {self.counters.step} of {last} is saved")
        return self.counters.step >= last

    def _load_batches(self) -> Generator[Batch]:
        return load_batches(
            self.table,
            self.plan,
            self.settings,
            first_step=self.counters.step,
            rank=self.world.rank,
            size=self.world.size,
            pin=self.world.device.type == "cuda",
        )

    def _step(self, batches: Iterator[Batch]) -> bool:
        """Do one step. Returns whether some process was asked to stop."""
        step = self.counters.step
        shapes = self.plan.step_frames(step)
        num_frames = sum(crops * frames for crops, frames in shapes)
        num_masked = self.plan.num_masked(step)
        self.gradients.zero()
        extras = self.gradients.extras
        for _ in range(self.world.rank, len(shapes), self.world.size):
            self._accumulate(next(batches), extras, num_masked=num_masked, num_frames=num_frames)
        extras[STOP] = float(self.stop_requested)
        self.gradients.sum_over(self.world)
        norm, loss, correct, penalty, stop = torch.cat([self.gradients.norm()[None], extras]).tolist()
        self.counters.step += 1
        num_samples = sum(crops * samples_of(frames) for crops, frames in shapes)
        self.counters.num_samples += num_samples
        self.window.num_samples += num_samples
        if math.isfinite(norm) and math.isfinite(loss):
            self._update(norm)
            self.counters.nonfinite_in_a_row = 0
            self.window.loss += loss * num_masked
            self.window.num_correct += correct
            self.window.num_masked += num_masked
            self.window.penalty += penalty * num_frames
            self.window.num_frames += num_frames
            self.window.norm += norm
            self.window.max_norm = max(self.window.max_norm, norm)
            self.window.num_steps += 1
        else:
            self._skip(loss, norm)
        return bool(stop)

    def _accumulate(self, batch: Batch, extras: torch.Tensor, *, num_masked: int, num_frames: int) -> None:
        """Add the gradients of a micro-batch, and its share of the step's loss, accuracy and penalty.

        As in fairseq, where the unmasked frames are predicted too, the loss is divided by the number of both.
        """
        settings, device = self.settings, self.world.device
        if self.world.is_main:
            self.folder.beat()
        torch.manual_seed(mix(settings.seed, batch.plan.step, batch.plan.index, NOISE))
        unmasked = settings.unmasked_weight > 0
        waveforms = batch.waveforms.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            losses, outputs = self.model(waveforms, batch.labels, mask=batch.mask, unmasked=unmasked)
        loss = losses.sum()
        objective = loss / (num_frames if unmasked else num_masked)
        if unmasked:
            objective = objective + outputs["unmasked_losses"].sum() * (settings.unmasked_weight / num_frames)
        penalty = outputs["feature_penalty"] * (batch.labels.numel() / num_frames)
        (objective + settings.feature_penalty * penalty).backward()
        with torch.no_grad():
            extras[:STOP] += torch.stack([loss.detach() / num_masked, outputs["num_correct"], penalty.detach()])

    def _update(self, norm: float) -> None:
        if norm > self.settings.clip_norm:
            self.gradients.scale(self.settings.clip_norm / norm)
        rate = learning_rate(self.settings, self.job.horizons, self.counters.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def _skip(self, loss: float, norm: float) -> None:
        """Leave the weights as they are, count the step, and give up after too many in a row."""
        self.counters.num_nonfinite += 1
        self.window.num_nonfinite += 1
        self.counters.nonfinite_in_a_row += 1
        step, limit = self.counters.step, self.settings.max_nonfinite_steps
        self.say(
            f"step {step}: loss {loss}, gradient norm {norm}: not finite, skipped ({self.counters.num_nonfinite} so far)"
        )
        if self.counters.nonfinite_in_a_row >= limit:
            raise TrainingDiverged(
                f"the loss or gradient was not finite in {limit} steps in a row, up to step {step} (train.max_nonfinite_steps); "
                "the last checkpoint is from before. Likely cause: the learning rate is too high, or the warm-up too short. "
                f"Fix: lower train.learning_rate ({self.settings.learning_rate}) or raise train.warmup_steps "
                f"({self.settings.warmup_steps}), which starts another training"
            )

    # Files ------------------------------------------------------------------------------------------------------

    def _record(self, *, stopping: bool) -> None:
        """After a step: a line of metrics, a checkpoint, or nothing, as the intervals say."""
        step, settings = self.counters.step, self.settings
        is_last = step == settings.steps
        if not self.world.is_main:
            return
        self.folder.check_sometimes()
        if step % settings.log_interval == 0 or is_last:
            self._log_window()
        scheduled = step % settings.checkpoint_interval == 0 or is_last or step in self.lost
        if scheduled or stopping:
            state = {
                "identity": digest(self.job.identity),
                "optimizer": self.optimizer.state_dict(),
                "counters": asdict(self.counters),
                "window": asdict(self.window),
                "metrics": self.folder.log_text(),
            }
            checkpoint = self.folder.save(step, self.model, state, interim=not scheduled)
            self.say(f"wrote {checkpoint.path.name}")

    def _log_window(self) -> None:
        window, counters = self.window, self.counters
        line = {
            "step": counters.step,
            "epoch": self.plan.epochs_done(counters.step),
            **window.metrics(),
            "learning_rate": learning_rate(self.settings, self.job.horizons, counters.step),
            "num_nonfinite": window.num_nonfinite,
            "audio_seconds_per_second": window.num_samples / SAMPLE_RATE / max(window.seconds, 1e-9),
            "seconds": counters.seconds,
            "time": time.time(),
        }
        self.folder.append_metrics(line)
        self.window = Window()
        shown = ("loss", "accuracy", "feature_penalty", "grad_norm", "learning_rate", "audio_seconds_per_second")
        values = ", ".join(f"{name} {line[name]:.4g}" if line[name] is not None else f"{name} -" for name in shown)
        self.say(f"step {counters.step} of {self.settings.steps}: {values}")

    def _resume(self) -> int:
        """Go back to the newest whole checkpoint, the same on every process, or start anew.

        Returns:
            The step up to which lost checkpoints are made again (`find_start`); 0 if none is.
        """
        step = again = 0
        if self.world.is_main:
            mend(self.folder.path, self.say)
            self.lost, step, again = find_start(self.folder.path, self.settings.steps, self.say)
            if not step:
                self.folder.cut_metrics(0)
        step, again = share_integer(self.world, step), share_integer(self.world, again)
        if not step:
            self._initialise()
            return again
        path = checkpoint_path(self.folder.path, step)
        state = read_state(path)
        if state["identity"] != digest(self.job.identity):
            raise ConfigError(
                f"{path} was trained with other settings, units or table than this job's, and the training cannot go on from "
                "it. Fix: use another folder, or the settings that the folder was started with"
            )
        self.model.load_state_dict(HuBERTPretrain.from_pretrained(path).state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.counters = Counters.of(state["counters"])
        self.window = Window(**state["window"])
        if self.world.is_main:
            self.folder.restore_metrics(step, state.get("metrics"))
        return again

    def _initialise(self) -> None:
        """Give the model the encoder that the training starts from; its head stays new, since it belongs to the units.

        Raises:
            ConfigError: the checkpoint has other dimensions than the settings.
            DataError: it cannot be loaded.
        """
        if self.job.init == FRESH:
            return
        if self.job.init_sha256:
            check_weights(Path(self.job.init), self.job.init_sha256)
        normalize = self.settings.model.get("normalize_waveform")
        encoder = HuBERT.from_pretrained(self.job.init, normalize_waveform=normalize)
        check_dimensions(encoder.config, self.settings)
        self.model.hubert.load_state_dict(encoder.state_dict())
        self.say(f"the encoder's weights are those of {self.settings.init} ({self.job.init})")

    def _describe(self) -> str:
        """Return a line on what will be trained on what; nothing is left out silently."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        left_out = self.plan.num_left_out
        return (
            f"{'resuming after' if self.counters.step else 'starting at'} step {self.counters.step} of {self.settings.steps} on "
            f"{self.world.size} x {self.world.device.type} ({torch.get_num_threads()} threads each): {parameters / 1e6:.1f} M "
            f"parameters, {self.plan.num_files} files ({left_out} shorter than {self.settings.min_seconds} s left out), "
            f"{self.plan.micro_batches_per_epoch} micro-batches per epoch, {self.plan.micro_batches_per_step} per step, crops of "
            f"{self.plan.frames[0]} to {self.plan.frames[-1]} frames"
        )

    def _summary(self) -> dict[str, Any]:
        return {
            "steps": self.counters.step,
            "epochs": self.plan.epochs_done(self.counters.step),
            "horizon": self.job.horizons[-1][1],
            "num_nonfinite": self.counters.num_nonfinite,
            "audio_hours": self.counters.num_samples / SAMPLE_RATE / 3600,
            "seconds": self.counters.seconds,
            "gpu_seconds": self.counters.gpu_seconds,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "num_files": self.plan.num_files,
            "num_left_out": self.plan.num_left_out,
            "world_size": self.world.size,
            "device": torch.cuda.get_device_name() if self.world.device.type == "cuda" else "cpu",
            "num_threads": torch.get_num_threads(),
        }

    def say(self, text: str) -> None:
        """Print a line of the log (main process only), above the progress bar if there is one."""
        if self.world.is_main:
            tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)
