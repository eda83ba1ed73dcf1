"""Bad input of the entry and of the data tools: one error text, exit code 2, nothing written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.entry import Ending, entry_argv, prepare_data, start

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three languages, tokenised as bytes."""
    return prepare_data(tmp_path_factory.mktemp("data"))


def _refused(argv: list[str], run_dir: Path, world_size: int = 1) -> str:
    """The error text of a command line that writes to `run_dir`, which must not come to be."""
    ending = start([*argv, "--moo-run-dir", str(run_dir)], world_size)
    assert not run_dir.exists()
    assert ending.code == 2 or ending.escaped
    return ending.error


# What is wrong -> flags, number of ranks, what the text must hold. The batch of 12 suits one and two slots.
BATCH = ("--global-batch-size", "12")
INTERLEAVED = tuple("--num-layers 4 --num-layers-per-virtual-pipeline-stage 1 --pipeline-model-parallel-size 2".split())
FLAGS = {
    "language": (("--moo-languages", "de,xx"), 1, ("--moo-languages", "xx", "known: de, en, ru")),
    "language twice": (("--moo-languages", "de,de"), 1, ("distinct",)),
    "split": (("--moo-train-split", "nope"), 1, ("'nope'", "known: train, valid")),
    "method": (("--moo-method", "nope"), 1, ("--moo-method", "'nope'", "cagrad")),
    "option": (("--moo-methd", "mean"), 1, ("unrecognized", "--moo-methd")),
    "option of another method": (("--moo-method", "mgda", "--moo-cagrad-c", "0.3"), 1, ("--moo-cagrad-c", "drop it")),
    "value out of range": (("--moo-method", "cagrad", "--moo-cagrad-c", "7"), 1, ("[0, 1)", "7")),
    "batch": (("--global-batch-size", "10"), 1, ("--global-batch-size 10", "multiple of 6", "3 waves", "6 and 12")),
    "small batch": (("--global-batch-size", "4"), 1, ("multiple of 6", "the nearest is 6")),
    "batch of an interleaved pipeline": (
        (*INTERLEAVED, "--global-batch-size", "18", "--microbatch-group-size-per-virtual-pipeline-stage", "4"),
        2,
        ("leaves 3 micro-batches", "3 waves", "groups of 4", "stages (2)", "24 and 36"),
    ),
    "subset without rows": (("--moo-active", "2", "--moo-waves", "1"), 1, ("--moo-active", "1 rows", "--moo-waves")),
    "subset of too many": (("--moo-active", "4"), 1, ("--moo-active", "at most the 3 languages", "found 4")),
    "decoding in groups": (
        (
            *INTERLEAVED,
            "--global-batch-size",
            "24",
            "--microbatch-group-size-per-virtual-pipeline-stage",
            "4",
            "--moo-eval-rows",
            "rows",
        ),
        2,
        ("--moo-eval-rows", "--microbatch-group-size-per-virtual-pipeline-stage 4", "set it to 2"),
    ),
    "weights": (("--moo-preference", "given"), 1, ("--moo-preference-weights", "found")),
    "weights of others": (
        ("--moo-preference", "given", "--moo-preference-weights", "de=1,en=2,xx=1"),
        1,
        ("each of de, en, ru once",),
    ),
    "weight": (("--moo-preference", "given", "--moo-preference-weights", "de=x"), 1, ("'de=x' is not LANG=NUMBER",)),
    "token preference": (("--moo-preference", "tokens"), 1, ("--calculate-per-token-loss",)),
    "log interval": (("--moo-log-interval", "0"), 1, ("--moo-log-interval", "at least 1")),
    "evaluation rows": (("--moo-eval-rows", "/nowhere"), 1, ("--moo-eval-rows", "/nowhere")),
    "samples too long": (("--seq-length", "1"), 1, ("'de'", "raise --seq-length")),
    "width": (("--hidden-size", "15"), 1, ("Megatron refuses", "args.hidden_size % args.num_attention_heads")),
    "context parallel": (("--context-parallel-size", "2"), 2, ("--context-parallel-size", "transformer_engine")),
    "ramp-up": (("--rampup-batch-size", "6", "6", "100"), 1, ("--rampup-batch-size", "drop it")),
    "skipped steps": (("--iterations-to-skip", "2"), 1, ("--iterations-to-skip", "drop it")),
    "saved gradients": (("--save-wgrads-interval", "2"), 1, ("--save-wgrads-interval", "drop it")),
    "multi-token prediction": (("--mtp-num-layers", "1"), 1, ("--mtp-num-layers",)),
    "FSDP2": (("--use-torch-fsdp2",), 2, ("--use-torch-fsdp2",)),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_do_not_work_are_refused_before_anything_is_written(data, tmp_path, case):
    """Would catch: a traceback in the place of an error, or an error only after files and process groups exist."""
    flags, world_size, expected = FLAGS[case]
    text = _refused(entry_argv(data, *BATCH, *flags), tmp_path / "run", world_size)
    assert all(part in text for part in expected), text


def test_megatron_fsdp_is_refused(data, tmp_path):
    """Would catch: gradients that FSDP has summed already. Megatron wants this variable unset with FSDP."""

    def unset() -> None:
        from megatron_moo.platform import cpu

        cpu.install()
        del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]

    flags = ("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads", "--ckpt-format", "fsdp_dtensor")
    ending: Ending = start(entry_argv(data, *BATCH, *flags), 2, setup=unset)
    assert "--use-megatron-fsdp" in ending.error
    assert "FSDP shards gradients before they can be told apart" in ending.error


DAMAGE = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no such file; prepare the data"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text('{"schema": 1'), "cannot be read"),
    "another index": (lambda folder: (folder / "train" / "en.idx").write_bytes(b"x" * 50), "en.idx: its hash"),
    "half the tokens": (lambda folder: (folder / "train" / "en.bin").write_bytes(b"x"), "en.bin: 1 bytes where"),
    "no mask": (lambda folder: (folder / "valid" / "ru.mask.bin").unlink(), "ru.mask.bin: missing"),
    "no directory": (shutil.rmtree, "no such file; prepare the data"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_data_is_refused(data, tmp_path, case):
    """Would catch: training on files that are not those that were prepared."""
    damage, expected = DAMAGE[case]
    folder = shutil.copytree(data, tmp_path / "data")
    damage(folder)
    text = _refused(entry_argv(folder), tmp_path / "run")
    assert expected in text and str(folder) in text


def test_a_missing_option_is_named(data, tmp_path):
    """Would catch: an assertion of Megatron's about a vocabulary, where --moo-data was forgotten."""
    assert "give one of them, found neither" in _refused(entry_argv(data, *BATCH)[2:], tmp_path / "run")


def _program(*command: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """A real process of its own, as a user starts it."""
    paths = os.pathsep.join(map(str, filter(None, (path, ROOT))))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)


def _one_error(result: subprocess.CompletedProcess) -> str:
    output = result.stdout + result.stderr
    assert result.returncode == 2, output
    assert output.count("error: ") == 1 and "Traceback" not in output, output
    return output[output.index("error: ") :]


def test_apex_from_pypi_ends_the_real_program(tmp_path):
    """Would catch: Megatron importing the web toolkit of that name for NVIDIA's Apex."""
    package = tmp_path / "site" / "apex"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    run_dir = tmp_path / "run"
    argv = entry_argv(tmp_path / "data", "--moo-run-dir", str(run_dir))
    text = _one_error(_program("-m", "megatron_moo.finetune", *argv, path=package.parent))
    assert "pip uninstall apex" in text
    assert not run_dir.exists()


def test_unknown_language_ends_the_real_program(data, tmp_path):
    """Would catch: an exit code of 0, or output that only the in-process helper hides."""
    run_dir = tmp_path / "run"
    argv = entry_argv(data, *BATCH, "--moo-languages", "de,tlh", "--moo-run-dir", str(run_dir))
    text = _one_error(_program("-m", "megatron_moo.finetune", *argv))
    assert "no training data for tlh" in text
    assert not run_dir.exists()


ROW = '{"prompt": "a", "completion": "b", "lang": "de"}\n'


def _rows(folder: Path, text: str) -> tuple[str, ...]:
    """Flags of the tool for one file of rows in `folder`."""
    (folder / "rows" / "train").mkdir(parents=True)
    (folder / "rows" / "train" / "de.jsonl").write_text(text)
    return "--data", str(folder / "rows"), "--out", str(folder / "out")


def test_malformed_rows_end_the_real_tool(tmp_path):
    """Would catch: half-written prepared data, or an error that does not say where to look."""
    flags = _rows(tmp_path, ROW + '{"prompt": \n')
    text = _one_error(_program("tools/preprocess.py", *flags, "--tokenizer-type", "byte"))
    assert "de.jsonl:2: malformed JSON" in text
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("\n", ("--tokenizer-type", "byte"), "de.jsonl: empty corpus"),
        (ROW, ("--tokenizer-model", "no.model"), "--tokenizer-model: no such file: no.model"),
    ],
    ids=["empty corpus", "no tokenizer"],
)
def test_the_tool_refuses(tmp_path, capsys, text, flags, expected):
    """Would catch: a traceback of SentencePiece's, or a language that a run would wait for in vain."""
    from tools.preprocess import main

    assert main([*_rows(tmp_path, text), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and expected in error
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
