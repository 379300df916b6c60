"""Steps of base on 500 units: forward, backward, clipping, AdamW; in one loop for all sides. Layerdrop is off.

Options: crops, crop_seconds, dtype, rounds (steps that are timed, after one that is not), loader (true: batches come
from each side's own loader over the flac corpus, else one batch is given again and again), compile (the peer's model is
compiled, as its own training does on a GPU).
"""

from contextlib import nullcontext

from benchmarks import signals
from benchmarks.measure import Outcome, Run, use_threads

NUM_UNITS = 500
FEATURE_PENALTY = 10.0


def _batch(run: Run):
    """Return waveforms (B, T), labels (B, F) and mask (B, F)."""
    import torch

    num_crops, num_samples = run.options["crops"], round(run.options["crop_seconds"] * signals.SAMPLE_RATE)
    frames = signals.num_frames(num_samples)
    arrays = (
        signals.crops(num_crops, num_samples),
        signals.labels(num_crops, frames, NUM_UNITS),
        signals.mask(num_crops, frames),
    )
    return tuple(torch.from_numpy(array) for array in arrays)


def _steps(run: Run, model, loss_of, batches=None) -> Outcome:
    """Train. `loss_of(waveforms, labels, mask)` returns the loss to minimise and the mean masked loss."""
    import torch

    model = model.to(run.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
    given = _batch(run)
    autocast = torch.autocast(run.device, torch.bfloat16, enabled=run.options["dtype"] == "bfloat16")

    def step() -> float:
        waveforms, labels, mask = given if batches is None else next(batches)
        with autocast:
            loss, _ = loss_of(waveforms.to(run.device, non_blocking=True), labels, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return waveforms.numel() / signals.SAMPLE_RATE

    check = []
    if batches is None:
        model.eval()
        with torch.no_grad(), autocast if run.options["dtype"] == "bfloat16" else nullcontext():
            first = [tensor[:1] for tensor in given]
            check = [float(loss_of(first[0].to(run.device), *first[1:])[1])]
        model.train()
    step()
    seconds = []
    for _ in range(run.options["rounds"]):
        with run.clock:
            seconds.append(step())
    return Outcome(sum(seconds) / len(seconds), check)


def ours(run: Run) -> Outcome:
    """The model and the loss of hubert.training.trainer."""
    use_threads(run)
    from hubert.model.hubert import HuBERTPretrain

    # Loaded, and put into a model without layerdrop.
    loaded = HuBERTPretrain.from_pretrained(run.inputs / "model" / "own")
    model = HuBERTPretrain(NUM_UNITS, "base", layerdrop=0.0)
    model.load_state_dict(loaded.state_dict())
    del loaded

    def loss_of(waveforms, labels, mask):
        losses, outputs = model(waveforms, labels, mask=mask)
        return losses.mean() + FEATURE_PENALTY * outputs["feature_penalty"], losses.mean()

    return _steps(run, model, loss_of, _our_batches(run) if run.options["loader"] else None)


def _our_batches(run: Run):
    from benchmarks.stages.loader import our_loader

    return ((batch.waveforms, batch.labels, batch.mask) for batch in our_loader(run, "flac"))


def peer(run: Run) -> Outcome:
    """Its model, its loss."""
    use_threads(run)
    from minimal_hubert import HuBERTPretrain

    model = HuBERTPretrain.from_pretrained(run.inputs / "model" / "torchaudio" / "model.pt")
    model.encoder.layer_drop = 0.0
    if run.options.get("compile"):
        model.compile(dynamic=True)

    def loss_of(waveforms, labels, mask):
        labels, mask = labels.to(run.device, non_blocking=True), mask.to(run.device, non_blocking=True)
        loss, outputs = model(waveforms, labels, mask=mask, attention_mask=None)
        return loss.sum() / mask.sum(), outputs["logits_loss"].mean()

    return _steps(run, model, loss_of, _peer_batches(run) if run.options["loader"] else None)


def _peer_batches(run: Run):
    from benchmarks.stages.loader import peer_loader

    return ((waveforms, labels, mask) for waveforms, labels, _, mask in peer_loader(run, "flac"))


def peer_compiled(run: Run) -> Outcome:
    """The peer with torch.compile; a second step is not timed either, since it compiles too."""
    run.options = {**run.options, "compile": True}
    return peer(run)


def torchaudio(run: Run) -> Outcome:
    """Torchaudio's pretraining model; it draws its own masks, by the same rule."""
    use_threads(run)
    import torch

    from benchmarks.torchaudio_model import build_base

    model = build_base(NUM_UNITS)

    def loss_of(waveforms, labels, _mask):
        logits, _, penalty = model(waveforms, labels.to(run.device))
        target = logits.new_zeros(len(logits), dtype=torch.long)
        loss = torch.nn.functional.cross_entropy(logits.float(), target)
        return loss + FEATURE_PENALTY * penalty, loss

    outcome = _steps(run, model, loss_of)
    outcome.check = []  # its own masks, other weights
    return outcome


SIDES = {"ours": ours, "minimal-hubert": peer, "minimal-hubert, compiled": peer_compiled, "torchaudio": torchaudio}
