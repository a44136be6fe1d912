"""Local training and evaluation of a model on one client's data."""
