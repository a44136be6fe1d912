"""`fedpeft run`: one module a command."""
