"""Files with keys for tests, and tiers that seal."""

import os
from pathlib import Path

SECRETS = {name: f"{number:02x}" * 32 for number, name in enumerate(["old", "new", "other"], 1)}


def write_keys(path: Path, *names: str, secrets: dict[str, str] = SECRETS) -> Path:
    """A file with these keys, the first of which seals. It takes the place of one that is there in one step."""
    fresh = path.with_suffix(".fresh")
    fresh.touch(mode=0o600)
    fresh.write_text("".join(f"{name} {secrets[name]}\n" for name in names))
    os.replace(fresh, path)
    return path
