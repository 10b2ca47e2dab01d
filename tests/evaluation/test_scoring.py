"""In a training loop: the same figures on any engine, and the rows it reads."""

import math
import multiprocessing
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from tiny_language_models import (
    HELLASWAG,
    VOCAB_SIZE,
    random_gpt2,
    task_files,
    tiny_tokenizer,
    uniform_gpt2,
)
from tiny_run import free_port
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.evaluation.benchmarks import open_tasks
from gpt2repro.evaluation.estimates import mean
from gpt2repro.evaluation.likelihoods import NUM_SHAPES
from gpt2repro.evaluation.scoring import score_task, score_tasks
from gpt2repro.evaluation.task import Task
from gpt2repro.evaluation.validation import validation_loss
from gpt2repro.evaluation.writing import Prompt
from gpt2repro.system import ranks
from modeling_gpt2repro import GPT2ReproForCausalLM

T = 24
ROWS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (11, T + 1)).astype(np.uint16)


@torch.no_grad()
def mean_loss(model, rows: np.ndarray) -> float:
    """The definition: every row alone, in float64, tokens weigh the same."""
    tokens = torch.from_numpy(rows.astype(np.int64))
    log_p = model(tokens[:, :-1]).logits.double().log_softmax(-1)
    return -log_p.gather(2, tokens[:, 1:, None]).mean().item()


def ours(make=random_gpt2, **overrides) -> GPT2ReproForCausalLM:
    """Our class on the weights of a stock GPT-2."""
    shape = {"vocab_size": VOCAB_SIZE, "n_positions": 512, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=0, **overrides))
    model.load_state_dict(make().state_dict())
    return model.eval()


# --- validation loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_the_loss_does_not_depend_on_the_batch(batch_size):
    model = ours()
    result = validation_loss(model, ROWS, batch_size=batch_size)
    # The model's own loss is a float32 mean over a batch: 2**-24 relative, a few of them summed.
    assert result.loss == pytest.approx(mean_loss(model, ROWS), rel=1e-6)
    assert result.num_tokens == 11 * T


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_loss_does_not_depend_on_the_world(world_size):
    model = ours()
    sums, forwards = [], []
    for rank in range(world_size):
        shapes = []
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs, shapes=shapes: shapes.append(kwargs["input_ids"].shape),
            with_kwargs=True,
        )
        validation_loss(
            model,
            ROWS,
            batch_size=2,
            rank=rank,
            world_size=world_size,
            reduce=lambda tensor: sums.append(tensor) or tensor,
        )
        hook.remove()
        forwards.append(shapes)
    nats, num_tokens = torch.stack(sums).sum(dim=0)
    assert num_tokens == 11 * T, "filler rows do not count"
    assert (nats / num_tokens).item() == pytest.approx(mean_loss(model, ROWS), rel=1e-6)
    assert all(shapes == forwards[0] for shapes in forwards), "ranks run alike, or FSDP hangs"
    assert set(forwards[0]) == {(2, T)}


class ATenth(torch.nn.Linear):
    """A model that finds every loss to be 0.1."""

    def forward(self, **given):
        return SimpleNamespace(loss=torch.tensor(0.1, dtype=torch.float64))


def test_sums_are_in_float64_and_each_batch_is_told():
    """A tenth has no float32: added up there, the eighth digit of the mean would be wrong."""
    told = []
    result = validation_loss(ATenth(1, 1), ROWS, batch_size=4, on_batch=told.append)
    assert result.loss == pytest.approx(0.1, rel=1e-12)
    assert sum(told) == len(ROWS) and told[0] == 4


def test_a_uniform_model_scores_ln_v_and_bits_per_byte():
    result = validation_loss(ours(uniform_gpt2), ROWS, batch_size=4)
    assert result.loss == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)
    bits = result.bits_per_byte(4 * result.num_tokens)
    assert bits == pytest.approx(math.log2(VOCAB_SIZE) / 4, rel=1e-6)


def test_the_model_sees_rows_laid_out_as_in_training():
    """Else a compiler would make the training step fit for several shapes or strides."""
    seen = []
    model = ours()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend([kwargs["input_ids"], kwargs["shift_labels"]]),
        with_kwargs=True,
    )
    validation_loss(model, ROWS, batch_size=16)  # more than there are
    assert {(tensor.shape, tensor.stride()) for tensor in seen} == {((16, T), (T, 1))}


def test_a_compiled_model_compiles_once():
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    model = ours()
    model.compile(backend=counter, dynamic=False)  # in place, as in training
    result = validation_loss(model, ROWS, batch_size=4)  # the last batch has 3 rows
    torch._dynamo.reset()
    assert counter.frame_count == 1
    assert result.loss == pytest.approx(mean_loss(ours(), ROWS), rel=1e-6)


def test_a_stop_ends_it():
    answers = iter([False, True])
    assert validation_loss(ours(), ROWS, batch_size=2, should_stop=lambda: next(answers)) is None


def test_the_model_goes_on_training_afterwards():
    model = ours(resid_pdrop=0.5).train()
    first, second = (validation_loss(model, ROWS, batch_size=4) for _ in range(2))
    assert first == second
    assert model.training


# --- HellaSwag in the loop ------------------------------------------------------------------------


def hellaswag() -> list[Task]:
    names, file = ["hellaswag_completion"], str(HELLASWAG)
    return open_tasks(names, tiny_tokenizer(), max_length=512, hellaswag_file=file)


def test_hellaswag_has_two_figures_with_errors():
    tasks = hellaswag()
    found = score_tasks(random_gpt2(), tasks, batch_size=8)
    names = [f"hellaswag/completion_{metric}" for metric in ("acc", "acc_norm")]
    assert set(found) == {*names, *(f"{name}_stderr" for name in names)}
    assert all(0 <= found[name] <= 1 for name in names)
    assert found == score_tasks(random_gpt2(), tasks, batch_size=3)


def test_hellaswag_between_compiled_training_steps_compiles_once():
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    model = random_gpt2().train()
    model.compile(backend=counter)  # in place and with dynamo's defaults, as in training
    tasks = hellaswag()
    graphs = []
    for _ in range(2):
        model(input_ids=torch.zeros(4, T, dtype=torch.int64)).logits.sum().backward()
        graphs.append(counter.frame_count)
        found = score_tasks(model, tasks, batch_size=4)
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[0] == 1
    assert graphs[1] <= 1 + NUM_SHAPES
    assert graphs[1:] == [graphs[1]] * 3, "nothing is compiled again"
    assert found == score_tasks(random_gpt2(), tasks, batch_size=4)


def test_tasks_in_one_pass_have_the_figures_that_each_has_alone(tmp_path):
    model, tokenizer = random_gpt2(), tiny_tokenizer()
    directory, names = str(task_files(tmp_path)), ["ours_lambada", "ours_wikitext"]
    tasks = [*hellaswag(), *open_tasks(names, tokenizer, max_length=512, tasks_dir=directory)]
    together = score_tasks(model, tasks, batch_size=8)
    for task in tasks:
        alone = score_task(model, task, batch_size=8)
        assert alone.task is task and 0 < alone.seconds < 60 and 0 < alone.padding_waste < 1
        for name, estimate in alone.estimates.items():
            # Other batches, other float32 rounding.
            assert together.pop(name) == pytest.approx(estimate.value, rel=1e-4)
            assert together.pop(f"{name}_stderr") == pytest.approx(estimate.stderr, rel=1e-4)
    assert not together
    assert score_task(model, tasks[0], batch_size=8, should_stop=lambda: True) is None


def test_hellaswag_stops():
    tasks = hellaswag()
    assert score_tasks(random_gpt2(), tasks, batch_size=8, should_stop=lambda: True) is None


class Writing(Task):
    """Prompts of several lengths, to be continued by so many ids; an even one ends a text."""

    name, prefix, asked = "writing", "writing/", "prompt"

    def parse(self, row):
        return row

    def encode(self, tokenizer, examples):
        self.prompts = [Prompt(*each, lambda new: new[-1] % 2 == 0) for each in examples]
        return [[] for _ in examples]

    def score(self, scores):
        return {"digest": mean([np.dot(ids, range(1, len(ids) + 1)) for ids in scores.written])}


def _evaluate(model, **how):
    prompts = [(list(range(7 * n, 9 * n + 1)), 9) for n in range(1, 6)]
    # There is no room for the nine of the others.
    prompts += [([*range(50)] * 10 + [*range(n, n + 10)], 2) for n in range(3)]
    tasks = [*hellaswag(), Writing(prompts, None, max_length=512)]
    loss = validation_loss(model, ROWS, batch_size=2, **how)
    return loss.loss, score_tasks(model, tasks, batch_size=8, **how)


def _one_rank(rank: int, port: int, queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        how = {"rank": rank, "world_size": 2, "reduce": ranks.reduce_sum}
        replicated = torch.nn.parallel.DistributedDataParallel(ours())
        sharded = fully_shard(ours(), mesh=init_device_mesh("cpu", (2,)))
        queue.put([_evaluate(model, **how) for model in (replicated, sharded)])
    finally:
        dist.destroy_process_group()


def test_two_processes_agree_with_one():
    """A real process group; DDP's forward has to be looked for inside, FSDP's waits for peers."""
    port = free_port()
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    processes = [spawn.Process(target=_one_rank, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [result for _ in processes for result in queue.get(timeout=120)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    loss, hellaswag = _evaluate(ours())
    assert len(found) == 4
    for their_loss, their_hellaswag in found:
        assert their_loss == pytest.approx(loss, rel=1e-7)  # float64 sums in another order
        assert their_hellaswag == hellaswag
