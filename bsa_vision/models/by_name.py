"""Models by name, as the command line takes them: `timm:vit_base_patch16_dinov3`, `transformers:facebook/dinov2-base`, `sam:vit_b`, `package.module:factory`.

Weights come from where each library keeps them; `random=True` builds the model from its configuration instead, without downloading weights.
"""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from bsa_vision.errors import first_line, nearest
from bsa_vision.models.hub_configs import CONFIGS

FORMS = "timm:NAME, transformers:NAME-OR-FOLDER, sam:vit_b | vit_l | vit_h, package.module:factory"


def load(
    text: str,
    *,
    random: bool = False,
    checkpoint: str | Path | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """The model, in eval mode.

    random      fresh weights, from the model's configuration: timm's and sam's are built in, so are those of `hub_configs.CONFIGS`;
                of other names of transformers it is fetched, or read from a folder
    checkpoint  sam only: a file of segment_anything
    image_size  pixels per side the model is built for, where that is asked (timm, sam)

    Raises ValueError that says what is allowed: unknown names with the nearest known ones, weights that cannot be had, broken libraries.
    """
    library, _, name = text.partition(":")
    if not library or not name:
        raise ValueError(f"model {text!r}: allowed are {FORMS}; write one of these.")
    if checkpoint is not None and library != "sam":
        raise ValueError(
            f"checkpoint={str(checkpoint)!r} with model {text!r}: it belongs to sam:...; leave it out."
        )
    readers = {"timm": _timm, "transformers": _transformers, "sam": _sam}
    if library not in readers:
        return from_factory(text).eval()
    return readers[library](name, random, checkpoint, image_size).eval()


def from_factory(path: str) -> nn.Module:
    """What the function `name` of `package.module` returns when called without arguments."""
    module, _, name = path.partition(":")
    if "" not in sys.path:  # where `python -m` looks as well
        sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module), name)()
    except Exception as error:
        raise ValueError(
            f"model {path!r} gave {first_line(error)}; allowed is a function that takes no arguments and returns a torch.nn.Module; "
            "check its module and name."
        ) from None
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {path!r} returned a {type(model).__name__}: allowed is a torch.nn.Module; return the model itself."
        )
    return model


def _timm(name: str, random: bool, checkpoint: Any, image_size: int | None) -> nn.Module:
    timm = _library("timm")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise ValueError(
            f"model 'timm:{name}': timm knows no such model{nearest(name, known) or '; timm.list_models() names all'}."
        )
    sizes = {} if image_size is None else {"img_size": image_size}
    try:
        return timm.create_model(name, pretrained=not random, num_classes=0, **sizes)
    except Exception as error:
        raise ValueError(
            f"model 'timm:{name}' gave {first_line(error)}; its weights are downloaded unless random is asked for: check the network, "
            "the image size, or use --random."
        ) from None


def _transformers(name: str, random: bool, checkpoint: Any, image_size: int | None) -> nn.Module:
    transformers = _library("transformers")
    try:
        if random and name in CONFIGS and not Path(name).is_dir():
            kind, config = CONFIGS[name]
            return transformers.AutoModel.from_config(
                transformers.AutoConfig.for_model(kind, **copy.deepcopy(config))
            )
        if random:
            return transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name))
        return transformers.AutoModel.from_pretrained(name)
    except Exception as error:
        near = nearest(name, CONFIGS) if random else ""
        needs = (
            "its configuration, which is not built in, must be fetched"
            if random
            else "its weights must be fetched"
        )
        raise ValueError(
            f"model 'transformers:{name}' gave {first_line(error)}; {needs}: check the name and the network, or give a folder that holds "
            f"{'a config.json' if random else 'the model'}{near}."
        ) from None


def _sam(name: str, random: bool, checkpoint: Any, image_size: int | None) -> nn.Module:
    from bsa_vision.models.encoder import SAM, create_encoder

    if name not in SAM:
        raise ValueError(f"model 'sam:{name}': allowed are {', '.join(SAM)}; choose one of them.")
    if (checkpoint is None) != random:
        raise ValueError(
            f"model 'sam:{name}' with {'no checkpoint' if checkpoint is None else 'a checkpoint and random weights'}: one of the two is needed; "
            "give --checkpoint FILE, or --random."
        )
    encoder = create_encoder(**SAM[name], image_size=image_size or 1024)
    return encoder if checkpoint is None else encoder.load_checkpoint(checkpoint)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be imported ({first_line(error)}): models of {name} need it; install it to fit your torch, see bsa-vision doctor."
        ) from None
