"""The command line of the science: every stage alone, what it remembers, its help, its errors."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hubert.cli import main as cli
from hubert.cli.parser import Parser
from hubert.core.errors import ConfigError, DataError, HubertError, TrainingDiverged, TransientError
from hubert.core.paths import PROJECT, RunFolder
from hubert.evaluation.checkpoints import read_checkpoints
from hubert.evaluation.choice import read_outcome
from hubert.runs.options import RunOptions
from hubert.runs.pipeline import Iteration
from hubert.runs.resolve import settle
from hubert.runs.resolved import Resolved
from hubert.settings.sections import SECTIONS, KMeansSettings
from hubert.settings.stages import STAGES
from hubert.units.codebook import Codebook
from hubert.units.kmeans import KMeansStage
from tests.support.toy import CHAIN, hubert, write_material
from tools.given_stages import frames_in

COMMANDS = (*STAGES, "status", "prune", "plan", "export", "push")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """The first iteration, one command after the other; only the first one names recipe and data."""
    data, recipe = material
    run = str(tmp_path_factory.mktemp("runs") / "toy")
    said = {}
    for stage in CHAIN:
        options = ["--recipe", recipe, "--data", data] if stage == CHAIN[0] else []
        code, said[stage], errors = hubert(stage, run, *options)
        assert code == 0, errors
    return run, said


def test_each_stage_runs_alone_after_the_first_command_named_recipe_and_data(finished):
    _, said = finished
    for stage in CHAIN:
        (folder,) = re.findall(r"folder: (.*)", said[stage])
        assert json.loads((Path(folder) / "done.json").read_text())["stage"] == stage
    assert re.search(r"for training +10 ", said["manifest"])
    assert re.search(r"^ +step +validation loss \(nats\) +masked accuracy \(%\)", said["validate"], re.MULTILINE)


def test_report_writes_the_outcome_and_prints_the_comparison(finished):
    run, said = finished
    outcome = read_outcome(RunFolder.of(run), 1)
    assert (outcome.step, outcome.layer, outcome.rule) == (12, 1, "paper")
    assert f"chosen: step 12, layer 1: {outcome.why}" in said["report"]
    assert "MFCC" in said["report"]
    assert (Path(run) / "report.html").exists()
    checkpoints = read_checkpoints(RunFolder.of(run), 1)
    assert [checkpoint.step for checkpoint in checkpoints] == [4, 8, 12]
    assert (checkpoints[-1].sha256, checkpoints[-1].why) == (outcome.sha256, outcome.why)
    assert all(
        checkpoint.why == f"its layers were not scored; as for step 12: {outcome.why}" for checkpoint in checkpoints[:2]
    )


def test_a_finished_stage_is_found_and_not_done_again(finished):
    run, _ = finished
    code, said, _ = hubert("units", run)
    assert code == 0
    assert "was finished before" in said


def test_the_command_line_and_the_pipeline_write_the_same_folders(finished):
    run, said = finished
    iteration = Iteration(Resolved.load(RunFolder.of(run).settings(1)))
    for stage in CHAIN:
        assert f"folder: {getattr(iteration, stage).folder}" in said[stage]


@pytest.mark.parametrize(("suffix", "rows"), [("csv", 15), ("jsonl", 14), ("tsv", 15)])
def test_a_manifest_is_exported_in_the_format_that_the_suffix_names(finished, tmp_path, suffix, rows):
    run, _ = finished
    assert hubert("manifest", run, "--output", tmp_path / f"m.{suffix}")[0] == 0
    assert len((tmp_path / f"m.{suffix}").read_text().splitlines()) == rows


def test_a_part_of_a_manifest_is_exported_as_parquet(finished, tmp_path):
    run, _ = finished
    assert hubert("manifest", run, "--output", tmp_path / "m.parquet", "--part", "validation")[0] == 0
    assert pl.read_parquet(tmp_path / "m.parquet")["fileid"].len() == 4


def test_an_unknown_suffix_is_a_config_error(finished, tmp_path):
    code, _, error = hubert("manifest", finished[0], "--output", tmp_path / "m.xlsx")
    assert code == 2
    assert ".xlsx" in error


# What a stage needs -----------------------------------------------------------------------------------------------


def test_a_stage_whose_input_is_missing_names_the_command_to_run(material, tmp_path):
    data, recipe = material
    code, _, error = hubert("units", tmp_path / "new", "--recipe", recipe, "--data", data)
    assert code == 3
    assert f"First run: hubert manifest {tmp_path / 'new'} --iteration 1" in error


def test_the_second_iteration_needs_the_first_ones_outcome(material, tmp_path):
    data, recipe = material
    code, _, error = hubert("manifest", tmp_path / "new", "--recipe", recipe, "--data", data, "--iteration", "2")
    assert code == 2
    assert "run iteration 1 first" in error


@pytest.mark.parametrize("stage", ["abx", "quality"])
def test_a_stage_that_the_recipe_gives_nothing_to_do_says_which_setting_is_missing(finished, stage):
    code, _, error = hubert(stage, finished[0])
    assert code == 2
    assert {"abx": "abx.item", "quality": "quality.alignments"}[stage] in error


def test_torch_does_not_fill_in_for_dask_silently(tmp_path):
    """The stage's key says which of the two made the codebook."""
    stage = KMeansStage(parent=tmp_path, sample=frames_in([]), kmeans=KMeansSettings())
    with pytest.raises(ConfigError, match=r"kmeans\.backend=torch"):
        cli.fit_here(stage)
    assert not list(tmp_path.iterdir())


def test_the_console_script_fits_with_dask_and_gets_the_codebook_of_torch(finished):
    from tasks.cli import fit_codebook

    iteration = Iteration(Resolved.load(RunFolder.of(finished[0]).settings(1)))
    by_torch = iteration.kmeans
    settings = by_torch.kmeans.model_copy(update={"backend": "dask"})
    by_dask = KMeansStage(parent=by_torch.parent, sample=by_torch.sample, kmeans=settings)
    assert by_dask.folder != by_torch.folder
    fit_codebook(by_dask)
    first, second = (Codebook.load(stage.path).centroids for stage in (by_torch, by_dask))
    assert np.allclose(first, second, atol=1e-2)
    assert by_dask.figures()["mean_squared_distance"] == pytest.approx(
        by_torch.figures()["mean_squared_distance"], rel=1e-4
    )


# What is remembered -----------------------------------------------------------------------------------------------


def test_a_new_run_needs_recipe_and_data(tmp_path, material):
    assert "--recipe" in hubert("manifest", tmp_path / "new")[2]
    code, _, error = hubert("manifest", tmp_path / "new", "--recipe", material[1])
    assert code == 2
    assert "--data" in error
    assert not (tmp_path / "new").exists()


def wishes(material, run, **changes) -> RunOptions:
    data, recipe = material
    return RunOptions(**{"run": str(run), "recipe": str(recipe), "data": str(data), **changes})


def test_settings_stay_until_they_are_changed_one_by_one(material, tmp_path):
    run = tmp_path / "run"
    first = settle(wishes(material, run, overrides={"train.steps": 20}))
    assert settle(RunOptions(str(run))) == first
    changed = settle(RunOptions(str(run), overrides={"train.seed": 3}))
    train = Iteration(changed).settings.train
    assert (train.seed, train.steps, changed.data) == (3, 20, first.data)
    assert settle(RunOptions(str(run))) == changed
    anew = settle(wishes(material, run, data=""))
    assert (Iteration(anew).settings.train.steps, anew.data) == (12, first.data)


def test_extend_is_for_one_command_only(material, tmp_path):
    run = tmp_path / "run"
    assert settle(wishes(material, run, extend=True)).extend
    assert not settle(RunOptions(str(run))).extend
    assert settle(RunOptions(str(run), extend=True)).extend


def test_the_next_iteration_takes_recipe_and_data_over_and_starts_from_the_outcome(finished):
    run, _ = finished
    folder = RunFolder.of(run)
    second = settle(RunOptions(run, iteration=2))
    try:
        outcome = read_outcome(folder, 1)
        assert (second.source.checkpoint, second.source.layer) == (outcome.checkpoint, outcome.layer)
        assert second.data == Resolved.load(folder.settings(1)).data
        assert settle(RunOptions(run)) == second  # the newest that was begun
        other = settle(RunOptions(run, layer=2))
        assert (other.source.layer, other.chosen) == (2, "given: layer 2")
        assert settle(RunOptions(run, overrides={"train.seed": 1})).source.layer == 2
        with pytest.raises(ConfigError, match="layers 1 to 2"):
            settle(RunOptions(run, layer=3))
    finally:  # the other tests look at iteration 1
        for path in folder.iteration(2).iterdir():
            path.unlink()
        folder.iteration(2).rmdir()


def test_a_layer_without_teacher_is_refused_in_the_first_iteration(material, tmp_path):
    settle(wishes(material, tmp_path / "run"))
    with pytest.raises(ConfigError, match="clusters MFCCs"):
        settle(RunOptions(str(tmp_path / "run"), layer=3))


def test_a_wrong_override_names_the_field_and_changes_nothing(material, tmp_path):
    first = settle(wishes(material, tmp_path / "run"))
    code, _, error = hubert("train", tmp_path / "run", "--set", "train.stepps=5")
    assert code == 2
    assert "stepps" in error
    assert settle(RunOptions(str(tmp_path / "run"))) == first


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--layer", 0, "--iteration", 2), "layers 1 to 2"), (("--iteration", 0), "count from 1")],
)
def test_zero_is_a_wrong_number_and_not_a_missing_one(finished, words, message):
    code, _, error = hubert("features", finished[0], *words)
    assert code == 2
    assert message in error
    assert not RunFolder.of(finished[0]).settings(2).exists()


def test_a_changed_item_file_that_does_not_exist_is_refused_and_not_remembered(material, tmp_path):
    first = settle(wishes(material, tmp_path / "run"))
    code, _, error = hubert("abx", tmp_path / "run", "--set", "abx.item=typo.item")
    assert code == 2
    assert "typo.item" in error
    assert settle(RunOptions(str(tmp_path / "run"))) == first


def test_a_place_that_cannot_be_written_is_one_line_and_worth_another_try(material, tmp_path):
    (tmp_path / "file").touch()
    code, _, error = hubert("manifest", f"{tmp_path}/file/run", "--recipe", material[1], "--data", material[0])
    assert (code, "Traceback" in error) == (75, False)
    assert str(tmp_path / "file") in error


# Help and errors --------------------------------------------------------------------------------------------------


def help_of(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    return out.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_setting_of_the_stage_with_default_and_meaning(command):
    text = help_of(command)
    sections = STAGES[command].sections if command in STAGES else ()
    for section in sections:
        for name, field in SECTIONS[section].model_fields.items():
            default = json.dumps(field.get_default(call_default_factory=True))
            assert f"{section}.{name} = {'none' if default == 'null' else default}" in text
            assert field.description.split()[0] in text
    if "train" in sections:
        assert "in seconds" in text
        assert "optimizer steps" in text


def test_help_lists_all_commands_and_exit_codes():
    text = help_of()
    assert all(f"\n    {command}" in text for command in COMMANDS)
    assert "75" in text


def test_help_imports_nothing_that_is_slow():
    code = (
        "import sys, contextlib\nfrom tasks.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print([name for name in ('torch', 'polars', 'pydantic', 'prefect', 'dask', 'mlflow', 'httpx') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (DataError("x"), 3),
        (TrainingDiverged("x"), 4),
        (TransientError("x"), 75),
        (HubertError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_error_has_its_exit_code_and_no_traceback(error, code, capsys):
    parser = Parser()

    def handler(_):
        raise error

    parser.set_defaults(handler=handler)
    assert cli.run(parser, []) == code
    assert "hubert:" in capsys.readouterr().err


def test_other_errors_are_tracebacks():
    parser = Parser()
    parser.set_defaults(handler=lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.run(parser, [])


def test_the_module_is_the_same_command_line():
    result = subprocess.run(
        [sys.executable, "-m", "hubert", "status", "no-such-run"],
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "no-such-run" in result.stderr
