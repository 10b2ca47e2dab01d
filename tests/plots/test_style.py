"""The labels that all pictures share."""

import pytest
from matplotlib import rc_context
from matplotlib.text import Text
from tiny_language_models import tiny_tokenizer

from gpt2repro.plots import style


@pytest.mark.parametrize(
    ("name", "written"),
    [("a.svg", ["a.svg"]), ("a.png", ["a.png"]), ("run.1", ["run.1.png", "run.1.svg"])],
)
def test_an_ending_says_which_picture_and_no_other_file_is_touched(tmp_path, name, written):
    figure, _ = style.new_figure("A title")
    paths = style.save(figure, tmp_path / name)
    assert [path.name for path in paths] == written
    assert sorted(path.name for path in tmp_path.iterdir()) == written


def test_a_users_settings_for_tex_are_not_a_pictures(tmp_path):
    """Titles have percents and tokens have underscores."""
    with rc_context({"text.usetex": True}):
        figure, [[ax]] = style.new_figure("50 % of a_b")
        ax.plot([1e-9, 2e-9], label="100 % & more")
        style.legend(ax)
        style.save(figure, tmp_path / "a.svg")
    assert not any(text.get_usetex() for text in figure.findobj(Text))


def test_a_picture_of_the_same_numbers_is_the_same_file(tmp_path):
    for name in ("a.svg", "b.svg"):
        figure, [[ax]] = style.new_figure("A title")
        ax.plot([1, 2], marker="o")
        style.save(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_token_labels_show_what_cannot_be_seen():
    tokenizer = tiny_tokenizer()

    def labels(text: str) -> list[str]:
        return style.token_labels(tokenizer, tokenizer(text)["input_ids"])

    assert "".join(labels(" a\n\tb")) == "␣a↵⇥b"
    assert all(label.startswith("<") for label in labels("é"))  # two bytes, no character
    assert "".join(labels("$x$")) == "$x$"


def test_long_labels_are_cut():
    class Tokenizer:
        def decode(self, ids, **_):
            return "internationalization"

    assert style.token_labels(Tokenizer(), [0]) == ["internation…"]


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        (0, "0"),
        (1_638_400, "1.64M"),
        (10e9, "10B"),
        (999, "999"),
        (4096, "4.1k"),
        (2e12, "2T"),
        (999_999, "1M"),
    ],
)
def test_short_numbers_read_as_spoken(value, ours):
    assert style.short_number(value) == ours


@pytest.mark.parametrize(
    ("value", "ours"), [(0, "0%"), (0.314, "31%"), (1, "100%"), (0.0123, "1.2%"), (1e-5, "0.001%")]
)
def test_small_probabilities_are_not_nothing(value, ours):
    assert style.percent(value) == ours


@pytest.mark.parametrize("words", [1, 10, 20, 60])
@pytest.mark.parametrize("width", [7.0, 8.0, 12.0])
def test_a_title_is_one_line_within_the_picture_and_the_finding_is_all_of_it(words, width):
    title = " ".join(["Widest loss"] * words)
    figure, _ = style.new_figure(title, width=width)
    shown = figure.get_suptitle()
    assert "\n" not in shown and style.finding(figure) == title
    assert shown == title or (shown.endswith("…") and len(title) > width * 12)
    box = figure._suptitle.get_window_extent()
    assert box.x1 <= figure.bbox.x1
