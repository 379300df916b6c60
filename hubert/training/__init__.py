"""Crops, masks, the training loop, checkpoints, and the process that runs it.

May import the packages before it, up to `units`. `hubert.train` needs only torch, numpy, soundfile, pydantic, safetensors.
"""
