"""Packed samples in a model: each as it would be alone, on every layout, with Megatron's local attention."""

import functools

import numpy as np
import pytest
import torch

from megatron_moo.data.sampling.batches import collate, collate_packed
from megatron_moo.platform.packed import packed_params
from tests.helpers.multiprocess import init_megatron, run_ranks
from tests.helpers.tiny_config import VOCAB, Variant, layer_spec, transformer_config

S, GROUPS = 24, 2
LENGTHS = (9, 2, 6, 5)  # 18 places, and 6 of padding
LAYOUTS = {"tp1": (1, {}), "tp2-sp": (2, {"tp": 2}), "pp2": (2, {"pp": 2}), "pp4": (4, {"pp": 4})}
MODELS = {
    "rope": ("rope", Variant(tied=False, sequence_parallel=True)),
    "learned": ("learned_absolute", Variant(tied=False, sequence_parallel=True, qk_layernorm=True)),
    "recomputed": ("rope", Variant(tied=False, sequence_parallel=True, recompute="full")),
    "attention recomputed": ("rope", Variant(tied=False, sequence_parallel=True, recompute="selective")),
}


def _samples(changed: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Samples of a pack; the tokens of one of them may be others."""
    rng = np.random.default_rng(7)
    samples = []
    for number, length in enumerate(LENGTHS):
        tokens, mask = rng.integers(0, VOCAB, length), rng.random(length) < 0.7
        mask[-1] = True
        samples.append(((tokens + 1 + number) % VOCAB if number == changed else tokens, mask))
    return samples


def _build(positions: str, variant: Variant):
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from tests.helpers.tiny_gpt import fill

    config = transformer_config(variant)
    config.num_query_groups = GROUPS
    model = GPTModel(
        config,
        layer_spec(variant),
        vocab_size=VOCAB,
        max_sequence_length=S,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type=positions,
    )
    fill(model)
    return model


def _run(model, batches: list[dict[str, torch.Tensor]]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Token losses [S] of each batch, on the last stage, and the gradient of their masked sum, whole on each rank."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    losses: list[torch.Tensor] = []

    def loss(mask, output):
        losses.append(output.detach()[0].clone())
        return (output * mask).sum(), mask.sum().int(), {}

    def forward_step(iterator, model):
        batch = dict(next(iterator))
        packed = packed_params(batch)
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
        return output, functools.partial(loss, batch["loss_mask"])

    model.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=S,
        micro_batch_size=1,
        forward_only=False,
    )
    for param in model.parameters():
        if getattr(param, "sequence_parallel", False):
            torch.distributed.all_reduce(param.grad, group=parallel_state.get_tensor_model_parallel_group())
    return losses, {name: param.grad.clone() for name, param in model.named_parameters()}


def _pieces(losses: torch.Tensor) -> list[torch.Tensor]:
    """Losses of a pack's samples."""
    return list(losses[: sum(LENGTHS) - len(LENGTHS)].split([length - 1 for length in LENGTHS]))


def _measure(rank: int, layout: dict[str, int]) -> dict[str, dict]:
    """For each model: how far gradients of packed and of single samples are apart, and, on the last stage, the losses
    of the samples packed, alone, in one sequence without bounds, and packed with one of them changed."""
    init_megatron(**layout)
    pad, measured = VOCAB - 1, {}
    for name, kind in MODELS.items():
        model = _build(*kind)
        pack = collate_packed(_samples(), S, pad)
        losses, grads = _run(model, [pack])
        alone, alone_grads = _run(model, [collate([sample], S, pad) for sample in _samples()])
        largest = max(float(grad.norm()) for grad in alone_grads.values())
        apart = max(float((grads[key] - grad).norm()) / largest for key, grad in alone_grads.items())
        unbounded, _ = _run(model, [{key: pack[key] for key in pack if key not in ("cu_seqlens", "max_seqlen")}])
        changed = [_run(model, [collate_packed(_samples(k), S, pad)])[0] for k in range(len(LENGTHS))]
        measured[name] = {"apart": apart}
        if losses:
            measured[name] |= {
                "packed": _pieces(losses[0]),
                "alone": [found[: length - 1] for found, length in zip(alone, LENGTHS, strict=True)],
                "unbounded": _pieces(unbounded[0]),
                "changed": [_pieces(found[0]) for found in changed],
            }
    return measured


@pytest.fixture(scope="module")
def alone():
    """Losses of the samples alone on one rank, by model."""
    (measured,) = run_ranks(_measure, 1, {})
    return {name: found["alone"] for name, found in measured.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_samples_are_as_alone(layout, alone):
    """Would catch: attention, rotary or learned positions that reach over the bounds of a sample, a stage of the
    pipeline or a recomputation that does not know them, padding that has a part in the gradient."""
    world, sizes = LAYOUTS[layout]
    for rank in run_ranks(_measure, world, sizes):
        for name, found in rank.items():
            assert found["apart"] < 1e-6, name
            if "packed" not in found:
                continue
            torch.testing.assert_close(found["packed"], alone[name], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found["alone"], alone[name], rtol=1e-6, atol=1e-6)
            for k, pieces in enumerate(found["changed"]):
                same = [torch.equal(a, b) for a, b in zip(pieces, found["packed"], strict=True)]
                assert same == [k != other for other in range(len(LENGTHS))], (name, k)
            reached = [float((a - b).abs().max()) for a, b in zip(found["unbounded"], alone[name], strict=True)]
            assert reached[0] < 1e-5 and min(reached[1:]) > 1e-2, "without bounds, samples see those before them"


def test_attention_without_packing_is_the_stock_one():
    """Would catch: a repair that changes what it should not: an unpacked batch, or a layout of Megatron's other than
    that of packed sequences, which is refused as ever."""

    def run(rank: int) -> None:
        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.transformer.dot_product_attention import DotProductAttention
        from megatron.core.transformer.enums import AttnMaskType

        init_megatron()
        config = transformer_config(Variant())
        attention = DotProductAttention(config, 1, AttnMaskType.causal, "self")
        query, key, value = torch.randn(3, 5, 2, 4, 4).unbind()
        stock = DotProductAttention.forward.__wrapped__
        assert torch.equal(attention(query, key, value, None), stock(attention, query, key, value, None))
        with pytest.raises(AssertionError, match="Packed sequence is not supported"):
            attention(query, key, value, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))
        params = packed_params(
            {"cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32), "max_seqlen": torch.tensor(2)}
        )
        with pytest.raises(RuntimeError, match="split"):  # bounds of another sequence
            attention(query[:, 0], key[:, 0], value[:, 0], None, packed_seq_params=params)

    run_ranks(run, 1)


def test_random_states_do_not_depend_on_the_pack():
    """Would catch: data-parallel ranks whose random states part, so that a resumed run is another; dropout that is
    left out, or falls on each sample, layer or call alike; a recomputed forward that drops out other things."""

    def run(rank: int) -> None:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker
        from megatron.core.transformer.dot_product_attention import DotProductAttention
        from megatron.core.transformer.enums import AttnMaskType

        for variant in (Variant(), Variant(sequence_parallel=True)):  # with the latter, the ambient state is drawn from
            init_megatron(tp=2)
            config = transformer_config(variant)
            attention = DotProductAttention(config, 1, AttnMaskType.no_mask, "self", attention_dropout=0.25)
            state = torch.get_rng_state(), get_cuda_rng_tracker().get_states()
            after, outputs = [], []
            for bounds in ([0, 50, 100], [0, 10, 20, 100], [0, 50, 100]):
                torch.set_rng_state(state[0])
                get_cuda_rng_tracker().set_states(dict(state[1]))
                cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
                params = packed_params({"cu_seqlens": cu_seqlens, "max_seqlen": torch.tensor(50)})
                flat, ones = torch.zeros(100, 2, 4), torch.ones(100, 2, 4)  # all weights are equal, as are all values
                outputs += [attention(flat, flat, ones, None, packed_seq_params=params) for _ in range(2)]
                after.append((torch.get_rng_state(), get_cuda_rng_tracker().get_states()["model-parallel-rng"]))
            assert all(torch.equal(a, b) for other in after[1:] for a, b in zip(after[0], other, strict=True))
            assert not all(torch.equal(a, b) for a, b in zip(after[0], (state[0], *state[1].values()), strict=False))
            assert torch.equal(outputs[0], outputs[4]) and torch.equal(outputs[1], outputs[5])
            assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0][:50], outputs[0][50:])
            assert all(abs(float(out.mean()) - 1) < 0.05 and float(out.std()) > 0.05 for out in outputs)
            attention.eval()
            assert torch.allclose(attention(flat, flat, ones, None, packed_seq_params=params), torch.ones(1))

    run_ranks(run, 2)
