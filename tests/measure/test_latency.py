"""Plan-time honesty: the model of what attention costs, its memory, pruning with it, and what `describe` says."""

from __future__ import annotations

import json
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


MODULE = __import__("sys").modules["bsa_vision.measure.latency"]
# Round numbers: a kept pair costs half a dense one, a call and each row of blocks something on top.
ROUND = Latency("round numbers", dense_call=1e-3, dense_pair=1e-9, sparse_call=5e-3, sparse_row=1e-5, sparse_pair=0.5e-9, dense_in_loop=True)  # fmt: skip
SLOW = replace(
    ROUND, sparse_pair=2e-9, dense_in_loop=False
)  # as without the compiled loop, exaggerated


@pytest.mark.parametrize(
    "number", [float("nan"), -1.0, 0, float("inf"), True, "x", None, 10**400, [1.0]]
)
@pytest.mark.parametrize("field", ["dense_pair", "sparse_call"])
def test_files_with_numbers_that_cannot_be_are_measured_anew(number, field):
    good = {name: value for name, value in asdict(ROUND).items() if name != "what"}
    assert MODULE._is_latency(good)
    assert not MODULE._is_latency({**good, field: number})
    assert not MODULE._is_latency({**good, "dense_in_loop": 1})
    assert not MODULE._is_latency({**good, "dense_pair": 0.0})


@pytest.mark.parametrize(
    "data", [b"[" * 200_000, b"\xff\xfe{}", b"", b"[]", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_damaged_cache_files_hold_nothing(data):
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
        assert (
            ROUND.of_masks(bsa.HeadMasks(None, [0, 0]), 300)
            == ROUND.dense(2, 300)
            == pytest.approx(1e-3 + 2e-9 * 90_000)
        )

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
        spelled = base.repeat_interleave(block, 2)[:, :, :rows].repeat_interleave(block, 3)[
            ..., :columns
        ]
        means = spelled.double().sum((2, 3)).mean(0)
        assert all(
            abs(a - b) <= 0.5 for a, b in zip(masks.kept_pairs(rows, columns), means.tolist())
        )

    @pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
    def test_break_even(self, density):
        """One token fewer, and it does not pay."""
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
        here = measure(head_dim=16)
        assert torch.equal(
            torch.get_rng_state(), before
        )  # describing a model changes nobody's random numbers
        assert "float32, head dim 16" in here.what
        assert torch.__version__ in here.what
        assert here.dense_pair > 0
        assert here.sparse_call > 0
        assert min(here.sparse_row, here.sparse_pair) >= 0
        # 2048 tokens cannot be cheaper than 128: the call's own cost and the pairs' are told apart.
        assert here.dense(8, 2048) > here.dense(8, 128)

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
    def test_a_spoilt_file_is_measured_over(self, monkeypatch, tmp_path, content):
        monkeypatch.setenv("BSA_VISION_CACHE", str(tmp_path))
        monkeypatch.setattr(MODULE, "_known", {})
        monkeypatch.setattr(MODULE, "measure", lambda *a: ROUND)
        latency_file().write_text(content)
        assert bsa.latency() == ROUND
        assert len(json.loads(latency_file().read_text())) == 1

    def test_a_place_that_cannot_be_written(self, monkeypatch, tmp_path):
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

    def test_where_it_is_kept(self, monkeypatch):
        monkeypatch.delenv("BSA_VISION_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert str(latency_file()) == "/somewhere/bsa-vision/latency.json"


ONES = {name: {"call": 1, "row": 0, "pair": 0} for name in ("flex", "kernel", "gather")}
SPOILT = [
    json.dumps({"WHAT": ONES}).replace("1", x, 1) for x in ("NaN", "-1", "true", "1" + "0" * 400)
]


class TestBackends:
    """Costs of each backend, by which `auto` chooses on GPUs."""

    @pytest.fixture(autouse=True)
    def own_file(self, monkeypatch, tmp_path):
        monkeypatch.setenv("BSA_VISION_CACHE", str(tmp_path))
        monkeypatch.setattr(measured_costs, "_known", {})

    def test_measured_here(self, monkeypatch):
        monkeypatch.setattr(MODULE, "LARGE", (16, 32))
        found = MODULE.measure_backends(32)
        plain, with_rel_pos = found.values()
        assert set(plain) == set(with_rel_pos) == {"gather"}  # what skips nothing is no candidate
        assert all(
            cost.call > 0 and cost.row >= 0 and cost.pair >= 0
            for cost in (*plain.values(), *with_rel_pos.values())
        )
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
        assert (
            choose(self.problem(1024, 0.5)) == "kernel"
        )  # nothing is known: the order of the table
        measured_costs.remember(
            what,
            {"kernel": Cost(1e-4, 0, 1e-11), "flex": Cost(2e-5, 0, 4e-11), "gather": Cost(1, 0, 0)},
        )
        assert choose(self.problem(256, 0.5)) == "flex"  # a cheap call
        assert choose(self.problem(8192, 0.5)) == "kernel"  # cheap pairs
        # Few pairs: 2 * 2048**2 / 16 * 3e-11 is less than 8e-5, half of them is more.
        assert choose(self.problem(2048, 1 / 16)) == "flex"
        assert choose(self.problem(2048, 0.5)) == "kernel"
        assert choose(self.problem(2048, 0.5), "gather") == "gather"

    def test_asked_once(self, monkeypatch):
        """Asking every backend takes longer than some calls do: once for masks, shapes and whatever else matters; anew with other costs."""
        what, asked = self.on_a_gpu(monkeypatch), []
        monkeypatch.setattr(BACKENDS["kernel"], "why_not", lambda problem: asked.append(problem))
        problem = self.problem(1024, 0.5)
        assert [choose(problem) for _ in range(3)] == ["kernel"] * 3
        assert len(asked) == 1
        for change in (
            dict(scale=0.0),
            dict(return_lse=True),
            dict(is_causal=True),
            dict(dropout_p=0.1),
        ):
            choose(replace(problem, **change))
        assert len(asked) == 5
        measured_costs.remember(
            what, dict.fromkeys(("kernel", "gather"), Cost(1, 0, 0)) | {"flex": Cost(0, 0, 0)}
        )
        assert choose(problem) == "flex"

    def test_what_is_not_measured_is_not_passed_over(self, monkeypatch):
        """A kernel that was built after measuring: the order of the table decides until all are known again."""
        what = self.on_a_gpu(monkeypatch)
        measured_costs.remember(what, {"flex": Cost(1e-9, 0, 0), "gather": Cost(1, 0, 0)})
        assert choose(self.problem(1024, 0.5)) == "kernel"
        measured_costs.remember(what, {**measured_costs.known(what), "kernel": Cost(1, 0, 0)})
        assert choose(self.problem(1024, 0.5)) == "flex"

    def test_what_skips_nothing_is_no_candidate(self, monkeypatch):
        """However cheap its calls were where they were measured."""
        measured_costs.remember(self.on_a_gpu(monkeypatch), dict.fromkeys(("kernel", "flex", "gather"), Cost(1, 1, 1)) | {"sdpa": Cost(0, 0, 0)})  # fmt: skip
        assert choose(self.problem(1024, 0.5)) == "kernel"

    def test_one_that_breaks_is_left_out(self, monkeypatch):
        monkeypatch.setattr(MODULE, "LARGE", (16, 32))

        def explode(problem):
            raise RuntimeError("out of shared memory")

        monkeypatch.setattr(BACKENDS["flex"], "why_not", lambda problem: None)
        monkeypatch.setattr(BACKENDS["flex"], "run", explode)
        with pytest.warns(
            RuntimeWarning,
            match="'flex' failed while it was measured, and is left out: RuntimeError: out of",
        ):
            found = MODULE.measure_backends(32)
        assert all(set(one) == {"gather"} for one in found.values())

    def test_relative_position_has_costs_of_its_own(self, monkeypatch):
        measured_costs.remember(self.on_a_gpu(monkeypatch), {"flex": Cost(1e-9, 0, 0)})
        rel_pos = bsa.RelPos(torch.empty(0), torch.empty(0))
        assert choose(self.problem(1024, 0.5, rel_pos)) == "kernel"

    @pytest.mark.parametrize(
        "content",
        ["", "[]", '{"WHAT": 3}', '{"WHAT": {"flex": 1}}', '{"WHAT": {"flex": {"call": "x"}}}'],
    )
    def test_a_spoilt_file(self, monkeypatch, tmp_path, content):
        what = self.on_a_gpu(monkeypatch)
        (tmp_path / "backends.json").write_text(content.replace("WHAT", what))
        assert choose(self.problem(1024, 0.5)) == "kernel"

    def test_on_a_cpu_nothing_is_asked(self, monkeypatch):
        monkeypatch.setattr(measured_costs, "cheapest", None)
        q = torch.zeros(1, 2, 256, 16)
        assert (
            choose(
                Problem(
                    q, q, q, bsa.HeadMasks(torch.eye(2, dtype=torch.bool).expand(1, 2, 2, 2)), 1.0
                )
            )
            == "gather"
        )


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
        """A head may gain and its call still lose: what a sparse call costs on top is not made up at so few tokens."""
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
        assert (sparse - dense).abs().max() > 1e-3  # a forward is sparse however slow that is
        torch.testing.assert_close(after, dense)

    def test_errors(self):
        model = make("vit")
        plan, spec = bsa.dense_plan(model), bsa.inspect(model)
        with pytest.raises(
            TypeError, match=r"spec is a .*ViT.*: expected a ModelSpec; pass bsa.inspect"
        ):
            bsa.prune(plan, model, latency=ROUND)
        for wrong in (-0.1, 1, "much", True):
            with pytest.raises(ValueError, match=r"min_gain=.*expected a fraction.*give e.g. 0.05"):
                bsa.prune(plan, spec, latency=ROUND, min_gain=wrong)
        for wrong in (0, -1, 1.5):
            with pytest.raises(
                ValueError, match=r"images=.*number of images per call.*give e.g. 1"
            ):
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

    def test_says_what_is_to_be_expected(self):
        free = replace(ROUND, sparse_call=0.0, sparse_row=0.0)
        report = self.report(free)
        layer = report.layers[0]
        assert layer.expected == pytest.approx(
            free.of_masks(layer_masks(), layer.tokens) / free.dense(layer.heads, layer.tokens)
        )
        assert layer.break_even == free.break_even(layer.heads, 1 - layer.sparsity, 4)
        assert layer.better_dense == ()
        assert f"sparsity pays from {layer.break_even} tokens on" in str(report)
        assert "expected on round numbers" in str(report)

    def test_says_when_it_is_not_worth_it(self):
        report = self.report(SLOW)
        assert all(layer.better_dense == tuple(range(layer.heads)) for layer in report.layers)
        assert "gain nothing here and are better dense; bsa.prune(plan, spec)" in str(report)
        never = self.report(replace(SLOW, sparse_pair=1e-6))
        assert never.layers[0].break_even is None
        assert "sparsity pays at no number of tokens in layers" in str(never)

    def test_dense_layers_gain_and_lose_nothing(self):
        report = self.report(SLOW, layers=[0])
        assert (
            report.layers[1].expected,
            report.layers[1].break_even,
            report.layers[1].better_dense,
        ) == (1.0, 0, ())


def layer_masks():
    model = make("vit")
    spec = bsa.inspect(model)
    plan = bsa.uniform_plan(model, "local_window", radius=1, order="raster", block_size=4)
    return plan.compile("self.0", plan.layout(spec))


def test_break_even_with_more_keys_than_tokens():
    """Memory attention: seven times the keys, so that the cost of a call and of rows is made up for earlier."""
    here = bsa.Latency("made up", 0, 1e-9, 1e-4, 1e-6, 1e-9, True)
    alone, among_frames = here.break_even(1, 0.5), here.break_even(1, 0.5, keys=7.0)
    assert among_frames < alone
    rows = here.sparse_row * -(-among_frames // 128)
    pays = here.sparse_call + rows + 0.5 * 7 * here.sparse_pair * among_frames**2
    assert pays == pytest.approx(here.dense(1, among_frames, keys=7 * among_frames), rel=0.01)
