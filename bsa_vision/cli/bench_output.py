"""Progress, table, files and exit code of `bsa-vision bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console

from bsa_vision.bench import report
from bsa_vision.bench.attention import OnStep, Row
from bsa_vision.storage.machine import Machine

CHECK_FAILED, STOPPED = 1, 130

Case = TypeVar("Case")


def run_all(cases: Sequence[Case], run: Callable[[Case, OnStep], Row]) -> list[Row]:
    """Run the cases; Ctrl-C ends the run and keeps the rows so far. Progress is shown on stderr."""
    rows: list[Row] = []
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    with console.status("") as status:
        try:
            for number, case in enumerate(cases, 1):
                where = f"{number}/{len(cases)}: "
                rows.append(run(case, lambda what: status.update(where + what)))  # noqa: B023
        except KeyboardInterrupt:
            pass
    return rows


@dataclass(frozen=True)
class Output:
    """The files a run writes."""

    kind: str
    command: str
    json: Path | None
    plot: Path | None = None

    def check(self) -> None:
        """Find out before the run what would keep the files from being written."""
        for path in filter(None, (self.json, self.plot)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
            if not path.stat().st_size:
                path.unlink()
        if self.plot is not None:
            from matplotlib.figure import Figure

            allowed = Figure().canvas.get_supported_filetypes()
            if self.plot.suffix[1:] not in allowed:
                endings = ", ".join(f".{ending}" for ending in allowed)
                raise ValueError(f"--plot {self.plot}: allowed endings are {endings}.")

    def finish(self, rows: Sequence[Row], machine: Machine, rounds: int, planned: int) -> None:
        """Write the files, print the table, and leave with the exit code the rows call for."""
        if self.json is not None:
            found: Any = report.to_json(self.kind, rows, machine, self.command, planned)
            self.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        if rows:
            about = [str(machine), report.describe(rows[0].case)]
            notes = [f"* {note}" for note in report.notes(rows, rounds)]
            print("\n".join([*about, "", *report.table(rows), "", *notes]))
            if self.plot is not None:
                from bsa_vision.bench.plot import plot_rows

                plot_rows(rows, "\n".join(about)).savefig(self.plot, dpi=130)
        if len(rows) < planned:
            print(f"stopped: {len(rows)} of {planned} rows were measured", file=sys.stderr)
            raise typer.Exit(STOPPED)
        if not all(row.ok for row in rows):
            print("a result is wrong: see ERROR above", file=sys.stderr)
            raise typer.Exit(CHECK_FAILED)
