"""CIFAR-100 prepared for TFDS without TensorFlow, which TFDS's own builder needs to read the
archive.

What is written is TFDS's own `cifar100/3.0.2`, as array_record: any TFDS reads it.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
RECORD = 2 + 32 * 32 * 3  # coarse label, label, then the red, green and blue planes


def builder(data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Return TFDS's cifar100 builder, changed to read its archive by plain Python.

    Its `download_and_prepare()` writes below `data_dir`.
    """
    stock = tfds.builder_cls("cifar100")

    class Cifar100(stock, skip_registration=True):
        name = "cifar100"
        url_infos = stock.url_infos  # the archive's checksum

        def _split_generators(self, dl_manager):
            archive = dl_manager.download(URL)
            for key, file in (
                ("label", "fine_label_names.txt"),
                ("coarse_label", "coarse_label_names.txt"),
            ):
                self.info.features[key].names = member(archive, file).decode().split()
            return {
                split: examples(split, member(archive, f"{split}.bin"))
                for split in ("train", "test")
            }

    return Cifar100(data_dir=data_dir, file_format="array_record")


def member(archive: str | Path, name: str) -> bytes:
    """Return the bytes of one file of the archive."""
    with tarfile.open(archive) as tar, tar.extractfile(f"cifar-100-binary/{name}") as file:
        return file.read()


def examples(split: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield TFDS's examples from one binary file: images as PNG, which is how TFDS stores them."""
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    for index, record in enumerate(records):
        png = io.BytesIO()
        Image.fromarray(
            np.ascontiguousarray(record[2:].reshape(3, 32, 32).transpose(1, 2, 0))
        ).save(png, "PNG")
        png.seek(0)
        yield (
            index,
            {
                "id": f"{split}_{index:05d}",
                "image": png,
                "label": int(record[1]),
                "coarse_label": int(record[0]),
            },
        )
