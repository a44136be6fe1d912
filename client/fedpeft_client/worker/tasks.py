"""The worker's tasks: checks, training, evaluation; models and data stay loaded between rounds.

The only module of the client that imports torch.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import structlog
import torch
from google.protobuf import json_format
from safetensors import SafetensorError

from fedpeft.adapters.payload import Tensors
from fedpeft.adapters.tensor_errors import as_os_errors
from fedpeft.adapters.updates import Arrays
from fedpeft.config import TrainingConfig
from fedpeft.data.labels import read_label_map
from fedpeft.data.reading import Reading
from fedpeft.data.sources.inventory import EMPTY
from fedpeft.errors import StateInvalid
from fedpeft.models.tasks import IMAGES, split_data, task_of
from fedpeft.peft import methods
from fedpeft.rounds.groups import SENT
from fedpeft.rounds.local_job import LocalJob, Version
from fedpeft.rpc import wire
from fedpeft.training.devices import device_of
from fedpeft.training.local_round import LoadedRun, load_run
from fedpeft.training.loop import Progress
from fedpeft.v1 import tensor_pb2
from fedpeft_client.eligibility.policy_rules import Weights
from fedpeft_client.eligibility.rules import Built, Reason, Site, reasons_against
from fedpeft_client.error_policy import UNFIT
from fedpeft_client.owner.policy import Policy
from fedpeft_client.state.outbox import PAYLOAD, state_files
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.worker.survey import survey

LOADED_RUNS = 2
"""Runs whose model and data stay in memory; the one used longest ago goes first."""

NAMED_UNREADABLE = 100
"""Unreadable images that a survey names."""

_log = structlog.get_logger(__name__)

Message = dict[str, Any]


class SiteWorker:
    """Data and models of one site.

    Args:
        options: The `open` request: client, data, reading, label_map, weights, device, threads, rank, checkpointing,
            policy, evaluate.

    Raises:
        DataInvalid: If the data or the label map cannot be read.
        SettingsInvalid: If the device is not there.
    """

    def __init__(self, options: Message) -> None:
        if options["threads"] is not None:
            torch.set_num_threads(options["threads"])
        self._client = str(options["client"])
        self._device = device_of(options["device"])
        task, path = split_data(options["data"])
        self._reading = Reading(**options["reading"])
        self._task = task_of(task).reading(self._reading)
        self._source = self._task.read(Path(path))
        self._inventory = getattr(self._source, "inventory", EMPTY)  # another task has data of its own form
        label_map, weights = options["label_map"], options["weights"]
        self._weights = None if weights is None else Path(weights)
        self._rank: int | None = options["rank"]
        self._checkpointing = bool(options["checkpointing"])
        counts = np.bincount(self._source.labels, minlength=len(self._source.class_names)).tolist()
        self._site = Site(
            frozenset(methods.names()),
            dict(zip(self._source.class_names, counts, strict=True)),
            {} if label_map is None else read_label_map(Path(label_map)),
            unreadable=_by_class(self._source),
            task=task,
            policy=Policy.model_validate(options["policy"]),
            weights=_weights(self._weights),
            trains=not options["evaluate"],
        )
        self._loaded: OrderedDict[str, tuple[LoadedRun, Any]] = OrderedDict()

    def hello(self) -> Message:
        """Returns what this worker is and has.

        That is torch, device, gpu (NVIDIA's name of it), threads, methods, rows, rows_are, labels, and inventory (what
        of the data folder is not read).
        """
        device = str(self._device)
        if self._device.type == "cuda":
            device = f"{device}: {torch.cuda.get_device_name(self._device)}"
        return {
            "torch": torch.__version__,
            "device": device,
            "gpu": self._gpu(),
            "threads": torch.get_num_threads(),
            "methods": methods.names(),
            "rows": len(self._source),
            "rows_are": "examples" if self._site.task else "images",
            "labels": list(self._source.class_names),
            "inventory": self._inventory.as_dict(),
        }

    def _gpu(self) -> str:
        if self._device.type != "cuda":
            return ""
        uuid = str(getattr(torch.cuda.get_device_properties(self._device), "uuid", ""))
        return f"GPU-{uuid}" if uuid else ""

    def check(self, request: Message) -> Message:
        """Returns why a run does not suit this site, and if it does, what was found; see `Verdict.report`."""
        run = KnownRun.from_json(request["run"])
        reasons = self._prove(run)
        return {
            "reasons": [reason.as_json() for reason in reasons],
            "report": {} if reasons else self._report(*self._loaded[run.id]),
        }

    def survey(self, progress: Callable[[Message], None]) -> Message:
        """Opens every image; returns how many there are, how many cannot be read, [name, why] of the first, and `bits`.

        Those are how many of 16 bits a channel the images use that have so many; None if none has.

        What is no image was read when it was opened.
        """
        if self._site.task != IMAGES:
            return {"images": len(self._source), "unreadable": 0, "named": [], "bits": None}
        found = survey(self._source, progress, self._reading.max_image_pixels)
        self._site = replace(self._site, unreadable=found.by_class)
        bad = found.unreadable
        return {
            "images": len(self._source),
            "unreadable": len(bad),
            "named": bad[:NAMED_UNREADABLE],
            "bits": found.bits,
        }

    def _report(self, loaded: LoadedRun, dataset: Any) -> Message:
        examples, labels = dataset.examples, dataset.labels
        classes = loaded.config.model.classes
        counts = np.bincount(labels, minlength=len(classes))
        return {
            "examples": examples,
            "classes": dict(zip(classes, counts.tolist(), strict=True)),
            "dropped": len(self._source) - len(labels),
            "model_parameters": loaded.model.backbone.parameters,
        }

    def train(self, request: Message, progress: Callable[[Message], None], stop: Callable[[], bool]) -> Message:
        """Trains for a ticket; writes the payload and the client's state in either outcome into `out`."""
        run = KnownRun.from_json(request["run"])
        loaded, opened = self._load(run)
        dataset = loaded.prepared(self._client, lambda: opened, stop, _of(opened, progress))
        job = LocalJob(
            self._client,
            int(request["round"]),
            int(request["seed"]),
            TrainingConfig.model_validate(request["settings"]),
            _version(request["adapter"]),
            {group: _read(Path(path), group, run) for group, path in request["state"].items()},
            self._rank,
        )
        update = loaded.train(job, dataset, progress=lambda p: progress(_shown(p)), stop=stop)
        out = Path(request["out"])
        (out / PAYLOAD).write_bytes(update.prepared.payload)
        for name, arrays in state_files(update).items():
            _write(out / name, arrays)
        return {
            "manifest": json_format.MessageToDict(wire.manifest_to_proto(update.prepared.manifest)),
            "examples": update.examples,
            "metrics": update.metrics,
            "facts": update.facts,
        }

    def evaluate(self, request: Message, progress: Callable[[Message], None]) -> Message:
        """Scores an adapter version on all of the data."""
        loaded, opened = self._load(KnownRun.from_json(request["run"]))
        done = _of(opened, progress)
        dataset = loaded.prepared(self._client, lambda: opened, progress=done)
        return {"metrics": loaded.evaluate(_version(request["adapter"]), dataset, done)}

    def _load(self, run: KnownRun) -> tuple[LoadedRun, Any]:
        """Returns a run's model and data, proved to fit; loads them if they are not loaded."""
        for reason in self._prove(run):
            raise reason.error
        return self._loaded[run.id]

    def _prove(self, run: KnownRun) -> tuple[Reason, ...]:
        """Returns why a run does not suit; otherwise it is loaded, and the run used longest ago goes."""
        reasons: tuple[Reason, ...] = ()
        if run.id not in self._loaded:
            reasons = reasons_against(run, self._site) or self._open(run)
        if not reasons:
            self._loaded.move_to_end(run.id)
            while len(self._loaded) > LOADED_RUNS:
                self._loaded.popitem(last=False)
        return reasons

    def _open(self, run: KnownRun) -> tuple[Reason, ...]:
        """Builds a run's model, and loads it if it suits; nothing spoke against the run before."""
        try:
            loaded = load_run(run.config, self._task, self._weights, self._device)
        except UNFIT as error:
            return reasons_against(run, replace(self._site, built=error))
        model, images = loaded.model, loaded.model.backbone.images
        built = Built(loaded.spec, loaded.fingerprint, None if images is None else images.image_size)
        reasons = reasons_against(run, replace(self._site, built=built))
        if not reasons:
            if self._checkpointing and not model.checkpoint():
                _log.warning("no_checkpointing", model=run.config.model.name, cause="it has no set_grad_checkpointing")
            self._loaded[run.id] = loaded, loaded.dataset(self._source, self._site.label_map)
        return reasons


def _by_class(source: Any) -> dict[str, int] | None:
    """Returns how many rows of each class hold no image, as far as the folder shows; None if it shows none."""
    known = getattr(source, "unreadable", None)
    return dict(Counter(source.class_names[source.labels[row]] for row in known)) if known else None


def _weights(given: Path | None) -> Weights:
    if given is None:
        return ""
    return "folder" if given.is_dir() else "file"


def _version(adapter: Message) -> Version:
    message = json_format.ParseDict(adapter["manifest"], tensor_pb2.Manifest())
    return Version(wire.manifest_from_proto(message), Path(adapter["payload"]))


def _write(path: Path, arrays: Tensors) -> None:
    with as_os_errors(path):
        safetensors.numpy.save_file(dict(arrays), path)


def _read(path: Path, group: str, run: KnownRun) -> Arrays:
    """Returns the tensors of a file of the state directory."""
    try:
        arrays: Arrays = safetensors.numpy.load_file(path)
    except (SafetensorError, OSError) as error:
        mend = "restore it: it is the privacy budget that was spent" if group == SENT else "remove it to start anew"
        raise StateInvalid(f"{path} cannot be read: {error}; {mend}") from None
    if group == SENT:  # a number
        return arrays
    shapes = {tensor.name: tensor.shape for tensor in run.spec.tensors}
    for name, values in arrays.items():
        if shapes.get(name) != values.shape:
            raise StateInvalid(f"{path} has tensor {name}, which is not one of run {run.id}")
    return arrays


def _of(dataset: Any, progress: Callable[[Message], None]) -> Callable[[int], None]:
    """Returns what reports how many examples of a data set are done."""
    return lambda done: progress({"examples": done, "of": len(dataset)})


def _shown(progress: Progress) -> Message:
    if not progress.step:
        return {"step": 0, "steps": progress.steps}
    shown: Message = asdict(progress)
    shown["images_per_second"] = round(progress.images_per_second, 1)
    return shown
