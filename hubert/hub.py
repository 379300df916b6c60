"""Where a checkpoint lies: stands in for the real one until the branches meet."""

from pathlib import Path

from hubert.errors import ConfigError


def locate(
    name: str,
    *,
    revision: str | None = None,  # noqa: ARG001
    token: str | bool | None = None,  # noqa: ARG001
    cache_dir: str | Path | None = None,  # noqa: ARG001
    local_files_only: bool = False,  # noqa: ARG001
) -> Path:
    """Return a local path as it is."""
    path = Path(name).expanduser()
    if not path.exists():
        raise ConfigError(f"{name}: expected a checkpoint's folder or file; it does not exist")
    return path
