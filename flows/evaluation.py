"""From checkpoints to a choice and a report: losses of all checkpoints, ABX by layer, quality of units. Runs on Dask workers."""

from prefect import flow

from hubert.evaluation.choice import Outcome
from hubert.runs.pipeline import Iteration
from hubert.runs.resolved import Resolved
from tasks import choice, report
from tasks.stage import run_stage


@flow(name="evaluation", flow_run_name="it{resolved.number} evaluation", validate_parameters=False)
def evaluation(resolved: Resolved) -> Outcome:
    """Score every checkpoint, choose one and its layer, and write the report."""
    iteration = Iteration(resolved)
    run_stage(iteration.begin(iteration.validate))
    if iteration.abx_manifest is not None:
        run_stage(iteration.abx_manifest, "ABX audio")
    if iteration.abx is not None:
        run_stage(iteration.begin(iteration.abx))
    if iteration.quality_manifest is not None:
        run_stage(iteration.quality_manifest, "aligned audio")
    if iteration.quality is not None:
        run_stage(iteration.begin(iteration.quality))
    report.run(iteration)
    return choice.run(iteration)  # last: an iteration with an outcome is finished
