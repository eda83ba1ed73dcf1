"""Repairs to Megatron 0.19 that are needed on every device, GPUs included.

With PyTorch's own AdamW, that is without Transformer Engine and Apex:

- Loading a checkpoint asks the distributed optimizer for its state before AdamW has made any, which fails an
  assertion.  Repaired: AdamW's state exists when it is asked for, as its first step would create it.
- After a load AdamW's step count is the one of the run that loads, or all parameters share one tensor for it, which
  AdamW counts up once per parameter.  Either way the bias correction of a resumed run is wrong, without a message.
  Repaired: every parameter gets its own count, of the value in the checkpoint.

With parameters in fp32 and the distributed optimizer:

- Loading writes into parameters that require gradients, which autograd refuses.  Repaired: gradients are off.

With a tied embedding, pipeline parallelism and a model width that is no multiple of 64:

- The bucket before the embedding's is recorded as ending where the embedding would start, aligned to 64 elements, and
  a save by shards then fails, as what it writes goes past the end of the bucket.  Repaired: it ends with its last
  parameter, as every other bucket.

With torch_dist checkpoints that are saved synchronously:

- Every rank starts a server process, by spawning, to hand the result of the write from itself to itself.  That imports
  the main module and torch again in each: seconds per rank, and a hang where the main module is a script without a
  guard.  Repaired: the result stays in the process.

With the local layer spec and sequence parallelism:

- PyTorch's norms refuse.  Repaired: the norms of `norms.py` take their place.
"""

import functools
import queue
from typing import Any

import torch

_installed = False


def install() -> None:
    """Put the repairs in place; a second call changes nothing.  It imports `megatron.core`."""
    global _installed
    if _installed:
        return
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from megatron_moo.platform.norms import build_norm

    optimizer_class = distrib_optimizer.DistributedOptimizer
    WrappedTorchNorm.__new__ = staticmethod(build_norm)
    optimizer_class._set_main_param_and_optimizer_states = torch.no_grad()(
        optimizer_class._set_main_param_and_optimizer_states
    )
    _repair_bucket_ends(optimizer_class)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _repair_adam_state(optimizer_class)
    _repair_synchronous_save(TorchDistSaveShardedStrategy)
    _installed = True


def _repair_adam_state(optimizer_class: Any) -> None:
    original_state_dict = optimizer_class.state_dict
    original_load_state_dict = optimizer_class.load_state_dict
    original_set_states = optimizer_class._set_main_param_and_optimizer_states

    @functools.wraps(original_set_states)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        # Only tensors are copied; the reshardable formats hold no step, and the default one that of the loading run.
        original_set_states(self, model_param, {**tensors, "step": None})

    @functools.wraps(original_state_dict)
    def state_dict(self: Any) -> dict[str, Any]:
        _make_adam_state(self.optimizer)
        return original_state_dict(self)

    @functools.wraps(original_load_state_dict)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original_load_state_dict(self, state_dict)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))

    optimizer_class.state_dict = state_dict
    optimizer_class.load_state_dict = load_state_dict
    optimizer_class._set_main_param_and_optimizer_states = set_states


def _repair_bucket_ends(optimizer_class: Any) -> None:
    original_layout = optimizer_class._compute_per_buffer_param_layout

    @functools.wraps(original_layout)
    def layout(*args: Any, **kwargs: Any) -> Any:
        result = original_layout(*args, **kwargs)
        for bucket, (start, _) in enumerate(result.bucket_indices):
            last = max(end for _, end, owner in result.param_index_map.values() if owner == bucket)
            result.per_bucket_numel_unpadded[bucket] = last - start
        return result

    optimizer_class._compute_per_buffer_param_layout = staticmethod(layout)


def _repair_synchronous_save(strategy_class: Any) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original_save = strategy_class.save

    @functools.wraps(original_save)
    def save(self: Any, sharded_state_dict: dict[str, Any], checkpoint_dir: Any) -> None:
        shared_with_processes = filesystem_async._results_queue
        filesystem_async._results_queue = queue.Queue()
        try:
            original_save(self, sharded_state_dict, checkpoint_dir)
        finally:
            filesystem_async._results_queue = shared_with_processes

    strategy_class.save = save


def _make_adam_state(optimizer: Any) -> None:
    """Give every parameter of an Adam that has not stepped yet the state of step 0; leave others alone."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) or len(optimizer.state) > 0:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0, dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
