"""Adapter versions and the strategies' states, in a folder or an object store."""
