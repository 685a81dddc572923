import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from safetensors.torch import save_file

from tests.tasks.tiny import ADAM, in_child
from zoo.data import latents as module
from zoo.data.generation import GenerationData
from zoo.data.latents import Latents, fill, plan
from zoo.data.sampler import Draw
from zoo.data.stages import Stage
from zoo.errors import UserError
from zoo.pipelines.parts import digest
from zoo.tasks.diffusion import DiffusionTask

# Cached tensors are rounded to float16: relative 2**-11 each, of which a mean over a thousand squares keeps less.
HALF = 5e-4
PARTS = {
    "vae": {
        "class_name": "AutoencoderKL",
        "block_out_channels": [4, 4],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "scaling_factor": 1.0,
    },
    "tokenizer": {"class_name": "CLIPTokenizer", "words": "shapes", "max_length": 8},
    "text_encoder": {
        "class_name": "CLIPTextModel",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "unet": {
        "class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "norm_num_groups": 2,
    },
    "scheduler": {
        "class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "steps_offset": 1,
    },
}


class Samples:
    """Small pictures whose content tells their number; every third has two captions."""

    def __init__(self, fail_at=None, action=None):
        self.fail_at, self.action, self.read = fail_at, action, []

    def __getitem__(self, number):
        if number == self.fail_at:
            self.action()
        self.read.append(number)
        caption = [f"a {number}", "again"] if number % 3 == 0 else f"a {number % 7}"
        return {"image": torch.full((3, 4, 6 if number % 2 else 4), number / 64), "caption": caption}


SHARDS = {"4x4": range(0, 30, 2), "4x6": range(1, 30, 2)}


def encode(batch):
    return {"latents": batch["image"][:, :1] * 2, "moments": batch["image"].mean((1, 2, 3))}


def encode_text(captions):
    codes = torch.tensor([[float(len(caption)), sum(caption.encode())] for caption in captions])
    return {"hidden": codes[:, None] / 8, "mask": codes.long()}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)
    monkeypatch.setattr(module, "_BATCH", 3)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_everything_comes_back_with_its_sample(tmp_path):
    shards = plan(SHARDS)
    assert [shard.name for shard in shards[:4]] == [f"4x4-{n:05d}.safetensors" for n in range(4)]
    said = []
    fill(tmp_path, Samples(), shards, encode, encode_text, progress=lambda *both: said.append(both))
    assert said[-1] == (30, 30)
    assert said == sorted(said)
    stored = Latents(tmp_path, shards, seed=1)
    assert len(stored) == 30
    for number in range(30):
        sample = stored[Draw(100 + number, number, 4)]
        item = Samples()[number]
        assert sample["latents"].dtype == torch.float32
        assert torch.equal(sample["latents"], item["image"][:1] * 2)  # multiples of 1/32 are exact in float16
        assert sample["number"] == 100 + number
        options = item["caption"] if isinstance(item["caption"], list) else [item["caption"]]
        assert sample["caption"] in options
        text = encode_text([sample["caption"]])
        assert torch.equal(sample["context.hidden"], text["hidden"][0])
        assert torch.equal(sample["context.mask"], text["mask"][0])
        assert sample["context.mask"].dtype == torch.int64
    assert {stored[Draw(number, 3, 4)]["caption"] for number in range(20)} == {"a 3", "again"}
    assert [stored[Draw(n, 3, 4)]["caption"] for n in range(9)] == [stored[Draw(n, 3, 4)]["caption"] for n in range(9)]


def test_captions_alone_are_kept_without_a_text_encoder(tmp_path):
    fill(tmp_path, Samples(), plan({"x": range(0, 8, 2)}), encode)
    sample = Latents(tmp_path, plan({"x": range(4)}))[1]
    assert sorted(sample) == ["caption", "latents", "moments", "number"]


def test_few_large_images_are_encoded_at_once(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(module, "_PIXELS", 40)
    fill(tmp_path, Samples(), plan({"x": range(0, 8, 2)}), lambda b: sizes.append(len(b["image"])) or encode(b))
    assert sizes == [2, 1, 1]  # 16 pixels each


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("ended", ["error", "SIGKILL"])
def test_an_encoding_that_was_ended_goes_on_with_the_missing_shards(workers, ended, tmp_path):
    shards = plan({"x": range(0, 40, 2)})
    fill(tmp_path / "whole", Samples(), shards, encode, encode_text)

    def stop():
        if ended == "SIGKILL":
            signal.raise_signal(signal.SIGKILL)
        raise OSError("power")

    def work():
        fill(tmp_path / "part", Samples(22, stop), shards, encode, encode_text)

    assert in_child(work, tmp_path / "said") == (-9 if ended == "SIGKILL" else 1)
    part = contents(tmp_path / "part")
    assert sorted(part) == [f"x-{n:05d}.safetensors" for n in range(2)]  # 0-6 and 8-14; 22 lies in the third
    rest = Samples()
    fill(tmp_path / "part", rest, shards, encode, encode_text, workers=workers)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    if workers == 0:
        assert rest.read == list(range(16, 40, 2))
    fill(tmp_path / "part", Samples(0, stop), shards, encode, encode_text, workers=workers)  # reads nothing


def truncated(path):
    path.write_bytes(path.read_bytes()[:-9])


def fewer(path):
    save_file({"latents": torch.zeros(4, 1)}, path, {"captions": json.dumps([["a"]] * 3)})


def uneven(path):
    save_file({"latents": torch.zeros(3, 1)}, path, {"captions": json.dumps([["a"]] * 4)})


def no_captions(path):
    save_file({"latents": torch.zeros(4, 1)}, path)


@pytest.mark.parametrize(
    "damage", [truncated, fewer, uneven, no_captions, lambda path: path.write_bytes(b""), lambda path: path.unlink()]
)
def test_a_damaged_shard_is_named_with_its_remedy(damage, tmp_path):
    shards = plan({"x": range(0, 16, 2)})
    fill(tmp_path, Samples(), shards, encode)
    damage(tmp_path / "x-00001.safetensors")
    with pytest.raises(UserError, match=r"latents: .*x-00001.safetensors is missing or damaged \(.*delete it and run"):
        Latents(tmp_path, shards)
    (tmp_path / "x-00001.safetensors").unlink(missing_ok=True)
    fill(tmp_path, Samples(), shards, encode)
    assert len(Latents(tmp_path, shards)) == 8


def test_what_float16_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"float16 cannot hold latents of this encoder; remove data.init_args.cache"):
        fill(tmp_path, Samples(), plan({"x": range(2, 8, 2)}), lambda batch: {"latents": batch["image"] * 1e8})
    assert not list(tmp_path.iterdir())


def test_encoding_leaves_the_global_generators_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fill(tmp_path, Samples(), plan(SHARDS), encode)
    assert torch.equal(torch.rand(3), expected)


def make_task(**changes):
    torch.manual_seed(0)
    settings = {"pipeline": "StableDiffusionPipeline", "parts": PARTS, "train": ["unet"], "optimizer": ADAM}
    return DiffusionTask(**{**settings, "drop_caption": 0.5, **changes})


class Losses(Callback):
    """Of every step; and how often the text encoder ran meanwhile."""

    def __init__(self, task):
        self.values, self.encodings = [], 0
        self.task = task

    def on_train_start(self, trainer, pl_module):
        self.task.pipe.text_encoder.register_forward_hook(self.count)

    def count(self, *_):
        self.encodings += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def losses(source, task, **keywords):
    data = GenerationData(str(source), [Stage(None, 4, 16)], validation=0, epoch_steps=6, seed=2, **keywords)
    seen = Losses(task)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(max_steps=6, callbacks=[seen], enable_checkpointing=False, **options).fit(task, data)
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("captioned")
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (20, (20, 32)[number % 2], 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"a red circle\na blue star\na ring {number}")
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [["unet"], ["unet", "text_encoder"]], ids=len)
def test_training_on_cached_tensors_equals_training_on_images(train, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    plain = losses(folder, make_task(train=train))
    cached = losses(folder, make_task(train=train), cache=12)
    assert plain.encodings == 6
    assert cached.encodings == (0 if train == ["unet"] else 6)  # what is trained cannot be kept
    torch.testing.assert_close(torch.tensor(cached.values), torch.tensor(plain.values), rtol=HALF, atol=0)
    never = losses(folder, make_task(train=train, drop_caption=0.0), cache=12)
    assert np.abs(np.subtract(never.values, plain.values)).max() > 10 * HALF  # dropped captions matter here


def test_context_that_all_captions_share_is_not_kept(monkeypatch):
    """Such as Flux's places of text tokens, which have no row per caption."""
    task = make_task()
    places = torch.arange(6.0).view(2, 3)

    def encode_prompts(pipe, prompts):
        return {"hidden": torch.tensor([[len(text), 7.5] for text in prompts]), "places": places}

    task.family = replace(task.family, encode=encode_prompts)
    stored = task.encode_captions(["a", "abc"])
    assert list(stored) == ["hidden"]
    batch = {"caption": ["a", "abc"], **{f"context.{name}": tensor for name, tensor in stored.items()}}
    for kept in (batch, {"caption": batch["caption"]}):
        context = task._context(kept, [False, True])
        assert torch.equal(context["hidden"], torch.tensor([[1, 7.5], [0, 7.5]]))
        assert torch.equal(context["places"], places)


def test_caches_of_other_encoders_are_never_taken():
    parts = make_task().pipe.components
    names = ("vae", "text_encoder", "tokenizer")
    first = digest(*(parts[name] for name in names))
    assert first == digest(*(make_task().pipe.components[name] for name in names))
    seen = {first, digest(parts["vae"])}
    parts["vae"].register_to_config(scaling_factor=0.5)
    seen.add(digest(*(parts[name] for name in names)))
    parts["text_encoder"].final_layer_norm.bias.data[0] += 1
    seen.add(digest(*(parts[name] for name in names)))
    parts["tokenizer"].add_tokens(["zebra"])
    seen.add(digest(*(parts[name] for name in names)))
    parts["tokenizer"].model_max_length = 5
    seen.add(digest(*(parts[name] for name in names)))
    assert len(seen) == 6
