import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.cli import main
from zoo.cli import restore as command
from zoo.media import Picture, read_image, write_image
from zoo.models import create
from zoo.models.weights import write_weights

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = create({"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4, "upscale": 2})
    return str(write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors", network))


@pytest.fixture
def restore(weights, capsys):
    """Run the command; returns exit code, stdout, stderr without the remark on weights."""

    def call(*words):
        code = main(["restore", *map(str, words), "--model", weights])
        out, err = capsys.readouterr()
        return code, out, "\n".join(line for line in err.splitlines() if not line.startswith("weights "))

    return call


def image(path, size=(6, 8), channels=3, **options):
    return write_image(path, RNG.random((*size, channels)).astype(np.float32), **options)


def test_one_image_lands_beside_itself_with_what_made_it(restore, tmp_path):
    code, out, err = restore(image(tmp_path / "cat.png"))
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'cat_x2.png'}: 8x6 -> 16x12" in out
    picture = read_image(tmp_path / "cat_x2.png")
    assert picture.pixels.shape == (12, 16, 3)
    text = picture.info["text"]
    assert text["Software"].startswith("zoo 0.")
    assert text["zoo:tile"] == "auto"
    assert len(text["zoo:weights"]) == len("sha256 ") + 64


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["out.png"], "out.png"),
        (["deep/out.webp"], "deep/out.webp"),
        (["folder"], "folder/cat.png"),
        (["folder", "--suffix", "_sharp"], "folder/cat_sharp.png"),
        (["--out", "other.png"], "other.png"),
        (["--suffix", "_big"], "cat_big.png"),
    ],
)
def test_out_is_a_file_or_a_folder(restore, tmp_path, monkeypatch, words, target):
    monkeypatch.chdir(tmp_path)
    image(Path("cat.png"))
    assert restore("cat.png", *words)[0] == 0
    assert read_image(target).pixels.shape == (12, 16, 3)


def test_gray_alpha_and_depth_survive(restore, tmp_path):
    pixels, alpha = RNG.random((5, 4, 1)).astype(np.float32), np.ones((5, 4), np.float32)
    alpha[:, 2:] = 0
    write_image(tmp_path / "a.png", Picture(pixels, alpha, 16))
    assert restore(tmp_path / "a.png")[0] == 0
    picture = read_image(tmp_path / "a_x2.png")
    assert picture.bits == 16
    assert picture.pixels.shape == (10, 8, 1)
    assert set(np.unique(picture.alpha)) == {0, 1}
    code, _, err = restore(tmp_path / "a.png", tmp_path / "a.jpg")
    assert code == 2
    assert "JPEG has no transparency" in err
    assert restore(image(tmp_path / "b.png", bits=16), tmp_path / "b.jpg")[0] == 0


def test_folder_keeps_its_tree_and_a_bad_file_does_not_stop_it(restore, tmp_path):
    for name in ("in/a.png", "in/sub/b.jpg", "in/sub/b.png"):
        image(tmp_path / name)
    (tmp_path / "in/bad.png").write_text("no image")
    (tmp_path / "in/cut.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:90])
    code, out, err = restore(tmp_path / "in", tmp_path / "out")
    assert code == 2
    assert [p.relative_to(tmp_path / "out").as_posix() for p in sorted((tmp_path / "out").rglob("*.png"))] == [
        "a.png",
        "sub/b_jpg.png",
        "sub/b_png.png",
    ]
    assert err.startswith(f"zoo: {tmp_path / 'in/bad.png'}: not a PNG")
    assert f"{tmp_path / 'in/cut.png'}: damaged or cut off" in err
    assert "3 of 5 images restored, 2 could not be restored (named above)" in out


def test_names_in_a_folder_never_meet_and_stay_the_same(restore, tmp_path):
    for name in ("a.jpg", "a.png", "a_jpg.png", "a.webp", "b.jpg", "b_compare.jpg"):
        image(tmp_path / "in" / name)
    assert restore(tmp_path / "in", tmp_path / "out", "--compare")[0] == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    results = {"a_jpg.png", "a_jpg_2.png", "a_png.png", "a_webp.png", "b.png", "b_compare_jpg.png"}
    assert written == results | {name.replace(".png", "_compare.png") for name in results}
    for name in ("a_jpg_2.png", "a_jpg_2_compare.png"):
        (tmp_path / "out" / name).unlink()
    code, out, _ = restore(tmp_path / "in", tmp_path / "out", "--skip-existing")
    assert code == 0
    assert "1 of 1 images restored, 5 left as found" in out, "the comparison is not taken for a result"
    assert (tmp_path / "out" / "a_jpg_2.png").is_file()


def test_folder_without_out_goes_beside(restore, tmp_path):
    image(tmp_path / "in/a.png")
    code, out, _ = restore(tmp_path / "in")
    assert code == 0
    assert read_image(tmp_path / "in_x2/a.png").pixels.shape == (12, 16, 3)
    assert str(tmp_path / "in_x2/a.png") in out


def test_results_inside_the_source_are_no_sources_next_time(restore, tmp_path):
    image(tmp_path / "in/a.png")
    assert restore(tmp_path / "in", tmp_path / "in/done")[0] == 0
    image(tmp_path / "in/b.png")
    assert restore(tmp_path / "in", tmp_path / "in/done", "--skip-existing")[0] == 0
    assert sorted(p.name for p in (tmp_path / "in/done").rglob("*.png")) == ["a.png", "b.png"]


def test_existing_output_stops_before_any_work(restore, tmp_path, monkeypatch):
    for name in ("in/a.png", "in/b.png"):
        image(tmp_path / name)
    kept = image(tmp_path / "out/b.png", size=(1, 1))
    monkeypatch.setattr(command, "_restored", lambda *_: pytest.fail("work began"))
    code, _, err = restore(tmp_path / "in", tmp_path / "out")
    assert code == 2
    assert f"{kept}: exists already; --force replaces it, --skip-existing leaves them alone" in err
    monkeypatch.undo()
    code, out, _ = restore(tmp_path / "in", tmp_path / "out", "--skip-existing")
    assert "1 of 1 images restored, 1 left as found" in out
    assert read_image(kept).pixels.shape == (1, 1, 3)
    assert restore(tmp_path / "in", tmp_path / "out", "--force")[0] == 0
    assert read_image(kept).pixels.shape == (12, 16, 3)


def test_an_input_is_never_replaced(restore, tmp_path):
    path = image(tmp_path / "a.png")
    before = path.read_bytes()
    for words in ((path, path, "--force"), (tmp_path, tmp_path, "--force")):
        code, _, err = restore(*words)
        assert code == 2
        assert "would replace an input" in err
    assert path.read_bytes() == before


def test_ctrl_c_keeps_what_is_finished_and_can_go_on(restore, tmp_path, monkeypatch):
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        image(tmp_path / name)

    def write_then_stop(path, *words, **options):
        written = write_image(path, *words, **options)
        signal.raise_signal(signal.SIGINT)
        return written

    monkeypatch.setattr(command, "write_image", write_then_stop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    code, out, _ = restore(tmp_path / "in", tmp_path / "out", "--json")
    signal.signal(signal.SIGINT, before)
    assert code == 130
    assert json.loads(out)["stopped"] is True
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]
    monkeypatch.undo()
    code, out, _ = restore(tmp_path / "in", tmp_path / "out", "--skip-existing")
    assert code == 0
    assert "2 of 2 images restored, 1 left as found" in out


def test_full_disk_ends_the_folder_at_once(restore, tmp_path, monkeypatch):
    for name in ("in/a.png", "in/b.png"):
        image(tmp_path / name)
    tried = []

    def full(self, data):
        tried.append(self)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = restore(tmp_path / "in", tmp_path / "out")
    assert code == 2
    assert "no space left" in err
    assert len(tried) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_compare_writes_a_labelled_picture_too(restore, tmp_path):
    code, out, _ = restore(image(tmp_path / "cat.png", size=(40, 60)), "--compare")
    assert code == 0
    assert "cat_x2_compare.png: input, bicubic and restored side by side" in out
    assert read_image(tmp_path / "cat_x2_compare.png").pixels.shape[1] > 3 * 400


def test_json_names_every_file(restore, tmp_path):
    image(tmp_path / "in/a.png")
    image(tmp_path / "in/b.png", size=(3, 2))
    code, out, err = restore(tmp_path / "in", "--json", "--quiet")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert [d["restored_size"] for d in found["done"]] == [[16, 12], [4, 6]]
    assert found["failed"] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["missing.png"], "missing.png: no such file or folder"),
        (["empty"], "empty: holds no images"),
        (["a.png", "b.gif"], "zoo writes .png"),
        (["a.png", "b.png", "--out", "c.png"], "both given; keep one"),
        (["a.png", "b.png", "--suffix", "_x"], "already is the whole name"),
        (["a.png", "--suffix", "/b"], "--suffix /b: becomes part of a file name; leave out the slash"),
        (["full", "--suffix", "/.."], "leave out the slash"),
        (["full", "b.png"], "is a file, and IN is a folder"),
        (["a.png", "--tile", "big"], "must be a number of pixels, auto or off"),
        (["a.png", "--tile", "8"], "tile must be at least"),
        (["a.png", "--force", "--skip-existing"], "keep one of them"),
        (["a.png", "--max-pixels", "10"], "above the limit of 10 pixels"),
        (["a.png", "/proc/zoo/out.png"], "cannot be written"),
        (["a.png", "a.png/out.png"], "a.png: not a folder that can be written to"),
    ],
)
def test_mistakes_are_one_sentence(restore, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    image(Path("a.png"))
    image(Path("full/a.png"))
    Path("empty").mkdir()
    code, out, err = restore(*words)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 0
    assert out == ""
    assert sorted(p.as_posix() for p in Path().rglob("*.*")) == ["a.png", "full/a.png"]


def test_animated_gif_says_how_many_frames(restore, tmp_path):
    frames = [Image.new("L", (4, 4), i) for i in (0, 99, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    code, _, err = restore(tmp_path / "a.gif")
    assert code == 2
    assert "holds 3 frames" in err


def film(path, frames=3):
    """A real file of 18x11 pixels with a tone."""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'zoo[video]'")
    with av.open(str(path), "w") as file:
        video, sound = file.add_stream("mpeg4", rate=5), file.add_stream("aac", rate=48000, layout="mono")
        video.width, video.height, video.pix_fmt = 18, 10, "yuv420p"
        for number in range(frames):
            pixels = np.full((10, 18, 3), 60 * number, np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        file.mux([*sound.encode(frame), *sound.encode()])
    return path


def test_a_video_becomes_a_video(restore, tmp_path):
    code, out, err = restore(film(tmp_path / "clip.avi"), "--json")
    (made,) = json.loads(out)["done"]
    assert (code, err) == (0, "")
    assert made["output"] == str(tmp_path / "clip_x2.mkv")
    assert (made["size"], made["restored_size"]) == ([18, 10], [36, 20])
    assert (made["frames"], made["fps"], made["audio_tracks"], made["lost"]) == (3, 5, 1, 0)
    code, out, _ = restore(tmp_path / "clip.avi", tmp_path / "other.mp4")
    assert code == 0
    assert "3 frames at 5 per second, 1 audio track copied" in out
    code, _, err = restore(tmp_path / "clip.avi", tmp_path / "other.png")
    assert code == 2
    assert "zoo writes videos as .mp4" in err


def test_a_folder_may_hold_pictures_and_videos(restore, tmp_path):
    image(tmp_path / "in/a.png")
    film(tmp_path / "in/a.mp4")
    (tmp_path / "in/bad.mp4").write_text("no video")
    code, out, err = restore(tmp_path / "in", tmp_path / "out", "--compare")
    assert code == 2
    assert err == f"zoo: {tmp_path / 'in/bad.mp4'}: no video that can be read, or a damaged one; get the file again"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.mp4", "a.png", "a_compare.png"]
    assert "2 of 3 files restored, 1 could not be restored (named above)" in out


def test_restoring_needs_no_training_framework(weights, tmp_path):
    path = image(tmp_path / "a.png")
    code = (
        "import sys; from zoo.cli import main; code = main(sys.argv[1:]);"
        "print([m for m in ('lightning', 'diffusers', 'transformers', 'torchmetrics') if m in sys.modules]); exit(code)"
    )
    words = ["restore", str(path), "--model", weights, "--compare", "--quiet"]
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
