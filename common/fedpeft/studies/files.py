"""Names of the files that a study leaves.

OUT/study.json               the cells of the last execution, in order
OUT/cells/KEY/cell.json      what a cell is
OUT/cells/KEY/report.json    what came out (see `fedpeft.simulation`), beside adapter.safetensors and records.jsonl
OUT/cells/KEY/failure.json   why nothing came out
OUT/cells/KEY/log.txt        what its process wrote
OUT/cells/KEY/tracked.json   trackers that have all of its rounds
OUT/report/                  the report
"""

STUDY, CELLS = "study.json", "cells"
CELL, REPORT, RECORDS = "cell.json", "report.json", "records.jsonl"
FAILURE, LOG, TRACKED = "failure.json", "log.txt", "tracked.json"
