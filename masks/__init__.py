"""Hand on to `bsa_vision.masks`: `import masks` and `masks.layout` are the same module objects."""

import sys

import bsa_vision.masks as _masks
from bsa_vision.masks import drawing, layout, patterns, sam_masks, vit_masks

for _module in (
    drawing,
    layout,
    patterns,
    sam_masks,
    vit_masks,
):  # also for pickles that name `masks.layout`
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
sys.modules[__name__] = _masks
