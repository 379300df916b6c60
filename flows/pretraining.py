"""A whole HuBERT pretraining, start here: iteration after iteration, each one clustering the one before.

hubert-pretraining
└── hubert-iteration  1, 2, ...
    ├── label         manifest -> features -> k-means -> units       on Dask; k-means on workers of its own
    ├── training      masked prediction of the units                 its own processes
    └── evaluation    validation -> ABX, quality -> choice, report   on Dask
"""

from prefect import flow

from flows.iteration import hubert_iteration
from hubert.runs.options import RunOptions
from tasks import report, resolve, train
from tasks.clusters.preflight import check_cluster
from tasks.clusters.runner import cancel_jobs
from tasks.page.failure import close_page, write_page
from tasks.page.form import ClusterName, RecipeName, RunName, RunOverrides
from tasks.teacher import Choose, ask_before


@flow(
    name="hubert-pretraining",
    flow_run_name=resolve.name_of_run,
    on_cancellation=[train.stop_trainings, cancel_jobs],
    on_completion=[close_page],
    on_failure=[write_page],
    on_crashed=[cancel_jobs, write_page],
)
def hubert_pretraining(
    run: RunName = "demo",
    recipe: RecipeName = "demo",
    data: str = "",
    cluster: ClusterName = "local",
    choose: Choose = "auto",
    overrides: RunOverrides = None,
    *,
    extend: bool = False,
) -> str:
    """Run all iterations of a recipe; returns the path of the report. Finished work is found and not done again.

    Args:
        run: Name of the run: its folder, and its experiment in MLflow. Letters, digits, '.', '_', '+', '-'; or a path.
        recipe: The science: model, k-means, training. A recipe of deployments/recipes, or the path of a TOML file.
        data: Folder of audio, archive or manifest, as the worker's machine sees it. Empty: the corpus that the recipe makes
            (only "demo" makes one).
        cluster: Where the work runs. A file of deployments/clusters, or the path of a YAML file.
        choose: Who chooses checkpoint and layer between two iterations. auto: the service, by its measurements. ask: you; the
            run pauses and offers all of them with their scores.
        overrides: Settings that win over the recipe, in all iterations. An empty field keeps the recipe's value. For any
            other setting: the menu on the right, "Use JSON Input", such as {"train.warmup_steps": 500}.
        extend: Let finished trainings go on to more steps, instead of starting others.
    """
    check_cluster(cluster)
    for number in resolve.iterations(RunOptions(run, recipe=recipe, data=data, overrides=overrides or {})):
        ask_before(run, number, choose)
        hubert_iteration(run, recipe, data, number, cluster=cluster, choose=choose, overrides=overrides, extend=extend)
    return report.summarise(run)
