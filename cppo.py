"""CPPO: train a reasoning model by reinforcement learning; pay only for completions that teach.

Completion Pruning Policy Optimization (Lin, Lin, Xie, Ji, arXiv 2503.22342) is GRPO that throws
most completions away before the expensive part. One step, in the order of this file:

    questions -> G completions each -> rewards r -> advantages A -> keep the k largest |A| of each
    -> log-probabilities (policy, reference) of the kept -> loss -> mu optimizer steps

The equations, each again beside the line that computes it:

    (1)  A_i  = (r_i - mean(r)) / (std(r) + 1e-4), over the G completions of one question
    (2)  I    = the k = floor(G (1 - P)) indices with the largest |A_i| of that question
    (3)  rho  = pi_theta(o_t | q, o_<t) / pi_old(o_t | q, o_<t)
    (4)  KL_t = pi_ref / pi_theta - log(pi_ref / pi_theta) - 1
    (5)  loss = -1/N sum_{i kept} 1/|o_i| sum_t { min[rho A_i, clip(rho, 1-eps, 1+eps) A_i]
                                                  - beta KL_t }

Unlike GRPO: (2), and that a step asks N / k questions where GRPO asks N / G. That is the refill:
the room that pruning frees goes to completions of further questions. --pruning_rate 0 is GRPO.
Unlike the authors' code: pruning is per question (theirs ranks a whole batch, where a question can
lose everything), k is never 0, and (5) averages over tokens, then over the completions of all
ranks, as the paper writes it, however they fall into micro-batches and ranks.

Letters of shapes. Rows are question-major, repeat_interleave in, view(Q, G) out, until pack sorts.

    Q questions                 N completions trained in a step    L prompt tokens
    G completions a question      (in shapes: a micro-batch's)     C completion tokens
    k kept a question           R completions being sampled        T = L + C of a row, V vocabulary
"""

import argparse
import contextlib
import copy
import ctypes
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
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

MAX_REFILL_ROUNDS = 4  # of sampling in a step: where gamma leaves room in the batch
WARM_START_BATCH = 32  # demonstrations a step, by all ranks
SHOWN = ("step", "reward", "accuracy", "format", "completion_tokens", "dead_groups", "step_seconds")
IS_FIRST_RANK = os.environ.get("RANK", "0") == "0"  # the one process that writes and prints


class UserError(Exception):
    """A mistake that the user can mend: one line on stderr says how, and the exit status is 2."""


@contextlib.contextmanager
def blame(what: str, kind: type[Exception] = Exception):
    """Turns an error in its block into a UserError: `what` to change, and the error's message."""
    try:
        yield
    except kind as error:  # (without a message, say, for an empty data file: StopIteration)
        raise UserError(f"{what}: {str(error) or repr(error)}") from error


# --- Configuration: one field is one flag ---------------------------------------------------------
def flag(default, text: str, interval: str = ""):
    """A dataclass field that HfArgumentParser turns into a flag. A number must lie in the interval
    [low, high), which --help shows as its metavar."""
    limits = {"metavar": interval} if interval else {}
    return field(default=default, metadata={"help": text} | limits)


@dataclass
class Config:
    """All settings of a run. Fills in the task's defaults and checks itself; raises UserError."""

    task: str = flag("auto", "one of TASKS; auto: gsm8k with CUDA or data files, else arithmetic")
    model: str | None = flag(None, "hub name or folder of a causal language model")
    train_data: str | None = flag(None, "parquet, json, jsonl or csv file, or hub NAME[:SUBSET]")
    test_data: str | None = flag(None, "the same, to evaluate on; unset: the task's own")
    output_dir: str | None = flag(None, "folder to write to; unset: runs/TASK")
    steps: int | None = flag(None, "training steps; unset: by task, or an epoch", "[0, inf)")
    batch_size: int | None = flag(None, "N: completions trained a step, by all ranks", "[1, inf)")
    group_size: int = flag(16, "G: completions sampled per question", "[2, inf)")
    pruning_rate: float = flag(0.875, "P: share pruned, k = floor(G (1 - P)); 0: GRPO", "[0, 1)")
    gamma: float = flag(0.0, "of the k, only |A| >= gamma stay", "[0, inf)")
    prune_by: Literal["abs_advantage", "advantage", "random", "smallest"] = flag(
        "abs_advantage", "keep the largest |A|, the largest A, any, or the smallest |A|"
    )
    refill: bool = flag(True, "fill the batch; --no_refill: N / G questions as in GRPO, k of each")
    num_iterations: int = flag(2, "mu: optimizer steps on each batch", "[1, inf)")
    clip_eps: float = flag(0.2, "eps: the ratio is clipped to [1 - eps, 1 + eps]", "[0, 1)")
    beta: float = flag(0.04, "beta: weight of the KL term", "[0, inf)")
    learning_rate: float | None = flag(None, "peak of AdamW's cosine schedule", "[1e-12, inf)")
    warmup_ratio: float = flag(0.1, "share of the steps in which the rate rises", "[0, 1)")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", "[1e-12, inf)")
    temperature: float = flag(1.0, "of samples to train on, and log-probabilities", "[0.01, inf)")
    max_prompt_tokens: int | None = flag(None, "longer prompts are not trained on", "[1, inf)")
    max_completion_tokens: int | None = flag(None, "longer completions are cut", "[1, inf)")
    tokens_per_microbatch: int | None = flag(None, "N x T of a forward pass, at most", "[1, inf)")
    sample_batch: int = flag(1024, "completions sampled at once, at most", "[2, inf)")
    dtype: Literal["float32", "bfloat16"] | None = flag(None, "of compute; unset: by hardware")
    warm_start_steps: int | None = flag(None, "steps of imitation before CPPO", "[0, inf)")
    warm_start_learning_rate: float | None = flag(None, "their peak rate", "[1e-12, inf)")
    eval_questions: int | None = flag(None, "test on the first so many; unset: all", "[0, inf)")
    eval_samples: int = flag(1, "completions each; 1: greedy, several: sampled", "[1, inf)")
    eval_every: int = flag(0, "steps between evaluations; 0: at the start and the end", "[0, inf)")
    eval_only: bool = flag(False, "evaluate --model, train and write nothing")
    save_every: int = flag(20, "steps between checkpoints; 0: at the start and the end", "[0, inf)")
    resume: bool = flag(False, "go on from the last checkpoint in --output_dir, if there is one")
    seed: int = flag(42, "of weights, order of questions, and sampling", "[0, 2147483648)")

    def __post_init__(self):
        cuda = torch.cuda.is_available()
        if self.task == "auto":
            self.task = "gsm8k" if cuda or self.train_data or self.test_data else "arithmetic"
        if self.task not in TASKS:
            raise UserError(f"--task must be auto or one of {', '.join(TASKS)}, not {self.task}")
        unset = {"output_dir": f"runs/{self.task}", "dtype": "bfloat16" if cuda else "float32"}
        unset["tokens_per_microbatch"] = 4096 if cuda else 1024
        for name, value in (unset | TASKS[self.task].defaults).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for f in fields(self):
            value, interval = getattr(self, f.name), f.metadata.get("metavar")
            if value is not None and interval:
                low, high = map(float, interval[1:-1].split(","))
                if not low <= value < high:
                    raise UserError(f"--{f.name} must be in {interval}, not {value}")
        if self.sample_batch < max(self.group_size, self.eval_samples):
            raise UserError("--sample_batch must be at least --group_size and --eval_samples")
        if self.eval_only and self.eval_questions == 0:
            raise UserError("--eval_only with --eval_questions 0 leaves nothing to do")
        whole_groups = not self.refill or self.num_kept == self.group_size  # N / G questions
        divisor = int(os.environ.get("WORLD_SIZE", 1)) * (self.group_size if whole_groups else 1)
        if self.batch_size % divisor:
            what = f"{divisor}, ranks{' x --group_size' if whole_groups else ''}"
            raise UserError(f"--batch_size {self.batch_size} must be divisible by {what}")

    @property
    def num_kept(self) -> int:
        """k = floor(G (1 - P)), at least 1 (eq. 2). 1e-9: G = 20, P = 0.8 is 3.9999 in floats."""
        return max(1, math.floor(self.group_size * (1 - self.pruning_rate) + 1e-9))


# === Part 1: CPPO =================================================================================
@dataclass
class Question:
    """One question. The prompt is plain text, or messages for the tokenizer's chat template."""

    prompt: str | list[dict]
    answer: str
    demonstration: str = ""  # a completion to imitate in the warm start
    prompt_ids: list[int] = field(default_factory=list)  # L tokens, from encode_prompts


@dataclass
class Completion:
    """One completion o_i of a question. If it is kept, it is a row of a Batch."""

    prompt_ids: list[int]  # L tokens
    token_ids: list[int]  # |o_i| tokens, the last one EOS unless truncated
    log_probs: list[float] = field(default_factory=list)  # |o_i| of them, the sampler's own
    truncated: bool = False
    format_reward: float = 0.0  # 0 or 1
    accuracy_reward: float = 0.0  # 0 to 2; from 1.5 on the answer is right
    advantage: float = 0.0  # A_i, once its group is known

    @property
    def reward(self) -> float:
        """r_i, 0 to 3"""
        return self.format_reward + self.accuracy_reward

    @property
    def num_tokens(self) -> int:
        """Of prompt and completion."""
        return len(self.prompt_ids) + len(self.token_ids)


# --- Sampling -------------------------------------------------------------------------------------
def sample_tokens(logits: torch.Tensor, temperature: float, top_p: float = 1.0):
    """(R, V) logits -> next tokens (R,) and their log-probabilities (R,). Temperature 0 is greedy;
    with top_p < 1 only the likeliest tokens count, the fewest that together reach top_p."""
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))  # log 1 = 0
    probs = F.softmax(logits.float() / temperature, dim=-1)  # (R, V)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)  # (R, V)
        likelier = ranked.cumsum(-1) - ranked  # (R, V) what the tokens before it add up to
        probs = probs.scatter(-1, order, ranked * (likelier < top_p))
        probs = probs / probs.sum(-1, keepdim=True)
    # Inverse CDF: one random number a row (torch.multinomial draws V). float64: V roundings add up.
    cdf = probs.cumsum(-1, dtype=torch.float64)  # (R, V); the last column is 1 but for rounding
    threshold = torch.rand_like(cdf[:, :1]) * cdf[:, -1:]  # (R, 1)
    tokens = torch.searchsorted(cdf, threshold, right=True).clamp(max=cdf.shape[1] - 1)  # (R, 1)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


@torch.no_grad()
def sample_completions(model, prompts, group_size, max_tokens, temperature, eos_ids, top_p=1.0):
    """Samples G completions for each of Q prompts (token ids): Q G of them, question-major.
    A completion is two lists, token ids and their log-probabilities. It ends with an EOS, unless it
    was cut at `max_tokens`. Temperature 0 is greedy."""
    Q, L, device = len(prompts), max(map(len, prompts)), model.device
    # Prompts are padded on the left: all end in the last column, where the completions begin.
    padded = torch.tensor([[-1] * (L - len(p)) + p for p in prompts], device=device)  # (Q, L)
    input_ids, attention_mask = padded.clamp(min=0), (padded >= 0).long()  # (Q, L), (Q, L)
    cache = DynamicCache(config=model.config)  # its usual layers would be copied at every token
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    completions = [([], []) for _ in range(Q * group_size)]  # token ids, log-probabilities
    running = completions  # the same lists, of those that have a row in the tensors: R of them
    for t in range(max_tokens):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # 0 where a prompt begins
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache,
            position_ids=positions[:, -input_ids.shape[1] :], use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # (Q, V) of the prompts, then (R, V)  # fmt: skip
        if t == 0:  # each prompt was read once: now every one of its G completions gets a row
            chosen = torch.arange(Q, device=device).repeat_interleave(group_size)  # (R,)
            cache.reorder_cache(chosen)
            logits, attention_mask = logits[chosen], attention_mask[chosen]
        tokens, log_probs = sample_tokens(logits, temperature, top_p)  # (R,), (R,)
        for (ids, lps), token, lp in zip(running, tokens.tolist(), log_probs.tolist(), strict=True):
            if not ids or ids[-1] not in eos_ids:  # else it has ended, but still has a row
                ids.append(token)
                lps.append(lp)
        unfinished = [row for row, (ids, _) in enumerate(running) if ids[-1] not in eos_ids]
        if not unfinished:
            break
        # The ended ones lose their rows once they are a quarter: each time copies the cache.
        if len(unfinished) <= 0.75 * len(running):
            chosen = torch.tensor(unfinished, device=device)  # (R,)
            cache.reorder_cache(chosen)
            tokens, attention_mask = tokens[chosen], attention_mask[chosen]
            running = [running[row] for row in unfinished]
        input_ids = tokens[:, None]  # (R, 1)
        attention_mask = F.pad(attention_mask, (0, 1), value=1)  # (R, L + t + 1)
    return completions


# --- Rewards --------------------------------------------------------------------------------------
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# -$1,234.50, $-5 or 50%. Only runs of digits repeat, none twice in a row: linear time on any text.
NUMBER = re.compile(
    r"(?:([+-]?)\$?|\$([+-]))((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)%?\.?"
)


def extract_answer(text: str) -> str | None:
    """What the last <answer>...</answer> holds, stripped; None if there is none."""
    before, _, _ = text.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer.strip() if opening else None


def format_reward(text: str) -> float:
    """1 for `<think>...</think>\\n<answer>...</answer>`, each tag once, nothing around; else 0."""
    in_order = text.startswith("<think>") and text.endswith("</answer>")
    joined = "</think>\n<answer>" in text
    return float(in_order and joined and all(text.count(tag) == 1 for tag in TAGS))


def same_number(given: str, answer: str) -> bool:
    """Whether both are one number, exactly; commas, $, % and a full stop left aside."""
    matches = [NUMBER.fullmatch(text.replace("\N{MINUS SIGN}", "-")) for text in (given, answer)]
    values = [m and Decimal((m[1] or m[2] or "") + m[3].replace(",", "")) for m in matches]
    return None not in values and values[0] == values[1]


def accuracy_reward(text, answer, extract=None, same=same_number, nearly=1.5) -> float:
    """2 if the text's answer is the right one to the letter, 1.5 if only as a number, else 0."""
    given = extract_answer(text) if extract is None else extract(text)
    if not given:
        return 0.0  # no answer is never right
    if given == answer:
        return 2.0
    return nearly if same(given, answer) else 0.0


def rollout(model, tokenizer, config, group_size, temperature, top_p, questions):
    """Samples and scores G completions of each of Q questions: Q G of them, question-major."""
    eos_ids, limit = model.generation_config.eos_token_id, config.max_completion_tokens
    at_once = config.sample_batch // group_size  # questions whose completions fit in memory
    chunks = [questions[i : i + at_once] for i in range(0, len(questions), at_once)]
    completions = []
    for chunk in tqdm(chunks, "sampling", leave=False, disable=not IS_FIRST_RANK):
        prompts = [question.prompt_ids for question in chunk]
        sampled = sample_completions(model, prompts, group_size, limit, temperature, eos_ids, top_p)
        for i, (token_ids, log_probs) in enumerate(sampled):
            q, text = chunk[i // group_size], tokenizer.decode(token_ids, skip_special_tokens=True)
            truncated = token_ids[-1] not in eos_ids
            rewards = format_reward(text), TASKS[config.task].answer_reward(text, q.answer)
            completions.append(Completion(q.prompt_ids, token_ids, log_probs, truncated, *rewards))
    return completions


# --- Advantages and pruning -----------------------------------------------------------------------
def group_advantages(rewards_QG: torch.Tensor) -> torch.Tensor:
    """A = (r - mean) / (std + 1e-4) within each question's G completions (eq. 1): (Q, G)."""
    std, mean = torch.std_mean(rewards_QG, dim=1, keepdim=True)  # (Q, 1) each; std is over G - 1
    return (rewards_QG - mean) / (std + 1e-4)


def prune(advantages_QG, num_kept, gamma=0.0, by="abs_advantage") -> torch.Tensor:
    """True for the completions to train on (eq. 2), (Q, G) bool: of each question the k best by
    `by` (of equal ones the first), less those with |A| < gamma. With gamma 0 all k stay."""
    abs_QG = advantages_QG.abs()
    score_QG = {
        "abs_advantage": abs_QG, "advantage": advantages_QG, "smallest": -abs_QG,
        "random": torch.rand_like(abs_QG) if by == "random" else None,
    }[by]  # fmt: skip
    # stable: topk would leave it open which of equal ones come first
    order = score_QG.sort(dim=1, descending=True, stable=True).indices  # (Q, G)
    best_QG = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :num_kept], True)
    return best_QG & (abs_QG >= gamma)


# --- Refill: the paper's dynamic completion allocation --------------------------------------------
def collect_batch(draw, stream: Iterator[Question], room: int, config: Config):
    """Greedy dynamic refill: takes new questions, samples and prunes until the room is full.

    `draw(questions)` gives Q G scored completions; `room` is the number of rows that this rank
    trains in a step. Returns the kept ones (at most `room`), all sampled ones, and the rounds.
    As each question keeps k, a single round asks all the questions that it takes. Only if gamma
    drops some is there room left for another round, of MAX_REFILL_ROUNDS at most."""
    G, k = config.group_size, config.num_kept
    kept, sampled, rounds = [], [], 0
    while len(kept) < room and rounds < (MAX_REFILL_ROUNDS if config.refill else 1):
        free = room - len(kept)
        # Without refill it asks as few questions as GRPO, which keeps all G of each.
        Q = math.ceil(free / k) if config.refill else free // G
        completions = draw(list(itertools.islice(stream, Q)))  # Q G
        # float64: a mean of rewards such as 0.1 is off by a rounding, which eq. 1 divides by 1e-4
        rewards = torch.tensor([c.reward for c in completions], dtype=torch.float64)  # (Q G,)
        advantages_QG = group_advantages(rewards.view(-1, G))
        keep_QG = prune(advantages_QG, k, config.gamma, config.prune_by)
        k_of_last = free - (Q - 1) * k
        if k_of_last < k:  # k does not divide the room: the last question keeps what fits
            keep_QG[-1:] = prune(advantages_QG[-1:], k_of_last, config.gamma, config.prune_by)
        for c, advantage in zip(completions, advantages_QG.flatten().tolist(), strict=True):
            c.advantage = advantage
        kept += itertools.compress(completions, keep_QG.flatten().tolist())
        sampled += completions
        rounds += 1
    return kept, sampled, rounds


# --- Log-probabilities ----------------------------------------------------------------------------
@dataclass
class Batch:
    """N rows: prompt, completion, padding on the right, which no token before it attends to.

    A row with the prompt p q and the completion a b, padded to T = 5 and C = 3:

        input_ids  p q a b -
        predicts   0 1 1 0 0    the logits at q predict a, those at a predict b
        mask       1 1 0        a and b
    """

    input_ids: torch.Tensor  # (N, T)
    predicts: torch.Tensor  # (N, T) bool: the next token is one of the completion's
    mask: torch.Tensor  # (N, C) bool: the completion's own tokens, EOS included
    advantages: torch.Tensor  # (N,)
    sampled_log_probs: torch.Tensor  # (N, C) the sampler's, 0 in padding; for sampling_gap alone
    old_log_probs: torch.Tensor | None = None  # (N, C) pi_old, from the first of the mu iterations
    ref_log_probs: torch.Tensor | None = None  # (N, C) pi_ref, if there is one


def make_batch(rows: list[Completion], device="cpu") -> Batch:
    """Pads N rows to the longest. The masks come from lengths, not from a padding token: its id is
    often that of EOS as well, and then no EOS would ever be trained."""
    prompt_length = torch.tensor([[len(r.prompt_ids)] for r in rows])  # (N, 1)
    length = torch.tensor([[len(r.token_ids)] for r in rows])  # (N, 1)  |o_i|
    T, C = max(r.num_tokens for r in rows), int(length.max())
    input_ids = torch.tensor([(r.prompt_ids + r.token_ids + [0] * T)[:T] for r in rows])  # (N, T)
    following = torch.arange(T) + 1 - prompt_length  # (N, T) place of the next token in o_i
    predicts = (following >= 0) & (following < length)  # (N, T)
    mask = torch.arange(C) < length  # (N, C)
    advantages = torch.tensor([r.advantage for r in rows])  # (N,)
    sampled_log_probs = torch.tensor([(r.log_probs + [0.0] * C)[:C] for r in rows])  # (N, C)
    tensors = (input_ids, predicts, mask, advantages, sampled_log_probs)
    return Batch(*(x.to(device) for x in tensors))


def pack(rows: list[Completion], tokens_per_microbatch: int) -> list[list[Completion]]:
    """Splits rows, all of them, into micro-batches of at most so many tokens, padding included:
    longest first, so that little is padding. A row that is longer than the limit goes alone."""
    packs: list[list[Completion]] = []
    for row in sorted(rows, key=lambda row: row.num_tokens, reverse=True):
        if packs and (len(packs[-1]) + 1) * packs[-1][0].num_tokens <= tokens_per_microbatch:
            packs[-1].append(row)
        else:
            packs.append([row])
    return packs


def token_log_probs(model, batch: Batch, temperature: float) -> torch.Tensor:
    """log pi(o_t | q, o_<t) of completion tokens, of logits / temperature: (N, C), 0 in padding."""
    # V is large: the model computes logits only where they predict a completion's token, at
    # M = sum_i |o_i| places. In the row p q a b - of Batch, at q and a; the targets are a and b.
    out = model(input_ids=batch.input_ids, logits_to_keep=batch.predicts, use_cache=False)
    logits = out.logits.float() / temperature  # (M, V), by far the largest tensor
    targets = batch.input_ids[:, 1:][batch.predicts[:, :-1]]  # (M,)
    log_probs = -F.cross_entropy(logits, targets, reduction="none")  # (M,)
    return log_probs.new_zeros(batch.mask.shape).masked_scatter(batch.mask, log_probs)


# --- Loss -----------------------------------------------------------------------------------------
def token_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1/|o_i| sum_t, for each completion: (N, C) -> (N,)"""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)


def cppo_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, clip_eps, beta):
    """Eq. 5 without 1/N sum_i, which is update's: a loss for each completion, (N,).
    Log-probabilities and mask are (N, C), advantages (N,). The statistics are (N,) too, means over
    own tokens: `kl` (eq. 4), and `clip_fraction`, 1 where the clip stops the pull of A."""
    # In the first of the mu iterations rho is 1; its gradient is that of log pi_theta all the same.
    ratio = torch.exp(log_probs - old_log_probs)  # (N, C) rho, eq. 3
    unclipped = ratio * advantages[:, None]  # (N, C)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages[:, None]  # (N, C)
    kl = torch.zeros_like(log_probs)
    if beta > 0:
        log_ref = ref_log_probs - log_probs  # log(pi_ref / pi_theta)
        kl = torch.exp(log_ref) - log_ref - 1  # (N, C) eq. 4
    losses = -token_mean(torch.minimum(unclipped, clipped) - beta * kl, mask)  # (N,)
    clip_fraction = token_mean((clipped < unclipped).float(), mask)
    return losses, {"kl": token_mean(kl.detach(), mask), "clip_fraction": clip_fraction}


# --- Update ---------------------------------------------------------------------------------------
def update(policy, reference, optimizer, scheduler, rows, config, world_size=1) -> dict:
    """mu optimizer steps on eq. 5, over the rows of all ranks, N together.
    Returns sums over this rank's rows of means over their tokens: `loss`, `kl`, `clip_fraction`,
    `grad_norm` (one for all), each a mean over the mu steps, and `sampling_gap`, before the first,
    |log pi_sampler - log pi_theta|: 0 but for rounding, or the sampler is wrong. Raises
    FloatingPointError, on all ranks, before a gradient of inf or nan reaches the weights."""
    device, mu = next(policy.parameters()).device, config.num_iterations
    N = sum_over_ranks({"rows": len(rows)})["rows"]
    # The weights are float32: in bfloat16 they would not move by 1e-6. Only products are bfloat16.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    batches = [make_batch(part, device) for part in pack(rows, config.tokens_per_microbatch)]
    if config.beta > 0:
        with torch.no_grad():
            for batch in batches:
                batch.ref_log_probs = token_log_probs(reference, batch, config.temperature)
    sums = dict.fromkeys(("loss", "kl", "clip_fraction", "grad_norm", "sampling_gap"), 0.0)
    for iteration in range(mu):
        for batch in batches:
            # With DDP, ranks exchange gradients once: in the backward pass of their last batch.
            policy.require_backward_grad_sync = batch is batches[-1]
            with autocast:
                log_probs = token_log_probs(policy, batch, config.temperature)  # (N, C)
            if iteration == 0:
                # The weights have not moved since the sampling: pi_old costs no pass of its own.
                # (With the sampler's log-probabilities, rounded otherwise, rho would not be 1.)
                batch.old_log_probs = log_probs.detach()
                gap = (batch.old_log_probs - batch.sampled_log_probs).abs()  # (N, C)
                sums["sampling_gap"] += token_mean(gap, batch.mask).sum().item()
            losses, statistics = cppo_loss(
                log_probs, batch.old_log_probs, batch.ref_log_probs, batch.advantages, batch.mask,
                config.clip_eps, config.beta,
            )  # fmt: skip
            # DDP's exchange is a mean over the ranks; eq. 5 is a sum over them, divided by N.
            (losses.sum() * world_size / N).backward()
            for name, value in {"loss": losses.detach(), **statistics}.items():
                sums[name] += value.sum().item() / mu
        if N and not batches:  # the other ranks wait for this one's gradients: zeros
            token = torch.zeros(1, 1, dtype=torch.long, device=device)
            (0 * policy(input_ids=token, use_cache=False).logits.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        if not math.isfinite(norm):
            raise FloatingPointError("the gradient is not finite")
        sums["grad_norm"] += norm * len(rows) / mu  # a sum over rows, like the others
        if not N:  # zeros would let AdamW's momentum move the weights; no gradients do not
            optimizer.zero_grad()
        optimizer.step()
        scheduler.step()
        # With DDP zeros, not None: its buckets are the gradients' memory, and would be held twice.
        optimizer.zero_grad(set_to_none=world_size == 1)
    return sums


# === Part 2: the program ==========================================================================
@dataclass
class Task:
    """A choice of --task. Your own script may add one to TASKS, and then call main()."""

    questions: Callable[[str | None, str], list[Question]]  # (--train_data, "train"), or of test
    answer_reward: Callable[[str, str], float]  # (completion, answer) -> 0 to 2, right from 1.5 on
    defaults: dict  # of the flags without one: batch_size, learning_rate and so on, as in TASKS


def arithmetic_questions(source: None, split: str) -> list[Question]:
    """2,560 or, to test, 512 sums like `37+58=`. No test sum is a training sum, even turned round.
    The teacher of the demonstrations forgets to carry 7 times out of 10. A model that imitates it
    gets about the sums without a carry right; CPPO has to find the rest."""
    if source:
        raise UserError("--task arithmetic makes its own questions: drop the data files")
    rng = random.Random(0)  # the same sums for every seed
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(pairs)
    questions = []
    for a, b in [turned for pair in pairs for turned in dict.fromkeys([pair, pair[::-1]])]:
        units, tens = a % 10 + b % 10, a // 10 + b // 10
        carry = units >= 10 and rng.random() < 0.3
        think = f"{a % 10}+{b % 10}={units} {a // 10}+{b // 10}={tens}"
        think += f"+1={tens + 1}" if carry else ""
        demonstration = f"<think>{think}</think>\n<answer>{tens + carry}{units % 10}</answer>"
        questions.append(Question(f"{a}+{b}=", str(a + b), demonstration))
    return questions[:512] if split == "test" else questions[512 : 512 + 2560]  # 512 cuts no pair


def table_questions(system: str, form: str, source: str, split: str) -> list[Question]:
    """Questions of a file or of a data set on the hub. A row has a `question` or `problem`; and an
    `answer`, bare or as GSM8K's `solution #### 72`, or a `solution` that ends so or boxes it.
    `form` is how a demonstration gives the answer. Raises UserError."""
    import datasets  # here only: a second that the arithmetic task need not wait

    datasets.disable_progress_bars()
    columns, questions = ("question", "problem", "answer", "solution"), []
    kind = Path(source).suffix[1:].replace("jsonl", "json")
    with blame(f"--{split}_data {source}: give a parquet, json, jsonl or csv file, or NAME:SUBSET"):
        if kind in ("parquet", "json", "csv"):  # csv as text: else 3 may become 3.0
            options = {"converters": dict.fromkeys(columns, str)} if kind == "csv" else {}
            table = datasets.load_dataset(kind, data_files=source, split="train", **options)
        else:
            table = datasets.load_dataset(*source.split(":"), split=split)  # name:subset
        for i, row in enumerate(table, 1):
            cell = {n: "" if row.get(n) is None else str(row[n]).strip() for n in columns}
            text, whole = cell["question"] or cell["problem"], cell["solution"] or cell["answer"]
            think, marks, final = whole.rpartition("####")  # no marks: all of it is `final`
            if not marks and (cell["solution"] or boxed(whole)):
                think, final = whole, boxed(whole)
            answer = (cell["solution"] and cell["answer"]) or (final or "").strip()
            if not (text and answer):
                raise ValueError(f"row {i} lacks a question or problem, or an answer or solution")
            think = re.sub(r"<<[^<>\n]*>>", "", think).strip()  # calculator marks: 2+2=<<2+2=4>>4
            demonstration = f"<think>{think}</think>\n<answer>{form.format(answer)}</answer>"
            prompt = [{"role": "system", "content": system}, {"role": "user", "content": text}]
            questions.append(Question(prompt, answer, demonstration))
        if not questions:
            raise ValueError("it has no rows")
    return questions


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} of a LaTeX text holds, braces in pairs; None if there is none."""
    _, box, rest = text.replace("\\fbox", "\\boxed").rpartition("\\boxed")
    rest, depth = rest.lstrip() if box else "", 0
    if not rest.startswith("{"):  # \boxed 5
        return re.match(r"[^\s$]*", rest)[0] or None
    for match in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ is no brace
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[1 : match.start()].strip() or None
    return None


def same_mathematics(given: str, answer: str) -> bool:
    """Whether two LaTeX expressions are equal, in the eyes of math-verify."""
    with blame("--task math needs one more package: pip install math-verify", ImportError):
        from math_verify import parse, verify
    return verify(*(parse(f"$\\boxed{{{latex}}}$") for latex in (answer, given)))


math_reward = partial(accuracy_reward, extract=boxed, same=same_mathematics, nearly=2.0)
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
PAPERS_RECIPE = {
    "model": "Qwen/Qwen2.5-1.5B-Instruct", "batch_size": 128, "learning_rate": 1e-6,
    "max_prompt_tokens": 512, "max_completion_tokens": 1024,
    "warm_start_steps": 0, "warm_start_learning_rate": 1e-5,
}  # fmt: skip
TASKS = {
    "arithmetic": Task(arithmetic_questions, accuracy_reward, {
        "steps": 80, "batch_size": 16, "learning_rate": 2e-4,
        "max_prompt_tokens": 16, "max_completion_tokens": 32,
        "warm_start_steps": 350, "warm_start_learning_rate": 3e-3,
    }),
    "gsm8k": Task(partial(table_questions, SYSTEM_PROMPT.format(""), "{}"), accuracy_reward, {
        "train_data": "openai/gsm8k:main", "test_data": "openai/gsm8k:main", **PAPERS_RECIPE,
    }),
    "math": Task(partial(table_questions, SYSTEM_PROMPT.format(BOX_IT), BOX), math_reward, {
        "train_data": "DigitalLearningGmbH/MATH-lighteval",
        "test_data": "HuggingFaceH4/MATH-500", **PAPERS_RECIPE,
    }),
}  # fmt: skip


def load_questions(config: Config) -> tuple[list[Question], list[Question]]:
    """The task's questions, to train on and, the first --eval_questions of them, to test."""
    task, count = TASKS[config.task], config.eval_questions
    train = [] if config.eval_only else task.questions(config.train_data, "train")
    return train, [] if count == 0 else task.questions(config.test_data, "test")[:count]


def encode_prompts(questions: list[Question], tokenizer) -> list[Question]:
    """Fills in `prompt_ids`, messages through the tokenizer's chat template, if it has one."""
    for question in questions:
        text, add_bos = question.prompt, True
        if not isinstance(text, str) and tokenizer.chat_template:
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
            add_bos = False  # the template has, where it is wanted
        elif not isinstance(text, str):
            text = "".join(message["content"] + "\n\n" for message in text)
        question.prompt_ids = tokenizer(text, add_special_tokens=add_bos).input_ids
    return questions


def question_stream(questions, seed, rank=0, world_size=1) -> Iterator[Question]:
    """One rank's endless share of the questions. Every epoch is shuffled and dealt out to the ranks
    like cards, so that no question comes twice in it."""
    for epoch in itertools.count():
        shuffle = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(questions), generator=shuffle)[rank::world_size]
        yield from (questions[i] for i in order.tolist())


# --- Models ---------------------------------------------------------------------------------------
def tiny_model_and_tokenizer():
    """A random Qwen2 of 0.45M parameters and a tokenizer of characters; each tag is one token."""
    words = ["<pad>", "<eos>", *TAGS, *"\n +=0123456789"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()  # no spaces between tokens
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    shape = transformers.Qwen2Config(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        tie_word_embeddings=True, initializer_range=0.1, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(shape), tokenizer


def load_model_and_tokenizer(name: str | None):
    """The model, in float32, and its tokenizer, from a folder or the hub; None is the tiny one."""
    transformers.utils.logging.disable_progress_bar()
    with blame(f"--model {name}: give a hub name, or a folder that save_pretrained has made"):
        if name is None:
            model, tokenizer = tiny_model_and_tokenizer()
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        if not set(tokenizer("42").input_ids) - {*tokenizer.all_special_ids}:
            raise ValueError("it lacks the tokenizer's files")  # it loads, as an empty tokenizer
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer has no EOS token: completions would never end")
    ids = model.generation_config.eos_token_id  # from here on a list: chat models have several
    eos_ids = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}
    model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(eos_ids))
    return model.eval(), tokenizer  # eval: with dropout the ratio would not start at 1


class RoomyLayer(DynamicLayer):
    """A layer of the key-value cache with spare columns: a new token is written into the next one,
    where the base class would copy all that came before, at every token."""

    length = 0  # columns in use

    def get_seq_length(self) -> int:
        """The tokens that it holds, without the spare columns."""
        return self.length

    def update(self, key_states, value_states, *args, **kwargs):
        """Appends keys and values, (R, heads, new, D) each; returns all there are."""
        start, self.length = self.length, self.length + key_states.shape[2]
        if start == 0:  # the prompts
            return super().update(key_states, value_states)
        if self.length > self.keys.shape[2]:
            self.keys, self.values = (F.pad(x, (0, 0, 0, 32)) for x in (self.keys, self.values))
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def copy_for(model, dtype: str):
    """A frozen copy in the dtype of compute, to sample from or as the reference."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    for parameter in frozen.parameters():  # not .to(): rotary frequencies must stay float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return frozen


@torch.no_grad()
def refresh(sampler, model):
    """Gives the sampler the model's weights, rounded to its dtype. (In float32 they are one.)"""
    for old, new in zip(sampler.parameters(), model.parameters(), strict=True):
        old.copy_(new)


def make_optimizer(policy, learning_rate: float, num_updates: int, config: Config):
    """AdamW without weight decay, and a cosine schedule, as in the paper's recipe: back to 0 after
    the last step, and with a warm-up from 0, so that the very first step moves nothing."""
    optimizer = torch.optim.AdamW(policy.parameters(), learning_rate, weight_decay=0.0, fused=True)
    warmup = math.ceil(num_updates * config.warmup_ratio)
    return optimizer, transformers.get_scheduler("cosine", optimizer, warmup, num_updates)


# --- Ranks: torchrun's environment; one process is the plain case ---------------------------------
def init_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device), as torchrun's environment has it."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)
    rank, world_size, local_rank, local_ranks = (int(os.environ.get(*name)) for name in names)
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        if local_ranks > torch.cuda.device_count():
            raise UserError(f"--nproc_per_node {local_ranks} is more than the GPUs here")
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # replans each length; PyTorch issue 193893
    elif local_ranks > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own default
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    if world_size > 1:  # an hour, for what one rank does alone: a download, a save
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    return rank, world_size, device


def say(text: str):
    """Prints above the progress bar, on the first rank."""
    if IS_FIRST_RANK:
        tqdm.write(text)


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each number added up over all ranks."""
    if not dist.is_initialized():
        return values
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.tensor([*values.values()], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


# --- Warm start and evaluation --------------------------------------------------------------------
def warm_start(policy, tokenizer, stream: Iterator[Question], config: Config, world_size: int):
    """Imitates demonstrations: eq. 5 with beta = 0, one optimizer step a batch, at which rho is 1,
    and A in proportion to |o_i|: so all tokens weigh the same, as in a log-likelihood."""
    start, steps = time.perf_counter(), config.warm_start_steps
    optimizer, scheduler = make_optimizer(policy, config.warm_start_learning_rate, steps, config)
    imitation = replace(config, beta=0.0, num_iterations=1)
    for _ in tqdm(range(steps), "warm start", leave=False, disable=not IS_FIRST_RANK):
        rows = []
        for question in itertools.islice(stream, math.ceil(WARM_START_BATCH / world_size)):
            token_ids = tokenizer(question.demonstration, add_special_tokens=False).input_ids
            token_ids.append(tokenizer.eos_token_id)
            A = len(token_ids) / config.max_completion_tokens  # at most 1
            rows.append(Completion(question.prompt_ids, token_ids, advantage=A))
        with blame("warm start: lower --warm_start_learning_rate", FloatingPointError):
            update(policy, None, optimizer, scheduler, rows, imitation, world_size)
    return {"step": 0, "warm_start_seconds": time.perf_counter() - start}


def evaluate(tokenizer, questions, rank, world_size, config, model) -> dict:
    """Share of right completions: greedy ones, or sampled as the paper does for AMC and AIME."""
    start, n, count = time.perf_counter(), config.eval_samples, len(questions)
    torch.manual_seed(hash((config.seed, rank)))  # the same numbers for each evaluation
    temperature, top_p = (0.6, 0.95) if n > 1 else (0.0, 1.0)
    mine = rollout(model, tokenizer, config, n, temperature, top_p, questions[rank::world_size])
    right = sum(c.accuracy_reward >= 1.5 for c in mine) / n
    accuracy = sum_over_ranks({"right": right})["right"] / count
    say(f"cppo: {accuracy:.1%} of {count:,} test questions right")
    seconds = time.perf_counter() - start
    return {"eval_accuracy": accuracy, "eval_questions": count, "eval_seconds": seconds}


# --- What a run writes ----------------------------------------------------------------------------
def step_metrics(kept, sampled, rounds, sums, times, config) -> dict:
    """A step's counts over all ranks, and averages, None if nothing was kept. `sums` are over this
    rank's kept completions, `times` the clock before sampling, after it, and after training."""
    groups = [sampled[i : i + config.group_size] for i in range(0, len(sampled), config.group_size)]
    counts = {
        "questions": len(groups), "sampled": len(sampled), "kept": len(kept),
        "dropped": len(groups) * config.num_kept - len(kept),  # below gamma, or without room
        "dead_groups": sum(len({c.reward for c in group}) == 1 for group in groups),
        "refill_rounds": rounds, "sampled_tokens": sum(len(c.token_ids) for c in sampled),
        "trained_tokens": sum(len(c.token_ids) for c in kept),
    }  # fmt: skip
    over_sampled = {
        "reward": sum(c.reward for c in sampled), "format": sum(c.format_reward for c in sampled),
        "accuracy": sum(c.accuracy_reward >= 1.5 for c in sampled),
        "truncated": sum(c.truncated for c in sampled),
        "completion_tokens": counts["sampled_tokens"],
    }  # fmt: skip
    over_kept = {"abs_advantage_kept": sum(abs(c.advantage) for c in kept), **sums}
    total = sum_over_ranks({**counts, **over_sampled, **over_kept})
    return {
        **{name: int(total[name]) for name in counts},
        **{name: total[name] / total["sampled"] for name in over_sampled},
        **{name: total[name] / total["kept"] if total["kept"] else None for name in over_kept},
        "sample_seconds": times[1] - times[0], "train_seconds": times[2] - times[1],
        "step_seconds": times[2] - times[0],
    }  # fmt: skip


def append_metrics(folder: Path, record: dict):
    """Appends a line to metrics.jsonl, on the first rank."""
    if IS_FIRST_RANK:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def summary(folder: Path) -> str:
    """What the run in `folder` has paid, from its metrics.jsonl."""
    records = [*map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
    asked, seconds = (sum(m.get(n, 0) for m in records) for n in ("questions", "step_seconds"))
    return f"cppo: {asked:,} questions, {seconds / max(1, asked):.3g} seconds each, in {folder}"


def find_checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints, oldest first. They are written as .tmp and renamed when complete."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def save_checkpoint(folder: Path, model, tokenizer, state: dict):
    """Writes checkpoint-STEP, in place of all but the newest and checkpoint-0, pi_ref. Crash at any
    moment, or fill the disk: those two stay whole. Raises UserError."""
    path = folder / f"checkpoint-{state['step']}"
    unfinished = path.with_suffix(".tmp")
    for old in find_checkpoints(folder)[1:-1]:  # first: Adam's moments make them large
        shutil.rmtree(old, ignore_errors=True)
    with blame(f"{path} cannot be written, the one before it stays"):
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        torch.save(state, unfinished / "trainer_state.pt")
        shutil.copy(folder / "metrics.jsonl", unfinished)  # all that is logged up to this step
        for file in filter(Path.is_file, unfinished.rglob("*")):  # on the disk: power may fail
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        unfinished.rename(path)


def load_state(folder: Path, config: Config, world_size: int) -> dict:
    """What save_checkpoint saved last, with its `path`; {} if nothing. Raises UserError."""
    if not config.resume or not find_checkpoints(folder):
        return {}
    path = find_checkpoints(folder)[-1]
    with blame(f"--resume: {path} cannot be read; delete it to use the one before it"):
        # mmap: else each of 8 ranks would read all of Adam's moments into memory
        state = torch.load(path / "trainer_state.pt", "cpu", weights_only=True, mmap=True)
        before = state["config"] | {"ranks": len(state["asked"])}
    may_change = {"output_dir", "resume", "save_every", "eval_every"}
    may_change |= {"tokens_per_microbatch", "sample_batch"}  # other roundings, other draws
    for name, now in (asdict(config) | {"ranks": world_size}).items():
        if name not in may_change and before.get(name) != now:
            raise UserError(f"--resume: {name} was {before.get(name)} in that run and is now {now}")
    return state | {"path": path}


# --- A run ----------------------------------------------------------------------------------------
def set_up(config: Config) -> tuple:
    """Ranks, checkpoint, model, questions. All checks come before the first write."""
    folder = Path(config.output_dir)
    # (Before the ranks meet: soon after, the first of them writes to the folder.)
    is_a_run = config.resume and (folder / "metrics.jsonl").exists()
    if not (config.eval_only or is_a_run) and any(folder.glob("*")):
        raise UserError(f"--output_dir {folder} is not empty: choose another, or --resume its run")
    rank, world_size, device = init_distributed()
    state = load_state(folder, config, world_size)
    step = state.get("step", -1)
    if sum_over_ranks({"step": step})["step"] != step * world_size:  # not all are equal
        raise UserError("--resume: --output_dir must be one folder that all machines share")
    loaded, test_questions = load_questions(config)
    answer = [*loaded, *test_questions][0].answer
    TASKS[config.task].answer_reward("<answer>\\boxed{?}</answer>", answer)  # fails now, if ever
    torch.manual_seed(config.seed)  # of the tiny model's weights
    model, tokenizer = load_model_and_tokenizer(state.get("path", config.model))
    with blame(f"--model {config.model}: its chat template refuses the messages"):
        encode_prompts([*loaded, *test_questions], tokenizer)
    questions = [q for q in loaded if len(q.prompt_ids) <= config.max_prompt_tokens]
    left_out = f"{len(loaded) - len(questions):,} prompts over --max_prompt_tokens left out"
    if len(questions) < world_size and not config.eval_only:
        raise UserError(f"{len(questions)} training questions are too few, {left_out}")
    if config.warm_start_steps and not all(q.demonstration for q in questions):
        raise UserError("--warm_start_steps must be 0: there are questions without demonstration")
    say(f"cppo: {config.task}, {world_size} rank(s), {device.type}, {config.dtype}; {left_out}")
    if IS_FIRST_RANK and not config.eval_only:
        with blame(f"--output_dir {folder} cannot be written"):
            folder.mkdir(parents=True, exist_ok=True)
            metrics = (state["path"] / "metrics.jsonl").read_text() if state else ""
            (folder / "metrics.jsonl").write_text(metrics)
            (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
    return rank, world_size, state, model.to(device), tokenizer, questions, test_questions


def train(config: Config):
    """A whole run: warm start, steps of CPPO, evaluations, checkpoints; or an evaluation alone."""
    rank, world_size, state, model, tokenizer, questions, test_questions = set_up(config)
    test = partial(evaluate, tokenizer, test_questions, rank, world_size, config)
    if config.eval_only:
        return test(copy_for(model, config.dtype))
    folder, G, k = Path(config.output_dir), config.group_size, config.num_kept
    room = config.batch_size // world_size  # completions that each rank trains in a step
    per_step = world_size * (math.ceil(room / k) if config.refill else room // G)  # questions
    steps = math.ceil(len(questions) / per_step) if config.steps is None else config.steps
    first = state.get("step", -1) + 1
    say(f"cppo: steps {first} to {steps}, each with {per_step} questions; G = {G}, k = {k}")
    # `model` has the float32 masters; `policy` is the same, inside DDP if there are several ranks;
    # `sampler` a copy in the dtype of compute, in float32 `model` itself; `reference` is pi_ref.
    policy = DDP(model, gradient_as_bucket_view=True) if world_size > 1 else model
    deal = partial(question_stream, questions, config.seed, rank, world_size)
    if not state:
        append_metrics(folder, warm_start(policy, tokenizer, deal(), config, world_size))
    sampler = model if config.dtype == "float32" else copy_for(model, config.dtype)
    initial = load_model_and_tokenizer(folder / "checkpoint-0")[0] if state else model
    reference = copy_for(initial.to(model.device), config.dtype) if config.beta > 0 else None
    updates, asked = steps * config.num_iterations, state.get("asked", [0] * world_size)
    optimizer, scheduler = make_optimizer(policy, config.learning_rate, updates, config)
    if state:
        optimizer.load_state_dict(state.pop("optimizer"))
        scheduler.load_state_dict(state["scheduler"])
    stream = itertools.islice(deal(), asked[rank], None)  # what this rank has not asked yet
    draw = partial(rollout, sampler, tokenizer, config, G, config.temperature, 1.0)
    for step in tqdm(range(first, steps + 1), config.task, disable=not IS_FIRST_RANK):
        if step > 0:  # step 0 is only evaluated and saved
            # So a resumed step draws the same numbers. (hash: the CPU's seed has 32 bits only.)
            torch.manual_seed(hash((config.seed, step, rank)))
            times, rate = [time.perf_counter()], scheduler.get_last_lr()[0]
            kept, sampled, rounds = collect_batch(draw, stream, room, config)
            times.append(time.perf_counter())
            with blame(f"step {step}: lower --learning_rate in a new run", FloatingPointError):
                sums = update(policy, reference, optimizer, scheduler, kept, config, world_size)
            refresh(sampler, model)
            times.append(time.perf_counter())
            asked[rank] += len(sampled) // G
            if world_size > 1:
                dist.all_gather_object(asked, asked[rank])
            metrics = {"step": step, "epoch": sum(asked) / len(questions), "learning_rate": rate}
            metrics |= step_metrics(kept, sampled, rounds, sums, times, config)
            append_metrics(folder, metrics)
            if step == 1 or step % max(1, steps // 10) == 0:
                say("  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN))
        if test_questions and (step == steps or step % (config.eval_every or steps) == 0):
            append_metrics(folder, {"step": step, **test(sampler)})
        if IS_FIRST_RANK and (step == steps or step % (config.save_every or steps) == 0):
            now = {"step": step, "asked": asked, "config": asdict(config)}
            now |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            save_checkpoint(folder, model, tokenizer, now)
    say(summary(folder) if IS_FIRST_RANK else "")


def main():
    """The command line: a user's mistake is one line on stderr, and exit status 2."""
    # Else glibc hands freed tensors back to the kernel, which wipes new pages: a tenth of a step.
    if sys.platform == "linux" and not torch.cuda.is_available():
        for option, value in ((-1, -1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX
            ctypes.CDLL(None).mallopt(option, value)
    sys.stdout.reconfigure(line_buffering=True)
    options = {"usage": argparse.SUPPRESS, "description": __doc__.split("\n")[0]}  # one-line errors
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False, **options)
    status, message = 2, None
    try:
        train(Config(**vars(parser.parse_args())))
        status = 0
    except (UserError, OSError) as error:
        message = error
    except torch.OutOfMemoryError:
        message = "CUDA is out of memory: lower --tokens_per_microbatch or --sample_batch"
    except KeyboardInterrupt:
        status, message = 130, "stopped; with --resume it goes on from the last checkpoint"
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
