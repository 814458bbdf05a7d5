"""Whether files come as fast as they are used: python -m benchmarks.files

Writes JPEG files of photographs' size, smooth with some noise, and takes batches of them as
training does, decoded, cropped and resized to 224 pixels; against the same work in one thread.
"""

import argparse
import io
import json
import os
import time

import numpy as np
from PIL import Image

from soft_jax.data import batches, sources
from soft_jax.data.augmentation import Augment, augment_file


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=240)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    rng, contents = np.random.default_rng(0), []
    for _ in range(arguments.files):
        width, height = rng.integers(300, 600, 2).tolist()
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (height, width, 3))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    count, spec = len(contents), Augment(224)
    files = sources.EncodedImages(
        contents.__getitem__, str, [""] * count, np.zeros(count, np.int32), np.arange(count)
    )
    start = time.perf_counter()
    for index in range(count):
        augment_file(rng, Image.fromarray(files.image(index)), spec)
    alone = count / (time.perf_counter() - start)
    sampler = batches.BatchSampler(0, 0, count, arguments.epochs, arguments.batch, 1)
    task_input = batches.from_files(sampler, files, spec, 0)
    next(task_input)
    start = time.perf_counter()
    taken = sum(len(batch["labels"]) for batch, _ in task_input)
    together = taken / (time.perf_counter() - start)
    print(f"{np.mean([len(c) for c in contents]) / 1024:.0f} KiB a file, {os.cpu_count()} cores")
    print(
        f"one thread: {alone:.0f} images/s; the pipeline: {together:.0f} images/s, "
        f"{together / alone:.2f} ×"
    )
    print(
        json.dumps(
            {
                "one_thread": alone,
                "pipeline": together,
                "bytes": float(np.mean([len(c) for c in contents])),
            }
        )
    )


if __name__ == "__main__":
    main()
