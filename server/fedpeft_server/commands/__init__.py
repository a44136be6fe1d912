"""The commands beside the daemon, which make and replace its certificates."""
