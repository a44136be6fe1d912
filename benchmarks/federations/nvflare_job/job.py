"""Writes a NVFlare job in which each client adds one to a vector: `job.py FOLDER ROUNDS CLIENTS FIRST.npy SECONDS`."""

import sys
from pathlib import Path

from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

recipe = NumpyFedAvgRecipe(
    name="adds",
    initial_ckpt=sys.argv[4],
    min_clients=int(sys.argv[3]),
    num_rounds=int(sys.argv[2]),
    train_script=str(Path(__file__).with_name("client.py")),
    train_args=sys.argv[5],
)
recipe.export(sys.argv[1])
