"""Round policies, one file each; see `fedpeft.rounds.state_machine.RoundPolicy`."""

from fedpeft.rounds.state_machine import RoundPolicy, policies, policy_of

__all__ = ["RoundPolicy", "policies", "policy_of"]
