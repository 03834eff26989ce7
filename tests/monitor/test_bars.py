"""Without a terminal, progress is printed as plain lines."""

import io

from molmo2_jax.monitor import bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_progress_is_lines_at_intervals_and_at_the_end(monkeypatch):
    monkeypatch.setattr(bars, "_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "10")
    out = io.StringIO()
    bar = bars.bar(total=3, unit="step", desc="training", file=out)
    for step in range(3):
        bar.set_postfix_str(f"loss {step}.000", refresh=False)
        bar.update(1)
    bar.close()
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue() and len(lines) == 4
    assert lines[0].startswith("training: 0/3 step [") and lines[3].startswith("training: 3/3 step [")
    assert "loss 2.000" in lines[3]


def test_lines_are_printed_at_intervals(monkeypatch):
    monkeypatch.setattr(bars, "_SECONDS", 1e6)
    out = io.StringIO()
    assert list(bars.bar(range(1000), file=out)) == list(range(1000))
    assert [line.partition(" ")[0] for line in out.getvalue().splitlines()] == ["0/1000", "1000/1000"]


def test_a_terminal_gets_a_bar_and_a_disabled_one_prints_nothing():
    terminal, out = Terminal(), io.StringIO()
    list(bars.bar(range(2), file=terminal))
    assert "\r" in terminal.getvalue()
    list(bars.bar(range(2), file=out, disable=True))
    assert not out.getvalue()
