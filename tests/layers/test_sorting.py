import pytest
import torch

from zoo.layers import sorting
from zoo.layers.sorting import stable_sort


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 3, 40), -1), ((2, 40, 3), 1), ((50,), 0), ((3, 70000), 1), ((9, 9000), 1)]
)
def test_order_and_values_are_those_of_torch(shape, dim, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).mul(4).round().div(4).to(dtype)  # many ties, both zeros
    x.flatten()[::7] = -0.0
    x.flatten()[3], x.flatten()[5] = torch.inf, -torch.inf
    values, order = stable_sort(x, dim)
    expected = torch.sort(x, dim=dim, stable=True)
    assert torch.equal(order, expected.indices)
    assert torch.equal(values, expected.values)


def test_rows_of_both_sorts_meet_at_the_border(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    short = stable_sort(x, 1)
    monkeypatch.setattr(sorting, "_LONG", 64)
    monkeypatch.setattr(sorting, "_AT_ONCE", 128)  # two rows at once, the last alone
    for a, b in zip(short, stable_sort(x, 1), strict=True):
        assert torch.equal(a, b)


def test_gradients_go_back_to_where_values_came_from():
    x = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    values, _ = stable_sort(x, 1)
    (values * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[100.0, 1.0, 10.0]]))


def test_nothing_is_sorted_into_nothing():
    values, order = stable_sort(torch.zeros(2, 0), 1)
    assert values.shape == order.shape == (2, 0)
