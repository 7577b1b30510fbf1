"""`sample` against transformers' `model.generate` or vLLM, and refilled rows against waves. Run by hand.

    python tests/bench_sampler.py                   all parts
    python tests/bench_sampler.py --parts tiny      the embedded policy only (others: choose, qwen, waves)
    python tests/bench_sampler.py --parts qwen --model FOLDER --dtype float32      a real model
    .venv-vllm/bin/python tests/bench_sampler.py --parts qwen --model FOLDER --sampler vllm

All sides get the same prompts and as many answers to each, at temperature 1, in turns. choose: choose_tokens
against log_softmax of the same float32 logits. tiny: a share of the vocabulary ends an answer. qwen
(Qwen2.5-0.5B's shape with random weights, or the model in FOLDER): 64 answers of given lengths, all
--new-tokens long, then long-tailed with that mean: exponential, to four times it; and which parts `sample`
spends its time in. waves: `sample` with max_rows against calling it for max_rows answers at a time. Times are
medians, gains medians of the pairs' ratios. `generate` records no log-probabilities, vLLM no entropies;
vLLM's time has its new weights in it, as a run's has. With CUDA there is one more column: the tokens/s that
memory bandwidth and arithmetic allow.
"""

import argparse
import math
import platform
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import grpo_scratch  # noqa: F401  isort: skip (before torch: it sets how OpenMP's threads wait)

import torch
import transformers

import data
import memory
from memory import sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> str:
    """The processor's or GPU's name and torch's threads."""
    if DEVICE == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def tiny_model():
    embedded = data.load_config("embedded")
    return data.load_policy("embedded", *embedded, dtype=torch.float32, device=DEVICE).model


def large_model(folder: Path | None, dtype: torch.dtype):
    """The folder's model, or one of Qwen2.5-0.5B's shape with random weights."""
    if folder:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()
    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def some_prompts(model, count: int, lengths: tuple[int, int]) -> list[list[int]]:
    rng = random.Random(0)
    vocabulary = model.config.vocab_size
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(*lengths))] for _ in range(count)]


def some_stops(model, share: float) -> list[int]:
    """This share of the vocabulary, so that about so many tokens end an answer; on CUDA a handful, because
    `isin` makes the host wait for a long list."""
    vocabulary = model.config.vocab_size
    count = 8 if DEVICE == "cuda" else round(share * vocabulary)
    return sorted(random.Random(1).sample(range(1, vocabulary), count))


def with_sample(model, prompts, group_size, limit, stops, lengths=None) -> list[int]:
    uniform = None
    if lengths:  # a random number of zero is the first token, which is one of the stops
        uniform = torch.rand(len(lengths), limit, dtype=torch.float64)
        uniform[range(len(lengths)), [n - 1 for n in lengths]] = 0
    answers = sample(
        model, prompts, group_size=group_size, max_new_tokens=limit, eos_token_id=stops, pad_token_id=0,
        uniform=uniform
    )
    return [len(answer.ids) for answer in answers]


def with_generate(model, prompts, group_size, limit, stops, lengths=None) -> list[int]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    ends = torch.tensor(lengths or [limit] * len(prompts) * group_size, device=DEVICE)
    out = model.generate(
        ids, attention_mask=mask, num_return_sequences=group_size, max_new_tokens=limit, do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, eos_token_id=stops, pad_token_id=0,
        stopping_criteria=[lambda ids, scores, **_: ids.shape[1] - longest >= ends],
    )[:, longest:]
    ended = torch.isin(out, torch.tensor(stops, device=DEVICE))
    first = torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1])
    return torch.minimum(first, ends).tolist()


def new_vllm(model, rows: int, longest: int):
    """What `with_sample` is, by an engine that was made for this model."""
    engine = memory.VLLMSampler(model, stops=[], max_model_len=longest, kv_cache_bytes=2**30, max_rows=rows)
    new_parameters = engine.new_parameters

    def with_vllm(model, prompts, group_size, limit, stops, lengths) -> list[int]:
        ends = iter(lengths)
        engine.new_parameters = lambda **given: new_parameters(**{**given, "max_tokens": next(ends)})
        uniform = torch.rand(len(lengths), 1, dtype=torch.float64)
        answers = engine(prompts, group_size=group_size, max_new_tokens=limit, uniform=uniform)
        return [len(answer.ids) for answer in answers]

    return with_vllm


def print_parts(model, *settings) -> None:
    """The share of `sample`'s seconds that each of its parts takes."""
    spent = {}

    def clocked(name, function):
        def call(*arguments, **options):
            started = time.perf_counter()
            result = function(*arguments, **options)
            spent[name] = spent.get(name, 0) + time.perf_counter() - started
            return result
        return call

    choose, forward = memory.choose_tokens, model.forward
    memory.choose_tokens = clocked("choose_tokens", choose)
    model.forward = clocked("the model", forward)
    whole, _ = timed(with_sample, model, *settings)
    memory.choose_tokens, model.forward = choose, forward
    print("       " + ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in spent.items()))


def in_waves(model, prompts, rows, limit, stops) -> list[int]:
    waves = (prompts[i : i + rows] for i in range(0, len(prompts), rows))
    return [n for wave in waves for n in with_sample(model, wave, 1, limit, stops)]


def refilled(model, prompts, rows, limit, stops) -> list[int]:
    answers = sample(model, prompts, max_new_tokens=limit, eos_token_id=stops, pad_token_id=0, max_rows=rows)
    return [len(answer.ids) for answer in answers]


def timed(function, *arguments) -> tuple[float, list[int]]:
    """(seconds, lengths of the answers)."""
    started = time.perf_counter()
    lengths = function(*arguments)  # ends with a copy to the host, so the GPU has finished
    return time.perf_counter() - started, lengths


def copy_bandwidth() -> float:
    """Bytes/s that the GPU reads and writes while it copies 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    return 10 * 2 * 2**30 / (time.perf_counter() - started)


def products_per_second() -> float:
    """Multiplications and additions a second in a large bfloat16 matrix product."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    a @ a
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - started)


def bound(model, prompts, lengths: list[int], bandwidth: float, products: float) -> float:
    """Tokens/s if a step took just the reading of all weights and of each live row's keys and values, or the
    arithmetic with them, whichever takes longer."""
    config, size = model.config, model.dtype.itemsize
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * size
    weights = max(lengths) * sum(p.numel() for p in model.parameters()) * size
    group = len(lengths) // len(prompts)
    cached = sum(n * len(prompts[i // group]) + n * (n + 1) // 2 for i, n in enumerate(lengths))
    arithmetic = 2 * sum(p.numel() for p in model.parameters()) * sum(lengths)
    return sum(lengths) / max((weights + per_token * cached) / bandwidth, arithmetic / products)


def compare(name: str, pairs: int, base, ours, model, prompts, *settings) -> None:
    """Print a row for each of two functions: medians over `pairs` runs in turns, after one of each."""
    runs = [(timed(base, model, prompts, *settings), timed(ours, model, prompts, *settings))
            for _ in range(pairs + 1)][1:]
    gains = [slow / fast for (slow, _), (fast, _) in runs]
    gain = f"{statistics.median(gains):.2f} ({min(gains):.2f}-{max(gains):.2f})"
    for side, (function, shown) in enumerate(((base, ""), (ours, gain))):
        seconds = statistics.median(run[side][0] for run in runs)
        speed = statistics.median(sum(run[side][1]) / run[side][0] for run in runs)
        lengths = sorted(n for run in runs for n in run[side][1])
        tenths = "/".join(str(lengths[int(q * (len(lengths) - 1))]) for q in (0.1, 0.5, 0.9, 1))
        by = function.__name__.removeprefix("with_").replace("_", " ")
        row = f"{name:<6} {by:<9} {seconds:>8.3f} {speed:>9.0f} {shown:>17} {statistics.mean(lengths):>7.1f}"
        if DEVICE == "cuda":
            most = bound(model, prompts, runs[0][side][1], copy_bandwidth(), products_per_second())
            tenths += f" {most:>9.0f}"
        print(f"{row} {tenths:>15}", flush=True)


def choose(vocab: int, pairs: int) -> None:
    """Print what part of log_softmax's time choose_tokens takes, for 256 rows of logits."""
    logits, uniform, seconds = 3 * torch.randn(256, vocab), torch.rand(256, dtype=torch.float64), []
    for _ in range(pairs + 1):
        for work in (lambda: logits.log_softmax(-1),
                     lambda: memory.choose_tokens(logits, 1.0, uniform)):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    shares = [ours / softmax for softmax, ours in zip(seconds[2::2], seconds[3::2])]
    print(f"choose  V = {vocab}: log_softmax {statistics.median(seconds[2::2]) * 1e3:.2f} ms, its part "
          f"{statistics.median(shares):.2f} ({min(shares):.2f}-{max(shares):.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ["choose", "tiny", "qwen", "waves"]
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--pairs", type=int, default=7, help="paired runs; qwen has three at most")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of qwen")
    parser.add_argument("--model", type=Path, help="folder of the model to take for qwen")
    parser.add_argument("--sampler", choices=("generate", "vllm"), default="generate",
                        help="other side of qwen")
    parser.add_argument("--new-tokens", type=int, default=16, help="mean length of qwen's answers")
    asked = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    print(f"{'part':<6} {'by':<9} {'seconds':>8} {'tokens/s':>9} {'gain (range)':>17} {'length':>7} "
          f"{'10/50/90/100%':>15}" + (f" {'bound/s':>9}" if DEVICE == "cuda" else ""))
    for part in asked.parts:
        if part == "choose":
            for vocab in (64, 151_936):
                choose(vocab, 3 * asked.pairs)
            continue
        large = part == "qwen"
        model = large_model(asked.model, getattr(torch, asked.dtype)) if large else tiny_model()
        if part == "tiny":
            prompts, stops = some_prompts(model, 32, (12, 20)), some_stops(model, 0.08)
            compare(part, asked.pairs, with_generate, with_sample, model, prompts, 8, 40, stops)
        elif part == "qwen":
            prompts, stops = some_prompts(model, 8, (40, 60)), list(range(8))
            mean, most = asked.new_tokens, 4 * asked.new_tokens
            tailed = [min(most, math.ceil(-mean * math.log1p(-(i + 0.5) / 64))) for i in range(64)]
            random.Random(2).shuffle(tailed)
            other = new_vllm(model, 64, 60 + most) if asked.sampler == "vllm" else with_generate
            for name, lengths in (("equal", [mean] * 64), ("tailed", tailed)):
                settings = model, prompts, 8, max(lengths), stops, lengths
                compare(name, min(asked.pairs, 3), other, with_sample, *settings)
                if DEVICE == "cpu":  # a GPU's work is not done when a call returns
                    print_parts(*settings)
        else:
            prompts, stops = some_prompts(model, 256, (12, 20)), some_stops(model, 0.02)
            compare(part, asked.pairs, in_waves, refilled, model, prompts, 32, 400, stops)


if __name__ == "__main__":
    main()
