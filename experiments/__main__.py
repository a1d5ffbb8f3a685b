"""The program `paretoprune`: runs a command line; errors become sentences and statuses."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        arguments: Without the program's name; None takes those of this process.

    Returns:
        0; 1 where a search found no network; 2 after bad input, said in one sentence on stderr;
        130 after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a dash must not end a search where all is ASCII
    with _noted_interrupts() as interrupts:
        try:
            status = _run(arguments)
        except KeyboardInterrupt:
            status = 130
        except Exception as error:
            sentence = _sentence(error)
            if sentence is None and not interrupts:
                raise
            if sentence:
                print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
            status = 130 if interrupts else 2
    if status == 130:
        print("interrupted", file=sys.stderr)
    return status


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Yields a list that gets an entry for every Ctrl-C, which raises as it always does.

    An import that is broken off may swallow that and leave half a module, on which others fail.
    """
    noted: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so after nohup
    try:
        if ours:
            signal.signal(signal.SIGINT, note)
    except ValueError:  # outside the main thread, which alone gets signals
        ours = False
    try:
        yield noted
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(arguments: Sequence[str] | None) -> int:
    """Returns the status of a command line; its imports may be interrupted, too."""
    import typer

    from paretoprune.experiments.cli import main_job, research  # noqa: F401  they add the commands
    from paretoprune.experiments.cli.app import app

    try:
        status = app(args=arguments, prog_name="paretoprune", standalone_mode=False)
    except typer.Abort as error:  # typer's word for an EOFError, such as that of a cut file
        raise error.__cause__ or error from None
    return status if isinstance(status, int) else 0


def _sentence(error: Exception) -> str | None:
    """Returns what to say about an error of the user's; None for a fault of the program."""
    usage = getattr(error, "format_message", None)
    if usage is not None:  # typer's own, whose class is not public
        message = str(usage()).rstrip(".")
        return message and f"{message}; see --help."  # without arguments, help was printed
    ours = type(error).__module__.startswith("paretoprune.")
    disk = type(error).__name__ == "SafetensorError"  # in place of an OSError
    said = isinstance(error, (ValueError, OSError)) or (ours and isinstance(error, RuntimeError))
    if said or disk:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
