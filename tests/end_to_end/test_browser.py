"""Trigger, watch and choose in a real browser: Chromium on the pages of the real servers, as a person uses them."""

import pytest

from hubert.core.files import read_json
from hubert.core.paths import RunFolder
from hubert.evaluation.checkpoints import ALIAS, ANSWER
from tasks.service.register import register
from tests.support.toy import write_material
from tools.browser import MlflowPages, PrefectPages, find_chromium, new_page, open_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    data, recipe = write_material(tmp_path_factory.mktemp("browser"))
    return {"recipe": str(recipe), "data": str(data)}


@pytest.fixture(scope="module")
def deployed(service):
    """The service, with the project's deployments beside those of the tests."""
    register(service.settings.api_url)
    return service.settings


@pytest.fixture(scope="module")
def chromium():
    with open_chromium() as browser:
        yield browser


@pytest.fixture
def prefect(deployed, chromium):
    return PrefectPages(new_page(chromium), deployed.ui_url)


@pytest.fixture
def mlflow(deployed, chromium):
    return MlflowPages(new_page(chromium), deployed.mlflow_url)


def run_by_form(prefect, flow, **fields):
    """Fill in the form of a deployment and start it; what is not named keeps its default."""
    prefect.open_form(flow)
    for name, value in fields.items():
        prefect.fill(name, value)
    return prefect.submit()


def choice(folder):
    return read_json(RunFolder(folder).choice(2))


@pytest.mark.timeout(900)
def test_an_iteration_is_run_from_its_form_and_seen_to_finish_and_its_artifacts_open(prefect, material, tmp_path):
    run_by_form(prefect, "hubert-iteration", run=str(tmp_path / "clicked"), **material)
    prefect.wait_for_state("Completed")
    assert RunFolder(tmp_path / "clicked").outcome(1).exists()
    prefect.open_artifact("what this run does")
    prefect.page.get_by_role("paragraph").filter(has_text="starts from: MFCC").wait_for()


@pytest.mark.browser
@pytest.mark.timeout(3600)
def test_the_checkpoint_that_is_given_the_alias_teacher_in_mlflow_is_clustered_next(
    prefect, mlflow, material, tmp_path
):
    run = tmp_path / "chosen by hand"
    run_by_form(prefect, "hubert-iteration", run=str(run), **material)
    prefect.wait_for_state("Completed")

    mlflow.open_checkpoints(run.name)
    for step in (4, 8, 12):
        mlflow.page.get_by_role("link", name=f"it1-step-{step:08d}").wait_for()

    mlflow.open_file(run.name, "it1/train", "checkpoints.csv")
    rising = [(float(row[1]), int(row[0])) for row in mlflow.sort_by("validation loss")]
    assert rising == sorted(rising)
    assert {step for _, step in rising} == {4, 8, 12}
    _, worst = rising[-1]

    mlflow.give_alias("teacher", mlflow.version_of("chosen-by-hand-it1", worst))
    run_by_form(prefect, "hubert-iteration", run=str(run), **material)
    prefect.wait_for_state("Completed")

    report = mlflow.read_report(run.name, "it2/train")
    report.get_by_text("a person gave the alias").first.wait_for()
    report.get_by_text(f"step {worst} of iteration 1").first.wait_for()
    assert choice(run)["by"] == ALIAS
    assert choice(run)["source"]["checkpoint"].endswith(f"step-{worst:08d}")


@pytest.mark.browser
@pytest.mark.timeout(3600)
def test_a_pretraining_that_asks_goes_on_with_the_layer_that_is_chosen_in_its_form(prefect, mlflow, material, tmp_path):
    run = tmp_path / "asked"
    run_by_form(prefect, "hubert-pretraining", run=str(run), choose="ask", **material)
    prefect.wait_for_state("Suspended")
    own = read_json(RunFolder(run).outcome(1))["layer"]
    other = 1 if own == 2 else 2

    prefect.resume(layer=f"layer {other}")
    prefect.wait_for_state("Completed")
    assert choice(run)["by"] == ANSWER
    assert choice(run)["source"]["layer"] == other

    report = mlflow.read_report(run.name, "it2/train")
    report.get_by_text("a person answered").first.wait_for()
