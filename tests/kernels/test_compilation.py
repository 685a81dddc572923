"""Every GPU kernel compiles for chips that are not here: see tools/compile_kernels.py for what is checked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "compile_kernels.py"
OPS = sorted(path.parent.name for path in (ROOT / "zoo" / "kernels").glob("*/triton_impl.py"))

pytest.importorskip("triton")


def compile_kernels(*words):
    settings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    settings["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, TOOL, *words], cwd=ROOT, env=settings, capture_output=True, text=True)


@pytest.mark.parametrize("op", OPS)
def test_launches_in_bfloat16_compile_for_four_chips(op):
    told = compile_kernels("--op", op)
    assert told.returncode == 0, told.stdout + told.stderr[-2000:]
    for chip in (80, 89, 90, 100):
        assert f"{op} sm_{chip} bf16 d=64" in told.stdout


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_every_precision_and_head_dim_compiles_for_four_chips(op):
    told = compile_kernels("--op", op, "--all")
    assert told.returncode == 0, told.stdout + told.stderr[-2000:]


def test_a_product_without_tensor_cores_is_told():
    script = "import compile_kernels as tool; tool.TENSOR_CORES = {90: 'nowhere'}; raise SystemExit(tool.main())"
    settings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    settings["PYTHONPATH"] = f"{ROOT}{os.pathsep}{TOOL.parent}"
    words = [sys.executable, "-c", script, "--op", "linear_attention", "--chip", "90"]
    told = subprocess.run(words, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert told.returncode == 1, told.stderr[-2000:]
    assert told.stdout.count("multiplies without tensor cores") == 4  # all but the kernel that only adds


def test_every_kernel_is_compiled_somewhere():
    told = compile_kernels("--help").stdout
    assert all(op in told for op in OPS)
