"""The formats in which models are written.

They have a file of their own since the command line lists them in its help, which must not wait for torch.
"""

FORMATS = ("hubert-flows", "transformers", "torchaudio")  # our own first
