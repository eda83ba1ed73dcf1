"""Several samples in one sequence: what Megatron wants to know of them, and attention that keeps them apart.

Megatron's layout of a packed sequence ("thd") has no batch dimension: samples lie one behind the other, and
`cu_seqlens` says where each begins. Rotary embeddings follow it; learned ones go by the position ids of the batch.
Transformer Engine's attention takes this layout; Megatron's local one refuses it.

`install()` teaches it to the local one: each sample goes through the stock forward by itself, so that the result is
what it would be alone. Transformer Engine's attention is another class and stays as it is.

Dropout of attention draws one number from Megatron's random state, and from that as many as the samples need. If it
drew those from the state itself, data-parallel ranks, whose packs differ, would come to have different states; Megatron
saves those of one rank for all, and a resumed run would go on otherwise than one that was not interrupted.

Legend: t tokens of the sequence, n samples in it, h heads and g query groups of this rank, d channels of a head.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

_installed = False


def packed_params(batch: dict[str, torch.Tensor]) -> Any:
    """Take `cu_seqlens` and `max_seqlen` out of a batch and put them in Megatron's form.

    Args:
        batch: of tensors on the host, as `collate_packed` makes it; one without `cu_seqlens` is left as it is.

    Returns:
        A PackedSeqParams whose `cu_seqlens` are on the current device, to be given to the model on every pipeline
        stage; None for a batch that is not packed.
    """
    if "cu_seqlens" not in batch:
        return None
    from megatron.core.packed_seq_params import PackedSeqParams

    longest = int(batch.pop("max_seqlen"))  # on the host: Megatron wants a number, and a device would be waited for
    cu_seqlens = batch.pop("cu_seqlens").to(torch.cuda.current_device(), non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def install() -> None:
    """Let Megatron's local attention take packed sequences; a second call changes nothing."""
    global _installed
    if _installed:
        return
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    stock_forward = DotProductAttention.forward

    @functools.wraps(stock_forward)
    def forward(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Query [t, h, d], key and value [t, g, d] of a packed sequence -> [t, h * d]; others as ever."""
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            return stock_forward(
                self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
        pieces = zip(*(_pieces(tensor, packed_seq_params) for tensor in (query, key, value)), strict=True)
        # No mask: it would be one of the whole sequence. Each piece makes its own causal one.
        with _dropout_of_one_draw(self):
            outputs = [stock_forward(self, *piece, None, attn_mask_type, attention_bias) for piece in pieces]
        return torch.cat(outputs).squeeze(1)

    DotProductAttention.forward = forward
    _installed = True


class _OneDrawDropout(torch.nn.Module):
    """Dropout whose calls draw one number from the random state in place at the first; Megatron sets which that is."""

    def __init__(self, p: float):
        super().__init__()
        self.p, self._generator = p, None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self._generator is None:
            seed = int(torch.randint(1 << 62, (), device=values.device))
            self._generator = torch.Generator(values.device).manual_seed(seed)
        return values * torch.empty_like(values).bernoulli_(1 - self.p, generator=self._generator).div_(1 - self.p)


@contextlib.contextmanager
def _dropout_of_one_draw(attention: Any) -> Iterator[None]:
    stock = attention.attention_dropout
    if not attention.training or not 0 < stock.p < 1:
        yield
        return
    attention.attention_dropout = _OneDrawDropout(stock.p)
    try:
        yield
    finally:
        attention.attention_dropout = stock


def _pieces(tensor: torch.Tensor, params: Any) -> list[torch.Tensor]:
    """[t, heads, d] -> n of [its tokens, 1, heads, d]; self-attention has one `cu_seqlens` for all."""
    # Like the rotary embedding, by the padded lengths where there are some: what pads the end of a sample is seen by
    # no token before it.
    padded = params.cu_seqlens_q_padded
    cu_seqlens = params.cu_seqlens_q if padded is None else padded
    return tensor.unsqueeze(1).split(cu_seqlens.diff().tolist())
