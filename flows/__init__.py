"""Composition only: what runs in which order, what runs at once, what a person decides."""
