"""Image classification with timm's models; the task of a run whose `model.name` has no colon."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from timm.data.config import resolve_data_config
from torch import nn

from fedpeft.config import ModelConfig
from fedpeft.data.dataset import Batch as Rows
from fedpeft.data.dataset import ImageDataset, dataset_of
from fedpeft.data.reading import USUAL, Reading
from fedpeft.data.sources.interface import Selection, Source
from fedpeft.data.sources.opening import open_source
from fedpeft.data.store import CACHE_BYTES
from fedpeft.data.transforms import ImageInputs, Preprocessing, RunModel, augment
from fedpeft.errors import ModelInvalid
from fedpeft.models.checkpoints import from_hub
from fedpeft.models.families import family_of, timm_arguments, timm_model
from fedpeft.models.halves import Halves
from fedpeft.models.structure import ModelStructure, State
from fedpeft.models.tasks.registry import IMAGES, tasks
from fedpeft.models.tasks.task import Batch, Classification, LabelMap, Pass

_log = structlog.get_logger(__name__)


@tasks.register(IMAGES)
class ImageClassification(Classification):
    """Images of a folder or of parquet, augmented in training, normalised on the device.

    Args:
        reading: Settings of their reading.
    """

    example: ClassVar[str] = "image"

    def __init__(self, reading: Reading = USUAL) -> None:
        self._reading = reading

    def module(self, config: ModelConfig) -> nn.Module:
        """See `Task.module`."""
        return timm_model(config.name, **timm_arguments(config))

    def structure(self, module: nn.Module, config: ModelConfig) -> ModelStructure:
        """See `Task.structure`."""
        return family_of(config.name).structure(module)

    def halves(self, module: nn.Module, config: ModelConfig, parts: int) -> Halves | None:
        """See `Task.halves`."""
        return family_of(config.name).halves(module, parts)

    def pretrained(self, config: ModelConfig) -> State:
        """See `Task.pretrained`."""
        return from_hub(config.name)

    def convert(self, checkpoint: State, module: nn.Module, config: ModelConfig) -> State:
        """See `Task.convert`."""
        return family_of(config.name).convert(checkpoint, module)

    def images(self, module: nn.Module, config: ModelConfig) -> ImageInputs:
        """Returns the model's own, from timm."""
        own: dict[str, Any] = resolve_data_config({}, model=module)  # type: ignore[no-untyped-call]
        mean, std = (tuple(map(float, own[key])) for key in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ModelInvalid(f"{config.name} takes {len(mean)} channels; images have 3")
        size = config.image_size or int(own["input_size"][-1])
        return ImageInputs(size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), str(own["interpolation"]))

    def reading(self, options: Reading) -> Self:
        """See `Task.reading`."""
        return type(self)(options)

    def read(self, path: Path) -> Source:
        """See `Task.read`; what of a folder is not read goes to the log."""
        source = open_source(path, self._reading.image_column, self._reading.label_column)
        for line in source.inventory.lines():
            _log.warning(line, data=str(path))
        return source

    def select(self, source: Source, rows: NDArray[np.int64]) -> Source:
        """See `Task.select`."""
        return Selection(source, rows)

    def dataset(
        self, source: Source, model: RunModel, label_map: LabelMap, cache_bytes: int | None = None
    ) -> ImageDataset:
        """See `Task.dataset`."""
        kept = CACHE_BYTES if cache_bytes is None else cache_bytes
        wanted = Preprocessing.of(model, self._reading.max_image_pixels)
        cache = self._reading.pixel_cache
        return dataset_of(
            source, model.config.classes, wanted, label_map=label_map, cache_bytes=kept, pixel_cache=cache
        )

    def collate(self, rows: Rows, training: Pass | None) -> Batch:
        """Returns pixels, uint8[n, 3, side, side], and labels, int64[n]; augmented in training."""
        pixels = rows.pixels
        if training is not None:
            pixels = augment(pixels, rows.rows, training.settings.augmentation, training.seed, training.number)
        return {"values": torch.from_numpy(pixels), "labels": rows.labels}

    def transform(self, batch: Batch, data: ImageDataset) -> Batch:
        """Normalises, on the device because pixels are the fewer bytes; on a GPU channels last, as the model is."""
        values = data.preprocessing.normalise(batch["values"])
        layout = torch.channels_last if values.is_cuda else torch.contiguous_format
        return {**batch, "values": values.contiguous(memory_format=layout)}
