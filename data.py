"""Where prompts come from: tasks and their prompt formats, local files, hub data sets, the embedded policy.

An example is a plain dict: `prompt` (text, used as it stands, or a list of chat messages, put through the
tokenizer's chat template) beside the columns that its reward reads (`nums` and `target`, or `answer`, or
whatever a file brings) and, where supervised demonstrations are wanted, `completion`.

    train, heldout = load_task("countdown", train_examples=1000, eval_examples=100, seed=0)
    ids = encode_prompt(tokenizer, train[0]["prompt"])

Left out on purpose: streaming (a GRPO run reads a few thousand prompts) and mixing several tasks in one run.
"""

import itertools
import json
import operator
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import huggingface_hub
import jinja2
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MINI_LARGEST = 30  # largest number of a mini-countdown problem; the embedded policy's tokenizer knows it too


class InputError(ValueError):
    """What the user gave can't be used; the message says what was given, what is allowed, what to type."""


def cannot_load(what: str, error: Exception) -> InputError:
    """The error to raise for one of those that datasets, transformers, the hub and the network each have."""
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return InputError(f"{what}: can't be loaded ({type(error).__name__}: {reason}); check the files in a "
                      "local folder, or the id and the network for the hub")


# ---- Prompt formats: example -> text, or messages; a last one from the assistant is a turn left open -------


def countdown_prompt(example: dict) -> list[dict]:
    """Countdown as nano-aha-moment, GRPO-Zero and Improved-GRPO pose it; ends inside an open `<think>`."""
    numbers = ", ".join(map(str, example["nums"]))
    return [
        {"role": "system", "content": "You are a careful assistant. You reason in your head before you give "
         "the user the answer."},
        {"role": "user", "content": f"Combine the numbers {numbers} into an equation that equals "
         f"{example['target']}. You may use +, -, *, / and parentheses, and must use each number exactly "
         "once. Write your reasoning inside <think> </think> tags and then the equation alone inside "
         "<answer> </answer> tags, for example <answer>(1 + 2) / 3</answer>."},
        {"role": "assistant", "content": "I will work through this step by step.\n<think>"},
    ]


def mini_countdown_prompt(example: dict) -> list[dict]:
    """The countdown prompt in the few words that the embedded policy knows."""
    numbers = " ".join(map(str, example["nums"]))
    return [
        {"role": "user", "content": f"numbers {numbers} target {example['target']}"},
        {"role": "assistant", "content": "<think>"},
    ]


def gsm8k_prompt(example: dict) -> list[dict]:
    """The gsm8k prompt of simple_GRPO: the model itself opens and closes both tags."""
    return [
        {"role": "system", "content": "You help the user with a question. First think the steps through, "
         "then give the final answer. Put the thinking inside <think> </think> tags and the answer inside "
         "<answer> </answer> tags, like this: <think> your steps </think><answer> the answer </answer>."},
        {"role": "user", "content": example["question"]},
    ]


def gsm8k_reasoning_prompt(example: dict) -> str:
    """The gsm8k prompt of The LM Book: plain text without a chat template, other tags."""
    return (
        "Reply in exactly this form:\n<reasoning>\nyour steps\n</reasoning>\n"
        "<answer>\nthe final number\n</answer>\n"
        + example["question"]
    )


PROMPTS: dict[str, Callable[[dict], str | list[dict]]] = {
    "countdown": countdown_prompt,
    "mini-countdown": mini_countdown_prompt,
    "gsm8k": gsm8k_prompt,
    "gsm8k-reasoning": gsm8k_reasoning_prompt,
}


def encode_prompt(tokenizer, prompt: str | list[dict], answered: bool = False) -> list[int]:
    """Token ids of one prompt: plain text as it stands, chat messages through the tokenizer's chat template.

    A last message from the assistant stays open, so that the completion continues it; otherwise the template
    opens a new assistant turn. With `answered` the messages are a whole conversation, and nothing is opened.
    A tokenizer without a template gets the messages' texts, one a line.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(message["content"] for message in prompt)).input_ids
    is_open = prompt[-1]["role"] == "assistant" and not answered
    try:
        text = tokenizer.apply_chat_template(
            prompt, tokenize=False, continue_final_message=is_open,
            add_generation_prompt=not is_open and not answered,
        )
    except (jinja2.TemplateError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"the model's chat template refuses the messages {str(prompt)[:80]!r} ({reason}); "
                         "leave out the role it doesn't know, or give prompts as text") from error
    return tokenizer(text, add_special_tokens=False).input_ids  # the template wrote the special ones


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


def countdown_demonstration(example: dict, rng: random.Random) -> str:
    """A completion in the right format with right arithmetic and a blind choice of expression.

    Which expression hits the target is what GRPO has to teach. With two numbers the reasoning starts with how
    the target compares with the first one. Plus is chosen twice as often as the others, so that before GRPO
    the greedy answer is plus to every problem, and not an accident of the seed.
    """
    nums, target = example["nums"], example["target"]
    if len(nums) == 2:
        a, b = nums
        compared = f"{target} {'>' if target > a else '<' if target < a else '='} {a}, "
        sign = rng.choice("++-*")
        text, value = f"{a} {sign} {b}", APPLY[sign](a, b)
    else:
        compared = ""
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
    rng = random.Random(seed)
    pairs = list(itertools.combinations_with_replacement(range(1, MINI_LARGEST + 1), 2))
    rng.shuffle(pairs)
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
        columns = {"countdown": ["nums", "target"], "gsm8k": ["question", "answer"]}.get(task, ["prompt"])
        source = dataset or ("openai/gsm8k" if task == "gsm8k" else task)
        train, heldout = read_dataset(source, columns, eval_examples, seed)
        unit = "line" if source.endswith(".jsonl") else "row"
        train, heldout = [
            [prepare_row(row, task, f"{source}, {unit} {i}") for i, row in rows] for rows in (train, heldout)
        ]
    else:
        raise InputError(
            f"--task {task}: not a task; use countdown, gsm8k, mini-countdown, or a .jsonl, .json, .csv or "
            ".parquet file with a `prompt` column"
        )
    prompt_format = prompt_format or task
    if prompt_format in PROMPTS:
        for example in train + heldout:
            example["prompt"] = PROMPTS[prompt_format](example)
            if "reasoning" in example:  # gsm8k's solution, with the tags that its prompt asks for
                parts = {"reasoning" if prompt_format == "gsm8k-reasoning" else "think": example["reasoning"],
                         "answer": example["answer"]}
                example["completion"] = "\n".join(f"<{tag}>{x}</{tag}>" for tag, x in parts.items())
    key = countdown_key if task == "countdown" else lambda example: json.dumps(example["prompt"])
    held = {key(example) for example in heldout}
    train = [example for example in train if key(example) not in held]
    if not train:
        raise InputError(f"--task {task}: nothing is left to train on beside {len(heldout)} held-out "
                         "examples; lower --eval-examples or bring more data")
    random.Random(seed).shuffle(train)
    return train[:train_examples], heldout


def read_dataset(source: str, columns: list[str], eval_examples: int, seed: int) -> tuple[list, list]:
    """(train, held-out) of a file, a local folder or a hub data set, as lists of (row number from 1, row)."""
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        splits = {"train": read_jsonl(path)}
    else:
        splits = read_with_datasets(path, source)
    numbered = {name: list(enumerate(rows, start=1)) for name, rows in splits.items()}
    train = numbered.get("train") or next(iter(numbered.values()))
    if not train:
        raise InputError(f"{source}: holds no rows; each needs the column(s) {', '.join(columns)}")
    if missing := [column for column in columns if column not in train[0][1]]:
        raise InputError(f"{source}: has no column {missing[0]!r}, only {', '.join(train[0][1])}; "
                         "rename one of them")
    heldout = numbered.get("test") or train
    if len(heldout) < eval_examples:
        raise InputError(f"{source}: --eval-examples {eval_examples} can't be held out of {len(heldout)} "
                         "rows; lower it")
    return train, random.Random(seed).sample(heldout, eval_examples)  # load_task takes them out of train


def read_jsonl(path: Path) -> list[dict]:
    """One JSON object a line; read here rather than by `datasets`, which can't say which line is bad."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)  # as UTF-8
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error}); "
                                 "write one object a line") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not an object but {row!r:.60}; "
                                 "write {\"prompt\": ...}")
            rows.append(row)
    return rows


def read_with_datasets(path: Path, source: str) -> dict[str, list[dict]]:
    """Every split that `datasets.load_dataset` finds in a file, a local folder or on the hub."""
    import datasets  # a second of import that the embedded task needn't pay

    datasets.disable_progress_bars()
    if not path.exists() and (
        path.suffix in FILE_TYPES or source.count("/") != 1 or source.startswith((".", "~", "/"))
    ):
        raise InputError(f"{source}: no such file or folder; check the path, or give a hub id such as "
                         "openai/gsm8k")
    if path.is_file() and path.suffix not in FILE_TYPES:
        raise InputError(f"{source}: not one of the file types {', '.join(FILE_TYPES)}; convert it")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{source}: is empty")
    try:
        if path.is_file():
            splits = datasets.load_dataset(FILE_TYPES[path.suffix], data_files=source)
        elif path.is_dir():  # a clone of gsm8k keeps its configurations in folders; `main` is the wanted one
            splits = datasets.load_dataset(str(path / "main" if (path / "main").is_dir() else path))
        else:
            splits = datasets.load_dataset(source, "main" if source == "openai/gsm8k" else None)
        return {name: split.to_list() for name, split in splits.items()}
    except Exception as error:
        raise cannot_load(source, error) from error


def prepare_row(row: dict, task: str, where: str) -> dict:
    """The example made of one row, or an InputError that says where the bad row is."""
    if task == "countdown":
        nums, target = row.get("nums"), row.get("target")
        if not (isinstance(nums, list) and len(nums) > 1 and all(type(n) is int for n in [*nums, target])):
            raise InputError(f"{where}: nums must be a list of at least two whole numbers and target a "
                             f"whole number, not {nums!r} and {target!r}")
        return {"nums": nums, "target": target}
    if task == "gsm8k":
        question, solution = row.get("question"), row.get("answer")
        if not (isinstance(question, str) and isinstance(solution, str) and "####" in solution):
            raise InputError(f"{where}: question and answer must be text, the answer with its number after "
                             f"####, not {str(solution)[:60]!r}")
        reasoning, answer = solution.rsplit("####", 1)
        answer = answer.strip().replace(",", "")
        return {"question": question, "answer": answer, "reasoning": reasoning.strip()}
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt:
        return row
    messages = prompt if isinstance(prompt, list) else []
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str)
                               and isinstance(m.get("content"), str) for m in messages):
        raise InputError(f"{where}: prompt must be text or a list of {{\"role\", \"content\"}} messages, "
                         f"not {prompt!r:.80}")
    return row


def demonstration(example: dict, rng: random.Random) -> str:
    """A completion to imitate in the cold start: the example's own, or a blind countdown attempt."""
    if isinstance(example.get("completion"), str):
        return example["completion"]
    if "nums" in example and "target" in example:
        return countdown_demonstration(example, rng)
    raise InputError("--cold-start-steps: the task's rows have no text in a `completion` column to learn "
                     "from; add one, or drop the flag")


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
    words = [
        "numbers ", " target ", " + ", " - ", " * ", " = ", " < ", " > ", ", ",
        "<think>", "</think>", "\n<answer>", "</answer>",
    ]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    # Longer numbers are spelled in digits: how many says much about the operator that a target needs.
    numbers = [str(n) for n in range(10, MINI_LARGEST + 1)]
    tokenizer.add_tokens([AddedToken(number, normalized=False, single_word=True) for number in numbers])
    special = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_policy(
    seed: int, dtype: torch.dtype = torch.float32
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """A Qwen2 of a million random parameters and its tokenizer, made in memory: nothing to download."""
    tokenizer = tiny_tokenizer()
    config = transformers.Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=128, intermediate_size=768,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.08,  # with the usual 0.02 so small a model takes twice as long to learn its sums
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Made in its dtype: a later .to(bfloat16) would round the rotary frequencies too.
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), tokenizer


def load_policy(
    model: str, *, dtype: torch.dtype, device: str, seed: int = 0, trust_remote_code: bool = False
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The policy and its tokenizer: `embedded`, a local folder, or a hub id; InputError without it."""
    if model == "embedded":
        policy, tokenizer = tiny_policy(seed, dtype)
        return policy.to(device), tokenizer
    # The hub's client tells of each of its retries; the error below says all that they say.
    huggingface_hub.utils.logging.set_verbosity_error()
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"--model {model}: the folder has no config.json; give the folder that "
                         "from_pretrained opens")
    if not folder.is_dir() and (model.count("/") != 1 or model.startswith((".", "~", "/"))):
        raise InputError(f"--model {model}: no such folder, nor a hub id such as Qwen/Qwen2.5-0.5B-Instruct")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        policy = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa", trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise cannot_load(f"--model {model}", error) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {model}: its tokenizer has no end-of-sequence token, so no answer could "
                         "ever end")
    return policy.to(device).eval(), tokenizer


class RewardModel:
    """A sequence-classification model with one label; it scores answers and rests in host memory."""

    def __init__(self, name: str, *, dtype: torch.dtype, device: str, trust_remote_code: bool = False):
        """`name`: hub id or local folder. Raises InputError when it can't be had or has several labels."""
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
            self.model = transformers.AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, trust_remote_code=trust_remote_code
            ).eval()
        except Exception as error:
            raise cannot_load(f"--reward-model {name}", error) from error
        if self.model.config.num_labels != 1:
            raise InputError(f"--reward-model {name}: has {self.model.config.num_labels} labels; use one "
                             "with a single label")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.device = device

    @torch.no_grad()
    def scores(self, answers: list[tuple[str | list[dict], str]], batch_size: int = 16) -> list[float]:
        """One score for each (prompt, completion); chats go through the model's template, if it has one."""
        rows = [self._encode(prompt, completion) for prompt, completion in answers]
        found = []
        self.model.to(self.device)
        try:
            for i in range(0, len(rows), batch_size):
                batch = self.tokenizer.pad(
                    {"input_ids": rows[i : i + batch_size]}, padding_side="right", return_tensors="pt"
                )
                found += self.model(**batch.to(self.device)).logits[:, 0].float().tolist()
        finally:
            self.model.to("cpu")
        return found

    def _encode(self, prompt: str | list[dict], completion: str) -> list[int]:
        if isinstance(prompt, str):
            return encode_prompt(self.tokenizer, prompt + completion)
        if prompt[-1]["role"] == "assistant":  # the open turn is a part of the answer
            prompt, completion = prompt[:-1], prompt[-1]["content"] + completion
        messages = [*prompt, {"role": "assistant", "content": completion}]
        try:
            return encode_prompt(self.tokenizer, messages, answered=True)
        except InputError as error:
            raise InputError(f"--reward-model: {error}") from error
