"""How much memory a process can still take."""

from __future__ import annotations

from pathlib import Path

_SYSTEM = Path("/proc/meminfo")
# By versions 2 and 1 of cgroups, these tell the limit of the process's container, its use, and the statistics of its
# use with the name of what can be given back.
_CONTAINERS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_memory(groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The bytes that the system and the container can give without swapping, or None if neither says.

    Args:
        groups: where the kernel shows the container's limits.
    """
    found = []
    system = _field(_SYSTEM, "MemAvailable:")
    if system is not None:
        found.append(1024 * system)
    for limit, used, statistics, reclaimable in _CONTAINERS:
        try:
            free = int((groups / limit).read_text()) - int((groups / used).read_text())
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
        found.append(max(0, free + (_field(groups / statistics, reclaimable) or 0)))
    return min(found, default=None)


def _field(path: Path, name: str) -> int | None:
    """The number that follows a name at the beginning of a line of a file; None if there is no such line or file."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
