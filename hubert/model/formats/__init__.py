"""Checkpoints of every program, read without running any of their code, and written.

May import `hubert.core` and `hubert.settings`.
"""

FORMATS = (
    "hubert-flows",
    "transformers",
    "torchaudio",
)  # that models are written in, our own first; here the help finds them
