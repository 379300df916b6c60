"""Alignments (tables, item files, TextGrids), phones at frames, and the quality of units against slow oracles."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from hubert.alignments import Alignments, read_alignments
from hubert.errors import DataError
from hubert.quality import (
    PhoneCounter,
    PhoneInventory,
    PhoneStatistics,
    Silence,
    UnitStatistics,
    entropy,
    heat_map_order,
    unit_quality,
)
from hubert.textgrid import read_textgrid

SPEECH = Path(__file__).parents[2] / "shared" / "data" / "librispeech-mini"


def align(rows: list[tuple[str, float, float, str]]) -> Alignments:
    schema = {"fileid": pl.String, "start": pl.Float64, "end": pl.Float64, "phone": pl.String}
    return Alignments(pl.DataFrame(rows, schema=schema, orient="row"))


def align_frames(phones: dict[str, list[str]], frame_rate: int = 50) -> Alignments:
    """An alignment whose phone at frame j of a file is `phones[fileid][j]`: one row per frame, around its centre."""
    half = 0.5 / frame_rate
    centre = [(200 + j * 16_000 / frame_rate) / 16_000 for j in range(max(map(len, phones.values())))]
    return align(
        [
            (f, max(centre[j] - half, 0), centre[j] + half, phone)
            for f, names in phones.items()
            for j, phone in enumerate(names)
        ]
    )


# Phones at frames ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=20),
    st.lists(st.booleans(), min_size=20, max_size=20),
    st.sampled_from([50, 100]),
    st.integers(0, 60),
    st.sampled_from([0, 160, 333]),
)
def test_a_frame_has_the_phone_at_the_centre_of_its_window(
    lengths_ms: list[int], spoken: list[bool], frame_rate: int, num_frames: int, offset: int
) -> None:
    """The oracle counts in whole units of 1/16 ms, one sample: frame j of hop h is centred at sample offset + 200 + h j."""
    edges = [0, *np.cumsum(lengths_ms).tolist()]
    rows = [("u", a / 1000, b / 1000, f"P{i}") for i, (a, b) in enumerate(pairwise(edges)) if spoken[i]]
    alignments = align([*rows, ("v", 0.0, 1.0, "Q")])
    found = alignments.phones_at_frames("u", num_frames, frame_rate, offset=offset) if rows else np.zeros(0)
    for frame, index in enumerate(found):
        sample = offset + 200 + frame * 16_000 // frame_rate
        expected = [phone for _, start, end, phone in rows if round(start * 16_000) <= sample < round(end * 16_000)]
        assert ([alignments.phones[index]] if index >= 0 else []) == expected


def test_frames_outside_all_phones_have_none() -> None:
    alignments = align([("u", 0.02, 0.04, "A"), ("u", 0.08, 0.1, "B")])
    assert alignments.phones_at_frames("u", 6, 50).tolist() == [
        -1,
        0,
        -1,
        -1,
        1,
        -1,
    ]  # centres 12.5, 32.5, 52.5, ... ms
    assert len(alignments) == 1
    assert "v" not in alignments


# Reading ------------------------------------------------------------------------------------------------------------


def test_tables_are_read_by_their_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('fileid,start,end,phone\n"s 1/é, x",0.1,0.25,AA1\n"s 1/é, x",0,0.1,\n')
    (tmp_path / "a.tsv").write_text('file\tspeaker\tonset\toffset\tphone\tword\r\n1688\t7\t0.000\t0.5\t"\t<sil>\r\n')
    table = read_alignments(tmp_path / "a.csv", ["s 1/é, x"])
    assert table.frame.rows() == [("s 1/é, x", 0.0, 0.1, ""), ("s 1/é, x", 0.1, 0.25, "AA1")]
    assert read_alignments(tmp_path / "a.tsv", ["s/1688"]).frame.rows() == [("s/1688", 0.0, 0.5, '"')]


def test_files_that_the_manifest_lacks_are_counted_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("fileid,start,end,phone\nu1,0,1,A\nu2,0,1,B\nu3,0,1,B\n")
    alignments = read_alignments(tmp_path / "a.csv", ["s/u1", "s/u4"])
    assert (list(alignments.frame["fileid"]), alignments.num_unmatched) == (["s/u1"], 2)
    with pytest.raises(DataError, match=r"none of 3 files is in the manifest, first \['u1'"):
        read_alignments(tmp_path / "a.csv", ["u9"])
    with pytest.raises(DataError, match="'u1' fits 'a/u1' and 'b/u1'"):
        read_alignments(tmp_path / "a.csv", ["b/u1", "a/u1"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "fileid,start,phone\nu,0,A\n", "expected one column of end/offset"),
        ("a.csv", "file,fileid,start,end,phone\nu,u,0,1,A\n", "found \\['fileid', 'file'\\]"),
        ("a.csv", "fileid,start,end,phone\nu,0,x,A\n", "1 of 1 rows"),
        ("a.csv", "fileid,start,end,phone\nu,0.5,0.5,A\n", "0 <= start < end"),
        ("a.csv", "fileid,start,end,phone\nu,0,inf,A\n", "0 <= start < end"),
        ("a.csv", "fileid,start,end,phone\n,0,1,A\n", "a fileid"),
        ("a.csv", "fileid,start,end,phone\n", "no phones"),
        ("a.csv", "", "expected a CSV table"),
        (
            "a.csv",
            "fileid,start,end,phone\nu,0,1,A\nu,0.5,2,B\n",
            "1 phones start before the one before them has ended",
        ),
        ("a.txt", "", "found '.txt'"),
        ("a.TextGrid", "words", "Praat's long or short text format"),
    ],
)
def test_alignments_that_cannot_be_used_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_alignments(tmp_path / name)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv"):
        read_alignments(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a\.TextGrid"):
        read_alignments(tmp_path / "a.TextGrid")
    with pytest.raises(DataError, match="found none"):
        read_alignments(tmp_path)


def test_a_triphone_item_file_is_no_alignment(tmp_path: Path) -> None:
    """Its items overlap: each holds its neighbours."""
    header = "#file onset offset #phone prev-phone next-phone speaker\n"
    (tmp_path / "tri.item").write_text(header + "u 0.1 0.4 B A C s\nu 0.2 0.5 C B D s\n")
    with pytest.raises(DataError, match="triphone item file"):
        read_alignments(tmp_path / "tri.item")
    (tmp_path / "one.item").write_text(header + "u 0.2 0.3 B A C s\nu 0.3 0.4 C B D s\n")
    assert read_alignments(tmp_path / "one.item").frame.rows() == [("u", 0.2, 0.3, "B"), ("u", 0.3, 0.4, "C")]


LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.5
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.5
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 1.5
            text = "say ""3 x"" [2]: 7"
    item [2]:
        class = "TextTier"
        name = "clicks"
        xmin = 0
        xmax = 1.5
        points: size = 1
        points [1]:
            number = 0.7
            mark = "!"
    item [3]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1.5
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = ""
        intervals [2]:
            xmin = 0.5
            xmax = 1.5e0
            text = "ʃ"
"""
SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
1.5
<exists>
2
"IntervalTier"
"Ann - phones"
0
1.5
2
0
0.5
""
0.5
1.5
"ʃ"
"IntervalTier"
"words"
0
1.5
1
0
1.5
"say"
"""


@pytest.mark.parametrize("content", [LONG, SHORT, LONG.replace("\n", "\r\n")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
def test_textgrids_of_both_formats_and_all_encodings_give_the_same_phones(
    tmp_path: Path, content: str, encoding: str
) -> None:
    path = tmp_path / "s1" / "u.1.TextGrid"
    path.parent.mkdir()
    path.write_bytes(content.encode(encoding))
    assert read_textgrid(path) == [(0.0, 0.5, ""), (0.5, 1.5, "ʃ")]
    assert read_alignments(tmp_path, ["s1/u.1"]).frame.rows() == [("s1/u.1", 0.0, 0.5, ""), ("s1/u.1", 0.5, 1.5, "ʃ")]


def test_a_tier_is_chosen_by_name_and_its_absence_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "u.TextGrid"
    path.write_text(LONG)
    assert read_textgrid(path, "words") == [(0.0, 1.5, 'say "3 x" [2]: 7')]
    with pytest.raises(
        DataError, match=r"interval tier 'syllables', found 0 among the interval tiers \['words', 'phones'\]"
    ):
        read_textgrid(path, "syllables")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([LONG, SHORT]), st.integers(0, 600))
def test_a_textgrid_that_was_cut_short_is_never_read_as_whole(
    tmp_path_factory: pytest.TempPathFactory, content: str, length: int
) -> None:
    end = max(content.index('"ʃ"') + 2, content.index('"say') + 4)
    path = tmp_path_factory.mktemp("grid") / "u.TextGrid"
    path.write_text(content[: min(length, end)])
    with pytest.raises(DataError, match=r"u\.TextGrid"):
        read_textgrid(path)


# Quality ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("ABCD"), st.integers(0, 6)), min_size=1, max_size=40), min_size=1, max_size=5
    )
)
def test_figures_equal_slow_definitions(files: list[list[tuple[str, int]]]) -> None:
    """Oracles: loops over frames for the purities and runs, scikit-learn for the information."""
    phones = {f"f{i}": [phone for phone, _ in file] for i, file in enumerate(files)}
    units = {f"f{i}": [unit for _, unit in file] for i, file in enumerate(files)}
    pairs = [pair for file in files for pair in file]
    quality = unit_quality(units, align_frames(phones), num_units=7, frame_rate=50)
    names = [phone for phone, _ in pairs]
    used = Counter(unit for _, unit in pairs)
    usage = quality.usage.figures()
    assert usage["num_frames"] == len(pairs)
    assert usage["num_dead_units"] == sum(unit not in used for unit in range(7))
    assert usage["majority_share"] == max(used.values()) / len(pairs)
    probabilities = [count / len(pairs) for count in used.values()]
    assert usage["unigram_entropy"] == pytest.approx(-sum(p * math.log(p) for p in probabilities), abs=1e-12)
    assert usage["usage_perplexity"] == pytest.approx(math.prod(p**-p for p in probabilities))
    runs = sum(1 + sum(a != b for a, b in pairwise(file)) for file in units.values())
    assert usage["mean_run_length"] == len(pairs) / runs
    if len(set(names)) == 1:
        with pytest.raises(DataError, match="at least two phones"):
            quality.figures()
        return
    figures = quality.figures()
    joint = Counter(pairs)
    assert figures["phone_purity"] == sum(max(joint[p, k] for p in "ABCD") for k in range(7)) / len(pairs)
    assert figures["cluster_purity"] == sum(max(joint[p, k] for k in range(7)) for p in "ABCD") / len(pairs)
    information = mutual_info_score(names, [unit for _, unit in pairs])
    assert figures["mutual_information"] == pytest.approx(information, abs=1e-9)
    assert figures["pnmi"] == pytest.approx(information / mutual_info_score(names, names), abs=1e-9)
    assert figures["mean_phone_length"] == len(pairs) / sum(
        1 + sum(a != b for a, b in pairwise(file)) for file in phones.values()
    )
    # fairseq adds 1e-8 in the logarithms
    p_xy = np.array([[joint[p, k] for k in range(7)] for p in "ABCD"]) / len(pairs)
    p_x, p_y = p_xy.sum(1, keepdims=True), p_xy.sum(0, keepdims=True)
    inside = p_xy > 0
    theirs = (p_xy[inside] * np.log((p_xy / np.where(p_x * p_y > 0, p_x * p_y, 1))[inside] + 1e-8)).sum() / -(
        p_x * np.log(p_x + 1e-8)
    ).sum()
    assert figures["pnmi"] == pytest.approx(theirs, abs=1e-5)


def test_units_that_are_the_phones_are_perfect_and_random_units_know_nothing() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, 200_000)
    statistics = PhoneStatistics(tuple(f"P{i}" for i in range(20)), 20)
    statistics.update(labels.astype(np.int32), 19 - labels)
    figures = statistics.figures()
    assert (figures["phone_purity"], figures["cluster_purity"]) == (1, 1)
    assert figures["pnmi"] == pytest.approx(1, abs=1e-12)
    assert figures["phone_entropy"] == pytest.approx(math.log(20), abs=1e-3)
    chance = PhoneStatistics(tuple(f"P{i}" for i in range(20)), 20)
    chance.update(labels.astype(np.int32), rng.integers(0, 20, 200_000))
    assert 0 <= chance.figures()["pnmi"] < 0.001  # expected bias: 19 x 19 / (2 x 200,000) / ln 20 = 0.0003
    assert chance.figures()["phone_purity"] < 0.07


def test_statistics_of_shards_merge_to_those_of_the_whole() -> None:
    rng = np.random.default_rng(1)
    phones = {f"f{i}": rng.choice(["A", "B", "", "spn"], 30).tolist() for i in range(6)}
    units = {name: rng.integers(0, 5, 30 + 2 * index) for index, name in enumerate(phones)} | {
        "other": rng.integers(0, 5, 9)
    }
    alignments = align_frames(phones)
    whole = unit_quality(units, alignments, num_units=5, frame_rate=50, silence="exclude")
    usage, joint = None, None
    for names in (["f0", "f1", "other"], ["f2"], ["f3", "f4", "f5"]):
        shard = unit_quality(
            ((name, units[name]) for name in names), alignments, num_units=5, frame_rate=50, silence="exclude"
        )
        assert shard.phones is not None
        stored = UnitStatistics(**json.loads(json.dumps(shard.usage.to_dict())))
        stored_joint = PhoneStatistics(**json.loads(json.dumps(shard.phones.to_dict())))
        if usage is None or joint is None:
            usage, joint = stored, stored_joint
        else:
            usage.merge(stored)
            joint.merge(stored_joint)
    assert usage is not None
    assert joint is not None
    assert whole.phones is not None
    assert usage.figures() == whole.usage.figures()
    assert joint.figures() == whole.phones.figures()
    assert joint.num_files_without_alignment == 1
    assert joint.num_unaligned_frames == sum(2 * index for index in range(6))
    assert joint.num_excluded_frames + joint.joint.sum() == 6 * 30
    with pytest.raises(DataError, match="two codebooks"):
        usage.merge(UnitStatistics(6))
    with pytest.raises(DataError, match="same alignments"):
        joint.merge(PhoneStatistics(("A",), 5))


@pytest.mark.parametrize(
    ("silence", "phones"),
    [
        ("merge", ("AH", "SIL", "a4", "spn")),
        ("keep", ("", "AH", "SIL", "a4", "sp", "spn")),
        ("exclude", ("AH", "a4")),
    ],
)
def test_silence_is_one_phone_unless_asked_otherwise_and_only_arpabet_loses_its_stress(
    silence: Silence, phones: tuple[str, ...]
) -> None:
    """Tones (`a4`) and X-SAMPA vowels keep their digits: they are not stress."""
    labels = ["", "SIL", "sp", "spn", "AH0", "AH1", "AH", "a4"]
    inventory = PhoneInventory(labels, silence)
    assert inventory.phones == phones
    numbers = inventory(np.array([4, 5, 6, -1, 7, 0, 3], np.int32)).tolist()
    assert numbers[:3] == [phones.index("AH")] * 3
    assert (numbers[3], numbers[4]) == (-1, phones.index("a4"))
    assert (numbers[5], numbers[6]) == {"merge": (1, 3), "keep": (0, 5), "exclude": (-2, -2)}[silence]


def test_units_without_alignments_still_have_usage_figures() -> None:
    quality = unit_quality(
        [("a", [0, 0, 1, 1]), ("b", np.array([1, 3], np.uint16)), ("c", [])], num_units=4, frame_rate=100
    )
    figures = quality.figures()
    assert quality.usage.usage.tolist() == [2, 3, 0, 1]
    assert figures["num_files"] == 3
    assert (figures["majority_unit"], figures["majority_share"], figures["num_dead_units"]) == (1, 0.5, 1)
    assert (figures["mean_run_length"], figures["mean_run_seconds"]) == (1.5, 0.015)
    assert "pnmi" not in figures
    json.dumps(figures)


def test_no_units_at_all_have_figures_too() -> None:
    figures = UnitStatistics(3).figures()
    assert (
        figures["num_frames"],
        figures["unigram_entropy"],
        figures["majority_share"],
        figures["mean_run_length"],
    ) == (0, 0, 0, 0)
    assert entropy(np.zeros((2, 2), np.int64)) == 0


@pytest.mark.parametrize(
    ("units", "message"),
    [([0, 5], "found 5 at frame 1"), ([-1], "found -1"), ([0.5], "float64"), ([[1]], "shape \\(1, 1\\)")],
)
def test_units_out_of_range_are_named(units: list[float], message: str) -> None:
    with pytest.raises(DataError, match=f"'u'.*{message}"):
        unit_quality({"u": units}, num_units=5, frame_rate=50)


def test_alignments_that_outlast_the_units_mean_a_wrong_frame_rate() -> None:
    """Units at 50 Hz that are called 100 Hz end at half of the time."""
    phones = {f"f{i}": ["A", "B"] * 50 for i in range(3)}
    units = {name: [0, 1] * 50 for name in phones}
    good = unit_quality(units, align_frames(phones), num_units=2, frame_rate=50)
    assert good.figures()["num_overrun_files"] == 0
    with pytest.raises(DataError, match=r"3 of 3 files .* another frame rate"):
        unit_quality(units, align_frames(phones), num_units=2, frame_rate=100).figures()


def test_a_segment_is_aligned_by_its_file_and_first_sample() -> None:
    phones = ["A"] * 10 + ["B"] * 10
    whole = PhoneCounter(align_frames({"u": phones}), num_units=2, frame_rate=50)
    whole.update("u", [0] * 10 + [1] * 10)
    parts = PhoneCounter(align_frames({"u": phones}), num_units=2, frame_rate=50)
    parts.update("u", [0] * 10 + [1] * 3, offset=0)
    parts.update("u", [1] * 7, offset=13 * 320)
    assert parts.statistics.joint.tolist() == whole.statistics.joint.tolist() == [[10, 0], [0, 10]]
    assert parts.statistics.num_overrun_files == 0


def test_the_heat_map_is_ordered_along_a_diagonal() -> None:
    joint = np.array([[0, 5, 0, 1], [9, 0, 0, 20]])
    phones, units = heat_map_order(joint)
    assert phones.tolist() == [1, 0]
    assert units.tolist() == [0, 3, 1, 2]


# Real speech --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SPEECH.is_dir(), reason="needs ../shared/data/librispeech-mini")
def test_real_alignments_agree_between_the_table_and_the_item_file() -> None:
    fileids = [f"{path.parent.name}/{path.stem}" for path in (SPEECH / "abx").rglob("*.flac")]
    table = read_alignments(SPEECH / "phones.tsv", fileids)
    items = read_alignments(SPEECH / "phoneme-abx.item", fileids)
    assert (len(table), table.num_unmatched) == (50, 0)
    same = total = 0
    for fileid in fileids:
        num_frames = int(table.end_seconds(fileid) * 50)
        ours, theirs = (one.phones_at_frames(fileid, num_frames, 50) for one in (table, items))
        both = theirs >= 0
        total += int(both.sum())
        same += sum(table.phones[a] == items.phones[b] for a, b in zip(ours[both], theirs[both], strict=True))
    assert total > 10_000
    assert same == total
