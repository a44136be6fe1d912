"""Names of the groups of tensors that are a client's state; apart from `local_job`, so that no command needs NumPy."""

RESIDUAL = "residual"
"""The group of what earlier updates left unsent (error feedback); dropped with an update that was wrong."""

SENT = "privacy"
"""The group of what a client has spent of its privacy budget: the number of updates with noise that it has made."""

LOCAL = "local"
"""The group of the tensors that are trained here and never sent; its owner's, kept when the run is over."""

LASTING = frozenset({LOCAL, SENT})
"""The groups that are kept when the run is over: a server that says so must not give a budget back."""
