"""`fedpeft token`, `enroll`, `identity`, `client revoke` and `audit`, against a daemon over TLS."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedpeft.api.following import follow
from fedpeft.api.operator_client import OperatorClient
from fedpeft.errors import CertificateRevoked, RoleMayNot, ServerUnreachable
from fedpeft.identity import certificates, folder, keys, token_argument
from fedpeft.identity.audit import of_line, verify
from fedpeft.identity.authority import Authority
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role, Subject
from fedpeft.identity.token import EnrollmentToken
from fedpeft.v1 import access_service_pb2 as access
from fedpeft.v1 import run_pb2

from ..conftest import StartDaemon, config
from ..secured import HOUR, Federation, federation

pytestmark = pytest.mark.usefixtures("preloaded")


@dataclass
class Ended:
    code: int | None
    out: str
    err: str


Command = Callable[..., Awaitable[Ended]]


@pytest.fixture
def fedpeft(secured: Federation, tmp_path: Path) -> Command:
    """Runs a command as the operator that init made, or as whom `identity` says."""

    async def run(*arguments: str, identity: Path | None = None, stdin: str = "") -> Ended:
        who = ["--server", secured.address, "--identity", str(identity or secured.operator.folder)]
        return await ended(tmp_path, *who, *arguments, stdin=stdin)

    return run


async def ended(home: Path, *arguments: str, stdin: str = "", **variables: str) -> Ended:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedpeft_operator.app", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home / "config"), "NO_COLOR": "1", **variables},
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate(stdin.encode())
    return Ended(process.returncode, out.decode(), err.decode())


async def test_a_token_takes_another_person_in(fedpeft: Command, secured: Federation, tmp_path: Path) -> None:
    made = await fedpeft("token", "create", "--name", "vera", "--role", "viewer", "--expires", "2h")
    assert made.code == 0
    line = made.out.removesuffix("\n")
    token = EnrollmentToken.decode(line)
    assert "\n" not in line and line not in made.err
    assert f"token {token.digest.hex()[:12]} for viewer vera, usable once, until " in made.err
    assert "fedpeft enroll -" in made.err

    enrolled = await fedpeft("enroll", "-", identity=tmp_path / "vera", stdin=made.out)
    assert enrolled.code == 0, enrolled.err
    assert enrolled.out.startswith(f"enrolled as viewer vera at {token.server} until ")

    listed = await fedpeft("token", "list", "--json")
    (row,) = json.loads(listed.out)
    assert (row["id"], row["role"], row["name"]) == (token.digest.hex()[:12], "viewer", "vera")
    assert row["created_by"] == "operator ada" and row["used_at"] is not None
    assert line.split(".")[4] not in listed.out

    known = await fedpeft("identity", "list", identity=tmp_path / "vera")
    assert "viewer" in known.out and "vera" in known.out

    refused = await fedpeft("token", "list", identity=tmp_path / "vera")
    assert refused.code == 1 and "viewer" in refused.err and refused.err.count("\n") == 1


async def test_a_token_in_a_file_is_for_its_owner_only(fedpeft: Command, tmp_path: Path) -> None:
    file = tmp_path / "site-a.token"
    made = await fedpeft("token", "create", "--name", "site-a", "--out", str(file), "--json")
    assert made.code == 0, made.err
    token = EnrollmentToken.decode(file.read_text())
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(made.out)["id"] == token.digest.hex()[:12]
    assert token.encode() not in made.out + made.err


async def test_a_token_that_could_not_be_written_is_not_made(fedpeft: Command, tmp_path: Path) -> None:
    (tmp_path / "earlier.token").write_text("fedpeft1.earlier")
    for out, said in (
        (tmp_path / "nodir" / "t", f"there is no folder {tmp_path / 'nodir'}"),
        (tmp_path, "is a folder"),
        (tmp_path / "earlier.token", "is there already; name another file, or remove it first"),
    ):
        done = await fedpeft("token", "create", "--name", "site-a", "--out", str(out))
        assert (done.code, done.out) == (2, "") and said in done.err
    assert "site-a" not in (await fedpeft("token", "list")).out
    assert (tmp_path / "earlier.token").read_text() == "fedpeft1.earlier"


async def test_a_token_that_is_deleted_is_worthless(fedpeft: Command, tmp_path: Path) -> None:
    made = json.loads((await fedpeft("token", "create", "--name", "noto", "--json")).out)
    assert made["role"] == "client" and made["line"].startswith("fedpeft1.")
    lasts = datetime.fromisoformat(made["expires_at"]) - datetime.fromisoformat(made["created_at"])
    assert lasts == timedelta(days=1)
    assert (await fedpeft("token", "delete", made["id"])).code == 0
    again = await fedpeft("token", "delete", made["id"])
    assert again.code == 4 and made["id"] in again.err
    refused = await fedpeft("enroll", "-", identity=tmp_path / "noto", stdin=made["line"])
    assert refused.code == 1 and refused.err.count("\n") == 1
    assert not folder.exists(tmp_path / "noto")


@pytest.mark.parametrize("command", [("token", "create", "--name"), ("client", "revoke"), ("identity", "restore")])
async def test_a_name_that_cannot_be_one(fedpeft: Command, command: tuple[str, ...]) -> None:
    for name in ("a b", "..", "x" * 65):
        done = await fedpeft(*command, name)
        assert (done.code, done.out) == (2, ""), done.err
        assert f"the name {name!r} must be 1 to 64 letters" in done.err and done.err.count("\n") == 1


async def test_a_new_name_does_not_begin_with_a_hyphen_and_an_old_one_is_reached(
    fedpeft: Command, secured: Federation
) -> None:
    for name in ("--", "-x"):
        done = await fedpeft("token", "create", f"--name={name}")
        assert (done.code, done.out) == (2, "")
        assert f"the name {name!r} begins with a hyphen, so commands take it for an option" in done.err
    secured.server.store.db.identities.seen(Subject(Role.CLIENT, "-x"))  # let in by a release that allowed it
    assert (await fedpeft("token", "create", "--name=-x")).code == 0
    assert (await fedpeft("client", "revoke", "--", "-x")).code == 0


@pytest.mark.parametrize("after", [2**63, 2**64, 10**20])
async def test_no_entry_of_the_audit_log_has_a_number_beyond_the_protocol(fedpeft: Command, after: int) -> None:
    done = await fedpeft("audit", "show", "--after", str(after))
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "0m", "1w", "1.5h", "24h ", "9999999999h"])
async def test_times_that_are_none(text: str, tmp_path: Path) -> None:
    done = await ended(tmp_path, "token", "create", "--name", "x", "--expires", text)
    assert done.code == 2 and ("is not a time like 30m, 24h or 7d" if text else "--expires is empty") in done.err


@pytest.mark.parametrize("text", ["31d", "59s"])
async def test_a_time_that_is_too_short_or_too_long(text: str, tmp_path: Path) -> None:
    done = await ended(tmp_path, "token", "create", "--name", "x", "--expires", text)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"fedpeft: --expires: {text} is not between 1m and 30d, the lifetimes allowed\n"


@pytest.mark.usefixtures("unforked")
async def test_an_interrupted_enrolment_says_how_to_go_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        token = EnrollmentToken.make(address, address, Authority.make("a federation").certificate).encode()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fedpeft_operator.app", "--identity", str(tmp_path / "ada"), "enroll", "-"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(token.encode())
        process.stdin.close()
        silent.settimeout(30)
        caller, _ = await asyncio.to_thread(silent.accept)
        with caller:
            process.send_signal(signal.SIGINT)
            out, err = await process.communicate()
    assert (process.returncode, out.decode(), err.decode()) == (130, "", f"fedpeft: {token_argument.LEFT}\n")


async def test_a_revoked_one_is_refused_at_its_next_message(
    fedpeft: Command, secured: Federation, tmp_path: Path
) -> None:
    operator = enrolled(secured, tmp_path / "eve", Role.OPERATOR, "eve")
    async with OperatorClient(secured.address, operator) as client:
        await client.runs()
        done = await fedpeft("client", "revoke", "eve", "--role", "operator", "--reason", "left", "--json")
        assert json.loads(done.out)["reason"] == "left"
        with pytest.raises(CertificateRevoked):
            await client.runs()
    listed = await fedpeft("identity", "list")
    assert "operator eve was revoked: left" in listed.out
    refused = await fedpeft("run", "list", identity=tmp_path / "eve")
    assert (
        refused.code == 1
        and "were revoked; ask another operator for a new enrolment token, and enroll anew with it" in refused.err
    )
    nobody = await fedpeft("client", "revoke", "nobody")
    assert nobody.code == 4 and "or give --unseen to refuse it before it is enrolled or calls" in nobody.err
    other_role = await fedpeft("client", "revoke", "ada")
    assert other_role.code == 4 and "there is operator ada: name that role" in other_role.err
    itself = await fedpeft("client", "revoke", "ada", "--role", "operator")
    assert itself.code == 1

    restored = await fedpeft("identity", "restore", "eve", "--role", "operator")
    assert restored.out.startswith("operator eve is admitted again, with a certificate issued after 20")
    early = await fedpeft("run", "list", identity=tmp_path / "eve")
    assert early.code == 1 and "that begin before" in early.err and "and this one begins at 20" in early.err
    assert "ask another operator for a new enrolment token" in early.err
    assert "not revoked" in (await fedpeft("identity", "restore", "ada", "--role", "operator")).out
    unseen = await fedpeft("client", "revoke", "bo", "--role", "operator", "--unseen", "--json")
    assert json.loads(unseen.out)["revoked_at"]


def enrolled(secured: Federation, where: Path, role: Role, name: str, life: timedelta = HOUR) -> Identity:
    """Writes an identity folder without a token."""
    key = folder.take_key(where)
    certificate = secured.authority.issue(Subject(role, name), key.public_key(), life)
    folder.write(where, secured.address, [secured.authority.certificate], [certificate])
    return Identity.load(where)


async def test_the_audit_log_is_shown_exported_and_verified(
    fedpeft: Command, secured: Federation, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        token = await secured.token(name)
    key = keys.make()
    await secured.enroll(token, key)
    ends = (await secured.access().ListIdentities(access.ListIdentitiesRequest())).identities[0].expires_at.ToDatetime()
    shown = await fedpeft("audit", "show")
    assert shown.code == 0 and shown.out.count("token.created") == 3 and "operator ada" in shown.out
    assert f"expires_at {ends:%Y-%m-%dT%H:%M:%SZ}" in shown.out
    file = tmp_path / "audit.jsonl"
    exported = await fedpeft("audit", "export", "--out", str(file))
    entries = [of_line(line, "a line") for line in await asyncio.to_thread(read_lines, file)]
    last = verify(entries)
    assert last is not None
    head = f"{last.number}:{last.sha256}"
    assert exported.err == f"{last.number} entries, the last one is {head}\n"
    piped = await fedpeft("audit", "export", "--out", "-")
    assert piped.out.startswith("".join(entry.to_line() + "\n" for entry in entries))
    for source in (["--file", str(file)], []):
        verified = await fedpeft("audit", "verify", *source, "--head", head)
        assert verified.code == 0, verified.err
        assert "each follows the one before it, and the one noted\nhead " in verified.out
    later = await fedpeft("audit", "show", "--after", str(last.number - 1), "--json")
    assert of_line(later.out.splitlines()[0], "a line") == last


def read_lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


async def test_a_changed_export_is_found_out(fedpeft: Command, secured: Federation, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        await secured.token(name)
    file = tmp_path / "audit.jsonl"
    await fedpeft("audit", "export", "--out", str(file))
    lines = await asyncio.to_thread(read_lines, file)
    noted = of_line(lines[-1], "a line")
    for wrong, said in (
        ([*lines[:1], *lines[2:]], "entry 2 is missing: entry 3 stands in its place"),
        ([lines[0], lines[1].replace("operator ada", "operator eve"), *lines[2:]], "entry 2 was changed"),
        ([lines[0].replace(",", ", "), *lines[1:]], f"{file}:1 (entry 1) is not in canonical form; it was edited"),
        (lines[:-1], f"the log ends with entry {noted.number - 1}, but entry {noted.number} was noted"),
        (["{}"], f"{file}:1 is not an entry of an audit log"),
    ):
        file.write_text("".join(f"{line}\n" for line in wrong))
        done = await fedpeft("audit", "verify", "--file", str(file), "--head", f"{noted.number}:{noted.sha256}")
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert said in done.err
    done = await fedpeft("audit", "verify", "--head", "12")
    assert done.code == 2 and "is not NUMBER:SHA256" in done.err
    done = await fedpeft("audit", "verify", "--file", "/nowhere")
    assert done.code == 2 and "/nowhere cannot be read" in done.err


async def test_an_identity_past_its_half_is_renewed_quietly(
    fedpeft: Command, secured: Federation, tmp_path: Path
) -> None:
    old = enrolled(secured, tmp_path / "old", Role.OPERATOR, "olga", timedelta(minutes=5))
    at_once = await asyncio.gather(*(fedpeft("run", "list", identity=tmp_path / "old") for _ in range(2)))
    assert [(done.code, done.err) for done in at_once] == [(0, "")] * 2
    assert [entry.action for entry in await secured.audit()].count("identity.renewed") == 1
    new = Identity.load(tmp_path / "old")
    assert new.certificate.not_valid_after_utc > old.certificate.not_valid_after_utc + timedelta(minutes=5)
    again = await fedpeft("run", "list", identity=tmp_path / "old")
    assert again.code == 0
    assert Identity.load(tmp_path / "old").chain == new.chain


async def test_a_renewal_that_fails_is_no_matter_yet(secured: Federation, tmp_path: Path) -> None:
    old = enrolled(secured, tmp_path / "old", Role.CLIENT, "noto", timedelta(minutes=5))
    (tmp_path / "old").rename(tmp_path / "away")  # the next one cannot be written
    async with OperatorClient(secured.address, old) as client:
        with pytest.raises(RoleMayNot):
            await client.runs()
    assert Identity.load(tmp_path / "away").chain == old.chain


async def test_a_watch_outlives_the_certificate_it_began_with(secured: Federation, tmp_path: Path) -> None:
    run = await secured.daemon(secured.operators()).create(config())
    where, now = tmp_path / "olga", datetime.now(UTC)
    subject, key = Subject(Role.OPERATOR, "olga"), folder.take_key(where)
    brief = secured.authority.issue(subject, key.public_key(), timedelta(seconds=4), after=now - timedelta(seconds=3))
    folder.write(where, secured.address, [secured.authority.certificate], [brief])

    def connect() -> OperatorClient:
        return OperatorClient(secured.address, Identity.load(where))

    pictures = follow(connect, run.id)
    assert (await anext(pictures)).run.state == run_pb2.RUN_STATE_RUNNING
    await asyncio.sleep((certificates.renewal(brief) - datetime.now(UTC)).total_seconds())
    async with connect():  # as the next command does, or the console's other connection
        assert Identity.load(where).certificate.not_valid_after_utc > brief.not_valid_after_utc
    await asyncio.sleep((brief.not_valid_after_utc - datetime.now(UTC)).total_seconds() + 1)
    async with connect() as client:
        await client.stop(run.id, "enough")
    assert [picture.run.state async for picture in pictures][-1] == run_pb2.RUN_STATE_STOPPED


async def test_an_ended_identity_says_so(fedpeft: Command, secured: Federation, tmp_path: Path) -> None:
    enrolled(secured, tmp_path / "gone", Role.OPERATOR, "olga", timedelta(minutes=-5))
    done = await fedpeft("run", "list", identity=tmp_path / "gone")
    assert done.code == 2 and "ended at" in done.err and "enroll again with a new token" in done.err
    assert "as an operator on the server's machine, run fedpeft-server init again" in done.err


async def test_a_server_of_another_federation_is_named(secured: Federation, tmp_path: Path) -> None:
    async with federation(tmp_path / "other") as other:
        stranger = Identity(
            other.operator.folder, secured.address, other.operator.key, other.operator.chain, other.operator.authority
        )
        with pytest.raises(ServerUnreachable, match="another federation's server"):
            async with OperatorClient(secured.address, stranger, attempts=1) as client:
                await client.runs()


async def test_plain_text_to_a_server_with_tls_says_what_is_needed(secured: Federation, tmp_path: Path) -> None:
    done = await ended(tmp_path, "--server", secured.address, "run", "list")
    assert done.code == 3 and "speaks TLS and this side has no certificate: ask its operator" in done.err
    assert "or name the folder of its identity with --identity" in done.err


# Which identity is used


async def test_the_personal_identity_is_for_its_own_server(
    secured: Federation, start: StartDaemon, tmp_path: Path
) -> None:
    plain = await start(tmp_path / "plain")
    enrolled(secured, tmp_path / "config" / "fedpeft" / "identity", Role.OPERATOR, "ada")
    assert (await ended(tmp_path, "run", "list")).code == 0
    assert (await ended(tmp_path, "--server", secured.address, "run", "list")).code == 0
    assert (
        await ended(tmp_path, "--server", secured.address.replace("127.0.0.1", "localhost"), "run", "list")
    ).code == 0
    assert (await ended(tmp_path, "--server", plain.server.settings.listen, "run", "list")).code == 0


async def test_a_named_identity_is_used_for_every_server(
    secured: Federation, start: StartDaemon, tmp_path: Path
) -> None:
    plain = await start(tmp_path / "plain")
    enrolled(secured, tmp_path / "ada", Role.OPERATOR, "ada")
    done = await ended(tmp_path, "run", "list", FEDPEFT_IDENTITY=str(tmp_path / "ada"))
    assert done.code == 0
    done = await ended(
        tmp_path, "--server", plain.server.settings.listen, "--identity", str(tmp_path / "ada"), "run", "list"
    )
    assert done.code == 3 and f"and this side has a certificate for TLS, in {tmp_path / 'ada'}: " in done.err
    assert "say fedpeft --insecure" in done.err
    where, named = plain.server.settings.listen, str(tmp_path / "ada")
    for nobody in (("--identity", ""), ("--insecure", "--identity", "")):  # as an empty variable: none is named
        done = await ended(tmp_path, "--server", where, *nobody, "run", "list", FEDPEFT_IDENTITY=named)
        assert (done.code, done.err) == (0, "")
    done = await ended(tmp_path, "--insecure", "--identity", str(tmp_path / "ada"), "run", "list")
    assert done.code == 2 and "leave out one" in done.err


async def test_plain_text_does_not_leave_the_machine_unasked(secured: Federation, tmp_path: Path) -> None:
    done = await ended(tmp_path, "--server", "fed.invalid:7070", "run", "list")
    assert done.code == 2 and "there is no identity for it: enroll with a token (fedpeft enroll)" in done.err
    enrolled(secured, tmp_path / "config" / "fedpeft" / "identity", Role.OPERATOR, "ada")
    done = await ended(tmp_path, "--server", "fed.invalid:7070", "run", "list")
    assert done.code == 2 and f"identity is for {secured.address}): enroll" in done.err
    done = await ended(tmp_path, "--server", "fed.invalid:7070", "--insecure", "run", "list")
    assert done.code == 3
    warning, error = done.err.splitlines()
    assert warning.startswith("fedpeft: plain text: anyone on the path to fed.invalid:7070 can read")
    assert "the name fed.invalid is not known here" in error


async def test_a_broken_personal_identity_hinders_only_its_own_server(
    secured: Federation, start: StartDaemon, tmp_path: Path
) -> None:
    plain = await start(tmp_path / "plain")
    own = enrolled(secured, tmp_path / "config" / "fedpeft" / "identity", Role.OPERATOR, "ada").folder
    folder.key_path(own).chmod(0o644)
    assert (await ended(tmp_path, "--server", plain.server.settings.listen, "run", "list")).code == 0
    done = await ended(tmp_path, "run", "list")
    assert done.code == 2 and "chmod 600" in done.err
