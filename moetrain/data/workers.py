"""Functions run in several processes, each a fresh interpreter that imports nothing of the caller's own script.

`multiprocessing` would import the script again in each of them (here torch and all), or fork a process with threads.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from moetrain.data.errors import DataError

Tell = Callable[[int], None]
"""Told how far a task is, in a measure of its own."""


def available_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    workers: int,
    tell: Callable[[int, int], None],
    finished: Callable[[int, Any], None],
) -> None:
    """Call ``function(*task, tell)`` for each task, in this process where ``workers`` is 1.

    Args:
        function: of a module, so that another process can import it; what it takes and returns is pickled.
        tell: called with a task's number and how far it is.
        finished: called with a task's number and its result, in the order in which they come.

    Raises whatever a task raises, and DataError where a process dies.
    """
    if min(workers, len(tasks)) <= 1:
        for number, task in enumerate(tasks):
            finished(number, function(*task, lambda done, number=number: tell(number, done)))
        return
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(tasks)):
        waiting.put(number)
    messages: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
    processes = [_start() for _ in range(min(workers, len(tasks)))]
    threads = [
        threading.Thread(target=_attend, args=(process, function, tasks, waiting, messages), daemon=True)
        for process in processes
    ]
    try:
        for thread in threads:
            thread.start()
        left = len(tasks)
        while left:
            number, kind, value = messages.get()
            if kind == "far":
                tell(number, value)
            elif kind == "done":
                finished(number, value)
                left -= 1
            else:
                raise value
    finally:
        for process in processes:
            process.kill()
        for process, thread in zip(processes, threads, strict=True):
            process.wait()
            if thread.ident is not None:
                thread.join()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # Each process has a core of its own; the tokenizers library would start threads on all of them.
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", "from moetrain.data.workers import serve; serve()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _attend(
    process: subprocess.Popen[bytes],
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    waiting: queue.SimpleQueue[int],
    messages: queue.SimpleQueue[tuple[int, str, Any]],
) -> None:
    """Give a process one task after another, and pass on what it says."""
    assert process.stdin is not None
    assert process.stdout is not None
    while True:
        try:
            number = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            pickle.dump((function, tasks[number]), process.stdin)
            process.stdin.flush()
            kind = "far"
            while kind == "far":
                kind, value = pickle.load(process.stdout)
                messages.put((number, kind, value))
        except (EOFError, OSError, pickle.UnpicklingError):
            messages.put((number, "failed", _died(process)))
            return
        if kind == "failed":
            return


def _died(process: subprocess.Popen[bytes]) -> DataError:
    status = process.wait()
    return DataError(
        f"a process that prepares data ended with status {status}: if memory was short, lower data.workers; "
        "what is ready stays, run the same command again"
    )


def serve() -> None:
    """Do what comes in, until the process that sends it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends its workers
    tasks, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    try:
        while True:
            function, task = pickle.load(tasks)
            _answer(answers, *_outcome(function, task, lambda done: _answer(answers, "far", done)))
    except (EOFError, BrokenPipeError):
        os._exit(0)


def _outcome(function: Callable[..., Any], task: tuple[Any, ...], tell: Tell) -> tuple[str, Any]:
    try:
        return "done", function(*task, tell)
    except BrokenPipeError:
        raise
    except DataError as error:
        return "failed", error
    except Exception:
        return "failed", RuntimeError(f"a process that prepares data failed:\n{traceback.format_exc()}")


def _answer(answers: Any, kind: str, value: Any) -> None:
    pickle.dump((kind, value), answers)
    answers.flush()
