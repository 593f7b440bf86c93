"""Plans: building, compiling, files, and errors for damaged files and wrong arguments."""

from __future__ import annotations

import threading

import pytest
import torch

from bsa_vision import HeadMasks, LayerSpec, ModelSpec, PlanError, SparsityPlan
from bsa_vision.masks import (
    PATTERNS,
    Pattern,
    TokenLayout,
    local_window,
    random_blocks,
    stack_heads,
)
from bsa_vision.plans.static_mask import Static

SPEC = ModelSpec(
    "dinov3",
    tuple(LayerSpec(f"model.layer.{i}.attention", i, 3, 64) for i in range(4)),
    grid=(9, 14),
    patch_size=(16, 16),
    num_prefix_tokens=5,
)
SMALL = dict(block_size=8, tile=(2, 4))


def uniform(pattern="local_window", **options) -> SparsityPlan:
    return SparsityPlan.uniform(SPEC, pattern, **{**SMALL, **options})


def own(layout):
    return local_window(layout, 1)


class TestBuilding:
    def test_uniform(self):
        plan = uniform(radius=2, dense_heads=1, layers=[1, 3])
        near = "local_window(radius=2)"
        assert plan.layers["self.0"] == ("dense",) * 3
        assert plan.layers["self.1"] == plan.layers["self.3"] == ("dense", near, near)
        assert plan.patterns == {near: Pattern("local_window", radius=2)}

    def test_replace_is_one_head_at_a_time_and_returns_a_new_plan(self):
        plan = uniform(radius=2)
        changed = plan.replace(layers=["self.2"], heads=[1], pattern="strided", stride=3)
        assert changed.layers["self.2"] == (
            "local_window(radius=2)",
            "strided(stride=3)",
            "local_window(radius=2)",
        )
        assert changed.layers["self.1"] == plan.layers["self.1"]
        assert plan == uniform(radius=2)

    def test_replace_forgets_what_nothing_uses(self):
        assert uniform(radius=2).replace(pattern="dense").patterns == {}

    def test_every_pattern_of_the_table_can_be_used(self):
        needed = {"region": dict(centers=[(3, 3)])}
        for name in PATTERNS:
            plan = uniform(name, **needed.get(name, {}))
            assert 0 <= plan.sparsity(plan.layout(SPEC)) < 1

    def test_patterns_join(self):
        joined = Pattern("window", size=4) | Pattern("strided", stride=5)
        plan = uniform(joined)
        layout = plan.layout(SPEC)
        expected = Pattern("window", size=4)(layout) | Pattern("strided", stride=5)(layout)
        assert torch.equal(plan.compile("self.0", layout).base_blockmask[0, 2], expected)

    def test_functions_with_one_name_stay_apart(self):
        def make(radius):
            def near(layout):
                return local_window(layout, radius)

            return near

        plan = (
            uniform(make(0)).replace(heads=[1], pattern=make(5)).replace(heads=[2], pattern=make(1))
        )
        assert len(plan.patterns) == 3
        densities = [1 - s for s in plan.compile("self.0", plan.layout(SPEC)).head_sparsity]
        assert densities[0] < densities[2] < densities[1]

    def test_random_heads_and_layers_draw_anew(self):
        plan = uniform("random_blocks", sparsity=0.5, seed=3)
        layout = plan.layout(SPEC)
        slices = [
            mask for key in plan.layers for mask in plan.compile(key, layout).base_blockmask[0]
        ]
        assert len({mask.numpy().tobytes() for mask in slices}) == len(slices)
        again = uniform("random_blocks", sparsity=0.5, seed=3).compile("self.2", layout)
        assert torch.equal(again.base_blockmask, plan.compile("self.2", layout).base_blockmask)

    def test_from_head_masks(self):
        layout = TokenLayout((9, 14), num_prefix_tokens=5, block_size=8)
        hm = HeadMasks(
            stack_heads([local_window(layout, 1), random_blocks(layout)], 2),
            [0, 2, 1],
            block_size=8,
        )
        plan = SparsityPlan.from_head_masks(SPEC, {"model.layer.2.attention": hm})
        assert plan.order == "raster"
        assert plan.layers["self.0"] == ("dense",) * 3
        compiled = plan.compile("self.2", plan.layout(SPEC))
        assert compiled.slices == (0, 1, 2)
        assert torch.equal(compiled.base_blockmask[0], hm.base_blockmask[0, [1, 0]])


class TestNames:
    def test_a_function_called_dense_is_not_dense(self):
        def dense(layout):
            return torch.eye(layout.num_blocks, dtype=torch.bool)

        plan = uniform(dense)
        assert set(plan.patterns) == {"dense (function)"}
        assert plan.sparsity(plan.layout(SPEC)) > 0.5

    def test_a_function_called_like_a_pattern_does_not_take_its_place(self):
        def axial(layout):
            return own(layout)

        plan = uniform(axial).replace(heads=0, pattern="axial")
        masks = plan.compile("self.0", plan.layout(SPEC)).base_blockmask[0]
        assert torch.equal(masks[0], Pattern("axial")(plan.layout(SPEC)))
        assert torch.equal(masks[1], own(plan.layout(SPEC)))

    def test_equal_plans_hash_equally(self):
        plan = uniform(radius=1)
        other = SparsityPlan(
            plan.model,
            plan.patterns,
            {key: list(plan.layers[key]) for key in reversed(plan.layers)},
            tile=[2, 4],
            block_size=8,
        )
        assert plan == other
        assert hash(plan) == hash(other)

    def test_one_layer_or_head_needs_no_list(self):
        plan = uniform(radius=1, layers=2).replace(layers="self.1", heads=0, pattern="axial")
        assert plan.layers["self.1"] == ("axial()", "dense", "dense")
        assert plan.layers["self.2"] == ("local_window(radius=1)",) * 3

    def test_completing_names_every_layer(self):
        plan = SparsityPlan(SPEC.fingerprint, {}, {"self.1": ("dense",) * 3})
        assert plan.complete(SPEC).layers == {f"self.{i}": ("dense",) * 3 for i in range(4)}


class TestCompiling:
    def test_special_tokens_are_always_kept(self):
        plan = uniform(lambda layout: torch.eye(layout.num_blocks, dtype=torch.bool))
        layout = plan.layout(SPEC)
        mask = plan.compile("self.0", layout).base_blockmask[0, 0]
        assert mask[layout.special_blocks].all()
        assert mask[:, layout.special_blocks].all()
        assert not mask.all()

    def test_a_pattern_that_keeps_everything_is_dense(self):
        plan = uniform(radius=99)
        assert plan.compile("self.0", plan.layout(SPEC)).all_dense

    def test_geometric_patterns_carry_over_to_other_grids(self):
        plan = uniform(radius=1)
        for grid in ((9, 14), (20, 7), (3, 3)):
            layout = plan.layout(SPEC, grid)
            assert torch.equal(
                plan.compile("self.0", layout).block_mask(*[layout.num_tokens] * 2)[0, 0],
                own(layout),
            )

    def test_made_once_from_any_thread(self):
        calls = []

        def slow(layout):
            calls.append(layout)
            return own(layout)

        plan = uniform(slow)
        layout = plan.layout(SPEC)
        first = plan.compile("self.0", layout)
        seen = []
        threads = [
            threading.Thread(target=lambda: seen.append(plan.compile("self.0", layout)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(masks is first for masks in seen)
        assert len(calls) == 3

    def test_sparsity_counts_dense_layers(self):
        plan = uniform(radius=0, layers=[0])
        layout = plan.layout(SPEC)
        assert plan.sparsity(layout) == pytest.approx(plan.compile("self.0", layout).sparsity / 4)

    def test_an_empty_row_is_refused(self):
        bare = ModelSpec("vit", (LayerSpec("attn", 0, 1, 8),), (4, 4), (8, 8))
        plan = SparsityPlan.uniform(
            bare, lambda layout: torch.zeros(2, 2, dtype=torch.bool), **SMALL
        )
        with pytest.raises(
            PlanError, match=r"layer 'self.0' of the plan: query block 0.*keeps no key block"
        ):
            plan.compile("self.0", plan.layout(bare))


LAYOUT = TokenLayout((9, 14), num_prefix_tokens=5, block_size=8)
THREE = stack_heads([local_window(LAYOUT, 1)] * 3, 1)
BAD_PLANS = {
    "unknown pattern": (
        lambda: uniform("near"),
        "pattern 'near' is unknown: allowed are dense.*did you mean 'nearest'",
    ),
    "unknown parameter": (
        lambda: uniform("local_window", raduis=2),
        "no parameter 'raduis': allowed are radius, metric",
    ),
    "dense parameters": (
        lambda: uniform("dense", radius=2),
        "'dense' takes no parameters, got radius",
    ),
    "not a pattern": (lambda: uniform(3), "pattern=3: expected a name, a Pattern, or a function"),
    "parameters of a function": (
        lambda: uniform(own, radius=2),
        "takes no further parameters, got radius",
    ),
    "dense_heads": (
        lambda: uniform(radius=1, dense_heads=4),
        "dense_heads=4: the model has 3 heads",
    ),
    "no such layer to compile": (
        lambda: uniform(radius=1).compile("self.99", TokenLayout((4, 4))),
        "no layer 'self.99' in this plan: it has self.0",
    ),
    "no such layer": (
        lambda: uniform(radius=1, layers=[7]),
        r"layers \[7\] match nothing: the plan has self.0, self.1",
    ),
    "no layers": (lambda: uniform(radius=1, layers=[]), r"layers \[\] match nothing"),
    "no such head": (
        lambda: uniform(radius=1).replace(heads=[3], pattern="dense"),
        r"heads=\[3\] match no head.*0 to 2",
    ),
    "no heads": (
        lambda: uniform(radius=1).replace(heads=[], pattern="dense"),
        r"heads=\[\] match no head",
    ),
    "no masks": (lambda: SparsityPlan.from_head_masks(SPEC, {}), "got no masks"),
    "layer name": (
        lambda: SparsityPlan.from_head_masks(
            SPEC, {"blocks.1.attn": HeadMasks(THREE, layout=LAYOUT)}
        ),
        "no attention layer 'blocks.1.attn'.*it has model.layer.0.attention",
    ),
    "heads of masks": (
        lambda: SparsityPlan.from_head_masks(
            SPEC, {"self.1": HeadMasks(THREE[:, :2], layout=LAYOUT)}
        ),
        "has 3 heads, but its HeadMasks have 2",
    ),
    "size of masks": (
        lambda: SparsityPlan.from_head_masks(
            SPEC, {"self.1": HeadMasks(THREE[..., :9, :9], block_size=8)}
        ),
        r"\(9, 9\) blocks, but TokenLayout\(grid=\(9, 14\), num_prefix_tokens=5.* has 17"
        r".*image_size",
    ),
    "masks differ in the batch": (
        lambda: SparsityPlan.from_head_masks(
            SPEC, {"self.1": HeadMasks(torch.cat([THREE, torch.ones_like(THREE)]), layout=LAYOUT)}
        ),
        "differ across the batch",
    ),
    "cross attention": (
        lambda: SparsityPlan.from_head_masks(
            SPEC,
            {
                "self.1": HeadMasks(
                    THREE, layout=LAYOUT, kv_layout=TokenLayout((131, 1), block_size=8)
                )
            },
        ),
        "different layouts for queries and keys",
    ),
    "orders": (
        lambda: SparsityPlan.from_head_masks(
            SPEC,
            {
                "self.0": HeadMasks(THREE, layout=LAYOUT),
                "self.1": HeadMasks(
                    THREE,
                    layout=TokenLayout((9, 14), num_prefix_tokens=5, order="tile", block_size=8),
                ),
            },
        ),
        "all layers of a plan share one order",
    ),
    "static shape": (
        lambda: Static(torch.ones(3, 3, dtype=torch.bool), LAYOUT),
        r"shape \(3, 3\): expected .*\(17, 17\)",
    ),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plans(name):
    make, message = BAD_PLANS[name]
    with pytest.raises(PlanError, match=message):
        make()


class TestLayerNames:
    def test_layers_by_index_key_or_path(self):
        by = [uniform("axial", layers=[layer]) for layer in (1, "1", "self.1", SPEC.layers[1].name)]
        assert all(plan == by[0] for plan in by)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (
                ["model.layer.1.atention"],
                r"no attention layer 'model.layer.1.atention'.*nearest are "
                r".*model.layer.1.attention",
            ),
            ("selv.1", "no attention layer 'selv.1'"),
        ],
    )
    def test_unknown_names_and_what_is_near(self, layers, message):
        with pytest.raises(PlanError, match=message):
            uniform("axial", layers=layers)
        with pytest.raises(PlanError, match=r"nearest are self.0"):
            uniform("axial").replace(layers="self.00", pattern="dense")
