"""Tiny tokenizers of every kind, trained on the scripts' texts within a second."""

import io
from pathlib import Path

from tests.helpers.scripts import SCRIPTS

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns are known') }}{% endif %}{% endfor %}"
)
# Thoughts of earlier turns are taken out, so that what stood before changes as the conversation goes on.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Opens answers in another way than it shows them.
CROOKED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot> {% endif %}"
)
# Ends a whole conversation with one token more.
CLOSING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
# Made for messages whose content is a list of parts.
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]",
    "[/INST]",
)  # fmt: skip
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "chatml-other-eod": (CHATML, "</s>"),
    "forgetful": (FORGETFUL, "<|im_end|>"),
    "crooked": (CROOKED, "</s>"),
    "closing": (CLOSING, "</s>"),
    "parts": (PARTS, "</s>"),
}


def byte_level_bpe():
    """A byte-level BPE of the `tokenizers` library with the special tokens of all templates."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([*SCRIPTS.values()] * 2, trainer)
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return bpe


def save_hugging_face(folder: Path, chat_template: str | None = None, eos_token: str = "</s>") -> Path:
    """A Hugging Face directory with the byte-level BPE."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), bos_token="<s>", eos_token=eos_token)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def save_unigram(folder: Path, normalizer=None) -> Path:
    """A tokenizer.json in the manner of T5 and XLM-R: special tokens are in the model's vocabulary, too."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted({*"".join(SCRIPTS.values()), *"</s>_0123456789abcdefghijklmnopqrstuvwxyz\u2581"} - {" "})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in letters), ("qq", -1.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([AddedToken("<extra_0>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("zz", special=False)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def save_sentencepiece(path: Path) -> Path:
    """A SentencePiece model with byte fallback; half of the scripts are in its training text."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in list(SCRIPTS.values())[::2] for _ in range(3)]), model_writer=model,
        vocab_size=480, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, user_defined_symbols=["\n"], minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path
