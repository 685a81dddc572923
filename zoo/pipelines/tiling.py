"""Any network on any image size: pad, cut into tiles when memory is short, blend, crop.

Tiles start on the network's grid (multiples of its window). Each keeps `overlap` pixels of context towards its
neighbours that never reach the result; the band between the contexts of two neighbours is cross-faded with weights
that sum to one, so that no seam can be seen. A network whose reach is at most `overlap` gives the untiled result.
Means over the whole image, which channel attention needs, are found in passes over the tiles first (`means.py`).
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.models import needs
from zoo.models.entry import Needs
from zoo.pipelines import memory
from zoo.pipelines.means import Means

log = logging.getLogger(__name__)

TileProgress = Callable[[int, int], None]  # tiles run, tiles to run in all; begins anew when the tiles become smaller
PADDINGS = ("reflect", "mirror_always")
_FEATHER = 8  # width of the cross-faded band, input pixels
_ADVANCE = 16  # what the smallest tile adds to its neighbour; below, nearly all work would be context
_GUARD = threading.Lock()
_BUSY: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # held while a network restores
# Where memory ran out: the tile that fitted and what was free, so that not every frame of a video tries in vain.
_FITTED: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()
_TOLD: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # the tile whose gap was measured last
_SHARE = 0.5  # of the free memory: needs().bytes_per_pixel is an estimate, and other programs want to live


@dataclass(frozen=True)
class TilePlan:
    """Where the tiles lie.

    Attributes:
        size: height and width of every tile, input pixels.
        starts: tops and lefts, ascending.
    """

    size: tuple[int, int]
    starts: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Numbers of row and column of every tile, row by row."""
        return [(i, j) for i in range(len(self.starts[0])) for j in range(len(self.starts[1]))]


def restore(
    network: nn.Module,
    image: Tensor,
    *,
    tile: int | str | None = "auto",
    overlap: int | None = None,
    padding: str = "reflect",
    progress: TileProgress | None = None,
    batch: int = 1,
) -> Tensor:
    """Run `network` on an image of any size, without gradients and in eval mode.

    Args:
        network: one of zoo's restorers; it stays on its device and keeps its mode. Threads that share it take turns.
        image: (b, c, h, w) in [0, 1], on any device; it goes to the network's device tile by tile.
        tile: largest side of what the network sees at once, input pixels; None = always the whole image;
            "auto" = the whole image if the free memory suffices, else the largest tile that it does suffice for. A
            network that tiles change (needs().whole) is never tiled by "auto": it works on fewer channels at a time.
            Asked to tile, it says by how much the result differs.
        overlap: context on each side of a tile, input pixels; None = what the network needs.
        padding: how sides are brought to multiples; see `pad`.
        progress: called with the numbers of tiles run and to run in all, first with 0.
        batch: tiles that go through the network at once.

    Returns:
        (b, c, h * upscale, w * upscale), dtype and device of `image`, not clamped.

    Raises:
        UserError: wrong channels, a tile too small for its overlap, or memory short for the smallest tile too.
    """
    facts = needs(network)
    _check(image, facts)
    overlap = facts.overlap if overlap is None else overlap
    if overlap < 0 or batch < 1:
        raise ValueError(f"restore: overlap must be >= 0 and batch >= 1, got {overlap} and {batch}")
    smallest = _round_up(2 * overlap + _FEATHER + max(_ADVANCE, facts.multiple), facts.multiple)
    padded = pad(image, facts.multiple, padding)
    if facts.whole and (tile is None or tile == "auto"):
        out = _in_one_piece(network, padded, facts, progress)
        return out[..., : image.shape[2] * facts.upscale, : image.shape[3] * facts.upscale]
    longest = max(padded.shape[2:])
    side = _first_side(network, padded, facts, tile, smallest, batch)
    while True:
        plan = _plan(padded.shape[2:], side, overlap, facts.multiple)
        try:
            with evaluating(network):
                out = _run(network, padded, plan, overlap, facts.upscale, batch, progress)
            if facts.whole and len(plan.corners) > 1:
                _tell_gap(network, padded, plan, side, overlap)
            return out[..., : image.shape[2] * facts.upscale, : image.shape[3] * facts.upscale]
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
        # outside `except`: its traceback would keep the tensors of the failed attempt alive
        memory.release(_place(network)[0])
        side = min(side, longest)
        if tile is None:
            raise UserError(f"{_what(image)} does not fit into memory in one piece; let it be tiled (--tile auto)")
        if side <= smallest and batch == 1:
            raise UserError(
                f"{_what(image)} does not fit into memory even in tiles of {smallest} pixels; "
                "close other programs, or take a smaller model or another device"
            )
        side, batch = (side, 1) if batch > 1 else (max(smallest, side // 2 // facts.multiple * facts.multiple), 1)
        log.warning("out of memory: going on with tiles of %d pixels", side)
        if tile == "auto":
            _FITTED[network] = side, memory.free_bytes(_place(network)[0]) or 0


def pad(image: Tensor, multiple: int, padding: str = "reflect") -> Tensor:
    """Mirror (b, c, h, w) at the bottom and right to multiples; no copy where nothing is added.

    Where the image is smaller than what is added, the mirror image is mirrored again, which any size down to one pixel
    can do.

    Args:
        image: the image.
        multiple: of which both sides are to be.
        padding: one of PADDINGS: "reflect" leaves the edge pixel out and sides that are multiples alone, as nearly all
            official code does; "mirror_always" repeats the edge pixel and goes to the next multiple above, as CRAFT's
            script for the tables does.

    Raises:
        UserError: no such padding.
    """
    if padding not in PADDINGS:
        raise UserError(f"restore: padding must be {' or '.join(PADDINGS)}, got {padding!r}")
    repeated = int(padding == "mirror_always")  # how often the edge pixel comes again
    for axis in (2, 3):
        size = image.shape[axis]
        wanted = _round_up(size + repeated, multiple)
        if wanted > size:
            period = max(1, 2 * (size - 1 + repeated))
            index = torch.arange(wanted, device=image.device) % period
            image = image.index_select(axis, torch.minimum(index, period - repeated - index).clamp(min=0))
    return image


def check_dtype(network: nn.Module, dtype: str) -> None:
    """Refuse a precision in which the network is known to fail.

    Raises:
        UserError: `dtype` is not among needs(network).dtypes.
    """
    known = needs(network).dtypes
    if dtype not in known:
        raise UserError(f"{type(network).__name__} does not work in {dtype}; choose one of {', '.join(known)}")


def _check(image: Tensor, facts: Needs) -> None:
    if image.ndim != 4 or not image.is_floating_point() or 0 in image.shape:
        raise ValueError(f"restore: image must be floating (b, c, h, w), got {image.dtype} {tuple(image.shape)}")
    if image.shape[1] != facts.in_channels:
        raise UserError(f"the image has {image.shape[1]} channels and the model takes {facts.in_channels}")


def _first_side(
    network: nn.Module, padded: Tensor, facts: Needs, tile: int | str | None, smallest: int, batch: int
) -> int:
    """The side to begin with; at least the longest side of the image = no tiles."""
    longest = max(padded.shape[2:])
    if tile is None:
        return longest
    if tile != "auto":
        if isinstance(tile, str) or tile < smallest:
            raise UserError(f"tile must be at least {smallest} pixels for this model, auto or off, got {tile}")
        return tile // facts.multiple * facts.multiple
    device = _place(network)[0]
    free = memory.free_bytes(device)
    if free is None:
        return longest
    each = facts.bytes_per_pixel * padded.shape[0]
    budget = _SHARE * free
    if padded.device == device:  # the result competes for the same memory
        budget -= padded.numel() * facts.upscale**2 * padded.element_size()
    known, then = _FITTED.get(network, (longest, 0))
    known = known if free <= 1.25 * then else longest
    if each * padded.shape[2] * padded.shape[3] <= budget:
        return max(smallest, known)
    side = int(math.sqrt(max(0, budget) / (each * batch))) // facts.multiple * facts.multiple
    side = max(smallest, min(side, known))
    log.info("tiles of %d pixels: %.1f GiB of memory are free", side, free / 2**30)
    return side


def _in_one_piece(network: nn.Module, padded: Tensor, facts: Needs, progress: TileProgress | None) -> Tensor:
    """The whole image, with few channels at a time where memory is short."""
    pixels = padded.shape[0] * padded.shape[2] * padded.shape[3]
    free = memory.free_bytes(_place(network)[0])
    ways = [False, True] if facts.spare_bytes_per_pixel else [False]
    if free is not None and facts.bytes_per_pixel * pixels > _SHARE * free:
        ways = ways[-1:]
        needed = (facts.spare_bytes_per_pixel or facts.bytes_per_pixel) * pixels
        if needed > free:  # rather than be killed by the system
            raise UserError(_too_large(padded) + f": it needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free")
    plan = TilePlan((padded.shape[2], padded.shape[3]), ((0,), (0,)))
    for sparing in ways:
        try:
            with evaluating(network), _sparing(network, sparing):
                return _run(network, padded, plan, 0, facts.upscale, 1, progress)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
        memory.release(_place(network)[0])
        if not sparing and True in ways:
            log.warning("out of memory: going on with fewer channels at a time")
    raise UserError(_too_large(padded))


def _too_large(padded: Tensor) -> str:
    return (
        f"{_what(padded)} does not fit into memory in one piece, and tiles change what this model computes; "
        "shrink the image, use another device, or ask for tiles (--tile 512)"
    )


@contextmanager
def _sparing(network: nn.Module, sparing: bool) -> Iterator[None]:
    if not sparing:
        yield
        return
    network.spare_memory(True)  # pyright: ignore (its needs say that it can)
    try:
        yield
    finally:
        network.spare_memory(False)  # pyright: ignore


def _tell_gap(network: nn.Module, padded: Tensor, plan: TilePlan, side: int, overlap: int) -> None:
    """Say how far tiles are from one piece, on the part of the image that the first two tiles of both axes cover."""
    if _TOLD.get(network) == side:
        return
    _TOLD[network] = side
    edges = [starts[min(1, len(starts) - 1)] + size for starts, size in zip(plan.starts, plan.size, strict=True)]
    part = padded[..., : edges[0], : edges[1]]
    try:
        whole = restore(network, part)
        tiled = restore(network, part, tile=side, overlap=overlap)
    except UserError as error:
        log.warning("tiles change what %s computes; by how much is unknown: %s", type(network).__name__, error)
        return
    gap = -10 * math.log10(max((tiled.clamp(0, 1) - whole.clamp(0, 1)).square().mean().item(), 1e-12))
    words = "tiles of %d pixels change what %s computes: on a part of %dx%d, %.2f dB PSNR between tiles and one piece"
    log.warning(words + "; without --tile nothing differs", side, type(network).__name__, edges[1], edges[0], gap)


def _plan(size: Sequence[int], side: int, overlap: int, multiple: int) -> TilePlan:
    """Equal tiles evenly spread on the grid of `multiple`: few as `side` allows, then small as their number allows."""
    shared = _round_up(2 * overlap + _FEATHER, multiple)
    sizes, starts = [], []
    for length in size:
        steps = math.ceil((length - side) / (side - shared)) if length > side else 0
        small = min(length, _round_up(math.ceil((length + steps * shared) / (steps + 1)), multiple))
        spare = length - small
        sizes.append(small)
        starts.append(tuple(spare * i // max(1, steps) // multiple * multiple for i in range(steps + 1)))
    return TilePlan((sizes[0], sizes[1]), (starts[0], starts[1]))


def _weights(starts: Sequence[int], size: int, length: int, overlap: int, upscale: int) -> Tensor:
    """How much every tile counts at each of its output pixels along one axis. (tiles, size * upscale), float64."""
    place = torch.arange(size * upscale, dtype=torch.float64) + 0.5
    weights, total = [], torch.zeros(length * upscale, dtype=torch.float64)
    for number, start in enumerate(starts):
        weight = torch.ones_like(place)
        if number > 0:  # nothing within the context, then a ramp over what the neighbour covers too
            shared = starts[number - 1] + size - start - 2 * overlap
            weight = weight * ((place / upscale - overlap) / shared).clamp(0, 1)
        if number + 1 < len(starts):
            shared = start + size - starts[number + 1] - 2 * overlap
            weight = weight * ((size - overlap - place / upscale) / shared).clamp(0, 1)
        total[start * upscale : (start + size) * upscale] += weight
        weights.append(weight)
    return torch.stack(
        [w / total[s * upscale : (s + size) * upscale] for w, s in zip(weights, starts, strict=True)]
    )  # three neighbours meet where tiles lie close; the division makes their weights sum to one too


def _run(
    network: nn.Module,
    image: Tensor,
    plan: TilePlan,
    overlap: int,
    upscale: int,
    batch: int,
    progress: TileProgress | None,
) -> Tensor:
    report = progress or (lambda done, total: None)
    corners = plan.corners
    device, dtype = _place(network)
    if len(corners) == 1:
        report(0, 1)
        out = network(image.to(device, dtype or image.dtype)).to(image)
        report(1, 1)
        return out
    (height, width), b = plan.size, image.shape[0]
    tables = [
        _weights(plan.starts[axis], plan.size[axis], image.shape[axis + 2], overlap, upscale).to(image)
        for axis in (0, 1)
    ]
    means = Means(network, plan.starts, plan.size, needs(network).passes)
    done, total = 0, len(corners) * (means.passes + 1)
    report(done, total)
    out = image.new_zeros(*image.shape[:2], image.shape[2] * upscale, image.shape[3] * upscale)
    for turn in range(means.passes + 1):
        for first in range(0, len(corners), batch):
            some = corners[first : first + batch]
            places = [(plan.starts[0][i], plan.starts[1][j]) for i, j in some]
            tiles = torch.cat([image[..., y : y + height, x : x + width] for y, x in places])  # (tiles b) c h w
            tiles = tiles.to(device, dtype or image.dtype)
            done += len(some)
            if turn < means.passes:
                means.collect(tiles, some)
                report(done, total)
                continue
            with means.applied():
                restored = network(tiles).to(image).split(b)
            for (i, j), (y, x), piece in zip(some, places, restored, strict=True):
                rows, columns = (slice(v * upscale, (v + n) * upscale) for v, n in ((y, height), (x, width)))
                out[..., rows, columns] += piece * (tables[0][i][:, None] * tables[1][j])
            report(done, total)
        if turn < means.passes:
            means.settle()
    return out


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module has the mode that it had.

    One thread at a time: mode and means are kept in the network, which others may share.
    """
    with _GUARD:
        busy = _BUSY.setdefault(network, threading.RLock())
    with busy:
        training = [module for module in network.modules() if module.training]
        network.eval()
        try:
            with torch.no_grad():  # not inference_mode: what a network caches must stay usable in training
                yield
        finally:
            for module in training:
                module.training = True


def _place(network: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    first = next((p for p in network.parameters() if p.is_floating_point()), None)
    return (torch.device("cpu"), None) if first is None else (first.device, first.dtype)


def _what(image: Tensor) -> str:
    return f"an image of {image.shape[3]}x{image.shape[2]}"


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
