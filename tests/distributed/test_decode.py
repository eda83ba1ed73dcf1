"""Greedy decoding on every layout gives what a plain loop on one process gives."""

import types

import pytest
import torch
from megatron.core import parallel_state

from tests.helpers import tiny_gpt
from tests.helpers.multiprocess import init_megatron, run_ranks
from tests.helpers.pretraining import run_pretrain

REAL_IDS, NEW, LONGEST = 50, 7, 20  # of 64 ids: the rest stands for padding of the vocabulary


def _prompts() -> list[list[int]]:
    """Unequal lengths, not in order, and a number of them that no layout divides."""
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 18, 1, 9, 6, 19, 2, 5, 12, 4, 16, 8, 11]
    return [torch.randint(0, REAL_IDS, (length,), generator=generator).tolist() for length in lengths]


def _plain_loop(rank: int, eod: int | None) -> list[list[int]]:
    """One row at a time, no padding, whole logits: the reference."""
    init_megatron()
    model = tiny_gpt.build(tiny_gpt.Variant()).eval()
    answers = []
    for prompt in _prompts():
        tokens, answer = list(prompt), []
        while len(answer) < NEW and len(tokens) < LONGEST:
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
            tokens.append(int(logits[0, -1, :REAL_IDS].argmax()))
            if tokens[-1] == eod:
                break
            answer.append(tokens[-1])
        answers.append(answer)
    return answers


def _decode(rank: int, tp: int, pp: int, eod: int, batch_size: int) -> list[list[int]]:
    from megatron_moo.training.decode import greedy_decode

    init_megatron(tp, pp)
    chunk = tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant(sequence_parallel=tp > 1)))
    options = dict(max_new_tokens=NEW, seq_length=LONGEST, eod=eod, vocab_size=REAL_IDS, batch_size=batch_size)
    answers = greedy_decode([chunk], _prompts(), **options)
    assert chunk.training and greedy_decode([chunk], [], **options) == []
    return answers


@pytest.fixture(scope="module")
def reference() -> tuple[int, list[list[int]]]:
    """An end-of-document id that ends some answers early and not others, and the answers."""
    (free,) = run_ranks(_plain_loop, 1, None)
    tokens = [token for answer in free for token in answer[1:]]
    eod = max(set(tokens), key=tokens.count)
    (answers,) = run_ranks(_plain_loop, 1, eod)
    lengths = {len(answer) for answer in answers}
    assert NEW in lengths and 1 in lengths and len(lengths) > 3  # 1: a prompt that all but fills the length
    return eod, answers


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "batch_size"),
    [(1, 1, 1, 4), (2, 2, 2, 3), (1, 2, 1, 1), (1, 1, 4, 64), (2, 1, 1, 5)],
    ids=lambda value: str(value),
)
def test_equals_a_plain_loop(tp, pp, dp, batch_size, reference):
    """Would catch: padding that is attended to, a row mixed up by refilling or gathering, a padded id, stages or
    slots that disagree, answers that run past the end of the document or of the sequence."""
    eod, expected = reference
    for answers in run_ranks(_decode, tp * pp * dp, tp, pp, eod, batch_size):
        assert answers == expected


def _continue_counting(chunks: list, optimizer: object) -> tuple[list[list[int]], list[list[int]]]:
    from megatron_moo.training.decode import greedy_decode

    prompts = [[start + i for i in range(4)] for start in (5, 40, 20, 58, 33)]
    options = dict(max_new_tokens=5, seq_length=16, eod=63, vocab_size=64, batch_size=3)
    _leave_gathers_due(chunks)
    answers = greedy_decode(chunks, prompts, **options)
    assert all(chunk.remove_forward_pre_hook_handles for chunk in chunks)
    return answers, greedy_decode(chunks, prompts[:1], **options)


def _leave_gathers_due(chunks: list) -> None:
    """The state after an optimizer step under overlap: each rank has its own shard of the parameters alone."""
    for chunk in chunks:
        chunk.enable_forward_pre_hook()
        for bucket in (bucket for buffer in chunk.buffers for bucket in buffer.buckets):
            shards = bucket.param_data.chunk(parallel_state.get_data_parallel_world_size())
            for rank, shard in enumerate(shards):
                if rank != parallel_state.get_data_parallel_rank():
                    shard.zero_()


EXPERTS = tiny_gpt.Variant(experts=4, dispatcher="allgather")


def _decode_with_experts(rank: int, ep: int, eod: int) -> list[list[int]]:
    from megatron_moo.training.decode import greedy_decode

    init_megatron(ep=ep)
    chunk = tiny_gpt.wrap(tiny_gpt.build(EXPERTS))
    options = dict(max_new_tokens=NEW, seq_length=LONGEST, eod=eod, vocab_size=REAL_IDS, batch_size=3)
    return greedy_decode([chunk], _prompts(), **options)


def test_ranks_that_share_experts_decode_in_step(reference):
    """Would catch: experts that get rows of other lengths, or other numbers of rows, from their peers: a crash, or
    tokens of one prompt in another's answer."""
    eod, _ = reference
    (alone,) = run_ranks(_decode_with_experts, 1, 1, eod)
    assert len({len(answer) for answer in alone}) > 2
    for answers in run_ranks(_decode_with_experts, 4, 2, eod):
        assert answers == alone


def test_a_trained_model_in_an_interleaved_pipeline(tiny_argv):
    """Would catch: decoding that starts before overlapped parameter gathers end, or loses a chunk of a stage."""
    interleaved = ("--num-layers-per-virtual-pipeline-stage", "1", "--overlap-grad-reduce", "--overlap-param-gather")
    argv = tiny_argv(*interleaved, "--attention-dropout", "0", "--hidden-dropout", "0", "--bf16", pp=2, steps=40)
    for trace in run_pretrain(argv, 4, inspect=_continue_counting):
        expected = [[start + i for i in range(5)] for start in (9, 44, 24, 62, 37)]
        expected[3] = [62]  # 63 ends the document
        assert trace.inspected == (expected, expected[:1])


def _argmax(rank: int) -> None:
    from megatron_moo.training.decode import vocab_parallel_argmax

    whole = torch.zeros(4, 12)
    whole[0, [3, 7]] = 2.0  # a tie across ranks: the lowest id
    whole[1, 11] = 5.0  # padding
    whole[1, 9] = 4.0
    whole[2] = torch.nan
    whole[3] -= 1e30
    whole[3, 4] = -1e29
    part = whole.chunk(4, -1)[rank]
    assert vocab_parallel_argmax(part, 10, torch.distributed.group.WORLD).tolist() == [3, 9, 0, 4]


def test_vocab_parallel_argmax_on_hard_rows():
    """Would catch: ties decided differently by layout, padding chosen, an id out of range after divergence."""
    run_ranks(_argmax, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=[[1], []]), "prompt 1 must have between 1 and"),
        (dict(prompts=[[1] * 8]), "prompt 0 .* found 8"),
        (dict(prompts=[[70]]), r"prompt 0 must hold ids in \[0, 64\), found 70 to 70"),
        (dict(eod=64), "eod must be an id below vocab_size 64, found 64"),
        (dict(batch_size=0), "batch_size must be at least 1, found 0"),
        (dict(context=2), "context_parallel_size 2"),
    ],
)
def test_refusals(change, message):
    """Would catch: a prompt that hangs or crashes some ranks halfway instead of being named."""
    from megatron_moo.training.decode import greedy_decode

    context = change.pop("context", 1)
    model = torch.nn.Linear(1, 1)
    model.config = types.SimpleNamespace(context_parallel_size=context)
    arguments = dict(prompts=[[1]], max_new_tokens=2, seq_length=8, eod=0, vocab_size=64, batch_size=2) | change
    with pytest.raises(ValueError, match=message):
        greedy_decode([model], groups=types.SimpleNamespace(), **arguments)
