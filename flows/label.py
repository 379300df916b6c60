"""From audio to units: manifest, sampled features, codebook, units. Runs on Dask workers."""

from prefect import flow

from hubert.runs.pipeline import Iteration
from hubert.runs.resolved import Resolved
from tasks import kmeans
from tasks.clusters.runner import task_runner
from tasks.stage import run_stage


@flow(name="label", flow_run_name="it{resolved.number} label", validate_parameters=False)
def label(resolved: Resolved, cluster: str) -> None:
    """Label all audio with the units that this iteration predicts."""
    iteration = Iteration(resolved)
    run_stage(iteration.begin(iteration.manifest))
    run_stage(iteration.begin(iteration.features))
    codebook.with_options(task_runner=task_runner(cluster, "kmeans"))(resolved)
    run_stage(iteration.begin(iteration.units))


@flow(name="codebook", flow_run_name="it{resolved.number} codebook", validate_parameters=False)
def codebook(resolved: Resolved) -> None:
    """Cluster the sampled features; on workers of its own, as it needs other machines than the encoder."""
    iteration = Iteration(resolved)
    kmeans.run(iteration.begin(iteration.kmeans))
