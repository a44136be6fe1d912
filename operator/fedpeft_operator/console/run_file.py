"""A run file that was typed or uploaded: what is wrong with it, in which line; and the run that it makes."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft import text_files
from fedpeft.api.initial_version import first_version
from fedpeft.api.operator_client import Connect
from fedpeft.config import RunConfig, parse_config
from fedpeft.config_errors import line_of
from fedpeft.errors import ConfigInvalid, FedpeftError
from fedpeft.v1 import run_pb2

_LINE = re.compile(r"\(at line ([0-9]+), column [0-9]+\)")


@dataclass(frozen=True, slots=True)
class LineFault:
    """A fault in a line of a run file.

    Attributes:
        line: Number of the line, from 1; 0 if it is not of one line.
        field: Dotted path; empty if it is not of one field.
        text: A sentence.
    """

    line: int
    field: str
    text: str


class RunFileInvalid(Exception):
    """A run file that does not make a run.

    Attributes:
        faults: At least one.
    """

    def __init__(self, faults: Sequence[LineFault]) -> None:
        super().__init__("; ".join(fault.text for fault in faults))
        self.faults = faults


def read(text: str) -> RunConfig:
    """Reads a run file.

    Raises:
        RunFileInvalid: If it is not TOML or breaks a rule.
    """
    try:
        data = text_files.toml(text)
    except ValueError as error:
        at = _LINE.search(str(error))
        raise RunFileInvalid([LineFault(int(at[1]) if at else 0, "", f"this is not TOML: {error}")]) from None
    try:
        return parse_config(data)
    except ConfigInvalid as error:
        raise RunFileInvalid(_in_lines(text, error)) from None


def missing_part() -> str:
    """Returns why no run can be created here, in a sentence; empty if one can."""
    for module in ("torch", "timm"):
        if importlib.util.find_spec(module) is None:
            return (
                f"Creating a run builds its model, and {module} is not installed beside this console. Create it with "
                "the command line where it is: fedpeft run create FILE"
            )
    return ""


async def create(text: str, request_id: str, connect: Connect) -> run_pb2.Run:
    """Builds version 0 of the run that a file describes and uploads it.

    Args:
        text: The run file.
        request_id: Makes a repetition safe.
        connect: Makes a client of the server.

    Raises:
        RunFileInvalid: If the file, its model or its weights are wrong.
        FedpeftError: If the server cannot be reached or does not take the run.
    """
    config = read(text)
    async with connect() as server:
        await server.check()  # building takes long; a server that is away is found now
        try:
            first = await asyncio.to_thread(first_version, config)
            return await server.create_run(
                config, first.spec, first.fingerprint, first.tensors, first.model_parameters, request_id=request_id
            )
        except FedpeftError as error:
            if not error.fields:
                raise
            raise RunFileInvalid(_in_lines(text, error)) from None


def _in_lines(text: str, error: FedpeftError) -> list[LineFault]:
    faults = [LineFault(line_of(text, field), field, said) for field, said in error.fields]
    return sorted(faults, key=lambda fault: fault.line) or [LineFault(0, "", error.message)]
