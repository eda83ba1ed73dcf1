"""The single-process reference: one backward per language, combined explicitly, tensor by tensor.

No DDP, no buckets, no exchange: only autograd, a dictionary of gradients and an aggregator. :func:`train` goes on to
whole optimizer steps: clipping and torch's AdamW on fp32 copies of the weights, loss scaling for fp16, the update of
the routers' expert bias.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_moo.aggregation import Aggregator, build_aggregator
from tests.helpers import tiny_config, tiny_gpt

LEARNING_RATE, WEIGHT_DECAY, EPS = (
    1e-3,
    0.01,
    1e-3,
)  # a large eps: rounding of a gradient near zero is no step of Adam's


Gradients = dict[str, torch.Tensor]  # by whole name, [K, ...]


@dataclass(frozen=True)
class Plan:
    """How a step reads its data.

    Attributes:
        per_wave: micro-batches of a data-parallel rank in a wave.
        peers: data-parallel ranks of a slot; each reads micro-batches of its own.
        cp: context-parallel ranks; each has a slice of every sequence, and without per-token loss its own mean.
        loss_scale: of fp16.
    """

    per_wave: int = 1
    peers: int = 1
    cp: int = 1
    loss_scale: float = 1.0


def language_gradients(
    variant: tiny_gpt.Variant, assignment: list[list[int]], per_wave: int
) -> tuple[Gradients, torch.Tensor]:
    """Gradient of every language's own mean loss: {parameter: [K, ...]} and what each was divided by [K]."""
    model = tiny_gpt.build(variant)
    num_languages = 1 + max(k for wave in assignment for k in wave)
    return gradients_of(model, model, variant, assignment, num_languages, Plan(per_wave))


def gradients_of(
    model: torch.nn.Module,
    forward: torch.nn.Module,
    variant: tiny_gpt.Variant,
    assignment: Sequence[Sequence[int]],
    num_languages: int,
    plan: Plan,
) -> tuple[Gradients, torch.Tensor]:
    """Gradients of every language's own mean loss at the model's weights, and what each was divided by [K].

    A language that the step leaves out has a zero gradient and count. Micro-batches are added up in fp64.

    Args:
        model: where the parameters are.
        forward: what is called: the model, or its wrapper for low precision.
    """
    params = {tiny_gpt.whole_name(model, name): p for name, p in model.named_parameters() if p.requires_grad}
    rows = [k for wave in assignment for k in wave]
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in params}
    counts = []
    if variant.experts:
        per_micro_batch = 1.0 if variant.per_token_loss else 1 / plan.per_wave
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(plan.loss_scale * per_micro_batch))
    for language in range(num_languages):
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
        count = 0.0
        for i in range(rows.count(language) * plan.peers * plan.per_wave):
            batch = tiny_gpt.micro_batch(language, i, barred=variant.barred)
            for rank in range(plan.cp):
                count += _add_gradient(params, total, forward, variant, tiny_gpt.slice_of(batch, rank, plan.cp), plan)
        counts.append(count)
        for name, gradient in total.items():
            gradients[name].append(gradient / count if count else gradient)
    return {name: torch.stack(rows) for name, rows in gradients.items()}, torch.tensor(counts, dtype=torch.float64)


def _add_gradient(
    params: Mapping[str, torch.nn.Parameter],
    total: Gradients,
    forward: torch.nn.Module,
    variant: tiny_gpt.Variant,
    batch: dict[str, torch.Tensor],
    plan: Plan,
) -> float:
    """Add the (unscaled) gradient of a micro-batch to ``total``; returns its part of the count."""
    loss = (tiny_gpt.losses(forward, batch).float() * batch["loss_mask"]).sum()
    tokens = batch["loss_mask"].sum()
    if not variant.per_token_loss:
        loss = loss / tokens / plan.per_wave
    (loss * plan.loss_scale).backward()
    for name, param in params.items():
        if param.grad is not None:  # an expert without tokens
            total[name] += param.grad.double() / plan.loss_scale
            param.grad = None
    return tokens.item() if variant.per_token_loss else 1 / plan.per_wave


def block_of(name: str, granularity: str | Mapping[str, str]) -> str:
    """Block of a parameter, stated independently of the code under test."""
    if not isinstance(granularity, str):
        return granularity[name]
    if granularity == "model":
        return "model"
    if granularity == "tensor":
        return name
    layer = re.match(r"decoder\.layers\.\d+", name)
    return layer.group() if layer else ".".join(name.split(".")[:2])


def combined_gradient(
    gradients: Gradients,
    aggregator: Aggregator,
    granularity: str | Mapping[str, str],
    preference_K: torch.Tensor,
    generator_of: Callable[[str], torch.Generator],
    losses_K: torch.Tensor | None,
) -> Gradients:
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


def generator(seed: int, step: int, block: str) -> torch.Generator:
    """The random numbers of a block in a step, as docs/exchange.md has them: from seed, step and the block's name."""
    digest = hashlib.blake2b(f"{seed}/{step}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Recipe:
    """What the reference trains, and how it combines.

    Attributes:
        variant: the model.
        plan: how a step reads its data.
        assignments: of every step, ``[wave][slot]``.
        num_languages: K.
        method, method_options: the aggregator.
        granularity: of the blocks; or a map from parameter to block.
        seed: of the random choices of methods.
        clip: largest gradient norm; 0: any.
        initial_scale: dynamic loss scale of the first step, for fp16.
    """

    variant: tiny_gpt.Variant
    plan: Plan
    assignments: Sequence[Sequence[Sequence[int]]]
    num_languages: int
    method: str = "cagrad"
    method_options: Mapping[str, float | str] = field(default_factory=dict)
    granularity: str | Mapping[str, str] = "layer"
    seed: int = 7
    clip: float = 1.0
    initial_scale: float = 1.0


@dataclass(frozen=True)
class Training:
    """What the reference found.

    Attributes:
        gradients: combined gradient of every step, by whole name; None where fp16 overflowed.
        scales: largest entry of the languages' gradients of every step, by whole name.
        weights: after the last step, in the dtype of the model.
        buffers: of the model after the last step (expert biases).
        loss_scales: in force at every step.
        clipped: what every gradient was multiplied by to keep its norm, of every update.
        empty: (language, parameter) whose gradient was exactly zero in the first step, of languages in it.
    """

    gradients: list[Gradients | None]
    scales: list[dict[str, float]]
    weights: Gradients
    buffers: Gradients
    loss_scales: list[float]
    clipped: list[float]
    empty: set[tuple[int, str]]


def train(recipe: Recipe) -> Training:
    """Train on one process with one backward pass per language. Needs a process group of one rank."""
    variant = replace(recipe.variant, recompute="", sequence_parallel=False)
    model = tiny_gpt.build(variant)
    low = variant.dtype != "fp32"
    forward = Float16Module(model.config, model) if low else model
    params = {tiny_gpt.whole_name(model, name): p for name, p in model.named_parameters() if p.requires_grad}
    mains = {name: p.detach().float().clone() for name, p in params.items()}
    optimizer = torch.optim.AdamW(mains.values(), lr=LEARNING_RATE, eps=EPS, weight_decay=WEIGHT_DECAY)
    aggregator = build_aggregator(recipe.method, **recipe.method_options)
    loss_scale = recipe.initial_scale
    found = Training([], [], {}, {}, [], [], set())
    for step, assignment in enumerate(recipe.assignments):
        plan = replace(recipe.plan, loss_scale=loss_scale)
        gradients, counts = gradients_of(model, forward, variant, assignment, recipe.num_languages, plan)
        found.loss_scales.append(loss_scale)
        found.scales.append({name: float(rows.abs().max()) for name, rows in gradients.items()})
        if step == 0:
            zero = {(k, name) for name, rows in gradients.items() for k in range(len(rows)) if not rows[k].any()}
            found.empty.update((k, name) for k, name in zero if counts[k] > 0)
        _update_expert_bias(model)
        if not all(rows.isfinite().all() for rows in gradients.values()):
            found.gradients.append(None)
            loss_scale /= 2
            continue
        combined = combined_gradient(
            gradients,
            aggregator,
            recipe.granularity,
            counts / counts.sum(),
            lambda block, step=step: generator(recipe.seed, step, block),
            None,
        )
        found.gradients.append(combined)
        found.clipped.append(_update(optimizer, mains, combined, recipe.clip))
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(mains[name])
    found.weights.update({tiny_gpt.whole_name(model, n): p.detach().clone() for n, p in model.named_parameters()})
    found.buffers.update({tiny_gpt.whole_name(model, n): b.clone() for n, b in model.named_buffers()})
    return found


def _update(optimizer: torch.optim.Optimizer, mains: Gradients, combined: Gradients, clip: float) -> float:
    norm = torch.stack([gradient.norm() for gradient in combined.values()]).norm()
    factor = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
    for name, main in mains.items():
        main.grad = (combined[name] * factor).float()
    optimizer.step()
    return factor


@torch.no_grad()
def _update_expert_bias(model: torch.nn.Module) -> None:
    """Once a step: towards the experts that saw fewer tokens than the mean."""
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            tokens = module.local_tokens_per_expert
            module.expert_bias += tiny_config.BIAS_UPDATE_RATE * torch.sign(tokens.mean() - tokens)
            tokens.zero_()
