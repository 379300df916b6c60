"""`hubert export` and `hubert push`: a trained or released model out, in the formats that people use."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubert.core.errors import ConfigError
from hubert.core.outputs import check_files
from hubert.core.paths import RunFolder
from hubert.model.formats import FORMATS

if TYPE_CHECKING:
    from hubert.evaluation.choice import Outcome
    from hubert.settings.model import ModelConfig


def add_commands(commands: Any) -> None:
    """Add the two commands to the list of an argument parser."""
    export = commands.add_parser(
        "export",
        help="write a model for transformers or torchaudio, with a model card",
        description="Write a model as transformers or torchaudio read it, with a README.md (model card) filled from the run.",
    )
    export.add_argument(
        "model",
        metavar="RUN|CHECKPOINT",
        help="a run: the checkpoint of its newest outcome; or a checkpoint: a folder, a file, a Hugging Face id, a URL",
    )
    export.add_argument("--format", choices=FORMATS, required=True, help="of the files")
    export.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="where they go")
    export.add_argument("--iteration", metavar="N", type=int, help="of the run (default: the newest with an outcome)")
    export.add_argument(
        "--head",
        action="store_true",
        help="with the pretraining head (hubert-flows, torchaudio's HuBERTPretrainModel; transformers has none)",
    )
    export.set_defaults(handler=export_model)
    push = commands.add_parser(
        "push",
        help="upload an exported folder to the Hugging Face Hub",
        description="Upload a folder that `hubert export` wrote to the Hugging Face Hub. The token is that of `hf auth login` "
        "or of the variable HF_TOKEN. Read the README.md before: the license is yours to state.",
    )
    push.add_argument("folder", metavar="FOLDER", type=Path, help="what `hubert export` wrote")
    push.add_argument("repository", metavar="REPO", help="owner/name; made if it is not there")
    push.add_argument("--private", action="store_true", help="a new repository is private")
    push.set_defaults(handler=push_folder)


def export_model(args: argparse.Namespace) -> None:
    """Write a model and its card.

    Raises:
        ConfigError: there is no such run, or it has no outcome; the format cannot hold the model.
        DataError: the checkpoint is missing, damaged or of no known layout.
    """
    from hubert.report.model_card import write_card

    if args.head and args.format == "transformers":
        raise ConfigError(
            "--head: transformers has no pretraining head for HuBERT; use format torchaudio or hubert-flows"
        )
    folder, outcome = _find_outcome(args.model, args.iteration)
    checkpoint = args.model if outcome is None else outcome.checkpoint
    output = args.output.expanduser().absolute()
    config = _write(checkpoint, output, args.format, head=args.head)
    facts = {} if outcome is None or folder is None else _facts_of_run(folder, outcome)
    name = (
        Path(str(checkpoint)).name
        if folder is None or outcome is None
        else f"{folder.name}, iteration {outcome.iteration}"
    )
    write_card(output, config, args.format, name=name, **facts)
    print(
        f"{args.format}: {output}\n  of {'the checkpoint' if outcome is None else f'run {folder and folder.root}:'} {checkpoint}"
    )
    if outcome is not None:
        print(f"  step {outcome.step:,} of iteration {outcome.iteration}; best layer {outcome.layer}: {outcome.why}")
    print("  README.md is the model card; its license is yours to state")


def push_folder(args: argparse.Namespace) -> None:
    """Upload an exported folder, and print its address."""
    from hubert.model.formats.export import push_to_hub

    print(push_to_hub(args.folder.expanduser(), args.repository, private=args.private))


def _find_outcome(name: str, iteration: int | None) -> "tuple[RunFolder | None, Outcome | None]":
    """Return the run and the outcome that a name means; None and None where it means a checkpoint."""
    from hubert.evaluation.choice import read_outcome

    path = Path(name).expanduser()
    is_run_name = "/" not in name or any(path.glob("it*/"))
    if path.is_file() or (path / "config.json").exists() or not is_run_name:
        if iteration is not None:
            raise ConfigError(f"--iteration {iteration}: {name} is a checkpoint, and only runs have iterations")
        return None, None
    folder = RunFolder.of(name)
    if not folder.root.is_dir():
        raise ConfigError(f"run {name!r}: {folder.root} does not exist; `hubert status` lists the runs")
    with_outcome = [number for number in folder.iterations() if folder.outcome(number).exists()]
    number = max(with_outcome, default=0) if iteration is None else iteration
    outcome = read_outcome(folder, number)
    if outcome is None:
        finished = ", ".join(map(str, with_outcome)) or "none"
        raise ConfigError(
            f"run {name!r} has no outcome of iteration {number or 'any number'} (finished: {finished}). Finish it with "
            f"`hubert report {name}`, or name a checkpoint: hubert export {folder.root}/it1/train-…/step-…"
        )
    return folder, outcome


def _facts_of_run(folder: RunFolder, outcome: "Outcome") -> dict[str, Any]:
    """Return what the card says of a run: outcome, report and settings, as far as they are there."""
    from hubert.report.report_data import find_report
    from hubert.runs.resolved import Resolved

    found = find_report(folder, outcome.iteration)
    same = found is not None and found[1].outcome is not None and found[1].outcome.sha256 == outcome.sha256
    report = found[1] if found is not None and same else None
    settings = folder.settings(outcome.iteration)
    resolved = Resolved.load(settings).model_dump(mode="json") if settings.exists() else None
    return {"outcome": outcome, "sha256": outcome.sha256, "report": report, "resolved": resolved}


def _write(checkpoint: str, output: Path, format: str, *, head: bool) -> "ModelConfig":  # noqa: A002  (the option's name)
    """Write the encoder, with the head if it is asked for, and return its configuration.

    transformers keeps the mask embedding, with or without the rest of a head, so that is passed on wherever there is one.

    Raises:
        ConfigError: the head is asked for, and there is none; or the format cannot hold the model.
    """
    from hubert.model.formats.export import export_weights
    from hubert.model.formats.layouts import OWN
    from hubert.model.formats.read import read_pretrained
    from hubert.model.hubert import HuBERT, HuBERTPretrain

    check_files([Path(checkpoint).absolute()])
    found = read_pretrained(checkpoint)
    if head and found.whole_head(None) is None:
        raise ConfigError(f"--head: {checkpoint} is an encoder without a pretraining head; leave the option out")
    if format == OWN:
        model = HuBERTPretrain.from_pretrained(checkpoint) if head else HuBERT.from_pretrained(checkpoint)
        model.save_pretrained(output)
    else:
        kept = found.whole_head(None) if head else (found.head if format == "transformers" else None)
        export_weights(output, found.config, found.encoder, kept or None, format=format)
    return found.config
