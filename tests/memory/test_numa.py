"""Which nodes there are, and what is asked of the kernel for one of them."""

import ctypes
import platform

import pytest

from kvortex.memory import numa


class Libc:
    """Takes the system call in place of the kernel."""

    def __init__(self, result: int) -> None:
        self.result = result
        self.calls: list[tuple[object, ...]] = []

    def syscall(
        self, number: object, address: object, nbytes: object, mode: object, mask: object, *rest: object
    ) -> int:
        word = ctypes.cast(mask, ctypes.POINTER(ctypes.c_ulong)).contents.value
        self.calls.append((number.value, address.value, nbytes.value, mode.value, word, *(r.value for r in rest)))
        return self.result


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(numa, "online_nodes", lambda: [0, 1])
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return monkeypatch


@pytest.mark.parametrize("text", ["", "\n"])
def test_a_kernel_that_says_nothing_has_one_node(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.Path, "read_text", lambda self: text)
    assert numa.online_nodes() == [0]


def test_a_kernel_without_the_file_has_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(numa.Path, "read_text", absent)
    assert numa.online_nodes() == [0]


@pytest.mark.parametrize(("result", "agreed"), [(0, True), (-1, False)])
def test_the_call_names_the_range_and_the_node(two_nodes: pytest.MonkeyPatch, result: int, agreed: bool) -> None:
    libc = Libc(result)
    two_nodes.setattr(ctypes, "CDLL", lambda name, use_errno: libc)
    assert numa.prefer_node(1 << 20, 4096, 1) is agreed
    assert libc.calls == [(237, 1 << 20, 4096, 1, 0b10, 64, 0)]


@pytest.mark.parametrize(
    ("machine", "node", "nodes"), [("x86_64", None, [0, 1]), ("x86_64", 0, [0]), ("vax", 0, [0, 1])]
)
def test_nothing_is_asked_where_nothing_can_be_placed(
    two_nodes: pytest.MonkeyPatch, machine: str, node: int | None, nodes: list[int]
) -> None:
    libc = Libc(0)
    two_nodes.setattr(ctypes, "CDLL", lambda name, use_errno: libc)
    two_nodes.setattr(platform, "machine", lambda: machine)
    two_nodes.setattr(numa, "online_nodes", lambda: nodes)
    assert not numa.prefer_node(1 << 20, 4096, node)
    assert not libc.calls
