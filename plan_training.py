#!/usr/bin/env python3
"""Says what hardware is here and what fits, and turns a run's configuration into its command.

    python plan_training.py launch configs/runs/sft.yaml             # trains on the GPUs found
    python plan_training.py launch configs/runs/sft.yaml --dry_run   # only shows what would run
    python plan_training.py plan configs/runs/gemma27b_2gpu.yaml     # what fits, steps, hours
    python plan_training.py memory configs/runs/sft.yaml --gpu H100 --gpus 4
    python plan_training.py hardware --use

A configuration is YAML or TOML; configs/runs/ has one for each recipe. Every key becomes a flag of
a training script or a fact of the launch (how many processes, which strategy), or is refused: none
is read and forgotten. The settings.yaml that a run leaves is such a file too.

This file knows hardware, sizes and commands, the training scripts know training, and the two speak
through command-line flags alone. It reads in this order: tables, configuration, hardware, memory,
launch, plan, commands, main.
"""

from __future__ import annotations

import argparse
import ast
import codecs
import difflib
import gzip
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent
GIB = 2**30

# ------------------------------------------------------------------------------------------------
# Tables to edit

SCRIPTS = {  # a task's training script
    "confidence": "train_confidence_lora.py",
    "sft": "train_language_model.py",
    "cpt": "train_language_model.py",
    "cpt_mixed": "train_language_model.py",
}
GLOBAL_BATCH = 128  # records in an update that the training scripts aim at when not told

# The last words of a key's path, and the training flag or the fact (see FACTS) that it means. A
# flag's own name needs no line: it is accepted in any section.
KEYS = {
    # the YAML of SFT-Play
    "model.name": "model_name",
    "model.max_seq_len": "max_seq_length",
    "task_mode": "task",
    "tuning.mode": "tuning",
    "tuning.backend": "backend",
    "lora.r": "lora_r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "target_modules",
    "train.epochs": "num_epochs",
    "train.grad_accum": "gradient_accumulation_steps",
    "train.eval_batch_size": "per_device_eval_batch_size",
    "train.evaluation_strategy": "eval_strategy",
    "train.generation_max_new_tokens": "max_new_tokens",
    "train.generation_num_beams": "num_beams",
    "data.train_path": "train_data",
    "data.val_path": "val_data",
    "data.chat_path": "chat_data",
    # the TOML of multi-GPU jobs
    "job.model": "model_name",
    "job.data": "train_data",
    "compute.nodes": "num_machines",
    "training.mode": "tuning",
    "validation.enabled": "validation",
    "validation.evaluation_strategy": "eval_strategy",
    "validation.save_best_model_at_end": "load_best_model_at_end",
    "hyperparameters.n_epochs": "num_epochs",
    "hyperparameters.per_device_batch": "batch_size",
    "hyperparameters.sequence_length": "max_seq_length",
    "hyperparameters.global_batch": "global_batch_size",
    "activation_checkpointing": "gradient_checkpointing",
    "auto_wrap": "auto_wrap_policy",
    # a GPT from scratch
    "model.seq_length": "max_seq_length",
    "training.epochs": "num_epochs",
    "training.gradient_clipping": "max_grad_norm",
    "training.save_interval": "save_steps",
    "training.log_interval": "logging_steps",
    "world_size": "num_processes",
    "node_rank": "machine_rank",
    "master_addr": "main_process_ip",
    "master_port": "main_process_port",
    "distributed.backend": "ddp_backend",
}
VALUES = {  # words for values that differ from the training scripts'
    "tuning": {"full_finetune": "full"},
    "backend": {"bnb": "hf"},
    "target_modules": {"auto": "all-linear"},
    "metric_for_best_model": {"val.loss": "eval_loss"},
    # YAML reads a bare no as false
    **{name: {"False": "no"} for name in ("eval_strategy", "save_strategy", "mixed_precision")},
}
FACTS = (  # what the launch itself makes use of
    "task tuning strategy num_processes num_machines machine_rank main_process_ip "
    "main_process_port max_restarts gpu_type gpu_count gpus_per_node use_qlora validation "
    "predict_with_generate "
    "target_tokens_per_device_step fsdp sharding_strategy auto_wrap_policy tensor_parallel_size "
    "pipeline_parallel_size use_deepspeed deepspeed_stage cpu_offload deepspeed mixed_precision"
).split()
PARALLELISM = FACTS[FACTS.index("fsdp") : FACTS.index("mixed_precision")]
MAY_BE_AUTO = {"batch_size", "gradient_accumulation_steps"}
COUNTS = MAY_BE_AUTO | set(
    "global_batch_size max_seq_length max_train_samples num_processes num_machines gpu_count "
    "gpus_per_node target_tokens_per_device_step tensor_parallel_size pipeline_parallel_size "
    "vocab_size hidden_size num_heads num_layers lora_r max_new_tokens".split()
)
FROM_ZERO = set("machine_rank main_process_port max_restarts".split())  # whole numbers
TRUE_OR_FALSE = set("use_qlora validation predict_with_generate use_deepspeed cpu_offload".split())
PATHS = set("model_name tokenizer_name train_data chat_data val_data output_dir".split())
MAX_FILE_BYTES = 2**20  # of a configuration, of DeepSpeed's and of a run's summary
MAX_NESTING, MAX_VALUES = 32, 10_000  # in such a file: sections within each other, values in all
MAX_TEXT = 4096  # characters of a value; a path cannot be longer
MAX_KEY = 200  # characters
MAX_NUMBER = 10**15
MAX_COUNT, MAX_LAYERS = 10**9, 1_000
MAX_UNPACKED, MAX_RATIO = 100 * 2**20, 100  # a .gz file may exceed either, in bytes, but not both
UNUSED = {"versions", "resolved"}  # what settings.yaml tells of its run; they do nothing here
CONFIDENCE_KEYS = {"adapter", "validation_answers", "calib_beta", "calib_p_norm", "fp8"}
SHAPE_KEYS = {"vocab_size", "hidden_size", "num_heads", "num_layers"}

STRATEGIES = {  # configs/strategies/NAME.yaml: what it divides among the processes
    "single": "",
    "ddp": "",
    "zero2": "gradients optimizer",
    "zero3": "weights gradients optimizer",
    "zero3_offload": "weights gradients optimizer",
    "fsdp2": "weights gradients optimizer",
    "tp": "weights gradients optimizer activations",
}
OPTIMIZER_BYTES = {"sgd": 0, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}  # else 8

GPU_TYPES = {  # GiB (an H200 "of 141 GB" has 143,771 MiB), and whether it computes in bfloat16
    "B200": (180, True),
    "H200": (141, True),
    "H100": (80, True),
    "A100-40GB": (40, True),
    "A100": (80, True),
    "L40S": (48, True),
    "A6000": (48, True),
    "RTX 4090": (24, True),
    "RTX 3090": (24, True),
    "A10": (24, True),
    "V100": (32, False),
    "T4": (16, False),
}
TEXT_FILES = (".txt", ".md", ".jsonl", ".jsonl.gz")  # what training reads of a folder
USABLE = 0.9  # of a GPU's memory; --batch_size auto stops there too

SHAPES = {  # so that these can be planned for without a download; a pattern of the name: its type,
    # vocabulary, hidden, intermediate, layers, heads, key-value heads, size of a head, tied or not
    r"Qwen/Qwen2\.5-7B(-Instruct)?": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    r"Qwen/Qwen2\.5-32B(-Instruct)?": ("qwen2", 152064, 5120, 27648, 64, 40, 8, 128, False),
    r"mistralai/Mistral-7B-(Instruct-)?v0\.[12]": (
        ("mistral", 32000, 4096, 14336, 32, 32, 8, 128, False)
    ),
    r"meta-llama/(Meta-)?Llama-3(\.[13])?-70B(-Instruct)?": (
        ("llama", 128256, 8192, 28672, 80, 64, 8, 128, False)
    ),
    r"google/gemma-2-27b(-it)?": ("gemma2", 256000, 4608, 36864, 46, 32, 16, 128, True),
}
SHAPE_WORDS = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim tie_word_embeddings"
).split()


class InputError(Exception):
    """Something the user can mend. The message says what, where and how; the exit code is 2."""


class UnknownModel(InputError):
    """A model whose size cannot be computed, since its configuration is not here."""


# ------------------------------------------------------------------------------------------------
# Configuration: a file's keys, and flags on the command line, as flags and facts


class Flag(NamedTuple):
    """A flag of a training script, as its --help tells of it."""

    name: str
    default: Any
    choices: tuple[str, ...]
    bare: bool  # takes no value
    several: bool  # takes a list of them


class Given(NamedTuple):
    value: Any
    where: str  # file, line and the key's path, or the flag on the command line


def read_flags(script: Path) -> dict[str, Flag]:
    """{each of its names: flag}, as `SCRIPT --help` lists them."""
    if not script.is_file():
        raise InputError(f"{script} does not exist: this task needs it")
    return ask_for_flags(script.resolve())


@lru_cache
def ask_for_flags(script: Path) -> dict[str, Flag]:
    shown = subprocess.run(
        [sys.executable, str(script), "--help"],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "9999"},
    )  # fmt: skip
    if shown.returncode:
        raise InputError(f"{script} --help fails: {shown.stderr.strip().splitlines()[-1]}")
    flags = {}
    for block in re.split(r"^  (?=-)", shown.stdout, flags=re.MULTILINE)[1:]:
        words = " ".join(block.split("\n\n")[0].split())
        invocation = re.split(r"\s{2,}|\n", block)[0]
        names = re.findall(r"--(\w+)", invocation)
        default = re.search(r"\(default: (.*?)\)$", words)
        choices = re.search(r"\{(.*?)\}", invocation)
        flag = Flag(
            names[0],
            plain(default[1]) if default else None,
            tuple(choices[1].split(",")) if choices else (),
            bare=all(word.startswith("-") for word in invocation.split()),
            several="..." in invocation,
        )
        flags |= dict.fromkeys(names, flag)
    return flags


def plain(value: Any) -> Any:
    """A value as Python has it: YAML reads 3e-4 as text, and so does a command line everything."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:  # which Python would take long over
        return value
    try:
        found = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value
    return found if isinstance(found, (int, float, list, dict, type(None))) else value


class Section(dict):
    """A part of a configuration, which knows the line of each of its keys."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}


ENCODINGS = {  # what a file in one of them begins with; UTF-32 first, as UTF-16 begins alike
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def read_text(path: Path) -> str:
    """A small file's text.

    Raises:
        InputError: if it cannot be read, is larger than MAX_FILE_BYTES or not in UTF-8.
    """
    if UNPRINTABLE.search(str(path)):
        raise InputError(f"{str(path)!r} has control characters in its name: rename it")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
            raise InputError(f"{str(path)!r} cannot be read: it is no file; give the path of one")
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise InputError(
            f"{path}:1: this file is larger than {MAX_FILE_BYTES >> 20} MiB: configs/runs/ shows "
            "what a configuration is"
        )
    for mark, encoding in ENCODINGS.items():
        if data.startswith(mark):
            raise InputError(f"{path}:1: this looks like {encoding}: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: this is not UTF-8: save the file as UTF-8") from error


def read_file(path: Path) -> Section:
    """The tree of a YAML or TOML file.

    Raises:
        InputError: with file and line, if it is none, gives a key twice, or is absurdly large.
    """
    text = read_text(path)
    tree = read_toml(path, text) if path.suffix == ".toml" else read_yaml(path, text)
    if not isinstance(tree, Section) or not tree:
        raise InputError(f"{path}:1: there are no keys: see configs/runs/ for examples")
    return tree


def add_key(section: Section, key: Any, value: Any, path: Path, line: int) -> None:
    """Puts a key into a section; refuses what is no name, and what is there already."""
    if not isinstance(key, str) or len(key) > MAX_KEY or UNPRINTABLE.search(key):
        raise InputError(
            f"{path}:{line}: {key!r:.40} is no name of a key: configs/runs/ shows them"
        )
    if key in section:
        raise InputError(
            f"{path}:{line}: {key} is given in line {section.lines[key]} too: leave one of them out"
        )
    section[key], section.lines[key] = value, line


def read_yaml(path: Path, text: str) -> Any:
    """What a YAML text holds; its mappings are Sections. Errors are those of read_file()."""
    import yaml

    depth, count, line = 0, 0, 1
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # before anything is built of it
            line = event.start_mark.line + 1
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            count += 1
            if getattr(event, "anchor", None):
                raise InputError(
                    f"{path}:{line}: & and * (anchor and alias) are not taken: write the value "
                    "out, or put it in quotes"
                )
            if depth > MAX_NESTING or count > MAX_VALUES:
                raise InputError(
                    f"{path}:{line}: more than {MAX_NESTING} levels or {MAX_VALUES:,} values: "
                    "configs/runs/ shows what a configuration is"
                )
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return yaml_value(path, loader, node) if node else None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # also of chr() and int() in it
        if mark := getattr(error, "problem_mark", None):
            line = mark.line + 1
        elif position := getattr(error, "position", None):
            line = text.count("\n", 0, position) + 1
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{path}:{line}: this is not YAML: {reason:.300}; mend it") from error


def yaml_value(path: Path, loader: Any, node: Any) -> Any:
    """What a node of YAML stands for, by the rules of the safe loader."""
    line, kind = node.start_mark.line + 1, node.tag.rpartition(":")[2]
    if isinstance(node.value, str):
        try:
            return loader.construct_object(node)
        except Exception as error:  # each type's constructor fails in its own way
            raise InputError(
                f"{path}:{line}: {node.value!r:.40} is no {kind:.40}: put text in quotes"
            ) from error
    if kind == "seq":
        return [yaml_value(path, loader, part) for part in node.value]
    if kind != "map":
        raise InputError(f"{path}:{line}: the type {node.tag:.40} is not taken: leave it out")
    section = Section()
    for key, value in node.value:
        name = yaml_value(path, loader, key) if isinstance(key.value, str) else key.value
        add_key(section, name, yaml_value(path, loader, value), path, key.start_mark.line + 1)
    return section


DEEP_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+)"""
    rf"{{{MAX_NESTING}}}"
)


def read_toml(path: Path, text: str) -> Section:
    """What a TOML text holds. Errors are those of read_file()."""
    deep = f"more than {MAX_NESTING} levels: configs/runs/ shows what a configuration is"
    if found := DEEP_KEY.search(text):  # tomllib takes hours for a key of a million parts
        raise InputError(f"{path}:{text.count(chr(10), 0, found.start()) + 1}: {deep}")
    try:
        tree = tomllib.loads(text)
    except RecursionError as error:
        raise InputError(f"{path}:1: {deep}") from error
    except ValueError as error:
        at = re.search(r"at line (\d+)", str(error))
        digits = re.search(r"[\d_]{4300}", text)  # which int() refuses
        end = digits.start() if digits else len(text)
        line = int(at[1]) if at else text.count("\n", 0, end) + 1
        raise InputError(f"{path}:{line}: this is not TOML: {error!s:.300}; mend it") from error
    lines, table = {}, ""
    for number, line in enumerate(text.split("\n"), 1):
        name, equals, _ = re.sub(r"[\s\"']", "", line).partition("=")
        if line.lstrip().startswith("["):
            name = name.lstrip("[").partition("]")[0]
            table = f"{name}."
            lines.setdefault(name, number)
        elif equals:
            lines.setdefault(table + name, number)
    return with_lines(tree, path, lines, "", 1)


def with_lines(
    tree: dict[str, Any], path: Path, lines: dict[str, int], above: str, line: int
) -> Section:
    """A tree of TOML as Sections. A key within a line has that line's number."""
    if above.count(".") > MAX_NESTING:
        raise InputError(f"{path}:{line}: more than {MAX_NESTING} levels: leave some out")
    section = Section()
    for key, value in tree.items():
        at = lines.get(f"{above}{key}", line)
        if isinstance(value, dict):
            value = with_lines(value, path, lines, f"{above}{key}.", at)
        add_key(section, key, value, path, at)
    return section


def leaves(tree: Section, file: str, above: str = "") -> Iterator[tuple[str, Any, str]]:
    """(path of the key, value, where it stands) of everything that is given; null and [] are not
    given."""
    for key, value in tree.items():
        path = f"{above}{key}"
        if path in UNUSED or value is None or (value == [] and key != "report_to"):
            continue
        if isinstance(value, Section) and not path.endswith(("_kwargs", "_config")):
            yield from leaves(value, file, f"{path}.")
        else:
            where = f"{file}:{tree.lines[key]}: {path}"
            yield path, "none" if value == [] else plain(value), where


def check_value(value: Any, where: str) -> None:
    """Refuses a value, or what a list or table holds, that no flag of any script takes."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, (list, dict)):
            parts += part if isinstance(part, list) else [*part, *part.values()]
        elif isinstance(part, str):
            if len(part) > MAX_TEXT or UNPRINTABLE.search(part):
                raise InputError(
                    f"{where} is longer than {MAX_TEXT:,} characters or has control characters: "
                    "give a line of text"
                )
        elif isinstance(part, (int, float)):  # not <=, which is false of NaN too
            if not abs(part) <= MAX_NUMBER:
                raise InputError(f"{where} is no number of at most {MAX_NUMBER:.0e}: give one")
        elif part is not None:
            kind = type(part).__name__
            raise InputError(f"{where} is a {kind}: give text in quotes, a number, true or false")


def meaning(path: str, flags: dict[str, Flag]) -> str | None:
    """The flag or fact that a key means, None if none. Longer ends of its path go first."""
    words = path.split(".")
    for start in range(len(words)):
        end = ".".join(words[start:])
        if end in KEYS:
            return KEYS[end]
    name = words[-1]
    if name in FACTS:
        return name
    return flags[name].name if name in flags else None


def transformers_flags() -> dict[str, bool]:
    """{flag: whether it takes a list} of what every training script takes besides; takes seconds,
    for rare keys."""
    from transformers import TrainingArguments

    # Not its fields' own types, which HfArgumentParser changes
    kinds = TrainingArguments.__annotations__
    return {name: "list" in str(kind) for name, kind in kinds.items() if not name.startswith("_")}


def nearest(path: str, names: list[str]) -> str:
    """The name that a mistyped key may have meant, as the end of a sentence."""
    section, _, leaf = path[-MAX_KEY:].rpartition(".")

    def likeness(name: str) -> float:
        above, _, last = name.rpartition(".")
        near = bool(above) and section.endswith(above)
        return difflib.SequenceMatcher(None, leaf, last).ratio() + 0.2 * near

    best = max(names, key=likeness)
    return f"did you mean {best}?" if likeness(best) > 0.6 else "configs/runs/ shows the keys"


def collect(
    items: list[tuple[str, Any, str]], flags: dict[str, Flag], script: str
) -> dict[str, Given]:
    """{flag or fact: what is given} of (path, value, where).

    Raises:
        InputError: on a key that means nothing, a value that is none for its key, or two keys that
            mean one thing differently.
    """
    given: dict[str, Given] = {}
    theirs: dict[str, bool] = {}
    for path, value, where in items:
        target = meaning(path, flags)
        if target not in (*FACTS, *flags):
            theirs = theirs or transformers_flags()
            name = target or path.rpartition(".")[2]
            if name not in theirs:
                if target:
                    raise InputError(f"{where} means --{target}, which {script} does not have")
                hint = nearest(path, [*KEYS, *FACTS, *flags, *theirs])
                raise InputError(f"{where} is no key this program knows: {hint}")
            target = name
        flag = flags.get(target)
        value = VALUES.get(target, {}).get(str(value), value)
        if isinstance(value, dict) and not path.endswith(("_kwargs", "_config")):
            raise InputError(f"{where} is a table: give a value")
        several = flag.several if flag else theirs.get(target, False)
        if isinstance(value, list) and not (
            several and all(isinstance(part, (str, int, float)) for part in value)
        ):
            raise InputError(f"{where} is a list: give {'a plain one' if several else 'one value'}")
        counts = type(value) is int and 0 < value <= MAX_COUNT
        if target in COUNTS and not (counts or (value == "auto" and target in MAY_BE_AUTO)):
            or_auto = " or auto" if target in MAY_BE_AUTO else ""
            raise InputError(f"{where} is {value!r}: give a whole number above 0{or_auto}")
        if target == "num_layers" and value > MAX_LAYERS:
            raise InputError(f"{where} is {value!r}: give at most {MAX_LAYERS:,}")
        if target in FROM_ZERO and not (type(value) is int and 0 <= value <= MAX_COUNT):
            raise InputError(f"{where} is {value!r}: give a whole number, 0 or more")
        if target in TRUE_OR_FALSE and not isinstance(value, bool):
            raise InputError(f"{where} is {value!r}: give true or false")
        if (
            flag
            and not flag.choices
            and target not in COUNTS
            and type(flag.default) in (int, float)
            and type(value) not in (int, float)
        ):
            raise InputError(f"{where} is {value!r}: give a number")
        if target in PATHS:
            value = [*map(str, value)] if isinstance(value, list) else str(value)
        if target in flags and (choices := flags[target].choices) and str(value) not in choices:
            raise InputError(f"{where} is {value!r}: give {' or '.join(choices)}")
        if target in given and given[target].value != value:
            one, other = value, given[target].value
            shown = (HIDDEN, HIDDEN) if is_secret(target) else (repr(one), repr(other))
            raise InputError(
                f"{where} is {shown[0]} and {given[target].where} is {shown[1]}, "
                "which mean the same: leave one of them out"
            )
        given.setdefault(target, Given(value, where))
    return given


def command_line_items(words: list[str]) -> list[tuple[str, Any, str]]:
    """Training flags behind the launcher's own: (name, value, where)."""
    items: list[tuple[str, Any, str]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            items.append((name, plain(value) if equals else True, f"--{name}"))
        elif not items:
            raise InputError(f"{word} is neither a flag nor a flag's value")
        else:
            name, held, where = items.pop()
            held = plain(word) if held is True else [*held, word] if isinstance(held, list) else \
                [str(held), word]  # fmt: skip
            items.append((name, held, where))
    return items


LAUNCH_FLAGS = (  # of this program's own command line, which are facts in a file
    "strategy num_processes num_machines machine_rank main_process_ip main_process_port "
    "max_restarts"
).split()


def find_task(items: list[tuple[str, Any, str]]) -> str:
    """The task named, or else the only one that the keys given can belong to."""
    for path, value, where in items:
        if meaning(path, {}) == "task":
            if not isinstance(value, str) or value not in SCRIPTS:
                raise InputError(f"{where} is {value!r}: give {', '.join(SCRIPTS)}")
            return value
    names = {path.rpartition(".")[2] for path, _, _ in items}
    return "confidence" if names & CONFIDENCE_KEYS else "cpt" if names & SHAPE_KEYS else "sft"


@dataclass
class Run:
    """A configuration as understood: what the training script is told, and facts of the launch."""

    file: str
    task: str
    script: Path
    flags: dict[str, Any]  # by the script's own names, as they will be on its command line
    defaults: dict[str, Any]  # the script's, of the flags that are not given
    facts: dict[str, Given]
    bare: set[str] = field(default_factory=set)  # flags without a value
    places: dict[str, str] = field(default_factory=dict)  # where each flag and fact is given

    def where(self, name: str) -> str:
        """Where a flag or fact is given, to begin an error with."""
        return self.places.get(name, f"{self.file}:1: {name}")

    def get(self, name: str) -> Any:
        """A flag's value, whether it is given or the script's default."""
        return self.flags.get(name, self.defaults.get(name))

    def fact(self, name: str, default: Any = None) -> Any:
        return self.facts[name].value if name in self.facts else default


def read_run(
    path: str, options: argparse.Namespace, root: Path = ROOT, must_exist: bool = False
) -> Run:
    """A configuration file, with what the command line puts above it. `must_exist`: its data.

    Raises:
        InputError: naming file, key and remedy.
    """
    in_file = list(leaves(read_file(Path(path)), path))
    above = command_line_items(options.training_flags)
    for name, key in [("dataset", "train_data"), ("examples", "max_train_samples")]:
        if getattr(options, name, None) is not None:
            above.append((key, getattr(options, name), f"--{name}"))
    for name in LAUNCH_FLAGS:
        if getattr(options, name, None) is not None:
            above.append((name, getattr(options, name), f"--{name}"))
    if getattr(options, "deepspeed_config", None):
        above.append(("deepspeed", options.deepspeed_config, "--deepspeed_config"))

    for _, value, where in [*above, *in_file]:
        check_value(value, where)
    task = find_task([*above, *in_file])
    script = root / SCRIPTS[task]
    known = read_flags(script)
    stronger = collect(above, known, script.name)
    given = collect(in_file, known, script.name)
    if stronger.keys() & {"strategy", "deepspeed"}:
        for name in (*PARALLELISM, "strategy"):
            given.pop(name, None)
    if stronger.keys() & {"num_processes", "num_machines"}:
        for name in "num_processes gpu_count gpus_per_node num_machines".split():
            given.pop(name, None)
    if stronger.keys() & {"batch_size", "gradient_accumulation_steps", "global_batch_size"}:
        given.pop("target_tokens_per_device_step", None)
    given |= stronger

    places = {name: where for name, (_, where) in given.items()}
    facts = {name: given.pop(name) for name in FACTS if name in given}
    run = Run(
        file=path,
        task=task,
        script=script,
        flags={name: value for name, (value, _) in given.items()},
        defaults={flag.name: flag.default for flag in known.values()},
        facts=facts,
        bare={flag.name for flag in known.values() if flag.bare},
        places=places,
    )
    decide_tuning(run, known)
    decide_precision(run)
    decide_evaluation(run, known)
    check_data(run, must_exist)
    return run


def put(run: Run, name: str, value: Any, fact: str) -> None:
    """Has a fact set a flag; refuses it if the flag is given otherwise."""
    if run.flags.setdefault(name, value) != value:
        raise InputError(
            f"{run.facts[fact].where} means {name}: {value}, which is given as {run.flags[name]}: "
            "leave one of them out"
        )


def decide_tuning(run: Run, known: dict[str, Flag]) -> None:
    """lora, qlora, full or scratch, of a mode and use_qlora, in the script's own flags."""
    mode = run.fact("tuning", "scratch" if run.flags.keys() & SHAPE_KEYS else "lora")
    if mode not in ("lora", "qlora", "full", "scratch"):
        raise InputError(f"{run.facts['tuning'].where} is {mode!r}: give lora, qlora or full")
    if run.fact("use_qlora") and mode in ("full", "scratch"):
        raise InputError(
            f"{run.facts['use_qlora'].where} is true and the mode is {mode}: quantised weights "
            "cannot be trained themselves, so give mode lora or leave use_qlora out"
        )
    if run.fact("use_qlora") is False and mode == "qlora":
        raise InputError(
            f"{run.facts['use_qlora'].where} is false and the mode is qlora: leave one of them out"
        )
    if run.fact("use_qlora"):
        mode = "qlora"
    if "tuning" in known:
        run.flags["tuning"] = mode
        run.flags["task"] = run.task
    elif mode in ("full", "scratch"):
        raise InputError(
            f"{run.where('tuning')}: mode {mode} is not for task {run.task}, which trains a LoRA: "
            "give mode lora, or another task"
        )
    elif mode == "qlora" and not run.flags.get("load_in_8bit"):
        put(run, "load_in_4bit", True, "use_qlora" if "use_qlora" in run.facts else "tuning")


def decide_precision(run: Run) -> None:
    if word := run.fact("mixed_precision"):
        if word not in ("bf16", "fp16", "no"):
            raise InputError(
                f"{run.facts['mixed_precision'].where} is {word!r}: give bf16, fp16 or no"
            )
        for name in ("bf16", "fp16"):
            put(run, name, name == word, "mixed_precision")
    if run.flags.get("bf16") is True and run.flags.get("fp16") is True:
        raise InputError(f"{run.where('bf16')}: bf16 and fp16 are both true: give one of them")


def decide_evaluation(run: Run, known: dict[str, Flag]) -> None:
    """By generation, by loss or not at all, in the script's own flags."""
    by_generation, enabled = run.fact("predict_with_generate"), run.fact("validation")
    if enabled is False:
        put(run, "eval_strategy", "no", "validation")
    if run.flags.get("eval_strategy") == "no":
        if by_generation:
            raise InputError(
                f"{run.facts['predict_with_generate'].where} is true and validation is off: leave "
                "one of them out"
            )
        if "evaluation" in known and run.flags.setdefault("evaluation", "off") != "off":
            raise InputError(
                f"{run.where('evaluation')} is {run.flags['evaluation']} and eval_strategy is no: "
                "leave one of them out"
            )
    elif by_generation is not None:
        name, words = (
            ("evaluation", ("loss", "generate"))
            if "evaluation" in known
            else ("validation_answers", ("recorded", "generate"))
        )
        put(run, name, words[bool(by_generation)], "predict_with_generate")


def check_data(run: Run, must_exist: bool) -> None:
    """Names a confidence run's validation sets; refuses files that must be there and are not."""
    if run.task == "cpt_mixed" and not run.get("chat_data"):
        where = run.where("task")
        raise InputError(f"{where} is cpt_mixed, which needs chats beside texts: give chat_data")
    for name in ("train_data", "chat_data", "val_data"):
        held = run.get(name)
        for item in held if isinstance(held, list) else [held] if held else []:
            label, _, path = item.rpartition("=")
            if name == "val_data" and run.task == "confidence":
                if not label:  # the script wants a name for each set
                    run.flags[name] = f"{Path(item).stem.partition('.')[0]}={item}"
                if ":" in path:
                    continue  # of the Hugging Face Hub
            if must_exist and not os.path.exists(path):
                remedy = "name another with --dataset" if name == "train_data" else \
                    f"name another with --{name}"  # fmt: skip
                made = " (tag_answers.py makes it)" if run.task == "confidence" else ""
                where = run.where(name)
                raise InputError(f"{where}: {name} {path} does not exist{made}: {remedy}")


# ------------------------------------------------------------------------------------------------
# Hardware


class Gpu(NamedTuple):
    name: str
    memory: int  # bytes
    bf16: bool
    capability: str | None = None  # of the CUDA architecture, like 9.0
    free: int | None = None  # bytes; None of a GPU that is only named
    used_here: int | None = None  # bytes


class Hardware(NamedTuple):
    gpus: list[Gpu]
    cores: int = 1
    memory: int = 0  # bytes
    disk_free: int = 0  # bytes, where checkpoints/ is


def find_hardware() -> Hardware:
    """What this machine has. Importing torch takes a second or two."""
    import psutil
    import torch

    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        with torch.cuda.device(i):
            free, total = torch.cuda.mem_get_info(i)
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append(Gpu(properties.name, total, bf16, capability, free, total - free))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory, disk = psutil.virtual_memory().total, shutil.disk_usage(ROOT).free
    return Hardware(gpus, cores or 1, memory, disk)


def gpu_of_type(name: str, where: str) -> Gpu:
    """A GPU of the table, by a name that holds one of the table's."""
    for known in sorted(GPU_TYPES, key=len, reverse=True):
        if known.lower().replace(" ", "") in re.sub(r"[\s_]", "", name.lower()):
            memory, bf16 = GPU_TYPES[known]
            return Gpu(known, memory * GIB, bf16)
    raise InputError(f"{where} is {name!r}: give one of {', '.join(GPU_TYPES)}")


def planned_gpu(run: Run, options: argparse.Namespace, here: Hardware) -> Gpu | None:
    """The kind of GPU to plan for: --gpu, the variable GPU_TYPE, the file's gpu_type, or what is
    here, in this order; None if there is none."""
    if getattr(options, "gpu", None):
        return gpu_of_type(options.gpu, "--gpu")
    if os.environ.get("GPU_TYPE"):
        return gpu_of_type(os.environ["GPU_TYPE"], "the environment variable GPU_TYPE")
    if run.fact("gpu_type"):
        return gpu_of_type(str(run.fact("gpu_type")), run.facts["gpu_type"].where)
    return min(here.gpus, key=lambda gpu: gpu.memory, default=None)


# ------------------------------------------------------------------------------------------------
# Memory: the model's size, and what each strategy holds of it on a GPU


class Size(NamedTuple):
    """What memory depends on in a model. Counts of numbers, except where bytes are said."""

    config: Any
    parameters: int
    weights: int  # bytes as they are held before a strategy divides them
    trained: int
    trained_tensors: int
    linear: int  # in the linear layers but the head: what tensor parallelism cuts
    layer: int  # in one transformer layer
    outside: int  # in embedding and head


def model_config(run: Run) -> Any:
    """The model's transformers configuration: of the flags, a folder, the cache, or SHAPES.

    Raises:
        InputError: if it is in none of them and cannot be fetched.
    """
    from transformers import AutoConfig

    if run.flags.get("tuning") == "scratch":
        if run.get("hidden_size") % run.get("num_heads"):
            raise InputError(
                f"{run.where('hidden_size')} is {run.get('hidden_size')}, which cannot be divided "
                f"among num_heads {run.get('num_heads')}: change one of them"
            )
        return AutoConfig.for_model(
            run.get("model_type") or "llama",
            vocab_size=math.ceil(run.get("vocab_size") / 64) * 64,
            tie_word_embeddings=True,
            hidden_size=run.get("hidden_size"),
            intermediate_size=math.ceil(run.get("hidden_size") * 8 / 3 / 64) * 64,
            num_attention_heads=run.get("num_heads"),
            num_key_value_heads=run.get("num_heads"),
            num_hidden_layers=run.get("num_layers"),
            max_position_embeddings=run.get("max_seq_length"),
        )
    name = run.get("model_name")
    trust = bool(run.get("trust_remote_code"))
    for pattern, shape in [] if os.path.isdir(name) else SHAPES.items():
        if re.fullmatch(pattern, name):
            return AutoConfig.for_model(**dict(zip(SHAPE_WORDS, shape)))
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise UnknownModel(
            f"{run.where('model_name')}: the size of model {name} is not known: give a folder that "
            f"holds its config.json, fetch that file with `hf download {name} config.json`, or add "
            "the shape to SHAPES in plan_training.py"
        ) from error


def quantised_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Bytes of a weight in bitsandbytes' 8 bits (a scale for each row) or 4 (NF4, doubly quantised:
    64 numbers share a scale of 8 bits, 256 of those a float32; two tables and an offset)."""
    count = math.prod(shape)
    if bits == 8:
        return count + 4 * shape[0]
    blocks = math.ceil(count / 64)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def count_model(
    config: Any,
    tuning: str,
    bytes_a_weight: int,
    bits: int | None = None,
    lora_r: int = 16,
    target_modules: str | list[str] = "all-linear",
    trust_remote_code: bool = False,
) -> Size:
    """The size of a model, built for real but on PyTorch's meta device, which holds no numbers.

    Args:
        tuning: lora or qlora (adapters are float32), full or scratch (so are all weights).
        bytes_a_weight: of frozen weights that are not quantised.
        bits: 8 or 4 of quantised linear layers.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    linear = {
        module.weight: module.weight.shape
        for module in model.modules()
        if type(module) is torch.nn.Linear and module is not head
    }
    everything = list(model.parameters())  # what is tied is counted once
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(lists, key=lambda part: sum(p.numel() for p in part.parameters()))
    embedding = model.get_input_embeddings().weight
    outside = {embedding, head.weight}
    if tuning in ("full", "scratch"):
        weights, trained = 4 * sum(p.numel() for p in everything), everything
    else:
        from peft import LoraConfig, get_peft_model

        weights = sum(
            quantised_bytes(tuple(p.shape), bits)
            if bits and p in linear
            else bytes_a_weight * p.numel()
            for p in everything
        )
        adapter = LoraConfig(task_type="CAUSAL_LM", r=lora_r, target_modules=target_modules)
        wrapped = get_peft_model(model, adapter, low_cpu_mem_usage=True)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
    return Size(
        config=config.get_text_config(),
        parameters=sum(p.numel() for p in everything),
        weights=weights,
        trained=sum(p.numel() for p in trained),
        trained_tensors=len(trained),
        linear=sum(math.prod(shape) for shape in linear.values()),
        layer=max(sum(p.numel() for p in part.parameters()) for part in layers),
        outside=sum(p.numel() for p in outside),
    )


def activation_bytes(
    config: Any, tuning: str, half: bool, lora_r: int = 16, scores: int = 0
) -> tuple[int, int]:
    """Bytes that autograd keeps of a token for the backward pass: (in a layer, at a layer's input).

    The second is what gradient checkpointing keeps. Counted term by term as in Korthikanti et al.
    (arXiv 2205.05198, section 4) for today's layers: RMSNorm, which works in float32, grouped
    queries, a gated MLP, and an attention kernel that keeps no length × length matrix; if it does
    (eager), `scores` is the length. LoRA layers are the training script's lean ones, or PEFT's
    around quantised weights.
    """
    h, f = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or h // heads
    q = heads * size
    kv = 2 * (getattr(config, "num_key_value_heads", None) or heads) * size
    e = 2 if half else 4
    attention = e * (q + kv)  # what the kernel keeps of queries, keys and values
    attention += (4 + 2 * e) * heads * scores  # softmax in float32, its result, and the scores
    if tuning in ("full", "scratch"):
        if half:  # norms: input and output in float32; a bfloat16 copy for each of the products
            return 16 * h + attention + 2 * (5 * h + q) + 2 * 4 * f, 4 * h
        return 16 * h + attention + 4 * (2 * h + q) + 4 * 4 * f, 4 * h
    if tuning == "qlora":  # PEFT's layers copy their input for the adapter
        return 8 * h + attention + e * (5 * h + 2 * q) + e * 3 * f + 7 * e * lora_r, e * h
    return 8 * h + attention + e * (2 * h + q) + e * 3 * f + 7 * e * lora_r, e * h


LOGITS_AT_ONCE = 1024  # positions whose logits sft and cpt hold, in a batch of any size


@dataclass
class Memory:
    """Computes bytes on each GPU for one run, part by part.

    What is held, by AdamW in transformers' Trainer (two float32 moments of each trained number):
      LoRA: frozen weights in bfloat16 or quantised; adapter and its gradients in float32.
      Full: weights and gradients in float32, under autocast to bfloat16. DeepSpeed in bfloat16
        holds weights and gradients in 2 bytes, and float32 copies beside the moments.
    Not counted: the CUDA context and NCCL's buffers (1 to 2 GiB), fragmentation, rows of tag tokens
    (kilobytes), and experts of mixture models beyond their weights. Hence only USABLE of a GPU is
    planned with. `--batch_size auto` measures, and overrules what is said here.
    """

    size: Size
    tuning: str
    half: bool
    length: int  # tokens of the longest sequence
    lora_r: int = 16
    optimizer: int = 8  # bytes a trained number
    activated: bool = False  # adapter: prompt and answer need no gradient
    labels: int | None = None  # positions of a record whose logits are held; None: as sft and cpt
    eager: bool = False  # attention that keeps every score

    def parts(self, strategy: str, processes: int, batch: int, checkpointing: bool) -> dict:
        """{part: bytes} on each GPU, with `batch` records of the greatest length at a time."""
        size, divided = self.size, STRATEGIES[strategy].split()
        trained, deepspeed = size.trained, strategy.startswith("zero")
        full = self.tuning in ("full", "scratch")
        element = 2 if self.half else 4
        held = element if deepspeed else 4  # bytes of a trained number and of its gradient
        base = held * size.parameters if full else size.weights
        adapter = 0 if full else held * trained
        gradients = held * trained
        optimizer = self.optimizer * trained + 4 * size.trained_tensors  # its count of steps
        if deepspeed:
            optimizer += 4 * trained  # the float32 copy that is really trained
        share = {part: processes if part in divided else 1 for part in ("weights", "gradients",
                 "optimizer", "activations")}  # fmt: skip
        if strategy == "tp":  # only the linear layers are cut
            cut = size.linear / size.parameters
            share = dict.fromkeys(share, 1 / (1 - cut + cut / processes))

        buffers = 0
        if strategy == "ddp" and processes > 1:
            buffers += 4 * trained  # buckets in which gradients are averaged
        if deepspeed:
            buffers += 2 * min(5 * 10**8, trained) * element  # reduce and gather, its defaults
        if strategy.startswith("zero3"):
            buffers += min(10**9, size.parameters) * element  # stage3_max_live_parameters
        if strategy == "fsdp2":  # this layer, the next, and embedding and head, gathered
            buffers += (2 * size.layer + size.outside) * element
        if full and self.half and not deepspeed and strategy != "fsdp2":
            buffers += 2 * (size.linear + size.outside) // share["weights"]  # autocast's copies

        positions = min(LOGITS_AT_ONCE, batch * self.length)
        if self.labels is not None:
            positions = batch * self.labels
        parts = {
            "weights": base / share["weights"],
            "adapter": adapter / share["weights"],
            "gradients": gradients / share["gradients"],
            "optimizer": optimizer / share["optimizer"],
            "activations": self.activations(batch, checkpointing) / share["activations"],
            "logits": positions * size.config.vocab_size * (element + 8),
            "buffers": buffers,
        }
        if strategy == "zero3_offload":
            parts["main memory"] = sum(parts[name] for name in ("weights", "adapter", "optimizer"))
            parts |= {"weights": 0, "adapter": 0, "optimizer": 0}
        return {name: int(count) for name, count in parts.items()}

    def activations(self, batch: int, checkpointing: bool) -> float:
        config, tokens = self.size.config, batch * self.length
        whole, boundary = activation_bytes(
            config, self.tuning, self.half, self.lora_r, self.length if self.eager else 0
        )
        if self.activated:  # keys and values of all layers, and one layer at work
            heads = config.num_attention_heads
            size = getattr(config, "head_dim", None) or config.hidden_size // heads
            kv = 2 * (getattr(config, "num_key_value_heads", None) or heads) * size
            return tokens * ((2 if self.half else 4) * kv * config.num_hidden_layers + whole)
        if checkpointing:
            return tokens * (boundary * config.num_hidden_layers + whole)
        return tokens * whole * config.num_hidden_layers

    def on_gpu(self, strategy: str, processes: int, batch: int, checkpointing: bool) -> int:
        parts = self.parts(strategy, processes, batch, checkpointing)
        return sum(count for name, count in parts.items() if name != "main memory")


def measure_run(run: Run, half: bool) -> Memory:
    """What a run's memory is computed from. Builds the model without its numbers: seconds."""
    tuning = run.flags.get("tuning", "lora")
    bits = 8 if run.get("load_in_8bit") else 4 if run.get("load_in_4bit") else None
    if tuning == "qlora":
        bits = bits or 4
    modules = run.get("target_modules") or "all-linear"
    modules = modules if isinstance(modules, list) else [modules]
    if modules == ["all-linear"]:
        modules = "all-linear"
    try:
        size = count_model(
            model_config(run),
            tuning,
            2 if half else 4,
            bits,
            run.get("lora_r"),
            modules,
            bool(run.get("trust_remote_code")),
        )
    except InputError:
        raise
    except Exception as error:  # transformers and peft refuse sizes and modules in many ways
        likely = "target_modules model_type hidden_size num_layers num_heads vocab_size"
        known = [name for name in likely.split() if name in run.flags]
        where = run.where(known[0] if known else "model_name")
        reason = " ".join(str(error).split())
        raise InputError(
            f"{where}: no such model can be built: {reason:.300}; change it"
        ) from error
    length, activated = run.get("max_seq_length"), run.get("adapter") == "activated"
    answer = min(run.get("max_new_tokens"), length)  # tokens; marker and tag are held too
    return Memory(
        size,
        "qlora" if bits else tuning,
        half,
        length,
        run.get("lora_r"),
        OPTIMIZER_BYTES.get(run.get("optim"), 8),
        activated,
        (1 if activated else answer) if run.task == "confidence" else None,
        run.get("attn_implementation") == "eager",
    )


# ------------------------------------------------------------------------------------------------
# Launch: processes, strategy, batch, command


@dataclass
class Launch:
    """A run on hardware: everything that is decided before its command is run."""

    run: Run
    gpu: Gpu | None  # the kind planned for
    processes: int  # on all machines together
    machines: int
    strategy: str
    why: str
    half: bool
    batch: int | None  # records at a time on a process; None: auto
    planned: bool  # whether it was auto and is now what the estimate says fits
    accumulation: int | None
    global_batch: int
    memory: Memory | None  # where it was needed
    command: list[str]
    environment: dict[str, str]

    @property
    def replicas(self) -> int:
        return 1 if shares_batches(self.run, self.strategy) else self.processes

    @property
    def checkpointing(self) -> bool:
        return bool(self.run.flags.get("gradient_checkpointing"))


def shares_batches(run: Run, strategy: str) -> bool:
    """Whether all processes work on the same records, each with a part of the model."""
    return strategy == "tp" or run.fact("pipeline_parallel_size", 1) > 1


def count_processes(run: Run, here: Hardware, real: bool) -> tuple[int, int]:
    """(processes on all machines together, machines).

    Raises:
        InputError: on numbers that contradict each other, or more GPUs than are here.
    """
    machines = run.fact("num_machines", 1)
    asked = {name: run.fact(name) for name in ("num_processes", "gpu_count") if name in run.facts}
    if "gpus_per_node" in run.facts:
        asked["gpus_per_node"] = run.fact("gpus_per_node") * machines
    for name, count in asked.items():
        first = next(iter(asked))
        if count != asked[first]:
            raise InputError(
                f"{run.facts[name].where} makes {count} processes on {machines} machines and "
                f"{run.facts[first].where} {asked[first]}: give numbers that agree"
            )
    name = next(iter(asked), None)
    total = asked[name] if name else max(1, len(here.gpus)) * machines
    if total < 1 or total % machines:
        where = run.where(name or "num_machines")
        raise InputError(f"{where}: {total} processes cannot be spread over {machines} machines")
    needs_gpus = here.gpus or {"gpu_count", "gpus_per_node"} & asked.keys()
    if real and name and needs_gpus and len(here.gpus) < total // machines:
        raise InputError(
            f"{run.facts[name].where} asks for {total // machines} GPUs on this machine and "
            f"{len(here.gpus)} are here: give --num_processes {max(1, len(here.gpus)) * machines}, "
            "or --dry_run to see what would run"
        )
    return total, machines


def named_strategy(run: Run, processes: int) -> tuple[str, str] | None:
    """(strategy, where it is named), None if nowhere.

    Raises:
        InputError: if it is named twice, differently, or asks for what there is not.
    """
    fact, where = run.fact, {name: given.where for name, given in run.facts.items()}
    claims: list[tuple[str, str]] = []
    if name := fact("strategy"):
        if name not in STRATEGIES:
            raise InputError(f"{where['strategy']} is {name!r}: give {', '.join(STRATEGIES)}")
        claims.append((name, where["strategy"]))
    # A pipeline is launched as DDP is; the training script itself divides the layers
    for name, strategy in (("tensor_parallel_size", "tp"), ("pipeline_parallel_size", "ddp")):
        if fact(name, 1) not in (1, processes):
            raise InputError(
                f"{where[name]} is {fact(name)} with {processes} processes: it must be the number "
                "of processes, since it is not mixed with another strategy here"
            )
        if fact(name, 1) > 1:
            claims.append((strategy, where[name]))
    if path := fact("deepspeed"):
        claims.append((strategy_of_json(path, where["deepspeed"]), where["deepspeed"]))
    stage, offload = fact("deepspeed_stage"), fact("cpu_offload")
    if fact("use_deepspeed") or (stage and fact("use_deepspeed") is not False):
        if stage not in (None, 2, 3) or (offload and stage != 3):
            raise InputError(
                f"{where.get('deepspeed_stage', where.get('cpu_offload'))} is {stage}"
                f"{' with cpu_offload' if offload else ''}: give 2 or 3, cpu_offload with 3 alone"
            )
        name = "zero3_offload" if offload else f"zero{stage or 2}"
        claims.append((name, where.get("deepspeed_stage") or where["use_deepspeed"]))
    elif offload:
        raise InputError(f"{where['cpu_offload']} is true: give deepspeed_stage 3 with it")
    sharding = str(fact("sharding_strategy", "FULL_SHARD")).upper()
    if fact("fsdp") or ("sharding_strategy" in where and fact("fsdp") is not False):
        if sharding not in ("FULL_SHARD", "1"):
            raise InputError(
                f"{where['sharding_strategy']} is {sharding}: fsdp2 is FULL_SHARD; what "
                "SHARD_GRAD_OP means is strategy zero2, NO_SHARD is ddp"
            )
        claims.append(("fsdp2", where.get("fsdp") or where["sharding_strategy"]))
    wrap = fact("auto_wrap_policy", True)
    if wrap is not True and str(wrap).lower() not in ("transformer_based_wrap", "transformer"):
        raise InputError(
            f"{where['auto_wrap_policy']} is {wrap!r}: layers are wrapped one by one, "
            "TRANSFORMER_BASED_WRAP"
        )
    for claim in claims:
        if claim[0] != claims[0][0]:
            raise InputError(
                f"{claims[0][1]} means strategy {claims[0][0]} and {claim[1]} means {claim[0]}: "
                "leave one of them out"
            )
    return claims[0] if claims else None


def strategy_of_json(path: str, where: str) -> str:
    """Which of our strategies a DeepSpeed configuration amounts to, for the memory estimate."""
    config = read_json(path, where)
    zero = config.get("zero_optimization") or {}
    offload = (zero.get("offload_param") or {}) if isinstance(zero, dict) else None
    if not isinstance(offload, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise InputError(
            f"{where} is {path!r}, whose zero_optimization has no stage 0 to 3: mend it"
        )
    offloads, stage = offload.get("device", "none") != "none", zero.get("stage", 0)
    return "ddp" if stage < 1 else "zero2" if stage < 3 else f"zero3{'_offload' * offloads}"


def read_json(path: str, where: str) -> dict[str, Any]:
    """A small JSON file that is one object.

    Raises:
        InputError: headed by `where` it is named, with file, line and reason, if it is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        config = json.loads(
            read_text(Path(str(path))), object_pairs_hook=unique, parse_constant=refuse
        )
        if not isinstance(config, dict):
            raise ValueError("this is no object")
    except InputError as error:
        reason = str(error)
    except json.JSONDecodeError as error:
        reason = f"{path}:{error.lineno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        reason = f"{path}:1: {error!s:.100}"
    else:
        return config
    raise InputError(f"{where} is {path!r}, which is no JSON file that can be read: {reason}")


def candidates(run: Run, deepspeed: bool = True) -> list[str]:
    """Strategies for several processes that are chosen from, from the fastest to the leanest.

    zero3 holds what fsdp2 holds and needs another package: it is taken by name only. Quantised
    weights are not divided, nor are the tag tokens' trainable rows (peft issue 2946).
    """
    mode = run.flags.get("tuning", "lora")
    quantised = mode == "qlora" or run.get("load_in_8bit") or run.get("load_in_4bit")
    names = ["ddp", "zero2", "fsdp2", "zero3_offload"]
    if mode not in ("full", "scratch"):
        names = names[:2] if quantised or run.task == "confidence" else names[:3]
    return [name for name in names if deepspeed or not name.startswith("zero")]


def smallest_need(memory: Memory, run: Run, strategy: str, processes: int, batch: int | None):
    """Bytes on a GPU: of the batch as given, or with auto of one record, recomputing if need be."""
    recompute = batch is None or bool(run.flags.get("gradient_checkpointing"))
    return memory.on_gpu(strategy, processes, batch or 1, recompute)


def choose_strategy(
    run: Run, gpu: Gpu | None, processes: int, batch: int | None, half: bool, deepspeed: bool
) -> tuple[str, str, Memory | None]:
    """(strategy, why in words, what memory was computed from). `deepspeed`: is it here?"""
    named = named_strategy(run, processes)
    alone = named is None or (named[0] != "zero3_offload" and "deepspeed" not in run.facts)
    if processes == 1 and alone:
        vain = named is not None and named[0] != "single"
        why = f"; {named[1]} has nothing to divide" if vain else ""
        return "single", f"one process{why}", None
    if named and named[0] != "single":
        return named[0], f"named by {named[1]}", None
    if named:
        raise InputError(f"{named[1]} is single, which is one process, with {processes} processes")
    if gpu is None:
        return "ddp", "the fastest, and no GPU whose memory could be too small is known", None
    try:
        memory, room, tried = measure_run(run, half), USABLE * gpu.memory, []
    except UnknownModel as error:
        return "ddp", f"the fastest, whether it fits or not: {error}", None
    for strategy in candidates(run, deepspeed):
        need = smallest_need(memory, run, strategy, processes, batch)
        tried.append(f"{strategy} {need / GIB:.1f}")
        if need <= room:
            break
    needs = f"{', '.join(tried)} GiB needed of {room / GIB:.1f} usable on each {gpu.name}"
    if need <= room:
        return strategy, f"{needs}, by estimate", memory
    return strategy, f"the leanest, but too large by estimate: {needs}", memory


def split_update(run: Run, replicas: int) -> tuple[int | None, int | None, int]:
    """(records at a time, accumulation, global batch); None is auto, decided by the script.

    Raises:
        InputError: if they do not multiply, with the numbers.
    """
    batch, accumulation = run.get("batch_size"), run.get("gradient_accumulation_steps")
    total = run.flags.get("global_batch_size")
    if target := run.fact("target_tokens_per_device_step"):
        share = target // run.get("max_seq_length")
        unit = batch if isinstance(batch, int) else 1
        share = max(unit, share // unit * unit)
        put(run, "global_batch_size", share * replicas, "target_tokens_per_device_step")
        total = share * replicas
    where = f"{run.where('global_batch_size')}: global_batch_size {total} is not"
    if batch == "auto":
        if accumulation != "auto":
            raise InputError(
                f"{run.where('batch_size')}: auto decides gradient_accumulation_steps too, which "
                f"is {accumulation}: give global_batch_size in its place"
            )
        if total and total % replicas:
            raise InputError(f"{where} a multiple of {replicas} processes")
        return None, None, total or max(1, GLOBAL_BATCH // replicas) * replicas
    if accumulation == "auto":
        accumulation = max(1, (total or GLOBAL_BATCH) // (batch * replicas))
    made = batch * accumulation * replicas
    if total not in (None, made):
        raise InputError(
            f"{where} {batch} records at a time × {replicas} processes × {accumulation} "
            f"accumulation = {made}: change one of them"
        )
    return batch, accumulation, made


def planned_batch(
    run: Run, memory: Memory, strategy: str, processes: int, gpu: Gpu | None, share: int
) -> tuple[int, int]:
    """(records at a time, accumulation) in place of auto, where the script cannot measure a batch
    since no process holds the whole model: the largest divisor of a process's share that fits.

    Raises:
        InputError: if no GPU is known that it should fit on.
    """
    if gpu is None:
        raise InputError(
            f"{run.where('batch_size')}: with {strategy} the script measures no batch, and no GPU "
            "is known to estimate one for: give batch_size"
        )
    recompute = bool(run.flags.get("gradient_checkpointing"))
    most = max(1, largest_batch(memory, strategy, processes, gpu, recompute))
    batch = max(size for size in range(1, min(share, most) + 1) if share % size == 0)
    run.flags |= {"batch_size": batch, "gradient_accumulation_steps": share // batch}
    return batch, share // batch


def make_launch(
    run: Run, options: argparse.Namespace, here: Hardware, real: bool, root: Path = ROOT
) -> Launch:
    """Decides everything; changes and starts nothing. `real`: not only to be shown."""
    if getattr(options, "gpus", None) or getattr(options, "nodes", None):
        if min(options.gpus or 1, options.nodes or 1) < 1:
            raise InputError("--gpus and --nodes are counts: give numbers above 0")
        machines = options.nodes or run.fact("num_machines", 1)
        each = options.gpus or max(1, len(here.gpus))
        for name in ("num_processes", "gpus_per_node"):
            run.facts.pop(name, None)
        run.facts["num_machines"] = Given(machines, "--nodes")
        run.facts["gpu_count"] = Given(each * machines, "--gpus")
    processes, machines = count_processes(run, here, real)
    gpu = min(here.gpus, key=lambda gpu: gpu.memory, default=None) if real else None
    gpu = gpu or (None if real else planned_gpu(run, options, here))
    half = bool(run.flags.get("bf16", gpu is not None and gpu.bf16) or run.flags.get("fp16"))
    named = (named_strategy(run, processes) or ("",))[0]
    if (stages := run.fact("pipeline_parallel_size", 1)) > 1:
        put(run, "pipeline_parallel_size", stages, "pipeline_parallel_size")
    replicas = 1 if shares_batches(run, named) else processes
    batch, accumulation, total = split_update(run, replicas)
    deepspeed = has_deepspeed() or not real
    strategy, why, memory = choose_strategy(run, gpu, processes, batch, half, deepspeed)
    whole = strategy in ("single", "ddp") and stages == 1 and "deepspeed" not in run.facts
    if planned := batch is None and not whole:
        memory = memory or measure_run(run, half)
        share = total // replicas
        batch, accumulation = planned_batch(run, memory, strategy, processes, gpu, share)
    if strategy.startswith("zero") and real and not has_deepspeed():
        raise InputError(
            f"strategy {strategy} needs a package that is not here: 'make setup-gpu' installs it"
        )
    launch = Launch(
        run, gpu, processes, machines, strategy, why, half, batch, planned, accumulation, total,
        memory, [], {},
    )  # fmt: skip
    launch.command = build_command(launch, real, root)
    # Records differ in length: memory in pieces that can grow is not lost between them
    launch.environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    if not gpu and processes > 1:  # else each process would take all cores
        launch.environment["OMP_NUM_THREADS"] = str(max(1, here.cores * machines // processes))
    launch.environment = {
        name: os.environ.get(name, value) for name, value in launch.environment.items()
    }
    return launch


def has_deepspeed() -> bool:
    from importlib.util import find_spec

    return find_spec("deepspeed") is not None


def script_words(run: Run, leave_out: tuple[str, ...] = ()) -> list[str]:
    """The run's flags as words of a command line."""
    words: list[str] = []
    for name, value in run.flags.items():
        if name in leave_out:
            continue
        if name in run.bare:
            words += [f"--{name}"] if value else []
        elif isinstance(value, bool):
            words += [f"--{name}", str(value).lower()]
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def build_command(launch: Launch, real: bool, root: Path) -> list[str]:
    """The words to run. A single process is started by plain python, as launchers only add to it
    what several need."""
    run, several = launch.run, launch.machines > 1
    meeting = {name: run.fact(name) for name in ("machine_rank", "main_process_ip")}
    if several and real and None in meeting.values():
        raise InputError(
            f"{launch.machines} machines: give --machine_rank (0 on the first) and "
            "--main_process_ip (the first's address), on each of them"
        )
    rank, address = (
        str(value if value is not None else word)
        for value, word in zip(meeting.values(), ("RANK", "ADDRESS_OF_RANK_0"))
    )
    port = str(run.fact("main_process_port", 29500 if several else 0))  # 0: any that is free
    script = os.path.relpath(run.script) if Path.cwd() == root else str(run.script)
    strategies = Path("configs/strategies") if Path.cwd() == root else root / "configs/strategies"
    words, leave_out = [sys.executable], ()
    restarts = ["--max_restarts", str(count)] if (count := run.fact("max_restarts")) else []
    # transformers reads DeepSpeed's file, so any launcher will do; plain python restarts nothing
    if "deepspeed" in run.facts or (restarts and launch.strategy == "single"):
        words += ["-m", "torch.distributed.run", "--nproc_per_node"]
        words += [str(launch.processes // launch.machines)]
        if several:
            words += ["--nnodes", str(launch.machines), "--node_rank", rank]
            words += ["--master_addr", address, "--master_port", port]
        else:
            words += ["--standalone"]
        words += restarts
        if "deepspeed" in run.facts:
            run.flags["deepspeed"] = run.fact("deepspeed")
    elif launch.strategy != "single":
        words += ["-m", "accelerate.commands.launch"]
        words += ["--config_file", str(strategies / f"{launch.strategy}.yaml")]
        words += ["--num_processes", str(launch.processes)]
        if several:
            words += ["--num_machines", str(launch.machines), "--machine_rank", rank]
            words += ["--main_process_ip", address]
            if launch.strategy.startswith("zero"):  # its own launcher would log in by ssh
                words += ["--deepspeed_multinode_launcher", "standard"]
        words += ["--main_process_port", port, *restarts]
        if launch.strategy == "tp":
            words += ["--parallelism_config_tp_size", str(launch.processes)]
        if launch.strategy == "fsdp2" and launch.checkpointing:
            words += ["--fsdp_activation_checkpointing", "true"]  # which does it after sharding
            leave_out = ("gradient_checkpointing",)
    return [*words, script, *script_words(run, leave_out)]


def describe(launch: Launch, here: Hardware) -> list[str]:
    """What is about to run, line by line."""
    run, total = launch.run, launch.global_batch
    found = f"GPUs: {gpu_words(here.gpus)}"
    each = "" if launch.batch else ", shared out by what memory is measured to hold"
    each = ", as the estimate says fits" if launch.planned else each
    split = (
        f"{launch.batch} records at a time × {launch.accumulation} accumulation × "
        if launch.batch
        else f"auto × {total // launch.replicas} a process × "
    )
    kind = "float32" if not launch.half else "fp16" if run.flags.get("fp16") else "bf16"
    tuning = run.flags.get("tuning", run.get("adapter") or "lora")
    of = f"of {run.get('model_name')}"
    if tuning == "scratch":
        of = f"of {run.get('num_layers')} layers of {run.get('hidden_size')}"
    lines = [
        found,
        f"task: {run.task}, {tuning}, {of}",
        f"batch: {split}{launch.replicas} = {total} records an update{each}",
        f"precision: {kind}; processes: {launch.processes} on {launch.machines} "
        f"machine{'s' * (launch.machines > 1)}",
        f"strategy: {launch.strategy}, {launch.why}",
    ]
    if launch.gpu and (not here.gpus or launch.gpu.name != here.gpus[0].name):
        lines.insert(1, f"planned for: {launch.processes} x {gpu_words([launch.gpu])}")
    elif launch.gpu and run.fact("gpu_type"):
        kind = gpu_of_type(str(run.fact("gpu_type")), run.facts["gpu_type"].where).name
        if kind.replace(" ", "") not in launch.gpu.name.replace(" ", ""):
            lines.insert(1, f"the file's gpu_type is {kind}; planned for what is here instead")
    return lines


def gpu_words(gpus: list[Gpu]) -> str:
    if not gpus:
        return "none here, training would use the CPU"
    kinds = ", ".join(f"{gpu.name} {gpu.memory / GIB:.1f} GiB" for gpu in gpus)
    total = sum(gpu.memory for gpu in gpus) / GIB
    return kinds if len(gpus) == 1 else f"{len(gpus)}: {kinds}; {total:.1f} GiB in all"


# Seconds in which a run that is told to stop may save its step; torchrun's own are 30
SAVING_TIME = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}


def start(launch: Launch, tensorboard: bool) -> int:
    """Runs the command in this process's place, or with TensorBoard as long as it runs. Then what
    this process is told to stop by reaches the training, once, and its exit code is returned: 128
    and the number of the signal that killed it, if one did."""
    environment = {**SAVING_TIME, **os.environ, **launch.environment}
    sys.stdout.flush()
    if not tensorboard:
        os.execvpe(launch.command[0], launch.command, environment)
    training: subprocess.Popen | None = None
    told: list[int] = []

    def forward(number: int, _: Any) -> None:
        told.append(number)
        if training:
            training.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)
    logs = Path(launch.run.get("output_dir")) / "logs"
    board = [sys.executable, "-m", "tensorboard.main", "--host", "localhost", "--logdir", str(logs)]
    # In groups of their own, since a terminal sends Ctrl-C to the whole of this one
    viewer = subprocess.Popen(board, process_group=0)
    try:
        training = subprocess.Popen(launch.command, env=environment, process_group=0)
        for number in told:  # before there was a training to tell
            training.send_signal(number)
        code = training.wait()
        return code if code >= 0 else 128 - code
    finally:
        viewer.terminate()
        viewer.wait()


# ------------------------------------------------------------------------------------------------
# Plan: what fits, how many steps, how long


def memory_table(memory: Memory, launch: Launch) -> list[str]:
    """A row for each strategy: GiB a GPU by part, and what fits the GPU planned for."""
    run, size, processes = launch.run, memory.size, launch.processes
    batch = launch.batch or 1
    recompute = launch.checkpointing
    names = "weights adapter gradients optimizer activations logits buffers".split()
    lines = [
        f"{size.parameters / 1e9:.3f} B parameters, {size.trained / 1e6:,.1f} M trained "
        f"({memory.tuning}), {memory.length} tokens x {batch} "
        f"record{'s' * (batch > 1)} at a time{', recomputed' * recompute}, "
        f"{processes} process{'es' * (processes > 1)}",
        f"{'GiB a GPU, estimated':22}" + "".join(f"{name:>12}" for name in [*names, "sum"]),
    ]
    offered = ["single"] if processes == 1 else [name for name in STRATEGIES if name != "single"]
    for strategy in [*offered, *(["zero3_offload"] if processes == 1 else [])]:
        parts = memory.parts(strategy, processes, batch, recompute)
        held = parts.pop("main memory", 0)
        total = sum(parts.values())
        row = "".join(f"{parts[name] / GIB:12.2f}" for name in names) + f"{total / GIB:12.2f}"
        verdict = ""
        if not offers(run, strategy):
            row, verdict = "", "not for quantised weights or tag tokens, which it cannot divide"
        elif launch.gpu:
            verdict = "fits" if total <= USABLE * launch.gpu.memory else "does not fit"
            if most := largest_batch(memory, strategy, processes, launch.gpu, recompute):
                verdict += f", up to {most} records at a time"
        if held and row:
            verdict += "; " * bool(verdict)
            verdict += f"{held * processes / launch.machines / GIB:.0f} GiB of main memory"
        lines.append(f"{strategy:22}{row}  {verdict}".rstrip())
    if launch.gpu:
        lines.append(
            f"{launch.gpu.name}: {launch.gpu.memory / GIB:.0f} GiB, of which {USABLE:.0%} are "
            "counted on; the rest is for CUDA, NCCL and fragmentation. An estimate: --batch_size "
            "auto measures."
        )
        lines.append(fewest_gpus(memory, launch))
    return lines


def offers(run: Run, strategy: str) -> bool:
    """Whether a strategy can be had for a run; zero3 where fsdp2 can."""
    divides_weights = "weights" in STRATEGIES[strategy].split()
    return not divides_weights or "fsdp2" in candidates(run)


def largest_batch(memory: Memory, strategy: str, processes: int, gpu: Gpu, recompute: bool) -> int:
    """Records of the greatest length that fit at a time; 0 if not even one does."""
    none, one = (memory.on_gpu(strategy, processes, count, recompute) for count in (0, 1))
    return max(0, int((USABLE * gpu.memory - none) // (one - none)))


def fewest_gpus(memory: Memory, launch: Launch) -> str:
    """The smallest number of GPUs of this kind that hold the run, and by which strategy."""
    room = USABLE * launch.gpu.memory
    batch = None if launch.planned else launch.batch
    for count in range(1, 1025):
        for strategy in ["single"] if count == 1 else candidates(launch.run):
            need = smallest_need(memory, launch.run, strategy, count, batch)
            if need <= room and strategy != "zero3_offload":
                return (
                    f"fewest GPUs of this kind: {count} ({strategy}, {need / GIB:.1f} GiB each, "
                    f"{batch or 1} x {memory.length} tokens at a time"
                    f"{', recomputing activations' * (batch is None)})"
                )
    return "no number of these GPUs holds it without offloading: recompute activations, shorten " \
        "sequences, or take qlora"  # fmt: skip


def count_data(run: Run, tokens_per_record: float | None) -> tuple[int, float, str]:
    """(sequences in an epoch, tokens in one, how that is known) of the training data."""
    most = run.get("max_train_samples") or math.inf
    length, mixed = run.get("max_seq_length"), run.task == "cpt_mixed"
    count, characters = count_records(Path(run.get("train_data")), most)
    how = "4 characters a token, a rough estimate: --tokens_per_record gives it"
    if tokens_per_record:
        how = "as given"
    tokens = min(tokens_per_record or characters / 4 / max(1, count), length)
    if run.task not in ("cpt", "cpt_mixed"):
        return count, tokens, how
    blocks = math.ceil(characters / 4 / length)  # texts are cut into sequences of full length
    if not mixed:
        return blocks, length, "4 characters a token, a rough estimate"
    chats, in_chats = count_records(Path(run.get("chat_data")), most)
    tokens = min(tokens_per_record or in_chats / 4 / max(1, chats), length)
    total, share = blocks + chats, run.get("chat_share")
    if share:  # what is too few is repeated
        total = math.ceil(max(blocks / (1 - share), chats / share))
    share = share or chats / total
    return total, share * tokens + (1 - share) * length, how


def count_records(path: Path, most: float) -> tuple[int, int]:
    """(records, characters) of the first `most` records: lines of .jsonl, other files whole.

    Raises:
        InputError: with file and line, if a file cannot be read to its end.
    """
    inside = sorted(part for part in path.rglob("*") if part.is_file())
    inside = [file for file in inside if file.name.endswith(TEXT_FILES)]
    count = characters = 0
    for file in inside if path.is_dir() else [path]:
        if not file.is_file():
            raise InputError(f"{file} cannot be read: it is no file; give the path of one")
        whole, number, length, blank = ".jsonl" not in file.name, 1, 0, True
        largest = max(MAX_UNPACKED, MAX_RATIO * file.stat().st_size)
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as data:
                while count < most:
                    piece = data.readline(2**20)
                    ends = piece.endswith(b"\n")
                    length += len(piece.decode(errors="replace"))
                    blank = blank and not piece.strip()
                    if not piece or (ends and not whole):
                        count, characters = count + (not blank), characters + length * (not blank)
                        length, blank = 0, True
                    if not piece:
                        break
                    number += ends
                    if data.tell() > largest:
                        raise InputError(
                            f"{file}:{number}: it unpacks to more than {MAX_RATIO} times its size "
                            f"and {MAX_UNPACKED >> 20} MiB; unpack it yourself if it is meant"
                        )
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{file}:{number}: {error}; make the file anew") from error
    return count, characters


def measured_rate(folder: str, launch: Launch) -> float:
    """Tokens a second on all processes, of an earlier run of the same model.

    Raises:
        InputError: if the run is none, or of another model.
    """
    path = Path(folder, "summary.json")
    try:
        summary = read_json(str(path), "--measured")
        rate = summary["train_tokens_per_second"] / summary["num_processes"]
        if not rate > 0:
            raise ValueError
    except (InputError, ArithmeticError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--measured {folder} holds no finished run (summary.json)") from error
    if summary.get("model_name") != launch.run.get("model_name"):
        raise InputError(
            f"--measured {folder} is a run of {summary.get('model_name')}, whose speed says "
            f"nothing of {launch.run.get('model_name')}: give a run of the same model"
        )
    return rate * launch.processes


def plan_lines(launch: Launch, options: argparse.Namespace) -> list[str]:
    """Records, steps, and the time they take where a rate is known."""
    run = launch.run
    for name in ("train_data", "chat_data"):
        if run.get(name) and not os.path.exists(run.get(name)):
            return [f"data: {name} {run.get(name)} is not here: steps and time are unknown"]
    count, tokens, how = count_data(run, options.tokens_per_record)
    epochs, most = run.get("num_epochs"), run.get("max_steps")
    steps = math.ceil(count / launch.global_batch) * epochs
    steps = most if most and most > 0 else math.ceil(steps)
    total = tokens * (steps * launch.global_batch if most and most > 0 else count * epochs)
    lines = [
        f"data: {count:,} sequences of about {tokens:,.0f} tokens ({how})",
        f"steps: {steps:,} of {launch.global_batch} sequences, {total / 1e6:,.1f} M tokens in all",
    ]
    if options.measured or options.tokens_per_second:
        rate = options.tokens_per_second or measured_rate(options.measured, launch)
        source = (
            "as given"
            if options.tokens_per_second
            else f"measured in {options.measured}, the same for each process"
        )
        lines.append(
            f"time: {total / rate / 3600:.2f} hours of training at {rate:,.0f} tokens/s on all "
            f"processes ({source}), without validation and loading"
        )
    else:
        lines.append(
            "time: no speed is known; give --measured FOLDER of an earlier run, or "
            "--tokens_per_second"
        )
    return lines


# ------------------------------------------------------------------------------------------------
# Cluster: the shipped Slurm script and Kubernetes manifest, with the sizes and name of one run

CPUS_PER_GPU = 8  # what the shipped files give: a process, and the workers that prepare its batches


def slurm_script(launch: Launch) -> str:
    """cluster/slurm.sbatch for this run."""
    script = (ROOT / "cluster" / "slurm.sbatch").read_text(encoding="utf-8")
    gpus = launch.processes // launch.machines
    for place, value in (
        ("#SBATCH --job-name=", resource_name(launch.run.get("output_dir"))),
        ("#SBATCH --nodes=", str(launch.machines)),
        ("#SBATCH --gpus-per-node=", str(gpus)),
        ("#SBATCH --cpus-per-task=", str(CPUS_PER_GPU * gpus)),
        ("CONFIG=", shlex.quote(launch.run.file)),
    ):
        before, _, after = script.partition(f"\n{place}")
        script = before + f"\n{place}{value}" + re.sub(r"^[^ #\n]+", "", after)
    return script


def kubernetes_manifest(launch: Launch) -> str:
    """cluster/kubernetes.yaml for this run."""
    import yaml

    text = (ROOT / "cluster" / "kubernetes.yaml").read_text(encoding="utf-8")
    volume, job = yaml.safe_load_all(text)
    job["metadata"]["name"] = resource_name(launch.run.get("output_dir"))
    trainer, gpus = job["spec"]["trainer"], launch.processes // launch.machines
    trainer |= {"numNodes": launch.machines, "numProcPerNode": gpus}
    # launch FILE …, of which Kubernetes shall expand no $(VARIABLE)
    trainer["args"][1] = launch.run.file.replace("$", "$$")
    trainer["resourcesPerNode"]["limits"] |= {"nvidia.com/gpu": gpus, "cpu": CPUS_PER_GPU * gpus}
    return yaml.safe_dump_all([volume, job], sort_keys=False, allow_unicode=True)


def resource_name(folder: str) -> str:
    """The name of a run's folder as Kubernetes allows it (RFC 1035): small letters, digits and
    dashes, beginning with a letter; at most 40, since Kubernetes adds to it and takes 63."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(folder).name.lower()).strip("-")[:40].strip("-")
    return name if name[:1].isalpha() else f"run-{name}"[:40].strip("-")


# ------------------------------------------------------------------------------------------------
# Commands


HIDDEN = "***"  # in place of a secret


def is_secret(name: str) -> bool:
    """Whether a flag's value must not be shown."""
    return name.endswith("token")


def take_secrets(words: list[str]) -> tuple[list[str], list[str]]:
    """(a command line without its secret flags, these with their values): taken out first, no
    mistake in the rest can have a secret shown as something else."""
    rest, secrets, left = [], [], iter(words)
    for word in left:
        name, equals, _ = word.partition("=")
        if name.startswith("--") and is_secret(name):
            secrets += [word] if equals else [word, *[value for value in [next(left, "")] if value]]
        else:
            rest.append(word)
    return rest, secrets


def show_command(launch: Launch) -> str:
    """The command as a shell takes it, but for secrets."""
    words = [f"{name}={shlex.quote(value)}" for name, value in launch.environment.items()]
    before = ""
    for word in launch.command:
        secret = before.startswith("--") and is_secret(before)
        words.append(HIDDEN if secret else shlex.quote(word))
        before = word
    return " ".join(words)


def command_launch(options: argparse.Namespace, here: Hardware, root: Path) -> int:
    run = read_run(options.file, options, root, must_exist=True)
    launch = make_launch(run, options, here, real=not options.dry_run, root=root)
    print(*describe(launch, here), "", show_command(launch), "", sep="\n")
    return 0 if options.dry_run else start(launch, options.tensorboard)


def command_plan(options: argparse.Namespace, here: Hardware, root: Path) -> int:
    run = read_run(options.file, options, root)
    launch = make_launch(run, options, here, real=False, root=root)
    memory = launch.memory or measure_run(run, launch.half)
    print(*describe(launch, here), "", *memory_table(memory, launch), sep="\n")
    print("", *plan_lines(launch, options), "", show_command(launch), sep="\n")
    return 0


def command_memory(options: argparse.Namespace, here: Hardware, root: Path) -> int:
    run = read_run(options.file, options, root)
    launch = make_launch(run, options, here, real=False, root=root)
    print(*memory_table(measure_run(run, launch.half), launch), sep="\n")
    return 0


def command_cluster(options: argparse.Namespace, here: Hardware, root: Path) -> int:
    run = read_run(options.file, options, root)
    launch = make_launch(run, options, here, real=False, root=root)
    render = {"slurm": slurm_script, "kubernetes": kubernetes_manifest}[options.kind]
    print(render(launch), end="")
    return 0


def command_hardware(options: argparse.Namespace, here: Hardware, root: Path) -> int:
    if options.json:
        print(
            json.dumps({**here._asdict(), "gpus": [gpu._asdict() for gpu in here.gpus]}, indent=2)
        )
        return 0
    print(f"GPUs: {len(here.gpus)}" if here.gpus else "GPUs: none here, training would use the CPU")
    for i, gpu in enumerate(here.gpus):
        use = ""
        if options.use and gpu.free is not None:
            use = f", {(gpu.memory - gpu.free) / GIB:.1f} GiB in use, {gpu.free / GIB:.1f} GiB free"
        print(
            f"  {i}: {gpu.name}, {gpu.memory / GIB:.1f} GiB{use}, compute capability "
            f"{gpu.capability}, bf16 {'yes' if gpu.bf16 else 'no'}"
        )
    print(
        f"CPU: {here.cores} cores, {here.memory / GIB:.1f} GiB of memory; "
        f"disk: {here.disk_free / GIB:.1f} GiB free"
    )
    return 0


class OneLineParser(argparse.ArgumentParser):
    """argparse without the page of usage before its one-sentence error."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="plan_training.py",
        description=__doc__.split("\n\n")[0],
        epilog="Flags of the training script may follow those of launch, plan and memory, and win "
        "over the file. The variable GPU_TYPE names the GPU to plan for.",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def command(name: str, function: Any, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        added.set_defaults(function=function)
        return added

    launch = command("launch", command_launch, "train as a configuration says")
    plan = command("plan", command_plan, "what fits, how many steps, how long, which command")
    memory = command("memory", command_memory, "memory of each GPU by strategy, an estimate")
    cluster = command("cluster", command_cluster, "a Slurm script or Kubernetes manifest for a run")
    cluster.add_argument("kind", choices=["slurm", "kubernetes"])
    hardware = command("hardware", command_hardware, "GPUs, cores, memory and disk of this machine")
    for one in (launch, plan, memory, cluster):
        one.add_argument("file", metavar="FILE", help="a run's configuration, .yaml or .toml")
        one.add_argument("--dataset", metavar="PATH", help="training data in place of the file's")
        one.add_argument("--examples", type=int, metavar="N", help="train on the first N records")
        one.add_argument("--strategy", choices=STRATEGIES, help="see configs/strategies/")
        one.add_argument("--deepspeed_config", metavar="JSON", help="DeepSpeed's own file")
        one.add_argument("--num_processes", type=int, metavar="N", help="on all machines together")
    launch.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="only show what would run"
    )
    launch.add_argument("--tensorboard", action="store_true", help="run a TensorBoard beside it")
    for one in (launch, plan):
        one.add_argument(
            "--max_restarts", type=int, metavar="N", help="start it anew so often if it fails"
        )
        one.add_argument("--num_machines", type=int, metavar="N")
        one.add_argument("--machine_rank", type=int, metavar="R", help="this machine's, from 0")
        one.add_argument("--main_process_ip", metavar="HOST", help="of the machine of rank 0")
        one.add_argument("--main_process_port", type=int, metavar="PORT", help="open on it")
    for one in (plan, memory):
        one.add_argument("--gpu", metavar="TYPE", help=f"plan for it: {', '.join(GPU_TYPES)}")
        one.add_argument("--gpus", type=int, metavar="N", help="so many in each machine")
        one.add_argument("--nodes", type=int, metavar="N", help="so many machines")
    plan.add_argument("--tokens_per_record", type=float, metavar="N", help="mean length")
    plan.add_argument("--tokens_per_second", type=float, metavar="N", help="of all processes")
    plan.add_argument("--measured", metavar="FOLDER", help="an earlier run, whose speed to expect")
    hardware.add_argument("--use", action="store_true", help="memory in use and free of each GPU")
    hardware.add_argument("--json", action="store_true", help="for programs to read")
    return parser


def main(argv: list[str] | None = None, here: Hardware | None = None, root: Path = ROOT) -> int:
    """Runs a command and returns its exit code. `here` and `root` stand in for this machine's
    hardware and this repository."""
    parser = build_parser()
    words, secrets = take_secrets(sys.argv[1:] if argv is None else argv)
    options, rest = parser.parse_known_args(words)
    rest += secrets
    if rest and options.name == "hardware":
        parser.error(f"unknown argument {rest[0].partition('=')[0]}")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels nobody asked for
    options.training_flags = [word for word in rest if word != "--"]
    try:
        return options.function(options, here or find_hardware(), root)
    except InputError as error:
        print(f"plan_training.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
