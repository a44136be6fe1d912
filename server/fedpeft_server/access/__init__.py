"""Access: callers, the rights of their roles, and the certificates that the server issues and shows."""
