"""The reference of the protocol, from the protos: what is there, and the comments, which say what it means."""

import itertools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2 as pb
from grpc_tools import protoc

from generators.tables import table

PAGE = "protocol.md"
PROTOS = Path(__file__).resolve().parents[2] / "protos"
FIELD = pb.FieldDescriptorProto
ERROR, EXAMPLE = " " * 3, " " * 5

Comments = dict[tuple[int, ...], str]
"""Comments of one file by the path of what they are written above, as descriptor.proto defines paths."""


def lines() -> Iterator[str]:
    """Yields the services of all files, then the messages and enums of all files."""
    files = [(f, comments(f)) for f in descriptors()]
    for file, said in files:
        for i, service in enumerate(file.service):
            yield from _service(service, said, (6, i))
    for file, said in files:
        yield from (f"## Messages of `{Path(file.name).name}`", "")
        for i, message in enumerate(file.message_type):
            yield from _message(message, said, (4, i), message.name)
        for i, enum in enumerate(file.enum_type):
            yield from _enum(enum, said, (5, i), enum.name)


def descriptors() -> list[pb.FileDescriptorProto]:
    """Returns every file of the protocol, by name, with the places of its comments."""
    names = sorted(p.relative_to(PROTOS).as_posix() for p in PROTOS.glob("fedpeft/v1/*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        code = protoc.main(["protoc", f"-I{PROTOS}", f"-I{_well_known()}", f"-o{out}", "--include_source_info", *names])
        if code != 0:
            raise SystemExit("protoc could not read the protos")
        found = pb.FileDescriptorSet.FromString(out.read_bytes())
    return sorted((f for f in found.file if f.name in names), key=lambda f: f.name)


def _well_known() -> Path:
    return Path(protoc.__file__).parent / "_proto"


def comments(file: pb.FileDescriptorProto) -> Comments:
    """Returns what is written above each part of a file."""
    return {tuple(place.path): place.leading_comments for place in file.source_code_info.location}


def prose(comment: str) -> Iterator[str]:
    """Yields a comment as Markdown: lines indented by three are a call's errors, by five a layout or an example."""
    for indented, group in itertools.groupby(comment.splitlines(), _indentation):
        if indented == EXAMPLE:
            yield from ("```text", *(line.removeprefix(EXAMPLE) for line in group), "```")
        elif indented == ERROR:
            cells = [(*(f"`{c}`" for c in line[:2]), *line[2:], "")[:3] for line in map(_columns, group)]
            yield from ("", *table(("status", "reason", "when"), cells), "")
        else:
            yield from (line.removeprefix(" ").replace("<", "&lt;") for line in group)
    yield ""


def _indentation(line: str) -> str:
    """Returns the indentation that gives a line of a comment its kind; that of an error's second line is longer."""
    if re.match(EXAMPLE + r"\S", line):
        return EXAMPLE
    return ERROR if line.startswith(ERROR) else ""


def _columns(line: str) -> list[str]:
    """Returns the columns of an aligned line; a single space parts the last two where a reason is long."""
    columns = re.split(r" {2,}", line.strip(), maxsplit=2)
    if len(columns) == 2 and " " in columns[1] and not columns[1].isupper():
        columns[1:] = columns[1].split(" ", 1)
    return columns


def _service(service: pb.ServiceDescriptorProto, said: Comments, path: tuple[int, ...]) -> Iterator[str]:
    yield from (f"## {service.name}", "", *prose(said.get(path, "")))
    for i, call in enumerate(service.method):
        taken, given = (("stream " * s) + _link(t) for s, t in _ends(call))
        yield from (
            f"### {service.name}.{call.name}",
            "",
            f"{taken} → {given}",
            "",
            *prose(said.get((*path, 2, i), "")),
        )


def _ends(call: pb.MethodDescriptorProto) -> tuple[tuple[bool, str], tuple[bool, str]]:
    return (call.client_streaming, call.input_type), (call.server_streaming, call.output_type)


def _message(message: pb.DescriptorProto, said: Comments, path: tuple[int, ...], name: str) -> Iterator[str]:
    yield from (f"### {name}", "", *prose(said.get(path, "")))
    entries = {f".fedpeft.v1.{name}.{n.name}": n for n in message.nested_type if n.options.map_entry}
    if message.field:
        rows = (
            (f"`{f.name}`", str(f.number), _type(f, message, entries), _line(said.get((*path, 2, i), "")))
            for i, f in enumerate(message.field)
        )
        yield from (*table(("field", "number", "type", "meaning"), rows), "")
    for i, inner in enumerate(message.nested_type):
        if not inner.options.map_entry:
            yield from _message(inner, said, (*path, 3, i), f"{name}.{inner.name}")
    for i, enum in enumerate(message.enum_type):
        yield from _enum(enum, said, (*path, 4, i), f"{name}.{enum.name}")


def _enum(enum: pb.EnumDescriptorProto, said: Comments, path: tuple[int, ...], name: str) -> Iterator[str]:
    yield from (f"### {name}", "", *prose(said.get(path, "")))
    rows = ((f"`{v.name}`", str(v.number), _line(said.get((*path, 2, i), ""))) for i, v in enumerate(enum.value))
    yield from (*table(("value", "number", "meaning"), rows), "")


def _type(field: pb.FieldDescriptorProto, of: pb.DescriptorProto, entries: dict[str, pb.DescriptorProto]) -> str:
    """Returns the type of a field: `map<K, V>`, `repeated T`, `optional T`, one of several, or T."""
    if entry := entries.get(field.type_name):
        key, value = (_type(f, entry, {}) for f in entry.field)
        return f"map of {key} to {value}"
    plain = (
        _link(field.type_name) if field.type_name else f"`{FIELD.Type.Name(field.type).removeprefix('TYPE_').lower()}`"
    )
    if field.label == FIELD.LABEL_REPEATED:
        return f"repeated {plain}"
    if field.proto3_optional:
        return f"optional {plain}"
    if field.HasField("oneof_index"):
        return f"{plain}, one of `{of.oneof_decl[field.oneof_index].name}`"
    return plain


def _link(type_name: str) -> str:
    """Returns the name of a message or enum, linked to its section of this page if it has one."""
    name = type_name.removeprefix(".").removeprefix("fedpeft.v1.")
    if name.startswith("google."):
        return f"`{name}`"
    anchor = "".join(c for c in name.lower() if c.isalnum() or c in "-_")
    return f"[`{name}`](#{anchor})"


def _line(comment: str) -> str:
    return " ".join(comment.split()).replace("<", "&lt;")
