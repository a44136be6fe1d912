"""Work on data, by kind of model: reading it, giving it the run's labels, training on it, scoring on it.

Whoever trains asks the learner of a kind and knows no more of it. Images have their own, made for GPUs and millions of
pictures; the loop of any other kind is its own (`fedpeft.models.kind`), and what stands around it is the same for all.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from fedpeft.config import TrainingConfig, split_kind
from fedpeft.data.dataset import ImageDataset, dataset_of
from fedpeft.data.labels import map_labels
from fedpeft.data.reading import USUAL, Reading
from fedpeft.data.sources.interface import Selection, Source
from fedpeft.data.sources.opening import open_source
from fedpeft.data.store import CACHE_BYTES
from fedpeft.data.transforms import Preprocessing
from fedpeft.errors import SettingsInvalid, TrainingFailed
from fedpeft.formatting import counted
from fedpeft.models.backbones import Backbone
from fedpeft.models.kind import Examples, Kind, Task, kind_of
from fedpeft.peft import TunedModel
from fedpeft.training.batches import Orders
from fedpeft.training.evaluation import evaluate
from fedpeft.training.loop import PROGRESS_S, Losses, Progress, TrainingResult, facts_of, optimizer_of, result_of
from fedpeft.training.loop import train as train_on_images
from fedpeft.training.precision import multiplying
from fedpeft.training.randomness import seeded

IMAGES = ""
"""The name of the kind that needs none."""

_log = structlog.get_logger(__name__)

LabelMap = Mapping[str, str | None]


class Labelled(Protocol):
    """Rows of a site, whatever they are."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The site's own class names."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every row."""
        ...

    def __len__(self) -> int: ...


SourceT = TypeVar("SourceT", bound=Labelled)
DataT = TypeVar("DataT")


class Learner(ABC, Generic[SourceT, DataT]):
    """Training and scoring of one kind of model.

    Sources are a site's data as they lie there, data sets are those with the run's labels and as the model wants them.
    """

    @abstractmethod
    def read(self, path: Path | str) -> SourceT:
        """Opens a site's data; raises `DataInvalid`."""

    @abstractmethod
    def select(self, source: SourceT, rows: NDArray[np.int64]) -> SourceT:
        """Returns some rows of a source."""

    @abstractmethod
    def dataset(
        self, source: SourceT, backbone: Backbone, label_map: LabelMap, cache_bytes: int = CACHE_BYTES
    ) -> DataT:
        """Returns a source as a data set of the run that the backbone is of; raises `DataInvalid`.

        Args:
            source: The site's data.
            backbone: The run's.
            label_map: Own class names to the run's, None to drop a class.
            cache_bytes: Size of decoded images up to which they are kept.
        """

    @abstractmethod
    def usable(self, data: DataT) -> tuple[int, NDArray[np.int64]]:
        """Returns how many examples count, as far as is known, and the run's label of every row."""

    @abstractmethod
    def train(
        self,
        model: TunedModel,
        data: DataT,
        settings: TrainingConfig,
        seed: int,
        number: int,
        device: torch.device,
        *,
        progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> TrainingResult:
        """Trains the tuned tensors of round `number`; see `fedpeft.training.loop.train`."""

    @abstractmethod
    def evaluate(
        self, model: TunedModel, data: DataT, device: torch.device, precision: str = "float32"
    ) -> dict[str, float]:
        """Scores a model in a precision of `[training]`; see `fedpeft.training.evaluation.evaluate`."""


def learner_of(kind: str, reading: Reading = USUAL) -> Learner[Any, Any]:
    """Returns the learner of a kind, `IMAGES` or one that is installed here.

    Args:
        kind: Its name.
        reading: How images are read.

    Raises:
        ModelInvalid: If there is no such kind.
        SettingsInvalid: If something is said of the reading of images, and the kind is another.
    """
    if kind == IMAGES:
        return Images(reading)
    if reading != USUAL:
        raise SettingsInvalid(f"columns and pixels are of images; data of kind {kind!r} have none to name")
    return OfKind(kind_of(kind))


def where(data: str) -> tuple[str, str]:
    """Returns the kind and the path of `KIND:PATH`; a path that is there is what it says, colons and all."""
    return (IMAGES, data) if Path(data).exists() else split_kind(data)


class Images(Learner[Source, ImageDataset]):
    """Images, for timm's classifiers.

    Args:
        reading: How they are read.
    """

    def __init__(self, reading: Reading = USUAL) -> None:
        self._reading = reading

    def read(self, path: Path | str) -> Source:
        """See `Learner.read`. What of a folder is not read goes to the log."""
        source = open_source(path, self._reading.image_column, self._reading.label_column)
        for line in source.inventory.lines():
            _log.warning(line, data=str(path))
        return source

    def select(self, source: Source, rows: NDArray[np.int64]) -> Source:
        """See `Learner.select`."""
        return Selection(source, rows)

    def dataset(
        self, source: Source, backbone: Backbone, label_map: LabelMap, cache_bytes: int = CACHE_BYTES
    ) -> ImageDataset:
        """See `Learner.dataset`."""
        classes, wanted = backbone.config.classes, Preprocessing.of(backbone, self._reading.max_image_pixels)
        return dataset_of(source, classes, wanted, label_map=label_map, cache_bytes=cache_bytes)

    def usable(self, data: ImageDataset) -> tuple[int, NDArray[np.int64]]:
        """See `Learner.usable`."""
        return data.examples, data.labels

    def train(self, model: TunedModel, data: ImageDataset, *arguments: Any, **options: Any) -> TrainingResult:
        """See `Learner.train`."""
        return train_on_images(model, data, *arguments, **options)

    def evaluate(
        self, model: TunedModel, data: ImageDataset, device: torch.device, precision: str = "float32"
    ) -> dict[str, float]:
        """See `Learner.evaluate`."""
        return evaluate(model, data, device=device, wanted=precision)


class OfKind(Learner[Examples, Examples]):
    """Tasks of an installed kind, with the examples that its `read` returns."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def read(self, path: Path | str) -> Examples:
        """See `Learner.read`."""
        return self._kind.read(Path(path))

    def select(self, source: Examples, rows: NDArray[np.int64]) -> Examples:
        """See `Learner.select`."""
        return source.select(rows)

    def dataset(
        self, source: Examples, backbone: Backbone, label_map: LabelMap, cache_bytes: int = CACHE_BYTES
    ) -> Examples:
        """See `Learner.dataset`."""
        classes = backbone.config.classes
        mapped = map_labels(source.class_names, source.labels, classes, label_map)
        return Examples(source.values[mapped.rows], mapped.labels, classes)

    def usable(self, data: Examples) -> tuple[int, NDArray[np.int64]]:
        """See `Learner.usable`."""
        return len(data), data.labels

    def train(
        self,
        model: TunedModel,
        data: Examples,
        settings: TrainingConfig,
        seed: int,
        number: int,
        device: torch.device,
        *,
        progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> TrainingResult:
        """See `Learner.train`: the kind's own loop, between the tensors it starts from and what became of them."""
        parameters = list(model.trainable(number).values())
        if not parameters:
            raise TrainingFailed(f"adapter {model.spec.method} trains no tensor in round {number}")
        with seeded(seed, device), multiplying(settings.precision, device):
            model.module.to(device)
            start = model.state()
            model.train()
            loop = _Loop(data, Orders(settings, len(data), seed), progress, stop)
            optimizer = optimizer_of(settings, parameters)
            try:
                self._kind.train(Task(model.module, loop, optimizer, settings, device, loop.step))
            finally:
                model.eval()
        return result_of(model, start, number, len(data), loop.metrics(), facts_of(device, torch.float32))

    def evaluate(
        self, model: TunedModel, data: Examples, device: torch.device, precision: str = "float32"
    ) -> dict[str, float]:
        """See `Learner.evaluate`; the kind's own code is not put under autocast."""
        model.module.to(device)
        model.eval()
        with torch.inference_mode(), multiplying(precision, device):
            return self._kind.evaluate(model.module, data, device)


class _Loop:
    """The batches that a kind's loop draws, and the step that it reports after each."""

    def __init__(
        self,
        data: Examples,
        orders: Orders,
        progress: Callable[[Progress], None] | None,
        stop: Callable[[], bool] | None,
    ) -> None:
        self._data = data
        self._orders = orders
        self._progress = progress
        self._stop = stop
        self._losses = Losses(1)
        self._drawn = self._batch = self._done = self._examples = 0
        self._began = self._reported = time.perf_counter()
        if progress is not None:
            progress(Progress(0, orders.steps, math.nan, 0.0))

    def __iter__(self) -> Iterator[Examples]:
        for order in self._orders:
            self._drawn += 1
            self._batch = len(order)
            yield self._data.select(order)

    def step(self, loss: torch.Tensor) -> None:
        """Takes the mean loss of the batch drawn last; see `Task.step`."""
        if self._stop is not None and self._stop():
            raise TrainingFailed(
                f"training was stopped as asked, after {self._done} of {counted(self._orders.steps, 'step')}"
            )
        self._done += 1
        self._examples += self._batch
        self._losses.add(loss.detach(), self._batch, self._drawn > self._orders.steps - self._orders.a_pass)
        now = time.perf_counter()
        if self._progress is not None and (now - self._reported >= PROGRESS_S or self._done == self._orders.steps):
            self._reported = now
            rate = self._examples / (now - self._began)
            self._progress(Progress(self._done, self._orders.steps, self._losses.look(), rate))

    def metrics(self) -> dict[str, float]:
        """Returns loss, loss_first, loss_last, seconds, images_per_second (of examples), steps, threads.

        Raises:
            TrainingFailed: If the loop did not go through all batches.
        """
        if self._done != self._orders.steps:
            raise TrainingFailed(
                f"the training loop reported {self._done} of {counted(self._orders.steps, 'step')}; it must go "
                "through all of task.batches once and call task.step after each"
            )
        seconds = time.perf_counter() - self._began
        return {
            **self._losses.metrics(),
            "seconds": seconds,
            "images_per_second": self._examples / seconds,
            "steps": float(self._done),
            "threads": float(torch.get_num_threads()),
        }
