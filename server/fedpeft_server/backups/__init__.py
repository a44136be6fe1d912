"""Copies of a server's data, made while it works and put back into an empty folder.

A backup is laid out as a data folder is, with `backup.json` beside it: the manifest, written last.
"""
