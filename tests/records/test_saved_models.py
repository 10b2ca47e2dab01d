"""A model that somebody removes or replaces while it is read is no model, and no other one."""

import shutil

import pytest
import torch
import transformers.modeling_utils
from tiny_gpt2 import tiny_model

from gpt2repro import UserError
from gpt2repro.records.saved_models import load_causal_lm, locate


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_model_that_changes_while_it_is_read_is_told(tmp_path, monkeypatch, what):
    model = tiny_model()
    for name, value in (("a", 1.0), ("b", 2.0)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    monkeypatch.chdir(tmp_path)
    opened, safe_open = [], transformers.modeling_utils.safe_open

    def changes(*arguments, **options):
        opened.append(arguments)
        if len(opened) == 2:
            shutil.move("a", "elsewhere")
            if what == "replaced":
                shutil.move("b", "a")
        return safe_open(*arguments, **options)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", changes)
    with pytest.raises(UserError, match=r"^\./a was removed or replaced while it was read"):
        load_causal_lm("a")


def test_a_checkpoint_that_has_gone_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("checkpoints/step_00000004")
    name = locate("checkpoints/step_00000004")
    shutil.rmtree("checkpoints")
    with pytest.raises(UserError, match="no such directory, and no Hub id either"):
        load_causal_lm(name)
