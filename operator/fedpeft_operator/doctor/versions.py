"""Checks that the installed packages are new enough."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib import metadata

from fedpeft import PROTOCOL, __version__
from fedpeft_operator.doctor.findings import Finding, Setup, fault, ok

_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?(?:>=([0-9.]+))?[^;]*(?:; *extra == ['\"](\w+)['\"])?")


def check_versions(setup: Setup) -> Iterator[Finding]:
    """Looks at Python, at what FedPEFT needs always, and at what the side that is examined needs besides."""
    yield ok("fedpeft", f"{__version__}, protocol {PROTOCOL}, Python {platform.python_version()}")
    extras = {"": True, "server": setup.data_dir is not None, "train": bool(setup.state_dir or setup.data)}
    for extra, wanted in extras.items():
        if wanted:
            yield from _check(extra)


def _check(extra: str) -> Iterator[Finding]:
    found = []
    for name, least in requirements(extra):
        package = f'pip install "fedpeft[{extra}]"' if extra else "pip install --upgrade fedpeft"
        try:
            there = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield fault("packages", f"{name} is not installed", package)
            continue
        if numbers(there) < numbers(least):
            yield fault("packages", f"{name} {there} is older than {least}, which this version needs", package)
        else:
            found.append(f"{name} {there}")
    if found:
        yield ok("packages", ", ".join(found))


def requirements(extra: str) -> list[tuple[str, str]]:
    """Returns the packages of an extra, or of the base, each with its least version."""
    found = []
    for line in metadata.requires("fedpeft") or ():
        match = _REQUIREMENT.fullmatch(line.strip())
        if match and (match[3] or "") == extra and match[1] != "fedpeft":
            found.append((match[1], match[2] or "0"))
    return found


def numbers(version: str) -> tuple[int, ...]:
    """Returns the numbers that a version begins with, for a comparison."""
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
