"""Heads on disk: what a checkpoint is, by which conventions, and its conversion."""
