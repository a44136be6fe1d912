"""SQL about leases, by the database's clock; each function is a part of the caller's transaction."""

from __future__ import annotations

from sqlalchemy import Connection, text

from fedpeft_server.store.queries.clock import select_now
from fedpeft_server.store.rows import LeaseLost

_TAKE = text(
    "INSERT INTO leases (run, holder, epoch, expires_at) VALUES (:run, :holder, 1, :until) "
    "ON CONFLICT (run) DO UPDATE SET holder = :holder, epoch = leases.epoch + 1, expires_at = :until "
    "WHERE leases.holder = :holder OR leases.expires_at <= :now RETURNING epoch"
)
_PROLONG = text("UPDATE leases SET expires_at = :until WHERE run = :run AND holder = :holder AND epoch = :epoch")
_IS_HELD = text("SELECT epoch FROM leases WHERE run = :run FOR SHARE")


def take(connection: Connection, run: str, holder: str, seconds: float) -> int | None:
    """Takes the lease of a run unless another holds it; returns its epoch, which every taking raises; None if not."""
    now = select_now(connection)
    taken = connection.execute(_TAKE, {"run": run, "holder": holder, "now": now, "until": now + seconds})
    epoch = taken.scalar_one_or_none()
    return None if epoch is None else int(epoch)


def prolong(connection: Connection, run: str, holder: str, epoch: int, seconds: float) -> bool:
    """Has a lease end so many seconds from now, with 0 at once; returns False if it is another's by now."""
    values = {"run": run, "holder": holder, "epoch": epoch, "until": select_now(connection) + seconds}
    return connection.execute(_PROLONG, values).rowcount == 1


def check(connection: Connection, run: str, epoch: int) -> None:
    """Sees to it that nobody has taken the lease of a run since it had an epoch, nor does until the transaction ends.

    Raises:
        LeaseLost: If somebody has.
    """
    if connection.execute(_IS_HELD, {"run": run}).scalar_one_or_none() != epoch:
        raise LeaseLost(f"another server folds {run}")
