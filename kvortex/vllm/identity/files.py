"""A digest of weight files that does not read them whole, and changes if weights or an adapter are replaced."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

WEIGHT_SUFFIXES: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".tensors"})
CONFIG_NAMES: Final = frozenset(
    {
        "adapter_config.json",
        "hf_quant_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    }
)
"""Files that say how weights or inputs are used. `config.json` is not among them: vLLM's configuration includes it."""
MODEL_CODE_SUFFIX: Final = ".py"  # a model may bring its own code
WINDOW_BYTES: Final = 4096
MAX_WINDOWS: Final = 256
"""In all files together: so a digest takes milliseconds on a local disk, and about a second on a slow network share."""
SMALL_FILE_BYTES: Final = 1 << 20  # read whole


def weights_digest(path: Path) -> str:
    """Digest of the files of a model or an adapter, 64 hex digits; `""` if there are no weights.

    It covers the name, size and modification time of each file, and windows of bytes that are spread over it. If the
    file is a link to a blob that is named by its content, as in Hugging Face's cache, that name replaces all of these.

    Args:
        path: a folder, or a single file.

    Raises:
        OSError: a file exists and cannot be read.
    """
    files = sorted(_counting_files(path))
    if not path.is_file() and not any(file.suffix in WEIGHT_SUFFIXES for file in files):
        return ""
    digest = hashlib.sha256()
    windows = max(2, MAX_WINDOWS // len(files))
    for file in files:
        name = file.relative_to(path).as_posix() if file != path else file.name
        for part in (name.encode(), _content_of(file, windows)):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _counting_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        for file in path.iterdir():
            if file.suffix in WEIGHT_SUFFIXES or file.name in CONFIG_NAMES or file.suffix == MODEL_CODE_SUFFIX:
                yield file


def _content_of(file: Path, windows: int) -> bytes:
    target = Path(os.path.realpath(file))
    if file.is_symlink() and target.parent.name == "blobs":
        return target.name.encode()
    status = target.stat()
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns} ".encode())
    with target.open("rb", buffering=0) as handle:
        if status.st_size <= SMALL_FILE_BYTES:
            digest.update(handle.read())
        else:
            last = status.st_size - WINDOW_BYTES
            for number in range(windows):
                digest.update(os.pread(handle.fileno(), WINDOW_BYTES, last * number // (windows - 1)))
    return digest.digest()
