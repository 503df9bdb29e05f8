"""Kills and flips: does a stopped run end with the same bytes, and is a damaged one ever used?

``python -m tests.kill_and_flip kill --times 100`` runs the smoke preset in a process of its own, kills it
(SIGKILL) at a random moment, again and again until a try ends by itself; the finished run must be, byte for
byte, the run that nobody killed (clocks and memory apart). ``... flip --times 500`` flips one random bit of
one random file of a finished run and reads the run again. A flip is *detected* (one sentence, exit code 1)
or used silently.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

#: What may differ between two equal runs: clocks, memory, and how often the evaluate split was opened (a
#: killed run opens it again under the same plan, and that is counted).
CLOCKED = ("seal.json", "run.json", "summary.json", "report.html", "stages/", "figures/")
CLOCKS = ("seconds", "peak_rss_bytes", "digest", "times")
SETTINGS = {
    "threads": 1,
    "training.steps": 12,
    "training.record_every": 2,
    "training.state_every": 4,
    "arithmetic.select_sums": 20,
    "arithmetic.curvature_sums": 10,
    "arithmetic.evaluate_sums": 12,
    "bases": [{"kind": "hessian", "vectors": 2, "max_products": 4}, {"kind": "trajectory", "vectors": 2}],
    "damage.doses": [],
    "damage.random_draws": 1,
    "discover.edits": 6,
    "discover.windows": 3,
}


@dataclass(frozen=True)
class Moment:
    """When a process kills itself with SIGKILL; writes, not seconds, so that no stage is left out.

    Attributes:
        write: which write of a file.
        delay: seconds after it; None: before the finished file gets its name.
    """

    write: int
    delay: float | None


def counted(moment: Moment | None, writes: list[int]) -> None:
    """Count every atomic write of this process, and die at the wanted one."""
    rename = os.replace

    def replace(*given: Any) -> None:
        writes.append(1)
        now = moment is not None and len(writes) == moment.write
        if now and moment.delay is None:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*given)
        if now:
            threading.Timer(moment.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    os.replace = replace


def start(out: Path, moment: Moment | None = None) -> int:
    """All stages and the summary of a small smoke run in a forked process; exit code, or minus its signal."""
    from experiments.config import load_config
    from experiments.run.driver import run_stages
    from experiments.run.run import open_run
    from experiments.run.summary.write import write_summary
    from experiments.verbs.guard import writing

    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code, writes = 1, []
    try:
        with open(os.devnull, "w") as quiet:
            os.dup2(quiet.fileno(), 1)
            os.dup2(quiet.fileno(), 2)
            counted(moment, writes)
            with writing(out, repairs=True):
                run = open_run(load_config("smoke", SETTINGS), out, lambda _: None)
                run_stages(run)
                write_summary(run)
            (out.parent / "writes").write_text(str(len(writes)))
            code = 0
    finally:
        os._exit(code)


def without_clocks(value: object) -> object:
    """Plain values without seconds, memory and hashes of them."""
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if k not in CLOCKS}
    return [without_clocks(v) for v in value] if isinstance(value, list) else value


def contents(out: Path) -> dict[str, object]:
    """Every file of a run: its bytes, or its values without clocks."""
    found: dict[str, object] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        if name.startswith(("seal.json", "report.html", ".lock")):
            continue
        clocked = name.startswith(CLOCKED) and name.endswith(".json")
        found[name] = without_clocks(json.loads(path.read_text())) if clocked else path.read_bytes()
    return found


def differing(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of files that are not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def kill(
    times: Annotated[int, typer.Option(help="kills in all")] = 100,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the counts")] = None,
) -> None:
    """Kill a run at random moments until it ends, as often as wanted."""
    import experiments.run.driver
    import experiments.run.summary.write  # noqa: F401  (imported once, before any fork)

    draw, counts, stages = random.Random(seed), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        assert start(whole) == 0
        wanted = contents(whole)
        writes = int((Path(folder) / "writes").read_text())
        number = 0
        while counts["kills"] < times:
            out, number = Path(folder) / f"killed-{number}", number + 1
            while True:
                delay = None if draw.random() < 0.5 else draw.uniform(0, 0.5)
                moment = Moment(draw.randint(1, writes), delay) if counts["kills"] < times else None
                ended = start(out, moment)
                if ended != -signal.SIGKILL:
                    break
                counts["kills"] += 1
                done = len(list((out / "stages").glob("*.json")))
                stages[f"{done:02d} stages"] += 1
            wrong = differing(wanted, contents(out))
            counts["runs finished"] += 1
            counts["exit codes other than 0"] += ended != 0
            counts["runs with other bytes"] += bool(wrong)
            if wrong or ended:
                print(f"seed {seed}, run {number}: exit {ended}, other bytes in {wrong[:5]}")
            shutil.rmtree(out)
            said = {**counts, "stages done at the kill": dict(sorted(stages.items()))}
            print(json.dumps(said), flush=True)
            if json_file is not None:
                json_file.write_text(json.dumps(said, indent=1) + "\n")
    raise typer.Exit(int(bool(counts["runs with other bytes"] or counts["exit codes other than 0"])))


def flipped(path: Path, draw: random.Random) -> None:
    """Change one random bit of a file."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def read_everything(out: Path) -> tuple[int, str]:
    """Exit code and output of a verb that reads the whole run, in this process."""
    from typer.testing import CliRunner

    from experiments.cli import app

    result = CliRunner().invoke(app, ["inspect", str(out), "--json", "-"])
    error = result.exception if result.exit_code else None
    if error is not None and not isinstance(error, (ValueError, OSError, SystemExit)):
        return 2, f"{type(error).__name__}: {error}"
    return result.exit_code, f"{result.output}{error or ''}"


def flip(
    times: Annotated[int, typer.Option(help="flips in all")] = 500,
    seed: Annotated[int, typer.Option(help="of files and bits")] = 0,
    run: Annotated[Path | None, typer.Option(help="a finished run; default makes one")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the counts")] = None,
) -> None:
    """Flip one bit at a time in a finished run and read it."""
    from experiments.run.run import load_run

    draw, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            run = Path(folder) / "run"
            assert start(run) == 0
        out = Path(folder) / "flipped"
        shutil.copytree(run, out)
        wanted = read_everything(out)
        assert wanted[0] == 0, wanted
        files = sorted(p for p in out.rglob("*") if p.is_file() and p.stat().st_size and p.name != ".lock")
        for _ in range(times):
            path = draw.choice(files)
            name, before = path.relative_to(out).as_posix(), path.read_bytes()
            flipped(path, draw)
            found = read_everything(out)
            counts["flips"] += 1
            if found[0] == 1:
                counts["detected when read"] += 1
            elif found[0] == 2:
                counts["traceback"] += 1
                print(f"{name}: {found[1]}")
            elif found == wanted:
                counts["not read by inspect"] += 1
                try:
                    load_run(out, say=lambda _: None)
                    counts["used silently"] += 1
                    print(f"{name}: nothing was said")
                except ValueError:
                    counts["detected when opened"] += 1
            else:
                counts["used silently"] += 1
                print(f"{name}: another number")
            path.write_bytes(before)
    print(json.dumps(counts, indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps(counts, indent=1) + "\n")
    raise typer.Exit(int(bool(counts["used silently"] or counts["traceback"])))


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(kill)
app.command()(flip)

if __name__ == "__main__":
    app()
