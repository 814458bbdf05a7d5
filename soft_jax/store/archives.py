"""A version's folder as one small file, from which it comes back to the bit.

It is a tar in xz, in which an array is not as on disk, compressed by itself, but its bytes by
significance: the lowest of all numbers, then the next of all, up to their signs and exponents. Of
masks near 1 those are nearly the same everywhere, and xz leaves next to nothing of them, which it
can't between bytes that training made random. Those stay.
"""

import io
import json
import lzma
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorstore as ts

_PLANES = "planes"  # stands for the files of an array's numbers, beside what describes them
_ARRAY = ".zarray"
_DAMAGE = (tarfile.TarError, lzma.LZMAError)  # of an archive


def pack(folder: Path, target: Path) -> None:
    """Write a version's folder as the archive `target`. Raises OSError where it can't be."""
    regrouped = set()
    with tarfile.open(target, "w:xz") as archive:
        for file in sorted(folder.rglob("*")):
            if file.parent in regrouped:
                continue
            name = file.relative_to(folder.parent)
            archive.add(file, name.as_posix(), recursive=False)
            # Comes before the array's other files, which are named by numbers.
            if file.name == _ARRAY and (planes := _planes(file.parent)) is not None:
                entry = tarfile.TarInfo(name.with_name(_PLANES).as_posix())
                entry.size = len(planes)
                archive.addfile(entry, io.BytesIO(planes))
                regrouped.add(file.parent)


def unpack(raw: bytes, folder: Path) -> None:
    """Write the folder of a version from what `pack` wrote, also as it did before format 5 of a
    library, with all files as they were. Raises OSError where it can't be written.
    """
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:xz") as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]  # without the version's folder
            path = folder / member.name
            if path.name != _PLANES:
                archive.extract(member, folder, filter="data")
                continue
            described = (path.parent / _ARRAY).read_bytes()
            for name, content in _files(described, archive.extractfile(member).read()).items():
                (path.parent / name).write_bytes(content)


def hashes(file: Path, folder: str) -> dict[str, str]:
    """Return the hex SHA-256 of each array in an archive of `folder`, by "item/leaf".

    Empty where the archive can't be read.
    """
    try:
        with tarfile.open(file, "r:xz") as archive:
            return json.loads(archive.extractfile(f"{folder}/manifest/metadata").read())["sha256"]
    # of the disk, of tar, of xz, of JSON, and members or keys that are not there
    except (OSError, EOFError, LookupError, ValueError, AttributeError, *_DAMAGE):
        return {}


def _planes(folder: Path) -> bytes | None:
    """Return an array's bytes by significance; None where its files would not come back to the bit.

    So it is where another version of TensorStore wrote them, whose compressor may differ.
    """
    there = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    _, array = _opened(there)
    values = np.asarray(array.read().result())
    planes = values.reshape(-1, 1).view(np.uint8).T.tobytes()
    return planes if _files(there[_ARRAY], planes) == there else None


def _files(described: bytes, planes: bytes) -> dict[str, bytes]:
    """Return the files of an array, by their names."""
    store, array = _opened({_ARRAY: described})
    dtype = array.dtype.numpy_dtype
    values = np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, -1).T.copy().view(dtype)
    array.write(values.reshape(array.shape)).result()
    return {name.decode(): store[name] for name in store.list().result()}


def _opened(files: Mapping[str, bytes]) -> tuple[ts.KvStore, ts.TensorStore]:
    """Return an array's files in memory, and the array."""
    context = ts.Context()
    store = ts.KvStore.open({"driver": "memory"}, context=context).result()
    for name, content in files.items():
        store[name] = content
    spec = {"driver": "zarr", "kvstore": {"driver": "memory"}}
    spec["store_data_equal_to_fill_value"] = True
    return store, ts.open(spec, context=context, open=True).result()
