"""Long files: cut so that memory is bounded, no frame is lost or moved, and short files notice nothing."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hubert.core.errors import DataError
from hubert.core.frames import SAMPLE_RATE, num_frames, num_units_of
from hubert.core.hashing import file_digest
from hubert.core.stage import Stage
from hubert.data.audio import read_spans, read_waveform
from hubert.data.audio_file import AudioRef
from hubert.data.schema import SCHEMA
from hubert.evaluation.abx.features import FeatureFolder
from hubert.evaluation.abx.stage import ABXStage
from hubert.evaluation.layer_features import every_representation
from hubert.evaluation.quality.stage import QualityStage
from hubert.features.chunks import ChunkRule, cut
from hubert.features.extract import FeatureExtractor, extract
from hubert.features.frames_file import FrameWriter
from hubert.features.mfcc import mfcc
from hubert.features.source import FeatureSource
from hubert.features.stage import FeaturesStage
from hubert.model.hubert import HuBERT
from hubert.settings.model import ModelConfig, conv_stack
from hubert.settings.sections import ABXSettings, FeatureSettings, KMeansSettings, QualitySettings, UnitSettings
from hubert.training.crops import labels_for_crop, last_start
from hubert.units.assign import UnitsStage, label
from hubert.units.codebook import Codebook
from hubert.units.kmeans import KMeansStage
from tools.given_stages import codebook_in, frames_in, manifest_in

SMALL = ModelConfig(conv_layers=conv_stack(16), dim=32, num_layers=2, num_heads=2, ffn_dim=64, pos_conv_kernel=16)
GOLDEN_KEYS = {
    "features": "51c6b96aef8141c6",
    "units": "42ccce93f269636a",
    "abx": "b7da189f54b89716",
    "quality": "d7b1d56b42bb986f",
}
GOLDEN_SHARDS = ["ede7365b7e59e52d", "1a96d60e4f9a4b33"]
LARGE = SMALL.model_copy(update={"extractor_norm": "layer", "layer_norm_first": True, "normalize_waveform": True})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products of several threads round by the number of rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_speech(num_samples: int, seed: int = 0) -> np.ndarray:
    """Noise that gets louder and quieter, around a tone that glides."""
    generator = np.random.default_rng(seed)
    time = np.arange(num_samples) / SAMPLE_RATE
    loudness = 0.05 + 0.2 * np.abs(np.sin(time / 3))
    tone = np.sin(np.cumsum(0.05 + 0.04 * np.sin(time * 2)))
    return (loudness * (0.5 * tone + 0.2 * generator.standard_normal(num_samples))).astype(np.float32)


def write_audio(folder: Path, lengths: list[int], suffix: str = "wav") -> pl.DataFrame:
    """Write one file per length and return their manifest."""
    values = []
    for number, length in enumerate(lengths):
        path = folder / f"{number}.{suffix}"
        soundfile.write(path, make_speech(length, number), SAMPLE_RATE)
        values.append({"fileid": f"s/{number}", "path": str(path), "num_samples": length})
    return pl.DataFrame(values, schema=SCHEMA)


def ref_of(rows: pl.DataFrame, number: int = 0) -> AudioRef:
    return AudioRef(rows["fileid"][number], rows["path"][number], rows["num_samples"][number])


def save_teacher(folder: Path, config: ModelConfig, *, layer: int = 2, before_residual: bool = False) -> FeatureSource:
    torch.manual_seed(0)
    HuBERT(config).save_pretrained(folder / "teacher")
    return FeatureSource(
        str(folder / "teacher"), file_digest(folder / "teacher" / "model.safetensors"), layer, before_residual
    )


class Windows(torch.nn.Module):
    """A teacher whose frames are the very samples that they look at: (B, F, 400), so that a shift of one sample shows."""

    def __init__(self, config: ModelConfig = SMALL) -> None:
        super().__init__()
        self.config = config
        self.shapes: list[tuple[int, ...]] = []

    def get_intermediate_outputs(self, waveforms: torch.Tensor, **_: object) -> list[torch.Tensor]:
        self.shapes.append(tuple(waveforms.shape))
        return [waveforms.unfold(1, 400, 320)]


def replace_teacher(extractor: FeatureExtractor, teacher: torch.nn.Module) -> FeatureExtractor:
    vars(extractor)["_teacher"] = teacher
    return extractor


# Frames ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(400, 60_000)
    | st.integers(1, 180).map(lambda k: 320 * k + 80)
    | st.integers(2, 180).map(lambda k: 320 * k),
    st.integers(-2, 2),
    st.integers(4_000, 20_000),
    st.integers(0, 4),
    st.sampled_from([320, 160]),
)
def test_chunks_keep_each_frame_once_at_its_place(
    length: int, shift: int, longest: int, context: int, hop: int
) -> None:
    num_samples = max(length + shift, 400)
    chunks = cut(num_samples, hop=hop, max_samples=longest, context=context)
    kept = [frame for chunk in chunks for frame in range(chunk.first_frame, chunk.first_frame + chunk.num_frames)]
    total = (num_samples - 400) // hop + 1
    assert kept == list(range(total))
    for chunk in chunks:
        assert chunk.num_samples <= longest
        assert chunk.start + chunk.num_samples <= num_samples
        assert chunk.start + hop * chunk.skip == hop * chunk.first_frame
        inside = (chunk.num_samples - 400) // hop + 1
        assert chunk.skip == min(context, chunk.first_frame)
        behind = inside - chunk.skip - chunk.num_frames
        assert behind == min(context, total - chunk.first_frame - chunk.num_frames)
    sizes = [chunk.num_frames for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1
    assert num_samples > longest or len(chunks) == 1


def test_a_context_that_fills_the_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="no frames beside a context"):
        cut(100_000, hop=320, max_samples=4_000, context=6)
    with pytest.raises(ValueError, match=r"max_chunk_seconds \(7\.0\).*four times chunk_context_seconds \(2\.0\)"):
        FeatureSettings(max_chunk_seconds=7.0)


@pytest.mark.parametrize("length", [32_001, 79_999, 80_000, 80_079, 80_080, 80_399, 80_400, 131_313])
def test_a_frame_of_a_chunked_file_looks_at_the_samples_that_it_always_looks_at(tmp_path: Path, length: int) -> None:
    rows = write_audio(tmp_path, [length])
    extractor = replace_teacher(FeatureExtractor(FeatureSource("x", "x", 1), ChunkRule(2.0, 0.25)), Windows())
    (pieces, starts) = ([], [])
    for piece in extract(rows, extractor, batch_seconds=100, resample=False):
        starts.append(piece.start)
        pieces.append(piece.features)
    assert starts == np.cumsum([0, *map(len, pieces[:-1])]).tolist()
    assert len(pieces) > 1
    assert torch.equal(torch.cat(pieces), read_waveform(ref_of(rows)).unfold(0, 400, 320))


def test_the_convolutions_of_chunks_equal_those_of_the_whole_file(tmp_path: Path) -> None:
    """With layer norm nothing in them looks further than a frame; the first layer's frames already see the whole chunk."""
    rows = write_audio(tmp_path, [100_123])
    torch.manual_seed(0)
    model = HuBERT(LARGE.model_copy(update={"normalize_waveform": False})).eval()

    class Convolutions(torch.nn.Module):
        config = model.config

        def get_intermediate_outputs(self, waveforms: torch.Tensor, **_: object) -> list[torch.Tensor]:
            return [model.extract(waveforms)[0]]

    extractor = replace_teacher(FeatureExtractor(FeatureSource("x", "x", 1), ChunkRule(2.0, 0.25)), Convolutions())
    chunked = torch.cat([part for _, part in extractor.long_file(ref_of(rows), resample=False)])
    (whole,) = extractor([read_waveform(ref_of(rows))])
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [SMALL, LARGE])
def test_layers_of_a_chunked_file_are_those_of_its_chunks_and_lie_near_those_of_the_whole(
    tmp_path: Path, config: ModelConfig
) -> None:
    """The large kind is normalised over the whole file, as in fairseq: over a quiet chunk it would be amplified."""
    rows = write_audio(tmp_path, [160_000])
    source = save_teacher(tmp_path, config)
    rule = ChunkRule(4.0, 0.5)
    chunked = torch.cat([part for _, part in FeatureExtractor(source, rule).long_file(ref_of(rows), resample=False)])
    waveform = read_waveform(ref_of(rows))
    (whole,) = FeatureExtractor(source)([waveform])
    assert chunked.shape == whole.shape == (num_frames(160_000), 32)

    plain = HuBERT.from_pretrained(source.checkpoint)
    if config.normalize_waveform:
        waveform = torch.nn.functional.layer_norm(waveform, waveform.shape)
        plain.config = plain.config.model_copy(update={"normalize_waveform": False})
    expected = []
    for chunk in rule.chunks(160_000):
        part = waveform[chunk.start : chunk.start + chunk.num_samples]
        with torch.inference_mode():
            layer = plain.get_intermediate_outputs(part[None], before_residual=False)[1][0]
        expected.append(layer[chunk.skip : chunk.skip + chunk.num_frames])
    torch.testing.assert_close(chunked, torch.cat(expected), rtol=1e-4, atol=1e-5)
    similar = torch.nn.functional.cosine_similarity(chunked, whole, dim=1)
    moved = torch.nn.functional.cosine_similarity(chunked[1:], whole[:-1], dim=1)
    assert similar.mean() > 0.9
    assert similar[1:].mean() > moved.mean()


# MFCC -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [800_000, 500_399, 500_400, 480_001])
def test_mfccs_in_chunks_equal_those_of_the_whole_file_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr("hubert.features.extract.MFCC_CHUNK", 160_000)
    rows = write_audio(tmp_path, [length], "flac")
    pieces = [part for _, part in FeatureExtractor(FeatureSource()).long_file(ref_of(rows), resample=False)]
    assert len(pieces) > 2
    assert torch.equal(torch.cat(pieces), mfcc(read_waveform(ref_of(rows))))


@settings(deadline=None, max_examples=20)
@given(st.integers(4_000, 40_000), st.integers(2_000, 6_000))
def test_mfccs_in_tiny_chunks_equal_those_of_the_whole_exactly(length: int, longest: int) -> None:
    waveform = torch.from_numpy(make_speech(length))
    parts = []
    for chunk in cut(length, hop=160, max_samples=longest, context=4):
        part = mfcc(waveform[chunk.start : chunk.start + chunk.num_samples])
        parts.append(part[chunk.skip : chunk.skip + chunk.num_frames])
    assert torch.equal(torch.cat(parts), mfcc(waveform))


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "rate"), [("wav", 16_000), ("flac", 16_000), ("ogg", 16_000), ("wav", 44_100), ("mp3", 22_050)]
)
def test_overlapping_spans_equal_crops_and_the_file_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, rate: int
) -> None:
    monkeypatch.setattr("hubert.data.audio.BLOCK_SAMPLES", 10_000)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, make_speech(5 * rate), rate)
    ref = AudioRef("a", str(path), 80_000)
    decoded = 0
    plain_read = soundfile.SoundFile.read

    def read(self: soundfile.SoundFile, *args, **options) -> np.ndarray:
        nonlocal decoded
        frames = plain_read(self, *args, **options)
        decoded += len(frames)
        return frames

    spans = [(0, 16_000), (14_080, 17_000), (30_080, 20_001), (48_000, 32_000)]
    whole = read_waveform(ref, resample=True)
    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    for (start, count), waveform in zip(spans, read_spans(ref, spans, resample=True), strict=True):
        torch.testing.assert_close(waveform, whole[start : start + count], rtol=0, atol=0 if rate == 16_000 else 1e-6)
    assert decoded <= 5 * rate


def test_spans_of_a_segment_count_from_its_start_and_never_go_back(tmp_path: Path) -> None:
    ref = ref_of(write_audio(tmp_path, [40_000], "flac"))
    whole = read_waveform(ref)
    segment = ref._replace(offset=10_000, num_samples=20_000)
    spans = [(500, 5_000), (5_000, 15_000)]
    for (start, count), waveform in zip(spans, read_spans(segment, spans), strict=True):
        assert torch.equal(waveform, whole[10_000 + start : 10_000 + start + count])
    for wrong in ([(5_000, 5_000), (4_000, 8_000)], [(0, 5_000), (1_000, 3_000)], [(19_000, 1_001)], [(0, 0)]):
        with pytest.raises(ValueError, match="span"):
            list(read_spans(segment, wrong))


# Extraction -----------------------------------------------------------------------------------------------------------


def test_the_teacher_never_gets_more_than_a_chunk_or_a_batch(tmp_path: Path) -> None:
    rows = write_audio(tmp_path, [400, 30_000, 16_000, 48_000, 48_001, 640_000, 20_000])
    teacher = Windows()
    extractor = replace_teacher(FeatureExtractor(FeatureSource("x", "x", 1), ChunkRule(3.0, 0.5)), teacher)
    frames = dict.fromkeys(range(len(rows)), 0)
    for piece in extract(rows, extractor, batch_seconds=4.0, resample=False):
        assert piece.start == frames[piece.row]
        frames[piece.row] += len(piece.features)
    assert list(frames.values()) == [num_frames(length) for length in rows["num_samples"]]
    assert max(batch * samples for batch, samples in teacher.shapes) <= 4 * SAMPLE_RATE
    assert max(samples for _, samples in teacher.shapes) <= 3 * SAMPLE_RATE


def test_the_next_batch_is_read_while_one_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_audio(tmp_path, [16_000, 17_000, 18_000])
    started = {fileid: threading.Event() for fileid in rows["fileid"]}

    def read(ref: AudioRef, *, resample: bool) -> torch.Tensor:
        started[ref.fileid].set()
        return read_waveform(ref, resample=resample)

    monkeypatch.setattr("hubert.features.extract.read_waveform", read)
    pieces = extract(rows, FeatureExtractor(FeatureSource()), batch_seconds=1.0, resample=False)
    first = next(pieces)
    assert started[rows["fileid"][first.row + 1]].wait(timeout=60)
    pieces.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_a_file_that_cannot_be_read_stops_the_extraction_and_is_named(tmp_path: Path) -> None:
    rows = write_audio(tmp_path, [16_000, 17_000, 18_000])
    Path(rows["path"][1]).unlink()
    found = []
    with pytest.raises(DataError, match="s/1"):
        found.extend(
            piece.row for piece in extract(rows, FeatureExtractor(FeatureSource()), batch_seconds=1.0, resample=False)
        )
    assert found == [0]  # in its place: what was read before is computed


@pytest.mark.parametrize("config", [SMALL, LARGE])
def test_units_do_not_depend_on_what_else_is_in_the_batch(tmp_path: Path, config: ModelConfig) -> None:
    rows = write_audio(tmp_path, [400, 719, 720, 9_000, 31_000, 32_000, 90_000, 70_001])
    extractor = FeatureExtractor(save_teacher(tmp_path, config), ChunkRule(2.0, 0.25))
    single, batched = (
        {
            (piece.row, piece.start): piece.features
            for piece in extract(rows, extractor, batch_seconds=seconds, resample=False)
        }
        for seconds in (0.01, 30.0)
    )
    assert single.keys() == batched.keys()
    for place, features in single.items():
        torch.testing.assert_close(batched[place], features, rtol=1e-4, atol=1e-5)


def test_400_samples_give_one_frame_and_one_unit_and_399_are_refused(tmp_path: Path) -> None:
    source = save_teacher(tmp_path, SMALL)
    rows = write_audio(tmp_path, [400])
    for one in (source, FeatureSource()):
        extractor = FeatureExtractor(one)
        (piece,) = extract(rows, extractor, batch_seconds=1, resample=False)
        codebook = Codebook(torch.randn(5, piece.features.shape[1]), {"source": one.identity, "frame_rate": 50})
        assert len(piece.features) == 1
        assert len(label(rows, extractor, codebook, codebook_key="k", batch_seconds=1, resample=False)["units"][0]) == 1
    with pytest.raises(DataError, match="expected at least 400 samples .* found 399"):
        FeatureExtractor(source)([torch.zeros(399)])


def test_units_of_a_chunked_file_are_as_many_as_the_trainer_expects(tmp_path: Path) -> None:
    rows = write_audio(tmp_path, [100_000, 20_000, 64_321])
    source = save_teacher(tmp_path, SMALL)
    codebook = Codebook(torch.randn(7, 32), {"source": source.identity, "frame_rate": 50})
    whole, chunked = (
        label(rows, FeatureExtractor(source, rule), codebook, codebook_key="k", batch_seconds=4, resample=False)
        for rule in (ChunkRule(100, 2), ChunkRule(2.0, 0.25))
    )
    expected = num_units_of(rows["num_samples"].to_numpy(), 50).tolist()
    assert whole["units"].list.len().to_list() == chunked["units"].list.len().to_list() == expected
    assert whole["units"][1].equals(chunked["units"][1])


def test_every_representation_of_a_long_file_comes_in_pieces_that_fit_together(tmp_path: Path) -> None:
    rows = write_audio(tmp_path, [70_000, 8_000])
    source = save_teacher(tmp_path, SMALL)
    features = FeatureSettings(max_chunk_seconds=2.0, chunk_context_seconds=0.25, batch_seconds=3)
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    for piece in every_representation(rows, source, features, resample=False):
        mine = found.setdefault((piece.layer, piece.row), [])
        assert piece.start == sum(map(len, mine))
        mine.append(piece.features)
    extractor = FeatureExtractor(source, ChunkRule.of(features))
    assert torch.equal(torch.cat(found[0, 0]), mfcc(read_waveform(ref_of(rows))))
    assert torch.equal(
        torch.cat(found[2, 0]), torch.cat([part for _, part in extractor.long_file(ref_of(rows), resample=False)])
    )
    rows.write_parquet(tmp_path / "manifest.parquet")
    scored = {"path": source.checkpoint, "sha256": source.sha256, "num_layers": 2, "step": 1}
    stage = ABXStage(
        parent=tmp_path,
        manifest=manifest_in(tmp_path / "manifest.parquet"),
        item=tmp_path / "x.item",
        checkpoints=[scored],
        abx=ABXSettings(),
        features=features,
    )
    folders = stage._write_representations(rows, source, tmp_path / "abx")
    for layer in range(3):
        stored = FeatureFolder(folders[layer])
        assert list(stored) == rows["fileid"].to_list()
        for row, fileid in enumerate(rows["fileid"]):
            expected = torch.cat(found[layer, row])
            assert torch.equal(stored[fileid], expected if layer == 0 else expected.half())
            assert stored.num_frames(fileid) == len(expected)


def test_the_features_stage_writes_the_frames_in_the_order_of_the_sample(tmp_path: Path) -> None:
    rows = write_audio(tmp_path, [40_000, 9_000, 70_000, 20_000])
    rows.write_parquet(tmp_path / "manifest.parquet")
    source = save_teacher(tmp_path, SMALL)
    features = FeatureSettings(max_chunk_seconds=2.0, chunk_context_seconds=0.25)
    kmeans = KMeansSettings(sample_fraction=1.0)
    stage = FeaturesStage(
        parent=tmp_path,
        manifest=manifest_in(tmp_path / "manifest.parquet"),
        source=source,
        features=features,
        kmeans=kmeans,
    )
    stage.run()
    sample = pl.read_parquet(stage.folder / "sample.parquet")
    extractor = FeatureExtractor(source, ChunkRule.of(features))
    found: dict[int, list[torch.Tensor]] = {}
    for piece in extract(sample, extractor, batch_seconds=120, resample=False):
        found.setdefault(piece.row, []).append(piece.features)
    expected = torch.cat([torch.cat(found[row]) for row in range(len(sample))]).half()
    (shard,) = stage.shards()
    assert torch.equal(load_file(shard)["frames"], expected)


# The frames' file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_that_is_written_in_pieces_has_the_bytes_of_one_that_is_written_at_once(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    frames = torch.randn(50, 7)
    with FrameWriter(tmp_path / "pieces", 50, dtype) as writer:
        for start, end in ((30, 50), (0, 10), (10, 30)):
            writer.write(start, frames[start:end])
    save_file({"frames": frames.to(dtype)}, tmp_path / "whole")
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_file_with_missing_or_surplus_frames_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="expected 50 frames, 10 were written"),
        FrameWriter(tmp_path / "a", 50, torch.float32) as writer,
    ):
        writer.write(0, torch.zeros(10, 3))
    with FrameWriter(tmp_path / "b", 2, torch.float32) as writer:
        writer.write(0, torch.zeros(2, 3))
        for position, frames in ((1, torch.zeros(2, 3)), (0, torch.zeros(1, 4))):
            with pytest.raises(DataError, match="expected frames of dimension 3 within 0 to 2"):
                writer.write(position, frames)


# Keys -----------------------------------------------------------------------------------------------------------------


def make_stages(folder: Path, longest: int, features: FeatureSettings, *, is_mfcc: bool = False) -> dict[str, Stage]:
    """Return stages on a manifest of 32 files up to `longest` samples, none of which is read."""
    names = [f"s/{number}" for number in range(32)]
    columns = {
        "fileid": names,
        "path": [f"/a/{name}.wav" for name in names],
        "num_samples": np.linspace(400, longest, 32).astype(int).tolist(),
        "size": [1] * 32,
        "mtime_ns": [2] * 32,
    }
    manifest, item = manifest_in(folder / "manifest.parquet"), folder / "x.item"
    rows = pl.DataFrame({name: columns.get(name, [None] * 32) for name in SCHEMA}, schema=SCHEMA)
    rows.write_parquet(manifest.file)
    item.write_text("x")
    source = FeatureSource() if is_mfcc else FeatureSource("there", "abc", 2)
    sample = KMeansSettings(sample_fraction=1.0)
    scored = {"sha256": "s"}
    book = codebook_in(folder / "codebook", source, features)
    return {
        stage.name: stage
        for stage in (
            FeaturesStage(parent=folder, manifest=manifest, source=source, features=features, kmeans=sample),
            UnitsStage(parent=folder, manifest=manifest, codebook=book, units=UnitSettings()),
            ABXStage(
                parent=folder,
                manifest=manifest,
                item=item,
                checkpoints=[scored],
                abx=ABXSettings(),
                features=features,
            ),
            QualityStage(
                parent=folder,
                manifest=manifest,
                alignments=item,
                codebook=book,
                checkpoint=scored,
                num_units=50,
                quality=QualitySettings(),
            ),
        )
    }


def keys_of(stages: dict[str, Stage]) -> dict[str, str]:
    return {name: stage.key[:16] for name, stage in stages.items()}


def shards_of(stages: dict[str, Stage]) -> list[str]:
    for stage in stages.values():
        stage.folder.mkdir(exist_ok=True)
    return [spec["digest"][:16] for name in ("features", "units") for spec in stages[name].make_plan()]


def test_keys_and_shards_of_a_corpus_of_short_files_are_what_they_were_before_files_were_cut(tmp_path: Path) -> None:
    """The values come from the version before (commit ce0a79d), where the same stages were built."""
    stages = make_stages(tmp_path, 1_550_400, FeatureSettings())
    assert keys_of(stages) == GOLDEN_KEYS
    assert shards_of(stages) == GOLDEN_SHARDS
    other = make_stages(tmp_path, 1_550_400, FeatureSettings(max_chunk_seconds=98.0, chunk_context_seconds=1.0))
    assert (keys_of(other), shards_of(other)) == (GOLDEN_KEYS, GOLDEN_SHARDS)


def test_the_rule_is_in_the_keys_of_stages_with_long_files_and_not_in_those_of_mfcc(tmp_path: Path) -> None:
    ours, theirs = FeatureSettings(), FeatureSettings(chunk_context_seconds=1.0)
    first, second = (make_stages(tmp_path, 1_600_001, one) for one in (ours, theirs))
    assert not set(keys_of(first).values()) & set(keys_of(second).values())
    assert not set(shards_of(first)) & set(shards_of(second))
    assert first["units"].settings() == {"chunks": {"max_seconds": 100.0, "context_seconds": 2.0}}
    first, second = (make_stages(tmp_path, 1_600_001, one, is_mfcc=True) for one in (ours, theirs))
    for name in ("features", "units"):
        assert (first[name].key, first[name].settings()) == (second[name].key, {})


def test_only_the_shards_that_hold_a_long_file_are_done_again_when_the_rule_changes(tmp_path: Path) -> None:
    shards = []
    for context in (2.0, 1.0):
        one = FeatureSettings(chunk_context_seconds=context, shard_hours=0.05)
        stage = make_stages(tmp_path, 1_610_000, one)["features"]
        stage.folder.mkdir()
        shards.append({spec["digest"] for spec in stage.make_plan()})
    first, second = shards
    assert len(first) > 3
    assert len(first - second) == 1


def test_the_codebook_of_a_layer_says_by_which_rule_long_files_are_cut(tmp_path: Path) -> None:
    save_file({"frames": torch.randn(100, 8)}, tmp_path / "f.safetensors")
    for source, expected in (
        (FeatureSource("there", "abc", 1), {"max_seconds": 30.0, "context_seconds": 1.0}),
        (FeatureSource(), None),
    ):
        kmeans = KMeansSettings(num_units=4, seeding_frames=50)
        features = FeatureSettings(max_chunk_seconds=30.0, chunk_context_seconds=1.0)
        sample = frames_in([tmp_path / "f.safetensors"], source, features, key=source.checkpoint)
        stage = KMeansStage(parent=tmp_path, sample=sample, kmeans=kmeans)
        stage.run()
        assert Codebook.load(stage.path).metadata.get("chunks") == expected


# The trainer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_rate", [50, 100])
def test_a_crop_at_the_end_of_an_hour_has_the_labels_that_lie_nearest(frame_rate: int) -> None:
    length = 3_600 * SAMPLE_RATE + 123
    (count,) = num_units_of(np.array([length]), frame_rate)
    units = (np.arange(count) % 65_536).astype(np.uint16)
    start = int(last_start(np.array([length]), 781, frame_rate)[0])
    hop = SAMPLE_RATE // frame_rate
    for first in (start, start - 77, length // 2):
        labels = labels_for_crop(units, first, 781, frame_rate)
        for frame in (0, 400, 780):
            centre = first + 320 * frame + 200
            nearest = (
                min(range(count - 60_000, count), key=lambda unit: (abs(hop * unit + 200 - centre), unit))
                if (first != length // 2)
                else round((first + 320 * frame) / hop)
            )
            assert labels[frame] == nearest % 65_536


def test_a_crop_deep_inside_an_hour_of_audio_is_read_without_the_rest(tmp_path: Path) -> None:
    """A file with a hole: an hour of silence on paper, a few blocks on disk."""
    path, length = tmp_path / "hour.wav", 3_600 * SAMPLE_RATE
    soundfile.write(path, np.zeros(400, np.int16), SAMPLE_RATE)
    content = bytearray(path.read_bytes()[:44])
    content[4:8], content[40:44] = (36 + 2 * length).to_bytes(4, "little"), (2 * length).to_bytes(4, "little")
    speech = (make_speech(32_000) * 32_767).astype("<i2")
    with path.open("wb") as file:
        file.write(content)
        file.seek(44 + 2 * (length - 40_000))
        file.write(speech.tobytes())
        file.truncate(44 + 2 * length)
    assert path.stat().st_blocks * 512 < 1_000_000
    crop = read_waveform(AudioRef("hour", str(path), length), start=length - 40_000, num_samples=32_000)
    assert torch.equal(crop, torch.from_numpy(speech.astype(np.float32) / 32_768))
