"""Memory that is left to a process, on the machine and in its control groups."""

import pytest

from moetrain.checkpoint.host_memory import available_memory

GB = 2**30


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def machine(root, *groups):
    own = "".join(f"{group}\n" for group in groups)
    return write(root, {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {64 * 2**20} kB\n", "proc/self/cgroup": own})


def limited(root, folder, limit, used, cached):
    """A group of version 2; half of what it has cached was used lately."""
    stat = f"anon 5\nactive_file {cached // 2}\ninactive_file {cached // 2}\n"
    files = {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    return write(root / "sys/fs/cgroup" / folder, files)


def test_of_this_machine_it_is_plausible():
    available = available_memory()
    assert available is None or 2**20 < available < 2**50


def test_without_groups_it_is_the_machines(tmp_path):
    assert available_memory(tmp_path) is None
    assert available_memory(machine(tmp_path)) == 64 * GB
    (tmp_path / "proc/self/cgroup").unlink()
    assert available_memory(tmp_path) == 64 * GB


def test_the_tightest_group_above_the_process_counts_and_cached_files_are_free(tmp_path):
    machine(tmp_path, "0::/job_7/step_0/task")
    limited(tmp_path, "job_7/step_0", "max", 3 * GB, 0)
    assert available_memory(tmp_path) == 64 * GB
    limited(tmp_path, "job_7", 16 * GB, 10 * GB, 2 * GB)
    assert available_memory(tmp_path) == 8 * GB
    limited(tmp_path, "job_7/step_0/task", 4 * GB, 5 * GB, 0)
    assert available_memory(tmp_path) == 0


@pytest.mark.parametrize("mounted", ["docker/7", ""], ids=["as named", "as the root of a container"])
def test_version_1_has_other_names(mounted, tmp_path):
    machine(tmp_path, "4:cpu,memory:/docker/7", "1:cpuset:/")
    files = {
        "memory.limit_in_bytes": str(8 * GB),
        "memory.usage_in_bytes": str(6 * GB),
        "memory.stat": f"inactive_file 9\ntotal_active_file 0\ntotal_inactive_file {GB}\n",
    }
    write(tmp_path / "sys/fs/cgroup/memory" / mounted, files)
    assert available_memory(tmp_path) == 3 * GB
