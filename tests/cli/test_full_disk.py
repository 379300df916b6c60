"""Every stage on a disk that is really full: an explained error, and the same command goes on when there is room."""

import pytest

from hubert.cli import main as cli
from tests.support.disk import fill, small_disk
from tests.support.outputs import assert_equal_runs
from tests.support.small import write_recipe
from tests.support.toy import hubert

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

PAGE = 4096


@pytest.fixture(scope="module")
def first(small_corpus, tmp_path_factory):
    """What the first command of a run says."""
    recipe = write_recipe(tmp_path_factory.mktemp("recipe") / "small.toml", kmeans={"backend": "torch"})
    return ["--recipe", recipe, "--data", small_corpus]


@pytest.fixture(scope="module")
def undisturbed(first, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    for stage in cli.STAGES:
        code, _, errors = hubert(stage, run, *(first if stage == "manifest" else []))
        assert code == 0, errors
    return run


def test_every_stage_explains_a_full_disk_and_goes_on_when_there_is_room(first, undisturbed, tmp_path):
    """Each stage is tried with no room at all, then with a page, and four times as much each time: its writes fail one after the other."""
    with small_disk(tmp_path / "small", "64m") as disk:
        run = disk / "run"
        for stage in cli.STAGES:
            words = [stage, run, *(first if stage == "manifest" else [])]
            code, room, refusals = 75, 0, 0
            while code == 75:
                ballast = fill(disk, leave=room)
                code, _, errors = hubert(*words)
                ballast.unlink()
                if code == 75:
                    refusals += 1
                    assert "No space left on device" in errors
                    assert "Traceback" not in errors
                room = max(PAGE, 4 * room) if stage != "train" else 32 << 20  # a trainer takes its time to start
            assert code == 0, errors
            assert refusals, stage
        assert_equal_runs(run, undisturbed)
        code, said, _ = hubert("prune", run)
        assert code == 0
        fill(disk)
        code, said, errors = hubert("prune", run, "--yes")  # what frees space needs none
        assert code == 0, errors
        assert "left alone" not in said
