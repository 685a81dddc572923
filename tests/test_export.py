import importlib.util

import pytest
import torch

from tests.helpers import golden, group
from zoo import export as module
from zoo.errors import UserError
from zoo.export import export
from zoo.models import create
from zoo.models.restorers.histoformer import Histoformer

HAT = {
    "family": "hat",
    "embed_dim": 8,
    "depths": [1],
    "num_heads": [2],
    "window_size": 4,
    "img_size": 8,
    "num_feat": 4,
    "compress_ratio": 1,
    "squeeze_factor": 2,
    "conv_scale": 1.0,
    "global_residual": True,
}
MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install 'zoo[export]'")


@pytest.fixture
def hat():
    torch.manual_seed(0)
    return create(HAT)


def test_a_program_takes_any_size_and_knows_nothing_of_zoo(hat, tmp_path):
    made = export(hat, tmp_path / "a.pt2")
    assert made.dynamic
    assert made.multiple == 4
    assert made.error < 1e-5
    assert len(made.sizes) == 2
    program = torch.export.load(tmp_path / "a.pt2")
    assert not [node for node in program.graph.nodes if "zoo" in str(node.target)]
    image = torch.rand(1, 3, 24, 100)
    with torch.no_grad():
        assert (program.module()(image) - hat(image)).abs().max() < 1e-5


@onnx
def test_onnx_takes_any_size_and_computes_the_same(hat, tmp_path):
    import onnxruntime

    made = export(hat, tmp_path / "a.onnx")
    assert made.error < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    image = torch.rand(1, 3, 24, 100)
    with torch.no_grad():
        expected = hat(image)
    (found,) = session.run(None, {"lq": image.numpy()})
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-5


SORTER = {
    "dim": 4,
    "num_blocks": [1] * 4,
    "num_refinement_blocks": 1,
    "heads": [1] * 4,
    "ffn_expansion_factor": 2.0,
}


@onnx
def test_onnx_of_a_network_that_sorts_is_the_same_where_rounding_swaps_nothing():
    facts, tensors = golden("histoformer")
    config = {key: value for key, value in facts["config"].items() if key not in ("out_channels", "dual_pixel_task")}
    network = Histoformer(**config).eval()
    network.load_state_dict(group(tensors, "weight."))
    image = tensors["input.0"]
    with torch.no_grad():
        _, run = module._onnx(module._program(network, image, 8, dynamic=False))
    assert (run(image) - tensors["output.0"]).abs().max() < 1e-4  # the golden file's tolerance


@onnx
def test_a_network_that_sorts_is_written_when_its_leaps_are_accepted(tmp_path):
    torch.manual_seed(0)
    network = create({"family": "histoformer", **SORTER})
    with pytest.raises(UserError, match=r"differs from itself by .*: take \.pt2, or --tolerance"):
        export(network, tmp_path / "a.onnx", size=(64, 64))
    made = export(network, tmp_path / "a.onnx", size=(64, 64), tolerance=1.0)
    assert 1e-4 < made.error < 4 * made.own < 4


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    network = create({"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4, "upscale": 2})
    portable = module._portable

    def wrong(program):
        data, run = portable(program)
        return data, lambda image: run(image) + 0.01

    monkeypatch.setattr(module, "_portable", wrong)
    with pytest.raises(UserError, match="not written, as it differs from the network"):
        export(network, tmp_path / "a.pt2", size=(16, 16))
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_sentence(hat, tmp_path, monkeypatch):
    (tmp_path / "there.pt2").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        export(hat, tmp_path / "there.pt2")
    with pytest.raises(UserError, match=r"zoo exports \.pt2 and \.onnx"):
        export(hat, tmp_path / "a.trt")
    with pytest.raises(UserError, match="both sides must be multiples of 4 for this model, got 10x16"):
        export(hat, tmp_path / "a.pt2", size=(10, 16))
    with pytest.raises(UserError, match="Histoformer is exported for one size; give it"):
        export(create({"family": "histoformer", **SORTER}), tmp_path / "a.pt2")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(FileNotFoundError, match=r"ONNX files need onnx.*pip install 'zoo\[export\]'"):
        export(hat, tmp_path / "a.onnx")
