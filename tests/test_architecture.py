"""The house rules of DECISIONS.md and CONTRIBUTING.md, read off the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "zoo").rglob("*.py"))
LEAVES = {"errors", "files", "shipped", "scene", "media", "report", "tracking"}
# Room -> the rooms of zoo that it may import, one way down.
ARROWS = {leaf: {"errors", "files"} for leaf in LEAVES} | {
    "errors": set(),
    "files": {"errors"},
    "kernels": {"kernels"},
    "layers": {"layers", "kernels"},
    "parallel": {"parallel", "kernels", "errors"},
    "models": {"models", "layers", "kernels", "parallel", "shipped", "errors", "files"},
    "metrics": {"metrics", "models", "scene", "errors"},
    "data": {"data", "media", "scene", "shipped", "errors", "files"},
    "pipelines": {
        "pipelines",
        "models",
        "layers",
        "kernels",
        "parallel",
        "data",
        "media",
        "scene",
        "shipped",
        "errors",
    },
    "tasks": {"tasks", "pipelines", "data", "metrics", "models", "layers", "kernels", "parallel", *LEAVES},
    "recipe": {"tasks", "data", "models", *LEAVES},
}
DRIVERS = {"evaluate", "bench", "export"}
ARROWS |= {name: {"recipe", "tasks", "pipelines", "data", "metrics", "models", "kernels", *LEAVES} for name in DRIVERS}
ARROWS["cli"] = {"cli", "recipe", *DRIVERS, "tasks", "pipelines", "data", "metrics", "models", *LEAVES}
# Third-party package -> the places below zoo/ that may import it.
FENCES = {
    "wandb": ("tracking.py",),
    "omegaconf": ("recipe",),
    "jsonargparse": ("recipe",),
    "pywt": ("kernels/dwt/",),
    "lightning": ("tasks/", "data/", "recipe", "tracking.py"),
    "diffusers": ("models/plugins/", "pipelines/", "tasks/diffusion", "tasks/distillation", "tasks/autoencoder"),
    "av": ("media", "cli/doctor.py"),
    "torchmetrics": ("metrics/",),
}
NEVER = {"torchvision", "timm", "basicsr", "einops", "hydra", "gradio", "flash_attn", "natten", "mamba_ssm", "spandrel"}
BUDGETS = {"reference.py": 120, "tasks/": 300, "models/": 600}
DEFAULT_BUDGET = 400


def relative(path):
    return path.relative_to(ROOT / "zoo").as_posix()


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "zoo":
                yield from (f"zoo.{alias.name}" for alias in node.names)
            else:
                yield node.module


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [ROOT / name for name in listed.stdout.splitlines()]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_follow_the_arrows(path):
    name = relative(path)
    room = name.split("/")[0].removesuffix(".py")
    for imported in imports(path):
        top, *rest = imported.split(".")
        assert top not in NEVER, f"{name} imports {imported}"
        if top == "triton":
            assert path.name == "triton_impl.py" or name == "kernels/rounding.py", f"{name} imports triton"
        if top in FENCES:
            assert name.startswith(FENCES[top]), f"{name} imports {imported}"
        if top == "zoo" and rest and room in ARROWS:
            assert rest[0] in {*ARROWS[room], room, "__version__"}, f"{name} imports {imported}"


@pytest.mark.parametrize("path", [p for p in MODULES if "/models/" in p.as_posix()], ids=relative)
def test_no_family_imports_another(path):
    parts = path.relative_to(ROOT / "zoo" / "models").parts
    if len(parts) == 2 and parts[1] != "__init__.py" and parts[0] in ("restorers", "generators", "features"):
        own = f"zoo.models.{parts[0]}.{path.stem}"
        others = ("zoo.models.restorers.", "zoo.models.generators.", "zoo.models.features.")
        for imported in imports(path):
            assert not imported.startswith(others) or imported == own


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_has_its_test(path):
    name = Path(relative(path))
    if path.name == "__init__.py":
        holds_code = any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_text(encoding="utf-8")).body)
        if not holds_code:
            return
        expected = name.parent.parent / f"test_{name.parent.name or 'zoo'}.py"
        if name.parts[0] in ("models", "cli") and len(name.parts) == 2:
            expected = Path(name.parts[0]) / f"test_{name.parts[0]}.py"
    elif name.parts[0] == "kernels" and len(name.parts) == 3:
        expected = Path("kernels") / f"test_{name.parts[1]}.py"
    else:
        expected = name.parent / f"test_{name.stem.strip('_')}.py"
    if name.as_posix() == "__main__.py":
        expected = Path("test_zoo.py")
    assert (ROOT / "tests" / expected).is_file(), f"zoo/{name} needs tests/{expected}"


@pytest.mark.parametrize("path", MODULES + sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.name)
def test_files_stay_within_their_budget(path):
    name = path.relative_to(ROOT / ("zoo" if path.is_relative_to(ROOT / "zoo") else "tests")).as_posix()
    budgets = (size for part, size in BUDGETS.items() if name.startswith(part) or name.endswith(part))
    limit = next(budgets, DEFAULT_BUDGET)
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines, its budget is {limit}"


def test_no_file_is_named_after_nothing():
    assert not [p for p in MODULES if p.stem in ("utils", "util", "common", "misc", "helpers")]


def test_tools_are_not_imported_by_the_package():
    assert not [p for p in MODULES for name in imports(p) if name.split(".")[0] == "tools"]


def test_the_repository_stands_alone():
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".txt", ".yml") and path.is_file():
            text = path.read_text(encoding="utf-8")
            assert "../sha" + "red" not in text, path


@pytest.mark.parametrize("command", [["check", "--output-format=concise"], ["format", "--check"]], ids=lambda c: c[0])
def test_ruff_finds_nothing(command):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
