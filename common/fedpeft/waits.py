"""How long client and server let each other wait, at most; what only one of them waits for, each names itself."""

HOLD_S = 20.0
"""The server holds a call for so long before it says what it waits for: in AwaitRound, for a turn, for a receipt."""
STALL_S = 60.0
"""Either side lets a transfer make no progress for so long, then it is broken off and continued."""
