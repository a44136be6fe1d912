"""Executes the notebooks of this folder, each in a process and a folder of its own, and writes their outputs.

`make notebooks` calls it; a test executes them too, and keeps what it sees to itself.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
ADDRESS = "127.0.0.1:7070"
"""The server's address as readers see it; an execution takes a port that is free."""
CELL_S = 300
"""Longest time that one cell may take."""


def executed(path: Path) -> NotebookNode:
    """Returns a notebook with fresh outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        here = f"127.0.0.1:{probe.getsockname()[1]}"
    _replace(notebook, ADDRESS, here)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "FEDPEFT_CHECKOUT": str(HERE.parent.parent),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore:IProgress not found",  # of progress bars that nobody asked for
    }
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook, timeout=CELL_S, kernel_name="python3", resources=resources, coalesce_streams=True
        ).execute(env=environment)
        _replace(notebook, here, ADDRESS)
    _forget_the_machine(notebook)
    return notebook


def _replace(notebook: NotebookNode, old: str, new: str) -> None:
    """Replaces a text in sources and outputs."""
    for cell in notebook.cells:
        cell.source = cell.source.replace(old, new)
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = output.text.replace(old, new)
            for kind, data in output.get("data", {}).items():
                if isinstance(data, str):
                    output.data[kind] = data.replace(old, new)


def _forget_the_machine(notebook: NotebookNode) -> None:
    """Leaves out times of day and versions, which would change with every execution."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})


def main() -> None:
    """Executes all notebooks and writes them back."""
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = executed(path)
        nbformat.write(notebook, path)
        print(f"executed {path.relative_to(HERE.parent.parent)}")


if __name__ == "__main__":
    main()
