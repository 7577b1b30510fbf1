"""GRPO from scratch: train every weight of a language model by reinforcement learning, on one consumer GPU or a CPU.

    python grpo_scratch.py                                     # Qwen2.5-0.5B with CUDA, a tiny embedded policy without
    python grpo_scratch.py --model ./my-qwen --task mine.jsonl --reward my_rewards.py:reward
    python grpo_scratch.py --help

The file reads in the order in which a step runs: sample, score, advantages, loss, update; then `train` and `main`.
Left out on purpose: several GPUs, adapters (every weight is trained), and any sampling but by temperature, because
top-p or top-k would draw from another distribution than the one the loss differentiates.
"""

import argparse
import dataclasses
import json
import math
import random
import resource
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import data
import memory
import rewards
from data import InputError

# ---------------------------------------------------------------------------------------------------------------------
# Settings


def flag(default, text: str):
    """A field of Config with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every setting of a run. A recipe changes defaults, a flag beats the recipe."""

    recipe: str = flag("auto", "row of settings to start from; auto is improved with CUDA and tiny without")
    steps: int = flag(500, "optimization steps; each samples prompts-per-step x group-size answers")
    seed: int = flag(0, "seed of weights (embedded model), data and sampling; a CPU run repeats bit for bit")
    name: str | None = flag(None, "folder of the run below --output-dir; default: the recipe and the time of the start")
    output_dir: str = flag("runs", "folder that holds the runs")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto is cuda where there is one")

    model: str = flag("Qwen/Qwen2.5-0.5B-Instruct", "hub id, local folder, or embedded (a tiny policy made in memory)")
    dtype: Literal["auto", "bfloat16", "float32"] = flag("auto", "of the weights; auto is bfloat16 on CUDA, else float32")
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")
    task: str = flag("countdown", "countdown, gsm8k, mini-countdown, or a jsonl, json, csv or parquet file with a `prompt` "
                     "column (text used as it stands, or a list of chat messages)")
    dataset: str | None = flag(None, "hub id, folder or file that replaces the task's own source of problems")
    prompt_format: str | None = flag(None, f"prompt of the built-in tasks, one of {', '.join(data.PROMPTS)}; default: the task's")
    train_examples: int = flag(10_000, "at most so many examples to train on")
    reward: list[str] = flag(["countdown_equation", "countdown_format:0.1"],
                             "rewards to add up, each NAME or NAME:WEIGHT with a name of rewards.py, or FILE.py:FUNCTION "
                             "with your own (completion, example) -> float, code that is run as it is; the first one "
                             "decides accuracy: a score of 1 or more is solved")
    cold_start_steps: int = flag(0, "supervised steps on demonstrations before GRPO, for models that never write the tags")
    cold_start_lr: float = flag(1e-5, "learning rate of the cold start, falling to zero over it")
    cold_start_batch: int = flag(64, "demonstrations in a step of the cold start")

    prompts_per_step: int = flag(32, "different prompts in a step")
    group_size: int = flag(8, "answers sampled for each prompt; they are compared with one another")
    max_new_tokens: int = flag(1024, "length limit of an answer, in tokens")
    temperature: float = flag(1.0, "sampling temperature")
    max_rows: int | None = flag(None, "answers that are sampled at the same time; default: as many as the memory holds")

    loss_temperature: float | None = flag(None, "temperature inside the loss; default: the sampling temperature")
    advantage_std: Literal["population", "sample", "none"] = flag(
        "population", "what a group's centred rewards are divided by: its standard deviation (/n or /(n-1)), or nothing")
    advantage_eps: float = flag(1e-6, "added to that standard deviation")
    skip_truncated: bool = flag(False, "leave out answers that hit --max-new-tokens")
    updates_per_batch: int = flag(1, "optimizer steps on each batch; 1 is exactly on-policy and needs no ratio")
    clip_low: float = flag(0.2, "the ratio is clipped below at 1 - this (only with several updates per batch)")
    clip_high: float = flag(0.2, "and above at 1 + this")
    beta: float = flag(0.0, "coefficient of the KL divergence from the reference policy; 0 needs no reference")
    reference_every: int = flag(0, "steps between copies of the policy into the reference; 0: it stays the start's")
    aggregation: Literal["token", "sequence", "constant"] = flag(
        "token", "average over all tokens (DAPO), per answer then over answers (GRPO), or by max-new-tokens (Dr. GRPO)")
    top_entropy: float = flag(1.0, "share of the answers' tokens, those of highest entropy, that the loss uses")

    learning_rate: float = flag(1e-6, "of AdamW")
    lr_schedule: Literal["constant", "linear"] = flag("constant", "linear falls to zero over the run")
    adam_betas: list[float] = flag([0.9, 0.999], "decay of the mean of gradients and of their squares")
    weight_decay: float = flag(0.0, "decoupled, as in AdamW")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm; 0 never clips")

    memory_budget_gib: float | None = flag(None, "memory to plan for, in GiB; default: what is free")
    offload_optimizer: bool = flag(False, "keep the optimizer's state in host memory: less GPU memory, slower steps")
    micro_batch_tokens: int | None = flag(None, "tokens in a forward pass of the update; default: as the memory allows")
    checkpointed_layers: int | None = flag(None, "layers whose activations are computed again in the backward pass; "
                                           "default: as few as the memory allows")

    eval_every: int = flag(50, "steps between evaluations on the held-out examples; 0: only before and after")
    eval_examples: int = flag(128, "held-out examples")
    eval_samples: int = flag(0, "also sample this many answers to each held-out example and report pass@k")
    eval_only: bool = flag(False, "evaluate the model and stop")
    save_every: int = flag(0, "steps between checkpoints; 0: only the final model is saved")


# The first field of each group in `--help`, and the group's title.
GROUPS = {
    "recipe": "the run", "model": "policy, data and reward", "prompts_per_step": "sampling",
    "loss_temperature": "the objective", "learning_rate": "the optimizer", "memory_budget_gib": "memory",
    "eval_every": "evaluation and checkpoints",
}

RECIPES: dict[str, dict] = {
    "tiny": dict(
        model="embedded", task="mini-countdown", steps=350, max_new_tokens=24, eval_examples=120, skip_truncated=True,
        learning_rate=5e-4, lr_schedule="linear", adam_betas=[0.9, 0.98],
        cold_start_steps=400, cold_start_lr=3e-3, cold_start_batch=32,
    ),
    "improved": dict(
        temperature=0.5, skip_truncated=True, clip_high=0.3, beta=0.01, reference_every=10, top_entropy=0.2,
        learning_rate=1e-5,
    ),
    "nano-aha": dict(
        model="Qwen/Qwen2.5-3B", prompts_per_step=16, group_size=4, advantage_eps=1e-4, beta=0.001,
        reward=["countdown_equation", "countdown_strict_format"],
    ),
    "grpo-zero": dict(
        model="Qwen/Qwen2.5-3B-Instruct", loss_temperature=1.0, advantage_eps=1e-4, learning_rate=1e-5,
    ),
    "simple-grpo": dict(
        model="Qwen/Qwen2.5-7B", task="gsm8k", prompts_per_step=4, max_new_tokens=700, temperature=0.9,
        loss_temperature=1.0, advantage_std="sample", advantage_eps=1e-4, beta=0.04, aggregation="sequence",
        max_grad_norm=0.0, reward=["gsm8k_last_number", "gsm8k_signed_format"],
    ),
    "lm-book": dict(
        task="gsm8k", prompt_format="gsm8k-reasoning", prompts_per_step=4, group_size=16, max_new_tokens=500,
        loss_temperature=1.0, advantage_std="sample", advantage_eps=1e-4, updates_per_batch=3, clip_low=0.1,
        clip_high=0.1, beta=0.04, reference_every=500, aggregation="sequence", learning_rate=5e-6, max_grad_norm=0.1,
        reward=["gsm8k_answer", "reasoning_tags"],
    ),
}


def resolve_recipe(recipe: str) -> str:
    """The recipe's name, with auto decided by the machine. Raises InputError when there is no such recipe."""
    if recipe == "auto":
        return "improved" if torch.cuda.is_available() else "tiny"
    if recipe not in RECIPES:
        raise InputError(f"--recipe {recipe}: no such recipe; use auto or one of {', '.join(RECIPES)}")
    return recipe


def make_config(recipe: str = "auto", **overrides) -> Config:
    """A recipe's settings with `overrides`, checked. Raises InputError (unknown recipe or setting, value out of range)."""
    recipe = resolve_recipe(recipe)
    names = [f.name for f in dataclasses.fields(Config)]
    if unknown := [name for name in overrides if name not in names]:
        raise InputError(f"{unknown[0]}: no such setting; the settings are {', '.join(names)}")
    config = Config(**{**RECIPES[recipe], "recipe": recipe, **overrides})
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raises InputError for the first value that no run can have."""
    at_least = {
        "steps": 0, "train_examples": 1, "cold_start_steps": 0, "cold_start_batch": 1, "prompts_per_step": 1,
        "group_size": 2, "max_new_tokens": 1, "max_rows": 1, "advantage_eps": 0, "updates_per_batch": 1, "clip_low": 0,
        "clip_high": 0, "beta": 0, "reference_every": 0, "learning_rate": 0, "cold_start_lr": 0, "weight_decay": 0,
        "max_grad_norm": 0, "micro_batch_tokens": 1, "checkpointed_layers": 0, "eval_every": 0, "eval_examples": 1,
        "eval_samples": 0, "save_every": 0,
    }
    for name, least in at_least.items():
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for name in ("temperature", "loss_temperature", "memory_budget_gib"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if not 0 < config.top_entropy <= 1:
        raise InputError(f"--top-entropy {config.top_entropy}: must be above 0 and at most 1 (1 uses every token)")
    if config.clip_low > 1:
        raise InputError(f"--clip-low {config.clip_low}: must be at most 1, since ratios are positive")
    if len(config.adam_betas) != 2 or not all(0 <= beta < 1 for beta in config.adam_betas):
        raise InputError(f"--adam-betas {config.adam_betas}: give two numbers of at least 0 and below 1")
    if config.prompt_format and (config.prompt_format not in data.PROMPTS or Path(config.task).suffix in data.FILE_TYPES):
        raise InputError(f"--prompt-format {config.prompt_format}: with a built-in task, one of {', '.join(data.PROMPTS)}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu, or check the driver")
    for name, choices in (("dtype", ("auto", "bfloat16", "float32")), ("device", ("auto", "cpu", "cuda"))):
        if getattr(config, name) not in choices:
            raise InputError(f"--{name} {getattr(config, name)}: use one of {', '.join(choices)}")


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: token ids in, token ids out


@dataclass
class Completion:
    """One sampled answer: its n token ids (with the EOS, when one was sampled) and, for each, the sampler's
    log-probability and the entropy of the distribution it was drawn from, both in nats at the sampling temperature."""

    ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    finished: bool  # False when it hit the length limit


class RowCache(transformers.Cache):
    """Keys and values of all live rows, allocated once and written in place.

    All rows write the same column at each step; a row admitted late has its prompt placed so that it ends at the
    current column. Positions are rotated into the keys before they arrive, so a column has no meaning of its own.
    """

    def __init__(self, rows: int, columns: int):
        super().__init__(layers=[])
        self.rows, self.columns = rows, columns
        self.keys: list[Tensor] = []  # one [rows, KV heads, columns, head size] a layer
        self.values: list[Tensor] = []
        self.live = 0  # rows in use, always the first ones
        self.column = 0  # where the next token goes

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Called by the attention layers with one new token for each live row."""
        end = self.column + 1
        self.keys[layer_idx][: self.live, :, self.column : end] = key_states
        self.values[layer_idx][: self.live, :, self.column : end] = value_states
        return self.keys[layer_idx][: self.live, :, :end], self.values[layer_idx][: self.live, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.column

    def place(self, prefilled: transformers.DynamicCache, source: Tensor, rows: Tensor) -> None:
        """Copy prompt `source[i]` of a prefilled cache into row `rows[i]`, so that it ends at the current column."""
        if not self.keys:
            for layer in prefilled.layers:
                _, heads, _, size = layer.keys.shape
                self.keys.append(layer.keys.new_zeros(self.rows, heads, self.columns, size))
                self.values.append(layer.values.new_zeros(self.rows, heads, self.columns, layer.values.shape[-1]))
        for layer, keys, values in zip(prefilled.layers, self.keys, self.values):
            start = self.column - layer.keys.shape[2]
            keys[rows, :, start : self.column] = layer.keys[source]
            values[rows, :, start : self.column] = layer.values[source]

    def keep(self, rows: Tensor) -> None:
        """Keep only these live rows, moved to the front."""
        for buffer in self.keys + self.values:
            buffer[: len(rows), :, : self.column] = buffer[rows, :, : self.column]
        self.live = len(rows)

    def forget(self, columns: int) -> None:
        """Drop the first `columns` columns, which no unfinished row can see."""
        for buffer in self.keys + self.values:
            buffer[: self.live, :, : self.column - columns] = buffer[: self.live, :, columns : self.column].clone()
        self.column -= columns


def prefill(model, prompts: list[list[int]], pad_token_id: int):
    """Run the prompts, padded on the left, through the model once: (cache, visible[rows, columns], logits[rows, V])."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_token_id] * (longest - len(p)) + p for p in prompts], device=model.device)
    visible = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    cache = transformers.DynamicCache()
    positions = (visible.cumsum(1) - 1).clamp(min=0)
    logits = model(
        ids, attention_mask=visible, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits[:, -1]
    return cache, visible.bool(), logits


def choose_tokens(logits: Tensor, temperature: float, generator=None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row from logits[rows, V]: (tokens, their log-probabilities, entropies). Temperature 0: the best."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    probabilities = logprobs.exp()
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        tokens = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1), torch.special.entr(probabilities).sum(-1)


@torch.no_grad()
def sample(
    model,
    prompts: list[list[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_token_id: int | list[int],
    pad_token_id: int,
    generator: torch.Generator | None = None,
    max_rows: int | None = None,
    progress: tqdm | None = None,
) -> list[Completion]:
    """`group_size` completions of each prompt, prompt after prompt.

    Each prompt is run once and its cache copied to its group. All rows are decoded together; rows that finish make
    room for prompts that wait (at most `max_rows` are live), or, when none waits, leave the batch. `temperature` 0 is
    greedy. Raises InputError for an empty prompt, or a model whose attention can't see the whole answer.
    """
    device, total = model.device, len(prompts) * group_size
    if not prompts or not all(prompts):
        raise InputError("sample: each prompt needs at least one token")
    longest = max(map(len, prompts))
    refuse_short_windows(model.config, longest + max_new_tokens)
    rows = min(max_rows or total, total)
    spare = max_new_tokens // 2 if rows < total else 0  # so that old columns are forgotten now and then, not at each step
    cache = RowCache(rows, longest + max_new_tokens + spare)
    cache.column = longest
    hidden = torch.finfo(model.dtype).min
    mask = torch.full((rows, cache.columns), hidden, dtype=model.dtype, device=device)  # added to the attention scores
    stops = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id, device=device)
    check_every = 8 if device.type == "cuda" else 1  # asking whether rows finished makes the host wait for the GPU

    # What was sampled, by episode; finished rows go on writing into the last column until they are removed.
    ids = torch.zeros((total, max_new_tokens + 1), dtype=torch.long, device=device)
    logprobs, entropies = (torch.zeros((total, max_new_tokens + 1), device=device) for _ in range(2))
    lengths = torch.zeros(total, dtype=torch.long, device=device)
    finished = torch.zeros(total, dtype=torch.bool, device=device)

    # What is going on, by live row.
    episode, token, position, start = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(4))
    done = torch.ones(rows, dtype=torch.bool, device=device)

    def record(where: Tensor, logits: Tensor) -> None:
        """Choose and write down the next token of the rows `where`."""
        token[where], logprob, entropy = choose_tokens(logits, temperature, generator)
        who, stopped = episode[where], done[where]
        column = torch.where(stopped, max_new_tokens, lengths[who])
        ids[who, column], logprobs[who, column], entropies[who, column] = token[where], logprob, entropy
        lengths[who] += ~stopped
        finished[who] |= ~stopped & torch.isin(token[where], stops)
        done[where] = stopped | finished[who] | (lengths[who] == max_new_tokens)

    admitted = 0
    for step in range(10**9):
        if step % check_every == 0:
            busy = int((~done[: cache.live]).sum())
            waiting = total - admitted
            if waiting and rows - busy >= min(waiting, max(1, rows // 8)):  # several at once: prefill in batches
                free = done.nonzero().squeeze(1)[:waiting]
                chosen = torch.arange(admitted, admitted + len(free), device=device)
                first = admitted // group_size
                batch = prompts[first : (admitted + len(free) - 1) // group_size + 1]
                prefilled, visible, logits = prefill(model, batch, pad_token_id)
                source = chosen // group_size - first
                cache.live = max(cache.live, int(free.max()) + 1)
                cache.place(prefilled, source, free)
                mask[free] = hidden
                mask[free, cache.column - visible.shape[1] : cache.column] = torch.where(visible, 0, hidden)[source].to(mask.dtype)
                position[free] = visible.sum(1)[source]
                start[free] = cache.column - position[free]
                episode[free], done[free] = chosen, False
                admitted += len(free)
                record(free, logits[source])
                continue
            if not busy:
                break
            if not waiting and busy <= 0.75 * cache.live:
                keep = (~done[: cache.live]).nonzero().squeeze(1)
                cache.keep(keep)
                mask = mask[keep]
                episode, token, position, start, done = (x[keep] for x in (episode, token, position, start, done))
            if progress is not None:
                progress.update(admitted - busy - progress.n)
        if cache.column == cache.columns:
            unseen = min(int(start[~done].min()), cache.column - longest)
            mask[:, : cache.column - unseen] = mask[:, unseen:].clone()
            cache.forget(unseen)
            start -= unseen
        live = slice(cache.live)
        mask[live, cache.column] = 0
        logits = model(
            token[live, None],
            attention_mask=mask[live, None, None, : cache.column + 1],
            position_ids=position[live, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        cache.column += 1
        position += 1
        record(torch.arange(cache.live, device=device), logits)
    return [
        Completion(i[:n], lp[:n], h[:n], done)
        for i, lp, h, n, done in zip(*(x.tolist() for x in (ids, logprobs, entropies, lengths, finished)))
    ]


def refuse_short_windows(config, tokens: int) -> None:
    """Raises InputError when the model's attention does not reach over `tokens` tokens: `sample` lets it see them all."""
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if types - {"full_attention", "sliding_attention"} or ("sliding_attention" in types and (window or 0) < tokens):
        raise InputError(
            f"the model's layers ({', '.join(sorted(types))}, window {window}) don't see all of {tokens} tokens; use a "
            "model with full attention, or a shorter --max-new-tokens"
        )


# ---------------------------------------------------------------------------------------------------------------------
# From answers to numbers: rewards, advantages, token weights


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


def rollout(model, tokenizer, examples: list[dict], weights: dict[str, float], *, progress=None, **sampling) -> list[Episode]:
    """Sample answers to the examples and score them; `weights` as in `rewards.score`, `sampling` as in `sample`."""
    group_size = sampling.get("group_size", 1)
    prompts = [example["prompt_ids"] for example in examples]
    completions = sample(model, prompts, progress=progress, **sampling)
    stops = sampling["eos_token_id"]
    episodes = []
    for i, completion in enumerate(completions):
        group = i // group_size
        ids = completion.ids[:-1] if completion.finished and completion.ids[-1] in stops else completion.ids
        text = tokenizer.decode(ids, skip_special_tokens=False)
        reward, parts = rewards.score(text, examples[group], weights)
        episodes.append(Episode(examples[group], group, prompts[group], completion, text, reward, parts))
    return episodes


def is_solved(episode: Episode) -> bool:
    """The first reward decides: a score of 1 or more."""
    return next(iter(episode.parts.values())) >= 1.0


def group_advantages(
    rewards: Tensor, groups: Tensor, std: Literal["population", "sample", "none"] = "population", eps: float = 1e-6
) -> Tensor:
    """How much better each answer is than the others to the same prompt: (r - mean) / (std + eps) within its group.

    rewards[E], groups[E] (equal numbers, same group) -> advantages[E], float32. DeepSeekMath (arXiv 2402.03300), section
    4.1.2; std "none" is Dr. GRPO (arXiv 2503.20783). A group of one has advantage 0.
    """
    index = groups.unique(return_inverse=True)[1]
    rewards = rewards.double()
    count = torch.bincount(index).double()
    total = lambda x: torch.zeros_like(count).index_add_(0, index, x)  # noqa: E731
    centred = rewards - (total(rewards) / count)[index]
    # A mean is rounded: without this, equal rewards could leave 1e-17, which the division would blow up.
    centred = torch.where(centred.abs() <= 1e-12 * rewards.abs(), 0.0, centred)
    if std != "none":
        squares = total(centred**2)
        deviation = (squares / (count - int(std == "sample")).clamp(min=1)).sqrt()
        centred = centred / (deviation + eps)[index]
    return torch.where(centred == 0, 0.0, centred).float()


def token_weights(
    lengths: Tensor, aggregation: Literal["token", "sequence", "constant"] = "token", max_new_tokens: int | None = None
) -> Tensor:
    """The weight of each token of each answer in the loss: lengths[E] in tokens -> weights[E].

    "token" (DAPO, arXiv 2503.14476, eq. 8): 1 / all tokens of the batch. "sequence" (GRPO, arXiv 2402.03300, eq. 3):
    1 / (its answer's length x E). "constant" (Dr. GRPO, arXiv 2503.20783): 1 / (E x max_new_tokens).
    """
    lengths = lengths.float()
    if aggregation == "token":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    if aggregation == "sequence":
        return 1 / (lengths.clamp(min=1) * len(lengths))
    if aggregation == "constant" and max_new_tokens:
        return torch.full_like(lengths, 1 / (len(lengths) * max_new_tokens))
    raise InputError(f"aggregation {aggregation!r}: use 'token', 'sequence', or 'constant' with max_new_tokens")


def high_entropy_mask(entropies: Tensor, fraction: float) -> Tensor:
    """True for the `fraction` of tokens of highest entropy: entropies[n] -> bool[n] (arXiv 2506.01939, eq. 5).

    The threshold is the (1 - fraction) quantile; tokens that tie with it are kept.
    """
    if fraction >= 1 or not len(entropies):
        return torch.ones_like(entropies, dtype=torch.bool)
    # By rank, as torch.quantile stops at 16 M elements; the rounding keeps 0.8 * 5 from being a little more than 4.
    rank = math.ceil(round((1 - fraction) * (len(entropies) - 1), 6))
    return entropies >= entropies.kthvalue(rank + 1).values


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO loss over tokens, all arguments of any one shape: (0-dim loss, stats).

    Without `old_logprobs` the batch is exactly on-policy: the ratio pi/pi_old is 1 whatever its gradient, clipping can't
    act, and A * logprob has the same gradient as A * ratio. With them it is PPO's clipped surrogate (arXiv 1707.06347,
    eq. 7; two bounds as in DAPO, arXiv 2503.14476). The KL term is the k3 estimator (GRPO, arXiv 2402.03300, eq. 4).
    stats: means over the tokens given, `kl` with a reference and `clip_fraction` with old log-probabilities.
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


# ---------------------------------------------------------------------------------------------------------------------
# The update


@dataclass
class Lesson:
    """An episode as the update sees it: n completion tokens, of which the m that `counts` selects enter the loss."""

    prompt: list[int]
    completion: list[int]
    counts: Tensor  # bool[n]
    advantage: float
    weight: float
    old_logprobs: Tensor | None = None  # [m]
    ref_logprobs: Tensor | None = None  # [m]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion) - 1  # the last token is predicted, never read


def lesson_logprobs(policy, lessons: list[Lesson], temperature: float, checkpointed_layers: int | None = 0) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) of the tokens that count, one lesson after the other.

    Rows are padded on the right without an attention mask: attention is causal, so no real token sees the padding.
    """
    device = policy.head.device
    ids = torch.zeros(len(lessons), max(map(len, lessons)), dtype=torch.long)
    rows, columns, targets = [], [], []
    for row, lesson in enumerate(lessons):
        tokens = torch.tensor(lesson.prompt + lesson.completion)
        ids[row, : len(lesson)] = tokens[:-1]
        counted = lesson.counts.nonzero().squeeze(1)
        rows.append(torch.full_like(counted, row))
        columns.append(counted + len(lesson.prompt) - 1)  # the position before a token predicts it
        targets.append(tokens[len(lesson.prompt) :][counted])
    rows, columns, targets = (torch.cat(x).to(device) for x in (rows, columns, targets))
    with memory.checkpoint_layers(policy.model, checkpointed_layers if torch.is_grad_enabled() else 0):
        hidden = policy.backbone(ids.to(device), use_cache=False).last_hidden_state
        # The head's gradient goes straight into head.grad: one tensor of its size less.
        return memory.token_logprobs(
            hidden[rows, columns], policy.head, targets, temperature, into_weight_grad=torch.is_grad_enabled()
        )


def in_micro_batches(lessons: list[Lesson], plan: memory.MemoryPlan, work, start_over, progress=None) -> float:
    """Call work(lessons of a micro-batch) until all are through; returns the share of padding.

    When the GPU's memory runs out, `start_over()` undoes what was done and micro-batches of half the size are tried.
    """
    lengths = [len(lesson) for lesson in lessons]
    while True:
        try:
            batches = memory.micro_batches(lengths, plan.micro_batch_tokens)
            for batch in batches:
                work([lessons[i] for i in batch])
                if progress is not None:
                    progress.update(len(batch))
            return 1 - sum(lengths) / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        except torch.OutOfMemoryError as error:
            if plan.micro_batch_tokens <= max(lengths):
                raise memory.DoesNotFit(
                    "out of memory in an update with one answer at a time; try --offload-optimizer, a shorter "
                    f"--max-new-tokens or a smaller --model. The plan was:\\n{plan.table()}"
                ) from error
        # Outside the handler, because the exception holds on to the failed pass's tensors.
        plan.micro_batch_tokens = max(plan.micro_batch_tokens // 2, max(lengths))
        warn(f"out of memory; doing the update again with micro-batches of {plan.micro_batch_tokens} tokens")
        start_over()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def make_lessons(episodes: list[Episode], config: Config) -> list[Lesson]:
    """What is to be learned from the step's episodes (truncated ones are gone already, if they are to be skipped).

    Token weights and the high-entropy mask are taken over the whole batch; then, without a KL term, the episodes of
    groups without spread are dropped: their gradient is zero.
    """
    lengths = torch.tensor([len(episode.completion.ids) for episode in episodes])
    weights = token_weights(lengths, config.aggregation, config.max_new_tokens).tolist()
    entropies = torch.tensor([entropy for episode in episodes for entropy in episode.completion.entropies])
    counts = high_entropy_mask(entropies, config.top_entropy).split(lengths.tolist())
    return [
        Lesson(episode.prompt, episode.completion.ids, count, episode.advantage, weight)
        for episode, count, weight in zip(episodes, counts, weights)
        if (episode.advantage != 0 or config.beta > 0) and count.any()
    ]


def update(policy, reference, optimizer, lessons: list[Lesson], config: Config, plan, progress=None) -> dict[str, float]:
    """`updates_per_batch` optimizer steps on one batch of lessons; returns the update's metrics.

    Old log-probabilities (several updates only) and the reference's come from the very code that computes the current
    ones, before the first update. A gradient that is not finite changes nothing.
    """
    temperature = config.loss_temperature or config.temperature
    parameters = [p for p in policy.model.parameters() if p.requires_grad]

    def store_logprobs(name: str) -> None:
        @torch.no_grad()
        def work(batch: list[Lesson]) -> None:
            logprobs, _ = lesson_logprobs(policy, batch, temperature)
            for lesson, part in zip(batch, logprobs.split([int(lesson.counts.sum()) for lesson in batch])):
                setattr(lesson, name, part)

        in_micro_batches(lessons, plan, work, start_over=lambda: None)

    if config.updates_per_batch > 1:
        store_logprobs("old_logprobs")
    if reference is not None:
        with reference.swapped_in():
            store_logprobs("ref_logprobs")

    tokens = sum(int(lesson.counts.sum()) for lesson in lessons)
    metrics = dict(loss=0.0, kl=None, clip_fraction=None, grad_norm=None, padding_share=None, bad_updates=0)
    for number in range(config.updates_per_batch):
        sums = {}

        def learn(batch: list[Lesson]) -> None:
            logprobs, _ = lesson_logprobs(policy, batch, temperature, plan.checkpointed_layers)
            repeats = torch.tensor([int(lesson.counts.sum()) for lesson in batch])
            advantages, weights = (
                torch.tensor([getattr(lesson, name) for lesson in batch]).repeat_interleave(repeats).to(logprobs.device)
                for name in ("advantage", "weight")
            )
            old, ref = (
                torch.cat([getattr(lesson, name) for lesson in batch]) if getattr(batch[0], name) is not None else None
                for name in ("old_logprobs", "ref_logprobs")
            )
            loss, stats = grpo_loss(
                logprobs, advantages, weights, old, ref, config.clip_low, config.clip_high, config.beta
            )
            loss.backward()
            share = len(logprobs) / tokens
            for name, value in [("loss", loss.detach())] + [(name, share * value) for name, value in stats.items()]:
                sums[name] = sums.get(name, 0) + value

        def start_over() -> None:
            optimizer.zero_grad(set_to_none=True)
            sums.clear()

        if progress is not None:
            progress.reset(total=len(lessons))
        metrics["padding_share"] = in_micro_batches(lessons, plan, learn, start_over, progress)
        norm = float(memory.clip_gradients(parameters, config.max_grad_norm or None))
        if math.isfinite(norm):
            optimizer.step()
        else:
            metrics["bad_updates"] += 1
        optimizer.zero_grad(set_to_none=True)
        metrics["grad_norm"] = norm if math.isfinite(norm) else None
        metrics.update({name: float(value) for name, value in sums.items()})
    return metrics


def cold_start(policy, optimizer, examples: list[dict], config: Config, plan, rng: random.Random) -> None:
    """Supervised steps on demonstrations: the mean log-probability of their tokens is raised, by the code of the update.

    It is GRPO's loss with every advantage 1 and the weights of "token".
    """
    eos = policy.tokenizer.eos_token_id
    demonstrations = []
    for _ in range(config.cold_start_steps):
        batch = [rng.choice(examples) for _ in range(config.cold_start_batch)]
        texts = [data.demonstration(example, rng) for example in batch]
        demonstrations.append([(e["prompt_ids"], policy.tokenizer(t, add_special_tokens=False).input_ids + [eos])
                               for e, t in zip(batch, texts)])
    for step, pairs in enumerate(tqdm(demonstrations, "cold start", leave=False, disable=not sys.stderr.isatty())):
        for group in optimizer.param_groups:
            group["lr"] = config.cold_start_lr * (1 - step / config.cold_start_steps)
        total = sum(len(completion) for _, completion in pairs)
        lessons = [Lesson(p, c, torch.ones(len(c), dtype=torch.bool), 1.0, 1 / total) for p, c in pairs]
        settings = dataclasses.replace(config, updates_per_batch=1, beta=0.0, loss_temperature=1.0, max_grad_norm=1.0)
        update(policy, None, optimizer, lessons, settings, plan)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and the run's files


def evaluate(policy, examples: list[dict], weights: dict[str, float], samples: int, config: Config, plan, generator) -> dict:
    """Greedy accuracy on held-out examples, pass@k of k = `samples` sampled answers (0: none), the greedy episodes."""
    settings = dict(max_new_tokens=config.max_new_tokens, eos_token_id=policy.stops, pad_token_id=policy.pad_token_id,
                    max_rows=plan.max_rows, generator=generator)
    episodes = rollout(policy.model, policy.tokenizer, examples, weights, temperature=0.0, **settings)
    result = {"accuracy": sum(map(is_solved, episodes)) / len(episodes), "episodes": episodes, "pass_at_k": None}
    if samples:
        drawn = rollout(policy.model, policy.tokenizer, examples, weights, temperature=config.temperature,
                        group_size=samples, **settings)
        result["pass_at_k"] = len({e.group for e in drawn if is_solved(e)}) / len(examples)
    return result


def save_model(policy, folder: Path) -> None:
    """A complete Hugging Face folder: `from_pretrained` and vLLM open it."""
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def append_line(path: Path, record: dict) -> None:
    """Add one JSON line and flush it, so that another process reads whole lines only."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def sample_records(step: int, episodes: list[Episode], groups: int = 2) -> list[dict]:
    """What samples.jsonl keeps of a step: the first few prompts with all their completions."""
    return [
        {
            "step": step, "example": {k: v for k, v in e.example.items() if k != "prompt_ids"}, "completion": e.text,
            "reward": e.reward, "parts": e.parts, "advantage": e.advantage, "finished": e.completion.finished,
        }
        for e in episodes if e.group < groups
    ]


def draw_curves(metrics: list[dict], evaluations: list[dict], path: Path) -> None:
    """Reward and its parts, accuracy, completion length and entropy over the steps, raw values light under a mean."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a display
    from matplotlib import pyplot as plt

    parts = [name for name in metrics[0] if name.startswith("reward/")]
    panels = [("reward", ["reward", *parts]), ("accuracy", ["accuracy"]),
              ("completion length (tokens)", ["completion_length"]), ("entropy (nats a token)", ["entropy"])]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, panels):
        for i, name in enumerate(names):
            steps, values = [m["step"] for m in metrics], [m[name] for m in metrics]
            window = max(1, len(values) // 20)
            means = [sum(values[max(0, j - window + 1) : j + 1]) / (j + 1 - max(0, j - window + 1)) for j in range(len(values))]
            axis.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=1)
            axis.plot(steps, means, color=f"C{i}", linewidth=2, label=name.removeprefix("reward/"))
        if title == "accuracy":
            axis.plot([e["step"] for e in evaluations], [e["accuracy"] for e in evaluations], "ko-", markersize=5,
                      linewidth=1, label="held-out, greedy")
        axis.set_title(title, fontsize=13)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def side_by_side(before: list[Episode], after: list[Episode], count: int = 3) -> str:
    """The first held-out examples with the greedy answers before and after training, in two columns."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 140) // 2 - 2
    wrap = lambda text: [w for line in text.splitlines() for w in textwrap.wrap(line, width) or [""]][:20]  # noqa: E731
    lines = []
    for old, new in list(zip(before, after))[:count]:
        prompt = old.example["prompt"]
        lines += ["", *textwrap.wrap(prompt if isinstance(prompt, str) else prompt[-2]["content"] if len(prompt) > 1
                                     else prompt[0]["content"], 2 * width)]
        marks = [f"{when} ({'solved' if is_solved(e) else 'not solved'})" for when, e in (("before", old), ("after", new))]
        left, right = wrap(old.text), wrap(new.text)
        rows = max(len(left), len(right))
        for a, b in zip([marks[0], *left, *[""] * (rows - len(left))], [marks[1], *right, *[""] * (rows - len(right))]):
            lines.append(f"  {a:<{width}}| {b}")
    return "\n".join(lines)


def warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)


def say(message: str = "") -> None:
    print(message, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class Policy:
    """The model that learns, with what sampling and the loss need of it."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    backbone: torch.nn.Module  # token ids -> hidden states
    head: Tensor  # [V, H]: hidden states -> logits
    stops: list[int]  # token ids that end an answer
    pad_token_id: int


def open_policy(config: Config, device: str, dtype: torch.dtype) -> Policy:
    """Load the policy and find its parts; InputError when its logits are not simply hidden @ head.T."""
    model, tokenizer = data.load_policy(
        config.model, dtype=dtype, device=device, seed=config.seed, trust_remote_code=config.trust_remote_code
    )
    try:
        backbone, head = memory.plain_head(model)
    except ValueError as error:
        raise InputError(f"--model {config.model}: {error}") from error
    declared = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Policy(model, tokenizer, backbone, head, sorted(stops), pad)


def tokenize(policy: Policy, examples: list[dict], max_new_tokens: int) -> int:
    """Put `prompt_ids` into each example; returns the longest prompt in tokens. InputError when it leaves no room."""
    context = policy.model.config.max_position_embeddings
    for example in examples:
        example["prompt_ids"] = data.encode_prompt(policy.tokenizer, example["prompt"])
        needed = len(example["prompt_ids"]) + max_new_tokens
        if needed > context:
            raise InputError(
                f"a prompt of {len(example['prompt_ids'])} tokens and {max_new_tokens} new ones exceed the model's context "
                f"of {context}; lower --max-new-tokens or drop the prompt that begins {str(example['prompt'])[:80]!r}"
            )
    return max(len(example["prompt_ids"]) for example in examples)


def peak_memory(device: str) -> int:
    """Bytes: the most that tensors took on the GPU, or the process's largest resident size on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def train(config: Config) -> dict:
    """One run, start to end; returns its summary, which is also written to summary.json.

    Raises InputError, rewards.RewardError or memory.DoesNotFit, each with a message for the user.
    """
    started = time.monotonic()
    check_config(config)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else torch.bfloat16 if device == "cuda" else torch.float32
    folder = Path(config.output_dir) / (config.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and not config.eval_only:
        raise InputError(f"{folder} exists already; choose another --name, or remove it")
    torch.manual_seed(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    rng = random.Random(config.seed)

    weights = rewards.parse_rewards(config.reward)
    examples, heldout = data.load_task(
        config.task, dataset=config.dataset, prompt_format=config.prompt_format, train_examples=config.train_examples,
        eval_examples=config.eval_examples, seed=config.seed,
    )
    policy = open_policy(config, device, dtype)
    model, tokenizer = policy.model, policy.tokenizer
    longest = tokenize(policy, examples + heldout, config.max_new_tokens)
    budget = config.memory_budget_gib * 2**30 if config.memory_budget_gib else memory.detect_budget_bytes(device)
    plan = memory.plan(
        model.config, prompt_tokens=longest, max_new_tokens=config.max_new_tokens, prompts=config.prompts_per_step,
        group_size=config.group_size, dtype=dtype, memory_budget_bytes=int(budget), reference=config.beta > 0,
        offload_optimizer=config.offload_optimizer, top_entropy=config.top_entropy,
        updates_per_batch=config.updates_per_batch, micro_batch_tokens=config.micro_batch_tokens,
        checkpointed_layers=config.checkpointed_layers, max_rows=config.max_rows,
    )
    say(f"recipe {config.recipe} on {device}, {str(dtype).removeprefix('torch.')} (--recipe and --device choose otherwise)")
    say(f"model  {config.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    say(f"task   {config.task}, {len(examples)} examples to train on, {len(heldout)} held out, rewards {weights}")
    say(plan.table())
    if tokenizer.chat_template is None and isinstance(examples[0]["prompt"], list):
        warn(f"{config.model} has no chat template; its prompts are the messages' plain text")

    memory.sum_gradients_in_fp32(model.parameters())
    if config.cold_start_steps and not config.eval_only:
        optimizer = memory.AdamW8bit(model.parameters(), lr=config.cold_start_lr, betas=tuple(config.adam_betas),
                                     eps=1e-8, weight_decay=0.0, offload=config.offload_optimizer)
        cold_start(policy, optimizer, examples, config, plan, random.Random(config.seed))
        del optimizer  # GRPO's starts afresh
    before = evaluate(policy, heldout, weights, config.eval_samples, config, plan, generator)
    say(f"held-out accuracy before GRPO: {before['accuracy']:.3f}")
    if config.eval_only:
        return {"recipe": config.recipe, "accuracy": before["accuracy"], "pass_at_k": before["pass_at_k"]}

    # Nothing is on disk before this line: a run that can't start leaves nothing behind.
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    optimizer = memory.AdamW8bit(model.parameters(), lr=config.learning_rate, betas=tuple(config.adam_betas), eps=1e-8,
                                 weight_decay=config.weight_decay, offload=config.offload_optimizer)
    reference = memory.ReferencePolicy(model) if config.beta > 0 else None
    sampling = dict(group_size=config.group_size, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                    eos_token_id=policy.stops, pad_token_id=policy.pad_token_id, generator=generator)
    metrics: list[dict] = []
    evaluations = [{"step": 0, "accuracy": before["accuracy"], "pass_at_k": before["pass_at_k"]}]
    quiet = not sys.stderr.isatty()
    order: list[dict] = []
    bar = tqdm(range(1, config.steps + 1), "GRPO", disable=quiet)
    inner = tqdm(leave=False, disable=quiet, delay=2)
    for step in bar:
        step_started = time.monotonic()

        # Sample and score.
        while len(order) < config.prompts_per_step:
            order += rng.sample(examples, len(examples))
        prompts, order = order[: config.prompts_per_step], order[config.prompts_per_step :]
        episodes = sample_within_memory(policy, prompts, weights, sampling, plan, inner)
        sampled = time.monotonic()

        # Advantages, among the answers that count.
        kept = [e for e in episodes if e.completion.finished or not config.skip_truncated]
        advantages = group_advantages(
            torch.tensor([e.reward for e in kept]), torch.tensor([e.group for e in kept], dtype=torch.long),
            config.advantage_std, config.advantage_eps,
        )
        for episode, advantage in zip(kept, advantages.tolist()):
            episode.advantage = advantage
        lessons = make_lessons(kept, config)

        # Update.
        rate = config.learning_rate * (1 - (step - 1) / config.steps if config.lr_schedule == "linear" else 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        learned = update(policy, reference, optimizer, lessons, config, plan, inner) if lessons else {}
        if reference is not None and config.reference_every and step % config.reference_every == 0:
            reference.refresh()

        # Log.
        record = step_metrics(step, episodes, lessons, learned, config, rate)
        record |= {
            "sampling_tokens_per_second": sum(len(e.completion.ids) for e in episodes) / (sampled - step_started),
            "update_tokens_per_second": sum(map(len, lessons)) / (time.monotonic() - sampled),
            "seconds": time.monotonic() - step_started, "peak_memory_bytes": peak_memory(device),
        }
        metrics.append(record)
        append_line(folder / "metrics.jsonl", record)
        for line in sample_records(step, episodes):
            append_line(folder / "samples.jsonl", line)
        shown = {"reward": f"{record['reward']:.3f}", "accuracy": f"{record['accuracy']:.3f}",
                 "length": f"{record['completion_length']:.1f}"}
        bar.set_postfix(shown)
        if quiet:
            say(f"step {step}/{config.steps} " + " ".join(f"{k} {v}" for k, v in shown.items())
                + f" {record['seconds']:.2f} s" + (f" ({record['skipped']})" if record["skipped"] else ""))
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            result = evaluate(policy, heldout, weights, 0, config, plan, generator)
            evaluations.append({"step": step, "accuracy": result["accuracy"], "pass_at_k": None})
            tqdm.write(f"step {step}: held-out accuracy {result['accuracy']:.3f}")
        if config.save_every and step % config.save_every == 0:
            save_checkpoint(policy, optimizer, reference, generator, rng, step, folder)
    inner.close()

    after = evaluate(policy, heldout, weights, config.eval_samples, config, plan, generator)
    evaluations.append({"step": config.steps, "accuracy": after["accuracy"], "pass_at_k": after["pass_at_k"]})
    save_model(policy, folder / "final")
    if metrics:
        draw_curves(metrics, evaluations, folder / "curves.png")
    summary = {
        "recipe": config.recipe, "accuracy_before": before["accuracy"], "accuracy_after": after["accuracy"],
        "steps": config.steps, "seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory(device),
        "pass_at_k_before": before["pass_at_k"], "pass_at_k_after": after["pass_at_k"], "evaluations": evaluations,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    say(side_by_side(before["episodes"], after["episodes"]))
    say(report(summary, config, folder))
    return summary


def sample_within_memory(policy, prompts, weights, sampling, plan, progress) -> list[Episode]:
    """A step's rollout; when the GPU's memory runs out, the same again with half as many rows at a time."""
    while True:
        try:
            progress.reset(total=len(prompts) * sampling["group_size"])
            return rollout(policy.model, policy.tokenizer, prompts, weights, progress=progress, max_rows=plan.max_rows, **sampling)
        except torch.OutOfMemoryError as error:
            if plan.max_rows <= 1:
                raise memory.DoesNotFit(f"out of memory while sampling one answer at a time; try a shorter --max-new-tokens "
                                        f"or a smaller --model. The plan was:\n{plan.table()}") from error
        plan.max_rows //= 2
        warn(f"out of memory; sampling again with {plan.max_rows} rows at a time")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def step_metrics(step: int, episodes: list[Episode], lessons: list[Lesson], learned: dict, config: Config, rate: float) -> dict:
    """One line of metrics.jsonl, but for the timings. Values that the step did not have are null."""
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    entropies = [entropy for e in episodes for entropy in e.completion.entropies]
    by_group: dict[int, set] = {}
    for e in episodes:
        if e.completion.finished or not config.skip_truncated:
            by_group.setdefault(e.group, set()).add(e.reward)
    spread = sum(len(values) > 1 for values in by_group.values())
    groups = len({e.group for e in episodes})
    return {
        "step": step,
        "reward": mean([e.reward for e in episodes]),
        **{f"reward/{name}": mean([e.parts[name] for e in episodes]) for name in episodes[0].parts},
        "accuracy": mean([is_solved(e) for e in episodes]),
        "completion_length": mean([len(e.completion.ids) for e in episodes]),
        "truncated_fraction": mean([not e.completion.finished for e in episodes]),
        "groups_without_spread": (groups - spread) / groups,
        "entropy": mean(entropies),
        **{name: learned.get(name) for name in ("loss", "kl", "clip_fraction", "grad_norm", "padding_share", "bad_updates")},
        "learning_rate": rate,
        "skipped": None if lessons else "nothing to learn: every answer truncated" if not by_group
        else "nothing to learn: no group with spread",
    }


def save_checkpoint(policy, optimizer, reference, generator, rng, step: int, folder: Path) -> None:
    """checkpoint-<step>: the model's folder, with the trainer's state beside it."""
    checkpoint = folder / f"checkpoint-{step}"
    save_model(policy, checkpoint)
    (checkpoint / "trainer_state").mkdir()
    torch.save(
        {"step": step, "optimizer": optimizer.state_dict(), "reference": reference.state_dict() if reference else None,
         "sampling_rng": generator.get_state(), "torch_rng": torch.get_rng_state()},
        checkpoint / "trainer_state" / "state.pt",
    )


def report(summary: dict, config: Config, folder: Path) -> str:
    """The table of accuracy before and after, and where the files are."""
    rows = [("held-out accuracy (greedy)", summary["accuracy_before"], summary["accuracy_after"])]
    if config.eval_samples:
        rows.append((f"held-out pass@{config.eval_samples}", summary["pass_at_k_before"], summary["pass_at_k_after"]))
    lines = ["", f"{'':<28}{'before':>8}{'after':>8}"] + [f"{name:<28}{a:>8.3f}{b:>8.3f}" for name, a, b in rows]
    lines += ["", f"{summary['steps']} steps, {summary['seconds']:.0f} s in all. Look at:"]
    return "\n".join(lines + [f"  {folder / name}" for name in ("curves.png", "samples.jsonl", "final/")])


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_command_line(arguments: list[str] | None = None) -> Config:
    """The Config that a command line asks for: the recipe sets the defaults that `--help` shows, flags beat them."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="auto")
    recipe = resolve_recipe(first.parse_known_args(arguments)[0].recipe)
    parser = transformers.HfArgumentParser(
        Config, usage="python grpo_scratch.py [--recipe NAME] [--flag VALUE ...]", description=__doc__.splitlines()[0],
        epilog=f"recipes: {', '.join(RECIPES)}; the defaults above are those of {recipe}", allow_abbrev=False,
    )
    parser.set_defaults(**RECIPES[recipe])
    group = None
    for action in list(parser._actions):  # argparse has no public way to put an existing flag into a group
        if action.dest in GROUPS and action.dest != (group and group.title):
            group = parser.add_argument_group(GROUPS[action.dest])
        if group is not None:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)

    def fail(message: str):
        raise InputError(f"{message}; see python grpo_scratch.py --help")

    parser.error = fail
    return make_config(**{**vars(parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[0]), "recipe": recipe})


def main() -> None:
    """Run what the command line asks for; a mistake of the user's ends with one line on stderr and exit code 2."""
    try:
        train(parse_command_line())
    except (InputError, rewards.RewardError, memory.DoesNotFit) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
