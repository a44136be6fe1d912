"""The worker's tasks: checks, training, evaluation; models and data stay loaded between rounds.

The only module of the client that imports torch.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import structlog
import torch
from google.protobuf import json_format
from numpy.typing import NDArray
from safetensors import SafetensorError

from fedpeft.adapters.payload import check_payload, decode
from fedpeft.adapters.tensor_errors import as_os_errors
from fedpeft.adapters.updates import prepare
from fedpeft.config import TrainingConfig
from fedpeft.data.labels import read_label_map
from fedpeft.data.reading import Reading
from fedpeft.data.sources.inventory import EMPTY
from fedpeft.errors import StateInvalid
from fedpeft.models import backbones
from fedpeft.peft import TunedModel, methods, tune
from fedpeft.rpc import wire
from fedpeft.training.devices import device_of
from fedpeft.training.learning import IMAGES, learner_of, where
from fedpeft.training.loop import Progress
from fedpeft.v1 import tensor_pb2
from fedpeft_client.eligibility.policy_rules import Weights
from fedpeft_client.eligibility.rules import Built, Reason, Site, reasons_against
from fedpeft_client.error_policy import UNFIT
from fedpeft_client.owner.policy import Policy
from fedpeft_client.state.outbox import IF_COUNTED, IF_NOT, LOCAL, PAYLOAD
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.worker.survey import survey

LOADED_RUNS = 2
"""Runs whose model and data stay in memory; the one used longest ago goes first."""

NAMED_UNREADABLE = 100
"""Unreadable images that a survey names."""

_log = structlog.get_logger(__name__)

Arrays = dict[str, NDArray[np.float32]]
Message = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A run that this site was proved to fit.

    Attributes:
        model: The tuned model; its tensors are whatever the last request left.
        dataset: This site's data with the run's labels.
        local: Initial values of the tensors that stay at the client: those that are local in some round.
    """

    model: TunedModel
    dataset: Any
    local: Arrays


class Workbench:
    """Data and models of one site.

    Args:
        options: The `open` request: data, reading, label_map, weights, device, threads, checkpointing, policy,
            evaluate.

    Raises:
        DataInvalid: If the data or the label map cannot be read.
        SettingsInvalid: If the device is not there.
    """

    def __init__(self, options: Message) -> None:
        if options["threads"] is not None:
            torch.set_num_threads(options["threads"])
        self._device = device_of(options["device"])
        kind, path = where(options["data"])
        self._reading = Reading(**options["reading"])
        self._learner = learner_of(kind, self._reading)
        self._source = self._learner.read(path)
        self._inventory = getattr(self._source, "inventory", EMPTY)  # another kind of model has data of its own form
        label_map, weights = options["label_map"], options["weights"]
        self._weights = None if weights is None else Path(weights)
        self._checkpointing = bool(options["checkpointing"])
        counts = np.bincount(self._source.labels, minlength=len(self._source.class_names)).tolist()
        self._site = Site(
            frozenset(methods.names()),
            dict(zip(self._source.class_names, counts, strict=True)),
            {} if label_map is None else read_label_map(Path(label_map)),
            unreadable=_by_class(self._source),
            kind=kind,
            policy=Policy.model_validate(options["policy"]),
            weights=_weights(self._weights),
            trains=not options["evaluate"],
        )
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()

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
            "rows_are": "examples" if self._site.kind else "images",
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
            "report": {} if reasons else self._report(run, self._loaded[run.id]),
        }

    def survey(self, progress: Callable[[Message], None]) -> Message:
        """Opens every image; returns how many there are, how many cannot be read, [name, why] of the first, and `bits`.

        Those are how many of 16 bits a channel the images use that have so many; None if none has.

        What is no image was read when it was opened.
        """
        if self._site.kind != IMAGES:
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

    def _report(self, run: KnownRun, loaded: Loaded) -> Message:
        examples, labels = self._learner.usable(loaded.dataset)
        counts = np.bincount(labels, minlength=len(run.config.model.classes))
        return {
            "examples": examples,
            "classes": dict(zip(run.config.model.classes, counts.tolist(), strict=True)),
            "dropped": len(self._source) - len(labels),
            "model_parameters": loaded.model.backbone.parameters,
        }

    def train(self, request: Message, progress: Callable[[Message], None], stop: Callable[[], bool]) -> Message:
        """Trains for a ticket and writes payload, both residuals and local tensors into `out`."""
        run, number = KnownRun.from_json(request["run"]), int(request["round"])
        loaded = self._load(run)
        kept = _read(Path(request["local"]), run)
        _set(loaded, request["adapter"], kept)
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        result = self._learner.train(
            loaded.model,
            loaded.dataset,
            TrainingConfig.model_validate(request["settings"]),
            int(request["seed"]),
            number,
            self._device,
            progress=lambda p: progress(_shown(p)),
            stop=stop,
        )
        memory = {"gpu_memory_bytes": float(torch.cuda.max_memory_allocated(self._device))} if on_gpu else {}
        residual = _read(Path(request["residual"]), run)
        update = prepare(result.delta, residual, run.spec.sent(number), run.config.codec)
        out = Path(request["out"])
        (out / PAYLOAD).write_bytes(update.payload)
        _write(out / IF_COUNTED, update.residual_if_counted)
        _write(out / IF_NOT, update.residual_if_not)
        stays = {name: result.local[name] for name in loaded.local if name in result.local}
        _write(out / LOCAL, {**kept, **stays})
        return {
            "manifest": json_format.MessageToDict(wire.manifest_to_proto(update.manifest)),
            "examples": result.examples,
            "metrics": {**result.metrics, **memory},
            "facts": result.facts,
        }

    def evaluate(self, request: Message) -> Message:
        """Scores an adapter version on all of the data."""
        run = KnownRun.from_json(request["run"])
        loaded = self._load(run)
        _set(loaded, request["adapter"], {})
        wanted = run.config.training.precision
        return {"metrics": self._learner.evaluate(loaded.model, loaded.dataset, self._device, wanted)}

    def _load(self, run: KnownRun) -> Loaded:
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
        config, seed = run.config, run.config.rounds.seed
        try:
            backbone = backbones.build(config.model, seed, self._weights, str(self._device))
            model = tune(backbone, config.peft.method, config.peft.options, seed)
        except UNFIT as error:
            return reasons_against(run, replace(self._site, built=error))
        size = None if backbone.images is None else backbone.images.image_size
        built = Built(model.spec, backbones.fingerprint(backbone, model.spec), size)
        reasons = reasons_against(run, replace(self._site, built=built))
        if not reasons:
            if self._checkpointing and not model.checkpoint():
                _log.warning("no_checkpointing", model=config.model.name, cause="it has no set_grad_checkpointing")
            dataset = self._learner.dataset(self._source, backbone, self._site.label_map)
            shared = {tensor.name for tensor in run.spec.shared}
            local = {name: values for name, values in model.state().items() if name not in shared}
            self._loaded[run.id] = Loaded(model, dataset, local)
        return reasons


def _by_class(source: Any) -> dict[str, int] | None:
    """Returns how many rows of each class hold no image, as far as the folder shows; None if it shows none."""
    known = getattr(source, "unreadable", None)
    return dict(Counter(source.class_names[source.labels[row]] for row in known)) if known else None


def _weights(given: Path | None) -> Weights:
    if given is None:
        return ""
    return "folder" if given.is_dir() else "file"


def _set(loaded: Loaded, adapter: Message, local: Arrays) -> None:
    """Puts an adapter version, and this site's local tensors, into the model."""
    message = json_format.ParseDict(adapter["manifest"], tensor_pb2.Manifest())
    manifest = wire.manifest_from_proto(message)
    payload = memoryview(Path(adapter["payload"]).read_bytes())
    check_payload(manifest, payload)
    loaded.model.load({**decode(manifest, payload), **loaded.local, **local})


def _write(path: Path, arrays: Arrays) -> None:
    with as_os_errors(path):
        safetensors.numpy.save_file(arrays, path)


def _read(path: Path, run: KnownRun) -> Arrays:
    """Returns the tensors of a file of the state directory; none if it is not there."""
    if not path.exists():
        return {}
    try:
        arrays: Arrays = safetensors.numpy.load_file(path)
    except (SafetensorError, OSError) as error:
        raise StateInvalid(f"{path} cannot be read: {error}; remove it to start with an empty one") from None
    shapes = {tensor.name: tensor.shape for tensor in run.spec.tensors}
    for name, values in arrays.items():
        if shapes.get(name) != values.shape:
            raise StateInvalid(f"{path} has tensor {name}, which is not one of run {run.id}")
    return arrays


def _shown(progress: Progress) -> Message:
    if not progress.step:
        return {"step": 0, "steps": progress.steps}
    shown: Message = asdict(progress)
    shown["images_per_second"] = round(progress.images_per_second, 1)
    return shown
