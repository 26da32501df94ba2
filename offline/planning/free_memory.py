"""Memory that a run can take now: the device's, or the machine's within the limits of its container."""

from pathlib import Path

import torch

# cgroup version -> (limit, usage, key of the reclaimable page cache in memory.stat).
CGROUPS = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can be taken on a device now; None where the system does not say.

    On a CPU that is the least of what the machine has available and what every control group around this process,
    such as a container's, still allows.

    Args:
        device: where to compute.
        root: of the file system that holds proc and sys.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _available(root / "proc/meminfo")
    limits = [free for folder, version in _groups(root) if (free := _left(folder, version)) is not None]
    if available is not None:
        limits.append(available)
    return min(limits, default=None)


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else None


def _groups(root: Path) -> list[tuple[Path, int]]:
    """The memory control groups that this process is in, innermost first, with their version."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = mount / path.lstrip("/")
        # In a container with its own name space the path may be another one's: its own group is the mount itself.
        found += [(one, version) for one in (folder, *folder.parents) if one == mount or mount in one.parents]
    return found


def _left(folder: Path, version: int) -> int | None:
    """Bytes that a control group still allows; None without a limit."""
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
