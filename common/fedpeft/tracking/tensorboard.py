"""TensorBoard: event files in a folder of the run's own, below a named one. The run file is its hyperparameters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft.tracking.figures import TrackedRun
from fedpeft.tracking.tracker import Point, Tracker, trackers


@trackers.register("tensorboard")
class TensorBoard(Tracker):
    """Scalars by round; the target is a folder."""

    module = extra = "tensorboard"

    def begin(self, run: TrackedRun) -> set[Point]:
        """See `Tracker.begin`."""
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = (Path(self.target) if self.target else self.folder / "tensorboard") / run.label
        written = _points(folder) if folder.is_dir() else set()
        self._writer = EventFileWriter(str(folder))
        if not written:
            info = plugin_data_pb2.SessionStartInfo(group_name=run.label, start_time_secs=run.created_at)
            for key, value in {**run.facts, **run.settings}.items():
                info.hparams[key].string_value = value
            self._session(metadata.SESSION_START_INFO_TAG, session_start_info=info)
        return written

    def round(self, number: int, figures: Mapping[str, float], at: float) -> None:
        """See `Tracker.round`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._add(number, at, values)
        self._writer.flush()

    def end(self, state: str) -> None:
        """See `Tracker.end`."""
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        if state != "running":
            status = api_pb2.STATUS_SUCCESS if state == "completed" else api_pb2.STATUS_FAILURE
            info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
            self._session(metadata.SESSION_END_INFO_TAG, session_end_info=info)
        self._writer.close()

    def _session(self, tag: str, **info: Any) -> None:
        """Writes a mark of the plug-in for hyperparameters."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**info))
        self._add(0, time.time(), [Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])

    def _add(self, step: int, at: float, values: list[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._writer.add_event(Event(wall_time=at, step=step, summary=Summary(value=values)))


def _points(folder: Path) -> set[Point]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    return {(point.step, name) for name in events.Tags()[SCALARS] for point in events.Scalars(name)}
