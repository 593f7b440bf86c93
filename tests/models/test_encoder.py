"""`create_encoder`: SAM's weights, patterns, gradients, checkpointing, image sizes, errors."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bsa_vision as bsa
from bsa_vision.masks import Pattern
from bsa_vision.models.encoder import SAM, create_encoder
from tests.helpers.errors import relative_error
from tests.helpers.sam_models import image, make, own, redraw


def vit(**changes):
    torch.manual_seed(0)
    sizes = dict(
        depth=2, dim=32, heads=2, image_size=96, patch_size=8, out_channels=None, rel_pos=False
    )
    return redraw(create_encoder(**{**sizes, **changes}))


class TestCheckpoints:
    def whole_sam(self):
        """Return an encoder and a checkpoint of a whole SAM that contains its weights."""
        encoder = make("segment_anything")
        state = {f"image_encoder.{key}": value for key, value in encoder.state_dict().items()}
        return encoder, {**state, "prompt_encoder.no_mask_embed.weight": torch.zeros(1, 16)}

    @pytest.mark.parametrize("way", ["state dict", ".pth", ".safetensors", "encoder only"])
    def test_segment_anythings_weights(self, way, tmp_path):
        encoder, state = self.whole_sam()
        source = tmp_path / f"sam{way}"
        if way == ".pth":
            torch.save(state, source)
        elif way == ".safetensors":
            save_file(state, source)
        else:
            source = state if way == "state dict" else encoder.state_dict()
        ours = make("create_encoder", seed=1)
        with torch.no_grad():
            expected = encoder(image())
            assert relative_error(ours(image()), expected) > 0.1
            assert ours.load_checkpoint(source) is ours
            assert relative_error(ours(image()), expected) < 1e-5

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (
                lambda s: s.pop("blocks.1.attn.qkv.bias"),
                r"1 missing: blocks\.1\.attn\.qkv\.bias\).*create the encoder with",
            ),
            (
                lambda s: [s.pop(key) for key in list(s) if "blocks.2" in key],
                r"14 missing: blocks\.2.* and 11 more",
            ),
            (
                lambda s: s.update({"blocks.4.norm1.weight": torch.ones(32)}),
                r"1 unexpected: blocks\.4\.norm1\.weight",
            ),
            (
                lambda s: s.update(pos_embed=torch.ones(1, 8, 8, 32)),
                r"pos_embed \(1, 8, 8, 32\) for \(1, 12, 12, 32\)",
            ),
        ],
    )
    def test_a_checkpoint_that_does_not_fit(self, spoil, message):
        ours, state = make("create_encoder"), make("segment_anything", seed=1).state_dict()
        before = copy.deepcopy(ours.state_dict())
        spoil(state)
        with pytest.raises(ValueError, match=message):
            ours.load_checkpoint(state)
        assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())

    @pytest.mark.parametrize(
        "value",
        [
            np.zeros((1, 12, 12, 32)),
            torch.zeros(1, 12, 12, 32, device="meta"),
            torch.zeros(1, 12, 12, 32).to_sparse(),
            torch.zeros(1, 12, 12, 32, dtype=torch.complex64),
            torch.zeros(1, 12, 12, 32, dtype=torch.int8),
            [1.0],
        ],
        ids=["array", "meta", "sparse", "complex", "int8", "list"],
    )
    def test_values_that_are_not_plain_float_tensors(self, value):
        ours, state = make("create_encoder"), make("segment_anything", seed=1).state_dict()
        before = copy.deepcopy(ours.state_dict())
        with pytest.raises(
            ValueError,
            match=r"holds pos_embed: every value must be a dense tensor of floating-point numbers",
        ):
            ours.load_checkpoint({**state, "pos_embed": value})
        assert all(torch.equal(tensor, before[key]) for key, tensor in ours.state_dict().items())

    @pytest.mark.parametrize("size", [(64, 64), (128, 128), (72, 120)], ids=str)
    def test_weights_of_another_image_size(self, size):
        """Resizing when loading equals resizing at every call; windows keep their tables."""
        trained = make("create_encoder", seed=1)
        other, pixels = make("create_encoder", size=size), image(*size)
        state = trained.state_dict()
        with pytest.raises(
            ValueError,
            match=r"of another shape: pos_embed.*only the image size differs, pass resize=True",
        ):
            other.load_checkpoint(state)
        with pytest.warns(
            UserWarning, match=r"resized for another image size: pos_embed \(1, 12, 12, 32\) to"
        ):
            assert other.load_checkpoint(state, resize=True) is other
        with torch.no_grad():
            assert relative_error(other(pixels), trained(pixels)) < 1e-6
            assert relative_error(make("create_encoder", size=size)(pixels), trained(pixels)) > 1e-2
        resized = other.state_dict()
        changed = [key for key in state if state[key].shape != resized[key].shape]
        assert {key.rpartition(".")[2] for key in changed} <= {
            "pos_embed",
            "rel_pos_h",
            "rel_pos_w",
        }
        assert all(torch.equal(state[key], resized[key]) for key in state if key not in changed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make("create_encoder").load_checkpoint(state, resize=True)

    def test_resizing_is_for_sizes_only(self):
        ours = make("create_encoder", size=(64, 64))
        state = make("segment_anything", seed=1).state_dict()
        before = copy.deepcopy(ours.state_dict())
        state["blocks.0.mlp.lin1.weight"] = torch.ones(7, 32)
        with (
            pytest.warns(UserWarning, match="resized"),
            pytest.raises(ValueError, match="1 of another shape: blocks"),
        ):
            ours.load_checkpoint(state, resize=True)
        assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())

    def test_a_file_that_is_no_state_dict(self, tmp_path):
        torch.save([torch.ones(1)], tmp_path / "list.pth")
        with pytest.raises(
            ValueError, match=r"list\.pth holds list, not a state dict.*pass the state dict itself"
        ):
            make("create_encoder").load_checkpoint(tmp_path / "list.pth")

    @pytest.mark.parametrize("size", SAM)
    def test_published_sizes_have_segment_anythings_parameters(self, size):
        """Names and shapes agree on the meta device, for image sizes from 512 to 2048."""
        from segment_anything import sam_model_registry

        for pixels in (512, 1024, 2048):
            with torch.device("meta"):
                ours = create_encoder(**SAM[size], image_size=pixels)
            shapes = {key: value.shape for key, value in ours.state_dict().items()}
            assert shapes["pos_embed"] == (1, pixels // 16, pixels // 16, SAM[size]["dim"])
            if pixels == 1024:
                with torch.device("meta"):
                    theirs = sam_model_registry[size]().image_encoder.state_dict()
                assert shapes == {key: value.shape for key, value in theirs.items()}


class TestPatterns:
    @pytest.mark.parametrize(
        "patterns",
        [
            "local_window",
            Pattern("window", size=4) | Pattern("strided", stride=3),
            {1: "axial", 3: ["dense", Pattern("local_window", radius=1)]},
            lambda layout: bsa.masks.local_window(layout, 1),
        ],
        ids=["name", "union", "mapping", "function"],
    )
    def test_every_type_of_patterns(self, patterns):
        torch.manual_seed(0)
        encoder = own(size=192, patterns=patterns)  # 24 x 24 patches: 5 blocks of 128
        report = bsa.describe(encoder)
        names = [set(layer.patterns) for layer in report.layers]
        assert names[0] == names[2] == {"dense"}
        assert {"dense"} not in (names[1], names[3])
        if isinstance(patterns, dict):
            assert "axial()" in names[1]
            assert names[3] == {"dense", "local_window(radius=1)"}
        torch.manual_seed(0)
        twin = own(size=192)
        assert list(twin.state_dict()) == list(encoder.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), twin.parameters()))

    def test_a_plan(self):
        plan = bsa.uniform_plan(own(), "local_window", radius=1, tile=(4, 4), block_size=16)
        torch.manual_seed(0)
        sparse = redraw(own(patterns=plan))
        torch.manual_seed(0)
        masked = redraw(own())
        with torch.no_grad():
            dense = masked(image())
            bsa.sparsify_(masked, plan, backend="reference")
            assert relative_error(sparse(image()), masked(image())) < 1e-5
            assert relative_error(sparse(image()), dense) > 1e-2
            assert torch.equal(bsa.restore_(sparse)(image()), dense)

    def test_swin_and_global_communication_in_one_line(self):
        """The sparsity of windows that are blocks plus strided keys equals a count by hand."""
        pattern = Pattern("window", size=4) | Pattern("strided", stride=3)
        encoder = own()
        bsa.sparsify_(encoder, bsa.uniform_plan(encoder, pattern, tile=(4, 4), block_size=16))
        blocks = 9
        # Every block keeps three columns; six blocks also keep their window.
        kept = blocks * 3 + 6
        assert bsa.describe(encoder).layers[1].sparsity == pytest.approx(1 - kept / blocks**2)

    def test_patterns_that_do_not_fit(self):
        with pytest.raises(bsa.PlanError, match=r"attends within windows of 5 x 5"):
            own(patterns={0: "axial"})
        with pytest.raises(bsa.PlanError, match="pattern 'sideways' is unknown"):
            own(patterns="sideways")
        for few in (["local_window"], []):
            with pytest.raises(
                bsa.PlanError, match=rf"patterns\[1\] has {len(few)} entries, the encoder 2 heads"
            ):
                own(patterns={1: few})
        with pytest.raises(bsa.PlanError, match="all 2 layers of this model attend within windows"):
            create_encoder(2, 32, 2, (), 4, patterns="axial")


class TestTraining:
    def test_gradients_are_segment_anythings(self):
        """Gradients of all parameters agree for equal weights and images."""
        theirs, ours = make("segment_anything").train(), make("create_encoder", seed=1).train()
        ours.load_checkpoint(theirs.state_dict())
        for encoder in (theirs, ours):
            encoder(image()).square().mean().backward()
        wanted = dict(theirs.named_parameters())
        for key, parameter in ours.named_parameters():
            assert relative_error(parameter.grad, wanted[key].grad) < 1e-4, key
            assert parameter.grad.norm() > 0

    @pytest.mark.parametrize("patterns", [None, "local_window"])
    def test_gradient_checkpointing_changes_nothing_but_memory(self, patterns):
        torch.manual_seed(0)
        encoder = redraw(own(size=192, patterns=patterns)).train()
        grads, saved = {}, {}
        for on in (False, True):
            encoder.gradient_checkpointing, kept = on, []
            encoder.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
            ):
                loss = encoder(image(192, 192)).square().mean()
            loss.backward()
            grads[on] = [parameter.grad.clone() for parameter in encoder.parameters()]
            saved[on] = sum(kept)
        assert all(torch.equal(a, b) for a, b in zip(grads[False], grads[True]))
        assert saved[True] < saved[False] / 3

    def test_it_learns(self):
        """A sparse, checkpointed encoder learns which quarter of the image is bright."""
        torch.manual_seed(0)
        patterns = Pattern("local_window", radius=1)
        encoder = own(size=64, patterns=patterns, gradient_checkpointing=True).train()
        head = torch.nn.Linear(16, 4)
        optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
        losses = []
        for _ in range(40):
            quarter = torch.randint(4, (16,))
            pixels = 0.1 * torch.randn(16, 3, 64, 64)
            for picture, where in zip(pixels, quarter.tolist()):
                picture[:, 32 * (where // 2) :, 32 * (where % 2) :][:, :32, :32] += 1
            features = encoder(pixels).amax((2, 3))
            loss = torch.nn.functional.cross_entropy(head(features), quarter)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > 1
        assert sum(losses[-5:]) / 5 < 0.5
        assert all(parameter.grad is not None for parameter in encoder.parameters())


class TestViT:
    def test_special_tokens_come_first(self):
        encoder = vit(num_special=5)
        spec = bsa.inspect(encoder)
        assert (spec.family, spec.num_prefix_tokens, spec.grid) == ("vit", 5, (12, 12))
        with torch.no_grad():
            out = encoder(image())
            assert out.shape == (2, 5 + 144, 32)
            assert vit(num_special=0)(image()).shape == (2, 144, 32)
            assert vit(num_special=5, out_channels=8)(image()).shape == (2, 8, 12, 12)

    def test_dense_is_torchs_attention(self):
        """A dense layer equals nn.MultiheadAttention with the same weights."""
        attention = vit().blocks[0].attn
        theirs = torch.nn.MultiheadAttention(32, 2, batch_first=True)
        theirs.load_state_dict(
            {
                "in_proj_weight": attention.qkv.weight,
                "in_proj_bias": attention.qkv.bias,
                "out_proj.weight": attention.proj.weight,
                "out_proj.bias": attention.proj.bias,
            }
        )
        x = torch.randn(2, 149, 32)
        with torch.no_grad():
            expected = theirs(x, x, x)[0]
            assert relative_error(attention(x, (12, 12)), expected) < 1e-6
            assert relative_error(attention(x.flip(1), (12, 12)), expected) > 1e-2

    def test_sparse_with_special_tokens(self):
        encoder = vit(num_special=5, image_size=(96, 120))
        plan = bsa.uniform_plan(encoder, "local_window", radius=1, tile=(4, 4), block_size=16)
        with torch.no_grad():
            dense = encoder(image(96, 120))
            sparse = bsa.sparsify_(encoder, plan)(image(96, 120))
            bsa.restore_(encoder)
            masked = bsa.sparsify_(encoder, plan, backend="reference")(image(96, 120))
        assert relative_error(sparse, masked) < 1e-5
        assert relative_error(sparse, dense) > 1e-2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: own(depth=0), r"depth=0: expected an integer >= 1"),
        (
            lambda: create_encoder(2, 30, 4),
            r"dim=30 with heads=4: dim must be a multiple of heads, e\.g\. heads=3",
        ),
        (lambda: create_encoder(2.0, 32, 2), r"depth=2\.0: expected an integer"),
        (
            lambda: create_encoder(2, 32, 2, 1),
            r"global_attn_indexes=1: expected layer indices; give a list, e\.g\. \[1\]",
        ),
        (lambda: create_encoder(2, 32, 2, (1,), 2.5), r"window_size=2\.5: expected an integer"),
        (
            lambda: create_encoder(2, 32, 2, out_channels=0),
            r"out_channels=0: expected an integer >= 1",
        ),
        (
            lambda: create_encoder(2, 32, 2, mlp_ratio=-1),
            r"mlp_ratio=-1 with dim=32: the MLP needs at least 1 channel",
        ),
        (
            lambda: create_encoder(2, 32, 2, num_special=-1),
            r"num_special=-1: expected an integer",
        ),
        (
            lambda: create_encoder(2, 32, 2, image_size=96.0),
            r"image_size\[0\]=96\.0: expected an integer",
        ),
        (
            lambda: create_encoder(2, 32, 2, (2,)),
            r"global_attn_indexes=\(2,\): the encoder has layers 0 to 1",
        ),
        (
            lambda: create_encoder(2, 32, 2, (1,), 0),
            r"window_size=0 with windowed layers: expected at least 1 patch",
        ),
        (
            lambda: own(size=100),
            r"image_size=\(100, 100\): both sides must be multiples of the patch size, 8 pixels",
        ),
        (
            lambda: create_encoder(2, 32, 2, num_special=1),
            r"num_special=1 with rel_pos=True.*set rel_pos=False",
        ),
        (
            lambda: own()(torch.randn(1, 3, 96, 100)),
            r"\(1, 3, 96, 100\): expected .* multiples of the patch size, 8 pixels",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
