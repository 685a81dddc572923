"""Run folders: what one training leaves behind, numbered, locked while it is trained, and found again to go on."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from zoo.errors import UserError
from zoo.files import next_folder, numbered, write_file

try:
    import fcntl
except ImportError:  # Windows: a run that is in use is not noticed there
    fcntl = None

log = logging.getLogger(__name__)

STATES = ("running", "finished", "interrupted")


class Run:
    """A numbered folder with everything that one training leaves behind.

    recipe.yaml · status.json · metrics.csv · media/ · checkpoints/{last.ckpt, config.yaml} · weights.safetensors ·
    index.html. One process at a time writes to it: `create` and `open` take a lock that ends with the process.
    """

    _announced: str | None = None  # what this process has set ZOO_RUN to

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, root: str | Path, *, text: str, config: Mapping[str, Any], hash: str) -> "Run":
        """Make the folder with the next free number below `root`: 0001, 0002, ...

        Ranks above 0 take the folder of rank 0 from the variable ZOO_RUN, which the processes that Lightning starts
        inherit. Under another launcher (torchrun, SLURM) ZOO_RUN must be set for all ranks; rank 0 then makes that
        folder.

        Args:
            root: where runs are kept.
            text: the recipe as given, for recipe.yaml.
            config: the resolved recipe, plain data, for checkpoints/config.yaml.
            hash: identifies the recipe for `newest_unfinished`.

        Raises:
            UserError: a rank above 0 without ZOO_RUN, or a ZOO_RUN that exists already.
        """
        given = os.environ.get("ZOO_RUN")
        if rank() > 0:
            if not given:
                raise UserError(f"run: rank {rank()} does not know its folder; set ZOO_RUN=<folder> for all ranks")
            return cls(given)
        root = Path(root)
        # Without a launcher's variables ZOO_RUN is only what an earlier training has left.
        if given and given != cls._announced and any(name in os.environ for name in _LAUNCHED):
            folder = Path(given)
            if folder.exists():
                raise UserError(
                    f"run: ZOO_RUN={given} exists already; name a new folder, or go on with --resume={given}"
                )
            folder.mkdir(parents=True)
        else:
            folder = next_folder(root)
        run = cls(folder)
        run._announce()
        run._hold()
        write_file(folder / "recipe.yaml", text)
        write_file(folder / "checkpoints" / "config.yaml", _yaml(config))
        write_file(folder / "status.json", json.dumps({"hash": hash, "state": "running", "step": 0}))
        return run

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """An existing run, to go on with it.

        Raises:
            UserError: the folder is no run, or another process is training it.
        """
        run = cls(folder)
        if not (run.folder / "status.json").is_file():
            raise UserError(f"run: {folder} has no status.json, so it is no run folder; see the folders below runs/")
        if rank() == 0:
            if not run._hold():
                raise UserError(f"run: {folder} is being trained by another process; wait for it or stop it first")
            run._announce()
        return run

    @classmethod
    def newest_unfinished(cls, root: str | Path, hash: str) -> "Run | None":
        """The newest run of the same recipe that is not finished and that no other process is training.

        Args:
            root: where runs are kept.
            hash: as given to `create`.
        """
        if rank() > 0:
            return cls.open(os.environ["ZOO_RUN"]) if "ZOO_RUN" in os.environ else None
        for folder in sorted(numbered(Path(root)), key=lambda f: int(f.name), reverse=True):
            run = cls(folder)
            status = run.status
            if status.get("hash") == hash and status.get("state") != "finished" and run._hold():
                # Not `open`: closing a second descriptor of the lock file would give the lock away.
                run._announce()
                return run
        return None

    @property
    def checkpoint(self) -> Path | None:
        """The file to resume from, or None when the run was ended before it saved anything."""
        path = self.folder / "checkpoints" / "last.ckpt"
        return path if path.is_file() else None

    @property
    def status(self) -> dict[str, Any]:
        """{"hash", "state", "step"} and, once trained, "protocol" of its scores; empty when it cannot be read."""
        try:
            return json.loads((self.folder / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def mark(self, state: str, step: int, **facts: str) -> None:
        """Write down how far the run is; only rank 0 does.

        Args:
            state: "running", "finished" or "interrupted".
            step: optimisation steps done.
            **facts: what else the status shall hold from now on.
        """
        if state not in STATES:
            raise ValueError(f"Run.mark: state must be one of {', '.join(STATES)}, got {state!r}")
        if rank() == 0:
            status = {**self.status, "state": state, "step": step, **facts}
            write_file(self.folder / "status.json", json.dumps(status), force=True)

    def retarget(self, config: Mapping[str, Any], hash: str) -> None:
        """Go on with another recipe, which `newest_unfinished` finds from then on; only rank 0 does.

        The recipe until now stays as checkpoints/config-until-STEP.yaml. The hash is written last: a kill on the way
        leaves a run that can be retargeted again.

        Args:
            config: as for `create`; nothing happens when the hash is the run's own.
            hash: as for `create`.
        """
        status = self.status
        if rank() > 0 or status.get("hash") == hash:
            return
        log.warning("run %s was started with other settings; it goes on with those given now", self.folder)
        current = self.folder / "checkpoints" / "config.yaml"
        kept = current.with_name(f"config-until-{status.get('step', 0)}.yaml")
        if current.is_file() and not kept.exists():
            write_file(kept, current.read_bytes())
        write_file(current, _yaml(config), force=True)
        status |= {"hash": hash, "state": "interrupted"}
        write_file(self.folder / "status.json", json.dumps(status), force=True)

    def _announce(self) -> None:
        """Tell the processes that this one starts."""
        Run._announced = os.environ["ZOO_RUN"] = str(self.folder.resolve())

    def _hold(self) -> bool:
        """Lock the folder for this process; False when another one has it.

        A POSIX lock belongs to the process and not to its children, so that data workers that outlive a killed
        parent by a moment do not keep the run from being resumed.
        """
        if fcntl is None:
            return True
        file = (self.folder / ".lock").open("w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return False
        except OSError as error:  # file systems without locks
            log.debug("no lock for %s: %s", self.folder, error)
        self._lock = file
        return True


_LAUNCHED = ("RANK", "SLURM_PROCID")  # not LOCAL_RANK, which Lightning sets in its first process, too


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def rank() -> int:
    """This process among those of a distributed training, before torch knows it."""
    return int(next((os.environ[n] for n in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if n in os.environ), 0))
