"""Partitions of labelled data among simulated clients, and how skewed they came out. NumPy only, PCG64, seeded.

The same alpha means different worlds in different variants, so a partition keeps its variant, alpha, seed and a digest
of the assignment.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.labels import nfc
from fedpeft.data.sources.splits import splits_among
from fedpeft.errors import DataInvalid
from fedpeft.partition_schemes import DirichletVariant, QuantityVariant

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

MAX_DRAWS = 10
"""Draws of a random partition before one whose smallest client is too small is given up; more would bend the law."""

_SMALLEST_ALPHA = 1e-300
"""Below it logarithms of draws overflow; the distribution is one-hot long before."""


@dataclass(frozen=True)
class Partition:
    """Rows of each client.

    Attributes:
        parts: Rows of each client, ascending, int64; disjoint, together all rows.
        names: The clients' names.
        variant: The scheme, for example "dirichlet/class-first".
        alpha: Its parameter, None where it has none.
        seed: Its seed, None where nothing is drawn.
        draws: Number of draws.
    """

    parts: tuple[Indices, ...]
    names: tuple[str, ...]
    variant: str
    alpha: float | None = None
    seed: int | None = None
    draws: int = 1

    @property
    def digest(self) -> str:
        """The sha256 of the assignment, hexadecimal."""
        digest = sha256()
        for part in self.parts:
            digest.update(np.int64(len(part)).astype("<i8").tobytes())
            digest.update(part.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Skew:
    """Skew between clients, over those that have rows.

    Attributes:
        clients: Number of clients that have rows.
        total_variation: Mean over clients of half the L1 distance of their label shares to those of all rows, 0..1.
        jensen_shannon: Mean over clients of the Jensen-Shannon divergence of the same two distributions, in bits, 0..1.
        classes_per_client: Mean number of classes that a client has rows of.
        gini: Gini coefficient of the sizes; 0 where all are equal.
        effective_clients: (sum n)^2 / sum n^2.
        smallest: Rows of the smallest client.
        largest: Rows of the largest client.
    """

    clients: int
    total_variation: float
    jensen_shannon: float
    classes_per_client: float
    gini: float
    effective_clients: float
    smallest: int
    largest: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures by name."""
        return asdict(self)


def iid(rows: int, clients: int, seed: int) -> Partition:
    """Deals rows out at random; sizes differ by at most 1.

    Raises:
        DataInvalid: If there are fewer rows than clients.
    """
    _enough(rows, clients, 1)
    order = _generator(seed).permutation(rows)
    return _partition(np.array_split(order, clients), "iid", None, seed)


def dirichlet(
    labels: Indices,
    clients: int,
    alpha: float,
    seed: int,
    variant: DirichletVariant = "class-first",
    min_rows: int = 1,
) -> Partition:
    """Skews labels by Dirichlet draws.

    class-first: for each class, shares over clients ~ Dir(alpha 1_clients), and the class is split accordingly.
    balanced: the same, but a client that has its mean share already gets no more (Yurochkin et al., arXiv 1905.12022).
    client-first: each client draws its shares of classes ~ Dir(alpha 1_classes) and then labels from them until it has
    its equal share, passing over exhausted classes (Hsu et al., arXiv 1909.06335).

    Args:
        labels: int64[rows].
        clients: Number of clients.
        alpha: Concentration, above 0.
        seed: Of the draws.
        variant: The scheme.
        min_rows: Fewest rows of a client.

    Raises:
        DataInvalid: If no draw of `MAX_DRAWS` gives every client `min_rows`.
    """
    if not (alpha > 0 and np.isfinite(alpha)):
        raise DataInvalid(f"alpha is {alpha}; a finite number above 0 is needed")
    split = {"class-first": _class_first, "balanced": _balanced, "client-first": _client_first}[variant]
    return _drawn(
        len(labels), clients, min_rows, f"dirichlet/{variant}", alpha, seed, lambda g: split(labels, clients, alpha, g)
    )


def quantity(
    rows: int, clients: int, alpha: float, seed: int, variant: QuantityVariant = "dirichlet", min_rows: int = 1
) -> Partition:
    """Skews sizes and leaves labels alone.

    Args:
        rows: Number of rows.
        clients: Number of clients.
        alpha: Concentration of sizes ~ Dir(alpha 1), or sigma of sizes ~ lognormal(0, sigma).
        seed: Of the draws.
        variant: The distribution of the sizes.
        min_rows: Fewest rows of a client.

    Raises:
        DataInvalid: If no draw of `MAX_DRAWS` gives every client `min_rows`.
    """
    if not (alpha > 0 and np.isfinite(alpha)):
        raise DataInvalid(f"alpha is {alpha}; a finite number above 0 is needed")

    def split(generator: np.random.Generator) -> list[Indices]:
        logs = (
            _log_gammas(alpha, clients, generator) if variant == "dirichlet" else alpha * generator.normal(size=clients)
        )
        return _split(generator.permutation(rows), _softmax(logs))

    return _drawn(rows, clients, min_rows, f"quantity/{variant}", alpha, seed, split)


def shards(labels: Indices, clients: int, shards: int, seed: int) -> Partition:
    """Gives every client so many shards, runs of equal length of the rows in the order of their labels.

    Few shards mean few classes a client: the pathological split of the FedAvg paper (1602.05629, section 3) has two.

    Args:
        labels: int64[rows].
        clients: Number of clients.
        shards: Shards of each client, at least 1.
        seed: Of the order of rows with the same label, and of who gets which shards.

    Raises:
        DataInvalid: If there are fewer rows than shards.
    """
    _enough(len(labels), clients, shards)
    generator = _generator(seed)
    mixed = generator.permutation(len(labels))
    ordered = mixed[np.argsort(labels[mixed], kind="stable")]
    pieces = np.array_split(ordered, clients * shards)
    dealt = generator.permutation(len(pieces)).reshape(clients, shards)
    return _partition([np.concatenate([pieces[k] for k in own]) for own in dealt], f"shards/{shards}", None, seed)


def natural(values: Sequence[object], column: str) -> Partition:
    """Makes each distinct value of a column a client, in the order of their names; texts are compared in NFC.

    Raises:
        DataInvalid: If a value is missing, two values have one name, or all are names of splits.
    """
    groups: dict[object, list[int]] = {}
    for row, value in enumerate(values):
        if value is None:
            raise DataInvalid(f"column {column!r} has no value in row {row}; every row must belong to a client")
        groups.setdefault(nfc(value) if isinstance(value, str) else value, []).append(row)
    named = sorted((str(value), rows) for value, rows in groups.items())
    names = tuple(name for name, _ in named)
    if len(set(names)) < len(names):
        same = next(name for name, after in itertools.pairwise(names) if name == after)
        raise DataInvalid(
            f"two different values of column {column!r} are both written {same!r}; rename one of them in the data"
        )
    if len(splits := splits_among(names)) == len(names):
        raise DataInvalid(
            f"column {column!r} holds splits ({', '.join(list(splits)[:5])}), which are no clients; name the column "
            "that says whose a row is"
        )
    return Partition(tuple(np.array(rows, np.int64) for _, rows in named), names, f"natural/{column}")


def skew(labels: Indices, parts: Sequence[Indices], classes: int) -> Skew:
    """Measures how far the parts differ in labels and sizes.

    Args:
        labels: int64[rows], each below `classes`.
        parts: Rows of each client.
        classes: Number of classes.

    Raises:
        DataInvalid: If no part has rows.
    """
    counts = np.array([np.bincount(labels[part], minlength=classes) for part in parts if len(part)], np.float64)
    if not len(counts):
        raise DataInvalid("the partition has no rows")
    sizes = counts.sum(1)
    distributions = counts / sizes[:, None]
    whole = counts.sum(0) / sizes.sum()
    middle = (distributions + whole) / 2
    ordered, n = np.sort(sizes), len(sizes)
    return Skew(
        clients=n,
        total_variation=float(np.abs(distributions - whole).sum(1).mean() / 2),
        jensen_shannon=float(((_divergence(distributions, middle) + _divergence(whole, middle)) / 2).mean()),
        classes_per_client=float((counts > 0).sum(1).mean()),
        gini=float(2 * (np.arange(1, n + 1) * ordered).sum() / (n * ordered.sum()) - (n + 1) / n),
        effective_clients=float(sizes.sum() ** 2 / (sizes**2).sum()),
        smallest=int(ordered[0]),
        largest=int(ordered[-1]),
    )


def _divergence(p: Floats, q: Floats) -> Floats:
    """Returns Kullback-Leibler divergences in bits along the last axis."""
    p = np.broadcast_to(p, q.shape)
    ratio = np.divide(p, q, out=np.ones_like(q), where=p > 0)
    return np.asarray((p * np.log2(ratio)).sum(-1), np.float64)


def _drawn(
    rows: int,
    clients: int,
    min_rows: int,
    variant: str,
    alpha: float,
    seed: int,
    split: Callable[[np.random.Generator], list[Indices]],
) -> Partition:
    """Draws until every client has enough."""
    _enough(rows, clients, min_rows)
    generator = _generator(seed)
    smallest = 0
    for draw in range(1, MAX_DRAWS + 1):
        parts = split(generator)
        if min(map(len, parts)) >= min_rows:
            return _partition(parts, variant, alpha, seed, draw)
        smallest = max(smallest, min(map(len, parts)))
    raise DataInvalid(
        f"{variant} with alpha {alpha:g} gave no partition of {rows} rows in which each of {clients} clients has "
        f"{min_rows} (best of {MAX_DRAWS} draws: {smallest}); take fewer clients or a larger alpha"
    )


def _enough(rows: int, clients: int, min_rows: int) -> None:
    if clients < 1:
        raise DataInvalid(f"{clients} clients; at least 1 is needed")
    if rows < clients * min_rows or rows < 1:
        raise DataInvalid(f"{rows} rows are too few for {clients} clients of at least {min_rows}")


def _partition(parts: Sequence[Indices], variant: str, alpha: float | None, seed: int, draws: int = 1) -> Partition:
    width = len(str(len(parts) - 1))
    names = tuple(f"client-{k:0{width}}" for k in range(len(parts)))
    ordered = tuple(np.sort(part).astype(np.int64) for part in parts)
    return Partition(ordered, names, variant, alpha, seed, draws)


def _generator(seed: int) -> np.random.Generator:
    """PCG64 by name: `default_rng` may become another generator.

    NumPy promises its bits for all versions, but not what `permutation` and the like make of them; the digest tells.
    """
    return np.random.Generator(np.random.PCG64(seed))


def _class_first(labels: Indices, clients: int, alpha: float, generator: np.random.Generator) -> list[Indices]:
    splits = []
    for k in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == k))
        splits.append(_split(rows, _softmax(_log_gammas(alpha, clients, generator))))
    return [np.concatenate(parts) for parts in zip(*splits, strict=True)]


def _balanced(labels: Indices, clients: int, alpha: float, generator: np.random.Generator) -> list[Indices]:
    splits, sizes = [], np.zeros(clients, np.int64)
    for k in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == k))
        logs = _log_gammas(alpha, clients, generator)
        splits.append(_split(rows, _softmax(np.where(sizes < len(labels) / clients, logs, -np.inf))))
        sizes += [len(part) for part in splits[-1]]
    return [np.concatenate(parts) for parts in zip(*splits, strict=True)]


def _client_first(labels: Indices, clients: int, alpha: float, generator: np.random.Generator) -> list[Indices]:
    classes = np.unique(labels)
    pools = [generator.permutation(np.flatnonzero(labels == k)) for k in classes]
    left = np.array([len(pool) for pool in pools])
    parts = []
    for size in (len(chunk) for chunk in np.array_split(np.arange(len(labels)), clients)):
        logs = _log_gammas(alpha, len(classes), generator)
        taken: list[Indices] = []
        while (missing := size - sum(map(len, taken))) > 0:
            # Draws of a class beyond what is left of it are made again among the other classes.
            wanted = generator.multinomial(missing, _softmax(np.where(left > 0, logs, -np.inf)))
            for k in np.flatnonzero(wanted):
                count = min(int(wanted[k]), int(left[k]))
                taken.append(pools[k][left[k] - count : left[k]])
                left[k] -= count
        parts.append(np.concatenate(taken) if taken else np.empty(0, np.int64))
    return parts


def _split(rows: Indices, shares: Floats) -> list[Indices]:
    """Cuts rows by shares; the cuts are rounded, not floored, so that no client gets the leftovers of all."""
    splits = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
    return np.split(rows, np.clip(splits, 0, len(rows)))


def _log_gammas(alpha: float, n: int, generator: np.random.Generator) -> Floats:
    """Returns logarithms of n draws of Gamma(alpha), as Gamma(alpha + 1) U^(1/alpha).

    Their softmax is Dirichlet, and does not underflow as the draws themselves do for alpha below about 0.01.
    """
    uniform = np.log1p(-generator.random(n))
    return np.asarray(np.log(generator.gamma(alpha + 1, size=n)) + uniform / max(alpha, _SMALLEST_ALPHA), np.float64)


def _softmax(logs: Floats) -> Floats:
    with np.errstate(under="ignore"):
        weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum(), np.float64)
