"""The names and shapes of other programs' weights, as `tests/golden/make.py` wrote them, and random weights of them."""

import re

import torch
from torch import Tensor

from hubert.core.paths import PROJECT

FOLDER = PROJECT / "tests" / "golden"
PROGRAMS = ("fairseq", "torchaudio", "transformers", "minimal_hubert")


def golden_shapes(program: str, size: str) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each weight of one size."""
    text = (FOLDER / f"{program}.txt").read_text()
    section = re.search(rf"^\[{size}\]\n(.*?)(?=^\[|\Z)", text, re.DOTALL | re.MULTILINE)
    shapes = {}
    for line in section[1].splitlines():
        name, _, shape = line.partition(" ")
        size_of = () if shape == "-" else tuple(map(int, shape.split("x")))
        if numbers := re.search(r"\{(\d+)-(\d+)\}", name):
            for number in range(int(numbers[1]), int(numbers[2]) + 1):
                shapes[name.replace(numbers[0], str(number))] = size_of
        else:
            shapes[name] = size_of
    return shapes


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Return weights that differ from one another."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


_SMALL = {  # what the numbers of a size become: widths, a group of the positional convolution, its kernel
    "base": {768: 32, 3072: 48, 512: 24, 256: 12, 48: 8, 128: 16, 2304: 96, 500: 23, 504: 27},
    "large": {1024: 32, 4096: 48, 512: 24, 768: 12, 64: 8, 128: 16, 3072: 96, 500: 23, 504: 27},
}


def small_shapes(program: str, size: str, layers: int = 3) -> dict[str, tuple[int, ...]]:
    """Return a small model of the same names: narrow, with the first layers only."""
    kept = {}
    for name, shape in golden_shapes(program, size).items():
        number = re.search(r"\.layers\.(\d+)\.", name)
        if number is None or int(number[1]) < layers:
            kept[name] = tuple(_SMALL[size].get(width, width) for width in shape)
    return kept
