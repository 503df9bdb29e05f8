"""The command line: ``polca-edit demo|run|report|inspect|...``.

Every verb is one line of :data:`VERBS`. Its module is imported when it runs, so that ``--help`` and shell
completion answer at once; its options are those of the function it names.
"""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from experiments.application import HELP, Verb, register, run_application

VERBS = {
    "demo": Verb(
        "verbs.pipeline:demo",
        "Run the main job on the built-in arithmetic task (minutes).",
        ("polca-edit demo", "polca-edit demo --seed 3", "polca-edit demo --dry-run"),
    ),
    "run": Verb(
        "verbs.pipeline:run",
        "Run a config or preset from training to the report.",
        (
            "polca-edit run mini --seed 1",
            "polca-edit run english-demo --text wiki.jsonl.gz",
            "polca-edit run mine.yaml --checkpoints runs/other/checkpoints",
            "polca-edit run --task my_task.py:build --set training.steps=600",
        ),
    ),
    "open": Verb(
        "verbs.pipeline:open_checkpoints",
        "Analyse Hugging Face checkpoints.",
        (
            "polca-edit open my-trainer-output --text corpus.jsonl",
            "polca-edit open pythia-14m --names 'step*' --text pile.jsonl.gz",
            "polca-edit open lora-output --base gpt2-folder --text notes.txt",
        ),
    ),
    "plan": Verb(
        "verbs.cost:plan",
        "What a run would cost on this machine. Nothing is run.",
        ("polca-edit plan mini", "polca-edit plan english --text wiki.jsonl.gz --budget-minutes 20"),
    ),
    "doctor": Verb(
        "verbs.doctor.verb:doctor",
        "Open a checkpoint folder of any kind and say what was found.",
        ("polca-edit doctor my-trainer-output", "polca-edit doctor pythia-14m --names 'step*' --json -"),
    ),
    "report": Verb(
        "verbs.records:report",
        "Draw report.html and the figures again from a run's records.",
        ("polca-edit report runs/demo",),
    ),
    "inspect": Verb(
        "verbs.records:inspect",
        "Print what a finished run found.",
        ("polca-edit inspect runs/demo", "polca-edit inspect runs/demo --json - | jq .cost"),
    ),
    "compare": Verb(
        "verbs.compare:compare",
        "Say in what two runs differ and whether they found the same.",
        (
            "polca-edit compare runs/demo runs/demo-1",
            "polca-edit compare runs/demo runs/demo-1 --out compare.html --json compare.json",
        ),
    ),
    "label": Verb(
        "verbs.records:label",
        "Label the clusters of a run from what their tokens share.",
        (
            "polca-edit label runs/english-demo",
            "polca-edit label runs/english-demo --transfer wikitext2/valid.txt",
        ),
    ),
    "clean": Verb(
        "verbs.clean:clean",
        "Free the disk space of what a run can make again.",
        ("polca-edit clean runs/demo --dry-run", "polca-edit clean runs/demo --checkpoints"),
    ),
    "discover": Verb(
        "discover.verb:discover",
        "Find skills by what undoing training does: timeline, clusters, axes.",
        ("polca-edit discover runs/demo", "polca-edit discover runs/demo --basis hessian --json found.json"),
        "Tests",
    ),
    "test": Verb(
        "verdicts.verb:causal_test",
        "Does the model need each movement for its tokens, and for them only?",
        (
            "polca-edit test runs/demo",
            "polca-edit test runs/demo runs/demo-1 --basis hessian --out studies/demo",
        ),
        "Tests",
    ),
    "axis": Verb(
        "discover.verb:axis",
        "The direction whose own undone movement takes one skill and nothing else.",
        (
            "polca-edit axis runs/demo --target 10s --basis hessian",
            "polca-edit axis runs/demo --target carry@10s --window 600:720",
        ),
        "Tests",
    ),
    "validate": Verb(
        "natural.verb:validate",
        "Training runs with known answers and their twins through the whole tool.",
        ("polca-edit validate --case later_skill --seeds 1 --json validate.json",),
        "Tests",
        ("selftest",),
    ),
    "selftest": Verb(
        "testbeds.selftest:selftest",
        "Ten testbeds with known answers; `--break NAME` must fail.",
        ("polca-edit selftest", "polca-edit selftest --bed T1 --json selftest.json"),
        "Tests",
        ("demo",),
    ),
    "remove": Verb(
        "removal.verb:remove",
        "Find an edit that removes one skill, and judge it on the evaluate split.",
        (
            "polca-edit remove runs/demo --skill 10s",
            "polca-edit remove runs/demo --cluster trajectory:1:0 --basis trajectory",
        ),
        "Edits",
    ),
    "apply": Verb(
        "removal.apply:apply",
        "Apply a saved edit to a model's weight files, or take it back.",
        (
            "polca-edit apply runs/demo/edits/10s.json MODEL --out edited",
            "polca-edit apply runs/demo/edits/10s.json edited --undo --out restored",
        ),
        "Edits",
    ),
}

_AFTER_A_STUDY = ("study", "--help")

#: ``polca-edit study NAME``.
STUDIES = {
    "english": Verb(
        "verbs.pipeline:english",
        "The English experiment on a text.",
        ("polca-edit study english --preset demo --text wiki.jsonl.gz --out runs/english",),
    ),
    "blocking": Verb(
        "discover.verb:blocking",
        "Training again with skill axes held still, over data orders.",
        ("polca-edit study blocking runs/demo --target 10s --branches 10",),
    ),
    "reproduce": Verb(
        "study.reproduce.verb:reproduce",
        "The paper's tables beside ours, every basis and rotation.",
        ("polca-edit study reproduce --preset demo --seeds 1 --json reproduce.json",),
        next=_AFTER_A_STUDY,
    ),
    "robustness": Verb(
        "study.robustness:robustness",
        "Which conclusions survive other settings.",
        ("polca-edit study robustness --preset demo --json robustness.json",),
        next=_AFTER_A_STUDY,
    ),
    "carry-signal": Verb(
        "study.carry_signal:carry_signal",
        "Where the published carry signal lives.",
        ("polca-edit study carry-signal --preset demo --json carry-signal.json",),
        next=_AFTER_A_STUDY,
    ),
    "paper-tables": Verb(
        "study.reproduce.paper_tables:paper_tables",
        "The paper's tables from stored projections, and which setting makes the carry signal.",
        ("polca-edit study paper-tables runs/paper --json paper-tables.json",),
        next=_AFTER_A_STUDY,
    ),
    "demo-table": Verb(
        "study.demo_table:demo_table",
        "Several demo seeds beside the demo's targets.",
        ("polca-edit study demo-table runs/demo runs/demo-1 --json demo-seeds.json",),
        next=_AFTER_A_STUDY,
    ),
    "causal": Verb(
        "study.causal_seeds:causal_seeds",
        "The causal tests of several seeds on one page: words by family, answers about bases, one figure.",
        ("polca-edit study causal runs/demo runs/demo-1 --json causal-demo.json",),
        next=_AFTER_A_STUDY,
    ),
    "discovery": Verb(
        "study.discovery_seeds:discovery_seeds",
        "Discovery in several seeds on one page: clusters, timeline, axes.",
        ("polca-edit study discovery runs/demo runs/demo-1 --json discovery-demo.json",),
        next=_AFTER_A_STUDY,
    ),
    "groupings": Verb(
        "study.groupings:groupings",
        "Ways of grouping tokens against known skills: attribution, losses, gradients, noise, undoing.",
        ("polca-edit study groupings runs/demo runs/demo-1 --json groupings-demo.json",),
        next=_AFTER_A_STUDY,
    ),
    "gauge": Verb(
        "run.cost.gauge:gauge",
        "Movement and loss change in some of the weights, and the price of a basis of them.",
        ("polca-edit study gauge runs/demo --layers 1 --parameters '*mlp.0.weight'",),
        next=_AFTER_A_STUDY,
    ),
    "errors": Verb(
        "study.error_rates:error_rates",
        "How often the causal test says yes on twins, and its power by simulation.",
        ("polca-edit study errors runs/demo --draws 60 --power 200 --json error-rates.json",),
        next=_AFTER_A_STUDY,
    ),
    "recording": Verb(
        "study.reproduce.recording:recording",
        "Adaptive against equal recording: quadrature error against the number of checkpoints.",
        ("polca-edit study recording --preset demo --seeds 2 --json recording-demo.json",),
        next=_AFTER_A_STUDY,
    ),
    "english-labels": Verb(
        "study.reproduce.english_labels:english_labels",
        "Simple part-of-speech labels of clusters beside those of random token sets.",
        ("polca-edit study english-labels runs/english --json english-labels-demo.json",),
        next=_AFTER_A_STUDY,
    ),
    "paper-scale": Verb(
        "study.paper_scale:paper_scale",
        "The paper-scale experiment with its timing.",
        ("polca-edit study paper-scale --device cuda --out runs/paper",),
        next=_AFTER_A_STUDY,
    ),
    "remove-skill": Verb(
        "removal.study:remove_skill_study",
        "Skill removal: our edits and today's rivals.",
        ("polca-edit study remove-skill --preset demo --seeds 1 --json removal.json",),
        next=_AFTER_A_STUDY,
    ),
    "removal": Verb(
        "removal.undo.study:removal",
        "Skills taken out in every way, all repaired alike: what it costs and how fast they come back.",
        ("polca-edit study removal --preset demo --seeds 1 --skills 10s,1s --json removal.json",),
        next=_AFTER_A_STUDY,
    ),
    "heads": Verb(
        "natural.heads:heads_study",
        "Which heads carry an effect: weights against activations.",
        ("polca-edit study heads runs/demo --target 10s --case induction --json heads.json",),
        next=_AFTER_A_STUDY,
    ),
    "removal-cases": Verb(
        "removal.undo.cases:removal_cases",
        "A late skill and a backdoor taken out, beside the model that was never taught them.",
        ("polca-edit study removal-cases --seeds 2 --json removal-cases.json",),
        next=_AFTER_A_STUDY,
    ),
    "grokking": Verb(
        "study.grokking.verb:grokking_study",
        "A published claim put to the test: does grokking need the motion along 16 components?",
        ("polca-edit study grokking --seeds 5 --json grokking.json",),
        next=_AFTER_A_STUDY,
    ),
}

#: Studies that recorded commands name without ``study``; they are not listed.
WITHOUT_STUDY = (
    "english",
    "blocking",
    "reproduce",
    "robustness",
    "carry-signal",
    "demo-table",
    "paper-scale",
    "remove-skill",
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings=HELP,
    help="From training checkpoints to a causal verdict on each skill, and to an edit that removes it.",
    epilog="Start with `polca-edit demo`; every verb explains itself under `polca-edit VERB -h`.",
)
studies = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings=HELP,
    help="Studies over several runs or methods.",
    epilog="Example: `polca-edit study removal --preset demo --seeds 1`",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polca-edit {metadata.version('polca-edit')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


for _name, _verb in VERBS.items():
    register(_name, _verb, app, "polca-edit")
for _name, _verb in STUDIES.items():
    register(_name, _verb, studies, "polca-edit study")
for _name in WITHOUT_STUDY:
    register(_name, STUDIES[_name], app, "polca-edit", hidden=True)
app.add_typer(studies, name="study", rich_help_panel="Studies")


def main() -> None:
    """Entry point of ``polca-edit``."""
    run_application(app)
