"""The demo corpus: sentences, espeak-ng's speech in a noisy room, exact phone times.

May import `hubert.core`.
"""
