import pytest
import torch

from tests.tasks.tiny import ADAM, make_run, make_trainer, quiet
from zoo import models, tracking
from zoo.data.generation import GenerationData
from zoo.data.shapes import Shapes, draw
from zoo.data.stages import Stage
from zoo.errors import UserError
from zoo.scene import parse
from zoo.tasks.ema import EMA
from zoo.tasks.features import FACTS, GROUPS, FeatureTask, facts_of

SMALL = {"family": "plain-features", "widths": [8, 8], "depths": [1, 1], "num_features": 8}
STORY = "a small striped red star left of a large solid blue ring on a black background"


def make_task(**changes):
    torch.manual_seed(0)
    return FeatureTask(**({"network": SMALL, "optimizer": ADAM, "seed": 3} | changes))


def batch_of(count, first=0):
    world = Shapes(0)
    return torch.utils.data.default_collate([world[n] for n in range(first, first + count)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    quiet()
    run = make_run(tmp_path_factory.mktemp("features"))
    task = make_task(optimizer=ADAM | {"init_args": {"lr": 1e-2}})
    data = GenerationData(stages=[Stage(None, 4, 64)], validation=6, epoch_steps=20)
    make_trainer(run, [EMA([0.5])], max_steps=12, val_check_interval=12).fit(task, datamodule=data)
    rows, _ = tracking.read_table(run.folder / "metrics.csv")
    return run, task, {int(row["step"]): {k: float(v) for k, v in row.items()} for row in rows}


def test_facts_are_what_the_scene_says():
    assert facts_of(parse(STORY)) == {
        ("shape", "red", "star"),
        ("size", "red", "small"),
        ("texture", "red", "striped"),
        ("relation", "red", "left of"),
        ("shape", "blue", "ring"),
        ("size", "blue", "large"),
        ("texture", "blue", "solid"),
        ("relation", "blue", "right of"),
        ("count", "2"),
        ("background", "black"),
    }


def test_both_ways_to_tell_a_scene_have_the_same_facts_and_all_facts_are_known():
    for number in range(50):
        scene = draw(0, number).scene
        assert facts_of(scene) == facts_of(scene.mirrored()) <= set(FACTS)
    assert len(FACTS) == len(set(FACTS))


def test_training_learns_logs_and_validates_the_average(trained):
    _, _, rows = trained
    assert rows[12]["train/loss"] < 0.7 * rows[1]["train/loss"]
    assert all(0 <= row["train/damage"] <= row["train/loss"] for row in rows.values())
    shares = [rows[12][f"val/{group}"] for group in GROUPS]
    assert all(share * 6 == pytest.approx(round(share * 6), abs=1e-5) for share in shares), "six pictures"
    assert rows[12]["val/accuracy"] == pytest.approx(sum(shares) / len(shares), abs=1e-6)


def test_what_it_writes_is_the_network_alone(trained):
    run, task, _ = trained
    network = models.load(run.folder)
    assert network.config == task.network.config
    image = torch.rand(2, 3, 64, 64)
    task.network.eval()
    with torch.no_grad():
        assert not torch.equal(network(image), task.network(image)), "it is the average"
    assert torch.load(run.checkpoint, weights_only=True)["hyper_parameters"]["network"] == SMALL


def test_accuracy_counts_pictures_of_which_a_whole_group_is_right():
    task, logged = make_task(), {}
    task.log = logged.__setitem__
    task.log_dict = logged.update
    batch = batch_of(4)
    truth = torch.tensor([[fact in facts_of(parse(text)) for fact in FACTS] for text in batch["scene"]])
    told = truth.clone()
    told[0, FACTS.index(("count", "1"))] ^= True
    told[0, FACTS.index(("count", "2"))] ^= True
    told[1, FACTS.index(("size", "pink", "large"))] ^= True
    task.forward = lambda image: (told[: len(image)] * 2.0 - 1, torch.zeros(len(image), 2))
    task.on_validation_epoch_start()
    task.validation_step(batch, 0)
    task.on_validation_epoch_end()
    expected = dict.fromkeys(GROUPS, 1.0) | {"count": 0.75, "size": 0.75}
    assert {name: float(value) for name, value in logged.items()} == pytest.approx(
        {f"val/{group}": share for group, share in expected.items()} | {"val/accuracy": (4 + 2 * 0.75) / 6}
    )
    ((name, picture),) = task.pictures([batch], 3)
    assert name == "facts"
    assert picture.dtype.name == "uint8"


def test_damage_follows_from_the_number_of_the_sample():
    task, batch = make_task(spoilt=0.5), batch_of(24)
    image, strength = task.spoil(batch["image"], batch["number"])
    again, same = task.spoil(batch["image"][5:9], batch["number"][5:9])
    torch.testing.assert_close(again, image[5:9])
    assert torch.equal(same, strength[5:9])
    alone = (strength == 0).all(1)
    assert 0 < alone.sum() < 24
    assert torch.equal(image[alone], batch["image"][alone])
    assert (image[~alone] != batch["image"][~alone]).flatten(1).any(1).all()
    assert 0 <= image.min() <= image.max() <= 1
    noisy = strength[:, 1] > 0.2
    assert (image[noisy] - batch["image"][noisy]).flatten(1).std(1).min() > 0.02
    untouched, nothing = make_task(spoilt=0.0).spoil(batch["image"], batch["number"])
    assert torch.equal(untouched, batch["image"])
    assert not nothing.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"family": "plain-conv"}}, "'plain-conv' is no feature network; give network: shapes-features"),
        ({"network": "shapes-feature"}, "Did you mean 'shapes-features'"),
        ({"spoilt": 1.5}, "spoilt must be a share in 0 to 1, got 1.5"),
        ({"optimizer": {"class_path": "Adamm"}}, "Did you mean 'Adam"),
    ],
)
def test_mistakes_are_named_before_data_are_read(changes, message):
    with pytest.raises(UserError, match=message):
        make_task(**changes)


def test_data_without_whole_scenes_are_refused(tmp_path):
    data = GenerationData(stages=[Stage(None, 2, 32)], render_sizes=[64], validation=0)
    with pytest.raises(UserError, match="larger render_sizes cut off what captions tell of"):
        make_trainer(make_run(tmp_path)).fit(make_task(), datamodule=data)
    batch = batch_of(2)
    del batch["scene"]
    with pytest.raises(UserError, match=r"do not tell what is in a picture; set data\.init_args\.source=shapes"):
        make_task().validation_step(batch, 0)
