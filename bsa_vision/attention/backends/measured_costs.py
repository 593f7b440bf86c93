"""What a call costs with each backend, where that was measured on this machine: on GPUs `auto` takes the cheapest of those that can.

    seconds = call + row * rows + pair * pairs        rows of blocks, and query-key pairs that are kept, over images and heads

`bsa_vision.latency` measures. Choosing only reads, and goes by what is known only where all candidates are; otherwise the order of `BACKENDS` decides.
All of them apply the mask, so that a choice changes the time a call takes, and the result by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from bsa_vision.attention.backends.problem import Problem
from bsa_vision.storage import machine, machine_cache

FILE = "backends.json"
NOT_COSTED = (
    "sdpa",
    "reference",
)  # what skips nothing is N x N, whatever the mask: never a candidate beside what skips


@dataclass(frozen=True)
class Cost:
    """Seconds: of each call, of each row of blocks of one head, of each pair that is kept."""

    call: float
    row: float
    pair: float

    def seconds(self, rows: int, pairs: int) -> float:
        return self.call + self.row * rows + self.pair * pairs


@lru_cache(maxsize=64)
def describe(device: torch.device, dtype: torch.dtype, head_dim: int, rel_pos: bool) -> str:
    """Name the calls that costs are kept for."""
    terms = ", relative position" if rel_pos else ""
    return machine.describe(device).key(dtype, head_dim) + terms


def known(what: str) -> Mapping[str, Cost]:
    """By backend, for a `describe`d situation."""
    if what not in _known:
        _known[what] = _parsed(machine_cache.read(FILE).get(what))
    return _known[what]


def remember(what: str, costs: Mapping[str, Cost]) -> None:
    """For this process and later ones."""
    global _generation
    _generation += 1
    _known[what] = dict(costs)
    kept = {name: asdict(cost) for name, cost in costs.items()}
    machine_cache.write(FILE, {**machine_cache.read(FILE), what: kept})


def generation() -> int:
    """Another number whenever costs were remembered: what was chosen before must be chosen anew."""
    return _generation


_known: dict[str, dict[str, Cost]] = {}
_generation = 0


def _parsed(entry: object) -> dict[str, Cost]:
    """Without what is not ours or of another version."""
    entries = entry if isinstance(entry, dict) else {}
    return {name: Cost(**numbers) for name, numbers in entries.items() if _is_cost(numbers)}


def _is_cost(numbers: object) -> bool:
    if not isinstance(numbers, dict) or set(numbers) != {"call", "row", "pair"}:
        return False
    return all(type(x) is float and 0 <= x < 1e6 for x in numbers.values())  # NaN is in no range


def cheapest(names: Sequence[str], problem: Problem) -> str:
    """Of these backends, all of which can: the one that is expected to be fastest; the first where costs of some are not known."""
    candidates = [name for name in names if name not in NOT_COSTED]
    if len(candidates) < 2:
        return names[0]
    q = problem.q
    costs = known(describe(q.device, q.dtype, q.shape[-1], problem.rel_pos is not None))
    if not all(name in costs for name in candidates):
        return names[0]
    rows, pairs = _work(problem)
    return min(candidates, key=lambda name: costs[name].seconds(rows, pairs))


def _work(problem: Problem) -> tuple[int, int]:
    """Rows of blocks and kept pairs of all images and heads; of a ragged batch as if all images were as long as the longest."""
    masks, tokens = problem.masks, (problem.max_seqlen_q, problem.max_seqlen_k)
    pairs = masks.remember(("pairs", *tokens), lambda: sum(masks.kept_pairs(*tokens)))
    rows = -(-tokens[0] // masks.block_size) * masks.num_heads
    return problem.num_images * rows, problem.num_images * pairs
