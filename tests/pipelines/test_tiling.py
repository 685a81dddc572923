import copy
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from zoo import shipped
from zoo.data.degradations import Bicubic
from zoo.data.photos import photos
from zoo.errors import UserError
from zoo.metrics.psnr_ssim import Protocol
from zoo.models import create, load
from zoo.pipelines import memory, tiling
from zoo.pipelines.tiling import check_dtype, pad, restore

EXACT = 1e-6  # float32 sums of weights that add up to one
CONV = {"family": "plain-conv", "embed_dim": 6, "depth": 2, "num_feat": 4, "upscale": 2}  # reach 6 of 6 pixels


@pytest.fixture
def conv():
    torch.manual_seed(0)
    return create(CONV)


@pytest.fixture(scope="module")
def hat():
    torch.manual_seed(0)
    return load("hat-tiny-x2") if shipped.weight_file("hat-tiny-x2") else create("hat-tiny-x2")


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(90, 61), (24, 150), (37, 38), (36, 35)], ids=str)
def test_tiles_equal_the_whole_when_the_overlap_covers_the_reach(conv, size, batch):
    image = noise(2, 3, *size)
    whole = restore(conv, image, tile=None)
    assert whole.shape == (2, 3, 2 * size[0], 2 * size[1])
    for tile in (36, 41):
        tiled = restore(conv, image, tile=tile, batch=batch)
        assert (tiled - whole).abs().max() <= EXACT


def test_too_little_overlap_is_seen_by_the_comparison_above(conv):
    image = noise(1, 3, 60, 60)
    difference = (restore(conv, image, tile=36, overlap=2) - restore(conv, image, tile=None)).abs().max()
    assert difference > 100 * EXACT


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("length", [49, 64, 120, 121, 400])
def test_weights_sum_to_one_and_vanish_in_the_context(length, multiple):
    length = -(-length // multiple) * multiple
    side, overlap, upscale = 48, 12, 3
    plan = tiling._plan((length, length), side, overlap, multiple)
    size, starts = plan.size[0], plan.starts[0]
    assert all(start % multiple == 0 for start in starts)
    assert starts[-1] + size == length
    total = torch.zeros(length * upscale, dtype=torch.float64)
    for start, weight in zip(starts, tiling._weights(starts, size, length, overlap, upscale), strict=True):
        total[start * upscale : (start + size) * upscale] += weight
        assert start == 0 or not weight[: overlap * upscale].any()
        assert start + size == length or not weight[-overlap * upscale :].any()
        assert weight.diff().abs().max() < 0.5  # faded, not switched
    assert (total - 1).abs().max() < 1e-12


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (8, 5), (13, 70)], ids=str)
def test_any_size_down_to_one_pixel_works(hat, size):
    out = restore(hat, noise(2, 3, *size))
    assert out.shape == (2, 3, 2 * size[0], 2 * size[1])
    assert out.isfinite().all()


def test_padding_reflects_and_goes_on_reflecting_where_the_image_is_small():
    image = noise(1, 2, 13, 10)
    expected = torch.nn.functional.pad(image, (0, 6, 0, 3), mode="reflect")
    assert torch.equal(pad(image, 16), expected)
    assert pad(torch.tensor([[[[1.0, 2.0, 3.0]]]]), 8)[0, 0, 0].tolist() == [1, 2, 3, 2, 1, 2, 3, 2]
    assert pad(noise(1, 1, 1, 1), 8).unique().numel() == 1
    aligned = noise(1, 1, 16, 8)
    assert pad(aligned, 8) is aligned


def test_mirror_always_repeats_the_edge_and_goes_to_the_next_multiple_above():
    image = noise(1, 2, 5, 8)
    expected = torch.cat([image, image.flip(2)], 2)[:, :, :8]
    assert torch.equal(pad(image, 8, "mirror_always"), torch.cat([expected, expected.flip(3)], 3)), "8 becomes 16"
    assert pad(torch.tensor([[[[1.0, 2.0, 3.0]]]]), 8, "mirror_always")[0, 0, 0].tolist() == [1, 2, 3, 3, 2, 1, 1, 2]
    assert pad(noise(1, 1, 1, 1), 8, "mirror_always").unique().numel() == 1
    with pytest.raises(UserError, match="padding must be reflect or mirror_always, got 'mirror'"):
        pad(image, 8, "mirror")


def test_tiled_hat_scores_as_the_whole_image_does(hat):
    """On camera, half sky and half detail, tiles with means of their own were 0.2 dB worse."""
    gt = torch.from_numpy(dict(photos("validation"))["camera"]).permute(2, 0, 1).expand(3, -1, -1)
    lq = Bicubic(2).fixed(gt)[None]
    seen = []
    tiled = restore(hat, lq, tile=112, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 27)  # 3x3 tiles, three times: twice for the two means, once for the result
    assert seen[-1] == (27, 27)
    whole = restore(hat, lq, tile=None)
    assert not torch.equal(tiled, whole)
    protocol = Protocol(crop_border=2, y_channel=True)
    assert abs(protocol.psnr(tiled, gt[None]) - protocol.psnr(whole, gt[None])) < 0.001


def test_tiles_with_three_windows_of_context_equal_the_whole_and_two_leave_no_seam(hat):
    """In float64, where nothing but context that is cut off makes a difference."""
    hat, lq = copy.deepcopy(hat).double(), noise(1, 3, 88, 88).double()
    whole = restore(hat, lq, tile=None)
    assert (restore(hat, lq, tile=72, overlap=24) - whole).abs().max() <= 1e-12
    difference = (restore(hat, lq, tile=64) - whole).abs()
    assert 1e-6 < difference.max() < 0.02 / 255
    steps = difference.mean((0, 1)).diff(dim=1).abs().mean(0)  # jumps between neighbouring columns
    assert steps.max() < 1e-6  # a 4,000th of a step of 8 bits


def test_the_network_never_sees_more_than_a_tile(conv):
    sizes = []
    hook = conv.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    restore(conv, noise(1, 3, 70, 90), tile=36, batch=2)
    hook.remove()
    assert {size[2:] for size in sizes} == {(33, 34)}  # 4 x 5 tiles, no larger than their number needs
    assert {size[0] for size in sizes} <= {1, 2}


def run_out_of_memory_above(pixels):
    def hook(_, inputs):
        if inputs[0][:, 0].numel() > pixels:
            torch.empty(2**60, dtype=torch.uint8)  # the allocator's own error

    return hook


def test_auto_halves_the_tile_when_memory_runs_out(conv, caplog):
    image = noise(1, 3, 96, 80)
    expected = restore(conv, image, tile=None)
    hook = conv.register_forward_pre_hook(run_out_of_memory_above(50 * 50))
    try:
        with caplog.at_level(logging.WARNING):
            out = restore(conv, image)
            out_batched = restore(conv, image, tile=40, batch=4)
    finally:
        hook.remove()
    assert (out - expected).abs().max() <= EXACT
    assert (out_batched - expected).abs().max() <= EXACT
    assert [r.args[0] for r in caplog.records] == [48, 40]  # one piece -> 48; batch 4 -> batch 1 of the same tile


def test_out_of_memory_without_a_way_out_is_one_sentence(conv):
    hook = conv.register_forward_pre_hook(run_out_of_memory_above(0))
    try:
        with pytest.raises(UserError, match=r"90x70 does not fit into memory in one piece.*--tile auto"):
            restore(conv, noise(1, 3, 70, 90), tile=None)
        with pytest.raises(UserError, match="even in tiles of 36 pixels"):
            restore(conv, noise(1, 3, 70, 90))
    finally:
        hook.remove()


def test_other_errors_are_not_taken_for_memory(conv):
    hook = conv.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    try:
        with pytest.raises(RuntimeError, match="boom"):
            restore(conv, noise(1, 3, 30, 30))
    finally:
        hook.remove()


@pytest.mark.parametrize(("free", "tiled"), [(2**34, False), (2 * 2**20, True), (0, True), (None, False)])
def test_auto_tiles_only_when_memory_is_short(conv, monkeypatch, free, tiled):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    totals = []
    image = noise(1, 3, 100, 90)
    out = restore(conv, image, progress=lambda done, total: totals.append(total))
    assert (totals[0] > 1) == tiled
    assert (out - restore(conv, image, tile=None)).abs().max() <= EXACT


def test_mode_and_gradients_of_the_network_are_left_alone(conv):
    conv.train()
    conv.body[0].eval()
    out = restore(conv, noise(1, 3, 20, 20).requires_grad_())
    assert not out.requires_grad
    assert conv.training
    assert not conv.body[0].training
    conv.eval()


def test_threads_that_share_a_network_get_what_they_get_alone():
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4, "img_size": 8, "num_feat": 4}
    gates = {"conv_scale": 1.0, "compress_ratio": 1, "squeeze_factor": 2, "drop_path_rate": 0.5}
    network = create({"family": "hat", **sizes, **gates}).train()
    images = [noise(1, 3, 56, 48), noise(1, 3, 48, 60) / 4]
    alone = [restore(network, image, tile=40) for image in images]
    network.register_forward_pre_hook(lambda *_: time.sleep(0.01))  # the other thread's turn
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda image: restore(network, image, tile=40), images))
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert all(module.training for module in network.modules())


def test_dtype_and_device_of_the_image_are_kept(conv):
    assert restore(conv, noise(1, 3, 40, 30).double(), tile=36).dtype == torch.float64


def test_wrong_arguments_are_named(conv):
    with pytest.raises(UserError, match="1 channels and the model takes 3"):
        restore(conv, noise(1, 1, 8, 8))
    with pytest.raises(UserError, match="tile must be at least 36 pixels"):
        restore(conv, noise(1, 3, 8, 8), tile=16)
    with pytest.raises(ValueError, match=r"must be floating \(b, c, h, w\)"):
        restore(conv, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="overlap must be >= 0"):
        restore(conv, noise(1, 3, 8, 8), overlap=-1)


def test_refused_precision_names_the_allowed_ones():
    with pytest.raises(UserError, match="HAT does not work in float16; choose one of float32, bfloat16"):
        check_dtype(create("hat-tiny-x2"), "float16")
    check_dtype(create("hat-tiny-x2"), "bfloat16")


HISTOGRAM = {
    "family": "histoformer",
    "dim": 4,
    "num_blocks": [1, 1, 1, 1],
    "num_refinement_blocks": 1,
    "heads": [1, 1, 2, 2],
    "ffn_expansion_factor": 2.0,
}


@pytest.fixture(scope="module")
def sorter():
    torch.manual_seed(0)
    return create(HISTOGRAM).double()


def test_what_tiles_change_is_never_tiled_unless_asked(sorter, monkeypatch, caplog):
    image = noise(1, 3, 180, 90).double()
    expected = restore(sorter, image)
    pixels = 184 * 96
    seen = []
    for free in (10**12, 2 * 399 * 4 * pixels, 241 * 4 * pixels):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        hook = sorter.register_forward_pre_hook(lambda net, _: seen.append(net.refinement[0].attn_g.sparing))
        assert (restore(sorter, image) - expected).abs().max() < 1e-12
        hook.remove()
    assert seen == [False, True, True]
    assert not sorter.refinement[0].attn_g.sparing
    monkeypatch.setattr(memory, "free_bytes", lambda device: 239 * 4 * pixels)
    with pytest.raises(UserError, match=r"does not fit into memory in one piece, and tiles change .* are free"):
        restore(sorter, image)
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        tiled = restore(sorter, image, tile=96)
        restore(sorter, image, tile=96)
    assert (tiled - expected).abs().max() > 1e-6
    (told,) = [record.getMessage() for record in caplog.records]  # once
    assert "tiles of 96 pixels change what Histoformer computes: on a part of " in told
    assert 5 < float(told.split(", ")[1].split(" dB")[0]) < 100


def test_out_of_memory_in_one_piece_goes_on_with_fewer_channels(sorter, caplog):
    image = noise(1, 3, 40, 48).double()
    expected = restore(sorter, image)

    def short(network, _):
        if not network.refinement[0].attn_g.sparing:
            torch.empty(2**60, dtype=torch.uint8)  # the allocator's own error

    hook = sorter.register_forward_pre_hook(short)
    try:
        with caplog.at_level(logging.WARNING):
            assert (restore(sorter, image) - expected).abs().max() < 1e-12
    finally:
        hook.remove()
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: going on with fewer channels at a time"
    ]


def test_the_next_frame_begins_with_the_tile_that_fitted(conv, monkeypatch):
    network, image = conv, noise(1, 3, 96, 80)
    sizes = []
    hooks = [
        network.register_forward_pre_hook(lambda _, inputs: sizes.append(max(inputs[0].shape[2:]))),
        network.register_forward_pre_hook(run_out_of_memory_above(50 * 50)),
    ]
    restore(network, image)
    assert sizes[0] == 96
    sizes.clear()
    restore(network, image)
    assert max(sizes) <= 48
    sizes.clear()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**60)
    restore(network, image)
    assert sizes[0] == 96, "there is more memory now"
    for hook in hooks:
        hook.remove()
