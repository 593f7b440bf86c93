"""The `bsa-vision` command, also `python -m bsa_vision`. Needs typer and rich (the `cli` extra), and says so without them."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run one command line (None = the process's own) and leave with its exit code."""
    given = sys.argv[1:] if args is None else list(args)
    if any(word == "" or (word.startswith("--") and word.endswith("=")) for word in given):
        print(
            f"bsa-vision: an argument is empty in {given}: expected a value for each; leave it out.",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        print(
            f"bsa-vision: typer and rich are missing or broken ({error}): the command line needs both, the Python package works "
            "without; install them with pip install 'bsa-vision[cli]'.",
            file=sys.stderr,
        )
        sys.exit(2)
    from bsa_vision.cli import show
    from bsa_vision.cli.bench import app as bench
    from bsa_vision.cli.tune import tune_model

    # A bug should look like one: Python's own traceback, without the values of local variables.
    app = typer.Typer(
        name="bsa-vision",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def about() -> None:
        """Vision transformers with block-sparse heads."""

    app.command("doctor")(show.show_doctor)
    app.command("describe")(show.show_model)
    app.command("compare")(show.show_comparison)
    app.command("tune")(tune_model)
    app.command("masks")(show.show_masks)
    app.add_typer(bench, name="bench")
    app(args=given, prog_name="bsa-vision", obj=given)
