"""What a step trains on, as text, without training: rows, documents, and who saw what.

    gpt2repro rows --recipe demo --step 120 --row 3
    gpt2repro rows --recipe demo --step 300 --find "os.path"
    gpt2repro rows --checkpoint runs/demo/checkpoints/step_00000200 --seen

Streams up to the step, at the speed of the encoder; from a checkpoint on if one is given, whose
recipe is then the recipe. --find takes a part of the text, a document as UNIT:DOCUMENT, or its
digest, and tells which of the steps before --step, or the checkpoint's, had tokens of it.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gpt2repro import UserError
from gpt2repro.commands.parser import path, recipe_parser
from gpt2repro.recipe import load_recipe, parse_arguments
from gpt2repro.recipe_fields import Recipe
from gpt2repro.system.text import printable

if TYPE_CHECKING:
    from gpt2repro.data.rows.producer import StepRows
    from gpt2repro.data.rows.stream import TokenStream
    from gpt2repro.data.rows.tracing import Place, TracedRow

MOST_FOUND = 1000  # documents that --find looks out for
# What a recipe may have written; given beside --checkpoint they are used.
CACHES = ("token_cache_dir", "unit_digests_dir")


def main(argv: list[str]) -> int:
    """Print rows or sightings; exit status 1 if --find finds nothing."""
    options, state, recipe = _parse(argv)
    if recipe.num_steps is not None and (options.step or 0) > recipe.num_steps:
        said = f"num_steps is {recipe.num_steps}: this is what a longer run would go on with."
        print(f"note  {said}", file=sys.stderr)
    reader = Reader(recipe, is_decided=state is not None)
    try:
        begin = state["step"] if state is not None else 0
        step = begin if options.step is None else options.step
        if state is not None and step >= begin and options.find is None:
            reader.go_on_from(state)
        if options.find is not None:
            return _print_sightings(reader, options.find, step)
        reader.go_to(step)
        if options.seen:
            print(json.dumps(reader.seen()))
            return 0
        for text in reader.rows(options.row):
            print(printable(text))
    finally:
        reader.stream.close()
    return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any] | None, Recipe]:
    parser = recipe_parser("rows", __doc__)
    parser.add_argument("--step", type=int, help="which step; 0, or the checkpoint's, by default")
    parser.add_argument("--row", type=int, help="one of its rows")
    parser.add_argument("--find", help="text, UNIT:DOCUMENT or digest of documents")
    parser.add_argument("--checkpoint", type=path, help="directory of a checkpoint of the run")
    parser.add_argument("--seen", action="store_true", help="what was read until there, as JSON")
    options, rest = parser.parse_known_args(argv)
    if options.find == "":
        raise UserError("--find: it is empty")
    if options.find and (options.seen or options.row is not None):
        raise UserError("--find: leave --row and --seen out; it looks at all rows")
    for name in ("step", "row"):
        if (getattr(options, name) or 0) < 0:
            raise UserError(f"--{name}: {getattr(options, name)} is below 0")
    if options.checkpoint is None:
        return options, None, load_recipe(rest)
    given = parse_arguments(rest)
    if stray := [name for name in given if name not in CACHES]:
        raise UserError(f"--{stray[0]}: the checkpoint has its recipe; leave it out")
    from gpt2repro.records.checkpoints import read_state

    state = read_state(options.checkpoint, "--checkpoint")
    saved = {key: value for key, value in state["recipe"].items() if key in Recipe.model_fields}
    saved |= dict.fromkeys(CACHES) | given  # no checkpoint says where to write
    return options, state, Recipe(**(load_recipe([]).model_dump() | saved))


class Reader:
    """The stream of a recipe, with its rows as text."""

    def __init__(self, recipe: Recipe, *, is_decided: bool) -> None:
        """`is_decided`: the recipe is a run's, and says how many units are held out."""
        from gpt2repro.data.tokens.encoder import BulkEncoder
        from gpt2repro.training import inputs

        self.tokenizer = inputs.open_tokenizer(recipe)
        encoder = BulkEncoder(self.tokenizer)
        self.sources = inputs.open_datasets(
            recipe, None if is_decided else encoder, recipe.model_dump()
        )
        self.stream: TokenStream = inputs.open_stream(recipe, self.sources, encoder, 0, 1)
        self._batches = recipe.batches
        self.texts = lru_cache(maxsize=16)(self._texts)

    def _texts(self, source: int, unit: int) -> list[str]:
        """The documents of a unit."""
        import numpy as np

        corpus = self.sources[source].corpus
        if (tokens := corpus.read_tokens(unit, self.stream.encoder)) is None:
            return corpus.read_unit(unit)
        ids, ends, _ = tokens
        return [self.tokenizer.decode(each) for each in np.split(ids, ends[:-1])[: len(ends)]]

    def go_on_from(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])

    @property
    def step(self) -> int:
        return self._batches.steps_in(self.stream.lanes[0].step)

    def take(self) -> "StepRows":
        """The next step's."""
        from gpt2repro.data.rows.producer import joined

        return joined([next(self.stream) for _ in range(self._batches.of(self.step))])

    def go_to(self, step: int) -> None:
        from gpt2repro.training.progress import phase

        with phase("streaming to the step", step - self.step, enabled=True) as on_step:
            while self.step < step:
                self.take()
                on_step(1)

    def rows(self, only: int | None) -> Iterator[str]:
        """The next step's rows, each checked against what the stream gives."""
        from gpt2repro.data.rows.packing import rows_digest
        from gpt2repro.data.rows.producer import joined
        from gpt2repro.data.rows.tracing import trace

        step, given = self.step, []
        traced: list[TracedRow] = []
        for _ in range(self._batches.of(step)):
            traced += trace(self.stream, self.stream.lanes)
            given.append(next(self.stream))
        whole = joined(given)
        assert [row.tokens.tolist() for row in traced] == whole.tokens.tolist()
        if only is not None and only >= len(traced):
            raise UserError(f"--row: {only} of {len(traced)} rows, which are numbered from 0")
        yield f"step {step}, rows_digest {whole.digest:016x}, {len(traced)} rows"
        for number, row in enumerate(traced):
            if only in (None, number):
                digest = rows_digest(row.tokens[None])
                yield f"\n--- row {number}, lane {row.lane}, digest {digest:016x}"
                yield from self._parts(row)

    def _parts(self, row: "TracedRow") -> Iterator[str]:
        for part in row.stretches:
            corpus = self.sources[row.source].corpus
            last = part.first_token + len(part.tokens) - 1
            name = _name(row.source, part.unit, part.document, len(self.sources))
            text = self.texts(row.source, part.unit)[part.document]
            yield (
                f"[document {name} of {corpus.where(part.unit)}, tokens {part.first_token} to "
                f"{last}, digest {_digest(text)}]"
            )
            yield self.tokenizer.decode(part.tokens[int(part.first_token == 0) :])

    def seen(self) -> dict[str, Any]:
        from gpt2repro.data.rows.tracing import consumed

        read = consumed(self.stream, self.stream.lanes)
        return {"step": self.step, "identity": self.stream.identity, "read": read}


def _name(source: int, unit: int, document: int, num_sources: int) -> str:
    """A document, as --find takes it."""
    return f"{source}:{unit}:{document}" if num_sources > 1 else f"{unit}:{document}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _places(reader: Reader, wanted: str) -> "dict[Place, int]":
    """The documents that --find means, with how many their units have."""
    from gpt2repro.data.rows.tracing import Place, find_documents

    if re.fullmatch(r"(\d+:)?\d+:\d+", wanted):
        *source, unit, document = map(int, wanted.split(":"))
        place = Place(source[0] if source else 0, unit, document)
        in_source = place.source < len(reader.sources)
        if in_source and unit < reader.sources[place.source].num_validation_units:
            raise UserError(f"--find: unit {unit} is held out: no step trains on it")
        if not in_source or unit >= reader.sources[place.source].corpus.num_units:
            raise UserError(f"--find: the dataset has no unit {wanted.rpartition(':')[0]}")
        size = len(reader.texts(place.source, unit))
        if document >= size:
            raise UserError(f"--find: unit {unit} has {size} documents, numbered from 0")
        return {place: size}
    is_digest = bool(re.fullmatch(r"[0-9a-f]{32}", wanted))

    def is_meant(text: str) -> bool:
        return _digest(text) == wanted if is_digest else wanted in text

    found = {}
    for place in find_documents(reader.stream, is_meant, reader.texts):
        found[place] = len(reader.texts(place.source, place.unit))
        if len(found) > MOST_FOUND:
            raise UserError(f"--find: more than {MOST_FOUND:,} documents have that; say more of it")
    return found


def _print_sightings(reader: Reader, wanted: str, until: int) -> int:
    """Which of the steps before `until` saw the documents."""
    from gpt2repro.data.rows.tracing import Sightings

    places = _places(reader, wanted)
    names = {place: _name(*place, len(reader.sources)) for place in places}
    if not places:
        print("no document that is trained on has that")
        return 1
    print(f"{len(places)} documents: {', '.join(list(names.values())[:10])}")
    sightings = Sightings(reader.stream, places)
    num_seen = 0
    while reader.step < until:
        step, before = reader.step, reader.stream.lanes
        reader.take()
        for lane, place in sightings.of_step(before, reader.stream.lanes):
            num_seen += 1
            print(f"step {step}, lane {lane}: document {names[place]}")
    print(f"seen {num_seen} times in the first {until} steps")
    return 0 if num_seen else 1
