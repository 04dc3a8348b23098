"""Figures as tables of text."""

from collections.abc import Mapping

from kvortex.config import format_bytes
from kvortex.stats.figures import BreakerFigures, LinkFigures, PoolFigures, TieringFigures, TransferSnapshot

_TRANSFER_HEAD = ("transfer", "tier", "blocks", "bytes", "failed", "p50 ms", "p90 ms", "p99 ms")
_POOL_HEAD = ("pool", "capacity", "allocated", "largest free", "fragmented", "extents", "pinned")


def transfer_lines(transfers: tuple[TransferSnapshot, ...]) -> list[str]:
    """A header and one line for each direction and tier; no lines without transfers."""
    rows = [_transfer_row(t) for t in transfers]
    return _aligned([_TRANSFER_HEAD, *rows], num_left=2) if rows else []


def pool_lines(pools: tuple[PoolFigures, ...]) -> list[str]:
    """A header and one line for each pool; no lines without pools. Then what this engine gets of one that it shares."""
    rows = [_pool_row(p) for p in pools]
    shares = [_share_line(p) for p in pools if p.priority or p.quota_bytes]
    return [*_aligned([_POOL_HEAD, *rows], num_left=1), *shares] if rows else []


def tiering_lines(t: TieringFigures) -> list[str]:
    """The transfers to and from the lower tier, its occupancy and its failures; a further line for each of several."""
    return [_tiering_line(t), *(_link_line(link) for link in t.links)]


def _link_line(link: LinkFigures) -> str:
    state = "" if link.usable else " (cannot be used)"
    return (
        f"  {link.tier}{state}: {link.hits} read, {link.num_blocks} blocks, {format_bytes(link.used_bytes)} of "
        f"{format_bytes(link.capacity_bytes)}{_breakers(link.breakers)}"
    )


def _breakers(breakers: Mapping[str, BreakerFigures]) -> str:
    return "".join(f", {what} are {b.state}, {b.opened} times so far" for what, b in breakers.items() if b.opened)


def _tiering_line(t: TieringFigures) -> str:
    state = "" if t.usable else " (cannot be used)"
    return (
        f"{t.tier}{state}: {t.written_blocks} written, {t.failed_writes} refused, {t.fetched_blocks} fetched, "
        f"{t.shed_blocks} shed, {t.waiting_blocks} waiting, {format_bytes(t.used_bytes)} of "
        f"{format_bytes(t.capacity_bytes)}"
        + "".join(f", {count} {cause}" for cause, count in t.causes.items() if count)
        + _breakers(t.breakers)
    )


def _transfer_row(t: TransferSnapshot) -> tuple[str, ...]:
    latencies = (f"{seconds * 1e3:.3f}" for seconds in (t.p50_s, t.p90_s, t.p99_s))
    return (t.direction.value, t.tier, str(t.blocks), format_bytes(t.nbytes), str(t.failures), *latencies)


def _pool_row(p: PoolFigures) -> tuple[str, ...]:
    sizes = (format_bytes(n) for n in (p.capacity_bytes, p.allocated_bytes, p.largest_free_bytes))
    return (p.name, *sizes, f"{p.fragmentation:.1%}", str(p.num_extents), format_bytes(p.pinned_bytes))


def _share_line(p: PoolFigures) -> str:
    quota = f", {format_bytes(p.quota_used_bytes)} of a quota of {format_bytes(p.quota_bytes)}" if p.quota_bytes else ""
    return f"{p.name}: priority {p.priority}{quota}"


def _aligned(rows: list[tuple[str, ...]], num_left: int) -> list[str]:
    """Rows with aligned columns: the first `num_left` to the left, the others, which are numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
