"""Which checkpoint is the teacher, as MLflow's registry says it: versions, the aliases `best` and `teacher`, look-ups.

One registered model per run and iteration, one version per validated checkpoint. The service sets `best`, and it sets
`teacher` as long as the alias is where the service has put it last (it writes that down in a tag of the model). Once a
person has moved `teacher`, it stays, and the next iteration obeys it; who removes the alias gives the choice back.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from hubert.core.errors import ConfigError, TransientError, first_line
from hubert.core.paths import RunFolder
from hubert.evaluation.checkpoints import ALIAS, FORM, Checkpoint, Pick
from hubert.evaluation.choice import Outcome
from hubert.evaluation.columns import CHECKPOINT, CHECKPOINT_IN_BRIEF, describe, write_csv
from hubert.model.weights import check_weights
from hubert.report.plots.curves import draw_iteration
from hubert.report.report_data import ReportData
from hubert.runs.pipeline import Iteration
from tasks.tracking.mirror import FOLDER_MARK, OUTAGE, Tracker, experiment_of, mark_of

BEST, TEACHER = "best", "teacher"
SET_BY_SERVICE = "teacher_set_by_service"  # tag: versions that the service has put `teacher` on, the last one or two
ANSWERED_LAYER = "teacher_layer"  # tag VERSION:LAYER: the layer that a person named together with the version
MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(@(?P<alias>[^/@:]+)|/(?P<version>\d+))?")
SHOWN = 20  # names in an error
ATTEMPTS = 3  # to log an evaluation; each one sends only what is missing


# What an iteration ends with --------------------------------------------------------------------------------------


def log_evaluation(iteration: Iteration, tracker: Tracker) -> str:
    """Catch up with the training's losses, then log checkpoints, scores, the choice and the report.

    Returns:
        The address of the page that compares the run's checkpoints.

    Raises:
        TransientError: MLflow did not take everything: the files stay, and another call sends what is missing.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            tracker.catch_up()
            _log_evaluation(iteration, tracker)
            break
        except OUTAGE as error:
            if attempt == ATTEMPTS:
                raise _silent(error) from error
    return tracker.models_url()


def _log_evaluation(iteration: Iteration, tracker: Tracker) -> None:
    outcome, checkpoints = iteration.outcome(), iteration.checkpoints()
    entries = tracker.log_checkpoints(checkpoints)
    if iteration.settings.tracking.upload:
        tracker.upload(checkpoints, entries)
    register(tracker, iteration.number, checkpoints, entries, outcome)
    tags = {"chosen_step": str(outcome.step), "chosen_layer": str(outcome.layer), "chosen_because": outcome.why}
    tags |= {"teacher": iteration.resolved.chosen, "teacher_chosen_by": iteration.resolved.chosen_by}
    with TemporaryDirectory() as scratch:
        files = artifacts_of(iteration, Path(scratch))
        # MLflow's Models page cannot sort by a metric (3.17); its page of a CSV file can.
        files[write_csv(Path(scratch) / "checkpoints.csv", CHECKPOINT, checkpoints)] = ""
        tracker.log_scores(scores_of(iteration), tags, files, step=outcome.step)


def scores_of(iteration: Iteration) -> dict[str, float]:
    """Return what a checkpoint's figures are compared with, by name: MFCC's ABX, the units' entropy and their PNMI."""
    validation = iteration.validate.figures()
    scores: dict[str, float | None] = {name: validation[name] for name in ("unigram_entropy", "majority_accuracy")}
    if iteration.abx is not None:
        mfcc: Mapping[str, Any] = next(
            (row["reported"] for row in iteration.abx.figures()["rows"] if not row["layer"]), {}
        )
        scores |= {f"abx_{speaker}_mfcc": mfcc.get(speaker) for speaker in ("within", "across")}
    if iteration.quality is not None:
        figures = iteration.quality.figures()["units"]
        scores |= {f"units_{name}": figures[name] for name in ("pnmi", "phone_purity", "cluster_purity")}
    return {name: value for name, value in scores.items() if value is not None}


def artifacts_of(iteration: Iteration, scratch: Path) -> dict[Path, str]:
    """Return the files that the MLflow run shows, each with its folder there: report, plots, settings, choice.

    The plots are the report's, drawn into `scratch`.
    """
    folder = iteration.report.folder
    stages = {stage.name: stage.folder for stage in iteration.evaluated()}
    data = ReportData.load(folder)
    for name, plot in draw_iteration(data, stages).items() if data is not None else ():
        (scratch / f"{name}.svg").write_text(plot.svg, encoding="utf-8")
    files = {folder / name: "" for name in ("report.html", "report.json")}
    files |= {iteration.folder.settings(iteration.number): "", iteration.folder.choice(iteration.number): ""}
    files |= dict.fromkeys(sorted(scratch.glob("*.svg")), "plots")
    return {path: place for path, place in files.items() if path.exists()}


def register(
    tracker: Tracker, number: int, checkpoints: Sequence[Checkpoint], entries: Mapping[str, str], outcome: Outcome
) -> None:
    """Make each checkpoint a version of the iteration's registered model, and set the aliases that are the service's."""
    client = tracker.client
    model = find_registered(client, tracker.folder, number) or create_registered(client, tracker, number)
    versions = {version.tags.get("sha256", ""): version for version in versions_of(client, model.name)}
    for one in checkpoints:
        tags = version_tags(one)
        version = versions.get(one.sha256)
        if version is None:
            entry = entries[one.sha256]
            versions[one.sha256] = client.create_model_version(
                model.name,
                f"models:/{entry}",
                tags=tags,
                description=f"`{one.checkpoint}`",
                await_creation_for=0,
                model_id=entry,
            )
            continue
        for name, value in tags.items():
            if version.tags.get(name) != value:
                client.set_model_version_tag(model.name, version.version, name, value)
    best = str(versions[outcome.sha256].version)
    if aliases_of(model).get(BEST) != best:
        client.set_registered_model_alias(model.name, BEST, best)
    current, mine = aliases_of(model).get(TEACHER), set_by_service(model)
    if current is None or (current in mine and current != best):
        # Both until it is done, so that a cut between the requests makes neither look like a person's.
        client.set_registered_model_tag(model.name, SET_BY_SERVICE, ",".join(filter(None, (current, best))))
        client.set_registered_model_alias(model.name, TEACHER, best)
        client.set_registered_model_tag(model.name, SET_BY_SERVICE, best)


def version_tags(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the figures of a version: the registry shows no metrics, so they stand here as text."""
    figures = {key: describe([key], checkpoint, label=False) for key in CHECKPOINT_IN_BRIEF}
    tags = figures | {"step": str(checkpoint.step), "sha256": checkpoint.sha256}
    return {name: text for name, text in tags.items() if text}


def find_registered(client: MlflowClient, folder: RunFolder, number: int) -> RegisteredModel | None:
    """Return the registered model of an iteration, whatever people have called it since; None if there is none."""
    mine = f"tags.{FOLDER_MARK} = '{mark_of(folder)}' and tags.iteration = '{number}'"
    found = client.search_registered_models(mine, max_results=1)
    return client.get_registered_model(found[0].name) if found else None


def create_registered(client: MlflowClient, tracker: Tracker, number: int) -> RegisteredModel:
    """Make the registered model of an iteration, named after the run's experiment."""
    experiment = client.get_experiment(experiment_of(client, tracker.folder)).name
    # Without the characters that an address of a model, models:/NAME@ALIAS, cannot have or a shell does not like.
    base = name = re.sub(r"[^\w.+-]+", "-", f"{experiment}-it{number}").strip("-")
    tags = {FOLDER_MARK: mark_of(tracker.folder), "iteration": str(number), "run": str(tracker.folder.root)}
    description = (
        f"The checkpoints of iteration {number} of `{tracker.folder.root}`, one version each.\n\nThe next `hubert-iteration` "
        f"clusters the version with the alias `{TEACHER}`: move the alias to choose another one, remove it to leave the choice "
        f"to the service. The service sets `{BEST}` (lowest masked validation loss).\n\n[Compare them]({tracker.models_url()})"
    )
    for attempt in range(2, 100):
        try:
            return client.create_registered_model(name, tags=tags, description=description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            name = f"{base}-{attempt}"
    raise ConfigError(f"MLflow has a hundred registered models called {base}: remove those that nobody needs")


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Return all versions of a registered model."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def aliases_of(model: RegisteredModel) -> dict[str, str]:
    """Return the version of each alias of a registered model."""
    return {alias: str(version) for alias, version in dict(model.aliases).items()}


def set_by_service(model: RegisteredModel) -> set[str]:
    """Return the versions on which `teacher` is the service's own choice."""
    return set(model.tags.get(SET_BY_SERVICE, "").split(",")) - {""}


# What a person chose ----------------------------------------------------------------------------------------------


def persons_pick(folder: RunFolder, number: int) -> Pick | None:
    """Return the checkpoint of iteration `number` that a person gave the alias `teacher`; None if nobody did.

    Raises:
        ConfigError, DataError: the version is no checkpoint, or its folder has gone or changed.
        TransientError: MLflow does not answer.
    """
    try:
        client = MlflowClient()
        model = find_registered(client, folder, number)
        current = aliases_of(model).get(TEACHER) if model else None
        if model is None or current is None or current in set_by_service(model):
            return None
        what = f"a person gave the alias `{TEACHER}` of {model.name} to version {current}"
        pick = _pick_of(client, client.get_model_version(model.name, current), None, what, ALIAS)
        version, _, layer = model.tags.get(ANSWERED_LAYER, "").partition(":")
        return pick.with_layer(int(layer)) if version == current and layer.isdecimal() else pick
    except OUTAGE as error:
        raise _silent(error) from error


def move_teacher(folder: RunFolder, number: int, pick: Pick) -> None:
    """Give `teacher` to the checkpoint that a person chose elsewhere, so that the dashboard shows what will be used.

    Raises:
        TransientError: MLflow does not answer.
    """
    try:
        client = MlflowClient()
        model = find_registered(client, folder, number)
        versions = versions_of(client, model.name) if model else []
        version = next((str(one.version) for one in versions if one.tags.get("sha256") == pick.sha256), None)
        if model is None or version is None:
            return  # MLflow did not answer at the end of that iteration
        client.set_registered_model_tag(model.name, ANSWERED_LAYER, f"{version}:{pick.layer}")
        client.set_registered_model_alias(model.name, TEACHER, version)
        client.set_registered_model_tag(model.name, SET_BY_SERVICE, "")
    except OUTAGE as error:
        raise _silent(error) from error


def look_up(teacher: str, layer: int | None) -> Pick:
    """Look up `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/m-…` (the id of a checkpoint's entry).

    Args:
        teacher: the address.
        layer: the layer that was given; None: the checkpoint's own best one.

    Raises:
        ConfigError: there is no such entry, or it is no checkpoint; names those that there are.
        DataError: its folder has gone or changed.
        TransientError: MLflow does not answer.
    """
    found = MODEL_URI.fullmatch(teacher)
    if found is None:
        raise ConfigError(
            f"teacher {teacher!r}: expected models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-… (the id of a checkpoint)"
        )
    try:
        client = MlflowClient()
        if found["alias"] or found["version"]:
            version = _find_version(client, teacher, found["name"], found["alias"], found["version"])
            what = f"given: {teacher}, which is version {version.version}"
            return _pick_of(client, version, layer, what, FORM)
        return _pick_of_entry(client, found["name"], layer, f"given: {teacher}", FORM)
    except OUTAGE as error:
        raise _silent(error) from error


def _find_version(
    client: MlflowClient, teacher: str, name: str, alias: str | None, version: str | None
) -> ModelVersion:
    """Return the version with an alias or a number."""
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = sorted(other.name for other in client.search_registered_models(max_results=SHOWN))
        known = ", ".join(names) or "none"
        raise ConfigError(f"teacher {teacher!r}: MLflow has no registered model {name!r}; it has: {known}") from error
    aliases = aliases_of(model)
    wanted = aliases.get(alias, "") if alias else version
    versions = {str(one.version): one for one in versions_of(client, name)}
    if wanted not in versions:
        what = f"alias {alias!r}" if alias else f"version {version}"
        known = ", ".join(f"{one} (step {versions[one].tags.get('step', '?')})" for one in sorted(versions, key=int))
        named = ", ".join(f"{one} = {number}" for one, number in sorted(aliases.items())) or "none"
        raise ConfigError(f"teacher {teacher!r}: {name} has no {what}; versions: {known or 'none'}; aliases: {named}")
    return versions[wanted]


def _pick_of(client: MlflowClient, version: ModelVersion, layer: int | None, what: str, by: str) -> Pick:
    """Return what a version stands for; its entry knows, as a version registered by hand has no tags."""
    entry = re.fullmatch(r"models:/(m-\w+)", str(version.source))
    if entry is None:
        raise ConfigError(
            f"{what}: that version was made of {version.source}, which is no checkpoint of a training here. Fix: register an "
            "entry of an experiment's Models page, or choose another version"
        )
    return _pick_of_entry(client, entry[1], layer, what, by)


def _pick_of_entry(client: MlflowClient, model_id: str, layer: int | None, what: str, by: str) -> Pick:
    try:
        entry = client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            raise
        raise ConfigError(f"{what}: MLflow has no entry {model_id}; it may have been deleted") from error
    tags: dict[str, Any] = entry.tags
    if "checkpoint_path" not in tags or "sha256" not in tags:
        raise ConfigError(
            f"{what}: the entry {entry.name} ({model_id}) has no tags `checkpoint_path` and `sha256`: it is no checkpoint of a "
            "training here. Choose one of an experiment's Models page"
        )
    checkpoint = Path(tags["checkpoint_path"])
    words = f"{what} (step {entry.params.get('step', '?')} of iteration {tags.get('iteration', '?')})"
    if not checkpoint.exists():
        raise ConfigError(
            f"{words}: its folder {checkpoint} does not exist. Likely cause: the run was removed, or is on another machine. "
            "Choose another version, or put the folder back"
        )
    check_weights(checkpoint, tags["sha256"])
    own = tags.get("layer")
    if own is None and layer is None:
        raise ConfigError(f"{words}: nothing is known of its layers: give `layer` too, from 1")
    name = f"{Path(tags.get('run', '')).name}/it{tags.get('iteration', '?')}/{checkpoint.name}"
    pick = Pick(str(checkpoint), tags["sha256"], int(own or layer or 0), words, by, tags.get("layer_why", ""), name)
    return pick.with_layer(layer)


def _silent(error: Exception) -> TransientError:
    return TransientError(f"MLflow does not answer, or refuses: {first_line(error)}")
