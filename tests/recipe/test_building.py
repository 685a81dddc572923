import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import shipped
from zoo.errors import UserError
from zoo.recipe.building import _fence, _fits, _type_name, build, check, quieten, validate
from zoo.recipe.reading import resolve
from zoo.tasks.ema import EMA
from zoo.tasks.objectives import L1

SMALL = Path(__file__).with_name("small.yaml")


@pytest.fixture
def small(tmp_path):
    """A copy of small.yaml that trains on one tiny picture."""
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / "a.png")
    text = SMALL.read_text().replace("???", str(photos)).replace("../../recipes", str(shipped.folder("recipes")))
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return path


def test_a_recipe_becomes_trainer_task_and_data(small):
    built = build(resolve(small, ["seed_everything=5"]))
    assert isinstance(built.task.objectives[0], L1)
    assert built.trainer.max_steps == 2
    assert built.data.stages[0].batch_size == 1
    assert built.data.seed == 5
    assert next(c for c in built.trainer.callbacks if isinstance(c, EMA)).decays == [0.9]
    assert not built.trainer.loggers


def test_the_seed_decides_the_first_weights(small):
    first, second, other = (
        torch.cat([p.flatten() for p in build(resolve(small, [f"seed_everything={seed}"])).task.network.parameters()])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_run_folder_gets_checkpoint_metrics_and_weights(small, tmp_path):
    from zoo.tasks.run import Run

    recipe = resolve(small, ["checkpoint_every=1"])
    run = Run.create(tmp_path / "runs", text=recipe.text, config=recipe.config, hash=recipe.hash)
    built = build(recipe, run=run.folder, quiet=True)
    built.trainer.fit(built.task, datamodule=built.data)
    assert (run.folder / "checkpoints" / "last.ckpt").is_file()
    assert (run.folder / "weights.safetensors").is_file()
    again = resolve(run.folder / "checkpoints" / "config.yaml")
    assert again.hash == recipe.hash, "the resolved config beside the checkpoint is the same recipe"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.max_steps=abc", "trainer.max_steps must be int, got 'abc'"),
        ("model.init_args.crop_border=2.5", "model.init_args.crop_border must be int, got 2.5"),
        ("data.init_args.stages.0.batch_size=x", "data.init_args.stages.0.batch_size must be int, got 'x'"),
        ("data.init_args.stages=3", "data.init_args.stages must be [Stage, ...] or null, got 3"),
        ("model.init_args.optimizer.init_args.lr=fast", "optimizer.init_args.lr must be float or Tensor, got 'fast'"),
        ("trainer.callbacks.0.init_args.decays=0.9", "decays must be [float, ...] or null, got 0.9"),
        ("trainer.gradient_clip_val=a", "trainer.gradient_clip_val must be int or float or null, got 'a'"),
        ("tracking=mlflow", "tracking must be auto, csv or wandb, got 'mlflow'"),
        ("checkpoint_every=0", "checkpoint_every must be a step count, got 0"),
        ("seed_everything=x", "seed_everything must be a number, got 'x'"),
    ],
)
def test_a_wrong_type_names_the_override_the_key_and_the_type(small, override, said):
    with pytest.raises(UserError) as caught:
        validate(resolve(small, [override]))
    assert str(caught.value).startswith(f"override {override!r}: ")
    assert said in str(caught.value)


def test_a_wrong_type_in_a_file_names_its_line(small):
    small.write_text(small.read_text().replace("max_steps: 2", "max_steps: two"))
    with pytest.raises(UserError, match=r"small.yaml:14: trainer.max_steps must be int, got 'two'"):
        validate(resolve(small))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.init_args.network=hat-tinny-x2", "model 'hat-tinny-x2' is unknown. Did you mean 'hat-tiny-x2'"),
        ("model.init_args.network={family: hat, embed_dm: 8}", "has no keyword 'embed_dm'. Did you mean 'embed_dim'"),
        (
            "trainer.callbacks=[{class_path: EMA, init_args: {decays: [2]}}]",
            "decays must be a list of numbers in [0, 1)",
        ),
        ("data.init_args.upscale=0", "upscale must be >= 1"),
        ("data.init_args.channels=1", "data have channels 1, but the network has in_chans 3; set data.init_args.ch"),
        ("trainer.val_check_interval=0.5", "trainer: Lightning refuses its settings"),
    ],
)
def test_what_a_constructor_refuses_is_one_sentence(small, override, said):
    with pytest.raises(UserError) as caught:
        build(resolve(small, [override, "trainer.fast_dev_run=false"]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_stays_a_missing_file(small):
    with pytest.raises((FileNotFoundError, UserError), match="nowhere"):
        build(resolve(small, ["model.init_args.weights=nowhere.pth"]))


def test_a_hostile_base_is_never_imported(small, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile.yaml").write_text("_base: small.yaml\ntrainer: {callbacks+: [{class_path: evil.Task}]}\n")
    (tmp_path / "innocent.yaml").write_text("_base: hostile.yaml\n")
    with pytest.raises(UserError, match=r"hostile.yaml:2: trainer.callbacks.1 may not name the class 'evil.Task'"):
        build(resolve(tmp_path / "innocent.yaml"))
    assert "evil" not in sys.modules


def test_behind_the_fence_jsonargparse_imports_nothing_else_and_afterwards_it_does_again():
    from collections.abc import Callable

    with _fence({"zoo.tasks.ema.EMA"}):
        assert not _fits(Callable, "shutil.rmtree")
        assert not _fits(Callable, "zoo.recipe.resolve")
    assert _fits(Callable, "zoo.recipe.resolve")


def test_a_word_is_no_file(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cpu").write_text("tpu")
    assert build(resolve(small)).trainer.strategy.root_device.type == "cpu"


def test_trust_lifts_both_fences(small, tmp_path, monkeypatch):
    (tmp_path / "trusted.py").write_text("def hello(trainer, pl_module, stage): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    override = "trainer.callbacks+=[{class_path: LambdaCallback, init_args: {setup: trusted.hello}}]"
    with pytest.raises(UserError, match=r"callbacks.1.init_args.setup takes code.*--trust lifts this"):
        build(resolve(small, [override]))
    assert build(resolve(small, [override]), trust=True).trainer.callbacks[1].setup.__name__ == "hello"


def test_check_builds_at_full_size_and_trains_two_small_steps(small):
    small.write_text(small.read_text().replace("embed_dim: 8", "embed_dim: 64"))
    report = check(resolve(small))
    assert report.steps == 2
    full = build(resolve(small)).task.network
    assert report.parameters == sum(p.numel() for p in full.parameters())


def test_check_compares_network_and_data_at_full_size_too(small):
    small.write_text(small.read_text().replace("smoke: {", "smoke: {data: {init_args: {upscale: 2}}, "))
    assert check(resolve(small)).steps == 2
    with pytest.raises(UserError, match="data have upscale 4, but the network has upscale 2"):
        check(resolve(small, ["data.init_args.upscale=4"]))


def test_types_are_named_as_a_reader_would():
    @dataclass
    class Stage:
        size: int

    assert _type_name(int | None) == "int or null"
    assert _type_name(list[Stage] | None) == "[Stage, ...] or null"
    assert _type_name(int | tuple[int, int]) == "int or [int, int]"
    assert _type_name(Literal["a", "b"] | None) == "'a' or 'b' or null"
    assert _type_name(dict[str, Path]) == "a mapping of Path"


def test_adverts_are_kept_out_of_the_log(caplog):
    quieten()
    with caplog.at_level(logging.INFO):
        log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        log.setLevel(logging.INFO)
        log.info("💡 Tip: try installing [litmodels]")
        log.info("TPU available: False, using: 0 TPU cores")
        log.info("something that matters")
    assert [record.getMessage() for record in caplog.records] == ["something that matters"]
