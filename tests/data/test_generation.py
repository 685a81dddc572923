import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data import latents
from zoo.data.generation import GenerationData
from zoo.data.stages import Stage
from zoo.errors import UserError
from zoo.scene import parse

STAGES = [Stage(2, 8, 32), Stage(None, 4, 40)]
SIZES = ((50, 50), (40, 80), (80, 40), (60, 50))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("captioned")
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZES[number % 4], 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{number:02d}.png")
        (path / f"{number:02d}.txt").write_text(f"number {number}\nthe same {number}")
    return path


def data(source, **keywords):
    settings = {"stages": STAGES, "validation": 6, "seed": 3, "epoch_steps": 6}
    return GenerationData(str(source), **{**settings, **keywords})


def on_rank(module, rank, world, accumulate=1):
    """As Lightning hands a module to one of several processes."""
    strategy = SimpleNamespace(barrier=lambda: None)
    module.trainer = SimpleNamespace(
        global_rank=rank, local_rank=rank, world_size=world, accumulate_grad_batches=accumulate, strategy=strategy
    )
    return module


def rows(batches):
    """What was seen, comparable: numbers, captions, sizes and pixels."""
    tensor = "image"
    return [
        (
            batch["number"].tolist(),
            batch["caption"],
            batch[tensor].shape,
            batch[tensor].double().sum((1, 2, 3)).tolist(),
        )
        for batch in batches
    ]


def joined(parts):
    numbers, captions, shapes, sums = zip(*parts, strict=True)
    assert len(set(shapes)) == 1
    size = torch.Size([sum(map(len, numbers)), *shapes[0][1:]])
    numbers, captions, sums = (list(itertools.chain(*lists)) for lists in (numbers, captions, sums))
    return numbers, captions, size, sums


@pytest.fixture(params=["shapes", "folder"])
def source(request, folder):
    return "shapes" if request.param == "shapes" else folder


def test_batches_of_shapes_world():
    batches = list(data("shapes").train_dataloader())
    assert [tuple(batch["image"].shape) for batch in batches] == [(8, 3, 32, 32)] * 2 + [(4, 3, 40, 40)] * 4
    assert [n for batch in batches for n in batch["number"].tolist()] == list(range(32))
    assert all(0 <= batch["image"].min() < batch["image"].max() <= 1 for batch in batches)
    assert not any(parse(caption).held_out for batch in batches for caption in batch["caption"])
    [held] = data("shapes").val_dataloader()
    assert [len(batch["caption"]) for batch in held] == [4, 2]
    assert all(parse(caption).held_out for batch in held for caption in batch["caption"])


def test_batches_of_a_folder_hold_one_bucket(folder):
    batches = list(itertools.islice(data(folder, epoch_steps=60).train_dataloader(), 60))
    assert [len(batch["image"]) for batch in batches] == [8] * 2 + [4] * 58
    for step, batch in enumerate(batches):
        h, w = batch["image"].shape[2:]
        assert (h, w) in ({(32, 32), (24, 40), (40, 24)} if step < 2 else {(40, 40), (32, 48), (48, 32)})
    assert len({batch["image"].shape for batch in batches[2:]}) == 3
    assert [n for batch in batches for n in batch["number"].tolist()] == list(range(2 * 8 + 58 * 4))
    seen = [caption.split()[-1] for batch in batches[2:] for caption in batch["caption"]]
    counts = [seen.count(name) for name in set(seen)]
    assert len(counts) == 34
    assert max(counts) - min(counts) <= 2  # of 58 * 4 / 34 = 6.8
    assert {caption.split()[0] for batch in batches for caption in batch["caption"]} == {"number", "the"}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_samples_do_not_depend_on_workers(source):
    expected = rows(data(source).train_dataloader())
    assert len(expected) == 6
    for workers in (1, 4):
        assert rows(data(source, workers=workers).train_dataloader()) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_with_the_next_unseen_batch(source, workers):
    unbroken = data(source).train_dataloader()
    expected = rows([*unbroken, *unbroken])
    for stop in (1, 7):  # in the first stage, and in the second epoch
        killed = data(source, workers=workers).train_dataloader()
        assert rows(itertools.islice(itertools.chain(killed, killed), stop)) == expected[:stop]
        resumed = data(source, workers=workers).train_dataloader()
        resumed.load_state_dict(killed.state_dict())
        assert rows(itertools.islice(itertools.chain(resumed, resumed), 12 - stop)) == expected[stop:]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (4, 1), (2, 2)])
def test_ranks_see_disjoint_parts_of_the_same_batches(source, world, accumulate):
    expected = rows(data(source).train_dataloader())
    ranks = [rows(on_rank(data(source), rank, world, accumulate).train_dataloader()) for rank in range(world)]
    for step, batch in enumerate(expected):
        parts = [ranks[rank][step * accumulate + part] for part in range(accumulate) for rank in range(world)]
        assert joined(parts) == batch
    resumed = on_rank(data(source), 1, world, accumulate).train_dataloader()
    resumed.load_state_dict({"step": 2, "part": 0})
    assert rows(itertools.islice(resumed, 4 * accumulate)) == ranks[1][2 * accumulate :]


def test_images_held_out_by_name_are_never_trained_on(folder, tmp_path):
    first, other = data(folder), data(folder, seed=4, stages=[Stage(None, 2, 64)])
    held = [rows(loader) for loader in first.val_dataloader() for _ in range(2)]
    assert held[0] == held[1]
    names = {caption.split()[-1] for _, captions, _, _ in held[0] for caption in captions}
    assert len(names) == 6
    [again] = other.val_dataloader()
    assert {caption.split()[-1] for batch in again for caption in batch["caption"]} == names
    trained = rows(itertools.islice(data(folder, epoch_steps=20).train_dataloader(), 20))
    assert names.isdisjoint(caption.split()[-1] for _, captions, _, _ in trained for caption in captions)
    more = tmp_path / "more"
    more.mkdir()
    for path in [*folder.iterdir()]:
        (more / path.name).write_bytes(path.read_bytes())
    for suffix in ("png", "txt"):
        (more / f"new.{suffix}").write_bytes((folder / f"00.{suffix}").read_bytes())
    grown = data(more)
    grown.setup()
    first.setup()
    held = [{module.images.names[index] for index in module._held} for module in (first, grown)]
    assert len(held[0] - held[1]) <= 1  # a new image displaces one at most
    assert data(folder, validation=0).val_dataloader() == []


def test_what_a_folder_holds_is_reported(folder, caplog):
    with caplog.at_level(logging.INFO):
        module = data(folder)
        module.setup("fit")
        module.setup("validate")
    assert caplog.text.count(": 40 images") == 1
    assert "6 of them are held out for validation" in caplog.text
    assert "buckets of patch_size 40: 40x40" in caplog.text
    assert data("shapes").report() == {}


def test_images_for_an_autoencoder_need_no_captions(folder, tmp_path):
    for path in folder.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="none of its 40 images has a caption"):
        data(tmp_path).setup("fit")
    module = data(tmp_path, captions="none")
    batch = next(iter(module.train_dataloader()))
    assert batch["caption"] == [""] * 8
    assert module.report()["train"].count == 40


def encode(batch):
    return {"latents": batch["image"][:, :, ::4, ::4] - 0.5}


def encode_text(captions):
    codes = torch.tensor([[len(caption), int(caption.split()[-1])] for caption in captions])
    return {"encoder_hidden_states": codes.float(), "mask": codes > 12}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_samples_are_those_of_the_images(folder, workers, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(latents, "SHARD", 5)
    plain = data(folder, stages=STAGES[1:])
    cached = data(folder, stages=STAGES[1:], cache=1000, workers=workers)
    cached.encode(encode, "enc", encode_text)
    for image, stored in zip(plain.train_dataloader(), cached.train_dataloader(), strict=True):
        assert image["caption"] == stored["caption"]
        assert torch.equal(image["number"], stored["number"])
        torch.testing.assert_close(
            stored["latents"], encode(image)["latents"], atol=2.5e-4, rtol=0
        )  # float16 below 0.5
        text = encode_text(image["caption"])
        assert torch.equal(stored["context.encoder_hidden_states"], text["encoder_hidden_states"])
        assert torch.equal(stored["context.mask"], text["mask"])
    files = sorted(path.name for path in tmp_path.glob("latents/folder-*-enc/*"))
    assert files[0] == "32x48-00000.safetensors"
    assert len(files) >= 34 / 5


def test_ranks_encode_their_shares_and_one_completes_what_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 5)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "whole"))
    settings = {"stages": STAGES[1:], "cache": 1000}
    whole = data(folder, **settings)
    whole.encode(encode, "enc")
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "shared"))
    with pytest.raises(UserError, match="missing or damaged"):  # rank 1 alone; in truth it waits for rank 0
        on_rank(data(folder, **settings), 1, 2).encode(encode, "enc")
    shared = tmp_path / "shared"
    by_second = {path.name: path.stat().st_mtime_ns for path in shared.rglob("*.safetensors")}
    on_rank(data(folder, **settings), 0, 2).encode(encode, "enc")
    files = {path.name: path for path in shared.rglob("*.safetensors")}
    expected = {path.name: path for path in (tmp_path / "whole").rglob("*.safetensors")}
    assert 0 < len(by_second) < len(files) == len(expected)
    assert all(files[name].read_bytes() == path.read_bytes() for name, path in expected.items())
    assert all(files[name].stat().st_mtime_ns == when for name, when in by_second.items())


def test_caches_are_shared_only_by_equal_samples(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())

    def caches(source, encoder="enc", **keywords):
        module = data(source, stages=[Stage(None, 4, 32)], cache=40, **keywords)
        module.encode(encode, encoder)
        return len(list((tmp_path / "cache/latents").iterdir()))

    assert caches(copy) == caches(copy) == caches(copy, epoch_steps=9, seed=9) == 1
    assert caches(copy, "other") == 2
    assert caches(copy, aspect=1.0) == 3
    assert caches(copy, validation=5) == 4
    (copy / "01.txt").write_text("another caption 1")
    assert caches(copy) == 5
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(copy / "00.png")
    assert caches(copy) == 6
    monkeypatch.setattr(latents, "SHARD", 8)
    monkeypatch.setattr("zoo.data.generation.SHARD", 8)
    assert caches("shapes") == caches("shapes", validation=0) == 7
    assert caches("shapes", seed=4) == 8
    assert caches("shapes", render_sizes=[64]) == 9


def test_more_samples_of_shapes_world_go_on_where_fewer_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(latents, "SHARD", 8)
    monkeypatch.setattr("zoo.data.generation.SHARD", 8)
    seen = []

    def counted(batch):
        seen.append(len(batch["image"]))
        return encode(batch)

    for count, expected in ((5, 8), (8, 8), (20, 24)):
        module = data("shapes", stages=[Stage(None, 4, 32)], cache=count)
        module.encode(counted, "enc")
        assert sum(seen) == expected
        assert len(module.latents) == count
        indices = [module.train_dataloader()._sampler(0).index(number) for number in range(count)]
        assert sorted(indices) == list(range(count))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"epoch_steps": 0}, "epoch_steps >= 1"),
        ({"workers": -1}, "workers, cache and validation must be >= 0"),
        ({"stages": [Stage(3)]}, "the last stage must not end"),
        ({"hflip": True}, "hflip is for folders"),
        ({"aspect": 1.0}, "aspect is for folders"),
        ({"source": "here", "render_sizes": [64]}, "render_sizes and things are for shapes world"),
        ({"source": "here", "things": 2}, "remove them"),
        ({"source": "here", "cache": 9, "hflip": True}, "cached latents cannot be mirrored"),
        ({"cache": 9}, "cached latents have one patch_size"),
    ],
)
def test_impossible_requests_are_one_sentence(keywords, message):
    with pytest.raises(UserError, match=message):
        GenerationData(**{"stages": STAGES, **keywords})


def test_folders_that_do_not_fit_the_settings_are_one_sentence(folder):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        data("nowhere").setup("fit")
    with pytest.raises(UserError, match="validation 40 leaves none of the 40 images"):
        data(folder, validation=40).setup("fit")
    with pytest.raises(UserError, match="cache 33 is smaller than the 34 images"):
        data(folder, cache=33, stages=STAGES[1:]).setup("fit")
    with pytest.raises(UserError, match="patch_size must be a multiple of `multiple`"):
        data(folder, multiple=16).setup("fit")
    with pytest.raises(UserError, match="this task does not train on latents"):
        data("shapes", cache=9, stages=STAGES[1:]).train_dataloader()
