"""The verb `push`: verify an exported model and upload it to the Hub.

    gpt2repro push --model runs/gpt2/final --repo me/gpt2-repro [--private] [--revision stock]

Interrupted, it is taken up by the same command: files that have arrived are not sent twice.
"""

import sys
from argparse import Namespace
from pathlib import Path

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser, named, path
from gpt2repro.system.text import printable

AGAIN = "run the same command again: files that have arrived are not sent twice"


def main(argv: list[str]) -> int:
    """`gpt2repro push --model DIR --repo me/name [--private] [--revision]`."""
    options = _parse(argv)
    from gpt2repro.publishing.card import add_evaluation, read_card
    from gpt2repro.publishing.contents import changed_code
    from gpt2repro.publishing.upload import check_hub_rights, to_publish, upload
    from gpt2repro.publishing.verification import verify

    directory = _find_export(options.model)
    existed = check_hub_rights(options.repo, private=options.private, option="--repo")
    if options.allow_code and (changed := changed_code(directory)):
        print(
            f"gpt2repro push: warning: {' and '.join(changed)} in {directory} are not this "
            "package's; they run now, with your rights, and are published",
            file=sys.stderr,
            flush=True,
        )
    for line in verify(directory, allow_code=options.allow_code).lines():
        print(f"  {line}")
    read_card(directory / "README.md")  # raises what the Hub would refuse
    if options.evaluation:
        repo_name = options.repo.partition("/")[2]
        scored = add_evaluation(directory / "README.md", options.evaluation, repo_name)
        places = [Path(str(scored), final).absolute() for final in ("", "final")]
        if scored not in (None, options.repo) and directory.absolute() not in places:
            said = f"gpt2repro push: warning: {options.evaluation} is of {scored}, not {directory}"
            print(printable(said), file=sys.stderr, flush=True)
    files = to_publish(directory, allow_code=options.allow_code)
    size = sum(path.stat().st_size for path in files) / 1e6
    print(
        f"Pushing {len(files)} files ({size:,.1f} MB) to {options.repo}, which "
        f"{'exists: this adds a commit' if existed else 'is new: this makes it'} ...",
        flush=True,
    )
    try:
        url = upload(
            directory,
            options.repo,
            message=options.message,
            private=options.private,
            revision=options.revision,
            allow_code=options.allow_code,
        )
    except KeyboardInterrupt:
        raise UserError(f"interrupted; {AGAIN}") from None
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from error
    print(url)
    return 0


def _parse(argv: list[str]) -> Namespace:
    parser = OneLineParser(prog="gpt2repro push", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=named, required=True, help="a run's final/ or what `export` wrote")
    add("--repo", required=True, help="user/name on the Hub")
    private = "create the repository private; else it is as its organization has it"
    add("--private", action="store_true", help=private)
    add("--revision", help="branch to commit to, created if absent (default main)")
    add("--message", default="Upload model", help="of the commit")
    add("--allow_code", action="store_true", help="run and publish a fork's model files")
    add("--evaluation", type=path, help="JSON of `gpt2repro evaluate --output`, for the card")
    options = parser.parse_args(argv)
    for name in ("message", "revision"):
        if getattr(options, name) == "":
            raise UserError(f"--{name}: it is empty")
    return options


def _find_export(name: str) -> Path:
    """The directory to push."""
    from gpt2repro.records.integrity import MARKER
    from gpt2repro.records.saved_models import locate

    directory = Path(locate(name))
    if not directory.is_dir():
        raise UserError(f"--model {name}: give a directory")
    if (directory / MARKER).is_file():
        raise UserError(
            f"--model {directory} is a training checkpoint; write a model from it first: "
            f"gpt2repro export --model {directory} --output OUT"
        )
    return directory
