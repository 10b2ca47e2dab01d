"""Quiet, offline, single-threaded tests: the same on a laptop and on a busy machine."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
