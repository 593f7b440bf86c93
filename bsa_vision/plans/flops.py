"""FLOPs and bytes of an encoder, and the speed-up that sparsity can reach at most, from shapes.

A multiplication and an addition are 2 FLOPs, as in torch's FLOP counter. Like torch's counter,
softmax, norms and activations count nothing. `bsa_vision.measure.latency` models
seconds on a machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from bsa_vision.plans import text_table
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec, OtherBlock
from bsa_vision.plans.validation import check_spec


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer for one image, with every head dense.

    is_global  whether attention spans the image; False: it stays within windows
    tokens     number of query tokens: of the image or of one window, padding included
    keys       number of keys: equal to `tokens`, or the number of remembered keys
    windows    number of windows per image; 1 for a global layer
    products   FLOPs of Q @ K^T and P @ V, which block sparsity can skip
    rel_pos    FLOPs of the factored relative position
    linear     FLOPs of the projections and of the MLP
    moved      bytes of q, k, v and the output
    matrix     bytes of all logits at once; a dense implementation with relative position stores
               them
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
    """Cost of an encoder for one image of `grid` patches; `str()` gives a table.

    outside  FLOPs of everything outside the layers: patch embedding, neck, other blocks
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
        """Return the share of all FLOPs, 0 to 1, that sparsity in these layers can skip.

        layers  layer keys; None = the global layers
        """
        if layers is None:
            layers = (layer.key for layer in self.layers if layer.is_global)
        wanted = set(layers)
        return sum(layer.products for layer in self.layers if layer.key in wanted) / self.flops

    def ceiling(self, layers: Iterable[str] | None = None) -> float:
        """Return the largest possible FLOPs reduction by sparsity in these layers (Amdahl's law).

        The baseline is exact dense attention. Work that an implementation wastes on N x N matrices
        is not counted.
        """
        return 1 / (1 - self.share(layers))

    def gain(self, sparsity: Mapping[str, float]) -> float:
        """Return dense FLOPs / sparse FLOPs for this sparsity, 0 to 1, by layer key."""
        skipped = sum(x.products * sparsity.get(x.key, 0.0) for x in self.layers)
        return self.flops / (self.flops - skipped)

    @property
    def sentence(self) -> str:
        """The ceiling in words."""
        all_global = all(layer.is_global for layer in self.layers)
        height, width = self.pixels
        return (
            f"{self.family} at {height} x {width} px: "
            f"sparsity{'' if all_global else ' in the global layers'} can gain at most "
            f"{self.ceiling():.2f}x over exact attention, {self.share():.0%} of "
            f"{self.flops / 1e9:.0f} GFLOP"
        )

    def __str__(self) -> str:
        titles = ("layer", "tokens", "windows", "products", "rel. position", "linear")
        rows: list[tuple[str, ...]] = [(*titles, "FLOPs share", "N x N matrix")]
        for layer in self.layers:
            parts = (layer.products, layer.rel_pos, layer.linear)
            flops = [f"{value / 1e9:.2f} GFLOP" for value in parts]
            share, matrix = f"{layer.products / self.flops:.1%}", f"{layer.matrix / 2**20:.0f} MiB"
            rows.append((layer.name, str(layer.tokens), str(layer.windows), *flops, share, matrix))
        outside = f"outside the layers: {self.outside / 1e9:.2f} GFLOP"
        return "\n".join([*text_table.lines(rows), outside, self.sentence])


def cost(spec: ModelSpec, *, element_size: int = 4) -> ModelCost:
    """Count what the encoder described by `spec` computes for one image at the spec's grid.

    spec          `bsa.inspect(model)`, or `bsa.inspect(model, image_size=2048)` for another size
    element_size  bytes per number: 4 for float32, 2 for half precision

        >>> print(bsa.cost(bsa.inspect(model)).sentence)
    """
    check_spec(spec)
    if not all(layer.attention_weights for layer in spec.layers):
        raise ValueError(
            "spec has layers with attention_weights=0: FLOPs shares need the number of weights; "
            "get the spec from bsa.inspect(model)."
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
    vectors = windows * layer.heads * tokens  # rows of length head_dim in q and in the output
    linear = layer.attention_weights * windows * tokens
    linear += layer.mlp_weights * image_tokens + layer.key_weights * keys
    return LayerCost(
        key=layer.key,
        name=layer.name,
        is_global=not layer.window,
        tokens=tokens,
        keys=keys,
        windows=windows,
        products=4 * vectors * keys * layer.head_dim,
        rel_pos=2 * vectors * (rows + columns) * layer.head_dim if layer.rel_pos else 0,
        linear=2 * linear,
        moved=2 * windows * layer.heads * (tokens + keys) * layer.head_dim * element_size,
        matrix=vectors * keys * element_size,
    )


def _other(block: OtherBlock, spec: ModelSpec) -> int:
    """Return the FLOPs of a block outside the layers, with padded windows."""
    height, width = (int(side * block.stride) for side in spec.grid)
    rows, columns = (block.window, block.window) if block.window else (height, width)
    windows = -(-height // rows) * -(-width // columns)
    keys, queries = rows * columns, (rows // block.q_stride) * (columns // block.q_stride)
    unpadded = (height // block.q_stride) * (width // block.q_stride)
    products = 2 * windows * block.heads * queries * keys * block.head_dim
    linear = windows * (block.qkv_weights * keys + block.proj_weights * queries)
    linear += block.mlp_weights * unpadded + block.shortcut_weights * height * width
    return 2 * (products + linear)
