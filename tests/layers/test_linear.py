import pytest
import torch
from torch import nn

from zoo.layers import linear as module
from zoo.layers.linear import Linear, linear


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 24), (24,), (1, 3, 4, 24), (0, 24)])
def test_it_is_a_linear_layer_with_and_without_gradients(shape, bias, gelu):
    torch.manual_seed(0)
    plain, ours = nn.Linear(24, 40, bias=bias), Linear(24, 40, bias=bias)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(shape)
    expected = nn.functional.gelu(plain(x)) if gelu else plain(x)
    torch.testing.assert_close(ours(x, gelu=gelu), expected)
    with torch.inference_mode():
        found = ours(x, gelu=gelu)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous()


def test_strides_do_not_matter():
    x, weight = torch.randn(6, 24, 5).transpose(1, 2), torch.randn(24, 40).t()
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight), x @ weight.t())


def test_inference_in_float32_is_where_it_differs(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_ONEDNN", lambda *words: calls.append(words) or torch.zeros(()))
    layer, x = Linear(4, 4), torch.randn(2, 4)
    layer(x)
    with torch.inference_mode():
        layer.double()(x.double())
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert not calls
        layer(x)
    assert len(calls) == 1
