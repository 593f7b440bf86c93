"""Stand-in for the code that DeepSeek-OCR ships, under the name of its file.

It mimics class and member names, position embeddings that are resized for square inputs, the tables
of segment_anything, SDPA with a full bias, two more convolutions, and a CLIP encoder whose
attention is called `NoTPAttention`.
"""

from __future__ import annotations

import torch.nn.functional as F
from segment_anything.modeling import image_encoder
from torch import Tensor, nn


class Attention(image_encoder.Attention):
    def forward(self, x: Tensor) -> Tensor:
        (batch, height, width, _), grid = x.shape, tuple(x.shape[1:3])
        q, k, v = (
            self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        )
        bias = None
        if self.use_rel_pos:
            zeros = q.new_zeros(batch * self.num_heads, height * width, height * width)
            arguments = (zeros, q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, grid, grid)
            bias = image_encoder.add_decomposed_rel_pos(*arguments)
            bias = bias.unflatten(0, (batch, self.num_heads))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, -1))


class ImageEncoderViT(image_encoder.ImageEncoderViT):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        channels = options["out_chans"]
        self.net_2 = nn.Conv2d(channels, 24, 3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False)
        for block in self.blocks:
            block.attn.__class__ = Attention

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        positions, side = self.pos_embed, x.shape[1]
        if positions.shape[1] != side:
            positions = positions.permute(0, 3, 1, 2)
            positions = F.interpolate(positions, (side, side), mode="bicubic", antialias=True)
            positions = positions.permute(0, 2, 3, 1)
        x = x + positions
        for block in self.blocks:
            x = block(x)
        return self.net_3(self.net_2(self.neck(x.permute(0, 3, 1, 2))))


class NoTPAttention(nn.Module):
    """Attention of the CLIP encoder, which has at most 401 tokens."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
