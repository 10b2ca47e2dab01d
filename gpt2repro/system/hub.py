"""What a name on the Hub looks like."""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def is_hub_id(name: str) -> bool:
    """Whether `name` is spelled like a repository of the Hub: `owner/name`, or `gpt2` of old."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def has_owner(name: str) -> bool:
    """Whether it is `owner/name`: what one can upload to, and what no word of a sentence is."""
    return "/" in name and is_hub_id(name)
