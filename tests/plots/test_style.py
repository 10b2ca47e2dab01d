"""The labels that all pictures share."""

import warnings
from xml.etree import ElementTree

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


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_control_character_does_not_end_a_picture(tmp_path, kind):
    figure, [[ax]] = style.new_figure("a\x1b[31mred\x00\uffff title")
    ax.plot([1, 2], label="a\x1b[31mred run")
    style.legend(ax)
    style.caption(figure, "a\x07 prompt")
    style.save(figure, path := tmp_path / f"a.{kind}")
    assert "\x1b" not in style.finding(figure)
    if kind == "svg":
        ElementTree.parse(path)  # else: not well-formed (invalid token)


@pytest.mark.parametrize("words", ["Some words of a text, ", "SOME WORDS OF A TEXT, ", "漢字"])
def test_a_caption_ends_within_the_picture(words):
    figure, _ = style.new_figure("A title")
    style.caption(figure, words * 50)
    label = figure._supxlabel
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        assert label.get_window_extent().x1 <= figure.bbox.x1
    assert label.get_text().endswith("…") and len(label.get_text()) > 30


def test_ticks_that_differ_read_differently():
    ticks = style.ShortNumbers().format_ticks
    assert ticks([2.19e6, 2.195e6, 2.2e6]) == ["2.190M", "2.195M", "2.200M"]
    assert ticks([0, 0.5e9, 1e9]) == ["0", "0.5B", "1.0B"]
    assert ticks([0, 20_000, 40_000]) == ["0", "20k", "40k"]
    assert ticks([0.25, 0.5]) == ["0.25", "0.50"] and ticks([]) == []
    assert ticks([1500]) == ["1.5k"] and ticks([5, 5]) == ["5", "5"]


def test_no_zero_has_a_sign():
    assert [style.signed(value) for value in (-0.001, 0.004, -0.5)] == ["0.00", "0.00", "−0.50"]


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


def test_a_row_of_the_embedding_that_is_no_token_is_its_number():
    tokenizer = tiny_tokenizer()
    assert style.token_labels(tokenizer, [len(tokenizer) + 5]) == [f"<{len(tokenizer) + 5}>"]


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
