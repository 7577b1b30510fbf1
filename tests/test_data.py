"""Tasks, prompts and loading, from files that the tests make as a user would have them on disk."""

import io
import json
import random
import shutil
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import InputError


def load(task, **options):
    return data.load_task(task, **{"train_examples": 1000, "eval_examples": 2, "seed": 0, **options})


def reachable(numbers):
    """Every value that + - * / make of all the numbers: all pairs, all orders, exactly."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            if i != j:
                rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
                for value in {a + b, a - b, a * b} | ({a / b} if b else set()):
                    found |= reachable([*rest, value])
    return found


def test_generated_countdown_problems_are_solvable_and_in_range():
    for problem in data.countdown_problems(60, seed=3):
        assert len(problem["nums"]) in (3, 4) and all(1 <= n <= 99 for n in problem["nums"])
        assert 10 <= problem["target"] <= 99
        assert problem["target"] in reachable([Fraction(n) for n in problem["nums"]])


@pytest.mark.parametrize("task", ["countdown", "mini-countdown"])
def test_train_and_held_out_problems_never_overlap_whatever_the_order_of_numbers(task):
    train, heldout = load(task, eval_examples=120)
    key = lambda e: (tuple(sorted(e["nums"])), e["target"])
    assert len(heldout) == 120 == len({key(e) for e in heldout})
    assert not {key(e) for e in train} & {key(e) for e in heldout}


def test_a_seed_repeats_the_problems():
    assert load("countdown") == load("countdown") != load("countdown", seed=1)


def test_mini_countdown_targets_are_sum_difference_or_product():
    train, heldout = load("mini-countdown", train_examples=10**6)
    for e in train + heldout:
        a, b = sorted(e["nums"])
        assert e["target"] in {a + b, b - a, a * b} and e["target"] > 0


@given(st.lists(st.integers(1, 99), min_size=2, max_size=4), st.integers(0, 10**6))
def test_a_random_expression_uses_every_number_once_and_has_its_value(numbers, seed):
    text, value = data.random_expression(numbers, "+-*/", random.Random(seed))
    literals = [int(x) for x in text.replace("(", " ").replace(")", " ").split() if x not in "+-*/"]
    assert sorted(literals) == sorted(numbers)
    exact = " ".join(f"Fraction({x})" if x.isdigit() else x
                     for x in text.replace("(", "( ").replace(")", " )").split())
    assert eval(exact, {"Fraction": Fraction}) == value


def test_demonstrations_are_well_formed_right_and_blind():
    rng = random.Random(0)
    hits, chosen = 0, {"+": [], "-": [], "*": []}  # by the operator that the target needs
    examples = load("mini-countdown", train_examples=10**6)[0]
    for example in examples:
        text = data.demonstration(example, rng)
        line, rest = text.split("</think>\n<answer>")
        comparison, equation = line.split(", ")
        expression, value = equation.split(" = ")
        assert eval(comparison.replace(" = ", " == ")) and comparison.startswith(f"{example['target']} ")
        assert rest == f"{expression}</answer>" and eval(expression) == int(value)
        hits += int(value) == example["target"]
        (a, b), operator = example["nums"], expression.split()[1]
        needed = {a + b: "+", a - b: "-", a * b: "*"}[example["target"]]
        chosen[needed].append(operator)
    assert 0.25 < hits / len(examples) < 0.42  # a third, by chance
    for operators in chosen.values():  # the same mixture, whatever is needed
        assert 0.4 < operators.count("+") / len(operators) < 0.6
        assert 0.15 < operators.count("-") / len(operators) < 0.35


def test_a_line_separator_inside_a_prompt_is_no_new_line(tmp_path):
    rows = [{"prompt": f"{i}: one\u2028two\u0085three"} for i in range(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "t.jsonl").write_text(text, encoding="utf-8")
    assert data.read_jsonl(tmp_path / "t.jsonl") == rows


def test_gsm8k_demonstrations_have_the_tags_of_their_prompt(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": f"One more.\n#### {i + 1}"} for i in range(4)]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for prompt_format, opening in ((None, "<think>One more.</think>\n<answer>"),
                                   ("gsm8k-reasoning", "<reasoning>One more.</reasoning>\n<answer>")):
        example = data.load_task("gsm8k", dataset=str(tmp_path / "g.jsonl"), prompt_format=prompt_format,
                                 train_examples=9, eval_examples=1, seed=0)[0][0]
        assert data.demonstration(example, random.Random(0)) == f"{opening}{example['answer']}</answer>"


def test_demonstrations_of_other_tasks_are_their_own_completions():
    own = {"completion": "so 4", "prompt": "2+2?", "nums": [2, 2]}
    assert data.demonstration(own, random.Random(0)) == "so 4"
    with pytest.raises(InputError, match="`completion` column"):
        data.demonstration({"prompt": "2+2?"}, random.Random(0))


# ------------------------------------------------------------------------------------------------------------
# Prompts


@settings(deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_the_tiny_tokenizer_gives_back_any_text(text):
    tokenizer = data.tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("name", list(data.PROMPTS))
def test_every_prompt_round_trips_and_holds_its_problem(name):
    tokenizer = data.tiny_tokenizer()
    example = {"nums": [3, 14, 5], "target": 29, "question": "How many apples are 3 and 4?"}
    prompt = data.PROMPTS[name](example)
    text = tokenizer.decode(data.encode_prompt(tokenizer, prompt))
    wanted = [example["question"]] if "gsm8k" in name else ["3", "14", "5", "29"]
    assert all(part in text for part in wanted)
    if "countdown" in name:
        assert text.endswith("<think>")  # an open assistant turn
    elif name == "gsm8k":
        assert text.endswith("<|assistant|>")  # a new one
    else:
        assert text == prompt  # plain text


def test_a_tokenizer_without_a_chat_template_gets_plain_text():
    tokenizer = data.tiny_tokenizer()
    tokenizer.chat_template = None
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.decode(data.encode_prompt(tokenizer, prompt)) == "Be brief.\nHi"


# ------------------------------------------------------------------------------------------------------------
# Files and folders

ROWS = [{"prompt": f"question {i}", "answer": str(i)} for i in range(6)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"mine.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        path.write_text("prompt,answer\n" + "".join(f"{r['prompt']},{r['answer']}\n" for r in ROWS))
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    train, heldout = load(str(path))
    assert len(heldout) == 2 and len(train) == 4
    assert sorted(e["prompt"] for e in train + heldout) == [r["prompt"] for r in ROWS]
    assert {str(e["answer"]) for e in train + heldout} == set("012345")


def test_a_prompt_may_be_chat_messages(tmp_path):
    path = tmp_path / "chat.jsonl"
    chats = [[{"role": "user", "content": f"hello {i}"}] for i in range(3)]
    path.write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in chats))
    train, heldout = load(str(path), eval_examples=1)
    assert sorted(e["prompt"][0]["content"] for e in train + heldout) == ["hello 0", "hello 1", "hello 2"]


def test_countdown_comes_from_a_local_copy_of_the_dataset(tmp_path):
    rows = data.countdown_problems(8, seed=1)
    rows.append({"nums": rows[0]["nums"][::-1], "target": rows[0]["target"]})  # the same, turned round
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    for source in (tmp_path, tmp_path / "train.parquet"):
        train, heldout = load("countdown", dataset=str(source), eval_examples=4)
        keys = [{data.countdown_key(e) for e in part} for part in (train, heldout)]
        assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 8
        assert str(heldout[0]["target"]) in heldout[0]["prompt"][1]["content"]


def test_gsm8k_comes_from_a_local_copy_with_its_two_splits(tmp_path):
    for split, count in (("train", 5), ("test", 3)):
        rows = [
            {"question": f"{split} {i}?", "answer": f"It is 1,0{i}0.\n#### 1,0{i}0"} for i in range(count)
        ]
        (tmp_path / "main").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "main" / f"{split}-00000-of-00001.parquet")
    train, heldout = load("gsm8k", dataset=str(tmp_path))
    assert len(train) == 5 and len(heldout) == 2
    assert all(e["question"].startswith("test") for e in heldout)
    first = next(e for e in train if e["question"] == "train 0?")
    assert first["answer"] == "1000"
    assert first["completion"] == "<think>It is 1,000.</think>\n<answer>1000</answer>"


@pytest.mark.parametrize("name, content, told", [
    ("gone.jsonl", None, "no such file"),
    ("empty.jsonl", "", "can't be held out of 0 rows"),
    ("empty.csv", "", "can't be held out of 0 rows"),
    ("noprompt.jsonl", '{"question": "hi"}\n' * 5, "line 1: prompt must .*; this row has question = 'hi'$"),
    ("noprompt.csv", "question,answer\na,b\nc,d\ne,f\n",
     "row 1: prompt must be .*; this row has question = 'a', answer = 'b'$"),
    ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not a JSON object .'Expecting value"),
    ("deep.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, "line 2: not a JSON object .*recursion"),
    ("list.jsonl", '{"prompt": "a"}\n[1]\n', r"line 2: not a JSON object \(\[1\]\)"),
    ("latin.jsonl", '{"prompt": "a"}\n{"prompt": "\udce9"}\n', "line 2: not a JSON object .*'utf-8' codec"),
    ("number.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": 3}\n{"prompt": "c"}\n',
     "line 3: prompt must be"),
    ("role.jsonl", '{"prompt": [{"text": "a"}]}\n' * 4, "line .: prompt must be"),
    ("broken.parquet", "not parquet", "can't be loaded"),
    ("short.jsonl", '{"prompt": "a"}\n', "--eval-examples 2 can't be held out of 1 rows"),
    ("same.jsonl", '{"prompt": "a"}\n' * 9, "nothing is left to train on"),
])
def test_a_bad_file_is_refused_with_its_place(tmp_path, name, content, told):
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=told):
        load(str(path))


@pytest.mark.parametrize("task, options, told", [
    ("sudoku", {}, "not a task; use countdown, gsm8k"),
    ("countdown", {"dataset": "no/such/place"}, "no such file or folder"),
    ("mini-countdown", {"dataset": "x"}, "makes its own"),
    ("mini-countdown", {"eval_examples": 10**4}, "hold out at most half"),
    ("gsm8k", {"dataset": "nobody/nothing"}, "can't be loaded"),
])
def test_a_bad_task_is_refused_with_what_is_allowed(task, options, told):
    with pytest.raises(InputError, match=told):
        load(task, **options)


@pytest.mark.parametrize("row, told", [
    ({"nums": [1], "target": 3}, "nums must be a list"),
    ({"nums": "1 2", "target": 3}, "nums must be a list"), ({"nums": [1, 2], "target": "3"}, "whole number"),
])
def test_a_bad_countdown_row_is_refused(tmp_path, row, told):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({"nums": [1, 2], "target": 3}) + "\n")
    with pytest.raises(InputError, match=told):
        load("countdown", dataset=str(path), eval_examples=1)


# ------------------------------------------------------------------------------------------------------------
# Policies


def test_the_embedded_policy_is_a_small_qwen2_that_a_seed_repeats():
    a, b, c = (data.tiny_policy(seed)[0] for seed in (0, 0, 1))
    assert isinstance(a, transformers.Qwen2ForCausalLM)
    assert 0.5e6 < sum(p.numel() for p in a.parameters()) < 1.5e6
    assert all((x == y).all() for x, y in zip(a.parameters(), b.parameters()))
    assert any((x != y).any() for x, y in zip(a.parameters(), c.parameters()))


def test_a_saved_folder_loads_with_its_tokenizer(qwen2_folder):
    config, tokenizer = data.load_config(str(qwen2_folder))
    policy = data.load_policy(str(qwen2_folder), tokenizer, dtype=torch.bfloat16, device="cpu")
    assert policy.model.dtype == torch.bfloat16 and not policy.model.training
    assert tokenizer.chat_template == data.CHAT_TEMPLATE and config.vocab_size == policy.model.vocab_size
    assert policy.stops == [tokenizer.eos_token_id] and policy.pad_token_id == tokenizer.pad_token_id


def test_a_model_that_cant_be_had_is_refused(tmp_path, qwen2_folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "weightless" / name).write_bytes((qwen2_folder / name).read_bytes())
    for model, told in (
        (tmp_path / "empty", "can't be loaded .*config.json"), (tmp_path / "weightless", "can't be loaded"),
        (tmp_path / "gone", "no such file or folder"), ("nobody/nothing", "can't be loaded"),
        ("gpt7", "can't be loaded"), ("no/such/model", "no such file or folder"), ("~/m", "no such file"),
    ):
        with pytest.raises(InputError, match=told):
            _, tokenizer = data.load_config(str(model))
            data.load_policy(str(model), tokenizer, dtype=torch.float32, device="cpu")


def test_a_kill_at_any_step_of_replacing_best_leaves_the_old_or_the_new_one(tmp_path, monkeypatch):
    """A step is a renaming or a deletion, which is killed halfway; after a kill nothing else is done."""
    policy = data.Policy(*data.tiny_policy(seed=0), stops=[], pad_token_id=0)
    data.save_best(policy, tmp_path, {"step": 0, "accuracy": 0.0})
    steps_done, found = [], set()

    def killed(real):
        def step(path, *more, **named):
            steps_done.append(path)
            if len(steps_done) < killed_at:
                return real(path, *more, **named)
            if len(steps_done) == killed_at and real is shutil_rmtree:
                for file in Path(path).glob("*.safetensors"):
                    file.unlink()
            raise KeyboardInterrupt
        return step

    shutil_rmtree = shutil.rmtree
    for killed_at in range(1, 8):
        before, steps_done[:] = data.best_evaluation(tmp_path), []
        after = {"step": killed_at, "accuracy": killed_at / 10}
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", killed(shutil.rmtree))
            patch.setattr(Path, "rename", killed(Path.rename))
            data.save_best(policy, tmp_path, after)
        data.open_folder(tmp_path, {}, step=killed_at)  # as the resumed run does
        kept = data.best_evaluation(tmp_path)
        assert kept in (before, after)
        found.add(kept == after)
        data.load_policy(str(tmp_path / "best"), policy.tokenizer, dtype=torch.float32, device="cpu")
    assert len(steps_done) == killed_at - 1 and found == {True, False}  # the last one was killed nowhere
    assert {p.name for p in tmp_path.iterdir()} == {"best", "config.json"}


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no such role') }}", "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{{ messages[0].content + 1 }}",
])
def test_a_template_that_cannot_take_the_messages_is_told(template):
    tokenizer = data.tiny_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = template, "./mine"
    with pytest.raises(data.InputError, match="chat template of ./mine refuses") as refusal:
        roles = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        data.encode_prompt(tokenizer, roles)
    assert "\n" not in str(refusal.value)


def test_a_model_without_a_longest_context_takes_any_prompt():
    example = {"prompt": "numbers " * 3000}
    assert data.tokenize(data.tiny_tokenizer(), transformers.BloomConfig(), [example], 10) == 3000


def test_a_rank_that_only_a_scheduler_knows_of_writes_its_files(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert data.first_rank()
    monkeypatch.setenv("LOCAL_RANK", "1")  # torchrun sets both
    assert not data.first_rank()


def test_what_the_outputs_encoding_lacks_is_told_in_numbers():
    file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    data.say("é = \u2713", file)
    data.say("next", file)
    assert file.buffer.getvalue().decode("latin-1") == "é = \\u2713\nnext\n"
