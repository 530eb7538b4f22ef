"""CPPO: train a reasoning model by reinforcement learning, with a part of GRPO's forward passes.

GRPO trains a language model, the policy, on its own attempts. It samples a group of G completions
of each question and rewards each of them. The advantage A of a completion says by how many standard
deviations its reward lies above or below the mean of its group. The loss makes the tokens of
completions with A > 0 likelier, of those with A < 0 less likely; the optimizer goes mu times over
each batch. The loss compares the policy with two older states of itself: pi_old, which sampled the
completions, and the reference pi_ref, where the training began, from which it should not stray far.

CPPO (Completion Pruning Policy Optimization; Lin, Lin, Xie, Ji, arXiv 2503.22342) keeps only the k
completions of each question with the largest |A|. In the first of the mu iterations the gradient
of a completion's loss is -A times that of its mean log-probability (KL aside), so a small |A|
hardly teaches; and A is known before any pass of the training. All G are still sampled; what is
saved comes after (a row is a completion; pi_old needs no pass):

    rows a question costs    sampled    reference    policy, forward and backward
    GRPO                     G          G            G mu
    CPPO                     G          k            k mu

The saving is per question, not per step: a training step still trains N completions, as the room
that pruning frees goes to further questions. That is the refill. With N = 128, G = 16 and k = 2 a
step asks N / k = 64 questions, GRPO's N / G = 8: the same questions take k / G as many steps.

    python cppo.py                          additions, without a GPU, in a minute
    torchrun --nproc_per_node 8 cppo.py     GSM8K, on 8 GPUs

One step, in the order of this file:

    questions -> G completions each -> rewards r -> advantages A -> keep the k largest |A| of each
    -> log-probabilities (policy, reference) of the kept -> loss -> mu optimizer steps

The equations, numbered beside their lines; pi_theta is the policy, o_i a completion of question q,
and o_t its token t:

    (1)  A_i  = (r_i - mean(r)) / (std(r) + 1e-4), over the G completions of one question
    (2)  kept = the k = floor(G (1 - P)) of that question's completions with the largest |A_i|
    (3)  rho  = pi_theta(o_t | q, o_<t) / pi_old(o_t | q, o_<t)
    (4)  KL_t = pi_ref / pi_theta - log(pi_ref / pi_theta) - 1
    (5)  loss = -1/N sum_{i kept} 1/|o_i| sum_t { min[rho A_i, clip(rho, 1-eps, 1+eps) A_i]
                                                  - beta KL_t }

P is the pruning rate, beta the weight of the KL term. From the second of the mu iterations on, the
policy is no longer pi_old: the ratio rho reweights pi_old's samples. Far from pi_old they tell
little, so a token stops pulling once A has driven rho by more than eps (above 1 + eps where A > 0,
below 1 - eps where A < 0): there min takes the clipped term, which has no gradient. KL_t estimates
KL(pi_theta || pi_ref): over pi_theta's tokens -log(pi_ref / pi_theta) averages to it, and
pi_ref / pi_theta - 1 to 0, as pi_ref sums to 1; together they are never below 0.

Unlike GRPO: (2) and the refill, nothing else; --pruning_rate 0 is GRPO. (--gamma, 0 by default, is
the paper's floor for |A|: of the k, those below it are dropped.)
Unlike the authors' code: pruning is per question (theirs ranks a whole batch, where a question can
lose everything), k is never 0, and (5) averages over tokens, then over the completions of all
ranks, as the paper writes it, however they fall into micro-batches and ranks.

Letters of shapes:

    Q questions                 L prompt tokens       B rows of a micro-batch        V vocabulary
    G completions a question    C completion tokens   R rows that are being sampled
    k kept a question           T tokens of a row     N rows of a step, of all ranks

Rows are question-major: with Q = 2 and G = 3 they belong to questions 0 0 0 1 1 1, so that
rewards.view(Q, G) has a question in each row. A suffix, as in rewards_QG, names such a shape.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import fcntl
import glob
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer

RANK = int(os.environ.get("RANK", 0))  # torchrun sets both; rank 0 alone reports
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
MAX_REFILL_ROUNDS = 4  # of sampling, to fill a batch; more than one only if --gamma drops rows
MAX_PROMPTS = 256  # read at once: more, as in an evaluation, could outgrow a GPU
WARM_START_BATCH = 32  # demonstrations a step of the warm start, shared by all ranks
progress_bar = partial(tqdm, leave=False, disable=RANK > 0 or None)  # None: only on a terminal
UNREADABLE = "--resume: {} cannot be read; delete that checkpoint to use the one before it"
SHOWN = ("step", "reward", "accuracy", "format", "completion_tokens", "dead_groups", "step_seconds")


class UserError(Exception):
    """A mistake that the user can mend: one line on stderr says how, and the exit status is 2."""


@contextlib.contextmanager
def blame(what, kind=Exception):
    """Turns an error in its block into a UserError: `what` to change, and the error's message."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # main says what to do about it
    except kind as error:
        raise UserError(f"{what}: {str(error) or repr(error)}") from error


# --- Configuration: one field is one flag ---------------------------------------------------------
def flag(default, text, interval=None):
    """A field of Config, hence a flag. A number must lie in the interval, which --help shows."""
    return field(default=default, metadata={"help": text, "metavar": interval})


@dataclass
class Config:
    """All settings of a run. Fills in the task's defaults and checks itself; raises UserError."""

    # Task and data
    task: str = flag("auto", "one of TASKS; auto: gsm8k with CUDA or data files, else arithmetic")
    model: str | None = flag(None, "hub name or folder of a causal language model")
    train_data: str | None = flag(None, "parquet, json, jsonl or csv file, or hub NAME[:SUBSET]")
    test_data: str | None = flag(None, "the same, to evaluate on; unset: the task's own")
    max_prompt_tokens: int | None = flag(None, "longer prompts are not trained on", "[1, inf)")

    # The batch and pruning
    batch_size: int | None = flag(None, "N: completions trained a step by all ranks", "[1, inf)")
    group_size: int = flag(16, "G: completions sampled per question", "[2, inf)")
    pruning_rate: float = flag(0.875, "P: share pruned, k = floor(G (1 - P)); 0: GRPO", "[0, 1)")
    gamma: float = flag(0.0, "of the k, those with |A| < gamma are dropped; 0: none", "[0, inf)")
    prune_by: Literal["abs_advantage", "advantage", "random", "smallest"] = flag(
        "abs_advantage", "keep the largest |A|, the largest A, any, or the smallest |A|"
    )

    # The loss
    num_iterations: int = flag(2, "mu: optimizer steps on each batch", "[1, inf)")
    clip_eps: float = flag(0.2, "eps: the ratio is clipped to [1 - eps, 1 + eps]", "[0, 1)")
    beta: float = flag(0.04, "beta: weight of the KL term", "[0, inf)")

    # The optimizer
    steps: int | None = flag(None, "training steps; unset: by task, or an epoch", "[0, inf)")
    learning_rate: float | None = flag(None, "peak of AdamW's cosine schedule", "[1e-12, inf)")
    warmup_ratio: float = flag(0.1, "share of the steps in which the rate rises", "[0, 1)")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", "[1e-12, inf)")
    warm_start_steps: int | None = flag(None, "steps of imitation before CPPO", "[0, inf)")
    warm_start_learning_rate: float | None = flag(None, "their peak rate", "[1e-12, inf)")
    tokens_per_microbatch: int | None = flag(None, "B x T of a forward pass, at most", "[1, inf)")

    # Sampling
    temperature: float = flag(1.0, "of samples to train on, and log-probabilities", "[0.01, inf)")
    max_completion_tokens: int | None = flag(None, "longer completions are cut", "[1, inf)")
    sample_batch: int = flag(1024, "completions sampled at once, at most", "[2, inf)")

    # Evaluation
    eval_questions: int | None = flag(None, "test on the first so many; unset: all", "[0, inf)")
    eval_samples: int = flag(1, "completions each; 1: greedy, several: sampled", "[1, inf)")
    eval_every: int = flag(0, "steps between evaluations; 0: only at start and end", "[0, inf)")
    eval_only: bool = flag(False, "evaluate --model, train and write nothing")

    # The run
    output_dir: str | None = flag(None, "folder to write to; unset: runs/TASK")
    save_every: int = flag(20, "steps between checkpoints; 0: only at start and end", "[0, inf)")
    resume: bool = flag(False, "go on from the last checkpoint in --output_dir, if there is one")
    dtype: Literal["float32", "bfloat16"] | None = flag(None, "of compute; unset: by hardware")
    seed: int = flag(42, "of weights, order of questions, and sampling", "[0, 2147483648)")

    def __post_init__(self):
        cuda = torch.cuda.is_available()
        if self.task == "auto":
            self.task = "gsm8k" if cuda or self.train_data or self.test_data else "arithmetic"
        if self.task not in TASKS:
            raise UserError(f"--task must be auto or one of {', '.join(TASKS)}, not {self.task}")

        given_batch_size = self.batch_size
        dtype, size = ("bfloat16", 4096) if cuda else ("float32", 1024)
        common = {"output_dir": f"runs/{self.task}", "dtype": dtype, "tokens_per_microbatch": size}
        for name, value in (RECIPE | common | TASKS[self.task].defaults).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

        for f in fields(self):
            value = getattr(self, f.name)
            interval = f.metadata["metavar"]
            if interval and value is not None:
                low, high = map(float, interval[1:-1].split(","))
                if not low <= value < high:
                    raise UserError(f"--{f.name} must be in {interval}, not {value}")

        # A batch is whole questions, k completions of each, and as many on every rank. The task's
        # default is rounded to that; a --batch_size that does not fit is refused.
        unit = WORLD_SIZE * self.num_kept
        self.batch_size = max(unit, self.batch_size // unit * unit)
        if given_batch_size not in (None, self.batch_size):
            nearest = f"{self.batch_size} or {self.batch_size + unit}"
            raise UserError(f"--batch_size must be a multiple of {unit}, ranks x k: {nearest}")

        if self.sample_batch < max(self.group_size, self.eval_samples):
            raise UserError("--sample_batch must be at least --group_size and --eval_samples")

    @property
    def num_kept(self):
        """k = floor(G (1 - P)), at least 1 (eq. 2). 1e-9: G = 20, P = 0.8 is 3.9999 in floats."""
        return max(1, math.floor(self.group_size * (1 - self.pruning_rate) + 1e-9))


# === Part 1: CPPO =================================================================================
# Of Part 2 it uses TASKS, over_ranks and step_metrics.
@dataclass
class Question:
    """One question. The prompt is plain text, or messages for the tokenizer's chat template."""

    prompt: str | list[dict]
    answer: str
    demonstration: str = ""  # a completion to imitate in the warm start
    # Filled in by encode_questions. The opening is a "<think>" that ends the prompt.
    prompt_ids: list[int] = field(default_factory=list)  # L tokens
    demonstration_ids: list[int] = field(default_factory=list)  # without the opening, with EOS
    opening: str = ""  # put before a completion to score it


@dataclass
class Completion:
    """One completion o_i of a question. If it is kept, it is a row of a Batch."""

    prompt_ids: list[int]  # L tokens
    token_ids: list[int]  # |o_i| tokens, the last one EOS unless truncated
    log_probs: list[float] = field(default_factory=list)  # |o_i|, the sampler's, for metrics
    truncated: bool = False
    text: str = ""  # what is scored, against the answer
    answer: str = ""
    format_reward: float = 0.0  # 0 or 1
    accuracy_reward: float = 0.0  # the task's answer_reward, 0 to 2; right if 1.5 or more
    advantage: float = 0.0  # A_i, once its group is known

    @property
    def reward(self):
        """r_i, 0 to 3"""
        return self.format_reward + self.accuracy_reward

    @property
    def num_tokens(self):
        """Of prompt and completion."""
        return len(self.prompt_ids) + len(self.token_ids)


# --- Sampling -------------------------------------------------------------------------------------
def sample_tokens(logits, temperature, top_p=1.0):
    """(R, V) logits -> next tokens (R,), their log-probabilities (R,). Temperature 0 is greedy."""
    if logits[:, 0].isnan().any():  # a nan hidden state makes all its row nan
        raise FloatingPointError("the model's logits are nan")
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))  # log 1 = 0
    logits = logits.float() / temperature
    if top_p < 1:  # only the likeliest tokens count, the fewest that together reach top_p
        logits = transformers.TopPLogitsWarper(top_p)(None, logits)
    probs = F.softmax(logits, dim=-1)  # (R, V)

    # Inverse CDF: one random number a row, not torch.multinomial's V; float64, as roundings add up.
    cdf = probs.cumsum(-1, dtype=torch.float64)  # (R, V); the last column is 1 but for rounding
    threshold = torch.rand_like(cdf[:, :1]) * cdf[:, -1:]  # (R, 1)
    tokens = torch.searchsorted(cdf, threshold, right=True)  # (R, 1); right: skips probability 0
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


class RoomyLayer(DynamicLayer):
    """The keys and values of past tokens in a layer of full attention, with spare columns: a new
    token is written into the next one, where the base class would copy all of them every time."""

    length = 0  # columns in use

    def get_seq_length(self):
        """The tokens that it holds, without the spare columns."""
        return self.length

    def update(self, key_states, value_states, *args, **kwargs):
        """Appends keys and values, (R, heads, new, D) each; returns all there are."""
        start = self.length
        self.length += key_states.shape[2]
        if start == super().get_seq_length():  # all columns are in use: with the new one come more
            spare = (0, 0, 0, max(32, self.length // 4))
            super().update(F.pad(key_states, spare), F.pad(value_states, spare))
        else:
            self.keys[:, :, start : self.length] = key_states
            self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


@torch.no_grad()
def sample_completions(model, prompts, group_size, max_tokens, temperature, eos_ids, top_p=1.0):
    """Samples G completions for each of Q prompts (token ids): Q G of them, question-major."""
    L = max(map(len, prompts))
    device = model.device
    # Prompts are padded on the left: all end in the last column, after which the completions begin.
    padded = torch.tensor([[-1] * (L - len(p)) + p for p in prompts], device=device)  # (Q, L)
    input_ids = padded.clamp(min=0)  # (Q, L)
    attention_mask = (padded >= 0).long()  # (Q, L)
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]

    # An index, as logits_to_keep=1 would be a strided slice, which is slow in bfloat16 on CPUs.
    last = torch.tensor([-1], device=device)
    # A completion counts as truncated until its EOS comes.
    completions = [Completion(p, [], truncated=True) for p in prompts for _ in range(group_size)]
    running = list(completions)  # those that have a row in the tensors, R of them
    for t in progress_bar(range(max_tokens), "tokens"):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # 0 where a prompt begins
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask,
            position_ids=positions[:, -input_ids.shape[1] :],
            past_key_values=cache, use_cache=True, logits_to_keep=last,
        ).logits[:, -1]  # (Q, V) of the prompts, then (R, V)  # fmt: skip
        if t == 0:  # each prompt was read once: now every one of its G completions gets a row
            chosen = torch.arange(len(prompts), device=device).repeat_interleave(group_size)  # (R,)
            cache.reorder_cache(chosen)
            logits = logits[chosen]
            attention_mask = attention_mask[chosen]

        tokens, log_probs = sample_tokens(logits, temperature, top_p)  # (R,), (R,)
        for c, token, log_prob in zip(running, tokens.tolist(), log_probs.tolist(), strict=True):
            if c.truncated:  # else it has ended, but still has a row
                c.token_ids.append(token)
                c.log_probs.append(log_prob)
                c.truncated = token not in eos_ids

        unfinished = [row for row, c in enumerate(running) if c.truncated]
        if not unfinished:
            break
        # The ended ones lose their rows once they are a quarter, no sooner: it copies the cache.
        if len(unfinished) <= 0.75 * len(running):
            running = [running[row] for row in unfinished]
            chosen = torch.tensor(unfinished, device=device)  # (R,)
            cache.reorder_cache(chosen)
            tokens = tokens[chosen]
            attention_mask = attention_mask[chosen]
        input_ids = tokens[:, None]  # (R, 1)
        attention_mask = F.pad(attention_mask, (0, 1), value=1)  # (R, L + t + 1)
    return completions


# --- Rewards --------------------------------------------------------------------------------------
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# -$1,234.50 or $-1234. or .5%; no + or * stands inside another, so that time is linear on any text.
NUMBER = re.compile(r"(([+-]?\$?|\$[+-])((\d{1,3}(,\d{3})+|\d+)(\.\d*)?|\.\d+))%?\.?", re.ASCII)


def extract_answer(text):
    """What the last <answer>...</answer> holds, stripped; None if there is none."""
    before, _, _ = text.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer.strip() if opening else None


def format_reward(text):
    """1 for `<think>...</think>\\n<answer>...</answer>`, each tag once, nothing around; else 0."""
    once = all(text.count(tag) == 1 for tag in TAGS)
    form = "<think>.*</think>\n<answer>.*</answer>"
    return float(once and bool(re.fullmatch(form, text, re.DOTALL)))


def number(text):
    """The number that a text is, exactly; commas, $, % and a full stop left aside. Else nan."""
    match = NUMBER.fullmatch(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(re.sub("[$,]", "", match[1]) if match else "nan")  # nan equals nothing


def accuracy_reward(text, answer):
    """A task's usual reward: 2 if right to the letter, 1.5 if it is the same number, else 0."""
    given = extract_answer(text) or ""
    if given and given == answer:  # no answer is never right
        return 2.0
    return 1.5 if number(given) == number(answer) else 0.0


def task_reward(text, answer, task):
    """The task's answer_reward, which must be a finite number; raises UserError."""
    value = TASKS[task].answer_reward(text, answer)
    with blame(f"--task {task}: its reward is {value!r} for the answer {answer!r}"):
        if not math.isfinite(value):  # which raises too, if it is no number
            raise ValueError("not a finite number")
        return float(value)


def rollout(model, tokenizer, questions, config, group_size, temperature, top_p=1.0):
    """Samples and scores G completions of each of Q questions: Q G of them, question-major."""
    at_once = min(MAX_PROMPTS, config.sample_batch // group_size)
    completions = []
    for start in range(0, len(questions), at_once):
        prompts = [q.prompt_ids for q in questions[start : start + at_once]]
        completions += sample_completions(
            model, prompts, group_size, config.max_completion_tokens,
            temperature, model.generation_config.eos_token_id, top_p,
        )  # fmt: skip

    for i, c in enumerate(completions):
        question = questions[i // group_size]
        # All that the model wrote is scored, special tokens too: the tags may be such.
        ids = c.token_ids if c.truncated else c.token_ids[:-1]
        c.text = question.opening + tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        c.answer = question.answer
        c.format_reward = format_reward(c.text)
        c.accuracy_reward = task_reward(c.text, c.answer, config.task)
    return completions


# --- Advantages and pruning -----------------------------------------------------------------------
def group_advantages(rewards_QG):
    """A = (r - mean) / (std + 1e-4) within each question's G completions (eq. 1): (Q, G).
    In a dead group all rewards are equal, so that every A is 0: KL alone trains its rows."""
    std, mean = torch.std_mean(rewards_QG, dim=1, keepdim=True)  # (Q, 1) each; std is over G - 1
    return (rewards_QG - mean) / (std + 1e-4)


def prune(advantages_QG, num_kept, gamma=0.0, by="abs_advantage"):
    """True for the completions to train on (eq. 2), (Q, G) bool: the k best of each question, of
    equal ones the first; then those with |A| < gamma are dropped. The largest |A|, not A: what is
    far below the mean of its group pulls as hard as what is far above it."""
    abs_QG = advantages_QG.abs()
    scores = {"abs_advantage": abs_QG, "advantage": advantages_QG, "smallest": -abs_QG}
    score_QG = torch.rand_like(abs_QG) if by == "random" else scores[by]
    # The sort is stable; topk would leave it open which of equal ones come first.
    best_first = score_QG.argsort(dim=1, descending=True, stable=True)  # (Q, G) indices
    place_QG = best_first.argsort(dim=1)  # (Q, G) the inverse: each one's place, from 0
    return (place_QG < num_kept) & (abs_QG >= gamma)


# --- Refill: the paper's dynamic completion allocation --------------------------------------------
def collect_batch(draw, stream, room, config):
    """Fills the `room`, the rows that this rank trains in a step, a multiple of k. The refill: the
    first round asks room / k questions, where GRPO asks room / G, and keeps k completions of each.
    Further rounds come only if gamma has dropped k rows or more, MAX_REFILL_ROUNDS in all. `draw`
    maps Q questions to Q G scored completions. Returns the kept, all sampled, how many rounds."""
    G, k = config.group_size, config.num_kept
    kept, sampled, rounds = [], [], 0
    while room - len(kept) >= k and rounds < MAX_REFILL_ROUNDS:
        Q = (room - len(kept)) // k
        completions = draw(list(itertools.islice(stream, Q)))  # Q G
        # In float64: else the rounding of a mean, divided by 1e-4, would give a dead group an A.
        rewards = torch.tensor([c.reward for c in completions], dtype=torch.float64)  # (Q G,)
        advantages_QG = group_advantages(rewards.view(Q, G))
        keep_QG = prune(advantages_QG, k, config.gamma, config.prune_by)
        for c, advantage in zip(completions, advantages_QG.flatten().tolist(), strict=True):
            c.advantage = advantage
        kept += itertools.compress(completions, keep_QG.flatten().tolist())
        sampled += completions
        rounds += 1
    return kept, sampled, rounds


# --- Log-probabilities ----------------------------------------------------------------------------
@dataclass
class Batch:
    """A micro-batch, B rows: prompt, completion, then padding, which causal attention never sees.

    A row with the prompt p q and the completion a b, padded to T = 5 and C = 3:

        input_ids  p q a b -
        predicts   0 1 1 0 0    the logits at q predict a, those at a predict b
        mask       1 1 0        a and b
    """

    input_ids: torch.Tensor  # (B, T)
    predicts: torch.Tensor  # (B, T) bool: the next token is one of the completion's
    mask: torch.Tensor  # (B, C) bool: the completion's own tokens, EOS included
    advantages: torch.Tensor  # (B,)
    sampled_log_probs: torch.Tensor  # (B, C) as sampled, 0 in padding: only for sampling_gap
    old_log_probs: torch.Tensor | None = None  # (B, C) pi_old, from the first of the mu iterations
    ref_log_probs: torch.Tensor | None = None  # (B, C) pi_ref, if there is one


def make_batch(rows: list[Completion], device="cpu") -> Batch:
    """Pads B rows to the longest. The masks come from lengths, not from a padding token: its id is
    often that of EOS as well, and then no EOS would ever be trained."""
    prompt_length = torch.tensor([[len(r.prompt_ids)] for r in rows])  # (B, 1)
    length = torch.tensor([[len(r.token_ids)] for r in rows])  # (B, 1)  |o_i|
    T = max(r.num_tokens for r in rows)
    C = int(length.max())
    input_ids = torch.tensor([(r.prompt_ids + r.token_ids + [0] * T)[:T] for r in rows])  # (B, T)
    next_place = torch.arange(T) + 1 - prompt_length  # (B, T) index in o_i of the next token
    predicts = (next_place >= 0) & (next_place < length)  # (B, T)
    mask = torch.arange(C) < length  # (B, C)
    advantages = torch.tensor([r.advantage for r in rows])  # (B,)
    sampled_log_probs = torch.tensor([(r.log_probs + [0.0] * C)[:C] for r in rows])  # (B, C)
    tensors = (input_ids, predicts, mask, advantages, sampled_log_probs)
    return Batch(*(x.to(device) for x in tensors))


def pack(rows: list[Completion], tokens_per_microbatch):
    """Splits rows into micro-batches of at most so many tokens, padding included; longest first."""
    packs = []
    rest = sorted(rows, key=lambda row: row.num_tokens, reverse=True)  # so little is padding
    while rest:
        fit = max(1, tokens_per_microbatch // rest[0].num_tokens)  # too long a row goes alone
        packs.append(rest[:fit])
        rest = rest[fit:]
    return packs


def token_log_probs(model, batch, temperature):
    """log pi(o_t | q, o_<t) of completion tokens, of logits / temperature: (B, C), 0 in padding."""
    # V is large, so only the logits that predict a completion's token are computed. Beside an index
    # transformers' slice_logits_to_keep takes a (B, T) mask: hidden[mask] has M = sum_i |o_i| rows.
    out = model(input_ids=batch.input_ids, logits_to_keep=batch.predicts, use_cache=False)
    logits = out.logits.float() / temperature  # (M, V), by far the largest tensor
    targets = batch.input_ids.roll(-1, dims=1)[batch.predicts]  # (M,) the next tokens
    log_probs = -F.cross_entropy(logits, targets, reduction="none")  # (M,)
    # Both masks list the completions' tokens row by row, so the M values fall into their places.
    return log_probs.new_zeros(batch.mask.shape).masked_scatter(batch.mask, log_probs)


# --- Loss -----------------------------------------------------------------------------------------
def token_mean(values, mask):
    """1/|o_i| sum_t, for each completion: (B, C) -> (B,)"""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)


def cppo_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, clip_eps, beta):
    """Eq. 5 without 1/N sum_i, which is accumulate_gradient's: a loss for each completion, (B,).
    Log-probabilities and mask are (B, C), advantages (B,). The statistics are (B,) too, means over
    a row's tokens: `kl` (eq. 4), and `clip_fraction`, the share where the clip stops A's pull."""
    # In the first of the mu iterations rho is 1; its gradient is that of log pi_theta all the same.
    ratio = torch.exp(log_probs - old_log_probs)  # (B, C) rho, eq. 3
    unclipped = ratio * advantages[:, None]  # (B, C)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages[:, None]  # (B, C)
    kl = torch.zeros_like(log_probs)
    if beta > 0:
        # In bfloat16 kl starts above 0: pi_ref's weights are bfloat16, the policy's are float32.
        log_ref = ref_log_probs - log_probs  # log(pi_ref / pi_theta)
        kl = torch.expm1(log_ref) - log_ref  # (B, C) eq. 4
    losses = -token_mean(torch.minimum(unclipped, clipped) - beta * kl, mask)  # (B,)
    clip_fraction = token_mean((clipped < unclipped).float(), mask)
    return losses, {"kl": token_mean(kl.detach(), mask), "clip_fraction": clip_fraction}


# --- Update ---------------------------------------------------------------------------------------
@dataclass
class Learner:
    """The models of a run, and what moves them. In float32 on one rank the first three are one."""

    model: torch.nn.Module  # the trained weights, in float32
    policy: torch.nn.Module  # the model; if there are several ranks, wrapped in DDP
    sampler: torch.nn.Module  # the model; in bfloat16 a rounded copy, refreshed after each step
    reference: torch.nn.Module | None  # pi_ref: a copy from after the warm start; None: beta is 0
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler


def accumulate_gradient(learner, batches, N, config):
    """Adds up the gradient of eq. 5 over this rank's micro-batches; N is the rows of all ranks.
    Returns sums over this rank's rows: `loss`, `kl`, `clip_fraction`, and `sampling_gap`, the mean
    |log-probability as sampled - as recomputed here|: more than rounding means a wrong sampler."""
    sums = Counter()
    for batch in batches:
        if WORLD_SIZE > 1:  # as no_sync(): DDP's ranks exchange once, in the last backward pass
            learner.policy.require_backward_grad_sync = batch is batches[-1]
        # Only matrix products are bfloat16: weights are not, as a step of 1e-6 would not move them.
        with torch.autocast(learner.model.device.type, torch.bfloat16, config.dtype == "bfloat16"):
            log_probs = token_log_probs(learner.policy, batch, config.temperature)  # (B, C)
        if batch.old_log_probs is None:
            # The weights have not moved since the sampling: pi_old costs no pass of its own.
            # (With the sampler's log-probabilities, rounded differently, rho would not be 1.)
            batch.old_log_probs = log_probs.detach()

        losses, statistics = cppo_loss(
            log_probs, batch.old_log_probs, batch.ref_log_probs, batch.advantages, batch.mask,
            config.clip_eps, config.beta,
        )  # fmt: skip
        # DDP's exchange is a mean over the ranks; eq. 5 is a sum over them, divided by N.
        (losses.sum() * WORLD_SIZE / N).backward()

        gap = (batch.old_log_probs - batch.sampled_log_probs).abs()  # (B, C)
        statistics |= {"loss": losses, "sampling_gap": token_mean(gap, batch.mask)}
        for name, value in statistics.items():
            sums[name] += value.sum().item()

    if N and not batches:  # no rows here, but other ranks wait for this one's gradients: zeros
        token = torch.tensor([[0]], device=learner.model.device)
        (0 * learner.policy(input_ids=token, use_cache=False).logits.sum()).backward()
    return sums


def optimizer_step(learner, N, config):
    """Moves the weights against the gradient, and clears it. Returns the gradient's norm. Raises
    FloatingPointError before inf or nan reaches the weights: on all ranks, as they share it."""
    parameters = learner.policy.parameters()
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError("the gradient is not finite")
    if N > 0:  # a step without rows would still move the weights, by AdamW's momentum
        learner.optimizer.step()
    learner.scheduler.step()
    # With DDP zeros, not None: gradients are views of its buckets, and would be allocated anew.
    learner.optimizer.zero_grad(set_to_none=WORLD_SIZE == 1)
    return norm


def update(learner, rows, N, config):
    """mu optimizer steps on eq. 5, over this rank's rows of the N of all ranks. Returns
    accumulate_gradient's sums and `grad_norm`, averaged over the mu steps."""
    parts = pack(rows, config.tokens_per_microbatch)
    batches = [make_batch(part, learner.model.device) for part in parts]
    if config.beta > 0:  # pi_ref, once for all mu; no autocast, as its weights have the dtype
        with torch.no_grad():
            for batch in batches:
                batch.ref_log_probs = token_log_probs(learner.reference, batch, config.temperature)

    averages = Counter()
    for _ in range(config.num_iterations):
        sums = accumulate_gradient(learner, batches, N, config)
        sums["grad_norm"] = optimizer_step(learner, N, config)
        for name, value in sums.items():
            averages[name] += value / config.num_iterations
    return averages


# --- One step -------------------------------------------------------------------------------------
def cppo_step(learner, tokenizer, stream, config):
    """The paper's algorithm: collect a batch, update the policy, refresh the sampler. Returns the
    step's metrics, and all completions that this rank has sampled."""
    start = time.perf_counter()
    room = config.batch_size // WORLD_SIZE
    draw = partial(
        rollout, learner.sampler, tokenizer, config=config,
        group_size=config.group_size, temperature=config.temperature,
    )  # fmt: skip
    kept, sampled, rounds = collect_batch(draw, stream, room, config)
    # N is what all ranks have kept, less than --batch_size only if gamma dropped some. They wait
    # here for the slowest, before the clock of training starts.
    N = sum(over_ranks(len(kept)))
    collected = time.perf_counter()

    row_sums = update(learner, kept, N, config)
    learner.sampler.load_state_dict(learner.model.state_dict())  # in bfloat16 this rounds
    end = time.perf_counter()

    metrics = step_metrics(kept, sampled, rounds, row_sums, config)
    seconds = {"sample_seconds": collected - start, "train_seconds": end - collected}
    return metrics | seconds | {"step_seconds": end - start}, sampled


# === Part 2: the program ==========================================================================
@dataclass
class Task:
    """A choice of --task. Your own script may add one to TASKS, and then call main()."""

    questions: Callable  # (--train_data, "train") or (--test_data, "test") -> list of Question
    answer_reward: Callable  # (completion's text, answer) -> 0 to 2, right if 1.5 or more
    defaults: dict  # of flags whose default is None; RECIPE has those that it leaves out


# --- Tasks and questions --------------------------------------------------------------------------
def arithmetic_questions(source, split):
    """2,560 or, to test, 512 sums like `37+58=`; no test sum is a training sum, nor one swapped.
    The teacher of the demonstrations forgets 7 of 10 carries; CPPO has to find them."""
    if source:
        raise UserError("--task arithmetic makes its own questions: drop the data files")
    rng = random.Random(0)  # the same sums for every seed
    pairs = [*itertools.combinations_with_replacement(range(10, 100), 2)]
    questions = []
    for pair in rng.sample(pairs, 512 + 2560):
        a, b = rng.sample(pair, 2)
        units = a % 10 + b % 10
        tens = a // 10 + b // 10
        carry = units >= 10 and rng.random() < 0.3
        carried = f"+1={tens + 1}" if carry else ""
        think = f"{a % 10}+{b % 10}={units} {a // 10}+{b // 10}={tens}{carried}"
        demonstration = f"<think>{think}</think>\n<answer>{tens + carry}{units % 10}</answer>"
        questions.append(Question(f"{a}+{b}=", str(a + b), demonstration))
    return questions[:512] if split == "test" else questions[512:]


def cell_text(row, i, name):
    """A cell of row i as text: text as it is, a number without exponent or ".0", nothing as ""."""
    value = row.get(name)
    if isinstance(value, str | None):
        return (value or "").strip()
    if type(value) not in (int, float, Decimal) or not math.isfinite(value):
        raise ValueError(f"row {i}: {name} is {value!r}, neither text nor a finite number")
    return f"{Decimal(str(value)):f}".removesuffix(".0")


def load_table(source, split):
    """The rows of a file, or of a data set on the hub, NAME[:SUBSET]."""
    kind = Path(source).suffix.lower()
    if kind in (".json", ".jsonl", ".csv"):
        # Not by datasets, which guesses each column's type: 3 may become 3.0, or NA nothing.
        text = Path(source).read_text("utf-8-sig")
        if kind == ".csv":  # surplus cells become a list in `answer`, which cell_text refuses
            return csv.DictReader(io.StringIO(text), restkey="answer", strict=True)
        if text.lstrip().startswith("["):
            return json.loads(text)
        return map(json.loads, filter(str.strip, text.split("\n")))

    import datasets  # here only: a second that the arithmetic task need not wait

    datasets.disable_progress_bars()
    if kind == ".parquet":  # whatever brackets are in its name, it is no pattern
        return datasets.load_dataset("parquet", data_files=glob.escape(source), split="train")
    if Path(source).is_file():
        raise ValueError("it is another kind of file")
    return datasets.load_dataset(*source.split(":"), split=split)


def table_questions(system, form, source, split):
    """Questions of a file or of a data set on the hub. A row's columns are `question` or `problem`;
    and `answer`, or `solution`, or both. `form` is how a demonstration gives the answer."""
    questions = []
    with blame(f"--{split}_data {source}: give a parquet, json, jsonl or csv file, or NAME:SUBSET"):
        for i, row in enumerate(load_table(source, split), 1):
            text = cell_text(row, i, "question") or cell_text(row, i, "problem")
            answer, solution = cell_text(row, i, "answer"), cell_text(row, i, "solution")
            whole = solution or answer
            if "####" in whole:  # GSM8K: "steps #### 72"
                think, _, final = whole.rpartition("####")
            elif solution or boxed(whole):  # MATH: "steps \boxed{72}"
                think, final = whole, boxed(whole) or ""
            else:  # the answer alone
                think, final = "", whole
            if not (solution and answer):  # MATH-500 has both: its answer stays as it is
                answer = final.strip()
            if not (text and answer):
                raise ValueError(f"row {i} lacks a question or problem, or an answer or solution")

            think = re.sub(r"<<[^<>\n]*>>", "", think).strip()  # calculator marks: 2+2=<<2+2=4>>4
            demonstration = f"<think>{think}</think>\n<answer>{form.format(answer)}</answer>"
            prompt = [{"role": "system", "content": system}, {"role": "user", "content": text}]
            questions.append(Question(prompt, answer, demonstration))
        if not questions:
            raise ValueError("it has no rows")
    return questions


def boxed(text):
    """What the last \\boxed{...} of a LaTeX text holds, braces in pairs; None if there is none."""
    _, box, rest = text.replace("\\fbox", "\\boxed").rpartition("\\boxed")
    if not box:
        return None
    rest = rest.lstrip()
    if not rest.startswith("{"):  # \boxed 5
        return re.match(r"[^\s$]*", rest)[0] or None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ is no brace
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[1 : match.start()].strip() or None
    return None


def math_reward(text, answer):
    """2 if the text's last box holds what is equal to the answer, as math-verify says, else 0."""
    given = boxed(text)
    if not given:
        return 0.0
    with blame("--task math needs one more package: pip install math-verify", ImportError):
        from math_verify import parse, verify
    if given == answer:
        return 2.0
    return 2.0 * verify(*(parse(f"$\\boxed{{{latex}}}$") for latex in (answer, given)))


SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. {}The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>\n"
    "<answer> answer here </answer>."
)
BOX = "Therefore, the final answer is: $\\boxed{{{}}}$. I hope it is correct"
BOX_IT = (
    f"And the answer should be of the following format: '{BOX.format('ANSWER')}' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. "
)
PAPERS_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
RECIPE = {  # the paper's, but for the warm start; for all that a task leaves open
    "batch_size": 128, "learning_rate": 1e-6,
    "max_prompt_tokens": 512, "max_completion_tokens": 1024,
    "warm_start_steps": 0, "warm_start_learning_rate": 1e-5,
}  # fmt: skip
TASKS = {
    "arithmetic": Task(arithmetic_questions, accuracy_reward, {
        "steps": 120, "batch_size": 16, "learning_rate": 2e-4,
        "max_prompt_tokens": 16, "max_completion_tokens": 32,
        "warm_start_steps": 350, "warm_start_learning_rate": 3e-3,
    }),
    "gsm8k": Task(partial(table_questions, SYSTEM_PROMPT.format(""), "{}"), accuracy_reward, {
        "model": PAPERS_MODEL, "train_data": "openai/gsm8k:main", "test_data": "openai/gsm8k:main",
    }),
    "math": Task(partial(table_questions, SYSTEM_PROMPT.format(BOX_IT), BOX), math_reward, {
        "model": PAPERS_MODEL, "train_data": "DigitalLearningGmbH/MATH-lighteval",
        "test_data": "HuggingFaceH4/MATH-500",
    }),
}  # fmt: skip


def load_questions(config):
    """The task's questions, to train on and, the first --eval_questions of them, to test."""
    task = TASKS[config.task]
    train = [] if config.eval_only else task.questions(config.train_data, "train")
    test = [] if config.eval_questions == 0 else task.questions(config.test_data, "test")
    test = test[: config.eval_questions]
    if not train + test:
        raise UserError(f"--task {config.task} has no questions, or --eval_questions is 0")
    # A reward that cannot work (math-verify is missing, say) fails here, before a model is loaded.
    task_reward("<answer>\\boxed{?}</answer>", (train + test)[0].answer, config.task)
    return train, test


def encode_questions(questions: list[Question], tokenizer):
    """Fills in their tokens. Messages go through the tokenizer's chat template, if it has one."""
    for question in questions:
        text = question.prompt
        has_template = not isinstance(text, str) and tokenizer.chat_template
        if has_template:
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
            if question.prompt[0]["content"].strip() not in text:
                raise ValueError("it leaves out the first message")
        elif not isinstance(text, str):
            text = "".join(message["content"] + "\n\n" for message in text)
        # A template writes BOS itself, where it is wanted.
        question.prompt_ids = tokenizer(text, add_special_tokens=not has_template).input_ids

        # Some templates begin the answer themselves, with "<think>" and a line break.
        question.opening = re.search(r"(<think>\s*)?\Z", text)[0]  # "" where there is none
        taught = question.demonstration.removeprefix(question.opening.strip())
        ids = tokenizer(taught, add_special_tokens=False).input_ids
        question.demonstration_ids = [*ids, tokenizer.eos_token_id]


def question_stream(questions, seed):
    """This rank's endless share of the questions: each epoch is shuffled and dealt like cards."""
    for epoch in itertools.count():
        shuffled = random.Random(f"{seed} {epoch}").sample(questions, len(questions))
        yield from shuffled[RANK::WORLD_SIZE]


# --- Models ---------------------------------------------------------------------------------------
def tiny_model_and_tokenizer():
    """A random Llama of 0.45M parameters and a tokenizer of characters; each tag is one token."""
    words = ["<pad>", "<eos>", *TAGS, *"\n +=0123456789"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()  # no spaces between tokens
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    shape = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0,
        tie_word_embeddings=True, initializer_range=0.1, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(shape), tokenizer


def load_model_and_tokenizer(name, what):
    """The model, in float32, and its tokenizer, from a folder or the hub; None is the tiny one."""
    transformers.utils.logging.disable_progress_bar()
    with blame(what):
        if name is None:
            model, tokenizer = tiny_model_and_tokenizer()
        else:
            # Unless False is said, transformers asks at the terminal to run a folder's own code.
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
            if loading["missing_keys"]:
                raise ValueError(f"it lacks weights: {sorted(loading['missing_keys'])}")
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("it has weights that are inf or nan")
        form = "<think>1 2</think>\n<answer>3</answer>"
        if tokenizer.decode(tokenizer(form, add_special_tokens=False).input_ids) != form:
            raise ValueError(f"its tokenizer does not give back {form!r}, or its files are missing")
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer has no EOS token: completions would never end")
        ids = model.generation_config.eos_token_id  # from here on a list: chat models have several
        eos_ids = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}
        model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(eos_ids))
    return model.eval(), tokenizer  # eval: dropout's noise would move rho


def check_fit(model, tokenizer, questions, config):
    """Refuses a model that cannot read all prompts, write all completions, or be sampled from."""
    blamed = f"--model {config.model}:"
    eos_ids = model.generation_config.eos_token_id
    embeddings = model.get_input_embeddings().num_embeddings
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for q in questions:
        if q.prompt_ids[-1:] in ([], [tokenizer.eos_token_id]):
            raise UserError(f"{blamed} its tokenizer ends prompts with EOS, or leaves them empty")
        taught = q.demonstration_ids if config.warm_start_steps else []
        largest = max(q.prompt_ids + taught + eos_ids)
        if largest >= embeddings:
            raise UserError(f"{blamed} token {largest} is not in its embedding of {embeddings}")
        length = len(q.prompt_ids) + max(len(taught), config.max_completion_tokens)
        if positions and 0 < positions < length:
            what = f"{blamed} {length} tokens need more than its {positions} positions"
            raise UserError(f"{what}: lower --max_completion_tokens or --max_prompt_tokens")

    # The cache of another kind of model, Mamba's say, gives other probabilities than training.
    prompts = [questions[0].prompt_ids, questions[0].prompt_ids[:1]]  # the second one is padded
    with blame(f"{blamed} this kind of model cannot be sampled from here"), torch.no_grad():
        sampled = sample_completions(model, prompts, 2, 4, 1.0, [])  # G = 2, 4 tokens, no EOS
        batch = make_batch(sampled, model.device)
        gap = token_log_probs(model, batch, 1.0) - batch.sampled_log_probs  # (4, 4)
        if not gap.abs().max() < 1e-3:  # nan is not
            raise ValueError("other probabilities than in training")


def copy_for(model, dtype):
    """A frozen copy in the dtype of compute, to sample from or as the reference."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    for parameter in frozen.parameters():  # not .to(): RoPE's frequencies, a buffer, stay float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return frozen


def make_optimizer(policy, learning_rate, num_updates, config, done=0):
    """AdamW, of whose moments each rank holds its share, and the paper's cosine schedule: up from 0
    (then the first update moves nothing) if warmup_ratio says so, down to 0 after num_updates; it
    goes on from `done`."""
    kind = torch.optim.AdamW
    if WORLD_SIZE > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # here only: it takes a second

        kind = partial(ZeroRedundancyOptimizer, optimizer_class=kind)
    optimizer = kind(policy.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    warmup = math.ceil(num_updates * config.warmup_ratio)
    optimizer.param_groups[0]["initial_lr"] = learning_rate  # last_epoch >= 0 needs it
    schedule = transformers.get_cosine_schedule_with_warmup
    return optimizer, schedule(optimizer, warmup, num_updates, last_epoch=done - 1)


# --- Ranks: torchrun's environment; one process is the plain case ---------------------------------
def init_distributed():
    """Lets the ranks meet; returns this rank's device."""
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if local_ranks > torch.cuda.device_count():
            raise UserError(f"--nproc_per_node {local_ranks} is more than the GPUs here")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "nccl"
        torch.cuda.set_device(device)
        # cuDNN's attention comes first on Hopper and Blackwell, plans anew for each length, and
        # corrupts Qwen2.5 on B200 (PyTorch issue 193893).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        # An hour, for what one rank does while the others wait: a download, a save.
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    return device


def over_ranks(value):
    """Every rank's value, in the order of the ranks."""
    values = [value] * WORLD_SIZE
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def say(text):
    """Prints on the first rank, above the progress bar; flushed, for whoever follows a log."""
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()


# --- Warm start and evaluation --------------------------------------------------------------------
def seed_step(seed, step):
    """Random numbers depend on seed, step and rank alone, so that a resumed step draws the same."""
    torch.manual_seed(random.Random(f"{seed} {step} {RANK}").getrandbits(32))


def warm_start(model, policy, stream, config):
    """Imitates demonstrations: to the loss they are completions whose advantage is 1, so that its
    gradient is that of -log pi, a mean over a demonstration's tokens, then over demonstrations."""
    start = time.perf_counter()
    steps = config.warm_start_steps
    optimizer, scheduler = make_optimizer(policy, config.warm_start_learning_rate, steps, config)
    learner = Learner(model, policy, model, None, optimizer, scheduler)
    imitation = replace(config, num_iterations=1, beta=0.0)
    for _ in progress_bar(range(steps), "warm start"):
        share = itertools.islice(stream, math.ceil(WARM_START_BATCH / WORLD_SIZE))
        rows = [Completion(q.prompt_ids, q.demonstration_ids, advantage=1.0) for q in share]
        with blame("warm start: lower --warm_start_learning_rate", FloatingPointError):
            update(learner, rows, len(rows) * WORLD_SIZE, imitation)
    return {"step": 0, "warm_start_seconds": time.perf_counter() - start}


def evaluate(model, tokenizer, questions: list[Question], config):
    """Share of right completions: greedy ones, or sampled as the paper does for AMC and AIME."""
    start = time.perf_counter()
    seed_step(config.seed, 0)  # the same numbers for each evaluation
    n = config.eval_samples
    temperature, top_p = (0.6, 0.95) if n > 1 else (0.0, 1.0)
    sampled = rollout(model, tokenizer, questions[RANK::WORLD_SIZE], config, n, temperature, top_p)
    right = sum(over_ranks(sum(c.accuracy_reward >= 1.5 for c in sampled)))
    accuracy = right / (len(questions) * n)
    say(f"cppo: {accuracy:.1%} of {len(questions):,} test questions right")
    seconds = time.perf_counter() - start
    return {"eval_accuracy": accuracy, "eval_questions": len(questions), "eval_seconds": seconds}


# --- What a run writes ----------------------------------------------------------------------------
def step_metrics(kept, sampled, rounds, row_sums, config):
    """Counts and averages over all ranks (of no kept rows: None); row_sums are update's."""
    rewards = torch.tensor([c.reward for c in sampled], dtype=torch.float64)
    own = {
        "questions": len(sampled) // config.group_size, "sampled": len(sampled), "kept": len(kept),
        "dead_groups": sum(len(r.unique()) == 1 for r in rewards.split(config.group_size)),
        "refill_rounds": rounds,
        "sampled_tokens": sum(len(c.token_ids) for c in sampled),
        "trained_tokens": sum(len(c.token_ids) for c in kept),
        "reward": sum(c.reward for c in sampled),
        "accuracy": sum(c.accuracy_reward >= 1.5 for c in sampled),
        "format": sum(c.format_reward for c in sampled),
        "truncated": sum(c.truncated for c in sampled),
        "abs_advantage_kept": sum(abs(c.advantage) for c in kept),
        "entropy": -sum(sum(c.log_probs) for c in sampled),  # the mean of -log p estimates it
        **row_sums,
    }  # fmt: skip
    metrics = Counter()
    for each in over_ranks(own):
        metrics.update(each)  # adds

    metrics["completion_tokens"] = metrics["sampled_tokens"] / metrics["sampled"]
    metrics["entropy"] /= metrics["sampled_tokens"]
    for name in ("reward", "accuracy", "format", "truncated"):
        metrics[name] /= metrics["sampled"]
    for name in ("abs_advantage_kept", "loss", "kl", "clip_fraction", "sampling_gap"):
        metrics[name] = metrics[name] / metrics["kept"] if metrics["kept"] else None
    metrics["grad_norm"] = row_sums["grad_norm"] if metrics["kept"] else None  # all ranks share it
    if torch.cuda.is_available():
        metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return dict(metrics)


def append_metrics(folder, record):
    """Appends a line to metrics.jsonl, on the first rank."""
    if RANK == 0:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def find_checkpoints(folder):
    """The run's checkpoints, oldest first. They are written as .tmp and renamed when complete."""
    steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return [folder / f"checkpoint-{step}" for step in sorted(filter(str.isdecimal, steps), key=int)]


def save_checkpoint(folder, learner, tokenizer, state):
    """Writes checkpoint-STEP, and deletes others but the one before it and checkpoint-0, pi_ref.
    Whatever happens meanwhile, a crash or a full disk, those stay whole. Raises UserError."""
    path = folder / f"checkpoint-{state['step']}"
    unfinished = path.with_suffix(".tmp")
    # All between checkpoint-0 and the last go before the new one comes: they are large.
    for old in find_checkpoints(folder)[1:-1]:
        shutil.rmtree(old, ignore_errors=True)  # perhaps another rank was faster
    with blame(f"{path} cannot be written, the one before it stays"):
        unfinished.mkdir(exist_ok=True)
        # Each rank writes its share, the AdamW inside ZeRO's: to gather them would take minutes.
        moments = getattr(learner.optimizer, "optim", learner.optimizer).state_dict()
        torch.save(moments, unfinished / f"optimizer-{RANK}.pt")
        over_ranks(None)  # from here on all have written theirs
        if RANK > 0:
            return
        logged = (folder / "metrics.jsonl").read_text()  # all of it, up to this step
        torch.save(state | {"metrics": logged}, unfinished / "trainer_state.pt")
        learner.model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        for file in filter(Path.is_file, unfinished.rglob("*")):  # on the disk: power may fail
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        unfinished.rename(path)


def load_state(config):
    """The newest checkpoint and its state, if it is to go on; or None, and a new run's state."""
    settings = asdict(config) | {"ranks": WORLD_SIZE}
    checkpoints = find_checkpoints(Path(config.output_dir))
    if config.eval_only or not config.resume or not checkpoints:
        asked = [0] * WORLD_SIZE  # questions, by each rank
        return None, {"step": 0, "asked": asked, "seconds": 0.0, "metrics": "", "config": settings}
    path = checkpoints[-1] / "trainer_state.pt"
    with blame(UNREADABLE.format(path)):
        state = torch.load(path, "cpu", weights_only=True)
        before = state["config"]
    may_change = {"output_dir", "resume", "save_every", "eval_every"}
    may_change |= {"tokens_per_microbatch", "sample_batch"}  # lowered when memory was too small
    for name, now in settings.items():
        if name not in may_change and before.get(name) != now:
            raise UserError(f"--resume: {name} was {before.get(name)} in that run and is now {now}")
    return checkpoints[-1], state


def lock_folder(folder, checkpoint: Path | None, metrics, config):
    """Cuts the folder's metrics back to the checkpoint's, as later steps are done again. Returns a
    lock that keeps other processes out until it is closed. Raises UserError."""
    if RANK > 0:
        return contextlib.nullcontext()
    with blame(f"--output_dir {folder} cannot be written", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed when the process dies
    except BlockingIOError:
        raise UserError(f"--output_dir {folder} is in use by another process") from None
    if (find_checkpoints(folder) or [None])[-1] != checkpoint:
        raise UserError(f"--output_dir {folder} has changed meanwhile: give the command again")
    (folder / "metrics.jsonl").write_text(metrics)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
    return lock


# --- A run ----------------------------------------------------------------------------------------
Run = namedtuple("Run", "folder checkpoint state model tokenizer questions test_questions")


def set_up(config):
    """Ranks, checkpoint, questions, model: all checks, before the first write. Raises UserError."""
    folder = Path(config.output_dir)
    others = {path.name for path in folder.glob("*")} - {"lock"}
    may_go_on = config.resume and others & {"metrics.jsonl", "checkpoint-0"}  # a run's folder
    if others and not (config.eval_only or may_go_on):
        raise UserError(f"--output_dir {folder} is not empty: choose another, or --resume its run")
    device = init_distributed()
    checkpoint, state = load_state(config)
    if len(set(over_ranks(checkpoint))) > 1:
        raise UserError("--resume: --output_dir must be one folder that all machines share")

    loaded, test_questions = load_questions(config)
    texts = repr([(q.prompt, q.answer) for q in loaded + test_questions])
    questions_hash = hashlib.sha256(texts.encode()).hexdigest()
    if state.setdefault("questions_hash", questions_hash) != questions_hash:  # a new run has none
        raise UserError("--resume: the questions are not those that the run began with")

    torch.manual_seed(config.seed)  # of the tiny model's weights
    what = f"--model {config.model}: give a hub name, or a folder that save_pretrained has made"
    if checkpoint:
        what = UNREADABLE.format(checkpoint)
    model, tokenizer = load_model_and_tokenizer(checkpoint or config.model, what)
    with blame(f"--model {config.model}: its tokenizer or chat template refuses the questions"):
        encode_questions(loaded + test_questions, tokenizer)
    questions = [q for q in loaded if len(q.prompt_ids) <= config.max_prompt_tokens]
    left_out = f"{len(loaded) - len(questions):,} prompts over --max_prompt_tokens left out"
    if len(questions) < WORLD_SIZE and not config.eval_only:
        raise UserError(f"{len(questions)} training questions are too few, {left_out}")
    if config.warm_start_steps and not all(q.demonstration for q in questions):
        raise UserError("--warm_start_steps must be 0: there are questions without demonstration")
    model.to(device)
    check_fit(model, tokenizer, questions + test_questions, config)
    say(f"cppo: {config.task}, {WORLD_SIZE} rank(s), {device.type}, {config.dtype}; {left_out}")
    return Run(folder, checkpoint, state, model, tokenizer, questions, test_questions)


def make_learner(run, policy, num_updates, config):
    """The learner of a new run after its warm start, or as the checkpoint has it."""
    model, reference = run.model, None
    sampler = model if config.dtype == "float32" else copy_for(model, config.dtype)
    if config.beta > 0:
        initial = model
        if run.checkpoint:  # the model has moved since the start, which is checkpoint-0
            start = run.folder / "checkpoint-0"
            what = f"--resume: {start}, the reference, cannot be read: begin a new run"
            initial, _ = load_model_and_tokenizer(start, what)
        reference = copy_for(initial, config.dtype).to(model.device)

    done = run.state["step"] * config.num_iterations
    optimizer, scheduler = make_optimizer(policy, config.learning_rate, num_updates, config, done)
    if run.checkpoint:
        path = run.checkpoint / f"optimizer-{RANK}.pt"
        with blame(UNREADABLE.format(path)):
            moments = torch.load(path, "cpu", weights_only=True)
            getattr(optimizer, "optim", optimizer).load_state_dict(moments)
    learner = Learner(model, policy, sampler, reference, optimizer, scheduler)
    if WORLD_SIZE > 1:  # zeros: until a first exchange DDP holds gradients beside its buckets
        accumulate_gradient(learner, [], 1, config)
    return learner


def evaluate_and_save(run, learner, last, config):
    """At the start, after the last step, and as often as --eval_every and --save_every say."""
    step = run.state["step"]
    at_an_end = step in (0, last)
    if run.test_questions and (at_an_end or step % (config.eval_every or last) == 0):
        score = evaluate(learner.sampler, run.tokenizer, run.test_questions, config)
        append_metrics(run.folder, {"step": step, **score})
    if at_an_end or step % (config.save_every or last) == 0:
        save_checkpoint(run.folder, learner, run.tokenizer, run.state)


def train(config):
    """A whole run: warm start, steps of CPPO, evaluations, checkpoints; or an evaluation alone."""
    run = set_up(config)
    model, tokenizer, questions, state = run.model, run.tokenizer, run.questions, run.state
    if config.eval_only:
        evaluate(copy_for(model, config.dtype), tokenizer, run.test_questions, config)  # rounded
        return

    per_step = config.batch_size // config.num_kept  # questions, unless gamma makes room for more
    an_epoch = math.ceil(len(questions) / per_step)
    last = an_epoch if config.steps is None else config.steps
    policy = model
    if WORLD_SIZE > 1:  # forward_sync_buffers, once broadcast_buffers: RoPE's are constant
        policy = DDP(model, gradient_as_bucket_view=True, forward_sync_buffers=False)
    with lock_folder(run.folder, run.checkpoint, state.pop("metrics"), config):
        G, k = config.group_size, config.num_kept
        say(f"cppo: {last} steps, each with {per_step} questions; G = {G}, k = {k}")
        stream = question_stream(questions, config.seed)
        if not run.checkpoint:
            append_metrics(run.folder, warm_start(model, policy, stream, config))
        learner = make_learner(run, policy, last * config.num_iterations, config)
        if not run.checkpoint:
            evaluate_and_save(run, learner, last, config)

        # The stream begins anew after the warm start. A resumed run skips what this rank has asked.
        stream = question_stream(questions, config.seed)
        stream = itertools.islice(stream, state["asked"][RANK], None)
        for step in progress_bar(range(state["step"] + 1, last + 1), config.task):
            seed_step(config.seed, step)
            learning_rate = learner.scheduler.get_last_lr()[0]
            with blame(f"step {step}: lower --learning_rate in a new run", FloatingPointError):
                metrics, sampled = cppo_step(learner, tokenizer, stream, config)

            state["step"] = step
            state["asked"] = over_ranks(state["asked"][RANK] + len(sampled) // G)
            state["seconds"] += metrics["step_seconds"]
            epoch = sum(state["asked"]) / len(questions)
            metrics = {"step": step, "epoch": epoch, "learning_rate": learning_rate} | metrics
            append_metrics(run.folder, metrics)
            if step == 1 or step % max(1, last // 10) == 0:
                c = sampled[0]
                say("  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN))
                say(f"  {c.text!a} earns {c.reward:g}, the answer is {c.answer!a}")
            evaluate_and_save(run, learner, last, config)

        total = sum(state["asked"])
        each = state["seconds"] / max(1, total)
        say(f"cppo: {total:,} questions, {each:.3g} seconds each, in {run.folder}")


def main():
    """The command line: a user's mistake is one line on stderr, and exit status 2."""
    # Without expandable segments the cache's growth breaks a GPU's memory into small pieces.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if sys.platform == "linux" and not torch.cuda.is_available():
        # Else glibc gives freed tensors to the kernel, which wipes new pages: 8% of a 135M's time.
        for option, value in ((-1, -1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX
            ctypes.CDLL(None).mallopt(option, value)
    parser = transformers.HfArgumentParser(  # without usage an error is one line
        Config, allow_abbrev=False, usage=argparse.SUPPRESS, description=__doc__.split("\n")[0]
    )
    status, message = 2, None
    try:
        train(Config(**vars(parser.parse_args())))
        status = 0
    except (UserError, OSError, FloatingPointError) as error:
        message = error
    except torch.OutOfMemoryError:
        message = "CUDA is out of memory: lower --tokens_per_microbatch or --sample_batch"
    except KeyboardInterrupt:
        status, message = 130, "stopped; --resume goes on from a run's last checkpoint"
    except Exception:
        status = 1
        sys.excepthook(*sys.exc_info())  # prints the traceback
    if message:
        print("cppo.py:", " ".join(str(message).split())[:400], file=sys.stderr)
    if dist.is_initialized():  # Python's own way out may wait for other ranks for ever
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
