"""A site's side: its state, its policy, its data, what it computes on, and the weights that it holds."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpeft import ids, text_files
from fedpeft.errors import SettingsInvalid
from fedpeft.formatting import counted, size
from fedpeft.process import locks
from fedpeft_operator.doctor.findings import Finding, Setup, fault, ok, warning

LOOKED_AT = 16
"""Images that are opened; `fedpeft-client --dry-run` opens all of them."""


def check_state(setup: Setup) -> Iterator[Finding]:
    """Looks at a client's memory."""
    folder = setup.state_dir
    if folder is None or not folder.exists():  # which is said of its disk
        return
    holder = locks.holder_of(folder)
    yield ok("state", f"{folder}, " + (f"a client runs there (process {holder})" if holder else "no client runs there"))
    instance = folder / "instance"
    if instance.exists() and not ids.INSTANCE.fullmatch(instance.read_text("ascii", "replace").strip()):
        yield fault("state", f"{instance} does not hold 32 hexadecimal digits", f"rm {instance}")
    policy = folder / "policy.toml"
    if os.path.lexists(policy):
        yield _policy(policy)


def _policy(path: Path) -> Finding:
    try:
        rules = text_files.toml(text_files.read(path))
    except (OSError, ValueError) as error:
        return fault("policy", f"{path} cannot be read: {error}", "correct it: a client does not start without")
    return ok("policy", f"{path} limits {', '.join(sorted(rules)) or 'nothing'}")


def check_data(setup: Setup) -> Iterator[Finding]:
    """Opens the images of a site as its client does, and looks at some."""
    if setup.data is None or importlib.util.find_spec("pyarrow") is None:
        return
    from fedpeft.data.sources.opening import open_source

    source = open_source(setup.data, setup.image_column, setup.label_column)
    classes = source.class_names
    shown = ", ".join(classes[:5]) + (f" and {len(classes) - 5} more" if len(classes) > 5 else "")
    images, of_classes = counted(len(source), "image"), counted(len(classes), "class", "classes")
    yield ok("data", f"{setup.data}: {images} of {of_classes} ({shown})")
    rows = sorted({index * len(source) // LOOKED_AT for index in range(LOOKED_AT)})
    bad = [reason for row in rows if (reason := _unreadable(source, row))]
    if bad:
        yield warning(
            "data",
            f"{len(bad)} of {len(rows)} images that were opened cannot be read, the first: {bad[0]}",
            "fedpeft-client --dry-run opens all and names them",
        )


def _unreadable(source: Any, row: int) -> str:
    from fedpeft.data.images import ImageUnreadable, read_rgb

    try:
        read_rgb(source.image_bytes(row))
    except ImageUnreadable as error:
        return f"{source.name(row)}: {error}"
    return ""


def check_device(setup: Setup) -> Iterator[Finding]:
    """Looks at what a client would compute on."""
    if setup.state_dir is None and setup.data is None:
        return
    if importlib.util.find_spec("torch") is None:
        return  # said by the check of versions
    import torch

    from fedpeft.training.devices import device_of

    try:
        device = device_of(setup.device)
    except SettingsInvalid as error:
        yield fault("device", error.message, "nvidia-smi shows the GPUs; leave --device out to take what there is")
        return
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        yield ok("device", f"{name}, {size(free)} of {size(total)} free, torch {torch.__version__}")
        return
    yield ok("device", f"CPU, {counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}")
    if Path("/proc/driver/nvidia/version").exists():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield warning(
            "device",
            f"there is an NVIDIA driver, and torch {torch.__version__} (built {built}) finds no GPU",
            "update the driver, or install the torch that fits it",
        )


def check_weights(setup: Setup) -> Iterator[Finding]:
    """Looks which backbones are held, for a site without a way to the hub above all."""
    if setup.state_dir is None or importlib.util.find_spec("huggingface_hub") is None:
        return
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    held = sorted(path.name.split("--")[-1] for path in cache.glob("models--*"))
    if held:
        more = f" and {len(held) - 4} more" if len(held) > 4 else ""
        yield ok("weights", f"{', '.join(held[:4])}{more} in {cache}")
    elif constants.HF_HUB_OFFLINE:
        yield warning("weights", f"none in {cache}, and the hub is switched off", "give the client a file: --weights")
    else:
        yield ok("weights", f"none in {cache}; a run's weights are fetched from the hub when it is offered")
