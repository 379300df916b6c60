"""The demo corpus: speech made on the spot, the same bytes for the same settings, with exact phone times.

    <folder>/
        train/<speaker>/train-0007.flac   16 kHz, mono, 16 bits; 12 speakers
        val/<speaker>/val-0003.flac       6 other speakers
        abx/<speaker>/abx-0011.flac       the same 6
        alignments.csv                    fileid,start,end,phone (seconds) of val and abx
        phoneme-abx.item                  one line per phone of abx that ABX can use
        README.txt, plan.json (written first), done.json (written last), lock

A `fileid` is the path under the part's folder without suffix (`f1/abx-0011`). It names its part, so ids of two parts
never collide. No sentence is spoken twice, in any part; the sentences of abx use few words that differ in one phone,
so that in 3 minutes each speaker meets many contexts more than once.

espeak-ng speaks; each utterance then gets a room, a channel, a level, and noise 9 to 13 dB below the speech
(`hubert.data.demo.speech`). MFCC's ABX error is about 3 % within and 12 % across speakers. It is robotic speech, good to
see a pipeline work and learn, not to judge a model.
"""

import csv
import hashlib
import importlib.metadata
import importlib.util
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from hubert.core.errors import ConfigError
from hubert.core.files import atomic_write, read_json, remove, write_json
from hubert.core.locks import acquire
from hubert.data.demo.sentences import make_sentences
from hubert.data.demo.speech import SAMPLE_RATE, Segments, record, speak
from hubert.data.phones import SILENCE

VERSION = 1  # raise it when the same settings lead to other bytes
MIN_PHONE_SECONDS = 0.03


@dataclass(frozen=True)
class Speaker:
    """A variant of the engine's American voice (none with an echo: it would fill the closures), and its habits."""

    name: str
    pitch: int = 50
    rate: int = 165


TRAIN_SPEAKERS = (
    Speaker("m3"),
    Speaker("linda", pitch=40),
    Speaker("m4", rate=180),
    Speaker("shelby", pitch=60),
    Speaker("klatt3", rate=155),
    Speaker("belinda", pitch=35, rate=175),
    Speaker("m6", pitch=60),
    Speaker("Annie", rate=155),
    Speaker("m5", pitch=40, rate=170),
    Speaker("grandma", pitch=65),
    Speaker("m8", rate=160),
    Speaker("aunty", pitch=45, rate=170),
)
TEST_SPEAKERS = (
    Speaker("m1"),
    Speaker("f1"),
    Speaker("m7", rate=175),
    Speaker("steph", pitch=45),
    Speaker("klatt2", pitch=55, rate=160),
    Speaker("Andrea", pitch=40, rate=155),
)
_SPEAKERS = {"abx": TEST_SPEAKERS, "val": TEST_SPEAKERS, "train": TRAIN_SPEAKERS}
_GROUP = 16  # utterances that one engine process speaks: enough that its start costs nothing

_README = """\
Demo corpus of hubert-flows: synthetic speech, made by `hubert.data.demo.corpus` with espeak-ng (GPL-3, from the Python package
espeakng-loader), then filtered and mixed with noise. The sentences are random, and no person speaks here.

train/, val/, abx/   16 kHz mono FLAC, <speaker>/<utterance>.flac; val and abx share speakers, train has others
alignments.csv       phones of val and abx: fileid (path under val/ or abx/ without suffix), start and end in seconds
phoneme-abx.item     ZeroSpeech item file for abx; #file is the path under abx/ without suffix
plan.json, done.json the settings it was made with; done.json is written last and holds a digest of all files
"""


@dataclass(frozen=True)
class _Settings:
    num_train: int
    num_validation: int
    num_abx: int
    seed: int
    version: int = VERSION

    def counts(self) -> dict[str, int]:
        return {"abx": self.num_abx, "val": self.num_validation, "train": self.num_train}


@dataclass(frozen=True)
class _Utterance:
    part: str
    number: int
    speaker: Speaker

    @property
    def fileid(self) -> str:
        return f"{self.speaker.name}/{self.part}-{self.number:04d}"

    @property
    def file(self) -> str:
        return f"{self.part}/{self.fileid}.flac"


def build_demo_corpus(
    folder: Path,
    *,
    num_train: int = 300,
    num_validation: int = 24,
    num_abx: int = 60,
    seed: int = 0,
    num_workers: int = 2,
) -> Path:
    """Make the demo corpus in `folder`, unless it is there already, and return the folder.

    The defaults give 18 minutes for training, 1.4 for validation and 3 for ABX. A corpus that was made with the same
    settings and is whole (a digest of every file says so) is left as it is; anything less is made again. Files that
    others have put into the folder stay. Two processes may ask for the same folder at once: one waits for the other.

    Args:
        folder: a new or empty folder, or one that this function has made or begun.
        num_train: number of training utterances, about 3.7 s each.
        num_validation: number of validation utterances.
        num_abx: number of utterances for ABX; fewer than about 30 leave few phones to compare.
        seed: for the sentences, the speakers' jitter and the noise.
        num_workers: processes that speak; the corpus does not depend on it.

    Raises:
        ConfigError: a number is below 1, the folder holds other things, or espeak-ng is not installed.
        DataError: espeak-ng failed, or gave a phone that is not known here.
    """
    settings = _Settings(num_train, num_validation, num_abx, seed)
    for name, value in {**asdict(settings), "num_workers": num_workers}.items():
        if value < (least := int(name != "seed")):
            raise ConfigError(f"demo corpus: {name} = {value}, expected at least {least}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"demo corpus: {folder} is a file; give a folder")
    if _is_whole(folder, settings):
        return folder
    engine = _find_espeak()
    if not (folder / "lock").exists():  # who works here holds it: then look at the folder when that one is done
        _refuse_other_things(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with acquire(folder / "lock"):
        _refuse_other_things(folder)
        if not _is_whole(folder, settings):
            _build(folder, settings, engine, num_workers)
    return folder


def _refuse_other_things(folder: Path) -> None:
    """Raise ConfigError if the folder holds files, and no sign that they are a demo corpus."""
    if not folder.is_dir() or (folder / "plan.json").is_file():
        return
    others = [path.name for path in folder.iterdir() if path.name != "lock" and path.suffix != ".tmp"]
    if others:
        raise ConfigError(
            f"demo corpus: {folder} is not empty and holds no demo corpus (it holds {min(others)!r}); "
            "give a new or an empty folder"
        )


def _is_whole(folder: Path, settings: _Settings) -> bool:
    done = read_json(folder / "done.json")
    return (
        done is not None
        and done.get("settings") == asdict(settings)
        and done.get("digest") == _digest(folder, settings)
    )


def _digest(folder: Path, settings: _Settings) -> str | None:
    """Return one sha256 over the names and contents of the corpus, None if a file is missing."""
    total = hashlib.sha256()
    tables = ["README.txt", "alignments.csv", "phoneme-abx.item"]
    for name in [*tables, *(utterance.file for utterance in _plan(settings))]:
        try:
            content = hashlib.sha256((folder / name).read_bytes())
        except FileNotFoundError:
            return None
        total.update(f"{name} {content.hexdigest()}\n".encode())
    return total.hexdigest()


def _find_espeak() -> tuple[str, str]:
    """Return the paths of espeak-ng's library and data.

    Raises:
        ConfigError: the package that holds them is not installed.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise ConfigError("the demo's speech needs espeak-ng: `pip install hubert-flows[demo]`, or run `make demo`")
    import espeakng_loader

    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def _plan(settings: _Settings) -> list[_Utterance]:
    """Return all utterances in their fixed order: ABX, validation, training; the speakers of a part take turns."""
    return [
        _Utterance(part, number, _SPEAKERS[part][number % len(_SPEAKERS[part])])
        for part, count in settings.counts().items()
        for number in range(count)
    ]


def _build(folder: Path, settings: _Settings, engine: tuple[str, str], num_workers: int) -> None:
    """Make every file of the corpus. The caller holds the lock."""
    remove(folder / "done.json")
    write_json(folder / "plan.json", {"settings": asdict(settings)})
    utterances = _plan(settings)
    keep = {folder / utterance.file for utterance in utterances}
    for part in settings.counts():  # what a build with other settings, or a killed one, has left
        for path in [*folder.glob(f"{part}/*/{part}-*.flac"), *folder.glob(f"{part}/*/.{part}-*.tmp")]:
            if path not in keep:
                remove(path)
    requests = [_request(u, text, settings.seed) for u, text in zip(utterances, _texts(settings), strict=True)]
    alignments: dict[str, Segments] = {}
    groups = [slice(start, start + _GROUP) for start in range(0, len(utterances), _GROUP)]

    def work(group: slice) -> dict[str, Segments]:
        aligned = {}
        for utterance, speech in zip(utterances[group], speak(requests[group], *engine), strict=True):
            rng = np.random.default_rng([settings.seed, *utterance.file.encode()])
            waveform, aligned[utterance.file] = record(speech, rng)
            with atomic_write(folder / utterance.file) as temporary:
                soundfile.write(temporary, waveform, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
        return aligned

    with (
        tqdm(total=len(utterances), desc="demo corpus", unit="file", disable=None) as bar,
        ThreadPoolExecutor(num_workers) as pool,
    ):
        for aligned in pool.map(work, groups):
            alignments |= aligned
            bar.update(len(aligned))

    tests = [utterance for utterance in utterances if utterance.part != "train"]
    _write_table(
        folder / "alignments.csv",
        ["fileid", "start", "end", "phone"],
        ((u.fileid, f"{start:.4f}", f"{end:.4f}", phone) for u in tests for start, end, phone in alignments[u.file]),
    )
    _write_table(
        folder / "phoneme-abx.item",
        ["#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker"],
        (line for u in tests if u.part == "abx" for line in _item_lines(u, alignments[u.file])),
        delimiter=" ",
    )
    with atomic_write(folder / "README.txt") as temporary:
        temporary.write_text(_README)
    write_json(
        folder / "done.json",
        {
            "settings": asdict(settings),
            "digest": _digest(folder, settings),
            "espeakng_loader": importlib.metadata.version("espeakng-loader"),
        },
    )


def _texts(settings: _Settings) -> list[str]:
    """Return the sentences of `_plan`, all different."""
    taken: set[str] = set()
    texts: list[str] = []
    for part, count in settings.counts().items():
        rng = random.Random(f"sentences {settings.seed} {part}")
        texts += make_sentences(rng, count, taken, minimal_pairs=part == "abx")
    return texts


def _request(utterance: _Utterance, text: str, seed: int) -> dict[str, Any]:
    """Return the engine's arguments for an utterance: the speaker's habits with a jitter of their own."""
    rng = random.Random(f"voice {seed} {utterance.file}")
    speaker = utterance.speaker
    return {
        "text": text,
        "voice": f"en-us+{speaker.name}",
        "rate": round(speaker.rate * rng.uniform(0.85, 1.2)),
        "pitch": speaker.pitch + rng.randint(-15, 15),
        "pitch_range": rng.randint(30, 70),
        "volume": 60,  # at 100 the louder voices clip
        "seed": rng.randrange(1, 2**31),
    }


def _item_lines(utterance: _Utterance, segments: Segments) -> Iterator[tuple[str, ...]]:
    """Yield the item lines of an utterance: phones of 30 ms or more between two phones.

    Phones beside a pause are left out: the first and the last of a file among them, whose frames may be missing.
    """
    for (_, _, before), (start, end, phone), (_, _, after) in zip(segments, segments[1:], segments[2:], strict=False):
        if SILENCE not in (before, phone, after) and end - start >= MIN_PHONE_SECONDS:
            yield utterance.fileid, f"{start:.4f}", f"{end:.4f}", phone, before, after, utterance.speaker.name


def _write_table(path: Path, header: list[str], rows: Iterable[Sequence[str]], delimiter: str = ",") -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
