"""Figures that others published of OpenAI's weights: shown beside ours, never mixed with them."""

NANOGPT = "karpathy/build-nanogpt"
HARNESS = "lm-evaluation-harness, as reported by build-nanogpt and the harness' issue 2159"
VALIDATION_LOSS = 3.2924  # nats per token, OpenAI's 124M on the first 100 units of sample-10BT
# Of OpenAI's weights; name of the model on the Hub -> figure -> (value, who published it).
PUBLISHED: dict[str, dict[str, tuple[float, str]]] = {
    "gpt2": {
        "val/loss": (VALIDATION_LOSS, NANOGPT),
        "hellaswag/completion_acc": (0.2859, NANOGPT),
        "hellaswag/completion_acc_norm": (0.2955, NANOGPT),
        "hellaswag/lm_eval_acc": (0.2892, HARNESS),
        "hellaswag/lm_eval_acc_norm": (0.3114, HARNESS),
        "lambada/acc": (0.3256, HARNESS),
        "lambada/perplexity": (40.06, HARNESS),
    },
    "gpt2-medium": {"hellaswag/completion_acc_norm": (0.3752, NANOGPT)},
    "gpt2-large": {"hellaswag/completion_acc_norm": (0.4320, NANOGPT)},
    "gpt2-xl": {"hellaswag/completion_acc_norm": (0.4889, NANOGPT)},
}


def published_loss(dataset_name: str, tokenizer_name: str) -> tuple[str, float] | None:
    """The published loss that a run on this dataset compares with, as (label, nats per token).

    OpenAI's 124M weights on the validation shard of build-nanogpt, which are the row groups that
    the stream holds out of FineWeb-Edu. A loss per token compares only under the same tokenizer.
    """
    gpt2_tokenizers = ("openai-community/gpt2", "gpt2")
    if dataset_name == "HuggingFaceFW/fineweb-edu" and tokenizer_name in gpt2_tokenizers:
        return f"OpenAI GPT-2 124M, {VALIDATION_LOSS} (build-nanogpt)", VALIDATION_LOSS
    return None
