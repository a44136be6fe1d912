"""The table of LoRA's means: what is exact in it, and what is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .test_workload import BENCHMARKS


@pytest.mark.slow
def test_the_table_shows_which_means_are_exact() -> None:
    command = [sys.executable, "lora_means.py", "--rounds", "1", "--clients", "2", "--steps", "8"]
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=BENCHMARKS).stdout
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()[2:]]
    rows = {cells[0]: cells[1:] for cells in table}
    assert len(rows) == 12
    exact = {title for title, cells in rows.items() if float(cells[2]) < 1e-9}
    # Ranks 2 and 4 of the two clients fit into the 8 of the run.
    always = ("FFA", "RoLoRA", "FedEx", "FLoRA", "FlexLoRA, ranks")
    assert exact == {title for title in rows if title.startswith(always)}
    assert float(rows["FedIT"][2]) > float(rows["LoRA-FAIR"][2]) > float(rows["FlexLoRA"][2])
    up = {title: int(cells[0].replace(",", "")) for title, cells in rows.items()}
    assert up["FLoRA, ranks 2 4 8 8"] < up["FLoRA"] == up["FedEx-LoRA"] == up["FedIT"]
