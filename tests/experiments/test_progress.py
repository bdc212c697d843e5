import io

from normkit.experiments import progress as progresses
from normkit.experiments.progress import PlainProgress, RichProgress, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_now_and_then_with_the_time_left(monkeypatch):
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progresses.time, "monotonic", lambda: now[0])
    shown = PlainProgress(stream, every=15)
    shown.start(10, "begin")
    for _ in range(10):
        now[0] += 5
        shown.advance("a trial")
    shown.stop()
    assert stream.getvalue().splitlines() == [
        "begin",
        "3 of 10 trials, about 35 s left",
        "6 of 10 trials, about 20 s left",
        "9 of 10 trials, about 5 s left",
        "10 trials in 50 s",
    ]


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    shown = progress(stream)
    assert isinstance(shown, RichProgress)
    shown.start(2, "begin")
    shown.advance("a trial")
    shown.advance("another")
    shown.stop()
    assert "begin" in stream.getvalue()
    assert "2/2" in stream.getvalue()


def test_everything_else_gets_plain_lines():
    assert isinstance(progress(io.StringIO()), PlainProgress)


def test_what_was_kept_from_before_does_not_flatter_the_time_left(monkeypatch):
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progresses.time, "monotonic", lambda: now[0])
    shown = PlainProgress(stream, every=15)
    shown.start(10, "begin", 6)
    for _ in range(4):
        now[0] += 10
        shown.advance("a trial")
    assert stream.getvalue().splitlines() == ["begin", "8 of 10 trials, about 20 s left", "4 trials in 40 s"]
