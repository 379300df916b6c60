"""How long a training waits while a checkpoint of base with its optimizer's state is written.

Ours is on disk (fsync), hashed and renamed when the training goes on; the peer's is in the system's cache, under its
final name from the start. Options: rounds.
"""

from benchmarks.measure import Outcome, Run, use_threads


def _optimizer(model):
    """Return AdamW after a step, so that it has its two moments."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def ours(run: Run) -> Outcome:
    """As hubert.training.folder."""
    use_threads(run)
    from hubert.model.hubert import HuBERTPretrain
    from hubert.training.checkpoint import write_checkpoint

    model = HuBERTPretrain(500, "base").to(run.device)
    optimizer = _optimizer(model)
    for step in range(1, run.options["rounds"] + 1):
        with run.clock:
            write_checkpoint(
                run.scratch, step, model, {"optimizer": optimizer.state_dict(), "counters": {"step": step}}
            )
    return Outcome()


def peer(run: Run) -> Outcome:
    """Through its Checkpointer."""
    use_threads(run)
    import torch
    from minimal_hubert import HuBERTPretrain
    from spidr.checkpoint import Checkpointer

    model = HuBERTPretrain(500).to(run.device)
    optimizer = _optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    checkpointer = Checkpointer(run.scratch, 1)
    checkpointer.init_state(model, optimizer, scheduler, torch.GradScaler("cuda", enabled=False))
    for step in range(1, run.options["rounds"] + 1):
        with run.clock:
            checkpointer.save(step, 1, force=True)
    return Outcome()


SIDES = {"ours": ours, "minimal-hubert": peer}
