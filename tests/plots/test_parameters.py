"""Embeddings and weights as they are stored."""

import numpy as np
import pytest
import torch
from tiny_language_models import random_gpt2, tiny_tokenizer

from gpt2repro.plots import parameters
from gpt2repro.plots.style import finding, signed


@pytest.fixture(scope="module")
def model():
    return random_gpt2(positions=32)


def test_position_similarity_is_the_cosine(model):
    ours = parameters.position_similarity(model)
    weight = model.transformer.wpe.weight.detach()
    theirs = torch.nn.functional.cosine_similarity(weight[:, None], weight[None], dim=-1)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # float32
    figure = parameters.draw_position_similarity(ours)
    near, far = (np.diagonal(ours, apart).mean() for apart in (1, 16))
    assert finding(figure) == (
        f"Neighbouring positions have cosine similarity {signed(near)}, "
        f"positions 16 apart {signed(far)}"
    )
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), ours)


def test_neighbours_are_the_nearest_by_cosine_and_never_the_token_itself(model):
    weight = model.transformer.wte.weight.detach().clone()
    try:
        with torch.no_grad():  # 7 is 5 pulled long, 9 its opposite
            model.transformer.wte.weight[7] = 3 * weight[5]
            model.transformer.wte.weight[9] = -weight[5]
        (nearest,) = parameters.token_neighbours(model, [5], count=3)
        (all_of_them,) = parameters.token_neighbours(model, [5], count=10_000)
    finally:
        with torch.no_grad():
            model.transformer.wte.weight.copy_(weight)
    assert nearest[0] == (7, pytest.approx(1, abs=1e-6))
    assert len(nearest) == 3
    assert all_of_them[-1] == (9, pytest.approx(-1, abs=1e-6))
    assert 5 not in [index for index, _ in all_of_them]


def test_the_table_is_markdown_whatever_the_tokens():
    tokenizer = tiny_tokenizer()
    (pipe,) = tokenizer("|")["input_ids"]
    table = parameters.neighbours_table([[(pipe, 0.5), (pipe, 0.25)]], [pipe], tokenizer)

    header, rule, row = table.splitlines()
    assert header.split() == ["|", "token", "|", "nearest", "1", "|", "nearest", "2", "|"]
    assert set(rule) == {"|", "-", " "}
    assert row == "| \\|    | \\| 0.50   | \\| 0.25   |"


def test_small_matrices_are_sampled_whole(model):
    samples = parameters.weight_samples(model)
    assert list(samples) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    theirs = model.transformer.h[1].mlp.c_fc.weight.detach().flatten()
    np.testing.assert_array_equal(samples["mlp.c_fc"][1], theirs)


def test_large_matrices_are_sampled_evenly(model, monkeypatch):
    monkeypatch.setattr(parameters, "SAMPLED_WEIGHTS", 100)
    sample = parameters.weight_samples(model)["mlp.c_fc"][0]  # 16 x 64 weights
    theirs = model.transformer.h[0].mlp.c_fc.weight.detach().flatten()[::11]
    np.testing.assert_array_equal(sample, theirs)


def test_a_sample_meets_all_columns(model, monkeypatch):
    """Every 16th of 16 x 64 weights would be of four columns."""
    monkeypatch.setattr(parameters, "SAMPLED_WEIGHTS", 64)
    sample = parameters.weight_samples(model)["mlp.c_fc"][0]
    theirs = model.transformer.h[0].mlp.c_fc.weight.detach().flatten()[::17]
    np.testing.assert_array_equal(sample, theirs)


def test_the_title_names_the_matrix_that_grew(model):
    samples = parameters.weight_samples(model)
    samples["mlp.c_proj"][1] = samples["mlp.c_proj"][1] * 9
    title = finding(parameters.draw_weights(samples, initializer_range=0.5))
    assert title.startswith("mlp.c_proj of layer 1 is widest against its initialization: ")


@pytest.mark.parametrize(
    ("initializer_range", "said"),
    [
        (0.0, "is widest: standard deviation 0.000"),
        (0.02, "against its initialization: standard deviation 0.000, 0.0 times that one"),
    ],
)
def test_matrices_of_zeros_are_dots_and_no_ratio_is_one_to_nothing(model, initializer_range, said):
    samples = {
        name: [0 * each for each in rows] for name, rows in parameters.weight_samples(model).items()
    }
    figure = parameters.draw_weights(samples, initializer_range)
    assert finding(figure).endswith(said)
    assert all(ax.lines[0].get_marker() == "." for ax in figure.axes)


def test_bars_are_deviations_and_lines_those_at_initialization(model):
    """Of what adds to the residual stream, the line is lower by the root of how many do."""
    samples = parameters.weight_samples(model)
    figure = parameters.draw_weights(samples, initializer_range=0.5)
    panels = {ax.get_title("left"): ax.lines for ax in figure.axes}
    assert panels.keys() == samples.keys()
    for name, (*bars, below, above) in panels.items():
        initial = 0.5 / (2 * 2) ** 0.5 if name.endswith("c_proj") else 0.5  # of two layers
        assert (below.get_ydata()[0], above.get_ydata()[0]) == pytest.approx((-initial, initial))
        for bar, sample in zip(bars, samples[name], strict=True):
            assert [*bar.get_ydata()] == pytest.approx([-sample.std(), sample.std()])
