"""How long a mistake waits for its answer: before anything large is imported, or after.

    python benchmarks/startup.py --output benchmarks/results/startup.json

A mistyped option of the training script and of a verb, and `gpt2repro --help`, each in a process of
its own; beside them, in turns, what an answer would wait for at the least: `import torch`.
"""

import subprocess
import sys
import time
from pathlib import Path

from pairing import circumstances, paired_ratio, ratio_text, spread, table, write_json

from gpt2repro.commands.parser import OneLineParser
from gpt2repro.system.command_line import run

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "train_accelerate.py --num_stpes 3": ["train_accelerate.py", "--num_stpes", "3"],
    "gpt2repro evaluate --modle x": ["-m", "gpt2repro", "evaluate", "--modle", "x"],
    "gpt2repro --help": ["-m", "gpt2repro", "--help"],
    "import torch": ["-c", "import torch"],
}


def seconds(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
    return time.perf_counter() - began


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmarks/startup.py", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", help="JSON")
    arguments = parser.parse_args(argv)
    around = circumstances(vars(arguments))
    for words in COMMANDS.values():
        seconds(words)  # reads the files from the disk
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.rounds):
        for name, words in COMMANDS.items():
            found[name].append(seconds(words))
    torch = found["import torch"]
    ratios = {name: paired_ratio(times, torch) for name, times in found.items()}
    rows = [
        [name, f"{spread(times)['median']:.2f}", ratio_text(ratios[name])]
        for name, times in found.items()
    ]
    print(table(["", "seconds", "of `import torch`"], rows))
    results = {"seconds": found, "over_import_torch": ratios}
    write_json(arguments.output, {"benchmark": "startup", **around, **results})
    return 0


if __name__ == "__main__":
    sys.exit(run("benchmarks/startup.py", main, sys.argv[1:]))
