"""From audio to units: manifest, sampled features, codebook, units. Runs on Dask workers."""

from prefect import flow

from hubert.resolve import Resolved
from tasks import features, kmeans, manifest, units


@flow(name="label", flow_run_name="it{resolved.number} label", validate_parameters=False)
def label(resolved: Resolved) -> None:
    """Label all audio with the units that this iteration predicts."""
    iteration = resolved.iteration
    manifest.run(iteration.manifest)
    features.run(iteration.features)
    kmeans.run(iteration.kmeans)
    units.run(iteration.units)
