"""Request traces: JSON lines in which each hash id stands for a fixed number of a prompt's tokens."""

import json
import lzma
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import ConfigError

USUAL_BLOCK_TOKENS = 512  # of the Mooncake traces
_MAX_TOKENS = 1 << 32  # that differ


@dataclass(frozen=True, slots=True)
class _Row:
    """One request: each of `hash_ids` names `block_tokens` tokens, the last one fewer."""

    hash_ids: Sequence[Hashable]
    num_tokens: int
    block_tokens: int | None

    @classmethod
    def parsed(cls, line: str | bytes) -> "_Row":
        row = json.loads(line)
        size = row.get("block_size")
        if size is not None and int(size) < 1:
            raise ConfigError(f"block_size must be at least 1, not {size}")
        return cls(list(row["hash_ids"]), int(row["input_length"]), None if size is None else int(size))


def read_trace(path: Path | None, count: int, block_tokens: int | None = None) -> list[NDArray[np.uint32]]:
    """Prompts of the first requests as token ids, equal where the trace's hash ids are.

    Args:
        path: the file, plain or compressed by xz; None for the trace that is shipped.
        count: how many requests to read.
        block_tokens: that one hash id names. By default what a line says itself (`block_size`), or what fits all lines.

    Raises:
        ConfigError: the file is not such a trace.
    """
    name = str(path or "the shipped trace")
    try:
        raw = path.read_bytes() if path is not None else shipped_trace()
        text = lzma.decompress(raw) if raw[:6] == b"\xfd7zXZ\x00" else raw
        lines = [line for line in text.splitlines() if line.strip()]
        rows = [_Row.parsed(line) for line in lines[:count]]
        return _prompts(rows, block_tokens)
    except (OSError, lzma.LZMAError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot be replayed: {error if isinstance(error, ConfigError) else repr(error)}"
        ) from error


def shipped_trace() -> bytes:
    """The Mooncake conversation trace, compressed by xz."""
    return (resources.files("kvortex.cli") / "data" / "mooncake_conversation.jsonl.xz").read_bytes()


def _prompts(rows: Sequence[_Row], given: int | None) -> list[NDArray[np.uint32]]:
    if given is None:
        unsized = [row for row in rows if row.block_tokens is None and row.num_tokens > 0]
        given = _fitting_size(unsized) if unsized else USUAL_BLOCK_TOKENS
    firsts: dict[Any, int] = {}  # (tokens, hash id) -> its first token
    num_tokens = 0
    prompts = []
    for number, row in enumerate(rows, 1):
        size = row.block_tokens or given
        if len(row.hash_ids) * size + size <= row.num_tokens:
            raise ConfigError(
                f"request {number} has {len(row.hash_ids)} hash_ids for {row.num_tokens} tokens, too few for "
                f"{size} tokens each; say how many with --trace-block-size"
            )
        for hash_id in row.hash_ids:
            if (size, hash_id) not in firsts:
                firsts[size, hash_id] = num_tokens
                num_tokens += size
        prompts.append(_tokens([firsts[size, hash_id] for hash_id in row.hash_ids], size)[: row.num_tokens])
    if num_tokens > _MAX_TOKENS:
        raise ConfigError(f"it names {num_tokens} different tokens, of which {_MAX_TOKENS} can be told apart")
    return prompts


def _tokens(firsts: Sequence[int], size: int) -> NDArray[np.uint32]:
    starts = np.asarray(firsts, dtype=np.uint64)
    tokens: NDArray[np.uint32] = (starts[:, None] + np.arange(size, dtype=np.uint64)).astype(np.uint32).reshape(-1)
    return tokens


def _fitting_size(rows: Sequence[_Row]) -> int:
    """Tokens a hash id with which all requests have as many as their lengths need: a usual number, if one fits."""
    least = max(-(-row.num_tokens // max(len(row.hash_ids), 1)) for row in rows)
    most = min(((row.num_tokens - 1) // (len(row.hash_ids) - 1) for row in rows if len(row.hash_ids) > 1), default=None)
    if most is not None and least > most:
        raise ConfigError(
            f"one request needs {least} tokens or more for each of its hash_ids, another {most} or fewer; "
            "say how many with --trace-block-size"
        )
    power = 1 << (least - 1).bit_length()
    usual = [size for size in (USUAL_BLOCK_TOKENS, power) if least <= size and (most is None or size <= most)]
    return usual[0] if usual else least
