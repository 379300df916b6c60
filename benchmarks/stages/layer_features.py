"""One layer of base for waveforms that are in memory; the other layers above it are not computed where a side can say so.

Options: minutes, layer, dtype (float32, bfloat16), batch_seconds (of our batches on a GPU, on a CPU
those of labelling; the others go file by file, as the
peer does and as their outputs need it: they have no mask that leaves a base model's outputs alone).
"""

from benchmarks import signals
from benchmarks.measure import Outcome, Run, use_threads


def _run(run: Run, compute) -> Outcome:
    """Time `compute(waveforms) -> [(F, D) per waveform]`."""
    import torch

    waveforms = [torch.from_numpy(waveform) for waveform in signals.waveforms(run.options["minutes"])]
    with torch.inference_mode(), torch.autocast(run.device, torch.bfloat16, enabled=run.options["dtype"] == "bfloat16"):
        compute(waveforms[:1])
        with run.clock:
            features = compute(waveforms)
    seconds = sum(map(len, waveforms)) / signals.SAMPLE_RATE
    return Outcome(seconds, [float(value) for frames in features[:2] for value in frames[::20, :16].flatten()])


def ours(run: Run) -> Outcome:
    """In the batches that labelling makes."""
    use_threads(run)
    from hubert.features.batches import CPU_BATCH_SECONDS, batches_by_length, pad
    from hubert.model.encoder import keep_products_in_bfloat16
    from hubert.model.hubert import HuBERT

    model = HuBERT.from_pretrained(run.inputs / "model" / "own").eval().to(run.device)
    if run.options["dtype"] == "bfloat16":
        keep_products_in_bfloat16(model)
    seconds = CPU_BATCH_SECONDS if run.device == "cpu" else run.options["batch_seconds"]

    def compute(waveforms):
        found = [None] * len(waveforms)
        for indices in batches_by_length([len(waveform) for waveform in waveforms], seconds, lambda _: False):
            padded, mask = pad([waveforms[index] for index in indices])
            output = model.get_intermediate_outputs(
                padded.to(run.device), attention_mask=mask, num_layers=run.options["layer"], before_residual=True
            )[-1]
            for index, row in zip(indices, output.float().cpu(), strict=True):
                found[index] = row[: signals.num_frames(len(waveforms[index]))].clone()
        return found

    return _run(run, compute)


def peer(run: Run) -> Outcome:
    """File by file, as its features stage."""
    use_threads(run)
    from minimal_hubert import HuBERT

    model = HuBERT.from_pretrained(run.inputs / "model" / "torchaudio" / "model.pt").eval().to(run.device)
    layer = run.options["layer"]

    def compute(waveforms):
        return [
            model.get_intermediate_outputs(waveform[None].to(run.device), num_layers=layer)[-1][0].float().cpu()
            for waveform in waveforms
        ]

    return _run(run, compute)


def torchaudio(run: Run) -> Outcome:
    """The layer's full output, another convention; the same work."""
    use_threads(run)
    from torchaudio.models import hubert_base

    model = hubert_base().eval().to(run.device)
    layer = run.options["layer"]

    def compute(waveforms):
        return [
            model.extract_features(waveform[None].to(run.device), num_layers=layer)[0][-1][0].float().cpu()
            for waveform in waveforms
        ]

    return _without_check(_run(run, compute))


def transformers(run: Run) -> Outcome:
    """The layer's full output; it has no early exit, so the layers above are taken off."""
    use_threads(run)
    from transformers import HubertModel

    model = HubertModel.from_pretrained(run.inputs / "model" / "transformers").eval().to(run.device)
    del model.encoder.layers[run.options["layer"] :]

    def compute(waveforms):
        return [model(waveform[None].to(run.device)).last_hidden_state[0].float().cpu() for waveform in waveforms]

    return _without_check(_run(run, compute))


def _without_check(outcome: Outcome) -> Outcome:
    outcome.check = []
    return outcome


SIDES = {"ours": ours, "minimal-hubert": peer, "torchaudio": torchaudio, "transformers": transformers}
