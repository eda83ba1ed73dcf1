"""How much text a corpus holds, and how well a tokenizer serves its language.

    counts = sum((Counts.of(texts, tokens=len(ids)) for texts, ids in rows), Counts())
    counts.tokens_per_word, counts.bytes_per_token

Words are what white space separates. Chinese, Japanese, Thai and others do not separate words: `separates_words`
tells by the language tag, and tables print a dash there.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

# ISO 15924 codes of scripts that are written without spaces between words.
_UNSPACED_SCRIPTS = frozenset("hani hans hant hanb jpan hrkt hira kana bopo thai lana tavt laoo khmr mymr tibt".split())
# Languages that are usually written in one of these, by CLDR's likely subtags, and what ISO 639-3 counts as Chinese.
_UNSPACED_LANGUAGES = frozenset(
    "zh cmn cdo cjy cpx czh czo gan hak hsn lzh mnp nan wuu yue ja ryu th kdt kxm lcp lwl nod sou tts blt lo kjg km my"
    " kht mnw shn bo adp dz tsj".split()
)


@dataclass(frozen=True)
class Counts:
    """Counts over documents; they add up.

    Attributes:
        documents, tokens: how many.
        answer_tokens: tokens that are targets.
        bytes: of the texts in UTF-8.
        characters: Unicode code points of the texts.
        words: see `count_words`.
        longest: tokens of the longest document.
    """

    documents: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    longest: int = 0

    @classmethod
    def of(cls, texts: Iterable[str], tokens: int = 0, answer_tokens: int = 0) -> "Counts":
        """Counts of one document, which consists of `texts`."""
        size = characters = words = 0
        for text in texts:
            length = len(text)
            characters += length
            size += length if text.isascii() else len(text.encode())
            words += count_words(text)
        return cls(1, tokens, answer_tokens, size, characters, words, tokens)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.answer_tokens + other.answer_tokens,
            self.bytes + other.bytes,
            self.characters + other.characters,
            self.words + other.words,
            max(self.longest, other.longest),
        )

    @property
    def tokens_per_word(self) -> float:
        """Fertility; NaN without words. It means nothing where `separates_words` is false."""
        return _ratio(self.tokens, self.words)

    @property
    def tokens_per_character(self) -> float:
        """NaN without characters."""
        return _ratio(self.tokens, self.characters)

    @property
    def bytes_per_token(self) -> float:
        """NaN without tokens."""
        return _ratio(self.bytes, self.tokens)


def _ratio(a: int, b: int) -> float:
    return a / b if b else math.nan


def count_words(text: str) -> int:
    """Words of a text: what Unicode white space separates."""
    return len(text.split())


def separates_words(lang: str) -> bool:
    """Whether texts of a language have spaces between words, by its tag (BCP 47, `-` or `_`).

    A script in the tag decides (`zh-Latn` has words); else the language's usual script. Korean and Vietnamese
    have spaces (the latter between syllables).
    """
    language, *rest = lang.lower().replace("_", "-").split("-")
    for subtag in rest:
        if len(subtag) == 1:  # an extension follows
            break
        if len(subtag) == 4 and subtag.isalpha():
            return subtag not in _UNSPACED_SCRIPTS
    return language not in _UNSPACED_LANGUAGES
