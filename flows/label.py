"""From audio to units: manifest, sampled features, codebook, units. Runs on Dask workers."""

from prefect import flow

from hubert.resolve import Resolved
from tasks import features, kmeans, manifest, units
from tasks.cluster import task_runner


@flow(name="label", flow_run_name="it{resolved.number} label", validate_parameters=False)
def label(resolved: Resolved, cluster: str) -> None:
    """Label all audio with the units that this iteration predicts."""
    iteration = resolved.iteration
    manifest.run(iteration.manifest)
    features.run(iteration.features)
    codebook.with_options(task_runner=task_runner(cluster, "kmeans"))(resolved)
    units.run(iteration.units)


@flow(name="codebook", flow_run_name="it{resolved.number} codebook", validate_parameters=False)
def codebook(resolved: Resolved) -> None:
    """Cluster the sampled features; on workers of its own, as it needs other machines than the encoder."""
    kmeans.run(resolved.iteration.kmeans)
