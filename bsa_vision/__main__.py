"""`python -m bsa_vision`: the `bsa-vision` command."""

from bsa_vision.cli.main import main

if __name__ == "__main__":
    main()
