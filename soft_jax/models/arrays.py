"""What checkpoints of all namings have in common: arrays by name, taken one by one."""

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors

FLOATS = tuple(np.dtype(kind) for kind in ("float32", "float16", jnp.bfloat16, "float64"))
# The types of safetensors that numpy and ml_dtypes (of JAX) have.
_SAFETENSORS_TYPES = {
    "BF16": jnp.bfloat16,
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
    "C64": np.dtype("complex64"),
}


class BadArray(ValueError):
    """An array of a file that is none of numbers."""


def from_safetensors(raw: bytes) -> dict[str, np.ndarray]:
    """Return the arrays that the bytes of a `.safetensors` file hold, bfloat16 ones too.

    Raises BadArray naming one of a type that NumPy has not, SafetensorError for damaged bytes.
    """
    arrays = {}
    for name, entry in safetensors.deserialize(raw):
        if entry["dtype"] not in _SAFETENSORS_TYPES:
            raise BadArray(f"array {name!r} is of the type {entry['dtype']}, expected floats")
        kind = np.dtype(_SAFETENSORS_TYPES[entry["dtype"]])
        arrays[name] = np.frombuffer(entry["data"], kind).reshape(entry["shape"])
    return arrays


def refuse_foreign(
    arrays: Mapping[str, np.ndarray], foreign: Mapping[str, str], family: str
) -> None:
    """Raise ValueError for an array of a model that computes something else than our `family`.

    `foreign` has patterns of such arrays' names, and says what they are.
    """
    for key in sorted(arrays):
        for pattern, meaning in foreign.items():
            if re.fullmatch(pattern, key):
                raise ValueError(
                    f"array {key!r} is {meaning}: the model computes something that this {family} "
                    "does not, so take one without"
                )


def check_values(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError naming an array that is no array of finite floats, or is empty."""
    for key, array in arrays.items():
        if array.dtype.newbyteorder("=") not in FLOATS:
            kinds = ", ".join(kind.name for kind in FLOATS)
            raise ValueError(f"array {key!r} is of the type {array.dtype}, expected {kinds}")
        if not array.size:
            raise ValueError(f"array {key!r} is empty: its shape is {array.shape}")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is found
            finite = np.isfinite(np.asarray(array, np.float32)).all()
        if not finite:
            raise ValueError(f"array {key!r} holds NaN or infinite numbers")


def at_least_float32(array: np.ndarray) -> np.ndarray:
    """Return an array in float32, or in float64 if it is."""
    return np.asarray(array, np.float64 if array.dtype == np.float64 else np.float32)


class Taken(dict):
    """Arrays of a file, remembering which were asked for."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        super().__init__(arrays)
        self.used: set[str] = set()

    def __missing__(self, key: str):
        raise ValueError(f"array {key!r} is missing")

    def take(self, key: str, *shape: int) -> np.ndarray:
        """Return the array `key`. Raises ValueError where it is missing or not of `shape`."""
        array = self[key]
        self.used.add(key)
        if array.shape != shape:
            raise ValueError(f"array {key!r} is {array.shape}, expected {shape}")
        return array


def shape_of(arrays: Mapping[str, np.ndarray], pattern: str, expected: str) -> tuple[int, ...]:
    """Return the shape of the array that `pattern` names, with as many axes as `expected` has."""
    key = next((key for key in arrays if re.fullmatch(pattern, key)), None)
    if key is None:
        name = re.sub(r"\[(\d)\d\]", r"\1", pattern.replace("\\", ""))
        raise ValueError(f"array {name!r} is missing")
    shape = arrays[key].shape
    if len(shape) != len(expected.rstrip(",)").split(",")) or not all(shape):
        raise ValueError(f"array {key!r} is {shape}, expected {expected}")
    return shape
