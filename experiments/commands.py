"""A verb of the command line as a record, and how it becomes a command that imports its module when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand

from experiments.application import (
    lines_aside,
    require_words,
    single,
    then,
    values_named,
    wants_json_alone,
    without_dry_run,
)
from experiments.verbs.signature import signature_alone


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Attributes:
        function: module under ``experiments`` and function, which typer makes a command of.
        help: what it does, for the list of verbs.
        examples: whole commands, shown at the end of its own help.
        panel: heading it is listed under.
        next: words of the command that goes on from here, where the verb does not name it itself.
    """

    function: str
    help: str
    examples: tuple[str, ...]
    panel: str = "Runs"
    next: tuple[str, ...] = ()

    @property
    def epilog(self) -> str:
        """The examples, one a line."""
        return "\n\n".join(["Examples:" if len(self.examples) > 1 else "Example:", *self.examples])

    def signature(self) -> Callable[..., Any]:
        """The function with its options; imported only where its signature needs more than is light."""
        module, _, attribute = self.function.partition(":")
        return signature_alone(f"experiments.{module}", attribute) or self.imported()

    def imported(self) -> Callable[..., Any]:
        """The function that runs."""
        module, _, attribute = self.function.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(f"experiments.{module}"), attribute)
        return found

    def command(self, *, to_run: bool = False) -> Any:
        """What typer makes of it."""
        function = self.imported() if to_run else self.signature()
        return typer.main.get_command(single(function, self.epilog))


def _completing(verb: Verb) -> type[TyperCommand]:
    """A command that takes any words, and completes those of the verb behind it."""

    class Command(TyperCommand):
        def shell_complete(self, ctx: Any, incomplete: str) -> Any:
            command = verb.command()
            inner = command.make_context(ctx.info_name, list(ctx.args), resilient_parsing=True)
            return command.shell_complete(inner, incomplete)

    return Command


def register(name: str, verb: Verb, group: typer.Typer, program: str, *, hidden: bool = False) -> None:
    """Add a verb to a group of commands."""

    def call(context: typer.Context) -> None:
        words = context.args
        helped = {"-h", "--help"} & set(words)
        if not helped:
            require_words(words)
        command: Any = verb.command(to_run=not helped)
        with lines_aside(wants_json_alone(words)):
            with values_named(words):
                code = command.main(words, prog_name=f"{program} {name}", standalone_mode=False)
            if code or helped:
                pass
            elif "--dry-run" in words:
                then(*program.split()[1:], name, *without_dry_run(words))
            elif verb.next:
                then(*verb.next)
        if code:
            raise typer.Exit(code)

    group.command(
        name=name,
        cls=_completing(verb),
        help=verb.help,
        rich_help_panel=verb.panel,
        hidden=hidden,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
    )(call)
