"""Start and end of the commands: nothing heavy is imported before it is needed, and every end is orderly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedpeft_operator.app import main
from fedpeft_operator.cli.exit_codes import Exit

from ..operator_double import Double, a_run, serving

HEAVY = ("torch", "timm", "peft", "torchvision", "pyarrow", "matplotlib")
PAGE = (Path(__file__).resolve().parents[3] / "docs" / "errors.md").read_text(encoding="utf-8")


def run(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    start = ["-c", code, *arguments] if code else ["-m", "fedpeft_operator.app", *arguments]
    return subprocess.run(
        [sys.executable, *start], capture_output=True, text=True, timeout=100, env={**os.environ, **environment}
    )


IMPORTED = (
    "import atexit, json, sys\n"
    "atexit.register(lambda: print(json.dumps(sorted(m for m in sys.modules if '.' not in m)), file=sys.stderr))\n"
    "from fedpeft_operator.app import main\n"
    "main(sys.argv[1:])\n"
)


@pytest.mark.parametrize("command", ["--help", "version", "run --help", "run list", "client list", "demo --help"])
def test_nothing_heavy_is_imported_for_a_light_command(command: str) -> None:
    with serving(Double()) as served:
        served.double.runs = {"run-0123456789ab": a_run()}
        ended = run("--server", served.address, *command.split(), code=IMPORTED)
    assert ended.returncode == 0, ended.stderr
    modules = set(json.loads(ended.stderr.splitlines()[-1]))
    assert not modules & set(HEAVY)
    assert "structlog" not in modules
    assert "list" in command or not modules & {"grpc", "numpy"}


@pytest.mark.parametrize("program", ["fedpeft_server.__main__", "fedpeft_client.__main__"])
def test_the_help_of_the_processes_imports_no_torch(program: str) -> None:
    code = f"import sys; sys.argv = ['x', '--help']\nfrom {program} import main\ntry:\n    main()\nfinally:\n    " + (
        f"assert not {set(HEAVY)!r} & set(sys.modules)"
    )
    ended = run(code=code)
    assert (ended.returncode, ended.stderr) == (0, "")


def commands() -> list[list[str]]:
    import typer

    from fedpeft_operator.app import app

    def below(command: object, way: list[str]) -> list[list[str]]:
        inner = getattr(command, "commands", {})
        return [way, *(found for name, each in inner.items() for found in below(each, [*way, name]))]

    return below(typer.main.get_command(app), [])


@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("way", commands(), ids=" ".join)
def test_help_fits_a_narrow_dumb_terminal(way: list[str]) -> None:
    ended = run(*way, "--help", COLUMNS="40", TERM="dumb", NO_COLOR="1")
    assert ended.returncode == 0
    assert "\x1b" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 40


@pytest.mark.parametrize(
    "way", ["params", "partition", "simulate", "demo", "run create", "run watch", "run export", "run verify"]
)
def test_help_of_what_makes_or_takes_something_has_an_example(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*way.split(), "--help"])
    assert re.search(r"Examples?:\s+\$ fedpeft", capsys.readouterr().out)


def test_shell_completion_completes() -> None:
    words = {"COMP_WORDS": "fedpeft run cr", "COMP_CWORD": "2"}
    ended = run(code="from fedpeft_operator.app import main; main()", _FEDPEFT_COMPLETE="complete_bash", **words)
    assert ended.stdout.split() == ["create"]


PRINTED = [
    ("fedpeft_operator", "fedpeft", ["version"]),
    ("fedpeft_operator", "fedpeft", ["run", "--help"]),
    ("fedpeft_operator", "fedpeft", ["--version"]),
    ("fedpeft_client", "fedpeft-client", ["--help"]),
    ("fedpeft_client", "fedpeft-client", ["--version"]),
    ("fedpeft_client", "fedpeft-client", ["ledger", "--help"]),
    ("fedpeft_server", "fedpeft-server", ["--help"]),
    ("fedpeft_server", "fedpeft-server", ["--print-completion", "bash"]),
    ("fedpeft_server", "fedpeft-server", ["init", "--help"]),
]


def started(package: str, arguments: list[str | bytes], redirection: str = "", **streams: Any) -> tuple[int, str]:
    code = f"from {package}.start import main; main()"
    shell = ["bash", "-c", f'exec "$@" {redirection}', "bash"] if redirection else []
    command = [*shell, sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, timeout=100, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams})
    return ended.returncode, (ended.stderr or b"").decode()


@pytest.mark.parametrize(("package", "program", "arguments"), PRINTED)
def test_output_that_cannot_be_written_is_one_sentence(package: str, program: str, arguments: list[str]) -> None:
    said = f"{program}: standard output cannot be written: "
    for unbuffered in ("", "1"):  # nothing is kept of what a stream without a buffer refused
        full = started(package, [*arguments], ">/dev/full", env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
        assert full == (Exit.FAILED, f"{said}No space left on device\n")
    none = started(package, [*arguments], ">&-")
    assert none == (Exit.FAILED, f"{said}Bad file descriptor\n")


@pytest.mark.parametrize(("package", "program", "arguments"), PRINTED)
def test_nobody_reads_what_is_printed(package: str, program: str, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert started(package, [*arguments], stdout=writing) == (141, "")
    os.close(writing)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("fedpeft_operator", ["run", "create", "/absent.toml"]),
        ("fedpeft_client", ["--threads", "0"]),
        ("fedpeft_server", ["--max-transfers", "0"]),
    ],
)
def test_the_exit_code_is_the_same_where_no_error_can_be_written(
    package: str, arguments: list[str], redirection: str
) -> None:
    assert started(package, [*arguments], redirection)[0] == Exit.USAGE


@pytest.mark.parametrize(
    ("arguments", "which"),
    [
        (["run", "show", b"\xe9"], "an argument after 'show'"),
        (["run", "stop", "run-0123456789ab", "--reason", b"\xe9"], "--reason"),
        (["run", "stop", "run-0123456789ab", b"--reason=\xe9"], "--reason"),
        (["client", "revoke", b"\xe9"], "an argument after 'revoke'"),
        (["token", "delete", b"\xe9"], "an argument after 'delete'"),
    ],
)
def test_an_argument_that_is_not_utf8_is_named(arguments: list[str | bytes], which: str) -> None:
    with serving(Double()) as served:
        served.double.runs = {"run-0123456789ab": a_run()}
        ended = started("fedpeft_operator", ["--server", served.address, *arguments], stdin=subprocess.DEVNULL)
    assert ended == (Exit.USAGE, f"fedpeft: {which} is not UTF-8: '\\udce9'\n")


SLEEPS = (
    "import signal, sys, tempfile, time\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # ignored where the tests themselves run under nohup
    "from fedpeft_operator import app\n"
    "def sleep(**_):\n"
    "    with tempfile.TemporaryDirectory(dir=sys.argv[1]):\n"
    "        print('up', flush=True)\n"
    "        time.sleep(60)\n"
    "app.app.command('sleep')(lambda: sleep())\n"
    "app.main(['sleep'])\n"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_by_way_of_its_clean_up(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", SLEEPS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert "Traceback" not in process.stderr.read()
    assert not list(tmp_path.iterdir())


def test_the_page_has_every_exit_code() -> None:
    from fedpeft_client.error_policy import Exit as ClientExit

    section = PAGE.partition("## Exit codes")[2].partition("## ")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| \d.*\|$", section, re.M)]
    codes = {int(code): row for numbers, *row in rows for code in numbers.split(", ")}
    assert {code for code, row in codes.items() if row[0]} == {*Exit, 129, 141, 143}
    assert {code for code, row in codes.items() if row[1]} == {*ClientExit, 141}


@pytest.mark.parametrize("program", ["fedpeft_operator", "fedpeft_server", "fedpeft_client"])
def test_ctrl_c_while_a_command_is_imported_ends_it_without_a_traceback(program: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time; print('imports', flush=True); time.sleep(60)")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from fedpeft.process import start; begin = start.begin\n"
        f"start.begin = lambda module: begin('slow'); from {program}.start import main; main()"
    )
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **streams) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"imports\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("partition", "", "--clients", "2", "--out", "x"), "an argument is empty, after 'partition'"),
        (("simulate", "run.toml", "--data", "", "--out", "x"), "--data is empty"),
        (("",), "an argument is empty, after 'fedpeft'"),
    ],
)
def test_an_empty_argument_is_not_the_folder_here(arguments: tuple[str, ...], said: str) -> None:
    ended = run(*arguments)
    assert (ended.returncode, ended.stdout) == (Exit.USAGE, "")
    assert ended.stderr == f"fedpeft: {said}: a variable that is not set, perhaps\n"
