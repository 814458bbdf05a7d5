"""Runs on disk: checkpoints, folders, packed masks and format versions."""
