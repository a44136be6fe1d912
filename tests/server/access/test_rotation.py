"""The authority is replaced, and the server's certificate, while clients stay connected; over real mutual TLS."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from fedpeft.errors import IdentityInvalid, Internal, SettingsInvalid
from fedpeft.identity import certificates, folder, keys, requests
from fedpeft.identity.authority import Authority
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role, Subject
from fedpeft.identity.token import EnrollmentToken
from fedpeft.process import durable
from fedpeft.process.addresses import Address
from fedpeft.rpc import enrolment
from fedpeft.rpc.channel import open_channel
from fedpeft.v1 import access_service_pb2 as access
from fedpeft.v1 import access_service_pb2_grpc as access_grpc
from fedpeft_server.access import authorities
from fedpeft_server.access.authorities import Authorities
from fedpeft_server.access.certificates import ServerCertificates
from fedpeft_server.access.files import Files
from fedpeft_server.commands import authority, init
from fedpeft_server.commands import certificate as certificate_command
from fedpeft_server.store.database import Database
from fedpeft_server.store.identities import Issued
from fedpeft_server.timing import TIMING

from ..conftest import RawClient, filled
from ..secured import Federation, federation, held


class Device:
    """A device on its identity folder, which calls over a connection of its own, as an agent does."""

    def __init__(self, secured: Federation, where: Path, name: str) -> None:
        self._secured = secured
        self._where = where
        self.name = name
        self._open: list[grpc.aio.Channel] = []

    @property
    def identity(self) -> Identity:
        return Identity.load(self._where)

    @property
    def trusts(self) -> set[str]:
        return {certificates.fingerprint(one) for one in self.identity.authority}

    async def enroll(self) -> None:
        token = await self._secured.token(self.name)
        await enrolment.enroll(token, self._where)

    def channel(self) -> grpc.aio.Channel:
        """Returns a new connection with what the folder holds now."""
        self._open.append(open_channel(self._secured.address, self.identity))
        return self._open[-1]

    async def renew(self) -> None:
        stub = access_grpc.AccessServiceStub(self.channel())

        async def call(request: access.RenewRequest) -> access.RenewResponse:
            return await stub.Renew(request)

        await enrolment.renewed(self.identity, call)

    async def registers(self) -> None:
        await RawClient(self.channel(), self.name).register()

    async def close(self) -> None:
        for channel in self._open:
            await channel.close()


@pytest.fixture
async def devices(secured: Federation, tmp_path: Path) -> AsyncIterator[tuple[Device, Device]]:
    made = Device(secured, tmp_path / "a", "a"), Device(secured, tmp_path / "b", "b")
    for device in made:
        await device.enroll()
    yield made
    for device in made:
        await device.close()


def command(secured: Federation, *words: str) -> int:
    return authority.main([*words, "--data-dir", str(secured.server.settings.data_dir)])


def files(secured: Federation) -> Files:
    return Files(secured.server.settings.data_dir / "identity")


async def test_everybody_moves_to_the_new_authority_without_enrolling_again(
    secured: Federation, devices: tuple[Device, Device], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early, late = devices
    _, clients, tasks = await held(secured, "x", "y")  # connected all the time, with a round under way
    (old,) = early.trusts
    command(secured, "rotate")
    await secured.server.refresh.refresh()
    new = Authorities.read(files(secured)).issuing
    assert new is not None

    await early.renew()
    assert early.trusts == {old, certificates.fingerprint(new.certificate)}
    assert authorities.issued(new.certificate, early.identity.certificate)
    await early.registers()  # with a certificate of the new authority, to a server that shows one of the old
    await late.registers()  # with one of the old still
    third = Device(secured, tmp_path / "c", "c")
    await third.enroll()
    assert third.trusts == early.trusts, "who enrolls meanwhile trusts both at once"

    capsys.readouterr()
    command(secured, "show", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["rotating"] and len(shown["authorities"]) == 2
    assert (shown["renewed"], shown["waiting"]) == (["client a", "client c"], ["client b"])
    assert "operator ada" in shown["unknown"]
    with pytest.raises(SettingsInvalid, match="1 have not renewed yet: client b; a client renews half-way"):
        command(secured, "finish")

    await late.renew()
    again = ["--operator", "ada", "--operator-identity", str(secured.operator.folder)]
    init.main(["--data-dir", str(secured.server.settings.data_dir), *again])
    command(secured, "finish")
    await secured.server.refresh.refresh()
    for device in (early, late, third):
        await device.registers()  # a new connection: the server shows a certificate of the new authority now
        await device.renew()
        assert device.trusts == {certificates.fingerprint(new.certificate)}, (
            "the old one is dropped at the next renewal"
        )
        await device.registers()
    last = Device(secured, tmp_path / "d", "d")
    async with open_channel(secured.address, Identity.load(secured.operator.folder)) as operator:
        request = access.CreateTokenRequest(name="d", role=access.IDENTITY_ROLE_CLIENT)
        line = (await secured.access(operator).CreateToken(request)).line
    # The port for enrolment proves itself by the new authority by now, which is the one in the token.
    await enrolment.enroll(EnrollmentToken.decode(line), tmp_path / "d")
    assert last.trusts == {certificates.fingerprint(new.certificate)}
    for name, client in clients.items():
        await client.push(tasks[name].ticket, filled(1.0))  # on connections from before all this
    await third.close()


async def test_a_renewal_straight_after_rotate_is_of_the_new_authority(
    secured: Federation, devices: tuple[Device, Device], tmp_path: Path
) -> None:
    device, late = devices
    command(secured, "rotate")
    await device.renew()  # nobody waited for the server to look at its files
    new = Authorities.read(files(secured)).issuing
    assert new and authorities.issued(new.certificate, device.identity.certificate)
    third = Device(secured, tmp_path / "c", "c")
    await third.enroll()
    assert authorities.issued(new.certificate, third.identity.certificate)
    await third.close()

    command(secured, "finish", "--force")
    request = access.CreateTokenRequest(name="d", role=access.IDENTITY_ROLE_CLIENT)
    line = (await secured.access(secured.operators()).CreateToken(request)).line
    assert EnrollmentToken.decode(line).authority == new.certificate, "a token made at once can be used"
    with pytest.raises(grpc.aio.AioRpcError):
        await late.registers()  # the token had the server take the files up


async def test_finish_is_taken_up_without_a_call(secured: Federation, devices: tuple[Device, Device]) -> None:
    device, _ = devices
    command(secured, "rotate")
    await device.renew()
    command(secured, "finish", "--force")
    own = secured.server.certificates
    assert own is not None
    async with asyncio.timeout(30):
        while len(own.trusted) > 1:
            await asyncio.sleep(0.05)
    await device.registers()


async def test_no_certificate_is_issued_while_the_files_cannot_be_used(
    secured: Federation, devices: tuple[Device, Device]
) -> None:
    device, before = devices[0], files(secured).authority.read_bytes()
    durable.write(files(secured).authority, b"half of it")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await device.renew()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "were changed and cannot be used" in (caught.value.details() or "")
    durable.write(files(secured).authority, before)
    await device.renew()


async def test_whoever_was_locked_out_is_named_with_the_cure_which_works(
    secured: Federation, devices: tuple[Device, Device], capsys: pytest.CaptureFixture[str]
) -> None:
    """The only operator did not renew: what finish prints lets it in again, at the port that it used."""
    early, _ = devices
    me, data = secured.operator.folder, secured.server.settings.data_dir
    at = Address.parse(Identity.load(me).server).host
    folder.write(me, f"{at}:{secured.server.ports.port}", secured.operator.authority, secured.operator.chain)
    await secured.access(secured.operators()).Renew(access.RenewRequest(signing_request=requests.make(keys.make())))
    command(secured, "rotate")
    await early.renew()
    command(secured, "finish", "--force")
    said = capsys.readouterr().err
    assert "not let in any more: client b, operator ada; each enrolls again with a new token" in said
    cure = f"fedpeft-server init --data-dir {data} --operator ada"
    assert f"an operator of this machine is let in again by: {cure}\n" in said
    init.main([*shlex.split(cure)[2:], "--operator-identity", str(me)])
    again = Identity.load(me)
    assert again.server == f"{at}:{secured.server.ports.port}"
    await secured.server.refresh.take_up()
    async with open_channel(secured.address, again) as channel:
        stub = access_grpc.AccessServiceStub(channel)
        rows = (await stub.ListIdentities(access.ListIdentitiesRequest())).identities
    assert {row.name: row.authority_replaced for row in rows} == {"a": False, "ada": True, "b": True}


async def test_the_old_authority_is_not_let_in_any_more_once_it_is_dropped(
    secured: Federation, devices: tuple[Device, Device]
) -> None:
    early, late = devices
    command(secured, "rotate")
    await secured.server.refresh.refresh()
    await early.renew()
    command(secured, "finish", "--force")
    await secured.server.refresh.refresh()
    await early.registers()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await late.registers()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, "TLS itself fails, on either side"
    made_before = secured.certificate(Role.CLIENT, "z")
    with pytest.raises(grpc.aio.AioRpcError):
        await RawClient(made_before, "z").register()


async def test_the_command_is_told_again_and_says_what_there_is_to_do(
    secured: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingsInvalid, match=r"no authority is being replaced in .*; begin with"):
        command(secured, "finish")
    command(secured, "rotate")
    first = capsys.readouterr().out
    command(secured, "rotate")
    assert capsys.readouterr().out == first, "begun once"
    assert "signs the server's certificate" in first and "signs the certificates of devices and people" in first
    data = secured.server.settings.data_dir
    assert first.splitlines()[-1] == f"next: fedpeft-server authority finish --data-dir {data}"
    other = Authority.make("another")
    with pytest.raises(SettingsInvalid, match="is being moved to another authority already"):
        authorities.rotate(files(secured), other)


def made(tmp_path: Path) -> Files:
    init.main(["--data-dir", str(tmp_path / "data"), "--operator", "ada", "--operator-identity", str(tmp_path / "me")])
    return Files(tmp_path / "data" / "identity")


@pytest.mark.parametrize("step", range(5))
def test_a_crash_between_two_files_is_mended_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Dies before the step-th file that rotate and finish write; the server can start on what is there."""
    found = made(tmp_path)
    write, left = durable.write, step

    def dying(path: Path, data: bytes) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        write(path, data)

    monkeypatch.setattr(durable, "write", dying)
    data = ["--data-dir", str(tmp_path / "data")]
    with pytest.raises(KeyboardInterrupt):
        authority.main(["rotate", *data])
        authority.main(["finish", *data])
    monkeypatch.undo()
    served = ServerCertificates(found.folder)
    assert authorities.issued(served.root, served.certificate)
    if step < 2:
        authority.main(["rotate", *data])
    new = Authorities.read(found).issuing
    authority.main(["finish", *data])
    after = Authorities.read(found)
    assert new and after.trusted == (new.certificate,) and not after.is_rotating
    assert after.serving is not None and after.serving.certificate == new.certificate
    served.refresh()
    assert authorities.issued(new.certificate, served.certificate)
    assert not found.next_key.exists()


def test_an_authority_of_ones_own_takes_over(tmp_path: Path) -> None:
    found, own = made(tmp_path), Authority.make("Clinic CA")
    certificate, key = tmp_path / "ca.pem", tmp_path / "ca.key"
    durable.write(certificate, certificates.to_pem(own.certificate))
    durable.write(key, keys.to_pem(own.key))
    given = ["--authority", str(certificate), "--authority-key", str(key)]
    authority.main(["rotate", "--data-dir", str(tmp_path / "data"), *given])
    issuing = Authorities.read(found).issuing
    assert issuing and issuing.certificate == own.certificate
    with pytest.raises(SettingsInvalid, match="belong together"):
        authority.main(["rotate", "--data-dir", str(tmp_path / "data"), *given[:2]])


def test_where_the_authority_is_elsewhere_it_is_replaced_there(tmp_path: Path) -> None:
    found = made(tmp_path)
    found.authority_key.unlink()
    for words in (["authority", "rotate"], ["certificate", "renew"]):
        module = {"authority": authority, "certificate": certificate_command}[words[0]]
        with pytest.raises(SettingsInvalid, match=r"has no authority\.key: "):
            module.main([words[1], "--data-dir", str(tmp_path / "data")])


@pytest.mark.parametrize("word", ["rotate", "finish"])
def test_a_server_whose_database_is_elsewhere_is_not_taken_for_one_that_nobody_enrolled_with(
    tmp_path: Path, postgresql_url: str, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    """`finish` would lock everybody out."""
    found = made(tmp_path)
    database = Database.open(postgresql_url, TIMING)
    now = time.time()
    database.identities.renewed(Subject(Role.CLIENT, "a"), Issued(now, now + 3600, "ab" * 32, "cd" * 32))
    database.close()
    flags = ["--data-dir", str(tmp_path / "data")]
    if word == "finish":
        authority.main(["rotate", *flags])
    (tmp_path / "data" / "spool").mkdir()  # as a server makes it
    before = Authorities.read(found).trusted
    with pytest.raises(SettingsInvalid, match=r"a server has worked with .*data.* name that with --database"):
        authority.main([word, *flags])
    with pytest.raises(SettingsInvalid, match="there is no such file"):
        authority.main([word, *flags, "--database", f"sqlite:///{tmp_path}/other.db"])
    assert Authorities.read(found).trusted == before
    if word == "finish":
        with pytest.raises(SettingsInvalid, match="1 have not renewed yet: client a"):
            authority.main([word, *flags, "--database", postgresql_url])
    else:
        capsys.readouterr()
        authority.main([word, *flags, "--database", postgresql_url])
        assert "not yet: client a" in capsys.readouterr().out


def test_init_makes_the_operators_identity_anew_with_both_authorities(tmp_path: Path) -> None:
    found = made(tmp_path)
    again = ["--data-dir", str(tmp_path / "data"), "--operator", "ada", "--operator-identity", str(tmp_path / "me")]
    for words in (["rotate"], ["finish"]):
        authority.main([*words, "--data-dir", str(tmp_path / "data")])
        init.main(again)
        now, person = Authorities.read(found), Identity.load(tmp_path / "me")
        assert set(person.authority) == set(now.trusted)
        assert now.issuing and authorities.issued(now.issuing.certificate, person.certificate)
        kept = person.certificate
        init.main(again)
        assert Identity.load(tmp_path / "me").certificate == kept


def test_a_certificate_for_other_hosts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = made(tmp_path)
    before = certificates.load(found.server)[0]
    data = ["--data-dir", str(tmp_path / "data"), "--json"]
    certificate_command.main(["renew", *data, "--host", "fed.example.org", "--host", "10.0.0.7"])
    capsys.readouterr()
    certificate_command.main(["renew", *data])
    hosts = ["fed.example.org", "10.0.0.7", "localhost", "127.0.0.1", "::1"]
    assert json.loads(capsys.readouterr().out)["hosts"] == hosts, "the same ones"
    certificate_command.main(["renew", *data, "--host", "new.example.org"])
    said = capsys.readouterr()
    assert json.loads(said.out)["hosts"] == ["new.example.org", *hosts[2:]]
    assert "no longer in it: fed.example.org, 10.0.0.7; devices whose identity.toml names one" in said.err
    assert certificates.load(found.server)[0].public_key() == before.public_key()
    with pytest.raises(SettingsInvalid, match=r"--host: 'a b' is neither"):
        certificate_command.main(["renew", *data, "--host", "a b"])
    shutil.rmtree(found.folder)
    with pytest.raises(SettingsInvalid, match=r"has no server\.pem; fedpeft-server init makes"):
        certificate_command.main(["show", *data])


async def test_what_a_server_sends_to_be_trusted_is_checked(
    secured: Federation, devices: tuple[Device, Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, before = devices[0], devices[0].identity
    for sent, said in (
        (b"rubbish", "authorities that cannot be used"),
        (certificates.to_pem(before.certificate), "each must be allowed to sign others"),
        (certificates.to_pem(*[before.authority[0]] * 9), "the server sent 9 certificates to trust"),
    ):
        monkeypatch.setattr(secured.server.access, "_trusted", lambda sent=sent: sent)
        with pytest.raises(Internal, match=said):
            await device.renew()
        assert (device.identity.chain, device.identity.authority) == (before.chain, before.authority)
    monkeypatch.setattr(secured.server.access, "_trusted", lambda: b"")
    await device.renew()
    assert device.identity.authority == before.authority, "a server that does not say changes nothing"


async def test_a_server_that_starts_in_mid_rotation_goes_on(tmp_path: Path) -> None:
    async with federation(tmp_path) as before:
        device = Device(before, tmp_path / "a", "a")
        await device.enroll()
        await device.close()
    data = ["--data-dir", str(tmp_path / "data")]
    authority.main(["rotate", *data])
    async with federation(tmp_path) as after:
        device = Device(after, tmp_path / "a", "a")
        await device.registers()
        await device.renew()
        assert len(device.trusts) == 2
        await device.close()
    authority.main(["finish", *data])
    async with federation(tmp_path) as after:
        device = Device(after, tmp_path / "a", "a")
        await device.registers()
        await device.close()


def test_a_key_that_is_nobodys_is_still_refused(tmp_path: Path) -> None:
    found = made(tmp_path)
    durable.write(found.authority_key, keys.to_pem(keys.make()))
    with pytest.raises(IdentityInvalid, match="does not belong to its certificate"):
        Authorities.read(found)


@pytest.mark.parametrize("word", ["rotate", "finish"])
def test_a_database_without_a_server_in_it_is_refused_before_anything_changes(tmp_path: Path, word: str) -> None:
    found, flags = made(tmp_path), ["--data-dir", str(tmp_path / "data")]
    if word == "finish":
        authority.main(["rotate", *flags])
    before, other = Authorities.read(found).trusted, tmp_path / "other.db"
    other.touch()
    with pytest.raises(SettingsInvalid, match=r"other\.db: it is empty; name the server's"):
        authority.main([word, *flags, "--database", f"sqlite:///{other}"])
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE notes (text)")
    with pytest.raises(SettingsInvalid, match=r"other\.db: nothing of a server is in it; name the server's"):
        authority.main([word, *flags, "--database", f"sqlite:///{other}"])
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE alembic_version (version_num)")
        database.execute("INSERT INTO alembic_version VALUES ('9999')")
        database.commit()
    with pytest.raises(SettingsInvalid, match=r"other\.db has schema 9999, and this release \d+; use the command"):
        authority.main([word, *flags, "--database", f"sqlite:///{other}"])
    assert Authorities.read(found).trusted == before


def test_the_servers_settings_file_names_folder_and_database(tmp_path: Path) -> None:
    """Its other settings may want what these commands make: certificates, to be reached from elsewhere."""
    Database.open(f"sqlite:///{tmp_path}/server.db", TIMING).close()
    settings = tmp_path / "server.toml"
    places = f'data_dir = "{tmp_path}/data"\ndatabase = "sqlite:///{tmp_path}/server.db"\n'
    settings.write_text(f'{places}listen = "0.0.0.0:7070"\n')
    init.main(["--config", str(settings), "--operator", "ada", "--operator-identity", str(tmp_path / "me")])
    authority.main(["rotate", "--config", str(settings)])
    certificate_command.main(["show", "--config", str(settings), "--json"])
    with pytest.raises(SettingsInvalid, match="there is no such file; name the server's database"):
        authority.main(["finish", "--config", str(settings), "--database", f"sqlite:///{tmp_path}/none.db"])
    authority.main(["finish", "--config", str(settings)])
    assert not Authorities.read(Files(tmp_path / "data" / "identity")).is_rotating
    with pytest.raises(SettingsInvalid, match=r"cannot read .*missing\.toml: No such file"):
        authority.main(["show", "--config", str(tmp_path / "missing.toml")])
    settings.write_text("data_dir = 7\n")
    with pytest.raises(SettingsInvalid, match=r"server\.toml: data_dir is 7, and no text"):
        authority.main(["show", "--config", str(settings)])
