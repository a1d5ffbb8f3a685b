"""The program `paretoprune`: runs a command line; errors become sentences and statuses."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from paretoprune.experiments.cli import main_job, research  # noqa: F401  they add the commands
from paretoprune.experiments.cli.app import app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        arguments: Without the program's name; None takes those of this process.

    Returns:
        0; 1 where a search found no network; 2 after bad input, said in one sentence on stderr;
        130 after Ctrl-C.
    """
    try:
        status = app(args=arguments, prog_name="paretoprune", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        return 130
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if sentence:
            typer.echo(f"error: {' '.join(sentence.split())}", err=True)
        return 2
    return status if isinstance(status, int) else 0


def _sentence(error: Exception) -> str | None:
    """Returns what to say about an error of the user's; None for a fault of the program."""
    usage = getattr(error, "format_message", None)
    if usage is not None:  # typer's own, whose class is not public
        message = str(usage()).rstrip(".")
        return message and f"{message}; see --help."  # without arguments, help was printed
    ours = type(error).__module__.startswith("paretoprune.")
    if isinstance(error, (ValueError, OSError)) or (ours and isinstance(error, RuntimeError)):
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
