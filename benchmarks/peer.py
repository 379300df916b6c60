"""The peers' own environment: python -m benchmarks.peer makes .bench-venv, which nothing else uses.

minimal-hubert depends on SpidR, whose licence is not for commercial use: neither is ever a dependency of this project, and no
line of them is copied here. Its loader reads audio with torchcodec, which needs the system's FFmpeg libraries (Debian:
`apt-get install ffmpeg`); without them the rows that read audio have no peer.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
ENVIRONMENT = PROJECT / ".bench-venv"
PYTHON = ENVIRONMENT / "bin" / "python"
PEER = "minimal-hubert==0.0.8"


def requirements() -> list[str]:
    """Return what is installed: the peer, and the versions of torch that we have, so that the numerics are the same."""
    torch, torchaudio = (version(name).partition("+")[0] for name in ("torch", "torchaudio"))
    return [PEER, f"torch=={torch}", f"torchaudio=={torchaudio}", "transformers>=5,<6", "soundfile"]


def install() -> Path:
    """Make the environment unless it holds what is wanted; return its Python."""
    wanted = "\n".join([*requirements(), sys.version.split()[0]])
    marker = ENVIRONMENT / "installed"
    if marker.exists() and marker.read_text() == wanted:
        return PYTHON
    print(f"peers: {ENVIRONMENT.name} (about 6 GB, a minute or two)", flush=True)
    uv = Path(sys.executable).parent / "uv"
    if uv.exists():
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, ENVIRONMENT], check=True)
        installer = [str(uv), "pip", "install", "--python", str(PYTHON), "--compile-bytecode", "--quiet"]
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        installer = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*installer, *requirements()], check=True)
    marker.write_text(wanted)
    return PYTHON


def ffmpeg_version(python: Path) -> str | None:
    """Return the version of FFmpeg that the peer's decoder finds; None if it finds none."""
    code = "import torchcodec.decoders; print(torchcodec.ffmpeg_major_version)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    install()
