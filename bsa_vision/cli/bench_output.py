"""Progress, tables, files and exit codes of `bsa-vision bench`."""

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
    """Run the cases and show progress on stderr.

    Ctrl-C stops the run; the rows measured so far are returned.
    """
    rows: list[Row] = []
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    with console.status("") as status:
        try:
            for number, case in enumerate(cases, 1):
                prefix = f"{number}/{len(cases)}: "
                rows.append(run(case, lambda step: status.update(prefix + step)))  # noqa: B023
        except KeyboardInterrupt:
            pass
    return rows


@dataclass(frozen=True)
class Output:
    """Files that a run writes, and the command line that they record."""

    kind: str
    command: str
    json: Path | None
    plot: Path | None = None

    def check(self) -> None:
        """Raise OSError or ValueError before the run if a file cannot be written."""
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
        """Write the files, print the table, and exit with an error code if a result is wrong."""
        if self.json is not None:
            data: Any = report.to_json(self.kind, rows, machine, self.command, planned)
            self.json.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
        if rows:
            heading = [str(machine), report.describe(rows[0].case)]
            notes = [f"* {note}" for note in report.notes(rows, rounds)]
            print("\n".join([*heading, "", *report.table(rows), "", *notes]))
            if self.plot is not None:
                from bsa_vision.bench.plot import plot_rows

                plot_rows(rows, "\n".join(heading)).savefig(self.plot, dpi=130)
        if len(rows) < planned:
            print(f"stopped: {len(rows)} of {planned} rows were measured", file=sys.stderr)
            raise typer.Exit(STOPPED)
        if not all(row.ok for row in rows):
            print("a result is wrong: see ERROR above", file=sys.stderr)
            raise typer.Exit(CHECK_FAILED)
