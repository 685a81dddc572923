"""Progressive training: patch and batch size as a function of the optimisation step."""

from collections.abc import Sequence
from dataclasses import dataclass

from zoo.errors import UserError


@dataclass(frozen=True)
class Stage:
    """One stretch of training with constant sizes.

    Args:
        until: the first optimisation step that no longer belongs to this stage; None = the rest of the training.
        batch_size: images per optimisation step, over all ranks and accumulated batches together.
        patch_size: side of the square crop in pixels of lq (the crop of gt is `upscale` times as large).

    Raises:
        UserError: a number that is not positive.
    """

    until: int | None = None
    batch_size: int = 16
    patch_size: int = 64

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        for name in ("until", "batch_size", "patch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"stages: {name} must be at least 1, got {value}; correct it in data.init_args.stages")


class Plan:
    """Where every step stands in a list of stages.

    Args:
        stages: in order; all but the last need a growing `until`, the last has none.

    Raises:
        UserError: no stage, an `until` that does not grow, or a last stage that ends.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        ends = [stage.until for stage in stages]
        if not ends or ends[-1] is not None:
            raise UserError(f"stages: the last stage must not end, got until {ends[-1:]}; write until: null")
        numbers = [end for end in ends if end is not None]
        if len(numbers) != len(ends) - 1 or numbers != sorted(set(numbers)):
            raise UserError(f"stages: every until must be larger than the one before, got {ends}; sort the stages")
        self.stages = tuple(stages)

    def at(self, step: int) -> Stage:
        """The stage that optimisation step `step` (from 0) belongs to."""
        return next(s for s in self.stages if s.until is None or step < s.until)

    def start(self, step: int) -> int:
        """The first step of the stage that `step` belongs to."""
        return max((s.until for s in self.stages if s.until is not None and s.until <= step), default=0)

    def drawn(self, step: int) -> int:
        """How many images all steps before `step` take together."""
        total = start = 0
        for stage in self.stages:
            end = step if stage.until is None else min(step, stage.until)
            total += max(0, end - start) * stage.batch_size
            start = max(start, end)
        return total

    def check_divisible(self, world: int, accumulate: int = 1) -> None:
        """Refuse batches that `world` ranks cannot share evenly: equal shares make their mean the batch's mean.

        Args:
            world: number of ranks.
            accumulate: batches per optimisation step on each rank.

        Raises:
            UserError: some stage's batch is no multiple of world * accumulate.
        """
        for stage in self.stages:
            if stage.batch_size % (world * accumulate):
                raise UserError(
                    f"stages: batch_size {stage.batch_size} cannot be shared by {world} ranks with {accumulate} "
                    f"accumulated batches; make it a multiple of {world * accumulate}"
                )
