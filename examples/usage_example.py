"""Use bsa-vision in five steps, on a CPU or on CUDA:

    python examples/usage_example.py [--device cpu] [--rounds 3] [--out out/usage_example.png]

1. Sparse attention on tensors: a layout, a pattern, one call.
2. Time attention at 50 % and 75 % sparsity, with checked results.
3. Make the heads of a DINOv3-type ViT-B sparse and run it on a photo.
4. Run SAM's image encoder exactly, without its N x N bias, and with sparse global layers.
5. Ask a small trained model, dense and sparse, about the same picture.

Steps 3 and 4 use random weights: their errors say nothing about trained models. Step 5 does.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script: find `examples.testbed`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bsa_vision as bsa
from bsa_vision import masks
from bsa_vision.measure.timing import paired
from bsa_vision.models import image_files
from bsa_vision.viz import View, block_at, plot_views
from examples.testbed import evaluate, model, scenes, show

PHOTO = Path(get_sample_data("grace_hopper.jpg", asfileobj=False))  # matplotlib ships it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"cpu or cuda. Default: {device}")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds. Default: 3")
    out = Path("out/usage_example.png")
    parser.add_argument("--out", type=Path, default=out, help=f"picture of step 3. Default: {out}")
    options = parser.parse_args()
    device = torch.device(options.device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    with torch.no_grad():
        attention_on_tensors(device)
        sparsity_levels(device, options.rounds)
        vit_on_a_photo(device, options.rounds, options.out)
        sam_on_a_photo(device, options.rounds)
        trained_model(device, options.rounds, options.out.with_name("testbed.png"))


def attention_on_tensors(device: torch.device) -> None:
    print("\n1. Attention on tensors")

    # An image of 48 x 48 patches after a class token, in tiles of 8 x 16 patches: one block each.
    layout = masks.TokenLayout((48, 48), num_prefix_tokens=1, order="tile")
    q, k, v = (torch.randn(1, 12, layout.num_tokens, 64, device=device) for _ in range(3))

    # 4 dense heads; the other 8 attend within 4 patches. All of them see the class token.
    window = masks.Pattern("local_window", radius=4)
    head_masks = bsa.HeadMasks.from_patterns(layout, ["dense"] * 4 + [window] * 8)
    out = bsa.sparse_attention(q, k, v, head_masks)  # tokens go in and come out in model order
    exact = bsa.sparse_attention(q, k, v, head_masks, backend="reference")
    print(f"out {tuple(out.shape)}, {relative_error(out, exact):.0e} from the reference")
    print(f"bsa.check: {bsa.check(q, k, head_masks)}")

    # The CUDA kernel's own function takes packed tokens and block masks; it runs anywhere.
    block_mask, head_types = masks.generate_vit_hybrid_mask(
        224, 16, 128, 2, 12, num_global_heads=4, device=device
    )
    q, k, v = (torch.randn(2 * 197, 12, 64, device=device) for _ in range(3))
    cu_seqlens = torch.tensor([0, 197, 394], dtype=torch.int32, device=device)
    out = bsa.block_sparse_attn_func(
        q, k, v, cu_seqlens, cu_seqlens, head_types, None, block_mask, 197, 197, 0.0
    )
    print(f"block_sparse_attn_func on two images of ViT-B/16 at 224 px: out {tuple(out.shape)}")


def sparsity_levels(device: torch.device, rounds: int) -> None:
    print("\n2. Attention alone: 4096 tokens, 12 heads of 64, random blocks, checked")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, 12, 4096, 64, device=device, dtype=dtype) for _ in range(3))
    runs = {"dense (torch SDPA)": lambda: F.scaled_dot_product_attention(q, k, v)}
    for sparsity in (0.5, 0.75):
        block_mask = masks.generate_vit_random_sparse_mask(
            1024, 16, 128, 1, 12, sparsity, include_cls_token=False, device=device
        )
        head_masks = bsa.HeadMasks(block_mask)
        exact = bsa.sparse_attention(q, k, v, head_masks, backend="reference")
        error = relative_error(bsa.sparse_attention(q, k, v, head_masks), exact)
        assert error < (1e-4 if dtype == torch.float32 else 2e-2), f"wrong result: {error}"
        runs[f"{sparsity:.0%} of the blocks skipped"] = lambda hm=head_masks: bsa.sparse_attention(
            q, k, v, hm
        )
    for name, timing in paired(runs, rounds).items():
        milliseconds = f"{timing.median * 1e3:.0f} ms"
        print(f"{name:<27} {milliseconds:>7}  {timing.ratio:.2f} of dense")


def vit_on_a_photo(device: torch.device, rounds: int, out: Path) -> None:
    print("\n3. A DINOv3-type ViT-B at 1024 px, RANDOM WEIGHTS")
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    # initializer_range: logits of standard deviation 1. With the default any mask looks harmless.
    config = DINOv3ViTConfig(
        image_size=1024,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_register_tokens=4,
        initializer_range=0.05,
    )
    vit = DINOv3ViTModel(config).eval().to(device)
    pixels = image_files.read(PHOTO, (1024, 1024)).to(device)

    bsa.sparsify_(vit, bsa.uniform_plan(vit, "local_window", radius=8, dense_heads=3))

    features: dict[str, Tensor] = {}

    def run_sparse() -> None:
        features["sparse"] = vit(pixels).last_hidden_state

    def run_dense() -> None:
        with bsa.dense(vit):  # the original attention, for as long as the block lasts
            features["dense"] = vit(pixels).last_hidden_state

    sparse = paired({"dense": run_dense, "sparse": run_sparse}, rounds)["sparse"]
    print(bsa.describe(vit))
    print(
        f"whole model: {sparse.median:.2f} s, {sparse.ratio:.2f} of dense; features differ by "
        f"{relative_error(features['sparse'], features['dense']):.3f}"
    )

    # What the queries around the face attend to, in raster and in tile order.
    views = []
    for order in ("raster", "tile"):
        layout = masks.TokenLayout((64, 64), num_prefix_tokens=5, order=order)
        mask = masks.local_window(layout, radius=8)
        block = block_at(layout, row=26, column=34)
        views.append(View(f"{order} order, local_window(radius=8)", layout, mask, block))
    photo = Image.open(PHOTO).convert("RGB").crop((0, 0, 512, 512))
    plot_views(photo, views).savefig(out, dpi=110)
    print(f"picture: {out}")


def sam_on_a_photo(device: torch.device, rounds: int) -> None:
    print("\n4. SAM's ViT-B image encoder at 1024 px, RANDOM WEIGHTS")
    upstream = build_sam().to(device)
    pixels = image_files.read(PHOTO, (1024, 1024)).to(device)
    exact, sparse = copy.deepcopy(upstream), copy.deepcopy(upstream)
    bsa.sparsify_(exact, bsa.dense_plan(exact))
    bsa.sparsify_(sparse, bsa.uniform_plan(sparse, "local_window", radius=12))

    encoders = {
        "transformers (SDPA)": upstream,
        "exact: a dense plan": exact,
        "sparse global layers": sparse,
    }
    features: dict[str, Tensor] = {}

    def run(name: str) -> None:
        features[name] = encoders[name](pixels).last_hidden_state

    runs = {name: lambda name=name: run(name) for name in encoders}
    for name, timing in paired(runs, max(1, rounds // 2), warmup=0).items():
        error = relative_error(features[name], features["transformers (SDPA)"])
        print(f"{name:<21} {timing.median:.1f} s  {timing.ratio:.2f}  differs by {error:.0e}")
    report = bsa.describe(sparse)
    print(f"{report.layers[2].sparsity:.0%} of the global layers' blocks skipped")
    print(report.cost.sentence)


def build_sam() -> nn.Module:
    """Build the encoder with weights drawn wide; fresh relative position tables would be zero."""
    from transformers import SamVisionConfig, SamVisionModel

    sam = SamVisionModel(SamVisionConfig(attn_implementation="sdpa")).eval()
    for name, parameter in sam.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            parameter.normal_(0, 0.2)
        elif parameter.dim() >= 2:
            parameter.normal_(0, (1.3 if "qkv" in name else 0.7) * parameter[0].numel() ** -0.5)
    return sam


def trained_model(device: torch.device, rounds: int, out: Path) -> None:
    """Ask for every instance like the one clicked on, in a scene the model has not seen."""
    print("\n5. A trained model (examples/testbed)")
    testbed = model.load(device=device)
    plan = evaluate.pattern_plan("nearest:0.5", bsa.inspect(testbed))
    size = testbed.size.grid * testbed.size.patch
    scene = scenes.make(scenes.held_out(4)[-1:], size, scenes.HARD, device)
    answers = show.answers(testbed, plan, scene, rounds)
    for name, answer in zip(("dense", "sparse"), answers, strict=True):
        skipped = f"{answer.sparsity:.0%} of the blocks skipped"
        print(f"{name:<7} {skipped:<27} IoU {answer.iou:.3f}  {answer.milliseconds:.1f} ms")
    show.picture(scene, *answers).savefig(out, dpi=110)
    print(f"picture: {out}")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|, Euclidean lengths."""
    return ((found - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
