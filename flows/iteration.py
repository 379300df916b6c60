"""One HuBERT iteration: label the audio, train on the units, evaluate. The flow that people trigger."""

from prefect import flow

from flows.evaluation import evaluation
from flows.label import label
from flows.training import training
from hubert.evaluation.choice import Outcome
from hubert.runs.options import RunOptions
from tasks import resolve, train
from tasks.clusters.preflight import check_cluster
from tasks.clusters.runner import cancel_jobs, task_runner
from tasks.page.failure import close_page, write_page
from tasks.page.form import ClusterName, IterationOverrides, Number, RecipeName, RunName
from tasks.teacher import Choose


@flow(
    name="hubert-iteration",
    flow_run_name=resolve.name_of_iteration,
    on_cancellation=[train.stop_trainings, cancel_jobs],
    on_completion=[close_page],
    on_failure=[write_page],
    on_crashed=[cancel_jobs, write_page],
)
def hubert_iteration(
    run: RunName = "demo",
    recipe: RecipeName = "demo",
    data: str = "",
    iteration: Number = None,
    teacher: str = "",
    layer: Number = None,
    cluster: ClusterName = "local",
    choose: Choose = "auto",
    overrides: IterationOverrides = None,
    *,
    extend: bool = False,
) -> Outcome:
    """Run one iteration of HuBERT pretraining; whatever is already done is found and not done again.

    Args:
        run: Name of the run: its folder, and its experiment in MLflow. Letters, digits, '.', '_', '+', '-'; or a path.
        recipe: The science: model, k-means, training. A recipe of deployments/recipes, or the path of a TOML file.
        data: Folder of audio, archive or manifest, as the worker's machine sees it. Empty: the corpus that the recipe makes
            (only "demo" makes one).
        iteration: Number of the iteration, from 1. Empty: the first one that is not finished; after the recipe's last one,
            one more with the settings of the last.
        teacher: Checkpoint whose layer is clustered into units. models:/NAME@teacher or models:/NAME/3 (MLflow), RUN/it1 or
            RUN/it1/step-00000400 (of a run), a folder, a file, a Hugging Face id or a URL. Empty: in iteration 1 MFCCs; later
            the version to which somebody moved the alias "teacher" in MLflow, else what the iteration before chose.
        layer: Layer of the teacher, from 1. Empty: the one that its run chose.
        cluster: Where the work runs. A file of deployments/clusters, or the path of a YAML file.
        choose: Who chooses the teacher if none is given. auto: the service, by its measurements. ask: you; the run pauses and
            offers all checkpoints and layers with their scores.
        overrides: Settings that win over the recipe, in this run. An empty field keeps the recipe's value. For any other
            setting: the menu on the right, "Use JSON Input", such as {"train.warmup_steps": 500}.
        extend: Let a finished training go on to more steps, instead of starting another one.
    """
    check_cluster(cluster)
    options = RunOptions(run, iteration, recipe, data, teacher, layer, overrides or {}, extend)
    resolved = resolve.settle(options, choose)
    label.with_options(task_runner=task_runner(cluster, "extraction"))(resolved, cluster)
    training(resolved, cluster)
    return evaluation.with_options(task_runner=task_runner(cluster, "evaluation"))(resolved)
