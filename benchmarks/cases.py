"""What is measured: each case is a stage with options, the sides that do it, and how often.

`quick` is what `make bench` runs on 2 CPU cores; `full` has longer inputs and more repeats; `smoke` shows that everything
works and says nothing about speed.
"""

from dataclasses import dataclass, field
from typing import Any

OURS, PEER = "ours", "minimal-hubert"
OVER_WORKERS, BY_TORCH = "ours over workers", "ours by torch"  # other ways to fit a codebook
SIZES = ("smoke", "quick", "full")
LAYER = 6
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    title: str
    stage: str
    options: dict[str, Any]
    unit: str = "audio s / s"  # or "s": the time itself
    sides: tuple[str, ...] = (OURS, PEER)
    repeats: int = 2
    once: tuple[str, ...] = ("torchaudio", "transformers")  # sides that are measured in the first turn only
    tolerance: float | None = None  # how far the sides' checks may differ; None: nothing to compare
    agreement: bool = False  # the checks are units: the share of equal ones is shown
    environment: dict[str, str] = field(default_factory=dict)
    comment: str = ""


# Both sides of training get what our launcher gives its trainers: the system's allocator returns every large tensor
# otherwise, and page faults take a third of the time.
TRAINING = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}


def build_cases(size: str, device: str) -> list[Case]:
    """Return the cases of a size on a device. On a GPU only those that need nothing but torch and a few wheels."""
    smoke, full = size == "smoke", size == "full"

    def of(small: Any, quick: Any, long: Any) -> Any:
        return small if smoke else long if full else quick

    repeats = of(1, 2, 3)
    cases = _model_cases(device, of, repeats)
    if device == "cuda":
        return cases
    minutes = of(0.5, 20, 60)
    batch = of(20, 87.5, 87.5)
    cpu: list[Case] = [
        Case("mfcc", "MFCC, 39 dimensions", "mfcc", {"minutes": of(0.3, 4, 10)}, repeats=repeats + 1, tolerance=1e-2),
        Case(
            "kmeans-mfcc",
            "k-means, 100 units of MFCC",
            "kmeans",
            {"frames": "mfcc", "num_units": of(20, 100, 100)},
            unit="s",
            sides=(OURS, PEER, OVER_WORKERS, BY_TORCH),
            once=(OVER_WORKERS, BY_TORCH),
            repeats=repeats,
        ),
        *(
            [
                Case(
                    "kmeans-layer",
                    "k-means, 500 units of 768 dimensions",
                    "kmeans",
                    {"frames": "layer", "num_units": of(20, 500, 500)},
                    unit="s",
                    repeats=1,
                )
            ]
            if smoke or full
            else []
        ),
        Case(
            "units-mfcc",
            "units of MFCC, from files to labels",
            "units",
            {"source": "mfcc", "dtype": "float32", "layer": LAYER, "kind": "flac", "minutes": minutes},
            repeats=repeats,
            agreement=True,
        ),
        *(
            Case(
                f"units-{dtype}",
                f"units of layer {LAYER}, from files to labels, {dtype}",
                "units",
                {"source": "layer", "dtype": dtype, "layer": LAYER, "kind": "flac", "minutes": of(0.3, 2, 6)},
                repeats=repeats if dtype == "float32" else of(1, 1, 3),
                agreement=True,
                comment="" if dtype == "float32" else "the peer has float32 only",
            )
            for dtype in ("float32", "bfloat16")
        ),
        *(
            Case(
                f"loader-{kind}",
                f"loader alone, {'flac in a tar' if kind == 'tar' else kind}",
                "loader",
                {
                    "kind": kind,
                    "minutes": minutes,
                    "deliver_minutes": of(0.5, 40, 120),
                    "batch_seconds": batch,
                    "workers": 2,
                },
                repeats=repeats,
            )
            for kind in ("flac", "wav", "tar")
        ),
        Case(
            "validation",
            "validation of a checkpoint",
            "validation",
            {"minutes": of(0.3, 2, 6), "batch_seconds": of(20, 40, 40), "workers": 1},
            repeats=of(1, 1, 3),
            environment=TRAINING,
        ),
    ]
    return [*cpu, *cases]


def _model_cases(device: str, of: Any, repeats: int) -> list[Case]:
    """Return the cases that need a model and no corpus (but the step with a loader)."""
    cuda = device == "cuda"
    dtypes = ("bfloat16",) if cuda else ("float32", "bfloat16")
    step = {"crops": 3, "crop_seconds": of(2.0, 40 / 3, 40 / 3), "rounds": of(1, 1, 3), "loader": False}
    if cuda:  # 2.8 million samples
        step |= {"crops": of(2, 11, 11), "crop_seconds": of(2.0, 15.9, 15.9), "rounds": of(1, 10, 20)}
    compiled = ("minimal-hubert, compiled",) if cuda else ()
    cases = [
        Case(
            f"layer-{dtype}",
            f"features of layer {LAYER}, {dtype}",
            "layer_features",
            {
                "minutes": of(0.3, 20 if cuda else 1, 60 if cuda else 6),
                "layer": LAYER,
                "dtype": dtype,
                "batch_seconds": 120.0,
            },
            sides=(OURS, PEER, "torchaudio", "transformers") if dtype == dtypes[0] else (OURS, PEER),
            repeats=repeats,
            tolerance=1e-3 if dtype == "float32" and not cuda else None,  # products on a GPU may be in TF32
        )
        for dtype in ("float32", "bfloat16")  # labelling is in float32 unless a recipe says otherwise, on a GPU too
    ]
    cases += [
        Case(
            f"step-{dtype}",
            f"training step of base, 500 units, {dtype}",
            "training_step",
            {**step, "dtype": dtype},
            sides=(OURS, PEER, *compiled, "torchaudio") if dtype == dtypes[0] else (OURS, PEER),
            repeats=repeats if cuda or dtype == "float32" else of(1, 1, 2),
            tolerance=1e-3 if dtype == "float32" else None,
            environment=TRAINING,
        )
        for dtype in dtypes
    ]
    if not cuda:
        loader = {"minutes": of(0.5, 20, 60), "batch_seconds": of(20, 40, 40), "workers": 1, "loader": True}
        cases.append(
            Case(
                "step-loader-float32",
                "training step with its loader, float32",
                "training_step",
                {**step, **loader, "rounds": of(1, 2, 3), "dtype": "float32"},
                repeats=of(1, 1, 2),
                environment=TRAINING,
            )
        )
    cases += [
        Case(
            "checkpoint",
            "wait for a checkpoint of base",
            "checkpoint",
            {"rounds": of(1, 2, 3)},
            unit="s",
            repeats=of(1, 1, 2),
            comment="ours is on disk and hashed when training goes on; the peer's is neither",
        ),
        Case("cold-start", "start to the end of the first step", "cold_start", {}, unit="s", repeats=repeats),
    ]
    return cases


def inputs_of(cases: list[Case]) -> dict[str, Any]:
    """Return what has to be prepared for some cases: `benchmarks.inputs.prepare`'s spec."""
    subsets: set[float] = set()
    kinds: set[str] = set()
    frames: dict[str, int] = {}
    for case in cases:
        needs_audio = case.stage in {"units", "loader", "validation"} or case.options.get("loader")
        if needs_audio:
            subsets.add(case.options["minutes"])
            kinds.add(case.options.get("kind", "flac"))
        if case.stage == "kmeans":
            small = case.options["num_units"] < 100
            frames[case.options["frames"]] = (
                3000 if small else {"mfcc": 200_000, "layer": 100_000}[case.options["frames"]]
            )
    model = {"layer_features", "training_step", "validation", "units"} & {case.stage for case in cases}
    return {
        "subsets": sorted(subsets),
        "kinds": sorted(kinds, key=lambda kind: kind == "tar"),
        "model": bool(model),
        "codebooks": any(case.stage == "units" for case in cases),
        "layer": LAYER,
        "frames": frames,
    }
