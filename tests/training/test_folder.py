"""The log of a training, whole and broken."""

import pytest

from hubert.core.errors import DataError
from hubert.training.folder import TrainingFolder, read_metrics

LINES = "".join(f'{{"step": {step}, "loss": 1.5}}\n' for step in (2, 4, 6))


@pytest.mark.parametrize("end", [0, 1, 9, len(LINES) // 3 - 1])
def test_a_line_that_is_being_written_is_left_for_later(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text(LINES + LINES[:end])
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 6]


@pytest.mark.parametrize("damage", ["", "\0" * 40, '{"step": 4, "lo'])
def test_a_line_that_is_broken_in_the_middle_is_named_with_its_file(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    first, _, third = LINES.splitlines()
    path.write_text(f"{first}\n{damage}\n{third}\n")
    with pytest.raises(
        DataError, match=r"metrics\.jsonl, line 2: expected a JSON object with a step.*start the training again"
    ):
        read_metrics(path)


def test_a_training_that_resumes_cuts_its_log_before_a_hole_that_a_dead_node_left(tmp_path):
    """The lines up to the checkpoint were flushed with it, so the hole is after them; its steps come again."""
    folder = TrainingFolder(tmp_path, "mine")
    with folder.hold(take=True):
        folder.metrics.write_text(LINES + "\0" * 40 + "\n" + '{"step": 10, "loss": 1.0}\n{"step": 12, "lo')
        folder.cut_metrics(4)
        assert [line["step"] for line in read_metrics(folder.metrics)] == [2, 4]
        folder.metrics.write_text(LINES + "\0" * 40 + "\n" + '{"step": 10, "loss": 1.0}\n{"step": 12, "lo')
        folder.cut_metrics(8)
        folder.append_metrics({"step": 8, "loss": 1.0})
        assert [line["step"] for line in read_metrics(folder.metrics)] == [2, 4, 6, 8]
