"""Names of the groups of tensors that are a client's state; apart from `local_job`, so that no command needs NumPy."""

RESIDUAL = "residual"
"""The group of what earlier updates left unsent (error feedback); dropped with an update that was wrong."""

LOCAL = "local"
"""The group of the tensors that are trained here and never sent; its owner's, kept when the run is over."""
