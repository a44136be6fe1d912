"""`fedpeft top`: runs, the round in progress and the clients at a glance, in a terminal.

`scene.py` says in words what is known, `feed.py` keeps it up to date, `app.py` puts it on the screen.
"""
