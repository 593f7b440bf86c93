"""`bsa_vision.bench`: what it compares and counts, and that it detects wrong results."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import bsa_vision as bsa
from bsa_vision.attention.backends.select import BACKENDS
from bsa_vision.bench import attention, models, reference, report
from bsa_vision.bench import implementations as peers
from bsa_vision.bench.attention import run_case
from bsa_vision.bench.case import Case, make_inputs, make_masks
from bsa_vision.bench.implementations import FOR_GPUS, IMPLEMENTATIONS
from bsa_vision.bench.models import ModelCase
from bsa_vision.bench.plot import plot_rows
from bsa_vision.bench.reference import NAMES, Reference, checked_heads
from bsa_vision.cli import parse
from bsa_vision.masks import Pattern
from bsa_vision.measure import timing
from bsa_vision.storage import machine
from tests.helpers import fake_cudnn, fake_kernel

RANDOM = Pattern("random_blocks", sparsity=0.5)
NEAR = Pattern("local_window", radius=2)
# 13 x 20 = 260 tokens: not square, no multiple of the block size, and wider than a tile
SMALL = Case((13, 20), RANDOM, heads=3, head_dim=16, block_size=32)
EAGER = ("sdpa", "bsa", "sdpa-mask")  # nothing to compile


def measured(case: Case, *wanted: str, rounds: int = 1) -> attention.Row:
    return run_case(case, wanted or EAGER, rounds)


CASES = {
    "random": SMALL,
    "tile order": replace(SMALL, pattern=NEAR, batch=2),
    "bfloat16": replace(SMALL, dtype="bfloat16"),
    "float16": replace(SMALL, dtype="float16", order="raster"),
    "dense heads": replace(SMALL, dense_heads=2),
    "all heads dense": replace(SMALL, dense_heads=3),
    "rel-pos": replace(SMALL, rel_pos=True),
    "backward": replace(SMALL, pattern=NEAR, backward=True),
    "rel-pos backward": replace(SMALL, pattern=NEAR, backward=True, rel_pos=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_implementation_matches_the_reference(case):
    row = measured(case)
    found = {name: (m.status, m.reason) for name, m in row.implementations.items()}
    masked = ("not run", "it does not support relative position") if case.rel_pos else ("ok", "")
    assert found == {"sdpa": ("ok", ""), "bsa": ("ok", ""), "sdpa-mask": masked}
    expected = NAMES[: (6 if case.rel_pos else 4) if case.backward else 1]
    assert tuple(row.implementations["bsa"].errors) == expected
    assert row.checked == "all heads"
    assert next(iter(row.implementations)) == "sdpa"  # the baseline


@pytest.mark.slow
def test_compiled_flex_matches_the_reference():
    """Sizes are no multiple of the block size, masks differ by head, the order is tile."""
    row = measured(replace(SMALL, pattern=RANDOM | NEAR, dense_heads=1), "flex", "bsa")
    flex = row.implementations["flex"]
    assert (flex.status, flex.reason) == ("ok", "")
    assert flex.timing is not None
    assert flex.errors["out"].found < 1e-5


class TestForGPUs:
    """Implementations that run only on GPUs, tested with fakes."""

    CASE = replace(SMALL, grid=(12, 26), pattern=NEAR, head_dim=64, dtype="bfloat16", batch=2)
    CASE = replace(CASE, order="raster", block_size=128)

    @pytest.mark.parametrize("name", ["kernel", "cudnn"])
    def test_matches_the_reference(self, monkeypatch, name):
        for module, value in {**fake_kernel.make_modules(), **fake_cudnn.make_modules()}.items():
            monkeypatch.setitem(sys.modules, module, value)
        inputs = make_inputs(self.CASE)
        with pytest.raises(bsa.BackendUnavailable, match="it needs a CUDA device"):
            IMPLEMENTATIONS[name].prepare(inputs)
        monkeypatch.setattr(peers, "_check_gpu", lambda inputs: None)
        out = IMPLEMENTATIONS[name].prepare(inputs).run()[0].float()
        q, k, v = inputs.packed.tensors
        masks = bsa.HeadMasks(inputs.masks.base_blockmask)
        expected = bsa.sparse_attention(q, k, v, masks, backend="reference").float()
        assert torch.allclose(out, expected, atol=0.05)
        dense = F.scaled_dot_product_attention(q, k, v).float()
        assert not torch.allclose(out, dense, atol=0.2)

    def test_kernels_of_torch(self, monkeypatch):
        inputs = make_inputs(self.CASE)
        for name in ("sdpa-flash", "sdpa-cudnn"):
            with pytest.raises(bsa.BackendUnavailable, match="it needs a CUDA device"):
                IMPLEMENTATIONS[name].prepare(inputs)
        monkeypatch.setattr(peers, "_check_gpu", lambda inputs: None)
        out = IMPLEMENTATIONS["sdpa-flash"].prepare(inputs).run()[0]  # torch has a CPU version
        assert torch.equal(out, F.scaled_dot_product_attention(*inputs.tensors))

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("kernel", {}, "block_sparse_attn cannot be imported"),
            ("cudnn", {}, "cudnn.block_sparse_attention cannot be imported"),
            ("kernel", {"rel_pos": True}, "it does not support relative position"),
        ],
    )
    def test_reasons(self, monkeypatch, name, change, message):
        monkeypatch.setattr(peers, "_check_gpu", lambda inputs: None)
        monkeypatch.setitem(sys.modules, "block_sparse_attn", None)
        monkeypatch.setitem(sys.modules, "cudnn", None)
        with pytest.raises(bsa.BackendUnavailable, match=message):
            IMPLEMENTATIONS[name].prepare(make_inputs(replace(self.CASE, **change)))

    @pytest.mark.parametrize(
        ("seconds", "expected"), [(1e-4, {"sdpa", "flex"}), (1e-2, set())], ids=["short", "long"]
    )
    def test_short_calls_are_timed_as_graphs(self, monkeypatch, seconds, expected):
        """Calls that cannot be captured are timed directly."""
        timed = []

        def paired(runs, rounds, **options):
            timed.append(dict(runs))
            return {name: timing.Timing((seconds,), (1.0,)) for name in runs}

        def graphed(run, device):
            return None if run == "bsa" else f"replay of {run}"

        monkeypatch.setattr(timing, "paired", paired)
        monkeypatch.setattr(timing, "graphed", graphed)
        runs = {name: name for name in ("sdpa", "bsa", "flex")}
        _, graphs = timing.paired_graphs(runs, 3, torch.device("cuda"))
        assert graphs == expected
        names = {name: f"replay of {name}" if name in expected else name for name in runs}
        assert timed[-1] == names
        assert timing.paired_graphs(runs, 3, torch.device("cpu"))[1] == set()

    def test_only_on_gpus(self):
        assert not set(FOR_GPUS) & set(attention.selected(self.CASE, None))
        assert set(FOR_GPUS) < set(attention.selected(replace(self.CASE, device="cuda"), None))

    def test_named_on_a_cpu(self):
        """A named implementation that cannot run is reported."""
        found = measured(SMALL, "sdpa-cudnn").implementations["sdpa-cudnn"]
        assert (found.status, found.reason) == ("not run", "it needs a CUDA device")


class TestWrongResults:
    """The checks above fail if a result is changed."""

    def replace_bsa(self, monkeypatch, change):
        real = peers.sparse_attention

        def changed(q, k, v, masks, **how):
            return change(real, q, k, v, masks, **how)

        monkeypatch.setattr(peers, "sparse_attention", changed)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_dropping_the_mask(self, monkeypatch, dtype):
        self.replace_bsa(
            monkeypatch, lambda real, q, k, v, *_, **__: F.scaled_dot_product_attention(q, k, v)
        )
        row = measured(replace(SMALL, dtype=dtype))
        assert row.implementations["bsa"].status == "wrong"
        assert "error of out / allowed: " in row.implementations["bsa"].reason
        assert row.implementations["sdpa-mask"].status == "ok"
        assert not row.ok

    def test_one_wrong_value(self, monkeypatch):
        def change(real, *args, **how):
            out = real(*args, **how)
            out[0, 1, 200, 3] += 1e-3
            return out

        self.replace_bsa(monkeypatch, change)
        assert measured(SMALL, "bsa").implementations["bsa"].status == "wrong"

    def test_nan(self, monkeypatch):
        self.replace_bsa(monkeypatch, lambda real, *args, **how: real(*args, **how) * math.nan)
        row = measured(SMALL, "bsa")
        assert row.implementations["bsa"].status == "wrong"
        data = report.to_json("attention", [row], machine.describe(), "", 1)
        assert json.dumps(data, allow_nan=False)
        assert "nan" in report.table([row])[2]

    def test_a_wrong_gradient(self, monkeypatch):
        def change(real, q, k, v, masks, **how):
            return real(q, k, v + (v.detach() - v) * 0.01, masks, **how)

        self.replace_bsa(monkeypatch, change)
        row = measured(replace(SMALL, backward=True), "bsa")
        assert row.implementations["bsa"].reason.startswith("error of dv / allowed: ")

    def test_forgetting_token_order(self, monkeypatch):
        """Results in packed order are compared as if they were in model order."""
        real = IMPLEMENTATIONS["sdpa-mask"]

        def prepare(inputs):
            return replace(real.prepare(inputs), inputs=inputs)

        monkeypatch.setitem(IMPLEMENTATIONS, "sdpa-mask", real._replace(prepare=prepare))
        row = measured(replace(SMALL, pattern=NEAR), "sdpa-mask")
        assert row.implementations["sdpa-mask"].status == "wrong"

    def test_errors_fail_bsa_but_not_its_peers(self, monkeypatch):
        def explode(*args, **how):
            raise RuntimeError("\n  no such\nkernel")

        self.replace_bsa(monkeypatch, explode)
        broken = IMPLEMENTATIONS["sdpa-mask"]._replace(prepare=explode)
        monkeypatch.setitem(IMPLEMENTATIONS, "sdpa-mask", broken)
        found = measured(SMALL).implementations
        assert (found["bsa"].status, found["sdpa-mask"].status) == ("failed", "not run")
        assert found["bsa"].reason == found["sdpa-mask"].reason == "RuntimeError: no such"
        assert found["sdpa"].timing is not None


class TestReference:
    def test_large_cases_are_checked_partly_or_not_at_all_and_say_so(self, monkeypatch):
        assert len(checked_heads(Case((64, 64), RANDOM, heads=12))) == 12
        assert len(checked_heads(Case((64, 64), RANDOM, heads=12, batch=4))) == 4
        assert checked_heads(Case((128, 128), RANDOM)) == ()
        monkeypatch.setattr(reference, "ALL_HEADS", 260**2)
        whole = measured(SMALL, "bsa").checked
        assert whole == "1 of 3 heads"
        assert Reference(make_inputs(replace(SMALL, dense_heads=2))).heads == (2,)  # the sparse one
        monkeypatch.setattr(reference, "ONE_HEAD", 1000)
        row = measured(SMALL, "bsa")
        assert (row.checked, row.ok) == ("NOTHING, 260 tokens are too many", True)
        assert any("NOTHING" in note for note in report.notes([row], 1))


class TestCase:
    def test_inputs_are_the_same_in_every_process(self):
        first, second = make_inputs(SMALL), make_inputs(SMALL)
        assert torch.equal(first.q, second.q)
        assert not torch.equal(first.q, make_inputs(replace(SMALL, seed=1)).q)

    def test_packed_inputs(self):
        inputs = make_inputs(replace(SMALL, rel_pos=True, backward=True))
        order = inputs.case.layout.permutation
        assert not inputs.case.layout.is_identity
        own = (*inputs.tensors, inputs.grad)
        for tensor, packed in zip(own, (*inputs.packed.tensors, inputs.packed.grad), strict=True):
            assert torch.equal(packed, tensor[:, :, order])

    def test_logits_are_wide(self):
        inputs = make_inputs(SMALL)
        q, k, _ = inputs.tensors
        assert (q @ k.transpose(2, 3) * SMALL.head_dim**-0.5).std() > 1.5

    def test_heads_draw_their_own_random_blocks(self):
        blocks = make_masks(replace(SMALL, dense_heads=1)).block_mask(260, 260)[0]
        assert blocks[0].all()
        assert not torch.equal(blocks[1], blocks[2])


class TestRow:
    def test_density_is_that_of_the_masks(self):
        case = replace(SMALL, dense_heads=1)
        kept = make_masks(case).block_mask(260, 260).double().mean()
        assert measured(case, "bsa").density == pytest.approx(kept.item())
        assert kept > 0.6  # above the 0.5 of the pattern: one head is dense

    def test_json_holds_the_raw_numbers(self):
        row = measured(SMALL, rounds=3)
        data = json.loads(
            json.dumps(report.to_json("attention", [row], machine.describe(), "x", 2))
        )
        assert data["format"] == "bsa-vision/bench"
        assert (data["complete"], data["ok"]) == (False, True)
        found = data["rows"][0]
        assert found["case"]["grid"] == [13, 20]
        assert Pattern.from_spec(found["case"]["pattern"]) == SMALL.pattern
        dense, own = (found["implementations"][name]["timing"] for name in ("sdpa", "bsa"))
        ratios = [a / b for a, b in zip(own["seconds"], dense["seconds"], strict=True)]
        assert own["ratios"] == pytest.approx(ratios)
        assert own["ratio"] == pytest.approx(sorted(ratios)[1])
        assert own["spread"] == pytest.approx([min(ratios), max(ratios)])
        backend = found["implementations"]["bsa"]["backend"].partition(",")[0]
        assert backend in BACKENDS
        assert data["machine"]["torch_version"] == torch.__version__

    def test_table(self):
        row = measured(SMALL, rounds=3)
        titles, _, line = report.table([row])
        assert titles.split("  ")[0] == "pattern"
        ratio = row.implementations["bsa"].timing.ratio
        assert f"{ratio:.3f} (" in line
        assert " ms" in line


class TestNotRun:
    def reason(self, case: Case, name: str) -> str:
        row = run_case(case, (name,), 1)
        assert row.implementations[name].status == "not run"
        assert row.implementations[name].timing is None
        assert row.ok  # "not run" is not a wrong result
        return row.implementations[name].reason

    def test_flex_backward_on_the_cpu(self):
        reason = self.reason(replace(SMALL, backward=True), "flex")
        assert reason == "FlexAttention has no backward on the CPU"

    def test_mask_too_large_for_memory(self, monkeypatch):
        monkeypatch.setattr(peers, "free_memory", lambda device: 1_000_000)
        expected = "the N x N mask would need 0.0 GB for 260 tokens, 0.0 GB are free"
        assert self.reason(SMALL, "sdpa-mask") == expected
        # One mask for all heads takes a third of that, and fits.
        row = measured(replace(SMALL, pattern=NEAR), "sdpa-mask")
        assert row.implementations["sdpa-mask"].status == "ok"

    def test_a_named_backend(self):
        reason = self.reason(replace(SMALL, backend="kernel"), "bsa")
        assert "backend='kernel' cannot run this call" in reason

    def test_no_compiler(self, monkeypatch):
        def explode(*args, **options):
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

        monkeypatch.setattr(torch, "compile", explode)
        assert "no working C++ compiler found" in self.reason(SMALL, "flex")


def test_free_memory():
    assert 0 < machine.free_memory("cpu") < 1e14


class TestParse:
    @pytest.mark.parametrize(
        ("text", "pattern"),
        [
            ("random", Pattern("random_blocks")),
            ("local:8", Pattern("local_window", radius=8)),
            ("window:14:shift=7", Pattern("window", size=14, shift=7)),
            ("nearest:0.25:metric=l1", Pattern("nearest", sparsity=0.25, metric="l1")),
            ("region:10x20+3x4:radius=2", Pattern("region", centers=[(10, 20), (3, 4)], radius=2)),
            ("dense", Pattern("dense")),
        ],
    )
    def test_patterns(self, text, pattern):
        assert parse.pattern(text) == pattern

    def test_density(self):
        assert parse.with_density(Pattern("random_blocks"), [0.1, 1.0], 5) == [
            Pattern("random_blocks", sparsity=0.9, seed=5),
            Pattern("random_blocks", sparsity=0.0, seed=5),
        ]
        for pattern in (NEAR, Pattern("nearest", sparsity=0.3)):
            assert parse.with_density(pattern, [0.1, 1.0], 5) == [pattern]

    def test_order_follows_the_pattern(self):
        assert parse.order_for(RANDOM, "auto") == "raster"
        assert parse.order_for(NEAR, "auto") == "tile"
        assert parse.order_for(RANDOM, "tile") == "tile"

    def test_grids(self):
        grids = [parse.grid(text) for text in ("64x64", "48x80", "256")]
        assert grids == [(64, 64), (48, 80), (16, 16)]
        assert parse.image_size("32") == (32, 32)
        assert parse.image_size("32x48") == (32, 48)

    @pytest.mark.parametrize(
        ("read", "text", "message"),
        [
            (parse.grid, "1000", "--tokens '1000': allowed are grids"),
            (parse.grid, "0x4", "--tokens '0x4'"),
            (parse.image_size, "3x4x5", "--image-size '3x4x5': allowed are pixels"),
            (parse.device, "abacus", "--device 'abacus': allowed are cpu"),
            (parse.pattern, "stripes", "--pattern 'stripes': allowed are random, local, dense"),
            (parse.pattern, "window:14:7", "'7' has no name, and window takes size, shift; write"),
            (parse.pattern, "dense:3", "'3' has no name, and dense takes nothing"),
            (parse.pattern, "local:size=3", "'local_window' has no parameter 'size'"),
        ],
    )
    def test_wrong_input(self, read, text, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(text)


def test_plot_shows_realised_densities_and_no_wrong_results():
    patterns = [Pattern("random_blocks", sparsity=sparsity) for sparsity in (0.8, 0.2)]
    rows = [measured(replace(SMALL, pattern=pattern), "bsa") for pattern in patterns]
    (axes,) = plot_rows(rows, "title").axes
    (points,) = (each for each in axes.containers if each.get_label() == "bsa-vision")
    expected = [[row.density, row.implementations["bsa"].timing.ratio] for row in rows]
    assert points.lines[0].get_xydata().tolist() == expected
    (ideal,) = (line.get_xydata() for line in axes.lines if line.get_label().startswith("ideal"))
    assert (ideal[:, 0] == ideal[:, 1]).all()
    bad = replace(rows[0].implementations["bsa"], status="wrong")
    wrong = replace(rows[0], implementations={**rows[0].implementations, "bsa": bad})
    assert not plot_rows([wrong], "title").axes[0].containers


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("vitt", "allowed are vit, dinov2, dinov3, sam and package.module:factory"),
        ("no_such_package.module:factory", "gave ModuleNotFoundError"),
        ("tests.helpers.models:nothing", "gave AttributeError"),
        ("builtins:dict", "returned a dict: allowed is a torch.nn.Module"),
    ],
)
def test_factories_that_fail(path, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.build_model(ModelCase(path, NEAR))
