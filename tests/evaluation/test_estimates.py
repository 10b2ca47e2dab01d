"""Figures by hand, their standard errors, and evaluate's way across processes."""

import math
import multiprocessing

import numpy as np
import pytest

from gpt2repro.evaluation.estimates import Estimate, mean, perplexity, ratio, weighted
from gpt2repro.evaluation.evaluate_metrics import MultipleChoiceAccuracy


def test_mean_and_difference():
    ours, theirs = mean([1, 0, 1, 1]), mean([1, 0, 0, 1])
    assert ours.value == 0.75
    assert ours.stderr == pytest.approx(0.5 / 2)  # sample deviation of 1, 0, 1, 1 is 1/2
    difference = ours - theirs
    assert difference.value == 0.25
    assert difference.stderr == pytest.approx(0.25)  # of 0, 0, 1, 0; unpaired it would be 0.38
    assert math.isnan(mean([1.0]).stderr)
    right, wrong = mean([True, True]), mean([False, True])  # answers, as metrics have them
    assert (right - wrong).value == 0.5 and (right - wrong).stderr == pytest.approx(0.5)


def test_a_factor_stretches_the_error_too():
    estimate = mean([1, 0, 1, 1])
    assert (estimate * 3).value == 2.25 and (estimate * 3).stderr == pytest.approx(3 * 0.25)


def test_ratio_weighs_by_size():
    estimate = ratio(np.array([2.0, 9.0]), np.array([1.0, 3.0]))
    assert estimate.value == 11 / 4
    # Residuals 2 - 2.75 and 9 - 8.25, over the mean size 2: +-0.375, whose deviation is 0.53.
    assert estimate.stderr == pytest.approx(0.375)
    assert ratio([2.0, 4.0], [1.0, 2.0]).stderr == 0, "equal rates have no error"


@pytest.mark.parametrize("counts", [(4,), (2, 2, 2), (3, 50), (40, 20, 10)])
def test_the_error_of_a_weighted_mean_is_that_of_its_parts(counts):
    """Of which each is estimated from its own examples, also where these are few."""
    rng = np.random.default_rng(0)
    parts = [mean(rng.normal(size=count)) for count in counts]
    weights = [1 / len(counts)] * len(counts)
    expected = sum((w * part.stderr) ** 2 for w, part in zip(weights, parts, strict=True)) ** 0.5
    assert weighted(parts, weights).stderr == pytest.approx(expected)
    if len(counts) > 1:
        assert math.isnan(weighted([mean([1.0]), parts[0]], [0.5, 0.5]).stderr)
    assert math.isnan(weighted([mean([1.0])], [1.0]).stderr)


def test_exp_by_the_delta_method():
    log = Estimate(2.0, np.array([1.0, 3.0]))
    assert log.exp().value == pytest.approx(math.exp(2))
    assert log.exp().stderr == pytest.approx(math.exp(2) * log.stderr)


def test_choices_by_hand():
    found = MultipleChoiceAccuracy(keep_in_memory=True).compute(
        # By sum: 0, 1, 0. Divided: (-2, -1), (-1, -2), (-1, -1).
        predictions=[[-2.0, -4.0], [-4.0, -2.0], [-3.0, -3.0]],
        lengths=[[1, 4], [4, 1], [3, 3]],
        references=[0, 0, 0],
    )
    assert found["acc"] == pytest.approx(2 / 3)  # the tie goes to the first
    assert found["acc_norm"] == pytest.approx(2 / 3)
    assert found["acc_stderr"] == pytest.approx((1 / 3) ** 0.5 / 3**0.5)  # deviation of 1, 0, 1


def test_a_tie_goes_to_the_first_even_when_the_last_is_right():
    found = MultipleChoiceAccuracy(keep_in_memory=True).compute(
        predictions=[[-3.0] * 4, [-3.0] * 4], lengths=[[1] * 4] * 2, references=[3, 0]
    )
    assert found["acc"] == found["acc_norm"] == 0.5


def test_a_corpus_by_hand():
    found = perplexity([-math.log(2) * 6, -math.log(2) * 2], [3, 1], [12, 4])
    assert found["loss"].value == pytest.approx(2 * math.log(2))
    assert found["token_perplexity"].value == pytest.approx(4)
    assert found["bits_per_byte"].value == pytest.approx(0.5)
    assert found["loss"].stderr == pytest.approx(0, abs=1e-12)
    unequal = perplexity([-math.log(2) * 6, -math.log(2) * 2], [1, 3], [12, 4])
    assert unequal["loss"].stderr > 0
    assert set(perplexity([-1.0], [1], [0])) == {"loss", "token_perplexity"}


def _one_process(rank: int, cache_dir: str, queue) -> None:
    metric = MultipleChoiceAccuracy(
        num_process=2, process_id=rank, experiment_id="test", cache_dir=cache_dir
    )
    for number in range(3):  # rounds, without any barrier between them
        found = metric.compute(
            predictions=[[-1.0, -2.0], [-float(number), -0.5]],
            lengths=[[1, 4]] * 2,
            references=[rank, 1],
        )
        queue.put((rank, number, found))


def test_two_processes_and_several_rounds(tmp_path):
    """evaluate's own bookkeeping times out or mixes rounds here; see `Metric._init_writer`."""
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    processes = [
        spawn.Process(target=_one_process, args=(rank, str(tmp_path), queue)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = {
        (rank, number): value for rank, number, value in (queue.get(timeout=120) for _ in "123456")
    }
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    for number in range(3):
        assert found[1, number] is None
        examples = [True, number > 0, False, number > 0]
        assert found[0, number]["acc"] == np.mean(examples)
        assert found[0, number]["acc_norm"] == np.mean([False, number > 0, True, number > 0])
