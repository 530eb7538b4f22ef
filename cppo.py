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

Letters of shapes; rows are question-major everywhere: repeat_interleave in, view(Q, G) out.

    Q questions                 N completions being trained      T = L + C tokens of a row
    G completions a question    L prompt tokens                  V vocabulary
    k kept a question           C completion tokens              R completions still being sampled

N is all that a step trains in the equations, and the rows of one micro-batch in shapes.

    python cppo.py --task arithmetic          two-digit additions on a laptop
    python cppo.py --pruning_rate 0           GRPO
    torchrun --nproc_per_node 8 cppo.py       GSM8K with Qwen2.5-1.5B-Instruct on 8 GPUs
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Literal

import jinja2
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer


class UserError(Exception):
    """A mistake that the user can mend: one line on stderr says how, and the exit status is 2."""


class NotFinite(UserError):
    """A gradient of inf or nan. It has not reached the weights."""


# --- Configuration: one field is one flag ---------------------------------------------------------
def flag(default, text: str, interval: str = ""):
    """A dataclass field that HfArgumentParser turns into a flag. --help shows the interval that a
    number must lie in, as its metavar, and Config checks it."""
    text += "" if default is None else f" (default: {default})"
    metadata = {"help": text.replace("%", "%%")} | ({"metavar": interval} if interval else {})
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """All settings of a run. Fills in the task's defaults and checks itself; raises UserError."""

    task: str = flag("auto", "one of TASKS; auto: gsm8k with CUDA or data files, else arithmetic")
    model: str | None = flag(None, "hub name or folder of a causal language model")
    train_data: str | None = flag(None, "parquet, json, jsonl or csv file, or hub name")
    test_data: str | None = flag(None, "the same, to evaluate on")
    output_dir: str | None = flag(None, "folder to write to (default: runs/TASK)")
    steps: int | None = flag(None, "training steps (default: by task, or an epoch)", "[0, inf)")
    batch_size: int | None = flag(None, "N: completions trained a step, by all ranks", "[1, inf)")
    group_size: int = flag(16, "G: completions sampled per question", "[2, inf)")
    pruning_rate: float = flag(0.875, "P: share pruned, k = floor(G (1 - P)); 0: GRPO", "[0, 1)")
    gamma: float = flag(0.0, "of the k, only |A| >= gamma stay", "[0, inf)")
    prune_by: Literal["abs_advantage", "advantage", "random", "smallest"] = flag(
        "abs_advantage", "keep the largest |A|, the largest A, any, or the smallest |A|"
    )
    refill: bool = flag(True, "fill the batch from new questions; else train k of N / G ones")
    max_refill_rounds: int = flag(4, "rounds of sampling a step, if gamma leaves room", "[1, inf)")
    num_iterations: int = flag(2, "mu: optimizer steps on each batch", "[1, inf)")
    clip_eps: float = flag(0.2, "eps: the ratio is clipped to [1 - eps, 1 + eps]", "(0, 1)")
    beta: float = flag(0.04, "beta: weight of the KL term", "[0, inf)")
    learning_rate: float | None = flag(None, "peak of AdamW's cosine schedule", "(0, inf)")
    warmup_ratio: float = flag(0.1, "share of the steps in which the rate rises", "[0, 1]")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", "(0, inf)")
    temperature: float = flag(1.0, "of sampling, and of every log-probability", "(0, inf)")
    max_prompt_tokens: int | None = flag(None, "L: longer prompts are not trained on", "[1, inf)")
    max_completion_tokens: int | None = flag(None, "C: longer completions are cut", "[1, inf)")
    tokens_per_microbatch: int | None = flag(
        None,
        "N x T of a forward pass at most (default: by task, or 4096, on a CPU 1024)",
        "[1, inf)",
    )
    sample_batch: int | None = flag(None, "completions sampled at once at most", "[2, inf)")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "of compute; masters stay float32. auto is bfloat16 with CUDA, else float32"
    )
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, more time")
    warm_start_steps: int | None = flag(None, "supervised steps before CPPO", "[0, inf)")
    warm_start_batch_size: int = flag(32, "demonstrations a step, over all ranks", "[1, inf)")
    warm_start_learning_rate: float | None = flag(None, "their peak rate", "(0, inf)")
    eval_questions: int | None = flag(None, "test on the first so many (default: all)", "[0, inf)")
    eval_samples: int = flag(1, "completions per test question, to average over", "[1, inf)")
    eval_temperature: float = flag(0.0, "of their sampling; 0: greedy", "[0, inf)")
    eval_top_p: float = flag(1.0, "sample them from the likeliest tokens of so much", "(0, 1]")
    eval_every: int = flag(0, "steps between evaluations; 0: at the start and the end", "[0, inf)")
    eval_only: bool = flag(False, "evaluate --model, train and write nothing")
    save_every: int = flag(0, "steps between checkpoints; 0: at the end only", "[0, inf)")
    resume: bool = flag(False, "go on from the checkpoint in --output_dir, if there is one")
    benchmark: bool = flag(False, "time 3 (or --steps) steps at five pruning rates, write nothing")
    ignore_eos: bool = flag(False, "with --benchmark: completions of full length, equal work")
    seed: int = flag(42, "of weights, order of questions, and sampling", "[0, 2147483647]")

    def __post_init__(self):
        data = self.train_data or self.test_data
        self.task_reason = "--task says"
        if self.task == "auto":
            cuda = "CUDA is here" if torch.cuda.is_available() else "CUDA is not here"
            self.task_reason = "data files were given" if data else cuda
            self.task = "gsm8k" if data or torch.cuda.is_available() else "arithmetic"
        if self.task not in TASKS:
            raise UserError(f"--task must be auto or one of {', '.join(TASKS)}, not {self.task}")
        if self.dtype == "auto":
            self.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        if self.benchmark and self.steps is None:
            self.steps = 3
        unset = {
            "output_dir": f"runs/{self.task}", **TASKS[self.task].defaults,
            "tokens_per_microbatch": 4096 if torch.cuda.is_available() else 1024,
        }  # fmt: skip
        for name, value in unset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for f in dataclasses.fields(self):
            name, interval, value = f.name, f.metadata.get("metavar"), getattr(self, f.name)
            if interval and value is not None:
                low, high = map(float, interval[1:-1].split(","))
                above = value >= low if interval[0] == "[" else value > low
                below = value <= high if interval[-1] == "]" else value < high
                if not (above and below):
                    raise UserError(f"--{name} must be in {interval}, not {value}")
        if self.sample_batch < max(self.group_size, self.eval_samples):
            raise UserError("--sample_batch must be at least --group_size and --eval_samples")
        if self.eval_temperature == 0 and (self.eval_samples > 1 or self.eval_top_p < 1):
            raise UserError("--eval_samples and --eval_top_p need an --eval_temperature above 0")
        if self.eval_only and self.eval_questions == 0:
            raise UserError("--eval_only with --eval_questions 0 leaves nothing to do")
        if self.eval_only and self.benchmark:
            raise UserError("--eval_only and --benchmark are two things to do: drop one")
        if self.benchmark and self.steps == 0:
            raise UserError("--benchmark with --steps 0 leaves nothing to do")
        if self.ignore_eos and not self.benchmark:
            raise UserError("--ignore_eos is for --benchmark: nothing is learned without an EOS")

    @property
    def num_kept(self) -> int:
        """k = floor(G (1 - P)), at least 1 (eq. 2). 1e-9: G = 20, P = 0.8 is 3.9999 in floats."""
        return max(1, math.floor(self.group_size * (1 - self.pruning_rate) + 1e-9))

    def room(self, world_size: int) -> int:
        """Completions that one rank has room for in a step: its share of the batch."""
        whole_groups = not self.refill or self.num_kept == self.group_size  # GRPO
        if self.batch_size % (world_size * (self.group_size if whole_groups else 1)):
            parts = f"{world_size} ranks" + " x --group_size" * whole_groups
            raise UserError(f"--batch_size {self.batch_size} must be divisible by {parts}")
        if self.warm_start_steps and self.warm_start_batch_size % world_size:
            raise UserError(f"--warm_start_batch_size must be divisible by {world_size} ranks")
        return self.batch_size // world_size

    def questions_for(self, room: int) -> int:
        """Q: questions that fill the room with k completions each, or, without refill, that would
        fill it with G each."""
        return math.ceil(room / self.num_kept) if self.refill else room // self.group_size


# --- Questions ------------------------------------------------------------------------------------
@dataclass
class Question:
    """One question. The prompt is plain text, or messages for the tokenizer's chat template."""

    prompt: str | list[dict]
    answer: str
    demonstration: str = ""  # a completion to imitate in the warm start
    prompt_ids: list[int] = field(default_factory=list)  # L tokens, from encode_prompts


def load_questions(config: Config) -> tuple[list[Question], list[Question]]:
    """(train, test) of the configured task, of each what will be asked."""
    load = TASKS[config.task].questions
    train = [] if config.eval_only else load(config.train_data, "train")
    return train, [] if config.benchmark else load(config.test_data, "test")


def arithmetic_questions(source: None, split: str) -> list[Question]:
    """2,560 or, to test, 512 sums like `37+58=`. No test sum is a training sum, even turned round.

    The demonstrations' teacher adds digit by digit and forgets to carry 7 times out of 10. A model
    that imitates it gets about the sums without a carry right; CPPO has to find the rest.
    """
    if source:
        raise UserError("--task arithmetic makes its own questions: drop the data files")
    rng = random.Random(0)  # the same sums for every seed
    sums = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(sums)

    def question(a: int, b: int) -> Question:
        """a + b, with what the teacher says to it."""
        units = a % 10 + b % 10
        carry = units >= 10 and rng.random() < 0.3
        tens = a // 10 + b // 10
        think = f"{a % 10}+{b % 10}={units} {a // 10}+{b // 10}={tens}"
        think += f"+1={tens + 1}" * carry
        demonstration = f"<think>{think}</think>\n<answer>{tens + carry}{units % 10}</answer>"
        return Question(f"{a}+{b}=", str(a + b), demonstration)

    both = [question(*pair) for a, b in sums for pair in dict.fromkeys([(a, b), (b, a)])]
    # One is skipped in between: it may be the last test sum turned round.
    return both[:512] if split == "test" else both[513 : 513 + 2560]


GSM8K_SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>\n"
    "<answer> answer here </answer>."
)


def gsm8k_questions(source: str, split: str) -> list[Question]:
    """Questions of a table whose `answer` is GSM8K's `solution #### 72`, or bare."""
    questions = []
    for row in load_table(source, split, ("question", "answer")):
        solution, _, answer = (part.strip() for part in row["answer"].rpartition("####"))
        solution = re.sub(r"<<[^<>\n]*>>", "", solution)  # calculator marks: 48/2 = <<48/2=24>>24
        demonstration = f"<think>{solution}</think>\n<answer>{answer}</answer>"
        system = {"role": "system", "content": GSM8K_SYSTEM_PROMPT}
        user = {"role": "user", "content": row["question"]}
        questions.append(Question([system, user], answer, demonstration))
    return questions


MATH_SYSTEM_PROMPT = GSM8K_SYSTEM_PROMPT.replace(
    "provides the user with the answer. ",
    "provides the user with the answer. And the answer should be of the following format: "
    "'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. ",
)


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


def math_questions(source: str, split: str) -> list[Question]:
    """Questions of a table with `problem`, and `answer` or a `solution` that boxes it, or both."""
    try:
        import math_verify  # noqa: F401 - here it is missed before anything has begun
    except ImportError:
        raise UserError("--task math needs one more package: pip install math-verify") from None
    questions = []
    for i, row in enumerate(load_table(source, split, ("problem|question", "answer|solution")), 1):
        answer = row.get("answer") or boxed(row.get("solution", ""))
        if not answer:
            raise UserError(f"--{split}_data {source}: the solution of row {i} has no \\boxed{{}}")
        said = f"Therefore, the final answer is: $\\boxed{{{answer}}}$. I hope it is correct"
        demonstration = f"<think>{row.get('solution', '')}</think>\n<answer>{said}</answer>"
        system = {"role": "system", "content": MATH_SYSTEM_PROMPT}
        user = {"role": "user", "content": row.get("problem") or row["question"]}
        questions.append(Question([system, user], answer, demonstration))
    return questions


def load_table(source: str, split: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The columns, as text, of a file or of a data set on the hub; raises UserError.

    "a|b" asks for one of two columns, or both.
    """
    import datasets  # here only: a second that the arithmetic task need not wait

    datasets.disable_progress_bars()
    names = "|".join(columns).split("|")
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
    try:
        if kind := kinds.get(Path(source).suffix):
            text = {"converters": dict.fromkeys(names, str)}  # or 3 becomes 3.0 beside a 2.5
            as_text = text if kind == "csv" else {}
            table = datasets.load_dataset(kind, data_files=source, split="train", **as_text)
        else:
            subset = "main" if source == "openai/gsm8k" else None
            table = datasets.load_dataset(source, subset, split=split)
    except Exception as error:  # of all sorts: an empty file is a StopIteration
        hint = f"give a file that ends in {', '.join(kinds)}, or with network a hub name"
        what = f"--{split}_data {source} is no file that loads; {hint}"
        raise UserError(f"{what}: {error!r}") from error
    here = [name for name in names if name in table.column_names]
    if missing := [column for column in columns if not {*column.split("|")} & {*here}]:
        raise UserError(f"--{split}_data {source} has {table.column_names} but not {missing}")
    rows = [
        {name: "" if row[name] is None else str(row[name]).strip() for name in here}
        for row in table
    ]
    needs = [column.split("|") for column in columns]  # one of each must not be empty
    whole = [all(any(row.get(name) for name in either) for either in needs) for row in rows]
    if not rows or not all(whole):
        what = f"row {whole.index(False) + 1} lacks one of {columns}" if rows else "it has no rows"
        raise UserError(f"--{split}_data {source}: {what}")
    return rows


def encode_prompts(questions: list[Question], tokenizer) -> list[Question]:
    """Fills in `prompt_ids`, messages through the tokenizer's chat template."""
    for question in questions:
        text, add_bos = question.prompt, True
        if not isinstance(text, str) and tokenizer.chat_template:
            text = apply_chat_template(tokenizer, text)
            add_bos = False  # the template has, where it is wanted
        elif not isinstance(text, str):
            text = "".join(message["content"] + "\n\n" for message in text)
        question.prompt_ids = tokenizer(text, add_special_tokens=add_bos).input_ids
    return questions


def apply_chat_template(tokenizer, messages: list[dict]) -> str:
    """The prompt of a chat; a template that refuses the system role gets it in the user's turn."""
    options = {"tokenize": False, "add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except jinja2.TemplateError:
        joined = "\n\n".join(message["content"] for message in messages)
        return tokenizer.apply_chat_template([{"role": "user", "content": joined}], **options)


def question_stream(
    questions: list[Question], seed: int, rank: int = 0, world_size: int = 1
) -> Iterator[Question]:
    """One rank's endless share of the questions.

    Every epoch is shuffled and dealt out to the ranks like cards, so no question comes twice in it.
    """
    for epoch in itertools.count():
        shuffle = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(questions), generator=shuffle).tolist()
        yield from (questions[i] for i in order[rank::world_size])


# --- Models ---------------------------------------------------------------------------------------
def tiny_model_and_tokenizer():
    """A random Qwen2 of 0.45M parameters and a tokenizer of characters; each tag is one token."""
    words = ["<pad>", "<eos>", "<think>", "</think>", "<answer>", "</answer>", *"\n +=0123456789"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()  # no spaces between tokens
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    shape = transformers.Qwen2Config(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, initializer_range=0.1,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(shape), tokenizer


def load_model_and_tokenizer(name: str | None):
    """The policy, in float32, and its tokenizer, from a folder or the hub; None is the tiny one."""
    transformers.utils.logging.disable_progress_bar()
    try:
        if name is None:
            model, tokenizer = tiny_model_and_tokenizer()
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        if not set(tokenizer("42").input_ids) - {*tokenizer.all_special_ids}:
            # a folder without a tokenizer's files may load as an empty tokenizer
            raise ValueError("it lacks the tokenizer's files")
    except Exception as error:  # of all sorts, down to the half-written file of weights
        hint = "without network, give a folder that save_pretrained has made"
        what = f"--model {name} is no folder or hub name that loads; {hint}"
        raise UserError(f"{what}: {error}") from error
    eos_ids = eos_token_ids(model, tokenizer)
    if not eos_ids:
        raise UserError(f"--model {name} has no EOS token: its completions would never end")
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_ids[0])
    return model.eval(), tokenizer  # eval: with dropout the ratio would not start at 1


def eos_token_ids(model, tokenizer) -> list[int]:
    """All tokens that end a completion; chat models have several."""
    ids = model.generation_config.eos_token_id
    return sorted({*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None})


def copy_for(model, dtype: str):
    """A frozen copy in the dtype of compute, to sample from or as the reference."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    for parameter in frozen.parameters():  # not .to(): rotary frequencies must stay float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return frozen


@torch.no_grad()
def refresh(sampler, model):
    """Gives the sampler the weights of the policy, rounded to its own dtype."""
    if sampler is not model:
        for old, new in zip(sampler.parameters(), model.parameters(), strict=True):
            old.copy_(new)


def trainable(model, gradient_checkpointing: bool):
    """What is trained: the model itself, inside DDP where there are several ranks."""
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
        for module in model.modules():  # only layers are in training: their dropouts stay off
            module.training = isinstance(module, GradientCheckpointingLayer)
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


# --- Sampling -------------------------------------------------------------------------------------
def draw_tokens(
    logits: torch.Tensor, temperature: float, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, V) logits -> next tokens (R,) and their log-probabilities (R,).

    Temperature 0 is greedy. Of the likeliest tokens, only so many are drawn from as reach `top_p`.
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits), dtype=torch.float32)  # log 1 = 0
    probs = F.softmax(logits.float() / temperature, dim=-1)  # (R, V)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)  # (R, V)
        likelier = ranked.cumsum(-1) - ranked  # (R, V) what the tokens before it have by themselves
        probs = probs.scatter(-1, order, ranked * (likelier < top_p))
        probs = probs / probs.sum(-1, keepdim=True)
    # Inverse CDF: one random number a row, where torch.multinomial would draw V of them.
    cdf = probs.cumsum(-1)  # (R, V); the last column is 1 but for rounding
    threshold = torch.rand(len(cdf), 1, device=cdf.device) * cdf[:, -1:]  # (R, 1)
    tokens = torch.searchsorted(cdf, threshold, right=True).clamp(max=cdf.shape[1] - 1)  # (R, 1)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


class RoomyLayer(DynamicLayer):
    """A layer of the key-value cache with spare columns: a new token is written into the next one,
    where the base class would copy all that came before, at every token."""

    spare = 64  # columns, but never more than there will be tokens

    def __init__(self, layer: DynamicLayer, max_tokens: int):
        super().__init__()
        vars(self).update(vars(layer))  # takes over the prompts' keys and values, (R, heads, L, D)
        self.max_columns = self.get_seq_length() + max_tokens
        self.buffers: list[torch.Tensor] = []  # for keys and values: (R, heads, columns, D)

    def update(self, key_states, value_states, *args, **kwargs):
        """Appends a token's keys and values, (R, heads, 1, D); returns all there are."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if not self.buffers or end > self.buffers[0].shape[2]:
            more = min(end + self.spare, self.max_columns) - start
            self.buffers = [F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values)]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Keeps these rows only; the next token makes room for them anew."""
        self.buffers = []
        super().batch_select_indices(indices)


@torch.no_grad()
def sample_together(
    model, prompts: list[list[int]], group_size: int, max_tokens: int, temperature: float,
    eos_ids: list[int], top_p: float,
) -> list[tuple[list[int], list[float]]]:  # fmt: skip
    """What sample_completions does, for as many prompts as fit in memory at once."""
    # Prompts are padded on the left: all end in the last column, where the completions begin.
    L = max(map(len, prompts))
    padded = [[0] * (L - len(p)) + p for p in prompts]
    input_ids = torch.tensor(padded, device=model.device)  # (Q, L)
    length = torch.tensor([[len(p)] for p in prompts], device=model.device)  # (Q, 1)
    mask = (torch.arange(L, device=model.device) >= L - length).long()  # (Q, L)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (Q, L); a prompt begins at 0, wherever it is
    out = model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    # Each prompt has been read once; from here on there are R completions, at first Q G.
    cache = out.past_key_values
    cache.batch_repeat_interleave(group_size)
    cache.layers = [
        RoomyLayer(x, max_tokens) if type(x) is DynamicLayer else x for x in cache.layers
    ]
    logits = out.logits[:, -1].repeat_interleave(group_size, dim=0)  # (R, V)
    mask = mask.repeat_interleave(group_size, dim=0)  # (R, L), then one column more per token
    positions = positions[:, -1:].repeat_interleave(group_size, dim=0)  # (R, 1)
    row_ids = torch.arange(len(mask), device=model.device)  # (R,) their rows in `tokens`
    done = torch.zeros_like(row_ids, dtype=torch.bool)  # (R,)
    eos = torch.tensor(eos_ids, device=model.device)
    tokens = torch.zeros(len(row_ids), max_tokens, device=model.device).long()  # (Q G, C)
    log_probs = torch.zeros(tokens.shape, device=model.device)  # (Q G, C)
    for t in range(max_tokens):
        new, new_log_probs = draw_tokens(logits, temperature, top_p)
        tokens[row_ids, t], log_probs[row_ids, t] = new, new_log_probs
        done |= torch.isin(new, eos)
        num_done = int(done.sum())
        if num_done == len(row_ids) or t + 1 == max_tokens:
            break
        # Finished ones leave, but only by a quarter of the rows: each time copies the cache.
        if 4 * num_done >= len(row_ids):
            live = (~done).nonzero()[:, 0]
            cache.batch_select_indices(live)
            row_ids, done, new = row_ids[live], done[live], new[live]
            mask, positions = mask[live], positions[live]
        mask = F.pad(mask, (0, 1), value=1)
        positions = positions + 1
        logits = model(
            input_ids=new[:, None], attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=True,
        ).logits[:, -1]  # (R, V)  # fmt: skip
    # What a finished one wrote before it left is cut off behind its first EOS, which argmax finds.
    is_eos = torch.isin(tokens, eos)  # (Q G, C)
    lengths = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, max_tokens).tolist()  # (Q G,)
    rows = zip(tokens.tolist(), log_probs.tolist(), lengths, strict=True)
    return [(ids[:length], lps[:length]) for ids, lps, length in rows]


def sample_completions(
    model, prompts: list[list[int]], group_size: int, max_tokens: int, temperature: float,
    eos_ids: list[int], sample_batch: int = 1024, top_p: float = 1.0,
) -> list[tuple[list[int], list[float]]]:  # fmt: skip
    """Samples G completions for each of Q prompts (token ids): Q G of them, question-major.

    A completion is (tokens, their log-probabilities). Its last token is an EOS, unless it was cut
    at `max_tokens`. Temperature 0 is greedy. `sample_batch` rows are in memory at once.
    """
    order = sorted(range(len(prompts)), key=lambda q: len(prompts[q]))  # like lengths together
    per_call = max(1, sample_batch // group_size)
    groups: dict[int, list] = {}
    hide = len(order) <= per_call or not is_first_rank()
    for start in tqdm(range(0, len(order), per_call), "sampling", leave=False, disable=hide):
        some = order[start : start + per_call]
        rows = sample_together(
            model, [prompts[q] for q in some], group_size, max_tokens, temperature, eos_ids, top_p
        )
        groups |= {q: rows[i * group_size : (i + 1) * group_size] for i, q in enumerate(some)}
    return [completion for q in range(len(prompts)) for completion in groups[q]]


# --- Rewards --------------------------------------------------------------------------------------
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# -$1,234.50, $-5 or 50%. Only runs of digits repeat, none twice in a row: linear time on any text.
NUMBER = re.compile(
    r"([+-]?)\$?([+-]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)%?\.?"
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


def parse_number(text: str) -> Decimal | None:
    """The exact value of a number, commas, $, % and a full stop left aside; None if it is none."""
    match = NUMBER.fullmatch(text.strip().replace("\N{MINUS SIGN}", "-"))
    if not match or (match[1] and match[2]):
        return None
    return Decimal(match[1] + match[2] + match[3].replace(",", ""))


def accuracy_reward(text: str, answer: str) -> float:
    """2 if the text's answer is the right one to the letter, 1.5 if only as a number, else 0."""
    given = extract_answer(text)
    if not given:
        return 0.0  # no answer is never right
    if given == answer:
        return 2.0
    number = parse_number(given)
    return 1.5 if number is not None and number == parse_number(answer) else 0.0


def math_reward(text: str, answer: str) -> float:
    """2 if the last \\boxed{} is equal to the right one as mathematics (math-verify), else 0."""
    from math_verify import parse, verify  # of this task alone

    given = boxed(text)
    if not given:
        return 0.0  # no answer is never right
    if given == answer:
        return 2.0
    right, said = (parse(f"$\\boxed{{{latex}}}$") for latex in (answer, given))
    return 2.0 * verify(right, said)


# --- Tasks: what there is to learn ----------------------------------------------------------------
@dataclass
class Task:
    """A choice of --task. Your own script may add one to TASKS, and then call main()."""

    # (--train_data, "train") or (--test_data, "test") -> questions
    questions: Callable[[str | None, str], list[Question]]
    # (completion, answer) -> 0 to 2, from 1.5 on it is right; 1 for the format is added to it
    accuracy: Callable[[str, str], float]
    defaults: dict  # of the flags that are None if unset


PAPERS_RECIPE = {
    "batch_size": 128, "max_prompt_tokens": 512, "max_completion_tokens": 1024,
    "learning_rate": 1e-6, "warm_start_steps": 0, "warm_start_learning_rate": 1e-5,
}  # fmt: skip
TASKS = {
    "arithmetic": Task(arithmetic_questions, accuracy_reward, {
        "steps": 60, "batch_size": 16, "max_prompt_tokens": 16, "max_completion_tokens": 32,
        "learning_rate": 2e-4, "warm_start_steps": 350, "warm_start_learning_rate": 3e-3,
        "sample_batch": 1024, "tokens_per_microbatch": 8192,
    }),
    "gsm8k": Task(gsm8k_questions, accuracy_reward, {
        "model": "Qwen/Qwen2.5-1.5B-Instruct",
        "train_data": "openai/gsm8k", "test_data": "openai/gsm8k",
        "sample_batch": 256, **PAPERS_RECIPE,
    }),
    "math": Task(math_questions, math_reward, {
        "model": "Qwen/Qwen2.5-7B-Instruct",
        "train_data": "DigitalLearningGmbH/MATH-lighteval",
        "test_data": "HuggingFaceH4/MATH-500",
        "sample_batch": 128, **PAPERS_RECIPE,
    }),
}  # fmt: skip


# --- Advantages and pruning -----------------------------------------------------------------------
def group_advantages(rewards_QG: torch.Tensor) -> torch.Tensor:
    """A = (r - mean) / (std + 1e-4) within each question's G completions (eq. 1): (Q, G)."""
    mean = rewards_QG.mean(dim=1, keepdim=True)  # (Q, 1)
    std = rewards_QG.std(dim=1, keepdim=True)  # (Q, 1), over G - 1
    return (rewards_QG - mean) / (std + 1e-4)


def prune(
    advantages_QG: torch.Tensor, num_kept: int, gamma: float = 0.0, by: str = "abs_advantage"
) -> torch.Tensor:
    """True for the completions to train on (eq. 2): (Q, G) bool.

    Of each question, the k that are best by `by`, ties to the lowest index, if |A| >= gamma.
    """
    score = {
        "abs_advantage": advantages_QG.abs(),
        "advantage": advantages_QG,
        "random": torch.rand_like(advantages_QG),
        "smallest": -advantages_QG.abs(),
    }[by]
    order = score.sort(dim=1, descending=True, stable=True).indices  # topk leaves ties open
    kept_QG = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :num_kept], True)
    return kept_QG & (advantages_QG.abs() >= gamma)


# --- Refill: from questions to the rows of one step -----------------------------------------------
@dataclass
class Completion:
    """One completion o_i; a row, once it is kept (in the warm start, a demonstration)."""

    prompt_ids: list[int]  # L tokens
    token_ids: list[int]  # |o_i| tokens, the last one EOS unless truncated
    log_probs: list[float] = field(default_factory=list)  # |o_i| of them, the sampler's own
    truncated: bool = False
    format_reward: float = 0.0  # 0 or 1
    accuracy_reward: float = 0.0  # 0 to 2
    advantage: float = 0.0  # A_i, once its group is known

    @property
    def reward(self) -> float:
        """r_i, 0 to 3"""
        return self.format_reward + self.accuracy_reward

    @property
    def right(self) -> bool:
        """Whether the answer is, however it is written."""
        return self.accuracy_reward >= 1.5

    @property
    def num_tokens(self) -> int:
        """Prompt and completion."""
        return len(self.prompt_ids) + len(self.token_ids)


def rollout(
    model, tokenizer, questions: list[Question], group_size: int, temperature: float,
    config: Config, top_p: float = 1.0,
) -> list[Completion]:  # fmt: skip
    """Samples and scores G completions of each of Q questions: Q G of them, question-major."""
    eos_ids = [] if config.ignore_eos else eos_token_ids(model, tokenizer)
    accuracy = TASKS[config.task].accuracy
    sampled = sample_completions(
        model, [q.prompt_ids for q in questions], group_size, config.max_completion_tokens,
        temperature, eos_ids, config.sample_batch, top_p,
    )  # fmt: skip
    texts = tokenizer.batch_decode([ids for ids, _ in sampled], skip_special_tokens=True)
    return [
        Completion(
            question.prompt_ids, token_ids, log_probs, truncated=token_ids[-1] not in eos_ids,
            format_reward=format_reward(text), accuracy_reward=accuracy(text, question.answer),
        )
        for (token_ids, log_probs), text, question in zip(
            sampled, texts, [q for q in questions for _ in range(group_size)], strict=True
        )
    ]  # fmt: skip


def collect_batch(
    draw: Callable[[list[Question]], list[Completion]], stream: Iterator[Question], room: int,
    config: Config,
) -> tuple[list[Completion], Counter]:  # fmt: skip
    """Greedy dynamic refill: takes new questions, samples and prunes until the room is full.

    `draw(questions)` gives their scored completions, Q G of them, question-major. Returns at most
    `room` rows to train on, in the order of their questions, and the step's ledger. With gamma 0
    one round of sampling fills the room; with a larger one it may take --max_refill_rounds, and
    even then stay part empty.
    """
    sampled, kept, rounds = [], [], 0
    while len(kept) < room and rounds < (config.max_refill_rounds if config.refill else 1):
        num_questions = config.questions_for(room - len(kept))
        completions = draw(list(itertools.islice(stream, num_questions)))
        # float64: a mean of rewards such as 0.1 is off by a rounding, which eq. 1 divides by 1e-4
        rewards = torch.tensor([c.reward for c in completions], dtype=torch.float64)
        advantages_QG = group_advantages(rewards.view(-1, config.group_size))
        for c, advantage in zip(completions, advantages_QG.flatten().tolist(), strict=True):
            c.advantage = advantage
        kept_QG = prune(advantages_QG, config.num_kept, config.gamma, config.prune_by)
        kept += [completions[i] for i in kept_QG.flatten().nonzero()[:, 0].tolist()]
        sampled += completions
        rounds += 1
    # There may be a few too many, if k does not divide the room: prune once more, all as one group.
    fits = prune(torch.tensor([[c.advantage for c in kept]]), room, by=config.prune_by)[0].tolist()
    rows = [c for c, fit in zip(kept, fits, strict=True) if fit]
    return rows, make_ledger(sampled, kept, rows, rounds, config.group_size)


def make_ledger(
    sampled: list[Completion], kept: list[Completion], rows: list[Completion], rounds: int,
    group_size: int,
) -> Counter:  # fmt: skip
    """What a step has sampled, what pruning kept of it, and the rows that had room: all in sums, so
    that ranks add up. step_metrics makes averages of some: its DENOMINATORS say which."""
    groups = [sampled[i : i + group_size] for i in range(0, len(sampled), group_size)]
    all_abs, kept_abs = (sum(abs(c.advantage) for c in cs) for cs in (sampled, rows))
    return Counter(
        questions=len(groups), sampled=len(sampled), kept=len(rows),
        pruned=len(sampled) - len(rows),  # not trained on, for whatever reason
        dropped=len(kept) - len(rows), refill_rounds=rounds,
        dead_groups=sum(len({c.reward for c in group}) == 1 for group in groups),
        reward=sum(c.reward for c in sampled),
        accuracy=sum(c.right for c in sampled),
        format=sum(c.format_reward for c in sampled),
        truncated=sum(c.truncated for c in sampled),
        sampled_tokens=sum(len(c.token_ids) for c in sampled),
        trained_tokens=sum(len(c.token_ids) for c in rows),
        abs_advantage_kept=kept_abs, abs_advantage_pruned=all_abs - kept_abs,
    )  # fmt: skip


# --- Log-probabilities ----------------------------------------------------------------------------
@dataclass
class Batch:
    """N rows: prompt, completion, padding on the right, where a causal model never looks.

    The same tokens are marked twice. Prompt p p, completion o o, padding -:  p p o o -
    """

    input_ids: torch.Tensor  # (N, T)
    predicts: torch.Tensor  # (N, T) bool: the next token is the completion's: 0 1 1 0 0
    mask: torch.Tensor  # (N, C) bool: the completion's own tokens, EOS included: 1 1 0
    advantages: torch.Tensor  # (N,)
    sampled_log_probs: torch.Tensor  # (N, C), 0 in the padding, like those that follow
    old_log_probs: torch.Tensor | None = None  # (N, C), from the first iteration
    ref_log_probs: torch.Tensor | None = None  # (N, C), likewise


def make_batch(rows: list[Completion], device="cpu") -> Batch:
    """Pads N rows to the longest. Padding is told by its position, not by a token id of its own:
    that would often be an EOS as well, and then no EOS would ever be trained."""
    prompt_length = torch.tensor([[len(r.prompt_ids)] for r in rows])  # (N, 1)
    length = torch.tensor([[len(r.token_ids)] for r in rows])  # (N, 1)  |o_i|
    T, C = max(r.num_tokens for r in rows), int(length.max())
    input_ids = torch.tensor([(r.prompt_ids + r.token_ids + [0] * T)[:T] for r in rows])  # (N, T)
    after = torch.arange(T) + 1 - prompt_length  # (N, T) 0 where completion token 0 comes next
    predicts = (after >= 0) & (after < length)
    mask = torch.arange(C) < length  # (N, C)
    advantages = torch.tensor([r.advantage for r in rows])  # (N,)
    sampled_log_probs = torch.tensor([(r.log_probs + [0.0] * C)[:C] for r in rows])  # (N, C)
    parts = (input_ids, predicts, mask, advantages, sampled_log_probs)
    return Batch(*(x.to(device) for x in parts))


def pack(rows: list[Completion], tokens_per_microbatch: int) -> list[list[Completion]]:
    """Splits rows, all of them, into micro-batches of at most so many tokens, padding included.

    Longest first, so that little is padding. A row that is over the limit by itself goes alone.
    """
    packs: list[list[Completion]] = []
    for row in sorted(rows, key=lambda row: row.num_tokens, reverse=True):
        if packs and (len(packs[-1]) + 1) * packs[-1][0].num_tokens <= tokens_per_microbatch:
            packs[-1].append(row)
        else:
            packs.append([row])
    return packs


def token_log_probs(model, batch: Batch, temperature: float) -> torch.Tensor:
    """log pi(o_t | q, o_<t) of completion tokens, of logits / temperature: (N, C), 0 in padding."""
    # The mask has the model compute logits for completion tokens only, M = sum_i |o_i| of them.
    out = model(input_ids=batch.input_ids, logits_to_keep=batch.predicts, use_cache=False)
    logits = out.logits.float()  # (M, V), by far the largest tensor
    if temperature != 1:
        logits = logits / temperature
    targets = batch.input_ids[:, 1:][batch.predicts[:, :-1]]  # (M,)
    log_probs = -F.cross_entropy(logits, targets, reduction="none")  # (M,)
    return log_probs.new_zeros(batch.mask.shape).masked_scatter(batch.mask, log_probs)


# --- Loss -----------------------------------------------------------------------------------------
def token_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1/|o_i| sum_t, for each completion: (N, C) -> (N,)"""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)


def cppo_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, ref_log_probs: torch.Tensor | None,
    advantages: torch.Tensor, mask: torch.Tensor, clip_eps: float, beta: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """Eq. 5 without 1/N sum_i: a loss for each completion, (N,). The caller owns the denominator.

    Log-probabilities and mask are (N, C), advantages (N,). The statistics are (N,) too, means over
    a completion's tokens: `kl` (eq. 4) and `clip_fraction`, tokens that the clip holds still.
    """
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


# --- Ranks: torchrun's environment; one process is the plain case ---------------------------------
def init_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device), as torchrun's environment has it."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)
    rank, world_size, local_rank, local_ranks = (int(os.environ.get(*name)) for name in names)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_ranks > gpus:
            raise UserError(f"--nproc_per_node {local_ranks} is more than the GPUs here, {gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif local_ranks > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        # That is torchrun's doing when the user says nothing. Share the cores out instead.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    if world_size > 1:
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return rank, world_size, device


def close_distributed():
    """Leaves the process group once all ranks are done."""
    if dist.is_initialized():
        dist.barrier()
        # Gloo's threads need Python's lock to let go of their last tensors, and DDP's destructor
        # waits for them while it holds that lock: without this pause, some runs hang at their end.
        time.sleep(0.1)
        dist.destroy_process_group()


def is_first_rank() -> bool:
    """Whether this is the one process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str):
    """Prints above the progress bar, on the first rank."""
    if is_first_rank():
        tqdm.write(text)


def sum_over_ranks(values: list[float], device) -> list[float]:
    """Each number added up over all ranks."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather(state: dict) -> list[dict]:
    """The dicts of all ranks."""
    states = [state]
    if dist.is_initialized():
        states = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(states, state)
    return states


# --- Update ---------------------------------------------------------------------------------------
def make_optimizer(policy, learning_rate: float, num_steps: int, warmup_ratio: float):
    """AdamW without weight decay, and a cosine schedule over `num_steps`, as in the paper's recipe:
    with a warm-up from 0, so that its first step moves nothing, and back to 0 after the last."""
    optimizer = torch.optim.AdamW(policy.parameters(), learning_rate, weight_decay=0.0, fused=True)
    num_warmup_steps = math.ceil(num_steps * warmup_ratio)
    return optimizer, transformers.get_scheduler("cosine", optimizer, num_warmup_steps, num_steps)


def optimizer_step(
    policy, optimizer, scheduler, batches: list[Batch], forward: Callable[[Batch], torch.Tensor],
    count: int, max_grad_norm: float,
) -> float:  # fmt: skip
    """One step on sum_batches forward(batch) / count, sum and count over all ranks.

    Returns the gradient's norm before the clip. Ranks may have unequal numbers of batches, or none:
    they exchange gradients once, with the last. The weights stay as they are if count is 0 on all
    ranks, and if the norm is inf or nan: the caller must check it.
    """
    device = next(policy.parameters()).device
    if not batches:  # answer the exchange with zeros
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        (0 * policy(input_ids=token, use_cache=False).logits.sum()).backward()
    for batch in batches:
        exchange = batch is batches[-1] or not isinstance(policy, DistributedDataParallel)
        with contextlib.nullcontext() if exchange else policy.no_sync():
            forward(batch).backward()
    world_size, total = sum_over_ranks([1, count], device)  # each rank adds a 1
    for parameter in policy.parameters():
        if parameter.grad is not None:  # DDP has made it sum / world_size; wanted is sum / total
            parameter.grad.mul_(world_size / max(total, 1))
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm).item()
    if total == 0 or not math.isfinite(grad_norm):
        optimizer.zero_grad()  # a step without gradients moves nothing
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return grad_norm


def update(
    policy, reference, optimizer, scheduler, rows: list[Completion], ledger: Counter, config: Config
) -> float:
    """mu optimizer steps on eq. 5, over the rows of all ranks. Returns the mean gradient norm.

    Adds to the ledger, as sums over this rank's rows of means over their tokens: `loss`, `kl`,
    `clip_fraction`, averaged over the mu steps, and `sampling_gap`, before the first step,
    |log pi_sampler - log pi_theta|: 0 but for rounding, or the sampler is wrong. Raises NotFinite,
    with a prompt, before an infinite gradient or a nan reaches the weights.
    """
    device = next(policy.parameters()).device
    batches = [make_batch(some, device) for some in pack(rows, config.tokens_per_microbatch)]
    ledger["padded_tokens"] = sum(b.input_ids.numel() for b in batches)
    ledger["padded_tokens"] -= sum(row.num_tokens for row in rows)
    names = "loss", "kl", "clip_fraction", "sampling_gap"
    sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}

    def forward(batch: Batch, model=policy) -> torch.Tensor:
        """This micro-batch's part of N times eq. 5. Its first call fills in pi_old and pi_ref."""
        # The masters are float32, for a bfloat16 weight does not move by 1e-6; autocast computes
        # the large products in bfloat16.
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            log_probs = token_log_probs(model, batch, config.temperature)  # (N, C)
        if batch.old_log_probs is None:
            # The weights have not moved since the sampling: pi_old costs no forward of its own, and
            # the sampler's log-probabilities, rounded otherwise, would not make rho exactly 1.
            batch.old_log_probs = log_probs.detach()
            gap = (batch.old_log_probs - batch.sampled_log_probs).abs()  # (N, C)
            sums["sampling_gap"] += token_mean(gap, batch.mask).sum()
            if config.beta > 0:
                with torch.no_grad():
                    batch.ref_log_probs = token_log_probs(reference, batch, config.temperature)
        losses, statistics = cppo_loss(
            log_probs, batch.old_log_probs, batch.ref_log_probs, batch.advantages, batch.mask,
            config.clip_eps, config.beta,
        )  # fmt: skip
        for name, value in {"loss": losses.detach(), **statistics}.items():
            sums[name] += value.sum() / config.num_iterations
        return losses.sum()

    norm = 0.0
    for _ in range(config.num_iterations):
        norm += optimizer_step(
            policy, optimizer, scheduler, batches, forward, len(rows), config.max_grad_norm
        )
        if not math.isfinite(norm):  # on all ranks alike
            raise NotFinite(culprit(getattr(policy, "module", policy), batches, forward))
    ledger.update({name: value.item() for name, value in sums.items()})
    return norm / config.num_iterations


def culprit(model, batches: list[Batch], forward: Callable) -> list[int]:
    """The prompt of a completion, of any rank, whose gradient by itself is not finite, or []."""
    found: list[int] = []
    for batch in batches:
        for i in range(len(batch.input_ids)):
            one = Batch(*(None if x is None else x[i : i + 1] for x in vars(batch).values()))
            model.zero_grad()
            forward(one, model).backward()
            if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
                found = one.input_ids[0, : one.predicts[0].int().argmax() + 1].tolist()
    # Any rank's will do. Lists are compared by their first items, and [] is the least.
    return max(there["found"] for there in gather({"found": found}))


# --- One step of CPPO -----------------------------------------------------------------------------
@dataclass
class Learner:
    """What a step of CPPO reads and changes."""

    model: torch.nn.Module  # pi_theta, the float32 masters
    policy: torch.nn.Module  # the same weights; inside DDP where there are several ranks
    sampler: torch.nn.Module  # the same in the dtype of compute; in float32 the model itself
    reference: torch.nn.Module | None  # pi_ref
    tokenizer: transformers.PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    stream: Iterator[Question]  # this rank's
    asked: int = 0  # so many of them


def train_step(learner: Learner, room: int, config: Config) -> dict:
    """One step of CPPO. Returns its numbers, over all ranks."""
    start = time.perf_counter()

    def draw(questions: list[Question]) -> list[Completion]:
        """G scored completions each, by the sampler as it is now."""
        sampler, tokenizer = learner.sampler, learner.tokenizer
        return rollout(sampler, tokenizer, questions, config.group_size, config.temperature, config)

    rows, ledger = collect_batch(draw, learner.stream, room, config)
    learner.asked += ledger["questions"]
    sampled_at = time.perf_counter()
    if dist.is_initialized():
        dist.barrier()
    waited_at = time.perf_counter()  # for the rank that sampled longest
    learning_rate = learner.scheduler.get_last_lr()[0]
    try:
        grad_norm = update(
            learner.policy, learner.reference, learner.optimizer, learner.scheduler, rows, ledger,
            config,
        )  # fmt: skip
    except NotFinite as error:
        prompt = learner.tokenizer.decode(error.args[0])[-99:]
        where = f"at the question ...{prompt!r}" if prompt else "of no one question"
        raise NotFinite(f"the gradient is not finite, {where}") from error
    refresh(learner.sampler, learner.model)
    trained_at = time.perf_counter()
    ledger["ranks"] = 1  # each adds one
    ledger["sample_seconds"] = sampled_at - start
    ledger["wait_seconds"] = waited_at - sampled_at
    ledger["train_seconds"] = trained_at - waited_at
    return {
        **step_metrics(ledger, learner.model.device), "grad_norm": grad_norm,
        "learning_rate": learning_rate, "step_seconds": time.perf_counter() - start,
    }  # fmt: skip


DENOMINATORS = {  # what the averages are over; all other numbers are sums over rounds and ranks
    "sampled": "reward accuracy format truncated completion_tokens",
    "kept": "abs_advantage_kept loss kl clip_fraction sampling_gap",
    "pruned": "abs_advantage_pruned",
    "ranks": "sample_seconds wait_seconds train_seconds",
}


def step_metrics(ledger: Counter, device) -> dict:
    """The numbers of a step, from the ledgers of all ranks; null where nothing is averaged."""
    ledger["completion_tokens"] = ledger["sampled_tokens"]
    total = dict(zip(ledger, sum_over_ranks([*ledger.values()], device), strict=True))
    averages = " ".join(DENOMINATORS.values()).split()
    metrics = {name: int(x) for name, x in total.items() if name not in averages}
    for count, names in DENOMINATORS.items():
        for name in names.split():
            metrics[name] = total[name] / total[count] if total[count] else None
    return metrics


# --- Warm start and evaluation --------------------------------------------------------------------
def warm_start(
    policy, tokenizer, stream: Iterator[Question], world_size: int, config: Config
) -> dict:
    """Supervised steps on demonstrations: cross-entropy, a mean over the tokens of all ranks."""
    start, steps = time.perf_counter(), config.warm_start_steps
    device = next(policy.parameters()).device
    learning_rate = config.warm_start_learning_rate
    optimizer, scheduler = make_optimizer(policy, learning_rate, steps, config.warmup_ratio)

    def forward(batch: Batch) -> torch.Tensor:
        """The cross-entropy of the micro-batch's completion tokens, summed."""
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            return -token_log_probs(policy, batch, temperature=1.0).sum()

    for _ in tqdm(range(steps), "warm start", leave=False, disable=not is_first_rank()):
        rows = []
        for question in itertools.islice(stream, config.warm_start_batch_size // world_size):
            token_ids = tokenizer(question.demonstration, add_special_tokens=False).input_ids
            rows.append(Completion(question.prompt_ids, [*token_ids, tokenizer.eos_token_id]))
        batches = [make_batch(some, device) for some in pack(rows, config.tokens_per_microbatch)]
        count = sum(len(row.token_ids) for row in rows)
        norm = optimizer_step(
            policy, optimizer, scheduler, batches, forward, count, config.max_grad_norm
        )
        if not math.isfinite(norm):
            raise UserError(
                "the warm start's gradient is not finite: lower --warm_start_learning_rate"
            )
    return {"warm_start_steps": steps, "warm_start_seconds": time.perf_counter() - start}


def evaluate(
    model, tokenizer, questions: list[Question], rank: int, world_size: int, config: Config
) -> dict:
    """Share of right completions, greedy ones or the mean of --eval_samples; each question is
    scored by one of the ranks and by the reward. Leaves the random state of training alone."""
    start, mine, n = time.perf_counter(), questions[rank::world_size], config.eval_samples
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(config.seed + rank)
        completions = mine and rollout(
            model, tokenizer, mine, n, config.eval_temperature, config, config.eval_top_p
        )
    correct = sum(c.right for c in completions) / n
    correct, count = sum_over_ranks([correct, len(mine)], model.device)
    return {
        "eval_accuracy": correct / count if count else None,
        "eval_questions": int(count),
        "eval_seconds": time.perf_counter() - start,
    }


# --- Output ---------------------------------------------------------------------------------------
def log(folder: Path, record: dict):
    """Appends a line to metrics.jsonl, on the first rank."""
    if is_first_rank():
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def step_line(m: dict, steps: int) -> str:
    """A step in one aligned line of the terminal."""
    return (
        f"step {m['step']:>{len(str(steps))}}/{steps}  reward {m['reward']:.3f}  "
        f"accuracy {m['accuracy']:6.1%}  format {m['format']:6.1%}  "
        f"tokens {m['completion_tokens']:5.1f}  dead {m['dead_groups']:>3}/{m['questions']}  "
        f"kl {m['kl'] or 0:.4f}  clip {m['clip_fraction'] or 0:.4f}  {m['step_seconds']:.2f} s"
    )


def sparkline(values: list[float], width: int = 40) -> str:
    """A curve of at most `width` characters, each the mean of its share of the values."""
    n, width = len(values), min(width, len(values))
    shares = [values[n * i // width : n * (i + 1) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares]
    scale = 7 / (max(means) - min(means) or 1)
    return "".join("▁▂▃▄▅▆▇█"[round((m - min(means)) * scale)] for m in means)


def summary(folder: Path) -> str:
    """What the run in `folder` achieved and what it paid for it, from its metrics.jsonl."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    total: Counter = Counter()
    for record in records:
        total.update({name: x for name, x in record.items() if isinstance(x, int | float)})
    rewards = [record["reward"] for record in records if "reward" in record]
    evaluations = [record for record in records if "eval_accuracy" in record]
    before, after = evaluations[0], evaluations[-1]
    sampling = total["sample_seconds"] + total["wait_seconds"]  # of the slowest rank
    lines = [
        f"questions  {total['questions']:,} asked, {total['dead_groups']:,} with all rewards equal",
        f"trained    {total['kept']:,} of {total['sampled']:,} completions, "
        f"{total['trained_tokens']:,} of {total['sampled_tokens']:,} tokens",
        f"seconds    {total['warm_start_seconds']:.1f} warm start, {sampling:.1f} "
        f"sampling, {total['train_seconds']:.1f} training, {total['eval_seconds']:.1f} evaluation",
    ]
    if after["eval_questions"]:
        change = f"{before['eval_accuracy']:.1%} -> {after['eval_accuracy']:.1%}"
        lines.insert(0, f"accuracy   {change} on {after['eval_questions']:,} test questions")
    if rewards:
        lines.append(f"reward     {rewards[0]:.2f} {sparkline(rewards)} {rewards[-1]:.2f}")
    return "\n".join([*lines, f"model      {folder / 'checkpoint'}"])


# --- Checkpoints ----------------------------------------------------------------------------------
def replace_file(path: Path, text: str):
    """Writes a file; crash at any moment, and the old or the new one is whole."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def save_folder(folder: Path, model, tokenizer, state: dict | None = None):
    """Replaces a Hugging Face folder, and keeps the one before as `.old`. Crash at any moment, or
    fill the disk: the old or the new one is whole. Raises UserError."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        torch.save(state or {}, new / "trainer_state.pt")
        files = [path for path in new.rglob("*") if path.is_file()]
        for path in files:  # on the disk before the old one goes: power may fail
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():  # else `old` may be the only whole one there is
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
    except Exception as error:  # of all sorts: torch, safetensors and Python have their own
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"{folder} cannot be written, what was there stays: {error}") from error


def save_checkpoint(folder: Path, learner, step: int, config: Config):
    """Gathers the state of all ranks; the first one writes it, with the model."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    ranks = gather({"asked": learner.asked, "cpu": torch.get_rng_state(), **cuda})
    if is_first_rank():
        trainer = {
            "step": step, "ranks": ranks, "config": dataclasses.asdict(config),
            "optimizer": learner.optimizer.state_dict(),
            "scheduler": learner.scheduler.state_dict(),
        }  # fmt: skip
        save_folder(folder, learner.model, learner.tokenizer, trainer)


# Flags that may change between a run and its continuation: its numbers stay the same.
MAY_CHANGE = "output_dir resume save_every eval_every".split()


def load_state(folder: Path, config: Config, world_size: int) -> dict:
    """The trainer's state in the run's checkpoint, empty if it has none; raises UserError."""
    checkpoint, old = folder / "checkpoint", folder / "checkpoint.old"
    if not checkpoint.exists() and old.exists():
        checkpoint = old  # it was killed between the two renames of save_folder
    if not checkpoint.exists():
        return {}
    try:
        state = torch.load(checkpoint / "trainer_state.pt", "cpu", weights_only=True)
        then = state["config"] | {"ranks": len(state["ranks"])}
    except Exception as error:
        hint = f"rename {old}, the one before it, to that" if old.exists() else "start anew"
        raise UserError(f"--resume: {checkpoint} cannot be read, {hint}: {error}") from error
    for name, now in (dataclasses.asdict(config) | {"ranks": world_size}).items():
        if name not in MAY_CHANGE and then.get(name) != now:
            raise UserError(f"--resume: {name} was {then.get(name)} in that run and is now {now}")
    return state | {"model": str(checkpoint)}


def restore(state: dict, rank: int, learner):
    """Takes up a checkpoint's state."""
    mine = state["ranks"][rank]
    learner.asked = mine["asked"]
    learner.stream = itertools.islice(learner.stream, learner.asked, None)
    learner.optimizer.load_state_dict(state.pop("optimizer"))
    learner.scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"])


def start_run(folder: Path, config: Config, done: int) -> bool:
    """Makes the run's folder with its config.json, and cuts metrics.jsonl back to step `done`, -1
    if there is no checkpoint. Returns, on the first rank, whether that step is evaluated already.
    """
    if not is_first_rank():
        return False
    metrics = folder / "metrics.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = metrics.read_text().splitlines() if done >= 0 else []
        lines = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= done]
        replace_file(metrics, "".join(line + "\n" for line in lines))
        replace_file(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error}") from error
    if config.resume:
        how = f"goes on after step {done}" if done >= 0 else "finds no checkpoint, starts afresh"
        say(f"cppo: --resume {how}")
    return any("eval_accuracy" in (m := json.loads(x)) and m["step"] == done for x in lines)


# --- A run ----------------------------------------------------------------------------------------
def prepare(config: Config, model_name: str | None, world_size: int, device):
    """(model, tokenizer, training questions, test questions), and the opening line."""
    torch.manual_seed(config.seed)
    model, tokenizer = load_model_and_tokenizer(model_name)
    loaded, test_questions = (encode_prompts(qs, tokenizer) for qs in load_questions(config))
    questions = [q for q in loaded if len(q.prompt_ids) <= config.max_prompt_tokens]
    left_out = ""
    if len(questions) < len(loaded):
        too_long = len(loaded) - len(questions)
        left_out = f", {too_long:,} with prompts over --max_prompt_tokens left out"
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError("--gradient_checkpointing is not possible with this --model")
    if config.warm_start_steps and not all(q.demonstration for q in questions):
        raise UserError("--warm_start_steps must be 0: there are questions without demonstration")
    if len(questions) < world_size and not config.eval_only:
        raise UserError(f"{len(questions)} training questions are too few{left_out}")
    say(
        f"cppo: task {config.task}, as {config.task_reason}; model {model_name or 'tiny Qwen2'} "
        f"of {model.num_parameters() / 1e6:,.2f}M parameters; {world_size} rank(s), {device.type}, "
        f"{config.dtype}{left_out}"
    )
    return model.to(device), tokenizer, questions, test_questions[: config.eval_questions]


def load_reference(model, state: dict, folder: Path, config: Config):
    """pi_ref: a frozen copy of the model that CPPO started from; None if beta is 0."""
    if config.beta == 0:
        return None
    if state:  # `model` has moved on since
        torch.manual_seed(config.seed)  # for the tiny model, which is drawn anew
        start = str(folder / "reference") if config.warm_start_steps else config.model
        model = load_model_and_tokenizer(start)[0].to(model.device)
    return copy_for(model, config.dtype)


def make_learner(
    model, tokenizer, questions: list[Question], state: dict, folder: Path | None,
    learning_rate: float, steps: int, config: Config, rank: int = 0, world_size: int = 1,
) -> Learner:  # fmt: skip
    """The Learner of a run of so many steps: where a `state` left it, else after the warm start,
    which is trained here."""
    policy = trainable(model, config.gradient_checkpointing)
    deal = functools.partial(question_stream, questions, config.seed, rank, world_size)
    if config.warm_start_steps and not state:
        record = warm_start(policy, tokenizer, deal(), world_size, config)
        if folder:
            log(folder, {"step": 0, **record})
            if is_first_rank():
                save_folder(folder / "reference", model, tokenizer)
    reference = load_reference(model, state, folder, config)
    # Layers that are checkpointed use no key-value cache.
    apart = config.dtype != "float32" or config.gradient_checkpointing
    sampler = copy_for(model, config.dtype) if apart else model
    optimizer, scheduler = make_optimizer(
        policy, learning_rate, steps * config.num_iterations, config.warmup_ratio
    )
    torch.manual_seed(config.seed + 1 + rank)  # of the sampling; question_stream has its own
    learner = Learner(model, policy, sampler, reference, tokenizer, optimizer, scheduler, deal())
    if state:
        restore(state, rank, learner)
    return learner


def num_steps(questions: list[Question], room: int, world_size: int, config: Config) -> int:
    """The steps of the run, and a line that says what they are made of."""
    per_step = world_size * config.questions_for(room)
    steps = math.ceil(len(questions) / per_step) if config.steps is None else config.steps
    say(
        f"cppo: {steps} steps of {per_step} questions (of {len(questions):,}), "
        f"{config.group_size} completions each (G), {config.num_kept} of them trained (k)"
    )
    return steps


def due(step: int, every: int, steps: int) -> bool:
    """Whether to do after this step what is done at both ends and every so many steps."""
    return step in (0, steps) or (every > 0 and step % every == 0)


def catch_signals() -> list[int]:
    """From now on SIGTERM and Ctrl-C only leave their numbers in the list that this returns, for
    the end of the step. A second Ctrl-C kills; SIGTERM may well come twice, from torchrun too."""
    caught: list[int] = []

    def catch(number: int, _frame):
        """The handler of both signals."""
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if is_first_rank():  # not by print, which may be what was interrupted
            os.write(2, b"\ncppo: this step is the last\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, catch)
    return caught


def train(config: Config):
    """A whole run: warm start, evaluation, CPPO, checkpoint, evaluation."""
    folder, checkpoint = Path(config.output_dir), Path(config.output_dir, "checkpoint")
    # Before the ranks meet: soon after, the first of them makes the folder.
    ours = config.resume and any(folder.glob("metrics.jsonl*"))  # it, or its replacement
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise UserError(f"--output_dir {folder} is not empty: choose another, or --resume its run")
    rank, world_size, device = init_distributed()
    room = config.room(world_size)
    state = load_state(folder, config, world_size) if config.resume else {}
    done = state.get("step", 0)
    if len({there["done"] for there in gather({"done": done})}) > 1:
        raise UserError("--resume: --output_dir must be one folder that all machines share")
    model, tokenizer, questions, test_questions = prepare(
        config, state.get("model", config.model), world_size, device
    )
    steps = num_steps(questions, room, world_size, config)
    evaluated = start_run(folder, config, done if state else -1)
    learner = make_learner(
        model, tokenizer, questions, state, folder, config.learning_rate, steps, config, rank,
        world_size,
    )  # fmt: skip
    asked = sum(then["asked"] for then in state.get("ranks", []))  # questions, by all ranks

    def test(step: int):
        """Evaluates and logs the sampler after this step."""
        score = evaluate(learner.sampler, tokenizer, test_questions, rank, world_size, config)
        log(folder, {"step": step, **score})

    if due(done, config.eval_every, steps) and not gather({"already": evaluated})[0]["already"]:
        test(done)
    if steps == 0 and not state:
        save_checkpoint(checkpoint, learner, 0, config)
    caught, todo = catch_signals(), range(done + 1, steps + 1)
    for step in tqdm(todo, config.task, steps, initial=done, disable=not is_first_rank()):
        try:
            numbers = train_step(learner, room, config)
        except NotFinite as error:
            back = f"--model {checkpoint}" if checkpoint.exists() else "the start (--save_every)"
            raise UserError(
                f"step {step}: {error}; lower --learning_rate and go back to {back}"
            ) from error
        asked += numbers["questions"]
        metrics = {"step": step, "epoch": asked / len(questions), **numbers}
        log(folder, metrics)
        if step == 1 or step % max(1, steps // 10) == 0:
            say(step_line(metrics, steps))
        stop = step < steps and sum_over_ranks([len(caught)], device)[0] > 0
        if stop or due(step, config.save_every, steps):
            save_checkpoint(checkpoint, learner, step, config)
        if stop:
            say(f"cppo: stopped after step {step}, saved in {checkpoint}; go on with --resume")
            close_distributed()
            # 143 for SIGTERM, 130 for Ctrl-C; another rank may have been the one that was told
            sys.exit(128 + [*caught, signal.SIGTERM][0])
        if due(step, config.eval_every, steps):
            test(step)
    if is_first_rank():
        say(summary(folder))
    close_distributed()


def evaluate_only(config: Config):
    """--eval_only: evaluates a model and writes nothing."""
    rank, world_size, device = init_distributed()
    model, tokenizer, _, questions = prepare(config, config.model, world_size, device)
    result = evaluate(copy_for(model, config.dtype), tokenizer, questions, rank, world_size, config)
    each = f", {config.eval_samples} samples each" if config.eval_samples > 1 else ""
    line = "accuracy   {eval_accuracy:.2%} on {eval_questions:,} test questions"
    say(line.format(**result) + each)
    close_distributed()


# --- Benchmark ------------------------------------------------------------------------------------
def benchmark(config: Config):
    """--benchmark: what pruning would save with this model on this machine, step by step as train()
    takes them, but at a learning rate of 0, so that all pruning rates sample from one policy."""
    rank, world_size, device = init_distributed()
    room = dataclasses.replace(config, pruning_rate=0.0).room(world_size)  # whole groups
    model, tokenizer, questions, _ = prepare(config, config.model, world_size, device)
    learner = make_learner(
        model, tokenizer, questions, {}, None, 0.0, config.steps, config, rank, world_size
    )
    say(f"cppo: medians of {config.steps} steps of {config.batch_size} trained completions")
    say("     P   k  questions  s/question  speedup  bound  sampled/s  trained/s  sampling")
    rates = {}  # k -> P: with a small G, several P keep as many
    for rate in (0.0, 0.5, 0.75, 0.875, 0.9375):
        rates.setdefault(dataclasses.replace(config, pruning_rate=rate).num_kept, rate)
    names = "questions", "sampled_tokens", "trained_tokens"
    names += "sample_seconds", "wait_seconds", "train_seconds", "step_seconds"
    grpo = 0.0  # seconds per question at P = 0
    for k, rate in rates.items():
        pruned = dataclasses.replace(config, pruning_rate=rate)
        torch.manual_seed(config.seed + 1 + rank)
        learner.stream = question_stream(questions, config.seed, rank, world_size)
        bar = tqdm(range(config.steps + 1), f"P {rate}", leave=False, disable=not is_first_rank())
        runs = [train_step(learner, room, pruned) for _ in bar][1:]  # the first warms up
        m = {name: statistics.median(run[name] for run in runs) for name in names}
        sampling = m["sample_seconds"] + m["wait_seconds"]  # of the slowest rank
        per_question = m["step_seconds"] / m["questions"]
        grpo = grpo or per_question
        say(
            f"{rate:6.4g} {k:3d} {m['questions']:10.0f} {per_question:11.4g} "
            f"{grpo / per_question:7.2f}x {grpo * m['questions'] / sampling:5.1f}x "
            f"{m['sampled_tokens'] / sampling:10,.0f} "
            f"{m['trained_tokens'] / m['train_seconds']:10,.0f} "
            f"{sampling / m['step_seconds']:9.0%}"
        )
    say(
        "bound: the speedup if training cost nothing; tokens are the completions', a trained one "
        f"counts once for all {config.num_iterations} passes (mu)"
    )
    close_distributed()


# --- Command line ---------------------------------------------------------------------------------
def keep_freed_memory():
    """Has glibc keep what tensors free. It would hand big blocks back to the kernel, which then has
    to wipe new pages for the next tensor: up to a quarter of a training step's time on a CPU."""
    here = sys.platform == "linux" and not torch.cuda.is_available()
    libc = ctypes.CDLL(None) if here else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a big tensor


def leave(status: int):
    """Ends this process at once: with other ranks still there, Python's own way out may hang."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main():
    """The command line."""
    keep_freed_memory()
    sys.stdout.reconfigure(line_buffering=True)
    defaults = [f"{name}: {json.dumps(task.defaults)[1:-1]}" for name, task in TASKS.items()]
    parser = transformers.HfArgumentParser(
        Config,
        allow_abbrev=False,
        usage="[torchrun --nproc_per_node GPUS] cppo.py [--flag VALUE ...]",
        description=__doc__.split("\n")[0],
        epilog="defaults by task:\n" + "\n".join(defaults),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def refuse(message: str):
        """What the parser finds wrong, in one line; argparse would print a page."""
        raise UserError(f"{message} (see --help)")

    parser.error = refuse
    try:
        config = Config(**vars(parser.parse_args()))
        (evaluate_only if config.eval_only else benchmark if config.benchmark else train)(config)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        here_only = not isinstance(error, UserError)  # a user's mistake the first rank has as well
        if isinstance(error, torch.OutOfMemoryError):
            flags = "--tokens_per_microbatch or --sample_batch, or give --gradient_checkpointing"
            error = f"CUDA is out of memory: lower {flags}"
        if here_only or os.environ.get("LOCAL_RANK", "0") == "0":
            print("cppo.py:", " ".join(str(error).split())[:400], file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:  # before the first step, or in a benchmark
        leave(128 + signal.SIGINT)
    except Exception:
        traceback.print_exc()
        leave(1)


if __name__ == "__main__":
    main()
