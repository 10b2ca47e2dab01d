"""A small bundle in the layout of CORE's: random words, and equal choices among them."""

import json
import random
from pathlib import Path

WORDS = ["a", "man", "child", "stands", "sits", "runs", "quickly", "on", "the", "hill", "and"]
# label -> kind, examples before a question, delimiter, random baseline in percent
TASKS = {
    "choices": ("multiple_choice", 0, " ", 50),
    "choices_10": ("multiple_choice", 10, "\nAnswer: ", 25),
    "schema": ("schema", 0, " ", 50),
    "schema_3": ("schema", 3, " ", 50),
    "words": ("language_modeling", 0, " ", 0),
    "words_10": ("language_modeling", 10, "\nAnswer: ", 0),
}
ROWS = 14


def rows_of(kind: str, seed: int, number: int = ROWS) -> list[dict]:
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    if kind == "multiple_choice":
        rows = [
            {
                "query": words(2, 8),
                "choices": [words(1, 3) for _ in range(n)],
                "gold": rng.randrange(n),
            }
            for n in rng.choices((2, 3, 4), k=number)
        ]
        rows[1]["choices"] = ["runs", "runs", "runs quickly"]  # equals, and one begins another
        rows[2]["choices"] = ["sings", "sings"]
        rows[3]["choices"] = ["the hill and", "the hill", "sits"]
        rows[4]["choices"] = ["child child", "man", "child child"]
        for row in rows[1:5]:
            row["gold"] = rng.randrange(len(row["choices"]))
        return rows
    if kind == "schema":
        return [
            {
                "context_options": [f"{head} {words(1, 3)}", f"{head} {words(1, 3)} again"],
                "continuation": words(1, 4),
                "gold": rng.randrange(2),
            }
            for head in (words(1, 6) for _ in range(number))
        ]
    return [
        # White space around a context is dropped; the last words are often what comes anyway.
        {"context": f" {words(1, 9)}  \n", "continuation": words(1, 2)}
        for _ in range(number)
    ]


def write_bundle(directory: Path, tasks: dict = TASKS, **changed: list) -> Path:
    """`changed`: rows of some tasks instead of the random ones; a `str` is a line as it is."""
    (directory / "eval_data" / "some").mkdir(parents=True)
    entries = []
    for seed, (label, (kind, num_fewshot, delimiter, _)) in enumerate(tasks.items()):
        rows = changed.get(label) or rows_of(kind, seed)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        uri = f"some/{label}.jsonl"
        (directory / "eval_data" / uri).write_text("".join(line + "\n" for line in lines))
        entry = {"label": label, "dataset_uri": uri, "num_fewshot": [num_fewshot]}
        entry |= {"icl_task_type": kind}
        entries.append(entry if delimiter == " " else entry | {"continuation_delimiter": delimiter})
    (directory / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))
    lines = [f"{label},something,{baseline}" for label, (*_, baseline) in tasks.items()]
    table = "\n".join(["Eval Task,Task Category,Random baseline", *lines, "another,x,7"])
    (directory / "eval_meta_data.csv").write_text(table)
    return directory
