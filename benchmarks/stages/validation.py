"""The losses of one checkpoint of base on validation audio, loader included. Options: minutes, workers, batch_seconds.

Ours scores every utterance, its start, with masked and unmasked accuracies; the peer random crops and the masked loss.
"""

from benchmarks import signals
from benchmarks.measure import Outcome, Run, use_threads
from benchmarks.stages.loader import MAX_SECONDS, train_settings


def ours(run: Run) -> Outcome:
    """hubert.evaluation.validate, float32."""
    use_threads(run)
    from hubert.evaluation.validate import score
    from hubert.model.hubert import HuBERTPretrain
    from hubert.settings.sections import ValidateSettings
    from hubert.units.labels import Table

    model = HuBERTPretrain.from_pretrained(run.inputs / "model" / "own").to(run.device)
    table = Table(run.inputs / f"subset-{run.options['minutes']:g}" / "table-flac")
    with run.clock:
        row = score(model, table, ValidateSettings(), train_settings(run)).row()
    return Outcome(row["hours"] * 3600, figures={"validation_loss": row["validation_loss"]})


def peer(run: Run) -> Outcome:
    """Its validate function, float32; the loader is built before the time is taken."""
    use_threads(run)
    import torch
    from minimal_hubert import HuBERTPretrain
    from minimal_hubert.data import build_dataloader_with_labels
    from minimal_hubert.validate import validate
    from spidr.config import DataConfig, MaskingConfig

    model = HuBERTPretrain.from_pretrained(run.inputs / "model" / "torchaudio" / "model.pt").to(run.device)
    settings = DataConfig(
        str(run.inputs / f"subset-{run.options['minutes']:g}" / "flac.jsonl"),
        normalize=True,
        min_sample_size=2 * signals.SAMPLE_RATE,
        max_sample_size=round(MAX_SECONDS * signals.SAMPLE_RATE),
        max_batch_length=round(run.options["batch_seconds"] * signals.SAMPLE_RATE),
        num_buckets=100,
        num_workers=run.options["workers"],
        pin_memory=run.device == "cuda",
        bucket_method="percentile",
    )
    loader = build_dataloader_with_labels(settings, MaskingConfig())
    seen: list[int] = []

    class Counted:
        """The loader, and how many samples came from it."""

        def __iter__(self):
            for batch in loader:
                seen.append(batch[0].numel())
                yield batch

        def __len__(self) -> int:
            return len(loader)

    with run.clock:
        losses = validate(model, Counted(), torch.device(run.device), torch.float32)
    penalty = losses["feature_loss"]
    return Outcome(sum(seen) / signals.SAMPLE_RATE, figures={"validation_loss": losses["loss"] - penalty})


SIDES = {"ours": ours, "minimal-hubert": peer}
