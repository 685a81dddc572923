import re

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from safetensors.torch import load_file

from tests.tasks.tiny import HAT, make_data, make_run, make_task, make_trainer, quiet
from zoo import media, tracking
from zoo.errors import UserError
from zoo.metrics.psnr_ssim import Protocol
from zoo.tasks import previews
from zoo.tasks.ema import EMA
from zoo.tasks.previews import Previews


class Draws(Callback):
    """A part of training that uses the global generator, as a network of somebody else may do."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            next(pl_module.network.parameters()).add_(1e-3 * torch.rand(()) + 1e-3 * np.random.rand())


def train(root, *callbacks, **changes):
    quiet()
    torch.manual_seed(5)
    np.random.seed(5)
    run = make_run(root / "runs")
    trainer = make_trainer(run, [EMA([0.9]), *callbacks, Draws()], max_steps=6, **changes)
    trainer.fit(make_task(network=HAT), datamodule=make_data(root / "pictures"))
    return run.folder


@pytest.fixture(scope="module")
def with_previews(tmp_path_factory):
    return train(tmp_path_factory.mktemp("with"), Previews(every=4, count=2, crop=20))


def test_pictures_are_made_at_the_start_every_so_often_and_at_the_end(with_previews):
    made = sorted(str(path.relative_to(with_previews / "media")) for path in with_previews.glob("media/*/*"))
    assert made == [f"step_{step:06d}/a-p{image}.png" for step in (0, 4, 6) for image in (0, 1)]


def test_training_with_previews_is_bit_identical_to_training_without(with_previews, tmp_path):
    without = load_file(train(tmp_path) / "weights.safetensors")
    for name, value in load_file(with_previews / "weights.safetensors").items():
        assert torch.equal(value, without[name]), name


def test_a_picture_shows_input_restored_and_truth_with_their_scores(tmp_path, monkeypatch):
    shown = []
    plain = media.side_by_side

    def noted(images, labels, **keywords):
        shown.append((images, labels, keywords["title"]))
        return plain(images, labels, **keywords)

    monkeypatch.setattr(media, "side_by_side", noted)
    folder = train(tmp_path, Previews(every=100, count=1, crop=20))
    (images, labels, title), *_, last = shown
    assert title == "a / p0.png, step 0   (PSNR-Y, crop 2, uint8)"
    assert re.fullmatch(r"bicubic \d+\.\d\d dB", labels[0])
    assert re.fullmatch(r"restored \d+\.\d\d dB", labels[1])
    truth = np.asarray(Image.open(tmp_path / "pictures" / "p0.png"))[6:26, 6:26] / 255
    np.testing.assert_allclose(images[2], truth, atol=1e-6)
    lq = torch.from_numpy(media.read_image(tmp_path / "pictures" / "p0.png").pixels)
    assert images[0].shape == images[1].shape == (20, 20, 3)
    assert lq.shape == (32, 32, 3)
    # The last one is made with the averaged weights that are written to the file.
    from zoo import models

    data = make_data(tmp_path / "pictures")
    cut = previews._cut(next(iter(data.val_dataloader()[0])), 20)
    with torch.no_grad():
        padded = torch.nn.functional.pad(cut["lq"], (0, 2, 0, 2), mode="reflect")  # windows of 4
        expected = models.load(str(folder))(padded)[..., :20, :20]
    np.testing.assert_allclose(last[0][1], expected[0].clamp(0, 1).permute(1, 2, 0), atol=1e-5)


def test_the_page_of_a_run_holds_curves_pictures_in_order_and_the_recipe(with_previews):
    text = (with_previews / "index.html").read_text()
    steps = [int(n) for n in re.findall(r"<figcaption>step (\d+)</figcaption>", text)]
    assert steps == [0, 4, 6, 0, 4, 6]
    assert text.count("data:image/png;base64,") == 6
    assert "<polyline" in text
    assert "val/a/psnr_y_bicubic" in text
    assert "Validation: PSNR-Y, crop 2, uint8" in text
    assert re.search(r"val/a/psnr_y: [\d.]+ \(PSNR-Y, crop 2, uint8\)", text), "the legend of the curves"
    assert re.search(r'val/psnr_y</td><td>\d+</td><td class="number">[\d.]+</td><td>PSNR-Y, crop 2, uint8<', text)
    assert "task: tiny" in text
    assert not re.search(r'(src|href)="(?!data:)', text), "one file is the whole page"


def test_many_previews_keep_the_page_small_with_first_and_last(tmp_path):
    for step in range(0, 100, 2):
        tracking.log_media([], tmp_path, "a", np.zeros((4, 4, 3), np.uint8), step)
    steps = [int(n) for n in re.findall(r">step (\d+)<", previews.run_page(tmp_path, Protocol()))]
    assert len(steps) == 12
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 98)


def test_without_a_run_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet()
    from lightning.pytorch import Trainer

    trainer = Trainer(
        callbacks=[Previews(every=1)],
        max_steps=2,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_task(), datamodule=make_data(tmp_path / "pictures"))
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_wrong_numbers_are_refused():
    with pytest.raises(UserError, match="every, count and crop must be at least 1, got 0, 4 and 256"):
        Previews(every=0)
