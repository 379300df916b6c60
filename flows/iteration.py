"""One HuBERT iteration: label the audio, train on the units, evaluate. The flow that people trigger."""

from typing import Any

from prefect import flow

from flows.evaluation import evaluation
from flows.label import label
from flows.training import training
from hubert.outcome import Outcome
from tasks import resolve, train
from tasks.choose import Choose
from tasks.cluster import cancel_jobs, task_runner
from tasks.preflight import check_cluster


@flow(
    name="hubert-iteration",
    flow_run_name=resolve.name_of_iteration,
    on_cancellation=[train.stop_trainings, cancel_jobs],
    on_crashed=[cancel_jobs],
)
def hubert_iteration(
    run: str = "demo",
    recipe: str = "demo",
    data: str = "",
    iteration: int | None = None,
    teacher: str = "",
    layer: int | None = None,
    cluster: str = "local",
    choose: Choose = "auto",
    overrides: dict[str, Any] | None = None,
    *,
    extend: bool = False,
) -> Outcome:
    """Run one iteration of HuBERT pretraining; whatever is already done is found and not done again.

    Args:
        run: Name of the run: its folder, and its experiment in MLflow.
        recipe: Name of a recipe in deployments/recipes, or a path to a TOML file: the science.
        data: Folder of audio (or archive, or manifest). Empty: the recipe's own corpus, if it makes one.
        iteration: Number of the iteration, from 1. Empty: the first one that is not finished; after the recipe's last
            one that is one more, with the settings of the last.
        teacher: Checkpoint whose layer is clustered: models:/NAME@teacher or models:/NAME/3 (MLflow), RUN/it1 or
            RUN/it1/step-00000400 (a run's), a folder, a file, a Hub id or a URL. Empty: MFCC, or the version that a person
            gave the alias `teacher` in MLflow, else what iteration - 1 chose.
        layer: Layer of the teacher, from 1. Empty: the one that its run chose.
        cluster: Name of a file in deployments/clusters, or a path: where the work runs.
        choose: auto: go on with that teacher. ask: pause, and offer the checkpoints and layers with their scores in a form.
        overrides: Settings that win over the recipe, such as {"train": {"steps": 500}}.
        extend: Continue a finished training to more steps.
    """
    check_cluster(cluster)
    resolved = resolve.settle(
        run,
        recipe,
        data,
        iteration=iteration,
        teacher=teacher,
        layer=layer,
        choose=choose,
        overrides=overrides,
        extend=extend,
    )
    label.with_options(task_runner=task_runner(cluster, "extraction"))(resolved, cluster)
    training(resolved, cluster)
    return evaluation.with_options(task_runner=task_runner(cluster, "evaluation"))(resolved)
