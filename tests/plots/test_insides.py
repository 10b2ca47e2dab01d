"""What a model does with a text, against transformers' GPT-2 and against cases known by hand."""

import itertools

import numpy as np
import pytest
import torch
from tiny_language_models import VOCAB_SIZE, random_gpt2, tiny_tokenizer

from gpt2repro.plots import attention as attention_module
from gpt2repro.plots import gradients
from gpt2repro.plots import logit_lens as lens_module
from gpt2repro.plots.style import finding, token_labels
from modeling_gpt2repro import GPT2ReproForCausalLM

IDS = torch.tensor([5, 9, 5, 7, 9, 5, 300, 42])


@pytest.fixture(scope="module")
def theirs():
    return random_gpt2(positions=32)


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stock")
    theirs.save_pretrained(directory)
    return GPT2ReproForCausalLM.from_pretrained(directory).eval()


def test_attention_maps_are_those_of_transformers(ours, theirs):
    chosen = ours.config._attn_implementation
    ours_maps, theirs_maps = (attention_module.attention_maps(m, IDS) for m in (ours, theirs))

    assert ours_maps.shape == (2, 2, 8, 8)
    # float32 sums in another order
    np.testing.assert_allclose(ours_maps, theirs_maps, atol=1e-5)
    np.testing.assert_allclose(ours_maps.sum(-1), 1, atol=1e-5)
    assert np.triu(ours_maps, 1).max() == 0
    assert ours.config._attn_implementation == chosen


def test_habits_of_heads_made_for_them():
    ids = [1, 2, 3, 1, 2, 3]
    places = np.arange(6)
    looks_at = {
        "the token itself": places,
        "the previous token": np.maximum(places - 1, 0),
        "the first token": np.zeros(6, int),
        "earlier copies": [0, 0, 0, 0, 1, 2],
        "what followed earlier copies": [0, 0, 0, 1, 2, 3],
    }
    attention = np.stack([np.eye(6)[target] for target in looks_at.values()])[None]
    habits = attention_module.attention_habits(attention, ids)

    for head, habit in enumerate(looks_at):
        assert habits[habit][0, head] == 1, habit
    assert habits["earlier copies"][0, 0] == 0
    assert habits["the first token"][0, 1] == 0


def test_without_repetition_there_are_no_habits_of_repetition():
    habits = attention_module.attention_habits(np.full((1, 1, 3, 3), 1 / 3), [1, 2, 3])
    assert "earlier copies" not in habits


def test_habits_finding_counts_heads():
    habits = {"the previous token": np.array([[0.9, 0.1, 0.6]]), "itself": np.zeros((1, 3))}
    assert attention_module._habits_finding(habits) == (
        "Of 3 heads these look mostly at one place: 2 at the previous token"
    )
    habits = {"the previous token": np.full((2, 3), 0.4), "itself": np.zeros((2, 3))}
    assert attention_module._habits_finding(habits) == ("None of 6 heads looks mostly at one place")


def test_no_head_that_looks_evenly_is_said_to_look_at_something():
    """On few tokens an even gaze falls on each often: the share of that stands beside."""
    ids = list(range(19))
    even = np.tril(np.ones((19, 19)))
    maps = np.broadcast_to(even / even.sum(-1, keepdims=True), (2, 3, 19, 19))
    habits, shares = attention_module.attention_habits(maps, ids), attention_module.even_habits(ids)
    assert shares["the token itself"] == pytest.approx(sum(1 / n for n in range(2, 20)) / 18)
    assert {name: habit[1, 2] for name, habit in habits.items()} == pytest.approx(shares)
    heads = [(0, 0), (1, 2)]
    assert "looks mostly at one place" in attention_module._heads_finding(habits, heads)
    assert attention_module._heads_finding(habits, heads).startswith("No head here")
    described = attention_module._describe_head(habits, shares, (1, 2))
    assert described.startswith("layer 1, head 2: not mostly anywhere; most\nat ")
    assert "; an even head: 1" in described
    looks = {"the first token": np.array([[0.51, 0.49]])}
    assert attention_module._heads_finding(looks, [(0, 0), (0, 1)]) == (
        "Head 0 of layer 0 looks at the first token with 51% of its attention"
    )
    described = attention_module._describe_head(looks, {"the first token": 0.14}, (0, 0))
    assert described == "layer 0, head 0: mostly\nat the first token\n(51%; an even head: 14%)"


def test_typical_heads_are_distinct_and_one_for_each_habit_that_is_a_main_one():
    habits = {"a": np.array([[0.9, 0.8], [0.1, 0.0]]), "b": np.array([[0.5, 0.2], [0.3, 0.1]])}
    # a is most 0.0's, b is 1.0's; 0.1 is the strongest of the rest and fills the row of three.
    assert attention_module.typical_heads(habits) == [(0, 0), (1, 0), (0, 1)]


def test_a_model_of_one_head_has_one_typical_head():
    habits = {"a": np.array([[0.9]]), "b": np.array([[0.1]])}
    assert attention_module.typical_heads(habits) == [(0, 0)]


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_the_logit_lens_ends_at_the_prediction_and_begins_at_the_embedding(kind, request):
    model = request.getfixturevalue(kind)
    lens = lens_module.logit_lens(model, IDS, positions=3)

    assert lens.shape == (3, 3, VOCAB_SIZE)
    with torch.no_grad():
        final = model(IDS[None]).logits[0, -3:].softmax(-1)
        body = model.transformer
        embedding = body.wte(IDS) + body.wpe(torch.arange(len(IDS)))
        first = model.lm_head(body.ln_f(embedding))[-3:].softmax(-1)
    np.testing.assert_allclose(lens[-1], final, atol=1e-6)  # float32
    np.testing.assert_allclose(lens[0], first, atol=1e-6)


def test_the_lens_finding_names_the_layer_from_which_the_choice_stands():
    tokenizer = tiny_tokenizer()
    a, b = tokenizer("a")["input_ids"][0], tokenizer("b")["input_ids"][0]
    lens = np.full((4, 1, len(tokenizer)), 0.001)
    for row, winner in enumerate([a, b, a, a]):  # a leads at first, is lost, and comes back
        lens[row, 0, winner] = 0.5
    text = lens_module._lens_finding(lens, ["x"], tokenizer)
    assert text == (
        "After the last “x” of the text, “a” is the first choice after layer 1 and on, at 50% in "
        "the end"
    )


def test_every_layer_is_asked_from_where_the_choice_stands_also_those_not_shown():
    """Of 48 layers every fourth is shown."""
    tokenizer = tiny_tokenizer()
    a, b = tokenizer("a")["input_ids"][0], tokenizer("b")["input_ids"][0]
    lens = np.full((49, 1, len(tokenizer)), 0.001)
    lens[:, 0, a] = 0.5
    lens[:46, 0, b] = 0.6
    assert "first choice after layer 45 and on" in finding(
        lens_module.draw_logit_lens(lens, ["x"], tokenizer)
    )


def test_what_is_said_of_copies_is_said_of_tokens_that_have_some():
    habits = {attention_module.COPIES: np.array([[0.8]]), "the token itself": np.array([[0.1]])}
    assert attention_module._heads_finding(habits, [(0, 0)]).endswith(
        "earlier copies with 80% of its attention, where there are any"
    )


def test_all_columns_of_heads_have_their_tokens_and_no_title_meets_the_next(ours):
    """Also where the last row is not full."""
    attention = attention_module.attention_maps(ours, IDS)
    habits = attention_module.attention_habits(attention, IDS)
    heads, even = [(0, 0), (0, 1), (1, 0), (1, 1)], attention_module.even_habits(IDS)
    labels = token_labels(tiny_tokenizer(), IDS)
    figure = attention_module.draw_attention_heads(attention, habits, labels, heads, even)
    figure.draw_without_rendering()
    panels = figure.axes[:4]
    shown = [any(tick.label1.get_visible() for tick in ax.xaxis.get_major_ticks()) for ax in panels]
    assert shown[1:] == [True] * 3
    for left, right in itertools.pairwise(panels[:3]):
        assert left._left_title.get_window_extent().x1 < right._left_title.get_window_extent().x0


@pytest.mark.parametrize(
    ("totals", "said"),
    [
        ([1.0, np.nan], "not finite"),
        ([1.0, 0.0], "receive no gradient"),
        ([1.0, 2.0], "largest in layer 1 (norm 2), smallest in layer 0 (1)"),
    ],
)
def test_the_finding_of_gradients(totals, said):
    assert said in gradients._finding(np.array(totals))


def test_gradient_norms_add_up_to_the_global_norm(ours):
    norms = gradients.gradient_norms(ours, IDS)

    ours(IDS[None], labels=IDS[None]).loss.backward()
    theirs = torch.nn.utils.clip_grad_norm_(ours.parameters(), 1e9).item()
    ours.zero_grad()
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(theirs, rel=1e-5)
    assert set(norms) == {name for name, _ in ours.named_parameters()}


def test_gradient_norms_leave_no_gradients_behind(ours):
    gradients.gradient_norms(ours, IDS)
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_every_picture_has_a_finding(ours):
    attention = attention_module.attention_maps(ours, IDS)
    habits = attention_module.attention_habits(attention, IDS)
    tokenizer = tiny_tokenizer()
    labels = token_labels(tokenizer, IDS)
    lens = lens_module.logit_lens(ours, IDS, 8)
    norms = gradients.gradient_norms(ours, IDS)
    figures = [
        attention_module.draw_attention_maps(attention, habits),
        attention_module.draw_attention_heads(
            attention, habits, labels, [(1, 0)], attention_module.even_habits(IDS), "a text"
        ),
        lens_module.draw_logit_lens(lens, labels, tokenizer),
        gradients.draw_gradient_norms(norms),
    ]
    assert all(finding(figure) for figure in figures)
    assert finding(figures[1]) == "No head here looks mostly at one place"
    assert finding(figures[3]).startswith("The text's gradients are largest in layer ")

    # What is drawn is what was measured: where a head may look; what is first; a layer's norm.
    seen = np.tril(np.ones((8, 8), bool))
    tiles, chosen = (figure.axes[0].images[0].get_array().filled(np.nan) for figure in figures[:2])
    for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        tile = tiles[9 * layer :, 9 * head :][:8, :8]  # a gap of one between them
        np.testing.assert_array_equal(tile[seen], attention[layer, head][seen])
        assert np.isnan(tile[~seen]).all()
    np.testing.assert_array_equal(chosen[seen], attention[1, 0][seen])
    ax, side = figures[2].axes[:2]
    np.testing.assert_array_equal(ax.images[0].get_array(), lens.max(-1))
    words = [text.get_text() for text in ax.texts[-8:]]
    assert words == token_labels(tokenizer, lens[-1].argmax(-1), most=9)
    np.testing.assert_array_equal(side.lines[0].get_xdata(), lens[:, -1, lens[-1, -1].argmax()])
    of_layers = [[norm for name, norm in norms.items() if f".h.{n}." in name] for n in range(2)]
    drawn = figures[3].axes[0].lines[0].get_ydata()
    assert drawn == pytest.approx([np.linalg.norm(each) for each in of_layers])
