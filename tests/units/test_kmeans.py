"""The codebook against scikit-learn, and Lloyd by torch and by dask-ml against each other."""

import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans

from hubert.core.errors import DataError
from hubert.core.paths import PROJECT
from hubert.features.frames_file import frame_counts, read_frames
from hubert.features.source import FeatureSource
from hubert.settings.sections import KMeansSettings
from hubert.units.codebook import Codebook, nearest_centroids
from hubert.units.kmeans import (
    KMeansStage,
    choose_seeds,
    codebook_figures,
    draw_frames,
    iterate_chunks,
    mean_variance,
    torch_lloyd,
)
from tools.given_stages import frames_in


@pytest.fixture
def frames():
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(12, 7, generator=generator)
    return torch.cat([centre + torch.randn(150, 7, generator=generator) for centre in centres])


@pytest.fixture
def shards(frames, tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, part in zip(paths, frames.split([400, 1, 1399]), strict=True):
        save_file({"frames": part.contiguous()}, path)
    return paths


def test_units_are_scikit_learns_nearest_centroids(frames):
    model = KMeans(20, n_init=1, random_state=0, max_iter=3).fit(frames.numpy())
    codebook = Codebook(torch.from_numpy(model.cluster_centers_), {})
    assert np.array_equal(codebook.assign(frames).numpy(), model.predict(frames.numpy()))


@pytest.mark.parametrize(("offset", "dtype"), [(0.0, torch.float32), (0.0, torch.float16), (1e5, torch.float32)])
@pytest.mark.parametrize(("dimension", "num_units"), [(39, 100), (768, 500)])
def test_the_nearest_centroid_is_that_of_exact_distances_even_far_from_zero(offset, dtype, dimension, num_units):
    generator = torch.Generator().manual_seed(0)
    frames = (offset + torch.randn(2500, dimension, generator=generator)).to(dtype)  # more than two blocks
    centroids = offset + torch.randn(num_units, dimension, generator=generator)
    distances = torch.cdist(frames.double(), centroids.double()).square()
    chosen = distances.gather(1, nearest_centroids(frames, centroids)[:, None])[:, 0]
    assert float((chosen / distances.min(1).values).max()) < 1 + 1e-5  # a tie may go to the other side
    assert nearest_centroids(frames[:0], centroids).shape == (0,)


def test_frames_that_need_a_gradient_and_come_in_autocast_are_labelled_as_others():
    frames, centroids = torch.randn(50, 39), torch.randn(10, 39)
    expected = Codebook(centroids, {}).assign(frames)
    assert torch.equal(Codebook(centroids, {}).assign(frames.requires_grad_()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Codebook(centroids, {}).assign(frames), expected)


def test_torch_lloyd_equals_scikit_learns_from_the_same_centroids(frames, shards):
    seeds = choose_seeds(frames, 20, seed=1)
    ours, _ = torch_lloyd(lambda: iterate_chunks(shards), seeds, max_iterations=100, tolerance=1e-4)
    theirs = KMeans(20, init=seeds.numpy(), n_init=1, max_iter=100, tol=1e-4, algorithm="lloyd").fit(frames.numpy())
    # scikit-learn ends with one more assignment, torch with the centroids of that assignment: compare what it is about.
    ours_distance = codebook_figures(shards, Codebook(ours, {}))["mean_squared_distance"]
    assert ours_distance == pytest.approx(theirs.inertia_ / len(frames), rel=1e-3)


@pytest.mark.slow
def test_dask_lloyd_equals_torch_lloyd_and_is_the_same_here_and_on_workers(frames, shards):
    from distributed import Client, LocalCluster

    from tasks.kmeans import dask_lloyd

    seeds = choose_seeds(frames, 20, seed=1)
    workers = []

    @contextmanager
    def connect():
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            yield client
            workers.append(sum(client.run(lambda dask_worker: dask_worker.state.executed_count).values()))

    here = dask_lloyd(shards, seeds, KMeansSettings(num_units=20, tolerance=1e-4), connect)
    assert not workers
    spread = dask_lloyd(shards, seeds, KMeansSettings(num_units=20, tolerance=1e-4, local_megabytes=0), connect)
    assert workers[0] > 10  # tasks
    assert torch.equal(here[0], spread[0])
    assert here[1] == spread[1]
    ours, _ = torch_lloyd(lambda: iterate_chunks(shards), seeds, max_iterations=100, tolerance=1e-4)
    distances = [
        codebook_figures(shards, Codebook(centroids, {}))["mean_squared_distance"] for centroids in (ours, here[0])
    ]
    assert distances[0] == pytest.approx(distances[1], rel=1e-3)


def test_dask_ml_searches_in_our_way_and_finds_what_its_own_search_finds(frames, shards, monkeypatch):
    from dask_ml.cluster import k_means
    from dask_ml.metrics import pairwise_distances_argmin_min
    from sklearn import metrics

    from tasks.kmeans import dask_frames, dask_kmeans, dask_lloyd, search

    seeds = choose_seeds(frames, 20, seed=1)
    options = {"metric": "euclidean", "metric_kwargs": {"squared": True}}
    found, _ = search(dask_frames(shards), seeds.double().numpy(), **options)
    theirs, _ = pairwise_distances_argmin_min(dask_frames(shards), seeds.numpy(), **options)
    assert np.array_equal(found.compute(), theirs.compute())
    with pytest.raises(ValueError, match="euclidean, found cosine"):
        search(dask_frames(shards), seeds.numpy(), metric="cosine")

    def refuse(*_, **__):
        raise AssertionError("scikit-learn searched")

    monkeypatch.setattr(metrics, "pairwise_distances_argmin_min", refuse)
    with pytest.raises(AssertionError, match="searched"):
        pairwise_distances_argmin_min(dask_frames(shards), seeds.numpy())[0].compute()
    dask_lloyd(shards, seeds, KMeansSettings(num_units=20, max_iterations=3), AssertionError)
    dask_kmeans.cache_clear()
    monkeypatch.delattr(k_means, "pairwise_distances_argmin_min")
    with pytest.raises(RuntimeError, match="another version"):
        dask_lloyd(shards, seeds, KMeansSettings(num_units=20, max_iterations=3), AssertionError)


def test_fits_in_several_threads_at_once_all_search_in_our_way(frames, shards, monkeypatch):
    """Whichever ends first, the others go on with the same search: a fit by scikit-learn's would raise."""
    from sklearn import metrics

    from tasks.kmeans import dask_kmeans, dask_lloyd

    def refuse(*_, **__):
        raise AssertionError("scikit-learn searched")

    seeds = choose_seeds(frames, 20, seed=1)
    monkeypatch.setattr(metrics, "pairwise_distances_argmin_min", refuse)
    dask_kmeans.cache_clear()
    fits = [KMeansSettings(num_units=20, max_iterations=count, tolerance=1e-9) for count in (1, 30, 2, 30)]
    with ThreadPoolExecutor(len(fits)) as pool:
        found = list(pool.map(lambda one: dask_lloyd(shards, seeds, one, AssertionError), fits))
    assert torch.equal(found[1][0], found[3][0])


def test_the_codebook_by_dask_is_the_same_stage_by_another_way(shards, tmp_path):
    """The same key and folder; and it travels to a worker."""
    from distributed.protocol import deserialize, serialize

    from tasks.kmeans import with_dask

    torch_settings, dask_settings = (KMeansSettings(num_units=5, backend=name) for name in ("torch", "dask"))
    sample = frames_in(shards, FeatureSource())
    stage = KMeansStage(parent=tmp_path, sample=sample, kmeans=torch_settings)
    assert with_dask(stage, AssertionError) is stage
    asked = KMeansStage(parent=tmp_path, sample=sample, kmeans=dask_settings)
    by_dask = deserialize(*serialize(with_dask(asked, AssertionError)))
    assert (by_dask.key, by_dask.folder) == (asked.key, asked.folder)
    assert by_dask.run()["num_units"] == 5
    assert asked.done()


def test_frames_above_the_limit_are_spread_over_the_workers(shards, frames):
    """1,800 frames of 7 numbers are 0.0504 MB."""
    from tasks.kmeans import dask_lloyd

    def connect():
        raise ConnectionError

    few = KMeansSettings(num_units=20, local_megabytes=0.0504, max_iterations=1)
    assert dask_lloyd(shards, choose_seeds(frames, 20, seed=1), few, connect)[1] == 1
    many = few.model_copy(update={"local_megabytes": 0.0503})
    with pytest.raises(ConnectionError):
        dask_lloyd(shards, choose_seeds(frames, 20, seed=1), many, connect)


def test_the_figures_of_a_codebook_are_those_of_a_slow_loop(frames, shards):
    codebook = Codebook(torch.cat([frames[::300], torch.full((1, 7), 1e3)]), {})
    figures = codebook_figures(shards, codebook)
    distances = torch.cdist(frames.double(), codebook.centroids.double()).square()
    assert figures["mean_squared_distance"] == pytest.approx(float(distances.min(1).values.mean()), rel=1e-5)
    assert figures["num_unused_units"] == 1
    share = torch.bincount(distances.argmin(1)).double() / len(frames)
    share = share[share > 0]
    assert figures["usage_perplexity"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())))


def test_drawn_frames_are_distinct_rows_of_the_shards_and_depend_on_the_seed_alone(frames, shards):
    drawn = draw_frames(shards, 500, seed=3)
    assert torch.equal(drawn, draw_frames(shards, 500, seed=3))
    rows = {tuple(row) for row in frames.tolist()}
    assert len({tuple(row) for row in drawn.tolist()} & rows) == 500
    assert len(draw_frames(shards, 10**6, seed=3)) == len(frames)


def test_the_variance_that_the_tolerance_is_relative_to_is_numpys(frames, shards):
    assert mean_variance(lambda: iterate_chunks(shards)) == pytest.approx(
        frames.double().var(0, unbiased=False).mean().item()
    )


def test_the_variance_over_dask_is_numpys_and_holds_no_float64_copy_of_a_chunk(frames, shards, tmp_path):
    """A chunk of 40,000 frames of 78 numbers is 12 MB, and 25 MB in float64."""
    import dask

    from tasks.kmeans import chunk_moments, dask_frames, dask_variance

    with dask.config.set(scheduler="synchronous"):
        assert dask_variance(dask_frames(shards)) == pytest.approx(frames.double().var(0, unbiased=False).mean().item())
        moved = 1000 + torch.randn(70_000, 3, generator=torch.Generator().manual_seed(0))  # two chunks, far from zero
        save_file({"frames": moved}, tmp_path / "moved.safetensors")
        found = dask_variance(dask_frames([tmp_path / "moved.safetensors"]))
    assert found == pytest.approx(moved.double().var(0, unbiased=False).mean().item(), rel=1e-8)
    chunk = np.ones((40_000, 78), np.float32)
    tracemalloc.start()
    chunk_moments(chunk)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < chunk.nbytes / 2


def test_threads_are_no_more_than_slurm_gave(monkeypatch):
    import dask

    from tasks import kmeans

    monkeypatch.setattr(kmeans, "CPU_COUNT", 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for given, expected in ((None, 64), ("8", 8), ("1", 1), ("128", 64)):
        monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
        if given:
            monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
        with kmeans.threads_here():
            assert dask.config.get("num_workers") == expected
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "policy"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_a_command_lets_the_threads_of_its_libraries_sleep_while_they_wait_unless_the_user_says_otherwise(
    given, policy
):
    """As the OpenMP library itself says when it is loaded."""
    variables = {**os.environ, "OMP_DISPLAY_ENV": "TRUE"}
    variables.pop("OMP_WAIT_POLICY", None)
    variables |= {"OMP_WAIT_POLICY": given} if given else {}
    command = [sys.executable, "-c", "import tasks.cli, torch"]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, cwd=PROJECT)
    assert f"OMP_WAIT_POLICY = '{policy}'" in ended.stderr


def test_shards_are_counted_by_their_headers_and_read_in_part(frames, shards):
    assert frame_counts(shards) == [400, 1, 1399]
    assert torch.equal(read_frames(shards[2], 5, 9), frames[401 + 5 : 401 + 9])


def test_fewer_frames_than_units_is_an_error_that_says_what_to_change(frames):
    with pytest.raises(DataError, match=r"kmeans\.sample_fraction"):
        choose_seeds(frames[:5], 6, seed=0)


def test_a_codebook_survives_the_disk_and_refuses_features_of_another_source(shards, tmp_path):
    source = FeatureSource("somewhere", "abc", 6, before_residual=False)
    stage = KMeansStage(
        parent=tmp_path / "it1",
        sample=frames_in(shards, source),
        kmeans=KMeansSettings(num_units=5, backend="torch"),
    )
    figures = stage.run()
    codebook = Codebook.load(stage.path)
    assert codebook.metadata["source"]["layer"] == 6
    assert codebook.frame_rate == 50
    assert figures["num_unused_units"] == 0
    codebook.check_source(FeatureSource("moved", "abc", 6, before_residual=False))
    with pytest.raises(DataError, match="before_residual=True"):
        codebook.check_source(FeatureSource("somewhere", "abc", 6, before_residual=True))


def test_a_file_that_is_no_codebook_is_refused_with_the_command_that_makes_one(shards, tmp_path):
    (tmp_path / "km.bin").write_bytes(b"of another program")
    for path in (shards[0], tmp_path / "km.bin", tmp_path / "missing"):
        with pytest.raises(DataError, match="expected a codebook of ours.*`hubert codebook import`"):
            Codebook.load(path)
