"""The README tells the truth: its commands exist, its files exist, its Python runs."""

import re
import shlex
import shutil

import pytest
import torch

from hubert.core.paths import PROJECT
from hubert.units.codebook import Codebook
from tests.support.servers import Server, serving, upload_hub, write_cache
from tests.support.toy import CHAIN, hubert, write_material

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def shell_commands(text: str) -> list[str]:
    """Return the commands of all shell blocks and of inline code, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`((?:hubert|make|prefect) [^`]*)`", text)
    return [line for line in lines + inline if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_hubert_command_is_understood_by_the_command_line(page):
    from hubert.cli.main import build_parser
    from tasks.cli import add_service_commands

    parser, commands = build_parser()
    add_service_commands(commands)
    known = set(commands.choices)
    for command in shell_commands(page.read_text()):
        words = shlex.split(command)
        if words[0] != "hubert" or len(words) < 2 or words[1].isupper():
            continue
        names = words[1].strip(",").split("|")
        assert set(names) <= known, command
        placeholders = any(
            word.isupper() or word in ("--help", "...") or "[" in word or "|" in word or "," in word
            for word in words[1:]
        )
        if not placeholders and (len(words) > 2 or words[1] in ("demo", "up", "down", "status")):
            parser.parse_args(words[1:])


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        command.split()[1]
        for page in PAGES
        for command in shell_commands(page.read_text())
        if command.startswith("make ")
    }
    assert {"demo", "test"} <= named <= targets


def test_every_file_that_the_readme_names_exists():
    text = (PROJECT / "README.md").read_text()
    for name in re.findall(r"`((?:hubert|tasks|flows|deployments|tests|docs|benchmarks)/[\w/.-]*\.\w+)`", text):
        assert (PROJECT / name).exists(), name
    for link in re.findall(r"\]\(([^):]+)\)", text):
        assert (PROJECT / link).exists(), link


def test_the_readmes_tree_names_every_module_once():
    """A reader finds a module by its package's line, and no line names what is gone."""
    (tree,) = re.findall(r"```\n(flows/ .*?)```", (PROJECT / "README.md").read_text(), flags=re.DOTALL)
    named: list[str] = []
    package: list[str] = []
    for line in tree.splitlines():
        depth, text = (len(line) - len(line.lstrip())) // 2, line.split()
        if depth >= 9:  # the modules of the package above
            named += ["/".join([*package, name]) for name in text]
        elif text[0].endswith("/"):
            package = [*package[:depth], text[0].rstrip("/")]
        else:
            named.append("/".join([*package[:depth], text[0]]))
    found = [
        path.relative_to(PROJECT).with_suffix("")
        for top in ("hubert", "tasks")
        for path in (PROJECT / top).rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    ]
    assert sorted(named) == sorted(str(path) for path in found)


# "Use a HuBERT": every example, with small models in the place of large ones and servers of our own in that of others --


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with `runs/mine`, whose first iteration is finished; returns it with the toy's data and recipe."""
    root = tmp_path_factory.mktemp("readme")
    data, recipe = write_material(root)
    for stage in CHAIN:
        options = ["--recipe", recipe, "--data", data] if stage == CHAIN[0] else []
        assert hubert(stage, root / "runs" / "mine", *options)[0] == 0
    return root, data, recipe


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A released model of 6 layers: in a Hub cache, as fairseq's file on a web server, and as torchaudio's file here."""
    from hubert.model.hubert import HuBERT
    from hubert.settings.model import SIZES

    model = HuBERT(SIZES["tiny"].model_copy(update={"num_layers": 6, "dim": 64, "ffn_dim": 64, "num_heads": 1}))
    model.save_pretrained(tmp_path / "hf", format="transformers")
    model.save_pretrained(tmp_path / "ta", format="torchaudio")
    shutil.copy(tmp_path / "ta" / "model.pt", tmp_path / "hubert_fairseq_base_ls960.pth")
    snapshot = write_cache(tmp_path / "cache" / "hub", "facebook/hubert-base-ls960", {"config.json": ""})
    for file in (tmp_path / "hf").iterdir():
        shutil.copy(file, snapshot / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with serving(Server()) as server:
        server.files["/hubert/hubert_base_ls960.pt"] = (tmp_path / "ta" / "model.pt").read_bytes()
        yield model, server.address


def section(name: str) -> str:
    (found,) = re.findall(
        rf"^## {name}\n(.*?)^## ", (PROJECT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    return found


@pytest.mark.slow
def test_the_readmes_python_loads_each_kind_of_name(mine, released):
    model, address = released
    (block,) = re.findall(r"```python\n(.*?)```", section("Use a HuBERT"), flags=re.DOTALL)
    (checkpoint,) = (mine[0] / "runs" / "mine").glob("it1/train-*/step-00000012")
    code = re.sub(r'"runs/[^"]*"', repr(str(checkpoint)), block).replace("https://dl.fbaipublicfiles.com", address)
    code += "    found.append(layers)\n"
    found: list[list[torch.Tensor]] = []
    waveforms = torch.randn(1, 16_000)
    exec(code, {"waveforms": waveforms, "found": found})  # noqa: S102  (the README's own example)
    assert [len(layers) for layers in found] == [2, 6, 6, 6]
    expected = model.eval().get_intermediate_outputs(waveforms, before_residual=False)
    for layers in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(layers, expected, strict=True))


@pytest.mark.slow
def test_the_readmes_commands_for_other_programs_run_one_after_the_other(mine, tmp_path, monkeypatch):
    root, _, _ = mine
    monkeypatch.setenv("HUBERT_RUNS", str(root / "runs"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.chdir(tmp_path)
    commands = [
        shlex.split(line) for line in shell_commands(section("Use a HuBERT")) if " mine" in line or "km.bin" in line
    ]
    assert [command[1] for command in commands] == ["export", "push", "codebook", "codebook", "export-units"]
    with upload_hub(monkeypatch) as (handler, _):
        for command in commands:
            code, _, errors = hubert(*command[1:])
            assert code == 0, (command, errors)
    assert "model.safetensors" in handler.files
    assert {"km.bin", "codebook.safetensors", "labels", "mine-hf"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_readmes_start_from_a_released_model_needs_no_first_iteration(mine, released, tmp_path, monkeypatch):
    _, data, recipe = mine
    monkeypatch.setenv("HUBERT_RUNS", str(tmp_path / "runs"))
    lines = [line for line in shell_commands(section("Use a HuBERT")) if "--teacher" in line]
    (command,) = (
        line.replace("/path/to/audio", str(data)).replace("--recipe base", f"--recipe {recipe}") for line in lines
    )
    assert hubert(*shlex.split(command)[1:])[0] == 0
    for stage in ("features", "kmeans", "units"):
        code, _, errors = hubert(stage, "skipped")
        assert code == 0, errors
    (codebook,) = (tmp_path / "runs" / "skipped" / "it2").glob("kmeans-*/codebook.safetensors")
    source = Codebook.load(codebook).metadata["source"]
    assert (source["kind"], source["layer"], source["before_residual"]) == ("layer", 6, False)
