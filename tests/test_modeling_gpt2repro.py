"""The architecture: the same function as transformers' GPT-2, by every way in."""

import math
from inspect import signature

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from ours_and_theirs import NO_DROPOUT, SHAPE, ours_and_theirs, random_ids
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    StaticCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from configuration_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro import (
    CACHE,
    GPT2ReproForCausalLM,
    GPT2ReproForQuestionAnswering,
    GPT2ReproForSequenceClassification,
    GPT2ReproForTokenClassification,
    GPT2ReproLMHead,
    GPT2ReproModel,
    eager_attention,
)

# Two kernels that sum the same float32 products in another order differ in the last bits; logits
# here are of order 10, the spacing of floats there 1e-6, and a handful of layers adds up.
REORDERED = {"rtol": 1e-4, "atol": 1e-4}


def gradients(model, **inputs) -> list[torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"activation_function": "relu", "n_inner": 40},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 1e-3},
    ],
)
def test_logits_loss_and_gradients_are_bitwise_theirs(attention, variant):
    ours, theirs = ours_and_theirs(attn_implementation=attention, **variant)
    ids = random_ids(2, 20)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert torch.equal(ours(ids, labels=ids).loss, theirs(ids, labels=ids).loss)
    pairs = zip(
        gradients(ours, input_ids=ids, labels=ids),
        gradients(theirs, input_ids=ids, labels=ids),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_gelu_new_in_one_kernel_is_theirs_in_seven_up_to_rounding():
    ours, theirs = ours_and_theirs(activation_function="gelu_new")
    ids = random_ids(2, 20)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **REORDERED)
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))  # some round otherwise
    assert torch.equal(ours.transformer.h[0].mlp.act(x), F.gelu(x, approximate="tanh"))


def test_upcast_attention_agrees():
    ours, theirs = ours_and_theirs(attn_implementation="eager", reorder_and_upcast_attn=True)
    ids = random_ids(2, 20)  # theirs scales inside the product (baddbmm), ours after it
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **REORDERED)


def test_upcasting_keeps_scores_in_float32_under_autocast():
    """Which it was made for (Mistral's GPT-2, trained in float16)."""
    ours, theirs = ours_and_theirs(attn_implementation="eager", reorder_and_upcast_attn=True)
    rounded, _ = ours_and_theirs(attn_implementation="eager")
    ids = random_ids(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected, other = (m(ids).logits for m in (ours, theirs, rounded))
    # The same products in float32 in another order, whose sums then round to bfloat16, and rarely
    # to a neighbour: nearer by far than scores of bfloat16.
    assert (logits - expected).abs().max() < (other - expected).abs().max() / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_bitwise_theirs(dtype):
    ours, theirs = ours_and_theirs()
    ids = random_ids(2, 20)
    assert torch.equal(ours.to(dtype)(ids).logits, theirs.to(dtype)(ids).logits)


def test_hidden_states_and_attentions_are_theirs():
    ours, theirs = ours_and_theirs(attn_implementation="eager")
    ids = random_ids(2, 9)
    flags = {"output_hidden_states": True, "output_attentions": True}
    mine, yours = ours(ids, **flags), theirs(ids, **flags)
    assert len(mine.hidden_states) == SHAPE["n_layer"] + 1
    assert all(map(torch.equal, mine.hidden_states, yours.hidden_states))
    assert len(mine.attentions) == SHAPE["n_layer"]
    assert all(map(torch.equal, mine.attentions, yours.attentions))


def test_inputs_embeds_and_token_types_are_theirs():
    ours, theirs = ours_and_theirs()
    ids, segments = random_ids(2, 9), random_ids(2, 9, seed=2)
    embeds = ours.get_input_embeddings()(ids)
    assert torch.equal(ours(inputs_embeds=embeds).logits, theirs(ids).logits)
    mine = ours(ids, token_type_ids=segments).logits
    assert torch.equal(mine, theirs(ids, token_type_ids=segments).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            ours(**wrong)


def test_tuples_instead_of_an_output_object():
    ours, theirs = ours_and_theirs()
    ids = random_ids(1, 5)
    mine, yours = ours(ids, return_dict=False)[0], theirs(ids, return_dict=False)[0]
    assert torch.equal(mine, yours)


def test_initial_weights_follow_the_paper():
    torch.manual_seed(0)
    config = GPT2ReproConfig(vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=4)
    model = GPT2ReproForCausalLM(config)
    residual = 0.02 / math.sqrt(2 * config.n_layer)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = residual if "c_proj" in name else 0.02
            # The deviation of n samples scatters by 1/√(2n); n ≥ 8192 here, so 5 % is 6 sigma.
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not list(model.buffers())


# --- positions, padding, masks --------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_changes_nothing_without_position_ids(attention):
    ours, _ = ours_and_theirs(attn_implementation=attention)
    ids = random_ids(2, 12)
    padded = torch.cat([random_ids(1, 5, seed=9), ids[1:, :7]], dim=1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    batch = ours(torch.cat([ids[:1], padded]), attention_mask=mask).logits
    torch.testing.assert_close(batch[:1], ours(ids[:1]).logits, **REORDERED)
    torch.testing.assert_close(batch[1:, 5:], ours(ids[1:, :7]).logits, **REORDERED)


def test_right_padding_is_theirs_everywhere():
    ours, theirs = ours_and_theirs()
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    mine = ours(ids, attention_mask=mask).logits
    assert torch.equal(mine, theirs(ids, attention_mask=mask).logits)


def test_explicit_position_ids_are_theirs():
    ours, theirs = ours_and_theirs()
    ids, positions = random_ids(2, 9), torch.arange(9)[None].flip(1) + 30
    mask = torch.ones(2, 9, dtype=torch.long)
    mine = ours(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(mine, theirs(ids, attention_mask=mask, position_ids=positions).logits)


def test_a_four_dimensional_mask_is_used_as_it_is():
    ours, theirs = ours_and_theirs()
    ids = random_ids(1, 8)
    allowed = torch.ones(8, 8, dtype=torch.bool).tril()
    allowed[5:, :3] = False
    mine = ours(ids, attention_mask=allowed[None, None]).logits
    assert torch.equal(mine, theirs(ids, attention_mask=allowed[None, None]).logits)
    assert not torch.allclose(mine, ours(ids).logits)


def test_a_boolean_mask_means_the_same_to_eager_attention():
    """Added to the scores it would mask nothing, as in stock GPT-2."""
    ours, _ = ours_and_theirs()
    ids, allowed = random_ids(1, 8), torch.ones(8, 8, dtype=torch.bool).tril()
    allowed[5:, :3] = False
    by_sdpa = ours(ids, attention_mask=allowed[None, None]).logits
    ours.set_attn_implementation("eager")
    mine = ours(ids, attention_mask=allowed[None, None]).logits
    torch.testing.assert_close(mine, by_sdpa, **REORDERED)


def test_a_configuration_that_asks_for_tuples_gets_them():
    ours, _ = ours_and_theirs()
    expected = ours(random_ids(1, 8)).logits
    ours.config.return_dict = False
    logits, cache = ours(random_ids(1, 8))
    assert torch.equal(logits, expected) and cache.get_seq_length() == 8


@pytest.mark.parametrize("use_cache", [False, None])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_packed_by_position_resets_do_not_see_each_other(attention, use_cache):
    ours, _ = ours_and_theirs(attn_implementation=attention)
    documents = [random_ids(1, n, seed=n) for n in (5, 9, 2)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    packed = ours(torch.cat(documents, dim=1), position_ids=positions, use_cache=use_cache).logits
    alone = torch.cat([ours(d).logits for d in documents], dim=1)
    torch.testing.assert_close(packed, alone, **REORDERED)


def test_a_sequence_beyond_the_context_is_refused_with_both_lengths():
    ours, _ = ours_and_theirs()
    message = "49 tokens do not fit: n_positions is 48"
    with pytest.raises(ValueError, match=message):
        ours(random_ids(1, 49))
    with pytest.raises(ValueError, match=message):  # in two pieces
        cache = ours(random_ids(1, 40)).past_key_values
        ours(random_ids(1, 9), past_key_values=cache)
    with pytest.raises(ValueError, match=message):  # by its positions
        ours(random_ids(1, 60), position_ids=torch.arange(60)[None].clamp(max=48))
    for options in ({}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match=message):
            ours.generate(random_ids(1, 40), max_new_tokens=20, eos_token_id=None, **options)


def test_packed_and_padded_rows_may_be_longer_than_the_context():
    ours, _ = ours_and_theirs()
    ids = random_ids(1, 80)
    positions = torch.arange(40).repeat(2)[None]
    packed = ours(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 40:], ours(ids[:, 40:]).logits, **REORDERED)


def test_logits_to_keep():
    ours, theirs = ours_and_theirs()
    ids = random_ids(2, 9)
    everything = ours(ids).logits
    chosen = torch.tensor([0, 3])
    each = torch.tensor([[0, 3], [1, 8]])
    flags = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = [
        (1, everything[:, -1:]),
        (4, everything[:, -4:]),
        (chosen, everything[:, chosen]),
        (each, torch.stack([everything[0, each[0]], everything[1, each[1]]])),
        (flags, everything[flags]),
    ]
    for keep, logits in expected:
        # A product of fewer rows may be summed in another order.
        torch.testing.assert_close(ours(ids, logits_to_keep=keep).logits, logits, **REORDERED)
    assert torch.equal(ours(ids, logits_to_keep=2).logits, theirs(ids, logits_to_keep=2).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_head_is_still_one(tied):
    ours, _ = ours_and_theirs(tie_word_embeddings=tied)
    ours.resize_token_embeddings(120)
    assert type(ours.lm_head) is GPT2ReproLMHead and ours.lm_head.out_features == 120
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == tied
    before = ours.lm_head.weight.detach().clone()
    ours.post_init()  # whoever calls it again: what is there is not made up anew
    assert torch.equal(ours.lm_head.weight, before)


def test_a_head_of_another_kind_takes_the_place_of_ours():
    """Only a plain layer without bias is what ours would compute."""

    class Scaled(nn.Linear):
        pass

    for head in (nn.Linear(32, 99, bias=True), Scaled(32, 99, bias=False)):
        ours, _ = ours_and_theirs(tie_word_embeddings=False)
        ours.set_output_embeddings(head)
        assert ours.get_output_embeddings() is head
        plain = nn.Linear(32, 120, bias=False)
        ours.set_output_embeddings(plain)  # it is not ours any more
        assert ours.get_output_embeddings() is plain


def test_a_resized_head_keeps_the_hook_of_its_place():
    """What brings an offloaded weight in, or the hidden states to another GPU."""
    ours, _ = ours_and_theirs(tie_word_embeddings=False)
    add_hook_to_module(ours.lm_head, ModelHook())
    ours.resize_token_embeddings(120)
    assert isinstance(ours.lm_head._hf_hook, ModelHook)
    ids = random_ids(2, 9)
    bare, loss = (ours(ids, labels=ids, skip_logits=skip).loss for skip in (True, False))
    torch.testing.assert_close(bare, loss, **REORDERED)


# --- attention kernels ----------------------------------------------------------------------------


def test_sdpa_takes_the_flash_kernel_in_training_prefill_and_decoding(monkeypatch):
    """`sdpa_kernel` raises if flash cannot be used; on a GPU a mask is enough for that, here the
    mask is looked at as well."""
    ours, _ = ours_and_theirs()
    ids = random_ids(2, 16)
    ones = torch.ones_like(ids)
    attend, calls = F.scaled_dot_product_attention, []

    def spy(query, key, value, **options):
        calls.append((query.shape[2], options["attn_mask"] is not None, options["is_causal"]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        ours.train()(ids, shift_labels=ids, skip_logits=True).loss.backward()
        ours(ids, attention_mask=ones, labels=ids).loss.backward()
        with torch.no_grad():
            ours.eval().generate(ids, attention_mask=ones, max_new_tokens=3, do_sample=False)
            # All of a prompt into a static cache, whose empty rest must not need a mask either.
            cache = StaticCache(config=ours.config, max_cache_len=40)
            ours(ids, past_key_values=cache)
    assert set(calls) == {(16, False, True), (1, False, False)}

    calls.clear()
    ones[0, 0] = 0
    ours(ids, attention_mask=ones)
    assert set(calls) == {(16, True, False)}


def test_attention_implementations_agree():
    ours, _ = ours_and_theirs()
    ids, mask = random_ids(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[1, :6] = 0
    real = mask.bool()
    expected = ours(ids, attention_mask=mask).logits[real]
    for attention in ("eager", "flex_attention"):
        ours.set_attn_implementation(attention)
        with torch.no_grad():
            logits = ours(ids, attention_mask=mask).logits[real]
        torch.testing.assert_close(logits, expected, **REORDERED)


@pytest.mark.parametrize("num_cached", [0, 5])
def test_the_written_triangle_is_causal_attention(num_cached):
    """Without a mask `eager` draws it itself: token t sees the cached ones and 0 ... t."""
    ours, _ = ours_and_theirs()
    module = ours.transformer.h[0].attn
    query, key, value = torch.randn(3, 2, 4, 7 + num_cached, 8)
    query = query[:, :, num_cached:]
    mixed, weights = eager_attention(module, query, key, value, None, module.scaling)
    seen = torch.ones(7, 7 + num_cached, dtype=torch.bool).tril(num_cached)
    expected = F.scaled_dot_product_attention(query, key, value, seen, scale=module.scaling)
    torch.testing.assert_close(mixed, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert torch.equal(weights != 0, seen.expand_as(weights))


def test_flash_attention_is_declared_and_known_to_transformers():
    assert GPT2ReproForCausalLM._supports_flash_attn
    assert {"flash_attention_2", "flash_attention_3"} <= set(ALL_ATTENTION_FUNCTIONS.valid_keys())


def test_dropout_acts_in_training_alone():
    ours, _ = ours_and_theirs(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    ids = random_ids(1, 9)
    assert torch.equal(ours(ids).logits, ours(ids).logits)
    ours.train()
    assert not torch.equal(ours(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("place", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_the_same_units_drop_out_as_of_theirs(attention, place):
    ours, theirs = ours_and_theirs(**{place: 0.5}, attn_implementation=attention)
    ids, found = random_ids(2, 9), []
    for model in (ours, theirs):
        torch.manual_seed(1)
        found.append(model.train()(ids).logits)
    # Sums in another order; with other units some logits differ by 4.
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], ours(ids).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_dropout_training_computes_what_evaluation_does(attention):
    model, ids = ours_and_theirs()[0], random_ids(1, 9)
    model.set_attn_implementation(attention)
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


# --- caches ---------------------------------------------------------------------------------------


def test_no_cache_is_made_in_training_unless_asked_for():
    ours, _ = ours_and_theirs()
    ids = random_ids(1, 5)
    assert isinstance(ours(ids).past_key_values, DynamicCache)
    ours.train()
    assert ours(ids).past_key_values is None
    assert isinstance(ours(ids, use_cache=True).past_key_values, DynamicCache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_a_cached_continuation_equals_the_whole(attention, name):
    ours, _ = ours_and_theirs(attn_implementation=attention)
    ids = random_ids(2, 20)
    cache, pieces = None, []
    for piece in ids.split([7, 1, 1, 11], dim=1):
        outputs = ours(piece, **{name: cache})
        cache = outputs[name]
        pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), ours(ids).logits, **REORDERED)


@pytest.mark.skipif(CACHE == "past_key_values", reason="has one name before transformers 5.24")
def test_two_caches_are_one_too_many():
    """As PEFT 0.21 gives a prefix beside `generate`'s own, of which one would be ignored."""
    ours, _ = ours_and_theirs()
    cache = ours(random_ids(1, 3))[CACHE]
    with pytest.raises(ValueError, match="not both"):
        ours(random_ids(1, 3), past_key_values=cache, cache=DynamicCache())
    alone = ours(random_ids(1, 3), past_key_values=cache, cache=None)
    assert alone[CACHE].get_seq_length() == 6


# --- the rest of a modern model -------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    ours, _ = ours_and_theirs()
    ids = random_ids(2, 12)
    ours.train()
    expected = gradients(ours, input_ids=ids, labels=ids)
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours.enable_input_require_grads()
    assert all(map(torch.equal, gradients(ours, input_ids=ids, labels=ids), expected))


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary_keeps_what_was_there(tied):
    ours, _ = ours_and_theirs(tie_word_embeddings=tied)
    ids = random_ids(1, 9)
    with torch.no_grad():
        expected = ours(ids).logits
    ours.resize_token_embeddings(110, mean_resizing=False)
    assert ours.config.vocab_size == 110
    assert ours(ids).logits.shape[-1] == 110
    torch.testing.assert_close(ours(ids).logits[..., :99], expected, **REORDERED)
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == tied
    ours(ids, labels=ids).loss.backward()


def test_the_plans_name_modules_that_exist():
    ours, _ = ours_and_theirs()
    names = {name for name, _ in ours.named_modules()}
    for entry in ours.fsdp_plan:
        assert entry.replace("*", "0") in names
    assert ours._no_split_modules == {type(ours.transformer.h[0]).__name__}


def test_the_auto_classes_know_the_model_once_it_is_imported():
    config = GPT2ReproConfig(**SHAPE)
    assert type(AutoModel.from_config(config)) is GPT2ReproModel
    assert type(AutoModelForCausalLM.from_config(config)) is GPT2ReproForCausalLM
    kin = AutoModelForSequenceClassification.from_config(config)
    assert type(kin) is GPT2ReproForSequenceClassification


@pytest.mark.parametrize("wrong", [(2, 1, 8), (5,)], ids=str)
def test_ids_of_another_shape_are_refused(wrong):
    """A tokenizer's `return_tensors="pt"` in a dataset gives (B, 1, T), which would see nothing."""
    ours, _ = ours_and_theirs()
    with pytest.raises(ValueError, match=rf"input_ids are \(B, T\), not \({wrong[0]},"):
        ours(torch.zeros(wrong, dtype=torch.long))


def test_inputs_without_names_are_in_their_order():
    for ours, theirs in (
        (GPT2ReproModel, GPT2Model),
        (GPT2ReproForCausalLM, GPT2LMHeadModel),
    ):
        mine, yours = (list(signature(kind.forward).parameters)[:7] for kind in (ours, theirs))
        assert [CACHE if name == "past_key_values" else name for name in mine] == yours


def test_a_mask_of_blocks_is_passed_on(monkeypatch):
    """It is no tensor, and has no `ndim`."""
    ours, _ = ours_and_theirs()
    ours.set_attn_implementation("flex_attention")
    ids, seen = random_ids(2, 16), []

    def attend(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return eager_attention(module, query, key, value, None, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", attend)
    mask = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 16, 16, device="cpu")
    ours(ids, attention_mask=mask)
    assert all(each is mask for each in seen) and len(seen) == SHAPE["n_layer"]


def test_the_other_heads_are_theirs():
    shape = {**SHAPE, "pad_token_id": 97, "num_labels": 3}
    ids = random_ids(2, 9)
    ids[0, 6:] = 97
    for kind, their_kind in (
        (GPT2ReproForSequenceClassification, GPT2ForSequenceClassification),
        (GPT2ReproForQuestionAnswering, GPT2ForQuestionAnswering),
        (GPT2ReproForTokenClassification, GPT2ForTokenClassification),
    ):
        ours = kind(GPT2ReproConfig(**shape)).eval()
        theirs = their_kind(GPT2Config(**shape, **NO_DROPOUT)).eval()
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours(ids)[0], theirs(ids)[0])
        assert ours.get_input_embeddings() is ours.transformer.wte


def test_token_classification_trains():
    model = GPT2ReproForTokenClassification(GPT2ReproConfig(**SHAPE, num_labels=3))
    ids = random_ids(2, 9)
    outputs = model(ids, labels=ids % 3)
    assert outputs.logits.shape == (2, 9, 3)
    outputs.loss.backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0
