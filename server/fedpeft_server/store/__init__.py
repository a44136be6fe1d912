"""Durable state: the database, adapter versions, spooled updates."""
