"""The notebooks can be read as they are, and run with real processes; docs/python.md names what there is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

import fedpeft

DOCS = Path(__file__).resolve().parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
PAGE = (DOCS / "python.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def execute() -> ModuleType:
    found = importlib.util.spec_from_file_location("execute", DOCS / "notebooks" / "execute.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def shown(notebook: nbformat.NotebookNode) -> dict[str, list[str]]:
    """Returns the kinds of output of each cell that has any."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return {cell.id: sorted({output.output_type for output in cell.outputs}) for cell in code}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_small_whole_and_says_nothing_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 100_000
    assert "error" not in {kind for kinds in shown(notebook).values() for kind in kinds}
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code"), "make notebooks"
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/|Warning", text)
    for link in re.findall(r"\]\((\.\./[^)]+)\)", text):
        assert (path.parent / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_shows_what_it_showed(path: Path, execute: ModuleType) -> None:
    """Executes it in a kernel, with the server and the clients that it starts; about a minute."""
    committed, fresh = nbformat.read(path, as_version=4), execute.executed(path)
    assert [cell.source for cell in committed.cells] == [cell.source for cell in fresh.cells]
    assert shown(committed) == shown(fresh)
    (watch,) = [cell for cell in fresh.cells if cell.id == "watch"]
    assert "the run is completed" in watch.outputs[0].text


def test_the_page_names_what_there_is() -> None:
    from fedpeft.api.remote import Change, Round, Run, Server
    from fedpeft.api.simulated import SimulatedRound, Simulation
    from fedpeft.studies.study import Study

    names = set(re.findall(r"`([a-z_]+)(?:\([^)`]*\))?`", "".join(re.findall(r"^\|[^|]+\|", PAGE, re.M))))
    public = {name for name in dir(Run) if not name.startswith("_")}
    simulated = {name for name in dir(Simulation) if not name.startswith("_")} | {"folder", "report"}
    studied = {name for name in dir(Study) if not name.startswith("_")} | {"folder"}
    assert names >= public | simulated | studied, (public | simulated | studied) - names
    classes = (Run, Server, Round, Change, SimulatedRound)
    everywhere = {name for each in classes for name in (*dir(each), *each.__annotations__)} | simulated | studied
    assert names <= everywhere, names - everywhere
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert max(len(example.splitlines()) for example in examples) <= 10
    code = "".join(examples)
    assert set(re.findall(r"\bdone\.(\w+)", code)) <= simulated
    assert set(re.findall(r"\brun\.(\w+)", code)) <= public
    assert set(re.findall(r"\bserver\.(\w+)", code)) <= set(dir(Server))
    assert set(re.findall(r"\bfedpeft\.(\w+)", code)) <= set(dir(fedpeft))
