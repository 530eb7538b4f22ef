"""What is true of cppo.py, one test a sentence. The order is that of the file.

pytest                      all of it
pytest -m "not slow"        without the runs of whole training jobs
pytest -k pruning           one part

CPPO_MODULE=mine pytest -k pruning      an exercise: mine.py stands in for parts of cppo.py
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.cache_utils import DynamicLayer

import cppo
from cppo import Completion, Config, Question, UserError

ROOT = Path(__file__).parent
F64 = torch.float64
SCRIPT = [str(ROOT / "cppo.py")]
RIGHT = dict(vars(cppo))
if student := os.environ.get("CPPO_MODULE"):
    written = {  # and not what it has imported
        name: value
        for name, value in vars(importlib.import_module(student)).items()
        if getattr(value, "__module__", "") == student
    }
    vars(cppo).update(written)
    SCRIPT = [str(ROOT / "test_cppo.py"), "--main"]  # real processes do the same


# An exercise is a word for -k, and the function that it asks for; the last three are new ones.
EXERCISES = {
    "answers": "extract_answer", "advantages": "group_advantages", "pruning": "prune",
    "masks": "make_batch", "loss": "cppo_loss", "refill": "collect_batch",
    "max_variance": "max_variance", "clip_higher": "clip_higher_loss",
    "dr_grpo": "dr_grpo_advantages",
}  # fmt: skip


if student and not {*EXERCISES.values(), "dr_grpo_token_mean"} & {*written}:
    raise ImportError(f"{student}.py has no function of {', '.join(EXERCISES.values())}")


def grades(*words: str):
    """Has -k find a test by these words too: pytest also looks at the attributes of a function."""

    def mark(test):
        vars(test).update(dict.fromkeys(words, True))
        return test

    return mark


# --- Helpers --------------------------------------------------------------------------------------
def tiny(family: str, vocabulary: int = 20):
    """A small random model of an architecture, with weights large enough to have opinions."""
    torch.manual_seed(7)
    size = dict(vocab_size=vocabulary, initializer_range=0.2, bos_token_id=None, eos_token_id=1)
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **size)
    else:
        classes = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
        config = getattr(transformers, classes.get(family, "GemmaConfig"))(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, pad_token_id=None, **size,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def some_rows(n: int, seed: int = 0, longest: int = 9) -> list[Completion]:
    """n rows with random tokens, lengths and advantages."""
    g = torch.Generator().manual_seed(seed)

    def ids(k):
        return torch.randint(2, 20, (k,), generator=g).tolist()

    def up_to(k):
        return int(torch.randint(1, k + 1, (1,), generator=g))

    return [
        Completion(ids(up_to(5)), ids(up_to(longest)), advantage=float(torch.randn(1, generator=g)))
        for _ in range(n)
    ]


def naive_log_probs(model, row: Completion, temperature: float) -> torch.Tensor:
    """log pi(o_t | q, o_<t), one row at a time, without padding."""
    logits = model(torch.tensor([row.prompt_ids + row.token_ids])).logits[0] / temperature
    start = len(row.prompt_ids)
    return torch.stack(
        [logits[start + t - 1].log_softmax(-1)[token] for t, token in enumerate(row.token_ids)]
    )


def config(**changes) -> Config:
    return Config(task="arithmetic", **changes)


def plain_sgd(model):
    """An optimizer whose step is minus the gradient, and a schedule that does nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def gradients_of_update(rows: list[Completion], **changes) -> list[torch.Tensor]:
    """The gradient that update() steps along."""
    model = tiny("llama")
    before = [p.detach().clone() for p in model.parameters()]
    reference = tiny("llama")
    with torch.no_grad():  # a reference that is not the policy, so that the KL term counts
        for p in reference.parameters():
            p.mul_(1.1)
    settings = config(num_iterations=1, max_grad_norm=1e9, **changes)
    cppo.update(model, reference, *plain_sgd(model), rows, Counter(), settings)
    return [a - b.detach() for a, b in zip(before, model.parameters(), strict=True)]


def run(*arguments, ranks: int = 1, script=SCRIPT, **environment):
    """A real process: python, or torchrun where there are several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*launcher, *script, *map(str, arguments)],
        capture_output=True, text=True, timeout=150, env={**os.environ, **environment},
    )  # fmt: skip


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- Configuration --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("group_size", "pruning_rate", "k"),
    [
        (16, 0.0, 16), (16, 0.5, 8), (16, 0.75, 4), (16, 0.875, 2), (16, 0.9375, 1),
        (20, 0.8, 4),  # 20 * (1 - 0.8) is 3.9999999999999996
        (10, 0.9, 1),  # 10 * (1 - 0.9) is 0.9999999999999998
        (7, 0.5, 3),  # floor(3.5)
        (4, 0.99, 1),  # never 0
    ],
)  # fmt: skip
def test_k_is_floor_of_G_times_1_minus_P_and_at_least_1(group_size, pruning_rate, k):
    assert config(group_size=group_size, pruning_rate=pruning_rate).num_kept == k


BELOW = {  # every numeric flag, with a number below its interval
    f.name: str(int(f.metadata["metavar"][1:].split(",")[0]) - 1)
    for f in dataclasses.fields(Config)
    if "metavar" in f.metadata
}


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        *[([f"--{name}", value], f"--{name} must be in") for name, value in BELOW.items()],
        (["--pruning_rate", "1"], "--pruning_rate"), (["--pruning_rate", "-0.1"], "--pruning_rate"),
        (["--pruning_rate", "nan"], "--pruning_rate"), (["--clip_eps", "1"], "--clip_eps"),
        (["--batch_size", "x"], "--batch_size"), (["--learning_rate", "0"], "--learning_rate"),
        (["--temperature", "0"], "--temperature"), (["--temperature", "inf"], "--temperature"),
        (["--warmup_ratio", "1.5"], "--warmup_ratio"), (["--prune_by", "luck"], "--prune_by"),
        (["--task", "poetry"], "--task"), (["--sample_batch", "15"], "--sample_batch"),
        (["--no_refill", "--batch_size", "24"], "--batch_size"), (["--dtype", "int8"], "--dtype"),
        (["--eval_only", "--eval_questions", "0"], "--eval_only"),
        (["--eval_samples", "4"], "--eval_temperature"), (["--eval_top_p", "0"], "--eval_top_p"),
        (["--eval_only", "--benchmark"], "--benchmark"), (["--ignore_eos"], "--ignore_eos"),
        (["--benchmark", "--steps", "0"], "--steps"),
        (["--resume", "perhaps"], "--resume"), (["--seed", "2147483648"], "--seed"),
        (["--prunning_rate", "0.5"], "--prunning_rate"), (["--prun", "0.5"], "--prun"),
        (["--task", "arithmetic", "--train_data", "x.csv"], "--task"),
        (["--model", "no/such/folder"], "--model"), (["hello"], "hello"),
        (["--train_data", "none.csv", "--test_data", "none.csv"], "none.csv"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line_that_names_the_flag_and_exit_2_and_writes_nothing(
    flags, names, tmp_path, monkeypatch, capsys
):
    if "--train_data" in flags and "--task" not in flags:
        cppo.tiny_model_and_tokenizer()[0].save_pretrained(tmp_path / "model")
        cppo.tiny_model_and_tokenizer()[1].save_pretrained(tmp_path / "model")
        flags = [*flags, "--model", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["cppo.py", "--output_dir", str(tmp_path / "out"), *flags])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as stop:
        cppo.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("cppo.py: ") and error.count("\n") == 1 and names in error
    assert not (tmp_path / "out").exists()


def test_the_batch_must_be_divisible_by_the_ranks_and_without_refill_by_the_groups():
    assert config(batch_size=128).room(world_size=8) == 16
    with pytest.raises(UserError, match="--batch_size 100 must be divisible by 8 ranks"):
        config(batch_size=100).room(world_size=8)
    assert config(batch_size=64, refill=False).room(world_size=2) == 32
    for whole_groups in (dict(refill=False), dict(pruning_rate=0.0)):  # GRPO drops nothing
        with pytest.raises(UserError, match="--batch_size 48 must be divisible by 2 ranks x"):
            config(batch_size=48, **whole_groups).room(world_size=2)


@pytest.mark.parametrize("task", cppo.TASKS)
def test_every_task_has_defaults_for_the_flags_that_need_one(task):
    settings = dataclasses.asdict(Config(task=task))
    may_stay_none = {"model", "train_data", "test_data", "steps", "eval_questions"}
    assert {name for name, value in settings.items() if value is None} <= may_stay_none
    assert Config(task=task).room(world_size=1) > 0


def test_a_warm_start_needs_a_demonstration_of_every_question(tmp_path, monkeypatch):
    bare = cppo.Task(lambda *_: [Question("1+1=", "2")], cppo.accuracy_reward,
                     cppo.TASKS["arithmetic"].defaults)  # fmt: skip
    monkeypatch.setitem(cppo.TASKS, "bare", bare)
    with pytest.raises(UserError, match="--warm_start_steps must be 0"):
        cppo.train(Config(task="bare", output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_what_is_due_every_so_many_steps_is_due_at_both_ends_as_well():
    assert [step for step in range(8) if cppo.due(step, 3, 7)] == [0, 3, 6, 7]
    assert [step for step in range(8) if cppo.due(step, 0, 7)] == [0, 7]


def test_gradient_checkpointing_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    model = transformers.Qwen2ForCausalLM
    monkeypatch.setattr(model, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="--gradient_checkpointing is not possible"):
        cppo.train(config(output_dir=str(tmp_path / "run"), gradient_checkpointing=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer*", "config.json"])
def test_a_model_folder_that_lacks_a_part_is_a_users_mistake(missing, tmp_path):
    for part in cppo.tiny_model_and_tokenizer():
        part.save_pretrained(tmp_path)
    cppo.load_model_and_tokenizer(str(tmp_path))
    for file in tmp_path.glob(missing):
        file.unlink()
    with pytest.raises(UserError, match=r"is no folder or hub name that loads; without network"):
        cppo.load_model_and_tokenizer(str(tmp_path))


def test_more_ranks_than_gpus_is_a_users_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--nproc_per_node 3 is more than the GPUs here, 2"):
        cppo.init_distributed()


def test_out_of_gpu_memory_is_one_line_that_names_the_flags(monkeypatch, capsys):
    def explode(_config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(cppo, "train", explode)
    monkeypatch.setattr(sys, "argv", ["cppo.py"])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as stop:
        cppo.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    for flag in ("--tokens_per_microbatch", "--sample_batch", "--gradient_checkpointing"):
        assert flag in error


def test_a_run_is_never_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match="is not empty"):
        cppo.train(config(output_dir=str(tmp_path)))
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


def test_a_folder_that_cannot_be_written_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .* cannot be written"):
        cppo.train(config(output_dir=str(tmp_path / "file" / "run")))


def test_prompts_that_are_too_long_are_left_out_and_none_left_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="2,560 with prompts over --max_prompt_tokens left out"):
        cppo.train(config(output_dir=str(tmp_path / "run"), max_prompt_tokens=5))
    assert not (tmp_path / "run").exists()


# --- Questions ------------------------------------------------------------------------------------
def test_no_test_sum_is_a_training_sum_not_even_turned_round():
    train, test = (cppo.arithmetic_questions(None, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (2560, 512)
    prompts = [q.prompt for q in train + test]
    assert len(set(prompts)) == len(prompts)
    numbers = [{frozenset(q.prompt[:-1].split("+")) for q in qs} for qs in (train, test)]
    assert not numbers[0] & numbers[1]
    assert all(int(q.prompt[:2]) + int(q.prompt[3:5]) == int(q.answer) for q in train + test)


def test_the_teacher_is_always_in_format_and_right_unless_it_forgets_to_carry():
    train = cppo.arithmetic_questions(None, "train")
    carries = [int(q.prompt[1]) + int(q.prompt[4]) >= 10 for q in train]
    right = [cppo.accuracy_reward(q.demonstration, q.answer) == 2 for q in train]
    assert all(cppo.format_reward(q.demonstration) for q in train)
    assert all(ok for ok, carry in zip(right, carries, strict=True) if not carry)
    forgets = 1 - sum(ok for ok, c in zip(right, carries, strict=True) if c) / sum(carries)
    assert 0.65 < forgets < 0.75


def test_the_character_tokenizer_gives_back_its_text_and_has_one_token_per_tag(tmp_path):
    _, tokenizer = cppo.tiny_model_and_tokenizer()
    text = "<think>7+8=15 3+5=8+1=9</think>\n<answer>95</answer>"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) - sum(len(tag) - 1 for tag in cppo.TAGS)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    longest = max(cppo.arithmetic_questions(None, "train"), key=lambda q: len(q.demonstration))
    assert len(tokenizer(longest.demonstration).input_ids) + 1 <= config().max_completion_tokens


def test_an_epoch_asks_each_question_once_over_all_ranks_and_the_next_in_another_order():
    questions = [Question(str(i), "0") for i in range(10)]
    ranks = [cppo.question_stream(questions, 42, rank, 3) for rank in range(3)]
    shares = (4, 3, 3)  # 10 cards, 3 players
    epochs = [
        [q.prompt for r, n in zip(ranks, shares, strict=True) for q in itertools.islice(r, n)]
        for _ in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [str(i) for i in range(10)]
    assert epochs[0] != epochs[1]


def gsm8k_row(question: str, answer: str) -> dict:
    return {"question": question, "answer": answer}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_questions_load_from_any_kind_of_file(kind, tmp_path):
    import datasets

    rows = [
        gsm8k_row("How many?", "48/2 = <<48/2=24>>24 clips.\n24+48 = <<24+48=72>>72.\n#### 72"),
        gsm8k_row("And in all?", "1,234"),
        gsm8k_row("And now?", "0"),
    ]
    file = str(tmp_path / f"data.{kind}")
    table = datasets.Dataset.from_list(rows)
    getattr(table, f"to_{kind.replace('jsonl', 'json')}")(file)
    first, second, third = cppo.gsm8k_questions(file, "train")
    assert first.prompt[1] == {"role": "user", "content": "How many?"}
    assert (first.answer, second.answer, third.answer) == ("72", "1,234", "0")
    assert first.demonstration == (
        "<think>48/2 = 24 clips.\n24+48 = 72.</think>\n<answer>72</answer>"
    )


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_numbers_as_answers_stay_as_they_are_written(kind, tmp_path):
    text = "question,answer\na,0\nb,3\nc,2.50\n"
    if kind == "jsonl":
        text = '{"question": "a", "answer": 0}\n{"question": "b", "answer": 3}\n'
    (tmp_path / f"data.{kind}").write_text(text)
    answers = [q.answer for q in cppo.gsm8k_questions(str(tmp_path / f"data.{kind}"), "test")]
    assert answers == ["0", "3", "2.50"][: len(answers)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"question": "a"}\n', "answer"),
        ('{"question": "a", "answer": ""}\n', "row 1"),
        ('{"question": "a", "answer": "1"}\n{"question": "b", "answer": null}\n', "row 2"),
        ('{"question": "a", "ans', "is no file that loads"),
        ("", "data.jsonl"),
    ],
)
def test_a_bad_data_file_is_one_line_that_names_it(content, says, tmp_path):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        cppo.gsm8k_questions(str(tmp_path / "data.jsonl"), "train")
    assert says in str(error.value) and "data.jsonl" in str(error.value)


def test_a_half_written_parquet_file_and_an_unknown_kind_are_users_mistakes(tmp_path):
    table = datasets.Dataset.from_list([gsm8k_row("a", "1")] * 99)
    table.to_parquet(tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "data.txt").write_text("question,answer\na,1\n")
    for name in ("half.parquet", "data.txt", "none.parquet"):
        with pytest.raises(UserError, match="is no file that loads; give a file that ends in"):
            cppo.gsm8k_questions(str(tmp_path / name), "train")


@pytest.fixture
def math_verify(tmp_path, monkeypatch):
    """A stand-in for the package, which knows that a half is 0.5; the real one has its own test."""
    code = "parse = lambda latex: latex[8:-2]\nverify = lambda a, b: {a, b} == {'1/2', '0.5'}\n"
    (tmp_path / "package").mkdir()
    (tmp_path / "package/math_verify.py").write_text(code)
    module = types.ModuleType("math_verify")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, "math_verify", module)
    return str(tmp_path / "package")


def test_math_questions_take_the_answer_or_what_the_solution_boxes(math_verify, tmp_path):
    tables = {
        "both": '{"problem": "a", "solution": "So $\\\\boxed{9}$.", "answer": "1"}',
        "solution": '{"problem": "a", "solution": "$\\\\boxed{2}, \\\\boxed{\\\\frac{1}{2}}$"}',
        "answer": '{"question": "a", "answer": 27}',
    }
    for name, answer in (("both", "1"), ("solution", "\\frac{1}{2}"), ("answer", "27")):
        (tmp_path / f"{name}.jsonl").write_text(tables[name] + "\n")
        (question,) = cppo.math_questions(str(tmp_path / f"{name}.jsonl"), "test")
        assert question.answer == answer and question.prompt[1]["content"] == "a"
        assert cppo.boxed(question.demonstration) == answer
        assert cppo.format_reward(question.demonstration) == 1
    assert "final answer is: $\\boxed{ANSWER}$. I hope" in question.prompt[0]["content"]
    (tmp_path / "none.jsonl").write_text('{"problem": "a", "solution": "So it is 1."}\n')
    with pytest.raises(UserError, match=r"the solution of row 1 has no .boxed"):
        cppo.math_questions(str(tmp_path / "none.jsonl"), "train")


def test_without_math_verify_the_math_task_asks_for_it_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install math-verify"):
        cppo.math_questions("none.jsonl", "train")


def test_messages_go_through_the_chat_template_and_text_does_not():
    _, tokenizer = cppo.tiny_model_and_tokenizer()
    chat = [{"role": "system", "content": "1+"}, {"role": "user", "content": "2"}]
    (plain,) = cppo.encode_prompts([Question(chat, "3")], tokenizer)
    assert tokenizer.decode(plain.prompt_ids) == "1+\n\n2\n\n"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '=' if m.role == 'user' else '<think>' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}</think>{% endif %}"
    )
    encoded = cppo.encode_prompts([Question(chat, "3"), Question("1+2=", "3")], tokenizer)
    texts = [tokenizer.decode(q.prompt_ids) for q in encoded]
    assert texts == ["<think>1+=2</think>", "1+2="]
    # Gemma's template, for one, refuses the system role
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "={{ messages[0].content }}<think>"
    )
    (encoded,) = cppo.encode_prompts([Question(chat, "3")], tokenizer)
    assert tokenizer.decode(encoded.prompt_ids) == "=1+\n\n2<think>"


def test_bos_is_added_where_no_template_has_added_it():
    _, tokenizer = cppo.tiny_model_and_tokenizer()
    bos = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    tokenizer.backend_tokenizer.post_processor = bos
    chat = [{"role": "user", "content": "2"}]
    for template, first in ((None, "<pad>"), ("{{ messages[0].content }}=", "2")):
        tokenizer.chat_template = template
        (encoded,) = cppo.encode_prompts([Question(chat, "3")], tokenizer)
        assert tokenizer.decode(encoded.prompt_ids[:1]) == first


# --- Sampling -------------------------------------------------------------------------------------
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [8, 9]]  # ragged on purpose


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("eos_ids", [[1, 2, 5], [0, 6, 7], [0, 3, 4]])  # 0 also fills padding
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_is_1_before_any_update(family, eos_ids, temperature):
    model = tiny(family)
    torch.manual_seed(0)
    sampled = cppo.sample_completions(model, PROMPTS, 6, 12, temperature, eos_ids, sample_batch=12)
    prompts = [p for p in PROMPTS for _ in range(6)]
    rows = [Completion(p, ids, lps) for p, (ids, lps) in zip(prompts, sampled, strict=True)]
    assert len({len(row.token_ids) for row in rows}) > 2  # rows did finish early
    batch = cppo.make_batch(rows)
    with torch.no_grad():
        log_probs = cppo.token_log_probs(model, batch, temperature)
        ratio = torch.exp(log_probs - batch.sampled_log_probs)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
    for i, row in enumerate(rows):  # and both agree with a forward pass of the row alone
        alone = naive_log_probs(model, row, temperature)
        torch.testing.assert_close(log_probs[i, : len(alone)], alone, rtol=0, atol=1e-5)


def test_a_completion_ends_with_its_first_eos_or_at_the_limit():
    torch.manual_seed(0)
    sampled = cppo.sample_completions(tiny("qwen2"), PROMPTS, 16, 8, 1.0, [1, 2])
    ends = Counter()
    for ids, log_probs in sampled:
        assert len(ids) == len(log_probs) <= 8
        assert not {1, 2} & set(ids[:-1])
        assert ids[-1] in (1, 2) or len(ids) == 8
        ends[ids[-1] in (1, 2)] += 1
    assert min(ends.values()) > 5  # both kinds were seen


def test_completions_come_question_major_in_the_order_of_the_prompts():
    # A model that can only repeat the prompt's last token shows whose completion it is.
    class Echo(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, past_key_values=None, **_):
            logits = torch.nn.functional.one_hot(input_ids, 20) * 1e4
            cache = past_key_values or transformers.DynamicCache()
            return transformers.modeling_outputs.CausalLMOutputWithPast(
                logits=logits.float(), past_key_values=cache
            )

    sampled = cppo.sample_completions(Echo(), PROMPTS, 3, 2, 1.0, [1], sample_batch=6)
    assert [ids for ids, _ in sampled] == [[p[-1]] * 2 for p in PROMPTS for _ in range(3)]


def test_greedy_decoding_takes_the_likeliest_token_each_time():
    model = tiny("llama")
    sampled = cppo.sample_completions(model, PROMPTS, 1, 10, 0.0, [1])
    for prompt, (ids, _) in zip(PROMPTS, sampled, strict=True):
        so_far, want = list(prompt), []
        while len(want) < 10 and (not want or want[-1] != 1):
            want.append(int(model(torch.tensor([so_far])).logits[0, -1].argmax()))
            so_far.append(want[-1])
        assert ids == want


def test_a_prompt_is_read_once_for_its_G_completions_and_finished_rows_leave():
    model = tiny("qwen2")
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    torch.manual_seed(0)
    cppo.sample_completions(model, PROMPTS, 8, 30, 1.0, [1, 2, 3, 4])
    assert shapes[0] == (4, 5)  # Q prompts, not Q G
    live = [rows for rows, width in shapes[1:] if width == 1]
    assert len(live) == len(shapes) - 1 and live[0] <= 32 and live[-1] < 8
    assert live == sorted(live, reverse=True)


def test_the_cache_with_spare_columns_holds_what_the_plain_one_holds():
    g = torch.Generator().manual_seed(0)

    def token():
        return torch.randn(2, 4, 3, 1, 8, generator=g)  # keys and values of 4 rows

    plain = DynamicLayer()
    plain.update(*torch.randn(2, 4, 3, 5, 8, generator=g))  # prompts of 5 tokens
    roomy = cppo.RoomyLayer(plain, max_tokens=13)
    roomy.spare = 3  # so that it has to make room more than once
    rows = torch.arange(4)
    for t in range(12):
        if t in (2, 5, 11):  # rows leave, or change places
            rows = {2: [3, 0, 2], 5: [2, 1, 0], 11: [1]}[t]
            plain.batch_select_indices(torch.tensor(rows))
            roomy.batch_select_indices(torch.tensor(rows))
        keys, values = token()[:, : len(rows)]
        for a, b in zip(plain.update(keys, values), roomy.update(keys, values), strict=True):
            assert torch.equal(a, b)
        assert roomy.get_seq_length() == 5 + t + 1
    memory = roomy.keys.data_ptr()
    roomy.update(*token()[:, :1])
    assert roomy.keys.data_ptr() == memory  # one token more has copied nothing


def test_tokens_are_drawn_as_often_as_the_model_says():
    logits, temperature, draws = torch.tensor([2.0, 0.0, 1.0, -1.0, -math.inf, 0.5]), 0.8, 40_000
    expected = (logits / temperature).softmax(-1) * draws
    torch.manual_seed(0)
    tokens, log_probs = cppo.draw_tokens(logits.expand(draws, -1), temperature)
    counts = torch.bincount(tokens, minlength=6)
    assert counts[4] == 0  # probability 0
    possible = expected > 0
    chi2 = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    p_value = torch.special.gammaincc(torch.tensor(4 / 2), chi2 / 2)  # 5 - 1 degrees of freedom
    assert p_value > 1e-3  # a right sampler fails for 1 seed in 1000
    torch.testing.assert_close(log_probs, (logits / temperature).log_softmax(-1)[tokens])


def test_top_p_draws_from_the_fewest_likeliest_tokens_that_reach_it():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    for top_p, likely in ((0.35, [1]), (0.65, [1, 3]), (0.8, [1, 2, 3])):
        torch.manual_seed(0)
        tokens, log_probs = cppo.draw_tokens(logits.expand(4000, -1), 1.0, top_p)
        assert sorted(set(tokens.tolist())) == likely
        total = logits[likely].exp().sum()
        torch.testing.assert_close(log_probs, logits[tokens] - total.log())
        share = (tokens == 1).float().mean().item()
        assert share == pytest.approx(0.4 / total.item(), abs=0.04)  # 5 sigma


def test_whole_completions_are_drawn_as_often_as_the_model_says():
    # Two tokens after a ragged prompt: 16 sequences that end at the limit or at EOS = 0.
    model, draws = tiny("gpt2", vocabulary=4), 8000
    torch.manual_seed(0)
    sampled = cppo.sample_completions(model, [[3], [2, 1, 3]], draws, 2, 1.5, [0], 2 * draws)
    for prompt, group in (([3], sampled[:draws]), ([2, 1, 3], sampled[draws:])):
        counts = Counter(tuple(ids) for ids, _ in group)
        outcomes = [(0,), *itertools.product((1, 2, 3), range(4))]
        assert set(counts) <= set(outcomes)
        chi2 = 0.0
        for ids in outcomes:
            with torch.no_grad():
                log_prob = naive_log_probs(model, Completion(prompt, list(ids)), 1.5).sum()
            expected = draws * log_prob.exp().item()
            chi2 += (counts[ids] - expected) ** 2 / expected
        degrees = torch.tensor((len(outcomes) - 1) / 2)
        assert torch.special.gammaincc(degrees, torch.tensor(chi2 / 2)) > 1e-3  # 1 seed in 1000


def test_each_completion_is_scored_against_its_own_question(monkeypatch):
    model, tokenizer = cppo.tiny_model_and_tokenizer()
    questions = cppo.encode_prompts([Question("1+1=", "2"), Question("1+2=", "3")], tokenizer)
    texts = ["<think>1</think>\n<answer>2</answer>", "<answer>3</answer>", "9"] * 2
    ids = [[*tokenizer(text).input_ids, 1] for text in texts]
    ids[2].pop()  # no EOS
    monkeypatch.setattr(cppo, "sample_completions", lambda *_: [(x, [0.0] * len(x)) for x in ids])
    scored = cppo.rollout(model, tokenizer, questions, 3, 1.0, config())
    assert [c.accuracy_reward for c in scored] == [2, 0, 0, 0, 2, 0]
    assert [c.format_reward for c in scored] == [1, 0, 0, 1, 0, 0]
    assert [c.truncated for c in scored] == [False, False, True, False, False, False]
    assert [c.prompt_ids for c in scored] == [questions[i // 3].prompt_ids for i in range(6)]
    assert scored[0].reward == 3


def test_ignore_eos_samples_completions_of_full_length():
    model, tokenizer = cppo.tiny_model_and_tokenizer()
    questions = cppo.encode_prompts([Question("1+1=", "2")], tokenizer)
    torch.manual_seed(0)
    settings = config(benchmark=True, ignore_eos=True, max_completion_tokens=40)
    completions = cppo.rollout(model, tokenizer, questions, 32, 1.0, settings)
    assert all(len(c.token_ids) == 40 and c.truncated for c in completions)
    assert any(tokenizer.eos_token_id in c.token_ids for c in completions)


# --- Rewards --------------------------------------------------------------------------------------
def right_form(answer: str) -> str:
    return f"<think>hm</think>\n<answer>{answer}</answer>"


def test_answers_are_what_the_last_pair_of_tags_holds():
    two = "<answer>1</answer> no, wait: <answer>2</answer>"
    assert cppo.extract_answer(two) == "2", "the last answer counts, and nothing before it"
    assert cppo.extract_answer("<answer>\n 72 </answer>") == "72", "strip the space around it"
    assert cppo.extract_answer("<answer>-72</answer>") == "-72", "an answer keeps its sign"
    for text in ("72", "<answer>72", "72</answer>", "</answer>72<answer>", ""):
        said = cppo.extract_answer(text)
        assert said is None, f"no answer is None, or it might equal an empty one: {text!r}"


REWARDS = [  # completion, right answer, format reward, accuracy reward
    # the form
    (right_form("72"), "72", 1, 2),
    ("<think></think>\n<answer>72</answer>", "72", 1, 2),
    ("<think>a\nb\n\nc</think>\n<answer>\n72\n</answer>", "72", 1, 2),
    ("<think>hm</think><answer>72</answer>", "72", 0, 2),
    ("<think>hm</think> <answer>72</answer>", "72", 0, 2),
    ("<think>hm</think>\n\n<answer>72</answer>", "72", 0, 2),
    ("<think>hm</think>\r\n<answer>72</answer>", "72", 0, 2),
    (" <think>hm</think>\n<answer>72</answer>", "72", 0, 2),
    ("<think>hm</think>\n<answer>72</answer>\n", "72", 0, 2),
    ("<think>hm</think>\n<answer>72</answer> I am sure.", "72", 0, 2),
    ("Well. <think>hm</think>\n<answer>72</answer>", "72", 0, 2),
    ("<think>hm</think>\n<answer>72", "72", 0, 0),
    ("<think>hm\n<answer>72</answer>", "72", 0, 2),
    ("hm</think>\n<answer>72</answer>", "72", 0, 2),
    ("<answer>72</answer>", "72", 0, 2),
    ("<answer>72</answer>\n<think>hm</think>", "72", 0, 2),
    ("<think><think>hm</think>\n<answer>72</answer>", "72", 0, 2),
    ("<think>hm</think>\n<answer>71</answer>\n<answer>72</answer>", "72", 0, 2),
    ("<think>hm</think>\n<answer>72</answer>\n<answer>71</answer>", "72", 0, 0),
    ("<Think>hm</Think>\n<Answer>72</Answer>", "72", 0, 0),
    ("72", "72", 0, 0),
    ("", "72", 0, 0),
    # no answer is never right
    ("", "", 0, 0),
    (right_form(""), "", 1, 0),
    (right_form(" "), "", 1, 0),
    (right_form("None"), "72", 1, 0),
    # the same number, written otherwise
    (right_form("72.0"), "72", 1, 1.5),
    (right_form("72.00"), "72.", 1, 1.5),
    (right_form("72."), "72", 1, 1.5),
    (right_form("072"), "72", 1, 1.5),
    (right_form("+72"), "72", 1, 1.5),
    (right_form("$72"), "72", 1, 1.5),
    (right_form("$72.00."), "72", 1, 1.5),
    (right_form("72%"), "72", 1, 1.5),
    (right_form("1234"), "1,234", 1, 1.5),
    (right_form("1,234,567.50"), "1234567.5", 1, 1.5),
    (right_form("-$5"), "-5", 1, 1.5),
    (right_form("$-5"), "-5", 1, 1.5),
    (right_form("\N{MINUS SIGN}5"), "-5", 1, 1.5),
    (right_form(".5"), "0.5", 1, 1.5),
    (right_form("-0"), "0", 1, 1.5),
    (right_form("1,234"), "1,234", 1, 2),
    (right_form("x = 3"), "x = 3", 1, 2),
    # other numbers, or none
    (right_form("-72"), "72", 1, 0),
    (right_form("72"), "-72", 1, 0),
    (right_form("7.2"), "72", 1, 0),
    (right_form("12,34"), "1234", 1, 0),
    (right_form("1,2345"), "12345", 1, 0),
    (right_form("72 clips"), "72", 1, 0),
    (right_form("70+2"), "72", 1, 0),
    (right_form("7 2"), "72", 1, 0),
    (right_form("7.2e1"), "72", 1, 0),
    (right_form("+-72"), "-72", 1, 0),
    (right_form("--72"), "72", 1, 0),
    (right_form("$"), "0", 1, 0),
    (right_form("."), "0", 1, 0),
    (right_form("%"), "0", 1, 0),
    (right_form("inf"), "inf.", 1, 0),
    (right_form("nan"), "NaN", 1, 0),
    (right_form("٧٢"), "72", 1, 0),
    (right_form("0.1000000000000000055511151231257827"), "0.1", 1, 0),  # equal in floats only
]


@grades("answers")
@pytest.mark.parametrize(("text", "answer", "form", "accuracy"), REWARDS)
def test_rewards_of_a_table_of_completions(text, answer, form, accuracy):
    assert (cppo.format_reward(text), cppo.accuracy_reward(text, answer)) == (form, accuracy)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so $\boxed{42}$.", "42"), (r"\boxed{1} or \boxed{2}", "2"), (r"\boxed 5$ x", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}} }", r"\frac{1}{\sqrt{2}}"), (r"\fbox{ 3 }", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{x \}y}", r"x \}y"), (r"\boxed {7}", "7"),
        (r"\boxed{1", None), ("42", None), ("", None), (r"\boxed{}", None), (r"\boxed", None),
        (r"\boxed{ }", None), (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}",
                                r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ],
)  # fmt: skip
def test_what_a_box_holds(text, inside):
    assert cppo.boxed(text) == inside


def test_the_math_reward_is_2_for_the_same_number_or_expression_and_0_for_none(math_verify):
    for text, answer, reward in (
        (r"\boxed{7}", "7", 2), (r"\boxed{0.5}", "1/2", 2), (r"\boxed{8}", "7", 0),
        ("7", "7", 0), (r"\boxed{}", "", 0), (r"\boxed{7} or \boxed{8}", "7", 0),
    ):  # fmt: skip
        assert cppo.math_reward(text, answer) == reward


def test_the_math_reward_with_the_real_package():
    pytest.importorskip("math_verify", reason="pip install math-verify")
    for given, answer, reward in (
        (r"\frac{1}{2}", "0.5", 2), (r"\dfrac12", r"\frac{1}{2}", 2), ("x^2+x", "x(x+1)", 2),
        (r"(1, 2)", "(1,2)", 2), (r"\frac{1}{3}", "0.5", 0), ("9^{9^{9^{9}}}", "7", 0),
    ):  # fmt: skip
        assert cppo.math_reward(f"$\\boxed{{{given}}}$", answer) == reward, given


@grades("answers")
@pytest.mark.parametrize(
    "piece",
    [*cppo.TAGS, "<think></think>\n<answer>", *"<9-$.% {}\\", "1,", ",111", "0.", "\\boxed"],
)
def test_rewards_take_linear_time_on_a_megabyte_of_anything(piece):
    # Quadratic time would be 1e12 steps here: this test would not end.
    flood = piece * (1_000_000 // len(piece))
    for text in (flood, right_form(flood), right_form(flood + "x"), right_form("1" + flood + "x")):
        cppo.format_reward(text)
        cppo.accuracy_reward(text, "72")
        cppo.accuracy_reward(right_form("72"), text)
        cppo.boxed(text)


def test_rewards_of_a_hundred_thousand_random_texts_are_always_one_of_their_values():
    rng = random.Random(0)
    pieces = [*cppo.TAGS, "\n", " ", "-", "+", ".", ",", "$", "%", "7", "42", "1,234", "0.5", "nan",
              "inf", "1e9", "\N{MINUS SIGN}", "\N{ARABIC-INDIC DIGIT THREE}", "\0", "\ud800",
              "__import__('os')", "\u00bd", "<answer>7</answer>"]  # fmt: skip
    seen = Counter()
    for _ in range(100_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        form, accuracy = cppo.format_reward(text), cppo.accuracy_reward(text, "7")
        seen[form, accuracy] += 1
        given = cppo.extract_answer(text)
        assert given is None or given in text
        if accuracy:  # only a seven is ever right
            assert float(given.replace("$", "").replace("%", "").rstrip(".")) == 7
    assert {a for _, a in seen} == {0.0, 1.5, 2.0} and {f for f, _ in seen} <= {0.0, 1.0}


# --- Advantages -----------------------------------------------------------------------------------
def close(got: torch.Tensor, want, lesson: str):
    want = torch.as_tensor(want, dtype=got.dtype)
    assert torch.allclose(got, want, atol=1e-6), f"{lesson}: {want.tolist()}, not {got.tolist()}"


def test_advantages_by_hand():
    # mean 1, deviations (2, 0, -1, -1), std = sqrt(6 / 3)
    rewards = torch.tensor([[3, 1, 0, 0], [3, 3, 3, 3], [2, 0, 0, 0]], dtype=F64)
    got = cppo.group_advantages(rewards)
    lesson = "equal rewards teach nothing: 0 / (0 + 1e-4)"
    close(cppo.group_advantages(rewards[1:2]), [[0] * 4], lesson)
    alone = torch.cat([cppo.group_advantages(row[None]) for row in rewards])
    close(got, alone, "mean and std are each question's own, whatever other questions there are")
    s = math.sqrt(2) + 1e-4
    close(got[0], [2 / s, 0, -1 / s, -1 / s], "3 1 0 0 has mean 1 and std sqrt(6 / 3), over G - 1")


def test_one_lucky_completion_in_16_has_advantage_3_75_and_the_others_a_quarter():
    rewards = torch.zeros(1, 16, dtype=F64)
    rewards[0, 5] = 2.0  # mean 1/8, std 1/2
    advantages = cppo.group_advantages(rewards)
    assert advantages[0, 5].item() == pytest.approx(3.75, abs=1e-3)
    assert advantages[0, 0].item() == pytest.approx(-0.25, abs=1e-3)


def test_advantages_of_a_question_do_not_depend_on_other_questions():
    rewards = torch.rand(5, 7, dtype=F64)
    together = cppo.group_advantages(rewards)
    alone = torch.cat([cppo.group_advantages(row[None]) for row in rewards])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(together.mean(1), torch.zeros(5, dtype=F64))


# --- Pruning --------------------------------------------------------------------------------------
def kept(advantages, k, **options):
    """The indices that prune keeps, question by question."""
    mask = cppo.prune(torch.tensor(advantages, dtype=F64), k, **options)
    return [row.nonzero()[:, 0].tolist() for row in mask]


def test_pruning_keeps_the_k_largest_absolute_advantages_of_each_question():
    advantages = [[0.1, -2.0, 1.0, 0.9], [0.01, 0.02, -0.03, 0.0]]
    got = kept(advantages, 2)
    assert [len(group) for group in got] == [2, 2], "each question keeps k: none is crowded out"
    assert got == [[1, 2], [1, 2]], "the largest |A|, not A: the worst teach as much as the best"
    assert kept(advantages, 4) == [[0, 1, 2, 3]] * 2, "with gamma 0 all k stay, also where A = 0"


def test_pruning_breaks_ties_to_the_lowest_index():
    lesson = "exactly k stay, and of equal ones the first: the same on every machine"
    assert kept([[1.0, -1.0, 1.0, -1.0]], 2) == [[0, 1]], lesson
    assert kept([[0.5, -1.0, 1.0, 0.5]], 3) == [[0, 1, 2]], lesson
    assert kept([[0.0] * 40], 3) == [[0, 1, 2]], lesson


def test_pruning_by_each_of_the_four_criteria_of_the_paper():
    advantages = [[0.1, -2.0, 1.0, -0.9]]
    assert kept(advantages, 2, by="abs_advantage") == [[1, 2]]
    assert kept(advantages, 2, by="advantage") == [[0, 2]]
    assert kept(advantages, 2, by="smallest") == [[0, 3]]
    torch.manual_seed(0)
    seen = Counter(i for _ in range(600) for i in kept(advantages, 2, by="random")[0])
    assert all(240 < seen[i] < 360 for i in range(4))  # each half of the time: 5 sigma


def test_pruning_with_gamma_keeps_at_most_k_and_none_below_it():
    advantages = [[0.1, -2.0, 1.0, 0.9], [0.0, 0.0, 0.0, 0.0]]
    assert kept(advantages, 3, gamma=0.95) == [[1, 2], []]
    assert kept(advantages, 3, gamma=1.0) == [[1, 2], []], "|A| >= gamma stays, equal ones too"
    assert kept(advantages, 1, gamma=0.95) == [[1], []]
    assert kept(advantages, 3, gamma=1e-6) == [[1, 2, 3], []]  # a tiny one drops dead groups


def test_pruning_equals_a_slow_loop_on_a_thousand_groups_with_many_ties():
    torch.manual_seed(0)
    advantages = torch.randint(-3, 4, (1000, 8)).double()
    for k in range(1, 9):
        mask = cppo.prune(advantages, k)
        for row, kept_row in zip(advantages.tolist(), mask.tolist(), strict=True):
            best = sorted(range(8), key=lambda i: (-abs(row[i]), i))[:k]
            assert kept_row == [i in best for i in range(8)]


# --- Refill ---------------------------------------------------------------------------------------
def metrics_of(ledger: Counter, **more) -> dict:
    """step_metrics of a ledger to which not every part of a step has added."""
    names = " ".join([*cppo.DENOMINATORS, *cppo.DENOMINATORS.values()]).split()
    return cppo.step_metrics(Counter(dict.fromkeys(names, 0) | ledger | more), "cpu")


def fake_draw(rewards_of, calls=None):
    """A sampler whose i-th question gets the rewards rewards_of(i)."""
    asked = itertools.count()

    def draw(questions):
        if calls is not None:
            calls.append(len(questions))
        return [
            Completion([1], [2, 3], truncated=r < 0, accuracy_reward=float(r), log_probs=[0.0, 0.0])
            for _ in questions
            for r in rewards_of(next(asked))
        ]

    return draw


def stream(n=1000):
    return iter([Question(str(i), "0") for i in range(n)])


def test_refill_fills_the_batch_exactly_with_k_of_each_of_1_over_1_minus_P_times_the_questions():
    settings = config(group_size=4, pruning_rate=0.5, batch_size=8)
    calls = []
    rows, ledger = cppo.collect_batch(
        fake_draw(lambda i: [i, 0, 2, 5], calls), stream(), 8, settings
    )
    # the paper's figure: GRPO would have asked 2 questions for its 8 slots
    assert calls == [4], "at k = 2 it takes 4 questions to fill 8 slots, and none more"
    assert len(rows) == ledger["kept"] == 8, "all the room is used"
    assert (ledger["questions"], ledger["sampled"], ledger["dropped"]) == (4, 16, 0)
    assert [row.reward for row in rows].count(5) == 4, "of each question the kept ones stay"
    lesson = "A is over all G completions, before any is pruned, and stays with its completion"
    for i, row in enumerate(rows):
        group = [i // 2, 0, 2, 5]
        A = (row.reward - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        assert row.advantage == pytest.approx(A, abs=1e-6), lesson


def test_refill_of_P_0_is_GRPO_all_completions_of_as_many_questions_as_fit():
    settings = config(group_size=4, pruning_rate=0.0)
    rows, ledger = cppo.collect_batch(fake_draw(lambda i: [0, 0, 0, 1]), stream(), 8, settings)
    assert len(rows) == 8 and ledger["questions"] == 2 and ledger["pruned"] == 0


def test_refill_drops_the_lowest_absolute_advantages_where_the_last_questions_bring_too_many():
    # k = 2, room 5: 3 questions bring 6. |A| is 1.5 for the lone 3, 0.87 in the even group.
    groups = [[0, 0, 0, 3], [0, 0, 0, 3], [0, 0, 3, 3]]
    settings = config(group_size=4, pruning_rate=0.5)
    rows, ledger = cppo.collect_batch(fake_draw(lambda i: groups[i]), stream(), 5, settings)
    assert ledger["kept"] == len(rows) == 5, "never more rows than there is room"
    assert ledger["dropped"] == 1, "what had no room is counted"
    sizes = sorted((round(abs(row.advantage), 2) for row in rows), reverse=True)
    lesson = "of 1.5, 1.5, 0.87, 0.87, 0.5, 0.5 the lowest |A| goes, not the last to come"
    assert sizes == [1.5, 1.5, 0.87, 0.87, 0.5], lesson


def test_refill_drops_by_the_criterion_that_prunes():
    groups = [[0, 0, 0, 3], [0, 0, 3, 3], [0, 0, 0, 3]]  # smallest: 0.5 0.5, 0.87 0.87, 0.5 0.5
    settings = config(group_size=4, pruning_rate=0.5, prune_by="smallest")
    rows, _ = cppo.collect_batch(fake_draw(lambda i: groups[i]), stream(), 5, settings)
    assert [round(abs(row.advantage), 2) for row in rows] == [0.5, 0.5, 0.87, 0.5, 0.5]


def test_refill_with_a_tiny_gamma_asks_again_in_place_of_dead_groups():
    calls = []
    draw = fake_draw(lambda i: [0, 0, 0, 3] if i % 2 else [1, 1, 1, 1], calls)
    settings = config(group_size=4, pruning_rate=0.5, gamma=1e-6, max_refill_rounds=9)
    rows, ledger = cppo.collect_batch(draw, stream(), 8, settings)
    lesson = "dead groups leave room: ask new questions for it, round after round"
    assert calls == [4, 2, 1, 1] and ledger["refill_rounds"] == 4, lesson  # half of each is dead
    assert len(rows) == 8 and ledger["dead_groups"] == 4 and ledger["questions"] == 8
    assert all(abs(row.advantage) > 0.4 for row in rows)


def test_refill_gives_up_after_max_refill_rounds_and_trains_on_what_there_is():
    calls = []
    settings = config(group_size=4, pruning_rate=0.5, gamma=1e-6, max_refill_rounds=3)
    rows, ledger = cppo.collect_batch(fake_draw(lambda i: [1] * 4, calls), stream(), 8, settings)
    assert rows == [] and calls == [4, 4, 4]
    assert ledger["dead_groups"] == ledger["questions"] == 12 and ledger["kept"] == 0


def test_refill_of_rewards_that_floats_cannot_hold_still_sees_equal_ones_as_equal():
    settings = config(group_size=10, pruning_rate=0.5, gamma=1e-6, max_refill_rounds=1)
    rows, ledger = cppo.collect_batch(fake_draw(lambda i: [1.1] * 10), stream(), 5, settings)
    lesson = "compute advantages in float64: the mean of 1.1s is not 1.1 in float32"
    assert rows == [] and ledger["dead_groups"] == 1, lesson


def test_no_refill_asks_batch_over_G_questions_and_trains_on_k_of_each():
    calls = []
    settings = config(group_size=4, pruning_rate=0.75, refill=False)
    rows, ledger = cppo.collect_batch(
        fake_draw(lambda i: [0, 0, 0, 3], calls), stream(), 16, settings
    )
    assert calls == [4] and len(rows) == 4 and ledger["questions"] == 4
    assert all(row.reward == 3 for row in rows)


def test_the_ledger_counts_by_hand():
    settings = config(group_size=4, pruning_rate=0.75)
    draw = fake_draw(lambda i: [[0, 0, 0, 2], [2, 2, 2, 2]][i])
    _, ledger = cppo.collect_batch(draw, stream(), 2, settings)
    metrics = metrics_of(ledger, loss=4.0)
    assert metrics["reward"] == 10 / 8 and metrics["accuracy"] == 5 / 8 and metrics["format"] == 0
    assert metrics["completion_tokens"] == 2 and metrics["sampled_tokens"] == 16
    assert metrics["trained_tokens"] == 4 and metrics["loss"] == 4 / 2
    # the lone 2: mean 1/2, std 1, |A| = 1.5, the rest 0.5; the group of equal rewards has A = 0
    assert metrics["abs_advantage_kept"] == pytest.approx(1.5 / 2, abs=1e-3)
    assert metrics["abs_advantage_pruned"] == pytest.approx(3 * 0.5 / 6, abs=1e-3)


def test_an_average_of_nothing_is_null_and_not_0():
    settings = config(group_size=4, pruning_rate=0.0)
    _, ledger = cppo.collect_batch(fake_draw(lambda i: [0, 0, 0, 2]), stream(), 4, settings)
    assert metrics_of(ledger)["abs_advantage_pruned"] is None


# --- Log-probabilities ----------------------------------------------------------------------------
def test_micro_batches_hold_every_row_once_within_the_limit_and_little_padding():
    rows = some_rows(50, longest=30)
    packs = cppo.pack(rows, 100)
    assert Counter(map(id, itertools.chain(*packs))) == Counter(map(id, rows))
    for some in packs:
        assert len(some) == 1 or len(some) * max(r.num_tokens for r in some) <= 100
    padding = sum(
        len(p) * max(r.num_tokens for r in p) - sum(r.num_tokens for r in p) for p in packs
    )
    assert padding < 0.15 * sum(r.num_tokens for r in rows)
    assert cppo.pack(some_rows(3, longest=30), 1) != [] and len(cppo.pack(rows, 1)) == 50


def test_masks_of_a_batch_by_hand():
    # The EOS of these rows is 0, and so is the padding, as in many a model.
    rows = [Completion([5, 6], [7, 0], [-0.5, -0.25], advantage=2.0), Completion([8], [9, 0, 0])]
    batch = cppo.make_batch(rows)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]], "prompt, completion, padding"
    assert not batch.mask[0, 2], "padding is no token of the completion"
    assert batch.mask[0, 1], "EOS is trained, or the model would never learn to stop"
    lesson = "a token is the completion's by its position: 0 may be a token and may be padding"
    assert batch.mask.int().tolist() == [[1, 1, 0], [1, 1, 1]], lesson
    lesson = "the logits at a token predict the next one: it begins at the prompt's last token"
    assert batch.predicts.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0]], lesson
    assert batch.sampled_log_probs.tolist() == [[-0.5, -0.25, 0], [0, 0, 0]]
    assert batch.advantages.tolist() == [2, 0]


@grades("masks")
@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_log_probs_of_padded_rows_are_those_of_each_row_alone(family):
    model, rows = tiny(family), some_rows(9)
    log_probs = cppo.token_log_probs(model, cppo.make_batch(rows), temperature=1.3)
    for i, row in enumerate(rows):
        alone = naive_log_probs(model, row, temperature=1.3)
        torch.testing.assert_close(log_probs[i, : len(alone)], alone, rtol=0, atol=1e-5)
        assert (log_probs[i, len(alone) :] == 0).all()


# --- Loss -----------------------------------------------------------------------------------------
def tensors(*values):
    return [torch.tensor(v, dtype=F64, requires_grad=i == 0) for i, v in enumerate(values)]


def loss_of(ratio, advantage, eps=0.2, beta=0.0, ref_ratio=1.0):
    """The loss of one token, its gradient with respect to log pi_theta, and the statistics."""
    log_probs, old, ref = tensors(
        [[math.log(ratio) - 1.0]], [[-1.0]], [[math.log(ratio * ref_ratio) - 1.0]]
    )
    advantages, mask = torch.tensor([advantage], dtype=F64), torch.tensor([[True]])
    losses, statistics = cppo.cppo_loss(log_probs, old, ref, advantages, mask, eps, beta)
    losses.sum().backward()
    return losses.item(), log_probs.grad.item(), {k: v.item() for k, v in statistics.items()}


CLIPPED = [  # ratio, A, loss, its gradient, whether the clip holds it, why
    (1.0, 2.0, -2.0, -2.0, 0, "the loss is minus what the paper maximizes"),
    (1.1, 2.0, -2.2, -2.2, 0, "inside the clip the loss is -rho A"),
    (1.5, 2.0, -2.4, 0.0, 1, "above 1 + eps and wanted more: held at 1.2 A"),
    (1.5, -2.0, 3.0, 3.0, 0, "above 1 + eps but unwanted: min leaves it free to come back"),
    (0.5, -2.0, 1.6, 0.0, 1, "below 1 - eps and unwanted: held at 0.8 A"),
    (0.5, 2.0, -1.0, -1.0, 0, "below 1 - eps but wanted: min leaves it free to come back"),
    (1.5, 0.0, 0.0, 0.0, 0, "A = 0 pulls nowhere"),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "is_clipped", "why"), CLIPPED)
def test_the_clipped_loss_and_its_gradient_by_hand(
    ratio, advantage, loss, gradient, is_clipped, why
):
    got, grad, statistics = loss_of(ratio, advantage)
    assert got == pytest.approx(loss, abs=1e-12) and grad == pytest.approx(gradient, abs=1e-12), why
    assert statistics["clip_fraction"] == is_clipped, why


def test_the_kl_term_of_the_loss_and_its_gradient_by_hand():
    # pi_ref / pi_theta = 2: KL = 2 - log 2 - 1, d KL / d log pi_theta = 1 - 2
    got, grad, statistics = loss_of(1.0, 3.0, beta=0.04, ref_ratio=2.0)
    why = "KL = pi_ref / pi_theta - log(pi_ref / pi_theta) - 1, never below 0"
    assert statistics["kl"] == pytest.approx(1 - math.log(2), abs=1e-12), why
    assert got == pytest.approx(-(3.0 - 0.04 * (1 - math.log(2))), abs=1e-12)
    assert grad == pytest.approx(-(3.0 + 0.04 * (2 - 1)), abs=1e-12)
    assert loss_of(1.0, 3.0, beta=0.04)[2]["kl"] == pytest.approx(0, abs=1e-12)


def test_the_loss_averages_over_a_completions_own_tokens_and_the_caller_over_completions():
    # Lengths 1 and 3: every token of the short one weighs 1, of the long one 1/3. Padding nothing.
    log_probs, old = tensors([[0.0, 9.0, 9.0], [0.0, 0.0, 0.0]], [[0.0] * 3] * 2)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    losses, statistics = cppo.cppo_loss(
        log_probs, old, None, torch.tensor([2.0, -1.0], dtype=F64), mask, 0.2, 0.0
    )
    why = "1/|o_i| over a completion's own tokens, padding left out; 1/N is the caller's"
    assert losses.tolist() == [-2.0, 1.0] and losses.shape == statistics["kl"].shape == (2,), why
    losses.sum().backward()
    third = pytest.approx(1 / 3)
    assert log_probs.grad.tolist() == [[-2.0, 0.0, 0.0], [third, third, third]], why


def test_the_gradient_of_random_losses_is_the_papers_formula():
    # 1/|o_i| [rho A_i + beta (pi_ref / pi_theta - 1)], its sign turned, where nothing is clipped
    torch.manual_seed(0)
    old, ref = -torch.rand(6, 5, dtype=F64), -torch.rand(6, 5, dtype=F64)
    log_probs = (old + 0.1 * torch.rand(6, 5, dtype=F64)).requires_grad_()
    advantages, lengths = torch.randn(6, dtype=F64), torch.tensor([1, 2, 3, 4, 5, 5])
    mask = torch.arange(5) < lengths[:, None]
    losses, _ = cppo.cppo_loss(log_probs, old, ref, advantages, mask, 0.2, 0.3)
    losses.sum().backward()
    with torch.no_grad():
        ratio, ref_ratio = (log_probs - old).exp(), (ref - log_probs).exp()
        want = -(ratio * advantages[:, None] + 0.3 * (ref_ratio - 1)) * mask / lengths[:, None]
    torch.testing.assert_close(log_probs.grad, want)


# --- Update ---------------------------------------------------------------------------------------
@grades("advantages", "pruning", "masks", "loss", "refill")
def test_update_of_unpruned_groups_equals_a_naive_grpo():
    """P = 0 is GRPO: two groups of 4, one completion at a time, an old policy of its own."""
    model, eos = tiny("qwen2"), [1]
    settings = config(group_size=4, pruning_rate=0.0, max_grad_norm=0.5,
                      temperature=0.9, tokens_per_microbatch=20)  # fmt: skip
    torch.manual_seed(3)
    sampled = cppo.sample_completions(model, PROMPTS[:2], 4, 8, 0.9, eos)
    rewards = [[3.0, 1.0, 0.0, 1.0], [0.0, 2.5, 2.5, 0.0]]
    completions = [
        Completion(PROMPTS[i // 4], ids, lps, accuracy_reward=rewards[i // 4][i % 4])
        for i, (ids, lps) in enumerate(sampled)
    ]
    rows, ledger = cppo.collect_batch(lambda _: completions, stream(), 8, settings)
    ours, reference = copy.deepcopy(model), tiny("llama")
    cppo.update(ours, reference, *plain_sgd(ours), rows, ledger, settings)

    naive, old = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, _ = plain_sgd(naive)
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
                for t in range(len(row.token_ids)):
                    rho = torch.exp(lp[t] - lp_old[t])
                    kl = torch.exp(lp_ref[t] - lp[t]) - (lp_ref[t] - lp[t]) - 1
                    term = torch.min(rho * A[i], rho.clamp(0.8, 1.2) * A[i]) - 0.04 * kl
                    loss = loss - term / len(row.token_ids) / 4 / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(naive.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for a, b, start in zip(ours.parameters(), naive.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert (a - start).abs().max() > 1e-3  # both have moved


def test_update_reports_means_over_completions_and_iterations():
    rows, model = some_rows(6), tiny("llama")
    for row in rows:
        row.log_probs = (naive_log_probs(model, row, 1.0).detach() + 0.5).tolist()
    ledger = Counter(kept=6)
    settings = config(num_iterations=2, tokens_per_microbatch=30, learning_rate=1e-9)
    optimizer, schedule = cppo.make_optimizer(model, 1e-9, 4, 0.0)  # weights as good as fixed
    cppo.update(model, copy.deepcopy(model), optimizer, schedule, rows, ledger, settings)
    metrics = metrics_of(ledger)
    # ratio 1 and KL 0: each completion's loss is -A
    assert metrics["loss"] == pytest.approx(-sum(r.advantage for r in rows) / 6, abs=1e-5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6) and metrics["clip_fraction"] == 0
    assert metrics["sampling_gap"] == pytest.approx(0.5, abs=1e-5)
    packs = cppo.pack(rows, 30)
    widths = sum(len(p) * max(r.num_tokens for r in p) for p in packs)
    assert metrics["padded_tokens"] == widths - sum(r.num_tokens for r in rows)


def test_the_readmes_group_worked_by_hand():
    advantages = cppo.group_advantages(torch.tensor([[3.0, 1.0, 0.0, 0.0]], dtype=F64))
    mask = cppo.prune(advantages, config(group_size=4, pruning_rate=0.5).num_kept)
    assert mask.tolist() == [[True, False, True, False]]
    readme = (ROOT / "README.md").read_text()
    for i, A in enumerate(advantages[0].tolist(), 1):
        assert f"| $o_{i}$ | " in readme and f" | {A:.4f} | ".replace("0.0000", "0") in readme
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


def test_the_readmes_links_lead_to_the_functions_that_they_name():
    lines = (ROOT / "cppo.py").read_text().splitlines()
    links = re.findall(r"\[`?([^]`]+)`?\]\(cppo\.py#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 8
    for name, number in links:
        line = lines[int(number) - 1]
        assert re.match(rf"(def|class) {name}\b|# --- {name}", line), f"{name} is not at L{number}"


@pytest.mark.parametrize("tokens_per_microbatch", [1, 15, 40, 90])
def test_update_gives_the_same_gradient_for_any_split_into_micro_batches(tokens_per_microbatch):
    rows = some_rows(12)
    whole = gradients_of_update(rows, tokens_per_microbatch=10**6)
    split = gradients_of_update(rows, tokens_per_microbatch=tokens_per_microbatch)
    assert max(g.abs().max() for g in whole) > 1e-2
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_update_without_rows_leaves_the_weights_alone_even_with_momentum():
    model = tiny("llama")
    optimizer, schedule = cppo.make_optimizer(model, 1e-2, 8, 0.0)
    cppo.update(model, model, optimizer, schedule, some_rows(4), Counter(), config())
    before = copy.deepcopy(model.state_dict())
    assert cppo.update(model, model, optimizer, schedule, [], Counter(), config()) == 0
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_a_gradient_that_is_not_finite_names_its_question_and_leaves_the_weights_alone():
    model, reference = tiny("llama"), tiny("llama")
    rows = some_rows(8)
    rows[5].advantage = math.inf
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(cppo.NotFinite) as error:
        cppo.update(model, reference, *plain_sgd(model), rows, Counter(), config())
    assert error.value.args[0] == rows[5].prompt_ids
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_run_whose_gradient_is_not_finite_says_the_step_the_question_and_where_to_go_back_to(
    tmp_path, monkeypatch
):
    settings = config(
        output_dir=str(tmp_path / "run"), warm_start_steps=0, steps=3, batch_size=8, save_every=1,
        eval_questions=0, max_completion_tokens=4,
    )  # fmt: skip
    real, steps = cppo.group_advantages, itertools.count(1)
    monkeypatch.setattr(
        cppo, "group_advantages", lambda r: real(r) + (math.inf if next(steps) == 2 else 0)
    )
    with pytest.raises(UserError, match=r"step 2: .* question .*\d\d\+\d\d=.*run/checkpoint"):
        cppo.train(settings)
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [0, 1]
    cppo.load_model_and_tokenizer(str(tmp_path / "run/checkpoint"))


def test_a_batch_of_dead_groups_trains_on_nothing_says_so_and_goes_on(tmp_path):
    settings = config(
        output_dir=str(tmp_path / "run"), warm_start_steps=0, steps=2, batch_size=8, gamma=1e-3,
        eval_questions=0, max_completion_tokens=4,
    )  # fmt: skip
    cppo.train(settings)  # random weights: no reward at all
    _, *steps, _ = read_metrics(tmp_path / "run")
    assert len(steps) == 2
    for step in steps:
        assert step["kept"] == 0 and step["dead_groups"] == step["questions"] == 16
        assert step["refill_rounds"] == 4 and step["loss"] is None and step["grad_norm"] == 0


def test_the_learning_rate_rises_for_the_warm_up_and_falls_along_a_cosine():
    model = tiny("llama")
    optimizer, schedule = cppo.make_optimizer(model, 1.0, 20, 0.1)
    rates = []
    for _ in range(21):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[11] == pytest.approx(0.5) and rates[20] == pytest.approx(0)


def test_update_gives_the_same_gradient_on_two_ranks_with_unequal_rows_or_none(tmp_path):
    result = run("--worker", tmp_path, ranks=2, script=[__file__])
    assert result.returncode == 0, result.stderr
    for first in SPLITS:
        two_ranks = torch.load(tmp_path / f"{first}.pt", weights_only=True)
        for a, b in zip(gradients_of_update(some_rows(12)), two_ranks, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


SPLITS = 5, 12, 1  # of 12 rows, so many are the first rank's


def gradient_worker(folder: str):
    """One of two ranks: its share of the rows, in micro-batches of its own size."""
    rank, _, _ = cppo.init_distributed()
    for first in SPLITS:
        model, reference = tiny("llama"), tiny("llama")
        with torch.no_grad():
            for p in reference.parameters():
                p.mul_(1.1)
        before = [p.detach().clone() for p in model.parameters()]
        policy = torch.nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
        rows = some_rows(12)[:first] if rank == 0 else some_rows(12)[first:]
        settings = config(
            num_iterations=1, max_grad_norm=1e9, tokens_per_microbatch=15 + 20 * rank
        )  # fmt: skip
        cppo.update(policy, reference, *plain_sgd(policy), rows, Counter(), settings)
        if rank == 0:
            moved = [a - b.detach() for a, b in zip(before, model.parameters(), strict=True)]
            torch.save(moved, Path(folder, f"{first}.pt"))
    cppo.close_distributed()


# --- Precision ------------------------------------------------------------------------------------
def test_a_learning_rate_of_1e_6_moves_float32_masters_and_would_not_move_bfloat16_weights():
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama").to(dtype)
        before = copy.deepcopy(model)
        optimizer, schedule = cppo.make_optimizer(model, 1e-6, 2, 0.0)
        cppo.update(model, before, optimizer, schedule, some_rows(12), Counter(), config(beta=0.0))
        pairs = list(zip(model.parameters(), before.parameters(), strict=True))
        changed = sum((a != b).sum().item() for a, b in pairs)
        moved[dtype] = changed / sum(a.numel() for a, _ in pairs)
    assert moved[torch.float32] > 0.9  # all but embeddings of tokens that do not occur
    assert moved[torch.bfloat16] < 0.01


def test_bfloat16_computes_nearly_the_float32_gradient_and_keeps_it_in_float32():
    exact, rounded = (
        torch.cat([g.flatten() for g in gradients_of_update(some_rows(12), dtype=dtype)])
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99


def test_the_sampler_is_a_bfloat16_copy_that_follows_the_policy():
    model = tiny("qwen2")
    sampler = cppo.copy_for(model, "bfloat16")
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    cppo.refresh(sampler, model)
    for a, b in zip(sampler.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and not a.requires_grad
        assert torch.equal(a, b.bfloat16())
    torch.manual_seed(0)
    prompts = [p for p in PROMPTS for _ in range(4)]
    sampled = cppo.sample_completions(sampler, PROMPTS, 4, 12, 1.0, [1])
    rows = [Completion(p, ids, lps) for p, (ids, lps) in zip(prompts, sampled, strict=True)]
    ledger = Counter(kept=len(rows))
    settings = config(dtype="bfloat16", num_iterations=1)
    cppo.update(model, sampler, *plain_sgd(model), rows, ledger, settings)
    assert 1e-4 < metrics_of(ledger)["sampling_gap"] < 0.05  # bfloat16 has 3 digits


def test_a_bfloat16_copy_keeps_the_rotary_frequencies_in_float32():
    model = tiny("qwen2")
    buffers = dict(cppo.copy_for(model, "bfloat16").named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, x in model.named_buffers():  # rounded, they would turn far positions by a radian
        assert torch.equal(x, buffers[name]) and x.dtype == buffers[name].dtype


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradient_without_dropout(family):
    gradients = []
    for checkpointing in (False, True):
        model = tiny(family)  # GPT-2 would drop out a tenth of its activations in training
        calls = []
        first = (
            model.model.layers[0].self_attn if family == "qwen2" else model.transformer.h[0].attn
        )
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            cppo.trainable(model, gradient_checkpointing=True)
            sampler = cppo.copy_for(model, "float32")  # must still use a cache
            cppo.sample_completions(sampler, PROMPTS, 2, 4, 1.0, [1])
        calls.clear()
        cppo.token_log_probs(model, cppo.make_batch(some_rows(6)), 1.0).sum().backward()
        assert len(calls) == 1 + checkpointing  # computed again in the backward pass
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_kl_term_there_is_no_reference_model(tmp_path):
    assert cppo.load_reference(tiny("llama"), {}, tmp_path, config(beta=0.0)) is None
    assert cppo.load_reference(tiny("llama"), {}, tmp_path, config()) is not None


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_each_family_of_models_starts_at_ratio_1_and_moves(family, dtype):
    model = tiny(family)
    sampler, reference = cppo.copy_for(model, dtype), cppo.copy_for(model, dtype)
    settings = config(group_size=4, pruning_rate=0.5, dtype=dtype, num_iterations=1)
    torch.manual_seed(1)

    def draw(questions):
        prompts = [q.prompt_ids for q in questions]
        sampled = cppo.sample_completions(sampler, prompts, 4, 10, 1.0, [1])
        return [
            Completion(prompts[i // 4], ids, lps, accuracy_reward=float(len(ids) % 3))
            for i, (ids, lps) in enumerate(sampled)
        ]

    questions = iter([Question("", "", prompt_ids=p) for p in PROMPTS])
    rows, ledger = cppo.collect_batch(draw, questions, 8, settings)
    before = copy.deepcopy(model.state_dict())
    norm = cppo.update(model, reference, *plain_sgd(model), rows, ledger, settings)
    metrics = metrics_of(ledger)
    assert norm > 0 and len(rows) == 8 and metrics["clip_fraction"] == 0
    assert metrics["sampling_gap"] < (1e-5 if dtype == "float32" else 0.05)
    assert metrics["kl"] < (1e-6 if dtype == "float32" else 0.01)
    assert any(not torch.equal(before[name], x) for name, x in model.state_dict().items())


# --- Checkpoints ---------------------------------------------------------------------------------
def save_tiny(folder: Path, step: int):
    model, tokenizer = cppo.tiny_model_and_tokenizer()
    state = {"step": step, "ranks": [{}], "config": dataclasses.asdict(config())}
    cppo.save_folder(folder, model, tokenizer, state)


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_while_saving_leaves_a_whole_checkpoint(renames, tmp_path, monkeypatch):
    save_tiny(tmp_path / "checkpoint", step=1)
    done = itertools.count()
    rename = Path.rename

    def rename_or_crash(self, target):
        if next(done) == renames:
            raise KeyboardInterrupt
        return rename(self, target)

    for _ in range(2):  # it resumes, and crashes in its next save as well
        monkeypatch.setattr(Path, "rename", rename_or_crash)
        with pytest.raises(KeyboardInterrupt):
            save_tiny(tmp_path / "checkpoint", step=2)
        monkeypatch.undo()
        state = cppo.load_state(tmp_path, config(), 1)
        assert state["step"] == 1
        renames, done = 0, itertools.count()
    cppo.load_model_and_tokenizer(state["model"])
    save_tiny(tmp_path / "checkpoint", step=3)
    assert cppo.load_state(tmp_path, config(), 1)["step"] == 3


def test_a_truncated_checkpoint_is_one_line_that_names_it(tmp_path):
    save_tiny(tmp_path / "checkpoint", step=1)
    file = tmp_path / "checkpoint/trainer_state.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"--resume: .*checkpoint cannot be read, start anew"):
        cppo.load_state(tmp_path, config(), 1)
    save_tiny(tmp_path / "checkpoint", step=2)
    save_tiny(tmp_path / "checkpoint", step=3)
    hostile = f"cos\nsystem\n(S'touch {tmp_path / 'hacked'}'\ntR.".encode()  # a pickle of a call
    for content in (b"", b"PK half", pickle.dumps({"step": 1}), hostile):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"rename .*checkpoint.old, the one before it"):
            cppo.load_state(tmp_path, config(), 1)
    assert not (tmp_path / "hacked").exists()
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "checkpoint.old").rename(tmp_path / "checkpoint")
    assert cppo.load_state(tmp_path, config(), 1)["step"] == 2
    assert cppo.load_state(tmp_path / "nothing", config(), 1) == {}


def test_a_run_goes_on_only_with_the_ranks_and_the_settings_that_it_began_with(tmp_path):
    save_tiny(tmp_path / "checkpoint", step=1)
    cppo.load_state(tmp_path, config(output_dir="elsewhere", save_every=7, eval_every=3), 1)
    with pytest.raises(UserError, match="--resume: ranks was 1 in that run and is now 2"):
        cppo.load_state(tmp_path, config(), 2)
    with pytest.raises(UserError, match=r"--resume: beta was 0\.04 in that run and is now 0"):
        cppo.load_state(tmp_path, config(beta=0.0), 1)


# --- Evaluation and output ------------------------------------------------------------------------
def test_evaluation_scores_every_question_once_however_they_are_batched_and_sharded():
    model, tokenizer = cppo.tiny_model_and_tokenizer()
    torch.manual_seed(0)
    test = cppo.arithmetic_questions(None, "test")[:37]
    test = cppo.encode_prompts(test, tokenizer)
    settings = config(sample_batch=16)
    scores = [
        cppo.evaluate(model, tokenizer, test, rank, 3, settings)["eval_questions"]
        for rank in range(3)
    ]
    assert scores == [13, 12, 12]
    answers = {tuple(q.prompt_ids): q.answer for q in test}

    def teach(_model, prompts, group_size, *_):  # right for two questions of three
        ids = [tokenizer(right_form(answers[tuple(p)])).input_ids for p in prompts]
        return [(x if i % 3 else [1], [0.0] * len(x)) for i, x in enumerate(ids)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cppo, "sample_completions", teach)
        patch.setattr(tokenizer, "batch_decode", lambda ids, **_: [
            tokenizer.decode(x, skip_special_tokens=True).replace("hm", "") for x in ids
        ])  # fmt: skip
        score = cppo.evaluate(model, tokenizer, test, 0, 1, settings)
    assert score["eval_accuracy"] == 24 / 37 and score["eval_questions"] == 37


def test_evaluation_averages_over_the_samples_and_leaves_the_random_state_alone(monkeypatch):
    model, tokenizer = cppo.tiny_model_and_tokenizer()
    test = cppo.encode_prompts(cppo.arithmetic_questions(None, "test")[:5], tokenizer)
    seen = []

    def teach(_model, prompts, group_size, *options):
        seen.append((group_size, options[1], options[-1], torch.rand(1).item()))
        right = tokenizer("<answer>9</answer>").input_ids
        return [(right if i % 4 == 0 else [1], [0.0]) for i in range(4 * len(prompts))]

    monkeypatch.setattr(cppo, "sample_completions", teach)
    for question in test:
        question.answer = "9"
    settings = config(eval_samples=4, eval_temperature=0.6, eval_top_p=0.95)
    before = torch.get_rng_state()
    scores = []
    for _ in range(2):
        scores.append(cppo.evaluate(model, tokenizer, test, 0, 1, settings))
        assert torch.equal(before, torch.get_rng_state())
        before = (torch.rand(1), torch.get_rng_state())[1]  # training goes on
    assert [s["eval_accuracy"] for s in scores] == [0.25, 0.25] and scores[0]["eval_questions"] == 5
    assert seen[0][:3] == (4, 0.6, 0.95)
    assert seen[0] == seen[1]  # the same numbers each time


def test_the_sparkline_shows_the_mean_of_each_share():
    assert cppo.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert cppo.sparkline([0, 0, 7, 7], width=2) == "▁█"
    assert cppo.sparkline([2.0, 2.0]) == "▁▁"
    assert len(cppo.sparkline(list(range(1000)))) == 40


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


CLIPPED_HIGHER = [  # ratio, A, loss, with eps 0.2 and eps_high 0.28
    (1.25, 1.0, -1.25, "what does better may rise up to 1 + eps_high"),
    (1.5, 1.0, -1.28, "above 1 + eps_high it is held"),
    (0.75, -1.0, 0.8, "the lower bound stays 1 - eps: what does worse must not vanish"),
    (1.5, -1.0, 1.5, "min leaves it free to come back"),
    (0.5, 1.0, -0.5, "min leaves it free to come back"),
]


def test_clip_higher_lifts_the_upper_bound_alone():
    loss = extension("clip_higher_loss")
    for ratio, advantage, want, why in CLIPPED_HIGHER:
        log_probs, old = torch.tensor([[math.log(ratio)]], dtype=F64), torch.zeros(1, 1, dtype=F64)
        A, mask = torch.tensor([advantage], dtype=F64), torch.tensor([[True]])
        losses, _ = loss(log_probs, old, None, A, mask, 0.2, 0.0, 0.28)
        assert losses.tolist() == pytest.approx([want]), f"rho {ratio}, A {advantage}: {why}"
    # the rest is as in cppo_loss: KL, means over own tokens, gradient, statistics
    torch.manual_seed(0)
    old, ref = torch.randn(2, 6, 5, dtype=F64)
    log_probs = (old + 0.4 * torch.randn(6, 5, dtype=F64)).requires_grad_()
    A, lengths = torch.randn(6, dtype=F64), [1, 2, 3, 4, 5, 5]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    losses, statistics = loss(log_probs, old, ref, A, mask, 0.1, 0.04, 0.3)
    want, held, divergence = (torch.zeros(6, dtype=F64) for _ in range(3))
    for i, length in enumerate(lengths):
        for t in range(length):
            rho, log_ref = torch.exp(log_probs[i, t] - old[i, t]), ref[i, t] - log_probs[i, t]
            kl, clipped = torch.exp(log_ref) - log_ref - 1, rho.clamp(0.9, 1.3) * A[i]
            want[i] -= (torch.minimum(rho * A[i], clipped) - 0.04 * kl) / length
            held[i] += (clipped < rho * A[i]) / length
            divergence[i] += kl.detach() / length
    close(losses, want.detach(), "KL, 1/|o_i| and bounds that are given, as in cppo_loss")
    close(statistics["kl"], divergence, "kl: the mean over a completion's own tokens")
    close(statistics["clip_fraction"], held, "clip_fraction: the share of tokens held")
    gradients = (torch.autograd.grad(x.sum(), log_probs)[0] for x in (losses, want))
    close(*gradients, "the gradient flows through rho and KL")


def test_dr_grpo_divides_neither_by_the_std_nor_by_the_length():
    rewards = torch.tensor([[3.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=F64)
    got = extension("dr_grpo_advantages")(rewards)
    close(got, [[2, 0, -1, -1], [0] * 4], "A = r - mean(r), of each question's G, and no more")
    values = torch.tensor([[4.0, 9.0, 9.0], [1.0, 2.0, 3.0]], dtype=F64)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    for most in (8, 32):
        got = extension("dr_grpo_token_mean")(values, mask, most)
        lesson = "a sum over own tokens / max_completion_tokens, the same for all"
        close(got, [4 / most, 6 / most], lesson)


def top(score: torch.Tensor, k: int) -> torch.Tensor:
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(k).indices, True)


def prune_the_batch(advantages, k, gamma=0.0, by=""):
    return top(advantages.abs().flatten(), k * len(advantages)).view_as(advantages)


def prune_above_the_kth(advantages, k, gamma=0.0, by=""):
    return advantages.abs() >= advantages.abs().topk(k, dim=1).values[:, -1:].clamp(min=gamma)


def wrong_loss(fault: str):
    def loss(log_probs, old, ref, advantages, mask, eps, beta, eps_high=None):
        low, high = (eps_high, eps) if fault == "swapped" else (eps, eps_high or eps)
        low = high if fault == "both sides" else low
        high = eps if fault == "symmetric" else high
        A, ratio = advantages[:, None], torch.exp(log_probs - old)
        unclipped, clipped = ratio * A, ratio.clamp(1 - low, 1 + high) * A
        term = clipped if fault == "no min" else torch.minimum(unclipped, clipped)
        log_ref = torch.zeros_like(log_probs) if ref is None else ref - log_probs
        kl = -log_ref if fault == "log ratio" else log_ref.exp() - log_ref - 1
        losses = -(term - beta * kl) * mask * (-1 if fault == "sign" else 1)
        size = torch.full((len(mask),), mask.shape[1]) if fault == "padding" else mask.sum(1)
        losses = losses.sum(1) / (size if fault != "all tokens" else mask.sum() / len(mask))
        held = ((clipped < unclipped) * mask).sum(1) / mask.sum(1)
        return losses, {"kl": ((kl * mask).sum(1) / mask.sum(1)).detach(), "clip_fraction": held}

    return loss


def wrong_batch(fault: str):
    def make_batch(rows, device="cpu"):
        batch = RIGHT["make_batch"](rows, device)
        for i, row in enumerate(rows):
            n, start = len(row.token_ids), len(row.prompt_ids)
            if fault == "EOS":
                batch.mask[i, n - 1] = False
            elif fault == "value":
                batch.mask[i, :n] = torch.tensor(row.token_ids) != 0
            elif fault == "padding":
                batch.mask[i] = True
            elif fault == "shift":
                batch.predicts[i] = batch.predicts[i].roll(1)
            elif fault == "prompt":
                batch.predicts[i, :start] = True
        return batch

    return make_batch


def wrong_refill(fault: str):
    def collect_batch(draw, stream, room, config):
        G, kept, sampled, calls = config.group_size, [], [], 0
        while len(kept) < room and calls < (1 if fault == "one round" else 9):
            Q = room // G if fault == "GRPO" else config.questions_for(room - len(kept))
            some = draw(list(itertools.islice(stream, Q)))
            A = cppo.group_advantages(torch.tensor([c.reward for c in some]).double().view(-1, G))
            mask = cppo.prune(A, config.num_kept, config.gamma)
            if fault == "unpaired":
                A = A.T.reshape(A.shape)
            for c, a in zip(some, A.flatten().tolist(), strict=True):
                c.advantage = a
            new = [c for c, keep in zip(some, mask.flatten(), strict=True) if keep]
            if fault == "kept only":
                rewards = torch.tensor([c.reward for c in new]).double().view(-1, config.num_kept)
                for c, a in zip(new, cppo.group_advantages(rewards).flatten(), strict=True):
                    c.advantage = float(a)
            kept, sampled, calls = kept + new, sampled + some, calls + 1
        best = sorted(range(len(kept)), key=lambda i: -abs(kept[i].advantage))
        best = range(len(kept)) if fault == "first come" else best
        rows = kept if fault == "overfull" else [kept[i] for i in sorted(best[:room])]
        return rows, cppo.make_ledger(sampled, kept, rows, calls, G)

    return collect_batch


GRADERS = {
    "extract_answer": [test_answers_are_what_the_last_pair_of_tags_holds],
    "group_advantages": [test_advantages_by_hand],
    "prune": [
        test_pruning_keeps_the_k_largest_absolute_advantages_of_each_question,
        test_pruning_breaks_ties_to_the_lowest_index,
        test_pruning_with_gamma_keeps_at_most_k_and_none_below_it,
    ],
    "make_batch": [test_masks_of_a_batch_by_hand],
    "cppo_loss": [
        lambda: [test_the_clipped_loss_and_its_gradient_by_hand(*case) for case in CLIPPED],
        test_the_kl_term_of_the_loss_and_its_gradient_by_hand,
        test_the_loss_averages_over_a_completions_own_tokens_and_the_caller_over_completions,
    ],
    "collect_batch": [
        test_refill_fills_the_batch_exactly_with_k_of_each_of_1_over_1_minus_P_times_the_questions,
        test_refill_drops_the_lowest_absolute_advantages_where_the_last_questions_bring_too_many,
        test_refill_with_a_tiny_gamma_asks_again_in_place_of_dead_groups,
    ],
    "max_variance": [test_max_variance_keeps_the_k_rewards_of_a_question_that_differ_most],
    "clip_higher_loss": [test_clip_higher_lifts_the_upper_bound_alone],
    "dr_grpo_advantages": [test_dr_grpo_divides_neither_by_the_std_nor_by_the_length],
    "dr_grpo_token_mean": [test_dr_grpo_divides_neither_by_the_std_nor_by_the_length],
}
MISTAKES = [  # function, a plausible mistake in it, what the grader must say
    ("extract_answer", lambda t: t.partition("<answer>")[2].partition("</answer>")[0], "the last"),
    ("extract_answer", lambda t: (re.findall("(?s)<answer>(.*)</answer>", t) or [None])[0], "last"),
    ("extract_answer", lambda t: (re.findall(r"<answer>\s*(\d+)", t) or [None])[-1], "its sign"),
    ("extract_answer", lambda t: t.split("<answer>")[-1].split("</answer>")[0].strip(), "None"),
    ("group_advantages", lambda r: (r - r.mean()) / (r.std() + 1e-4), "each question's own"),
    ("group_advantages",
     lambda r: (r - r.mean(1)[:, None]) / (r.std(1, unbiased=False)[:, None] + 1e-4), "G - 1"),
    ("group_advantages", lambda r: (r - r.mean(1)[:, None]) / r.std(1)[:, None], "equal rewards"),
    ("group_advantages", lambda r: r - r.mean(1)[:, None], r"std sqrt\(6 / 3\)"),
    ("prune", lambda a, k, gamma=0.0, by="": top(a, k), "not A: the worst teach as much"),
    ("prune", prune_the_batch, "each question keeps k"),
    ("prune", prune_above_the_kth, "exactly k stay"),
    ("prune", lambda a, k, gamma=0.0, by="": RIGHT["prune"](a.flip(1), k).flip(1), "the first"),
    ("prune", lambda a, k, gamma=0.0, by="": RIGHT["prune"](a, k) & (a.abs() > gamma), "A = 0"),
    ("make_batch", wrong_batch("EOS"), "EOS is trained"),
    ("make_batch", wrong_batch("value"), "EOS is trained"),
    ("make_batch", wrong_batch("padding"), "padding is no token"),
    ("make_batch", wrong_batch("shift"), "predict the next one"),
    ("make_batch", wrong_batch("prompt"), "begins at the prompt's last token"),
    ("cppo_loss", wrong_loss("no min"), "min leaves it free"),
    ("cppo_loss", wrong_loss("sign"), "the loss is minus"),
    ("cppo_loss", wrong_loss("log ratio"), "never below 0"),
    ("cppo_loss", wrong_loss("padding"), "padding left out"),
    ("cppo_loss", wrong_loss("all tokens"), "a completion's own tokens"),
    ("collect_batch", wrong_refill("GRPO"), "takes 4 questions"),
    ("collect_batch", wrong_refill("kept only"), "before any is pruned"),
    ("collect_batch", wrong_refill("unpaired"), "stays with its completion"),
    ("collect_batch", wrong_refill("overfull"), "never more rows"),
    ("collect_batch", wrong_refill("one round"), "round after round"),
    ("collect_batch", wrong_refill("first come"), "the lowest .A. goes"),
    ("max_variance", lambda r, k: RIGHT["prune"](RIGHT["group_advantages"](r), k), "most variance"),
    ("max_variance", lambda r, k: top(r, k), "most variance"),
    ("max_variance", lambda r, k: top(r, k - k // 2) | top(-r, k // 2), "for the best i"),
    ("clip_higher_loss", wrong_loss("symmetric"), r"up to 1 \+ eps_high"),
    ("clip_higher_loss", wrong_loss("swapped"), r"up to 1 \+ eps_high"),
    ("clip_higher_loss", wrong_loss("both sides"), "the lower bound stays"),
    ("clip_higher_loss", wrong_loss("no min"), "free to come back"),
    ("dr_grpo_advantages", RIGHT["group_advantages"], "and no more"),
    ("dr_grpo_advantages", lambda r: r - r.mean(), "each question's G"),
    ("dr_grpo_advantages", lambda r: (r - r.mean(1)[:, None]) * 4 / 3, "and no more"),
    ("dr_grpo_token_mean", lambda v, m, most: RIGHT["token_mean"](v, m), "max_completion_tokens"),
    ("dr_grpo_token_mean", lambda v, m, most: (v * m).sum(1) / m.shape[1], "the same for all"),
    ("dr_grpo_token_mean", lambda v, m, most: v.sum(1) / most, "own tokens"),
]  # fmt: skip


def slow_max_variance(rewards, k):
    best = [
        max(itertools.combinations(range(len(r)), k), key=lambda s: r[list(s)].var(correction=0))
        for r in rewards
    ]
    return torch.zeros_like(rewards, dtype=torch.bool).scatter(1, torch.tensor(best), True)


SOLVED = RIGHT | {
    "max_variance": slow_max_variance, "clip_higher_loss": wrong_loss("nothing"),
    "dr_grpo_advantages": lambda r: r - r.mean(dim=1, keepdim=True),
    "dr_grpo_token_mean": lambda v, m, most: (v * m).sum(dim=1) / most,
}  # fmt: skip


@pytest.mark.parametrize("name", GRADERS, ids=range(len(GRADERS)))  # no words for -k
def test_the_graders_accept_a_right_solution(name, monkeypatch):
    for function in GRADERS:
        monkeypatch.setattr(cppo, function, SOLVED[function], raising=False)
    for grade in GRADERS[name]:
        grade()


@pytest.mark.parametrize(("name", "mistake", "lesson"), MISTAKES, ids=range(len(MISTAKES)))
def test_the_graders_catch_a_plausible_mistake_and_say_why(name, mistake, lesson, monkeypatch):
    for function in GRADERS:
        monkeypatch.setattr(cppo, function, SOLVED[function], raising=False)
    monkeypatch.setattr(cppo, name, mistake)
    with pytest.raises(AssertionError, match=lesson):
        for grade in GRADERS[name]:
            grade()


def test_each_exercise_has_three_plausible_mistakes_or_more():
    assert set(EXERCISES.values()) <= set(GRADERS)
    counts = Counter(name for name, _, _ in MISTAKES)
    assert all(counts[name] >= 3 for name in GRADERS)


# --- Whole runs, as a user runs them --------------------------------------------------------------
STEP_KEYS = """
    step epoch questions sampled kept dropped dead_groups refill_rounds reward accuracy format
    completion_tokens truncated sampled_tokens trained_tokens padded_tokens abs_advantage_kept
    abs_advantage_pruned loss kl clip_fraction grad_norm learning_rate sample_seconds train_seconds
    step_seconds wait_seconds""".split()


def without_seconds(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in m.items() if not k.endswith("_seconds")} for m in metrics]


@pytest.mark.slow
@grades("answers", "advantages", "pruning", "masks", "loss", "refill")
def test_the_main_job_learns_to_carry(tmp_path):
    result = run("--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cppo: task arithmetic")
    _, before, *steps, after = read_metrics(tmp_path / "run")
    assert len(steps) == 60 and all(set(STEP_KEYS) <= set(step) for step in steps)
    assert before["eval_questions"] == after["eval_questions"] == 512
    assert 0.4 <= before["eval_accuracy"] <= 0.8 and after["eval_accuracy"] >= 0.97
    assert all(step["kept"] == 16 and step["sampled"] == 8 * 16 for step in steps)
    assert steps[0]["learning_rate"] == 0 and steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert max(step["sampling_gap"] for step in steps) < 1e-4
    for step in steps:  # pruning kept what teaches most
        assert step["abs_advantage_kept"] > (step["abs_advantage_pruned"] or 0)
    for word in ("accuracy ", "questions ", "trained ", "seconds ", "reward ", "model "):
        assert f"\n{word}" in result.stdout
    assert json.loads((tmp_path / "run/config.json").read_text())["pruning_rate"] == 0.875
    # the checkpoint is a Hugging Face folder that answers sums
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/checkpoint")
    sums = cppo.arithmetic_questions(None, "test")[:16]
    ids = tokenizer([question.prompt for question in sums], return_tensors="pt").input_ids
    texts = tokenizer.batch_decode(model.generate(ids, max_new_tokens=32))
    answers = [cppo.extract_answer(text) for text in texts]
    assert sum(a == q.answer for a, q in zip(answers, sums, strict=True)) >= 14


@pytest.mark.slow
def test_gsm8k_trains_any_model_folder_on_any_file_in_the_models_chat_template(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<end>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}assistant:"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    tiny("llama", vocabulary=257).save_pretrained(tmp_path / "model")
    rows = [gsm8k_row(f"What is {i} + {i}?", f"It is {2 * i}.\n#### {2 * i}") for i in range(12)]
    (tmp_path / "long.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, gsm8k_row("?" * 999, "1")]))
    )
    result = run(
        "--model", tmp_path / "model", "--train_data", tmp_path / "long.jsonl",
        "--test_data", tmp_path / "long.jsonl", "--output_dir", tmp_path / "run",
        "--batch_size", 8, "--group_size", 4, "--pruning_rate", 0.5, "--max_completion_tokens", 8,
        "--max_prompt_tokens", 700, "--warm_start_steps", 1, "--warm_start_batch_size", 2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "1 with prompts over --max_prompt_tokens left out" in result.stdout
    _, before, *steps, after = read_metrics(tmp_path / "run")
    assert before["eval_questions"] == after["eval_questions"] == 13  # none is left out here
    assert [s["epoch"] for s in steps] == [1 / 3, 2 / 3, 1.0]  # --steps unset: one epoch


@pytest.mark.slow
def test_the_math_task_trains_and_evaluates_with_samples_from_files(math_verify, tmp_path):
    file = str(tmp_path / "math.jsonl")
    rows = [{"problem": f"{i} + 1", "solution": f"It is $\\boxed{{{i + 1}}}$."} for i in range(8)]
    Path(file).write_text("\n".join(map(json.dumps, rows)))
    for part in cppo.tiny_model_and_tokenizer():
        part.save_pretrained(tmp_path / "model")
    both = dict(task="math", model=str(tmp_path / "model"), test_data=file, eval_samples=4,
                eval_temperature=0.6, eval_top_p=0.95, max_completion_tokens=8)  # fmt: skip
    settings = Config(**both, train_data=file, output_dir=str(tmp_path / "run"), batch_size=8,
                      group_size=4, max_prompt_tokens=999, steps=1)  # fmt: skip
    cppo.train(settings)
    before, step, after = read_metrics(tmp_path / "run")
    assert step["kept"] == 8 and before["eval_questions"] == after["eval_questions"] == 8
    flags = [x for name, value in both.items() for x in (f"--{name}", value)]
    alone = run(*flags, "--eval_only", PYTHONPATH=math_verify)
    assert "accuracy   0.00% on 8 test questions, 4 samples each" in alone.stdout, alone.stderr


def test_help_explains_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cppo.py", "--help"])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit):
        cppo.main()
    text = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert f"  --{name}" in text
    for symbol in ("G:", "P:", "N:", "mu:", "eps:", "beta:", "k = floor(G (1 - P))"):
        assert symbol in text


@pytest.mark.slow
def test_the_benchmark_prints_the_papers_table_and_writes_nothing(tmp_path):
    options = "--warm_start_steps 1 --steps 2 --max_completion_tokens 8 --ignore_eos".split()
    result = run("--benchmark", *options, "--batch_size", 128, "--output_dir", tmp_path / "run")
    assert result.returncode == 0 and not (tmp_path / "run").exists(), result.stderr
    table = [line.split() for line in result.stdout.splitlines() if "x" in line and "%" in line]
    ledger = [[float(x) for x in row[:3]] for row in table]
    assert ledger == [[0, 16, 8], [0.5, 8, 16], [0.75, 4, 32], [0.875, 2, 64], [0.9375, 1, 128]]
    seconds, speedup, bound = (
        [float(r[i].rstrip("x")) for r in table] for i in (3, 4, 5)
    )  # fmt: skip
    for i in range(5):
        assert speedup[i] == pytest.approx(seconds[0] / seconds[i], rel=0.01)
        assert bound[i] > speedup[i]  # as if training took no time
    small = run("--benchmark", *options, "--group_size", 4, "--batch_size", 16)
    table = [line.split() for line in small.stdout.splitlines() if "x" in line and "%" in line]
    assert [row[1] for row in table] == ["4", "2", "1"]  # no k twice


def test_a_benchmark_step_does_all_the_work_and_leaves_the_weights_alone():
    model, tokenizer = cppo.tiny_model_and_tokenizer()
    before = [p.detach().clone() for p in model.parameters()]
    settings = config(
        benchmark=True, batch_size=32, max_completion_tokens=8, warm_start_steps=0
    )  # fmt: skip
    questions = cppo.encode_prompts([Question(f"1+{i}=", f"{i + 1}") for i in range(9)], tokenizer)
    learner = cppo.make_learner(model, tokenizer, questions, {}, None, 0.0, 1, settings)
    numbers = cppo.train_step(learner, 32, settings)
    assert learner.asked == numbers["questions"] == 16 and numbers["kept"] == 32
    assert learner.optimizer.state  # it has stepped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.slow
def test_the_readmes_own_task_learns_to_sort(tmp_path):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"(?s)```python\n(.*?)```", readme)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    (tmp_path / "sort_digits.py").write_text(code)
    script, folder = [str(tmp_path / "sort_digits.py")], tmp_path / "run"
    arguments = "--task", "sort", "--steps", 12, "--output_dir", folder
    result = run(*arguments, script=script, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    _, before, *steps, after = read_metrics(folder)
    assert before["eval_accuracy"] < 0.4  # a little for a digit in its place is not right
    assert all(step["reward"] > step["format"] + 2 * step["accuracy"] for step in steps)  # it pays
    assert after["eval_accuracy"] > before["eval_accuracy"] + 0.15  # half the steps, half the way


@pytest.mark.slow
def test_a_students_module_is_graded_in_place_of_cppo_py(tmp_path):
    readme = (ROOT / "README.md").read_text()
    code = readme[readme.index("    # mine.py\n") : readme.index("    CPPO_MODULE=mine pytest")]
    (tmp_path / "mine.py").write_text(code.replace("\n    ", "\n").strip() + "\n")
    student = {**os.environ, "CPPO_MODULE": "mine", "PYTHONPATH": str(tmp_path)}
    graded = subprocess.run(
        [sys.executable, "-m", "pytest", str(ROOT), "-p", "no:cacheprovider",
         "-k", "advantages and not slow"],
        capture_output=True, text=True, env=student,
    )  # fmt: skip
    (says,) = re.findall(r"AssertionError: (.*?) \.\.\.", readme)
    assert graded.returncode == 1 and "AssertionError: " + says in graded.stdout, graded.stdout
    # whole jobs run with it too
    mine = "def prune(*_, **__):\n    raise RuntimeError('it is mine')\n"
    (tmp_path / "mine.py").write_text(mine)
    script = [str(ROOT / "test_cppo.py"), "--main"]
    job = run(*RUN, "--output_dir", tmp_path / "run", script=script, **student)
    assert job.returncode == 1 and "RuntimeError: it is mine" in job.stderr


RUN = "--warm_start_steps 12 --steps 5 --save_every 1 --batch_size 32 --eval_questions 32".split()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The folder of a run of RUN on so many ranks that was never disturbed."""

    @functools.cache
    def folder(ranks: int) -> Path:
        path = tmp_path_factory.mktemp("whole") / "run"
        result = run(*RUN, "--output_dir", path, ranks=ranks)
        assert result.returncode == 0, result.stderr
        return path

    return folder


def assert_equal_runs(a: Path, b: Path):
    """The same metrics but for the seconds, and the same weights, bit for bit."""
    metrics, others = (without_seconds(read_metrics(folder)) for folder in (a, b))
    assert metrics == others and [m["step"] for m in others] == [0, 0, 1, 2, 3, 4, 5, 5]
    weights = [(f / "checkpoint/model.safetensors").read_bytes() for f in (a, b)]
    assert weights[0] == weights[1]


def start_process(*arguments, ranks: int = 1, launcher=(), **environment) -> subprocess.Popen:
    """A real process, left running."""
    launcher = launcher or [sys.executable, *SCRIPT]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={ranks}", *SCRIPT]  # fmt: skip
    return subprocess.Popen(
        [*launcher, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, **environment},
    )  # fmt: skip


def family_of(process: subprocess.Popen) -> list[int]:
    """Its process id and those of its descendants: torchrun's ranks, in sessions of their own."""
    everyone = [process.pid]
    for pid in everyone:
        listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True)
        everyone += map(int, listing.stdout.split())
    return everyone


def wait_for_step(process: subprocess.Popen, folder: Path, step: int):
    """Returns once metrics.jsonl has that step."""
    line, file = f'{{"step": {step}, "epoch"', folder / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and line in file.read_text()):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


@pytest.mark.slow
def test_the_same_command_gives_the_same_run_bit_for_bit(whole_run, tmp_path):
    assert run("--output_dir", tmp_path / "a", *RUN, "--save_every", 0).returncode == 0
    assert_equal_runs(whole_run(1), tmp_path / "a")


@pytest.mark.slow
def test_two_ranks_share_the_batch_and_the_test_questions(whole_run):
    _, before, *steps, after = read_metrics(whole_run(2))
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert before["eval_questions"] == after["eval_questions"] == 32
    assert all(s["kept"] == 32 and s["questions"] == 16 and s["ranks"] == 2 for s in steps)
    assert max(step["sampling_gap"] for step in steps) < 1e-4
    assert all(step["wait_seconds"] > 0 for step in steps)


def begun(file: Path, moment: float) -> bool:
    """Whether the file was written after that moment."""
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_mtime > moment
    return False


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_at_random_moments_resumes_bit_for_bit(ranks, whole_run, tmp_path):
    # CPPO_KILLS=50 pytest -k killed_at_random is the long form.
    kills, seed = int(os.environ.get("CPPO_KILLS", "2")), time.time_ns()
    print("seed", seed)  # shown if it fails
    rng, killed, saving, folder = random.Random(seed), 0, 0, tmp_path / "0"
    new = folder / "checkpoint.new"
    while True:
        begin = time.time()
        process = start_process(*RUN, "--output_dir", folder, "--resume", ranks=ranks)
        if killed < kills:
            while process.poll() is None and not begun(folder / "metrics.jsonl", begin):
                time.sleep(0.001)  # importing torch is not what this is about
            everyone = family_of(process)
            if killed % 2:
                time.sleep(rng.uniform(0, 1))
            else:  # while saving: model, tokenizer, state, fsync and renames take some 30 ms
                while process.poll() is None and not begun(new, begin):
                    time.sleep(0.0005)
                time.sleep(rng.uniform(0, 0.02))
            if process.poll() is None:
                for pid in everyone:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                killed += 1
                saving += begun(new, begin)
        output = process.communicate(timeout=100)
        if process.returncode == 0:
            assert_equal_runs(whole_run(ranks), folder)
            if killed == kills:
                break
            folder = tmp_path / str(killed)
            new = folder / "checkpoint.new"
        else:
            assert process.returncode == -signal.SIGKILL, output
    print(f"{killed} kills, {saving} of them while saving")


@pytest.mark.slow
def test_sigterm_and_ctrl_c_finish_the_step_and_save_and_the_run_goes_on(whole_run, tmp_path):
    folder = tmp_path / "run"
    never = [*RUN, "--save_every", 0, "--output_dir", folder, "--resume"]
    for number, step in ((signal.SIGTERM, 1), (signal.SIGINT, 3)):
        process = start_process(*never)
        wait_for_step(process, folder, step)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err  # 143 and 130
        done = read_metrics(folder)[-1]["step"]
        assert step <= done < 5 and f"stopped after step {done}, saved in {folder}" in out
        assert "Traceback" not in err
    last = run(*never)
    assert last.returncode == 0 and f"goes on after step {done}" in last.stdout, last.stderr
    assert_equal_runs(whole_run(1), folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accident", "says"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("return real(r) + float('inf')", "cppo.py: step 1: the gradient is not finite, at the"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_shown_and_ends_all(accident, says, tmp_path):
    script = tmp_path / "accident.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport cppo\n"
        f"real = cppo.group_advantages\ndef accident(r):\n    {accident}\n"
        "if os.environ['RANK'] == '1':\n    cppo.group_advantages = accident\ncppo.main()\n"
    )
    result = run(*RUN, "--output_dir", tmp_path / "run", script=[str(script)], ranks=2)
    assert result.returncode != 0 and says in result.stderr
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [0, 0]


@pytest.mark.slow
def test_run_multi_gpu_starts_again_by_itself_when_a_rank_dies(whole_run, tmp_path):
    folder = tmp_path / "run"
    script = [str(ROOT / "run_multi_gpu.sh")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = start_process(
        *RUN, "--output_dir", folder, launcher=script, NPROC="2", PATH=path
    )  # fmt: skip
    wait_for_step(process, folder, 2)
    ranks = [pid for pid in family_of(process) if pid != process.pid]
    os.kill(ranks[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "goes on after step" in out
    assert_equal_runs(whole_run(2), folder)


@pytest.mark.slow
def test_two_machines_of_one_rank_do_what_one_machine_of_two_ranks_does(whole_run, tmp_path):
    script = [str(ROOT / "run_multi_gpu.sh")]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    machines = [
        start_process(
            *RUN, "--output_dir", tmp_path / "run", launcher=script, NPROC="1", NNODES="2",
            NODE_RANK=str(i), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PATH=path,
            OMP_NUM_THREADS="1",
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert_equal_runs(whole_run(2), tmp_path / "run")


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path):
    folder = tmp_path
    save_tiny(folder / "checkpoint", step=1)
    before = {f: f.read_bytes() for f in (folder / "checkpoint").iterdir()}
    code = (
        "import resource, sys; sys.path.insert(0, {!r}); import cppo;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        "model, tokenizer = cppo.tiny_model_and_tokenizer();"
        "cppo.save_folder(cppo.Path({!r}), model, tokenizer)"
    ).format(str(ROOT), str(folder / "checkpoint"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "checkpoint cannot be written, what was there stays" in result.stderr
    assert {f: f.read_bytes() for f in (folder / "checkpoint").iterdir()} == before
    assert not (folder / "checkpoint.new").exists()


@pytest.mark.slow
def test_resume_without_a_checkpoint_starts_afresh_and_evaluation_alone_writes_nothing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "left": "over"}\n{"step": 1, "ep')
    short = [*RUN, "--steps", 1, "--eval_every", 1, "--output_dir", folder, "--resume"]
    assert run(*short).returncode == 0
    metrics = read_metrics(folder)
    assert [m["step"] for m in metrics] == [0, 0, 1, 1] and "left" not in metrics[0]
    files = sorted(folder.rglob("*"))
    alone = run("--eval_only", "--model", folder / "checkpoint", "--output_dir", folder,
                "--eval_questions", 32)  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    accuracy = metrics[-1]["eval_accuracy"]
    assert f"accuracy   {accuracy:.2%} on 32 test questions" in alone.stdout
    assert sorted(folder.rglob("*")) == files


if __name__ == "__main__" and sys.argv[1] == "--worker":
    gradient_worker(*sys.argv[2:])
elif __name__ == "__main__" and sys.argv.pop(1) == "--main":  # cppo.py with a student's functions
    cppo.main()
