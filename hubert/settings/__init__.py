"""What a person can set: sections of a recipe with defaults and checks, model sizes, and the merging by iteration.

May import `hubert.core`.
"""
