"""Codebook, k-means, units of every file, their statistics, and exchange with other programs.

May import the packages before it, up to `features`.
"""
