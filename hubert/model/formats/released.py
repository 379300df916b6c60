"""The published checkpoints, and where they are."""


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
