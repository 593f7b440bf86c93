"""Building blocks of ViT and of Segment Anything's image encoder.

Patch embedding, windows, attention with decomposed relative position or rotary positions, and neck.
Attention needs no N x N tensor: relative position stays factored (`bsa_vision.attention.rel_pos`).
Parameters have segment_anything's names and shapes.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bsa_vision.attention.carried_masks import READERS, carry, encode
from bsa_vision.attention.functional import attend_masks
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.mask_source import MaskSource
from bsa_vision.attention.mask_tensors import DENSE
from bsa_vision.attention.rel_pos import RelPos, decompose, resize_table
from bsa_vision.masks import TokenLayout

Grid = tuple[int, int]
# Cosines and sines of the angles by which queries and keys are rotated, (N, D) float32 each.
Rotation = tuple[Tensor, Tensor]
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Embed pixels as patches: (B, channels, H, W) -> (B, h, w, C)."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Pre-norm transformer block: windowed or global attention, then an MLP."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, window_size: int, grid: Grid, rel_pos: bool
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(
            dim, heads, (window_size, window_size) if window_size else grid, rel_pos
        )
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, grid: Grid, rotation: Rotation | None = None) -> Tensor:
        """Apply the block: (B, N, C) -> (B, N, C).

        grid      (h, w) of the patches; the rest of the N tokens are special tokens
        rotation  of all N tokens, see `rotary_angles`
        """
        x = x + self._attend(self.norm1(x), grid, rotation)
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor, grid: Grid, rotation: Rotation | None) -> Tensor:
        size = self.window_size
        if not size:
            return self.attn(x, grid, rotation)
        down, right = -grid[0] % size, -grid[1] % size
        # Padded with zeros after the norm and not masked, so padding takes part as keys, as in SAM.
        x = F.pad(x.unflatten(1, grid), (0, 0, 0, right, 0, down))
        sizes = {"i": x.shape[1] // size, "j": x.shape[2] // size, "h": size, "w": size}
        windows = rearrange(x, "b (i h) (j w) c -> (b i j) (h w) c", **sizes)
        windows = self.attn(windows, (size, size))
        x = rearrange(windows, "(b i j) (h w) c -> b (i h) (j w) c", **sizes)
        return x[:, : grid[0], : grid[1]].flatten(1, 2)


class Attention(nn.Module):
    """Exact dense multi-head attention. `sparsify_` replaces `attend` to apply block masks."""

    def __init__(self, dim: int, heads: int, grid: Grid, rel_pos: bool) -> None:
        super().__init__()
        self.num_heads, head_dim = heads, dim // heads
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = rel_pos
        if rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, head_dim))
        self._dense: MaskSource = DenseHeads(heads) if rel_pos else HeadMasks(None, [DENSE] * heads)

    def forward(self, x: Tensor, grid: Grid, rotation: Rotation | None = None) -> Tensor:
        """Apply attention: (B, N, C) -> (B, N, C)."""
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        rel_pos = None
        if self.use_rel_pos:
            tables = (resize_table(self.rel_pos_h, grid[0]), resize_table(self.rel_pos_w, grid[1]))
            rel_pos = RelPos(*(term.to(q.dtype) for term in decompose(q, *tables, grid)))
        out = self.attend(q, k, v, rel_pos, grid)  # (B, H, N, D)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, grid: Grid) -> Tensor:
        """Attend densely in every head: (B, H, N, D) -> (B, H, N, D)."""
        return attend_masks(self._dense, q, k, v, grid=grid, rel_pos=rel_pos)


class DenseHeads(MaskSource):
    """Masks of a layer with dense heads only, for any grid.

    Relative position needs the layout of the keys, even in dense heads.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self._new_handle()

    def masks_for(self, grid: Grid, num_keys: int) -> HeadMasks:
        return _dense_heads(self.heads, tuple(grid))


@carry.register
def _(source: DenseHeads, grid: Grid, num_keys: int) -> bytes:
    return encode("dense", {"heads": source.heads})


READERS["dense"] = lambda header, payload: DenseHeads(header["heads"])


@lru_cache(maxsize=64)
def _dense_heads(heads: int, grid: Grid) -> HeadMasks:
    return HeadMasks(None, [DENSE] * heads, layout=TokenLayout(grid))


class MLP(nn.Module):
    """Two linear layers with a GELU in between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, eps=1e-6)
        return x.permute(0, 3, 1, 2)


def neck(dim: int, channels: int) -> nn.Sequential:
    """Build SAM's neck: (B, C, h, w) -> (B, channels, h, w)."""
    return nn.Sequential(
        nn.Conv2d(dim, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


def resize_positions(positions: Tensor, grid: Grid) -> Tensor:
    """Interpolate position embeddings: (1, h, w, C) -> (1, *grid, C), unchanged if they fit.

    Bicubic and antialiased, as in timm and DeepSeek-OCR.
    """
    if tuple(positions.shape[1:3]) == grid:
        return positions
    channels_first = positions.permute(0, 3, 1, 2).float()
    resized = F.interpolate(channels_first, grid, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).to(positions.dtype)


def rotary_angles(
    grid: Grid,
    head_dim: int,
    periods: tuple[float, float],
    num_prefix_tokens: int,
    device: torch.device,
) -> Rotation:
    """Return cosines and sines of 2-D rotary positions, (num_prefix_tokens + h * w, D) each.

    Prefix tokens are not rotated. Patch centres lie in [-1, 1] for every grid, so resolution can
    grow. A quarter of the channels rotates with the row and a quarter with the column; the other
    half are their partners. Periods are spaced logarithmically from the first of `periods` to the
    second, excluding it. With (1, 100) they are DINOv3's, arXiv 2508.10104.
    """
    quarter = head_dim // 4
    shortest, longest = periods
    share = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
    period = shortest * (longest / shortest) ** share  # (D/4,)
    rows, columns = (
        (torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n * 2 - 1 for n in grid
    )
    down = (2 * math.pi * rows[:, None] / period)[:, None].expand(*grid, quarter)
    across = (2 * math.pi * columns[:, None] / period)[None].expand(*grid, quarter)
    angles = torch.cat([down, across], dim=-1).flatten(0, 1).repeat(1, 2)  # (h * w, D)
    angles = F.pad(angles, (0, 0, num_prefix_tokens, 0))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate channels i and i + D / 2 by the angles of each token: (B, H, N, D), same shape."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
