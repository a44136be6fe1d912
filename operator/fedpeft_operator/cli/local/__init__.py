"""Commands that ask no server, and those that start another program."""
