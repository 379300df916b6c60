"""Times and memory of every stage beside other programs': `make bench`, `python -m benchmarks.run --help`."""
