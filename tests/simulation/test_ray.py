"""The engine ray, on real clusters: the same bits, also when a machine goes in the middle of a round."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import ray
from structlog.testing import capture_logs

from fedpeft.errors import ConfigInvalid, DataInvalid, SettingsInvalid, TrainingFailed
from fedpeft.simulation import clients_of, simulate
from fedpeft.simulation.engines import ray as ray_engine
from fedpeft.simulation.ray_worker import Host

from ..data.test_sources import table, write
from .simulated_runs import same, tensors, without_clock
from .test_engines import run_file


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path / "whole.parquet", table(48))


@pytest.fixture
def started(monkeypatch):
    """Returns the engines that were made."""
    made, real = [], ray_engine.Ray.__init__

    def noted(self, *arguments):
        real(self, *arguments)
        made.append(self)

    monkeypatch.setattr(ray_engine.Ray, "__init__", noted)
    return made


@pytest.fixture(scope="class")
def cluster():
    """A cluster that the program itself connected to."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error", _temp_dir=folder)
        yield
        ray.shutdown()


@pytest.fixture
def short_folder(monkeypatch):
    """The temporary folder of a cluster and its workers, with a path that their sockets bear."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        for variable in ("RAY_TMPDIR", "TMPDIR"):
            monkeypatch.setenv(variable, folder)
        yield Path(folder)


def held(engine, whole, out, workers=2):
    run = run_file(engine, workers=workers, codec={"up": "sparse", "density": 0.2, "values": "float16"})
    return simulate(run, clients_of(whole, run)[0], out, evaluate=whole)


def assert_the_same(tmp_path, reports):
    assert without_clock(reports["inprocess"]) == without_clock(reports["ray"])
    assert same(tensors(tmp_path / "inprocess")[1], tensors(tmp_path / "ray")[1])
    for file in ("adapter.safetensors", "records.jsonl"):
        assert (tmp_path / "inprocess" / file).read_bytes() == (tmp_path / "ray" / file).read_bytes()


def test_a_cluster_of_this_machine_makes_the_bits_and_the_report_of_one_process(
    tmp_path, monkeypatch, whole, started, short_folder
):
    """With residuals, a late client in every round; the cluster is started for it, and ends with it."""
    monkeypatch.delenv(ray_engine.ADDRESS, raising=False)
    reports = {engine: held(engine, whole, tmp_path / engine, workers=1) for engine in ("inprocess", "ray")}
    assert_the_same(tmp_path, reports)
    assert len(started) == 1 and not ray.is_initialized()
    left = [each.name for each in short_folder.iterdir() if each.name.startswith(("ray", "fedpeft"))]
    assert left == [], "neither logs, nor sockets, nor versions"


@pytest.mark.slow
def test_a_machine_that_goes_in_the_middle_of_a_round_makes_no_difference(tmp_path, monkeypatch, whole, started):
    from ray.cluster_utils import Cluster

    fast = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    one = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**one, "_system_config": fast})
    second = cluster.add_node(**one)
    monkeypatch.setenv(ray_engine.ADDRESS, cluster.address)
    raylet = second.all_processes["raylet"][0].process.pid
    real, stopped = ray_engine.Ray._assign, []

    def assigned(self):
        """Waits for both workers; stops the second machine's one as soon as it has a job, then the machine."""
        if not stopped and len(self._workers) == 2 and any(worker.host is None for worker in self._workers):
            return
        real(self)
        at_work = [worker for worker in self._workers if worker.task is not None]
        if not stopped and len(at_work) == 2:
            (pid,) = (w.host.pid for w in at_work if psutil.Process(w.host.pid).ppid() == raylet)
            os.kill(pid, signal.SIGSTOP)  # so that it is in the middle
            stopped.append(pid)
            cluster.remove_node(second, allow_graceful=False)
            os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(ray_engine.Ray, "_assign", assigned)
    try:
        with capture_logs() as logs:
            reports = {engine: held(engine, whole, tmp_path / engine) for engine in ("inprocess", "ray")}
    finally:
        cluster.shutdown()
    assert_the_same(tmp_path, reports)
    lost = [line for line in logs if line["event"].startswith("a worker was lost, its job is given to another one")]
    assert len(stopped) == len(lost) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
class TestFaults:
    def test_data_that_a_worker_cannot_use_ends_it_with_the_names_of_client_and_machine(self, tmp_path, whole):
        run = run_file("ray", rounds={"count": 1, "clients": 2})
        odd = write(tmp_path / "odd" / "data.parquet", table(6, names=("cat", "dog", "yak")))
        named = r"client odd: class 'yak' .* \(on the machine [\d.]+ of the Ray cluster\)"
        with pytest.raises(DataInvalid, match=named):
            simulate(run, {"good": whole, "odd": odd}, tmp_path / "out")
        assert ray.is_initialized()

    def test_a_job_whose_workers_all_die_ends_it_with_the_name_of_its_client(self, tmp_path, monkeypatch, whole):
        monkeypatch.setattr(ray_engine, "ATTEMPTS", 1)
        real = ray_engine.Ray._assign

        def assigned(self):
            real(self)
            for worker in self._workers:
                if worker.task is not None:
                    os.kill(worker.host.pid, signal.SIGKILL)

        monkeypatch.setattr(ray_engine.Ray, "_assign", assigned)
        run = run_file("ray")
        with pytest.raises(TrainingFailed, match=r"client client-\d: 1 worker of the Ray cluster that trained it were"):
            simulate(run, clients_of(whole, run)[0], tmp_path / "out")

    def test_a_cluster_without_room_is_named_with_what_a_worker_needs(self, tmp_path, monkeypatch, whole):
        monkeypatch.setattr(ray_engine, "NOTICE_S", 0.1)
        monkeypatch.setattr(ray_engine, "START_S", 0.3)
        monkeypatch.setattr("torch.get_num_threads", lambda: 3)
        run = run_file("ray")
        with (
            capture_logs() as logs,
            pytest.raises(TrainingFailed, match=r"each needs 3 CPUs of one machine, and the cluster has room for 0"),
        ):
            simulate(run, clients_of(whole, run)[0], tmp_path / "out")
        assert "no worker of the Ray cluster is ready yet" in [line["event"] for line in logs]


def test_the_folder_of_a_cluster_leaves_room_for_the_names_of_its_sockets(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    with ray_engine._short_folder() as folder:
        assert Path(folder).parent == Path("/tmp") and not list(deep.iterdir())
        socket = Path(folder, "session_2026-11-29_19-23-30_363215_4194304", "sockets", "plasma_store.9")
        assert len(os.fsencode(socket)) <= 107
    assert not Path(folder).exists()
    monkeypatch.setattr(ray_engine, "LONGEST_FOLDER", 4)
    assert ray_engine._short_folder() is None and not list(deep.iterdir()), "Ray's own choice"


def test_an_address_where_no_cluster_is_is_named(tmp_path, monkeypatch, whole):
    monkeypatch.setenv(ray_engine.ADDRESS, "127.0.0.1:1")
    run = run_file("ray")
    with pytest.raises(
        SettingsInvalid, match=r"cannot use the Ray cluster at 127\.0\.0\.1:1 \(RAY_ADDRESS\): .*refused"
    ):
        simulate(run, clients_of(whole, run)[0], tmp_path / "out")


def test_without_ray_the_extra_is_named_at_its_place_in_the_run_file(tmp_path, monkeypatch, whole):
    monkeypatch.setitem(sys.modules, "ray", None)
    run = run_file("ray")
    with pytest.raises(ConfigInvalid, match=r'pip install "fedpeft\[ray\]"') as refused:
        simulate(run, clients_of(whole, run)[0], tmp_path / "out")
    assert [path for path, _ in refused.value.fields] == ["simulation.engine"]


@pytest.mark.parametrize(
    ("workers", "gpus", "share"), [(1, 1, 1.0), (2, 8, 1.0), (4, 1, 0.25), (6, 1, 0.1666), (4, 3, 0.5)]
)
def test_workers_that_are_more_than_the_gpus_share_them(workers, gpus, share):
    assert ray_engine.share_of_gpu(workers, gpus) == share


def test_a_machine_with_other_software_is_refused():
    versions = tuple((name, "0.0.1" if name == "torch" else found) for name, found in ray_engine.versions_here())
    with pytest.raises(
        SettingsInvalid, match=r"the machine 10\.0\.0\.9 of the Ray cluster has torch 0\.0\.1, and this"
    ):
        ray_engine._check_versions(Host("10.0.0.9", 1, versions))
