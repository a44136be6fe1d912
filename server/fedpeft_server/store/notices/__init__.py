"""Notices: daemons on one database tell each other what changed."""
