"""Schemes by which examples are assigned to clients, by name: what `[simulation]` and `fedpeft partition` accept."""

from __future__ import annotations

from typing import Literal, get_args

Scheme = Literal["iid", "dirichlet", "shards", "quantity", "natural"]
"""Scheme by which examples are assigned to clients; see `fedpeft.data.division`."""
DirichletVariant = Literal["class-first", "balanced", "client-first"]
QuantityVariant = Literal["dirichlet", "lognormal"]
Variant = Literal[DirichletVariant, QuantityVariant]

VARIANTS: dict[Scheme, tuple[str, ...]] = {
    "dirichlet": get_args(DirichletVariant),
    "quantity": get_args(QuantityVariant),
}
"""Variants of a scheme, the usual one first."""
OPTIONS: dict[Scheme, tuple[str, ...]] = {
    "iid": (),
    "dirichlet": ("alpha", "variant"),
    "shards": ("shards",),
    "quantity": ("alpha", "variant"),
    "natural": ("column",),
}
"""Options of a scheme; all but natural take the number of clients too."""


def variant_fault(scheme: Scheme, variant: str | None) -> str:
    """Returns the reason why a scheme has no such variant, as a clause; "" if it has."""
    known = VARIANTS.get(scheme, ())
    if variant is None or variant in known:
        return ""
    return f"{scheme} has no variant {variant!r}; there are: {', '.join(known) or 'none'}"
