"""Bytes, shares and numbers of things in words for people, the same in every command, page and report."""

from __future__ import annotations

KIB = 1024
MIB = KIB * KIB


def size(count: int) -> str:
    """Returns a number of bytes for people, in binary units: `512 B`, `702.4 KiB`, `327.59 MiB`."""
    if count < KIB:
        return f"{count} B"
    if count < MIB:
        return f"{count / KIB:.1f} KiB"
    if count < KIB * MIB:
        return f"{count / MIB:.2f} MiB"
    return f"{count / (KIB * MIB):.2f} GiB"


def counted(number: float, thing: str, things: str = "") -> str:
    """Returns how many of something there are: `1 client`, `8,000 clients`; `things` where a plain s is not enough."""
    return f"{number:,.0f} {thing if number == 1 else things or thing + 's'}"


def as_much(ratio: float) -> str:
    """Returns how many times as much as something else it is: `as much`, `13,333 times as much`."""
    return "as much" if round(ratio) == 1 else f"{ratio:,.0f} times as much"


def mib(count: int) -> str:
    """Returns a number of bytes in MiB with three digits that say something."""
    value = count / MIB
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def percent(share: float | None) -> str:
    """Returns a share of 1 as per cent, or a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Returns a time for people: `42 s`, `12 min`, `3 h 05 min`, `6.9 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 72 else f"{minutes / 1440:.1f}".removesuffix(".0") + " days"
