"""The codebook by dask-ml without a flow: for `hubert kmeans`, on the workers of a cluster file."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from distributed import Client, LocalCluster

from hubert.core.errors import ConfigError
from hubert.core.stage import Figures
from hubert.units.kmeans import KMeansStage
from tasks.clusters.runner import local_workers
from tasks.clusters.settings import AddressSettings, LocalSettings, read_cluster
from tasks.kmeans import with_dask


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
    """Run the k-means stage on this machine, by dask-ml unless the recipe asks for torch."""
    return with_dask(stage, partial(connected, "local")).run()
