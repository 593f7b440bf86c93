"""The benchmark's own honesty: what it compares, what it counts, and that a wrong result cannot pass."""

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
from bsa_vision.bench import attention, correct, memory, models, report, ways
from bsa_vision.bench.attention import Options, num_steps, run_case
from bsa_vision.bench.case import Case, Inputs, logits_std, make_inputs, make_masks
from bsa_vision.bench.correct import NAMES, Truth
from bsa_vision.bench.machine import describe_machine, free_memory
from bsa_vision.bench.models import ModelCase, run_model_case
from bsa_vision.bench.plot import plot_rows
from bsa_vision.cli import parse
from bsa_vision.masks import Pattern
from bsa_vision.measure.timing import Timing
from tests.helpers import fake_cudnn, fake_kernel
from tests.helpers import models as small_models

RANDOM = Pattern("random_blocks", sparsity=0.5)
NEAR = Pattern("local_window", radius=2)
# 13 x 20 = 260 tokens: neither square nor a multiple of the block size; wider than a tile, so that tile order is an order
SMALL = Case((13, 20), RANDOM, heads=3, head_dim=16, block_size=32)
EAGER = tuple(name for name in ways.WAYS if name != "flex" and name not in ways.FOR_GPUS)  # nothing to compile


def measured(case: Case, *wanted: str, rounds: int = 1) -> attention.Row:
    return run_case(case, Options(wanted or EAGER, rounds=rounds))


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
def test_every_way_agrees_with_the_definition(case):
    row = measured(case)
    assert {name: (m.status, m.reason) for name, m in row.measurements.items()} == {
        name: ("ok", "") for name in attention.ways_of(case, EAGER)
    }
    expected = NAMES[: (6 if case.rel_pos else 4) if case.backward else 1]
    assert tuple(row.measurements["ours"].errors) == expected
    assert row.checked == "every value"
    assert row.logits_std >= 1
    assert next(iter(row.measurements)) == "sdpa"  # what the others compare to


def test_flex_compiled_agrees():
    """Once, because compiling takes long: sizes that are no multiple of the block, per-head masks, tile order."""
    row = measured(replace(SMALL, pattern=RANDOM | NEAR, dense_heads=1), "flex", "ours")
    flex = row.measurements["flex"]
    assert (flex.status, flex.reason) == ("ok", "")
    assert flex.timing is not None
    assert flex.errors["out"].found < 1e-5


class TestByHand:
    """Peers that only a GPU runs, against their stand-ins."""

    CASE = Case(
        (12, 26), Pattern("local_window", radius=2), heads=2, head_dim=64, dtype="bfloat16", batch=2, order="raster"
    )

    @pytest.mark.parametrize("name", ["kernel", "cudnn"])
    def test_agrees(self, monkeypatch, name):
        for module, value in {**fake_kernel.make_modules(), **fake_cudnn.make_modules()}.items():
            monkeypatch.setitem(sys.modules, module, value)
        setup = ways.set_up(self.CASE)
        assert ways.WAYS[name].why_not(setup) == "it runs on CUDA"
        out = ways.WAYS[name].prepare(setup).run()[0].float()
        packed = setup.inputs.packed
        masks = bsa.HeadMasks(setup.masks.base_blockmask)
        expected = bsa.sparse_attention(packed.q, packed.k, packed.v, masks, backend="reference").float()
        assert torch.allclose(out, expected, atol=0.05)
        dense = F.scaled_dot_product_attention(packed.q, packed.k, packed.v).float()
        assert not torch.allclose(out, dense, atol=0.2)

    @pytest.mark.parametrize("kind", ["sdpa-flash", "sdpa-cudnn"])
    def test_kernels_of_torch(self, kind):
        assert ways.WAYS[kind].why_not(ways.set_up(self.CASE)) == "it runs on CUDA"
        if kind == "sdpa-flash":  # there is one for CPUs
            setup = ways.set_up(self.CASE)
            expected = F.scaled_dot_product_attention(setup.inputs.q, setup.inputs.k, setup.inputs.v)
            assert torch.equal(ways.WAYS[kind].prepare(setup).run()[0], expected)

    def test_reasons(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "block_sparse_attn", None)
        monkeypatch.setitem(sys.modules, "cudnn", None)
        assert "cannot be imported" in ways.WAYS["kernel"].why_not(ways.set_up(self.CASE))
        assert "its gradient" in ways.WAYS["cudnn"].why_not(ways.set_up(replace(self.CASE, backward=True)))
        rel_pos = ways.set_up(replace(self.CASE, rel_pos=True))
        assert ways.WAYS["kernel"].why_not(rel_pos) == "it adds no relative position"

    @pytest.mark.parametrize(("seconds", "expected"), [(1e-4, {"sdpa", "flex"}), (1e-2, set())])
    def test_short_calls_are_timed_as_graphs(self, monkeypatch, seconds, expected):
        """Those that can be captured; the others as they are."""
        timed = []

        def paired(runs, rounds, **options):
            timed.append(dict(runs))
            return {name: Timing((seconds,), (1.0,)) for name in runs}

        monkeypatch.setattr(attention, "paired", paired)
        monkeypatch.setattr(attention, "graphed", lambda run, device: None if run == "ours" else f"replay of {run}")
        runs, as_graphs = {name: name for name in ("sdpa", "ours", "flex")}, set()
        attention._time(runs, 3, lambda what: None, torch.device("cuda"), as_graphs)
        assert as_graphs == expected
        assert timed[-1] == {name: f"replay of {name}" if name in expected else name for name in runs}
        assert runs["sdpa"] == "sdpa"
        attention._time(runs, 3, lambda what: None, torch.device("cpu"), as_graphs := set())
        assert as_graphs == set()

    def test_only_on_gpus(self):
        assert not set(ways.FOR_GPUS) & set(attention.ways_of(self.CASE, None))
        assert set(ways.FOR_GPUS) < set(attention.ways_of(replace(self.CASE, device="cuda"), None))

    def test_asked_for_elsewhere(self):
        """What was named is not passed over without a word."""
        found = measured(SMALL, "sdpa-cudnn").measurements["sdpa-cudnn"]
        assert (found.status, found.reason) == ("not run", "it runs on CUDA")


class TestWrongResults:
    """Twins of the agreement above: the same check, something spoiled."""

    def spoil(self, monkeypatch, change):
        real = ways.sparse_attention
        monkeypatch.setattr(ways, "sparse_attention", lambda q, k, v, hm, **how: change(real, q, k, v, hm, **how))

    @pytest.mark.parametrize("case", [SMALL, replace(SMALL, dtype="bfloat16")], ids=["float32", "bfloat16"])
    def test_dropping_the_mask(self, monkeypatch, case):
        self.spoil(monkeypatch, lambda real, q, k, v, hm, **how: F.scaled_dot_product_attention(q, k, v))
        row = measured(case, "ours", "sdpa-mask")
        assert row.measurements["ours"].status == "wrong"
        assert "out is off by" in row.measurements["ours"].reason
        assert row.measurements["sdpa-mask"].status == "ok"
        assert not row.ok

    def test_one_wrong_value(self, monkeypatch):
        def change(real, *args, **how):
            out = real(*args, **how)
            out[0, 1, 200, 3] += 1e-3
            return out

        self.spoil(monkeypatch, change)
        assert measured(SMALL, "ours").measurements["ours"].status == "wrong"

    def test_nan(self, monkeypatch):
        self.spoil(monkeypatch, lambda real, *args, **how: real(*args, **how) * math.nan)
        row = measured(SMALL, "ours")
        assert row.measurements["ours"].status == "wrong"
        assert json.loads(
            json.dumps(report.to_json("attention", [row], describe_machine(["cpu"]), "", 1), allow_nan=False)
        )

    def test_a_wrong_gradient(self, monkeypatch):
        self.spoil(
            monkeypatch, lambda real, q, k, v, hm, **how: real(q, k, v * 1.0 + (v.detach() - v) * 0.01, hm, **how)
        )
        row = measured(replace(SMALL, backward=True), "ours")
        assert row.measurements["ours"].reason.startswith("dv is off by")

    def test_forgetting_token_order(self, monkeypatch):
        """Packed results taken for results in model order."""
        real = ways._sdpa_mask
        wrong = ways.WAYS["sdpa-mask"]._replace(prepare=lambda setup: replace(real(setup), packed=False))
        monkeypatch.setitem(ways.WAYS, "sdpa-mask", wrong)
        assert measured(replace(SMALL, pattern=NEAR), "sdpa-mask").measurements["sdpa-mask"].status == "wrong"

    def test_a_broken_ours_is_a_failure_and_a_broken_peer_is_not(self, monkeypatch):
        def explode(*args, **how):
            raise RuntimeError("\n  no such\nkernel")

        self.spoil(monkeypatch, explode)
        monkeypatch.setattr(ways.F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
        broken = ways.WAYS["sdpa-mask"]._replace(prepare=explode)
        monkeypatch.setitem(ways.WAYS, "sdpa-mask", broken)
        row = measured(SMALL, "ours", "sdpa-mask")
        assert row.measurements["ours"].status == "failed"
        assert row.measurements["sdpa-mask"].status == "not run"
        assert row.measurements["ours"].reason == row.measurements["sdpa-mask"].reason == "RuntimeError: no such"
        assert row.measurements["sdpa"].timing is not None


class TestSample:
    """Where not everything can be checked, a part is, by the same code."""

    def test_forward(self, monkeypatch):
        whole = Truth(ways.set_up(SMALL)).expected(masked=True, biased=False)["out"]
        monkeypatch.setattr(correct, "WHOLE", 4 * 2 * (3 * 32 * 260))
        monkeypatch.setattr(correct, "AT_ONCE", 32 * 260)  # one block at a time
        truth = Truth(ways.set_up(SMALL))
        assert truth.sample.blocks == (0, 8)
        assert str(truth.sample) == "36 of 260 queries, 3 of 3 heads"
        rows = [*range(32), *range(256, 260)]
        torch.testing.assert_close(truth.expected(masked=True, biased=False)["out"], whole[:, :, rows])
        assert measured(replace(SMALL, pattern=NEAR)).ok

    def test_backward(self, monkeypatch):
        monkeypatch.setattr(correct, "WHOLE", 1000)
        monkeypatch.setattr(correct, "AT_ONCE", 3 * 32 * 260)
        row = measured(replace(SMALL, pattern=NEAR, backward=True, rel_pos=True))
        assert row.ok
        assert row.checked == "260 of 260 queries, 1 of 3 heads"


class TestCase:
    def test_json_round_trip(self):
        case = replace(SMALL, pattern=RANDOM | NEAR, rel_pos=True)
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case

    def test_inputs_are_the_same_in_every_process(self):
        first, second = make_inputs(SMALL), make_inputs(SMALL)
        assert torch.equal(first.q, second.q)
        assert not torch.equal(first.q, make_inputs(replace(SMALL, seed=1)).q)

    def test_packed_inputs(self):
        inputs = make_inputs(replace(SMALL, rel_pos=True, backward=True))
        order = inputs.layout.permutation
        assert not inputs.layout.is_identity
        for name in ("q", "k", "v", "grad"):
            assert torch.equal(getattr(inputs.packed, name), getattr(inputs, name)[:, :, order])
        assert torch.equal(inputs.packed.rel_pos.rel_w, inputs.rel_pos.rel_w[:, :, order])

    def test_logits_are_wide(self):
        inputs = make_inputs(SMALL)
        logits = inputs.q @ inputs.k.transpose(2, 3) * inputs.scale
        assert logits_std(inputs) == pytest.approx(logits.std().item(), rel=1e-2)  # 260 queries, 256 of them sampled
        narrow = Inputs(inputs.layout, inputs.q / 4, inputs.k, inputs.v, None, None)
        assert logits_std(narrow) < 1 < logits_std(inputs)

    def test_heads_draw_their_own_random_blocks(self):
        blocks = make_masks(replace(SMALL, dense_heads=1)).block_mask(260, 260)[0]
        assert blocks[0].all()
        assert not torch.equal(blocks[1], blocks[2])


class TestRow:
    def test_counts_what_was_kept(self):
        case = replace(SMALL, dense_heads=1)
        row = measured(case, "ours")
        kept = make_masks(case).block_mask(260, 260).double().mean((0, 2, 3))
        assert row.head_density == pytest.approx(kept.tolist())
        assert row.density == pytest.approx(kept.mean().item())
        assert row.density > 0.6  # not the 0.5 that was asked for: one head is dense, and rows keep whole blocks
        assert row.num_blocks == 9

    def test_steps_are_announced(self):
        for wanted in (EAGER, ("ours",)):
            steps: list[str] = []
            options = Options(wanted, rounds=3)
            run_case(SMALL, options, steps.append)
            assert len(steps) == num_steps(SMALL, options)

    def test_slow_peers_run_fewer_rounds_and_ours_all(self, monkeypatch):
        monkeypatch.setattr(attention, "SLOW", 0.0)  # everything is slow
        row = run_case(SMALL, Options(EAGER, rounds=4))
        rounds = {name: len(m.timing.seconds) for name, m in row.measurements.items()}
        assert rounds == {"sdpa": 2, "ours": 4, "sdpa-mask": 2} or rounds == {"sdpa": 4, "ours": 4, "sdpa-mask": 2}

    def test_json_holds_the_raw_numbers(self):
        row = measured(SMALL, rounds=3)
        data = json.loads(json.dumps(report.to_json("attention", [row], describe_machine(["cpu"]), "x", 2)))
        assert (data["format"], data["version"], data["complete"], data["ok"]) == ("bsa-vision/bench", 1, False, True)
        found = data["rows"][0]
        assert Case.from_json(found["case"]) == SMALL
        dense, ours = found["ways"]["sdpa"]["timing"], found["ways"]["ours"]["timing"]
        ratios = [a / b for a, b in zip(ours["seconds"], dense["seconds"], strict=True)]
        assert ours["ratios"] == pytest.approx(ratios)
        assert ours["ratio"] == pytest.approx(sorted(ratios)[1])
        assert ours["spread"] == pytest.approx([min(ratios), max(ratios)])
        assert found["ways"]["ours"]["backend"].partition(",")[0] in bsa.backends.BACKENDS
        assert data["machine"]["versions"]["torch"] == torch.__version__


class TestNotRun:
    def reason(self, case: Case, way: str, **options) -> str:
        row = run_case(case, Options((way,), rounds=1, **options))
        assert row.measurements[way].status == "not run"
        assert row.measurements[way].timing is None
        assert row.ok  # not being able to run is no wrong result
        return row.measurements[way].reason

    def test_flex_backward_on_the_cpu(self):
        assert self.reason(replace(SMALL, backward=True), "flex") == "FlexAttention has no backward on the CPU"

    def test_a_mask_too_large(self, monkeypatch):
        monkeypatch.setattr(ways, "free_memory", lambda device: 1_000_000)
        reason = self.reason(SMALL, "sdpa-mask")
        assert reason == "the mask would need 0.0 GB for 260 tokens, 0.0 GB are free"
        assert "the bias would need" in self.reason(replace(SMALL, rel_pos=True), "sdpa-bias")
        # One mask for all heads is a third of that, and fits.
        assert measured(replace(SMALL, pattern=NEAR), "sdpa-mask").measurements["sdpa-mask"].status == "ok"

    def test_a_named_backend(self):
        assert "backend='kernel' cannot run this call" in self.reason(SMALL, "ours", backend="kernel")

    def test_no_compiler(self, monkeypatch):
        def explode():
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

        monkeypatch.setattr(ways, "_flex_function", explode)
        assert "no working C++ compiler found" in self.reason(SMALL, "flex")


class TestMemory:
    def test_fresh_processes(self):
        case = Case((40, 40), RANDOM, heads=4, head_dim=16)
        row = run_case(case, Options(("ours", "sdpa-mask"), rounds=1, memory=True))
        found = {name: m.memory for name, m in row.measurements.items()}
        assert all(m.reason == "" and m.method for m in found.values())
        output, mask = 4 * 1600 * 16 * 4, 4 * 1600 * 1600
        assert found["sdpa-mask"].peak > mask  # bool; and torch's copy of it in float32
        assert output / 2 < found["ours"].peak < mask
        assert row.memory_ratio("ours") == found["ours"].peak / found["sdpa"].peak

    def test_a_process_that_fails_says_why(self):
        found = memory.measure_memory(replace(SMALL, device="nowhere"), "ours")
        assert found.peak is None
        assert found.reason.startswith("RuntimeError: Expected one of cpu, cuda")

    def test_free_memory(self):
        assert 0 < free_memory("cpu") < 1e14


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
        patterns = parse.with_density([Pattern("random_blocks"), NEAR, Pattern("nearest", sparsity=0.3)], [0.1, 1.0], 5)
        assert patterns == [
            Pattern("random_blocks", sparsity=0.9, seed=5),
            Pattern("random_blocks", sparsity=0.0, seed=5),
            NEAR,
            Pattern("nearest", sparsity=0.3),
        ]

    def test_order_follows_the_pattern(self):
        cases = parse.sweep(SMALL, {"pattern": [RANDOM, NEAR], "heads": [3, 4]}, "auto")
        assert [(case.order, case.heads) for case in cases] == [("raster", 3), ("raster", 4), ("tile", 3), ("tile", 4)]
        assert [case.order for case in parse.sweep(SMALL, {"pattern": [RANDOM]}, "tile")] == ["tile"]

    def test_grids(self):
        assert parse.items("64x64, 48x80,256", parse.grid) == [(64, 64), (48, 80), (16, 16)]
        assert parse.image_size("32") == (32, 32)
        assert parse.image_size("32x48") == (32, 48)

    @pytest.mark.parametrize(
        ("read", "text", "message"),
        [
            (parse.grid, "1000", "--tokens '1000': allowed are grids"),
            (parse.grid, "0x4", "--tokens '0x4'"),
            (parse.image_size, "3x4x5", "--image-size '3x4x5': allowed are pixels"),
            (parse.fraction("--density"), "1.5", "--density '1.5': allowed are fractions of the blocks, 0 to 1; write"),
            (parse.fraction("--density"), "nan", "--density 'nan'"),
            (parse.count("--heads"), "0", "--heads '0': allowed are whole numbers from 1; write"),
            (parse.dtype, "int8", "--dtype 'int8': allowed are float32, bfloat16, float16, float64; choose"),
            (parse.device, "abacus", "--device 'abacus': here there is cpu"),
            (parse.pattern, "stripes", "--pattern 'stripes': allowed are random, local, dense"),
            (parse.pattern, "window:14:7", "'7' has no name, and window takes size, shift; write name=value"),
            (parse.pattern, "dense:3", "'3' has no name, and dense takes nothing"),
            (
                parse.pattern,
                "local:size=3",
                "pattern 'local_window' has no parameter 'size': allowed are radius, metric",
            ),
        ],
    )
    def test_wrong_input(self, read, text, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(text)

    def test_too_many_dense_heads(self):
        with pytest.raises(ValueError, match="--dense-heads 4: there are 3 heads; give at most"):
            parse.sweep(replace(SMALL, dense_heads=4), {}, "auto")


class TestPlot:
    def test_points_are_the_counted_densities_and_wrong_ways_are_left_out(self, monkeypatch):
        rows = [measured(replace(SMALL, pattern=Pattern("random_blocks", sparsity=s)), "ours") for s in (0.8, 0.2)]
        figure = plot_rows(rows, "title", ["", ""])
        lines = {line.get_label(): line for line in figure.axes[0].lines}
        points = next(c for c in figure.axes[0].containers if c.get_label() == "ours").lines[0].get_xydata()
        assert points.tolist() == [[row.density, row.measurements["ours"].timing.ratio] for row in rows]
        ideal = lines["ideal: ratio = density"].get_xydata()
        assert (ideal[:, 0] == ideal[:, 1]).all()
        wrong = replace(rows[0], measurements={**rows[0].measurements})
        wrong.measurements["ours"] = replace(wrong.measurements["ours"], status="wrong")
        assert not plot_rows([wrong], "title", [""]).axes[0].containers

    def test_a_panel_per_label(self):
        row = measured(SMALL, "ours")
        labels = report.labels([row.case, replace(row.case, heads=4)])
        assert labels == ["3 heads", "4 heads"]
        figure = plot_rows([row, row], "title", labels)
        assert [axes.get_title() for axes in figure.axes] == labels


class TestModels:
    case = ModelCase("tests.models:vit", (64, 96), NEAR, dense_heads=1, block_size=16)

    @pytest.fixture(autouse=True)
    def far_from_uniform(self, monkeypatch):
        """The factories of tests.models, with weights redrawn: fresh ones would make any mask look harmless."""
        monkeypatch.setattr(models, "_from_factory", lambda path: small_models.make(path.rpartition(":")[2]))

    @pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3"])
    def test_checks_and_times(self, name):
        steps: list[str] = []
        row = run_model_case(replace(self.case, model=f"tests.models:{name}"), rounds=2, on_step=steps.append)
        assert (row.status, row.reason) == ("ok", "")
        assert row.spec.grid == (8, 12)
        assert row.tokens == 96 + small_models.START[name]
        assert row.dense_plan == 0
        assert row.restored
        assert row.error.ok
        assert row.reference == "reference"
        assert row.difference > 10 * row.error.allowed  # these masks matter, so the check could see a missing one
        assert len(row.timings["sparse"].seconds) == 2
        assert len(steps) == models.num_model_steps(2)
        model = small_models.make(name)
        plan = bsa.uniform_plan(bsa.inspect(model, (64, 96)), NEAR, dense_heads=1, block_size=16)
        assert row.density == pytest.approx(1 - plan.sparsity(plan.layout(bsa.inspect(model, (64, 96)))))

    def test_a_model_without_its_masks_is_caught(self, monkeypatch):
        real = models.adapters.sparsify_
        monkeypatch.setattr(
            models.adapters,
            "sparsify_",
            lambda model, plan, backend="auto": real(
                model, plan if backend == "reference" else bsa.dense_plan(model), backend
            ),
        )
        row = run_model_case(self.case, rounds=1)
        assert row.status == "wrong"
        assert "the sparse features are off by" in row.reason
        assert not row.ok

    def test_a_dense_plan_that_changes_something_is_caught(self, monkeypatch):
        monkeypatch.setattr(models, "_dense_plan", lambda model, pixels, original: (1e-7, 0.0, True))
        assert "a plan of dense heads changed the features" in run_model_case(self.case, rounds=1).reason

    def test_sam(self, monkeypatch):
        """Its dense layers run here, so a dense plan is as exact as arithmetic is, not equal to the bit."""
        small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_dim=48, window_size=5)
        small |= dict(global_attn_indexes=[1], output_channels=16)
        monkeypatch.setitem(models.BUILT_IN, "sam", ("SamVisionConfig", "SamVisionModel", 8, small))
        case = ModelCase("sam", (96, 96), NEAR, block_size=16)
        row = run_model_case(case, rounds=1)
        assert (row.status, row.reason) == ("ok", "")
        assert 0 < row.dense_plan < 1e-4
        assert row.difference > 10 * row.error.allowed
        with pytest.raises(ValueError, match="96x64 with --model sam: allowed are square images"):
            run_model_case(replace(case, image_size=(96, 64)), rounds=1)

    def test_what_does_not_fit_is_said(self, monkeypatch):
        monkeypatch.setattr(models, "free_memory", lambda device: 4 * 97 * 97 * 8 * 5)
        assert run_model_case(replace(self.case, image_size=(64, 64)), rounds=1).reference == "sdpa"
        monkeypatch.setattr(models, "free_memory", lambda device: 10)
        row = run_model_case(self.case, rounds=1)
        assert row.error is None
        assert row.reference.startswith("not checked")

    def test_a_named_backend_that_cannot(self):
        row = run_model_case(self.case, backend="kernel", rounds=1)
        assert row.status == "not run"
        assert "kernel" in row.reason

    def test_built_in_weights_are_drawn_wide(self, monkeypatch):
        monkeypatch.setattr(models, "BASE", {})
        tiny = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96)
        monkeypatch.setitem(models.BUILT_IN, "vit", ("ViTConfig", "ViTModel", 8, tiny))
        model = models.build_model(ModelCase("vit", (64, 64), NEAR))
        logits = small_models.attention_logits(model, small_models.image())
        assert min(one.std().item() for one in logits) >= 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("vitt", "allowed are vit, dinov2, dinov3, sam and package.module:factory; choose"),
        ("tests.models:nothing", "gave AttributeError"),
        ("no_such_package.module:factory", "gave ModuleNotFoundError"),
        ("builtins:dict", "returned a dict: allowed is a torch.nn.Module"),
    ],
)
def test_factories_that_do_not_work(path, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.build_model(ModelCase(path, (64, 64), NEAR))
