import json
import logging
import sys

import numpy as np
import pytest
from PIL import Image

from zoo.data.captions import CaptionedFolder, choose
from zoo.errors import UserError


def write(path, h=6, w=9, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def captions(folder, **keywords):
    found = CaptionedFolder(folder, **keywords)
    return dict(zip(found.names, found.captions, strict=True))


def test_text_beside_images_in_all_folders(tmp_path):
    pixels = write(tmp_path / "a.png")
    write(tmp_path / "deep/er/b.JPG", 12, 8)
    (tmp_path / "a.txt").write_text("﻿eine große Katze \n\n  a second way to say it\r\n", encoding="utf-8")
    (tmp_path / "deep/er/b.txt").write_text("🦓")
    folder = CaptionedFolder(tmp_path)
    assert folder.names == ["a.png", "deep/er/b.JPG"]
    np.testing.assert_array_equal(folder[0].pixels, pixels)
    assert folder[0].captions == ("eine große Katze", "a second way to say it")
    assert folder[1].captions == ("🦓",)
    assert folder.path(1) == tmp_path / "deep/er/b.JPG"
    report = str(folder.report())
    assert "2 images" in report
    assert "9x6 (1)" in report
    assert "1 images have several captions" in report


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_tables_of_hugging_face_name_files_in_sub_folders(column, tmp_path):
    for name in ("a.png", "train/b.png", "train/c.png", "train/d.png"):
        write(tmp_path / name)
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", column: "one", "width": 9})
    (tmp_path / "train/metadata.csv").write_text(
        f'﻿file_name,{column}\r\nb.png,"two, or\nthree"\r\nc.png,\r\n./d.png, four \r\n', encoding="utf-8"
    )
    assert captions(tmp_path) == {"a.png": ("one",), "train/b.png": ("two, or\nthree",), "train/d.png": ("four",)}
    assert CaptionedFolder(tmp_path).report().without_partner == ["train/c.png"]


def test_several_captions_come_from_lists_rows_and_sources_each_once(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("first\nsecond\n")
    lines(
        tmp_path / "other.jsonl",
        {"file_name": "a.png", "text": ["second", "third", ""]},
        {"file_name": "a.png", "text": "fourth"},
    )
    assert captions(tmp_path) == {"a.png": ("first", "second", "third", "fourth")}


def test_the_first_filled_column_counts_unless_one_is_named(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "b.png")
    lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.png", "prompt": "c", "caption": "b", "text": "a"},
        {"file_name": "b.png", "prompt": "c", "caption": "b", "text": None},
    )
    assert captions(tmp_path) == {"a.png": ("a",), "b.png": ("b",)}
    assert captions(tmp_path, column="prompt") == {"a.png": ("c",), "b.png": ("c",)}
    with pytest.raises(
        UserError, match=r"none of its 2 images has a caption \(metadata.jsonl is no table .* and alt\)"
    ):
        CaptionedFolder(tmp_path, column="alt")
    assert captions(tmp_path, column="none") == {"a.png": ("",), "b.png": ("",)}


def test_names_match_however_accents_and_separators_are_written(tmp_path):
    write(tmp_path / "sub/e\u0301te\u0301.png")
    lines(tmp_path / "metadata.jsonl", {"file_name": "sub\\\u00e9t\u00e9.png", "text": "summer"})
    assert list(captions(tmp_path).values()) == [("summer",)]


def test_whatever_is_left_out_is_named_and_counted(tmp_path, caplog):
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png"):
        write(tmp_path / name)
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.png").write_bytes(b"broken")
    (tmp_path / "b.txt").write_text("of a broken image")
    (tmp_path / "c.txt").write_bytes("größe".encode("latin-1"))
    (tmp_path / "readme.txt").write_text("of no image")
    (tmp_path / ".hidden.txt").write_text("never looked at")
    (tmp_path / "boxes.csv").write_text("left,top\n1,2\n")
    with (tmp_path / "metadata.jsonl").open("wb") as file:
        file.write(b'{"file_name": "d.png", "text": 7}\n{"file_name": \n\n["d.png", "x"]\n{"text": "whose"}\n')
        file.write(b'{"file_name": "../a.png", "text": "outside"}\n{"file_name": "z.png", "text": "gone"}\n')
    with caplog.at_level(logging.WARNING):
        folder = CaptionedFolder(tmp_path)
    assert folder.names == ["a.png"]
    report = folder.report()
    assert report.without_partner == [
        *("c.png", "d.png", "e.png", "readme.txt", "metadata.jsonl: ../a.png", "metadata.jsonl: z.png")
    ]
    assert report.unreadable["metadata.jsonl line 1"] == "a caption must be text or a list of texts, got 7"
    assert report.unreadable["metadata.jsonl line 2"] == "no JSON object in UTF-8"
    assert report.unreadable["metadata.jsonl line 4"] == "no JSON object in UTF-8"
    assert report.unreadable["metadata.jsonl line 5"] == "no file_name"
    assert "UTF-8" in report.unreadable["c.txt"]
    assert "not an image" in report.unreadable["b.png"]
    assert len(report.unreadable) == 6
    assert "boxes.csv is no table of captions" in str(report)
    assert "1 of 2 left out: b.png" in caplog.text
    assert "3 images without a caption, 3 captions without an image, 5 that cannot be read: c.png; " in caplog.text


@pytest.mark.parametrize(
    "content", [b"file_name,text\na.png,gr\xf6\xdfe\n", b"file_name,text\na.png," + b"x" * 200_000]
)
def test_a_table_that_cannot_be_read_is_named(content, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").write_text("fine")
    (tmp_path / "metadata.csv").write_bytes(content)
    folder = CaptionedFolder(tmp_path)
    assert folder.names == ["b.png"]
    [(place, why)] = folder.report().unreadable.items()
    assert place.startswith("metadata.csv after line")
    assert "no CSV in UTF-8" in why


def test_parquet_needs_pyarrow_and_says_so(tmp_path, monkeypatch):
    write(tmp_path / "a.png")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"metadata.parquet: reading it needs pyarrow; pip install pyarrow"):
        CaptionedFolder(tmp_path)


def test_parquet_is_read(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="an optional package")
    from pyarrow import parquet

    for name in ("a", "b"):
        write(tmp_path / f"{name}.png")
    table = arrow.table({"file_name": ["a.png", "b.png"], "text": [["one", "two"], ["three"]]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert captions(tmp_path) == {"a.png": ("one", "two"), "b.png": ("three",)}
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 damaged")
    (tmp_path / "a.txt").write_text("beside")
    assert "no Parquet file" in str(CaptionedFolder(tmp_path).report())


def test_useless_folders_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        CaptionedFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no readable image"):
        CaptionedFolder(tmp_path)
    write(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"none of its 1 images has a caption; put NAME.txt beside NAME.png"):
        CaptionedFolder(tmp_path)
    (tmp_path / "b.txt").write_text("elsewhere")
    with pytest.raises(UserError, match=r"none of its 1 images has a caption \(b.txt has no image\)"):
        CaptionedFolder(tmp_path)


def test_one_of_several_captions_follows_from_the_number_of_the_sample():
    drawn = [choose(["a", "b", "c"], 1, number) for number in range(300)]
    assert drawn == [choose(["a", "b", "c"], 1, number) for number in range(300)]
    assert drawn != [choose(["a", "b", "c"], 2, number) for number in range(300)]
    assert min(drawn.count(caption) for caption in "abc") > 70
