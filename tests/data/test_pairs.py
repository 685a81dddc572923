import logging

import numpy as np
import pytest
from PIL import Image

from zoo.data import pairs as module
from zoo.data.imresize import imresize
from zoo.data.pairs import PairedFolder, Pairs, PairSource, cache_file, open_pairs
from zoo.errors import UserError


def write(path, h, w, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_published_pairs_are_taken_as_they_are(tmp_path):
    gt, lq = write(tmp_path / "HR/a.png", 24, 36), write(tmp_path / "LR_bicubic/X4/ax4.png", 6, 9, 1)
    pairs = PairedFolder(tmp_path, 4)
    assert pairs.has_lq
    [pair] = pairs
    assert pair.name == "a.png"
    np.testing.assert_array_equal(pair.gt, gt)
    np.testing.assert_array_equal(pair.lq, lq)
    assert "layout HR + LR_bicubic/X4" in str(pairs.report())


@pytest.mark.parametrize(
    ("gt_size", "lq_size", "shared"),
    [
        ((26, 36), (6, 9), (24, 36)),  # lq was made from mod-cropped gt, gt was not
        ((26, 36), (7, 9), (24, 36)),  # lq was made from uncropped gt: MATLAB rounds sizes up
        ((24, 36), (8, 11), (24, 36)),  # gt was cropped by 12, lq was not
    ],
)
def test_differently_cropped_halves_keep_what_they_share(gt_size, lq_size, shared, tmp_path):
    gt, lq = write(tmp_path / "gt/a.png", *gt_size), write(tmp_path / "lq/a.png", *lq_size, 1)
    pairs = PairedFolder(tmp_path, 4)
    np.testing.assert_array_equal(pairs[0].gt, gt[: shared[0], : shared[1]])
    np.testing.assert_array_equal(pairs[0].lq, lq[: shared[0] // 4, : shared[1] // 4])
    assert pairs.sizes == [shared]
    if gt_size != shared:
        assert "1 gt images cut by up to 2 pixels" in str(pairs.report())


def test_another_scale_is_named_not_cropped_to_nothing(tmp_path):
    write(tmp_path / "gt/a.png", 64, 64)
    write(tmp_path / "lq/a.png", 32, 32)
    with pytest.raises(UserError, match="gt is 64x64 but lq is 32x32, which does not fit upscale 4"):
        PairedFolder(tmp_path, 4)
    assert len(PairedFolder(tmp_path, 2)) == 1


def test_missing_lq_is_made_by_the_protocol_and_recorded(tmp_path):
    gt = write(tmp_path / "a.png", 25, 38)
    pairs = PairedFolder(tmp_path, 4)
    np.testing.assert_array_equal(pairs[0].gt, gt[:24, :36])
    np.testing.assert_array_equal(pairs[0].lq, imresize(gt[:24, :36], 1 / 4))
    assert not pairs.has_lq
    assert "lq of 1 made by MATLAB-like bicubic 1/4, mod-crop 4" in str(pairs.report())
    same = PairedFolder(tmp_path, 1)
    np.testing.assert_array_equal(same[0].lq, gt)


def test_large_collections_keep_made_lq_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "set/a.png", 24, 36)
    path = cache_file(tmp_path / "set/a.png", 4, 3)
    first = PairedFolder(tmp_path / "set", 4, keep=0)[0]
    assert path.is_file()
    calls = []
    monkeypatch.setattr(module, "imresize", lambda *args: calls.append(args) or imresize(*args))
    np.testing.assert_array_equal(PairedFolder(tmp_path / "set", 4, keep=0)[0].lq, first.lq)
    assert not calls
    path.write_bytes(b"damaged")
    np.testing.assert_array_equal(PairedFolder(tmp_path / "set", 4, keep=0)[0].lq, first.lq)
    assert len(calls) == 1
    changed = write(tmp_path / "set/a.png", 24, 40, 1)
    np.testing.assert_array_equal(PairedFolder(tmp_path / "set", 4, keep=0)[0].lq, imresize(changed, 1 / 4))


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file"))
    write(tmp_path / "set/a.png", 24, 36)
    pairs = PairedFolder(tmp_path / "set", 4, keep=0)
    with caplog.at_level(logging.WARNING):
        assert pairs[0].lq.shape == pairs[0].lq.shape == (6, 9, 3)
    assert len(caplog.records) == 1
    assert "made again in every pass" in caplog.text


@pytest.mark.parametrize("half", ["gt", "lq"])
def test_a_pair_with_one_damaged_half_is_left_out(half, tmp_path, caplog):
    for name, seed in (("a.png", 0), ("b.png", 2)):
        write(tmp_path / "gt" / name, 64, 64, seed)
        write(tmp_path / "lq" / name, 32, 32, seed + 1)
    bad = tmp_path / half / "a.png"
    bad.write_bytes(bad.read_bytes()[:400])
    with caplog.at_level(logging.WARNING):
        pairs = PairedFolder(tmp_path, 2)
    assert [pair.name for pair in pairs] == ["b.png"]
    assert list(pairs.report().unreadable) == ["a.png"]
    assert "1 of 2 left out: a.png" in caplog.text


def test_files_without_a_partner_are_reported_and_warned_about(tmp_path, caplog):
    for name in ("gt/a.png", "lq/a.png", "gt/b.png", "lq/c.png"):
        write(tmp_path / name, 8, 8)
    with caplog.at_level(logging.WARNING):
        pairs = PairedFolder(tmp_path, 1)
    assert pairs.names == ["a.png"]
    assert pairs.report().without_partner == ["gt/b.png", "lq/c.png"]
    assert "2 files without a partner" in caplog.text
    (tmp_path / "lq/a.png").unlink()
    with pytest.raises(UserError, match=r"no file has a partner.*or give a template such as"):
        PairedFolder(tmp_path, 1)


def test_two_folders_anywhere_and_a_template(tmp_path):
    write(tmp_path / "one/a.png", 8, 8)
    lq = write(tmp_path / "two/deg_a.png", 4, 4)
    pairs = PairedFolder(tmp_path / "one", 2, lq=tmp_path / "two", template="deg_{}")
    np.testing.assert_array_equal(pairs[0].lq, lq)
    with pytest.raises(UserError, match="no file has a partner"):
        PairedFolder(tmp_path / "one", 2, lq=tmp_path / "two", template="{}{x}")
    with pytest.raises(UserError, match=r"template 'deg' must hold \{\}"):
        PairedFolder(tmp_path / "one", 2, lq=tmp_path / "two", template="deg")


def test_words_for_bundled_photos():
    assert open_pairs("demo", 2).names == ["chelsea"]
    assert open_pairs("demo", 2, channels=1)[0].lq.shape == (150, 225, 1)
    with pytest.raises(UserError, match="demo have no lq folder"):
        open_pairs("demo", 2, lq="somewhere")
    assert len(open_pairs("photos", 4, split="valid")) == 5


def test_impossible_requests_are_one_sentence():
    tiny = np.zeros((3, 3, 3), np.uint8)
    with pytest.raises(UserError, match="3x3 is too small for upscale 4"):
        Pairs("test", [PairSource("a", tiny)], 4)
    with pytest.raises(UserError, match="channels 1 or 3, got 2 and 4"):
        Pairs("test", [PairSource("a", tiny)], 2, channels=4)
