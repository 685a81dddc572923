import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from zoo.data import crops as module
from zoo.data.crops import Crops, ValidationSet, WholeImages
from zoo.data.degradations import Bicubic, Degradation, Jpeg, Noise, add_noise
from zoo.data.images import to_tensor
from zoo.data.imresize import imresize
from zoo.data.jpeg import jpeg
from zoo.data.pairs import PairedFolder
from zoo.data.sampler import Draw
from zoo.errors import UserError


class Keep(Degradation):
    """Stands where a blur may stand; changes nothing."""

    def told(self, lq, generator):
        return lq, ["kept"]


@pytest.fixture
def folder(tmp_path):
    """Two images whose pixels say where they are: red is the row, green the column, blue the image."""
    for number, (h, w) in enumerate([(40, 60), (50, 30)]):
        y, x = np.mgrid[:h, :w]
        Image.fromarray(np.stack([4 * y, 4 * x, 100 * number + 0 * y], 2).astype(np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    return tmp_path


def levels(x):
    return (x * 255).round().int()


class Numbered(Degradation):
    """Wants three pixels more than the crop, and tells which it saw."""

    context = 3

    def told(self, lq, generator):
        return lq, [str(tuple(lq.shape))]


def test_context_is_degraded_too_and_cut_off_anywhere(folder):
    crops = Crops(str(folder), 2, [Numbered()], hflip=False, vflip=False, transpose=False)
    samples, facts = zip(*(crops.told(Draw(number, 0, 8)) for number in range(150)), strict=True)
    assert set(map(tuple, facts)) == {("bicubic 1/2", "(3, 11, 11)")}
    whole = to_tensor(imresize(np.array(Image.open(folder / "0.png")), 1 / 2))
    places = set()
    for sample in samples:
        top, left = (int(levels(sample["gt"])[c].min()) // 8 for c in (0, 1))
        assert sample["gt"].shape == (3, 16, 16)
        torch.testing.assert_close(sample["lq"], whole[:, top : top + 8, left : left + 8])
        places.add((top, left))
    assert {0, 12} <= {top for top, _ in places}
    assert crops.smaller_than(12) == 0
    assert crops.smaller_than(13) == 1, "30 pixels of gt for (13 + 3) * 2"


def test_a_sample_is_a_function_of_seed_and_number(folder):
    crops = [Crops(str(folder), 2, [Jpeg((30, 90)), Noise((0, 30))], seed=seed) for seed in (4, 4, 5)]
    draw = Draw(17, 0, 8)
    first, same, other = (c[draw] for c in crops)
    torch.manual_seed(99)
    assert all(torch.equal(first[key], same[key]) for key in ("lq", "gt"))
    assert torch.equal(crops[0][draw]["lq"], first["lq"])
    assert not torch.equal(first["lq"], other["lq"])
    assert not torch.equal(first["lq"], crops[0][Draw(18, 0, 8)]["lq"])
    assert first["number"] == 17
    assert first["lq"].dtype == first["gt"].dtype == torch.float32
    assert first["lq"].is_contiguous()


def test_lq_is_cut_from_the_bicubic_of_the_whole_image(folder):
    crops = Crops(str(folder), 2, hflip=False, vflip=False, transpose=False)
    whole = np.array(Image.open(folder / "0.png"))
    small = to_tensor(imresize(whole, 1 / 2))
    places = set()
    for number in range(40):
        sample = crops[Draw(number, 0, 8)]
        top, left = (int(levels(sample["gt"])[c].min()) // 4 for c in (0, 1))
        assert top % 2 == left % 2 == 0  # drawn on the lq grid
        torch.testing.assert_close(sample["gt"], to_tensor(whole[top : top + 16, left : left + 16]))
        torch.testing.assert_close(sample["lq"], small[:, top // 2 : top // 2 + 8, left // 2 : left // 2 + 8])
        places.add((top // 2, left // 2))
    assert len(places) > 30
    assert {0, 12} <= {top for top, _ in places} <= set(range(13))  # the whole range, ends included


def test_flips_treat_both_halves_alike_and_all_eight_occur(folder):
    crops = Crops(str(folder), 1)
    seen = set()
    for number in range(80):
        sample = crops[Draw(number, 0, 8)]
        assert torch.equal(sample["lq"], sample["gt"])
        red, green = levels(sample["gt"])[:2]
        turned = bool((red[0] == red[0, 0]).all())  # rows keep their red unless transposed
        rows, columns = (red[:, 0], green[0]) if turned else (red[0], green[:, 0])
        seen.add((turned, bool(rows[1] > rows[0]), bool(columns[1] > columns[0])))
    assert len(seen) == 8
    still = Crops(str(folder), 1, hflip=False, vflip=False, transpose=False)
    assert all(levels(still[Draw(n, 0, 8)]["gt"])[0].diff(dim=0).min() > 0 for n in range(20))


def test_flips_happen_before_the_degradation(folder):
    """Compressing after turning gives exactly what compressing the turned crop gives."""
    clean, coded = Crops(str(folder), 2), Crops(str(folder), 2, [Jpeg(20)])
    for number in range(10):
        draw = Draw(number, 0, 16)
        torch.testing.assert_close(coded[draw]["lq"], jpeg(clean[draw]["lq"], 20))


def test_images_smaller_than_the_crop_are_mirrored_in_step(folder):
    crops = Crops(str(folder), 2, hflip=False, vflip=False, transpose=False)
    assert crops.smaller_than(15) == 0
    assert crops.smaller_than(16) == 1
    assert crops.smaller_than(32) == 2
    sample = crops[Draw(0, 1, 40)]
    assert sample["lq"].shape == (3, 40, 40)
    assert sample["gt"].shape == (3, 80, 80)
    difference = (imresize(sample["gt"], 1 / 2) - sample["lq"]).abs()
    assert difference[:, :, 5:35].max() < 0.03  # one pixel of shift would be 8/255 on the ramp, and more at the seam


def test_images_smaller_than_the_crop_are_stretched_where_the_recipe_says_so(folder):
    crops = Crops(str(folder), 2, enlarge="bilinear", hflip=False, vflip=False, transpose=False)
    gt = to_tensor(crops.pairs[1].gt)
    sample = crops[Draw(0, 1, 40)]
    expected = functional.interpolate(gt[None], (80, 80), mode="bilinear", align_corners=False)[0]
    assert (sample["gt"] - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert (imresize(sample["gt"], 1 / 2) - sample["lq"]).abs().max() <= 0.5 / 255 + 1e-6
    plain = Crops(str(folder), 2, hflip=False, vflip=False, transpose=False)
    assert torch.equal(crops[Draw(5, 0, 8)]["gt"], plain[Draw(5, 0, 8)]["gt"]), "large enough: as it was"
    with pytest.raises(UserError, match="enlarge must be mirror or bilinear, got 'pad'"):
        Crops(str(folder), 2, enlarge="pad")


def test_bicubic_first_says_what_happens_anyway_and_later_acts_on_the_crop(folder):
    draw = Draw(3, 0, 8)
    plain = Crops(str(folder), 2)[draw]
    assert torch.equal(Crops(str(folder), 2, [Bicubic(2)])[draw]["lq"], plain["lq"])
    late = Crops(str(folder), 2, [Keep(), Bicubic(2), Noise(0)])[draw]
    assert late["lq"].shape == (3, 8, 8)
    assert late["gt"].shape == (3, 16, 16)
    torch.testing.assert_close(late["lq"], Bicubic(2).fixed(late["gt"]))


def test_validation_gives_whole_images_by_the_fixed_protocol(folder):
    spec = ValidationSet(str(folder), [Jpeg(75), Noise(15)])
    whole = WholeImages("mine", spec, 3)
    assert len(whole) == len(list(whole)) == 2
    first = next(iter(whole))
    assert (first["name"], first["set"]) == ("0.png", "mine")
    assert first["lq"].shape == (1, 3, 13, 20)
    assert first["gt"].shape == (1, 3, 39, 60)
    clean = WholeImages("clean", ValidationSet(str(folder)), 3)[0]
    torch.testing.assert_close(first["lq"][0], add_noise(jpeg(clean["lq"][0], 75), 15))
    late = WholeImages("late", ValidationSet(str(folder), [Keep(), Bicubic(3)]), 3)[0]
    torch.testing.assert_close(late["lq"], clean["lq"], atol=1e-6, rtol=0)
    assert torch.equal(late["gt"], clean["gt"])
    with pytest.raises(IndexError):
        whole[2]


def test_a_file_damaged_later_is_replaced_in_training_and_left_out_of_validation(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(PairedFolder.__init__.__kwdefaults__, "keep", 0)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    whole = WholeImages("mine", ValidationSet(str(folder)), 2)
    crops = {scale: Crops(str(folder), 2, scales=[scale]) for scale in (1.0, 0.5)}
    expected = {scale: some[Draw(3, 1, 5)] for scale, some in crops.items()}
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:60])
    for scale, some in crops.items():
        assert torch.equal(some[Draw(3, 0, 5)]["gt"], expected[scale]["gt"])
    assert [sample["name"] for sample in whole] == ["1.png"]
    assert caplog.text.count("0.png is left out from now on, 1 of 2") == 3  # each collection says so once
    with pytest.raises(UserError, match=r"0\.png is left out"):
        whole[0]


def test_contradictions_are_one_sentence(folder, tmp_path):
    with pytest.raises(UserError, match="one Bicubic or RealWorld with upscale 2 is possible"):
        Crops(str(folder), 2, [Bicubic(4)])
    with pytest.raises(UserError, match="one Bicubic or RealWorld with upscale 2 is possible"):
        Crops(str(folder), 2, [Bicubic(2), Bicubic(2)])
    with pytest.raises(UserError, match="one number with probability 1 for validation"):
        WholeImages("x", ValidationSet(str(folder), [Jpeg((60, 95))]), 2)
    for half, side in (("gt", 32), ("lq", 16)):
        (tmp_path / "set" / half).mkdir(parents=True)
        Image.new("RGB", (side, side)).save(tmp_path / "set" / half / "a.png")
    with pytest.raises(UserError, match="brings its own lq files; remove what shrinks"):
        Crops(str(tmp_path / "set"), 2, [Bicubic(2)])


def test_scales_shrink_the_ground_truth_and_its_lq_follows(folder):
    crops = Crops(str(folder), 2, hflip=False, vflip=False, transpose=False, scales=[1.0, 0.5], seed=1)
    seen = set()
    for number in range(16):
        sample = crops[Draw(number, 0, 5)]
        column = levels(sample["gt"])[1]
        step = int(
            (column[:, -3] - column[:, 2]).float().mean() / (column.shape[1] - 5) + 0.5
        )  # 4 a pixel, 8 if shrunk
        seen.add(step)
        assert step in (4, 8)
        expected = imresize(sample["gt"], 0.5)[:, 1:-1, 1:-1]  # borders differ: lq was cut from the whole
        assert (sample["lq"][:, 1:-1, 1:-1] - expected).abs().max() < 0.02
    assert seen == {4, 8}


def test_shrunk_images_are_kept_while_there_is_room_and_change_nothing(tmp_path, monkeypatch):
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    made = []
    monkeypatch.setattr(module, "imresize", lambda *args: made.append(args) or imresize(*args))
    draws = [Draw(number, number % 40, 5) for number in range(400)]
    crops = Crops(str(tmp_path), 1, scales=[0.5, 0.75])
    samples = [crops[draw] for draw in draws]
    assert 64 < len(made) <= 80  # each image once at each scale
    monkeypatch.setattr(module, "KEEP_BYTES", 10_000)
    cramped = Crops(str(tmp_path), 1, scales=[0.5, 0.75])
    assert all(torch.equal(cramped[draw]["gt"], sample["gt"]) for draw, sample in zip(draws, samples, strict=True))
    assert 0 < sum(pair.lq.nbytes + pair.gt.nbytes for pair in cramped._shrunk.values()) <= 10_000


def test_a_single_scale_counts(folder):
    small, plain = (Crops(str(folder), 2, scales=scales)[Draw(3, 0, 5)]["gt"] for scales in ([0.5], [1.0]))
    assert not torch.equal(small, plain)


def test_colours_are_permuted_alike_in_both_halves(folder):
    crops = Crops(str(folder), 1, permute_colours=True, hflip=False, vflip=False, transpose=False)
    plain = Crops(str(folder), 1, hflip=False, vflip=False, transpose=False)
    orders = set()
    for number in range(40):
        sample, known = crops[Draw(number, 1, 8)], plain[Draw(number, 1, 8)]
        assert torch.equal(sample["lq"], sample["gt"])
        order = tuple(next(i for i in range(3) if torch.equal(channel, known["gt"][i])) for channel in sample["gt"])
        orders.add(order)
    assert len(orders) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scales": [0.0]}, r"scales must be factors in \(0, 1\], got \[0.0\]"),
        ({"scales": [1.5]}, "scales must be factors"),
        ({"permute_colours": True, "channels": 1}, "permute_colours needs channels 3, got 1"),
    ],
)
def test_impossible_augmentation_is_refused(folder, options, said):
    with pytest.raises(UserError, match=said):
        Crops(str(folder), 2, **options)


def test_denoising_and_jpeg_are_tested_by_their_published_protocols(folder):
    """Gray JPEG: rounded luma of a colour source, through the encoder as gray. Noise: unclipped, by numpy's seed 0."""
    pixels = np.array(Image.open(folder / "1.png"))
    luma = (pixels @ np.array([65.481, 128.553, 24.966]) / 255 + 16).round().astype(np.uint8)
    coded = WholeImages("gray", ValidationSet(str(folder), [Jpeg(10)]), 1, channels=1)[1]
    buffer = io.BytesIO()
    Image.fromarray(luma).save(buffer, "JPEG", quality=10)
    assert np.array_equal(levels(coded["lq"])[0, 0].numpy(), np.array(Image.open(buffer)))
    assert np.array_equal(levels(coded["gt"])[0, 0].numpy(), luma)
    noise = np.random.RandomState(0).normal(0, 50 / 255, pixels.shape)
    noisy = WholeImages("noise", ValidationSet(str(folder), [Noise(50)]), 1)[1]["lq"][0]
    expected = (pixels[..., ::-1] / 255 + noise)[..., ::-1].transpose(2, 0, 1)
    np.testing.assert_allclose(noisy.numpy(), expected, atol=1e-6)
