"""The end of a run: the loss curve, the verified export, and what the user sees."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gpt2repro.publishing.export import MAX_SHARD_SIZE, export
from gpt2repro.records import checkpoints
from gpt2repro.records.integrity import is_whole
from gpt2repro.records.metrics import comparable, read_metrics
from gpt2repro.system import atomic, processes, ranks
from gpt2repro.system.command_line import underway
from gpt2repro.system.text import printable
from gpt2repro.training.optim.averaging import averaged
from gpt2repro.training.run import Run, card_of
from modeling_gpt2repro import GPT2ReproForCausalLM


def finish(run: Run) -> int:
    """Export the trained model to `final/`, verified by a fresh process, and sum the run up.

    Where the average of its weights is better on held-out text, it goes to `final-ema/` beside.

    Every rank calls, since sharded weights are gathered. Then the others leave, and rank 0 goes on
    alone: nobody waits for its push, however long that takes. Returns 0.
    Signals end the process: all is saved, and the same command exports again.

    Raises:
        UserError: the export failed a check. The last checkpoint stands, and the same command tries
            again.
    """
    models = {run.directory.final: checkpoints.model_tensors(run.learner.model)}
    if ranks.any_rank(run.monitor.evaluations.average_is_better):
        with averaged(run.learner.model, run.learner.optimizer):
            models[run.directory.average] = checkpoints.model_tensors(run.learner.model)
    run.monitor.progress.close()
    if run.accelerator.is_main_process:
        run.directory.preempted.touch()  # until it is done, a scheduler should come back
    run.stop.close()
    ranks.leave_group()
    torch.cuda.empty_cache()  # the processes that load the export want room on this GPU, too
    if torch.cuda.is_initialized() and hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()  # and in memory; torch 2.11 keeps what it has pinned
    if run.accelerator.is_main_process:
        try:
            if _publish(run, models):
                run.directory.mark_finished(run.recipe.num_steps)
        finally:
            run.directory.preempted.unlink(missing_ok=True)
    return 0


def _publish(run: Run, models: dict[Path, dict[str, torch.Tensor]]) -> bool:
    """Export `models`, tensors by place; whether nothing is left to do then.

    A checkpoint that is not on the Hub yet is.
    """
    run.monitor.draw_loss_curve()
    metrics, average = read_metrics(run.directory.metrics), run.directory.average
    curve, newest = run.directory.loss_curve, run.checkpoints.newest
    record = checkpoints.record_of(newest) if newest and is_whole(newest) else None
    of = {average: f"the moving average, of decay {run.recipe.ema_decay}, of those in training"}
    with underway("Exporting the model ...", in_logs=True):
        for place, tensors in models.items():
            model = GPT2ReproForCausalLM(checkpoints.innermost(run.learner.model).config)
            model.load_state_dict(checkpoints.with_tied_head(tensors))
            card = card_of(run.recipe, run.learner, run.launch, metrics, curve.name, of.get(place))
            export(
                model.eval(),
                run.inputs.tokenizer,
                place,
                format=run.recipe.export_format,
                card=card,
                figures=[curve],
                record=None if place == average else record,  # no checkpoint of the chain
                # As on its branch: the same record, and no weights that have to be sent again.
                max_shard_size=sys.maxsize if record and record.branch else MAX_SHARD_SIZE,
            )
    if average not in models:
        atomic.remove(average)  # of a shorter run
    with underway("Letting it write ...", in_logs=True):
        paragraph = _paragraph(run)
    _summarize(run, metrics, paragraph)
    if (push := run.checkpoints.push) is not None:
        push.submit(run.directory.final, "The trained model")
        print(f"Waiting for the push to {run.recipe.hub_model_id} ...", flush=True)
        for problem in push.finish():
            print(f"push: {problem}")
        if push.url:
            print(f"Published       {push.url}")
    return push is None or not push.lacks


def _summarize(run: Run, metrics: list[dict[str, Any]], paragraph: str) -> None:
    """The last lines on the screen: where things are, what was reached, and what it writes."""
    directory = run.directory
    losses = [line["val_loss"] for line in comparable(metrics)]
    print()
    if losses:
        first, last = losses[0], losses[-1]
        share = f"{last / first:.0%} of its start"
        print(f"Validation loss {first:.4f} -> {last:.4f} nats per token ({share})")
    print(f"Model           {directory.final}")
    if directory.average.is_dir():
        print(f"Its average     {directory.average}: {metrics[-1]['val_loss_ema']:.4f}")
    print(f"Loss curve      {directory.loss_curve}")
    print(f"Metrics         {directory.metrics}")
    print(f"\n{printable(paragraph)}\n")
    model, prompt = map(shlex.quote, (str(directory.final), run.recipe.sample_prompt))
    print(f"More of it: gpt2repro generate --model {model} --prompt={prompt}")


def _paragraph(run: Run) -> str:
    """A paragraph written by `final/` in a fresh process, which loads it as anyone would.

    It is for show: the export was verified, and nothing that happens here is the run's failure.
    """
    command = [sys.executable, "-m", "gpt2repro", "generate", "--model", str(run.directory.final)]
    command += [f"--prompt={run.recipe.sample_prompt}", "--seed", str(run.recipe.seed)]
    own_code = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        result = subprocess.run(
            command,
            env=processes.environment(PYTHONUTF8="1", PYTHONPATH=os.pathsep.join(own_code)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except (OSError, ValueError) as error:  # no memory for a process; a prompt with a zero byte
        return f"(no sample: {error})"
    if result.returncode:
        return f"(no sample: {result.stderr.strip()[-300:]})"
    return result.stdout.strip()
