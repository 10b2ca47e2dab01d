"""`gpt2repro doctor [--recipe FILE] [--FIELD VALUE ...]`: will it work here, and how long?

Exit status: 0 ready to train, 1 a check failed, 2 mend the input.
"""

from argparse import RawDescriptionHelpFormatter

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.recipe import load_recipe


def main(argv: list[str]) -> int:
    """Print one line for each check; exit status 1 if one failed."""
    parser = OneLineParser(
        prog="gpt2repro doctor",
        description=__doc__,
        epilog="Every other option is the recipe's: --recipe FILE and --FIELD VALUE; "
        "`train_accelerate.py --help` lists them.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--num_processes", type=int, default=1, help="of the launch to plan for")
    options, rest = parser.parse_known_args(argv)
    num_processes = options.num_processes
    if num_processes < 1:
        raise UserError(f"--num_processes {num_processes}: it takes a whole number, at least 1")
    recipe = load_recipe(rest)

    from gpt2repro.system import machine
    from gpt2repro.training.examination import FAILURE, Examination

    failures = 0
    print(f"{recipe.run_dir}, {num_processes} process(es), {machine.hardware()}\n")
    for name, (status, text) in Examination(recipe, num_processes).findings():
        failures += status == FAILURE
        print(f"{status:>8}  {name:<10} {text}", flush=True)
    print(f"\n{failures} failed." if failures else "\nReady to train.")
    return 1 if failures else 0
