"""Validation: the same questions to every checkpoint, every frame counted once, and the best one by the masked loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hubert.core.errors import DataError
from hubert.core.files import read_json
from hubert.core.hashing import file_digest
from hubert.evaluation.validate import ValidateStage, draw_masks, entropy, micro_batches, score, select
from hubert.model.hubert import HuBERTPretrain
from hubert.settings.sections import TrainSettings, ValidateSettings
from hubert.units.labels import Table
from tests.support.corpus import NUM_UNITS, write_corpus
from tools.given_stages import labels_in

SECONDS = [0.15, 0.3, 1.0, 1.0, 1.5, 2.2, 3.7, 2.0, 2.0]
TRAIN = TrainSettings(
    min_seconds=1.0, max_seconds=2.0, micro_batch_seconds=4.0, batch_seconds=4.0, num_workers=0, precision="fp32"
)
VALIDATION = ValidateSettings()
MODEL = {"conv_layers": [[16, 10, 5], *[[16, 3, 2]] * 4, *[[16, 2, 2]] * 2], "dim": 32, "num_layers": 3, "num_heads": 2} | {
    "ffn_dim": 64, "final_dim": 16, "pos_conv_kernel": 16, "dropout": 0.5, "layerdrop": 0.5
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), SECONDS, frame_rate=100)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def table(folder: Path) -> Table:
    return Table(folder)


def build_model(seed: int) -> HuBERTPretrain:
    torch.manual_seed(seed)
    model = HuBERTPretrain(NUM_UNITS, "tiny", **MODEL)
    torch.nn.init.normal_(model.class_embeddings)
    return model


@torch.no_grad()
def test_scores_are_those_of_plain_loops_over_the_utterances(table):
    """One utterance at a time, the loss from the model's public parts, the first `max_seconds` of each, dropout off."""
    model = build_model(0).train()
    row = score(model, table, VALIDATION, TRAIN).row()
    sums = {True: [0.0, 0, 0], False: [0.0, 0, 0]}
    penalty, frames = 0.0, 0
    targets_masked, predictions_masked = [], []
    for plan in micro_batches(select(table, VALIDATION, TRAIN), 1.0):
        for number, index in enumerate(plan.rows.tolist()):
            import soundfile

            audio, _ = soundfile.read(table.audio_ref(index).path, dtype="float32")
            waveform = torch.from_numpy(audio)[None, : plan.num_samples]
            assert waveform.shape[1] == plan.num_samples
            units = table.units(index)[::2][: plan.num_frames].astype(np.int64)  # 100 Hz to 50 Hz from the first sample
            mask = draw_masks(table, plan, VALIDATION, TRAIN)[number]
            features, _ = model.hubert.extract(waveform)
            x = model.hubert.projection(model.hubert.projection_norm(features))
            x[0, mask] = model.mask_embedding
            x = model.final_projection(model.hubert.transformer(x))[0]
            logits = F.cosine_similarity(x[:, None], model.class_embeddings[None], dim=2) / 0.1
            penalty += float(features.square().mean()) * len(units)
            frames += len(units)
            for frame, (unit, is_masked) in enumerate(zip(units.tolist(), mask.tolist(), strict=True)):
                entry = sums[is_masked]
                entry[0] += float(-torch.log_softmax(logits[frame], 0)[unit])
                entry[1] += int(logits[frame].argmax()) == unit
                entry[2] += 1
                if is_masked:
                    targets_masked.append(unit)
                    predictions_masked.append(int(logits[frame].argmax()))
    for is_masked, loss_name, name in ((True, "validation_loss", "masked"), (False, "unmasked_loss", "unmasked")):
        loss, correct, count = sums[is_masked]
        assert row[loss_name] == pytest.approx(loss / count, rel=1e-4)
        assert row[f"{name}_accuracy"] == pytest.approx(correct / count, abs=2 / count)
    assert row["num_masked_frames"] == sums[True][2]
    assert row["num_frames"] == frames == sums[True][2] + sums[False][2]
    assert row["feature_penalty"] == pytest.approx(penalty / frames, rel=1e-4)
    shares = np.bincount(targets_masked) / len(targets_masked)
    assert row["unigram_entropy"] == pytest.approx(-sum(p * np.log(p) for p in shares if p))
    assert row["majority_accuracy"] == pytest.approx(shares.max())
    shares = np.bincount(predictions_masked) / len(predictions_masked)
    assert row["prediction_perplexity"] == pytest.approx(np.exp(-sum(p * np.log(p) for p in shares if p)), rel=0.02)


def test_the_unigram_entropy_is_the_least_loss_of_a_constant_prediction():
    counts = np.array([5, 0, 3, 2])
    shares = counts / counts.sum()
    assert entropy(counts) == pytest.approx(
        F.cross_entropy(torch.tensor(np.log(shares + 1e-300)), torch.tensor(shares)).item()
    )


def test_masks_do_not_depend_on_the_batch_an_utterance_is_in(table):
    masks = {}
    for seconds in (0.1, 4.0, 100.0):
        for plan in micro_batches(select(table, VALIDATION, TRAIN), seconds):
            for row, mask in zip(plan.rows.tolist(), draw_masks(table, plan, VALIDATION, TRAIN), strict=True):
                assert torch.equal(masks.setdefault(row, mask), mask)
                assert mask.any()
                assert not mask.all()
    assert len(masks) == 8
    assert not torch.equal(masks[7], masks[8])  # equal lengths, other files


def test_batch_sizes_change_no_score(table):
    model = build_model(1)
    row = score(model, table, VALIDATION, TRAIN).row()
    larger = score(model, table, VALIDATION, TRAIN.model_copy(update={"micro_batch_seconds": 50.0})).row()
    assert row == pytest.approx(larger, rel=1e-5)


def test_short_utterances_are_scored_if_a_mask_fits_and_counted_if_not(table):
    """0.15 s are 7 frames, less than one span; 0.3 s are below `min_seconds` and count all the same."""
    selection = select(table, VALIDATION, TRAIN)
    assert sorted(selection.rows.tolist()) == list(range(1, 9))
    assert (selection.num_too_short, selection.num_over_limit) == (1, 0)
    assert selection.frames.tolist() == sorted(
        min(99, (round(seconds * 16_000) - 400) // 320 + 1) for seconds in SECONDS[1:]
    )
    with pytest.raises(DataError, match="none of the 9 validation files has 200 frames"):
        select(table, VALIDATION, TRAIN.model_copy(update={"mask_length": 200}))


def test_more_audio_than_the_limit_is_left_out_by_a_fixed_draw_and_counted(table):
    limited = ValidateSettings(max_hours=5.0 / 3600)
    selection = select(table, limited, TRAIN)
    assert 0 < len(selection.rows) < 8
    assert selection.num_over_limit == 8 - len(selection.rows)
    assert (selection.frames * 0.02).sum() <= 5.0
    assert select(table, limited, TRAIN).rows.tolist() == selection.rows.tolist()
    others = {
        tuple(select(table, ValidateSettings(max_hours=5.0 / 3600, seed=seed), TRAIN).rows.tolist())
        for seed in range(9)
    }
    assert len(others) > 1


def test_a_model_of_another_codebook_is_refused(table):
    model = HuBERTPretrain(NUM_UNITS + 1, "tiny", **MODEL)
    with pytest.raises(DataError, match=r"predicts 13 units, and the table .* was labelled with 12"):
        score(model, table, VALIDATION, TRAIN)


# The stage --------------------------------------------------------------------------------------------------------


def checkpoint(parent: Path, step: int, seed: int) -> dict:
    path = parent / f"step-{step:08d}"
    build_model(seed).save_pretrained(path)
    return {"step": step, "path": str(path), "sha256": file_digest(path / "model.safetensors"), "num_layers": 3}


def stage_of(
    parent: Path, folder: Path, checkpoints: list[dict], validation: ValidateSettings = VALIDATION
) -> ValidateStage:
    labels = labels_in(folder, NUM_UNITS)
    return ValidateStage(parent=parent, labels=labels, checkpoints=checkpoints, train=TRAIN, validation=validation)


def test_the_stage_scores_each_checkpoint_and_chooses_the_lowest_validation_loss(tmp_path, folder, table):
    checkpoints = [checkpoint(tmp_path, step, seed=step) for step in (30, 10, 20)]
    stage = stage_of(tmp_path, folder, checkpoints)
    figures = stage.run()
    assert [row["step"] for row in figures["rows"]] == [10, 20, 30]
    assert figures["best"]["validation_loss"] == min(row["validation_loss"] for row in figures["rows"])
    assert {"step", "path", "sha256", "num_layers"} <= set(figures["best"])
    assert figures["num_too_short"] == 1
    assert len({row["validation_loss"] for row in figures["rows"]}) == 3
    assert len({row["unigram_entropy"] for row in figures["rows"]}) == 1
    assert read_json(stage.folder / "validation.json") == figures
    alone = score(HuBERTPretrain.from_pretrained(checkpoints[1]["path"]), table, VALIDATION, TRAIN).row()
    assert figures["rows"][0] == checkpoints[1] | alone


def test_of_equal_checkpoints_the_earlier_one_is_chosen(tmp_path, folder):
    checkpoints = [checkpoint(tmp_path, step, seed=1) for step in (10, 20)]
    figures = stage_of(tmp_path, folder, checkpoints).run()
    assert figures["rows"][0]["validation_loss"] == figures["rows"][1]["validation_loss"]
    assert figures["best"]["step"] == 10


def test_checkpoints_that_were_scored_before_are_not_scored_again(tmp_path, folder):
    """A longer training brings new checkpoints: another folder, and the old scores are taken over."""
    first = checkpoint(tmp_path, 10, seed=1)
    figures = stage_of(tmp_path, folder, [first]).run()
    longer = stage_of(tmp_path, folder, [first, checkpoint(tmp_path, 20, seed=2)])
    plan = longer.plan()
    assert longer.missing(plan) == [1]
    assert longer.run()["rows"][0] == figures["rows"][0]
    other_masks = stage_of(tmp_path, folder, [first], ValidateSettings(seed=1))
    assert other_masks.missing(other_masks.plan()) == [0]
