"""Slow and independent ways to compute what the project computes fast."""

import re

import numpy as np
import torch
import torchaudio
from torch import Tensor, nn

from hubert.settings.model import ModelConfig

_TORCHAUDIO_NAMES = (
    (r"^wav2vec2\.", "hubert."),
    (r"feature_extractor\.conv_layers\.(\d+)\.conv\.", r"extractor.layers.\1.conv."),
    (r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.", r"extractor.layers.\1.norm."),
    (r"encoder\.feature_projection\.layer_norm\.", "projection_norm."),
    (r"encoder\.feature_projection\.projection\.", "projection."),
    (r"encoder\.transformer\.pos_conv_embed\.", "transformer.pos_conv."),
    (r"encoder\.transformer\.layer_norm\.", "transformer.norm."),
    (r"encoder\.transformer\.layers\.(\d+)\.layer_norm\.", r"transformer.layers.\1.attention_norm."),
    (r"encoder\.transformer\.layers\.(\d+)\.final_layer_norm\.", r"transformer.layers.\1.ffn_norm."),
    (r"encoder\.transformer\.layers\.(\d+)\.feed_forward\.intermediate_dense\.", r"transformer.layers.\1.ffn_in."),
    (r"encoder\.transformer\.layers\.(\d+)\.feed_forward\.output_dense\.", r"transformer.layers.\1.ffn_out."),
    (r"encoder\.transformer\.layers\.(\d+)\.attention\.q_proj\.", r"transformer.layers.\1.attention.query."),
    (r"encoder\.transformer\.layers\.(\d+)\.attention\.k_proj\.", r"transformer.layers.\1.attention.key."),
    (r"encoder\.transformer\.layers\.(\d+)\.attention\.v_proj\.", r"transformer.layers.\1.attention.value."),
    (r"encoder\.transformer\.layers\.(\d+)\.attention\.out_proj\.", r"transformer.layers.\1.attention.output."),
    (r"^mask_generator\.mask_embedding$", "mask_embedding"),
    (r"^logit_generator\.label_embeddings$", "class_embeddings"),
    (r"^logit_generator\.final_proj\.", "final_projection."),
)


def torchaudio_mfcc(waveform: Tensor) -> Tensor:
    """Return Kaldi's 13 MFCCs and their two differences (F, 39) of one waveform (T,), as torchaudio computes them."""
    from torchaudio.compliance import kaldi

    static = kaldi.mfcc(waveform[None], sample_frequency=16_000, use_energy=False).T
    first = torchaudio.functional.compute_deltas(static)
    return torch.cat([static, first, torchaudio.functional.compute_deltas(first)]).T


def from_torchaudio(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights (or gradients) of torchaudio's HuBERT, with or without a head, to ours; the shapes agree."""
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in _TORCHAUDIO_NAMES:
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        renamed[name] = value
    return renamed


def torchaudio_pretrain(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build torchaudio's HuBERT with a head, of our dimensions; its head has a row per unit, as ours."""
    return torchaudio.models.hubert_pretrain_model(
        extractor_mode={"group": "group_norm", "layer": "layer_norm"}[config.extractor_norm],
        extractor_conv_layer_config=[tuple(layer) for layer in config.conv_layers],
        extractor_conv_bias=config.conv_bias,
        encoder_embed_dim=config.dim,
        encoder_projection_dropout=config.input_dropout,
        encoder_pos_conv_kernel=config.pos_conv_kernel,
        encoder_pos_conv_groups=config.pos_conv_groups,
        encoder_num_layers=config.num_layers,
        encoder_num_heads=config.num_heads,
        encoder_attention_dropout=config.attention_dropout,
        encoder_ff_interm_features=config.ffn_dim,
        encoder_ff_interm_dropout=config.activation_dropout,
        encoder_dropout=config.dropout,
        encoder_layer_norm_first=config.layer_norm_first,
        encoder_layer_drop=config.layerdrop,
        mask_prob=0.8,
        mask_selection="static",
        mask_other=0.0,
        mask_length=10,
        no_mask_overlap=False,
        mask_min_space=1,
        mask_channel_prob=0.0,
        mask_channel_selection="static",
        mask_channel_other=0.0,
        mask_channel_length=10,
        no_mask_channel_overlap=False,
        mask_channel_min_space=1,
        skip_masked=False,
        skip_nomask=False,
        num_classes=num_classes,
        final_dim=config.final_dim,
        feature_grad_mult=config.feature_grad_mult if config.feature_grad_mult < 1 else None,
    )


def fairseq_mask(
    random: np.random.Generator, num_frames: int, mask_prob: float, mask_length: int, min_masks: int
) -> np.ndarray:
    """Draw one row by fairseq's rule, before rows are made equal: (F,) bool, one span after the other."""
    num_spans = int(mask_prob * num_frames / mask_length + random.random())
    num_spans = max(num_spans, min_masks)
    places = num_frames - mask_length
    if places <= num_spans:  # fairseq: `min_len = sz - num_mask - 1`, starts below `sz - min_len`
        places = num_spans + 1
    masked: set[int] = set()
    for start in random.choice(places, num_spans, replace=False):
        masked.update(frame for frame in range(start, start + mask_length) if frame < num_frames)
    return np.isin(np.arange(num_frames), list(masked))


def fairseq_masks(
    random: np.random.Generator, rows: int, num_frames: int, mask_prob: float, mask_length: int, min_masks: int
) -> np.ndarray:
    """Draw a batch by fairseq's rule: random masked frames are freed until all rows have as many as the smallest."""
    masks = [fairseq_mask(random, num_frames, mask_prob, mask_length, min_masks) for _ in range(rows)]
    smallest = min(int(mask.sum()) for mask in masks)
    for mask in masks:
        mask[random.choice(np.flatnonzero(mask), int(mask.sum()) - smallest, replace=False)] = False
    return np.stack(masks)


def count_frames(num_samples: int, conv_layers: tuple[tuple[int, int, int], ...]) -> int:
    """Return the frames of a waveform by asking each convolution how many windows fit."""
    for _, kernel, stride in conv_layers:
        starts = range(0, num_samples - kernel + 1, stride)
        num_samples = len(starts)
    return num_samples


def plain_normalize(waveform: Tensor) -> Tensor:
    """Scale one waveform (T,) as fairseq does before large and xlarge: a LayerNorm over its samples."""
    exact = waveform.double()
    return ((exact - exact.mean()) / torch.sqrt(exact.var(correction=0) + 1e-5)).float()
