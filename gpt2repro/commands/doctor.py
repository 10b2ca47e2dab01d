"""`gpt2repro doctor [--recipe FILE] [--FIELD VALUE ...]`: will it work here, and how long?

Exit status: 0 ready to train, 1 a check failed, 2 mend the input.
"""

from gpt2repro import UserError
from gpt2repro.commands.parser import MOST_PROCESSES, recipe_parser
from gpt2repro.recipe import load_recipe
from gpt2repro.recipe_fields import Recipe


def main(argv: list[str]) -> int:
    """Print one line for each check; exit status 1 if one failed."""
    recipe, num_processes, price = _parse(argv)

    from gpt2repro.system import machine
    from gpt2repro.system.text import count_of, printable
    from gpt2repro.training.examination import FAILURE, Examination

    failures = 0
    print(f"{recipe.run_dir}, {count_of(num_processes, 'process')}, {machine.hardware()}\n")
    for name, (status, text) in Examination(recipe, num_processes, price).findings():
        failures += status == FAILURE
        print(f"{status:>8}  {name:<10} {printable(text)}", flush=True)
    print(f"\n{failures} failed." if failures else "\nReady to train.")
    return 1 if failures else 0


def _parse(argv: list[str]) -> tuple[Recipe, int, float | None]:
    """The recipe, the number of processes of the launch, and what an hour of one costs."""
    parser = recipe_parser("doctor", __doc__)
    parser.add_argument("--num_processes", type=int, default=1, help="of the launch to plan for")
    parser.add_argument("--price", type=float, help="of an hour of one device, for an estimate")
    options, rest = parser.parse_known_args(argv)
    num_processes = options.num_processes
    if not 1 <= num_processes <= MOST_PROCESSES:
        raise UserError(f"--num_processes {num_processes}: it takes 1 to {MOST_PROCESSES:,}")
    if options.price is not None and not 0 <= options.price < 1e6:
        raise UserError(f"--price {options.price}: it takes what an hour of one device costs")
    return load_recipe(rest), num_processes, options.price
