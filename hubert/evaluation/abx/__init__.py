"""ABX error rates by layer, scored by fastabx in a process of its own.

May import what `hubert.evaluation` may.
"""
