"""Is this directory what a stranger can use? Checked before anything is called final or uploaded.

Three layers, cheapest first: the files (nothing but what belongs there, no code but ours, and as
`SHA256SUMS` has them), the tensors (exactly the model's, bit for bit), and a fresh process without
any module of ours that loads the directory with stock transformers and must give the live model's
answers.
"""

import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from gpt2repro import UserError
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.token_ids import end_ids, num_ids
from gpt2repro.publishing.contents import (
    CLASSES,
    INDEX,
    check_contents,
    check_sums,
    read_json,
)
from gpt2repro.records.saved_models import load_causal_lm
from gpt2repro.system import atomic, processes
from gpt2repro.system.command_line import say

PROBE_TEXT = "Hello world's  don't\n\n\tx12 ½ naïve 中文 😀 (a+b)^2 == c_d;  end \n"
SECONDS_FOR_FRESH_PROCESS = 1800  # gpt2-xl off a slow disk


@dataclass(frozen=True)
class Verification:
    """What was checked and found right; `lines` says it to a reader."""

    format: str  # "gpt2repro" or "gpt2"
    dtype: str
    num_tensors: int
    num_parameters: int
    tied: bool
    vocab_size: int
    num_tokens: int  # of the tokenizer
    max_abs_difference: float  # of the fresh process's fp32 logits from the live model's
    num_greedy_tokens: int
    transformers: str

    def lines(self) -> list[str]:
        exact = self.max_abs_difference == 0
        equal = "equal bit for bit" if exact else f"equal within {self.max_abs_difference:.1g}"
        how = (
            "trust_remote_code=True"
            if self.format == "gpt2repro"
            else "stock classes, no remote code"
        )
        head = "tied to" if self.tied else "separate from"
        return [
            f"a fresh process without this package loaded it ({how}, "
            f"transformers {self.transformers})",
            f"{self.num_tensors} tensors, {self.num_parameters:,} parameters, {self.dtype}, bit "
            f"for bit the model's; output layer {head} the token embedding; no pickle",
            f"fp32 logits {equal} to the live model's; {self.num_greedy_tokens} greedy tokens "
            "the same",
            f"vocabulary {self.vocab_size}, tokenizer {self.num_tokens} tokens; it encodes and "
            "decodes a text as the live one does; special tokens right",
        ]


def verify(
    directory: Path,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    allow_code: bool = False,
) -> Verification:
    """Check an export against the live model, or (without one) against what it holds itself.

    Args:
        model: a `GPT2ReproForCausalLM` on the CPU; its mode and attention are left as they were.
        allow_code: the two code files may be another version's or a fork's; the fresh process runs
            them.

    Raises:
        UserError: when a check failed; the message says which.
    """
    config = read_json(directory / "config.json")
    if config.get("model_type") not in CLASSES:
        raise UserError(f"{directory} is no GPT-2: its model_type is {config.get('model_type')!r}")
    check_contents(directory, allow_code=allow_code)
    check_sums(directory)
    model = model or load_causal_lm(str(directory))
    tokenizer = tokenizer or load_tokenizer(directory)
    dtypes, num_parameters = _check_tensors(directory, model)
    if dtypes != {config.get("dtype", config.get("torch_dtype"))}:
        raise UserError(f"{directory}: config.json does not name the tensors' dtype, {dtypes}")
    dtype = dtypes.pop()
    if (needed := num_ids(tokenizer)) > model.config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {needed} tokens, more than the model's vocabulary "
            f"of {model.config.vocab_size}"
        )
    difference, num_greedy = _compare_in_fresh_process(
        directory, config["model_type"], dtype, model, tokenizer
    )
    return Verification(
        format=config["model_type"],
        dtype=dtype,
        num_tensors=len(expected_tensors(model)),
        num_parameters=num_parameters,
        tied=_is_tied(model),
        vocab_size=model.config.vocab_size,
        num_tokens=len(tokenizer),
        max_abs_difference=difference,
        num_greedy_tokens=num_greedy,
        transformers=transformers.__version__,
    )


# --- Tensors --------------------------------------------------------------------------------------


def _is_tied(model: Any) -> bool:
    return model.lm_head.weight is model.transformer.wte.weight


def expected_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What an export holds: every parameter once (a tied head is its embedding), no buffer."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    surplus = (
        model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    )
    assert not surplus, f"persistent buffers are not exported: {sorted(surplus)}"
    return tensors


def _check_tensors(directory: Path, model: PreTrainedModel) -> tuple[set[str], int]:
    """Compare every stored tensor with the model's, bit for bit; returns dtypes and parameters."""
    missing = expected_tensors(model)
    dtypes, num_parameters = set(), 0
    for path in _safetensors_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    stored = file.get_tensor(name)
                    live = missing.pop(name, None)
                    if live is None:
                        raise UserError(
                            f"{path} holds {name}, which is none of the model's tensors"
                        )
                    if not same_bits(stored, live.to(stored.dtype)):
                        raise UserError(f"{path}: {name} is not the live model's")
                    # Few positions and tokens are probed: the rest of a tensor shows here alone.
                    if not stored.isfinite().all():
                        wider = f": {stored.dtype} is too narrow" if live.isfinite().all() else ""
                        raise UserError(f"{path}: {name} holds NaN or infinity{wider}")
                    dtypes.add(str(stored.dtype).removeprefix("torch."))
                    num_parameters += stored.numel()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if missing:
        raise UserError(f"{directory} lacks {len(missing)} tensors, among them {min(missing)}")
    return dtypes, num_parameters


def _safetensors_files(directory: Path) -> list[Path]:
    """The weight files, and no others than the index lists."""
    found = {path.name for path in directory.glob("*.safetensors")}
    if (directory / INDEX).is_file():
        listed = set(read_json(directory / INDEX).get("weight_map", {}).values())
    else:
        listed = {"model.safetensors"}
    if found != listed:
        raise UserError(
            f"{directory} should hold the weight files {sorted(listed)}, it holds {sorted(found)}"
        )
    return [directory / name for name in sorted(found)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


# --- A fresh process ------------------------------------------------------------------------------


def _compare_in_fresh_process(
    directory: Path,
    model_type: str,
    dtype: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[float, int]:
    """Run `fresh_process.py` on `directory`; returns the logits' difference and greedy tokens."""
    prompt_length = max(1, min(8, model.config.n_positions // 2))
    max_new_tokens = max(1, min(16, model.config.n_positions // 2))
    expected = _live_answers(directory, dtype, model, prompt_length, max_new_tokens)
    # Rounding in fp32 is relative to the logits' size. The native form runs the very same kernels
    # and comes out equal to the bit; stock GPT-2 spells GELU in seven operations, ours is one.
    tolerance = 1e-5 * max(10.0, expected["logits"].abs().max().item())
    request = {
        "directory": str(directory.resolve()),
        "class": CLASSES[model_type],
        "trust_remote_code": model_type == "gpt2repro",
        "dtype": dtype,
        "tied": _is_tied(model),
        "tolerance": tolerance,
        "num_threads": torch.get_num_threads(),
        "prompt_length": prompt_length,
        "max_new_tokens": max_new_tokens,
        "tokenizer": _tokenizer_answers(tokenizer),
    }
    with tempfile.TemporaryDirectory(prefix="gpt2repro-verify-") as scratch:
        with atomic.naming(Path(scratch)):  # it may be full, and another disk than the export's
            (Path(scratch) / "expected.safetensors").write_bytes(save(expected))
            (Path(scratch) / "request.json").write_text(json.dumps(request), encoding="utf-8")
        say("Loading it in a fresh process, and comparing ...")
        report = run_fresh_process(Path(scratch))
    if problem := report.get("problem"):
        raise UserError(f"{directory}: in a fresh process {problem}")
    return report["max_abs_difference"], len(expected["generated"])


def run_fresh_process(scratch: Path) -> dict:
    """Another working directory, an empty module cache, no network, no GPU and no tokens.

    PYTHONPATH stays: on many a cluster torch and transformers are found there. So may we be, whom
    the process blocks by name wherever we are. The code that it runs may be a fork's: `allow_code`
    of `verify`.
    """
    places = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    environment = processes.environment(
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="1",
        HF_MODULES_CACHE=str(scratch / "modules"),
        PYTHONPATH=os.pathsep.join(str(Path(place).absolute()) for place in places),
        TOKENIZERS_PARALLELISM="false",
    )
    script = Path(__file__).with_name("fresh_process.py")
    try:
        process = subprocess.run(
            [sys.executable, "-P", str(script), str(scratch)],
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS_FOR_FRESH_PROCESS,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"it was not loaded and compared in {SECONDS_FOR_FRESH_PROCESS} s"}
    report = scratch / "report.json"
    if report.is_file():
        return json.loads(report.read_text(encoding="utf-8"))
    last_words = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
    return {"problem": f"Python ended without a report: {last_words[0]}"}


def _live_answers(
    directory: Path, dtype: str, model: PreTrainedModel, prompt_length: int, max_new_tokens: int
) -> dict[str, Tensor]:
    """The probe (2, T <= 64), the live model's fp32 logits on it and its greedy continuation.

    A model stored in another dtype is compared as the file holds it: rounded, computed in fp32.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(64, model.config.n_positions)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    stored = getattr(torch, dtype)
    as_it_is = model.dtype == stored == torch.float32
    live: Any = model if as_it_is else copy.deepcopy(model)
    if not as_it_is:
        live = live.to(stored).float()
    own = GenerationConfig.from_pretrained(directory)
    with _evaluating(live, own.eos_token_id), torch.inference_mode():
        logits = live(input_ids=ids).logits
        prompt = ids[:1, :prompt_length]
        continuation = live.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack(continuation.logits)[:, 0].topk(2).values  # (steps, 2)
    return {
        "input_ids": ids,
        "logits": logits.clone(),
        "generated": continuation.sequences[0, prompt_length:].clone(),
        "margins": best[:, 0] - best[:, 1],
    }


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel, ends: int | list[int] | None):
    """Evaluation mode, SDPA and plain `generate` for a while: what the fresh process uses.

    And exact products: what a run on a GPU has set would be TF32 on some CPUs, too.
    """
    was_training, attention = model.training, model.config._attn_implementation
    settings, precision = model.generation_config, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model.eval().set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        model.generation_config = settings
        model.train(was_training).set_attn_implementation(attention)


def _tokenizer_answers(tokenizer: PreTrainedTokenizerFast) -> dict:
    """What the fresh process's tokenizer must answer, as plain values."""
    ids = tokenizer(PROBE_TEXT)["input_ids"]
    pad = tokenizer.pad_token_id
    return {
        "text": PROBE_TEXT,
        "ids": ids,
        "decoded": tokenizer.decode(ids),
        "num_tokens": len(tokenizer),
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
        "pad": pad,
        "generation_pad": next(iter(end_ids(tokenizer)), None) if pad is None else pad,
    }
