"""Write docs/api.md: all public names, from `__all__` and docstrings; `--check` fails if the file differs."""

import argparse
import ast
import dataclasses
import enum
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvortex.config.sections import Section
from kvortex.engine.core import EngineCore

PUBLIC = {
    "kvortex": "what most programs need",
    "kvortex.config": "the sections of the settings, with every default",
    "kvortex.errors": "what can go wrong, as one tree",
    "kvortex.tiers": "lower tiers: the contract, and the tiers that come with the package",
    "kvortex.testing": "doubles that fail on command, for tests of code that uses the engine or brings a tier",
    "kvortex.vllm": "the connector; imports vLLM",
}
TARGET = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# Public API

Written by `python scripts/api_docs.py` from `__all__` and the docstrings; a test compares it. What is not here is
private and may change in any release, whatever its name.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    text = api_text()
    if not check:
        TARGET.write_text(text)
    elif not TARGET.exists() or TARGET.read_text() != text:
        print("docs/api.md is not up to date: run python scripts/api_docs.py", file=sys.stderr)
        return 1
    return 0


def api_text() -> str:
    return HEAD + "".join(part for name, subject in PUBLIC.items() for part in module_text(name, subject))


def module_text(name: str, subject: str) -> Iterator[str]:
    yield f"\n## `{name}`: {subject}\n"
    if name == "kvortex.vllm":
        yield "\n`KVortexConnector`, by that name in vLLM's `kv_connector`: see [vllm.md](vllm.md).\n"
        return
    module = importlib.import_module(name)
    for public in public_names(module):
        if name != "kvortex" and public in public_names(importlib.import_module("kvortex")):
            continue
        yield from object_text(public, getattr(module, public))


def public_names(module: Any) -> list[str]:
    """`__all__`, or where there is none every class of the module's own."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return list(getattr(module, "__all__", own))


def object_text(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        bases = [base.__name__ for base in value.__bases__ if base not in (object, Section, EngineCore)]
        yield f"\n### `{name}`" + (f" ({', '.join(bases)})" if bases else "") + "\n"
        yield from doc_of(value)
        yield from members_text(value)
    elif hasattr(value, "__supertype__"):
        yield f"\n### `{name}`\n\nA `{value.__supertype__.__name__}` of its own type.\n"
    elif callable(value):
        yield f"\n### `{name}{signature_of(value)}`\n"
        yield from doc_of(value)
    else:
        yield f"\n### `{name}`\n\n`{value!r}`\n"


def members_text(kind: type) -> Iterator[str]:
    if issubclass(kind, enum.Enum):
        yield "\nMembers: " + ", ".join(f"`{member.name}`" for member in kind) + "\n"
    elif dataclasses.is_dataclass(kind):
        yield "\nFields: " + ", ".join(f"`{field}`" for field in fields_of(kind)) + "\n"
    for name, member in public_members(kind).items():
        function = getattr(member, "__func__", member)
        if isinstance(member, property):
            yield f"\n- `{name}`{described(member)}"
        elif inspect.isfunction(function):
            prefix = "async " if inspect.iscoroutinefunction(function) else ""
            yield f"\n- `{prefix}{name}{signature_of(function)}`{described(function)}"
    if any(callable(getattr(kind, name, None)) for name in public_members(kind)):
        yield "\n"


def public_members(kind: type) -> dict[str, Any]:
    """By name: the members of a class, and those of the bases that have no entry of their own."""
    inherited = [base for base in kind.__mro__[1:] if base is EngineCore]
    members = {name: member for owner in (kind, *inherited) for name, member in vars(owner).items()}
    return {name: member for name, member in members.items() if not name.startswith("_")}


def fields_of(kind: type) -> Iterator[str]:
    """The fields of a dataclass, each with its type and default as they are written."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and not ast.unparse(part.target).startswith("_"):
            annotation = ast.unparse(part.annotation).replace("'", "")
            if not annotation.startswith("ClassVar"):
                default = f" = {ast.unparse(part.value)}" if part.value is not None else ""
                yield f"{ast.unparse(part.target)}: {annotation}{default}"


def doc_of(value: Any) -> Iterator[str]:
    text = inspect.getdoc(value)
    if text:
        yield "\n```text\n" + text + "\n```\n"


def described(member: Any) -> str:
    text = inspect.getdoc(member) or ""
    return ": " + " ".join(text.split("\n\n")[0].split()) if text else ""


def signature_of(function: Any) -> str:
    """As it is written, with the names of its types."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = ast.unparse(node.args).removeprefix("self, ").removeprefix("cls, ")
    returned = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"({'' if arguments in ('self', 'cls') else arguments}){returned}".replace("'", "")


if __name__ == "__main__":
    sys.exit(main())
