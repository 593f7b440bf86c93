"""FLOPs from shapes equal torch's counter, on real classes at real sizes (meta tensors)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bsa_vision as bsa
from bsa_vision.models.encoder import SAM, create_encoder
from tests.helpers.models import MODELS as VITS
from tests.helpers.models import features, sam3
from tests.helpers.sam_models import MODELS as SAMS
from tests.helpers.timm_models import MODELS as TIMM


def counted(model, pixels) -> int:
    # The counter's hooks fail on parameters that a module returns unchanged.
    model.requires_grad_(False)
    # The counter has no formula for torch's fused attention on CPUs: use plain products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        features(model, pixels)
    return counter.get_total_flops()


def check(model, height, width, device="meta"):
    expected = counted(model, torch.zeros(1, 3, height, width, device=device))
    cost = bsa.cost(bsa.inspect(model, (height, width)))
    assert cost.flops == pytest.approx(expected, rel=0.01)
    # Negative twin: the counter includes attention products; without them the counts differ.
    products = sum(layer.products for layer in cost.layers)
    assert products > 0.02 * expected
    assert cost.flops - products != pytest.approx(expected, rel=0.01)
    return cost


class TestAgainstTorchsCounter:
    @pytest.mark.parametrize("size", SAM)
    def test_segment_anything(self, size):
        from segment_anything import sam_model_registry

        with torch.device("meta"):
            encoder = sam_model_registry[size]().image_encoder
        cost = check(encoder, 1024, 1024)
        # 22, 10 and 6 % of the encoder's FLOPs are products in global layers.
        assert cost.share() == pytest.approx(
            {"vit_b": 0.22, "vit_l": 0.10, "vit_h": 0.06}[size], abs=0.01
        )
        assert cost.ceiling() == pytest.approx(1 / (1 - cost.share()))

    @pytest.mark.parametrize(
        "name", [name for name in SAMS if name not in ("create_encoder", "timm, rope")]
    )
    def test_sam_in_every_code_base(self, name):
        """Padded windows and the convolutions after DeepSeek-OCR's neck are counted."""
        with torch.device("meta"):
            model = SAMS[name](size=96)
        check(model, 96, 96)

    def test_timm_rectangular_and_rope(self):
        with torch.device("meta"):
            check(SAMS["timm"](size=(96, 160)), 96, 160)
        check(SAMS["timm, rope"](), 96, 96, device="cpu")

    @pytest.mark.parametrize("name", VITS)
    def test_transformers_vits(self, name):
        sizes = {"num_patches": 256} if name == "siglip2" else {"image_size": 128}
        check(VITS[name](**sizes), 128, 128, device="cpu")

    def test_sam3(self):
        """Padded windows are counted."""
        check(sam3(image_size=128), 128, 128, device="cpu")

    @pytest.mark.parametrize("name", TIMM)
    def test_timm(self, name):
        check(TIMM[name](), 96, 96, device="cpu")

    def test_bsa_encoder(self):
        """Torch's counter does not see the sparse attention operator, but everything else."""
        model = create_encoder(2, 32, 2, (1,), 5, image_size=96, patch_size=8, out_channels=16)
        cost = bsa.cost(bsa.inspect(model))
        products = sum(layer.products for layer in cost.layers)
        assert counted(model, torch.zeros(1, 3, 96, 96)) == pytest.approx(
            cost.flops - products, rel=0.01
        )


def test_by_hand():
    """One global layer of 4 x 4 patches, and one with 2 x 2 windows of 3 x 3 patches."""
    model = create_encoder(
        2, 8, 2, (1,), 3, image_size=16, patch_size=4, out_channels=6, mlp_ratio=2
    )
    cost = bsa.cost(bsa.inspect(model))
    windowed, whole = cost.layers
    assert (windowed.windows, windowed.tokens, whole.windows, whole.tokens) == (4, 9, 1, 16)
    assert whole.products == 2 * (2 * 16 * 16 * 4) * 2
    assert windowed.products == 4 * 2 * (2 * 9 * 9 * 4) * 2
    assert whole.rel_pos == 2 * (2 * 16 * (4 + 4) * 4)
    assert whole.linear == 2 * 16 * (8 * 24 + 8 * 8 + 2 * 8 * 16)
    assert windowed.linear == 2 * (36 * (8 * 24 + 8 * 8) + 16 * 2 * 8 * 16)
    assert cost.outside == 2 * 16 * (3 * 16 * 8 + 8 * 6 + 6 * 6 * 9)
    assert (whole.moved, whole.matrix) == (4 * 16 * 8 * 4, 2 * 16 * 16 * 4)
    assert (
        cost.gain({"self.1": 1.0})
        == pytest.approx(cost.ceiling())
        == pytest.approx(cost.ceiling(["self.1"]))
    )
    assert cost.gain({}) == 1
    assert cost.share(["self.0", "self.1"]) == pytest.approx(
        (whole.products + windowed.products) / cost.flops
    )


def test_a_window_as_large_as_the_image_is_a_window():
    model = create_encoder(4, 32, 2, (1, 3), 14, image_size=224)
    cost = bsa.cost(bsa.inspect(model))
    assert [layer.is_global for layer in cost.layers] == [False, True, False, True]
    assert (
        cost.ceiling()
        == cost.ceiling(["self.1", "self.3"])
        < cost.ceiling([layer.key for layer in cost.layers])
    )
    assert "in the global layers" in cost.sentence


def test_larger_images_and_half_precision():
    model = create_encoder(2, 8, 2, (1,), 3, image_size=16, patch_size=4)
    small, large = (bsa.cost(bsa.inspect(model, size), element_size=2) for size in (16, 32))
    assert large.layers[1].products == 16 * small.layers[1].products
    assert large.ceiling() > small.ceiling()
    assert small.layers[1].matrix == 2 * 16 * 16 * 2


def test_what_it_says():
    model = create_encoder(2, 8, 2, (1,), 3, image_size=16, patch_size=4)
    text = str(bsa.cost(bsa.inspect(model)))
    assert text.splitlines()[-1].startswith(
        "sam at 16 x 16 px: sparsity in the global layers can gain at most 1."
    )
    assert "over exact attention" in text
    with torch.device("meta"):
        vit_h = create_encoder(**SAM["vit_h"])
    assert (
        "can gain at most 1.06x over exact attention, 6% of"
        in bsa.cost(bsa.inspect(vit_h)).sentence
    )


def test_bad_input():
    with pytest.raises(
        TypeError, match=r"spec is a Linear: expected a ModelSpec; pass bsa\.inspect"
    ):
        bsa.cost(torch.nn.Linear(2, 2))
    spec = bsa.ModelSpec("vit", (bsa.LayerSpec("a", 0, 2, 4),), (4, 4), (4, 4))
    with pytest.raises(
        ValueError, match="layers with attention_weights=0: FLOPs shares need the number of weights"
    ):
        bsa.cost(spec)
