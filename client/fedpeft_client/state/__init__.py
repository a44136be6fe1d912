"""State that outlives the process: pending updates, adapters, runs."""
