"""The seams to megatron-core that `upstream.py` lists: each fails here, by name, when a new release moves it; and what
`install` refuses."""

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.helpers.multiprocess import init_megatron, run_ranks

UPSTREAM = Path(__file__).parents[3] / "megatron_moo" / "distributed" / "upstream.py"
BUFFERS = "megatron.core.distributed.param_and_grad_buffer"


def moved(what: str) -> str:
    """What a failure should say."""
    return f"megatron-core {version('megatron-core')} moved a seam: {what}; adapt megatron_moo/distributed/upstream.py"


def _imports() -> list[tuple[str, str]]:
    """(module, name) of everything that upstream.py takes from Megatron; read, not run, as importing may fail."""
    nodes = ast.walk(ast.parse(UPSTREAM.read_text()))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("megatron.")]
    return [(node.module, alias.name) for node in found for alias in node.names]


@pytest.mark.parametrize(("module", "name"), _imports(), ids=lambda value: value.rpartition(".")[2])
def test_names_are_where_they_were(module, name):
    """Would catch: a release that renames or moves what the exchange is built on."""
    assert hasattr(importlib.import_module(module), name), moved(f"{module}.{name} is gone")


PARAMETERS = {
    "__init__": ["self", "buckets", "ddp_config", "collective_group", "collective_group_size"],
    "start_grad_sync": ["self", "force_all_reduce"],
    "finish_grad_sync": ["self", "force_all_reduce"],
    "register_grad_ready": ["self", "param", "force_all_reduce"],
    "check_grads": ["self", "check_for_nan_or_inf", "check_for_large"],
    "reset": ["self"],
}


@pytest.mark.parametrize("method", PARAMETERS)
def test_bucket_groups_are_called_as_they_were(method):
    """Would catch: a hook that Megatron calls with other arguments, or no longer."""
    group = importlib.import_module(BUFFERS)._ParamAndGradBucketGroup
    function = getattr(group, method, None)
    assert function is not None, moved(f"_ParamAndGradBucketGroup.{method} is gone")
    found = list(inspect.signature(function).parameters)
    assert found == PARAMETERS[method], moved(f"_ParamAndGradBucketGroup.{method} takes {found}")


# Read or set on real objects; `object: attributes`.
ATTRIBUTES = {
    "DistributedDataParallel": (
        "bucket_groups buffers expert_parallel_buffers param_to_bucket_group ddp_config "
        "intra_dp_cp_group dp_cp_group dp_group tp_group pp_group no_sync zero_grad_buffer finish_grad_sync"
    ),
    "ddp_config": (
        "use_distributed_optimizer num_distributed_optimizer_instances reduce_scatter_with_fp32_accumulation "
        "reuse_grad_buf_for_mxfp8_param_ag average_in_collective nccl_ub overlap_grad_reduce check_for_nan_in_grad "
        "check_for_large_grads"
    ),
    "buffer": "buckets param_index_map",
    "bucket group": (
        "buckets params ddp_config next_param_gather_bucket_group is_first_batch is_last_microbatch "
        "per_param_grad_ready_counts golden_per_param_grad_ready_counts grad_reduce_handle grad_reduce_finished "
        "param_gather_dispatched intra_distributed_optimizer_instance_group intra_distributed_optimizer_instance_size "
        "intra_distributed_optimizer_instance_rank"
    ),
    "bucket": "bucket_id offset grad_data params_with_extra_main_grads",
    "model config": "finalize_model_grads_func calculate_per_token_loss sequence_parallel qk_layernorm cuda_graph_impl",
}


def _inspect_model(rank: int) -> dict:
    """On one stage of a tied, sequence-parallel model: absent attributes, traits, and who asks for an exchange."""
    init_megatron(2, 2)
    from tests.helpers import tiny_gpt

    chunk = tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant(sequence_parallel=True, gated=True)), overlap=True)
    group = chunk.bucket_groups[0]
    owners = {
        "DistributedDataParallel": chunk,
        "ddp_config": chunk.ddp_config,
        "buffer": chunk.buffers[0],
        "bucket group": group,
        "bucket": group.buckets[0],
        "model config": chunk.config,
    }
    absent = [
        f"{owner}.{name}" for owner, names in ATTRIBUTES.items() for name in names.split()
        if not hasattr(owners[owner], name)
    ]  # fmt: skip
    flags = ("tensor_model_parallel", "sequence_parallel", "shared_embedding", "shared")
    marked = {
        flag: sorted(name for name, param in chunk.module.named_parameters() if getattr(param, flag, False))
        for flag in flags
    }
    layers = [layer.layer_number for layer in chunk.module.decoder.layers]

    asked = []
    group.start_grad_sync = lambda *args, **kwargs: asked.append(len(group.per_param_grad_ready_counts))
    group.is_first_batch = False
    group.golden_per_param_grad_ready_counts = dict.fromkeys(group.params, 1)
    for param in group.params:
        group.register_grad_ready(param)
    before = len(group.params)
    group.grad_reduce_finished = True
    group.reset()
    return {
        "absent": absent,
        "marked": marked,
        "layers": layers,
        "asked": (asked, before),
        "reset": (group.grad_reduce_finished, len(group.per_param_grad_ready_counts)),
    }


@pytest.fixture(scope="module")
def stages():
    """First and last stage, as their first tensor-parallel ranks see them."""
    ranks = run_ranks(_inspect_model, 4)
    return ranks[0], ranks[2]


def test_objects_have_the_attributes(stages):
    """Would catch: bookkeeping of DDP that moved or got another name."""
    for stage in stages:
        assert not stage["absent"], moved(", ".join(stage["absent"]) + " gone")


def test_the_last_gradient_of_a_bucket_starts_its_exchange(stages):
    """Would catch: a backward hook that no longer goes through `start_grad_sync` of the group."""
    for stage in stages:
        asked, params = stage["asked"]
        assert asked == [params], moved("register_grad_ready does not call start_grad_sync when all are ready")
        assert stage["reset"] == (False, 0), moved("reset does not clear grad_reduce_finished and the ready counts")


def test_parameters_say_how_they_are_spread(stages):
    """Would catch: gradients that are partial, sharded or tied, and no longer marked so: replicas would drift."""
    first, last = (stage["marked"] for stage in stages)
    word, out = "embedding.word_embeddings.weight", "output_layer.weight"
    assert word in first["tensor_model_parallel"] and out in last["tensor_model_parallel"], moved(
        "tensor_model_parallel is not set on sharded weights"
    )
    assert word in first["shared_embedding"] and out in last["shared_embedding"], moved(
        "shared_embedding is not set on a tied embedding of two stages"
    )
    assert first["shared"] == [] and last["shared"] == [out], moved("shared is not set on the copy of a tied embedding")
    norms = {"decoder.layers.0.input_layernorm.weight", "decoder.layers.0.pre_mlp_layernorm.weight"}
    assert norms <= set(first["sequence_parallel"]), moved("sequence_parallel is not set on norms")
    assert "decoder.final_layernorm.weight" in last["sequence_parallel"], moved("no sequence_parallel on the last norm")


def test_layers_know_their_number_in_the_whole_model(stages):
    """Would catch: blocks of a pipeline stage named like those of another."""
    assert [stage["layers"] for stage in stages] == [[1, 2], [3, 4]], moved("layer_number is not the model's, from 1")


def test_every_schedule_calls_finalize_and_takes_what_waves_hand_on():
    """Would catch: a schedule that does not end in `finalize_model_grads_func(model, num_tokens, ...)`."""
    from megatron.core.pipeline_parallel import schedules

    for name in (
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_without_interleaving",
    ):
        schedule = getattr(schedules, name, None)
        assert schedule is not None, moved(f"schedules.{name} is gone")
        source, parameters = inspect.getsource(schedule), inspect.signature(schedule).parameters
        assert "config.finalize_model_grads_func(" in source, moved(f"{name} does not call finalize_model_grads_func")
        for parameter in ("model", "num_microbatches", "forward_only"):
            kind = parameters[parameter].kind if parameter in parameters else None
            assert kind is inspect.Parameter.KEYWORD_ONLY, moved(f"{name} takes {parameter} otherwise")


def _refusals(rank: int) -> dict[str, str]:
    init_megatron()
    from megatron.core.distributed import finalize_model_grads

    from megatron_moo.distributed import MooConfig, install
    from tests.helpers import tiny_gpt

    def assign(step: int) -> list[list[int]]:
        return [[0]]

    def refusal(chunks: list[torch.nn.Module], **options) -> str:
        try:
            install(chunks, MooConfig(objectives=["de"], **options), assign)
        except ValueError as error:
            return str(error)
        return "installed"

    model, chunk = tiny_gpt.build(tiny_gpt.Variant()), tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant()))
    result = {"bare": refusal([model])}
    rows = tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant(per_token_loss=False)))
    stock_groups, stock_hook = list(rows.bucket_groups), rows.config.finalize_model_grads_func
    result["tokens"] = refusal([rows], preference="tokens")
    result["method"] = refusal([rows], method="cagrd")
    untouched = rows.bucket_groups == stock_groups and rows.config.finalize_model_grads_func is stock_hook
    result["left alone"] = "yes" if untouched else "no"
    chunk.config.finalize_model_grads_func = finalize_model_grads
    result["finalize"] = refusal([chunk])
    return result


def test_install_refuses_with_option_and_remedy():
    """Would catch: an exchange that is bypassed, or put where there are no shards, without a word."""
    found = run_ranks(_refusals, 1)[0]
    expected = {
        "bare": ("DistributedDataParallel", "found GPTModel", "--use-megatron-fsdp"),
        "tokens": ("preference='tokens'", "--calculate-per-token-loss", "preference='slots'"),
        "method": ("'cagrd'", "known:", "cagrad"),
        "finalize": ("finalize_model_grads_func is already set", "leave it unset"),
        "left alone": ("yes",),
    }
    assert found.keys() == expected.keys()
    for case, parts in expected.items():
        assert all(part in found[case] for part in parts), (case, found[case])
