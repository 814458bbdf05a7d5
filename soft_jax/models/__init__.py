"""Backbones: the protocol that a family follows, the families, and their checkpoints."""
