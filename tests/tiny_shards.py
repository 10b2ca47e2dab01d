"""Shards of token ids as other projects write and read them."""

from pathlib import Path

import numpy as np

EOT = 256


def tokens_of(texts: list[str]) -> np.ndarray:
    """Byte tokens, 256 before each text."""
    parts = [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]
    return np.concatenate([part for ids in parts for part in (np.array([EOT], np.uint16), ids)])


def write_bin(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> None:
    """As llm.c's `write_datafile` does: 256 int32 of header, then uint16 ids."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(np.uint16).tobytes())


class Loader:
    """The next batches of one process of W, as build-nanogpt's loader is described to give them.

    It stands at B * T times its rank, takes B * T ids and one more, and goes W * B * T on. Where
    from there a whole turn and one more would go beyond the end, it begins the next shard.

    together: look from where process 0 stands, as llm.c does.
    """

    def __init__(
        self, shards: list[np.ndarray], B: int, T: int, rank: int, W: int, together: bool
    ) -> None:
        self.shards, self.B, self.T, self.rank, self.W = shards, B, T, rank, W
        self.together, self.shard, self.at = together, 0, B * T * rank

    def __next__(self) -> np.ndarray:
        """(B, T+1) ids: inputs, and with one more the targets."""
        size, turn = self.B * self.T, self.B * self.T * self.W
        ids = self.shards[self.shard][self.at : self.at + size + 1]
        self.at += turn
        looks_from = self.at - size * self.rank if self.together else self.at
        if looks_from + turn + 1 > len(self.shards[self.shard]):
            self.shard, self.at = (self.shard + 1) % len(self.shards), size * self.rank
        return np.stack([ids[n * self.T : (n + 1) * self.T + 1] for n in range(self.B)])
