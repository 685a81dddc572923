"""The wheel carries recipes and weights, and works from another directory."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh environment that sees the packages of this one, with nothing of zoo's but its wheel."""
    top = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", top, ROOT], check=True, cwd=top)
    (wheel,) = top.glob("*.whl")
    venv.create(top / "env", with_pip=False)
    python = top / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    target = next((top / "env").rglob("site-packages"))
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True, cwd=top)
    here = next(p for p in sys.path if p.endswith("site-packages"))
    # As text in a .pth file the packages come in, but the editable hook that points to the checkout does not.
    (target / "tested-with.pth").write_text(here)
    return python, top


def test_restores_a_photo_from_another_directory(installed):
    python, top = installed
    code = "import zoo, zoo.shipped as s; print(zoo.__file__); print(s.folder('checkpoints')); print(*s.recipes())"
    where = subprocess.run([python, "-c", code], cwd=top, capture_output=True, text=True, check=True).stdout
    assert str(ROOT) not in where
    assert "train/hat-tiny-x2" in where
    photo = top / "photo.png"
    photo.write_bytes((ROOT / "checkpoints" / "demo" / "chelsea.png").read_bytes())
    subprocess.run([python, "-m", "zoo", "restore", "photo.png", "sharp.png", "--quiet"], cwd=top, check=True)
    assert (top / "sharp.png").is_file()
