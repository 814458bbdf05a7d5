"""CLIP's tokenizer against open_clip's, whose ids `data/tokenizer.json.gz` holds."""

import gzip
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from soft_jax.errors import UserError
from soft_jax.models import tokenizer
from soft_jax.models.tokenizer import END, START, TEMPLATES, encode, tokenize

# "names": [name, ids, ids of "a photo of a NAME."] of each class; "odd": [text, ids]; and
# "mended": [text, ids] where ftfy does what ours doesn't. "by" says which versions they are from.
IDS = json.loads(gzip.decompress((Path(__file__).parent / "data/tokenizer.json.gz").read_bytes()))
SIZES = {"cifar100": 100, "imagenet_r": 200, "cub200": 200, "tiny_imagenet": 200, "food101": 101}


@pytest.mark.parametrize(("dataset", "size"), SIZES.items())
def test_ids_of_class_names_are_open_clips(dataset, size):
    rows = IDS["names"][dataset]
    assert len(rows) == size
    for name, ids, in_prompt in rows:
        assert encode(name) == ids, name
        assert encode(TEMPLATES[0].format(name)) == in_prompt, name


def test_ids_of_odd_texts_are_open_clips():
    assert len(IDS["odd"]) == 500
    differing = [text for text, ids in IDS["odd"] if encode(text) != ids]
    assert not differing


def test_only_ftfy_mends_these():
    """What the docstring names as different is: else it says too much."""
    same = [text for text, ids in IDS["mended"] if encode(text) == ids]
    assert not same


def test_letters_and_digits_are_pythons():
    """All of Unicode: what str.isalpha and str.isalnum tell is what the pattern's \\p{L} and
    \\p{N} stand for.
    """
    for char in map(chr, range(sys.maxunicode + 1)):
        kind = unicodedata.category(char)[0]
        if (char.isalpha(), char.isalnum()) != (kind == "L", kind in "LN"):
            raise AssertionError(f"U+{ord(char):04X}")


def test_start_and_end_can_be_written():
    assert encode("<|startoftext|>Dog<|ENDOFTEXT|>") == [START, *encode("dog"), END]


def test_rows_start_end_and_are_filled_with_zeros():
    tokens = tokenize(["a photo of a cat.", "", "dog " * 75, "dog " * 76])
    assert (tokens.shape, tokens.dtype) == ((4, 77), np.int32)
    np.testing.assert_array_equal(
        tokens[0], [START, 320, 1125, 539, 320, 2368, 269, END, *[0] * 69]
    )
    np.testing.assert_array_equal(tokens[1], [START, END, *[0] * 75])
    np.testing.assert_array_equal(tokens[2], [START, *[1929] * 75, END])
    np.testing.assert_array_equal(tokens[3], tokens[2])


def test_rows_are_cut_to_the_context():
    np.testing.assert_array_equal(
        tokenize(["a photo of a cat", "a cat"], 5),
        [[START, 320, 1125, 539, END], [START, 320, 2368, END, 0]],
    )
    assert tokenize([]).shape == (0, 77)


def test_what_is_no_list_of_texts_is_refused():
    with pytest.raises(UserError, match="texts: one string, 'a cat'"):
        tokenize("a cat")
    with pytest.raises(UserError, match="context_length: 1"):
        tokenize(["a cat"], 1)


@pytest.mark.parametrize("damage", [lambda data: data[:-1000], lambda data: data + b"\n"])
def test_a_damaged_merges_file_is_named(tmp_path, damage):
    path = tmp_path / "clip_merges.txt.gz"
    path.write_bytes(damage(tokenizer.MERGES.read_bytes()))
    with pytest.raises(UserError, match=r"clip_merges\.txt\.gz: damaged, SHA-256 .* expected 5f6c"):
        tokenizer.read_merges(path)


def test_a_missing_merges_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"clip_merges\.txt\.gz: No such file"):
        tokenizer.read_merges(tmp_path / "clip_merges.txt.gz")


def test_the_vocabulary_fills_the_ids():
    """256 bytes, the same at a word's end, and the merges, right up to START."""
    byte_ids, merges = tokenizer.read_merges(tokenizer.MERGES)
    assert sorted(byte_ids.values()) == list(range(256))
    assert list(merges.values()) == list(range(512, START))


def test_templates_have_one_place_for_the_name():
    assert len(TEMPLATES) == 8
    assert all(template.count("{}") == 1 for template in TEMPLATES)
