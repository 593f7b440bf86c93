from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import masks
from bsa_vision.masks import (
    generate_sam_cross_attention_mask,
    generate_sam_hierarchical_mask,
    generate_sam_hybrid_encoder_mask,
    generate_sam_image_to_prompt_mask,
    generate_sam_region_focused_mask,
    generate_vit_hybrid_mask,
    generate_vit_multiscale_mask,
    generate_vit_random_sparse_mask,
    generate_vit_spatial_locality_mask,
    generate_vit_strided_mask,
)

ROOT = Path(__file__).resolve().parents[2]


# Parameters of the ten generators in order with their defaults, then keyword-only ones.
SIGNATURES = {
    "generate_vit_spatial_locality_mask": "img_size, patch_size, block_size, batch_size, "
    "num_heads, locality_radius=1, include_cls_token=True, device=None",
    "generate_vit_random_sparse_mask": "img_size, patch_size, block_size, batch_size, num_heads, "
    "sparsity=0.5, include_cls_token=True, device=None, *, seed=0",
    "generate_vit_strided_mask": "img_size, patch_size, block_size, batch_size, num_heads, "
    "stride=2, include_cls_token=True, device=None",
    "generate_vit_hybrid_mask": "img_size, patch_size, block_size, batch_size, num_heads, "
    "num_global_heads=4, sparsity=0.5, include_cls_token=True, device=None",
    "generate_vit_multiscale_mask": "img_size, patch_size, block_size, batch_size, num_heads, "
    "include_cls_token=True, device=None",
    "generate_sam_image_to_prompt_mask": "num_image_tokens, num_prompt_tokens, block_size, "
    "batch_size, num_heads, sparse_image_to_image=True, image_sparsity=0.5, device=None, *, "
    "grid=None",
    "generate_sam_hierarchical_mask": "num_image_tokens, num_prompt_tokens, block_size, "
    "batch_size, num_heads, device=None, *, grid=None",
    "generate_sam_region_focused_mask": "num_image_tokens, num_prompt_tokens, prompt_positions, "
    "block_size, batch_size, num_heads, focus_radius=8, device=None, *, grid=None",
    "generate_sam_hybrid_encoder_mask": "num_image_tokens, block_size, batch_size, num_heads, "
    "num_dense_heads=4, sparsity=0.6, device=None, *, grid=None",
    "generate_sam_cross_attention_mask": "num_decoder_tokens, num_encoder_tokens, block_size, "
    "batch_size, num_heads, encoder_sparsity=0.5, device=None, *, seed=0",
}

# A call of each on a grid of 7 x 11 in blocks of 10, neither square nor divisible.
COMMON = {"block_size": 10, "batch_size": 2, "num_heads": 4}
VIT = {"img_size": (28, 44), "patch_size": 4, **COMMON}
ENCODER = {"num_image_tokens": 77, "grid": (7, 11), **COMMON}
SAM = {"num_prompt_tokens": 5, **ENCODER}
REGION = {**SAM, "prompt_positions": [(1, 2), (6, 10)], "focus_radius": 2}
CROSS = {"num_decoder_tokens": 45, "num_encoder_tokens": 77, **COMMON}
CALLS = {
    generate_vit_spatial_locality_mask: VIT,
    generate_vit_random_sparse_mask: VIT,
    generate_vit_strided_mask: VIT,
    generate_vit_hybrid_mask: {**VIT, "num_global_heads": 1},
    generate_vit_multiscale_mask: VIT,
    generate_sam_image_to_prompt_mask: SAM,
    generate_sam_hierarchical_mask: SAM,
    generate_sam_region_focused_mask: REGION,
    generate_sam_hybrid_encoder_mask: {**ENCODER, "num_dense_heads": 1},
    generate_sam_cross_attention_mask: CROSS,
}
RANDOM = (generate_vit_random_sparse_mask, generate_sam_cross_attention_mask)
SAM_ON_A_GRID = (
    generate_sam_image_to_prompt_mask,
    generate_sam_hierarchical_mask,
    generate_sam_region_focused_mask,
    generate_sam_hybrid_encoder_mask,
)

every_generator = pytest.mark.parametrize(
    "generator", CALLS, ids=lambda generator: generator.__name__
)


def call(generator, **changes) -> torch.Tensor:
    """Return the base_blockmask of `generator` for its example."""
    result = generator(**{**CALLS[generator], **changes})
    return result[0] if isinstance(result, tuple) else result


@every_generator
class TestCommonRules:
    def test_signature(self, generator):
        described, keyword_only = [], False
        for name, parameter in inspect.signature(generator).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
                described.append("*")
                keyword_only = True
            default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
            described.append(name + default)
        assert ", ".join(described) == SIGNATURES[generator.__name__]

    def test_shape_and_type(self, generator):
        base = call(generator)
        rows = dict.fromkeys(CALLS, 8) | dict.fromkeys(SAM_ON_A_GRID, 9)  # 78 and 82 tokens
        rows[generate_sam_hybrid_encoder_mask] = 8  # 77 tokens
        rows[generate_sam_cross_attention_mask] = 5  # 45 tokens
        columns = rows | {generate_sam_cross_attention_mask: 8}
        slices = 3 if "hybrid" in generator.__name__ else 4
        assert base.shape == (2, slices, rows[generator], columns[generator])
        assert base.dtype == torch.bool
        assert base.is_contiguous()
        assert base.device.type == "cpu"
        assert not base.all()
        assert base.any(-1).all()  # no empty rows

    def test_equal_across_the_batch(self, generator):
        base = call(generator, batch_size=3)
        assert base.shape[0] == 3
        assert torch.equal(base[0], base[1])
        assert torch.equal(base[0], base[2])
        assert torch.equal(base[:1], call(generator, batch_size=1))

    def test_results_share_no_memory(self, generator):
        base = call(generator)
        expected = base.clone()
        base[0] = ~base[0]
        assert torch.equal(base[1], expected[1])
        assert torch.equal(call(generator), expected)

    def test_default_device(self, generator):
        expected = generator(**CALLS[generator])
        with torch.device("meta"):
            default = generator(**CALLS[generator])
            on_request = generator(**CALLS[generator], device="cpu")
        expected, default, on_request = (
            result if isinstance(result, tuple) else (result,)
            for result in (expected, default, on_request)
        )
        for on_cpu, on_meta, explicit in zip(expected, default, on_request, strict=True):
            assert on_meta.device.type == "meta"
            assert (on_meta.shape, on_meta.dtype) == (on_cpu.shape, on_cpu.dtype)
            assert (on_cpu.device.type, explicit.device.type) == ("cpu", "cpu")
            assert torch.equal(explicit, on_cpu)

    @pytest.mark.parametrize("device", ["meta", torch.device("meta")], ids=["str", "device"])
    def test_given_device(self, generator, device):
        result = generator(**CALLS[generator], device=device)
        for tensor in result if isinstance(result, tuple) else (result,):
            assert tensor.device.type == "meta"

    def test_global_generator_is_not_used(self, generator):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = call(generator)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert torch.equal(call(generator), first)

    def test_default_dtype_has_no_effect(self, generator):
        first = call(generator)
        torch.set_default_dtype(torch.float64)
        try:
            again = call(generator)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(again, first)

    def test_seed_only_where_random(self, generator):
        assert ("seed" in inspect.signature(generator).parameters) == (generator in RANDOM)


def test_all_ten_are_public():
    names = {name for name in masks.__all__ if name.startswith("generate_")}
    assert names == set(SIGNATURES) == {generator.__name__ for generator in CALLS}


@pytest.mark.parametrize("generator", RANDOM, ids=lambda generator: generator.__name__)
class TestRandom:
    def test_seed(self, generator):
        assert torch.equal(call(generator), call(generator, seed=0))
        assert torch.equal(call(generator, seed=7), call(generator, seed=7))
        draws = [call(generator, seed=seed)[0] for seed in range(6)]
        heads = {tuple(head.flatten().tolist()) for draw in draws for head in draw}
        assert len(heads) == 6 * 4  # differ per seed and per head

    @pytest.mark.parametrize("seed", [-1, 0.5, True, None])
    def test_bad_seed(self, generator, seed):
        with pytest.raises(ValueError, match=f"seed={seed}: expected an integer >= 0"):
            call(generator, seed=seed)


class TestGrid:
    @pytest.mark.parametrize("generator", SAM_ON_A_GRID, ids=lambda generator: generator.__name__)
    def test_squares_need_no_grid(self, generator):
        square = {"num_image_tokens": 36, "block_size": 4}
        if generator is generate_sam_region_focused_mask:
            square |= {"prompt_positions": [(0, 5)]}
        given = call(generator, **square, grid=(6, 6))
        assert torch.equal(call(generator, **square, grid=None), given)
        assert torch.equal(call(generator, **square, grid=[6, 6]), given)
        assert not torch.equal(call(generator, **square, grid=(4, 9)), given)


SIZE = r": expected an integer >= \d"
SIZES = {"patch_size", "block_size", "batch_size", "num_heads"}
SIZES |= {"num_image_tokens", "num_decoder_tokens", "num_encoder_tokens"}
BAD_SIZES = [
    (generator, name, value)
    for generator, arguments in CALLS.items()
    for name in arguments
    if name in SIZES
    for value in (0, -1, 2.0, True, "4", None)
]


@pytest.mark.parametrize(("generator", "name", "value"), BAD_SIZES)
def test_bad_sizes(generator, name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}") + SIZE):
        call(generator, **{name: value})


@pytest.mark.parametrize(
    ("generator", "changes", "match"),
    [
        (
            generate_vit_strided_mask,
            {"img_size": (28, 45)},
            r"img_size=\(28, 45\): expected multiples of the patch size, 4 .*\(28, 48\)",
        ),
        (
            generate_vit_strided_mask,
            {"img_size": (29, 44)},
            r"img_size=\(29, 44\): expected multiples of the patch size, 4 .*\(32, 44\)",
        ),
        (
            generate_vit_hybrid_mask,
            {"img_size": 30},
            r"img_size=\(30, 30\): expected multiples of the patch size, 4 .*\(32, 32\)",
        ),
        (generate_vit_multiscale_mask, {"img_size": 0}, r"img_size.*=0: expected an integer >= 1"),
        (
            generate_vit_multiscale_mask,
            {"img_size": (28, -4)},
            r"img_size.*=-4: expected an integer >= 1",
        ),
        (
            generate_vit_multiscale_mask,
            {"img_size": (28.0, 44)},
            r"img_size.*=28\.0: expected an integer >= \d",
        ),
        (
            generate_vit_multiscale_mask,
            {"img_size": 28.0},
            r"img_size=28\.0: expected a pair",
        ),
        (generate_vit_multiscale_mask, {"img_size": True}, r"img_size.*=True: expected an integer"),
        (
            generate_vit_multiscale_mask,
            {"img_size": (28, 44, 3)},
            r"img_size=\(28, 44, 3\): expected a pair",
        ),
        (
            generate_vit_spatial_locality_mask,
            {"locality_radius": -1},
            r"locality_radius=-1: expected an integer >= 0",
        ),
        (
            generate_vit_spatial_locality_mask,
            {"locality_radius": 1.5},
            r"locality_radius=1\.5: expected an integer >= \d",
        ),
        (generate_vit_strided_mask, {"stride": 0}, r"stride=0: expected an integer >= 1"),
        (generate_vit_strided_mask, {"stride": True}, r"stride=True: expected an integer >= \d"),
        (
            generate_vit_hybrid_mask,
            {"num_global_heads": 5},
            r"num_global_heads=5 .*num_heads=4: allowed are 0 to 4",
        ),
        (
            generate_vit_hybrid_mask,
            {"num_global_heads": -1},
            r"num_global_heads=-1: expected an integer >= 0",
        ),
        (
            generate_vit_hybrid_mask,
            {"num_global_heads": True},
            r"num_global_heads=True: expected an integer >= \d",
        ),
        (
            generate_sam_hybrid_encoder_mask,
            {"num_dense_heads": 5},
            r"num_dense_heads=5 .*num_heads=4: allowed are 0 to 4",
        ),
        (
            generate_sam_hybrid_encoder_mask,
            {"num_dense_heads": -2},
            r"num_dense_heads=-2: expected an integer >= 0",
        ),
        (
            generate_sam_image_to_prompt_mask,
            {"num_prompt_tokens": -1},
            r"num_prompt_tokens=-1: expected an integer >= 0",
        ),
        (
            generate_sam_hierarchical_mask,
            {"num_prompt_tokens": 5.0},
            r"num_prompt_tokens=5\.0: expected an integer >= \d",
        ),
        (
            generate_sam_hierarchical_mask,
            {"num_prompt_tokens": True},
            r"num_prompt_tokens=True: expected an integer",
        ),
        (
            generate_sam_region_focused_mask,
            {"focus_radius": -1},
            r"radius=-1: expected an integer >= 0",
        ),
        (
            generate_sam_region_focused_mask,
            {"focus_radius": 2.5},
            r"radius=2\.5: expected an integer >= \d",
        ),
        (
            generate_sam_region_focused_mask,
            {"focus_radius": -1, "prompt_positions": []},
            r"radius=-1: expected an integer >= 0",
        ),
    ],
)
def test_bad_arguments(generator, changes, match):
    with pytest.raises(ValueError, match=match):
        call(generator, **changes)


@pytest.mark.parametrize(
    ("generator", "name"),
    [
        (generate_vit_random_sparse_mask, "sparsity"),
        (generate_vit_hybrid_mask, "sparsity"),
        (generate_sam_image_to_prompt_mask, "image_sparsity"),
        (generate_sam_hybrid_encoder_mask, "sparsity"),
        (generate_sam_cross_attention_mask, "encoder_sparsity"),
    ],
)
@pytest.mark.parametrize("value", [-0.01, 1.01, 50, float("nan"), float("inf"), "0.5", None])
def test_bad_sparsity(generator, name, value):
    with pytest.raises(
        ValueError, match=re.escape(f"sparsity={value!r}") + ": .*of blocks to skip, 0 to 1"
    ):
        call(generator, **{name: value})


@pytest.mark.parametrize("generator", SAM_ON_A_GRID, ids=lambda generator: generator.__name__)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"grid": None}, r"num_image_tokens=77 is not a square.*: .*grid=\(h, w\)"),
        (
            {"grid": None, "num_image_tokens": 4095},
            r"num_image_tokens=4095 is not a square.*: .*grid=\(h, w\)",
        ),
        (
            {"grid": (7, 12)},
            r"grid=\(7, 12\) has 84 patches, num_image_tokens=77: they must be equal",
        ),
        ({"grid": (1, 1)}, r"grid=\(1, 1\) has 1 patches, num_image_tokens=77: they must be equal"),
        ({"grid": (-7, -11)}, r"grid\[0\]=-7: expected an integer >= 1"),
        ({"grid": (7.0, 11)}, r"grid\[0\]=7\.0: expected an integer >= \d"),
        ({"grid": 77}, r"grid=77: expected a pair"),
        ({"grid": (7, 11, 1)}, r"grid=\(7, 11, 1\): expected a pair"),
    ],
)
def test_token_counts_that_fit_no_grid(generator, changes, match):
    with pytest.raises(ValueError, match=match):
        call(generator, **changes)


def run_script(path: Path | str, cwd: Path) -> str:
    """Return the output of a script, which must succeed without output on stderr."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, path],
        cwd=cwd,
        env={**environment, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


SCRIPTS = {
    "vit_masks.py": ["spatial locality", "random sparse", "strided", "hybrid", "multiscale"],
    "sam_masks.py": [
        "image to prompt",
        "hierarchical",
        "region focused",
        "hybrid encoder",
        "cross attention",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("from_root", [True, False], ids=["from the root", "from elsewhere"])
def test_scripts(script, from_root, tmp_path):
    path, cwd = (f"masks/{script}", ROOT) if from_root else (ROOT / "masks" / script, tmp_path)
    entry = (
        r"^(.+): \((\d+), (\d+), (\d+), (\d+)\), sparsity (\d+\.\d)%; head \d+:\n((?:[ ░▒▓█]+\n)+)"
    )
    found = re.findall(entry, run_script(path, cwd), re.MULTILINE)
    for expected in SCRIPTS[script]:
        _, _, _, rows, columns, sparsity, drawing = next(
            entry for entry in found if entry[0].startswith(expected)
        )
        lines = drawing.splitlines()
        assert (len(lines), {len(line) for line in lines}) == (int(rows), {2 * int(columns)})
        assert 0 < float(sparsity) < 100
        assert {"█", " "} <= set(drawing)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_from_their_own_checkout(script, tmp_path):
    """They ignore an installed `masks`, and a folder of that name in the working directory."""
    for package in ("masks", "bsa_vision"):
        copied = tmp_path / "checkout" / package
        shutil.copytree(ROOT / package, copied, ignore=shutil.ignore_patterns("__pycache__"))
    drawing = tmp_path / "checkout" / "bsa_vision" / "masks" / "drawing.py"
    text = drawing.read_text(encoding="utf-8").replace('" ░▒▓█"', '" .:+#"')
    drawing.write_text(text, encoding="utf-8")
    foreign = tmp_path / "elsewhere" / "masks"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("raise ImportError('a foreign package')")
    printed = run_script(tmp_path / "checkout" / "masks" / script, tmp_path / "elsewhere")
    assert "##" in printed
    assert "█" not in printed
