"""One question each, answered once and recorded in benchmarks/results."""
