"""A simulation in a program or a notebook: the federation of a run file on this machine, and what came of it.

    done = fedpeft.simulate("emoji.toml", data="sites", out="simulated", evaluate="test.parquet")
    print(done.accuracy, done.payload_bytes_up)
    model = done.load_timm()

The same as `fedpeft simulate`; `fedpeft.simulation` has the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.api.remote import RunFile, Scored, configured
from fedpeft.api.round_table import COLUMNS, of_json
from fedpeft.arguments import list_of, path_of
from fedpeft.export.recorded import recorded_sha256
from fedpeft.frames import frame_of, table_html

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from numpy.typing import NDArray
    from peft import PeftModel
    from torch import nn

    from fedpeft.config import RunConfig
    from fedpeft.data.reading import Reading
    from fedpeft.peft import TunedModel
    from fedpeft.simulation.clients import Data


@dataclass(frozen=True)
class SimulatedRound(Scored):
    """A committed round of a simulation.

    Attributes:
        number: 1, 2, ...; the result is adapter version `number`.
        clients: Ids of those whose updates were counted.
        metrics: `accuracy` (0 to 1), `loss`, `accuracy/CLASS` on held-out data, `train_loss` of the clients.
        seconds: From the first ticket to the commit.
        payload_bytes_up: Encoded tensors from the clients; nothing was sent, so there are no whole messages.
        payload_bytes_down: Encoded tensors to the clients, as a server would count them.
        full_bytes: Bytes that full fine-tuning would have sent each way.
    """

    number: int
    clients: tuple[str, ...]
    metrics: Mapping[str, float]
    seconds: float | None
    payload_bytes_up: int
    payload_bytes_down: int
    full_bytes: int


class Simulation:
    """Result of a simulated run. Made by `simulate`, or of the folder that one left.

    Attributes:
        folder: Has adapter.safetensors, report.json and records.jsonl.
        report: All that report.json says.

    Args:
        folder: The folder, of `fedpeft.simulate`, the command, or a cell of a study.

    Raises:
        DataInvalid: If it holds no finished simulation.
    """

    def __init__(self, folder: str | Path) -> None:
        from fedpeft.studies.results import load_report

        self.folder = path_of(folder, "folder")
        self.report: Mapping[str, Any] = load_report(self.folder)

    @property
    def config(self) -> RunConfig:
        """The run file, without `[simulation]`."""
        from fedpeft.studies.results import config_of

        return config_of(self.report)

    @property
    def state(self) -> str:
        """completed; or paused, if a round could not get its updates."""
        return str(self.report["state"])

    @property
    def reason(self) -> str:
        """Reason why it is paused; else empty."""
        return str(self.report["reason"])

    @property
    def parameters(self) -> int:
        """Values that are tuned."""
        return int(self.report["adapter_parameters"])

    @property
    def model_parameters(self) -> int:
        """Values of the whole model."""
        return int(self.report["model_parameters"])

    @property
    def initial_metrics(self) -> dict[str, float]:
        """Figures of adapter version 0, as in `SimulatedRound.metrics`."""
        return dict(self.report["initial_metrics"])

    @property
    def rounds(self) -> list[SimulatedRound]:
        """The committed rounds, by number."""
        return [_round(row) for row in self.report["rounds"]]

    @property
    def accuracy(self) -> float | None:
        """Of the newest version, on held-out data, 0 to 1; None without it."""
        return self._newest.get("accuracy")

    @property
    def loss(self) -> float | None:
        """Of the newest version, on held-out data; None without it."""
        return self._newest.get("loss")

    @property
    def payload_bytes_up(self) -> int:
        """Encoded tensors from the clients in all committed rounds."""
        return sum(each.payload_bytes_up for each in self.rounds)

    @property
    def payload_bytes_down(self) -> int:
        """Encoded tensors to the clients in all committed rounds."""
        return sum(each.payload_bytes_down for each in self.rounds)

    @property
    def full_bytes(self) -> int:
        """Bytes that full fine-tuning would have sent each way in these rounds."""
        return sum(each.full_bytes for each in self.rounds)

    def to_frame(self) -> pandas.DataFrame:
        """Returns every version: version, payload_bytes, seconds, accuracy, loss.

        Raises:
            LocalError: If pandas is not installed.
        """
        from fedpeft.studies.results import curve_of

        return frame_of(point.as_dict() for point in curve_of(self.report))

    def __repr__(self) -> str:
        scored = "" if self.accuracy is None else f", accuracy {100 * self.accuracy:.1f} %"
        return f"<fedpeft simulation {self.report['name']!r}: {self.state} at version {self.report['version']}{scored}>"

    def _repr_html_(self) -> str:
        rows = [of_json(row, "payload").cells() for row in self.report["rounds"]]
        return table_html(repr(self).strip("<>"), COLUMNS, rows)

    def adapter(self) -> dict[str, NDArray[np.float32]]:
        """Returns the newest version's tensors by name.

        Raises:
            BlobCorrupt: If the file is missing, or has another digest than its record says.
        """
        from fedpeft.adapters.adapter_file import open_adapter

        with open_adapter(self._file, self._sha256()) as tensors:
            return tensors.adapter()

    def load(self, weights: str | Path | None = None) -> TunedModel:
        """Returns the run's model with the newest version in it, as `Run.load` does.

        Args:
            weights: A weights file, or a folder of them, that stands here for the one the run names.

        Raises:
            BackboneMismatch: If the weights here are not those of the simulation.
            BlobCorrupt: If the adapter file is missing, or has another digest than its record says.
        """
        from fedpeft.export.restored import restored

        fingerprint = str(self.report["backbone_fingerprint"])
        given = None if weights is None else path_of(weights, "weights")
        return restored(self.config, fingerprint, self._file, given, self._sha256())

    def load_timm(self, weights: str | Path | None = None) -> nn.Module:
        """Returns the tuned model as a plain model of timm, as `Run.load_timm` does."""
        from fedpeft.export.formats import timm_model

        return timm_model(self.load(weights))

    def load_peft(self, weights: str | Path | None = None) -> PeftModel:
        """Returns the tuned model as one of the `peft` library, as `Run.load_peft` does."""
        from fedpeft.export.formats import peft_model

        return peft_model(self.load(weights))

    @property
    def _file(self) -> Path:
        return self.folder / "adapter.safetensors"

    def _sha256(self) -> str | None:
        return recorded_sha256(self._file, str(self.report["run"]), int(self.report["version"]))

    @property
    def _newest(self) -> Mapping[str, float]:
        rounds = self.rounds
        return rounds[-1].metrics if rounds else self.initial_metrics


def simulate(
    run: RunFile,
    data: Any,
    out: str | Path,
    *,
    evaluate: Any = None,
    weights: str | Path | None = None,
    label_map: str | Path | None = None,
    device: str = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
    max_image_pixels: int | None = None,
    committed: Callable[[SimulatedRound], None] | None = None,
    track: Iterable[str] = (),
) -> Simulation:
    """Holds a run's federation on this machine, to the bits that a server and agents give.

    Args:
        run: A run file, what one says as nested mappings, or a `RunConfig`. If the first two name no classes, the run
            has those of the data, as the label map renames them.
        data: A folder of clients that `fedpeft partition` wrote, or one data set that `[simulation]` divides: its path,
            a map-style `Dataset` of torch, or a `Dataset` of the Hugging Face library. Or a mapping of clients' names
            to such data sets.
        out: Folder for adapter.safetensors, report.json and records.jsonl; made if it is not there.
        evaluate: Held-out data on which every version is scored, a path or a data set.
        weights: A weights file, or a folder of them, that stands here for the one the run names.
        label_map: A file of own class names to the run's, for all of the data.
        device: auto, cpu, cuda or cuda:N.
        image_column: Column of parquet that holds the images; as `[simulation]` says if absent.
        label_column: Column of parquet that holds the labels; likewise.
        max_image_pixels: Pixels of the largest image that is opened; likewise.
        committed: Told of every round as soon as it is committed.
        track: Trackers, as `--track` names them: `["tensorboard", "mlflow=sqlite:///runs.db"]`.

    Raises:
        ConfigInvalid: If the run file is wrong, or wants more clients than there are.
        DataInvalid: If a client's data, or the held-out data, cannot be used, or no run can have their classes.
        LocalError: If the library of a tracker is not installed.
        ModelInvalid: If the model or its weights cannot be had.
        SettingsInvalid: If an argument that names a place is no path, `track` no list of texts, or `out` in the data.
        StateInvalid: If `out` cannot be written, another simulation writes there, or it has a study's results.
    """
    from fedpeft import simulation
    from fedpeft.tracking import tracking_to

    renamed = None if label_map is None else path_of(label_map, "label_map")
    given = _GivenData(data, image_column, label_column, renamed)
    config, folder = configured(run, given.classes), path_of(out, "out")
    scored = path_of(evaluate, "evaluate") if isinstance(evaluate, str | Path) else evaluate
    simulation.check_apart(folder, [*given.paths, scored])
    simulation.check_run(config, device)
    tracking = tracking_to(list_of(track, "track", str, "texts"), folder)
    reading = simulation.reading_of(config, image_column, label_column, max_image_pixels)
    clients, partition = given.clients(config, reading)
    simulation.simulate(
        config,
        clients,
        folder,
        None if scored is None else _opened(scored, "evaluate", reading),
        None if weights is None else path_of(weights, "weights"),
        label_map=renamed,
        device=device,
        reading=reading,
        partition=partition,
        committed=None if committed is None else lambda row: committed(_round(row)),
        tracking=tracking,
    )
    return Simulation(out)


class _GivenData:
    """Training data as a program gives them: a path, a data set, or several by client.

    Args:
        data: As `simulate` takes them.
        image_column: Column of the images, if it was named.
        label_column: Column of the labels, likewise.
        label_map: The file that renames their classes, if there is one.
    """

    def __init__(
        self, data: Any, image_column: str | None, label_column: str | None, label_map: Path | None = None
    ) -> None:
        self._by_client = isinstance(data, Mapping) and not hasattr(data, "cast_column")
        self._data = {f"data[{name!r}]": each for name, each in data.items()} if self._by_client else {"data": data}
        self._names = list(map(str, data)) if self._by_client else []
        self._columns = image_column, label_column
        self._label_map = label_map
        self._open: list[Path | Data] = []
        self._reading: Reading | None = None

    def classes(self, image: str | None, label: str | None) -> list[str]:
        """Returns the classes that a run on them has if it names none, see `fedpeft.config.with_classes`."""
        from fedpeft.data.client_folders import classes_of, classes_there
        from fedpeft.data.labels import read_label_map
        from fedpeft.data.reading import Reading
        from fedpeft.data.sources.opening import open_source

        columns = self._columns[0] or image, self._columns[1] or label
        renamed = None if self._label_map is None else read_label_map(self._label_map)
        opened = self._opened(Reading(*columns))
        if not self._by_client and isinstance(opened[0], Path):
            return classes_there(opened[0], *columns, renamed)
        sources = (open_source(each, *columns) if isinstance(each, Path) else each for each in opened)
        return classes_of(sources, "data", renamed)

    @property
    def paths(self) -> list[Path]:
        """Those that are given by their path."""
        return [path_of(each, name) for name, each in self._data.items() if isinstance(each, str | Path)]

    def clients(
        self, config: RunConfig, reading: Reading
    ) -> tuple[Mapping[str, Path | Data], Mapping[str, Any] | None]:
        """Returns the data by client, and the record of their division, None where they come divided."""
        from fedpeft.simulation import clients_of

        opened = self._opened(reading)
        if self._by_client:
            return dict(zip(self._names, opened, strict=True)), None
        return clients_of(opened[0], config, reading)

    def _opened(self, reading: Reading) -> list[Path | Data]:
        """Returns all of them, opened once a reading: a data set of torch without `targets` is read for its labels."""
        if self._reading != reading:
            self._reading = reading
            self._open = [_opened(each, name, reading) for name, each in self._data.items()]
        return self._open


def _opened(data: Any, name: str, reading: Reading) -> Path | Data:
    """Returns data as the simulation takes them: a path, or a source over a data set."""
    from fedpeft.data.examples import Examples

    if isinstance(data, Examples):
        return data
    if isinstance(data, str | Path) or not hasattr(data, "__getitem__"):
        return path_of(data, name)
    from fedpeft.data.sources.datasets import source_of

    return source_of(data, reading)


def _round(row: Mapping[str, Any]) -> SimulatedRound:
    return SimulatedRound(
        number=row["version"],
        clients=tuple(row["clients"]),
        metrics=row["metrics"],
        seconds=row["seconds"],
        payload_bytes_up=row["payload_bytes_up"],
        payload_bytes_down=row["payload_bytes_down"],
        full_bytes=row["full_bytes_each_way"],
    )
