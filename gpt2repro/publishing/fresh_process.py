"""Load an export as a stranger would: what `verification.verify` runs in a process of its own.

    python -P fresh_process.py SCRATCH

SCRATCH holds `request.json` (what to load, what to expect) and `expected.safetensors` (probe ids
and the live model's answers); `report.json` is written beside them. No module of ours can be
imported here, so a code file missing from the export cannot hide behind an installed package.
"""

import json
import sys
from pathlib import Path
from typing import Any

BLOCKED = ("gpt2repro", "modeling_gpt2repro", "configuration_gpt2repro", "train_accelerate")


class CheckFailed(Exception):
    """The message completes "in a fresh process "."""


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise CheckFailed(problem)


def _check_loading(name: str, info: dict, allowed: tuple[str, ...] = ()) -> None:
    """A tensor that is missing was made up at random, one that is unexpected was thrown away."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        keys = sorted(set(map(str, info.get(kind) or ())) - set(allowed))
        _check(not keys, f"{name} reports {kind.replace('_', ' ')}: {', '.join(keys[:3])}")


def check_tokenizer(directory: str, trust: bool, want: dict) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)
    _check(len(tokenizer) == want["num_tokens"], f"the tokenizer has {len(tokenizer)} tokens")
    ids = tokenizer(want["text"])["input_ids"]
    _check(ids == want["ids"], "AutoTokenizer encodes the probe text to other ids")
    _check(
        tokenizer.decode(ids) == want["decoded"], "AutoTokenizer decodes the ids to another text"
    )
    for token in ("eos", "bos", "pad"):
        got = getattr(tokenizer, f"{token}_token_id")
        _check(got == want[token], f"the tokenizer's {token}_token_id is {got}, not {want[token]}")


def _check_ids(model, want: dict) -> None:
    """Configuration and generation configuration name the tokenizer's special tokens."""
    for token in ("eos", "bos"):
        got = getattr(model.config, f"{token}_token_id")
        _check(got == want[token], f"config.json's {token}_token_id is {got}, not {want[token]}")
    got = model.generation_config.pad_token_id
    want_pad = want["generation_pad"]
    _check(got == want_pad, f"generation_config.json's pad_token_id is {got}, not {want_pad}")


def same_greedy_tokens(got: list[int], want: list[int], margins: list[float], noise: float) -> bool:
    """Whether two greedy continuations agree up to a step that the logits' noise may decide."""
    for a, b, margin in zip(got, want, margins, strict=False):
        if a != b:
            return margin <= 2 * noise
    return len(got) == len(want)


def _load(auto_class: Any, request: dict, allowed: tuple[str, ...] = ()) -> Any:
    """The model by an Auto class, whole: nothing of it missing, nothing thrown away."""
    loaded: Any = auto_class.from_pretrained(
        request["directory"],
        trust_remote_code=request["trust_remote_code"],
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    model, info = loaded
    _check_loading(auto_class.__name__, info, allowed)
    return model


def _check_kind(model: Any, request: dict) -> None:
    """Class, dtype, special tokens and tying, as they came from the files."""
    name = type(model).__name__
    _check(name == request["class"], f"AutoModelForCausalLM gives a {name}")
    dtype = str(model.dtype).removeprefix("torch.")
    _check(dtype == request["dtype"], f"it loads as {dtype}, not {request['dtype']}")
    _check_ids(model, request["tokenizer"])
    tied = model.lm_head.weight is model.transformer.wte.weight
    found = "tied" if tied else "not tied"
    _check(tied == request["tied"], f"lm_head and the token embedding are {found}")


def _check_answers(model: Any, request: dict, expected: dict) -> tuple[Any, float]:
    """Logits and greedy tokens; returns the hidden states and the logits' largest difference."""
    import torch
    from transformers import GenerationConfig

    ids, tolerance = expected["input_ids"], request["tolerance"]
    hidden = model.transformer(input_ids=ids).last_hidden_state
    logits = model(input_ids=ids).logits
    _check(bool(logits.isfinite().all()), "the logits are not finite")
    _check(logits.shape == expected["logits"].shape, f"logits of shape {tuple(logits.shape)}")
    difference = (logits - expected["logits"]).abs().max().item()
    _check(
        difference <= tolerance,
        f"logits differ from the live model's by {difference:.3g} (allowed: {tolerance:g})",
    )
    prompt = ids[:1, : request["prompt_length"]]
    # Beams or penalties of the model's own are none of what is compared.
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request["max_new_tokens"],
    )[0, prompt.shape[1] :]
    want, margins = expected["generated"].tolist(), expected["margins"].tolist()
    same = same_greedy_tokens(generated.tolist(), want, margins, tolerance)
    _check(same, "greedy generate() gives other tokens than the live model")
    return hidden, difference


def _examine(request: dict, expected: dict) -> dict:
    """Every check, in turn; returns the report.

    Raises:
        CheckFailed: when one of them failed.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    torch.set_num_threads(request["num_threads"])  # another split of a sum rounds differently
    check_tokenizer(request["directory"], request["trust_remote_code"], request["tokenizer"])
    model = _load(AutoModelForCausalLM, request)
    _check_kind(model, request)
    with torch.inference_mode():
        hidden, difference = _check_answers(model.eval().float(), request, expected)
    del model  # two of them may not fit
    base = _load(AutoModel, request, () if request["tied"] else ("lm_head.weight",))
    with torch.inference_mode():
        base_hidden = base.eval().float()(input_ids=expected["input_ids"]).last_hidden_state
    same = torch.equal(base_hidden, hidden)
    _check(same, "AutoModel gives other hidden states than the LM class")
    return {"max_abs_difference": difference}


def main(scratch: Path) -> None:
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]  # an import finds that there is none
    from safetensors.torch import load_file

    try:
        request = json.loads((scratch / "request.json").read_text(encoding="utf-8"))
        report = _examine(request, load_file(scratch / "expected.safetensors"))
    except CheckFailed as failure:
        report = {"problem": str(failure)}
    except Exception as error:  # whatever loading raises is the verdict
        report = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    (scratch / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
