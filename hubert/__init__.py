"""HuBERT: the model, and the science of pretraining it.

The names below are loaded when they are first used, so that `hubert status` and other tools need not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubert.model import HuBERT, HuBERTPretrain, known_huberts
    from hubert.sizes import ModelConfig

__all__ = ["HuBERT", "HuBERTPretrain", "ModelConfig", "known_huberts"]


def __getattr__(name: str) -> Any:
    if name == "ModelConfig":
        from hubert.sizes import ModelConfig

        return ModelConfig
    if name in __all__:
        from hubert import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
