"""Does what a page tells its reader to do, and compares what happens with what the page shows.

A fenced block means:

- with a title that is a path: the file of that name, written where the reader would write it;
- ```console with a title "Terminal ...": commands that stay, each started in the background; what is shown below one
  is waited for;
- ```console: commands that end, run in order; what is shown below one is compared, standard error included;
- anything else is not for doing.

Shown lines must come in the order shown. `...` stands for any lines, or inside a line for any text. Figures with a
decimal point may differ, because they depend on the machine; the rest may not. The first id of a run that comes stands
for the one that is shown.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..ports import free_port

WAIT_S = 120.0
"""Longest wait for a command, or for what one in the background is to say."""

FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)
RUN_ID = re.compile(r"run-[0-9a-z]{12}")
DECIMAL = re.compile(r"(?<![\d.])\d[\d,]*\.\d+(?![\d.])")
TIME = re.compile(r"^\d{4}-\d{2}-\d{2}T[\d:.]+Z ")
ADDRESSES = ("127.0.0.1:7070", "127.0.0.1:9464")


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    title: str
    text: str


class Step(NamedTuple):
    """A command and the lines that the page shows below it."""

    command: str
    shown: list[str]


def blocks(page: str) -> list[Block]:
    return [Block(m[1], m[2] or "", m[3]) for m in FENCE.finditer(page)]


def steps(text: str) -> Iterator[Step]:
    """Yields the commands of a console block; a backslash at a line's end goes on with the next one."""
    step: Step | None = None
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            if step is not None:
                yield step
            step = Step(line.removeprefix("$ "), [])
        else:
            assert step is not None, f"{line!r} is shown before any command"
            step.shown.append(line)
    if step is not None:
        yield step


def pattern(line: str) -> re.Pattern[str]:
    """Returns what a line of output must look like to be the one shown."""
    parts = []
    for part in re.split(r"\.\.\.", line):
        plain = DECIMAL.sub("0.0", RUN_ID.sub("run-0", part))
        parts.append(r"\s+".join(re.escape(word) for word in re.split(r"\s+", plain)))
    return re.compile(".*".join(parts))


def plain(line: str) -> str:
    """Returns a line of output without what differs from day to day."""
    return DECIMAL.sub("0.0", RUN_ID.sub("run-0", TIME.sub("", line.rstrip())))


def missing(shown: list[str], output: str) -> str | None:
    """Returns the first line shown that does not come, in order, or nothing if all do."""
    lines, at, skip = [plain(line) for line in output.splitlines()], 0, True
    for line in shown:
        if line.strip() == "...":
            skip = True
            continue
        wanted = pattern(line.rstrip())
        found = next((i for i in range(at, len(lines)) if wanted.fullmatch(lines[i])), None)
        if found is None or (not skip and found != at):
            return line
        at, skip = found + 1, False
    return None


class Walkthrough:
    """A reader at work in a folder of its own, which looks like a checkout as far as the page needs one."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self._addresses = {address: f"127.0.0.1:{free_port()}" for address in ADDRESSES}
        self._runs: dict[str, str] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        self._root = root
        (folder / "experiments").symlink_to(root / "experiments")
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("FEDPEFT_", "XDG_"))},
            "HOME": str(folder),  # who walks a page is not enrolled anywhere
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join((str(folder / "common"), os.environ.get("PYTHONPATH", ""))),
            "FEDPEFT_SERVER": self._addresses[ADDRESSES[0]],
            "FEDPEFT_SERVER_LOG_FORMAT": "console",
            "FEDPEFT_CLIENT_LOG_FORMAT": "console",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "NO_COLOR": "1",
        }

    def _link_library(self) -> None:
        """Links every file of the library, so that the reader may add one beside them."""
        for path in sorted((self._root / "common" / "fedpeft").rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                link = self.folder / path.relative_to(self._root)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)

    def follow(self, page: str) -> int:
        """Does all that the page says; returns how many commands that were."""
        commands, found = 0, blocks(page)
        if any(block.title.startswith("common/") for block in found):
            self._link_library()
        for block in found:
            if block.language == "console":
                for step in steps(block.text):
                    (self._stay if block.title.startswith("Terminal") else self._run)(step)
                    commands += 1
            elif block.title:
                self._write(block)
        return commands

    def close(self) -> None:
        """Ends what is still running."""
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            process.wait(WAIT_S)

    def _here(self, text: str) -> str:
        """Puts the addresses and run ids of this walk in place of those of the page."""
        port = self._addresses[ADDRESSES[0]].rpartition(":")[2]
        for of_page, of_walk in {**self._addresses, "--port 7070": f"--port {port}", **self._runs}.items():
            text = text.replace(of_page, of_walk)
        return text

    def _write(self, block: Block) -> None:
        path = self.folder / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.is_symlink(), f"{block.title} is a file of the library, which a page may not write over"
        path.write_text(self._here(block.text), encoding="utf-8")

    def _run(self, step: Step) -> None:
        done = subprocess.run(
            ["bash", "-c", self._here(step.command)],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT_S,
        )
        self._remember(step.shown, done.stdout)
        lacking = missing(self._lines(step), done.stdout)
        assert lacking is None, (
            f"$ {step.command}\nthe page shows: {lacking}\nbut this came:\n{done.stdout}{self._logs()}"
        )

    def _stay(self, step: Step) -> None:
        log = self.folder / f"terminal-{len(self._started) + 1}.log"
        with log.open("wb") as out:
            command = shlex.split(self._here(step.command))
            process = subprocess.Popen(command, cwd=self.folder, env=self._environment, stdout=out, stderr=out)
        self._started.append(process)
        until = time.monotonic() + WAIT_S
        while (lacking := missing(self._lines(step), log.read_text(encoding="utf-8"))) is not None:
            ended = process.poll() is not None
            assert not ended and time.monotonic() < until, f"$ {step.command}\nnever said: {lacking}\n{self._logs()}"
            time.sleep(0.05)

    def _lines(self, step: Step) -> list[str]:
        return [self._here(line) for line in step.shown]

    def _remember(self, shown: list[str], output: str) -> None:
        """Pairs the first ids of runs that came with those that are shown."""
        ids = dict.fromkeys(RUN_ID.findall("\n".join(shown)))
        came = dict.fromkeys(RUN_ID.findall(output))
        for of_page, of_walk in zip((i for i in ids if i not in self._runs), came, strict=False):
            self._runs[of_page] = of_walk

    def _logs(self) -> str:
        logs = sorted(self.folder.glob("terminal-*.log"))
        return "".join(f"\n--- {log.name}\n{log.read_text(encoding='utf-8')[-2000:]}" for log in logs)
