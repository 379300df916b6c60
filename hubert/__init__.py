"""HuBERT: the model, and the science of pretraining it.

The names below are loaded when they are first used, so that `hubert status` and other tools need not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubert.model.formats.released import known_huberts
    from hubert.model.hubert import HuBERT, HuBERTPretrain
    from hubert.settings.model import ModelConfig

__all__ = ["HuBERT", "HuBERTPretrain", "ModelConfig", "known_huberts"]


def __getattr__(name: str) -> Any:
    if name == "ModelConfig":
        from hubert.settings.model import ModelConfig

        return ModelConfig
    if name in __all__:
        from hubert.model import hubert as model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
