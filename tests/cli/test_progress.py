import io

import pytest

from zoo.cli import progress
from zoo.cli.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_every_ten_seconds_with_the_time_left(clock):
    stream = io.StringIO()
    with Progress("images", 10, stream=stream) as bar:
        for second in range(0, 35):
            clock[0] = float(second)
            bar.update(second / 4, note="cat.png")
    assert stream.getvalue().splitlines() == [
        "cat.png: 2.5 of 10 images, 00:10 gone, about 00:30 left",
        "cat.png: 5 of 10 images, 00:20 gone, about 00:20 left",
        "cat.png: 7.5 of 10 images, 00:30 gone, about 00:10 left",
    ]


def test_hours_are_shown_and_nothing_done_gives_no_forecast(clock):
    stream = io.StringIO()
    with Progress("tiles", 4, stream=stream) as bar:
        clock[0] = 15.0
        bar.update(0)
        clock[0] = 3700.0
        bar.update(1, 2)
    assert stream.getvalue().splitlines() == [
        "0 of 4 tiles, 00:15 gone",
        "1 of 2 tiles, 1:01:40 gone, about 1:01:40 left",
    ]


def test_a_terminal_gets_a_bar_that_follows_a_new_total():
    stream = Terminal()
    with Progress("tiles", 1, stream=stream) as bar:
        bar.update(0, 8, note="cat.png")
        bar.update(4, 8)
        bar.say("a remark")
        bar.bar.refresh()
    shown = stream.getvalue()
    assert "4/8 tiles" in shown
    assert "a remark\n" in shown


def test_quiet_shows_nothing_but_remarks(clock):
    stream = io.StringIO()
    with Progress("images", 2, quiet=True, stream=stream) as bar:
        clock[0] = 60.0
        bar.update(1)
        bar.say("zoo: a.png: damaged")
    assert stream.getvalue() == "zoo: a.png: damaged\n"
