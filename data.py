"""What goes into a run (tasks, files, models), and what comes out (its folder, what a person sees).

An example is a dict. Its `prompt` is text, used as it stands, or a list of chat messages, which the
tokenizer's chat template turns into text. A cold start imitates its `completion`; rewards read the rest.
Left out on purpose: streaming (a GRPO run reads a few thousand prompts) and mixing several tasks in one run.
"""

import csv
import importlib
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

MINI_LARGEST = 30  # largest number of a mini-countdown problem; the embedded policy's tokenizer knows it too


class InputError(ValueError):
    """What the user gave can't be used. The message says what was given, what is allowed, what to type."""


class Example(dict):
    """A row of a task; `where` is its place, such as "mine.csv, row 7", or "" for a problem made here."""
    where = ""


def fetch(what: str, load: Callable, name: str, /, **options):
    """load(name), of a file, a folder or a hub id. Any failure is an InputError about `what`."""
    is_hub_id = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) and Path(name).suffix.lower() not in FILE_TYPES
    if not is_hub_id and not Path(name).exists():
        raise InputError(f"{what}: no such file or folder; check the path, or give a hub id, OWNER/NAME")
    huggingface_hub.utils.logging.set_verbosity_error()  # it reports each retry; the error repeats them all
    try:
        return load(name, **options)
    except InputError:
        raise
    except Exception as error:  # each library has its own, and so have the hub and the network
        cause = error.__cause__ or error
        raise InputError(f"{what}: can't be loaded ({type(cause).__name__}: {brief(cause)}); check the "
                         "files in a local folder, or the id and the network for the hub") from error


def brief(error: Exception) -> str:
    return textwrap.shorten(str(error), 200)


# ---- Prompts: example -> text, or messages. A last message from the assistant is a turn left open. ---------

PROMPTS: dict[str, Callable[[dict], str | list[dict]]] = {
    # As nano-aha-moment, GRPO-Zero and Improved-GRPO ask it. The prompt ends inside an open `<think>`.
    "countdown": lambda example: [
        {"role": "system", "content": "You are a careful assistant. You reason in your head before you give "
         "the user the answer."},
        {"role": "user", "content": f"Combine the numbers {', '.join(map(str, example['nums']))} into an "
         f"equation that equals {example['target']}. You may use +, -, *, / and parentheses, and must use "
         "each number exactly once. Write your reasoning inside <think> </think> tags and then the equation "
         "alone inside <answer> </answer> tags, for example <answer>(1 + 2) / 3</answer>."},
        {"role": "assistant", "content": "I will work through this step by step.\n<think>"}],
    # The same in the few words that the embedded policy knows.
    "mini-countdown": lambda example: [
        {"role": "user",
         "content": f"numbers {' '.join(map(str, example['nums']))} target {example['target']}"},
        {"role": "assistant", "content": "<think>"}],
    # As simple_GRPO asks it: the model itself opens and closes both tags.
    "gsm8k": lambda example: [
        {"role": "system", "content": "You help the user with a question. First think the steps through, "
         "then give the final answer. Put the thinking inside <think> </think> tags and the answer inside "
         "<answer> </answer> tags, like this: <think> your steps </think><answer> the answer </answer>."},
        {"role": "user", "content": example["question"]}],
    # As The LM Book asks it: plain text without a chat template, other tags.
    "gsm8k-reasoning": lambda example: (
        "Reply in exactly this form:\n<reasoning>\nyour steps\n</reasoning>\n"
        f"<answer>\nthe final number\n</answer>\n{example['question']}"
    ),
}
NOTHING = {"nums": [], "target": "", "question": ""}
SYSTEM = {PROMPTS[name](NOTHING)[0]["content"] for name in ("countdown", "gsm8k")}


def asked_example(text: str, prompt_format: str) -> Example:
    """The example that --ask means: a JSON object, or text for the user's turn of a prompt. Text is the whole
    prompt if `prompt_format` is not in PROMPTS, as for a task from a file."""
    row = None
    with suppress(ValueError, RecursionError):
        row = json.loads(text)
    if not isinstance(row, dict):
        prompt = PROMPTS[prompt_format](NOTHING | {"question": text}) if prompt_format in PROMPTS else text
        if isinstance(prompt, list):
            prompt = [m | {"content": text} if m["role"] == "user" else m for m in prompt]
        row = {"prompt": prompt}
    elif "prompt" not in row:
        try:
            row["prompt"] = PROMPTS[prompt_format](row)
        except (KeyError, TypeError) as error:
            raise InputError(f"--ask {text}: no prompt can be made of it ({type(error).__name__}: {error}); "
                             "give all that prompt and rewards read, or a `prompt`") from error
    return make_example(row, "", "--ask")


def encode_prompt(tokenizer, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt: text as it stands, or messages by the chat template (without one, as lines)."""
    return encode(tokenizer, prompt)[0]


def encode(tokenizer, prompt: str | list[dict]) -> tuple[list[int], str]:
    """A prompt's token ids, and the tag that it leaves open: `<think>`, another one, or ""."""
    ids_of = lambda text, **options: tokenizer(text, verbose=False, **options).input_ids
    role = "(?i:_?(?:assistant|bot|model|ai|gpt|reserved_[0-9]+)>)"  # whose tag only begins the turn
    tag = lambda text: (re.findall(rf"<(?!{role})\w[\w-]*>$", text.rstrip()) or [""])[0]
    if isinstance(prompt, str) or tokenizer.chat_template is None:
        text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        ids, whole = ids_of(text, add_special_tokens=False), ids_of(text)
        # The tokenizer's own first tokens (BOS) stay, unless the text has them. What it appends (EOS) goes.
        start = next((i for i in range(len(whole)) if whole[i : i + len(ids)] == ids), 0)
        return ids if ids[:start] == whole[:start] else whole[:start] + ids, tag(text)
    # An open turn is added as text: Qwen3's template and others put an empty thought into every whole turn.
    is_open = prompt[-1]["role"] == "assistant"
    text, turn = apply_template(tokenizer, prompt[: len(prompt) - is_open]), prompt[-1]["content"] * is_open
    opened = tag(text)
    if opened and tag(turn) == opened:  # the template has opened it already
        turn = turn.rstrip().removesuffix(opened)
    still_open = tag(turn) or opened * (opened.replace("<", "</") not in turn)
    return ids_of(text + turn, add_special_tokens=False), still_open


def apply_template(tokenizer, messages: list[dict]) -> str:
    """Messages as the tokenizer's chat template writes them, with the beginning of an answer."""
    options = {"tokenize": False, "add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(messages, **options)
        if re.search(r"</[\w-]+>$", text.rstrip()):  # a thought that it closes unless it is asked to think
            text = tokenizer.apply_chat_template(messages, **options, enable_thinking=True, thinking=True)
        bare = lambda text: re.sub(r"/(no_)?think\b|\W", "", text)  # a template may take a switch out
        lost = {m["role"] for m in messages if bare(m["content"]) not in bare(text)} & {"system", "user"}
        if lost:
            raise ValueError(f"it leaves out the words of the {' and the '.join(sorted(lost))}")
        return text
    except Exception as error:  # a template is a program of its own
        if messages and messages[0]["content"] in SYSTEM:  # it may refuse the role
            user = messages[1] | {"content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return apply_template(tokenizer, [user, *messages[2:]])
        raise InputError(f"the chat template of {tokenizer.name_or_path or 'the model'} refuses "
                         f"{str(messages)[:80]} ({brief(error)}); put a system message's words at the head "
                         "of the user's, or write prompts as text") from error


def tokenize(tokenizer, config, examples: list[Example], max_new_tokens: int) -> list[Example]:
    """Put `prompt_ids` and `opened`, the tag that its prompt leaves open, into each example. Returns those
    that fit the context, and warns once of others. Raises InputError if none fits or a token is unknown."""
    for example in examples:
        example["prompt_ids"], example["opened"] = encode(tokenizer, example["prompt"])
        refuse_unknown(tokenizer, config, example, "prompt", example["prompt_ids"])
    context = getattr(config.get_text_config(), "max_position_embeddings", math.inf)  # Bloom has no limit
    is_long = lambda example: len(example["prompt_ids"]) + max_new_tokens > context
    if long := list(filter(is_long, examples)):
        told = (f"{len(long)} of {len(examples)} prompts, of up to {max(len(e['prompt_ids']) for e in long)} "
                f"tokens, exceed the model's context of {context} with --max-new-tokens {max_new_tokens} "
                f"({'; '.join(map(place, long[:8]))}{'; ...' * (len(long) > 8)}); shorten them, or lower it")
        if len(long) == len(examples):
            raise InputError(told)
        warn(f"{told}. They are left out")
    return list(itertools.filterfalse(is_long, examples))


def refuse_unknown(tokenizer, config, example: Example, what: str, ids: list[int]) -> None:
    rows, largest = config.get_text_config().vocab_size, max(ids, default=0)
    if largest >= rows or not ids:
        token = f"token {tokenizer.convert_ids_to_tokens(largest)} (id {largest})" if ids else "no token"
        raise InputError(f"{place(example)}: the {what} has {token}, and the model's embeddings have {rows} "
                         "rows; leave it out, or resize the embeddings")


def place(example: dict) -> str:
    return getattr(example, "where", "") or f"the prompt that begins {str(example['prompt'])[:80]}"


# ---- Countdown: reach the target from the given numbers, each used exactly once. ---------------------------

APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def random_expression(numbers: list[int], operators: str, rng: random.Random) -> tuple[str, Fraction]:
    """A random expression over all `numbers`, in any order and of any shape, and its exact value."""
    parts = [(str(number), Fraction(number)) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        (left, a), (right, b) = parts.pop(), parts.pop()
        sign = rng.choice([sign for sign in operators if sign != "/" or b != 0])
        parts.append((f"({left} {sign} {right})", APPLY[sign](a, b)))
    text, value = parts[0]
    return text.removeprefix("(").removesuffix(")"), value


def demonstration_ids(tokenizer, config, example: Example, rng: random.Random) -> list[int]:
    """Token ids of an answer for the cold start: the example's completion, or a blind attempt at its
    countdown. An attempt's form and arithmetic are right; GRPO has to teach which expression hits the target.
    It ends with one end-of-sequence token. Raises InputError if the model's embeddings lack a token."""
    text, nums, target = map(example.get, ("completion", "nums", "target"))
    attempt = lambda text, value: f"{text} = {value}</think>\n<answer>{text}</answer>"
    if isinstance(text, str):
        text = re.sub(rf"({re.escape(tokenizer.eos_token)}\s*)+$", "", text)
        if opened := example.get("opened"):  # the prompt has this tag already
            text = re.sub(rf"^\s*{re.escape(opened)}", "", text)
    elif not isinstance(nums, list) or {int} != {*map(type, [*nums, target])}:
        raise InputError("a cold start needs text in a `completion` column; add it, or --cold-start-steps 0")
    elif len(nums) == 2:
        # Plus comes twice as often as others: before GRPO it is the greedy answer, whatever the seed. How the
        # target compares with the first number says much about the operator.
        (a, b), sign = nums, rng.choice("++-*")
        compared = ">" if target > a else "<" if target < a else "="
        text = f"{target} {compared} {a}, " + attempt(f"{a} {sign} {b}", APPLY[sign](a, b))
    else:
        text = attempt(*random_expression(nums, "+-*/", rng))
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    refuse_unknown(tokenizer, config, example, "demonstration", ids)
    return ids


def countdown_problems(count: int, seed: int) -> list[Example]:
    """`count` different solvable problems like those of Countdown-Tasks-3to4: 3 or 4 numbers of 1-99, and the
    value of a random expression over them, of 10-99, as the target."""
    rng, problems = random.Random(seed), {}
    while len(problems) < count:
        nums = [rng.randint(1, 99) for _ in range(rng.choice((3, 4)))]
        value = random_expression(nums, "+-*/", rng)[1]
        if value.denominator == 1 and 10 <= value <= 99:
            problems.setdefault((*sorted(nums), value), Example(nums=nums, target=int(value)))
    return list(problems.values())


def mini_countdown_split(eval_examples: int, seed: int) -> tuple[list[Example], list[Example]]:
    """All problems of two numbers of 1-30 with a positive target by +, - or *, as (train, held-out). The
    larger number comes first, so no difference is negative. All problems of a pair are in the same part."""
    pairs = list(itertools.combinations_with_replacement(range(1, MINI_LARGEST + 1), 2))
    random.Random(seed).shuffle(pairs)
    problems = [Example(nums=[b, a], target=target)
                for a, b in pairs for target in sorted({a + b, b - a, a * b} - {0})]
    if eval_examples > len(problems) // 2:
        raise InputError(f"--eval-examples {eval_examples}: hold out at most {len(problems) // 2} problems")
    heldout, last = problems[:eval_examples], sorted(problems[eval_examples - 1]["nums"])
    return [p for p in problems[eval_examples:] if sorted(p["nums"]) != last], heldout


# ---- Loading -----------------------------------------------------------------------------------------------

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")  # in any case


def load_task(task: str, *, dataset: str | None = None, prompt_format: str | None = None, train_examples: int,
              eval_examples: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of a task. No prompt is in both. Raises InputError if they can't be had.
    `task` is mini-countdown, countdown, gsm8k, or a file with a `prompt` column. `dataset` (hub id, folder or
    file) replaces its source. `seed` chooses and orders at most `train_examples`, and exactly
    `eval_examples` of the `test` split, if there is one."""
    source = dataset or ("openai/gsm8k" if task == "gsm8k" else task)
    if task == "mini-countdown" and dataset is None:
        train, heldout = mini_countdown_split(eval_examples, seed)
    elif task == "countdown" and dataset is None:
        problems = countdown_problems(train_examples + eval_examples, seed)
        train, heldout = problems[eval_examples:], problems[:eval_examples]
    elif task in ("countdown", "gsm8k") or Path(task).suffix.lower() in FILE_TYPES:
        train, heldout = read_dataset(source, task, eval_examples, seed)
    else:
        raise InputError(f"--task {task}: not a task; use countdown, gsm8k, mini-countdown (no --dataset), a "
                         f"{', '.join(FILE_TYPES)} file with a `prompt` column")
    prompt_format = prompt_format or task
    for example in train + heldout if prompt_format in PROMPTS else []:
        example["prompt"] = PROMPTS[prompt_format](example)
        if "reasoning" in example:  # gsm8k's solution, with the tags that its prompt asks for
            tag = "reasoning" if prompt_format == "gsm8k-reasoning" else "think"
            answer = f"<answer>{example['answer']}</answer>"
            example["completion"] = f"<{tag}>{example['reasoning']}</{tag}>\n{answer}"
    problem = lambda e: [sorted(e["nums"]), e["target"]]  # the order of numbers makes no other
    key = lambda e: json.dumps(problem(e) if task == "countdown" else e["prompt"], default=str)
    held, known = {key(example) for example in heldout}, {key(example) for example in train}
    if known <= held:
        raise InputError(f"{source}: nothing is left to train on. Its {len(train)} rows have {len(known)} "
                         "different prompt(s), all held out; bring other rows, or lower --eval-examples")
    train = [example for example in train if key(example) not in held]
    random.Random(seed).shuffle(train)
    return train[:train_examples], heldout


def read_dataset(source: str, task: str, eval_examples: int, seed: int) -> list[list[Example]]:
    """[train, held-out] examples of a file, a local folder or a hub data set. A row may be in both."""
    path, unit = Path(source), "line" if Path(source).suffix.lower() in (".jsonl", ".csv") else "row"
    if path.is_file():
        splits = {"train": fetch(source, read_file, source)}
    else:
        import datasets  # a second of import that the embedded task needn't pay

        datasets.disable_progress_bars()
        folder = str(path / "main") if (path / "main").is_dir() else source  # of a clone of gsm8k
        options = {"name": "main"} if source == "openai/gsm8k" else {}
        loaded = fetch(source, datasets.load_dataset, folder, **options)
        splits = {name: list(enumerate(split.to_list(), start=1)) for name, split in loaded.items()}
    train = splits.get("train") or next(iter(splits.values()))
    heldout = splits.get("test") or train
    if len(heldout) < eval_examples:
        raise InputError(f"{source}: {len(heldout)} rows are too few; lower --eval-examples "
                         f"{eval_examples}, or bring more")
    heldout = random.Random(seed).sample(heldout, eval_examples)
    return [[make_example(row, task, f"{source}, {unit} {number}") for number, row in rows]
            for rows in (train, heldout)]


def read_file(source: str) -> list[tuple[int, dict]]:
    """(number, row) for each row of a file: its line, or its index in a JSON list or a parquet file. Values
    are what the file says; `datasets` would lose a csv's words None and NA, and change dates and "007"."""
    path, kind, number, rows = Path(source), Path(source).suffix.lower(), 0, []
    if kind == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            return list(enumerate(file.read().to_pylist(), start=1))

    def lines() -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    try:
        if kind == ".csv":
            csv.field_size_limit(2**31 - 1)  # a prompt may be longer than csv's own 131,072 characters
            written = itertools.dropwhile(lambda line: not line.strip(), lines())
            for row in (table := csv.DictReader(written, strict=True)):
                if None in row or len(row) - ("" in row) < sum(map(bool, table.fieldnames)):
                    raise csv.Error(f"more cells than the {len(table.fieldnames)} columns, or a column twice")
                if any(map(str.strip, filter(None, row.values()))):
                    rows.append((number, {name: csv_value(name, cell) for name, cell in row.items()}))
        elif kind == ".json" and (text := "".join(lines())).lstrip().startswith("["):
            number = 1  # an error in it tells its own line
            rows = list(enumerate(json.loads(text), start=1))
        else:
            rows = [(number, json.loads(line.strip())) for line in lines() if line.strip()]
    except (ValueError, RecursionError, csv.Error) as error:
        needed = ("save the file as UTF-8" if isinstance(error, UnicodeError)
                  else 'text with a comma needs double quotes around it, "" for one in it' if kind == ".csv"
                  else 'write one JSON object on each line, like {"prompt": "2 + 2?"}')
        line = number + getattr(error, "lineno", 1) - 1
        raise InputError(f"{source}, line {line}: {getattr(error, 'msg', error)}; {needed}") from error
    return rows


def csv_value(column: str, cell: str | None) -> str | int | float | None:
    """A number if Python writes it as the cell does (not "007", "1.50" or the word nan); None if empty."""
    for kind in (int, float) if cell and column not in ("prompt", "completion", "question") else ():
        with suppress(ValueError):
            if str(kind(cell)) == cell and cell[-1].isdigit():
                return kind(cell)
    return cell or None


def make_example(row: dict, task: str, where: str) -> Example:
    """The example made of one row. Raises InputError, with the row's place, if it can't be used."""
    if not isinstance(row, dict):
        raise InputError(f'{where}: {row!r:.80} is not a JSON object, like {{"prompt": "2 + 2?"}}')
    as_text = r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:"  # messages as a csv would have them
    is_message = lambda m: isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
    built_in = {"countdown": "nums must be a list of at least two whole numbers and target a whole number",
                "gsm8k": "question and answer must be text, the answer with its number after ####"}
    needed = built_in.get(task, 'prompt must be text or a list of {"role", "content"} messages, not messages '
                          "written as text: keep those in a jsonl file" if "prompt" in row else
                          "prompt must be one of the columns (in a csv, commas separate them)")
    example = None
    match task if task in built_in else "prompt", row:
        case "countdown", {"nums": [_, _, *_] as nums, "target": x} if {int} == {*map(type, [*nums, x])}:
            example = Example(nums=nums, target=x)
        case "gsm8k", {"question": str() as question, "answer": str() as answer} if "####" in answer:
            reasoning, _, answer = map(str.strip, answer.rpartition("####"))
            example = Example(question=question, answer=answer.replace(",", ""), reasoning=reasoning)
        case "prompt", {"prompt": str() as prompt} if prompt and not re.match(as_text, prompt):
            example = Example(row)
        case "prompt", {"prompt": [_, *_] as messages} if all(map(is_message, messages)):
            example = Example(row)
    if half := re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False, default=str)):
        example, needed = None, f"{half[0]!r}, a lone surrogate, is only half a character"
    if example is None:
        shown = ", ".join(f"{column} = {value!r:.60}" for column, value in row.items())
        raise InputError(f"{where}: {needed}; this row has {shown}")
    example.where = where
    return example


# ---- Policies ----------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% if not loop.last or "
    "add_generation_prompt %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer, which encodes any text, with one token for each word of mini-countdown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ["numbers ", " target ", " + ", " - ", " * ", " = ", " < ", " > ", ", ",
             "<think>", "</think>", "\n<answer>", "</answer>"]
    # Longer numbers are spelled in digits. Their count hints at the operator that a target needs.
    numbers = map(str, range(10, MINI_LARGEST + 1))
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer.add_tokens([AddedToken(number, normalized=False, single_word=True) for number in numbers])
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>",
                                                pad_token="<|pad|>", chat_template=CHAT_TEMPLATE)


def tiny_config(tokenizer) -> transformers.Qwen2Config:
    """A Qwen2 of a million parameters for the tiny tokenizer."""
    return transformers.Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=128, intermediate_size=768, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.08,  # with the usual 0.02 so small a model takes twice as long to learn its sums
    )


@dataclass
class Policy:
    """The model that learns, with what sampling and saving need beside it."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    stops: list[int]  # token ids that end an answer
    pad_token_id: int
    generation: dict = field(default_factory=dict)  # what the model's generation config holds


def load_config(model: str, *, trust_remote_code: bool = False) -> tuple:
    """(config, tokenizer) of `embedded`, a folder or a hub id; no weights are read. Raises InputError if they
    can't be had, if the weights are quantized, or if no token ends an answer."""
    if model == "embedded":
        tokenizer = tiny_tokenizer()
        return tiny_config(tokenizer), tokenizer
    config, tokenizer = (
        fetch(f"--model {model}", kind.from_pretrained, model, trust_remote_code=trust_remote_code)
        for kind in (transformers.AutoConfig, transformers.AutoTokenizer))
    quantized, kind = getattr(config, "quantization_config", None) or {}, config.dtype
    method = (quantized if isinstance(quantized, dict) else quantized.to_dict()).get("quant_method", kind)
    if quantized or isinstance(kind, torch.dtype) and (kind.itemsize == 1 or not kind.is_floating_point):
        raise InputError(f"--model {model}: its weights are quantized ({method}); use the unquantized model")
    for part in (config, config.get_text_config()):
        part.return_dict, unread = True, ("output_attentions", "output_hidden_states", "output_router_logits")
        for name in filter(partial(hasattr, part), unread):
            setattr(part, name, False)
    rows = config.get_text_config().vocab_size
    if tokenizer.eos_token is None or tokenizer.eos_token_id >= rows:  # some classes make one up
        names = [tokenizer.convert_ids_to_tokens(i) for i in declared(model)[1] if i < rows]
        tokenizer.eos_token = next(filter(None, names), None)
    if tokenizer.eos_token is None:
        raise InputError(f"--model {model}: neither its tokenizer nor its generation config has an end-of-"
                         "sequence token that its embeddings know, so no answer could ever end")
    return config, tokenizer


def declared(model: str) -> tuple[dict, list[int]]:
    """What a model's generation config holds, and the token ids that end an answer. They are read from the
    files, because transformers adds its classes' defaults and refuses some generation configs."""
    find = partial(transformers.utils.cached_file, model, _raise_exceptions_for_missing_entries=False,
                   _raise_exceptions_for_connection_errors=False)
    config, generation = (json.loads(Path(path).read_text("utf-8-sig")) if (path := find(name)) else {}
                          for name in ("config.json", "generation_config.json"))
    ends = (config | generation).get("eos_token_id")
    return generation, [] if ends is None else [int(i) for i in (ends if isinstance(ends, list) else [ends])]


def load_policy(model: str, config, tokenizer, *, dtype: torch.dtype, device: str, seed: int = 0,
                trust_remote_code: bool = False) -> Policy:
    """The policy with its weights, for what `load_config` gave. Raises InputError if it can't be had."""
    generation, ends, auto = {}, [], transformers.AutoModelForCausalLM
    if model == "embedded":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Made in its dtype: a later .to(bfloat16) would round the rotary frequencies too.
            loaded = auto.from_config(config, dtype=dtype).eval()
    else:
        loaded = fetch(f"--model {model}", auto.from_pretrained, model, config=config, dtype=dtype,
                       attn_implementation="sdpa", trust_remote_code=trust_remote_code)
        for p in loaded.parameters():  # where a file has put weights decides a product's last bits
            p.data = p.data.clone()
        generation, ends = fetch(f"--model {model}", declared, model)
    rows, end = config.get_text_config().vocab_size, tokenizer.eos_token_id
    stops = sorted({i for i in [end, *ends] if i < rows})
    # transformers refuses to save some of the generation configs that models come with (a temperature without
    # do_sample). So its own keeps the stops alone, and save_folder writes the rest.
    loaded.generation_config = transformers.GenerationConfig(eos_token_id=stops)
    pad = next(i for i in (tokenizer.pad_token_id, end) if i is not None and i < rows)  # padding is masked
    return Policy(loaded.to(device), tokenizer, stops, pad, generation)


# ---- The run's folder --------------------------------------------------------------------------------------

STATE = Path("trainer_state", "state.pt")  # in a checkpoint
EVALUATION = "evaluation.json"  # in `best`


def first_rank() -> bool:
    """Whether this process writes files and prints. Of torchrun's processes only the first one does."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextmanager
def only_warned(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """An error of these kinds becomes a warning, and training goes on."""
    try:
        yield
    except kinds as error:
        warn(f"{what} ({type(error).__name__}: {brief(error)}); training goes on")


def refuse_folder(folder: Path, new: bool, bytes_needed: float) -> None:
    """Raises InputError if a run can't write to its folder, if a new run would write over another, or if the
    disk lacks `bytes_needed`, which a checkpoint and `final/` take."""
    if new and folder.exists():
        raise InputError(f"{folder} exists already; choose another --name, --resume it, or remove it")
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise InputError(f"--output-dir {folder.parent}: {above} can't be written to; choose another")
    if first_rank() and (free := shutil.disk_usage(above).free) < bytes_needed:
        raise InputError(f"--output-dir {folder.parent}: {free / 1e9:.1f} GB free, the run needs "
                         f"{bytes_needed / 1e9:.1f}; make room, or --save-every 0 --save-minutes 0")


def open_folder(folder: Path, config: dict, step: int) -> list[dict]:
    """Make a run's folder, or take it back to a checkpoint's `step`; returns the metrics up to there. What is
    later (checkpoints, `best/`) belongs to the course that was left, and is renamed."""
    if not first_rank():
        return []
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    tidy(folder)
    later = [c for c in checkpoints(folder) if int(step_of(c)) > step]
    for old in later + [folder / "best"] * (best_evaluation(folder)["step"] > step):
        aside = old.rename(folder / f"left-{old.name}-{datetime.now():%Y%m%d-%H%M%S-%f}")
        warn(f"{old} comes after the checkpoint resumed; it is {aside.name} now")
    kept = {"samples.jsonl": [], "metrics.jsonl": []}
    for path in (folder / name for name in kept if (folder / name).exists()):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # half a line, if the run was killed here
                record = json.loads(line)
                kept[path.name] += [record] * (record["step"] <= step)
        beside = path.with_suffix(".partial")
        beside.write_text("".join(json.dumps(record) + "\n" for record in kept[path.name]), encoding="utf-8")
        beside.replace(path)
    return kept["metrics.jsonl"]


def tidy(folder: Path) -> None:
    """Remove what a kill or a failure left. A folder gets its name back if the new one isn't there."""
    for old in filter(Path.exists, map(folder.joinpath, (".best.old", ".final.old", ".checkpoint.old"))):
        whole = folder / old.name[1:-4]
        if whole.name != "checkpoint" and not whole.exists():
            old.rename(whole)
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder / ".partial", ignore_errors=True)


def write_json(path: Path, value: dict) -> None:
    if first_rank():
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def append_lines(path: Path, records: list[dict]) -> None:
    """Add JSON lines in one write. On a full disk the file keeps whole lines, and training goes on."""
    if first_rank():
        lines = "".join(json.dumps(record, default=str) + "\n" for record in records).encode()
        with only_warned(f"{path} can't be written", OSError), path.open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(lines) < len(lines):
                file.truncate(size)
                raise OSError("no space left")


def save_folder(policy: Policy, folder: Path, state: dict | None = None, evaluation: dict | None = None):
    """Write a Hugging Face folder, with a checkpoint's `state` or the `evaluation` that made it the best. It
    is written beside, synced and renamed, so it is whole or absent. A failure warns, and returns False."""
    if not first_rank():
        return True
    run, beside = folder.parent, folder.parent / ".partial"
    try:
        tidy(run)
        policy.model.save_pretrained(beside)
        policy.tokenizer.save_pretrained(beside)
        write_json(beside / "generation_config.json", policy.generation | {"eos_token_id": policy.stops})
        if state is not None:
            (beside / STATE).parent.mkdir()
            torch.save(state, beside / STATE)
        if evaluation is not None:
            write_json(beside / EVALUATION, evaluation)
        for path in [*beside.rglob("*"), beside]:
            sync(path)
        if folder.exists():  # an earlier `best`, or the `final` of a run that is resumed after its end
            folder.rename(run / f".{folder.name}.old")
        beside.rename(folder)
        sync(run)
    except (OSError, RuntimeError, SafetensorError) as error:  # three libraries, one full disk
        warn(f"{folder} could not be saved ({brief(error)})")
        return False
    finally:
        tidy(run)
    return True


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk itself."""
    with suppress(PermissionError):  # Windows opens no folder
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        os.fsync(handle)
        os.close(handle)


def step_of(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if step_of(p).isdigit() and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(step_of(p)))


def save_checkpoint(policy: Policy, state: dict, folder: Path, keep: int) -> None:
    """Write `checkpoint-<step>`; then keep only the newest `keep` (0: all). A failure only warns."""
    checkpoint = folder / f"checkpoint-{state['step']}"
    if first_rank() and not checkpoint.exists() and save_folder(policy, checkpoint, state=state):
        for old in checkpoints(folder)[:-keep] if keep else []:
            with only_warned(f"{old.name} could not be removed", OSError):
                shutil.rmtree(old.rename(folder / ".checkpoint.old"))  # half of it must not look whole


def save_best(policy: Policy, folder: Path, evaluation: dict) -> None:
    """Write `best/` if this evaluation beats that of the model there: by accuracy, then by held-out reward.
    A tie keeps the earlier one. A failure only warns."""
    rank = lambda e: (e["accuracy"], -math.inf if e.get("reward") is None else e["reward"])
    if rank(evaluation) > rank(best_evaluation(folder)):
        save_folder(policy, folder / "best", evaluation=evaluation)


def best_evaluation(folder: Path) -> dict:
    """The evaluation of the model in `best/`, or one that any other beats."""
    path = folder / "best" / EVALUATION
    if first_rank() and path.is_file():  # another rank might look while the first one replaces the folder
        return json.loads(path.read_text(encoding="utf-8"))
    return {"accuracy": -1.0, "step": 0}


def load_state(checkpoint: Path) -> dict:
    """A checkpoint's trainer state: numbers, text and tensors, so a stranger's file runs no code."""
    try:  # Windows removes no file that is mapped into memory
        state = torch.load(checkpoint / STATE, weights_only=True, map_location="cpu", mmap=os.name != "nt")
        if missing := {"config", "limits", "step"} - set(state):
            raise ValueError(f"it is not the state of a run, it has no {' and no '.join(sorted(missing))}")
    except Exception as error:  # a damaged file can break the reader anywhere
        raise InputError(f"{checkpoint / STATE} can't be read: {brief(error)}; use another one") from error
    return state


def find_checkpoint(resume: str, output_dir: str, name: str | None = None) -> Path | None:
    """The checkpoint that --resume means; `latest` is the newest of the run `name`, or of all. InputError if
    there is none; but `latest` of a named run is None then: the command that resumes it also starts it."""
    runs = [Path(output_dir, name)] if name else Path(output_dir).glob("*")
    if resume != "latest":
        runs = [Path(resume)]
    found = [c for run in runs for c in ([run] if (run / STATE).is_file() else checkpoints(run)[-1:])]
    if not found and not (resume == "latest" and name):
        raise InputError(f"--resume {resume}: no whole checkpoint there; give a checkpoint-N folder, the "
                         f"folder of a run that has one, or `latest` for the newest below {output_dir}")
    newest = max(found, key=lambda checkpoint: checkpoint.stat().st_mtime, default=None)
    return newest and Path(os.path.abspath(newest))  # the parent is the run's folder, even of `.`


def draw_curves(metrics: list[dict], evaluations: list[dict], path: Path) -> None:
    """Reward and its parts, accuracy, completion length and entropy by step: raw values under their mean over
    a twentieth of the steps, beside held-out values. None leaves a gap."""
    if not first_rank():
        return
    from matplotlib.figure import Figure  # draws without a display

    rewards = [name for name in metrics[0] if name.partition("/")[0] == "reward"]  # the sum, then its parts
    panels = {"reward": rewards, "accuracy": ["accuracy"],
              "completion length (tokens)": ["completion_length"], "entropy (nats a token)": ["entropy"]}
    column = lambda name, records: [math.nan if (x := r.get(name)) is None else x for r in records]
    figure, window = Figure(figsize=(10, 6.5), layout="constrained"), max(1, len(metrics) // 20)
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, panels.items()):
        for i, name in enumerate(names):
            steps, values = column("step", metrics), torch.tensor(column(name, metrics))
            means = [values[max(0, j - window) : j].nanmean() for j in range(1, len(values) + 1)]
            axis.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=1)
            axis.plot(steps, means, color=f"C{i}", linewidth=2, label=name.removeprefix("reward/"))
        for name, marks, how in ((title, "ko-", "greedy"), (f"sampled_{title}", "k^--", "sampled")):
            if measured := [e for e in evaluations if e.get(name) is not None]:
                axis.plot(column("step", measured), column(name, measured), marks, markersize=5, linewidth=1,
                          label=f"held-out, {how}")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    with only_warned(f"{path} can't be drawn", OSError):
        beside = path.with_suffix(".partial.png")
        figure.savefig(beside, dpi=110)
        beside.replace(path)


def import_service(service: str):
    """The module of an optional package that --report-to names. Raises InputError if it is missing."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if service == "tensorboard" else service)
    except ImportError as error:
        raise InputError(f"--report-to {service}: {error}; pip install {service}, or drop it") from error


class Dashboard:
    """Sends the numbers of metrics.jsonl to a service, unless it is "none" or has failed. A resumed run goes
    on in the same run there, after `step`; wandb keeps what it has of later steps."""

    def __init__(self, service: str, folder: Path, config: dict, step: int):
        self.failed, self.run = f"--report-to {service} failed", None
        if service == "none" or not first_rank():
            return
        with only_warned(self.failed, Exception):
            if service == "tensorboard":
                writer = import_service(service).SummaryWriter(folder / service, purge_step=step + 1)
                send = lambda values, step: [writer.add_scalar(name, x, step) for name, x in values.items()]
                self.run = SimpleNamespace(log=send, finish=writer.close)
            else:
                folder.mkdir(parents=True, exist_ok=True)  # or wandb writes elsewhere, and is not found again
                ids = [path.name.rpartition("-")[2] for path in folder.glob("wandb/*run-*-*")] or [None]
                own = {"id": ids[-1], "dir": str(folder)} if service == "wandb" else {}
                self.run = import_service(service).init(
                    project="grpo_scratch", name=folder.absolute().name, config=config, resume="allow", **own)

    def log(self, record: dict, prefix: str = "") -> None:
        """Send a record's numbers under their names, after `prefix`."""
        values = {prefix + k: x for k, x in record.items() if isinstance(x, (int, float)) and k != "step"}
        run, self.run = self.run, None  # after a failure nothing more is sent
        with only_warned(self.failed, Exception):
            if run:
                run.log(values, step=record["step"])
            self.run = run

    def close(self) -> None:
        with only_warned(self.failed, Exception):
            if self.run:
                self.run.finish()


# ---- What a person sees ------------------------------------------------------------------------------------

def say(message: str = "", file=None, from_all: bool = False) -> None:
    """Print a line past the bars, on the first rank or `from_all`. A closed pipe ends no run."""
    file = file or sys.stdout
    if not (first_rank() or from_all) or file is None or file.closed:  # closed outright, as by `>&-`
        return
    encoding = getattr(file, "encoding", None) or "utf-8"  # it may lack some of an answer's letters
    try:
        tqdm.write(message.encode(encoding, "backslashreplace").decode(encoding), file=file)
        file.flush()
    except BrokenPipeError:  # Ctrl-C ends `| tee` too
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    except OSError:
        pass  # a log on a full disk; later lines may fit again


def warn(message: str) -> None:
    say(f"warning: {message}", sys.stderr)


def has_terminal() -> bool:
    """Whether this rank can show bars."""
    return first_rank() and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def show_step(bar: tqdm, record: dict, steps: int) -> None:
    """A step's numbers: on a terminal in the bar, elsewhere (a log file) in a plain line."""
    shown = (f"reward={record['reward']:.3f} accuracy={record['accuracy']:.3f} "
             f"length={record['completion_length']:.1f}")
    bar.set_postfix_str(shown)
    if bar.disable:
        skipped = f" ({record['skipped']})" if record["skipped"] else ""
        say(f"step {record['step']}/{steps} {shown.replace('=', ' ')} {record['seconds']:.2f} s{skipped}")
    if record["bad_updates"]:
        warn(f"step {record['step']}: a number is not finite; that update changed no weight")


def evaluation_in_words(evaluation: dict, samples: int) -> str:
    words = {"accuracy": "held-out accuracy", "reward": "held-out reward",
             "sampled_accuracy": f"accuracy of {samples} samples", "pass_at_k": f"pass@{samples}"}
    return ", ".join(f"{told} {x:.3f}" for k, told in words.items() if (x := evaluation.get(k)) is not None)


def report(summary: dict, samples: int, folder: Path) -> str:
    """The held-out numbers before and after, and where the files are."""
    (first, *_, last), best = summary["evaluations"], summary["best"]
    told = f"\n  {folder}/best/ (held-out accuracy {best['accuracy']:.3f}, step {best['step']})"
    return (f"before GRPO: {evaluation_in_words(first, samples)}\n"
            f"after GRPO:  {evaluation_in_words(last, samples)}\n"
            f"{summary['steps']} steps, {summary['seconds']:.0f} s in this process. Look at:\n"
            f"  {folder}/curves.png, samples.jsonl, final/" + told * (best["accuracy"] >= 0))
