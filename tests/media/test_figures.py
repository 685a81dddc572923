import numpy as np
import pytest

from zoo.media import grid, heat_map, hot_spot, side_by_side, strip

RED, BLUE = np.zeros((2, 48, 48, 3), np.float32)
RED[..., 0], BLUE[..., 2] = 1, 1


def count(figure, colour):
    return int((figure == np.array(colour)).all(axis=2).sum())


def test_grid_enlarges_small_images_by_whole_numbers_and_shows_all():
    figure = grid([RED, BLUE, np.full((96, 96, 3), (0.2, 0, 0.2))], ["lq", "restored", "gt"], title="step 200")
    assert figure.dtype == np.uint8
    assert count(figure, (255, 0, 0)) == count(figure, (0, 0, 255)) == 192 * 192
    assert count(figure, (51, 0, 51)) == 192 * 192


def test_grid_shrinks_large_images_and_keeps_their_shape():
    figure = grid([np.zeros((1000, 2000, 3), np.uint8)], ["wide"])
    assert abs(count(figure, (0, 0, 0)) - 768 * 384) < 2000  # the label's letters


def test_long_labels_wrap_inside_their_column():
    short = grid([RED, BLUE], ["a", "b"], columns=2)
    long = grid([RED, BLUE], ["a word " * 12, "x" * 90], columns=2)
    assert long.shape[1] == short.shape[1]
    assert long.shape[0] > short.shape[0] + 40
    assert (long[:, -15:] == 255).all()  # nothing runs into the margin


def test_side_by_side_magnifies_the_same_square_of_every_image():
    gt = np.zeros((96, 120, 3), np.float32)
    gt[40:56, 60:76, 0] = 1
    lq = gt[::2, ::2]
    figure = side_by_side([lq, gt], ["lq", "gt"], zoom=(40, 60, 16))
    assert count(figure, (255, 0, 0)) >= 2 * 480 * 480  # both strips are the red square alone
    assert side_by_side([lq, gt], ["lq", "gt"]).shape[0] < figure.shape[0] - 480


def test_zoom_larger_than_the_image_and_tiny_images_work():
    for shape in ((1, 1), (3, 200, 3)):
        assert side_by_side([np.zeros(shape)] * 2, ["a", "b"], zoom=(0, 0, 64)).ndim == 3


@pytest.mark.parametrize("size", [(32, 4000), (4000, 32), (9000, 1), (40, 60)], ids=str)
@pytest.mark.parametrize("number", [3, 30])
def test_no_figure_is_larger_than_4096_pixels(size, number):
    images, labels = [np.zeros((*size, 1), np.uint8)] * number, [f"label of model {i}" for i in range(number)]
    assert max(side_by_side(images, labels, zoom=(0, 0, 64)).shape) <= 4096
    assert max(grid(images, labels).shape) <= 4096
    assert max(grid(images, labels, columns=1, title="a title").shape) <= 4096


def test_the_square_of_a_narrow_image_is_magnified_as_ever():
    image = np.zeros((4000, 32, 3), np.float32)
    image[2000:2016, 8:24, 0] = 1
    figure = side_by_side([image, image], ["a", "b"], zoom=(2000, 8, 16))
    assert count(figure, (255, 0, 0)) >= 2 * 480 * 480


def test_images_of_a_scene_may_be_cropped_a_little_differently():
    figure = side_by_side([np.zeros((10, 12, 3)), np.ones((45, 48, 3))], ["lq", "gt"], zoom=(29, 32, 16))
    assert figure.shape[0] > 900


def test_heat_map_runs_from_black_to_pale_yellow():
    gt, restored = np.zeros((1, 3, 3)), np.zeros((1, 3, 3))
    restored[0, 1], restored[0, 2] = 0.05, 0.7
    assert heat_map(restored, gt)[0].tolist() == [[0, 0, 4], [188, 55, 84], [252, 255, 164]]


def test_hot_spot_finds_the_square_with_the_largest_error():
    error = np.zeros((40, 60))
    error[25:30, 50:55] = 1
    top, left, size = hot_spot(error, 8)
    assert error[top : top + size, left : left + size].sum() == 25
    assert hot_spot(error, 100) == (0, 0, 40) or hot_spot(error, 100)[2] == 40


def test_labels_must_match_images():
    with pytest.raises(ValueError, match="got 2 and 1"):
        grid([RED, BLUE], ["only one"])
    with pytest.raises(ValueError, match="got 0 and 0"):
        side_by_side([], [])


def test_a_strip_shows_a_clip_from_its_first_frame_to_its_last():
    clip = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    assert strip(clip)[0, ::3, 0].tolist() == [0, 3, 5, 8]
    assert strip(clip[:2]).shape == (2, 6, 3)
    assert strip(clip[:1]).shape == (2, 3, 3)
