"""The README's Python runs as it stands, except that the model and its image are made small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import bsa_vision as bsa

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_are_two_snippets_of_about_ten_lines():
    assert len(SNIPPETS) == 2
    assert all(len(snippet.strip().splitlines()) <= 12 for snippet in SNIPPETS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["model", "tensors"])
def test_snippet(snippet, capsys):
    small = "hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64, patch_size=32, "
    code = snippet.replace("image_size=1024, ", "image_size=1024, " + small)
    names: dict = {}
    exec(code, names)
    printed = capsys.readouterr().out
    if "model" in names:
        assert names["features"].shape == (1, 32 * 32 + 5, 64)
        assert "2 x dense, 2 x local_window(radius=8)" in printed
        with pytest.raises(ValueError, match="no sparse heads"):
            bsa.restore_(names["model"])
    else:
        assert names["out"].shape == (1, 12, 4097, 64)
        assert isinstance(names["out"], torch.Tensor)
        assert "nothing wrong found" in printed


def test_links_and_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
