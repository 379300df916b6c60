"""Alignments (tables, item files, TextGrids), phones at frames, and the quality of units against slow oracles."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from hubert.core.errors import DataError
from hubert.core.hashing import digest, file_digest
from hubert.core.paths import PROJECT
from hubert.data.demo.speech import PHONES as DEMO_PHONES
from hubert.data.phones import NOISES, SILENCES
from hubert.data.schema import SCHEMA, cut_segments
from hubert.evaluation.quality.alignments import Alignments, read_alignments
from hubert.evaluation.quality.phones import PhoneCounter, PhoneInventory, PhoneStatistics
from hubert.evaluation.quality.stage import QualityStage
from hubert.evaluation.quality.textgrid import read_textgrid
from hubert.features.source import FeatureSource
from hubert.model.hubert import HuBERT
from hubert.report.facts.phone_order import order_phones
from hubert.settings.model import ModelConfig, conv_stack
from hubert.settings.sections import FeatureSettings, QualitySettings
from hubert.units.codebook import Codebook
from hubert.units.statistics import UnitStatistics, entropy
from tools.given_stages import codebook_in, manifest_in

SPEECH = PROJECT.parent / "shared" / "data" / "librispeech-mini"


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


def count_phones(units: dict[str, list[int]], alignments: Alignments, *, num_units: int, frame_rate: int) -> dict:
    """The figures of the units of some files, beside their phones."""
    counter = PhoneCounter(alignments, num_units=num_units, frame_rate=frame_rate)
    for fileid, values in units.items():
        counter.update(fileid, values)
    return counter.statistics.figures()


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


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 3_000), st.sampled_from(["AA1", "sil", "T", None])), min_size=2, max_size=12),
    st.sampled_from([50, 100]),
)
def test_the_same_phones_in_all_formats_are_at_the_same_frames(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, str | None]], frame_rate: int
) -> None:
    """Times in whole tenths of a millisecond; the oracle is exact: 1.6 samples each. `None` is a gap."""
    edges = np.cumsum([0, *(length for length, _ in spans)]).tolist()
    spoken = [(a, b, phone) for (a, b), (_, phone) in zip(pairwise(edges), spans, strict=True) if phone]
    if not spoken:
        return
    folder = tmp_path_factory.mktemp("formats")
    times = [(f"{a / 10_000:.4f}", f"{b / 10_000:.4f}", phone) for a, b, phone in spoken]
    (folder / "a.csv").write_text("fileid,start,end,phone\n" + "".join(f"u,{a},{b},{p}\n" for a, b, p in times))
    header = "#file onset offset #phone prev-phone next-phone speaker\n"
    (folder / "a.item").write_text(header + "".join(f"u {a} {b} {p} X X s\n" for a, b, p in times))
    intervals = "".join(f'{a}\n{b}\n"{p}"\n' for a, b, p in times)
    (folder / "grids").mkdir()
    (folder / "grids" / "u.TextGrid").write_text(
        'File type = "ooTextFile"\nObject class = "TextGrid"\n\n'
        f'0\n9\n<exists>\n1\n"IntervalTier"\n"phones"\n0\n9\n{len(times)}\n{intervals}'
    )
    num_frames = edges[-1] * 16 // 10 // (16_000 // frame_rate) + 3
    centres = [200 + frame * (16_000 // frame_rate) for frame in range(num_frames)]
    expected = [next((p for a, b, p in spoken if 16 * a <= 10 * centre < 16 * b), None) for centre in centres]
    for name in ("a.csv", "a.item", "grids"):
        alignments = read_alignments(folder / name, ["u"])
        found = alignments.phones_at_frames("u", num_frames, frame_rate)
        assert [alignments.phones[index] if index >= 0 else None for index in found] == expected


def test_ends_that_were_rounded_on_their_own_may_overlap_and_the_later_phone_wins(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("fileid,start,end,phone\nu,0,0.0130,A\nu,0.0122,0.05,B\n")
    alignments = read_alignments(tmp_path / "a.csv")
    assert [alignments.phones[index] for index in alignments.phones_at_frames("u", 2, 50)] == [
        "B",
        "B",
    ]  # 12.5, 32.5 ms
    (tmp_path / "a.csv").write_text("fileid,start,end,phone\nu,0,0.0141,A\nu,0.0122,0.05,B\n")
    with pytest.raises(DataError, match="1 phones start before"):
        read_alignments(tmp_path / "a.csv")


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
    names = [phone for phone, _ in pairs]
    used = Counter(unit for _, unit in pairs)
    statistics = UnitStatistics(7)
    for file in units.values():
        statistics.update(file)
    usage = statistics.figures()
    assert usage["num_frames"] == len(pairs)
    assert usage["num_unused_units"] == sum(unit not in used for unit in range(7))
    assert usage["majority_share"] == max(used.values()) / len(pairs)
    probabilities = [count / len(pairs) for count in used.values()]
    assert usage["unigram_entropy"] == pytest.approx(-sum(p * math.log(p) for p in probabilities), abs=1e-12)
    assert usage["usage_perplexity"] == pytest.approx(math.prod(p**-p for p in probabilities))
    runs = sum(1 + sum(a != b for a, b in pairwise(file)) for file in units.values())
    assert usage["mean_run_length"] == len(pairs) / runs
    if len(set(names)) == 1:
        with pytest.raises(DataError, match="at least two phones"):
            count_phones(units, align_frames(phones), num_units=7, frame_rate=50)
        return
    figures = count_phones(units, align_frames(phones), num_units=7, frame_rate=50)
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


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["A", "B", "C", "-"]), st.integers(0, 5)), min_size=1, max_size=50),
        min_size=1,
        max_size=4,
    )
)
def test_figures_equal_those_of_scikit_learn_and_scipy(files: list[list[tuple[str, int]]]) -> None:
    """Frames without a phone (`-`, a gap of the alignment) count nowhere but in the units' lengths."""
    pairs = [pair for file in files for pair in file if pair[0] != "-"]
    names, values = [phone for phone, _ in pairs], [unit for _, unit in pairs]
    rows = [
        (f"f{number}", (40 + 320 * frame) / 16_000, (360 + 320 * frame) / 16_000, phone)
        for number, file in enumerate(files)
        for frame, (phone, _) in enumerate(file)
        if phone != "-"
    ]
    if len(set(names)) < 2:
        return
    aligned = {f"f{n}": [unit for _, unit in file] for n, file in enumerate(files) if {p for p, _ in file} != {"-"}}
    figures = count_phones(aligned, align(rows), num_units=6, frame_rate=50)
    table = contingency_matrix(names, values)
    information = mutual_info_score(names, values)
    phones, units = scipy_entropy(table.sum(1)), scipy_entropy(table.sum(0))
    expected = {
        "phone_purity": table.max(0).sum() / table.sum(),
        "cluster_purity": table.max(1).sum() / table.sum(),
        "mutual_information": information,
        "pnmi": information / phones,
        "unit_nmi": information / units if units > 0 else 0.0,
        "phone_entropy": phones,
        "unit_entropy": units,
        "phone_entropy_given_unit": sum(scipy_entropy(column) * column.sum() for column in table.T) / table.sum(),
        "unit_entropy_given_phone": sum(scipy_entropy(row) * row.sum() for row in table) / table.sum(),
        "num_aligned_frames": len(pairs),
        "num_unaligned_frames": sum(map(len, aligned.values())) - len(pairs),
        "mean_phone_length": len(pairs)
        / sum(1 for file in files for phone, _ in groupby(p for p, _ in file) if phone != "-"),
        "mean_unit_length": sum(map(len, aligned.values()))
        / sum(len(list(groupby(units))) for units in aligned.values()),
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-9)


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


def test_silence_is_one_phone_and_only_arpabet_loses_its_stress() -> None:
    """Tones (`a4`) and X-SAMPA vowels keep their digits: they are not stress."""
    labels = ["", "SIL", "_:", "spn", "AH0", "AH1", "AH", "a4"]
    inventory = PhoneInventory(labels)
    assert inventory.phones == ("AH", "SIL", "a4", "spn")
    assert inventory(np.array([4, 5, 6, -1, 7, 0, 1, 2, 3], np.int32)).tolist() == [0, 0, 0, -1, 2, 1, 1, 1, 3]


def test_what_counts_as_silence_is_drawn_as_silence_and_so_is_noise() -> None:
    """PNMI and the phone-by-unit picture agree on every spelling, in any case."""
    spellings = sorted({case for name in SILENCES for case in (name, name.upper(), f" {name} ")})
    assert PhoneInventory(spellings).phones == ("SIL",)
    assert len(PhoneInventory(sorted(NOISES)).phones) == len(NOISES)
    assert dict(order_phones([*spellings, *sorted(NOISES)])).keys() == {"silence"}


def test_the_demo_calls_silence_what_everything_else_calls_silence() -> None:
    """The engine's mnemonics for silence, and the label that the demo's alignments have for them."""
    silences = {mnemonic for mnemonic, label in DEMO_PHONES.items() if label == "SIL"}
    assert silences == {"_", "_:", "_|"} <= SILENCES
    assert not {label.lower() for label in DEMO_PHONES.values() if label != "SIL"} & (SILENCES | NOISES)


def test_usage_is_counted_file_by_file() -> None:
    statistics = UnitStatistics(4)
    for units in ([0, 0, 1, 1], np.array([1, 3], np.uint16), []):
        statistics.update(units)
    figures = statistics.figures()
    assert statistics.usage.tolist() == [2, 3, 0, 1]
    assert figures["num_files"] == 3
    assert (figures["majority_unit"], figures["majority_share"], figures["num_unused_units"]) == (1, 0.5, 1)
    assert figures["mean_run_length"] == 1.5
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
        UnitStatistics(5).update(units, fileid="u")


def test_alignments_that_outlast_the_units_mean_a_wrong_frame_rate() -> None:
    """Units at 50 Hz that are called 100 Hz end at half of the time."""
    phones = {f"f{i}": ["A", "B"] * 50 for i in range(3)}
    units = {name: [0, 1] * 50 for name in phones}
    good = count_phones(units, align_frames(phones), num_units=2, frame_rate=50)
    assert good["num_overrun_files"] == 0
    with pytest.raises(DataError, match=r"3 of 3 files .* another frame rate"):
        count_phones(units, align_frames(phones), num_units=2, frame_rate=100)


def test_a_segment_is_aligned_by_its_file_and_first_sample() -> None:
    phones = ["A"] * 10 + ["B"] * 10
    whole = PhoneCounter(align_frames({"u": phones}), num_units=2, frame_rate=50)
    whole.update("u", [0] * 10 + [1] * 10)
    parts = PhoneCounter(align_frames({"u": phones}), num_units=2, frame_rate=50)
    parts.update("u", [0] * 10 + [1] * 3, offset=0)
    parts.update("u", [1] * 7, offset=13 * 320)
    assert parts.statistics.joint.tolist() == whole.statistics.joint.tolist() == [[10, 0], [0, 10]]
    assert parts.statistics.num_overrun_files == 0


def test_a_phone_that_comes_again_after_a_gap_is_a_segment_of_its_own() -> None:
    statistics = PhoneStatistics(("A", "B"), 3)
    statistics.update(np.array([0, 0, -1, 0, -1, -1, 0, 1, 1, 1], np.int32), [2, 2, 2, 2, 2, 2, 2, 1, 1, 0])
    figures = statistics.figures()
    assert figures["mean_phone_length"] == 7 / 4
    assert figures["mean_unit_length"] == 10 / 3
    assert figures["num_unaligned_frames"] == 3


# The stage ----------------------------------------------------------------------------------------------------------


def build_stage(folder: Path, rows: pl.DataFrame) -> QualityStage:
    """A stage with a random MFCC codebook and a random teacher."""
    rows.write_parquet(folder / "manifest.parquet")
    config = ModelConfig(conv_layers=conv_stack(8), dim=16, num_layers=1, num_heads=1, ffn_dim=16, pos_conv_kernel=16)
    HuBERT(config).save_pretrained(folder / "teacher")
    teacher = file_digest(folder / "teacher" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    metadata = {"source": FeatureSource().identity, "frame_rate": 100}
    Codebook(20 * torch.randn(6, 39, generator=generator), metadata).save(folder / "codebook.safetensors")
    features = FeatureSettings(max_chunk_seconds=2.0, chunk_context_seconds=0.25)
    return QualityStage(
        parent=folder,
        manifest=manifest_in(folder / "manifest.parquet"),
        alignments=folder / "alignments.csv",
        codebook=codebook_in(folder / "codebook.safetensors", features=features),
        checkpoint={"path": str(folder / "teacher"), "sha256": teacher, "num_layers": 1},
        num_units=4,
        quality=QualitySettings(),
    )


def write_recordings(folder: Path, seconds: list[float]) -> pl.DataFrame:
    """Write noise and an alignment that changes between two phones every 0.3 s; the last file has no alignment."""
    generator = np.random.default_rng(0)
    values, lines = [], ["fileid,start,end,phone", "elsewhere,0,1,A"]
    for number, length in enumerate(seconds):
        path = folder / f"{number}.wav"
        soundfile.write(path, 0.1 * generator.standard_normal(round(length * 16_000)), 16_000)
        num_samples = round(length * 16_000)
        values.append({"fileid": f"s/{number}", "path": str(path), "num_samples": num_samples})
        starts = np.arange(0, length, 0.3)
        if number < len(seconds) - 1:
            lines += [f"{number},{a:.1f},{min(a + 0.3, length):.1f},{'AB'[i % 2]}" for i, a in enumerate(starts)]
    (folder / "alignments.csv").write_text("\n".join(lines) + "\n")
    return pl.DataFrame(values, schema=SCHEMA)


def test_the_stage_counts_files_without_alignment_and_alignments_without_file(tmp_path: Path) -> None:
    figures = build_stage(tmp_path, write_recordings(tmp_path, [1.0, 3.0, 1.5])).run()
    assert figures["num_unmatched_files"] == 1
    assert (figures["units"]["num_aligned_files"], figures["units"]["num_files_without_alignment"]) == (2, 1)
    assert figures["units"]["num_aligned_frames"] == sum((round(s * 16_000) - 400) // 160 + 1 for s in (1.0, 3.0))
    assert [(row["layer"], row["num_aligned_files"]) for row in figures["layers"]] == [(0, 2), (1, 2)]
    assert figures["layers"][1]["num_aligned_frames"] == sum((round(s * 16_000) - 400) // 320 + 1 for s in (1.0, 3.0))


def test_segments_are_compared_with_the_alignment_of_their_recording(tmp_path: Path) -> None:
    rows = cut_segments(write_recordings(tmp_path, [1.0, 3.1, 1.5]), 0.7).collect()
    stage = build_stage(tmp_path, rows)
    (output,), figures = stage.work({"part": "units"})
    centres = [
        offset + 200 + 160 * frame
        for fileid, offset, length in rows.select("fileid", pl.col("offset").fill_null(0), "num_samples").iter_rows()
        for frame in range((length - 400) // 160 + 1)
        if not fileid.startswith("s/2")
    ]
    phones = Counter("AB"[centre // 4_800 % 2] for centre in centres)
    joint = json.loads(output.read_text())
    assert dict(zip(joint["phones"], np.sum(joint["counts"], axis=1).tolist(), strict=True)) == phones
    assert figures["units"]["num_files_without_alignment"] == sum(name.startswith("s/2") for name in rows["fileid"])


def test_files_beyond_the_hours_that_are_compared_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubert.evaluation.quality.stage.CLUSTERED_SECONDS", 1)
    stage = build_stage(tmp_path, write_recordings(tmp_path, [1.0, 1.0, 1.0, 1.0]))  # three of them are aligned
    stage.quality = QualitySettings(max_hours=2 / 3600)
    figures = stage.run()
    assert (figures["units"]["num_aligned_files"], figures["num_files_beyond_max_hours"]) == (2, 1)
    assert (figures["layers_num_files"], figures["layers_num_aligned_files"]) == (1, 3)
    assert all(row["num_aligned_files"] == 1 for row in figures["layers"])  # MFCC and the layer on the same one


def test_a_long_file_of_which_enough_frames_were_clustered_is_no_wrong_frame_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubert.evaluation.quality.stage.CLUSTERED_SECONDS", 2)
    stage = build_stage(tmp_path, write_recordings(tmp_path, [7.0, 1.0]))
    _, figures = stage.work({"part": "layers"})
    mfcc, layer = figures["layers"]
    assert (mfcc["num_overrun_files"], layer["num_overrun_files"]) == (0, 0)
    assert layer["num_aligned_frames"] < 200  # two chunks of four


TEXTGRID = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n1\n<exists>\n1\n"IntervalTier"\n"phones"\n0\n1\n1\n0\n1\n"A"\n'


def test_a_folder_of_textgrids_that_gets_another_name_makes_another_key(tmp_path: Path) -> None:
    """The name of a folder is part of the fileids, and so of what the alignments are of."""
    stage = build_stage(tmp_path, write_recordings(tmp_path, [1.0, 1.0]))
    grids = tmp_path / "grids"
    (grids / "s1").mkdir(parents=True)
    (grids / "s1" / "u.TextGrid").write_text(TEXTGRID)
    before = replace(stage, alignments=grids).key
    grids.rename(tmp_path / "moved")
    assert replace(stage, alignments=tmp_path / "moved").key == before
    (tmp_path / "moved" / "s1").rename(tmp_path / "moved" / "s2")
    assert replace(stage, alignments=tmp_path / "moved").key != before


def test_the_keys_of_one_file_and_of_a_flat_folder_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """They hashed [name, sha256] of each file in the order of the names."""
    stage = build_stage(tmp_path, write_recordings(tmp_path, [1.0, 1.0]))
    digest_of = file_digest(tmp_path / "alignments.csv")
    assert stage.inputs()["alignments"] == digest([["alignments.csv", digest_of]])
    folder = tmp_path / "grids"
    folder.mkdir()
    for name in ("b.TextGrid", "a.TextGrid"):
        (folder / name).write_text(TEXTGRID)
    same = file_digest(folder / "a.TextGrid")
    flat = replace(stage, alignments=folder)
    assert flat.inputs()["alignments"] == digest([["a.TextGrid", same], ["b.TextGrid", same]])


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
