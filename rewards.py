"""Rewards: a completion's text and its example in, a score out.

Each reward is a function (completion, example) -> float. Its text comes from an adversary, since a policy is
paid for finding weaknesses: no string makes a reward raise, run code, or take more than linear time.
Left out on purpose: learned reward models, partial credit for near misses, and anything about tokens: a
completion is decoded text without its end-of-sequence token.

    weights = parse_rewards(["countdown_format:0.1", "countdown_equation", "my_rewards.py:brevity:0.5"])
    total, parts = score(completion, {"nums": [3, 3, 8, 8], "target": 24}, weights)
"""

import ast
import difflib
import importlib.util
import math
import operator
import re
import reprlib
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import FunctionType
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
    answer pair 0.5; a pair is an opening tag and a closing one anywhere after it.
    Source: GRPO-Zero and Improved-GRPO, whose `$` also forgives one newline at the very end.
    """
    # The prompt ends with the opening tag, so that any closing one makes a think pair.
    _, turn, rest = completion.partition("</think>\n<answer>")
    if turn and rest.endswith("</answer>"):
        return 1.0
    has_answer = "</answer>" in completion.partition("<answer>")[2]
    return 0.1 * ("</think>" in completion) + 0.5 * has_answer


def countdown_strict_format(completion: str, example: dict) -> float:
    r"""1.0 or 0.5 for `<think>…</think>\n<answer>…</answer>` without think tags in the reasoning, else 0.0.

    1.0 if the answer, which reaches to the final `</answer>`, holds only digits, `+-*/().` and white space,
    and isn't blank; otherwise 0.5.
    Source: nano-aha-moment, whose `$` also forgives one newline at the very end.
    """
    # With "<think>" put back in front, the reasoning is all of the completion up to where the answer begins.
    reasoning, turn, rest = completion.partition("</think>\n<answer>")
    if not turn or not rest.endswith("</answer>") or "<think>" in reasoning or "</think>" in reasoning:
        return 0.0
    answer = rest.removesuffix("</answer>").strip()
    return 1.0 if ARITHMETIC_OR_DECIMALS.fullmatch(answer) else 0.5


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
    example: `nums`, a list of ints, and `target`, an int.
    Source: GRPO-Zero, Improved-GRPO and nano-aha-moment, which `eval` the answer: `99**98**97` hangs them.
    """
    # Not re.search("<answer>(.*?)</answer>"), which finds the same: where no closing tag follows, it reads on
    # to the end from every opening one, and 20,000 of them take over ten seconds.
    answer, closing, _ = completion.partition("<answer>")[2].partition("</answer>")
    try:
        value = arithmetic_value(answer if closing else "")
    except ValueError:
        return 0.0
    used = [int(digits) for digits in re.findall("[0-9]+", answer)]
    hit = abs(value - example["target"]) < Fraction(1, 100_000)
    return 1.0 if hit and sorted(used) == sorted(example["nums"]) else 0.0


# ---- GSM8K: school maths; example["answer"] is a number as text, commas removed: "1234", "-3", "0.5" -----

UNSIGNED_NUMBER = re.compile(r"[0-9]+(?:[./][0-9]+)?")  # finds what \d+\.\d+|\d+/\d+|\d+ does, in one reading
SIGNED_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+")
THINK_THEN_ANSWER = re.compile(r"<think>.*?</think>[\n ]*<answer>.*?</answer>", re.DOTALL)

# A longer number equals no answer. Python refuses to read more than 4,300 digits, and takes long for fewer.
MAX_NUMBER_CHARS = 100


def _same_number(number: str, answer: str) -> bool:
    """True if both texts are numbers of exactly the same value; '7/0' and overlong numbers are none."""
    try:
        return len(number) <= MAX_NUMBER_CHARS and Fraction(number) == Fraction(answer)
    except (ValueError, ZeroDivisionError):
        return False


def gsm8k_last_number(completion: str, example: dict) -> float:
    """+1.0 if the last number in the completion equals the answer by value, else -1.0.

    A number is `12`, `1.5` or `3/4`, without a sign: "-3" reads as 3, so a negative answer is never reached,
    and "1,234" ends in the number 234. Source: simple_GRPO, with exact fractions in place of math_verify.
    """
    numbers = UNSIGNED_NUMBER.findall(completion)
    return 1.0 if numbers and _same_number(numbers[-1], example["answer"]) else -1.0


def gsm8k_signed_format(completion: str, example: dict) -> float:
    """+1.25 for `<think>…</think>`, newlines or spaces, `<answer>…</answer>`, nothing around it; else -1.0.

    Each of the four tags has to occur exactly once. The completion writes them all: its prompt opens none.
    Source: simple_GRPO, whose `$` also forgives one newline at the very end.
    """
    # With one of each tag, every lazy .*? has one place to stop: the match is linear.
    each_once = all(completion.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    return 1.25 if each_once and THINK_THEN_ANSWER.fullmatch(completion) else -1.0


def gsm8k_answer(completion: str, example: dict) -> float:
    """2.0 if the last answer is the answer's text, 1.5 if it holds one number of the same value, else 0.0.

    The last answer lies between the last `<answer>` and the next `</answer>`, white space around it ignored;
    left open, it is none. A number is `12`, `-3`, `1.5` or `.5`: "$18" holds one, "1,234" and "1/2" hold two.
    Source: The LM Book.
    """
    _, opening, rest = completion.rpartition("<answer>")
    answer, closing, _ = rest.partition("</answer>")
    if not opening or not closing:
        return 0.0
    if answer.strip() == example["answer"]:
        return 2.0
    found, wanted = SIGNED_NUMBER.findall(answer), SIGNED_NUMBER.findall(example["answer"])
    return 1.5 if len(found) == len(wanted) == 1 and _same_number(found[0], wanted[0]) else 0.0


def reasoning_tags(completion: str, example: dict) -> float:
    """0.2 for each of the four tags that occurs, once or often, in any order. Source: The LM Book."""
    tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    return sum(tag in completion for tag in tags) / 5  # three times 0.2 would be 0.6000000000000001


# ---- Scoring -----------------------------------------------------------------------------------------------

REWARDS: dict[str, Callable[[str, dict], float]] = {reward.__name__: reward for reward in (
    countdown_format, countdown_strict_format, countdown_equation,
    gsm8k_last_number, gsm8k_signed_format, gsm8k_answer, reasoning_tags,
)}


class RewardError(ValueError):
    """A reward is unknown or can't be loaded, raised, or returned something that is not a finite number."""


def _shown(value: object) -> str:
    """A value, or an error with its type, in one short line."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else reprlib.repr(value)
    return " ".join(text.split())[:300]


def _find(name: str) -> Callable[[str, dict], float]:
    if name not in REWARDS:
        nearest = difflib.get_close_matches(name, REWARDS, n=1)
        raise RewardError(f"unknown reward {name!r}" + (f" (did you mean {nearest[0]!r}?)" if nearest else "")
                          + f"; type one of: {', '.join(REWARDS)}; or your own: path/to/file.py:function")
    return REWARDS[name]


def score(completion: str, example: dict, weights: dict[str, float]) -> tuple[float, dict[str, float]]:
    """Weighted sum of the rewards named in `weights`, and each one's own score, unweighted, in that order.

    With weights {"countdown_format": 0.1, "countdown_equation": 1.0}, a right answer in the right form gets
    (1.1, {"countdown_format": 1.0, "countdown_equation": 1.0}). A weight of 0 reports without counting.
    Raises RewardError, naming the reward and showing the example, when a reward fails.
    """
    parts = {}
    for name in weights:
        reward = _find(name)
        try:
            result = reward(completion, example)
            # SupportsFloat lets bools, numpy and torch scalars pass, and stops the string "1.0".
            parts[name] = float(result) if isinstance(result, SupportsFloat) else math.nan
        except Exception as error:
            raise RewardError(f"reward {name!r} raised {_shown(error)}; "
                              f"example: {_shown(example)}") from error
        if not math.isfinite(parts[name]):
            raise RewardError(f"reward {name!r} returned {_shown(result)}, not a finite number; example: "
                              f"{_shown(example)}")
    return sum((weights[name] * part for name, part in parts.items()), 0.0), parts


def _load(path: str, function: str, key: str) -> None:
    """Run the Python file at `path` and put its `function` into REWARDS, under `key`."""
    file = Path(path)
    if not file.is_file():
        raise RewardError(f"no file {path!r} in {Path.cwd()}; type where it is: path/to/file.py:function")
    # The prefix keeps a reward file called data.py from taking the place of another module of that name.
    spec = importlib.util.spec_from_file_location(f"reward_file_{key}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass in the file looks its module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RewardError(f"{path!r} fails with {_shown(error)}; make it run: python {path}") from error
    found = vars(module)
    if not callable(found.get(function)):
        own = [name for name, x in found.items() if isinstance(x, FunctionType) and x.__module__ == spec.name]
        choices = ", ".join(f"{path}:{name}" for name in own) or "nothing yet, it has no functions"
        raise RewardError(f"{function!r} is no function in {path!r}; type one of: {choices}")
    REWARDS[key] = found[function]


def is_code(spec: str) -> bool:
    """Whether a reward is a function of somebody's file, and not one of REWARDS."""
    return spec.split(":")[0].endswith(".py")


def parse_rewards(specs: list[str]) -> dict[str, float]:
    """Weights for `score` from `name`, `name:weight`, `path/to/file.py:function[:weight]`; without one, 1.0.

    A function of your own joins REWARDS under its file's stem and its name, "my_rewards.brevity" (a second
    file of the same stem: under its path); its file is run to load it. Raises RewardError, saying what to
    type instead, for a spec that can't be followed.
    """
    weights, files = {}, {}
    for spec in specs:
        reward, *weight = spec.split(":")
        name = reward
        if is_code(spec):
            path, function = reward, weight.pop(0) if weight else ""
            reward, file = f"{path}:{function}", Path(path).resolve()
            name = f"{file.stem}.{function}"
            if files.setdefault(name, file) != file:
                name = f"{file.with_suffix('')}.{function}"
            _load(path, function, name)
        _find(name)
        if name in weights:
            raise RewardError(f"reward {name!r} is given twice; drop {spec!r}, or its first mention")
        try:
            weights[name] = float(":".join(weight)) if weight else 1.0
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise RewardError(f"{spec!r} needs a finite number as the reward's weight, like {reward}:0.5")
    return weights
