"""The `bsa-vision` command, also `python -m bsa_vision`.

Needs typer and rich (the `cli` extra); without them it prints how to install them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run one command line and exit with its exit code.

    args  the arguments; None = those of the process
    """
    args = sys.argv[1:] if args is None else list(args)
    if any(arg == "" or (arg.startswith("--") and arg.endswith("=")) for arg in args):
        print(f"bsa-vision: empty argument in {args}: expected a value.", file=sys.stderr)
        sys.exit(2)
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        print(
            f"bsa-vision: typer and rich are missing or broken ({error}). Only the command line "
            "needs them; install them with pip install 'bsa-vision[cli]'.",
            file=sys.stderr,
        )
        sys.exit(2)
    from bsa_vision.cli import show
    from bsa_vision.cli.bench import app as bench
    from bsa_vision.cli.tune import tune_model

    # Internal errors show Python's own traceback, without the values of local variables.
    app = typer.Typer(
        name="bsa-vision",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def about() -> None:
        """Block-sparse attention for vision transformers."""

    app.command("doctor")(show.show_doctor)
    app.command("describe")(show.show_model)
    app.command("compare")(show.show_comparison)
    app.command("tune")(tune_model)
    app.command("masks")(show.show_masks)
    app.add_typer(bench, name="bench")
    app(args=args, prog_name="bsa-vision", obj=args)
