"""Collect wheels for a GPU machine without a network: NumPy below 2.5 and whatever the tests and benchmarks need.

    python scripts/gpu_wheelhouse.py [--python 3.12] [--to .gpu-wheels]

On the GPU machine, which has torch, numba and numba-cuda:

    python3 -m pip install --no-index --no-deps --target /tmp/site .gpu-wheels/*.whl
    export PYTHONPATH=/tmp/site:$PWD
"""

import argparse
import subprocess
import sys
from pathlib import Path

WHEELS = {
    "aiofiles": "25.1.0",
    "hypothesis": "6.170.15",
    "iniconfig": "2.3.1",
    "numpy": "2.4.6",
    "packaging": "26.3",
    "pluggy": "1.7.0",
    "pygments": "2.21.0",
    "pytest": "9.2.0",
    "pytest-asyncio": "1.5.0",
    "sortedcontainers": "2.4.0",
}
MANYLINUX = (5, 12, 17, 24, 26, 27, 28, 31, 34, 35, 39)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="Python version of the GPU machine")
    parser.add_argument("--to", type=Path, default=Path(".gpu-wheels"), help="folder for the wheels")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    for stale in arguments.to.glob("*.whl"):
        stale.unlink()
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in MANYLINUX]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        f"--python-version={arguments.python}", "--implementation=cp", *platforms,
        "--platform=manylinux2014_x86_64", f"--dest={arguments.to}",
        *(f"{name}=={version}" for name, version in WHEELS.items()),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    wheels = sorted(arguments.to.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 2**20:.1f} MiB, in {arguments.to}")


if __name__ == "__main__":
    main()
