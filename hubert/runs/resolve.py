"""What an iteration will do, settled before anything starts, written down once, and obeyed by every retry.

`resolve` turns what a person asked for into `Resolved`: settings, teacher and layer, starting weights, codebook. Names are
looked up here; from then on a model or codebook is known by its path and the hash of its content.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubert.core.errors import ConfigError, DataError
from hubert.core.paths import RunFolder, find_recipe
from hubert.evaluation.checkpoints import FORM, SERVICE, Pick, default_pick, find_run_checkpoint
from hubert.evaluation.choice import read_outcome
from hubert.features.source import FeatureSource
from hubert.model.weights import find_origin
from hubert.runs.pipeline import Iteration
from hubert.runs.resolved import Resolved
from hubert.settings.recipe import IterationSettings, Recipe, read_recipe
from hubert.settings.sections import KMeansSettings
from hubert.training.init import settle_init
from hubert.units.codebook import read_given


def resolve(
    run: str,
    recipe: str,
    data: str,
    *,
    iteration: int | None = None,
    teacher: str = "",
    layer: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    extend: bool = False,
    settings: Recipe | None = None,
    pick: Pick | None = None,
) -> Resolved:
    """Settle what an iteration will do, before anything starts.

    Args:
        run: name or path of the run.
        recipe: name or path of the recipe.
        data: the data folder (or audio folder, archive, manifest).
        iteration: number from 1; None: the first one that is not finished.
        teacher: checkpoint whose layer is clustered: `RUN/it1`, `RUN/it1/step-00000400`, its folder or file, a Hugging Face
            id or a URL; empty: the previous iteration's outcome (MFCC in iteration 1). With one, no earlier iteration is
            needed.
        layer: layer of the teacher, from 1; None: the one that the teacher's run chose.
        overrides: settings that win over the recipe.
        extend: continue a finished training to more steps.
        settings: the recipe's content where it is known already (with the overrides); then no file is read.
        pick: a checkpoint that was looked up already, in the place of `teacher`.

    Raises:
        ConfigError: a setting, the data, the teacher or the previous iteration's outcome is missing or contradictory.
    """
    folder = RunFolder.of(run)
    settings = settings or read_recipe(find_recipe(recipe), overrides)
    location = Path(data).expanduser().resolve()
    if not data or not location.exists():
        raise ConfigError(f"data {data!r}: expected a folder of audio, an archive or a manifest; it does not exist")
    number = first_unfinished(folder) if iteration is None else iteration
    check_number(number)
    own = settings.iteration(number)
    source, chosen, chosen_by = choose_source(folder, number, own, teacher=teacher, layer=layer, pick=pick)
    before = remembered(folder, number)
    resolved = Resolved(
        run=str(folder.root),
        number=number,
        data=str(location),
        recipe=settings,
        recipe_name=recipe,
        source=source.record,
        chosen=chosen,
        chosen_by=chosen_by,
        init=settle_init(own.train, before.init if before else None),
        codebook=settle_codebook(own.kmeans, source, location, before.codebook if before else None),
        extend=extend,
    )
    Iteration(resolved).check_paths()
    return resolved


def remembered(folder: RunFolder, number: int) -> Resolved | None:
    """Return what an iteration did so far; None if it was not begun, or the file that said it is damaged."""
    try:
        return Resolved.load(folder.settings(number))
    except DataError:
        return None


def check_number(number: int) -> None:
    """Refuse an iteration below 1.

    Raises:
        ConfigError: it is.
    """
    if number < 1:
        raise ConfigError(f"iteration {number}: iterations count from 1")


def first_unfinished(folder: RunFolder) -> int:
    """Return the number of the first iteration without an outcome, from the first that was begun (a run may skip some)."""
    number = min((begun for begun in folder.iterations() if folder.settings(begun).exists()), default=1)
    while read_outcome(folder, number) is not None:
        number += 1
    return number


def settle_codebook(
    kmeans: KMeansSettings, source: FeatureSource, data: Path, before: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Look up the codebook that the recipe names: its name, path and the digest of its content; none if it is fitted.

    Args:
        kmeans: the settings.
        source: what is clustered.
        data: a relative name is relative to it, or to its folder if it is a file.
        before: what an earlier call returned. If the file has gone since, that still holds: a finished stage has its content.

    Raises:
        ConfigError: there is no such file.
        DataError: it is no codebook, or does not fit the settings or what is clustered.
    """
    name = kmeans.codebook
    if not name:
        return {}
    path = (data if data.is_dir() else data.parent) / Path(name).expanduser()
    if not path.exists():
        if before and before["name"] == name:
            return dict(before)
        raise ConfigError(
            f"kmeans.codebook = {name!r}: {path} does not exist; expected a codebook of ours, which `hubert codebook import` "
            "makes of others"
        )
    codebook = read_given(path, kmeans.num_units, source)
    return {"name": name, "path": str(path), "digest": codebook.content_digest}


def choose_source(
    folder: RunFolder,
    number: int,
    settings: IterationSettings,
    *,
    teacher: str,
    layer: int | None,
    pick: Pick | None = None,
) -> tuple[FeatureSource, str, str]:
    """Settle what an iteration clusters, and say why and who chose: a given teacher, the previous outcome, or MFCC."""
    if pick is None and teacher:
        pick = find_run_checkpoint(teacher)
    if pick is None and teacher:
        pick = find_given(teacher, layer)
    if pick is None and number == 1:
        if layer is not None:
            raise ConfigError(f"layer {layer} was given for iteration 1 without a teacher; iteration 1 clusters MFCCs")
        return FeatureSource(), "iteration 1 starts from MFCC", SERVICE
    if pick is None:
        pick = default_pick(folder, number - 1)
    taken = pick.with_layer(layer)
    source = FeatureSource.of_layer(
        Path(taken.checkpoint), taken.sha256, taken.layer, settings.features, name=taken.name
    )
    return source, taken.why, pick.by if taken == pick else FORM


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
