"""Fixtures for all tests: what needs a GPU says so, and no engine leaves memory behind."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from kvortex.memory import ExtentAllocator

# Machines that run tests are shared: an example that takes long says nothing.
settings.register_profile("kvortex", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvortex")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch  # not above: tests inside vLLM set variables first that torch reads when it is imported

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def allocators(monkeypatch: pytest.MonkeyPatch) -> "list[ExtentAllocator]":
    """Every allocator that the test made."""
    from kvortex.memory import ExtentAllocator

    made: list[ExtentAllocator] = []
    original = ExtentAllocator.__init__

    def remembering(self: ExtentAllocator, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(ExtentAllocator, "__init__", remembering)
    return made


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of more than 64 small blocks are planned in parts, as those of large blocks are."""
    monkeypatch.setattr("kvortex.engine.calls.FIRST_PART_BYTES", 1)


@pytest.fixture(autouse=True)
def pools_at_zero(request: pytest.FixtureRequest, allocators: "list[ExtentAllocator]") -> Iterator[None]:
    """After every test that ran an engine, its pool holds nothing; `@pytest.mark.leaves_extents` opts out."""
    yield
    if "leaves_extents" in request.keywords:
        return
    for allocator in allocators:
        assert allocator.leak_report() == ""
