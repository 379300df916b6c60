"""Crops and labels of training batches, from flac, wav, or flac in a tar; nothing is computed with them.

Options: kind (flac, wav, tar), minutes (of the corpus), deliver_minutes (of crops, timed, after a first batch that is
not), batch_seconds, workers (our threads, the peer's processes).
"""

from benchmarks import signals
from benchmarks.measure import Outcome, Run, use_threads

MAX_SECONDS = 15.625


def drain(run: Run, batches) -> Outcome:
    """Take batches until enough audio and enough time have passed; the times are those of the audio that was asked for."""
    next(batches)
    wanted = run.options["deliver_minutes"] * 60 * signals.SAMPLE_RATE
    delivered = 0
    with run.clock as clock:
        while delivered < wanted or clock.goes_on:
            delivered += next(batches)
    clock.share(delivered / wanted)
    return Outcome(wanted / signals.SAMPLE_RATE)


def train_settings(run: Run):
    """Return our settings for one micro-batch a step."""
    from hubert.settings.sections import TrainSettings

    seconds = run.options["batch_seconds"]
    return TrainSettings(
        batch_seconds=seconds,
        micro_batch_seconds=seconds,
        max_seconds=MAX_SECONDS,
        num_workers=run.options["workers"],
    )


def our_loader(run: Run, kind: str):
    """Return our trainer's endless batches."""
    from hubert.training.crops import CropPlan, load_batches
    from hubert.units.labels import Table

    table = Table(run.inputs / f"subset-{run.options['minutes']:g}" / f"table-{kind}")
    settings = train_settings(run)
    plan = CropPlan(table.num_samples, table.fileid_hash, table.frame_rate, settings)
    return load_batches(table, plan, settings, first_step=0, rank=0, size=1, pin=run.device == "cuda")


def peer_loader(run: Run, kind: str):
    """Return its training's batches, epoch after epoch."""
    from minimal_hubert.data import build_dataloader_with_labels
    from spidr.config import DataConfig, MaskingConfig

    settings = DataConfig(
        str(run.inputs / f"subset-{run.options['minutes']:g}" / f"{kind}.jsonl"),
        normalize=True,
        min_sample_size=2 * signals.SAMPLE_RATE,
        max_sample_size=round(MAX_SECONDS * signals.SAMPLE_RATE),
        max_batch_length=round(run.options["batch_seconds"] * signals.SAMPLE_RATE),
        num_buckets=100,
        num_workers=run.options["workers"],
        prefetch_factor=4,
        pin_memory=run.device == "cuda",
        bucket_method="percentile",
    )
    loader = build_dataloader_with_labels(settings, MaskingConfig())
    epoch = 0
    while True:
        epoch += 1
        loader.batch_sampler.set_epoch(epoch)
        yield from loader


def ours(run: Run) -> Outcome:
    """Threads that decode the crops only."""
    use_threads(run)
    return drain(run, (batch.waveforms.numel() for batch in our_loader(run, run.options["kind"])))


def peer(run: Run) -> Outcome:
    """Processes that decode whole files."""
    use_threads(run)
    return drain(run, (waveforms.numel() for waveforms, *_ in peer_loader(run, run.options["kind"])))


SIDES = {"ours": ours, "minimal-hubert": peer}
