"""How much memory this process may still use: limits of the process and of its control group."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from stored_models import soft_limit

from gradpruner import memory


@pytest.mark.parametrize(("which", "field"), [(resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")])
def test_free_memory_honours_the_limits_of_the_process(which, field):
    used = memory._kilobytes(Path("/proc/self/status"), field)
    with soft_limit(which, used + (64 << 20)):
        free = memory.free_memory()
    assert 0 < free <= 40 << 20 < memory.free_memory()


def test_free_memory_honours_the_limit_of_a_cgroup(tmp_path):
    group = tmp_path / "sys" / "slice" / "job"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/slice/job\n")
    for folder, limit in ((group, "max"), (group.parent, "1000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert memory._cgroup_left(tmp_path / "cgroup", tmp_path / "sys") == 500
    group = tmp_path / "sys" / "memory" / "job"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("5:cpu:/job\n4:memory:/job\n")
    (group / "memory.limit_in_bytes").write_text("900")
    (group / "memory.usage_in_bytes").write_text("300")
    (group / "memory.stat").write_text("total_inactive_file 100\n")
    assert memory._cgroup_left(tmp_path / "cgroup", tmp_path / "sys") == 700
    assert memory._cgroup_left(tmp_path / "nothing", tmp_path / "sys") is None
