"""Studies: a run file varied along axes, its cells simulated in parallel, and a report of what came out.

study_file    the file, with bases and scales        results       figures of cells: curves, means, intervals
cells         combinations, each with its identity   plan          bytes and time before anything runs
execution     cells in processes, resumed, isolated  report        one HTML page, figures, CSV, LaTeX
"""
