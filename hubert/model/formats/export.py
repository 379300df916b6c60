"""Out: a model in the formats of transformers and torchaudio, and a folder onto the Hugging Face Hub.

Both folders hold our own configuration too, under `hubert_flows`, so that nothing is lost on the way back. What they
cannot hold is refused, never dropped silently; that transformers has no pretraining head is said where it is written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert.core.errors import ConfigError, DataError, TransientError, first_line
from hubert.core.files import atomic_write, read_json, write_json
from hubert.core.frames import SAMPLE_RATE
from hubert.model.formats import FORMATS
from hubert.model.formats.files import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    TORCHAUDIO_FILE,
    WEIGHTS_FILE,
    write_weights,
)
from hubert.model.formats.layouts import rename
from hubert.settings.model import SIZES, ModelConfig

_TORCHAUDIO_EPS = 1e-5


def export_weights(
    folder: str | Path,
    config: ModelConfig,
    encoder: Mapping[str, Tensor],
    head: Mapping[str, Tensor] | None = None,
    *,
    format: str,  # noqa: A002  (as in save_pretrained)
) -> None:
    """Write a model as transformers or torchaudio reads it; each file is written whole or not at all.

    Args:
        folder: made if it is not there.
        config: of the model.
        encoder: the weights of `HuBERT`.
        head: those of `layouts.HEAD`. torchaudio's model then is HuBERTPretrainModel, else Wav2Vec2Model; transformers
            has the mask embedding only.
        format: `transformers` or `torchaudio`.

    Raises:
        ConfigError: no such format, or one that cannot hold this model.
    """
    folder = Path(folder)
    if format == "transformers":
        write_weights(folder / WEIGHTS_FILE, rename("transformers", encoder, head))
        write_json(folder / PREPROCESSOR_FILE, preprocessor_config(config))
        write_json(folder / CONFIG_FILE, transformers_config(config, has_mask="mask_embedding" in (head or {})))
    elif format == "torchaudio":
        num_classes = None if head is None else len(head["class_embeddings"])
        content = torchaudio_config(config, num_classes)  # refuses before anything is written
        weights = {name: value.detach().cpu().clone() for name, value in rename("torchaudio", encoder, head).items()}
        with atomic_write(folder / TORCHAUDIO_FILE) as temporary:
            torch.save(weights, temporary)
        write_json(folder / CONFIG_FILE, content)
    else:
        raise ConfigError(f"format {format!r} does not exist; formats: {', '.join(FORMATS)}")


def transformers_config(config: ModelConfig, *, has_mask: bool) -> dict[str, Any]:
    """Return the config.json of a `HubertModel`. Without a trained mask embedding, fine-tuning hides no spans."""
    channels, kernels, strides = (list(values) for values in zip(*config.conv_layers, strict=True))
    return {
        "architectures": ["HubertModel"],
        "model_type": "hubert",
        "dtype": "float32",
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": config.layer_norm_eps,
        "do_stable_layer_norm": config.layer_norm_first,
        "num_feat_extract_layers": len(channels),
        "conv_dim": channels,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "conv_bias": config.conv_bias,
        "feat_extract_norm": config.extractor_norm,
        "feat_extract_activation": "gelu",
        "feat_proj_layer_norm": True,
        "num_conv_pos_embeddings": config.pos_conv_kernel,
        "num_conv_pos_embedding_groups": config.pos_conv_groups,
        "conv_pos_batch_norm": False,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "feat_proj_dropout": config.input_dropout,
        "layerdrop": config.layerdrop,
        "apply_spec_augment": has_mask,
        "mask_time_prob": 0.05 if has_mask else 0.0,  # 0.05: transformers' default
        "mask_feature_prob": 0.0,
        "hubert_flows": config.model_dump(mode="json"),
    }


def preprocessor_config(config: ModelConfig) -> dict[str, Any]:
    """Return the preprocessor_config.json: what transformers' feature extractor does to samples.

    Its normalisation adds 1e-7 to the variance and ours, as fairseq's, 1e-5: on quiet audio the inputs differ a little.
    """
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_side": "right",
        "padding_value": 0.0,
        "do_normalize": config.normalize_waveform,
        # transformers' base kind normalises over padding too, mask or not; its models were trained without a mask
        "return_attention_mask": config.extractor_norm == "layer",
    }


def torchaudio_dimensions(config: ModelConfig) -> dict[str, Any]:
    """Return a model's dimensions and dropouts as the arguments of torchaudio's models, all but layerdrop."""
    return {
        "extractor_mode": f"{config.extractor_norm}_norm",
        "extractor_conv_layer_config": [list(layer) for layer in config.conv_layers],
        "extractor_conv_bias": config.conv_bias,
        "encoder_embed_dim": config.dim,
        "encoder_projection_dropout": config.input_dropout,
        "encoder_pos_conv_kernel": config.pos_conv_kernel,
        "encoder_pos_conv_groups": config.pos_conv_groups,
        "encoder_num_layers": config.num_layers,
        "encoder_num_heads": config.num_heads,
        "encoder_attention_dropout": config.attention_dropout,
        "encoder_ff_interm_features": config.ffn_dim,
        "encoder_ff_interm_dropout": config.activation_dropout,
        "encoder_dropout": config.dropout,
        "encoder_layer_norm_first": config.layer_norm_first,
    }


def torchaudio_config(config: ModelConfig, num_classes: int | None) -> dict[str, Any]:
    """Return how torchaudio builds the model: a function and its arguments, for the strict loading of `model.pt`.

    Raises:
        ConfigError: torchaudio has no such model.
    """
    if config.layer_norm_eps != _TORCHAUDIO_EPS:
        raise ConfigError(
            f"layer_norm_eps = {config.layer_norm_eps}: torchaudio's models have {_TORCHAUDIO_EPS} only; use format "
            "transformers"
        )
    arguments = {**torchaudio_dimensions(config), "encoder_layer_drop": config.layerdrop}
    if num_classes is None:
        return _torchaudio_folder(config, "wav2vec2_model", {**arguments, "aux_num_out": None})
    mask = {
        "mask_prob": 0.8,
        "mask_selection": "static",
        "mask_other": 0.0,
        "mask_length": 10,
        "no_mask_overlap": False,
        "mask_min_space": 1,
        "mask_channel_prob": 0.0,
        "mask_channel_selection": "static",
        "mask_channel_other": 0.0,
        "mask_channel_length": 10,
        "no_mask_channel_overlap": False,
        "mask_channel_min_space": 1,
    }
    head = {
        "skip_masked": False,
        "skip_nomask": False,
        "num_classes": num_classes,
        "final_dim": config.final_dim,
        "feature_grad_mult": None if config.feature_grad_mult == 1 else config.feature_grad_mult,
    }
    return _torchaudio_folder(config, "hubert_pretrain_model", arguments | mask | head)


def _torchaudio_folder(config: ModelConfig, function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": "torchaudio",
        "function": f"torchaudio.models.{function}",
        "arguments": dict(arguments),
        "weights": TORCHAUDIO_FILE,
        # torchaudio's models take samples as they get them: where this is true, give torch.nn.functional.layer_norm of each
        "normalize_waveform": config.normalize_waveform,
        "sample_rate": SAMPLE_RATE,
        "hubert_flows": config.model_dump(mode="json"),
    }


def shortcut(config: ModelConfig) -> str:
    """Return torchaudio's function for a published size, such as `hubert_base`; empty for other dimensions."""
    dimensions = ["conv_layers", "conv_bias", "extractor_norm", "dim", "num_layers", "num_heads", "ffn_dim"]
    dimensions += ["pos_conv_kernel", "pos_conv_groups", "layer_norm_first"]
    for size in ("base", "large", "xlarge"):
        if all(getattr(config, name) == getattr(SIZES[size], name) for name in dimensions):
            return f"hubert_{size}"
    return ""


def push_to_hub(folder: str | Path, repo_id: str, *, token: str | None = None, private: bool = False) -> str:
    """Upload an exported folder to the Hugging Face Hub, and return the address of the commit.

    Args:
        folder: what `save_pretrained` or `hubert export` wrote.
        repo_id: `owner/name`; made if it is not there.
        token: with the right to write; None: what `hf auth login` or the variable HF_TOKEN says.
        private: whether a new repository is private.

    Raises:
        ConfigError: the name is none, or the Hub does not let this token write there.
        DataError: the folder holds no exported model.
        TransientError: the Hub cannot be reached, or failed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    network_errors: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)  # of the HTTP library in use
    folder = Path(folder)
    if read_json(folder / CONFIG_FILE) is None or not any(
        (folder / name).exists() for name in (WEIGHTS_FILE, TORCHAUDIO_FILE)
    ):
        raise DataError(
            f"{folder}: expected an exported model, {CONFIG_FILE} with {WEIGHTS_FILE} or {TORCHAUDIO_FILE}. "
            f"Fix: hubert export RUN --format transformers --output {folder}"
        )
    api = HfApi(token=token)
    files = [CONFIG_FILE, PREPROCESSOR_FILE, WEIGHTS_FILE, TORCHAUDIO_FILE, "README.md"]
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder, repo_id=repo_id, allow_patterns=files, commit_message="Upload HuBERT"
        )
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise ConfigError(f"{repo_id!r} on the Hugging Face Hub: {first_line(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status not in {408, 429}:
            raise ConfigError(
                f"{repo_id}: the Hub refused ({status}): {first_line(error)}. Likely cause: the token may not write there; "
                "`hf auth login`, or set HF_TOKEN"
            ) from error
        raise TransientError(f"{repo_id}: the Hub failed ({status}): {first_line(error)}") from error
    except network_errors as error:
        raise TransientError(f"{repo_id}: the Hub cannot be reached: {first_line(error)}") from error
    return str(commit.commit_url)
