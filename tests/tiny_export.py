"""An export of the tiny model, its fresh process left out (test_export.py); and a stranger's."""

from pathlib import Path
from typing import Any

import pytest
from tiny_gpt2 import tiny_model, tiny_tokenizer

from gpt2repro.publishing import export, verification
from gpt2repro.training import finish

# Put before a script that stands for a stranger's: the editable install would make a broken import
# look sound, so this process must not find us.
WITHOUT_THE_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gpt2repro", "modeling_gpt2repro", "configuration_gpt2repro"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""

VERIFIED = verification.Verification("gpt2repro", "float32", 1, 1, True, 1, 1, 0.0, 1, "5")


def without_fresh_processes(patch: pytest.MonkeyPatch) -> None:
    """Exports are verified and samples shown without the processes that take seconds."""
    patch.setattr(verification, "run_fresh_process", lambda _: {"max_abs_difference": 0.0})
    patch.setattr(finish, "_paragraph", lambda run: "")


def export_unverified(output: Path, **how: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        without_fresh_processes(patch)
        export.export(tiny_model(), tiny_tokenizer(), output, **how)
    return output
