"""Host memory that this process may still use: that of the machine, and of its control groups (containers, Slurm)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_LIMITS = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Names of limit and usage, by controller: of version 2, which names none, and of version 1."""


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that new allocations may use without swapping; None where the system does not say.

    Args:
        root: of the file system with ``proc`` and ``sys``.
    """
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    value = fields.get("MemAvailable")
    return None if value is None else min([int(value.split()[0]) * 1024, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes up to the limit of each control group of this process that has one; the cache of files is free to use."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in _LIMITS.keys() & set(controllers.split(",")):
            top = root / "sys/fs/cgroup" / controller
            group = top / path.lstrip("/")
            for each in (group, *group.parents[: len(group.parts) - len(top.parts)]):
                try:
                    limit, used = (int((each / name).read_text()) for name in _LIMITS[controller])
                    stat = dict(entry.split() for entry in (each / "memory.stat").read_text().splitlines())
                except (OSError, ValueError):  # no such group in this container, or no limit
                    continue
                total = "total_" if controller else ""  # with the groups below, as version 2 counts
                cached = sum(int(stat.get(f"{total}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield max(0, limit - used + cached)
