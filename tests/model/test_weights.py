"""Starting from a model that exists: a teacher without a first iteration, and an encoder that a training goes on from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubert.core.errors import ConfigError, DataError
from hubert.core.files import write_json
from hubert.core.hashing import file_digest
from hubert.core.paths import RunFolder
from hubert.evaluation.choice import read_outcome
from hubert.model.formats import read as formats
from hubert.model.formats import unpickle
from hubert.model.hubert import HuBERT, HuBERTPretrain
from hubert.model.weights import Origin, find_origin, read_config, weights_digest
from hubert.runs.options import Wishes, settle
from hubert.runs.pipeline import Iteration
from hubert.runs.resolve import first_unfinished, resolve
from hubert.runs.resolved import Resolved
from hubert.settings.model import SIZES, build_config
from hubert.settings.sections import TrainSettings
from hubert.training.exit_states import Exit
from hubert.training.init import check_dimensions, settle_init
from hubert.training.job import read_job
from hubert.training.stage import TrainStage
from hubert.training.trainer import Trainer
from tests.support.small import SETTINGS as SMALL
from tests.support.toy import CHAIN, hubert, write_material
from tests.support.training import ALONE, SETTINGS, assert_same_training, job_of, train, write_table

MODEL = SMALL["train"]["model"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that somebody trained: with a head, and with dropouts of its own."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("released") / "their model"
    HuBERTPretrain(9, "tiny", **MODEL, dropout=0.4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of the dimensions that tests/support/training.py trains."""
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("larger") / "encoder"
    HuBERT(build_config("tiny", SETTINGS.model)).save_pretrained(folder)
    return folder


# A teacher, and no first iteration ------------------------------------------------------------------------------------


def test_a_new_run_starts_at_iteration_2_from_a_teachers_layer_and_goes_on_from_an_encoder(
    material, released, tmp_path
):
    """Every stage, by the command line; nothing of iteration 1 is there or needed."""
    data, recipe = material
    run = tmp_path / "run"
    options = ["--recipe", recipe, "--data", data, "--iteration", "2", "--teacher", released, "--layer", "1"]
    options += ["--set", f"train.init={released}", "train.steps=4"]
    for stage in CHAIN:
        code, said, errors = hubert(stage, run, *(options if stage == CHAIN[0] else []))
        assert code == 0, errors
    assert "chosen: step 4, layer 2" in said  # three quarters of two layers: the paper's layer of a later iteration
    assert not (run / "it1").exists()
    resolved = Resolved.load(RunFolder.of(str(run)).settings(2))
    sha256 = file_digest(released / "model.safetensors")
    assert (resolved.source["sha256"], resolved.source["layer"], resolved.init["sha256"]) == (sha256, 1, sha256)
    log = next((run / "it2").glob("train-*/train.log")).read_text()
    assert f"the encoder's weights are those of {released}" in log
    assert first_unfinished(RunFolder.of(str(run))) == 3  # not the first iteration, which this run skipped
    # and the next iteration starts from what this one chose
    assert read_outcome(RunFolder.of(str(run)), 2) is not None
    third = resolve(str(run), str(recipe), str(data), iteration=3)
    assert Path(third.source["checkpoint"]).parent.parent == run / "it2"


def test_weights_that_were_replaced_after_the_run_was_settled_are_named_and_label_nothing(material, tmp_path):
    """Else the units of another model would lie under the first one's key."""
    data, recipe = material
    teacher = tmp_path / "teacher"
    HuBERTPretrain(9, "tiny", **MODEL).save_pretrained(teacher)
    options = ["--recipe", recipe, "--data", data, "--iteration", "2", "--teacher", teacher, "--layer", "1"]
    assert hubert("manifest", tmp_path / "run", *options)[0] == 0
    HuBERTPretrain(9, "tiny", **MODEL).save_pretrained(teacher)  # other random weights
    code, _, error = hubert("features", tmp_path / "run")
    assert code == 3
    assert f"{teacher}: expected the weights with sha256" in error
    assert not list((tmp_path / "run" / "it2").glob("features-*/receipts/*"))


def test_a_trainer_refuses_an_encoder_that_was_replaced_while_it_waited(tmp_path, table, larger):
    job = job_of(tmp_path / "run", table, init=str(larger))
    trainer = Trainer(job.model_copy(update={"init": str(larger), "init_sha256": "0" * 64}), ALONE)
    with pytest.raises(DataError, match="somebody replaced or moved them"):
        trainer._initialise()


def test_a_training_that_is_finished_no_longer_needs_the_encoder_it_started_from(material, released, tmp_path):
    data, recipe = material
    run, encoder = tmp_path / "run", shutil.copytree(released, tmp_path / "encoder")
    options = [
        "--recipe",
        recipe,
        "--data",
        data,
        "--set",
        f"train.init={encoder}",
        "train.steps=2",
        "train.log_interval=1",
    ]
    for stage in CHAIN[:-1]:
        code, _, errors = hubert(stage, run, *(options if stage == CHAIN[0] else []))
        assert code == 0, errors
    encoder.rename(tmp_path / "elsewhere")
    code, _, errors = hubert("validate", run, "--set", "validate.seed=1")
    assert code == 0, errors
    again = resolve(str(run), str(recipe), str(data), iteration=1, overrides={"train.init": str(encoder)})
    assert again.init == Resolved.load(RunFolder.of(str(run)).settings(1)).init  # as a new flow run settles it


def test_iteration_1_may_have_a_teacher_too(material, released, tmp_path):
    data, recipe = material
    found = resolve(str(tmp_path / "run"), str(recipe), str(data), iteration=1, teacher=str(released), layer=2)
    assert Iteration(found).source.describe() == f"layer 2 of {released}"


@pytest.mark.parametrize(
    ("teacher", "layer", "message"),
    [
        ("nobody/nothing-here", 1, r"teacher = 'nobody/nothing-here': "),
        ("EMPTY", 1, r"expected a checkpoint folder with model\.safetensors.*found none in .*empty"),
        ("RELEASED", 3, "layer 3: the teacher .*their model has layers 1 to 2"),
        ("RELEASED", None, "without `layer`"),
    ],
)
def test_a_teacher_that_cannot_be_one_is_refused_before_anything_starts(
    material, released, tmp_path, monkeypatch, teacher, layer, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data, recipe = material
    (tmp_path / "empty").mkdir()
    name = {"EMPTY": str(tmp_path / "empty"), "RELEASED": str(released)}.get(teacher, teacher)
    with pytest.raises(ConfigError, match=message):
        resolve(str(tmp_path / "run"), str(recipe), str(data), iteration=2, teacher=name, layer=layer)
    assert not (tmp_path / "run").exists()


# What enters the key --------------------------------------------------------------------------------------------------


def train_key(material: tuple[Path, Path], run: Path, init: str) -> str:
    """Return the key of a training on some table, with the encoder as `resolve` finds it."""
    data, recipe = material
    resolved = resolve(str(run), str(recipe), str(data), overrides={"train.init": init})
    origin = {"init": resolved.init["checkpoint"], "init_sha256": resolved.init["sha256"]} if resolved.init else {}
    return TrainStage(run, run, "t", 9, Iteration(resolved).settings.train, **origin).key


def test_an_encoder_enters_the_key_by_its_weights_not_by_its_spelling(material, released, tmp_path, monkeypatch):
    shutil.copytree(released, tmp_path / "copy")
    changed = HuBERTPretrain.from_pretrained(released)
    changed.class_embeddings.data += 1
    changed.save_pretrained(tmp_path / "changed")
    monkeypatch.chdir(tmp_path)
    keys = [
        train_key(material, tmp_path / "run", name) for name in (str(released), "copy", "./copy/", "changed", "fresh")
    ]
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys)) == 3
    assert TrainSettings(init="copy").key_settings() == {}


def test_weights_of_several_files_are_hashed_together_and_by_name(tmp_path):
    index, first, second = (tmp_path / name for name in ("pytorch_model.bin.index.json", "part-1.bin", "part-2.bin"))
    write_json(index, {"weight_map": {"a": first.name, "b": second.name, "c": first.name}})
    first.write_bytes(b"one")
    for path in (tmp_path, index):
        with pytest.raises(DataError, match=r"part-2\.bin: expected a file of weights, which pytorch_model"):
            weights_digest(path, "")
    second.write_bytes(b"two")
    both = weights_digest(tmp_path, "")
    assert weights_digest(index, "") == both
    second.write_bytes(b"other")
    assert len({both, weights_digest(tmp_path, ""), file_digest(first), file_digest(index)}) == 4
    (tmp_path / "model.safetensors").write_bytes(b"ours")
    assert weights_digest(tmp_path, "") == file_digest(tmp_path / "model.safetensors")


def files_that_are_opened(checkpoint: Path) -> set[str]:
    """Load a model, and return the files of weights that were opened on the way."""
    opened: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for module, function in ((formats, "load_file"), (unpickle, "load_torch")):
            usual = getattr(module, function)
            patch.setattr(module, function, lambda path, usual=usual: opened.add(Path(path).name) or usual(path))
        HuBERT.from_pretrained(checkpoint)
    return opened


def put_more_files_into(folder: Path, case: str) -> None:
    """Add to a folder of transformers what could be mistaken for its weights."""
    weights = load_file(folder / "model.safetensors")
    if case in ("bin among others", "training_args"):
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    if case == "bin among others":
        save_file({"other": torch.zeros(1)}, folder / "adapter.safetensors")
    elif case == "training_args":
        torch.save({"other": torch.zeros(1)}, folder / "training_args.bin")
    elif case == "torchaudio over transformers":
        HuBERT.from_pretrained(folder).save_pretrained(folder, format="torchaudio")
    elif case == "shards":
        half = len(weights) // 2
        parts = dict(enumerate([dict(list(weights.items())[:half]), dict(list(weights.items())[half:])]))
        for number, part in parts.items():
            save_file(part, folder / f"part-{number}.safetensors")
        names = {name: f"part-{number}.safetensors" for number, part in parts.items() for name in part}
        write_json(folder / "model.safetensors.index.json", {"weight_map": names})
        (folder / "model.safetensors").unlink()
        save_file({"other": torch.zeros(1)}, folder / "part-9.safetensors")


@pytest.mark.parametrize("case", ["bin among others", "training_args", "torchaudio over transformers", "shards"])
def test_the_files_that_are_hashed_are_those_that_are_loaded(released, tmp_path, case):
    HuBERT.from_pretrained(released).save_pretrained(tmp_path, format="transformers")
    put_more_files_into(tmp_path, case)
    loaded = files_that_are_opened(tmp_path)
    assert loaded
    before = weights_digest(tmp_path, "")
    index = {file.name for file in tmp_path.glob("*.index.json")}
    changed_by = set()
    for file in sorted(tmp_path.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        changed_by |= {file.name} if weights_digest(tmp_path, "") != before else set()
        file.write_bytes(content)
    assert changed_by == loaded | index


def test_a_folder_with_a_file_that_is_not_loaded_from_there_is_no_origin(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(DataError, match="given by its own path"):
        HuBERT.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"teacher = .*found none in .*given by its own path"):
        find_origin(str(tmp_path), "teacher")
    assert find_origin(str(tmp_path / "x.pt"), "teacher").sha256 == file_digest(tmp_path / "x.pt")


def test_a_command_that_goes_on_keeps_what_was_found_and_looks_up_another_name(
    material, released, tmp_path, monkeypatch
):
    data, recipe = material
    run = str(tmp_path / "run")
    first = settle(Wishes(run, recipe=str(recipe), data=str(data), overrides=[f"train.init={released}"]))

    def nobody_home(name: str, setting: str) -> Origin:
        raise ConfigError(f"asked for {name}")

    monkeypatch.setattr("hubert.training.init.find_origin", nobody_home)
    assert settle(Wishes(run, overrides=["train.steps=5"])).init == first.init
    with pytest.raises(ConfigError, match="asked for another/model"):
        settle(Wishes(run, overrides=["train.init=another/model"]))
    assert settle(Wishes(run, overrides=["train.init=fresh"])).init == {}


# Dimensions -----------------------------------------------------------------------------------------------------------


def test_an_encoder_of_another_size_is_refused_with_both_sides_and_the_size_that_fits(released):
    settings = TrainSettings(init="facebook/hubert-large-ll60k")
    with pytest.raises(
        ConfigError, match=r"hubert-large-ll60k' has .*dim = 1024.*'base'.*dim = 768.*train\.size = 'large'"
    ):
        check_dimensions(SIZES["large"], settings)
    with pytest.raises(
        ConfigError, match=r"num_layers = 2.*'tiny' with train\.model has.*num_layers = 4.*train\.model"
    ):
        settle_init(TrainSettings(size="tiny", init=str(released)))


def test_dropouts_layerdrop_and_head_need_not_be_those_of_the_encoder(released):
    settings = TrainSettings(
        size="tiny", model=MODEL | {"dropout": 0.2, "layerdrop": 0.1, "final_dim": 8}, init=str(released)
    )
    found = settle_init(settings)
    assert {**found, "config": None} == {**vars(find_origin(str(released), "train.init")), "config": None}
    assert read_config(released).dropout == 0.4


# The trainer ----------------------------------------------------------------------------------------------------------


def test_a_training_starts_with_the_encoders_weights_a_fresh_head_and_the_recipes_dropouts(tmp_path, table, larger):
    job = job_of(tmp_path / "run", table, init=str(larger))
    trainer = Trainer(job.model_copy(update={"init": str(larger)}), ALONE)
    fresh = Trainer(job_of(tmp_path / "fresh", table), ALONE)
    trainer._initialise()
    expected = HuBERT.from_pretrained(larger).state_dict()
    found = trainer.model.hubert.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for name in ("mask_embedding", "class_embeddings"):
        assert torch.equal(getattr(trainer.model, name), getattr(fresh.model, name))
    assert trainer.model.config == fresh.model.config
    assert trainer.model.training


@pytest.mark.parametrize("layout", ["transformers", "torchaudio"])
def test_a_training_goes_on_from_what_another_program_released(tmp_path, table, larger, layout):
    expected = HuBERT.from_pretrained(larger)
    expected.save_pretrained(tmp_path / "theirs", format=layout)
    settings = SETTINGS.model_copy(update={"init": str(tmp_path / "theirs")})
    origin = settle_init(settings)
    job = job_of(tmp_path / "run", table, init=settings.init)
    trainer = Trainer(job.model_copy(update={"init": origin["checkpoint"], "init_sha256": origin["sha256"]}), ALONE)
    trainer._initialise()
    found = trainer.model.hubert.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


def test_a_training_that_goes_on_no_longer_needs_the_encoder_it_started_from(tmp_path, table, larger):
    """20 steps in one go, and 10 + 10 with the encoder's folder gone in between."""
    gone = tmp_path / "encoder"
    jobs = []
    for name, encoder in (("whole", larger), ("parts", shutil.copytree(larger, gone))):
        job = job_of(tmp_path / name, table)
        jobs.append(job.model_copy(update={"init": str(encoder), "init_sha256": weights_digest(encoder, "")}))
    assert train(jobs[0]) is Exit.FINISHED
    train(jobs[1].model_copy(update={"settings": jobs[1].settings.model_copy(update={"steps": 10})}))
    shutil.rmtree(gone)
    assert train(jobs[1]) is Exit.FINISHED
    assert_same_training(tmp_path / "parts", tmp_path / "whole")
    with pytest.raises(ConfigError, match="was trained with other settings"):
        train(jobs[1].model_copy(update={"init_sha256": "another"}))


def test_a_job_written_by_hand_may_name_the_encoder_in_its_settings(tmp_path, table, larger):
    job = job_of(tmp_path / "run", table, init=str(larger))
    write_json(tmp_path / "job.json", job.model_dump(mode="json"))
    found = read_job(tmp_path / "job.json")
    assert (found.init, found.init_sha256) == (str(larger), file_digest(larger / "model.safetensors"))
    content = json.loads((tmp_path / "job.json").read_text())
    content["settings"]["model"]["num_layers"] = 2
    write_json(tmp_path / "job.json", content)
    with pytest.raises(ConfigError, match=r"train\.init = .* has num_layers = 3, but .* num_layers = 2"):
        read_job(tmp_path / "job.json")


def test_a_fresh_training_has_the_identity_that_it_had_before_there_was_a_choice(tmp_path, table):
    assert job_of(tmp_path, table).identity["init"] == "fresh"
