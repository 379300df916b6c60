"""The settings of a site: what a cluster file in `deployments/clusters` may say, by kind. Read before anything is started.

A file has one section per kind of work, so that labelling (GPU) and evaluation may ask for different machines.
"""

from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hubert.core.errors import ConfigError
from hubert.core.paths import find_cluster
from hubert.settings.sections import explain
from tasks.slurm.settings import SlurmSettings


class WorkerSettings(BaseModel):
    """The workers of one section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_workers: int = Field(default=0, ge=0, description="worker processes; 0: one per core")
    threads_per_worker: int = Field(default=1, ge=1, description="shards at once in one worker process")
    memory_limit: str = Field(
        default="auto", description="memory per worker, such as 8GB; auto: the machine's, shared out; 0: no limit"
    )
    dashboard_address: str = Field(
        default="127.0.0.1:0", description="where Dask's dashboard listens; port 0: any free one"
    )


class LocalSettings(BaseModel):
    """A cluster file of `kind: local`: workers on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["local"]
    extraction: WorkerSettings = Field(default=WorkerSettings(), description="manifest, features, units")
    kmeans: WorkerSettings = Field(default=WorkerSettings(), description="codebook")
    evaluation: WorkerSettings = Field(default=WorkerSettings(), description="validation, ABX, quality, report")


class AddressSettings(BaseModel):
    """A cluster file of `kind: address`: a Dask scheduler that somebody else runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["address"]
    address: str = Field(description="the scheduler's address, such as tcp://node1:8786", pattern=r"^[a-z]+://.+:\d+$")


ClusterSettings = LocalSettings | AddressSettings | SlurmSettings
_CLUSTERS: TypeAdapter[ClusterSettings] = TypeAdapter(Annotated[ClusterSettings, Field(discriminator="kind")])
Section = Literal["extraction", "kmeans", "evaluation"]


def read_cluster(name: str) -> ClusterSettings:
    """Read a site's settings by name or path.

    Raises:
        ConfigError: the file is missing, not YAML, or a key is wrong; names it.
    """
    path = find_cluster(name)
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"cluster {name!r}: {path} does not exist; known clusters: {known}")
    try:
        content = yaml.safe_load(path.read_text())
        return _CLUSTERS.validate_python(content)
    except yaml.YAMLError as error:
        raise ConfigError(f"cluster {path} is not YAML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"cluster {path}: {explain(error)}") from error
