"""Configuration of an image encoder, checked before anything is built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bsa_vision.masks.layout import whole_number, whole_pair
from bsa_vision.models.blocks import Grid


@dataclass
class EncoderConfig:
    """Arguments of `create_encoder` except `patterns`, checked and converted.

    Raises ValueError for sizes that do not fit together.
    """

    depth: int
    dim: int
    heads: int
    global_attn_indexes: Iterable[int] | None
    window_size: int
    rel_pos: bool
    rope: bool | tuple[float, float] | None
    image_size: int | Grid
    patch_size: int
    in_channels: int
    out_channels: int | None
    mlp_ratio: float
    num_special: int
    gradient_checkpointing: bool

    def __post_init__(self) -> None:
        for name in ("depth", "dim", "heads", "patch_size", "in_channels"):
            setattr(self, name, whole_number(name, getattr(self, name), 1))
        for name in ("window_size", "num_special"):
            setattr(self, name, whole_number(name, getattr(self, name), 0))
        if self.out_channels is not None:
            self.out_channels = whole_number("out_channels", self.out_channels, 1)
        if int(self.dim * self.mlp_ratio) < 1:
            raise ValueError(
                f"mlp_ratio={self.mlp_ratio} with dim={self.dim}: the MLP needs at least 1 channel."
            )
        self.global_layers = _indexes(self.global_attn_indexes, self.depth)
        self.periods = None if self.rope is None else _periods(self.rope)
        size = self.image_size
        pair = size if isinstance(size, Sequence) else (size, size)
        self.pixels = whole_pair("image_size", pair, 1)
        self._check_sizes()
        self._check_positions()

    @property
    def grid(self) -> Grid:
        """Size of an image in patches, (h, w)."""
        return self.pixels[0] // self.patch_size, self.pixels[1] // self.patch_size

    @property
    def is_windowed(self) -> bool:
        """True if some layers attend within windows."""
        return len(set(self.global_layers)) < self.depth

    def _check_sizes(self) -> None:
        if self.dim % self.heads:
            fits = max(n for n in range(1, self.heads + 1) if self.dim % n == 0)
            raise ValueError(
                f"dim={self.dim} with heads={self.heads}: dim must be a multiple of heads, e.g. "
                f"heads={fits}."
            )
        if self.is_windowed and self.window_size < 1:
            raise ValueError(
                f"window_size={self.window_size} with windowed layers: expected at least 1 patch, "
                "or only global layers."
            )
        if any(side % self.patch_size for side in self.pixels):
            raise ValueError(
                f"image_size={self.pixels}: both sides must be multiples of the patch size, "
                f"{self.patch_size} pixels."
            )

    def _check_positions(self) -> None:
        windowed = "some" if self.is_windowed else "no"
        given = f"with rel_pos={self.rel_pos} and {windowed} windowed layers"
        if self.num_special and (self.rel_pos or self.is_windowed):
            raise ValueError(
                f"num_special={self.num_special} {given}: special tokens need global layers "
                "without relative position; set rel_pos=False and omit global_attn_indexes, or set "
                "num_special=0."
            )
        head_dim = self.dim // self.heads
        if self.periods and (self.rel_pos or self.is_windowed or head_dim % 4):
            raise ValueError(
                f"rope={self.periods} {given}, head dim {head_dim}: rotary positions need global "
                "layers without relative position, and a head dim that is a multiple of 4; set "
                "rel_pos=False, omit global_attn_indexes and choose dim and heads accordingly, or "
                "set rope=False."
            )


def _periods(rope: bool | tuple[float, float]) -> tuple[float, float] | None:
    if isinstance(rope, bool):
        return (1.0, 100.0) if rope else None
    is_pair = isinstance(rope, Sequence) and len(rope) == 2
    numbers = is_pair and all(isinstance(x, (int, float)) for x in rope)
    if not numbers or not 0 < rope[0] < rope[1]:
        raise ValueError(
            f"rope={rope!r}: expected True, False or periods (shortest, longest) with "
            "0 < shortest < longest, in coordinates from -1 to 1, e.g. (1, 100)."
        )
    return float(rope[0]), float(rope[1])


def _indexes(given: Iterable[int] | None, depth: int) -> tuple[int, ...]:
    if given is None:
        return tuple(range(depth))
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise ValueError(
            f"global_attn_indexes={given!r}: expected layer indices; give a list, e.g. [{given}]."
        )
    indexes = tuple(whole_number("global_attn_indexes", index, 0) for index in given)
    if any(index >= depth for index in indexes):
        raise ValueError(f"global_attn_indexes={indexes}: the encoder has layers 0 to {depth - 1}.")
    return indexes
