"""`hubert plan`: figures that were worked out by hand, and the real model's parameters."""

import json

import pytest
import torch

from hubert.core.errors import ConfigError
from hubert.core.paths import find_recipe
from hubert.model.cost import ASSUMED, multiplications, num_parameters, training_rate
from hubert.model.hubert import HuBERTPretrain
from hubert.runs.plan import build_plan, format_plan
from hubert.settings.model import SIZES
from hubert.settings.recipe import build_recipe, read_recipe
from tests.support.toy import hubert


@pytest.fixture(scope="module")
def paper():
    """The paper's run, on the paper's GPUs."""
    return build_plan(read_recipe(find_recipe("librispeech-base")), hours=960, num_files=281_241, num_gpus=32)


def stage(iteration, name):
    return next(found for found in iteration.stages if found.stage == name)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_counted_as_the_model_has_them(size):
    with torch.device("meta"):
        model = HuBERTPretrain(500, size)
    assert num_parameters(SIZES[size], 500) == sum(parameter.numel() for parameter in model.parameters())


def test_the_papers_speed_gives_the_papers_times(paper):
    """250k and 400k steps at 9.5 h per 100k on 32 GPUs: 23.75 h and 38 h, 760 and 1,216 GPU-hours."""
    first, second = paper.iterations
    assert ASSUMED.audio_seconds_per_second == pytest.approx(255.8, abs=0.1)
    assert first.gpu_hours_training == pytest.approx(760)
    assert second.gpu_hours_training == pytest.approx(1216)
    assert first.hours == pytest.approx(23.75, rel=0.001)
    assert first.busy == second.busy == 1


def test_steps_audio_and_epochs(paper):
    """2,800 s per step; 400,000 of them are 311,111 h, 324.07 times 960 h; a checkpoint every 25,000 steps."""
    second = paper.iterations[1]
    assert (second.steps, second.seconds_per_step, second.micro_batches_per_step) == (400_000, 2800, 32)
    assert second.epochs == pytest.approx(311_111.1 / 960, rel=1e-5)
    assert (paper.iterations[0].num_checkpoints, second.num_checkpoints) == (10, 16)


def test_disk_of_the_sampled_features(paper):
    """10 % of 960 h. MFCC: 96 h x 3600 s x 100 Hz x 39 x 4 bytes; a layer: 27.6 MB per hour of audio."""
    first, second = paper.iterations
    assert stage(first, "features").bytes == pytest.approx(96 * 3600 * 100 * 39 * 4)
    assert stage(second, "features").bytes / 960 == pytest.approx(27.648e6)
    assert paper.prunable_bytes == stage(first, "features").bytes + stage(second, "features").bytes


def test_disk_of_codebooks_units_and_checkpoints(paper):
    """Units: two bytes a frame, twice. A checkpoint of 94.7 M float32, and twice that for AdamW in the last two."""
    first, second = paper.iterations
    assert stage(second, "kmeans").bytes == 500 * 768 * 4
    assert stage(first, "units").bytes == pytest.approx(2 * 2 * 960 * 3600 * 100, rel=0.05)
    assert stage(second, "units").bytes == pytest.approx(2 * 2 * 960 * 3600 * 50, rel=0.1)
    weights = 4 * 94_696_576
    assert stage(second, "train").bytes == 16 * weights + 2 * 2 * weights
    assert paper.bytes == sum(found.bytes for found in (paper.manifest, *first.stages, *second.stages))


def test_shards_and_tasks(paper):
    """One hour per shard; at most 200 tasks do them, and two more plan and finish a stage."""
    first = paper.iterations[0]
    assert (paper.manifest.num_shards, paper.manifest.num_tasks) == (960, 202)
    assert (stage(first, "features").num_shards, stage(first, "features").num_tasks) == (96, 98)
    assert (stage(first, "kmeans").num_tasks, stage(first, "train").num_tasks) == (3, 1)
    assert paper.num_tasks == 202 + 98 + 3 + 202 + 1 + 12 + 3 + 98 + 3 + 202 + 1 + 18 + 3


def test_the_sample_is_bounded_by_its_hours():
    """60,000 h: 10 % would be 6,000 h, the setting allows 100."""
    plan = build_plan(build_recipe({}), hours=60_000)
    assert stage(plan.iterations[0], "features").num_shards == 100


def test_labelling_by_a_layer_is_a_forward_pass_over_sample_and_corpus(paper):
    """(960 + 96) h at three times the training's speed; MFCCs need no GPU."""
    first, second = paper.iterations
    assert first.gpu_hours_labelling == 0
    assert second.gpu_hours_labelling == pytest.approx(1056 / 3 / ASSUMED.audio_seconds_per_second)


def test_validation_is_bounded_by_its_hours(paper):
    """The recipe brings its own validation, of which 10 h count: 16 checkpoints x 10 h."""
    second = paper.iterations[1]
    assert second.gpu_hours_validation == pytest.approx(16 * 10 / 3 / ASSUMED.audio_seconds_per_second)


def test_gpus_that_do_not_divide_the_micro_batches_wait():
    """32 micro-batches on 24 GPUs: two rounds, 32 of 48 places used."""
    recipe = read_recipe(find_recipe("librispeech-base"))
    plan = build_plan(recipe, hours=960, num_gpus=24)
    assert plan.iterations[0].busy == pytest.approx(2 / 3)
    assert plan.iterations[0].hours == pytest.approx(760 / 16, rel=0.001)
    assert any("67% busy" in line for line in plan.assumptions)


def test_a_given_speed_replaces_the_assumed_one():
    recipe = read_recipe(find_recipe("librispeech-base"))
    plan = build_plan(recipe, hours=960, num_gpus=16, rate=2800 / 16 * 10)  # ten steps per second on 16 GPUs
    assert plan.iterations[0].gpu_hours_training / 16 == pytest.approx(25_000 / 3600)
    assert not any("paper" in line for line in plan.assumptions)


def test_larger_models_are_slower_in_proportion_to_their_multiplications():
    """Base, per second: 2.45 G in the convolutions, 50 frames x (12 layers x 7.08 M + projection, positions, attention)."""
    frames = (15.625 * 16_000 - 400) / 320 + 1
    convolutions = 3200 * 10 * 512 + sum(3200 / 2**n * 3 * 512 * 512 for n in (1, 2, 3, 4)) + 300 / 2 * 2 * 512 * 512
    per_frame = 512 * 768 + 128 * 48 * 768 + 12 * (4 * 768**2 + 2 * 768 * 3072 + 2 * frames * 768)
    assert multiplications(SIZES["base"]) == pytest.approx(convolutions + 50 * per_frame)
    assert training_rate(SIZES["base"]) == pytest.approx(ASSUMED.audio_seconds_per_second)
    assert training_rate(SIZES["large"]) < ASSUMED.audio_seconds_per_second / 2


def test_the_command_prints_table_assumptions_and_json():
    code, text, _ = hubert("plan", "librispeech-base", "--hours", "960", "--gpus", "16")
    assert code == 0
    assert "1,216" in text
    assert "26.5 GB" in text
    assert "the HuBERT paper" in text.replace("\n    ", " ")
    content = json.loads(hubert("plan", "librispeech-base", "--hours", "960", "--gpus", "16", "--json")[1])
    assert content["iterations"][1]["gpu_hours_training"] == pytest.approx(1216)
    assert content["num_files"] == round(960 * 3600 / 12.3)
    assert format_plan(build_plan(read_recipe(find_recipe("demo")), hours=0.5), "demo")


def test_a_number_that_is_not_positive_is_named():
    code, _, error = hubert("plan", "demo", "--hours", "0")
    assert code == 2
    assert "--hours is 0" in error
    with pytest.raises(ConfigError, match="--gpus"):
        build_plan(build_recipe({}), hours=1, num_gpus=0)
