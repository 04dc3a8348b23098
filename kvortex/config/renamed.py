"""Old names of settings, from before there were sections; accepted for one release, with a warning."""

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple


class Place(NamedTuple):
    """The place of a setting: its section and name."""

    section: str
    name: str

    def __str__(self) -> str:
        return f"{self.section}.{self.name}"


RENAMED: Final[Mapping[str, Place]] = MappingProxyType(
    {
        "cpu_pool_bytes": Place("pool", "bytes"),
        "pin_piece_bytes": Place("pool", "pin_piece_bytes"),
        "numa_aware": Place("pool", "numa_aware"),
        "eviction_policy": Place("eviction", "policy"),
        "watermark": Place("eviction", "watermark"),
        "eviction_ratio": Place("eviction", "ratio"),
        "ghost_entries": Place("eviction", "ghost_entries"),
        "num_transfer_streams": Place("transfer", "streams"),
        "max_batch_requests": Place("transfer", "max_batch_requests"),
        "max_batch_bytes": Place("transfer", "max_batch_bytes"),
        "linger_s": Place("transfer", "linger_s"),
        "max_consecutive_loads": Place("transfer", "max_consecutive_loads"),
        "max_outstanding_requests": Place("transfer", "max_outstanding_requests"),
        "self_test": Place("transfer", "self_test"),
        "max_pack_error": Place("codec", "max_error"),
        "tier_inclusion": Place("tier", "inclusion"),
        "tier_admission": Place("tier", "admission"),
        "tier_queue_blocks": Place("tier", "queue_blocks"),
        "tier_shed": Place("tier", "shed"),
        "fetch_blocks": Place("tier", "fetch_blocks"),
        "tier_timeout_s": Place("tier", "timeout_s"),
        "load_deadline_s": Place("tier", "load_deadline_s"),
        "disk_path": Place("disk", "path"),
        "disk_capacity_bytes": Place("disk", "capacity_bytes"),
        "disk_fsync": Place("disk", "fsync"),
    }
)
"""Old name -> where the setting is now."""


def warn_of_old_name(old: str, new: str) -> None:
    """Warn that a setting was given or read under an old name, which the next release does not know."""
    warnings.warn(f"the setting {old} is now {new}; the old name will go in 0.3", FutureWarning, stacklevel=3)
