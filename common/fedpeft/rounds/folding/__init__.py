"""Folding: the updates of a round become the next version, or a sum for a parent's server."""
