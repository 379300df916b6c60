"""torchaudio's pretraining model with dimensions of ours. torchaudio and torch only, so that it builds in any environment."""

from typing import Any

from torch import nn

BASE = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2,
    "extractor_conv_bias": False,
    "encoder_embed_dim": 768,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 128,
    "encoder_pos_conv_groups": 16,
    "encoder_num_layers": 12,
    "encoder_num_heads": 12,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": 3072,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "final_dim": 256,
    "feature_grad_mult": 0.1,
}
MASK = {
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
    "skip_masked": False,
    "skip_nomask": True,
}


def build(num_classes: int, dimensions: dict[str, Any], *, layerdrop: float) -> nn.Module:
    """Build the model with random weights."""
    from torchaudio.models import hubert_pretrain_model

    return hubert_pretrain_model(**dimensions, **MASK, encoder_layer_drop=layerdrop, num_classes=num_classes)


def build_base(num_classes: int) -> nn.Module:
    """Build base without layerdrop."""
    return build(num_classes, BASE, layerdrop=0.0)
