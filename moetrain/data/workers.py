"""Run functions in worker processes. Each is a fresh interpreter that does not import the caller's script.

`multiprocessing` and `ProcessPoolExecutor` import the script again in every worker, torch included, or fork a process
that has threads; and their workers live on if the parent is killed. Here a worker ends when its input pipe closes.
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
from typing import Any, Literal

from moetrain.data.errors import DataError

OnProgress = Callable[[int], None]
"""Called by a task with how far it is, in units of its own."""

_Kind = Literal["progress", "done", "failed"]


def available_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    workers: int,
    on_progress: Callable[[int, int], None],
    on_done: Callable[[int, Any], None],
) -> None:
    """Call ``function(*task, on_progress)`` for each task; in this process if ``workers`` is 1.

    Args:
        function: importable from a module; its arguments and results are pickled.
        on_progress: called with the number of a task and how far it is.
        on_done: called with the number of a task and its result, in order of completion.

    Raises:
        DataError: a task raised it, or a worker process died.
        RuntimeError: a task in a worker process raised another exception; the message holds its traceback.
    """
    if min(workers, len(tasks)) <= 1:
        for number, task in enumerate(tasks):
            on_done(number, function(*task, lambda done, number=number: on_progress(number, done)))
        return
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(tasks)):
        waiting.put(number)
    messages: queue.SimpleQueue[tuple[int, _Kind, Any]] = queue.SimpleQueue()
    processes = [_start_worker() for _ in range(min(workers, len(tasks)))]
    threads = [
        threading.Thread(target=_feed_worker, args=(process, function, tasks, waiting, messages), daemon=True)
        for process in processes
    ]
    try:
        for thread in threads:
            thread.start()
        unfinished = len(tasks)
        while unfinished:
            number, kind, value = messages.get()
            if kind == "progress":
                on_progress(number, value)
            elif kind == "done":
                on_done(number, value)
                unfinished -= 1
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


def _start_worker() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # There is a worker per core already: without this the tokenizers library would start a thread per core in each.
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", "from moetrain.data.workers import serve; serve()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _feed_worker(
    process: subprocess.Popen[bytes],
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    waiting: queue.SimpleQueue[int],
    messages: queue.SimpleQueue[tuple[int, _Kind, Any]],
) -> None:
    """Send a worker one task after another and forward its messages."""
    assert process.stdin is not None
    assert process.stdout is not None
    kind: _Kind
    while True:
        try:
            number = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            pickle.dump((function, tasks[number]), process.stdin)
            process.stdin.flush()
            kind = "progress"
            while kind == "progress":
                kind, value = pickle.load(process.stdout)
                messages.put((number, kind, value))
        except (EOFError, OSError, pickle.UnpicklingError):
            messages.put((number, "failed", _worker_died(process)))
            return
        if kind == "failed":
            return


def _worker_died(process: subprocess.Popen[bytes]) -> DataError:
    status = process.wait()
    return DataError(
        f"a process that prepares data ended with status {status}: if memory was short, lower data.workers; "
        "what is finished is kept, run the same command again"
    )


def serve() -> None:
    """Main loop of a worker: run the tasks that arrive on stdin until the parent closes it or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and ends its workers
    tasks, messages = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints goes to stderr, not between the messages
    try:
        while True:
            function, task = pickle.load(tasks)
            _send(messages, *_run_task(function, task, lambda done: _send(messages, "progress", done)))
    except (EOFError, BrokenPipeError):
        os._exit(0)


def _run_task(function: Callable[..., Any], task: tuple[Any, ...], on_progress: OnProgress) -> tuple[_Kind, Any]:
    try:
        return "done", function(*task, on_progress)
    except BrokenPipeError:
        raise
    except DataError as error:
        return "failed", error
    except Exception:
        return "failed", RuntimeError(f"a process that prepares data failed:\n{traceback.format_exc()}")


def _send(messages: Any, kind: _Kind, value: Any) -> None:
    pickle.dump((kind, value), messages)
    messages.flush()
