"""The report's data as a model, and the files of runs that an older version made.

tests/golden/older_run.json holds files of a demo run of commit 9d4a1fa, with other paths and fewer rows.
"""

import copy
import json
from pathlib import Path

import pytest

from hubert.core.files import read_json, write_json
from hubert.core.paths import PROJECT, RunFolder
from hubert.core.stage import Plan, Stage, read_receipt
from hubert.evaluation.checkpoints import find_run_checkpoint, read_checkpoints
from hubert.evaluation.choice import Outcome
from hubert.report.model_card import write_card
from hubert.report.report_data import ReportData, find_report
from hubert.report.stage import ReportStage, summarise_run
from hubert.report.stage_summary import summarise_stage
from hubert.runs.resolved import Resolved
from hubert.settings.model import SIZES

FILES = json.loads((PROJECT / "tests" / "golden" / "older_run.json").read_text())


@pytest.fixture
def older(tmp_path) -> RunFolder:
    """A run whose first iteration an older version finished."""
    folder = RunFolder(tmp_path / "demo")
    home = folder.iteration(1)
    write_json(home / "report-f4100864" / "report.json", FILES["report.json"])
    write_json(home / "report-f4100864" / "done.json", {"key": "f4100864"})
    write_json(home / "checkpoints.json", FILES["checkpoints.json"])
    write_json(home / "outcome.json", FILES["outcome.json"])
    return folder


class Finished(Stage):
    """A stage that an older version finished."""

    name = "validate"
    key = FILES["validate/done.json"]["key"]

    def __init__(self, parent: Path) -> None:
        self.parent = parent

    settings = inputs = make_plan = work = None


def test_a_report_is_read_back_as_it_was_written(older):
    _, data = find_report(older, 1)
    assert ReportData.model_validate_json(data.model_dump_json()) == data


def test_an_older_report_is_found_with_todays_names(older):
    page, data = find_report(older, 1)
    old = FILES["report.json"]
    assert page == older.iteration(1) / "report-f4100864" / "report.html"
    assert data.outcome == Outcome(**FILES["outcome.json"])
    first, last = data.checkpoints
    assert first.validation_loss == old["checkpoints"][0]["masked_loss"]
    assert first.checkpoint == old["checkpoints"][0]["path"]
    assert (first.layer, first.abx_across) == (None, None)
    assert (last.layer, last.abx_across, last.abx_within) == (2, data.row.abx_across, data.row.abx_within)
    assert data.units["validation"]["num_unused_units"] == old["units"]["validation"]["num_dead_units"] == 4
    assert data.stage("kmeans").figures["num_unused_units"] == 0


def test_the_key_of_the_next_report_is_that_of_an_older_version(older):
    """The previous iteration's row is hashed into it: what was read has to be what stands in the file, no more and no less."""
    row = copy.deepcopy(FILES["report.json"]["row"])
    for missing in ((), ("pnmi_units", "num_cells")):
        for name in missing:
            del row[name]
        write_json(older.iteration(1) / "report-f4100864" / "report.json", {**FILES["report.json"], "row": row})
        outcome = Outcome(**FILES["outcome.json"])
        stage = ReportStage(
            parent=older.iteration(2), run_folder=older.root, number=2, resolved={}, stages={}, outcome=outcome
        )
        assert stage.settings() == {"outcome": FILES["outcome.json"], "previous": row}


def test_the_page_of_a_run_shows_an_older_report(older):
    path, text = summarise_run(older)
    assert "it1 layer 2     7.77   22.34   0.393   3.963            4.148     6.9                 3.9" in text
    assert "The validation loss fell from 4.235 at step 100 to 3.963 at step 600" in text
    assert FILES["outcome.json"]["sha256"] in path.read_text()


def test_the_card_of_a_model_shows_an_older_report(older, tmp_path):
    _, data = find_report(older, 1)
    resolved = Resolved.of(data.resolved, older.root).model_dump(mode="json")
    write_card(
        tmp_path, SIZES["tiny"], "hubert-flows", name="demo", outcome=data.outcome, report=data, resolved=resolved
    )
    card = (tmp_path / "README.md").read_text()
    assert "| validation loss (nats) | 3.963 |" in card
    assert "| **layer 2** | 7.77 | 22.34 | 0.393 |" in card


def test_the_checkpoints_of_an_older_run_are_offered(older, monkeypatch):
    monkeypatch.setenv("HUBERT_RUNS", str(older.root.parent))
    old = FILES["checkpoints.json"]["checkpoints"]
    first, last = read_checkpoints(older, 1)
    assert (first.validation_loss, last.validation_loss) == (old[0]["masked_loss"], old[1]["masked_loss"])
    assert last.best_layer.abx_across == next(one["across"] for one in old[1]["layers"] if one["layer"] == 2)
    assert find_run_checkpoint("demo/it1/step-00000100").sha256 == old[0]["sha256"]


@pytest.mark.parametrize("name", ["validate", "kmeans"])
def test_the_figures_of_a_stage_that_an_older_version_finished_have_todays_names(name, tmp_path):
    stage = Finished(tmp_path)
    stage.name, stage.key = name, FILES[f"{name}/done.json"]["key"]
    done = FILES[f"{name}/done.json"]
    write_json(stage.folder / "done.json", {**done, "outputs": {}})
    figures = stage.figures()
    if name == "validate":
        assert figures["best"]["validation_loss"] == done["figures"]["best"]["masked_loss"]
        assert "masked_loss" not in figures["best"] | figures["rows"][0]
    else:
        assert figures["num_unused_units"] == 0
    assert summarise_stage(stage, figures).headline != "finished"  # in words, not as a list of figures
    plan = Plan([{}])
    receipt = {"index": 0, "plan": plan.hash, "outputs": {}, "figures": done["figures"]}
    write_json(stage.folder / "receipts" / "00000.json", receipt)
    assert read_receipt(stage.folder, 0, plan).figures == figures
    assert read_json(stage.folder / "done.json")["figures"] == done["figures"]  # the file stays as it was
