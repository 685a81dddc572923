import subprocess
import sys
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).parents[1]


def test_importing_zoo_imports_no_torch_and_its_listing_neither():
    code = (
        "import sys, zoo; assert zoo.list_models('hat*'); dir(zoo); "
        "bad = [m for m in ('torch', 'lightning', 'numpy', 'wandb') if m in sys.modules]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_is_there():
    for name in zoo.__all__:
        assert getattr(zoo, name) is not None
        assert name in dir(zoo)
    assert callable(zoo.restore)
    assert zoo.create is zoo.create


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'zoo' has no attribute 'restor'"):
        _ = zoo.restor


def test_the_version_is_that_of_the_project():
    assert f'version = "{zoo.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_python_m_zoo_is_zoo():
    done = subprocess.run([sys.executable, "-m", "zoo", "ft"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "zoo: zoo has no command 'ft'. Did you mean 'fit'? `zoo --help` lists the commands.\n"
