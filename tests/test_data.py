"""Tasks, prompts and loading, from files that the tests make as a user would have them on disk."""

import csv
import datetime
import functools
import io
import json
import os
import pickle
import random
import re
import shutil
import warnings
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import tiny_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import data
from data import InputError


def load(task, **options):
    return data.load_task(str(task), **{"train_examples": 1000, "eval_examples": 2, "seed": 0, **options})


def everything(task, **options):
    """Training and held-out examples together."""
    train, heldout = load(task, **options)
    return train + heldout


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


def demonstrated(example, rng):
    """A demonstration's text without its end."""
    tokenizer = data.tiny_tokenizer()
    ids = data.demonstration_ids(tokenizer, data.tiny_config(tokenizer), example, rng)
    return tokenizer.decode(ids[:-1])


def test_demonstrations_are_well_formed_right_and_blind(monkeypatch):
    monkeypatch.setattr(data, "tiny_tokenizer", functools.cache(data.tiny_tokenizer))
    rng = random.Random(0)
    hits, chosen = 0, {"+": [], "-": [], "*": []}  # by the operator that the target needs
    examples = load("mini-countdown", train_examples=10**6)[0]
    for example in examples:
        text = demonstrated(example, rng)
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
    assert sorted(e["prompt"] for e in everything(tmp_path / "t.jsonl")) == [row["prompt"] for row in rows]


def test_gsm8k_demonstrations_have_the_tags_of_their_prompt(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": f"One more.\n#### {i + 1}"} for i in range(4)]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for prompt_format, opening in ((None, "<think>One more.</think>\n<answer>"),
                                   ("gsm8k-reasoning", "<reasoning>One more.</reasoning>\n<answer>")):
        example = data.load_task("gsm8k", dataset=str(tmp_path / "g.jsonl"), prompt_format=prompt_format,
                                 train_examples=9, eval_examples=1, seed=0)[0][0]
        assert demonstrated(example, random.Random(0)) == f"{opening}{example['answer']}</answer>"


def test_demonstrations_of_other_tasks_are_their_own_completions():
    own = {"completion": "so 4", "prompt": "2+2?", "nums": [2, 2]}
    assert demonstrated(own, random.Random(0)) == "so 4"
    with pytest.raises(InputError, match="`completion` column"):
        demonstrated({"prompt": "2+2?"}, random.Random(0))


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
        keys = [{(*sorted(e["nums"]), e["target"]) for e in part} for part in (train, heldout)]
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


def test_gsm8k_is_asked_for_by_its_name_and_configuration(monkeypatch):
    """The hub can't be reached from here, so this stands in for it."""
    def load_dataset(path, name=None):
        assert (path, name) == ("openai/gsm8k", "main")
        rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)]
        return {split: datasets.Dataset.from_list(rows) for split in ("test", "train")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, heldout = load("gsm8k")
    assert len(heldout) == 2 and len(train) == 1


@pytest.mark.parametrize("name, content, told", [
    ("gone.jsonl", None, "no such file"),
    ("empty.jsonl", "", "0 rows are too few; lower --eval-examples 2"),
    ("empty.csv", "", "0 rows are too few; lower --eval-examples 2"),
    ("noprompt.jsonl", '{"question": "hi"}\n' * 5, "line 1: prompt must .*; this row has question = 'hi'$"),
    ("noprompt.csv", "question,answer\na,b\nc,d\ne,f\n",
     "line 2: prompt must be .*; this row has question = 'a', answer = 'b'$"),
    ("semicolons.csv", "prompt;answer\na;b\nc;d\ne;f\n",
     "line 2: prompt must be one of the columns .*commas .*; this row has prompt;answer = 'a;b'$"),
    ("twice.csv", "prompt,a,a\nb,1,2\n", "line 2: .* or a column twice"),
    ("backslash.csv", 'prompt\n"a"\n"say \\"b\\""\n', "line 3: .* needs double quotes .*, \"\" for one"),
    ("digits.jsonl", '{"prompt": "a"}\n{"prompt": "a", "n": ' + "1" * 5000 + "}", "line 2: Exceeds"),
    ("broken.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "line 3: Expecting value; write one JSON object on"),
    ("broken.json", '[{"prompt": "a"},\n\n{"prompt": "b" "c"}]', "line 3: Expecting ',' delimiter"),
    ("deep.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, "line 2: .*recursion"),
    ("list.jsonl", '{"prompt": "a"}\n[1]\n{"prompt": "b"}', r"line 2: \[1\] is not a JSON object"),
    ("list.json", '[{"prompt": "a"}, "b", {"prompt": "c"}]', "row 2: 'b' is not a JSON object"),
    ("latin.jsonl", '{"prompt": "a"}\n\n{"prompt": "\udce9"}\n', "line 3: 'utf-8' codec .* byte 0xe9"),
    ("latin.json", '[{"prompt": "a"},\n{"prompt": "\udce9"}]\n', "line 2: 'utf-8' codec .* byte 0xe9"),
    ("latin.csv", 'prompt,answer\na,b\n\n"c\n\udce9",d\n', "line 5: 'utf-8' codec can't decode byte 0xe9"),
    ("wide.csv", "prompt,answer\na,b\n\nc,d, e\n", "line 4: more cells than the 2 columns.* needs double"),
    ("quote.csv", 'prompt,answer\na,"b\nc,d\n', "line 3: unexpected end of data"),
    ("surrogate.jsonl", '{"prompt": "a"}\n\n{"prompt": "b \\ud83d"}\n', r"line 3: '\\ud83d', a lone"),
    ("surrogate.json", '[{"prompt": "a"}, {"prompt": "b", "n": ["\\udc00"]}]', r"row 2: '\\udc00', a lone"),
    ("messages.csv", "prompt\nhi\n\"[{'role': 'user', 'content': 'x'}]\"\nyou\n",
     "line 3: prompt must .*, not messages written as text"),
    ("messages.jsonl", json.dumps({"prompt": '[{"content": "x", "role": "user"}]'}) + '\n{"prompt": "a"}',
     "line 1: prompt must .*, not messages written as text"),
    ("number.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": 3}\n{"prompt": "c"}\n',
     "line 3: prompt must be"),
    ("role.jsonl", '{"prompt": [{"text": "a"}]}\n' * 4, "line .: prompt must be"),
    ("broken.parquet", "not parquet", "can't be loaded .ArrowInvalid"),
    ("notes.txt", "a", "not a task"),
    ("short.jsonl", '{"prompt": "a"}\n', "1 rows are too few; lower --eval-examples 2"),
    ("same.jsonl", '{"prompt": "a"}\n' * 9, "left to train on. Its 9 rows have 1 different prompt"),
    ("few.csv", "prompt\n" + "a\nb\n", "Its 2 rows have 2 different prompt.s., all held out"),
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
    ("mini-countdown", {"dataset": "x"}, "mini-countdown .no --dataset"),
    ("mini-countdown", {"eval_examples": 10**4}, "hold out at most"),
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
    a, b, c = (tiny_policy(seed)[0] for seed in (0, 0, 1))
    assert isinstance(a, transformers.Qwen2ForCausalLM)
    assert 0.5e6 < sum(p.numel() for p in a.parameters()) < 1.5e6
    assert all((x == y).all() for x, y in zip(a.parameters(), b.parameters()))
    assert any((x != y).any() for x, y in zip(a.parameters(), c.parameters()))


def test_a_saved_folder_loads_with_its_tokenizer(qwen2_folder):
    config, tokenizer = data.load_config(str(qwen2_folder))
    policy = data.load_policy(str(qwen2_folder), config, tokenizer, dtype=torch.bfloat16, device="cpu")
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
            config, tokenizer = data.load_config(str(model))
            data.load_policy(str(model), config, tokenizer, dtype=torch.float32, device="cpu")


def test_a_kill_at_any_step_of_replacing_best_leaves_the_old_or_the_new_one(tmp_path, monkeypatch):
    """A step is a renaming or a deletion, which is killed halfway; after a kill nothing else is done."""
    policy = data.Policy(*tiny_policy(seed=0), stops=[], pad_token_id=0)
    config = policy.model.config
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
    for killed_at in range(1, 7):
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
        data.load_policy(str(tmp_path / "best"), config, policy.tokenizer, dtype=torch.float32, device="cpu")
    assert len(steps_done) == killed_at - 1 and found == {True, False}  # the last one was killed nowhere
    assert {p.name for p in tmp_path.iterdir()} == {"best", "config.json"}


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no such role') }}", "{{ messages[0].content + 1 }}", "{{ messages",
])
def test_a_template_that_cannot_take_the_messages_is_told(template):
    tokenizer = data.tiny_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = template, "./mine"
    with pytest.raises(data.InputError, match="chat template of ./mine refuses") as refusal:
        roles = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        data.encode_prompt(tokenizer, roles)
    assert "\n" not in str(refusal.value) and "at the head of the user's" in str(refusal.value)


def test_a_model_without_a_longest_context_takes_any_prompt():
    example = {"prompt": "numbers " * 3000}
    [fits] = data.tokenize(data.tiny_tokenizer(), transformers.BloomConfig(), [example], 10)
    assert len(fits["prompt_ids"]) == 3000


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


# ------------------------------------------------------------------------------------------------------------
# What people bring: files


CELLS = [
    "None",
    "NA",
    "null",
    "True",
    "2024-01-05",
    "007",
    "1.50",
    "nan",
    "1e5",
    "-0",
    "1_000",
    "",
    " 7",
    "7",
    "-12",
    "0.5",
    "1e-05",
    "123456789012345678901234567890",
]


@given(
    st.lists(
        st.sampled_from(CELLS)
        | st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12),
        min_size=3,
        max_size=12,
    )
)
@settings(deadline=None)
def test_a_csv_value_is_what_its_cell_says(tmp_path_factory, cells):
    """A cell becomes a number only where the number is written in the very same way."""
    path = tmp_path_factory.getbasetemp() / "cells.CSV"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "value"], *([f"{i}", cell] for i, cell in enumerate(cells))])
    found = {int(e["prompt"]): e["value"] for e in everything(path, eval_examples=1)}
    for i, cell in enumerate(cells):
        assert found[i] == cell if isinstance(found[i], str) else str(found[i] or 0) == (cell or "0")
    numbers = {"7": 7, "-12": -12, "0.5": 0.5, "1e-05": 1e-5, CELLS[-1]: int(CELLS[-1]), "": None}
    assert all(found[i] == numbers[cell] for i, cell in enumerate(cells) if cell in numbers)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "lines.json", "train [1]*?.JSON", "x{y}.JsonL"])
def test_json_values_arrive_as_they_are_written(tmp_path, name):
    rows = [
        {"prompt": f"q{i}", "mixed": x, "big": 10**25 if i % 2 else None, "day": "2024-01-05", "at": "12:30"}
        for i, x in enumerate(["07", 8, "09", 10.5, None, True, [1, "2"], {"a": None}])
    ]
    whole = (
        json.dumps(rows, indent=1)
        if Path(name).suffix.lower() == ".json" and "lines" not in name
        else ("\ufeff\n" + "\r\n \n".join(map(json.dumps, rows)))
    )
    (tmp_path / name).write_text(whole, encoding="utf-8")
    assert sorted(everything(tmp_path / name), key=lambda e: e["prompt"]) == rows


def test_a_parquet_files_own_types_arrive_as_pythons(tmp_path):
    rows = [
        {
            "prompt": f"q{i}",
            "price": Decimal("-0.10") + i,
            "day": datetime.date(2024, 1, 5 + i),
            "count": None if i else 2**62,
            "list": [1, None],
            "note": "NA",
        }
        for i in range(3)
    ]
    path = tmp_path / "a [1].PARQUET"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = sorted(everything(path), key=lambda e: e["prompt"])
    assert found == rows and type(found[0]["price"]) is Decimal


def test_examples_know_their_place_through_blank_lines_and_lines_within_cells(tmp_path):
    (tmp_path / "a.csv").write_text('prompt\n\none\n\n"two\nlines"\nthree\n')
    (tmp_path / "a.jsonl").write_text(
        '\n{"prompt": "one"}\n\n\n{"prompt": "three"}\n{"prompt": "two\\nlines"}'
    )
    places = {
        name: {e["prompt"]: e.where for e in everything(tmp_path / name, eval_examples=1)}
        for name in ("a.csv", "a.jsonl")
    }
    a = tmp_path / "a"
    assert places["a.csv"] == {
        "one": f"{a}.csv, line 3",
        "two\nlines": f"{a}.csv, line 6",
        "three": f"{a}.csv, line 7",
    }
    assert places["a.jsonl"] == {
        "one": f"{a}.jsonl, line 2",
        "three": f"{a}.jsonl, line 5",
        "two\nlines": f"{a}.jsonl, line 6",
    }
    copy = pickle.loads(pickle.dumps(load(tmp_path / "a.csv")[1][0]))  # as it travels between ranks
    assert copy.where.startswith(f"{a}.csv, line ") and type(copy) is data.Example
    assert all(e.where == "" for e in load("countdown", train_examples=3)[0])


def test_a_column_named_where_is_the_users(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "q{i}", "where": "Rome"}}\n' for i in range(3)))
    example = load(tmp_path / "a.jsonl")[1][0]
    assert example["where"] == "Rome" and example.where.startswith(str(tmp_path))


# ------------------------------------------------------------------------------------------------------------
# What people bring: templates and tokens

QWEN3 = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = data.CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
HYBRID = data.CHAT_TEMPLATE.replace(
    "<|assistant|>{% endif %}",
    "<|assistant|>{% if WISH %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
V3 = data.CHAT_TEMPLATE.replace(
    "<|assistant|>{% endif %}",
    "<|assistant|>{% if not thinking %}</think>{% else %}<think>{% endif %}{% endif %}",
)


def turn_begun(template, prompt):
    """(The text after the last header, the tag that is open.)"""
    tokenizer = data.tiny_tokenizer()
    tokenizer.chat_template = template
    example = data.Example(prompt=prompt)
    data.tokenize(tokenizer, data.tiny_config(tokenizer), [example], 8)
    assert example["prompt_ids"] == data.encode_prompt(tokenizer, prompt)
    return tokenizer.decode(example["prompt_ids"]).rsplit("<|assistant|>", 1)[1], example["opened"]


COUNTDOWN = data.PROMPTS["countdown"]({"nums": [1, 2, 3], "target": 6})
MINI = data.PROMPTS["mini-countdown"]({"nums": [3, 2], "target": 6})
GSM8K = data.PROMPTS["gsm8k"]({"question": "How many?"})
STEPS = "I will work through this step by step.\n"


@pytest.mark.parametrize(
    "template, prompt, begun, opened",
    [
        (data.CHAT_TEMPLATE, COUNTDOWN, f"{STEPS}<think>", "<think>"),
        (QWEN3, COUNTDOWN, f"{STEPS}<think>", "<think>"),
        (QWEN3, MINI, "<think>", "<think>"),
        (QWEN3, GSM8K, "", ""),
        (R1, COUNTDOWN, f"<think>\n{STEPS}", "<think>"),
        (R1, MINI, "<think>\n", "<think>"),
        (R1, GSM8K, "<think>\n", "<think>"),
        (R1, [*MINI[:1], {"role": "assistant", "content": "It is"}], "<think>\nIt is", "<think>"),
        (
            R1,
            [*MINI[:1], {"role": "assistant", "content": "So.</think>\nIt is"}],
            "<think>\nSo.</think>\nIt is",
            "",
        ),
        (HYBRID.replace("WISH", "enable_thinking"), COUNTDOWN, f"<think>\n{STEPS}", "<think>"),
        (HYBRID.replace("WISH", "enable_thinking"), GSM8K, "<think>\n", "<think>"),
        (V3, GSM8K, "<think>", "<think>"),
        (R1.replace("<think>", "<reasoning>"), GSM8K, "<reasoning>\n", "<reasoning>"),
    ],
)
def test_an_open_turn_follows_the_templates_own_beginning_and_no_tag_is_opened_twice(
    template, prompt, begun, opened
):
    assert turn_begun(template, prompt) == (begun, opened)


def test_a_text_prompt_may_leave_a_tag_open_too():
    tokenizer = data.tiny_tokenizer()
    examples = [
        data.Example(prompt=text) for text in ("a <reasoning>\n", "a <think> b", "a </think>", "1 < 2 >")
    ]
    data.tokenize(tokenizer, data.tiny_config(tokenizer), examples, 8)
    assert [e["opened"] for e in examples] == ["<reasoning>", "", "", ""]


@pytest.mark.parametrize("prompt", [COUNTDOWN, GSM8K])
def test_built_in_prompts_suit_templates_that_refuse_a_system_role(prompt):
    refusal = "{{ raise_exception('System role not supported') }}"
    tokenizer = data.tiny_tokenizer()
    tokenizer.chat_template = (f"{{% if messages[0].role == 'system' %}}{refusal}{{% endif %}}"
                               f"{data.CHAT_TEMPLATE}")
    text = tokenizer.decode(data.encode_prompt(tokenizer, prompt))
    assert text.startswith(
        f"<|user|>{prompt[0]['content']}\n\n{prompt[1]['content']}<|endoftext|><|assistant|>"
    )
    with pytest.raises(InputError, match="System role not supported.*at the head of the user's"):
        data.encode_prompt(tokenizer, [{"role": "system", "content": "Be brief."}, *MINI])


OF_USERS = ("{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}<|endoftext|>{% endfor %}"
            "<|assistant|>")


@pytest.mark.parametrize("prompt", [COUNTDOWN, GSM8K])
def test_no_words_get_lost_in_a_template_that_leaves_a_role_out(prompt):
    tokenizer = data.tiny_tokenizer()
    tokenizer.chat_template = OF_USERS
    text = tokenizer.decode(data.encode_prompt(tokenizer, prompt))
    assert text.startswith(f"<|user|>{prompt[0]['content']}\n\n{prompt[1]['content']}<|endoftext|>")
    with pytest.raises(InputError, match="leaves out the words of the system.*at the head of the user's"):
        data.encode_prompt(tokenizer, [{"role": "system", "content": "Be brief."}, *MINI])
    for template in ("", "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match="leaves out the words of the .*user"):
            data.encode_prompt(tokenizer, prompt)


def test_a_template_may_take_a_switch_and_white_space_out_of_a_message():
    tokenizer = data.tiny_tokenizer()
    tokenizer.chat_template = data.CHAT_TEMPLATE.replace(
        "{{ message.content }}", "{{ message.content | replace('/no_think', '') | trim }}")
    messages = [{"role": "system", "content": " Be brief. /no_think"}, {"role": "user", "content": "Hi\n"}]
    assert tokenizer.decode(data.encode_prompt(tokenizer, messages)) == (
        "<|system|>Be brief.<|endoftext|><|user|>Hi<|endoftext|><|assistant|>")


@pytest.mark.parametrize("tag, opened", [
    ("<_bot>", ""), ("<Assistant>", ""), ("<model>", ""), ("<reserved_107>", ""), ("<ai>", ""),
    ("<thought>", "<thought>"), ("<aim>", "<aim>"), ("<bot-plan>", "<bot-plan>"),
])
def test_a_roles_own_tag_is_no_tag_that_the_prompt_opens(tag, opened):
    assert turn_begun(f"{data.CHAT_TEMPLATE}{tag}", GSM8K) == (tag, opened)
    assert data.encode(data.tiny_tokenizer(), f"Hi {tag}")[1] == opened


@pytest.mark.parametrize(
    "single, wanted",
    [
        ("$A <|endoftext|>", "2 + 2 ="),
        ("<|begin|> $A", "<|begin|>2 + 2 ="),
        ("<|begin|> $A <|endoftext|>", "<|begin|>2 + 2 ="),
        ("$A", "2 + 2 ="),
        ("<|begin|> <|endoftext|> $A", "<|begin|><|endoftext|>2 + 2 ="),
    ],
)
def test_a_text_prompt_begins_as_the_tokenizer_begins_texts_and_is_not_ended(single, wanted):
    tokenizer = data.tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=ids
    )
    assert tokenizer.decode(data.encode_prompt(tokenizer, "2 + 2 =")) == wanted
    assert (
        tokenizer.decode(data.encode_prompt(tokenizer, wanted)) == wanted
    )  # what a text has is not added again
    assert tokenizer.decode(data.encode_prompt(tokenizer, "a<|endoftext|>")).endswith("a<|endoftext|>")
    tokenizer.chat_template = None
    assert tokenizer.decode(data.encode_prompt(tokenizer, [{"role": "user", "content": "2 + 2 ="}])) == wanted


@pytest.mark.parametrize(
    "completion, opened, wanted",
    [
        ("so 4", "", "so 4"),
        ("so 4<|endoftext|>", "", "so 4"),
        ("so 4<|endoftext|>\n<|endoftext|> ", "", "so 4"),
        ("<think>so</think>4", "<think>", "so</think>4"),
        ("\n<think>so</think>4", "<think>", "so</think>4"),
        ("<think>so</think>4", "", "<think>so</think>4"),
        ("<think>so</think>4", "<reasoning>", "<think>so</think>4"),
    ],
)
def test_a_demonstration_ends_once_and_goes_on_from_an_open_tag(completion, opened, wanted):
    tokenizer = data.tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    example = data.Example(prompt="2 + 2?", completion=completion, opened=opened)
    ids = data.demonstration_ids(tokenizer, data.tiny_config(tokenizer), example, random.Random(0))
    assert tokenizer.decode(ids) == f"{wanted}<|endoftext|>" and ids.count(tokenizer.eos_token_id) == 1


def test_tokens_that_the_embeddings_lack_are_refused_with_their_row(tmp_path):
    rows = [
        {"prompt": f"q{i}" + " <extra>" * (i == 2), "completion": "a" + "<extra>" * (i == 1)}
        for i in range(4)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = data.tiny_tokenizer()
    config = transformers.Qwen2Config(vocab_size=len(tokenizer))
    tokenizer.add_tokens(["<extra>"])
    examples = sorted(everything(tmp_path / "a.jsonl"), key=lambda e: e["prompt"])
    told = rf"a.jsonl, line {{}}: the {{}} has token <extra> \(id {config.vocab_size}\), and the model"
    with pytest.raises(InputError, match=told.format(3, "prompt")):
        data.tokenize(tokenizer, config, examples, 4)
    with pytest.raises(InputError, match=told.format(2, "demonstration")):
        for example in examples:
            data.demonstration_ids(tokenizer, config, example, random.Random(0))


def test_prompts_that_are_too_long_are_left_out_with_one_warning(tmp_path, capsys):
    lengths = [5, 60, 5, 40, 101, 5]
    (tmp_path / "a.csv").write_text("prompt\n" + "".join(f"{'a' * n}{i}\n" for i, n in enumerate(lengths)))
    examples = sorted(everything(tmp_path / "a.csv"), key=lambda e: e["prompt"][-1])
    tokenizer, config = data.tiny_tokenizer(), transformers.Qwen2Config(max_position_embeddings=100)
    assert data.tokenize(tokenizer, config, examples, 70) == [examples[i] for i in (0, 2, 5)]
    told = capsys.readouterr().err
    assert told.count("warning") == told.count("\n") == 1 and "3 of 6 prompts, of up to 102 tokens" in told
    assert all(f"a.csv, line {n}" in told for n in (3, 5, 6)) and "--max-new-tokens 70" in told
    assert len(data.tokenize(tokenizer, config, examples, 39)) == 5
    assert "shorten them, or lower it" in capsys.readouterr().err
    with pytest.raises(InputError, match="6 of 6 prompts.* exceed the model's context of 100"):
        data.tokenize(tokenizer, config, examples, 98)
    made = load("mini-countdown", train_examples=1)[0]
    with pytest.raises(InputError, match="the prompt that begins .*numbers "):
        data.tokenize(tokenizer, config, made, 98)


# ------------------------------------------------------------------------------------------------------------
# What people bring: models


def changed(folder, tmp_path, name="config.json", **values):
    """A copy of a model's folder in which a json file has these values (None: it has them no more)."""
    shutil.copytree(folder, tmp_path / "m", dirs_exist_ok=True)
    path = tmp_path / "m" / name
    saved = (json.loads(path.read_text()) if path.exists() else {}) | values
    path.write_text(json.dumps({key: value for key, value in saved.items() if value is not None}))
    return str(tmp_path / "m")


@pytest.mark.parametrize(
    "method",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "mxfp4"},
    ],
)
def test_quantized_weights_are_refused_from_the_config_alone(qwen2_folder, tmp_path, method):
    folder = changed(qwen2_folder, tmp_path, quantization_config=method)
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=rf"quantized \({method['quant_method']}\).* the unquantized model"):
        data.load_config(folder)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8"])
def test_weights_of_a_byte_are_refused_as_quantized(qwen2_folder, tmp_path, kind):
    with pytest.raises(InputError, match=rf"quantized \(torch.{kind}\).* the unquantized model"):
        data.load_config(changed(qwen2_folder, tmp_path, dtype=kind))


def test_a_config_that_asks_for_more_outputs_or_tuples_loads_and_saves_as_any(qwen2_folder, tmp_path):
    folder = changed(qwen2_folder, tmp_path, output_attentions=True, output_hidden_states=True,
                     return_dict=False)
    config, tokenizer = data.load_config(folder)
    policy = data.load_policy(folder, config, tokenizer, dtype=torch.float32, device="cpu")
    out = policy.model(torch.tensor([[1, 2, 3]]))
    assert out.logits.shape == (1, 3, config.vocab_size) and "hidden_states" not in out
    assert data.save_folder(policy, tmp_path / "final")


@pytest.mark.parametrize("content, told", [
    ('{"eos_token_id": "five"}', "ValueError: invalid literal"), ("{", "JSONDecodeError"),
])
def test_a_generation_config_that_cannot_be_read_is_told(qwen2_folder, tmp_path, content, told):
    folder = changed(qwen2_folder, tmp_path)
    config, tokenizer = data.load_config(folder)
    (tmp_path / "m" / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=f"--model {folder}: can't be loaded .{told}"):
        data.load_policy(folder, config, tokenizer, dtype=torch.float32, device="cpu")
    (tmp_path / "m" / "generation_config.json").write_text('\ufeff{"eos_token_id": "5"}', encoding="utf-8")
    policy = data.load_policy(folder, config, tokenizer, dtype=torch.float32, device="cpu")
    assert 5 in policy.stops


MOE = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "output_router_logits": True,
}


@pytest.mark.parametrize(
    "kind", ["Qwen3Moe", "Qwen2Moe", "Mixtral", "Olmoe", "FlexOlmo", "GraniteMoe", "Phimoe"]
)
def test_no_family_of_experts_computes_its_balancing_loss(kind, tmp_path):
    tokenizer = data.tiny_tokenizer()
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=None,
        bos_token_id=None,
        **MOE,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config, tokenizer = data.load_config(str(tmp_path))
    assert config.output_router_logits is False
    model = data.load_policy(str(tmp_path), config, tokenizer, dtype=torch.float32, device="cpu").model
    with torch.no_grad():
        out = model(torch.tensor([[1, 2, 3]]))
    assert out.get("aux_loss") is None and out.get("router_logits") is None


def tokenizer_without_end(folder):
    """A byte-level tokenizer whose only special token, <stop>, is not its end-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<stop>"])  # id 256
    (folder / "tokenizer_config.json").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("declared", [256, [256], [10**6, 256], None, 10**6])
def test_an_end_token_comes_from_the_tokenizer_or_the_generation_config(tmp_path, tokenizer_class, declared):
    """Qwen2Tokenizer makes up an <|endoftext|>, id 257, past the embeddings, for a folder that has none."""
    config = transformers.Qwen2Config(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    data.tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer_without_end(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    (tmp_path / "generation_config.json").write_text(
        json.dumps({} if declared is None else {"eos_token_id": declared})
    )
    if declared in (None, 10**6):
        with pytest.raises(InputError, match="neither its tokenizer nor its generation config has an end-of"):
            data.load_config(str(tmp_path))
        return
    config, tokenizer = data.load_config(str(tmp_path))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<stop>", 256)
    policy = data.load_policy(str(tmp_path), config, tokenizer, dtype=torch.float32, device="cpu")
    assert policy.stops == [256] and 0 <= policy.pad_token_id < 257
    (tmp_path / "run").mkdir()
    data.save_folder(policy, tmp_path / "run" / "final")
    _, again = data.load_config(str(tmp_path / "run" / "final"))
    assert again.eos_token == "<stop>"


def test_the_classes_default_end_token_is_not_declared(tmp_path):
    """LlamaConfig says 2 for every config.json that says nothing."""
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
    )
    config.save_pretrained(tmp_path)
    data.tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer_without_end(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved.pop("eos_token_id", None)
    path.write_text(json.dumps(saved))
    with pytest.raises(InputError, match="no answer could ever end"):
        data.load_config(str(tmp_path))
    path.write_text(json.dumps(saved | {"eos_token_id": 256}))
    assert data.load_config(str(tmp_path))[1].eos_token == "<stop>"


def test_padding_beyond_the_embeddings_is_another_token(qwen2_folder, tmp_path):
    config, tokenizer = data.load_config(str(qwen2_folder))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    policy = data.load_policy(str(qwen2_folder), config, tokenizer, dtype=torch.float32, device="cpu")
    assert policy.pad_token_id == tokenizer.pad_token_id == 295  # among the rows that fill up to 320
    tokenizer.add_tokens([f"<{i}>" for i in range(40)])
    tokenizer.pad_token = "<39>"
    policy = data.load_policy(str(qwen2_folder), config, tokenizer, dtype=torch.float32, device="cpu")
    assert tokenizer.pad_token_id >= 320 and policy.pad_token_id == tokenizer.eos_token_id


def test_every_saved_folder_ends_answers_as_the_run_and_loses_nothing(qwen2_folder, tmp_path):
    """Also when a folder is loaded and saved again, as by a resumed run. transformers refuses to save some of
    these values, because it finds fault with them."""
    kept = {
        "temperature": 0.6,
        "top_k": 7,
        "top_p": 0.9,
        "num_beams": 1,
        "early_stopping": True,
        "my_own": [3],
        "repetition_penalty": 1.1,
        "bos_token_id": 5,
    }
    folder = changed(qwen2_folder, tmp_path, "generation_config.json", eos_token_id=[292, 291], **kept)
    for run in (tmp_path / "run", tmp_path / "again"):
        config, tokenizer = data.load_config(folder)
        policy = data.load_policy(folder, config, tokenizer, dtype=torch.float32, device="cpu")
        assert policy.stops == policy.model.generation_config.eos_token_id == [290, 291, 292]
        data.save_checkpoint(policy, {"step": 1, "config": {}, "limits": {}}, run, keep=1)
        data.save_folder(policy, run / "final")
        data.save_best(policy, run, {"step": 1, "accuracy": 0.5})
        for name in ("checkpoint-1", "final", "best"):
            saved = json.loads((run / name / "generation_config.json").read_text())
            assert saved == saved | kept | {"eos_token_id": [290, 291, 292]}
            loaded = transformers.AutoModelForCausalLM.from_pretrained(run / name).generation_config
            assert loaded.eos_token_id == [290, 291, 292] and loaded.temperature == 0.6
        folder = str(run / "checkpoint-1")


# ------------------------------------------------------------------------------------------------------------
# The run's folder


@pytest.fixture(scope="module")
def policy():
    return data.load_policy("embedded", *data.load_config("embedded"), dtype=torch.float32, device="cpu")


def test_best_goes_by_accuracy_then_by_reward_then_by_time(policy, tmp_path):
    evaluations = [
        {"step": 0, "accuracy": 0.5},
        {"step": 1, "accuracy": 0.5, "reward": 0.1},
        {"step": 2, "accuracy": 0.5, "reward": None},
        {"step": 3, "accuracy": 0.5, "reward": 0.1},
        {"step": 4, "accuracy": 0.4, "reward": 9.0},
        {"step": 5, "accuracy": 0.5, "reward": 0.2},
        {"step": 6, "accuracy": 0.6, "reward": -1.0},
    ]
    found = [(data.save_best(policy, tmp_path, e), data.best_evaluation(tmp_path)["step"])[1]
             for e in evaluations]
    assert found == [0, 1, 1, 1, 1, 5, 6]  # the first is of a run that knew no held-out reward
    assert data.best_evaluation(tmp_path) == evaluations[6]


def test_what_is_told_of_best_is_what_is_there(policy, tmp_path, monkeypatch, capsys):
    def full(self, folder, **_):
        Path(folder).mkdir()
        raise OSError("No space left on device")

    for there, told in (({"accuracy": -1.0, "step": 0}, 1), ({"accuracy": 0.5, "step": 1}, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(type(policy.model), "save_pretrained", full)
            data.save_best(policy, tmp_path, {"accuracy": 0.9, "step": 9})
            assert data.best_evaluation(tmp_path) == there
        assert capsys.readouterr().err.count("best could not be saved (No space left on device)") == told
        data.save_best(policy, tmp_path, {"accuracy": 0.5, "step": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"best"}


def test_a_checkpoint_is_removed_only_after_a_newer_one_is_whole(policy, tmp_path, monkeypatch, capsys):
    state = lambda step: {"step": step, "config": {}, "limits": {}}
    for step in (1, 2):
        data.save_checkpoint(policy, state(step), tmp_path, keep=1)
        assert [c.name for c in data.checkpoints(tmp_path)] == [f"checkpoint-{step}"]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("disk full")))
        data.save_checkpoint(policy, state(3), tmp_path, keep=1)
        patch.setattr(type(policy.model), "save_pretrained", torch.save)
        assert not data.save_folder(policy, tmp_path / "final")
    assert [c.name for c in data.checkpoints(tmp_path)] == ["checkpoint-2"]
    assert "checkpoint-3 could not be saved (disk full)" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    data.refuse_folder(tmp_path / "runs" / "r", True, free / 2)
    with pytest.raises(
        InputError, match=r"--output-dir .*runs: [\d.]+ GB free, the run needs [\d.]+; make"
    ):
        data.refuse_folder(tmp_path / "runs" / "r", True, 2 * free + 1e9)


def test_saving_needs_nothing_that_windows_lacks(policy, tmp_path, monkeypatch):
    """There, no folder can be opened, nothing is renamed onto what exists, only writable files are synced."""
    real_rename, synced = Path.rename, []

    class Windows:
        def __getattr__(self, name):
            return getattr(os, name)

        def open(self, path, flags):
            if Path(path).is_dir():
                raise PermissionError(13, "Permission denied", str(path))
            assert flags & os.O_RDWR, "no sync of a file that is open for reading"
            synced.append(path)
            return os.open(path, flags)

    def renamed(self, target):
        assert not Path(target).exists() and ":" not in Path(target).name
        return real_rename(self, target)

    monkeypatch.setattr(data, "os", Windows())
    monkeypatch.setattr(Path, "rename", renamed)
    for step in (1, 2, 3):
        data.save_checkpoint(policy, {"step": step, "config": {}, "limits": {}}, tmp_path, keep=2)
        data.save_best(policy, tmp_path, {"step": step, "accuracy": step / 10})
        data.save_folder(policy, tmp_path / "final")
        data.append_lines(tmp_path / "metrics.jsonl", [{"step": step}])
    assert data.open_folder(tmp_path, {}, step=2) == [{"step": 1}, {"step": 2}]
    assert {path.name for path in synced} >= {
        "model.safetensors",
        "state.pt",
        "config.json",
        "evaluation.json",
    }
    left = {re.sub(r"-\d{8}-.*", "", path.name) for path in tmp_path.iterdir()}
    assert left == {"checkpoint-2", "left-checkpoint-3", "left-best", "final", "metrics.jsonl", "config.json"}


# ------------------------------------------------------------------------------------------------------------
# What a person sees


def test_curves_are_drawn_with_values_that_nobody_measured(tmp_path):
    metrics = [
        {
            "step": i,
            "reward": 0.1 * i,
            "reward/a": None if i % 2 else 1.0,
            "reward/b": None,
            "accuracy": 0.5,
            "completion_length": 3.0,
            "entropy": None,
        }
        for i in range(1, 41)
    ]
    evaluations = [
        {"step": 0, "accuracy": 0.1},
        {"step": 20, "accuracy": 0.2, "reward": 0.5, "sampled_accuracy": None, "pass_at_k": None},
        {"step": 40, "accuracy": 0.2, "reward": 0.7, "sampled_accuracy": 0.3, "pass_at_k": 0.5},
    ]
    drawn = []
    real = Figure.subplots
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(Figure, "subplots", lambda *args: drawn.append(real(*args)) or drawn[-1])
        data.draw_curves(metrics, evaluations, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    reward, accuracy, *_ = drawn[0].flat
    points = {
        line.get_label(): line.get_xydata().tolist() for axis in (reward, accuracy) for line in axis.lines
    }
    assert points["held-out, sampled"] == [[40, 0.3]]
    assert reward.lines[-1].get_xydata().tolist() == [[20, 0.5], [40, 0.7]]
    assert accuracy.lines[-2].get_xydata().tolist() == [[0, 0.1], [20, 0.2], [40, 0.2]]
    window = [metrics[j]["reward"] for j in (28, 29)]  # a twentieth of 40 steps
    assert points["reward"][29] == [30, pytest.approx(sum(window) / 2)]
    assert points["a"][29][1] == 1.0  # over the one of the two that was measured


def test_the_report_has_what_was_measured():
    summary = {
        "evaluations": [
            {"step": 0, "accuracy": 0.1, "reward": -0.3, "sampled_accuracy": None, "pass_at_k": None},
            {"step": 7, "accuracy": 0.2, "reward": 0.1, "sampled_accuracy": 0.1, "pass_at_k": 0.3},
            {"step": 9, "accuracy": 0.2, "reward": 0.4, "sampled_accuracy": 0.6, "pass_at_k": 0.8},
        ],
        "best": {"accuracy": 0.2, "step": 7},
        "steps": 9,
        "seconds": 1.0,
    }
    rows = data.report(summary, 4, Path("r")).splitlines()
    assert rows[0] == "before GRPO: held-out accuracy 0.100, held-out reward -0.300"
    assert rows[1].endswith("0.200, held-out reward 0.400, accuracy of 4 samples 0.600, pass@4 0.800")
    assert rows[2].startswith("9 steps, 1 s")
    assert rows[-1] == "  r/best/ (held-out accuracy 0.200, step 7)"
    nothing_saved = summary | {"best": {"accuracy": -1.0, "step": 0}}
    assert "best/" not in data.report(nothing_saved, 4, Path("r"))


def test_a_csv_may_begin_with_blank_lines_and_hold_long_cells(tmp_path):
    long = "word " * 40_000
    (tmp_path / "t.csv").write_text("\n  \nprompt,n\na,1\n" + f"{long},2\nc,3\n")
    train, heldout = data.load_task(str(tmp_path / "t.csv"), train_examples=9, eval_examples=1, seed=0)
    rows = sorted(train + heldout, key=lambda row: row["n"])
    assert [(row["prompt"], row["n"], row.where[-6:]) for row in rows] == [
        ("a", 1, "line 4"), (long, 2, "line 5"), ("c", 3, "line 6")]


@pytest.mark.parametrize("nums, target", [
    ([3, 4], True), ([3, 4.0], 7), ([3], 3), ([3, "4"], 7), ([3, 4], None)])
def test_a_countdown_row_holds_whole_numbers_only(nums, target):
    with pytest.raises(data.InputError, match="t.jsonl, line 2: nums must be a list of at least two whole"):
        data.make_example({"nums": nums, "target": target}, "countdown", "t.jsonl, line 2")
