"""Soft-Transformers for continual learning (arXiv 2411.16073) in JAX/Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soft_jax.predictor import Predictor

__all__ = ["Predictor"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # On demand: the command lines answer a wrong argument before flax and Orbax, which take seconds, are imported.
    if name == "Predictor":
        from soft_jax.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
