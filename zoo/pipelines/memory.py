"""How much memory is free right now, and what running out of it looks like."""

import os
from pathlib import Path

import torch

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed", "not enough memory")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a new allocation on `device` can count on; None where the system does not tell."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if device.type != "cpu":
        return None
    bounds = [_system(), _control_group(), _address_space()]
    return max(0, min(bound for bound in bounds if bound is not None)) if any(bounds) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def release(device: torch.device) -> None:
    """Give cached blocks back, so that the next, smaller attempt starts clean."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _fields(path: str) -> dict[str, int]:
    """The "name: number kB" lines of a file in /proc, in bytes; empty where there is none."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {w[0]: int(w[1]) * (1024 if w[2:] == ["kB"] else 1) for w in words if len(w) > 1 and w[1].isdecimal()}


def _system() -> int | None:
    available = _fields("/proc/meminfo").get("MemAvailable")
    if available is None and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available


def _control_group() -> int | None:
    """What the container or batch system still grants (cgroup version 2, then 1)."""
    for folder, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, used = ((Path(folder) / name).read_text(encoding="ascii").strip() for name in (limit, usage))
        except OSError:
            continue
        if most.isdecimal() and used.isdecimal():
            return int(most) - int(used) + _fields(f"{folder}/memory.stat").get("inactive_file", 0)
    return None


def _address_space() -> int | None:
    """What `ulimit -v` leaves."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _fields("/proc/self/status").get("VmSize")
    return None if most == resource.RLIM_INFINITY or used is None else most - used
