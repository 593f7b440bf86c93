"""What attention costs on this machine: a model of five constants, measured once and remembered.

    dense call    dense_call + dense_pair * pairs
    sparse call   sparse_call + sparse_row * rows + sparse_pair * pairs        pairs: query-key pairs, over images and heads

A plan is pruned and described with it; no forward ever looks at it, because speed must not change results.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsa_vision.attention.backends import cpu_kernel, measured_costs
from bsa_vision.attention.backends.measured_costs import NOT_COSTED, Cost
from bsa_vision.attention.backends.select import BACKENDS
from bsa_vision.attention.functional import sparse_attention
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.mask_tensors import DENSE
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.errors import BackendUnavailable
from bsa_vision.masks import TokenLayout, random_blocks, stack_heads
from bsa_vision.measure.timing import paired
from bsa_vision.storage import machine, machine_cache

HEADS, FEW, MANY, DENSITY = 8, 128, 2048, 0.25  # what the constants are measured with
MOST_TOKENS = 2**20  # where the search for a break-even ends


@dataclass(frozen=True)
class Latency:
    """Seconds of one attention call on one machine, for one dtype and head dim.

    what           the machine, and everything else the constants hold for
    dense_*        torch's dense attention: per call, and per query-key pair of one head
    sparse_*       `sparse_attention`: per call, per row of blocks of one head, per pair that is kept
    dense_in_loop  whether dense heads beside sparse ones cost like kept pairs, not like dense attention
    """

    what: str
    dense_call: float
    dense_pair: float
    sparse_call: float
    sparse_row: float
    sparse_pair: float
    dense_in_loop: bool

    def dense(self, heads: int, tokens: int, images: int = 1, keys: int = 0) -> float:
        """Seconds of a dense call; `keys` 0 = as many as tokens."""
        return self.dense_call + self.dense_pair * images * heads * tokens * (keys or tokens)

    def of_heads(self, masks: HeadMasks, tokens: int, keys: int = 0) -> tuple[float, ...]:
        """Seconds that each head adds to a call for one image."""
        rows = -(-tokens // masks.block_size)
        beside = self.sparse_pair if self.dense_in_loop else self.dense_pair
        return tuple(
            beside * pairs if kind == DENSE else self.sparse_row * rows + self.sparse_pair * pairs
            for kind, pairs in zip(
                masks.slices, masks.kept_pairs(tokens, keys or tokens), strict=True
            )
        )

    def of_masks(self, masks: HeadMasks, tokens: int, images: int = 1, keys: int = 0) -> float:
        """Seconds of one call with these masks; of a dense call where no head is sparse."""
        if masks.all_dense:
            return self.dense(masks.num_heads, tokens, images, keys)
        return self.sparse_call + images * sum(self.of_heads(masks, tokens, keys))

    def better_dense(
        self,
        masks: HeadMasks,
        tokens: int,
        images: int = 1,
        min_gain: float = 0.0,
        keys: int = 0,
    ) -> tuple[int, ...]:
        """Return the sparse heads that save less than `min_gain` of a dense head's time.

        All of them if the whole call saves less than that.
        """
        dense_heads = HeadMasks(None, [DENSE] * masks.num_heads, block_size=masks.block_size)
        alone = self.of_heads(dense_heads, tokens, keys)
        seconds = self.of_heads(masks, tokens, keys)
        sparse = [head for head, kind in enumerate(masks.slices) if kind != DENSE]
        slow = [head for head in sparse if seconds[head] >= (1 - min_gain) * alone[head]]
        rest = self.sparse_call + images * sum(
            alone[h] if h in slow else seconds[h] for h in range(masks.num_heads)
        )
        pays = len(slow) < len(sparse) and rest < (1 - min_gain) * self.dense(
            masks.num_heads, tokens, images, keys
        )
        return tuple(slow if pays else sparse)

    def break_even(
        self, heads: int, density: float, block_size: int = 128, images: int = 1, keys: float = 1.0
    ) -> int | None:
        """Tokens from which heads of this realised density are faster than dense ones, with so many keys per token; None = never."""

        def pays(tokens: int) -> bool:
            head = (
                self.sparse_row * -(-tokens // block_size)
                + self.sparse_pair * density * keys * tokens**2
            )
            dense = self.dense_call + self.dense_pair * images * heads * keys * tokens**2
            return self.sparse_call + images * heads * head < dense

        if not pays(MOST_TOKENS):
            return None
        low, high = 0, MOST_TOKENS  # pays at `high`, not at `low`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if pays(middle) else (middle, high)
        return high


def measure(
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Latency:
    """Measure the constants here and now. `latency` remembers them."""
    device = torch.device(device)
    seconds = _seconds(head_dim, dtype, device)
    sparse = _cost(seconds["few, sparse"], seconds["kept"], seconds["all"], _masks())
    return Latency(
        what=describe(head_dim, dtype, device),
        dense_call=seconds["few, dense"],
        dense_pair=(seconds["dense"] - seconds["few, dense"]) / (HEADS * MANY**2),
        sparse_call=sparse.call,
        sparse_row=sparse.row,
        sparse_pair=sparse.pair,
        dense_in_loop=device.type == "cpu"
        and dtype != torch.float64
        and cpu_kernel.why_not() is None,
    )


def _masks() -> HeadMasks:
    layout = TokenLayout((MANY, 1))
    heads = [random_blocks(layout, 1 - DENSITY, seed=0, stream=head) for head in range(HEADS)]
    return HeadMasks(stack_heads(heads, 1), layout=layout)


def _seconds(head_dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Medians of the calls the constants are read from, measured in alternation."""
    generator = torch.Generator(device).manual_seed(
        0
    )  # of its own: a caller's random numbers stay what they are
    shape = (1, HEADS, MANY, head_dim)
    many = tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    few = tuple(x[:, :, :FEW].contiguous() for x in many)
    some, every = (
        _masks(),
        HeadMasks(torch.ones(1, HEADS, MANY // 128, MANY // 128, dtype=torch.bool)),
    )
    one_block = HeadMasks(torch.ones(1, HEADS, 1, 1, dtype=torch.bool))

    def dense(tensors: tuple[Tensor, ...]) -> Callable[[], object]:
        q, k, v = tensors
        return lambda: F.scaled_dot_product_attention(q, k, v)

    def sparse(tensors: tuple[Tensor, ...], masks: HeadMasks) -> Callable[[], object]:
        q, k, v = tensors
        return lambda: sparse_attention(q, k, v, masks)

    calls = {
        "dense": dense(many),
        "all": sparse(many, every),
        "kept": sparse(many, some),
        "few, dense": dense(few),
        "few, sparse": sparse(few, one_block),
    }
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        calls |= _other_dense(many, device)
        found = {
            name: timing.median
            for name, timing in paired(calls, rounds=7, warmup=2, device=device).items()
        }
    found["dense"] = min(seconds for name, seconds in found.items() if name.startswith("dense"))
    return found


def _other_dense(
    tensors: tuple[Tensor, ...], device: torch.device
) -> dict[str, Callable[[], object]]:
    """On a GPU: each of torch's kernels by itself, those that take these tensors. What torch prefers is not always the fastest."""
    q, k, v = tensors

    def run(kind: SDPBackend) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    found: dict[str, Callable[[], object]] = {}
    for kind in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):
        if device.type == "cuda":
            try:
                run(kind)
            except RuntimeError:
                continue
            found[f"dense, {kind.name}"] = partial(run, kind)
    return found


def describe(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Name the calls that constants hold for; any other kind of call is measured anew."""
    without_loop = device.type == "cpu" and cpu_kernel.why_not() is not None
    loop = ", without the compiled loop" if without_loop else ""
    return machine.describe(device).key(dtype, head_dim) + loop


# Remembered in a file

FILE = "latency.json"


def latency(
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    anew: bool = False,
) -> Latency:
    """What attention costs on this machine: as remembered, or (`anew`: in any case) measured now and remembered.

    Measuring takes a second or two and wants the machine for itself. On a GPU every backend that can is measured first (`measure_backends`),
    which compiles kernels and takes longer; from then on `backend="auto"` takes the one that costs least. After installing another backend: `anew`.
    """
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError(
            "device='meta': nothing is computed there; give a device that computes, 'cpu' or 'cuda'."
        )
    what = describe(head_dim, dtype, device)
    known = _known.get(what) or _read().get(what)
    if device.type == "cuda" and (
        anew or not measured_costs.known(measured_costs.describe(device, dtype, head_dim, False))
    ):
        measure_backends(head_dim, dtype, device)
        anew = True
    if known is None or anew:
        known = measure(head_dim, dtype, device)
        kept = {one.what: asdict(one) for one in (*_read().values(), replace(known, what=what))}
        machine_cache.write(
            FILE,
            {name: {k: x for k, x in entry.items() if k != "what"} for name, entry in kept.items()},
        )
    _known[what] = known
    return known


_known: dict[str, Latency] = {}


def _read() -> dict[str, Latency]:
    """What the file holds; without entries that are not ours or of another version."""
    return {
        what: Latency(what=what, **entry)
        for what, entry in machine_cache.read(FILE).items()
        if _is_latency(entry)
    }


def _is_latency(entry: object) -> bool:
    """Whether these are numbers that `measure` could have found."""
    numbers = {field.name for field in fields(Latency)} - {"what", "dense_in_loop"}
    if not isinstance(entry, dict) or set(entry) != {*numbers, "dense_in_loop"}:
        return False
    seconds = [entry[name] for name in numbers]
    possible = all(type(x) is float and 0 <= x < 1e6 for x in seconds)  # NaN is in no range
    return (
        possible
        and entry["dense_pair"] > 0
        and entry["sparse_pair"] > 0
        and type(entry["dense_in_loop"]) is bool
    )


# Backend by backend


def measure_backends(
    head_dim: int = 64, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> dict[str, dict[str, Cost]]:
    """What a call costs with each backend that can, with and without relative position; `backend="auto"` goes by it on GPUs.

    Returns {situation: {backend: cost}}, and remembers it.
    """
    found = {}
    for with_rel_pos in (False, True):
        what = measured_costs.describe(torch.device(device), dtype, head_dim, with_rel_pos)
        found[what] = _costs(head_dim, dtype, torch.device(device), with_rel_pos)
        measured_costs.remember(what, found[what])
    return found


@torch.no_grad()
def _costs(
    head_dim: int, dtype: torch.dtype, device: torch.device, with_rel_pos: bool
) -> dict[str, Cost]:
    """Three calls of each backend, all in alternation: one block, many blocks of which some are kept, and all of them."""
    few, some, every = (
        _square(side, density) for side, density in ((SMALL, 1.0), (LARGE, DENSITY), (LARGE, 1.0))
    )
    calls: dict[str, Callable[[], object]] = {}
    for size, masks in (("few", few), ("some", some), ("every", every)):
        assert masks.layout is not None
        tensors, rel_pos = _tensors(masks.layout, head_dim, dtype, device, with_rel_pos)
        for name in BACKENDS:
            if name in NOT_COSTED:
                continue
            call = partial(sparse_attention, *tensors, masks, rel_pos=rel_pos, backend=name)
            try:
                call()
            except BackendUnavailable:
                continue
            except (
                Exception
            ) as error:  # of a package or a compiler: the others are measured all the same
                warnings.warn(
                    f"backend {name!r} failed while it was measured, and is left out: {type(error).__name__}: {str(error).strip()[:200]}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            calls[f"{name} {size}"] = call
    sizes = ("few", "some", "every")
    names = [name for name in BACKENDS if all(f"{name} {size}" in calls for size in sizes)]
    wanted = {f"{name} {size}": calls[f"{name} {size}"] for name in names for size in sizes}
    with torch.autocast(device.type, enabled=False):
        times = {
            name: timing.median
            for name, timing in paired(wanted, rounds=7, warmup=2, device=device).items()
        }
    return {
        name: _cost(times[f"{name} few"], times[f"{name} some"], times[f"{name} every"], some)
        for name in names
    }


def _cost(few: float, some: float, every: float, masks: HeadMasks) -> Cost:
    """From seconds of calls of one block, of `masks`, and of all blocks."""
    assert masks.layout is not None
    tokens = masks.layout.num_tokens
    rows, kept, pairs = (
        HEADS * tokens // 128,
        sum(masks.kept_pairs(tokens, tokens)),
        HEADS * tokens**2,
    )
    pair = max((every - some) / (pairs - kept), 0.0)
    return Cost(few, max(some - few - pair * kept, 0.0) / rows, pair)


SMALL, LARGE = (8, 16), (32, 64)  # patches: one block, and 16


def _square(grid: tuple[int, int], density: float) -> HeadMasks:
    """Nothing dense: what a backend does with masks is measured, even where they keep everything."""
    layout = TokenLayout(grid, order="tile")
    heads = [random_blocks(layout, 1 - density, seed=0, stream=head) for head in range(HEADS)]
    return HeadMasks(stack_heads(heads, 1), layout=layout)


def _tensors(
    layout: TokenLayout, head_dim: int, dtype: torch.dtype, device: torch.device, with_rel_pos: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], RelPos | None]:
    generator = torch.Generator(device).manual_seed(0)

    def random(width: int) -> Tensor:
        return torch.randn(
            1, HEADS, layout.num_tokens, width, generator=generator, device=device
        ).to(dtype)

    tensors = (random(head_dim), random(head_dim), random(head_dim))
    return tensors, RelPos(random(layout.grid[0]), random(layout.grid[1])) if with_rel_pos else None
