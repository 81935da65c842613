"""Text to token numbers and back: byte-level BPE by the `tokenizers` library, or the bytes themselves."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

END = "<|endoftext|>"  # stands between documents


class Tokenizer:
    """A byte-level tokenizer: any text survives encode and decode. `end` is the token between documents."""

    def __init__(self, bpe: Any | None = None):
        self._bpe = bpe  # a tokenizers.Tokenizer, or None for bytes
        if bpe is not None:
            bpe.encode_special_tokens = True  # END in a text is text
        self.vocab_size: int = 257 if bpe is None else bpe.get_vocab_size()
        self.end: int = 256 if bpe is None else bpe.token_to_id(END)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE (as GPT-2's) of `vocab_size` tokens, at least 257: every byte and the end of a document."""
        if vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and the end of a document), got {vocab_size}")
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        text = path.read_text(encoding="utf-8")
        if len(text) < 100 and json.loads(text) == {"type": "bytes"}:
            return cls()
        import tokenizers

        tokenizer = cls(tokenizers.Tokenizer.from_str(text))
        if tokenizer.end is None:
            raise ValueError(f"{path}: has no token {END}")
        return tokenizer

    @property
    def bpe(self) -> Any | None:
        """The tokenizers.Tokenizer within; None for bytes."""
        return self._bpe

    def save(self, path: Path) -> None:
        """One JSON file; that of a BPE is the `tokenizers` library's own."""
        path.write_text(json.dumps({"type": "bytes"}) if self._bpe is None else self._bpe.to_str(), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8")) if self._bpe is None else self._bpe.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._bpe is None:
            return [self.encode(t) for t in texts]
        return [e.ids for e in self._bpe.encode_batch(list(texts))]

    def decode(self, tokens: Iterable[int]) -> str:
        return self.bytes_of(tokens).decode("utf-8", errors="replace")

    def bytes_of(self, tokens: Iterable[int]) -> bytes:
        """The bytes that tokens stand for, `end` for none. They may begin or stop inside a character."""
        kept = [t for t in tokens if t != self.end]
        if self._bpe is None:
            return bytes(kept)
        return bytes(_BYTE_OF[character] for t in kept for character in self._bpe.id_to_token(t))


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level BPE's tokens stands for (GPT-2's mapping).

    Printable bytes stand for themselves, the others for the characters from 256 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = byte_alphabet()
