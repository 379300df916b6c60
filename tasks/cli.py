"""The console script `hubert`: the stages (`hubert.cli.main`), and the service: up, down, demo, run.

hubert demo     the whole of it on speech made on the spot: servers, two iterations, the table
hubert up       Prefect, MLflow and a worker, until Ctrl-C
hubert run      trigger hubert-pretraining and follow it in the terminal
hubert check    try a cluster file: one tiny job per section
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubert.cli import main as cli
from hubert.cli.parser import Parser
from hubert.core.errors import ConfigError, TransientError
from hubert.core.paths import RunFolder, find_cluster, find_recipe, spell_for_worker

if TYPE_CHECKING:
    from tasks.service.settings import ServiceSettings

FLOW, DEPLOYMENT = "hubert-pretraining", "local"
FOLLOW_CODES = """\
exit codes: 0 completed   1 failed   6 cancelled   75 crashed (its process was killed: the same command goes on where it was)
            130 Ctrl-C (the run goes on)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for variable in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"):  # Prefect and MLflow read them when they are imported
        os.environ.setdefault(variable, "true")
    parser, commands = cli.build_parser(fit_codebook=fit_codebook)
    commands.choices["status"].set_defaults(handler=show_status)
    add_service_commands(commands)
    return cli.run(parser, arguments)


def add_service_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the commands that need the service's libraries."""
    up = commands.add_parser(
        "up", help="start Prefect, MLflow and a worker on this machine, and register the deployments"
    )
    up.add_argument("--detach", action="store_true", help="leave them running (default: until Ctrl-C)")
    up.add_argument(
        "--host",
        metavar="ADDRESS",
        help="this machine's address in a cluster's network, where its nodes then reach the servers: asks for a password, "
        "see docs/service.md (default: 127.0.0.1, for this machine alone)",
    )
    up.add_argument(
        "--max-runs",
        metavar="N",
        type=int,
        help="runs at once, the others wait (default: as many as this machine's memory has 4 GB)",
    )
    _add_places(up)
    up.set_defaults(handler=start_service)

    down = commands.add_parser("down", help="stop what `hubert up` started")
    down.add_argument(
        "--folder", type=Path, help="the service's data (default: HUBERT_SERVICE, else .service in the project)"
    )
    down.set_defaults(handler=stop_service)

    demo = commands.add_parser(
        "demo",
        help="the whole of it in a few CPU minutes: servers, speech made on the spot, two iterations, a table",
        description="Start the service, run hubert-pretraining with the recipe `demo`, print the table, stop the service.",
        epilog=FOLLOW_CODES,
    )
    demo.add_argument("--keep", action="store_true", help="leave the servers running")
    demo.add_argument("--steps", metavar="N", type=int, help="optimizer steps per iteration (default: the recipe's)")
    demo.add_argument("--seed", metavar="S", type=int, help="seed of codebooks and trainings (default: the recipe's)")
    demo.add_argument("--run", metavar="NAME", default="demo", help="name of the run (default: %(default)s)")
    demo.add_argument(
        "--cluster", metavar="NAME", default="local", help="name of a cluster, or a .yaml file (default: %(default)s)"
    )
    _add_places(demo)
    demo.set_defaults(handler=run_demo)

    run = commands.add_parser(
        "run",
        help="run all iterations of a recipe through the service, and follow them here",
        description=f"Trigger {FLOW}/{DEPLOYMENT} and follow it until it ends. Ctrl-C stops following; the run goes on.",
        epilog=FOLLOW_CODES,
    )
    run.add_argument(
        "--run", metavar="NAME", default="demo", help="name of the run, or a path with a slash (default: %(default)s)"
    )
    run.add_argument(
        "--recipe",
        metavar="R",
        default="demo",
        help="name in deployments/recipes, or a TOML file (default: %(default)s)",
    )
    run.add_argument(
        "--data",
        metavar="D",
        default="",
        help="folder of audio, archive or manifest (default: the recipe's own corpus)",
    )
    run.add_argument(
        "--cluster",
        metavar="C",
        default="local",
        help="name in deployments/clusters, or a YAML file (default: %(default)s)",
    )
    run.add_argument(
        "--set", metavar="NAME=VALUE", nargs="+", action="extend", default=[], help="settings that win over the recipe"
    )
    run.add_argument("--extend", action="store_true", help="let finished trainings go on to more steps")
    run.add_argument(
        "--choose",
        choices=("auto", "ask"),
        default="auto",
        help="ask: pause between iterations until somebody chooses the teacher in the Prefect UI (default: %(default)s)",
    )
    run.add_argument(
        "--folder", type=Path, help="the service's data (default: HUBERT_SERVICE, else .service in the project)"
    )
    run.set_defaults(handler=run_pretraining)

    stop = commands.add_parser(
        "stop",
        help="stop what of a run trains, after its step and a checkpoint",
        description="Stop the trainings of a run that still run, whoever started them, each after its step and a checkpoint. A "
        "training outlives its flow, so this is for one whose flow is gone; `hubert run` goes on from the checkpoint.",
    )
    stop.add_argument("run", metavar="RUN", help="name of the run, or a path with a slash")
    stop.set_defaults(handler=stop_run)

    check = commands.add_parser(
        "check",
        help="try what a cluster file asks for, with one tiny job per section",
        description="Submit one tiny job per section of a cluster file, and say what works on its node.",
        epilog="exit codes: 0 all of it works   1 something does not; the cause and the fix stand under the table\n",
    )
    check.add_argument("cluster", metavar="CLUSTER", help="name in deployments/clusters, or a YAML file")
    check.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        default=300.0,
        help="cancel a job that waits longer (default: %(default)s)",
    )
    check.set_defaults(handler=check_site)


def _add_places(command: Parser) -> None:
    command.add_argument("--prefect-port", metavar="PORT", type=int, help="of the Prefect server (default: 4200)")
    command.add_argument("--mlflow-port", metavar="PORT", type=int, help="of the MLflow server (default: 5000)")
    command.add_argument(
        "--folder", type=Path, help="the service's data (default: HUBERT_SERVICE, else .service in the project)"
    )


# The service ------------------------------------------------------------------------------------------------------


def service_settings(args: argparse.Namespace) -> "ServiceSettings":
    """Return the settings of the folder's service, with what the options change.

    Raises:
        ConfigError: a port is out of range.
    """
    from pydantic import ValidationError

    from hubert.settings.sections import explain
    from tasks.service.settings import ServiceSettings, find_service, service_folder

    folder = args.folder.expanduser().resolve() if args.folder else service_folder()
    found = find_service(folder)
    known: dict[str, Any] = found.settings.model_dump() if found else {"folder": folder}
    places = {name: getattr(args, name, None) for name in ("host", "prefect_port", "mlflow_port", "max_runs")}
    try:
        return ServiceSettings.model_validate(
            known | {name: value for name, value in places.items() if value is not None}
        )
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def start_service(args: argparse.Namespace) -> int:
    """Start the service; without --detach keep it until Ctrl-C."""
    from tasks.service import service
    from tasks.service.foreground import hold

    settings = service_settings(args)
    if not args.detach:
        return hold(settings)
    found = service.up(settings)
    print(
        f"{service.describe(found)}\nstarted: {', '.join(found.started) or 'nothing, all of it runs'}\nstop it:  hubert down"
    )
    return 0


def stop_service(args: argparse.Namespace) -> None:
    """Stop the service and say what was stopped."""
    from tasks.service import service

    _say_stopped(service.down(service_settings(args)))


def _say_stopped(stopped: Any) -> None:
    print(f"stopped: {', '.join(stopped.processes) or 'nothing was running'}")
    for run in stopped.runs:
        print(f"was under way, and is marked as crashed; started again it goes on where it was: {run}")


def show_status(args: argparse.Namespace) -> None:
    """Print a run's status; without a run the service's, and the list of runs."""
    if args.run is None and not args.json:
        from tasks.service import service

        settings = service_settings(argparse.Namespace(folder=None))
        addresses = {service.PREFECT: settings.ui_url, service.MLFLOW: settings.mlflow_url}
        for name, health in service.status(settings).items():
            print(f"{name:<14} {health:<16} {addresses.get(name, '')}".rstrip())
    cli.show_status(args)


def fit_codebook(stage: Any) -> Any:
    """Run the k-means stage: by dask-ml on this machine's workers, or by torch, as the recipe says."""
    if stage.kmeans.backend == "torch":
        return stage.run()
    from tasks.local import fit_codebook as fit_with_dask

    return fit_with_dask(stage)


# Runs -------------------------------------------------------------------------------------------------------------


def run_pretraining(args: argparse.Namespace) -> int:
    """Trigger a pretraining through the service, and follow it.

    Raises:
        ConfigError: the service is not up, or a setting is wrong: nothing was triggered.
    """
    from hubert.settings.recipe import parse_overrides
    from tasks.service import service

    overrides = parse_overrides(args.set)
    parameters = build_parameters(args.run, args.recipe, args.data, args.cluster, overrides)
    parameters |= {"extend": True} if args.extend else {}
    parameters |= {"choose": args.choose} if args.choose != "auto" else {}
    settings = service_settings(args)
    health = service.status(settings)
    if health[service.PREFECT] != "answers" or health[service.WORKER] != "runs":
        state = ", ".join(f"{name}: {what}" for name, what in health.items())
        raise ConfigError(f"the service in {settings.folder} is not up ({state}); start it with `hubert up --detach`")
    run_id = trigger(settings, parameters)
    try:
        code = follow_run(settings, run_id)
    except KeyboardInterrupt:
        print(
            f"\nThe run goes on: {settings.ui_url}/runs/flow-run/{run_id}\n"
            f"see how far it is:  hubert status {parameters['run']}\nstop it:  prefect flow-run cancel {run_id}"
        )
        return cli.INTERRUPTED
    if code == 0:
        show_report(parameters["run"], settings)
    return code


def stop_run(args: argparse.Namespace) -> int:
    """Stop what of a run trains.

    Raises:
        ConfigError: there is no such run.
    """
    from hubert.training.launch import cancel
    from tasks.train import find_trainers

    folder = RunFolder.of(args.run)
    if not folder.root.is_dir():
        raise ConfigError(f"run {args.run!r}: {folder.root} does not exist; `hubert status` lists the runs")
    trainers = list(find_trainers(folder, _say))
    for trainer in trainers:
        _say(f"stopping {trainer.name} in {trainer.folder}, after its step and a checkpoint")
        cancel(trainer)
    _say("stopped" if trainers else f"nothing of run {args.run} trains")
    return 0


def check_site(args: argparse.Namespace) -> int:
    """Try a cluster; its jobs are cancelled whatever ends this."""
    from tasks.clusters.check import check
    from tasks.service.signals import interrupted_by

    with interrupted_by(signal.SIGTERM, signal.SIGHUP):
        return 0 if check(args.cluster, args.wait, _say) else 1


def build_parameters(run: str, recipe: str, data: str, cluster: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Check what a run is asked to do, and return the flow's parameters; paths become absolute, as a worker needs them.

    Raises:
        ConfigError: the recipe, a setting, the data or the cluster file is wrong or missing, or Slurm could not start its jobs.
    """
    from hubert.runs.options import RunOptions, read_request
    from tasks.clusters.preflight import check_cluster

    _, settings, _ = read_request(RunOptions(run, recipe=recipe, data=data, overrides=overrides))
    settings.check_chain()
    check_cluster(cluster)
    return {
        "run": str(RunFolder.of(run).root),  # the worker may have another HUBERT_RUNS than this shell
        "recipe": spell_for_worker(recipe, find_recipe(recipe)),
        "data": str(Path(data).expanduser().resolve()) if data else "",
        "cluster": spell_for_worker(cluster, find_cluster(cluster)),
        "overrides": overrides,
    }


def trigger(settings: "ServiceSettings", parameters: dict[str, Any]) -> str:
    """Start the flow, and return the id of the flow run."""
    from tasks.service.follow import start_run
    from tasks.service.prefect_api import connect

    with connect(settings.api_url, settings.auth) as api:
        return start_run(api, FLOW, DEPLOYMENT, parameters)


def follow_run(settings: "ServiceSettings", run_id: str) -> int:
    """Follow a flow run until it ends; returns the exit code that says how."""
    from tasks.service.follow import EXIT_CODES, INFO, follow

    state = follow(settings.api_url, settings.ui_url, run_id, _say, level=INFO, auth=settings.auth)["type"]
    return EXIT_CODES.get(state, cli.CODES[TransientError])  # retried in the moment after its end: it goes on


def _say(line: str) -> None:
    print(line, flush=True)


def run_demo(args: argparse.Namespace) -> int:
    """Start the service if it is not up, run the demo recipe, print the table, and stop what was started."""
    from tasks.service import service
    from tasks.service.signals import deaf, interrupted_by

    wishes: dict[str, Any] = {} if args.seed is None else {"kmeans.seed": args.seed, "train.seed": args.seed}
    wishes |= {} if args.steps is None else {"train.steps": args.steps}
    parameters = build_parameters(args.run, "demo", "", args.cluster, wishes)
    settings = service_settings(args)
    print("Starting Prefect, MLflow and a worker (about 20 s) ...", flush=True)
    # Whatever ends this command, the servers that it started must not be left behind.
    with interrupted_by(signal.SIGTERM, signal.SIGHUP):
        running = service.up(settings)
        mine = len(running.started) == len(service.PARTS)
        print(service.describe(running), flush=True)
        try:
            code = follow_run(running.settings, trigger(running.settings, parameters))
            if code == 0:
                show_report(parameters["run"], running.settings)
            else:
                print(f"The demo did not end well; logs: {running.settings.folder / 'logs'}", file=sys.stderr)
        finally:
            if mine and not args.keep:
                with deaf():
                    _say_stopped(service.down(running.settings))
    if args.keep or not mine:
        print("The service is still up; `hubert down` stops it.")
    return code


def show_report(run: str, settings: "ServiceSettings") -> None:
    """Print the table that compares MFCC and the iterations, and where everything is."""
    from hubert.report.stage import summarise_run

    path, text = summarise_run(RunFolder.of(run))
    places = {"report": path, "run": run, "Prefect": settings.ui_url, "MLflow": settings.mlflow_url}
    print("\n".join(["", text, *(f"{name:<8} {place}" for name, place in places.items())]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
