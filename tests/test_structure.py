"""Rules of the house that no linter knows."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "kvortex"


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_importing(prefix: str) -> set[str]:
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name == prefix or name.startswith(prefix + ".") for name in imports_of(path))
    }


def test_numba_cuda_is_imported_in_one_module() -> None:
    assert modules_importing("numba.cuda") == {"kernels/cuda_ops.py"}


def test_the_driver_is_reached_through_one_module() -> None:
    assert modules_importing("cuda.bindings") == {"cuda/driver.py"}


def test_vllm_stays_in_its_folder() -> None:
    assert all(name.startswith("vllm/") for name in modules_importing("vllm"))


def test_ciphers_come_through_one_module() -> None:
    assert modules_importing("cryptography") == {"tiers/xaes.py"}


def test_no_pickle_in_a_data_path() -> None:
    assert modules_importing("pickle") == {
        "runtime/jit.py"
    }  # numba's cache is pickled: it names the error of a damaged file


def test_every_room_says_whether_it_is_public() -> None:
    sys.path.insert(0, str(PACKAGE.parent / "scripts"))
    from api_docs import PUBLIC

    rooms = [path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    rooms += [path for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    private = set()
    for path in rooms:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if "Private: it may change in any release" in (ast.get_docstring(ast.parse(path.read_text())) or ""):
            private.add(name)
        else:
            assert name in PUBLIC, f"{name} is not in docs/api.md and does not say that it is private"
    assert not private & set(PUBLIC)
