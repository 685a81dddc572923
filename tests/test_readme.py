import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_two_commands_come_first():
    first = README.split("## ")[0]
    assert "python3 tools/start.py\n" in first
    assert "python3 tools/start.py test\n" in first


def test_the_table_of_models_is_up_to_date():
    subprocess.run([sys.executable, ROOT / "tools" / "readme_table.py", "--check"], check=True)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.splitlines()[0])
def test_python_snippets_run(snippet, tmp_path, monkeypatch):
    photo = (ROOT / "checkpoints" / "demo" / "chelsea.png").read_bytes()
    (tmp_path / "photo.png").write_bytes(photo)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    assert links
    assert not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
