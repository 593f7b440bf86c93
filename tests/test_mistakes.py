"""Errors for likely mistakes: type, words the message must have, and words that would mislead."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path

import pytest
import torch

import bsa_vision as bsa
from bsa_vision import masks
from bsa_vision.compare import compare
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.masks.pattern import CHECKS, PATTERNS, parameters
from bsa_vision.models.features import features
from tests.helpers import models

N, H = 577, 3  # 24 x 24 patches and one special token
GEN = masks.generate_vit_hybrid_mask
COMMON = dict(batch_size=1, num_heads=H, num_global_heads=1)


def qkv() -> list[torch.Tensor]:
    return [torch.zeros(1, H, N, 8) for _ in range(3)]


def hm(made_in: int = 128, image: int = 384, **options) -> bsa.HeadMasks:
    """Return HeadMasks generated for blocks of `made_in` tokens."""
    return bsa.HeadMasks(*GEN(image, 16, made_in, **COMMON), **options)


def attend(q=None, masks=None, k=None, v=None):
    given = qkv()
    return bsa.sparse_attention(
        given[0] if q is None else q,
        given[1] if k is None else k,
        given[2] if v is None else v,
        hm() if masks is None else masks,
    )


def swapped_axes():
    q, k, v = (x.transpose(1, 2) for x in qkv())
    return attend(q, None, k, v)


def packed(q=None, mask=None):
    q = qkv()[0][0].transpose(0, 1) if q is None else q
    cu, base, types = torch.tensor([0, N], dtype=torch.int32), *GEN(384, 16, 128, **COMMON)
    return bsa.block_sparse_attn_func(
        q, q, q, cu, cu, types, None, base if mask is None else mask, N, N, 0.0
    )


class Once:
    """Model, image and plans shared by all tests, which do not change them."""

    layout = TokenLayout((24, 24), num_prefix_tokens=1, order="tile")

    @cached_property
    def model(self):
        return models.make("dinov3")

    @cached_property
    def image(self):
        return models.image(96, 96)

    def plan(self, pattern="local_window", **options):
        return bsa.uniform_plan(self.model, pattern, **options)

    def tune(self, images=None, **options):
        given = [self.image] * 3 if images is None else images
        return bsa.tune(self.model, given, **(options or {"sparsity": 0.5}))


ONCE = Once()
PIXELS = torch.zeros(3, 96, 96)
Value, Type, Plan, Missing = ValueError, TypeError, bsa.PlanError, FileNotFoundError

# name: (call, exception, words required in the message, words forbidden in it)
TENSORS = {
    "(B, N, H, D)": (swapped_axes, Value, "(B, H, N, D) | transpose(1, 2)", "rebuild"),
    "(B, N, H, D) in check": (
        lambda: fail(bsa.check(*[x.transpose(1, 2) for x in qkv()[:2]], hm())),
        Value,
        "transpose(1, 2)",
        "rebuild | make the mask",
    ),
    "(n, H, D) in a list": (
        lambda: bsa.sparse_attention(*[[x[0].transpose(0, 1)] for x in qkv()], [hm()]),
        Value,
        "(H, n, D) | transpose(0, 1)",
        "",
    ),
    "(H, total, D), packed": (
        lambda: packed(qkv()[0][0]),
        Value,
        "(total, H, D) | transpose(0, 1)",
        "",
    ),
    "(B, N, H, D), packed": (
        lambda: packed(qkv()[0].transpose(1, 2)),
        Value,
        "(total, H, D) | flatten(0, 1)",
        "",
    ),
    "numpy": (lambda: attend(qkv()[0].numpy()), Type, "torch.as_tensor", ".float()"),
    "integers": (lambda: attend(qkv()[0].int()), Type, ".float()", "as_tensor"),
    "(B, N, H, D) to pack": (
        lambda: bsa.pack(qkv()[0].transpose(1, 2), TokenLayout((24, 24), num_prefix_tokens=1)),
        Value,
        "transpose(-3, -2)",
        "build the layout",
    ),
    "a grid to pack": (
        lambda: bsa.pack(qkv()[0], (24, 24)),
        Type,
        "masks.TokenLayout(grid)",
        "2 layouts",
    ),
    "two dtypes": (lambda: attend(qkv()[0].half()), Type, "one dtype", ""),
}
MASKS = {
    "the generators' tuple": (
        lambda: attend(masks=GEN(384, 16, 128, **COMMON)),
        Type,
        "bsa.HeadMasks(*generated)",
        "wrap",
    ),
    "the tuple in HeadMasks": (
        lambda: bsa.HeadMasks(GEN(384, 16, 128, **COMMON)),
        Type,
        "(*generated)",
        "as_tensor",
    ),
    "the tuple, packed": (
        lambda: packed(mask=GEN(384, 16, 128, **COMMON)),
        Type,
        "(*generated)",
        "attribute",
    ),
    "the tuple in check": (
        lambda: fail(bsa.check(*qkv()[:2], GEN(384, 16, 128, **COMMON))),
        Value,
        "(*generated)",
        "as_tensor",
    ),
    "the tuple for a layer": (
        lambda: bsa.SparsityPlan.from_head_masks(
            bsa.inspect(ONCE.model), {"self.0": GEN(384, 16, 128, **COMMON)}
        ),
        Type,
        "(*generated)",
        "attribute",
    ),
    "a list of masks": (
        lambda: bsa.HeadMasks([masks.local_window(ONCE.layout)] * 3),
        Type,
        "masks.stack_heads(list, 1)",
        "as_tensor",
    ),
    "HeadMasks twice": (lambda: bsa.HeadMasks(hm()), Type, "as it is", "as_tensor"),
    "a pattern for masks": (
        lambda: attend(masks=Pattern("axial")),
        Type,
        "from_patterns",
        "as_tensor",
    ),
    "a name for masks": (lambda: attend(masks="axial"), Type, "from_patterns", "as_tensor"),
    "a mask of tokens": (
        lambda: attend(masks=torch.ones(N, N, dtype=torch.bool)),
        Type,
        "mask of tokens | scaled_dot_product_attention",
        "wrap",
    ),
    "a mask of tokens, wrapped": (
        lambda: attend(masks=bsa.HeadMasks(torch.ones(1, H, N, N, dtype=torch.bool))),
        Value,
        "mask of tokens",
        "block_size=1",
    ),
    "blocks of 64": (lambda: attend(masks=hm(64)), Value, "pass block_size=64 to HeadMasks", ""),
    "blocks of 64 for a layout": (
        lambda: hm(64, layout=TokenLayout((24, 24), num_prefix_tokens=1)),
        Value,
        "pass block_size=64 to TokenLayout",
        "",
    ),
    "another image size": (
        lambda: attend(masks=hm(image=512)),
        Value,
        "this many tokens",
        "block_size=",
    ),
    "floats that are added": (
        lambda: bsa.HeadMasks(torch.zeros(1, H, 5, 5)),
        Type,
        "mask == 0",
        "",
    ),
    "two axes": (
        lambda: bsa.HeadMasks(torch.ones(5, 5, dtype=torch.bool)),
        Value,
        "mask[None, None]",
        "",
    ),
    "three axes": (
        lambda: bsa.HeadMasks(torch.ones(H, 5, 5, dtype=torch.bool)),
        Value,
        "mask[None]",
        "None, None",
    ),
    "a grid for a layout": (
        lambda: hm(layout=(24, 24)),
        Type,
        "masks.TokenLayout(grid)",
        "attribute",
    ),
    "masks of two layouts": (
        lambda: masks.stack_heads([masks.axial(ONCE.layout), masks.axial(TokenLayout((9, 9)))], 1),
        Value,
        "one TokenLayout",
        "stack expects",
    ),
    "tile order for a model": (
        lambda: bsa.SparsityPlan.from_head_masks(
            bsa.inspect(ONCE.model),
            {"self.0": bsa.HeadMasks(masks.stack_heads([masks.axial(ONCE.layout)] * 4, 1))},
        ),
        Plan,
        "pass layout= to HeadMasks",
        "",
    ),
}
PATTERN_MISTAKES = {
    "sparsity in percent": (
        lambda: GEN(384, 16, 128, **COMMON, sparsity=75),
        Value,
        "0.75 for 75 %",
        "",
    ),
    "sparsity in percent, in a pattern": (
        lambda: Pattern("nearest", sparsity=75),
        Value,
        "0.75 for 75 %",
        "",
    ),
    "radius 8.5": (lambda: ONCE.plan(radius=8.5), Plan, "radius=8.5 | integer", ""),
    "radius 8.5 in a pattern": (
        lambda: Pattern("local_window", radius=8.5),
        Value,
        "radius=8.5 | integer",
        "",
    ),
    "a negative stride": (
        lambda: Pattern("strided", stride=-1),
        Value,
        "stride=-1 | >= 1",
        "",
    ),
    "no centers": (lambda: Pattern("region", radius=3), Value, "centers=[(10, 20)]", "argument"),
    "one center": (
        lambda: Pattern("region", centers=(10, 20)),
        Value,
        "pair (rows, columns)",
        "not iterable",
    ),
    "local:8": (lambda: ONCE.plan("local:8"), Plan, "'local_window', radius=8", ""),
    "window:14:shift=7": (
        lambda: ONCE.plan("window:14:shift=7"),
        Plan,
        "'window', size=14, shift=7",
        "",
    ),
    "local": (lambda: ONCE.plan("local", radius=8), Plan, "did you mean 'local_window'?", ""),
    "windw": (lambda: Pattern("windw"), Value, "did you mean 'window'?", ""),
    "nothing like it": (lambda: Pattern("gaussian"), Value, "allowed are dense", "did you mean"),
    "a grid": (
        lambda: masks.local_window((24, 24), radius=4),
        Type,
        "masks.TokenLayout(grid)",
        "attribute",
    ),
    "a grid for a Pattern": (
        lambda: Pattern("axial")((24, 24)),
        Type,
        "masks.TokenLayout(grid)",
        "attribute",
    ),
    "a grid for keys": (
        lambda: masks.axial(ONCE.layout, keys=(24, 24)),
        Type,
        "masks.TokenLayout(grid)",
        "attribute",
    ),
    "dense_head": (
        lambda: ONCE.plan(radius=8, dense_head=2),
        Plan,
        "did you mean dense_heads?",
        "has no parameter",
    ),
    "layer": (
        lambda: ONCE.plan().replace(layer=2, pattern="dense"),
        Plan,
        "did you mean layers?",
        "has no parameter",
    ),
    "half a layer": (lambda: ONCE.plan(layers=2.5), Plan, "layers=2.5", "not iterable"),
    "half a head": (
        lambda: ONCE.plan().replace(heads=2.5, pattern="dense"),
        Plan,
        "heads=2.5",
        "not iterable",
    ),
    "no such layer": (lambda: ONCE.plan(layers=[99]), Plan, "self.0, self.1", ""),
    "a model for a spec": (
        lambda: bsa.SparsityPlan.uniform(ONCE.model, "axial"),
        Type,
        "bsa.inspect(model)",
        "attribute",
    ),
    "heads= forgotten": (
        lambda: bsa.HeadMasks.from_patterns(ONCE.layout, "axial"),
        Value,
        "heads=12",
        "",
    ),
    "heads= and another list": (
        lambda: bsa.HeadMasks.from_patterns(ONCE.layout, ["axial"] * 2, heads=3),
        Value,
        "2 patterns for heads=3",
        "",
    ),
    "no patterns": (lambda: bsa.HeadMasks.from_patterns(ONCE.layout, []), Type, "one per head", ""),
    "no pattern": (
        lambda: bsa.HeadMasks.from_patterns(ONCE.layout, [8]),
        Type,
        "the pattern of head 0 is a int",
        "",
    ),
    "a mask of another grid": (
        lambda: bsa.HeadMasks.from_patterns(ONCE.layout, [masks.axial(TokenLayout((9, 9)))]),
        Value,
        "the mask of head 0 | (5, 5)",
        "",
    ),
    "prompts forgotten": (
        lambda: bsa.HeadMasks.from_patterns(ONCE.layout, "prompt_region", heads=1),
        Value,
        "boxes is None",
        "",
    ),
    "boxes of no image": (
        lambda: bsa.HeadMasks.from_patterns(
            ONCE.layout, "prompt_region", heads=1, boxes=[(1, 2, 3, 4)]
        ),
        Value,
        "one list of | per image",
        "argument",
    ),
}
PLANS = {
    "no such file": (
        lambda: bsa.sparsify_(ONCE.model, "nope.json"),
        Missing,
        "'nope.json': no such file",
        "Errno",
    ),
    "a pattern's name": (
        lambda: bsa.sparsify_(ONCE.model, "local_window"),
        Missing,
        "bsa.uniform_plan(model, 'local_window')",
        "",
    ),
    "a file that is no plan": (
        lambda: bsa.sparsify_(ONCE.model, Path(__file__)),
        Plan,
        "not JSON",
        "",
    ),
    "a dict": (
        lambda: bsa.sparsify_(ONCE.model, {"local_window": 8}),
        Type,
        "uniform_plan | load",
        "from_head_masks",
    ),
    "a dict of HeadMasks": (
        lambda: bsa.sparsify_(ONCE.model, {"self.0": hm()}),
        Type,
        "from_head_masks",
        "load",
    ),
    "HeadMasks": (lambda: bsa.sparsify_(ONCE.model, hm()), Type, "from_head_masks", "load"),
    "a Pattern": (
        lambda: bsa.sparsify_(ONCE.model, Pattern("axial")),
        Type,
        "uniform_plan(model, pattern)",
        "load",
    ),
    "the wrong way round": (
        lambda: bsa.sparsify_(ONCE.plan(), ONCE.model),
        Type,
        "the model comes first",
        "load",
    ),
    "a layout of a model": (
        lambda: ONCE.plan().layout(ONCE.model),
        Type,
        "bsa.inspect(model)",
        "attribute",
    ),
    "a check of a model": (
        lambda: ONCE.plan().check(ONCE.model),
        Type,
        "bsa.inspect(model)",
        "attribute",
    ),
    "a grid to compile for": (
        lambda: ONCE.plan().compile("self.0", (9, 9)),
        Type,
        "TokenLayout(grid)",
        "replace",
    ),
    "a grid to freeze for": (
        lambda: ONCE.plan().freeze((9, 9)),
        Type,
        "TokenLayout(grid)",
        "replace",
    ),
    "the sparsity of a grid": (
        lambda: ONCE.plan().sparsity((9, 9)),
        Type,
        "TokenLayout(grid)",
        "replace",
    ),
    "a mask as pattern": (
        lambda: ONCE.plan(masks.axial(ONCE.layout)),
        Plan,
        "is a Tensor | from_head_masks",
        "tensor([",
    ),
    "HeadMasks as pattern": (lambda: ONCE.plan(hm()), Plan, "is a HeadMasks | from_head_masks", ""),
    "a pattern per head": (
        lambda: ONCE.plan(["dense", "axial"]),
        Plan,
        "plan.replace(heads=",
        "from_head_masks",
    ),
    "a layer's number": (
        lambda: bsa.SparsityPlan.from_head_masks(bsa.inspect(ONCE.model), {9: hm()}),
        Plan,
        "no attention layer 9",
        "iterable",
    ),
    "save as a folder": (
        lambda: ONCE.plan().save("."),
        IsADirectoryError,
        "'.'",
        str(Path().resolve()),
    ),
    "save into no folder": (
        lambda: ONCE.plan().save("/nope/plan.json"),
        Missing,
        "'/nope/plan.json' | folder",
        ".tmp",
    ),
    "a report of no tuning": (lambda: bsa.report(ONCE.plan(), "x.html"), Value, "bsa.tune", ""),
    "a report of no file": (
        lambda: bsa.report("nope.json", "x.html"),
        Missing,
        "'nope.json'",
        "attribute",
    ),
}
MODELS = {
    "a name": (lambda: bsa.describe("facebook/dinov3"), Type, "load it first", ""),
    "a class": (lambda: bsa.describe(torch.nn.Linear), Type, "create an instance, Linear(...)", ""),
    "a convnet": (
        lambda: bsa.uniform_plan(torch.nn.Conv2d(3, 3, 3), "axial"),
        Plan,
        "found: none",
        "",
    ),
    "an encoder of torch": (
        lambda: bsa.uniform_plan(torch.nn.TransformerEncoderLayer(64, 4), "axial"),
        Plan,
        "MultiheadAttention | bsa_vision.sparse_attention",
        "",
    ),
    "a pipeline": (lambda: bsa.inspect(Holder(torch.nn.Linear(2, 2))), Type, "pass its .model", ""),
}
IMAGES = {
    "uint8": (
        lambda: ONCE.tune([torch.zeros(1, 3, 96, 96).byte()] * 3),
        Value,
        "torch.uint8 | / 255",
        "",
    ),
    "channels last": (
        lambda: ONCE.tune([PIXELS.permute(1, 2, 0)] * 3),
        Value,
        "permute(2, 0, 1)[None]",
        "stack",
    ),
    "channels last, batched": (
        lambda: ONCE.tune([PIXELS.permute(1, 2, 0)[None]] * 3),
        Value,
        "permute(0, 3, 1, 2)",
        "Given groups",
    ),
    "no batch": (lambda: ONCE.tune([PIXELS] * 3), Value, "image[None]", "permute"),
    "grey": (lambda: ONCE.tune([PIXELS[None, :1]] * 3), Value, "(B, 3, h, w)", "permute"),
    "one tensor": (lambda: ONCE.tune(torch.zeros(4, 3, 96, 96)), Value, "images.split(1)", ""),
    "paths": (
        lambda: ONCE.tune(["a.jpg", "b.jpg"]),
        Value,
        "image_files.read | bsa-vision tune",
        "stack",
    ),
    "a folder": (lambda: ONCE.tune("photos"), Type, "'photos' | image_files.read", ""),
    "a folder as Path": (lambda: ONCE.tune(Path("photos")), Type, "image_files.read", "iterable"),
    "a folder for another target": (
        lambda: ONCE.tune(
            "photos", sparsity=0.5, target=lambda model, image: features(model, image)
        ),
        Type,
        "'photos'",
        "",
    ),
    "none": (
        lambda: bsa.tune(ONCE.model, None, sparsity=0.5),
        Type,
        "images is a NoneType",
        "iterable",
    ),
    "of a loader": (
        lambda: ONCE.tune([[ONCE.image, torch.zeros(1)]] * 3),
        Value,
        "for image, label in",
        "",
    ),
    "of a processor": (
        lambda: ONCE.tune([{"pixel_values": ONCE.image}] * 3),
        Value,
        "image['pixel_values']",
        "",
    ),
    "arrays": (lambda: ONCE.tune([ONCE.image.numpy()] * 3), Value, "torch.as_tensor", ""),
    "Pillow's": (lambda: ONCE.tune([pillow()] * 3), Value, "Pillow's | tensors", "stack"),
    "one of Pillow's": (lambda: ONCE.tune(pillow()), Type, "Pillow's", "iterable"),
    "sparsity in percent": (lambda: ONCE.tune(sparsity=60), Value, "0.6 for 60 %", ""),
    "all sparse": (lambda: ONCE.tune(sparsity=1.0), Value, "below 1", ""),
    "order": (
        lambda: ONCE.tune(sparsity=0.5, order="tiles"),
        Value,
        "'auto', 'raster', 'tile'",
        "",
    ),
    "candidate": (lambda: ONCE.tune(sparsity=0.5, candidates="local"), Value, "['local']", "'l'"),
    "a name for a model": (
        lambda: bsa.tune("timm:vit", [ONCE.image] * 3, sparsity=0.5),
        Type,
        "load it first",
        "",
    ),
    "paths to compare": (
        lambda: compare(ONCE.model, ["a.jpg"]),
        Value,
        "image_files.read",
        "attribute",
    ),
}


class Holder:
    """An object that holds a model without being one."""

    def __init__(self, model):
        self.model = model


def pillow():
    from PIL import Image

    return Image.new("RGB", (96, 96))


def fail(report: bsa.CheckReport) -> None:
    """Raise the report of `check` as an error."""
    raise ValueError(str(report))


ALL = {
    f"{group}: {name}": case
    for group, cases in {
        "tensors": TENSORS,
        "masks": MASKS,
        "patterns": PATTERN_MISTAKES,
        "plans": PLANS,
        "models": MODELS,
        "images": IMAGES,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", ALL)
def test_mistake(name):
    call, error, required, forbidden = ALL[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    missing = [words for words in required.split(" | ") if words not in message]
    wrong = [words for words in forbidden.split(" | ") if words and words in message]
    assert not missing, message
    assert not wrong, message
    assert len(message) < 420, message


RIGHT = {
    "tensors": attend,
    "packed": packed,
    "blocks of 64": lambda: attend(masks=hm(64, block_size=64)),
    "blocks of 64, layout": lambda: attend(
        masks=hm(64, layout=TokenLayout((24, 24), num_prefix_tokens=1, block_size=64))
    ),
    "a list": lambda: bsa.HeadMasks(masks.stack_heads([masks.local_window(ONCE.layout)] * 3, 1)),
    "one pattern": lambda: attend(masks=bsa.HeadMasks.from_patterns(ONCE.layout, "axial", heads=H)),
    "dense_heads": lambda: ONCE.plan(radius=8, dense_heads=2),
    "sparsity": lambda: GEN(384, 16, 128, **COMMON, sparsity=0.75),
    "a pattern": lambda: Pattern("window", size=14, shift=7),
    "numpy's numbers": lambda: Pattern("local_window", radius=torch.tensor([3]).numpy()[0]),
    "image": lambda: features(ONCE.model, PIXELS.permute(1, 2, 0)[None].permute(0, 3, 1, 2)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_advised_works(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIGHT[name]()


def test_a_plans_path_is_a_plan(tmp_path):
    model, plan = models.make("dinov3"), ONCE.plan(radius=2)
    plan.save(tmp_path / "plan.json")
    for path in (tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert "local_window(radius=2)" in str(bsa.describe(bsa.sparsify_(model, path)))
        bsa.restore_(model)


def test_nothing_is_left_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("here")
    for path in (tmp_path / "no" / "plan.json", tmp_path / "file" / "plan.json"):
        with pytest.raises(FileNotFoundError) as caught:
            ONCE.plan().save(path)
        assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="too long") as long:
        ONCE.plan().save(tmp_path / ("a" * 300))
    assert long.value.filename == str(tmp_path / ("a" * 300))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_all_that_is_allowed_is_said_to_be_the_least():
    with pytest.warns(
        UserWarning,
        match=r"sparsity=1\.0 keeps one block of 5 in each row.*0\.0 to keep every block",
    ):
        GEN(384, 16, 128, **COMMON, sparsity=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GEN(384, 16, 128, **COMMON, sparsity=0.99)


def test_errors_above_the_features_are_warned_of():
    from bsa_vision.tuning.tune import _asked

    with pytest.warns(UserWarning, match=r"max_error=5 .* 0\.05 is 5 %"):
        assert _asked({"max_error": 5}) == ("max_error", 5.0)


def test_every_parameter_is_checked():
    assert {param for name in PATTERNS for param in parameters(name)} == set(CHECKS)
