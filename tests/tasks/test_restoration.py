import json

import pytest
import torch
from lightning.pytorch import Trainer

from tests.tasks.tiny import ADAM, HAT, PLAIN, make_data, make_run, make_task, make_trainer, pictures, quiet
from zoo import models, tracking
from zoo.data.imresize import imresize
from zoo.errors import UserError
from zoo.metrics.psnr_ssim import psnr
from zoo.models.weights import write_weights
from zoo.tasks.ema import EMA
from zoo.tasks.objectives import L1
from zoo.tasks.restoration import RestorationTask, start_from


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    quiet()
    return tmp_path_factory.mktemp("restoration")


@pytest.fixture(scope="module")
def trained(place):
    run = make_run(place / "runs")
    task = make_task(schedule={"class_path": "StepLR", "init_args": {"step_size": 1, "gamma": 0.5}})
    data = make_data(place / "pictures")
    trainer = make_trainer(run, [EMA([0.5])], max_steps=8)
    trainer.fit(task, datamodule=data)
    rows, _ = tracking.read_table(run.folder / "metrics.csv")
    return run, task, data, {int(row["step"]): {k: float(v) for k, v in row.items()} for row in rows}


def test_the_loss_its_parts_and_the_learning_rate_are_logged(trained):
    *_, rows = trained
    assert sorted(rows) == list(range(1, 9))
    for step, row in rows.items():
        assert row["train/loss"] == pytest.approx(row["train/l1"] + 0.1 * row["train/fft"], rel=1e-6)
        assert row["train/lr"] == pytest.approx(1e-3 * 0.5 ** (step - 1)), "the schedule steps once per step"


def test_validation_scores_whole_images_with_averaged_weights_beside_bicubic(trained):
    run, task, data, rows = trained
    assert [step for step, row in rows.items() if "val/psnr_y" in row] == [4, 8]
    network = models.load(str(run.folder))  # the average, as step 8 was the last
    protocol = {"crop_border": 2, "y_channel": True}
    reached, before = [], []
    for image in data.val_dataloader()[0]:
        with torch.no_grad():
            reached.append(psnr(network(image["lq"]), image["gt"], **protocol))
        before.append(psnr(imresize(image["lq"], 2), image["gt"], **protocol))
    assert rows[8]["val/a/psnr_y"] == pytest.approx(sum(reached) / 3, abs=1e-4)
    assert rows[8]["val/psnr_y"] == rows[8]["val/a/psnr_y"], "one set is its own mean"
    for step in (4, 8):
        assert rows[step]["val/a/psnr_y_bicubic"] == pytest.approx(sum(before) / 3, abs=1e-4)
    with torch.no_grad():
        live = psnr(task.network.eval()(image["lq"]), image["gt"], **protocol)
    assert live != pytest.approx(reached[-1], abs=1e-6), "the weights themselves score differently"


def test_sizes_that_do_not_suit_the_network_are_validated(place):
    images = str(pictures(place / "odd", size=38))  # lq 19 x 19, windows of 4
    data = make_data(place / "odd", stages=None)
    data.setup("validate")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (scores,) = trainer.validate(make_task(network=HAT), datamodule=data, verbose=False)
    assert images
    assert 5 < scores["val/a/psnr_y"] < 60


def test_checkpoints_hold_plain_data_and_say_which_network(trained):
    run, task, *_ = trained
    stored = torch.load(run.checkpoint, weights_only=True)
    assert stored["zoo"] == {"arch": "plain-conv", "config": task.network.config, "variant": None, "version": 1}
    assert json.loads(json.dumps(stored["hyper_parameters"])) == stored["hyper_parameters"]
    assert stored["hyper_parameters"]["objectives"][1]["class_path"] == "FFT"
    assert all(name.startswith("network.") for name in stored["state_dict"])
    assert type(models.load(str(run.checkpoint))) is type(task.network)


@pytest.mark.filterwarnings("error")
def test_building_on_the_meta_device_with_weights_says_nothing(tmp_path):
    file = str(write_weights(tmp_path / "start.safetensors", models.create(PLAIN)))
    with torch.device("meta"):
        assert all(p.is_meta for p in make_task(weights=file).network.parameters())


def test_the_same_step_draws_the_same_whatever_was_drawn_before(place):
    task = make_task(network=HAT)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    task._trainer = trainer
    task.log = lambda *_: None
    trainer.strategy._optimizers = [task.configure_optimizers()["optimizer"]]
    batch = {"lq": torch.rand(2, 3, 8, 8), "gt": torch.rand(2, 3, 16, 16)}
    first = task.training_step(batch, 0)
    torch.rand(7)
    assert torch.equal(first, task.training_step(batch, 0)), "stochastic depth depends on the step alone"
    assert not torch.equal(first, task.training_step(batch, 1))


def test_data_that_do_not_fit_the_network_are_refused_before_training(tmp_path):
    said = {
        "upscale": r"upscale 3, but the network has upscale 2; set data.init_args.upscale=2, or upscale: 3 in model",
        "channels": r"channels 1, but the network has in_chans 3; set data.init_args.channels=3, or in_chans: 1 in",
    }
    for key, value in (("upscale", 3), ("channels", 1)):
        trainer = make_trainer(make_run(tmp_path / "runs"))
        with pytest.raises(UserError, match=said[key]):
            trainer.fit(make_task(), datamodule=make_data(tmp_path / "pictures", **{key: value}))
        assert trainer.global_step == 0


def test_every_variant_builds_on_the_meta_device():
    with torch.device("meta"):
        task = make_task(network="hat-x4", objectives=[L1()])
    assert all(p.is_meta for p in task.network.parameters())
    assert sum(p.numel() for p in task.network.parameters()) > 2e7


def test_weights_to_start_from_are_taken_where_they_fit_and_the_rest_is_listed(tmp_path, caplog):
    torch.manual_seed(1)
    source = models.create(PLAIN)
    file = str(write_weights(tmp_path / "start.safetensors", source))
    same = make_task(weights=file).network.state_dict()
    assert all(torch.equal(same[name], value) for name, value in source.state_dict().items())
    deeper = models.create({**PLAIN, "depth": 2, "num_feat": 6})
    before = {name: value.clone() for name, value in deeper.state_dict().items()}
    with caplog.at_level("WARNING", "zoo.tasks.restoration"):
        start_from(deeper, file)
    after = deeper.state_dict()
    assert torch.equal(after["body.0.weight"], source.state_dict()["body.0.weight"])
    assert torch.equal(after["body.1.weight"], before["body.1.weight"])
    assert "stay random: body.1.weight" in caplog.text
    with pytest.raises(UserError, match="are of 'plain-conv', the network is 'hat'"):
        start_from(models.create(HAT), file)
    with pytest.raises(UserError, match="no tensor fits, every size differs"):
        start_from(models.create({**PLAIN, "in_chans": 1, "embed_dim": 5, "num_feat": 5}), file)
    with pytest.raises(UserError, match="neither a file nor a known model"):
        make_task(weights="no-such-model")


def test_index_tables_are_not_taken_from_other_weights(monkeypatch):
    torch.manual_seed(1)
    source, target = models.create(HAT), models.create({**HAT, "embed_dim": 12})
    table = "relative_position_index_SA"
    for name, buffer in source.named_buffers():
        if name == table:
            buffer.zero_()  # as a file of another layout would have it
    kept = dict(target.named_buffers())[table].clone()
    monkeypatch.setattr(models, "load", lambda _: source)
    start_from(target, "other")
    assert torch.equal(dict(target.named_buffers())[table], kept)


WRONG = {
    "objectives is empty": {"objectives": []},
    "crop_border must be at least 0": {"crop_border": -1},
    "'hatt' is unknown": {"network": {"family": "hatt"}},
    "optimizer Adam has no argument 'l'": {"optimizer": {"class_path": "Adam", "init_args": {"l": 1}}},
    "schedule 'Multi' is unknown": {"schedule": {"class_path": "Multi"}},
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_show_when_the_task_is_built(message):
    settings = {"network": PLAIN, "objectives": [L1()], "optimizer": ADAM} | WRONG[message]
    with pytest.raises(UserError, match=message):
        RestorationTask(**settings)
