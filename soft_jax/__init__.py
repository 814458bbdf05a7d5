"""Soft-Transformers for continual learning (arXiv 2411.16073) in JAX/Flax."""

__version__ = "0.1.0"
