import pytest
import torch

from zoo.errors import UserError
from zoo.pipelines.devices import device_word, torch_device


def test_words_become_devices():
    assert torch_device("cpu") == torch.device("cpu")
    assert torch_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_cuda_devices_count_from_zero(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [torch_device(word) for word in ("auto", "cuda", "cuda:0", "cuda:1")] == [
        torch.device("cuda"),
        torch.device("cuda"),
        torch.device("cuda", 0),
        torch.device("cuda", 1),
    ]
    with pytest.raises(UserError, match="device cuda:2: torch sees 2 CUDA devices here; use cpu, or run `zoo doctor`"):
        torch_device("cuda:2")


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:", ""])
def test_other_words_are_refused(text):
    for judge in (device_word, torch_device):
        with pytest.raises(UserError, match=f"device must be cpu, cuda, cuda:0 or auto, got {text!r}"):
            judge(text)
