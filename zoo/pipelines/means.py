"""Means over a whole image for a network that is shown its tiles, one batch of them after the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise

import torch
from torch import Tensor, nn

from zoo.layers.global_mean import GlobalMean


class _AllTaken(Exception):
    """No error: the rest of the network need not run."""


class Means:
    """The `GlobalMean` modules of a network, served with means over all tiles.

    Call `collect` with every batch of tiles and then `settle`, as often as `passes` says; inside `applied` the network
    then uses what was found. After n passes the first n means are those of the untiled image; later ones are close, as
    they depend on the earlier.

    Args:
        network: the network.
        starts: tops and lefts of the tiles, input pixels, ascending.
        size: height and width of a tile.
        passes: how many are wanted.
    """

    def __init__(self, network: nn.Module, starts: Sequence[Sequence[int]], size: tuple[int, int], passes: int) -> None:
        self.network = network
        self.modules = [module for module in network.modules() if isinstance(module, GlobalMean)]
        self.passes = min(passes, len(self.modules))
        self._size = size
        self._cores = [_cores(some, side) for some, side in zip(starts, size, strict=True)]
        self._known: dict[GlobalMean, Tensor] = {}  # b c 1 1
        self._sums: dict[GlobalMean, Tensor] = {}
        self._counts: dict[GlobalMean, int] = {}

    def collect(self, tiles: Tensor, corners: Sequence[tuple[int, int]]) -> None:
        """Run the network as far as its last mean and add up what it sees.

        Args:
            tiles: (tiles b, c, h, w).
            corners: numbers of row and column of each tile.
        """
        taken = 0

        def gather(module: GlobalMean, features: Tensor) -> Tensor:
            nonlocal taken
            self._add(module, features, corners)
            taken += 1
            if taken == len(self.modules):
                raise _AllTaken
            return self._known_for(module, features)

        # Uncompiled: torch.compile does not follow the way out.
        with self._asking(gather), suppress(_AllTaken), torch.compiler.set_stance("force_eager"):
            self.network(tiles)

    def settle(self) -> None:
        """The end of a pass: what was added up becomes what is known."""
        self._known = {module: total / self._counts[module] for module, total in self._sums.items()}
        self._sums, self._counts = {}, {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network uses the means that are known, and its own where no pass was made."""
        with self._asking(self._known_for):
            yield

    @torch.compiler.disable()
    def _known_for(self, module: GlobalMean, features: Tensor) -> Tensor:
        known = self._known.get(module)
        if known is None:
            return module.own(features)
        known = known.to(module.own(features[..., :1, :1]).dtype)
        return known.repeat(len(features) // len(known), 1, 1, 1)

    def _add(self, module: GlobalMean, features: Tensor, corners: Sequence[tuple[int, int]]) -> None:
        """Every pixel of the image counts once: each tile gives its core."""
        for (i, j), part in zip(corners, features.chunk(len(corners)), strict=True):
            rows, columns = (
                slice(*(edge * part.shape[axis + 2] // self._size[axis] for edge in self._cores[axis][number]))
                for axis, number in ((0, i), (1, j))
            )
            core = part[..., rows, columns]
            count = core.shape[2] * core.shape[3]
            mean = module.own(core.to(torch.promote_types(core.dtype, torch.float32)))
            self._sums[module] = self._sums.get(module, 0) + count * mean
            self._counts[module] = self._counts.get(module, 0) + count

    @contextmanager
    def _asking(self, gather: Callable[[GlobalMean, Tensor], Tensor]) -> Iterator[None]:
        for module in self.modules:
            module.gather = gather
        try:
            yield
        finally:
            for module in self.modules:
                module.gather = None


def _cores(starts: Sequence[int], size: int) -> list[tuple[int, int]]:
    """First and last+1 pixel of each tile, so that these parts cover the axis without overlap."""
    cuts = [(before + size + start) // 2 for before, start in pairwise(starts)]
    edges = [starts[0], *cuts, starts[-1] + size]
    return [(edges[i] - start, edges[i + 1] - start) for i, start in enumerate(starts)]
