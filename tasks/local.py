"""The codebook by dask-ml without a flow: for `hubert kmeans`, on the workers of a cluster file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import ClassVar

from distributed import Client, LocalCluster
from torch import Tensor

from hubert.core.errors import ConfigError
from hubert.core.stage import Figures
from hubert.units.kmeans import KMeansStage
from tasks.clusters.runner import local_workers
from tasks.clusters.settings import AddressSettings, LocalSettings, read_cluster
from tasks.kmeans import dask_lloyd


class ShellKMeansStage(KMeansStage):
    """The same stage (same key, same files) with Lloyd's algorithm on workers that last as long as it."""

    name: ClassVar[str] = KMeansStage.name
    cluster: ClassVar[str] = "local"

    def lloyd(self, centroids: Tensor) -> tuple[Tensor, int]:
        """Refine the first centroids over all shards; returns them with the number of iterations."""
        return dask_lloyd(self.shards, centroids, self.kmeans, partial(connected, self.cluster))


@contextmanager
def connected(cluster: str) -> Iterator[Client]:
    """Give a client of a cluster file's workers: started here, or those of a running scheduler.

    Raises:
        ConfigError: the cluster file is missing or wrong.
    """
    settings = read_cluster(cluster)
    if isinstance(settings, AddressSettings):
        with Client(settings.address) as client:
            yield client
    elif isinstance(settings, LocalSettings):
        with LocalCluster(**local_workers(settings.kmeans)) as workers, Client(workers) as client:
            yield client
    else:
        raise ConfigError(
            f"cluster {cluster!r}: a command runs on this machine; a flow runs on Slurm (`hubert run --cluster`)"
        )


def fit_codebook(stage: KMeansStage) -> Figures:
    """Run the k-means stage, by dask-ml unless the recipe asks for torch."""
    if stage.kmeans.backend == "dask":
        stage = ShellKMeansStage(**{field.name: getattr(stage, field.name) for field in fields(stage)})
    return stage.run()
