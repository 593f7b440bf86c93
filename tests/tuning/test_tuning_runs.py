"""Runs of the tuner that are killed or interrupted, or that run out of disk space."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bsa_vision as bsa
from bsa_vision.tuning.store import Calibration
from tests.cli.test_commands import run
from tests.helpers import models
from tests.helpers.tuning import SMALL, images, photos

ROOT = Path(__file__).parents[2]
OPTIONS = "--sparsity 0.3 --tile 2x4 --block-size 8"
# Run by a child process before `cli.main`: statistics are saved after every image.
SAVE_ALWAYS = """
import os, signal, time
import bsa_vision.tuning.calibration as calibration, bsa_vision.tuning.store as store
from bsa_vision.cli import main as cli
store.SECONDS, store.PART = 0.0, 1e9
"""


def tune_line(folder):
    """Return arguments of `bsa-vision` that tune a model on `folder`/photos."""
    return f"tune tests.helpers.tuning:dinov3 {folder}/photos -o {folder}/plan.json {OPTIONS}"


def killed_run(folder):
    """Run `bsa-vision tune` in a child process and kill it during pass 2."""
    line = tune_line(folder)
    code = f"""{SAVE_ALWAYS}
add = calibration.CandidateErrors.add
def add_slowly(*args):
    time.sleep(0.3)
    add(*args)
calibration.CandidateErrors.add = add_slowly
cli.main({line.split()})
"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    statistics = folder / "plan.statistics.safetensors"
    try:
        while child.poll() is None and not (
            statistics.exists() and Calibration.load(statistics).done["candidates"]
        ):
            time.sleep(0.05)
        assert child.poll() is None, "the process ended before it was killed"
        child.send_signal(signal.SIGKILL)
    finally:
        child.wait()
    return line, Calibration.load(statistics).done


@pytest.mark.slow
def test_killed_and_resumed(capsys, tmp_path):
    photos(tmp_path / "photos", count=6)
    line, done = killed_run(tmp_path)
    assert done["blocks"] == 4
    assert 0 < done["candidates"] < 4
    assert not (tmp_path / "plan.json").exists()
    code, _, err = run(capsys, line)
    assert code == 2
    assert "--resume" in err
    code, _, err = run(capsys, f"{line} --resume")
    assert code == 0, err
    code, _, err = run(capsys, line.replace("plan.json", "whole.json"))
    assert code == 0, err
    plans = [bsa.SparsityPlan.load(tmp_path / name) for name in ("plan.json", "whole.json")]
    assert plans[0] == plans[1]


def test_ctrl_c_says_what_is_saved_and_how_to_go_on(tmp_path):
    photos(tmp_path / "photos", count=6)
    line = tune_line(tmp_path)
    code = f"""{SAVE_ALWAYS}
save = store.Store.save
def save_and_interrupt(self, state, now=False):
    save(self, state, now)
    if state.done["candidates"]:
        os.kill(os.getpid(), signal.SIGINT)
store.Store.save = save_and_interrupt
cli.main({line.split()})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "plan.statistics.safetensors holds 4 images of pass 1, 1 images of pass 2" in done.stderr
    assert f"Resume with: bsa-vision {line} --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(x.name for x in tmp_path.iterdir()) == ["photos", "plan.statistics.safetensors"]


def test_ctrl_c_in_python_says_what_is_saved(tmp_path):
    def interrupt(name, done, total):
        raise KeyboardInterrupt

    options = dict(sparsity=0.4, on_step=interrupt, **SMALL)
    with pytest.raises(KeyboardInterrupt, match="nothing was saved; pass statistics=PATH"):
        bsa.tune(models.make("dinov3"), images(4), **options)
    with pytest.raises(
        KeyboardInterrupt, match=r"holds .*; continue with .*resume=True|nothing was saved in"
    ):
        bsa.tune(models.make("dinov3"), images(4), statistics=tmp_path / "s", **options)


@pytest.mark.slow
def test_full_disk(tmp_path):
    """With files limited to 2 kB, tuning returns its plan, and an older plan file is kept."""
    code = f"""
import resource, signal, sys, warnings
from tests.helpers import models
from tests.helpers.tuning import SMALL, images
import bsa_vision as bsa
model = models.make("dinov3")  # imports may write files, so limit files afterwards
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    plan = bsa.tune(model, images(4), sparsity=0.4, statistics=r"{tmp_path}/s", **SMALL)
assert plan.report["sparsity"] >= 0.4 - 1e-9
texts = [str(warning.message) for warning in caught]
print([text for text in texts if "could not be saved" in text])
try:
    plan.save(r"{tmp_path}/plan.json")
except OSError as error:
    print("not saved:", error)
"""
    (tmp_path / "plan.json").write_text("an older plan")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("could not be saved") == 1  # once, not for every image
    assert "not saved:" in done.stdout
    assert (tmp_path / "plan.json").read_text() == "an older plan"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
