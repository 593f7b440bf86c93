"""bsa-vision in five steps, on a CPU or on CUDA:

    python examples/usage_example.py [--device cpu] [--rounds 3] [--out out/usage_example.png]

(a) the kernel's own function on ViT-B/16 and SAM-B shapes, with generated block masks
(b) dense against 50 % and 75 % sparsity at 4096 tokens, timed here
(c) a DINO-type ViT-B with sparse heads on a photograph; random weights, so the error says nothing about a trained model
(d) SAM's ViT-B image encoder on it: as transformers runs it, exact without N x N, and with sparse global layers; random weights
(e) a small model that has learned something: a click, and its dense and its sparse answer on one picture
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cbook import get_sample_data
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

if __package__ in (None, ""):  # run as a script: find `examples.testbed`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bsa_vision as bsa
from bsa_vision import masks
from bsa_vision.measure.timing import paired
from bsa_vision.viz import View, block_at, plot_views
from examples.testbed import evaluate, model, scenes, show

BLOCK = 128
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of (b) and (c)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/usage_example.png"),
        help="where the picture of (c) goes; that of (e) beside it",
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    console.print(
        f"torch {torch.__version__}, {device}, {dtype}, {torch.get_num_threads()} threads\n"
    )
    with torch.no_grad():
        kernel_function(device, dtype)
        sparsity_levels(device, dtype, arguments.rounds)
        model_on_photograph(device, arguments.rounds, arguments.out)
        sam_on_photograph(device, arguments.rounds)
        testbed_on_a_scene(device, arguments.rounds, arguments.out.with_name("testbed.png"))


# (a) The kernel's own function


def prepare_qkv(
    batch: int, tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """q, k, v packed as the kernel wants them, (batch * tokens, heads, head_dim), and cu_seqlens (batch + 1,)."""
    q, k, v = (
        torch.randn(batch * tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(3)
    )
    return q, k, v, torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens


def kernel_function(device: torch.device, dtype: torch.dtype) -> None:
    table = Table(
        "call",
        "tokens",
        "blocks",
        "sparsity",
        "out",
        title="(a) block_sparse_attn_func",
        title_justify="left",
    )

    def add(name: str, tokens: str, mask: Tensor, out: Tensor) -> None:
        sparsity = 1 - mask.float().mean().item()
        table.add_row(
            name,
            tokens,
            f"{mask.shape[2]} x {mask.shape[3]}",
            f"{sparsity:.0%}",
            str(tuple(out.shape)),
        )

    # ViT-B/16 at 224: 197 tokens. Too few to gain anything; `bsa.check` says so.
    q, k, v, cu = prepare_qkv(2, 197, 12, 64, device, dtype)
    mask, head_types = masks.generate_vit_hybrid_mask(
        224, 16, BLOCK, 2, 12, num_global_heads=4, device=device
    )
    out = bsa.block_sparse_attn_func(q, k, v, cu, cu, head_types, None, mask, 197, 197, 0.0)
    add("ViT-B/16 at 224, 4 dense heads", "197", mask, out)
    advice = bsa.check(q, k, mask, head_mask_type=head_types, cu_seqlens_q=cu, cu_seqlens_k=cu)

    # SAM-B: 64 x 64 image tokens and 5 prompt tokens; the last head streams (first block and last two blocks).
    tokens, heads = 4096 + 5, 12
    q, k, v, cu = prepare_qkv(1, tokens, heads, 64, device, dtype)
    mask = masks.generate_sam_image_to_prompt_mask(
        4096, 5, BLOCK, 1, heads - 1, image_sparsity=0.6, device=device
    )
    head_types = torch.tensor([1] * (heads - 1) + [-1], dtype=torch.int32, device=device)
    streaming = torch.tensor([1, 2] * heads, dtype=torch.int32, device=device)
    out = bsa.block_sparse_attn_func(
        q, k, v, cu, cu, head_types, streaming, mask, tokens, tokens, 0.0
    )
    add("SAM-B, image and prompts, 1 streaming head", f"{tokens}", mask, out)

    # A decoder's 300 queries on the encoder's 4096 keys.
    q, _, _, cu_q = prepare_qkv(1, 300, heads, 64, device, dtype)
    _, k, v, cu_k = prepare_qkv(1, 4096, heads, 64, device, dtype)
    mask = masks.generate_sam_cross_attention_mask(300, 4096, BLOCK, 1, heads, device=device)
    head_types = torch.ones(heads, dtype=torch.int32, device=device)
    out = bsa.block_sparse_attn_func(q, k, v, cu_q, cu_k, head_types, None, mask, 300, 4096, 0.0)
    add("cross attention", "300 on 4096", mask, out)
    console.print(table)
    console.print(f"bsa.check on the first call:\n{advice}\n", markup=False, soft_wrap=True)


# (b) What sparsity buys


def sparsity_levels(device: torch.device, dtype: torch.dtype, rounds: int) -> None:
    heads, tokens = 12, 4096
    q, k, v = (torch.randn(1, heads, tokens, 64, device=device, dtype=dtype) for _ in range(3))
    head_masks = {
        sparsity: bsa.HeadMasks(
            masks.generate_vit_random_sparse_mask(
                1024, 16, BLOCK, 1, heads, sparsity, include_cls_token=False, device=device
            )
        )
        for sparsity in (0.5, 0.75)
    }
    runs = {"dense (torch SDPA)": lambda: F.scaled_dot_product_attention(q, k, v)}
    for sparsity, hm in head_masks.items():
        expected = bsa.sparse_attention(q, k, v, hm, backend="reference")
        error = (bsa.sparse_attention(q, k, v, hm) - expected).abs().max() / expected.abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 2e-2), (
            f"wrong result at {sparsity:.0%}: {error}"
        )
        runs[f"{sparsity:.0%} of the blocks skipped"] = lambda hm=hm: bsa.sparse_attention(
            q, k, v, hm
        )
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("(b) timing", total=rounds + 1)
        timings = paired(runs, rounds, on_round=lambda: progress.advance(task))
    table = Table(
        "attention, 4096 tokens, 12 heads of 64",
        "median",
        "of dense",
        "faster by",
        title="(b) timed here, results checked",
    )
    for name, timing in timings.items():
        low, high = timing.spread
        table.add_row(
            name,
            f"{timing.median * 1e3:.0f} ms",
            f"{timing.ratio:.2f} ({low:.2f}-{high:.2f})",
            f"{1 / timing.ratio:.2f} x",
        )
    console.print(table, "")


# (c) A model


def photograph(size: int) -> Image.Image:
    """The photograph that matplotlib ships, its middle square at size x size pixels."""
    image = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize(
        (size, size), Image.Resampling.BICUBIC
    )


def normalised(image: Image.Image, device: torch.device) -> Tensor:
    """(1, 3, H, W), with the mean and deviation that DINO and SAM are trained with."""
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return ((pixels - mean) / std).to(device)


def build_model(device: torch.device) -> torch.nn.Module:
    """A DINOv3-type ViT-B for 64 x 64 patches. Random weights, drawn wide enough that attention is not uniform."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        image_size=1024,
        patch_size=16,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_register_tokens=4,
        initializer_range=0.05,  # logits of standard deviation 1 and more; the default gives 0.3, where any mask looks harmless
    )
    return DINOv3ViTModel(config).eval().to(device)


def model_on_photograph(device: torch.device, rounds: int, out: Path) -> None:
    image = photograph(1024)
    pixels = normalised(image, device)
    model = build_model(device)
    plan = bsa.uniform_plan(model, "local_window", radius=8, dense_heads=3)
    bsa.sparsify_(model, plan)

    results: dict[str, Tensor] = {}

    def run_dense() -> None:
        with bsa.dense(model):
            results["dense"] = model(pixels).last_hidden_state

    def run_sparse() -> None:
        results["sparse"] = model(pixels).last_hidden_state

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("(c) the model, dense and sparse", total=rounds + 1)
        timings = paired(
            {"dense": run_dense, "sparse": run_sparse},
            rounds,
            on_round=lambda: progress.advance(task),
        )
    report = bsa.describe(model)
    error = (results["sparse"] - results["dense"]).norm() / results["dense"].norm()

    console.print("(c) DINO-type ViT-B, 64 x 64 patches, 5 special tokens, RANDOM WEIGHTS")
    console.print(str(report), markup=False, soft_wrap=True)
    sparse = timings["sparse"]
    console.print(
        f"whole model: dense {timings['dense'].median:.2f} s, sparse {sparse.median:.2f} s = {sparse.ratio:.2f} of dense; relative "
        f"error of the features {error.item():.3f} (random weights: no statement about a trained model)",
        soft_wrap=True,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    picture(image, out)
    console.print(f"picture: {out}", soft_wrap=True)


def picture(image: Image.Image, out: Path) -> None:
    """What the queries around the face see with a window of radius 8, in both orders."""
    views = []
    for order in ("raster", "tile"):
        layout = masks.TokenLayout((64, 64), num_prefix_tokens=5, order=order)
        mask = masks.local_window(layout, radius=8)
        views.append(
            View(f"{order} order, local_window(radius=8)", layout, mask, block_at(layout, 26, 34))
        )
    plot_views(image.resize((512, 512)), views).savefig(out, dpi=110)


# (d) Segment Anything


def build_sam(device: torch.device) -> torch.nn.Module:
    """The ViT-B image encoder for 1024 px. Random weights, drawn wide; fresh relative tables would be zero."""
    from transformers import SamVisionConfig, SamVisionModel

    model = SamVisionModel(SamVisionConfig(attn_implementation="sdpa")).eval()
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            parameter.normal_(0, 0.2)
        elif parameter.dim() >= 2:
            parameter.normal_(0, (1.3 if "qkv" in name else 0.7) * parameter[0].numel() ** -0.5)
    return model.to(device)


def sam_on_photograph(device: torch.device, rounds: int) -> None:
    pixels = normalised(photograph(1024), device)
    upstream = build_sam(device)
    exact, sparse = copy.deepcopy(upstream), copy.deepcopy(upstream)
    bsa.sparsify_(exact, bsa.dense_plan(exact))
    bsa.sparsify_(sparse, bsa.uniform_plan(sparse, "local_window", radius=12))
    models = {
        "transformers, N x N bias": upstream,
        "exact: a dense plan": exact,
        "sparse global layers": sparse,
    }
    results: dict[str, Tensor] = {}

    def run(name: str) -> None:
        results[name] = models[name](pixels).last_hidden_state

    rounds = max(1, rounds // 2)  # these take long
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("(d) SAM's encoder", total=rounds)
        runs = {name: lambda name=name: run(name) for name in models}
        timings = paired(runs, rounds, warmup=0, on_round=lambda: progress.advance(task))
    dense = next(iter(results.values()))
    table = Table(
        "SAM ViT-B encoder, 1024 px",
        "median",
        "of transformers'",
        "difference of the features",
        title="(d) RANDOM WEIGHTS, the photograph, timed here",
        title_justify="left",
    )
    for name, timing in timings.items():
        difference = ((results[name] - dense).norm() / dense.norm()).item()
        table.add_row(
            name,
            f"{timing.median:.1f} s",
            f"{timing.ratio:.2f}",
            f"{difference:.0e}" if difference else "",
        )
    console.print("", table)
    report = bsa.describe(sparse)
    console.print(
        f"sparse: {report.layers[2].sparsity:.0%} of the global layers' blocks skipped; {report.cost.sentence}",
        soft_wrap=True,
    )


# (e) A model that has learned something


def testbed_on_a_scene(device: torch.device, rounds: int, out: Path) -> None:
    """A trained model (examples/testbed), a scene it has not seen: what half of the blocks less does to its answer."""
    testbed = model.load(device=device)
    plan = evaluate.pattern_plan("nearest:0.5", bsa.inspect(testbed))
    size = testbed.size.grid * testbed.size.patch
    scene = scenes.make(scenes.held_out(4)[-1:], size, scenes.HARD, device)
    table = Table(
        "",
        "blocks skipped",
        "IoU",
        "time",
        title="(e) a trained model: every instance like the one clicked on",
    )
    for name, answer in zip(
        ("dense", "sparse"), found := show.answers(testbed, plan, scene, rounds), strict=True
    ):
        table.add_row(
            name, f"{answer.sparsity:.0%}", f"{answer.iou:.3f}", f"{answer.milliseconds:.1f} ms"
        )
    console.print(table)
    show.picture(scene, *found).savefig(out, dpi=110)
    console.print(f"picture: {out}")


if __name__ == "__main__":
    main()
