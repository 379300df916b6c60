"""What a flow run will do: settled once, written down, shown, and obeyed when the same flow run is retried."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger, runtime, task

from hubert.core.errors import ConfigError
from hubert.core.paths import RunFolder, demo_corpus_folder, find_recipe
from hubert.runs.pipeline import Iteration
from hubert.runs.resolve import check_number, first_unfinished, resolve
from hubert.runs.resolved import Resolved
from hubert.settings.recipe import read_recipe
from tasks.page.page import key_of, open_page, show
from tasks.page.prefect_client import costs_nothing, reach
from tasks.stage import RETRIES
from tasks.teacher import Choose, settle_teacher


def settle(run: str, recipe: str, data: str, *, choose: Choose = "auto", **wishes: Any) -> Resolved:
    """Resolve the wishes of the surrounding flow run, or read what its first attempt resolved.

    With `choose = "ask"` it asks a person which checkpoint and layer are clustered, unless `teacher` says so.

    Raises:
        ConfigError: something asked for does not exist or contradicts itself; nothing was started.
    """
    folder = RunFolder.of(run)
    record = folder.resolved(str(runtime.flow_run.id or "direct"))
    if runtime.flow_run.run_count > 1 and record.exists():
        get_run_logger().info("This run was tried before: its settings are read from %s", record)
        resolved = Resolved.load(record)
        open_overview(resolved)
        return announce(resolved)
    wished = wishes.pop("iteration", None)
    number = first_unfinished(folder) if wished is None else wished
    check_number(number)
    pick = settle_teacher(folder, number, wishes.get("teacher", ""), wishes.get("layer"), choose)
    data = data or corpus_of(recipe, wishes.get("overrides"))
    resolved = resolve(run, recipe, data, iteration=number, pick=pick, **wishes)
    resolved.save(record)
    resolved.remember()
    open_overview(resolved)
    show(
        "markdown",
        key_of(Iteration(resolved).home, "settings"),
        f"**{folder.name}, iteration {resolved.number}**\n\nstarts from: {Iteration(resolved).source.describe()} "
        f"({resolved.chosen})\n\n`{record}`\n\n```toml\n{record.read_text()}\n```",
        f"what this run does: {folder.name}, iteration {resolved.number}, from {Iteration(resolved).source.describe()}",
    )
    return announce(resolved)


def announce(resolved: Resolved) -> Resolved:
    """Give the surrounding flow run the name and the tags by which people find it, such as `librispeech it2 layer 9`."""
    name_flow_run(resolved)
    return resolved


@costs_nothing("its name and its tags")
def name_flow_run(resolved: Resolved) -> None:
    """Set name and tags of the surrounding flow run."""
    name, number, source = RunFolder.of(resolved.run).name, resolved.number, Iteration(resolved).source
    title = f"{name} it{number} {'MFCC' if source.is_mfcc else f'layer {source.layer}'}"
    tags = {*runtime.flow_run.tags, name, f"it{number}"}
    if runtime.flow_run.id:
        with reach() as client:
            client.update_flow_run(UUID(runtime.flow_run.id), name=title, tags=sorted(tags))


@costs_nothing("the overview")
def open_overview(resolved: Resolved) -> None:
    """Begin the page of an iteration."""
    name, source = Path(resolved.run).name, Iteration(resolved).source.describe()
    open_page(Iteration(resolved).home, f"{name}, iteration {resolved.number}: clusters {source}")


def corpus_of(recipe: str, overrides: Mapping[str, Any] | None) -> str:
    """Make the corpus of a recipe that brings its own, and return its folder.

    Raises:
        ConfigError: the recipe needs data from outside.
    """
    settings = read_recipe(find_recipe(recipe), overrides)
    if settings.corpus != "demo":
        raise ConfigError(f"recipe {recipe!r} needs `data`: a folder of audio, an archive or a manifest")
    return demo_corpus(str(demo_corpus_folder()))


@task(task_run_name="demo corpus", **RETRIES)
def demo_corpus(folder: str) -> str:
    """Make the demo's speech, or find it finished."""
    from hubert.data.demo.corpus import build_demo_corpus  # an optional dependency, only the demo has it

    return str(build_demo_corpus(Path(folder)))


def iterations(recipe: str, overrides: Mapping[str, Any] | None) -> range:
    """Return the numbers of a recipe's iterations.

    Raises:
        ConfigError: they cannot follow each other.
    """
    settings = read_recipe(find_recipe(recipe), overrides)
    settings.check_chain()
    return range(1, settings.num_iterations + 1)


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
