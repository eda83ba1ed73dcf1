"""Tokenizers and their training."""

import json

import pytest

from megatron_moo.data.files import DataError
from megatron_moo.data.tokenizer_training import balanced, train_sentencepiece
from megatron_moo.data.tokenizers import copy_tokenizer, load_tokenizer, tokenizer_sha256
from tools import train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory, script_texts):
    """A small SentencePiece model; half of the scripts are in its training text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    files = []
    for lang, text in list(script_texts.items())[::2]:
        rows = [{"prompt": f"{text} {i}\n", "completion": f"{i * i} {text}", "lang": lang} for i in range(20)]
        files.append(folder / f"{lang}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train_sentencepiece(files, folder / "t.model", vocab_size=420, symbols=("[en]",))
    return folder / "t.model", files


def test_decoding_gives_back_the_text(model, script_texts):
    """Would catch a normalisation, a lost space or line break, or an unknown token, seen script or not."""
    tokenizer = load_tokenizer("sentencepiece", model[0])
    for text in (*script_texts.values(), " ", "\n", " a  b ", "a\n\nb\t", "\u00a0x", "<s></s>", "ﬁ Å"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert len(tokenizer.encode("\n")) == len(tokenizer.encode("[en]")) == 1


def test_training_is_deterministic(model, tmp_path):
    """Would catch a vocabulary that depends on the order of the files or on threads."""
    path, files = model
    train_sentencepiece(files[::-1], tmp_path / "again.model", vocab_size=420, symbols=("[en]",))
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()
    assert "up to date" in train_sentencepiece(files, tmp_path / "again.model", vocab_size=420, symbols=("[en]",))


def test_languages_are_balanced():
    """Would catch a vocabulary that follows the size of the corpora."""
    texts = {"big": [f"{i:04d}" for i in range(1000)], "small": ["abcd"]}
    lines = list(balanced(texts, 400))
    assert sum(line == "abcd" for line in lines) == 100
    big = [int(line) for line in lines if line != "abcd"]
    assert len(big) == 100 and big[0] == 0 and big[-1] > 900, "a large corpus is thinned over its whole length"


def test_unmeetable_sizes_are_one_line(tmp_path, model, capfd):
    """Would catch a stack trace of SentencePiece's and a half-written model."""
    arguments = ["--input", str(model[1][0]), "--out", str(tmp_path / "x.model")]
    assert train_tokenizer.main([*arguments, "--vocab-size", "30000"]) == 2
    assert train_tokenizer.main([*arguments, "--vocab-size", "200"]) == 2
    assert train_tokenizer.main(["--input", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "x.model")]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "--vocab-size 30000" in errors[0] and "at least 300" in errors[1]
    assert not list(tmp_path.iterdir())


def test_hugging_face_directory(tmp_path, script_texts):
    """Would catch special tokens added to a text, or an end of document that is not the tokenizer's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<end>"])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"weights")
    tokenizer = load_tokenizer("huggingface", tmp_path / "hf")
    assert tokenizer.eod == 256 and tokenizer.vocab_size == 257
    for text in script_texts.values():
        assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eod]) == text
    (tmp_path / "copy").mkdir()
    assert copy_tokenizer(tmp_path / "hf", tmp_path / "copy") == "tokenizer"
    assert not (tmp_path / "copy" / "tokenizer" / "model.safetensors").exists()
    assert tokenizer_sha256(tmp_path / "copy" / "tokenizer") == tokenizer_sha256(tmp_path / "hf")
    bare = tmp_path / "bare.json"
    bpe.save(str(bare))
    with pytest.raises(DataError, match="has no end-of-sequence token; name .* --eod-token"):
        load_tokenizer("huggingface", bare)
    assert load_tokenizer("huggingface", bare, "<end>").eod == 256
    with pytest.raises(DataError, match="has no token '</s>'"):
        load_tokenizer("huggingface", bare, "</s>")


def test_bad_tokenizers(tmp_path):
    """Would catch training that starts with a wrong or missing tokenizer."""
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer("sentencepiece", tmp_path / "x.model")
    with pytest.raises(DataError, match="no such file: .*y.model"):
        load_tokenizer("sentencepiece", tmp_path / "y.model")
    with pytest.raises(DataError, match="unknown 'bpe'; known: sentencepiece"):
        load_tokenizer("bpe", tmp_path / "x.model")
    with pytest.raises(DataError, match="not a Hugging Face tokenizer"):
        load_tokenizer("huggingface", tmp_path)
