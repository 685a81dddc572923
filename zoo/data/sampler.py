"""Which sample is drawn when: a function of (seed, draw number), never of workers, ranks or restarts.

Every image that training takes has a number, counted from 0 over the whole run. The number decides the image (each
pass over the data set is a permutation of it), and later the crop, the augmentation and the degradation. Images of
several shapes cannot share a batch: there the batch of each optimisation step takes one group of them.
"""

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.stages import Plan, Stage
from zoo.errors import UserError

Groups = Callable[[Stage], Sequence[int]]


class Draw(NamedTuple):
    """One sample to make: its number in the run, the image it comes from, and the patch_size of its stage."""

    number: int
    index: int
    crop: int


def seed_of(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on every argument, the same on all machines.

    Args:
        seed: the user's seed.
        parts: what the random numbers are for, such as ("crop", 17).
    """
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class GroupedOrder:
    """Batches of one group each, every image as often as any other, as a function of the batch's number.

    A group is an endless row of permutations of its images, cut into batches. In each pass over the data it gives the
    batches that it has filled by then; what is left over begins its first batch of the next pass. The batches of all
    groups in a pass are shuffled.

    Args:
        groups: the group of every image.
        batch_size: images in a batch.
        seed: decides all orders.
    """

    def __init__(self, groups: Sequence[int], batch_size: int, seed: int) -> None:
        labels = np.asarray(groups)
        self.members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.counts = np.array([len(members) for members in self.members])
        self.batch_size, self.seed = batch_size, seed
        self._pass: tuple[int, np.ndarray] = (-1, np.empty(0, int))
        self._rows: dict[int, tuple[int, np.ndarray]] = {}

    def batch(self, number: int) -> list[int]:
        """The images of batch `number`."""
        turn = number * self.batch_size // int(self.counts.sum())  # no pass ends before its images are used up
        while self._filled(turn + 1).sum() <= number:
            turn += 1
        filled = self._filled(turn)
        if self._pass[0] != turn:
            batches = np.repeat(np.arange(len(self.counts)), self._filled(turn + 1) - filled)
            shuffle = np.random.RandomState(seed_of(self.seed, "batches", turn) % 2**32)
            self._pass = (turn, shuffle.permutation(batches))
        place = number - int(filled.sum())
        group = int(self._pass[1][place])
        earlier = int(filled[group]) + int((self._pass[1][:place] == group).sum())
        first = earlier * self.batch_size
        return [self._image(group, position) for position in range(first, first + self.batch_size)]

    def _filled(self, turn: int) -> np.ndarray:
        """Batches that each group gives before pass `turn`."""
        return turn * self.counts // self.batch_size

    def _image(self, group: int, position: int) -> int:
        turn, place = divmod(position, int(self.counts[group]))
        if self._rows.get(group, (-1,))[0] != turn:
            shuffle = np.random.RandomState(seed_of(self.seed, "order", group, turn) % 2**32)
            self._rows[group] = (turn, shuffle.permutation(self.members[group]))
        return int(self._rows[group][1][place])


class StepSampler(Sampler[list[Draw]]):
    """The endless list of batches of one rank; the ranks' batches of one step are disjoint parts of the same draws.

    Args:
        size: images in the data set.
        stages: sizes by optimisation step.
        seed: decides the order of every pass.
        rank: this process among `world`.
        world: number of processes.
        start_step: first optimisation step to yield.
        accumulate: batches per optimisation step on each rank.
        start_part: first of those batches within `start_step`.
        groups: the group of every image in a stage, where images of different groups cannot share a step; see
            `GroupedOrder`, which starts anew with each stage.

    Raises:
        UserError: an empty data set, or a batch that cannot be shared evenly.
    """

    def __init__(
        self,
        size: int,
        stages: Sequence[Stage],
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        *,
        accumulate: int = 1,
        start_part: int = 0,
        groups: Groups | None = None,
    ) -> None:
        if size < 1:
            raise UserError("sampler: the data set holds no image; check data.init_args.source")
        self.plan = Plan(stages)
        self.plan.check_divisible(world, accumulate)
        self.size, self.seed = size, seed
        self.rank, self.world = rank, world
        self.start_step, self.accumulate, self.start_part = start_step, accumulate, start_part
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))
        self._groups = groups
        self._grouped: tuple[int, GroupedOrder] | None = None

    def __iter__(self) -> Iterator[list[Draw]]:
        """Batches without end, from the start position."""
        step, part = self.start_step, self.start_part
        while True:
            yield self.batch(step, part)
            part += 1
            if part == self.accumulate:
                step, part = step + 1, 0

    def batch(self, step: int, part: int = 0) -> list[Draw]:
        """The draws of this rank for accumulated batch `part` of optimisation step `step`."""
        stage = self.plan.at(step)
        share = stage.batch_size // (self.world * self.accumulate)
        drawn, first = self.plan.drawn(step), (part * self.world + self.rank) * share
        numbers = range(drawn + first, drawn + first + share)
        images = map(self.index, numbers) if self._groups is None else self._group(step)[first : first + share]
        return [Draw(number, image, stage.patch_size) for number, image in zip(numbers, images, strict=True)]

    def index(self, number: int) -> int:
        """The image of draw `number`: position number % size in the permutation of pass number // size."""
        turn, place = divmod(number, self.size)
        if self._order[0] != turn:
            # RandomState is the one generator whose numbers numpy promises never to change.
            shuffle = np.random.RandomState(seed_of(self.seed, "order", turn) % 2**32)
            self._order = (turn, shuffle.permutation(self.size))
        return int(self._order[1][place])

    def _group(self, step: int) -> list[int]:
        """The images of all ranks in a step."""
        start, stage = self.plan.start(step), self.plan.at(step)
        if self._grouped is None or self._grouped[0] != start:
            assert self._groups is not None
            order = GroupedOrder(self._groups(stage), stage.batch_size, seed_of(self.seed, "stage", start))
            self._grouped = (start, order)
        return self._grouped[1].batch(step - start)


class ResumableLoader:
    """Batches in step order, with a position that survives a kill.

    Lightning finds `state_dict` and `load_state_dict`, stores the first in every checkpoint and calls the second
    before it asks for an iterator. The position counts batches handed out, so what workers have prepared ahead is
    made again after a restart instead of being lost. All epochs share one stream: workers live as long as the run.

    Args:
        dataset: turns a Draw into a sample.
        stages: sizes by optimisation step.
        seed: decides the order.
        epoch_steps: optimisation steps per epoch; `len()` counts batches, so it is `accumulate` times as large.
        workers: processes that make samples; 0 = this one.
        rank: this process among `world`.
        world: number of processes.
        accumulate: batches per optimisation step on each rank.
        groups: as for `StepSampler`.
        collate: list of samples -> batch; None = torch's default.
        pin_memory: copy batches to page-locked memory for a GPU.

    Raises:
        UserError: an empty data set, a negative count, or a batch that cannot be shared evenly.
    """

    def __init__(
        self,
        dataset: Dataset,
        stages: Sequence[Stage],
        seed: int = 0,
        *,
        epoch_steps: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        groups: Groups | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        if workers < 0 or epoch_steps < 1:
            raise UserError(f"data: workers must be >= 0 and epoch_steps >= 1, got {workers} and {epoch_steps}")
        self.dataset, self.stages, self.seed = dataset, tuple(stages), seed
        self.epoch_steps, self.workers = epoch_steps, workers
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.groups, self.collate, self.pin_memory = groups, collate, pin_memory
        self.handed_out = 0
        # Under this name Lightning finds torch's iterator at teardown and ends its workers.
        self._iterator: Iterator[Any] | None = None
        self._sampler(0)  # complain now, not in the first step

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return self.epoch_steps * self.accumulate

    def __iter__(self) -> Iterator[Any]:
        """One epoch from the present position.

        After `load_state_dict` too this is a whole epoch: Lightning, which knows how much of the interrupted one is
        left, stops earlier by itself.
        """
        for _ in range(len(self)):
            if self._iterator is None:  # here, because Lightning makes iterators just to see whether it can
                self._iterator = iter(self._loader())
            try:
                batch = next(self._iterator)
            except BaseException:
                self._iterator = None  # torch's iterator is spent after an error; a retry starts from the position
                raise
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position: optimisation steps handed out, and accumulated batches of the next one."""
        step, part = divmod(self.handed_out, self.accumulate)
        return {"step": step, "part": part}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a stored position; whatever workers had prepared is dropped."""
        # A step begun with other accumulation starts over: its gradients were not stored either.
        part = state.get("part", 0)
        self.handed_out = state["step"] * self.accumulate + (part if part < self.accumulate else 0)
        self._iterator = None

    def _sampler(self, handed_out: int) -> StepSampler:
        step, part = divmod(handed_out, self.accumulate)
        return StepSampler(
            len(self.dataset),  # pyright: ignore[reportArgumentType]
            self.stages,
            self.seed,
            self.rank,
            self.world,
            step,
            accumulate=self.accumulate,
            start_part=part,
            groups=self.groups,
        )

    def _loader(self) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=self._sampler(self.handed_out),
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=self.pin_memory,
            worker_init_fn=leave_signals_to_the_run,
            # torch draws a base seed for its workers from here instead of from the global generator, whose state
            # must not depend on how often data was restarted.
            generator=torch.Generator().manual_seed(self.seed),
        )


def leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C, `timeout` and systemd signal the whole process group; only the process that owns the run may answer."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
