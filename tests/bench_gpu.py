"""What only a GPU can answer: kernels, exactness, speed, and memory under a cap that stands in for 12 GB.

    python tests/bench_gpu.py                          # at most 8 minutes on an H100-class card
    python tests/bench_gpu.py --cap-gib 10.5           # on a card of 12 GB, of which this process takes some
    python tests/bench_gpu.py --only decoding update   # some of the checks
    python tests/bench_gpu.py --dry-run                # a small model on a CPU: its figures mean nothing

It prints a table, writes it as json and exits 1 if anything that must hold does not. Weights are random, of
Qwen2.5-0.5B's shape. A check that fails is a row, and the next one goes on; whole runs of grpo_scratch.py and
what needs a fresh allocator have processes of their own. Not here: several GPUs, and what is learned.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import grpo_scratch as grpo  # isort: skip (before torch: it sets how OpenMP's threads wait)

import bench_memory
import bitsandbytes
import torch
import transformers
from bench_memory import GROUP, NEW, PROMPT, PROMPTS
from bench_sampler import bound, copy_bandwidth, products_per_second
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM

import data
import memory


@dataclass
class Row:
    """A line of the table. `holds` is None where nothing is asked of the value."""

    name: str
    value: object = None
    holds: bool | None = None
    skipped: str | None = None
    check: str = ""


@dataclass
class Setting:
    """What the checks run on: a card and Qwen2.5-0.5B's shape, or a CPU and a small one."""

    dry: bool
    child: bool  # in a process of its own, for a fresh allocator
    folder: Path  # for files, removed in the end
    deadline: float
    cap_gib: float

    def __post_init__(self):
        self.device, self.config = "cuda", bench_memory.qwen("0.5b")
        self.decoding = [(rows, columns) for rows in (256, 64, 8) for columns in (200, 650, 1100)]
        self.length, self.answers, self.rows = 650, (256, 64), 3
        if self.dry:
            self.device, self.decoding = "cpu", [(4, 200)]
            self.length, self.answers, self.rows = 150, (4, 6), 1
            self.config = Qwen2Config(
                vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
            )

    def on_cuda(self, name: str, measure: Callable) -> Row:
        """The row with measure()'s (value, holds), which only CUDA has."""
        return Row(name, skipped="needs CUDA") if self.dry else Row(name, *measure())

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


# ---- What is asked of the project, each in one place -------------------------------------------------------


def make_model(at: Setting, dtype: torch.dtype = torch.bfloat16):
    """(model, backbone, head) with random weights, ready to sample and to train."""
    torch.manual_seed(0)
    with torch.device(at.device):
        model = Qwen2ForCausalLM._from_config(at.config, dtype=dtype).eval()
    memory.sum_gradients_in_fp32(model.parameters())
    return (model, *memory.prepare_model(model))


def answer(model, prompts: list[list[int]], stops: list[int], **options) -> list[grpo.Completion]:
    generator = torch.Generator().manual_seed(0)
    return grpo.sample(model, prompts, eos_token_id=stops, pad_token_id=0, generator=generator, **options)


def choose(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return grpo.choose_tokens(logits, 1.0, torch.rand(len(logits), dtype=torch.float64, device=logits.device))


@torch.no_grad()
def update_logprobs(backbone, head, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of all completions' tokens, one answer after the other, as the update has them."""
    hidden, places = memory.packed_hidden_states(backbone, prompts, [ids[:-1] for ids in completions])
    where = [place[len(p) - 1 :][: len(c)] for place, p, c in zip(places, prompts, completions)]
    targets = torch.tensor([token for ids in completions for token in ids], device=hidden.device)
    return memory.token_logprobs(hidden[torch.cat(where).to(hidden.device)], head, targets)[0]


# ---- Measuring ---------------------------------------------------------------------------------------------


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(work: Callable, repeats: int = 3) -> float:
    """The median wall time of work(), with what it left to the GPU, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        wait()
        started = time.perf_counter()
        work()
        wait()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def kernels(work: Callable) -> tuple[list[str], int, float]:
    """(names of attention's operations and kernels in work(), kernels launched, their milliseconds)."""
    wait()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        wait()
    on_gpu = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    marks = ("aten::_scaled_dot", "fmha", "flash")
    names = {e.key[:60] for e in seen.key_averages() if any(mark in e.key for mark in marks)}
    return sorted(names), len(on_gpu), sum(e.time_range.elapsed_us() for e in on_gpu) / 1000


def synchronisations(work: Callable) -> int:
    """How often the host waits for the GPU in work(), as far as torch knows."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def peak_bytes() -> int:
    """The most that tensors took on the GPU since the last call."""
    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.detach().view(torch.uint8), b.detach().view(torch.uint8))


def distance(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.detach().float() - exact.detach()).norm() / exact.detach().norm()).item()


# ---- The checks: each yields rows --------------------------------------------------------------------------


def machine(at: Setting) -> Iterator[Row]:
    for library in (torch, transformers, bitsandbytes):
        yield Row(library.__name__, library.__version__)
    card = None if at.dry else torch.cuda.get_device_properties(0)
    yield at.on_cuda("card", lambda: (f"{card.name}, {card.total_memory / 2**30:.1f} GiB", None))
    capability = lambda: (f"{torch.version.cuda}, {card.major}.{card.minor}", card.major >= 8)  # bf16
    yield at.on_cuda("CUDA, capability", capability)
    off = not torch.backends.cuda.cudnn_sdp_enabled()
    yield at.on_cuda("cuDNN attention is off", lambda: (off, off))


def attention(at: Setting) -> Iterator[Row]:
    """What SDPA picks while decoding, in a prefill and packed, against the textbook in float32."""
    rows, length, keys, shared, size = 4, at.length, 2, 7, 64
    module = SimpleNamespace(num_key_value_groups=shared, is_causal=True, training=False)
    seen = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=at.device)
    seen[0, ..., :128] = False  # a row whose first columns are another's
    causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=at.device).tril()
    # The sampler's mask is a slice of a wider one, whose rows are whole eights apart.
    mask = torch.zeros(rows, 1, 1, length // 8 * 8 + 16, dtype=torch.bfloat16, device=at.device)[..., :length]
    mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)
    tokens = torch.arange(rows * length, device=at.device)

    def decoding(q, k, v):
        return memory.packed_attention(module, q, k, v, mask)[0]

    def prefill(q, k, v):
        return memory.packed_attention(module, q, k, v, seen & causal)[0]

    def packed(q, k, v):
        q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))
        out, _ = memory.packed_attention(module, q, k, v, tokens.view(1, 1, rows, length), slots=tokens)
        return out.view(rows, length, -1, size)

    def textbook(visible, q, k, v):
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) / size**0.5).masked_fill(~visible, -torch.inf)
        return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)

    for attend, visible in ((decoding, seen), (prefill, seen & causal), (packed, causal)):
        queries = 1 if attend is decoding else length
        exact = [torch.randn(rows, h, n, size, device=at.device).bfloat16().float().requires_grad_()
                 for h, n in ((keys * shared, queries), (keys, length), (keys, length))]
        inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
        asked = visible.any(-1).transpose(1, 2)[..., None]  # of queries that see nothing, nothing
        got, expected = attend(*inputs) * asked, textbook(visible, *exact) * asked
        error = distance(got, expected)
        yield Row(f"{attend.__name__}: error", error, error < 0.02)
        upstream = torch.randn_like(expected)
        pairs = zip(torch.autograd.grad(got, inputs, upstream.bfloat16()),
                    torch.autograd.grad(expected, exact, upstream))
        error = max(distance(*pair) for pair in pairs)
        yield Row(f"{attend.__name__}: error of the gradients", error, error < 0.03)

        def picked(attend=attend, inputs=inputs):
            forward = kernels(lambda: attend(*(x.detach() for x in inputs)))[0]
            both = kernels(lambda: attend(*inputs).sum().backward())[0]
            names = f"{', '.join(forward)}; with gradients {', '.join(both)}"
            return names, "math" not in names

        yield at.on_cuda(f"{attend.__name__}: kernels", picked)


def sampler(at: Setting) -> Iterator[Row]:
    """Greedy answers to mixed prompts against `generate`; log-probabilities against the update's."""
    rng, new = random.Random(0), at.answers[1]
    prompts = [[rng.randrange(at.config.vocab_size) for _ in range(n)] for n in (5, 40, 17, 150, 3, 64)]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
        model, backbone, head = make_model(at, dtype)
        kind = str(dtype).removeprefix("torch.")
        greedy = {"max_new_tokens": new, "temperature": 0.0}
        first = answer(model, prompts, [0], **greedy)
        stops = sorted({first[0].ids[2], first[3].ids[len(first[3].ids) // 2]})  # so that lengths are mixed
        by_generate = []
        for ids in (torch.tensor([prompt], device=at.device) for prompt in prompts):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                 do_sample=False, eos_token_id=stops, pad_token_id=0)
            by_generate.append(out[0, ids.shape[1] :].tolist())
        for name, rows in (("at once", None), ("refilled", 2)):
            answers = [c.ids for c in answer(model, prompts, stops, max_rows=rows, **greedy)]
            share = sum(a == b for a, b in zip(answers, by_generate)) / len(answers)
            # In bf16, other shapes' rounding may part two answers where two tokens are nearly as likely.
            yield Row(f"{kind}, {name}: answers as by generate", share,
                      share == 1 if dtype == torch.float32 else None)
        drawn = answer(model, prompts, stops, max_new_tokens=new, group_size=2)
        twice = [prompt for prompt in prompts for _ in range(2)]
        sampled = torch.tensor([x for c in drawn for x in c.logprobs], device=at.device)
        again = update_logprobs(backbone, head, twice, [c.ids for c in drawn])
        gap = (again - sampled).abs().mean().item()
        yield Row(f"{kind}: mean gap of log-probabilities", gap, gap < tolerance)


def optimizer(at: Setting) -> Iterator[Row]:
    """AdamW8bit on bf16 weights against the library's on float32 ones; the head's gradient."""
    torch.manual_seed(3)
    start = [(torch.randn(shape, device=at.device) * 0.02).bfloat16() for shape in ((700, 900), (33,))]
    gradients = [[torch.randn(w.shape, device=at.device) * 10**-i for w in start] for i in range(5)]

    def trained(make, dtype, **options):
        params = [torch.nn.Parameter(w.to(dtype, copy=True)) for w in start]
        memory.sum_gradients_in_fp32(params)
        stepping = make(params, lr=1e-5, weight_decay=0.01, **options)
        for step in gradients:
            for p, gradient in zip(params, step):
                p.grad = gradient.clone()
            stepping.step()
        return params, stepping.state

    exact, _ = trained(bitsandbytes.optim.AdamW8bit, torch.float32)
    for offload in (False, True):
        ours, state = trained(memory.AdamW8bit, torch.bfloat16, offload=offload)
        masters = [memory.join_fp32(p.data, state[p]["remainder"].to(at.device)) for p in ours]
        equal = all(map(same_bits, masters, exact))
        yield Row(f"masters are the library's, offload {'on' if offload else 'off'}", equal, equal)
    left, right = (torch.randn(256, n, device=at.device).bfloat16() for n in (5000, 128))
    total = torch.ones(5000, 128, device=at.device)
    memory._add_product(total, left, right)
    error = distance(total, 1 + left.double().T @ right.double())
    yield Row("error of the head's gradient", error, error < (0.01 if at.dry else 1e-5))  # bf16 on a CPU


def reference(at: Setting) -> Iterator[Row]:
    """Swapped twice: the policy's weights come back bit for bit, and no GPU memory is taken."""
    model, _, _ = make_model(at)
    copies = lambda: [p.detach().clone() for p in model.parameters()]
    resting, start = memory.ReferencePolicy(model), copies()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    before, taken, theirs, started = copies(), 0, True, time.perf_counter()
    for _ in range(2):
        peak_bytes()
        held = peak_bytes()
        with resting.swapped_in():
            taken = max(taken, peak_bytes() - held)
            theirs &= all(map(same_bits, model.parameters(), start))  # takes some itself
            peak_bytes()
        taken = max(taken, peak_bytes() - held)
    yield Row("there and back, ms", 1000 * (time.perf_counter() - started) / 2)
    yield Row("the reference's weights while swapped in", theirs, theirs)
    equal = all(map(same_bits, model.parameters(), before))
    yield Row("the policy's own after it", equal, equal)
    yield at.on_cuda("GPU memory taken", lambda: (taken, taken == 0))


def under_cap(at: Setting) -> Iterator[Row]:
    """Three rollouts and updates in turn: what the allocator took against the plan and the cap."""
    if not (at.dry or at.child):
        for segments in ("False", "True"):
            yield from in_new_process(at, "under_cap", PYTORCH_ALLOC_CONF=f"expandable_segments:{segments}")
        return
    plan = memory.plan(
        at.config, prompt_tokens=PROMPT, max_new_tokens=NEW, prompts=1 if at.dry else PROMPTS,
        group_size=GROUP, dtype=torch.bfloat16, reference=True, top_entropy=0.2,
        memory_budget_bytes=int(at.cap_gib / memory.ALLOCATOR_SHARE * 2**30),
    )
    model, backbone, head = make_model(at)
    stepping = memory.AdamW8bit(model.parameters(), lr=1e-6)
    stepping.make_state()
    resting, width = memory.ReferencePolicy(model), PROMPT + NEW
    rows = at.rows if at.dry else max(1, plan.limits.micro_batch_tokens // width)
    ids = torch.randint(at.config.vocab_size, (rows, width), device=at.device)
    waiting = not at.dry and plan.limits.max_rows < PROMPTS * GROUP

    def update() -> None:
        with resting.swapped_in():
            update_logprobs(backbone, head, [[1, 2]], [[3, 4, 5]])
        for _ in range(1 if at.dry else 4):  # later ones take as much
            bench_memory.micro_batch(model, backbone, head, ids, plan.limits.recomputed_layers, 0.2)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepping.step()
        stepping.zero_grad(set_to_none=True)

    peaks = {"rollout": 0, "update": 0}
    for _ in range(3):
        peak_bytes()
        bench_memory.rollout(model, plan.limits.max_rows, width + waiting * NEW // 2)
        peaks["rollout"] = max(peaks["rollout"], peak_bytes())
        update()
        peaks["update"] = max(peaks["update"], peak_bytes())
    for name, planned in (("rollout", plan.rollout_peak_bytes), ("update", plan.update_peak_bytes)):
        share = peaks[name] / planned
        yield at.on_cuda(f"{name}: allocated over planned", lambda share=share: (share, share < 1.05))
    stats = {} if at.dry else torch.cuda.memory_stats()
    reserved = stats.get("reserved_bytes.all.peak", 0) / 2**30
    yield at.on_cuda("reserved, GiB", lambda: (reserved, reserved <= at.cap_gib))
    yield at.on_cuda("allocations that had to be retried", lambda: (stats["num_alloc_retries"], None))
    pinned = lambda: torch.cuda.host_memory_stats()["allocated_bytes.current"] / plan.host["reference policy"]
    yield at.on_cuda("host memory over planned", lambda: (pinned(), pinned() < 1.05))


@torch.no_grad()
def decoding(at: Setting) -> Iterator[Row]:
    """A decoding step by part; whole answers against `generate` and against the card's bound."""
    model, _, _ = make_model(at)
    heads, size = at.config.num_key_value_heads, at.config.hidden_size // at.config.num_attention_heads
    for rows, columns in at.decoding:
        cache, shape = bench_memory.WideCache(), (rows, heads, columns, size)
        for buffers in (cache.keys, cache.values):
            buffers += [torch.zeros(shape, dtype=model.dtype, device=at.device) for _ in model.model.layers]
        mask = torch.zeros(rows, 1, 1, columns, dtype=model.dtype, device=at.device)
        token = torch.zeros(rows, 1, dtype=torch.long, device=at.device)
        inputs = {"attention_mask": mask, "position_ids": token + columns - 1, "past_key_values": cache}
        forward = lambda token=token, inputs=inputs: model(token, **inputs, use_cache=True).logits[:, -1]
        logits = forward()
        for part, work in (("model", forward), ("choosing", lambda logits=logits: choose(logits))):
            name = f"{rows} x {columns}, {part}: "
            yield Row(name + "ms", milliseconds(work))

            def on_gpu(work=work):
                _, launches, gpu = kernels(work)
                return f"{gpu:.2f}, {launches}, {synchronisations(work)}", None

            yield at.on_cuda(name + "GPU ms, launches, waits", on_gpu)
    rows, new = at.answers
    prompts = [[7] * PROMPT] * rows
    ids = torch.tensor(prompts, device=at.device)
    ours = milliseconds(lambda: answer(model, prompts, [0], max_new_tokens=new), 1)
    theirs = milliseconds(lambda: model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=new,
        eos_token_id=[0], pad_token_id=0), 1)
    speed = 1000 * rows * new / ours
    yield Row(f"sample, {rows} rows: tokens/s", speed)
    yield Row("sample over generate (asked: 4)", theirs / ours)
    possible = lambda: bound(model, prompts, [new] * rows, copy_bandwidth(), products_per_second())
    yield at.on_cuda("sample over the card's bound (asked: 0.5)", lambda: (speed / possible(), None))


def update(at: Setting) -> Iterator[Row]:
    """Tokens/s of the update, its parts, and its share of the bf16 products that the card can do."""
    model, backbone, head = make_model(at)
    ids = torch.randint(at.config.vocab_size, (at.rows, PROMPT + NEW), device=at.device)
    took, layers = {}, at.config.num_hidden_layers
    for recomputed in (layers, 0):
        work = lambda count=recomputed: bench_memory.micro_batch(model, backbone, head, ids, count, 0.2)
        took[recomputed] = milliseconds(work, 1)
        name = f"{recomputed} of {layers} layers recomputed: tokens/s"
        yield Row(name, 1000 * ids.numel() / took[recomputed])
    hidden = torch.randn(ids.numel() // 5, at.config.hidden_size, device=at.device).bfloat16()
    hidden.requires_grad_()
    targets = torch.randint(at.config.vocab_size, (len(hidden),), device=at.device)
    in_head = lambda: memory.token_logprobs(hidden, head, targets, into_weight_grad=True)[0].sum().backward()
    yield Row("share of the head", milliseconds(in_head) / took[0])
    yield Row("optimizer's step, ms", milliseconds(memory.AdamW8bit(model.parameters(), lr=1e-6).step))
    side = 256 if at.dry else 8192
    square = torch.randn(side, side, device=at.device).bfloat16()
    peak = 2 * side**3 / milliseconds(lambda: square @ square)
    in_layers = sum(p.numel() for p in model.parameters()) - head.numel()
    needed = 6 * (in_layers * ids.numel() + head.numel() * len(hidden))
    yield Row("share of the bf16 peak", needed / took[0] / peak)


def whole_run(at: Setting) -> Iterator[Row]:
    """`improved` for three steps under the cap; the third again, from a checkpoint, in a new process."""
    code, said = run_grpo(at, *new_run(at), "--steps", "3", "--save-every", "2", "--name", "whole")
    yield Row("exit code", code if code == 0 else f"{code}: {said[-500:]}", code == 0)
    yield Row("warnings of memory", said.count("out of memory"), "out of memory" not in said)
    folder = at.folder / "whole"
    metrics = lambda: [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = metrics()
    for name in ("seconds", "sampling_tokens_per_second", "update_tokens_per_second"):
        yield Row(f"median {name}", statistics.median(step[name] for step in steps))
    learned = all(step["skipped"] is None and step["grad_norm"] for step in steps)
    yield Row("every step learns", learned, learned)
    peak = max(step["peak_memory_bytes"] for step in steps) / 2**30
    yield at.on_cuda("most that tensors took, GiB", lambda: (peak, peak <= at.cap_gib))
    code, said = run_grpo(at, "--resume", str(folder / "checkpoint-2"), "--reward", reward_file(at))
    yield Row("resumed: exit code", code if code == 0 else f"{code}: {said[-500:]}", code == 0)
    again, names = metrics()[2], ("reward", "completion_length", "entropy", "loss", "kl")
    apart = [name for name in names if steps[2][name] != again[name]]
    yield Row("resumed: the same step", f"not {', '.join(apart)}" if apart else True, not apart)


def out_of_memory(at: Setting) -> Iterator[Row]:
    """A stage finds no memory when it first runs (on a CPU the error is just raised): in the rollout and the
    backward pass the run goes on with less, in the optimizer's step it ends, with a message and code 2."""
    short = ("--steps", "1", "--max-new-tokens", "6" if at.dry else "64")
    first = ["sample", "backward"]
    code, said = run_grpo(at, *new_run(at), *short, "--name", "a", squeezed=first)
    warned = said.count("out of memory")
    yield Row("rollout and backward: exit code, warnings", f"{code}, {warned}", code == 0 and warned >= 2)

    code, said = run_grpo(at, *new_run(at), *short, "--name", "b", squeezed=["step"])
    told = "out of memory in the optimizer's step" in said and "Traceback" not in said
    unsaved = not list((at.folder / "b").glob("checkpoint-*"))
    yield Row("optimizer's step: exit code, nothing saved", f"{code}, {unsaved}",
              code == 2 and told and unsaved)


def trl(at: Setting) -> Iterator[Row]:
    """A step of the same size by TRL's trainer, where it is installed."""
    name = "seconds a step over ours (asked: 2)"
    if not at.dry and importlib.util.find_spec("trl") is None:
        yield Row(name, skipped="TRL is not installed")
        return

    def ratio():
        command = [sys.executable, str(Path(__file__).with_name("bench_step.py")), "--model", "random-0.5b",
                   "--steps", "3", "--rows", "16", "--new-tokens", "128",
                   "--budget-gib", str(at.cap_gib - 0.5)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=at.seconds_left, check=True)
        found = next(text for text in done.stdout.splitlines() if text.startswith("seconds a step"))
        return float(found.split()[-1]), None

    yield at.on_cuda(name, ratio)


CHECKS = {check.__name__: check for check in (
    machine, attention, sampler, optimizer, reference, under_cap, decoding, update, whole_run, out_of_memory,
    trl,
)}


# ---- Processes of their own --------------------------------------------------------------------------------


def in_new_process(at: Setting, check: str, **environment: str) -> Iterator[Row]:
    """The rows of a check that needs a fresh allocator."""
    out, title = at.folder / "child.json", " ".join(environment.values())
    command = [sys.executable, __file__, "--only", check, "--child", "--out", str(out),
               "--cap-gib", str(at.cap_gib)]
    out.unlink(missing_ok=True)
    subprocess.run(command, env=os.environ | environment, stdout=subprocess.DEVNULL, timeout=at.seconds_left,
                   check=False)
    for row in json.loads(out.read_text()):
        yield Row(**row | {"name": f"{title}: {row['name']}"})


def reward_file(at: Setting) -> str:
    path = at.folder / "bench_reward.py"
    path.write_text("def length(completion, example):\n    return len(completion) % 7 / 6\n")
    return f"{path}:length"


def new_run(at: Setting) -> list[str]:
    """Flags of a run on random weights: rewards with spread, and answers count though they never end."""
    folder = at.folder / "model"
    if not folder.exists():
        make_model(at)[0].save_pretrained(folder)
        data.tiny_tokenizer().save_pretrained(folder)
    size = ["--memory-budget-gib", str(at.cap_gib / memory.ALLOCATOR_SHARE), "--max-new-tokens", "512"]
    if at.dry:
        size = ["--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "6"]
    return ["--recipe", "improved", "--model", str(folder), "--task", "mini-countdown", "--device", at.device,
            "--dtype", "bfloat16", "--reward", reward_file(at), "--skip-truncated", "false",
            "--eval-examples", "2", "--eval-every", "0", "--output-dir", str(at.folder), *size]


def run_grpo(at: Setting, *flags: str, squeezed: list[str] = ()) -> tuple[int, str]:
    """A run of grpo_scratch.py in a new process, under the cap: (exit code, what it said)."""
    command = [sys.executable, __file__, "--cap-gib", str(at.cap_gib), "--squeeze", *squeezed,
               "--run", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=at.seconds_left, check=False)
    return done.returncode, done.stdout + done.stderr


def squeeze(owner, name: str, on_gpu: bool) -> None:
    """Have the first call of owner.name find the GPU's memory taken."""
    function, calls = getattr(owner, name), []

    def without_memory_at_first(*arguments, **options):
        ballast, size = [], 0 if calls else 2**34
        calls.append(name)
        if size and not on_gpu:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        while size >= 2**20:
            try:
                ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        return function(*arguments, **options)

    setattr(owner, name, without_memory_at_first)


# ---- The table ---------------------------------------------------------------------------------------------


def perform(name: str, at: Setting) -> Iterator[Row]:
    """The rows of a check; an exception is a row that doesn't hold."""
    started = time.monotonic()
    try:
        yield from CHECKS[name](at) if at.seconds_left > 0 else [Row("all of it", skipped="the time is up")]
    except Exception as error:  # noqa: BLE001 (the other checks are still worth their time)
        yield Row("ran", f"{type(error).__name__}: {error}"[:300], False)
    yield Row("seconds", time.monotonic() - started)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line(row: Row) -> str:
    value = f"{row.value:.4g}" if isinstance(row.value, float) else str(row.value)
    verdict = {None: "", True: "holds", False: "DOES NOT HOLD"}[row.holds]
    shown = f"skipped: {row.skipped}" if row.skipped else f"{value:<12} {verdict}"
    return f"{row.check:<13} {row.name:<48} {shown}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dry-run", action="store_true", help="a small model on a CPU")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="these checks")
    parser.add_argument("--minutes", type=float, default=8, help="no check starts after that")
    parser.add_argument("--cap-gib", type=float, default=11.5, help="the most that a process may take")
    parser.add_argument("--out", default="runs/bench_gpu.json", help="file for the rows as json")
    for hidden, kind in (("--child", {"action": "store_true"}), ("--squeeze", {"nargs": "*", "default": []}),
                         ("--run", {"nargs": argparse.REMAINDER})):
        parser.add_argument(hidden, help=argparse.SUPPRESS, **kind)
    asked = parser.parse_args(arguments)
    if torch.cuda.is_available() and not asked.dry_run:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, asked.cap_gib * 2**30 / total))
    if asked.run:  # a run of grpo_scratch.py
        for name in asked.squeeze:
            owner = {"sample": grpo, "backward": torch.Tensor, "step": memory.AdamW8bit}[name]
            squeeze(owner, name, on_gpu="cuda" in asked.run)
        sys.argv = ["grpo_scratch.py", *asked.run]
        return grpo.main()
    if not (asked.dry_run or torch.cuda.is_available()):
        parser.error("torch sees no CUDA device; --dry-run tries the same code on a CPU")
    rows, out = [], Path(asked.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        until = time.monotonic() + 60 * asked.minutes
        at = Setting(asked.dry_run, asked.child, Path(folder), until, asked.cap_gib)
        for name in asked.only:
            for row in perform(name, at):
                row.check = name
                rows.append(row)
                print(line(row), flush=True)
            out.write_text(json.dumps([asdict(row) for row in rows], indent=1, default=str) + "\n")
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
