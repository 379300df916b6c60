"""From checkpoints to a choice and a report: losses of all checkpoints, ABX by layer, quality of units. Runs on Dask workers."""

from prefect import flow

from hubert.outcome import Outcome
from hubert.resolve import Resolved
from tasks import abx, manifest, outcome, quality, report, validate


@flow(name="evaluation", flow_run_name="it{resolved.number} evaluation", validate_parameters=False)
def evaluation(resolved: Resolved) -> Outcome:
    """Score every checkpoint, choose one and its layer, and write the report."""
    iteration = resolved.iteration
    validate.run(iteration.validate)
    if iteration.abx_manifest is not None:
        manifest.run(iteration.abx_manifest, "ABX audio")
    if iteration.abx is not None:
        abx.run(iteration.abx)
    if iteration.quality_manifest is not None:
        manifest.run(iteration.quality_manifest, "aligned audio")
    if iteration.quality is not None:
        quality.run(iteration.quality)
    report.run(iteration)
    return outcome.run(iteration)  # last: an iteration with an outcome is finished
