"""Codebooks to and from scikit-learn, units to fairseq and JSONL, and what refuses to run."""

import json
import pickle  # noqa: TID251  (writes what is read here)
import re
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.cluster import KMeans, MiniBatchKMeans

from hubert.core.errors import ConfigError, DataError
from hubert.core.paths import RunFolder
from hubert.features.source import FeatureSource
from hubert.model.hubert import HuBERT
from hubert.runs.resolved import Resolved
from hubert.units.codebook import Codebook
from hubert.units.exchange import export_codebook, import_codebook
from hubert.units.export import deduplicate
from hubert.units.labels import Table
from tests.support.hostile import Call, payloads, unsafe_load
from tests.support.toy import hubert, write_material

LAYER = FeatureSource("facebook/hubert-base-ls960", "ab" * 32, 6)
SCALES = {
    "random": np.ones(39),
    # means and spreads of 13 MFCCs, then their differences: a tenth of that, and so again
    "MFCC-like": np.concatenate([np.linspace(90, 12, 13), np.linspace(9, 1.2, 13), np.linspace(0.9, 0.12, 13)]),
}
COMPRESSIONS = [0, 3, ("gzip", 3), ("bz2", 3), ("xz", 3), ("lzma", 3)]


def frames_of(kind, dtype, num_frames=4000, seed=0):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(30, 39)) * 2
    frames = centres[generator.integers(0, 30, num_frames)] + generator.normal(size=(num_frames, 39))
    return (frames * SCALES[kind]).astype(dtype)


def fit(frames, kind=MiniBatchKMeans, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(24, n_init=1, max_iter=5, random_state=0, **options).fit(frames)


@pytest.fixture(scope="module")
def estimator():
    return fit(frames_of("random", np.float32))


# Codebooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KMeans, MiniBatchKMeans])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", SCALES)
def test_joblib_to_ours_to_joblib_gives_the_same_units(tmp_path, scale, dtype, kind):
    theirs = fit(frames_of(scale, dtype), kind)
    joblib.dump(theirs, tmp_path / "theirs.bin")
    codebook = import_codebook(tmp_path / "theirs.bin", FeatureSource())
    codebook.save(tmp_path / "ours.safetensors")
    export_codebook(Codebook.load(tmp_path / "ours.safetensors"), tmp_path / "again.bin", "joblib")
    again = joblib.load(tmp_path / "again.bin")

    frames = frames_of(scale, dtype, 20_000, seed=1)
    assert np.array_equal(again.predict(frames), theirs.predict(frames))
    assert again.cluster_centers_.dtype == dtype
    if dtype == "float32":
        assert np.array_equal(again.cluster_centers_, theirs.cluster_centers_)

    # Our own assignment, wherever float32 can tell the two nearest centroids apart.
    distances = ((frames[:, None, :].astype(float) - theirs.cluster_centers_[None]) ** 2).sum(2)
    nearest = np.partition(distances, 1, axis=1)
    clear = nearest[:, 1] - nearest[:, 0] > 1e-5 * (frames.astype(float) ** 2).sum(1)
    assert clear.mean() > 0.99
    ours = codebook.assign(torch.from_numpy(frames)).numpy()
    assert np.array_equal(ours[clear], theirs.predict(frames)[clear])


@pytest.mark.parametrize("compress", COMPRESSIONS, ids=str)
def test_compressed_files_of_joblib_are_read(tmp_path, estimator, compress):
    joblib.dump(estimator, tmp_path / "km.bin", compress=compress)
    codebook = import_codebook(tmp_path / "km.bin", FeatureSource())
    assert np.array_equal(codebook.centroids.numpy(), estimator.cluster_centers_)
    assert codebook.metadata["imported"]["class"] == "sklearn.cluster._kmeans.MiniBatchKMeans"
    content = (tmp_path / "km.bin").read_bytes()
    (tmp_path / "broken.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="broken download"):
        import_codebook(tmp_path / "broken.bin", FeatureSource())


def test_an_estimator_that_learned_in_parts_keeps_a_random_generator_which_is_no_obstacle(tmp_path, estimator):
    state = np.random.RandomState(3)
    partial = MiniBatchKMeans(24, n_init=1, random_state=state).partial_fit(frames_of("random", np.float32))
    joblib.dump(partial, tmp_path / "km.bin")
    codebook = import_codebook(tmp_path / "km.bin", FeatureSource())
    assert np.array_equal(codebook.centroids.numpy(), partial.cluster_centers_)


@pytest.mark.parametrize("write", ["npy", "fortran npy", "safetensors", "pickle", "bare joblib", "big-endian"])
def test_other_files_of_centroids_are_read(tmp_path, estimator, write):
    centroids = estimator.cluster_centers_
    match write:
        case "npy" | "fortran npy":
            path = tmp_path / "km.npy"
            np.save(path, centroids if write == "npy" else np.asfortranarray(centroids))
        case "safetensors":
            path = tmp_path / "km.safetensors"
            save_file({"centers": torch.from_numpy(centroids), "counts": torch.zeros(24)}, path)
        case "pickle":
            path = tmp_path / "km.pkl"
            path.write_bytes(pickle.dumps(estimator))
        case _:
            path = tmp_path / "km.bin"
            joblib.dump(centroids.astype(">f4") if write == "big-endian" else np.asfortranarray(centroids), path)
    assert np.array_equal(import_codebook(path, FeatureSource()).centroids.numpy(), centroids)


def write_torch(path, content, form):
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("shape", ["tensor", "parameter", "dict", "nested", "several", "array"])
def test_centroids_that_torch_saved_are_read(tmp_path, estimator, shape, form):
    """A tensor, an array, or a dict around them; the suffix says nothing."""
    centroids = torch.from_numpy(estimator.cluster_centers_)
    content = {
        "tensor": centroids,
        "parameter": torch.nn.Parameter(centroids),
        "dict": {"whatever": centroids, "counts": torch.ones(24), "step": 3},
        "nested": {"state_dict": {"quantizer": {"centroids": centroids, "other": centroids * 2}}},
        "several": {"cluster_centers_": centroids.numpy(), "components": centroids * 2},
        "array": centroids.numpy(),
    }[shape]
    for name in ("km.pt", "km.bin", "km"):
        write_torch(tmp_path / name, content, form)
        codebook = import_codebook(tmp_path / name, FeatureSource())
        assert np.array_equal(codebook.centroids.numpy(), estimator.cluster_centers_)
        assert not codebook.centroids.requires_grad
    assert codebook.metadata["imported"] == codebook.metadata["imported"] | {"file": "km", "dtype": "float32"}


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_every_float_is_read_and_its_precision_is_written_down(tmp_path, estimator, dtype, form):
    wanted = torch.from_numpy(estimator.cluster_centers_).to(getattr(torch, dtype))
    path = tmp_path / "km.safetensors"
    if form == "safetensors":
        save_file({"centroids": wanted}, path)
    else:
        write_torch(path, wanted, form)
    codebook = import_codebook(path, FeatureSource())
    assert codebook.centroids.dtype == torch.float32
    assert codebook.centroids.equal(wanted.float())
    assert codebook.metadata["imported"]["dtype"] == dtype
    export_codebook(codebook, tmp_path / "again.bin", "joblib")
    again = joblib.load(tmp_path / "again.bin").cluster_centers_
    assert np.array_equal(again, wanted.to(torch.float64 if dtype == "float64" else torch.float32).float().numpy())


def test_numpys_archive_of_arrays_is_read_if_it_is_clear_which_is_meant(tmp_path, estimator):
    centroids = estimator.cluster_centers_
    np.savez(tmp_path / "one.npz", table=centroids, inertia=np.float32(3.0), counts=np.arange(24))
    np.savez_compressed(tmp_path / "named.npz", centroids=centroids, mean=centroids * 2)
    np.savez(tmp_path / "unclear.npz", a=centroids, b=centroids)
    for name in ("one", "named"):
        assert np.array_equal(import_codebook(tmp_path / f"{name}.npz", FeatureSource()).centroids.numpy(), centroids)
    with pytest.raises(DataError, match=r"one table of centroids \(K, D\) of floats, found a \(24, 39\) float32, b "):
        import_codebook(tmp_path / "unclear.npz", FeatureSource())
    np.save(tmp_path / "km.bin", centroids)
    (tmp_path / "km.bin.npy").rename(tmp_path / "km.bin")
    assert np.array_equal(import_codebook(tmp_path / "km.bin", FeatureSource()).centroids.numpy(), centroids)


@pytest.mark.parametrize("form", ["npy", "npz", "safetensors", "torch", "joblib", "estimator"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_centroids_that_are_not_finite_in_float32_are_refused_in_every_form(tmp_path, estimator, form, value):
    centroids = estimator.cluster_centers_.astype(np.float64)
    centroids[3, 5] = value
    path = tmp_path / f"km.{form}"
    match form:
        case "npy":
            np.save(path, centroids)
        case "npz":
            np.savez(path, centroids)
        case "safetensors":
            save_file({"centroids": torch.from_numpy(centroids)}, path)
        case "torch":
            torch.save(torch.from_numpy(centroids), path)
        case "joblib":
            joblib.dump(centroids, path)
        case _:
            broken = fit(frames_of("random", np.float64))
            broken.cluster_centers_ = centroids
            joblib.dump(broken, path)
    with pytest.raises(DataError, match=r"1 of 24 centroids, \[3\] are not finite as float32"):
        import_codebook(path, FeatureSource())


def test_a_codebook_of_ours_that_was_edited_is_refused(tmp_path, estimator):
    np.save(tmp_path / "km.npy", estimator.cluster_centers_)
    codebook = import_codebook(tmp_path / "km.npy", FeatureSource())
    cases = {
        "nan": (torch.full((24, 39), torch.nan), "24 of 24 centroids"),
        "flat": (torch.zeros(24), r"centroids \(K, D\) of floats, found \(24,\)"),
        "integers": (torch.zeros(24, 39, dtype=torch.int32), "found .*int32"),
    }
    for name, (centroids, message) in cases.items():
        Codebook(centroids, codebook.metadata).save(tmp_path / name)
        with pytest.raises(DataError, match=message):
            Codebook.load(tmp_path / name)
    Codebook(codebook.centroids.bfloat16(), codebook.metadata).save(tmp_path / "half")
    assert Codebook.load(tmp_path / "half").centroids.equal(codebook.centroids.bfloat16().float())


def test_an_estimator_that_is_no_kmeans_gives_no_centroids(tmp_path):
    from sklearn.decomposition import PCA

    joblib.dump(PCA(5).fit(frames_of("random", np.float32)), tmp_path / "pca.bin")
    with pytest.raises(DataError, match="cluster_centers_ .*found a sklearn.*PCA"):
        import_codebook(tmp_path / "pca.bin", FeatureSource())


def test_a_codebook_says_whether_its_teacher_got_normalised_waveforms(tmp_path):
    np.save(tmp_path / "km.npy", np.random.default_rng(0).normal(size=(5, 768)))
    options = ["--kind", "layer", "--frame-rate", 50, "--checkpoint", LAYER.checkpoint, "--sha256", LAYER.sha256]
    options += ["--layer", 6, "--convention", "output", "--output", tmp_path / "ours.safetensors"]
    code, _, errors = hubert("codebook", "import", tmp_path / "km.npy", *options, "--normalize-waveform", "true")
    assert code == 0, errors
    codebook = Codebook.load(tmp_path / "ours.safetensors")
    codebook.check_source(FeatureSource(LAYER.checkpoint, LAYER.sha256, 6, normalize_waveform=True))
    with pytest.raises(DataError, match="normalize_waveform=True, the features are"):
        codebook.check_source(LAYER)


def test_an_imported_codebook_names_its_source_and_refuses_another(tmp_path, estimator):
    np.save(tmp_path / "km.npy", np.random.default_rng(0).normal(size=(5, 768)))
    codebook = import_codebook(tmp_path / "km.npy", LAYER)
    assert codebook.frame_rate == 50
    assert codebook.metadata["imported"]["file"] == "km.npy"
    codebook.check_source(LAYER)
    for other in (FeatureSource(), FeatureSource(LAYER.checkpoint, LAYER.sha256, 6, before_residual=True)):
        with pytest.raises(DataError, match="units of another source are noise"):
            codebook.check_source(other)


def test_what_cannot_be_centroids_is_refused_with_the_reason(tmp_path, estimator):
    cases = {
        "one row": (np.ones((1, 39)), "K >= 2"),
        "integers": (np.ones((5, 39), int), "of floats"),
        "three axes": (np.ones((5, 39, 1)), r"\(5, 39, 1\)"),
        "dimension": (np.ones((5, 13)), "13 dimensions, MFCC has 39"),
        "nan": (np.full((5, 39), np.nan), r"\[0, 1, 2, 3, 4\] are not finite"),
        "objects": (np.array([[object()]]), "numpy.save wrote"),
    }
    for name, (array, message) in cases.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(DataError, match=message):
            import_codebook(tmp_path / f"{name}.npy", FeatureSource())
    joblib.dump(MiniBatchKMeans(5), tmp_path / "unfitted.bin")
    with pytest.raises(DataError, match="cluster_centers_ .*fitted.* found a sklearn.*MiniBatchKMeans"):
        import_codebook(tmp_path / "unfitted.bin", FeatureSource())
    with pytest.raises(DataError, match="found no file"):
        import_codebook(tmp_path / "missing.bin", FeatureSource())
    with pytest.raises(ConfigError, match="expected one of joblib, safetensors"):
        export_codebook(Codebook(torch.ones(2, 39), {}), tmp_path / "x", "csv")


# What they would run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", COMPRESSIONS, ids=str)
@pytest.mark.parametrize("payload", list(payloads(Path("x"))))
def test_a_codebook_that_calls_a_function_is_refused_and_nothing_runs(tmp_path, estimator, payload, compress):
    marker = tmp_path / "the program ran"
    call = payloads(marker)[payload]
    unsafe_load(pickle.dumps(call))
    assert marker.exists()  # so the payload is one
    marker.unlink()
    hostile = fit(frames_of("random", np.float32, 200))
    hostile.verbose = call
    for content in (hostile, {"cluster_centers_": estimator.cluster_centers_, "x": call}, call):
        joblib.dump(content, tmp_path / "km.bin", compress=compress)
        with pytest.raises(DataError, match="othing of it was run"):
            import_codebook(tmp_path / "km.bin", FeatureSource())
    assert not marker.exists()


def test_an_array_of_objects_in_a_codebook_is_refused_before_its_own_pickle_is_read(tmp_path):
    marker = tmp_path / "the program ran"
    array = np.array([Call(open, str(marker), "w"), None], dtype=object)
    joblib.dump({"cluster_centers_": array}, tmp_path / "km.bin")
    joblib.load(tmp_path / "km.bin")
    assert marker.exists()
    marker.unlink()
    with pytest.raises(DataError, match="expected a data type of numbers"):
        import_codebook(tmp_path / "km.bin", FeatureSource())
    assert not marker.exists()


# Units ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repeating_each_unit_for_its_duration_gives_the_original_back(units):
    array = np.array(units, dtype=np.uint16)
    kept, durations = deduplicate(array)
    assert np.repeat(kept, durations).tolist() == units
    assert (np.diff(kept.astype(int)) != 0).all()
    assert (durations > 0).all()


def test_deduplication_is_torchs_unique_consecutive():
    units = torch.randint(0, 3, (500,), generator=torch.Generator().manual_seed(0))
    kept, durations = deduplicate(units.numpy().astype(np.uint16))
    expected, counts = torch.unique_consecutive(units, return_counts=True)
    assert (kept.tolist(), durations.tolist()) == (expected.tolist(), counts.tolist())


# The commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A run up to its units; its name, its data and its recipe."""
    root = tmp_path_factory.mktemp("labelled")
    data, recipe = write_material(root)
    run = str(root / "run")
    for stage in ("manifest", "features", "kmeans", "units"):
        code, _, errors = hubert(stage, run, *(["--recipe", recipe, "--data", data] if stage == "manifest" else []))
        assert code == 0, errors
    return run, data, recipe


def tables(run):
    (folder,) = Path(run).glob("it1/units-*/tables")
    return {part: Table(folder / part) for part in ("train", "validation")}


def test_units_leave_as_json_lines_in_the_manifests_order(labelled, tmp_path):
    run, *_ = labelled
    code, said, errors = hubert("export-units", run, "--output", tmp_path)
    assert code == 0, errors
    assert "written" in said
    for part, table in tables(run).items():
        lines = [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
        expected = [{"fileid": table.fileid(row), "units": table.units(row).tolist()} for row in range(len(table))]
        assert lines == expected


def test_deduplicated_units_leave_with_durations(labelled, tmp_path):
    run, *_ = labelled
    assert hubert("export-units", run, "--output", tmp_path, "--deduplicate", "--part", "train")[0] == 0
    table = tables(run)["train"]
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for row, line in enumerate(lines):
        assert np.repeat(line["units"], line["durations"]).tolist() == table.units(row).tolist()
    assert not (tmp_path / "validation.jsonl").exists()
    assert hubert("export-units", run, "--output", tmp_path, "--deduplicate", "--format", "km")[0] == 0
    durations = [list(map(int, line.split())) for line in (tmp_path / "train.durations").read_text().splitlines()]
    units = [list(map(int, line.split())) for line in (tmp_path / "train.km").read_text().splitlines()]
    assert durations == [line["durations"] for line in lines]
    assert units == [line["units"] for line in lines]


def test_units_leave_as_fairseqs_labels_line_by_line_with_its_manifest(labelled, tmp_path):
    run, *_ = labelled
    code, _, errors = hubert("export-units", run, "--format", "km", "--output", tmp_path)
    assert code == 0, errors
    for part, table in tables(run).items():
        root, *files = (tmp_path / f"{part}.tsv").read_text().splitlines()
        labels = (tmp_path / f"{part}.km").read_text().splitlines()
        assert len(files) == len(labels) == len(table)
        for row, (file, line) in enumerate(zip(files, labels, strict=True)):
            name, num_samples = file.split("\t")
            ref = table.audio_ref(row)
            assert (f"{root}/{name}", int(num_samples)) == (ref.path, ref.num_samples)
            units = list(map(int, line.split()))
            assert units == table.units(row).tolist()
            assert len(units) == (int(num_samples) - 400) // 160 + 1
    assert (tmp_path / "dict.km.txt").read_text().splitlines() == [f"{unit} 1" for unit in range(20)]


def test_units_that_are_not_there_yet_name_the_command_to_run(labelled, tmp_path):
    _, data, recipe = labelled
    run = tmp_path / "new"
    assert hubert("manifest", run, "--recipe", recipe, "--data", data)[0] == 0
    code, _, errors = hubert("export-units", run, "--output", tmp_path)
    assert code == 3
    assert f"First run: hubert features {run} --iteration 1" in errors
    code, _, errors = hubert("codebook", "export", run, "--output", tmp_path / "km.bin")
    assert code == 3


def test_a_codebook_goes_out_to_scikit_learn_and_another_run_labels_with_it_the_same(labelled, tmp_path):
    run, data, recipe = labelled
    km, ours = tmp_path / "km.bin", tmp_path / "codebook.safetensors"
    assert hubert("codebook", "export", run, "--output", km)[0] == 0
    facts = ["--kind", "mfcc", "--frame-rate", "100"]
    code, said, errors = hubert("codebook", "import", km, "--output", ours, *facts)
    assert code == 0, errors
    assert "20 units of 39 dimensions at 100 Hz" in said

    other = tmp_path / "other"
    for stage in ("manifest", "features", "kmeans", "units"):
        options = (
            ["--recipe", recipe, "--data", data, "--set", f'kmeans.codebook="{ours}"'] if stage == "manifest" else []
        )
        code, _, errors = hubert(stage, other, *options)
        assert code == 0, errors
    for part, table in tables(other).items():
        expected = tables(run)[part]
        assert [table.units(row).tolist() for row in range(len(table))] == [
            expected.units(row).tolist() for row in range(len(expected))
        ]
    # The key is the content's: the same centroids from another place are the same codebook.
    (folder,) = other.glob("it1/kmeans-*")
    moved = tmp_path / "moved.safetensors"
    ours.rename(moved)
    code, said, errors = hubert("kmeans", other, "--set", f'kmeans.codebook="{moved}"')
    assert code == 0, errors
    assert "was finished before" in said
    assert list(other.glob("it1/kmeans-*")) == [folder]

    # And a stage that is finished holds the content: the file may go.
    moved.unlink()
    assert "was finished before" in hubert("units", other)[1]
    assert hubert("export-units", other, "--output", tmp_path / "labels")[0] == 0
    code, _, errors = hubert("kmeans", other, "--set", "kmeans.seed=1")
    assert code == 0, errors


def test_a_codebook_beside_a_manifest_is_found(labelled, tmp_path):
    run, _, recipe = labelled
    manifest = tmp_path / "all.parquet"
    assert hubert("manifest", run, "--output", manifest)[0] == 0
    np.save(tmp_path / "km.npy", np.random.default_rng(0).normal(size=(20, 39)))
    import_codebook(tmp_path / "km.npy", FeatureSource()).save(tmp_path / "ours.safetensors")
    settings = [
        "kmeans.codebook=ours.safetensors",
        'data.audio=["."]',
        "data.validation=[]",
        "data.min_validation_files=2",
    ]
    code, _, errors = hubert("manifest", tmp_path / "run", "--recipe", recipe, "--data", manifest, "--set", *settings)
    assert code == 0, errors
    assert Resolved.load(RunFolder.of(str(tmp_path / "run")).settings(1)).codebook.path == str(
        tmp_path / "ours.safetensors"
    )


def test_a_codebook_of_another_dimension_is_refused_whatever_form_the_checkpoint_has(tmp_path):
    HuBERT("tiny").save_pretrained(tmp_path / "ta", format="torchaudio")
    np.save(tmp_path / "km.npy", np.zeros((5, 50)))
    facts = ["--kind", "layer", "--frame-rate", "50", "--layer", "2", "--convention", "output"]
    where = tmp_path / "ta" / "model.pt"
    code, _, errors = hubert(
        "codebook", "import", tmp_path / "km.npy", "--output", tmp_path / "c.safetensors", *facts, "--checkpoint", where
    )
    assert code == 3
    assert "50 dimensions" in errors
    assert "has 192" in errors
    assert not (tmp_path / "c.safetensors").exists()


def test_a_codebook_that_does_not_fit_the_recipe_stops_before_anything_runs(labelled, tmp_path):
    _, data, recipe = labelled
    np.save(tmp_path / "km.npy", np.random.default_rng(0).normal(size=(7, 39)))
    import_codebook(tmp_path / "km.npy", FeatureSource()).save(tmp_path / "seven.safetensors")
    np.save(tmp_path / "km.npy", np.random.default_rng(0).normal(size=(20, 32)))
    import_codebook(tmp_path / "km.npy", LAYER).save(tmp_path / "layer.safetensors")
    np.save(tmp_path / "none.safetensors.npy", np.zeros(3))
    for name, message in (
        ("seven.safetensors", "set kmeans.num_units = 7"),
        ("layer.safetensors", "units of another source are noise"),
        ("none.safetensors.npy", "hubert codebook import"),
        ("missing.safetensors", "does not exist"),
    ):
        run = tmp_path / f"run {name}"
        options = ["--recipe", recipe, "--data", data, "--set", f'kmeans.codebook="{tmp_path / name}"']
        code, _, errors = hubert("manifest", run, *options)
        assert code in (2, 3)
        assert message in errors
        assert not run.exists()


def test_a_codebook_that_gives_every_frame_one_unit_stops_the_run_before_it_trains(labelled, tmp_path):
    """One centroid at the frames, all others a million away: a codebook of features of another scale."""
    _, data, recipe = labelled
    far = 1e6 + np.random.default_rng(0).normal(size=(19, 39))
    np.save(tmp_path / "km.npy", np.concatenate([np.zeros((1, 39)), far]).astype(np.float32))
    codebook, run = tmp_path / "codebook.safetensors", tmp_path / "run"
    facts = ["--kind", "mfcc", "--frame-rate", "100"]
    assert hubert("codebook", "import", tmp_path / "km.npy", "--output", codebook, *facts)[0] == 0
    options = ["--recipe", recipe, "--data", data, "--set", f'kmeans.codebook="{codebook}"']
    for stage in ("manifest", "features", "kmeans"):
        code, _, errors = hubert(stage, run, *(options if stage == "manifest" else []))
        assert code == 0, errors
    code, _, errors = hubert("units", run)
    assert code == 3
    for part in ("100.00% of the", "have the unit 0", "perplexity 1.00 of 20", "another scale", "max_majority_share"):
        assert part in errors
    assert hubert("train", run)[0] == 3
    code, said, errors = hubert("units", run, "--set", "units.max_majority_share=1")
    assert code == 0, errors
    assert re.search(r"share of the most frequent unit \(%\) +100\.0 +100\.0\n", said)


def test_import_demands_the_facts_and_refuses_contradictions(tmp_path, estimator):
    joblib.dump(estimator, tmp_path / "km.bin")
    out = ["--output", tmp_path / "x.safetensors"]
    layer = ["--kind", "layer", "--frame-rate", "50", "--layer", "6", "--convention", "output"]
    for options, message in (
        (["--kind", "layer", "--frame-rate", "50", *out], "needs --checkpoint, --layer, --convention"),
        (["--kind", "mfcc", "--frame-rate", "50", *out], "100 frames per second"),
        (["--kind", "mfcc", "--frame-rate", "100", "--layer", "6", *out], "has no --layer"),
        ([*layer, "--checkpoint", "x", "--sha256", "12", *out], "64 hex digits"),
        ([*layer, "--checkpoint", str(tmp_path), *out], "folder with model.safetensors"),
        ([*layer, "--checkpoint", str(tmp_path / "no"), *out], "expected a path that exists"),
        (["--kind", "mfcc", "--frame-rate", "100", "--output", tmp_path / "x.bin"], "ends in .safetensors"),
    ):
        code, _, errors = hubert("codebook", "import", tmp_path / "km.bin", *options)
        assert code == 2
        assert message in errors
    assert not (tmp_path / "x.safetensors").exists()


def test_a_codebook_of_a_layer_is_tied_to_the_weights_that_it_names(tmp_path):
    from hubert.core.hashing import file_digest
    from hubert.model.hubert import HuBERT

    model = tmp_path / "model"
    HuBERT("tiny").save_pretrained(model)
    np.save(tmp_path / "km.npy", np.random.default_rng(0).normal(size=(5, 192)).astype(np.float32))
    facts = ["--kind", "layer", "--frame-rate", "50", "--layer", "2", "--convention", "before-residual"]
    out = tmp_path / "codebook.safetensors"
    code, _, errors = hubert("codebook", "import", tmp_path / "km.npy", "--output", out, "--checkpoint", model, *facts)
    assert code == 0, errors
    sha256 = file_digest(model / "model.safetensors")
    source = FeatureSource(str(model), sha256, 2, before_residual=True)
    Codebook.load(out).check_source(source)
    np.save(tmp_path / "km.npy", np.ones((5, 100)))
    code, _, errors = hubert("codebook", "import", tmp_path / "km.npy", "--output", out, "--checkpoint", model, *facts)
    assert code == 3
    assert "100 dimensions" in errors
