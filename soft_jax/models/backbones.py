"""Pre-trained backbones: where they are found, and their arrays under our names.

A backbone is one of `BACKBONES`, or any plain Vision Transformer of timm by its name, with the path
of its file (or of a folder as the Hugging Face Hub has it). Files are `.npz` or `.safetensors`, and
their arrays are named as Google's ViT releases do it (`Transformer/encoderblock_0/...`) or timm's
models (`blocks.0.attn.qkv.weight`). A CLIP is one of `BACKBONES` too, or has any name and a config
beside its file, `.safetensors` in open_clip's naming or Hugging Face's.

The ViTs of `BACKBONES` get pixels in [0, 1], as the published code feeds them; those by a timm name
and CLIPs get them normalized by the mean and standard deviation that they were trained with.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import io
import os
import re
import threading
import time
import urllib.error
import urllib.request
from importlib import resources
from pathlib import Path

import numpy as np

from soft_jax import cache, paths, pytrees
from soft_jax.buckets import BucketPath
from soft_jax.cache import CACHE
from soft_jax.config import unknown_value
from soft_jax.errors import Stopped, UserError
from soft_jax.models import clip_checkpoints, clip_config, timm_config, vit_checkpoints
from soft_jax.models.arrays import BadArray, from_safetensors
from soft_jax.models.clip import CLIPConfig
from soft_jax.models.protocol import Architecture
from soft_jax.models.vit import ViTConfig
from soft_jax.paths import Place

# Seconds without a byte from the network after which a download has failed.
PATIENCE = 20.0


@dataclasses.dataclass(frozen=True)
class Source:
    """A named backbone: its sizes, its file, and where the file can be had (bundled when `url`
    is empty).

    `sha256` (hex) is that of the file, where its publisher gives it.
    """

    architecture: Architecture
    file: str
    url: str = ""
    sha256: str = ""


def _vit(image_size: int, patch_size: int, dim: int, depth: int, heads: int) -> ViTConfig:
    return ViTConfig(image_size, patch_size, dim, depth, heads, mlp_dim=4 * dim)


def _clip(patch_size: int, large: bool = False, quick_gelu: bool = True) -> CLIPConfig:
    """Return the sizes of the CLIPs with a ViT-B or ViT-L for images of 224 pixels."""
    dim, depth, text_dim = (1024, 24, 768) if large else (768, 12, 512)
    return CLIPConfig(
        image_size=224,
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        heads=dim // 64,
        mlp_dim=4 * dim,
        text_dim=text_dim,
        text_depth=12,
        text_heads=text_dim // 64,
        text_mlp_dim=4 * text_dim,
        embed_dim=text_dim,
        quick_gelu=quick_gelu,
    )


def _hub(repository: str, file: str = "model.safetensors") -> str:
    return f"https://huggingface.co/timm/{repository}/resolve/main/{file}"


_OPEN_CLIP_FILE = "open_clip_model.safetensors"
BUCKET = "https://storage.googleapis.com/vit_models/"
_AUGREG = "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz"
BACKBONES = {
    # The backbone of the paper's tables: the original ImageNet-21k release, without its pre_logits
    # layer.
    "vit_b16": Source(
        _vit(224, 16, 768, 12, 12), "ViT-B_16.npz", BUCKET + "imagenet21k/ViT-B_16.npz"
    ),
    "vit_b32": Source(
        _vit(224, 32, 768, 12, 12), "ViT-B_32.npz", BUCKET + "imagenet21k/ViT-B_32.npz"
    ),
    "vit_l16": Source(
        _vit(224, 16, 1024, 24, 16), "ViT-L_16.npz", BUCKET + "imagenet21k/ViT-L_16.npz"
    ),
    # Its successor, ImageNet-21k with augmentation and regularization (Steiner et al., 2021),
    # before any fine-tuning.
    "vit_b16_augreg": Source(_vit(224, 16, 768, 12, 12), "ViT-B_16-augreg.npz", BUCKET + _AUGREG),
    # Table 2's: ImageNet-1k with the SAM optimizer (Chen et al., 2022), and DINO's self-supervision
    # (Caron et al., 2021) in timm's naming.
    "vit_b16_sam": Source(
        _vit(224, 16, 768, 12, 12), "ViT-B_16-sam.npz", BUCKET + "sam/ViT-B_16.npz"
    ),
    "vit_b16_dino": Source(
        _vit(224, 16, 768, 12, 12),
        "ViT-B_16-dino.safetensors",
        _hub("vit_base_patch16_224.dino"),
    ),
    # Supervised on Tiny-ImageNet at 32 pixels, 17.6% top-1: weak, but pre-trained; it ships with
    # the package.
    "vit_ti8_32": Source(
        _vit(32, 8, 192, 12, 3),
        "vit_ti8_32.npz",
        sha256="222bec5caee26212771e6aa3754dd06608afa4fd23dcf792b1be87d20ada43de",
    ),
    # OpenAI's CLIPs (Radford et al., 2021), as open_clip has them; the first is Table 3's.
    "clip_vit_b16": Source(
        _clip(16),
        "CLIP-ViT-B-16-openai.safetensors",
        _hub("vit_base_patch16_clip_224.openai", _OPEN_CLIP_FILE),
    ),
    "clip_vit_b32": Source(
        _clip(32),
        "CLIP-ViT-B-32-openai.safetensors",
        _hub("vit_base_patch32_clip_224.openai", _OPEN_CLIP_FILE),
    ),
    "clip_vit_l14": Source(
        _clip(14, large=True),
        "CLIP-ViT-L-14-openai.safetensors",
        _hub("vit_large_patch14_clip_224.openai", _OPEN_CLIP_FILE),
    ),
    # open_clip's own, trained on LAION-400M with the erf GELU.
    "clip_vit_b16_laion400m": Source(
        _clip(16, quick_gelu=False),
        "CLIP-ViT-B-16-laion400m.safetensors",
        _hub("vit_base_patch16_clip_224.laion400m_e32", _OPEN_CLIP_FILE),
    ),
}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Frozen parameters with what identifies them.

    `params` is the float32 tree of the architecture's module. `fingerprint` is the hex SHA-256 of
    the file (what `sha256sum` prints) for those of `BACKBONES`; for others it is one of that and of
    what the arrays don't show (heads, activation, mean, standard deviation). `left_out` are the
    arrays of the file that the features don't need, `notes` sentences for the user on what of its
    `config.json` is not followed.
    """

    name: str
    architecture: Architecture
    params: pytrees.Tree
    fingerprint: str
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load(
    name: str,
    path: str = "",
    image_size: int = 0,
    dtype: str = "float32",
    stop: threading.Event | None = None,
) -> Backbone:
    """Load backbone `name` for images of `image_size` pixels (0: its own size).

    `path` is its file or the folder of it; `stop` ends a download when it is set. Raises UserError
    when the file cannot be had, is damaged, is not what it was at its first download, or does not
    fit the backbone, and Stopped.
    """
    file = locate(name, path, stop)
    try:
        raw = paths.read_bytes(file)
    except OSError as error:
        raise UserError(f"backbone: {file} can't be read: {error}") from error
    fingerprint = hashlib.sha256(raw).hexdigest()
    source = BACKBONES.get(name)
    if source and not path:
        _check_sha256(source, file, fingerprint)
    arrays = _arrays(file, raw, source)
    try:
        if source:
            native, notes = source.architecture, _notes(source, file, arrays)
        elif clip_checkpoints.is_clip(arrays):
            native, notes = _clip_architecture(name, file, arrays)
            fingerprint = _with_unseen(
                fingerprint,
                *(native.heads, native.text_heads, native.quick_gelu, native.preprocessing),
            )
        else:
            native, notes = _timm_architecture(name, file, arrays, image_size)
            fingerprint = _with_unseen(fingerprint, native.heads, native.preprocessing)
        native = dataclasses.replace(native, dtype=dtype)
        params, left_out = native.convert(arrays)
    except ValueError as error:
        raise UserError(f"backbone: {file} does not fit {name!r}: {error}") from error
    try:
        architecture = native.at_size(image_size or native.image_size)
    except ValueError as error:
        raise UserError(f"image_size: {error}") from error
    params = architecture.fit_size(params)
    return Backbone(name, architecture, params, fingerprint, left_out, notes)


def _with_unseen(fingerprint: str, *unseen: object) -> str:
    """Return a fingerprint of a file's and of what its arrays don't show."""
    return hashlib.sha256(" ".join(map(str, (fingerprint, *unseen))).encode()).hexdigest()


def locate(name: str, path: str = "", stop: threading.Event | None = None) -> Place:
    """Find the file of backbone `name`: `path`, a bundled or cached copy, or a download.

    `path`, a file or a folder, is taken if it is given; else the copy, and a download where there
    is no copy, which `stop` ends when it is set. Raises UserError when `name` is unknown, there is
    no file at `path`, or the download fails, and Stopped.
    """
    source = BACKBONES.get(name)
    if path:
        with paths.reading("backbone_path"):
            return _at_path(paths.place(path, "backbone_path"), name, source)
    if not source:
        if not timm_config.is_known(name):
            raise UserError(_unknown(name))
        raise UserError(
            f"backbone_path: missing; give the file of {name!r}, such as the model.safetensors "
            f"from https://huggingface.co/timm/{name}, with its config.json beside it"
        )
    if not source.url:
        return Path(str(resources.files("soft_jax") / "assets" / source.file))
    cached = paths.place(CACHE, "SOFT_JAX_CACHE") / source.file
    with paths.reading("SOFT_JAX_CACHE"):
        there = cached.is_file()
    return cached if there else _download(source, cached, stop)


def _unknown(name: str) -> str:
    return (
        f"{unknown_value('backbone', name, BACKBONES)} and, with backbone_path, timm's names of "
        "plain Vision Transformers, such as vit_small_patch16_224, and any name for a CLIP"
    )


def _at_path(path: Place, name: str, source: Source | None) -> Place:
    if path.is_file():
        return path
    wanted = (
        [source.file] if source else ["model.safetensors", f"{name}.safetensors", f"{name}.npz"]
    )
    if source and source.file.endswith(".safetensors"):
        wanted.append("model.safetensors")  # as the Hugging Face Hub calls it
    if isinstance(source.architecture, CLIPConfig) if source else not timm_config.is_known(name):
        # First: beside it, model.safetensors is timm's ViT of the same CLIP.
        order = [_OPEN_CLIP_FILE, *wanted]
    else:
        order = wanted
    for file in order if path.is_dir() else ():
        if (path / file).is_file():
            return path / file
    for pickled in sorted(path.glob("*")) if path.is_dir() else ():
        if pickled.suffix in _PICKLES:
            raise UserError(_is_pickle(pickled, source))
    where = path / wanted[0] if path.is_dir() else path
    raise UserError(
        f"backbone_path: no file at {where}; give the path of {wanted[0]} or of the folder it is in"
    )


def _timm_architecture(
    name: str, file: Place, arrays: dict[str, np.ndarray], image_size: int
) -> tuple[ViTConfig, tuple[str, ...]]:
    beside = file.parent / "config.json"
    text = _config_beside(file)
    config = _parse_config(beside, text) if text is not None else None
    if not config and not timm_config.is_known(name):
        raise UserError(
            f"{_unknown(name)}. The num_heads of others has to stand in model_args of a "
            f"config.json, and there is none at {beside}"
        )
    sizes = vit_checkpoints.read_sizes(arrays)
    fields, notes = timm_config.vit_fields(name, sizes, config, image_size)
    return ViTConfig(**fields), notes


def _clip_architecture(
    name: str, file: Place, arrays: dict[str, np.ndarray]
) -> tuple[CLIPConfig, tuple[str, ...]]:
    if timm_config.is_known(name):
        raise ValueError("it is a CLIP, and that is timm's name of a plain ViT; say my_clip")
    sizes = clip_checkpoints.read_sizes(arrays)
    described = _described(file, arrays)
    if not described:
        listed = [name for name in BACKBONES if name.startswith("clip_")]
        raise ValueError(
            "it is a CLIP, and its arrays don't show its heads and whether its GELU is the quick "
            f"one: put {clip_config.OPEN_CLIP}, or Hugging Face's {clip_config.HUGGING_FACE}, "
            f"beside it, or name it {', '.join(listed)} if it is one of those"
        )
    fields, notes = clip_config.clip_fields(sizes, described)
    return CLIPConfig(**fields), notes


def _config_beside(file: Place) -> bytes | None:
    """Return the `config.json` beside a backbone's file; None where there is none."""
    beside = file.parent / "config.json"
    try:
        return paths.read_bytes(beside)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"backbone: {beside} can't be read ({error.strerror or error}); put the backbone's "
            "config.json there, or remove it"
        ) from error


def _described(file: Place, arrays: dict[str, np.ndarray]) -> clip_config.Described | None:
    """Return what the configs beside a CLIP's file say, None where there are none."""
    try:
        return clip_config.read(file.parent, clip_checkpoints.is_hugging_face(arrays))
    except RecursionError as error:
        raise UserError(
            f"backbone: {file.parent / clip_config.OPEN_CLIP}, or {clip_config.HUGGING_FACE} "
            "beside it, is damaged: it is nested too deeply; fetch it again"
        ) from error


def _parse_config(file: Place, text: bytes) -> timm_config.TimmConfig:
    try:
        return timm_config.parse(text.decode("utf-8"))
    # JSON and Unicode errors are ValueErrors; the other is of what is nested too deeply.
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"backbone: {file} is not timm's config.json of the backbone beside it: {error}"
        ) from error


def _notes(source: Source, file: Place, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return what a `config.json` beside the file of one of `BACKBONES` says in vain.

    Raises ValueError where it says that the file is of another CLIP.
    """
    if isinstance(source.architecture, CLIPConfig):
        described = _described(file, arrays)
        if described:
            clip_config.check_listed(source.architecture, described)
        return ()
    text = _config_beside(file)
    if text is None:
        return ()
    try:
        config = timm_config.parse(text.decode("utf-8"))
    except ValueError:  # not one of timm's
        return ()
    except RecursionError as error:
        raise UserError(
            f"backbone: {file.parent / 'config.json'} is damaged ({error}); fetch it again, or "
            "remove it"
        ) from error
    ours, theirs = source.architecture.preprocessing, config.preprocessing
    if ours == theirs:
        return ()
    return (
        f"its config.json has mean {theirs.mean} and std {theirs.std}; by this name it gets mean "
        f"{ours.mean} and std {ours.std}, as published; name it {config.architecture} to follow "
        "its config.json",
    )


# Files and their arrays.

_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".tar", ".pkl")


def _is_pickle(file: Place, source: Source | None) -> str:
    take = f"model.safetensors of the same model ({_OPEN_CLIP_FILE} of a CLIP)"
    if source and source.url.endswith(".safetensors"):
        take = source.url
    return (
        f"backbone: {file} is a PyTorch pickle, which can't be read without PyTorch; take {take}, "
        "or save its state_dict with safetensors"
    )


def _arrays(file: Place, raw: bytes, source: Source | None) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name. Raises UserError where it can't be read."""
    # A new .pth is a zip archive as .npz is, an old one a bare pickle. The length of its header,
    # with which a .safetensors begins, may be the same byte.
    bare = raw[:1] == b"\x80" and raw[8:9] != b"{"
    if file.suffix in _PICKLES or bare or b"/data.pkl" in raw[:256]:
        raise UserError(_is_pickle(file, source))
    safe = file.suffix == ".safetensors"
    try:
        return from_safetensors(raw) if safe else _from_npz(raw)
    except BadArray as error:
        raise UserError(f"backbone: {file} can't be used: {error}") from error
    except (
        Exception
    ) as error:  # zipfile, zlib, numpy and safetensors each have their own for damaged bytes
        kind = ".safetensors" if safe else ".npz"
        raise UserError(
            f"backbone: {file} is not a readable {kind} file ({type(error).__name__}: {error}); "
            "fetch it again"
        ) from error


def _from_npz(raw: bytes) -> dict[str, np.ndarray]:
    if raw[:2] != b"PK":  # NumPy would ask for pickles to be allowed
        raise ValueError("an .npz file is a zip archive, and this is none")
    arrays = {}
    with np.load(io.BytesIO(raw)) as archive:
        for name in archive.files:
            try:
                arrays[name] = archive[name]
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise
                raise BadArray(f"array {name!r} holds Python objects, expected floats") from error
            if not isinstance(arrays[name], np.ndarray):
                raise BadArray(f"{name!r} is no array")
    return arrays


# Downloads.


def _download(source: Source, target: Place, stop: threading.Event | None) -> Place:
    in_bucket = isinstance(target, BucketPath)
    on_disk = cache.on_disk() / source.file if in_bucket else target
    partial = on_disk.with_name(f"{target.name}.partial{os.getpid()}")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        print(f"Downloading {source.url} to {target}")
        transfer = _Transfer(source.url, partial, stop)
        transfer.finish()
        _check_sha256(source, target, transfer.sha256, transfer.published_sha256)
        if in_bucket:
            target.write_bytes(partial.read_bytes())
        else:
            partial.replace(target)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"backbone: {source.file} is not at {target} and could not be downloaded from "
            f"{source.url} ({error}). "
            f"Put a copy there, or name one with --config.backbone_path=FILE"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _check_sha256(source: Source, file: Place, sha256: str, published: str = "") -> None:
    """Compare a bundled or downloaded file with what its publisher says, and with the first one.

    `published` is what the publisher said with this download. Where nobody says anything, the first
    download's is kept beside the file, as `sha256sum -c` reads it. Raises UserError.
    """
    if (expected := source.sha256 or published) and sha256 != expected:
        raise UserError(
            f"backbone: {file} has SHA-256 {sha256}, but its publisher gives {expected}: it is "
            "damaged or another file; delete it and fetch it again"
        )
    if not source.url:
        return
    record = file.with_name(f"{file.name}.sha256")
    try:
        first = record.read_text("utf-8").split()[0]
    except (OSError, ValueError, IndexError):
        first = ""
    if first and first != sha256:
        raise UserError(
            f"backbone: {file} has SHA-256 {sha256}, but at its first download it had {first}; "
            f"delete it to download it again and, if the publisher has changed it, {record} too"
        )
    if not first:
        with contextlib.suppress(OSError):  # a folder that can only be read
            text = f"{sha256}  {file.name}\n"
            if isinstance(record, BucketPath):
                record.write_text(text)
                return
            unfinished = record.with_name(f"{record.name}.partial{os.getpid()}")
            unfinished.write_text(text, "utf-8")
            unfinished.replace(record)


class _Transfer(urllib.request.HTTPRedirectHandler):
    """A download from a URL to a new file.

    A thread waits for the network: the main one goes on hearing signals, and what knows no time
    limit, such as the look-up of a name, is given up too. As a handler of redirections it notes the
    SHA-256 that the Hugging Face Hub gives with the one to its storage.
    """

    def __init__(self, url: str, target: Path, stop: threading.Event | None):
        self.url, self.target, self._stop = url, target, stop
        self.sha256, self.published_sha256 = "", ""
        self._error: Exception | None = None
        self._heard, self._given_up = time.monotonic(), False

    def finish(self) -> None:
        """Wait for the file. Raises OSError or HTTPException when it can't be had, and Stopped."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.05)
                if self._stop is not None and self._stop.is_set():
                    raise Stopped
                if thread.is_alive() and time.monotonic() - self._heard > PATIENCE:
                    raise TimeoutError(f"no answer for {PATIENCE:g} seconds")
        finally:
            self._given_up = True
        if self._error:
            raise self._error

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """Follow a redirection, and note the SHA-256 of what it leads to."""
        linked = (headers.get("X-Linked-Etag") or "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", linked):
            self.published_sha256 = linked
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def _run(self) -> None:
        try:
            self._copy()
        except Exception as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is the open answer as well
            self._error = error

    def _copy(self) -> None:
        digest, size = hashlib.sha256(), 0
        with urllib.request.build_opener(self).open(self.url, timeout=PATIENCE) as response:
            if self._given_up:
                return
            with open(self.target, "wb") as file:
                while not self._given_up and (chunk := response.read(2**20)):
                    self._heard = time.monotonic()
                    digest.update(chunk)
                    size += file.write(chunk)
            expected = response.headers.get("Content-Length")
        if expected and size != int(expected):
            raise OSError(f"{size} of {expected} bytes arrived")
        self.sha256 = digest.hexdigest()
