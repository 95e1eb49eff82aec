"""How many tokens a tokenizer spends on a text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Compression:
    """Counts over the same texts, before and after an extension."""

    characters: int
    tokens_before: int
    tokens_after: int

    @property
    def before(self) -> float:
        """Tokens per character."""
        return self.tokens_before / self.characters

    @property
    def after(self) -> float:
        return self.tokens_after / self.characters


def compression(texts: Sequence[str], before: Encode, after: Encode) -> Compression:
    """What two tokenizers make of the texts."""

    def tokens(encode: Encode) -> int:
        return sum(len(encode(text)) for text in texts)

    return Compression(sum(map(len, texts)), tokens(before), tokens(after))


def sample_of(texts: Iterable[str], max_characters: int = 200_000) -> list[str]:
    """The first texts, up to so many characters; the last one is cut."""
    sample: list[str] = []
    room = max_characters
    for text in texts:
        sample.append(text[:room])
        room -= len(text)
        if room <= 0:
            break
    return sample
