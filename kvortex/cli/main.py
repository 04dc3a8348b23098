"""`kvortex demo` and `kvortex replay`."""

import argparse
import sys
from pathlib import Path

from kvortex.config import EVICTION_POLICIES, parse_bytes
from kvortex.errors import ConfigError, KVortexError


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _add_replay_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, help="JSON lines with input_length and hash_ids, .xz or plain")
    parser.add_argument("--requests", type=_positive, default=1000, help="replay the first N (default %(default)s)")
    parser.add_argument("--pool", type=_size, default=1 << 30, help="CPU pool, e.g. 512MiB (default 1GiB)")
    parser.add_argument("--policy", choices=EVICTION_POLICIES, default="lru", help="who goes first (default lru)")
    parser.add_argument("--disk", default="", metavar="DIRECTORY", help="keep blocks there too, for later runs as well")
    parser.add_argument("--concurrency", type=_positive, default=4, help="requests at a time (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON instead of a table")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvortex", description="A KV-cache store for LLM serving.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a transformer's KV leaves and comes back; then a trace is replayed")
    _add_replay_options(demo)
    replay = commands.add_parser("replay", help="replay a request trace through an engine")
    _add_replay_options(replay)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit status: 0 if all bytes were right, 1 if not, 2 for bad arguments."""
    arguments = _parser().parse_args(argv)
    from kvortex.cli import replay

    try:
        if arguments.command == "demo":
            from kvortex.cli import transformer

            if not transformer.run(as_json=arguments.json):
                return 1
        return 0 if replay.run(arguments) else 1
    except (KVortexError, OSError) as error:
        print(f"kvortex: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvortex: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
