"""fedpeft study run --over-network: a cell held by a server and agents has the bits of the simulated one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeft_operator.app import main

from ...studies.study_texts import STUDY, pets, study_file

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def test_a_cell_has_the_same_bits_and_scores_over_the_network_as_simulated(tmp_path):
    text = STUDY.replace("clients = 3", 'clients = 3\nexamples = 24\nheld_out = 7\npartition = "shards"')
    command = ["study", "run", str(study_file(tmp_path, text)), "--data", str(pets(tmp_path / "pets"))]
    command += ["--device", "cpu", "--only", "method=lora 2", "--seed", "1", "--out", str(tmp_path / "out")]
    for flags in ([], ["--over-network"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, *flags])
        assert ended.value.code == 0
    over, simulated = sorted(
        (tmp_path / "out" / "cells").iterdir(), key=lambda each: "over_network" not in (each / "cell.json").read_text()
    )
    assert "over_network" not in (simulated / "cell.json").read_text()
    tensors = [load_file(each / "adapter.safetensors") for each in (over, simulated)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(np.array_equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    reports = [json.loads((each / "report.json").read_text()) for each in (over, simulated)]
    scores = [[row["metrics"]["accuracy"] for row in report["rounds"]] for report in reports]
    assert scores[0] == scores[1]
    assert reports[0]["partition"]["digest"] == reports[1]["partition"]["digest"]
    for row in reports[0]["rounds"]:
        assert row["wire_bytes_up"] > row["payload_bytes_up"] > 0
    assert not (over / "network").exists()
