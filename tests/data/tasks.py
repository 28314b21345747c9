"""Tasks that the tests of `moetrain.data.workers` run in worker processes; imports little, so that they start fast."""

import os
import time

from moetrain.data.errors import DataError


def square(value, on_progress):
    print("what a library says on the standard output must not come between the answers")
    on_progress(value)
    return value * value


def fail(kind, on_progress):
    if kind == "data":
        raise DataError("no such thing")
    if kind == "die":
        os._exit(9)
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    time.sleep(60)
