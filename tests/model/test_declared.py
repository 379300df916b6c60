"""What configurations of other programs say: it agrees with the weights, and what this model cannot compute is refused.

The independent truth is transformers, which writes the folders and computes the numbers; fairseq's files have its layout.
"""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hubert.core.errors import ConfigError, DataError
from hubert.features.source import FeatureSource
from hubert.model.formats.declared import fairseq_settings
from hubert.model.formats.layouts import LAYOUTS, convert
from hubert.model.hubert import HuBERT
from hubert.model.weights import read_config, weights_digest
from hubert.settings.model import build_config
from hubert.settings.sections import FeatureSettings, TrainSettings
from hubert.training.init import settle_init
from tests.model.test_layouts import assert_same_numbers, run_transformers, transformers_encoder
from tests.model.test_model import BASE_LIKE, LARGE_LIKE, LARGE_LIKE_BIAS, SMALL, assert_near, speech_like
from tests.support.golden_lists import random_weights, small_shapes

pytestmark = pytest.mark.usefixtures("one_thread")

CONVS = "[(24, 10, 5)] + [(24, 3, 2)] * 4 + [(24,2,2)] * 2"  # as in SMALL, as fairseq writes them


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def fairseq_names(model: nn.Module) -> dict[str, Tensor]:
    """Return an encoder of transformers as fairseq names its weights."""
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    weights = {}
    for name, value in convert(model.state_dict()).encoder.items():
        theirs = LAYOUTS["fairseq"].write(name)
        for new, before in old.items():
            theirs = theirs.replace(new, before)
        weights[theirs] = value
    return weights


def fairseq_cfg(**changes: Any) -> dict[str, Any]:
    """Return the configuration that fairseq keeps beside the weights of BASE_LIKE."""
    model = {
        "_name": "hubert",
        "label_rate": 100.0,
        "extractor_mode": "default",
        "encoder_layers": 3,
        "encoder_embed_dim": 32,
        "encoder_ffn_embed_dim": 48,
        "encoder_attention_heads": 4,
        "activation_fn": "gelu",
        "layer_type": "transformer",
        "layer_norm_first": False,
        "conv_feature_layers": CONVS,
        "conv_bias": False,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "conv_pos_batch_norm": False,
        "pos_conv_depth": 1,
        "attn_type": "",
        "pos_enc_type": "abs",
    }
    task = {"_name": "hubert_pretraining", "normalize": False, "sample_rate": 16_000, "label_rate": 100.0}
    for name, value in changes.items():
        (task if name in task and name != "_name" and name not in model else model)[name] = value
    return {"model": model, "task": task}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return transformers_encoder(BASE_LIKE)


@pytest.fixture
def folder(base, tmp_path):
    base.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


# Configuration against weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "ours", "has"),
    [
        ("num_hidden_layers", 4, "num_layers", "3"),
        ("hidden_size", 64, "dim", "32"),
        ("intermediate_size", 96, "ffn_dim", "48"),
        ("feat_extract_norm", "layer", "extractor_norm", "group"),
        ("conv_bias", True, "conv_bias", "False"),
        ("conv_kernel", [10, 3, 3, 3, 3, 2, 3], "conv_layers", r"\(24, 2\)"),
        ("conv_dim", [24] * 6 + [32], "conv_layers", r"\(24, 2\)"),
        ("num_conv_pos_embeddings", 32, "pos_conv_kernel", "16"),
        ("num_conv_pos_embedding_groups", 8, "pos_conv_groups", "4"),
    ],
)
def test_a_config_json_that_is_not_of_these_weights_is_refused_with_both(folder, name, value, ours, has):
    edit_json(folder / "config.json", **{name: value})
    shown = re.escape(str(value)) if name not in {"conv_kernel", "conv_dim"} else r"\(\(24, 10\)"
    with pytest.raises(DataError, match=rf"{ours} \([^)]*{name}.*\) is {shown}.* in the configuration and .*{has}"):
        HuBERT.from_pretrained(folder)


def test_a_configuration_whose_lists_of_convolutions_differ_in_length_is_refused(folder):
    edit_json(folder / "config.json", conv_stride=[5, 2, 2, 2, 2, 2])
    with pytest.raises(
        DataError, match="as many values in each of conv_dim, conv_kernel, conv_stride, found.*'conv_stride': 6"
    ):
        HuBERT.from_pretrained(folder)


def test_strides_of_another_frame_are_refused(folder):
    edit_json(folder / "config.json", conv_stride=[5, 2, 2, 2, 2, 2, 1])
    with pytest.raises(DataError, match="a frame of .* samples every 160"):
        HuBERT.from_pretrained(folder)


def test_a_model_that_lost_its_last_layer_is_refused_in_every_form(base, tmp_path):
    weights = {
        name: value for name, value in base.state_dict().items() if "layers.2." not in name or "conv_layers" in name
    }
    base.save_pretrained(tmp_path / "hf", state_dict=weights)
    with pytest.raises(DataError, match=r"num_layers .* is 3 in the configuration and 2 in the weights"):
        HuBERT.from_pretrained(tmp_path / "hf")
    named = fairseq_names(base)
    part = {name: value for name, value in named.items() if not name.startswith("encoder.layers.2.")}
    torch.save({"cfg": fairseq_cfg(), "model": part}, tmp_path / "base.pt")
    with pytest.raises(
        DataError, match=r"num_layers .*encoder_layers\) is 3 in the configuration and 2 in the weights"
    ):
        HuBERT.from_pretrained(tmp_path / "base.pt")


def test_our_own_export_whose_two_configurations_differ_is_refused(tmp_path):
    HuBERT(BASE_LIKE).save_pretrained(tmp_path, "transformers")
    assert HuBERT.from_pretrained(tmp_path).config == BASE_LIKE
    edit_json(tmp_path / "config.json", layer_norm_eps=1e-3)
    with pytest.raises(DataError, match=r"layer_norm_eps = 0.001, and hubert_flows.layer_norm_eps = 1e-05"):
        HuBERT.from_pretrained(tmp_path)


@pytest.mark.parametrize("fault", ["lost", "surplus", "moved"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_index_is_what_its_parts_hold(base, tmp_path, form, fault):
    from safetensors.torch import load_file, save_file

    base.save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    files = sorted(set(listed.values()))
    assert len(files) > 1
    parts = {name: load_file(tmp_path / name) for name in files}
    victim = next(name for name, holder in listed.items() if holder == files[-1])
    if fault == "moved":
        parts[files[0]][victim] = parts[files[-1]].pop(victim)
    elif fault == "lost":
        del parts[files[-1]][victim]
    else:
        parts[files[0]]["encoder.layers.9.final_layer_norm.bias"] = torch.zeros(32)
    for name, part in parts.items():
        (tmp_path / name).unlink()
        if form == "bin":
            torch.save(part, tmp_path / name.replace("model", "pytorch_model").replace("safetensors", "bin"))
        else:
            save_file(part, tmp_path / name)
    if form == "bin":
        index.unlink()
        renamed = {
            key: name.replace("model", "pytorch_model").replace("safetensors", "bin") for key, name in listed.items()
        }
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": renamed}))
    message = {
        "lost": "1 missing .*; 0 not listed",
        "surplus": "0 missing; 1 not listed",
        "moved": "0 missing; 1 not listed",
    }
    with pytest.raises(DataError, match=rf"lists for it, found \d+: {message[fault]}"):
        HuBERT.from_pretrained(tmp_path)


def test_one_part_of_several_is_no_smaller_model(base, tmp_path):
    """The first part holds everything but the last layers: it would pass for a model of fewer."""
    from safetensors.torch import save_file

    weights = {name: value.contiguous() for name, value in base.state_dict().items() if "encoder.layers.2." not in name}
    part = tmp_path / "model-00001-of-00002.safetensors"
    save_file(weights, part)
    with pytest.raises(DataError, match="part 1 of 2.*give the folder with all parts"):
        HuBERT.from_pretrained(part)
    with pytest.raises(DataError, match="part 1 of 2"):
        weights_digest(part, "teacher")


# What this model cannot compute -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn": "relu"}, "activation_fn = 'relu'"),
        ({"activation_fn": "gelu_fast"}, "activation_fn = 'gelu_fast'"),
        ({"layer_type": "conformer"}, "layer_type = 'conformer'"),
        ({"pos_conv_depth": 5}, "pos_conv_depth = 5"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm = True.*mHuBERT at 25 Hz"),
        ({"attn_type": "espnet"}, "attn_type = 'espnet'"),
        ({"label_rate": 25}, "label_rate = 25: .*mHuBERT at 25 Hz"),
        ({"sample_rate": 8_000}, "sample_rate = 8000"),
        ({"_name": "wav2vec2"}, "'wav2vec2'"),
        ({"extractor_mode": "batch"}, "extractor_mode = 'batch'; expected one of default, layer_norm"),
        ({"extractor_mode": "layer_norm"}, "extractor_norm .* is layer in the configuration and group in the weights"),
        ({"conv_feature_layers": CONVS.replace("10, 5", "10, 10")}, "a frame of .* samples every 640"),
        ({"conv_feature_layers": CONVS + " + [(24, 2, 2)]"}, "conv_layers .*conv_feature_layers"),
        ({"conv_feature_layers": "__import__('os').system('false')"}, "conv_feature_layers = .*fairseq's list"),
        ({"conv_feature_layers": "[(1, 1, 1)] * 9999999999"}, "conv_feature_layers = .*fairseq's list"),
        ({"encoder_ffn_embed_dim": 96}, "ffn_dim .*encoder_ffn_embed_dim.* is 96 in the configuration and 48"),
        ({"encoder_embed_dim": 64}, "dim .*encoder_embed_dim.* is 64"),
        ({"conv_pos": 95}, "pos_conv_kernel .*conv_pos.* is 95"),
        ({"conv_bias": True}, "conv_bias .* is True"),
    ],
)
@pytest.mark.parametrize("place", ["cfg", "args", "s3prl", "fine-tuned"])
def test_fairseqs_configuration_is_obeyed_or_refused_wherever_it_stands(base, tmp_path, place, changes, message):
    def write(cfg: dict[str, Any]) -> Path:
        weights = fairseq_names(base)
        flat = SimpleNamespace(**{**cfg["task"], **cfg["model"]})
        content = {
            "cfg": {"cfg": cfg, "model": weights},
            "args": {"args": vars(flat), "cfg": None, "model": weights},
            "s3prl": {"model_cfg": cfg["model"], "task_cfg": cfg["task"], "model_weight": weights},
            "fine-tuned": {"cfg": {"model": {"_name": "hubert_ctc", "w2v_args": cfg}, "task": {}}, "model": weights},
        }
        torch.save(content[place], tmp_path / "base.pt")
        return tmp_path / "base.pt"

    assert HuBERT.from_pretrained(write(fairseq_cfg())).config.num_layers == 3
    with pytest.raises(DataError, match=message):
        HuBERT.from_pretrained(write(fairseq_cfg(**changes)))


def test_fairseqs_own_spelling_of_strides_and_rates_loads_and_gives_the_same_numbers(base, tmp_path):
    """label_rate 100 is the first iteration's, of labels from MFCC: fairseq takes every second one."""
    torch.save({"cfg": fairseq_cfg(label_rate=50), "model": fairseq_names(base)}, tmp_path / "base.pt")
    model = HuBERT.from_pretrained(tmp_path / "base.pt")
    assert model.config.conv_layers == BASE_LIKE.conv_layers
    waveforms = speech_like(1, 3_000)
    with torch.inference_mode():
        assert_same_numbers(model, waveforms, *run_transformers(base, waveforms))
    assert fairseq_settings({"cfg": fairseq_cfg(conv_feature_layers=[[24, 10, 5]])})["conv_layers"] == ((24, 10, 5),)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new'"),
        ("config.json", {"add_adapter": True}, "add_adapter = True"),
        ("preprocessor_config.json", {"sampling_rate": 8_000}, "sampling_rate = 8000"),
    ],
)
def test_what_transformers_would_compute_otherwise_is_refused(folder, file, changes, message):
    edit_json(folder / file, **changes)
    with pytest.raises(DataError, match=message):
        HuBERT.from_pretrained(folder)


def mhubert_25_hz() -> nn.Module:
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    return HubertModel(
        HubertConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=96,
            conv_dim=[24] * 8,
            conv_kernel=[10, 3, 3, 3, 3, 2, 2, 2],
            conv_stride=[5, 2, 2, 2, 2, 2, 2, 2],
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            conv_pos_batch_norm=True,
        )
    )


@pytest.mark.parametrize("form", ["folder", "weights", "fairseq", "fairseq with cfg"])
def test_the_mhubert_of_25_hz_is_refused_by_its_name(tmp_path, form):
    model = mhubert_25_hz()
    if form == "folder":
        model.save_pretrained(tmp_path / form)
    else:
        weights = model.state_dict()
        if "fairseq" in form:
            for theirs, ours in (
                (r"conv_layers\.(\d+)\.conv\.", r"conv_layers.\1.0."),
                (r"conv_layers\.0\.layer_norm\.", "conv_layers.0.2."),
                (r"^feature_projection\.layer_norm\.", "layer_norm."),
                (r"^feature_projection\.projection\.", "post_extract_proj."),
                (r"encoder\.pos_conv_embed\.batch_norm\.", "encoder.pos_conv.0."),
                (r"encoder\.pos_conv_embed\.conv\.", "encoder.pos_conv.1."),
                (r"\.attention\.", ".self_attn."),
                (r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
                (r"feed_forward\.intermediate_dense", "fc1"),
                (r"feed_forward\.output_dense", "fc2"),
                ("masked_spec_embed", "mask_emb"),
            ):
                weights = {re.sub(theirs, ours, name): value for name, value in weights.items()}
        cfg = fairseq_cfg(conv_pos_batch_norm=True, label_rate=25)
        torch.save({"model": weights} | ({"cfg": cfg} if "cfg" in form else {}), tmp_path / form)
    with pytest.raises(DataError, match="mHuBERT at 25 Hz"):
        HuBERT.from_pretrained(tmp_path / form)


# Normalised waveforms -----------------------------------------------------------------------------------------------


def both_files(base: nn.Module, root: Path, name: str) -> tuple[Path, Path]:
    """Write what mHuBERT-147 is published as: a folder of transformers, and fairseq's file."""
    base.save_pretrained(root / name)
    edit_json(root / name / "preprocessor_config.json", do_normalize=True, sampling_rate=16_000)
    torch.save({"cfg": fairseq_cfg(normalize=True), "model": fairseq_names(base)}, root / f"{name}.pt")
    return root / name, root / f"{name}.pt"


def test_an_argument_says_that_a_base_model_normalises_and_wins(base, tmp_path):
    folder, file = both_files(base, tmp_path, "theirs")
    with pytest.warns(UserWarning, match="do_normalize = true, which is not followed.*normalize_waveform=True") as seen:
        as_told = HuBERT.from_pretrained(folder)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said, fairseqs = HuBERT.from_pretrained(folder, normalize_waveform=True), HuBERT.from_pretrained(file)
        not_said = HuBERT.from_pretrained(folder, normalize_waveform=False)
        off = HuBERT.from_pretrained(file, normalize_waveform=False)
    quiet = 0.003 * speech_like(1, 8_000) / speech_like(1, 8_000).std()
    normalised = nn.functional.layer_norm(quiet, quiet.shape)
    with torch.inference_mode():
        assert_near(said(quiet), base(normalised).last_hidden_state)
        assert said(quiet).equal(fairseqs(quiet))
        assert_near(off(quiet), base(quiet).last_hidden_state)
        assert not_said(quiet).equal(as_told(quiet))
        assert not torch.allclose(said(quiet), off(quiet), atol=1e-2)
    HuBERT(BASE_LIKE).save_pretrained(tmp_path / "ours")
    for mine in (tmp_path / "ours", tmp_path / "ours" / "model.safetensors"):
        assert HuBERT.from_pretrained(mine, normalize_waveform=True).config.normalize_waveform
        assert not HuBERT.from_pretrained(mine).config.normalize_waveform


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mHuBERT-147", True),
        ("models--utter-project--mHuBERT-147/snapshots/1a2b", True),
        ("mHuBERT-147-base-2nd-iter", True),
        ("hubert-base-ls960", False),
    ],
)
def test_base_models_whose_training_is_known_load_as_they_were_trained_without_a_warning(
    base, tmp_path, name, expected
):
    folder, _ = both_files(base, tmp_path, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HuBERT.from_pretrained(folder).config.normalize_waveform is expected


def test_a_large_model_follows_do_normalize_without_a_warning(tmp_path):
    transformers_encoder(LARGE_LIKE).save_pretrained(tmp_path)
    for told in (True, False):
        edit_json(tmp_path / "preprocessor_config.json", do_normalize=told)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert HuBERT.from_pretrained(tmp_path).config.normalize_waveform is told


def test_a_teachers_normalisation_is_part_of_the_features_only_where_it_is_said(base, tmp_path):
    """The identity of features, which is in the keys, stays what it was for every run that does not say it."""
    folder, _ = both_files(base, tmp_path, "theirs")
    sha256 = weights_digest(folder, "teacher")
    with pytest.warns(UserWarning, match="not followed"):
        before = FeatureSource.of_layer(folder, sha256, 2, FeatureSettings(), name="theirs")
    assert before.identity == {
        "kind": "layer",
        "sha256": sha256,
        "layer": 2,
        "before_residual": False,
        "dtype": "float32",
    }
    assert FeatureSettings().key_settings() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = FeatureSource.of_layer(folder, sha256, 2, FeatureSettings(normalize_waveform=True), name="theirs")
        assert read_config(folder, normalize_waveform=True).normalize_waveform
    assert said.identity == before.identity | {"normalize_waveform": True}
    assert FeatureSource(**before.record) == before
    assert FeatureSource(**said.record) == said
    with pytest.warns(UserWarning, match="not followed"):
        own = FeatureSource.of_layer(folder, sha256, 2, FeatureSettings(normalize_waveform=False))
    assert own.normalize_waveform is None, "a run's own checkpoint says itself how it was trained"


def test_features_of_a_teacher_are_those_of_the_model_with_the_argument(base, tmp_path):
    from hubert.features.extract import FeatureExtractor

    folder, _ = both_files(base, tmp_path, "theirs")
    source = FeatureSource.of_layer(
        folder, weights_digest(folder, "teacher"), 2, FeatureSettings(normalize_waveform=True), name="theirs"
    )
    waveform = 0.01 * speech_like(1, 8_000)
    (features,) = FeatureExtractor(source)([waveform[0]])
    model = HuBERT.from_pretrained(folder, normalize_waveform=True)
    with torch.inference_mode():
        assert_near(features.cpu(), model.get_intermediate_outputs(waveform, before_residual=False)[1][0])


def test_a_training_that_goes_on_may_say_that_its_encoder_normalises(base, tmp_path):
    folder, _ = both_files(base, tmp_path, "theirs")
    dimensions = {name: value for name, value in SMALL.items() if name != "final_dim"}
    train = TrainSettings(size="base", model=dimensions, init=str(folder))
    with pytest.warns(UserWarning, match="not followed"):
        settled = settle_init(train)
    base_kind = build_config("base").model_dump(include={"extractor_norm", "layer_norm_first"})
    large = TrainSettings(size="large", model={**dimensions, **base_kind}, init=str(folder))
    with pytest.raises(ConfigError, match="normalize_waveform = False.*normalize_waveform = True"):
        settle_init(large, settled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settle_init(TrainSettings(size="base", model={**dimensions, "normalize_waveform": True}, init=str(folder)))


# Weights beside the encoder -----------------------------------------------------------------------------------------


def test_a_final_projection_beside_a_hubert_model_is_left_out_with_one_warning(tmp_path):
    """ContentVec's HubertModelWithFinalProj, as it is published."""
    from transformers import HubertConfig, HubertModel

    class HubertModelWithFinalProj(HubertModel):
        def __init__(self, config):
            super().__init__(config)
            self.final_proj = nn.Linear(config.hidden_size, config.classifier_proj_size)

    plain = transformers_encoder(BASE_LIKE)
    config = HubertConfig(**{**plain.config.to_dict(), "classifier_proj_size": 7})
    torch.manual_seed(0)
    model = HubertModelWithFinalProj(config).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"2 weights stand beside.*final_proj\.bias.*final_proj\.weight") as seen:
        ours = HuBERT.from_pretrained(tmp_path)
    assert len(seen) == 1
    waveforms = speech_like(1, 3_000)
    with torch.inference_mode():
        assert_near(ours(waveforms), model(waveforms).last_hidden_state)


@pytest.mark.parametrize("program", ["transformers", "fairseq", "torchaudio", "minimal_hubert"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder.layers.0.attention.q_proj.lora_A.weight", "LoRA.*merge_and_unload"),
        ("encoder.layers.1.adapter_layer.linear_1.weight", "adapters"),
        ("adapter.layers.0.conv.weight", "adapters"),
        ("encoder.layers.0.attention.gru_rel_pos_const", "WavLM"),
        ("quantizer.codevectors", "wav2vec 2.0"),
    ],
)
def test_what_changes_the_encoder_is_refused_and_named(program, name, message):
    weights = random_weights(small_shapes(program, "base"))
    with pytest.raises(DataError, match=rf"0 missing; 1 unexpected \({re.escape(name)}\).*{message}"):
        convert(weights | {name: torch.zeros(3)})


def test_two_encoders_in_one_file_are_refused_with_both_places():
    weights = random_weights(small_shapes("transformers", "base"))
    weights = {name.removeprefix("hubert."): value for name, value in weights.items() if not name.startswith("lm_head")}
    both = {f"{place}.{name}": value for place in ("student", "teacher") for name, value in weights.items()}
    with pytest.raises(DataError, match="several encoders in one file, behind 'student.', 'teacher.'"):
        convert(both)
    with pytest.warns(UserWarning, match="1 weights stand beside the encoder.*predictor.layer_norm.weight"):
        assert convert(
            {f"student.{name}": value for name, value in weights.items()}
            | {"predictor.layer_norm.weight": torch.zeros(3)}
        )


def test_quantised_weights_are_named(tmp_path):
    from safetensors.torch import save_file

    weights = transformers_encoder(LARGE_LIKE_BIAS).state_dict()
    name = "encoder.layers.0.attention.q_proj"
    packed = {key: value.contiguous() for key, value in weights.items()}
    packed |= {f"{name}.weight": torch.zeros(32, 32, dtype=torch.int8), f"{name}.SCB": torch.ones(32)}
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="quantised weights"):
        HuBERT.from_pretrained(tmp_path / "model.safetensors")
