"""A run as a whole: what it was asked for, how its stages hang together, how far it is, what it takes.

May import every package but `cli`.
"""
