import logging
import sys

import pytest

from zoo.cli.options import FLAGS, Parser, add, open_working_folder, set_up_logs
from zoo.errors import UserError


@pytest.fixture
def parser():
    found = Parser("zoo fit", "trains")
    found.add_argument("recipe")
    found.add_argument("overrides", nargs="*")
    found.add_argument("--resume", nargs="?", const="newest")
    add(found, "device", "dtype", "padding", "seed", "out", "force", "json", "trust")
    return found


def test_every_shared_flag_is_there_once(parser):
    flags = [s for a in parser._actions for s in a.option_strings]
    for flag in FLAGS:
        assert flags.count(flag) == 1


def test_flags_and_overrides_come_in_any_order(parser):
    args = parser.parse(["r.yaml", "a=1", "--seed", "3", "b=2", "--out", "here", "c=-1"])
    assert (args.recipe, args.overrides, args.seed, args.out) == ("r.yaml", ["a=1", "b=2", "c=-1"], 3, "here")


def test_names_with_a_dash_come_behind_two(parser):
    args = parser.parse(["r.yaml", "--seed", "3", "--", "-a.png", "b=1"])
    assert (args.recipe, args.seed, args.overrides) == ("r.yaml", 3, ["./-a.png", "b=1"])


def test_an_optional_value_is_taken_behind_an_equal_sign_only(parser):
    args = parser.parse(["r.yaml", "--resume", "a=1"])
    assert (args.resume, args.overrides) == ("newest", ["a=1"])
    assert parser.parse(["--resume", "r.yaml"]).recipe == "r.yaml"
    assert parser.parse(["r.yaml", "--resume=runs/0003"]).resume == "runs/0003"
    assert parser.parse(["r.yaml"]).resume is None


@pytest.mark.parametrize(("text", "name"), [("bf16", "bfloat16"), ("half", "float16"), ("float32", "float32")])
def test_dtypes_have_short_names(parser, text, name):
    assert parser.parse(["r", "--dtype", text]).dtype == name


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_a_wrong_device_is_refused(parser, text):
    with pytest.raises(UserError, match="must be cpu, cuda, cuda:0 or auto"):
        parser.parse(["r", "--device", text])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["r", "--forse"], "zoo fit: unknown argument '--forse'. Did you mean '--force'"),
        (["r", "--forc"], "unknown argument '--forc'. Did you mean '--force'"),
        (["r", "--dtype", "int8"], "argument --dtype: must be float32, bfloat16, float16, got 'int8'"),
        (["r", "--seed"], "argument --seed: expected one argument"),
        ([], "the following arguments are required: recipe"),
    ],
)
def test_errors_are_one_sentence(parser, words, said, capsys):
    with pytest.raises(UserError) as caught:
        parser.parse(words)
    assert said in str(caught.value)
    assert capsys.readouterr() == ("", ""), "argparse itself prints nothing"


def test_remarks_go_to_stderr_and_quiet_keeps_warnings(capsys):
    zoo, root = logging.getLogger("zoo"), logging.getLogger()
    before = zoo.level, root.level, root.handlers[:]
    try:
        set_up_logs(quiet=False)
        zoo.info("a remark")
        assert capsys.readouterr() == ("", "a remark\n")
        set_up_logs(quiet=True)
        zoo.info("a remark")
        zoo.warning("a warning")
        assert capsys.readouterr() == ("", "a warning\n")
    finally:
        zoo.setLevel(before[0])
        root.setLevel(before[1])
        root.handlers[:] = before[2]


def test_trust_opens_the_working_folder(parser, monkeypatch):
    monkeypatch.setattr(sys, "path", ["/lib"])
    open_working_folder(parser.parse(["r"]))
    assert sys.path == ["/lib"]
    open_working_folder(parser.parse(["r", "--trust"]))
    open_working_folder(parser.parse(["r", "--trust"]))
    assert sys.path == ["/lib", ""]
