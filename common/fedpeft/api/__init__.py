"""The typed Python interface: create, watch, export and simulate runs."""
