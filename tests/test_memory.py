"""memory.py: what it computes is exact, what it holds is as planned; against independent answers."""

import builtins
import contextlib
import copy
import http.server
import io
import json
import math
import os
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
import transformers
from bench_memory import LiveBytes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import memory

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
PLAIN = {
    "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM, True),
    "qwen2-untied": (Qwen2Config, Qwen2ForCausalLM, False),
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, True),
    "llama-untied": (LlamaConfig, LlamaForCausalLM, False),
    "mistral-untied": (MistralConfig, MistralForCausalLM, False),
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def tiny(name="qwen2-tied", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config, model, tied = PLAIN[name]
    return model(config(**{**SMALL, "tie_word_embeddings": tied, **changes})).to(dtype).eval()


def bits(x):
    return x.detach().contiguous().view(torch.uint8)


def same(a, b):
    """Bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


# --- log-probabilities -----------------------------------------------------------------------------------


def naive(hidden, weight, targets, temperature):
    """logprobs, entropies and the logprobs' gradients by the textbook, in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    return logprobs[range(len(targets)), targets], -(logprobs.exp() * logprobs).sum(-1), hidden, weight


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000, None])
def test_values_and_both_gradients_equal_the_naive_formula_in_float64(temperature, chunk_size):
    torch.manual_seed(1)
    hidden, weight = torch.randn(50, 32, requires_grad=True), torch.randn(301, 32, requires_grad=True)
    targets, upstream = torch.randint(301, (50,)), torch.randn(50)
    logprobs, entropies = memory.token_logprobs(hidden, weight, targets, temperature, chunk_size)
    (logprobs * upstream).sum().backward()

    exact_logprobs, exact_entropies, exact_hidden, exact_weight = naive(hidden, weight, targets, temperature)
    (exact_logprobs * upstream).sum().backward()
    torch.testing.assert_close(logprobs.double(), exact_logprobs, rtol=2e-5, atol=0)
    torch.testing.assert_close(entropies.double(), exact_entropies, rtol=2e-5, atol=0)
    assert relative_error(hidden.grad, exact_hidden.grad) < 2e-5
    assert relative_error(weight.grad, exact_weight.grad) < 2e-5
    assert logprobs.dtype == entropies.dtype == torch.float32
    assert not entropies.requires_grad


def test_near_certain_tokens_have_precise_logprobs_and_entropies():
    # log-probabilities down to -1e-9, far below float32's resolution around 1
    weight = torch.eye(20)
    hidden = torch.zeros(20, 20) + torch.diag(torch.arange(5.0, 25.0))
    targets = torch.arange(20)
    logprobs, entropies = memory.token_logprobs(hidden, weight, targets)
    exact_logprobs, exact_entropies, *_ = naive(hidden, weight, targets, 1.0)
    torch.testing.assert_close(logprobs.double(), exact_logprobs, rtol=2e-5, atol=0)
    torch.testing.assert_close(entropies.double(), exact_entropies, rtol=2e-5, atol=0)


def test_bf16_rounds_in_the_matrix_product_and_nowhere_else():
    torch.manual_seed(2)
    hidden = torch.randn(40, 32).bfloat16().requires_grad_()
    weight = torch.randn(211, 32).bfloat16().requires_grad_()
    targets = torch.randint(211, (40,))
    logprobs, entropies = memory.token_logprobs(hidden, weight, targets, 0.7, chunk_size=9)
    exact = ((hidden @ weight.T).double() / 0.7).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), exact[range(40), targets], rtol=2e-5, atol=0)
    torch.testing.assert_close(entropies.double(), -(exact.exp() * exact).sum(-1), rtol=2e-5, atol=0)

    weight.grad_dtype = torch.float32
    logprobs.sum().backward()
    exact_logprobs, _, exact_hidden, exact_weight = naive(hidden, weight, targets, 0.7)
    exact_logprobs.sum().backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(hidden.grad, exact_hidden.grad) < 0.02
    assert relative_error(weight.grad, exact_weight.grad) < 0.02


def test_no_tokens_give_empty_values_and_zero_gradients():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    logprobs, entropies = memory.token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad.shape == (0, 8)
    assert not weight.grad.any()


def test_without_grad_nothing_is_kept_and_a_frozen_head_gets_no_gradient():
    hidden, weight, targets = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8), torch.arange(6)
    with torch.no_grad():
        logprobs, _ = memory.token_logprobs(hidden, weight, targets)
    assert logprobs.grad_fn is None
    memory.token_logprobs(hidden, weight, targets)[0].sum().backward()
    exact_logprobs, _, exact_hidden, _ = naive(hidden, weight, targets, 1.0)
    exact_logprobs.sum().backward()
    assert weight.grad is None
    assert relative_error(hidden.grad, exact_hidden.grad) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_straight_into_the_heads_gradient_gives_what_autograd_gives(dtype):
    model = tiny(dtype=dtype)
    backbone, head = memory.prepare_model(model)
    memory.sum_gradients_in_fp32(model.parameters())
    gradients = []
    for into_weight_grad in (False, True):
        model.zero_grad()
        for seed in (1, 2, 3):  # tied: the embedding's own gradient arrives beside the head's
            ids = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(seed))
            hidden = backbone(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            targets = ids[:, 1:].flatten()
            logprobs, _ = memory.token_logprobs(hidden, head, targets, into_weight_grad=into_weight_grad)
            logprobs.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, straight in zip(*gradients):
        torch.testing.assert_close(plain, straight, rtol=1e-5, atol=1e-5)


def test_memory_does_not_grow_with_the_number_of_tokens(monkeypatch):
    monkeypatch.setattr(memory, "HEAD_WORKSPACE", 2**20)
    extra = []
    for tokens in (200, 3200):
        hidden = torch.randn(tokens, 16, requires_grad=True)
        weight, targets = torch.randn(3000, 16, requires_grad=True), torch.randint(3000, (tokens,))
        with LiveBytes(hidden, weight, targets) as live:
            before = live.now
            memory.token_logprobs(hidden, weight, targets)[0].sum().backward()
        per_token = hidden.grad.nbytes + 8 * 4 * tokens  # and the results, a few numbers a token
        extra.append(live.peak - before - per_token)
    assert extra[1] <= 1.05 * extra[0]
    assert extra[1] <= 2**20 + 2 * weight.nbytes


def test_on_a_gpu_a_bf16_product_is_added_to_float32_where_it_lies():
    total = torch.empty(301, 32, device="meta")  # which runs no kernel, but knows what the kernels take
    left, right = (torch.empty(50, size, dtype=torch.bfloat16, device="meta") for size in (301, 32))
    with LiveBytes(total, left, right) as live:
        before = live.now
        memory._add_product(total, left, right)
        memory._add_product(total, left.float(), right.float())
    assert live.peak == before + 2 * (left.nbytes + right.nbytes)


@pytest.mark.parametrize(("vocabulary", "rows"), [(151_936, 256), (262_144, 128), (400_000, 98), (10**8, 1)])
def test_the_head_takes_whole_128s_of_rows_as_long_as_its_bytes_allow(vocabulary, rows, monkeypatch):
    asked = []
    monkeypatch.setattr(memory._TokenLogprobs, "apply", lambda *arguments: asked.append(arguments[4]))
    weight = torch.empty(vocabulary, 1, device="meta")
    memory.token_logprobs(torch.empty(3, 1, device="meta"), weight, torch.empty(3, device="meta"))
    assert asked == [rows]


def test_importing_the_file_leaves_nothing_changed():
    script = """
        import logging, os, random, signal, sys
        import numpy, torch, transformers
        from transformers import AttentionInterface

        def state():
            cuda = torch.backends.cuda
            return {
                "switches": (cuda.matmul.allow_bf16_reduced_precision_reduction, cuda.cudnn_sdp_enabled()),
                "compile": torch.compile, "threads": torch.get_num_threads(),
                "attention": sorted(AttentionInterface()), "environment": dict(os.environ),
                "random": (random.getstate(), torch.get_rng_state().tolist(), str(numpy.random.get_state())),
                "signals": [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)],
                "levels": {name: x.level for name, x in logging.root.manager.loggerDict.items()
                           if isinstance(x, logging.Logger) and x.level},
            }

        before = state()
        import memory
        after = state()
        assert before == after, [name for name in before if before[name] != after[name]]
        assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
        assert not {"grpo_scratch", "data", "rewards"} & sys.modules.keys()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True,
                          cwd=Path(memory.__file__).parent, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_names_that_windows_lacks_are_not_needed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "resource", None)
    for name in ("uname", "sysconf"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(builtins, "open", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.peak_memory("cpu") == 0
    assert memory.detect_budget_bytes("cpu") > 2**30
    memory.prepare_cuda(torch.bfloat16)


def test_wrong_shapes_are_refused():
    for hidden, targets in (((2, 3, 8), (2, 3)), ((3, 7), (3,)), ((3, 8), (2,))):
        with pytest.raises(ValueError, match=rf"hidden \[n, H\].*got \[{str(hidden)[1:-1]}\]"):
            memory.token_logprobs(torch.ones(hidden), torch.ones(11, 8), torch.ones(targets).long())
    with pytest.raises(ValueError, match="Parameter"):
        weight = torch.randn(11, 8, requires_grad=True) * 2
        memory.token_logprobs(torch.randn(3, 8), weight, torch.arange(3), into_weight_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_backbone_and_head_give_the_models_own_logprobs(name, dtype):
    model = tiny(name, dtype)
    backbone, head = memory.prepare_model(model)
    ids = torch.randint(97, (3, 12))
    hidden = backbone(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    logprobs, _ = memory.token_logprobs(hidden, head, ids[:, 1:].flatten())
    own = model(ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
    torch.testing.assert_close(logprobs.double(), own, rtol=1e-5, atol=1e-5)
    assert not model.training


def test_right_padding_needs_no_attention_mask():
    model = tiny("qwen3-tied")
    ids = torch.randint(97, (2, 12))
    padded = torch.cat([ids, torch.full((2, 5), 7)], 1)
    alone, beside = (model.model(x, use_cache=False).last_hidden_state for x in (ids, padded))
    torch.testing.assert_close(alone, beside[:, :12])


@pytest.mark.parametrize(
    ("model", "config", "cause"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**SMALL), "final_logit_softcapping is 30.0"),
        (CohereForCausalLM, CohereConfig(**SMALL), "logit_scale is 0.0625"),
        (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=2.0), "logits_scaling is 2.0"),
    ],
)
def test_heads_with_more_than_a_matrix_product_are_refused(model, config, cause):
    with pytest.raises(ValueError, match=cause) as refusal:
        memory.prepare_model(model(config).eval())
    assert "\n" not in str(refusal.value)


def test_gemma_2_without_its_soft_cap_is_honoured():
    uncapped = Gemma2Config(**SMALL, final_logit_softcapping=None, attn_logit_softcapping=None)
    model = Gemma2ForCausalLM(uncapped).eval()
    backbone, head = memory.prepare_model(model)
    ids = torch.randint(97, (2, 9))
    torch.testing.assert_close(backbone(ids).last_hidden_state @ head.T, model(ids).logits)


def test_unknown_tricks_between_hidden_states_and_logits_are_found():
    model = tiny()
    model.lm_head.register_forward_hook(lambda module, args, logits: 30 * torch.tanh(logits / 30))
    with pytest.raises(ValueError, match="cause unknown"):
        memory.prepare_model(model)
    model = tiny("llama-untied")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(97))
    with pytest.raises(ValueError, match="bias"):
        memory.prepare_model(model)
    with pytest.raises(ValueError, match="backbone"):
        memory.prepare_model(model.model)
    shape = {"vocab_size": 97, "hidden_size": 32, "word_embed_proj_dim": 32, "num_attention_heads": 4}
    opt = OPTForCausalLM(OPTConfig(**shape))
    with pytest.raises(ValueError, match="cause unknown"):
        memory.prepare_model(opt.eval())  # it calls its decoder past the backbone


# --- gradients -------------------------------------------------------------------------------------------


def test_gradients_of_bf16_weights_sum_in_float32_over_micro_batches():
    model = tiny(dtype=torch.bfloat16)
    batches = [torch.randint(97, (2, 10)) for _ in range(40)]

    def backward(ids):
        model(ids, labels=ids).loss.backward()

    one_by_one = {name: 0.0 for name, _ in model.named_parameters()}
    for ids in batches:  # each batch's own bf16 gradient, summed in float64
        backward(ids)
        for name, p in model.named_parameters():
            one_by_one[name] = one_by_one[name] + p.grad.double()
        model.zero_grad(set_to_none=True)

    memory.sum_gradients_in_fp32(model.parameters())
    for ids in batches:
        backward(ids)
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        # the tied weight's two gradients meet in float32 here and in bf16 there
        tolerance = 5e-3 if name == "model.embed_tokens.weight" else 1e-5
        assert relative_error(p.grad, one_by_one[name]) < tolerance, name
    model.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


def test_a_small_gradient_survives_beside_a_large_sum():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    memory.sum_gradients_in_fp32([p])
    for g in [1.0] + 100 * [2.0**-10]:  # bf16 steps by 2^-7 above 1
        (p * g).sum().backward()
    assert p.grad.item() == 1 + 100 * 2.0**-10


# --- the optimizer ---------------------------------------------------------------------------------------

def is_finite(pattern):
    return pattern & 0x7F800000 != 0x7F800000


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
finite_bits = numbers.map(lambda x: struct.unpack("<I", struct.pack("<f", x))[0])
finite_bits |= st.integers(0, 0xFFFFFFFF).filter(is_finite)  # spread over the bits, not over the numbers


@settings(max_examples=500, deadline=None)
@given(st.lists(finite_bits, min_size=1))
@example([0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x3F808001])  # ties and their neighbours
@example([0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00008000, 0x80008000])  # zeros, subnormals
@example([0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0xFF800000])  # the largest, infinities
def test_master_weights_survive_a_split_and_a_join(patterns):
    master = torch.tensor(struct.unpack(f"<{len(patterns)}i", struct.pack(f"<{len(patterns)}I", *patterns)))
    master = master.to(torch.int32).view(torch.float32)
    hi, lo = memory.split_fp32(master)
    assert (hi.dtype, lo.dtype) == (torch.bfloat16, torch.int16)
    expected_hi = [(b + 0x8000 & 0xFFFFFFFF) >> 16 for b in patterns]
    assert [h & 0xFFFF for h in hi.view(torch.int16).tolist()] == expected_hi
    assert lo.tolist() == [b - (h << 16) for b, h in zip(patterns, expected_hi)]
    assert same(memory.join_fp32(hi, lo), master)


def test_a_split_rounds_to_the_nearest_bf16():
    master = torch.randn(10_000)
    hi, _ = memory.split_fp32(master)
    tie = bits(master).view(-1, 4)[:, :2].eq(torch.tensor([0x00, 0x80], dtype=torch.uint8)).all(-1)
    assert same(hi[~tie], master.bfloat16()[~tie])
    shapes = [(), (3,), (2, 3, 4)]
    assert [memory.split_fp32(torch.ones(s))[0].shape for s in shapes] == [torch.Size(s) for s in shapes]


def weights_and_gradients(steps, dtype=torch.float32):
    """Starting weights of 8-bit size (with a last block that isn't full) and small, and their gradients."""
    torch.manual_seed(3)
    start = [(torch.randn(130, 97) * 0.02).bfloat16().to(dtype), torch.zeros(33, dtype=dtype)]
    sizes = 10.0 ** torch.randint(-6, 0, (steps,))
    return start, [[torch.randn(w.shape) * size for w in start] for size in sizes]


def run(optimizer, params, gradients):
    for step in gradients:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def parameters(start):
    params = [torch.nn.Parameter(w.clone()) for w in start]
    memory.sum_gradients_in_fp32(params)
    return params


def masters(optimizer, params):
    return [memory.join_fp32(p.data, optimizer.state[p]["remainder"]) for p in params]


HYPER = {"lr": 1e-6, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}


@pytest.mark.parametrize("offload", [False, True])
def test_bf16_weights_train_like_the_librarys_own_optimizer_on_float32_weights(offload, monkeypatch):
    monkeypatch.setattr(memory, "OPTIMIZER_SLICE", 2048)  # several slices, the last one not full
    start, gradients = weights_and_gradients(200)
    exact = parameters(start)
    run(bitsandbytes.optim.AdamW8bit(exact, **HYPER), exact, gradients)
    ours = parameters([w.bfloat16() for w in start])
    optimizer = memory.AdamW8bit(ours, **HYPER, offload=offload)
    run(optimizer, ours, gradients)
    for p, master, reference in zip(ours, masters(optimizer, ours), exact):
        assert same(master, reference.data)
        half_a_step = (reference.data.abs() * 2.0**-8).clamp(min=1e-30)
        assert ((p.data.float() - reference.data).abs() <= half_a_step).all()


def test_float32_weights_need_no_remainder():
    start, gradients = weights_and_gradients(20)
    exact, ours = parameters(start), parameters(start)
    run(bitsandbytes.optim.AdamW8bit(exact, **HYPER), exact, gradients)
    optimizer = memory.AdamW8bit(ours, **HYPER)
    run(optimizer, ours, gradients)
    assert all(same(p.data, q.data) for p, q in zip(ours, exact))
    assert all("remainder" not in state for state in optimizer.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", [False, True])
def test_saving_and_loading_in_the_middle_changes_nothing(dtype, offload):
    start, gradients = weights_and_gradients(30, dtype)
    through = parameters(start)
    uninterrupted = memory.AdamW8bit(through, **HYPER, offload=offload)
    run(uninterrupted, through, gradients)

    first = parameters(start)
    optimizer = memory.AdamW8bit(first, **HYPER, offload=offload)
    run(optimizer, first, gradients[:11])
    file = io.BytesIO()
    torch.save({"weights": [p.data for p in first], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = parameters(saved["weights"])
    resumed = memory.AdamW8bit(second, lr=1.0, offload=offload)  # the saved settings win
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, second, gradients[11:])

    for p, q in zip(through, second):
        assert same(p.data, q.data)
        assert uninterrupted.state[p].keys() == resumed.state[q].keys()
        for key, value in uninterrupted.state[p].items():
            assert same(value, resumed.state[q][key]) if isinstance(value, torch.Tensor) else value == 30


def test_without_the_remainder_small_steps_are_lost_and_with_it_none():
    torch.manual_seed(4)
    start = [(torch.randn(100, 100) * 0.02).bfloat16()]
    gradients = [[torch.randn(100, 100)] for _ in range(50)]
    rounded = [torch.nn.Parameter(w.clone()) for w in start]
    run(bitsandbytes.optim.AdamW8bit(rounded, lr=1e-6), rounded, [[g.bfloat16()] for (g,) in gradients])
    ours = parameters(start)
    optimizer = memory.AdamW8bit(ours, lr=1e-6)
    run(optimizer, ours, gradients)
    assert (rounded[0].data != start[0]).float().mean() < 0.05
    assert (masters(optimizer, ours)[0] != start[0].float()).float().mean() > 0.99


def test_state_of_other_parameters_is_refused():
    start, gradients = weights_and_gradients(1)
    params = parameters(start)
    optimizer = memory.AdamW8bit(params, **HYPER)
    run(optimizer, params, gradients)
    for other in (start[:1], [w.bfloat16() for w in start], [start[0].T.contiguous(), start[1]]):
        with pytest.raises(ValueError, match="AdamW8bit"):
            memory.AdamW8bit(parameters(other), **HYPER).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="float16"):
        memory.AdamW8bit([torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))], **HYPER)


def test_a_parameter_that_is_a_transposed_view_is_trained_as_well():
    start = torch.randn(100, 200).bfloat16()
    ours, plain = torch.nn.Parameter(start.t()), torch.nn.Parameter(start.t().contiguous())
    gradient = torch.randn(200, 100)
    for p in (ours, plain):
        optimizer = memory.AdamW8bit([p], **HYPER)
        p.grad = gradient.bfloat16()
        optimizer.step()
    assert same(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", [False, True])
def test_after_make_state_a_step_makes_no_more_state_and_trains_the_same(dtype, offload):
    start, gradients = weights_and_gradients(5, dtype)
    lazy, early = parameters(start), parameters(start)
    run(memory.AdamW8bit(lazy, **HYPER, offload=offload), lazy, gradients)
    optimizer = memory.AdamW8bit(early, **HYPER, offload=offload)
    optimizer.make_state()
    made = {p: {k: x.data_ptr() for k, x in state.items() if isinstance(x, torch.Tensor)}
            for p, state in optimizer.state.items()}
    run(optimizer, early, gradients)
    assert list(made) == early
    for p, q in zip(lazy, early):
        assert same(p.data, q.data)
        assert made[q] == {k: x.data_ptr() for k, x in optimizer.state[q].items() if k in made[q]}


def test_state_saved_before_the_first_step_is_a_fresh_start():
    start, gradients = weights_and_gradients(3)
    unused, fresh, used = parameters(start), parameters(start), parameters(start)
    optimizer = memory.AdamW8bit(used, **HYPER)
    run(optimizer, used, [[g * 100 for g in step] for step in gradients])
    optimizer.load_state_dict(memory.AdamW8bit(unused, **HYPER).state_dict())
    for p, w in zip(used, start):
        p.data.copy_(w)
    run(optimizer, used, gradients)
    run(memory.AdamW8bit(fresh, **HYPER), fresh, gradients)
    assert all(same(p.data, q.data) for p, q in zip(used, fresh))


def runs_out(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory")


def step_of_a_rank(rank, folder):
    """What two ranks do: four steps, in each of which one runs out of memory at another place."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/join", rank=rank, world_size=2)
    told = []
    for place in ("zeros_like", "get_total_norm", "clip_grads_with_norm_", "update_step"):
        params = [torch.nn.Parameter(torch.randn(300, 40)) for _ in range(4)]
        optimizer = memory.AdamW8bit(params, lr=1e-3)
        owner = {"zeros_like": torch, "update_step": optimizer}.get(place, torch.nn.utils)
        for p in params:
            p.grad = None if rank else torch.ones_like(p)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(owner, place, runs_out)
            try:
                optimizer.sum_gradients(1.0)
                optimizer.step()
            except torch.OutOfMemoryError as error:
                told.append((place, error.on_all_ranks))
    (Path(folder) / f"rank-{rank}").write_text(json.dumps(told))


def test_all_ranks_hear_of_one_that_runs_out_in_its_optimizer(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=step_of_a_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
        process.kill()
    for rank in range(2):
        told = json.loads((tmp_path / f"rank-{rank}").read_text())
        assert told == [["zeros_like", True], ["get_total_norm", True], ["clip_grads_with_norm_", True],
                        ["update_step", True]]


# --- activations -----------------------------------------------------------------------------------------


def gradients_of(model, ids, count):
    model.zero_grad(set_to_none=True)
    with memory.recompute_layers(model, count):
        hidden = model.model(ids, use_cache=False).last_hidden_state
    hidden.square().sum().backward()  # outside: what was decided in the forward pass holds
    return [p.grad for p in model.parameters() if p.grad is not None], hidden.detach()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("count", [1, 2, None])
def test_checkpointing_changes_neither_values_nor_gradients_and_dropout_stays_off(name, count):
    model = tiny(name, attention_dropout=0.5)
    ids = torch.randint(97, (2, 11))
    plain, plain_hidden = gradients_of(model, ids, 0)
    checkpointed, hidden = gradients_of(model, ids, count)
    assert same(hidden, plain_hidden)
    assert all(same(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_each_checkpointed_layer_keeps_only_its_input():
    model, ids, kept = tiny(), torch.randint(97, (8, 64)), []
    for count in (0, 1, 2, 3):
        with memory.recompute_layers(model, count), LiveBytes(*model.parameters()) as live:
            before = live.now
            hidden = model.model(ids, use_cache=False).last_hidden_state
            kept.append(live.now - before)
            hidden.sum().backward()
        model.zero_grad(set_to_none=True)
    steps = [a - b for a, b in pairwise(kept)]
    assert max(steps) < 1.01 * min(steps)  # each spares the same
    assert 3 * ids.numel() * 32 * 4 < kept[3] < kept[0] / 4


def test_sampling_with_a_cache_works_between_updates():
    model, ids = tiny(), torch.randint(3, 97, (1, 5))
    before = model.generate(ids, max_new_tokens=8, do_sample=False)
    gradients_of(model, ids, None)
    with pytest.raises(KeyError), memory.recompute_layers(model, None):
        raise KeyError
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), before)
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def sequence(prompt, completion):
    return SimpleNamespace(prompt=prompt, completion=completion, counted=torch.arange(len(completion)))


def cost_of(batch, share):
    """What the docstring says that a batch costs."""
    length = lambda s: len(s.prompt) + len(s.completion) - 1
    prompts = {tuple(s.prompt) for s in batch}
    computed = sum(map(len, prompts)) + sum(len(s.completion) - 1 for s in batch)
    return (1 - share) * computed + share * len(batch) * max(map(length, batch))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50)), max_size=60), st.integers(1, 200),
       st.floats(0, 1))
def test_micro_batches_hold_every_sequence_once_with_its_group_and_within_the_limit(items, limit, share):
    sequences = [sequence([group] * (1 + 3 * group), [7] * length) for group, length in items]
    batches = memory.micro_batches(sequences, memory.Limits(1, limit, 0, 3, share))
    order = [s for batch in batches for s in batch]
    assert sorted(map(id, order)) == sorted(map(id, sequences))
    length = lambda s: len(s.prompt) + len(s.completion) - 1
    assert all(len(b) == 1 or cost_of(b, share) <= limit + 1e-6 for b in batches)
    for batch, after in pairwise(batches):  # and no batch could have taken one more
        assert cost_of([*batch, after[0]], share) > limit - 1e-6
    changes = sum(a.prompt != b.prompt for a, b in pairwise(order))
    assert changes == max(len({tuple(s.prompt) for s in sequences}) - 1, 0)
    assert not order or length(order[0]) == max(map(length, order))  # what doesn't fit fails at once


def test_a_long_prompt_with_many_short_answers_is_not_filled_by_computed_tokens_alone():
    sequences = [sequence([5] * 1000, [7] * 11) for _ in range(64)]
    batches = memory.micro_batches(sequences, memory.Limits(1, 2000, 0, 3, 0.1))
    assert {len(batch) for batch in batches} == {9, 10, 1} or max(map(len, batches)) < 12
    assert all(cost_of(batch, 0.1) <= 2000 for batch in batches)
    assert len(memory.micro_batches(sequences, memory.Limits(1, 2000, 0, 3, 0.0))) == 1


# --- packing ---------------------------------------------------------------------------------------------


PROMPTS = [[5, 6, 7], [8], [5, 6, 7], [5, 6], [5, 6, 7], [8]]
COMPLETIONS = [[9, 10], [11, 12, 13, 14], [9], [], [20, 21, 22, 23, 24, 25], [30]]


def packed(backbone, prompts, completions):
    """(hidden states of packed tokens, the places of the rows' tokens)"""
    layout = memory.on_device(memory.pack(prompts, completions), backbone.device)
    return memory.packed_hidden_states(backbone, *layout), layout[-1][0, 0]


def hidden_and_gradients(model, rows):
    """Hidden states of each row, and the gradients of a sum in which every number has a weight of its own."""
    weights = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).to(rows[0])
    model.zero_grad(set_to_none=True)
    sum((row * weights[: len(row)]).sum() * (i + 1) for i, row in enumerate(rows)).backward()
    return [row.detach() for row in rows], [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointed", [0, 2, None])
@pytest.mark.parametrize("name", PLAIN)
def test_packed_rows_have_the_hidden_states_and_gradients_that_they_have_alone(name, checkpointed):
    model = tiny(name).double()  # whose norms still round to float32
    alone = [model.model(torch.tensor([p + c]), use_cache=False).last_hidden_state[0]
             for p, c in zip(PROMPTS, COMPLETIONS)]
    expected = hidden_and_gradients(model, alone)
    memory.prepare_model(model)
    with memory.recompute_layers(model, checkpointed):
        hidden, places = packed(model.model, PROMPTS, COMPLETIONS)
        rows = [hidden[place[: len(row)]] for place, row in zip(places, alone)]
    for got, exact in zip(hidden_and_gradients(model, rows), expected):
        assert all(relative_error(x, y) < 1e-5 for x, y in zip(got, exact, strict=True))


def test_each_prompt_and_no_padding_goes_through_the_layers():
    model, seen = tiny(), []
    memory.prepare_model(model)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    packed(model.model, PROMPTS, COMPLETIONS)
    tokens = len([5, 6, 7] + [8] + [5, 6]) + sum(map(len, COMPLETIONS))
    assert seen == [(1, tokens, 32)]


@pytest.mark.parametrize("name", PLAIN)
def test_ordinary_input_comes_out_as_before_the_model_was_prepared(name, tmp_path):
    model, ids = tiny(name), torch.randint(3, 97, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padded on the left
    run = lambda: (model(ids).logits, model(ids, attention_mask=mask).logits,
                   model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False))
    before = run()
    memory.prepare_model(model)
    assert all(same(a, b) for a, b in zip(before, run(), strict=True))
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_decoding_answers_like_ordinary_attention_and_copies_no_keys_or_values(name, dtype):
    model, rows, columns = tiny(name, dtype, num_attention_heads=8, max_position_embeddings=600), 3, 500
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")  # repeats keys and values, multiplies, softmax
    memory.prepare_model(model)
    ids = torch.randint(3, 97, (rows, columns))
    mask = torch.ones_like(ids)
    mask[0, :200] = 0  # padded on the left
    tokens, made = torch.randint(3, 97, (rows, 1)), []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    def decode(which):
        cache = which(ids, attention_mask=mask, use_cache=True).past_key_values
        longer = torch.cat([mask, torch.ones(rows, 1, dtype=mask.dtype)], 1)
        made.clear()
        with Made(), torch.no_grad():
            as_cache = {memory.cache_name(which): cache}
            return which(tokens, attention_mask=longer, use_cache=True, **as_cache).logits

    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    exact, repeated = decode(eager), rows * 8 * (columns + 1) * 8 * dtype.itemsize
    assert max(made) >= repeated
    torch.testing.assert_close(decode(model), exact, **tolerance)
    assert max(made) <= repeated // 4  # the cache itself, with its 2 key heads
    short = {"attention_mask": mask[:, 200:209], "max_new_tokens": 12, "do_sample": False}
    answers = [m.generate(ids[:, :9], **short) for m in (eager.double(), model.double())]
    assert torch.equal(*answers)


@pytest.mark.parametrize("option", [{"softcap": 20.0}, {"dropout": 0.5}, {"s_aux": torch.zeros(4)}])
def test_one_token_with_an_unusual_option_is_left_to_transformers(option, monkeypatch):
    passed_on = []
    monkeypatch.setattr(memory.sdpa_attention, "sdpa_attention_forward", lambda *a, **k: passed_on.append(k))
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8)
    memory.packed_attention(None, query, key, key, None, scaling=0.1, **option)
    assert passed_on == [{"scaling": 0.1, **option}]
    passed_on.clear()
    memory.packed_attention(None, query, key, key, torch.zeros(2, 4, 1, 5))  # a mask for each head
    memory.packed_attention(None, query.expand(2, 4, 3, 8), key, key, None)
    assert passed_on == [{}, {}]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("device-side assert", 710),
     RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")],
    ids=["memory", "accelerator", "cublas"],
)
def test_a_gpus_trouble_is_not_reported_as_the_models(error, monkeypatch):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(memory, "packed_hidden_states", failing)
    with pytest.raises(type(error)) as raised:
        memory.prepare_model(tiny())
    assert raised.value is error


def test_attention_out_of_reach_is_refused():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(ValueError, match="BloomForCausalLM.*attention") as refusal:
        memory.prepare_model(bloom)
    assert "\n" not in str(refusal.value)


def test_packed_tokens_that_come_out_otherwise_than_in_rows_are_refused(monkeypatch):
    real = memory.pack

    def mixed_up(prompts, completions):
        *rest, places = real(prompts, completions)
        places[0, 0, 1, 1] = 2  # the second answer sees a token of the first one
        return [*rest, places]

    monkeypatch.setattr(memory, "pack", mixed_up)
    with pytest.raises(ValueError, match="attention"):
        memory.prepare_model(tiny())


class Waits(TorchDispatchMode):
    """Counts operations for whose result the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith(("index", "_index")) and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        )
        if by_mask or name in {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount"}:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recomputed", [0, 2])
def test_a_micro_batch_never_waits_and_goes_to_the_device_in_one_copy(recomputed, monkeypatch):
    model, real, copies = tiny(), memory.on_device, []
    memory.prepare_model(model)
    monkeypatch.setattr(memory, "on_device", lambda *a: copies.append(a) or real(*a))
    sequences = [sequence(p, c + [9]) for p, c in zip(PROMPTS, COMPLETIONS)]
    with Waits() as waits:
        logprobs, _ = memory.sequence_logprobs(model, sequences, 0.7, recomputed)
        logprobs.sum().backward()
    assert waits.seen == [] and len(copies) == 1


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_sequence_logprobs_are_those_of_each_sequence_alone_at_the_tokens_that_count(data):
    model = tiny("qwen3-tied")
    ids = st.lists(st.integers(0, 96), min_size=1, max_size=8)
    prompts, sequences, expected = data.draw(st.lists(ids, min_size=1, max_size=3)), [], []
    for _ in range(data.draw(st.integers(1, 5))):
        prompt, completion = data.draw(st.sampled_from(prompts)), data.draw(ids)
        counted = sorted(data.draw(st.sets(st.sampled_from(range(len(completion))), min_size=1)))
        sequences.append(SimpleNamespace(prompt=prompt, completion=completion, counted=torch.tensor(counted)))
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double() / 0.7
        all_of_them = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        expected.append(all_of_them[counted].detach())
    memory.prepare_model(model)
    logprobs, _ = memory.sequence_logprobs(model, sequences, 0.7, 0, data.draw(st.integers(1, 9)))
    torch.testing.assert_close(logprobs.double(), torch.cat(expected), rtol=1e-4, atol=1e-4)


# --- the reference policy --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2-tied", "llama-untied"])
def test_the_model_computes_with_the_references_weights_and_gets_its_own_back(name):
    model = tiny(name, torch.bfloat16)
    start, objects = copy.deepcopy(model), list(model.parameters())
    reference = memory.ReferencePolicy(model)
    memory.sum_gradients_in_fp32(model.parameters())
    optimizer = memory.AdamW8bit(model.parameters(), lr=1e-2)
    ids = torch.randint(97, (2, 9))

    def train_and_check():
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained = copy.deepcopy(model)
        with reference.swapped_in():
            assert same(model(ids).logits, start(ids).logits)
        with pytest.raises(KeyError), reference.swapped_in():
            raise KeyError
        assert all(same(p.data, q.data) for p, q in zip(model.parameters(), trained.parameters()))
        assert all(p is q for p, q in zip(model.parameters(), objects))
        assert not same(model(ids).logits, start(ids).logits)

    train_and_check()
    train_and_check()  # the optimizer goes on with the weights that came back
    assert len(reference.weights) == len(objects)  # a tied weight once


def test_refresh_makes_the_policy_the_reference_and_keeps_them_apart():
    model = tiny()
    reference = memory.ReferencePolicy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    policy = copy.deepcopy(model)
    reference.refresh()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    with reference.swapped_in():
        assert all(same(p.data, q.data) for p, q in zip(model.parameters(), policy.parameters()))

    other = memory.ReferencePolicy(tiny("qwen2-tied"))
    other.load_state_dict(reference.weights)
    assert all(same(other.weights[k], x) for k, x in reference.weights.items())
    with pytest.raises(ValueError, match="ReferencePolicy"):
        other.load_state_dict(memory.ReferencePolicy(tiny("qwen2-untied")).weights)


@pytest.mark.parametrize("fails_at", [1, 30, "within", 95, None])
def test_a_swap_that_fails_midway_loses_no_weights(fails_at, monkeypatch):
    """Memory runs out at a copy of the policy, before a weight has changed, or while the reference computes;
    or something stops it in the middle of the weights."""
    model = tiny()
    reference, calls = memory.ReferencePolicy(model), []
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    policy, resting = copy.deepcopy(model), copy.deepcopy(reference.weights)

    class RunsOut(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            if len(calls) == fails_at:
                raise torch.OutOfMemoryError("no memory")
            return func(*args, **(kwargs or {}))

    def compute(sequences):
        if fails_at == "within":
            raise torch.OutOfMemoryError("no memory")

    reference.logprobs = compute
    raised = pytest.raises(torch.OutOfMemoryError) if fails_at else contextlib.nullcontext()
    with raised, RunsOut():
        reference([])
    assert all(same(p.data, q.data) for p, q in zip(model.parameters(), policy.parameters()))
    assert all(same(x, resting[name]) for name, x in reference.weights.items())


# --- the plan --------------------------------------------------------------------------------------------


def plan(config, budget=10**15, **changes):
    settings = {
        "prompt_tokens": 150, "max_new_tokens": 1024, "prompts": 32, "group_size": 8, "reference": True,
        "dtype": torch.bfloat16, "top_entropy": 0.2, "memory_budget_bytes": budget,
    }
    return memory.plan(config, **{**settings, **changes})


def qwen25(hidden, intermediate, layers, heads):
    return Qwen2Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True,
    )


HALF_B, ONE_AND_A_HALF_B = qwen25(896, 4864, 24, 14), qwen25(1536, 8960, 28, 12)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_is_within_a_tenth_of_what_an_update_holds(name, dtype, monkeypatch):
    monkeypatch.setattr(memory, "HEAD_WORKSPACE", 2**21)
    monkeypatch.setattr(memory, "OPTIMIZER_SLICE", 2**14)
    shape = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256, "head_dim": 16}
    model = tiny(name, dtype, num_hidden_layers=4, **shape)
    memory.prepare_model(model)
    params = list(model.parameters())
    memory.sum_gradients_in_fp32(params)
    for prompt_tokens, group, prompts, rows, recomputed in [
        (28, 8, 4, 4, 0), (28, 8, 4, 8, 2), (28, 8, 4, 8, 4),  # a part of the batch
        (150, 16, 2, 16, 0), (150, 16, 2, 16, 4), (3, 1, 12, 6, 1),  # a prompt of many answers, and of one
        (28, 8, 2, 16, 0), (28, 8, 2, 16, 4),  # all of it, before whose backward pass no gradients are there
    ]:
        ids = torch.randint(1000, (prompts * group, 101)).tolist()
        sequences = [SimpleNamespace(prompt=[i // group] * prompt_tokens, completion=x,
                                     counted=torch.arange(101)) for i, x in enumerate(ids)]
        expected = plan(
            model.config, prompt_tokens=prompt_tokens, max_new_tokens=101, dtype=dtype, top_entropy=1.0,
            prompts=prompts, group_size=group, micro_batch_tokens=10**9, recomputed_layers=recomputed,
            offload_optimizer=True, reference=False,
        )
        share = expected.limits.place_share
        computed = -(-rows // group) * prompt_tokens + 100 * rows
        cost = (1 - share) * computed + share * rows * (100 + prompt_tokens)
        expected = plan(
            model.config, prompt_tokens=prompt_tokens, max_new_tokens=101, dtype=dtype, top_entropy=1.0,
            prompts=prompts, group_size=group, micro_batch_tokens=math.ceil(cost), reference=False,
            recomputed_layers=recomputed, device="cpu",
        )
        batches = memory.micro_batches(sequences, expected.limits)
        assert {len(batch) for batch in batches} == {rows}
        model.zero_grad(set_to_none=True)
        with LiveBytes(*params) as live:
            for batch in batches[:2]:
                memory.sequence_logprobs(model, batch, 1.0, recomputed)[0].sum().backward()
        planned = expected.update_peak_bytes - expected.optimizer
        spared = 2 * computed * 256 * dtype.itemsize  # by a CPU's kernel for silu's backward
        assert 0.97 * live.peak <= planned <= 1.1 * live.peak + spared, (prompt_tokens, rows, recomputed)

    optimizer = memory.AdamW8bit(params, lr=1e-6)
    optimizer.step()
    parts = ("remainder", "state1", "state2", "absmax1", "absmax2")
    held = sum(x.nbytes for state in optimizer.state.values() for k, x in state.items() if k in parts)
    expected = plan(model.config, dtype=dtype)
    assert expected.optimizer == held
    assert expected.weights == sum(p.nbytes for p in params)
    assert expected.gradients == sum(p.grad.nbytes for p in params)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_micro_batch_whose_tokens_all_count_takes_no_more_than_was_planned(share):
    model = tiny("qwen2-tied", vocab_size=20_000, hidden_size=16)
    memory.prepare_model(model)
    params = list(model.parameters())
    memory.sum_gradients_in_fp32(params)
    made = plan(model.config, prompt_tokens=10, max_new_tokens=50, dtype=torch.float32, top_entropy=share,
                prompts=8, group_size=8, micro_batch_tokens=420, reference=False, device="cpu")
    for p in params:
        p.grad = torch.zeros_like(p)  # as from the second micro-batch on
    for counted, least in ((range(50), 0.97), (range(int(50 * share)), 0.9)):
        batch = [sequence([1] * 10, [2] * 50) for _ in range(8)]
        for x in batch:
            x.counted = torch.tensor(counted)
        with LiveBytes(*params, *(p.grad for p in params)) as live:
            memory.sequence_logprobs(model, batch, 1.0, 0, made.limits.head_rows)[0].sum().backward()
        assert least * live.peak <= made.update_peak_bytes - made.optimizer <= 1.1 * live.peak


@pytest.mark.parametrize("rows, ends", [(48, []), (48, range(30)), (20, []), (20, range(30)), (5, [])])
def test_the_plan_is_within_a_twentieth_of_what_sampling_holds(rows, ends):
    model = tiny("qwen2-tied", vocab_size=1000, hidden_size=64, intermediate_size=256, head_dim=16)
    made = plan(model.config, prompt_tokens=60, max_new_tokens=40, prompts=12, group_size=4, max_rows=rows,
                dtype=torch.float32, reference=False, device="cpu")
    params = list(model.parameters())
    with LiveBytes(*params) as live:
        memory.sample(model, [[i] * 60 for i in range(12)], group_size=4, max_new_tokens=40, max_rows=rows,
                      eos_token_id=list(ends), pad_token_id=0)
    planned = made.rollout_peak_bytes - made.optimizer
    assert 0.95 * live.peak <= planned <= 1.05 * live.peak, planned / live.peak


def test_qwen_half_b_fits_eight_gigabytes_and_six_with_offload_and_1_5b_eleven():
    cases = ((HALF_B, 8.0, False), (HALF_B, 6.0, True), (ONE_AND_A_HALF_B, 11.0, True))
    for config, budget, offload in cases:
        made = plan(config, int(budget * 1e9), offload_optimizer=offload)
        assert max(made.rollout_peak_bytes, made.update_peak_bytes) <= budget * 1e9


def test_the_plan_has_columns_to_spare_when_an_evaluation_has_more_answers_than_rows():
    config = Qwen2Config(**SMALL)
    caches = {n: plan(config, prompts=8, max_rows=64, evaluated=n).kv_cache_bytes for n in (0, 64, 65)}
    assert caches[64] == caches[0]  # whole eights of columns: 150 + 1024, and half an answer's more
    assert caches[65] * 1176 == caches[0] * 1688


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_knows_what_an_offloaded_optimizer_and_a_reference_take_on_the_host(dtype):
    model = tiny(dtype=dtype, hidden_size=64, vocab_size=3000)
    optimizer = memory.AdamW8bit(model.parameters(), lr=1e-6, offload=True)
    optimizer.make_state()
    parts = ("remainder", "state1", "state2", "absmax1", "absmax2")
    state = sum(x.nbytes for s in optimizer.state.values() for k, x in s.items() if k in parts)
    weights = sum(x.nbytes for x in memory.ReferencePolicy(model).weights.values())
    made = plan(model.config, dtype=dtype, offload_optimizer=True)
    assert made.host_bytes == state + 2 * weights  # while it computes, the policy's weights are there too
    assert plan(model.config, dtype=dtype, offload_optimizer=True, reference=False).host_bytes == state
    assert plan(model.config, dtype=dtype, reference=False).host_bytes == 0


def test_on_a_cpu_what_rests_in_host_memory_counts():
    gpu, cpu = (plan(HALF_B, device=device, offload_optimizer=True) for device in ("cuda", "cpu"))
    resting = gpu.host_bytes - gpu.weights
    assert cpu.host_bytes == 0 and cpu.update_peak_bytes == gpu.update_peak_bytes + resting
    assert cpu.resting == resting and gpu.resting == 0


def test_the_table_adds_up_to_the_peaks():
    made = plan(HALF_B, int(9e9), reference=True)
    lines = [(line[:52].strip(), *line[52:].split()) for line in made.table().splitlines()[1:-1]]
    assert lines[-3][1:] == (f"{made.rollout_peak_bytes / 1e9:.2f}", f"{made.update_peak_bytes / 1e9:.2f}")
    assert lines[-2][0] == "budget" and lines[-2][1:] == ("9.00", "9.00")
    rollout = sum(float(x) for _, x, _ in lines[:-3] if x != "-")
    assert rollout == pytest.approx(made.rollout_peak_bytes / 1e9, abs=0.03)
    assert f"{made.limits.max_rows} rows" in made.table().splitlines()[-1]


def test_more_memory_is_used_for_less_work():
    made = [plan(HALF_B, int(gb * 1e9)) for gb in (6.5, 8, 10, 12, 24)]
    assert all(max(p.rollout_peak_bytes, p.update_peak_bytes) <= p.memory_budget_bytes for p in made)
    rows = [p.limits.max_rows for p in made]
    work = [(3 + x.recomputed_layers / 24) * (1 + 400 / x.micro_batch_tokens)
            for x in (p.limits for p in made)]
    assert rows == sorted(rows)
    assert rows[-1] == 256
    assert work == sorted(work, reverse=True)
    assert work[-1] < work[0]


def test_an_engine_has_weights_and_cache_of_its_own_and_sleeps_only_on_a_gpu():
    weights = 494_032_768 * 2
    without, sleeps, stays = (
        plan(HALF_B, max_rows=64, reference=False, engine=engine, device=device)
        for engine, device in ((False, "cuda"), (True, "cuda"), (True, "cpu"))
    )
    episode = 1280  # 256 + 1024, whole blocks; 12 KB a token
    assert sleeps.kv_cache_bytes == stays.kv_cache_bytes == 65 * episode * 24 * 2 * 2 * 64 * 2
    for made in (sleeps, stays):
        assert made.rollout_peak_bytes > (
            without.weights + without.optimizer + weights + made.kv_cache_bytes
        )
        assert "vLLM: weights" in made.table()
    assert sleeps.update_peak_bytes == without.update_peak_bytes
    assert stays.update_peak_bytes == without.update_peak_bytes + weights + stays.kv_cache_bytes


def test_choices_that_are_given_are_kept():
    made = plan(HALF_B, micro_batch_tokens=2000, recomputed_layers=5, max_rows=7).limits
    assert (made.micro_batch_tokens, made.recomputed_layers, made.max_rows) == (2000, 5, 7)


@pytest.mark.parametrize("config, budget, changes, over", [
    (HALF_B, 5.5, {}, r"the update takes 5.7\d GB"), (HALF_B, 0.5, {}, "the rollout takes .* and the update"),
    (ONE_AND_A_HALF_B, 9.5, {"offload_optimizer": True, "max_new_tokens": 16000}, "the update takes"),
    (HALF_B, 6.5, {"max_rows": 256, "recomputed_layers": 0}, "the rollout takes"),
])
def test_what_does_not_fit_is_refused_in_a_line_that_says_what_is_over_and_which_flags_help(
    config, budget, changes, over
):
    with pytest.raises(memory.DoesNotFit, match=f"{over}.*but the budget is {budget:.2f} GB") as refusal:
        plan(config, int(budget * 1e9), **changes)
    for flag in ("--offload-optimizer", "--max-new-tokens", "--model"):
        assert flag in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_tiny_float32_model_on_a_laptop_gets_one_pass_without_checkpointing():
    made = plan(tiny().config, 4 * 10**9, prompt_tokens=30, max_new_tokens=40, dtype=torch.float32)
    assert (made.limits.recomputed_layers, made.limits.max_rows) == (0, 256)
    one_by_one = 256 * 69  # a prompt is paid once for its eight answers
    assert 32 * 30 + 256 * 39 < made.limits.micro_batch_tokens < one_by_one
    assert made.gradients == 0  # all in one micro-batch: they come as activations go
    assert made.update_peak_bytes < 10**9


def test_the_budget_of_a_cpu_is_below_its_memory():
    with open("/proc/meminfo") as lines:
        total = 1024 * int(next(lines).split()[1])
    assert 0.01 * total < memory.detect_budget_bytes("cpu") < total


@pytest.mark.parametrize("limit, taken, files, budget", [
    ("1000000\n", "200000\n", 0, 640_000), ("1000000\n", "1200000\n", 0, 0), ("max\n", "5\n", 0, None),
    ("1000000\n", "950000\n", 250_000, 240_000),  # the system's copies of files are no hindrance
    (None, None, None, None),
])
def test_a_containers_limit_less_what_is_taken_is_the_cpus_memory(
    limit, taken, files, budget, tmp_path, monkeypatch
):
    everything = memory.detect_budget_bytes("cpu")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    if limit:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(taken)
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 7\n")
    now = memory.detect_budget_bytes("cpu")
    assert now == (pytest.approx(everything, rel=0.2) if budget is None else budget)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # torchrun's ranks on this machine share it
    assert memory.detect_budget_bytes("cpu") == pytest.approx(now / 4, rel=0.2)


# --- when memory runs out --------------------------------------------------------------------------------


@pytest.mark.parametrize("error, ran_out", [
    (torch.OutOfMemoryError("CUDA out of memory"), True),
    (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("shapes can't be multiplied"), False),
])
def test_libraries_say_in_their_own_words_that_memory_ran_out(error, ran_out):
    assert memory.is_out_of_memory(error) == ran_out


def test_limits_halve_until_nothing_is_left_and_say_what_sets_them_back():
    limits = memory.Limits(max_rows=5, micro_batch_tokens=1000, recomputed_layers=2, layers=6)
    told = [limits.shrink("rollout", longest=400) for _ in range(3)]
    assert limits.max_rows == 1
    assert told[0] == "2 rows at a time (to set it back later: --resume RUN --max-rows N)"
    assert told[1].startswith("1 rows") and told[2] is None
    told = [limits.shrink("update", longest=400) for _ in range(4)]
    assert (limits.micro_batch_tokens, limits.recomputed_layers) == (400, 6)
    assert [words and words.split(" (")[0] for words in told] == [
        "micro-batches of 500 tokens", "micro-batches of 400 tokens",
        "all 6 layers computed again in backward", None,
    ]
    assert "--resume RUN --micro-batch-tokens N" in told[0]


@pytest.mark.parametrize("dtype, capability, version, told", [
    (torch.bfloat16, (7, 5), "2.15.0", "needs Ampere or newer; use --dtype float32"),
    (torch.float32, (8, 6), "2.13.0", "use bfloat16, or torch 2.15"),
    (torch.float32, (7, 5), "2.15.0", None), (torch.bfloat16, (8, 6), "2.11.0", None),
])
def test_a_card_that_cannot_compute_in_a_dtype_is_refused_with_what_to_use(
    dtype, capability, version, told, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    if told:
        with pytest.raises(ValueError, match=told):
            memory.prepare_cuda(dtype)
    else:
        memory.prepare_cuda(dtype)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


# --- with a GPU ------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("offload", [False, True])
def test_on_a_gpu_the_masters_equal_the_librarys_float32_weights(offload):
    start, gradients = weights_and_gradients(50)
    start, gradients = [w.cuda() for w in start], [[g.cuda() for g in step] for step in gradients]
    exact = parameters(start)
    run(bitsandbytes.optim.AdamW8bit(exact, **HYPER), exact, gradients)
    ours = parameters([w.bfloat16() for w in start])
    optimizer = memory.AdamW8bit(ours, **HYPER, offload=offload)
    run(optimizer, ours, gradients)
    for p, reference in zip(ours, exact):
        remainder = optimizer.state[p]["remainder"]
        assert remainder.is_cuda != offload
        assert same(memory.join_fp32(p.data, remainder.cuda()), reference.data)


@on_gpu
def test_on_a_gpu_a_swap_takes_no_memory_and_gives_the_weights_back():
    model = tiny(dtype=torch.bfloat16, hidden_size=512, vocab_size=50_000).cuda()
    reference, before = memory.ReferencePolicy(model), [p.data.clone() for p in model.parameters()]
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    before = [p.data.clone() for p in model.parameters()]
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with reference.swapped_in():
        peak = torch.cuda.max_memory_allocated()  # before the comparison takes some
        assert not same(model.model.norm.weight.data, before[-1])
    assert peak == held
    assert all(same(p.data, q) for p, q in zip(model.parameters(), before))


# ---- The reference on a server: what is asked of it and what it may answer; vLLM's own is in test_vllm.py


def served_logprob(ids, i):
    """What the stand-in says of token i: it depends on all tokens up to it, so that any shift shows."""
    return -((sum(ids[: i + 1]) * 31 + i) % 997) / 100


class ReferenceHandler(http.server.BaseHTTPRequestHandler):
    """A stand-in that speaks as much of OpenAI's completions as vLLM's server does for a reference."""

    protocol_version, vocabulary = "HTTP/1.1", 97

    def token_logprobs(self, ids):
        """(log-probability, text) of each token after the first."""
        return [(served_logprob(ids, i), f"<{ids[i]}>") for i in range(1, len(ids))]

    def answer(self, code, body):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.headers["Authorization"] != self.server.authorization:
            return self.answer(401, {"error": "Unauthorized"})
        assert self.path == "/v1/models"
        self.answer(200, self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        with self.server.lock:
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        time.sleep(self.server.seconds)
        with self.server.lock:
            self.server.under_way -= 1
        assert self.path == "/v1/completions" and self.headers["Authorization"] == self.server.authorization
        if self.server.troubles:
            trouble = self.server.troubles.pop()  # a code, or what a 200 answers
            busy = isinstance(trouble, int)
            return self.answer(trouble if busy else 200, {"error": "busy"} if busy else trouble)
        ids = body["prompt"]
        if max(ids) >= self.vocabulary:
            return self.answer(400, {"error": {"message": "Token id 97 is out of vocabulary"}})
        tokens = [{str(i): {"logprob": logprob, "decoded_token": text}}
                  for i, (logprob, text) in zip(ids[1:], self.token_logprobs(ids))]
        self.answer(200, {"choices": [{"prompt_logprobs": [None, *tokens]}]})

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(handler=ReferenceHandler, context=64):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requests, server.troubles, server.authorization, server.seconds = [], [], None, 0
        server.models = {"data": [{"id": "frozen", "max_model_len": context}]}
        server.lock, server.under_way, server.most_under_way = threading.Lock(), 0, 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def reference_server(monkeypatch):
    monkeypatch.delenv("GRPO_REFERENCE_TOKEN", raising=False)
    with serving() as server:
        yield server


def connect(server, **changes):
    return memory.ReferenceServer(
        server.url, **{"longest": 40, "patience_seconds": 20, "warn": [].append, **changes}
    )


def scored(prompt, completion, counted=None):
    counted = torch.tensor(range(len(completion)) if counted is None else counted, dtype=torch.int64)
    return SimpleNamespace(prompt=prompt, completion=completion, counted=counted)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_server_scores_each_counted_token_given_all_before_it(reference_server, data):
    ids = st.lists(st.integers(0, 96), min_size=1, max_size=20)
    sequences = []
    for _ in range(data.draw(st.integers(0, 6))):
        prompt, completion = data.draw(ids), data.draw(ids)
        kept = data.draw(st.lists(st.booleans(), min_size=len(completion), max_size=len(completion)))
        sequences.append(scored(prompt, completion, [i for i, keep in enumerate(kept) if keep]))
    reference = connect(reference_server)
    reference_server.requests.clear()
    for x, logprobs in zip(sequences, reference(sequences), strict=True):
        whole = x.prompt + x.completion
        expected = [served_logprob(whole, len(x.prompt) + i) for i in x.counted.tolist()]
        assert logprobs.dtype == torch.float32 and logprobs.tolist() == pytest.approx(expected)
    for body in reference_server.requests:
        rest = {k: v for k, v in body.items() if k != "prompt"}
        assert rest == {"model": "frozen", "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    asked = sorted(body["prompt"] for body in reference_server.requests)
    assert asked == sorted(x.prompt + x.completion for x in sequences)


def test_a_server_is_asked_several_things_at_a_time_but_not_all(reference_server, monkeypatch):
    reference_server.seconds = 0.2
    monkeypatch.setattr(memory, "REQUESTS_AT_ONCE", 3)
    connect(reference_server)([scored([1, 2], [3])] * 9)
    assert len(reference_server.requests) == 9
    assert 1 < reference_server.most_under_way <= 3


def test_a_bearer_token_comes_from_the_environment(reference_server, monkeypatch):
    reference_server.authorization = "Bearer hush"
    with pytest.raises(memory.NoReference, match="401.*GRPO_REFERENCE_TOKEN"):
        connect(reference_server)
    monkeypatch.setenv("GRPO_REFERENCE_TOKEN", "hush")
    assert len(connect(reference_server)([scored([1], [2, 3])])[0]) == 2


def test_a_busy_server_is_asked_again(reference_server, monkeypatch):
    monkeypatch.setattr(memory, "PAUSE", 0.2)
    told = []
    reference = connect(reference_server, warn=told.append)
    reference_server.troubles = [503]
    [logprobs] = reference([scored([5, 6], [7])])
    assert logprobs.tolist() == pytest.approx([served_logprob([5, 6, 7], 2)])
    assert len(reference_server.requests) == 2
    assert len(told) == 1 and "503" in told[0]


def test_a_server_that_stays_away_is_gone_when_patience_ends(reference_server, monkeypatch):
    monkeypatch.setattr(memory, "PAUSE", 1.0)
    told = []
    reference = connect(reference_server, patience_seconds=2.5, warn=told.append)
    reference_server.troubles = [502] * 100
    started = time.monotonic()
    with pytest.raises(memory.NoReference, match="is away.*502"):
        reference([scored([5, 6], [7])])
    assert time.monotonic() - started < 2.5
    assert 2 <= len(reference_server.requests) <= 3  # at once, and each second
    assert len(told) == 1
    reference_server.troubles = []
    assert len(reference([scored([5, 6], [7])])) == 1


def test_nobody_listening_is_a_server_that_is_away():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = SimpleNamespace(url=f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(memory.NoReference, match="refused"):
        connect(nowhere, patience_seconds=0.5)


def test_a_stop_request_ends_the_waiting(reference_server):
    stops = []
    reference = connect(reference_server, patience_seconds=1000, warn=stops.append)
    reference.stop = lambda: bool(stops)
    reference_server.troubles = [502] * 100
    with pytest.raises(memory.NoReference):
        reference([scored([5, 6], [7])])  # the warning itself asks for the stop
    assert len(reference_server.requests) <= 2


def test_a_server_that_hangs_delays_a_stop_by_less_than_five_seconds():
    """It accepts connections and never answers. The process, too, ends without waiting for it."""
    script = f"""
        import sys, threading, time, types
        sys.path.insert(0, {str(Path(memory.__file__).parent)!r})
        import http.server, socket, torch, memory

        class Models(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{{"data": [{{"id": "frozen"}}]}}')

            def do_POST(self):
                time.sleep(1000)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Models)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reference = memory.ReferenceServer(f"http://127.0.0.1:{{server.server_port}}", longest=40)
        asked = time.monotonic() + 1.5
        reference.stop = lambda: time.monotonic() > asked
        x = types.SimpleNamespace(prompt=[1, 2], completion=[3], counted=torch.tensor([0]))
        try:
            reference([x] * 40)
        except memory.NoReference as error:
            print(time.monotonic() - asked, error)
    """
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True,
                          check=False, timeout=100)
    assert done.returncode == 0 and "when the run was stopped" in done.stdout, done.stderr
    assert float(done.stdout.splitlines()[-1].split()[0]) < 5  # a line before may say that it is away
    assert time.monotonic() - started < 60


def test_a_server_that_can_not_be_the_reference_is_refused_by_what_is_wrong(reference_server):
    with pytest.raises(memory.NoReference, match="takes 63 tokens.*--max-model-len 65"):
        connect(reference_server, longest=64)
    connect(reference_server, longest=63)
    with pytest.raises(memory.NoReference, match="refuses: 400 .*out of vocabulary"):
        connect(reference_server)([scored([1, 2], [3, 97])])


@pytest.mark.parametrize("models", ["<html>", {"data": []}, {"detail": "not here"}, [1]])
def test_an_address_that_speaks_something_else_is_refused(reference_server, models):
    reference_server.models = models
    with pytest.raises(memory.NoReference, match="doesn't answer as a server of OpenAI's completions with"):
        connect(reference_server)


@pytest.mark.parametrize("page", ["<html>", {"object": "error"}, {"choices": []}, {"choices": [{}]},
                                  {"choices": [{"prompt_logprobs": None}]},
                                  {"choices": [{"prompt_logprobs": [None, {"1": {}}]}]},
                                  {"choices": [{"prompt_logprobs": [None, {"1": {}}, {"4": {}}]}]},
                                  {"choices": [{"prompt_logprobs": [None, {"1": {}}, {"3": {}}]}]},
                                  {"choices": [{"prompt_logprobs": [None, {"1": {}}, {"3": {"logprob": None}}]
                                                }]}])
def test_a_page_in_place_of_log_probabilities_ends_the_run_as_a_server_that_went_away_does(
    reference_server, page
):
    reference = connect(reference_server)
    reference_server.troubles = [page]  # as a proxy in between gives its own
    with pytest.raises(memory.NoReference, match="doesn't answer as a server of OpenAI's completions with"):
        reference([scored([1, 2], [3])])


# --- sampling ----------------------------------------------------------------------------------------------


def tiny_model(kind: str):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
             "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
             "head_dim": 8}
    config = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config,
              "llama": transformers.LlamaConfig}[kind]
    torch.manual_seed(7)
    return transformers.AutoModelForCausalLM.from_config(config(**sizes)).eval()


SAMPLED = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [5, 5, 9, 30], [41] * 9]


def answers_of_generate(model, eos, max_new_tokens):
    """One prompt at a time, so that no padding is involved."""
    answers = []
    for prompt in SAMPLED:
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("kind, check_every", [("qwen2", 1), ("qwen2", 8), ("qwen3", 1), ("llama", 3)])
def test_greedy_equals_generate_for_mixed_prompts_that_end_at_different_times(kind, check_every, monkeypatch):
    monkeypatch.setitem(memory.CHECK_EVERY, "cpu", check_every)  # as on a GPU
    model = tiny_model(kind)
    free = answers_of_generate(model, None, 20)
    eos = [free[0][4], free[2][9]]  # tokens that are known to come up, so that rows end early
    expected = answers_of_generate(model, eos, 20)
    assert len({len(answer) for answer in expected}) > 2
    for max_rows in (None, 1, 2, 4):  # all at once, and prompts taking the places of finished ones
        got = memory.sample(model, SAMPLED, max_new_tokens=20, temperature=0, eos_token_id=eos,
                            pad_token_id=0, max_rows=max_rows)
        assert [c.ids for c in got] == expected
        assert [c.finished for c in got] == [answer[-1] in eos for answer in expected]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_recorded_logprobs_and_entropies_are_those_of_a_teacher_forced_pass(temperature):
    model = tiny_model("qwen2")
    got = memory.sample(model, SAMPLED, group_size=3, max_new_tokens=12, temperature=temperature,
                   eos_token_id=[3, 4], pad_token_id=0, max_rows=5)
    assert len(got) == 18
    for i, c in enumerate(got):
        prompt = SAMPLED[i // 3]
        logits = model(torch.tensor([prompt + c.ids])).logits[0, len(prompt) - 1 : -1].double() / temperature
        expected = torch.distributions.Categorical(logits=logits)
        torch.testing.assert_close(
            torch.tensor(c.logprobs).double(), expected.log_prob(torch.tensor(c.ids)), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(torch.tensor(c.entropies).double(), expected.entropy(), rtol=0, atol=1e-4)


def test_sampled_frequencies_are_the_models_probabilities():
    model = tiny_model("qwen2")
    temperature, n = 2.0, 6000
    got = memory.sample(model, [[5, 6, 7]], group_size=n, max_new_tokens=1, temperature=temperature,
                   eos_token_id=0, pad_token_id=0, generator=torch.Generator().manual_seed(0))
    p = (model(torch.tensor([[5, 6, 7]])).logits[0, -1].double() / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in got]), minlength=64)
    common = p * n >= 5  # the chi-square test wants five expected in each bin; the rest share one
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = torch.cat([p[common], p[~common].sum()[None]]) * n
    chi_square = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)  # four standard deviations above its mean


def in_float64(logits, temperature):
    """(log-probabilities, their running sums' upper ends) of rows of logits, all in float64."""
    logprobs = (logits.double() / temperature).log_softmax(-1)
    return logprobs, logprobs.exp().cumsum(-1)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), vocab=st.one_of(st.integers(2, 1500), st.integers(2, 300_000)),
       temperature=st.sampled_from([0, 0.3, 1.0, 1.7]), spread=st.sampled_from([0.0, 1.0, 4.0, 30.0]),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), hidden=st.sampled_from([0.0, 0.5, 0.99]))
def test_a_token_is_where_the_running_sum_in_float64_passes_its_number(
    data, vocab, temperature, spread, dtype, hidden
):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    rows = data.draw(st.integers(1, 12 if vocab < 100_000 else 3))
    logits = torch.randn(rows, vocab, generator=random) * spread
    logits += data.draw(st.sampled_from([0.0, -90.0, 300.0]))
    impossible = torch.rand(rows, vocab, generator=random) < hidden
    impossible[:, data.draw(st.integers(0, vocab - 1))] = False
    logits = logits.masked_fill(impossible, -math.inf).to(dtype)
    uniform = torch.rand(rows, dtype=torch.float64, generator=random)
    uniform[0] = data.draw(st.sampled_from([0.0, 1 - 2**-53, 0.5]))
    before = logits.clone()
    tokens, logprobs, entropies = memory.choose_tokens(logits, temperature, uniform if temperature else None)
    assert torch.equal(logits, before)
    assert (logprobs.dtype, entropies.dtype, tokens.dtype) == (torch.float32, torch.float32, torch.long)

    expected, above = in_float64(logits, temperature or 1.0)
    picked = expected.gather(1, tokens[:, None])[:, 0]
    if temperature:  # the number lies in the token's share, up to float32's rounding of the shares
        upper = above.gather(1, tokens[:, None])[:, 0]
        assert (uniform <= upper + 2e-6).all() and (uniform >= upper - picked.exp() - 2e-6).all()
        clear = ((above - uniform[:, None]).abs() > 2e-6).all(1)
        searched = torch.searchsorted(above, uniform[:, None], right=True)[:, 0]
        assert torch.equal(tokens[clear], searched[clear])
    else:
        assert torch.equal(tokens, logits.argmax(-1))
    assert picked.isfinite().all()  # never a token of probability zero
    torch.testing.assert_close(logprobs.double(), picked, rtol=2e-6, atol=2e-6)
    entropy = torch.special.entr(expected.exp()).sum(-1)
    torch.testing.assert_close(entropies.double(), entropy, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("vocab", [3, 320, 5000])
def test_a_token_of_probability_zero_is_never_drawn(vocab):
    rows = 400
    logits = torch.randn(rows, vocab).masked_fill(torch.rand(rows, vocab) < 0.7, -math.inf)
    logits[:, vocab // 2] = 0.1
    logits[:10] = -math.inf
    logits[:10, vocab // 2] = -5.0  # the only one
    for number in (0.0, 0.3, 1 - 2**-53):
        uniform = torch.full((rows,), number, dtype=torch.float64)
        tokens, logprobs, entropies = memory.choose_tokens(logits, 0.7, uniform)
        assert logprobs.isfinite().all() and entropies.isfinite().all()
        assert logits.gather(1, tokens[:, None]).isfinite().all()
        assert (tokens[:10] == vocab // 2).all()
        assert (logprobs[:10] == 0).all() and (entropies[:10] == 0).all()


@pytest.mark.parametrize("vocab", [300, 5000])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_near_certain_tokens_keep_their_precision(vocab, temperature):
    logits = torch.full((3, vocab), -25.0)
    logits[:, 200] = torch.tensor([0.0, 3.0, 6.0])
    half = torch.full((3,), 0.5, dtype=torch.float64)
    _, logprobs, entropies = memory.choose_tokens(logits, temperature, half)
    expected, _ = in_float64(logits, 1.0)
    assert expected[2, 200] > -1e-9
    torch.testing.assert_close(logprobs.double(), expected[:, 200], rtol=1e-4, atol=0)
    entropy = torch.special.entr(expected.exp()).sum(-1)
    torch.testing.assert_close(entropies.double(), entropy, rtol=1e-4, atol=0)


@pytest.mark.parametrize("vocab", [3, 320, 5000])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_logits_that_are_not_numbers_give_a_token_whose_logprob_tells(vocab, temperature):
    logits = torch.randn(4, vocab)
    logits[0] = math.nan
    logits[1, 2], logits[2, 1] = math.nan, math.inf
    uniform = torch.rand(4, dtype=torch.float64)
    tokens, logprobs, entropies = memory.choose_tokens(logits, temperature, uniform)
    assert ((0 <= tokens) & (tokens < vocab)).all()
    assert logprobs.isnan().tolist() == [True, True, True, False]
    assert entropies.isfinite().all()


@pytest.mark.parametrize("vocab", [64, 320, 5000])
def test_where_logits_lie_and_which_rows_go_together_change_no_bit(vocab, monkeypatch):
    logits, uniform = torch.randn(40, vocab) * 3, torch.rand(40, dtype=torch.float64)
    expected = memory.choose_tokens(logits, 0.7, uniform)
    for offset in (1, 2, 3, 5, 8):
        moved = torch.empty(logits.numel() + offset)[offset:].view_as(logits).copy_(logits)
        wide = torch.empty(40, 3, vocab + offset)[:, 1, offset:].copy_(logits)
        for elsewhere in (moved, wide):
            assert all(map(torch.equal, memory.choose_tokens(elsewhere, 0.7, uniform), expected))
    for at_once in (1, 7 * vocab, 16 * vocab):
        monkeypatch.setitem(memory.LOGITS_AT_ONCE, "cpu", at_once)
        assert all(map(torch.equal, memory.choose_tokens(logits, 0.7, uniform), expected))


@pytest.mark.parametrize("seed", range(4))
def test_samples_depend_neither_on_max_rows_nor_on_who_finishes_when(seed, monkeypatch):
    """Each answer's tokens are where its own numbers fall in a teacher-forced pass's running sums."""
    model, group_size, temperature, stops = tiny_model("qwen2"), 2, 1.3, [3, 4, 5, 6, 7, 8, 20, 30]
    uniform = torch.rand(
        len(SAMPLED) * group_size, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    monkeypatch.setitem(memory.CHECK_EVERY, "cpu", 1 + seed % 3)
    ids = {}
    for max_rows in (None, 1, 2, 4, 5):
        options = {"group_size": group_size, "max_new_tokens": 12, "temperature": temperature,
                   "eos_token_id": stops, "pad_token_id": 0, "max_rows": max_rows}
        got = memory.sample(model, SAMPLED, uniform=uniform, **options)
        ids[max_rows] = [c.ids for c in got]
        drawn = memory.sample(model, SAMPLED, generator=torch.Generator().manual_seed(seed), **options)
        assert [c.ids for c in drawn] == ids[max_rows]  # a generator gives the same numbers
    assert all(answers == ids[None] for answers in ids.values())
    assert len({len(answer) for answer in ids[None]}) > 3

    for i, answer in enumerate(ids[None]):
        prompt = SAMPLED[i // group_size]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        _, above = in_float64(logits, temperature)
        searched = torch.searchsorted(above, uniform[i, : len(answer), None], right=True)[:, 0]
        assert answer == searched.tolist()
        assert not set(answer[:-1]) & set(stops) and (len(answer) == 12 or answer[-1] in stops)


def test_a_seed_repeats_the_samples():
    model = tiny_model("qwen2")
    draw = lambda seed: memory.sample(model, SAMPLED, group_size=2, max_new_tokens=8, eos_token_id=3,
                                 pad_token_id=0, generator=torch.Generator().manual_seed(seed))
    assert draw(1) == draw(1) != draw(2)


def test_sampling_looks_at_finished_rows_once_in_eight_steps_and_waits_for_nothing_else(monkeypatch):
    model, looks, steps = tiny_model("qwen2"), [], []
    monkeypatch.setitem(memory.CHECK_EVERY, "cpu", 8)  # as on a GPU
    real, prefill, waits = memory.choose_tokens, memory.prefill, Waits()
    monkeypatch.setattr(memory, "choose_tokens", lambda *a: steps.append(1) or real(*a))

    def prefill_alone(*arguments):
        seen = len(waits.seen)
        made = prefill(*arguments)
        del waits.seen[seen:]
        return made

    monkeypatch.setattr(memory, "prefill", prefill_alone)
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: looks.append(x) or tolist(x))
    with waits:
        memory.sample(model, SAMPLED, group_size=4, max_new_tokens=40, eos_token_id=[3, 4, 5, 6],
                      pad_token_id=0, max_rows=5)
    assert waits.seen == []
    assert len(steps) > 50
    of_rows = [x for x in looks if x.shape == (5,)]
    of_columns = [x for x in looks if x.dtype == torch.bool and x.shape != (5,)]
    assert len(looks) - len(of_rows) - len(of_columns) == 4  # the answers, at the end
    assert len(of_rows) <= len(steps) / 8 + 10  # and when the cache's last column is reached,
    assert 0 < len(of_columns) <= 10  # where it looks for columns to forget


def test_our_own_calls_warn_of_nothing_that_will_change():
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("error", category)
        for name in PLAIN:
            model = tiny(name)
            memory.prepare_model(model)
            memory.sum_gradients_in_fp32(model.parameters())
            [answer] = memory.sample(model, [[5, 6, 7]], max_new_tokens=4, eos_token_id=2, pad_token_id=0)
            memory.sequence_logprobs(model, [sequence([5, 6], answer.ids)], 1.0, 2)[0].sum().backward()
            memory.AdamW8bit(model.parameters(), lr=1e-6).step()


def test_the_cache_goes_by_the_name_that_the_model_takes():
    class Older:
        def forward(self, input_ids, past_key_values=None):
            pass

    class Newer:
        def forward(self, input_ids, cache=None, **options):
            pass

    assert [memory.cache_name(x()) for x in (Older, Newer)] == ["past_key_values", "cache"]


def stretched(kind, **changes):
    """A model whose positions are other ones beyond 24 tokens."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": 64, "pad_token_id": 0, "initializer_range": 0.3}
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 24}
        config = transformers.Phi3Config(**size, original_max_position_embeddings=24, rope_parameters=rope,
                                         max_position_embeddings=128)
    else:
        config = transformers.LlamaConfig(**size, max_position_embeddings=24,
                                          rope_parameters=rope | {"factor": 2.0})
    torch.manual_seed(7)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_change_with_the_longest_row_are_refused_where_a_row_may_be_that_long(kind):
    model = stretched(kind)
    options = {"temperature": 0, "eos_token_id": 99, "pad_token_id": 0}
    [answer, other] = memory.sample(model, [[5] * 10, [6, 7]], max_new_tokens=14, **options)
    for prompt, got in (([5] * 10, answer), ([6, 7], other)):
        logits = model(torch.tensor([prompt + got.ids])).logits[0, len(prompt) - 1 : -1]
        assert got.ids == logits.argmax(-1).tolist()
    with pytest.raises(ValueError, match=f"{kind}.*beyond 24 tokens.*may have 25; lower --max-new-tokens"):
        memory.sample(model, [[5] * 10, [6, 7]], max_new_tokens=15, **options)
    # It is not enough that a row computed alone would be right: a long one beside it changes it.
    short, padding = torch.tensor([[6, 7, 8]]), torch.zeros(1, 27, dtype=torch.long)
    beside = model(torch.cat([torch.cat([short, padding], 1), torch.full((1, 30), 5)])).logits[0, :3]
    assert not torch.allclose(beside, model(short).logits[0], atol=1e-2)


def test_each_kind_of_layer_may_have_positions_of_its_own():
    rope = {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 24},
            "sliding_attention": {"rope_type": "default"}}
    config = SimpleNamespace(rope_parameters=rope, max_position_embeddings=128)
    config.get_text_config = lambda: config
    memory.refuse_short_windows(config, 24)
    with pytest.raises(ValueError, match="longrope"):
        memory.refuse_short_windows(config, 25)


def test_sampling_refuses_what_it_would_get_wrong():
    model = tiny_model("qwen2")
    with pytest.raises(ValueError, match="at least one token"):
        memory.sample(model, [[1], []], max_new_tokens=2, eos_token_id=0, pad_token_id=0)
    model.config.layer_types, model.config.sliding_window = ["sliding_attention"] * 2, 8
    with pytest.raises(ValueError, match="window 8"):
        memory.sample(model, [[1] * 6], max_new_tokens=4, eos_token_id=0, pad_token_id=0)
    mistral = transformers.MistralConfig(sliding_window=8)  # says nothing of its layers' types
    with pytest.raises(ValueError, match="window 8"):
        memory.refuse_short_windows(mistral, 10)
    memory.refuse_short_windows(mistral, 8)
    text = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match="window 8"):  # the text model of one that sees images as well
        memory.refuse_short_windows(transformers.Gemma3Config(text_config=text), 10)
    memory.refuse_short_windows(transformers.MistralConfig(sliding_window=None), 10)
