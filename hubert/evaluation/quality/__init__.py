"""Units beside phone alignments: purity, PNMI.

May import what `hubert.evaluation` may.
"""
