"""The order of units and documents: permutations that stay what they are."""

from tiny_streams import run, streams

from gpt2repro.data.order import permutation


def test_permutations_are_fixed_for_ever():
    """Literal values: were they to change, no checkpoint would resume on its rows."""
    assert permutation(10, "units", 1, 0).tolist() == [4, 9, 5, 8, 1, 6, 3, 7, 0, 2]
    assert sorted(permutation(1000, "units", 1, 1)) == list(range(1000))
    assert permutation(0, "documents", 1, 0, 5, 0).tolist() == []


def test_epochs_and_seeds_differ():
    first, again = permutation(100, "units", 1, 0), permutation(100, "units", 1, 1)
    other = permutation(100, "units", 2, 0)
    assert (first != again).any() and (first != other).any()
    assert run(streams(seed=8), 1)[0] != run(streams(seed=7), 1)[0]
