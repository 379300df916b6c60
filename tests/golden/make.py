"""Write the names and shapes of every weight of other programs' HuBERTs: `python tests/golden/make.py PROGRAM`.

    torchaudio, transformers    from the packages of the main environment
    fairseq                     from s3prl's copy of fairseq's module; needs `pip install s3prl`
    minimal_hubert              needs `pip install minimal-hubert`

The models are built without memory, on the meta device. A head has 500 classes; fairseq's has the four special entries of
its dictionary too. A line is a name and a shape; {0-11} stands for twelve lines that differ in that number only.
"""

import re
import sys
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

SIZES = ("base", "large", "xlarge")
NOTES = {
    "fairseq": "s3prl's converted checkpoints hold fairseq's own state dict (s3prl/upstream/hubert/convert.py saves\n"
    "# state['model'] as it is, under 'model_weight') and load it strictly into this module: so the names of both.",
}


def torchaudio_model(size: str) -> nn.Module:
    import torchaudio

    torchaudio.models.wav2vec2.model._init_hubert_pretrain_model = lambda _module: None  # draws numbers
    options = {"num_classes": 500} if size == "base" else {}  # the others have 500 anyway
    return getattr(torchaudio.models, f"hubert_pretrain_{size}")(**options)


def transformers_model(size: str) -> nn.Module:
    """HubertForCTC, so that the prefix and the output layer are seen; HubertModel has neither."""
    from transformers import HubertConfig, HubertForCTC

    large = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    dimensions = {
        "base": {},
        "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        "xlarge": {"hidden_size": 1280, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 5120},
    }[size]
    return HubertForCTC(HubertConfig(**dimensions, **(large if size != "base" else {})))


def fairseq_model(size: str) -> nn.Module:
    """The sizes of fairseq/examples/hubert/config/pretrain/hubert_{base_librispeech,large_librivox,xlarge_librivox}."""
    from s3prl.upstream.hubert.hubert_model import HubertConfig, HubertModel, HubertPretrainingConfig

    large = {"extractor_mode": "layer_norm", "layer_norm_first": True, "encoder_attention_heads": 16}
    dimensions = {
        "base": {"final_dim": 256},
        "large": {"encoder_layers": 24, "encoder_embed_dim": 1024, "encoder_ffn_embed_dim": 4096, "final_dim": 768},
        "xlarge": {"encoder_layers": 48, "encoder_embed_dim": 1280, "encoder_ffn_embed_dim": 5120, "final_dim": 1024},
    }[size]
    config = HubertConfig(label_rate=50, untie_final_proj=True, **dimensions, **(large if size != "base" else {}))
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *map(str, range(500))]
    return HubertModel(config, HubertPretrainingConfig(), [symbols])


def minimal_hubert_model(size: str) -> nn.Module:
    from minimal_hubert.model import HuBERTPretrain

    return HuBERTPretrain(500, size)


PACKAGES = {"fairseq": "s3prl", "minimal_hubert": "minimal-hubert"}
BUILDERS = {
    "torchaudio": torchaudio_model,
    "transformers": transformers_model,
    "fairseq": fairseq_model,
    "minimal_hubert": minimal_hubert_model,
}


def collapse(lines: list[str]) -> list[str]:
    """Write lines that differ in the number of a transformer layer or convolution only as one."""
    pattern = re.compile(r"(.*(?:\.layers|conv_layers)\.)(\d+)(\..*)")
    matches = [match for line in lines if (match := pattern.fullmatch(line))]
    rest = [line for line in lines if not pattern.fullmatch(line)]
    groups: dict[tuple[str, str], list[int]] = {}
    for match in matches:
        groups.setdefault((match[1], match[3]), []).append(int(match[2]))
    for (before, after), numbers in groups.items():
        runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
        for _, run in runs:
            first, *others = [number for _, number in run]
            rest.append(f"{before}{f'{{{first}-{others[-1]}}}' if others else first}{after}")
    return rest


def main() -> None:
    program = sys.argv[1]
    package = PACKAGES.get(program, program)
    parts = [f"# made by: python tests/golden/make.py {program}\n# with {package} {version(package)}"]
    parts += [f"# {NOTES[program]}"] if program in NOTES else []
    for size in SIZES:
        with torch.device("meta"):
            model = BUILDERS[program](size)
        lines = [f"{name} {'x'.join(map(str, value.shape)) or '-'}" for name, value in model.state_dict().items()]
        parts.append("\n".join([f"[{size}]", *collapse(lines)]))
    (Path(__file__).parent / f"{program}.txt").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
