"""A training loop of plain Megatron-core, and the two lines that make it resolve conflicts between languages.

    torchrun --nproc-per-node 2 examples/plain_megatron/train.py                  # with the two lines
    torchrun --nproc-per-node 2 examples/plain_megatron/train.py --method off     # without them

Runs on GPUs, and on a machine without any. Nothing of Megatron's training program is used: the model, the process
groups, the optimizer and the schedule are set up here, as in anybody's own script. The two lines are in `main`,
marked >>>.

The data are random walks. The two "languages" share their vocabulary but not their grammar: after a token, each goes
on with a token of its own choice, so what one learns the other has to unlearn.
"""

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import DistributedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_moo.platform import cpu

LANGUAGES = ("ada", "bel")
VOCABULARY, LENGTH, ROWS, MICRO_BATCHES = 64, 32, 8, 2


def languages_of(step: int) -> list[list[int]]:
    """Which language each data-parallel rank works on: one wave, slot by slot, changing places every step."""
    slots = parallel_state.get_data_parallel_world_size()
    return [[(step + slot) % len(LANGUAGES) for slot in range(slots)]]


def micro_batches(step: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches of a step, all in one language."""
    slot = parallel_state.get_data_parallel_rank()
    language = languages_of(step)[0][slot]
    grammar = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(language))
    generator = torch.Generator().manual_seed(1000 * step + slot)
    for _ in range(MICRO_BATCHES):
        walk = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        surprise = torch.rand(ROWS, LENGTH, generator=generator) < 0.1
        for t in range(LENGTH):
            walk[:, t + 1] = torch.where(surprise[:, t], walk[:, t + 1], grammar[walk[:, t]])
        batch = {"tokens": walk[:, :-1], "labels": walk[:, 1:], "positions": torch.arange(LENGTH).expand(ROWS, -1)}
        yield {key: value.contiguous().to(torch.cuda.current_device()) for key, value in batch.items()}


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple:
    """What Megatron's schedules call for every micro-batch: the output, and how to make a loss of it."""
    batch = next(batches)
    losses = model(batch["tokens"], batch["positions"], None, labels=batch["labels"])
    return losses, mean_loss


def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss to differentiate, and what to report; the schedule divides the first in place."""
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}


def build_model() -> DistributedDataParallel:
    """A small GPT in Megatron's DistributedDataParallel, gradients sharded for the distributed optimizer."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,  # this and the next two: kernels that a CPU does not have
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, position_embedding_type="rope")
    model.to(torch.cuda.current_device())
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, grad_reduce_in_fp32=True, bucket_size=30_000
    )
    layout = DistributedOptimizer.compute_full_param_layout(
        list(model.parameters()),
        ddp.bucket_size,
        parallel_state.get_data_parallel_world_size(),
        ddp,
        expert_data_parallel_world_size=1,
    )
    wrapped = DistributedDataParallel(config, ddp, model, full_param_layout=layout)
    config.no_sync_func = wrapped.no_sync
    return wrapped


def main(argv: list[str] | None = None) -> list[tuple[float, float]]:
    """Train; returns loss and gradient norm of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="cagrad", help="off, mean, mgda, pcgrad, cagrad or gradvac")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    args = parser.parse_args(argv)

    cpu.install()  # a machine without GPUs; does nothing where there is one
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(args.tensor_parallel)
    if parallel_state.get_data_parallel_world_size() < len(LANGUAGES):
        parser.error(f"needs a data-parallel rank for each of the {len(LANGUAGES)} languages: --nproc-per-node 2")
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)

    model = build_model()
    if args.method != "off":
        # >>> megatron_moo: one import, one call, after the model is wrapped and before the first step.
        from megatron_moo.distributed import MooConfig, install

        moo = install([model], MooConfig(LANGUAGES, method=args.method, granularity="layer"), languages_of)
        # <<<
    else:
        model.config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, min_lr=3e-3, use_distributed_optimizer=True), [model])
    forward_backward = get_forward_backward_func()

    history = []
    for step in range(args.steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward(
            forward_step_func=forward_step,
            data_iterator=micro_batches(step),
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=ROWS,
            forward_only=False,
        )
        _, grad_norm, _ = optimizer.step()
        loss = torch.stack([report["loss"] for report in reports]).mean()
        dist.all_reduce(loss)
        history.append((float(loss) / dist.get_world_size(), float(grad_norm)))
        if dist.get_rank() == 0 and (step % 10 == 9 or step == 0):
            line = f"step {step + 1:3d}  loss {history[-1][0]:.6f}  grad norm {history[-1][1]:.6f}"
            if args.method != "off":
                cosine = moo.record.cosine_BKK()[:, 0, 1].mean()
                line += f"  mean cosine of {' and '.join(LANGUAGES)} over {len(moo.blocks)} layers {cosine:+.3f}"
            print(line, flush=True)
    return history


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
