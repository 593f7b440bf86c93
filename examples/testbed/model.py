"""The testbed's model: a `bsa_vision` encoder with a token for the click, and a small mask head.

The head is like that of Segment Anything.

    model = load("examples/testbed/testbed.safetensors")
    logits = model(images, click)   # (B, 3, H, W), (B, 2) -> (B, H', W'); the answer is logits > 0
    bsa.sparsify_(model, plan)      # as with any other model
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import bsa_vision as bsa
from bsa_vision.models.blocks import LayerNorm, PatchEmbed

SHIPPED = Path(__file__).with_name("testbed.safetensors")


@dataclass(frozen=True)
class Size:
    """Hyper-parameters; saved with the weights.

    grid      tokens per side in training; others work as well
    patch     pixels per side of a token
    stem      filters of the stem, divided by 4
    periods   shortest and longest period of the rotary positions and of the click's encoding; the
              image is 2 wide
    cells     logits per side of a token
    channels  channels of the features; their dot product with the click's vector is a logit
    names     number of (shapes, textures) of the auxiliary classifier, ground included
    """

    depth: int = 6
    dim: int = 128
    heads: int = 4
    grid: int = 32
    patch: int = 8
    mlp_ratio: float = 3.0
    stem: int = 64
    periods: tuple[float, float] = (0.25, 8.0)
    cells: int = 4
    channels: int = 32
    names: tuple[int, int] = (7, 9)


class Testbed(nn.Module):
    """Segmentation model for images with a click."""

    __test__ = False  # pytest collects classes named Test...

    def __init__(self, size: Size = Size()) -> None:
        super().__init__()
        self.size = size
        self.notes: dict[str, str] = {}  # how the weights were trained, set by `load`
        self.encoder = bsa.create_encoder(
            size.depth,
            size.dim,
            size.heads,
            rel_pos=False,
            rope=size.periods,
            image_size=size.grid * size.patch,
            patch_size=size.patch,
            out_channels=None,
            mlp_ratio=size.mlp_ratio,
            num_special=1,
        )
        self.encoder.patch_embed = Stem(size.stem, size.dim, size.patch)
        self.click = nn.Linear(4 * len(self._periods()), size.dim)
        self.norm = LayerNorm(size.dim)
        self.features = nn.Linear(size.dim, size.cells**2 * size.channels)
        last = nn.Linear(size.dim, size.channels + 1)
        self.query = nn.Sequential(nn.Linear(size.dim, size.dim), nn.GELU(), last)
        self.names = nn.Linear(size.dim, sum(size.names))
        nn.init.zeros_(last.bias)
        with torch.no_grad():
            last.bias[-1] = -2.0  # answers cover a small part of the image

        self._aim()

    @torch.no_grad()
    def _aim(self) -> None:
        """Initialise head 0 so that the click's token attends to the position of the click.

        Otherwise training takes thousands of images to learn this. The first channels of the token
        are the encoding of the click. The queries of head 0 copy them. Its keys hold ones (cosines)
        and zeros (sines), which the rotary positions rotate. The dot product is then the sum of
        cos(position of the click - position of the key) over all frequencies.
        """
        channels = self.click.in_features
        self.click.weight.zero_()
        self.click.weight[:channels] = torch.eye(channels)
        blocks: Any = self.encoder.blocks
        for block in blocks:
            queries, keys = block.attn.qkv.weight[:channels], block.attn.qkv.bias[self.size.dim :]
            queries[:, :channels] += torch.eye(channels)
            keys[: channels // 2] = 1.0

    def forward(self, images: Tensor, click: Tensor) -> Tensor:
        """Return logits (B, h * cells, w * cells) for a grid of h x w patches.

        images  (B, 3, H, W), 0 to 1
        click   (B, 2) as (x, y), 0 to 1
        """
        return self.answer(self.encode(images, click), images)

    def encode(self, images: Tensor, click: Tensor) -> Tensor:
        """Return the output tokens of the encoder, (B, 1 + h * w, dim); the click's comes first."""
        special = self.click(self.encode_click(click))[:, None]  # (B, 1, dim)
        return self.norm(self.encoder((images - 0.5) / 0.25, special=special))

    def answer(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Compute logits from output tokens: (B, 1 + h * w, dim) -> (B, h * cells, w * cells)."""
        rows, cells = images.shape[-2] // self.size.patch, self.size.cells
        pattern = "b (h w) (i j c) -> b (h i) (w j) c"
        features = rearrange(self.features(tokens[:, 1:]), pattern, h=rows, i=cells, j=cells)
        vector = self.query(tokens[:, 0])  # (B, channels + 1); the last channel is the threshold
        logits = torch.einsum("byxc,bc->byx", features, vector[:, :-1])
        return logits / math.sqrt(self.size.channels) + vector[:, -1, None, None]

    def name(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Classify the shape and the texture of each patch; class 0 is the ground.

        tokens  (B, 1 + h * w, dim)

        Returns logits (B, h * w, shapes + 1) and (B, h * w, textures + 1).
        """
        return self.names(tokens[:, 1:]).split(self.size.names, dim=-1)

    def encode_click(self, click: Tensor) -> Tensor:
        """Encode clicks with the periods of the rotary positions: (B, 2) -> (B, 4 * periods).

        The channels are cosines, then sines.
        """
        position = 2 * click.flip(-1)[..., None] - 1  # (B, 2, 1), rows first as in `rotate`
        angles = (2 * math.pi * position / self._periods().to(click)).flatten(1)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def _periods(self) -> Tensor:
        shortest, longest = self.size.periods
        quarter = self.size.dim // self.size.heads // 4
        return shortest * (longest / shortest) ** (torch.arange(quarter) / quarter)


class Stem(PatchEmbed):
    """Patch embedding with a non-linearity: a texture looks the same at any offset in the patch."""

    def __init__(self, filters: int, dim: int, patch_size: int) -> None:
        super().__init__(3, 4 * filters, patch_size)
        self.mix = nn.Linear(4 * filters, dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, dim)"""
        return self.mix(F.gelu(super().forward(pixels)))


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits bilinearly: (B, h, w) -> (B, *size)."""
    return F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def save(model: Testbed, path: Path | str, notes: Mapping[str, Any]) -> None:
    """Save the weights (float32) as safetensors, with hyper-parameters and `notes` as metadata."""
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in notes.items()
    }
    save_file(state, str(path), {"size": json.dumps(asdict(model.size)), **metadata})


def load(path: Path | str = SHIPPED, device: torch.device | str = "cpu") -> Testbed:
    """Load a model saved with `save`, in eval mode; `model.notes` holds its metadata."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    if "size" not in metadata:
        raise ValueError(
            f"{path} has no 'size' in its metadata: expected a file saved by examples/testbed."
        )
    values = json.loads(metadata["size"]).items()
    sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in values}
    model = Testbed(Size(**sizes))
    model.load_state_dict(state)
    model.notes.update({key: value for key, value in metadata.items() if key != "size"})
    return model.eval().to(device)


def untrained(size: Size = Size(), seed: int = 0) -> Testbed:
    """Return a model with random weights, in eval mode."""
    torch.manual_seed(seed)
    return Testbed(size).eval()
