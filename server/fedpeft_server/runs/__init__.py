"""Runs: the state machine of `fedpeft.rounds.state_machine` with time, storage and clients around it."""
