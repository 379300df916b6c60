"""Every scientific setting of a run, by section, with its default, meaning and checks.

The defaults are the HuBERT paper's (https://arxiv.org/abs/2106.07447, section IV, and fairseq's
`examples/hubert/config/pretrain/hubert_base_librispeech.yaml`); `hubert.settings.recipe` reads what a run changes of
them. A field marked `affects=False` changes how a stage is computed (shard sizes, intervals of logs) but not what it
computes, so it never enters the stage's key.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


def setting(default: Any, description: str, *, affects: bool = True, **constraints: Any) -> Any:
    """Declare a field: its default, its meaning with the unit, and whether it affects the stage's outputs."""
    return Field(default, description=description, json_schema_extra={"affects": affects}, **constraints)


class Section(BaseModel):
    """A group of settings: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def key_settings(self) -> dict[str, Any]:
        """Return the settings that enter a stage's key: those that affect its outputs and differ from the default.

        Leaving the defaults out means that a field added later, with the old behaviour as its default, does not
        discard finished work.
        """
        changed = self.model_dump(mode="json", exclude_defaults=True)
        return {
            name: changed[name] for name, field in type(self).model_fields.items() if name in changed and affects(field)
        }


def affects(field: Any) -> bool:
    """Return True if a field of a `Section` affects the outputs of its stage."""
    return bool((field.json_schema_extra or {}).get("affects", True))


class DataSettings(Section):
    """What is in the data folder. Paths are relative to the `data` that a run is given, which may be the audio itself."""

    audio: tuple[str, ...] = setting((".",), "folders, archives or manifests of the training audio", affects=False)
    validation: tuple[str, ...] = setting((), "the same for validation; empty: split off `audio`", affects=False)
    validation_fraction: float = setting(0.01, "share of the speakers (or files) held out", gt=0, lt=1)
    min_validation_files: int = setting(20, "at least this many files are held out", ge=1)
    resample: bool = setting(False, "accept other sample rates and several channels, converted on reading")
    verify: Literal["decode", "header"] = setting("decode", "decode each file once, or trust its header")
    max_rejected: float = setting(0.01, "share of unusable files above which the run stops", affects=False, ge=0, le=1)
    max_segment_seconds: float | None = setting(None, "cut longer files into equal segments of at most this", gt=1)
    speaker: str = setting(
        "auto",
        "how a speaker follows from the path: auto (the first level of folders with 10 or more names), first, parent, "
        "none, or a regular expression with one group",
    )
    shard_hours: float = setting(1.0, "audio per shard of the check, in hours", affects=False, gt=0)


class FeatureSettings(Section):
    """What is clustered: 39-d MFCC without a teacher, else one layer of the teacher."""

    before_residual: bool = setting(
        False,
        "cluster a layer's feed-forward output before the residual sum (minimal_hubert) instead of its full output (fairseq)",
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", "arithmetic of the teacher's forward pass")
    # Enters the key by the source that is clustered: `FeatureSource.identity`.
    normalize_waveform: bool | None = setting(
        None,
        "whether a teacher that is given was trained on normalised waveforms [task.normalize]; none: as its files say",
    )
    batch_seconds: float = setting(
        120.0, "audio per forward pass of the teacher, in seconds; on a CPU at most 30", affects=False, gt=0
    )
    shard_hours: float = setting(1.0, "audio per shard, in hours", affects=False, gt=0)
    max_chunk_seconds: float = setting(
        100.0, "longer files go through the teacher in overlapping chunks of this, in seconds (max_chunk)", ge=1
    )
    chunk_context_seconds: float = setting(
        2.0, "audio on both sides of a chunk whose frames are computed and thrown away, in seconds", ge=0
    )

    @model_validator(mode="after")
    def _chunks_hold_their_context(self) -> Self:
        if self.max_chunk_seconds < 4 * self.chunk_context_seconds:
            raise ValueError(
                f"max_chunk_seconds ({self.max_chunk_seconds}) must be at least four times chunk_context_seconds "
                f"({self.chunk_context_seconds}), or most of the work is thrown away"
            )
        return self


class KMeansSettings(Section):
    """The codebook (paper, section IV-B)."""

    num_units: int = setting(100, "number of clusters (paper: 100 on MFCC, 500 on layers)", ge=2, le=65_536)
    sample_fraction: float = setting(
        0.1, "share of the utterances whose frames are clustered (paper: 10 %)", gt=0, le=1
    )
    sample_hours: float = setting(100.0, "at most this much audio is clustered, in hours", gt=0)
    min_sample_files: int = setting(20, "at least this many utterances are clustered", ge=1)
    seed: int = setting(0, "seed of the sample and of the first centroids", ge=0)
    seeding_frames: int = setting(20_000, "frames on which k-means++ chooses the first centroids", ge=2)
    max_iterations: int = setting(100, "most Lloyd iterations", ge=1)
    # What a looser one saves and costs: benchmarks/results/cpu-speed.md. Moves are summed over units and dimensions: the
    # more of both, the stricter it is.
    tolerance: float = setting(
        1e-4, "stop when the centroids' squared moves add up to less than this share of the frames' variance", ge=0
    )
    codebook: str | None = setting(
        None,
        "label with this codebook (`hubert codebook import`) instead of fitting one; a path, absolute or relative to `data`",
        affects=False,  # its content enters the key
    )
    backend: Literal["dask", "torch"] = setting("dask", "Lloyd by dask-ml over the workers, or by torch in one process")
    local_megabytes: float = setting(
        256.0,
        "dask-ml keeps frames of up to this size (float32, in MB) in one process and spreads more over the workers; 0: always",
        affects=False,
        ge=0,
    )

    @model_validator(mode="after")
    def _enough_seeding_frames(self) -> Self:
        if self.seeding_frames < self.num_units:
            raise ValueError(f"seeding_frames ({self.seeding_frames}) must be at least num_units ({self.num_units})")
        return self


class UnitSettings(Section):
    """Labelling: the teacher's layer and the nearest centroid, in one pass."""

    shard_hours: float = setting(1.0, "audio per shard, in hours", affects=False, gt=0)
    max_majority_share: float = setting(
        0.9,
        "share of the training frames with the most frequent unit above which the run stops before it trains",
        affects=False,
        gt=0,
        le=1,
    )


class TrainSettings(Section):
    """Masked prediction (paper, sections III and IV-C).

    The key of fairseq's configuration stands in brackets where there is one; the defaults are those of its base recipe,
    and a comment says why where they are not (docs/training.md lists all differences).
    """

    size: Literal["base", "large", "xlarge", "tiny"] = setting(
        "base", "the model's published dimensions [model.encoder_layers, model.encoder_embed_dim, ...]"
    )
    model: dict[str, Any] = setting({}, "overrides of single fields of the size's ModelConfig [model.*]")
    # Enters the key by the weights' hash, not by its spelling: `TrainStage.inputs`.
    init: str = setting(
        "fresh",
        "whose encoder the training starts from: fresh, or a checkpoint's folder, file, Hugging Face id or URL "
        "[checkpoint.finetune_from_model]",
        affects=False,
    )
    # fairseq's is 1337; its draws are others anyway.
    seed: int = setting(0, "seed of initialisation, order, crops, masks and dropout [common.seed]", ge=0)
    steps: int = setting(
        400_000, "optimizer steps; raising it continues a training [optimization.max_update]", affects=False, ge=1
    )
    learning_rate: float = setting(5e-4, "peak learning rate [optimization.lr]", gt=0)
    warmup_steps: int = setting(32_000, "steps of linear warm-up, then linear to 0 [lr_scheduler.warmup_updates]", ge=0)
    betas: tuple[float, float] = setting((0.9, 0.98), "AdamW's betas [optimizer.adam_betas]")
    eps: float = setting(1e-6, "AdamW's epsilon [optimizer.adam_eps]", gt=0)
    weight_decay: float = setting(0.01, "AdamW's weight decay [optimizer.weight_decay]", ge=0)
    clip_norm: float = setting(10.0, "largest norm of the gradient [optimization.clip_norm]", gt=0)
    feature_penalty: float = setting(10.0, "weight of the mean squared conv features [criterion.loss_weights]", ge=0)
    unmasked_weight: float = setting(0.0, "weight of the unmasked frames' loss [criterion.pred_nomask_weight]", ge=0)
    batch_seconds: float = setting(
        2800.0,
        "audio per optimizer step, whatever the number of GPUs, in seconds "
        "[dataset.max_tokens x distributed_training.distributed_world_size x optimization.update_freq]",
        gt=0,
    )
    micro_batch_seconds: float = setting(
        87.5, "audio per forward pass of one process, in seconds [dataset.max_tokens]", gt=0
    )
    min_seconds: float = setting(2.0, "shorter utterances are left out, and counted [task.min_sample_size]", ge=0.5)
    max_seconds: float = setting(15.625, "longer utterances are cropped at random [task.max_sample_size]", gt=0)
    # fairseq cuts a batch to its shortest utterance: shapes that nobody knows beforehand.
    num_crop_lengths: int = setting(
        16, "number of crop lengths; each utterance is cut to the longest that it fills [no key in fairseq]", ge=1
    )
    # fairseq's rule hides fewer frames the larger a batch is: `hubert.training.masks`.
    mask_rule: Literal["static", "fairseq"] = setting(
        "static", "spans cut to a fixed number of frames, or fairseq's draw [no key in fairseq]"
    )
    mask_prob: float = setting(
        0.8, "share of frames that spans would cover without overlap [model.mask_prob]", gt=0, le=1
    )
    mask_length: int = setting(10, "frames per span [model.mask_length]", ge=1)
    min_masks: int = setting(
        2, "at least this many spans per crop [no key in fairseq: min_masks = 2 in hubert.py]", ge=1
    )
    # Not float16: bfloat16 has float32's range, so no loss scaler and no steps that it spoils.
    precision: Literal["bf16", "fp32"] = setting(
        "bf16", "arithmetic of forward and backward; weights stay float32 [common.fp16]"
    )
    max_nonfinite_steps: int = setting(
        20, "stop after this many steps in a row whose loss was not finite [common.min_loss_scale]", ge=1
    )
    silence_minutes: float = setting(
        5.0,
        "a trainer that gives no sign of life for so long hangs: it is ended and started again [no key in fairseq]",
        affects=False,
        gt=0,
    )
    activation_checkpointing: bool = setting(
        False,
        "compute each layer again in the backward pass instead of keeping what it computed: less memory, more time "
        "[model.checkpoint_activations]",
        affects=False,
    )
    log_interval: int = setting(
        200, "steps between two lines of metrics.jsonl [common.log_interval]", affects=False, ge=1
    )
    checkpoint_interval: int = setting(
        25_000, "steps between two checkpoints [checkpoint.save_interval_updates]", affects=False, ge=1
    )
    num_workers: int = setting(
        4,
        "threads per training process that read ahead; 0: read between the steps [dataset.num_workers]",
        affects=False,
        ge=0,
    )
    num_processes: int = setting(
        1,
        "training processes on this machine (torchrun) [distributed_training.nprocs_per_node]",
        affects=False,
        ge=1,
    )
    num_threads: int = setting(
        0,
        "threads per training process; 0: the machine's cores, shared out; on Slurm, its CPUs [no key in fairseq]",
        affects=False,
        ge=0,
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.checkpoint_interval % self.log_interval:
            raise ValueError(
                f"checkpoint_interval ({self.checkpoint_interval}) must be a multiple of log_interval ({self.log_interval}), "
                "so that a resumed run continues its log without a gap"
            )
        if self.max_seconds < self.min_seconds:
            raise ValueError(f"max_seconds ({self.max_seconds}) must not be below min_seconds ({self.min_seconds})")
        if self.micro_batch_seconds < self.max_seconds:
            raise ValueError(
                f"micro_batch_seconds ({self.micro_batch_seconds}) must hold one crop of max_seconds ({self.max_seconds})"
            )
        if self.batch_seconds < self.micro_batch_seconds:
            raise ValueError(
                f"batch_seconds ({self.batch_seconds}) must be at least micro_batch_seconds ({self.micro_batch_seconds})"
            )
        return self


class ValidateSettings(Section):
    """Every checkpoint is scored on the same crops and masks."""

    seed: int = setting(0, "seed of the crops and masks", ge=0)
    max_hours: float = setting(10.0, "at most this much validation audio, in hours", gt=0)


class ABXSettings(Section):
    """ABX error rates of the layers, within and across speaker (ZeroSpeech's task, through fastabx)."""

    item: str | None = setting(None, "item file, relative to `data`; none or empty: no ABX", affects=False)
    audio: tuple[str, ...] = setting(("abx",), "folders of the items' audio, relative to `data`", affects=False)
    checkpoints: Literal["best", "all"] = setting("best", "which checkpoints are scored")
    selection: Literal["all", "half"] = setting(
        "all", "choose the layer on all items, or on half of them and report the other half"
    )
    max_size_group: int = setting(10, "most tokens per cell", ge=2)
    max_x_across: int = setting(5, "most other speakers per cell", ge=2)
    seed: int = setting(0, "seed of the draws", ge=0)


class QualitySettings(Section):
    """Purity and PNMI of the units, where phone alignments exist."""

    alignments: str | None = setting(
        None, "item, CSV/TSV or TextGrid alignments, relative to `data`; empty: no comparison", affects=False
    )
    audio: tuple[str, ...] = setting(
        (), "audio that they cover, relative to `data`; empty: training and validation", affects=False
    )
    max_hours: float = setting(10.0, "at most this much aligned audio is compared, in hours", gt=0)


class TrackingSettings(Section):
    """What MLflow gets beside figures. Nothing here enters a stage's key."""

    upload: bool = setting(
        False, "copy each checkpoint's weights to MLflow's artifacts; false: refer to its folder", affects=False
    )


SECTIONS: dict[str, type[Section]] = {
    "data": DataSettings,
    "features": FeatureSettings,
    "kmeans": KMeansSettings,
    "units": UnitSettings,
    "train": TrainSettings,
    "validate": ValidateSettings,
    "abx": ABXSettings,
    "quality": QualitySettings,
    "tracking": TrackingSettings,
}


def explain(error: ValidationError) -> str:
    """Return one line per problem: which field has which value, and what the rule is."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "settings"
        value = "" if isinstance(problem["input"], (dict, BaseModel)) else f" = {problem['input']!r}"
        lines.append(f"{where}{value}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)
