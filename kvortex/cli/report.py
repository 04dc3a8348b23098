"""Tables on standard output and a progress bar on standard error; needs rich."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvortex.config import format_bytes

if TYPE_CHECKING:
    from kvortex.cli.transformer import Outcome


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar; call the yielded function once per step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def print_transformer(outcomes: Sequence["Outcome"], device: str) -> None:
    """Print the result for each prompt."""
    table = Table(title=f"A transformer's KV out of its cache and back ({device})")
    for heading in ("prompt tokens", "blocks", "logits while decoding"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        verdict = "bit-identical" if outcome.identical else "[red]different[/red]"
        table.add_row(str(outcome.prompt_tokens), str(outcome.blocks), verdict)
    Console().print(table)


def print_replay(figures: dict[str, Any]) -> None:
    """Figures of a replay."""
    table = Table(title="Conversation trace through the engine", show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), _readable(name, value))
    Console().print(table)


def print_note(text: str) -> None:
    """Print a line for human readers, on standard error."""
    Console(stderr=True).print(text, highlight=False)


def _readable(name: str, value: Any) -> str:
    if "bytes" in name:
        return format_bytes(value)
    if name == "hit_rate":
        return f"{value:.1%} of blocks"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
