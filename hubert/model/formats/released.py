"""The published checkpoints: where they are, what their files do not say of their training, and how others are told."""

import re
from collections.abc import Sequence

# Base models whose preprocessor_config.json has do_normalize = true, by a part of their name, and whether fairseq pretrained
# them on normalised audio (task.normalize). An id of the Hub stands in the path of its cache with "--" for "/".
_TRAINED_NORMALIZED = {
    r"(^|[/\\\s]|--)mhubert-147\b": True,  # utter-project/mHuBERT-147 and its first iterations; fairseq's file says so itself
    r"(^|[/\\\s]|--)hubert-base-ls960\b": False,  # facebook
}


def trained_normalized(names: str) -> bool | None:
    """Return True if a base model was trained on normalised audio; None if it is not known.

    Args:
        names: what it is called: an id of the Hub, a path.
    """
    found = (known for pattern, known in _TRAINED_NORMALIZED.items() if re.search(pattern, names, re.IGNORECASE))
    return next(found, None)


BATCH_NORM_25_HZ = (
    "a batch norm before the positional convolution, as in the mHuBERT at 25 Hz (frames of 40 ms; TWIST, "
    "slprl/mhubert-base-25hz), which cannot be loaded: frames are 20 ms here"
)
# Parts of other models, by the names of their weights, and what can be done.
_FOREIGN = (
    (
        r"lora_|\blora\b|\.base_layer\.",
        "LoRA weights beside the encoder's. Fix: merge them where the model was trained (peft: merge_and_unload()), and save it",
    ),
    (r"adapter", "adapters, which change what the encoder computes and which this model does not have"),
    (
        r"(^|\.)(SCB|weight_format|absmax|quant_map|quant_state|qweight|qzeros|scales|g_idx)\b|\.quant_state\.",
        "quantised weights (bitsandbytes, GPTQ). Fix: save the model in float16, bfloat16 or float32",
    ),
    (r"pos_conv\.0\.running_|pos_conv_embed\.batch_norm", BATCH_NORM_25_HZ),
    (
        r"pos_conv(_embed\.layers)?\.\d+\.(0|conv)\.",
        "several positional convolutions, one after the other, as data2vec has; HuBERT has one",
    ),
    (
        r"gru_rel_pos|grep_|rel_attn_embed|relative_attention_bias",
        "the relative positions of WavLM, which is no HuBERT",
    ),
    (r"quantizer|project_q|project_hid", "a wav2vec 2.0 (its quantiser), which is no HuBERT"),
    (r"conv_module|depthwise_conv|pos_bias_[uv]|ffn1\.", "Conformer layers, which HuBERT does not have"),
    (
        r"layer_norm\.weight_ln|spk_proj",
        "ContentVec with its speakers. Fix: take its legacy checkpoint, which holds a HuBERT",
    ),
)


def foreign_part(names: Sequence[str]) -> str:
    """Return which part of another model some names of weights are, and name the first of them; empty if it is not known."""
    for pattern, part in _FOREIGN:
        if found := next((name for name in names if re.search(pattern, name)), ""):
            return f"{part} ({found})"
    return ""


def known_huberts() -> dict[str, dict[str, str]]:
    """Return the released checkpoints by size: Hugging Face id, the URLs of fairseq and torchaudio, training data."""
    fairseq, torchaudio = "https://dl.fbaipublicfiles.com/hubert", "https://download.pytorch.org/torchaudio/models"
    large = "Libri-Light, 60,000 hours"
    return {
        size: {
            "huggingface": f"facebook/hubert-{size}-{data}",
            "fairseq": f"{fairseq}/hubert_{name}_{data}.pt",
            "torchaudio": f"{torchaudio}/hubert_fairseq_{size}_{data}.pth",
            "data": text,
        }
        for size, name, data, text in (
            ("base", "base", "ls960", "LibriSpeech, 960 hours"),
            ("large", "large", "ll60k", large),
            ("xlarge", "xtralarge", "ll60k", large),
        )
    }
