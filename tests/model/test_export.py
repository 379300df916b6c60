"""Out and back: transformers' and torchaudio's own loaders take what we write, bit for bit; the card; the Hub."""

import json
import re
from pathlib import Path

import pytest
import torch
import torchaudio
from safetensors.torch import load_file

from hubert.cli.main import main
from hubert.core.errors import ConfigError, DataError, TransientError, first_line
from hubert.core.paths import RunFolder
from hubert.model.formats.export import push_to_hub, shortcut, torchaudio_config, transformers_config
from hubert.model.hubert import HuBERT, HuBERTPretrain
from hubert.report.model_card import public_part
from hubert.settings.model import SIZES, build_config
from tests.model.test_model import BASE_LIKE, LARGE_LIKE_BIAS, NUM_CLASSES, assert_near, shaken, speech_like
from tests.report.test_report import make_iteration
from tests.support.servers import upload_hub

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = build_config(LARGE_LIKE_BIAS, {"normalize_waveform": True, "dropout": 0.3, "logit_temperature": 0.2})
SECRET = "hf_secret"  # noqa: S105
CONFIGS = pytest.mark.parametrize("config", [BASE_LIKE, ODD], ids=["base", "large"])


def build(config) -> HuBERTPretrain:
    torch.manual_seed(0)
    return shaken(HuBERTPretrain(NUM_CLASSES, config)).eval()


def assert_equal(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(value.equal(theirs[name]) for name, value in ours.items())
    assert actual.config == expected.config
    waveforms = speech_like(1, 4_000)
    encoder, other = getattr(actual, "hubert", actual), getattr(expected, "hubert", expected)
    with torch.inference_mode():
        assert encoder(waveforms).equal(other(waveforms))


@CONFIGS
@pytest.mark.parametrize("kind", ["hubert-flows", "transformers", "torchaudio"])
def test_out_and_back_changes_no_bit(config, kind, tmp_path):
    model = build(config)
    model.hubert.save_pretrained(tmp_path / "encoder", format=kind)
    assert_equal(HuBERT.from_pretrained(tmp_path / "encoder"), model.hubert)
    model.save_pretrained(tmp_path / "whole", format=kind)
    assert_equal(HuBERT.from_pretrained(tmp_path / "whole"), model.hubert)
    if kind != "transformers":
        assert_equal(HuBERTPretrain.from_pretrained(tmp_path / "whole"), model)
        return
    with pytest.warns(UserWarning, match="the head of 23 classes is new"):
        again = HuBERTPretrain.from_pretrained(tmp_path / "whole", NUM_CLASSES)
    assert again.mask_embedding.equal(model.mask_embedding)
    assert again.config == model.config


@CONFIGS
def test_transformers_loads_the_folder_and_computes_our_numbers(config, tmp_path):
    """With nothing missing or left over, through its own preprocessor; saved by it again, the weights are the same."""
    from transformers import AutoFeatureExtractor, HubertModel

    model = build(config)
    model.save_pretrained(tmp_path / "ours", format="transformers")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    theirs, loading = HubertModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.masked_spec_embed.equal(model.mask_embedding)
    prepare = AutoFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert prepare.do_normalize == config.normalize_waveform
    waveforms = 10 * speech_like(1, 6_000)  # loud, so that the two epsilons of normalisation do not show
    inputs = prepare(waveforms[0].numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        found = theirs.eval()(**inputs, output_hidden_states=True)
        layers = model.hubert.get_intermediate_outputs(waveforms, before_residual=False)
        for ours, state in zip(layers[:-1], found.hidden_states[1:-1], strict=True):
            assert_near(ours, state)
        assert_near(model.hubert(waveforms), found.last_hidden_state)
    theirs.save_pretrained(tmp_path / "theirs")
    prepare.save_pretrained(tmp_path / "theirs")
    assert_equal(HuBERT.from_pretrained(tmp_path / "theirs"), model.hubert)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    assert before.keys() == after.keys()

    model.hubert.save_pretrained(tmp_path / "encoder", format="transformers")
    bare, loading = HubertModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    bare.train()(**inputs)  # nothing is masked where no mask embedding was trained


@CONFIGS
def test_torchaudio_builds_what_config_json_says_and_loads_it_strictly(config, tmp_path):
    model = build(config)
    model.hubert.save_pretrained(tmp_path / "encoder", format="torchaudio")
    model.save_pretrained(tmp_path / "whole", format="torchaudio")
    waveforms = speech_like(1, 6_000)
    given = torch.nn.functional.layer_norm(waveforms, waveforms.shape) if config.normalize_waveform else waveforms
    for folder, name in (("encoder", "wav2vec2_model"), ("whole", "hubert_pretrain_model")):
        content = json.loads((tmp_path / folder / "config.json").read_text())
        assert content["function"] == f"torchaudio.models.{name}"
        theirs = getattr(torchaudio.models, name)(**content["arguments"]).eval()
        theirs.load_state_dict(torch.load(tmp_path / folder / content["weights"], weights_only=True))
        assert content["normalize_waveform"] == config.normalize_waveform
        encoder = theirs if folder == "encoder" else theirs.wav2vec2
        with torch.inference_mode():
            assert_near(model.hubert(waveforms), encoder(given)[0])
        torch.save(theirs.state_dict(), tmp_path / folder / "model.pt")  # theirs, saved by torchaudio's users
        again = (HuBERT if folder == "encoder" else HuBERTPretrain).from_pretrained(tmp_path / folder / "model.pt")
        assert_equal(again, model.hubert if folder == "encoder" else model)


@pytest.mark.parametrize("size", ["base", "large", "xlarge"])
def test_exports_of_the_published_sizes_have_the_names_of_torchaudios_and_transformers(size, monkeypatch):
    """Without memory for them: on the meta device."""
    from transformers import HubertConfig, HubertModel

    from hubert.model.formats.layouts import HEAD, rename

    with torch.device("meta"):
        ours = HuBERTPretrain(500, size)
        wav2vec2 = getattr(torchaudio.models, shortcut(SIZES[size]))()
        hubert = HubertModel(HubertConfig(**transformers_config(SIZES[size], has_mask=True)))
    head = {name: value for name, value in ours.state_dict().items() if name in HEAD}
    for theirs, layout, part in ((wav2vec2, "torchaudio", None), (hubert, "transformers", head)):
        renamed = rename(layout, ours.hubert.state_dict(), part)
        assert {name: value.shape for name, value in renamed.items()} == {
            name: value.shape for name, value in theirs.state_dict().items()
        }
    assert shortcut(SIZES["tiny"]) == ""


def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    model = build(build_config(BASE_LIKE, {"layer_norm_eps": 1e-6}))
    with pytest.raises(ConfigError, match="layer_norm_eps = 1e-06: torchaudio's models have 1e-05 only"):
        model.save_pretrained(tmp_path / "out", format="torchaudio")
    with pytest.raises(
        ConfigError, match="format 'onnx' does not exist; formats: hubert-flows, transformers, torchaudio"
    ):
        model.save_pretrained(tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", format="transformers")
    assert HuBERT.from_pretrained(tmp_path / "out").config.layer_norm_eps == 1e-6
    assert torchaudio_config(BASE_LIKE, None)["arguments"]["aux_num_out"] is None


def test_an_export_into_the_folder_of_another_one_is_what_is_read(tmp_path):
    old, new = build(BASE_LIKE), build(BASE_LIKE)
    with torch.no_grad():
        new.hubert.projection.bias.add_(1)
    for kind in ("torchaudio", "transformers", "torchaudio", "hubert-flows", "transformers"):
        new.save_pretrained(tmp_path, format=kind)
        assert_equal(HuBERT.from_pretrained(tmp_path), new.hubert)
        old, new = new, old
    content = json.loads((tmp_path / "config.json").read_text())
    content["hubert_flows"]["dropout"] = 7
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"hubert_flows: dropout = 7: .*edited, or written by another version"):
        HuBERT.from_pretrained(tmp_path)


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[RunFolder, HuBERTPretrain]:
    """A run of two finished iterations, with the second one's report and checkpoint."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "my-run")
    make_iteration(folder.root, 1)
    stage = make_iteration(folder.root, 2)
    stage.run()
    model = build(BASE_LIKE)
    model.save_pretrained(Path(stage.outcome.checkpoint))
    return folder, model


def test_a_run_is_exported_with_a_card_that_tells_its_figures(run, tmp_path, capsys):
    folder, model = run
    output = tmp_path / "out"
    assert main(["export", str(folder.root), "--format", "transformers", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    outcome = json.loads(folder.outcome(2).read_text())
    assert f"step {outcome['step']:,} of iteration 2; best layer {outcome['layer']}: {outcome['why']}" in printed
    assert_equal(HuBERT.from_pretrained(output), model.hubert)
    assert load_file(output / "model.safetensors")["masked_spec_embed"].equal(model.mask_embedding)
    card = (output / "README.md").read_text()
    report = json.loads(next(folder.iteration(2).glob("report-*/report.json")).read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# my-run, iteration 2" in card
    assert f"| layer to use | {outcome['layer']}: {outcome['why']} |" in card
    assert f"`{outcome['sha256']}`" in card
    assert f"| validation loss (nats) | {report['row']['validation_loss']:.3f} |" in card
    assert "| audio | 0.68 hours in 420 files |" in card
    for row in report["layers"]:
        name = f"**{row['name']}**" if row["chosen"] else row["name"]
        assert f"| {name} | {row['abx_within']:.2f} | {row['abx_across']:.2f} |" in card
    assert report["recipe"] in card
    assert f"hidden_states[{outcome['layer']}]" in card
    assert "Not stated" in card
    assert "license:" not in card.split("---")[1], "which a person has to say"
    assert str(folder.root) not in card, "no folder of this machine"
    assert (
        main(["export", str(folder.root), "--iteration", "3", "--format", "torchaudio", "--output", str(output)]) == 2
    )
    assert "no outcome of iteration 3 (finished: 1, 2)" in capsys.readouterr().err


def test_a_card_tells_neither_places_nor_secrets_in_addresses():
    value = {"a": "/home/me/x.pt", "b": ["https://me:secret@host/x.pt?signature=SECRET#s"], "c": None}
    assert public_part(value) == {"a": "x.pt", "b": ["https://host/x.pt"]}


def test_the_cards_python_runs(run, tmp_path, monkeypatch):
    """What the card tells a reader to type, with the folder's name in it."""
    folder, model = run
    waveforms = 10 * speech_like(1, 4_000)
    layer = json.loads(folder.outcome(2).read_text())["layer"]
    for kind in ("transformers", "torchaudio", "hubert-flows"):
        output = tmp_path / kind
        assert main(["export", str(folder.root), "--format", kind, "--output", str(output)]) == 0
        code = re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)[1]
        monkeypatch.chdir(output)
        names = {"samples": waveforms[0].numpy()}
        exec(code.replace("FOLDER OR REPOSITORY", str(output)), names)  # noqa: S102
        with torch.inference_mode():
            if kind == "transformers" and layer < BASE_LIKE.num_layers:
                ours = model.hubert.get_intermediate_outputs(waveforms, before_residual=False)[layer - 1]
                assert_near(names["frames"], ours)
            elif kind == "torchaudio":
                assert_near(names["model"](waveforms)[0], model.hubert(waveforms))
            elif kind == "hubert-flows":
                assert_equal(names["model"], model.hubert)


def test_the_mask_embedding_of_a_transformers_model_stays_when_it_is_exported_again(tmp_path):
    build(BASE_LIKE).save_pretrained(tmp_path / "theirs", format="transformers")
    assert (
        main(["export", str(tmp_path / "theirs"), "--format", "transformers", "--output", str(tmp_path / "ours")]) == 0
    )
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "theirs" / "config.json").read_text() == (tmp_path / "ours" / "config.json").read_text()


def test_a_checkpoint_is_exported_without_a_run(run, tmp_path, capsys):
    folder, model = run
    checkpoint = json.loads(folder.outcome(2).read_text())["checkpoint"]
    output = tmp_path / "out"
    assert main(["export", checkpoint, "--format", "torchaudio", "--head", "--output", str(output)]) == 0
    assert_equal(HuBERTPretrain.from_pretrained(output), model)
    card = (output / "README.md").read_text()
    assert "How it was made" not in card
    assert "Pretrained with hubert-flows" not in card  # it may be anybody's
    model.hubert.save_pretrained(tmp_path / "encoder")
    assert main(["export", str(tmp_path / "encoder"), "--format", "transformers", "--output", str(output)]) == 0
    for arguments, message in (
        ([checkpoint, "--iteration", "1", "--format", "torchaudio"], "only runs have iterations"),
        ([checkpoint, "--head", "--format", "transformers"], "transformers has no pretraining head"),
        ([str(tmp_path / "encoder"), "--head", "--format", "torchaudio"], "an encoder without a pretraining head"),
        (["no-such-run", "--format", "torchaudio"], "run 'no-such-run'"),
    ):
        assert main(["export", *arguments, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err


# The Hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    with upload_hub(monkeypatch) as started:
        yield started


def assert_all_signed(handler) -> None:
    """Whatever is about the repository bears the token; huggingface_hub asks for other things without it."""
    tokens = [token for path, token, _ in handler.requests if "repos/create" in path or "/me/model" in path]
    assert len(tokens) >= 3
    assert set(tokens) == {f"Bearer {SECRET}"}


def test_a_pushed_folder_arrives_on_the_hub(hub, tmp_path):
    handler, address = hub
    build(BASE_LIKE).save_pretrained(tmp_path, format="transformers")
    (tmp_path / "README.md").write_text("# A model\n")
    (tmp_path / "notes.txt").write_text("not meant for the public")
    url = push_to_hub(tmp_path, "me/model", token=SECRET, private=True)
    assert url == f"{address}/me/model/commit/abc"
    created = next(body for path, _, body in handler.requests if path.endswith("/repos/create"))
    assert created["name"] == "model"
    assert created.get("private") is True or created.get("visibility") == "private"
    assert_all_signed(handler)
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(handler.files) == names
    assert all(handler.files[name] == (tmp_path / name).read_bytes() for name in names)


def test_a_push_that_fails_says_why(hub, tmp_path, monkeypatch):
    handler, _ = hub
    build(BASE_LIKE).save_pretrained(tmp_path / "model", format="torchaudio")
    handler.status = 403
    with pytest.raises(ConfigError, match=r"me/model: the Hub refused \(403\).*token"):
        push_to_hub(tmp_path / "model", "me/model", token=SECRET)
    with pytest.raises(ConfigError, match="not a name"):
        push_to_hub(tmp_path / "model", "not a name/at all/", token=SECRET)
    with pytest.raises(DataError, match=r"expected an exported model.*Fix: hubert export"):
        push_to_hub(tmp_path, "me/model", token=SECRET)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="cannot be reached"):
        push_to_hub(tmp_path / "model", "me/model", token=SECRET)


def test_what_another_library_says_of_an_error_stands_in_one_line():
    error = ValueError("\n  WeightsUnpickler error: too deep \nlong advice")
    assert first_line(error) == "WeightsUnpickler error: too deep"
    assert first_line(error, after="error: ") == "too deep"
    assert first_line(error, after="not there") == "WeightsUnpickler error: too deep"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 999))) == 200


def test_hubert_push_uses_the_token_of_the_environment(hub, tmp_path, monkeypatch, capsys):
    handler, address = hub
    build(BASE_LIKE).save_pretrained(tmp_path / "model", format="transformers")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert main(["push", str(tmp_path / "model"), "me/model"]) == 0
    assert capsys.readouterr().out.strip().endswith(f"{address}/me/model/commit/abc")
    assert_all_signed(handler)
    assert "model.safetensors" in handler.files
