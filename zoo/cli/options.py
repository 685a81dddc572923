"""Flags that mean the same in every command, and a parser whose errors are one sentence."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from zoo.errors import UserError, nearest
from zoo.pipelines.devices import device_word

DTYPES = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}  # ours -> Lightning's precision
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def _dtype(text: str) -> str:
    name = _SHORT.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"must be {', '.join(DTYPES)}, got {text!r}")
    return name


def _device(text: str) -> str:
    try:
        return device_word(text)
    except UserError as error:  # which argparse would take for any ValueError
        raise argparse.ArgumentTypeError(str(error)) from error


FLAGS = {
    "--device": {"type": _device, "default": "auto", "metavar": "D", "help": "cpu, cuda, cuda:0 or auto"},
    "--dtype": {"type": _dtype, "metavar": "T", "help": "float32, bfloat16 or float16"},
    "--seed": {"type": int, "metavar": "N", "help": "seed of everything random"},
    "--padding": {
        "choices": ("reflect", "mirror_always"),
        "default": "reflect",
        "help": "how sides are brought to multiples; mirror_always for the figures of CRAFT's authors",
    },
    "--out": {"metavar": "PATH", "help": "where results go"},
    "--force": {"action": "store_true", "help": "overwrite what exists"},
    "--json": {"action": "store_true", "help": "machine-readable result on stdout"},
    "--quiet": {"action": "store_true", "help": "no progress and no remarks"},
    "--debug": {"action": "store_true", "help": "show the traceback of an error"},
    "--trust": {"action": "store_true", "help": "let the recipe name any class, also of the working folder"},
}


class Parser(argparse.ArgumentParser):
    """Raises instead of printing usage and exiting; never takes an abbreviation.

    A flag with an optional value takes it only behind "=": in `--resume a=1` the second word is no value of the first.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments in any order, flags between positionals too.

        Raises:
            UserError: they do not fit.
        """
        optional = {s: a.const for a in self._actions if a.nargs == "?" for s in a.option_strings}
        words = list(argv)
        if "--" in words:  # argparse loses what follows when flags are intermixed; such words are paths here
            end = words.index("--")
            words[end:] = [f"./{word}" if word.startswith("-") else word for word in words[end + 1 :]]
        return self.parse_intermixed_args([f"{word}={optional[word]}" if word in optional else word for word in words])

    def error(self, message: str) -> NoReturn:
        """One sentence, with the nearest flag for an unknown one."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            word = unknown.split()[0]
            flags = [s for a in self._actions for s in a.option_strings]
            hint = nearest(word.split("=")[0], flags) if word.startswith("-") else ""
            raise UserError(f"{self.prog}: unknown argument {word!r}.{hint} `{self.prog} --help` shows all.")
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`")


def add(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds shared flags by name ("device", "out", ...); every command gets --quiet and --debug unasked."""
    for name in (*names, "quiet", "debug"):
        flag = f"--{name}"
        if flag not in parser._option_string_actions:
            parser.add_argument(flag, **FLAGS[flag])


def open_working_folder(args: argparse.Namespace) -> None:
    """With --trust, modules of the working folder can be imported, as `python -m zoo` can anyway."""
    if args.trust and "" not in sys.path:
        sys.path.append("")


def set_up_logs(quiet: bool) -> None:
    """Sends remarks to stderr as bare lines; `quiet` keeps warnings and errors only.

    Of the processes of a distributed training the first one speaks for all.
    """
    quiet = quiet or os.environ.get("LOCAL_RANK", "0") != "0"
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s", force=True)
    logging.getLogger("zoo").setLevel(logging.WARNING if quiet else logging.INFO)
    if quiet:
        warnings.simplefilter("ignore")
