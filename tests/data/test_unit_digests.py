"""Digests of units: recorded once, compared on later passes, by any number of processes."""

import re
from pathlib import Path

import pyarrow as pa
import pytest
import tiny_streams
from tiny_corpus import documents, write_lines
from tiny_streams import corpus, run

from gpt2repro import UserError
from gpt2repro.data.opening import open_corpus
from gpt2repro.data.rows.unit_digests import UnitDigests, digest_of

TEXTS = documents(120)


def streams(directory, texts=TEXTS, world_size=1, state=None, **options):
    return tiny_streams.streams(
        world_size, state, corpus(texts), unit_digests_dir=directory, **options
    )


def test_a_later_pass_reads_the_same_text(tmp_path):
    theirs, _, _ = run(streams(None), 60)
    digests, _, state = run(streams(tmp_path, world_size=2), 60)
    assert digests == theirs
    [file] = tmp_path.iterdir()
    units = {line.split()[0] for line in file.read_text().split("\n") if line}
    assert units == {*map(str, range(2, 12))}, "all that are trained on"
    size = file.stat().st_size
    run(streams(tmp_path, state=state), 60)
    assert file.stat().st_size == size


def test_another_text_is_refused_in_a_line(tmp_path):
    run(streams(tmp_path), 60)
    changed = [*TEXTS[:57], TEXTS[57].replace("the", "teh", 1), *TEXTS[58:]]
    assert changed != TEXTS
    with pytest.raises(UserError, match="unit 5 holds another text than when it was first") as told:
        run(streams(tmp_path, changed), 60)
    assert "\n" not in str(told.value)


def test_a_full_disk_costs_the_record_not_the_run(tmp_path, monkeypatch, caplog):
    open_file = Path.open

    def full(self, mode="r", *rest, **options):
        if mode == "ab":
            raise OSError(28, "No space left on device")
        return open_file(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    assert run(streams(tmp_path), 60)[0] == run(streams(None), 60)[0]
    assert caplog.text.count("unit_digests_dir: cannot write") == 1


def test_what_another_process_has_recorded_meanwhile_counts(tmp_path):
    """Both began with an empty record; which unit comes to whom changes with the epoch."""
    source = corpus(TEXTS)
    one, other = UnitDigests(tmp_path, source), UnitDigests(tmp_path, source)
    one.check(3, source.read_arrow(3))
    other.check(3, source.read_arrow(3))
    with pytest.raises(UserError, match="unit 3 holds another text"):
        other.check(3, source.read_arrow(4))
    later = UnitDigests(tmp_path, source)
    later.check(3, source.read_arrow(3))
    [file] = tmp_path.iterdir()
    assert len(file.read_bytes().split()) == 2


def test_other_local_files_of_the_same_name_are_another_dataset(tmp_path):
    for name, seed in (("en", 1), ("de", 2)):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "train.jsonl", documents(30, seed=seed))
        corpus = open_corpus(tmp_path / name)
        UnitDigests(tmp_path / "digests", corpus).check(0, corpus.read_arrow(0))
    assert len([*(tmp_path / "digests").iterdir()]) == 2


def test_a_line_that_was_cut_off_makes_no_other_unit(tmp_path):
    source = corpus(TEXTS)
    UnitDigests(tmp_path, source)
    [file] = tmp_path.iterdir()
    file.write_bytes(b"1")
    UnitDigests(tmp_path, source).check(1, source.read_arrow(1))
    assert re.findall(rb"^\d+ ", file.read_bytes(), re.MULTILINE) == [b"1 "]


def test_another_process_line_that_was_cut_off_makes_no_other_unit_either(tmp_path):
    source = corpus(TEXTS)
    ours = UnitDigests(tmp_path, source)
    [file] = tmp_path.iterdir()
    file.write_bytes(b"1")  # its disk was full
    ours.check(3, source.read_arrow(3))
    UnitDigests(tmp_path, source).check(9, source.read_arrow(9))
    assert re.findall(rb"^\d+ ", file.read_bytes(), re.MULTILINE) == [b"3 ", b"9 "]


def test_a_damaged_record_is_made_again(tmp_path):
    run(streams(tmp_path), 60)
    [file] = tmp_path.iterdir()
    file.write_bytes(b"2 00ff\n\xff\xfe junk\n3 " + b"0" * 10)  # the last line was cut off
    run(streams(tmp_path), 60)
    assert b"\n5 " in file.read_bytes()


def test_a_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="unit_digests_dir: cannot use"):
        run(streams(tmp_path / "file"), 1)


def test_a_digest_is_of_the_documents_and_not_of_how_they_lie_in_memory():
    texts = ["a", "", None, "bc" * 9, "naïve"]
    whole = digest_of(pa.array(texts, pa.large_string()))
    part = pa.array(["before", *texts, "after"], pa.large_string())[1:6]
    assert digest_of(part) == whole
    assert digest_of(pa.array(["a", "", "", *texts[3:]], pa.large_string())) == whole
    others = [[*texts[:3], "b", "c" + "bc" * 8, "naïve"], [*texts, ""], texts[::-1], []]
    assert len({whole, *(digest_of(pa.array(t, pa.large_string())) for t in others)}) == 5
