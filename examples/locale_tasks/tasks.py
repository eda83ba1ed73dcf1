"""The locale tasks: prompt and answer from CLDR (Babel), ICU (icu4py) and num2words, per language.

A task is a function `(Locale tables) -> iterable of (key, content, answer)`. `key` says what the example is
about in no language (`2026-03-06`, `742`, `AT`), so that equal keys of one task are translations of each
other. The texts are NFC, without soft hyphens, zero-width and bidi marks, with plain spaces.

Several tasks disagree between languages on purpose: `3/6/26` is 6 March in English and 3 June in Spanish,
`1.234` is `1.234` in English and `1234` in German. Dates are Gregorian, digits are Latin in every language.
"""

import datetime
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from babel import Locale
from babel.dates import format_date
from babel.numbers import format_decimal, get_territory_currencies
from icu4py.messageformat import MessageFormat
from num2words import num2words

SEEN = ("en", "de", "fr", "es", "it", "nl", "sv", "pl", "ru", "tr", "fi", "hu", "id", "vi", "ja", "fa")
NEAR = ("pt_BR", "da", "uk", "cs")  # unseen, but kin and script are seen
FAR = ("ko", "th")  # unseen, and so is the script
LANGUAGES = SEEN + NEAR + FAR

NUMBERS = range(2000)
SUMMANDS = range(100)
YEARS = range(2000, 2030)  # two-digit years stay unique
CURRENCY_DATE = datetime.date(2025, 1, 1)  # "current" currencies must not depend on the day of generation

Example = tuple[str, str, str]  # key, content, answer

_DROPPED = frozenset(
    "\u00ad\u200b\u200c\u200d\u200e\u200f\u061c\u2060\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
_SPACES = str.maketrans({"\u00a0": " ", "\u202f": " ", "\u2009": " "})


def clean(text: str) -> str:
    """NFC, invisible marks dropped, special spaces made plain."""
    return unicodedata.normalize("NFC", "".join(c for c in text if c not in _DROPPED).translate(_SPACES)).strip()


def _letters(text: str, lang: str) -> str:
    """What two spellings of one number must share: letters and combining marks, without English "and"."""
    if lang == "en":
        text = text.replace(" and ", " ")
    return "".join(c for c in clean(text).casefold() if unicodedata.category(c)[0] in "LM")


class Tables:
    """What the tasks read of one language."""

    def __init__(self, lang: str):
        self.lang = lang
        self.locale = Locale.parse(lang)
        self.words = self._number_words()
        # Names on their own from ICU: Babel 2.18 answers a stand-alone month with that of the language asked
        # before (its locales share the dictionary into which an alias is resolved).
        day, month = (MessageFormat(f"{{d, date, {p}}}", f"{lang}@calendar=gregorian") for p in ("cccc", "LLLL"))
        self.days = [clean(day.format({"d": datetime.datetime(2024, 1, 1 + i, 12)})) for i in range(7)]
        self.months = [clean(month.format({"d": datetime.datetime(2024, 1 + i, 15, 12)})) for i in range(12)]

    def _number_words(self) -> dict[int, str]:
        # num2words and ICU each have errors; where two independent rule sets agree the word is right.
        spell = MessageFormat("{n, spellout}", self.lang)
        words = {n: clean(spell.format({"n": n})) for n in NUMBERS}
        return {
            n: w
            for n, w in words.items()
            if _letters(w, self.lang) == _letters(num2words(n, lang=self.lang), self.lang)
        }


def number_words(t: Tables) -> Iterable[Example]:
    return ((str(n), word, str(n)) for n, word in t.words.items())


def number_next(t: Tables) -> Iterable[Example]:
    return ((str(n), word, t.words[n + 1]) for n, word in t.words.items() if n + 1 in t.words)


def number_sum(t: Tables) -> Iterable[Example]:
    small = [n for n in SUMMANDS if n in t.words]
    return ((f"{a}+{b}", f"{t.words[a]} + {t.words[b]}", str(a + b)) for a in small for b in small)


def digits_to_words(t: Tables) -> Iterable[Example]:
    return ((str(n), str(n), word) for n, word in t.words.items())


def _dates() -> Iterable[datetime.date]:
    day = datetime.date(YEARS.start, 1, 1)
    while day.year in YEARS:
        yield day
        day += datetime.timedelta(days=1)


def full_date(t: Tables) -> Iterable[Example]:
    return ((d.isoformat(), format_date(d, "full", t.locale), d.isoformat()) for d in _dates())


def short_date(t: Tables) -> Iterable[Example]:
    return ((d.isoformat(), format_date(d, "short", t.locale), d.isoformat()) for d in _dates())


def decimal(t: Tables) -> Iterable[Example]:
    # Thousands and thousandths of the same digits first: one language's 1.234 is another's 1,234.
    plain = [str(n) for n in range(1000, 10000)]
    plain += [f"{n // 1000}.{n % 1000:03d}" for n in range(1000, 10000) if n % 10]
    plain += [f"{n // 10}.{n % 10}" for n in range(10001, 100000, 7) if n % 10]
    return ((p, format_decimal(p if "." not in p else float(p), locale=t.locale), p) for p in plain)


def weekday(t: Tables) -> Iterable[Example]:
    return ((f"{d}+{k}", f"{t.days[d]} + {k}", t.days[(d + k) % 7]) for d in range(7) for k in range(1, 61))


def month(t: Tables) -> Iterable[Example]:
    return ((f"{m}+{k}", f"{t.months[m]} + {k}", t.months[(m + k) % 12]) for m in range(12) for k in range(1, 49))


def _names(names: Iterable[tuple[str, str]], reverse: bool) -> Iterable[Example]:
    for code, name in sorted(names):
        name = clean(name)
        # CLDR's historical and disputed entries carry brackets or digits; a code as its own name is a missing
        # one.
        if name != code and not any(c in "()[]" or c.isdigit() for c in name):
            yield (code, code, name) if reverse else (code, name, code)


def _territories(t: Tables) -> list[tuple[str, str]]:
    return [
        (c, n) for c, n in t.locale.territories.items() if len(c) == 2 and c.isalpha() and c not in ("ZZ", "XA", "XB")
    ]


def _currencies(t: Tables) -> list[tuple[str, str]]:
    current = {c for code, _ in _territories(t) for c in get_territory_currencies(code, CURRENCY_DATE, CURRENCY_DATE)}
    return [(c, n) for c, n in t.locale.currencies.items() if c in current]


def _languages(t: Tables) -> list[tuple[str, str]]:
    return [(c, n) for c, n in t.locale.languages.items() if len(c) == 2]


@dataclass(frozen=True)
class Task:
    """One task.

    `cue` opens the prompt. `needs_tag`: the content says nothing of the language the answer must be in, so an
    untagged prompt has as many answers as there are languages.
    """

    cue: str
    build: Callable[[Tables], Iterable[Example]]
    needs_tag: bool = False

    def examples(self, tables: Tables) -> list[Example]:
        """Cleaned examples of one language; contents are distinct, one with two answers is left out."""
        answers: dict[str, set[str]] = {}
        rows = [(key, clean(content), clean(answer)) for key, content, answer in self.build(tables)]
        for _, content, answer in rows:
            answers.setdefault(content, set()).add(answer)
        unique: dict[str, Example] = {}
        for row in rows:
            if row[1] and row[2] and len(answers[row[1]]) == 1:
                unique.setdefault(row[1], row)
        return list(unique.values())


TASKS: dict[str, Task] = {
    "number_words": Task("number", number_words),
    "number_next": Task("next", number_next),
    "number_sum": Task("sum", number_sum),
    "full_date": Task("date", full_date),
    "short_date": Task("short date", short_date),
    "decimal": Task("decimal", decimal),
    "weekday": Task("weekday", weekday),
    "month": Task("month", month),
    "territory": Task("territory", lambda t: _names(_territories(t), False)),
    "currency": Task("currency", lambda t: _names(_currencies(t), False)),
    "language": Task("language", lambda t: _names(_languages(t), False)),
    "digits_to_words": Task("words", digits_to_words, needs_tag=True),
    "territory_name": Task("territory name", lambda t: _names(_territories(t), True), needs_tag=True),
    "currency_name": Task("currency name", lambda t: _names(_currencies(t), True), needs_tag=True),
    "language_name": Task("language name", lambda t: _names(_languages(t), True), needs_tag=True),
}
