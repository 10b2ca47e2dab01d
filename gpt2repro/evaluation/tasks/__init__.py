"""One file a benchmark; `benchmarks.py` beside this folder lists them."""
