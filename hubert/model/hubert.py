"""HuBERT (https://arxiv.org/abs/2106.07447): the encoder that everything uses, and the head that trains it.

    model = HuBERT.from_pretrained("runs/my-run/it2/train-1a2b3c4d/step-00025000")
    layers = model.get_intermediate_outputs(waveforms, before_residual=False)

Shapes: B utterances, T samples, F frames, D width of the model, K classes, N masked frames of a batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubert.core.errors import ConfigError, DataError
from hubert.core.frames import num_frames
from hubert.model import ops
from hubert.model.encoder import Dropout, FeatureExtractor, Linear, Transformer
from hubert.model.formats.released import known_huberts
from hubert.model.inputs import check_lengths, clear_padding, frame_mask, normalize
from hubert.model.loading import EncoderFiles, PretrainFiles
from hubert.settings.model import ModelConfig, build_config

__all__ = ["HuBERT", "HuBERTPretrain", "known_huberts"]


class HuBERT(EncoderFiles):
    """The encoder: waveforms at 16 kHz in, frames at 50 Hz out.

    A new model has random weights, drawn from torch's generator as fairseq draws them.

    Args:
        size: base, large, xlarge, tiny, or a configuration.

    Raises:
        ConfigError: no such size.
    """

    def __init__(self, size: str | ModelConfig = "base") -> None:
        super().__init__()
        self.config = config = build_config(size)
        self.extractor = FeatureExtractor(config)
        channels = config.conv_layers[-1][0]
        self.projection_norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.projection = Linear(channels, config.dim)
        self.input_dropout = Dropout(config.input_dropout)
        self.transformer = Transformer(config)

    def forward(self, waveforms: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Encode waveforms with all layers.

        Args:
            waveforms: (B, T) float samples at 16 kHz, as read from the file: where the model wants them normalised
                (large, xlarge) it does that itself. T >= 400.
            attention_mask: (B, T), true for samples and false for padding at the end; None if nothing is padded. An
                utterance's output does not depend on its padding. On the CPU it costs no wait for the device.

        Returns:
            (B, F, D) with F = (T - 400) // 320 + 1. Frames beyond an utterance's own number have no meaning.

        Raises:
            DataError: shapes that do not fit, an utterance shorter than 400 samples, padding before or among samples.
        """
        features, lengths = self.extract(waveforms, attention_mask)
        x, key_mask = self._project(features, lengths)
        output: Tensor = self.transformer(x, key_mask)
        return output

    def get_intermediate_outputs(
        self,
        waveforms: Tensor,
        *,
        attention_mask: Tensor | None = None,
        num_layers: int | None = None,
        before_residual: bool = True,
    ) -> list[Tensor]:
        """Return what the first `num_layers` layers put out; the others are not computed. No layer is ever skipped.

        There are two conventions, and mixing them fails silently: shapes and scales look alike, but units are noise
        when the centroids come from one and the frames from the other, and ABX scores of one say little about the
        other.

        Args:
            waveforms: (B, T), as for `forward`.
            attention_mask: (B, T), as for `forward`.
            num_layers: from 1 to the number of layers (the default).
            before_residual: True gives the feed-forward output of a layer, before it is added to the residual and
                before the layer's last LayerNorm (minimal_hubert, SpidR). False gives the layer's full output, which
                fairseq and torchaudio cluster; for large and xlarge this is the residual stream, without the LayerNorm
                that `forward` (and transformers, in its `last_hidden_state`) applies after the last layer.

        Returns:
            One (B, F, D) for each layer, from layer 1 on.

        Raises:
            ConfigError: there is no such layer.
            DataError: see `forward`.
        """
        available = self.config.num_layers
        num_layers = available if num_layers is None else num_layers
        if not 1 <= num_layers <= available:
            raise ConfigError(f"num_layers = {num_layers}: the model has layers 1 to {available}")
        features, lengths = self.extract(waveforms, attention_mask)
        x, key_mask = self._project(features, lengths)
        x = self.transformer.embed(x)
        outputs = []
        for layer in self.transformer.layers[:num_layers]:
            x, ffn = layer(x, key_mask)
            outputs.append(ffn if before_residual else x)
        return outputs

    def extract(self, waveforms: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, list[int] | None]:
        """Return the convolutions' output (B, F, C) and the true numbers of samples, None if nothing is padded.

        The gradient is scaled by `feature_grad_mult` on its way into the convolutions, as in fairseq: that of the loss
        and that of the feature penalty alike.

        Raises:
            DataError: see `forward`.
        """
        lengths = check_lengths(waveforms, attention_mask)
        if lengths is not None:
            waveforms = clear_padding(waveforms, lengths)
        if self.config.normalize_waveform:
            waveforms = normalize(waveforms, lengths)
        factor = self.config.feature_grad_mult
        with torch.set_grad_enabled(torch.is_grad_enabled() and factor > 0):
            features: Tensor = self.extractor(waveforms, lengths)
        return (ops.scale_gradient(features, factor) if 0 < factor < 1 else features), lengths

    def _project(
        self,
        features: Tensor,
        lengths: list[int] | None,
        mask: Tensor | None = None,
        mask_embedding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the transformer's input (B, F, D), `mask_embedding` where `mask` (B, F), and the attention's mask."""
        x = self.input_dropout(self.projection(self.projection_norm(features)))
        if mask is not None and mask_embedding is not None:
            x = torch.where(mask[:, :, None], mask_embedding.to(x.dtype), x)
        if lengths is None:
            return x, None
        valid = frame_mask(lengths, x.shape[1]).to(x.device, non_blocking=True)
        x = x * valid[:, :, None]  # the positional convolution looks 64 frames around
        return x, valid[:, None, None]


class HuBERTPretrain(PretrainFiles):
    """A HuBERT with what masked prediction needs: mask embedding, final projection, one embedding per class.

    Args:
        num_classes: number of units K in the codebook.
        size: base, large, xlarge, tiny, or a configuration.
        overrides: single fields of the configuration, such as `dropout=0.0`.

    Raises:
        ConfigError: no such size or field, or values that do not fit together.
    """

    def __init__(self, num_classes: int, size: str | ModelConfig = "base", **overrides: Any) -> None:
        super().__init__()
        if num_classes < 1:
            raise ConfigError(f"num_classes = {num_classes}: expected at least 1, the number of units of the codebook")
        self.config = config = build_config(size, overrides)
        self.num_classes = num_classes
        self.hubert = HuBERT(config)
        self.mask_embedding = nn.Parameter(torch.rand(config.dim))
        self.final_projection = Linear(config.dim, config.final_dim)
        self.class_embeddings = nn.Parameter(torch.rand(num_classes, config.final_dim))

    def forward(
        self,
        waveforms: Tensor,
        labels: Tensor,
        *,
        mask: Tensor,
        attention_mask: Tensor | None = None,
        unmasked: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Predict the labels of the masked frames (paper, equations 1 to 3 with alpha = 1).

        The loss of a frame is the cross-entropy of cosine similarities to the class embeddings, divided by the
        temperature. No frame's class is fairseq's four extra dictionary entries.

        Leave `labels`, `mask` and `attention_mask` on the CPU: which frames count is then known without waiting for the
        device, and only what is needed travels.

        Args:
            waveforms: (B, T) float, as for `HuBERT.forward`.
            labels: (B, F) integers below K; -1 marks frames without a label, which enter neither losses nor counts.
            mask: (B, F) bool, True where the frame is hidden from the transformer. Padding is never masked.
            attention_mask: (B, T), as for `HuBERT.forward`.
            unmasked: also predict the frames that are not masked; costs the rest of the last layer.

        Returns:
            Losses (N,) float32 of the masked frames that have a label, row by row, and a dict:
            `feature_penalty`, the mean square of the convolutions' output over true frames (a scalar with a gradient;
            the loss to minimise is `losses.sum() / N + 10 * feature_penalty`);
            `num_frames` (int), the number of true frames in that mean;
            `predictions` (N,) int64 classes and `num_correct`, a scalar tensor.
            With `unmasked` also `unmasked_losses` (M,), `unmasked_predictions` (M,) and `unmasked_num_correct`.

        Raises:
            DataError: shapes that do not fit, a label of K or more (checked on the CPU only), or see `HuBERT.forward`.
        """
        features, lengths = self.hubert.extract(waveforms, attention_mask)
        shape = features.shape[:2]
        _check_frames(shape, labels, mask, self.num_classes)
        valid = None if lengths is None else frame_mask(lengths, shape[1])
        if valid is not None:
            mask = mask & valid.to(mask.device)
        masked, others = _choose_frames(labels, mask, valid)
        frames = torch.cat([masked, others]) if unmasked else masked

        device = waveforms.device
        x, key_mask = self.hubert._project(  # noqa: SLF001  (the one caller that masks)
            features, lengths, mask.to(device, non_blocking=True), self.mask_embedding
        )
        x = self.hubert.transformer(x, key_mask, frames.to(device, non_blocking=True))
        targets = labels.flatten()[frames.to(labels.device)].to(device, torch.int64, non_blocking=True)
        losses, predictions = self._predict(x, targets)
        correct = predictions == targets

        count = len(masked)
        outputs = {
            "feature_penalty": mean_square(features, valid),
            "num_frames": shape.numel() if lengths is None else sum(num_frames(length) for length in lengths),
            "predictions": predictions[:count],
            "num_correct": correct[:count].sum(),
        }
        if unmasked:
            outputs["unmasked_losses"] = losses[count:]
            outputs["unmasked_predictions"] = predictions[count:]
            outputs["unmasked_num_correct"] = correct[count:].sum()
        return losses[:count], outputs

    def _predict(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss (N,) and the predicted class (N,) of frames (N, D).

        One product of normalised matrices, (N, d) by (d, K), in float32 even under autocast: bfloat16 would leave
        logits of up to 1 / 0.1 with two digits.
        """
        projected = self.final_projection(x)
        with torch.autocast(x.device.type, enabled=False):
            projected = F.normalize(projected.float(), dim=1)
            logits = (
                ops.linear(projected, F.normalize(self.class_embeddings.float(), dim=1)) / self.config.logit_temperature
            )
            return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(1)


def _check_frames(shape: torch.Size, labels: Tensor, mask: Tensor, num_classes: int) -> None:
    for name, tensor in (("labels", labels), ("mask", mask)):
        if tensor.shape != shape:
            raise DataError(
                f"expected {name} of shape {tuple(shape)}, one per frame of the audio, found {tuple(tensor.shape)}; "
                "T samples have (T - 400) // 320 + 1 frames"
            )
    if mask.dtype != torch.bool:
        raise DataError(f"expected a mask of bools, True where a frame is masked, found {mask.dtype}")
    if labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= num_classes:
        raise DataError(
            f"expected labels below {num_classes}, the model's number of classes, found {int(labels.max())}; "
            "the units belong to a codebook of another size"
        )


def _choose_frames(labels: Tensor, mask: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the indices into the B F frames of the masked and of the other frames that are true and have a label."""
    counts = labels.to(mask.device) >= 0
    if valid is not None:
        counts &= valid.to(mask.device)
    masked, others = ((counts & part).flatten().nonzero()[:, 0] for part in (mask, ~mask))
    return masked, others


def mean_square(features: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean square of (B, F, C) over true frames."""
    if valid is None:
        return features.float().square().mean()
    squares = features.float().square().mean(2)
    return torch.where(valid.to(features.device, non_blocking=True), squares, 0).sum() / valid.sum()
