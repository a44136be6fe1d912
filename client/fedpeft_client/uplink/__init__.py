"""The connection to the server: calls, retries, transfers."""
