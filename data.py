"""What goes into a run and what comes out of it.

In: tasks and their prompt formats, local files, hub data sets, policies, the embedded one among them. Out:
the run's folder with its checkpoints, jsonl lines and picture, and what a person sees. An example is a plain
dict: `prompt` (text, used as it stands, or a list of chat messages, put through the tokenizer's chat
template) beside the columns that its reward reads (`nums` and `target`, or `answer`, or whatever a file
brings) and, where supervised demonstrations are wanted, `completion`.

    train, heldout = load_task("countdown", train_examples=1000, eval_examples=100, seed=0)
    ids = encode_prompt(tokenizer, train[0]["prompt"])

Left out on purpose: streaming (a GRPO run reads a few thousand prompts) and mixing several tasks in one run.
"""

import hashlib
import html
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
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from pathlib import Path

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

MINI_LARGEST = 30  # largest number of a mini-countdown problem; the embedded policy's tokenizer knows it too


class InputError(ValueError):
    """What the user gave can't be used; the message says what was given, what is allowed, what to type."""


def fetch(what: str, load: Callable, name: str, /, **options):
    """load(name), of a file or folder here or a hub id; InputError, about `what`, when it can't be had."""
    is_hub_id = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) and Path(name).suffix not in FILE_TYPES
    if not is_hub_id and not Path(name).exists():
        raise InputError(f"{what}: no such file or folder; check the path, or give a hub id such as "
                         "Qwen/Qwen2.5-0.5B-Instruct or openai/gsm8k")
    # The hub's client tells of each of its retries; the error says all that they say.
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        return load(name, **options)
    except Exception as error:  # datasets, transformers, the hub and the network each have their own
        raise InputError(f"{what}: can't be loaded ({type(error).__name__}: "
                         f"{textwrap.shorten(str(error), 200)}); check the files in a local folder, or the "
                         "id and the network for the hub") from error


# ---- Prompt formats: example -> text, or messages; a last one from the assistant is a turn left open -------

PROMPTS: dict[str, Callable[[dict], str | list[dict]]] = {
    # As nano-aha-moment, GRPO-Zero and Improved-GRPO pose it; ends inside an open `<think>`.
    "countdown": lambda example: [
        {"role": "system", "content": "You are a careful assistant. You reason in your head before you give "
         "the user the answer."},
        {"role": "user", "content": f"Combine the numbers {', '.join(map(str, example['nums']))} into an "
         f"equation that equals {example['target']}. You may use +, -, *, / and parentheses, and must use "
         "each number exactly once. Write your reasoning inside <think> </think> tags and then the equation "
         "alone inside <answer> </answer> tags, for example <answer>(1 + 2) / 3</answer>."},
        {"role": "assistant", "content": "I will work through this step by step.\n<think>"},
    ],
    # The same in the few words that the embedded policy knows.
    "mini-countdown": lambda example: [
        {"role": "user", "content": f"numbers {' '.join(map(str, example['nums']))} "
         f"target {example['target']}"},
        {"role": "assistant", "content": "<think>"},
    ],
    # That of simple_GRPO: the model itself opens and closes both tags.
    "gsm8k": lambda example: [
        {"role": "system", "content": "You help the user with a question. First think the steps through, "
         "then give the final answer. Put the thinking inside <think> </think> tags and the answer inside "
         "<answer> </answer> tags, like this: <think> your steps </think><answer> the answer </answer>."},
        {"role": "user", "content": example["question"]},
    ],
    # That of The LM Book: plain text without a chat template, other tags.
    "gsm8k-reasoning": lambda example: (
        "Reply in exactly this form:\n<reasoning>\nyour steps\n</reasoning>\n"
        f"<answer>\nthe final number\n</answer>\n{example['question']}"
    ),
}


def asked_example(text: str, prompt_format: str) -> dict:
    """The example that a JSON object is; of any other text one whose prompt has it as the user's turn.

    Where the format is none of PROMPTS, as for a task from a file, the text is the prompt as it stands.
    """
    example = None
    with suppress(ValueError, RecursionError):
        example = json.loads(text)
    if isinstance(example, dict):
        if "prompt" in example:
            return make_example(example, "", "--ask")
        try:
            return {**example, "prompt": PROMPTS[prompt_format](example)}
        except (KeyError, TypeError) as error:
            raise InputError(f"--ask {text}: no prompt can be made of it ({type(error).__name__}: {error}); "
                             "an example holds what prompt and rewards read, or a `prompt`") from error
    if prompt_format not in PROMPTS:
        return {"prompt": text}
    prompt = PROMPTS[prompt_format]({"nums": [], "target": "", "question": text})
    if isinstance(prompt, list):
        prompt = [{**m, "content": text} if m["role"] == "user" else m for m in prompt]
    return {"prompt": prompt}


def encode_prompt(tokenizer, prompt: str | list[dict], answer: str | None = None) -> list[int]:
    """Token ids of one prompt: plain text as it stands, chat messages through the tokenizer's chat template.

    A last message from the assistant stays open, so that the completion continues it; otherwise the template
    opens a new assistant turn. An `answer` continues the one or fills the other, and ends the conversation.
    A tokenizer without a template gets the messages' texts, one a line.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt + (answer or "")).input_ids
    is_open, is_asked = prompt[-1]["role"] == "assistant", answer is None
    if not is_asked:
        asked, opening = (prompt[:-1], prompt[-1]["content"]) if is_open else (prompt, "")
        prompt = [*asked, {"role": "assistant", "content": opening + answer}]
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(message["content"] for message in prompt)).input_ids
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False,
                                             continue_final_message=is_open and is_asked,
                                             add_generation_prompt=is_asked and not is_open)
    except Exception as error:  # a template is a program of its own
        raise InputError(f"the chat template of {tokenizer.name_or_path or 'the model'} refuses the messages "
                         f"{str(prompt)[:80]!r} ({textwrap.shorten(str(error), 200)}); leave out the role it "
                         "doesn't know, or give prompts as text") from error
    return tokenizer(text, add_special_tokens=False).input_ids  # the template wrote the special ones


def last_request(prompt: str | list[dict]) -> str:
    """What the prompt asks: its text, or the last message that is not the assistant's open turn."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] != "assistant"), prompt[0]["content"])


def tokenize(tokenizer, config, examples: list[dict], max_new_tokens: int) -> int:
    """Put `prompt_ids` into each example; returns the longest's tokens. InputError if one leaves no room."""
    context = getattr(config.get_text_config(), "max_position_embeddings", math.inf)  # Bloom has no limit
    for example in examples:
        example["prompt_ids"] = encode_prompt(tokenizer, example["prompt"])
    longest = max(examples, key=lambda example: len(example["prompt_ids"]))
    length = len(longest["prompt_ids"])
    if length + max_new_tokens > context:
        raise InputError(f"a prompt of {length} tokens and {max_new_tokens} new ones exceed the model's "
                         f"context of {context}; lower --max-new-tokens or drop the prompt that begins "
                         f"{str(longest['prompt'])[:80]!r}")
    return length


# ---- Countdown: reach the target from the given numbers, each used exactly once. ---------------------------

APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def random_expression(numbers: list[int], operators: str, rng: random.Random) -> tuple[str, Fraction]:
    """A random expression over all `numbers` in random order, with few parentheses; its exact value.

    Division by zero is never built. Every binary tree can come up: random parts are joined till one is left.
    """
    parts = [(str(number), Fraction(number), 3) for number in numbers]  # text, value, how tightly it binds
    while len(parts) > 1:
        rng.shuffle(parts)
        (left, a, left_binds), (right, b, right_binds) = parts.pop(), parts.pop()
        sign = rng.choice([sign for sign in operators if sign != "/" or b != 0])
        binds = 1 if sign in "+-" else 2
        left = left if left_binds >= binds else f"({left})"
        right = right if right_binds > binds or (right_binds == binds and sign in "+*") else f"({right})"
        parts.append((f"{left} {sign} {right}", APPLY[sign](a, b), binds))
    return parts[0][0], parts[0][1]


def demonstration(example: dict, rng: random.Random) -> str:
    """A completion to imitate in the cold start: the example's own, or a blind attempt at its countdown.

    An attempt's format and arithmetic are right; which expression hits the target is what GRPO has to teach.
    With two numbers it starts with how the target compares with the first one. Plus is chosen twice as often
    as the others: before GRPO the greedy answer is plus to every problem, and not an accident of the seed.
    """
    if isinstance(example.get("completion"), str):
        return example["completion"]
    if "nums" not in example or "target" not in example:
        raise InputError("--cold-start-steps: the task's rows have no text in a `completion` column to learn "
                         "from; add one, or drop the flag")
    nums, target, compared = example["nums"], example["target"], ""
    if len(nums) == 2:
        a, b = nums
        compared = f"{target} {'>' if target > a else '<' if target < a else '='} {a}, "
        sign = rng.choice("++-*")
        text, value = f"{a} {sign} {b}", APPLY[sign](a, b)
    else:
        text, value = random_expression(nums, "+-*/", rng)
    return f"{compared}{text} = {value}</think>\n<answer>{text}</answer>"


def countdown_problems(count: int, seed: int) -> list[dict]:
    """`count` different problems like those of Countdown-Tasks-3to4: 3 or 4 numbers of 1-99, target 10-99.

    Every problem is solvable, because its target is the value of a random expression over its numbers.
    """
    rng = random.Random(seed)
    problems: dict[tuple, dict] = {}
    while len(problems) < count:
        nums = [rng.randint(1, 99) for _ in range(rng.choice((3, 4)))]
        value = random_expression(nums, "+-*/", rng)[1]
        if value.denominator == 1 and 10 <= value <= 99:
            problem = {"nums": nums, "target": int(value)}
            problems.setdefault(countdown_key(problem), problem)
    return list(problems.values())


def countdown_key(problem: dict) -> tuple:
    """Two countdown problems are the same when this is: the order of the numbers makes no difference."""
    return tuple(sorted(problem["nums"])), problem["target"]


def mini_countdown_split(eval_examples: int, seed: int) -> tuple[list[dict], list[dict]]:
    """All problems of two numbers of 1-30 with a positive target by +, - or *, as (train, held-out).

    The larger number is given first, so that no difference is negative. Held out are all problems of some
    pairs of numbers: what operator hits a target must be learned elsewhere.
    """
    pairs = list(itertools.combinations_with_replacement(range(1, MINI_LARGEST + 1), 2))
    random.Random(seed).shuffle(pairs)
    problems = [
        {"nums": [b, a], "target": target}
        for a, b in pairs for target in sorted({a + b, b - a, a * b} - {0})
    ]
    if eval_examples > len(problems) // 2:
        raise InputError(f"--eval-examples {eval_examples}: mini-countdown has {len(problems)} problems in "
                         "all; hold out at most half of them")
    heldout, last = problems[:eval_examples], sorted(problems[eval_examples - 1]["nums"])
    return [p for p in problems[eval_examples:] if sorted(p["nums"]) != last], heldout


# ---- Loading -----------------------------------------------------------------------------------------------

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_task(
    task: str, *, dataset: str | None = None, prompt_format: str | None = None, train_examples: int,
    eval_examples: int, seed: int,
) -> tuple[list[dict], list[dict]]:
    """Training and held-out examples of a task, disjoint.

    `task` is `mini-countdown`, `countdown`, `gsm8k`, or a jsonl, json, csv or parquet file with a `prompt`
    column. `dataset` (a hub id, a local folder or a file) takes the place of the task's own source. At most
    `train_examples` and exactly `eval_examples` are returned, chosen and ordered by `seed`; a `test` split,
    where there is one, is what is held out. Raises InputError for anything that can't be used.
    """
    if task == "mini-countdown":
        if dataset:
            raise InputError("--dataset has no use with --task mini-countdown, which makes its own; drop it, "
                             "or use --task countdown")
        train, heldout = mini_countdown_split(eval_examples, seed)
    elif task == "countdown" and dataset is None:
        problems = countdown_problems(train_examples + eval_examples, seed)
        train, heldout = problems[eval_examples:], problems[:eval_examples]
    elif task in ("countdown", "gsm8k") or Path(task).suffix in FILE_TYPES:
        source = dataset or ("openai/gsm8k" if task == "gsm8k" else task)
        train, heldout = read_dataset(source, task, eval_examples, seed)
    else:
        raise InputError(f"--task {task}: not a task; use countdown, gsm8k, mini-countdown, or a "
                         f"{', '.join(FILE_TYPES)} file with a `prompt` column")
    prompt_format = prompt_format or task
    if prompt_format in PROMPTS:
        for example in train + heldout:
            example["prompt"] = PROMPTS[prompt_format](example)
            if "reasoning" in example:  # gsm8k's solution, with the tags that its prompt asks for
                tag = "reasoning" if prompt_format == "gsm8k-reasoning" else "think"
                example["completion"] = (f"<{tag}>{example['reasoning']}</{tag}>\n"
                                         f"<answer>{example['answer']}</answer>")
    key = countdown_key if task == "countdown" else lambda example: json.dumps(example["prompt"])
    held = {key(example) for example in heldout}
    train = [example for example in train if key(example) not in held]
    if not train:
        raise InputError(f"--task {task}: nothing is left to train on beside {len(heldout)} held-out "
                         "examples; lower --eval-examples or bring more data")
    random.Random(seed).shuffle(train)
    return train[:train_examples], heldout


def read_dataset(source: str, task: str, eval_examples: int, seed: int) -> list[list[dict]]:
    """[train, held-out] examples of a file, a local folder or a hub data set; they may overlap."""
    path, place, options = Path(source), source, {}
    if path.is_file() and path.suffix not in FILE_TYPES:
        raise InputError(f"{source}: not one of the file types {', '.join(FILE_TYPES)}; convert it")
    if path.is_file() and (path.suffix == ".jsonl" or path.stat().st_size == 0):  # empty: no rows
        splits = {"train": read_jsonl(path)}
    else:
        import datasets  # a second of import that the embedded task needn't pay

        datasets.disable_progress_bars()
        if path.is_file():
            place, options = FILE_TYPES[path.suffix], {"data_files": source}
        elif (path / "main").is_dir():  # a clone of gsm8k keeps its configurations in folders
            place = str(path / "main")
        elif source == "openai/gsm8k":
            options = {"name": "main"}
        loaded = fetch(source, datasets.load_dataset, place, **options)
        splits = {name: split.to_list() for name, split in loaded.items()}
    splits = {name: list(enumerate(rows, start=1)) for name, rows in splits.items()}
    train = splits.get("train") or next(iter(splits.values()))
    heldout = splits.get("test") or train
    if len(heldout) < eval_examples:
        raise InputError(f"{source}: --eval-examples {eval_examples} can't be held out of {len(heldout)} "
                         "rows; lower it, or add rows")
    heldout = random.Random(seed).sample(heldout, eval_examples)
    where = f"{source}, {'line' if path.suffix == '.jsonl' else 'row'}"
    return [[make_example(row, task, f"{where} {i}") for i, row in rows] for rows in (train, heldout)]


def read_jsonl(path: Path) -> list[dict]:
    """One JSON object a line; read here rather than by `datasets`, which can't say which line is bad."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)  # as UTF-8
            except (ValueError, RecursionError) as error:
                row = str(error)
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not a JSON object ({row!r:.80}); write one on "
                                 'each line, like {"prompt": "2 + 2?"}')
            rows.append(row)
    return rows


def make_example(row: dict, task: str, where: str) -> dict:
    """The example made of one row, or an InputError that says where the bad row is."""
    if task == "countdown":
        needed = "nums must be a list of at least two whole numbers and target a whole number"
        nums, target = row.get("nums"), row.get("target")
        if isinstance(nums, list) and len(nums) > 1 and all(type(n) is int for n in [*nums, target]):
            return {"nums": nums, "target": target}
    elif task == "gsm8k":
        needed = "question and answer must be text, the answer with its number after ####"
        question, solution = row.get("question"), row.get("answer")
        if isinstance(question, str) and isinstance(solution, str) and "####" in solution:
            reasoning, answer = solution.rsplit("####", 1)
            answer = answer.strip().replace(",", "")
            return {"question": question, "answer": answer, "reasoning": reasoning.strip()}
    else:
        needed = 'prompt must be text or a list of {"role", "content"} messages'
        prompt = row.get("prompt")
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if prompt and all(isinstance(m, dict) and isinstance(m.get("role"), str)
                          and isinstance(m.get("content"), str) for m in messages):
            return row
    shown = ", ".join(f"{column} = {value!r:.60}" for column, value in row.items())
    raise InputError(f"{where}: {needed}; this row has {shown}")


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
    # Longer numbers are spelled in digits: how many says much about the operator that a target needs.
    numbers = map(str, range(10, MINI_LARGEST + 1))
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer.add_tokens([AddedToken(number, normalized=False, single_word=True) for number in numbers])
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>",
                                                pad_token="<|pad|>", chat_template=CHAT_TEMPLATE)


def tiny_config(tokenizer) -> transformers.Qwen2Config:
    """A Qwen2 of a million parameters for the tiny tokenizer."""
    return transformers.Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=128, intermediate_size=768,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.08,  # with the usual 0.02 so small a model takes twice as long to learn its sums
    )


def tiny_policy(
    seed: int, dtype: torch.dtype = torch.float32
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """The embedded policy with random weights, and its tokenizer, made in memory: nothing to download."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Made in its dtype: a later .to(bfloat16) would round the rotary frequencies too.
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(tokenizer), dtype=dtype)
    return model.eval(), tokenizer


@dataclass
class Policy:
    """The model that learns, with what sampling needs beside it."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    stops: list[int]  # token ids that end an answer
    pad_token_id: int


def load_config(
    model: str, *, trust_remote_code: bool = False
) -> tuple[transformers.PreTrainedConfig, transformers.PreTrainedTokenizerBase]:
    """Config and tokenizer, all that planning needs, of `embedded`, a folder or a hub id; or InputError."""
    if model == "embedded":
        tokenizer = tiny_tokenizer()
        return tiny_config(tokenizer), tokenizer
    config, tokenizer = (
        fetch(f"--model {model}", kind.from_pretrained, model, trust_remote_code=trust_remote_code)
        for kind in (transformers.AutoConfig, transformers.AutoTokenizer)
    )
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {model}: its tokenizer has no end-of-sequence token, so no answer could "
                         "ever end")
    return config, tokenizer


def load_policy(
    model: str, tokenizer, *, dtype: torch.dtype, device: str, seed: int = 0, trust_remote_code: bool = False
) -> Policy:
    """The policy whose tokenizer `load_config` gave, with its weights; InputError when they can't be had."""
    if model == "embedded":
        loaded = tiny_policy(seed, dtype)[0]
    else:
        load = transformers.AutoModelForCausalLM.from_pretrained
        loaded = fetch(f"--model {model}", load, model, dtype=dtype, attn_implementation="sdpa",
                       trust_remote_code=trust_remote_code)
        for p in loaded.parameters():  # a file's weights lie where they lie, and a product's last bits tell
            p.data = p.data.clone()
    declared = loaded.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Policy(loaded.to(device), tokenizer, sorted(stops), pad)


def reward_model_bytes(name: str | None, dtype: torch.dtype, trust_remote_code: bool = False) -> int:
    """What a reward model's weights will take; read from its config alone."""
    if name is None:
        return 0
    trusted = {"trust_remote_code": trust_remote_code}
    config = fetch(f"--reward-model {name}", transformers.AutoConfig.from_pretrained, name, **trusted)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config, **trusted)
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


class RewardModel:
    """A sequence-classification model with one label; it scores answers and rests in host memory."""

    def __init__(self, name: str, *, device: str, dtype: torch.dtype, trust_remote_code: bool = False):
        """`name`: hub id or local folder. Raises InputError when it can't be had or has several labels."""
        what, trusted = f"--reward-model {name}", {"trust_remote_code": trust_remote_code}
        load = transformers.AutoTokenizer.from_pretrained
        self.tokenizer = fetch(what, load, name, padding_side="right", **trusted)
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        self.model = fetch(what, load, name, dtype=dtype, **trusted)
        if self.model.config.num_labels != 1:
            raise InputError(f"{what}: has {self.model.config.num_labels} labels; use one with a single "
                             "label")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.device = device

    @torch.no_grad()
    def scores(self, answers: list[tuple[str | list[dict], str]], batch_size: int = 16) -> list[float]:
        """One score for each (prompt, completion); chats go through the model's template, if it has one."""
        rows = [encode_prompt(self.tokenizer, prompt, completion) for prompt, completion in answers]
        context = getattr(self.model.config, "max_position_embeddings", math.inf)
        if (longest := max(map(len, rows))) > context:
            raise InputError(f"--reward-model: a prompt with its answer has {longest} tokens, its context "
                             f"is {context}; lower --max-new-tokens, or use another one")
        found = []
        self.model.to(self.device)
        try:
            for i in range(0, len(rows), batch_size):
                batch = self.tokenizer.pad({"input_ids": rows[i : i + batch_size]}, return_tensors="pt")
                found += self.model(**batch.to(self.device)).logits[:, 0].float().tolist()
        finally:
            self.model.to("cpu")
        return found


# ---- The run's files ---------------------------------------------------------------------------------------

STATE = Path("trainer_state", "state.pt")  # in a checkpoint's folder
EVALUATION = "evaluation.json"  # in `best`
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)  # three libraries, one full disk


def refuse_folder(folder: Path, new: bool) -> None:
    """Raises InputError when a run can't write to its folder, or a new one would write over another."""
    if new and folder.exists():
        raise InputError(f"{folder} exists already; choose another --name, --resume it, or remove it")
    nearest = nearest_folder(folder)
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise InputError(f"--output-dir {folder.parent}: {nearest} can't be written to; choose another")


def nearest_folder(folder: Path) -> Path:
    """The folder itself or, until it is made, the one below which it will be."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def refuse_full_disk(folder: Path, model_bytes: int, state_bytes: int, saves: int) -> None:
    """Raises InputError when the disk has no room for one checkpoint and `final/`; warns when it has none for
    all that a run may hold at once: `saves` checkpoints, `best/` and `final/`.

    What a resumed run has of these already counts as room.
    """
    if not first_rank():
        return
    room = shutil.disk_usage(nearest_folder(folder)).free
    room += sum(map(bytes_in, [folder / "best", folder / "final", *checkpoints(folder)]))
    checkpoint = model_bytes + state_bytes
    least, whole = model_bytes + checkpoint * bool(saves), 2 * model_bytes + checkpoint * saves
    if room < least:
        raise InputError(f"--output-dir {folder.parent}: the disk has {room / 1e9:.1f} GB free, but final/ "
                         f"and the checkpoint before it take {least / 1e9:.1f} GB; make room, choose "
                         "another, or save no checkpoints: --save-every 0 --save-minutes 0")
    if room < whole:
        warn(f"the disk has {room / 1e9:.1f} GB free, and {saves} checkpoints of "
             f"{checkpoint / 1e9:.1f} GB, best/ and final/ take {whole / 1e9:.1f} GB: older checkpoints are "
             "removed where room is needed, never the newest")


def make_room(folder: Path, needed: int) -> None:
    """Remove a run's older checkpoints, never the newest, until so many bytes are free."""
    for old in checkpoints(folder)[:-1] if first_rank() else []:
        if shutil.disk_usage(folder).free < needed:
            remove(old)
            warn(f"{old} was removed, as the disk had no room")


def first_rank() -> bool:
    """Of the processes that torchrun started, the first one writes files and talks."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def open_folder(folder: Path, config: dict, step: int) -> list[dict]:
    """Make a run's folder, or leave in it what a checkpoint of that step knows; returns its metrics.

    Later checkpoints are renamed, and a `best/` of a later step: they belong to the course that was left.
    """
    if not first_rank():
        return []
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("best", "final"):
        old = folder / f".{name}.old"
        if (folder / name).exists():
            shutil.rmtree(old, ignore_errors=True)  # perhaps half deleted, when the run was killed there
        elif old.exists():
            old.rename(folder / name)  # it was killed between the two renames of save_folder
    write_json(folder / "config.json", config)
    steps = {c: int(step_of(c)) for c in checkpoints(folder)}
    steps[folder / "best"] = best_evaluation(folder)["step"]
    for later, its_step in steps.items():
        if its_step > step:
            aside = later.rename(folder / f"left-{later.name}-{datetime.now():%Y%m%d-%H%M%S-%f}")
            warn(f"{later} comes after the checkpoint resumed; it is {aside.name} now")
    records = {"samples.jsonl": [], "metrics.jsonl": []}
    for path in (folder / name for name in records if (folder / name).exists()):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # half a line, of a run that was killed here
                records[path.name].append(json.loads(line))
        records[path.name] = [record for record in records[path.name] if record["step"] <= step]
        beside = path.with_suffix(".partial")
        beside.write_text("".join(json.dumps(record) + "\n" for record in records[path.name]))
        beside.replace(path)
    return records["metrics.jsonl"]


def write_json(path: Path, value: dict) -> None:
    if first_rank():
        path.write_text(json.dumps(value, indent=2) + "\n")


def append_lines(path: Path, records: list[dict]) -> None:
    """Add JSON lines in one flushed write; on a full disk the file keeps whole lines, and the run goes on."""
    if not first_rank():
        return
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, default=str) + "\n" for record in records))
    except OSError as error:
        warn(f"{path} can't be written ({error}); training goes on, these lines are lost")
        with suppress(OSError):
            os.truncate(path, size)


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_folder(
    policy: Policy, folder: Path, state: dict | None = None, evaluation: dict | None = None
) -> None:
    """A complete Hugging Face folder, which `from_pretrained` and vLLM open, with a checkpoint's state in it,
    or the evaluation that made it the best.

    It appears whole or not at all: written beside, synced, renamed. One that it replaces is renamed first;
    where a run is killed before the second name is given, `open_folder` gives the old one its name back.
    """
    if not first_rank():
        return
    partial, old = folder.parent / ".partial", folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    try:
        policy.model.save_pretrained(partial)
        policy.tokenizer.save_pretrained(partial)
        if state is not None:
            (partial / STATE).parent.mkdir()
            torch.save(state, partial / STATE)
        if evaluation is not None:
            write_json(partial / EVALUATION, evaluation)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        if folder.exists():  # an earlier `best`, or `final` of a run that is resumed after its end
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder; renamed first, so that one half deleted is never taken for a whole one."""
    old = folder.parent / ".checkpoint.old"
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
    shutil.rmtree(folder.rename(old))


def step_of(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if step_of(p).isdigit() and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(step_of(p)))


def save_checkpoint(policy: Policy, state: dict, folder: Path, keep: int) -> None:
    """`checkpoint-<step>`; then all but the newest `keep` are removed.

    A failure (full disk, no permission) only warns: older checkpoints stay.
    """
    checkpoint = folder / f"checkpoint-{state['step']}"
    if checkpoint.exists() or not first_rank():
        return
    try:
        if keep:
            make_room(folder, sum(map(bytes_in, checkpoints(folder)[-1:])))
        save_folder(policy, checkpoint, state)
        for old in checkpoints(folder)[:-keep] if keep else []:
            remove(old)
    except SAVE_ERRORS as error:
        warn(f"{checkpoint.name} could not be saved ({textwrap.shorten(str(error), 200)}); older ones stay")


def save_final(policy: Policy, folder: Path) -> None:
    """The run's `final/`, for which older checkpoints make room; InputError, with what can be done about it,
    where it can't be written."""
    try:
        make_room(folder, sum(p.nbytes for p in policy.model.parameters()))
        save_folder(policy, folder / "final")
    except SAVE_ERRORS as error:
        advice = f"make room, then --resume {folder}" if checkpoints(folder) else "nothing could be saved"
        raise InputError(f"{folder / 'final'} can't be written ({error}); {advice}") from error


def best_evaluation(folder: Path) -> dict:
    """The evaluation of the model in a run's `best/`, or one that any other beats. Of several ranks the first
    one looks: the others might do so while it replaces the folder."""
    path = folder / "best" / EVALUATION
    return json.loads(path.read_text()) if first_rank() and path.is_file() else {"accuracy": -1.0, "step": 0}


def save_best(policy: Policy, folder: Path, evaluation: dict) -> dict:
    """`best/`, when this evaluation's accuracy is above that of the model there; returns the better
    evaluation, of two alike the earlier. A failure only warns."""
    best = best_evaluation(folder)
    if evaluation["accuracy"] <= best["accuracy"]:
        return best
    try:
        save_folder(policy, folder / "best", evaluation=evaluation)
    except SAVE_ERRORS as error:
        warn(f"best/ could not be saved ({textwrap.shorten(str(error), 200)}); training goes on")
    return evaluation


def load_state(checkpoint: Path) -> dict:
    """A checkpoint's trainer state: numbers, text and tensors, so a stranger's file runs no code."""
    try:
        state = torch.load(checkpoint / STATE, weights_only=True, map_location="cpu", mmap=True)
        missing = {"config", "limits", "step"} - set(state)
    except Exception as error:  # a damaged file can break the reader anywhere
        raise InputError(f"--resume: {checkpoint / STATE} can't be read ("
                         f"{textwrap.shorten(str(error), 200)}); use another checkpoint") from error
    if missing:
        raise InputError(f"--resume: {checkpoint / STATE} is not the state of a run, it has no "
                         f"{' and no '.join(sorted(missing))}; use another checkpoint")
    return state


def fingerprints(examples: list[dict], heldout: list[dict], files: list[str]) -> dict[str, str]:
    """A hash of each thing from outside that a run depends on, under what a person calls it."""
    found = {what: json.dumps(x, sort_keys=True, default=str).encode()
             for what, x in {"the examples to train on": examples, "the held-out examples": heldout}.items()}
    found |= {name: Path(name).read_bytes() for name in files}
    return {what: hashlib.sha256(x).hexdigest() for what, x in found.items()}


def settings_of_run(model: str) -> dict:
    """Task, prompts and rewards of the run that a model's folder lies in; {} if it lies in none."""
    path = Path(model).absolute().parent / "config.json"
    try:
        saved = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is not the settings of a run ({error}); mend it, or give --recipe"
                         ) from error
    if not (isinstance(saved, dict) and "recipe" in saved):  # another program's
        return {}
    names = ("recipe", "seed", "task", "dataset", "prompt_format", "reward", "max_new_tokens",
             "temperature", "eval_examples")
    return {name: saved[name] for name in names if name in saved}


def find_checkpoint(resume: str, output_dir: str, name: str | None = None) -> Path | None:
    """The checkpoint that --resume means (`latest`: of the run `name`, or of all); InputError if there is
    none, but None for `latest` of a named run: it starts, and whoever restarts it needs no other command."""
    place = Path(resume)
    if resume == "latest":
        runs = [Path(output_dir, name)] if name else Path(output_dir).glob("*")
        found = [c for run in runs for c in checkpoints(run)[-1:]]
    else:
        found = [place] if (place / STATE).is_file() else checkpoints(place)[-1:]
    if not found and resume == "latest" and name:
        return None
    if not found:
        raise InputError(f"--resume {resume}: no whole checkpoint there; give a checkpoint-N folder, the "
                         f"folder of a run that has one, or `latest` for the newest below {output_dir}")
    newest = max(found, key=lambda checkpoint: checkpoint.stat().st_mtime)
    return Path(os.path.abspath(newest))  # of `.` too, the parent is the run's folder


def sample_records(step: int, episodes: list, groups: int = 2) -> list[dict]:
    """What samples.jsonl keeps of a step: the first few prompts with all their completions."""
    return [
        {"step": step, "example": {k: v for k, v in e.example.items() if k != "prompt_ids"},
         "completion": e.text, "reward": e.reward, "parts": e.parts, "advantage": e.advantage,
         "finished": e.completion.finished}
        for e in episodes if e.group < groups
    ]


def draw_curves(metrics: list[dict], evaluations: list[dict], path: Path) -> None:
    """Reward and its parts, accuracy, completion length and entropy by step: raw values under a mean."""
    if not first_rank():
        return
    from matplotlib.figure import Figure  # draws without a display

    rewards = [name for name in metrics[0] if name.partition("/")[0] == "reward"]  # the sum, then its parts
    panels = [("reward", rewards), ("accuracy", ["accuracy"]),
              ("completion length (tokens)", ["completion_length"]), ("entropy (nats a token)", ["entropy"])]
    steps = [m["step"] for m in metrics]
    window = max(1, len(steps) // 20)
    figure = Figure(figsize=(10, 6.5))
    figure.subplots_adjust(0.06, 0.08, 0.99, 0.95, wspace=0.18, hspace=0.3)
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, panels):
        for i, name in enumerate(names):
            values = [m[name] for m in metrics]
            means = [sum(values[max(0, j - window) : j]) / min(j, window) for j in range(1, len(values) + 1)]
            axis.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=1)
            axis.plot(steps, means, color=f"C{i}", linewidth=2, label=name.removeprefix("reward/"))
        if title == "accuracy":
            axis.plot([e["step"] for e in evaluations], [e["accuracy"] for e in evaluations], "ko-",
                      markersize=5, linewidth=1, label="held-out, greedy")
        axis.set_title(title, fontsize=13)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(fontsize=9)
    try:
        beside = path.with_suffix(".partial.png")
        figure.savefig(beside, dpi=110)
        beside.replace(path)
    except OSError as error:
        warn(f"{path} can't be drawn ({error})")


SERVICES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def import_service(service: str):
    """The module of an optional package that --report-to names; InputError where it is missing."""
    try:
        return importlib.import_module(SERVICES[service])
    except ImportError as error:
        raise InputError(f"--report-to {service}: can't be imported ({error}); pip install {service}, or "
                         "drop it") from error


class Dashboard:
    """The numbers of metrics.jsonl and a few samples, sent elsewhere too (`service` "none": nowhere).

    A resumed run goes on in the same run there, after `step`; wandb keeps what it has of later steps. A
    service that fails is warned of once, and training goes on.
    """

    def __init__(self, service: str, folder: Path, config: dict, step: int):
        self.service, self.run, self.failed = service, None, False
        if service != "none" and first_rank():
            self.module, name = import_service(service), re.sub(r"[^\w.-]", "-", folder.absolute().name)
            folder.mkdir(parents=True, exist_ok=True)
            self._attempt(lambda: self._open(folder, name, config, step))

    def _open(self, folder: Path, name: str, config: dict, step: int) -> None:
        if self.service == "tensorboard":
            self.run = self.module.SummaryWriter(folder / "tensorboard", purge_step=step + 1)
            self.run.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", step)
        else:
            more = {}
            if self.service == "wandb":  # which keeps a run's files in wandb/run-TIME-ID
                ids = [x.name.rsplit("-", 1)[1] for x in folder.glob("wandb/*run-*-*")]
                more = {"id": ids[-1] if ids else None, "dir": str(folder)}
            self.run = self.module.init(project="grpo_scratch", name=name, config=config, resume="allow",
                                        **more)

    def _attempt(self, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:  # noqa: BLE001  each service has its own
            if not self.failed:
                warn(f"--report-to {self.service} failed ({type(error).__name__}: "
                     f"{textwrap.shorten(str(error), 200)}); training goes on")
            self.failed = True

    def log(self, record: dict, samples: Iterable[dict] = (), prefix: str = "") -> None:
        """Send a record's numbers under their names, after `prefix`, and samples' rewards and texts."""
        numbers = {prefix + k: x for k, x in record.items() if isinstance(x, (int, float)) and k != "step"}
        text = "\n\n".join(f"reward {x['reward']:.3f}\n{x['completion']}" for x in samples)
        if self.run is not None:
            self._attempt(lambda: self._send(record["step"], numbers, text))

    def _send(self, step: int, numbers: dict[str, float], text: str) -> None:
        markdown = textwrap.indent(text, "    ")  # code, so that tags are shown
        if self.service == "tensorboard":
            for name, x in numbers.items():
                self.run.add_scalar(name, x, step)
            if text:
                self.run.add_text("samples", markdown, step)
            self.run.flush()
        else:
            shown = (self.module.Html(f"<pre>{html.escape(text)}</pre>") if self.service == "wandb"
                     else self.module.Markdown(markdown))
            self.run.log(numbers | ({"samples": shown} if text else {}), step=step)

    def close(self) -> None:
        if self.run is not None:
            self._attempt(self.run.close if self.service == "tensorboard" else self.run.finish)


# ---- What a person sees ------------------------------------------------------------------------------------


def say(message: str = "", file=None, from_all: bool = False) -> None:
    """A line for people, past the bars. A reader that has gone (Ctrl-C ends `| tee` too) ends no run. Of
    several ranks the first one talks, or all."""
    if not (first_rank() or from_all):
        return
    file = file or sys.stdout
    if file is None or file.closed:  # closed outright, as by `>&-`
        return
    encoding = getattr(file, "encoding", None) or "utf-8"  # which may lack some of an answer's letters
    try:
        tqdm.write(message.encode(encoding, "backslashreplace").decode(encoding), file=file)
        file.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    except OSError:
        pass  # a log on a full disk; later lines may fit again


def has_terminal() -> bool:
    """Whether bars can be shown, by this rank."""
    return first_rank() and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def warn(message: str) -> None:
    say(f"warning: {message}", sys.stderr)


def show_step(bar: tqdm, record: dict, steps: int) -> None:
    """On a terminal the bar's numbers, elsewhere (a log file) a plain line."""
    shown = {"reward": f"{record['reward']:.3f}", "accuracy": f"{record['accuracy']:.3f}",
             "length": f"{record['completion_length']:.1f}"}
    bar.set_postfix(shown)
    if bar.disable:
        say(f"step {record['step']}/{steps} {' '.join(f'{k} {v}' for k, v in shown.items())} "
            f"{record['seconds']:.2f} s" + (f" ({record['skipped']})" if record["skipped"] else ""))
    if record["bad_updates"]:
        warn(f"step {record['step']}: loss, gradient or probabilities are not finite; that update changed "
             "no weight")


def side_by_side(before: list, after: list) -> str:
    """The shown held-out examples with the greedy answers before and after training, in two columns."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 140) // 2 - 2
    lines = []
    for (request, *old), (_, *new) in zip(before, after):
        columns = []
        for when, (answer, is_solved) in (("before", old), ("after", new)):
            wrapped = [part for line in answer.splitlines() for part in textwrap.wrap(line, width) or [""]]
            columns.append([f"{when} ({'solved' if is_solved else 'not solved'})", *wrapped[:20]])
        lines += ["", *textwrap.wrap(request, 2 * width)]
        lines += [f"  {a:<{width}}| {b}" for a, b in itertools.zip_longest(*columns, fillvalue="")]
    return "\n".join(lines)


def report(summary: dict, eval_samples: int, folder: Path) -> str:
    """The table of accuracy before and after, and where the files are."""
    rows = {"held-out accuracy (greedy)": (summary["accuracy_before"], summary["accuracy_after"]),
            f"held-out pass@{eval_samples}": (summary["pass_at_k_before"], summary["pass_at_k_after"])}
    lines = ["", f"{'':<28}{'before':>8}{'after':>8}"]
    for name, (before, after) in rows.items():
        if None not in (before, after):  # pass@k is asked for, and may be from a resumed run's end on
            lines.append(f"{name:<28}{before:>8.3f}{after:>8.3f}")
    best = f"best/ (held-out accuracy {summary['best']['accuracy']:.3f}, step {summary['best']['step']})"
    lines += ["", f"{summary['steps']} steps, {summary['seconds']:.0f} s in this process. Look at:"]
    names = ("curves.png", "samples.jsonl", "final/", best)
    return "\n".join(lines + [f"  {folder}/{name}" for name in names])


def warn_of_trouble(metrics: list[dict], warned: set[str], patience: int = 20) -> None:
    """One plain warning for each kind of run that has stopped learning, with what usually helps."""
    last = metrics[-patience:]
    if len(last) < patience:
        return
    all_cut = all(m["truncated_fraction"] == 1 for m in last)
    no_spread = all(m["groups_without_spread"] == 1 for m in last) and not all_cut
    all_alike = all(m["entropy"] < 1e-3 for m in last) and not all_cut
    troubles = {
        "every answer has hit the length limit for 20 steps; a longer --max-new-tokens, or "
        "--cold-start-steps to teach the form of an answer, usually help": all_cut,
        "rewards have had no spread within any group for 20 steps; nothing is learned. Easier examples, a "
        "larger --group-size or --temperature, or a reward with more steps in it usually help": no_spread,
        "the entropy is nearly zero: all answers to a prompt are the same. A lower --learning-rate, a --beta "
        "above 0 or a higher --temperature, from the start, usually help": all_alike,
    }
    for message, is_so in troubles.items():
        if is_so and message not in warned:
            warned.add(message)
            warn(message)
