"""The table of features: a row's form, and what is supported, let through, or of no matter. Refusals: refusals.py.

All of megatron-core 0.19.2's options that touch gradients, data parallelism, optimizers or schedules have been gone
through; each is in a row, or in ``IRRELEVANT`` with the reason why the exchange need not know of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_moo.distributed.settings import DEFAULTS, SOURCES, Setup

Status = Literal["supported", "untested", "refused", "entry"]


@dataclass(frozen=True)
class Row:
    """A feature of Megatron's and what becomes of it.

    Attributes:
        feature: what a user calls it.
        options: the flags, or the field where there is none.
        status: ``supported``: tests show it; ``untested``: nothing stands against it, but it needs hardware or packages
            that no test had; ``refused``: by the exchange; ``entry``: by the training entry, whatever the method.
        reason: why it is refused, or how it is handled.
        remedy: what to do instead, where it is refused.
        reads: the fields of the setup that decide whether it is refused; none where it is not.
        broken: whether a setup is refused; default: any of those fields is not at its default.
        tests: node ids that show a supported feature.
    """

    feature: str
    options: str
    status: Status
    reason: str
    remedy: str = ""
    reads: tuple[str, ...] = ()
    broken: Callable[[Setup], Any] | None = None
    tests: tuple[str, ...] = ()

    def refuses(self, setup: Setup) -> bool:
        """Whether this row refuses a setup."""
        if self.broken is not None:
            return bool(self.broken(setup))
        return any(getattr(setup, name) != DEFAULTS[name] for name in self.reads)

    def message(self, setup: Setup) -> str:
        """Option, value found, reason, remedy."""
        values = [getattr(setup, name) for name in self.reads if getattr(setup, name) != DEFAULTS[name]]
        found = ", ".join(str(value) for value in values if value is not True)
        return f"{self.options}{f' (found {found})' if found else ''}: {self.reason}; {self.remedy}"

    @property
    def seen_by(self) -> str:
        """Who can see it: the command line, ``install``, or both."""
        sources = [SOURCES[name] for name in self.reads]
        places = [
            name
            for name, kinds in (("command line", ("args",)), ("`install`", ("config", "ddp", "chunks")))
            if sources and any(source[kind] for source in sources for kind in kinds)
        ]
        return ", ".join(places)


def _cases(*names: str) -> tuple[str, ...]:
    """Lines of the table of layouts."""
    return tuple(f"tests/distributed/test_layouts.py::{name}" for name in names)


STOCK = "tests/distributed/test_stock_equality.py"
COMBINATION = "tests/distributed/test_combination.py"
REPLICAS = "tests/distributed/test_replicas.py"
FAULTS = "tests/distributed/test_faults.py"
ENTRY = "tests/distributed/test_entry.py"

SUPPORTED = (
    Row(
        "data parallelism, distributed optimizer",
        "`--use-distributed-optimizer`",
        "supported",
        "the all-to-all takes the reduce-scatter's place",
        tests=(STOCK, COMBINATION, *_cases("dp4-mean-model")),
    ),
    Row(
        "data parallelism, all-reduce",
        "without `--use-distributed-optimizer`",
        "supported",
        "all-to-all, combination, all-gather, in buckets that the ranks divide: the entry makes them so, a program of "
        "your own takes `upstream.wrap_padded`",
        tests=_cases("dp4-all-reduce", "tp2dp2-gated-untied-all-reduce", "pp2vpp2dp2-all-reduce", "ep2dp4-all-reduce"),
    ),
    Row(
        "more languages than slots",
        "`--moo-waves`, `--moo-active`, `--moo-wave-memory`",
        "supported",
        "several forward and backward passes a step, or a rotating subset",
        tests=_cases("dp4-pcgrad-two-waves", "dp4-three-waves-in-host-memory", "dp4-rotating-subset"),
    ),
    Row(
        "overlapped gradient reduction, bucket sizes",
        "`--overlap-grad-reduce`, `--no-align-grad-reduce`, `--ddp-bucket-size`, `--ddp-num-buckets`",
        "supported",
        "one bucket size on every stage, with or without overlap",
        tests=(STOCK, *_cases("dp4-gradvac-no-overlap", "pp2vpp2dp2-aligned-model")),
    ),
    Row(
        "tensor parallelism",
        "`--tensor-model-parallel-size`",
        "supported",
        "a block is whole tensors; replicated parameters count once",
        tests=(STOCK, COMBINATION, *_cases("tp2dp2-gated-untied-all-reduce")),
    ),
    Row(
        "sequence parallelism",
        "`--sequence-parallel`",
        "supported",
        "gradients of norms are summed over tensor-parallel ranks row by row",
        tests=(REPLICAS, *_cases("tp2dp2-sp", "tp2pp2dp2-sp-tied")),
    ),
    Row(
        "pipeline parallelism",
        "`--pipeline-model-parallel-size`",
        "supported",
        "`model` blocks are summed over stages",
        tests=(STOCK, *_cases("pp2dp2-untied-model", "pp4-three-waves")),
    ),
    Row(
        "interleaved pipeline",
        "`--num-layers-per-virtual-pipeline-stage`, `--num-virtual-stages-per-pipeline-rank`, "
        "`--pipeline-model-parallel-layout`",
        "supported",
        "all chunks of a rank; the schedule's rule on the number of micro-batches holds for those of one wave",
        tests=_cases("pp2vpp2dp2-tied", "pp2vpp2dp2-untied-no-overlap", "tp2pp2vpp2dp2-sp-tied-interleaved"),
    ),
    Row(
        "tied embeddings across stages",
        "without `--untie-embeddings-and-output-weights`",
        "supported",
        "rows are summed over the first and the last stage before anything else",
        tests=(REPLICAS, *_cases("pp2dp2-tied-two-waves", "tp2pp2dp2-sp-tied")),
    ),
    Row(
        "context parallelism",
        "`--context-parallel-size`, `--cp-comm-type`",
        "supported",
        "peers of a data-parallel rank are one slot, their rows are added up. Tested on a model without attention: "
        "Megatron's needs Transformer Engine here",
        tests=(
            *_cases("cp2dp2-folded", "cp2dp2-means-two-waves", "tp2cp2dp2-sp", "cp2ep2dp2"),
            "tests/distributed/test_context_parallel.py",
        ),
    ),
    Row(
        "expert parallelism, mixtures of experts",
        "`--num-experts`, `--expert-model-parallel-size`, `--expert-tensor-parallel-size`",
        "supported",
        "ranks that share experts are one slot; expert buckets go over their own group; an expert that saw no token of "
        "a language is masked for it",
        tests=_cases("dp4-experts", "ep2dp4", "tp2ep2dp4", "tp2ep4etp1dp4-bias", "pp2ep2dp4"),
    ),
    Row(
        "load balancing of routers",
        "`--moe-router-load-balancing-type` aux_loss, none; `--moe-router-enable-expert-bias`",
        "supported",
        "an auxiliary loss belongs to the row of its micro-batch; the bias is updated once a step, after the last wave",
        tests=_cases("tp2dp2-experts-aux-shared", "ep2dp4-aux-shared-two-waves", "ep2dp4-bias-no-overlap"),
    ),
    Row(
        "multi-latent attention",
        "`--multi-latent-attention`",
        "supported",
        "as other attention. Tested without tensor parallelism: with it, Megatron's local layers keep to each rank the "
        "gradient that its own heads give a shared projection; Transformer Engine's are not tested",
        tests=_cases("dp4-latent", "pp2dp2-latent"),
    ),
    Row(
        "query and key norms",
        "`--qk-layernorm`",
        "supported",
        "summed over tensor-parallel ranks row by row",
        tests=(COMBINATION, *_cases("tp2dp2-sp")),
    ),
    Row(
        "16-bit training",
        "`--bf16`, `--fp16`, `--loss-scale`",
        "supported",
        "inner products and sums are in fp32 and fp64; with fp16 a non-finite value goes to the loss scaler",
        tests=(*_cases("dp4-bf16", "dp4-fp16-overflow"), f"{FAULTS}::test_fp16_leaves_it_to_the_loss_scaler"),
    ),
    Row(
        "gradient dtype",
        "`--accumulate-allreduce-grads-in-fp32`, `--grad-reduce-in-bf16`",
        "supported",
        "rows are exchanged and kept in it",
        tests=_cases("dp4-bf16", "dp4-bf16-reduced"),
    ),
    Row(
        "loss per token or per micro-batch",
        "`--calculate-per-token-loss`",
        "supported",
        "a language is divided by its own tokens, or rows",
        tests=(STOCK, *_cases("dp4-mgda-tensor-accumulate8")),
    ),
    Row(
        "frozen parameters",
        "`requires_grad = False`",
        "supported",
        "they have no bucket; every stage needs something to train",
        tests=_cases("dp4-frozen-layers", "dp4-frozen-embedding", "pp2dp2-frozen-embedding"),
    ),
    Row(
        "accumulation, recomputation",
        "`--global-batch-size`, `--recompute-granularity` and its kin",
        "supported",
        "what happens before a bucket's last gradient does not matter",
        tests=_cases("dp4-mgda-tensor-accumulate8", "dp4-recompute", "tp2dp2-selective-recompute"),
    ),
    Row(
        "clipping, optimizers, checkpoints",
        "`--clip-grad`, `--optimizer` adam, or sgd without `--use-distributed-optimizer`; `--save`, `--load`",
        "supported",
        "they see a reduced gradient",
        tests=(
            STOCK,
            ENTRY,
            "tests/distributed/test_reshard.py",
            "tests/unit/distributed/test_support.py::test_sgd_equals_stock",
        ),
    ),
    Row(
        "non-finite gradients, ranks that disagree",
        "`--moo-nonfinite`, `--moo-max-quarantined`, `--moo-check-assignment`",
        "supported",
        "the language sits out the step; Megatron's own check (`--no-check-for-nan-in-loss-and-grad` ends it) does not "
        "stop the run before",
        tests=(FAULTS,),
    ),
)

UNTESTED = (
    Row(
        "FP8, FP4",
        "`--fp8-format`, `--fp8-recipe`, `--fp8-param-gather`, `--fp4-format`, `--fp4-param-gather`",
        "untested",
        "gradients stay in bf16 or fp32, a group of several buckets is walked; the delayed recipe mixes the languages' "
        "history of largest values, take tensorwise. Transformer Engine",
    ),
    Row(
        "grouped experts, other dispatchers",
        "`--moe-grouped-gemm`, `--moe-token-dispatcher-type flex`, `--moe-shared-expert-overlap`",
        "untested",
        "an expert is a parameter as in a list of experts. Transformer Engine, CUDA",
    ),
    Row(
        "other balancing, capacity",
        "`--moe-router-load-balancing-type` seq_aux_loss, sinkhorn, quantile_balancing; `--moe-z-loss-coeff`, "
        "`--moe-expert-capacity-factor`",
        "untested",
        "within a micro-batch; offsets of quantile_balancing are updated once a step, with an average that gloo lacks",
    ),
    Row(
        "fused weight gradients",
        "without `--no-gradient-accumulation-fusion`",
        "untested",
        "they add to `main_grad`, which is zeroed between waves. CUDA",
    ),
    Row(
        "activation offloading",
        "`--cpu-offloading-num-layers`, `--fine-grained-activation-offloading`, `--moe-paged-stash`",
        "untested",
        "touches activations alone, and starts afresh in every run of the schedule. Transformer Engine, CUDA",
    ),
    Row(
        "steps repeated when experts overflow",
        "`--moe-expert-rank-capacity-factor`",
        "untested",
        "the step counts once for the method and for quarantine; with `--moe-router-enable-expert-bias` the bias moves "
        "in each attempt",
    ),
    Row(
        "precision-aware optimizer, optimizer on the CPU",
        "`--use-precision-aware-optimizer`, `--main-grads-dtype`, `--exp-avg-dtype`, `--optimizer-cpu-offload`",
        "untested",
        "they read the shards after the combination. Transformer Engine",
    ),
    Row(
        "Muon, Lion, SOAP on all-reduced gradients",
        "`--optimizer` muon and others, without `--use-distributed-optimizer`",
        "untested",
        "they read whole gradients after the combination. The package emerging_optimizers",
    ),
    Row(
        "Mamba, gated delta nets, sparse attention",
        "`install()` on such a model; `--experimental-attention-variant`",
        "untested",
        "their parameters carry Megatron's marks for tensor parallelism. CUDA",
    ),
    Row(
        "T5, BERT, multimodal models",
        "`install()` on such a model",
        "untested",
        "all that is asked for is Megatron's DistributedDataParallel around each chunk",
    ),
)

# Options, and why they need no row.
IRRELEVANT = (
    (
        "`--overlap-param-gather`, `--no-align-param-gather`, `--ddp-pad-buckets-for-high-nccl-busbw`",
        "gathering of parameters is inherited unchanged; padding is zero in every row",
    ),
    (
        "`--use-tp-pp-dp-mapping`, `--use-sharp`, `--high-priority-stream-groups`, `--nccl-communicator-config-path`, "
        "`--use-ring-exchange-p2p`, `--overlap-p2p-communication-warmup-flush`, "
        "`--microbatch-group-size-per-virtual-pipeline-stage`",
        "the groups and schedules are asked, not computed",
    ),
    (
        "`--tp-comm-overlap` and its kin, `--cross-entropy-loss-fusion`, `--recompute-activations`, "
        "`--distribute-saved-activations`, `--use-transformer-engine-op-fuser`",
        "how a gradient is computed, not what it is or when it is ready",
    ),
    (
        "`--data-parallel-sharding-strategy`, `--outer-dp-sharding-strategy`, `--enable-full-sharding-in-hsdp`, "
        "`--megatron-fsdp-*`, `--fsdp-*`, `--no-gradient-reduce-div-fusion`, `--init-model-with-meta-device`",
        "read with FSDP only",
    ),
    (
        "`--decoupled-lr`, `--weight-decay*`, `--lr-*`, `--muon-*`, `--qk-clip`, `--log-num-zeros-in-grad`, "
        "`--log-params-norm`",
        "after the combination",
    ),
    (
        "`--save-dgrads-interval`, `--save-activations-interval`, `--check-for-large-grads`",
        "look at a micro-batch, or at a rank's bucket before it is sent",
    ),
    (
        "`--rerun-mode`, `--check-weight-hash-across-dp-replicas-interval`, `--train-sync-interval`, "
        "`--error-injection-rate`",
        "a step that is computed again moves no state twice",
    ),
)
