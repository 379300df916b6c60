"""The commands `hubert codebook import`, `hubert codebook export` and `hubert export-units`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubert.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from hubert.features.source import FeatureSource
    from hubert.runs.pipeline import Iteration

_IMPORT = """\
A codebook of another program says nothing about the features that it was fitted on, and units of other features are
noise. So say it here; from then on the codebook refuses other features. Nothing in FILE is run.

  hubert codebook import km.bin --output codebook.safetensors --kind mfcc --frame-rate 100
  hubert codebook import km.bin --output codebook.safetensors --kind layer --frame-rate 50 \\
      --checkpoint facebook/hubert-base-ls960 --layer 6 --convention output

A recipe labels with it by `kmeans.codebook = "codebook.safetensors"`, with the same checkpoint and layer as teacher.
"""


def add_commands(commands: Any) -> None:
    """Add the commands to the list of a parser."""
    codebook = commands.add_parser("codebook", help="codebooks of other programs in, and ours out")
    actions = codebook.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=type(codebook))
    _add_import(actions)
    export = actions.add_parser("export", help="write a codebook for other programs")
    export.add_argument("codebook", metavar="RUN|FILE", help="a run (its newest iteration), or a codebook file of ours")
    export.add_argument("--iteration", metavar="N", type=int, help="of the run, from 1")
    export.add_argument(
        "--format",
        choices=("joblib", "safetensors"),
        default="joblib",
        help="joblib: a fitted scikit-learn MiniBatchKMeans, as fairseq and textless load it (default: %(default)s)",
    )
    export.add_argument("--output", metavar="FILE", type=Path, required=True)
    export.set_defaults(handler=run_export)
    units = commands.add_parser("export-units", help="write a run's units as JSONL, or as fairseq's .km with .tsv")
    units.add_argument("run", metavar="RUN", help="name of the run, or a path with a slash")
    units.add_argument("--iteration", metavar="N", type=int, help="from 1 (default: the newest that was begun)")
    units.add_argument("--format", choices=("jsonl", "km"), default="jsonl", help="default: %(default)s")
    units.add_argument("--part", choices=("train", "validation"), nargs="+", default=["train", "validation"])
    units.add_argument(
        "--deduplicate", action="store_true", help="runs of a unit as one, with their durations in frames"
    )
    units.add_argument("--output", metavar="FOLDER", type=Path, required=True)
    units.set_defaults(handler=run_export_units)


def _add_import(actions: Any) -> None:
    command = actions.add_parser(
        "import", help="read another program's centroids, without running the file", epilog=_IMPORT
    )
    command.add_argument(
        "file", metavar="FILE", type=Path, help="joblib file (or pickle), .npy, .npz, .pt or .safetensors"
    )
    command.add_argument("--output", metavar="FILE", type=Path, required=True, help="a .safetensors file")
    command.add_argument("--kind", choices=("mfcc", "layer"), required=True, help="what was clustered")
    command.add_argument(
        "--frame-rate", metavar="HZ", type=int, required=True, help="of the features: MFCC 100, layer 50"
    )
    command.add_argument("--checkpoint", metavar="C", default="", help="whose layer: folder, file, Hub id or address")
    command.add_argument("--sha256", metavar="HEX", default="", help="of its weights, where the checkpoint is not here")
    command.add_argument("--layer", metavar="L", type=int, help="which layer, from 1")
    command.add_argument(
        "--convention",
        choices=("output", "before-residual"),
        help="the layer's full output (fairseq, textless), or its feed-forward output before the sum (minimal_hubert)",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="arithmetic of the model (default: %(default)s)",
    )
    command.add_argument(
        "--normalize-waveform",
        choices=("true", "false"),
        help="whether the model got normalised waveforms, where features.normalize_waveform says so (default: as its files say)",
    )
    command.set_defaults(handler=run_import)


def run_import(args: argparse.Namespace) -> None:
    """Read a codebook of another program and write it as ours.

    Raises:
        ConfigError: a fact about its features is missing or impossible.
        DataError: the file holds no centroids, or something that would run.
    """
    from hubert.units.exchange import import_codebook

    if args.output.suffix != ".safetensors":
        raise ConfigError(f"--output {args.output}: expected a name that ends in .safetensors")
    codebook = import_codebook(args.file, build_source(args))
    output = args.output.expanduser().absolute()
    codebook.save(output)
    print(
        f"{len(codebook)} units of {tuple(codebook.centroids.shape)[1]} dimensions at {codebook.frame_rate} Hz\nwritten: {output}"
    )


def build_source(args: argparse.Namespace) -> "FeatureSource":
    """Return the features that a codebook was fitted on, as the options of `hubert codebook import` say.

    Raises:
        ConfigError: an option is missing, does not belong to the kind, or contradicts another.
    """
    from hubert.features.source import FeatureSource

    of_layer = {name: getattr(args, name) for name in ("checkpoint", "layer", "convention")}
    if args.kind == "mfcc":
        others = {**of_layer, "sha256": args.sha256, "normalize-waveform": args.normalize_waveform}
        given = [f"--{name}" for name, value in others.items() if value]
        if given:
            raise ConfigError(f"--kind mfcc has no {', '.join(given)}; for a layer of a model say --kind layer")
        source = FeatureSource()
    else:
        missing = [f"--{name}" for name, value in of_layer.items() if not value]
        if missing:
            raise ConfigError(
                f"--kind layer needs {', '.join(missing)}: units of another layer or convention are noise, and the file does "
                "not say which it is"
            )
        checkpoint, sha256 = args.checkpoint, args.sha256.lower()
        if not sha256:
            from hubert.model.weights import find_origin

            origin = find_origin(args.checkpoint, "--checkpoint")
            checkpoint, sha256 = origin.checkpoint, origin.sha256
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise ConfigError(f"--sha256 {sha256}: expected 64 hex digits")
        if args.layer < 1:
            raise ConfigError(f"--layer {args.layer}: layers count from 1")
        before_residual = args.convention == "before-residual"
        normalize = None if args.normalize_waveform is None else args.normalize_waveform == "true"
        source = FeatureSource(
            checkpoint, sha256, args.layer, before_residual, args.dtype, normalize_waveform=normalize
        )
    if args.frame_rate != source.frame_rate:
        raise ConfigError(
            f"--frame-rate {args.frame_rate}: {args.kind} features have {source.frame_rate} frames per second here; a codebook "
            "of other features cannot label them"
        )
    return source


def run_export(args: argparse.Namespace) -> None:
    """Write the codebook of a run, or a codebook file, for other programs.

    Raises:
        DataError: the k-means of the run is not finished, or the file is no codebook.
    """
    from hubert.units.codebook import Codebook
    from hubert.units.exchange import export_codebook

    path = Path(args.codebook).expanduser()
    if not path.is_file():
        path = _finished(args.codebook, args.iteration, "kmeans").kmeans.path
    output = args.output.expanduser().absolute()
    export_codebook(Codebook.load(path), output, args.format)
    print(f"written: {output}")


def run_export_units(args: argparse.Namespace) -> None:
    """Write the units of a run for other programs.

    Raises:
        DataError: the units of the run are not finished.
    """
    from hubert.units.export import export_units

    iteration = _finished(args.run, args.iteration, "units")
    output = args.output.expanduser().absolute()
    for part in args.part:
        manifest: Path = getattr(iteration.manifest, part)
        table = iteration.units.table(part)
        for path in export_units(table, manifest, output, part=part, format=args.format, deduplicated=args.deduplicate):
            print(f"written: {path}")


def _finished(run: str, number: int | None, stage: str) -> "Iteration":
    """Return an iteration of a run whose stage is finished.

    Raises:
        DataError: it is not; names the command to run.
    """
    from hubert.runs.options import RunOptions
    from hubert.runs.pipeline import Iteration
    from hubert.runs.resolve import settle
    from hubert.runs.status import Chain

    iteration = Iteration(settle(RunOptions(run, number)))
    chain = Chain(iteration)
    need = chain.missing(stage) or (None if chain.find(stage)[1] is not None else stage)
    if need is not None:
        raise DataError(
            f"{stage} of iteration {iteration.number} of run {run} is not finished. "
            f"First run: hubert {need} {run} --iteration {iteration.number}"
        )
    return iteration
