"""`fedpeft study`: plan, run and report studies, and compare what came of runs."""
