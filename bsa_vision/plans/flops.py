"""What an encoder computes: FLOPs, bytes and ceilings, from shapes alone. Seconds on a machine are `bsa_vision.latency`'s business.

A multiplication and an addition are 2 FLOPs, as torch's FLOP counter has it; softmax, norms and activations count nothing there and here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from bsa_vision.plans import text_table
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec, OtherBlock


@dataclass(frozen=True)
class LayerCost:
    """One layer, for one image; every head dense.

    is_global  whether attention is across the image, not within windows
    tokens   that attend: of the image, or of one window, padding included
    keys     that they attend to: the same, or what is remembered
    windows  per image
    products FLOPs of queries times keys and of weights times values: what block sparsity can skip
    rel_pos  FLOPs of the factored relative position
    linear   FLOPs of the projections and of the MLP
    moved    bytes of q, k, v and the output
    matrix   bytes of all logits at once, which a dense implementation with a relative position holds
    """

    key: str
    name: str
    is_global: bool
    tokens: int
    keys: int
    windows: int
    products: int
    rel_pos: int
    linear: int
    moved: int
    matrix: int

    @property
    def flops(self) -> int:
        return self.products + self.rel_pos + self.linear


@dataclass(frozen=True)
class ModelCost:
    """One image of `grid` patches through an encoder; `str()` gives a table.

    outside  FLOPs of patch embedding, neck and whatever else lies in no block
    """

    family: str
    grid: tuple[int, int]
    pixels: tuple[int, int]
    layers: tuple[LayerCost, ...]
    outside: int

    @cached_property
    def flops(self) -> int:
        return self.outside + sum(layer.flops for layer in self.layers)

    def share(self, layers: Iterable[str] | None = None) -> float:
        """The share of all FLOPs that sparsity could skip in these layers (keys; None = the global ones), 0 to 1."""
        wanted = (
            {layer.key for layer in self.layers if layer.is_global}
            if layers is None
            else set(layers)
        )
        return sum(layer.products for layer in self.layers if layer.key in wanted) / self.flops

    def ceiling(self, layers: Iterable[str] | None = None) -> float:
        """How many times fewer FLOPs there were if these layers' products cost nothing: no sparsity gains more (Amdahl's law).

        Over exact attention, that is; what an implementation wastes on N x N matrices is not counted.
        """
        return 1 / (1 - self.share(layers))

    def gain(self, sparsity: Mapping[str, float]) -> float:
        """How many times fewer FLOPs with this sparsity, 0 to 1, by layer key."""
        return self.flops / (
            self.flops - sum(x.products * sparsity.get(x.key, 0.0) for x in self.layers)
        )

    @property
    def sentence(self) -> str:
        """The ceiling in words."""
        where = (
            "sparsity in the global layers"
            if any(not layer.is_global for layer in self.layers)
            else "sparsity"
        )
        return (
            f"{self.family} at {self.pixels[0]} x {self.pixels[1]} px: {where} can gain at most {self.ceiling():.2f}x over exact "
            f"attention, {self.share():.0%} of {self.flops / 1e9:.0f} GFLOP"
        )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            (
                "layer",
                "tokens",
                "windows",
                "products",
                "rel. position",
                "linear",
                "of all",
                "N x N matrix",
            )
        ]
        for layer in self.layers:
            flops = [
                f"{value / 1e9:.2f} GFLOP"
                for value in (layer.products, layer.rel_pos, layer.linear)
            ]
            of_all, matrix = f"{layer.products / self.flops:.1%}", f"{layer.matrix / 2**20:.0f} MiB"
            rows.append((layer.name, str(layer.tokens), str(layer.windows), *flops, of_all, matrix))
        return "\n".join(
            [
                *text_table.lines(rows),
                f"outside of the layers: {self.outside / 1e9:.2f} GFLOP",
                self.sentence,
            ]
        )


def cost(spec: ModelSpec, *, element_size: int = 4) -> ModelCost:
    """What the encoder that `spec` describes computes for one image at the spec's own grid.

    spec          `bsa.inspect(model)`, or `bsa.inspect(model, image_size=2048)` for another size
    element_size  bytes per number: 4 for float32, 2 for half precision

        >>> print(bsa.cost(bsa.inspect(model)).sentence)
    """
    if not isinstance(spec, ModelSpec):
        raise TypeError(
            f"spec is a {type(spec).__name__}: expected a ModelSpec; pass bsa.inspect(model)."
        )
    if not all(layer.attention_weights for layer in spec.layers):
        raise ValueError(
            "this spec does not say how many weights its layers have: without them shares and ceilings mean nothing; take it from "
            "a model with bsa.inspect(model)."
        )
    height, width = spec.grid
    pixels = (height * spec.patch_size[0], width * spec.patch_size[1])
    layers = tuple(_layer(layer, spec, element_size) for layer in spec.layers)
    outside = round(2 * (spec.patch_weights * height * width + spec.image_weights))
    outside += sum(_other(block, spec) for block in spec.others)
    return ModelCost(spec.family, spec.grid, pixels, layers, outside)


def _layer(layer: LayerSpec, spec: ModelSpec, element_size: int) -> LayerCost:
    height, width = spec.grid
    image_tokens = spec.num_prefix_tokens + height * width + spec.num_suffix_tokens
    rows, columns, windows, tokens = height, width, 1, image_tokens
    if layer.window:
        rows = columns = layer.window
        windows, tokens = -(-height // rows) * -(-width // columns), rows * columns
    keys = layer.frames * height * width + layer.pointers if layer.frames else tokens
    vectors = windows * layer.heads * tokens  # of head_dim numbers, in each of q and the output
    return LayerCost(
        key=layer.key,
        name=layer.name,
        is_global=not layer.window,
        tokens=tokens,
        keys=keys,
        windows=windows,
        products=4 * vectors * keys * layer.head_dim,
        rel_pos=2 * vectors * (rows + columns) * layer.head_dim if layer.rel_pos else 0,
        linear=2
        * (
            layer.attention_weights * windows * tokens
            + layer.mlp_weights * image_tokens
            + layer.key_weights * keys
        ),
        moved=2 * windows * layer.heads * (tokens + keys) * layer.head_dim * element_size,
        matrix=vectors * keys * element_size,
    )


def _other(block: OtherBlock, spec: ModelSpec) -> int:
    """FLOPs of a block that is no layer, windows padded."""
    height, width = (int(side * block.stride) for side in spec.grid)
    rows, columns = (block.window, block.window) if block.window else (height, width)
    windows = -(-height // rows) * -(-width // columns)
    keys, queries = rows * columns, (rows // block.q_stride) * (columns // block.q_stride)
    unpadded = (height // block.q_stride) * (width // block.q_stride)
    products = 2 * windows * block.heads * queries * keys * block.head_dim
    linear = windows * (block.qkv_weights * keys + block.proj_weights * queries)
    return 2 * (
        products + linear + block.mlp_weights * unpadded + block.shortcut_weights * height * width
    )
