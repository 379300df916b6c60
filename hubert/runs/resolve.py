"""From what a person asked for to what an iteration does: settled before anything starts, and obeyed by every retry.

Each start of an iteration, by a command or by a flow, leaves its settings in `<run>/itN/resolved.toml`. What is given anew
wins; what is not given is taken from there, else from the newest iteration before. A recipe starts the settings anew.
Names are looked up here; from then on a model or codebook is known by its path and the hash of its content.
"""

from collections.abc import Callable
from pathlib import Path

from hubert.core.errors import ConfigError
from hubert.core.paths import RunFolder, demo_corpus_folder
from hubert.data.demo.corpus import build_demo_corpus
from hubert.evaluation.checkpoints import FORM, SERVICE, Pick, default_pick, find_run_checkpoint
from hubert.evaluation.choice import read_outcome
from hubert.features.source import FeatureSource
from hubert.model.weights import find_origin
from hubert.runs.options import RunOptions, find_settings, read_request
from hubert.runs.pipeline import Iteration
from hubert.runs.resolved import Resolved
from hubert.settings.recipe import IterationSettings
from hubert.training.init import settle_init
from hubert.units.codebook import settle_codebook

Chosen = tuple[FeatureSource, str, str]  # what is clustered, why, and who chose it


def resolve(
    options: RunOptions,
    *,
    choose_teacher: Callable[[RunFolder, int], Pick | None] = lambda folder, number: None,  # noqa: ARG005
    make_corpus: Callable[[Path], Path] = build_demo_corpus,
) -> Resolved:
    """Settle what an iteration will do, before anything starts.

    Args:
        options: what is asked for.
        choose_teacher: asked for the choice of a person, with the run's folder and the iteration's number; it wins over
            the teacher of the options, whose name it may have looked up. None: nobody chose.
        make_corpus: makes the speech of a recipe that brings its own, in a folder, and returns that.

    Raises:
        ConfigError: a setting, the data, the teacher or the previous iteration's outcome is missing or contradictory.
    """
    folder = RunFolder.of(options.run)
    number, before = find_settings(options)
    own = before if before is not None and before.number == number else None
    name, recipe, data = read_request(options)
    settings = recipe.iteration(number)
    pick = choose_teacher(folder, number)
    if own is None or options.recipe or options.teacher or pick is not None:
        source, chosen, chosen_by = choose_source(folder, number, settings, options, pick)
    else:
        source, chosen, chosen_by = keep_source(own, settings, options.layer)
    location = data or make_corpus(demo_corpus_folder())
    resolved = Resolved(
        run=str(folder.root),
        number=number,
        data=str(location),
        recipe=recipe,
        recipe_name=name,
        settings=settings,
        source=source,
        chosen=chosen,
        chosen_by=chosen_by,
        init=settle_init(settings.train, own.init if own else None),
        codebook=settle_codebook(settings.kmeans, source, location, own.codebook if own else None),
        extend=options.extend,
    )
    Iteration(resolved).check_paths()
    return resolved


def settle(options: RunOptions) -> Resolved:
    """Return what an iteration does, for a command, and write it down if the options change anything.

    Raises:
        ConfigError: as `resolve`; then nothing is written.
    """
    number, before = find_settings(options)
    if before is not None and before.number == number and options.changes_nothing:
        return before.model_copy(update={"extend": options.extend})
    resolved = resolve(options)
    resolved.remember()
    return resolved


def first_unfinished(folder: RunFolder) -> int:
    """Return the number of the first iteration without an outcome, from the first that was begun (a run may skip some)."""
    number = min((begun for begun in folder.iterations() if folder.settings(begun).exists()), default=1)
    while read_outcome(folder, number) is not None:
        number += 1
    return number


# What is clustered ------------------------------------------------------------------------------------------------


def choose_source(
    folder: RunFolder, number: int, settings: IterationSettings, options: RunOptions, pick: Pick | None
) -> Chosen:
    """Return what an iteration clusters: a person's choice, the given teacher, the previous outcome, or MFCC.

    Raises:
        ConfigError: the teacher or its layer does not exist, or the previous iteration is not finished.
    """
    teacher, layer = options.teacher, options.layer
    if pick is None and teacher:
        pick = find_run_checkpoint(teacher) or find_given(teacher, layer)
    if pick is None and number == 1:
        if layer is not None:
            raise _no_teacher(number, layer)
        return FeatureSource(), "iteration 1 starts from MFCC", SERVICE
    if pick is None:
        pick = default_pick(folder, number - 1)
    taken = pick.with_layer(layer)
    source = FeatureSource.of_layer(
        Path(taken.checkpoint), taken.sha256, taken.layer, settings.features, name=taken.name
    )
    return source, taken.why, pick.by if taken == pick else FORM


def keep_source(own: Resolved, settings: IterationSettings, layer: int | None) -> Chosen:
    """Return what an iteration that was begun clusters, perhaps another layer of it; its teacher stays.

    Raises:
        ConfigError: it clusters MFCCs and a layer was given, or the teacher has no such layer.
    """
    source = own.source
    if source.is_mfcc:
        if layer is not None:
            raise _no_teacher(own.number, layer)
        return source, own.chosen, own.chosen_by
    changed = layer is not None and layer != source.layer
    kept = FeatureSource.of_layer(
        Path(source.checkpoint),
        source.sha256,
        source.layer if layer is None else layer,
        settings.features,
        name=source.name,
    )
    return (kept, f"given: layer {layer}", FORM) if changed else (kept, own.chosen, own.chosen_by)


def _no_teacher(number: int, layer: int) -> ConfigError:
    return ConfigError(
        f"layer {layer} was given, but iteration {number} clusters MFCCs, which have no layers; give a teacher too"
    )


def find_given(teacher: str, layer: int | None) -> Pick:
    """Look up a teacher that is no checkpoint of a run by its name: a folder, a file, a Hugging Face id or a URL.

    Raises:
        ConfigError: there is no such model, or the layer was not given.
    """
    if teacher.startswith("models:/"):
        raise ConfigError(
            f"teacher {teacher!r} is an entry of MLflow, which only the flows ask (`hubert-iteration` in the Prefect UI, or "
            "`prefect deployment run hubert-iteration -p teacher=...`). For a command give the path that stands as "
            "`checkpoint_path` on the entry's page, or RUN/it1/step-00000400"
        )
    if layer is None:
        raise ConfigError(
            f"teacher {teacher!r} was given without `layer`: say which of its layers is clustered, from 1. Without one it "
            "has to be a checkpoint that a run validated: RUN/it1, RUN/it1/step-00000400"
        )
    origin = find_origin(teacher, "teacher")
    return Pick(origin.checkpoint, origin.sha256, layer, f"given: {teacher}", FORM, name=origin.name)
