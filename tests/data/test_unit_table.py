"""The table of units: the same identity as ever, and footers that are read once."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_hub import FakeHub
from tiny_corpus import documents, joined, parquet_bytes

from gpt2repro.data.corpora import unit_table
from gpt2repro.data.corpora.corpus import digest
from gpt2repro.data.corpora.footers import Column
from gpt2repro.data.corpora.unit_table import PLACE, UNIT, UnitTable, kept
from gpt2repro.data.opening import open_corpus

NAME, PARQUET = "someone/texts", r"\.parquet$"
TEXTS = documents(120)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def hub(monkeypatch):
    with FakeHub() as hub:
        files = {f"{n}.parquet": parquet_bytes(TEXTS[40 * n :][:40], 10 + n) for n in range(3)}
        hub.add("datasets", NAME, files)
        hub.use_in_process(monkeypatch)
        yield hub


def num_footers(hub) -> int:
    """Read since this was last asked."""
    count = len(hub.requests(PARQUET))
    hub.log.clear()
    return count


def tables() -> list[Path]:
    return sorted(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.units"))


def units(number: int) -> np.ndarray:
    numbers = np.arange(len(UNIT.names) * number).reshape(number, len(UNIT.names))
    return np.array([(*row[:-1], 1) for row in numbers.tolist()], UNIT)


@pytest.mark.parametrize("number", [0, 1, 4, 5, 8, 11])
def test_the_digest_is_that_of_runs_that_began_before_there_was_a_table(monkeypatch, number):
    """Of all places as one list, whatever the parts that are hashed at a time."""
    monkeypatch.setattr(unit_table, "DIGESTED_AT_A_TIME", 4)
    table, names = units(number), ["a.parquet", "b.parquet"]
    places = [[int(unit[field]) for field in PLACE] for unit in table]
    assert UnitTable.of(names, [], table).digest == digest([names, digest(places)])


def test_a_second_start_reads_no_footer(hub):
    first = open_corpus(NAME)
    assert num_footers(hub) == 3
    second = open_corpus(NAME)
    assert num_footers(hub) == 0
    assert second.identity == first.identity
    assert (second._units == first._units).all() and second._columns == first._columns
    assert joined(second) == joined(first) == TEXTS


def test_another_commit_or_column_is_another_table(hub):
    files = {"0.parquet": parquet_bytes(TEXTS, 10, other=TEXTS[::-1])}
    repository = hub.repositories["datasets", NAME]
    then = repository.refs["main"]
    open_corpus(NAME)
    repository.commit(files)
    assert joined(open_corpus(NAME)) == TEXTS
    assert joined(open_corpus(NAME, text_column="other")) == TEXTS[::-1]
    assert len(tables()) == 3
    num_footers(hub)
    open_corpus(NAME, revision=then)
    assert num_footers(hub) == 0


def make() -> UnitTable:
    column = Column("text", 6, True, "string", "é")
    return UnitTable.of(["a.parquet"], [column], units(5))


def must_not_be_made() -> UnitTable:
    raise AssertionError


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_table_is_made_again(caplog, damage):
    kept("key", make)
    [table] = tables()
    whole = table.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    table.write_bytes({"cut": whole[:-41], "flip": flipped, "empty": b""}[damage])
    with pytest.raises(AssertionError):
        kept("key", must_not_be_made)
    assert "is damaged: reading the footers again" in caplog.text
    kept("key", make)
    assert table.read_bytes() == whole
    again = kept("key", must_not_be_made)
    assert (again.units == units(5)).all() and again.columns == make().columns


@pytest.mark.parametrize("home", ["a file", "nothing", "full"])
def test_without_a_place_for_tables_they_are_made_each_time(tmp_path, monkeypatch, home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if home == "a file":
        (tmp_path / "file").touch()
    elif home == "full":
        monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28)))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    for _ in range(2):
        assert (kept("key", make).units == units(5)).all()
    assert not [*tmp_path.rglob("*.units*")]


def test_processes_of_a_machine_make_it_once():
    made = []

    def slowly() -> UnitTable:
        made.append(1)
        time.sleep(0.2)
        return make()

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: kept("key", slowly), range(4)))
    assert len(made) == 1 and all((each.units == units(5)).all() for each in found)


def test_few_tables_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(unit_table, "NUM_KEPT", 3)
    for key in range(6):
        kept(key, lambda key=key: UnitTable.of(["a"], [], units(key)))
        for file in tmp_path.rglob("*.*"):  # all are ten seconds older: times are coarse
            os.utime(file, (file.stat().st_mtime - 10,) * 2)
    assert len(tables()) == 3
    for key in (3, 4, 5):
        assert len(kept(key, must_not_be_made).units) == key
