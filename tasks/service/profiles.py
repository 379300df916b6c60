"""Prefect's settings of the user: how `prefect`, typed in any folder, comes to load this project's plugin.

Prefect loads plugins where its setting `plugins.enabled` is true. In the project's folder pyproject.toml says so. For
other folders `up` writes that one setting into the user's profiles, if the user has none, and `down` removes it. The
profile holds no address: only this environment's plugin looks for the service. A profile of the user's is left alone.
"""

import tomllib
from pathlib import Path

PROFILE = "hubert-flows"
SETTING = "PREFECT_PLUGINS_ENABLED"


def _content(folder: Path) -> str:
    # Prefect's own default profile allows the temporary server, so ours does too.
    return (
        f"# Written by `hubert up` for the service in {folder}, removed by `hubert down`.\n"
        f'active = "{PROFILE}"\n\n[profiles.{PROFILE}]\n{SETTING} = "true"\nPREFECT_SERVER_EPHEMERAL_ENABLED = "true"\n'
    )


def enable_plugins(profiles: Path, folder: Path) -> bool:
    """Write a profile that enables plugins, if there is no file of profiles; say whether plugins are enabled now."""
    if not profiles.exists():
        try:
            profiles.parent.mkdir(parents=True, exist_ok=True)
            profiles.write_text(_content(folder))
        except OSError:  # a home that cannot be written: the answer is no, and `describe` says what to type
            return False
    return plugins_are_enabled(profiles)


def disable_plugins(profiles: Path, folder: Path) -> None:
    """Remove the file of profiles if it is what `enable_plugins` wrote for the service in `folder`."""
    if profiles.is_file() and profiles.read_text() == _content(folder):
        profiles.unlink()


def plugins_are_enabled(profiles: Path) -> bool:
    """Return True if the active profile enables plugins."""
    try:
        content = tomllib.loads(profiles.read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return False
    active = content.get("profiles", {}).get(content.get("active"), {})
    return str(active.get(SETTING, "")).lower() in {"true", "1"}
