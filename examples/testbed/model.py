"""The testbed's model: a ViT of `bsa_vision.encoder` with the click as a token among its patches, and a light head as Segment Anything has.

model = load("examples/testbed/testbed.safetensors")
logits = model(images, click)                         # (B, 3, H, W), (B, 2) -> (B, H', W'), above 0 = part of the answer
bsa.sparsify_(model, plan)                            # as any other model
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

    grid      tokens per side that the model is meant for; any other works
    patch     pixels per side of a token
    periods   shortest and longest of the rotary positions and of the click's encoding; the image is 2 wide
    cells     logits per side of a token
    channels  of the features whose dot product with the prompt's vector is a logit
    names     how many (shapes, textures) it learns to name on the side, ground included
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
    """(B, 3, H, W) images and (B, 2) clicks -> (B, h * cells, w * cells) logits, h x w being the grid of patches."""

    __test__ = False  # for pytest, which collects classes called Test...

    def __init__(self, size: Size = Size()) -> None:
        super().__init__()
        self.size = size
        self.notes: dict[str, str] = {}  # what made the weights, of a model that `load` read
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
            last.bias[-1] = -2.0  # an answer is a small part of the image

        self._aim()

    @torch.no_grad()
    def _aim(self) -> None:
        """Start with the click's token looking at the click's place, which training would otherwise take thousands of images to find out.

        The first channels of that token start as the encoding of the click. Where head 0's queries copy them and its keys hold ones (cosines)
        and zeros (sines), turned as every key is, their dot product is the sum of cos(place of the click - place of the key).
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
        """(B, 3, H, W) from 0 to 1 and (B, 2) as (x, y) from 0 to 1 -> (B, h * cells, w * cells) logits."""
        return self.answer(self.encode(images, click), images)

    def encode(self, images: Tensor, click: Tensor) -> Tensor:
        """(B, 1 + h * w, dim): the tokens that leave the encoder, the click's first."""
        special = self.click(self.encode_click(click))[:, None]  # (B, 1, dim)
        return self.norm(self.encoder((images - 0.5) / 0.25, special=special))

    def answer(self, tokens: Tensor, images: Tensor) -> Tensor:
        """(B, 1 + h * w, dim) -> (B, h * cells, w * cells) logits."""
        rows, cells = images.shape[-2] // self.size.patch, self.size.cells
        features = rearrange(
            self.features(tokens[:, 1:]),
            "b (h w) (i j c) -> b (h i) (w j) c",
            h=rows,
            i=cells,
            j=cells,
        )
        vector = self.query(tokens[:, 0])  # (B, channels + 1): the last one is the threshold
        logits = torch.einsum("byxc,bc->byx", features, vector[:, :-1]) / math.sqrt(
            self.size.channels
        )
        return logits + vector[:, -1, None, None]

    def name(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + h * w, dim) -> logits (B, h * w, shapes + 1) and (B, h * w, textures + 1) of what each patch shows; 0 = ground."""
        return self.names(tokens[:, 1:]).split(self.size.names, dim=-1)

    def encode_click(self, click: Tensor) -> Tensor:
        """(B, 2) -> (B, 4 * frequencies): cosines and sines at the periods that patches are turned with, so that attention finds the place."""
        place = (
            2 * click.flip(-1)[..., None] - 1
        )  # (B, 2, 1): row before column, as patches are turned
        angles = (2 * math.pi * place / self._periods().to(click)).flatten(1)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def _periods(self) -> Tensor:
        shortest, longest = self.size.periods
        quarter = self.size.dim // self.size.heads // 4
        return shortest * (longest / shortest) ** (torch.arange(quarter) / quarter)


class Stem(PatchEmbed):
    """Pixels to patches through a layer of filters: what a texture is does not depend on where its stripes fall in the patch."""

    def __init__(self, filters: int, dim: int, patch_size: int) -> None:
        super().__init__(3, 4 * filters, patch_size)
        self.mix = nn.Linear(4 * filters, dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, dim)"""
        return self.mix(F.gelu(super().forward(pixels)))


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w) -> (B, *size), bilinear."""
    return F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]


# A model and its weights in one file


def save(model: Testbed, path: Path | str, notes: Mapping[str, Any]) -> None:
    """Weights as safetensors (float32), hyper-parameters and `notes` in its header."""
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in notes.items()
    }
    save_file(state, str(path), {"size": json.dumps(asdict(model.size)), **metadata})


def load(path: Path | str = SHIPPED, device: torch.device | str = "cpu") -> Testbed:
    """The model in a file of `save`, ready to evaluate; its header is `model.notes`."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    if "size" not in metadata:
        raise ValueError(
            f"{path} has no 'size' in its header: expected a file of examples/testbed; pass such a file."
        )
    sizes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in json.loads(metadata["size"]).items()
    }
    model = Testbed(Size(**sizes))
    model.load_state_dict(state)
    model.notes.update({key: value for key, value in metadata.items() if key != "size"})
    return model.eval().to(device)


def untrained(size: Size = Size(), seed: int = 0) -> Testbed:
    """A model with fresh weights: what "random" means in comparisons."""
    torch.manual_seed(seed)
    return Testbed(size).eval()
