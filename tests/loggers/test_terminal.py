from moetrain.loggers import terminal
from moetrain.loggers.terminal import Terminal


def test_without_a_live_display_preparing_says_now_and_then_how_long_it_will_take(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    shown = Terminal()
    for seconds, done in ((0, 0), (4, 100), (11, 250), (15, 300), (30, 600), (31, 1000)):
        clock[0] = 100.0 + seconds
        shown.preparing("tokenizing", done, 1000)
    shown.preparing("joining", 0, None)
    assert capsys.readouterr().out.splitlines() == [
        "tokenizing",
        "tokenizing: 25%, about 33 s left",
        "tokenizing: 60%, about 20 s left",
        "joining",
    ]
