"""`kvortex demo`, `kvortex replay`, `kvortex serve` and `kvortex seal-key`."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from kvortex import __version__
from kvortex.cli import REPLAY_BLOCK_BYTES
from kvortex.config import EVICTION_POLICIES, GIB, KVortexConfig, format_bytes, parse_bytes
from kvortex.errors import ConfigError, KVortexError


def run(argv: Sequence[str]) -> int:
    """Parse arguments and run the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "serve":
            return _run_serve(arguments)
        if arguments.command == "seal-key":
            return _run_seal_key(arguments)
        report = None if arguments.json else _report()
        return _run_demo(arguments, report) if arguments.command == "demo" else _run_replay(arguments, report)
    except (KVortexError, OSError) as error:
        print(f"kvortex: {error}", file=sys.stderr)
        return 2


def _report() -> ModuleType:
    try:
        from kvortex.cli import report
    except ImportError as error:
        raise ConfigError("tables need rich: pip install 'kvortex[demo]', or give --json") from error
    return report


def _run_demo(arguments: argparse.Namespace, report: ModuleType | None) -> int:
    from kvortex.cli import replay, transformer

    outcomes, device = transformer.run()
    document: dict[str, Any] = {"device": device, "transformer": [vars(outcome) for outcome in outcomes]}
    if report is not None:
        report.print_transformer(outcomes, device)
    is_right = all(outcome.identical for outcome in outcomes)
    if is_right:
        document["replay"] = replay.run(arguments, report)
        is_right = document["replay"]["mismatches"] == 0
    if report is None:
        print(json.dumps(document))
    return 0 if is_right else 1


def _run_replay(arguments: argparse.Namespace, report: ModuleType | None) -> int:
    from kvortex.cli import replay

    figures = replay.run(arguments, report)
    if report is None:
        print(json.dumps(figures))
    return 0 if figures["mismatches"] == 0 else 1


def _run_serve(arguments: argparse.Namespace) -> int:
    from kvortex.cli import serve

    if arguments.child_of is not None:
        config = KVortexConfig.from_mapping(json.loads(sys.stdin.readline()))
    else:
        config = KVortexConfig.from_file(arguments.config) if arguments.config else KVortexConfig.from_env()
    if arguments.pool is not None:
        config = config.replace(pool=arguments.pool)
    if arguments.eviction is not None:
        config = config.replace(eviction=arguments.eviction)
    if arguments.disk is not None:
        config = config.replace(disk=arguments.disk)
    if arguments.tier is not None:
        config = config.replace(tier={"urls": tuple(arguments.tier)})
    if arguments.canonical_layout:
        config = config.replace(tier={"canonical_layout": True})
    path = Path(arguments.socket or config.owner.socket or serve.default_socket())
    serve.run(config, path, as_json=arguments.json, parent=arguments.child_of)
    return 0


def _run_seal_key(arguments: argparse.Namespace) -> int:
    from kvortex.tiers.keyring import new_key_line

    print(new_key_line(arguments.id or f"{datetime.now(UTC):%Y-%m-%d}"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvortex", description="A KV-cache store for LLM serving.")
    parser.add_argument("--version", action="version", version=f"kvortex {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a transformer's KV leaves and comes back; then a trace is replayed")
    _add_replay_options(demo)
    replay = commands.add_parser("replay", help="replay a request trace through an engine")
    _add_replay_options(replay)
    serve = commands.add_parser("serve", help="hold one pool for all engines of this machine, until Ctrl-C")
    add = serve.add_argument
    add("--pool", type=_size, help="size of the pool, e.g. 64GiB (default: KVORTEX_POOL, or 4GiB)")
    add("--socket", metavar="PATH", help="where engines find it (default: kvortex.sock in XDG_RUNTIME_DIR)")
    add("--eviction", choices=EVICTION_POLICIES, help="eviction policy (default lru)")
    add("--disk", metavar="DIRECTORY", help="keep blocks in this directory, too, also for later runs")
    add("--tier", action="append", metavar="URL", help="a lower tier, e.g. disk:///var/cache/kv; repeat for a chain")
    add("--canonical-layout", action="store_true", help="lower tiers serve engines of all tensor-parallel sizes alike")
    add("--child-of", type=int, help=argparse.SUPPRESS)  # for engines: settings come as JSON on standard input
    add("--config", type=Path, metavar="FILE", help="settings as TOML, instead of KVORTEX_* of the environment")
    add("--json", action="store_true", help="say where it listens as one JSON document")
    seal_key = commands.add_parser("seal-key", help="print a new key for the file of a tier's seal_keys")
    seal_key.add_argument("--id", help="what the key is called, up to 16 characters (default: today's date)")
    return parser


def _add_replay_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    own = format_bytes(REPLAY_BLOCK_BYTES)
    add("--trace", type=Path, help="JSON lines with input_length and hash_ids, .xz or plain (default: the shipped one)")
    add(
        "--trace-block-size",
        type=_positive,
        metavar="TOKENS",
        help="tokens in the block of one hash id (default: block_size of a line, or the size that fits all lines)",
    )
    add("--requests", type=_positive, default=1000, help="replay the first N (default %(default)s)")
    add("--pool", type=_size, default=GIB, help="CPU pool, e.g. 512MiB (default 1GiB)")
    add(
        "--block-bytes",
        type=_size,
        default=REPLAY_BLOCK_BYTES,
        metavar="SIZE",
        help="bytes of 16 tokens of your model, e.g. 2MiB: the replay keeps as many blocks as --pool holds of that "
        f"size. Its own blocks, and the default, are {own}",
    )
    add("--eviction", "--policy", choices=EVICTION_POLICIES, default="lru", help="eviction policy (default lru)")
    add(
        "--disk",
        default="",
        metavar="DIRECTORY",
        help="keep blocks in this directory, too, also for later runs; each request waits until its blocks are written",
    )
    add("--concurrency", type=_positive, default=4, help="requests at a time (default %(default)s)")
    add("--json", action="store_true", help="print figures as one JSON document instead of tables")


def _size(text: str) -> int:
    try:
        nbytes = parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive size")
    return nbytes


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number
