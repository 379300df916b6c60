"""Manifests of other programs: what they ask for is what is used, or they are refused with what was found."""

import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch

from hubert.core.errors import DataError
from hubert.data.audio import read_waveform
from hubert.data.listing import list_audio
from hubert.data.schema import audio_refs
from hubert.data.verify import verify_rows

LONG, SHORT = 160_000, 24_000  # 10 s and 1.5 s


@pytest.fixture
def audio(tmp_path: Path) -> np.ndarray:
    """Write long.wav (10 s), short.flac (1.5 s) and sub/other.wav (1.5 s at 8 kHz); return the long one's samples."""
    samples = (0.1 * np.random.default_rng(0).standard_normal(LONG)).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", samples, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.flac", samples[:SHORT], 16_000)
    (tmp_path / "sub").mkdir()
    soundfile.write(tmp_path / "sub/other.wav", samples[: SHORT // 2], 8_000)
    return samples


def write_jsonl(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def usable(path: Path, *, resample: bool = False) -> pl.DataFrame:
    good, rejected = verify_rows(list_audio([path]).collect(), resample=resample)
    assert rejected.is_empty(), rejected.to_dicts()
    return good


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list_audio([path]).collect()
    assert str(path) in str(caught.value)
    return str(caught.value)


# NeMo -------------------------------------------------------------------------------------------------------------


def test_a_manifest_of_nemo_gives_the_seconds_that_it_asks_for(tmp_path: Path, audio: np.ndarray) -> None:
    path = write_jsonl(
        tmp_path / "m.jsonl",
        {"audio_filepath": "long.wav", "duration": 1.5, "text": "the first 1.5 s"},
        {"audio_filepath": str(tmp_path / "long.wav"), "duration": 1.5, "offset": 2.25, "text": "from 2.25 s on"},
        {"audio_filepath": "long.wav", "offset": 9, "duration": 1.004, "text": "rounded up"},
        {"audio_filepath": "short.flac", "duration": 1.5, "speaker": "Ann"},
        {"audio_filepath": "sub/other.wav", "duration": 1.49},
    )
    rows = usable(path, resample=True)
    assert rows.select("fileid", "offset", "num_samples").rows() == [
        ("long#0-24000", 0, SHORT),
        ("long#36000-60000", 36_000, SHORT),
        ("long#144000-160000", 144_000, 16_000),
        ("short", None, SHORT),
        ("sub/other", None, SHORT),
    ]
    assert rows["speaker"].to_list() == [None, None, None, "Ann", None]
    crops = [read_waveform(ref) for ref in list(audio_refs(rows))[:2]]
    assert torch.equal(crops[0], torch.from_numpy(audio[:SHORT]))
    assert torch.equal(crops[1], torch.from_numpy(audio[36_000:60_000]))


def test_what_a_nemo_manifest_says_beyond_its_file_is_rejected(tmp_path: Path, audio: np.ndarray) -> None:
    path = write_jsonl(
        tmp_path / "m.jsonl",
        {"audio_filepath": "long.wav", "duration": 12.0},
        {"audio_filepath": "long.wav", "duration": 5.0, "offset": 7.0},
        {"audio_filepath": "gone.wav", "duration": 5.0},
    )
    good, rejected = verify_rows(list_audio([path]).collect())
    assert good.is_empty()
    assert [reason.partition(":")[0] for reason in rejected["reason"]] == ["wrong length", "wrong length", "missing"]
    beyond = write_jsonl(tmp_path / "b.jsonl", {"audio_filepath": "short.flac", "offset": 1.7})
    assert "leave nothing of short.flac (1.50 s), on line 1" in refused(beyond)
    wrong = write_jsonl(
        tmp_path / "w.jsonl",
        {"audio_filepath": "long.wav", "duration": 1},
        {"audio_filepath": "long.wav", "duration": "long"},
    )
    assert "duration must be seconds, found 'long' on line 2" in refused(wrong)


def test_files_outside_of_the_manifests_folder_are_named_under_their_common_one(
    tmp_path: Path, audio: np.ndarray
) -> None:
    (tmp_path / "lists").mkdir()
    rows = [{"audio_filepath": f"../{name}", "duration": 1.5} for name in ("short.flac", "sub/other.wav")]
    assert usable(write_jsonl(tmp_path / "lists/m.jsonl", *rows), resample=True)["fileid"].to_list() == [
        "short",
        "sub/other",
    ]


# Durations and segments beside this project's columns -------------------------------------------------------------


def test_a_duration_that_is_not_the_files_is_rejected_and_one_that_is_changes_nothing(
    tmp_path: Path, audio: np.ndarray
) -> None:
    header = "fileid,path,duration\n"
    (tmp_path / "good.csv").write_text(header + "a,long.wav,10.00\nb,short.flac,1.51\nc,sub/other.wav,1.5\n")
    assert usable(tmp_path / "good.csv", resample=True)["num_samples"].to_list() == [LONG, SHORT, SHORT]
    (tmp_path / "bad.csv").write_text(header + "a,long.wav,1.5\nb,short.flac,1500\n")
    good, rejected = verify_rows(list_audio([tmp_path / "bad.csv"]).collect())
    assert good.is_empty()
    assert rejected["reason"].to_list() == [
        "wrong length: the manifest says 24000 samples at 16 kHz, the file has 160000",
        "wrong length: the manifest says 24000000 samples at 16 kHz, the file has 24000",
    ]


@pytest.mark.parametrize(
    "columns", ["start,end", "start_time,end_time", "Begin,Stop", "segment_start,segment_end", "start,x"]
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_columns_that_mean_a_segment_are_refused_by_name(
    tmp_path: Path, audio: np.ndarray, columns: str, suffix: str
) -> None:
    first, second = columns.split(",")
    frame = pl.DataFrame(
        {"fileid": ["a", "b"], "path": ["long.wav", "short.flac"], first: [None, 1.5], second: [None, 3.0]}
    )
    path = tmp_path / f"m{suffix}"
    {".csv": frame.write_csv, ".jsonl": frame.write_ndjson, ".parquet": frame.write_parquet}[suffix](path)
    said = refused(path)
    assert first in said
    assert "samples at 16 kHz" in said
    empty = frame.with_columns(pl.lit(None, dtype=pl.Float64).alias(name) for name in (first, second))
    {".csv": empty.write_csv, ".jsonl": empty.write_ndjson, ".parquet": empty.write_parquet}[suffix](path)
    assert usable(path)["num_samples"].to_list() == [LONG, SHORT]


def test_segments_in_samples_may_stand_beside_their_seconds(tmp_path: Path, audio: np.ndarray) -> None:
    (tmp_path / "m.csv").write_text("fileid,path,offset,num_samples,start,end\na,long.wav,36000,24000,2.25,3.75\n")
    assert usable(tmp_path / "m.csv").select("offset", "num_samples").rows() == [(36_000, SHORT)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_seconds_where_samples_belong_are_an_error_with_the_line(
    tmp_path: Path, audio: np.ndarray, suffix: str
) -> None:
    rows = pl.DataFrame(
        {"fileid": ["a", "b"], "path": ["long.wav"] * 2, "offset": [0.0, 2.25], "num_samples": [24_000] * 2}
    )
    path = tmp_path / f"m{suffix}"
    if suffix == ".csv":
        path.write_text('fileid,path,offset,num_samples\n"a\nb",long.wav,0,24000\n\nc,long.wav,2.25,24000\n')
    else:
        rows.write_ndjson(path)
    said = refused(path)
    assert "offset must be an integer, found " in said
    assert "samples at 16 kHz (seconds x 16,000)" in said
    assert ("on line 5" if suffix == ".csv" else "on line 2") in said


def test_a_rule_that_a_row_breaks_is_said_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("fileid,path\na,a.wav\nb,b.wav\n../c,c.wav\n")
    assert "the first on line 4 is" in refused(tmp_path / "m.csv")
    (tmp_path / "m.jsonl").write_text('{"fileid": "a", "path": "a.wav"}\n\n{"fileid": "b", "path": ""}\n')
    assert "the first on line 3 is" in refused(tmp_path / "m.jsonl")
    (tmp_path / "m.tsv").write_text("audio\na.wav\t12\nb.wav\t0\n")
    assert "the first on line 3 is" in refused(tmp_path / "m.tsv")
    pl.DataFrame({"fileid": ["a", None], "path": ["a", "b"]}).write_parquet(tmp_path / "m.parquet")
    assert "the first on row 2 is" in refused(tmp_path / "m.parquet")


# Other programs ---------------------------------------------------------------------------------------------------


def test_hugging_faces_metadata_names_whole_files(tmp_path: Path, audio: np.ndarray) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,transcription\nlong.wav,x\nsub/other.wav,y\n")
    rows = usable(tmp_path / "metadata.csv", resample=True)
    assert rows.select("fileid", "num_samples").rows() == [("long", LONG), ("sub/other", SHORT)]


@pytest.mark.parametrize(
    ("row", "program"),
    [
        ({"id": "a", "recording": {"sources": [{"source": "a.wav"}]}, "start": 1.0, "duration": 2.0}, "Lhotse"),
        ({"ID": "a", "wav": "a.wav", "duration": 2.0}, "SpeechBrain"),
        ({"key": "a", "wav": "a.wav", "txt": "x"}, "WeNet"),
        ({"audio": {"path": "a.wav"}, "text": "x"}, "Hugging Face datasets"),
        ({"id": "a", "audio": "a.wav", "n_frames": 12}, "fairseq's speech-to-text"),
        ({"sound": "a.wav", "label": "x"}, ""),
    ],
)
def test_a_manifest_without_our_columns_is_refused_with_its_columns_and_program(
    tmp_path: Path, row: dict[str, object], program: str
) -> None:
    said = refused(write_jsonl(tmp_path / "m.jsonl", row))
    assert f"it has {', '.join(row)}." in said
    assert "lacks the columns fileid, path" in said
    assert ("It looks like a manifest of " in said) == bool(program)
    assert program in said


def test_a_table_with_names_is_no_tsv_of_fairseq_and_its_program_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "m.tsv").write_text("client_id\tpath\tsentence\n1\ta.mp3\thello\n")
    said = refused(tmp_path / "m.tsv")
    assert "expected fairseq's format" in said
    assert "Common Voice" in said


def test_a_kaldi_script_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("a a.wav\n")
    assert "Kaldi wav.scp, write the two columns as fileid,path" in refused(tmp_path / "wav.scp")


# fairseq's slices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_slices_of_archives_in_a_tsv_of_fairseq_are_its_members(tmp_path: Path, audio: np.ndarray, suffix: str) -> None:
    files = ["long.wav", "short.flac"]
    archive = tmp_path / f"c.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for name in files:
                packed.write(tmp_path / name, f"s/{name}")
    else:
        with tarfile.open(archive, "w") as tar:
            for name in files:
                tar.add(tmp_path / name, f"s/{name}")
    content = archive.read_bytes()
    lines = [str(tmp_path)]
    for name, length in zip(files, (LONG, SHORT), strict=True):
        member = (tmp_path / name).read_bytes()
        lines.append(f"{archive.name}:{content.index(member)}:{len(member)}\t{length}")
    (tmp_path / "a.tsv").write_text("\n".join([*lines, f"short.flac\t{SHORT}"]) + "\n")
    rows = usable(tmp_path / "a.tsv")
    assert rows["fileid"].to_list() == ["c/s/long", "c/s/short", "short"]
    waveforms = [read_waveform(ref) for ref in audio_refs(rows)]
    assert torch.equal(waveforms[0], torch.from_numpy(audio))
    assert torch.equal(waveforms[1], waveforms[2])
    alone = usable(archive)
    assert alone["byte_offset"].to_list() == rows["byte_offset"].to_list()[:2]


def test_segments_of_audio_files_in_a_tsv_of_fairseq_are_samples(tmp_path: Path, audio: np.ndarray) -> None:
    (tmp_path / "b.tsv").write_text(f"{tmp_path}\nlong.wav:0:32000\t32000\nlong.wav:32000:24000\t24000\n")
    rows = usable(tmp_path / "b.tsv")
    assert rows["fileid"].to_list() == ["long#0-32000", "long#32000-56000"]
    first, second = audio_refs(rows)
    assert torch.equal(read_waveform(first), torch.from_numpy(audio[:32_000]))
    assert torch.equal(read_waveform(second), torch.from_numpy(audio[32_000:56_000]))
    (tmp_path / "c.tsv").write_text(f"{tmp_path}\nlong.wav:0:32000\t32000\nlong.wav:64000:64000\t32000\n")
    assert "long.wav:64000:64000 on line 3 is a slice of an audio file" in refused(tmp_path / "c.tsv")


def test_a_slice_of_an_archive_that_is_not_there_is_rejected(tmp_path: Path, audio: np.ndarray) -> None:
    (tmp_path / "a.tsv").write_text(f"{tmp_path}\ngone.zip:30:1000\t32000\nshort.flac\t{SHORT}\n")
    good, rejected = verify_rows(list_audio([tmp_path / "a.tsv"]).collect())
    assert good["fileid"].to_list() == ["short"]
    assert rejected["reason"][0].startswith("missing:")
