"""A pool that the container or the machine cannot hold is refused at the start, with what would fit."""

from pathlib import Path

import pytest
import torch

from kvortex import KVortexConfig, KVortexEngine
from kvortex.cli.main import main
from kvortex.config import GIB, MIB
from kvortex.errors import ConfigError
from kvortex.memory import check_memory, limits
from kvortex.memory.limits import memory_limits

MOUNT_V2 = "30 24 0:26 {top} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
MOUNT_V1 = "35 31 0:32 {top} {point} rw,relatime - cgroup cgroup rw,memory"


class FakeMachine:
    """The files that say what a process may take, below a folder."""

    def __init__(self, root: Path, *, available_bytes: int = 512 * GIB) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {1 << 29} kB\nMemAvailable:   {available_bytes // 1024} kB\n")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def mounts(self, pattern: str, *, top: str = "/", point: str = "/sys/fs/cgroup", group: str) -> None:
        self.write("proc/self/mountinfo", "22 28 0:5 / /dev rw - devtmpfs udev rw\n" + pattern.format(**locals()))
        self.write("proc/self/cgroup", group)

    def group_v2(self, folder: str, limit: int | str, used: int, stat: str = "") -> None:
        for name, text in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
            self.write(f"{folder}/{name}", f"{text}\n")

    def group_v1(self, folder: str, limit: int, used: int, stat: str = "") -> None:
        for name, text in (("limit_in_bytes", limit), ("usage_in_bytes", used), ("stat", stat)):
            self.write(f"{folder}/memory.{name}", f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_the_machines_available_memory_is_a_limit(machine: FakeMachine) -> None:
    check_memory(400 * GIB, root=machine.root)
    with pytest.raises(ConfigError, match=r"600\.0 GiB does not fit: 512\.0 GiB are available.*/proc/meminfo"):
        check_memory(600 * GIB, root=machine.root)


def test_a_containers_limit_less_what_is_used(machine: FakeMachine) -> None:
    machine.mounts(MOUNT_V2, group="0::/\n")
    machine.group_v2("sys/fs/cgroup", 16 * GIB, 6 * GIB)
    check_memory(9 * GIB, root=machine.root)
    with pytest.raises(ConfigError, match=r"10\.0 GiB are available, of 16\.0 GiB by .*memory\.max"):
        check_memory(11 * GIB, root=machine.root)


def test_what_the_kernel_gives_back_is_not_used(machine: FakeMachine) -> None:
    machine.mounts(MOUNT_V2, group="0::/\n")
    stat = f"anon {GIB}\nfile {9 * GIB}\ninactive_file {6 * GIB}\nactive_file {2 * GIB}\nslab_reclaimable {GIB}\n"
    machine.group_v2("sys/fs/cgroup", 16 * GIB, 10 * GIB, stat)
    check_memory(14 * GIB, root=machine.root)


@pytest.mark.parametrize(
    ("top", "group"),
    [
        ("/", "/kubepods/pod1/main"),  # groups of the machine, seen from it
        ("/kubepods", "/kubepods/pod1/main"),  # a part of them is mounted, under its full name
    ],
)
def test_a_limit_of_a_group_further_up_counts(machine: FakeMachine, top: str, group: str) -> None:
    machine.mounts(MOUNT_V2, top=top, group=f"0::{group}\n")
    above = "sys/fs/cgroup/kubepods" if top == "/" else "sys/fs/cgroup"
    machine.group_v2(f"{above}/pod1", 8 * GIB, 2 * GIB)
    machine.group_v2(f"{above}/pod1/main", "max", GIB)
    check_memory(5 * GIB, root=machine.root)
    with pytest.raises(ConfigError, match=r"pod1/memory\.max"):
        check_memory(7 * GIB, root=machine.root)


@pytest.mark.parametrize("group", ["/../../other", "/docker/abc"])
def test_a_group_that_cannot_be_seen_leaves_the_one_that_is_mounted(machine: FakeMachine, group: str) -> None:
    machine.mounts(MOUNT_V2, top="/docker/xyz", point="/sys/fs/my\\040groups", group=f"0::{group}\n")
    machine.group_v2("sys/fs/my groups", 8 * GIB, 0)
    with pytest.raises(ConfigError, match="does not fit"):
        check_memory(9 * GIB, root=machine.root)


def test_the_first_version_of_control_groups(machine: FakeMachine) -> None:
    machine.mounts(
        MOUNT_V1,
        top="/docker/abc",
        point="/sys/fs/cgroup/memory",
        group="7:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc/inner\n0::/\n",
    )
    machine.group_v1("sys/fs/cgroup/memory", 8 * GIB, 4 * GIB, f"total_inactive_file {GIB}\n")
    machine.group_v1("sys/fs/cgroup/memory/inner", (1 << 63) - 4096, GIB)
    check_memory(4 * GIB, root=machine.root)
    with pytest.raises(ConfigError, match=r"5\.0 GiB are available, of 8\.0 GiB by .*memory\.limit_in_bytes"):
        check_memory(6 * GIB, root=machine.root)


def test_ranks_add_up_and_the_message_says_what_fits(machine: FakeMachine) -> None:
    machine.mounts(MOUNT_V2, group="0::/\n")
    machine.group_v2("sys/fs/cgroup", 20 * GIB, 4 * GIB)
    check_memory(3 * GIB, ranks=4, root=machine.root)
    with pytest.raises(ConfigError) as caught:
        check_memory(5 * GIB, ranks=4, root=machine.root)
    for part in ("5.0 GiB for each of 4 ranks", "20.0 GiB in all", "16.0 GiB are available", "less than 4096MiB"):
        assert part in str(caught.value)


def test_a_pool_that_leaves_next_to_nothing_is_said(machine: FakeMachine, caplog: pytest.LogCaptureFixture) -> None:
    check_memory(400 * GIB, root=machine.root)
    assert caplog.text == ""
    check_memory(511 * GIB, root=machine.root)
    assert "leaves next to nothing" in caplog.text


@pytest.mark.parametrize("figure", ["", "garbage\n", "-5\n"])
def test_files_that_say_nothing_limit_nothing(tmp_path: Path, figure: str) -> None:
    check_memory(1 << 60, root=tmp_path)
    machine = FakeMachine(tmp_path)
    machine.mounts(MOUNT_V2, group="0::/\n")
    machine.group_v2("sys/fs/cgroup", figure, 0)
    assert [limit.source for limit in memory_limits(tmp_path)] == ["/proc/meminfo"]


async def test_an_engine_refuses_before_it_maps_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMachine(tmp_path, available_bytes=64 * MIB)
    memory_of_machine = limits.memory_limits
    monkeypatch.setattr(limits, "memory_limits", lambda root: memory_of_machine(tmp_path))
    caches = {"layer": torch.zeros(2, 8, 16, 1, 16)}
    async with KVortexEngine.create(KVortexConfig(pool=65 * MIB)) as engine:
        with pytest.raises(ConfigError, match="does not fit"):
            engine.register_kv_caches(caches, block_size=16)
    async with KVortexEngine.create(KVortexConfig(pool=16 * MIB)) as engine:
        engine.register_kv_caches(caches, block_size=16)


def test_the_command_line_refuses_a_pool_larger_than_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--requests", "1", "--pool", "1000TiB"]) == 2
    assert "does not fit" in capsys.readouterr().err
