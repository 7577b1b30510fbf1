"""The algorithm, each part against an independent answer: numpy loops, float64 formulas, `generate`."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import grpo_scratch as g
import memory
import rewards

# ------------------------------------------------------------------------------------------------------------
# Settings


def test_every_recipe_makes_a_valid_config():
    for recipe in g.RECIPES:
        assert g.make_config(recipe).recipe == recipe


def test_a_flag_beats_its_recipe_and_a_recipe_beats_the_default():
    config = g.parse_command_line(["--recipe", "lm-book", "--group-size", "5"])
    assert (config.group_size, config.clip_low, config.prompts_per_step) == (5, 0.1, 4)
    assert g.Config().clip_low == 0.2


def test_without_cuda_the_recipe_is_tiny():
    assert g.make_config().recipe == ("improved" if torch.cuda.is_available() else "tiny")
    assert g.make_config(device="cpu").recipe == "tiny"
    assert g.make_config(device="cuda", plan_only=True, memory_budget_gib=12).recipe == "improved"


def test_help_lists_every_flag_in_a_group(capsys):
    with pytest.raises(SystemExit) as stop:
        g.parse_command_line(["--help", "--recipe", "lm-book"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{f.name.replace('_', '-')} " in text for f in dataclasses.fields(g.Config))
    titles = [f.metadata["group"] for f in dataclasses.fields(g.Config) if "group" in f.metadata]
    assert len(titles) == 8
    assert all(f"\n{title}:" in text for title in titles)
    assert "default: 5e-06" in text  # lm-book's learning rate, not Config's


@pytest.mark.parametrize("override, told", [
    ({"recipe": "nano"}, "nano-aha"), ({"group_size": 1}, "--group-size 1: must be at least 2"),
    ({"temperature": 0.0}, "--temperature 0.0: must be above 0"), ({"top_entropy": 1.5}, "at most 1"),
    ({"dtype": "float16"}, "auto, bfloat16, float32"), ({"grop_size": 8}, "no such setting"),
    ({"clip_low": 1.5}, "at most 1"),
    ({"learning_rate": math.nan}, "at least 0"), ({"prompt_format": "poem"}, "countdown"),
    ({"task": "gsm8k", "prompt_format": "countdown"}, "--task gsm8k.*use one of gsm8k, gsm8k-reasoning"),
    ({"task": "mine.csv", "prompt_format": "gsm8k"}, "as they stand"),
    ({"recipe": "lm-book", "task": "countdown", "prompt_format": "gsm8k"}, "use one of countdown, mini"),
    ({"beta": -1.0}, "at least 0"), ({"advantage_std": "pop"}, "population, sample, batch, none"),
    ({"aggregation": "mean"}, "token, sequence, constant"), ({"lr_schedule": "lin"}, "constant, linear"),
    ({"ratio": "group"}, "token, answer"), ({"surrogate": "ppo"}, "clip, cispo"),
    ({"refill_rounds": -1}, "at least 0"), ({"warmup_steps": -1}, "at least 0"),
    ({"overlong_buffer": 9, "max_new_tokens": 8}, "at most --max-new-tokens, 8"),
    ({"steps": 5, "warmup_steps": 6}, "--warmup-steps 6: must be at most --steps, 5"),
    ({"sampler": "sglang"}, "own, vllm"), ({"importance_cap": -1.0}, "at least 0"),
    ({"reference_url": "http://x", "cold_start_steps": 0}, "--reference-url http://x: .*--beta above 0"),
    ({"reference_url": "http://x", "beta": 0.1}, "--cold-start-steps 0"),  # tiny has one
    ({"reference_url": "host:8000", "beta": 0.1}, "must begin with http:// or https://"),
    ({"recipe": "improved", "reference_url": "http://x", "loss_temperature": 1.0}, "--reference-every 0"),
    ({"recipe": "improved", "reference_url": "http://x", "reference_every": 0}, "--loss-temperature 1"),
])
def test_bad_settings_are_refused_with_what_is_allowed(override, told):
    with pytest.raises(g.InputError, match=told):
        g.make_config(**override)


@pytest.mark.parametrize("task", ["countdown", "mine.jsonl", "typo"])
def test_a_recipes_prompt_format_goes_with_the_recipes_task(task):
    assert g.make_config("lm-book").prompt_format == "gsm8k-reasoning"
    assert g.make_config("lm-book", task=task).prompt_format is None


# ------------------------------------------------------------------------------------------------------------
# Advantages, weights, mask


@settings(deadline=None, max_examples=80)
@given(data=st.data(), std=st.sampled_from(["population", "sample", "batch", "none"]),
       eps=st.sampled_from([1e-6, 1e-4]))
def test_advantages_equal_a_loop_over_groups_in_numpy(data, std, eps):
    groups = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=1, max_size=30)))
    rewards = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.6, 1.0, 1.1, -1.0]),
                                          min_size=len(groups), max_size=len(groups))))
    expected = np.zeros(len(groups))
    for group in set(groups.tolist()):
        r = rewards[groups == group]
        if len(set(r.tolist())) > 1:
            scale = {"population": r.std() + eps, "sample": r.std(ddof=1) + eps,
                     "batch": rewards.std() + eps, "none": 1.0}[std]
            expected[groups == group] = (r - r.mean()) / scale
    got = g.group_advantages(torch.tensor(rewards), torch.tensor(groups), std, eps)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_equal_rewards_and_a_group_of_one_have_exactly_no_advantage():
    rewards = torch.tensor([0.1] * 3 + [0.7] * 7 + [5.0] + [0.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([0] * 3 + [1] * 7 + [2] + [3] * 2)
    for std in ("population", "sample", "batch", "none"):
        for eps in (1e-6, 0.0):
            # Alone, where every deviation is 0, and beside a group with spread.
            assert (g.group_advantages(rewards[:11], groups[:11], std, eps) == 0).all()
            assert (g.group_advantages(rewards, groups, std, eps) == 0).tolist() == [True] * 11 + [False] * 2


def test_rewards_that_differ_by_a_rounding_have_spread():
    rewards = torch.tensor([1e6, 1e6 + 1e-9, 1.0, 1.0], dtype=torch.float64)
    got = g.group_advantages(rewards, torch.tensor([0, 0, 1, 1]))
    assert got.sign().tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_no_rewards_have_no_advantages():
    for std in ("population", "sample", "batch", "none"):
        assert g.group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long), std).shape == (0,)


@pytest.mark.parametrize("length, limit, buffer, penalty", [
    (1, 100, 20, 0.0), (80, 100, 20, 0.0),  # up to L - c
    (81, 100, 20, -0.05), (90, 100, 20, -0.5), (95, 100, 20, -0.75), (100, 100, 20, -1.0),
    (101, 100, 20, -1.0), (500, 100, 20, -1.0),  # beyond L, which a batch of another engine may hold
    (25, 100, 100, -0.25), (100, 100, 0, 0.0), (120, 100, 0, 0.0),
])
def test_the_overlong_penalty_falls_in_a_line_over_the_buffer(length, limit, buffer, penalty):
    assert g.overlong_penalty(length, limit, buffer) == pytest.approx(penalty, abs=1e-15)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_token_weights_are_the_three_averages(lengths):
    values = [torch.rand(n, dtype=torch.float64) for n in lengths]
    averages = {
        "token": torch.cat(values).mean(),
        "sequence": torch.stack([v.mean() for v in values]).mean(),
        "constant": torch.stack([v.sum() / 64 for v in values]).mean(),
    }
    for aggregation, expected in averages.items():
        weights = g.token_weights(torch.tensor(lengths), aggregation, max_new_tokens=64)
        got = sum(w * v.sum() for w, v in zip(weights.double(), values))
        assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="use token, sequence"):
        g.token_weights(torch.tensor([3]), "mean")


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_where_every_answer_was_left_out_there_is_no_weight(aggregation):
    assert g.token_weights(torch.tensor([], dtype=torch.long), aggregation, max_new_tokens=8).shape == (0,)


@given(
    st.lists(st.floats(0, 10, width=32), min_size=1, max_size=200),
    st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.8, 1.0]),
)
def test_the_mask_keeps_what_reaches_the_quantile(entropies, fraction):
    x = np.array(entropies, dtype=np.float32)
    got = g.high_entropy_mask(torch.from_numpy(x), fraction).numpy()
    threshold = np.quantile(x.astype(np.float64), 1 - fraction, method="higher")
    assert (got == (x >= threshold)).all()


def test_the_mask_keeps_a_fifth_of_distinct_entropies():
    assert g.high_entropy_mask(torch.randperm(1000).float(), 0.2).sum() == 200
    assert g.high_entropy_mask(torch.zeros(0), 0.2).shape == (0,)


# ------------------------------------------------------------------------------------------------------------
# The loss


def naive_loss(logprobs, lengths, here, scale, advantages, old, ref, importance, variant, aggregation,
               max_new, low, high, beta):
    """The objectives on padded [B, T] tensors in float64, token by token, as one would write them on a
    blackboard: (loss, number of clipped tokens). Only tokens that are `here` take part."""
    total, clipped = 0, 0
    for b, n in enumerate(lengths):
        tokens = [t for t in range(n) if here[b, t]]
        before = logprobs.detach() if old is None else old
        log_ratios = {t: logprobs[b, t] - before[b, t] for t in tokens}
        if variant == "answer":
            mean = sum(log_ratios.values()) / len(tokens)
            log_ratios = {t: mean for t in tokens}
        weight = {"token": 1 / sum(lengths), "sequence": 1 / (n * len(lengths)),
                  "constant": 1 / (max_new * len(lengths))}[aggregation]
        for t in tokens:
            a, ratio = advantages[b], torch.exp(log_ratios[t])
            too_low, too_high = bool(ratio < 1.0 - low), bool(ratio > 1.0 + high)
            bound = 1.0 - low if too_low else 1.0 + high if too_high else ratio
            if variant == "cispo":
                surrogate = min(ratio.item(), 1.0 + high) * a * logprobs[b, t]
                clipped += too_high
            else:
                surrogate = min(ratio * a, bound * a)
                clipped += (too_low and bool(a < 0)) or (too_high and bool(a > 0))
            if importance is not None:
                surrogate = surrogate * importance[b, t]
            if ref is not None:
                difference = ref[b, t] - logprobs[b, t]
                surrogate = surrogate - beta * (torch.exp(difference) - difference - 1)
            total = total - weight * scale[b, t] * surrogate
    return total, clipped


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("with_importance", [False, True])
@pytest.mark.parametrize("variant", ["clip", "answer", "cispo"])
def test_loss_and_gradient_equal_a_naive_padded_float64_one(
    aggregation, with_old, with_ref, with_importance, variant
):
    lengths, T = [3, 7, 1, 5, 6, 7], 7
    rows = len(lengths)
    noise = lambda: torch.randn(rows, T, dtype=torch.float64)
    logprobs = -torch.rand(rows, T, dtype=torch.float64) * 2
    old = logprobs + 0.4 * noise() if with_old else None
    ref = logprobs + 0.4 * noise() if with_ref else None
    importance = noise().exp().clamp(max=2) if with_importance else None
    advantages = torch.tensor([1.2, -0.7, 0.3, -1.1, 0.9, -0.4], dtype=torch.float64)
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    here = real & (torch.rand(rows, T) < 0.8)  # some tokens are left out,
    here[:, 0] = True
    scale = (torch.rand(rows, T) < 0.8).double()  # others are there with weight 0
    weights = g.token_weights(torch.tensor(lengths), aggregation, 16)[:, None].double() * scale
    answers = torch.tensor([7, -3, 10**12, 0, 5, 2])[:, None].expand(rows, T)

    naive_input = logprobs.clone().requires_grad_()
    expected, clipped = naive_loss(naive_input, lengths, here, scale, advantages, old, ref, importance,
                                   variant, aggregation, 16, 0.1, 0.15, 0.05)
    expected.backward()
    for parts in ([[0, 1, 2, 3, 4, 5]], [[0, 3], [1], [5, 2, 4]]):  # the whole batch, and micro-batches
        ours_input = logprobs.clone().requires_grad_()
        got, sums = 0, {}
        for part in parts:
            pick = lambda x, part=part: x[part][here[part]] if x is not None else None
            loss, stats = g.grpo_loss(
                pick(ours_input), pick(advantages[:, None].expand(rows, T)), pick(weights), pick(old),
                pick(ref), 0.1, 0.15, 0.05, answers=pick(answers) if variant == "answer" else None,
                surrogate="cispo" if variant == "cispo" else "clip", importance=pick(importance),
            )
            loss.backward()
            got += loss.item()
            for name, value in stats.items():
                sums[name] = sums.get(name, 0) + float(value)
        torch.testing.assert_close(ours_input.grad, naive_input.grad, rtol=1e-6, atol=1e-12)
        assert ("clip_fraction" in sums, "kl" in sums) == (with_old, with_ref)
        if with_old or variant == "cispo":  # else they differ by a constant: A * log pi in the place of A * 1
            assert got == pytest.approx(expected.item(), rel=1e-6)
        if with_old:
            assert sums["clip_fraction"] == clipped > 0


# Three tokens, the first two of one answer: A = 3, 3, -1, ratios pi/pi_old = 4, 1, 1/2, pi = 4/5, 1/2, 1/4.
# Ratios are clipped to [4/5, 5/2] (clip_low 0.2, clip_high 1.5); every token weighs 1/3. A ratio's derivative
# by its log-probability is the ratio.
#
#   clip    token 1: min(4 x 3, 5/2 x 3) = 15/2, clipped high, no gradient. Token 2: 3, gradient 1 x 3.
#           Token 3: min(-1/2, -4/5) = -4/5, clipped low, no gradient.
#           loss = -(15/2 + 3 - 4/5) / 3 = -97/30; gradient = -(0, 3, 0) / 3.
#   answer  the first answer's ratio is sqrt(4 x 1) = 2, not clipped: 6 for each of its tokens. Each of the
#           two log-probabilities is half of the mean that both terms depend on: gradient (6 + 6) / 2 = 6.
#           Token 3 is an answer of its own: as above.
#           loss = -(6 + 6 - 4/5) / 3 = -56/15; gradient = -(6, 6, 0) / 3.
#   cispo   min(ratio, 5/2) x A = 15/2, 3, -1/2 are mere weights: loss = -(15/2 log(4/5) + 3 log(1/2)
#           - 1/2 log(1/4)) / 3 = -(15/2 log(4/5) + 2 log(1/2)) / 3; gradient = -(15/2, 3, -1/2) / 3.
#   answer with importance 2, 1/2, 1: terms 12, 3, -4/5, and the two tokens' gradient is (12 + 3) / 2 = 15/2.
@pytest.mark.parametrize("chosen, loss, gradient, clipped", [
    ({}, -97 / 30, (0, -1, 0), 2),
    ({"answers": torch.tensor([8, 8, 3])}, -56 / 15, (-2, -2, 0), 1),
    ({"surrogate": "cispo"}, -(7.5 * math.log(0.8) + 2 * math.log(0.5)) / 3, (-2.5, -1, 1 / 6), 1),
    ({"answers": torch.tensor([8, 8, 3]), "importance": torch.tensor([2, 0.5, 1])}, -71 / 15,
     (-2.5, -2.5, 0), 1),
])
def test_three_tokens_come_out_as_by_hand(chosen, loss, gradient, clipped):
    logprobs = torch.tensor([0.8, 0.5, 0.25], dtype=torch.float64).log().requires_grad_()
    old = torch.tensor([0.2, 0.5, 0.5], dtype=torch.float64).log()
    got, stats = g.grpo_loss(logprobs, torch.tensor([3.0, 3.0, -1.0]), torch.full((3,), 1 / 3).double(), old,
                             clip_low=0.2, clip_high=1.5, **chosen)
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-6)
    assert logprobs.grad.tolist() == pytest.approx(gradient, rel=1e-6)
    assert {name: float(value) for name, value in stats.items()} == {"clip_fraction": clipped}


@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
@pytest.mark.parametrize("answers", [None, torch.arange(50) % 7])
def test_the_on_policy_shortcut_has_the_gradient_of_the_ratio(surrogate, answers):
    logprobs = (-torch.rand(50)).requires_grad_()
    advantages, weights = torch.randn(50), torch.rand(50)

    def gradient(old):
        loss, _ = g.grpo_loss(logprobs, advantages, weights, old, answers=answers, surrogate=surrogate,
                              importance=1 + advantages)
        return torch.autograd.grad(loss, logprobs)[0]

    torch.testing.assert_close(gradient(None), gradient(logprobs.detach()))


def test_clip_fraction_counts_the_tokens_whose_gradient_is_cut():
    logprobs = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0]).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss, stats = g.grpo_loss(logprobs, advantages, torch.ones(5), torch.zeros(5))
    loss.backward()
    assert (logprobs.grad == 0).tolist() == [True, False, False, True, False]
    assert stats["clip_fraction"] == 2


# ------------------------------------------------------------------------------------------------------------
# The update


def a_policy():
    return g.open_policy(g.Run(g.Config(seed=3), "cpu"), "embedded", *data.load_config("embedded"))


def some_episodes(policy, group_size=4, seed=0):
    """Real samples with made-up rewards, so that every group has spread."""
    torch.manual_seed(seed)
    prompts = [[40, 41, 42], [50] * 9, [60, 61]]
    completions = memory.sample(policy.model, prompts, group_size=group_size, max_new_tokens=11,
                           eos_token_id=list(range(60)), pad_token_id=0)
    return [g.Episode({}, i // group_size, prompts[i // group_size], c, "", float(i % 3),
                      {"r": float(i % 3)}, float(i % 3) - 0.9) for i, c in enumerate(completions)]


class RecordedStep:
    """Stands where the optimizer would, and keeps the gradients it is given."""

    def __init__(self, model):
        self.model, self.gradients, self.param_groups = model, [], [{"lr": 0.0}]

    def step(self):
        self.gradients.append([p.grad.clone() for p in self.model.parameters()])

    def sum_gradients(self, max_norm):
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def zero_grad(self, set_to_none):
        for p in self.model.parameters():
            p.grad = None


def limits(micro_batch_tokens=10**6, recomputed_layers=0, max_rows=12):
    return memory.Limits(max_rows, micro_batch_tokens, recomputed_layers, layers=3)


def a_reference(policy, config):
    """What open_run makes: the policy's own code, run with the reference's weights."""
    run = SimpleNamespace(policy=policy, limits=limits())
    return memory.ReferencePolicy(policy.model, lambda sequences: [
        x[0] for x in g.all_logprobs(run, sequences, config.loss_temperature)])


def a_run(policy, config, optimizer=None, reference=None, limited=None):
    return g.Run(config, "cpu", policy=policy, limits=limited or limits(), reference=reference,
                 optimizer=optimizer or RecordedStep(policy.model))


@pytest.mark.parametrize("apart", [0.09, 0.11, math.nan])
def test_a_servers_log_probabilities_far_from_our_own_are_another_models(apart):
    policy = a_policy()

    def served(sequences):
        found = []
        for s in sequences:
            ids = torch.tensor([[*s.prompt, *s.completion]])
            exact = policy.model(ids).logits[0].double().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])
            found.append(exact[len(s.prompt) - 1 :, 0].float() + apart * (-1) ** s.counted)
        return found

    served.model = "frozen"
    run = SimpleNamespace(policy=policy, limits=limits(), reference=served, heldout=[
        {"prompt_ids": ids} for ids in ([40], [50] * 9, [60, 61], [40, 41, 42])])
    if apart < 0.1:
        g.check_reference(run)
        return
    with pytest.raises(memory.NoReference, match="frozen is not the policy's"):
        g.check_reference(run)


def gradients_of_update(
    policy, config, micro_batch_tokens, reference=None, recomputed_layers=0, episodes=None
):
    run = a_run(policy, config, reference=reference, limited=limits(micro_batch_tokens, recomputed_layers))
    metrics = g.update(run, g.train_sequences(episodes or some_episodes(policy), config))
    return run.optimizer.gradients, metrics


def update_config(**overrides):
    return g.make_config("improved", **{"max_grad_norm": 0.0, "beta": 0.0, "temperature": 1.0,
                                        "top_entropy": 1.0, "max_new_tokens": 11, **overrides})


@pytest.mark.parametrize("overrides", [
    {}, {"aggregation": "sequence"}, {"aggregation": "constant"}, {"top_entropy": 0.3}, {"temperature": 0.7},
    {"updates_per_batch": 2, "clip_low": 0.1}, {"beta": 0.1},
])
def test_micro_batches_of_any_size_add_up_to_the_whole_batch(overrides):
    policy = a_policy()
    config = update_config(**overrides)
    reference = a_reference(policy, config) if config.beta else None
    if reference:
        for w in reference.weights.values():
            w.mul_(1.02)
    whole, whole_metrics = gradients_of_update(policy, config, 10**6, reference)
    for tokens, layers in ((1, 0), (30, 3), (64, 2)):
        parts, metrics = gradients_of_update(policy, config, tokens, reference, layers)
        for a, b in zip(whole[-1], parts[-1]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
        assert metrics["loss"] == pytest.approx(whole_metrics["loss"], rel=1e-4, abs=1e-6)
        if config.beta:
            assert metrics["kl"] == pytest.approx(whole_metrics["kl"], rel=1e-4) and metrics["kl"] > 0


def test_the_updates_gradient_is_that_of_plain_autograd_through_the_models_own_logits():
    policy, config = a_policy(), update_config(temperature=0.8)
    episodes = some_episodes(policy)
    got, _ = gradients_of_update(policy, config, 40, episodes=episodes)
    total = sum(len(e.completion.ids) for e in episodes)
    loss = 0
    for e in episodes:
        ids = torch.tensor([e.prompt + e.completion.ids])
        logprobs = (policy.model(ids).logits[0].double() / 0.8).log_softmax(-1)
        for t, token in enumerate(e.completion.ids):
            loss = loss - e.advantage * logprobs[len(e.prompt) - 1 + t, token] / total
    for p, ours in zip(policy.model.parameters(), got[0]):
        torch.testing.assert_close(
            ours, torch.autograd.grad(loss, p, retain_graph=True)[0], rtol=1e-3, atol=1e-6
        )


# What each system does with a batch, from its code or paper: divisor of the variance (n - this; "batch": of
# all rewards; None: no deviation) and eps, truncated answers left out, temperature of sampling and loss,
# updates, clipping (low, high, and of which ratio), KL coefficient, average, share of tokens by entropy,
# largest gradient norm.
SYSTEMS = {
    "improved": (0, 1e-6, True, 0.5, 0.5, 1, None, 0.01, "token", 0.2, 1.0),
    "nano-aha": (0, 1e-4, False, 1.0, 1.0, 1, None, 0.001, "token", 1.0, 1.0),
    "grpo-zero": (0, 1e-4, False, 1.0, 1.0, 1, None, 0.0, "token", 1.0, 1.0),
    "simple-grpo": (1, 1e-4, False, 0.9, 1.0, 1, (0.2, 0.2, "token"), 0.04, "sequence", 1.0, None),
    "lm-book": (1, 1e-4, False, 1.0, 1.0, 3, (0.1, 0.1, "token"), 0.04, "sequence", 1.0, 0.1),
    "dapo": (0, 1e-6, False, 1.0, 1.0, 2, (0.2, 0.28, "token"), 0.0, "token", 1.0, 1.0),
    "dr-grpo": (None, 1e-6, False, 1.0, 1.0, 1, None, 0.0, "constant", 1.0, 1.0),
    "gspo": (0, 1e-6, False, 1.0, 1.0, 2, (3e-4, 4e-4, "answer"), 0.0, "sequence", 1.0, 1.0),
    "cispo": ("batch", 1e-6, False, 1.0, 1.0, 2, (math.inf, 4.0, "weight"), 0.0, "token", 1.0, 1.0),
}


@pytest.mark.parametrize("recipe", SYSTEMS)
def test_each_recipes_gradients_are_its_systems(recipe):
    """From rewards to clipped gradients, against autograd in float64 through the model's own logits."""
    ddof, eps, skip, sampling_t, loss_t, updates, clip, beta, average, share, max_norm = SYSTEMS[recipe]
    policy = a_policy()
    config = g.make_config(recipe, max_new_tokens=11, overlong_buffer=0)  # the rewards here are given
    reference = a_reference(policy, config) if beta else None
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    assert (config.temperature, config.skip_truncated) == (sampling_t, skip)
    prompts = [[40, 41, 42], [50] * 9, [60, 61]]
    completions = memory.sample(policy.model, prompts, group_size=4, max_new_tokens=11, pad_token_id=0,
                           temperature=sampling_t, eos_token_id=list(range(60)))
    scores = [0.1, 1.1, 0.6, 1.1, 0.0, 0.1, 0.1, 1.0, 1.1, 0.1, 0.6, 0.1]
    episodes = [g.Episode({}, i // 4, prompts[i // 4], c, "", r, {"r": r})
                for i, (c, r) in enumerate(zip(completions, scores)) if c.finished or not skip]
    assert any(not c.finished for c in completions)

    # The system's: groups, mask and averages by loops.
    advantages = {}
    for e in episodes:
        group = np.array([other.reward for other in episodes if other.group == e.group])
        if ddof is None:
            scale = 1.0
        elif ddof == "batch":
            scale = np.std([other.reward for other in episodes]) + eps
        else:
            scale = (group.std(ddof=ddof) if len(group) > ddof else 0.0) + eps
        advantages[id(e)] = (e.reward - group.mean()) / scale
    entropies = np.concatenate([e.completion.entropies for e in episodes]).astype(np.float32)
    threshold = np.quantile(entropies, 1 - share, method="higher")
    total = sum(len(e.completion.ids) for e in episodes)

    def logprobs_of(e):
        logits = policy.model(torch.tensor([e.prompt + e.completion.ids])).logits[0].double() / loss_t
        rows = logits.log_softmax(-1)[len(e.prompt) - 1 : -1]
        return rows.gather(1, torch.tensor(e.completion.ids)[:, None])[:, 0]

    with torch.no_grad():
        old = [logprobs_of(e) for e in episodes]
        if reference:
            with reference.swapped_in():
                ref = [logprobs_of(e) for e in episodes]

    def expected_gradients():
        loss, of_tokens = 0, []
        for i, e in enumerate(episodes):
            a, lp = advantages[id(e)], logprobs_of(e)
            counts = torch.tensor(np.float32(e.completion.entropies) >= threshold)
            low, high, clipped = clip or (math.inf, math.inf, "token")
            log_ratio = lp - (old[i] if updates > 1 else lp.detach())
            if clipped == "answer":
                log_ratio = log_ratio[counts].mean().expand(len(lp))
            ratio = torch.exp(log_ratio)
            if clipped == "weight":
                term = ratio.detach().clamp(max=1 + high) * a * lp
                cut = ratio > 1 + high
            else:
                term = torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
                cut = term < ratio * a
            of_tokens += cut[counts].tolist() if a else []  # without spread and KL an answer is left out
            if beta:
                term = term - beta * (torch.exp(ref[i] - lp) - (ref[i] - lp) - 1)
            divisor = {"token": total, "sequence": len(e.completion.ids) * len(episodes),
                       "constant": 11 * len(episodes)}[average]
            loss = loss - (term * counts).sum() / divisor
        clipped_shares.append(np.mean(of_tokens))
        gradients = torch.autograd.grad(loss, list(policy.model.parameters()))
        norm = math.sqrt(sum(float((x.double() ** 2).sum()) for x in gradients))
        scale = min(1.0, max_norm / norm) if max_norm else 1.0
        return [x * scale for x in gradients]

    class NudgingStep(RecordedStep):
        """Moves the weights, so that the next update's ratios are not 1, and takes the system's gradients."""

        def step(self):
            super().step()
            expected.append(expected_gradients())
            with torch.no_grad():
                for p in self.model.parameters():
                    p.mul_(nudge)

    found = g.group_advantages(torch.tensor([e.reward for e in episodes]).double(),
                               torch.tensor([e.group for e in episodes]),
                               config.advantage_std, config.advantage_eps)
    for e, advantage in zip(episodes, found.tolist()):
        e.advantage = advantage
    nudge = {"cispo": 1.2, "dapo": 1.05}.get(recipe, 1.01)  # so that some ratios are clipped, not all
    expected, clipped_shares, optimizer = [], [], NudgingStep(policy.model)
    run = a_run(policy, config, optimizer, reference, limits(40))
    metrics = g.update(run, g.train_sequences(episodes, config))
    assert len(optimizer.gradients) == updates
    for ours, theirs in zip(optimizer.gradients, expected):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    if updates > 1:  # the first update's ratios are all 1
        assert clipped_shares[0] == 0 < clipped_shares[-1] < 1
        assert metrics["clip_fraction"] == pytest.approx(np.mean(clipped_shares))


@pytest.mark.parametrize("updates, beta, passes", [(1, 0.0, 1), (1, 0.1, 2), (3, 0.0, 3), (3, 0.1, 4)])
def test_each_update_is_one_pass_and_a_reference_one_more(updates, beta, passes, monkeypatch):
    policy, calls, real = a_policy(), [], memory.sequence_logprobs
    monkeypatch.setattr(memory, "sequence_logprobs", lambda *args: calls.append(1) or real(*args))
    config = update_config(updates_per_batch=updates, beta=beta)
    reference = a_reference(policy, config) if beta else None
    gradients_of_update(policy, config, 10**6, reference)
    assert len(calls) == passes


def test_only_completion_tokens_of_high_entropy_count():
    policy = a_policy()
    episodes = some_episodes(policy)
    sequences = g.train_sequences(episodes, update_config(top_entropy=0.3))
    entropies = np.concatenate([e.completion.entropies for e in episodes])
    kept = {(id(sequence.completion), t) for sequence in sequences for t in sequence.counted.tolist()}
    threshold = np.quantile(entropies, 0.7, method="higher")
    expected = {(id(e.completion.ids), t) for e in episodes for t, h in enumerate(e.completion.entropies)
                if np.float32(h) >= np.float32(threshold) and e.advantage != 0}
    assert kept == expected


def test_groups_without_spread_are_dropped_but_keep_their_place_in_the_denominator():
    policy = a_policy()
    episodes = some_episodes(policy)
    for e in episodes[:4]:
        e.advantage = 0.0
    sequences = g.train_sequences(episodes, update_config())
    assert len(sequences) == 8
    total = sum(len(e.completion.ids) for e in episodes)
    assert [s.weight for s in sequences] == pytest.approx([1 / total] * 8)
    assert len(g.train_sequences(episodes, update_config(beta=0.1))) == 12  # a KL term acts on them too


def test_running_out_of_memory_changes_nothing_but_the_micro_batch(monkeypatch, capsys):
    policy, config = a_policy(), update_config(updates_per_batch=2)
    episodes = some_episodes(policy)
    expected, _ = gradients_of_update(policy, config, 40, episodes=episodes)
    real, calls = memory.token_logprobs, []

    def sometimes_full(*args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 4, 7):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(memory, "token_logprobs", sometimes_full)
    got, _ = gradients_of_update(policy, config, 40, episodes=episodes)
    assert len(got) == len(expected) == 2
    for a, b in zip(expected[1], got[1]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    assert capsys.readouterr().err.count("out of memory") == 3


def test_running_out_of_memory_at_the_least_gives_up_with_what_may_help(monkeypatch):
    policy = a_policy()
    monkeypatch.setattr(
        memory, "token_logprobs", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError())
    )
    config, least = update_config(), limits(64)
    sequences = g.train_sequences(some_episodes(policy), config)
    with pytest.raises(memory.DoesNotFit, match="out of memory in the update.*--offload-optimizer"):
        g.update(a_run(policy, config, limited=least), sequences)
    # All was tried.
    assert (least.micro_batch_tokens, least.recomputed_layers) == (max(map(len, sequences)), 3)


def test_running_out_of_memory_while_sampling_halves_the_rows(monkeypatch, capsys):
    policy, calls = a_policy(), []
    real = memory.prefill

    def sometimes_full(*args):
        calls.append(1)
        if len(calls) <= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(memory, "prefill", sometimes_full)
    limited = limits(max_rows=12)
    prompts = [{"prompt": "", "prompt_ids": ids} for ids in ([40, 41, 42], [50] * 9, [60, 61])]
    run = a_run(policy, update_config(max_new_tokens=5), limited=limited)
    run.sampler = partial(memory.sample, policy.model, eos_token_id=policy.stops,
                          pad_token_id=policy.pad_token_id)
    run.rewards = rewards.load_rewards(["countdown_format"])
    roll = lambda: g.rollout(run, prompts, group_size=4, temperature=1.0,
                             generator=torch.Generator().manual_seed(0))
    episodes = roll()
    assert limited.max_rows == 3 and capsys.readouterr().err.count("out of memory") == 2
    limited.max_rows = 12
    assert [e.completion.ids for e in episodes] == [e.completion.ids for e in roll()]
    monkeypatch.setattr(memory, "prefill", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(memory.DoesNotFit, match="out of memory in the rollout"):
        roll()


def test_a_gradient_that_is_not_finite_changes_no_weight():
    policy, config = a_policy(), update_config()
    episodes = some_episodes(policy)
    episodes[1].advantage = math.inf
    gradients, metrics = gradients_of_update(policy, config, 100, episodes=episodes)
    assert gradients == [] and metrics["bad_updates"] == 1


def test_gradients_repeat_bit_for_bit_however_threads_meet():
    """A prompt's last position gets a gradient from each of its answers, of which two threads hold some."""
    policy, gradients = a_policy(), []
    answers = [[50 + (j + i) % 37 for j in range(30)] for i in range(64)]
    sequences = [g.TrainSequence([40 + i // 48, 41], x, torch.arange(30))
                 for i, x in enumerate(answers)]
    for _ in range(8):
        policy.model.zero_grad(set_to_none=True)
        memory.sequence_logprobs(policy.model, sequences, 1.0)[0].sum().backward()
        gradients.append([p.grad for p in policy.model.parameters()])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other))


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_sampler_and_update_agree_on_logprobs(beta):
    policy = a_policy()
    episodes = some_episodes(policy)
    sequences = g.train_sequences(episodes, update_config())
    with torch.no_grad():
        logprobs, entropies = memory.sequence_logprobs(policy.model, sequences, 1.0)
    by_id = {id(e.completion.ids): e.completion for e in episodes}
    expected = [by_id[id(sequence.completion)] for sequence in sequences]
    torch.testing.assert_close(
        logprobs, torch.tensor([x for c in expected for x in c.logprobs]), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        entropies, torch.tensor([x for c in expected for x in c.entropies]), rtol=0, atol=1e-4
    )


# ------------------------------------------------------------------------------------------------------------
# Another engine as the sampler


def another_engine(policy, shift, temperature=0.7, top_entropy=1.0, **changes):
    """A run whose sampler has our sampler's ids, log-probabilities `shift` more, and no entropies; and what
    our sampler gave."""
    config = update_config(temperature=temperature, top_entropy=top_entropy, skip_truncated=False,
                           prompts_per_step=3, group_size=4, learning_rate=1e-3, **changes)
    sampled, ours = [], partial(memory.sample, policy.model, eos_token_id=list(range(60)), pad_token_id=0)

    def sampler(prompts, **options):
        sampled[:] = ours(prompts, **options)
        flat = iter(shift)
        return [memory.Completion(c.ids, [x + next(flat) for x in c.logprobs], [], c.finished)
                for c in sampled]

    run = a_run(policy, config, limited=limits(micro_batch_tokens=60))
    thirds = lambda completions: [i % 3 for i in range(len(completions))]
    run.sampler, run.rewards = sampler, {"r": (thirds, 1.0)}
    run.examples = [{"prompt": "", "prompt_ids": ids} for ids in ([40, 41, 42], [50] * 9, [60, 61])]
    run.generator.manual_seed(0)
    run.shuffle.seed(0)
    return run, sampled


@pytest.mark.parametrize("cap, temperature, changes", [
    (2.0, 1.0, {}), (1.05, 0.7, {}), (0.0, 0.7, {}), (1.05, 0.7, {"top_entropy": 0.4}),
    (2.0, 0.7, {"updates_per_batch": 2}),
])
def test_another_engines_answers_are_learned_from_with_truncated_importance(cap, temperature, changes):
    policy, shift = a_policy(), (torch.rand(200, dtype=torch.float64) * 0.4 - 0.2).tolist()
    run, sampled = another_engine(policy, shift, temperature, importance_cap=cap, **changes)
    metrics, episodes = g.grpo_step(run)

    count = sum(len(c.ids) for c in sampled)
    apart = np.array(shift[:count])
    ratios = np.exp(-apart)  # our sampler has the update's own log-probabilities
    assert metrics["sampler_gap"] == pytest.approx(np.abs(apart).mean(), abs=1e-6)
    entropies = np.concatenate([c.entropies for c in sampled])
    found = np.concatenate([e.completion.entropies for e in episodes])
    np.testing.assert_allclose(found, entropies, atol=1e-4)
    if cap:
        assert metrics["importance"] == pytest.approx(np.minimum(ratios, cap).mean(), rel=1e-5)
        assert metrics["importance_capped"] == pytest.approx((ratios > cap).mean())
    else:
        assert metrics["importance"] is None and metrics["importance_capped"] is None

    # The gradient, by plain autograd through the model's own logits in float64.
    model = transformers.AutoModelForCausalLM.from_config(policy.model.config, attn_implementation="eager")
    model.load_state_dict(policy.model.state_dict())
    model.double()
    weights = iter(np.minimum(ratios, cap) if cap else np.ones(count))
    kept = iter(entropies >= np.quantile(entropies, 1 - run.config.top_entropy) - 1e-9)
    loss = 0.0
    for e in episodes:
        logits = model(torch.tensor([e.prompt + e.completion.ids])).logits[0, len(e.prompt) - 1 : -1]
        logprobs = (logits / temperature).log_softmax(-1)
        for row, token in zip(logprobs, e.completion.ids):
            weight, keep = next(weights), next(kept)
            loss = loss - keep * weight * e.advantage * row[token] / count
    loss.backward()
    for got, p in zip(run.optimizer.gradients[0], model.parameters()):
        torch.testing.assert_close(got.double(), p.grad, rtol=1e-3, atol=1e-6)


def test_our_own_samplers_gap_is_measured_where_it_costs_nothing():
    episodes = some_episodes(a_policy())
    for e in episodes:
        e.completion.logprobs = [x + 0.01 for x in e.completion.logprobs]
    for updates in (1, 2):
        config = update_config(updates_per_batch=updates)
        _, metrics = gradients_of_update(a_policy(), config, 40, episodes=episodes)
        assert metrics["sampler_gap"] == pytest.approx(0.01, abs=1e-5)
        assert "importance" not in metrics
    _, metrics = gradients_of_update(a_policy(), update_config(loss_temperature=0.5), 40, episodes=episodes)
    assert "sampler_gap" not in metrics  # another distribution's log-probabilities


def test_a_sampler_too_far_from_the_policy_ends_the_run():
    run, _ = another_engine(a_policy(), [0.19, -0.19] * 100)
    assert g.grpo_step(run)[0]["sampler_gap"] == pytest.approx(0.19, abs=1e-3)
    run, _ = another_engine(a_policy(), [0.21, -0.21] * 100)
    with pytest.raises(g.InputError, match=r"0\.21 nats off the sampler's.*weights or temp"):
        g.grpo_step(run)
    assert run.step == 0 and run.optimizer.gradients == []


def test_sampled_numbers_that_are_not_finite_skip_the_step():
    run, _ = another_engine(a_policy(), [math.nan] * 200)
    metrics, _ = g.grpo_step(run)
    assert metrics["bad_updates"] == 1 and metrics["sampler_gap"] is None
    assert "not finite" in metrics["skipped"]


def test_samples_leave_out_what_only_the_run_needs():
    completion = SimpleNamespace(finished=True)
    episode = SimpleNamespace(
        example=data.Example(prompt="a", n=1, prompt_ids=[1], opened=""),
        group=0,
        text="b",
        reward=1.0,
        parts={},
        advantage=0.0,
        completion=completion,
    )
    assert g.sample_records(1, [episode])[0]["example"] == {"prompt": "a", "n": 1}
