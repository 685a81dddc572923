"""Pictures of what training has reached, drawn by the task, and a page that shows them all."""

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from zoo import report, tracking
from zoo.errors import UserError
from zoo.files import write_file
from zoo.pipelines.tiling import evaluating
from zoo.tasks.ema import averaged

log = logging.getLogger(__name__)

_SHOWN = 12  # pictures of one image on the page, spread over the training


class Previews(Callback):
    """Shows what the task can do at step 0, every `every` steps and at the end, with averaged weights.

    Pictures go to media/step_000200/NAME.png of the run and to every logger that shows pictures; index.html of the run
    shows them in order beside the metrics. Training goes on bit for bit as without previews.

    Args:
        every: optimisation steps between previews.
        count: how many images: of a restorer, the first ones of the validation sets in turn.
        crop: side of the shown square in the middle of a restored image, pixels of gt; large ones would hide details.

    Raises:
        UserError: a number below 1.
    """

    def __init__(self, every: int = 1000, count: int = 4, crop: int = 256) -> None:
        if min(every, count, crop) < 1:
            raise UserError(f"Previews: every, count and crop must be at least 1, got {every}, {count} and {crop}")
        self.every = every
        self.count = count
        self.crop = crop
        self._done: int | None = None  # the step of the newest previews
        self._images: list[dict[str, Any]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show where training begins; a resumed run has done so."""
        self._done = None
        if trainer.global_step == 0:
            self._show(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Show every so many steps."""
        if trainer.global_step and trainer.global_step % self.every == 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what came out."""
        self._show(trainer, pl_module)
        self._page(trainer, pl_module)

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        folder = tracking.run_folder(trainer.loggers)
        # Accumulated batches share a step; and without a run folder there is no place for pictures.
        if folder is None or not trainer.is_global_zero or step == self._done:
            return
        self._done = step
        with isolate_rng(), averaged(module), evaluating(module):
            if self._images is None:
                self._images = [_cut(image, self.crop) for image in islice(_in_turn(trainer), self.count)]
            for name, picture in module.pictures(self._images, self.count):  # pyright: ignore (every task has them)
                tracking.log_media(trainer.loggers, folder, name, picture, step)
        self._page(trainer, module)

    def _page(self, trainer: Trainer, module: LightningModule) -> None:
        folder = tracking.run_folder(trainer.loggers)
        if folder is not None and trainer.is_global_zero:
            write_file(folder / "index.html", run_page(folder, str(module.protocol)), force=True)


def run_page(folder: Path, protocol: str) -> str:
    """The page of a run: curves and newest values of its metrics, then its pictures in the order of their steps.

    Args:
        folder: the run folder.
        protocol: how validation measures.
    """
    rows, columns = tracking.read_table(folder / "metrics.csv")
    points = {name: [(int(row["step"]), float(row[name])) for row in rows if name in row] for name in columns[1:]}
    points = {name: values for name, values in points.items() if values}
    sections = []
    for start, heading, unit in (("val/", f"Validation: {protocol}", f"({protocol})"), ("train/loss", "Loss", "")):
        lines = {name: values for name, values in points.items() if name.startswith(start)}
        if lines:
            sections.append((heading, report.curve(lines, unit)))
    newest = []
    for name, values in points.items():
        row = {"metric": name, "step": str(values[-1][0]), "value": values[-1][1]}
        newest.append(row | ({"protocol": protocol} if name.startswith("val/") else {}))
    if newest:
        sections.append(("Newest values", report.table(newest)))
    pictures: dict[str, list[Path]] = {}
    for path in sorted((folder / "media").glob("step_*/*.png")):
        pictures.setdefault(path.stem, []).append(path)
    for name, paths in pictures.items():
        chosen = sorted({round(i * (len(paths) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)})
        shown = [report.picture(paths[i], f"step {int(paths[i].parent.name[5:])}") for i in chosen]
        sections.append((name, "".join(shown)))
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        sections.append(("Recipe", report.text(recipe.read_text(encoding="utf-8"))))
    return report.page(f"Run {folder.resolve().name}", sections)


def _in_turn(trainer: Trainer) -> Iterator[Mapping[str, Any]]:
    """Validation batches, one of each set in turn; their order does not change from step to step."""
    sets = trainer.datamodule.val_dataloader() if trainer.datamodule is not None else []  # pyright: ignore
    running = [iter(images) for images in (sets if isinstance(sets, (list, tuple)) else [sets])]
    while running:
        for images in list(running):
            try:
                yield next(images)
            except StopIteration:
                running.remove(images)


def _cut(image: Mapping[str, Any], crop: int) -> dict[str, Any]:
    """The middle of a validation image; captioned images are shown whole."""
    if "lq" not in image:
        return dict(image)
    lq, gt = image["lq"], image["gt"]
    scale = gt.shape[-1] // lq.shape[-1]
    height, width = (min(size, max(1, crop // scale)) for size in lq.shape[-2:])
    top, left = (lq.shape[-2] - height) // 2, (lq.shape[-1] - width) // 2
    return {
        **image,
        "lq": lq[..., top : top + height, left : left + width],
        "gt": gt[..., top * scale : (top + height) * scale, left * scale : (left + width) * scale],
    }
