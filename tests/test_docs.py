"""The documentation says what is there: links, commands, options, config keys, and a strict build."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from experiments.cli import STUDIES, VERBS, Verb
from experiments.config import RunConfig

ROOT = Path(__file__).parents[1]
#: docs/results records commands as they were given then, so it is not held to today's options.
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "results" not in p.parts)]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options_of(verb: Verb) -> set[str]:
    return {word for given in verb.command().params for word in (*given.opts, *given.secondary_opts)}


def commands_in(text: str) -> list[list[str]]:
    """Words of every command line of polca-edit in code blocks and code spans."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    found = [re.split(r"[|;&]", line.split("#")[0])[0].strip().removeprefix("$ ") for line in lines]
    return [shlex.split(line)[1:] for line in found if re.match(r"polca-edit\s", line)]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        target = link.split("#")[0]
        if target and not target.startswith(("https://", "http://")):
            assert (page.parent / target).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist_with_their_options(page: Path) -> None:
    for words in commands_in(page.read_text()):
        if not words or words[0].startswith("-") or words[0].isupper():
            continue
        study = words[0] == "study"
        table, name = (STUDIES, words[1]) if study and len(words) > 1 else (VERBS, words[0])
        if study and (len(words) == 1 or name.isupper()):
            continue
        assert name in table, " ".join(words)
        given = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= options_of(table[name]) | {"-h", "--help"}, " ".join(words)


def test_a_wrong_option_would_be_found() -> None:
    [words] = commands_in("```sh\npolca-edit test RUN --no-such-option 3\n```")
    assert words == ["test", "RUN", "--no-such-option", "3"]
    assert "--no-such-option" not in options_of(VERBS["test"])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_parse(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        ast.parse(block)


def test_the_command_reference_has_every_verb_and_option(generate: ModuleType) -> None:
    page = generate.commands()
    for name, verb in {**VERBS, **{f"study {name}": verb for name, verb in STUDIES.items()}}.items():
        section = page.split(f"## polca-edit {name}\n")[1].split("\n## ")[0]
        for option in options_of(verb) - {"-h", "--help"}:
            assert option in section or not option.startswith("-") or option.startswith("--no-"), option
        assert all(example in section for example in verb.examples)


def test_the_config_reference_has_every_key(generate: ModuleType) -> None:
    page = generate.config()
    sections: list[tuple[str, type[BaseModel]]] = [("", RunConfig)]
    count = 0
    while sections:
        prefix, model = sections.pop()
        for name, field in model.model_fields.items():
            key = f"{prefix}{name}"
            inner = next(generate.section_models(field.annotation), None)
            assert f"`{key}`" in page
            assert inner is not None or field.description, f"{key} has no description"
            count += 1
            if inner is not None:
                many = "[]" if generate.type_of(field.annotation).startswith("list") else ""
                sections.append((f"{key}{many}.", inner))
    assert count > 80
    assert "| `training.steps` | `whole number` | `900` | ≥ 2, ≤ 1e+08 |" in page


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocs_gen_files", "mkdocstrings"):
        pytest.importorskip(package, reason="the extra 'docs' is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in ("index.html", "concepts/index.html", "reference/config/index.html"):
        assert (tmp_path / "site" / page).exists()
    built = (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
    assert "causal_test" in built
    assert "trajectory_basis" in built
