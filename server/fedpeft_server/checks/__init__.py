"""Checks of a server's data while it is stopped: `fedpeft-server check`."""
