"""The round engine: the pure state machine of `fedpeft.rounds` with time, storage and clients around it."""
