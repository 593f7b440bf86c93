"""Model the latency of attention on this machine by five constants, measured once and cached.

    dense call    dense_call + dense_pair * pairs
    sparse call   sparse_call + sparse_row * rows + sparse_pair * pairs

`pairs` are query-key pairs, `rows` rows of blocks, both over all images and heads. Plans are pruned
and described with it. No forward pass uses it, because speed must not change results.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
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

HEADS, FEW, MANY, DENSITY = 8, 128, 2048, 0.25  # of the measured calls
MOST_TOKENS = 2**20  # the end of the search for a break-even


@dataclass(frozen=True)
class Latency:
    """Seconds of one attention call on one machine, for one dtype and head dim.

    what           the machine, and everything else that the constants hold for
    dense_*        torch's dense attention: per call, and per query-key pair of one head
    sparse_*       `sparse_attention`: per call, per row of blocks of one head, per kept pair
    dense_in_loop  True if dense heads beside sparse ones cost `sparse_pair` per pair
    """

    what: str
    dense_call: float
    dense_pair: float
    sparse_call: float
    sparse_row: float
    sparse_pair: float
    dense_in_loop: bool

    def dense(self, heads: int, tokens: int, images: int = 1, keys: int = 0) -> float:
        """Return the seconds of a dense call; `keys` 0 = as many as tokens."""
        return self.dense_call + self.dense_pair * images * heads * tokens * (keys or tokens)

    def of_heads(self, masks: HeadMasks, tokens: int, keys: int = 0) -> tuple[float, ...]:
        """Return the seconds that each head adds to a call, per image."""
        rows = -(-tokens // masks.block_size)
        dense_pair = self.sparse_pair if self.dense_in_loop else self.dense_pair
        return tuple(
            dense_pair * pairs
            if kind == DENSE
            else self.sparse_row * rows + self.sparse_pair * pairs
            for kind, pairs in zip(
                masks.slices, masks.kept_pairs(tokens, keys or tokens), strict=True
            )
        )

    def of_masks(self, masks: HeadMasks, tokens: int, images: int = 1, keys: int = 0) -> float:
        """Return the seconds of one call with these masks, dense if no head is sparse."""
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
        dense = self.of_heads(dense_heads, tokens, keys)
        seconds = self.of_heads(masks, tokens, keys)
        sparse = [head for head, kind in enumerate(masks.slices) if kind != DENSE]
        slow = [head for head in sparse if seconds[head] >= (1 - min_gain) * dense[head]]
        rest = self.sparse_call + images * sum(
            dense[h] if h in slow else seconds[h] for h in range(masks.num_heads)
        )
        pays = len(slow) < len(sparse) and rest < (1 - min_gain) * self.dense(
            masks.num_heads, tokens, images, keys
        )
        return tuple(slow if pays else sparse)

    def break_even(
        self, heads: int, density: float, block_size: int = 128, images: int = 1, keys: float = 1.0
    ) -> int | None:
        """Return the number of tokens from which heads of this density are faster than dense.

        density  realised, 0 to 1
        keys     keys per token

        None if sparse heads are never faster.
        """

        def pays(tokens: int) -> bool:
            rows, pairs = -(-tokens // block_size), keys * tokens**2
            head = self.sparse_row * rows + self.sparse_pair * density * pairs
            dense = self.dense_call + self.dense_pair * images * heads * pairs
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
    """Measure the constants now; `latency` caches them."""
    device = torch.device(device)
    seconds = _seconds(head_dim, dtype, device)
    sparse = _cost(seconds["few, sparse"], seconds["kept"], seconds["all"], _masks())
    compiled = device.type == "cpu" and dtype != torch.float64 and cpu_kernel.why_not() is None
    return Latency(
        what=describe(head_dim, dtype, device),
        dense_call=seconds["few, dense"],
        dense_pair=(seconds["dense"] - seconds["few, dense"]) / (HEADS * MANY**2),
        sparse_call=sparse.call,
        sparse_row=sparse.row,
        sparse_pair=sparse.pair,
        dense_in_loop=compiled,
    )


def _masks() -> HeadMasks:
    layout = TokenLayout((MANY, 1))
    heads = [random_blocks(layout, 1 - DENSITY, seed=0, stream=head) for head in range(HEADS)]
    return HeadMasks(stack_heads(heads, 1), layout=layout)


def _seconds(head_dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return the median seconds of the calls that give the constants, measured in alternation."""
    generator = torch.Generator(device).manual_seed(0)  # leaves the caller's generator alone
    shape = (1, HEADS, MANY, head_dim)
    many = tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    few = tuple(x[:, :, :FEW].contiguous() for x in many)
    every = HeadMasks(torch.ones(1, HEADS, MANY // 128, MANY // 128, dtype=torch.bool))
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
        "kept": sparse(many, _masks()),
        "few, dense": dense(few),
        "few, sparse": sparse(few, one_block),
    }
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        calls |= _other_dense(many, device)
        seconds = _medians(calls, device)
    seconds["dense"] = min(x for name, x in seconds.items() if name.startswith("dense"))
    return seconds


def _medians(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    times = paired(calls, rounds=7, warmup=2, device=device)
    return {name: timing.median for name, timing in times.items()}


def _other_dense(
    tensors: tuple[Tensor, ...], device: torch.device
) -> dict[str, Callable[[], object]]:
    """Return calls of each of torch's GPU kernels; the one torch prefers may not be the fastest."""
    q, k, v = tensors

    def run(kind: SDPBackend) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    found: dict[str, Callable[[], object]] = {}
    if device.type != "cuda":
        return found
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        kind = getattr(SDPBackend, name)
        try:
            run(kind)
        except RuntimeError:
            continue
        found[f"dense, {name}"] = partial(run, kind)
    return found


def describe(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Name the calls that the constants hold for; other kinds are measured separately."""
    without_loop = device.type == "cpu" and cpu_kernel.why_not() is not None
    loop = ", without the compiled loop" if without_loop else ""
    return machine.describe(device).key(dtype, head_dim) + loop


# Cached in a file

FILE = "latency.json"


def latency(
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    anew: bool = False,
) -> Latency:
    """Return the latency of attention on this machine: cached, or measured now and cached.

    anew  measure even if it is cached, for example after installing another backend

    Measuring takes a second or two and needs an idle machine. On a GPU every backend is measured
    first (`measure_backends`), which compiles kernels and takes longer; `backend="auto"` then uses
    the fastest.
    """
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError(
            "device='meta' computes nothing: expected a device that does, 'cpu' or 'cuda'."
        )
    what = describe(head_dim, dtype, device)
    known = _known.get(what) or _read().get(what)
    if device.type == "cuda":
        key = measured_costs.describe(device, dtype, head_dim, False)
        if anew or not measured_costs.known(key):
            measure_backends(head_dim, dtype, device)
            anew = True
    if known is None or anew:
        known = measure(head_dim, dtype, device)
        entries = {name: asdict(entry) for name, entry in {**_read(), what: known}.items()}
        for entry in entries.values():
            del entry["what"]
        machine_cache.write(FILE, entries)
    _known[what] = known
    return known


_known: dict[str, Latency] = {}


def _read() -> dict[str, Latency]:
    """Return the entries of the file, without those of another version or program."""
    return {
        what: Latency(what=what, **entry)
        for what, entry in machine_cache.read(FILE).items()
        if _is_latency(entry)
    }


def _is_latency(entry: object) -> bool:
    """Return whether these are numbers that `measure` can return."""
    numbers = {field.name for field in fields(Latency)} - {"what", "dense_in_loop"}
    if not isinstance(entry, dict) or set(entry) != {*numbers, "dense_in_loop"}:
        return False
    seconds = [entry[name] for name in numbers]
    if not all(type(x) is float and 0 <= x < 1e6 for x in seconds):  # also rejects NaN
        return False
    positive = entry["dense_pair"] > 0 and entry["sparse_pair"] > 0
    return positive and type(entry["dense_in_loop"]) is bool


# Each backend


def measure_backends(
    head_dim: int = 64, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> dict[str, dict[str, Cost]]:
    """Measure each backend with and without relative position; return {situation: {name: cost}}.

    The costs are cached. On GPUs `backend="auto"` chooses by them.
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
    """Time three calls of each backend in alternation: one block, some of many blocks, and all."""
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
            except Exception as error:  # of a package or compiler; measure the other backends
                reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
                text = f"backend {name!r} failed while it was measured and is left out: {reason}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                continue
            calls[f"{name} {size}"] = call
    sizes = ("few", "some", "every")
    names = [name for name in BACKENDS if all(f"{name} {size}" in calls for size in sizes)]
    wanted = {f"{name} {size}": calls[f"{name} {size}"] for name in names for size in sizes}
    with torch.autocast(device.type, enabled=False):
        seconds = _medians(wanted, device)
    return {
        name: _cost(seconds[f"{name} few"], seconds[f"{name} some"], seconds[f"{name} every"], some)
        for name in names
    }


def _cost(few: float, some: float, every: float, masks: HeadMasks) -> Cost:
    """Return the cost from the seconds of calls with one block, with `masks`, and with all."""
    assert masks.layout is not None
    tokens = masks.layout.num_tokens
    rows, pairs = HEADS * tokens // 128, HEADS * tokens**2
    kept = sum(masks.kept_pairs(tokens, tokens))
    pair = max((every - some) / (pairs - kept), 0.0)
    return Cost(few, max(some - few - pair * kept, 0.0) / rows, pair)


SMALL, LARGE = (8, 16), (32, 64)  # grids of 1 block and of 16 blocks


def _square(grid: tuple[int, int], density: float) -> HeadMasks:
    """Return masks without dense heads, so that even full masks are computed as masks."""
    layout = TokenLayout(grid, order="tile")
    heads = [random_blocks(layout, 1 - density, seed=0, stream=head) for head in range(HEADS)]
    return HeadMasks(stack_heads(heads, 1), layout=layout)


def _tensors(
    layout: TokenLayout, head_dim: int, dtype: torch.dtype, device: torch.device, with_rel_pos: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], RelPos | None]:
    generator = torch.Generator(device).manual_seed(0)

    def random(width: int) -> Tensor:
        shape = (1, HEADS, layout.num_tokens, width)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    tensors = (random(head_dim), random(head_dim), random(head_dim))
    return tensors, RelPos(random(layout.grid[0]), random(layout.grid[1])) if with_rel_pos else None
