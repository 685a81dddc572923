import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.kernels.impls import eager, pick


class OnGpu:
    is_cuda = True


def test_auto_takes_triton_on_a_gpu_where_the_op_has_it():
    assert pick("op", "auto", OnGpu()) == "triton"
    assert pick("op", "auto", OnGpu(), triton=False) == "torch"
    assert pick("op", "auto", torch.zeros(1)) == "torch"


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_an_explicit_ask_is_kept(impl):
    assert pick("op", impl, torch.zeros(1)) == impl


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="op: impl must be auto, reference, torch or triton, got 'cuda'"):
        pick("op", "cuda", torch.zeros(1))
    with pytest.raises(ValueError, match="op: impl must be auto, reference or torch for this call, got 'triton'"):
        pick("op", "triton", OnGpu(), triton=False)


def test_a_restored_image_does_not_wait_for_the_compiler():
    script = (
        "import sys, torch, zoo.models\n"
        "with torch.inference_mode(): zoo.models.create('hat-tiny-x4')(torch.rand(1, 3, 16, 16))\n"
        "assert 'zoo.kernels.window_attention.torch_impl' in sys.modules\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True)


@pytest.mark.parametrize(("grad", "wants", "expected"), [(True, True, False), (True, False, True), (False, True, True)])
def test_registered_ops_are_for_gradients_and_graphs(grad, wants, expected):
    x = torch.ones(1, requires_grad=wants)
    with torch.set_grad_enabled(grad):
        assert eager(torch.ones(1), None, x) == expected
    traced = torch.compile(lambda x: x if eager(x) else x + 1, backend="eager", fullgraph=True)
    assert traced(torch.ones(1)) == 2
