"""`generate()` in all its ways, against transformers' GPT-2 and against itself without tricks."""

import pytest
import torch
from ours_and_theirs import SHAPE, ours_and_theirs, random_ids
from transformers import (
    DynamicCache,
    GenerationConfig,
    StaticCache,
)
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.generation import CompileConfig, ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
RECORDS = {"return_dict_in_generate": True}


def prompt(rows=2, length=7, seed=1):
    ids = random_ids(rows, length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0, "max_new_tokens": 6},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "num_beams": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"eos_token_id": list(range(40, 60))},
    ],
)
def test_the_tokens_are_theirs(attention, options):
    ours, theirs = ours_and_theirs(attn_implementation=attention)
    torch.manual_seed(0)
    mine = ours.generate(**prompt(), **{**GREEDY, **options})
    torch.manual_seed(0)
    assert torch.equal(mine, theirs.generate(**prompt(), **{**GREEDY, **options}))


def test_the_records_of_a_generation_are_theirs():
    ours, theirs = ours_and_theirs(attn_implementation="eager")
    flags = dict.fromkeys(
        ("output_scores", "output_logits", "output_hidden_states", "output_attentions"), True
    )
    mine = ours.generate(**prompt(), **GREEDY, **RECORDS, **flags)
    yours = theirs.generate(**prompt(), **GREEDY, **RECORDS, **flags)
    assert all(map(torch.equal, mine.scores, yours.scores))
    assert all(map(torch.equal, mine.logits, yours.logits))
    for kind in ("hidden_states", "attentions"):
        for mine_step, your_step in zip(mine[kind], yours[kind], strict=True):
            assert all(map(torch.equal, mine_step, your_step))
    assert mine.past_key_values.get_seq_length() == 7 + 12 - 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_generates_what_its_prompts_do_alone(side, attention):
    ours, theirs = ours_and_theirs(attn_implementation=attention)
    prompts = [random_ids(1, length, seed=length) for length in (3, 9, 6)]
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        width = tokens.shape[1]
        place = slice(9 - width, None) if side == "left" else slice(width)
        ids[row, place], mask[row, place] = tokens, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    generated = ours.generate(**batch, **GREEDY)[:, 9:]
    if side == "left":
        alone = [ours.generate(tokens, **GREEDY)[:, tokens.shape[1] :] for tokens in prompts]
        assert torch.equal(generated, torch.cat(alone))
    assert torch.equal(generated, theirs.generate(**batch, **GREEDY)[:, 9:])


def test_from_inputs_embeds():
    ours, _ = ours_and_theirs()
    inputs = prompt()
    expected = ours.generate(**inputs, **GREEDY)[:, 7:]
    embeds = ours.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(ours.generate(inputs_embeds=embeds, **inputs, **GREEDY), expected)


class RoundedLayer(QuantizedLayer):
    """Keys and values in 16 bits: the quantized cache without the packages that do it in four."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax() / 32767
        return (tensor / scale).round().to(torch.int16), scale

    def _dequantize(self, quantized):
        tensor, scale = quantized
        return tensor * scale


def test_caches_of_every_kind_give_the_same_tokens():
    ours, _ = ours_and_theirs()
    expected = ours.generate(**prompt(), **GREEDY)
    layers = range(SHAPE["n_layer"])
    caches = {
        "none": None,
        "dynamic": DynamicCache(config=ours.config),
        "static": StaticCache(config=ours.config, max_cache_len=30),
        # A residual of 4 tokens: most of the cache is stored rounded, and read back at every step.
        "quantized": Cache(layers=[RoundedLayer(residual_length=4) for _ in layers]),
    }
    for name, cache in caches.items():
        generated = ours.generate(**prompt(), **GREEDY, past_key_values=cache)
        assert torch.equal(generated, expected), name
    for name in ("dynamic", "static"):
        generated = ours.generate(**prompt(), **GREEDY, cache_implementation=name)
        assert torch.equal(generated, expected), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_offloaded_caches_give_the_same_tokens(name):
    ours, _ = ours_and_theirs()
    ours.cuda()
    inputs = {key: value.cuda() for key, value in prompt().items()}
    expected = ours.generate(**inputs, **GREEDY)
    assert torch.equal(ours.generate(**inputs, **GREEDY, cache_implementation=name), expected)


def test_a_cropped_cache_goes_on_as_if_nothing_had_been():
    ours, _ = ours_and_theirs()
    ids = random_ids(1, 20)
    cache = ours(ids).past_key_values
    cache.crop(-9)  # what is taken off; transformers once took what stays, too
    continued = ours(ids[:, 11:], past_key_values=cache).logits
    # Rows of another number in one product: another order of summation, logits of order 10.
    torch.testing.assert_close(continued, ours(ids).logits[:, 11:], rtol=1e-4, atol=1e-4)


def test_a_conversation_goes_on_from_its_cache():
    ours, _ = ours_and_theirs()
    first = ours.generate(**prompt(1), **GREEDY, **RECORDS)
    longer = torch.cat([first.sequences, random_ids(1, 4, seed=3)], dim=1)
    resumed = ours.generate(longer, **GREEDY, past_key_values=first.past_key_values)
    assert torch.equal(resumed, ours.generate(longer, **GREEDY))


@pytest.mark.parametrize("tricks", ["assistant", "prompt_lookup"])
def test_assisted_decoding_gives_the_greedy_tokens(tricks):
    ours, _ = ours_and_theirs()
    options = {"prompt_lookup_num_tokens": 3}
    if tricks == "assistant":
        # Near enough that candidates are accepted, far enough that some are not (cropped caches).
        assistant, _ = ours_and_theirs()
        assistant.transformer.h[1].mlp.c_fc.weight.data.mul_(0.9)
        options = {"assistant_model": assistant}
    ids = random_ids(1, 5).repeat(1, 3)  # something to look up
    greedy = {"do_sample": False, "max_new_tokens": 20}
    assert torch.equal(ours.generate(ids, **greedy, **options), ours.generate(ids, **greedy))


def test_streamers_see_every_token_once():
    ours, _ = ours_and_theirs()

    class Recorder(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    recorder = Recorder()
    generated = ours.generate(**prompt(1), **GREEDY, streamer=recorder)
    assert recorder.tokens == generated[0].tolist() and recorder.ended


def test_generation_in_training_mode_and_under_gradient_checkpointing():
    ours, _ = ours_and_theirs()
    expected = ours.generate(**prompt(), **GREEDY)
    assert torch.equal(ours.train().generate(**prompt(), **GREEDY), expected)
    ours.gradient_checkpointing_enable()
    assert torch.equal(ours.eval().generate(**prompt(), **GREEDY), expected)


def test_compiled_static_decoding_has_no_graph_break_and_no_recompilation():
    ours, _ = ours_and_theirs(n_layer=1)
    compile_config = CompileConfig(fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # else transformers compiles on accelerators only
    options = {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for length, new_tokens in ((7, 12), (4, 15)):  # one size of cache, two of prompts
        inputs = prompt(length=length)
        budget = {**GREEDY, "max_new_tokens": new_tokens}
        compiled = ours.generate(**inputs, **budget, **options)
        assert torch.equal(compiled, ours.generate(**inputs, **budget))
    assert graphs["unique_graphs"] == before + 1


def test_continuous_batching_gives_the_greedy_tokens():
    ours, _ = ours_and_theirs()
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 7, 5)]
    batched = ours.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1),
        # By default it makes room in proportion to the machine's memory.
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32),
        progress_bar=False,
    )
    ours.set_attn_implementation("sdpa")
    greedy = {**GREEDY, "max_new_tokens": 6}
    for tokens, result in zip(prompts, batched.values(), strict=True):
        expected = ours.generate(torch.tensor([tokens]), **greedy)[0, len(tokens) :]
        assert result.generated_tokens == expected.tolist()
