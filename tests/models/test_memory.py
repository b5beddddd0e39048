"""memory.py: free is what the control groups of this process leave of the memory of the machine."""

import psutil
import pytest

from optimer_hf.models import memory
from optimer_hf.models.memory import free_memory, total_memory

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Return a function (lines of /proc/self/cgroup, folder -> limit, taken, given up) that makes
    them the control groups of this process.
    """

    def make(own: str, limits: dict[str, tuple[str, int, int]], version: int) -> None:
        limit, taken, given_up = memory.NAMES[version]
        for folder, (most, used, inactive) in limits.items():
            group = tmp_path / folder
            group.mkdir(parents=True, exist_ok=True)
            (group / limit).write_text(f"{most}\n")
            (group / taken).write_text(f"{used}\n")
            (group / "memory.stat").write_text(f"anon 1\n{given_up} {inactive}\nslab 2\n")
        (tmp_path / "own").write_text(own)
        monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
        monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")

    return make


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with 64 GiB, 50 of them free."""
    memory = type("Memory", (), {"available": 50 * GIB, "total": 64 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_without_a_limit_the_memory_of_the_machine_counts(groups):
    groups("0::/user.slice\n", {"user.slice": ("max", GIB, 0)}, version=2)
    assert (free_memory("cpu"), total_memory()) == (50 * GIB, 64 * GIB)


@pytest.mark.parametrize(
    ("own", "folder", "version"),
    [("0::/\n", "", 2), ("4:memory:/\n3:cpuset:/\n0::/\n", "memory", 1)],
)
def test_in_a_container_its_limit_counts(groups, own, folder, version):
    groups(own, {folder: (str(8 * GIB), 5 * GIB, 2 * GIB)}, version)
    assert free_memory("cpu") == 5 * GIB  # files in the cache make room
    assert total_memory() == 8 * GIB


def test_the_tightest_limit_of_the_groups_above_counts(groups):
    limits = {
        "job": (str(16 * GIB), 10 * GIB, 0),
        "job/step": (str(12 * GIB), 2 * GIB, 0),
        "job/step/task": ("max", GIB, 0),
    }
    groups("0::/job/step/task\n", limits, version=2)
    assert free_memory("cpu") == 6 * GIB
    assert total_memory() == 12 * GIB


def test_an_unreadable_group_counts_by_those_above_it(groups):
    groups(
        "7:cpu,cpuacct:/x\n5:memory:/docker/abc\n", {"memory": (str(4 * GIB), GIB, 0)}, version=1
    )
    assert free_memory("cpu") == 3 * GIB


def test_a_full_group_leaves_no_memory(groups):
    groups("0::/\n", {"": (str(4 * GIB), 5 * GIB, 0)}, version=2)
    assert free_memory("cpu") == 0


def test_a_system_without_control_groups_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "absent")
    assert (free_memory("cpu"), total_memory()) == (50 * GIB, 64 * GIB)
