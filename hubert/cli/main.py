"""The command line of the science: one command per stage, and `status`, `prune`, `plan`. `python -m hubert` is this.

Each stage command builds the same `Stage` objects as the flows and writes the same files, so a run may be continued by
either. The console script `hubert` (`tasks/cli.py`) adds the service: `up`, `down`, `demo`, `run`. Whatever is slow to
import is imported by the command that needs it.
"""

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubert.cli import codebook as interchange_cli
from hubert.cli import export as cli_export
from hubert.cli.parser import Parser
from hubert.core.errors import ConfigError, DataError, HubertError, TrainingDiverged, TransientError
from hubert.core.files import FULL, GONE
from hubert.core.paths import RunFolder, runs_root
from hubert.settings.stages import EXTRA_MANIFESTS, STAGES

if TYPE_CHECKING:
    from hubert.core.stage import Stage
    from hubert.units.kmeans import KMeansStage

    FitCodebook = Callable[[KMeansStage], Any]

EXIT_CODES = """\
exit codes:
  0 done   1 a fault of the program   2 a setting is wrong (ConfigError)   3 the data are wrong (DataError)
  4 the training diverged   75 the surroundings failed, try again (TransientError)   130 interrupted by Ctrl-C
"""
CODES: dict[type[HubertError], int] = {ConfigError: 2, DataError: 3, TrainingDiverged: 4, TransientError: 75}
INTERRUPTED = 130
# What a person can mend: no rights, no space, no such place. Any other OSError is a fault of the program.
REFUSALS = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, *FULL, *GONE}


def build_parser(*, fit_codebook: "FitCodebook | None" = None) -> tuple[Parser, "argparse._SubParsersAction[Parser]"]:
    """Return the parser and its list of commands, to which others may be added.

    Args:
        fit_codebook: runs the k-means stage; None: in this process, with torch.
    """
    parser = Parser(
        prog="hubert",
        description="HuBERT pretraining: a folder of speech in; encoder, codebook and report out. RUN is the name of a run\n"
        "(a folder under `runs`, or under the variable HUBERT_RUNS) or a path with a slash.",
        epilog=EXIT_CODES,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name, entry in STAGES.items():
        text = entry.description
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=_EXAMPLE)
        command.sections = entry.sections
        command.set_defaults(handler=run_stage, stage=name, fit_codebook=fit_codebook or fit_here)
        _add_stage_options(command)
        if name == "manifest":
            command.add_argument(
                "--output", metavar="FILE", type=Path, help="also write it as .parquet, .csv, .jsonl or .tsv (fairseq)"
            )
            parts = ("everything", "train", "validation")
            command.add_argument(
                "--part", choices=parts, default=parts[0], help="which files --output holds (default: %(default)s)"
            )
    status = commands.add_parser(
        "status", help="what of a run is done, running, partial or missing, and its size on disk"
    )
    status.add_argument("run", metavar="RUN", nargs="?", help="without it: the list of runs")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(handler=show_status)
    _add_prune(commands)
    _add_plan(commands)
    cli_export.add_commands(commands)
    interchange_cli.add_commands(commands)
    return parser, commands


_EXAMPLE = """\
The first command on a run needs --recipe and --data; they are remembered, and later commands need only RUN.
What is finished is found and not done again; what was cut off goes on where it was.
"""


def _add_stage_options(command: Parser) -> None:
    command.add_argument("run", metavar="RUN", help="name of the run, or a path with a slash")
    command.add_argument("--iteration", metavar="N", type=int, help="from 1 (default: the newest that was begun)")
    command.add_argument(
        "--recipe",
        metavar="R",
        default="",
        help="name in deployments/recipes, or a TOML file; starts the settings anew",
    )
    command.add_argument("--data", metavar="D", default="", help="folder of audio, archive or manifest")
    command.add_argument(
        "--teacher",
        metavar="T",
        default="",
        help="checkpoint whose layer is clustered: folder, file, Hugging Face id or URL",
    )
    command.add_argument("--layer", metavar="L", type=int, help="layer of the teacher, from 1")
    command.add_argument(
        "--set",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="settings that win over the recipe, such as train.steps=500",
    )
    command.add_argument("--extend", action="store_true", help="let a finished training go on to more steps")


def _add_prune(commands: "argparse._SubParsersAction[Parser]") -> None:
    prune = commands.add_parser(
        "prune",
        help="remove what no later stage needs: k-means samples, old optimizer states, litter",
        description="List what no later stage needs, and remove it with --yes: the k-means samples of finished iterations, the\n"
        "optimizer states of all but the last two checkpoints, files of attempts that died.",
    )
    prune.add_argument("run", metavar="RUN", help="name of the run, or a path with a slash")
    prune.add_argument("--yes", action="store_true", help="remove it (default: only list it)")
    prune.add_argument("--old", action="store_true", help="also stage folders of settings that were given up")
    prune.set_defaults(handler=prune_run)


def _add_plan(commands: "argparse._SubParsersAction[Parser]") -> None:
    plan = commands.add_parser(
        "plan",
        help="what a run would take: files, shards, disk, steps, GPU-hours; runs nothing",
        description="Say what a run would take, before anything runs. Assumptions are printed with the figures.",
    )
    plan.add_argument("recipe", metavar="RECIPE", help="name in deployments/recipes, or a TOML file")
    plan.add_argument("--hours", type=float, required=True, help="audio, in hours")
    plan.add_argument(
        "--files", metavar="N", type=int, help="number of files (default: hours / 12.3 s, as in LibriSpeech)"
    )
    plan.add_argument("--gpus", metavar="N", type=int, default=1, help="GPUs that train (default: %(default)s)")
    plan.add_argument(
        "--audio-seconds-per-second",
        metavar="X",
        type=float,
        help="audio that one GPU trains on per second (default: the HuBERT paper's, scaled to the model's size)",
    )
    plan.add_argument(
        "--set", metavar="NAME=VALUE", nargs="+", action="extend", default=[], help="settings that win over the recipe"
    )
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(handler=show_plan)


# Commands ---------------------------------------------------------------------------------------------------------


def run_stage(args: argparse.Namespace) -> None:
    """Run one stage of an iteration, in this process.

    Raises:
        DataError: a stage that it needs is not finished; names the command to run.
        ConfigError: the recipe gives it nothing to do, or a setting is wrong.
    """
    from hubert.runs.options import RunOptions
    from hubert.runs.pipeline import Iteration
    from hubert.runs.resolve import settle
    from hubert.runs.status import Chain
    from hubert.settings.recipe import parse_overrides

    if args.stage == "report" and is_whole_run(args):
        from hubert.cli.report import report_run

        report_run(_existing(args.run))
        return
    options = RunOptions(
        args.run,
        iteration=args.iteration,
        recipe=args.recipe,
        data=args.data,
        teacher=args.teacher,
        layer=args.layer,
        overrides=parse_overrides(args.set),
        extend=args.extend,
    )
    iteration = Iteration(settle(options))
    need = Chain(iteration).missing(args.stage)
    if need is not None:
        raise DataError(
            f"`hubert {args.stage}` needs {need}, which is not finished in iteration {iteration.number} of run {args.run}. "
            f"First run: hubert {need} {args.run} --iteration {iteration.number}"
        )
    if args.stage == "report":
        from hubert.cli.report import report_iteration

        report_iteration(iteration)
        return
    extra = EXTRA_MANIFESTS.get(args.stage)
    if extra is not None and getattr(iteration, extra) is not None:
        do(getattr(iteration, extra))
    stage = getattr(iteration, args.stage)
    if stage is None:
        setting = STAGES[args.stage].setting
        raise ConfigError(
            f"recipe {iteration.resolved.recipe_name!r} sets no {setting}, so there is nothing to score; "
            f"`--set {setting}=FILE` names one"
        )
    do(iteration.begin(stage), args.fit_codebook if args.stage == "kmeans" else None)
    if args.stage == "manifest" and args.output is not None:
        from hubert.data.manifest import scan_manifest, write_manifest

        output = args.output.expanduser().absolute()
        write_manifest(scan_manifest(getattr(stage, args.part)), output)
        print(f"written: {output}")


def is_whole_run(args: argparse.Namespace) -> bool:
    """Return True if a command names a run and nothing else, neither an iteration nor a setting."""
    others = (args.recipe, args.data, args.teacher, args.set, args.extend)
    return args.iteration is None and args.layer is None and not any(others)


def do(stage: "Stage", run: "Callable[[Any], Any] | None" = None) -> None:
    """Run a stage unless it is finished, and print its figures and folder."""
    from hubert.core import text
    from hubert.report.stage_summary import summarise_stage

    start = time.monotonic()
    found = stage.settled()
    figures = found["figures"] if found is not None else (run(stage) if run else stage.run())
    how = "was finished before" if found is not None else f"done in {text.duration(time.monotonic() - start)}"
    lines = [*summarise_stage(stage, figures).as_lines(), f"folder: {stage.folder}"]
    print("\n  ".join([f"{stage.label}: {how}", *lines]))


def fit_here(stage: "KMeansStage") -> Any:
    """Fit the codebook in this process.

    Raises:
        ConfigError: the recipe asks for dask-ml. The key of the stage says which of the two made the codebook (they differ
            by rounding), so torch must not fill in silently.
    """
    if stage.kmeans.backend == "dask" and not stage.kmeans.codebook:
        raise ConfigError(
            "kmeans.backend is 'dask', and this command runs in one process, with torch. Use the console script `hubert` of an "
            "environment with the extra 'service', or say `--set kmeans.backend=torch`: another codebook, equal up to rounding"
        )
    return stage.run()


def show_status(args: argparse.Namespace) -> None:
    """Print what of a run is there; without a run the list of runs."""
    if args.run is None:
        names = sorted(path.name for path in runs_root().glob("*/") if any(path.glob("it*")))
        print(
            json.dumps(names)
            if args.json
            else "\n".join([f"runs in {runs_root()}:", *(f"  {name}" for name in names or ["none yet"])])
        )
        return
    folder = _existing(args.run)
    from hubert.runs.status import format_status, read_status

    status = read_status(folder)
    print(json.dumps(status.as_dict(), indent=1) if args.json else format_status(status))


def prune_run(args: argparse.Namespace) -> None:
    """List what can be removed from a run, and remove it if asked to."""
    folder = _existing(args.run)
    from hubert.core import text
    from hubert.runs.prune import find_prunable, format_findings, remove_all

    findings = find_prunable(folder, old=args.old)
    print(format_findings(findings, folder.root))
    if args.yes:
        print(f"freed: {text.size(remove_all(findings))}")
    elif findings.removals:
        print(f"to free {text.size(findings.bytes)}: hubert prune {args.run}{' --old' * args.old} --yes")


def show_plan(args: argparse.Namespace) -> None:
    """Print what a run would take."""
    from hubert.core.paths import find_recipe
    from hubert.runs.plan import build_plan, format_plan
    from hubert.settings.recipe import parse_overrides, read_recipe

    recipe = read_recipe(find_recipe(args.recipe), parse_overrides(args.set))
    plan = build_plan(
        recipe, hours=args.hours, num_files=args.files, num_gpus=args.gpus, rate=args.audio_seconds_per_second
    )
    print(json.dumps(plan.as_dict(), indent=1) if args.json else format_plan(plan, args.recipe))


def _existing(name: str) -> RunFolder:
    folder = RunFolder.of(name)
    if not folder.root.is_dir():
        raise ConfigError(f"run {name!r}: {folder.root} does not exist; `hubert status` lists the runs")
    return folder


# Start ------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser, _ = build_parser()
    return run(parser, arguments)


def run(parser: Parser, arguments: Sequence[str] | None = None) -> int:
    """Parse, run the command, and turn this project's errors into a paragraph and an exit code."""
    args = parser.parse_args(arguments)
    try:
        code = int(args.handler(args) or 0)
        sys.stdout.flush()
    except HubertError as error:
        print(f"hubert: {error}", file=sys.stderr)
        return next((code for kind, code in CODES.items() if isinstance(error, kind)), 1)
    except KeyboardInterrupt:
        print(
            "\nhubert: interrupted; what is finished is kept, and the same command goes on from there", file=sys.stderr
        )
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        print(f"hubert: the system refused: {error}. What is finished is kept", file=sys.stderr)
        return CODES[TransientError]
    return code
