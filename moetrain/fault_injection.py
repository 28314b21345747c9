"""Fault points: places in a save where tests kill the process or simulate a full disk. Elsewhere they do nothing.

``MOETRAIN_FAULT`` holds the faults, separated by ``;``. ``KILL:N`` sends the process SIGKILL at the N-th fault point it
reaches, and likewise ``TERM:N`` and ``INT:N``. ``full:N:M`` raises a full disk's error at the N-th point and the M - 1
after it. ``trace:FILE`` appends each point's name to FILE. With a prefix (``KILL:2:rename``) only the points whose name
starts with it count.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Inject a test's fault, if any, after the write, fsync or rename that ``name`` describes.

    Raises:
        OSError: no space left on device, where a test asks for it.
    """
    faults = os.environ.get("MOETRAIN_FAULT")
    for fault in faults.split(";") if faults else ():
        _inject(fault, name)


def _inject(fault: str, name: str) -> None:
    kind, _, rest = fault.partition(":")
    if kind == "trace":
        with open(rest, "a", encoding="utf-8") as file:
            file.write(name + "\n")
        return
    first, _, rest = rest.partition(":")
    count, _, prefix = rest.partition(":") if kind == "full" else ("1", "", rest)
    if not name.startswith(prefix):
        return
    _passed[fault] += 1
    if not int(first) <= _passed[fault] < int(first) + int(count):
        return
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    os.kill(os.getpid(), signal.Signals[f"SIG{kind}"])
