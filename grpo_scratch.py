"""GRPO from scratch: train every weight of a language model by reinforcement learning, on one GPU or a CPU.

    python grpo_scratch.py            # Qwen2.5-0.5B with CUDA, a tiny embedded policy without
    python grpo_scratch.py --model ./my-qwen --task mine.jsonl --reward my_rewards.py:reward
    python grpo_scratch.py --help

After the settings comes `grpo_step`, which is the algorithm; then its parts in the order in which it calls
them: sampling, advantages, the update, the loss; then evaluation, the run and the command line. Left out on
purpose: adapters (every weight is trained), and any sampling but by temperature, because top-p or top-k would
draw from another distribution than the one the loss differentiates.
"""

import dataclasses
import difflib
import json
import math
import operator
import os
import random
import signal
import statistics
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin

# Idle threads of torch's OpenMP spin for milliseconds by default; on two cores of which one is busy, that
# makes small operations tens of times slower. It is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import data
import memory
import rewards
from data import InputError, Policy, say, warn

until_it_fits = partial(memory.until_it_fits, tell=warn)  # again with less, when memory runs out


# ---- One step of GRPO --------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One sampled answer on its way through a step."""

    example: dict
    group: int  # answers that were sampled together, to one prompt, share it
    prompt: list[int]  # token ids
    completion: memory.Completion
    text: str
    reward: float
    parts: dict[str, float]  # unweighted scores by reward name
    advantage: float = 0.0
    importance: Tensor | None = None  # [n], when another engine has sampled; see compare_with_sampler


def grpo_step(run: "Run") -> tuple[dict, list[Episode]]:
    """One step of GRPO, start to end: its line of metrics.jsonl, and its episodes."""
    config, step, started, waited = run.config, run.step + 1, time.monotonic(), memory.waited_seconds

    episodes, kept, spread, drawn = sample_batch(run)
    sampled = time.monotonic()

    # Advantages: how much better each answer is than the others to its prompt.
    advantages = group_advantages(
        torch.tensor([e.reward for e in kept], dtype=torch.float64),
        torch.tensor([e.group for e in kept], dtype=torch.long),
        config.advantage_std, config.advantage_eps,
    )
    for episode, advantage in zip(kept, advantages.tolist()):
        episode.advantage = advantage

    # Where another engine has sampled: the entropies, and each token's weight pi_update / pi_sampler, capped.
    compared = compare_with_sampler(run, kept)

    # Update the policy on the tokens that count.
    sequences = train_sequences(kept, config)
    rate = config.learning_rate * min(1.0, step / max(config.warmup_steps, 1))
    if config.lr_schedule == "linear":
        rate *= 1 - (step - 1) / config.steps
    set_learning_rate(run.optimizer, rate)
    learned, skipped = {}, None
    if not all(math.isfinite(x) for e in episodes for x in e.completion.logprobs):
        learned, skipped = {"bad_updates": 1}, "sampled probabilities are not finite"
    elif sequences:
        learned = update(run.policy, run.reference, run.optimizer, sequences, config, run.limits)
    else:
        skipped = f"nothing to learn: {'no group with spread' if kept else 'every answer truncated'}"
    if run.reference and config.reference_every and step % config.reference_every == 0:
        run.reference.refresh()

    run.limits.grow()
    groups, run.drawn = drawn - run.drawn, drawn
    run.step, run.random_state = step, run.generator.get_state()
    run.bad_steps = run.bad_steps + 1 if learned.get("bad_updates") else 0
    record = step_metrics(step, episodes, learned | compared, skipped, rate) | {
        "groups_drawn": groups,
        "groups_without_spread": (groups - len(spread)) / groups,
        "groups_kept": len(spread),
        "sampling_tokens_per_second": sum(len(e.completion.ids) for e in episodes) / (sampled - started),
        "update_tokens_per_second": sum(map(len, sequences)) / (time.monotonic() - sampled),
        "seconds": time.monotonic() - started,
        "waited_seconds": memory.waited_seconds - waited,
        "peak_memory_bytes": memory.peak_memory(run.device),
    }
    return record, episodes


def sample_batch(run: "Run") -> tuple[list[Episode], list[Episode], set[int], int]:
    """Groups of scored answers: (all episodes, those kept for the update, groups with spread, `drawn`).

    In a refill (DAPO's dynamic sampling), groups of fresh prompts take the places of those without spread,
    which nothing could be learned from. `drawn` counts the run's prompts so far.
    """
    config, episodes, kept, spread, drawn = run.config, [], [], set(), run.drawn
    lacking = config.prompts_per_step
    for _ in range(1 + config.refill_rounds):
        kept = [e for e in kept if e.group in spread]
        fresh = rollout(
            run, run.next_examples(drawn, lacking), group_size=config.group_size,
            temperature=config.temperature, generator=run.generator, first_group=drawn - run.drawn,
        )
        episodes, drawn = episodes + fresh, drawn + lacking
        kept += [e for e in fresh if e.completion.finished or not config.skip_truncated]
        one_of = {e.group: e.reward for e in kept}
        spread = {e.group for e in kept if e.reward != one_of[e.group]}  # not all rewards are equal
        lacking = config.prompts_per_step - len(spread)
        if not lacking:
            break
    return episodes, kept, spread, drawn


# ---- Advantages, and which tokens count how much -----------------------------------------------------------


def group_advantages(
    rewards: Tensor, groups: Tensor, std: Literal["population", "sample", "batch", "none"] = "population",
    eps: float = 1e-6,
) -> Tensor:
    """How much better each answer is than the others to its prompt: (r - mean) / (std + eps) in its group.

    rewards[E], groups[E] (equal numbers, same group) -> advantages[E], float32. DeepSeekMath (arXiv
    2402.03300), section 4.1.2; std "batch" divides by the deviation of all rewards instead (arXiv 2508.08221,
    section 4.1), "none" by nothing (Dr. GRPO, arXiv 2503.20783). A group whose rewards are equal, or a group
    of one, has advantages of exactly 0.
    """
    index = groups.unique(return_inverse=True)[1]
    rewards = rewards.double()
    count = torch.bincount(index).double()
    total = lambda x: torch.zeros_like(count).index_add_(0, index, x)
    largest, smallest = (torch.zeros_like(count).scatter_reduce_(0, index, rewards, how, include_self=False)
                         for how in ("amax", "amin"))
    # By equality, as the rounded mean of equal rewards may be 1e-17 off, which the division would blow up.
    equal = (largest == smallest)[index]
    centred = rewards - (total(rewards) / count)[index]
    if std == "batch":
        centred /= (rewards - rewards.mean()).square().mean().sqrt() + eps
    elif std != "none":
        degrees = (count - int(std == "sample")).clamp(min=1)
        centred /= (total(centred**2) / degrees).sqrt()[index] + eps
    return torch.where(equal, 0.0, centred).float()


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
        return torch.ones_like(lengths) / (len(lengths) * max_new_tokens)
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
    ref_logprobs: Tensor | None = None, clip_low: float = 0.2, clip_high: float = 0.2, beta: float = 0.0, *,
    answers: Tensor | None = None, surrogate: Literal["clip", "cispo"] = "clip",
    importance: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO loss over tokens, all arguments of any one shape: (0-dim loss, stats).

    Without `old_logprobs` the batch is exactly on-policy: the ratio pi/pi_old is 1 whatever its gradient,
    clipping can't act, and A * logprob has the same gradient as A * ratio. With them, "clip" is PPO's
    surrogate (arXiv 1707.06347, eq. 7; two bounds as in DAPO, arXiv 2503.14476): a token that is clipped has
    no gradient. "cispo" (arXiv 2506.13585, eqs. 4 and 5) makes min(ratio, 1 + clip_high) a mere weight of
    A * logprob: every token keeps its gradient, and clip_low is unused.

    `answers`, int64[n], any number for each answer that the n tokens belong to, makes it GSPO (arXiv
    2507.18071): a token's logprob and logprob - old are replaced by their means over its answer's tokens
    here, so these share one ratio, and the gradient goes to all of them. `importance` weighs the surrogate
    and has no gradient. The KL term, always the token's own, is the k3 estimator (GRPO, arXiv 2402.03300,
    eq. 4).

    stats, over the tokens given: the mean `kl` with a reference; with old log-probabilities the share that
    clipping changed, `clip_fraction`, its parts `clip_low_fraction` and `clip_high_fraction`, and the
    extremes `ratio_min` and `ratio_max`.
    """
    stats = {}

    def of_answer(x: Tensor) -> Tensor:
        if answers is None:
            return x
        _, index, tokens = answers.unique(return_inverse=True, return_counts=True)
        means = x.new_zeros(len(tokens)).index_add(0, index, x) / tokens
        return means.index_select(0, index)  # means[index] would add up gradients as threads arrive

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
        shares = {"clip_fraction": changed, "clip_low_fraction": changed & (ratio < clipped),
                  "clip_high_fraction": changed & (ratio > clipped)}
        stats = {name: share.float().mean() for name, share in shares.items()}
        stats["ratio_min"], stats["ratio_max"] = ratio.detach().aminmax()
    if importance is not None:
        objective = objective * importance.detach()
    if ref_logprobs is not None:
        difference = ref_logprobs - logprobs
        kl = difference.exp() - difference - 1
        objective = objective - beta * kl
        stats["kl"] = kl.detach().mean()
    return -(weights * objective).sum(), stats


# ---- The update --------------------------------------------------------------------------------------------


@dataclass
class TrainSequence:
    """An episode as the update sees it: m of its n completion tokens count in the loss."""

    prompt: list[int]
    completion: list[int]
    counted: Tensor  # int64[m]: which of the completion's tokens, from 0
    advantages: Tensor  # [m], as all that follow
    weights: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    importance: Tensor | None = None
    sampled_logprobs: Tensor | None = None  # the sampler's, where the update's should equal them

    @classmethod
    def whole(cls, prompt: list[int], completion: list[int], weight: float = 0.0) -> "TrainSequence":
        """One of which every token counts, with an advantage of 1 and the same weight: 0 learns nothing."""
        m = len(completion)
        return cls(prompt, completion, torch.arange(m), torch.ones(m), torch.full((m,), weight))

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion) - 1  # the last token is predicted, never read


def train_sequences(episodes: list[Episode], config: "Config") -> list[TrainSequence]:
    """What is to be learned from episodes that have their advantages.

    Token weights and the high-entropy mask are taken over the whole batch; then, without a KL term, episodes
    of advantage 0, as in groups without spread, are dropped: their gradient is zero.
    """
    lengths = torch.tensor([len(e.completion.ids) for e in episodes])
    weights = token_weights(lengths, config.aggregation, config.max_new_tokens).tolist()
    entropies = torch.tensor([entropy for e in episodes for entropy in e.completion.entropies])
    masks = high_entropy_mask(entropies, config.top_entropy).split(lengths.tolist())
    every = lambda mask, value: torch.full((int(mask.sum()),), value)
    comparable = (config.loss_temperature or config.temperature) == config.temperature
    return [
        TrainSequence(e.prompt, e.completion.ids, mask.nonzero().squeeze(1), every(mask, e.advantage),
                      every(mask, weight), importance=None if e.importance is None else e.importance[mask],
                      sampled_logprobs=torch.tensor(e.completion.logprobs)[mask] if comparable else None)
        for e, mask, weight in zip(episodes, masks, weights)
        if (e.advantage != 0 or config.beta > 0) and mask.any()
    ]


class StepLost(memory.DoesNotFit):
    """Memory ran out when part of a step had already changed weights: they must not be saved."""


MOST_APART = 0.2  # nats; bfloat16 alone makes 0.03 between two engines

# What `update` measures, and before it compare_with_sampler: means over the updates, and extremes.
LEARNED = ("loss", "kl", "clip_fraction", "clip_low_fraction", "clip_high_fraction", "ratio_min", "ratio_max",
           "grad_norm", "sampler_gap", "importance", "importance_capped")
EXTREMES = {"ratio_min": min, "ratio_max": max}


def update(
    policy: Policy, reference: Callable | None, optimizer, sequences: list[TrainSequence], config: "Config",
    limits: memory.Limits,
) -> dict:
    """`updates_per_batch` optimizer steps on one batch; returns metrics: means over the updates, and with
    several of them `updates`, one record each.

    reference: sequences -> log-probabilities[m] of each. A loss or gradient that is not finite changes
    nothing. Of several ranks, each computes its share of the sequences.
    """
    tokens = sum(len(s.counted) for s in sequences)
    sequences = memory.share(sequences, [len(s) for s in sequences])

    def ask_reference() -> list:
        for sequence, logprobs in zip(sequences, reference(sequences)):
            sequence.ref_logprobs = logprobs
        return []

    def gradients(first: bool) -> list[dict]:
        return until_it_fits(
            partial(compute_gradients, policy, limits, sequences, tokens,
                    config.loss_temperature or config.temperature,
                    become_old=first and config.updates_per_batch > 1, ratio=config.ratio,
                    surrogate=config.surrogate, clip_low=config.clip_low, clip_high=config.clip_high,
                    beta=config.beta),
            limits, "update", longest=max(map(len, sequences), default=0),
            gives_up=memory.DoesNotFit if first else StepLost,
        )

    if reference is not None:
        memory.gather(ask_reference)  # what goes wrong on one rank, all are told
    records = []
    for number in range(config.updates_per_batch):
        parts = memory.gather(partial(gradients, number == 0))
        records.append(optimizer_step(optimizer, parts, config.max_grad_norm))
    metrics = {"updates": records if len(records) > 1 else None,
               "bad_updates": sum(None in record.values() for record in records)}
    for name in LEARNED:
        values = [record[name] for record in records if record.get(name) is not None]
        join = EXTREMES.get(name, statistics.fmean)
        metrics[name] = join(values) if values else None
    return metrics


def compute_gradients(
    policy: Policy, limits: memory.Limits, sequences: list[TrainSequence], tokens: int, temperature: float,
    *, become_old: bool = False, ratio: str = "token", **loss_options,
) -> list[dict[str, float]]:
    """The gradients of these sequences' loss, micro-batch after micro-batch.

    Returns of each its loss, and each mean of grpo_loss times the share that it has of the batch's `tokens`
    that count, on all ranks. With `become_old`, the log-probabilities computed here are the `old_logprobs` of
    the updates to come.
    """
    policy.model.zero_grad(set_to_none=True)  # of an attempt that ran out of memory
    parts: list[dict[str, Tensor]] = []
    for batch in in_micro_batches(sequences, limits):
        logprobs, _ = memory.sequence_logprobs(policy.model, batch, temperature, limits.recomputed_layers)
        if become_old:
            for sequence, old in zip(batch, logprobs.detach().split([len(s.counted) for s in batch])):
                sequence.old_logprobs = old
        of_batch = {
            name: torch.cat([getattr(s, name) for s in batch]).to(logprobs.device)
            for name in ("advantages", "weights", "old_logprobs", "ref_logprobs", "importance")
            if getattr(batch[0], name) is not None
        }
        if ratio == "answer":
            of_batch["answers"] = torch.arange(len(batch)).repeat_interleave(
                torch.tensor([len(s.counted) for s in batch])
            ).to(logprobs.device)
        loss, stats = grpo_loss(logprobs, **of_batch, **loss_options)
        if batch[0].sampled_logprobs is not None and (become_old or batch[0].old_logprobs is None):
            sampled = torch.cat([s.sampled_logprobs for s in batch]).to(logprobs.device)
            stats["sampler_gap"] = (logprobs.detach() - sampled).abs().mean()
        loss.backward()
        share = len(logprobs) / tokens  # the loss is a sum, its statistics are means or extremes
        scaled = {name: x if name in EXTREMES else share * x for name, x in stats.items()}
        parts.append({"loss": loss.detach(), **scaled})
    return [{name: float(x) for name, x in part.items()} for part in parts]


def in_micro_batches(sequences: list[TrainSequence], limits: memory.Limits) -> list[list[TrainSequence]]:
    lengths, prompts = [len(s) for s in sequences], [tuple(s.prompt) for s in sequences]
    batches = memory.micro_batches(lengths, limits.micro_batch_tokens, prompts)
    return [[sequences[i] for i in batch] for batch in batches]


@torch.no_grad()
def all_logprobs(
    policy: Policy, limits: memory.Limits, temperature: float, sequences: list[TrainSequence],
    entropies: bool = False,
) -> list[Tensor]:
    """Log-probabilities[m] of each sequence's tokens that count, from the very code that the update runs;
    with `entropies`, these follow: [2, m]."""
    def attempt() -> dict[int, Tensor]:
        found = {}
        for batch in in_micro_batches(sequences, limits):
            numbers = torch.stack(memory.sequence_logprobs(policy.model, batch, temperature))
            parts = numbers.split([len(s.counted) for s in batch], dim=1)
            found |= {id(s): part if entropies else part[0] for s, part in zip(batch, parts)}
        return found

    found = until_it_fits(attempt, limits, "update", longest=max(map(len, sequences), default=0))
    return [found[id(s)] for s in sequences]


def optimizer_step(optimizer, parts: list[dict[str, float]], max_grad_norm: float) -> dict:
    """One step on the clipped gradients, which are gone after it; none if a number is not finite.

    Returns what compute_gradients gave, on all ranks, put together, and the gradient's norm; None for what is
    not finite. Raises StepLost when memory runs out, as a step half done can't be made again.
    """
    record = {name: EXTREMES.get(name, sum)([part[name] for part in parts]) for name in parts[0]}
    try:
        record["grad_norm"] = float(optimizer.sum_gradients(max_grad_norm or math.inf))
        record = {name: x if math.isfinite(x) else None for name, x in record.items()}  # JSON has no NaN
        if None not in record.values():
            optimizer.step()
    except RuntimeError as error:
        if not memory.is_out_of_memory(error):
            raise
        raise StepLost("out of memory in the optimizer's step, which may be half done; go on from the last "
                       "checkpoint with --offload-optimizer or a smaller --memory-budget-gib") from error
    optimizer.zero_grad(set_to_none=True)
    return record


def set_learning_rate(optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def step_metrics(step: int, episodes: list[Episode], learned: dict, skipped: str | None, rate: float) -> dict:
    """Of one line of metrics.jsonl what comes from answers and update; null is what the step did not have."""
    mean = statistics.fmean
    entropies = [entropy for e in episodes for entropy in e.completion.entropies if math.isfinite(entropy)]
    return {
        "step": step,
        "reward": mean([e.reward for e in episodes]),
        **{f"reward/{name}": mean([e.parts[name] for e in episodes]) for name in episodes[0].parts},
        "accuracy": mean([is_solved(e) for e in episodes]),
        "completion_length": mean([len(e.completion.ids) for e in episodes]),
        "truncated_fraction": mean([not e.completion.finished for e in episodes]),
        "entropy": mean(entropies or [0.0]),
        **{name: learned.get(name) for name in (*LEARNED, "bad_updates", "updates")},
        "learning_rate": rate,
        "skipped": skipped,
    }


# ---- Rollout: answers and their scores ---------------------------------------------------------------------


def rollout(
    run: "Run", examples: list[dict], *, group_size: int, temperature: float,
    generator: torch.Generator | None = None, limits: memory.Limits | None = None, first_group: int = 0,
) -> list[Episode]:
    """Sample `group_size` answers to each example, as many at a time as the memory allows, and score them.

    Of several ranks, each does so with its share of the examples, and all get all episodes.
    """
    config, limits, mine = run.config, limits or run.limits, memory.my_slice(len(examples))
    prompts, uniform = [example["prompt_ids"] for example in examples[mine]], None
    if temperature:
        # The same on all ranks, on the CPU and before any attempt: running out of memory changes no sample.
        uniform = torch.rand(len(examples) * group_size, config.max_new_tokens, dtype=torch.float64,
                             generator=generator)[mine.start * group_size : mine.stop * group_size]

    def attempt() -> list[Episode]:
        if not prompts:
            return []
        completions = until_it_fits(
            lambda: run.sampler(prompts, group_size=group_size, max_new_tokens=config.max_new_tokens,
                                temperature=temperature, uniform=uniform, max_rows=limits.max_rows),
            limits, "rollout",
        )
        groups = [mine.start + i // group_size for i in range(len(completions))]
        # Without the EOS.
        texts = run.policy.tokenizer.batch_decode([c.ids[:-1] if c.finished else c.ids for c in completions])
        scores = run.score([examples[group] for group in groups], texts)
        return [
            Episode(examples[group], first_group + group, examples[group]["prompt_ids"], completion, text,
                    reward, parts)
            for group, completion, text, (reward, parts) in zip(groups, completions, texts, scores)
        ]

    episodes = memory.gather(attempt)
    for e in episodes if config.overlong_buffer else []:
        e.parts["overlong"] = overlong_penalty(
            len(e.completion.ids), config.max_new_tokens, config.overlong_buffer
        )
        e.reward += e.parts["overlong"]
    return episodes


def overlong_penalty(length: int, max_new_tokens: int, buffer: int) -> float:
    """What an answer of `length` tokens, its EOS counted, loses for coming near the limit: from 0 at
    max_new_tokens - buffer down in a line to -1 at the limit (DAPO, arXiv 2503.14476, eq. 13)."""
    if buffer == 0:
        return 0.0
    return max(-1.0, min(0.0, (max_new_tokens - buffer - length) / buffer))


def scorer(
    weights: dict[str, float], limits: memory.Limits, reward_model: data.RewardModel | None = None,
    reward_model_weight: float = 1.0,
) -> Callable[[list[dict], list[str]], list[tuple[float, dict[str, float]]]]:
    """A function (examples, texts) -> [(reward, parts by name)], by `rewards.score` and a reward model."""
    def score(examples: list[dict], texts: list[str]) -> list[tuple[float, dict[str, float]]]:
        scores = [rewards.score(text, example, weights) for example, text in zip(examples, texts)]
        if reward_model is None:
            return scores
        answers = [(example["prompt"], text) for example, text in zip(examples, texts)]
        judged = until_it_fits(
            lambda: reward_model.scores(answers, limits.reward_rows), limits, "reward model"
        )
        if not all(map(math.isfinite, judged)):
            raise rewards.RewardError("--reward-model: it gave a score that is not a finite number; try "
                                      "--dtype float32, or another model")
        return [(reward + reward_model_weight * x, {**parts, "reward_model": x})
                for (reward, parts), x in zip(scores, judged)]

    return score


def is_solved(episode: Episode) -> bool:
    """The first reward decides: a score of 1 or more."""
    return next(iter(episode.parts.values())) >= 1.0


def compare_with_sampler(run: "Run", episodes: list[Episode]) -> dict[str, float | None]:
    """After another engine has sampled: the entropies, which it doesn't give, and each token's `importance`,
    min(exp(the update's log-probability - the sampler's), cap), both at the sampling temperature; metrics.

    Truncated importance sampling (Ionides 2008) makes up for another arithmetic. It can't for other weights:
    raises InputError when log-probabilities are more than MOST_APART on average.
    """
    if not episodes or episodes[0].completion.entropies:
        return {}  # our own sampler, whose gap the update sees in passing
    config, sequences = run.config, [TrainSequence.whole(e.prompt, e.completion.ids) for e in episodes]
    own = all_logprobs(run.policy, run.limits, config.temperature, sequences, entropies=True)
    logprobs, entropies = torch.cat(own, dim=1).cpu()
    sampled = torch.tensor([x for e in episodes for x in e.completion.logprobs])
    gap = (logprobs - sampled).abs().mean().item()
    if gap > MOST_APART:
        raise InputError(
            f"--sampler {config.sampler}: the update's log-probabilities are {gap:.2g} nats from the "
            "sampler's; usually it has other weights or another temperature than the policy (another version "
            "of vLLM?); use --sampler own"
        )
    ratio, lengths = (logprobs - sampled).exp(), [len(s.completion) for s in sequences]
    importance = ratio.clamp(max=config.importance_cap)
    for e, h, weights in zip(episodes, entropies.split(lengths), importance.split(lengths)):
        e.completion.entropies = h.tolist()
        e.importance = weights if config.importance_cap else None
    metrics = {"sampler_gap": gap}
    if config.importance_cap:
        metrics |= {"importance": importance.mean().item(),
                    "importance_capped": (ratio > config.importance_cap).float().mean().item()}
    return {name: x if math.isfinite(x) else None for name, x in metrics.items()}  # JSON has no NaN


# ---- Evaluation and cold start -----------------------------------------------------------------------------


def evaluate(run: "Run") -> dict:
    """Greedy accuracy on held-out examples, pass@k of k = `eval_samples` sampled answers (0: none), and the
    first three greedy answers to show. Draws from random numbers of its own: training never notices."""
    config = run.config
    say(f"evaluating {len(run.heldout)} held-out examples")
    # Limits of its own: when its memory runs out, training goes on with as many rows as before.
    roll = partial(rollout, run, run.heldout, limits=dataclasses.replace(run.limits, planned={}))
    greedy = roll(group_size=1, temperature=0.0)
    result = {"step": run.step, "accuracy": sum(map(is_solved, greedy)) / len(greedy), "pass_at_k": None}
    if config.eval_samples:
        sampled = roll(group_size=config.eval_samples, temperature=config.temperature,
                       generator=torch.Generator().manual_seed(config.seed))
        result["pass_at_k"] = len({e.group for e in sampled if is_solved(e)}) / len(run.heldout)
    run.evaluations.append(dict(result))
    shown = [(data.last_request(e.example["prompt"]), e.text, is_solved(e)) for e in greedy[:3]]
    return {**result, "shown": shown}


def cold_start(run: "Run") -> None:
    """Supervised steps on demonstrations: the mean log-probability of their tokens is raised.

    It is GRPO's loss with every advantage 1 and the weights of "token". The rate falls linearly to zero.
    """
    config, tokenizer, rng = run.config, run.policy.tokenizer, random.Random(run.config.seed)
    steps, optimizer = config.cold_start_steps, new_optimizer(run.policy, config, config.cold_start_lr, 0.0)
    for example in run.examples:  # one without a demonstration is refused before the first step
        data.demonstration(example, random.Random(0))
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    bar = tqdm(range(steps), "cold start", leave=False, disable=not data.has_terminal())
    for step in bar:
        batch = [rng.choice(run.examples) for _ in range(config.cold_start_batch)]
        answers = [encode(data.demonstration(e, rng)) for e in batch]
        tokens = sum(map(len, answers))
        sequences = [TrainSequence.whole(e["prompt_ids"], x, 1 / tokens) for e, x in zip(batch, answers)]
        set_learning_rate(optimizer, config.cold_start_lr * (1 - step / steps))
        mine = memory.share(sequences, [len(s) for s in sequences])
        parts = memory.gather(partial(
            until_it_fits, partial(compute_gradients, run.policy, run.limits, mine, tokens, 1.0),
            run.limits, "update", longest=max(map(len, mine), default=0),
        ))
        loss = f"{optimizer_step(optimizer, parts, max_grad_norm=1.0)['loss'] or math.nan:.3f}"
        bar.set_postfix(loss=loss)
        if bar.disable and (step + 1) % math.ceil(steps / 10) == 0:
            say(f"cold start {step + 1}/{steps} loss {loss}")


# ---- Settings ----------------------------------------------------------------------------------------------

BOUNDS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le}


def flag(default, text: str, **metadata):
    """A field of Config: its default, its help text and, where they apply, the BOUNDS of its value; `group`,
    the title in `--help` of the flags from here on; `may_change`, when a run is resumed."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class Config:
    """Every setting of a run. A recipe changes defaults, a flag beats the recipe."""

    recipe: str = flag("auto", "row of settings to start from; auto: improved with CUDA, tiny without",
                       group="the run")
    list_recipes: bool = flag(False, "print the recipes, each as the flags it stands for, and stop")
    plan_only: bool = flag(False, "print what would take how much memory and stop, exit code 2 if it doesn't "
                           "fit; loads no weights; --device cuda --memory-budget-gib 12 is for such a card")
    ask: str | None = flag(None, "print the --model's greedy answer to this text, as the user's turn of the "
                           "run's prompt (a file's: all of it), or to a JSON object, an example, with its "
                           "rewards; without a text: to each line of the input", nargs="?", const="")
    steps: int = flag(500, "optimization steps; each samples prompts-per-step x group-size answers",
                      at_least=0, may_change=True)
    seed: int = flag(0, "of embedded weights, data and sampling; a CPU run repeats bit for bit")
    name: str | None = flag(None, "folder of the run below --output-dir; default: recipe and start time",
                            may_change=True)
    output_dir: str = flag("runs", "folder that holds the runs", may_change=True)
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto: cuda where there is one", may_change=True)

    model: str = flag("Qwen/Qwen2.5-0.5B-Instruct", "hub id, folder, or embedded (tiny, made in memory)",
                      group="policy, data and reward")
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "auto", "auto: bfloat16 on CUDA, and on CPUs that compute in it for more than 50 M parameters",
        may_change=True,
    )
    trust_remote_code: bool = flag(False, "run Python code that comes with the model", may_change=True)
    task: str = flag("countdown", "countdown, gsm8k, mini-countdown, or a jsonl, json, csv or parquet file "
                     "with a `prompt` column (text used as it stands, or a list of chat messages)")
    dataset: str | None = flag(None, "hub id, folder or file to take a built-in task's problems from")
    prompt_format: str | None = flag(
        None, f"for a built-in task: one of {', '.join(data.PROMPTS)}; default: its own"
    )
    train_examples: int = flag(10_000, "at most so many examples to train on", at_least=1)
    reward: list[str] = field(
        default_factory=lambda: ["countdown_equation", "countdown_format:0.1"],
        metadata={"help": "rewards to add up: NAME or NAME:WEIGHT with a name of rewards.py, or "
                  "FILE.py:FUNCTION with your own (completion, example) -> float: code that runs with your "
                  "rights; the first one decides accuracy: a score of 1 or more is solved"},
    )
    reward_model: str | None = flag(None, "hub id or folder of a one-label classifier; adds its score")
    reward_model_weight: float = flag(1.0, "weight of that score")
    cold_start_steps: int = flag(0, "supervised steps before GRPO, for models that never write the tags",
                                 at_least=0)
    cold_start_lr: float = flag(1e-5, "learning rate of the cold start, falling to zero over it", at_least=0)
    cold_start_batch: int = flag(64, "demonstrations in a step of the cold start", at_least=1)

    prompts_per_step: int = flag(32, "different prompts in a step", at_least=1, group="sampling")
    group_size: int = flag(8, "answers sampled for each prompt, to be compared with one another", at_least=2)
    refill_rounds: int = flag(0, "times that a step may replace groups of equal rewards by fresh ones (DAPO)",
                              at_least=0)
    max_new_tokens: int = flag(1024, "length limit of an answer, in tokens", at_least=1)
    temperature: float = flag(1.0, "sampling temperature", above=0)
    sampler: Literal["own", "vllm"] = flag("own", "vllm: sample with vLLM, if it is installed")
    max_rows: int | None = flag(None, "answers sampled at a time; default: as many as fit the memory",
                                at_least=1, may_change=True)

    loss_temperature: float | None = flag(None, "temperature in the loss; default: the sampling's", above=0,
                                          group="the objective")
    advantage_std: Literal["population", "sample", "batch", "none"] = flag(
        "population", "what centred rewards are divided by: their standard deviation (/n, /(n-1)), that of "
        "the batch's rewards (/n), or nothing"
    )
    advantage_eps: float = flag(1e-6, "added to that standard deviation", at_least=0)
    skip_truncated: bool = flag(False, "leave out answers that hit --max-new-tokens")
    overlong_buffer: int = flag(0, "an answer's last so many tokens before --max-new-tokens lower its "
                                "reward, by up to 1 at the limit (DAPO); 0: no such penalty", at_least=0)
    updates_per_batch: int = flag(1, "optimizer steps on each batch; 1 needs no ratio and no clip",
                                  at_least=1)
    ratio: Literal["token", "answer"] = flag("token", "of each token, or one for all of an answer's (GSPO)")
    surrogate: Literal["clip", "cispo"] = flag(
        "clip", "what a ratio out of bounds does: its token has no gradient, or the bound's weight (CISPO)"
    )
    clip_low: float = flag(0.2, "with several updates: the ratio is clipped below at 1 - this", at_least=0,
                           at_most=1)
    clip_high: float = flag(0.2, "and above at 1 + this", at_least=0)
    beta: float = flag(0.0, "coefficient of the KL divergence from a reference policy; 0 needs none",
                       at_least=0)
    reference_every: int = flag(0, "steps between copies of the policy into the reference; 0: never",
                                at_least=0)
    reference_url: str | None = flag(
        None, "server of the reference's log-probabilities, such as http://host:8000 with vLLM; its token, "
        "if it wants one, in the environment's GRPO_REFERENCE_TOKEN", may_change=True
    )
    importance_cap: float = flag(2.0, "with --sampler vllm: a token's weight is the update's probability by "
                                 "the sampler's, up to this; 0: no such weights", at_least=0)
    aggregation: Literal["token", "sequence", "constant"] = flag(
        "token", "average over all tokens (DAPO), within answers (GRPO), by max-new-tokens (Dr. GRPO)"
    )
    top_entropy: float = flag(1.0, "share of the answers' tokens, of highest entropy, that the loss uses",
                              above=0, at_most=1)

    learning_rate: float = flag(1e-6, "of AdamW", at_least=0, may_change=True, group="the optimizer")
    warmup_steps: int = flag(0, "steps in which the learning rate rises to that, in a line", at_least=0,
                             may_change=True)
    lr_schedule: Literal["constant", "linear"] = flag("constant", "linear falls to zero over the run",
                                                      may_change=True)
    weight_decay: float = flag(0.0, "decoupled, as in AdamW", at_least=0)
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm; 0 never clips", at_least=0)

    memory_budget_gib: float | None = flag(None, "memory to plan for, in GiB; default: what is free", above=0,
                                           may_change=True, group="memory")
    offload_optimizer: bool = flag(False, "optimizer state in host memory: less GPU memory, slower",
                                   may_change=True)
    micro_batch_tokens: int | None = flag(None, "tokens in a forward pass of the update; default: planned",
                                          at_least=1, may_change=True)
    recomputed_layers: int | None = flag(None, "layers computed again in backward; default: planned",
                                         at_least=0, may_change=True)

    eval_every: int = flag(50, "steps between evaluations on held-out examples; 0: only before and after",
                           at_least=0, may_change=True, group="evaluation and checkpoints")
    eval_examples: int = flag(128, "held-out examples", at_least=1)
    eval_samples: int = flag(0, "sample so many answers to each held-out example too; report pass@k",
                             at_least=0, may_change=True)
    eval_only: bool = flag(False, "evaluate the model and stop")
    save_every: int = flag(50, "steps between checkpoints; 0: none by steps", at_least=0, may_change=True)
    save_minutes: float = flag(30.0, "minutes between checkpoints, where that comes first; 0: none by time",
                               at_least=0, may_change=True)
    keep_checkpoints: int = flag(2, "keep this many checkpoints, the newest; 0 keeps all", at_least=0,
                                 may_change=True)
    resume: str | None = flag(None, "go on from a checkpoint folder, from the newest one of a run folder, or "
                              "from `latest`, the newest of the newest run; its settings are taken over",
                              may_change=True)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = flag(
        "none", "send the numbers of metrics.jsonl there too; a package of its own", may_change=True
    )
    max_bad_steps: int = flag(5, "stop after so many steps in a row without finite loss and gradient",
                              at_least=1, may_change=True)


RECIPES: dict[str, dict] = {
    "tiny": {
        "model": "embedded", "task": "mini-countdown", "steps": 200, "max_new_tokens": 24,
        "eval_examples": 120, "learning_rate": 5e-4, "lr_schedule": "linear", "micro_batch_tokens": 2048,
        "cold_start_steps": 400, "cold_start_lr": 3e-3, "cold_start_batch": 32,
    },
    "improved": {
        "temperature": 0.5, "skip_truncated": True, "beta": 0.01, "reference_every": 10,
        "clip_high": 0.3,  # for those who ask for more updates of a batch
        "top_entropy": 0.2,
        # The default's rate: with the source's, 1e-5, a real model falls apart, see tests/README.md.
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
    "dapo": {"refill_rounds": 3, "overlong_buffer": 256, "updates_per_batch": 2, "clip_high": 0.28},
    "dr-grpo": {"advantage_std": "none", "aggregation": "constant"},
    "gspo": {
        "updates_per_batch": 2, "ratio": "answer", "clip_low": 3e-4, "clip_high": 4e-4,
        "aggregation": "sequence",
    },
    "cispo": {"advantage_std": "batch", "updates_per_batch": 2, "surrogate": "cispo", "clip_high": 4.0},
}


def find_device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_recipe(recipe: str, device: str = "auto") -> str:
    """The recipe's name, with auto decided by the device. Raises InputError when there is no such recipe."""
    if recipe == "auto":
        return "improved" if find_device(device) == "cuda" else "tiny"
    if recipe not in RECIPES:
        raise InputError(f"--recipe {recipe}: no such recipe; use auto or one of {', '.join(RECIPES)}")
    return recipe


def make_config(recipe: str = "auto", **overrides) -> Config:
    """A recipe's settings with `overrides`, checked; InputError if unknown or out of range."""
    recipe = resolve_recipe(recipe, overrides.get("device", "auto"))
    own, names = RECIPES[recipe], [f.name for f in dataclasses.fields(Config)]
    if unknown := [name for name in overrides if name not in names]:
        raise InputError(f"{unknown[0]}: no such setting; the settings are {', '.join(names)}")
    config = Config(**{**own, "recipe": recipe, **overrides})
    if overrides.get("prompt_format") is None:  # the recipe's suits the recipe's task
        config.prompt_format = own.get("prompt_format") if config.task == own.get("task") else None
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raises InputError for the first value that no run can have."""
    def refuse(name: str, must: str):
        raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: {must}")

    for f in dataclasses.fields(config):
        value, bounds = getattr(config, f.name), {k: x for k, x in f.metadata.items() if k in BOUNDS}
        if get_origin(f.type) is Literal and value not in get_args(f.type):
            refuse(f.name, f"use one of {', '.join(get_args(f.type))}")
        if isinstance(value, (int, float)) and not (
            math.isfinite(value) and all(BOUNDS[k](value, bound) for k, bound in bounds.items())
        ):
            must = [f"{k.replace('_', ' ')} {bound}" for k, bound in bounds.items()]
            refuse(f.name, f"must be {' and '.join([*must, 'finite'])}")
    if config.ask is None and not (config.reward or config.reward_model):
        refuse("reward", "name at least one")
    if config.overlong_buffer > config.max_new_tokens:
        refuse("overlong_buffer", f"must be at most --max-new-tokens, {config.max_new_tokens}")
    if config.reference_url:
        if not config.reference_url.startswith(("http://", "https://")):
            refuse("reference_url", "must begin with http:// or https://")
        if config.beta == 0:
            refuse("reference_url", "nothing asks a reference; give --beta above 0, or drop it")
        if config.reference_every or config.cold_start_steps:
            refuse("reference_url", "a server's reference stays as it is: --reference-every 0 "
                   "--cold-start-steps 0 (start from a cold-started model, served too), or drop it")
        if (config.loss_temperature or config.temperature) != 1:
            refuse("reference_url", "a server's log-probabilities are at temperature 1: --loss-temperature 1")
    planned_for = config.plan_only and config.memory_budget_gib
    if config.device == "cuda" and not torch.cuda.is_available() and not planned_for:
        refuse("device", "torch sees no CUDA device; use --device cpu, or check the driver")
    gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if find_device(config.device) == "cuda" and local_rank >= max(gpus, 1):
        refuse("device", f"torchrun starts more processes than there are GPUs, {gpus}")
    if config.prompt_format is not None:
        formats = [name for name in data.PROMPTS if ("gsm8k" in name) == (config.task == "gsm8k")]
        if config.task in data.PROMPTS and config.prompt_format not in formats:
            refuse("prompt_format", f"with --task {config.task}, use one of {', '.join(formats)}")
        if Path(config.task).suffix in data.FILE_TYPES:
            refuse("prompt_format", "a file's prompts are used as they stand; drop it")


# ---- The run -----------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run under way: its parts, and from `before` on what changes from step to step."""

    config: Config
    device: str
    folder: Path
    policy: Policy
    examples: list[dict]
    heldout: list[dict]
    # (prompts' token ids, and `rollout`'s keywords) -> Completions, one prompt's after another's, drawn by
    # `uniform` alone, so that a run repeats. One that returns no entropies is another engine, whose
    # log-probabilities differ: compare_with_sampler computes the update's, and the importance of each token.
    sampler: Callable
    score: Callable  # examples, texts -> rewards and their parts; see `scorer`
    # sequences -> log-probabilities of their tokens that count
    reference: memory.ReferencePolicy | memory.ReferenceServer | None
    limits: memory.Limits
    optimizer: memory.AdamW8bit
    generator: torch.Generator  # the sampler draws from it
    inputs: dict[str, str] = field(default_factory=dict)  # hashes of what a resumed run should find as it was
    before: dict | None = None  # the evaluation before the first step
    step: int = 0
    bad_steps: int = 0  # in a row
    drawn: int = 0  # examples that the steps so far have used
    random_state: Tensor | None = None  # of the generator after them; a step that fails may have drawn more
    evaluations: list[dict] = field(default_factory=list)  # step, accuracy, pass@k

    progress: ClassVar = ("before", "step", "bad_steps", "drawn", "random_state", "evaluations")

    @property
    def is_new(self) -> bool:
        return self.before is None

    @property
    def has_reference_weights(self) -> bool:  # a server keeps its own
        return isinstance(self.reference, memory.ReferencePolicy)

    def next_examples(self, drawn: int, count: int) -> list[dict]:
        """Those that follow the first `drawn` ones: pass after pass over all, each in a new order."""
        shuffle, order = random.Random(self.config.seed), []
        while len(order) < drawn + count:
            order += shuffle.sample(self.examples, len(self.examples))
        return order[drawn : drawn + count]

    def save(self) -> None:
        # While numbers go wrong, no checkpoint from before that is removed.
        keep = 0 if self.bad_steps else self.config.keep_checkpoints
        data.save_checkpoint(self.policy, self.state_dict(), self.folder, keep)

    def state_dict(self) -> dict:
        """Numbers, text and tensors only, so that it loads with weights_only=True: it can't run code."""
        return {
            "config": dataclasses.asdict(self.config), "limits": dataclasses.asdict(self.limits),
            "optimizer": self.optimizer.state_dict(),
            "reference": self.reference.state_dict() if self.has_reference_weights else None,
            "inputs": self.inputs, **{name: getattr(self, name) for name in self.progress},
        }

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.reference and self.has_reference_weights != (state["reference"] is not None):
            raise ValueError("its reference was on a server and now is not, or the reverse; give "
                             "--reference-url as then")
        if self.has_reference_weights:
            self.reference.load_state_dict(state["reference"])
        for name in self.progress:
            setattr(self, name, state[name])
        self.generator.set_state(self.random_state)
        names = ("max_rows", "micro_batch_tokens", "recomputed_layers")
        if all(state["limits"][name] == getattr(self.limits, name) for name in names):
            vars(self.limits).update(state["limits"])  # they go on growing back


def open_run(config: Config) -> Run | None:
    """All parts of a run, at its start or where its checkpoint left them; nothing is written yet.

    The plan comes before the weights, of which nothing is read when they can't fit; with `plan_only`, it is
    all there is.
    """
    check_config(config)
    if config.report_to != "none":
        data.import_service(config.report_to)  # refused now, where it is missing
    device = find_device(config.device)
    memory.join_ranks(device)
    if len({json.dumps(x) for x in memory.gather(lambda: [dataclasses.asdict(config)])}) > 1:
        raise InputError("the ranks were given different settings; start all with the same command line")
    ranks = memory.my_rank()[1]
    if ranks > config.prompts_per_step:
        raise InputError(f"--prompts-per-step {config.prompts_per_step}: {ranks} ranks need at least as many")
    checkpoint = None
    if config.resume:
        checkpoint = data.find_checkpoint(config.resume, config.output_dir, config.name)
    folder = Path(config.output_dir) / (config.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = checkpoint.parent if checkpoint else Path(memory.gather(lambda: [str(folder)])[0])
    if not (config.eval_only or config.plan_only):
        data.refuse_folder(folder, new=not config.resume)
    torch.manual_seed(config.seed)
    weights = rewards.parse_rewards(config.reward)
    examples, heldout = data.load_task(
        config.task, dataset=config.dataset, prompt_format=config.prompt_format, seed=config.seed,
        train_examples=config.train_examples, eval_examples=config.eval_examples,
    )
    try:  # now, and not at the first answer that makes a reward look for a column the task lacks
        rewards.score("<answer>1</answer>", examples[0], weights)
    except rewards.RewardError as error:
        raise InputError(f"--task {config.task}: {error}; give a --reward that suits its rows") from error
    model, trusted = str(checkpoint or config.model), config.trust_remote_code
    model_config, tokenizer = data.load_config(model, trust_remote_code=trusted)
    longest = data.tokenize(tokenizer, model_config, examples + heldout, config.max_new_tokens)
    try:
        memory.refuse_short_windows(model_config, longest + config.max_new_tokens)
    except ValueError as error:
        raise InputError(str(error)) from error
    dtype = find_dtype(config, device, model_config)
    if device == "cpu":
        memory.keep_freed_memory()
    else:
        try:
            memory.prepare_cuda(dtype, expandable=config.sampler == "own")
        except ValueError as error:
            raise InputError(str(error)) from error
    state = data.load_state(checkpoint) if checkpoint else None
    plan = make_plan(config, model_config, device, dtype, longest, state)
    say(f"recipe {config.recipe} on {device}, {str(dtype).removeprefix('torch.')} "
        "(choose otherwise with --recipe and --device)")
    say(f"model  {config.model}, {plan.parameters / 1e6:.1f} M parameters")
    say(f"task   {config.task}, {len(examples)} examples to train on, {len(heldout)} held out")
    say(f"reward {' + '.join(f'{weight:g} x {name}' for name, weight in weights.items())}")
    if tokenizer.chat_template is None and isinstance(examples[0]["prompt"], list):
        warn(f"{config.model} has no chat template; its prompts are the messages' plain text")
    say(plan.table())
    if (needed := sum(plan.host.values())) > (free := memory.detect_budget_bytes("cpu")):
        warn(f"this takes {needed / 1e9:.1f} GB of host memory, of which {free / 1e9:.1f} GB are free")
    if config.plan_only:
        return None
    if not config.eval_only:
        # Of all ranks: Adam's moments, a byte each, and scales; bf16 masters' lower halves; the reference.
        byte = dtype.itemsize
        state_bytes = plan.parameters * (2 + 8 / 256 + 2 * (byte == 2) + byte * (config.beta > 0))
        kept = config.keep_checkpoints or config.steps // (config.save_every or config.steps or 1)
        saves = (kept + 1) * bool(config.save_every or config.save_minutes)  # the oldest goes last
        data.refuse_full_disk(folder, plan.parameters * byte, state_bytes, saves)

    # What is beyond the allocator's share is left to kernels that are loaded late. While vLLM sleeps, torch
    # goes on counting what vLLM has given back.
    if device == "cuda" and config.sampler == "own":
        total = torch.cuda.get_device_properties(device).total_memory
        allowed = memory.ALLOCATOR_SHARE * plan.memory_budget_bytes
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    policy = open_policy(model, tokenizer, dtype=dtype, device=device, seed=config.seed,
                         trust_remote_code=trusted)
    reward_model = config.reward_model and data.RewardModel(
        config.reward_model, dtype=dtype, device=device, trust_remote_code=trusted
    )
    limits, reference = plan.limits, None
    if config.reference_url and not config.eval_only:
        reference = memory.ReferenceServer(config.reference_url, tokenizer,
                                           longest=longest + config.max_new_tokens, warn=warn)
    elif config.beta > 0 and not config.eval_only:
        temperature = config.loss_temperature or config.temperature
        reference = memory.ReferencePolicy(policy.model, partial(all_logprobs, policy, limits, temperature))
    sampler = partial(memory.sample, policy.model, eos_token_id=policy.stops,
                      pad_token_id=policy.pad_token_id)
    if config.sampler == "vllm":
        try:
            sampler = memory.VLLMSampler(
                policy.model, stops=policy.stops, max_model_len=longest + config.max_new_tokens,
                kv_cache_bytes=plan.kv_cache_bytes, max_rows=limits.max_rows,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
    run = Run(
        config, device, folder, policy, examples, heldout, sampler,
        scorer(weights, limits, reward_model, config.reward_model_weight), reference, limits,
        new_optimizer(policy, config, config.learning_rate, config.weight_decay),
        torch.Generator().manual_seed(config.seed),
        data.fingerprints(examples, heldout, [x.split(":")[0] for x in config.reward if rewards.is_code(x)]),
    )
    run.random_state = run.generator.get_state()
    if state:
        try:
            run.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"--resume {checkpoint}: its state doesn't suit this run ({error}); go on with "
                             "the device, dtype and model that it was made with") from error
        if changed := [what for what, x in run.inputs.items() if state.get("inputs", {}).get(what, x) != x]:
            warn(f"not as they were when {checkpoint} was made: {', '.join(changed)}; the run goes on with "
                 "what is there now, and what it reports before and after is not the same thing")
        say(f"resumed after step {run.step} from {checkpoint}")
    return run


def find_dtype(config: Config, device: str, model_config) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return memory.fastest_dtype(device, model_config, config.trust_remote_code)


def make_plan(
    config: Config, model_config, device: str, dtype, prompt_tokens: int, state: dict | None
) -> memory.MemoryPlan:
    """The memory plan; a resumed run keeps its limits where they fit, as others would round otherwise."""
    given, ranks = config.memory_budget_gib, memory.my_rank()[1]
    budget = int(given * 2**30) if given else memory.detect_budget_bytes(device)
    planned = partial(
        memory.plan, model_config, prompt_tokens=prompt_tokens, max_new_tokens=config.max_new_tokens,
        dtype=dtype, prompts=math.ceil(config.prompts_per_step / ranks), group_size=config.group_size,
        reference=config.beta > 0 and not config.reference_url, offload_optimizer=config.offload_optimizer,
        memory_budget_bytes=min(memory.gather(lambda: [budget])), ranks=ranks,
        device=device, engine=config.sampler == "vllm",
        reward_model_bytes=data.reward_model_bytes(config.reward_model, dtype, config.trust_remote_code),
        top_entropy=config.top_entropy, training=not config.eval_only,
        evaluated=math.ceil(config.eval_examples * max(1, config.eval_samples) / ranks),
        trust_remote_code=config.trust_remote_code,
    )
    wanted = {name: getattr(config, name) for name in ("max_rows", "micro_batch_tokens", "recomputed_layers")}
    if state and all(getattr(config, name) == state["config"].get(name)
                     for name in ("memory_budget_gib", "offload_optimizer")):
        with suppress(memory.DoesNotFit):  # there may be less memory than before
            return planned(**{name: state["limits"][name] if x is None else x for name, x in wanted.items()})
    return planned(**wanted)


def open_policy(model: str, tokenizer, **options) -> Policy:
    """Load the policy and prepare it for the update; InputError when its logits are not simply
    hidden @ head.T, or its attention can't take packed tokens."""
    policy = data.load_policy(model, tokenizer, **options)
    try:
        memory.prepare_model(policy.model)
    except ValueError as error:
        raise InputError(f"--model {model}: {error}") from error
    memory.sum_gradients_in_fp32(policy.model.parameters())
    return policy


def new_optimizer(policy: Policy, config: Config, lr: float, weight_decay: float) -> memory.AdamW8bit:
    return memory.AdamW8bit(
        policy.model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay,
        offload=config.offload_optimizer,
    )


@contextmanager
def stop_requests(run: Run) -> Iterator[list[int]]:
    """Within it the first Ctrl-C or SIGTERM is noted in the list given, the second one stops at once.

    The steps so far are saved, on all ranks, before an error in a reward, of memory, a sampler or a server
    ends the run.
    """
    signals: list[int] = []

    def note(number: int, frame) -> None:
        if signals:
            os._exit(128 + number)  # what is on disk is whole; no code of ours runs any more
        signals.append(number)
        with suppress(RuntimeError):  # the signal came while a line was written
            warn("stopping after this step; a second time stops at once")

    if run.config.reference_url:
        run.reference.stop = lambda: bool(signals)
    # Another thread may set no handlers; there, as in a notebook's, whoever started it stops it.
    numbers = [signal.SIGINT, signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield signals
    except (InputError, rewards.RewardError, memory.DoesNotFit, memory.NoReference) as error:
        together = memory.my_rank()[1] == 1 or hasattr(error, "on_all_ranks")
        if together and not isinstance(error, StepLost):
            run.save()
            if (run.folder / f"checkpoint-{run.step}").exists():
                say(f"saved after step {run.step}; go on with --resume {run.folder}")
        if signals:  # they ended the waiting for a server
            sys.exit(128 + signals[0])
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start(run: Run) -> None:
    """What comes before the first step: the cold start and the first evaluation."""
    config = run.config
    if config.cold_start_steps and not config.eval_only:
        say(f"cold start: {config.cold_start_steps} supervised steps")
        cold_start(run)
        if run.reference:
            run.reference.refresh()
    if config.reference_url and not config.eval_only:
        check_reference(run)
    run.before = evaluate(run)
    say(f"held-out accuracy{'' if config.eval_only else ' before GRPO'}: {run.before['accuracy']:.3f}")
    if config.eval_samples:
        say(f"held-out pass@{config.eval_samples}: {run.before['pass_at_k']:.3f}")


def check_reference(run: Run) -> None:
    """Raises memory.NoReference unless the server's model is the policy, by what both make of prompts."""
    prompts = [e["prompt_ids"] for e in run.heldout[:8] if len(e["prompt_ids"]) > 1]
    sequences = [TrainSequence.whole(p[:1], p[1:]) for p in prompts]
    if sequences:
        own, theirs = (torch.cat(logprobs).cpu() for logprobs in
                       (all_logprobs(run.policy, run.limits, 1.0, sequences), run.reference(sequences)))
        apart = (own - theirs).abs().mean().item()
        if not apart <= 0.1:  # bfloat16 makes it about 0.03
            raise memory.NoReference(
                f"the reference server's model {run.reference.model} is not the policy's: a token's log-"
                f"probabilities are {apart:.2g} nats apart; serve the model that --model names"
            )


def finish(run: Run, metrics: list[dict], stopped_by: int | str | None, started: float) -> dict:
    """The end of a run: the final model, its evaluation, the picture and the summary, which is returned."""
    after, best = {"accuracy": None, "pass_at_k": None}, data.best_evaluation(run.folder)
    if stopped_by is None:
        data.save_final(run.policy, run.folder)  # before the evaluation: what was trained is on disk first
        after = evaluate(run)
        best = data.save_best(run.policy, run.folder, run.evaluations[-1])
    if metrics:  # none with --steps 0
        data.draw_curves(metrics, run.evaluations, run.folder / "curves.png")
    summary = {
        "recipe": run.config.recipe, "accuracy_before": run.before["accuracy"],
        "accuracy_after": after["accuracy"], "steps": run.step, "seconds": time.monotonic() - started,
        "peak_memory_bytes": memory.peak_memory(run.device), "pass_at_k_before": run.before["pass_at_k"],
        "pass_at_k_after": after["pass_at_k"], "evaluations": run.evaluations, "best": best,
        "stopped_by": stopped_by,
    }
    data.write_json(run.folder / "summary.json", summary)
    if stopped_by is None:
        say(data.side_by_side(run.before["shown"], after["shown"]))
        say(data.report(summary, run.config.eval_samples, run.folder))
    else:
        say(f"stopped after step {run.step} ({stopped_by}); go on with --resume {run.folder}")
    return summary


def train(config: Config) -> dict:
    """One run, start to end; returns its summary, which is also written to summary.json.

    Raises InputError, rewards.RewardError, memory.DoesNotFit or NoReference, each with a message for the
    user. A summary with `stopped_by` (a signal's number, or "bad steps") is that of a run ended early, with a
    checkpoint.
    """
    started = time.monotonic()
    transformers.utils.logging.disable_progress_bar()  # the bars are ours
    run = open_run(config)
    if run is None:
        return {"recipe": config.recipe}
    if run.is_new:
        start(run)
        if config.eval_only:
            return {"recipe": config.recipe, **{k: run.before[k] for k in ("accuracy", "pass_at_k")}}
    run.optimizer.make_state()  # while the memory is in one piece
    warned: set[str] = set()
    stopped_by: int | str | None = None
    saved_at = time.monotonic()
    bar = tqdm(range(run.step + 1, config.steps + 1), "GRPO", config.steps, initial=run.step,
               disable=not data.has_terminal())
    settings = dataclasses.asdict(config)
    with (stop_requests(run) as signals,
          closing(data.Dashboard(config.report_to, run.folder, settings, run.step)) as dashboard):
        # The first things on disk: a run that can't start, or is stopped before, leaves nothing.
        metrics = data.open_folder(run.folder, settings, run.step)
        if run.step == 0:
            data.save_best(run.policy, run.folder, run.evaluations[0])
            dashboard.log(run.evaluations[0], prefix="held-out/")
        for step in bar:
            record, episodes = grpo_step(run)
            metrics.append(record)
            data.append_lines(run.folder / "metrics.jsonl", [record])
            samples = data.sample_records(step, episodes)
            data.append_lines(run.folder / "samples.jsonl", samples)
            dashboard.log(record, samples[:3] if step % 10 == 1 else [])
            data.show_step(bar, record, config.steps)
            data.warn_of_trouble(metrics, warned)
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                accuracy = evaluate(run)["accuracy"]
                best = data.save_best(run.policy, run.folder, run.evaluations[-1])
                say(f"step {step}: held-out accuracy {accuracy:.3f} (best {best['accuracy']:.3f} at step "
                    f"{best['step']})")
                data.draw_curves(metrics, run.evaluations, run.folder / "curves.png")
                dashboard.log(run.evaluations[-1], prefix="held-out/")
            if run.bad_steps >= config.max_bad_steps:
                stopped_by = "bad steps"
            elif asked := memory.gather(lambda: list(signals)):  # of any rank
                stopped_by = asked[0]
            save_due = config.save_every and step % config.save_every == 0
            since = time.monotonic() - saved_at
            if config.save_minutes and max(memory.gather(partial(list, [since]))) >= 60 * config.save_minutes:
                save_due = True
            if (save_due and not run.bad_steps) or stopped_by is not None:
                run.save()
                saved_at = time.monotonic()
            if stopped_by is not None:
                break
        bar.close()
        summary = finish(run, metrics, stopped_by, started)
        if stopped_by is None:
            dashboard.log(run.evaluations[-1], prefix="held-out/")
        return summary


def ask(config: Config) -> None:
    """Print the greedy answer to `config.ask`, or to each line of the input; to an example with rewards."""
    weights, trusted = rewards.parse_rewards(config.reward), config.trust_remote_code
    model_config, tokenizer = data.load_config(config.model, trust_remote_code=trusted)
    device = find_device(config.device)
    policy = open_policy(config.model, tokenizer, dtype=find_dtype(config, device, model_config),
                         device=device, seed=config.seed, trust_remote_code=trusted)
    for text in [config.ask] if config.ask else filter(str.strip, sys.stdin):
        try:
            example = data.asked_example(text.strip(), config.prompt_format or config.task)
            data.tokenize(tokenizer, model_config, [example], config.max_new_tokens)
            try:
                [answer] = memory.sample(
                    policy.model, [example["prompt_ids"]], max_new_tokens=config.max_new_tokens,
                    temperature=0.0, eos_token_id=policy.stops, pad_token_id=policy.pad_token_id,
                )
            except ValueError as error:
                raise InputError(str(error)) from error
            completion = tokenizer.decode(answer.ids[:-1] if answer.finished else answer.ids)
            say(completion)
            if weights and example.keys() - {"prompt", "prompt_ids"}:
                reward, parts = rewards.score(completion, example, weights)
                say(f"reward {reward:g} ({', '.join(f'{name} {x:g}' for name, x in parts.items())})")
        except (InputError, rewards.RewardError) as error:
            if config.ask:
                raise
            warn(str(error))  # and the next line is read


# ---- The command line --------------------------------------------------------------------------------------


def parse_command_line(arguments: list[str] | None = None) -> Config:
    """The Config that a command line asks for: the recipe, or the checkpoint that is resumed, sets the
    defaults that `--help` shows; flags beat them."""
    def fail(message: str):
        raise InputError(f"{message}; see python grpo_scratch.py --help")

    groups, title = {}, None
    for f in dataclasses.fields(Config):
        # All metadata would be handed on to argparse.
        argparse_knows = {k: x for k, x in f.metadata.items() if k in ("help", "nargs", "const")}
        title = f.metadata.get("group", title)
        groups.setdefault(title, []).append((f.name, f.type, field(
            default=f.default, default_factory=f.default_factory, metadata=argparse_knows)))
    parser = transformers.HfArgumentParser(
        [dataclasses.make_dataclass("Flags", of_group, namespace={"_argument_group_name": title})
         for title, of_group in groups.items()],
        usage="python grpo_scratch.py [--recipe NAME] [--flag VALUE ...]",
        description=__doc__.splitlines()[0], allow_abbrev=False,
    )
    parser.error = fail
    for action in parser._actions:  # --max_rows is understood too, but not shown
        action.option_strings = [x for x in action.option_strings if "_" not in x]
    # A first look, at the flags that decide the defaults which --help shows.
    arguments = sys.argv[1:] if arguments is None else arguments
    early = parser.parse_known_args([x for x in arguments if x not in ("-h", "--help")])[0]
    taken = {}  # settings of the checkpoint, or of the run that the model is of, unless a recipe is given
    checkpoint = data.find_checkpoint(early.resume, early.output_dir, early.name) if early.resume else None
    if checkpoint:
        # Leave to run code is not taken over. What an older checkpoint doesn't know counts as its default.
        known = dataclasses.asdict(Config()) | data.load_state(checkpoint)["config"]
        taken = {f.name: known[f.name] for f in dataclasses.fields(Config)} | {"trust_remote_code": False}
    elif (early.ask is not None or early.eval_only) and early.recipe == "auto":
        taken = data.settings_of_run(early.model)
    code = [x for x in taken.get("reward", []) if rewards.is_code(x)]
    if code and not any(x.split("=")[0] == "--reward" for x in arguments):
        told = f"the run's reward is code, {' '.join(code)}; if you trust it, give it again with --reward"
        if early.ask is None or checkpoint:
            raise InputError(told)
        warn(f"{told}; it is left out")
        taken["reward"] = [x for x in taken["reward"] if x not in code]
    recipe = resolve_recipe(taken.get("recipe", early.recipe), early.device)
    parser.epilog = f"recipes: {', '.join(RECIPES)}; the defaults above are those of {recipe}"
    parser.set_defaults(**{**RECIPES[recipe], "recipe": recipe, "prompt_format": None, **taken})
    *of_groups, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], parser._option_string_actions, n=1)
        fail(f"{unknown[0]}: no such flag" + (f", did you mean {nearest[0]}?" if nearest else ""))
    given = {name: value for of_group in of_groups for name, value in vars(of_group).items()}
    if checkpoint:
        may_change = {f.name for f in dataclasses.fields(Config) if f.metadata.get("may_change")}
        changed = [n for n, value in given.items() if n not in may_change and value != taken[n]]
        if changed:
            told = ", ".join(f"--{n.replace('_', '-')} was {taken[n]}, not {given[n]}" for n in changed)
            raise InputError(f"--resume {early.resume}: {told}; drop it, or start a new run. These may "
                             "change: " + ", ".join(sorted(may_change - {"resume"})))
        given["resume"] = str(checkpoint)
    return make_config(**{**given, "recipe": recipe})


def recipe_table() -> str:
    """The recipes, each with the flags that it stands for: what it changes of the defaults."""
    lines = []
    for name, own in RECIPES.items():
        flags = []
        for setting, x in own.items():
            value = "" if x is True else " " + (" ".join(x) if isinstance(x, list) else str(x))
            flags.append(f"--{setting.replace('_', '-')}{value}".replace(" ", "\0"))  # not to be broken
        lines.append(textwrap.fill(" ".join(flags), 110, initial_indent=f"{name:<13}",
                                   subsequent_indent=13 * " ", break_on_hyphens=False).replace("\0", " "))
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for. A mistake of the user's ends with one line on stderr and exit code
    2, Ctrl-C with 130, SIGTERM with 143, a run stopped by bad steps with 1."""
    try:
        config = parse_command_line()
        if config.list_recipes:
            say(recipe_table())
            return
        if config.ask is not None:
            ask(config)
            return
        stopped_by = train(config).get("stopped_by")
    except (InputError, rewards.RewardError, memory.DoesNotFit, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not memory.is_out_of_memory(error):
            raise
        own = not hasattr(error, "on_all_ranks")
        if own and os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # where the first rank has met the same, torchrun ends this one before it tells it
        say(f"error: {error}", sys.stderr, from_all=own)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first step, where there is nothing to save yet
        sys.exit(130)
    if stopped_by is not None:
        sys.exit(128 + stopped_by if isinstance(stopped_by, int) else 1)


if __name__ == "__main__":
    main()
