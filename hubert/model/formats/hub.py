"""Where a model is that somebody names: a path, an id on the Hugging Face Hub, or the address of a file.

    facebook/hubert-base-ls960              the Hub's cache if it is there, else the Hub: configuration and weights only
    https://host/hubert_base_ls960.pt       a file: `hubert.model.formats.download`
    anything that exists                    itself

Programs in a repository are never fetched and never run. A repository whose configuration needs one is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from hubert.core.errors import ConfigError, DataError, HubertError, TransientError, first_line
from hubert.model.formats.download import PASSING, download
from hubert.model.formats.files import refuse_programs, weight_files

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SETTINGS = ["config.json", "preprocessor_config.json"]
# Weights in one file, or in several with an index; pickles only where there is nothing else.
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"]
PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin"]


def locate(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the file or folder that a model's name stands for; fetch it if it is not here.

    Args:
        name: a path, a Hub id (`organisation/model`) or an http(s) address, which may end in `#sha256=...`.
        revision: branch, tag or commit on the Hub; None: what is in the cache, else the newest of the main branch.
        token: for private repositories on the Hub; None: what `hf auth login` has stored. Never sent to another host.
        cache_dir: where fetched files are kept; None: the Hub's cache (HF_HOME), and for addresses `hubert-flows` in
            XDG_CACHE_HOME (default ~/.cache).
        local_files_only: take what is there, and ask nobody. HF_HUB_OFFLINE=1 does the same for the Hub.

    Raises:
        ConfigError: it names nothing, the Hub or the host does not know it, or it is not here and must not be fetched.
        DataError: what came has another hash than promised, or the repository needs a program of its own.
        TransientError: the network or the disk failed.
    """
    text = str(name)
    if re.match(r"https?://", text):
        return download(text, cache_dir=cache_dir, local_files_only=local_files_only)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(text) or path.suffix in {".pt", ".pth", ".bin", ".safetensors"}:
        raise ConfigError(
            f"{text!r}: expected a path that exists, a Hugging Face id (organisation/model) or an http(s) address; "
            f"{path.absolute()} does not exist"
        )
    return _Repository(text, revision, token, cache_dir).fetch(local_files_only=local_files_only)


@dataclass
class _Repository:
    """A model repository on the Hub."""

    name: str
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None

    def fetch(self, *, local_files_only: bool) -> Path:
        """Return the folder with configuration and weights, from the cache if all of it is there."""
        from huggingface_hub import constants

        folder = self._cached()
        if folder is None and (local_files_only or constants.HF_HUB_OFFLINE):
            why = "local_files_only is set" if local_files_only else "HF_HUB_OFFLINE is set"
            raise ConfigError(
                f"{self}: there is no such path here, it is not in the Hub's cache, or not all of it, and {why}. "
                f"{self._offline_help()}"
            )
        return folder or self._fetch()

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} (revision {self.revision})"

    def _cached(self) -> Path | None:
        """Return the folder in the cache if config.json and all weights are in it."""
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(self.name, "config.json", cache_dir=self.cache_dir, revision=self.revision)
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
        refuse_programs(folder, str(self))
        return folder if has_weights(folder) else None

    def _fetch(self) -> Path:
        """Fetch the configuration, look at it, then fetch the weights of the same commit."""
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            return self._fetch_in_two_steps()
        except HubertError:
            raise
        except HFValidationError as error:
            raise ConfigError(f"{self}: this is no name of a model on the Hub: {error}") from error
        except RevisionNotFoundError as error:
            raise ConfigError(
                f"{self}: the repository has no such revision; expected a branch, a tag or a whole commit hash"
            ) from error
        except RepositoryNotFoundError as error:
            raise ConfigError(
                f"{self}: there is no such path here, and the Hub has no such model, or it is private or gated; check the name, "
                "and the token "
                f"(`hf auth login`). The Hub says: {first_line(error)}"
            ) from error
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 500)
            kind = TransientError if status >= 500 or status in PASSING else ConfigError
            raise kind(f"{self}: the Hub answered {status}: {first_line(error)}. {self._offline_help()}") from error
        except LocalEntryNotFoundError as error:
            raise TransientError(
                f"{self}: the Hub cannot be reached, and the cache does not hold all of it. {self._offline_help()}"
            ) from error
        except Exception as error:  # each version of huggingface_hub brings an HTTP library with errors of its own
            raise TransientError(
                f"{self}: fetching it failed ({type(error).__name__}: {first_line(error)}). {self._offline_help()}"
            ) from error

    def _fetch_in_two_steps(self) -> Path:
        from huggingface_hub import HfApi

        folder = self._snapshot(
            SETTINGS, self.revision
        )  # under the name that was asked for, by which it is found again
        info = HfApi(token=self.token).model_info(self.name, revision=folder.name)
        names = [file.rfilename for file in info.siblings or []]
        if "config.json" not in names:
            raise ConfigError(
                f"{self}: the repository has no config.json, so it is no model of transformers or of this project; for a "
                "checkpoint of fairseq or s3prl in a repository give the address of the file itself (https://.../x.pt)"
            )
        refuse_programs(folder, str(self))
        for patterns in (SAFETENSORS, PICKLES):
            if any(fnmatch(name, pattern) for name in names for pattern in patterns):
                folder = self._snapshot([*SETTINGS, *patterns], folder.name)
                if has_weights(folder):
                    return folder
        raise ConfigError(
            f"{self}: expected model.safetensors or pytorch_model.bin (or their parts) in the repository, found {names[:20]}"
        )

    def _snapshot(self, patterns: Sequence[str], revision: str | None) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self.name,
                revision=revision,
                allow_patterns=list(patterns),
                token=self.token,
                cache_dir=self.cache_dir,
            )
        )

    def _offline_help(self) -> str:
        return (
            f"Without a network: fetch it where there is one (`hf download {self.name} config.json model.safetensors`) and copy "
            "the cache (HF_HOME) or the folder here; a folder can be given instead of the id"
        )


def has_weights(folder: Path) -> bool:
    """Return True if a folder holds all the weights that would be loaded from it."""
    try:
        return bool(weight_files(folder))
    except DataError:  # a part is missing, or config.json is damaged
        return False
