"""The table of ``tests/distributed/test_layouts.py``: layouts, models, and ways of combining."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatron.core import parallel_state

from megatron_moo.distributed import MooConfig
from tests.helpers import reference
from tests.helpers.multiprocess import init_megatron
from tests.helpers.tiny_config import Variant

STEPS = 3
SEED = 7
GRADIENT_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-3 * reference.LEARNING_RATE


@dataclass(frozen=True)
class Layout:
    """Sizes of all kinds of parallelism; ``dp`` counts data-parallel ranks, without context parallelism."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def slots(self) -> int:
        """Data-parallel ranks, or the groups of them that expert parallelism joins; stated independently."""
        etp = self.tp if self.etp is None else self.etp
        joined = math.lcm(self.tp * self.cp, etp * self.ep)
        return self.tp * self.cp * self.dp // joined

    @property
    def peers(self) -> int:
        """Data-parallel ranks of a slot."""
        return self.dp // self.slots

    def init(self) -> None:
        init_megatron(self.tp, self.pp, self.vpp, self.cp, self.ep, self.etp)

    def place(self) -> tuple[int, int]:
        """Slot of this rank, and its number among the slot's peers."""
        return divmod(parallel_state.get_data_parallel_rank(), self.peers)


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        layout: a name of LAYOUTS.
        languages: K.
        active: languages of a step, a rotating subset; None: all.
        waves: W.
        per_wave: micro-batches of a data-parallel rank in a wave.
        options: further fields of MooConfig.
        wrap: how the model is wrapped (``tiny_gpt.wrap_chunks``).
        gradient_tolerance, weight_tolerance: see ``test_layouts.py``.
    """

    layout: str
    variant: Variant
    method: str = "cagrad"
    granularity: str = "layer"
    languages: int = 3
    active: int | None = None
    waves: int = 1
    per_wave: int = 2
    clip: float = 1.0
    steps: int = STEPS
    initial_scale: float = 1.0
    options: Mapping = field(default_factory=dict)
    wrap: Mapping = field(default_factory=dict)
    gradient_tolerance: float = GRADIENT_TOLERANCE
    weight_tolerance: float = WEIGHT_TOLERANCE

    def assignment(self, step: int) -> list[list[int]]:
        """The step's languages go round over waves and slots; with a subset, other ones in every step."""
        number = self.active or self.languages
        chosen = [(step * number + i) % self.languages for i in range(number)]
        slots = LAYOUTS[self.layout].slots
        return [[chosen[(step + wave * slots + slot) % number] for slot in range(slots)] for wave in range(self.waves)]

    def recipe(self) -> reference.Recipe:
        layout = LAYOUTS[self.layout]
        return reference.Recipe(
            self.variant,
            reference.Plan(self.per_wave, layout.peers, layout.cp),
            [self.assignment(step) for step in range(self.steps)],
            self.languages,
            self.method,
            granularity=self.granularity,
            seed=SEED,
            clip=self.clip,
            initial_scale=self.initial_scale,
        )

    def config(self) -> MooConfig:
        return MooConfig(
            [f"l{k}" for k in range(self.languages)],
            self.method,
            granularity=self.granularity,
            preference="tokens" if self.variant.per_token_loss else "slots",
            waves=self.waves,
            seed=SEED,
            **({"active": self.active} if self.active else {}),
            **self.options,
        )


LAYOUTS = {
    "dp4": Layout(dp=4),
    "tp2dp2": Layout(tp=2, dp=2),
    "pp2dp2": Layout(pp=2, dp=2),
    "pp4": Layout(pp=4),
    "pp2vpp2dp2": Layout(pp=2, vpp=2, dp=2),
    "tp2pp2dp2": Layout(tp=2, pp=2, dp=2),
    "tp2pp2vpp2dp2": Layout(tp=2, pp=2, vpp=2, dp=2),
    "cp2dp2": Layout(cp=2, dp=2),
    "tp2cp2dp2": Layout(tp=2, cp=2, dp=2),
    "ep2dp4": Layout(ep=2, dp=4),
    "pp2ep2dp4": Layout(pp=2, ep=2, dp=4),
    "tp2ep2dp4": Layout(tp=2, ep=2, dp=4),
    "tp2ep2etp1dp2": Layout(tp=2, ep=2, etp=1, dp=2),
    "tp2ep4etp1dp4": Layout(tp=2, ep=4, etp=1, dp=4),
    "cp2ep2dp2": Layout(cp=2, ep=2, dp=2),
    "tp2etp1dp2": Layout(tp=2, etp=1, dp=2),
    "etp2dp4": Layout(etp=2, dp=4),
}

PLAIN = Variant()
UNTIED = Variant(tied=False, gated=True, qk_layernorm=True, per_token_loss=False)
SP = Variant(sequence_parallel=True, qk_layernorm=True)
# Multi-latent attention is tested without tensor parallelism: Megatron's local layer spec leaves the part of
# linear_kv_down_proj that makes the rotary keys with the gradient of one rank's heads.
LATENT = Variant(latent=True, gated=True, tied=False)
MOE = Variant(experts=4, barred=True, sequence_parallel=True)
MOE_MEANS = replace(MOE, per_token_loss=False, aux_loss=0.02, gated=True, shared_expert=True)
MOE_BIAS = Variant(experts=4, expert_bias=True, sequence_parallel=True, tied=False)
FLAT = Variant(attention=False)
ALL_REDUCE = {"distributed_optimizer": False}
NO_OVERLAP = {"overlap": False}

CASES = {
    # data parallelism alone: what is done to gradients
    "dp4-mean-model": Case("dp4", PLAIN, "mean", "model", per_wave=1),
    "dp4-mgda-tensor-accumulate8": Case("dp4", UNTIED, "mgda", "tensor", per_wave=8),
    "dp4-pcgrad-two-waves": Case("dp4", PLAIN, "pcgrad", languages=6, waves=2, per_wave=1),
    "dp4-gradvac-no-overlap": Case("dp4", UNTIED, "gradvac", wrap=NO_OVERLAP, clip=0.0),
    "dp4-three-waves-in-host-memory": Case(
        "dp4", PLAIN, languages=7, waves=3, per_wave=1, options={"wave_memory": "host"}
    ),
    "dp4-rotating-subset": Case("dp4", PLAIN, "mgda", languages=6, active=3),
    "dp4-one-language-in-all-slots": Case("dp4", PLAIN, languages=3, active=1),
    "dp4-bucket": Case("dp4", PLAIN, "mgda", "bucket"),
    "dp4-frozen-layers": Case("dp4", Variant(frozen=r"decoder\.layers\.[12]|decoder\.final", tied=False)),
    "dp4-frozen-embedding": Case("dp4", Variant(frozen="embedding", tied=True), "mgda"),
    "dp4-recompute": Case("dp4", Variant(recompute="full"), "upgrad"),
    "dp4-latent": Case("dp4", LATENT, "mgda"),
    "dp4-all-reduce": Case("dp4", PLAIN, wrap=ALL_REDUCE),
    "dp4-all-reduce-two-waves": Case("dp4", UNTIED, "mgda", languages=6, waves=2, wrap={**ALL_REDUCE, **NO_OVERLAP}),
    "dp4-bf16": Case("dp4", Variant(dtype="bf16"), weight_tolerance=2**-8),
    "dp4-bf16-reduced": Case(
        "dp4", Variant(dtype="bf16"), wrap={"reduce_in_fp32": False}, gradient_tolerance=0.03, weight_tolerance=2**-7
    ),
    "dp4-fp16-overflow": Case(
        "dp4",
        Variant(dtype="fp16", per_token_loss=False),
        "mgda",
        steps=5,
        initial_scale=2.0**19,
        weight_tolerance=2**-9,
    ),
    # tensor parallelism
    "tp2dp2-sp": Case("tp2dp2", SP, waves=2, options={"wave_memory": "host"}),
    "tp2dp2-gated-untied-all-reduce": Case("tp2dp2", UNTIED, "mgda", languages=2, wrap=ALL_REDUCE),
    "tp2dp2-selective-recompute": Case("tp2dp2", replace(SP, recompute="selective"), "pcgrad", languages=2),
    "tp2dp2-bf16-sp": Case(
        "tp2dp2", replace(SP, dtype="bf16"), languages=2, steps=1, gradient_tolerance=0.05, weight_tolerance=2**-8
    ),
    # pipelines
    "pp2dp2-tied-two-waves": Case("pp2dp2", PLAIN, "mgda", waves=2, per_wave=2),
    "pp2dp2-untied-model": Case("pp2dp2", UNTIED, granularity="model", languages=2, wrap={"align": True}),
    "pp2dp2-frozen-embedding": Case("pp2dp2", Variant(tied=False, frozen="embedding|output_layer"), languages=2),
    "pp2dp2-bucket": Case("pp2dp2", PLAIN, "mgda", "bucket", languages=2),
    "pp2dp2-latent": Case("pp2dp2", replace(LATENT, qk_layernorm=True), languages=2),
    "pp4-three-waves": Case("pp4", PLAIN, "mgda", waves=3, per_wave=2),
    "pp2vpp2dp2-tied": Case("pp2vpp2dp2", PLAIN, languages=2),
    "pp2vpp2dp2-untied-no-overlap": Case("pp2vpp2dp2", UNTIED, "mgda", "tensor", waves=2, wrap=NO_OVERLAP),
    "pp2vpp2dp2-aligned-model": Case("pp2vpp2dp2", PLAIN, "mgda", "model", waves=2, per_wave=4, wrap={"align": True}),
    "pp2vpp2dp2-all-reduce": Case("pp2vpp2dp2", PLAIN, languages=2, wrap=ALL_REDUCE),
    "pp2vpp2dp2-bf16": Case("pp2vpp2dp2", Variant(dtype="bf16", tied=False), "mgda", languages=2),
    # all together
    "tp2pp2dp2-sp-tied": Case("tp2pp2dp2", SP, "mgda", "model", waves=2, per_wave=1),
    "tp2pp2dp2-all-reduce": Case("tp2pp2dp2", SP, languages=2, per_wave=1, wrap=ALL_REDUCE),
    "tp2pp2vpp2dp2-sp-tied-interleaved": Case("tp2pp2vpp2dp2", SP, "gradvac", languages=2, per_wave=2),
    "tp2pp2vpp2dp2-recompute-gated": Case(
        "tp2pp2vpp2dp2", replace(UNTIED, recompute="full", sequence_parallel=True), "mgda", "tensor", languages=2
    ),
    # context parallelism
    "cp2dp2-folded": Case("cp2dp2", FLAT, languages=2),
    "cp2dp2-means-two-waves": Case("cp2dp2", replace(FLAT, per_token_loss=False), "mgda", waves=2),
    "cp2dp2-all-reduce": Case("cp2dp2", FLAT, "mgda", languages=2, wrap=ALL_REDUCE),
    "tp2cp2dp2-sp": Case("tp2cp2dp2", replace(FLAT, sequence_parallel=True), languages=2, per_wave=1),
    # mixtures of experts
    "dp4-experts": Case("dp4", MOE, "mgda", "tensor"),
    "tp2dp2-experts-aux-shared": Case("tp2dp2", MOE_MEANS, languages=2),
    "tp2etp1dp2-experts": Case("tp2etp1dp2", MOE, languages=2),
    "etp2dp4-experts": Case("etp2dp4", replace(MOE, dispatcher="allgather"), languages=2),
    "ep2dp4": Case("ep2dp4", MOE, "mgda", "tensor", languages=2),
    "ep2dp4-aux-shared-two-waves": Case("ep2dp4", MOE_MEANS, waves=2),
    "ep2dp4-bias-no-overlap": Case("ep2dp4", MOE_BIAS, "mgda", "model", waves=2, wrap=NO_OVERLAP),
    "ep2dp4-all-reduce": Case("ep2dp4", MOE, languages=2, wrap=ALL_REDUCE),
    "pp2ep2dp4": Case("pp2ep2dp4", replace(MOE_MEANS, barred=False), languages=2),
    "tp2ep2dp4": Case("tp2ep2dp4", replace(MOE, dispatcher="allgather"), languages=2, per_wave=1),
    "tp2ep2etp1dp2": Case("tp2ep2etp1dp2", MOE, "mgda", languages=2),
    "tp2ep4etp1dp4-bias": Case("tp2ep4etp1dp4", MOE_BIAS, languages=2, per_wave=1),
    "cp2ep2dp2": Case("cp2ep2dp2", replace(MOE, attention=False), "mgda", languages=2),
}
