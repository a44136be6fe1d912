"""Shared by daemons on one database: who waits with which, and which folds."""
