"""`fedpeft demo`: a federation on this machine."""
