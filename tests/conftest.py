"""Quiet, offline, single-threaded tests: the same on a laptop and on a busy machine."""

import os

# Before torch is imported anywhere: one thread sums in one order, and leaves the other cores to
# the other workers of pytest-xdist.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
