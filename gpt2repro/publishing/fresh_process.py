"""Load an export as a stranger would: the script that `export.verify` runs in a process of its own.

    python -P fresh_process.py SCRATCH

SCRATCH holds `request.json` (what to load, what to expect) and `expected.safetensors` (probe ids
and the live model's answers); `report.json` is written beside them. No module of ours can be
imported here, so a code file missing from the export cannot hide behind an installed package.
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

BLOCKED = ("gpt2repro", "modeling_gpt2repro", "configuration_gpt2repro", "train_accelerate")


class NotInstalled(MetaPathFinder):
    """Stands before every other finder, an editable install's included."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)", name=fullname)
        return None


class CheckFailed(Exception):
    """The message completes "the export was rejected: "."""


def check(condition: bool, problem: str) -> None:
    if not condition:
        raise CheckFailed(problem)


def check_loading(name: str, info: dict, allowed: tuple[str, ...] = ()) -> None:
    """A tensor that is missing was made up at random, one that is unexpected was thrown away."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        keys = sorted(set(map(str, info.get(kind) or ())) - set(allowed))
        check(not keys, f"{name} reports {kind.replace('_', ' ')}: {', '.join(keys[:3])}")


def check_tokenizer(directory: str, trust: bool, want: dict) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)
    check(len(tokenizer) == want["num_tokens"], f"the tokenizer has {len(tokenizer)} tokens")
    ids = tokenizer(want["text"])["input_ids"]
    check(ids == want["ids"], "AutoTokenizer encodes the probe text to other ids")
    check(tokenizer.decode(ids) == want["decoded"], "AutoTokenizer decodes the ids to another text")
    for token in ("eos", "bos", "pad"):
        got = getattr(tokenizer, f"{token}_token_id")
        check(got == want[token], f"the tokenizer's {token}_token_id is {got}, not {want[token]}")


def check_ids(model, want: dict) -> None:
    """Configuration and generation configuration name the tokenizer's special tokens."""
    for token in ("eos", "bos"):
        got = getattr(model.config, f"{token}_token_id")
        check(got == want[token], f"config.json's {token}_token_id is {got}, not {want[token]}")
    got = model.generation_config.pad_token_id
    want_pad = want["generation_pad"]
    check(got == want_pad, f"generation_config.json's pad_token_id is {got}, not {want_pad}")


def same_greedy_tokens(got: list[int], want: list[int], margins: list[float], noise: float) -> bool:
    """Whether two greedy continuations agree up to a step that the logits' noise may decide."""
    for a, b, margin in zip(got, want, margins, strict=False):
        if a != b:
            return margin <= 2 * noise
    return len(got) == len(want)


def run(request: dict, expected: dict) -> dict:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    torch.set_num_threads(request["num_threads"])  # another split of a sum rounds differently
    directory, trust = request["directory"], request["trust_remote_code"]
    tolerance = request["tolerance"]
    if request["tokenizer"]:
        check_tokenizer(directory, trust, request["tokenizer"])

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=trust, attn_implementation="sdpa", output_loading_info=True
    )
    model, info = loaded
    check_loading("AutoModelForCausalLM", info)
    name = type(model).__name__
    check(name == request["class"], f"AutoModelForCausalLM gives a {name}")
    dtype = str(model.dtype).removeprefix("torch.")
    check(dtype == request["dtype"], f"it loads as {dtype}, not {request['dtype']}")
    if request["tokenizer"]:
        check_ids(model, request["tokenizer"])
    tied = model.lm_head.weight is model.transformer.wte.weight
    check(
        tied == request["tied"], f"lm_head and the token embedding are {'' if tied else 'not '}tied"
    )

    model.eval().float()
    ids = expected["input_ids"]
    with torch.inference_mode():
        hidden = model.transformer(input_ids=ids).last_hidden_state
        logits = model(input_ids=ids).logits
        check(bool(logits.isfinite().all()), "the logits are not finite")
        check(logits.shape == expected["logits"].shape, f"logits of shape {tuple(logits.shape)}")
        difference = (logits - expected["logits"]).abs().max().item()
        check(
            difference <= tolerance,
            f"logits differ from the live model's by {difference:.3g} (allowed: {tolerance:g})",
        )
        prompt = ids[:1, : request["prompt_length"]]
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request["max_new_tokens"],
            do_sample=False,
        )[0, prompt.shape[1] :]
    margins = expected["margins"].tolist()
    want = expected["generated"].tolist()
    same = same_greedy_tokens(generated.tolist(), want, margins, tolerance)
    check(same, "greedy generate() gives other tokens than the live model")

    untied_head = () if tied else ("lm_head.weight",)
    del model, loaded
    loaded_base: Any = AutoModel.from_pretrained(
        directory, trust_remote_code=trust, attn_implementation="sdpa", output_loading_info=True
    )
    base, info = loaded_base
    check_loading("AutoModel", info, untied_head)
    with torch.inference_mode():
        base_hidden = base.eval().float()(input_ids=ids).last_hidden_state
    check(torch.equal(base_hidden, hidden), "AutoModel gives other hidden states than the LM class")
    return {"max_abs_difference": difference}


def main(scratch: Path) -> None:
    sys.meta_path.insert(0, NotInstalled())
    from safetensors.torch import load_file

    try:
        request = json.loads((scratch / "request.json").read_text(encoding="utf-8"))
        report = run(request, load_file(scratch / "expected.safetensors"))
    except CheckFailed as failure:
        report = {"problem": str(failure)}
    except Exception as error:  # whatever loading raises is the verdict
        report = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    (scratch / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
