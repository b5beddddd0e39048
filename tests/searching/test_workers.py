"""workers.py: trials on real Dask clusters, whose workers die, have no model, or are not there."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask
import pytest
import torch
import yaml
from distributed import Client, LocalCluster, rpc
from distributed.security import Security

from optimer_hf.errors import ConfigError, EvaluationError, ModelError, StudyError
from optimer_hf.models.spinning import DECIDING, SPINS
from optimer_hf.scoring.objective import Asked
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching import workers as workers_module
from optimer_hf.searching.loop import search
from optimer_hf.searching.trial import ResidentPool, Scored, run_trial
from optimer_hf.searching.workers import Workers
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.trials import Candidate, Trial
from tests.support.warm import start_optimer

pytestmark = pytest.mark.usefixtures("warm_workers")


def config_of(directory: Path, n_trials: int = 30) -> StudyConfig:
    """A study whose base is a directory, where the pools below leave files."""
    return StudyConfig.model_validate(
        {
            "base_model": str(directory),
            "vectors": {"w": {"source": "a/w"}},
            "objective": {"limit": 2, "terms": [{"task": "t", "metric": "loss"}]},
            "search": {"n_trials": n_trials, "rescore_top": 0},
        }
    )


def candidate_of(number: int) -> Candidate:
    return Candidate(number, "surrogate", {"w": number / 10}, seconds={"ask": 0.5})


def asked_of(config: StudyConfig) -> list[Asked]:
    return [Asked(term, 3) for term in config.objective.terms]


class FunctionPool:
    """Scores weights by a function; leaves a file when it opens, and one for each trial."""

    inputs = {"vectors.w": "one"}

    def __init__(self, config):
        self.directory = Path(config.base_model)
        self.leave("opened")

    def leave(self, what: str) -> None:
        (self.directory / f"{what}-{os.getpid()}-{uuid4()}").touch()

    def score(self, weights, asked, *, gradients=False):
        self.leave("started")
        if weights["w"] == 0.9:
            raise ValueError("a broken merge")
        items = [((weights["w"] - 0.3) ** 2, 1.0)] * asked[0].limit
        scores = {term.label: TermScore(items, False) for term in asked}
        return Scored(scores, {"merge": 0.25}, 7)


class WaitingPool(FunctionPool):
    """Does not score before there is a file `go`; leaves a file for each other trial that runs."""

    def score(self, weights, asked, *, gradients=False):
        scored = super().score(weights, asked)
        deadline = time.monotonic() + 30
        while not (self.directory / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return scored


class CrowdedPool(FunctionPool):
    """Raises when two trials run in one process at a time."""

    running = 0

    def score(self, weights, asked, *, gradients=False):
        CrowdedPool.running += 1
        time.sleep(0.2)
        crowd, CrowdedPool.running = CrowdedPool.running, CrowdedPool.running - 1
        if crowd > 1:
            raise ValueError(f"{crowd} trials at a time")
        return super().score(weights, asked)


class ThreadsPool(FunctionPool):
    """Scores the number of torch's threads."""

    def score(self, weights, asked, *, gradients=False):
        return Scored({"t": TermScore([(torch.get_num_threads(), 1.0)], False)}, {}, 0)


class SpinsPool(FunctionPool):
    """Scores how long GNU's threads spin for each other."""

    def score(self, weights, asked, *, gradients=False):
        score = float(os.environ["GOMP_SPINCOUNT"])
        return Scored({"t": TermScore([(score, 1.0)], False)}, {}, 0)


def die() -> None:
    """Kill this worker, but not so soon after its start that Dask takes it for one that cannot
    start: it would give up on it, and take the trials of the next one along.
    """
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


class DeadlyPool(FunctionPool):
    """Kills its worker, as a lack of memory does."""

    def score(self, weights, asked, *, gradients=False):
        die()


class GreedyPool(FunctionPool):
    """Finds no memory left."""

    def score(self, weights, asked, *, gradients=False):
        super().score(weights, asked)
        raise torch.OutOfMemoryError("CUDA out of memory.")


class AbsentPool(FunctionPool):
    """Has no model."""

    def __init__(self, config):
        raise ModelError(f"{config.base_model}: no config.json. Give a directory with a model.")


class DeadlyToOpenPool(FunctionPool):
    """Kills its worker before it is open."""

    def __init__(self, config):
        die()


class OtherPool(FunctionPool):
    """Scores by other weights than FunctionPool."""

    inputs = {"vectors.w": "another"}


class OwnPool(FunctionPool):
    """Sees other weights in every process."""

    @property
    def inputs(self):
        return {"vectors.w": str(os.getpid())}


class UnknownPool:
    """Is pickled here and cannot be loaded anywhere else."""

    def __reduce__(self):
        return import_module, ("not_installed",)


def files(directory: Path, what: str) -> list[int]:
    """Return the process of every file of a kind that the pools left."""
    return [int(path.name.split("-")[1]) for path in directory.glob(f"{what}-*")]


def wait_for_files(directory: Path, what: str, n: int) -> list[int]:
    deadline = time.monotonic() + 30
    while len(files(directory, what)) < n:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return files(directory, what)


def run(workers: Workers, config: StudyConfig, numbers) -> dict[int, Trial]:
    """Run trials, as many at a time as the workers take, and return them by number."""
    waiting, n_running, finished = list(numbers), 0, []
    while waiting or n_running:
        while waiting and n_running < workers.count_slots():
            workers.submit(candidate_of(waiting.pop(0)), asked_of(config))
            n_running += 1
        finished.append(workers.next_finished())
        n_running -= 1
    assert len({trial.number for trial in finished}) == len(finished)
    return {trial.number: trial for trial in finished}


@pytest.fixture(scope="module")
def clusters():
    """The cluster of this module, the last one in a list."""
    opened: list[LocalCluster] = []
    yield opened
    for each in opened:
        each.close(timeout=20)


@pytest.fixture
def cluster(clusters):
    """Somebody's cluster: two workers of two threads, one death of a worker is forgiven.

    Dask gives up on a worker that dies while it starts, as those of the tests before may; so a
    cluster that has lost workers for good is replaced.
    """
    if clusters:
        with contextlib.suppress(TimeoutError):
            clusters[-1].wait_for_workers(2, timeout=60)
            return clusters[-1]
    clusters.append(
        LocalCluster(
            n_workers=2,
            threads_per_worker=2,
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"allowed_failures": 1},
        )
    )
    return clusters[-1]


@pytest.fixture
def empty_cluster(monkeypatch):
    monkeypatch.setattr(workers_module, "WAIT_FOR_WORKERS", 1)
    monkeypatch.setattr(workers_module, "SECONDS_BETWEEN_WARNINGS", 0.4)
    with LocalCluster(
        n_workers=0, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0"
    ) as made:
        yield made


# -- a local cluster -------------------------------------------------------------------------------


def test_two_local_workers_score_what_one_process_scores_and_open_once_each(tmp_path, capfd):
    config = config_of(tmp_path)
    with Workers(n_workers=2, pool=FunctionPool).open(config) as workers:
        assert workers.count_slots() == 2
        finished = run(workers, config, range(6))
    assert len(files(tmp_path, "opened")) == len(set(files(tmp_path, "opened"))) == 2
    assert {trial.worker for trial in finished.values()} == {"0", "1"}
    alone = FunctionPool(config)
    for number, trial in finished.items():
        expected = run_trial(alone, candidate_of(number), asked_of(config))
        assert trial.seconds["cpu"] >= 0  # measured, so the only figure that differs
        seconds = trial.seconds | {"cpu": expected.seconds["cpu"]}
        assert replace(trial, worker=None, seconds=seconds) == expected
    assert capfd.readouterr().out == ""


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::RuntimeWarning")
def test_nobody_without_the_keys_runs_code_on_local_workers(tmp_path):
    """Every user of a machine reaches its loopback interface."""
    config = config_of(tmp_path)
    with Workers(n_workers=1, pool=FunctionPool).open(config) as workers:
        scheduler = workers._client.scheduler.address
        assert scheduler.startswith("tls://127.0.0.1:")
        addresses = [scheduler, *workers._client.scheduler_info()["workers"]]
        strangers = [("tcp://", None), ("tls://", Security.temporary())]
        for address in addresses:
            for protocol, security in strangers:
                with pytest.raises(OSError):  # it never gets as far as an answer
                    called(address.replace("tls://", protocol), security)
        assert run(workers, config, [1])[1].status == "ok"


def called(address: str, security: Security | None) -> Any:
    """Ask a scheduler or a worker who it is, as a client does before it sends code."""

    async def call() -> Any:
        arguments = {} if security is None else security.get_connection_args("client")
        remote = rpc(address, connection_args=arguments, timeout=5)
        try:
            return await asyncio.wait_for(remote.identity(), timeout=5)
        finally:
            await remote.close_rpc()

    return asyncio.run(call())


def test_a_stranger_is_answered_where_there_are_no_keys(cluster):
    assert called(cluster.scheduler_address, None)["type"] == "Scheduler"


@pytest.fixture
def cold_workers(warm_workers):
    """Workers that import torch after Dask has set their environment, as those of a user do."""
    with dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}):
        yield


def test_local_workers_share_the_cores(tmp_path, cold_workers):
    config = config_of(tmp_path)
    with Workers(n_workers=1, pool=ThreadsPool).open(config) as workers:
        assert run(workers, config, [0])[0].terms["t"].score == dask.system.CPU_COUNT


@pytest.mark.parametrize(("given", "expected"), [(None, SPINS["GOMP_SPINCOUNT"]), ("77", "77")])
def test_threads_of_local_workers_spin_for_a_while(
    tmp_path, monkeypatch, cold_workers, given, expected
):
    for name in DECIDING:
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    config = config_of(tmp_path)
    with Workers(n_workers=1, pool=SpinsPool).open(config) as workers:
        assert run(workers, config, [0])[0].terms["t"].score == float(expected)


# -- a cluster that is there -----------------------------------------------------------------------


def test_a_cluster_that_is_there_is_used_and_left_running_without_the_pool(tmp_path, cluster):
    config = config_of(tmp_path)
    with Workers(scheduler=cluster.scheduler_address, pool=FunctionPool).open(config) as workers:
        assert len(run(workers, config, range(4))) == 4
        pids = set(files(tmp_path, "opened"))
    with Client(cluster.scheduler_address, set_as_default=False) as client:
        open_pools = client.run(lambda: len(workers_module._open_pools))
        assert client.submit(os.getpid, pure=False).result() in pids
    assert list(open_pools.values()) == [0, 0]


def test_a_worker_of_two_threads_runs_one_trial_at_a_time(tmp_path, cluster):
    config = config_of(tmp_path)
    with Workers(scheduler=cluster.scheduler_address, pool=CrowdedPool).open(config) as workers:
        for number in range(6):
            workers.submit(candidate_of(number), asked_of(config))
        assert {workers.next_finished().status for _ in range(6)} == {"ok"}
    assert len(set(files(tmp_path, "started"))) == 2


def test_torch_takes_the_threads_that_its_worker_has(tmp_path, cluster):
    config = config_of(tmp_path)
    with Workers(scheduler=cluster.scheduler_address, pool=ThreadsPool).open(config) as workers:
        assert run(workers, config, [0])[0].terms["t"].score == 2


def test_a_trial_that_fails_is_recorded_as_crashed(tmp_path, cluster):
    config = config_of(tmp_path)
    with Workers(scheduler=cluster.scheduler_address, pool=FunctionPool).open(config) as workers:
        trial = run(workers, config, [9])[9]
    assert trial.status == "crashed" and trial.error.startswith("ValueError: a broken merge\n")


def test_leaving_does_not_wait_for_trials(tmp_path, cluster):
    config = config_of(tmp_path)
    with Workers(scheduler=cluster.scheduler_address, pool=WaitingPool).open(config) as workers:
        workers.submit(candidate_of(0), asked_of(config))
        wait_for_files(tmp_path, "started", 1)
        started = time.monotonic()
    assert time.monotonic() - started < 3
    (tmp_path / "go").touch()


def test_resident_models_in_workers_score_what_one_process_scores(
    cluster, make_base, make_adapter, corpus_dir
):
    base = make_base("gemma", torch.float32)
    config = StudyConfig.model_validate(
        {
            "base_model": str(base.path),
            "dtype": "float32",
            "vectors": {"w": {"source": str(make_adapter(base, 1))}},
            "objective": {
                "terms": [{"text": str(corpus_dir / "aaa.search.jsonl"), "name": "t"}],
            },
        }
    )
    with Workers(scheduler=cluster.scheduler_address).open(config) as workers:
        finished = run(workers, config, [0, 5])
    alone = ResidentPool(config)
    for number, trial in finished.items():
        expected = run_trial(alone, candidate_of(number), asked_of(config))
        assert (trial.status, trial.terms) == ("ok", expected.terms)


# -- what is lost ----------------------------------------------------------------------------------


def test_a_trial_whose_worker_is_killed_runs_elsewhere_and_comes_back_once(tmp_path, cluster):
    config = config_of(tmp_path)
    with Workers(scheduler=cluster.scheduler_address, pool=WaitingPool).open(config) as workers:
        for number in range(2):
            workers.submit(candidate_of(number), asked_of(config))
        killed = wait_for_files(tmp_path, "started", 2)[0]
        os.kill(killed, signal.SIGKILL)
        (tmp_path / "go").touch()
        finished = [workers.next_finished() for _ in range(2)]
    assert sorted((trial.number, trial.status) for trial in finished) == [(0, "ok"), (1, "ok")]
    assert files(tmp_path, "started").count(killed) == 1
    assert len(files(tmp_path, "started")) == 3


def test_a_trial_goes_on_when_the_only_worker_is_killed_and_starts_again(tmp_path):
    config = config_of(tmp_path)
    with Workers(n_workers=1, pool=WaitingPool).open(config) as workers:
        workers.submit(candidate_of(0), asked_of(config))
        (worker,) = wait_for_files(tmp_path, "started", 1)
        time.sleep(1)  # Dask gives up on a worker that dies while it starts
        os.kill(worker, signal.SIGKILL)
        (tmp_path / "go").touch()
        assert workers.next_finished().status == "ok"
    assert len(set(files(tmp_path, "opened"))) == 2


def test_a_trial_that_kills_every_worker_ends_the_search_when_the_base_does_too(
    tmp_path, cluster, monkeypatch
):
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    config = config_of(tmp_path)
    message = (
        r"^trial 4 \(weights: w 0\.4\): .*its worker died.* so the weights are not at fault\. .*"
        r"start fewer of them, and run the same command again: .*this one is done anew\.$"
    )
    with (
        Workers(scheduler=cluster.scheduler_address, pool=DeadlyPool).open(config) as workers,
        pytest.raises(StudyError, match=message),
    ):
        run(workers, config, [4])


class HeavyPool(FunctionPool):
    """Kills its worker for one vector of weights."""

    def score(self, weights, asked, *, gradients=False):
        scored = super().score(weights, asked)
        if weights["w"] == 0.4:
            self.leave("heavy")
            die()
        return scored


def test_a_trial_that_kills_workers_which_score_the_base_is_recorded_and_the_others_go_on(
    tmp_path, cluster, monkeypatch
):
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    config = config_of(tmp_path)
    with Workers(scheduler=cluster.scheduler_address, pool=HeavyPool).open(config) as workers:
        finished = run(workers, config, [4, 0, 5, 6])
    assert {number: trial.status for number, trial in finished.items()} == {
        **dict.fromkeys((0, 5, 6), "ok"),
        4: "crashed",
    }
    assert len(files(tmp_path, "heavy")) == 2  # and once alone
    assert finished[4].is_blameless  # the surrogate learns nothing of it
    assert "then scored the base" in finished[4].error


def test_a_worker_that_lacks_memory_tries_again_and_then_ends_the_search(tmp_path, cluster):
    config = config_of(tmp_path)
    with (
        Workers(scheduler=cluster.scheduler_address, pool=GreedyPool).open(config) as workers,
        pytest.raises(EvaluationError, match=r"worker .*: trial 4: OutOfMemoryError: .*, twice"),
    ):
        run(workers, config, [4])
    assert len(files(tmp_path, "started")) == 2


def test_a_pool_that_kills_every_worker_ends_the_search(tmp_path, cluster):
    config = config_of(tmp_path)
    with (
        Workers(scheduler=cluster.scheduler_address, pool=DeadlyToOpenPool).open(config) as workers,
        pytest.raises(StudyError, match=r"no pool could be opened\. .*its worker died 2 times"),
    ):
        workers.digest_inputs()


def test_workers_that_see_other_weights_end_the_search_before_a_trial(tmp_path):
    begun = config_of(tmp_path, n_trials=2)
    search(begun, tmp_path / "s", runner=Workers(n_workers=1, pool=FunctionPool))
    n_before = len(files(tmp_path, "started"))
    longer = config_of(tmp_path, n_trials=3)
    with pytest.raises(StudyError, match=r"vectors\.w: not the weights or items"):
        search(longer, tmp_path / "s", runner=Workers(n_workers=1, pool=OtherPool))
    assert len(files(tmp_path, "started")) == n_before


def test_workers_that_see_different_weights_end_the_search(tmp_path):
    with pytest.raises(StudyError, match=r"worker \d: vectors\.w: not the weights or items of"):
        search(
            config_of(tmp_path, n_trials=8),
            tmp_path / "s",
            runner=Workers(n_workers=2, pool=OwnPool),
        )


def test_a_worker_without_the_model_ends_the_search_and_is_named(tmp_path, cluster):
    config = config_of(tmp_path)
    with (
        Workers(scheduler=cluster.scheduler_address, pool=AbsentPool).open(config) as workers,
        pytest.raises(ModelError, match=r"^worker [01]: .*no config\.json\. Give a directory"),
    ):
        run(workers, config, [0])


def test_a_scheduler_that_cannot_load_a_trial_is_told_what_to_install(tmp_path, cluster):
    config = config_of(tmp_path)
    with (
        Workers(scheduler=cluster.scheduler_address, pool=UnknownPool()).open(config) as workers,
        pytest.raises(
            StudyError, match=r"No module named 'not_installed'.*Install the same optimer-hf"
        ),
    ):
        run(workers, config, [0])


# -- what is not there -----------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nowhere", "tls://127.0.0.1:9", ""])
def test_a_scheduler_that_does_not_answer_is_an_error_within_seconds(
    tmp_path, monkeypatch, address
):
    monkeypatch.setattr(workers_module, "WAIT_FOR_SCHEDULER", 2)
    n_threads = threading.active_count()
    started = time.monotonic()
    with (
        pytest.raises(StudyError, match=f"{address}'.*no Dask scheduler.*`dask scheduler`"),
        Workers(scheduler=address, pool=FunctionPool).open(config_of(tmp_path)),
    ):
        pass
    assert time.monotonic() - started < 5
    # neither a thread nor a client that the garbage collector would close in any other thread
    assert threading.active_count() == n_threads
    assert all(client.status == "closed" for client in gc.get_objects() if type(client) is Client)


def test_a_scheduler_with_keys_is_reached_with_those_of_the_configuration(tmp_path):
    made = Security.temporary()
    options = {"n_workers": 0, "processes": False, "dashboard_address": "127.0.0.1:0"}
    keys = {"ca-file": made.tls_ca_file}
    keys |= {"client.cert": made.tls_client_cert, "client.key": made.tls_client_key}
    settings = {f"distributed.comm.tls.{name}": key for name, key in keys.items()}
    with LocalCluster(security=made, protocol="tls", **options) as guarded:
        address = guarded.scheduler_address
        with (
            dask.config.set(settings),
            Workers(scheduler=address, pool=FunctionPool).open(config_of(tmp_path)),
        ):
            pass
        with (
            pytest.raises(StudyError, match="TLS expects"),
            Workers(scheduler=address, pool=FunctionPool).open(config_of(tmp_path)),
        ):
            pass


def test_a_scheduler_without_workers_is_waited_for_and_then_an_error(
    tmp_path, empty_cluster, caplog
):
    caplog.set_level(logging.WARNING, logger="optimer_hf")
    with (
        Workers(scheduler=empty_cluster.scheduler_address).open(config_of(tmp_path)) as workers,
        pytest.raises(StudyError, match=r"no worker for \d s\. Start workers"),
    ):
        workers.count_slots()
    assert caplog.records[0].message == "no worker for 0 s, waiting up to 1 s"


def test_workers_that_are_all_lost_in_mid_search_are_waited_for(tmp_path, empty_cluster):
    config = config_of(tmp_path)
    empty_cluster.scale(1)
    with Workers(scheduler=empty_cluster.scheduler_address, pool=WaitingPool).open(
        config
    ) as workers:
        workers.submit(candidate_of(0), asked_of(config))
        wait_for_files(tmp_path, "started", 1)
        empty_cluster.scale(0)
        with pytest.raises(StudyError, match="no worker for"):
            workers.next_finished()
    (tmp_path / "go").touch()


def test_a_scheduler_that_is_lost_in_mid_search_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "WAIT_FOR_SCHEDULER", 2)
    config = config_of(tmp_path)
    with (
        LocalCluster(
            n_workers=1, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0"
        ) as made,
        Workers(scheduler=made.scheduler_address, pool=WaitingPool).open(config) as workers,
    ):
        workers.submit(candidate_of(0), asked_of(config))
        wait_for_files(tmp_path, "started", 1)
        (tmp_path / "go").touch()
        made.close()
        with pytest.raises(StudyError, match="connection to the Dask scheduler was lost"):
            workers.next_finished()


@pytest.mark.parametrize("both", [{}, {"n_workers": 2, "scheduler": "tcp://127.0.0.1:9"}])
def test_processes_and_a_scheduler_exclude_each_other(tmp_path, both):
    with pytest.raises(ConfigError, match="Give one of them"):
        Workers(**both).open(config_of(tmp_path))


def test_several_workers_that_would_each_take_all_gpus_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="device_map: found 'auto' and 2 workers, but each of"):
        Workers(n_workers=2).open(config_of(tmp_path).model_copy(update={"device_map": "auto"}))


# -- signals ---------------------------------------------------------------------------------------


def is_alive(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def test_a_signal_to_the_whole_process_group_leaves_no_process_and_nothing_temporary(
    make_base, make_adapter, corpus_dir, tmp_path, monkeypatch
):
    base = make_base("gemma", torch.float32)
    data = {
        "base_model": str(base.path),
        "dtype": "float32",
        "vectors": {"w": {"source": str(make_adapter(base, 1))}},
        "objective": {"terms": [{"text": str(corpus_dir / "aaa.search.jsonl"), "name": "t"}]},
        "search": {"n_trials": 300, "rescore_top": 0},
    }
    study, out, scratch = tmp_path / "study.yaml", tmp_path / "out", tmp_path / "tmp"
    study.write_text(yaml.safe_dump(data))
    scratch.mkdir()
    words = "search", study, out, "--workers", "2"
    monkeypatch.setenv("TMPDIR", str(scratch))
    n_before = 0
    for number, status in {signal.SIGTERM: 143, signal.SIGINT: 130}.items():
        said = tmp_path / f"said-{number}.txt"
        process = start_optimer(*words, said=said)
        deadline = time.monotonic() + 120
        while n_trials_in(out) < n_before + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.signal(number)
        assert process.wait(60) == status, said.read_text()
        lines = [line for line in said.read_text().splitlines() if line]
        lines = [line for line in lines if not line.startswith("search: ")]
        assert len(lines) == 1, said.read_text()
        assert lines[0].startswith("interrupted. Finished stages and trials"), lines
        deadline = time.monotonic() + 20
        while is_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_alive(process.pid)
        assert list(scratch.iterdir()) == []
        assert n_trials_in(out) >= n_before + 2
        n_before = n_trials_in(out)


def n_trials_in(out: Path) -> int:
    file = out / "trials.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0
