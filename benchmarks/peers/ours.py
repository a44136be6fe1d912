"""FedPEFT's simulation under the engine that the environment names."""

import os
import tempfile
from pathlib import Path

import torch
from PIL import Image
from same_work import BATCH, CLIENTS, DECAY, DEPTH, MOMENTUM, RATE, ROUNDS, SIDE, ended, pixels

from fedpeft.config import parse_config
from fedpeft.simulation import simulate


def folders(place: Path) -> Path:
    """Writes a folder of classes for each client."""
    for client in range(CLIENTS):
        images, labels = pixels(client)
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = place / f"client-{client}" / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{row}.png", compress_level=1)
    return place


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        data = folders(Path(name) / "data")
        config = parse_config(
            {
                "name": "workload",
                "model": {
                    "name": "vit_tiny_patch16_224",
                    "weights": "none",
                    "image_size": SIDE,
                    "depth": DEPTH,
                    "classes": [str(label) for label in range(10)],
                },
                "peft": {"method": "bias"},
                "rounds": {"count": ROUNDS, "clients": CLIENTS},
                "training": {
                    "batch_size": BATCH,
                    "learning_rate": RATE,
                    "momentum": MOMENTUM,
                    "weight_decay": DECAY,
                    "augmentation": "none",
                    "precision": "float32",
                },
                "simulation": {"engine": os.environ["ENGINE"], "clients": CLIENTS},
            }
        )
        clients = {path.name: path for path in sorted(data.iterdir())}
        simulate(config, clients, Path(name) / "out", committed=lambda row: ended(row["version"]), device="cpu")
