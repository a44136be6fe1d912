"""Longest waits of client and server for each other; a wait of only one of them is named there."""

HOLD_S = 20.0
"""The server holds a call for so long before it says what it waits for: in AwaitRound, for a turn, for a receipt."""
LONGEST_HOLD_S = 600.0
"""So long the server may hold AwaitRound of a client that agreed to it, because many clients wait."""
STALL_S = 60.0
"""Either side lets a transfer make no progress for so long, then it is broken off and continued."""
