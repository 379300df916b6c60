"""From audio files to what the trainer reads: the whole labelling stage, with a codebook that is given.

Options: source (mfcc, layer), dtype (of our teacher; the peer's is float32), layer, minutes, kind (of audio).
Figures: bytes that stay on disk per hour of audio; ours with the k-means sample of 10 % of the audio, which is written
after the time is taken, since the peer's features serve its k-means too.
"""

import json

from benchmarks import signals
from benchmarks.measure import Outcome, Run, use_threads

SAMPLE = 0.1


def _manifest(run: Run, suffix: str):
    return run.inputs / f"subset-{run.options['minutes']:g}" / f"{run.options['kind']}.{suffix}"


def _outcome(run: Run, units, num_bytes: float, label_bytes: float) -> Outcome:
    seconds = sum(signals.lengths(run.options["minutes"])) / signals.SAMPLE_RATE
    figures = {"bytes_per_hour": num_bytes * 3600 / seconds, "label_bytes_per_hour": label_bytes * 3600 / seconds}
    return Outcome(seconds, [float(unit) for unit in units], figures)


def _size(folder) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def ours(run: Run) -> Outcome:
    """Encoder and nearest centroid in one pass; only units are written."""
    use_threads(run)
    import polars as pl
    import torchaudio.compliance.kaldi  # noqa: F401  (the other side imports it before its time is taken, too)

    from hubert.features.source import FeatureSource
    from hubert.features.stage import FeaturesStage
    from hubert.model.weights import weights_digest
    from hubert.settings.sections import FeatureSettings, KMeansSettings, UnitSettings
    from hubert.units.assign import UnitsStage
    from tools.given_stages import codebook_in, manifest_in

    name, source, settings = "mfcc", FeatureSource(), FeatureSettings()
    if run.options["source"] == "layer":
        dtype = run.options["dtype"]
        settings = FeatureSettings(before_residual=True, dtype=dtype)
        model = run.inputs / "model" / "own"
        source = FeatureSource.of_layer(model, weights_digest(model, "the model"), run.options["layer"], settings)
        name = f"layer-{dtype}"
    codebook = run.inputs / "codebooks" / f"{name}.safetensors"
    manifest = manifest_in(_manifest(run, "parquet"), "benchmark")
    stage = UnitsStage(
        parent=run.scratch,
        manifest=manifest,
        codebook=codebook_in(codebook, source, settings, key="benchmark"),
        units=UnitSettings(),
    )
    with run.clock:
        stage.run()
    peak = run.clock.peak
    plan = stage.plan()
    receipt = stage.receipt(0, plan)
    rows = pl.read_parquet(stage.folder / next(iter(receipt.outputs)))
    units = rows.filter(pl.col("fileid") == "u0000")["units"][0]
    labels = _size(run.scratch)
    sample = FeaturesStage(
        parent=run.scratch / "sample",
        manifest=manifest,
        source=source,
        features=settings,
        kmeans=KMeansSettings(sample_fraction=SAMPLE, min_sample_files=1),
    )
    hours = sample.run()["hours"]
    whole = sum(signals.lengths(run.options["minutes"])) / signals.SAMPLE_RATE / 3600
    outcome = _outcome(run, units, labels + _size(sample.folder / "shards") * SAMPLE * whole / hours, labels)
    outcome.figures["peak_bytes"] = float(peak)  # before the sample
    return outcome


def peer(run: Run) -> Outcome:
    """Features of every file, their units, and both joined with the manifest."""
    use_threads(run)
    import numpy as np
    import torch
    from minimal_hubert.features import compute_and_save_hubert_features, compute_and_save_mfccs
    from minimal_hubert.transcribe import transcribe
    from minimal_hubert.utils import merge_manifest_with_units
    from sklearn.cluster import MiniBatchKMeans

    if run.device == "cpu":  # its stage asks for a GPU in so many words
        torch.Tensor.cuda = lambda self, *_, **__: self
        torch.nn.Module.cuda = lambda self, *_, **__: self
    from_mfcc = run.options["source"] == "mfcc"
    centroids = np.load(run.inputs / "codebooks" / f"{'mfcc' if from_mfcc else 'layer-float32'}.npy")
    kmeans = MiniBatchKMeans(len(centroids), n_init=1, random_state=0).fit(centroids)
    kmeans.cluster_centers_ = centroids
    manifest, features, units = _manifest(run, "csv"), run.scratch / "features", run.scratch / "units.jsonl"
    with run.clock:
        if from_mfcc:
            compute_and_save_mfccs(manifest, features)
        else:
            model = run.inputs / "model" / "torchaudio" / "model.pt"
            compute_and_save_hubert_features(manifest, features, model, run.options["layer"])
        transcribe(features, kmeans, units)
        merge_manifest_with_units(str(manifest), str(units), str(run.scratch / "train.jsonl"), from_mfcc=from_mfcc)
    first = next(row for row in map(json.loads, units.read_text().splitlines()) if row["fileid"] == "u0000")
    labels = units.stat().st_size + (run.scratch / "train.jsonl").stat().st_size
    return _outcome(run, first["units"], _size(run.scratch), labels)


SIDES = {"ours": ours, "minimal-hubert": peer}
