"""GRPO from scratch: train every weight of a language model by reinforcement learning, on one GPU or a CPU.

    python grpo_scratch.py            # Qwen2.5-0.5B with CUDA, a tiny embedded policy without
    python grpo_scratch.py --model ./my-qwen --task mine.jsonl --reward my_rewards.py:reward

A step, `grpo_step`, does this:

    1. sample a group of answers to each prompt, and score them      sample_batch
    2. compare each answer with its group: its advantage             group_advantages
    3. choose the tokens that count, and their weights               train_sequences
    4. raise the log-probability of what did better than its group   update, grpo_loss
    5. clip the gradient, and step the optimizer                     optimizer_step
    6. now and then copy the policy into the KL term's reference     memory.ReferencePolicy

From here to `optimizer_step` the file is the algorithm. Then come rollouts, evaluation, settings and recipes,
the run, and the command line. memory.py lets a transformer compute it in little memory, data.py reads what
goes in and writes what comes out, rewards.py scores answers. Left out on purpose: adapters (every weight is
trained), top-p and top-k (they sample from another distribution than the one the loss differentiates).
"""

import argparse
import json
import math
import operator
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin

# torch reads this when it is loaded. By default its idle threads spin, which slows busy CPUs tens of times.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import data
import memory
import rewards
from data import InputError, say, warn

# ---- One step of GRPO --------------------------------------------------------------------------------------

@dataclass
class Episode:
    """One sampled answer on its way through a step."""

    example: dict
    group: int  # the answers to one prompt share it
    prompt: list[int]  # token ids
    completion: memory.Completion
    text: str
    reward: float
    parts: dict[str, float | None]  # unweighted scores by reward name; None: this reward gave no score
    advantage: float = 0.0
    importance: Tensor | None = None  # [n], after another engine has sampled; see compare_with_sampler


def grpo_step(run: "Run") -> tuple[dict, list[Episode]]:
    """One step of GRPO, start to end. Returns its line of metrics.jsonl and its episodes."""
    config, step, started = run.config, run.step + 1, time.monotonic()
    run.spent.clear()
    episodes, kept = sample_batch(run)

    advantages = group_advantages(
        torch.tensor([e.reward for e in kept], dtype=torch.float64), torch.tensor([e.group for e in kept]),
        config.advantage_std, config.advantage_eps)
    for episode, advantage in zip(kept, advantages.tolist()):
        episode.advantage = advantage

    compared = compare_with_sampler(run, kept)  # nothing to do after our own sampler
    sequences = train_sequences(kept, config)
    if not all(math.isfinite(x) for e in episodes for x in e.completion.logprobs):
        learned = {"bad_updates": 1, "skipped": "sampled probabilities are not finite"}
    elif sequences:
        learned = update(run, sequences)
    else:
        why = "no group with spread" if kept else "every answer truncated"
        learned = {"skipped": f"nothing to learn: {why}"}
    if run.reference and config.reference_every and step % config.reference_every == 0:
        run.reference.refresh()

    run.step, run.drawn, run.midway = step, run.drawn + len({e.group for e in episodes}), False
    run.bad_steps = run.bad_steps + 1 if learned.get("bad_updates") else 0
    run.random_state = run.generator.get_state()
    return step_record(run, episodes, kept, sequences, learned | compared, started), episodes


def sample_batch(run: "Run") -> tuple[list[Episode], list[Episode]]:
    """Groups of scored answers to fresh prompts: (all episodes, for the metrics; those kept for the update).
    `skip_truncated` drops answers that hit the length limit. A refill (dynamic sampling; DAPO, arXiv
    2503.14476, section 3.2) replaces the groups whose rewards are all equal by groups of fresh prompts,
    because nothing can be learned from them. Those of the last round stay."""
    config, episodes, kept, drawn, spread = run.config, [], [], 0, set()
    for _ in range(1 + config.refill_rounds):
        lacking = config.prompts_per_step - len(spread)
        if lacking == 0:
            break
        kept = [e for e in kept if e.group in spread]
        fresh = rollout(run, run.next_examples(run.drawn + drawn, lacking), first_group=drawn,
                        group_size=config.group_size, temperature=config.temperature, generator=run.generator)
        episodes, drawn = episodes + fresh, drawn + lacking
        kept += [e for e in fresh if e.completion.finished or not config.skip_truncated]
        one_of = {e.group: e.reward for e in kept}
        spread = {e.group for e in kept if e.reward != one_of[e.group]}
    return episodes, kept


# ---- Advantages, and which tokens count how much -----------------------------------------------------------

def group_advantages(rewards: Tensor, groups: Tensor, std: str = "population", eps: float = 1e-6) -> Tensor:
    """How much better each answer is than the others to its prompt: (r - mean) / (std + eps) in its group.
    rewards[E], groups[E] (equal numbers, same group) -> advantages[E], float32. DeepSeekMath (arXiv
    2402.03300), section 4.1.2. "population" divides by the group's standard deviation with /n, "sample" with
    /(n - 1), "batch" by that of all rewards (arXiv 2508.08221, section 4.1), "none" by nothing (Dr. GRPO,
    arXiv 2503.20783). A group whose rewards are equal, or a group of one, has advantages of exactly 0."""
    rewards, advantages = rewards.double(), torch.zeros(len(rewards))
    for group in groups.unique():
        mine = rewards[groups == group]
        if (mine == mine[0]).all():
            continue  # the rounded mean of equal rewards may be 1e-17 off, which the division would blow up
        centred = mine - mine.mean()
        spread = {"population": mine.std(correction=0), "sample": mine.std(correction=1),
                  "batch": rewards.std(correction=0)}
        advantages[groups == group] = (centred if std == "none" else centred / (spread[std] + eps)).float()
    return advantages


def token_weights(lengths: Tensor, aggregation: str = "token", max_new_tokens: int | None = None) -> Tensor:
    """Each token's weight in the loss: lengths[E] -> weights[E]. Raises ValueError for other aggregations.
    "token" (DAPO, arXiv 2503.14476, eq. 8): 1 / all tokens of the batch. "sequence" (GRPO, arXiv 2402.03300,
    eq. 3): 1 / (its answer's length x E). "constant" (Dr. GRPO, 2503.20783): 1 / (E x max_new_tokens)."""
    lengths = lengths.float()
    if aggregation == "token":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    if aggregation == "sequence":
        return 1 / (lengths.clamp(min=1) * len(lengths))
    if aggregation == "constant" and max_new_tokens:
        return torch.ones_like(lengths) / (len(lengths) * max_new_tokens)
    raise ValueError(f"aggregation {aggregation!r}: use token, sequence, or constant with max_new_tokens")


def high_entropy_mask(entropies: Tensor, fraction: float) -> Tensor:
    """True for the `fraction` of tokens of highest entropy: entropies[n] -> bool[n] (2506.01939, eq. 5).
    The threshold is the (1 - fraction) quantile. Tokens that tie with it are kept."""
    if fraction >= 1 or not len(entropies):
        return torch.ones_like(entropies, dtype=torch.bool)
    # By rank, as torch.quantile stops at 16 M elements. Rounded, because (1 - 0.7) * 10 comes out above 3.
    rank = math.ceil(round((1 - fraction) * (len(entropies) - 1), 6))
    return entropies >= entropies.kthvalue(rank + 1).values


# ---- The loss ----------------------------------------------------------------------------------------------

def grpo_loss(
    logprobs: Tensor, advantages: Tensor, weights: Tensor, old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None, clip_low: float = 0.2, clip_high: float = 0.2, beta: float = 0.0, *,
    answers: Tensor | None = None, surrogate: str = "clip", importance: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO loss, - sum of weights * (surrogate - beta * KL), over tokens. All tensors have one shape.

    Without `old_logprobs` the batch is exactly on-policy. The ratio pi / pi_old is then 1, clipping can't
    act, and A * logprob has the same gradient as A * ratio.
    With them, "clip" is PPO's surrogate (arXiv 1707.06347, eq. 7; two bounds as in DAPO, arXiv 2503.14476):
    a token whose ratio is clipped has no gradient. "cispo" (arXiv 2506.13585, eqs. 4 and 5) makes
    min(ratio, 1 + clip_high) the weight of A * logprob: every token keeps its gradient; clip_low is unused.
    `answers`, int64[n], says which answer each of n tokens belongs to. With it the loss is GSPO's (arXiv
    2507.18071): logprob and logprob - old are averaged over each answer, and the gradient flows
    through that average. `importance` weighs the surrogate and has no gradient.
    The KL term is the k3 estimator (GRPO, arXiv 2402.03300, eq. 4) and always the token's own.

    Returns (0-dim loss, sums over the tokens): `kl` with a reference, and with old log-probabilities
    `clip_fraction`, the number of tokens that clipping changed."""
    sums = {}

    def of_answer(x: Tensor) -> Tensor:
        if answers is None:
            return x
        _, index, tokens = answers.unique(return_inverse=True, return_counts=True)
        index, tokens = index.to(x.device), tokens.to(x.device)
        means = x.new_zeros(len(tokens)).index_add(0, index, x) / tokens
        return means.index_select(0, index)  # means[index] adds up gradients in the order of the threads

    if old_logprobs is None:
        objective = advantages * of_answer(logprobs)
    else:
        ratio = of_answer(logprobs - old_logprobs).exp()
        if surrogate == "cispo":
            clipped = ratio.clamp(max=1 + clip_high)
            objective = clipped.detach() * advantages * of_answer(logprobs)
            changed = clipped < ratio
        else:
            clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
            objective = torch.minimum(ratio * advantages, clipped * advantages)
            changed = clipped * advantages < ratio * advantages
        sums["clip_fraction"] = changed.sum()
    if importance is not None:
        objective = objective * importance.detach()
    if ref_logprobs is not None:
        difference = ref_logprobs - logprobs
        kl = difference.exp() - difference - 1
        objective = objective - beta * kl
        sums["kl"] = kl.detach().sum()
    return -(weights * objective).sum(), sums


# ---- The update --------------------------------------------------------------------------------------------

@dataclass
class TrainSequence:
    """An episode as the update sees it: m of its n completion tokens count in the loss."""

    prompt: list[int]
    completion: list[int]
    counted: Tensor | None = None  # int64[m]: which of the completion's tokens, from 0; None: all
    advantage: float = 1.0
    weight: float = 0.0  # of each token that counts
    old_logprobs: Tensor | None = None  # [m], as all that follow
    ref_logprobs: Tensor | None = None
    importance: Tensor | None = None
    sampled_logprobs: Tensor | None = None  # the sampler's, where the update's should equal them

    def __post_init__(self):
        if self.counted is None:
            self.counted = torch.arange(len(self.completion))

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion) - 1  # the last token is predicted, never read


def train_sequences(episodes: list[Episode], config: "Config") -> list[TrainSequence]:
    """What is to be learned from episodes that have their advantages. Token weights and the high-entropy mask
    are taken over the whole batch. Then, without a KL term, episodes of advantage 0 are dropped, because
    their gradient is zero. Example: two answers with advantages 1 and -1 and entropies [.1 .9] and [.2 .8 .3]
    give two sequences. With top_entropy 0.4, `counted` is [1] in both, and each token weighs 1/5."""
    lengths = torch.tensor([len(e.completion.ids) for e in episodes])
    weights = token_weights(lengths, config.aggregation, config.max_new_tokens).tolist()
    entropies = torch.tensor([entropy for e in episodes for entropy in e.completion.entropies])
    masks = high_entropy_mask(entropies, config.top_entropy).split(lengths.tolist())
    comparable = config.loss_temperature == config.temperature
    return [TrainSequence(e.prompt, e.completion.ids, mask.nonzero().squeeze(1), e.advantage, weight,
                          importance=None if e.importance is None else e.importance[mask],
                          sampled_logprobs=torch.tensor(e.completion.logprobs)[mask] if comparable else None)
            for e, mask, weight in zip(episodes, masks, weights)
            if (e.advantage != 0 or config.beta > 0) and mask.any()]


def update(run: "Run", sequences: list[TrainSequence]) -> dict[str, float | None]:
    """`updates_per_batch` optimizer steps on one batch. Returns metrics: means over tokens and updates. An
    update whose loss or gradient is not finite changes nothing. Each rank computes its share of the batch."""
    config, rate = run.config, learning_rate(run.config, run.step + 1)
    mine = memory.share(sequences, [len(s) for s in sequences])

    def ask_reference(run: "Run", sequences: list[TrainSequence]) -> None:
        for sequence, logprobs in zip(sequences, run.reference(sequences)):
            sequence.ref_logprobs = logprobs

    if run.reference:
        run.attempt("update", ask_reference, mine)
    sums, good = Counter(), 0
    for number in range(config.updates_per_batch):
        parts = run.attempt(
            "update", gradients, mine, temperature=config.loss_temperature, surrogate=config.surrogate,
            remember=number == 0 and config.updates_per_batch > 1, by_answer=config.ratio == "answer",
            clip_low=config.clip_low, clip_high=config.clip_high, beta=config.beta)
        found = optimizer_step(run, run.optimizer, parts, rate, config.max_grad_norm)
        if all(map(math.isfinite, found.values())):
            sums.update(found)
            good += 1
    tokens = sum(len(s.counted) for s in sequences)
    divisors = {"loss": good, "grad_norm": good, "sampler_gap": tokens}  # the gap is the first update's
    means = {name: x / divisors.get(name, good * tokens) for name, x in sums.items()}
    return {**means, "bad_updates": config.updates_per_batch - good}


def gradients(run: "Run", sequences: list[TrainSequence], *, temperature: float, remember: bool = False,
              by_answer: bool = False, **loss_options) -> list[dict[str, float]]:
    """Add the gradient of these sequences' loss to the model's, micro-batch after micro-batch. With
    `remember`, the log-probabilities computed here are the `old_logprobs` of the updates to come. Returns one
    dict: the loss, and grpo_loss's sums over tokens."""
    totals = Counter()
    for batch in memory.micro_batches(sequences, run.limits):
        logprobs, _ = memory.sequence_logprobs(run.policy.model, batch, temperature,
                                               run.limits.recomputed_layers, run.limits.head_rows)
        counts = torch.tensor([len(s.counted) for s in batch])
        if remember:
            for sequence, old in zip(batch, logprobs.detach().split(counts.tolist())):
                sequence.old_logprobs = old
        by_token = {"advantages": torch.tensor([s.advantage for s in batch]).repeat_interleave(counts),
                    "weights": torch.tensor([s.weight for s in batch]).repeat_interleave(counts)}
        for name in ("importance", "sampled_logprobs", "old_logprobs", "ref_logprobs"):
            if getattr(batch[0], name) is not None:
                by_token[name] = torch.cat([getattr(s, name) for s in batch])
        host = [name for name, x in by_token.items() if x.is_cpu]
        by_token |= zip(host, memory.on_device([by_token[name] for name in host], logprobs.device))
        sampled = by_token.pop("sampled_logprobs", None)
        answers = torch.arange(len(batch)).repeat_interleave(counts) if by_answer else None
        loss, sums = grpo_loss(logprobs, answers=answers, **by_token, **loss_options)
        loss.backward()
        if sampled is not None and (remember or batch[0].old_logprobs is None):
            sums["sampler_gap"] = (logprobs.detach() - sampled).abs().sum()
        totals.update({"loss": loss.detach(), **sums})
    return [{name: float(x) for name, x in totals.items()}]  # the host waits for the device only here


def optimizer_step(run: "Run", optimizer, parts: list[dict], rate: float, max_grad_norm: float) -> dict:
    """Clip the gradients, make a step if all numbers are finite, and free them. Returns the sums of all
    ranks' `parts` and the gradient's norm. Raises StepLost if memory runs out: no half step is made again."""
    found, run.midway = Counter(), True
    for part in parts:
        found.update(part)
    for group in optimizer.param_groups:
        group["lr"] = rate

    def step(run: "Run", _) -> list[float]:
        norm = float(optimizer.sum_gradients(max_grad_norm or math.inf))
        if all(map(math.isfinite, [norm, *found.values()])):
            optimizer.step()
        return [norm]

    found["grad_norm"] = run.attempt("optimizer's step", step, [])[0]
    optimizer.zero_grad(set_to_none=True)
    return found


class StepLost(memory.DoesNotFit):
    """Memory ran out when part of a step had already changed weights. They must not be saved."""


def learning_rate(config: "Config", step: int) -> float:
    """The rate of a step, counted from 1. It rises in a line to --learning-rate at the last warm-up step.
    The schedule "linear" then falls, to reach zero one step after the last."""
    top = max(config.warmup_steps, 1)  # the first step at the full rate
    falls = max(0, step - top) / (config.steps - top + 1) if config.lr_schedule == "linear" else 0.0
    return config.learning_rate * min(1.0, step / top) * (1 - falls)


def step_record(run: "Run", episodes: list[Episode], kept: list[Episode], sequences: list[TrainSequence],
                learned: dict, started: float) -> dict:
    """A step's line of metrics.jsonl. A number that the step did not measure is null."""
    mean = lambda values: statistics.fmean(known) if (known := [x for x in values if x is not None]) else None
    groups, spread = {e.group for e in episodes}, {e.group for e in kept if e.advantage}
    tokens, seconds = sum(len(e.completion.ids) for e in episodes), time.monotonic() - started
    trained = run.config.updates_per_batch * sum(map(len, sequences))
    return {
        "step": run.step, "reward": mean(e.reward for e in episodes),
        **{f"reward/{name}": mean(e.parts[name] for e in episodes) for name in episodes[0].parts},
        "accuracy": mean(is_solved(e) for e in episodes), "completion_length": tokens / len(episodes),
        "truncated_fraction": mean(not e.completion.finished for e in episodes),
        "entropy": mean(entropy for e in kept for entropy in e.completion.entropies),
        **dict.fromkeys(("loss", "kl", "clip_fraction", "grad_norm", "sampler_gap", "importance",
                         "importance_capped", "bad_updates", "skipped")), **learned,
        "learning_rate": learning_rate(run.config, run.step), "groups_drawn": len(groups),
        "groups_kept": len(spread), "groups_without_spread": (len(groups) - len(spread)) / len(groups),
        "sampling_tokens_per_second": tokens / max(run.spent["sampling"], 1e-3),  # Windows' clock is coarse
        "update_tokens_per_second": trained / max(seconds - run.spent.total(), 1e-3),
        "scoring_seconds": run.spent["scoring"], "seconds": seconds,
        "peak_memory_bytes": memory.peak_memory(run.device)}


def sample_records(step: int, episodes: list[Episode], groups: int = 2) -> list[dict]:
    """What samples.jsonl keeps of a step: the first `groups` prompts with all their completions."""
    kept = lambda example: {k: x for k, x in example.items() if k not in ("prompt_ids", "opened")}
    return [{"step": step, "example": kept(e.example), "completion": e.text, "reward": e.reward,
             "parts": e.parts, "advantage": e.advantage, "finished": e.completion.finished}
            for e in episodes if e.group < groups]


# ---- Rollouts, evaluation, cold start ----------------------------------------------------------------------

def rollout(run: "Run", examples: list[dict], *, group_size: int, temperature: float,
            generator: torch.Generator | None = None, first_group: int = 0) -> list[Episode]:
    """Sample `group_size` answers to each example and score them. Each rank does a share, and gets all."""
    config, uniform = run.config, None
    mine = memory.share(range(len(examples)), [1] * len(examples))
    if temperature:
        # The same on all ranks, on the CPU and before any attempt: running out of memory changes no sample.
        uniform = torch.rand(len(examples), group_size, config.max_new_tokens, dtype=torch.float64,
                             generator=generator)[mine].flatten(0, 1)

    def answer(run: "Run", examples: list[dict]) -> list[Episode]:
        if not examples:
            return []
        asked, started = [example for example in examples for _ in range(group_size)], time.monotonic()
        completions = run.sampler(
            [example["prompt_ids"] for example in examples], group_size=group_size, temperature=temperature,
            max_new_tokens=config.max_new_tokens, uniform=uniform, max_rows=run.limits.max_rows)
        ids = [c.ids[:-1] if c.finished else c.ids for c in completions]  # without the EOS
        texts, sampled = run.policy.tokenizer.batch_decode(ids), time.monotonic()
        scores = rewards.score_batch(run.rewards, [e["prompt"] for e in asked], texts, asked, ids)
        run.spent.update(sampling=sampled - started, scoring=time.monotonic() - sampled)
        return [Episode(e, first_group + mine[i // group_size], e["prompt_ids"], *rest, *score)
                for i, (e, *rest, score) in enumerate(zip(asked, completions, texts, scores))]

    episodes = run.attempt("rollout", answer, [examples[i] for i in mine])
    for e in episodes if config.overlong_buffer else []:
        length = len(e.completion.ids)
        e.parts["overlong"] = overlong_penalty(length, config.max_new_tokens, config.overlong_buffer)
        e.reward += e.parts["overlong"]
    return episodes


def overlong_penalty(length: int, max_new_tokens: int, buffer: int) -> float:
    """What an answer of `length` tokens, its EOS counted, loses for coming near the limit: from 0 at
    max_new_tokens - buffer down in a line to -1 at the limit (DAPO, arXiv 2503.14476, eq. 13)."""
    return max(-1.0, min(0.0, (max_new_tokens - buffer - length) / buffer)) if buffer else 0.0


def is_solved(episode: Episode) -> bool:
    """Whether the first reward gave a score of 1 or more."""
    return (next(iter(episode.parts.values())) or 0.0) >= 1.0


@torch.no_grad()
def all_logprobs(run: "Run", sequences: list[TrainSequence], temperature: float) -> list[Tensor]:
    """[2, m] for each sequence: log-probabilities and entropies, in nats, of its tokens that count."""
    found, model, limits = {}, run.policy.model, run.limits
    for batch in memory.micro_batches(sequences, limits):
        both = torch.stack(memory.sequence_logprobs(model, batch, temperature, 0, limits.head_rows))
        found |= zip(map(id, batch), both.split([len(s.counted) for s in batch], dim=1))
    return [found[id(s)] for s in sequences]


def compare_with_sampler(run: "Run", episodes: list[Episode]) -> dict[str, float | None]:
    """After another engine has sampled: fill in the entropies, which it doesn't give, and each token's
    `importance`, min(exp(the update's log-probability - the sampler's), cap), at the sampling temperature.
    Returns metrics. Truncated importance sampling (Ionides 2008) corrects another engine's rounding, but not
    other weights: raises InputError when log-probabilities are 0.2 nats apart on average."""
    if not episodes or episodes[0].completion.entropies:
        return {}  # our own sampler, whose gap the update sees in passing
    config, sequences = run.config, [TrainSequence(e.prompt, e.completion.ids) for e in episodes]
    own = run.attempt("update", all_logprobs, sequences, temperature=config.temperature)
    logprobs, entropies = torch.cat(own, dim=1).cpu()
    ratio = (logprobs - torch.tensor([x for e in episodes for x in e.completion.logprobs])).exp()
    gap = ratio.log().abs().mean().item()
    if gap > 0.2:  # bfloat16 alone makes 0.03 between two engines
        raise InputError(f"--sampler {config.sampler}: the update's log-probabilities are {gap:.2g} nats off "
                         "the sampler's: its weights or temperature are not the policy's; use --sampler own")
    cap, lengths = config.importance_cap, [len(s.completion) for s in sequences]
    importance, capped = ratio.clamp(max=cap), (ratio > cap).float().mean().item()
    means = {"sampler_gap": gap, "importance": importance.mean().item(), "importance_capped": capped}
    for e, h, weights in zip(episodes, entropies.split(lengths), importance.split(lengths)):
        e.completion.entropies, e.importance = h.tolist(), weights if cap else None
    measured = means if cap else ["sampler_gap"]
    return {name: means[name] for name in measured if math.isfinite(means[name])}  # JSON has no NaN


def evaluate(run: "Run") -> dict:
    """Held-out greedy accuracy and reward; with `eval_samples` k also pass@k and k samples' mean accuracy."""
    config, heldout = run.config, run.heldout
    say(f"evaluating {len(heldout)} held-out examples")
    greedy, sampled = rollout(run, heldout, group_size=1, temperature=0.0), []
    if config.eval_samples:
        sampled = rollout(run, heldout, group_size=config.eval_samples, temperature=config.temperature,
                          generator=torch.Generator().manual_seed(config.seed))
    found = {"step": run.step, "accuracy": statistics.fmean(map(is_solved, greedy)),
             "reward": statistics.fmean(e.reward for e in greedy),
             "sampled_accuracy": statistics.fmean(map(is_solved, sampled)) if sampled else None,
             "pass_at_k": len({e.group for e in sampled if is_solved(e)}) / len(heldout) if sampled else None}
    run.evaluations.append(found)
    say(f"step {run.step}: " * (run.step > 0) + data.evaluation_in_words(found, config.eval_samples))
    return found


def cold_start(run: "Run") -> None:
    """Supervised steps: GRPO's loss with every advantage 1, weights of "token", a rate that falls to zero."""
    config, steps, rng = run.config, run.config.cold_start_steps, random.Random(run.config.seed)
    model, tokenizer = run.policy.model, run.policy.tokenizer
    optimizer = memory.AdamW8bit(model.parameters(), config.cold_start_lr, offload=config.offload_optimizer)
    say(f"cold start: {steps} supervised steps")
    bar = tqdm(range(steps), "cold start", leave=False, disable=not data.has_terminal())
    for step in bar:
        batch = [rng.choice(run.examples) for _ in range(config.cold_start_batch)]
        answers = [data.demonstration_ids(tokenizer, model.config, e, rng) for e in batch]
        weight = 1 / sum(map(len, answers))
        sequences = [TrainSequence(e["prompt_ids"], x, weight=weight) for e, x in zip(batch, answers)]
        mine = memory.share(sequences, [len(s) for s in sequences])
        parts = run.attempt("update", gradients, mine, temperature=1.0)
        rate = config.cold_start_lr * (1 - step / steps)
        found, run.midway = optimizer_step(run, optimizer, parts, rate, max_grad_norm=1.0), False
        bar.set_postfix_str(f"loss={found['loss']:.3f}")
        if bar.disable and (step + 1) % math.ceil(steps / 10) == 0:
            say(f"cold start {step + 1}/{steps} loss {found['loss']:.3f}")


# ---- Settings ----------------------------------------------------------------------------------------------

ONE_LINE = InputError, rewards.RewardError, memory.DoesNotFit, memory.NoReference  # what such an error prints
BOUNDS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le}


def flag(default, text: str, **metadata):
    """A field of Config. Metadata: BOUNDS of its value; `group`, the title in --help from this flag on."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class Config:
    """Every setting of a run. A recipe changes defaults, a flag beats the recipe."""

    recipe: str = flag("auto", "settings to start from; auto: improved on CUDA, else tiny", group="the run")
    steps: int = flag(500, "GRPO steps; each samples prompts-per-step x group-size answers", at_least=0)
    seed: int = flag(0, "of embedded weights, data and sampling; a CPU run repeats bit for bit")
    name: str | None = flag(None, "folder of the run below --output-dir; default: recipe and start time")
    output_dir: str = flag("runs", "folder that holds the runs")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto: cuda where there is one")

    model: str = flag("Qwen/Qwen2.5-0.5B-Instruct", "hub id, folder, or embedded (tiny, made in memory)",
                      group="policy, data and reward")
    dtype: Literal["auto", "bfloat16", "float32"] = flag("auto", "auto: bfloat16 on CUDA, float32 on a CPU")
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")
    task: str = flag("countdown", "countdown, gsm8k, mini-countdown, or a jsonl, json, csv or parquet file "
                     "with a `prompt` column (text used as it stands, or a list of chat messages)")
    dataset: str | None = flag(None, "hub id, folder or file to take a built-in task's problems from")
    prompt_format: str | None = flag(None, "for a built-in task: one of " + ", ".join(data.PROMPTS))
    train_examples: int = flag(10_000, "at most so many examples to train on", at_least=1)
    reward: list[str] = field(default_factory=["countdown_equation", "countdown_format:0.1"].copy, metadata={
        "nargs": "+", "help": "NAME of rewards.py, or FILE.py:FUNCTION or package.module:FUNCTION, code that "
        "runs with your rights, each with :WEIGHT or not; the first decides accuracy: 1 or more is solved"})
    cold_start_steps: int = flag(0, "supervised steps first, for models that write no tags", at_least=0)
    cold_start_lr: float = flag(1e-5, "learning rate of the cold start, falling to zero over it", at_least=0)
    cold_start_batch: int = flag(64, "demonstrations in a step of the cold start", at_least=1)

    prompts_per_step: int = flag(32, "different prompts in a step", at_least=1, group="sampling")
    group_size: int = flag(8, "answers sampled to each prompt, to be compared with one another", at_least=2)
    refill_rounds: int = flag(0, "times that a step may replace groups of equal rewards (DAPO)", at_least=0)
    max_new_tokens: int = flag(1024, "length limit of an answer, in tokens", at_least=1)
    temperature: float = flag(1.0, "sampling temperature", above=0)
    sampler: Literal["own", "vllm"] = flag("own", "vllm: sample with vLLM, if it is installed")
    max_rows: int | None = flag(None, "answers sampled at a time; default: what fits the memory", at_least=1)

    skip_truncated: bool = flag(False, "leave out answers that hit --max-new-tokens", group="the objective")
    loss_temperature: float | None = flag(None, "temperature in the loss; default: the sampling's", above=0)
    advantage_std: Literal["population", "sample", "batch", "none"] = flag(
        "population", "divisor of centred rewards: the group's deviation (/n, /(n-1)), the batch's, or none")
    advantage_eps: float = flag(1e-6, "added to that standard deviation", at_least=0)
    overlong_buffer: int = flag(0, "last tokens before the limit that cost reward (DAPO)", at_least=0)
    updates_per_batch: int = flag(1, "optimizer steps on a batch; 1 needs no ratio and no clip", at_least=1)
    ratio: Literal["token", "answer"] = flag("token", "one ratio a token, or one an answer (GSPO)")
    surrogate: Literal["clip", "cispo"] = flag("clip", "out of bounds: no gradient (clip), or capped (cispo)")
    clip_low: float = flag(0.2, "the ratio is clipped below at 1 - this", at_least=0, at_most=1)
    clip_high: float = flag(0.2, "and above at 1 + this", at_least=0)
    beta: float = flag(0.0, "coefficient of the KL divergence from a reference; 0 needs none", at_least=0)
    reference_every: int = flag(0, "steps after which the policy becomes the reference; 0: never", at_least=0)
    reference_url: str | None = flag(None, "the reference's server, http://...; key: GRPO_REFERENCE_TOKEN")
    importance_cap: float = flag(2.0, "largest weight that makes up for vLLM's sampling; 0: none", at_least=0)
    aggregation: Literal["token", "sequence", "constant"] = flag(
        "token", "average over all tokens (DAPO), within answers (GRPO), by max-new-tokens (Dr. GRPO)")
    top_entropy: float = flag(1.0, "share of tokens, by entropy, that the loss uses", above=0, at_most=1)

    learning_rate: float = flag(1e-6, "of AdamW", at_least=0, group="the optimizer")
    warmup_steps: int = flag(0, "steps in which the learning rate rises in a line", at_least=0)
    lr_schedule: Literal["constant", "linear"] = flag("constant", "after the warm-up; linear: to zero")
    weight_decay: float = flag(0.0, "decoupled, as in AdamW", at_least=0)
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm; 0 never clips", at_least=0)

    memory_budget_gib: float | None = flag(None, "in GiB; default: what is free", above=0, group="memory")
    offload_optimizer: bool = flag(False, "optimizer state in host memory: less GPU memory, slower")
    micro_batch_tokens: int | None = flag(None, "tokens in an update's pass; default: planned", at_least=1)

    eval_examples: int = flag(128, "held-out examples", at_least=1, group="evaluation and checkpoints")
    eval_every: int = flag(50, "steps between evaluations; 0: only before and after", at_least=0)
    eval_samples: int = flag(0, "also sample so many answers to each; report accuracy and pass@k", at_least=0)
    save_every: int = flag(50, "steps between checkpoints; 0: none by steps", at_least=0)
    save_minutes: float = flag(30.0, "minutes between checkpoints; 0: none by time", at_least=0)
    keep_checkpoints: int = flag(2, "keep so many checkpoints, the newest; 0 keeps all", at_least=0)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = flag("none", "send the metrics there too")

    # What a call does. It is no setting of a run: neither saved, nor compared when a run is resumed.
    resume: str | None = flag(None, "go on from a checkpoint folder, a run's folder or `latest`; settings "
                              "are taken over from it", group="instead of a new run", mode=True)
    ask: str | None = flag(None, "print the greedy answer to this text, or to an example as a JSON object, "
                           "with rewards; no text: to each line of the input", mode=True, nargs="?", const="")
    eval_only: bool = flag(False, "evaluate the model, or the run that is resumed, and stop", mode=True)
    plan_only: bool = flag(False, "print what takes how much memory; exit code 2: it doesn't fit", mode=True)

    def __post_init__(self):
        for f in fields(self):
            value, bounds = getattr(self, f.name), {k: x for k, x in f.metadata.items() if k in BOUNDS}
            if get_origin(f.type) is Literal and value not in get_args(f.type):
                self.refuse(f.name, f"use one of {', '.join(get_args(f.type))}")
            kept = (BOUNDS[k](value, x) for k, x in bounds.items())
            if isinstance(value, (int, float)) and not (math.isfinite(value) and all(kept)):
                must = [f"{k.replace('_', ' ')} {x}" for k, x in bounds.items()]
                self.refuse(f.name, f"must be {' and '.join([*must, 'finite'])}")
        if self.overlong_buffer > self.max_new_tokens:
            self.refuse("overlong_buffer", f"must be at most --max-new-tokens, {self.max_new_tokens}")
        if self.warmup_steps > max(self.steps, 1):
            self.refuse("warmup_steps", f"must be at most --steps, {self.steps}")
        self.loss_temperature = self.loss_temperature or self.temperature
        frozen = self.reference_every == self.cold_start_steps == 0 and self.loss_temperature == 1
        is_url = (self.reference_url or "").startswith(("http://", "https://"))
        if self.reference_url and not (is_url and frozen and self.beta > 0):
            self.refuse("reference_url", "must begin with http:// or https://; the server's reference stays "
                        "as it is, at temperature 1, so it needs --beta above 0, --loss-temperature 1, "
                        "--reference-every 0 and --cold-start-steps 0")
        if self.prompt_format and self.task not in data.PROMPTS:
            self.refuse("prompt_format", "a file's prompts are used as they stand; drop it")
        formats = [name for name in data.PROMPTS if ("gsm8k" in name) == (self.task == "gsm8k")]
        if self.prompt_format and self.prompt_format not in formats:
            self.refuse("prompt_format", f"with --task {self.task}, use one of {', '.join(formats)}")

    def refuse(self, name: str, must: str) -> None:
        raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: {must}")

    def settings(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self) if "mode" not in f.metadata}


MAY_CHANGE = {"steps", "name", "output_dir", "device", "dtype", "trust_remote_code", "max_rows", "report_to",
              "reference_url", "learning_rate", "warmup_steps", "lr_schedule", "memory_budget_gib",
              "offload_optimizer", "micro_batch_tokens", "eval_every", "eval_samples", "save_every",
              "save_minutes", "keep_checkpoints"}  # when a run is resumed

RECIPES: dict[str, dict] = {
    "tiny": {"model": "embedded", "task": "mini-countdown", "steps": 200, "max_new_tokens": 24,
             "eval_examples": 120, "learning_rate": 5e-4, "lr_schedule": "linear", "micro_batch_tokens": 2048,
             "cold_start_steps": 400, "cold_start_lr": 3e-3, "cold_start_batch": 32},
    # The source's rate, 1e-5, breaks a real model: tests/README.md. clip_high is for more updates of a batch.
    "improved": {"temperature": 0.5, "skip_truncated": True, "beta": 0.01, "reference_every": 10,
                 "clip_high": 0.3, "top_entropy": 0.2},
    "nano-aha": {"model": "Qwen/Qwen2.5-3B", "prompts_per_step": 16, "group_size": 4, "advantage_eps": 1e-4,
                 "beta": 0.001, "reward": ["countdown_equation", "countdown_strict_format"]},
    "grpo-zero": {"model": "Qwen/Qwen2.5-3B-Instruct", "loss_temperature": 1.0, "advantage_eps": 1e-4,
                  "learning_rate": 1e-5},
    "simple-grpo": {"model": "Qwen/Qwen2.5-7B", "task": "gsm8k", "prompts_per_step": 4, "temperature": 0.9,
                    "max_new_tokens": 700, "loss_temperature": 1.0, "advantage_std": "sample",
                    "advantage_eps": 1e-4, "beta": 0.04, "aggregation": "sequence", "max_grad_norm": 0.0,
                    "reward": ["gsm8k_last_number", "gsm8k_signed_format"]},
    "lm-book": {"task": "gsm8k", "prompt_format": "gsm8k-reasoning", "prompts_per_step": 4, "group_size": 16,
                "max_new_tokens": 500, "loss_temperature": 1.0, "advantage_std": "sample",
                "advantage_eps": 1e-4, "updates_per_batch": 3, "clip_low": 0.1, "clip_high": 0.1,
                "beta": 0.04, "reference_every": 500, "aggregation": "sequence", "learning_rate": 5e-6,
                "max_grad_norm": 0.1, "reward": ["gsm8k_answer", "reasoning_tags"]},
    "dapo": {"refill_rounds": 3, "overlong_buffer": 256, "updates_per_batch": 2, "clip_high": 0.28},
    "dr-grpo": {"advantage_std": "none", "aggregation": "constant"},
    "gspo": {"updates_per_batch": 2, "ratio": "answer", "clip_low": 3e-4, "clip_high": 4e-4,
             "aggregation": "sequence"},
    "cispo": {"advantage_std": "batch", "updates_per_batch": 2, "surrogate": "cispo", "clip_high": 4.0},
}


def find_device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def make_config(recipe: str = "auto", **overrides) -> Config:
    """A recipe's settings with `overrides`. Raises InputError for unknown names and values out of range."""
    if recipe == "auto":
        recipe = "improved" if find_device(overrides.get("device", "auto")) == "cuda" else "tiny"
    if recipe not in RECIPES:
        raise InputError(f"--recipe {recipe}: no such recipe; use auto or one of {', '.join(RECIPES)}")
    own, names = RECIPES[recipe], [f.name for f in fields(Config)]
    if unknown := [name for name in overrides if name not in names]:
        raise InputError(f"{unknown[0]}: no such setting; the settings are {', '.join(names)}")
    settings = {**own, "recipe": recipe, **overrides}
    own_format = own.get("prompt_format") if settings.get("task") == own.get("task") else None
    return Config(**settings | {"prompt_format": overrides.get("prompt_format") or own_format})


# ---- The run -----------------------------------------------------------------------------------------------

@dataclass
class Run:
    """A run under way. `open_run` fills in its parts. A checkpoint saves what `progress` names."""

    config: Config
    device: str
    folder: Path = Path()
    examples: list[dict] = field(default_factory=list)
    heldout: list[dict] = field(default_factory=list)
    rewards: dict[str, tuple[Callable, float]] = field(default_factory=dict)  # name: (function, weight)
    longest: int = 0  # tokens of the longest prompt and its answer
    policy: data.Policy | None = None
    # As memory.sample: prompts -> Completions; without entropies if another engine's: compare_with_sampler.
    sampler: Callable | None = None
    reference: Callable | None = None  # sequences -> log-probabilities of their tokens that count
    limits: memory.Limits = field(default_factory=lambda: memory.Limits(1, 1, 0, 0))
    optimizer: memory.AdamW8bit | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)  # of the sampler's random numbers
    shuffle: random.Random = field(default_factory=random.Random)
    order: list[dict] = field(default_factory=list)  # the examples, pass after pass, each in a new order
    spent: Counter = field(default_factory=Counter)  # seconds of this step in sampling and scoring
    midway: bool = False  # this step has changed weights, and is not done
    step: int = 0
    bad_steps: int = 0  # in a row
    drawn: int = 0  # examples that the steps so far have used
    random_state: Tensor | None = None  # the generator's after them; a step that fails may have drawn more
    evaluations: list[dict] = field(default_factory=list)  # the first one is of before the first step

    progress: ClassVar = ("step", "bad_steps", "drawn", "random_state", "evaluations")

    @property
    def dtype(self) -> torch.dtype:
        automatic = "bfloat16" if self.device == "cuda" else "float32"
        return getattr(torch, automatic if self.config.dtype == "auto" else self.config.dtype)

    def next_examples(self, drawn: int, count: int) -> list[dict]:
        """The `count` examples that follow the first `drawn` ones."""
        while len(self.order) < drawn + count:
            self.order += self.shuffle.sample(self.examples, len(self.examples))
        return self.order[drawn : drawn + count]

    def attempt(self, phase: str, work: Callable, items: list, **options) -> list:
        """The lists that work(run, items, **options) makes on all ranks, put together. When memory runs out
        in the phase "rollout" or "update", it shrinks the limits, clears the gradients, and starts over. An
        error on one rank is raised on every rank. At the least it raises DoesNotFit, or StepLost."""
        def until_it_fits() -> list:
            while True:
                if phase == "update":
                    self.policy.model.zero_grad(set_to_none=True)
                try:
                    return work(self, items, **options) or []
                except RuntimeError as error:
                    if not memory.is_out_of_memory(error):
                        raise
                    smaller = self.limits.shrink(phase, longest=max(map(len, items), default=0))
                    if smaller is None:
                        raise (StepLost if self.midway else memory.DoesNotFit)(
                            f"out of memory in the {phase} with the least that can be done at a time; try a "
                            "shorter --max-new-tokens, --offload-optimizer or a smaller --model") from error
                # Outside the handler, because the exception holds on to the failed attempt's tensors.
                warn(f"out of memory; again with {smaller}")
                torch.cuda.empty_cache()  # nothing on a CPU

        return memory.gather(until_it_fits)

    def state_dict(self) -> dict:
        """Numbers, text and tensors only, so that it loads with weights_only=True: it can't run code."""
        weights = getattr(self.reference, "weights", None)  # a server keeps its own
        return {"config": self.config.settings(), "limits": asdict(self.limits),
                "optimizer": self.optimizer.state_dict(), "reference": weights,
                **{name: getattr(self, name) for name in self.progress}}

    def load_state_dict(self, state: dict) -> None:
        if hasattr(self.reference, "weights") != (state["reference"] is not None):
            raise ValueError("one of the two has its reference on a server; see --reference-url")
        self.optimizer.load_state_dict(state["optimizer"])
        if state["reference"] is not None:
            self.reference.load_state_dict(state["reference"])
        for name in self.progress:
            setattr(self, name, state[name])
        self.generator.set_state(self.random_state)

    def save(self) -> None:
        keep = 0 if self.bad_steps else self.config.keep_checkpoints  # none goes while numbers go wrong
        data.save_checkpoint(self.policy, self.state_dict(), self.folder, keep)


def open_run(config: Config) -> Run | None:
    """All parts of a run, at its start or where its checkpoint left them; None if it is only planned. Nothing
    is written yet. The plan comes before the weights: none are read when they can't fit."""
    if config.report_to != "none":
        data.import_service(config.report_to)  # refused now, where it is missing
    run, writes = Run(config, meet_ranks(config)), not (config.eval_only or config.plan_only)
    checkpoint = config.resume and data.find_checkpoint(config.resume, config.output_dir, config.name)
    named = Path(config.output_dir, config.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    run.folder = memory.gather(lambda: [checkpoint.parent if checkpoint else named])[0]
    state, model = checkpoint and data.load_state(checkpoint), str(checkpoint or config.model)
    model_config, tokenizer = read_inputs(run, model)
    plan = make_plan(run, model_config, state)
    if config.plan_only:
        return None
    if writes:
        # A checkpoint: weights, a reference, two moments of a byte with scales, bf16 masters' lower halves.
        byte, saves = run.dtype.itemsize, bool(config.save_every or config.save_minutes)
        has_reference = config.beta > 0 and not config.reference_url
        checkpoint_bytes = byte * (1 + has_reference) + 2 + 8 / 256 + 2 * (byte == 2)
        data.refuse_folder(run.folder, not config.resume, plan.parameters * (byte + checkpoint_bytes * saves))
    make_parts(run, model, model_config, tokenizer, plan)
    if state and writes:
        with told_as_input(f"--resume {checkpoint}: its state doesn't suit this run (go on with the device, "
                           "dtype and model that it was made with)", (KeyError, RuntimeError, ValueError)):
            run.load_state_dict(state)
        say(f"resumed after step {run.step} from {checkpoint}")
    return run


def meet_ranks(config: Config) -> str:
    """Let torchrun's ranks meet. Returns the device. Raises InputError when they can't work together."""
    device = find_device(config.device)
    if not (config.plan_only and config.memory_budget_gib):  # a plan may be for a card that isn't there
        with told_as_input(f"--device {config.device}"):
            memory.join_ranks(device)
    if device == "cpu" and torch.version.cuda is None and shutil.which("nvidia-smi"):
        warn("there is an NVIDIA driver, but this torch has no CUDA, so the CPU computes; install the torch "
             "with CUDA that https://pytorch.org/get-started/locally names")
    if len({json.dumps(x) for x in memory.gather(lambda: [config.settings()])}) > 1:
        raise InputError("the ranks were given different settings; start all with the same command line")
    if (ranks := memory.my_rank()[1]) > config.prompts_per_step:
        config.refuse("prompts_per_step", f"{ranks} ranks need at least as many")
    return device


@contextmanager
def told_as_input(what: str, kinds: tuple = (ValueError,)) -> Iterator[None]:
    """Turn what memory.py and rewards.py refuse within it into an InputError about `what`."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{what}: {error}") from error


def read_inputs(run: Run, model: str) -> tuple:
    """Read data and rewards into the run, and refuse bad ones. Returns the model's config and tokenizer."""
    config = run.config
    loaded = data.load_task(
        config.task, dataset=config.dataset, prompt_format=config.prompt_format, seed=config.seed,
        train_examples=config.train_examples, eval_examples=config.eval_examples)
    if not config.plan_only:
        if not config.reward:
            config.refuse("reward", "name at least one")
        run.rewards, one = rewards.load_rewards(config.reward, warn), loaded[0][:1]
        with told_as_input(f"--task {config.task}"):
            rewards.check_rows(run.rewards, loaded[0] + loaded[1])
            rewards.score_batch(run.rewards, [one[0]["prompt"]], ["<answer>1</answer>"], one, [[1]])
    model_config, tokenizer = data.load_config(model, trust_remote_code=config.trust_remote_code)
    run.examples, run.heldout = (data.tokenize(tokenizer, model_config, rows, config.max_new_tokens)
                                 for rows in loaded)
    run.longest = config.max_new_tokens + max(len(e["prompt_ids"]) for e in run.examples + run.heldout)
    with told_as_input(f"--model {config.model}"):
        memory.refuse_short_windows(model_config, run.longest)
    for example in run.examples if config.cold_start_steps and not config.eval_only else []:
        data.demonstration_ids(tokenizer, model_config, example, random.Random(0))
    say(f"recipe {config.recipe} on {run.device}, {str(run.dtype).removeprefix('torch.')} (choose otherwise "
        f"with --recipe and --device)\nmodel  {config.model}\n"
        f"task   {config.task}, {len(run.examples)} examples to train on, {len(run.heldout)} held out\n"
        f"reward {' + '.join(f'{weight:g} x {name}' for name, (_, weight) in run.rewards.items())}")
    if tokenizer.chat_template is None and isinstance(run.examples[0]["prompt"], list):
        warn(f"{config.model} has no chat template; its prompts are the messages' plain text")
    return model_config, tokenizer


def make_plan(run: Run, model_config, state: dict | None) -> memory.MemoryPlan:
    """The memory plan. A resumed run keeps its limits if they fit, because others would round otherwise."""
    config, ranks, given = run.config, memory.my_rank()[1], run.config.memory_budget_gib
    if run.device == "cuda":
        with told_as_input(f"--dtype {config.dtype}"):
            memory.prepare_cuda(run.dtype, expandable=config.sampler == "own")
    budget = int(given * 2**30) if given else memory.detect_budget_bytes(run.device)
    planned = partial(
        memory.plan, model_config, prompt_tokens=run.longest - config.max_new_tokens, dtype=run.dtype,
        max_new_tokens=config.max_new_tokens, prompts=math.ceil(config.prompts_per_step / ranks),
        group_size=config.group_size, memory_budget_bytes=min(memory.gather(lambda: [budget])), ranks=ranks,
        reference=config.beta > 0 and not config.reference_url, offload_optimizer=config.offload_optimizer,
        evaluated=math.ceil(config.eval_examples * max(1, config.eval_samples) / ranks), device=run.device,
        training=not config.eval_only, top_entropy=config.top_entropy, engine=config.sampler == "vllm",
        trust_remote_code=config.trust_remote_code)
    plan, asked = None, {"max_rows": config.max_rows, "micro_batch_tokens": config.micro_batch_tokens}
    if state and all(getattr(config, name) == state["config"].get(name)
                     for name in ("memory_budget_gib", "offload_optimizer")):
        with suppress(memory.DoesNotFit):  # there may be less memory than before
            plan = planned(**{k: asked.get(k) or state["limits"][k] for k in (*asked, "recomputed_layers")})
    plan = plan or planned(**asked)
    say(f"{plan.parameters / 1e6:.1f} M parameters\n{plan.table()}")
    if plan.host_bytes > (free := memory.detect_budget_bytes("cpu")):
        warn(f"this takes {plan.host_bytes / 1e9:.1f} GB of host memory, and {free / 1e9:.1f} GB are free")
    return plan


def make_parts(run: Run, model: str, model_config, tokenizer, plan: memory.MemoryPlan) -> None:
    """Read the weights, and make what computes."""
    config, run.limits = run.config, plan.limits
    # Cap torch, so that CUDA can load kernels later. Not with vLLM: the cap counts what it gives back asleep.
    if run.device == "cuda" and config.sampler == "own":
        total = torch.cuda.get_device_properties(run.device).total_memory
        allowed = memory.ALLOCATOR_SHARE * plan.memory_budget_bytes
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    policy = open_policy(run, model, model_config, tokenizer)
    if config.reference_url and not config.eval_only:
        run.reference = memory.ReferenceServer(config.reference_url, longest=run.longest, warn=warn)
    elif config.beta > 0 and not config.eval_only:
        run.reference = memory.ReferencePolicy(policy.model, lambda sequences: [
            x[0] for x in all_logprobs(run, sequences, config.loss_temperature)])
    if config.sampler == "vllm":
        with told_as_input("--sampler vllm"):
            run.sampler = memory.VLLMSampler(policy.model, stops=policy.stops, max_rows=run.limits.max_rows,
                                             max_model_len=run.longest, kv_cache_bytes=plan.kv_cache_bytes)
    run.optimizer = memory.AdamW8bit(policy.model.parameters(), config.learning_rate,
                                     weight_decay=config.weight_decay, offload=config.offload_optimizer)
    run.generator.manual_seed(config.seed)
    run.shuffle.seed(config.seed)
    run.random_state = run.generator.get_state()


def open_policy(run: Run, model: str, model_config, tokenizer) -> data.Policy:
    """Load the policy and prepare it for sampling and updates. Raises InputError when its logits are not
    simply hidden @ head.T, or its attention can't take packed tokens."""
    policy = data.load_policy(model, model_config, tokenizer, dtype=run.dtype, device=run.device,
                              seed=run.config.seed, trust_remote_code=run.config.trust_remote_code)
    with told_as_input(f"--model {model}"):
        memory.prepare_model(policy.model)
    memory.sum_gradients_in_fp32(policy.model.parameters())
    run.policy, run.sampler = policy, partial(memory.sample, policy.model, eos_token_id=policy.stops,
                                              pad_token_id=policy.pad_token_id)
    return policy


@contextmanager
def stop_requests(run: Run) -> Iterator[list[int]]:
    """Within it the first Ctrl-C or SIGTERM goes into the list given; the second one stops at once. If an
    error of the user's ends the run, the steps so far are saved, on all ranks."""
    signals, own = [], os.getpid()

    def note(number: int, frame) -> None:
        if os.getpid() != own and number == signal.SIGINT:
            return  # in a process that a reward has forked: the terminal's Ctrl-C is for the run
        if signals or os.getpid() != own:
            os._exit(128 + number)  # what is on disk is whole; no code of ours runs any more
        signals.append(number)
        with suppress(RuntimeError):  # the signal came while a line was written
            warn("stopping after this step; a second time stops at once")

    if run.config.reference_url:
        run.reference.stop = lambda: bool(signals)
    previous = {}
    with suppress(ValueError):  # only a main thread may set handlers; a notebook's is stopped by its notebook
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    except (*ONE_LINE, KeyboardInterrupt) as error:  # an interrupt comes from a process that a reward started
        known_to_all = memory.my_rank()[1] == 1 or hasattr(error, "on_all_ranks")
        if known_to_all and not isinstance(error, StepLost):
            run.save()
            if saved := data.checkpoints(run.folder):
                say(f"saved after step {data.step_of(saved[-1])}; go on with --resume {run.folder}")
        if signals:  # they ended the waiting for a server
            sys.exit(128 + signals[0])
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start(run: Run) -> None:
    """What comes before the first step: the cold start and the first evaluation."""
    if run.config.cold_start_steps:
        cold_start(run)
        if run.reference:
            run.reference.refresh()
    if run.config.reference_url:
        check_reference(run)
    evaluate(run)


def check_reference(run: Run) -> None:
    """Raise memory.NoReference unless the server's model is the policy, by what both make of prompts."""
    sequences = [TrainSequence(x[:1], x[1:]) for e in run.heldout[:8] if len(x := e["prompt_ids"]) > 1]
    pairs = zip(all_logprobs(run, sequences, 1.0), run.reference(sequences))
    gaps = [gap for own, served in pairs for gap in (own[0].cpu() - served).abs().tolist()]
    if gaps and not (gap := statistics.fmean(gaps)) <= 0.1:  # bfloat16 makes it about 0.03
        raise memory.NoReference(f"the reference server's model {run.reference.model} is not the policy's: a "
                                 f"token's log-probabilities are {gap:.2g} nats apart; serve --model's")


def finish(run: Run, dashboard, metrics: list[dict], started: float, stopped_by, signals: list[int]) -> dict:
    """The end of a run: the final model, its evaluation, the picture and the summary, which is returned."""
    after, done = {}, stopped_by is None
    if done:
        if not data.save_folder(run.policy, run.folder / "final"):  # before the evaluation, which may fail
            raise InputError(f"{run.folder / 'final'} can't be written; make room")
        after = evaluate(run)
        dashboard.log(after, prefix="held-out/")
        data.save_best(run.policy, run.folder, after)
        stopped_by = signals[0] if signals else None  # it came in the evaluation, and is the exit code
    if metrics:  # none with --steps 0
        data.draw_curves(metrics, run.evaluations, run.folder / "curves.png")
    summary = {"recipe": run.config.recipe, "steps": run.step, "seconds": time.monotonic() - started,
               "peak_memory_bytes": memory.peak_memory(run.device), "evaluations": run.evaluations,
               "best": data.best_evaluation(run.folder), "stopped_by": stopped_by}
    for name in ("accuracy", "reward", "sampled_accuracy", "pass_at_k"):
        summary |= {f"{name}_before": run.evaluations[0].get(name), f"{name}_after": after.get(name)}
    with data.only_warned("summary.json can't be written", OSError):
        data.write_json(run.folder / "summary.json", summary)
    if done:
        say(data.report(summary, run.config.eval_samples, run.folder))
    else:
        say(f"stopped after step {run.step} ({stopped_by}); go on with --resume {run.folder}")
    return summary


def warn_of_trouble(metrics: list[dict], warned: set[str]) -> None:
    """Warn once of each way in which a run stops learning, with what usually helps."""
    is_cut = lambda m: m["truncated_fraction"] == 1
    is_dropped = lambda m: "every answer truncated" in (m.get("skipped") or "")
    longer = "a longer --max-new-tokens, or --cold-start-steps to teach an answer's form, usually helps"
    troubles = {  # message: what each of so many last steps shows
        f"every answer is cut and left out for 3 steps; --skip-truncated false, {longer}": (3, is_dropped),
        f"every answer is cut for 20 steps; {longer}": (20, lambda m: is_cut(m) and not is_dropped(m)),
        "no group's rewards have had spread for 20 steps, so nothing is learned; easier examples, a larger "
        "--group-size, a higher --temperature or a reward with more steps usually helps":
            (20, lambda m: m["groups_without_spread"] == 1 and not is_cut(m)),
        "scoring takes more than a fifth of each step; a reward for all answers at once can use processes":
            (3, lambda m: m.get("scoring_seconds", 0) > m["seconds"] / 5),
    }
    for message, (steps, shows) in troubles.items():
        if message not in warned and len(metrics) >= steps and all(map(shows, metrics[-steps:])):
            warned.add(message)
            warn(message)


def train(config: Config) -> dict:
    """One run. Returns what summary.json holds; `stopped_by`, a signal's number or "bad steps", tells that it
    ended early, with a checkpoint. Raises InputError, RewardError, DoesNotFit or NoReference."""
    started, settings = time.monotonic(), config.settings()
    transformers.utils.logging.disable_progress_bar()  # the bars are ours
    run = open_run(config)
    if run is None:
        return {"recipe": config.recipe}
    if config.eval_only:
        return {"recipe": config.recipe, **evaluate(run)}
    if not run.evaluations:
        start(run)
    run.optimizer.make_state()  # while the memory is in one piece
    warned, stopped_by, saved_at = set(), None, time.monotonic()
    bar = tqdm(range(run.step + 1, config.steps + 1), "GRPO", config.steps, initial=run.step,
               disable=not data.has_terminal())
    with (stop_requests(run) as signals,
          closing(data.Dashboard(config.report_to, run.folder, settings, run.step)) as dashboard):
        # The first things on disk: a run that can't start, or is stopped before, leaves nothing.
        with told_as_input(f"--output-dir {config.output_dir}: can't be written to", (OSError,)):
            metrics = data.open_folder(run.folder, settings, run.step)
        if run.step == 0:
            data.save_best(run.policy, run.folder, run.evaluations[0])
            dashboard.log(run.evaluations[0], prefix="held-out/")
        for step in bar:
            record, episodes = grpo_step(run)
            metrics.append(record)
            data.append_lines(run.folder / "metrics.jsonl", [record])
            data.append_lines(run.folder / "samples.jsonl", sample_records(step, episodes))
            dashboard.log(record)
            data.show_step(bar, record, config.steps)
            warn_of_trouble(metrics, warned)
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                data.save_best(run.policy, run.folder, evaluate(run))
                data.draw_curves(metrics, run.evaluations, run.folder / "curves.png")
                dashboard.log(run.evaluations[-1], prefix="held-out/")
            stops = ["bad steps"] * (run.bad_steps >= 5) + memory.gather(lambda: list(signals))  # of any rank
            stopped_by = stops[0] if stops else None
            minutes = max(memory.gather(partial(list, [(time.monotonic() - saved_at) / 60])))
            due = (config.save_every and step % config.save_every == 0
                   or config.save_minutes and minutes >= config.save_minutes)
            if (due and not run.bad_steps) or stopped_by is not None:
                run.save()
                saved_at = time.monotonic()
            if stopped_by is not None:
                break
        bar.close()
        return finish(run, dashboard, metrics, started, stopped_by, signals)


def ask(config: Config) -> None:
    """Print the greedy answer to `config.ask`, or to each line of the input; to an example with rewards."""
    checkpoint = config.resume and data.find_checkpoint(config.resume, config.output_dir, config.name)
    model, run = str(checkpoint or config.model), Run(config, meet_ranks(config))
    chosen = rewards.load_rewards(config.reward, warn)
    model_config, tokenizer = data.load_config(model, trust_remote_code=config.trust_remote_code)
    open_policy(run, model, model_config, tokenizer)
    getattr(sys.stdin, "reconfigure", dict)(encoding="utf-8-sig", errors="surrogateescape")  # notebooks: none
    for text in [config.ask] if config.ask else filter(str.strip, sys.stdin):
        try:
            example = data.asked_example(text.strip(), config.prompt_format or config.task)
            run.rewards = chosen if example.keys() - {"prompt"} else {}
            asked = data.tokenize(tokenizer, model_config, [example], config.max_new_tokens)
            with told_as_input(f"--model {model}"):
                memory.refuse_short_windows(model_config, len(example["prompt_ids"]) + config.max_new_tokens)
            [episode] = rollout(run, asked, group_size=1, temperature=0.0)
            say(episode.text)
            if run.rewards:
                told = ", ".join(f"{k} {'none' if x is None else f'{x:g}'}" for k, x in episode.parts.items())
                say(f"reward {episode.reward:g} ({told})")
        except ONE_LINE as error:
            if config.ask:
                raise
            warn(str(error))  # and the next line is read


# ---- The command line --------------------------------------------------------------------------------------

def make_parser() -> argparse.ArgumentParser:
    """A flag for each field of Config. One that is not given is not in the result."""
    def fail(message: str):
        raise InputError(f"{message}; see python grpo_scratch.py --help")

    def boolean(text: str) -> bool:
        return ("false", "true").index(text.lower()) == 1

    parser = argparse.ArgumentParser(
        usage="python grpo_scratch.py [--recipe NAME] [--flag VALUE ...]", add_help=False,
        description=__doc__.splitlines()[0], allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, group = fail, parser
    for f in fields(Config):
        if "group" in f.metadata:
            group = parser.add_argument_group(f.metadata["group"])
        how = {k: f.metadata[k] for k in ("help", "nargs", "const") if k in f.metadata}
        if get_origin(f.type) is Literal:
            how["choices"] = get_args(f.type)
        elif f.type is bool:
            how |= {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
        else:
            how["type"] = next(iter(get_args(f.type)), f.type)  # int of `int | None`, str of list[str]
        group.add_argument(f"--{f.name.replace('_', '-')}", **how)
    group.add_argument("-h", "--help", action="store_true", help="print this, with the defaults of --recipe")
    return parser


def settings_of_run(model: str) -> dict:
    """Task, prompts and rewards of the run in whose folder a model's folder lies; {} if it lies in none."""
    path = Path(model).absolute().parent / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is not the settings of a run ({error}); give --recipe") from error
    names = ("recipe", "seed", "task", "dataset", "prompt_format", "reward", "max_new_tokens", "temperature",
             "eval_examples") if isinstance(saved, dict) and "recipe" in saved else ()  # or another program's
    return {name: saved[name] for name in names if name in saved}


def parse_command_line(arguments: list[str] | None = None) -> Config:
    """The Config that a command line asks for. Defaults come from a recipe, or from an existing run."""
    parser, settings, taken = make_parser(), fields(Config), {}
    given, modes = vars(parser.parse_args(arguments)), {f.name for f in settings if "mode" in f.metadata}
    wants_help = given.pop("help", False)
    if "resume" in given and (checkpoint := data.find_checkpoint(
            given["resume"], given.get("output_dir", Config.output_dir), given.get("name"))):
        given["resume"], saved = str(checkpoint), data.load_state(checkpoint)["config"]
        for name, unused in (("reward_model", None), ("recomputed_layers", None), ("max_bad_steps", 5)):
            if saved.get(name, unused) != unused:
                raise InputError(f"--resume {checkpoint}: it used --{name.replace('_', '-')}, which is no "
                                 "setting any more; go on with the version that made it")
        changed = [f"--{n.replace('_', '-')} was {saved[n]}, not {given[n]}" for n in given
                   if n in saved and n not in {*MAY_CHANGE, *modes} and given[n] != saved[n]]
        if changed:
            raise InputError(f"--resume {checkpoint}: {', '.join(changed)}; drop it, or start a new run. "
                             f"These may change: {', '.join(sorted(MAY_CHANGE))}")
        # Permission to run code must be given again. The limits come from the checkpoint's state.
        own = {"trust_remote_code", *modes}
        taken = {f.name: saved[f.name] for f in settings if f.name in saved and f.name not in own}
        taken |= {"max_rows": None, "micro_batch_tokens": None}
    elif not given.keys().isdisjoint(modes) and "recipe" not in given and "resume" not in given:
        taken = settings_of_run(given.get("model", ""))
    code = [x for x in taken.get("reward", []) if x.partition(":")[0] not in rewards.REWARDS]
    if code and "reward" not in given and not given.get("plan_only"):
        told = f"the run's reward is code, {' '.join(code)}; if you trust it, give it again with --reward"
        if "ask" not in given:
            raise InputError(told)
        warn(f"{told}; it is left out")
        taken["reward"] = [x for x in taken["reward"] if x not in code]
    config = make_config(**{"recipe": "auto", **taken, **given})
    if wants_help:
        parser.epilog = f"recipes: {', '.join(RECIPES)}; the defaults above are those of {config.recipe}"
        parser.set_defaults(**config.settings())
        parser.print_help()
        sys.exit(0)
    return config


def main() -> None:
    """Run what the command line asks for. A mistake of the user's ends with one line on stderr and exit code
    2, Ctrl-C with 130, SIGTERM with 143, a run stopped by bad steps with 1."""
    own = os.getpid()  # a reward's processes leave Ctrl-C to this one
    signal.signal(signal.SIGINT, lambda *x: os.getpid() == own and signal.default_int_handler(*x))
    try:
        config = parse_command_line()
        stopped_by = ask(config) if config.ask is not None else train(config).get("stopped_by")
    except (*ONE_LINE, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not memory.is_out_of_memory(error):
            raise
        alone = not hasattr(error, "on_all_ranks")
        if alone and not data.first_rank():
            time.sleep(3)  # where the first rank has met the same, torchrun ends this one before it tells it
        say(f"error: {error}", sys.stderr, from_all=alone)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first step, where there is nothing to save yet
        sys.exit(130)
    if stopped_by is not None:
        sys.exit(128 + stopped_by if isinstance(stopped_by, int) else 1)


if __name__ == "__main__":
    main()
