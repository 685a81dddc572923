#!/usr/bin/env python3
"""Compile the GPU kernels for chips that are not here, and look at what comes out.

    python tools/compile_kernels.py                      each kernel once: bf16, head dim 64, four chips; nothing is run
    python tools/compile_kernels.py --all                every launch of float32, bf16 and fp16, head dims 64 and 128
    python tools/compile_kernels.py --all --write        stores registers, stack and shared memory as the baseline

Each op is called as users call it, forward and backward (`compiled` in tools/kernel_cases/OP.py). Its launches are
caught, so that what is compiled is what a GPU would get. Checked: everything compiles and fits into shared memory;
bf16 does not spill; tl.dot became tensor-core instructions; nothing needs more than the baseline,
tools/results/kernels-offline.json.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before any kernel is imported

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from zoo.files import write_file
from zoo.kernels import chips

BASELINE = Path(__file__).parent / "results" / "kernels-offline.json"
OPS = sorted(path.stem for path in (Path(__file__).parent / "kernel_cases").glob("[a-z]*.py"))
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes that one block may have
TENSOR_CORES = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async|mma.sync", 100: "tcgen05.mma|mma.sync"}
SLACK = 1.1  # over the baseline before it counts as a regression
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
TYPES |= {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1", torch.int16: "i16"}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One caught launch: the kernel and everything that decides about its code."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """Kernel and a short mark of its constants, the same on every machine."""
        mark = hashlib.sha256(repr((self.signature, self.constants, self.aligned, self.options)).encode())
        return f"{self.kernel.fn.__name__}-{mark.hexdigest()[:6]}"


def catch(kernel: JITFunction, args: tuple[Any, ...], given: dict[str, Any]) -> Launch:
    """Describe a launch as Triton's own binder would: ones become constants, multiples of 16 are told."""
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    values = dict(zip(kernel.arg_names, args, strict=False)) | given
    signature, constants, aligned = {}, {}, []
    for place, param in enumerate(kernel.params):
        value = values.get(param.name, param.default)
        if param.is_constexpr or value is None:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[param.name] = f"*{TYPES[value.dtype]}"
            aligned += [place] * (value.data_ptr() % 16 == 0)
        elif isinstance(value, bool):
            signature[param.name] = "u1"
        elif isinstance(value, int):
            if value == 1 and not param.do_not_specialize:
                signature[param.name], constants[param.name] = "constexpr", 1
                continue
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned += [place] * (value % 16 == 0 and not param.do_not_specialize)
        else:
            signature[param.name] = "fp32"
    pack = lambda found: tuple(found.items())
    return Launch(kernel, pack(signature), pack(constants), tuple(aligned), pack(dict(sorted(options.items()))))


def launches(op: str, chip: int, dtype: torch.dtype, head_dim: int) -> list[Launch]:
    """What a call of `op` launches on a chip, each once."""
    found: dict[Launch, None] = {}
    run, own = JITFunction.run, chips.chip

    def caught(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:  # noqa: ANN401
        found[catch(kernel, args, given)] = None

    JITFunction.run, chips.chip = caught, lambda x: chip
    try:
        importlib.import_module(f"kernel_cases.{op}").compiled(dtype, head_dim)
    finally:
        JITFunction.run, chips.chip = run, own
    return list(found)


def build(launch: Launch, chip: int) -> dict[str, int]:
    """Compile; returns what the code needs, its products, and the tensor-core instructions that they became."""
    attributes = {(place,): [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    words = {word: int(number) for word, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return {
        "registers": words["REG"],
        "stack": words["STACK"],
        "shared": kernel.metadata.shared,
        "dots": kernel.asm["ttir"].count("tt.dot "),
        "tensor_core": len(re.findall(TENSOR_CORES[chip], kernel.asm["ptx"])),
    }


def complaints(launch: Launch, chip: int, dtype: torch.dtype, need: dict[str, int], before: dict) -> Iterator[str]:
    """What is wrong with compiled code."""
    if need["shared"] > SHARED[chip]:
        yield f"needs {need['shared']:,} bytes of shared memory, {SHARED[chip]:,} are there"
    if need["stack"] and dtype == torch.bfloat16:
        yield f"spills {need['stack']} bytes"
    if need["dots"] and not need["tensor_core"] and dtype != torch.float32:
        yield "multiplies without tensor cores"
    for name in ("registers", "stack", "shared"):
        if before and need[name] > SLACK * before[name]:
            yield f"needs {need[name]} {name}, the baseline {before[name]}"


def baseline() -> dict[str, dict[str, int]]:
    """What launches needed when the baseline was stored; nothing if another compiler stored it."""
    table = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.is_file() else {}
    return table.get("launches", {}) if table.get("triton") == triton.__version__ else {}


def main() -> int:
    """Compile, print, compare or store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=OPS, help="only this one; may be given several times")
    parser.add_argument("--chip", action="append", type=int, choices=list(SHARED), help="only this compute capability")
    parser.add_argument("--all", action="store_true", help="every launch, precision and head dim")
    parser.add_argument("--write", action="store_true", help="store what was found as the baseline")
    args = parser.parse_args()
    known = baseline()
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if args.all else (torch.bfloat16,)
    count = wrong = 0
    for op in args.op or OPS:
        found = {}
        for chip in args.chip or SHARED:
            for dtype, head_dim in ((dtype, d) for dtype in dtypes for d in ((64, 128) if args.all else (64,))):
                caught = launches(op, chip, dtype, head_dim)
                firsts = {launch.kernel.fn.__name__: launch for launch in reversed(caught)}
                for launch in caught if args.all else firsts.values():
                    key = f"{op} sm_{chip} {TYPES[dtype]} d={head_dim} {launch.name}"
                    need = found[key] = build(launch, chip)
                    told = list(complaints(launch, chip, dtype, need, {} if args.write else known.get(key, {})))
                    wrong += len(told)
                    print(f"{key}: {need}", *(f"\n  WRONG: {one}" for one in told), flush=True)
        count += len(found)
        if args.write:  # after each op, since all of them take an hour
            again = {key.rpartition(" ")[0] for key in found}  # launches that are gone leave the table
            kept = {key: need for key, need in baseline().items() if key.rpartition(" ")[0] not in again}
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(need)}" for key, need in sorted((kept | found).items()))
            text = f'{{"triton": {json.dumps(triton.__version__)}, "launches": {{\n{lines}\n}}}}\n'
            write_file(BASELINE, text, force=True)
    print(f"{count} kernels compiled, {wrong} complaints")
    return bool(wrong or not count)


if __name__ == "__main__":
    sys.exit(main())
