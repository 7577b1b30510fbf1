"""Measure what memory.py promises, by hand. Qwen2.5's shapes, random weights.

    python tests/bench_memory.py                    planned and measured peaks of the 0.5B model
    python tests/bench_memory.py --size 1.5b        the same for 1.5B, optimizer in host memory (takes 14 GB)
    python tests/bench_memory.py --head 2048 65536  what token_logprobs takes for so many tokens
    python tests/bench_memory.py --remainder        weights that move at lr 1e-6, with and without remainder
    python tests/bench_memory.py --recomputation    time with all layers computed again over that with none

Without a GPU, bytes are those of all tensors alive, counted at each operation while real ones are computed.
With CUDA, the first two commands run two whole steps under a hard cap of 11.5 GiB instead.
"""

import argparse
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import memory
from memory import choose_tokens

PROMPT, NEW, PROMPTS, GROUP = 150, 1024, 32, 8  # the recipe `improved`
SIZES = {  # hidden and intermediate size, layers, query heads
    "0.5b": (896, 4864, 24, 14),
    "1.5b": (1536, 8960, 28, 12),
}


def qwen(size: str) -> Qwen2Config:
    hidden, intermediate, layers, heads = SIZES[size]
    return Qwen2Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True,
    )


class LiveBytes(TorchDispatchMode):
    """Bytes of tensor storages alive, now and at the most, of those given and those made within."""

    def __init__(self, *tensors: torch.Tensor):
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, weakref.finalize] = {}
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            size = storage.nbytes()
            self.known[storage._cdata] = weakref.finalize(storage, self.freed, storage._cdata, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def freed(self, key: int, size: int) -> None:
        del self.known[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out


def micro_batch(model, ids: torch.Tensor, recomputed: int, top_entropy: float, head_rows=None) -> None:
    """Forward and backward as the training loop does it: full-length rows, a share of the answers' tokens."""
    sequences = [
        SimpleNamespace(prompt=row[:PROMPT], completion=[*row[PROMPT:], 0],
                        counted=(torch.rand(NEW) < top_entropy).nonzero()[:, 0])
        for row in ids.tolist()
    ]
    logprobs, _ = memory.sequence_logprobs(model, sequences, 1.0, recomputed, head_rows)
    logprobs.mean().backward()


class WideCache(DynamicCache):
    """Key and value buffers allocated once, written at their last column."""

    def __init__(self):
        super().__init__()
        self.keys, self.values = [], []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.keys[layer_idx][:, :, -1:] = key_states
        self.values[layer_idx][:, :, -1:] = value_states
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.keys[0].shape[2] - 1


@torch.no_grad()
def rollout(model, rows: int, columns: int) -> None:
    """What a sampler holds at its widest: prefill, the whole cache, and one step in its last column."""
    groups = -(-rows // GROUP)
    ids = torch.zeros((groups, PROMPT), dtype=torch.long, device=model.device)
    mask = torch.ones_like(ids)
    prompt = DynamicCache()
    name = memory.cache_name(model)
    model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **{name: prompt})
    source = torch.arange(rows, device=model.device) // GROUP
    cache = WideCache()
    for layer in prompt.layers:
        for buffers, filled in ((cache.keys, layer.keys), (cache.values, layer.values)):
            buffers.append(filled.new_zeros(rows, filled.shape[1], columns, filled.shape[3]))
            buffers[-1][:, :, :PROMPT] = filled[source]
    del prompt, layer, filled
    mask = torch.zeros((rows, 1, 1, columns), dtype=model.dtype, device=model.device)
    token = torch.zeros((rows, 1), dtype=torch.long, device=model.device)
    positions = torch.full_like(token, columns - 1)
    output = model(token, attention_mask=mask, position_ids=positions, use_cache=True, **{name: cache})
    uniform = torch.rand(rows, dtype=torch.float64, device=model.device)
    choose_tokens(output.logits[:, -1], 0.5, uniform)
    del output
    keep = torch.arange(rows - 1, device=model.device)
    for buffer in cache.keys + cache.values:
        buffer[: rows - 1] = buffer[keep]


def make_model(size: str, device: str = "cpu"):
    """(model, backbone, head) with random bf16 weights, ready to train."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2ForCausalLM(qwen(size)).eval()
    torch.set_default_dtype(torch.float32)
    memory.sum_gradients_in_fp32(model.parameters())
    return (model, *memory.prepare_model(model))


def make_plan(size: str, budget_bytes: int = 10**15, **choices) -> memory.MemoryPlan:
    return memory.plan(
        qwen(size), prompt_tokens=PROMPT, max_new_tokens=NEW, prompts=PROMPTS, group_size=GROUP,
        dtype=torch.bfloat16, memory_budget_bytes=budget_bytes, reference=True, top_entropy=0.2, **choices,
    )


def line(what: str, planned: int, measured: int) -> None:
    print(f"{what:<58} {planned / 1e9:7.3f} {measured / 1e9:9.3f} {planned / measured:6.3f}", flush=True)


def compare_on_cpu(size: str, micro_batch_rows: list[int], sampler_rows: list[int]) -> None:
    """Rollout at several widths, update at several micro-batches and checkpointings, optimizer step."""
    model = make_model(size)[0]
    params, layers = list(model.parameters()), model.config.num_hidden_layers
    memory.LOGITS_AT_ONCE["cpu"] = 2**24  # as on a GPU, for which the plan is
    title = f"Qwen2.5-{size}, without the optimizer's state"
    print(f"{title:<58} {'plan GB':>7} {'measured':>9} {'ratio':>6}")

    for rows in sampler_rows:
        plan = make_plan(size, max_rows=rows, offload_optimizer=True)
        with LiveBytes(*params) as live:
            rollout(model, rows, PROMPT + NEW + (NEW // 2 if rows < PROMPTS * GROUP else 0))
        line(f"rollout, {rows} rows", plan.rollout_peak_bytes, live.peak)

    for p in params:  # there already, as from the second micro-batch on
        p.grad = torch.zeros_like(p, dtype=torch.float32)
    grads = [p.grad for p in params]
    for rows in micro_batch_rows:
        ids = torch.randint(model.config.vocab_size, (rows, PROMPT + NEW))
        for k in (layers, layers // 2, 0):
            choices = {"micro_batch_tokens": ids.numel(), "recomputed_layers": k}
            plan = make_plan(size, offload_optimizer=True, **choices)
            with LiveBytes(*params, *grads) as live:
                micro_batch(model, ids, k, 0.2, plan.limits.head_rows)
            what = f"update, {ids.numel()} tokens, {k} of {layers} layers again"
            line(what, plan.update_peak_bytes, live.peak)

    if size == "0.5b":
        plan = make_plan(size)
        optimizer = memory.AdamW8bit(params, lr=1e-6)
        with LiveBytes(*params, *grads) as live:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        line("optimizer's state", plan.optimizer, live.now - plan.weights - plan.gradients)
        whole = plan.weights + plan.gradients + plan.optimizer + plan.optimizer_step
        line("optimizer's step, with its state", whole, live.peak)


def run_on_cuda(size: str, offload: bool, cap_gib: float = 11.5) -> None:
    """Two whole steps, reference included, under a hard cap; peaks of the allocator beside the plan."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(cap_gib * 2**30 / total)
    plan = make_plan(size, int(0.95 * cap_gib * 2**30), offload_optimizer=offload)
    print(plan.table())
    model, backbone, head = make_model(size, "cuda")
    optimizer = memory.AdamW8bit(model.parameters(), lr=1e-6, offload=offload)
    reference = memory.ReferencePolicy(model)
    episodes = torch.randint(model.config.vocab_size, (PROMPTS * GROUP, PROMPT + NEW), device="cuda")
    rows = max(1, plan.limits.micro_batch_tokens // (PROMPT + NEW))
    batches = torch.arange(len(episodes)).split(rows)
    waiting = plan.limits.max_rows < len(episodes)

    def report(what: str, planned: int) -> None:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        line(what, planned, allocated)
        print(f"{'  reserved':<66} {reserved / 1e9:9.3f}")
        torch.cuda.reset_peak_memory_stats()

    for step in (1, 2):
        start = time.perf_counter()
        rollout(model, plan.limits.max_rows, PROMPT + NEW + (NEW // 2 if waiting else 0))
        report(f"step {step}: rollout (its widest moment only)", plan.rollout_peak_bytes)
        with reference.swapped_in(), torch.no_grad():
            for batch in batches:
                hidden = backbone(episodes[batch], use_cache=False).last_hidden_state[:, PROMPT - 1 : -1]
                memory.token_logprobs(hidden.flatten(0, 1), head, episodes[batch][:, PROMPT:].flatten())
        for batch in batches:
            micro_batch(model, episodes[batch], plan.limits.recomputed_layers, 0.2, plan.limits.head_rows)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(f"step {step}: reference and update", plan.update_peak_bytes)
        print(f"step {step} took {time.perf_counter() - start:.1f} s")


def measure_head(tokens: int) -> None:
    """What token_logprobs needs beyond its inputs, in both passes, for Qwen2.5-0.5B's head."""
    hidden = torch.randn(tokens, 896, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(151936, 896) * 0.02).bfloat16().requires_grad_()
    weight.grad_dtype = torch.float32
    targets = torch.randint(151936, (tokens,))
    start = time.perf_counter()
    with LiveBytes(hidden, weight, targets) as live:
        inputs = live.now
        memory.token_logprobs(hidden, weight, targets)[0].sum().backward()
    seconds = time.perf_counter() - start
    parts = {"beyond inputs": live.peak - inputs, "float32 gradient of the head": weight.grad.nbytes,
             "that of hidden": hidden.grad.nbytes, "logits would be": 4 * tokens * 151936}
    gigabytes = {what: round(x / 1e9, 3) for what, x in parts.items()}
    print(f"{tokens} tokens, {seconds:.0f} s, GB:", gigabytes, flush=True)


def show_remainder(steps: int = 200, lr: float = 1e-6) -> None:
    """Weights of Qwen's size under random gradients: how many move, and how far in all against float32."""
    import bitsandbytes

    start = (torch.randn(1024, 1024) * 0.02).bfloat16()
    exact = torch.nn.Parameter(start.float())
    plain, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours.grad_dtype = torch.float32
    libs = [bitsandbytes.optim.AdamW8bit([p], lr=lr, weight_decay=0.0) for p in (exact, plain)]
    mine = memory.AdamW8bit([ours], lr=lr)
    for _ in range(steps):
        exact.grad = torch.randn_like(exact)
        plain.grad, ours.grad = exact.grad.bfloat16(), exact.grad.clone()
        for optimizer in (*libs, mine):
            optimizer.step()
    master = memory.join_fp32(ours.data, mine.state[ours]["remainder"])
    far = (exact.data - start.float()).abs().sum()
    print(f"{steps} steps at lr {lr:g}, 1M bf16 weights of size 0.02, random gradients")
    for what, now in (("without the remainder", plain.data.float()), ("with it, the masters", master),
                      ("with it, the bf16 weights", ours.data.float())):
        moved, distance = (now != start.float()).float().mean(), (now - start.float()).abs().sum() / far
        print(f"{what:<27} {moved:7.2%} of the weights moved, {distance:7.2%} as far as in float32")
    print(f"masters equal the library's float32 weights bit for bit: {torch.equal(master, exact.data)}")


def time_recomputation(size: str, repeats: int = 4) -> None:
    """Seconds for forward and backward of one episode; on a CPU those of this process, whatever else runs."""
    device, clock = ("cuda", time.perf_counter) if torch.cuda.is_available() else ("cpu", time.process_time)
    model = make_model(size, device)[0]
    layers = model.config.num_hidden_layers
    ids = torch.randint(model.config.vocab_size, (1, PROMPT + NEW), device=device)
    seconds: dict[int, list[float]] = {0: [], layers: []}
    for recomputed in [0, layers] * (repeats + 1):
        start = clock()
        micro_batch(model, ids, recomputed, 0.2)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[recomputed].append(clock() - start)
    for recomputed, measured in seconds.items():  # the first of each warmed up
        rounded = [round(s, 2) for s in measured[1:]]
        print(f"{recomputed} of {layers} layers computed again, seconds:", *rounded)
    print(f"all over none, best of {repeats}: {min(seconds[layers][1:]) / min(seconds[0][1:]):.2f}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--offload-optimizer", action="store_true", help="with CUDA")
    parser.add_argument("--micro-batch-rows", type=int, nargs="+", default=[1, 2, 4], help="1174 tokens each")
    parser.add_argument("--sampler-rows", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--head", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--remainder", action="store_true")
    parser.add_argument("--recomputation", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.remainder:
        show_remainder()
    elif options.recomputation:
        time_recomputation(options.size)
    elif options.head:
        for tokens in options.head:
            measure_head(tokens)
    elif torch.cuda.is_available():
        run_on_cuda(options.size, options.offload_optimizer)
    else:
        compare_on_cpu(options.size, options.micro_batch_rows, options.sampler_rows)


if __name__ == "__main__":
    main()
