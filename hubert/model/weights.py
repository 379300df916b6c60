"""A trained model that a run starts from: the teacher whose layer is clustered, or the encoder that a training goes on from.

People name it (`teacher`, `train.init`): a folder, a file, a Hugging Face id or a URL. The name is looked up once, when
the run is resolved. From then on the model is known by its local path and by the hash of its weights, so neither workers
nor retries ask the network, and two spellings of one file are the same work. The same weights in a file of another format
count as others.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hubert.core.errors import ConfigError, DataError, TransientError
from hubert.core.files import read_json
from hubert.core.hashing import digest, file_digest
from hubert.core.recognise import refuse_stub
from hubert.model.formats.files import CONFIG_FILE, WEIGHT_FILES, weight_files
from hubert.model.formats.hub import locate
from hubert.model.formats.read import own_config
from hubert.model.hubert import HuBERT
from hubert.settings.model import ModelConfig


@dataclass(frozen=True)
class Origin:
    """A model to start from: as it was named, where it lies, and the sha256 of its weights."""

    name: str
    checkpoint: str
    sha256: str


def find_origin(name: str, setting: str) -> Origin:
    """Look a model up: on this machine, else on the Hub or at its URL.

    Args:
        name: folder, file, Hugging Face id or URL.
        setting: what names it, for errors.

    Raises:
        ConfigError: there is no such model, or a folder without weights.
        DataError: a folder with damaged files, or one that asks for a program of its own.
        TransientError: the network failed.
    """
    path = Path(name).expanduser()
    try:
        # Links stay as given: in the Hub's cache the file behind one has neither a suffix nor a config.json beside it.
        path = (path if path.exists() else locate(name)).absolute()
    except (ConfigError, TransientError) as error:
        raise type(error)(f"{setting} = {name!r}: {error}") from error
    return Origin(name, str(path), weights_digest(path, f"{setting} = {name!r}"))


def weights_digest(path: Path, where: str) -> str:
    """Return the sha256 of the weights that are loaded from a file or folder; of a digest of each file if there are several.

    Raises:
        ConfigError: the folder holds no weights.
        DataError: from `formats.weight_files`, or a file is no weights at all (`hubert.core.recognise`).
    """
    files = weight_files(path)
    if not files:
        raise ConfigError(
            f"{where}: expected a checkpoint folder with {WEIGHT_FILES[0]} (such as it1/train-…/step-00000400) or another of "
            f"{', '.join(WEIGHT_FILES[1:])}; found none in {path}. A file of another name is given by its own path"
        )
    for file in files:
        refuse_stub(file)
    digests = [(file.name, file_digest(file)) for file in files]
    return digests[0][1] if len(digests) == 1 else digest(digests)


def check_weights(checkpoint: Path, sha256: str) -> None:
    """Make sure that a checkpoint still holds the weights that were looked up when the run was settled.

    Raises:
        DataError: it holds others, or has gone.
    """
    try:
        stat = checkpoint.stat()
        found = _digest_of(checkpoint, stat.st_size, stat.st_mtime_ns)
    except (ConfigError, FileNotFoundError):
        found = "nothing"
    if found != sha256:
        raise DataError(
            f"{checkpoint}: expected the weights with sha256 {sha256[:12]}…, which this run was settled with, found {found[:12]}"
            "…: somebody replaced or moved them. Put them back, or settle the iteration again with the ones that are there"
        )


@lru_cache
def _digest_of(checkpoint: Path, _size: int, _mtime_ns: int) -> str:
    """Hash a checkpoint once per process, as each shard of a stage loads it."""
    return weights_digest(checkpoint, str(checkpoint))


def read_config(checkpoint: Path, *, normalize_waveform: bool | None = None) -> ModelConfig:
    """Return the configuration of a checkpoint: what is written in one of ours, else by loading it.

    Args:
        checkpoint: its folder or file.
        normalize_waveform: what is known of it from elsewhere; None: as its files say.

    Raises:
        DataError: it cannot be loaded.
    """
    content = read_json(checkpoint / CONFIG_FILE) or {}
    if isinstance(content.get("model"), dict):
        config = own_config(checkpoint, content)
        return (
            config
            if normalize_waveform is None
            else config.model_copy(update={"normalize_waveform": normalize_waveform})
        )
    return HuBERT.from_pretrained(checkpoint, normalize_waveform=normalize_waveform).config
