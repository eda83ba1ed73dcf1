"""The single-process reference: one backward per language, combined explicitly, tensor by tensor.

No DDP, no buckets, no exchange: only autograd, a dictionary of gradients and an aggregator.
"""

from __future__ import annotations

import re

import torch

from megatron_moo.aggregation import Aggregator
from tests.helpers import tiny_gpt


def language_gradients(
    variant: tiny_gpt.Variant, assignment: list[list[int]], per_wave: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradient of every language's own mean loss: {parameter: [K, ...]} and what each was divided by [K]."""
    model = tiny_gpt.build(variant)
    num_languages = 1 + max(k for wave in assignment for k in wave)
    rows = [k for wave in assignment for k in wave]
    gradients: dict[str, list[torch.Tensor]] = {}
    counts = []
    for language in range(num_languages):
        model.zero_grad()
        number = rows.count(language) * per_wave
        count = 0.0
        for i in range(number):
            batch = tiny_gpt.micro_batch(language, i)
            loss = (tiny_gpt.losses(model, batch) * batch["loss_mask"]).sum()
            if not variant.per_token_loss:
                loss = loss / batch["loss_mask"].sum() / per_wave
            loss.backward()
            count += batch["loss_mask"].sum().item() if variant.per_token_loss else 1 / per_wave
        counts.append(count)
        for name, param in model.named_parameters():
            gradients.setdefault(name, []).append(param.grad.double() / count)
    return {name: torch.stack(rows) for name, rows in gradients.items()}, torch.tensor(counts, dtype=torch.float64)


def block_of(name: str, granularity: str) -> str:
    """Block of a parameter, stated independently of the code under test."""
    if granularity == "model":
        return "model"
    if granularity == "tensor":
        return name
    layer = re.match(r"decoder\.layers\.\d+", name)
    return layer.group() if layer else ".".join(name.split(".")[:2])


def combined_gradient(
    gradients: dict[str, torch.Tensor],
    aggregator: Aggregator,
    granularity: str,
    preference_K: torch.Tensor,
    generator_of,
    losses_K: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """sum_k w_bk g_k for every parameter, with one Gramian per block."""
    grams: dict[str, torch.Tensor] = {}
    for name, rows in gradients.items():
        flat = rows.flatten(1)
        block = block_of(name, granularity)
        grams[block] = grams.get(block, 0) + flat @ flat.T
    names = list(grams)
    weights = aggregator(
        torch.stack([grams[name] for name in names]),
        None,
        preference_K,
        [generator_of(name) for name in names],
        losses_K=losses_K,
    )
    weight_of = dict(zip(names, weights, strict=True))
    return {
        name: torch.tensordot(weight_of[block_of(name, granularity)], rows, dims=1) for name, rows in gradients.items()
    }
