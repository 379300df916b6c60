"""Pages, tables and sentences that show what came out of an iteration and of a run.

May import the packages before it, up to `evaluation`.
"""
