"""Images with captions: NAME.txt beside NAME.png, or tables as in Hugging Face's `imagefolder`.

A table is any .jsonl or .csv file, or metadata.parquet, with a column `file_name`, relative to the table's folder, and
one of captions.
Source: huggingface.co/docs/datasets/image_dataset (ImageFolder).
"""

import csv
import json
import logging
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.data.images import KEEP_BYTES, Collection, Report, read_uint8, size_of
from zoo.data.sampler import seed_of
from zoo.errors import UserError
from zoo.media import list_images

logger = logging.getLogger(__name__)

COLUMNS = ("text", "caption", "prompt")  # of captions, the first that a row fills
_NAMED = 5  # files in one warning; the report names more


class Captioned(NamedTuple):
    """One sample: pixels are uint8 (h, w, 3), captions at least one."""

    name: str
    pixels: np.ndarray
    captions: tuple[str, ...]


class CaptionedFolder(Collection[Captioned]):
    """The images of a folder and its sub-folders that have a caption, by their path below it.

    An image may have several: lines of its .txt, a list in a table, rows of the same name, or several of these
    sources. Images without a caption, captions without an image and damaged rows are left out, counted in one warning
    and named in the report.

    Args:
        root: the folder.
        column: of the captions in tables; None = the first of "text", "caption" and "prompt" that a row fills;
            "none" = take every image, without a caption.
        keep: memory for decoded pixels in bytes.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: no readable image with a caption, or a Parquet table but no pyarrow.
    """

    def __init__(self, root: str | Path, *, column: str | None = None, keep: int = KEEP_BYTES) -> None:
        root = Path(root)
        self._paths = {path.relative_to(root).as_posix(): path for path in list_images(root, recursive=True)}
        self._damaged: dict[str, str] = {}
        self._notes: list[str] = []
        if column == "none":
            found, strangers = {name: [""] for name in self._paths}, []
        else:
            found, strangers = self._gather(root, (column,) if column else COLUMNS)
        bare = [name for name in self._paths if name not in found]
        self._without_partner = bare + strangers
        if self._paths and not found:
            raise UserError(
                f"{root}: none of its {len(self._paths)} images has a caption{self._hint()}; put NAME.txt beside "
                "NAME.png, or metadata.jsonl with file_name and text"
            )
        self._captions = {name: tuple(dict.fromkeys(found[name])) for name in self._paths if name in found}
        super().__init__(str(root), list(self._captions), keep=keep)
        self.captions = [self._captions[name] for name in self.names]
        if left := len(self._without_partner) + len(self._damaged):
            named = "; ".join([*self._without_partner, *self._damaged][:_NAMED])
            logger.warning(
                "%s: left out %d images without a caption, %d captions without an image, %d that cannot be read: %s%s",
                *(root, len(bare), len(strangers), len(self._damaged), named, "; ..." if left > _NAMED else ""),
            )

    def report(self) -> Report:
        """As for every collection, with what has no partner and the rows that cannot be read."""
        report = super().report()
        report.unreadable |= self._damaged
        report.without_partner = list(self._without_partner)
        several = sum(len(captions) > 1 for captions in self.captions)
        report.notes = [*self._notes, *([f"{several} images have several captions"] if several else [])]
        return report

    def path(self, index: int) -> Path:
        """The file of sample `index`."""
        return self._paths[self.names[index]]

    def _probe(self, name: str) -> tuple[int, int]:
        return size_of(self._paths[name])

    def _load(self, name: str) -> Captioned:
        return Captioned(name, read_uint8(self._paths[name], 3), self._captions[name])

    def _bytes_per_pixel(self) -> int:
        return 3

    def _gather(self, root: Path, columns: tuple[str, ...]) -> tuple[dict[str, list[str]], list[str]]:
        """Captions by image, from .txt files before tables; and those of no image."""
        found: dict[str, list[str]] = {}
        strangers = []
        places = {_key(name): name for name in self._paths}
        files = sorted(path for path in root.rglob("*") if not _hidden(path.relative_to(root)))
        texts = {path for path in files if path.suffix == ".txt"}
        for name, path in self._paths.items():
            beside = path.with_suffix(".txt")
            if beside in texts and (captions := self._text(beside, root)):
                found[name] = captions
        images = {path.with_suffix(".txt") for path in self._paths.values()}
        strangers += [path.relative_to(root).as_posix() for path in sorted(texts - images)]
        for path in files:
            if path.suffix in (".jsonl", ".csv") or path.name == "metadata.parquet":
                table = path.relative_to(root).as_posix()
                for place, captions in self._table(path, table, columns):
                    name = places.get(_key(posixpath.join(posixpath.dirname(table), place)))
                    if name is None:
                        strangers.append(f"{table}: {place}")
                    elif captions:
                        found.setdefault(name, []).extend(captions)
        return found, strangers

    def _text(self, path: Path, root: Path) -> list[str]:
        """One caption per line."""
        try:
            return _clean(path.read_text(encoding="utf-8-sig").split("\n"))
        except (OSError, UnicodeDecodeError) as error:
            self._damaged[path.relative_to(root).as_posix()] = f"no text in UTF-8 ({error})"
            return []

    def _table(self, path: Path, table: str, columns: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
        """File name and captions of every row that holds both; damaged rows are remembered."""
        rows = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix](path)
        nameless, useful = [], False
        for place, row in rows:
            if not isinstance(row, dict):
                self._damaged[f"{table} {place}"] = row
                continue
            value = next((row[column] for column in columns if row.get(column)), None)
            useful |= any(column in row for column in columns) and "file_name" in row
            texts = [value] if isinstance(value, str) else value or []
            if not isinstance(row.get("file_name"), str) or not row["file_name"]:
                nameless.append(f"{table} {place}")
            elif not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                self._damaged[f"{table} {place}"] = f"a caption must be text or a list of texts, got {value!r:.40}"
            else:
                yield row["file_name"].replace("\\", "/"), _clean(texts)
        if not useful:
            self._notes.append(f"{table} is no table of captions: it has not file_name and {' or '.join(columns)}")
        else:
            self._damaged |= dict.fromkeys(nameless, "no file_name")

    def _hint(self) -> str:
        first = [f"{name}: {why}" for name, why in self._damaged.items()]
        hints = [*self._notes, *first, *(f"{name} has no image" for name in self._without_partner[len(self._paths) :])]
        return f" ({hints[0]})" if hints else ""


def _clean(texts: list[str]) -> list[str]:
    return [text for text in map(str.strip, texts) if text]


def _key(name: str) -> str:
    """One spelling of a path: accents are stored apart from their letters by some systems."""
    return unicodedata.normalize("NFC", posixpath.normpath(name))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and row of each line, or place and what is wrong with it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield f"line {number}", row if isinstance(row, dict) else "no JSON object in UTF-8"


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    reader = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield f"line {reader.line_num}", row
    except (UnicodeDecodeError, csv.Error) as error:
        yield f"after line {reader.line_num if reader else 0}", f"no CSV in UTF-8 ({error})"


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{path}: reading it needs pyarrow; pip install pyarrow, or store a metadata.jsonl") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:
        yield "", f"no Parquet file ({str(error)[:60]})"
        return
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def choose(captions: Sequence[str], seed: int, number: int) -> str:
    """One of several captions, drawn by the number of the sample."""
    return captions[seed_of(seed, "caption", number) % len(captions)]
