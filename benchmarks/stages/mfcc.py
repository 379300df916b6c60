"""39-dimensional MFCCs at 100 Hz of waveforms that are in memory. Option: minutes."""

from benchmarks import signals
from benchmarks.measure import Outcome, Run, use_threads


def _run(run: Run, compute) -> Outcome:
    use_threads(run)
    import torch

    waveforms = [torch.from_numpy(waveform) for waveform in signals.waveforms(run.options["minutes"])]
    compute(waveforms[:2])
    calls = 0
    with run.clock as clock:
        while not calls or clock.goes_on:
            features = compute(waveforms)
            calls += 1
    clock.share(calls)
    seconds = sum(map(len, waveforms)) / signals.SAMPLE_RATE
    return Outcome(seconds, [float(value) for frames in features[:4] for value in frames[::50].flatten()[:200]])


def ours(run: Run) -> Outcome:
    """Through the extractor that the features and units stages use."""
    from hubert.features.extract import FeatureExtractor
    from hubert.features.source import FeatureSource

    return _run(run, FeatureExtractor(FeatureSource()))


def peer(run: Run) -> Outcome:
    """As its features stage calls it: one file at a time."""
    from minimal_hubert.features import mfcc

    return _run(run, lambda waveforms: [mfcc(waveform[None]) for waveform in waveforms])


SIDES = {"ours": ours, "minimal-hubert": peer}
