#!/usr/bin/env python3
"""Time restorers beside the same networks computed as their published code does: tools/results/restorers-cpu.csv.

    python tools/bench_restorers.py [--variant hat-s-x4] [--turns 7]      one CPU thread, float32

The baseline stands in tools/restorer_cases: same weights, vectorised, but logits, masks, biases and copies of maps in
memory. Both networks must compute the same before one of them is timed. A turn is ours, the baseline, and a matrix
product of 1024 a side; other programs slow all of them. Columns of a row:

    cpu_s           median over the turns of the thread's CPU time
    ratio           of the baseline's time to ours, turn by turn: above 1, ours is faster
    efficiency      multiplications and additions of the baseline, at the rate of the matrix product, over cpu_s
    official        the efficiency of the published code itself, measured on another CPU (Zen 3, AVX2)
    peak_mib        resident memory that two images cost at most, beyond a process that has restored one of 16x16 (code
                    is loaded by then); each network in a process of its own (VmHWM less VmRSS, Linux)
    error           largest difference of ours from the baseline, relative to the largest value. Networks that sort
                    pixels are compared in float64, and block by block: what nine tenths of each block's values keep

New rows replace those of the same variant.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bench_kernels import TOP, machine, read_table, versions, write_table
from restorer_cases import unfused
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.models import create, needs
from zoo.models.restorers.histoformer import TransformerBlock

TABLE = TOP / "tools" / "results" / "restorers-cpu.csv"
COLUMNS = ("variant", "input", "impl", "cpu_s", "ratio", "gflop", "efficiency", "official", "peak_mib", "error")
COLUMNS += ("matmul_gflop_s", "machine", "versions")
TOLERANCE, EXACT = 1e-4, 1e-9  # of float32, of float64
SIDE = 1024  # of the matrix product


@dataclass(frozen=True)
class Case:
    """One network for the bench.

    Attributes:
        side: height and width of its input.
        official: efficiency of the published code at that input; None = not measured.
        keywords: what differs from the variant.
    """

    side: int
    official: float | None = None
    keywords: dict[str, Any] = field(default_factory=dict)


CASES = {
    "hat-s-x4": Case(64, 0.24),
    "hat-x4": Case(64, 0.35),
    "craft-x4": Case(64, 0.14),
    "histoformer-allweather": Case(128, 0.15),
}
QUICK = {
    "hat-tiny-x4": Case(16, keywords={"global_residual": False}),  # the published code has none
    "craft-tiny-x2": Case(48, keywords={"global_residual": False}),
    "histoformer-tiny": Case(16),
}


def built(variant: str, case: Case) -> nn.Module:
    """The network with random weights, always the same."""
    torch.manual_seed(0)
    return create({"variant": variant, **case.keywords})


def image(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise, (1, 3, side, side) in [0, 1], always the same."""
    return torch.rand(1, 3, case.side, case.side, generator=torch.Generator().manual_seed(1)).to(dtype)


def compared(variant: str, case: Case) -> float:
    """How far ours is from the baseline in float32; exits where that is too far."""
    ours = built(variant, case)
    if not needs(ours).whole:
        error = difference(ours(image(case)), unfused(ours)(image(case)))
    else:  # rounding moves features to other pixels
        error = max(differences_of_blocks(ours, image(case)))
        double = ours.double()
        exact = difference(double(image(case, torch.float64)), unfused(double)(image(case, torch.float64)))
        error = error if exact <= EXACT else exact
    if not error <= TOLERANCE:
        sys.exit(f"bench: {variant} and its baseline differ by {error:.1e}; nothing is timed")
    return error


def difference(found: Tensor, expected: Tensor, quantile: float = 1.0) -> float:
    """That of the largest values, or of most, relative to the largest value."""
    apart = (found - expected).abs().flatten().sort().values
    return float(apart[int(quantile * (len(apart) - 1))] / expected.abs().max())


def differences_of_blocks(ours: nn.Module, lq: Tensor) -> list[float]:
    """Each block of ours on what that of the baseline is given."""
    baseline, found = unfused(ours), []
    for name, module in baseline.named_modules():
        if isinstance(module, TransformerBlock):
            same = ours.get_submodule(name)
            module.register_forward_hook(
                lambda _module, inputs, out, same=same: found.append(difference(same(*inputs), out, 0.9))
            )
    baseline(lq)
    return found


def took(call: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def peak(variant: str, case: Case, impl: str) -> float:
    """MiB that two images take at most, beyond what the process has after a small one."""
    network = built(variant, case)
    network = network if impl == "ours" else unfused(network)
    lq = image(case)
    network(lq[:, :, :16, :16])
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is the present
    before = resident("VmRSS")
    network(lq)
    network(lq)
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """MiB of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) / 1024 if found else float("nan")


def rows_of(variant: str, case: Case, turns: int) -> list[dict[str, str]]:
    """Compare, measure and describe both."""
    error = compared(variant, case)
    words = [sys.executable, __file__, "--variant", variant, "--peak"]
    peaks = {impl: subprocess.check_output([*words, impl], text=True).strip() for impl in ("ours", "unfused")}
    ours, lq = built(variant, case), image(case)
    networks = {"ours": ours, "unfused": unfused(ours)}
    with FlopCounterMode(display=False) as counter:
        networks["unfused"](lq)
    flops = counter.get_total_flops()
    networks["ours"](lq)
    a, b = torch.randn(2, SIDE, SIDE)
    spent: dict[str, list[float]] = {"ours": [], "unfused": [], "matmul": []}
    for _ in range(turns):
        for name, network in networks.items():
            spent[name].append(took(lambda network=network: network(lq)))
            spent["matmul"].append(took(lambda: a @ b))
    rate = 2 * SIDE**3 / statistics.median(spent["matmul"])
    ratio = statistics.median(b / a for a, b in zip(spent["ours"], spent["unfused"], strict=True))
    return [
        {
            "variant": variant,
            "input": f"{case.side}x{case.side}",
            "impl": impl,
            "cpu_s": f"{statistics.median(spent[impl]):.3f}",
            "ratio": f"{ratio if impl == 'unfused' else 1:.2f}",
            "gflop": f"{flops / 1e9:.2f}",
            "efficiency": f"{flops / rate / statistics.median(spent[impl]):.3f}",
            "official": f"{case.official}" if case.official and impl == "unfused" else "",
            "peak_mib": peaks[impl],
            "error": f"{error:.1e}",
            "matmul_gflop_s": f"{rate / 1e9:.1f}",
            "machine": machine(),
            "versions": versions(),
        }
        for impl in networks
    ]


def main() -> int:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = CASES | QUICK
    parser.add_argument("--variant", action="append", choices=known, help="only this one; may be given several times")
    parser.add_argument("--turns", type=int, default=7, help="timed turns")
    parser.add_argument("--table", type=Path, default=TABLE, help="where rows go")
    parser.add_argument("--peak", choices=["ours", "unfused"], help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        if args.peak:
            print(f"{peak(args.variant[0], known[args.variant[0]], args.peak):.1f}")
            return 0
        for variant in args.variant or CASES:
            rows = rows_of(variant, known[variant], args.turns)
            for row in rows:
                print("  ".join(row[column] for column in COLUMNS[:11]), flush=True)
            kept = [row for row in read_table(args.table, COLUMNS) if row["variant"] != variant]
            write_table(args.table, COLUMNS, kept + rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
