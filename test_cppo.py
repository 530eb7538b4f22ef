"""What is true of cppo.py, one test a sentence, in the order of the file.

Begin with the_readmes_group_worked_by_hand, update_of_unpruned_groups_equals_a_naive_grpo,
probabilities_are_those_of_training, on_two_ranks_with_unequal_rows and killed_at_random_moments.

pytest -m "not slow"                    without the runs of whole training jobs
CPPO_MODULE=mine pytest -k pruning      an exercise: mine.py stands in for parts of cppo.py
"""

import contextlib
import copy
import fcntl
import functools
import importlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the CPU's, on any machine
import datasets
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import processors

import cppo
from cppo import Completion, Config, Learner, Question, UserError

ROOT = Path(__file__).parent
F64 = torch.float64
SCRIPT, RUN_MULTI_GPU = [str(ROOT / "cppo.py")], [str(ROOT / "run_multi_gpu.sh")]
RIGHT = dict(vars(cppo))  # cppo.py's own, whatever a student's module replaces below
if student := os.environ.get("CPPO_MODULE"):
    found = vars(importlib.import_module(student)).items()  # also what it has imported
    written = {name: x for name, x in found if getattr(x, "__module__", "") == student}
    vars(cppo).update(written)
    SCRIPT = [str(ROOT / "test_cppo.py"), "--main"]  # real processes do the same

# An exercise is a function to write, and a word for -k, which finds the tests that grade it.
EXERCISES = {
    "extract_answer": "answers", "group_advantages": "advantages", "prune": "pruning",
    "make_batch": "masks", "cppo_loss": "loss", "collect_batch": "refill",
    "max_variance": "max_variance", "clip_higher_loss": "clip_higher",
    "dr_grpo_advantages": "dr_grpo", "dr_grpo_token_mean": "dr_grpo", "dppo_weights": "dppo",
}  # fmt: skip
if student and not {*EXERCISES} & {*written}:
    raise ImportError(f"{student}.py has none of the functions {', '.join(EXERCISES)}")


# --- Helpers --------------------------------------------------------------------------------------
def grades(*words: str):
    """Has -k find a test by these words too: pytest also looks at the attributes of a function."""
    return lambda test: vars(test).update(dict.fromkeys(words, True)) or test  # update gives None


def tiny(family: str, vocabulary: int = 20):
    """A small model of an architecture, its weights random, large, and the same at each call."""
    torch.manual_seed(7)
    size = dict(vocab_size=vocabulary, initializer_range=0.2, bos_token_id=None, eos_token_id=1)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, pad_token_id=None)  # fmt: skip
    shape |= {
        "Mamba": dict(state_size=8), "GPT2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=64),
        "Gemma3Text": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
        "Qwen3Next": dict(  # three layers of linear attention, one of full attention
            num_hidden_layers=4, mlp_only_layers=[0, 1, 2, 3], linear_num_key_heads=2,
            linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
    }.get(family, {})  # fmt: skip
    shape = getattr(transformers, f"{family}Config")(**shape, **size)
    return transformers.AutoModelForCausalLM.from_config(shape).eval()


def some_rows(n: int, longest: int = 9) -> list[Completion]:
    """n rows with random tokens, lengths and advantages."""
    rng = random.Random(0)

    def tokens(most):
        return [rng.randrange(2, 20) for _ in range(rng.randint(1, most))]

    return [Completion(tokens(5), tokens(longest), advantage=rng.gauss(0, 1)) for _ in range(n)]


def naive_log_probs(model, row: Completion, temperature: float) -> torch.Tensor:
    """log pi(o_t | q, o_<t), one row at a time, without padding."""
    logits = model(torch.tensor([row.prompt_ids + row.token_ids])).logits[0] / temperature
    log_probs = logits[len(row.prompt_ids) - 1 : -1].log_softmax(-1)  # (|o_i|, V)
    return log_probs.gather(1, torch.tensor(row.token_ids)[:, None])[:, 0]


def config(**changes) -> Config:
    return Config(task="arithmetic", **changes)


def learner_of(model, make=None, reference=None, ddp=False) -> Learner:
    """A learner of constant rate; make(policy) gives its optimizer, by default SGD of rate 1."""
    wrap = functools.partial(cppo.DDP, gradient_as_bucket_view=True, forward_sync_buffers=False)
    policy = wrap(model) if ddp else model  # as in train
    optimizer = make(policy) if make else torch.optim.SGD(policy.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Learner(model, policy, model, reference, optimizer, scheduler)


def adamw(policy):
    """make_optimizer's optimizer, for learner_of."""
    return cppo.make_optimizer(policy, 1e-2, 8, config(warmup_ratio=0.0))[0]


def gradients_of_update(rows, N=12, ddp=False, **changes) -> list[torch.Tensor]:
    """The gradient that update() steps along, with a reference that is not the policy."""
    learner = learner_of(tiny("Llama"), reference=tiny("GPT2"), ddp=ddp)
    before = [p.detach().clone() for p in learner.model.parameters()]
    settings = config(num_iterations=1, max_grad_norm=1e9, **changes)
    cppo.update(learner, rows, N, settings)
    return [a - b.detach() for a, b in zip(before, learner.model.parameters(), strict=True)]


def close(got: torch.Tensor, want, lesson: str):
    want = torch.as_tensor(want, dtype=got.dtype)
    assert torch.allclose(got, want, atol=1e-6), f"{lesson}: {want.tolist()}, not {got.tolist()}"


def right_form(answer) -> str:
    return f"<think>1 2</think>\n<answer>{answer}</answer>"


FORM = right_form("3")


def save_tiny_model(folder: Path):
    for part in cppo.tiny_model_and_tokenizer():
        part.save_pretrained(folder)
    return folder


def run(*arguments, status: int = 0, **how) -> str:
    """What a real process prints, which must end with this exit status."""
    process = start_process(*arguments, **how)
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, out + err
    return out


def start_process(*arguments, ranks: int = 1, script=SCRIPT, **environment) -> subprocess.Popen:
    """A real process, left running: python, or torchrun where there are several ranks. It has one
    thread: spinning threads would slow down others."""
    launcher = [] if script is RUN_MULTI_GPU else [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [*launcher, *script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={"OMP_NUM_THREADS": "1", **os.environ, "PATH": path, **environment},
    )  # fmt: skip


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def command_line(monkeypatch, capsys, *flags) -> tuple[int, str]:
    """main() with these flags: its exit status and what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["cppo.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        cppo.main()
    return stop.value.code, capsys.readouterr().err


# --- Configuration --------------------------------------------------------------------------------
def test_k_is_floor_of_G_times_1_minus_P_and_at_least_1():
    for G, P, k in (
        (16, 0.0, 16), (16, 0.875, 2), (16, 0.9375, 1), (7, 0.5, 3), (4, 0.99, 1),
        (20, 0.8, 4),  # 20 * (1 - 0.8) is 3.9999999999999996
    ):  # fmt: skip
        assert config(group_size=G, pruning_rate=P).num_kept == k


@pytest.mark.parametrize(
    ("flags", "names"),
    [  # first, of every flag with an interval, a number just below it: 0 for "[1, inf)"
        *[([f"--{f.name}", str(int(float(f.metadata["metavar"][1:].split(",")[0])) - 1)],
           f"--{f.name} must be in") for f in fields(Config) if f.metadata.get("metavar")],
        (["--pruning_rate", "1"], "--pruning_rate"), (["--pruning_rate", "nan"], "--pruning_rate"),
        (["--batch_size", "x"], "--batch_size"), (["--prune_by", "luck"], "--prune_by"),
        (["--prun", "0.5"], "--prun"), (["--task", "poetry"], "--task"), (["hello"], "hello"),
        (["--sample_batch", "15"], "--sample_batch must be at least"),
        (["--eval_samples", "1025"], "--sample_batch must be at least"),
        (["--pruning_rate", "0", "--batch_size", "24"], "of 16, ranks x k: 16 or 32"),
        (["--eval_only", "--eval_questions", "0"], "has no questions, or --eval_questions is 0"),
        (["--task", "arithmetic", "--train_data", "x.csv"], "--task arithmetic makes its own"),
        (["--model", "no/such/folder"], "--model no/such/folder"),
        (["--max_prompt_tokens", "5"], "2,560 prompts over --max_prompt_tokens left out"),
        (["--train_data", "none.csv"], "--train_data none.csv"),
        (["--output_dir", "full"], "--output_dir full is not empty"),
        (["--output_dir", "full", "--resume"], "--output_dir full is not empty"),
        (["--output_dir", "full/file/run"], "--output_dir full/file/run cannot be written"),
        (["--task", "bare"], "--warm_start_steps must be 0"),
        (["--task", "empty"], "--task empty has no questions"),
        (["--task", "minus"], "--model None: its tokenizer or chat template refuses the questions"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_exit_2(flags, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for task, prompts in (("bare", ["1+1="]), ("empty", []), ("minus", ["1-1="])):  # - is no token
        questions = [Question(prompt, "2") for prompt in prompts]
        own = cppo.Task(lambda *_, q=questions: q, cppo.accuracy_reward, {"warm_start_steps": 1})
        monkeypatch.setitem(cppo.TASKS, task, own)
    before = sorted(tmp_path.rglob("*"))
    status, error = command_line(monkeypatch, capsys, "--output_dir", "out", *flags)
    assert status == 2
    assert error.startswith("cppo.py: ") and error.count("\n") == 1 and names in error
    assert sorted(tmp_path.rglob("*")) == before


def test_no_memory_no_disk_and_ctrl_c_are_one_line_and_a_bug_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(cppo, "RANK", 1)  # each rank says what has ended it
    for error, status, says in (
        (torch.OutOfMemoryError("9 GiB"), 2, "lower --tokens_per_microbatch or --sample_batch"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "--resume goes on from a run's last checkpoint"),
        (AttributeError("a bug"), 1, "Traceback"),
    ):
        monkeypatch.setattr(cppo, "train", mock.Mock(side_effect=error))
        code, printed = command_line(monkeypatch, capsys)
        assert code == status and says in printed and (status == 1 or printed.count("\n") == 1)
    with pytest.raises(torch.OutOfMemoryError), cppo.blame("what is not to blame"):
        raise torch.OutOfMemoryError


def test_ranks_x_k_divide_the_batch_and_there_are_no_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(cppo, "WORLD_SIZE", 8)
    assert config(batch_size=128).batch_size == 128
    assert config(group_size=6, pruning_rate=0.5).batch_size == 24  # a default is rounded
    with pytest.raises(UserError, match="multiple of 16, ranks x k: 96 or 112"):
        config(batch_size=100)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--nproc_per_node 3 is more than the GPUs here"):
        cppo.init_distributed()


# --- Sampling -------------------------------------------------------------------------------------
PROMPTS = [[5, 0, 7], [8], [9, 10, 11, 12, 13], [8, 9]]  # ragged on purpose; 0 also pads


@pytest.mark.parametrize("family", ["Qwen2", "GPT2", "Qwen3Next", "Gemma3Text"])
@pytest.mark.parametrize(("temperature", "eos_ids"), [(1.0, [2, 5]), (0.7, [0])])
def test_the_samplers_probabilities_are_those_of_training(family, temperature, eos_ids):
    model = tiny(family)
    torch.manual_seed(0)
    rows = cppo.sample_completions(model, PROMPTS, 6, 40, temperature, eos_ids)
    assert [row.prompt_ids for row in rows] == [p for p in PROMPTS for _ in range(6)]
    assert {len(row.token_ids) > 33 for row in rows} == {True, False}  # the longer grew the cache
    batch = cppo.make_batch(rows)
    with torch.no_grad():
        log_probs = cppo.token_log_probs(model, batch, temperature)
        ratio = torch.exp(log_probs - batch.sampled_log_probs)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=2e-4)
    for i, row in enumerate(rows):
        *before, last = row.token_ids
        assert row.truncated == (last not in eos_ids) and not {*before} & {*eos_ids}
        alone = naive_log_probs(model, row, temperature)  # by a forward pass of the row alone
        torch.testing.assert_close(log_probs[i, : len(alone)], alone, rtol=0, atol=2e-4)


def test_completions_come_question_major_scored_by_their_own_question_in_any_chunks(monkeypatch):
    model, tokenizer = cppo.load_model_and_tokenizer(None, "")
    questions = [Question(f"0+{i}=", f"{i}", right_form(i)) for i in range(4)]
    cppo.encode_questions(questions, tokenizer)
    parts = (0, 10), (1, 10), (0, 8)  # of 10 tokens: right, right but not in form, cut off
    calls = []

    def teach(_model, prompts, group_size, *how):
        calls.append((len(prompts) * group_size, *how))
        right = [q.demonstration_ids for q in questions if q.prompt_ids in prompts]
        return [Completion([], ids[a:b], truncated=b < 10) for ids in right for a, b in parts]

    monkeypatch.setattr(cppo, "sample_completions", teach)
    for sample_batch in (1024, 7, 3):
        settings = config(sample_batch=sample_batch, group_size=3)
        completions = cppo.rollout(model, tokenizer, questions, settings, 3, 0.7, 0.9)
        assert [c.answer for c in completions] == [q.answer for q in questions for _ in range(3)]
        assert [(c.reward, c.truncated) for c in completions] == [(3, 0), (2, 0), (0, 1)] * 4
    assert calls == [(n, 32, 0.7, [1], 0.9) for n in (12, 6, 6, 3, 3, 3, 3)]  # rows, max_tokens...


def test_a_prompt_is_read_once_ended_rows_leave_and_lm_head_reads_whole_tensors():
    model = tiny("Qwen2")
    shapes, forward = [], model.forward
    model.forward = lambda **kw: shapes.append(tuple(kw["input_ids"].shape)) or forward(**kw)
    whole = []  # is lm_head's input contiguous? with a strided one bfloat16 is slow on CPUs
    model.lm_head.register_forward_pre_hook(lambda _, x: whole.append(x[0].is_contiguous()))
    torch.manual_seed(0)
    cppo.sample_completions(model, PROMPTS, 8, 30, 1.0, [1, 2, 3, 4])
    assert shapes[0] == (4, 5) and all(whole)  # Q prompts, not Q G
    live = [rows for rows, width in shapes[1:] if width == 1]
    assert len(live) == len(shapes) - 1 and live[0] <= 32 and live[-1] < 8
    assert live == sorted(live, reverse=True)
    shapes.clear()
    cppo.sample_completions(model, PROMPTS, 8, 3, 1.0, [99])
    assert len(shapes) == 3  # a forward pass a token, and none after the last


def test_top_p_draws_from_the_fewest_likeliest_tokens_that_reach_it_and_temperature_0_from_one():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert [x.tolist() for x in cppo.sample_tokens(logits[None], 0.0)] == [[1], [0.0]]
    with pytest.raises(FloatingPointError, match="the model's logits are nan"):
        cppo.sample_tokens(torch.stack([logits, logits * math.nan]), 0.0)
    for top_p, likely in ((0.35, [1]), (0.65, [1, 3]), (0.8, [1, 2, 3])):
        torch.manual_seed(0)  # below, / 2 and the temperature 0.5 cancel
        tokens, log_probs = cppo.sample_tokens(logits.expand(4000, -1) / 2, 0.5, top_p)
        assert sorted(set(tokens.tolist())) == likely
        total = logits[likely].exp().sum()
        torch.testing.assert_close(log_probs, logits[tokens] - total.log())
        share = (tokens == 1).float().mean().item()
        assert share == pytest.approx(0.4 / total.item(), abs=0.04)  # 5 sigma


# --- Rewards --------------------------------------------------------------------------------------
def test_answers_are_what_the_last_pair_of_tags_holds():
    two = "<answer>1</answer> no, wait: <answer>2</answer>"
    assert cppo.extract_answer(two) == "2", "the last answer counts, and nothing before it"
    assert cppo.extract_answer("<answer>\n 72 </answer>") == "72", "strip the space around it"
    for answer in ("-72", "x = 3", "1,234.5"):
        got = cppo.extract_answer(f"<answer>{answer}</answer>")
        assert got == answer, f"an answer keeps all that it holds, sign and letters: {answer!r}"
    for text in ("72", "<answer>72", "72</answer>", "</answer>72<answer>", ""):
        said = cppo.extract_answer(text)
        assert said is None, f"no answer is None, or it might equal an empty one: {text!r}"


REWARDS = [  # completion, right answer, format reward, accuracy reward
    # the form; { stands for <think>hm</think>, } for <answer>72</answer>
    *[(text.replace("{", "<think>hm</think>").replace("}", "<answer>72</answer>"), "72", form, acc)
      for text, form, acc in (
        ("{\n}", 1, 2), ("<think></think>\n}", 1, 2), ("<think>a\nb\n\nc</think>\n}", 1, 2),
        ("{}", 0, 2), ("{ }", 0, 2), ("{\n\n}", 0, 2), ("{\r\n}", 0, 2), (" {\n}", 0, 2),
        ("{\n}\n", 0, 2), ("<think>hm\n}", 0, 2), ("hm</think>\n}", 0, 2), ("<think>{\n}", 0, 2),
        ("{\n<answer>71</answer>\n}", 0, 2), ("{\n}\n<answer>71</answer>", 0, 0),
        ("{\n<answer>72", 0, 0), ("<Think>hm</Think>\n<Answer>72</Answer>", 0, 0), ("72", 0, 0),
    )],
    # no answer is never right
    ("", "", 0, 0), (right_form(""), "", 1, 0), (right_form(" "), "", 1, 0),
    # the same number, written otherwise
    *[(right_form(given), answer, 1, 1.5) for given, answer in (
        ("72.0", "72"), ("72", "72."), ("072", "72"), ("+72", "72"), ("$72.00.", "72"),
        ("72%", "72"), ("1234", "1,234"), (".5", "0.5"), ("1,234,567.50", "1234567.5"),
        ("-$5", "-5"), ("$-5", "-5"), ("-0", "0"), ("\N{MINUS SIGN}5", "-5"),
    )],
    (right_form("1,234"), "1,234", 1, 2), (right_form("x = 3"), "x = 3", 1, 2),
    # other numbers, or none
    *[(right_form(given), answer, 1, 0) for given, answer in (
        ("-72", "72"), ("7.2", "72"), ("12,34", "1234"), ("1,2345", "12345"), ("72 clips", "72"),
        ("7 2", "72"), ("7.2e1", "72"), ("+-72", "-72"), ("$", "0"), (".", "0"), ("inf", "inf."),
        ("٧٢", "72"), ("0.1000000000000000055511151231257827", "0.1"),  # equal in floats only
    )],
]  # fmt: skip


@grades("answers")
def test_the_form_earns_1_and_the_answer_2_or_1_point_5_if_right_only_as_a_number():
    for text, answer, form, accuracy in REWARDS:
        got = cppo.format_reward(text), cppo.accuracy_reward(text, answer)
        assert got == (form, accuracy), (text, answer)


@grades("answers")
def test_rewards_take_linear_time_on_a_megabyte_of_anything():
    # Quadratic time would be 1e12 steps here: this test would hang.
    pieces = "<think></think>\n<answer>", "1,", ",111", "0.", "\\boxed", *"<9-$.% {}\\", *cppo.TAGS
    for flood in (piece * (1_000_000 // len(piece)) for piece in pieces):
        for text in (flood, right_form(flood + "x"), right_form("1" + flood + "x")):
            cppo.format_reward(text)
            cppo.accuracy_reward(text, "72")
            cppo.accuracy_reward(right_form("72"), text)
            cppo.boxed(text)


# --- Advantages and pruning -----------------------------------------------------------------------
def test_advantages_by_hand():
    rewards = torch.tensor([[3, 1, 0, 0], [3, 3, 3, 3], [2, 0, 0, 0]], dtype=F64)
    got = cppo.group_advantages(rewards)
    close(cppo.group_advantages(rewards[1:2]), [[0] * 4], "equal rewards teach nothing: 0 / 1e-4")
    alone = torch.cat([cppo.group_advantages(row[None]) for row in rewards])
    close(got, alone, "mean and std are each question's own, whatever other questions there are")
    s = math.sqrt(2) + 1e-4
    close(got[0], [2 / s, 0, -1 / s, -1 / s], "3 1 0 0 has mean 1 and std sqrt(6 / 3), over G - 1")


def kept(advantages, k, **options):
    """The indices that prune keeps, question by question."""
    mask = cppo.prune(torch.tensor(advantages, dtype=F64), k, **options)
    return [row.nonzero()[:, 0].tolist() for row in mask]


def test_pruning_keeps_the_k_largest_absolute_advantages_of_each_question_and_of_ties_the_first():
    advantages = [[0.1, -2.0, 1.0, 0.9], [0.01, 0.02, -0.03, 0.0]]
    got = kept(advantages, 2)
    assert [len(group) for group in got] == [2, 2], "each question keeps k: none is crowded out"
    assert got == [[1, 2], [1, 2]], "the largest |A|, not A: the worst teach as much as the best"
    assert kept(advantages, 4) == [[0, 1, 2, 3]] * 2, "with gamma 0 all k stay, also where A = 0"
    lesson = "exactly k stay, and of equal ones the first: the same on every machine"
    assert kept([[1.0, -1.0, 1.0, -1.0]], 2) == [[0, 1]], lesson
    assert kept([[0.0] * 40], 3) == [[0, 1, 2]], lesson


def test_pruning_by_another_criterion_keeps_its_first_k_and_with_gamma_none_below_gamma():
    advantages = [[0.1, -2.0, 1.0, -0.9]]
    torch.manual_seed(0)
    assert kept(advantages, 2, by="advantage") == [[0, 2]]
    assert kept(advantages, 2, by="smallest") == [[0, 3]]
    seen = Counter(i for _ in range(600) for i in kept(advantages, 2, by="random")[0])
    assert all(240 < seen[i] < 360 for i in range(4))  # each half of the time: 5 sigma
    advantages = [[0.1, -2.0, 1.0, 1.0], [0.0, -1.0, 0.5, -0.5]]
    assert kept(advantages, 2, gamma=1.0) == [[1, 2], [1]], "of the k, |A| >= gamma stays"


# --- Refill ---------------------------------------------------------------------------------------
def fake_draw(rewards_of):
    """A sampler of questions that are numbers: question i gets the rewards rewards_of(i)."""

    def draw(questions):
        rewards = itertools.chain(*map(rewards_of, questions))
        return [Completion([1], [2, 3], [-1.0, -0.5], accuracy_reward=float(r)) for r in rewards]

    return draw


def test_refill_fills_the_batch_exactly_from_G_over_k_times_the_questions_that_grpo_asks():
    settings = config(group_size=4, pruning_rate=0.5, batch_size=8)
    draw = fake_draw(lambda i: [i / 10, 0, 0.2, 0.5])
    rows, sampled, rounds = cppo.collect_batch(draw, itertools.count(), 8, settings)
    assert len(sampled) == 4 * 4 and rounds == 1, "at k = 2 it takes 4 questions to fill 8 slots"
    assert len(rows) == 8, "all the room is used"
    assert [row.reward for row in rows].count(0.5) == 4, "each question's 0.5 is among its k"
    lesson = "A is over all G completions, before any is pruned, and stays with its completion"
    for i, row in enumerate(rows):
        group = [i // 2 / 10, 0, 0.2, 0.5]
        A = (row.reward - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        assert row.advantage == pytest.approx(A, rel=1e-9), f"{lesson}, in float64"


def test_refill_leaves_fewer_than_k_rows_empty_rather_than_split_a_question():
    # Where gamma drops one of the k = 2 there is room for a row, but for no further question.
    settings = config(group_size=4, pruning_rate=0.5, gamma=0.8)
    draw = fake_draw(lambda i: [0, 3, 3, 0] if i else [0, 0, 0, 3])  # |A| 0.87; 0.5 and 1.5
    rows, sampled, _ = cppo.collect_batch(draw, itertools.count(), 8, settings)
    assert len(rows) <= 8, "never more rows than there is room"
    assert len(sampled) == 4 * 4 and len(rows) == 7, "rather an empty row than to split a question"


def test_refill_with_a_tiny_gamma_asks_again_in_place_of_dead_groups_four_times_at_most():
    settings = config(group_size=4, pruning_rate=0.5, gamma=1e-6)
    draw = fake_draw(lambda i: [0, 0, 0, 3] if i % 2 and i != 7 else [1] * 4)  # else dead
    rows, sampled, rounds = cppo.collect_batch(draw, itertools.count(), 8, settings)
    lesson = "dead groups leave room: ask new questions for it, round after round, 4 in all"
    assert rounds == 4 and len(sampled) == (4 + 2 + 1 + 1) * 4, lesson
    assert len(rows) == 6 and all(abs(row.advantage) > 0.4 for row in rows)  # 2 stay empty


# --- Log-probabilities ----------------------------------------------------------------------------
def test_micro_batches_are_full_hold_every_row_once_and_little_padding():
    rows = some_rows(50, longest=30)
    packs = cppo.pack(rows, 30)
    assert Counter(map(id, itertools.chain(*packs))) == Counter(map(id, rows))
    sizes = [len(part) * max(row.num_tokens for row in part) for part in packs]
    assert all(size <= 30 or len(part) == 1 for size, part in zip(sizes, packs, strict=True))
    assert sum(sizes) < 1.15 * sum(row.num_tokens for row in rows)
    assert all((len(part) + 1) * part[0].num_tokens > 30 for part in packs[:-1])  # each is full


def test_masks_of_a_batch_by_hand():
    # The EOS of these rows is 0, and so is the padding, as in many a model.
    rows = [Completion([5, 6], [7, 0], [-0.5, -0.25], advantage=2.0), Completion([8], [9, 0, 0])]
    batch = cppo.make_batch(rows)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]], "prompt, completion, padding"
    assert not batch.mask[0, 2], "padding is no token of the completion"
    assert batch.mask[0, 1], "EOS is trained, or the model would never learn to stop"
    assert batch.mask.int().tolist() == [[1, 1, 0], [1, 1, 1]], "by position: 0 may be a token"
    lesson = "the logits at a token predict the next one: it begins at the prompt's last token"
    assert batch.predicts.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0]], lesson
    assert batch.sampled_log_probs.tolist() == [[-0.5, -0.25, 0], [0, 0, 0]]
    assert batch.advantages.tolist() == [2, 0]


# --- Loss -----------------------------------------------------------------------------------------
def loss_of(ratio, advantage, eps=0.2, beta=0.0, ref_ratio=1.0):
    """The loss of one token, its gradient with respect to log pi_theta, and the statistics."""
    old = torch.tensor([[-1.0]], dtype=F64)
    log_probs = (old + math.log(ratio)).requires_grad_()
    ref = log_probs.detach() + math.log(ref_ratio)
    A, mask = torch.tensor([advantage], dtype=F64), torch.tensor([[True]])
    losses, statistics = cppo.cppo_loss(log_probs, old, ref, A, mask, eps, beta)
    losses.sum().backward()
    return losses.item(), log_probs.grad, {k: v.item() for k, v in statistics.items()}


def test_the_clipped_loss_and_its_gradient_by_hand():
    for ratio, advantage, loss, gradient, is_clipped, why in (
        (1.1, 2.0, -2.2, -2.2, 0, "the loss is minus what the paper maximizes: -rho A"),
        (1.5, 2.0, -2.4, 0.0, 1, "above 1 + eps and wanted more: held at 1.2 A"),
        (1.5, -2.0, 3.0, 3.0, 0, "above 1 + eps but unwanted: min leaves it free to come back"),
        (0.5, -2.0, 1.6, 0.0, 1, "below 1 - eps and unwanted: held at 0.8 A"),
        (0.5, 2.0, -1.0, -1.0, 0, "below 1 - eps but wanted: min leaves it free to come back"),
    ):
        got, grad, statistics = loss_of(ratio, advantage)
        assert got == pytest.approx(loss, abs=1e-12), why
        assert grad.item() == pytest.approx(gradient, abs=1e-12), why
        assert statistics["clip_fraction"] == is_clipped, why


def test_the_kl_term_of_the_loss_and_its_gradient_by_hand():
    # pi_ref / pi_theta = 2: KL = 2 - log 2 - 1, d KL / d log pi_theta = 1 - 2
    got, grad, statistics = loss_of(1.0, 3.0, beta=0.04, ref_ratio=2.0)
    why = "KL = pi_ref / pi_theta - log(pi_ref / pi_theta) - 1, never below 0"
    assert statistics["kl"] == pytest.approx(1 - math.log(2), abs=1e-12), why
    assert got == pytest.approx(-(3.0 - 0.04 * (1 - math.log(2))), abs=1e-12), why
    why = "the KL term pulls back to the reference: its gradient flows through log pi_theta"
    assert grad.item() == pytest.approx(-(3.0 + 0.04 * (2 - 1)), abs=1e-12), why


def test_the_loss_averages_over_a_completions_own_tokens_and_leaves_completions_to_the_caller():
    # Lengths 1 and 3: every token of the short one weighs 1, of the long one 1/3. Padding nothing.
    log_probs = torch.tensor([[0.0, 9.0, 9.0], [0.0, 0.0, 0.0]], dtype=F64, requires_grad=True)
    old, A = torch.zeros(2, 3, dtype=F64), torch.tensor([2.0, -1.0], dtype=F64)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    losses, statistics = cppo.cppo_loss(log_probs, old, None, A, mask, 0.2, 0.0)
    why = "1/|o_i| over a completion's own tokens, padding left out; 1/N is the caller's"
    assert losses.tolist() == [-2.0, 1.0] and losses.shape == statistics["kl"].shape == (2,), why
    losses.sum().backward()
    third = pytest.approx(1 / 3)
    assert log_probs.grad.tolist() == [[-2.0, 0.0, 0.0], [third, third, third]], why


# --- Update ---------------------------------------------------------------------------------------
@grades("advantages", "pruning", "masks", "loss", "refill")
def test_update_of_unpruned_groups_equals_a_naive_grpo():
    """P = 0 is GRPO: two groups of 4, one completion at a time, an old policy of its own."""
    model = tiny("Qwen2")
    settings = config(group_size=4, pruning_rate=0.0, max_grad_norm=0.5, temperature=0.9,
                      tokens_per_microbatch=20)  # fmt: skip
    torch.manual_seed(3)
    completions = cppo.sample_completions(model, PROMPTS[:2], 4, 8, 0.9, [1])
    rewards = [[3.0, 1.0, 0.0, 1.0], [0.0, 2.5, 2.5, 0.0]]
    for c, reward in zip(completions, itertools.chain(*rewards), strict=True):
        c.accuracy_reward = reward
        c.log_probs = [x + 0.5 for x in c.log_probs]  # the loss does not ask the sampler for them
    rows, *_ = cppo.collect_batch(lambda _: completions, itertools.count(), 8, settings)
    ours, reference = copy.deepcopy(model), tiny("Llama")
    row_sums = cppo.update(learner_of(ours, reference=reference), rows, 8, settings)

    naive, old = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(naive.parameters(), lr=1.0)
    sums = Counter()
    for _ in range(2):
        loss = 0.0
        for group in range(2):
            r = torch.tensor(rewards[group])
            A = (r - r.mean()) / (r.std() + 1e-4)
            for i in range(4):
                row = completions[group * 4 + i]
                with torch.no_grad():
                    lp_old, lp_ref = (naive_log_probs(m, row, 0.9) for m in (old, reference))
                lp = naive_log_probs(naive, row, 0.9)
                rho = torch.exp(lp - lp_old)
                kl = torch.exp(lp_ref - lp) - (lp_ref - lp) - 1
                terms = torch.min(rho * A[i], rho.clamp(0.8, 1.2) * A[i]) - 0.04 * kl
                loss = loss - terms.sum() / len(row.token_ids) / 4 / 2
                sums["kl"] += (kl.sum() / len(row.token_ids)).item()
        loss.backward()
        sums["loss"] += 8 * loss.item()
        sums["grad_norm"] += torch.nn.utils.clip_grad_norm_(naive.parameters(), 0.5).item()
        optimizer.step()
        optimizer.zero_grad()
    for a, b, start in zip(ours.parameters(), naive.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert (a - start).abs().max() > 1e-3  # both have moved
    for name in sums:  # of 8 completions, as a mean over 2 iterations
        assert row_sums[name] == pytest.approx(sums[name] / 2, rel=1e-4), name
    assert row_sums["sampling_gap"] == pytest.approx(8 * 0.5, abs=1e-3)


def test_the_readmes_group_worked_by_hand():
    advantages = cppo.group_advantages(torch.tensor([[3.0, 1.0, 0.0, 0.0]], dtype=F64))
    mask = cppo.prune(advantages, config(group_size=4, pruning_rate=0.5).num_kept)
    assert mask.tolist() == [[True, False, True, False]]
    readme = (ROOT / "README.md").read_text()
    for i, (r, A) in enumerate(zip((3, 1, 0, 0), advantages[0].tolist(), strict=True), 1):
        assert f"| $o_{i}$ | {r} | {r - 1} | {A:.4f} |".replace("0.0000", "0") in readme
    A, rho = advantages[mask], torch.tensor([1.3, 0.7], dtype=F64)
    old = torch.full((2, 5), -0.7, dtype=F64)  # any log-probabilities, any length
    new, tokens = old + rho.log()[:, None], torch.ones(2, 5, dtype=torch.bool)
    first, _ = cppo.cppo_loss(old, old, old, A, tokens, 0.2, 0.04)
    second, statistics = cppo.cppo_loss(new, old, old, A, tokens, 0.2, 0.04)
    unclipped, clipped = rho * A, rho.clamp(0.8, 1.2) * A
    columns = [first, unclipped, clipped, torch.minimum(unclipped, clipped)]
    for i, row in zip((1, 3), torch.stack([*columns, statistics["kl"], second], 1), strict=True):
        assert f"| $o_{i}$ | {' | '.join(f'{x:.4f}' for x in row)} |" in readme
    assert f"| mean over N = 2 | {first.mean():.4f} | | | | | {second.mean():.4f} |" in readme


def test_a_steps_numbers_by_hand(monkeypatch):
    settings = config(group_size=4, pruning_rate=0.75)
    draw = fake_draw(lambda i: [[1.5, 1.5, 1.5, 0], [2, 2, 2, 2], [0, 0, 0, 0]][i])
    rows, sampled, rounds = cppo.collect_batch(draw, itertools.count(), 3, settings)
    row_sums = Counter(loss=4.0, kl=1.0, clip_fraction=0.5, sampling_gap=0.25, grad_norm=3.0)
    counts = {"questions": 3, "sampled": 12, "kept": 3, "dead_groups": 2, "refill_rounds": 1,
              "sampled_tokens": 24, "trained_tokens": 6}  # fmt: skip
    # the lone 0: mean 1.125, std 0.75, A = -1.5; in the groups of equal rewards A = 0
    averages = {
        "reward": 12.5 / 12, "accuracy": 7 / 12, "format": 0, "truncated": 0, "loss": 4 / 3,
        "abs_advantage_kept": pytest.approx(1.5 / 3, abs=1e-3), "completion_tokens": 2, "kl": 1 / 3,
        "clip_fraction": 0.5 / 3, "sampling_gap": 0.25 / 3, "grad_norm": 3, "entropy": 0.75,
    }  # fmt: skip
    assert cppo.step_metrics(rows, sampled, rounds, row_sums, settings) == counts | averages
    nothing = cppo.step_metrics([], sampled, 4, Counter(grad_norm=0.0), settings)
    assert nothing["loss"] is nothing["abs_advantage_kept"] is nothing["grad_norm"] is None
    monkeypatch.setattr(cppo, "over_ranks", lambda own: [own, own])
    twice = {name: 2 * count for name, count in counts.items()}
    assert cppo.step_metrics(rows, sampled, rounds, row_sums, settings) == twice | averages


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """What each of two ranks has written in worker()."""
    folder = tmp_path_factory.mktemp("ranks")
    run("--worker", folder, ranks=2, script=[__file__])
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_update_gives_the_same_gradient_on_two_ranks_with_unequal_rows_or_none(two_ranks):
    want = gradients_of_update(some_rows(12))
    for got in itertools.chain(*(rank["gradients"] for rank in two_ranks)):
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_two_ranks_that_hold_half_of_adamws_state_move_as_if_both_had_all_bit_for_bit(two_ranks):
    start = [*tiny("Llama").parameters()]
    size = 2 * sum(p.numel() for p in start)  # of AdamW's two moments
    for p, *moved in zip(start, *two_ranks[0]["weights"], *two_ranks[1]["weights"], strict=True):
        assert all(torch.equal(moved[0], x) for x in moved) and not torch.equal(p, moved[0])
    (ours, all_1), (other, all_2) = (rank["held"] for rank in two_ranks)
    assert all_1 == all_2 == size == ours + other and 0.45 * size < ours < 0.55 * size


def worker(folder: str):
    """One of two ranks: its share of the rows, in micro-batches of its own size."""
    cppo.init_distributed()
    own = {"tokens_per_microbatch": 15 + 20 * cppo.RANK}
    found = {"gradients": [], "weights": [], "held": []}
    for first in (5, 12, 1):  # of 12 rows, so many are the first rank's
        rows = [some_rows(12)[:first], some_rows(12)[first:]][cppo.RANK]
        found["gradients"].append(gradients_of_update(rows, ddp=True, **own))
    plain = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0, fused=True)
    for make in (adamw, lambda policy: plain(policy.parameters())):
        learner = learner_of(tiny("Llama"), make, tiny("Llama"), ddp=True)
        for _ in range(2):
            cppo.update(learner, some_rows(12)[cppo.RANK :: 2], 12, config(**own))
        found["weights"].append([p.detach() for p in learner.model.parameters()])
        held = getattr(learner.optimizer, "optim", learner.optimizer).state.values()  # ZeRO: .optim
        found["held"].append(sum(s[m].numel() for s in held for m in ("exp_avg", "exp_avg_sq")))
    torch.save(found, Path(folder, f"{cppo.RANK}.pt"))
    os._exit(0)  # Python's own way out may wait for the other rank for ever


@pytest.mark.parametrize("ranks", [1, 2])  # with two there are gradients of 0, with one none
def test_update_without_rows_leaves_the_weights_alone_even_with_momentum(ranks, monkeypatch):
    learner = learner_of(tiny("Llama"), adamw, tiny("Llama"))
    monkeypatch.setattr(cppo, "WORLD_SIZE", ranks)
    cppo.update(learner, some_rows(4), 4, config())
    before = copy.deepcopy(learner.model.state_dict())
    assert {*cppo.update(learner, [], 0, config()).values()} == {0}
    assert all(torch.equal(before[name], x) for name, x in learner.model.state_dict().items())
    assert learner.scheduler.last_epoch == 4  # the schedule goes on


# --- Precision ------------------------------------------------------------------------------------
def test_bfloat16_computes_nearly_the_float32_gradient():
    gradients = (gradients_of_update(some_rows(12), dtype=d) for d in ("float32", "bfloat16"))
    exact, rounded = (torch.cat([g.flatten() for g in each]) for each in gradients)
    assert not torch.equal(exact, rounded)  # it does round
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_copies_the_policy_rounded_to_the_sampler_not_to_the_reference(dtype, monkeypatch):
    model, start = tiny("Qwen2"), tiny("Qwen2")
    new = cppo.Run(None, None, {"step": 0}, model, None, [], [])
    learner = cppo.make_learner(new, model, 8, config(dtype=str(dtype).removeprefix("torch.")))
    assert (learner.sampler is model) == (dtype == torch.float32)
    model.load_state_dict({name: x + 1 for name, x in model.state_dict().items()})
    monkeypatch.setattr(cppo, "collect_batch", lambda *_: ([], [], 1))
    monkeypatch.setattr(cppo, "step_metrics", lambda *_: {})
    cppo.cppo_step(learner, None, iter(()), config())
    for copied, original in ((learner.sampler, model), (learner.reference, start)):
        for a, b in zip(copied.parameters(), original.parameters(), strict=True):
            assert torch.equal(a, b.to(dtype)) and a.requires_grad == (copied is model)
        ours, theirs = (m.model.rotary_emb.inv_freq for m in (copied, original))
        assert torch.equal(ours, theirs) and ours.dtype == torch.float32  # else RoPE goes wrong


# --- Tasks ----------------------------------------------------------------------------------------
def test_no_test_sum_is_a_training_sum_not_even_turned_round():
    train, test = (cppo.arithmetic_questions(None, split) for split in ("train", "test"))
    assert len({frozenset(q.prompt[:-1].split("+")) for q in train + test}) == len(train) + 512
    assert all(int(q.prompt[:2]) + int(q.prompt[3:5]) == int(q.answer) for q in train + test)
    tens_end_the_steps = r"=(\d+)</think>\n<answer>\1\d</answer>"
    assert all(re.search(tens_end_the_steps, q.demonstration) for q in train)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_questions_load_from_any_kind_of_file(kind, tmp_path):
    answers = ["48/2 = <<48/2=24>>24 clips.\n24+48 = <<24+48=72>>72.\n#### 72", "1,234", "0"]
    table = datasets.Dataset.from_list([{"question": "How many?", "answer": a} for a in answers])
    file = str(tmp_path / f"data[1].{kind}")  # a name, and no pattern
    how = {"lines": False} if kind == "json" else {}  # one list
    getattr(table, f"to_{kind.removesuffix('l')}")(file, **how)
    questions = cppo.TASKS["gsm8k"].questions(file, "train")
    assert questions[0].prompt[1] == {"role": "user", "content": "How many?"}
    assert [q.answer for q in questions] == ["72", "1,234", "0"]
    assert questions[0].demonstration.startswith("<think>48/2 = 24 clips.\n24+48 = 72.</think>\n")
    assert questions[2].demonstration == "<think></think>\n<answer>0</answer>"


def test_math_questions_take_the_answer_or_what_the_solution_boxes(tmp_path):
    tables = {
        "1": {"problem": "a", "solution": r"So $\boxed{9}$.", "answer": "1"},
        r"\frac{1}{2}": {"problem": "a", "solution": r"$\boxed{2}, \boxed{\frac{1}{2}}$"},
        "27": {"question": "a", "answer": r"Thus $\boxed{27}$."},
        "8": {"question": "a", "solution": "2 + 6\n#### 8"},
    }
    for answer, row in tables.items():
        (tmp_path / "data.jsonl").write_text(json.dumps(row))
        (question,) = cppo.TASKS["math"].questions(str(tmp_path / "data.jsonl"), "test")
        assert question.answer == cppo.boxed(question.demonstration) == answer
        assert question.prompt[1]["content"] == "a" and cppo.format_reward(question.demonstration)
    assert "final answer is: $\\boxed{ANSWER}$. I hope" in question.prompt[0]["content"]


def test_a_bad_data_file_is_refused_by_name_and_with_the_reason(tmp_path):
    for name, content, says in (
        ("a.csv", "question,answer\n", "it has no rows"), ("b.jsonl", "", "it has no rows"),
        ("c.csv", "question,answer\nHow many, then?,1\n", r"row 1: answer is \['1'\]"),
        ("d.csv", 'question,answer\n1+1,"2\n', "unexpected end of data"),
        ("e.jsonl", '{"question": "a", "answer": "1"}\n{"question": "b"}\n', "row 2 lacks"),
        ("f.jsonl", '{"problem": "a", "solution": "So it is 1."}\n', "row 1 lacks"),
        ("g.jsonl", '{"answer": "1"}\n', "row 1 lacks"), ("h.jsonl", '{"quest', "Unterminated"),
        ("i.parquet", "PAR1 half", "give a parquet"), ("rows", "a", "it is another kind of file"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"--train_data .*{name}.*{says}"):
            cppo.TASKS["gsm8k"].questions(str(tmp_path / name), "train")


def test_the_last_box_gives_what_it_holds_braces_in_pairs_or_none():
    for text, inside in (  # \} is no brace; in \\{ the \\ is a line break, and { is one
        (r"so $\boxed{42}$.", "42"), (r"\boxed{1} or \boxed{2}", "2"), (r"\boxed 5$ x", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}} }", r"\frac{1}{\sqrt{2}}"), (r"\fbox{ 3 }", "3"),
        (r"\boxed{x \}y}", r"x \}y"), (r"\boxed {7}", "7"), (r"\boxed{\\{ 1 \\ 2 }", None),
        (r"\boxed{1", None), ("42", None), (r"\boxed", None), (r"\boxed{ }", None),
    ):  # fmt: skip
        assert cppo.boxed(text) == inside, text


@pytest.fixture
def math_verify(tmp_path, monkeypatch):
    """A stand-in for the package, in a folder: it opens $\\boxed{}$, and knows that 1/2 is 0.5."""
    code = "parse = lambda latex: latex[8:-2]\nverify = lambda a, b: {a, b} == {'1/2', '0.5'}\n"
    (tmp_path / "math_verify.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    return str(tmp_path)


def test_the_math_reward_needs_its_package_and_is_2_for_equals(math_verify, tmp_path, monkeypatch):
    for text, answer, reward in (
        (r"\boxed{7}", "7", 2), (r"\boxed{0.5}", "1/2", 2), (r"\boxed{8}", "7", 0),
        ("7", "7", 0), (r"\boxed{}", "", 0), (r"\boxed{7} or \boxed{8}", "7", 0),
    ):  # fmt: skip
        assert cppo.math_reward(text, answer) == reward
    file = tmp_path / "data.jsonl"
    file.write_text('{"problem": "1 + 1", "answer": 2}\n')
    settings = Config(task="math", model="no/such", train_data=str(file), test_data=str(file))
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install math-verify"):
        cppo.train(settings)


def test_messages_go_through_the_chat_template_and_bos_is_added_where_no_template_has():
    _, tokenizer = cppo.tiny_model_and_tokenizer()
    bos = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    tokenizer.backend_tokenizer.post_processor = bos
    chat = [{"role": "system", "content": "1+"}, {"role": "user", "content": "2"}]
    plain, *others = Question(chat, "3"), Question(chat, "3"), Question("1+2=", "3")
    cppo.encode_questions([plain], tokenizer)
    assert tokenizer.decode(plain.prompt_ids) == "<pad>1+\n\n2\n\n"
    tokenizer.chat_template = "{{messages|join('', 'content')}}{{'=0' if add_generation_prompt}}"
    cppo.encode_questions(others, tokenizer)
    assert [tokenizer.decode(q.prompt_ids) for q in others] == ["1+2=0", "<pad>1+2="]
    tokenizer.chat_template = "{{ messages[1].content }}"  # and the system prompt?
    with pytest.raises(ValueError, match="it leaves out the first message"):
        cppo.encode_questions(others, tokenizer)


def test_an_epoch_asks_each_question_once_over_all_ranks_and_the_next_in_another_order(monkeypatch):
    monkeypatch.setattr(cppo, "WORLD_SIZE", 3)
    streams = [cppo.question_stream(range(10), 42) for _ in range(3)]

    def epoch():  # 10 cards, 3 players
        for rank, n in enumerate((4, 3, 3)):
            monkeypatch.setattr(cppo, "RANK", rank)
            yield from itertools.islice(streams[rank], n)

    first, second = [*epoch()], [*epoch()]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


# --- Models ---------------------------------------------------------------------------------------
def test_a_folder_loads_as_it_was_saved_and_any_of_its_eos_tokens_ends_a_completion(tmp_path):
    folder = save_tiny_model(tmp_path)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    for ids, want in ((None, [1]), (7, [1, 7]), ([1, 8], [1, 8])):
        settings = {"eos_token_id": ids, "temperature": 0.6}  # some are like that
        (folder / "generation_config.json").write_text(json.dumps(settings))
        model, tokenizer = cppo.load_model_and_tokenizer(folder, "")
        assert model.generation_config.eos_token_id == want and not model.training
        assert all(model.state_dict()[name].equal(tensor) for name, tensor in weights.items())
        assert tokenizer.decode(tokenizer(FORM).input_ids) == FORM
        model.save_pretrained(tmp_path / "saved")  # would refuse a temperature without sampling


def test_what_a_model_folder_lacks_is_said_and_its_own_code_is_not_run(tmp_path, monkeypatch):
    def refused(says):
        with pytest.raises(UserError, match=f"^this is to blame: .*{says}"):
            cppo.load_model_and_tokenizer(folder, "this is to blame")

    folder = save_tiny_model(tmp_path / "folder")
    _, tokenizer = cppo.tiny_model_and_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    refused("no EOS token")
    weights = safetensors.torch.load_file(file := folder / "model.safetensors")
    inf = {"model.norm.weight": weights.pop("model.norm.weight") / 0}  # weights lack it
    lacks = r"it lacks weights: .*'model\.norm\.w"
    for some, says in ((weights, lacks), (weights | inf, "are inf or nan")):
        safetensors.torch.save_file(some, file, {"format": "pt"})
        refused(says)
    tiny("Qwen2").save_pretrained(folder)  # its config has the tokenizer read as Qwen2's class
    refused("its tokenizer does not give back '<think>1 2<")
    folder = save_tiny_model(tmp_path / "code")
    (folder / "config.json").write_text('{"model_type": "m", "auto_map": {"AutoConfig": "mine.M"}}')
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda _: "y")  # if it asks whether to
    refused("")
    assert not (tmp_path / "hacked").exists()


# --- Evaluation -----------------------------------------------------------------------------------
def test_evaluation_scores_every_question_once_and_averages_over_the_samples(monkeypatch):
    test, calls = [Question(str(i), "") for i in range(37)], []

    def rollout(_model, _tokenizer, questions, _config, n, temperature, top_p):
        calls.append((len(questions), n, temperature, top_p, torch.rand(1).item()))
        right = [int(q.prompt) % 3 > 0 and i == 0 for q in questions for i in range(n)]
        return [Completion([], [], accuracy_reward=1.5 * x) for x in right]

    monkeypatch.setattr(cppo, "rollout", rollout)
    for n in (1, 4):
        score = cppo.evaluate(None, None, test, config(eval_samples=n))
        assert score["eval_questions"] == 37 and score["eval_accuracy"] == 24 / 37 / n
    monkeypatch.setattr(cppo, "WORLD_SIZE", 3)
    for rank in range(3):
        monkeypatch.setattr(cppo, "RANK", rank)
        cppo.evaluate(None, None, test, config())
    assert [call[:4] for call in calls[:2]] == [(37, 1, 0.0, 1.0), (37, 4, 0.6, 0.95)]
    assert [call[0] for call in calls[2:]] == [13, 12, 12]
    assert calls[0][4] == calls[2][4] != calls[3][4]  # each evaluation draws its rank's numbers


# --- Checkpoints ----------------------------------------------------------------------------------
def save(folder: Path, step: int, **changes):
    (folder / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
    model, tokenizer = cppo.tiny_model_and_tokenizer()
    state = {"step": step, "asked": [8 * step], "seconds": 0.0, "questions_hash": ""}
    state["config"] = asdict(config(**changes)) | {"ranks": 1}
    cppo.save_checkpoint(folder, learner_of(model), tokenizer, state)


def resumed(folder: Path, **changes) -> tuple[Path | None, dict]:
    return cppo.load_state(config(**{"resume": True, "output_dir": str(folder)} | changes))


def test_checkpoint_0_and_the_newest_2_stay_and_resume_wants_the_same_flags(tmp_path, monkeypatch):
    for step in (0, 2, 4, 10):
        save(tmp_path, step)
    assert [int(path.name[11:]) for path in cppo.find_checkpoints(tmp_path)] == [0, 4, 10]
    path, state = resumed(tmp_path, save_every=7, eval_every=3, sample_batch=99)
    assert state["step"] == 10 and path == tmp_path / "checkpoint-10"
    assert state["metrics"] == '{"step": 10}\n'
    with pytest.raises(UserError, match=r"--resume: beta was 0\.04 in that run and is now 0"):
        resumed(tmp_path, beta=0.0)
    monkeypatch.setattr(cppo, "WORLD_SIZE", 2)
    with pytest.raises(UserError, match="--resume: ranks was 1 in that run and is now 2"):
        resumed(tmp_path)


def test_a_disk_that_is_full_while_it_saves_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    for step in (0, 1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"-3 cannot be .* 28"):
        patch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
        save(tmp_path, 3)
    path, state = resumed(tmp_path)
    assert state["step"] == 2
    cppo.load_model_and_tokenizer(path, "")
    save(tmp_path, 3)
    assert resumed(tmp_path)[1]["step"] == 3 and not any(tmp_path.glob("*.tmp"))


def test_a_checkpoint_is_read_without_running_what_its_pickle_says(tmp_path):
    save(tmp_path, 0)
    attack = type("Attack", (), {"__reduce__": lambda _: (os.mkdir, (str(tmp_path / "hacked"),))})
    torch.save({"asked": [attack()]}, tmp_path / "checkpoint-0/trainer_state.pt")
    with pytest.raises(UserError, match=r"-0/\w+\.pt cannot be read; delete that checkpoint"):
        resumed(tmp_path)
    assert not (tmp_path / "hacked").exists()


# --- Short runs in this process -------------------------------------------------------------------
SHORT = dict(warm_start_steps=0, batch_size=8, eval_questions=0, max_completion_tokens=4)


def test_with_gamma_and_after_a_resume_no_question_comes_twice(tmp_path, monkeypatch):
    asked, seeds, real, folder = [], [], cppo.rollout, tmp_path / "run"

    def rollout(*arguments, **how):
        asked.extend(arguments[2])
        seeds.append(torch.initial_seed())
        return real(*arguments, **how)

    monkeypatch.setattr(cppo, "rollout", rollout)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"st')  # left by a kill before checkpoint-0
    changes = dict(gamma=1e-3, save_every=1, steps=3, resume=True, max_prompt_tokens=6)
    settings = config(output_dir=str(folder), **changes, **SHORT)
    cppo.train(settings)
    shutil.rmtree(folder / "checkpoint-3")  # it was killed after step 2
    assert len(asked) == 3 * 16  # an untrained model earns 0: dead groups, so 4 rounds of 4
    del asked[2 * 16 :]
    cppo.train(settings)
    prompts = [question.prompt for question in asked]
    assert len(prompts) == 3 * 16 == len(set(prompts))
    assert len(set(seeds)) == 3 and seeds[8:12] == seeds[12:]  # step 3's 4 rounds, done twice
    assert [step["step"] for step in read_metrics(folder)] == [0, 1, 2, 3]


def test_a_run_whose_gradient_is_not_finite_says_the_step_and_what_to_lower(tmp_path, monkeypatch):
    real, calls = cppo.group_advantages, itertools.count(1)
    # At step 2 an advantage whose square, in the gradient's norm, is inf in float32.
    monkeypatch.setattr(cppo, "group_advantages", lambda r: real(r) + 1e30 * (next(calls) == 2))
    with pytest.raises(UserError, match="step 2: lower --learning_rate in a new run: the grad"):
        cppo.train(config(output_dir=str(tmp_path), steps=3, save_every=1, **SHORT))
    assert [m["step"] for m in read_metrics(tmp_path)] == [0, 1]
    cppo.load_model_and_tokenizer(tmp_path / "checkpoint-1", "")
    wild = dict(warm_start_steps=3, warm_start_learning_rate=1e15)  # rates 0 and 1e15, then nan
    with pytest.raises(UserError, match="lower --warm_start_learning_rate"):
        cppo.train(config(output_dir=str(tmp_path / "run"), **SHORT | wild))


def test_the_warm_start_steps_along_the_gradient_of_the_demonstrations_log_likelihood(monkeypatch):
    model, tokenizer = cppo.load_model_and_tokenizer(None, "")
    questions = cppo.arithmetic_questions(None, "train")[:32]
    cppo.encode_questions(questions, tokenizer)
    start, naive = copy.deepcopy(model), copy.deepcopy(model)
    learner = learner_of(model)
    monkeypatch.setattr(cppo, "make_optimizer", lambda *_: (learner.optimizer, learner.scheduler))
    cppo.warm_start(model, model, iter(questions), config(warm_start_steps=1, max_grad_norm=1e9))
    for q in questions:  # a mean over a demonstration's tokens, then over demonstrations
        row = Completion(q.prompt_ids, q.demonstration_ids)
        (-naive_log_probs(naive, row, 1.0).mean() / 32).backward()
    for a, b, c in zip(*(m.parameters() for m in (start, model, naive)), strict=True):
        torch.testing.assert_close(a - b, c.grad, rtol=1e-4, atol=1e-5)


# --- What people report of such programs ---------------------------------------------------------
def scored(monkeypatch, tokenizer, question, *completions) -> list[Completion]:
    model, _ = cppo.load_model_and_tokenizer(None, "")
    cppo.encode_questions([question], tokenizer)
    monkeypatch.setattr(cppo, "sample_completions", lambda *_: completions)
    return cppo.rollout(model, tokenizer, [question], config(), len(completions), 1.0)


def test_tags_that_are_special_tokens_are_scored_and_only_the_last_eos_is_left_out(monkeypatch):
    _, tokenizer = cppo.tiny_model_and_tokenizer()
    tokenizer.add_tokens(list(cppo.TAGS), special_tokens=True)
    ids = tokenizer(FORM).input_ids
    ends = Completion([], [*ids, 1]), Completion([], ids, truncated=True), Completion([], [0, 8, 1])
    got = scored(monkeypatch, tokenizer, Question("1+2=", "3"), *ends)
    assert [(c.text, c.reward) for c in got] == [(FORM, 3), (FORM, 3), ("<pad>+", 0)]


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", ""])
@pytest.mark.parametrize("template", [None, "{{ messages[0].content + %r }}"])
def test_a_think_that_ends_the_prompt_is_scored_and_not_taught(opening, template, monkeypatch):
    _, tokenizer = cppo.tiny_model_and_tokenizer()
    question = Question(f"<think>1+2={opening}", "3", FORM)  # the first <think> is no end
    if template:
        tokenizer.chat_template = template % opening
        question.prompt = [{"role": "user", "content": "<think>1+2="}]
    rest = FORM.removeprefix(opening.strip())
    (c,) = scored(monkeypatch, tokenizer, question, Completion([], [*tokenizer(rest).input_ids, 1]))
    assert (c.text, c.reward) == (opening + rest, 3)
    assert tokenizer.decode(question.demonstration_ids) == rest + "<eos>"


def test_a_reward_is_a_finite_number_or_one_line_names_task_answer_and_value(monkeypatch):
    def reward(value):
        _, tokenizer = cppo.tiny_model_and_tokenizer()
        monkeypatch.setattr(cppo.TASKS["arithmetic"], "answer_reward", lambda *_: value)
        return scored(monkeypatch, tokenizer, Question("", "3"), Completion([], [1]))[0].reward

    for value in (1, True, torch.ones(1).numpy()[0], torch.tensor(1.0)):
        assert json.dumps(reward(value)) == "1.0"
    for value in (math.nan, None, "x", math.inf, 10**400, torch.tensor(math.nan)):
        says = f"--task arithmetic: its reward is {value!r} for the answer '3': "
        with pytest.raises(UserError, match=f"^{re.escape(says)}.*$"):  # $: it is one line
            reward(value)


def test_the_kl_of_nearly_equal_policies_is_not_lost_to_rounding_in_float32():
    now, how = torch.zeros(1, 2), (torch.zeros(1), torch.ones(1, 2).bool(), 0.2, 0.04)
    losses, means = cppo.cppo_loss(now, now, now + 1e-4, *how)  # x = 1e-4: KL = x^2 / 2
    assert [losses.item(), means["kl"].item()] == pytest.approx([2e-10, 5e-9], rel=0.01, abs=0)


def test_a_model_whose_cache_is_not_understood_is_refused_also_to_evaluate(monkeypatch):
    _, tokenizer = cppo.load_model_and_tokenizer(None, "")
    model = tiny("Mamba")
    model.generation_config.eos_token_id = [1]
    monkeypatch.setattr(cppo, "load_model_and_tokenizer", lambda *_: (model, tokenizer))
    with pytest.raises(UserError, match="--model m: this kind of model cannot be sampled"):
        cppo.set_up(config(model="m", eval_only=True, eval_questions=1))


def test_N_counts_the_rows_of_all_ranks_and_the_wait_for_them_is_not_training_time(monkeypatch):
    clock, given = Counter(), {}

    def fake(name, takes, result):
        def function(*arguments):
            clock["now"] += takes
            given[name] = arguments
            return result

        monkeypatch.setattr(cppo, name, function)

    monkeypatch.setattr(cppo.time, "perf_counter", lambda: clock["now"])
    fake("collect_batch", 1, (["a row"] * 3, [], 1))
    fake("over_ranks", 100, [3, 4])
    fake("update", 10, None)
    fake("step_metrics", 1000, {})
    metrics, _ = cppo.cppo_step(learner_of(tiny("Llama")), None, iter(()), config())
    assert given["over_ranks"] == (3,) and given["update"][1:3] == (["a row"] * 3, 7)
    assert metrics == {"sample_seconds": 101, "train_seconds": 10, "step_seconds": 111}


def test_a_cell_is_text_or_a_number_without_exponent_and_files_are_told_by_suffix(tmp_path):
    def read(*answers, file="a.jsonl"):
        text = "\n".join(json.dumps({"question": "q", "answer": answer}) for answer in answers)
        if "csv" in file.lower():
            text = "question,answer\n" + "".join(f"q,{answer}\n" for answer in answers)
        (tmp_path / file).write_text(text, "utf-8-sig")
        return [q.answer for q in cppo.table_questions("", "{}", str(tmp_path / file), "train")]

    numbers = 1e16, 0.5, 2, 1e-7, 72.0, 123456789012345678901234567890
    same = ["10000000000000000", "0.5", "2", "0.0000001", "72", "123456789012345678901234567890"]
    assert read(*numbers) == same
    for answer in ([1], {"a": 1}, True, math.nan, math.inf):
        with pytest.raises(UserError, match=r"row 1: answer is .*neither text nor a finite number"):
            read(answer)
    texts = ["NA", "None", "null", "nan", "3", "007", "1e5", "true", "2.50", "2020-01-01"]
    for file in ("DATA.JSONL", "a*b.jsonl", "train.CSV"):
        assert read(*texts, file=file) == texts


def test_prompts_and_completions_must_fit():
    for family, vocabulary, eos, prompt, most, end, says in (
        ("GPT2", 13, 1, "1+2=", 60, "", ""), ("GPT2", 20, 1, "1+2=", 61, "", "65 tokens need more"),
        ("Llama", 12, 1, "1+2=", 60, "", "token 12 is not in its embedding of 12"),
        ("Llama", 20, 99, "1+2=", 60, "", "token 99 is not in its embedding of 20"),
        ("Llama", 20, 1, "", 60, "", "or leaves them empty"),
        ("Llama", 20, 1, "1+2=", 60, " <eos>", "ends prompts with EOS"),
    ):  # fmt: skip
        model, (_, tokenizer) = tiny(family, vocabulary), cppo.tiny_model_and_tokenizer()
        model.generation_config.eos_token_id = [1, eos]
        template = processors.TemplateProcessing("$A" + end, None, [("<eos>", 1)])
        tokenizer.backend_tokenizer.post_processor = template
        questions, settings = [Question(prompt, "3")], config(model="m", max_completion_tokens=most)
        cppo.encode_questions(questions, tokenizer)
        with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
            cppo.check_fit(model, tokenizer, questions, settings)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    settings = config(output_dir=str(tmp_path_factory.mktemp("run")), steps=1, resume=True, **SHORT)
    cppo.train(settings)
    return settings


@pytest.mark.parametrize("damage", [Path.unlink, functools.partial(os.truncate, length=99)])
def test_a_damaged_part_of_a_checkpoint_is_blamed_on_that_checkpoint(damage, one_step, tmp_path):
    parts = "0/model.safetensors 1/model.safetensors 1/config.json 1/tokenizer.json"
    for part in f"{parts} 1/trainer_state.pt 1/optimizer-0.pt".split():
        folder = shutil.copytree(one_step.output_dir, tmp_path / part)
        damage(folder / f"checkpoint-{part}")
        with pytest.raises(UserError, match=rf"^--resume: {folder}/checkpoint-{part[0]}") as error:
            cppo.train(replace(one_step, output_dir=str(folder)))
        assert "--model" not in str(error.value)


def test_resume_refuses_a_folder_in_use_and_changed_questions(one_step, monkeypatch):
    metrics = Path(one_step.output_dir, "metrics.jsonl")
    before = metrics.read_text()
    cppo.train(one_step)  # there is nothing left to do
    with open(metrics.with_name("lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="in use by another process"):
            cppo.train(one_step)
    changed = [Question("1+2=", "4")] * 99
    monkeypatch.setattr(cppo.TASKS["arithmetic"], "questions", lambda *_: changed)
    with pytest.raises(UserError, match="--resume: the questions are not those"):
        cppo.train(one_step)
    assert metrics.read_text() == before


# --- Exercises that cppo.py does not answer, and what their graders must catch --------------------
def extension(name: str):
    """A function that a student has added."""
    if not hasattr(cppo, name):
        absent = pytest.fail if student else pytest.skip
        absent(f"an exercise: write {name} in mine.py and set CPPO_MODULE=mine")
    return getattr(cppo, name)


def test_max_variance_keeps_the_k_rewards_of_a_question_that_differ_most():
    choose = extension("max_variance")
    torch.manual_seed(0)
    rewards = torch.tensor([0.0, 1.0, 1.5, 2.5, 3.0])[torch.randint(5, (40, 8))]
    for k in (1, 2, 3, 5, 8):
        mask = choose(rewards, k)
        assert mask.dtype == torch.bool and mask.shape == (40, 8), "a mask: True for what stays"
        assert mask.sum(1).tolist() == [k] * 40, "k stay of each question"
        for row, kept_row in zip(rewards, mask, strict=True):
            best = max(map(statistics.pvariance, itertools.combinations(row.tolist(), k)))
            got = statistics.pvariance(row[kept_row].tolist())
            lesson = f"of {row.tolist()} the {k} with most variance, {best:.3f}, not {got:.3f}"
            assert got == pytest.approx(best), f"{lesson}: i lowest, k - i highest, for the best i"


def test_clip_higher_lifts_the_upper_bound_alone():
    loss = extension("clip_higher_loss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cppo, "cppo_loss", lambda *how: loss(*how, 0.28))
        for ratio, advantage, want, why in (
            (1.25, 1.0, -1.25, "what does better may rise up to 1 + eps_high"),
            (1.5, 1.0, -1.28, "above 1 + eps_high it is held"),
            (0.75, -1.0, 0.9, "the lower bound stays 1 - eps: what does worse must not vanish"),
        ):
            got = loss_of(ratio, advantage, eps=0.1)[0]
            assert got == pytest.approx(want), f"rho {ratio}, A {advantage}: {why}"
        # With eps_high = eps all that is true of cppo_loss is true of it.
        patch.setattr(cppo, "cppo_loss", lambda *how: loss(*how, how[5]))
        test_the_clipped_loss_and_its_gradient_by_hand()
        test_the_kl_term_of_the_loss_and_its_gradient_by_hand()
        test_the_loss_averages_over_a_completions_own_tokens_and_leaves_completions_to_the_caller()


def test_dr_grpo_divides_neither_by_the_std_nor_by_the_length():
    rewards = torch.tensor([[3.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=F64)
    got = extension("dr_grpo_advantages")(rewards)
    close(got, [[2, 0, -1, -1], [0] * 4], "A = r - mean(r), of each question's G, and no more")
    values = torch.tensor([[4.0, 9.0, 9.0], [1.0, 2.0, 3.0]], dtype=F64)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    for most in (8, 32):
        got = extension("dr_grpo_token_mean")(values, mask, most)
        close(got, [4 / most, 6 / most], "a sum over own tokens / max_tokens, the same for all")


def test_dppo_weighs_what_it_keeps_so_that_the_mean_over_draws_is_as_if_all_were_kept():
    choose = extension("dppo_weights")
    torch.manual_seed(0)
    A = torch.tensor([[2.0, -0.4, -0.5, -1.1], [1.0, -1.0, 0.5, -0.5]], dtype=F64)
    draws = choose(A.repeat(8000, 1), 2).view(8000, 2, 4)  # of each question 8,000
    stays = (draws > 0).double()
    share = stays.mean(0)
    assert ((draws == 0) | (draws >= 1)).all(), "0 for what is dropped, 1 / p_i for what is kept"
    order = share.gather(1, A.abs().argsort(dim=1))  # the smallest |A| first
    lesson = "p_i is larger where |A_i| is, of each question's own"
    assert (order[0].diff() > 0.02).all() and (order[1, 2:] > order[1, :2] + 0.02).all(), lesson
    assert (share.sum(1) - 2).abs().max() < 0.1, "about k of a question's G stay"
    # E[weight] = 1: then the mean of weight x loss is the unpruned loss, whatever the loss is.
    error = (draws.mean(0) - 1).abs() / draws.std(0).clamp(min=1e-3) * 8000**0.5
    lesson = "divided by p_i, every weight's mean over many draws is 1: no loss is biased"
    assert (error < 5).all() and (draws.mean(0) - 1).abs().max() < 0.1, lesson


def edited(function: str, changes: dict[str, str]):
    """cppo.py's function, with pieces of its text replaced."""
    text = inspect.getsource(RIGHT[function])
    for old, new in changes.items():
        assert text.count(old) == 1, f"{function} has changed: where is {old!r}?"
        text = text.replace(old, new)
    scope = dict(RIGHT)
    exec(text, scope)
    return scope[function]


def slow_max_variance(rewards_QG, k):
    choices = torch.tensor([*itertools.combinations(range(rewards_QG.shape[1]), k)])  # (ways, k)
    best = choices[rewards_QG[:, choices].var(-1, correction=0).argmax(1)]  # (Q, k)
    return torch.zeros_like(rewards_QG, dtype=torch.bool).scatter(1, best, True)


def dppo_weights(advantages, k, divide=True):
    """Kept with p = k |A| / sum |A|, at most 1."""
    size = advantages.abs() + 1e-6
    p = (k * size / size.sum(1, keepdim=True)).clamp(max=1)
    return (torch.rand_like(p) < p) / (p if divide else 1)


HIGH = {"beta):": "beta, high):"}  # cppo_loss with DAPO's parameter, which UPPER then uses
UPPER = {"1 + clip_eps": "1 + high"}
NO_KL_GRADIENT = {"ref_log_probs - log_probs": "ref_log_probs - log_probs.detach()"}
SOLVED = RIGHT | {
    "max_variance": slow_max_variance, "clip_higher_loss": edited("cppo_loss", HIGH | UPPER),
    "dr_grpo_advantages": lambda r: r - r.mean(dim=1, keepdim=True),
    "dr_grpo_token_mean": lambda v, m, most: (v * m).sum(dim=1) / most,
    "dppo_weights": dppo_weights,
}  # fmt: skip
MISTAKES = [  # function, a plausible one or an edit that makes it, what its graders must say
    ("extract_answer", lambda t: t.partition("<answer>")[2].partition("</answer>")[0],
     "the last answer counts"),
    ("extract_answer", lambda t: (re.findall(r"<answer>\s*(\d+)", t) or [None])[-1],
     "sign and letters"),
    ("extract_answer", lambda t: t.split("<answer>")[-1].split("</answer>")[0].strip(),
     "no answer is None"),
    ("group_advantages", lambda r: (r - r.mean()) / (r.std() + 1e-4), "each question's own"),
    ("group_advantages", lambda r: (r - r.mean(1)[:, None]) / (r.std(1, False)[:, None] + 1e-4),
     "over G - 1"),
    ("group_advantages", lambda r: (r - r.mean(1)[:, None]) / r.std(1)[:, None], "teach nothing"),
    ("prune", {'"abs_advantage": abs_QG': '"abs_advantage": advantages_QG'}, "not A: the worst"),
    ("prune", lambda a, k, **_: RIGHT["prune"](a.view(1, -1), k * len(a)).view_as(a), "keeps k"),
    ("prune", lambda a, k, **_: RIGHT["prune"](a.flip(1), k).flip(1), "the first"),
    ("make_batch", {"torch.arange(C) < length":
     "torch.tensor([(r.token_ids + [0] * C)[:C] for r in rows]) != 0"}, "EOS is trained"),
    ("make_batch", {"arange(C) < length": "arange(C) < C + 0 * length"}, "padding is no"),
    ("make_batch", {"arange(T) + 1": "arange(T)"}, "predict the next one"),
    ("cppo_loss", {"torch.minimum(unclipped, clipped)": "clipped"}, "min leaves it free"),
    ("cppo_loss", {"beta * kl, mask)": "beta * kl, torch.ones_like(mask))"}, "padding left out"),
    ("cppo_loss", NO_KL_GRADIENT, "its gradient flows through"),
    ("collect_batch", {"(room - len(kept)) // k": "room // G"}, "takes 4 questions"),
    ("collect_batch", {"advantages_QG.flatten()": "advantages_QG.masked_scatter(keep_QG, "
     "group_advantages(rewards.view(Q, G)[keep_QG].view(Q, k))).flatten()"}, "before any is"),
    ("collect_batch", {"rounds < MAX_REFILL_ROUNDS": "rounds < 1"}, "round after round"),
    ("max_variance", lambda r, k: RIGHT["prune"](RIGHT["group_advantages"](r), k), "most variance"),
    ("max_variance", lambda r, k: RIGHT["prune"](r, k, by="advantage"), "most variance"),
    ("max_variance", lambda r, k: RIGHT["prune"](r, k - k // 2, by="advantage")
     | RIGHT["prune"](-r, k // 2, by="advantage"), "for the best i"),
    ("clip_higher_loss", edited("cppo_loss", HIGH), r"rise up to 1 \+ eps_high"),
    ("clip_higher_loss", edited("cppo_loss", HIGH | UPPER | {"1 - clip_eps": "1 - high"}),
     "the lower bound stays"),
    ("clip_higher_loss", edited("cppo_loss", HIGH | UPPER | NO_KL_GRADIENT), "its gradient flows"),
    ("dr_grpo_advantages", RIGHT["group_advantages"], "and no more"),
    ("dr_grpo_advantages", lambda r: r - r.mean(), "each question's G"),
    ("dr_grpo_token_mean", lambda v, m, most: RIGHT["token_mean"](v, m), "max_tokens"),
    ("dr_grpo_token_mean", lambda v, m, most: (v * m).sum(1) / m.shape[1], "the same for all"),
    ("dppo_weights", lambda a, k: RIGHT["prune"](a, k).double(), "larger where"),
    ("dppo_weights", lambda a, k: dppo_weights(a, k, divide=False), "divided by p_i"),
    ("dppo_weights", lambda a, k: dppo_weights(a.flatten()[None], k * len(a)).view_as(a),
     "question's G"),
]  # fmt: skip


def grade(function: str):
    """Runs the tests that -k finds by the exercise's word, but for those of whole jobs."""
    word = EXERCISES[function]
    for name, test in globals().copy().items():
        is_found = name.startswith("test_") and (word in name or word in vars(test))
        if is_found and not test.__code__.co_argcount:  # those want fixtures
            test()


@pytest.mark.parametrize("function", EXERCISES)
def test_the_graders_say_what_plausible_mistakes_overlook(function, monkeypatch):
    for name in EXERCISES:
        monkeypatch.setattr(cppo, name, SOLVED[name], raising=False)
    grade(function)  # a right solution passes
    for mistake, lesson in (what for name, *what in MISTAKES if name == function):
        wrong = edited(function, mistake) if isinstance(mistake, dict) else mistake
        monkeypatch.setattr(cppo, function, wrong)
        with pytest.raises(AssertionError, match=lesson):
            grade(function)


# --- Whole runs, as a user runs them --------------------------------------------------------------
@pytest.mark.slow
@grades("answers", "advantages", "pruning", "masks", "loss", "refill")
def test_the_main_job_learns_to_carry(tmp_path):
    printed = run("--output_dir", tmp_path / "run")
    assert printed.startswith("cppo: arithmetic, 1 rank(s), cpu, float32")
    _, before, *steps, after = read_metrics(tmp_path / "run")
    assert 0.4 <= before["eval_accuracy"] <= 0.8 and after["eval_accuracy"] >= 0.97
    assert all(step["kept"] == 16 and step["sampled"] == 8 * 16 for step in steps)
    assert steps[0]["learning_rate"] == 0 and steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["epoch"] == 960 / 2560
    quarter = 1e-4 * (1 + math.cos(math.pi / 4))  # (39 x 2 - 24) / (240 - 24) of the way down
    assert steps[39]["learning_rate"] == pytest.approx(quarter)  # the cosine's
    assert max(step["sampling_gap"] for step in steps) < 1e-4
    for line in (f"{after['eval_accuracy']:.1%} of 512 test questions", "cppo: 960 questions, "):
        assert line in printed
    assert json.loads((tmp_path / "run/config.json").read_text())["pruning_rate"] == 0.875


@pytest.mark.slow
def test_a_model_folder_trains_on_a_file_and_is_evaluated(math_verify, tmp_path, capsys):
    file, folder = tmp_path / "a.jsonl", tmp_path / "run"
    model = save_tiny_model(tmp_path / "model")
    _, tokenizer = cppo.tiny_model_and_tokenizer()
    tokenizer.backend_tokenizer.model.unk_token = "<pad>"  # it reads any text
    tokenizer.save_pretrained(model)
    rows = [{"problem": f"{i} + {i}", "solution": f"So \\boxed{{{2 * i}}}"} for i in range(10, 22)]
    rows.append({"problem": 300 * "1", "solution": "#### 1"})  # over 800 with the system prompt
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = dict(task="math", model=str(model), test_data=str(file), output_dir=str(folder),
                    dtype="bfloat16", max_completion_tokens=8)  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    printed = run(
        *flags, "--train_data", file, "--batch_size", 8, "--group_size", 4, "--pruning_rate", 0.5,
        "--max_prompt_tokens", 800, "--warm_start_steps", 1, PYTHONPATH=math_verify,
    )  # fmt: skip
    assert "math, 1 rank(s), cpu, bfloat16; 1 prompts over --max_prompt_tokens" in printed
    _, before, *steps, after = read_metrics(folder)
    assert before["eval_questions"] == after["eval_questions"] == 13  # none is left out here
    assert [s["epoch"] for s in steps] == [1 / 3, 2 / 3, 1.0]  # --steps unset: one epoch
    assert all(0 < s["sampling_gap"] < 0.05 for s in steps)
    files = sorted(folder.rglob("*"))
    cppo.train(Config(**settings, eval_only=True, eval_samples=4))
    assert "% of 13 test questions right" in capsys.readouterr().out
    assert sorted(folder.rglob("*")) == files


@pytest.mark.slow
def test_the_readmes_own_task_learns_to_sort(tmp_path):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"(?s)```python\n(.*?)```", readme)
    (tmp_path / "sort_digits.py").write_text(code)
    script, folder = [str(tmp_path / "sort_digits.py")], tmp_path / "run"
    arguments = "--task", "sort", "--warm_start_steps", 200, "--steps", 12, "--output_dir", folder
    run(*arguments, script=script, PYTHONPATH=str(ROOT))
    _, before, *steps, after = read_metrics(folder)
    assert before["eval_accuracy"] < 0.4  # a little for a digit in its place is not right
    assert all(step["reward"] > step["format"] + 2 * step["accuracy"] for step in steps)  # it pays
    assert after["eval_accuracy"] > before["eval_accuracy"] + 0.15  # so soon


@pytest.mark.slow
def test_a_students_module_is_graded_in_place_of_cppo_py(tmp_path):
    readme = (ROOT / "README.md").read_text()
    code = readme[readme.index("    # mine.py\n") : readme.index("    CPPO_MODULE=mine pytest")]
    (tmp_path / "mine.py").write_text(code.replace("\n    ", "\n").strip() + "\n")
    mine = {"CPPO_MODULE": "mine", "PYTHONPATH": str(tmp_path)}
    command = "-m", "pytest", ROOT, "-p", "no:cacheprovider", "-k", "advantages and not slow"
    printed = run(*command, script=[], status=1, **mine)
    (says,) = re.findall(r"AssertionError: .*?(?= \.\.\.)", readme)
    assert says in printed


RUN = "--warm_start_steps 12 --steps 5 --save_every 1 --batch_size 32 --eval_questions 32".split()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """folder(ranks): where a run of RUN on that many ranks has written, which nobody disturbed."""

    @functools.cache
    def folder(ranks: int) -> Path:
        path = tmp_path_factory.mktemp("whole") / "run"
        run(*RUN, "--output_dir", path, ranks=ranks)
        return path

    return folder


def assert_equal_runs(a: Path, b: Path):
    """The same metrics but for the seconds, and the same weights, bit for bit; all batches full."""
    for one, other in zip(read_metrics(a), read_metrics(b), strict=True):
        assert one == (other | {k: v for k, v in one.items() if k.endswith("_seconds")})
    assert [m["step"] for m in read_metrics(b)] == [0, 0, 1, 2, 3, 4, 5, 5]
    assert all(m["kept"] == 32 and m["questions"] == 16 for m in read_metrics(b)[2:-1])
    for name in ("checkpoint-0", "checkpoint-4", "checkpoint-5"):
        weights = [(folder / name / "model.safetensors").read_bytes() for folder in (a, b)]
        assert weights[0] == weights[1]


def family_of(process: subprocess.Popen) -> list[int]:
    """Its process id and those of its descendants: torchrun's ranks, in sessions of their own."""
    everyone = [process.pid]
    for pid in everyone:
        listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True)
        everyone += map(int, listing.stdout.split())
    return everyone


def wait_for(process: subprocess.Popen, happened):
    """Returns once happened() is true, or the process has ended."""
    while process.poll() is None and not happened():
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_at_random_moments_resumes_bit_for_bit(ranks, whole_run, tmp_path):
    # CPPO_KILLS=20 pytest is the long form.
    kills, seed = int(os.environ.get("CPPO_KILLS", "2")), time.time_ns()
    print("seed", seed)  # shown if it fails
    rng = random.Random(seed)
    for i in range(kills):
        folder = tmp_path / str(i // 2)  # each run is killed, resumed, killed while it saves
        metrics, known, begun = folder / "metrics.jsonl", {*folder.glob("check*")}, time.time()
        process = start_process(*RUN, "--output_dir", folder, "--resume", ranks=ranks)
        # It is killed only once torch is imported and the run has begun.
        wait_for(process, lambda m=metrics, t=begun: m.exists() and m.stat().st_mtime > t)
        if i % 2:
            wait_for(process, lambda f=folder, k=known: {*f.glob("check*")} - k)
        everyone = family_of(process)
        time.sleep(rng.uniform(0, 0.02 if i % 2 else 1))
        print("kills", everyone, [path.name for path in folder.glob("*.tmp")])
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert process.wait(600) in (0, -signal.SIGKILL), process.communicate()  # not a crash
        if i % 2:
            run(*RUN, "--output_dir", folder, "--resume", ranks=ranks)
            assert_equal_runs(whole_run(ranks), folder)


@pytest.mark.slow
def test_run_multi_gpu_starts_again_by_itself_when_a_rank_dies(whole_run, tmp_path):
    folder = tmp_path / "run"
    process = start_process(*RUN, "--output_dir", folder, script=RUN_MULTI_GPU, NPROC="2")
    wait_for(process, (folder / "checkpoint-2").exists)
    ranks = [pid for pid in family_of(process) if pid != process.pid]
    os.kill(ranks[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.count("cppo: 5 steps, each with 16") == 2
    assert_equal_runs(whole_run(2), folder)


@pytest.mark.slow
@pytest.mark.skipif("CPPO_KILLS" not in os.environ, reason="only in the long form, CPPO_KILLS=20")
def test_two_machines_of_one_rank_do_what_one_machine_of_two_ranks_does(whole_run, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    machines = [
        start_process(
            *RUN, "--output_dir", tmp_path / "run", script=RUN_MULTI_GPU, NPROC="1", NNODES="2",
            NODE_RANK=str(i), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=600) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert_equal_runs(whole_run(2), tmp_path / "run")


if __name__ == "__main__" and sys.argv[1] == "--worker":
    worker(*sys.argv[2:])
elif __name__ == "__main__" and sys.argv.pop(1) == "--main":  # cppo.py with a student's functions
    cppo.main()
