"""A round: its state machine, the fold of its updates, the commit and its record. No network and no torch."""
