"""Where numbers and pictures of a training go: always into its run folder, and to Weights & Biases when that works.

W&B joins when it can be imported and either WANDB_MODE is offline or a key is stored. It never asks for one, never
holds a training up for long and never ends it: what fails is said once, and the training goes on without it.
"""

import csv
import io
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from zoo.errors import UserError
from zoo.files import write_file

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0  # to reach W&B's server before going on offline


class RunTable(Logger):
    """metrics.csv of a run: one row per optimisation step, kept whole through kills and resumes.

    `step` counts finished optimisation steps, one more than the index that Lightning hands to loggers. Values logged at
    the same step share a row. After a resume, rows beyond the step where it went on are dropped.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics.csv"
        self._columns = ["step"]
        self._rows: dict[int, dict[str, str]] | None = None  # None until the first write

    @property
    def name(self) -> str:
        """Nothing: the run folder is the place, not one below it."""
        return ""

    @property
    def version(self) -> str:
        """Nothing, as for `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:  # noqa: ANN401 (Lightning's signature)
        """Nothing: the run folder holds the whole recipe."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of a step, on disk before this returns.

        Args:
            metrics: values by name; full precision is kept.
            step: Lightning's index of the optimisation step, from 0.
        """
        metrics = {name: value for name, value in metrics.items() if name != "epoch"}  # steps tell the time here
        if not metrics:
            return
        done = (0 if step is None else step) + 1
        fresh = self._rows is None
        if self._rows is None:
            stored, self._columns = read_table(self.path)
            self._rows = {int(row["step"]): row for row in stored if int(row["step"]) <= done}
        new = [name for name in metrics if name not in self._columns]
        self._columns += new
        last = max(self._rows, default=0)
        row = self._rows.setdefault(done, {"step": str(done)})
        row.update({name: repr(float(v)) if isinstance(v, float) else str(v) for name, v in metrics.items()})
        if fresh or new or done <= last:
            self._rewrite(self._rows)
        else:
            with self.path.open("ab", buffering=0) as file:  # one write call: a kill leaves no half line behind
                file.write(_lines(self._columns, [row]).encode())

    def _rewrite(self, rows: Mapping[int, Mapping[str, str]]) -> None:
        header = {name: name for name in self._columns}
        ordered = [row for _, row in sorted(rows.items())]
        write_file(self.path, _lines(self._columns, [header, *ordered]), force=True)


def read_table(path: str | Path) -> tuple[list[dict[str, str]], list[str]]:
    """Rows and columns of a metrics.csv, as text; an unfinished last line is left out, a missing file is empty.

    Args:
        path: the file.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    rows = [{k: v for k, v in row.items() if k and v} for row in reader]
    return [row for row in rows if row.get("step", "").isdigit()], list(reader.fieldnames or ["step"])


def _lines(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


class CalmWandbLogger(WandbLogger):
    """A WandbLogger whose failures are said once and end nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send values; see WandbLogger."""
        self._try(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: Any) -> None:  # noqa: ANN401 (Lightning's signature)
        """Nothing: `loggers` has sent the whole recipe."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Send pictures; see WandbLogger."""
        self._try(super().log_image, key, images, step)

    def log_file(self, path: Path, name: str, kind: str) -> None:
        """Send a file as an artifact."""
        import wandb

        def send() -> None:
            artifact = wandb.Artifact(name, type=kind)
            (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
            self.experiment.log_artifact(artifact)

        self._try(send)

    @rank_zero_only
    def _try(self, call: Callable[..., None], *arguments: object) -> None:
        if getattr(self, "_broken", False):
            return
        try:
            call(*arguments)
        except Exception as error:  # whatever its service does, the training is worth more
            self._broken = True
            log.warning("W&B failed and is left out from here on: %s", error)


def loggers(
    folder: str | Path, tracking: str = "auto", name: str | None = None, config: Mapping[str, Any] | None = None
) -> list[Logger]:
    """The loggers of a run: always the table, W&B as `tracking` says.

    Args:
        folder: the run folder; W&B's files stay below it.
        tracking: "csv" = no W&B; "wandb" = W&B must work, offline at least; "auto" = W&B when it works.
        name: how W&B shows the run.
        config: the resolved recipe, for W&B.

    Raises:
        UserError: `tracking` is "wandb" and W&B is not installed or has neither a key nor WANDB_MODE=offline.
    """
    if tracking not in ("auto", "csv", "wandb"):
        raise UserError(f"tracking: must be auto, csv or wandb, got {tracking!r}")
    found: list[Logger] = [RunTable(folder)]
    if tracking != "csv" and rank_zero_only.rank == 0:
        mode, problem = _wandb_mode()
        if mode is not None:
            found += _start_wandb(Path(folder), mode, name, config or {})
        elif tracking == "wandb":
            raise UserError(f"tracking: {problem}")
        else:
            log.debug("without W&B: %s", problem)
    return found


def log_media(
    loggers: Sequence[Logger], folder: str | Path, name: str, images: np.ndarray | Sequence[np.ndarray], step: int
) -> list[Path]:
    """Write pictures to media/step_000200/NAME.png of a run, then hand them to every logger that shows pictures.

    Args:
        loggers: of the run.
        folder: the run folder.
        name: what they show; several get a number each.
        images: uint8 (h, w, 3) or (h, w), one or several.
        step: optimisation steps done.

    Returns:
        The files.
    """
    several = [images] if isinstance(images, np.ndarray) else list(images)
    place = Path(folder) / "media" / f"step_{step:06d}"
    paths = []
    for number, image in enumerate(several):
        path = place / (f"{name}.png" if isinstance(images, np.ndarray) else f"{name}-{number}.png")
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "png")
        paths.append(write_file(path, stream.getvalue(), force=True))
    for logger in loggers:
        if isinstance(logger, CalmWandbLogger):
            logger.log_image(f"media/{name}", [str(path) for path in paths], max(0, step - 1))
        elif add_image := getattr(getattr(logger, "experiment", None), "add_image", None):  # TensorBoard
            for number, image in enumerate(several):
                add_image(f"media/{name}/{number}", np.atleast_3d(image), step, dataformats="HWC")
    return paths


def log_artifact(loggers: Sequence[Logger], path: str | Path, name: str, kind: str = "model") -> None:
    """Hand a file or folder, such as the final weights, to every logger that keeps files.

    Args:
        loggers: of the run.
        path: the file.
        name: of the artifact; versions of one name form a history.
        kind: W&B's type of the artifact.
    """
    for logger in loggers:
        if isinstance(logger, CalmWandbLogger):
            logger.log_file(Path(path), name, kind)


def run_folder(loggers: Sequence[Logger]) -> Path | None:
    """The folder that these loggers write to; None when a training leaves nothing behind."""
    return next((logger.folder for logger in loggers if isinstance(logger, RunTable)), None)


def _wandb_mode() -> tuple[str | None, str]:
    """The mode, online or offline; or None and why W&B cannot be used."""
    wish = os.environ.get("WANDB_MODE", "").lower()
    if wish == "disabled":
        return None, "WANDB_MODE=disabled switches W&B off"
    try:
        import wandb
    except Exception as error:  # also broken installations of what it needs
        return None, f"W&B cannot be imported ({error}); pip install wandb, or tracking=csv"
    if wish in ("offline", "dryrun"):
        return "offline", ""
    try:
        # Verifying the key would ask the server, and wait for it; `wandb.init` below does so with our patience.
        known = wandb.login(prompt=False, verify=False)
    except Exception as error:
        return None, f"W&B refuses its key ({error}); correct WANDB_API_KEY, or WANDB_MODE=offline"
    return ("online", "") if known else (None, "W&B has no key; set WANDB_API_KEY or WANDB_MODE=offline")


def _start_wandb(folder: Path, mode: str, name: str | None, config: Mapping[str, Any]) -> list[Logger]:
    """One W&B logger; offline when the server cannot be reached, none when W&B does not start at all."""
    import wandb

    own = folder / "wandb"
    own.mkdir(parents=True, exist_ok=True)
    os.environ["WANDB_DIR"] = str(folder.resolve())
    os.environ["WANDB_DATA_DIR"] = str((own / "data").resolve())  # else artifacts are staged in the home folder
    kept = own / "run-id.txt"  # a resumed run goes on under the same identity
    if not kept.is_file():
        kept.write_text(secrets.token_hex(4), encoding="utf-8")
    identity = kept.read_text(encoding="utf-8").strip()
    for attempt in dict.fromkeys((mode, "offline")):
        settings = wandb.Settings(
            init_timeout=CONNECT_SECONDS, login_timeout=1, console="off", silent=True, reinit="finish_previous"
        )
        try:
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "zoo"),
                name=name,
                id=identity,
                resume="allow" if attempt == "online" else None,
                dir=str(folder.resolve()),
                config=dict(config),
                mode=attempt,  # pyright: ignore
                settings=settings,
            )
        except Exception as error:
            instead = "goes on offline" if attempt == "online" else "is left out"
            log.warning("W&B does not start %s and %s: %s", attempt, instead, str(error).split("\n", 1)[0])
            identity = None  # its service keeps the failed one occupied
            continue
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return [CalmWandbLogger(experiment=run)]
    return []
