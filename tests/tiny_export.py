"""An export of the tiny model whose fresh process is left out: test_export.py has that one."""

from pathlib import Path

import pytest
from tiny_gpt2 import tiny_model, tiny_tokenizer

from gpt2repro.publishing import export, verification

VERIFIED = verification.Verification("gpt2repro", "float32", 1, 1, True, 1, 1, 0.0, 1, "5")


def export_unverified(output: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "run_fresh_process", lambda _: {"max_abs_difference": 0.0})
        export.export(tiny_model(), tiny_tokenizer(), output)
    return output
