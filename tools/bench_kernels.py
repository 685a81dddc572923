#!/usr/bin/env python3
"""Time kernels against what others would do: rows of tools/results/kernels-cpu.csv, or kernels-CHIP.csv on a GPU.

    python tools/bench_kernels.py [--op dwt] [--quick]                one CPU thread, float32
    python tools/bench_kernels.py --device cuda --dtype bfloat16      a GPU

What is timed stands in tools/kernel_cases/OP.py. An op's tests run first; no time is taken of an op whose tests fail.
All calls of a case take turns, so that other programs slow all of them. Columns of a row:

    ms              median of the turns
    ratio           its time over that of our first implementation of the same case: above 1, ours is faster
    peak_mib        memory that the call takes beyond its inputs at most
    error           largest difference from the float64 result of our torch implementation, which the tests compare
                    with the definition, relative to the largest value; "other" where a peer computes something else,
                    such as dense attention beside sparse
    share, of       of what this machine was measured to do in this run, by multiplications (matmul) or bytes (copy),
                    whichever bounds the case more

New rows replace those of the same op, device and dtype.
"""

import argparse
import csv
import importlib
import io
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler tells of each start and stop

import torch
from kernel_cases import Call, Case
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from zoo.files import write_file

TOP = Path(__file__).parents[1]
OPS = sorted(path.stem for path in (TOP / "tools" / "kernel_cases").glob("[a-z]*.py"))
COLUMNS = ("op", "shape", "dtype", "impl", "ms", "ratio", "peak_mib", "error", "share", "of", "machine", "versions")
OTHER = 0.1  # an error above this is no error of rounding
TURN = 5.0  # milliseconds of one turn at least


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def took(call: Callable[[], object], times: int) -> float:
    """Milliseconds of one call, of so many."""
    synchronise()
    began = time.perf_counter()
    for _ in range(times):
        call()
    synchronise()
    return 1e3 * (time.perf_counter() - began) / times


def medians(calls: dict[str, Callable[[], object]], seconds: float, most: int) -> dict[str, float]:
    """Milliseconds of each, in turns: two to warm up, then at least three, until the time is spent."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    times = dict.fromkeys(calls, 1)  # short calls are repeated, so that a GPU is not timed by its launches
    began = time.perf_counter()
    for turn in range(most + 2):
        for name, call in calls.items():
            spent = took(call, times[name])
            found[name] += [spent] if turn >= 2 else []
            times[name] = max(1, min(100, int(TURN / spent))) if turn < 2 else times[name]
        if turn >= 4 and time.perf_counter() - began > seconds:
            break
    return {name: statistics.median(spent) for name, spent in found.items()}


def peak(call: Callable[[], object]) -> float:
    """MiB that a call takes at most, its result included."""
    if torch.cuda.is_available() and torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        result = call()
    del result
    now = most = 0
    for event in told.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


def ceilings() -> dict[str, float]:
    """What this machine does now: multiplications and additions, and bytes copied, both per second."""
    side, size = (4096, 2**28) if torch.get_default_device().type == "cuda" else (1024, 2**25)
    a, b, x = torch.randn(side, side), torch.randn(side, side), torch.randn(size)
    y = torch.empty_like(x)
    found = medians({"matmul": lambda: a @ b, "copy": lambda: y.copy_(x)}, 2.0, 15)
    return {"matmul": 2e3 * side**3 / found["matmul"], "copy": 2e3 * x.nbytes / found["copy"]}


def rows_of(case: Case, most: dict[str, float], seconds: float, repeats: int) -> Iterator[dict[str, str]]:
    """Compare, time and describe one case; then the same with all gradients."""
    calls = case.ours | case.peers
    with torch.no_grad():
        once = {name: partial(results, call, case.inputs) for name, call in calls.items()}
        exact = results(case.ours["torch"], [x.double() for x in case.inputs])
        yield from compared(case, case.op, once, exact, (case.flops, case.bytes), most, seconds, repeats)
    if case.trained:
        leaves = [x.clone().requires_grad_() for x in case.inputs]
        wide = [x.double().requires_grad_() for x in case.inputs]
        weight = torch.randn_like(exact[0])
        both = {n: partial(gradients, call, leaves, weight) for n, call in calls.items() if n not in case.untrained}
        exact = gradients(case.ours["torch"], wide, weight)
        yield from compared(case, f"{case.op}, backward too", both, exact, case.trained, most, seconds, repeats)


def results(call: Call, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output alone."""
    return [call(*inputs)]


def gradients(call: Call, leaves: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Those of all inputs for a random gradient of the output."""
    out = call(*leaves)
    return list(torch.autograd.grad(out, leaves, weight.to(out.dtype), allow_unused=True))


def compared(
    case: Case,
    op: str,
    calls: dict[str, Callable[[], list[Tensor]]],
    exact: list[Tensor],
    work: tuple[float, float],
    most: dict[str, float],
    seconds: float,
    repeats: int,
) -> Iterator[dict[str, str]]:
    """Rows of calls that compute the same, or are named as others."""
    errors = {}
    for name, call in list(calls.items()):
        try:
            errors[name] = error(call(), exact)
        except Exception as failure:  # a peer's own limits must not cost the other rows
            if name in case.ours:
                raise
            print(f"{op} on {case.shape}: {name} does not run: {str(failure).splitlines()[0]}", file=sys.stderr)
            del calls[name]
            continue
        if name in case.ours and not errors[name] <= OTHER:
            sys.exit(f"bench: {op} on {case.shape} by {name} is off by {errors[name]:.1e}; nothing is timed")
    del exact
    peaks = {name: peak(call) for name, call in calls.items()}
    found = medians(calls, seconds, repeats)
    bounds = {"matmul": work[0] / most["matmul"], "copy": work[1] / most["copy"]}
    bound = max(bounds, key=lambda name: bounds[name])
    first = found[next(iter(case.ours))]
    for name, ms in found.items():
        yield {
            "op": op,
            "shape": case.shape,
            "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
            "impl": name,
            "ms": f"{ms:.3f}",
            "ratio": f"{ms / first:.2f}",
            "peak_mib": f"{peaks[name]:.1f}",
            "error": f"{errors[name]:.1e}" if errors[name] <= OTHER else "other",
            "share": f"{100e3 * bounds[bound] / ms:.0f} %" if bounds[bound] and errors[name] <= OTHER else "",
            "of": bound if bounds[bound] and errors[name] <= OTHER else "",
            "machine": machine(),
            "versions": versions(),
        }


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of each tensor; infinite where shapes differ."""
    worst = 0.0
    for ours, right in zip(found, exact, strict=True):
        if ours is None or ours.shape != right.shape:
            return float("inf")
        worst = max(worst, float((ours.double() - right).abs().max() / right.abs().max()))
    return worst


def machine() -> str:
    """The processor that was timed, and how busy the machine was."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"one thread of {model}, {cores} cores, load {load:.0f}"


def versions() -> str:
    """What was timed: the commit, torch, triton."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=TOP, capture_output=True, text=True)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{commit.stdout.strip()}, torch {torch.__version__}, triton {triton}"


def read_table(table: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows so far; tables of an older form are started anew."""
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")))) if table.is_file() else []
    return [row for row in rows if set(row) == set(columns)]


def write_table(table: Path, columns: Sequence[str], rows: list[dict[str, str]]) -> None:
    """Put a table in place whole."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(table, stream.getvalue(), force=True)


def tests_pass(op: str) -> bool:
    """Run the op's tests, on the GPU too where there is one."""
    files = sorted((TOP / "tests" / "kernels").glob(f"test_{op}*.py"))
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *files]
    told = subprocess.run(words, cwd=TOP, capture_output=True, text=True)
    if told.returncode or not files:
        print(f"{op}: its tests fail, no time is taken\n{told.stdout[-2000:]}", file=sys.stderr)
    return bool(files) and told.returncode == 0


def main() -> int:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=OPS, help="only this one; may be given several times")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case, when its calls are slow")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns at most")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_device(args.device)
    torch.set_default_dtype(getattr(torch, args.dtype))
    torch.manual_seed(0)
    chip = "cpu" if args.device == "cpu" else torch.cuda.get_device_name().split()[-1].lower()
    table = TOP / "tools" / "results" / f"kernels-{chip}.csv"
    kept = read_table(table, COLUMNS)
    failed = 0
    for op in args.op or OPS:
        if not tests_pass(op):
            failed += 1
            continue
        kept = [row for row in kept if row["op"].split(",")[0] != op or row["dtype"] != args.dtype]
        most = ceilings()
        for case in importlib.import_module(f"kernel_cases.{op}").timed(args.quick):
            for row in rows_of(case, most, args.seconds, args.repeats):
                print("  ".join(row[column] for column in COLUMNS[:10]), flush=True)
                kept.append(row)
            torch.compiler.reset()  # peers compile anew for each case
        write_table(table, COLUMNS, kept)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
