"""CLIP (Radford et al., 2021) in Flax linen: a ViT for images and a causal transformer for texts,
whose features share one space.

A class is told by its text: the classifier holds text features, and logits are scaled cosines with
them. As in `vit`, the module knows nothing of masks or tasks.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.errors import UserError
from soft_jax.models import clip_checkpoints, tokenizer
from soft_jax.models.protocol import Architecture, Prefix, Preprocessing
from soft_jax.models.transformer import Block, LayerConfig
from soft_jax.models.vit import ViT, ViTConfig
from soft_jax.models.vit_checkpoints import interpolate_positions

EPSILON = 1e-5  # of LayerNorm
# Those of the images that OpenAI's models were trained on.
PREPROCESSING = Preprocessing(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig(Architecture):
    """Sizes of a CLIP, and what the rest of the program has to know of the family.

    `dim`, `depth`, `heads` and `mlp_dim` are the vision tower's. `embed_dim` is the width of the
    shared space, `quick_gelu` whether both towers have x σ(1.702 x) in the place of the erf GELU.
    """

    image_size: int
    patch_size: int
    dim: int
    depth: int
    heads: int
    mlp_dim: int
    text_dim: int
    text_depth: int
    text_heads: int
    text_mlp_dim: int
    embed_dim: int
    quick_gelu: bool
    context_length: int = 77
    vocabulary: int = 49408
    dtype: str = "float32"
    preprocessing: Preprocessing = PREPROCESSING

    modules: ClassVar[Mapping[str, tuple[str, ...]]] = ViTConfig.modules
    reads_text: ClassVar[bool] = True

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the backbone's patch size "
                f"{self.patch_size}"
            )
        for name, dim, heads in (
            ("vision", self.dim, self.heads),
            ("text", self.text_dim, self.text_heads),
        ):
            if heads < 1 or dim % heads:
                raise ValueError(
                    f"the {name} tower's width {dim} is not a multiple of heads {heads}"
                )

    grid = ViTConfig.grid

    @property
    def feature_dim(self) -> int:
        """Return the width of the shared space."""
        return self.embed_dim

    @property
    def towers(self) -> Mapping[str, int]:
        """Return the number of layers of the vision and of the text tower."""
        return {"vision": self.depth, "text": self.text_depth}

    @property
    def layer(self) -> LayerConfig:
        """Return what the vision tower's layers have in common."""
        return self._layer(self.dim, self.heads, self.mlp_dim, causal=False)

    @property
    def text_layer(self) -> LayerConfig:
        """Return what the text tower's layers have in common."""
        return self._layer(self.text_dim, self.text_heads, self.text_mlp_dim, causal=True)

    def _layer(self, dim: int, heads: int, mlp_dim: int, causal: bool) -> LayerConfig:
        activation = "quick_gelu" if self.quick_gelu else "gelu"
        return LayerConfig(dim, heads, mlp_dim, self.dtype, EPSILON, activation, causal)

    def module(self) -> "CLIP":
        """Return the Flax module."""
        return CLIP(self)

    def insert_prompts(
        self, params: pytrees.Tree, tokens: jax.Array, prompts: jax.Array
    ) -> jax.Array:
        """Put `prompts` `[B or 1, P, dim]` behind the first of embedded tokens `[B, N, dim]`.

        Returns `[B, N + P, dim]`. Prompts stand before the norm in front of the first layer. It
        normalizes each token by itself, so that they go through it alone here.
        """
        prompts = self.module().apply({"params": params}, prompts, method="normalize_prompts")
        return super().insert_prompts(params, tokens, prompts)

    # Text.

    def tokenize(self, texts: Sequence[str], context: int = 0) -> np.ndarray:
        """Return token ids, int32 `[N, L]`: start, `context` places, the text, end, and 0 behind.

        L is that of the longest row. A text that is too long is cut so that the end is the last of
        `context_length` tokens. Raises UserError where `context` leaves no room for any text, or
        `texts` is one string.
        """
        if isinstance(texts, str):
            raise UserError(f"texts: one string, {texts[:50]!r}; give a list of strings")
        if self.vocabulary <= tokenizer.END:
            raise UserError(
                f"backbone: its vocabulary of {self.vocabulary} tokens is not that of CLIP's "
                f"tokenizer, which has {tokenizer.END + 1}"
            )
        if (room := self.context_length - 2 - context) < 1:
            raise UserError(
                f"a context of {context} vectors leaves no room for a text: the backbone reads "
                f"{self.context_length} tokens, and start and end are two of them"
            )
        names = [tokenizer.encode(text)[:room] for text in texts]
        length = 2 + context + max(map(len, names), default=0)
        ids = np.zeros((len(names), length), np.int32)
        for row, name in zip(ids, names, strict=True):
            row[0] = tokenizer.START
            row[1 + context : 2 + context + len(name)] = [*name, tokenizer.END]
        return ids

    def encode_text(
        self, params: pytrees.Tree, ids: jax.Array, contexts: jax.Array | None = None
    ) -> jax.Array:
        """Return text features `[N, embed_dim]`, not normalized, of token ids int `[N, L]`.

        `contexts` `[N or 1, n, text_dim]` take the places of the tokens 1 to n.
        """
        return self.module().apply({"params": params}, ids, contexts, method="encode_text")

    # Addresses of layers.

    def block_path(self, layer: int, tower: str = "vision") -> str:
        """Return the path of a tower's block, such as "text/blocks_3"."""
        return f"{tower}/blocks_{layer}"

    def layer_of(self, path: str) -> int | None:
        """Return the layer of a path: 3 for "vision/blocks_3/attn/qkv/kernel", else None."""
        found = re.match(r"vision/blocks_(\d+)/", path)
        return int(found[1]) if found else None

    # Both towers' layers are a ViT's; of queries, `layer_of` leaves the vision tower's alone.
    fused = ViTConfig.fused
    query_layer = ViTConfig.query_layer

    def bottleneck_widths(self, layer: int, tower: str = "vision") -> dict[str, int]:
        """Return the places behind fc1 and behind fc2, where `Mlp` looks for them."""
        config = {"vision": self.layer, "text": self.text_layer}[tower]
        mlp = f"{self.block_path(layer, tower)}/mlp"
        return {f"{mlp}/adapter1": config.mlp_dim, f"{mlp}/adapter2": config.dim}

    # The classifier.

    def init_classifier(self, key: jax.Array, class_names: Sequence[str]) -> pytrees.Tree:
        """Return text features `{"text": [classes, embed_dim]}` of no class yet, float32 zeros."""
        return {"text": jnp.zeros((len(class_names), self.embed_dim), jnp.float32)}

    def classify(
        self, params: pytrees.Tree, classifier: pytrees.Tree, features: jax.Array
    ) -> jax.Array:
        """Return logits `[B, classes]`, exp(logit_scale) · cos(image, text), float32 or wider.

        Where a class has no text feature yet, a row of zeros, its logit is 0.
        """
        dtype = jnp.promote_types(features.dtype, jnp.float32)
        images, texts = (_normalize(x.astype(dtype)) for x in (features, classifier["text"]))
        scale = jnp.exp(jnp.asarray(params["logit_scale"], dtype))
        return scale * jnp.matmul(images, texts.T, precision="highest")

    # Checkpoints.

    def convert(self, arrays: Mapping[str, np.ndarray]) -> tuple[pytrees.Tree, tuple[str, ...]]:
        """Convert arrays in open_clip's or Hugging Face's naming (`clip_checkpoints`)."""
        return clip_checkpoints.convert(arrays, self)

    def at_size(self, image_size: int) -> "CLIPConfig":
        """Return this CLIP for images of `image_size` pixels, a multiple of the patch size."""
        return dataclasses.replace(self, image_size=image_size)

    def fit_size(self, params: pytrees.Tree) -> pytrees.Tree:
        """Return `params` with the position embeddings of patches resized to this grid."""
        vision = params["vision"]
        resized = interpolate_positions(vision["pos_embed"], self.grid)
        return params | {"vision": vision | {"pos_embed": resized}}


def _normalize(rows: jax.Array) -> jax.Array:
    """Return rows of length 1; rows of zeros stay, and have finite gradients."""
    squares = jnp.sum(rows**2, axis=-1, keepdims=True)
    return rows / jnp.sqrt(jnp.where(squares > 0, squares, 1))


class VisionTower(ViT):
    """CLIP's image encoder: a ViT with a norm in front of its layers and a projection behind."""

    config: CLIPConfig
    patch_bias: bool = False

    def setup(self):
        """Name the parameters: those of a ViT, norm_pre, proj."""
        super().setup()
        c = self.config
        self.norm_pre = c.layer.layer_norm()
        self.proj = self.param("proj", nn.initializers.normal(0.02), (c.dim, c.embed_dim))

    def embed(self, images: jax.Array) -> jax.Array:
        """Embed images as a ViT does, then normalize the tokens `[B, 1 + patches, dim]`."""
        return self.norm_pre(super().embed(images))

    def normalize_prompts(self, prompts: jax.Array) -> jax.Array:
        """Return prompts `[B, P, dim]` as they stand among embedded tokens."""
        return self.norm_pre(prompts.astype(self.config.dtype))

    def pool(self, tokens: jax.Array, prompts: int = 0) -> jax.Array:
        """Return a ViT's features, projected: `[B, embed_dim]`, not normalized."""
        pooled = super().pool(tokens, prompts)
        with jax.default_matmul_precision(self.config.layer.precision):
            return pooled @ self.proj.astype(self.config.dtype)


class TextTower(nn.Module):
    """CLIP's text encoder: each token sees those before it, and the last is the text's feature."""

    config: CLIPConfig

    def setup(self):
        """Name the parameters: token_embed, pos_embed, blocks_0 and on, norm, proj."""
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.token_embed = self.param("token_embed", normal, (c.vocabulary, c.text_dim))
        self.pos_embed = self.param("pos_embed", normal, (c.context_length, c.text_dim))
        self.blocks = [Block(c.text_layer) for _ in range(c.text_depth)]
        self.norm = c.text_layer.layer_norm()
        self.proj = self.param("proj", normal, (c.text_dim, c.embed_dim))

    def __call__(self, ids: jax.Array, contexts: jax.Array | None = None) -> jax.Array:
        """Return features as `CLIP.encode_text`."""
        c = self.config
        tokens = jnp.asarray(self.token_embed)[ids].astype(c.dtype)
        if contexts is not None:
            contexts = contexts.astype(c.dtype)
            contexts = jnp.broadcast_to(contexts, (len(ids), *contexts.shape[1:]))
            behind = tokens[:, 1 + contexts.shape[1] :]
            tokens = jnp.concatenate([tokens[:, :1], contexts, behind], axis=1)
        tokens = tokens + self.pos_embed[: ids.shape[1]].astype(c.dtype)[None]
        with jax.default_matmul_precision(c.text_layer.precision):
            for block in self.blocks:
                tokens = block(tokens)
            # The end of the text is the largest id.
            end = jnp.asarray(ids).argmax(axis=1)[:, None, None]
            last = jnp.take_along_axis(tokens, end, axis=1)[:, 0]
            return self.norm(last) @ self.proj.astype(c.dtype)


class CLIP(nn.Module):
    """Both towers; that of images is callable in parts, as a ViT is. Layers count from 0 here."""

    config: CLIPConfig

    def setup(self):
        """Name the parameters: vision, text, logit_scale."""
        self.vision = VisionTower(self.config)
        self.text = TextTower(self.config)
        # As if initialized with a temperature of 0.07.
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(1 / 0.07)), ())

    def embed(self, images: jax.Array) -> jax.Array:
        """Embed normalized images `[B, H, W, 3]` as tokens `[B, 1 + patches, dim]`.

        The norm in front of the first layer is behind them.
        """
        return self.vision.embed(images)

    def normalize_prompts(self, prompts: jax.Array) -> jax.Array:
        """Return prompts `[B, P, dim]` as they stand among embedded tokens."""
        return self.vision.normalize_prompts(prompts)

    def run_blocks(
        self,
        tokens: jax.Array,
        prefix: Prefix | None = None,
        start: int = 0,
        stop: int | None = None,
        prompts: int = 0,
    ) -> jax.Array:
        """Run the vision tower's layers `start` to `stop` as `ViT.run_blocks` does."""
        return self.vision.run_blocks(tokens, prefix, start, stop, prompts)

    def pool(self, tokens: jax.Array, prompts: int = 0) -> jax.Array:
        """Return the image features `[B, embed_dim]`, not normalized, of the [class] token.

        With `prompts`, they are of the mean of that many prompts' tokens behind it.
        """
        return self.vision.pool(tokens, prompts)

    def encode_text(self, ids: jax.Array, contexts: jax.Array | None = None) -> jax.Array:
        """Return text features `[N, embed_dim]`, not normalized, of token ids int `[N, L]`.

        `contexts` `[N or 1, n, text_dim]` take the places of the tokens 1 to n.
        """
        return self.text(ids, contexts)

    def __call__(self, images: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the features of normalized images `[B, H, W, 3]` and of token ids `[N, L]`."""
        features = self.pool(self.run_blocks(self.embed(images)))
        return features, self.encode_text(ids)
