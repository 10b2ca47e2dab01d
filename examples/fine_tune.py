"""Fine-tune a GPT-2 on local text files.

    accelerate launch examples/fine_tune.py --text my_novel.txt --output my_gpt2

The model is any GPT-2 checkpoint: OpenAI's smallest (the default), another on the Hub, a directory.
The last tenth of the text is held out; the loss on it is printed before and after.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer

from modeling_gpt2repro import GPT2ReproForCausalLM


def main() -> None:
    options = parse()
    if missing := [str(path) for path in options.text if not path.is_file()]:
        raise SystemExit(f"--text: no such file: {', '.join(missing)} (of a directory, DIR/*.txt)")
    set_seed(options.seed)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = GPT2ReproForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, trust_remote_code=False
    )

    length = min(options.sequence_length, model.config.n_positions)
    train, held_out = rows_of(options.text, tokenizer, length)
    loader = DataLoader(
        TensorDataset(train), batch_size=options.batch_size, shuffle=True, drop_last=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if len(loader) == 0:
        raise SystemExit("--batch-size: the text does not fill a single batch")
    held_out = held_out.to(accelerator.device)

    before = evaluate(model, held_out, options.batch_size)
    accelerator.print(f"held-out loss before: {before:.4f} nats per token")
    num_steps = options.epochs * len(loader)
    step = 0
    for _ in range(options.epochs):
        for (rows,) in loader:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * (1 - step / num_steps)
            loss = model(rows[:, :-1], shift_labels=rows[:, 1:].contiguous()).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0 or step == num_steps:
                accelerator.print(f"step {step}/{num_steps}  loss {loss.item():.4f}")
    after = evaluate(model, held_out, options.batch_size)
    accelerator.print(f"held-out loss after:  {after:.4f} nats per token")

    accelerator.unwrap_model(model).save_pretrained(
        options.output, is_main_process=accelerator.is_main_process
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(options.output)
        print(f"saved to {options.output}")
    accelerator.end_training()


def rows_of(paths: list[Path], tokenizer, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The files, each after an end-of-text token, as rows (N, length + 1) that overlap by one.

    Returns the first nine tenths of the rows and the rest.
    """
    ids = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SystemExit(f"--text {path}: no UTF-8 (`iconv` makes it so): {error}") from None
        ids += [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    if len(ids) < 2 * length + 1:
        raise SystemExit(f"--text: {len(ids)} tokens are too few for rows of {length}")
    rows = torch.tensor(ids).unfold(0, length + 1, length)
    count = max(1, len(rows) // 10)
    return rows[:-count], rows[-count:]


@torch.no_grad()
def evaluate(model: torch.nn.Module, rows: torch.Tensor, batch_size: int) -> float:
    """Mean loss over all tokens of `rows`, in nats."""
    model.eval()
    total = sum(
        model(batch[:, :-1], shift_labels=batch[:, 1:].contiguous()).loss.item() * len(batch)
        for batch in rows.split(batch_size)
    )
    model.train()
    return total / len(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a GPT-2 on local text files.")
    parser.add_argument("--model", default="openai-community/gpt2", help="Hub id or directory")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text files")
    parser.add_argument("--output", type=Path, required=True, help="directory of the new model")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4, help="rows per process and step")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--lr", type=float, default=3e-5, help="decays linearly to zero")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
