"""Rewards: tables worked out by hand, naive formulas beside them, hostile completions, and the ways in.

The expected scores in the tables were worked out from the rules, not by running the code. Slow and obvious
regular expressions, and Python's own `eval` on Fractions, serve as the second opinion on random text.
"""

import asyncio
import functools
import math
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

import rewards

# No time limit per example: a busy machine would miss it.
few, many = (settings(deadline=None, max_examples=count) for count in (200, 1000))


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
    ("-3", "-3", 1.0),
    ("3", "-3", -1.0),
    ("The answer is -3.", "-3", 1.0),
    ("The answer is \u22123.", "-3", 1.0),
    ("-$3", "-3", 1.0),
    ("$-3", "-3", 1.0),
    ("5-3", "-3", 1.0),
    ("5-3", "3", 1.0),
    ("5 - 3", "-3", -1.0),
    ("-3 or 3", "-3", -1.0),
    ("-1/2", "-0.5", 1.0),
    ("-4", "-3", -1.0),
    ("-0", "0", 1.0),
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
    ("\u221242", "42", 0.0),
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
    ("\u221242", "-42", 1.5),
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
def test_countdown_strict_format_agrees_with_splitting_at_the_turn(completion):
    reasoning, turn, rest = completion.partition("</think>\n<answer>")
    expected = 0.0
    if turn and rest.endswith("</answer>") and "<think>" not in reasoning and "</think>" not in reasoning:
        answer = rest.removesuffix("</answer>")
        plain = all(x in "0123456789+-*/()." or x.isspace() for x in answer)
        expected = 1.0 if plain and answer.strip() else 0.5
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
    assume(len(expression) <= 200)
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
    for answer in (0, 1, 2, 3, Fraction(1, 2), last or 0):
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


@pytest.mark.parametrize("gold, right, wrong", [
    ("-5", ["\u22125", "-$5", " -5.0 "], ["5", "$5", "--5 5"]),
    ("5", ["$5", "5.0 apples"], ["\u22125", "-$5", "-5"]),
])
def test_gsm8k_answer_reads_every_minus_sign(gold, right, wrong):
    paid = lambda text: rewards.gsm8k_answer(f"<answer>{text}</answer>", {"answer": gold})
    assert {paid(text) for text in right} == {1.5} and {paid(text) for text in wrong} == {0.0}


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


# ---- What the prompt has opened ----------------------------------------------------------------------------

OPENED = [  # reward, opened (None: no such key), completion, expected
    ("countdown_format", None, "a</think>\n<answer>1</answer>", 1.0),
    ("countdown_format", "<think>", "a</think>\n<answer>1</answer>", 1.0),
    ("countdown_format", "", "a</think>\n<answer>1</answer>", 0.5),
    ("countdown_format", "", "<think>a</think>\n<answer>1</answer>", 1.0),
    ("countdown_format", "", "so <think>a</think>\n<answer>1</answer>", 0.6),
    ("countdown_format", "", "</think><think>", 0.0),
    ("countdown_strict_format", None, "a</think>\n<answer>1</answer>", 1.0),
    ("countdown_strict_format", "<think>", "a</think>\n<answer>1</answer>", 1.0),
    ("countdown_strict_format", "<think>", "<think>a</think>\n<answer>1</answer>", 0.0),
    ("countdown_strict_format", "", "a</think>\n<answer>1</answer>", 0.0),
    ("countdown_strict_format", "", "<think>a</think>\n<answer>1</answer>", 1.0),
    ("countdown_strict_format", "", "so <think>a</think>\n<answer>1</answer>", 0.0),
    ("gsm8k_signed_format", None, "a</think><answer>1</answer>", -1.0),
    ("gsm8k_signed_format", "", "<think>a</think><answer>1</answer>", 1.25),
    ("gsm8k_signed_format", "<think>", "a</think><answer>1</answer>", 1.25),
    ("gsm8k_signed_format", "<think>", "<think>a</think><answer>1</answer>", -1.0),
    ("countdown_equation", "<answer>", "2*3*4</answer>", 1.0),
    ("countdown_equation", "", "2*3*4</answer>", 0.0),
    ("gsm8k_answer", "<answer>", "24</answer>", 2.0),
    ("gsm8k_answer", "<think>", "a</think><answer>24</answer>", 2.0),
    ("gsm8k_answer", "", "24</answer>", 0.0),
    ("reasoning_tags", "<reasoning>", "a</reasoning><answer>1</answer>", 0.8),
    ("reasoning_tags", "", "a</reasoning><answer>1</answer>", 0.6),
    ("reasoning_tags", None, "a</reasoning><answer>1</answer>", 0.6),
]


@pytest.mark.parametrize(("name", "opened", "completion", "expected"), OPENED)
def test_what_the_prompt_has_opened_counts_as_the_answers(name, opened, completion, expected):
    example = EXAMPLE if opened is None else {**EXAMPLE, "opened": opened}
    assert rewards.REWARDS[name](completion, example) == expected


# ---- Right answers of any type -----------------------------------------------------------------------------

NUMBERS = [
    (7, "7"), (-7, "-7"), (0.1, "1/10"), (-0.5, "-1/2"), (1e22, "1" + "0" * 22),
    (1e-7, "1/10000000"),
    (Decimal("0.10"), "1/10"), (Decimal("1E+3"), "1000"), (Fraction(1, 3), "1/3"), (10**40, str(10**40)),
    ("0.1", "1/10"), ("0.10", "1/10"), (" 42 ", "42"), ("+5", "5"), (".5", "1/2"), ("5.", "5"), ("007", "7"),
    ("1/2", "1/2"), ("-3/4", "-3/4"), ("1e3", "1000"), ("1,000", "1000"), ("1,234,567.5", "2469135/2"),
    ("$18", "18"), ("-$1,000", "-1000"), ("$-5", "-5"), ("€ 12", "12"), ("12 €", "12"), ("£3.50", "7/2"),
    ("₹1,000", "1000"), ("50%", "50"), ("-2.5 %", "-5/2"), ("\u22123", "-3"),
]
NO_NUMBERS = [
    None, "", " ", "words", "18 apples", "1 or 2", "0,5", "1,00", "1,0000", "0,500", ",5", "1_000", "7/0",
    "1//2", "1.2.3", ".", "--3", "nan", "inf", math.nan, math.inf, True, [5], {"a": 5}, "\u0663", "\uff13",
    "1e9999", "1e999999999", "9" * 101, "$", "%", "0x10",
]


@pytest.mark.parametrize(("value", "exact"), NUMBERS, ids=repr)
def test_a_right_answer_is_read_as_it_is_written(value, exact):
    assert rewards.exact_number(value) == Fraction(exact)
    right = f"It is {'-' * exact.startswith('-')}{exact.lstrip('-')}"
    assert rewards.gsm8k_last_number(right, {"answer": value}) == 1.0
    assert rewards.gsm8k_last_number("It is 41", {"answer": value}) == -1.0
    assert rewards.gsm8k_answer(f"<answer>{value}</answer>", {"answer": value}) == 2.0


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:20])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError):
        rewards.exact_number(value)
    with pytest.raises(ValueError):
        rewards.gsm8k_last_number("7", {"answer": value})


@few
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-10**9, max_value=10**9))
def test_a_number_with_commas_and_signs_is_the_number_without(number):
    written = f"{abs(number):,}"
    for text in (written, f"${written}", f"{written} €", f"{written}%"):
        text = "-" * (number < 0) + text
        assert rewards.exact_number(text) == rewards.exact_number(number) == Fraction(number)


def test_gsm8k_answer_takes_numbers_of_any_type_and_words():
    for gold in (42, 42.0, Decimal("42.00"), "42 ", "$42", "42%"):
        assert rewards.gsm8k_answer("<answer>42.000</answer>", {"answer": gold}) == 1.5
        assert rewards.gsm8k_answer("<answer>41</answer>", {"answer": gold}) == 0.0
    assert rewards.gsm8k_answer("<answer> 1,000 </answer>", {"answer": "1,000"}) == 2.0
    assert rewards.gsm8k_answer("<answer>1000</answer>", {"answer": "1,000"}) == 1.5
    assert rewards.gsm8k_answer("<answer>Paris</answer>", {"answer": "Paris"}) == 2.0
    assert rewards.gsm8k_answer("<answer>3</answer>", {"answer": "Paris 3"}) == 0.0


def test_countdown_takes_numbers_of_any_type():
    for nums, target in (([2.0, 3.0], 6.0), ([Decimal(2), Decimal(3)], Decimal("6.0")), (["2", "3"], "6")):
        assert rewards.countdown_equation("<answer>2*3</answer>", {"nums": nums, "target": target}) == 1.0


class Row(dict):
    where = ""


def rows(*examples):
    found = [Row(example) for example in examples]
    for number, row in enumerate(found, start=1):
        row.where = f"mine.csv, row {number}"
    return found


@pytest.mark.parametrize(("spec", "bad", "told"), [
    ("gsm8k_last_number", {"answer": None}, "None is no number"),
    ("gsm8k_last_number", {"answer": "words"}, "'words' is no number"),
    ("gsm8k_last_number", {"solution": "7"}, "KeyError('answer')"),
    ("gsm8k_answer", {"answer": None}, "None is no answer"),
    ("gsm8k_answer", {"answer": " "}, "' ' is no answer"),
    ("gsm8k_answer", {"solution": "7"}, "KeyError('answer')"),
    ("countdown_equation", {"nums": [1, 2]}, "KeyError('target')"),
    ("countdown_equation", {"target": 3}, "KeyError('nums')"),
    ("countdown_equation", {"nums": None, "target": 3}, "TypeError"),
    ("countdown_equation", {"nums": [1, "x"], "target": 3}, "'x' is no number"),
])
def test_a_row_that_a_reward_cannot_read_is_refused_before_the_run(spec, bad, told):
    good = {"answer": "$1,000", "nums": [1, 2], "target": 3}
    loaded = rewards.load_rewards(["reasoning_tags", f"{spec}:0.5"])
    rewards.check_rows(loaded, rows(*[good] * 40))
    with pytest.raises(rewards.RewardError) as raised:
        rewards.check_rows(loaded, rows(*[good] * 36, bad, good))
    message = one_line(raised)
    assert message.startswith(f"reward {spec!r} raised ") and "; mine.csv, row 37; " in message
    assert told in message and f"columns: {', '.join(bad)};" in message
    with pytest.raises(rewards.RewardError, match="; example 2; "):
        rewards.check_rows(loaded, [good, bad])


def test_rewards_that_need_no_column_and_rewards_of_your_own_are_not_asked():
    loaded = rewards.load_rewards(["reasoning_tags", "gsm8k_signed_format", "countdown_format"])
    rewards.check_rows({**loaded, "mine.f": (lambda completion, example: 1 / 0, 1.0)}, [{}])


# ---- score_batch -------------------------------------------------------------------------------------------

COUNTDOWN = {"nums": [3, 3, 8, 8], "target": 24}
RIGHT = "so</think>\n<answer>8/(3-8/3)</answer>"
SIGNATURES = ("(completion, example) -> float", "(completions, **columns) -> list[float]")


def one_line(raised):
    message = str(raised.value)
    assert "\n" not in message and len(message) < 900
    return message


def scores(function, completions=("a", "bb"), prompts=None, examples=None, completion_ids=None):
    """A function's scores of a batch, as parts and as sums of weight 2."""
    prompts, examples = prompts or ["p"] * len(completions), examples or [{} for _ in completions]
    loaded = {"mine.f": (function, 2.0)}
    scored = rewards.score_batch(loaded, prompts, list(completions), examples, completion_ids)
    parts = [parts["mine.f"] for _, parts in scored]
    assert [total for total, _ in scored] == [2 * (part or 0.0) for part in parts]
    assert all(type(x) is float for part in parts for x in [part] if x is not None)
    return parts


def refused(function, *told, **batch):
    """A function's error: one line with its name, the two signatures and what else is asked for."""
    with pytest.raises(rewards.RewardError) as raised:
        scores(function, **batch)
    message = one_line(raised)
    assert message.startswith("reward 'mine.f' ") and all(x in message for x in (*SIGNATURES, *told)), message
    return raised.value


def test_the_total_is_the_weighted_sum_and_the_parts_are_unweighted_in_order():
    specs = ["countdown_equation", "countdown_format:0.1", "gsm8k_signed_format:0", "reasoning_tags:-2"]
    loaded = rewards.load_rewards(specs)
    scored = rewards.score_batch(loaded, ["p", "p"], [RIGHT, "<answer>"], [COUNTDOWN] * 2)
    assert scored[0][0] == pytest.approx(1 + 0.1 - 2 * 0.4) and scored[1][0] == pytest.approx(-2 * 0.2)
    assert scored[0][1] == {"countdown_equation": 1.0, "countdown_format": 1.0, "gsm8k_signed_format": -1.0,
                            "reasoning_tags": 0.4}
    assert [list(parts) for _, parts in scored] == [list(loaded)] * 2


def test_no_rewards_make_a_total_of_zero_and_no_answers_make_none():
    assert rewards.score_batch({}, ["p"], ["a"], [{}]) == [(0.0, {})]
    called = []
    both = {"a": (lambda completion, example: called.append(1), 1.0), "b": (lambda completions: called, 1.0)}
    assert rewards.score_batch(both, [], [], []) == [] == called


@pytest.mark.parametrize("result", [True, False, 3, -0.5, Fraction(1, 2), Decimal("0.25")])
def test_bools_and_other_numbers_count_as_floats(result):
    assert scores(lambda completion, example: result) == [float(result)] * 2
    assert scores(lambda completions: (result, 1)) == [float(result), 1.0]


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # torch's advice to the function
def test_numbers_arrays_and_tensors_of_numpy_and_torch_count():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    for scalar in (numpy.float32(0.5), numpy.int64(3), numpy.bool_(True), numpy.array(0.25),
                   torch.tensor(0.5), torch.tensor(True), torch.tensor(0.5, dtype=torch.bfloat16)):
        assert scores(lambda completion, example, x=scalar: x) == [float(scalar)] * 2
        assert scores(lambda completions, x=scalar: [x, 1]) == [float(scalar), 1.0]
    for batch in (numpy.array([0.5, 1]), numpy.array([True, False]),
                  torch.tensor([0.5, 1]), torch.tensor([1, 0]), torch.tensor([0.5, 1], dtype=torch.bfloat16),
                  torch.ones(2, requires_grad=True)):
        assert scores(lambda completions, x=batch: x) == [float(x) for x in batch.tolist()]


@pytest.mark.parametrize("result", [math.nan, math.inf, -math.inf, "1.0", b"1", [1.0], {}, 1j])
def test_a_result_that_is_no_finite_number_is_an_error_that_names_the_answer(result):
    told = f"returned {result!r}, not a finite number"
    refused(lambda completion, example: result if completion == "bb" else 1.0, told, "'bb'")
    refused(lambda completions: [1.0, result], told, "'bb'")


def test_an_integer_too_large_for_a_float_is_an_error():
    refused(lambda completion, example: 10**400, "raised OverflowError", "'a'")
    refused(lambda completions: [10 ** (400 * (x == "bb")) for x in completions], "OverflowError", "'bb'")


def test_none_is_no_score_of_one_answer_and_a_missing_one_of_a_batch():
    refused(lambda completion, example: None, "returned None", "'a'")
    assert scores(lambda completions: [None, 1.0]) == [None, 1.0]
    loaded = {"a": (lambda completions: [None], 2.0), "b": (lambda completions: [0.5], 3.0)}
    scored = rewards.score_batch(loaded, ["p"], ["x"], [{}])
    assert scored == [(1.5, {"a": None, "b": 0.5})]


def test_results_without_an_order_are_an_error():
    refused(lambda completions: {0: 1.0, 1: 0.5}, "returned {0: 1.0, 1: 0.5}, not a finite number")
    refused(lambda completions: {1.0, 0.5}, ", not a finite number")


@pytest.mark.parametrize("reward, parameter", [
    (lambda completion, answer: 1.0, "answer"), (lambda prompt, completion: 1.0, "prompt"),
    (lambda example, completion: 1.0, "example"), (lambda text, completion: 1.0, "completion"),
])
def test_a_parameter_with_the_name_of_another_value_is_an_error(reward, parameter):
    rows = [{"prompt": "p", "answer": "4"}] * 2
    refused(reward, f"has a parameter '{parameter}' where it gets another value", examples=rows)
    for fine in (lambda answer, row, strict=True: 2 * len(answer), lambda text, example: 2 * len(text)):
        assert scores(fine, examples=rows) == [2.0, 4.0]


@pytest.mark.parametrize("result", [
    [], [1.0], [1.0] * 3, (1,), "one", None, 0.5, {}, [[1.0], [1.0]], [1.0, "1"],
])
def test_a_batch_of_another_length_or_kind_is_an_error(result):
    refused(lambda completions: result)
    if isinstance(result, list) and len(result) != 2:
        refused(lambda completions: result, f"returned {len(result)} scores for 2 answers")


def test_a_reward_that_raises_is_named_with_its_error_and_the_shortened_answer():
    def broken(completion, example):
        return 1 / (len(completion) - 2)

    error = refused(broken, "raised ZeroDivisionError('division by zero')", "; answer: 'bb'",
                    "columns: target, question", examples=[{"target": 24, "question": "why? " * 10_000}] * 2)
    assert isinstance(error.__cause__, ZeroDivisionError) and isinstance(error, ValueError)
    refused(lambda completion, example: completion.nothing, "AttributeError", "'" + "x" * 100,
            completions=["x" * 10_000])
    refused(lambda completion, example: example["two\nlines"], "KeyError('two\\nlines')")


def test_a_batched_reward_that_raises_is_told_with_the_first_answer_and_one_that_stops_with_its_own():
    def broken(completions, prompts, answer, completion_ids):
        assert len(completions) == len(prompts) == len(answer) == len(completion_ids)
        return [1 / (len(text) - 2) for text in completions]

    def one_by_one(completions):
        return (1 / (len(text) - 2) for text in completions)

    batch = {"completions": ["a", "bbb", "bb", "c"], "completion_ids": [[1], [2], [3], [4]],
             "examples": [{"answer": i} for i in range(4)]}
    refused(broken, "raised ZeroDivisionError", "; example 1; ", "; first answer: 'a'", **batch)
    refused(one_by_one, "raised ZeroDivisionError", "; example 3; ", "; answer: 'bb'", **batch)


@pytest.mark.parametrize("leave", [sys.exit, lambda: sys.exit("bye"), lambda: sys.exit(0)])
def test_a_reward_that_exits_does_not_end_the_run_without_a_word(leave):
    async def later(completions):
        await asyncio.sleep(0)
        leave()

    refused(lambda completion, example: leave(), "raised SystemExit", "'a'")
    refused(lambda completions: leave(), "raised SystemExit")
    async def after(completions):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    refused(later, "raised SystemExit")
    assert scores(lambda completion, example: 1.0) == scores(after) == [1.0, 1.0]


def test_an_interrupt_is_not_swallowed():
    def interrupted(completion, example):
        raise KeyboardInterrupt

    for function in (interrupted, lambda completions: interrupted("", {})):
        with pytest.raises(KeyboardInterrupt):
            scores(function)


def test_a_built_in_reward_without_its_column_is_an_error():
    told = r"'countdown_equation' raised KeyError\('target'\); .*columns: answer"
    with pytest.raises(rewards.RewardError, match=told):
        rewards.score_batch(rewards.load_rewards(["countdown_equation"]), ["p"], [RIGHT], [{"answer": "24"}])


# ---- Functions as TRL's users write them -------------------------------------------------------------------

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]


def test_a_function_gets_texts_for_text_prompts_and_columns_as_lists():
    seen = {}

    def everything(completions, **kwargs):
        seen.update(kwargs, completions=completions)
        return [float(text == answer) for text, answer in zip(completions, kwargs["answer"])]

    examples = [{"prompt": "p", "prompt_ids": [1], "opened": "<think>", "answer": "a", "level": 1},
                {"prompt": "q", "prompt_ids": [2], "opened": "", "answer": "c"}]
    assert scores(everything, ["a", "bb"], ["p", "q"], examples, [[7], [8, 9]]) == [1.0, 0.0]
    assert seen == {"prompts": ["p", "q"], "completions": ["a", "bb"], "completion_ids": [[7], [8, 9]],
                    "answer": ["a", "c"], "level": [1, None]}


def test_a_function_gets_messages_for_chat_prompts():
    def chat(prompts, completions, answer):
        assert prompts == [CHAT, CHAT]
        assert [len(x) for x in completions] == [1, 1] and completions[0][0]["role"] == "assistant"
        return [float(x[0]["content"] == y) for x, y in zip(completions, answer)]

    assert scores(chat, ["4", "5"], [CHAT] * 2, [{"answer": "4", "other": 0}] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(("turn", "opened", "begins"), [
    (None, "", ""), (None, "<think>", "<think>"), ("Let me see.\n<think>", "<think>", "Let me see.\n<think>"),
    ("Let me see.\n<think>\n", "<think>", "Let me see.\n<think>\n"), ("Sure: ", "", "Sure: "),
    ("Sure: ", "<think>", "<think>Sure: "),
])
def test_an_open_turn_moves_from_the_prompt_to_the_completion(turn, opened, begins):
    prompt = CHAT + ([] if turn is None else [{"role": "assistant", "content": turn}])
    seen = []

    def look(prompts, completions, **kwargs):
        prompts[0].append("changed")  # what a function does to its lists stays there
        seen.append((prompts[0][:-1], completions))
        return [1.0]

    before = [dict(message) for message in prompt]
    for _ in range(2):
        scores(look, ["4</think>"], [prompt], [{"opened": opened}])
    assert seen == [(CHAT, [[{"role": "assistant", "content": begins + "4</think>"}]])] * 2
    assert prompt == before


def test_a_think_format_reward_of_trl_counts_what_the_prompt_opens():
    def think_format_reward(completions, **kwargs):
        pattern = r"^<think>(?!.*<think>)(.*?)</think>.*$"
        contents = [completion[0]["content"] for completion in completions]
        return [1.0 if re.match(pattern, text, re.DOTALL | re.MULTILINE) else 0.0 for text in contents]

    opened = [*CHAT, {"role": "assistant", "content": "<think>\n"}]
    for prompt, tag, expected in ((opened, "<think>", [1, 0]), (CHAT, "<think>", [1, 0]), (CHAT, "", [0, 0])):
        texts = ["a</think>4", "4"]
        assert scores(think_format_reward, texts, [prompt] * 2, [{"opened": tag}] * 2) == expected


def test_async_functions_are_awaited_on_one_loop_even_where_one_runs():
    limit = asyncio.Semaphore(1)  # bound to the loop that first waits for it

    async def judge(text):
        async with limit:
            await asyncio.sleep(0.001)
        return float(len(text))

    async def batched(completions, **kwargs):
        return await asyncio.gather(*map(judge, completions))

    async def single(completion, example):
        return await judge(completion)

    async def broken(completions):
        await asyncio.sleep(0)
        return [1 / (len(text) - 2) for text in completions]

    async def notebook():
        return scores(batched), scores(single)

    for _ in range(2):
        assert scores(batched) == scores(single) == [1.0, 2.0]
        assert asyncio.run(notebook()) == ([1.0, 2.0], [1.0, 2.0])
        refused(broken, "raised ZeroDivisionError")


class Judge:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, completions, **kwargs):
        return [self.factor * len(text) for text in completions]

    def method(self, completion, example):
        return self.factor * len(completion)


def test_objects_methods_partial_and_decorated_functions_are_told_apart_too():
    def weighted(completions, factor, **kwargs):
        return [factor * len(text) for text in completions]

    def logged(function):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            return function(*args, **kwargs)
        return inner

    class AsyncJudge(Judge):
        async def __call__(self, completions):
            return [self.factor * len(text) for text in completions]

    thrice = functools.partial(weighted, factor=3)
    for function in (Judge(3), Judge(3).method, AsyncJudge(3), thrice):
        assert scores(function) == scores(logged(function)) == [3.0, 6.0]
    lengths = scores(lambda completion_ids, **kwargs: map(len, completion_ids), completion_ids=[[1], [1, 2]])
    assert lengths == [1.0, 2.0]


def test_a_parameter_that_nothing_can_be_given_for_is_named():
    def needs(completions, trainer_state, **kwargs):
        return [trainer_state.global_step] * len(completions)

    def optional(completions, solution, log_extra=None, trainer_state=None, **kwargs):
        return [float(text == x) for text, x in zip(completions, solution)]

    refused(needs, "missing 1 required positional argument: 'trainer_state'")
    refused(lambda completion_ids: [1.0, 1.0], "missing 1 required positional argument: 'completion_ids'")
    refused(optional, "solution", examples=[{"answer": 1}] * 2)
    assert scores(optional, examples=[{"solution": "a"}, {"answer": 1}]) == [1.0, 0.0]


# ---- load_rewards ------------------------------------------------------------------------------------------


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
        "def shouting(completions, **kwargs):\n"
        "    return [text.isupper() for text in completions]\n"
        "at_most_five = Longest(5)\n"
    )
    return path


def returning(value):
    return f"def f(completion, example):\n    return {value}\n"


def refusal(*specs):
    with pytest.raises(rewards.RewardError) as raised:
        rewards.load_rewards(list(specs))
    return one_line(raised)


def parts(specs, completion="HELLO", example=None, **options):
    """The parts of one answer's reward by what the specs load."""
    loaded = rewards.load_rewards(specs, **options)
    return rewards.score_batch(loaded, ["p"], [completion], [example or {}])[0][1]


def test_the_seven_rewards_are_there_by_name_and_loading_adds_none(reward_file):
    names = ["countdown_format", "countdown_strict_format", "countdown_equation",
             "gsm8k_last_number", "gsm8k_signed_format", "gsm8k_answer", "reasoning_tags"]
    assert list(rewards.REWARDS) == names
    rewards.load_rewards([f"{reward_file}:brevity"])
    assert list(rewards.REWARDS) == names


def test_names_and_weights_are_parsed_in_order():
    specs = ["reasoning_tags:0", "countdown_format:0.1", "gsm8k_answer:-2", "countdown_equation",
             "gsm8k_last_number:1e-3", "gsm8k_signed_format:.5"]
    loaded = rewards.load_rewards(specs)
    assert [weight for _, weight in loaded.values()] == [0.0, 0.1, -2.0, 1.0, 0.001, 0.5]
    assert {name: function for name, (function, _) in loaded.items()} == {
        name: rewards.REWARDS[name] for name in (spec.split(":")[0] for spec in specs)}
    assert rewards.load_rewards([]) == {}


def test_functions_and_objects_of_a_file_are_rewards(reward_file, monkeypatch):
    monkeypatch.chdir(reward_file.parent)
    specs = [f"{reward_file}:brevity", "my_rewards.py:shouting:0.5", "./my_rewards.py:at_most_five:2",
             "reasoning_tags"]
    loaded = rewards.load_rewards(specs)
    assert [weight for _, weight in loaded.values()] == [1.0, 0.5, 2.0, 1.0]
    [(total, found)] = rewards.score_batch(loaded, ["p"], ["HELLO"], [{}])
    assert found == {"my_rewards.brevity": -0.5, "my_rewards.shouting": 1.0, "my_rewards.at_most_five": 1.0,
                     "reasoning_tags": 0.0}
    assert total == 2.0


def test_a_file_is_run_once(tmp_path):
    path = tmp_path / "counted.py"
    path.write_text("runs = []\nruns.append(1)\ndef f(completion, example):\n    return 1\n"
                    "def g(completion, example):\n    f.seen = True\n    return hasattr(f, 'seen')\n")
    loaded = rewards.load_rewards([f"{path}:f", f"{path}:g:2"])
    assert loaded["counted.f"][0].__globals__ is loaded["counted.g"][0].__globals__
    assert rewards.load_rewards([f"{path}:g"])["counted.g"][0] is loaded["counted.g"][0]
    assert loaded["counted.f"][0].__globals__["runs"] == [1]


def test_functions_of_a_package_and_of_a_module_in_the_current_folder_are_rewards(tmp_path, monkeypatch):
    package = tmp_path / "judges" / "strict"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "length.py").write_text("from . import limits\nfrom helpers import twice\n"
                                       "def short(completions, **kwargs):\n"
                                       "    return [twice(len(x) < limits.MOST) for x in completions]\n")
    (package / "limits.py").write_text("MOST = 6\n")
    (tmp_path / "helpers.py").write_text("def twice(x):\n    return 2 * x\n" + returning(3))
    monkeypatch.chdir(tmp_path)
    found = parts(["judges.strict.length:short:0.5", "helpers:f"])
    assert found == {"judges.strict.length.short": 2.0, "helpers.f": 3.0}
    assert parts(["operator:eq"], "a", "a") == {"operator.eq": 1.0}  # a package that is installed


def test_a_drives_colon_belongs_to_the_file():
    match = rewards.SPEC.fullmatch
    assert match(r"C:\my rewards\x.py:f:0.5").groups() == (r"C:\my rewards\x.py", "f", "0.5")
    assert match("D:/x.py:f").groups() == ("D:/x.py", "f", None)
    assert r"no file 'C:\\x.py'" in refusal(r"C:\x.py:f:0.5")


def test_a_name_of_the_rewards_comes_first(tmp_path, monkeypatch):
    (tmp_path / "reasoning_tags.py").write_text("def f(completion, example):\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    assert "finite number" in refusal("reasoning_tags:f")
    assert parts(["reasoning_tags.py:f"]) == {"reasoning_tags.f": 7.0}


def test_an_unknown_name_is_refused_with_all_names():
    for spec in ("countdwn_equation", "countdwn_equation:2"):
        message = refusal("countdown_format", spec)
        assert f"{spec!r} is no reward" in message
        assert all(name in message for name in rewards.REWARDS)
        assert "path/to/file.py:function" in message and "package.module:function" in message
    assert "'zzz'" in refusal("zzz") and "'mymodule:2'" in refusal("mymodule:2")
    assert "'mine.py'" in refusal("mine.py") and "''" in refusal("")


@pytest.mark.parametrize("weight", ["abc", "nan", "inf", "-inf", "", "1,5", "0.5:2", "1e999", "-", "."])
def test_a_weight_that_is_no_finite_number_is_refused(weight, reward_file):
    for reward in ("countdown_format", f"{reward_file}:brevity"):
        message = refusal(f"{reward}:{weight}")
        assert repr(f"{reward}:{weight}") in message and "finite number" in message


def test_the_same_reward_twice_is_refused(reward_file):
    message = refusal("countdown_format", "countdown_format:0.1")
    assert "'countdown_format' is given twice" in message and "drop 'countdown_format:0.1'" in message
    message = refusal(f"{reward_file}:brevity", f"{reward_file}:brevity:2")
    assert "'my_rewards.brevity' is given twice" in message


def test_a_missing_file_is_refused(tmp_path):
    path = str(tmp_path / "none.py")
    message = refusal(f"{path}:brevity")
    assert f"no file {path!r}" in message and "path/to/file.py:function" in message
    (tmp_path / "folder.py").mkdir()
    assert "no file" in refusal(f"{tmp_path / 'folder.py'}:brevity")


def test_a_missing_module_or_function_is_refused(reward_file):
    assert "No module named 'no_such_package'" in refusal("no_such_package.rewards:f")
    message = refusal(f"{reward_file}:brevty")
    assert repr(str(reward_file)) in message and "has no 'brevty'" in message
    assert message.endswith(f"; functions: {reward_file}:brevity, {reward_file}:shouting")
    reward_file.with_name("empty.py").write_text("")
    assert "; functions: none" in refusal(f"{reward_file.with_name('empty.py')}:f")


@pytest.mark.parametrize(("source", "problem"), [
    ("def broken(:\n", "SyntaxError"),
    ("import no_such_module_anywhere\n", "No module named 'no_such_module_anywhere'"),
    ("1 / 0\n", "ZeroDivisionError('division by zero')"),
    ("raise ValueError('two\\nlines')\n", "ValueError('two\\nlines')"),
    ("raise SystemExit(3)\n", "SystemExit(3)"),
    ("import sys; sys.exit('bye')\n", "SystemExit('bye')"),
    ("\x00", ""),
])
def test_a_file_that_fails_to_import_is_refused_with_its_error(source, problem, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(source)
    message = refusal(f"{path}:brevity")
    assert repr(str(path)) in message and problem in message and "run it alone" in message
    assert "broken" not in sys.modules


def test_something_not_callable_fails_at_the_first_answer(reward_file):
    with pytest.raises(rewards.RewardError, match=r"'my_rewards.SCALE' raised TypeError\('10 is not"):
        parts([f"{reward_file}:SCALE"])


# ---- A reward's file is a program --------------------------------------------------------------------------


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_file_that_python_cannot_import_by_its_name_is_refused(tmp_path):
    folder = write(tmp_path, **{"my.rewards": LENGTHS})
    with pytest.raises(rewards.RewardError, match="or Python can.t import it, for a dot in its name"):
        rewards.load_rewards([f"{folder}/my.rewards.py:of"])


def test_its_folder_is_searched_for_what_it_imports_now_and_later(tmp_path):
    folder = write(tmp_path / "mine", text_tools="def length(text):\n    return len(text)\n", later="X = 2\n",
                   reward="from text_tools import length\ndef f(completion, example):\n"
                          "    from later import X\n    return length(completion) * X\n")
    told = []
    assert parts([f"{folder}/reward.py:f"], warn=told.append) == {"reward.f": 10.0}
    assert sys.path[-1] == str(folder) and sys.path.count(str(folder)) == 1 and told == []


def test_siblings_named_like_our_files_are_its_own_here(tmp_path):
    import data
    write(tmp_path / "mine" / "data", __init__="from data.more import ANSWERS\n", more="ANSWERS = 1\n")
    folder = write(tmp_path / "mine",
                   rewards="from data import ANSWERS\nBASE = 2 * ANSWERS\n",
                   reward="import data, json, rewards\ndef f(completion, example):\n"
                          "    return data.ANSWERS + rewards.BASE + json.loads('4')\n")
    told = []
    assert parts([f"{folder}/reward.py:f"], warn=told.append) == {"reward.f": 7.0}
    assert sys.modules["data"] is data and sys.modules["rewards"] is rewards
    assert len(told) == 1 and "rename" in told[0] and "data" in told[0] and "\n" not in told[0]


def test_a_file_with_the_name_of_another_module_leaves_that_in_its_place(tmp_path):
    folder = write(tmp_path, json=returning(1), rewards=returning(2), this=returning(3), time=returning(4))
    told = []
    import json
    specs = [f"{folder}/{name}.py:f" for name in ("json", "rewards", "this")]
    assert parts(specs, warn=told.append) == {"json.f": 1, "rewards.f": 2, "this.f": 3}
    assert "<module 'time' (built-in)> has no 'f'" in refusal(f"{folder}/time.py:f")
    assert sys.modules["json"] is json and sys.modules["rewards"] is rewards and sys.modules["time"] is time
    assert ["rename" in line for line in told] == [True] * len(told)
    assert [name in "".join(told) for name in ("json", "rewards", "this")] == [True] * 3


def test_two_files_of_one_name_are_both_used(tmp_path, monkeypatch):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        mine = "import common\n" + returning(f"{value} + common.X")
        write(tmp_path / folder, mine=mine, common=f"X = {value}\n")
    monkeypatch.chdir(tmp_path)
    told = []
    loaded = rewards.load_rewards(["a/mine.py:f", f"{tmp_path}/b/mine.py:f:0.5"], warn=told.append)
    second = f"{tmp_path}/b/mine.f"
    assert [(name, weight) for name, (_, weight) in loaded.items()] == [("mine.f", 1.0), (second, 0.5)]
    assert rewards.score_batch(loaded, ["p"], [""], [{}]) == [(4.0, {"mine.f": 2.0, second: 4.0})]
    assert len(told) == 1 and "mine" in told[0] and "common" in told[0]
    for again in ("a/mine.py:f", f"{tmp_path}/b/../a/mine.py:f", "b/mine.py:f"):
        with pytest.raises(rewards.RewardError, match="given twice"):
            rewards.load_rewards(["a/mine.py:f", f"{tmp_path}/b/mine.py:f:0.5", again], warn=told.append)
    assert parts(["b/mine.py:f"], warn=told.append) == {"mine.f": 4.0}


LENGTHS = "def of(text):\n    return len(text)\n"
POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
import lengths
pool = None

def judge(text):
    return lengths.of(text)

def single(completion, example):
    global pool
    pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context({method!r}))
    return pool.submit(judge, completion).result(timeout=60)

def batched(completions, **kwargs):
    with multiprocessing.get_context({method!r}).Pool(1) as workers:
        return workers.map_async(judge, completions).get(timeout=60)
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_reward_can_use_pools_of_processes(method, tmp_path):
    folder = write(tmp_path / "mine", code_reward=POOL.format(method=method), lengths=LENGTHS)
    try:
        assert parts([f"{folder}/code_reward.py:single", f"{folder}/code_reward.py:batched"]) == {
            "code_reward.single": 5.0, "code_reward.batched": 5.0}
    finally:
        sys.modules["code_reward"].pool.shutdown()


def output_of(folder, *arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout


PROGRAM = """
import data, rewards
assert data.OURS

if __name__ == "__main__":
    loaded = rewards.load_rewards(["../mine/code_reward.py:batched"])
    print(rewards.score_batch(loaded, ["p"], ["HELLO"], [{}]))
"""


@pytest.mark.parametrize("method", [x for x in multiprocessing.get_all_start_methods() if x != "fork"])
def test_a_process_that_is_started_anew_finds_the_program_and_the_reward(method, tmp_path):
    """The child imports the program again, whose data.py must not be the one that lies beside the reward."""
    folder = write(tmp_path / "ours", program=PROGRAM, data="OURS = True\n")
    shutil.copy(Path(rewards.__file__), folder)
    write(tmp_path / "mine", code_reward=POOL.format(method=method), lengths=LENGTHS, data="")
    assert output_of(folder, "program.py") == "[(5.0, {'code_reward.batched': 5.0})]\n"


def test_importing_rewards_needs_the_standard_library_only_and_starts_nothing():
    code = "import sys, threading; before = set(sys.modules); path = list(sys.path); import rewards; " \
           "new = {x.partition('.')[0] for x in set(sys.modules) - before} - {'rewards'}; " \
           "print(new - sys.stdlib_module_names, sys.path == path, threading.active_count())"
    assert output_of(Path(rewards.__file__).parent, "-c", code) == "set() True 1\n"
