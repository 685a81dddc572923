import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.helpers import error
from zoo import models
from zoo.errors import UserError
from zoo.models.features.inception import Inception

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "inception.safetensors")
FLOAT = 2e-6  # of float32 through 48 convolutions against float64; 2e-7 was seen


def drawn():
    """Weights under the official names, each drawn by its name, as those of the golden features."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Inception().state_dict().items() if "num_batches" not in key}
    state = {}
    for key, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(key.encode()))
        if len(shape) > 1:
            value = random.standard_normal(shape) * (2 / shape[1:].numel()) ** 0.5
        elif key.endswith(("running_var", "weight")):
            value = random.uniform(0.5, 1.5, shape)
        else:
            value = random.standard_normal(shape) * 0.1
        state[key] = torch.from_numpy(value.astype(np.float32))
    return state


@pytest.fixture(scope="module")
def net():
    return models.load(drawn())


@pytest.fixture(scope="module")
def image():
    return torch.from_numpy(np.random.RandomState(0).uniform(size=(1, 3, 299, 299)).astype(np.float32))


def test_features_equal_those_of_the_official_graph(net, image):
    with torch.inference_mode():
        assert error(net(image)[0], GOLDEN["output.features"]) < FLOAT


def test_official_files_are_recognised_with_and_without_classifier_and_counters(net):
    assert (models.family_of(net), net.variant) == ("inception", "inception-2015")
    whole = net.state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    assert models.load(whole).variant == "inception-2015"
    with pytest.raises(UserError, match=r"fc\.weight, which has 1008 rows"):
        models.load(whole | {"fc.weight": torch.zeros(1000, 2048)})


def test_small_images_are_enlarged_bicubically(net, image):
    small = image[..., :64, :64]
    large = F.interpolate(small, (299, 299), mode="bicubic", antialias=True)
    with torch.inference_mode():
        assert torch.equal(net(small), net(large))
        with pytest.raises(ValueError, match=r"must be \(b, 3, h, w\), got \(1, 1, 64, 64\)"):
            net(small[:, :1])


def test_without_its_file_it_says_where_it_comes_from():
    with pytest.raises(FileNotFoundError, match=r"'inception-2015' are not shipped; fetch them from .*pytorch-fid"):
        models.load("inception-2015")
