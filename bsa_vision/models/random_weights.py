"""Well-known models with random weights, built from transformers' classes without a download.

They are for measuring time and memory. They do not show how sparse heads affect the accuracy of a
trained model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# name -> (prefix of its class names in transformers, patch size, settings); ViT-B of each family
BUILT_IN: dict[str, tuple[str, int, dict[str, int]]] = {
    "vit": ("ViT", 16, {"intermediate_size": 3072}),
    "dinov2": ("Dinov2", 14, {"mlp_ratio": 4}),
    "dinov3": ("DINOv3ViT", 16, {"intermediate_size": 3072, "num_register_tokens": 4}),
    "sam": ("SamVision", 16, {"mlp_dim": 3072}),
}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
# Standard deviation of a projection's output for inputs of 1; logits then have about 1.7.
WEIGHT_STD = 1.3


def random_model(name: str, image_size: tuple[int, int], seed: int = 0) -> nn.Module:
    """Build a model of `BUILT_IN` for images of (h, w) pixels.

    The weights are drawn so that logits have a standard deviation above 1. With the library's
    initial weights attention is nearly uniform, and wrong masks would change little.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"model {name!r} needs transformers, which cannot be imported ({error}); run "
            "pip install 'bsa-vision[models]'."
        ) from None
    torch.manual_seed(seed)
    prefix, patch, settings = BUILT_IN[name]
    if name == "sam" and image_size[0] != image_size[1]:
        raise ValueError(f"image size {image_size}: model 'sam' takes square images.")
    size: Any = image_size[0] if name == "sam" else image_size
    shape = {"image_size": size, "patch_size": patch}
    config = getattr(transformers, f"{prefix}Config")(**shape, **{**BASE, **settings})
    model: nn.Module = getattr(transformers, f"{prefix}Model")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "rel_pos" in key or "pos_embed" in key:  # zero in a fresh SAM
                parameter.normal_(0, 0.2)
            elif parameter.dim() == 2 and "embeddings" not in key:
                parameter.normal_(0, WEIGHT_STD * parameter.shape[-1] ** -0.5)
            elif parameter.dim() == 4:  # convolutions, nearly zero in a fresh SAM
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model
