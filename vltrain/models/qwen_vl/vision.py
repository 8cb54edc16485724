"""From pixels to image tokens: a ViT and a resampler with learned queries.

Dimension letters: `N` pictures, `P` patches of a picture, `Q` image tokens of a picture,
`V` width of the ViT, `D` width of the language model.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from vltrain.models.qwen_vl.configuration import VisionSizes

LAYER_NORM_EPS = 1e-6
RESAMPLER_HEAD_DIM = 128


def sincos_2d(width: int, side: int) -> Tensor:
    """Fixed positions of a square grid.

    The first half of a row's width speaks of the column, the second of the row; each half is
    sines, then cosines (the 2-D form of "Attention Is All You Need", sec. 3.5).

    Returns:
        float32 [side * side, width], row by row.
    """
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    columns = line.repeat(side, 1)
    rows = line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def resize_positions(positions: Tensor, count: int) -> Tensor:
    """A grid of positions, bicubically stretched to another number of places.

    Args:
        positions: float [S * S, C], a square grid row by row.
        count: how many places are wanted; a perfect square.

    Returns:
        float [count, C] in the dtype of `positions`.

    Raises:
        ValueError: either grid is not a square.
    """
    source, target = math.isqrt(positions.size(0)), math.isqrt(count)
    if source * source != positions.size(0) or target * target != count:
        raise ValueError(f"positions need square grids, not {positions.size(0)} -> {count}")
    if source == target:
        return positions
    with torch.autocast(positions.device.type, enabled=False):
        line = bicubic_line(source, target, positions.device)
        rows = line @ positions.float().reshape(source, -1)  # [target, S C]
        grid = line @ rows.unflatten(1, (source, -1))  # [target, target, C]
    return grid.flatten(0, 1).to(positions.dtype)


def bicubic_line(source: int, target: int, device: torch.device) -> Tensor:
    """What stretches a line of places bicubically: float32 [target, source].

    A grid is stretched along one side, then along the other. `F.interpolate` on the grid itself
    goes through all channels in one thread for each place, for milliseconds on a GPU.
    """
    places = torch.eye(source, dtype=torch.float32, device=device)[:, None, :, None]
    line = F.interpolate(places, size=(target, 1), mode="bicubic", align_corners=False)
    return line[:, 0, :, 0].T


class VisionAttention(nn.Module):
    """Self-attention of the ViT. `in_proj` is interleaved: [heads, (q, k, v), head_dim]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """float [N, P, V] -> float [N, P, V]."""
        mixed = self.in_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = mixed.chunk(3, dim=-1)  # each [N, heads, P, head_dim]
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linear layers around an erf GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """float [N, P, V] -> float [N, P, V]."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class VisionBlock(GradientCheckpointingLayer):
    """One pre-norm layer of the ViT."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(sizes.width, eps=LAYER_NORM_EPS)
        self.attn = VisionAttention(sizes.width, sizes.heads)
        self.ln_2 = nn.LayerNorm(sizes.width, eps=LAYER_NORM_EPS)
        self.mlp = VisionMLP(sizes.width, sizes.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        """float [N, P, V] -> float [N, P, V]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionLayers(nn.Module):
    """The stack of blocks, under the published name `transformer.resblocks`."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisionBlock(sizes) for _ in range(sizes.layers))

    def forward(self, x: Tensor) -> Tensor:
        """float [N, P, V] -> float [N, P, V]."""
        for block in self.resblocks:
            x = block(x)
        return x


class CrossAttention(nn.MultiheadAttention):
    """Attention of the same queries to each picture's patches; the parameters are the parent's.

    The parent's own `forward` puts places before pictures, after which a product over places is
    one for each place.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [Q, D], keys and values [N, P, D], all float, -> float [N, Q, D]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(*one).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for one in zip((query, key, value), weights, biases, strict=True)
        )
        query = query.expand(key.size(0), -1, -1, -1).contiguous()
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Compress the patches of each picture to a fixed number of image tokens.

    Learned queries read the patches in a single cross-attention layer, with 2-D sine-cosine
    positions on queries and keys (arXiv:2308.12966, sec. 2.1). `pos_embed` is part of the
    checkpoint; it learns only where a run says so.
    """

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        dim = sizes.output_dim
        # Filled with `sincos_2d` where no checkpoint has it, in the dtype of the other weights.
        self.pos_embed = nn.Parameter(torch.zeros(sizes.n_queries, dim), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(sizes.n_queries, dim))
        self.kv_proj: nn.Module = (
            nn.Linear(sizes.width, dim, bias=False) if sizes.width != dim else nn.Identity()
        )
        self.attn = CrossAttention(dim, dim // RESAMPLER_HEAD_DIM)
        self.ln_q = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.ln_kv = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, patches: Tensor) -> Tensor:
        """Read the patches with the queries.

        Args:
            patches: float [N, P, V]; P is a perfect square.

        Returns:
            float [N, Q, D].

        Raises:
            ValueError: P is not a perfect square.
        """
        value = self.ln_kv(self.kv_proj(patches))
        key = value + resize_positions(self.pos_embed, patches.size(1)).to(value.dtype)
        query = self.ln_q(self.query) + self.pos_embed
        return self.attn(query.to(value.dtype), key, value)


class VisionTower(nn.Module):
    """ViT, resampler, `ln_post` and `proj`: pictures to what stands over `<imgpad>`."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, sizes.width, sizes.patch_size, sizes.patch_size, bias=False)
        # 256 places whatever the picture's size: a 16 x 16 grid, stretched to the patches.
        self.positional_embedding = nn.Parameter(torch.zeros(256, sizes.width))
        self.ln_pre = nn.LayerNorm(sizes.width, eps=LAYER_NORM_EPS)
        self.transformer = VisionLayers(sizes)
        self.attn_pool = Resampler(sizes)
        self.ln_post = nn.LayerNorm(sizes.output_dim, eps=LAYER_NORM_EPS)
        self.proj = nn.Parameter(torch.zeros(sizes.output_dim, sizes.output_dim))

    def encode_patches(self, pixel_values: Tensor) -> Tensor:
        """The ViT alone: float [N, 3, S, S] -> float [N, P, V]."""
        patches = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        positions = resize_positions(self.positional_embedding, patches.size(1))
        return self.transformer(self.ln_pre(patches + positions.to(patches.dtype)))

    def vit_learns(self) -> bool:
        """Whether any weight before the resampler takes a gradient."""
        if self.positional_embedding.requires_grad:
            return True
        trunk = (self.conv1, self.ln_pre, self.transformer)
        return any(p.requires_grad for module in trunk for p in module.parameters())

    def forward(
        self,
        pixel_values: Tensor | None,
        patch_embeds: Tensor | None = None,
        picture_order: Tensor | None = None,
    ) -> Tensor:
        """Image tokens of pictures.

        A frozen ViT runs without gradients whatever checkpointing has made of its inputs:
        nothing is kept of it, nothing recomputed.

        Args:
            pixel_values: float [N - K, 3, S, S]; None where K is N.
            patch_embeds: float [K, P, V], what `encode_patches` gave for the other pictures.
            picture_order: as for `in_order`.

        Returns:
            float [N, Q, D].
        """
        patches = None
        if pixel_values is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.vit_learns()):
                patches = self.encode_patches(pixel_values)
        patches = in_order(patch_embeds, patches, picture_order)
        return self.ln_post(self.attn_pool(patches)) @ self.proj


def in_order(kept: Tensor | None, computed: Tensor | None, picture_order: Tensor | None) -> Tensor:
    """What is known of pictures from before and what was computed, in the order of the pictures.

    Args:
        kept: [K, …], or None.
        computed: [N - K, …], or None.
        picture_order: int64 [N], each picture's place among the K and the others behind them;
            needed where there are both.

    Raises:
        ValueError: neither is given, or both and no order.
    """
    if computed is not None and kept is not None:
        if picture_order is None:
            raise ValueError("pictures with and without features need picture_order")
        return torch.cat([kept, computed]).index_select(0, picture_order)
    given = kept if computed is None else computed
    if given is None:
        raise ValueError("there is no picture")
    return given
