"""How a command ends: a user's error is one sentence and a non-zero exit."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

import typer


def explain(error: BaseException) -> str:
    """One sentence for an error a user can act on."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some space and start again, finished stages are kept"
    if isinstance(error, OSError):
        return f"{error.strerror or error}: '{error.filename}'; check the path and its permissions"
    return " ".join(str(error).split())


def single(function: Callable[..., Any]) -> typer.Typer:
    """A typer application of one command."""
    made = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    made.command()(function)
    return made


def run_application(command: Any) -> None:
    """Run a typer application or one command function: a user error ends with one sentence, not 0."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not isinstance(command, typer.Typer):
        command = single(command)
    try:
        command()
    except (ValueError, OSError) as error:
        if os.environ.get("POLCA_EDIT_TRACEBACK"):
            raise
        typer.echo(f"polca-edit: {explain(error)}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("polca-edit: stopped; run the same command again to go on", err=True)
        sys.exit(130)
