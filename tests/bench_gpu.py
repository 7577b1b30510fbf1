"""What only a GPU can answer: kernels, exactness, speed, and memory under a cap that stands in for 12 GB.

    python tests/bench_gpu.py                            # at most 8 minutes on an H100-class card
    python tests/bench_gpu.py --cap-gib 10.5             # on a card of 12 GB, of which others take some
    python tests/bench_gpu.py --only decoding whole_run  # some of the checks
    python tests/bench_gpu.py --dry-run                  # a small model on a CPU: its figures mean nothing

It prints a table, writes it as json, and exits with 1 if anything that must hold does not. Weights are
random, in Qwen2.5-0.5B's shape. A check that fails is a row, and the next check goes on. Runs of
grpo_scratch.py have processes of their own. Left out: several GPUs, and what is learned.
"""

import argparse
import importlib.util
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import grpo_scratch as grpo  # isort: skip (before torch: it sets how OpenMP's threads wait)

import bitsandbytes
import torch
import transformers
from bench_memory import PROMPT, qwen
from bench_sampler import bound, copy_bandwidth, products_per_second
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2ForCausalLM

import data
import memory

answer = partial(memory.sample, eos_token_id=[0], pad_token_id=0)
wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


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
    """What the checks run on: a card and Qwen2.5-0.5B's shape, or a CPU and a small shape."""

    dry: bool
    folder: Path  # for files; it is removed at the end
    cap_gib: float

    def __post_init__(self):
        self.device, self.config, self.rows, self.new = "cuda", qwen("0.5b"), (256, 64, 8), 64
        if self.dry:
            self.device, self.rows, self.new = "cpu", (4,), 6
            self.config = data.tiny_config(data.tiny_tokenizer())

    def on_cuda(self, name: str, measure: Callable) -> Row:
        """The row with measure()'s (value, holds), which only CUDA has."""
        return Row(name, skipped="needs CUDA") if self.dry else Row(name, *measure())


def make_model(at: Setting, dtype: torch.dtype = torch.bfloat16):
    """A model with random weights, ready to sample and to train."""
    torch.manual_seed(0)
    with torch.device(at.device):
        model = Qwen2ForCausalLM._from_config(at.config, dtype=dtype).eval()
    memory.sum_gradients_in_fp32(model.parameters())
    memory.prepare_model(model)
    return model


# ---- Measuring ---------------------------------------------------------------------------------------------


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
    names = {e.key[:60] for e in seen.key_averages() if re.search("aten::_scaled_dot|fmha|flash", e.key)}
    return sorted(names), len(on_gpu), sum(e.time_range.elapsed_us() for e in on_gpu) / 1000


def waits(work: Callable) -> int:
    """How often the host waits for the GPU in work(), as far as torch knows."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def peak_bytes() -> int:
    """The most that tensors took on the GPU since the last call; 0 without one."""
    peak = torch.cuda.max_memory_allocated()
    if peak:
        torch.cuda.reset_peak_memory_stats()
    return peak


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.detach().view(torch.uint8), b.detach().view(torch.uint8))


def distance(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.detach().float() - exact.detach()).norm() / exact.detach().norm()).item()


# ---- The checks: each yields rows --------------------------------------------------------------------------


def machine(at: Setting) -> Iterator[Row]:
    """The libraries and the card."""
    libraries = (torch, transformers, bitsandbytes)
    yield Row(", ".join(x.__name__ for x in libraries), ", ".join(x.__version__ for x in libraries))
    card = None if at.dry else torch.cuda.get_device_properties(0)
    told = lambda: f"{card.name}, {card.total_memory / 2**30:.1f} GiB, {card.major}.{card.minor}"
    yield at.on_cuda("card, capability", lambda: (told(), card.major >= 8))  # for bfloat16
    off = not torch.backends.cuda.cudnn_sdp_enabled()
    yield at.on_cuda("cuDNN attention is off", lambda: (off, off))


def attention(at: Setting) -> Iterator[Row]:
    """While decoding and for packed tokens: what SDPA picks, against plain attention in float32."""
    rows, length, keys, shared, size = 4, 330, 2, 7, 64
    plain = torch.nn.functional.scaled_dot_product_attention
    module = SimpleNamespace(num_key_value_groups=shared, is_causal=True, training=False)
    seen = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=at.device)
    seen[0, ..., :128] = False  # a row whose first columns are another's
    causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=at.device).tril()
    # The sampler's mask is a slice of a wider one, whose rows are whole eights apart.
    mask = torch.zeros(rows, 1, 1, length // 8 * 8 + 16, dtype=torch.bfloat16, device=at.device)[..., :length]
    mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)
    places = torch.arange(rows * length, device=at.device)

    def decoding(q, k, v):
        return memory.packed_attention(module, q, k, v, mask)[0]

    def packed(q, k, v):
        q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))
        out, _ = memory.packed_attention(module, q, k, v, places.view(1, 1, rows, length), slots=places)
        return out.view(rows, length, -1, size)

    def picked(work):
        names = ", ".join(kernels(work)[0])
        return names, "math" not in names

    for attend, queries, visible in ((decoding, 1, seen), (packed, length, causal)):
        exact = [torch.randn(rows, h, n, size, device=at.device).bfloat16().float().requires_grad_()
                 for h, n in ((keys * shared, queries), (keys, length), (keys, length))]
        inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
        got, expected = attend(*inputs), plain(*exact, visible, enable_gqa=True).transpose(1, 2)
        error = distance(got, expected)
        yield Row(f"{attend.__name__}: error", error, error < 0.02)
        work = lambda attend=attend, inputs=inputs: attend(*(x.detach() for x in inputs))
        if attend is packed:  # the one that needs gradients
            pairs = zip(torch.autograd.grad(got.float().square().sum(), inputs),
                        torch.autograd.grad(expected.square().sum(), exact))
            error = max(distance(*pair) for pair in pairs)
            yield Row("packed: error of the gradients", error, error < 0.03)
            work = lambda inputs=inputs: packed(*inputs).sum().backward()
        yield at.on_cuda(f"{attend.__name__}: kernels", partial(picked, work))


@torch.no_grad()
def sampler(at: Setting) -> Iterator[Row]:
    """Log-probabilities of sampled answers, and the update's, against the model's plain, eager pass."""
    rng = random.Random(0)
    prompts = [[rng.randrange(at.config.vocab_size) for _ in range(n)] for n in (5, 40, 17, 150, 3, 64)]
    uniform = torch.rand(2 * len(prompts), at.new, dtype=torch.float64)
    for row in uniform:
        row[rng.randrange(at.new)] = 0  # the first token, 0, ends answers at different times
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        model, kind = make_model(at, dtype), str(dtype).removeprefix("torch.")
        drawn = answer(model, prompts, max_new_tokens=at.new, group_size=2, uniform=uniform, max_rows=3)
        sequences = [grpo.TrainSequence(prompts[i // 2], c.ids) for i, c in enumerate(drawn)]
        found = {"update": memory.sequence_logprobs(model, sequences, 1.0)[0],
                 "sampler": torch.tensor([x for c in drawn for x in c.logprobs], device=at.device)}
        model.set_attn_implementation("eager")
        plain = []
        for s in sequences:
            logits = model(torch.tensor([s.prompt + s.completion], device=at.device)).logits[0].float()
            plain.append(logits.log_softmax(-1)[range(len(s.prompt) - 1, len(s)), s.completion])
        for name, logprobs in found.items():
            gap = (logprobs - torch.cat(plain)).abs().mean().item()
            yield Row(f"{kind}, {name}: mean gap of log-probabilities", gap, gap < tolerance)


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
    """Swapped in and out: the policy's weights come back bit for bit, and no GPU memory is taken."""
    model = make_model(at)
    copies = lambda: [p.detach().clone() for p in model.parameters()]
    resting, start = memory.ReferencePolicy(model, lambda _: []), copies()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    before = copies()
    swap = lambda: resting(None)
    yield Row("there and back, ms", milliseconds(swap, 1))
    peak_bytes()
    held = peak_bytes()
    swap()
    taken = peak_bytes() - held
    yield at.on_cuda("GPU memory taken", lambda: (taken, taken == 0))
    with resting.swapped_in():
        theirs = all(map(same_bits, model.parameters(), start))
    yield Row("the reference's weights while swapped in", theirs, theirs)
    equal = all(map(same_bits, model.parameters(), before))
    yield Row("the policy's own after it", equal, equal)


@torch.no_grad()
def decoding(at: Setting) -> Iterator[Row]:
    """A decoding step by part; answers against the card's bound."""
    model = make_model(at)
    heads, size = at.config.num_key_value_heads, at.config.hidden_size // at.config.num_attention_heads
    columns = 650
    for rows in at.rows:
        cache = memory.RowCache(rows, columns, columns - 1, model.dtype, at.device)
        shape = (rows, heads, columns, size)
        cache.buffers = [torch.zeros(shape, dtype=model.dtype, device=at.device)
                         for _ in range(2 * at.config.num_hidden_layers)]
        cache.live = rows
        mask = torch.zeros(rows, 1, 1, columns, dtype=model.dtype, device=at.device)
        token = torch.zeros(rows, 1, dtype=torch.long, device=at.device)
        inputs = {"attention_mask": mask, "position_ids": token + columns - 1,
                  memory.cache_name(model): cache}
        forward = lambda token=token, inputs=inputs: model(token, **inputs, use_cache=True).logits[:, -1]
        uniform = torch.rand(rows, dtype=torch.float64, device=at.device)
        choose = partial(memory.choose_tokens, forward(), 1.0, uniform)
        for part, work in (("model", forward), ("choosing", choose)):
            name = f"{rows} x {columns}, {part}: "
            yield Row(name + "ms", milliseconds(work))

            def on_gpu(work=work):
                _, launches, gpu = kernels(work)
                return f"{gpu:.2f}, {launches}, {waits(work)}", None

            yield at.on_cuda(name + "GPU ms, launches, waits", on_gpu)
    rows, prompts = at.rows[0], [[7] * PROMPT] * at.rows[0]
    sampled = lambda new=at.new: answer(model, prompts, max_new_tokens=new)
    more = lambda: (waits(lambda: sampled(2 * at.new)) - waits(sampled)) / at.new
    yield at.on_cuda("waits of a step of sample", lambda: (share := more(), share <= 1 / 8))
    speed = 1000 * rows * at.new / milliseconds(sampled, 1)
    yield Row(f"sample, {rows} rows: tokens/s", speed)
    possible = lambda: bound(model, prompts, [at.new] * rows, copy_bandwidth(), products_per_second())
    yield at.on_cuda("sample over the card's bound (asked: 0.5)", lambda: (speed / possible(), None))


def update(at: Setting) -> Iterator[Row]:
    """How often a micro-batch makes the host wait; the optimizer's step."""
    model, layers = make_model(at), at.config.num_hidden_layers
    run = SimpleNamespace(policy=SimpleNamespace(model=model), limits=memory.Limits(1, 1, layers, layers))
    sequences = [grpo.TrainSequence([i] * PROMPT, [7] * at.new, weight=1e-3) for i in range(4)]
    work = lambda count: grpo.gradients(run, sequences[:count], temperature=1.0)  # a micro-batch for each
    more = lambda: (waits(partial(work, 4)) - waits(partial(work, 1))) / 3
    yield at.on_cuda("waits of a micro-batch", lambda: (share := more(), share == 0))
    yield Row("four micro-batches, ms", milliseconds(partial(work, 4)))
    yield Row("optimizer's step, ms", milliseconds(memory.AdamW8bit(model.parameters(), lr=1e-6).step))


def whole_run(at: Setting) -> Iterator[Row]:
    """`improved` for three steps under the cap: memory, by phase, against the plan and the cap."""
    code, said = run_grpo(at, *new_run(at), "--steps", "3", "--name", "whole")
    fine = code == 0 and "out of memory" not in said
    yield Row("exit code", code if fine else f"{code}: {said[-500:]}", fine)
    steps = [json.loads(x) for x in (at.folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    for name in ("seconds", "sampling_tokens_per_second", "update_tokens_per_second"):
        yield Row(f"median {name}", statistics.median(step[name] for step in steps))
    learned = all(step["skipped"] is None and step["grad_norm"] for step in steps)
    yield Row("every step learns", learned, learned)
    seen = json.loads((at.folder / "seen.json").read_text())
    for phase in ("rollout", "update"):
        share = seen[phase] / seen["planned"][phase]
        yield at.on_cuda(f"{phase}: allocated over planned", lambda share=share: (share, share < 1.05))
    reserved, told = seen["reserved"] / 2**30, f"{seen['reserved'] / 2**30:.2f}, {seen['retries']}"
    yield at.on_cuda("reserved GiB, retried allocations", lambda: (told, reserved <= at.cap_gib))


def out_of_memory(at: Setting) -> Iterator[Row]:
    """Three stages find no memory when they first run (on a CPU the error is just raised). After the rollout
    and the backward pass the run goes on with less. In the optimizer's step it ends, with exit code 2."""
    code, said = run_grpo(at, *new_run(at), "--steps", "1", "--max-new-tokens", str(at.new),
                          "--name", "short", squeezed=["sample", "backward", "step"])
    warned, told = said.count("out of memory; again with"), "out of memory in the optimizer's step" in said
    yield Row("rollout and backward: warnings", warned, warned >= 2)
    saved = len(list((at.folder / "short").glob("checkpoint-*")))
    yield Row("optimizer's step: exit code, checkpoints", f"{code}, {saved}" if told else said[-500:],
              (code, saved) == (2, 0) and told and "Traceback" not in said)


def trl(at: Setting) -> Iterator[Row]:
    """A step of the same size by TRL's trainer, where it is installed."""
    name = "seconds a step over ours (asked: 2)"
    if at.dry or importlib.util.find_spec("trl") is None:
        yield Row(name, skipped="needs CUDA" if at.dry else "TRL is not installed")
        return
    command = [sys.executable, str(Path(__file__).with_name("bench_step.py")), "--model", "random-0.5b",
               "--steps", "3", "--rows", "16", "--new-tokens", "128", "--budget-gib", str(at.cap_gib - 0.5)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = next(text for text in done.stdout.splitlines() if text.startswith("seconds a step"))
    yield Row(name, float(found.split()[-1]))


CHECKS = {check.__name__: check for check in (
    machine, attention, sampler, optimizer, reference, decoding, update, whole_run, out_of_memory, trl,
)}


# ---- Processes of their own --------------------------------------------------------------------------------


def new_run(at: Setting) -> list[str]:
    """Flags of a run on random weights: rewards with spread, and answers count though they never end."""
    folder, reward = at.folder / "model", at.folder / "bench_reward.py"
    if not folder.exists():
        make_model(at).save_pretrained(folder)
        data.tiny_tokenizer().save_pretrained(folder)
        reward.write_text("def length(completion, example):\n    return len(completion) % 7 / 6\n")
    size = ["--memory-budget-gib", str(at.cap_gib / memory.ALLOCATOR_SHARE), "--max-new-tokens", "512"]
    if at.dry:
        size = ["--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "6"]
    return ["--recipe", "improved", "--model", str(folder), "--task", "mini-countdown", "--device", at.device,
            "--dtype", "bfloat16", "--reward", f"{reward}:length", "--skip-truncated", "false",
            "--eval-examples", "2", "--eval-every", "0", "--output-dir", str(at.folder), *size]


def run_grpo(at: Setting, *flags: str, squeezed: list[str] = ()) -> tuple[int, str]:
    """A run of grpo_scratch.py in a new process, under the cap: (exit code, what it said)."""
    command = [sys.executable, __file__, "--cap-gib", str(at.cap_gib), "--out", str(at.folder / "seen.json"),
               "--squeeze", *squeezed, "--run", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def wrap(owner, name: str, before: Callable = tuple, after: Callable = id) -> None:
    """Have owner.name call before() first, hold what it returns, and call after(result) in the end."""
    function = getattr(owner, name)

    def wrapped(*arguments, **options):
        held = before()  # noqa: F841
        result = function(*arguments, **options)
        after(result)
        return result

    setattr(owner, name, wrapped)


def all_memory_once(on_gpu: bool) -> Callable:
    """A function whose first call takes all of the GPU's memory."""
    sizes = [2**power for power in range(34, 8, -1)]

    def take() -> list[torch.Tensor]:
        ballast = []
        if sizes and not on_gpu:
            sizes.clear()
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        while sizes:
            try:
                ballast.append(torch.empty(sizes[0], dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                sizes.pop(0)
        return ballast

    return take


def watched_run(flags: list[str], squeezed: list[str], out: Path) -> None:
    """grpo_scratch's main. Writes what was planned, what each phase allocated, and what was reserved."""
    seen = {"rollout": 0, "update": 0}
    for name in squeezed:
        owner = {"sample": memory, "backward": torch.Tensor, "step": memory.AdamW8bit}[name]
        wrap(owner, name, before=all_memory_once("cuda" in flags))
    wrap(memory, "plan", after=lambda plan: seen.update(
        planned={"rollout": plan.rollout_peak_bytes, "update": plan.update_peak_bytes}))
    for phase in ("rollout", "update"):
        wrap(grpo, phase, after=lambda _, phase=phase: seen.update({phase: max(seen[phase], peak_bytes())}))
    sys.argv = ["grpo_scratch.py", *flags]
    grpo.main()
    stats = torch.cuda.memory_stats()  # empty on a CPU
    seen |= {"reserved": stats.get("reserved_bytes.all.peak", 0), "retries": stats.get("num_alloc_retries")}
    out.write_text(json.dumps(seen))


# ---- The table ---------------------------------------------------------------------------------------------


def perform(name: str, at: Setting) -> Iterator[Row]:
    """The rows of a check; an exception is a row that doesn't hold."""
    started = time.monotonic()
    try:
        yield from CHECKS[name](at)
    except Exception as error:  # noqa: BLE001 (the other checks are still worth their time)
        yield Row("ran", f"{type(error).__name__}: {error}"[:300], False)
    yield Row("seconds", time.monotonic() - started)
    torch.cuda.empty_cache()  # nothing on a CPU


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
    parser.add_argument("--cap-gib", type=float, default=11.5, help="the most that a process may take")
    parser.add_argument("--out", default="runs/bench_gpu.json", help="file for the rows as json")
    parser.add_argument("--squeeze", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if torch.cuda.is_available() and not asked.dry_run:
        memory.prepare_cuda(torch.bfloat16)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, asked.cap_gib * 2**30 / total))
    if asked.run:
        watched_run(asked.run, asked.squeeze, Path(asked.out))
        return 0
    if not (asked.dry_run or torch.cuda.is_available()):
        parser.error("torch sees no CUDA device; --dry-run tries the same code on a CPU")
    rows, out = [], Path(asked.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        at = Setting(asked.dry_run, Path(folder), asked.cap_gib)
        for name in asked.only:
            for row in perform(name, at):
                row.check = name
                rows.append(row)
                print(line(row), flush=True)
            out.write_text(json.dumps([asdict(row) for row in rows], indent=1, default=str) + "\n")
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
