"""The latency model, its cache, pruning with it, and what `describe` prints of it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import bsa_vision as bsa
from bsa_vision.attention.backends import measured_costs, self_test
from bsa_vision.attention.backends.measured_costs import Cost
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import BACKENDS, choose
from bsa_vision.masks import TokenLayout, local_window, stack_heads
from bsa_vision.measure.latency import Latency, measure
from bsa_vision.storage.machine_cache import cache_file
from tests.helpers.models import make


def latency_file():
    return cache_file("latency.json")


MODULE = sys.modules["bsa_vision.measure.latency"]
# A kept pair costs half a dense one; a call and each row of blocks add to it.
ROUND = Latency(
    "round numbers",
    dense_call=1e-3,
    dense_pair=1e-9,
    sparse_call=5e-3,
    sparse_row=1e-5,
    sparse_pair=0.5e-9,
    dense_in_loop=True,
)
SLOW = replace(ROUND, sparse_pair=2e-9, dense_in_loop=False)  # like an uncompiled loop


@pytest.mark.parametrize(
    "number", [float("nan"), -1.0, 0, float("inf"), True, "x", None, 10**400, [1.0]]
)
@pytest.mark.parametrize("field", ["dense_pair", "sparse_call"])
def test_entries_with_impossible_numbers_are_rejected(number, field):
    good = {name: value for name, value in asdict(ROUND).items() if name != "what"}
    assert MODULE._is_latency(good)
    assert not MODULE._is_latency({**good, field: number})
    assert not MODULE._is_latency({**good, "dense_in_loop": 1})
    assert not MODULE._is_latency({**good, "dense_pair": 0.0})


@pytest.mark.parametrize(
    "data", [b"[" * 200_000, b"\xff\xfe{}", b"", b"[]", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_damaged_cache_files_are_empty(data):
    latency_file().parent.mkdir(parents=True, exist_ok=True)
    latency_file().write_bytes(data)
    try:
        assert MODULE._read() == {}
    finally:
        latency_file().unlink()


class TestModel:
    def test_by_hand(self):
        base = torch.ones(1, 2, 4, 4, dtype=torch.bool)
        base[0, 0, :, 2:] = False
        masks = bsa.HeadMasks(base, [1, 1, 0])
        assert masks.kept_pairs(500, 500) == (500 * 256, 500 * 500, 500 * 500)
        heads = ROUND.of_heads(masks, 500)
        assert heads == pytest.approx(
            (4e-5 + 0.5e-9 * 128_000, 4e-5 + 0.5e-9 * 250_000, 0.5e-9 * 250_000)
        )
        assert ROUND.of_masks(masks, 500, images=3) == pytest.approx(5e-3 + 3 * sum(heads))
        assert SLOW.of_heads(masks, 500)[2] == pytest.approx(1e-9 * 250_000)

    def test_without_a_sparse_head_it_is_the_dense_call(self):
        seconds = ROUND.of_masks(bsa.HeadMasks(None, [0, 0]), 300)
        assert seconds == ROUND.dense(2, 300) == pytest.approx(1e-3 + 2e-9 * 90_000)

    @given(
        rows=st.integers(1, 400),
        columns=st.integers(1, 400),
        block=st.sampled_from([16, 40, 128]),
        seed=st.integers(0, 99),
    )
    def test_kept_pairs_are_those_of_the_token_mask(self, rows, columns, block, seed):
        generator = torch.Generator().manual_seed(seed)
        base = torch.rand(2, 2, -(-rows // block), -(-columns // block), generator=generator) < 0.5
        masks = bsa.HeadMasks(base, block_size=block, allow_empty_rows=True)
        dense = base.repeat_interleave(block, 2)[:, :, :rows]
        dense = dense.repeat_interleave(block, 3)[..., :columns]
        means = dense.double().sum((2, 3)).mean(0).tolist()
        assert all(abs(a - b) <= 0.5 for a, b in zip(masks.kept_pairs(rows, columns), means))

    @pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
    def test_break_even(self, density):
        """Sparse heads are faster at the break-even, and slower with one token less."""
        tokens = ROUND.break_even(12, density)

        def pays(count):
            head = 1e-5 * -(-count // 128) + 0.5e-9 * density * count**2
            return 5e-3 + 12 * head < ROUND.dense(12, count)

        assert pays(tokens)
        assert not pays(tokens - 1)

    def test_it_may_never_pay(self):
        assert SLOW.break_even(12, 0.6) is None
        assert SLOW.break_even(12, 0.4) is not None

    def test_more_images_pay_sooner(self):
        assert ROUND.break_even(12, 0.3, images=8) < ROUND.break_even(12, 0.3)


class TestMeasured:
    def test_constants_are_those_of_this_machine(self):
        before = torch.get_rng_state()
        measured = measure(head_dim=16)
        assert torch.equal(torch.get_rng_state(), before)  # measuring draws no random numbers
        assert "float32, head dim 16" in measured.what
        assert torch.__version__ in measured.what
        assert measured.dense_pair > 0
        assert measured.sparse_call > 0
        assert min(measured.sparse_row, measured.sparse_pair) >= 0
        # 2048 tokens cost more than 128: costs per call and per pair are separated.
        assert measured.dense(8, 2048) > measured.dense(8, 128)

    def test_measured_once(self, monkeypatch, tmp_path):
        monkeypatch.setenv("BSA_VISION_CACHE", str(tmp_path / "new"))
        monkeypatch.setattr(MODULE, "_known", {})
        calls = []
        what = MODULE.describe(64, torch.float32, torch.device("cpu"))
        monkeypatch.setattr(
            MODULE, "measure", lambda *a: calls.append(a) or replace(ROUND, what=what)
        )
        first = bsa.latency()
        assert bsa.latency() == first
        assert len(calls) == 1
        MODULE._known.clear()  # a new process
        assert bsa.latency() == first
        assert len(calls) == 1
        bsa.latency(anew=True)
        assert len(calls) == 2
        bsa.latency(head_dim=80)
        assert len(calls) == 3
        stored = json.loads(latency_file().read_text())
        assert stored[what]["dense_pair"] == 1e-9

    @pytest.mark.parametrize("content", ["", "[1]", '{"x": 3}', '{"x": {"dense_call": 1}}', "\x00"])
    def test_a_damaged_file_is_replaced(self, monkeypatch, tmp_path, content):
        monkeypatch.setenv("BSA_VISION_CACHE", str(tmp_path))
        monkeypatch.setattr(MODULE, "_known", {})
        monkeypatch.setattr(MODULE, "measure", lambda *a: ROUND)
        latency_file().write_text(content)
        assert bsa.latency() == ROUND
        assert len(json.loads(latency_file().read_text())) == 1

    def test_a_folder_that_cannot_be_written(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("BSA_VISION_CACHE", str(tmp_path / "file" / "folder"))
        monkeypatch.setattr(MODULE, "_known", {})
        monkeypatch.setattr(MODULE, "measure", lambda *a: ROUND)
        assert bsa.latency() == ROUND

    def test_a_user_without_a_home(self, monkeypatch):
        monkeypatch.delenv("BSA_VISION_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

        def no_home(path):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr("pathlib.Path.expanduser", no_home)
        monkeypatch.setattr(MODULE, "_known", {})
        monkeypatch.setattr(MODULE, "measure", lambda *a: ROUND)
        assert latency_file() is None
        assert bsa.latency() == ROUND

    def test_path_of_the_file(self, monkeypatch):
        monkeypatch.delenv("BSA_VISION_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert str(latency_file()) == "/somewhere/bsa-vision/latency.json"


ONES = {name: {"call": 1, "row": 0, "pair": 0} for name in ("flex", "kernel", "gather")}
SPOILT = [
    json.dumps({"WHAT": ONES}).replace("1", x, 1) for x in ("NaN", "-1", "true", "1" + "0" * 400)
]


class TestBackends:
    """Measured costs of the backends, by which `auto` chooses on GPUs."""

    @pytest.fixture(autouse=True)
    def empty_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("BSA_VISION_CACHE", str(tmp_path))
        monkeypatch.setattr(measured_costs, "_known", {})

    def test_measured_on_this_machine(self, monkeypatch):
        monkeypatch.setattr(MODULE, "LARGE", (16, 32))
        found = MODULE.measure_backends(32)
        plain, with_rel_pos = found.values()
        assert set(plain) == set(with_rel_pos) == {"gather"}  # the others skip no blocks
        costs = (*plain.values(), *with_rel_pos.values())
        assert all(cost.call > 0 and cost.row >= 0 and cost.pair >= 0 for cost in costs)
        assert plain != with_rel_pos
        what = measured_costs.describe(torch.device("cpu"), torch.float32, 32, False)
        monkeypatch.setattr(measured_costs, "_known", {})  # a new process
        assert measured_costs.known(what) == plain
        assert measured_costs.known(what.replace("32", "64")) == {}

    def problem(self, tokens, density, rel_pos=None):
        with FakeTensorMode():
            q = torch.empty(1, 2, tokens, 64, dtype=torch.bfloat16, device="cuda")
        blocks = tokens // 128
        mask = torch.zeros(1, 2, blocks, blocks, dtype=torch.bool)
        mask[..., : round(density * blocks)] = True
        return Problem(q, q, q, bsa.HeadMasks(mask), 0.125, rel_pos=rel_pos)

    def on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        for name in ("kernel", "flex"):
            monkeypatch.setattr(BACKENDS[name], "why_not", lambda problem: None)
        monkeypatch.setattr(BACKENDS["cudnn"], "why_not", lambda problem: "not installed")
        monkeypatch.setattr(self_test, "failure", lambda *call: None)
        return measured_costs.describe(torch.device("cuda"), torch.bfloat16, 64, False)

    def test_auto_takes_the_cheapest(self, monkeypatch):
        what = self.on_a_gpu(monkeypatch)
        # No costs are known, so the order of the table decides.
        assert choose(self.problem(1024, 0.5)) == "kernel"
        measured_costs.remember(
            what,
            {"kernel": Cost(1e-4, 0, 1e-11), "flex": Cost(2e-5, 0, 4e-11), "gather": Cost(1, 0, 0)},
        )
        assert choose(self.problem(256, 0.5)) == "flex"  # a cheap call
        assert choose(self.problem(8192, 0.5)) == "kernel"  # cheap pairs
        # 2 * 2048**2 * 3e-11 / 16 is less than the 8e-5 that a call of flex saves; half is more.
        assert choose(self.problem(2048, 1 / 16)) == "flex"
        assert choose(self.problem(2048, 0.5)) == "kernel"
        assert choose(self.problem(2048, 0.5), "gather") == "gather"

    def test_asked_once(self, monkeypatch):
        """Backends are asked once per kind of call, and again when measured costs change."""
        what, asked = self.on_a_gpu(monkeypatch), []
        monkeypatch.setattr(BACKENDS["kernel"], "why_not", lambda problem: asked.append(problem))
        problem = self.problem(1024, 0.5)
        assert [choose(problem) for _ in range(3)] == ["kernel"] * 3
        assert len(asked) == 1
        changes = {"scale": 0.0, "return_lse": True, "is_causal": True, "dropout_p": 0.1}
        for name, value in changes.items():
            choose(replace(problem, **{name: value}))
        assert len(asked) == 5
        costs = dict.fromkeys(("kernel", "gather"), Cost(1, 0, 0)) | {"flex": Cost(0, 0, 0)}
        measured_costs.remember(what, costs)
        assert choose(problem) == "flex"

    def test_backends_without_measurement_are_not_skipped(self, monkeypatch):
        """The order of the table decides until the costs of all backends are measured."""
        what = self.on_a_gpu(monkeypatch)
        measured_costs.remember(what, {"flex": Cost(1e-9, 0, 0), "gather": Cost(1, 0, 0)})
        assert choose(self.problem(1024, 0.5)) == "kernel"
        measured_costs.remember(what, {**measured_costs.known(what), "kernel": Cost(1, 0, 0)})
        assert choose(self.problem(1024, 0.5)) == "flex"

    def test_what_skips_nothing_is_no_candidate(self, monkeypatch):
        """Backends that compute all N x N pairs are not chosen, however cheap their calls are."""
        costs = dict.fromkeys(("kernel", "flex", "gather"), Cost(1, 1, 1)) | {"sdpa": Cost(0, 0, 0)}
        measured_costs.remember(self.on_a_gpu(monkeypatch), costs)
        assert choose(self.problem(1024, 0.5)) == "kernel"

    def test_backends_that_raise_are_left_out(self, monkeypatch):
        monkeypatch.setattr(MODULE, "LARGE", (16, 32))

        def explode(problem):
            raise RuntimeError("out of shared memory")

        monkeypatch.setattr(BACKENDS["flex"], "why_not", lambda problem: None)
        monkeypatch.setattr(BACKENDS["flex"], "run", explode)
        with pytest.warns(
            RuntimeWarning,
            match="'flex' failed while it was measured and is left out: RuntimeError: out of",
        ):
            found = MODULE.measure_backends(32)
        assert all(set(costs) == {"gather"} for costs in found.values())

    def test_relative_position_has_separate_costs(self, monkeypatch):
        measured_costs.remember(self.on_a_gpu(monkeypatch), {"flex": Cost(1e-9, 0, 0)})
        rel_pos = bsa.RelPos(torch.empty(0), torch.empty(0))
        assert choose(self.problem(1024, 0.5, rel_pos)) == "kernel"

    @pytest.mark.parametrize(
        "content",
        ["", "[]", '{"WHAT": 3}', '{"WHAT": {"flex": 1}}', '{"WHAT": {"flex": {"call": "x"}}}'],
    )
    def test_a_damaged_file(self, monkeypatch, tmp_path, content):
        what = self.on_a_gpu(monkeypatch)
        (tmp_path / "backends.json").write_text(content.replace("WHAT", what))
        assert choose(self.problem(1024, 0.5)) == "kernel"

    def test_on_a_cpu_nothing_is_asked(self, monkeypatch):
        monkeypatch.setattr(measured_costs, "cheapest", None)
        q = torch.zeros(1, 2, 256, 16)
        masks = bsa.HeadMasks(torch.eye(2, dtype=torch.bool).expand(1, 2, 2, 2))
        assert choose(Problem(q, q, q, masks, 1.0)) == "gather"


class TestPrune:
    def masks(self, radius):
        layout = TokenLayout((32, 32), order="tile")
        return bsa.HeadMasks(stack_heads([local_window(layout, radius)], 1), [1, 0], layout=layout)

    def test_heads_that_save_too_little(self):
        masks = self.masks(2)
        kept = masks.kept_pairs(1024, 1024)[0] / 1024**2
        assert 0.3 < kept < 0.8
        cheap = replace(ROUND, sparse_call=0.0, sparse_row=0.0)
        assert cheap.better_dense(masks, 1024, min_gain=0.99 * (1 - kept) / 2) == ()
        assert cheap.better_dense(masks, 1024, min_gain=1.01 * (1 - kept)) == (0,)

    def test_calls_that_save_too_little(self):
        """A head may save time while the call does not, because of the call's constant cost."""
        assert ROUND.better_dense(self.masks(2), 1024) == (0,)
        assert ROUND.better_dense(self.masks(2), 1024, images=64) == ()

    def test_a_plan(self):
        model = make("vit")
        spec = bsa.inspect(model)
        plan = bsa.uniform_plan(model, "local_window", radius=1, order="raster", block_size=4)
        plan = plan.replace(layers=[0], heads=[0], pattern="local_window", radius=99)
        free = replace(ROUND, sparse_call=0.0, sparse_row=0.0)
        pruned = bsa.prune(plan, spec, latency=free)
        assert pruned.layers["self.0"][0] == "dense"
        assert pruned.layers["self.0"][1:] == plan.layers["self.0"][1:]
        assert pruned.layers["self.1"] == plan.layers["self.1"]
        assert pruned.notes["pruned"]["made_dense"] == {"self.0": [0]}
        assert pruned.notes["pruned"]["for"] == "round numbers"
        assert plan.layers["self.0"][0] != "dense"  # plans are immutable
        never = bsa.prune(plan, spec, latency=SLOW)
        assert all(set(names) == {"dense"} for names in never.layers.values())
        assert never.patterns == {}

    def test_pruning_is_written_into_the_file_and_changes_no_forward(self, tmp_path):
        model = make("vit")
        spec = bsa.inspect(model)
        plan = bsa.uniform_plan(model, "local_window", radius=1, order="raster", block_size=4)
        pruned = bsa.prune(plan, spec, latency=SLOW)
        pruned.save(tmp_path / "plan.json")
        assert bsa.SparsityPlan.load(tmp_path / "plan.json") == pruned
        x = torch.randn(1, 3, *(side * patch for side, patch in zip(spec.grid, spec.patch_size)))
        with torch.no_grad():
            dense = model(x).last_hidden_state
            sparse = bsa.sparsify_(model, plan)(x).last_hidden_state
            bsa.restore_(model)
            after = bsa.sparsify_(model, pruned)(x).last_hidden_state
        assert (sparse - dense).abs().max() > 1e-3  # slow sparse heads still run sparse
        torch.testing.assert_close(after, dense)

    def test_errors(self):
        model = make("vit")
        plan, spec = bsa.dense_plan(model), bsa.inspect(model)
        with pytest.raises(
            TypeError, match=r"spec is a .*ViT.*: expected a ModelSpec; pass bsa.inspect"
        ):
            bsa.prune(plan, model, latency=ROUND)
        for wrong in (-0.1, 1, "much", True):
            message = r"min_gain=.*expected a fraction.*0 <= min_gain < 1"
            with pytest.raises(ValueError, match=message):
                bsa.prune(plan, spec, latency=ROUND, min_gain=wrong)
        for wrong in (0, -1, 1.5):
            message = r"images=.*number of images per call, an int >= 1"
            with pytest.raises(ValueError, match=message):
                bsa.prune(plan, spec, latency=ROUND, images=wrong)
        with pytest.raises(bsa.PlanError, match="another model"):
            bsa.prune(plan, replace(spec, family="other"), latency=ROUND)


class TestDescribe:
    def report(self, latency, **options):
        model = make("vit")
        plan = bsa.uniform_plan(
            model, "local_window", radius=1, order="raster", block_size=4, **options
        )
        return bsa.describe(bsa.sparsify_(model, plan), latency=latency)

    def test_expected_time(self):
        free = replace(ROUND, sparse_call=0.0, sparse_row=0.0)
        report = self.report(free)
        layer = report.layers[0]
        seconds = free.of_masks(layer_masks(), layer.tokens)
        assert layer.expected == pytest.approx(seconds / free.dense(layer.heads, layer.tokens))
        assert layer.break_even == free.break_even(layer.heads, 1 - layer.sparsity, 4)
        assert layer.better_dense == ()
        assert f"sparse attention is faster from {layer.break_even} tokens" in str(report)
        assert "expected time: attention only, on round numbers" in str(report)

    def test_heads_and_layers_that_gain_nothing(self):
        report = self.report(SLOW)
        assert all(layer.better_dense == tuple(range(layer.heads)) for layer in report.layers)
        assert "gain nothing on this machine; bsa.prune(plan, spec) makes them dense" in str(report)
        never = self.report(replace(SLOW, sparse_pair=1e-6))
        assert never.layers[0].break_even is None
        assert "sparse attention is never faster than dense on this machine in layers" in str(never)

    def test_dense_layers_gain_and_lose_nothing(self):
        report = self.report(SLOW, layers=[0])
        layer = report.layers[1]
        assert (layer.expected, layer.break_even, layer.better_dense) == (1.0, 0, ())


def layer_masks():
    model = make("vit")
    spec = bsa.inspect(model)
    plan = bsa.uniform_plan(model, "local_window", radius=1, order="raster", block_size=4)
    return plan.compile("self.0", plan.layout(spec))


def test_break_even_with_more_keys_than_tokens():
    """With seven times the keys, as in memory attention, the break-even is at fewer tokens."""
    latency = bsa.Latency("made up", 0, 1e-9, 1e-4, 1e-6, 1e-9, True)
    alone, with_frames = latency.break_even(1, 0.5), latency.break_even(1, 0.5, keys=7.0)
    assert with_frames < alone
    rows = latency.sparse_row * -(-with_frames // 128)
    pays = latency.sparse_call + rows + 0.5 * 7 * latency.sparse_pair * with_frames**2
    assert pays == pytest.approx(latency.dense(1, with_frames, keys=7 * with_frames), rel=0.01)
