"""Files that appear whole or not at all: a kill, a full disk or another process leaves the old one or the new one."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.errors import UserError


def write_file(path: str | Path, content: bytes | str, *, force: bool = False) -> Path:
    """Put `content` at `path` whole or not at all, never replacing a file unless `force`; folders are made.

    Args:
        path: it is written beside under a name of its own first, then renamed.
        content: text is stored as UTF-8.
        force: replace a file that exists.

    Raises:
        FileExistsError: `path` exists and `force` is False, also when it appeared meanwhile.
        UserError: no space is left, or the place is not writable.
    """
    data = content.encode() if isinstance(content, str) else content
    with new_file(path, force=force) as part:
        part.write_bytes(data)
    return Path(path)


@contextmanager
def new_file(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A file beside `path`, under a name of its own, to be filled inside the block; then it takes its place whole.

    Args:
        path: see `write_file`; so are the errors.
        force: replace a file that exists.
    """
    path = Path(path)
    taken = FileExistsError(f"{path}: exists already; pass --force to replace it, or name another output")
    if path.exists() and not force:
        raise taken
    part = path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}.part")  # 255 bytes at most, as names may have
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            if force:
                part.replace(path)
            else:
                _publish_new(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, FileExistsError) and path.exists():
            raise taken from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: no space left on the disk; free some or write elsewhere") from error
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def write_folder(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Put a folder in place whole, instead of the one that lies there; a kill between two renames leaves it beside.

    Args:
        path: the folder.
        write: fills a new folder whose path it is given.
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}.part")
    old = part.with_suffix(".old")
    try:
        part.mkdir(parents=True)
        write(part)
        if path.exists():
            path.rename(old)
        try:
            part.rename(path)
        except OSError:
            old.rename(path)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return path


def next_folder(root: Path) -> Path:
    """Make the folder with the next free number below `root`: 0001, 0002, ...

    Raises:
        UserError: the place is not writable.
    """
    number = max((int(folder.name) for folder in numbered(root)), default=0)
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:  # mkdir decides between processes that start at the same moment
            number += 1
            try:
                (root / f"{number:04d}").mkdir()
            except FileExistsError:
                continue
            return root / f"{number:04d}"
    except OSError as error:
        raise UserError(f"{root}: no folder can be made there ({error.strerror}); choose another place") from error


def numbered(root: Path) -> list[Path]:
    """The folders below `root` that are named by a number."""
    return [f for f in root.iterdir() if f.name.isdigit() and f.is_dir()] if root.is_dir() else []


def cache_folder() -> Path:
    """Where what can be made again is kept: ZOO_CACHE, or the folder `zoo` in the user's cache folder."""
    given = os.environ.get("ZOO_CACHE")
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo")


def _publish_new(part: Path, path: Path) -> None:
    """Give `part` its final name without replacing a file that another process made in the meantime."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: reserve the name, then move onto it
        path.open("xb").close()
        part.replace(path)
