"""Time forward and backward of any size, beside torchaudio's HuBERT of the same dimensions, and profile its operators.

    python -m benchmarks.studies.model_step --size tiny --crops 8 --seconds 4 --classes 100 [--bf16] [--profile]

Prints the fastest of several steps, since other processes only ever make one slower. `make bench` compares whole training
steps of base, with the peer.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.torchaudio_model import build
from hubert.core.frames import SAMPLE_RATE, num_frames
from hubert.model.formats.export import torchaudio_dimensions
from hubert.model.hubert import HuBERTPretrain
from hubert.settings.model import SIZES, ModelConfig
from hubert.training.masks import span_mask


def build_torchaudio(config: ModelConfig, num_classes: int) -> torch.nn.Module:
    """Build torchaudio's pretraining model with our dimensions."""
    dimensions = {
        **torchaudio_dimensions(config),
        "final_dim": config.final_dim,
        "feature_grad_mult": config.feature_grad_mult if config.feature_grad_mult < 1 else None,
    }
    return build(num_classes, dimensions, layerdrop=config.layerdrop)


def fastest(step: Callable[[], Tensor], model: torch.nn.Module, *, repeats: int, bf16: bool) -> tuple[float, float]:
    """Return the shortest wall time of a step and the CPU time of the cheapest, in milliseconds."""
    wall, cpu = [], []
    for _ in range(repeats + 2):
        model.zero_grad(set_to_none=True)
        start, start_cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = step()
        loss.backward()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return 1e3 * min(wall[2:]), 1e3 * min(cpu[2:])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--crops", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each crop")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--no-reference", action="store_true", help="skip torchaudio")
    parser.add_argument("--profile", action="store_true", help="print the operators of our step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    config = SIZES[arguments.size]
    waveforms = 0.1 * torch.randn(arguments.crops, round(arguments.seconds * SAMPLE_RATE))
    frames = num_frames(waveforms.shape[1])
    labels = torch.randint(arguments.classes, (arguments.crops, frames))
    mask = span_mask(arguments.crops, frames, seed=0)
    ours = HuBERTPretrain(arguments.classes, config)

    def our_step() -> Tensor:
        losses, outputs = ours(waveforms, labels, mask=mask)
        return losses.mean() + 10 * outputs["feature_penalty"]

    def reference_step() -> Tensor:
        logits, _, penalty = reference(waveforms, labels)
        target = logits.new_zeros(len(logits), dtype=torch.long)
        return torch.nn.functional.cross_entropy(logits.float(), target) + 10 * penalty

    if not arguments.no_reference:
        reference = build_torchaudio(config, arguments.classes)
        print(
            "torchaudio  {:7.1f} ms wall {:7.1f} ms CPU".format(
                *fastest(reference_step, reference, repeats=arguments.repeats, bf16=arguments.bf16)
            )
        )
    print(
        "hubert      {:7.1f} ms wall {:7.1f} ms CPU".format(
            *fastest(our_step, ours, repeats=arguments.repeats, bf16=arguments.bf16)
        )
    )
    if arguments.profile:
        with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            our_step().backward()
        print(
            profile.key_averages(group_by_input_shape=True).table(
                sort_by="self_cpu_time_total", row_limit=40, max_shapes_column_width=60
            )
        )


if __name__ == "__main__":
    main()
