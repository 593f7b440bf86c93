"""What a run shows and writes: progress on stderr, the table on standard output, files, the exit code. Needs rich and typer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bsa_vision.bench import report
from bsa_vision.bench.attention import Options, Row
from bsa_vision.bench.machine import Machine
from bsa_vision.bench.models import ModelRow

CHECK_FAILED, STOPPED = 1, 130
PLOT_FORMATS = (".png", ".pdf", ".svg")

Found = TypeVar("Found", Row, ModelRow)
Job = tuple[str, int, Callable[[Callable[[str], Any]], Found]]  # name, number of steps, what runs it


def run_all(jobs: Sequence[Job[Found]]) -> tuple[list[Found], bool]:
    """The rows, and whether Ctrl-C cut them short; a progress bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Found] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(steps for _, steps, _ in jobs))
        try:
            for number, (name, _, run) in enumerate(jobs, 1):
                done = sum(steps for _, steps, _ in jobs[: number - 1])
                where = f"{number}/{len(jobs)} {name}: "
                progress.update(task, completed=done, description=where + "what is right")
                rows.append(run(lambda what: progress.update(task, advance=1, description=where + what)))  # noqa: B023
        except KeyboardInterrupt:
            return rows, True
    return rows, False


# Showing


def stdout() -> Console:
    """Standard output: the terminal's width, or when piped no limit and no colour."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=1000)


def _show(machine: Machine, lines: Sequence[str], tables: Sequence[Any], notes: Sequence[str]) -> None:
    console = stdout()
    for line in (str(machine), *lines):
        console.print(line, markup=False)
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    for note in notes:
        console.print(f"* {note}", markup=False)


def _fitting(table: Callable[..., Any]) -> Any:
    """The table with one line per row, or with two where the terminal is too narrow for that."""
    console = stdout()
    piped = not console.is_terminal
    wide = table(wide=True, piped=piped)
    unlimited = console.options.update(width=10_000)
    return wide if piped or console.measure(wide, options=unlimited).maximum <= console.width else table(wide=False)


def show_attention(rows: Sequence[Row], options: Options, machine: Machine) -> None:
    if not rows:
        return
    tables = [_fitting(lambda **how: report.attention_table(rows, **how))]
    if options.memory:
        tables.append(_fitting(lambda **how: report.memory_table(rows, **how)))
    _show(machine, [report.constants([row.case for row in rows])], tables, report.attention_notes(rows, options.rounds))


def show_models(rows: Sequence[ModelRow], rounds: int, machine: Machine) -> None:
    if rows:
        table = _fitting(lambda **how: report.model_table(rows, **how))
        _show(machine, [report.model_constants(rows)], [table], report.model_notes(rows, rounds))


@dataclass(frozen=True)
class Output:
    """The files a run writes."""

    json: Path | None
    plot: Path | None

    def check(self) -> None:
        """Whatever would keep them from being written is said before the run."""
        for name, path in (("--json", self.json), ("--plot", self.plot)):
            if path is None:
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a"):
                    pass
            except OSError as error:
                raise ValueError(
                    f"{name} {path}: it cannot be written ({error.strerror}): allowed is a file in a folder of yours; choose another."
                ) from None
            if path.stat().st_size == 0:
                path.unlink()
        if self.plot is not None:
            _check_plot(self.plot)

    def write(
        self, kind: str, rows: Sequence[Row] | Sequence[ModelRow], machine: Machine, command: str, planned: int
    ) -> None:
        if self.json is not None:
            found = report.to_json(kind, rows, machine, command, planned)
            self.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        if self.plot is not None and rows:
            from bsa_vision.bench.plot import plot_rows, save_plot

            attention_rows = [row for row in rows if isinstance(row, Row)]
            cases = [row.case for row in attention_rows]
            title = f"{machine}\n{report.constants(cases)}"
            save_plot(plot_rows(attention_rows, title, report.labels(cases)), self.plot)


def _check_plot(path: Path) -> None:
    if path.suffix not in PLOT_FORMATS:
        raise ValueError(
            f"--plot {path.name}: allowed are {', '.join(PLOT_FORMATS)}; give the file one of these endings."
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--plot needs matplotlib, which cannot be imported ({error}): allowed without it are the table and --json; install "
            "it with pip install 'bsa-vision[plots]'."
        ) from None


def finish(rows: Sequence[Row] | Sequence[ModelRow], stopped: bool, planned: int) -> None:
    """Leave with the exit code that the rows call for."""
    if stopped:
        Console(stderr=True).print(f"stopped: {len(rows)} of {planned} rows were measured", highlight=False)
        raise typer.Exit(STOPPED)
    if not all(row.ok for row in rows):
        Console(stderr=True).print("a result is wrong: see ERROR above", highlight=False)
        raise typer.Exit(CHECK_FAILED)
