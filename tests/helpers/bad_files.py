"""Data directories with one thing wrong, and the words that the message must have.

    bad = next(bad for bad in BAD_FILES if bad.id == "crlf")
    bad.make(data)                                  # writes data/train/..., beside a good data/train/de.jsonl
    find_sources(data, **bad.options)               # this, or scan, or read_records says bad.words

`{data}` in the words stands for the directory. `bad.line`: only one line is bad, so that --skip-bad goes on.
"""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import zstandard

GOOD = [{"prompt": f"{i}:", "completion": "gut" * (i + 1), "lang": "de", "id": str(i)} for i in range(4)]
EN = [{"prompt": f"{i}:", "completion": "good" * (i + 1), "lang": "en", "id": str(i)} for i in range(4)]


def lines(rows: list[dict]) -> bytes:
    """Rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


TEXT = lines(EN)
ZST = zstandard.ZstdCompressor().compress(TEXT)


@dataclass(frozen=True)
class BadFile:
    """See the top of the module. `options`: of find_sources."""

    id: str
    make: Callable[[Path], object]
    words: str
    line: bool = False
    options: dict = field(default_factory=dict)


def _file(content: bytes, name: str = "en.jsonl") -> Callable[[Path], object]:
    def make(data: Path) -> None:
        path = data / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return make


def _files(**contents: bytes) -> Callable[[Path], object]:
    return lambda data: [_file(content, name.replace("__", "/"))(data) for name, content in contents.items()]


def _second_line(content: bytes, name: str = "en.jsonl") -> Callable[[Path], object]:
    first, rest = TEXT.split(b"\n", 1)
    return _file(first + b"\n" + content + b"\n" + rest, name)


def _link(symbolic: bool) -> Callable[[Path], object]:
    def make(data: Path) -> None:
        _file(TEXT)(data)
        (data / "test").mkdir()
        (os.symlink if symbolic else os.link)(data / "train" / "en.jsonl", data / "test" / "en.jsonl")

    return make


def _dangling(data: Path) -> None:
    _file(TEXT, "en/a.jsonl")(data)
    (data / "train" / "en" / "b.jsonl").symlink_to(data / "nowhere.jsonl")


def _parquet(columns: Callable[[], dict], name: str = "en.parquet", cut: int | None = None) -> Callable[[Path], object]:
    def make(data: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        path = data / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns()), path)
        path.write_bytes(path.read_bytes()[:cut])

    return make


def _damaged_parquet(data: Path) -> None:
    _parquet(lambda: {"text": [str(i) * 50 for i in range(1000)]})(data)
    path = data / "train" / "en.parquet"
    content = bytearray(path.read_bytes())
    content[40:80] = b"\xff" * 40
    path.write_bytes(content)


def _two_columns(data: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, data / "train" / "en.parquet")


def _latin_name(data: Path) -> None:
    (data / "train" / "en").mkdir()
    with open(os.fsencode(data / "train" / "en") + b"/caf\xe9.jsonl", "wb") as stream:
        stream.write(TEXT)


def _pipe(data: Path) -> None:
    (data / "train").mkdir(exist_ok=True)
    os.mkfifo(data / "train" / "en.jsonl")


def _corrupt(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 8]) + content[middle + 8 :]


def _long_zst() -> bytes:
    # More than a block of the reader, so that whole lines come before the defect; with the checksum that zstd writes.
    random = Random(0)
    texts = [random.randbytes(40).hex() for _ in range(4000)]
    rows = [{"prompt": text[:20], "completion": text, "lang": "en"} for text in texts]
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(lines(rows))


_long = _long_zst()
BAD_FILES = [
    # One line is bad.
    BadFile(
        "latin-1",
        _second_line('{"prompt": "q", "completion": "\xe9", "lang": "en"}'.encode("latin-1")),
        "train/en.jsonl:2: not UTF-8 at byte 32 of the line (0xe9)",
        True,
    ),
    BadFile("cut-character", _second_line('{"text": "é'.encode()[:-1]), "train/en.jsonl:2: not UTF-8 at byte 11", True),
    BadFile("cesu-8", _second_line(b'{"text": "\xed\xa0\x80"}'), "train/en.jsonl:2: not UTF-8 at byte 11", True),
    BadFile(
        "bom-in-the-middle",
        _second_line(b'\xef\xbb\xbf{"text": "joined", "lang": "en"}'),
        "train/en.jsonl:2: a byte order mark at the start of the line, as files joined together have",
        True,
    ),
    BadFile(
        "crlf-in-the-middle",
        _second_line(b'{"text": "dos", "lang": "en"}\r'),
        "train/en.jsonl:2: CRLF line end; make it LF: sed 's/\\r$//' {data}/train/en.jsonl > NEW",
        True,
    ),
    BadFile(
        "nul",
        _second_line(b'{"text": "a\0b", "lang": "en"}'),
        "train/en.jsonl:2: a NUL byte at byte 12 of the line",
        True,
    ),
    BadFile("nul-block", _second_line(b"\0" * 100), "train/en.jsonl:2: a NUL byte at byte 1 of the line", True),
    BadFile("nul-in-text", _second_line(b"a\0b", "en.txt"), "train/en.txt:2: a NUL byte at byte 2 of the line", True),
    BadFile("malformed", _second_line(b'{"text": "a",}'), "train/en.jsonl:2: malformed JSON: ", True),
    BadFile("half-a-row", _file(TEXT[:-9]), "train/en.jsonl:4: malformed JSON: Unterminated string", True),
    BadFile(
        "two-rows-on-a-line",
        _second_line(b'{"text": "a"}{"text": "b"}'),
        "train/en.jsonl:2: malformed JSON: Extra data at column 14",
        True,
    ),
    BadFile(
        "json-array",
        _file(json.dumps(EN, indent=1).encode()),
        "train/en.jsonl:1: malformed JSON: Expecting value at column 2; one object a line is needed",
        True,
    ),
    BadFile("no-object", _second_line(b'["a", "b"]'), "train/en.jsonl:2: a row must be a JSON object, got list", True),
    BadFile(
        "duplicate-key",
        _second_line(b'{"prompt": "a", "prompt": "b", "completion": "c"}'),
        "train/en.jsonl:2: key 'prompt' occurs twice in one object",
        True,
    ),
    BadFile(
        "nested-duplicate-key",
        _second_line(b'{"messages": [{"role": "user", "role": "assistant"}]}'),
        "train/en.jsonl:2: key 'role' occurs twice in one object",
        True,
    ),
    BadFile("nan", _second_line(b'{"text": "a", "score": NaN}'), "train/en.jsonl:2: NaN is no JSON value", True),
    BadFile(
        "infinity",
        _second_line(b'{"text": "a", "score": -Infinity}'),
        "train/en.jsonl:2: -Infinity is no JSON value",
        True,
    ),
    BadFile(
        "lone-surrogate",
        _second_line(b'{"messages": [{"role": "user", "content": "ab\\ud83d"}]}'),
        "train/en.jsonl:2: field 'messages[0].content' holds a lone surrogate at character 2",
        True,
    ),
    BadFile("nested-too-deep", _second_line(b"[" * 200_000), "train/en.jsonl:2: malformed JSON: ", True),
    BadFile(
        "huge-number",
        _second_line(b'{"text": "a", "n": ' + b"9" * 5000 + b"}"),
        "train/en.jsonl:2: malformed JSON: ",
        True,
    ),
    # The whole file is bad.
    BadFile(
        "utf-16",
        _file(TEXT.decode().encode("utf-16")),
        "train/en.jsonl:1: UTF-16 (by its byte order mark), not UTF-8; "
        "convert it: iconv -f UTF-16 -t UTF-8 {data}/train/en.jsonl > NEW",
    ),
    BadFile(
        "utf-32", _file(TEXT.decode().encode("utf-32")), "train/en.jsonl:1: UTF-32 (by its byte order mark), not UTF-8"
    ),
    BadFile(
        "utf-16-zst",
        _file(zstandard.ZstdCompressor().compress(TEXT.decode().encode("utf-16")), "en.jsonl.zst"),
        "train/en.jsonl.zst:1: UTF-16 (by its byte order mark), not UTF-8; convert it: zstd -dc ",
    ),
    BadFile(
        "bom",
        _file(b"\xef\xbb\xbf" + TEXT),
        "train/en.jsonl:1: starts with a UTF-8 byte order mark; remove it: sed "
        "'1s/^\\xef\\xbb\\xbf//' {data}/train/en.jsonl > NEW",
    ),
    BadFile("crlf", _file(TEXT.replace(b"\n", b"\r\n")), "train/en.jsonl:1: CRLF line end; make it LF: sed "),
    BadFile(
        "crlf-gz",
        _file(gzip.compress(TEXT.replace(b"\n", b"\r\n")), "en.txt.gz"),
        "train/en.txt.gz:1: CRLF line end; make it LF: gzip -dc ",
    ),
    BadFile(
        "huge-line",
        _file(TEXT + b'{"text": "' + b"a" * (64 << 20) + b'"}\n'),
        "train/en.jsonl:5: a line of more than 67108864 bytes",
    ),
    BadFile(
        "truncated-zst",
        _file(ZST[:-10], "en.jsonl.zst"),
        f"train/en.jsonl.zst:1: truncated zst: the file ends at byte {len(ZST) - 10}, inside a frame",
    ),
    BadFile(
        "truncated-second-frame",
        _file(ZST + ZST[:-10], "en.jsonl.zst"),
        f"train/en.jsonl.zst:5: truncated zst: the file ends at byte {2 * len(ZST) - 10}, inside a frame",
    ),
    BadFile(
        "truncated-long-zst",
        _file(_long[: len(_long) // 2], "en.jsonl.zst"),
        f"truncated zst: the file ends at byte {len(_long) // 2}, inside a frame",
    ),
    BadFile("corrupt-zst", _file(_corrupt(_long), "en.jsonl.zst"), ": corrupt zst data in bytes "),
    BadFile(
        "junk-after-zst",
        _file(ZST + b"some junk", "en.jsonl.zst"),
        f"train/en.jsonl.zst:5: corrupt zst data in bytes {len(ZST)} to {len(ZST) + 9}",
    ),
    BadFile("truncated-gz", _file(gzip.compress(TEXT)[:-10], "en.jsonl.gz"), ": truncated gz: the file ends at byte "),
    BadFile(
        "corrupt-gz", _file(_corrupt(gzip.compress(TEXT * 50, mtime=0)), "en.jsonl.gz"), ": corrupt gz data in bytes "
    ),
    BadFile(
        "zst-named-jsonl", _file(ZST), "train/en.jsonl: the content is zst-compressed but the name does not end in .zst"
    ),
    BadFile(
        "gz-named-txt", _file(gzip.compress(TEXT), "en.txt"), "train/en.txt: the content is gz-compressed but the name"
    ),
    BadFile(
        "jsonl-named-zst",
        _file(TEXT, "en.jsonl.zst"),
        "train/en.jsonl.zst: the name ends in .zst but the content is not zst-compressed",
    ),
    BadFile(
        "gz-named-zst", _file(gzip.compress(TEXT), "en.jsonl.zst"), "train/en.jsonl.zst: the content is gz-compressed"
    ),
    BadFile(
        "parquet-named-jsonl", _parquet(lambda: {"text": ["a"]}, "en.jsonl"), "train/en.jsonl: the content is Parquet"
    ),
    BadFile(
        "jsonl-named-parquet", _file(TEXT, "en.parquet"), "train/en.parquet: not a Parquet file, or a truncated one"
    ),
    BadFile(
        "truncated-parquet",
        _parquet(lambda: {"text": ["a"] * 99}, cut=-20),
        "train/en.parquet: not a Parquet file, or a truncated one",
    ),
    BadFile("damaged-parquet", _damaged_parquet, "train/en.parquet:1: damaged Parquet data from this row on"),
    BadFile(
        "parquet-column-missing",
        _parquet(lambda: {"prompt": ["a"], "answer": ["b"]}),
        "train/en.parquet: missing column: "
        "rows need 'messages', or 'prompt' and 'completion', or 'text'; it has: prompt, answer",
    ),
    BadFile(
        "parquet-binary",
        _parquet(lambda: {"text": [b"a"]}),
        "train/en.parquet: column 'text' must be string, is binary",
    ),
    BadFile(
        "parquet-number",
        _parquet(lambda: {"prompt": ["a"], "completion": [7]}),
        "train/en.parquet: column 'completion' must be string, is int64",
    ),
    BadFile(
        "parquet-messages-text",
        _parquet(lambda: {"messages": ["[]"]}),
        "train/en.parquet: column 'messages' must be a list of role and content, is string",
    ),
    BadFile("parquet-column-twice", _two_columns, "train/en.parquet: two columns are called 'text'"),
    BadFile("parquet-no-rows", _parquet(lambda: {"text": ["a"][:0]}), "train/en.parquet: "),
    BadFile("empty", _file(b""), "train/en.jsonl: empty file"),
    BadFile(
        "empty-zst", _file(zstandard.ZstdCompressor().compress(b""), "en.jsonl.zst"), "train/en.jsonl.zst: empty file"
    ),
    BadFile("empty-parquet", _file(b"", "en.parquet"), "train/en.parquet: empty file"),
    BadFile("blank", _file(b"\n \n\t\n"), "train/en.jsonl: empty corpus: only blank lines"),
    # The directory is bad.
    BadFile("dangling-link", _dangling, "train/en/b.jsonl: cannot be read: No such file or directory"),
    BadFile(
        "directory-for-file", _file(TEXT, "en.jsonl/a.jsonl"), "train/en.jsonl: a directory where a file is needed"
    ),
    BadFile("directory-too-deep", _file(TEXT, "en/more/a.jsonl"), "train/en/more: a directory where a file is needed"),
    BadFile("name-not-utf8", _latin_name, "train/en/caf\\udce9.jsonl: a name that is not UTF-8; rename it"),
    BadFile("pipe", _pipe, "train/en.jsonl: a pipe or device where a file is needed"),
    BadFile("empty-language", lambda data: (data / "train" / "en").mkdir(), "train/en: empty language: no file in it"),
    BadFile("unknown-extension", _file(TEXT, "en.csv"), "train/en.csv: unknown extension; known: .jsonl, "),
    BadFile("json", _file(TEXT, "en.json"), "one JSON object a line is .jsonl"),
    BadFile("other-compression", _file(TEXT, "en.jsonl.xz"), "train/en.jsonl.xz: unknown extension"),
    BadFile(
        "tags-differ-by-case",
        _files(**{"en-US.jsonl": TEXT, "en-us.jsonl": TEXT}),
        "'en-US' (of {data}/train/en-US.jsonl) and 'en-us' differ only by case or by - and _",
    ),
    BadFile(
        "tags-differ-by-separator",
        _files(**{"pt-BR.jsonl": TEXT, "pt_BR.txt": TEXT}),
        "differ only by case or by - and _",
    ),
    BadFile("no-tag", _file(TEXT, "english-rows.jsonl"), "'english-rows' is no language tag (BCP 47)"),
    BadFile("tag-with-part", _file(TEXT, "en.part1.jsonl"), "'en.part1' is no language tag (BCP 47)"),
    BadFile(
        "language-twice",
        _files(**{"en.jsonl": TEXT, "en.jsonl.zst": ZST}),
        "train/en.jsonl.zst: language 'en' also has {data}/train/en.jsonl",
    ),
    BadFile("symbolic-link", _link(True), "train/en.jsonl: the same file as {data}/test/en.jsonl"),
    BadFile("hard-link", _link(False), "train/en.jsonl: the same file as {data}/test/en.jsonl"),
    BadFile("empty-split", lambda data: (data / "test").mkdir(), "test: empty corpus: no SPLIT/LANG.EXT in it"),
    BadFile(
        "unknown-split", _file(TEXT), "split 'dev': no {data}/dev/; known splits: train", options={"splits": ["dev"]}
    ),
    BadFile(
        "unknown-language",
        _file(TEXT),
        "--languages: unknown language 'EN'; {data} has: de, en; did you mean 'en'?",
        options={"languages": ["EN"]},
    ),
    BadFile(
        "language-asked-twice", _file(TEXT), "--languages: 'en' is given twice", options={"languages": ["en", "en"]}
    ),
    BadFile(
        "mixed-text",
        _file(TEXT, "all.txt"),
        "train/all.txt: the lines of a text file cannot name their language",
        options={"mixed": True},
    ),
    BadFile(
        "mixed-directory",
        _file(TEXT, "en/a.jsonl"),
        "train/en: a directory where a file is needed",
        options={"mixed": True},
    ),
]


def make_bad(bad: BadFile, data: Path) -> str:
    """Write the directory; returns the words that the message must have."""
    _file(lines(GOOD), "de.jsonl")(data)
    bad.make(data)
    return bad.words.replace("{data}", str(data))
