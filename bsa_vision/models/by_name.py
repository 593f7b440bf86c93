"""Load models by name, as on the command line.

Names are `timm:vit_base_patch16_dinov3`, `transformers:facebook/dinov2-base`, `sam:vit_b` and
`package.module:factory`. Each library downloads or reads its weights. `random=True` builds the
model from its configuration instead, with random weights.
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
    """Load a model and set it to eval mode.

    random      random weights; the configuration is built in for timm, sam and
                `hub_configs.CONFIGS`, and fetched or read from a folder for other
                names of transformers
    checkpoint  sam only: a checkpoint file of segment_anything
    image_size  pixels per side that the model is built for (timm and sam)

    Raises ValueError for unknown names, with similar known ones, and if weights cannot be loaded
    or a library cannot be imported.
    """
    library, _, name = text.partition(":")
    if not library or not name:
        raise ValueError(f"model {text!r}: allowed are {FORMS}.")
    if checkpoint is not None and library != "sam":
        raise ValueError(
            f"checkpoint={str(checkpoint)!r} with model {text!r}: it belongs to sam:... only."
        )
    readers = {"timm": _timm, "transformers": _transformers, "sam": _sam}
    if library not in readers:
        return from_factory(text).eval()
    return readers[library](name, random, checkpoint, image_size).eval()


def from_factory(path: str) -> nn.Module:
    """Return the module that the function `package.module:name` creates."""
    module, _, name = path.partition(":")
    if "" not in sys.path:  # find modules in the current folder, as `python -m` does
        sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module), name)()
    except Exception as error:
        raise ValueError(
            f"model {path!r} gave {first_line(error)}; expected package.module:function, which "
            "takes no arguments and returns a torch.nn.Module."
        ) from None
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {path!r} returned a {type(model).__name__}: allowed is a torch.nn.Module."
        )
    return model


def _timm(name: str, random: bool, checkpoint: Any, image_size: int | None) -> nn.Module:
    timm = _library("timm")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        hint = nearest(name, known) or "; timm.list_models() lists all"
        raise ValueError(f"model 'timm:{name}': timm has no such model{hint}.")
    sizes = {} if image_size is None else {"img_size": image_size}
    try:
        return timm.create_model(name, pretrained=not random, num_classes=0, **sizes)
    except Exception as error:
        raise ValueError(
            f"model 'timm:{name}' gave {first_line(error)}; check the network and the image size, "
            "or use --random, which downloads no weights."
        ) from None


def _transformers(name: str, random: bool, checkpoint: Any, image_size: int | None) -> nn.Module:
    transformers = _library("transformers")
    try:
        if not random:
            return transformers.AutoModel.from_pretrained(name)
        if name in CONFIGS and not Path(name).is_dir():
            kind, options = CONFIGS[name]
            config = transformers.AutoConfig.for_model(kind, **copy.deepcopy(options))
        else:
            config = transformers.AutoConfig.from_pretrained(name)
        return transformers.AutoModel.from_config(config)
    except Exception as error:
        needs, content, hint = "its weights must be fetched", "the model", ""
        if random:
            needs = "its configuration, which is not built in, must be fetched"
            content, hint = "a config.json", nearest(name, CONFIGS)
        raise ValueError(
            f"model 'transformers:{name}' gave {first_line(error)}; {needs}: check the name and "
            f"the network, or give a folder that holds {content}{hint}."
        ) from None


def _sam(name: str, random: bool, checkpoint: Any, image_size: int | None) -> nn.Module:
    from bsa_vision.models.encoder import SAM, create_encoder

    if name not in SAM:
        raise ValueError(f"model 'sam:{name}': allowed are {', '.join(SAM)}.")
    if (checkpoint is None) != random:
        given = "no checkpoint" if checkpoint is None else "a checkpoint and random weights"
        raise ValueError(
            f"model 'sam:{name}' with {given}: one of the two is needed; give --checkpoint FILE, "
            "or --random."
        )
    encoder = create_encoder(**SAM[name], image_size=image_size or 1024)
    return encoder if checkpoint is None else encoder.load_checkpoint(checkpoint)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be imported ({first_line(error)}): models of {name} need it; install a "
            "version that fits your torch, see `bsa-vision doctor`."
        ) from None
