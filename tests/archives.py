"""Small archives in the formats of public data sets."""

import io
import tarfile
from pathlib import Path

import numpy as np


def cifar100(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Write CIFAR-100's binary archive, with 30 training images and 10 for the test.

    Returns its file, and by split the records, uint8 `[N, 3074]`.
    """
    rng = np.random.default_rng(0)
    records = {
        name: rng.integers(0, 20, (count, 3074), np.uint8)
        for name, count in (("train", 30), ("test", 10))
    }
    files = {f"{name}.bin": array.tobytes() for name, array in records.items()}
    files["fine_label_names.txt"] = "".join(f"fine{i}\n" for i in range(100)).encode()
    files["coarse_label_names.txt"] = "".join(f"coarse{i}\n" for i in range(20)).encode()
    archive = folder / "cifar-100-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-100-binary/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive, records
