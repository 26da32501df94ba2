"""Measures the free memory of a device, or of the machine within the limits of its container, and gives memory back."""

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

# cgroup version -> (limit, usage, key of the reclaimable page cache in memory.stat).
CGROUPS = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated on a device now; None if the system does not report them.

    On a CPU this is the minimum of the machine's available memory and the remaining memory of every control group of
    this process, such as a container's.

    Args:
        device: that computes.
        root: of the file system with proc and sys.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return least(_available(root / "proc/meminfo"), *(_left(folder, version) for folder, version in _groups(root)))


def least(*limits: int | None) -> int | None:
    """The smallest limit; None is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def give_back() -> None:
    """Return freed memory to the system and to the device: allocators keep it, glibc in blocks of up to 32 MB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def _available(meminfo: Path) -> int | None:
    """Available memory of the machine in bytes; None if the file cannot be read."""
    try:
        lines = meminfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1:2] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][0]) * 1024 if found and found[0] and found[0][0].isdecimal() else None


def _groups(root: Path) -> list[tuple[Path, int]]:
    """The folder and cgroup version of every memory control group of this process, innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = mount / path.lstrip("/")
        # With a cgroup namespace of its own a container may lack this path; its group is then the mount itself.
        found += [(one, version) for one in (folder, *folder.parents) if one == mount or mount in one.parents]
    return found


def _left(folder: Path, version: int) -> int | None:
    """Bytes that a control group can still allocate; None without a limit."""
    limit_file, usage_file, cache_key = CGROUPS[version]
    try:
        limit = (folder / limit_file).read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        usage = int((folder / usage_file).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    cache = next((int(line.split()[1]) for line in stat if line.startswith(f"{cache_key} ")), 0)
    return max(0, int(limit) - usage + cache)
