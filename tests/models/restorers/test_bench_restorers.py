"""tools/bench_restorers.py: what it calls a baseline computes what the network does, and what differs is not timed."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / "tools"
MEASURED = ("cpu_s", "ratio", "gflop", "efficiency", "peak_mib", "error")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return __import__("bench_restorers")


@pytest.mark.parametrize("variant", ["hat-tiny-x4", "craft-tiny-x2", "histoformer-tiny"])
def test_the_baseline_is_the_same_network_on_the_same_weights(bench, variant):
    case = bench.QUICK[variant]
    ours = bench.built(variant, case)
    baseline = bench.unfused(ours)
    assert [x.data_ptr() for x in baseline.parameters()] == [x.data_ptr() for x in ours.parameters()]
    replaced = [module for module in baseline.modules() if "forward" in vars(module)]
    assert replaced
    assert not [module for module in ours.modules() if "forward" in vars(module)]
    with torch.inference_mode():
        assert 0 < bench.compared(variant, case) <= bench.TOLERANCE


def test_a_network_that_differs_from_its_baseline_is_not_timed(bench, monkeypatch):
    whole = bench.unfused

    def wrong(network):
        network = whole(network)
        network.layers[0].residual_group.blocks[1].shift_size = 0
        return network

    monkeypatch.setattr(bench, "unfused", wrong)
    with torch.inference_mode(), pytest.raises(SystemExit, match="nothing is timed"):
        bench.compared("hat-tiny-x4", bench.QUICK["hat-tiny-x4"])


def test_rows_hold_times_memory_and_errors(tmp_path):
    table = tmp_path / "restorers.csv"
    words = [TOOLS / "bench_restorers.py", "--variant", "craft-tiny-x2", "--turns", "1", "--table", table]
    settings = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *words], env=settings, check=True, capture_output=True)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["impl"] for row in rows] == ["ours", "unfused"]
    for row in rows:
        assert not {name: row[name] for name in MEASURED if not float(row[name]) > 0}
