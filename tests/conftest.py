"""One thread a process, since parallel workers share the cores; Hypothesis without a clock; Ctrl-C as at a terminal."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from .preloaded.fedpeft_tests_launcher import await_preloaded, namespace

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # read by torch and NumPy when they are first imported

os.environ["FEDPEFT_PIXEL_CACHE"] = "off"  # nothing of a test is kept for the next one

# A shell ignores Ctrl-C for what it runs behind, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine makes nothing wrong: neither an example nor its drawing has to be fast.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", UNTIMED, max_examples=30, derandomize=True)
settings.register_profile("here", UNTIMED)
settings.load_profile("ci" if os.environ.get("CI") else "here")


PRELOADED = "FEDPEFT_TESTS_PRELOADED"
_FOLDER = "FEDPEFT_TESTS_FOLDER"
_folder = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder in which tests find a process that has imported torch; see `tests/preloaded`."""
    if _FOLDER in os.environ or not Path("/proc/self/ns/mnt").exists():
        return  # a parallel worker has it from the process that distributes the tests
    config.stash[_folder] = folder = Path(tempfile.mkdtemp(prefix="fedpeft-preloaded-"))
    (folder / "namespace").write_text(namespace())
    (folder / "tests").write_text(str(os.getpid()))
    os.environ[_FOLDER] = str(folder)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuses to spread over all workers what shares a server or a browser: some releases of pytest do, unsaid."""
    if getattr(config.option, "loadgroup", False):
        spread = [item for item in items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid]
        if spread:
            raise pytest.UsageError(f"pytest {pytest.__version__} and pytest-xdist make no groups: {spread[0].nodeid}")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names a long value by its size: a file in a format that keeps the time is another one in each worker."""
    return f"{argname} of {len(val)}" if isinstance(val, str | bytes) and len(val) > 60 else None


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends that process, which looks for its folder."""
    folder = config.stash.get(_folder, None)
    if folder:
        del os.environ[_FOLDER]
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def preloaded() -> Iterator[None]:
    """Has servers, clients, their workers, and short commands forked from one process that imported all once.

    Without it, they begin as a user's do: for tests of how they begin or are interrupted, or of their memory. What was
    started stands for its fork: signals and kills reach it, `process_itself` is its id.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in preloaded_environment().items():
            patch.setenv(name, value)
        yield


def preloaded_environment() -> dict[str, str]:
    """Returns the variables of a process that is to be a fork of the preloaded one, once that one is ready."""
    if _FOLDER not in os.environ:
        return {}
    await_preloaded(os.environ[_FOLDER])  # no limit of a test is meant for its imports
    path = [str(Path(__file__).with_name("preloaded")), os.environ.get("PYTHONPATH", "")]
    return {PRELOADED: os.environ[_FOLDER], "PYTHONPATH": os.pathsep.join(filter(None, path))}


def process_itself(pid: int) -> int:
    """Returns the id of the fork for which a process stands, or its own if it stands for none."""
    try:
        return int(Path(os.environ[_FOLDER], f"fork-of-{pid}").read_text())
    except (OSError, KeyError):
        return pid


@pytest.fixture
def unforked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the processes of one test begin as a user's do, in a module that uses `preloaded`."""
    monkeypatch.delenv(PRELOADED, raising=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Holds torch to one thread once a test module has imported it; the others need not wait for it.

    What a test draws of torch without a seed of its own is the same in whatever order tests run.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.manual_seed(0)
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_log_outlives_its_test() -> Iterator[None]:
    """Undoes what a test set up for logs: they would go to the captured stream of a test that is over."""
    yield
    structlog.reset_defaults()


@contextmanager
def mounted_mib(folder: Path) -> Iterator[Path]:
    """A file system of 1 MiB; skips the test where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with mounted_mib(tmp_path / "small") as folder:
        yield folder
