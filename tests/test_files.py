import errno
import os
from pathlib import Path

import pytest

from zoo.errors import UserError
from zoo.files import cache_folder, next_folder, write_file, write_folder


def test_a_file_is_kept_without_force_and_replaced_with_it(tmp_path):
    path = write_file(tmp_path / "deep" / "a.txt", "größe\n")
    assert path.read_bytes() == "größe\n".encode()
    with pytest.raises(FileExistsError, match="--force"):
        write_file(path, b"other")
    assert path.read_bytes() == "größe\n".encode()
    write_file(path, b"other", force=True)
    assert path.read_bytes() == b"other"
    assert list(path.parent.iterdir()) == [path]


def test_files_of_the_user_beside_it_are_left_alone(tmp_path):
    beside = [tmp_path / name for name in ("a.partial", "a.txt.partial", ".a.txt.part")]
    for path in beside:
        path.write_bytes(b"mine")
    write_file(tmp_path / "a.txt", b"ours")
    assert {path.read_bytes() for path in beside} == {b"mine"}


@pytest.mark.parametrize("letter", ["a", "é", "字", "🦓"])  # 1 to 4 bytes each
def test_the_longest_name_can_be_written(tmp_path, letter):
    name = letter * (255 // len(letter.encode()))
    assert write_file(tmp_path / name, b"1").read_bytes() == b"1"


def test_a_file_that_appears_during_the_write_is_kept(tmp_path, monkeypatch):
    path, write = tmp_path / "a.bin", Path.write_bytes

    def slow(self, data):
        write(path, b"theirs")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", slow)
    with pytest.raises(FileExistsError, match="exists already"):
        write_file(path, b"ours")
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_hard_links_still_never_replaces(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda a, b: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    assert write_file(tmp_path / "a.bin", b"1").read_bytes() == b"1"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    old = write_file(tmp_path / "a.bin", b"old")

    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        write_file(old, b"12345", force=True)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


def test_unwritable_places_are_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.bin", Path("/proc/zoo/a.bin")):
        with pytest.raises(UserError, match="cannot be written"):
            write_file(path, b"1")


def test_the_cache_lies_where_the_user_says(monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", "/a/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_folder() == Path("/a/b")
    monkeypatch.setenv("ZOO_CACHE", "")
    assert cache_folder() == Path("/c/zoo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/d")
    assert cache_folder() == Path("/d/.cache/zoo")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "pipeline"
    write_folder(path, lambda folder: (folder / "a").write_text("1"))
    write_folder(path, lambda folder: (folder / "b").write_text("2"))
    assert [p.name for p in path.iterdir()] == ["b"]

    def fail(folder):
        (folder / "c").write_text("3")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(path, fail)
    assert [p.name for p in path.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"], "nothing is left beside it"


def test_folders_are_numbered(tmp_path):
    assert [next_folder(tmp_path / "runs").name for _ in range(3)] == ["0001", "0002", "0003"]
    (tmp_path / "runs" / "0010").mkdir()
    assert next_folder(tmp_path / "runs").name == "0011"
