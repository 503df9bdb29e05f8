"""Reference pages made from the code: commands, config keys and public Python names.

mkdocs-gen-files runs this file when the site is built; nothing it writes is kept in the repository.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.models import OptionInfo

import interventions
import polca_edit
from experiments.cli import STUDIES, VERBS, Verb
from experiments.config import RunConfig, preset_names
from experiments.tasks import TASKS


def row(*cells: object) -> str:
    """A row of a Markdown table; bars inside cells are escaped."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"


# -- commands ---------------------------------------------------------------------------------------


def commands() -> str:
    """Every verb and study with its options and examples."""
    text = "# Commands\n\n`polca-edit --help` lists them; `-h` after any of them explains it.\n\n"
    for name, verb in VERBS.items():
        text += command(f"polca-edit {name}", verb)
    text += "# Studies\n\nOver several runs or methods; hours rather than minutes.\n\n"
    for name, verb in STUDIES.items():
        text += command(f"polca-edit study {name}", verb)
    return text


def command(title: str, verb: Verb) -> str:
    """One command: its words, its options, its examples."""
    function = verb.signature()
    text = f"## {title}\n\n{inspect.cleandoc(function.__doc__ or verb.help)}\n\n"
    text += row("argument or option", "takes", "default", "") + row(*["---"] * 4)
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        given = hints[name].__metadata__[0]
        option = isinstance(given, OptionInfo)
        named = [word for word in given.param_decls or () if word.startswith("-")]
        shown = ", ".join(named) or f"--{name.replace('_', '-')}" if option else name.upper()
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else parameter.default
        flag = hints[name].__origin__ is bool
        takes = "" if flag else given.metavar or type_of(hints[name].__origin__)
        text += row(f"`{shown}`", takes, default if default not in (None, False) else "", given.help or "")
    return text + "\n```sh\n" + "\n".join(verb.examples) + "\n```\n\n"


# -- config -----------------------------------------------------------------------------------------


def config() -> str:
    """Every key of a config file with its type, default, bounds and meaning."""
    text = (
        "# Config\n\nA config is a YAML file, or a preset by name: "
        + ", ".join(f"`{name}`" for name in preset_names())
        + ". `--set KEY=VALUE` overrides a key; sections are written with dots, `--set training.steps=600`. "
        "Unknown keys are refused. A run keeps its resolved config as `config.yaml`.\n\n"
        f"Shipped tasks: {', '.join(f'`{name}` ({task.about})' for name, task in TASKS.items())}.\n\n"
    )
    sections: list[tuple[str, type[BaseModel]]] = [("", RunConfig)]
    while sections:
        prefix, model = sections.pop(0)
        head = f"`{prefix}`" if prefix else "Top level"
        text += f"## {head}\n\n{inspect.cleandoc(model.__doc__ or '')}\n\n"
        text += row("key", "type", "default", "bounds", "") + row(*["---"] * 5)
        for name, field in model.model_fields.items():
            key = f"{prefix}.{name}" if prefix else name
            inner = next(section_models(field.annotation), None)
            if inner is not None:
                many = get_origin(field.annotation) is tuple
                sections.append((f"{key}[]" if many else key, inner))
            kind = "list of sections" if inner and get_origin(field.annotation) is tuple else "section"
            shown = kind if inner else f"`{type_of(field.annotation)}`"
            default = "" if inner else default_of(field)
            text += row(f"`{key}`", shown, default, bounds_of(field), field.description or "")
        text += "\n"
    return text


#: Types by the words of the reference.
WORDS = {"Path": "path", "str": "text", "int": "whole number", "float": "number", "bool": "true or false"}


def section_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models anywhere inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from section_models(inner)


def type_of(annotation: Any) -> str:
    """A type as it is written."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(type_of(one) for one in inner if one is not type(None))
    if origin is tuple:
        return f"list of {type_of(inner[0])}" if inner[-1] is ... else f"{len(inner)} x {type_of(inner[0])}"
    if origin is dict:
        return "mapping"
    if origin is list:
        return f"{type_of(inner[0])}, repeated"
    return WORDS.get(annotation.__name__, annotation.__name__)


def default_of(field: FieldInfo) -> str:
    """A default as YAML has it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def bounds_of(field: FieldInfo) -> str:
    """Bounds of a number."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [(sign, getattr(rule, name, None)) for rule in field.metadata for name, sign in signs.items()]
    return ", ".join(f"{sign} {value:g}" for sign, value in found if value is not None)


# -- Python -----------------------------------------------------------------------------------------


def python() -> str:
    """Public names, filled in from their docstrings by mkdocstrings."""
    text = "# Python\n\n"
    for package, about in ((polca_edit, "observation"), (interventions, "action")):
        text += f"# {package.__name__}: {about}\n\n"
        for name in package.__all__:
            home = package._HOMES[name]
            whole = home.startswith((polca_edit.__name__, interventions.__name__))
            text += f"::: {home if whole else f'{package.__name__}.{home}'}.{name}\n\n"
    return text


PAGES = {"commands": commands, "config": config, "python": python}


def write() -> None:
    """Every page, where the site's builder looks for it."""
    import mkdocs_gen_files

    for name, page in PAGES.items():
        with mkdocs_gen_files.open(f"reference/{name}.md", "w") as file:
            file.write(page())


if __name__ == "<run_path>":  # as mkdocs-gen-files starts it
    write()
