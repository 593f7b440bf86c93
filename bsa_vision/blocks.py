"""The blocks of ViT and of Segment Anything's image encoder, to read: patches, windows, attention with decomposed relative position, neck.

Attention is exact without N x N: relative position stays factored (`bsa_vision.rel_pos`). Names and shapes of parameters are
segment_anything's.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bsa_vision.attention import attend_masks
from bsa_vision.head_masks import DENSE, Handled, HeadMasks
from bsa_vision.rel_pos import RelPos, decompose, resize_table
from masks import TokenLayout

Grid = tuple[int, int]
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Pixels to patches: (B, channels, H, W) -> (B, h, w, C)."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).permute(0, 2, 3, 1)


class Block(nn.Module):
    """One transformer block: attention, within windows or across the image, and an MLP, each with a norm before and a shortcut."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, window_size: int, grid: Grid, rel_pos: bool) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, heads, (window_size, window_size) if window_size else grid, rel_pos)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> (B, N, C); `grid` is that of the patches among the N tokens."""
        x = x + self._attend(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor, grid: Grid) -> Tensor:
        size = self.window_size
        if not size:
            return self.attn(x, grid)
        down, right = -grid[0] % size, -grid[1] % size
        x = F.pad(
            x.unflatten(1, grid), (0, 0, 0, right, 0, down)
        )  # zeros after the norm, as in SAM: keys that take part
        across = x.shape[2] // size
        windows = rearrange(x, "b (i h) (j w) c -> (b i j) (h w) c", h=size, w=size)
        windows = self.attn(windows, (size, size))
        down_and_across = dict(i=x.shape[1] // size, j=across, h=size, w=size)
        x = rearrange(windows, "(b i j) (h w) c -> b (i h) (j w) c", **down_and_across)
        return x[:, : grid[0], : grid[1]].flatten(1, 2)


class Attention(nn.Module):
    """Multi-head attention, dense and exact; `sparsify_` gives its heads block masks through `attend`."""

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
        self._dense: Handled = DenseHeads(heads) if rel_pos else HeadMasks(None, [DENSE] * heads)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        rel_pos = None
        if self.use_rel_pos:
            tables = (resize_table(self.rel_pos_h, grid[0]), resize_table(self.rel_pos_w, grid[1]))
            rel_pos = RelPos(*(term.to(q.dtype) for term in decompose(q, *tables, grid)))
        out = self.attend(q, k, v, rel_pos, grid)  # (B, H, N, D)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, grid: Grid) -> Tensor:
        """(B, H, N, D) -> (B, H, N, D), every head dense."""
        return attend_masks(self._dense, q, k, v, grid=grid, rel_pos=rel_pos)


class DenseHeads(Handled):
    """The masks of a layer whose heads are all dense, for whatever grid; relative position asks them where keys are."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self._new_handle()

    def masks_for(self, grid: Grid) -> HeadMasks:
        return _dense_heads(self.heads, tuple(grid))


@lru_cache(maxsize=64)
def _dense_heads(heads: int, grid: Grid) -> HeadMasks:
    return HeadMasks(None, [DENSE] * heads, layout=TokenLayout(grid))


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, eps=1e-6)
        return x.permute(0, 3, 1, 2)


def neck(dim: int, channels: int) -> nn.Sequential:
    """SAM's way out: (B, C, h, w) -> (B, channels, h, w)."""
    return nn.Sequential(
        nn.Conv2d(dim, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


def resize_positions(positions: Tensor, grid: Grid) -> Tensor:
    """(1, h, w, C) -> (1, *grid, C), bicubic and antialiased as timm and DeepSeek-OCR do it; itself where it fits."""
    if tuple(positions.shape[1:3]) == grid:
        return positions
    resized = F.interpolate(positions.permute(0, 3, 1, 2).float(), grid, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).to(positions.dtype)
