"""Image preparation on the device, in uint8 steps as Pillow does it: random crops and flips, and the test-time resize.

A resize is two passes, horizontal then vertical, each rounded to whole levels, with weights that stay
inside the crop (Pillow's `Image.resize` after `Image.crop`).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

TRIES = 10  # draws of a crop before the centre is taken


@dataclasses.dataclass(frozen=True)
class Augment:
    """Training-time preparation: torchvision's RandomResizedCrop(size, scale, ratio, bilinear), then a random flip.

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


def resize_weights(source: int, size: int, start: jax.Array | int, length: jax.Array | int, filter: str) -> jax.Array:
    """Weights `[size, source]` that resample `length` pixels from `start` on to `size` pixels, antialiased as Pillow does."""
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

    wide = levels(jnp.einsum("hwc,xw->hxc", image.astype(jnp.float32), columns, precision="highest"))
    return levels(jnp.einsum("hxc,yh->yxc", wide, rows, precision="highest"))


def draw_crop(key: jax.Array, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> jax.Array:
    """A random crop (top, left, height, width) in pixels, int32 `[4]`: torchvision's RandomResizedCrop.get_params."""
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(area_key, (TRIES,), minval=scale[0], maxval=scale[1])
    aspect = jnp.exp(jax.random.uniform(ratio_key, (TRIES,), minval=math.log(ratio[0]), maxval=math.log(ratio[1])))
    w, h = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = jnp.argmax(fits)
    crop_h, crop_w = h[first].astype(int), w[first].astype(int)
    top = jax.random.randint(top_key, (), 0, jnp.maximum(height - crop_h, 0) + 1)
    left = jax.random.randint(left_key, (), 0, jnp.maximum(width - crop_w, 0) + 1)
    # No draw fits: the largest centred crop whose ratio is allowed.
    wide, tall = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    centre = jnp.array([(height - tall) // 2, (width - wide) // 2, tall, wide])
    return jnp.where(fits.any(), jnp.stack([top, left, crop_h, crop_w]), centre).astype(jnp.int32)


def crop_and_resize(image: jax.Array, crop: jax.Array, size: int, filter: str = "bilinear") -> jax.Array:
    """`image` uint8 `[H, W, 3]` cut to `crop` and resized to whole levels, float32 `[size, size, 3]` in 0 to 255."""
    top, left, height, width = crop
    rows = resize_weights(image.shape[0], size, top, height, filter)
    columns = resize_weights(image.shape[1], size, left, width, filter)
    return _resample(image, rows, columns)


def augment(key: jax.Array, images: jax.Array, spec: Augment) -> jax.Array:
    """Random crops and flips of uint8 `[B, H, W, 3]`: uint8 `[B, size, size, 3]`, each image by its own key."""
    height, width = images.shape[1:3]

    def one(key, image):
        crop_key, flip_key = jax.random.split(key)
        if spec.scale != (1, 1) or spec.ratio != (1, 1) or (height, width) != (spec.size, spec.size):
            image = crop_and_resize(image, draw_crop(crop_key, height, width, spec.scale, spec.ratio), spec.size)
        if spec.flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image.astype(jnp.uint8)

    return jax.vmap(one)(jax.random.split(key, images.shape[0]), images)


def tested_geometry(height: int, width: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """How a test image is prepared: the (height, width) it is resized to (bicubic), then the (top, left) of the cut of `size`.

    As the published code: above 32 pixels the short side is resized to 256/224 × size and the centre cut out; up to 32
    pixels images are only resized where their size is another.
    """
    if size <= 32:
        return (size, size), (0, 0)
    short = int(256 / 224 * size)
    resized = (short, short * width // height) if height <= width else (short * height // width, short)
    return resized, (round((resized[0] - size) / 2), round((resized[1] - size) / 2))


def prepare_test(images: jax.Array, size: int) -> jax.Array:
    """Test images uint8 `[B, H, W, 3]` to uint8 `[B, size, size, 3]`, by `tested_geometry`."""
    height, width = images.shape[1:3]
    resized, (top, left) = tested_geometry(height, width, size)
    if (height, width) == resized == (size, size):
        return images
    rows = resize_weights(height, resized[0], 0, height, "bicubic")
    columns = resize_weights(width, resized[1], 0, width, "bicubic")
    rows, columns = rows[top : top + size], columns[left : left + size]
    return jax.vmap(lambda image: _resample(image, rows, columns))(images).astype(jnp.uint8)


def to_unit(images: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """uint8 levels to [0, 1]; the published backbones take no mean or standard deviation."""
    return images.astype(dtype) / 255
