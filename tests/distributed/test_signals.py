import hashlib
import os
import signal
import threading
import time

import pytest
import torch

from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.signals import SignalNotice, StopAgreement, StopSignals


def test_ranks_agree_on_a_signal_at_once_on_cpu_and_one_step_later_on_cuda(monkeypatch):
    others = iter([0, signal.SIGTERM, 0, 0] * 2 + [0, 0])
    monkeypatch.setattr(ParallelLayout, "all_reduce_max", lambda _, own: torch.tensor(max(own, next(others))))
    here = StopAgreement(ParallelLayout())
    assert [here.ask(None) for _ in range(4)] == [None, "SIGTERM", None, None]
    late = StopAgreement(ParallelLayout(device=torch.device("cuda")))
    assert [late.ask(None) for _ in range(4)] == [None, None, "SIGTERM", None]
    assert late.ask("SIGINT") is None
    assert late.ask(None) == "SIGINT"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_is_noticed_at_once_though_the_main_thread_is_in_c_code(name):
    said = []
    with (
        StopSignals() as stop,
        SignalNotice(lambda line: said.append((line, stop.received, time.monotonic())), lambda: "step 3"),
    ):
        sent = threading.Timer(0.1, os.kill, (os.getpid(), getattr(signal, name)))
        sent.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # nothing in the main thread can act on a signal meanwhile
        end = time.monotonic()
        sent.join()
        assert stop.received == name
    ((line, received, at),) = said
    assert line == f"{name} received; waiting for: step 3"
    assert received is None
    assert at < end - 0.2


def test_only_signals_that_end_a_run_are_noticed_and_only_meanwhile():
    said = []
    # A job in the background of a script ignores SIGINT.
    handlers = {signal.SIGUSR1: lambda *_: None, signal.SIGINT: signal.default_int_handler}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with SignalNotice(said.append, lambda: ""):
            signal.raise_signal(signal.SIGUSR1)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert said == ["SIGINT received"]
    assert signal.set_wakeup_fd(-1) == -1
