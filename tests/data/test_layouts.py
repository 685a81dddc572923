import numpy as np
import pytest
from PIL import Image

from zoo.data.layouts import find, locate, match
from zoo.errors import UserError


def put(root, *names, side=16):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((side, side), np.uint8)).save(path)


def pairs(found, root):
    return [
        (f.gt.relative_to(root).as_posix(), f.lq.relative_to(root).as_posix() if f.lq else None) for f in found.files
    ]


LAYOUTS = {  # files with their side -> what belongs together for upscale 4
    "basicsr": (
        {"original/a.png": 17, "GTmod12/a.png": 12, "GTmod4/a.png": 16, "LRbicx2/a.png": 8, "LRbicx4/a.png": 4},
        [("GTmod4/a.png", "LRbicx4/a.png")],
    ),
    "basicsr, lr of the common mod": (
        {"GTmod12/a.png": 12, "GTmod4/a.png": 16, "LRbicx4/a.png": 3},
        [("GTmod12/a.png", "LRbicx4/a.png")],
    ),
    "basicsr, no lr": ({"GTmod12/a.png": 12, "GTmod4/a.png": 16, "GTmod3/a.png": 15}, [("GTmod4/a.png", None)]),
    "basicsr, originals only": ({"original/a.png": 17}, [("original/a.png", None)]),
    "edsr": (
        {"HR/img_001.png": 16, "LR_bicubic/X2/img_001x2.png": 8, "LR_bicubic/X4/img_001x4.png": 4},
        [("HR/img_001.png", "LR_bicubic/X4/img_001x4.png")],
    ),
    "edsr, scale missing": ({"HR/a.png": 16, "LR_bicubic/X2/ax2.png": 8}, [("HR/a.png", None)]),
    "kaggle": (
        {
            "image_SRF_4/img_001_SRF_4_HR.png": 16,
            "image_SRF_4/img_001_SRF_4_LR.png": 4,
            "image_SRF_2/x_SRF_2_HR.png": 8,
        },
        [("image_SRF_4/img_001_SRF_4_HR.png", "image_SRF_4/img_001_SRF_4_LR.png")],
    ),
    "kaggle, inner folder": (
        {"img_001_SRF_4_HR.png": 16, "img_001_SRF_4_LR.png": 4},
        [("img_001_SRF_4_HR.png", "img_001_SRF_4_LR.png")],
    ),
    "div2k": (
        {
            "DIV2K_train_HR/0001.png": 16,
            "DIV2K_train_LR_bicubic/X4/0001x4.png": 4,
            "DIV2K_valid_HR/0801.png": 16,
            "DIV2K_valid_LR_bicubic/X4/0801x4.png": 4,
        },
        [("DIV2K_train_HR/0001.png", "DIV2K_train_LR_bicubic/X4/0001x4.png")],
    ),
    "div2k, sub-images": (
        {
            "DIV2K_train_HR/0001.png": 16,
            "DIV2K_train_HR_sub/0001_s001.png": 16,
            "DIV2K_train_LR_bicubic/X4/0001x4.png": 4,
            "DIV2K_train_LR_bicubic/X4_sub/0001_s001.png": 4,
        },
        [("DIV2K_train_HR_sub/0001_s001.png", "DIV2K_train_LR_bicubic/X4_sub/0001_s001.png")],
    ),
    "flickr2k": (
        {"Flickr2K_HR/000001.png": 16, "Flickr2K_LR_bicubic/X4/000001x4.png": 4},
        [("Flickr2K_HR/000001.png", "Flickr2K_LR_bicubic/X4/000001x4.png")],
    ),
    "gt/lq": ({"gt/a.png": 16, "lq/a.png": 4}, [("gt/a.png", "lq/a.png")]),
    "HQ/LQ": ({"HQ/a.png": 16, "LQ/a.jpg": 4}, [("HQ/a.png", "LQ/a.jpg")]),
    "HR/LR": ({"HR/a.png": 16, "LR/a_x4.png": 4}, [("HR/a.png", "LR/a_x4.png")]),
    "input/target": ({"target/a.png": 16, "input/a.png": 16}, [("target/a.png", "input/a.png")]),
    "gt/lq by scale": ({"gt/a.png": 16, "lq/x4/a.png": 4}, [("gt/a.png", "lq/x4/a.png")]),
    "case of folders and names": (
        {"hr/A.PNG": 16, "lr_BICUBIC/x4/aX4.png": 4},
        [("hr/A.PNG", "lr_BICUBIC/x4/aX4.png")],
    ),
    "plain": ({"10.png": 16, "9.png": 16}, [("9.png", None), ("10.png", None)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, tmp_path):
    files, expected = LAYOUTS[layout]
    for name, side in files.items():
        put(tmp_path, name, side=side)
    found = find(tmp_path, 4)
    assert pairs(found, tmp_path) == expected
    assert not found.without_partner


def test_validation_never_takes_training_images_by_accident(tmp_path):
    put(tmp_path, "DIV2K_train_HR/0001.png", "DIV2K_valid_HR/0801.png")
    assert pairs(find(tmp_path, 4, split="valid"), tmp_path) == [("DIV2K_valid_HR/0801.png", None)]
    (tmp_path / "DIV2K_valid_HR" / "0801.png").unlink()
    (tmp_path / "DIV2K_valid_HR").rmdir()
    with pytest.raises(UserError, match=r"no known layout .*\(it holds DIV2K_train_HR\)"):
        find(tmp_path, 4, split="valid")


def test_unequal_counts_are_reported_from_both_sides(tmp_path):
    put(tmp_path, "gt/a.png", "gt/b.png", "lq/a.png", "lq/c.png")
    found = find(tmp_path, 1)
    assert pairs(found, tmp_path) == [("gt/a.png", "lq/a.png")]
    assert found.without_partner == ["gt/b.png", "lq/c.png"]


def test_a_template_replaces_the_usual_names(tmp_path):
    put(tmp_path, "gt/a.png", "lq/a.png", "lq/bad_a.png")
    found = find(tmp_path, 1, template="bad_{}")
    assert pairs(found, tmp_path) == [("gt/a.png", "lq/bad_a.png")]
    assert found.without_partner == ["lq/a.png"]


def test_the_same_ending_wins(tmp_path):
    put(tmp_path, "gt/a.png", "lq/a.jpg", "lq/a.png")
    found = match([tmp_path / "gt/a.png"], [tmp_path / "lq/a.jpg", tmp_path / "lq/a.png"], 1, "test")
    assert found.files[0].lq.name == "a.png"


@pytest.mark.parametrize(
    ("asked", "there"), [("set5", "Set5"), ("BSD100", "B100"), ("b100", "BSDS100"), ("MANGA109", "manga109")]
)
def test_sets_are_found_under_their_usual_spellings(asked, there, tmp_path):
    (tmp_path / there).mkdir()
    assert locate(tmp_path / asked).name.lower() in (there.lower(), asked.lower())
    assert locate(tmp_path / asked).is_dir()


def test_wrong_places_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder; check the path$"):
        find(tmp_path / "Set6", 4)
    put(tmp_path, "benchmark/Set5/HR/a.png", "file.png")
    with pytest.raises(UserError, match=r"no images and no known layout of pairs for upscale 4 \(it holds Set5\)"):
        find(tmp_path / "benchmark", 4)
    with pytest.raises(UserError, match="not a folder"):
        find(tmp_path / "file.png", 4)
