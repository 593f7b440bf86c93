"""The README is short, its code runs, and Markdown files are narrow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import bsa_vision as bsa
from tests.helpers import models

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
QUICK_START = (ROOT / "docs" / "quickstart.md").read_text()
MARKDOWN = [
    path
    for folder in (".", "docs", "docs/notes", "examples/testbed")
    for path in (ROOT / folder).glob("*.md")
]


def snippets(text: str) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


def small(code: str) -> str:
    """Return the code with a model of two small layers, large patches and the same image size."""
    sizes = "hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64"
    changed = code.replace("image_size=1024", f"image_size=1024, patch_size=32, {sizes}")
    assert changed != code
    return changed


def words(text: str) -> int:
    """Count the words outside code blocks, tables, headings' marks and link targets."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return sum(any(c.isalnum() for c in word) for word in text.split())


def test_word_count():
    assert words("## One *two*\n\n```\nno no\n```\n| no | no |\n\n[three](no/no.md) - four.") == 4
    assert words(README) <= 500


def test_readme(capsys):
    (code,) = snippets(README)
    assert len([line for line in code.splitlines() if line]) == 6
    names: dict = {}
    exec(small(code), names)
    assert "2 x dense, 2 x local_window(radius=8)" in capsys.readouterr().out
    assert bsa.describe(names["model"]).layers


def test_quick_start_with_a_model(capsys):
    names: dict = {}
    exec(small(snippets(QUICK_START)[0]).replace("1024)).last", "1024)).last"), names)
    assert names["features"].shape == (1, 32 * 32 + 1, 64)
    assert "2 x dense, 2 x local_window(radius=8)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no sparse heads"):
        bsa.restore_(names["model"])


def test_quick_start_with_tensors(capsys):
    names: dict = {}
    exec(snippets(QUICK_START)[1], names)
    assert names["out"].shape == (1, 12, 4097, 64)
    expected = bsa.sparse_attention(
        *map(names.get, ("q", "k", "v", "head_masks")), backend="reference"
    )
    torch.testing.assert_close(names["out"], expected, rtol=1e-4, atol=1e-5)
    assert "[" not in capsys.readouterr().out  # no finding


def test_quick_start_with_images(monkeypatch, tmp_path, capsys):
    """It goes on with a model and images that the reader has."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"bsa": bsa, "model": models.make("dinov3")}
    (tmp_path / "photos").mkdir()
    for seed in range(9):
        noise = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(seed)).mul(255).byte()
        image = Image.fromarray(noise.permute(1, 2, 0).numpy()).resize((320, 260))
        image.save(tmp_path / f"photos/{seed}.png")
    exec(snippets(QUICK_START)[2].replace("1024, 1024", "256, 256"), names)
    measured, bound = map(float, capsys.readouterr().out.split())
    assert measured <= bound <= 0.05
    assert names["plan"].report["sparsity"] > 0
    assert "<html" in (tmp_path / "plan.html").read_text()


def test_every_snippet_is_tested():
    assert len(snippets(QUICK_START)) == 3


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_links_exist(path):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / target).exists(), target


def wide(text: str) -> list[str]:
    """Return the lines over 100 columns that are no row of a table and no single link or URL."""
    return [
        line
        for line in text.splitlines()
        if len(line) > 100
        and not line.lstrip().startswith("|")
        and not re.fullmatch(r"\s*([*-] )?!?\[[^]]*\]\([^)]*\)[.,]?|\s*<?https?://\S+", line)
    ]


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_lines_are_narrow(path):
    assert wide("x" * 101) == ["x" * 101]
    assert not wide("| " + "x" * 101)
    assert not wide(path.read_text())
