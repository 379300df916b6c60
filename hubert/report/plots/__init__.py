"""The report's pictures.

May import what `hubert.report` may.
"""
