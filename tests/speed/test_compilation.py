"""One graph in training and in inference, no recompilation between them, and exported programs."""

import pytest
import torch
import torch._functorch.config
from ours_and_theirs import ours_and_theirs, random_ids
from torch import nn
from torch._dynamo.utils import counters

import modeling_gpt2repro
from gpt2repro.speed import compilation, lm_head
from gpt2repro.speed.compilation import RULES, compile_in_place

# Fused kernels round at other places than one kernel after another; logits are of order 10.
FUSED = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """And its settings as they were afterwards, whatever `compile_in_place` made of them."""
    torch._dynamo.reset()
    counters.clear()
    with torch._functorch.config.patch(dict.fromkeys(RULES, True)):
        yield


def test_what_the_compiler_is_told(monkeypatch):
    told = {}
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: told.update(how))
    compile_in_place(nn.Linear(4, 4), max_autotune=True, fullgraph=True)
    assert told == {"mode": "max-autotune-no-cudagraphs", "fullgraph": True}


@pytest.mark.parametrize(
    ("skip_logits", "loop", "backend"),
    [
        (True, True, "inductor"),
        (True, True, "aot_eager"),
        (True, False, "aot_eager"),
        (False, False, "aot_eager"),
    ],
)
def test_a_compiled_training_step_is_one_graph_with_the_same_gradients(skip_logits, loop, backend):
    ours, _ = ours_and_theirs(n_layer=1, vocab_size=128)  # of 64s: the head's logits are contiguous
    if loop:
        lm_head.use_in(ours)
    ours.train()
    rows = random_ids(2, 17)
    step = {"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:], "skip_logits": skip_logits}
    eager = ours(**step).loss
    eager.backward()
    expected = [p.grad.clone() for p in ours.parameters()]
    # Inductor's kernels are slow to compile: the model's once is enough.
    if loop:
        compile_in_place(ours, fullgraph=True, backend=backend)
    else:
        ours.compile(fullgraph=True, backend=backend)
    for _ in range(2):
        ours.zero_grad()
        loss = ours(**step).loss
        loss.backward()
        torch.testing.assert_close(loss, eager, **FUSED)
        for parameter, gradient in zip(ours.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, **FUSED)
    # One of the model, and one that its loss calls for.
    assert counters["stats"]["unique_graphs"] == 1 + loop


def test_training_under_autocast_and_checkpointing_compiles():
    ours, _ = ours_and_theirs(n_layer=1)
    ours.train().gradient_checkpointing_enable({"use_reentrant": False})
    rows = random_ids(2, 17)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        loss = compiled(rows[:, :-1], shift_labels=rows[:, 1:], skip_logits=True).loss
    loss.backward()
    assert ours.transformer.wte.weight.grad.isfinite().all()


def test_compiling_in_place_leaves_names_and_generation_alone():
    ours, _ = ours_and_theirs(n_layer=1)
    names = list(ours.state_dict())
    ids = random_ids(2, 9)
    greedy = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    logits, tokens = ours(ids).logits, ours.generate(ids, **greedy)
    ours.compile(fullgraph=True, backend="aot_eager")
    assert list(ours.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, logits, **FUSED)
    assert torch.equal(ours.generate(ids, **greedy), tokens)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_compiled_has_no_mask_where_attention_is_causal(training):
    """A mask would keep flash attention away; what torch 2.11 compiles looks exported to others."""
    ours, _ = ours_and_theirs(n_layer=1)
    attended = []

    def backend(graph, inputs):
        attended.extend(n.kwargs for n in graph.graph.nodes if "scaled_dot" in str(n.target))
        return graph

    ours.train(training).compile(backend=backend)
    rows = random_ids(2, 17)
    ours(rows[:, :-1], shift_labels=rows[:, 1:], skip_logits=True, use_cache=False)
    [how] = attended
    assert how["attn_mask"] is None and how["is_causal"] is True


def test_the_context_is_guarded_in_compiled_code_too():
    ours, _ = ours_and_theirs(n_layer=1)
    with pytest.raises(ValueError, match="49 tokens do not fit: n_positions is 48"):
        torch.compile(ours, backend="eager")(random_ids(1, 49))


def test_dynamic_lengths_compile_once():
    ours, _ = ours_and_theirs(n_layer=1)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for length in (9, 14, 30):
            ids = random_ids(2, length)
            torch.testing.assert_close(compiled(ids).logits, ours(ids).logits, **FUSED)
    assert counters["stats"]["unique_graphs"] == 1


NOT_STRICT = pytest.mark.skipif(
    modeling_gpt2repro.SEEMS_EXPORTED, reason="torch compiles and exports alike"
)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=NOT_STRICT)])
@pytest.mark.parametrize("length", [torch.export.Dim("T"), torch.export.Dim("T", min=2, max=48)])
def test_an_exported_program_takes_any_length(length, strict):
    ours, _ = ours_and_theirs(n_layer=1)
    program = torch.export.export(
        ours,
        (random_ids(2, 9),),
        {"use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
        strict=strict,
    )
    ids = random_ids(2, 31)
    exported = program.module()(ids, use_cache=False).logits
    torch.testing.assert_close(exported, ours(ids).logits, **FUSED)


class DoublingHead(torch.nn.Linear):
    """Stands for an adapter: a head with a forward of its own."""

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize("ids", [random_ids(1, 1), random_ids(1, 5), random_ids(3, 1)], ids=str)
@pytest.mark.parametrize("head_class", [lm_head.FusedLMHead, torch.nn.Linear, DoublingHead])
def test_compiled_logits_of_one_row_and_of_several(ids, head_class):
    ours, _ = ours_and_theirs(n_layer=1)
    ours.lm_head.__class__ = head_class
    with torch.no_grad():
        expected = ours(ids, use_cache=False).logits
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        logits = compiled(ids, use_cache=False).logits
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, **FUSED)


def test_training_keeps_less_when_compiled_in_place():
    """No output of a GELU, no normalized row, no logits; and the gradients are the same."""
    rows = random_ids(4, 17)
    inputs = {"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:], "skip_logits": True}

    def step(compile_model):
        torch._dynamo.reset()
        model, _ = ours_and_theirs()
        model.train()
        lm_head.use_in(model)
        compile_model(model)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**inputs).loss
        loss.backward()
        activations = sum(size for at, size in kept.items() if at not in weights)
        return activations, [parameter.grad for parameter in model.parameters()]

    backend = "aot_eager_decomp_partition"  # the compiler's partition of the step, without its code
    plain, expected = step(lambda model: model.compile(backend=backend))
    little, gradients = step(
        lambda model: compile_in_place(model, less_memory=True, backend=backend)
    )
    assert little < 0.8 * plain
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("width", [1024, 1280])
@pytest.mark.parametrize("older", [True, False])
def test_rows_that_a_kernel_would_read_back_are_computed_again(monkeypatch, width, older):
    monkeypatch.setattr(compilation, "compare_versions", lambda *_: older)
    compile_in_place(nn.Sequential(nn.LayerNorm(width)), backend="eager")
    rule = torch._functorch.config.ban_recompute_used_far_apart
    assert rule is not (older and width == 1280)
