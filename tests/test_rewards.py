"""Rewards: tables worked out by hand, naive formulas beside them, hostile completions, and the ways in.

The expected scores in the tables were worked out from the rules, not by running the code. Slow and obvious
regular expressions, and Python's own `eval` on Fractions, serve as the second opinion on random text.
"""

import math
import re
import time
import warnings
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

import rewards

# No time limit per example: a busy machine would miss it.
few, many = (settings(deadline=None, max_examples=count) for count in (200, 1000))


@pytest.fixture(autouse=True)
def each_test_has_its_own_rewards(monkeypatch):
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))


def disagreements(reward, rows):
    """The rows (completion, example, expected) that the reward scores otherwise, with its score."""
    scored = [(completion, example, want, reward(completion, example)) for completion, example, want in rows]
    return [row for row in scored if row[2] != row[3]]


# ---- The tables --------------------------------------------------------------------------------------------

COUNTDOWN_FORMAT = [
    # The whole text: <think> (put back) … </think>\n<answer> … </answer>
    ("a</think>\n<answer>1</answer>", 1.0),
    ("</think>\n<answer></answer>", 1.0),
    ("</think>\n<answer>1</answer>", 1.0),
    ("a</think>\n<answer></answer>", 1.0),
    ("a\nb\n\nc</think>\n<answer>1\n2</answer>", 1.0),
    (" a </think>\n<answer> 1 </answer>", 1.0),
    ("a</think>\n<answer>words, not numbers</answer>", 1.0),
    ("<think>a</think>\n<answer>1</answer>", 1.0),
    ("a<think>b</think>\n<answer>1</answer>", 1.0),
    ("a</think></think>\n<answer>1</answer>", 1.0),
    ("a</think>b</think>\n<answer>1</answer>", 1.0),
    ("a</think>\n<answer>1</answer></answer>", 1.0),
    ("a</think>\n<answer>1</answer>\n<answer>2</answer>", 1.0),
    ("a</think>\n<answer>1</answer> so <answer>2</answer>", 1.0),
    ("a</think>\n<answer><answer>1</answer>", 1.0),
    ("<answer>9</answer></think>\n<answer>1</answer>", 1.0),
    ("a</think>\n<answer>b</think>\n<answer>1</answer>", 1.0),
    ("a</think>\n<answer></think></answer>", 1.0),
    ("a</think><answer>1</answer></think>\n<answer>2</answer>", 1.0),
    ("a < b > c</think>\n<answer>1 < 2</answer>", 1.0),
    ("a\r\n</think>\n<answer>1\r\n</answer>", 1.0),
    ("思考</think>\n<answer>答</answer>", 1.0),
    ("\n</think>\n<answer>\n</answer>", 1.0),
    # Both pairs, but not the whole text: 0.1 + 0.5
    ("a</think><answer>1</answer>", 0.6),
    ("a</think> <answer>1</answer>", 0.6),
    ("a</think>\t<answer>1</answer>", 0.6),
    ("a</think>\n\n<answer>1</answer>", 0.6),
    ("a</think>\r\n<answer>1</answer>", 0.6),
    ("a</think> \n<answer>1</answer>", 0.6),
    ("a</think>\n <answer>1</answer>", 0.6),
    ("a</think>\n<answer>1</answer>\n", 0.6),
    ("a</think>\n<answer>1</answer> ", 0.6),
    ("a</think>\n<answer>1</answer>.", 0.6),
    ("a</think>\n<answer>1</answer><|im_end|>", 0.6),
    ("a</think>\nso <answer>1</answer>", 0.6),
    ("<answer>1</answer>\na</think>", 0.6),
    ("<answer>1</answer></think>", 0.6),
    ("<answer>a</think>1</answer>", 0.6),
    ("a</think>\n<answer>1</answer><answer>", 0.6),
    ("a</think>\n<answer>1</answer></think>", 0.6),
    ("<answer>1</answer><answer>2</think>", 0.6),
    ("</think><answer></answer>", 0.6),
    ("<think>a</think>\n\n<answer>1</answer>", 0.6),
    # The think pair alone
    ("a</think>", 0.1),
    ("</think>", 0.1),
    ("<think>a</think>", 0.1),
    ("a</think>\n", 0.1),
    ("a</think>\n1", 0.1),
    ("a</think>\n<answer>", 0.1),
    ("a</think>\n<answer>1", 0.1),
    ("a</think>\n1</answer>", 0.1),
    ("a</think>\n</answer>1<answer>", 0.1),
    ("</answer>a</think>\n<answer>", 0.1),
    ("a</think>\n<answer>1<answer>", 0.1),
    ("a</think>\n<answer>1</ answer>", 0.1),
    ("a</think>\n<answer>1</ANSWER>", 0.1),
    ("a</think>\n< answer>1</answer>", 0.1),
    ("a</think>\n<answer >1</answer>", 0.1),
    ("a</think>\n<answer>1<\\/answer>", 0.1),
    ("a</think></think></think>", 0.1),
    # The answer pair alone
    ("<answer>1</answer>", 0.5),
    ("<answer></answer>", 0.5),
    ("a\n<answer>1</answer>", 0.5),
    ("<answer>\n\n1\n</answer> and more", 0.5),
    ("<answer><answer>1</answer>", 0.5),
    ("</answer><answer></answer>", 0.5),
    ("<answer>1</answer><answer>2</answer>", 0.5),
    ("a<think>\n<answer>1</answer>", 0.5),
    ("a</ think>\n<answer>1</answer>", 0.5),
    ("a</THINK>\n<answer>1</answer>", 0.5),
    ("a</think\n<answer>1</answer>", 0.5),
    ("/think>\n<answer>1</answer>", 0.5),
    # Neither
    ("", 0.0),
    (" \n", 0.0),
    ("a\n1", 0.0),
    ("<think>", 0.0),
    ("<think>a</ think>", 0.0),
    ("<answer>", 0.0),
    ("</answer>", 0.0),
    ("<answer>1", 0.0),
    ("1</answer>", 0.0),
    ("</answer>1<answer>", 0.0),
    ("<ANSWER>1</ANSWER>", 0.0),
    ("<reasoning>a</reasoning>", 0.0),
]

COUNTDOWN_STRICT_FORMAT = [
    ("a</think>\n<answer>1</answer>", 1.0),
    ("</think>\n<answer>1</answer>", 1.0),
    ("a\nb</think>\n<answer>(1+2)*3-4/5</answer>", 1.0),
    ("a</think>\n<answer> 1 + 2 </answer>", 1.0),
    ("a</think>\n<answer>\n1\n</answer>", 1.0),
    ("a</think>\n<answer>1\n+\n2</answer>", 1.0),
    ("a</think>\n<answer>\t1\t+\t2\t</answer>", 1.0),
    ("a</think>\n<answer>1\r\n</answer>", 1.0),
    ("a</think>\n<answer>1\u00a0+ 2</answer>", 1.0),
    ("a</think>\n<answer>1.5/2</answer>", 1.0),
    ("a</think>\n<answer>.</answer>", 1.0),
    ("a</think>\n<answer>()</answer>", 1.0),
    ("a</think>\n<answer>((((</answer>", 1.0),
    ("a</think>\n<answer>+-*/</answer>", 1.0),
    ("a</think>\n<answer>1**2//3</answer>", 1.0),
    ("a</think>\n<answer>1 2 3</answer>", 1.0),
    ("a</think>\n<answer>007</answer>", 1.0),
    ("<answer>x</answer> no</think>\n<answer>1</answer>", 1.0),
    ("</answer></think>\n<answer>1</answer>", 1.0),
    ("a < b, <b>c</b></think>\n<answer>1</answer>", 1.0),
    ("<</think>\n<answer>1</answer>", 1.0),
    ("a</think</think>\n<answer>1</answer>", 1.0),
    ("< think></ think><THINK></think>\n<answer>1</answer>", 1.0),
    ("思考</think>\n<answer>1</answer>", 1.0),
    # The answer is blank, or holds something else
    ("a</think>\n<answer></answer>", 0.5),
    ("a</think>\n<answer> </answer>", 0.5),
    ("a</think>\n<answer>\n\n</answer>", 0.5),
    ("a</think>\n<answer>one</answer>", 0.5),
    ("a</think>\n<answer>x+1</answer>", 0.5),
    ("a</think>\n<answer>1+2=3</answer>", 0.5),
    ("a</think>\n<answer>1,234</answer>", 0.5),
    ("a</think>\n<answer>1_000</answer>", 0.5),
    ("a</think>\n<answer>0x10</answer>", 0.5),
    ("a</think>\n<answer>1e5</answer>", 0.5),
    ("a</think>\n<answer>2^3</answer>", 0.5),
    ("a</think>\n<answer>3×4</answer>", 0.5),
    ("a</think>\n<answer>\u22121</answer>", 0.5),
    ("a</think>\n<answer>\u0663</answer>", 0.5),
    ("a</think>\n<answer>$1</answer>", 0.5),
    ("a</think>\n<answer>[1]</answer>", 0.5),
    ("a</think>\n<answer>1\x00</answer>", 0.5),
    ("a</think>\n<answer><b>1</b></answer>", 0.5),
    ("a</think>\n<answer><answer>1</answer>", 0.5),
    ("a</think>\n<answer>1</answer></answer>", 0.5),
    ("a</think>\n<answer>1</answer>\n<answer>2</answer>", 0.5),
    ("a</think>\n<answer>1</think></answer>", 0.5),
    ("a</think>\n<answer><think>1</answer>", 0.5),
    ("a</think>\n<answer>b</think>\n<answer>1</answer>", 0.5),
    ("a</think>\n<answer></answe</answer>", 0.5),
    # No match
    ("", 0.0),
    ("a", 0.0),
    ("a</think>", 0.0),
    ("a</think>\n1", 0.0),
    ("a</think>\n<answer>1", 0.0),
    ("a</think>\n<answer>1</answer", 0.0),
    ("a</think>\n1</answer>", 0.0),
    ("a</think>\n</answer>", 0.0),
    ("<answer>1</answer>", 0.0),
    ("a\n<answer>1</answer>", 0.0),
    ("a</think><answer>1</answer>", 0.0),
    ("a</think> <answer>1</answer>", 0.0),
    ("a</think>\n\n<answer>1</answer>", 0.0),
    ("a</think> \n<answer>1</answer>", 0.0),
    ("a</think>\r\n<answer>1</answer>", 0.0),
    ("a</think>\nso <answer>1</answer>", 0.0),
    ("a</think>\n<answer>1</answer>\n", 0.0),
    ("a</think>\n<answer>1</answer> ", 0.0),
    ("a</think>\n<answer>1</answer>.", 0.0),
    ("a</think>\n<answer>1</answer><|im_end|>", 0.0),
    ("a</think>\n<answer>1</answer></think>", 0.0),
    ("<think>a</think>\n<answer>1</answer>", 0.0),
    ("<think></think>\n<answer>1</answer>", 0.0),
    ("a<think>b</think>\n<answer>1</answer>", 0.0),
    ("a</think></think>\n<answer>1</answer>", 0.0),
    ("a</think>b</think>\n<answer>1</answer>", 0.0),
    ("a</think><answer>1</answer></think>\n<answer>2</answer>", 0.0),
    ("<answer>1</answer>\na</think>", 0.0),
    ("a</THINK>\n<answer>1</answer>", 0.0),
    ("a</think>\n<Answer>1</Answer>", 0.0),
]

COUNTDOWN_ANSWERS = [  # text inside <answer>…</answer>, nums, target, expected
    ("2+3", [2, 3], 5, 1.0),
    ("3+2", [2, 3], 5, 1.0),
    (" 2 + 3 ", [2, 3], 5, 1.0),
    ("2*3", [2, 3], 6, 1.0),
    ("2+3", [2, 3], 6, 0.0),
    ("(2+3)*4", [2, 3, 4], 20, 1.0),
    ("2+3*4", [2, 3, 4], 14, 1.0),
    ("2+3*4", [2, 3, 4], 20, 0.0),
    ("((2)+((3)))", [2, 3], 5, 1.0),
    ("44+19+35", [44, 19, 35], 98, 1.0),
    ("5", [5], 5, 1.0),
    ("(5)", [5], 5, 1.0),
    # Fractions on the way, exact at the end
    ("8/(3-8/3)", [3, 3, 8, 8], 24, 1.0),
    ("6/(1-3/4)", [1, 3, 4, 6], 24, 1.0),
    ("5*(5-1/5)", [1, 5, 5, 5], 24, 1.0),
    ("1/3+1/3+1/3", [1, 1, 1, 3, 3, 3], 1, 1.0),
    ("10/3*3", [3, 3, 10], 10, 1.0),
    ("7/2", [2, 7], 3, 0.0),
    ("7/2", [2, 7], 4, 0.0),
    ("1000001/1000000", [1000000, 1000001], 1, 1.0),
    ("50001/50000", [50000, 50001], 1, 0.0),
    ("1001/1000", [1000, 1001], 1, 0.0),
    # Signs
    ("-2+5", [2, 5], 3, 1.0),
    ("5+-2", [2, 5], 3, 1.0),
    ("5--2", [2, 5], 7, 1.0),
    ("5 - - 2", [2, 5], 7, 1.0),
    ("5-(-2)", [2, 5], 7, 1.0),
    ("+2+3", [2, 3], 5, 1.0),
    ("--2+3", [2, 3], 5, 1.0),
    ("-(2-5)", [2, 5], 3, 1.0),
    ("2*-3", [2, 3], -6, 1.0),
    ("2-5", [2, 5], -3, 1.0),
    ("2-5", [2, 5], 3, 0.0),
    # Zero
    ("0+5", [0, 5], 5, 1.0),
    ("0/5", [0, 5], 0, 1.0),
    ("5/0", [0, 5], 0, 0.0),
    ("1/(1-1/1)", [1, 1, 1, 1], 0, 0.0),
    # Not each number exactly once
    ("2+2", [2], 4, 0.0),
    ("8/(3-8/3)", [3, 8], 24, 0.0),
    ("2+3", [2, 3, 4], 5, 0.0),
    ("2+3", [2, 3, 3], 5, 0.0),
    ("2+3+0", [2, 3], 5, 0.0),
    ("1+4", [2, 3], 5, 0.0),
    ("5", [2, 3], 5, 0.0),
    ("23", [2, 3], 23, 0.0),
    ("", [], 0, 0.0),
    # Not arithmetic
    ("   ", [], 0, 0.0),
    ("()", [], 0, 0.0),
    ("2 3", [2, 3], 23, 0.0),
    ("2(3)", [2, 3], 6, 0.0),
    ("(2)(3)", [2, 3], 6, 0.0),
    ("7//2", [2, 7], 3, 0.0),
    ("2**3", [2, 3], 8, 0.0),
    ("99**98**97", [97, 98, 99], 1, 0.0),
    ("2+", [2], 2, 0.0),
    ("*2+3", [2, 3], 5, 0.0),
    ("(2+3", [2, 3], 5, 0.0),
    ("2+3)", [2, 3], 5, 0.0),
    ("(2+)3", [2, 3], 5, 0.0),
    (")2+3(", [2, 3], 5, 0.0),
    ("02+3", [2, 3], 5, 0.0),
    # Other characters
    ("2+3=5", [2, 3], 5, 0.0),
    ("2+3 = 5", [2, 3, 5], 5, 0.0),
    ("5=5", [5, 5], 5, 0.0),
    ("2+3.0", [2, 3], 5, 0.0),
    ("2.0+3", [0, 2, 3], 5, 0.0),
    ("2+3\n", [2, 3], 5, 0.0),
    ("\n2+3", [2, 3], 5, 0.0),
    ("2\t+3", [2, 3], 5, 0.0),
    ("2\u00a0+3", [2, 3], 5, 0.0),
    ("2\u00d73", [2, 3], 6, 0.0),
    ("2x3", [2, 3], 6, 0.0),
    ("5\u22122", [2, 5], 3, 0.0),
    ("\u0662+\u0663", [2, 3], 5, 0.0),
    ("\uff12+\uff13", [2, 3], 5, 0.0),
    ("1_0+2", [2, 10], 12, 0.0),
    ("0x2+3", [2, 3], 5, 0.0),
    ("2e1+3", [1, 2, 3], 23, 0.0),
    ("1,234+1", [1, 1234], 1235, 0.0),
    ("$2+3$", [2, 3], 5, 0.0),
    ("2+3;", [2, 3], 5, 0.0),
    ("2+3 # fine", [2, 3], 5, 0.0),
    ("[2+3]", [2, 3], 5, 0.0),
    ("abs(2-5)", [2, 5], 3, 0.0),
    ("<b>2+3</b>", [2, 3], 5, 0.0),
]

COUNTDOWN_COMPLETIONS = [  # nums [2, 3], target 5
    ("so</think>\n<answer>2+3</answer>", 1.0),
    ("<answer>2+3</answer>", 1.0),
    ("<answer>2+3</answer> and more", 1.0),
    ("<answer>2+3</answer></answer>", 1.0),
    ("</answer><answer>2+3</answer>", 1.0),
    ("<think><answer>2+3</answer></think>", 1.0),
    ("<answer>2+3</answer><answer>2*3</answer>", 1.0),
    ("try <answer>2+3</answer></think>\n<answer>no</answer>", 1.0),
    ("<answer>2*3</answer><answer>2+3</answer>", 0.0),
    ("<answer></answer><answer>2+3</answer>", 0.0),
    ("<answer>\n2*3</answer><answer>2+3</answer>", 0.0),
    ("<answer><answer>2+3</answer>", 0.0),
    ("<answer>2*3<answer>2+3</answer>", 0.0),
    ("<answer>2+3</answer\n></answer>", 0.0),
    ("<answer>2+3", 0.0),
    ("2+3</answer>", 0.0),
    ("</answer>2+3<answer>", 0.0),
    ("<answer>2+3</ answer>", 0.0),
    ("<answer >2+3</answer>", 0.0),
    ("<Answer>2+3</Answer>", 0.0),
    ("2+3", 0.0),
    ("", 0.0),
]

GSM8K_LAST_NUMBER = [  # completion, answer, expected
    ("42", "42", 1.0),
    ("The answer is 42", "42", 1.0),
    ("The answer is 42.", "42", 1.0),
    ("42,", "42", 1.0),
    ("42!", "42", 1.0),
    ("The answer is 42", "43", -1.0),
    ("41 then 42", "42", 1.0),
    ("42 then 41", "42", -1.0),
    ("2 + 3 = 5", "5", 1.0),
    ("5 = 2 + 3", "5", -1.0),
    ("", "42", -1.0),
    ("no numbers", "42", -1.0),
    ("forty-two", "42", -1.0),
    ("\n\n42\n\nDone.\n", "42", 1.0),
    ("42\r\n", "42", 1.0),
    ("4\n2", "42", -1.0),
    ("4 2", "42", -1.0),
    ("4 2", "2", 1.0),
    ("10 000", "10000", -1.0),
    # By value, exactly
    ("42.0", "42", 1.0),
    ("42", "42.0", 1.0),
    ("042", "42", 1.0),
    ("0042.50", "42.5", 1.0),
    ("42.5", "42", -1.0),
    ("3.14", "3.14", 1.0),
    ("3.140", "3.14", 1.0),
    ("3.1", "3.14", -1.0),
    ("0", "0", 1.0),
    ("0.0", "0", 1.0),
    ("0.5", "0.5", 1.0),
    ("3.0000000000000001", "3", -1.0),
    ("9007199254740993", "9007199254740992", -1.0),
    # Fractions
    ("84/2", "42", 1.0),
    ("42/1", "42", 1.0),
    ("1/42", "42", -1.0),
    ("1/2", "0.5", 1.0),
    ("2/4", "0.5", 1.0),
    ("1 / 2", "2", 1.0),
    ("1/3", "0.3333333333333333", -1.0),
    ("0/7", "0", 1.0),
    ("7/0", "7", -1.0),
    ("7/0", "0", -1.0),
    ("0/0", "0", -1.0),
    # What is one number and what is two
    (".5", "0.5", -1.0),
    (".5", "5", 1.0),
    ("1.2.3", "3", 1.0),
    ("1.2.3", "1.2", -1.0),
    ("1/2/3", "3", 1.0),
    ("1.5/2", "2", 1.0),
    ("1/2.5", "5", 1.0),
    ("42/1.0", "0", 1.0),
    ("1,234", "1234", -1.0),
    ("1,234", "234", 1.0),
    ("1234", "1234", 1.0),
    ("1e3", "1000", -1.0),
    ("1e3", "3", 1.0),
    ("1_000", "0", 1.0),
    ("0x10", "10", 1.0),
    ("x2", "2", 1.0),
    # Signs, currency, markup, other scripts
    ("-3", "3", 1.0),
    ("-3", "-3", -1.0),
    ("$42", "42", 1.0),
    ("42%", "42", 1.0),
    ("42 dollars", "42", 1.0),
    ("#### 42", "42", 1.0),
    ("**42**", "42", 1.0),
    ("\\boxed{42}", "42", 1.0),
    ("<answer>42</answer>", "42", 1.0),
    ("<think>41</think><answer>42</answer>", "42", 1.0),
    ("<answer>42</answer> by step 2", "42", -1.0),
    ("\u0664\u0662", "42", -1.0),
    ("42 \u0663", "42", 1.0),
    ("\uff14\uff12", "42", -1.0),
    ("42\u00b2", "42", 1.0),
    ("\u00bd", "0.5", -1.0),
]

GSM8K_SIGNED_FORMAT = [
    ("<think>a</think><answer>1</answer>", 1.25),
    ("<think>a</think>\n<answer>1</answer>", 1.25),
    ("<think>a</think> <answer>1</answer>", 1.25),
    ("<think>a</think>\n\n<answer>1</answer>", 1.25),
    ("<think>a</think> \n \n <answer>1</answer>", 1.25),
    ("<think></think><answer></answer>", 1.25),
    ("<think>\n</think>\n<answer>\n</answer>", 1.25),
    ("<think>a\nb\n\nc</think>\n<answer>1\n2</answer>", 1.25),
    ("<think> a </think>\n<answer> 1 </answer>", 1.25),
    ("<think>a</think>\n<answer>any words at all</answer>", 1.25),
    ("<think>a < b</think>\n<answer>x > y</answer>", 1.25),
    ("<think><b>a</b></think><answer><i>1</i></answer>", 1.25),
    ("<think>< think></ think></think><answer>1</answer>", 1.25),
    ("<think><THINK></THINK></think><answer>1</answer>", 1.25),
    ("<think>a</thin</think><answer>1</answer>", 1.25),
    ("<think>/think></think><answer>1</answer>", 1.25),
    ("<think>a</think><answer>1</ answer></answer>", 1.25),
    ("<think>a\r\n</think><answer>1\r\n</answer>", 1.25),
    ("<think>a\x00</think><answer>1</answer>", 1.25),
    ("<think>思考</think>\n<answer>答</answer>", 1.25),
    ("<think><reasoning></think><answer></reasoning></answer>", 1.25),
    # Something around it, or something else between
    (" <think>a</think><answer>1</answer>", -1.0),
    ("\n<think>a</think><answer>1</answer>", -1.0),
    ("So: <think>a</think><answer>1</answer>", -1.0),
    ("<<think>a</think><answer>1</answer>", -1.0),
    ("<think>a</think><answer>1</answer> ", -1.0),
    ("<think>a</think><answer>1</answer>\n", -1.0),
    ("<think>a</think><answer>1</answer>.", -1.0),
    ("<think>a</think><answer>1</answer><|im_end|>", -1.0),
    ("<think>a</think>so<answer>1</answer>", -1.0),
    ("<think>a</think>\nso <answer>1</answer>", -1.0),
    ("<think>a</think>\t<answer>1</answer>", -1.0),
    ("<think>a</think>\r\n<answer>1</answer>", -1.0),
    ("<think>a</think>\u00a0<answer>1</answer>", -1.0),
    ("<think>a</think>.<answer>1</answer>", -1.0),
    # A tag missing
    ("", -1.0),
    ("a", -1.0),
    ("a</think><answer>1</answer>", -1.0),
    ("<think>a<answer>1</answer>", -1.0),
    ("<think>a</think>1</answer>", -1.0),
    ("<think>a</think><answer>1", -1.0),
    ("<think>a</think>", -1.0),
    ("<answer>1</answer>", -1.0),
    ("<think>", -1.0),
    ("</think><answer>", -1.0),
    ("<think >a</think><answer>1</answer>", -1.0),
    ("<think>a</think><answer>1</answer >", -1.0),
    ("<THINK>a</THINK><ANSWER>1</ANSWER>", -1.0),
    ("<reasoning>a</reasoning><answer>1</answer>", -1.0),
    # A tag repeated
    ("<think><think>a</think><answer>1</answer>", -1.0),
    ("<think>a</think></think><answer>1</answer>", -1.0),
    ("<think>a</think>b</think><answer>1</answer>", -1.0),
    ("<think>a</think><answer><answer>1</answer>", -1.0),
    ("<think>a</think><answer>1</answer></answer>", -1.0),
    ("<think>a</think><answer>1</answer><answer>2</answer>", -1.0),
    ("<think>a</think><think>b</think><answer>1</answer>", -1.0),
    ("<think>a</think><answer>1</answer><think>a</think><answer>1</answer>", -1.0),
    ("<think>an <answer> tag</think><answer>1</answer>", -1.0),
    ("<think>a</think><answer><think></answer>", -1.0),
    ("<think>a</think><answer>1</think></answer>", -1.0),
    # Each tag once, in another order
    ("<answer>1</answer><think>a</think>", -1.0),
    ("<think><answer>1</answer></think>", -1.0),
    ("<think>a<answer>1</think></answer>", -1.0),
    ("</think>a<think><answer>1</answer>", -1.0),
    ("<think>a</think></answer>1<answer>", -1.0),
    ("<answer><think>a</think>1</answer>", -1.0),
    ("<think></answer></think><answer>", -1.0),
]

GSM8K_ANSWERS = [  # text inside <answer>…</answer>, answer, expected
    ("42", "42", 2.0),
    (" 42 ", "42", 2.0),
    ("\n42\n", "42", 2.0),
    ("\t42\r\n", "42", 2.0),
    ("42\u00a0", "42", 2.0),
    ("-42", "-42", 2.0),
    ("0.5", "0.5", 2.0),
    ("0", "0", 2.0),
    # One number of the same value
    ("42.0", "42", 1.5),
    ("42", "42.0", 1.5),
    ("042", "42", 1.5),
    ("42.", "42", 1.5),
    ("+42", "42", 1.5),
    ("-42.0", "-42", 1.5),
    ("--42", "-42", 1.5),
    ("- 42", "42", 1.5),
    ("\u221242", "42", 1.5),
    (".5", "0.5", 1.5),
    ("..5", "0.5", 1.5),
    ("-.5", "-0.5", 1.5),
    ("0.50", "0.5", 1.5),
    ("5..", "5", 1.5),
    ("-0", "0", 1.5),
    ("00", "0", 1.5),
    ("$42", "42", 1.5),
    ("£42.00", "42", 1.5),
    ("42%", "42", 1.5),
    ("42 dollars", "42", 1.5),
    ("-7 degrees", "-7", 1.5),
    ("The answer is 42.", "42", 1.5),
    ("x=42", "42", 1.5),
    ("x42y", "42", 1.5),
    ("(42)", "42", 1.5),
    ("**42**", "42", 1.5),
    ("#### 42", "42", 1.5),
    ("\\boxed{42}", "42", 1.5),
    ("<b>42</b>", "42", 1.5),
    ("42\u00b2", "42", 1.5),
    ("42", "$42", 1.5),
    # Another number, none, or several
    ("41", "42", 0.0),
    ("42.5", "42", 0.0),
    ("-42", "42", 0.0),
    ("42", "-42", 0.0),
    ("- 42", "-42", 0.0),
    ("\u221242", "-42", 0.0),
    ("3.0000000000000001", "3", 0.0),
    ("", "42", 0.0),
    (" ", "42", 0.0),
    ("...", "42", 0.0),
    ("forty-two", "42", 0.0),
    ("\u0664\u0662", "42", 0.0),
    ("\uff14\uff12", "42", 0.0),
    ("1,234", "1234", 0.0),
    ("1 234", "1234", 0.0),
    ("4 2", "42", 0.0),
    ("42 42", "42", 0.0),
    ("42 or 43", "42", 0.0),
    ("42=42", "42", 0.0),
    ("6*7", "42", 0.0),
    ("5-3", "2", 0.0),
    ("1/2", "0.5", 0.0),
    ("42/1", "42", 0.0),
    ("4.2.0", "4.2", 0.0),
    ("1e3", "1000", 0.0),
    ("1_000", "1000", 0.0),
    ("0x10", "16", 0.0),
]

GSM8K_COMPLETIONS = [  # answer "42"
    ("<answer>42</answer>", 2.0),
    ("<reasoning>\nx\n</reasoning>\n<answer>\n42\n</answer>", 2.0),
    ("<answer>42</answer> and more, 41", 2.0),
    ("<answer>41</answer><answer>42</answer>", 2.0),
    ("<answer>41<answer>42</answer>", 2.0),
    ("<answer><answer>42</answer></answer>", 2.0),
    ("<answer>42</answer>41</answer>", 2.0),
    ("</answer><answer>42</answer>", 2.0),
    ("<answer>41</answer><answer>It is 42</answer>", 1.5),
    ("<answer>42</answer><answer>41</answer>", 0.0),
    ("<answer>42</answer><answer>", 0.0),
    ("<answer>42</answer><answer>42", 0.0),
    ("<answer>42<answer></answer>", 0.0),
    ("<answer>41</answer>42", 0.0),
    ("<answer></answer>42", 0.0),
    ("<answer>42", 0.0),
    ("42</answer>", 0.0),
    ("</answer>42<answer>", 0.0),
    ("<answer>42</ answer>", 0.0),
    ("<answer >42</answer>", 0.0),
    ("<Answer>42</Answer>", 0.0),
    ("42", 0.0),
    ("", 0.0),
]

REASONING_TAGS = [
    ("", 0.0),
    ("plain text", 0.0),
    ("reasoning answer", 0.0),
    ("<reasoning>", 0.2),
    ("</reasoning>", 0.2),
    ("<answer>", 0.2),
    ("</answer>", 0.2),
    ("<reasoning></reasoning>", 0.4),
    ("<reasoning><answer>", 0.4),
    ("<reasoning></answer>", 0.4),
    ("</reasoning><answer>", 0.4),
    ("</reasoning></answer>", 0.4),
    ("<answer></answer>", 0.4),
    ("</answer>42<answer>", 0.4),
    ("</reasoning>a<reasoning>", 0.4),
    ("<reasoning></reasoning><answer>", 0.6),
    ("<reasoning></reasoning></answer>", 0.6),
    ("<reasoning><answer></answer>", 0.6),
    ("</reasoning><answer></answer>", 0.6),
    ("<reasoning>\na\n</reasoning>\n<answer>\n42", 0.6),
    ("a</reasoning><answer>42</answer>", 0.6),
    ("<reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>", 0.8),
    ("<reasoning></reasoning><answer></answer>", 0.8),
    ("</answer><answer></reasoning><reasoning>", 0.8),
    ("<answer>42</answer><reasoning>a</reasoning>", 0.8),
    ("<reasoning><answer></answer></reasoning>", 0.8),
    ("<reasoning><answer></reasoning></answer>", 0.8),
    ("Hi <reasoning>a</reasoning> so <answer>42</answer> bye", 0.8),
    ("<reasoning>a</reasoning><answer>1</answer><answer>2</answer>", 0.8),
    ("\r\n<reasoning>\r\n</reasoning>\r\n<answer>\r\n</answer>", 0.8),
    ("<think><reasoning></reasoning><answer></answer></think>", 0.8),
    # Repetition adds nothing
    ("<answer><answer>", 0.2),
    ("<answer><answer><answer><answer>", 0.2),
    ("</reasoning></reasoning>", 0.2),
    ("<reasoning> <reasoning> </reasoning>", 0.4),
    ("<answer>1</answer><answer>2</answer>", 0.4),
    # Inside other text
    ("x<answer>y", 0.2),
    ("<<answer>>", 0.2),
    ("<ans<answer>wer>", 0.2),
    ("\n<answer>\n", 0.2),
    ("\x00<answer>\x00", 0.2),
    ("思<reasoning>考", 0.2),
    ("'</answer>'", 0.2),
    ("<reasoning></Reasoning>", 0.2),
    ("<reasoning>< /reasoning>", 0.2),
    ("<answer><\\/answer>", 0.2),
    ("<answer>42<answer/>", 0.2),
    # Near misses
    ("<Answer>", 0.0),
    ("<ANSWER></ANSWER>", 0.0),
    ("< answer>", 0.0),
    ("<answer >", 0.0),
    ("<answer\n>", 0.0),
    ("</ answer>", 0.0),
    ("< /answer>", 0.0),
    ("<answer", 0.0),
    ("answer>", 0.0),
    ("/answer>", 0.0),
    ("<answer/>", 0.0),
    ("<answers>", 0.0),
    ("<reason>", 0.0),
    ("<reasonings></reasonings>", 0.0),
    ("<re asoning>", 0.0),
    ("<think></think>", 0.0),
    ("[answer]42[/answer]", 0.0),
    ("&lt;answer&gt;", 0.0),
    ("<\u200banswer>", 0.0),
    ("\uff1canswer\uff1e", 0.0),
    ("<an", 0.0),
]


def test_every_table_has_at_least_sixty_rows():
    tables = [
        COUNTDOWN_FORMAT, COUNTDOWN_STRICT_FORMAT, COUNTDOWN_ANSWERS + COUNTDOWN_COMPLETIONS,
        GSM8K_LAST_NUMBER, GSM8K_SIGNED_FORMAT, GSM8K_ANSWERS + GSM8K_COMPLETIONS, REASONING_TAGS,
    ]
    assert all(len(set(map(str, table))) == len(table) >= 60 for table in tables)


def test_countdown_format_follows_its_rule():
    rows = [(completion, {}, want) for completion, want in COUNTDOWN_FORMAT]
    assert not disagreements(rewards.countdown_format, rows)


def test_countdown_strict_format_follows_its_rule():
    rows = [(completion, {}, want) for completion, want in COUNTDOWN_STRICT_FORMAT]
    assert not disagreements(rewards.countdown_strict_format, rows)


def test_countdown_equation_follows_its_rule():
    rows = [(f"<answer>{answer}</answer>", {"nums": nums, "target": target}, want)
            for answer, nums, target, want in COUNTDOWN_ANSWERS]
    rows += [(completion, {"nums": [2, 3], "target": 5}, want) for completion, want in COUNTDOWN_COMPLETIONS]
    assert not disagreements(rewards.countdown_equation, rows)


def test_gsm8k_last_number_follows_its_rule():
    rows = [(completion, {"answer": answer}, want) for completion, answer, want in GSM8K_LAST_NUMBER]
    assert not disagreements(rewards.gsm8k_last_number, rows)


def test_gsm8k_signed_format_follows_its_rule():
    rows = [(completion, {}, want) for completion, want in GSM8K_SIGNED_FORMAT]
    assert not disagreements(rewards.gsm8k_signed_format, rows)


def test_gsm8k_answer_follows_its_rule():
    rows = [(f"<answer>{text}</answer>", {"answer": answer}, want) for text, answer, want in GSM8K_ANSWERS]
    rows += [(completion, {"answer": "42"}, want) for completion, want in GSM8K_COMPLETIONS]
    assert not disagreements(rewards.gsm8k_answer, rows)


def test_reasoning_tags_follows_its_rule():
    rows = [(completion, {}, want) for completion, want in REASONING_TAGS]
    assert not disagreements(rewards.reasoning_tags, rows)


# ---- A second opinion: slow and obvious formulas on random text --------------------------------------------


def texts(*pieces, shells):
    """Short strings: pieces strung together at random and put into the braces, at most three, of a shell."""
    filling = st.lists(st.sampled_from(pieces), max_size=6).map("".join)
    return st.builds(str.format, st.sampled_from(shells), filling, filling, filling)


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TAGGED = texts(
    *TAGS, *TAGS, "</think>\n<answer>", "\n", " ", "a", "1", "+", "<", "/think>",
    shells=("{}", "{}</think>\n<answer>{}</answer>", "<think>{}</think>{}<answer>{}</answer>"),
)
ANSWER_SHELLS = ("{}", "{}<answer>{}</answer>{}")


@few
@given(TAGGED)
def test_countdown_format_agrees_with_the_regular_expressions_of_its_rule(completion):
    text = "<think>" + completion
    if re.fullmatch(r"<think>.*?</think>\n<answer>.*?</answer>", text, re.DOTALL):
        expected = 1.0
    else:
        think = re.search("<think>.*?</think>", text, re.DOTALL)
        answer = re.search("<answer>.*?</answer>", text, re.DOTALL)
        expected = (0.1 if think else 0.0) + (0.5 if answer else 0.0)
    assert rewards.countdown_format(completion, {}) == expected


@few
@given(TAGGED)
def test_countdown_strict_format_agrees_with_the_regular_expression_of_its_rule(completion):
    rule = r"<think>((?:(?!</?think>).)*)</think>\n<answer>(.*)</answer>"
    match = re.fullmatch(rule, "<think>" + completion, re.DOTALL)
    expected = 0.0
    if match:
        expected = 1.0 if re.fullmatch(r"\s*[0-9+*/().-][0-9+*/().\s-]*", match[2]) else 0.5
    assert rewards.countdown_strict_format(completion, {}) == expected


@few
@given(TAGGED)
def test_gsm8k_signed_format_agrees_with_the_regular_expression_of_its_rule(completion):
    matches = re.fullmatch(r"<think>.*?</think>[\n ]*<answer>.*?</answer>", completion, re.DOTALL)
    once = [completion.count(tag) for tag in TAGS] == [1, 1, 1, 1]
    assert rewards.gsm8k_signed_format(completion, {}) == (1.25 if matches and once else -1.0)


@few
@given(texts("<answer>", "</answer>", "2+3", "2*3", " ", "\n", shells=("{}", "{}<answer>2+3</answer>{}")))
def test_countdown_equation_reads_what_a_lazy_search_finds_first(completion):
    match = re.search("<answer>(.*?)</answer>", completion, re.DOTALL)
    expected = 1.0 if match and match[1].strip(" ") == "2+3" else 0.0
    assert rewards.countdown_equation(completion, {"nums": [2, 3], "target": 5}) == expected


EXPRESSIONS = st.recursive(
    st.integers(0, 12).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " - ", " / "]), inner).map("".join),
        inner.map("({})".format), inner.map("-{}".format), inner.map("+{}".format)),
    max_leaves=6,
)


def python_value(expression):
    """What Python's eval makes of the expression, every number a Fraction; None if that is no Fraction."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "'tuple' object is not callable"
        try:
            value = eval(re.sub("[0-9]+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})
        except (SyntaxError, TypeError, ZeroDivisionError):
            return None
    return value if isinstance(value, Fraction) else None


@few
@given(EXPRESSIONS, st.integers(-3, 3))
def test_countdown_equation_agrees_with_python_on_generated_expressions(expression, offset):
    assume(len(expression) <= rewards.MAX_EXPRESSION_CHARS)
    value = python_value(expression)
    nums = [int(digits) for digits in re.findall("[0-9]+", expression)]
    target = offset + (0 if value is None else round(value))
    expected = 1.0 if value is not None and abs(value - target) < 1e-5 else 0.0
    example = {"nums": nums[::-1], "target": target}
    completion = f"<answer>{expression}</answer>"
    assert rewards.countdown_equation(completion, example) == expected
    assert rewards.countdown_equation(completion, {**example, "nums": [*nums, 1]}) == 0.0


@many
@given(st.text("0123+-*/() ", max_size=9))
def test_evaluate_agrees_with_python_on_random_arithmetic_characters(expression):
    expected = None if "**" in expression or "//" in expression else python_value(expression)
    if expected is None:
        with pytest.raises(ValueError):
            rewards.arithmetic_value(expression)
    else:
        assert rewards.arithmetic_value(expression) == expected


@many
@given(st.text("0123./- a", max_size=12))
def test_gsm8k_last_number_finds_what_the_original_pattern_finds(completion):
    numbers = re.findall(r"\d+\.\d+|\d+/\d+|\d+", completion)
    try:
        last = Fraction(numbers[-1])
    except (IndexError, ZeroDivisionError):
        last = None
    for answer in (0, 1, 2, 3, Fraction(1, 2), last):
        expected = 1.0 if last is not None and answer == last else -1.0
        assert rewards.gsm8k_last_number(completion, {"answer": str(answer)}) == expected


@many
@given(texts("<answer>", "</answer>", "1", "2", ".2", "-1.2", ",", " ", shells=ANSWER_SHELLS))
def test_gsm8k_answer_agrees_with_splitting_at_the_tags(completion):
    expected, parts = 0.0, completion.split("<answer>")
    if len(parts) > 1 and "</answer>" in parts[-1]:
        inside = parts[-1].split("</answer>")[0]
        numbers = re.findall(r"-?\d*\.?\d+", inside)
        value = float(numbers[0]) if len(numbers) == 1 else None
        expected = 2.0 if inside.strip() == "-1.2" else 1.5 if value == -1.2 else 0.0
    assert rewards.gsm8k_answer(completion, {"answer": "-1.2"}) == expected


# ---- Hostile completions -----------------------------------------------------------------------------------

SIZE = 100_000
EXAMPLE = {"nums": [2, 3, 4], "target": 24, "answer": "24"}
SHIPPED = list(rewards.REWARDS.values())
REPEATED = [
    "<think>", "</think>", "<answer>", "</answer>", "<reasoning>", "</reasoning>", "</think>\n<answer>",
    "</think><answer>", "<think></think>", "<answer></answer>", "</answer><answer>", "<answer>1", "<answer",
    "<", "</", "<think>a</think>\n<answer>1</answer>", "\n", " ", "\n ", "\r\n", "\t", "\u00a0", "a",
    "\x00", "\ud800", "\udc00", "9", "0", "1.", "1/", "1 ", "1,", "1.1", "1/1/", "-", "-1", "-.", ".", "..5",
    "+", "1+", "9*", "9**", "(", ")", "()", "(1", "1(", "((1+", "(-", "[", "{", "1_0", "0x1", "1e9",
    "\u0663", "\uff13", "\u2212", "\u00d7", "\u00bd",
]
EXPRESSION_TRAPS = [
    "99**98**97", "9" * 5000, "-" + "9" * 5000, "9" * 199, "9" * 5000 + "/" + "3" * 5000,
    "0." + "3" * 5000, "(" * 50_000, "(" * 25_000 + "1" + ")" * 25_000, "(" * 99 + "1" + ")" * 99, "(" * 200,
    "-" * 199 + "1", "1" + "+1" * 99, "1" + "/1" * 99, "9*" * 99 + "9", "(-" * 66 + "1" + ")" * 66,
    "1(" * 100, "(1)(2)", "1()", "()()", "1(*2)", "*1", "1 2", "1//0", "1/0", "0/0", "1/(1-1)", "0**-1",
    "007", "00", "1_000", "0x10", "0b1", "1e308*10", "1j", "1.5", "1 if 1 else 2",
    "__import__('os').abort()", "exit()", "\u0663+\u0664", "4\u22122", "1\x002", "1\ud800", "2\r\n*3*4",
    "2*3*4\\", "#", "'", '"""', "\\N{DIGIT ONE}", "", " ", "\n",
]
SHAPES = [
    "{}", "x</think>\n<answer>{}</answer>", "{}</think>\n<answer>2*3*4</answer>",
    "<think>{}</think>\n<answer>24</answer>", "<think>x</think>{}<answer>24</answer>", "<answer>{}",
    "{}<answer>24</answer>{}",
]


def hostile_completions():
    fillings = [piece * SIZE for piece in REPEATED] + EXPRESSION_TRAPS
    for shape in SHAPES:
        room = (SIZE - len(shape)) // shape.count("{}")
        for filling in fillings:
            yield shape.format(filling[:room], filling[:room])


def assert_harmless(reward, completion):
    result = reward(completion, EXAMPLE)
    assert isinstance(result, float) and math.isfinite(result)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reward", SHIPPED, ids=lambda reward: reward.__name__)
def test_no_hostile_completion_raises_prints_or_takes_long(reward, capfd):
    def seconds(completion):
        start = time.perf_counter()
        assert_harmless(reward, completion)
        return time.perf_counter() - start

    for completion in hostile_completions():
        # The best of three, so that a busy machine doesn't fail the test.
        assert any(seconds(completion) <= 0.05 for _ in range(3)), (completion[:60], len(completion))
    assert capfd.readouterr() == ("", "")


ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reward", SHIPPED, ids=lambda reward: reward.__name__)
@few
@given(completion=st.one_of(TAGGED, ANY_TEXT, ANY_TEXT.map("<answer>{}</answer>".format)))
def test_any_text_gets_a_finite_score(reward, completion):
    assert_harmless(reward, completion)


def test_an_answer_of_more_than_200_characters_scores_nothing():
    example = {"nums": [5], "target": 5}
    assert rewards.countdown_equation(f"<answer>{'5':>200}</answer>", example) == 1.0
    assert rewards.countdown_equation(f"<answer>{'5':>201}</answer>", example) == 0.0


def test_a_number_of_more_than_100_characters_equals_no_answer():
    short, long = "24." + "0" * 97, "24." + "0" * 98
    assert rewards.gsm8k_last_number(short, {"answer": "24"}) == 1.0
    assert rewards.gsm8k_last_number(long, {"answer": "24"}) == -1.0
    assert rewards.gsm8k_answer(f"<answer>{short}</answer>", {"answer": "24"}) == 1.5
    assert rewards.gsm8k_answer(f"<answer>{long}</answer>", {"answer": "24"}) == 0.0


@pytest.mark.parametrize("expression", ["2**3", "7//2", "1(2)", "x", "1.5", "1/0", "007", "", "(", "1" * 201])
def test_evaluate_refuses_with_a_value_error(expression):
    with pytest.raises(ValueError):
        rewards.arithmetic_value(expression)


# ---- score -------------------------------------------------------------------------------------------------

COUNTDOWN = {"nums": [3, 3, 8, 8], "target": 24}
RIGHT = "so</think>\n<answer>8/(3-8/3)</answer>"


def one_line(raised):
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_the_total_is_the_weighted_sum_and_the_parts_are_unweighted_in_order():
    weights = {"countdown_equation": 1.0, "countdown_format": 0.1, "gsm8k_signed_format": 0.0}
    total, parts = rewards.score(RIGHT, COUNTDOWN, weights)
    assert total == pytest.approx(1.1)
    assert parts == {"countdown_equation": 1.0, "countdown_format": 1.0, "gsm8k_signed_format": -1.0}
    assert list(parts) == list(weights)


def test_a_negative_weight_subtracts():
    total, parts = rewards.score(RIGHT, COUNTDOWN, {"countdown_equation": 1.0, "gsm8k_signed_format": -2.0})
    assert total == 3.0
    assert parts == {"countdown_equation": 1.0, "gsm8k_signed_format": -1.0}


def test_no_weights_make_a_total_of_zero():
    total, parts = rewards.score(RIGHT, COUNTDOWN, {})
    assert (total, parts) == (0.0, {}) and type(total) is float


@pytest.mark.parametrize("result", [True, False, 3, -0.5, Fraction(1, 2)])
def test_bools_and_other_numbers_count_as_floats(result):
    rewards.REWARDS["custom"] = lambda completion, example: result
    total, parts = rewards.score("", {}, {"custom": 2.0})
    assert (total, parts) == (2 * float(result), {"custom": float(result)})
    assert type(total) is type(parts["custom"]) is float


def test_numpy_scalars_count_as_floats():
    numpy = pytest.importorskip("numpy")
    for scalar in (numpy.float32(0.5), numpy.int64(3), numpy.bool_(True), numpy.array(0.25)):
        rewards.REWARDS["custom"] = lambda completion, example, scalar=scalar: scalar
        assert type(rewards.score("", {}, {"custom": 1.0})[1]["custom"]) is float


@pytest.mark.parametrize("result", [math.nan, math.inf, -math.inf, None, "1.0", b"1", [1.0], {}, 1j])
def test_a_result_that_is_no_finite_number_is_an_error_that_shows_it(result):
    rewards.REWARDS["custom"] = lambda completion, example: result
    with pytest.raises(rewards.RewardError) as raised:
        rewards.score("text", COUNTDOWN, {"countdown_format": 1.0, "custom": 1.0})
    message = one_line(raised)
    assert "'custom'" in message and repr(result) in message and "finite number" in message
    assert "'target': 24" in message


def test_an_integer_too_large_for_a_float_is_an_error():
    rewards.REWARDS["custom"] = lambda completion, example: 10**400
    with pytest.raises(rewards.RewardError, match="'custom' raised OverflowError"):
        rewards.score("text", {}, {"custom": 1.0})


def test_a_reward_that_raises_is_named_with_its_error_and_the_shortened_example():
    def broken(completion, example):
        raise KeyError("two\nlines")

    rewards.REWARDS["custom"] = broken
    with pytest.raises(rewards.RewardError) as raised:
        rewards.score("text", {"target": 24, "question": "why? " * 10_000}, {"custom": 1.0})
    message = one_line(raised)
    assert "'custom' raised KeyError" in message and "'target': 24" in message and "why?" in message
    assert len(message) < 500
    assert isinstance(raised.value.__cause__, KeyError)
    assert isinstance(raised.value, ValueError)


def test_an_example_without_what_the_reward_needs_is_an_error_that_shows_it():
    with pytest.raises(rewards.RewardError) as raised:
        rewards.score(RIGHT, {"answer": "24"}, {"countdown_equation": 1.0})
    message = one_line(raised)
    assert "'countdown_equation' raised KeyError: 'target'" in message and "{'answer': '24'}" in message


def test_scoring_with_an_unknown_name_is_an_error_that_suggests_the_nearest():
    with pytest.raises(rewards.RewardError, match="did you mean 'countdown_format'"):
        rewards.score(RIGHT, COUNTDOWN, {"countdown_fromat": 1.0})


def test_an_interrupt_is_not_swallowed():
    def interrupted(completion, example):
        raise KeyboardInterrupt

    rewards.REWARDS["custom"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        rewards.score("text", {}, {"custom": 1.0})


# ---- parse_rewards -----------------------------------------------------------------------------------------


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from fractions import Fraction\n"
        "SCALE = 10\n"
        "@dataclass\n"
        "class Longest:\n"
        "    limit: int\n"
        "    def __call__(self, completion, example):\n"
        "        return len(completion) <= self.limit\n"
        "def brevity(completion, example):\n"
        "    return -len(completion) / SCALE\n"
        "def shouting(completion, example):\n"
        "    return completion.isupper()\n"
        "at_most_five = Longest(5)\n"
    )
    return path


def refusal(*specs):
    with pytest.raises(ValueError) as raised:
        rewards.parse_rewards(list(specs))
    return one_line(raised)


def test_the_seven_rewards_are_there_by_name():
    assert list(rewards.REWARDS) == [
        "countdown_format", "countdown_strict_format", "countdown_equation",
        "gsm8k_last_number", "gsm8k_signed_format", "gsm8k_answer", "reasoning_tags",
    ]


def test_names_and_weights_are_parsed_in_order():
    specs = ["reasoning_tags:0", "countdown_format:0.1", "gsm8k_answer:-2", "countdown_equation"]
    weights = rewards.parse_rewards(specs)
    assert list(weights) == ["reasoning_tags", "countdown_format", "gsm8k_answer", "countdown_equation"]
    assert list(weights.values()) == [0.0, 0.1, -2.0, 1.0]
    assert rewards.parse_rewards([]) == {}


def test_a_function_from_a_file_joins_the_rewards(reward_file):
    specs = [f"{reward_file}:brevity", f"{reward_file}:shouting:0.5", "countdown_format:0.1"]
    weights = rewards.parse_rewards(specs)
    assert weights == {"my_rewards.brevity": 1.0, "my_rewards.shouting": 0.5, "countdown_format": 0.1}
    total, parts = rewards.score("HELLO", {}, weights)
    assert parts == {"my_rewards.brevity": -0.5, "my_rewards.shouting": 1.0, "countdown_format": 0.0}
    assert total == 0.0


def test_a_callable_object_and_a_relative_path_work_too(reward_file, monkeypatch):
    monkeypatch.chdir(reward_file.parent)
    weights = rewards.parse_rewards(["my_rewards.py:at_most_five:2"])
    assert rewards.score("HELLO", {}, weights) == (2.0, {"my_rewards.at_most_five": 1.0})


def test_a_reward_file_takes_no_other_modules_place(tmp_path):
    (tmp_path / "json.py").write_text("def nothing(completion, example):\n    return 0\n")
    rewards.parse_rewards([f"{tmp_path / 'json.py'}:nothing"])
    import json
    assert json.loads("[1]") == [1]


def test_an_unknown_name_is_refused_with_the_nearest_and_all_names():
    message = refusal("countdown_format", "countdwn_equation:2")
    assert "'countdwn_equation'" in message and "did you mean 'countdown_equation'?" in message
    assert all(name in message for name in rewards.REWARDS) and "path/to/file.py:function" in message


def test_a_name_like_no_other_is_refused_without_a_suggestion():
    message = refusal("zzz")
    assert "'zzz'" in message and "did you mean" not in message and "gsm8k_answer" in message


@pytest.mark.parametrize("weight", ["abc", "nan", "inf", "-inf", "", "1,5", "0.5:2", "1e999"])
def test_a_weight_that_is_no_finite_number_is_refused(weight, reward_file):
    for reward in ("countdown_format", f"{reward_file}:brevity"):
        message = refusal(f"{reward}:{weight}")
        assert repr(f"{reward}:{weight}") in message and "finite number" in message
        assert f"like {reward}:0.5" in message


def test_two_files_of_one_name_are_both_used(tmp_path, monkeypatch):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"def f(completion, example):\n    return {value}\n")
    monkeypatch.chdir(tmp_path)
    weights = rewards.parse_rewards(["a/mine.py:f", f"{tmp_path}/b/mine.py:f:0.5"])
    assert weights == {"mine.f": 1.0, f"{tmp_path}/b/mine.f": 0.5}
    assert rewards.score("", {}, weights) == (2.0, {"mine.f": 1.0, f"{tmp_path}/b/mine.f": 2.0})
    for again in ("a/mine.py:f", f"{tmp_path}/b/../a/mine.py:f", "b/mine.py:f"):
        with pytest.raises(rewards.RewardError, match="given twice"):
            rewards.parse_rewards(["a/mine.py:f", f"{tmp_path}/b/mine.py:f:0.5", again])
    assert rewards.score("", {}, rewards.parse_rewards(["b/mine.py:f"])) == (2.0, {"mine.f": 2.0})


def test_the_same_reward_twice_is_refused(reward_file):
    message = refusal("countdown_format", "countdown_format:0.1")
    assert "'countdown_format' is given twice" in message
    assert "drop 'countdown_format:0.1'" in message
    message = refusal(f"{reward_file}:brevity", f"{reward_file}:brevity:2")
    assert "'my_rewards.brevity' is given twice" in message


def test_a_missing_file_is_refused(tmp_path):
    path = str(tmp_path / "none.py")
    message = refusal(f"{path}:brevity")
    assert f"no file {path!r}" in message and "path/to/file.py:function" in message
    (tmp_path / "folder.py").mkdir()
    assert "no file" in refusal(f"{tmp_path / 'folder.py'}:brevity")


@pytest.mark.parametrize(("source", "problem"), [
    ("def broken(:\n", "SyntaxError"),
    ("import no_such_module_anywhere\n", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    ("1 / 0\n", "ZeroDivisionError: division by zero"),
    ("raise ValueError('two\\nlines')\n", "ValueError: two lines"),
    ("raise SystemExit(3)\n", "SystemExit: 3"),
    ("\x00", ""),
])
def test_a_file_that_fails_to_import_is_refused_with_its_error(source, problem, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(source)
    message = refusal(f"{path}:brevity")
    assert repr(str(path)) in message and problem in message and f"make it run: python {path}" in message


def test_a_function_not_in_the_file_is_refused_with_those_that_are(reward_file):
    message = refusal(f"{reward_file}:brevty")
    assert f"'brevty' is no function in '{reward_file}'" in message
    assert f"type one of: {reward_file}:brevity, {reward_file}:shouting" in message
    assert "Fraction" not in message and "dataclass" not in message


def test_a_file_without_a_function_name_is_refused_with_its_functions(reward_file):
    assert f"type one of: {reward_file}:brevity" in refusal(str(reward_file))
    assert f"type one of: {reward_file}:brevity" in refusal(f"{reward_file}:0.5")


def test_something_not_callable_is_refused_with_the_functions_of_the_file(reward_file, tmp_path):
    message = refusal(f"{reward_file}:SCALE")
    assert f"'SCALE' is no function in '{reward_file}'" in message and f"{reward_file}:shouting" in message
    (tmp_path / "empty.py").write_text("")
    assert "it has no functions" in refusal(f"{tmp_path / 'empty.py'}:brevity")


def test_an_error_leaves_no_half_loaded_reward_behind(reward_file):
    refusal(f"{reward_file}:SCALE")
    assert not [name for name in rewards.REWARDS if name.startswith("my_rewards")]
