"""What outlives a process: the database, adapter versions, spooled updates."""
