"""`python -m minillm` is the same program as the `minillm` command."""

from minillm.cli.app import app


def main() -> None:
    """Run the program."""
    app(prog_name="minillm")


if __name__ == "__main__":
    main()
