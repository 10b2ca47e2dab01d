"""The licence of published weights: what somebody gave them, or that of our own runs."""

from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from gpt2repro import UserError
from gpt2repro.records import integrity
from gpt2repro.records.run_directory import run_of, saved_recipe
from gpt2repro.records.saved_models import locate
from gpt2repro.system.hub import of_hub_or_cache
from gpt2repro.system.patience import patiently


def own_licence(recipe: Mapping | None) -> str | None:
    """Of a run's weights; none is made up for what somebody else began, or for what is no run."""
    return "mit" if recipe and not recipe.get("init_from") else None


def licence_of(name: str, option: str) -> str | None:
    """That of the model `name` as far as anybody said: its card, or of a checkpoint its recipe.

    Raises:
        UserError: the Hub does not say whether there is a card.
    """
    where = Path(locate(name, option))
    card = where / "README.md" if where.is_dir() else _card_on_the_hub(name)
    try:
        if (where / integrity.MARKER).is_file():
            return own_licence(saved_recipe(run_of(where)))
        found = ModelCard.load(card).data.license if card else None
        return found if isinstance(found, str) else None  # of several nobody says which holds
    except (UserError, OSError, ValueError, yaml.YAMLError):  # no card, or none that can be read
        return None


def _card_on_the_hub(name: str) -> Path | None:
    """Its copy in the cache; None if the Hub says that there is none, or it was not cached."""

    def card(offline: bool) -> Path | None:
        try:
            return Path(hf_hub_download(name, "README.md", local_files_only=offline))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not offline:
                raise  # the Hub did not answer
            return None

    what = f"read the card of {name}, for its licence"
    return patiently(lambda: of_hub_or_cache(name, card), what, reaches_hub=False)
