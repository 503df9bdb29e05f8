"""The command line: ``polca-edit demo|run|report|inspect|...``.

Every verb is one line of :data:`VERBS`. Its module is imported when it runs, so that ``--help``
answers at once; its options are those of the function it names.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import typer

from experiments.application import run_application, single
from experiments.verbs.signature import signature_alone

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="From training checkpoints to a causal verdict on each skill, and to an edit that removes it.",
)


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Attributes:
        function: module under ``experiments`` and function, which typer makes a command of.
        help: what it does, for the list of verbs.
        panel: heading it is listed under.
        examples: shown below its own help.
    """

    function: str
    help: str
    panel: str = "Runs"
    examples: str | None = None


VERBS = {
    "demo": Verb("verbs.pipeline:demo", "Run the main job on the built-in arithmetic task (minutes)."),
    "run": Verb("verbs.pipeline:run", "Run a config or preset from training to the report."),
    "open": Verb("verbs.pipeline:open_checkpoints", "Analyse Hugging Face checkpoints."),
    "english": Verb("verbs.pipeline:english", "The English experiment on a text."),
    "plan": Verb("verbs.cost:plan", "What a run would cost on this machine. Nothing is run."),
    "doctor": Verb(
        "verbs.doctor.verb:doctor",
        "Open a checkpoint folder of any kind and say what was found.",
        examples="Examples: `polca-edit doctor my-trainer-output` · `polca-edit doctor pythia-14m --json -`",
    ),
    "report": Verb("verbs.records:report", "Draw report.html and the figures again from a run's records."),
    "inspect": Verb("verbs.records:inspect", "Print what a finished run found."),
    "label": Verb("verbs.records:label", "Label the clusters of a run from what their tokens share."),
    "test": Verb(
        "verdicts.verb:causal_test",
        "Does the model need each movement for its tokens, and for them only?",
        "Tests",
        "Examples: `polca-edit test runs/demo` · `polca-edit test runs/demo runs/demo-1 --out studies/demo`",
    ),
    "discover": Verb(
        "discover.verb:discover",
        "Find skills by what undoing training does: timeline, clusters, axes.",
        "Tests",
        "Example: `polca-edit discover runs/demo --basis hessian --json found.json`",
    ),
    "axis": Verb(
        "discover.verb:axis",
        "The direction whose own undone movement takes one skill and nothing else.",
        "Tests",
        "Example: `polca-edit axis runs/demo --target 10s --basis hessian`",
    ),
    "remove": Verb(
        "removal.verb:remove",
        "Find an edit that removes one skill, and judge it on the evaluate split.",
        "Edits",
        "Examples: `polca-edit remove runs/demo --skill 10s` · "
        "`polca-edit remove runs/demo --cluster trajectory:1:0 --basis trajectory`",
    ),
    "apply": Verb(
        "removal.apply:apply",
        "Apply a saved edit to a model's weight files, or take it back.",
        "Edits",
        "Examples: `polca-edit apply runs/demo/edits/10s.json MODEL --out edited` · "
        "`polca-edit apply runs/demo/edits/10s.json edited --undo --out restored`",
    ),
    "blocking": Verb(
        "discover.verb:blocking",
        "Training again with skill axes held still, over data orders.",
        "Studies",
        "Example: `polca-edit blocking runs/demo --target 10s --branches 10`",
    ),
    "reproduce": Verb(
        "study.reproduce.verb:reproduce",
        "The paper's tables beside ours, every basis and rotation.",
        "Studies",
    ),
    "robustness": Verb("study.robustness:robustness", "Which conclusions survive other settings.", "Studies"),
    "carry-signal": Verb(
        "study.carry_signal:carry_signal", "Where the published carry signal lives.", "Studies"
    ),
    "demo-table": Verb(
        "study.demo_table:demo_table", "Several demo seeds beside the demo's targets.", "Studies"
    ),
    "paper-scale": Verb(
        "study.paper_scale:paper_scale", "The paper-scale experiment with its timing.", "Studies"
    ),
    "remove-skill": Verb(
        "removal.study:remove_skill_study", "Skill removal: our edits and today's rivals.", "Studies"
    ),
    "validate": Verb(
        "natural.verb:validate",
        "Training runs with known answers and their twins through the whole tool.",
        "Studies",
        "Example: `polca-edit validate --case later_skill --seeds 1 --json validate.json`",
    ),
    "selftest": Verb(
        "testbeds.selftest:selftest", "Ten testbeds with known answers; `--break NAME` must fail.", "Studies"
    ),
}

#: ``polca-edit study NAME``.
STUDIES = {
    "causal": Verb(
        "study.causal_seeds:causal_seeds",
        "The causal tests of several seeds on one page: words by family, answers about bases, one figure.",
        examples="Example: `polca-edit study causal runs/demo runs/demo-1 --json causal.json`",
    ),
    "discovery": Verb(
        "study.discovery_seeds:discovery_seeds",
        "Discovery in several seeds on one page: clusters, timeline, axes.",
        examples="Example: `polca-edit study discovery runs/demo runs/demo-1 --json discovery.json`",
    ),
    "groupings": Verb(
        "study.groupings:groupings",
        "Ways of grouping tokens against known skills: attribution, losses, gradients, noise, undoing.",
        examples="Example: `polca-edit study groupings runs/demo runs/demo-1 --json groupings.json`",
    ),
    "errors": Verb(
        "study.error_rates:error_rates",
        "How often the causal test says yes on twins, and its power by simulation.",
        examples="Example: `polca-edit study errors runs/demo --draws 60 --power 200 --json errors.json`",
    ),
    "removal": Verb(
        "removal.undo.study:removal",
        "Skills taken out in every way, all repaired alike: what it costs and how fast they come back.",
        examples="Example: `polca-edit study removal --preset demo --seeds 1 --skills 10s,1s --json FILE`",
    ),
    "grokking": Verb(
        "study.grokking.verb:grokking_study",
        "A published claim put to the test: does grokking need the motion along 16 components?",
        examples="Example: `polca-edit study grokking --seeds 5 --json grokking.json`",
    ),
}

studies = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Studies over several runs or methods."
)
app.add_typer(studies, name="study", rich_help_panel="Studies")


def _register(name: str, verb: Verb, group: typer.Typer = app, program: str = "polca-edit") -> None:
    module, _, attribute = verb.function.partition(":")

    def call(context: typer.Context) -> None:
        helped = "--help" in context.args
        function = signature_alone(f"experiments.{module}", attribute) if helped else None
        if function is None:
            function = getattr(importlib.import_module(f"experiments.{module}"), attribute)
        command = typer.main.get_command(single(function, verb.examples))
        code = command.main(context.args, prog_name=f"{program} {name}", standalone_mode=False)
        if code:
            raise typer.Exit(code)

    group.command(
        name=name,
        help=verb.help,
        rich_help_panel=verb.panel,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
    )(call)


for _name, _verb in VERBS.items():
    _register(_name, _verb)
for _name, _verb in STUDIES.items():
    _register(_name, _verb, studies, "polca-edit study")


def main() -> None:
    """Entry point of ``polca-edit``."""
    run_application(app)


if __name__ == "__main__":
    main()
