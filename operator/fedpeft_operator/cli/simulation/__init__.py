"""`fedpeft simulate`: a run file's federation on one machine, without a server."""
