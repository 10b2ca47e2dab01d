"""Draws docs/stream.svg: how documents become the rows of a step.

    python docs/draw_stream.py

The order of the units is the stream's own, `Plan`, for a dataset small enough to draw.
"""

from pathlib import Path
from xml.sax.saxutils import escape

from gpt2repro.data.rows.order import Plan

NUM_UNITS, NUM_VALIDATION_UNITS, NUM_LANES, SEED = 14, 2, 4, 1337
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # of Okabe and Ito, for colour-blind eyes
GREY, INK, FAINT = "#9a9a9a", "#222222", "#666666"
WIDTH, HEIGHT, BOX, LEFT = 960, 620, 44, 30

Shape = str


def text(x: float, y: float, words: str, *, size: int = 15, colour: str = INK, **more) -> Shape:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{extra}>{escape(words)}</text>'


def box(x: float, y: float, width: float, colour: str, words: str = "", height=28) -> list[Shape]:
    shapes = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}" stroke="white"/>'
    ]
    if words:
        middle = {"text_anchor": "middle", "colour": "white"}
        shapes.append(text(x + width / 2, y + height / 2 + 5, words, size=14, **middle))
    return shapes


def line(
    x1: float, y1: float, x2: float, y2: float, colour: str = INK, width: float = 1.5
) -> Shape:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{width}"/>'
    )


def dataset(plan: Plan, y: float) -> list[Shape]:
    """The units in dataset order, each in the colour of the lane that reads it."""
    owner = {
        plan.piece(lane, 0, index).unit_index: lane
        for lane in range(NUM_LANES)
        for index in range(plan.num_pieces(lane))
    }
    shapes = [text(LEFT, y, "1. The dataset is numbered units: row groups of parquet files")]
    for unit in range(NUM_UNITS):
        colour = COLOURS[owner[unit]] if unit in owner else GREY
        shapes += box(LEFT + unit * BOX, y + 14, BOX, colour, str(unit))
    note = "grey: validation, never trained on"
    return [*shapes, text(LEFT + NUM_UNITS * BOX + 14, y + 33, note, size=13, colour=FAINT)]


def lanes(plan: Plan, y: float) -> list[Shape]:
    """Each lane's units in reading order, and which process owns the lane."""
    title = (
        "2. A seeded permutation deals them to lanes, anew each epoch; a process owns whole lanes"
    )
    shapes = [text(LEFT, y, title)]
    owners = LEFT + 620
    for column, world_size in enumerate((1, 2, 4)):
        heading = f"of {world_size}"
        shapes.append(text(owners + column * 90, y + 26, heading, size=13, colour=FAINT))
    for lane in range(NUM_LANES):
        top = y + 36 + lane * 34
        shapes.append(text(LEFT, top + 19, f"lane {lane}", size=14))
        x = LEFT + 70.0
        for epoch in (0, 1):
            for piece in (plan.piece(lane, epoch, n) for n in range(plan.num_pieces(lane))):
                shapes += box(x, top, BOX, COLOURS[lane], str(piece.unit_index))
                x += BOX
            x += 14
        shapes.append(text(x, top + 19, "...", size=14))
        for column, world_size in enumerate((1, 2, 4)):
            owner = f"process {lane % world_size}"
            shapes.append(text(owners + column * 90, top + 19, owner, size=13))
    under = y + 36 + NUM_LANES * 34 + 14
    shapes.append(text(LEFT + 70, under, "epoch 0", size=13, colour=FAINT))
    return [*shapes, text(LEFT + 70 + 3 * BOX + 14, under, "epoch 1", size=13, colour=FAINT)]


def packing(y: float) -> list[Shape]:
    """One lane's documents, back to back, cut into rows of T + 1 tokens every T tokens."""
    title = (
        "3. A lane is one endless text, cut into rows of T + 1 tokens every T tokens (here T = 8)"
    )
    cell, colour = 21.0, COLOURS[0]
    shapes = [text(LEFT, y, title)]
    x, count = LEFT + 70.0, 0
    for length in (6, 10, 3, 12, 7):  # tokens of a document, its end-of-text token first
        for token in range(length):
            fill = INK if token == 0 else colour
            shapes += box(x + count * cell, y + 16, cell, fill, height=22)
            count += 1
    for row in range(3):
        begin, end = x + row * 8 * cell, x + (row * 8 + 9) * cell
        top = y + 50 + (row % 2) * 18
        shapes += [line(begin, top, end, top, width=3)]
        shapes += [line(at, y + 42, at, top, FAINT, 1) for at in (begin, end)]
        shapes.append(text(begin + 4, top + 15, f"row {row}", size=13))
    at = x + 24 * cell
    shapes.append(line(at, y + 10, at, y + 92, "#D55E00", 2.5))
    note = "the lane's state after these rows: (epoch 0, unit 0 of its order, document 3, token 5)"
    shapes.append(text(at - 4, y + 106, note, size=13, colour="#D55E00", text_anchor="middle"))
    shapes += box(LEFT, y + 124, 16, INK, height=16)
    return [*shapes, text(LEFT + 24, y + 137, "<|endoftext|>, which begins a document", size=13)]


def step(y: float) -> list[Shape]:
    """The rows of one optimizer step."""
    title = (
        "4. A step takes the same number of rows from every lane: a set that no launch can change"
    )
    shapes = [text(LEFT, y, title)]
    for lane in range(NUM_LANES):
        for row in range(2):
            x = LEFT + 70 + (lane * 2 + row) * 92
            shapes += box(x, y + 16, 88, COLOURS[lane], f"lane {lane}")
    note = "rows_digest: a 64-bit sum over these rows, whoever holds them, in whatever order"
    return [*shapes, text(LEFT + 70, y + 64, note, size=13, colour=FAINT)]


def picture() -> str:
    plan = Plan(
        NUM_UNITS, num_lanes=NUM_LANES, num_validation_units=NUM_VALIDATION_UNITS, seed=SEED
    )
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *dataset(plan, 36),
        *lanes(plan, 122),
        *packing(352),
        *step(536),
        "</svg>",
    ]
    return "\n".join(shapes) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("stream.svg").write_text(picture(), encoding="utf-8")
