"""Costs of the backends as measured on this machine; on GPUs `auto` chooses the cheapest one.

    seconds = call + row * rows + pair * pairs

`rows` are rows of blocks and `pairs` kept query-key pairs, over all images and heads.

`bsa_vision.measure.latency` measures the costs; this module only stores and reads them. They are
used if the costs of all candidates are known; otherwise the order of `BACKENDS` decides. Every
backend applies the mask, so the choice changes the time of a call, and its result by rounding only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from bsa_vision.attention.backends.problem import Problem
from bsa_vision.storage import machine, machine_cache

FILE = "backends.json"
NOT_COSTED = ("sdpa", "reference")  # they skip nothing: N x N for any mask


@dataclass(frozen=True)
class Cost:
    """The cost model of one backend, in seconds."""

    call: float  # per call
    row: float  # per row of blocks of one head
    pair: float  # per kept query-key pair

    def seconds(self, rows: int, pairs: int) -> float:
        return self.call + self.row * rows + self.pair * pairs


@lru_cache(maxsize=64)
def describe(device: torch.device, dtype: torch.dtype, head_dim: int, rel_pos: bool) -> str:
    """Return the key under which costs of such calls are stored."""
    terms = ", relative position" if rel_pos else ""
    return machine.describe(device).key(dtype, head_dim) + terms


def known(what: str) -> Mapping[str, Cost]:
    """Return the known costs by backend; `what` comes from `describe`."""
    if what not in _known:
        _known[what] = _parsed(machine_cache.read(FILE).get(what))
    return _known[what]


def remember(what: str, costs: Mapping[str, Cost]) -> None:
    """Store costs by backend, for this process and later ones."""
    global _generation
    _generation += 1
    _known[what] = dict(costs)
    kept = {name: asdict(cost) for name, cost in costs.items()}
    machine_cache.write(FILE, {**machine_cache.read(FILE), what: kept})


def generation() -> int:
    """Return a number that grows whenever costs are stored, so that cached choices expire."""
    return _generation


_known: dict[str, dict[str, Cost]] = {}
_generation = 0


def _parsed(entry: object) -> dict[str, Cost]:
    """Return the costs in a cache entry; drop entries written by another version or program."""
    entries = entry if isinstance(entry, dict) else {}
    return {name: Cost(**numbers) for name, numbers in entries.items() if _is_cost(numbers)}


def _is_cost(numbers: object) -> bool:
    if not isinstance(numbers, dict) or set(numbers) != {"call", "row", "pair"}:
        return False
    return all(type(x) is float and 0 <= x < 1e6 for x in numbers.values())  # False for NaN


def cheapest(names: Sequence[str], problem: Problem) -> str:
    """Return the backend of `names` with the lowest expected time.

    Every backend of `names` must be able to run `problem`. If the costs of some are unknown, the
    first one is returned.
    """
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
    """Return the rows of blocks and the kept pairs over all images and heads.

    For a ragged batch, every image counts as if it were as long as the longest one.
    """
    masks, tokens = problem.masks, (problem.max_seqlen_q, problem.max_seqlen_k)
    pairs = masks.remember(("pairs", *tokens), lambda: sum(masks.kept_pairs(*tokens)))
    rows = -(-tokens[0] // masks.block_size) * masks.num_heads
    return problem.num_images * rows, problem.num_images * pairs
