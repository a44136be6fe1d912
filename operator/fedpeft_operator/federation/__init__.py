"""A federation of processes on this machine: the processes, and their server."""
