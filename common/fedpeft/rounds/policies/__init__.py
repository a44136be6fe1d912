"""Round policies, one file each; see `fedpeft.rounds.state_machine.RoundPolicy`."""

from fedpeft.rounds.state_machine import RoundPolicy, policies

__all__ = ["RoundPolicy", "policies"]
