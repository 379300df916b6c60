"""Where a checkpoint that is not a local path lies: a stand-in until the real one lands."""

from pathlib import Path

from hubert.errors import ConfigError


def locate(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the local file or folder of a Hub id or URL."""
    if "://" in name:
        raise ConfigError(f"{name}: URLs cannot be loaded yet")
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
    )
