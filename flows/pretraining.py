"""A whole HuBERT pretraining, start here: iteration after iteration, each one clustering the one before.

hubert-pretraining
└── hubert-iteration  1, 2, ...
    ├── label         manifest -> features -> k-means -> units       on Dask; k-means on workers of its own
    ├── training      masked prediction of the units                 its own processes
    └── evaluation    validation -> ABX, quality -> choice, report   on Dask
"""

from typing import Any

from prefect import flow

from flows.iteration import hubert_iteration
from tasks import report, resolve, train
from tasks.choose import Choose, ask_before
from tasks.cluster import cancel_jobs
from tasks.preflight import check_cluster


@flow(
    name="hubert-pretraining",
    flow_run_name=resolve.name_of_run,
    on_cancellation=[train.stop_trainings, cancel_jobs],
    on_crashed=[cancel_jobs],
)
def hubert_pretraining(
    run: str = "demo",
    recipe: str = "demo",
    data: str = "",
    cluster: str = "local",
    choose: Choose = "auto",
    overrides: dict[str, Any] | None = None,
    *,
    extend: bool = False,
) -> str:
    """Run all iterations of a recipe; returns the path of the report. Finished work is found and not done again.

    Args:
        run: Name of the run: its folder, and its experiment in MLflow.
        recipe: Name of a recipe in deployments/recipes, or a path to a TOML file: the science.
        data: Folder of audio (or archive, or manifest). Empty: the recipe's own corpus, if it makes one.
        cluster: Name of a file in deployments/clusters, or a path: where the work runs.
        choose: auto: go on by itself. ask: pause between iterations, and offer the checkpoints and layers with their scores in
            a form.
        overrides: Settings that win over the recipe, such as {"train": {"steps": 500}}.
        extend: Continue finished trainings to more steps.
    """
    check_cluster(cluster)
    for number in resolve.iterations(recipe, overrides):
        ask_before(run, number, choose)
        hubert_iteration(run, recipe, data, number, cluster=cluster, choose=choose, overrides=overrides, extend=extend)
    return report.summarise(run)
