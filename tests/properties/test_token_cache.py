"""A cache of tokens that was damaged in any way is never other tokens, and never an error."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tiny_corpus import ByteEncoder, MemoryCorpus

from gpt2repro.data.rows.units import TokenUnit, UnitReader

TEXTS = st.lists(st.one_of(st.none(), st.text(max_size=30)), min_size=1, max_size=6)


def tokens(corpus: MemoryCorpus, directory: Path) -> list[list[int]]:
    """The first unit's documents by way of a cache in `directory`, with their bytes in all."""
    reader = UnitReader(corpus, ByteEncoder(), num_threads=1, token_cache_dir=directory)
    try:
        unit = reader.submit(0).result(timeout=60)
        assert isinstance(unit, TokenUnit)
        documents, num_bytes = unit.encode(range(len(unit)))
        return [*map(list, documents), [num_bytes]]
    finally:
        reader.close()


def damaged(content: bytes, damage: list[tuple[str, int, int]]) -> bytes:
    """Bits flipped, ends cut off or grown, stretches zeroed as after a loss of power."""
    for kind, place, amount in damage:
        place %= len(content) + 1
        if kind == "flip" and place < len(content):
            flipped = content[place] ^ (amount % 255 + 1)
            content = content[:place] + bytes([flipped]) + content[place + 1 :]
        elif kind == "cut":
            content = content[:place]
        elif kind == "grow":
            content += bytes(amount)
        elif kind == "zero":
            content = (content[:place] + bytes(amount) + content[place + amount :])[: len(content)]
    return content


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "grow", "zero"]),
        st.integers(0, 2**16),
        st.integers(0, 2**10),
    ),
    min_size=1,
    max_size=3,
)


@given(texts=TEXTS, damage=DAMAGE)
def test_damage_is_read_again(texts, damage):
    corpus = MemoryCorpus([texts])
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        expected = tokens(corpus, place)
        assert expected[:-1] == [list((text or "").encode()) for text in texts]
        [entry] = place.rglob("*.tokens")
        written = entry.read_bytes()
        entry.write_bytes(damaged(written, damage))
        is_damaged = entry.read_bytes() != written
        assert tokens(corpus, place) == expected
        assert len(corpus.reads) == 1 + is_damaged
        assert tokens(corpus, place) == expected and entry.read_bytes() == written
        assert len(corpus.reads) == 1 + is_damaged, "the good entry is back"


@given(texts=TEXTS, content=st.binary(max_size=100))
def test_anything_in_its_place_is_read_again(texts, content):
    corpus = MemoryCorpus([texts])
    with tempfile.TemporaryDirectory() as directory:
        expected = tokens(corpus, Path(directory))
        [entry] = Path(directory).rglob("*.tokens")
        entry.write_bytes(content)
        assert tokens(corpus, Path(directory)) == expected
