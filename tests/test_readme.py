"""What the README promises to those who copy: examples run as they stand, pieces work by themselves."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import data
import rewards

ROOT = Path(data.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block_with(words: str) -> str:
    return next(block for block in BLOCKS if words in block)


# ------------------------------------------------------------------------------------------------------------
# Copy this


def lifted(file: str, names: list[str]) -> dict:
    """An empty module with the file's imports of libraries, these top-level names, and what they name."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    ours = {path.stem for path in ROOT.glob("*.py")}
    imports, found = [], {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names]
            if not ours & set(modules):
                imports.append(node)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {x.id: node for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)}
    wanted, left = set(), list(names)
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += [x.id for x in ast.walk(found[name]) if isinstance(x, ast.Name) and x.id in found]
    assert not wanted & {"Config", "Run", "InputError"}, wanted
    body = [node for node in tree.body if any(found[name] is node for name in wanted)]
    module = {"__name__": "lifted"}
    sys.modules["lifted"] = type(sys)("lifted")  # dataclasses look their module up
    vars(sys.modules["lifted"]).update(module)
    code = compile(ast.Module([*imports, *body], []), file, "exec")
    exec(code, vars(sys.modules["lifted"]))  # noqa: S102  it is our own file
    return vars(sys.modules["lifted"])


def pieces() -> dict[str, tuple[str, list[str]]]:
    """The README's table: what one gets -> (file, names)."""
    table = README.split("## Copy this, change this")[1].split("| to change | touch |")[0]
    found = {}
    for row in re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE):
        names = re.findall(r"`([\w.]+)`", row[1])
        if file := [name for name in names if name.endswith(".py")]:
            found[row[0]] = file[0], [name for name in names if not name.endswith(".py")]
    return found


def tiny_model():
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=True)
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config).eval()


def use_the_loss(piece):
    logprobs = torch.tensor([-1.0, -2.0, -0.5]).requires_grad_()
    advantages = piece["group_advantages"](torch.tensor([1.0, 0.0, 3.0, 3.0]), torch.tensor([0, 0, 1, 1]))
    assert advantages.tolist() == pytest.approx([1, -1, 0, 0], abs=1e-5)
    weights = piece["token_weights"](torch.tensor([1, 2]))
    loss, _ = piece["grpo_loss"](logprobs, advantages[[0, 1, 1]], weights[[0, 1, 1]])
    loss.backward()
    assert loss.item() == pytest.approx(-(-1.0 + 2.0 + 0.5) / 3, rel=1e-4)
    assert piece["high_entropy_mask"](torch.tensor([0.1, 0.9, 0.5]), 0.6).tolist() == [False, True, True]


def use_the_sampler(piece):
    model = tiny_model()
    [answer] = piece["sample"](model, [[5, 6, 7]], max_new_tokens=6, temperature=0.0, eos_token_id=63,
                               pad_token_id=0)
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                              eos_token_id=63, pad_token_id=0)[0, 3:].tolist()
    assert answer.ids == expected and len(answer.logprobs) == len(answer.entropies) == len(expected)


def use_token_logprobs(piece):
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    targets = torch.tensor([0, 3, 10, 4, 4])
    logprobs, _ = piece["token_logprobs"](hidden, weight, targets)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-6)


def use_packing(piece):
    model, rows, seen = tiny_model(), [SimpleNamespace(prompt=[5, 6], completion=ids,
                                                       counted=torch.arange(len(ids)))
                                       for ids in ([7], [8, 9])], []
    plain = [model(torch.tensor([x.prompt + x.completion])).logits[0].log_softmax(-1) for x in rows]
    piece["prepare_model"](model)
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    found, _ = piece["sequence_logprobs"](model, rows, 1.0)
    expected = [plain[0][1, 7], plain[1][1, 8], plain[1][2, 9]]
    assert found.tolist() == pytest.approx([x.item() for x in expected], abs=1e-5)
    assert seen == [3]  # 5 6 8: the prompt goes through once, and the last tokens are only predicted


def use_the_optimizer(piece):
    p = torch.nn.Parameter(torch.full((64, 64), 0.02, dtype=torch.bfloat16))
    optimizer = piece["AdamW8bit"]([p], lr=1e-6)
    for _ in range(400):  # each step is far below bfloat16's, 1.2e-4 here; together they are four of these
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p[0, 0].item() == pytest.approx(0.02 - 400e-6, abs=7e-5)


def use_the_reference(piece):
    model = tiny_model()
    reference, before = piece["ReferencePolicy"](model), model.model.norm.weight.clone()
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    with reference.swapped_in():
        assert torch.equal(model.model.norm.weight, before)
    assert torch.equal(model.model.norm.weight, before + 1)


def use_the_rewards(piece):
    example = {"nums": [3, 3, 8, 8], "target": 24}
    assert piece["countdown_equation"]("so</think>\n<answer>8/(3-8/3)</answer>", example) == 1.0
    assert piece["countdown_equation"]("<answer>99**98**97</answer>", example) == 0.0


USES = {"the loss": use_the_loss, "a fast sampler with log-probabilities and entropies": use_the_sampler,
        "log-probabilities without the logits": use_token_logprobs,
        "a prompt computed once for all its answers": use_packing,
        "8-bit AdamW that trains bf16 weights exactly": use_the_optimizer,
        "a frozen reference without GPU memory": use_the_reference,
        "arithmetic rewards that no answer can hang": use_the_rewards}


@pytest.mark.parametrize("what", USES)
def test_a_piece_of_copy_this_works_in_a_module_of_its_own(what, monkeypatch):
    monkeypatch.setitem(sys.modules, "lifted", None)
    file, names = pieces()[what]
    USES[what](lifted(file, names))


def test_every_row_of_copy_this_is_tried():
    assert pieces().keys() == USES.keys()


# ------------------------------------------------------------------------------------------------------------
# Rewards


def test_the_reward_model_scores_as_one_answer_at_a_time(tmp_path, monkeypatch, qwen2_folder):
    tokenizer = data.tiny_tokenizer()
    config = transformers.Qwen2Config.from_pretrained(qwen2_folder, num_labels=1)
    torch.manual_seed(0)
    judge = transformers.Qwen2ForSequenceClassification(config).eval()
    torch.nn.init.normal_(judge.score.weight)
    judge.save_pretrained(tmp_path / "JUDGE")
    tokenizer.save_pretrained(tmp_path / "JUDGE")
    (tmp_path / "judging.py").write_text(block_with("def judge"))
    monkeypatch.chdir(tmp_path)
    loaded = rewards.load_rewards(["judging.py:judge:2"])
    texts = [f"{'12 + ' * (i % 5)}{i}" for i in range(20)]  # more than a batch, of several lengths
    chat = [{"role": "user", "content": "numbers 3 4 target 7"}]
    for prompt, whole in (("3 4: ", lambda x: "3 4: " + x),
                          (chat, lambda x: tokenizer.apply_chat_template(
                              [*chat, {"role": "assistant", "content": x}], tokenize=False))):
        found = rewards.score_batch(loaded, [prompt] * 20, texts, [{"prompt": prompt}] * 20)
        for text, (reward, parts) in zip(texts, found):
            alone = judge(torch.tensor([tokenizer(whole(text)).input_ids])).logits[0, 0].item()
            assert parts == {"judging.judge": pytest.approx(alone, abs=1e-4)}
            assert reward == pytest.approx(2 * alone, abs=2e-4)


def test_the_task_of_a_collection_becomes_rows_and_a_reward(tmp_path, monkeypatch):
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")
    (tmp_path / "gym_task.py").write_text(block_with("reasoning_gym"))
    subprocess.run([sys.executable, "gym_task.py"], cwd=tmp_path, check=True)
    rows = [json.loads(line) for line in (tmp_path / "gym.jsonl").read_text().splitlines()]
    assert len(rows) == 500
    monkeypatch.chdir(tmp_path)
    train, _ = data.load_task("gym.jsonl", train_examples=10, eval_examples=4, seed=0)
    solved = rewards.load_rewards(["gym_task.py:solved"])
    for row in train:
        right = f"<answer>{row['answer']}</answer>"
        sums = f"<answer>{row['metadata']['expression']} = {row['answer']}</answer>"
        found = rewards.score_batch(solved, [row["prompt"]] * 2, [right, sums], [row] * 2)
        assert [reward for reward, _ in found] == [1.0, 0.0]  # and nothing for merely containing it
