import pytest

from zoo import models
from zoo.models.hub import is_hub_id
from zoo.models.weights import write_weights

TINY = {"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of the hub as it lies after files were fetched, and no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def fetched(owner, name, *files):
        place = tmp_path / f"models--{owner}--{name}"
        snapshot = place / "snapshots" / ("0" * 40)
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        for file in files:
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            write_weights(snapshot / file, models.create(TINY))
        return f"{owner}/{name}"

    return fetched


def test_the_only_weight_file_of_a_repository_is_loaded(hub):
    network = models.load(hub("someone", "sharp-x2", "weights/model.safetensors"))
    assert network.config == models.create(TINY).config


def test_of_several_files_one_must_be_named(hub):
    name = hub("someone", "sharp", "x2.safetensors", "x4.safetensors")
    with pytest.raises(models.UserError, match=r"several weight files \(x2.safetensors, x4.safetensors\); name one as"):
        models.load(name)
    assert models.load(f"{name}:x4.safetensors").upscale == 2


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing:a.pth"])
def test_what_cannot_be_had_is_one_sentence(hub, name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' is neither a file here nor to be had from the hub"):
        models.load(name)


@pytest.mark.parametrize("text", ["a/b", "sunsean/Histoformer", "a/b:c/d.pth", "XPixelGroup/HAT:HAT_SRx4.pth"])
def test_names_of_the_hub(text):
    assert is_hub_id(text)


@pytest.mark.parametrize("text", ["a", "a/b.pth", "./a/b", "/a/b", "a/b/c", "../a", "a/b.safetensors", "~/a"])
def test_names_of_files(text):
    assert not is_hub_id(text)
