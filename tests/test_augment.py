import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from soft_jax.data import augmentation, sources
from soft_jax.data.augmentation import (
    DRAWS,
    Augment,
    augment_file,
    draw_crop,
)

# Compiled as the training step and evaluation compile them.
augment = jax.jit(augmentation.augment, static_argnums=2)
crop_and_resize = jax.jit(augmentation.crop_and_resize, static_argnums=2)
prepare_test = jax.jit(augmentation.prepare_test, static_argnums=1)


@pytest.fixture(scope="module")
def images():
    """Real digits, and noise, which is the hardest to resample."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    return np.concatenate([sources.load("digits").train.images[:6], noise])


@pytest.mark.parametrize("size", [16, 32, 45])
@pytest.mark.parametrize("crop", [(0, 0, 32, 32), (3, 5, 20, 11), (30, 0, 2, 32), (7, 9, 1, 1)])
def test_crop_and_resize_is_pillows(images, crop, size):
    top, left, height, width = crop
    for image in images:
        box = (left, top, left + width, top + height)
        theirs = np.asarray(
            Image.fromarray(image).crop(box).resize((size, size), Image.BILINEAR), np.int32
        )
        ours = np.asarray(crop_and_resize(image, jnp.array(crop), size), np.int32)
        # Exact halves may go either way (Pillow's weights are 22-bit integers), in each of the two
        # passes.
        assert np.abs(ours - theirs).max() <= 2


def test_random_crops_are_pillows(images, rng):
    differ = []
    for _ in range(200):
        image = images[rng.integers(len(images))]
        height, width = rng.integers(1, 33, 2)
        top, left = rng.integers(0, 33 - height), rng.integers(0, 33 - width)
        box = (left, top, left + width, top + height)
        theirs = np.asarray(
            Image.fromarray(image).crop(box).resize((32, 32), Image.BILINEAR), np.int32
        )
        ours = np.asarray(
            crop_and_resize(image, jnp.array([top, left, height, width]), 32), np.int32
        )
        assert np.abs(ours - theirs).max() <= 1
        differ.append((ours != theirs).mean())
    assert np.mean(differ) < 0.01


@pytest.mark.parametrize(("shape", "size"), [((32, 32), 56), ((48, 80), 40), ((90, 60), 64)])
def test_test_resize_is_pillows(shape, size):
    """Short side to 256/224 of the size, bicubic, then the centre."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    short = int(256 / 224 * size)
    height, width = (
        (short, short * shape[1] // shape[0])
        if shape[0] <= shape[1]
        else (short * shape[0] // shape[1], short)
    )
    resized = Image.fromarray(image).resize((width, height), Image.BICUBIC)
    top, left = round((height - size) / 2), round((width - size) / 2)
    theirs = np.asarray(resized.crop((left, top, left + size, top + size)), np.int32)
    ours = np.asarray(prepare_test(image[None], size)[0], np.int32)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - theirs).mean() < 0.01


def test_small_test_images_are_taken_as_they_are(images):
    np.testing.assert_array_equal(prepare_test(images, 32), images)


def test_crops_are_drawn_as_torchvision_draws_them():
    draws = np.random.default_rng(0).random((4000, DRAWS), np.float32)
    crops = np.asarray(jax.vmap(lambda d: draw_crop(d, 32, 32, (0.05, 1.0), (3 / 4, 4 / 3)))(draws))
    on_host = np.array([draw_crop(d, 32, 32, (0.05, 1.0), (3 / 4, 4 / 3)) for d in draws])
    assert (crops == on_host).all(axis=1).mean() > 0.999  # but where rounding decides
    top, left, height, width = crops.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 32).all()
    assert (left + width <= 32).all()
    area = height * width / 32**2
    # Uniform between 0.05 and 1, less the draws near 1 that do not fit at their ratio.
    assert area.min() < 0.07
    assert 0.45 < area.mean() < 0.53
    ratio = np.log(width / height)
    assert abs(ratio.mean()) < 0.02
    assert np.abs(ratio).max() < np.log(4 / 3) + 0.2  # sizes are whole pixels
    assert len(np.unique(top)) > 20


def test_crop_that_never_fits_is_the_centre():
    crop = draw_crop(
        jax.random.uniform(jax.random.key(0), (DRAWS,)), 10, 40, (0.9, 1.0), (1.0, 1.0)
    )
    np.testing.assert_array_equal(crop, [0, 15, 10, 10])


def test_flip_and_identity(images):
    same = augment(jax.random.key(0), images, Augment(32, (1, 1), (1, 1), flip=False))
    np.testing.assert_array_equal(same, images)
    flipped = np.asarray(augment(jax.random.key(0), images, Augment(32, (1, 1), (1, 1), flip=True)))
    turned = [np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, images, strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(flipped, images, strict=True)]
    assert all(a or b for a, b in zip(turned, kept, strict=True))
    assert any(turned)
    assert any(kept)


def test_each_image_has_its_own_key(images):
    same = np.repeat(images[:1], 8, axis=0)
    out = np.asarray(augment(jax.random.key(0), same, Augment(32)))
    assert out.dtype == np.uint8
    assert len({image.tobytes() for image in out}) == 8


def test_a_crop_stays_inside_where_draws_are_at_their_ends():
    for draw in (0.0, 1 - 2**-24):
        top, left, height, width = draw_crop(
            jnp.full(DRAWS, draw, jnp.float32), 300, 500, (0.05, 1.0), (3 / 4, 4 / 3)
        )
        assert top >= 0
        assert left >= 0
        assert top + height <= 300
        assert left + width <= 500


def test_a_file_is_augmented_as_an_array_is(images):
    """The same crop and flip of the same image, by Pillow and on the device."""
    spec = Augment(24)
    differ = []
    for seed in range(20):
        image = images[seed % len(images)]
        ours = augment_file(np.random.default_rng(seed), Image.fromarray(image), spec).astype(int)
        draws = np.random.default_rng(seed)
        crop = draw_crop(draws.random(DRAWS), 32, 32, spec.scale, spec.ratio)
        theirs = np.asarray(crop_and_resize(image, jnp.asarray(crop), 24)).astype(int)
        theirs = theirs[:, ::-1] if draws.random() < 0.5 else theirs
        assert np.abs(ours - theirs).max() <= 2
        differ.append((ours != theirs).mean())
    assert np.mean(differ) < 0.02
    same = augment_file(
        np.random.default_rng(0),
        Image.fromarray(images[0]),
        Augment(32, (1, 1), (1, 1), flip=False),
    )
    np.testing.assert_array_equal(same, images[0])
