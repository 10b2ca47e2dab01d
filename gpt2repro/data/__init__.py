"""Text to rows of token ids: corpora, tokenizers, order, packing, the stream. Imports `system`.

`ExactStream` is for loops that are not ours; it is imported when it is asked for, since it brings
torch.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "ExactStream":
        from gpt2repro.data.exact_stream import ExactStream

        return ExactStream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
