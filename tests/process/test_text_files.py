"""A byte order mark is no matter in any text file that is read."""

import codecs
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import text_files
from fedpeft.config import load_run_file
from fedpeft.data.client_folders import clients_in
from fedpeft.data.labels import read_label_map
from fedpeft.data.sources.opening import labels_digest, open_source
from fedpeft.errors import ConfigInvalid, DataInvalid, FedpeftError, IdentityInvalid, SettingsInvalid
from fedpeft.identity import certificates, keys, token_argument
from fedpeft.identity.folder import server_of
from fedpeft.process import durable
from fedpeft_client.owner.policy import Policy
from fedpeft_client.settings import Settings
from fedpeft_operator.cli.access import audit
from fedpeft_operator.doctor import client_side

from ..data.test_sources import table, write

ENCODINGS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
RUN = """
name = "caf\u00e9"
[model]
name = "vit_tiny_patch16_224"
weights = "none"
classes = ["cat", "cafe\u0301"]
[peft]
method = "bias"
"""


@given(
    st.sampled_from(sorted(ENCODINGS)), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\ufeff"))
)
def test_what_was_written_with_a_mark_is_read_without(encoding, text):
    written = ENCODINGS[encoding] + text.replace("\n", "\r\n").encode(encoding)
    if encoding == "utf-16-le" and text.startswith("\0"):
        return  # the mark of UTF-32
    assert text_files.decode(written) == text


def test_what_is_no_text_is_named_with_its_line(tmp_path):
    with pytest.raises(text_files.NotText, match="byte 0xe4 in line 2 is not UTF-8; save it as UTF-8"):
        text_files.decode(b"one\nM\xe4nner")
    with pytest.raises(text_files.NotText, match="is not UTF-16-LE"):
        text_files.decode(codecs.BOM_UTF16_LE + b"odd")


def run_file(path: Path) -> object:
    return load_run_file(path).model.classes


def label_map(path: Path) -> object:
    return read_label_map(path)


def index(path: Path) -> object:
    return open_source(path).labels.tolist()


def policy(path: Path) -> object:
    return Policy.read(path).rules


def settings(path: Path) -> object:
    return Settings.read(["--config", str(path)]).name


def identity(path: Path) -> object:
    return server_of(path.parent)


def examined_policy(path: Path) -> object:
    return client_side._policy(path)


READERS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "run file": ("run.toml", RUN, run_file),
    "label map": ("map.TOML", '"Katze" = "cat"', label_map),
    "label map in JSON": ("map.json", '{"Katze": "cat", "M\u00e4nner": null}', label_map),
    "policy": ("policy.toml", "[training]\nmax_steps = 3", policy),
    "settings": ("c.toml", 'server = "127.0.0.1:7070"\nname = "a"\ndata = "d"\nstate_dir = "s"', settings),
    "identity": ("identity.toml", 'server = "127.0.0.1:7070"', identity),
    "policy that doctor reads": ("policy.toml", "[training]\nmax_steps = 3", examined_policy),
}


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_text_file_may_begin_with_a_mark(tmp_path, what, encoding):
    name, text, reads = READERS[what]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    plain = reads(path)
    path.write_bytes(ENCODINGS[encoding] + text.encode(encoding))
    assert reads(path) == plain


def test_an_index_file_may_begin_with_a_mark(tmp_path):
    data = write(tmp_path / "data.parquet", table(9))
    text = json.dumps({"source": data.name, "rows": [5, 1], "labels_sha256": labels_digest(open_source(data))})
    (tmp_path / "a.index.json").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert index(tmp_path / "a.index.json") == [2, 1]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_token_may_begin_with_a_mark(tmp_path, monkeypatch, encoding):
    line = "fedpeft1.cut.short"
    (tmp_path / "token").write_bytes(ENCODINGS[encoding] + f"{line}\r\n".encode(encoding))
    with pytest.raises(IdentityInvalid, match="damaged, cut short"):  # and not: no token at all
        token_argument.take(f"@{tmp_path / 'token'}")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "token").read_bytes())))
    with pytest.raises(IdentityInvalid, match="damaged, cut short"):
        token_argument.take("-")


def test_keys_and_certificates_may_begin_with_a_mark(tmp_path):
    key = keys.make()
    durable.write(tmp_path / "key.pem", codecs.BOM_UTF8 + keys.to_pem(key))
    assert keys.load(tmp_path / "key.pem").public_key() == key.public_key()


@pytest.mark.parametrize("what", ["run file", "label map", "policy", "settings"])
def test_what_is_no_utf8_says_where(tmp_path, what):
    name, _, reads = READERS[what]
    (tmp_path / name).write_bytes(b'a = "b"\nc = "M\xe4nner"')
    with pytest.raises((ConfigInvalid, DataInvalid, SettingsInvalid), match="byte 0xe4 in line 2 is not UTF-8"):
        reads(tmp_path / name)


def test_the_classes_of_a_run_are_in_nfc(tmp_path):
    (tmp_path / "run.toml").write_text(RUN, encoding="utf-8")
    assert load_run_file(tmp_path / "run.toml").model.classes == ("cat", "caf\u00e9")
    (tmp_path / "run.toml").write_text(RUN.replace('"cat"', '"caf\u00e9"'), encoding="utf-8")
    with pytest.raises(ConfigInvalid, match="is named twice"):
        load_run_file(tmp_path / "run.toml")


@pytest.mark.parametrize(
    "what", ["run file", "settings", "policy", "label map", "label map in JSON", "index", "record"]
)
def test_brackets_nested_without_end_are_said_to_be_that(tmp_path, what):
    names = {"index": "a.index.json", "label map in JSON": "map.json", "identity": "identity.toml"}
    path = tmp_path / names.get(what, "f.toml")
    json_like = what in ("index", "label map in JSON", "record")
    path.write_text("[" * 5_000 if json_like else "a = " + "[" * 5_000)
    (tmp_path / "partition.json").write_text("[" * 5_000)
    read = {
        "run file": load_run_file,
        "settings": settings,
        "policy": Policy.read,
        "label map": read_label_map,
        "label map in JSON": read_label_map,
        "index": open_source,
        "record": lambda _: clients_in(tmp_path),
    }[what]
    with pytest.raises(FedpeftError, match="its brackets are nested hundreds deep"):
        read(path)


def test_nested_brackets_in_an_identity_and_a_policy_that_doctor_reads(tmp_path):
    for name in ("identity.toml", "policy.toml"):
        (tmp_path / name).write_text("a = " + "[" * 5_000)
    with pytest.raises(IdentityInvalid, match="must hold server"):
        server_of(tmp_path)
    assert "brackets are nested" in client_side._policy(tmp_path / "policy.toml").text


def test_a_long_file_is_read_line_by_line_without_its_mark(tmp_path):
    for encoding, mark in ENCODINGS.items():
        (tmp_path / "lines").write_bytes(mark + "caf\u00e9\n2\n".encode(encoding))
        with text_files.opened(tmp_path / "lines") as lines:
            assert list(lines) == ["caf\u00e9\n", "2\n"]


def first_certificate(path: Path) -> object:
    return certificates.load(path)[0]


BOUNDED: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{what: (READERS[what][0], READERS[what][2]) for what in ("run file", "policy", "settings", "identity")},
    "key": ("key.pem", keys.load),
    "certificate": ("certificate.pem", first_certificate),
}


@pytest.mark.parametrize("what", BOUNDED)
def test_a_large_file_is_refused_before_it_fills_the_memory(tmp_path, what):
    name, reads = BOUNDED[what]
    with (tmp_path / name).open("wb") as file:
        file.truncate(3 << 40)  # it takes no room on the disk, and more than any memory
    (tmp_path / name).chmod(0o600)
    with pytest.raises(FedpeftError, match=f"{name}.* it has more than 1,048,576 bytes"):
        reads(tmp_path / name)


# /dev/zero is open to others, for which a key is refused before it is read.
@pytest.mark.parametrize(
    ("what", "pipe"), [*((what, True) for what in BOUNDED), *((what, False) for what in BOUNDED if what != "key")]
)
def test_a_device_or_pipe_is_refused_at_once(tmp_path, what, pipe):
    name, reads = BOUNDED[what]
    if pipe:  # which nobody writes to: opening it would wait for ever
        os.mkfifo(tmp_path / name, 0o600)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(FedpeftError, match=f"{name}.* it is a device or a pipe; name a regular file"):
        reads(tmp_path / name)


def test_the_most_bytes_are_read_and_a_folder_is_named_as_one(tmp_path):
    (tmp_path / "run.toml").write_text(RUN + "#" * (text_files.MOST_BYTES - len(RUN.encode())), encoding="utf-8")
    assert run_file(tmp_path / "run.toml") == ("cat", "caf\u00e9")
    with pytest.raises(ConfigInvalid, match=r"cannot read run file .*: Is a directory"):
        run_file(tmp_path)
    (tmp_path / "a.index.json").symlink_to("/dev/zero")
    with pytest.raises(DataInvalid, match="it is a device or a pipe"):
        open_source(tmp_path / "a.index.json")


def test_an_audit_log_of_one_line_without_end_and_one_that_is_no_file_are_refused(tmp_path):
    with (tmp_path / "audit.jsonl").open("wb") as file:
        file.truncate(3 << 40)
    with pytest.raises(FedpeftError, match=r"audit\.jsonl:1"):
        audit._of_file(tmp_path / "audit.jsonl")
    (tmp_path / "device").symlink_to("/dev/zero")
    with pytest.raises(SettingsInvalid, match="device cannot be read: it is a device or a pipe"):
        audit._of_file(tmp_path / "device")
