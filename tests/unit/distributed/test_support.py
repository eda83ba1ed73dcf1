"""The table of features: every refusal trips, its names exist in Megatron, its document is up to date."""

import dataclasses
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_moo.distributed import support
from megatron_moo.distributed.features import IRRELEVANT, SUPPORTED, UNTESTED
from megatron_moo.distributed.refusals import ENTRY, REFUSED
from megatron_moo.distributed.settings import DDP, SOURCES, Setup
from tests.helpers.layout_table import CASES
from tests.helpers.multiprocess import init_megatron, run_ranks

ROOT = Path(__file__).parents[3]

# Feature -> Megatron's arguments that trip it; attributes of the chunk's config or DDP config that do.
FROM_ARGS: dict[str, dict[str, Any]] = {
    "FSDP": {"use_megatron_fsdp": True},
    "several optimizer instances": {"num_distributed_optimizer_instances": 2},
    "reduce-scatter that accumulates in fp32": {"ddp_reduce_scatter_with_fp32_accumulation": True},
    "average inside the collective": {"ddp_average_in_collective": True},
    "gradients accumulated outside the buffer": {"ddp_param_name_patterns_for_fp32_local_accumulation": ["all"]},
    "gradient buffer reused for MXFP8 parameters": {"reuse_grad_buf_for_mxfp8_param_ag": True},
    "NCCL user buffers": {"nccl_ub": True},
    "delayed weight gradients, combined expert schedule": {"delay_wgrad_compute": True},
    "deferred embedding gradients": {"defer_embedding_wgrad_compute": True},
    "CUDA graphs": {"cuda_graph_impl": "local"},
    "saved weight gradients": {"save_wgrads_interval": 2},
    "weights gathered in parts (GTP)": {"gtp_weight_remat_size": 2},
    "context parallelism without Transformer Engine": {"context_parallel_size": 2, "transformer_impl": "local"},
    "hierarchical and hybrid context parallelism": {"hierarchical_context_parallel_sizes": [2, 2]},
    "multi-token prediction": {"mtp_num_layers": 1},
    "learnable softmax offsets, cut over ranks": {"softmax_type": "learnable", "tensor_model_parallel_size": 2},
    "load balancing over all ranks": {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"]},
    "experts in one tensor": {"moe_single_grouped_weight": True},
    "layer-wise optimizers (Muon, Lion, SOAP with shards)": {"use_layer_wise_distributed_optimizer": True},
    "parameters gathered in the optimizer's step": {"overlap_param_gather_with_optimizer_step": True},
    "preference by tokens without token counts": {"moo_preference": "tokens", "calculate_per_token_loss": False},
    "packed sequences cut into parts": {"moo_pack": True, "context_parallel_size": 2},
    "packed sequences in other attention": {"moo_pack": True, "experimental_attention_variant": "dsa"},
    "other data loaders": {"dataloader_type": "cyclic"},
    "skipped steps": {"iterations_to_skip": [3]},
    "batch sizes that change": {"rampup_batch_size": [4, 4, 100]},
    "other sizes in validation": {"micro_batch_size": 2, "eval_micro_batch_size": 4},
    "decoding of lengths that ranks cannot share": {
        "moo_eval_rows": ["rows"],
        "sequence_parallel": True,
        "max_position_embeddings": 15,
        "tensor_model_parallel_size": 2,
    },
    "validation to the end of the data, or on several sets": {"full_validation": True},
    "SGD with shards": {"optimizer": "sgd", "use_distributed_optimizer": True},
    "no optimizer": {"freeze_all_layers": True},
    "hybrid models": {"hybrid_layer_pattern": "M*M*"},
    "reinforcement learning": {"perform_rl_step": True},
    "experts made of a dense model": {"moe_use_upcycling": True},
    "other data": {"data_path": ["data"]},
    "another loss, or other positions in a sample": {"eod_mask_loss": True},
}
FROM_CHUNKS: dict[str, dict[str, Any]] = {
    "several optimizer instances": {"ddp.num_distributed_optimizer_instances": 2},
    "reduce-scatter that accumulates in fp32": {"ddp.reduce_scatter_with_fp32_accumulation": True},
    "average inside the collective": {"ddp.average_in_collective": True},
    "gradients accumulated outside the buffer": {"ddp.param_name_patterns_for_fp32_local_accumulation": ("all",)},
    "gradient buffer reused for MXFP8 parameters": {"ddp.reuse_grad_buf_for_mxfp8_param_ag": True},
    "NCCL user buffers": {"ddp.nccl_ub": True},
    "another finalize hook": {"config.finalize_model_grads_func": print},
    "delayed weight gradients, combined expert schedule": {"config.overlap_moe_expert_parallel_comm": True},
    "deferred embedding gradients": {"config.defer_embedding_wgrad_compute": True},
    "CUDA graphs": {"config.cuda_graph_impl": "local"},
    "weights gathered in parts (GTP)": {"config.expert_gtp_weight_remat_size": 2},
    "hierarchical and hybrid context parallelism": {"config.hybrid_context_parallel": True},
    "multi-token prediction": {"config.mtp_num_layers": 1},
    "learnable softmax offsets, cut over ranks": {
        "config.softmax_type": "learnable",
        "config.tensor_model_parallel_size": 2,
    },
    "load balancing over all ranks": {"config.moe_router_load_balancing_type": "global_aux_loss"},
    "experts in one tensor": {"config.moe_single_grouped_bias": True},
    "conditional embedders, flextron routers": {"config.has_cond_embedder": True},
    "layer-wise optimizers (Muon, Lion, SOAP with shards)": {
        "ddp.use_distributed_optimizer": False,
        "ddp.overlap_param_gather": True,
    },
}
# These need another chunk than one with other settings.
OTHER_CHUNKS = {"FSDP", "all-reduce in unpadded buckets", "a stage without trainable parameters"}
ROWS = {row.feature: row for row in support.ROWS}


def _says_all(text: str, row: support.Row) -> bool:
    """Option, reason and remedy are in a message."""
    return text.startswith(row.options) and row.reason in text and text.endswith(row.remedy)


def test_every_refusal_has_a_case():
    """Would catch: a row that nothing shows to work, or to be seen where the document says it is."""
    assert {row.feature for row in REFUSED + ENTRY} == set(FROM_ARGS) | set(FROM_CHUNKS) | OTHER_CHUNKS
    for row in REFUSED:
        assert ("command line" in row.seen_by) == (row.feature in FROM_ARGS), row.feature
        assert ("install" in row.seen_by) == (row.feature in set(FROM_CHUNKS) | OTHER_CHUNKS), row.feature


@pytest.mark.parametrize("feature", FROM_ARGS)
def test_the_command_line_refuses_it(feature):
    """Would catch: a predicate that never holds, or a message without option, reason or remedy."""
    row = ROWS[feature]
    (text,) = support.problems(Setup.from_args(Namespace(**FROM_ARGS[feature])), row.status)
    assert _says_all(text, row), text


def test_the_value_found_is_named():
    """Would catch: a user who does not know which of many flags did it."""
    setup = Setup.from_args(Namespace(cuda_graph_impl="local", num_distributed_optimizer_instances=4))
    instances, graphs = support.problems(setup)
    assert "(found 4)" in instances and "(found local)" in graphs
    (fsdp,) = support.problems(Setup.from_args(Namespace(use_megatron_fsdp=False, use_torch_fsdp2=True)))
    assert "(found torch FSDP2)" in fsdp


def _refused_by_install(rank: int) -> dict[str, list[str]]:
    """What `install` says to a tiny model with each of the settings. Three ranks: two would divide any bucket."""
    init_megatron()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_moo.distributed import MooConfig, install
    from tests.helpers import tiny_gpt

    def refusal(chunk: torch.nn.Module) -> list[str]:
        try:
            install([chunk], MooConfig(["a", "b", "c"]), lambda step: [[0, 1, 2]])
        except ValueError as error:
            return str(error).split("\n- ")[1:]
        return []

    chunk = tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant()))
    owners = {"ddp": chunk.ddp_config, "config": chunk.config}
    found = {}
    for feature, settings in FROM_CHUNKS.items():
        before = {}
        for name, value in settings.items():
            owner, _, attribute = name.partition(".")
            before[name] = getattr(owners[owner], attribute, None)
            setattr(owners[owner], attribute, value)
        found[feature] = refusal(chunk)
        for name, value in before.items():
            owner, _, attribute = name.partition(".")
            setattr(owners[owner], attribute, value)
    found["FSDP"] = refusal(torch.nn.Linear(2, 2))
    model = tiny_gpt.build(tiny_gpt.Variant())
    found["all-reduce in unpadded buckets"] = refusal(
        DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    )
    frozen = tiny_gpt.build(tiny_gpt.Variant()).requires_grad_(False)
    found["a stage without trainable parameters"] = refusal(
        DistributedDataParallel(frozen.config, DistributedDataParallelConfig(), frozen)
    )
    found["nothing"] = refusal(chunk)
    return found


@pytest.fixture(scope="module")
def refused_by_install():
    """The refusals of each rank."""
    return run_ranks(_refused_by_install, 3)


def test_install_refuses_it_in_the_same_words(refused_by_install):
    """Would catch: a model that is refused by the command line alone, or on one rank alone, or with another reason."""
    for rank in refused_by_install:
        assert rank.pop("nothing") == []
        assert set(rank) == set(FROM_CHUNKS) | OTHER_CHUNKS
        for feature, texts in rank.items():
            assert len(texts) == 1 and _says_all(texts[0], ROWS[feature]), (feature, texts)


def test_torchs_own_wrapper_is_not_taken_for_megatrons():
    """Would catch: a name that two libraries share."""
    torchs = type(DDP, (), {"__module__": "torch"})()
    (text,) = support.problems(Setup.from_chunks([torchs]))
    assert "(found torch.DistributedDataParallel)" in text


def test_arguments_refuse_by_the_table():
    """Would catch: a command line with rules of its own."""
    from megatron_moo.training import arguments

    args = Namespace(**FROM_ARGS["CUDA graphs"], **FROM_ARGS["skipped steps"])
    assert arguments._exchange_rules(args) == support.problems(Setup.from_args(args))
    assert arguments._data_rules(args) == support.problems(Setup.from_args(args), "entry")


def _names_of_megatron(rank: int) -> SimpleNamespace:
    from megatron_moo.platform import cpu

    cpu.install()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig
    from megatron.training.arguments import add_megatron_arguments

    from megatron_moo.training.arguments import add_moo_arguments

    parser = ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    add_moo_arguments(parser)
    defaults = {action.dest: action.default for action in parser._actions}
    return SimpleNamespace(
        flags=sorted(flag for action in parser._actions for flag in action.option_strings),
        defaults={
            name: value for name, value in defaults.items() if isinstance(value, str | int | float | list | None)
        },
        args=sorted(defaults),
        config=[field.name for field in dataclasses.fields(TransformerConfig)],
        ddp=[field.name for field in dataclasses.fields(DistributedDataParallelConfig)],
    )


@pytest.fixture(scope="module")
def megatron():
    """Flags, arguments with their defaults, and fields of the configs."""
    return run_ranks(_names_of_megatron, 1)[0]


# Set by Megatron's validation, or by models of its own, without being an option or a field.
DERIVED = {"gtp_weight_remat_size", "expert_gtp_weight_remat_size", "use_layer_wise_distributed_optimizer"}
DERIVED |= {"has_cond_embedder", "flextron"}


def test_settings_are_called_what_megatron_calls_them(megatron):
    """Would catch: a release that renames an option, so that its rule never trips again."""
    for name, sources in SOURCES.items():
        for kind in ("args", "config", "ddp"):
            missing = set(sources[kind].split()) - set(getattr(megatron, kind)) - DERIVED
            assert not missing, (name, kind, missing)


def test_every_flag_of_the_table_exists(megatron):
    """Would catch: a document or a remedy that names an option which is not there."""
    texts = [text for row in support.ROWS for text in (row.options, row.reason, row.remedy)]
    texts += [text for line in IRRELEVANT for text in line]
    for flag in re.findall(r"--[a-z][a-z0-9_-]*\*?", " ".join(texts)):
        known = [name for name in megatron.flags if name == flag or (flag[-1] == "*" and name.startswith(flag[:-1]))]
        assert known, flag


def test_megatrons_defaults_are_not_refused(megatron):
    """Would catch: a rule that refuses everybody."""
    setup = Setup.from_args(Namespace(**megatron.defaults | {"dataloader_type": "external"}))
    assert support.problems(setup) == support.problems(setup, "entry") == []


@pytest.mark.parametrize("feature", [row.feature for row in SUPPORTED])
def test_what_shows_a_feature_exists(feature):
    """Would catch: a claim whose test was renamed or dropped."""
    assert ROWS[feature].tests
    for test in ROWS[feature].tests:
        path, _, case = test.partition("::")
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not case or f"def {case}(" in source or ("CASES" in source and case in CASES), test


def test_rows_are_complete():
    """Would catch: a feature listed twice, or a refusal without remedy."""
    assert len(ROWS) == len(support.ROWS)
    assert all(row.remedy and row.reads for row in REFUSED + ENTRY)
    assert not any(row.remedy or row.reads or row.broken for row in SUPPORTED + UNTESTED)


def test_the_document_is_the_table():
    """Would catch: docs/support.md that lags behind; `python -m megatron_moo.distributed.support > docs/support.md`."""
    assert (ROOT / "docs" / "support.md").read_text(encoding="utf-8") == support.markdown()


def _sgd(rank: int) -> list[dict[str, torch.Tensor]]:
    """Weights after two steps of SGD with momentum, stock and with `mean`; Megatron has it for all-reduce alone."""
    init_megatron()
    from megatron_moo.distributed import MooConfig, install
    from tests.helpers import tiny_gpt

    found = []
    for ours in (False, True):
        chunk = tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant()), distributed_optimizer=False)
        schedule = tiny_gpt.stock_schedule()
        if ours:
            moo = install([chunk], MooConfig(["a", "b"], preference="tokens"), lambda step: [[0, 1]])
            schedule = moo.waves(schedule)
        else:
            from megatron.core.distributed import finalize_model_grads

            chunk.config.finalize_model_grads_func = finalize_model_grads
        optimizer = tiny_gpt.adam(chunk, optimizer="sgd", sgd_momentum=0.9, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            tiny_gpt.run_step(chunk, schedule, tiny_gpt.step_batches([[0, 1]], rank, 1))
            optimizer.step()
        found.append({name: param.detach().clone() for name, param in chunk.module.named_parameters()})
    return found


def test_sgd_equals_stock():
    """Would catch: an optimizer other than Adam that reads its gradients elsewhere."""
    for stock, ours in run_ranks(_sgd, 2):
        for name, weight in stock.items():
            torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-7, msg=name)
