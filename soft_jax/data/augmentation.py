"""Image preparation in uint8 steps as Pillow does it: random crops and flips, and the test-time
resize; on the device, but for files.

A resize is two passes, horizontal then vertical, each rounded to whole levels, with weights that
stay inside the crop (Pillow's `Image.resize` after `Image.crop`).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

TRIES = 10  # draws of a crop before the centre is taken


@dataclasses.dataclass(frozen=True)
class Augment:
    """Training-time preparation: torchvision's RandomResizedCrop(size, scale, ratio, bilinear),
    then a random flip.

    `scale` is a range of the image's area, `ratio` of width/height; both (1, 1) mean no crop.
    """

    size: int
    scale: tuple[float, float] = (0.05, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True


def _triangle(x: jax.Array) -> jax.Array:
    return jnp.maximum(1 - jnp.abs(x), 0)


def _bicubic(x: jax.Array) -> jax.Array:
    # Keys' kernel with a = -0.5, Pillow's.
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


FILTERS = {"bilinear": _triangle, "bicubic": _bicubic}  # each vanishes outside its support


def resize_weights(
    source: int, size: int, start: jax.Array | int, length: jax.Array | int, filter: str
) -> jax.Array:
    """Return weights `[size, source]` that resample `length` pixels from `start` on to `size`.

    They filter as Pillow does when it makes an image smaller (antialiasing).
    """
    kernel = FILTERS[filter]
    start, length = jnp.asarray(start, jnp.float32), jnp.asarray(length, jnp.float32)
    scale = length / size
    stretch = jnp.maximum(scale, 1.0)
    centre = start + (jnp.arange(size, dtype=jnp.float32) + 0.5) * scale
    pixels = jnp.arange(source, dtype=jnp.float32)
    inside = (pixels >= start) & (pixels < start + length)
    weights = jnp.where(inside[None], kernel((pixels[None] + 0.5 - centre[:, None]) / stretch), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _resample(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    def levels(x):
        # Pillow rounds halves up, and halves are common: float32 must not fall just short of one.
        return jnp.clip(jnp.floor(x + (0.5 + 1e-4)), 0, 255)

    wide = levels(
        jnp.einsum("hwc,xw->hxc", image.astype(jnp.float32), columns, precision="highest")
    )
    return levels(jnp.einsum("hxc,yh->yxc", wide, rows, precision="highest"))


DRAWS = 2 * TRIES + 2  # uniform numbers that a crop takes


def draw_crop(
    draws: jax.Array | np.ndarray,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> jax.Array | np.ndarray:
    """Draw a random crop: (top, left, height, width) in pixels, int32 `[4]`.

    It is drawn as torchvision's RandomResizedCrop.get_params does. `draws`, float `[DRAWS]`, are
    uniform numbers in [0, 1). NumPy draws give a NumPy result, computed on the host.

    `draws`, float `[DRAWS]`, are from U[0, 1); NumPy's are answered in NumPy, on the host.
    """
    xp = np if isinstance(draws, np.ndarray) else jnp
    area = height * width * (scale[0] + draws[:TRIES] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = xp.exp(low + draws[TRIES : 2 * TRIES] * (high - low))
    w, h = xp.round(xp.sqrt(area * aspect)), xp.round(xp.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = xp.argmax(fits)
    crop_h, crop_w = h[first], w[first]
    # The product is rounded: just below 1, a draw can end at the number of places.
    top = xp.minimum(xp.floor(draws[-2] * (height - crop_h + 1)), height - crop_h)
    left = xp.minimum(xp.floor(draws[-1] * (width - crop_w + 1)), width - crop_w)
    # No draw fits: the largest centred crop whose ratio is allowed.
    wide, tall = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    centre = xp.array([(height - tall) // 2, (width - wide) // 2, tall, wide])
    return xp.where(
        fits.any(), xp.stack([top, left, crop_h, crop_w]).astype(xp.int32), centre.astype(xp.int32)
    )


def crop_and_resize(
    image: jax.Array, crop: jax.Array, size: int, filter: str = "bilinear"
) -> jax.Array:
    """Cut an image to `crop` and resize it to whole levels, float32 `[size, size, 3]`, 0 to 255.

    `image` is uint8 `[H, W, 3]`.
    """
    top, left, height, width = crop
    rows = resize_weights(image.shape[0], size, top, height, filter)
    columns = resize_weights(image.shape[1], size, left, width, filter)
    return _resample(image, rows, columns)


def augment(key: jax.Array, images: jax.Array, spec: Augment) -> jax.Array:
    """Crop and flip uint8 images `[B, H, W, 3]` at random, each image by its own key.

    The result is uint8 `[B, size, size, 3]`.
    """
    height, width = images.shape[1:3]

    def one(key, image):
        crop_key, flip_key = jax.random.split(key)
        if (
            spec.scale != (1, 1)
            or spec.ratio != (1, 1)
            or (height, width) != (spec.size, spec.size)
        ):
            draws = jax.random.uniform(crop_key, (DRAWS,))
            image = crop_and_resize(
                image, draw_crop(draws, height, width, spec.scale, spec.ratio), spec.size
            )
        if spec.flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image.astype(jnp.uint8)

    return jax.vmap(one)(jax.random.split(key, images.shape[0]), images)


def augment_file(rng: np.random.Generator, image: Image.Image, spec: Augment) -> np.ndarray:
    """Augment one image of any size as `augment` does, by Pillow on the host.

    The result is uint8 `[size, size, 3]`.
    """
    if spec.scale != (1, 1) or spec.ratio != (1, 1) or image.size != (spec.size, spec.size):
        top, left, height, width = draw_crop(
            rng.random(DRAWS), image.height, image.width, spec.scale, spec.ratio
        ).tolist()
        image = image.crop((left, top, left + width, top + height)).resize(
            (spec.size, spec.size), Image.Resampling.BILINEAR
        )
    if spec.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def tested_geometry(height: int, width: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return how a test image is prepared: the size it is resized to, and where it is cut.

    These are the (height, width) after bicubic resizing, and the (top, left) of the square cut of
    side `size`. As in the published code, images above 32 pixels are resized so that the short side
    is 256/224 × size, and the centre is cut out. Images of up to 32 pixels are only resized, and
    only if their size is not `size`.
    """
    if size <= 32:
        return (size, size), (0, 0)
    short = int(256 / 224 * size)
    resized = (
        (short, short * width // height) if height <= width else (short * height // width, short)
    )
    return resized, (round((resized[0] - size) / 2), round((resized[1] - size) / 2))


def prepare_test(images: jax.Array, size: int) -> jax.Array:
    """Prepare test images: uint8 `[B, H, W, 3]` to uint8 `[B, size, size, 3]`.

    `tested_geometry` says how.
    """
    height, width = images.shape[1:3]
    resized, (top, left) = tested_geometry(height, width, size)
    if (height, width) == resized == (size, size):
        return images
    rows = resize_weights(height, resized[0], 0, height, "bicubic")
    columns = resize_weights(width, resized[1], 0, width, "bicubic")
    rows, columns = rows[top : top + size], columns[left : left + size]
    return jax.vmap(lambda image: _resample(image, rows, columns))(images).astype(jnp.uint8)


def to_unit(images: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Scale uint8 levels to [0, 1]; the published backbones take no mean or standard deviation."""
    return images.astype(dtype) / 255
