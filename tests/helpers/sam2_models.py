"""Build small SAM 2 models of every code base, with weights that give non-uniform attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Image encoder: 16 pixels per token in the third stage; its blocks 3 and 5 attend globally.
SIZE = (256, 192)
WIDTH, STAGES, GLOBAL, WINDOWS, NECK = 16, (1, 2, 4, 1), (4, 6), (8, 4, 4, 4), 24
GRID = (16, 12)


def hiera(**changes: Any) -> nn.Module:
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine

    options = dict(
        embed_dim=WIDTH, num_heads=1, stages=STAGES, window_spec=WINDOWS, global_att_blocks=GLOBAL
    )
    trunk = Hiera(**options, **changes)
    neck = FpnNeck(
        PositionEmbeddingSine(NECK), NECK, trunk.channel_list, fpn_top_down_levels=[2, 3]
    )
    return ImageEncoder(trunk, neck)


def timm(fused: bool = True, **changes: Any) -> nn.Module:
    from timm.models.hieradet_sam2 import HieraDet

    options = dict(
        embed_dim=WIDTH, num_heads=1, stages=STAGES, window_spec=WINDOWS, global_att_blocks=GLOBAL
    )
    model = HieraDet(**options, num_classes=0, **changes)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def transformers(attention: str = "sdpa") -> nn.Module:
    from transformers import Sam2HieraDetConfig, Sam2VisionConfig, Sam2VisionModel

    widths = [WIDTH * 2**stage for stage in range(4)]
    backbone = Sam2HieraDetConfig(
        hidden_size=WIDTH,
        num_attention_heads=1,
        image_size=[256, 256],
        blocks_per_stage=list(STAGES),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=list(WINDOWS),
        global_attention_blocks=list(GLOBAL),
        window_positional_embedding_background_size=[14, 14],
    )
    config = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=widths[::-1],
        fpn_hidden_size=NECK,
        fpn_top_down_levels=[2, 3],
    )
    config._attn_implementation = attention
    return Sam2VisionModel(config)


ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "sam2": hiera,
    "timm hieradet": timm,
    "timm hieradet, not fused": partial(timm, fused=False),
    "transformers sam2": transformers,
    "transformers sam2, eager": partial(transformers, attention="eager"),
}

# Memory attention: 12 x 12 tokens per frame, pointers last.
SIDE, CHANNELS, MEMORY_CHANNELS, LAYERS = 12, 32, 64, 2


def memory() -> nn.Module:
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.sam.transformer import RoPEAttention

    options = dict(
        embedding_dim=CHANNELS, num_heads=1, downsample_rate=1, feat_sizes=[SIDE, SIDE], dropout=0.1
    )
    layer = MemoryAttentionLayer(
        activation="relu",
        d_model=CHANNELS,
        dim_feedforward=2 * CHANNELS,
        dropout=0.1,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=RoPEAttention(**options),
        cross_attention=RoPEAttention(**options, kv_in_dim=MEMORY_CHANNELS, rope_k_repeat=True),
    )
    return MemoryAttention(d_model=CHANNELS, pos_enc_at_input=True, layer=layer, num_layers=LAYERS)


def video(attention: str = "sdpa", library: str = "sam2_video") -> nn.Module:
    import transformers

    name = {"sam2_video": "Sam2Video", "sam3_tracker_video": "Sam3TrackerVideo"}[library]
    config = getattr(transformers, f"{name}Config")(
        memory_attention_hidden_size=CHANNELS,
        memory_attention_num_layers=LAYERS,
        memory_attention_feed_forward_hidden_size=2 * CHANNELS,
        memory_encoder_output_channels=MEMORY_CHANNELS,
    )
    # Sam3TrackerVideo derives another default from the image size.
    config.memory_attention_rope_feat_sizes = [SIDE, SIDE]
    config._attn_implementation = attention
    modeling = getattr(transformers.models, library)
    return getattr(getattr(modeling, f"modeling_{library}"), f"{name}MemoryAttention")(config)


MEMORIES: dict[str, Callable[..., nn.Module]] = {
    "sam2": memory,
    "transformers sam2_video": video,
    "transformers sam2_video, eager": partial(video, attention="eager"),
    "transformers sam3_tracker_video": partial(video, library="sam3_tracker_video"),
}


def redraw(model: nn.Module) -> nn.Module:
    """Redraw all weights, so that logits have a large variance."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "pos_embed" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            elif parameter.dim() >= 2:
                gain = 2.2 if any(part in key for part in ("qkv", "q_proj", "k_proj")) else 0.8
                parameter.copy_(torch.randn_like(parameter) * gain * parameter[0].numel() ** -0.5)
            elif "bias" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make(
    name: str, models: dict[str, Callable[..., nn.Module]] = ENCODERS, seed: int = 0
) -> nn.Module:
    torch.manual_seed(seed)
    return redraw(models[name]())


def image(height: int = SIZE[0], width: int = SIZE[1], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return all outputs of the encoder as one vector per image."""
    out = model(pixels)
    if isinstance(out, dict) and "backbone_fpn" in out:
        maps = [out["vision_features"], *out["backbone_fpn"]]
    elif hasattr(out, "last_hidden_state"):
        maps = [out.last_hidden_state, *out.fpn_hidden_states]
    else:
        maps = [out]
    return torch.cat([x.flatten(1) for x in maps], dim=1)


def remember(
    model: nn.Module,
    frames: int = 3,
    pointers: int = 8,
    side: int = SIDE,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the memory attention's output as one vector; libraries order its axes differently."""
    generator = torch.Generator().manual_seed(2)

    def draw(tokens: int, channels: int) -> Tensor:
        return torch.randn(tokens, batch, channels, generator=generator).to(dtype)

    current, place = draw(side**2, CHANNELS), draw(side**2, CHANNELS)
    keys, key_place = (draw(frames * side**2 + pointers, MEMORY_CHANNELS) for _ in range(2))
    out = model(current, keys, place, key_place, pointers)
    return out.flatten()
