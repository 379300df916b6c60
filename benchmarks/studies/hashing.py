"""What the hashes of outputs cost: the speed of each hash of the standard library, and their share of a run's stages.

    python benchmarks/studies/hashing.py [RUN_FOLDER]

A stage hashes what it writes once, and what it reads once before it works. The share is the time for all bytes of the
stage's outputs, hashed on one core, over the time that the stage took (`seconds` in its done.json).
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
import zlib
from pathlib import Path

MEGABYTES = 512
BUFFER = 1 << 20


def megabytes_per_second(name: str, path: Path) -> float:
    """Hash a file that is in the page cache, twice; return the speed of the faster time."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with path.open("rb") as file:
            if name == "crc32":
                value = 0
                while block := file.read(BUFFER):
                    value = zlib.crc32(block, value)
            else:
                hashlib.file_digest(file, name)
        times.append(time.perf_counter() - start)
    return path.stat().st_size / 1e6 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run")
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(BUFFER) * MEGABYTES)
        file.flush()
        speeds = {
            name: megabytes_per_second(name, Path(file.name)) for name in ("sha256", "blake2b", "sha1", "md5", "crc32")
        }
    for name, speed in speeds.items():
        print(f"{name:8} {speed:8.0f} MB/s")
    for record in sorted(options.run.rglob("done.json")) if options.run else []:
        done = json.loads(record.read_text())
        megabytes = sum(done["outputs"].values()) / 1e6
        seconds = megabytes / speeds["sha256"]
        share = seconds / done["seconds"] if done["seconds"] else 0.0
        print(
            f"{record.parent.name:20} {megabytes:10.2f} MB, {done['seconds']:9.2f} s, hashed in {seconds:.4f} s: {share:.2%}"
        )


if __name__ == "__main__":
    main()
