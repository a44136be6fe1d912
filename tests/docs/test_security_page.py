"""docs/security.md: its commands are done, its table of roles is the server's, its sentences are really said."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedpeft.identity.subject import Role
from fedpeft_server.access.rights import RIGHTS

from ..ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("preloaded")]

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
WAIT_S = 90.0


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands(title: str) -> list[str]:
    """The commands of a section's console blocks."""
    found = re.findall(r"^```console\n(.*?)^```$", section(title), re.M | re.S)
    return [line.removeprefix("$ ") for block in found for line in block.splitlines()]


def rows(title: str) -> list[list[str]]:
    return [[c.strip() for c in r.strip("|").split("|")] for r in re.findall(r"^\|.*\|$", section(title), re.M)][2:]


class Reader:
    """Somebody who does what the page says, on one machine and on free ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "OMP_NUM_THREADS": "1",
        }
        generator = np.random.default_rng(0)
        for name in ("cat", "dog"):
            (folder / "photos" / name).mkdir(parents=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "photos" / name / "0.png")

    def here(self, command: str) -> str:
        """Returns a command for this machine: its name, its free port."""
        command = command.replace("fed.example.org:7070", f"localhost:{self.port}").replace(
            "fed.example.org", "localhost"
        )
        if command.startswith("fedpeft-server init"):
            command += f" --port {self.port}"
        return command.replace("0.0.0.0:7070", f"127.0.0.1:{self.port} --metrics ''")

    def do(self, command: str, code: int = 0) -> str:
        done = subprocess.run(
            ["bash", "-ec", self.here(command)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    @contextmanager
    def serving(self, command: str) -> Iterator[None]:
        """Runs a server until it is not needed any more."""
        with (self.folder / "server.log").open("ab") as log:
            line = f"exec {self.here(command)}"
            server = subprocess.Popen(
                ["bash", "-c", line], cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )
        try:
            until = time.monotonic() + WAIT_S
            while b"serving" not in (self.folder / "server.log").read_bytes():
                assert server.poll() is None and time.monotonic() < until, (self.folder / "server.log").read_text()
                time.sleep(0.05)
            yield
        finally:
            server.kill()
            server.wait()


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


def test_setting_up_locking_out_and_the_audit_log(reader: Reader) -> None:
    init, serve, token, enroll, dry_run = commands("Set up")
    reader.do(init)
    with reader.serving(serve.removesuffix(" &")):
        reader.do(token)
        said = reader.do(enroll)
        assert said.startswith("enrolled as client hospital-a at localhost:")
        assert "images" in reader.do(dry_run)
        (revoke,) = commands("Lock out")
        assert reader.do(revoke).startswith("client hospital-a is refused with any certificate since ")
        assert "were revoked" in reader.do("fedpeft --identity state/identity run list", code=1)
        show, export, verify = commands("The audit log")
        assert "laptop lost" in reader.do(show)
        reader.do(export)
        head = reader.do(verify).splitlines()[-1].removeprefix("head ")
        assert "and the one noted" in reader.do(f"fedpeft audit verify --file audit.jsonl --head {recorded(reader)}")
        assert "and the one noted" in reader.do(f"{verify} --head {head}")
        (by_hand,) = re.findall(r"`(sed .*?)`", section("The audit log"), re.S)
        digests = [line.split()[0] for line in reader.do(by_hand).splitlines()]
        assert digests == re.findall(r'"sha256":"(\w+)"}$', (reader.folder / "audit.jsonl").read_text(), re.M)


def recorded(reader: Reader) -> str:
    last = (reader.folder / "audit.jsonl").read_text().splitlines()[-1]
    number, digest = re.search(r'"number":(\d+)', last), re.search(r'"sha256":"(\w+)"}$', last)
    assert number and digest
    return f"{number[1]}:{digest[1]}"


def block(title: str) -> str:
    found = re.search(rf'^```bash title="{title}"\n(.*?)^```$', PAGE, re.M | re.S)
    assert found, title
    return found[1]


def test_an_authority_of_ones_own(reader: Reader) -> None:
    authority = block("authority").strip()
    init = authority.splitlines()[-1]
    reader.do(authority.removesuffix(init))
    reader.do(init)
    _, serve, token, enroll, _ = commands("Set up")
    with reader.serving(serve.removesuffix(" &")):
        reader.do(token)
        reader.do(enroll)
        issuer = reader.do("openssl x509 -in state/identity/certificate.pem -noout -issuer")
        assert "Clinic CA" in issuer


def test_an_authority_elsewhere(reader: Reader) -> None:
    authority = block("authority").strip()
    reader.do(authority.removesuffix(authority.splitlines()[-1]))
    reader.do("umask 077\n" + block("elsewhere"))
    _, serve, token, _, dry_run = commands("Set up")
    with reader.serving(serve.removesuffix(" &")):
        assert "images" in reader.do(dry_run)
        assert "client  hospital-a" in re.sub(r" +", "  ", reader.do("fedpeft --identity operator identity list"))
        refused = reader.do(token.replace("fedpeft ", "fedpeft --identity operator "), code=1)
        assert "this server does not have the authority's key" in refused
        reader.do("fedpeft --identity operator client revoke hospital-a")
        assert "were revoked" in reader.do("fedpeft --identity state/identity run list", code=1)
        issue = next(
            line for line in block("elsewhere").splitlines() if "client/hospital-a" in line and "issue" in line
        )
        again = f"umask 077\nsleep 1.1\n{block('elsewhere').partition('issue fed')[0]}{issue}"
        reader.do(again)
        assert "were revoked" in reader.do("fedpeft --identity state/identity run list", code=1)
        reader.do("fedpeft --identity operator identity restore hospital-a")
        assert "were revoked" in reader.do("fedpeft --identity state/identity run list", code=1)
        reader.do(again)
        assert "may be called by operator" in reader.do("fedpeft --identity state/identity run list", code=1)


def test_the_table_of_roles_is_the_servers() -> None:
    told: dict[str, set[Role]] = {}
    for _, calls, *cells in rows("Roles"):
        may = {role for role, cell in zip(Role, cells, strict=True) if cell == "yes"}
        assert set(cells) <= {"yes", ""}
        for call in calls.split(", "):
            assert call not in told, f"{call} stands twice"
            told[call] = may
    really = {name.rpartition("/")[2]: {role for role in may if role} for name, may in RIGHTS.items()}
    assert len(really) == len(RIGHTS), "two services have a call of one name: name the service in the table"
    assert told == really
    unnamed = {name.rpartition("/")[2] for name, may in RIGHTS.items() if None in may}
    assert unnamed == {"Enroll", "Check"}


def test_the_messages_are_those_that_are_said() -> None:
    files = [ROOT / "common/fedpeft" / f"{name}.py" for name in ("rpc/probe", "rpc/diagnosis", "identity/token")]
    sentences = [said for file in (*files, ROOT / "server/fedpeft_server/rpc/federation.py") for said in texts(file)]
    listed = [row[1].strip("`") for row in rows("What a message means")]
    assert len(listed) > 15
    unsaid = [text for text in listed if not any(fits(text, said) for said in sentences)]
    assert unsaid == []


def texts(file: Path) -> Iterator[str]:
    """Yields every text in a module, with an ellipsis for each value that is put in."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def fits(text: str, said: str) -> bool:
    return re.search(".*".join(re.escape(part) for part in text.split("…")), said, re.S) is not None
