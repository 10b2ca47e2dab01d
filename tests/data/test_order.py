"""The order of units and documents: permutations that stay what they are."""

import hashlib

import numpy as np
import pytest
from tiny_streams import run, streams

from gpt2repro.data.rows.order import Piece, Plan, permutation


def test_permutations_are_fixed_for_ever():
    """Literal values: were they to change, no checkpoint would resume on its rows."""
    assert permutation(10, "units", 1, 0).tolist() == [4, 9, 5, 8, 1, 6, 3, 7, 0, 2]
    assert sorted(permutation(1000, "units", 1, 1)) == list(range(1000))
    assert permutation(0, "documents", 1, 0, 5, 0).tolist() == []


def test_long_permutations_are_fixed_for_ever():
    """Of a million there are some whose order rests on the last bits of their hashes."""
    order = permutation(2**20, "documents", 1, 0, 5, 0)
    digest = hashlib.blake2b(order.astype("<i8").data, digest_size=8).hexdigest()
    assert digest == "e0f80a310e3ce2e4"


@pytest.mark.parametrize("num_units", [116, 96, 128, 1000, 40])
def test_what_an_epoch_leaves_unread_is_known(num_units):
    """Lanes take pieces in turns until as many are read as an epoch has."""
    plan = Plan(num_units, num_lanes=64, num_validation_units=0, seed=1)
    each = [plan.num_pieces(lane) for lane in range(64)]
    mean = sum(each) / 64
    read = sum(min(n, mean) for n in each)  # in the first epoch; what is over is of the second
    assert plan.unread_share() == pytest.approx(1 - read / sum(each))
    assert (plan.unread_share() == 0) == (num_units == 128)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
@pytest.mark.parametrize("num_documents", [0, 1, 10, 11])
def test_the_parts_of_a_unit_hold_its_documents_once(num_documents, num_parts):
    """Contiguous ranges, about as long as each other, also where they cannot be equal."""
    orders = [
        Piece(5, part, num_parts).document_order(num_documents, seed=1, epoch=0)
        for part in range(num_parts)
    ]
    assert np.concatenate([sorted(order) for order in orders]).tolist() == [*range(num_documents)]
    lengths = [len(order) for order in orders]
    assert max(lengths) - min(lengths) <= 1


def test_documents_of_a_piece_come_in_another_order_every_time():
    """In another epoch, seed, unit or part."""
    piece = Piece(5, 0, 2)
    orders = [
        piece.document_order(200, seed=1, epoch=0),
        piece.document_order(200, seed=1, epoch=1),
        piece.document_order(200, seed=2, epoch=0),
        Piece(6, 0, 2).document_order(200, seed=1, epoch=0),
        Piece(5, 1, 2).document_order(200, seed=1, epoch=0) - 100,
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert all(sorted(order) == [*range(100)] for order in orders)


def test_epochs_and_seeds_differ():
    first, again = permutation(100, "units", 1, 0), permutation(100, "units", 1, 1)
    other = permutation(100, "units", 2, 0)
    assert (first != again).any() and (first != other).any()
    assert run(streams(seed=8), 1)[0] != run(streams(seed=7), 1)[0]
