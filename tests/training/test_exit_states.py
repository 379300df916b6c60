"""The table of a training's ends: every pair of Slurm's word and the trainer's word has one row, and the docs show it."""

import itertools

import pytest

from hubert.core.errors import ConfigError, DataError, TrainingCancelled, TrainingDiverged, TransientError
from hubert.core.paths import PROJECT
from hubert.training.exit_states import ENDS, FORGOTTEN, PROCESS, REFUSED, Action, Exit, judge, markdown

PAGE = PROJECT / "docs" / "training-ends.md"
STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")


@pytest.mark.parametrize(
    ("state", "code", "name"),
    [
        ("COMPLETED", Exit.FINISHED, "finished"),
        ("CANCELLED", Exit.FINISHED, "finished"),  # too late
        ("NODE_FAIL", Exit.FINISHED, "finished"),
        ("TIMEOUT", None, "time limit"),
        ("TIMEOUT", Exit.INTERRUPTED, "time limit"),
        ("FAILED", Exit.INTERRUPTED, "interrupted by a signal"),  # SIGUSR1 before the limit, scancel --signal=TERM
        ("COMPLETED", Exit.INTERRUPTED, "interrupted by a signal"),
        ("PREEMPTED", Exit.INTERRUPTED, "preempted"),
        ("PREEMPTED", None, "preempted"),
        ("NODE_FAIL", None, "node failed"),
        ("NODE_FAIL", Exit.TRANSIENT, "node failed"),  # a rank on another node noticed
        ("NODE_FAIL", Exit.FAILED, "node failed"),
        ("BOOT_FAIL", None, "node failed"),
        ("OUT_OF_MEMORY", None, "out of memory"),
        ("OUT_OF_MEMORY", Exit.TRANSIENT, "out of memory"),
        ("CANCELLED", None, "scancelled by a person"),
        ("CANCELLED", Exit.INTERRUPTED, "scancelled by a person"),
        ("CANCELLED", Exit.TRANSIENT, "scancelled by a person"),
        ("FAILED", Exit.CONFIG, "wrong setting"),
        ("FAILED", Exit.DATA, "wrong data"),
        ("FAILED", Exit.DIVERGED, "not finite"),
        ("NODE_FAIL", Exit.DIVERGED, "not finite"),
        ("FAILED", Exit.FAILED, "fault of the program"),
        ("FAILED", Exit.TRANSIENT, "lost its surroundings"),
        ("FAILED", None, "killed"),
        ("COMPLETED", None, "killed"),
        ("DEADLINE", None, "unknown"),
        (FORGOTTEN, None, "unknown"),
        (FORGOTTEN, Exit.INTERRUPTED, "unknown"),  # perhaps by a person's scancel
        (FORGOTTEN, Exit.FINISHED, "finished"),
        (REFUSED, None, "launch failed"),
        (PROCESS, None, "killed"),
        (PROCESS, Exit.INTERRUPTED, "interrupted by a signal"),
    ],
)
def test_an_end_is_recognised_by_slurms_word_and_the_trainers(state, code, name):
    assert judge(state, code).name == name


@pytest.mark.parametrize(("state", "code"), itertools.product((*STATES, PROCESS, FORGOTTEN), (*Exit, None)))
def test_a_training_that_this_service_stopped_is_never_started_again(state, code):
    end = judge(state, code, asked=True)
    assert end.action is (Action.GO_ON if code is Exit.FINISHED else Action.STOP)


def test_only_these_ends_are_started_again():
    """The flow starts again what is raised as TransientError."""
    again = {end.name for end in ENDS if end.action is Action.RESTART}
    assert again == {
        "time limit",
        "preempted",
        "node failed",
        "out of memory",
        "interrupted by a signal",
        "lost its surroundings",
        "killed",
    }
    assert again == {end.name for end in ENDS if issubclass(end.error, TransientError)}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("wrong setting", ConfigError),
        ("launch failed", ConfigError),
        ("wrong data", DataError),
        ("not finite", TrainingDiverged),
        ("scancelled by a person", TrainingCancelled),
    ],
)
def test_an_end_is_raised_as_an_error_of_its_kind(name, error):
    assert {end.error for end in ENDS if end.name == name} == {error}


def test_the_page_shows_the_table_of_the_code():
    assert markdown() in PAGE.read_text(), f"expected this in {PAGE}:\n{markdown()}"
