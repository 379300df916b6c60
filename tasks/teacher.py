"""The choice of an iteration's teacher: the service by measurements, or a person, in MLflow or in a form of Prefect.

Settled once, when the iteration starts, in this order: the `teacher` of the run form; what a person answered (`choose:
ask`); the version that a person gave the alias `teacher` in MLflow; the outcome of the iteration before.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from prefect import get_run_logger, runtime
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput
from prefect.utilities.urls import url_for
from pydantic import Field, ValidationError, create_model

from hubert.core.errors import ConfigError, HubertError, TransientError
from hubert.core.files import read_json, write_record
from hubert.core.hashing import digest
from hubert.core.paths import RunFolder
from hubert.core.text import markdown_table
from hubert.evaluation.checkpoints import ALIAS, ANSWER, Checkpoint, Pick, default_pick, pick_of, read_checkpoints
from hubert.evaluation.columns import CHECKPOINT_IN_BRIEF, LAYER_SCORES, cells, describe, header
from hubert.model.weights import check_weights

Choose = Literal["auto", "ask"]
ASK: Choose = "ask"
WAIT_SECONDS = 30 * 24 * 3600  # for an answer
POLL_SECONDS = 5
OWN_LAYER = "the layer that suits the checkpoint (column layer)"


def settle_teacher(folder: RunFolder, number: int, teacher: str, layer: int | None, choose: Choose) -> Pick | None:
    """Return the checkpoint that somebody chose for an iteration; None: the service's own choice, or no name of MLflow's.

    Raises:
        ConfigError: what was chosen is not there.
        TransientError: `teacher` names an entry of MLflow, and MLflow does not answer.
    """
    if teacher.startswith("models:/"):
        from tasks.tracking.registry import look_up  # MLflow takes seconds to import

        return look_up(teacher, layer)
    if teacher or number == 1:
        return None
    persons = persons_pick(folder, number)
    return ask(folder, number, persons) if choose == ASK else persons


def persons_pick(folder: RunFolder, number: int) -> Pick | None:
    """Return what a person chose in MLflow for an iteration.

    If MLflow does not answer, the iteration goes on: nobody may be there at night, and the folders of another choice
    stay. But an iteration that a person's choice has begun goes on with that one, and the choice's file says so.
    """
    from tasks.tracking.mirror import is_configured

    if not is_configured():
        return None
    from tasks.tracking.registry import persons_pick as look

    try:
        return look(folder, number - 1)
    except TransientError as error:
        before = read_json(folder.choice(number)) or {}
        begun = before.get("by") in (ALIAS, ANSWER)
        doing = f"what this iteration was begun with ({before['why']})" if begun else "what the service chose"
        get_run_logger().warning(
            "%s. If somebody moved the alias `teacher` there, it is not seen: going on with %s. To obey it, cancel this run, "
            "and start it again when MLflow answers",
            error,
            doing,
        )
        unseen = "MLflow did not answer, so a choice made there is not seen"
        if begun:
            source = before["source"]
            what = f"as this iteration was begun ({unseen})"
            place = (source["checkpoint"], source["sha256"], source["layer"])
            return Pick(*place, what, before["by"], before["why"], source["name"])
        pick = default_pick(folder, number - 1)
        return replace(pick, what=f"{pick.what} ({unseen})")


def ask_before(run: str, number: int, choose: Choose) -> None:
    """Pause the surrounding flow until a person has said what iteration `number` clusters, if `choose` is `ask`.

    The answer is found again by that iteration, and by every retry.
    """
    folder = RunFolder.of(run)
    if choose == ASK and number > 1:
        ask(folder, number, persons_pick(folder, number))


# The form ---------------------------------------------------------------------------------------------------------


def ask(folder: RunFolder, number: int, persons: Pick | None) -> Pick:
    """Return a person's answer: the one that is there, else pause the flow and ask for it in a form.

    Args:
        folder: the run's.
        number: the iteration whose teacher is asked for.
        persons: what a person chose in MLflow; if that is another checkpoint than was answered before, it is asked again.
    """
    checkpoints = read_checkpoints(folder, number - 1)
    offered = digest([checkpoint.sha256 for checkpoint in checkpoints])
    answer = read_json(folder.answer(number)) or {}
    if answer.get("offered") == offered:
        pick = Pick(**{**answer["pick"], "checkpoint": folder.own(answer["pick"]["checkpoint"])})
        if persons is None or persons.sha256 == pick.sha256:
            return pick
    default = persons or default_pick(folder, number - 1)
    pick = _ask(number, checkpoints, default, offered)
    write_record(folder.answer(number), {"offered": offered, "pick": vars(pick)})
    _show_in_mlflow(folder, number, pick)
    return pick


def _ask(number: int, checkpoints: list[Checkpoint], default: Pick, offered: str) -> Pick:
    """Pause until an answer can be obeyed."""
    refused = ""
    attempt = 1
    while True:
        form = build_form(number, checkpoints, default, refused)
        # Each question has a key of its own; a flow that starts again gets the answers to those that it has asked.
        key = f"it{number}-{digest([offered, default.sha256])[:8]}-{attempt}"
        if attempt == 1:
            get_run_logger().info(
                "Which checkpoint and layer does iteration %d cluster? Press Resume in the menu at the top right of %s",
                number,
                url_for("flow-run", runtime.flow_run.id),
            )
        try:
            return read_answer(wait_for(form, key), number, checkpoints)
        except (ValidationError, HubertError) as error:
            refused = f"The last answer cannot be obeyed: {error}"
            get_run_logger().warning("%s", refused)
            attempt += 1


def wait_for(form: type[RunInput], key: str) -> RunInput:
    """Stop until the form is filled in. A deployed run gives its process back meanwhile; another one waits."""
    if runtime.deployment.id and not runtime.flow_run.parent_flow_run_id:
        return suspend_flow_run(wait_for_input=form, timeout=WAIT_SECONDS, key=key)
    return pause_flow_run(wait_for_input=form, timeout=WAIT_SECONDS, poll_interval=POLL_SECONDS, key=key)


def build_form(number: int, checkpoints: list[Checkpoint], default: Pick, refused: str = "") -> type[RunInput]:
    """Return the form: two drop-downs with scores; the default is what `auto` would take."""
    chosen = next((one for one in checkpoints if one.sha256 == default.sha256), checkpoints[-1])
    layers = layer_options(checkpoints, chosen)
    own = chosen.layer == default.layer
    fields: dict[str, Any] = {
        "checkpoint": _choice(
            "Checkpoint",
            f"whose layer iteration {number} clusters",
            [checkpoint_label(one) for one in checkpoints],
            checkpoint_label(chosen),
            0,
        ),
        "layer": _choice(
            "Layer",
            f"of that checkpoint; scores are those of {chosen.name}",
            list(layers),
            OWN_LAYER if own else next(label for label, layer in layers.items() if layer == default.layer),
            1,
        ),
    }
    form: type[RunInput] = create_model("Teacher", __base__=RunInput, **fields)
    form._description = "\n\n".join(  # noqa: SLF001  (where Prefect's own `with_initial_data` puts it)
        part
        for part in (
            refused,
            f"**What does iteration {number} cluster?** Proposed: {default.why}.",
            checkpoint_table(checkpoints),
        )
        if part
    )
    return form


def _choice(title: str, description: str, options: list[str], default: str, position: int) -> tuple[Any, Any]:
    """Return a drop-down. An `enum` by hand, since a Literal of one value would show as a text field."""
    extra: dict[str, Any] = {"enum": options, "position": position}
    return (str, Field(default, title=title, description=description, json_schema_extra=extra))


def checkpoint_label(checkpoint: Checkpoint) -> str:
    """Return a checkpoint's line in the drop-down."""
    return f"step {checkpoint.step}: {describe(('validation_loss', 'masked_accuracy'), checkpoint)}"


def layer_options(checkpoints: list[Checkpoint], shown: Checkpoint) -> dict[str, int]:
    """Return the layers by their lines in the drop-down, with the scores of one checkpoint; 0: the one that suits."""
    scores = {one.layer: one for one in shown.layers}
    options = {OWN_LAYER: 0}
    for layer in range(1, max(one.num_layers for one in checkpoints) + 1):
        words = describe(LAYER_SCORES, scores.get(layer))
        options[f"layer {layer}{f': {words}' if words else ''}"] = layer
    return options


def checkpoint_table(checkpoints: list[Checkpoint]) -> str:
    """Return all checkpoints as a markdown table."""
    keys = CHECKPOINT_IN_BRIEF
    return markdown_table(header(keys), [cells(keys, one) for one in checkpoints])


def read_answer(answer: Any, number: int, checkpoints: list[Checkpoint]) -> Pick:
    """Return what was chosen in the form.

    Raises:
        ConfigError: it is not offered any more.
        DataError: the checkpoint has gone.
    """
    labels = {checkpoint_label(one): one for one in checkpoints}
    checkpoint = labels.get(answer.checkpoint)
    wanted = answer.layer.partition(":")[0].removeprefix("layer ")
    layer = int(wanted) if wanted.isdecimal() else None
    if checkpoint is None or (layer is None and answer.layer != OWN_LAYER):
        raise ConfigError(f"{answer.checkpoint!r} with {answer.layer!r} is not offered (any more)")
    if layer is not None and not 1 <= layer <= checkpoint.num_layers:
        raise ConfigError(f"step {checkpoint.step} has layers 1 to {checkpoint.num_layers}, and not layer {layer}")
    check_weights(Path(checkpoint.checkpoint), checkpoint.sha256)
    words = f"a person answered: step {checkpoint.step} of iteration {number - 1}"
    return pick_of(checkpoint, number - 1, ANSWER, words).with_layer(layer)


def _show_in_mlflow(folder: RunFolder, number: int, pick: Pick) -> None:
    """Move the alias `teacher` to what was answered."""
    from tasks.tracking.mirror import is_configured

    if not is_configured():
        return
    from tasks.tracking.registry import move_teacher

    try:
        move_teacher(folder, number - 1, pick)
    except TransientError as error:
        get_run_logger().warning("%s: the alias `teacher` does not show the answer, which is obeyed", error)
