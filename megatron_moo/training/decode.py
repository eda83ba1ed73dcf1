"""Greedy decoding with a model that is laid out for training, under tensor, pipeline and data parallelism.

Protocol.  The prompts are dealt to the slots (data-parallel ranks) by length, so that slots finish together.  All ranks
of a slot hold the same rows and take the same steps:

1. The slot keeps up to `batch_size` rows going.  A row that ends makes room for the next prompt, so a long answer does
   not hold others up.
2. One forward pass over the rows, right-padded to a common length; under causal attention padding is never seen.  With
   pipeline parallelism the rows travel as several micro-batches, through Megatron's own schedule.
3. The last stage applies the output layer to each row's last position alone.  Every tensor-parallel rank offers the
   best id of its part of the vocabulary, and the best offer wins; on a tie, the lowest id.
4. The last stage sends the ids to the other stages.  Rows end at the end-of-document token, after `max_new_tokens`, or
   when `seq_length` is full.

Slots need not agree on the number of steps, except when expert parallelism lets one slot's forward pass wait for
another's: then all go on until the last one is done, with as many rows and columns as the largest needs.  At the end
the answers are gathered over the slots.

There is no key-value cache: each new token costs a forward pass over its row.

Shapes: R rows of a slot, M micro-batches, B rows of a micro-batch, S common length, V vocabulary, T tensor-parallel
ranks, H hidden size.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_attr_wrapped_model, get_model_config

LENGTH_MULTIPLE = 8  # S is rounded up to it: fewer distinct shapes, and tensor cores like it
_NONE = -1  # fills answers up to a common length when they are gathered


@dataclass
class _Row:
    number: int  # among all prompts
    tokens: list[int]
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _MicroBatch:
    tokens_BS: torch.Tensor
    positions_BS: torch.Tensor
    last_B: torch.Tensor  # where each row's last token stands


def greedy_decode(
    model_chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seq_length: int,
    eod: int,
    vocab_size: int,
    batch_size: int = 64,
    groups: ProcessGroupCollection | None = None,
) -> list[list[int]]:
    """The most likely next tokens of every prompt, one after the other, until the end of the document.

    Every rank calls it with the same prompts, and every rank gets all answers.  The model may be wrapped (DDP, half
    precision) and in training mode; it is as before afterwards.  Gathers of parameters that are still due under
    overlap are completed first.

    Args:
        model_chunks: this rank's chunks of a `GPTModel`.
        prompts: token ids.
        max_new_tokens: longest answer, the end-of-document token included.
        seq_length: longest prompt and answer together.
        eod: the token that ends an answer.
        vocab_size: number of ids of the tokenizer; padding of the vocabulary beyond it is never chosen.
        batch_size: rows of a forward pass of a slot.
        groups: process groups with `tp`, `pp`, `dp`; default: the model's.

    Returns:
        Token ids of each prompt's answer, in the order of the prompts, without `eod`.

    Raises:
        ValueError: an argument out of range, a prompt that is empty, holds no token of the vocabulary, or fills
            `seq_length`; context parallelism.
    """
    config = get_model_config(model_chunks[0])
    groups = groups or get_attr_wrapped_model(model_chunks[0], "pg_collection")
    _check(prompts, max_new_tokens, seq_length, eod, vocab_size, batch_size, config)

    slots, slot = groups.dp.size(), groups.dp.rank()
    by_length = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number))
    waiting = deque(_Row(number, list(prompts[number])) for number in by_length[slot::slots])
    rows = list(waiting)
    decoder = _Decoder(model_chunks, groups, config, vocab_size, seq_length, pad=eod)
    active: list[_Row] = []
    with torch.no_grad(), _ready_for_evaluation(model_chunks, config):
        while True:
            while waiting and len(active) < batch_size:
                active.append(waiting.popleft())
            count, longest = decoder.agree([row.tokens for row in active])
            if not count:
                break
            tokens = decoder.next_tokens([row.tokens for row in active], count, longest)
            for row, token in zip(active, tokens, strict=True):
                row.tokens.append(token)
                row.answer.append(token)
            active = [row for row in active if not _ended(row, eod, max_new_tokens, seq_length)]
        return _gather(rows, len(prompts), max_new_tokens, eod, groups.dp, decoder.device)


def _ended(row: _Row, eod: int, max_new_tokens: int, seq_length: int) -> bool:
    return row.answer[-1] == eod or len(row.answer) == max_new_tokens or len(row.tokens) == seq_length


def _check(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seq_length: int,
    eod: int,
    vocab_size: int,
    batch_size: int,
    config: Any,
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    if not 0 <= eod < vocab_size:
        raise ValueError(f"eod must be an id below vocab_size {vocab_size}, found {eod}: answers would never end")
    if config.context_parallel_size > 1:
        raise ValueError(
            f"decoding needs the whole sequence on a rank, found context_parallel_size "
            f"{config.context_parallel_size}; evaluate with --context-parallel-size 1"
        )
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < seq_length:
            raise ValueError(
                f"prompt {number} must have between 1 and seq_length - 1 = {seq_length - 1} tokens, to leave room for "
                f"an answer, found {len(prompt)}; shorten or drop it, or raise seq_length"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(
                f"prompt {number} must hold ids in [0, {vocab_size}), found {min(prompt)} to {max(prompt)}; was it "
                "encoded with another tokenizer?"
            )


@contextlib.contextmanager
def _ready_for_evaluation(chunks: Sequence[torch.nn.Module], config: Any) -> Iterator[None]:
    """Evaluation mode, parameters gathered, timers off; all as before at the end."""
    training, timers = [chunk.training for chunk in chunks], config.timers
    overlapped = [
        chunk
        for chunk in chunks
        if isinstance(chunk, DistributedDataParallel) and chunk.remove_forward_pre_hook_handles
    ]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    config.timers = None  # Megatron's are per training step
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, was_training in zip(chunks, training, strict=True):
            chunk.train(was_training)
        config.timers = timers
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()


class _Decoder:
    """One decoding step of a slot, and what it needs to know."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: ProcessGroupCollection,
        config: Any,
        vocab_size: int,
        seq_length: int,
        pad: int,
    ) -> None:
        self.chunks = list(chunks)
        self.groups = groups
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self.pad = pad
        self.device = next(chunks[0].parameters()).device
        self.pipeline = groups.pp.size()
        self.multiple = math.lcm(LENGTH_MULTIPLE, groups.tp.size() if config.sequence_parallel else 1)
        self.coupled = config.expert_model_parallel_size > 1
        self.schedule = get_forward_backward_func()

    def agree(self, rows: list[list[int]]) -> tuple[int, int]:
        """Number of rows and longest one of this step; 0 rows when there is nothing left to do.

        Experts on several ranks take tensors of one shape from all of them, and a slot that is done must go on.
        """
        shape = len(rows), max(map(len, rows), default=1)
        if not self.coupled:
            return shape
        largest = torch.tensor(shape, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.groups.dp)
        return tuple(largest.tolist())

    def next_tokens(self, rows: list[list[int]], total: int, longest: int) -> list[int]:
        """The next token of every row; the same on all ranks of the slot. The model sees `total` rows."""
        batches = self._micro_batches(rows + [[self.pad]] * (total - len(rows)), longest)
        per_stage = [iter(batches) for _ in self.chunks]
        count, length = batches[0].tokens_BS.shape
        collected = self.schedule(
            forward_step_func=self._forward_step,
            data_iterator=per_stage if len(self.chunks) > 1 else per_stage[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=count,
            forward_only=True,
            collect_non_loss_data=True,
        )
        tokens_R = torch.empty(len(batches) * count, dtype=torch.long, device=self.device)
        if collected:  # the last stage
            tokens_R.copy_(torch.cat(collected))
        if self.pipeline > 1:
            dist.broadcast(tokens_R, group=self.groups.pp, group_src=self.pipeline - 1)
        return tokens_R[: len(rows)].tolist()

    def _micro_batches(self, rows: list[list[int]], longest: int) -> list[_MicroBatch]:
        """M equal micro-batches, one per pipeline stage; rows of one token fill up the last."""
        count = math.ceil(len(rows) / self.pipeline)
        rows = rows + [[self.pad]] * (count * self.pipeline - len(rows))
        length = min(math.ceil(longest / self.multiple) * self.multiple, self.seq_length)
        tokens_RS = torch.tensor([row + [self.pad] * (length - len(row)) for row in rows], device=self.device)
        last_R = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        positions_BS = torch.arange(length, device=self.device).expand(count, -1)
        parts = zip(tokens_RS.split(count), last_R.split(count), strict=True)
        return [_MicroBatch(tokens_BS, positions_BS, last_B) for tokens_BS, last_B in parts]

    def _forward_step(self, batches: Iterator[_MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        output = chunk(
            batch.tokens_BS,
            batch.positions_BS,
            None,
            output_processor=_last_logits,
            output_processor_context=(batch.last_B, self.groups.tp),
        )
        return output, self._choose

    def _choose(self, logits_BV: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        return vocab_parallel_argmax(logits_BV, self.vocab_size, self.groups.tp)


def _last_logits(
    *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, context: Any, **_: Any
) -> torch.Tensor:
    """Logits [B, V/T] of each row's last position, from hidden states [S, B, H] ([S/T, B, H] in sequence parallel)."""
    last_B, tp_group = context
    split = output_layer.sequence_parallel
    if split:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp_group)
    last_1BH = hidden_states[last_B, torch.arange(len(last_B), device=last_B.device)].unsqueeze(0)
    output_layer.sequence_parallel = False
    try:
        logits_1BV, _bias = output_layer(last_1BH, weight=output_weight, runtime_gather_output=False)
    finally:
        output_layer.sequence_parallel = split
    return scale_logits(logits_1BV)[0]


def vocab_parallel_argmax(logits_BV: torch.Tensor, vocab_size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Ids [B] of the largest logits below `vocab_size`, the lowest id on a tie.

    Args:
        logits_BV: this rank's part [B, V/T] of the logits; the parts are in rank order.
        vocab_size: ids from here on are padding.
        group: the tensor-parallel group.
    """
    part = logits_BV.shape[-1]
    first = group.rank() * part
    ids_V = torch.arange(first, first + part, device=logits_BV.device)
    # not-a-number compares false with everything, itself included: a diverged model would have no best id
    values_BV = logits_BV.double().nan_to_num(nan=-torch.inf).masked_fill(ids_V >= vocab_size, -torch.inf)
    best_B = values_BV.amax(-1, keepdim=True)
    # argmax promises no order among equals: take the lowest id that reaches the maximum.
    id_B = torch.where(values_BV == best_B, ids_V, torch.iinfo(torch.long).max).amin(-1)
    if group.size() == 1:
        return id_B
    offer = torch.stack([best_B.squeeze(-1), id_B.double()])  # doubles hold both exactly
    offers = [torch.empty_like(offer) for _ in range(group.size())]
    dist.all_gather(offers, offer, group=group)
    values_TB, ids_TB = torch.stack(offers, dim=1)
    wins_TB = values_TB == values_TB.amax(0)
    return torch.where(wins_TB, ids_TB, torch.inf).amin(0).long()


def _gather(
    rows: list[_Row], total: int, width: int, eod: int, group: dist.ProcessGroup, device: torch.device
) -> list[list[int]]:
    """All slots' answers in the order of the prompts."""
    most = math.ceil(total / group.size())
    table = torch.full((most, 1 + width), _NONE, dtype=torch.long)  # number of the prompt, answer
    for place, row in enumerate(rows):
        answer = row.answer[:-1] if row.answer[-1] == eod else row.answer
        table[place, 0] = row.number
        table[place, 1 : 1 + len(answer)] = torch.tensor(answer, dtype=torch.long)
    tables = [torch.empty_like(table, device=device) for _ in range(group.size())]
    dist.all_gather(tables, table.to(device), group=group)
    answers: list[list[int]] = [[] for _ in range(total)]
    for number, *answer in torch.cat(tables).tolist():
        if number != _NONE:
            answers[number] = [token for token in answer if token != _NONE]
    return answers
