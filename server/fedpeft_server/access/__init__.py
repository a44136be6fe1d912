"""Who may speak: who calls, what its role may do, and the certificates that the server issues and shows."""
