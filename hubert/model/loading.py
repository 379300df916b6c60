"""How a model gets its weights and leaves them: what `HuBERT` and `HuBERTPretrain` inherit.

Loading takes every released format (`hubert.model.formats.read`), and a state dict of every known layout
(`hubert.model.formats.layouts`).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from hubert.core.errors import ConfigError
from hubert.model.formats.declared import fairseq_symbols
from hubert.model.formats.files import write_folder
from hubert.model.formats.layouts import ENCODER, HEAD, OWN, convert, is_own, select_classes, unwrap
from hubert.model.formats.read import fill, read_pretrained
from hubert.settings.model import ModelConfig


class EncoderFiles(nn.Module):
    """An encoder's state dict and files."""

    config: ModelConfig

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: FBT001, FBT002  (torch's)
        """Load weights in any layout that `hubert.model.formats.layouts` knows, with or without a head, which is left out.

        Raises:
            DataError: names of another program that no known layout has.
            RuntimeError: from torch: our names, but not all of them, or weights of other shapes.
        """
        if not is_own(state_dict):
            state_dict = convert(unwrap(state_dict)).encoder
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def save_pretrained(self, folder: str | Path, format: str = OWN) -> None:  # noqa: A002  (what it is called everywhere)
        """Write the model into a folder; each file is written whole or not at all.

        Args:
            folder: made if it is not there.
            format: `hubert-flows` (`config.json`, `model.safetensors`); `transformers`, for `HubertModel.from_pretrained`;
                `torchaudio`, a state dict `model.pt` and a `config.json` that says how to build its model.

        Raises:
            ConfigError: no such format, or one that cannot hold this model.
        """
        if format == OWN:
            write_folder(folder, self, self.config)
        else:
            from hubert.model.formats.export import export_weights

            export_weights(folder, self.config, self.state_dict(), format=format)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        normalize_waveform: bool | None = None,
    ) -> Self:
        """Load a released checkpoint or one of ours, without its head, in evaluation mode and float32.

        Its format is told from its content: our folders; folders of transformers (config.json with model.safetensors or
        pytorch_model.bin, sharded or not; HubertModel or fine-tuned); single files of fairseq, s3prl, torchaudio,
        transformers, minimal_hubert or ours (.pt, .pth, .bin, .safetensors). No code of a checkpoint is run.

        Sizes are read from the weights, and a configuration has to agree with them. Whether the waveform is normalised comes
        from the checkpoint's configuration (`hubert.model.formats.declared` has the rules); without one, models with LayerNorms
        in the extractor (large, xlarge) normalise and base does not, as fairseq pretrained them. docs/models.md lists what
        loads and what does not.

        Args:
            name: a folder or file; else a Hugging Face id such as `facebook/hubert-base-ls960`, or an http(s) URL.
            revision: branch, tag or commit on the Hub.
            token: for private repositories on the Hub.
            cache_dir: where downloads are kept.
            local_files_only: use what was downloaded before, and no network.
            normalize_waveform: whether the model was trained on waveforms of mean 0 and variance 1, if you know better than its
                files; None: as they say.

        Raises:
            ConfigError, TransientError: the name is no path here, and the Hub or the server does not have it, or cannot be
                reached.
            DataError: the folder or one of its files is missing, damaged or of no known layout, or the configuration contradicts
                the weights.
        """
        found = read_pretrained(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            normalize_waveform=normalize_waveform,
        )
        with torch.device("meta"):  # no random weights for nothing
            model = cls(found.config)
        fill(model, found.encoder, found.where)
        return model.eval()


class PretrainFiles(nn.Module):
    """State dict and files of an encoder with a head."""

    config: ModelConfig
    num_classes: int
    mask_embedding: Tensor

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: FBT001, FBT002  (torch's)
        """Load weights and head in any layout that `hubert.model.formats.layouts` knows.

        Of fairseq's class embeddings the rows of units are taken (`hubert.model.formats.layouts.class_rows`).

        Raises:
            DataError: names of another program that no known layout has.
            RuntimeError: from torch: weights are missing (those of a head, too), unknown, or of other shapes.
        """
        if not is_own(state_dict, ENCODER):
            converted, symbols = convert(unwrap(state_dict)), fairseq_symbols(state_dict)
            head = dict(converted.head)
            if "class_embeddings" in head:
                head["class_embeddings"] = select_classes(
                    head["class_embeddings"], converted.layout, symbols=symbols, num_classes=self.num_classes
                )
            state_dict = {f"{ENCODER}{name}": value for name, value in converted.encoder.items()} | head
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def save_pretrained(self, folder: str | Path, format: str = OWN) -> None:  # noqa: A002  (as in HuBERT)
        """Write the model into a folder, in the formats of `HuBERT.save_pretrained`.

        `transformers` has no head: of it only the mask embedding is kept. `torchaudio` holds it all, for
        `HuBERTPretrainModel`.

        Raises:
            ConfigError: no such format, or one that cannot hold this model.
        """
        if format == OWN:
            write_folder(folder, self, self.config, self.num_classes)
        else:
            from hubert.model.formats.export import export_weights

            head = {name: value for name, value in self.state_dict().items() if name in HEAD}
            encoder = self.get_submodule("hubert").state_dict()
            export_weights(folder, self.config, encoder, head, format=format)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        num_classes: int | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        normalize_waveform: bool | None = None,
    ) -> Self:
        """Load what `HuBERT.from_pretrained` loads, with its head, in evaluation mode and float32.

        Args:
            name: as there.
            num_classes: of the head; needed where the checkpoint has none or one of another size. Projection and class
                embeddings are then new (random), the mask embedding too unless the checkpoint has one, and a warning
                says so.
            revision: as there.
            token: as there.
            cache_dir: as there.
            local_files_only: as there.
            normalize_waveform: as there.

        Raises:
            ConfigError: no head and no `num_classes`; or as there.
            DataError: as there.
            TransientError: as there.
        """
        found = read_pretrained(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            normalize_waveform=normalize_waveform,
        )
        head = found.whole_head(num_classes)
        saved_classes = None if head is None else len(head["class_embeddings"])
        num_classes = saved_classes if num_classes is None else num_classes
        if num_classes is None:
            raise ConfigError(
                f"{name} holds an encoder without a head; expected num_classes, the number of units of the codebook, "
                "to give it a new one"
            )
        if head is not None and num_classes == saved_classes:
            with torch.device("meta"):
                model = cls(num_classes, found.config)
            fill(model, {f"{ENCODER}{key}": value for key, value in found.encoder.items()} | head, found.where)
            return model.eval()
        kind = "no head" if saved_classes is None else f"a head of {saved_classes} classes"
        warnings.warn(f"{name} has {kind}: the head of {num_classes} classes is new, with random weights", stacklevel=2)
        model = cls(num_classes, found.config)
        fill(model.get_submodule("hubert"), found.encoder, found.where)
        if "mask_embedding" in found.head:
            model.mask_embedding.data.copy_(found.head["mask_embedding"])
        return model.eval()
