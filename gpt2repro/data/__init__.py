"""Text to rows of token ids: corpora, tokenizers, order, packing, the stream. Imports `system`."""
