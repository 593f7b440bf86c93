"""The README's Python runs as it stands, except that the model and its image are made small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import bsa_vision as bsa
from tests.helpers import models

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_snippets_have_about_ten_lines():
    assert len(SNIPPETS) == 3
    assert all(len(snippet.strip().splitlines()) <= 12 for snippet in SNIPPETS)


def test_tuning(monkeypatch, tmp_path, capsys):
    """The third one goes on with a model and images that the reader has."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"bsa": bsa, "model": models.make("dinov3")}
    (tmp_path / "photos").mkdir()
    for seed in range(9):
        noise = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(seed)).mul(255).byte()
        Image.fromarray(noise.permute(1, 2, 0).numpy()).resize((320, 260)).save(
            tmp_path / f"photos/{seed}.png"
        )
    exec(SNIPPETS[2].replace("1024, 1024", "256, 256"), names)
    measured, bound = map(float, capsys.readouterr().out.split())
    assert measured <= bound <= 0.05
    assert names["plan"].report["sparsity"] > 0
    assert "What single heads see" in (tmp_path / "plan.html").read_text()


@pytest.mark.parametrize("snippet", SNIPPETS[:2], ids=["model", "tensors"])
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
