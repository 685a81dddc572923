"""`zoo COMMAND ...`: finds the command's module in a table and imports nothing else."""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

# Each module defines add_arguments(parser) and run(args) -> exit code; where it serves two commands it asks
# parser.get_default("command") and args.command.
COMMANDS = {
    "fit": ("zoo.cli.fit", "train what a recipe describes, or go on with it"),
    "sample": ("zoo.cli.sample", "make pictures from prompts"),
    "restore": ("zoo.cli.restore", "restore an image, a video or a folder of them"),
    "evaluate": ("zoo.cli.evaluate", "measure a model on images with ground truth"),
    "compare": ("zoo.cli.evaluate", "measure several models side by side"),
    "export": ("zoo.cli.export", "write a restorer as torch.export or ONNX, compared with the network"),
    "list": ("zoo.cli.models", "list the models"),
    "info": ("zoo.cli.models", "tell what is known about a model or a weight file"),
    "convert": ("zoo.cli.convert", "write weights of any kind as safetensors that describe themselves"),
    "recipes": ("zoo.cli.recipes", "list the shipped recipes"),
    "show": ("zoo.cli.recipes", "print a recipe with its base, overrides and interpolations resolved"),
    "check": ("zoo.cli.recipes", "build a recipe without memory and train two tiny steps of it"),
    "doctor": ("zoo.cli.doctor", "report versions, devices and whatever is wrong with the installation"),
}
_BAD_USE = 2
_BUG = 1
_INTERRUPTED = 130
_PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: words after `zoo`; None = those of this process.

    Returns:
        The exit code: 0, or 2 for what the user can put right, 1 for a defect of ours, 130 for Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except SystemExit as leave:  # --help, or a run that was asked to stop
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        return _say("interrupted; what is finished stays", _INTERRUPTED)
    except BrokenPipeError:  # `zoo list | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered may go nowhere
        return _PIPE_CLOSED
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        return _say(*_sentence(error))


def _run(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name in ("-V", "--version"):
        from zoo import __version__

        print(f"zoo {__version__}")
        return 0
    if name not in COMMANDS:
        from zoo.errors import UserError, nearest

        what = "flag" if name.startswith("-") else "command"
        raise UserError(f"zoo has no {what} {name!r}.{nearest(name, COMMANDS)} `zoo --help` lists the commands.")
    module, text = COMMANDS[name]
    from zoo.cli import options

    command = importlib.import_module(module)
    parser = options.Parser(f"zoo {name}", text)
    parser.set_defaults(command=name)
    command.add_arguments(parser)
    options.add(parser)
    args = parser.parse(words[1:])
    options.set_up_logs(args.quiet)
    return command.run(args)


def _overview() -> str:
    """What `zoo --help` prints."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: zoo COMMAND ...",
            "",
            "A model zoo for generating and restoring images on PyTorch + Lightning.",
            "",
            *rows,
            "",
            "`zoo COMMAND --help` shows the arguments of one command; `zoo --version` the version.",
        ]
    )


def _sentence(error: Exception) -> tuple[str, int]:
    """One line for an error, and the exit code that goes with it."""
    from zoo.errors import UserError

    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text, _BAD_USE
    if type(error).__name__ == "MisconfigurationException":  # Lightning's word for settings that contradict each other
        return f"{text.rstrip('.')}; correct the recipe", _BAD_USE
    if "No space left on device" in text:
        file = getattr(error, "filename", None)
        return f"no space left on the disk{f' for {file}' if file else ''}; free some and run the command again", 2
    if isinstance(error, OSError):
        if error.errno is None or error.filename is None:
            return text, _BAD_USE
        return f"{error.filename}: {error.strerror}; check the path and your rights to it", _BAD_USE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; use smaller batches, patches or tiles, or another --device", _BAD_USE
    return f"{type(error).__name__}: {text}; this is a bug in zoo: run again with --debug and report it", _BUG


def _say(text: str, code: int) -> int:
    sys.stderr.write(f"zoo: {text}\n")
    return code
