import importlib
import os
import subprocess
import sys

import pytest

from zoo import cli
from zoo.cli import COMMANDS, main
from zoo.errors import UserError


def test_every_command_of_the_table_exists_and_takes_its_arguments():
    from zoo.cli.options import Parser, add

    for name, (module, text) in COMMANDS.items():
        command = importlib.import_module(module)
        parser = Parser(f"zoo {name}", text)
        parser.set_defaults(command=name)
        command.add_arguments(parser)
        add(parser)
        assert {"--quiet", "--debug"} <= {s for a in parser._actions for s in a.option_strings}
        assert callable(command.run)


@pytest.mark.parametrize("words", [["--help"], ["list"], ["recipes"], ["show", "train/hat-tiny-x2"]])
def test_help_and_listings_start_fast_and_without_torch(words):
    code = (
        "import sys, time; from zoo.cli import main; code = main(sys.argv[1:]);"
        "names = ('torch', 'lightning', 'diffusers', 'transformers', 'wandb');"
        "print([n for n in names if n in sys.modules], time.process_time(), file=sys.stderr); sys.exit(code)"
    )
    spent = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        imported, seconds = done.stderr.rsplit(" ", 1)
        assert imported == "[]"
        spent.append(float(seconds))
    # Time of the processor, interpreter included: wall time is the same on a quiet machine and anything on a busy one.
    # Reading a recipe costs an import of OmegaConf.
    assert min(spent) < (0.6 if words[0] == "show" else 0.3)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert f"  {name} " in out
        assert text in out


def test_version(capsys):
    import zoo

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"zoo {zoo.__version__}\n"


def test_help_of_a_command_exits_with_0(capsys):
    assert main(["fit", "--help"]) == 0
    assert "--resume" in capsys.readouterr().out


def failing(monkeypatch, error):
    """Makes `zoo list` raise `error`."""
    from zoo.cli import models

    def run(args):
        raise error

    monkeypatch.setattr(models, "run", run)


def said(capsys):
    """The one line on stderr; stdout must be empty."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("zoo: ")
    return err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["ft"], "zoo has no command 'ft'. Did you mean 'fit'?"),
        (["--versoin"], "zoo has no flag '--versoin'"),
        (["list", "--jsn"], "zoo list: unknown argument '--jsn'. Did you mean '--json'"),
        (["list", "--js"], "zoo list: unknown argument '--js'. Did you mean '--json'"),
        (["fit"], "zoo fit: the following arguments are required: recipe"),
        (["fit", "x", "--device", "gpu"], "argument --device: device must be cpu, cuda, cuda:0 or auto, got 'gpu'"),
        (["fit", "x", "--seed", "a"], "zoo fit: argument --seed: invalid int value: 'a'"),
        (["list", "--out", "x"], "zoo list: unknown argument '--out'"),
        (["info", "a", "b"], "zoo info: unknown argument 'b'"),
    ],
)
def test_bad_use_is_one_line_and_exit_2(words, text, capsys):
    assert main(words) == 2
    assert text in said(capsys)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("photo: too small;\n enlarge it"), 2, "zoo: photo: too small; enlarge it\n"),
        (FileNotFoundError("load: x.pth does not exist"), 2, "zoo: load: x.pth does not exist\n"),
        (PermissionError(13, "Permission denied", "/out"), 2, "zoo: /out: Permission denied; check the path"),
        (
            OSError(28, "No space left on device", "/out/a.png"),
            2,
            "no space left on the disk for /out/a.png; free some",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "no space left on the disk; free some"),
        (MemoryError(), 2, "out of memory; use smaller batches"),
        (KeyboardInterrupt(), 130, "zoo: interrupted; what is finished stays\n"),
        (KeyError("lost"), 1, "KeyError: 'lost'; this is a bug in zoo: run again with --debug"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(error, code, text, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert main(["list"]) == code
    assert text in said(capsys)


def test_debug_shows_the_traceback_and_keeps_the_exit_code(monkeypatch, capsys):
    failing(monkeypatch, UserError("wrong"))
    assert main(["list", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("zoo: wrong\n")


@pytest.mark.parametrize(("code", "expected"), [(143, 143), (None, 0), (0, 0), ("text", 1)])
def test_a_command_that_leaves_keeps_its_exit_code(code, expected, monkeypatch):
    failing(monkeypatch, SystemExit(code))
    assert main(["list"]) == expected


def test_a_closed_pipe_is_quiet():
    code = f"import sys; sys.path.insert(0, {os.path.dirname(os.path.dirname(cli.__path__[0]))!r}); "
    code += "from zoo.cli import main; sys.stdin.read(); sys.exit(main(['list']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1)
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
