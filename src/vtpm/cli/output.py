"""How the command line speaks: results on stdout, messages on stderr; JSON where asked; colour on a terminal alone.

For the commands of cli/. Text that comes from elsewhere (names, reasons, commands) is shown with its control characters
escaped, so that it cannot drive the terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import sys
from collections.abc import Iterator, Sequence

import click

from vtpm.errors import VtpmError


class Output(enum.Enum):
    """In which form results and errors are printed."""

    HUMAN = "human"
    JSON = "json"


def printable(text: str) -> str:
    """Return the text with everything that is not printable as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def to_json(value: object, *, indent: int | None = 2) -> str:
    """Return a dataclass of wire/api.py, or a list or dict of such, as JSON in ASCII."""
    return json.dumps(value, default=_jsonable, indent=indent)


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print a result as JSON."""
    click.echo(to_json(value, indent=indent))


def print_line(text: str) -> None:
    """Print one line of a result."""
    click.echo(printable(text))


def print_message(text: str) -> None:
    """Print a message, which is no result."""
    click.echo(printable(text), err=True)


def print_error(error: VtpmError, output: Output) -> None:
    """Print an error: one line, and one more for the next step; or one JSON object."""
    if output is Output.JSON:
        report = {"code": error.code, "message": error.message, "next_step": error.next_step}
        click.echo(to_json(report, indent=None), err=True)
        return
    click.echo(f"{click.style('error:', fg='red', bold=True)} {printable(error.message)}", err=True)
    if error.next_step:
        click.echo(f"next: {printable(error.next_step)}", err=True)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headers: drawn on a terminal, else in plain aligned columns, cut nowhere."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*headers)
        for row in cells:
            table.add_row(*(Text(cell, overflow="fold") for cell in row))
        Console().print(table)
        return
    lines = [list(headers), *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one line each, the values aligned."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {printable(value)}")


def print_warnings(warnings: Sequence[str]) -> None:
    """Print warnings that are part of a result: a panel on a terminal, else a line each."""
    if not warnings:
        return
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.panel import Panel
        from rich.text import Text

        text = Text("\n".join(printable(warning) for warning in warnings), style="bold")
        Console().print(Panel(text, title="WARNING", border_style="yellow"))
        return
    for warning in warnings:
        click.echo(f"WARNING: {printable(warning)}")


@contextlib.contextmanager
def progress(text: str, output: Output) -> Iterator[None]:
    """Show that something long is going on: a spinner on a terminal, else one line; nothing with JSON."""
    if output is Output.JSON:
        yield
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text

        with Console(stderr=True).status(Text(printable(text))):
            yield
    else:
        print_message(f"{text} ...")
        yield


def _jsonable(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
