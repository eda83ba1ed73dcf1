"""Options into configuration, and which of the platform's flags are added to a command line."""

import argparse

import pytest

from megatron_moo.aggregation import AGGREGATORS, WRAPPERS, aggregator_options
from megatron_moo.distributed import MooConfig
from megatron_moo.finetune import missing_flags
from megatron_moo.training.arguments import add_moo_arguments, moo_config, validate_moo_arguments


def _args(*flags: str, **megatron) -> argparse.Namespace:
    """Our options as parsed, in the company of Megatron's that the checks look at."""
    args = add_moo_arguments(argparse.ArgumentParser()).parse_args(["--moo-data", "data", *flags])
    harmless = dict.fromkeys(
        "iterations_to_skip rampup_batch_size virtual_pipeline_model_parallel_size use_megatron_fsdp use_torch_fsdp2 "
        "ddp_average_in_collective reuse_grad_buf_for_mxfp8_param_ag nccl_ub mtp_num_layers eval_micro_batch_size "
        "eval_global_batch_size num_experts sequence_parallel".split()
    )
    sizes = {"context_parallel_size": 1, "expert_model_parallel_size": 1, "num_distributed_optimizer_instances": 1}
    sizes |= {"micro_batch_size": 2, "global_batch_size": 8, "tensor_model_parallel_size": 2}
    others = {"dataloader_type": "external", "use_distributed_optimizer": True, "cuda_graph_impl": "none"}
    vars(args).update(harmless | sizes | others | {"calculate_per_token_loss": False, "seed": 5} | megatron)
    return args


def test_the_preference_follows_megatrons_loss_normalisation():
    """Would catch: `mean` that differs from stock Megatron by default."""
    for per_token, preference in ((True, "tokens"), (False, "slots")):
        args = _args(calculate_per_token_loss=per_token)
        validate_moo_arguments(args)
        assert moo_config(args, ["de", "en"]).preference == preference


def test_every_option_of_every_method_reaches_it():
    """Would catch: a method's option without a flag, or parsed to a type the method refuses."""
    for method in AGGREGATORS:
        flags = ["--moo-method", method]
        for name, option in aggregator_options(method).items():
            flags += [f"--moo-{method}-{name.replace('_', '-')}", str(option.default)]
        args = _args(*flags)
        validate_moo_arguments(args)
        given = moo_config(args, ["de", "en"]).method_options
        assert given == {name: option.default for name, option in aggregator_options(method).items()}


def test_every_option_of_every_wrapper_reaches_it():
    """Would catch: a wrapper that is on by default, or one without a flag."""
    for wrapper, kind in WRAPPERS.items():
        flags = []
        for name, option in kind.options.items():
            flags += [f"--moo-{wrapper}-{name}", str(option.default)]
        args = _args(*flags)
        validate_moo_arguments(args)
        given = moo_config(args, ["de", "en"]).wrappers  # and no other
        assert given == {wrapper: {name: option.default for name, option in kind.options.items()}}


def test_options_of_ones_own_method():
    """Would catch: a method by import path whose options cannot be given, or numbers that arrive as text."""
    options = ("--moo-option", "c=0.3", "--moo-option", "rescale=none")
    args = _args("--moo-method", "megatron_moo.aggregation:CAGrad", *options)
    validate_moo_arguments(args)
    config = moo_config(args, ["de", "en"])
    assert config.method_options == {"c": 0.3, "rescale": "none"}
    assert config.build_aggregator().settings == {"c": 0.3, "rescale": "none"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--moo-method", "cagrad", "--moo-option", "c"), "--moo-option: 'c' is not NAME=VALUE"),
        (("--moo-method", "cagrad", "--moo-cagrad-c", "0.3", "--moo-option", "c=0.3"), "c is given twice"),
        (("--moo-method", "no.such:Thing"), "--moo-method no.such:Thing: .* cannot be imported"),
        (("--moo-method", "off", "--moo-cap-ratio", "2"), "--moo-method off combines nothing, .* cap are given"),
        (("--moo-method", "mgda", "--moo-every-n", "1.5"), "'n' must be a whole number"),
    ],
)
def test_bad_options_are_refused(flags, message):
    """Would catch: an option that is dropped without a word."""
    with pytest.raises(ValueError, match=message):
        validate_moo_arguments(_args(*flags))


def test_weights_are_put_in_the_order_of_the_languages():
    """Would catch: a language trained with the weight of another."""
    args = _args("--moo-preference", "given", "--moo-preference-weights", "en=3, de=1")
    assert moo_config(args, ["de", "en"]).preference_weights == [1.0, 3.0]


def test_waves_and_faults_reach_the_configuration():
    """Would catch: a flag that is parsed and forgotten, or another default than the library's."""
    flags = ("--moo-active", "1", "--moo-waves", "2", "--moo-wave-memory", "host", "--moo-nonfinite", "pass")
    args = _args(*flags, "--moo-max-quarantined", "7", "--moo-check-assignment")
    validate_moo_arguments(args)
    config = moo_config(args, ["de", "en"])
    assert (config.active, config.waves, config.wave_memory) == (1, 2, "host")
    assert (config.nonfinite, config.max_quarantined, config.check_assignment) == ("pass", 7, True)
    args = _args()
    validate_moo_arguments(args)
    assert moo_config(args, ["de"]) == MooConfig(objectives=["de"], method="mean", seed=5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--moo-active", "0"), "--moo-active must be at least 1 and at most the 2 languages .*found 0"),
        (("--moo-active", "3"), r"--moo-active .* at most the 2 languages \(de, en\), found 3"),
        (("--moo-waves", "0"), "--moo-waves must be at least 1, found 0"),
        (("--moo-max-quarantined", "-1"), "--moo-max-quarantined must be at least 0, found -1"),
    ],
)
def test_sizes_out_of_range_are_refused(flags, message):
    """Would catch: a subset of no language, or of more than there are."""
    with pytest.raises(ValueError, match=message):
        moo_config(_args(*flags), ["de", "en"])


RULES = {
    "save_wgrads_interval": 2,
    "use_megatron_fsdp": True,
    "use_torch_fsdp2": True,
    "overlap_param_gather_with_optimizer_step": True,
    "num_distributed_optimizer_instances": 2,
    "ddp_reduce_scatter_with_fp32_accumulation": True,
    "ddp_average_in_collective": True,
    "reuse_grad_buf_for_mxfp8_param_ag": True,
    "nccl_ub": True,
    "mtp_num_layers": 1,
    "cuda_graph_impl": "local",
}


@pytest.mark.parametrize("option", RULES)
def test_each_rule_of_the_exchange_names_its_option_and_leaves_stock_alone(option):
    """Would catch: a combination that is refused by nobody, or one that stock Megatron on our data could have run."""
    text = f"--(use-)?{option.replace('_', '-')}"
    with pytest.raises(ValueError, match=text):
        validate_moo_arguments(_args(**{option: RULES[option]}))
    validate_moo_arguments(_args("--moo-method", "off", **{option: RULES[option]}))


@pytest.mark.parametrize(
    ("option", "value"),
    [("iterations_to_skip", [3]), ("rampup_batch_size", [1, 1, 1]),
     ("dataloader_type", "cyclic"), ("eval_micro_batch_size", 3), ("eval_global_batch_size", 3)],
)  # fmt: skip
def test_rules_of_the_data_hold_for_stock_too(option, value):
    """Would catch: batches that are not those of the step, with a method or without."""
    for method in ("off", "mean"):
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')}"):
            validate_moo_arguments(_args("--moo-method", method, **{option: value}))


def test_flags_of_the_platform_yield_to_the_users():
    """Would catch: a flag given twice, where argparse takes ours, the last."""
    flags = ("--impl", "local", "--no-fusion", "--backend", "gloo")
    assert missing_flags(flags, ["--backend", "mpi", "--x", "1"]) == ["--impl", "local", "--no-fusion"]
    assert missing_flags(flags, []) == list(flags)
    assert missing_flags(flags, ["--backend=mpi"]) == ["--impl", "local", "--no-fusion"]
