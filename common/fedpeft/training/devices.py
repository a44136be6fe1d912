"""Devices that models compute on, by their names on the command line."""

from __future__ import annotations

import torch

from fedpeft.errors import SettingsInvalid


def device_of(wanted: str) -> torch.device:
    """Returns a device by its name; auto is the first GPU if there is one.

    Raises:
        SettingsInvalid: If there is no such device.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda:0" if there else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise SettingsInvalid(f"there is no device {wanted!r}; give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= there):
        raise SettingsInvalid(f"there is no device {wanted}: this machine has the CPU and {there} usable GPUs")
    return device
