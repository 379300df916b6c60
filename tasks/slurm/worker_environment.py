"""What every Dask worker process is told by its environment, wherever it runs."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")


def worker_environment(cores: int, num_workers: int, threads_per_worker: int) -> dict[str, str]:
    """Return the variables of the workers that share `cores`: the cores are shared out, so that workers do not fight for them.

    At their default level, Dask's processes tell of every connection; and a thread that spins takes its core from the others.
    """
    threads = str(max(1, cores // (num_workers * threads_per_worker)))
    variables = dict.fromkeys(THREAD_VARIABLES, threads)
    return {**variables, "DASK_LOGGING__DISTRIBUTED": "warning", "OMP_WAIT_POLICY": "PASSIVE"}
