"""Experiment trackers: TensorBoard, MLflow, Weights & Biases and trackio as sinks of a run's rounds. One file each.

Notable: a simulation and a run of a server are tracked alike, from the rows of their reports. A point is a figure of a
round; what a tracker has already is read back from it, so a run that is followed again, or a simulation that goes on,
doubles none. Each tracker works in a thread of its own: one that fails or is slow costs the run nothing.
"""

from __future__ import annotations

from fedpeft.tracking.figures import TrackedRun
from fedpeft.tracking.tracker import Point, Tracker, shown, tracker_named, trackers
from fedpeft.tracking.tracking import Tracking, tracking_to

__all__ = ["Point", "TrackedRun", "Tracker", "Tracking", "shown", "tracker_named", "trackers", "tracking_to"]
