"""Alias of `bsa_vision.masks`: `masks` and `masks.layout` are the same module objects."""

import sys

import bsa_vision.masks as _masks
from bsa_vision.masks import drawing, layout, patterns, sam_masks, vit_masks

# For imports, and for pickles that refer to `masks.layout`.
for _module in (drawing, layout, patterns, sam_masks, vit_masks):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
sys.modules[__name__] = _masks
