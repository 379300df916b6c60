"""From units to checkpoints: one training, followed until it ends, adopted if it is already running."""

from prefect import flow

from hubert.runs.pipeline import Iteration
from hubert.runs.resolved import Resolved
from tasks import train


@flow(name="training", flow_run_name="it{resolved.number} training", validate_parameters=False)
def training(resolved: Resolved, cluster: str) -> None:
    """Train the model to predict the units of masked spans."""
    train.run(Iteration(resolved), cluster)
