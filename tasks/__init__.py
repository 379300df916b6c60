"""One file per stage, the same word as the `hubert/` file that it wraps: retries, receipts, artifacts, servers."""
