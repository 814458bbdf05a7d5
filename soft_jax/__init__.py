"""Soft-Transformers for continual learning (arXiv 2411.16073) in JAX/Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soft_jax.inference.predictor import Predictor

__all__ = ["Predictor"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # On demand: it brings in all the rest, which a user of one module may do without.
    if name == "Predictor":
        from soft_jax.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
