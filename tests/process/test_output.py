"""Tables: side by side where there is room, one below the other where there is not, plain where nobody looks."""

from __future__ import annotations

import pytest

from fedpeft.process import output

COLUMNS = ("RUN", "NAME", "VERSION")
ROWS = [("run-0123456789ab", "[red]emoji", 12), ("run-0123456789ac", "", 3)]


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, width: int) -> str:
    monkeypatch.setattr(output, "is_terminal", lambda: terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    output.say_table(COLUMNS, ROWS, right=("VERSION",))
    return "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(("terminal", "width"), [(False, 20), (True, 80)])
def test_a_row_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, width: int
) -> None:
    assert shown(monkeypatch, capsys, terminal, width).split("\n") == [
        "RUN               NAME        VERSION",
        "run-0123456789ab  [red]emoji       12",
        "run-0123456789ac                    3",
    ]


def test_a_narrow_terminal_gets_a_cell_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(monkeypatch, capsys, True, 30).split("\n") == [
        "RUN      run-0123456789ab",
        "NAME     [red]emoji",
        "VERSION  12",
        "",
        "RUN      run-0123456789ac",
        "NAME",
        "VERSION  3",
    ]
