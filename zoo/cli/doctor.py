"""`zoo doctor`: what this installation has, and what is wrong with it."""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from zoo.cli.options import add

PACKAGES = ("torch", "lightning", "jsonargparse", "omegaconf", "diffusers", "transformers", "torchmetrics", "wandb")
PACKAGES += ("PyWavelets", "safetensors", "numpy", "pillow", "triton", "av", "scikit-image")
CODECS = ("libx264", "libx265", "libsvtav1", "libvpx-vp9", "prores_ks", "ffv1", "h264_nvenc")
_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `zoo doctor`."""
    add(parser, "json")


def run(args: argparse.Namespace) -> int:
    """Prints what was found; the exit code is 1 when something has to be put right."""
    problems: list[str] = []
    found = {
        "system": f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores",
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": _devices(problems),
        "triton": "present" if importlib.util.find_spec("triton") else "absent: kernels take their torch path",
        "video": _codecs(),
        "tracking": _tracking(),
        "free": _free(),
        "weights": _weights(problems),
        "problems": problems,
    }
    if args.json:
        print(json.dumps(found, indent=2))
        return 1 if problems else 0
    for name, value in found.items():
        if name != "problems":
            items = value.items() if isinstance(value, dict) else [("", value)]
            for number, (key, text) in enumerate(items):
                print(f"{name if number == 0 else '':10}{key:14}{text}" if key else f"{name:10}{text}")
    for text in problems:
        print(f"PROBLEM   {text}")
    print("everything is in order" if not problems else f"{len(problems)} to put right")
    return 1 if problems else 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _devices(problems: list[str]) -> dict[str, str]:
    """Each device with the dtypes in which it multiplied two matrices; adds a broken torchvision to `problems`."""
    try:
        import torch
    except Exception as error:  # a broken build raises whatever it likes
        problems.append(f"torch cannot be imported ({error}); install it again with the constraints of the README")
        return {}
    if importlib.util.find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except Exception as error:
            cause = str(error).strip().split("\n", 1)[0]
            problems.append(
                f"torchvision {_version('torchvision')} does not fit torch {torch.__version__} ({cause}) and breaks "
                "the import of lightning; nothing here needs it: pip uninstall torchvision"
            )
    found = {}
    names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    for name in names:
        good = [dtype for dtype in _DTYPES if _multiplies(name, dtype)]
        if name == "cpu":
            what = f"{torch.get_num_threads()} threads"
        else:
            free, total = torch.cuda.mem_get_info(name)
            what = f"{torch.cuda.get_device_name(name)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        found[name] = f"{what}; {', '.join(good)}"
    return found


def _multiplies(device: str, dtype: str) -> bool:
    """Whether a small product comes out right."""
    import torch

    try:
        ones = torch.ones(8, 8, device=device, dtype=getattr(torch, dtype))
        return bool((ones @ ones == 8).all())
    except RuntimeError:
        return False


def _codecs() -> str:
    """FFmpeg's encoders that PyAV brings."""
    if not importlib.util.find_spec("av"):
        return "absent: pip install 'zoo[video]' for reading and writing video"
    try:
        import av
    except ImportError as error:
        return f"PyAV cannot be imported ({error}); install it again"
    return ", ".join(name for name in CODECS if name in av.codecs_available)


def _tracking() -> str:
    """What `tracking: auto` would do, found out without network and without asking."""
    if not importlib.util.find_spec("wandb"):
        return "CSV and pictures; wandb is not installed"
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        return f"CSV and pictures; W&B {mode} by WANDB_MODE"
    if os.environ.get("WANDB_API_KEY") or _key_stored():
        return "CSV and pictures; W&B online"
    return "CSV and pictures; W&B has no key (WANDB_MODE=offline works without one)"


def _key_stored() -> bool:
    """Whether the login file holds a key for W&B; only the host name is looked at."""
    import netrc

    name = os.environ.get("NETRC") or "~/.netrc"
    try:
        return "api.wandb.ai" in netrc.netrc(str(Path(name).expanduser())).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _free() -> dict[str, str]:
    """Disk space of the working folder and memory of the machine."""
    found = {"disk": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB in {Path.cwd()}"}
    memory = Path("/proc/meminfo")
    if memory.is_file():
        lines = dict(line.split(":", 1) for line in memory.read_text(encoding="utf-8").splitlines())
        found["memory"] = f"{int(lines['MemAvailable'].split()[0]) / 2**20:.1f} GiB"
    return found


def _weights(problems: list[str]) -> dict[str, str]:
    """Each shipped weight file against its sha256 in index.yaml."""
    from zoo import shipped

    found: dict[str, Any] = {}
    for name, row in shipped.index().items():
        path = shipped.weight_file(name)
        if path is None:
            continue
        if not path.is_file():
            problems.append(f"the weights of {name} are missing ({path}); install zoo again from its checkout")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != row.get("sha256"):
            problems.append(f"the weights of {name} are damaged ({path}); install zoo again from its checkout")
        else:
            found[name] = "sha256 fits"
    return found
