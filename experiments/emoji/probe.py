"""A linear probe on the demo's data: the backbone's features against those of random weights.

    python experiments/emoji/probe.py --weights backbone.safetensors

Training rows of all vendors, test rows of emoji that are in no vendor's training rows. Features are taken once, without
augmentation, and standardised by the training rows; the probe is a softmax regression whose weight decay is chosen
among three on a fifth of the training emoji, then fitted on all of them.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.transforms import v2

NAME, DEPTH, IMAGE_SIZE = "vit_small_patch14_dinov2", 9, 56
DECAYS = (1e-3, 1e-2, 1e-1)


def load(path: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor, list[str]]:
    """Images [N, 3, 56, 56] (resized), labels [N] and emoji of a parquet file."""
    rows = pq.read_table(path).to_pylist()
    to_tensor = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(IMAGE_SIZE),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )
    images = [to_tensor(Image.open(BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    return torch.stack(images), torch.tensor([r["label"] for r in rows]), [r["emoji"] for r in rows]


def build(weights: Path | None) -> nn.Module:
    """The nine-block ViT at 56 pixels, random where no `weights` are given, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, depth=DEPTH, img_size=IMAGE_SIZE, num_classes=0)
    if weights is not None:
        model.load_state_dict(checkpoint_filter_fn(load_file(weights), model))
    return model.eval()


@torch.inference_mode()
def features(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Features [N, 384] by pooling: `token` is the class token, `avg` the mean of the patches."""
    tokens = [model.forward_features(batch) for batch in images.split(128)]
    pooled = {"token": [t[:, 0] for t in tokens], "avg": [t[:, 1:].mean(1) for t in tokens]}
    return {pool: torch.cat(parts).clone() for pool, parts in pooled.items()}


def fit(x: Tensor, y: Tensor, decay: float) -> nn.Linear:
    """Softmax regression of `y` [N] on `x` [N, D], to convergence."""
    probe = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(probe(x), y) + decay / 2 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe


def accuracy(probe: nn.Linear, x: Tensor, y: Tensor) -> float:
    """The share of `y` that `probe` gets right."""
    return float((probe(x).argmax(1) == y).float().mean())


def probe_accuracy(train: tuple[Tensor, Tensor, list[str]], test: tuple[Tensor, Tensor]) -> float:
    """Test accuracy of a linear probe whose weight decay was chosen on held-out training emoji."""
    (x, y, emoji), (test_x, test_y) = train, test
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, test_x = (x - mean) / std, (test_x - mean) / std
    held_emoji = set(sorted(set(emoji))[::5])
    held = torch.tensor([name in held_emoji for name in emoji])
    scores = {d: accuracy(fit(x[~held], y[~held], d), x[held], y[held]) for d in DECAYS}
    return accuracy(fit(x, y, max(scores, key=lambda d: scores[d])), test_x, test_y)


def main() -> None:
    """Print test accuracy by weights and pooling."""
    parser = argparse.ArgumentParser(description="Linear probe of the demo's backbone.")
    parser.add_argument("--weights", type=Path, required=True, help="what backbone.py wrote")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()
    cfg = timm.get_pretrained_cfg(NAME)
    x, y, emoji = load(arguments.data / "train.parquet", cfg.mean, cfg.std)
    test_x, test_y, _ = load(arguments.data / "test.parquet", cfg.mean, cfg.std)
    commonest = float((test_y == y.bincount().argmax()).float().mean())
    print(f"{len(y)} training rows, {len(test_y)} test rows of unseen emoji")
    print(f"always the commonest class: {commonest:.1%}\n\n{'weights':14}{'token':>8}{'avg':>8}")
    for label, weights in (("random", None), ("pre-trained", arguments.weights)):
        model = build(weights)
        seen, unseen = features(model, x), features(model, test_x)
        scores = [probe_accuracy((seen[pool], y, emoji), (unseen[pool], test_y)) for pool in seen]
        print(f"{label:14}" + "".join(f"{score:8.1%}" for score in scores))


if __name__ == "__main__":
    main()
