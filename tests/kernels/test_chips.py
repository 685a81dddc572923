import torch

from zoo.kernels import chips


def test_tuned_takes_the_newest_chip_that_is_not_newer(monkeypatch):
    x, table = torch.zeros(1), {90: "hopper", 80: "ampere"}
    for own, expected in ((75, "ampere"), (80, "ampere"), (89, "ampere"), (90, "hopper"), (100, "hopper")):
        monkeypatch.setattr(chips, "chip", lambda x, own=own: own)
        assert chips.tuned(table, x) == expected


def test_a_tensor_outside_gpus_counts_as_the_oldest_chip_that_we_tune_for():
    assert chips.chip(torch.zeros(1)) == 80
