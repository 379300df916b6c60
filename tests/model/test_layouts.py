"""Other programs' weights: told apart, sized, loaded; and the same numbers as the programs themselves."""

import re
from types import SimpleNamespace

import pytest
import torch
import torchaudio
from torch import Tensor, nn

from hubert.core.errors import ConfigError, DataError
from hubert.model.formats.declared import fairseq_settings, transformers_settings
from hubert.model.formats.dimensions import infer_config
from hubert.model.formats.layouts import HEAD, LAYOUTS, class_rows, convert, rename, unwrap
from hubert.model.hubert import HuBERT, HuBERTPretrain
from hubert.settings.model import SIZES, ModelConfig, build_config
from tests.model.test_model import (
    BASE_LIKE,
    CONFIGS,
    LARGE_LIKE_BIAS,
    QUIET,
    SMALL,
    assert_near,
    shaken,
    speech_like,
    torchaudio_encoder,
)
from tests.support.golden_lists import PROGRAMS, golden_shapes, random_weights, small_shapes

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [400, 719, 16_000, 160_000]


def transformers_encoder(config: ModelConfig, **changes) -> nn.Module:
    """Build transformers' encoder with our dimensions and random weights in every parameter."""
    from transformers import HubertConfig, HubertModel

    channels, kernels, strides = zip(*config.conv_layers, strict=True)
    settings = {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_dim,
        "conv_dim": channels,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "conv_bias": config.conv_bias,
        "feat_extract_norm": config.extractor_norm,
        "do_stable_layer_norm": config.layer_norm_first,
        "num_conv_pos_embeddings": config.pos_conv_kernel,
        "num_conv_pos_embedding_groups": config.pos_conv_groups,
    }
    return shaken(HubertModel(HubertConfig(**settings | changes))).eval()


def first_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def run_transformers(model: nn.Module, waveforms: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return the layers' outputs, those of their feed-forward parts, and the model's output, by hooks."""
    layers: list[Tensor] = []
    ffn: list[Tensor] = []
    handles = []
    for layer in model.encoder.layers:
        handles.append(layer.register_forward_hook(lambda _m, _i, output: layers.append(first_of(output))))
        handles.append(layer.feed_forward.register_forward_hook(lambda _m, _i, output: ffn.append(output)))
    found = model(waveforms, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    for state, layer in zip(found.hidden_states[1:-1], layers[:-1], strict=True):
        assert state.equal(layer)
    # Of the last one versions differ: the layer's output, or after the LayerNorm that large models end with.
    assert any(found.hidden_states[-1].equal(last) for last in (layers[-1], found.last_hidden_state))
    return layers, ffn, found.last_hidden_state


def assert_same_numbers(
    model: HuBERT, waveforms: Tensor, layers: list[Tensor], ffn: list[Tensor], output: Tensor
) -> None:
    full = model.get_intermediate_outputs(waveforms, before_residual=False)
    before = model.get_intermediate_outputs(waveforms, before_residual=True)
    assert len(full) == len(layers) == len(before) == len(ffn) == model.config.num_layers
    for ours, theirs in zip([*full, *before], [*layers, *ffn], strict=True):
        assert_near(ours, theirs)
    assert_near(model(waveforms), output)


# The same numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", LENGTHS)
@CONFIGS
def test_transformers_weights_give_transformers_numbers(config, samples):
    reference = transformers_encoder(config)
    model = HuBERT(config).eval()
    model.load_state_dict(reference.state_dict())
    waveforms = speech_like(1, samples)
    with torch.inference_mode():
        assert_same_numbers(model, waveforms, *run_transformers(reference, waveforms))


@pytest.mark.parametrize("samples", LENGTHS)
@CONFIGS
def test_torchaudios_weights_give_torchaudios_numbers(config, samples):
    reference = torchaudio_encoder(config).eval()
    model = HuBERT(config).eval()
    model.load_state_dict(reference.state_dict())
    ffn: list[Tensor] = []
    for layer in reference.encoder.transformer.layers:
        layer.feed_forward.register_forward_hook(lambda _module, _inputs, output: ffn.append(output))
    waveforms = speech_like(1, samples)
    with torch.inference_mode():
        layers, _ = reference.extract_features(waveforms)
        ffn.clear()
        output, _ = reference(waveforms)
        assert_same_numbers(model, waveforms, layers, ffn, output)


def test_the_whole_base_model_is_loaded_from_transformers_and_torchaudio():
    """One set of weights, through both, and through ours by both ways."""
    with torch.device("meta"):
        reference, theirs = transformers_encoder(SIZES["base"]), torchaudio.models.hubert_base().eval()
        model, again = HuBERT("base").eval(), HuBERT("base").eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in reference.to_empty(device="cpu").state_dict().items():
        is_scale = name.endswith(("norm.weight", "original0"))
        value.normal_(mean=float(is_scale), std=0.1 if value.ndim == 1 else 0.03, generator=generator)
    model.load_state_dict(reference.state_dict(), assign=True)
    theirs.load_state_dict(rename("torchaudio", model.state_dict()), assign=True)
    again.load_state_dict(theirs.state_dict(), assign=True)
    waveforms = speech_like(1, 8_000)
    with torch.inference_mode():
        assert_same_numbers(model, waveforms, *run_transformers(reference, waveforms))
        assert again(waveforms).equal(model(waveforms))
        assert_near(again(waveforms), theirs(waveforms)[0])


# Told apart by their names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["base", "large", "xlarge"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_published_sizes_are_told_by_names_and_shapes_alone(program, size):
    """Weights on the meta device: of the golden lists' names and shapes, and nothing else to go by."""
    weights = {name: torch.empty(shape, device="meta") for name, shape in golden_shapes(program, size).items()}
    found = convert(unwrap(weights))
    assert found.layout == program
    assert infer_config(found.encoder, {}) == SIZES[size]
    with torch.device("meta"):
        HuBERT(size).load_state_dict(weights, assign=True)
        if program != "transformers":
            HuBERTPretrain(500, size).load_state_dict(weights, assign=True)
    assert set(found.head) == ({"mask_embedding"} if program == "transformers" else set(HEAD))


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("disguise", ["plain", "ddp", "half", "lightning", "bfloat16"])
def test_every_weight_arrives_whatever_stands_around_it(program, size, disguise):
    weights = random_weights(small_shapes(program, size))
    plain = convert(weights)
    assert plain.layout == program
    parts = [value.flatten() for name, value in weights.items() if not re.search("lm_head|logit_temp", name)]
    arrived = torch.cat([value.flatten() for value in (*plain.encoder.values(), *plain.head.values())])
    assert arrived.sort()[0].equal(torch.cat(parts).sort()[0]), "each number once"

    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(disguise, torch.float32)
    prefix = {"ddp": "module.", "lightning": "model."}.get(disguise, "")
    dressed = {f"{prefix}{name}": value.to(dtype) for name, value in weights.items()}
    content = {"state_dict": dressed, "epoch": 3} if disguise == "lightning" else {"model": dressed, "step": 7}
    found = convert(unwrap(content))
    for actual, expected in ((found.encoder, plain.encoder), (found.head, plain.head)):
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            assert value.dtype == torch.float32
            assert value.equal(expected[name].to(dtype).float()), name

    config = build_config(size, SMALL)
    if program == "transformers":
        model = HuBERT(config)
        model.load_state_dict(content)
        assert all(value.equal(found.encoder[name]) for name, value in model.state_dict().items())
    else:
        model = HuBERTPretrain(23, config)
        model.load_state_dict(content)
        rows = found.head["class_embeddings"]
        assert model.class_embeddings.equal(rows[4:] if program == "fairseq" else rows)
        assert model.mask_embedding.equal(found.head["mask_embedding"])
        assert model.final_projection.bias.equal(found.head["final_projection.bias"])
        encoder = HuBERT(config)
        encoder.load_state_dict(content)
        assert all(value.equal(model.hubert.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_minimal_huberts_one_matrix_is_query_key_and_value():
    weights = random_weights(small_shapes("minimal_hubert", "base"))
    layer = "transformer.layers.1.attention."
    found = convert(weights).encoder
    joint = torch.cat([found[f"{layer}{part}.weight"] for part in ("query", "key", "value")])
    assert joint.equal(weights["encoder.layers.1.attention.qkv.weight"])


def test_the_forms_of_transformers_are_one_layout():
    """HubertModel and HubertForCTC; the names of weight normalisation before and since torch 2."""
    fine_tuned = random_weights(small_shapes("transformers", "large"))
    bare = {name.removeprefix("hubert."): value for name, value in fine_tuned.items() if "lm_head" not in name}
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in bare.items()
    }
    assert old.keys() != bare.keys()
    expected = convert(fine_tuned).encoder
    for weights in (bare, old):
        found = convert(weights)
        assert found.layout == "transformers"
        assert found.encoder.keys() == expected.keys()
        assert all(value.equal(expected[name]) for name, value in found.encoder.items())


def test_a_fine_tuned_model_of_fairseq_is_its_encoder():
    weights = random_weights(small_shapes("fairseq", "large"))
    expected = convert(weights)
    left = {
        f"w2v_encoder.w2v_model.{name}": value for name, value in weights.items() if not name.startswith("final_proj")
    }
    found = convert(left | {"w2v_encoder.proj.weight": torch.zeros(32, 32), "w2v_encoder.proj.bias": torch.zeros(32)})
    assert found.encoder.keys() == expected.encoder.keys()
    assert all(value.equal(expected.encoder[name]) for name, value in found.encoder.items())


def test_our_own_names_are_taken_as_they_are():
    """The trainer's way: exactly torch's `load_state_dict`, with its errors; other own forms are told by their names."""
    torch.manual_seed(0)
    source, model = HuBERTPretrain(7, BASE_LIKE), HuBERTPretrain(7, BASE_LIKE)
    weights = source.state_dict()
    assert not model.load_state_dict(weights).missing_keys
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key.*projection.bias"):
        model.load_state_dict({name: value for name, value in weights.items() if name != "hubert.projection.bias"})
    kept = model.load_state_dict({"class_embeddings": weights["class_embeddings"]}, strict=False)
    assert "hubert.projection.bias" in kept.missing_keys
    encoder = HuBERT(BASE_LIKE)
    for form in (weights, {f"module.{name}": value for name, value in weights.items()}, source.hubert.state_dict()):
        encoder.load_state_dict(form)
        assert all(value.equal(source.hubert.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_our_weights_alone_say_their_sizes(tmp_path):
    """model.safetensors without the config.json that it came with."""
    model = HuBERTPretrain(7, build_config(BASE_LIKE, {"dim": 64, "num_heads": 1}))
    model.save_pretrained(tmp_path / "whole")
    lone = (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "lone.safetensors")
    found = HuBERTPretrain.from_pretrained(lone)
    assert found.config.model_copy(update=QUIET) == model.config
    assert found.config.dropout == SIZES["base"].dropout
    assert all(value.equal(found.state_dict()[name]) for name, value in model.state_dict().items())


# What is refused ------------------------------------------------------------------------------------------------------


def test_other_models_are_refused_with_what_is_missing_and_what_is_too_much():
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining, WavLMConfig, WavLMModel

    with torch.device("meta"):
        wav2vec2 = Wav2Vec2ForPreTraining(Wav2Vec2Config(num_hidden_layers=1)).state_dict()
        wavlm = WavLMModel(WavLMConfig(num_hidden_layers=1)).state_dict()
    model = HuBERT("tiny")
    with pytest.raises(
        DataError, match=r"nearest is transformers behind 'wav2vec2.*0 missing; \d+ unexpected \(quantizer\."
    ):
        model.load_state_dict(wav2vec2)
    with pytest.raises(
        DataError, match=r"nearest is transformers.*unexpected \(encoder\.layers\.0\.attention\.gru_rel_pos"
    ):
        model.load_state_dict(wavlm)
    weights = random_weights(small_shapes("fairseq", "base"))
    part = {name: value for name, value in weights.items() if not name.startswith("encoder.layers.1.fc")}
    with pytest.raises(
        DataError, match=r"nearest is fairseq, with .* 4 missing \(encoder\.layers\.1\.fc1\.weight, .*, \.\.\.\); 0 un"
    ):
        model.load_state_dict({"model": part})
    for program in PROGRAMS:
        weights = random_weights(small_shapes(program, "base"))
        name = next(name for name in weights if "layers.2." in name and "norm" in name)
        missing = {other: value for other, value in weights.items() if other != name}
        with pytest.raises(DataError, match=rf"nearest is {program}.*1 missing \({re.escape(name)}\); 0 unexpected"):
            convert(missing, "some file")
    for content in ({}, {"model": {}}, {"step": 3, "lr": [0.1]}, {"a": torch.zeros(3, dtype=torch.int8)}):
        with pytest.raises(DataError, match="expected a state dict"):
            model.load_state_dict(content)
    with pytest.raises(DataError, match="0 of its weights"):
        convert({"conv1.weight": torch.zeros(3)})


def test_dimensions_that_weights_do_not_tell_are_asked_for():
    weights = convert(random_weights(small_shapes("torchaudio", "base"))).encoder
    with pytest.raises(DataError, match="how many heads a width of 32 has"):
        infer_config(weights, {})
    assert infer_config(weights, {"num_heads": 4}).num_heads == 4
    with pytest.raises(DataError, match=r"dim \(32\) must be a multiple of num_heads \(5\)"):
        infer_config(weights, {"num_heads": 5})
    odd = weights | {"extractor.layers.3.conv.weight": torch.zeros(24, 24, 4)}
    with pytest.raises(DataError, match="convolutions of .* samples are not HuBERT's"):
        infer_config(odd, {"num_heads": 4})
    with pytest.raises(DataError, match="which no HuBERT has"):
        infer_config(weights | {"projection.weight": torch.zeros(768)}, {"num_heads": 4})


# Heads and settings ---------------------------------------------------------------------------------------------------


def test_the_rows_of_units_are_found_among_fairseqs_dictionary():
    """fairseq numbers <s>, <pad>, </s>, <unk> 0 to 3 and the units after them, in the order of dict.km.txt."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    assert class_rows(9, "fairseq", symbols=[*special, "0", "1", "2", "3", "4"], num_classes=None) == [4, 5, 6, 7, 8]
    assert class_rows(8, "fairseq", symbols=[*special, "2", "0", "3", "1"], num_classes=4) == [5, 7, 4, 6]
    assert class_rows(7, "fairseq", symbols=[*special, "AA", "B", "3"], num_classes=None) == [4, 5, 6], "no numbering"
    assert class_rows(9, "fairseq", symbols=None, num_classes=None) == [4, 5, 6, 7, 8]
    assert class_rows(9, "fairseq", symbols=None, num_classes=5) == [4, 5, 6, 7, 8]
    assert class_rows(9, "fairseq", symbols=None, num_classes=9) == list(range(9)), "exactly K rows are K units"
    for layout in set(LAYOUTS) - {"fairseq"}:
        assert class_rows(9, layout, symbols=None, num_classes=None) == list(range(9))


def fairseq_checkpoint(size: str = "large") -> dict:
    """Return what fairseq's trainer saves, as plain values, with its dictionary in another order than the units."""
    weights = random_weights(small_shapes("fairseq", size))
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *map(str, reversed(range(23)))]
    model = {
        "encoder_attention_heads": 8,
        "layer_norm_first": size == "large",
        "dropout": 0.3,
        "encoder_layerdrop": 0.2,
    }
    model |= {"_name": "hubert", "dropout_input": 0.25, "feature_grad_mult": 0.5, "logit_temp": 0.2}
    cfg = {"model": model, "task": {"_name": "hubert_pretraining", "normalize": False}}
    dictionary = SimpleNamespace(symbols=symbols, count=[1] * 27)
    return {"args": None, "cfg": cfg, "model": weights, "task_state": {"dictionaries": [dictionary]}}


def test_a_fairseq_checkpoint_says_its_settings_and_the_order_of_its_units(tmp_path, monkeypatch):
    checkpoint = fairseq_checkpoint()
    monkeypatch.setattr("hubert.model.formats.unpickle.load_torch", lambda _path: checkpoint)
    file = tmp_path / "hubert.pt"
    file.touch()
    model = HuBERTPretrain.from_pretrained(file)
    config = model.config
    assert (config.num_heads, config.dropout, config.layerdrop) == (8, 0.3, 0.2)
    assert (config.input_dropout, config.feature_grad_mult, config.logit_temperature) == (0.25, 0.5, 0.2)
    assert config.layer_norm_first
    assert not config.normalize_waveform, "the configuration wins over what large models usually do"
    assert model.class_embeddings.equal(checkpoint["model"]["label_embs_concat"][4:].flip(0))
    loaded = HuBERTPretrain(23, config)
    loaded.load_state_dict(checkpoint)
    assert loaded.class_embeddings.equal(model.class_embeddings)

    with pytest.warns(UserWarning, match="a head of 23 classes: the head of 50 classes is new"):
        other = HuBERTPretrain.from_pretrained(file, num_classes=50)
    assert other.class_embeddings.shape == (50, 12)
    assert other.mask_embedding.equal(model.mask_embedding), "which is no matter of classes"


def test_settings_are_found_in_every_place_where_fairseq_and_s3prl_put_them():
    model = {"encoder_attention_heads": 8, "dropout": 0.3, "activation_fn": "gelu"}
    expected = {"num_heads": 8, "dropout": 0.3, "normalize_waveform": True}
    for content in (
        {"cfg": {"model": model, "task": {"normalize": True}}},
        {"args": SimpleNamespace(**model, normalize=True), "cfg": None},
        {"model_cfg": model, "task_cfg": {"normalize": True}},
        {"cfg": SimpleNamespace(model=SimpleNamespace(**model), task=SimpleNamespace(normalize=True))},
        {"cfg": {"model": {"w2v_args": {"model": model, "task": {"normalize": True}}, "dropout": 0.9}}},
    ):
        assert fairseq_settings(content) == expected
    assert fairseq_settings({"model": {}}) == {}


def test_transformers_files_say_what_weights_cannot():
    weights = convert(random_weights(small_shapes("transformers", "large"))).encoder
    config = {"model_type": "hubert", "num_attention_heads": 8, "do_stable_layer_norm": False, "layer_norm_eps": 1e-6}
    config |= {"feat_extract_norm": "layer", "hidden_dropout": 0.7}
    found = infer_config(weights, transformers_settings(config, {"do_normalize": False}, "here"))
    assert (found.num_heads, found.layer_norm_first, found.layer_norm_eps) == (8, False, 1e-6)
    assert not found.normalize_waveform
    assert found.dropout == SIZES["large"].dropout, "an export for fine-tuning says nothing about pretraining"
    assert infer_config(weights, transformers_settings(config, None, "here")).normalize_waveform
    # facebook/hubert-base-ls960 says do_normalize, and was trained without.
    base = {"model_type": "hubert", "feat_extract_norm": "group"}
    with pytest.warns(UserWarning, match="do_normalize = true, which is not followed"):
        assert transformers_settings(base, {"do_normalize": True}, "here")["normalize_waveform"] is False
    for wrong, message in (
        ({"model_type": "wavlm"}, "expected a HuBERT .*found model_type = 'wavlm'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"feat_proj_layer_norm": False}, "feat_proj_layer_norm = False"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm = True"),
    ):
        with pytest.raises(DataError, match=message):
            transformers_settings(base | wrong, None, "here")


def test_another_eps_than_fairseqs_gives_transformers_numbers():
    """An eps this large shows: the default's numbers are others."""
    reference = transformers_encoder(BASE_LIKE, layer_norm_eps=0.1)
    model = HuBERT(build_config(BASE_LIKE, {"layer_norm_eps": 0.1})).eval()
    model.load_state_dict(reference.state_dict())
    waveforms = speech_like(1, 4_000)
    with torch.inference_mode():
        layers, ffn, output = run_transformers(reference, waveforms)
        assert_same_numbers(model, waveforms, layers, ffn, output)
        usual = HuBERT(BASE_LIKE).eval()
        usual.load_state_dict(reference.state_dict())
        assert not torch.allclose(usual(waveforms), output, rtol=1e-2)


# Files and folders ----------------------------------------------------------------------------------------------------


def test_files_of_every_program_load(tmp_path):
    from safetensors.torch import save_file

    for program in PROGRAMS:
        weights = random_weights(small_shapes(program, "large"))
        contents = {"plain.pth": weights, "wrapped.pt": {"model": weights}, "s3prl.ckpt": {"model_weight": weights}}
        for name, content in contents.items():
            torch.save(content, tmp_path / name)
        save_file(weights, tmp_path / "weights.safetensors")
        for name in (*contents, "weights.safetensors"):
            with pytest.raises(DataError, match="how many heads"):
                HuBERT.from_pretrained(tmp_path / name)
    wide = {
        name: torch.randn(shape)
        for name, shape in golden_shapes("torchaudio", "base").items()
        if not re.search(r"\.layers\.[1-9]", name) or "conv" in name
    }
    wide["logit_generator.label_embeddings"] = wide["logit_generator.label_embeddings"][:10].clone()
    torch.save({"state_dict": {f"model.{name}": value.half() for name, value in wide.items()}}, tmp_path / "wide.pt")
    model = HuBERTPretrain.from_pretrained(str(tmp_path / "wide.pt"))
    assert model.num_classes == 10
    assert (model.config.num_layers, model.config.num_heads, model.config.normalize_waveform) == (1, 12, False)
    assert model.config.dropout == SIZES["base"].dropout
    assert not model.training
    assert model.mask_embedding.dtype == torch.float32
    assert model.mask_embedding.equal(wide["mask_generator.mask_embedding"].half().float())


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards", "bin shards"])
def test_folders_of_transformers_load(tmp_path, form):
    """What transformers itself writes; and pytorch_model.bin, which older versions wrote."""
    reference = transformers_encoder(LARGE_LIKE_BIAS, layer_norm_eps=1e-4)
    shards = {"max_shard_size": "40KB"} if "shards" in form else {}
    reference.save_pretrained(tmp_path, **shards)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if shards else 0)
    if "bin" in form:
        _rewrite_as_bin(tmp_path)
    model = HuBERT.from_pretrained(tmp_path)
    assert model.config.normalize_waveform, "as fairseq's large; there is no preprocessor_config.json"
    assert (model.config.conv_bias, model.config.num_heads, model.config.layer_norm_eps) == (True, 4, 1e-4)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    model = HuBERT.from_pretrained(str(tmp_path))
    waveforms = speech_like(1, 3_000)
    with torch.inference_mode():
        assert_same_numbers(model, waveforms, *run_transformers(reference, waveforms))
    with pytest.raises(ConfigError, match="without a head; expected num_classes"):
        HuBERTPretrain.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no head: the head of 9 classes is new"):
        pretrain = HuBERTPretrain.from_pretrained(tmp_path, 9)
    assert pretrain.class_embeddings.shape == (9, SIZES["large"].final_dim)
    assert pretrain.mask_embedding.equal(reference.masked_spec_embed)
    assert pretrain.hubert(waveforms).equal(model(waveforms))
    if form == "safetensors":
        assert HuBERT.from_pretrained(tmp_path / "model.safetensors").config == model.config, "with what lies beside it"


def _rewrite_as_bin(folder) -> None:
    import json

    from safetensors.torch import load_file

    for path in folder.glob("*.safetensors"):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        path.unlink()
    for index in folder.glob("*.index.json"):
        content = json.loads(index.read_text())
        renamed = {
            key: name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            for key, name in content["weight_map"].items()
        }
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": renamed}))
        index.unlink()


def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "hubert"}')
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(DataError, match="expected a weight_map from names to files beside it"):
        HuBERT.from_pretrained(tmp_path)
