from importlib import import_module
from pathlib import Path

import pytest
import torch

from zoo.kernels import chips

OPS = sorted(path.parent.name for path in Path(chips.__file__).parent.glob("*/triton_impl.py"))


def test_tuned_takes_the_newest_chip_that_is_not_newer(monkeypatch):
    x, table = torch.zeros(1), {90: "hopper", 80: "ampere"}
    for own, expected in ((75, "ampere"), (80, "ampere"), (89, "ampere"), (90, "hopper"), (100, "hopper")):
        monkeypatch.setattr(chips, "chip", lambda x, own=own: own)
        assert chips.tuned(table, x) == expected


def test_a_tensor_outside_gpus_counts_as_the_oldest_chip_that_we_tune_for():
    assert chips.chip(torch.zeros(1)) == 80


@pytest.mark.parametrize("op", OPS)
def test_each_op_keeps_its_tables_by_chip_in_tuning(op):
    found = vars(import_module(f"zoo.kernels.{op}.tuning"))
    tables = [table for name, table in found.items() if name[0] != "_" and isinstance(table, dict)]
    assert tables
    assert all(min(table) == 80 for table in tables)
