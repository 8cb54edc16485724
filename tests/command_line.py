"""What the user types, read in this process."""

from typer.testing import CliRunner

from vltrain.cli import app


def type_in(*words: str) -> int:
    """The exit code of a command."""
    return CliRunner().invoke(app, list(words), catch_exceptions=False).exit_code
