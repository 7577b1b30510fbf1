"""Rewards: an answer's text and its example in, a score out.

A policy is paid for finding a reward's weaknesses. No text makes a built-in reward raise, run code, or take
more than linear time. Left out on purpose: partial credit for near misses.

    rewards = load_rewards(["countdown_format:0.1", "countdown_equation", "my_rewards.py:brevity:0.5"])
    [(total, parts)] = score_batch(rewards, ["Make 6."], [completion], [{"nums": [2, 3], "target": 6}])
"""

import ast
import asyncio
import difflib
import functools
import importlib
import inspect
import math
import operator
import re
import sys
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib.machinery import PathFinder
from pathlib import Path
from typing import SupportsFloat

# ---- Countdown: reach a target with given numbers ----------------------------------------------------------

# `\d` would also match Arabic-Indic and other Unicode digits, so digits are spelled [0-9] throughout.
ARITHMETIC = re.compile(r"[0-9+\-*/() ]*")
ARITHMETIC_OR_DECIMALS = re.compile(r"[0-9+\-*/().\s]+")

# Without `**`, an expression's length also bounds how deep it nests and how many digits its value can have.
MAX_EXPRESSION_CHARS = 200

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}


def countdown_format(completion: str, example: dict) -> float:
    r"""1.0 for `<think>…</think>\n<answer>…</answer>` and nothing around it, else 0.1 + 0.5 for pairs found.

    Tags may repeat inside: only how the text starts, turns and ends matters. A think pair is worth 0.1, an
    answer pair 0.5; a pair is an opening tag and a closing one anywhere after it. The text begins with the
    tag that the prompt has left open: `example["opened"]`, or `<think>` if that is missing.
    Source: GRPO-Zero and Improved-GRPO, whose `$` also forgives one newline at the very end.
    """
    text = example.get("opened", "<think>") + completion
    thought = text.partition("<think>")[2]
    _, turn, rest = thought.partition("</think>\n<answer>")
    if text.startswith("<think>") and turn and rest.endswith("</answer>"):
        return 1.0
    return 0.1 * ("</think>" in thought) + 0.5 * ("</answer>" in text.partition("<answer>")[2])


def countdown_strict_format(completion: str, example: dict) -> float:
    r"""1.0 or 0.5 for `<think>…</think>\n<answer>…</answer>` without think tags in the reasoning, else 0.0.

    1.0 if the answer, which reaches to the final `</answer>`, holds only digits, `+-*/().` and white space,
    and isn't blank; otherwise 0.5. The text begins as in `countdown_format`.
    Source: nano-aha-moment, whose `$` also forgives one newline at the very end.
    """
    text = example.get("opened", "<think>") + completion
    reasoning, turn, rest = text.partition("</think>\n<answer>")
    once = reasoning.count("<think>") == 1 and "</think>" not in reasoning
    if not reasoning.startswith("<think>") or not once or not turn or not rest.endswith("</answer>"):
        return 0.0
    return 1.0 if ARITHMETIC_OR_DECIMALS.fullmatch(rest.removesuffix("</answer>").strip()) else 0.5


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError(f"{type(node).__name__} is not plain arithmetic")


def arithmetic_value(expression: str) -> Fraction:
    """Exact value of digits, `+ - * / ( )` and spaces: arithmetic_value("8/(3-8/3)") == 24. Runs no code.

    Raises ValueError for everything else: other characters, `**`, `//`, calls, malformed text, leading zeros,
    division by zero, more than MAX_EXPRESSION_CHARS characters.
    """
    if len(expression) > MAX_EXPRESSION_CHARS or not ARITHMETIC.fullmatch(expression):
        raise ValueError("not a short expression of digits, + - * / ( ) and spaces")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        # The last two are how Python's parser reports deep nesting, at a depth that differs between versions.
        raise ValueError(f"no value: {type(error).__name__}") from error


def countdown_equation(completion: str, example: dict) -> float:
    """1.0 if the first `<answer>…</answer>` uses each of `nums` exactly once and equals `target`, else 0.0.

    The answer may hold digits, `+ - * / ( )` and spaces; its exact value must be within 1e-5 of the target.
    example: `nums`, a list of numbers, and `target`, a number.
    Source: GRPO-Zero, Improved-GRPO and nano-aha-moment, which `eval` the answer: `99**98**97` hangs them.
    """
    # re.search("<answer>(.*?)</answer>") finds the same. But without a closing tag it reads on to the end
    # from every opening one: 20,000 of them take over ten seconds.
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

# Finds what \d+\.\d+|\d+/\d+|\d+ does, in one reading, and the sign before it.
UNSIGNED_NUMBER = re.compile(r"([-\u2212]?)\$?([0-9]+(?:[./][0-9]+)?)")
SIGNED_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+")
THINK_THEN_ANSWER = re.compile(r"<think>.*?</think>[\n ]*<answer>.*?</answer>", re.DOTALL)

# A longer number equals no answer: Python refuses to read more than 4,300 digits, and takes long for fewer.
NUMBER = re.compile(r"(?=.{1,100}$)[-+]?(?:[0-9]*|[1-9][0-9]{0,2}(?:,[0-9]{3})+)"
                    r"(?:\.[0-9]*|/0*[1-9][0-9]*)?(?:[eE][-+]?[0-9]{1,3})?")


def exact_number(value: object) -> Fraction:
    """The value of a number as it is written: 7, 0.1, Decimal("0.10"), "-$1,000", "1/2"; "50%" is 50.

    Raises ValueError for anything else, for "7/0", and for a comma that doesn't part thousands, as in "0,5".
    """
    text = "".join(x for x in str(value) if x != "%" and unicodedata.category(x) != "Sc")  # Sc: currencies
    text = text.strip().replace("\u2212", "-")
    if not NUMBER.fullmatch(text):
        raise ValueError(f"{_shown(value)} is no number")
    return Fraction(text.replace(",", ""))


def _same_number(number: str, answer: object) -> bool:
    try:
        return exact_number(number) == exact_number(answer)
    except ValueError:
        return False


def gsm8k_last_number(completion: str, example: dict) -> float:
    """+1.0 if the last number in the completion equals the answer by value, else -1.0.

    A number is `12`, `1.5` or `3/4`; "1,234" ends in the number 234. The sign right before it counts only if
    the answer is negative. Source: simple_GRPO, with exact fractions in place of math_verify.
    """
    gold, numbers = exact_number(example["answer"]), UNSIGNED_NUMBER.findall(completion)
    sign, number = numbers[-1] if numbers else ("", "none")
    return 1.0 if _same_number(number, -gold if sign and gold < 0 else gold) else -1.0


def gsm8k_signed_format(completion: str, example: dict) -> float:
    """+1.25 for `<think>…</think>`, newlines or spaces, `<answer>…</answer>`, nothing around it; else -1.0.

    Each of the four tags has to occur exactly once. The text begins with the tag that the prompt has left
    open: `example["opened"]`. Source: simple_GRPO, whose `$` also forgives one newline at the very end.
    """
    text = example.get("opened", "") + completion
    # With one of each tag, every lazy .*? has one place to stop: the match is linear.
    each_once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    return 1.25 if each_once and THINK_THEN_ANSWER.fullmatch(text) else -1.0


def gsm8k_answer(completion: str, example: dict) -> float:
    """2.0 if the last answer is the answer's text, 1.5 if it holds one number of the same value, else 0.0.

    The last answer lies between the last `<answer>` and the next `</answer>`, white space around it ignored;
    left open, it is none. A number is `12`, `-3`, `1.5` or `.5`: "$18" holds one, "1,234" and "1/2" hold two.
    The right answer may also be words. Source: The LM Book.
    """
    gold = example["answer"]
    if gold is None or not str(gold).strip():
        raise ValueError(f"{gold!r} is no answer")
    _, opening, rest = (example.get("opened", "") + completion).rpartition("<answer>")
    answer, closing, _ = rest.partition("</answer>")
    if not opening or not closing:
        return 0.0
    if answer.strip() == str(gold).strip():
        return 2.0
    found = SIGNED_NUMBER.findall(answer)
    return 1.5 if len(found) == 1 and _same_number(found[0], gold) else 0.0


def reasoning_tags(completion: str, example: dict) -> float:
    """0.2 for each of the four tags that occurs, once or often, in any order. Source: The LM Book."""
    tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    found = sum(tag in example.get("opened", "") + completion for tag in tags)
    return found / 5  # three times 0.2 would be 0.6000000000000001


# ---- Scoring -----------------------------------------------------------------------------------------------

REWARDS: dict[str, Callable[[str, dict], float]] = {reward.__name__: reward for reward in (
    countdown_format, countdown_strict_format, countdown_equation,
    gsm8k_last_number, gsm8k_signed_format, gsm8k_answer, reasoning_tags,
)}
NO_COLUMNS = {"prompt", "prompts", "prompt_ids", "opened", "completion", "completions", "completion_ids"}
event_loop = functools.cache(asyncio.new_event_loop)  # the same for all calls: connections stay bound to it


class RewardError(ValueError):
    """A reward can't be loaded, doesn't suit a row, or fails. The message is one line."""


def _shown(x: object) -> str:
    text = " ".join((f"{type(x).__name__}: {x}" if isinstance(x, BaseException) else repr(x)).split())
    return text[:150] + "..." * (len(text) > 150)


def score_batch(
    rewards: dict[str, tuple[Callable, float]], prompts: list[str | list[dict]], completions: list[str],
    examples: list[dict], completion_ids: list[list[int]] | None = None,
) -> list[tuple[float, dict[str, float | None]]]:
    """For each answer the weighted sum of the rewards, and each reward's own score, unweighted, in order.

    rewards: what `load_rewards` returns. The names of a function's parameters tell how it is called:
    - (completion, example) -> float: for each answer, with its text as it was sampled.
    - with a parameter `completions` (or `completion_ids`), as TRL has it: once, with a list over all answers
      for each keyword that it takes: `prompts`, `completions`, `completion_ids`, the examples' columns. It
      returns a number for each answer, or None, which adds nothing. Where prompts are messages, a completion
      is a list of one message, which begins with what the prompt has opened of the assistant's turn.
    Async functions are awaited. Raises RewardError, which names the function and the answer, if one fails.
    """
    parts, ids = {}, completion_ids or [None] * len(completions)
    for name, (reward, _) in rewards.items() if completions else ():
        scores, batched = parts.setdefault(name, []), False
        try:
            parameters = inspect.signature(reward).parameters
            batched = not {"completions", "completion_ids"}.isdisjoint(parameters)
            results = (_call(reward, *answer) for answer in zip(completions, examples))
            if batched:
                results = _call(reward, **_keywords(parameters, prompts, completions, examples, ids))
                results = results.tolist() if hasattr(results, "tolist") else results
            for result in results:  # SupportsFloat lets bools, numpy's and torch's numbers pass, and no text
                is_number = isinstance(result, SupportsFloat) and math.isfinite(result)
                if not is_number and not (batched and result is None):
                    raise RewardError(f"returned {_shown(result)}, not a finite number")
                scores.append(float(result) if is_number else None)
            if len(scores) != len(completions):
                raise RewardError(f"returned {len(scores)} scores for {len(completions)} answers")
        except (Exception, SystemExit) as error:
            if batched and len(completions) > 1 and not isinstance(error, RewardError):  # which answer is it?
                for answer in zip(prompts, completions, examples, ids):
                    score_batch({name: rewards[name]}, *([x] for x in answer))
            i = min(len(scores), len(completions) - 1)
            problem = error if isinstance(error, RewardError) else f"raised {_shown(error)}"
            raise RewardError(f"reward {name!r} {problem}; answer: {_shown(completions[i])}; columns: "
                              f"{', '.join(examples[i])}; a reward is (completion, example) -> float or "
                              "(completions, **columns) -> list[float]") from error
    rows = [{name: scores[i] for name, scores in parts.items()} for i in range(len(completions))]
    return [(sum((rewards[x][1] * row[x] for x in row if row[x] is not None), 0.0), row) for row in rows]


def _call(reward: Callable, *arguments, **keywords) -> object:
    result = reward(*arguments, **keywords)
    if not inspect.isawaitable(result):
        return result
    # In a thread, because this one may run a loop already, as a notebook's does.
    return ThreadPoolExecutor(1).submit(event_loop().run_until_complete, result).result()


def _keywords(parameters, prompts, completions, examples, completion_ids) -> dict[str, list]:
    """What a function that is called once for all answers gets."""
    given = {key: [example.get(key) for example in examples] for key in set().union(*examples) - NO_COLUMNS}
    given |= {"prompts": [], "completions": []}
    if None not in completion_ids:
        given["completion_ids"] = completion_ids
    for prompt, text, example in zip(prompts, completions, examples):
        if not isinstance(prompt, str):
            prompt, opened = list(prompt), example.get("opened", "")
            turn = prompt.pop()["content"] if prompt[-1]["role"] == "assistant" else ""
            turn = turn if turn.rstrip().endswith(opened) else opened + turn
            text = [{"role": "assistant", "content": turn + text}]
        given["prompts"].append(prompt)
        given["completions"].append(text)
    takes_all = any(x.kind is x.VAR_KEYWORD for x in parameters.values())
    return {key: value for key, value in given.items() if takes_all or key in parameters}


def check_rows(rewards: dict[str, tuple[Callable, float]], examples: list[dict]) -> None:
    """Raise RewardError, which names the row (`where`), if a built-in reward can't read its right answer."""
    for name in filter(REWARDS.get, rewards):
        for number, example in enumerate(examples, start=1):
            try:
                REWARDS[name]("<answer>1</answer>", example)
            except (LookupError, TypeError, ValueError) as error:
                where = getattr(example, "where", "") or f"row {number}"
                raise RewardError(f"{where}: {name} can't score it ({_shown(error)}; its columns: "
                                  f"{', '.join(example)}); mend it, or choose another reward") from error


# ---- Rewards of your own -----------------------------------------------------------------------------------

# A name, file or module; a function; a weight. A file ends in .py, and a drive's colon belongs to it.
SPEC = re.compile(r"(.+?\.py|[^:]+)(?::([^\W\d]\w*))?(?::(-?[0-9]*\.?[0-9]+(?:e-?[0-9]{1,2})?))?")


def is_code(spec: str) -> bool:
    """Whether a reward is a function of somebody's file or package, and none of REWARDS."""
    name, _, rest = spec.partition(":")
    return name not in REWARDS and (".py" in spec or rest.partition(":")[0].isidentifier())


def load_rewards(specs: list[str], warn: Callable[[str], None] = print) -> dict[str, tuple[Callable, float]]:
    """The functions and weights of NAME, FILE.py:FUNCTION or package.module:FUNCTION, with :WEIGHT or not.

    Their names are NAME, "file.function", "package.module.function". Your code is run; what it imports is
    searched for in the file's folder, or the current one: first while it is loaded, last from then on. `warn`
    is told if another process could not import it. Raises RewardError, which says what to type instead.
    """
    rewards, files = {}, set()
    for spec in specs:
        match = SPEC.fullmatch(spec)
        source, function, weight = match.groups() if match else (spec, None, None)
        if (source in REWARDS) == (function is not None):
            nearest = "".join(f" (did you mean {x}?)" for x in difflib.get_close_matches(source, REWARDS, 1))
            raise RewardError(f"{spec!r} is no reward{nearest}; type one of: {', '.join(REWARDS)}; or one of "
                              "yours: path/to/file.py:function or package.module:function; a weight is a "
                              "finite number behind it, like countdown_format:0.5")
        name, reward = _load(source, function, files, warn) if function else (source, REWARDS[source])
        if name in rewards and rewards[name][0] is not reward:  # two files of one name
            name = f"{Path(source).resolve().with_suffix('')}.{function}"
        if name in rewards:
            raise RewardError(f"reward {name!r} is given twice; drop {spec!r}, or its first mention")
        rewards[name] = reward, float(weight or 1)
    return rewards


def _load(source: str, function: str, files: set[Path], warn: Callable) -> tuple[str, Callable]:
    file, is_file = Path(source).resolve(), source.endswith(".py")
    if is_file and not file.is_file():
        raise RewardError(f"no file {source!r} in {Path.cwd()}; type where it is: path/to/file.py:function")
    name, folder = (file.stem, file.parent) if is_file else (source, Path.cwd())
    beside = {x.parent.name: x.resolve() for x in folder.glob("*/__init__.py")}
    beside |= {x.stem: x.resolve() for x in folder.glob("*.py") if x.stem not in sys.builtin_module_names}
    hidden = {x: sys.modules.pop(x) for x in beside.keys() & sys.modules.keys()
              if Path(getattr(sys.modules[x], "__file__", None) or "").resolve() != beside[x]}
    if file in beside.values() and file not in files:  # it may have changed since an earlier call
        sys.modules.pop(name, None)
        files.add(file)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
        reward = getattr(module, function)
    except (Exception, SystemExit) as error:
        run = f"python {source}" if is_file else f"python -c 'import {source}'"
        raise RewardError(f"{source!r} fails with {_shown(error)}; make it run: {run}") from error
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        lost = [x for x in beside.keys() & sys.modules.keys()
                if PathFinder.find_spec(x).origin != getattr(sys.modules[x], "__file__", None)]
        sys.modules.update(hidden)
    if lost:
        warn(f"{source}: there are other modules called {', '.join(sorted(lost))}. Yours are used here, but "
             "a process that your reward starts may find the others: rename yours if it starts any")
    return f"{name}.{function}", reward
