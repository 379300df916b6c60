"""From what a person gives as audio to the rows of a manifest, and to files and back."""

import csv
import json
import os
import tarfile
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch

from hubert.core.errors import ConfigError, DataError
from hubert.core.frames import SAMPLE_RATE
from hubert.data.audio import read_waveform
from hubert.data.listing import COPIES, MACOS, describe_skipped, list_audio
from hubert.data.manifest import read_manifest, scan_manifest, write_manifest
from hubert.data.schema import SCHEMA, audio_refs, check_unique, cut_segments
from hubert.data.verify import check_rejected, count_reasons, verify_rows
from tests.data.test_audio import BAD_FILES, make_bad_file, make_speech, write_tar, write_zip

ODD_NAMES = [
    "two words",
    "comma, and; semicolon",
    'quo"ted',
    "it's",
    "tab\there",
    "[brackets]*",
    "#hash",
    "dotted.name.v1",
    unicodedata.normalize("NFC", "Ärger-é-ñ"),
    unicodedata.normalize("NFD", "Ärger-é-ñ"),
    "日本語 ελληνικά",
]


def add_audio(path: Path, num_samples: int = 1_000) -> Path:
    """Write noise that no other path has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = make_speech(num_samples, seed=sum(os.fsencode(path)))
    soundfile.write(path, samples, SAMPLE_RATE)
    return path


def listed(*sources: Path, **options: str) -> pl.DataFrame:
    return list_audio(sources, **options).collect()


def verified(*sources: Path) -> pl.DataFrame:
    good, rejected = verify_rows(listed(*sources))
    assert rejected.is_empty(), rejected.to_dicts()
    return good


# Folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_recursively_and_in_the_order_of_its_paths(tmp_path: Path) -> None:
    names = ["b/2.flac", "b/10.wav", "a.ogg", "c/d/e.mp3", "c/D.WAV", "z.Flac"]
    for name in names:
        add_audio(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    rows = listed(tmp_path)
    assert rows.schema == SCHEMA
    assert rows["fileid"].to_list() == ["a", "b/10", "b/2", "c/D", "c/d/e", "z"]
    assert rows["path"].to_list() == [str(tmp_path / name) for name in sorted(names)]
    assert rows["size"].to_list() == [Path(path).stat().st_size for path in rows["path"]]
    assert rows["mtime_ns"].to_list() == [Path(path).stat().st_mtime_ns for path in rows["path"]]
    assert rows["num_samples"].null_count() == len(names)


def test_links_to_folders_are_followed_once_and_without_loops(tmp_path: Path) -> None:
    add_audio(tmp_path / "elsewhere/speaker/a.wav")
    root = tmp_path / "root"
    add_audio(root / "own/b.wav")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "link again").symlink_to(tmp_path / "elsewhere")
    (root / "own/up").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    assert listed(root)["fileid"].to_list() == ["link/speaker/a", "own/b"]


def test_a_dangling_link_is_listed_and_rejected_not_dropped(tmp_path: Path) -> None:
    add_audio(tmp_path / "a.wav")
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    good, rejected = verify_rows(listed(tmp_path))
    assert good["fileid"].to_list() == ["a"]
    assert [reason.partition(":")[0] for reason in rejected["reason"]] == ["missing", "unreadable"]


@pytest.mark.parametrize("kind", ["files", "tar", "zip", ".csv", ".jsonl", ".parquet"])
def test_odd_names_survive_every_source_and_format(tmp_path: Path, kind: str) -> None:
    root = tmp_path / 'data, "of" [all] kinds'
    files = [add_audio(root / f"{name}.wav") for name in ODD_NAMES]
    source = root
    if kind in {"tar", "zip"}:
        source = tmp_path / f"odd [1].{kind}"
        (write_tar if kind == "tar" else write_zip)(source, files)
    if kind.startswith("."):
        source = tmp_path / f"odd [1]{kind}"
        write_manifest(verified(root), source)
    rows = verified(source)
    assert sorted(rows["fileid"]) == sorted(ODD_NAMES)
    for ref in audio_refs(rows):
        expected, _ = soundfile.read(root / f"{ref.fileid}.wav", dtype="float32")
        assert torch.equal(read_waveform(ref), torch.from_numpy(expected))


def test_a_name_that_is_not_utf8_is_an_error_that_shows_its_bytes(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    try:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    except OSError:
        pytest.skip("this file system accepts UTF-8 only")
    with pytest.raises(DataError, match=r"caf\\xe9.*not valid UTF-8"):
        listed(tmp_path)


def test_a_folder_without_audio_is_an_error_that_points_at_the_compressed_archive(tmp_path: Path) -> None:
    (tmp_path / "dev-clean.tar.gz").touch()
    with pytest.raises(DataError, match=r"no audio.*dev-clean\.tar\.gz is compressed"):
        listed(tmp_path)
    with pytest.raises(DataError, match="is compressed"):
        listed(tmp_path / "dev-clean.tar.gz")
    with pytest.raises(DataError, match="does not exist"):
        listed(tmp_path / "typo")
    with pytest.raises(ConfigError, match="no audio"):
        list_audio([])


# One fileid, one file ---------------------------------------------------------------------------------------------


def test_a_wav_beside_a_flac_is_an_error_that_names_both(tmp_path: Path) -> None:
    first, second = add_audio(tmp_path / "s/a.flac"), add_audio(tmp_path / "s/a.wav")
    with pytest.raises(DataError) as caught:
        listed(tmp_path)
    for part in ("'s/a'", str(first), str(second), "Remove one"):
        assert part in str(caught.value)


def test_two_roots_with_one_fileid_are_an_error_that_names_both(tmp_path: Path) -> None:
    files = [add_audio(tmp_path / root / "a.wav") for root in ("one", "two")]
    with pytest.raises(DataError, match="common parent folder") as caught:
        listed(tmp_path / "one", tmp_path / "two")
    assert all(str(file) in str(caught.value) for file in files)


def test_a_manifest_that_repeats_a_fileid_or_a_file_is_an_error(tmp_path: Path) -> None:
    add_audio(tmp_path / "a.wav")
    (tmp_path / "m.csv").write_text("fileid,path\nx,a.wav\nx,b.wav\n")
    with pytest.raises(DataError, match=r"'x'.*a\.wav.*b\.wav"):
        listed(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("fileid,path\nx,a.wav\ny,a.wav\n")
    with pytest.raises(DataError, match="listed twice, as 'x' and as 'y'"):
        listed(tmp_path / "m.csv")


def test_sources_within_each_other_are_an_error(tmp_path: Path) -> None:
    add_audio(tmp_path / "inner/a.wav")
    with pytest.raises(DataError, match="listed twice"):
        listed(tmp_path, tmp_path / "inner")


def test_segments_of_one_file_are_no_repetition(tmp_path: Path) -> None:
    add_audio(tmp_path / "a.wav", 2_000)
    (tmp_path / "m.csv").write_text("fileid,path,offset,num_samples\nx,a.wav,0,1000\ny,a.wav,1000,1000\n")
    assert verified(tmp_path / "m.csv")["offset"].to_list() == [0, 1_000]


# Archives ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_archives_puts_the_archives_name_before_the_members(tmp_path: Path) -> None:
    files = [add_audio(tmp_path / "src" / name) for name in ("a.wav", "b.flac")]
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    write_tar(root / "sub/shard.0.tar", files)
    write_zip(root / "x.zip", files)
    add_audio(root / "c.wav")
    rows = verified(root)
    assert rows["fileid"].to_list() == ["c", "sub/shard.0/a", "sub/shard.0/b", "x/a", "x/b"]
    assert rows["archive"].to_list() == [None, *[str(root / "sub/shard.0.tar")] * 2, *[str(root / "x.zip")] * 2]
    assert verified(root / "x.zip")["fileid"].to_list() == ["a", "b"]


def test_members_are_found_where_they_are_whatever_the_headers_hold(tmp_path: Path) -> None:
    """Long names need extra headers in a tar, and extra fields shift a zip's data."""
    path = add_audio(tmp_path / "a.flac")
    long = "d" * 90 + "/" + "e" * 150
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / f"{kind}.tar", "w", format=kind) as tar:
            tar.add(path, f"./{long}/a.flac")
            tar.add(path, f"{long}/ä.flac")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        info = zipfile.ZipInfo("./" + long + "/a.flac")
        info.extra = b"\x99\x99\x04\x00abcd"
        packed.writestr(info, path.read_bytes())
    expected, _ = soundfile.read(path, dtype="float32")
    rows = verified(tmp_path)
    assert rows.height == 6
    for ref in audio_refs(rows):
        assert torch.equal(read_waveform(ref), torch.from_numpy(expected))
    assert "./" not in "".join(rows["fileid"])


def test_a_compressed_archive_is_refused_with_the_way_to_pack_it(tmp_path: Path) -> None:
    path = add_audio(tmp_path / "src/a.wav")
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(path, "a.wav")
    with pytest.raises(DataError, match=r"x\.zip.*'a\.wav' is compressed.*zip -0"):
        listed(tmp_path / "x.zip")
    with tarfile.open(tmp_path / "y.tar", "w:gz") as tar:
        tar.add(path, "a.wav")
    with pytest.raises(DataError, match=r"y\.tar cannot be read.*compressed"):
        listed(tmp_path / "y.tar")


def test_a_cut_tar_is_an_error_not_a_shorter_list(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [add_audio(tmp_path / f"src/{name}.wav") for name in "ab"])
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[: len(content) // 3])
    with pytest.raises(DataError, match=r"x\.tar cannot be read.*cut"):
        listed(tmp_path / "x.tar")


def test_a_link_in_a_tar_is_refused(tmp_path: Path) -> None:
    path = add_audio(tmp_path / "src/a.wav")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(path, "a.wav")
        link = tarfile.TarInfo("b.wav")
        link.type, link.linkname = tarfile.LNKTYPE, "a.wav"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"'b\.wav' is a link.*--hard-dereference"):
        listed(tmp_path / "x.tar")


# What is left out -------------------------------------------------------------------------------------------------


def skipped_of(*sources: Path) -> tuple[list[str], Counter[str]]:
    skipped: Counter[str] = Counter()
    rows = list_audio(sources, skipped=skipped).collect()
    return rows["fileid"].to_list(), skipped


def test_what_macos_adds_to_folders_and_archives_is_counted_and_not_taken(tmp_path: Path) -> None:
    twin = bytes.fromhex("0005160700020000") + b"Mac OS X" + bytes(150)
    names = ["u0.wav", "sub/u1.flac"]
    junk = ["._u0.wav", "sub/._u1.flac", ".DS_Store", "sub/.DS_Store", "__MACOSX/._u0.wav", "__MACOSX/sub/u1.flac"]
    folder = tmp_path / "folder"
    for name in names:
        add_audio(folder / name)
    for name in junk:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(twin)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed, tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in [*names, *junk]:
            packed.write(folder / name, name)
            tar.add(folder / name, name)
    for source in (folder, tmp_path / "x.zip", tmp_path / "x.tar"):
        fileids, skipped = skipped_of(source)
        assert sorted(fileids) == ["sub/u1", "u0"]
        assert skipped == {MACOS: 6}
        assert verified(source).height == 2


def test_files_of_other_suffixes_are_counted_by_suffix(tmp_path: Path) -> None:
    add_audio(tmp_path / "a.wav")
    for name in ("b.m4a", "c.M4A", "sub/d.wma", "README", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    fileids, skipped = skipped_of(tmp_path)
    assert fileids == ["a"]
    assert skipped == {".m4a": 2, ".wma": 1, "": 1, ".txt": 1}
    assert describe_skipped(skipped) == "2 .m4a, 1 without a suffix, 1 .txt, 1 .wma"
    (tmp_path / "a.wav").unlink()
    with pytest.raises(DataError, match=r"no audio in .*it holds 2 \.m4a, "):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "container"),
    [
        ("aif", "AIFF"),
        ("AIFF", "AIFF"),
        ("aifc", "AIFF"),
        ("au", "AU"),
        ("caf", "CAF"),
        ("oga", "OGG"),
        ("rf64", "RF64"),
        ("sph", "NIST"),
        ("w64", "W64"),
    ],
)
def test_every_suffix_that_libsndfile_reads_is_taken(tmp_path: Path, suffix: str, container: str) -> None:
    samples = make_speech(2_000)
    soundfile.write(tmp_path / f"a.{suffix}", samples, SAMPLE_RATE, format=container)
    rows = verified(tmp_path)
    assert rows.select("fileid", "num_samples").rows() == [("a", 2_000)]
    (ref,) = audio_refs(rows)
    np.testing.assert_allclose(read_waveform(ref).numpy(), samples, atol=0.2 if suffix == "oga" else 1e-4)


def test_a_second_format_of_a_recording_is_counted_and_the_first_one_taken(tmp_path: Path) -> None:
    """TIMIT and others have `x.sph` beside `x.wav`, which older versions left out."""
    for name in ("s/x.wav", "s/y.flac"):
        add_audio(tmp_path / name)
    for name in ("s/x.sph", "s/z.sph"):
        soundfile.write(tmp_path / name, make_speech(1_000), SAMPLE_RATE, format="NIST")
    rows = verified(tmp_path)
    assert [Path(path).name for path in rows["path"]] == ["x.wav", "y.flac", "z.sph"]
    assert skipped_of(tmp_path)[1] == {COPIES: 1}


# Manifests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> pl.DataFrame:
    """Return the verified rows of two plain files, two members and two segments."""
    files = [add_audio(tmp_path / "data" / name, 1_600) for name in ("s1/a.wav", "s2/b.flac")]
    write_tar(tmp_path / "t.tar", [add_audio(tmp_path / "src" / name, 2_000) for name in ("c.wav", "d.flac")])
    rows = verified(tmp_path / "data", tmp_path / "t.tar")
    long = verified(add_audio(tmp_path / "long.wav", 8_000))
    assert files
    return pl.concat([rows, cut_segments(long, 0.3).collect()])


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_manifest_survives_being_written_and_read(tmp_path: Path, corpus: pl.DataFrame, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    write_manifest(corpus, path)
    assert verified(path).equals(corpus)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_services_own_manifest_is_read_as_it_was_written(tmp_path: Path, corpus: pl.DataFrame) -> None:
    write_manifest(corpus.lazy(), tmp_path / "m.parquet")
    assert scan_manifest(tmp_path / "m.parquet").collect().equals(corpus)
    assert read_manifest(tmp_path / "m.parquet", start=1, end=3).equals(corpus[1:3])
    assert read_manifest(tmp_path / "m.parquet", start=4).equals(corpus[4:])


def test_a_plain_manifest_holds_three_columns(tmp_path: Path) -> None:
    """What other tools read: the csv and json modules stand for them."""
    rows = verified(add_audio(tmp_path / "a, b.wav"))
    expected = {"fileid": "a, b", "path": str(tmp_path / "a, b.wav"), "num_samples": 1_000}
    write_manifest(rows, tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in expected.items()}]
    write_manifest(rows, tmp_path / "m.jsonl")
    assert [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [expected]


def test_fairseqs_tsv_is_written_and_read(tmp_path: Path) -> None:
    for name in ("s1/a b.wav", "s1/c.flac", 's2/"d.wav'):
        add_audio(tmp_path / "data" / name)
    rows = verified(tmp_path / "data")
    write_manifest(rows, tmp_path / "m.tsv")
    lines = (tmp_path / "m.tsv").read_text().splitlines()
    assert lines == [str(tmp_path / "data"), "s1/a b.wav\t1000", "s1/c.flac\t1000", 's2/"d.wav\t1000']
    assert verified(tmp_path / "m.tsv").equals(rows)
    (tmp_path / "relative.tsv").write_text("data\ns1/c.flac\t1000\n")
    assert verified(tmp_path / "relative.tsv")["path"].to_list() == [str(tmp_path / "data/s1/c.flac")]


def test_fairseqs_tsv_refuses_what_it_cannot_hold(tmp_path: Path, corpus: pl.DataFrame) -> None:
    with pytest.raises(DataError, match=r"4 rows are segments or members.*write \.parquet"):
        write_manifest(corpus, tmp_path / "m.tsv")
    assert not (tmp_path / "m.tsv").exists()
    with pytest.raises(ConfigError, match=r"'\.txt' names no format"):
        write_manifest(corpus, tmp_path / "m.txt")


def test_relative_paths_are_relative_to_the_manifests_folder(tmp_path: Path) -> None:
    add_audio(tmp_path / "data/a.wav")
    start, size = write_tar(tmp_path / "data/t.tar", [tmp_path / "data/a.wav"])["a.wav"]
    (tmp_path / "data/m.csv").write_text(
        f"path,archive,fileid,byte_offset,byte_size,text\na.wav,,x,,,hello\na.wav,t.tar,y,{start},{size},\n"
    )
    rows = verified(tmp_path / "data/m.csv")
    assert rows["path"].to_list() == [str(tmp_path / "data/a.wav"), "a.wav"]
    assert rows["archive"].to_list() == [None, str(tmp_path / "data/t.tar")]
    assert rows["num_samples"].to_list() == [1_000, 1_000]


def test_a_parquet_with_other_integer_types_is_read(tmp_path: Path) -> None:
    path = add_audio(tmp_path / "a.wav")
    frame = pl.DataFrame({"num_samples": [1_000], "path": [str(path)], "fileid": ["007"], "text": ["x"]})
    frame.cast({"num_samples": pl.UInt16}).write_parquet(tmp_path / "m.parquet")
    assert verified(tmp_path / "m.parquet").select("fileid", "num_samples").rows() == [("007", 1_000)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "file,path\na,b.wav\n", "lacks the columns fileid"),
        ("m.csv", "fileid,path,num_samples\n", "has no rows"),
        ("m.csv", "", "cannot be read as .csv"),
        (
            "m.csv",
            "fileid,path,num_samples\na,b.wav,12\nc,d.wav,long\n",
            "num_samples must be an integer, found 'long'",
        ),
        ("m.csv", "fileid,path\n,b.wav\n", "fileid must not be empty"),
        ("m.csv", "fileid,path\na,\n", "path must not be empty"),
        ("m.csv", "fileid,path,num_samples\na,b.wav,0\n", "num_samples must be positive"),
        ("m.csv", "fileid,path\n../a,b.wav\n", "fileid must be a relative path"),
        ("m.csv", "fileid,path\n/a,b.wav\n", "fileid must be a relative path"),
        ("m.csv", "fileid,path,offset\na,b.wav,3\n", "needs num_samples"),
        ("m.csv", "fileid,path,archive\na,b.wav,x.tar\n", "belong together"),
        ("m.jsonl", '{"path": "b.wav"}\n', "lacks the columns fileid; it has path"),
        ("m.jsonl", "fileid,path\na,b.wav\n", "cannot be read as .jsonl"),
        ("m.tsv", "path\tnum_samples\na.wav\t12\n", "expected fairseq's format"),
        ("m.tsv", "", "expected fairseq's format"),
        ("m.parquet", "fileid,path\n", "cannot be read as .parquet"),
        ("m.txt", "a.wav", "its suffix is none of"),
    ],
)
def test_a_malformed_manifest_is_named_with_what_is_wrong(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        listed(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_another_tools_parquet_is_no_manifest_of_ours(tmp_path: Path) -> None:
    pl.DataFrame({"fileid": ["a"], "path": [3]}).write_parquet(tmp_path / "m.parquet")
    with pytest.raises(DataError, match=r"path is Int64.*num_samples is missing.*expected fileid String"):
        scan_manifest(tmp_path / "m.parquet")
    with pytest.raises(DataError, match="does not exist"):
        scan_manifest(tmp_path / "none.parquet")


# Speakers ---------------------------------------------------------------------------------------------------------


def speakers(root: Path, speaker: str) -> list[str | None]:
    return listed(root, speaker=speaker)["speaker"].to_list()


def test_the_speaker_follows_from_the_folders(tmp_path: Path) -> None:
    for number in range(12):
        add_audio(tmp_path / f"train-{number % 2}/spk{number:02}/chapter/{number}-a.wav")
    known = sorted((f"train-{number % 2}", f"spk{number:02}") for number in range(12))
    assert speakers(tmp_path, "auto") == [name for _, name in known]  # two subsets are no speakers, twelve folders are
    assert speakers(tmp_path / "train-0", "auto") == [None] * 6  # six are too few to hold one of them out
    assert speakers(tmp_path / "train-0", "first") == [f"spk{number:02}" for number in range(0, 12, 2)]
    assert speakers(tmp_path, "first") == [subset for subset, _ in known]
    assert speakers(tmp_path, "parent") == ["chapter"] * 12
    assert speakers(tmp_path, "none") == [None] * 12
    assert speakers(tmp_path, r"/(\d+)-[^/]*$") == [str(int(name[3:])) for _, name in known]


def test_a_flat_folder_has_no_speakers(tmp_path: Path) -> None:
    for number in range(12):
        add_audio(tmp_path / f"wavs/{number}.wav")
    assert speakers(tmp_path, "auto") == [None] * 12


def test_the_speaker_of_a_member_follows_from_its_name_not_from_the_archives(tmp_path: Path) -> None:
    path = add_audio(tmp_path / "src/a.wav")
    (tmp_path / "root").mkdir()
    for shard in range(12):
        with tarfile.open(tmp_path / f"root/{shard:02}.tar", "w") as tar:
            tar.add(path, f"s{shard % 3}/{shard}.wav")
    assert speakers(tmp_path / "root", "auto") == [None] * 12
    assert speakers(tmp_path / "root", "first") == [f"s{shard % 3}" for shard in range(12)]


def test_a_speaker_that_the_manifest_names_stays(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("fileid,path,speaker\ns1/a,a.wav,Ann\ns2/b,b.wav,\n")
    assert speakers(tmp_path / "m.csv", "first") == ["Ann", "s2"]
    assert speakers(tmp_path / "m.csv", "none") == [None, None]


@pytest.mark.parametrize("pattern", ["(", "no group", "(two)(groups)", "(?=look)(ahead)"])
def test_a_speaker_pattern_that_cannot_work_is_refused_before_anything_is_read(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match="speaker"):
        list_audio([tmp_path / "does not matter"], speaker=pattern)


def test_a_speaker_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    add_audio(tmp_path / "a/b.wav")
    with pytest.raises(DataError, match=r"matches no file.*'a/b'"):
        listed(tmp_path, speaker="^(x)/")


# Verification -----------------------------------------------------------------------------------------------------

SIX = ["truncated flac", "empty", "8 kHz", "stereo", "NaN", "text"]


def test_six_kinds_of_bad_files_are_rejected_with_fitting_reasons(tmp_path: Path) -> None:
    add_audio(tmp_path / "good.wav")
    bad = {str(make_bad_file(tmp_path, kind)): BAD_FILES[kind] for kind in SIX}
    good, rejected = verify_rows(listed(tmp_path), max_workers=2)
    assert good.select("fileid", "num_samples").rows() == [("good", 1_000)]
    assert good.schema == SCHEMA
    assert set(rejected["path"]) == set(bad)
    for row in rejected.iter_rows(named=True):
        assert row["reason"].startswith(bad[row["path"]])
        assert row["fileid"] == Path(row["path"]).stem


def test_with_resample_other_rates_and_channels_are_usable(tmp_path: Path) -> None:
    for kind in SIX:
        make_bad_file(tmp_path, kind)
    good, rejected = verify_rows(listed(tmp_path), resample=True)
    assert dict(good.select("fileid", "num_samples").rows()) == {"8-kHz": 80_000, "stereo": 40_000}
    assert rejected.height == 4


def test_the_header_check_finds_what_headers_show(tmp_path: Path) -> None:
    for kind in SIX:
        make_bad_file(tmp_path, kind)
    good, _ = verify_rows(listed(tmp_path), verify="header")
    assert sorted(good["fileid"]) == ["NaN"]


def test_a_manifest_with_wrong_lengths_is_found_out(tmp_path: Path) -> None:
    add_audio(tmp_path / "a.wav", 1_000)
    (tmp_path / "m.csv").write_text(
        "fileid,path,offset,num_samples\nwhole,a.wav,,999\nfits,a.wav,500,500\nbeyond,a.wav,501,500\nshort,a.wav,0,399\n"
    )
    good, rejected = verify_rows(listed(tmp_path / "m.csv"))
    assert good["fileid"].to_list() == ["fits"]
    assert dict(rejected.select("fileid", "reason").rows()) == {
        "whole": "wrong length: the manifest says 999 samples at 16 kHz, the file has 1000",
        "beyond": "wrong length: the segment ends at sample 1001 (16 kHz), the file at 1000",
        "short": "too short: 399 samples at 16 kHz, at least 400 needed",
    }


def test_a_bad_member_of_an_archive_is_named_with_the_archive(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", [add_audio(tmp_path / "src/a.wav"), make_bad_file(tmp_path / "src", "NaN")])
    good, rejected = verify_rows(listed(tmp_path / "t.tar"))
    assert good["fileid"].to_list() == ["a"]
    assert rejected["path"].to_list() == [f"{tmp_path / 't.tar'} (member NaN.wav)"]


def test_too_many_rejected_files_stop_with_their_names_and_the_setting(tmp_path: Path) -> None:
    for kind in SIX:
        make_bad_file(tmp_path, kind)
    for number in range(6):
        add_audio(tmp_path / f"good{number}.wav")
    _, rejected = verify_rows(listed(tmp_path))
    check_rejected(rejected, num_total=12, max_rejected=0.5)
    with pytest.raises(DataError) as caught:
        check_rejected(rejected, num_total=12, max_rejected=0.01)
    for part in ("6 of 12", "max_rejected = 0.01", *rejected["path"], *rejected["reason"]):
        assert part in str(caught.value)
    assert count_reasons(rejected)["wrong sample rate"] == 1


def test_rejecting_every_file_is_an_error_whatever_is_allowed(tmp_path: Path) -> None:
    make_bad_file(tmp_path, "text")
    _, rejected = verify_rows(listed(tmp_path))
    with pytest.raises(DataError, match="1 of 1 files cannot be used"):
        check_rejected(rejected, num_total=1, max_rejected=1.0)


# Segments ---------------------------------------------------------------------------------------------------------


def test_long_files_are_cut_into_equal_segments_that_cover_them(tmp_path: Path) -> None:
    lengths = {"a": 16_000, "b": 16_001, "c": 50_003, "d": 400}
    for name, length in lengths.items():
        add_audio(tmp_path / f"{name}.wav", length)
    rows = verified(tmp_path)
    cut = cut_segments(rows, 1.0).collect()
    assert cut.schema == SCHEMA
    check_unique(cut)
    whole = {ref.fileid: read_waveform(ref) for ref in audio_refs(rows)}
    for name, length in lengths.items():
        parts = cut.filter(pl.col("path") == str(tmp_path / f"{name}.wav"))
        sizes = parts["num_samples"].to_numpy()
        assert sizes.sum() == length
        assert sizes.max() <= 16_000
        assert np.ptp(sizes) <= 1
        assert len(sizes) == -(-length // 16_000)
        assert torch.equal(torch.cat([read_waveform(ref) for ref in audio_refs(parts)]), whole[name])
    assert cut["fileid"].to_list()[:3] == ["a", "b#0-8000", "b#8000-16001"]
    assert cut_segments(rows, None).collect().equals(rows)


def test_cutting_segments_again_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    add_audio(tmp_path / "a.wav", 32_000)
    once = cut_segments(verified(tmp_path), 1.0)
    again = cut_segments(once, 0.5).collect()
    assert again["fileid"].to_list() == ["a#0-8000", "a#8000-16000", "a#16000-24000", "a#24000-32000"]
    assert again["offset"].to_list() == [0, 8_000, 16_000, 24_000]
    assert verify_rows(again)[0].equals(again)
