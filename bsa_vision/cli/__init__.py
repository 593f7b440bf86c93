"""The `bsa-vision` command. Needs typer and rich (the `cli` extra)."""
