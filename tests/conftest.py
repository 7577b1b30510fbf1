"""What several test files share: the hub is never asked, and a small Qwen2 folder to load from."""

import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests share the cores, and so do the runs that they start

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background job, and of its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

import data


def tiny_policy(seed):
    """The embedded policy's model and tokenizer."""
    embedded = data.load_config("embedded")
    policy = data.load_policy("embedded", *embedded, dtype=torch.float32, device="cpu", seed=seed)
    return policy.model, policy.tokenizer


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory):
    """A Qwen2 of random weights with its tokenizer, saved as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("qwen2")
    model, tokenizer = tiny_policy(seed=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def the_code_of_a_test_is_forgotten(monkeypatch, tmp_path):
    """A reward's file stays among the modules, and its folder on the path, as in a program."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__file__", None)):
            del sys.modules[name]
