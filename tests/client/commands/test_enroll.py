"""`fedpeft-client enroll` as people start it, against an AccessService on real TLS sockets."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedpeft.errors import Draining, Internal
from fedpeft.identity import token_argument
from fedpeft.identity.authority import Authority
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role
from fedpeft.identity.token import EnrollmentToken
from fedpeft_client.egress.entries import FILE, Kind, Outcome, read
from fedpeft_client.state.state_dir import StateDirectory

from ...operator.access_double import Double, serving

pytestmark = pytest.mark.usefixtures("preloaded")


@pytest.fixture
async def double() -> AsyncIterator[Double]:
    async with serving(Double()) as made:
        yield made


async def begun(
    *arguments: str, stdin: int | None = asyncio.subprocess.PIPE, command: str = "enroll"
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedpeft_client", command, *arguments),
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(*arguments: str, stdin: str = "") -> tuple[int | None, str, str]:
    return await ended_as("enroll", *arguments, stdin=stdin)


async def ended_as(command: str, *arguments: str, stdin: str = "") -> tuple[int | None, str, str]:
    process = await begun(*arguments, command=command)
    out, err = await process.communicate(stdin.encode())
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("form", ["line", "-", "@FILE", "FILE"])
async def test_a_site_is_enrolled(double: Double, tmp_path: Path, form: str) -> None:
    line, state = double.token("hospital-a").encode(), tmp_path / "state"
    (tmp_path / "token").write_text(f"  {line}\n")
    file = str(tmp_path / "token")
    argument = {"line": line, "-": "-", "@FILE": f"@{file}", "FILE": file}[form]
    code, out, err = await ended(argument, "--state-dir", str(state), stdin=f"{line}\n" if form == "-" else "")
    assert (code, err) == (0, "")
    assert out.startswith(f"enrolled as client hospital-a at {double.server} until ")
    assert f"  fedpeft-client --state-dir {state} --data PATH\n" in out
    assert Identity.load(state / "identity").subject.name == "hospital-a"


async def test_what_was_sent_for_it_is_in_the_ledger(double: Double, tmp_path: Path) -> None:
    double.failures, token = [Internal("not now"), Draining("not now")], double.token()
    for code in (1, 0):
        assert (await ended(token.encode(), "--state-dir", str(tmp_path)))[0] == code
    first, *later = read(tmp_path / FILE).booked.values()
    assert {each.entry.kind for each in (first, *later)} == {Kind.ENROLMENT}
    assert [each.outcome for each in (first, *later)] == [Outcome.UNFINISHED, Outcome.UNFINISHED, Outcome.RECEIVED]
    assert first.server == double.enrollment
    assert sum(each.entry.wire_bytes for each in (first, *later)) == double.arrived_bytes
    assert token.encode().split(".")[4] not in (tmp_path / FILE).read_text(), "it is no place for a secret"
    _, out, _ = await ended_as("ledger", "--state-dir", str(tmp_path))
    assert "a signing request for a key made here, the token's secret, software fedpeft" in out


async def test_what_comes_next_depends_on_the_role(double: Double, tmp_path: Path) -> None:
    for role, said in (
        (Role.EVALUATOR, "--data PATH --evaluate"),
        (Role.OPERATOR, "for the commands of an operator; next:\n  fedpeft --identity"),
        (Role.VIEWER, "for the commands of a viewer; next:\n  fedpeft --identity"),
    ):
        (tmp_path / "token").write_text(double.token("x", role).encode())
        code, out, _ = await ended(f"@{tmp_path / 'token'}", "--state-dir", str(tmp_path / role))
        assert code == 0
        assert said in out


@pytest.mark.usefixtures("unforked")
async def test_no_command_line_has_the_token(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        token = EnrollmentToken.make(address, address, Authority.make("a federation").certificate)
        process = await begun(token.encode(), "--state-dir", str(tmp_path / "state"))
        silent.settimeout(30)
        caller, _ = await asyncio.to_thread(silent.accept)  # it is well under way, and waits for the server
        with caller:
            line = await asyncio.to_thread(Path(f"/proc/{process.pid}/cmdline").read_text)
            environment = await asyncio.to_thread(Path(f"/proc/{process.pid}/environ").read_text)
        process.kill()
        out, err = await process.communicate()
    words = line.rstrip("\0").split("\0")
    assert words[1:] == ["-m", "fedpeft_client", "enroll", "-", "--state-dir", str(tmp_path / "state")]
    secret = token.encode().split(".")[4]
    assert secret not in line + environment + out.decode() + err.decode()


async def test_a_terminal_is_asked_and_shows_nothing(double: Double, tmp_path: Path) -> None:
    line = double.token().encode()
    ours, theirs = pty.openpty()
    process = await begun("-", "--state-dir", str(tmp_path / "state"), stdin=theirs)
    assert process.stderr is not None
    assert await process.stderr.readuntil(b"shown): ") == b"token (it is not shown): "
    os.write(ours, line.encode() + b"\n")
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err
    assert line not in out.decode() + err.decode()
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("key", ["Ctrl-C", "Ctrl-D"])
async def test_a_prompt_that_is_left(tmp_path: Path, key: str) -> None:
    ours, theirs = pty.openpty()
    process = await begun("-", "--state-dir", str(tmp_path / "state"), stdin=theirs)
    assert process.stderr is not None
    await process.stderr.readuntil(b"shown): ")
    if key == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    else:
        os.write(ours, b"\x04")
    async with asyncio.timeout(60):
        _, err = await process.communicate()
    said = {
        "Ctrl-C": (130, f"fedpeft-client: {token_argument.LEFT}"),
        "Ctrl-D": (
            2,
            "fedpeft-client: the enrolment token is empty; make one and copy the whole line",
        ),
    }
    assert (process.returncode, err.decode().strip()) == said[key]
    os.close(ours)
    os.close(theirs)


@pytest.mark.usefixtures("unforked")
async def test_an_interrupted_enrolment_says_how_to_go_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        token = EnrollmentToken.make(address, address, Authority.make("a federation").certificate)
        (tmp_path / "token").write_text(token.encode())
        process = await begun(f"@{tmp_path / 'token'}", "--state-dir", str(tmp_path / "state"))
        silent.settimeout(30)
        caller, _ = await asyncio.to_thread(silent.accept)
        with caller:
            process.send_signal(signal.SIGINT)
            out, err = await process.communicate()
    assert (process.returncode, out.decode()) == (130, "")
    assert err.decode() == f"fedpeft-client: {token_argument.LEFT}\n"


# --keep


@dataclass
class Kept:
    """A site that is enrolled, and what `enroll --keep` says there."""

    double: Double
    state: Path

    async def again(self, token: str) -> tuple[int | None, str, str]:
        return await ended(token, "--state-dir", str(self.state), "--keep")

    def file(self, name: str = "hospital-a") -> str:
        path = self.state.parent / "token"
        path.write_text(self.double.token(name).encode())
        return f"@{path}"


@pytest.fixture
async def kept(double: Double, tmp_path: Path) -> Kept:
    double.enrolled(tmp_path / "state" / "identity", "hospital-a")
    return Kept(double, tmp_path / "state")


async def test_who_is_enrolled_is_kept(kept: Kept) -> None:
    before = Identity.load(kept.state / "identity")
    unused = "the token was not used. To replace this identity, after a revocation for example, use --replace"
    for token, said in ((kept.file(), f"; {unused} in place of --keep\n"), ("@/run/token/that-was-deleted", " UTC\n")):
        code, out, err = await kept.again(token)
        assert (code, err, out.count("\n")) == (0, "", 1)
        assert out.startswith("enrolled already, as client hospital-a until ")
        assert out.endswith(said)
    assert Identity.load(kept.state / "identity").chain == before.chain
    assert kept.double.asked == []


async def test_who_is_enrolled_is_kept_while_the_client_runs(kept: Kept) -> None:
    with StateDirectory(kept.state):
        code, _, err = await kept.again(kept.file())
    assert (code, err) == (0, "")


async def test_keep_enrolls_where_nobody_is_enrolled(double: Double, tmp_path: Path) -> None:
    site = Kept(double, tmp_path / "state")
    code, out, _ = await site.again(site.file())
    assert code == 0 and out.startswith("enrolled as client hospital-a at ")
    code, _, err = await Kept(double, tmp_path / "other").again("@/nowhere")
    assert code == 2 and "the token cannot be read from /nowhere" in err


async def test_keep_replaces_what_has_ended(kept: Kept) -> None:
    kept.double.life = timedelta(minutes=-5)
    old = kept.double.enrolled(kept.state / "identity", "hospital-a")
    kept.double.life = timedelta(hours=1)
    code, out, err = await kept.again(kept.file())
    assert code == 0 and out.startswith("enrolled as client hospital-a at ")
    assert (
        err.startswith("fedpeft-client: the existing identity cannot be kept: the certificate of ")
        and err.count("\n") == 1
    )
    new = Identity.load(kept.state / "identity")
    assert new.certificate.not_valid_after_utc > datetime.now(UTC) and new.chain != old.chain


async def test_keep_does_not_keep_what_is_for_another_server(kept: Kept, tmp_path: Path) -> None:
    before = Identity.load(kept.state / "identity")
    elsewhere = EnrollmentToken.make("fed.invalid:7070", "fed.invalid:7071", Authority.make("another").certificate)
    (tmp_path / "token").write_text(elsewhere.encode())
    code, out, err = await kept.again(f"@{tmp_path / 'token'}")
    assert (code, out) == (2, "")
    assert f" at {kept.double.server}" in err and "the token is of another authority, for fed.invalid:7070" in err
    assert Identity.load(kept.state / "identity").chain == before.chain


async def test_keep_and_replace_are_two_things(kept: Kept) -> None:
    code, _, err = await ended("-", "--state-dir", str(kept.state), "--keep", "--replace")
    assert code == 2 and "not allowed with argument" in err


async def test_wrong_tokens(double: Double, tmp_path: Path) -> None:
    state, line = ["--state-dir", str(tmp_path / "state")], double.token().encode()
    for text, said, status in (
        ("nonsense", "this is not an enrolment token of this version", 2),
        (line[:-3], "is damaged, cut short perhaps; copy the whole line again", 2),
        (line[:200], "is damaged, cut short perhaps; copy the whole line again", 2),
        ("x" * 100_000, "this is not an enrolment token of this version", 2),
        (" \n", "the enrolment token is empty; make one", 2),
    ):
        code, out, err = await ended("-", *state, stdin=text)
        assert (code, out) == (status, "")
        assert said in err and err.count("\n") == 1 and err.startswith("fedpeft-client: ")
        assert not text.strip() or text not in err
    code, _, err = await ended("@/nowhere", *state)
    assert code == 2 and "the token cannot be read from /nowhere: No such file" in err
    unknown = EnrollmentToken.make(double.server, double.enrollment, double.authority.certificate).encode()
    code, _, err = await ended("-", *state, stdin=unknown)
    assert code == 5 and "no token has this secret" in err


async def test_a_state_directory_is_needed(double: Double) -> None:
    code, _, err = await ended("-", stdin=double.token().encode())
    assert code == 2 and err == "fedpeft-client: --state-dir is missing (or FEDPEFT_CLIENT_STATE_DIR)\n"


async def test_another_federations_server_is_one_sentence(double: Double, tmp_path: Path) -> None:
    stranger = EnrollmentToken.make(double.server, double.enrollment, Authority.make("another").certificate).encode()
    code, out, err = await ended("-", "--state-dir", str(tmp_path / "state"), stdin=stranger)
    assert (code, out) == (3, "")
    assert "another federation's server" in err and err.count("\n") == 1  # and nothing of gRPC's own


async def test_a_client_that_runs_is_stopped_first(double: Double, tmp_path: Path) -> None:
    with StateDirectory(tmp_path):
        code, _, err = await ended("-", "--state-dir", str(tmp_path), stdin=double.token().encode())
    assert code == 1 and f"(process {os.getpid()}); stop it first, or" in err
