"""The server: a daemon that holds rounds and folds updates; no torch, no model code."""
