"""The contents of messages and files: adapter specs, payloads, updates, adapter files. NumPy only."""
