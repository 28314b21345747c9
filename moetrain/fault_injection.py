"""Fault points: places in a save where a test ends the process or fills its disk. In every other run they do nothing.

``MOETRAIN_FAULT`` switches faults on, several with ``;`` between them. ``KILL:N`` sends the process SIGKILL at the N-th
point that it comes to, and likewise ``TERM:N`` and ``INT:N``; ``full:N:M`` lets the N-th point and the M - 1 after it
fail as a full disk does; ``trace:FILE`` writes each point's name into FILE. A name behind it (``KILL:2:rename``) counts
the points alone whose name begins so.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """What a test has asked to happen here: after the write, fsync or rename that ``name`` says was just done.

    Raises:
        OSError: no space left on device, where a test has asked for it.
    """
    asked = os.environ.get("MOETRAIN_FAULT")
    for fault in asked.split(";") if asked else ():
        _happen(fault, name)


def _happen(fault: str, name: str) -> None:
    what, _, rest = fault.partition(":")
    if what == "trace":
        with open(rest, "a", encoding="utf-8") as file:
            file.write(name + "\n")
        return
    first, _, rest = rest.partition(":")
    count, _, prefix = rest.partition(":") if what == "full" else ("1", "", rest)
    if not name.startswith(prefix):
        return
    _passed[fault] += 1
    if not int(first) <= _passed[fault] < int(first) + int(count):
        return
    if what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    os.kill(os.getpid(), signal.Signals[f"SIG{what}"])
