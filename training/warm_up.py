"""What a run does before its first step, on images of zeros: compile the model, and fix DDP's order of gradients."""

import torch
from torch.nn.parallel import DistributedDataParallel

from engine import TrainState, autocast
from training.options import Options
from utils import print_main
from weight_selection.errors import printable


def warm_up(options: Options, state: TrainState, test_batch_size: int) -> None:
    """Compile with ``--compile``, and with several processes fix the order in which DDP sums gradients."""
    if not options.compile and state.world_size == 1:
        return
    shape = (3, options.input_size, options.input_size)
    images = torch.zeros(options.batch_size, *shape, device=state.device)
    targets = torch.zeros(options.batch_size, dtype=torch.long, device=state.device)
    if options.compile:
        compile_model(state, images, targets, torch.zeros(test_batch_size, *shape, device=state.device))
    warm_up_ddp(state, images, targets)


def compile_model(state: TrainState, images: torch.Tensor, targets: torch.Tensor, test_images: torch.Tensor) -> None:
    """Compile the model for training and for its evaluation. If that fails in a process, all go on without, and say so.

    Args:
        state: whose model is compiled.
        images, targets: of the shapes of training.
        test_images: of the shape of evaluation.
    """
    wrapped = isinstance(state.ddp_model, DistributedDataParallel)
    modules = {state.model, state.ddp_model.module if wrapped else state.ddp_model}
    for module in modules:
        module.compile()
    failure = None
    try:
        dry_step(state, images, targets, exchange=False)
        with torch.no_grad(), autocast(state.device, state.amp_dtype):
            state.model.eval()(test_images)
    except Exception as error:  # no compiler, no Triton, an operator without a kernel: each fails in its own way
        failure = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    if failure := state.stop_coordinator.first_of_all(failure):
        print_main(f"warning: --compile true: goes on without, as it failed ({printable(failure)[:300]})")
        for module in modules:
            module._compiled_call_impl = None  # undoes Module.compile, for which PyTorch has no public way


def warm_up_ddp(state: TrainState, images: torch.Tensor, targets: torch.Tensor) -> None:
    """Fix DDP's bucket order before the first step, so that a resumed run sums gradients in the same order.

    DDP arranges its buckets by the order in which the gradients of its first step come. With more than two processes
    the arrangement decides in which order floats are added up.
    """
    if isinstance(state.ddp_model, DistributedDataParallel):
        dry_step(state, images, targets, exchange=True)


def dry_step(state: TrainState, images: torch.Tensor, targets: torch.Tensor, exchange: bool) -> None:
    """Compute a gradient, with or without an exchange between processes, and leave the state as it was."""
    before = [buffer.clone() for buffer in state.ddp_model.buffers()]
    state.ddp_model.train()
    try:
        state.backward(images, targets, exchange)
    finally:
        state.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(state.ddp_model.buffers(), before, strict=True):
                buffer.copy_(value)
