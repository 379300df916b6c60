"""From the start of the process to the end of its first training step: imports, a base model, one crop of 2 s."""

from benchmarks import signals
from benchmarks.clock import cpu_seconds
from benchmarks.measure import Outcome, Run, now_since_spawn, use_threads

NUM_SAMPLES = 2 * signals.SAMPLE_RATE


def _arrays():
    import torch

    frames = signals.num_frames(NUM_SAMPLES)
    arrays = (signals.crops(1, NUM_SAMPLES), signals.labels(1, frames, 500), signals.mask(1, frames))
    return tuple(torch.from_numpy(array) for array in arrays)


def _finish(run: Run, model, loss) -> Outcome:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    loss.backward()
    optimizer.step()
    if run.device == "cuda":
        torch.cuda.synchronize()
    run.clock.wall.append(now_since_spawn(run))
    run.clock.cpu.append(cpu_seconds())
    return Outcome()


def ours(run: Run) -> Outcome:
    """What hubert.train imports."""
    use_threads(run)
    from hubert.model.hubert import HuBERTPretrain
    from hubert.training.trainer import Trainer  # noqa: F401  (it is what a training imports)

    model = HuBERTPretrain(500, "base").to(run.device).train()
    waveforms, labels, mask = _arrays()
    losses, outputs = model(waveforms.to(run.device), labels, mask=mask)
    return _finish(run, model, losses.mean() + 10 * outputs["feature_penalty"])


def peer(run: Run) -> Outcome:
    """What its train module imports."""
    use_threads(run)
    import minimal_hubert.train  # noqa: F401  (it is what a training imports)
    from minimal_hubert import HuBERTPretrain

    model = HuBERTPretrain(500).to(run.device).train()
    waveforms, labels, mask = (tensor.to(run.device) for tensor in _arrays())
    loss, _ = model(waveforms, labels, mask=mask, attention_mask=None)
    return _finish(run, model, loss.mean())


SIDES = {"ours": ours, "minimal-hubert": peer}
