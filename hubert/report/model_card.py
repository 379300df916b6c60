"""The README.md of an exported model: how to use it, and, for a run, how it was made and how good it is.

Figures come from the iteration's `report.json` (`hubert.report.report_data`) or, before there is a report, from `outcome.json`.
No folder of the machine enters it, as the card is meant for the public; the license is for a person to state.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from hubert.core.files import write_text
from hubert.core.text import markdown_table
from hubert.evaluation.choice import Outcome
from hubert.evaluation.columns import LAYER_SCORES, cells, column, header
from hubert.model.formats.export import shortcut
from hubert.report.pages import recipe_as_toml
from hubert.report.report_data import ReportData
from hubert.settings.model import ModelConfig
from hubert.settings.recipe import settled_settings

_LICENSE = (
    "Not stated. Who publishes this model has to say it: add `license:` to the first lines of this file, and look at the "
    "license of the audio."
)


def write_card(
    folder: Path,
    config: ModelConfig,
    format: str,  # noqa: A002  (as in save_pretrained)
    *,
    name: str,
    sha256: str = "",
    outcome: Outcome | None = None,
    report: ReportData | None = None,
    resolved: Mapping[str, Any] | None = None,
) -> Path:
    """Write the card into an exported folder.

    Args:
        folder: of the export.
        config: of the model.
        format: of the export.
        name: of the model, for the title.
        sha256: of the checkpoint's weights that were exported.
        outcome: of the iteration; None: the model comes from no run.
        report: of the iteration, if there is one.
        resolved: what the iteration was asked to do (`hubert.runs.resolved.Resolved`), if that is known.
    """
    header = ["---", *(["library_name: transformers"] if format == "transformers" else [])]
    header += ["pipeline_tag: feature-extraction", "tags:", "- hubert", "- speech", "- self-supervised", "---"]
    parts = [
        "\n".join(header),
        f"# {name}",
        _introduction(config, is_ours=outcome is not None),
        "## Use",
        _usage(config, format, outcome, before_residual=_reads_before_residual(resolved)),
    ]
    if outcome is not None:
        parts += ["## How it was made", _making(outcome, report, resolved or {})]
    if report is not None:
        parts += ["## How good it is", *_scores(report)]
    if resolved is not None:
        parts += ["## Recipe", f"```toml\n{recipe_as_toml(public_part(resolved)).strip()}\n```"]
    if sha256:
        parts += ["## Origin", f"sha256 of the exported checkpoint's weights: `{sha256}`"]
        parts += [_keys(report)] if report is not None else []
    parts += ["## License", _LICENSE]
    path = folder / "README.md"
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _introduction(config: ModelConfig, *, is_ours: bool) -> str:
    norm = "normalised to mean 0 and variance 1 per utterance" if config.normalize_waveform else "as they are"
    return (
        f"A HuBERT (https://arxiv.org/abs/2106.07447) with {config.num_layers} layers of width {config.dim}: 16 kHz speech in, "
        f"samples {norm}; 50 frames per second out.{' Pretrained with hubert-flows.' if is_ours else ''}"
    )


def _reads_before_residual(resolved: Mapping[str, Any] | None) -> bool:
    """Return whether the run scored and clusters layers before their residual sum, which other programs do not give."""
    return resolved is not None and settled_settings(resolved).features.before_residual


def _usage(config: ModelConfig, format: str, outcome: Outcome | None, *, before_residual: bool) -> str:  # noqa: A002
    layer = config.num_layers if outcome is None else outcome.layer
    if before_residual:
        return (
            f"Layer {layer} was scored by its feed-forward output before the residual sum, which only hubert-flows gives:\n\n"
            '```python\nfrom hubert import HuBERT\n\nmodel = HuBERT.from_pretrained("FOLDER OR REPOSITORY")\n'
            f"frames = model.get_intermediate_outputs(waveforms, before_residual=True)[{layer - 1}]  # layer {layer}\n```"
        )
    if format == "transformers":
        return (
            "```python\nfrom transformers import AutoFeatureExtractor, HubertModel\n\n"
            'extractor = AutoFeatureExtractor.from_pretrained("FOLDER OR REPOSITORY")\n'
            'model = HubertModel.from_pretrained("FOLDER OR REPOSITORY").eval()\n'
            'inputs = extractor(samples, sampling_rate=16_000, return_tensors="pt")\n'
            f"frames = model(**inputs, output_hidden_states=True).hidden_states[{layer}]  # layer {layer}\n```\n\n"
            "transformers has no pretraining head; of the trained one this folder keeps the mask embedding only."
        )
    if format == "torchaudio":
        short = shortcut(config)
        return (
            "```python\nimport json, torch, torchaudio\n\n"
            'config = json.load(open("config.json"))\n'
            'build = getattr(torchaudio.models, config["function"].split(".")[-1])\n'
            'model = build(**config["arguments"]).eval()\n'
            'model.load_state_dict(torch.load("model.pt", weights_only=True))\n```\n\n'
            + (f"Its encoder has the dimensions of `torchaudio.models.{short}()`. " if short else "")
            + "Where `normalize_waveform` is true, give it `torch.nn.functional.layer_norm(samples, samples.shape)`."
        )
    return f'```python\nfrom hubert import HuBERT\n\nmodel = HuBERT.from_pretrained("FOLDER OR REPOSITORY")  # layer {layer}\n```'


def _making(outcome: Outcome, report: ReportData | None, resolved: Mapping[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    if name := report.recipe if report is not None else resolved.get("recipe_name"):
        description = report.description if report is not None else resolved.get("recipe", {}).get("description", "")
        rows.append(("recipe", f"{Path(name).name}{f': {description}' if description else ''}"))
    rows.append(("iteration", f"{outcome.iteration}"))
    if report is not None:
        rows.append(("clustered", report.source.name))
        audio = report.data_figures
        if audio.hours is not None and audio.num_files is not None:
            rows.append(("audio", f"{audio.hours:,.2f} hours in {audio.num_files:,} files"))
            rows += [(f"of it {part}", f"{amount.hours or 0:,.2f} hours") for part, amount in audio.parts.items()]
    steps = report and report.training.steps
    rows.append(("training", f"{steps:,} steps" if steps else "not reported"))
    rows.append(("checkpoint", f"step {outcome.step:,}, by the lowest masked cross-entropy on validation"))
    rows.append(("layer to use", f"{outcome.layer}: {outcome.why}"))
    return markdown_table(("what", "value"), rows)


def _scores(report: ReportData) -> list[str]:
    losses = [column(key) for key in ("validation_loss", "unigram_entropy", "masked_accuracy", "majority_accuracy")]
    parts = [markdown_table(("validation", "value"), [(one.title, one.text(report.row)) for one in losses])]
    if report.layers:
        names = [f"**{one.name}**" if one.chosen else one.name for one in report.layers]
        rows = [[name, *cells(LAYER_SCORES, one)] for name, one in zip(names, report.layers, strict=True)]
        parts.append(markdown_table(("layer", *header(LAYER_SCORES)), rows))
        parts.append("MFCC is the baseline; ABX error: less is better, chance is 50 %. The chosen layer is bold.")
    return parts


def _keys(report: ReportData) -> str:
    rows = [(stage.name, f"`{stage.key[:16]}`") for stage in report.stages if stage.key]
    return markdown_table(("stage", "key (hash of its settings and inputs)"), rows)


def public_part(value: Any) -> Any:
    """Cut paths to their last part and addresses to what is no secret; leave out what is None, for which TOML has no word."""
    if isinstance(value, Mapping):
        return {name: public_part(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [public_part(entry) for entry in value]
    if isinstance(value, str) and "://" in value:
        parts = urlsplit(value)
        return urlunsplit((parts.scheme, parts.hostname or "", parts.path, "", ""))
    is_path = isinstance(value, str) and value.startswith(("/", "~", "./", "../"))
    return Path(value).name if is_path else value
