import pytest
import torch

from zoo.kernels.impls import pick


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
