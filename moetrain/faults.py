"""Fault points: places in a save where a test ends the process or fills its disk. In every other run they do nothing.

``MOETRAIN_FAULT`` switches one on: ``kill:N`` ends the process, as ``kill -9`` does, at the N-th point it comes to;
``full:N:M`` lets N-th point and the M - 1 after it fail as a full disk does; ``trace:FILE`` writes each point's name
into FILE. A name behind it (``kill:2:rename``) counts the points alone whose name begins so.
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
    if asked is None:
        return
    what, _, rest = asked.partition(":")
    if what == "trace":
        with open(rest, "a", encoding="utf-8") as file:
            file.write(name + "\n")
        return
    first, _, rest = rest.partition(":")
    count, _, prefix = rest.partition(":") if what == "full" else ("1", "", rest)
    if not name.startswith(prefix):
        return
    _passed[asked] += 1
    if not int(first) <= _passed[asked] < int(first) + int(count):
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
