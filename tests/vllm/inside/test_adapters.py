"""Adapters whose files are replaced while a server runs, and adapters that are named otherwise than by their folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from engine_support import BLOCK_SIZE, Engine, prompt, running
from lora_support import make_adapter, request_of
from tiny_model import make_tiny_model

from kvortex.vllm.identity.adapters import BlockKeys

TOKENS = prompt(4 * BLOCK_SIZE + 5, 1)
BLOCKS = len(TOKENS) // BLOCK_SIZE
LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    model = make_tiny_model(tmp_path / "model", "qwen3")
    make_adapter(tmp_path / "name", model, seed=1)
    make_adapter(tmp_path / "later" / "name", model, seed=2)
    return tmp_path


def ask(engine: Engine, adapter: Any) -> list[int]:
    return engine.generate([TOKENS], adapter=adapter)[0]


def removed(engine: Engine, adapter: Any) -> Any:
    engine.llm.llm_engine.remove_lora(adapter.lora_int_id)
    engine.llm.llm_engine.add_lora(adapter)
    return adapter


def in_place(engine: Engine, adapter: Any) -> Any:
    engine.llm.llm_engine.add_lora(msgspec.structs.replace(adapter, load_inplace=True))
    return adapter


def with_the_request(engine: Engine, adapter: Any) -> Any:
    return msgspec.structs.replace(adapter, load_inplace=True)


@pytest.mark.parametrize("again", [removed, in_place, with_the_request])
def test_an_adapter_that_is_loaded_again_under_its_number_is_another(
    home: Path, again: Callable[[Engine, Any], Any]
) -> None:
    with running(str(home / "model"), connector=False, **LORA) as engine:
        old, new = ask(engine, request_of(home / "name")), ask(engine, request_of(home / "later" / "name", 2))
    assert old != new
    with running(str(home / "model"), **LORA) as engine:
        adapter = request_of(home / "name")
        for _ in range(2):
            assert ask(engine, adapter) == old
            engine.settle()
        assert engine.loaded_blocks == BLOCKS
        shutil.copy(home / "later" / "name" / "adapter_model.safetensors", home / "name")
        adapter = again(engine, adapter)
        assert ask(engine, adapter) == new
        engine.settle()
        assert engine.loaded_blocks == BLOCKS
        # What the new one computes is kept as ever.
        for _ in range(2):
            assert ask(engine, adapter) == new
            engine.settle()
        assert engine.loaded_blocks > BLOCKS


class Request:
    def __init__(self, path: str) -> None:
        self.block_hashes = [bytes(32)]
        self.lora_request = SimpleNamespace(lora_int_id=1, lora_name="name", lora_path=path)


def key_of(path: str) -> bytes:
    (key,) = BlockKeys().of(Request(path))  # type: ignore[arg-type]
    return key


def test_an_adapter_below_the_home_directory_is_its_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    before = key_of("~/name")
    assert key_of("~/name") == before == key_of(str(home / "name"))
    shutil.copy(home / "later" / "name" / "adapter_model.safetensors", home / "name")
    assert key_of("~/name") != before


def test_an_adapter_of_the_hub_is_the_snapshot_that_was_downloaded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number starts from one in every server, and says nothing."""
    found = {"owner/name": home / "name"}

    def snapshot_download(repository: str, *, local_files_only: bool) -> str:
        assert local_files_only
        return str(found[repository])

    monkeypatch.setattr("kvortex.vllm.identity.adapters.snapshot_download", snapshot_download)
    before = key_of("owner/name")
    assert before == key_of(str(home / "name"))
    found["owner/name"] = home / "later" / "name"
    assert key_of("owner/name") != before


def test_an_adapter_that_is_nowhere_is_of_this_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of("nobody/nothing")
    assert key_of("nobody/nothing") == before
    monkeypatch.setattr("kvortex.vllm.identity.adapters._PROCESS", "another")
    assert key_of("nobody/nothing") != before
