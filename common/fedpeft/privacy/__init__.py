"""Bounds on a client's part of a version: transforms of updates, and the events that accountants fold over."""
