"""Rewards: the text of an answer and its example go in, a score comes out.

Training finds the weak spots of a reward. So no text makes a built-in reward raise, run code, or take more
than linear time. The text begins with `example["opened"]`, the tag that the prompt left open. Left out on
purpose: partial credit for answers that are nearly right.

    rewards = load_rewards(["countdown_format:0.1", "countdown_equation", "my_rewards.py:brevity:0.5"])
    [(total, parts)] = score_batch(rewards, ["Make 6."], [completion], [{"nums": [2, 3], "target": 6}])
"""

import ast
import asyncio
import functools
import importlib.machinery
import inspect
import math
import pkgutil
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from operator import add, mul, neg, pos, sub, truediv
from pathlib import Path

# ---- Countdown: reach a target with given numbers ----------------------------------------------------------

OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.UAdd: pos, ast.USub: neg}


def countdown_format(completion: str, example: dict) -> float:
    r"""1.0 for `<think>…</think>\n<answer>…</answer>` and nothing around it, else 0.1 for think tags, 0.5 for
    answer tags. Without `example["opened"]` it begins with `<think>`. Source: GRPO-Zero, Improved-GRPO."""
    text = example.get("opened", "<think>") + completion
    if text.startswith("<think>") and text.partition("</think>\n<answer>")[2].endswith("</answer>"):
        return 1.0
    thought, answer = (text.partition(tag)[2] for tag in ("<think>", "<answer>"))
    return 0.1 * ("</think>" in thought) + 0.5 * ("</answer>" in answer)


def countdown_strict_format(completion: str, example: dict) -> float:
    r"""1.0 or 0.5 for `<think>…</think>\n<answer>…</answer>` without think tags in the reasoning, else 0.0.
    The answer ends at the last `</answer>`. It earns 1.0 if it holds only digits, `+-*/().` and white space,
    and isn't blank. The text begins as in `countdown_format`. Source: nano-aha-moment."""
    text = example.get("opened", "<think>") + completion
    match = re.fullmatch(r"<think>(?:(?!</?think>).)*</think>\n<answer>(.*)</answer>", text, re.DOTALL)
    if not match:
        return 0.0
    return 1.0 if re.fullmatch(r"[0-9+\-*/().\s]+", match[1].strip()) else 0.5


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if not isinstance(node, ast.UnaryOp | ast.BinOp) or type(node.op) not in OPERATORS:
        raise ValueError(f"{type(node).__name__} is not plain arithmetic")
    operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
    return OPERATORS[type(node.op)](*map(_value, operands))


def arithmetic_value(expression: str) -> Fraction:
    """Exact value of digits, `+ - * / ( )` and spaces: arithmetic_value("8/(3-8/3)") == 24. Runs no code.
    Raises ValueError for anything else, such as `**`, `//`, 007 or 1/0, and for more than 200 characters."""
    # [0-9], because \d also matches other scripts' digits. Without `**`, 200 characters keep the value short.
    if not re.fullmatch(r"[0-9+\-*/() ]{1,200}", expression):
        raise ValueError("not a short expression of digits, + - * / ( ) and spaces")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        # Python's parser raises the last two for deep nesting, at a depth that differs between versions.
        raise ValueError(f"no value: {type(error).__name__}") from error


def countdown_equation(completion: str, example: dict) -> float:
    """1.0 if the first `<answer>…</answer>` uses each of `nums` exactly once and equals `target`, else 0.0.
    The answer may hold digits, `+ - * / ( )` and spaces. Its exact value must be within 1e-5 of the target.
    Source: GRPO-Zero, Improved-GRPO and nano-aha-moment. They `eval` the answer: `99**98**97` hangs them."""
    # re.search("<answer>(.*?)</answer>") would find the same, but in quadratic time where no tag is closed.
    text = example.get("opened", "") + completion
    answer, closing, _ = text.partition("<answer>")[2].partition("</answer>")
    try:
        value = arithmetic_value(answer if closing else "")
    except ValueError:
        return 0.0
    used = sorted(int(digits) for digits in re.findall("[0-9]+", answer))
    hit = abs(value - exact_number(example["target"])) < Fraction(1, 100_000)
    return 1.0 if used == sorted(map(exact_number, example["nums"])) and hit else 0.0


# ---- GSM8K: school maths; example["answer"] is the right number, of any type -------------------------------

NUMBER = re.compile(r"[-+]?([0-9]*|[1-9][0-9]{0,2}(,[0-9]{3})+)(\.[0-9]*|/0*[1-9][0-9]*)?(e[-+]?[0-9]{1,3})?")


def exact_number(value: object) -> Fraction:
    """The value of a number as it is written: 7, 0.1, Decimal("0.10"), "-$1,000", "1/2"; "50%" is 50.
    Raises ValueError for anything else, such as "7/0" or "0,5", and for more than 100 characters."""
    text = re.sub("[%$€£¥₹₩₽]", "", str(value)).strip().lower().replace("\u2212", "-")
    if not 0 < len(text) <= 100 or not NUMBER.fullmatch(text):  # Python is slow to read a long number
        raise ValueError(f"{value!r:.150} is no number")
    return Fraction(text.replace(",", ""))


def _same_number(number: str, answer: object) -> bool:
    try:
        return exact_number(number) == exact_number(answer)
    except ValueError:
        return False


def gsm8k_last_number(completion: str, example: dict) -> float:
    """+1.0 if the last number in the completion equals the answer by value, else -1.0. A number is `12`,
    `1.5` or `3/4`; "1,234" ends in the number 234. The sign before a number counts only if the answer is
    negative. Source: simple_GRPO, with exact fractions in place of math_verify."""
    gold = exact_number(example["answer"])
    numbers = re.findall(r"([-\u2212]?)\$?([0-9]+(?:[./][0-9]+)?)", completion)
    sign, number = numbers[-1] if numbers else ("", "none")
    return 1.0 if _same_number(number, -gold if sign and gold < 0 else gold) else -1.0


def gsm8k_signed_format(completion: str, example: dict) -> float:
    """+1.25 for `<think>…</think>`, newlines or spaces, `<answer>…</answer>`, nothing around it; else -1.0.
    Each of the four tags must occur exactly once. Source: simple_GRPO."""
    text = example.get("opened", "") + completion
    # Each tag occurs once, so that each .* can end in one place: the match takes linear time.
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    match = once and re.fullmatch("<think>.*</think>[\n ]*<answer>.*</answer>", text, re.DOTALL)
    return 1.25 if match else -1.0


def gsm8k_answer(completion: str, example: dict) -> float:
    """2.0 if the last answer is the right answer's text, 1.5 if it holds one number of that value, else 0.0.
    The last answer lies between the last `<answer>` and the next `</answer>`. The right one may be words. A
    number is `12`, `-3`, `1.5` or `.5`: "$18" holds one, "1,234" and "1/2" hold two. Source: The LM Book."""
    gold = example["answer"]
    if gold is None or not str(gold).strip():
        raise ValueError(f"{gold!r} is no answer")
    _, opening, rest = (example.get("opened", "") + completion).rpartition("<answer>")
    answer, closing, _ = rest.partition("</answer>")
    if not opening or not closing:
        return 0.0
    if answer.strip() == str(gold).strip():
        return 2.0
    numbers = re.findall(r"[-\u2212]?\$?[0-9]*\.?[0-9]+", answer)
    return 1.5 if len(numbers) == 1 and _same_number(numbers[0], gold) else 0.0


def reasoning_tags(completion: str, example: dict) -> float:
    """0.2 for each of the four tags that occurs, once or often, in any order. Source: The LM Book."""
    text = example.get("opened", "") + completion
    found = sum(tag in text for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
    return found / 5  # three times 0.2 would be 0.6000000000000001


# ---- Scoring -----------------------------------------------------------------------------------------------

REWARDS: dict[str, Callable[[str, dict], float]] = {reward.__name__: reward for reward in (
    countdown_format, countdown_strict_format, countdown_equation, gsm8k_last_number, gsm8k_signed_format,
    gsm8k_answer, reasoning_tags)}
event_loop = functools.cache(asyncio.new_event_loop)  # one for all calls: connections are bound to their loop


class RewardError(ValueError):
    """A reward can't be loaded, doesn't suit a row, or fails. The message is one line."""


def score_batch(
    rewards: dict[str, tuple[Callable, float]], prompts: list[str | list[dict]], completions: list[str],
    examples: list[dict], completion_ids: list[list[int]] | None = None,
) -> list[tuple[float, dict[str, float | None]]]:
    """For each answer the weighted sum of the rewards, and each reward's own score, unweighted, in order. The
    names of a function's parameters tell how it is called:
    - (completion, example) -> float: once for each answer, with the text as it was sampled.
    - with `completions` or `completion_ids`, as in TRL: once for all answers. It gets the lists that it names
      of `prompts`, `completions`, `completion_ids` and the examples' columns. It returns a number or None for
      each answer; None adds nothing. If a prompt is a list of messages, the completion is a list of one
      message, which begins with what the prompt opened of the assistant's turn.
    Async functions are awaited. Raises RewardError, which names the function and its row, if one fails."""
    parts = {}
    for name, (reward, _) in rewards.items() if completions else ():
        scores = parts[name] = []
        try:
            parameters = inspect.signature(reward).parameters
            batched = bool(parameters.keys() & {"completions", "completion_ids"})
            others = {"prompt", "example"}, {"completion", *examples[0]} - {"example"}
            if wrong := [x for x, names in zip(parameters, others) if x in names and not batched]:
                raise RewardError(f"has a parameter {wrong[0]!r} where it gets another value")
            if batched:
                results = _awaited(_batch(reward, parameters, prompts, completions, examples, completion_ids))
            else:
                results = (_awaited(reward(*answer)) for answer in zip(completions, examples))
            for result in [results] if isinstance(results, dict | set) else results:  # text has no __float__
                if not (hasattr(result, "__float__") and math.isfinite(result) or batched and result is None):
                    raise RewardError(f"returned {result!r:.150}, not a finite number")
                scores.append(None if result is None else float(result))
            if len(scores) != len(completions):
                raise RewardError(f"returned {len(scores)} scores for {len(completions)} answers")
        except (Exception, SystemExit) as error:
            problem = error if isinstance(error, RewardError) else f"raised {error!r:.150}"
            i = min(len(scores), len(completions) - 1)
            row = getattr(examples[i], "where", "") or f"example {i + 1}"
            raise RewardError(
                f"reward {name!r} {problem}; {row}; columns: {', '.join(examples[i])}; "
                f"{'answer' if scores else 'first answer'}: {completions[i]!r:.150}; a reward is "
                "(completion, example) -> float or (completions, **columns) -> list[float]") from error
    rows = [{name: scores[i] for name, scores in parts.items()} for i in range(len(completions))]
    return [(sum((rewards[x][1] * (row[x] or 0.0) for x in row), 0.0), row) for row in rows]


def _awaited(x: object) -> object:
    """What an async function returns. It runs in a thread, because a notebook runs a loop in this one."""
    if inspect.isawaitable(x):
        x = ThreadPoolExecutor(1).submit(event_loop().run_until_complete, x).result()
    return x


def _batch(reward, parameters, prompts, completions, examples, completion_ids) -> object:
    """Call a function once for all answers, with those keyword arguments that it takes."""
    prompts, completions = list(prompts), list(completions)
    for i, (prompt, example) in enumerate(zip(prompts, examples)):
        if not isinstance(prompt, str):
            opened, is_open = example.get("opened", ""), prompt[-1]["role"] == "assistant"
            turn = prompt[-1]["content"] if is_open else ""
            turn = turn if turn.rstrip().endswith(opened) else opened + turn
            prompts[i] = prompt[: len(prompt) - is_open]
            completions[i] = [{"role": "assistant", "content": turn + completions[i]}]
    names = set().union(*examples) - {"prompt", "prompt_ids", "opened", "completion"}
    columns = {x: [example.get(x) for example in examples] for x in names}
    columns |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    takes_all = any(x.kind is x.VAR_KEYWORD for x in parameters.values())
    return reward(**{x: columns[x] for x in columns if columns[x] and (takes_all or x in parameters)})


def check_rows(rewards: dict[str, tuple[Callable, float]], examples: list[dict]) -> None:
    """Raise RewardError, which names the row (`where`), if a built-in reward can't read its right answer."""
    ours = {name: rewards[name] for name in rewards if name in REWARDS}
    score_batch(ours, [""] * len(examples), ["<answer>1</answer>"] * len(examples), examples)


# ---- Rewards of your own -----------------------------------------------------------------------------------

# A name, file or module; a function; a weight. A file ends in .py, and a drive's colon belongs to it.
SPEC = re.compile(r"(.+?\.py|[^:]+)(?::([^\W\d]\w*))?(?::(-?[0-9]*\.?[0-9]+(?:e-?[0-9]{1,2})?))?")


def load_rewards(specs: list[str], warn: Callable[[str], None] = print) -> dict[str, tuple[Callable, float]]:
    """The functions and weights of NAME, FILE.py:FUNCTION or package.module:FUNCTION, with :WEIGHT or not.
    Their names are NAME, "file.function" and "package.module.function". A file runs once in a process.
    Python searches its folder (for a module the current one) for what it imports: first while it is loaded,
    last from then on. `warn` is told if another process may import another file. Raises RewardError."""
    rewards = {}
    for spec in specs:
        match = SPEC.fullmatch(spec)
        source, function, weight = match.groups() if match else (spec, None, None)
        if (source in REWARDS) == bool(function):
            raise RewardError(f"{spec!r} is no reward; type one of {', '.join(REWARDS)}, path/to/file.py:"
                              "function or package.module:function; a weight is a finite number, as :0.5")
        name, reward = _load(source, function, warn) if function else (source, REWARDS[source])
        if name in rewards and rewards[name][0] is not reward:  # two files of one name
            name = f"{Path(source).resolve().with_suffix('')}.{function}"
        if name in rewards:
            raise RewardError(f"reward {name!r} is given twice; drop {spec!r}, or its first mention")
        rewards[name] = reward, float(weight or 1)
    return rewards


def _load(source: str, function: str, warn: Callable) -> tuple[str, Callable]:
    file, is_file = Path(source).resolve(), source.endswith(".py")
    if is_file and ("." in file.stem or not file.is_file()):
        raise RewardError(f"no file {source!r} in {Path.cwd()}, or Python can't import it, for a dot in its "
                          "name; type where it is: path/to/file.py:function")
    name, folder = (file.stem, str(file.parent)) if is_file else (source, str(Path.cwd()))
    find = importlib.machinery.PathFinder.find_spec
    importlib.invalidate_caches()
    own = {x.name: find(x.name, [folder]) for x in pkgutil.iter_modules([folder])
           if x.name not in sys.builtin_module_names}
    hidden = {x: sys.modules.pop(x) for x in own if x in sys.modules and sys.modules[x].__spec__ != own[x]}
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise RewardError(f"{source!r} fails with {error!r:.300}; run it alone to see where") from error
    finally:
        sys.path.remove(folder)
        sys.path.extend({folder} - set(sys.path))
        others = [x for x in own if x in sys.modules and find(x) != own[x]]  # a new process finds these
        sys.modules.update(hidden)
    if not hasattr(module, function):
        functions = [f"{source}:{x}" for x, value in vars(module).items()
                     if inspect.isfunction(value) and str(value.__module__).startswith(name)]
        raise RewardError(f"{module} has no {function!r}; functions: {', '.join(functions[:20]) or 'none'}")
    if others:
        warn(f"{source}: rename {', '.join(others)}, or processes that it starts may import other files")
    return f"{name}.{function}", getattr(module, function)
