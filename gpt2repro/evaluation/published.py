"""Figures that others published of OpenAI's weights: shown beside ours, never mixed with them."""

from collections.abc import Mapping
from typing import Any

NANOGPT = "karpathy/build-nanogpt"
PLOTS = "karpathy/build-nanogpt, the baselines of its plots"
HARNESS = "lm-evaluation-harness, as reported by build-nanogpt and the harness' issue 2159"
NANOCHAT = "karpathy/nanochat (dev/estimate_gpt3_core.ipynb), under bfloat16 autocast"
VALIDATION_LOSS = 3.2924  # nats per token, OpenAI's 124M on the first 100 units of sample-10BT
# Of OpenAI's weights; name of the model on the Hub -> figure -> (value, who published it).
PUBLISHED: dict[str, dict[str, tuple[float, str]]] = {
    "gpt2": {
        "val/loss": (VALIDATION_LOSS, NANOGPT),
        "hellaswag/completion_acc": (0.2859, NANOGPT),
        "hellaswag/completion_acc_norm": (0.2955, NANOGPT),
        "hellaswag/acc": (0.2892, HARNESS),
        "hellaswag/acc_norm": (0.3114, HARNESS),
        "lambada_openai/acc": (0.3256, HARNESS),
        "lambada_openai/perplexity": (40.06, HARNESS),
        "core": (0.1139, NANOCHAT),
    },
    "gpt2-medium": {
        "hellaswag/completion_acc_norm": (0.3752, PLOTS),
        "core": (0.1849, NANOCHAT),
    },
    "gpt2-large": {
        "hellaswag/completion_acc_norm": (0.4320, PLOTS),
        "core": (0.2146, NANOCHAT),
    },
    "gpt2-xl": {
        "hellaswag/completion_acc": (0.3842, NANOGPT),
        "hellaswag/completion_acc_norm": (0.4893, NANOGPT),
        "hellaswag/acc": (0.4004, HARNESS),
        "hellaswag/acc_norm": (0.5089, HARNESS),
        "core": (0.2565, NANOCHAT),
    },
}

TABLE_3 = "Radford et al. 2019, table 3, zero-shot"
_OTHER_TEXT = f"{TABLE_3}: de-tokenized and windowed in a way of their own"
_PAPER_FIGURES = {
    "lambada_openai/perplexity": TABLE_3,
    "lambada_openai/acc": f"{TABLE_3}: with a filter of stop words",
    "cbt_cn/acc": TABLE_3,
    "cbt_ne/acc": TABLE_3,
    "wikitext/word_perplexity": _OTHER_TEXT,
    "paloma_wikitext_103/word_perplexity": _OTHER_TEXT,
    "paloma_ptb/word_perplexity": _OTHER_TEXT,
}
# The figures of `evaluate --preset gpt2-paper` in the paper, as close as its protocol comes.
PAPER: dict[str, dict[str, tuple[float, str]]] = {
    model: {
        name: (value, source)
        for (name, source), value in zip(_PAPER_FIGURES.items(), values, strict=True)
    }
    for model, values in {
        "gpt2": (35.13, 0.4599, 0.8765, 0.834, 29.41, 37.50, 65.85),
        "gpt2-medium": (15.60, 0.5548, 0.9235, 0.871, 22.76, 26.37, 47.33),
        "gpt2-large": (10.87, 0.6012, 0.9345, 0.880, 19.93, 22.05, 40.31),
        "gpt2-xl": (8.63, 0.6324, 0.9330, 0.8905, 18.34, 17.48, 35.76),
    }.items()
}


# How many rows they are of, where a file of other rows could be given.
NUM_ROWS = {"hellaswag": 10_042, "lambada_openai": 5_153, "cbt_cn": 2_500, "cbt_ne": 2_500}


def is_of_the_published_rows(figure: str, num_rows: int) -> bool:
    """Whether a figure of `num_rows` rows, "task/metric", can be of those that were published."""
    return NUM_ROWS.get(figure.partition("/")[0], num_rows) == num_rows


# The text that the published validation loss is of, in the fields of a recipe.
VALIDATION_TEXT = {
    "dataset_name": "HuggingFaceFW/fineweb-edu",
    "dataset_config": "sample-10BT",
    "dataset_split": "train",
    "data_files": None,
    "text_column": "text",
    "datasets": None,
    "num_validation_units": 100,
    "validation_tokens": 10_485_760,
    "sequence_length": 1024,
}
TOKENIZERS = ("openai-community/gpt2", "gpt2")


def is_the_published_text(settings: Mapping[str, Any]) -> bool:
    """Whether these fields of a recipe hold out the text that the published loss is of."""
    return all(settings.get(field) == value for field, value in VALIDATION_TEXT.items())


def published_loss(recipe: Mapping[str, Any]) -> tuple[str, float] | None:
    """The published loss that a run by `recipe` compares with, as (label, nats per token).

    OpenAI's 124M weights on the validation shard of build-nanogpt, which are the row groups that
    the stream holds out of FineWeb-Edu. A loss per token compares only under the same tokenizer.
    """
    if is_the_published_text(recipe) and recipe.get("tokenizer_name") in TOKENIZERS:
        return f"OpenAI GPT-2 124M, {VALIDATION_LOSS} (build-nanogpt)", VALIDATION_LOSS
    return None
