"""`gpt2repro VERB ...`: each verb is the `main(argv) -> exit status` of one module."""

import importlib
import sys

from gpt2repro import UserError, __version__
from gpt2repro.system import command_line

# verb -> (module, what it does). Modules are imported on use, so that `--help` stays instant.
VERBS = {
    "average": ("average", "one model of the mean of several models' weights"),
    "compare-logits": ("compare_logits", "ours against transformers' GPT-2 on the same weights"),
    "doctor": ("doctor", "check a recipe and this machine before hours are spent"),
    "evaluate": ("evaluate", "validation loss, HellaSwag, CORE, lm_eval's tasks of any causal LM"),
    "export": ("export", "write a checkpoint in native or stock GPT-2 form"),
    "generate": ("generate", "continue a prompt"),
    "plots": ("plots", "look inside a run or a model"),
    "push": ("push", "verify an exported model and upload it to the Hub"),
    "rows": ("rows", "the text of a step's rows, and which steps saw a document"),
    "stream-stats": ("stream_stats", "what the data stream would do, and how fast"),
    "tokenize": ("tokenize", "write a recipe's texts as shards of token ids"),
    "verify": ("verify", "is a published chain of checkpoints what its run made"),
}


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items()]
    return "\n".join(
        [
            "usage: gpt2repro VERB [options]     (gpt2repro VERB --help for a verb's options)",
            "",
            *lines,
            "",
            "Training is `accelerate launch train_accelerate.py`.",
        ]
    )


def without_verb(arguments: list[str]) -> int:
    """The answer to what names none: help, the version, a mistake."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else command_line.EXIT_USAGE
    if arguments[0] == "--version":
        print(f"gpt2repro {__version__}")
        return 0
    raise UserError(f"no verb {arguments[0]!r}; there are: {', '.join(VERBS)}")


def main() -> None:
    """The console script."""
    verb, rest = "".join(sys.argv[1:2]), sys.argv[2:]
    if verb not in VERBS:
        sys.exit(command_line.run("gpt2repro", without_verb, sys.argv[1:]))
    module = importlib.import_module(f"gpt2repro.commands.{VERBS[verb][0]}")
    sys.exit(command_line.run(f"gpt2repro {verb}", module.main, rest))


if __name__ == "__main__":
    main()
