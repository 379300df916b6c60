"""A real PostgreSQL server on 127.0.0.1 for a test, from the programs that the system has."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE_SECONDS = 60.0


def find_programs() -> Path | None:
    """Return the folder of PostgreSQL's programs; Debian keeps them off PATH, by version."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists() and (folder / "initdb").exists()), None)


def _owner() -> dict[str, int]:
    """Return as whom the server runs: it refuses to be root."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid}


@contextmanager
def postgresql(programs: Path, port: int, user: str, password: str) -> Iterator[None]:
    """Run a new server whose superuser has a password; it and its data are gone afterwards."""
    owner = _owner()
    # Not in pytest's folder, which only its own user can enter.
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    data, secret = folder / "data", folder / "password"
    secret.write_text(password)
    if owner:
        for path in (folder, secret):
            os.chown(path, owner["user"], owner["group"])
    initdb = ["initdb", "-D", data, "-U", user, "--pwfile", secret, "--auth=scram-sha-256", "-E", "UTF8", "--no-locale"]
    server = ["postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", ""]
    quick = {"cwd": folder, **owner}
    log = folder / "log"
    try:
        subprocess.run([programs / initdb[0], *initdb[1:], "--no-sync"], check=True, capture_output=True, **quick)
        with log.open("wb") as output:
            command = [programs / server[0], *server[1:], "-c", "fsync=off"]
            running = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **quick)
        try:
            deadline = time.monotonic() + DEADLINE_SECONDS
            ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            while subprocess.run(ready, check=False).returncode != 0:
                assert running.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            running.terminate()
            try:
                running.wait(DEADLINE_SECONDS)
            finally:
                running.kill()
    finally:
        shutil.rmtree(folder)
