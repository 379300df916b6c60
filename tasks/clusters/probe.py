"""Find out what a node can do; `tasks.clusters.check` sends this file inside a job's script. Needs nothing but Python."""

from __future__ import (
    annotations,  # the node's Python may be too old for this project, and must still be able to say so
)

import base64
import importlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

SECONDS = 10.0


def probe(wanted: dict[str, Any]) -> dict[str, Any]:
    """Try everything that `wanted` names; returns what was found, each check as [whether it works, what to say]."""
    found: dict[str, Any] = {
        "node": [True, os.environ.get("SLURMD_NODENAME") or platform.node()],
        "python": _python(wanted["python"]),
        "packages": _packages(wanted["packages"]),
        "shared folder": _folder(Path(wanted["folder"]), wanted["token"]),
        "Prefect API": _api(wanted["api"]),
        "scheduler": _scheduler(wanted["scheduler"], wanted["interface"]),
    }
    if wanted["gpus"]:
        found["GPU"] = _gpus(wanted["gpus"])
    found["started"] = wanted.get("started") or time.time()
    return found


def _python(least: list[int]) -> list[Any]:
    return [list(sys.version_info[:2]) >= least, f"{platform.python_version()} ({sys.executable})"]


def _packages(names: list[str]) -> list[Any]:
    broken = []
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  (a broken library may raise anything)
            broken.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return [not broken, "; ".join(broken) or f"{len(names)} of {len(names)}"]


def _folder(folder: Path, token: str) -> list[Any]:
    try:
        if (folder / "here").read_text() != token:
            return [False, f"{folder}/here has other content than where it was written"]
        trial = folder / uuid.uuid4().hex
        trial.write_text(token)
        trial.unlink()
    except OSError as error:
        return [False, str(error)]
    return [True, "seen and writable"]


def _api(url: str) -> list[Any]:
    if not url:
        return [False, "no service is known here: `hubert up --detach` first"]
    request = urllib.request.Request(f"{url}/admin/version")  # noqa: S310  (the address is the service's own)
    auth = os.environ.get("PREFECT_API_AUTH_STRING")  # from the environment: it stands in no file
    if auth:
        request.add_header("Authorization", "Basic " + base64.b64encode(auth.encode()).decode())
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=SECONDS) as answer:
            return [True, f"answers ({json.load(answer)})"]
    except Exception as error:  # noqa: BLE001  (refused, unknown host, not JSON: all are said)
        return [False, f"{url}: {error}"]


def _scheduler(address: list[Any], interface: str) -> list[Any]:
    if interface and interface not in [name for _, name in socket.if_nameindex()]:
        names = ", ".join(name for _, name in socket.if_nameindex())
        return [False, f"no interface {interface!r} on this node (there are {names})"]
    try:
        socket.create_connection((address[0], address[1]), timeout=SECONDS).close()
    except OSError as error:
        return [False, f"{address[0]}:{address[1]} is not reached: {error}"]
    return [True, f"{address[0]} is reached"]


def _gpus(count: int) -> list[Any]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout  # noqa: S607
    except OSError:
        listed = ""
    try:
        usable = importlib.import_module("torch").cuda.device_count()
    except Exception as error:  # noqa: BLE001  (as above)
        return [False, f"torch does not say: {error}"]
    names = [line.split(":")[1].split("(")[0].strip() for line in listed.splitlines() if ":" in line]
    said = f"{usable} of {count} usable" + (f" ({names[0]})" if names else f" (CUDA_VISIBLE_DEVICES is {visible!r})")
    return [usable >= count, said]


def main() -> None:
    """Write what was found beside the file that names what is wanted; on standard output if that is not seen here."""
    started = time.time()
    wanted = json.loads(os.environ["HUBERT_PROBE"])
    result = Path(wanted["folder"]) / f"{wanted['section']}.json"
    text = json.dumps(probe({**wanted, "started": started}))
    part = result.with_suffix(".part")
    part.write_text(text)
    part.rename(result)


if __name__ == "__main__":
    main()
