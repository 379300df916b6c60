"""The HuBERT model: encoder, head, arithmetic, cost, and which weights a name stands for.

May import `hubert.core` and `hubert.settings`.
"""
