"""Shared inputs of the data tests."""

import json
from pathlib import Path

import pytest

from megatron_moo.data.encoding.tokenizers import Tokenizer, load_tokenizer
from tests.helpers.tiny_tokenizers import TEMPLATES, save_hugging_face, save_sentencepiece

# Scripts of several kinds: right to left, combining marks, no spaces, outside the basic plane.
TEXTS = {
    "en": "  two  spaces, and\ta tab ",
    "vi": "tiếng Việt có dấu",
    "ru": "сорок два",
    "el": "σαράντα δύο",
    "he": "ארבעים ושתיים",
    "fa": "چهل و دو",
    "hi": "बयालीस क्षेत्र",
    "bn": "বিয়াল্লিশ",
    "ta": "நாற்பத்திரண்டு",
    "th": "สี่สิบสองน้ำ",
    "ka": "ორმოცდაორი",
    "am": "አርባ ሁለት",
    "ja": "四十二カタカナ",
    "ko": "마흔둘",
    "zh": "四十二𠮷",
    "und": "e\u0301 🙂 \u200c\n\n",
}


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def prompt_rows(lang: str, count: int, longest: int = 6) -> list[dict]:
    """Distinct rows of different lengths."""
    return [
        {"prompt": f"{i}:", "completion": lang[0] * (1 + i % longest), "lang": lang, "task": "t"} for i in range(count)
    ]


@pytest.fixture(scope="session")
def script_texts() -> dict[str, str]:
    """A text of each script, by language."""
    return TEXTS


@pytest.fixture
def corpus_dir(tmp_path: Path) -> Path:
    """Two objectives with a train and a test split, and an unseen language."""
    data = tmp_path / "jsonl"
    for lang, count in (("de", 30), ("en", 20)):
        write_rows(data / "train" / f"{lang}.jsonl", prompt_rows(lang, count))
        write_rows(data / "test" / f"{lang}.jsonl", prompt_rows(lang, 5))
    write_rows(data / "near" / "da.jsonl", prompt_rows("da", 4))
    return data


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """A tiny tokenizer of each kind, and one for each chat template of tests/helpers/tiny_tokenizers.py."""
    folder = tmp_path_factory.mktemp("tokenizers")
    loaded = {
        "byte": load_tokenizer("byte"),
        "sentencepiece": load_tokenizer("sentencepiece", save_sentencepiece(folder / "spm.model")),
        "bpe": load_tokenizer("huggingface", save_hugging_face(folder / "bpe")),
    }
    for name, (template, eos) in TEMPLATES.items():
        loaded[name] = load_tokenizer("huggingface", save_hugging_face(folder / name, template, eos))
    return loaded
