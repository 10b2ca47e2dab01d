"""Pretrain a stock GPT-2 with transformers' Trainer on the exact stream.

    python examples/stream_trainer.py --dataset_name texts/ --tokenizer openai-community/gpt2
    torchrun --nproc_per_node 2 examples/stream_trainer.py ...    # the same rows

Trainer by itself resumes a stream by reading all that was seen once more, and its processes must
stay as many as they were. Here each checkpoint holds the stream's state: the same command goes on
at the next row, with any number of processes that divides the lanes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from gpt2repro.data import ExactStream
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.token_ids import begin_id, num_ids


class StreamTrainer(Trainer):
    """Every process reads its own rows, so accelerate must neither split batches nor send them."""

    def get_train_dataloader(self) -> DataLoader:
        stream: Any = self.train_dataset
        return DataLoader(stream, batch_size=None)


class SaveStream(TrainerCallback):
    """The stream's state goes into each checkpoint and comes back from the one that is resumed.

    Each step prints the digest of its rows: the same for any number of processes.
    """

    def __init__(self, stream: ExactStream) -> None:
        self.stream = stream

    def on_save(self, args, state, control, **_) -> None:
        saved = self.stream.state_dict()  # every process calls, when it has saved what is its own
        if state.is_world_process_zero:
            unfinished = self._file(args, state).with_suffix(".partial")
            unfinished.write_text(json.dumps(saved), encoding="utf-8")
            unfinished.replace(self._file(args, state))  # the checkpoint is whole

    def on_train_begin(self, args, state, control, **_) -> None:
        if state.global_step > 0:
            saved = json.loads(self._file(args, state).read_text(encoding="utf-8"))
            self.stream.load_state_dict(saved)

    def on_step_end(self, args, state, control, **_) -> None:
        digest = sum(gather_object([self.stream.digest])) % 2**64  # every process calls
        if state.is_world_process_zero:
            print(f"step {state.global_step}: rows {digest:016x}", flush=True)

    def _file(self, args, state) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "stream.json"


def last_checkpoint(output: str) -> str | None:
    """The last one that is whole: a kill may have left a later one half written."""
    whole = [path.parent for path in Path(output).glob("checkpoint-*/stream.json")]
    last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    return None if last is None else str(last)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--dataset_name")
    data.add_argument("--datasets", type=json.loads, dest="dataset_name", help="a mixture, as JSON")
    add("--dataset_config")
    add("--tokenizer", default="openai-community/gpt2")
    add("--output", default="runs/trainer")
    add("--sequence_length", type=int, default=1024)
    add("--rows_per_step", type=int, default=64)
    add("--micro_batch_size", type=int, default=8)
    add("--num_lanes", type=int)
    add("--num_layers", type=int, default=12)
    add("--width", type=int, default=768)
    add("--max_steps", type=int, default=1000)
    add("--save_steps", type=int, default=100)
    return parser.parse_args()


def main() -> None:
    options = parse()
    tokenizer = load_tokenizer(options.tokenizer)
    settings = TrainingArguments(
        options.output,
        max_steps=options.max_steps,
        save_steps=options.save_steps,
        logging_steps=1,
        learning_rate=6e-4,
        report_to=[],
        ignore_data_skip=True,  # the stream knows where it was
    )
    stream = ExactStream(  # only now: TrainingArguments has found out how many processes there are
        options.dataset_name,
        config=options.dataset_config,
        tokenizer=tokenizer,
        sequence_length=options.sequence_length,
        rows_per_step=options.rows_per_step,
        micro_batch_size=options.micro_batch_size,
        num_lanes=options.num_lanes,
    )
    settings.gradient_accumulation_steps = stream.batches_per_step
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=num_ids(tokenizer),
            n_positions=options.sequence_length,
            n_layer=options.num_layers,
            n_embd=options.width,
            n_head=max(1, options.width // 64),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=begin_id(tokenizer),
            eos_token_id=begin_id(tokenizer),
        )
    )
    trainer = StreamTrainer(model, settings, train_dataset=stream, callbacks=[SaveStream(stream)])
    trainer.train(resume_from_checkpoint=last_checkpoint(options.output))
    stream.close()


if __name__ == "__main__":
    main()
