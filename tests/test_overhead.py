"""A warm call does little in Python: what is known of masks is looked up, not laid out again."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import bsa_vision as bsa
from bsa_vision.masks import Pattern, TokenLayout
from tests.helpers import models, sam_models

PACKAGE = Path(bsa.__file__).parent


def calls_of(run) -> Counter[Path]:
    """Return the Python calls of `run` whose code lies in bsa_vision, by file."""
    files: Counter[Path] = Counter()

    def count(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            files[path.relative_to(PACKAGE)] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return files


def test_a_warm_call_crosses_few_functions_and_files():
    layout = TokenLayout((16, 16), num_prefix_tokens=1, order="tile", tile=(4, 8), block_size=32)
    window = Pattern("local_window", radius=2)
    head_masks = bsa.HeadMasks.from_patterns(layout, ["dense", window, window])
    q, k, v = (torch.randn(1, 3, layout.num_tokens, 32) for _ in range(3))

    def run():
        return bsa.sparse_attention(q, k, v, head_masks)

    first = calls_of(run)
    warm = calls_of(run)
    assert sum(warm.values()) <= 75, warm
    assert len(warm) <= 9, warm
    assert sum(first.values()) > sum(warm.values()) > 10  # the counter counts


@pytest.mark.parametrize(
    ("make", "image"),
    [(lambda: models.make("dinov3"), models.image), (sam_models.make, sam_models.image)],
    ids=["dinov3", "sam"],
)
def test_a_warm_forward_of_a_swapped_model_lays_nothing_out(make, image, monkeypatch):
    model, pixels = make(), image()
    bsa.sparsify_(model, bsa.uniform_plan(model, "local_window", radius=1, dense_heads=1))
    done: Counter[str] = Counter()
    checked, hashed = TokenLayout.__post_init__, Pattern.__hash__

    def post_init(self):
        done["layouts"] += 1
        checked(self)

    def pattern_hash(self):
        done["hashes"] += 1
        return hashed(self)

    monkeypatch.setattr(TokenLayout, "__post_init__", post_init)
    monkeypatch.setattr(Pattern, "__hash__", pattern_hash)
    with torch.no_grad():
        model(pixels)
        assert done["layouts"]
        assert done["hashes"]  # the counters count
        done.clear()
        model(pixels)
    assert not done
