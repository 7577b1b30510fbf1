"""GRPO from scratch: train every weight of a language model by reinforcement learning, on one GPU or a CPU.

    python grpo_scratch.py            # Qwen2.5-0.5B with CUDA, a tiny embedded policy without
    python grpo_scratch.py --model ./my-qwen --task mine.jsonl --reward my_rewards.py:reward
    python grpo_scratch.py --help

The file reads in the order in which a step runs: sample, score, advantages, loss, update, evaluation; then a
run's files and what a person sees; then `train`, where it all meets, and `main`. Left out on purpose: several
GPUs, adapters (every weight is trained), and any sampling but by temperature, because top-p or top-k would
draw from another distribution than the one the loss differentiates.
"""

import argparse
import dataclasses
import difflib
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin

# Idle threads of torch's OpenMP spin for milliseconds by default; on two cores of which one is busy, that
# makes small operations tens of times slower. It counts from before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import data
import memory
import rewards
from data import InputError

# ---- Settings ----------------------------------------------------------------------------------------------


def flag(default, text: str):
    """A field of Config with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every setting of a run. A recipe changes defaults, a flag beats the recipe."""

    recipe: str = flag("auto", "row of settings to start from; auto: improved with CUDA, tiny without")
    list_recipes: bool = flag(False, "print the recipes as a table and stop")
    steps: int = flag(500, "optimization steps; each samples prompts-per-step x group-size answers")
    seed: int = flag(0, "of embedded weights, data and sampling; a CPU run repeats bit for bit")
    name: str | None = flag(None, "folder of the run below --output-dir; default: recipe and start time")
    output_dir: str = flag("runs", "folder that holds the runs")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto: cuda where there is one")

    model: str = flag("Qwen/Qwen2.5-0.5B-Instruct", "hub id, folder, or embedded (tiny, made in memory)")
    dtype: Literal["auto", "bfloat16", "float32"] = flag("auto", "auto: bfloat16 on CUDA, else float32")
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")
    task: str = flag("countdown", "countdown, gsm8k, mini-countdown, or a jsonl, json, csv or parquet file "
                     "with a `prompt` column (text used as it stands, or a list of chat messages)")
    dataset: str | None = flag(None, "hub id, folder or file to take a built-in task's problems from")
    prompt_format: str | None = flag(
        None, f"for a built-in task: one of {', '.join(data.PROMPTS)}; default: its own"
    )
    train_examples: int = flag(10_000, "at most so many examples to train on")
    reward: list[str] = field(
        default_factory=lambda: ["countdown_equation", "countdown_format:0.1"],
        metadata={"help": "rewards to add up: NAME or NAME:WEIGHT with a name of rewards.py, or "
                  "FILE.py:FUNCTION with your own (completion, example) -> float: code that runs with your "
                  "rights; the first one decides accuracy: a score of 1 or more is solved"},
    )
    reward_model: str | None = flag(None, "hub id or folder of a one-label classifier; adds its score")
    reward_model_weight: float = flag(1.0, "weight of that score")
    cold_start_steps: int = flag(0, "supervised steps before GRPO, for models that never write the tags")
    cold_start_lr: float = flag(1e-5, "learning rate of the cold start, falling to zero over it")
    cold_start_batch: int = flag(64, "demonstrations in a step of the cold start")

    prompts_per_step: int = flag(32, "different prompts in a step")
    group_size: int = flag(8, "answers sampled for each prompt; they are compared with one another")
    max_new_tokens: int = flag(1024, "length limit of an answer, in tokens")
    temperature: float = flag(1.0, "sampling temperature")
    max_rows: int | None = flag(None, "answers sampled at a time; default: as many as fit the memory")

    loss_temperature: float | None = flag(None, "temperature in the loss; default: the sampling's")
    advantage_std: Literal["population", "sample", "none"] = flag(
        "population", "what centred rewards are divided by: their standard deviation (/n, /(n-1)), or nothing"
    )
    advantage_eps: float = flag(1e-6, "added to that standard deviation")
    skip_truncated: bool = flag(False, "leave out answers that hit --max-new-tokens")
    updates_per_batch: int = flag(1, "optimizer steps on each batch; 1 needs no ratio and no clip")
    clip_low: float = flag(0.2, "with several updates: the ratio is clipped below at 1 - this")
    clip_high: float = flag(0.2, "and above at 1 + this")
    beta: float = flag(0.0, "coefficient of the KL divergence from a reference policy; 0 needs none")
    reference_every: int = flag(0, "steps between copies of the policy into the reference; 0: never")
    aggregation: Literal["token", "sequence", "constant"] = flag(
        "token", "average over all tokens (DAPO), within answers (GRPO), by max-new-tokens (Dr. GRPO)"
    )
    top_entropy: float = flag(1.0, "share of the answers' tokens, of highest entropy, that the loss uses")

    learning_rate: float = flag(1e-6, "of AdamW")
    lr_schedule: Literal["constant", "linear"] = flag("constant", "linear falls to zero over the run")
    adam_betas: list[float] = field(
        default_factory=lambda: [0.9, 0.999],
        metadata={"help": "decay of the mean of gradients and of their squares"},
    )
    weight_decay: float = flag(0.0, "decoupled, as in AdamW")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm; 0 never clips")

    memory_budget_gib: float | None = flag(None, "memory to plan for, in GiB; default: what is free")
    offload_optimizer: bool = flag(False, "optimizer state in host memory: less GPU memory, slower")
    micro_batch_tokens: int | None = flag(None, "tokens in a forward pass of the update; default: planned")
    checkpointed_layers: int | None = flag(None, "layers computed again in backward; default: planned")

    eval_every: int = flag(50, "steps between evaluations on held-out examples; 0: only before and after")
    eval_examples: int = flag(128, "held-out examples")
    eval_samples: int = flag(0, "sample so many answers to each held-out example too; report pass@k")
    eval_only: bool = flag(False, "evaluate the model and stop")
    save_every: int = flag(0, "steps between checkpoints; 0: only the final model is saved")
    keep_checkpoints: int = flag(2, "keep this many checkpoints, the newest; 0 keeps all")
    resume: str | None = flag(None, "go on from a checkpoint folder, from the newest one of a run folder, or "
                              "from `latest`, the newest of the newest run; its settings are taken over")
    max_bad_steps: int = flag(5, "stop after so many steps in a row without finite loss and gradient")


# The first field of each group in `--help`, and the group's title.
GROUPS = {
    "recipe": "the run", "model": "policy, data and reward", "prompts_per_step": "sampling",
    "loss_temperature": "the objective", "learning_rate": "the optimizer", "memory_budget_gib": "memory",
    "eval_every": "evaluation and checkpoints",
}

RECIPES: dict[str, dict] = {
    "tiny": {
        "model": "embedded", "task": "mini-countdown", "steps": 200, "max_new_tokens": 24,
        "eval_examples": 120, "learning_rate": 5e-4, "lr_schedule": "linear", "micro_batch_tokens": 2048,
        "cold_start_steps": 400, "cold_start_lr": 3e-3, "cold_start_batch": 32,
    },
    "improved": {
        "temperature": 0.5, "skip_truncated": True, "clip_high": 0.3, "beta": 0.01, "reference_every": 10,
        "top_entropy": 0.2, "learning_rate": 1e-5,
    },
    "nano-aha": {
        "model": "Qwen/Qwen2.5-3B", "prompts_per_step": 16, "group_size": 4, "advantage_eps": 1e-4,
        "beta": 0.001, "reward": ["countdown_equation", "countdown_strict_format"],
    },
    "grpo-zero": {
        "model": "Qwen/Qwen2.5-3B-Instruct", "loss_temperature": 1.0, "advantage_eps": 1e-4,
        "learning_rate": 1e-5,
    },
    "simple-grpo": {
        "model": "Qwen/Qwen2.5-7B", "task": "gsm8k", "prompts_per_step": 4, "max_new_tokens": 700,
        "temperature": 0.9, "loss_temperature": 1.0, "advantage_std": "sample", "advantage_eps": 1e-4,
        "beta": 0.04, "aggregation": "sequence", "max_grad_norm": 0.0,
        "reward": ["gsm8k_last_number", "gsm8k_signed_format"],
    },
    "lm-book": {
        "task": "gsm8k", "prompt_format": "gsm8k-reasoning", "prompts_per_step": 4, "group_size": 16,
        "max_new_tokens": 500, "loss_temperature": 1.0, "advantage_std": "sample", "advantage_eps": 1e-4,
        "updates_per_batch": 3, "clip_low": 0.1, "clip_high": 0.1, "beta": 0.04, "reference_every": 500,
        "aggregation": "sequence", "learning_rate": 5e-6, "max_grad_norm": 0.1,
        "reward": ["gsm8k_answer", "reasoning_tags"],
    },
}


def resolve_recipe(recipe: str) -> str:
    """The recipe's name, with auto decided by the machine. Raises InputError when there is no such recipe."""
    if recipe == "auto":
        return "improved" if torch.cuda.is_available() else "tiny"
    if recipe not in RECIPES:
        raise InputError(f"--recipe {recipe}: no such recipe; use auto or one of {', '.join(RECIPES)}")
    return recipe


def make_config(recipe: str = "auto", **overrides) -> Config:
    """A recipe's settings with `overrides`, checked; InputError if unknown or out of range."""
    recipe = resolve_recipe(recipe)
    names = [f.name for f in dataclasses.fields(Config)]
    if unknown := [name for name in overrides if name not in names]:
        raise InputError(f"{unknown[0]}: no such setting; the settings are {', '.join(names)}")
    config, own = Config(**{**RECIPES[recipe], "recipe": recipe, **overrides}), RECIPES[recipe]
    if config.task != own.get("task") and config.prompt_format == own.get("prompt_format"):
        config.prompt_format = None  # the recipe's suits the recipe's task
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raises InputError for the first value that no run can have."""

    def require(names: str, holds, must: str) -> None:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise InputError(f"--{name.replace('_', '-')} {value}: {must}")

    require("group_size", lambda x: x >= 2, "must be at least 2: answers are compared with one another")
    require("train_examples cold_start_batch prompts_per_step max_new_tokens max_rows updates_per_batch "
            "micro_batch_tokens eval_examples max_bad_steps", lambda x: x >= 1, "must be at least 1")
    require("steps cold_start_steps cold_start_lr advantage_eps clip_high beta reference_every learning_rate "
            "weight_decay max_grad_norm checkpointed_layers eval_every eval_samples save_every "
            "keep_checkpoints", lambda x: 0 <= x < math.inf, "must be at least 0 and finite")
    require("temperature loss_temperature memory_budget_gib", lambda x: 0 < x < math.inf,
            "must be above 0 and finite")
    require("clip_low", lambda x: 0 <= x <= 1, "must be at least 0 and at most 1, as ratios are positive")
    require("top_entropy", lambda x: 0 < x <= 1, "must be above 0 and at most 1, which uses every token")
    require("adam_betas", lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x),
            "give two numbers of at least 0 and below 1")
    for f in dataclasses.fields(config):
        if get_origin(f.type) is Literal:
            choices = get_args(f.type)
            require(f.name, lambda x, choices=choices: x in choices, f"use one of {', '.join(choices)}")
    require("device", lambda x: x != "cuda" or torch.cuda.is_available(),
            "torch sees no CUDA device; use --device cpu, or check the driver")
    formats = [name for name in data.PROMPTS if ("gsm8k" in name) == (config.task == "gsm8k")]
    if config.task in data.PROMPTS:
        require("prompt_format", lambda x: x in formats,
                f"with --task {config.task}, use one of {', '.join(formats)}")
    elif Path(config.task).suffix in data.FILE_TYPES:
        require("prompt_format", lambda x: False, "a file's prompts are used as they stand; drop it")


# ---- What every part uses: messages, the policy ------------------------------------------------------------


def say(message: str = "", file=None) -> None:
    """A line for people, past the bars. A reader that has gone (Ctrl-C ends `| tee` too) ends no run."""
    file = file or sys.stdout
    try:
        tqdm.write(message, file=file)
        file.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def warn(message: str) -> None:
    say(f"warning: {message}", sys.stderr)


@dataclass
class Policy:
    """The model that learns, with what sampling and the loss need of it."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    backbone: torch.nn.Module  # token ids -> hidden states
    head: Tensor  # [V, H]: hidden states -> logits
    stops: list[int]  # token ids that end an answer
    pad_token_id: int


# ---- Sampling: token ids in, token ids out -----------------------------------------------------------------


@dataclass
class Completion:
    """One sampled answer: its n token ids (with the EOS, when one was sampled) and, for each, the sampler's
    log-probability and the entropy of the distribution it was drawn from, both in nats at its temperature."""

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


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index a row of probabilities[rows, V]: where their running sum passes a uniform number.

    torch.multinomial draws V random numbers a row, on a CPU one after another: ten times as long.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)  # float32 would round the rare tokens' shares
    uniform = torch.rand(len(sums), 1, generator=generator, device=sums.device, dtype=torch.float64)
    tokens = torch.searchsorted(sums, uniform * sums[:, -1:], right=True).squeeze(1)
    return tokens.clamp(max=sums.shape[1] - 1)


def choose_tokens(logits: Tensor, temperature: float, generator=None) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row from logits[rows, V]: (tokens, their log-probabilities, entropies); the best at 0."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    # Logits that are not numbers draw any token; its log-probability stays NaN, which tells on the step.
    probabilities = logprobs.exp().nan_to_num_(nan=1.0)
    tokens = draw(probabilities, generator) if temperature else logits.argmax(-1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1), torch.special.entr(probabilities).sum(-1)


# Steps between looks at which rows have finished: each look makes the host wait for the GPU.
CHECK_EVERY = {"cuda": 8}


@torch.no_grad()
def sample(
    model, prompts: list[list[int]], *, group_size: int = 1, max_new_tokens: int, temperature: float = 1.0,
    eos_token_id: int | list[int], pad_token_id: int, generator: torch.Generator | None = None,
    max_rows: int | None = None, progress: tqdm | None = None,
) -> list[Completion]:
    """`group_size` completions of each prompt, prompt after prompt.

    Each prompt is run once and its cache copied to its group. All rows are decoded together; rows that finish
    make room for prompts that wait (at most `max_rows` are live), or, when none waits, leave the batch.
    `temperature` 0 is greedy. Raises InputError for an empty prompt, or a model whose attention can't see the
    whole answer.
    """
    device, total = model.device, len(prompts) * group_size
    if not prompts or not all(prompts):
        raise InputError("sample: each prompt needs at least one token")
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
    check_every = CHECK_EVERY.get(device.type, 1)

    # What was sampled, by episode; finished rows go on writing, into the last column, until they are removed.
    ids = torch.zeros((total, max_new_tokens + 1), dtype=torch.long, device=device)
    logprobs, entropies = (torch.zeros((total, max_new_tokens + 1), device=device) for _ in range(2))
    lengths = torch.zeros(total, dtype=torch.long, device=device)
    finished = torch.zeros(total, dtype=torch.bool, device=device)

    # What is going on, by live row.
    episode, token, position, start = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(4))
    done = torch.ones(rows, dtype=torch.bool, device=device)

    def record(where: Tensor | slice, logits: Tensor) -> None:
        """Choose the next token of the rows `where` and keep it."""
        token[where], logprob, entropy = choose_tokens(logits, temperature, generator)
        who, stopped = episode[where], done[where]
        column = torch.where(stopped, max_new_tokens, lengths[who])
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
                admit(admitted, room)
                admitted += room
                continue
            if not unfinished:
                break
            if admitted == total and unfinished < cache.live:
                close_gaps(unfinished)
            if progress is not None:
                progress.update(admitted - unfinished - progress.n)
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
    """Raises InputError when the model's attention doesn't reach over `tokens` tokens, as `sample` needs."""
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"  # for Mistral's, without layer_types
    types = set(getattr(config, "layer_types", None) or [default])
    if types - {"full_attention", "sliding_attention"} or (
        "sliding_attention" in types and (window or 0) < tokens
    ):
        raise InputError(
            f"the model's layers ({', '.join(sorted(types))}, window {window}) don't see all of {tokens} "
            "tokens; use a model with full attention, or a shorter --max-new-tokens"
        )


# ---- From answers to numbers: rewards, advantages, token weights -------------------------------------------


@dataclass
class Episode:
    """One sampled answer on its way through a step."""

    example: dict
    group: int  # answers to the same prompt share it
    prompt: list[int]  # token ids
    completion: Completion
    text: str
    reward: float
    parts: dict[str, float]  # unweighted scores by reward name
    advantage: float = 0.0


def until_it_fits(attempt, plan: memory.MemoryPlan, spare, start_over=lambda: None):
    """attempt()'s result. When the GPU's memory runs out, spare() makes the attempt smaller and says how, or
    None if it can't; start_over() undoes what was done, and it is made again."""
    while True:
        try:
            return attempt()
        except torch.OutOfMemoryError as error:
            changed = spare()
            if changed is None:
                raise memory.DoesNotFit(
                    "out of memory with the least that the plan can do; try a shorter --max-new-tokens, "
                    "--offload-optimizer or a smaller --model. The plan was:\n" + plan.table()
                ) from error
        # Outside the handler, because the exception holds on to the failed attempt's tensors.
        warn(f"out of memory; again with {changed}")
        start_over()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def rollout(
    policy: Policy, examples: list[dict], scoring: dict, plan: memory.MemoryPlan, *, group_size: int = 1,
    progress=None, **sampling,
) -> list[Episode]:
    """Sample answers to the examples, as many rows at a time as the memory allows, and score them.

    scoring: `weights` for `rewards.score`, and perhaps `reward_model` and its `reward_model_weight`.
    """
    prompts = [example["prompt_ids"] for example in examples]

    def attempt() -> list[Completion]:
        if progress is not None:
            progress.reset(total=len(prompts) * group_size)
        return sample(policy.model, prompts, group_size=group_size, eos_token_id=policy.stops,
                      pad_token_id=policy.pad_token_id, max_rows=plan.max_rows, progress=progress, **sampling)

    def spare() -> str | None:
        if plan.max_rows > 1:
            plan.max_rows //= 2
            return f"{plan.max_rows} rows at a time"

    episodes = []
    for i, completion in enumerate(until_it_fits(attempt, plan, spare)):
        group = i // group_size
        ids = completion.ids[:-1] if completion.finished else completion.ids  # without the EOS
        text = policy.tokenizer.decode(ids, skip_special_tokens=False)
        reward, parts = rewards.score(text, examples[group], scoring["weights"])
        episodes.append(Episode(examples[group], group, prompts[group], completion, text, reward, parts))
    if "reward_model" in scoring:
        answers, at_once = [(e.example["prompt"], e.text) for e in episodes], 16

        def fewer() -> str | None:
            nonlocal at_once
            if at_once > 1:
                at_once //= 2
                return f"{at_once} answers at a time in the reward model"

        scores = until_it_fits(lambda: scoring["reward_model"].scores(answers, at_once), plan, fewer)
        if not all(map(math.isfinite, scores)):
            raise rewards.RewardError("--reward-model: it gave a score that is not a finite number; try "
                                      "--dtype float32, or another model")
        for episode, score in zip(episodes, scores):
            episode.parts["reward_model"] = score
            episode.reward += scoring["reward_model_weight"] * score
    return episodes


def is_solved(episode: Episode) -> bool:
    """The first reward decides: a score of 1 or more."""
    return next(iter(episode.parts.values())) >= 1.0


def group_advantages(
    rewards: Tensor, groups: Tensor, std: Literal["population", "sample", "none"] = "population",
    eps: float = 1e-6,
) -> Tensor:
    """How much better each answer is than the others to its prompt: (r - mean) / (std + eps) in its group.

    rewards[E], groups[E] (equal numbers, same group) -> advantages[E], float32. DeepSeekMath (arXiv
    2402.03300), section 4.1.2; std "none" is Dr. GRPO (arXiv 2503.20783). A group of one has advantage 0.
    """
    index = groups.unique(return_inverse=True)[1]
    rewards = rewards.double()
    count = torch.bincount(index).double()
    total = lambda x: torch.zeros_like(count).index_add_(0, index, x)
    centred = rewards - (total(rewards) / count)[index]
    # A mean is rounded: without this, equal rewards could leave 1e-17, which the division would blow up.
    centred = torch.where(centred.abs() <= 1e-12 * rewards.abs(), 0.0, centred)
    if std != "none":
        squares = total(centred**2)
        deviation = (squares / (count - int(std == "sample")).clamp(min=1)).sqrt()
        centred = centred / (deviation + eps).clamp(min=1e-300)[index]  # 0 / 0 when eps is 0
    return torch.where(centred == 0, 0.0, centred).float()


def token_weights(
    lengths: Tensor, aggregation: Literal["token", "sequence", "constant"] = "token",
    max_new_tokens: int | None = None,
) -> Tensor:
    """The weight of each token of each answer in the loss: lengths[E] in tokens -> weights[E].

    "token" (DAPO, arXiv 2503.14476, eq. 8): 1 / all tokens of the batch. "sequence" (GRPO, arXiv 2402.03300,
    eq. 3): 1 / (its answer's length x E). "constant" (Dr. GRPO, arXiv 2503.20783): 1 / (E x max_new_tokens).
    """
    lengths = lengths.float()
    if aggregation == "token":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    if aggregation == "sequence":
        return 1 / (lengths.clamp(min=1) * len(lengths))
    if aggregation == "constant" and max_new_tokens:
        return torch.full_like(lengths, 1 / (len(lengths) * max_new_tokens))
    raise InputError(f"aggregation {aggregation!r}: use 'token', 'sequence', or 'constant' with "
                     "max_new_tokens")


def high_entropy_mask(entropies: Tensor, fraction: float) -> Tensor:
    """True for the `fraction` of tokens of highest entropy: entropies[n] -> bool[n] (2506.01939, eq. 5).

    The threshold is the (1 - fraction) quantile; tokens that tie with it are kept.
    """
    if fraction >= 1 or not len(entropies):
        return torch.ones_like(entropies, dtype=torch.bool)
    # By rank, as torch.quantile stops at 16 M elements; the rounding keeps 0.8 * 5 from coming out above 4.
    rank = math.ceil(round((1 - fraction) * (len(entropies) - 1), 6))
    return entropies >= entropies.kthvalue(rank + 1).values


# ---- The loss ----------------------------------------------------------------------------------------------


def grpo_loss(
    logprobs: Tensor, advantages: Tensor, weights: Tensor, old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None, clip_low: float = 0.2, clip_high: float = 0.2, beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO loss over tokens, all arguments of any one shape: (0-dim loss, stats).

    Without `old_logprobs` the batch is exactly on-policy: the ratio pi/pi_old is 1 whatever its gradient,
    clipping can't act, and A * logprob has the same gradient as A * ratio. With them it is PPO's clipped
    surrogate (arXiv 1707.06347, eq. 7; two bounds as in DAPO, arXiv 2503.14476). The KL term is the k3
    estimator (GRPO, arXiv 2402.03300, eq. 4). stats: means over the tokens given, `kl` with a reference and
    `clip_fraction` with old log-probabilities.
    """
    stats = {}
    if old_logprobs is None:
        surrogate = advantages * logprobs
    else:
        ratio = (logprobs - old_logprobs).exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)
        stats["clip_fraction"] = (clipped * advantages < ratio * advantages).float().mean()
    if ref_logprobs is not None:
        difference = ref_logprobs - logprobs
        kl = difference.exp() - difference - 1
        surrogate = surrogate - beta * kl
        stats["kl"] = kl.detach().mean()
    return -(weights * surrogate).sum(), stats


# ---- The update --------------------------------------------------------------------------------------------


@dataclass
class Lesson:
    """An episode as the update sees it: m of its n completion tokens count in the loss."""

    prompt: list[int]
    completion: list[int]
    counted: Tensor  # int64[m]: which of the completion's tokens, from 0
    advantage: float
    weight: float
    old_logprobs: Tensor | None = None  # [m]
    ref_logprobs: Tensor | None = None  # [m]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion) - 1  # the last token is predicted, never read


def make_lessons(episodes: list[Episode], config: Config) -> list[Lesson]:
    """What is to be learned from episodes that have their advantages.

    Token weights and the high-entropy mask are taken over the whole batch; then, without a KL term, the
    episodes of groups without spread are dropped: their gradient is zero.
    """
    lengths = torch.tensor([len(e.completion.ids) for e in episodes])
    weights = token_weights(lengths, config.aggregation, config.max_new_tokens).tolist()
    entropies = torch.tensor([entropy for e in episodes for entropy in e.completion.entropies])
    masks = high_entropy_mask(entropies, config.top_entropy).split(lengths.tolist())
    return [
        Lesson(e.prompt, e.completion.ids, mask.nonzero().squeeze(1), e.advantage, weight)
        for e, mask, weight in zip(episodes, masks, weights)
        if (e.advantage != 0 or config.beta > 0) and mask.any()
    ]


def lesson_logprobs(
    policy: Policy, lessons: list[Lesson], temperature: float, checkpointed_layers: int | None = 0
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) of the tokens that count, one lesson after the other.

    A prompt is computed once for all its answers here, and only tokens that count reach the head.
    """
    learning = torch.is_grad_enabled()
    with memory.checkpoint_layers(policy.model, checkpointed_layers if learning else 0):
        hidden, places = memory.packed_hidden_states(
            policy.backbone, [x.prompt for x in lessons], [x.completion[:-1] for x in lessons]
        )
        # The position before a token predicts it.
        where = [row[x.counted + len(x.prompt) - 1] for row, x in zip(places, lessons)]
        targets = [torch.tensor(x.completion)[x.counted] for x in lessons]
        where, targets = (torch.cat(x).to(hidden.device) for x in (where, targets))
        # An embedding, because a prompt's last position comes up for each answer: indexing would add up their
        # gradients in the order in which threads arrive.
        hidden = torch.nn.functional.embedding(where, hidden)
        # The head's gradient goes straight into head.grad: one tensor of its size less.
        return memory.token_logprobs(hidden, policy.head, targets, temperature, into_weight_grad=learning)


def in_micro_batches(
    lessons: list[Lesson], plan: memory.MemoryPlan, work, start_over=lambda: None, progress=None
) -> float:
    """Call work(lessons of a micro-batch) until all are through; returns the share of padding in its rows."""
    lengths, prompts = [len(lesson) for lesson in lessons], [tuple(lesson.prompt) for lesson in lessons]

    def attempt() -> float:
        batches = memory.micro_batches(lengths, plan.micro_batch_tokens, prompts)
        for batch in batches:
            work([lessons[i] for i in batch])
            if progress is not None:
                progress.update(len(batch))
        return 1 - sum(lengths) / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    def spare() -> str | None:
        if plan.micro_batch_tokens > max(lengths):
            plan.micro_batch_tokens = max(plan.micro_batch_tokens // 2, max(lengths))
            return f"micro-batches of {plan.micro_batch_tokens} tokens"
        if plan.checkpointed_layers < plan.layers:
            plan.checkpointed_layers = plan.layers
            return "every layer checkpointed"

    return until_it_fits(attempt, plan, spare, start_over)


def update(
    policy: Policy, reference: memory.ReferencePolicy | None, optimizer, lessons: list[Lesson],
    config: Config, plan: memory.MemoryPlan, progress=None,
) -> dict:
    """`updates_per_batch` optimizer steps on one batch of lessons; returns metrics: means over the updates,
    and with several of them `updates`, one record each.

    Old log-probabilities (several updates only) and the reference's come from the very code that computes the
    current ones, before the first update. A loss or gradient that is not finite changes nothing.
    """
    temperature = config.loss_temperature or config.temperature
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    tokens = sum(len(lesson.counted) for lesson in lessons)
    sums: dict[str, Tensor] = {}

    def store_logprobs(name: str) -> None:
        @torch.no_grad()
        def store(batch: list[Lesson]) -> None:
            logprobs, _ = lesson_logprobs(policy, batch, temperature)
            for lesson, part in zip(batch, logprobs.split([len(lesson.counted) for lesson in batch])):
                setattr(lesson, name, part)

        in_micro_batches(lessons, plan, store)

    def learn(batch: list[Lesson]) -> None:
        logprobs, _ = lesson_logprobs(policy, batch, temperature, plan.checkpointed_layers)
        repeats = torch.tensor([len(lesson.counted) for lesson in batch])
        advantages, weights = (
            torch.tensor([getattr(lesson, name) for lesson in batch]).repeat_interleave(repeats)
            .to(logprobs.device) for name in ("advantage", "weight")
        )
        old = torch.cat([x.old_logprobs for x in batch]) if config.updates_per_batch > 1 else None
        ref = torch.cat([x.ref_logprobs for x in batch]) if reference is not None else None
        loss, stats = grpo_loss(
            logprobs, advantages, weights, old, ref, config.clip_low, config.clip_high, config.beta
        )
        loss.backward()
        share = len(logprobs) / tokens  # the loss is a sum, its statistics are means
        for name, value in {"loss": loss.detach(), **{k: share * v for k, v in stats.items()}}.items():
            sums[name] = sums.get(name, 0) + value

    def clear() -> None:
        optimizer.zero_grad(set_to_none=True)
        sums.clear()

    if config.updates_per_batch > 1:
        store_logprobs("old_logprobs")
    if reference is not None:
        with reference.swapped_in():
            store_logprobs("ref_logprobs")
    records = []
    for _ in range(config.updates_per_batch):
        if progress is not None:
            progress.reset(total=len(lessons))
        padding_share = in_micro_batches(lessons, plan, learn, clear, progress)
        sums["grad_norm"] = clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        record = {name: float(value) for name, value in sums.items()}
        records.append({k: x if math.isfinite(x) else None for k, x in record.items()})  # JSON has no NaN
        if None not in records[-1].values():
            optimizer.step()
        clear()
    metrics = {"padding_share": padding_share, "updates": records if len(records) > 1 else None,
               "bad_updates": sum(None in record.values() for record in records)}
    for name in ("loss", "kl", "clip_fraction", "grad_norm"):
        values = [record[name] for record in records if record.get(name) is not None]
        metrics[name] = sum(values) / len(values) if values else None
    return metrics


def cold_start(policy, optimizer, examples: list[dict], config: Config, plan, rng: random.Random) -> None:
    """Supervised steps on demonstrations: the mean log-probability of their tokens is raised, by `update`.

    It is GRPO's loss with every advantage 1 and the weights of "token".
    """
    settings = dataclasses.replace(
        config, updates_per_batch=1, beta=0.0, loss_temperature=1.0, max_grad_norm=1.0
    )
    encode = lambda text: policy.tokenizer(text, add_special_tokens=False).input_ids
    steps = config.cold_start_steps
    for step in tqdm(range(steps), "cold start", leave=False, disable=not sys.stderr.isatty()):
        batch = [rng.choice(examples) for _ in range(config.cold_start_batch)]
        answers = [encode(data.demonstration(e, rng)) + [policy.tokenizer.eos_token_id] for e in batch]
        weight = 1 / sum(map(len, answers))
        lessons = [
            Lesson(e["prompt_ids"], answer, torch.arange(len(answer)), advantage=1.0, weight=weight)
            for e, answer in zip(batch, answers)
        ]
        set_learning_rate(optimizer, config.cold_start_lr * (1 - step / steps))
        update(policy, None, optimizer, lessons, settings, plan)


def set_learning_rate(optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


# ---- Evaluation --------------------------------------------------------------------------------------------


def evaluate(policy, examples: list[dict], scoring: dict, config: Config, plan) -> dict:
    """Greedy accuracy on held-out examples, pass@k of k = `eval_samples` sampled answers (0: none), and the
    first three greedy answers to show. Draws from random numbers of its own: training never notices."""
    greedy = rollout(
        policy, examples, scoring, plan, max_new_tokens=config.max_new_tokens, temperature=0.0
    )
    result = {"accuracy": sum(map(is_solved, greedy)) / len(greedy), "pass_at_k": None}
    result["shown"] = [(last_request(e.example["prompt"]), e.text, is_solved(e)) for e in greedy[:3]]
    if config.eval_samples:
        drawn = rollout(
            policy, examples, scoring, plan, group_size=config.eval_samples,
            max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            generator=torch.Generator(policy.head.device).manual_seed(config.seed),
        )
        result["pass_at_k"] = len({e.group for e in drawn if is_solved(e)}) / len(examples)
    return result


def last_request(prompt: str | list[dict]) -> str:
    """What the prompt asks: its text, or the last message that is not the assistant's open turn."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] != "assistant"), prompt[0]["content"])


# ---- The run's files ---------------------------------------------------------------------------------------

STATE = Path("trainer_state", "state.pt")  # in a checkpoint's folder
PLANNED = ("max_rows", "micro_batch_tokens", "checkpointed_layers")  # fields of the plan that it keeps
PROGRESS = ("before", "step", "bad_steps", "order", "evaluations")  # fields of the Run that it keeps


def append_lines(path: Path, records: list[dict]) -> None:
    """Add JSON lines in one flushed write; on a full disk the file keeps whole lines, and the run goes on."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, default=str) + "\n" for record in records))
    except OSError as error:
        warn(f"{path} can't be written ({error}); training goes on, these lines are lost")
        with suppress(OSError):
            os.truncate(path, size)


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_folder(policy: Policy, folder: Path, state: dict | None = None) -> None:
    """A complete Hugging Face folder, which `from_pretrained` and vLLM open, with a checkpoint's state in it.

    It appears whole or not at all: written beside, synced, renamed.
    """
    partial = folder.parent / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    try:
        policy.model.save_pretrained(partial)
        policy.tokenizer.save_pretrained(partial)
        if state is not None:
            (partial / STATE).parent.mkdir()
            torch.save(state, partial / STATE)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        if folder.exists():  # `final` of a run that is resumed after its end
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(folder.parent)


def step_of(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if step_of(p).isdigit() and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(step_of(p)))


def save_checkpoint(policy: Policy, state: dict, folder: Path, keep: int) -> None:
    """`checkpoint-<step>`; then all but the newest `keep` are removed.

    A failure (full disk, no permission) only warns: older checkpoints stay.
    """
    final = folder / f"checkpoint-{state['step']}"
    if final.exists():
        return
    try:
        save_folder(policy, final, state)
        shutil.rmtree(folder / ".checkpoint.old", ignore_errors=True)
        for old in checkpoints(folder)[:-keep] if keep else []:
            # Renamed first, so that one half deleted is never taken for a checkpoint.
            shutil.rmtree(old.rename(folder / ".checkpoint.old"))
    except (OSError, RuntimeError, SafetensorError) as error:  # three libraries, one full disk
        warn(f"{final.name} could not be saved ({str(error).splitlines()[0]}); older ones stay")


def load_state(checkpoint: Path) -> dict:
    """A checkpoint's trainer state: numbers, text and tensors, so a stranger's file runs no code."""
    try:
        return torch.load(checkpoint / STATE, weights_only=True, map_location="cpu", mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"--resume: {checkpoint / STATE} can't be read ({reason}); use another checkpoint"
                         ) from error


def find_checkpoint(resume: str, output_dir: str, name: str | None = None) -> Path:
    """The checkpoint that --resume means (`latest`: of the run `name`, or of all); InputError if none."""
    place = Path(resume)
    if resume == "latest":
        every = [c for run in Path(output_dir).glob(name or "*") for c in checkpoints(run)[-1:]]
        found = max(every, key=lambda c: c.stat().st_mtime, default=None)
    elif (place / STATE).is_file():
        found = place
    else:
        found = next(reversed(checkpoints(place)), None)
    if found is None:
        raise InputError(f"--resume {resume}: no whole checkpoint there; give a checkpoint-N folder, the "
                         f"folder of a run that has one, or `latest` for the newest below {output_dir}")
    return Path(os.path.abspath(found))  # of `.` too, the parent is the run's folder


def set_aside_later_checkpoints(folder: Path, step: int) -> None:
    """Rename the checkpoints that come after the one resumed: they belong to the course that was left."""
    for later in checkpoints(folder):
        if int(step_of(later)) > step:
            aside = later.rename(folder / f"left-{later.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            warn(f"{later} comes after the checkpoint resumed; it is {aside.name} now")


def keep_lines_up_to(path: Path, step: int) -> list[dict]:
    """Cut a jsonl file back to what a checkpoint of that step knows; returns the lines kept."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):  # half a line, of a run that was killed here
            records.append(json.loads(line))
    kept = [record for record in records if record["step"] <= step]
    beside = path.with_suffix(".partial")
    beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
    beside.replace(path)
    return kept


def sample_records(step: int, episodes: list[Episode], groups: int = 2) -> list[dict]:
    """What samples.jsonl keeps of a step: the first few prompts with all their completions."""
    return [
        {
            "step": step, "example": {k: v for k, v in e.example.items() if k != "prompt_ids"},
            "completion": e.text, "reward": e.reward, "parts": e.parts, "advantage": e.advantage,
            "finished": e.completion.finished,
        }
        for e in episodes if e.group < groups
    ]


def step_metrics(step: int, episodes: list[Episode], learned: dict, skipped: str | None, rate: float) -> dict:
    """One line of metrics.jsonl, but for the timings. Values that the step did not have are null."""
    def mean(values: list) -> float:
        return sum(values) / len(values)

    groups: dict[int, set] = {}
    for e in episodes:
        groups.setdefault(e.group, set()).add(e.advantage)
    entropies = [entropy for e in episodes for entropy in e.completion.entropies if math.isfinite(entropy)]
    numbers = ("loss", "kl", "clip_fraction", "grad_norm", "padding_share", "bad_updates", "updates")
    return {
        "step": step,
        "reward": mean([e.reward for e in episodes]),
        **{f"reward/{name}": mean([e.parts[name] for e in episodes]) for name in episodes[0].parts},
        "accuracy": mean([is_solved(e) for e in episodes]),
        "completion_length": mean([len(e.completion.ids) for e in episodes]),
        "truncated_fraction": mean([not e.completion.finished for e in episodes]),
        "groups_without_spread": mean([advantages == {0.0} for advantages in groups.values()]),
        "entropy": mean(entropies or [0.0]),
        **{name: learned.get(name) for name in numbers},
        "learning_rate": rate,
        "skipped": skipped,
    }


def draw_curves(metrics: list[dict], evaluations: list[dict], path: Path) -> None:
    """Reward and its parts, accuracy, completion length and entropy by step: raw values under a mean."""
    from matplotlib.figure import Figure  # draws without a display

    parts = [name for name in metrics[0] if name.startswith("reward/")]
    panels = [("reward", ["reward", *parts]), ("accuracy", ["accuracy"]),
              ("completion length (tokens)", ["completion_length"]), ("entropy (nats a token)", ["entropy"])]
    steps = [m["step"] for m in metrics]
    window = max(1, len(steps) // 20)
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, panels):
        for i, name in enumerate(names):
            values = [m[name] for m in metrics]
            recent = [values[max(0, j - window) : j] for j in range(1, len(values) + 1)]
            axis.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=1)
            axis.plot(steps, [sum(part) / len(part) for part in recent], color=f"C{i}", linewidth=2,
                      label=name.removeprefix("reward/"))
        if title == "accuracy":
            axis.plot([e["step"] for e in evaluations], [e["accuracy"] for e in evaluations], "ko-",
                      markersize=5, linewidth=1, label="held-out, greedy")
        axis.set_title(title, fontsize=13)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(fontsize=9)
    figure.savefig(path, dpi=110)


# ---- What a person sees ------------------------------------------------------------------------------------


def say_what_runs(config, device, dtype, policy, examples, heldout, weights) -> None:
    """The header: what was chosen, and how to choose otherwise."""
    parameters = sum(p.numel() for p in policy.model.parameters())
    say(f"recipe {config.recipe} on {device}, {str(dtype).removeprefix('torch.')} "
        "(choose otherwise with --recipe and --device)")
    say(f"model  {config.model}, {parameters / 1e6:.1f} M parameters")
    say(f"task   {config.task}, {len(examples)} examples to train on, {len(heldout)} held out")
    say(f"reward {' + '.join(f'{weight:g} x {name}' for name, weight in weights.items())}")
    if policy.tokenizer.chat_template is None and isinstance(examples[0]["prompt"], list):
        warn(f"{config.model} has no chat template; its prompts are the messages' plain text")


def show_step(bar: tqdm, record: dict, steps: int) -> None:
    """On a terminal the bar's numbers, elsewhere (a log file) a plain line."""
    shown = {"reward": f"{record['reward']:.3f}", "accuracy": f"{record['accuracy']:.3f}",
             "length": f"{record['completion_length']:.1f}"}
    bar.set_postfix(shown)
    if bar.disable:
        say(f"step {record['step']}/{steps} {' '.join(f'{k} {v}' for k, v in shown.items())} "
            f"{record['seconds']:.2f} s" + (f" ({record['skipped']})" if record["skipped"] else ""))
    if record["bad_updates"]:
        warn(f"step {record['step']}: loss, gradient or probabilities are not finite; that update changed "
             "no weight")


def side_by_side(before: list, after: list) -> str:
    """The shown held-out examples with the greedy answers before and after training, in two columns."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 140) // 2 - 2

    def column(when: str, answer: str, solved: bool) -> list[str]:
        wrapped = [part for line in answer.splitlines() for part in textwrap.wrap(line, width) or [""]]
        return [f"{when} ({'solved' if solved else 'not solved'})", *wrapped[:20]]

    lines = []
    for (request, old, old_solved), (_, new, new_solved) in zip(before, after):
        lines += ["", *textwrap.wrap(request, 2 * width)]
        columns = column("before", old, old_solved), column("after", new, new_solved)
        lines += [f"  {a:<{width}}| {b}" for a, b in itertools.zip_longest(*columns, fillvalue="")]
    return "\n".join(lines)


def report(summary: dict, config: Config, folder: Path) -> str:
    """The table of accuracy before and after, and where the files are."""
    rows = {"held-out accuracy (greedy)": (summary["accuracy_before"], summary["accuracy_after"]),
            f"held-out pass@{config.eval_samples}": (summary["pass_at_k_before"], summary["pass_at_k_after"])}
    lines = ["", f"{'':<28}{'before':>8}{'after':>8}"]
    for name, (before, after) in rows.items():
        if None not in (before, after):  # pass@k is asked for, and may be from a resumed run's end on
            lines.append(f"{name:<28}{before:>8.3f}{after:>8.3f}")
    lines += ["", f"{summary['steps']} steps, {summary['seconds']:.0f} s in all. Look at:"]
    return "\n".join(lines + [f"  {folder}/{name}" for name in ("curves.png", "samples.jsonl", "final/")])


def warn_of_trouble(metrics: list[dict], warned: set[str], patience: int = 20) -> None:
    """One plain warning for each kind of run that has stopped learning, with what usually helps."""
    last = metrics[-patience:]
    if len(last) < patience:
        return
    all_truncated = all(m["truncated_fraction"] == 1 for m in last)
    troubles = {
        "rewards have had no spread within any group for 20 steps; nothing is learned. Easier examples, a "
        "larger --group-size or --temperature, or a reward with more steps in it usually help":
            all(m["groups_without_spread"] == 1 for m in last) and not all_truncated,
        "every answer has hit the length limit for 20 steps; a longer --max-new-tokens, or "
        "--cold-start-steps to teach the form of an answer, usually help":
            all_truncated,
        "the entropy is nearly zero: all answers to a prompt are the same. A lower --learning-rate, a --beta "
        "above 0 or a higher --temperature, from the start, usually help":
            all(m["entropy"] < 1e-3 for m in last),
    }
    for message, is_so in troubles.items():
        if is_so and message not in warned:
            warned.add(message)
            warn(message)


# ---- The run -----------------------------------------------------------------------------------------------


def open_policy(name: str, config: Config, device: str, dtype: torch.dtype) -> Policy:
    """Load the policy, find its parts and prepare it for the update; InputError when its logits are not
    simply hidden @ head.T, or its attention can't take packed tokens."""
    model, tokenizer = data.load_policy(
        name, dtype=dtype, device=device, seed=config.seed, trust_remote_code=config.trust_remote_code
    )
    try:
        backbone, head = memory.plain_head(model)
        memory.allow_packing(model)
    except ValueError as error:
        raise InputError(f"--model {name}: {error}") from error
    declared = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    memory.sum_gradients_in_fp32(model.parameters())
    return Policy(model, tokenizer, backbone, head, sorted(stops), pad)


def tokenize(policy: Policy, examples: list[dict], max_new_tokens: int) -> int:
    """Put `prompt_ids` into each example; returns the longest's tokens. InputError if one leaves no room."""
    context = policy.model.config.get_text_config().max_position_embeddings
    for example in examples:
        example["prompt_ids"] = data.encode_prompt(policy.tokenizer, example["prompt"])
        length = len(example["prompt_ids"])
        if length + max_new_tokens > context:
            raise InputError(
                f"a prompt of {length} tokens and {max_new_tokens} new ones exceed the model's context of "
                f"{context}; lower --max-new-tokens or drop the prompt that begins "
                f"{str(example['prompt'])[:80]!r}"
            )
    return max(len(example["prompt_ids"]) for example in examples)


def peak_memory(device: str) -> int:
    """Bytes: the most that tensors took on the GPU, or the process's largest resident size on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def new_optimizer(policy: Policy, lr: float, weight_decay: float, config: Config) -> memory.AdamW8bit:
    return memory.AdamW8bit(
        policy.model.parameters(), lr=lr, betas=tuple(config.adam_betas), eps=1e-8, weight_decay=weight_decay,
        offload=config.offload_optimizer,
    )


@dataclass
class Run:
    """A run under way: its parts, and from `before` on what changes from step to step."""

    config: Config
    device: str
    folder: Path
    policy: Policy
    examples: list[dict]
    heldout: list[dict]
    scoring: dict  # the rewards' weights and the reward model, as `rollout` takes them
    plan: memory.MemoryPlan
    optimizer: memory.AdamW8bit
    reference: memory.ReferencePolicy | None
    generator: torch.Generator  # the sampler draws from it
    shuffle: random.Random  # orders the examples
    before: dict | None = None  # the evaluation before the first step
    step: int = 0
    bad_steps: int = 0  # in a row
    order: list[int] = field(default_factory=list)  # examples still to come in this pass over them
    evaluations: list[dict] = field(default_factory=list)  # step, accuracy, pass@k

    def next_examples(self) -> list[dict]:
        """The examples of the step to come: pass after pass over all of them, each in a new order."""
        while len(self.order) < self.config.prompts_per_step:
            self.order += self.shuffle.sample(range(len(self.examples)), len(self.examples))
        return [self.examples[i] for i in self.order[: self.config.prompts_per_step]]

    def evaluate(self) -> dict:
        result = evaluate(self.policy, self.heldout, self.scoring, self.config, self.plan)
        self.evaluations.append({"step": self.step, **{k: result[k] for k in ("accuracy", "pass_at_k")}})
        return result

    def save(self) -> None:
        # While numbers go wrong, no checkpoint from before that is removed.
        keep = 0 if self.bad_steps else self.config.keep_checkpoints
        save_checkpoint(self.policy, self.state_dict(), self.folder, keep)

    def state_dict(self) -> dict:
        """Numbers, text and tensors only, so that it loads with weights_only=True: it can't run code."""
        return {
            "config": dataclasses.asdict(self.config), "plan": {k: getattr(self.plan, k) for k in PLANNED},
            "optimizer": self.optimizer.state_dict(),
            "reference": self.reference.state_dict() if self.reference else None,
            "sampling_random": self.generator.get_state(), "torch_random": torch.get_rng_state(),
            "shuffle_random": self.shuffle.getstate(), **{name: getattr(self, name) for name in PROGRESS},
        }

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.reference:
            self.reference.load_state_dict(state["reference"])
        self.generator.set_state(state["sampling_random"])
        torch.set_rng_state(state["torch_random"])
        self.shuffle.setstate(state["shuffle_random"])
        for name in PROGRESS:
            setattr(self, name, state[name])


def open_run(config: Config) -> Run:
    """All parts of a run, at its start or where its checkpoint left them; nothing is written yet."""
    check_config(config)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    automatic = "bfloat16" if device == "cuda" else "float32"
    dtype = getattr(torch, automatic if config.dtype == "auto" else config.dtype)
    checkpoint = find_checkpoint(config.resume, config.output_dir, config.name) if config.resume else None
    folder = Path(config.output_dir) / (config.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if checkpoint:
        folder = checkpoint.parent
    elif folder.exists() and not config.eval_only:
        raise InputError(f"{folder} exists already; choose another --name, --resume it, or remove it")
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    if not config.eval_only and not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise InputError(f"--output-dir {config.output_dir}: {nearest} can't be written to; choose another")
    torch.manual_seed(config.seed)
    if device == "cpu":
        memory.keep_freed_memory()

    scoring = {"weights": rewards.parse_rewards(config.reward)}
    examples, heldout = data.load_task(
        config.task, dataset=config.dataset, prompt_format=config.prompt_format, seed=config.seed,
        train_examples=config.train_examples, eval_examples=config.eval_examples,
    )
    policy = open_policy(str(checkpoint or config.model), config, device, dtype)
    if config.reward_model:
        scoring["reward_model_weight"] = config.reward_model_weight
        scoring["reward_model"] = data.RewardModel(
            config.reward_model, dtype=dtype, device=device, trust_remote_code=config.trust_remote_code
        )
    longest = tokenize(policy, examples + heldout, config.max_new_tokens)
    given, state = config.memory_budget_gib, load_state(checkpoint) if checkpoint else None
    choices = asked = {name: getattr(config, name) for name in PLANNED}
    budget = ("memory_budget_gib", "offload_optimizer")
    if state and all(getattr(config, name) == state["config"][name] for name in budget):
        # Those of before, as other sizes would draw and round differently.
        choices = {name: state["plan"][name] if x is None else x for name, x in asked.items()}
    make_plan = partial(
        memory.plan, policy.model.config, prompt_tokens=longest, max_new_tokens=config.max_new_tokens,
        dtype=dtype, prompts=config.prompts_per_step, group_size=config.group_size,
        reference=config.beta > 0, offload_optimizer=config.offload_optimizer,
        memory_budget_bytes=int(given * 2**30) if given else memory.detect_budget_bytes(device),
        top_entropy=config.top_entropy, training=not config.eval_only,
        trust_remote_code=config.trust_remote_code,
    )
    try:
        plan = make_plan(**choices)
    except memory.DoesNotFit:  # there may be less memory than before
        plan = make_plan(**asked)
    say_what_runs(config, device, dtype, policy, examples, heldout, scoring["weights"])
    run = Run(
        config, device, folder, policy, examples, heldout, scoring, plan,
        new_optimizer(policy, config.learning_rate, config.weight_decay, config),
        memory.ReferencePolicy(policy.model) if config.beta > 0 and not config.eval_only else None,
        torch.Generator(device).manual_seed(config.seed), random.Random(config.seed),
    )
    if state:
        try:
            run.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"--resume {checkpoint}: its state doesn't suit this run ({error}); go on with "
                             "the device, dtype and model that it was made with") from error
        if max(run.order, default=0) >= len(examples):
            raise InputError(f"--resume {checkpoint}: the task has only {len(examples)} examples now; bring "
                             "back those that the run was started with")
        say(f"resumed after step {run.step} from {checkpoint}")
    say(plan.table())
    return run


def grpo_step(run: Run, progress: tqdm | None = None) -> tuple[dict, list[Episode]]:
    """One step of GRPO, start to end: its line of metrics.jsonl, and its episodes."""
    config, step, started = run.config, run.step + 1, time.monotonic()

    # Sample and score.
    episodes = rollout(
        run.policy, run.next_examples(), run.scoring, run.plan, group_size=config.group_size,
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, generator=run.generator,
        progress=progress,
    )
    sampled = time.monotonic()

    # Advantages, among the answers that count.
    kept = [e for e in episodes if e.completion.finished or not config.skip_truncated]
    advantages = group_advantages(
        torch.tensor([e.reward for e in kept], dtype=torch.float64),
        torch.tensor([e.group for e in kept], dtype=torch.long),
        config.advantage_std, config.advantage_eps,
    )
    for episode, advantage in zip(kept, advantages.tolist()):
        episode.advantage = advantage
    lessons = make_lessons(kept, config)

    # Update.
    rate = config.learning_rate
    if config.lr_schedule == "linear":
        rate *= 1 - (step - 1) / config.steps
    set_learning_rate(run.optimizer, rate)
    learned, skipped = {}, None
    if not all(math.isfinite(x) for e in episodes for x in e.completion.logprobs):
        learned, skipped = {"bad_updates": 1}, "sampled probabilities are not finite"
    elif lessons:
        learned = update(run.policy, run.reference, run.optimizer, lessons, config, run.plan, progress)
    else:
        skipped = f"nothing to learn: {'no group with spread' if kept else 'every answer truncated'}"
    if run.reference and config.reference_every and step % config.reference_every == 0:
        run.reference.refresh()
    run.step = step
    del run.order[: config.prompts_per_step]
    run.bad_steps = run.bad_steps + 1 if learned.get("bad_updates") else 0

    return step_metrics(step, episodes, learned, skipped, rate) | {
        "sampling_tokens_per_second": sum(len(e.completion.ids) for e in episodes) / (sampled - started),
        "update_tokens_per_second": sum(map(len, lessons)) / (time.monotonic() - sampled),
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": peak_memory(run.device),
    }, episodes


@contextmanager
def stop_requests(run: Run) -> Iterator[list[int]]:
    """Within it the first Ctrl-C or SIGTERM is noted in the list given, the second one stops at once.

    The steps so far are saved before an error in a reward or of memory ends the run.
    """
    asked: list[int] = []

    def note(number: int, frame) -> None:
        if asked:
            os._exit(128 + number)  # what is on disk is whole; no code of ours runs any more
        asked.append(number)
        warn("stopping after this step; a second time stops at once")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    except (rewards.RewardError, memory.DoesNotFit):
        run.save()
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def finish(run: Run, metrics: list[dict], stopped_by: int | str | None, started: float) -> dict:
    """The end of a run: the final model, its evaluation, the picture and the summary, which is returned."""
    after = {"accuracy": None, "pass_at_k": None}
    if stopped_by is None:
        try:  # before the evaluation: what was trained is on disk first
            save_folder(run.policy, run.folder / "final")
        except (OSError, RuntimeError, SafetensorError) as error:
            saved = checkpoints(run.folder)
            advice = f"make room, then --resume {run.folder}" if saved else "nothing could be saved"
            raise InputError(f"{run.folder / 'final'} can't be written ({error}); {advice}") from error
        after = run.evaluate()
    if metrics:
        draw_curves(metrics, run.evaluations, run.folder / "curves.png")
    summary = {
        "recipe": run.config.recipe, "accuracy_before": run.before["accuracy"],
        "accuracy_after": after["accuracy"], "steps": run.step, "seconds": time.monotonic() - started,
        "peak_memory_bytes": peak_memory(run.device), "pass_at_k_before": run.before["pass_at_k"],
        "pass_at_k_after": after["pass_at_k"], "evaluations": run.evaluations, "stopped_by": stopped_by,
    }
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if stopped_by is None:
        say(side_by_side(run.before["shown"], after["shown"]))
        say(report(summary, run.config, run.folder))
    else:
        say(f"stopped after step {run.step} ({stopped_by}); go on with --resume {run.folder}")
    return summary


def train(config: Config) -> dict:
    """One run, start to end; returns its summary, which is also written to summary.json.

    Raises InputError, rewards.RewardError or memory.DoesNotFit, each with a message for the user. A summary
    with `stopped_by` (a signal's number, or "bad steps") is that of a run ended early, with a checkpoint.
    """
    started = time.monotonic()
    transformers.utils.logging.disable_progress_bar()  # the bars are ours
    run = open_run(config)
    if run.before is None:
        if config.cold_start_steps and not config.eval_only:
            say(f"cold start: {config.cold_start_steps} supervised steps")
            cold_start(run.policy, new_optimizer(run.policy, config.cold_start_lr, 0.0, config), run.examples,
                       config, run.plan, random.Random(config.seed))
            if run.reference:
                run.reference.refresh()
        run.before = run.evaluate()
        accuracy, pass_at_k = run.before["accuracy"], run.before["pass_at_k"]
        say(f"held-out accuracy{'' if config.eval_only else ' before GRPO'}: {accuracy:.3f}")
        if config.eval_samples:
            say(f"held-out pass@{config.eval_samples}: {pass_at_k:.3f}")
        if config.eval_only:
            return {"recipe": config.recipe, "accuracy": accuracy, "pass_at_k": pass_at_k}
        run.folder.mkdir(parents=True)  # the first thing on disk: a run that can't start leaves nothing
    set_aside_later_checkpoints(run.folder, run.step)
    metrics = keep_lines_up_to(run.folder / "metrics.jsonl", run.step)
    keep_lines_up_to(run.folder / "samples.jsonl", run.step)
    (run.folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")

    warned: set[str] = set()
    stopped_by: int | str | None = None
    quiet = not sys.stderr.isatty()
    bar = tqdm(range(run.step + 1, config.steps + 1), "GRPO", config.steps, initial=run.step, disable=quiet)
    inner = tqdm(leave=False, disable=quiet, delay=2)
    with stop_requests(run) as signals:
        for step in bar:
            record, episodes = grpo_step(run, inner)
            metrics.append(record)
            append_lines(run.folder / "metrics.jsonl", [record])
            append_lines(run.folder / "samples.jsonl", sample_records(step, episodes))
            show_step(bar, record, config.steps)
            warn_of_trouble(metrics, warned)
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                say(f"step {step}: held-out accuracy {run.evaluate()['accuracy']:.3f}")
            if run.bad_steps >= config.max_bad_steps:
                stopped_by = "bad steps"
            elif signals:
                stopped_by = signals[0]
            asked_for = config.save_every and step % config.save_every == 0 and not run.bad_steps
            if asked_for or stopped_by is not None:
                run.save()
            if stopped_by is not None:
                break
        inner.close()
        bar.close()
        return finish(run, metrics, stopped_by, started)


# ---- The command line --------------------------------------------------------------------------------------

# A resumed run may change these; everything else must be what the checkpoint was made with.
MAY_CHANGE = {
    "name", "output_dir", "trust_remote_code", "steps", "offload_optimizer", "learning_rate", "lr_schedule",
    "eval_every", "eval_samples", "save_every", "keep_checkpoints", "max_bad_steps", "max_rows",
    "micro_batch_tokens", "checkpointed_layers", "memory_budget_gib", "resume",
}


def parse_command_line(arguments: list[str] | None = None) -> Config:
    """The Config that a command line asks for: the recipe, or the checkpoint that is resumed, sets the
    defaults that `--help` shows; flags beat them."""
    def fail(message: str):
        raise InputError(f"{message}; see python grpo_scratch.py --help")

    # A first look, at the flags that decide the defaults.
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.error = fail
    for name, default in (("--recipe", "auto"), ("--resume", None), ("--name", None)):
        peek.add_argument(name, default=default)
    peek.add_argument("--output-dir", "--output_dir", default="runs")
    peek.add_argument("--reward", nargs="+")
    early = peek.parse_known_args(arguments)[0]
    saved = None
    if early.resume:
        checkpoint = find_checkpoint(early.resume, early.output_dir, early.name)
        # Leave to run code is not taken over.
        saved = load_state(checkpoint)["config"] | {"trust_remote_code": False}
        if not early.reward and any(name.split(":")[0].endswith(".py") for name in saved["reward"]):
            raise InputError(f"--resume {early.resume}: its reward is code, {' '.join(saved['reward'])}; if "
                             "you trust it, give it again with --reward")
    recipe = saved["recipe"] if saved else resolve_recipe(early.recipe)
    parser = transformers.HfArgumentParser(
        Config, usage="python grpo_scratch.py [--recipe NAME] [--flag VALUE ...]",
        description=__doc__.splitlines()[0], allow_abbrev=False,
        epilog=f"recipes: {', '.join(RECIPES)}; the defaults above are those of {recipe}",
    )
    parser.set_defaults(**(saved or {**RECIPES[recipe], "recipe": recipe}))
    group = None
    for action in list(parser._actions):  # argparse has no public way to put an existing flag into a group
        if action.dest in GROUPS and (group is None or group.title != GROUPS[action.dest]):
            group = parser.add_argument_group(GROUPS[action.dest])
        if group is not None:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)

    parser.error = fail
    config, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], parser._option_string_actions, n=1)
        fail(f"{unknown[0]}: no such flag" + (f", did you mean {nearest[0]}?" if nearest else ""))
    given = vars(config)
    if saved:
        changed = [n for n, value in given.items() if n not in MAY_CHANGE and value != saved.get(n)]
        if changed:
            told = ", ".join(f"--{n.replace('_', '-')} was {saved.get(n)}, not {given[n]}" for n in changed)
            raise InputError(f"--resume {early.resume}: {told}; drop it, or start a new run. These may "
                             "change: " + ", ".join(sorted(MAY_CHANGE - {"resume"})))
        given["resume"] = str(checkpoint)
    return make_config(**{**given, "recipe": recipe})


def recipe_table() -> str:
    """The recipes side by side: every setting in which they differ, a line each."""
    configs = {name: dataclasses.asdict(make_config(name)) for name in RECIPES}
    names = [f.name for f in dataclasses.fields(Config) if f.name != "recipe"]
    rows = [[name, *(configs[r][name] for r in RECIPES)] for name in names]
    rows = [[" ".join(map(str, x)) if isinstance(x, list) else str(x) for x in row]
            for row in rows if len({str(x) for x in row[1:]}) > 1]
    widths = [max(map(len, column)) for column in zip(["", *RECIPES], *rows)]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip() for row in [["", *RECIPES], *rows]
    )


def main() -> None:
    """Run what the command line asks for. A mistake of the user's ends with one line on stderr and exit code
    2, Ctrl-C with 130, SIGTERM with 143, a run stopped by bad steps with 1."""
    try:
        config = parse_command_line()
        if config.list_recipes:
            say(recipe_table())
            return
        stopped_by = train(config).get("stopped_by")
    except (InputError, rewards.RewardError, memory.DoesNotFit, OSError) as error:
        say(f"error: {error}", sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first step, where there is nothing to save yet
        sys.exit(130)
    if stopped_by is not None:
        sys.exit(128 + stopped_by if isinstance(stopped_by, int) else 1)


if __name__ == "__main__":
    main()
