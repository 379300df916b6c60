"""What a flow run will do: settled once, written down, shown, and obeyed when the same flow run is retried."""

from dataclasses import replace
from pathlib import Path
from uuid import UUID

from prefect import get_run_logger, runtime, task

from hubert.core.paths import RunFolder
from hubert.runs.options import RunOptions, read_request
from hubert.runs.pipeline import Iteration
from hubert.runs.resolve import first_unfinished, resolve
from hubert.runs.resolved import Resolved
from tasks.page.page import key_of, open_page, show
from tasks.page.prefect_client import costs_nothing, reach
from tasks.stage import RETRIES
from tasks.teacher import Choose, settle_teacher


def settle(options: RunOptions, choose: Choose = "auto") -> Resolved:
    """Resolve what the surrounding flow run was asked to do, or read what its first attempt resolved.

    Without a number it does the first iteration that is not finished. With `choose = "ask"` it asks a person which
    checkpoint and layer are clustered, unless the options name a teacher.

    Raises:
        ConfigError: something asked for does not exist or contradicts itself; nothing was started.
    """
    folder = RunFolder.of(options.run)
    record = folder.resolved(str(runtime.flow_run.id or "direct"))
    if runtime.flow_run.run_count > 1 and record.exists():
        get_run_logger().info("This run was tried before: its settings are read from %s", record)
        resolved = Resolved.load(record)
        open_overview(resolved)
        return announce(resolved)
    if options.iteration is None:
        options = replace(options, iteration=first_unfinished(folder))
    resolved = resolve(
        options,
        choose_teacher=lambda folder, number: settle_teacher(folder, number, options.teacher, options.layer, choose),
        make_corpus=lambda folder: Path(demo_corpus(str(folder))),
    )
    resolved.save(record)
    resolved.remember()
    open_overview(resolved)
    show(
        "markdown",
        key_of(Iteration(resolved).home, "settings"),
        f"**{folder.name}, iteration {resolved.number}**\n\nstarts from: {resolved.source.describe()} "
        f"({resolved.chosen})\n\n`{record}`\n\n```toml\n{record.read_text()}\n```",
        f"what this run does: {folder.name}, iteration {resolved.number}, from {resolved.source.describe()}",
    )
    return announce(resolved)


def announce(resolved: Resolved) -> Resolved:
    """Give the surrounding flow run the name and the tags by which people find it, such as `librispeech it2 layer 9`."""
    name_flow_run(resolved)
    return resolved


@costs_nothing("its name and its tags")
def name_flow_run(resolved: Resolved) -> None:
    """Set name and tags of the surrounding flow run."""
    name, number, source = RunFolder.of(resolved.run).name, resolved.number, resolved.source
    title = f"{name} it{number} {'MFCC' if source.is_mfcc else f'layer {source.layer}'}"
    tags = {*runtime.flow_run.tags, name, f"it{number}"}
    if runtime.flow_run.id:
        with reach() as client:
            client.update_flow_run(UUID(runtime.flow_run.id), name=title, tags=sorted(tags))


@costs_nothing("the overview")
def open_overview(resolved: Resolved) -> None:
    """Begin the page of an iteration."""
    name, source = Path(resolved.run).name, resolved.source.describe()
    open_page(Iteration(resolved).home, f"{name}, iteration {resolved.number}: clusters {source}")


@task(task_run_name="demo corpus", **RETRIES)
def demo_corpus(folder: str) -> str:
    """Make the demo's speech, or find it finished."""
    from hubert.data.demo.corpus import build_demo_corpus  # an optional dependency, only the demo has it

    return str(build_demo_corpus(Path(folder)))


def iterations(options: RunOptions) -> range:
    """Return the numbers of the iterations of a run's recipe.

    Raises:
        ConfigError: they cannot follow each other, or recipe or data are missing or wrong.
    """
    _, recipe, _ = read_request(options)
    recipe.check_chain()
    return range(1, recipe.num_iterations + 1)


def name_of_iteration() -> str:
    """Name a flow run by what it was asked to do, such as `librispeech it2`; `announce` knows the rest."""
    parameters = runtime.flow_run.parameters
    number, layer = parameters.get("iteration"), parameters.get("layer")
    words = [Path(parameters.get("run", "")).name, f"it{number}" if number else "next iteration"]
    return " ".join([*words, f"layer {layer}"] if layer else words)


def name_of_run() -> str:
    """Name a pretraining by its run and recipe."""
    parameters = runtime.flow_run.parameters
    return f"{Path(parameters.get('run', '')).name}, all iterations of {Path(parameters.get('recipe', '')).stem}"
