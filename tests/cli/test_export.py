import json

import pytest
import torch

from zoo.cli import main
from zoo.models import create
from zoo.models.weights import write_weights


@pytest.fixture
def weights(tmp_path):
    network = create({"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4, "upscale": 2})
    return str(write_weights(tmp_path / "w.safetensors", network))


def test_export_tells_what_it_compared(weights, tmp_path, capsys):
    target = tmp_path / "w.pt2"
    assert main(["export", weights, str(target), "--size", "16x24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["compared"], found["any_size"]) == (["24x16"], False)
    assert found["error"] < 1e-4
    assert torch.export.load(target).module()(torch.rand(1, 3, 16, 24)).shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name one file to be made"),
        (["a.trt"], "zoo exports .pt2 and .onnx"),
        (["a.pt2", "--size", "big"], "must be height x width"),
    ],
)
def test_mistakes_are_one_sentence(weights, words, sentence, capsys):
    assert main(["export", weights, *words]) == 2
    assert sentence in capsys.readouterr().err
