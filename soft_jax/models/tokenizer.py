"""CLIP's byte-pair tokenizer, from text to the ids that a CLIP text encoder reads, and the prompts
of its zero-shot classifier.

The merges are OpenAI's: `assets/clip_merges.txt.gz`, with its license beside it.
"""

import functools
import gzip
import hashlib
import html
import itertools
import re
import unicodedata
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from soft_jax.errors import UserError

START, END = 49406, 49407
MERGES = Path(str(resources.files("soft_jax") / "assets" / "clip_merges.txt.gz"))
MERGES_SHA256 = "5f6c91a3727038ae46523c18c13e3275d6713eea9fd2ccfeb5139351419ee21f"

# The plain prompt, then the seven that greedy selection found for ImageNet:
# notebooks/Prompt_Engineering_for_ImageNet.ipynb in https://github.com/openai/CLIP.
TEMPLATES = (
    "a photo of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

_SPECIAL = {"<|startoftext|>": START, "<|endoftext|>": END}
# CLIP's pattern. `re` has no \p{L} and \p{N}: [^\W_] is a letter or a digit, and `_words` parts the
# digits. str.isalpha tells letters (categories L*), and str.isalnum adds digits (N*).
_WORDS = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\s\w]|_)+",
    re.IGNORECASE,
)
_INVISIBLE = re.compile("[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
# Wide and narrow forms, then ligatures of Latin letters.
_FORMS = re.compile(
    "[\uff01-\uffef\u3000\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06]"
)


def tokenize(texts: Sequence[str], context_length: int = 77) -> np.ndarray:
    """Return the ids of texts, int32 [N, context_length]: START, the text's, END, and 0 behind.

    A text that is too long is cut, and END is then the last id.

    Raises UserError where `texts` is one string, or `context_length` has no room for START and END.
    """
    if isinstance(texts, str):
        raise UserError(f"texts: one string, {texts[:50]!r}; give a list of strings")
    if context_length < 2:
        raise UserError(f"context_length: {context_length}; START and END need at least 2")
    tokens = np.zeros((len(texts), context_length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        ids = [START, *encode(text)][: context_length - 1]
        row[: len(ids) + 1] = [*ids, END]
    return tokens


def encode(text: str) -> list[int]:
    """Return the ids of a text, without START and END.

    Upper and lower case, lengths of white space and HTML's character references make no
    difference, as in CLIP. CLIP also lets ftfy mend the text first, which changes nothing in ASCII
    without `&` and control characters. Of what ftfy does, this makes the replacements that take no
    guess: NFC, straight quotation marks, plain forms of wide and narrow letters and of Latin
    ligatures, U+FFFD for surrogates, and no control characters. Not done, so that the ids may
    differ: garbled text (`cafÃ©`, or U+0080 to U+009F) stays garbled, a terminal's color codes lose
    their escape character alone, character references in capitals (`&EACUTE;`) and below two layers
    of `&amp;` stay, `&rsquo;` is straight also where the text has a `<`, and the ligature `ﬅ`
    becomes `st`.
    """
    ids = []
    for word in _words(_clean(text)):
        ids += [_SPECIAL[word]] if word in _SPECIAL else _byte_pairs(word)
    return ids


def _clean(text: str) -> str:
    text = html.unescape(html.unescape(text))
    text = _FORMS.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("[\u02bc\u2018-\u201b]", "'", text)
    text = re.sub("[\u201c-\u201f]", '"', text)
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)  # no UTF-8 has them
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    return " ".join(text.split()).lower()


def _words(text: str) -> list[str]:
    """Return what is encoded by itself: runs of letters, single digits, and runs of other signs."""
    return _WORDS.findall("".join(f" {c} " if c.isalnum() and not c.isalpha() else c for c in text))


def _byte_pairs(word: str) -> list[int]:
    """Return the ids of a word: its bytes, with neighbors merged in the order of the merges."""
    byte_ids, merges = _vocabulary()
    ids = [byte_ids[byte] for byte in word.encode()]
    ids[-1] += 256  # the same byte at a word's end
    while len(ids) > 1:
        new, pair = min((merges.get(pair, START), pair) for pair in itertools.pairwise(ids))
        if new == START:
            break
        merged = []
        for token in ids:
            if merged and (merged[-1], token) == pair:
                merged[-1] = new
            else:
                merged.append(token)
        ids = merged
    return ids


@functools.cache
def _vocabulary() -> tuple[dict[int, int], dict[tuple[int, int], int]]:
    return read_merges(MERGES)


def read_merges(path: Path) -> tuple[dict[int, int], dict[tuple[int, int], int]]:
    """Return the ids of the 256 bytes, and the id that two neighboring ids merge to.

    The ids count up: bytes, bytes at a word's end, then the file's merges, line by line.

    Raises UserError where the file is missing or not the one that belongs to this package.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; install soft_jax again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != MERGES_SHA256:
        raise UserError(
            f"{path}: damaged, SHA-256 {found}; expected {MERGES_SHA256}: install soft_jax again"
        )
    # Bytes that print stand for themselves and come first; the others are written from U+0100 on.
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    symbols = [chr(byte) for byte in printed] + [chr(0x100 + i) for i in range(len(others))]
    ids = {symbol: i for i, symbol in enumerate(symbols + [f"{s}</w>" for s in symbols])}
    merges = {}
    for line in gzip.decompress(data).decode().splitlines():
        first, second = line.split(" ")
        merges[ids[first], ids[second]] = ids[first + second] = len(ids)
    return {byte: i for i, byte in enumerate(printed + others)}, merges
