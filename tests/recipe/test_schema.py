import importlib
import inspect
import sys

import pytest
from lightning.pytorch import Trainer

from zoo.data import degradations, realworld, weather
from zoo.errors import UserError
from zoo.recipe.merge import dotted
from zoo.recipe.schema import FIELDS, Walk
from zoo.tasks import objectives, optimizers

GOOD = {
    "model": {
        "class_path": "RestorationTask",
        "init_args": {
            "network": {"family": "plain-conv"},
            "objectives": [{"class_path": "L1"}, "Charbonnier"],
            "optimizer": {"class_path": "Adam", "init_args": {"lr": 1e-3, "betas": [0.9, 0.99]}},
        },
    },
    "data": {
        "class_path": "RestorationData",
        "init_args": {
            "degradation": [{"class_path": "Jpeg", "init_args": {"quality": [60, 95]}}],
            "stages": [{"batch_size": 2, "patch_size": 8}],
            "validation": {"mine": {"source": "demo", "degradation": [{"class_path": "Jpeg"}]}},
        },
    },
    "trainer": {"max_steps": 3, "callbacks": [{"class_path": "EMA"}, {"class_path": "LearningRateMonitor"}]},
}


def walk(trust=False, **changes):
    """Walks GOOD with `a__b=value` set at a.b; numbers are list elements."""
    config = copied(GOOD)
    for key, value in changes.items():
        *parents, last = [int(part) if part.isdecimal() else part for part in key.split("__")]
        node = config
        for part in parents:
            node = node[part]
        node[last] = value
    found = Walk(lambda path: f"r.yaml({dotted(path)})", trust)
    return found, found.recipe(config, Trainer)


def copied(node):
    if isinstance(node, dict):
        return {key: copied(value) for key, value in node.items()}
    return [copied(item) for item in node] if isinstance(node, list) else node


def refusal(**changes):
    with pytest.raises(UserError) as caught:
        walk(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_short_names_become_the_path_where_the_class_is_defined():
    found, parts = walk()
    assert parts["model"]["class_path"] == "zoo.tasks.restoration.RestorationTask"
    arguments = parts["model"]["init_args"]
    assert [o["class_path"] for o in arguments["objectives"]] == [
        "zoo.tasks.objectives.L1",
        "zoo.tasks.objectives.Charbonnier",
    ]
    assert arguments["optimizer"]["class_path"] == "torch.optim.adam.Adam"
    callbacks = [c["class_path"] for c in parts["trainer"]["callbacks"]]
    assert callbacks == ["zoo.tasks.ema.EMA", "lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor"]
    inner = parts["data"]["init_args"]["validation"]["mine"]["degradation"][0]
    assert inner["class_path"] == "zoo.data.degradations.Jpeg"
    assert {"zoo.data.stages.Stage", "zoo.data.crops.ValidationSet"} <= found.classes


def test_values_are_collected_with_their_innermost_key():
    found, _ = walk()
    paths = {dotted(argument.path) for argument in found.arguments}
    assert {"trainer.max_steps", "data.init_args.stages.0.patch_size", "data.init_args.validation.mine.source"} <= paths


def test_the_table_names_every_objective_and_degradation_and_nothing_that_is_not_there():
    for place in FIELDS.values():
        for name, module in place.ours.items():
            assert inspect.isclass(getattr(importlib.import_module(module), name))
    for key, modules, base in (
        (("model", "init_args", "objectives"), [objectives], objectives.Objective),
        (("data", "init_args", "degradation"), [degradations, realworld, weather], degradations.Degradation),
    ):
        members = [item for module in modules for item in vars(module).items() if inspect.isclass(item[1])]
        classes = {name for name, known in members if issubclass(known, base) and known not in (base, weather.Painted)}
        assert set(FIELDS[key].ours) == classes


def test_a_recipe_may_name_the_optimisers_and_schedules_that_the_task_can_build():
    for key, table in (("optimizer", optimizers.OPTIMIZERS), ("schedule", optimizers.SCHEDULES)):
        place = FIELDS["model", "init_args", key]
        assert place.names() == list(table)
        for name, known in table.items():
            path = f"{known.__module__}.{known.__qualname__}"
            assert {place.target(name), place.target(path)} == {path}
            assert getattr(importlib.import_module(known.__module__), name) is known
    assert FIELDS["model", "init_args", "optimizer"].target("torch.optim.Adam") == "torch.optim.adam.Adam"
    assert FIELDS["model", "init_args", "optimizer"].target("evil.Adam") is None
    assert "optimizer knows no class 'LBFGS'" in refusal(model__init_args__optimizer__class_path="LBFGS")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainer__max_step": 3}, "r.yaml(trainer.max_step): Trainer takes no 'max_step'. Did you mean 'max_steps'"),
        ({"model__init_args__crop_boarder": 2}, "RestorationTask takes no 'crop_boarder'. Did you mean 'crop_border'?"),
        ({"model__init_args__optimizer__init_args__lrr": 1}, "Adam takes no 'lrr'. Did you mean 'lr'?"),
        ({"model__init_args__optimizer__init_args__params": 1}, "Adam takes no 'params'."),
        ({"data__init_args__stages__0__batchsize": 1}, "Stage takes no 'batchsize'. Did you mean 'batch_size'"),
        ({"data__init_args__validation__mine__sorce": 1}, "ValidationSet takes no 'sorce'. Did you mean 'source'?"),
        (
            {"model__class_path": "RestorationTsk"},
            "r.yaml(model.class_path): model knows no class 'RestorationTsk'. Did you",
        ),
        ({"model__init_args__optimizer__class_path": "Adan"}, "optimizer knows no class 'Adan'. Did you mean 'Adam'"),
        ({"trainer__strategy": "dpp"}, "trainer.strategy knows no class 'dpp'. Did you mean 'ddp'"),
        ({"trainer__profiler": "simpl"}, "trainer.profiler knows no class 'simpl'. Did you mean 'simple'"),
        ({"model": None}, "the recipe has no `model:`"),
        ({"model": []}, "model needs a class_path: RestorationTask"),
        ({"model__init_args": {"objectives": []}}, "r.yaml(model): RestorationTask needs 'network'"),
        ({"model__init_arg": {}}, "model takes class_path and init_args, not 'init_arg'"),
        ({"model__init_args__objectives__0": {"weight": 1}}, "objectives.0 needs a class_path: L1, MSE, Charbonnier"),
        ({"trainer__callbacks__0": None}, "callbacks.0 needs a class_path: EMA, Previews or a class of lightning"),
        (
            {"data__init_args__source": "???"},
            "data.init_args.source is not set; give it as data.init_args.source=VALUE",
        ),
        ({"trainer": 3}, "trainer must be a mapping"),
    ],
)
def test_mistakes_name_the_line_and_the_nearest(changes, said):
    assert said in refusal(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__class_path": "evil.Task"},
        {"model": "evil.Task"},
        {"data": {"class_path": "evil.Task", "init_args": {}}},
        {"model__init_args__network": {"class_path": "evil.Task"}},
        {"model__init_args__network": {"family": "hat", "deep": [{"er": {"class_path": "evil.Task"}}]}},
        {"model__init_args__objectives": ["evil.Task"]},
        {"model__init_args__objectives__0": {"class_path": "L1", "init_args": {"weight": {"class_path": "evil.Task"}}}},
        {"model__init_args__optimizer__class_path": "evil.Task"},
        {"data__init_args__validation__mine__degradation": [{"class_path": "evil.Task"}]},
        {"trainer__callbacks": "evil.Task"},
        {"trainer__callbacks__1": {"class_path": "LambdaCallback", "init_args": {"setup": "evil.Task"}}},
        {"trainer__strategy": "evil.Task"},
        {"trainer__logger": [{"class_path": "evil.Task"}]},
        {"trainer__profiler": "evil.Task"},
        {"trainer__plugins": "evil.Task"},
        {"trainer__plugins": [{"class_path": "evil.Task"}]},
        {"trainer__callbacks__0": {"class_path": "EMA", "dict_kwargs": {"class_path": "evil.Task"}}},
        {"trainer__callbacks__0": {"class_path": "WeightAveraging", "init_args": {"avg_fn": "evil.Task"}}},
        {"trainer__strategy": {"class_path": "FSDPStrategy", "init_args": {"auto_wrap_policy": "evil.Task"}}},
        {"trainer__plugins": ["evil.Task"]},
        {"trainer__plugins": "[evil.Task]"},
        {"model__init_args__network": {"family": "hat", "depths": "{class_path: evil.Task}"}},
        {"model__init_args__network": {"family": "hat", "depths": r'{"class\x5fpath": evil.Task}'}},
    ],
)
def test_a_foreign_class_is_refused_wherever_it_stands_and_never_imported(changes, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "--trust" in (said := refusal(**changes)) or "takes class_path and init_args" in said
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "torch.utils.cpp_extension.load_inline", "zoo.EMA"])
def test_well_known_ways_out_are_refused(name):
    assert f"may not name the class {name!r}; --trust lifts this" in refusal(trainer__callbacks__0=name)


def test_texts_that_only_look_like_imports_are_taken():
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "./a.b/c.d", "name": "my.run"}}
    averaging = {"class_path": "EMAWeightAveraging", "init_args": {"use_buffers": False}}
    network = {"family": "hat", "note": "1.0e-3", "from": "weights.pth", "more": ["a.b", "{x: a.b}", "[2000-13-13"]}
    found, parts = walk(
        model__init_args__network=network,
        trainer__logger=[logger],
        trainer__max_time="00:00:30.5",
        trainer__callbacks__0=averaging,
    )
    assert parts["model"]["init_args"]["network"] == network
    assert parts["trainer"]["logger"][0]["init_args"] == logger["init_args"]
    taken = {dotted(argument.path): argument.value for argument in found.arguments}
    assert taken["model.init_args.optimizer.init_args.betas"] == [0.9, 0.99], "a whole, not its elements"


def test_what_a_class_hands_on_is_known_by_name():
    wrong = {"class_path": "EMAWeightAveraging", "init_args": {"use_bufers": False}}
    assert "EMAWeightAveraging takes no 'use_bufers'. Did you mean 'use_buffers'?" in refusal(
        trainer__callbacks__0=wrong
    )


def test_trust_takes_a_class_from_elsewhere_but_checks_its_arguments(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("class Net:\n    def __init__(self, width: int = 3): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"class_path": "mine.Net", "init_args": {"width": 4}}
    found, parts = walk(trust=True, model__init_args__network=spec)
    assert parts["model"]["init_args"]["network"] == spec
    assert "mine.Net" in found.classes
    with pytest.raises(UserError, match=r"Net takes no 'widht'\. Did you mean 'width'"):
        walk(trust=True, model__init_args__network={"class_path": "mine.Net", "init_args": {"widht": 4}})
    with pytest.raises(UserError, match=r"class 'nowhere\.Net' cannot be imported"):
        walk(trust=True, model__init_args__network={"class_path": "nowhere.Net"})
