import signal

import torch

from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.signals import StopAgreement


def test_ranks_agree_on_a_signal_at_once_on_cpu_and_one_step_later_on_cuda(monkeypatch):
    others = iter([0, signal.SIGTERM, 0, 0] * 2 + [0, 0])
    monkeypatch.setattr(ParallelLayout, "all_reduce_max", lambda _, own: torch.tensor(max(own, next(others))))
    here = StopAgreement(ParallelLayout())
    assert [here.ask(None) for _ in range(4)] == [None, "SIGTERM", None, None]
    late = StopAgreement(ParallelLayout(device=torch.device("cuda")))
    assert [late.ask(None) for _ in range(4)] == [None, None, "SIGTERM", None]
    assert late.ask("SIGINT") is None
    assert late.ask(None) == "SIGINT"
