#!/usr/bin/env python3
"""Train a LoRA that tells when a language model's answer is right.

    bash train_fast_4gpu.sh qwen                       # four GPUs, settings chosen for the model
    make demo                                          # a laptop's CPU, two minutes
    accelerate launch --config_file train_config_4gpu.yaml train_confidence_lora.py \\
        --model_name Qwen/Qwen2.5-7B-Instruct --train_data tagged/qwen/qwen_all_tagged.jsonl \\
        --output_dir checkpoints/qwen_fast
    tensorboard --logdir checkpoints/qwen_fast/logs

Every training record is a question, the model's own answer, and a confidence tag that says whether
that answer was right. The sequence is `prompt · answer · <CONFIDENCE> · tag`, the loss is on the
tag, and after training P(C) / (P(C) + P(U)) at the tag is the probability that the answer is right.

A run that was killed, told to stop (SIGTERM, Ctrl-C) or cut off goes on when the same command is
given again. Exit codes: 0 done; 2 something to mend in the command or its files; 1 the run ended
early and says why; 130, 143 stopped by SIGINT, SIGTERM, with a checkpoint saved.

The file reads in the order data flows: constants, settings, records, prompts, encoding, answer
judging, metrics, saving, processes and signals, model, generation and scoring, trainer,
ValidationCallback, main.
Method: Self-REF, Chuang et al., https://arxiv.org/abs/2410.13284
"""

from __future__ import annotations

import argparse
import atexit
import codecs
import ctypes
import difflib
import gc
import gzip
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import timedelta
from decimal import Decimal
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypedDict

# ------------------------------------------------------------------------------------------------
# Constants to edit: each is the default of the flag beside it

MODEL_NAME = "Qwen/Qwen2.5-7B-Instruct"  # --model_name
TRAIN_DATA = "tagged/qwen/qwen_all_tagged.jsonl"  # --train_data
OUTPUT_DIR = "checkpoints/qwen_fast"  # --output_dir
VAL_SAMPLES = 200  # --val_samples: 500 measures finer and slower, 100 coarser and quicker
MAX_SEQ_LENGTH = 2048  # --max_seq_length, tokens
GLOBAL_BATCH = 128  # records in an update, on however many GPUs: --global_batch_size
LORA_R, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.0  # --lora_r, --lora_alpha, --lora_dropout

TRAINING_FLAGS: dict[str, tuple[Any, str]] = {  # the most used of TrainingArguments: default, help
    "output_dir": (OUTPUT_DIR, "where the run goes"),
    "num_train_epochs": (2.0, "passes over the data"),
    "per_device_train_batch_size": (
        16,
        "records at a time on each process; auto: as many as fit into memory, measured",
    ),
    "gradient_accumulation_steps": (
        "auto",
        "batches added up before an update; auto: what --global_batch_size asks for",
    ),
    "learning_rate": (3e-4, "peak learning rate"),
    "lr_scheduler_type": ("cosine", "how it falls"),
    "warmup_steps": (0.03, "steps over which it rises; below 1: a share of the run"),
    "max_steps": (-1, "stop after so many updates; -1: by epochs"),
    "eval_steps": (500.0, "validate every so many updates; below 1: a share of the run"),
    "save_steps": (500.0, "save a checkpoint every so many updates, likewise"),
    "save_total_limit": (2, "checkpoints to keep"),
    "logging_steps": (10.0, "log every so many updates"),
    "per_device_eval_batch_size": (
        256,
        "answers at a time in validation, on each process; halved where memory does not suffice",
    ),
    "dataloader_num_workers": (0, "processes that load batches; records are tokenised already"),
    "seed": (42, "of every random choice"),
    "bf16": (None, "bfloat16; default: on a GPU that has it"),
    "fp16": (None, "float16"),
}
ALIASES = {
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "batch_size",
    "warmup_steps": "warmup_ratio",
}

MARKER_TOKEN = "<CONFIDENCE>"  # stands between the answer and its tag: a fixed place to read from
CONFIDENCE_TOKENS: dict[str, tuple[str, str]] = {  # domain: (confident, unsure)
    "READ": ("<C_READ>", "<U_READ>"),
    "MED": ("<C_MED>", "<U_MED>"),
    "MATH": ("<C_MATH>", "<U_MATH>"),
    "KNOW": ("<C_KNOW>", "<U_KNOW>"),
}
TAG_MEANING = {
    tag: (domain, confident)
    for domain, pair in CONFIDENCE_TOKENS.items()
    for tag, confident in zip(pair, (True, False))
}


class Dataset(NamedTuple):
    """What must be known of a dataset: its domain's tags and how its answers are judged."""

    domain: str
    answers: str  # "yes_no", "letter", "number" or "boxed"


DATASETS: dict[str, Dataset] = {  # your own dataset is one line here
    "boolq": Dataset("READ", "yes_no"),
    "medqa": Dataset("MED", "letter"),
    "medmcqa": Dataset("MED", "letter"),
    "mmlu": Dataset("KNOW", "letter"),
    "gsm8k": Dataset("MATH", "number"),
    "math": Dataset("MATH", "boxed"),
    "demo_reading": Dataset("READ", "yes_no"),
    "demo_medicine": Dataset("MED", "letter"),
}

MIN_ANSWER_TOKENS = 16  # what truncation always leaves of an answer
ECE_BINS = 15  # equal-width bins of the expected calibration error
MAX_LINE_BYTES = 16 * 2**20  # of a data file; a longer line is a bad one
MAX_LINE_VALUES = 1_000_000  # in one line, each of which takes up to 200 bytes
MAX_NESTING = 64  # objects and lists within each other
MAX_UNPACKED, MAX_RATIO = 100 * 2**20, 100  # a .gz file may exceed either, in bytes, but not both
LISTED = 20  # bad lines told one by one
LOWER_IS_BETTER = tuple("calibration_error ece brier nll rate runtime loss perplexity".split())


GOES_ON = "the same command goes on from the last checkpoint"


class InputError(Exception):
    """Something the user can mend. The message says what, where and how; the exit code is 2."""


class RunError(Exception):
    """What ends a run early, in one message: what, where, and what to do. The exit code is 1."""

    def __init__(self, message: str, on_all: bool = True) -> None:
        """on_all: whether every process raises it, so that the main one alone has to say it."""
        super().__init__(message)
        self.on_all = on_all


class Stopped(BaseException):
    """A signal ends the run: like KeyboardInterrupt no Exception, which libraries would catch."""

    def __init__(self, saved: Path | None = None, agreed: bool = False) -> None:
        """saved: the last checkpoint; agreed: whether all processes end by it."""
        super().__init__(f"{saved} is saved; {GOES_ON}" if saved else GOES_ON)
        self.agreed = agreed


def say(text: str) -> None:
    """Prints on the main process alone. A full disk under a log does not end a run."""
    if int(os.environ.get("RANK", "0")) == 0:
        with suppress(OSError):
            tqdm.write(text)  # above a progress bar, if there is one
            sys.stdout.flush()


def listing(lines: list[str], count: int | None = None) -> str:
    """The first LISTED lines, indented, and how many more of `count` (default: `lines`) there
    are."""
    count = len(lines) if count is None else count
    more = [f"… and {count - LISTED} more"] if count > LISTED else []
    return "\n".join(f"  {line}" for line in [*lines[:LISTED], *more])


# ------------------------------------------------------------------------------------------------
# Settings: what this script adds to transformers' TrainingArguments, a flag for each field


def setting(default: Any, help: str, **options: Any) -> Any:
    """A field of Settings whose metadata is the keyword arguments of its argparse option."""
    metadata = {"help": help, **options}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunSettings:
    """What every run on this file's trainer can set and transformers' TrainingArguments does not
    have. A script's own settings derive from it."""

    script: ClassVar[str]  # what its errors are headed by
    purpose: ClassVar[str]  # the first line of its --help
    training_defaults: ClassVar[dict[str, Any]] = {}  # where they differ from TRAINING_FLAGS

    model_name: str = setting(MODEL_NAME, "model on the Hugging Face Hub, or a folder")
    trust_remote_code: bool = setting(False, "run the code that the model's folder brings")
    max_train_samples: int | None = setting(None, "train on the first so many records only")
    val_samples: int = setting(VAL_SAMPLES, "records drawn from each validation set, once")
    max_new_tokens: int = setting(256, "longest answer that validation generates, tokens")
    max_seq_length: int = setting(MAX_SEQ_LENGTH, "longest sequence, tokens")
    lora_r: int = setting(LORA_R, "rank of the adapter's matrices")
    lora_alpha: float = setting(LORA_ALPHA, "the adapter is scaled by alpha / r")
    lora_dropout: float = setting(
        LORA_DROPOUT, "dropout before the adapter; costs a third of the speed, and memory"
    )
    target_modules: list[str] = setting(
        ["all-linear"], "linear layers with an adapter, by the ends of their names", nargs="+"
    )
    global_batch_size: int | None = setting(
        None,
        "records in an update: at a time x accumulation x processes (about 128 if not given)",
    )
    load_in_8bit: bool = setting(False, "8-bit base weights (bitsandbytes): less memory, slower")
    load_in_4bit: bool = setting(False, "4-bit NF4 base weights (bitsandbytes)")
    attn_implementation: str = setting(
        "sdpa",
        "attention kernel; flash_attention_2 needs a GPU and the flash-attn package",
        choices=["sdpa", "flash_attention_2", "eager"],
    )
    backend: str = setting(
        "hf",
        "unsloth: its kernels under the training (a LoRA on one GPU a process); "
        "needs a GPU and the unsloth package",
        choices=["hf", "unsloth"],
    )
    profile: bool = setting(
        False, "record updates 3 to 5 in detail into logs/, for TensorBoard or ui.perfetto.dev"
    )
    skip_bad_records: bool = setting(False, "leave bad lines out and say how many")
    no_resume: bool = setting(
        False, "refuse to go on from a checkpoint: begin anew, in an empty --output_dir"
    )
    overwrite_output_dir: bool = setting(
        False, "delete the run that --output_dir holds, and begin anew"
    )
    hf_repo: str | None = setting(None, "push final/ to this repository of the Hugging Face Hub")


@dataclass
class Settings(RunSettings):
    """Settings of a confidence run."""

    script: ClassVar[str] = "train_confidence_lora.py"
    purpose: ClassVar[str] = __doc__.split("\n")[0]

    train_data: str = setting(TRAIN_DATA, "tagged answers, JSON Lines (.jsonl or .jsonl.gz)")
    val_data: list[str] = setting(
        [],
        "validation sets: NAME=FILE, or NAME=HUB_ID:SPLIT for a dataset of the Hub; "
        "without it 5%% of the training records of each dataset are held out",
        nargs="+",
        metavar="NAME=PATH",
    )
    validation_answers: str | None = setting(
        None,
        "generate: the model answers and is judged (default with --val_data); "
        "recorded: the answer in the data is scored, its tag is the truth (default without)",
        choices=["generate", "recorded"],
    )
    max_seq_length: int = setting(
        MAX_SEQ_LENGTH, "longest sequence, tokens; longer records lose their middle, never the tag"
    )
    adapter: str = setting(
        "lora",
        "lora: the model writes answer, marker and tag; "
        "activated: the base model's answers stay untouched and the adapter acts on the marker",
        choices=["lora", "activated"],
    )
    fp8: bool = setting(
        False, "8-bit floating-point products with the base weights: H100 and newer, unmeasured"
    )
    calib_beta: int = setting(100, "calibration error: answers in a bin")
    calib_p_norm: str = setting(
        "2", "calibration error: norm over the bins", choices=["1", "2", "infty"]
    )


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "1", "yes")


def number_or_auto(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}")
    return text if text == "auto" else int(text)


BOOLEAN: dict[str, Any] = {"nargs": "?", "const": True, "type": parse_bool, "metavar": "BOOL"}


class OneLineParser(argparse.ArgumentParser):
    """argparse without the page of usage before its one-sentence error."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def build_parser(kind: type[RunSettings] = Settings) -> argparse.ArgumentParser:
    """The flags of `kind` and TRAINING_FLAGS; needs nothing that is slow to import."""
    parser = OneLineParser(
        prog=kind.script,
        description=kind.purpose,
        epilog="Every other flag of transformers.TrainingArguments works under its own name.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    ours = parser.add_argument_group("this script's")
    for item in fields(kind):
        default = item.default if item.default is not MISSING else item.default_factory()
        options: dict[str, Any] = {"default": default, **item.metadata}
        if item.type == "bool":
            options.update(BOOLEAN)
        elif "int" in item.type or "float" in item.type:
            options.update(type=int if "int" in item.type else float)
        ours.add_argument(f"--{item.name}", **options)

    theirs = parser.add_argument_group("training")
    for name, (default, help) in TRAINING_FLAGS.items():
        default = kind.training_defaults.get(name, default)
        names = [f"--{part}" for part in (ALIASES.get(name), name) if part]
        options = {"dest": name, "default": default, "help": help, "type": type(default)}
        if default is None:
            options.update(BOOLEAN)
        if "auto" in help:
            options.update(type=number_or_auto, metavar="N|auto")
        theirs.add_argument(*names, **options)
    theirs.add_argument("--no_bf16", dest="bf16", action="store_const", const=False, help="float32")
    return parser


if __name__ == "__main__" and not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
    build_parser().parse_args()  # answers here, before the imports below take their seconds

if re.search(r"--backend[= ]unsloth\b", " ".join(sys.argv)) and find_spec("unsloth"):
    import torch

    if torch.cuda.is_available():  # without one its import fails; check_settings() says so better
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it reports each load to the Hub
        import unsloth  # before transformers and peft, whose classes it patches

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels nobody asked for
import datasets
import numpy as np
import psutil
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from huggingface_hub import create_repo, upload_folder
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors import SafetensorError
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.activations import SiLUActivation
from transformers.distributed import DistributedConfig
from transformers.integrations import TensorBoardCallback, is_deepspeed_zero3_enabled
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_liger_kernel_available


def parse_command_line(
    argv: list[str] | None, kind: type[RunSettings] = Settings
) -> tuple[RunSettings, dict[str, Any]]:
    """Settings of `kind`, and the keyword arguments for TrainingArguments, of a command line.

    Exits with code 2 and one sentence on an unknown flag or a value of the wrong type.
    """
    parser = build_parser(kind)
    known, rest = parser.parse_known_args(argv)
    training = vars(known)
    settings = kind(**{item.name: training.pop(item.name) for item in fields(kind)})
    if rest:
        theirs = HfArgumentParser(TrainingArguments, prog=parser.prog, allow_abbrev=False)
        theirs.error = parser.error
        for action in theirs._actions:
            action.default = argparse.SUPPRESS  # what is not given shall not be set
        values, unknown = theirs.parse_known_args(rest)
        if unknown:
            flags = {*parser._option_string_actions, *theirs._option_string_actions}
            near = difflib.get_close_matches(unknown[0].partition("=")[0], sorted(flags), 1)
            hint = f", did you mean {near[0]}?" if near else ""
            parser.error(f"unknown argument {unknown[0].partition('=')[0]}{hint}")
        training |= vars(values)
    return settings, training


def check_run_settings(settings: RunSettings, training: dict[str, Any]) -> None:
    """Refuses what is impossible in any run, before anything is loaded.

    Raises:
        InputError: naming the flag and the remedy.
    """
    values = {**asdict(settings), **training}
    exclusive = "bf16 fp16", "load_in_8bit load_in_4bit", "fp8 load_in_8bit", "fp8 load_in_4bit"
    for one, other in map(str.split, exclusive):
        if values.get(one) and values.get(other):
            raise InputError(f"--{one} and --{other} exclude each other: give one of them")
    for name in (
        "val_samples lora_r calib_beta max_new_tokens num_train_epochs learning_rate "
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
        "global_batch_size max_train_samples vocab_size hidden_size num_heads num_layers num_beams "
        "pipeline_parallel_size"
    ).split():
        if values.get(name) not in ("auto", None) and not values[name] > 0:
            raise InputError(f"--{name} is {values[name]}: give a number above 0")
    if settings.max_seq_length < 64:
        raise InputError(f"--max_seq_length is {settings.max_seq_length}: give at least 64 tokens")
    if values.get("use_liger_kernel"):
        if not torch.cuda.is_available():
            raise InputError("--use_liger_kernel needs a GPU, and none is here: leave it out")
        if not is_liger_kernel_available():
            raise InputError("--use_liger_kernel needs a package: pip install liger-kernel")
    if settings.backend == "unsloth":
        check_unsloth(values)


def check_settings(settings: Settings, training: dict[str, Any]) -> None:
    """check_run_settings(), and what only a confidence run can get wrong."""
    check_run_settings(settings, training)
    if settings.adapter == "activated" and training.get("gradient_checkpointing"):
        raise InputError(
            "--gradient_checkpointing does nothing for --adapter activated, whose gradient passes "
            "through one token: leave it out"
        )
    if not Path(settings.train_data).is_file():
        raise InputError(
            f"--train_data {settings.train_data} does not exist; make it with: "
            f"python tag_answers.py --model_name {settings.model_name} "
            f"--questions QUESTIONS.jsonl --output {settings.train_data}"
        )
    check_sets(settings.val_data, "--val_data")


def check_sets(items: list[str], flag: str) -> None:
    """InputError if what a flag gives for read_sets() cannot be sets."""
    names = Counter()
    for item in items:
        name, _, path = item.partition("=")
        names[name] += 1
        if not name or not path:
            raise InputError(f"{flag} {item}: write NAME=PATH, for example boolq={item}")
        if names[name] > 1:
            raise InputError(f"{flag} names {name} twice: give each set its own name")
        if not Path(path).is_file() and ":" not in path:
            raise InputError(
                f"{flag} {item}: there is no file {path}; a dataset of the Hugging Face Hub is "
                "written NAME=HUB_ID:SPLIT, for example boolq=google/boolq:validation"
            )


def check_unsloth(values: dict[str, Any]) -> None:
    """Refuses what unsloth's kernels cannot do, or where they are not."""
    for flag, value in (
        ("adapter", "activated"),  # its kernels would apply the adapter to every token
        ("load_in_8bit", True),  # another code path of unsloth's: it rewrites model and loss
        ("fp8", True),
        ("use_liger_kernel", True),
        ("attn_implementation", "eager"),  # it chooses its own
        ("attn_implementation", "flash_attention_2"),
    ):
        if values.get(flag) == value:
            given = f"--{flag}" if value is True else f"--{flag} {value}"
            raise InputError(f"{given} and --backend unsloth exclude each other: give one of them")
    if not torch.cuda.is_available():
        raise InputError("--backend unsloth needs a GPU, and none is here: leave it out")
    if not find_spec("unsloth"):
        raise InputError("--backend unsloth needs a package: pip install unsloth")
    if "unsloth" not in sys.modules:
        raise InputError(
            "--backend unsloth must be on the command line that starts python: unsloth has to be "
            "imported before transformers"
        )


# ------------------------------------------------------------------------------------------------
# Records


class Record(TypedDict, total=False):
    """A question with, usually, the model's answer. Question and dataset are always there."""

    question: str
    dataset: str  # a key of DATASETS
    context: str  # a passage the question is about
    options: dict[str, str]  # {"A": text, ...} of a multiple-choice question
    answer: Any  # the true answer: bool or "yes"/"no", a letter, a number, LaTeX
    tagged_response: str  # the model's answer and its tag, as in the file
    response: str  # the answer without the tag
    confident: bool  # whether the tag is the C one, which is to say: the answer was right
    file: str  # that it came from
    line: int  # of that file, counted from 1


TAG_PATTERN = re.compile(r"<[CU]_[A-Z]+>")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError if a key is there twice, where json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, count)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} is there {count} times")
    return found


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=refuse_constant)
JSON_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_object(line: str) -> dict[str, Any]:
    """A line as a JSON object. ValueError, with the reason in words, if it is none, or if it holds
    what later work chokes on: NUL, half a surrogate pair, a key twice, absurd numbers or nesting.
    """
    if "\0" in line:
        raise ValueError(f"a NUL character at column {line.index(chr(0)) + 1}")
    if len(line) > MAX_LINE_VALUES:
        bare = JSON_STRING.sub("", line)
        if sum(map(bare.count, "[{,:")) > MAX_LINE_VALUES:
            raise ValueError(f"more than {MAX_LINE_VALUES:,} values in one line")
    try:
        record = DECODER.decode(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_NESTING} levels") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            limit = sys.get_int_max_str_digits()
            raise ValueError(f"a number of more than {limit} digits") from None
        raise
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, this is a {type(record).__name__}")
    check_values(record, escapes="\\u" in line)
    return record


def check_values(record: dict[str, Any], escapes: bool) -> None:
    """ValueError if a parsed object is nested too deep, or holds a number or a text that JSON can
    write and nothing can use. `escapes`: it was written with some, so look at its texts."""
    level: list[Any] = [record]
    for _ in range(MAX_NESTING):
        parts: list[Any] = []
        for group in level:
            parts += group
            if isinstance(group, dict):
                parts += group.values()
        for part in parts:
            if isinstance(part, float) and not math.isfinite(part):
                raise ValueError("a number too large for a float")
            if escapes and isinstance(part, str):
                if "\0" in part:
                    raise ValueError("a NUL character, written \\u0000")
                if half := LONE_SURROGATE.search(part):
                    raise ValueError(f"half a surrogate pair, \\u{ord(half[0]):04x}")
        level = [part for part in parts if isinstance(part, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_NESTING} levels")


def check_question(record: dict[str, Any]) -> None:
    """ValueError, with the reason in words, if the parts of a record that ask are not as they must
    be: question, dataset, context, options."""
    question, name = record.get("question"), record.get("dataset")
    if not isinstance(question, str) or not question.strip():
        raise ValueError('"question" is missing or empty')
    if not isinstance(name, str) or name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; known are {', '.join(DATASETS)}")
    context, options = record.get("context"), record.get("options")
    if context is not None and not isinstance(context, str):
        raise ValueError('"context" must be a string')
    if options is not None and not (
        isinstance(options, dict)
        and options
        and all(isinstance(part, str) for pair in options.items() for part in pair)
    ):
        raise ValueError('"options" must be an object of strings, {"A": "...", "B": "..."}')
    letters = DATASETS[name].answers == "letter"
    if letters and not all(re.fullmatch(r"[^\W_]", key) for key in options or {}):
        raise ValueError('the keys of "options" must be single letters, {"A": "...", "B": "..."}')


def question_key(record: Record) -> str:
    """What makes a question the same one: dataset, question, passage and options."""
    parts = [record.get(part) for part in ("dataset", "question", "context", "options")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def parse_record(line: str) -> Record:
    """One line of a data file as a Record.

    Raises:
        ValueError: with the reason, in words, why the line is not a record.
    """
    record = parse_object(line)
    check_question(record)
    for derived in ("response", "confident"):  # of the tagged response alone, never of the file
        record.pop(derived, None)
    name, options, answer = record["dataset"], record.get("options"), record.get("answer")
    kind = DATASETS[name].answers
    if isinstance(answer, (dict, list)) or (kind == "letter" and isinstance(answer, bool)):
        raise ValueError(f'"answer" is {type(answer).__name__}, which answers no question here')
    if "tagged_response" in record:
        record.update(split_tag(record["tagged_response"], DATASETS[name].domain))
    elif answer is None:
        raise ValueError('neither "tagged_response" nor "answer" is there')
    elif kind == "letter" and true_letter(answer, options) is None:
        raise ValueError(
            f'"answer" {answer!r:.40} is neither the letter, nor the position from 0, nor the text '
            "of an option"
        )
    return record


def split_tag(tagged_response: Any, domain: str) -> dict[str, Any]:
    """The answer and the tag's meaning of "<answer> <C_READ>". ValueError on any other tag."""
    if not isinstance(tagged_response, str):
        raise ValueError('"tagged_response" must be a string')
    tags = TAG_PATTERN.findall(tagged_response)
    wanted = " or ".join(CONFIDENCE_TOKENS[domain])
    if not tags:
        raise ValueError(f'no confidence tag in "tagged_response"; it must end with {wanted}')
    if len(tags) > 1:
        raise ValueError(f'{len(tags)} confidence tags in "tagged_response": {" ".join(tags)}')
    if tags[0] not in CONFIDENCE_TOKENS[domain]:
        raise ValueError(f"tag {tags[0]} is not of the dataset's domain {domain} ({wanted})")
    response, _, after = tagged_response.partition(tags[0])
    if after.strip():
        raise ValueError(f"text after the tag {tags[0]}; the tag must end the response")
    if MARKER_TOKEN in response:
        raise ValueError(f"the marker {MARKER_TOKEN} is in the data; it is inserted when encoding")
    if not response.strip():
        raise ValueError("there is no answer before the tag")
    return {"response": response.rstrip(), "confident": TAG_MEANING[tags[0]][1]}


WIDE_ENCODINGS = {  # what a file in one of them begins with; UTF-32 first, as UTF-16 begins alike
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@contextmanager
def open_data(path: str | Path) -> Iterator[tuple[BinaryIO, int]]:
    """(a data file's bytes, unpacked if it ends in .gz; how many of them may be read).

    Raises:
        InputError: if it is no file or cannot be opened.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
            raise InputError(f"cannot read {str(path)!r}: it is no file; give the path of one")
        packed = open(path, "rb")  # noqa: SIM115  # closed below
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {str(path)!r}: {reason}; give the path of a file") from error
    with packed:
        if not str(path).endswith(".gz"):
            yield packed, sys.maxsize
            return
        most = max(MAX_UNPACKED, MAX_RATIO * os.fstat(packed.fileno()).st_size)
        with gzip.open(packed) as file:
            yield file, most


def without_mark(path: str | Path, begin: bytes) -> bytes:
    """A file's first bytes without UTF-8's byte order mark. InputError if they have another's."""
    for mark, encoding in WIDE_ENCODINGS.items():
        if begin.startswith(mark):
            raise InputError(f"cannot read {path}:1: it looks like {encoding}: save it as UTF-8")
    return begin.removeprefix(codecs.BOM_UTF8)


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line of a data file, without a byte order mark. Of a line
    longer than MAX_LINE_BYTES only the beginning is held: decode_line() refuses it.

    Raises:
        InputError: with file, line and reason, if the file cannot be read to its end.
    """
    number = 0
    with open_data(path) as (file, most):
        try:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                rest = line
                while len(rest) > MAX_LINE_BYTES and file.tell() <= most:
                    rest = file.readline(MAX_LINE_BYTES + 1)
                if file.tell() > most:
                    raise InputError(
                        f"cannot read {path}:{number}: it unpacks to more than {MAX_RATIO} times "
                        f"its size and {MAX_UNPACKED >> 20} MiB; unpack it yourself if it is meant"
                    )
                yield number, line if number > 1 else without_mark(path, line)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"cannot read {path}:{number + 1}: {error}; make the file anew"
            ) from error


def decode_line(line: bytes) -> str:
    """A line of read_lines() as text. ValueError, with the reason in words, if it is none."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        byte = line[error.start]
        raise ValueError(f"not UTF-8 (byte 0x{byte:02x} at column {column})") from None


def parse_lines(
    path: str | Path, parse: Callable[[str], dict]
) -> tuple[list[Record], list[str], int]:
    """(records, the first LISTED bad lines as "file:line: reason", number of bad lines) of a JSON
    Lines file; blank lines are neither. `parse` and errors are those of read_records()."""
    records: list[Record] = []
    problems: list[str] = []
    bad, file = 0, str(path)
    for number, line in read_lines(path):
        try:
            text = decode_line(line)
            if text and not text.isspace():
                records.append({**parse(text), "file": file, "line": number})
        except ValueError as error:
            bad += 1
            if bad <= LISTED:
                problems.append(f"{path}:{number}: {error!s:.300}")
    return records, problems, bad


def read_records(
    path: str | Path, skip_bad: bool = False, parse: Callable[[str], dict] = parse_record
) -> list[Record]:
    """The records of a JSON Lines file (.jsonl or .jsonl.gz), in order; blank lines are no records.

    Args:
        parse: makes a record of a line, or raises ValueError with the reason why it cannot.

    Raises:
        InputError: if the file cannot be read, holds no record, or has bad lines; these are listed,
            at most LISTED, with file, line and reason. With `skip_bad` they are counted and left
            out.
    """
    records, problems, bad = parse_lines(path, parse)
    if bad and not skip_bad:
        raise InputError(
            f"{bad} bad lines in {path}; mend them or give --skip_bad_records\n"
            + listing(problems, bad)
        )
    if bad:
        say(f"warning: left out {bad} bad lines of {path}, the first: {problems[0]}")
    if not records:
        raise InputError(f"{path} holds no records: it is empty or every line is blank or bad")
    return records


def read_hub_dataset(name: str, location: str) -> list[Record]:
    """Records of a dataset of the Hugging Face Hub (or a local folder of data files).

    Args:
        name: the dataset, a key of DATASETS, that says how its answers are judged.
        location: "HUB_ID:SPLIT" or "HUB_ID:CONFIGURATION:SPLIT".

    Columns are taken under our names, or under those of BoolQ (passage), MedQA (answer_idx) and
    MMLU (choices).
    """
    if name not in DATASETS:
        raise InputError(f"--val_data {name}=…: name it as one of {', '.join(DATASETS)}")
    path, *configuration, split = location.split(":")
    try:
        rows = datasets.load_dataset(path, *configuration, split=split)
    except Exception as error:  # the Hub, the network and each dataset fail in their own ways
        raise InputError(f"--val_data {name}={location} cannot be loaded: {error}") from error
    records = []
    for number, row in enumerate(rows, 1):
        options = row.get("options") or row.get("choices")
        if isinstance(options, list):
            options = dict(zip("ABCDEFGHIJ", options, strict=False))
        record = {
            "question": row.get("question") or row.get("problem"),
            "dataset": name,
            "context": row.get("context") or row.get("passage"),
            "options": options,
            "answer": row["answer_idx"] if "answer_idx" in row else row.get("answer"),
        }
        try:
            line = json.dumps({key: value for key, value in record.items() if value is not None})
            records.append({**parse_record(line), "file": location, "line": number})
        except (TypeError, ValueError) as error:  # a column may hold dates, images, anything
            raise InputError(f"--val_data {name}={location}, row {number}: {error}") from None
    return records


def draw_sample(records: list, most: int, seed: str) -> list:
    """At most `most` of the records, drawn by seed, in their order."""
    chosen = random.Random(seed).sample(range(len(records)), min(most, len(records)))
    return [records[i] for i in sorted(chosen)]


def hold_out(records: list[Record], share: float, most: int, seed: int) -> tuple[list, list]:
    """Splits records into (kept, held out): a seeded `share` of each dataset, at most `most`."""
    held = set()
    for name in sorted({record["dataset"] for record in records}):
        indices = [i for i, record in enumerate(records) if record["dataset"] == name]
        count = min(most, max(1, round(share * len(indices))))
        if count < len(indices):
            held.update(random.Random(f"{seed} {name}").sample(indices, count))
    kept = [record for i, record in enumerate(records) if i not in held]
    return kept, [records[i] for i in sorted(held)]


# ------------------------------------------------------------------------------------------------
# Prompts: one function for tagging, training, validation and serving

INSTRUCTIONS = {
    "yes_no": "Answer yes or no.",
    "letter": "Answer with the letter of the right option.",
    "number": "Work it out step by step and end with: The answer is NUMBER.",
    "boxed": "Work it out step by step and put the final answer in \\boxed{}.",
}


def build_prompt(tokenizer: PreTrainedTokenizerBase, record: Record) -> str:
    """The text that asks the model a record's question, up to where its answer begins.

    The model's chat template is used; a base model without one gets "… Answer:". The text holds
    every special token the model needs, so encode it with `add_special_tokens=False`.
    """
    instruction = INSTRUCTIONS[DATASETS[record["dataset"]].answers]
    return as_prompt(tokenizer, f"{question_text(record)}\n\n{instruction}")


def question_text(record: Record) -> str:
    """A record's passage, question and options."""
    parts = []
    if record.get("context"):
        parts.append(f"Passage: {record['context']}")
    parts.append(f"Question: {record['question']}")
    if record.get("options"):
        parts.append("\n".join(f"{key}. {text}" for key, text in record["options"].items()))
    return "\n\n".join(parts)


def as_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """What has the model answer a user's message."""
    if tokenizer.chat_template is None:
        return f"{tokenizer.bos_token or ''}{message}\n\nAnswer:"
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )


# ------------------------------------------------------------------------------------------------
# Encoding: a task is where the loss is. A record becomes segments of a text and of how many of its
# tokens, at most, carry loss

ALL = sys.maxsize
HELD_TOKENS = 16  # of an answer: enough that the tuned model goes on to write it as before
HELD_WEIGHT = 0.1  # of their loss, that of marker and tag being 1


def confidence_segments(
    tokenizer: PreTrainedTokenizerBase, record: Record, adapter: str
) -> list[tuple[str, int]]:
    """Prompt, answer, marker and tag, the loss on the tag.

    An ordinary LoRA writes the marker itself, so the loss is on it too; and on some tokens of the
    answer, because nothing else would keep the model from writing the marker where an answer should
    be: without them the demo's answers end before they begin.
    """
    writes = adapter == "lora"
    tag = CONFIDENCE_TOKENS[DATASETS[record["dataset"]].domain][not record["confident"]]
    return [
        (build_prompt(tokenizer, record), 0),
        (record["response"], HELD_TOKENS if writes else 0),
        (MARKER_TOKEN, ALL if writes else 0),
        (tag, ALL),
    ]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def encode_segments(
    tokenizer: PreTrainedTokenizerBase, records: list[list[tuple[str, int]]]
) -> list[dict[str, list[int]]]:
    """For each record's segments `input_ids`, and `labels`: the same ids where the loss is, else
    -100.

    Where a segment has more tokens than may carry loss, these are spread evenly from its first on.
    Each segment is tokenised alone, so that training sees an answer cut from its prompt exactly
    where generation does; all in one call, which uses every core.
    """
    texts = [text for segments in records for text, _ in segments]
    tokenized = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    encodings = []
    for segments in records:
        input_ids, labels = [], []
        for (_, most), ids in zip(segments, tokenized):
            if len(ids) > most:
                own = [-100] * len(ids)
                for i in range(most):
                    own[i * len(ids) // most] = ids[i * len(ids) // most]
            input_ids += ids
            labels += own if len(ids) > most else ids
        encodings.append({"input_ids": input_ids, "labels": labels})
    return encodings


def cut_middle(tokenizer: PreTrainedTokenizerBase, text: str, tokens_to_drop: int) -> str:
    """`text` with at least `tokens_to_drop` tokens replaced by " … " in its middle."""
    ids = tokenize(tokenizer, text)
    kept = max(0, len(ids) - tokens_to_drop - len(tokenize(tokenizer, " … ")))
    head, tail = ids[: (kept + 1) // 2], ids[len(ids) - kept // 2 :]
    return tokenizer.decode(head).rstrip() + " … " + tokenizer.decode(tail).lstrip()


def fit_record(tokenizer: PreTrainedTokenizerBase, record: Record, max_tokens: int) -> Record:
    """The record, shortened until prompt and answer take at most `max_tokens` tokens.

    The passage loses its middle first, then the answer down to MIN_ANSWER_TOKENS; the question and
    the options are never touched.

    Raises:
        ValueError: if that is not enough.
    """

    def excess(candidate: Record) -> int:
        prompt = tokenize(tokenizer, build_prompt(tokenizer, candidate))
        return len(prompt) + len(tokenize(tokenizer, candidate.get("response", ""))) - max_tokens

    ellipsis = len(tokenize(tokenizer, " … "))
    for part, least in (("context", 0), ("response", MIN_ANSWER_TOKENS)):
        text, dropped = record.get(part) or "", 0
        length = len(tokenize(tokenizer, text))
        # Text tokenised anew may take more tokens than were kept of it: drop more until it fits
        while (over := excess(record)) > 0 and length - dropped > least + ellipsis:
            dropped = min(dropped + over, length - least)
            record = {**record, part: cut_middle(tokenizer, text, dropped)}
    if over > 0:
        raise ValueError(
            f"too long by {over} tokens even with passage and answer shortened to the least"
        )
    return record


def fit_records(
    tokenizer: PreTrainedTokenizerBase, records: list[Record], max_tokens: int, what: str
) -> list[Record]:
    """The records that fit_record() can shorten to `max_tokens`; says which of `what` it cannot.

    Raises:
        InputError: if none is left.
    """
    fitting, reasons = [], []
    for record in records:
        try:
            fitting.append(fit_record(tokenizer, record, max_tokens))
        except ValueError as error:
            reasons.append(f"line {record.get('line')}: {error}")
    report_skipped(reasons, len(records), what)
    return fitting


def report_skipped(reasons: list[str], count: int, what: str) -> None:
    if reasons and len(reasons) == count:
        raise InputError(f"no record of {what} fits --max_seq_length; raise it\n{listing(reasons)}")
    if reasons:
        say(f"warning: skipped {len(reasons)} of {count} of {what}\n{listing(reasons)}")


def source(record: dict[str, Any]) -> str:
    """Where a record came from: file:line."""
    return f"{record.get('file', 'line')}:{record.get('line')}"


def encode_records(
    tokenizer: PreTrainedTokenizerBase, records: list[Record], adapter: str, max_tokens: int
) -> Iterator[dict[str, Any]]:
    """The encoding of each record, shortened to `max_tokens`, with its number of tokens as
    `length`, its `source` and, if it cannot be shortened so far, the reason as `skipped`."""

    def encode(part: list[Record]) -> list[dict[str, list[int]]]:
        segments = [confidence_segments(tokenizer, record, adapter) for record in part]
        return encode_segments(tokenizer, segments)

    for start in range(0, len(records), 1000):
        part = records[start : start + 1000]
        for record, encoding in zip(part, encode(part), strict=True):
            skipped = ""
            if len(encoding["input_ids"]) > max_tokens:
                try:
                    [encoding] = encode([fit_record(tokenizer, record, max_tokens - 2)])
                except ValueError as error:
                    skipped = f"line {record.get('line')}: {error}"
            yield {
                **encoding,
                "length": len(encoding["input_ids"]),
                "source": source(record),
                "skipped": skipped,
            }


def encode_dataset(
    tokenizer: PreTrainedTokenizerBase, records: list[Record], settings: Settings
) -> datasets.Dataset:
    """encode_records() as a dataset on disk: see cache_encodings()."""
    options = {"adapter": settings.adapter, "max_tokens": settings.max_seq_length}
    what = f"--train_data {settings.train_data}"
    return cache_encodings(encode_records, tokenizer, records, options, what)


def cache_encodings(
    encode: Callable[..., Iterator[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    records: list,
    options: dict[str, Any],
    what: str,
    *files: str,
) -> datasets.Dataset:
    """What encode(tokenizer, records, **options) yields, without what it marks as `skipped`, as a
    dataset of `input_ids`, `labels`, `length` and `source` on disk.

    One process of a machine encodes; the others, and later runs on the same content, read what it
    wrote to the datasets library's cache. What decides the encodings is the key: records,
    tokenizer, options, this file and what other `files` encode.
    """
    datasets.disable_progress_bars()
    key = hashlib.sha256()
    for file in (__file__, *files):
        key.update(Path(file).read_bytes())
    key.update(tokenizer.backend_tokenizer.to_str().encode())
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    text = [tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, added]
    key.update(json.dumps([text, options, records]).encode())
    try:
        with PartialState().local_main_process_first():
            encodings = datasets.Dataset.from_generator(
                lambda: encode(tokenizer, records, **options), fingerprint=key.hexdigest()
            )
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise
        raise InputError(f"cannot write the cache of encodings: {reason}; set HF_HOME") from error
    reasons = [reason for reason in encodings["skipped"] if reason]
    report_skipped(reasons, len(encodings), what)
    if reasons:
        encodings = encodings.filter(lambda skipped: not skipped, input_columns="skipped")
    return encodings.remove_columns("skipped")


def pad(rows: list[list[int]], value: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as one (batch, longest) tensor, and the mask of what is no padding.

    On the right, where nothing can attend to it, padding needs no attention mask, and attention
    without a mask is faster; generation, which goes on at the right, must have it on the left.
    """
    sequences = [torch.tensor(row) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    side = "left" if left else "right"
    padded = pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side)
    columns = torch.arange(padded.shape[1])
    mask = (columns.flip(0) if left else columns) < lengths[:, None]
    return padded, mask.long()


@dataclass
class Collator:
    """Batches encodings, padded on the right."""

    pad_token_id: int

    def __call__(self, encodings: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids, mask = pad([row["input_ids"] for row in encodings], self.pad_token_id)
        labels, _ = pad([row["labels"] for row in encodings], -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {**batch, "source": [row.get("source", "") for row in encodings]}


# ------------------------------------------------------------------------------------------------
# Answer judging: what did the response answer, and is that right?


class Judgement(NamedTuple):
    extracted: str | None  # "yes"/"no", a letter, a number or LaTeX; None when it cannot be told
    correct: bool | None  # None when nothing was extracted or no (possible) true answer is given


# "the answer is", "Final answer:", "the correct option is"; then what may open the answer itself
STATEMENT = (
    r"\b(?:answer|option|choice|conclusion)(?:\s+(?:to|for)\s+(?:the|this)\s+question)?"
    r"\s*(?:\bis\b|:)"
)
OPENING = r"[\s:,*\"'“‘(\[$]*(?:\\boxed\{(?:\\text\{)?)?[\s(]*"
# In "no evidence", "no longer", "no one" the word belongs to the next one and answers nothing
YES_NO = (
    r"(yes|no|true|false)\b(?![ \t]+(?:longer|one|doubt|matter|more|less|such|way|idea|evidence|"
    r"information|mention|indication|answer|passage|clear|single|part|other|reason)\b)"
)
NUMBER = r"([-+]?\$?\s?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?)"


def last(pattern: str, text: str, flags: int = re.IGNORECASE) -> str | None:
    """The first group of the pattern's last match."""
    found = None
    for match in re.finditer(pattern, text, flags):
        found = match.group(1)
    return found


def extract_yes_no(response: str) -> str | None:
    """The last explicit statement; else the leading word; else yes or no as a clause of its own."""
    found = (
        last(STATEMENT + OPENING + YES_NO, response)
        or last(r"\b(?:statement|claim|question|premise)\s+is\s+(true|false)\b", response)
        or last(r"\A[\s\W]*" + YES_NO, response)
        or last(
            r"(?:^|[.,:;!?\n(])[\s*\"'“]*" + YES_NO + r"(?=[\s*\"'”]*(?:[.,:;!?)\n]|$))", response
        )
        or last(r"\b(?:say|think|believe|is|be)\s+" + YES_NO + r"(?=\s*(?:[.,:;!?\n]|$))", response)
    )
    if found is None:
        return None
    return "yes" if found.lower() in ("yes", "true") else "no"


def extract_letter(response: str, options: dict[str, str] | None) -> str | None:
    """The last letter stated as the answer; else a leading or lonely one; else the option named."""
    letters = re.escape("".join(options or "")) or "ABCDE"
    # A capital that does not run on into a word or a phrase, as the article "A" does
    capital = rf"([{letters}])\b(?![’'-]\w)(?!\s+(?!because|since|as|and|which|due|is\b)[a-z])"
    bare = rf"[(\[*]*([{letters}])[)\]*]*"
    small = rf"\(([{letters.lower()}])\)"
    found = (
        last(rf"(?i:{STATEMENT}{OPENING}(?:(?:option|choice|letter)\s*\(?)?){capital}", response, 0)
        or last(rf"\\boxed\{{(?:\\text\{{)?\(?([{letters}])\)?\}}", response, 0)
        or last(rf"(?i:{STATEMENT})[\s:*]*{small}", response, 0)
        or last(rf"(?i:\b(?:option|choice))\s+{bare}\s+is\s+(?:correct|right|the)\b", response, 0)
        or last(rf"(?i:\b(?:choose|select|pick)\s+(?:option\s+)?){bare}(?=[\s.,:;]|$)", response, 0)
        or last(rf"\A\W*{bare}(?=\s*[.):,]|\s*$|\s*\n|\s+[-–—])", response, 0)
        or last(rf"\A\s*{small}", response, 0)
        or last(rf"(?m:^)\W*{bare}[.]?\s*\Z", response, 0)
    )
    if found is None:
        mentioned = set(re.findall(rf"\(([{letters}])\)", response))
        found = mentioned.pop() if len(mentioned) == 1 else None
    if found is not None:
        return found.upper()
    return extract_option_text(response, options) if options else None


def extract_option_text(response: str, options: dict[str, str]) -> str | None:
    """The key of the one option whose text is stated as the answer, or else is mentioned at all."""
    for text in (last(STATEMENT + r"([^\n]*)", response), response):
        named = [
            (key, match.span())
            for key, option in options.items()
            for match in re.finditer(
                rf"(?<!\w){re.escape(option.strip())}(?!\w)", text or "", re.IGNORECASE
            )
            if option.strip()  # else it would stand everywhere
        ]
        # "cancer" inside "lung cancer" is no mention of the option "cancer"
        keys = {
            key
            for key, (start, end) in named
            if not any(s <= start and end <= e and e - s > end - start for _, (s, e) in named)
        }
        if len(keys) == 1:
            return keys.pop()
    return None


def extract_number(response: str) -> str | None:
    """After "####"; else in \\boxed{}; else the last "answer is"; else the last number of all."""
    return (
        last(r"####\s*" + NUMBER, response)
        or last(NUMBER, extract_boxed(response) or "")
        or last(STATEMENT + r"[^\d\n.+-]{0,40}?" + NUMBER, response)
        or last(NUMBER, response)
    )


def extract_boxed(response: str) -> str | None:
    """The content of the last \\boxed{…} with balanced braces; else the last "answer is $…$"."""
    start = max(response.rfind("\\boxed{"), response.rfind("\\fbox{"))
    if start >= 0:
        begin = response.index("{", start) + 1
        depth = 1
        for i in range(begin, len(response)):
            depth += {"{": 1, "}": -1}.get(response[i], 0)
            if depth == 0:
                return response[begin:i].strip() or None
        return None  # cut off before it was closed
    return last(STATEMENT + r"\s*\$([^$\n]+)\$", response)


LATEX_RULES = [  # applied in order: what is removed or rewritten does not change the meaning
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;: ]|\\?[$%]|\^\\circ|\^\{\\circ\}", ""),
    (r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}", r"\1"),
    (r"\s+|\.$", ""),
    (r"^[a-zA-Z]=", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac(\w)(\w)", r"\\frac{\1}{\2}"),
    (r"\\sqrt(\w)", r"\\sqrt{\1}"),
    (r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3"),
]


def same_answer(extracted: str, truth: str) -> bool:
    """Whether two numbers or LaTeX expressions are equal once written alike."""
    for pattern, replacement in LATEX_RULES:
        extracted = re.sub(pattern, replacement, extracted)
        truth = re.sub(pattern, replacement, truth)
    numbers = as_number(extracted), as_number(truth)
    if None in numbers:
        return extracted == truth
    return abs(numbers[0] - numbers[1]) <= Decimal("1e-9")


def as_number(text: str) -> Decimal | None:
    numerator, *denominator = text.replace(",", "").split("/")
    try:
        value = Decimal(numerator)
        for part in denominator:
            value /= Decimal(part)
    except ArithmeticError:
        return None
    return value if value.is_finite() and abs(value.adjusted()) < 10_000 else None


def true_letter(truth: Any, options: dict[str, str] | None) -> str | None:
    """The letter of a true answer given as letter, as position from 0, or as an option's text; None
    if it is none of them."""
    letters = list(options or "ABCDEFGHIJ")
    if isinstance(truth, int):
        there = truth in range(len(letters)) and not isinstance(truth, bool)
        return letters[truth] if there else None
    text = str(truth).strip()
    for key, option in (options or {}).items():
        if text.casefold() == option.strip().casefold() and text not in options:
            return key
    letter = text.strip("().").upper()
    return letter if letter in map(str.upper, letters) else None


def judge_answer(
    dataset: str, response: str, truth: Any, options: dict[str, str] | None = None
) -> Judgement:
    """Judges a model's response by explicit rules; what cannot be told is None, never wrong.

    Args:
        dataset: a key of DATASETS; it decides whether yes or no, a letter, a number or a boxed
            expression is looked for.
        response: the model's answer, without confidence tokens. What follows a new "Question:"
            line is the model talking to itself and is not read.
        truth: the true answer; with None the answer is extracted and not judged.
        options: {"A": text, …} of a multiple-choice question.

    Raises:
        InputError: if the dataset is not known.
    """
    if dataset not in DATASETS:
        raise InputError(f"unknown dataset {dataset!r}; known are {', '.join(DATASETS)}")
    kind = DATASETS[dataset].answers
    response = re.split(r"\n\s*Question:", response)[0]
    if kind == "letter":
        extracted = extract_letter(response, options)
    else:
        extract = {"yes_no": extract_yes_no, "number": extract_number, "boxed": extract_boxed}[kind]
        extracted = extract(response)
    if extracted is None or truth is None:
        return Judgement(extracted, None)
    if kind == "yes_no":
        truth_is_yes = str(truth).strip().lower() in ("yes", "true", "1")
        return Judgement(extracted, (extracted == "yes") == truth_is_yes)
    if kind == "letter":
        letter = true_letter(truth, options)
        return Judgement(extracted, None if letter is None else extracted == letter)
    final = str(truth).rpartition("####")[2]  # GSM8K's solutions end with "#### 72"
    return Judgement(extracted, same_answer(extracted, extract_boxed(final) or final))


# ------------------------------------------------------------------------------------------------
# Metrics: pure functions of confidence = P(C) and of what was right


def check_confidence(confidence: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
    confidence = np.asarray(confidence, dtype=np.float64)
    correct = np.asarray(correct, dtype=np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise ValueError(f"shapes differ: confidence {confidence.shape}, correct {correct.shape}")
    if not np.isfinite(confidence).all():
        raise ValueError(f"{(~np.isfinite(confidence)).sum()} of the confidences are not finite")
    if not np.isin(correct, (0.0, 1.0)).all():
        raise ValueError("correct must hold only 0 and 1")
    if ((confidence < 0) | (confidence > 1)).any():
        raise ValueError("a confidence lies outside 0…1")
    return confidence, correct


def binned_error(confidence: np.ndarray, correct: np.ndarray, p: str, beta: int) -> float:
    """calibration_error() of sorted confidences (n,) and outcomes (n,)."""
    # Equal confidences share their mean outcome, else the order of ties would decide the bins.
    starts = np.flatnonzero(np.diff(confidence, prepend=-1.0))
    sizes = np.diff(starts, append=len(confidence))
    correct = np.repeat(np.add.reduceat(correct, starts) / sizes, sizes)

    starts = np.arange(max(1, len(confidence) // beta)) * beta
    sizes = np.diff(starts, append=len(confidence))
    gaps = np.abs(np.add.reduceat(confidence - correct, starts)) / sizes
    if p == "infty":
        return float(gaps.max())
    return float(np.average(gaps ** int(p), weights=sizes) ** (1 / int(p)))


def calibration_error(
    confidence: Any, correct: Any, p: str | int = "2", beta: int = 100
) -> float | None:
    """Calibration error over bins of `beta` answers each, sorted by confidence.

    The n // beta bins hold beta answers, the last one also the remainder; fewer than beta answers
    are one bin. In a bin, the gap is |mean confidence - share correct|; the error is the p-norm of
    the gaps weighted by the bins' sizes, for "infty" the largest gap.
    (Hendrycks et al., https://arxiv.org/abs/1812.04606; every bin counts here, the last included.)

    Args:
        confidence: (n,) probabilities in 0…1.
        correct: (n,) booleans or 0 and 1.
        p: "1" (mean gap), "2" (root mean square gap) or "infty" (largest gap).
        beta: answers in a bin.

    Returns:
        A number in 0…1; None for n = 0. Outcomes of one class are as good as any. Equal
        confidences share their mean outcome, so the order of the input does not matter.

    Raises:
        ValueError: on NaN, a confidence outside 0…1, shapes that differ, p or beta not as above.
    """
    p = str(p)
    if p not in ("1", "2", "infty"):
        raise ValueError(f"p is {p!r}, it must be 1, 2 or infty")
    if beta < 1:
        raise ValueError(f"beta is {beta}, it must be at least 1")
    confidence, correct = check_confidence(confidence, correct)
    if not len(confidence):
        return None
    order = confidence.argsort(kind="stable")
    return binned_error(confidence[order], correct[order], p, beta)


def calibration_error_if_perfect(
    confidence: Any, p: str | int = "2", beta: int = 100, draws: int = 1000
) -> float | None:
    """The 95th percentile of calibration_error() if these confidences were exactly right.

    Outcomes are drawn `draws` times with the confidences as their probabilities. A measured error
    at or below this value is no evidence of miscalibration at this sample size.
    """
    confidence = np.sort(check_confidence(confidence, np.zeros(len(confidence)))[0])
    if not len(confidence):
        return None
    rng = np.random.default_rng(0)
    errors = [
        binned_error(confidence, (outcome < confidence).astype(float), str(p), beta)
        for outcome in rng.random((draws, len(confidence)))
    ]
    return float(np.percentile(errors, 95))


def reliability_bins(confidence: Any, correct: Any, bins: int = ECE_BINS) -> np.ndarray:
    """(bins, 3): count, mean confidence and share correct of equal-width bins [a, b); 1.0 is in
    the last. Means of an empty bin are NaN."""
    confidence, correct = check_confidence(confidence, correct)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(index, values, bins) / count for values in (confidence, correct)]
    return np.stack([count, *means], axis=1)


def expected_calibration_error(confidence: Any, correct: Any, bins: int = ECE_BINS) -> float | None:
    """ECE: the gaps of equal-width bins, weighted by their counts (Naeini et al. 2015)."""
    count, mean, right = reliability_bins(confidence, correct, bins).T
    filled = count > 0
    if not filled.any():
        return None
    return float(np.average(np.abs(mean - right)[filled], weights=count[filled]))


def confidence_metrics(
    scores: list[Score], p: str | int = "2", beta: int = 100
) -> dict[str, float | int | None]:
    """Every figure of a validation set from its scored answers. None where a figure is undefined.

    AUROC is None when all answers are right, or all wrong. An answer that could not be judged
    counts as wrong; a missing or foreign tag counts against `accuracy`.
    """
    confidence = np.array([score.confidence for score in scores], dtype=np.float64)
    correct = np.array([score.correct for score in scores], dtype=bool)
    count = len(scores)
    if not count:
        return {"num_samples": 0}
    share = correct.mean()

    def rate(condition: Any) -> float:
        return sum(map(bool, map(condition, scores))) / count

    return {
        "num_samples": count,
        "accuracy": rate(lambda score: score.emitted == ("C" if score.correct else "U")),
        "majority_accuracy": float(max(share, 1 - share)),
        "answer_accuracy": float(share),
        "calibration_error": calibration_error(confidence, correct, p, beta),
        "calibration_error_if_perfect": calibration_error_if_perfect(confidence, p, beta),
        "ece": expected_calibration_error(confidence, correct),
        "brier": float(brier_score_loss(correct, confidence, pos_label=True)),
        "nll": float(log_loss(correct, confidence, labels=[False, True])),
        "auroc": float(roc_auc_score(correct, confidence)) if 0 < share < 1 else None,
        "mean_confidence": float(confidence.mean()),
        "missing_tag_rate": rate(lambda score: score.emitted is None),
        "wrong_domain_rate": rate(lambda score: score.emitted == "other"),
        "unparsed_rate": rate(lambda score: score.extracted is None),
    }


class Score(NamedTuple):
    """One validated answer."""

    index: int  # of the record in its validation set
    confidence: float  # P(C) / (P(C) + P(U)) at the tag's position
    emitted: str | None  # the tag written: "C" or "U" of the right domain, "other", None if none
    correct: bool  # the answer, not the tag
    extracted: str | None  # what judge_answer() read from it
    response: str


# ------------------------------------------------------------------------------------------------
# Strategy: how the launch had the work split. It is chosen by accelerate's configuration file


def tensor_parallel_size() -> int:
    """Processes that share one replica of the model, each with a part of every matrix."""
    return int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1"))


def pipeline_parallel_size() -> int:
    """Processes that share one replica of the model, each with some of the layers. accelerate knows
    none of it: a script that can do so sets the variable by its flag."""
    return int(os.environ.get("PIPELINE_PARALLEL_SIZE", "1"))


def model_parallel_size() -> int:
    """Processes that share one replica of the model, in either way; they see the same batches."""
    return tensor_parallel_size() * pipeline_parallel_size()


def replicas() -> int:
    """Shares that a batch is split into: one for each process, or group that shares a model."""
    return int(os.environ.get("WORLD_SIZE", "1")) // model_parallel_size()


def sharding() -> str | None:
    """What splits the parameters over the processes: "zero3", "fsdp2", "tp", "pp", or None: each
    process holds them all. To ask once TrainingArguments has been made."""
    if tensor_parallel_size() > 1:
        return "tp"
    if pipeline_parallel_size() > 1:
        return "pp"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp2"
    return "zero3" if is_deepspeed_zero3_enabled() else None


def under_deepspeed() -> bool:
    """Whether the launch, or a flag of transformers, asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def check_strategy(trainer: Trainer) -> None:
    """Refuses to train otherwise than the launch asked for: accelerate falls back silently.

    Raises:
        InputError: naming what was asked for and what there is.
    """
    asked = {"zero3": "DEEPSPEED", "fsdp2": "FSDP"}.get(sharding())
    if under_deepspeed():
        asked = "DEEPSPEED"
    kind = trainer.accelerator.distributed_type.value
    if asked not in (None, kind):
        raise InputError(
            f"the launch asked for {asked} and accelerate made it {kind}, as it does without GPUs: "
            "launch with configs/strategies/ddp.yaml"
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if trainer.args.world_size != world_size:
        raise InputError(f"{world_size} processes were launched, {trainer.args.world_size} met")


# ------------------------------------------------------------------------------------------------
# Saving: what is written is whole or not there, and what has been damaged since can be told

MANIFEST = "SHA256SUMS"  # of a checkpoint; `sha256sum --check SHA256SUMS` in its folder checks too
SAVING_ERRORS = (OSError, RuntimeError, SafetensorError)  # of the system, torch.save, safetensors


def sync(path: Path) -> None:
    """Has the disk itself hold a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces a file's content at once: a reader or a crash finds the old text or the new one."""
    new = staging(path)
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)


def staging(path: Path) -> Path:
    """Where the content of a file or folder is prepared; its name begins with a dot."""
    return path.with_name(f".{path.name}.new")


def set_aside(folder: Path) -> Path:
    """Takes a folder's name from it, so that what a crash leaves of it is not taken for it."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    return folder.rename(old)


def replace_folder(folder: Path) -> None:
    """Puts what was prepared in its staging folder in the place of `folder`, at once."""
    new = staging(folder)
    for path in [*new.rglob("*"), new]:
        sync(path)
    old = set_aside(folder) if folder.exists() else None
    new.rename(folder)
    sync(folder.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(str(path.relative_to(folder)) for path in paths)


def seal(folder: Path) -> None:
    """Writes the checksums of a folder's files. All processes take part, and share the reading."""
    seen = gather_object([files_of(folder)])  # a disk of its own may show a process other files
    lines, problem = [], None
    for i, name in enumerate(sorted(set().union(*seen))):
        holders = [rank for rank, names in enumerate(seen) if name in names]
        if holders[i % len(holders)] == PartialState().process_index:
            try:
                lines.append((name, sha256(folder / name)))
            except OSError as error:
                problem = error
    sums = sorted(gather_object(lines))
    if problem:
        raise problem
    if PartialState().is_main_process:
        text = "".join(f"{digest}  {name}\n" for name, digest in sums)
        (folder / MANIFEST).write_text(text, encoding="utf-8")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is what was saved, to the byte."""
    try:
        claimed = (checkpoint / MANIFEST).read_bytes()
        sums = {name: sha256(checkpoint / name) for name in files_of(checkpoint)}
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
    found = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
    if found == claimed:
        return None
    lines = set(found.splitlines()) ^ set(claimed.splitlines())
    names = sorted({line.partition(b"  ")[2].decode(errors="replace") for line in lines})
    return f"{' and '.join(names[:3]) or MANIFEST} is not what was saved"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((path for path in found if step_of(path) is not None), key=step_of)


def checkpoint_folder(folder: str | Path, step: int) -> Path:
    return Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None if it is named otherwise."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else None


def no_room(folder: Path, error: Exception) -> str:
    """Why something could not be written to a folder: torch names neither disk nor reason."""
    with suppress(OSError):
        disk = shutil.disk_usage(folder)
        if disk.free < max(1 << 20, disk.total // 200):
            megabytes = f"{disk.free / 1e6:,.1f} of {disk.total / 1e6:,.1f} MB free"
            return f"the disk of {folder} is full ({megabytes})"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def errors_of_torch_save(errors: list[Exception]) -> Iterator[None]:
    """Within it torch.save collects its errors instead of raising them: DeepSpeed and FSDP go on to
    collectives that the other processes would wait in for ever."""
    save = torch.save

    def collecting(*args: Any, **kwargs: Any) -> None:
        try:
            save(*args, **kwargs)
        except SAVING_ERRORS as error:
            errors.append(error)

    torch.save = collecting
    try:
        yield
    finally:
        torch.save = save


# ------------------------------------------------------------------------------------------------
# Processes and signals


class Interruption:
    """SIGTERM, SIGINT or SIGHUP: the step in progress is finished and saved, then the run ends with
    128 + the signal's number. A second one ends it at once."""

    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    same = 2.0  # seconds: a terminal signals all processes, and launchers hand on what they got

    def __init__(self) -> None:
        self.signal = 0  # the first one received; 0: none
        self.training = False  # whether there is a step in progress to wait for
        self.when = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        self.signal, earlier = 0, {}
        if threading.current_thread() is threading.main_thread():  # Python allows it no other
            for number in self.handled:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    earlier[number] = signal.signal(number, self.receive)
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.signal and now - self.when < self.same:
            return
        if self.signal:
            end_process(128 + number)
        self.signal, self.when = number, now
        if not self.training:
            raise Stopped

    def join(self, number: int) -> None:
        """Takes the signal that another process has received, 0 if none, as one's own."""
        if number and not self.signal:
            self.signal, self.when = number, time.monotonic()

    def agreed(self) -> int:
        """The signal that any process has received, 0 if none. All processes must ask."""
        self.join(max(gather_object([self.signal])))
        return self.signal


interruption = Interruption()


def report(script: str, message: str) -> None:
    with suppress(OSError):
        print(f"{script}: error: {message}", file=sys.stderr, flush=True)


def end_process(code: int) -> None:
    """Ends this process here and now, without taking apart what other processes may hang in."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def machine() -> str:
    """Tells apart where process ids mean different processes."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace) if namespace.exists() else ''}"


class Watch(threading.Thread):
    """Ends this process when another one of the run has died, which a collective may never notice.

    Each process looks after those on its machine, and tells the other machines through the store
    that torch.distributed meets at. Of the survivors on a machine one says what happened.
    """

    interval, grace = 1.0, 2.0  # seconds; within the grace the process may be ending by itself
    current: ClassVar[Watch | None] = None

    def __init__(self, script: str) -> None:
        super().__init__(daemon=True, name="watch")
        self.script = script
        state = PartialState()
        self.rank = state.process_index
        here = (machine(), os.getpid(), psutil.Process().create_time())
        self.processes = gather_object([here])
        self.mine = [i for i, (where, *_) in enumerate(self.processes) if where == here[0]]
        # A client of its own: that of the main thread is locked while it waits for something
        store = torch.distributed.distributed_c10d._get_default_store().clone()
        self.store = torch.distributed.PrefixStore("watch", store)
        self.verdict: str | None = None  # what has happened, once something has
        self.ended = threading.Event()

    def gone(self, rank: int) -> bool:
        _, pid, created = self.processes[rank]
        try:
            process = psutil.Process(pid)
            return process.create_time() != created or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def look(self) -> None:
        if self.store.check(["died"]):
            rank = int(self.store.get("died"))
            where = "" if rank in self.mine else f" on {self.processes[rank][0].split()[0]}"
            self.verdict = f"process {rank}{where} has ended"
        for rank in self.mine:
            if self.gone(rank) and not self.store.check([f"left {rank}"]):
                self.store.set("died", str(rank))
                self.verdict = f"process {rank} (pid {self.processes[rank][1]}) has ended"

    def first_to_tell(self) -> bool:
        """Whether no other process of this machine has said the verdict."""
        try:
            return self.store.add(f"told on {self.processes[self.rank][0]}", 1) == 1
        except RuntimeError:  # the store went with the process that held it
            return self.rank == self.mine[0]

    def run(self) -> None:
        unreachable = 0
        while not self.ended.wait(self.interval):
            try:
                self.look()
                unreachable = 0
            except RuntimeError:  # the store's process has ended, or the network is down
                unreachable += 1
                if unreachable == 5:
                    self.verdict = "the machine where the processes met does not answer"
            if self.verdict and not self.ended.wait(self.grace):
                if self.first_to_tell():
                    report(self.script, f"{self.verdict}, and the others end with it; {GOES_ON}")
                end_process(1)

    def leave(self) -> None:
        """Tells the other processes that this one ends as it should."""
        self.ended.set()
        with suppress(RuntimeError):
            self.store.set(f"left {self.rank}", "")


# ------------------------------------------------------------------------------------------------
# Model and tokenizer


def load_tokenizer(model_name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        InputError: if there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--model_name {model_name}: cannot load its tokenizer: {reason}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# Whose forward passes unsloth replaces by ones that still call embedding and head as modules, so
# that the tag rows are seen; Gemma's detaches the embedding, others are rewritten as source
UNSLOTH_MODELS = ("llama", "mistral", "qwen2", "qwen3")


def load_base_model(
    model_name: str,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    fp8: bool = False,
    backend: str = "hf",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The pretrained model on this process's own device, its weights in `dtype` or quantised, or
    this process's part of it.

    Raises:
        InputError: if it cannot be found or loaded.
    """
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    quantization = None
    if load_in_8bit or load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        if backend == "unsloth":
            kind = AutoConfig.from_pretrained(model_name).model_type
            if kind not in UNSLOTH_MODELS:
                raise ValueError(f"--backend unsloth takes {', '.join(UNSLOTH_MODELS)}, not {kind}")
            model, _ = unsloth.FastLanguageModel.from_pretrained(
                model_name,
                max_seq_length=None,  # the model's own; a greater one would rescale its positions
                dtype=dtype,
                load_in_4bit=load_in_4bit,
                device_map={"": device},
                use_gradient_checkpointing=False,  # Trainer turns it on
                use_exact_model_name=True,  # not a copy of unsloth's own
                offload_embedding=False,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
            )
        else:
            place: dict[str, Any] = {"device_map": {"": device}}
            if sharding():  # DeepSpeed or accelerate place what they split
                place = {}
            if sharding() == "tp":
                place["distributed_config"] = DistributedConfig(tp_size=tensor_parallel_size())
            model = AutoModelForCausalLM.from_pretrained(
                model_name,
                dtype=dtype,
                attn_implementation=attn_implementation,
                quantization_config=quantization,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,  # a pickle runs what it holds
                **place,
            )
    except (OSError, ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--model_name {model_name} cannot be loaded: {reason}") from error
    for module in model.modules():
        # On a CPU bitsandbytes repacks 4-bit weights in evaluation, and no gradient passes after it
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if fp8:
        convert_frozen_linears(model)
    return model


FP8 = torch.float8_e4m3fn


# FP8 for --fp8: frozen linear layers whose weights and matrix products have 8 bits


def to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of `x` in FP8 and, as a column, the power of two that it was divided by."""
    x = x.to(torch.bfloat16).contiguous()
    most = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    # FP8 ends at 448. Without its mantissa, most / 224 is a power of two above most / 448.
    scale = ((most / 224).clamp(min=1e-30).view(torch.int32) & 0x7F800000).view(torch.float32)
    return (x / scale.to(x.dtype)).to(FP8), scale


def fp8_product(
    x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, fast: bool
) -> torch.Tensor:
    rows, row_scale = to_fp8(x)
    columns, column_scale = weight[0].view(FP8).t(), weight[1].view(torch.float32).t()
    return torch._scaled_mm(
        rows, columns, row_scale, column_scale, bias, None, torch.bfloat16, use_fast_accum=fast
    ).to(x.dtype)


class FrozenProduct(torch.autograd.Function):
    """x · W + bias of (tokens, features), with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Float8Linear) -> torch.Tensor:
        ctx.transposed = [layer.by_input, layer.input_scale]
        bias = None if layer.bias is None else layer.bias.to(torch.bfloat16)
        return fp8_product(x, [layer.by_output, layer.output_scale], bias, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return fp8_product(grad, ctx.transposed, None, fast=False), None


class ReadOnly(torch.Tensor):
    """Values to look at; what would change them in place, as merging does, is refused."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> torch.Tensor:
        raise RuntimeError("FP8 weights cannot be merged into: load the base model without --fp8")


class Float8Linear(torch.nn.Linear):
    """A frozen linear layer in FP8. Its weight is stored twice, since the backward needs it
    transposed with scales by input; together that is the memory of bfloat16. Scales that are
    powers of two round both alike: the gradient is that of the weight the forward pass uses."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        # Integer parameters: `.to(dtype)` leaves them alone, any backend of DDP can send them, and
        # it does so once, where it would send buffers before every step.
        parts = (*to_fp8(linear.weight.detach()), *to_fp8(linear.weight.detach().t()))
        bits = [torch.nn.Parameter(part.view(torch.uint8), requires_grad=False) for part in parts]
        self.by_output, self.output_scale, self.by_input, self.input_scale = bits

    @property
    def weight(self) -> torch.Tensor:
        """A copy, for PEFT to read shape, dtype and device of; it could not be written to."""
        values = self.by_output.view(FP8).float() * self.output_scale.view(torch.float32)
        return values.to(self.dtype).as_subclass(ReadOnly)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = FrozenProduct.apply(x.reshape(-1, x.shape[-1]), self)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)


def convert_frozen_linears(model: PreTrainedModel) -> None:
    """Replaces the linear layers but the head, one at a time. To call before get_peft_model().

    Layers with a side that is no multiple of 16 and layers quantised already stay as they are.
    """
    head, device = model.get_output_embeddings(), model.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError("--fp8 needs a GPU of compute capability 8.9 or more (H100, L40S, 4090)")
    for parent in model.modules():
        for name in [name for name, _ in parent.named_children()]:
            old = getattr(parent, name)
            plain = type(old) is torch.nn.Linear and old is not head
            if plain and old.in_features % 16 == old.out_features % 16 == 0:
                setattr(parent, name, Float8Linear(old))


class ConfidenceIds(NamedTuple):
    """Token ids of the marker and, for each domain, of its tags (confident, unsure)."""

    marker: int
    tags: dict[str, tuple[int, int]]

    @property
    def meaning(self) -> dict[int, tuple[str, str]]:
        """{token id: (domain, "C" or "U")}"""
        return {
            token: (domain, letter)
            for domain, pair in self.tags.items()
            for token, letter in zip(pair, "CU")
        }

    @property
    def all(self) -> list[int]:
        return [self.marker, *self.meaning]


def confidence_ids(tokenizer: PreTrainedTokenizerBase) -> ConfidenceIds:
    to_id = tokenizer.convert_tokens_to_ids
    tags = {domain: (to_id(c), to_id(u)) for domain, (c, u) in CONFIDENCE_TOKENS.items()}
    return ConfidenceIds(to_id(MARKER_TOKEN), tags)


def add_confidence_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Adds marker and tags; returns the ids of those that are new to the tokenizer."""
    old_size = len(tokenizer)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [MARKER_TOKEN, *TAG_MEANING]}, replace_extra_special_tokens=False
    )
    for token in (MARKER_TOKEN, *TAG_MEANING):
        if tokenize(tokenizer, token) != [tokenizer.convert_tokens_to_ids(token)]:
            raise InputError(
                f"this model's tokenizer splits the token {token}; rename it in the file"
            )
    return [token for token in confidence_ids(tokenizer).all if token >= old_size]


def add_confidence_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_ids: list[int]
) -> None:
    """Gives the new tokens their rows; the model's embedding grows only if it must.

    They start at the mean of the existing rows, each moved by a tenth of their spread in a
    direction of its own, so that confident and unsure differ from the start.
    """
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {part.weight.data_ptr(): part.weight for part in embeddings}  # one if they are tied
    with torch.no_grad():
        for weight in weights.values():
            existing = weight[: len(tokenizer) - len(new_ids)].float()
            mean, spread = existing.mean(dim=0), existing.std(dim=0)
            for token in new_ids:
                seed = zlib.crc32(tokenizer.convert_ids_to_tokens(token).encode())
                noise = torch.randn(len(mean), generator=torch.Generator().manual_seed(seed))
                weight[token] = (mean + 0.1 * spread * noise.to(mean.device)).to(weight.dtype)


def initialize_model_with_tokens(
    model_name: str,
    adapter: str = "lora",
    lora_r: int = LORA_R,
    lora_alpha: float = LORA_ALPHA,
    lora_dropout: float = LORA_DROPOUT,
    target_modules: list[str] | None = None,
    **loading: Any,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model wrapped in a fresh adapter whose tag and marker rows train, and its tokenizer.

    Trainable are the LoRA matrices on every linear layer and the rows of marker and tags, in the
    input embedding and, where it is not tied to it, in the output head: without its rows a new
    token cannot be learned. Everything else is frozen.

    Args:
        model_name: model on the Hugging Face Hub, or a folder.
        adapter: "lora", or "activated" for one that acts from the marker on (PEFT's aLoRA).
        lora_r, lora_alpha, lora_dropout: rank, scale times r, dropout of the adapter.
        target_modules: see lora_config().
        loading: passed to load_base_model().

    Returns:
        (model, tokenizer). The adapter's weights are float32, the base's of `dtype` or quantised.

    Raises:
        InputError: if the model cannot be found or loaded.
    """
    tokenizer = load_tokenizer(model_name, loading.get("trust_remote_code", False))
    model = load_base_model(model_name, **loading)
    add_confidence_rows(model, tokenizer, add_confidence_tokens(tokenizer))
    ids = confidence_ids(tokenizer)

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    trained = [embedding] if head.weight is embedding.weight else [embedding, head]
    names = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if any(module is part for part in trained)
    ]
    model = add_adapter(
        model,
        target_modules,
        loading.get("backend", "hf"),
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        trainable_token_indices=dict.fromkeys(names, ids.all),
        alora_invocation_tokens=[ids.marker] if adapter == "activated" else None,
    )
    return model, tokenizer


def add_adapter(
    model: PreTrainedModel,
    target_modules: list[str] | None = None,
    backend: str = "hf",
    **options: Any,
) -> PeftModel:
    """The model in a fresh LoRA of PEFT's LoraConfig(**options), on every linear layer or on those
    whose names end as `target_modules` say.

    Raises:
        InputError: if the model has no such layer.
    """
    every = target_modules in (None, ["all-linear"])
    if backend == "unsloth":
        if not every:
            options["target_modules"] = target_modules
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            use_gradient_checkpointing=False,
            random_state=torch.initial_seed() % 2**32,  # it sets every seed anew
            **options,
        )
        for name, weight in model.named_parameters():
            if "trainable_tokens_delta" in name:  # unsloth freezes all but the LoRA matrices
                weight.requires_grad_(True)
    else:
        targets = "all-linear" if every else target_modules
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **options)
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"--target_modules {target_modules}: {error}") from error
    if not sharding():  # where modules must be called to have their weights
        use_lean_layers(model, rows_only=backend == "unsloth")
    return model


@lru_cache
def constant(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A tensor made once: each new one would have the GPU waited for."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


class TokenRows(TrainableTokensLayer):
    """PEFT's trainable token rows without its copy of the whole matrix in every pass, nor the
    gradient of a whole matrix in every backward: a gigabyte each for a vocabulary of 152,000."""

    def forward_adapters(
        self, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any
    ):
        if self.disable_adapters or not active_adapters or self.merged:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        (adapter,) = active_adapters
        result = self.base_layer(x)
        ids = constant(tuple(self.token_indices[adapter]), x.device)
        rows = self.trainable_tokens_delta[adapter].to(result.dtype)
        if x.is_floating_point():  # the head: hidden states in, logits out
            return result.index_copy(-1, ids, torch.nn.functional.linear(x, rows).to(result.dtype))
        same = x[..., None] == ids
        scale = self._get_embed_scale()  # Gemma's embedding is multiplied by a constant
        own = torch.nn.functional.embedding(
            same.int().argmax(-1), rows * (1 if scale is None else scale)
        )
        return torch.where(same.any(-1, keepdim=True), own, result)


class LeanLora(lora.Linear):
    """PEFT's LoRA around a plain linear layer, in fewer passes over memory: the scale is applied to
    r numbers a token and not to the layer's output, the product is added in place, the input is
    used as it is where PEFT makes a float32 copy of it (kept for every layer's backward), and an
    activated adapter picks no positions where it acts on all."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or not self.is_plain(x, kwargs):
            return super().forward(x, *args, **kwargs)
        rows = x.flatten(0, -2)  # not a view of the result, which autograd would copy for add_
        result = self.base_layer(rows)
        a, b = (part[names[0]].weight.to(result.dtype) for part in (self.lora_A, self.lora_B))
        inner = torch.nn.functional.linear(rows.to(a.dtype), a) * self.scaling[names[0]]
        return result.addmm_(inner, b.t()).unflatten(0, x.shape[:-1])

    def is_plain(self, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether there is no dropout, and nothing but the activation of an aLoRA, which must cover
        all of `x`."""
        (name,) = self.lora_A
        variant, offsets = self.lora_variant.get(name), kwargs.get("alora_offsets")
        if variant is None:
            everywhere = not kwargs
        else:
            everywhere = isinstance(variant, ALoraLinearVariant) and offsets is not None
            everywhere = everywhere and all(o is not None and o >= x.shape[1] for o in offsets)
        dropout = self.lora_dropout[name]
        return everywhere and not (self.training and not isinstance(dropout, torch.nn.Identity))


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up, keeping two tensors for the backward where autograd keeps three."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        by_up = torch.nn.functional.silu(gate).mul_(grad)
        by_gate = grad * up
        return torch.ops.aten.silu_backward.grad_input(by_gate, gate, grad_input=by_gate), by_up


def lean_mlp(mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The forward of Llama's, Mistral's and Qwen's MLP."""
    return mlp.down_proj(SwiGLU.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def use_lean_layers(model: PeftModel, rows_only: bool = False) -> None:
    """Replaces PEFT's forward passes by ours, which compute the same; nothing saved changes."""
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = TokenRows
        if rows_only:
            continue
        frozen = getattr(module, "base_layer", None)
        if type(module) is lora.Linear and type(frozen) in (torch.nn.Linear, Float8Linear):
            module.__class__ = LeanLora
        if isinstance(getattr(module, "act_fn", None), torch.nn.SiLU | SiLUActivation) and all(
            hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")
        ):
            kind = type(module)
            if kind.forward is not lean_mlp:
                module.__class__ = type(f"Lean{kind.__name__}", (kind,), {"forward": lean_mlp})


def uses_unsloth(model: PeftModel) -> bool:
    return hasattr(model, "for_inference")


def is_activated(model: torch.nn.Module) -> bool:
    if not isinstance(model, PeftModel):
        return False  # an adapter that was merged
    return bool(model.peft_config[model.active_adapter].alora_invocation_tokens)


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    figures: dict[str, dict] | None = None,
) -> None:
    """Writes adapter, tokenizer and model card, replacing what `folder` held. Main process only.

    The tag rows are part of the adapter; no whole embedding matrix is written, however the
    vocabulary has grown. The folder changes its content at once or not at all.
    """
    folder = Path(folder)
    new = staging(folder)
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new, save_embedding_layers=False)
    tokenizer.save_pretrained(new)
    base = model.peft_config[model.active_adapter].base_model_name_or_path
    table = f"## Validation\n\n```\n{format_table(figures)}\n```\n" if figures else ""
    tags = "\n".join(f"- {domain}: `{c}`, `{u}`" for domain, (c, u) in CONFIDENCE_TOKENS.items())
    card = f"""---
base_model: {base}
library_name: peft
tags: [confidence, calibration, lora]
---
# Confidence adapter for {base}

Kind: `{"activated" if is_activated(model) else "lora"}`. After the model's answer and the marker
`{MARKER_TOKEN}`, the probability that the answer is right is P(C) / (P(C) + P(U)) of the tags of
the question's domain:

{tags}

Load it with this folder's tokenizer. If that is longer than the base model's embedding, call
`model.resize_token_embeddings(len(tokenizer))` before `PeftModel.from_pretrained`.

{table}"""
    (new / "README.md").write_text(card, encoding="utf-8")
    replace_folder(folder)


# ------------------------------------------------------------------------------------------------
# Generation and scoring. P(C) is read from the cache that the answer left behind: one more token,
# the marker, and the logits after it.


def base_model_only(model: torch.nn.Module) -> AbstractContextManager:
    """A context in which the adapter is off; nothing changes for a model that has none."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def without_wrapper(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model, whether PEFT wraps it or not; an adapter stays on."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count each row's tokens and skip what is masked."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def run_decoder(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None
) -> Any:
    """Runs sequences padded on the right through the decoder alone: no logits are computed.

    Args:
        ids: (batch, length); with `cache` the columns that follow it.
        mask: (batch, length with cache), needed where padding stands before `ids`' end.

    Returns:
        What the decoder does, with `last_hidden_state` and `past_key_values`.
    """
    base = without_wrapper(model)
    places = {} if mask is None else {"position_ids": positions(mask)[:, -ids.shape[1] :]}
    return base.get_decoder()(
        input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **places
    )


def prefill(*args: Any) -> Any:
    """The key-value cache of all columns so far, after run_decoder() with the same arguments."""
    return run_decoder(*args).past_key_values


def invoke_marker(
    model: torch.nn.Module, cache: Any, mask: torch.Tensor, marker: int
) -> torch.Tensor:
    """Appends the marker to the cached columns (whose mask is `mask`).

    Returns:
        (batch, vocabulary) logits at the tag's position. The cache grows by a column.
    """
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    output = model(
        input_ids=torch.full_like(mask[:, :1], marker),
        attention_mask=mask,
        position_ids=positions(mask)[:, -1:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def exact_logits(model: PeftModel, cache: Any, mask: torch.Tensor, ids: ConfidenceIds):
    """invoke_marker()'s logits in float32, those of marker and tags computed in float32 too: in
    bfloat16 a logit of 20 has a spacing of 0.125, which would make steps of 3 % in P(C)."""
    head = without_wrapper(model).get_output_embeddings()
    hidden = []
    if uses_unsloth(model):  # of a single record it would multiply by the head's weight itself
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        marker = torch.full_like(mask[:, :1], ids.marker)
        hidden.append(run_decoder(model, marker, mask, cache).last_hidden_state[:, -1])
        logits = head(hidden[0]).float()
    else:
        handle = head.register_forward_pre_hook(lambda module, args: hidden.append(args[0][:, -1]))
        try:
            logits = invoke_marker(model, cache, mask, ids.marker).float()
        finally:
            handle.remove()
    if hasattr(head, "token_adapter"):
        rows = head.token_adapter.trainable_tokens_delta[model.active_adapter]
    else:  # they were written into the model: see confidence_model.py
        rows = head.weight[constant(tuple(ids.all), head.weight.device)]
    logits[:, ids.all] = hidden[0].float() @ rows.float().T
    return logits


def tag_probability(logits: torch.Tensor, pairs: list[tuple[int, int]]) -> torch.Tensor:
    """P(C) / (P(C) + P(U)) = sigmoid(logit_C - logit_U), in float32.

    Args:
        logits: (batch, vocabulary) at the tag's position.
        pairs: for each row, the ids of its domain's C and U tags.
    """
    both = logits.float().gather(1, torch.tensor(pairs, device=logits.device))
    return torch.sigmoid(both[:, 0] - both[:, 1])


class Generated(NamedTuple):
    """A batch of generated answers, and what is needed to go on from them."""

    answers: list[list[int]]  # token ids up to and without marker, tag or end of turn
    finished: list[bool]  # False where max_new_tokens cut the answer off
    tags: list[int | None]  # id of the tag that was written
    sequences: (
        torch.Tensor
    )  # (batch, length) prompt and generated columns, the answers' padding too
    mask: torch.Tensor  # (batch, length), 1 on the tokens of prompt and answer
    cache: Any  # of all columns but the last


def generate_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    confidence: ConfidenceIds | None = None,
    write_tags: bool = False,
    **options: Any,
) -> Generated:
    """Greedy answers to a batch of prompts; `options` go to generate().

    With `write_tags` the model goes on to marker and tag and stops there; otherwise it stops at the
    end of its turn, and the ids of `confidence`, if given, are kept out of the answer.
    """
    rows = [tokenize(tokenizer, prompt) for prompt in prompts]
    ids, mask = (part.to(model.device) for part in pad(rows, tokenizer.pad_token_id, left=True))
    tag_ids = set(confidence.meaning) if confidence and write_tags else set()
    end = model.generation_config.eos_token_id
    ends = {*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id} - {None}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        # What is not given here comes from the model's own configuration, which may sample or
        # penalise repetition; a penalty would change the tag's probability.
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=max_new_tokens + 2 * write_tags,
            eos_token_id=sorted(ends | tag_ids),
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=confidence.all if confidence and not write_tags else None,
            return_dict_in_generate=True,
        ),
        **options,
    )
    new = output.sequences[:, ids.shape[1] :]
    answer_ends = ends | tag_ids | ({confidence.marker} if confidence else set())
    answers, finished, tags = [], [], []
    for row in new.tolist():
        ends_at = (i for i, token in enumerate(row[:max_new_tokens]) if token in answer_ends)
        stop = next(ends_at, min(len(row), max_new_tokens))
        answers.append(row[:stop])
        finished.append(stop < len(row) and row[stop] in answer_ends)
        tags.append(next((token for token in row[stop:] if token in tag_ids), None))
    lengths = torch.tensor([len(answer) for answer in answers], device=mask.device)
    in_answer = torch.arange(new.shape[1], device=mask.device) < lengths[:, None]
    mask = torch.cat([mask, in_answer.to(mask.dtype)], dim=1)
    return Generated(answers, finished, tags, output.sequences, mask, output.past_key_values)


def plan_batches(lengths: list[int], batch_size: int, most: float = math.inf) -> list[list[int]]:
    """Indices in batches of like length, longest first: memory runs out at once or never. A batch
    has at most `batch_size` indices and, padded, a total length of at most `most`."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        full = batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] > most
        if not batches or full or len(batches[-1]) == batch_size:
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.inference_mode()
def score_batch(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    max_new_tokens: int | None,
    domain: str | None = None,
) -> list[tuple[float, str | None, str]]:
    """P(C), the tag written and the answer of each record of a batch.

    The model answers in at most `max_new_tokens`; with None the recorded answers are scored. Where
    the model wrote no marker or tag, P(C) is read all the same, the tag's position forced. With an
    activated adapter the base model answers, and the tag is the likelier of the domain's two.
    `domain`: whose tags are read, instead of those of each record's own.
    """
    ids = confidence_ids(tokenizer)
    activated = is_activated(model)
    prompts = [build_prompt(tokenizer, record) for record in records]
    with base_model_only(model) if activated else nullcontext():
        if max_new_tokens is None:
            rows = [
                tokenize(tokenizer, prompt) + tokenize(tokenizer, record["response"])
                for prompt, record in zip(prompts, records)
            ]
            padded, mask = (part.to(model.device) for part in pad(rows, 0))
            cache = prefill(model, padded)
            responses = [record["response"] for record in records]
        else:
            generated = generate_answers(
                model, tokenizer, prompts, max_new_tokens, ids, write_tags=not activated
            )
            mask = generated.mask
            cache = prefill(model, generated.sequences[:, -1:], mask, generated.cache)
            responses = [
                tokenizer.decode(answer, skip_special_tokens=True) for answer in generated.answers
            ]
    logits = exact_logits(model, cache, mask, ids)
    domains = [domain or DATASETS[record["dataset"]].domain for record in records]
    confidences = tag_probability(logits, [ids.tags[domain] for domain in domains]).tolist()
    if activated:
        emitted = ["C" if confidence >= 0.5 else "U" for confidence in confidences]
    else:
        written = logits.argmax(dim=-1).tolist() if max_new_tokens is None else generated.tags
        emitted = [
            letter if found in (None, wanted) else "other"
            for wanted, (found, letter) in zip(
                domains, [ids.meaning.get(token, (None, None)) for token in written], strict=True
            )
        ]
    return list(zip(confidences, emitted, responses))


class Scorer:
    """score_batch() in as many parts as memory asks for, which is remembered."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int | None) -> None:
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.most_at_once = math.inf  # records that this process's memory has room for

    def batches(self, records: list[Record], batch_size: int) -> list[list[int]]:
        """Indices of the records in batches of like length."""
        lengths = [
            len(build_prompt(self.tokenizer, record)) + len(record.get("response", ""))
            for record in records
        ]
        # An answer takes as many passes for one prompt as for many; a recorded one takes a single
        # pass, of which a large batch would be padding
        most = math.inf if self.max_new_tokens else ENOUGH_CHARACTERS
        return plan_batches(lengths, max(1, batch_size), most)

    def __call__(
        self, model: PeftModel, records: list[Record], domain: str | None = None
    ) -> list[tuple[float, str | None, str]]:
        if len(records) <= self.most_at_once:
            try:
                return score_batch(model, self.tokenizer, records, self.max_new_tokens, domain)
            except torch.OutOfMemoryError:
                if len(records) == 1:
                    raise
            torch.cuda.empty_cache()
            self.most_at_once = math.ceil(len(records) / 2)
        half = math.ceil(len(records) / 2)
        return self(model, records[:half], domain) + self(model, records[half:], domain)


# ------------------------------------------------------------------------------------------------
# Trainer


class LengthGroupedSampler(torch.utils.data.Sampler):
    """Shuffled records in global batches of like length, the same order on every process.

    Seeded by seed and epoch, so that no process can drift from the others and a resumed run
    continues in the same order.
    """

    def __init__(self, lengths: list[int], global_batch_size: int, seed: int) -> None:
        self.lengths, self.global_batch_size, self.seed = lengths, global_batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.epoch)
        return iter(
            get_length_grouped_indices(self.lengths, self.global_batch_size, generator=generator)
        )


@contextmanager
def logits_only_at(model: torch.nn.Module, wanted: torch.Tensor) -> Iterator[None]:
    """Within it the model's logits are (n, vocabulary), of the n positions where the (batch,
    length) mask `wanted` is true. A vocabulary is large; most positions need no logits."""
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][wanted], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


GPU_PEAK_FLOPS = {  # dense bfloat16, from NVIDIA's data sheets, by a part of the device's name
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}


def gpu_peak_flops() -> float | None:
    """FLOP/s that this process's GPU can do at most; None if it is none we know."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in GPU_PEAK_FLOPS.items() if part in name), None)


def flops_per_token(model: PeftModel, recompute: bool) -> float:
    """2·N for a forward pass through N frozen weights, as much again for the gradient by their
    inputs (the weights themselves have none), and as much once more where the forward is repeated.

    So an ordinary LoRA takes 4·N, with gradient checkpointing 6·N, and an activated one 2·N. N is
    the weights of the linear layers that LoRA stands beside: not embedding and head, whose work
    grows with the labels. Attention and LoRA itself are left out.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, lora.LoraLayer)]
    count = sum(layer.in_features * layer.out_features for layer in layers)
    return count * (2 if is_activated(model) else 6 if recompute else 4)


def parameter_count(parameter: torch.nn.Parameter) -> int:
    """The whole parameter's elements, where ZeRO-3 may have left none of it here."""
    return getattr(parameter, "ds_numel", parameter.numel())


def peak_memory(reset: bool = False) -> int:
    """The most bytes this process has held since the last reset: allocations on its GPU, or without
    one its resident memory (Linux; elsewhere what is resident now)."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not sys.platform.startswith("linux"):
        return psutil.Process().memory_info().rss
    if reset:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)  # what keep_freed_memory() keeps shall not count
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def keep_freed_memory() -> None:
    """Has glibc keep the memory of freed tensors on a CPU. By default it returns large blocks to
    the system, which zeroes every page anew at the next allocation: a sixth of a step's time."""
    if not torch.cuda.is_available() and sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt and mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD; an old glibc refuses so much
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def memory_limit() -> int:
    """Bytes that this process may hold: nine tenths of what it holds and what is free, shared with
    the other processes of this machine where there is no GPU."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(0.9 * (free + torch.cuda.memory_reserved()))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = psutil.virtual_memory().available // processes
    return int(0.9 * (free + psutil.Process().memory_info().rss))


def label_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], ids: ConfidenceIds
) -> tuple[torch.Tensor, int]:
    """Cross-entropy summed over the labels of a batch, those of answers weighted by HELD_WEIGHT.

    Args:
        model: a PeftModel or what wraps one (DistributedDataParallel).
        batch: what Collator gives.

    Returns:
        The sum, and the number of labels.
    """
    peft_model = getattr(model, "module", model)
    tokens, labels = batch["input_ids"], batch["labels"]
    if is_activated(peft_model):
        # Nothing before the marker needs a gradient: the base model fills the cache, and only the
        # marker's column runs with the adapter. Marker and tag are the last two tokens of a row.
        lengths = batch["attention_mask"].sum(dim=1, keepdim=True)
        mask = batch["attention_mask"].scatter(1, torch.cat([lengths - 2, lengths - 1], 1), 0)
        with torch.no_grad(), peft_model.disable_adapter():
            cache = prefill(peft_model, tokens[:, :-2])
        logits = invoke_marker(model, cache, mask[:, :-2], ids.marker)
        labels = labels.gather(1, lengths - 1)[:, 0]
    else:
        labelled = labels[:, 1:] != -100  # by the position that predicts the label
        with logits_only_at(peft_model, labelled):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        labels = labels[:, 1:][labelled]
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    special = torch.isin(labels, constant(tuple(ids.all), labels.device))
    return (losses * torch.where(special, 1.0, HELD_WEIGHT)).sum(), len(labels)


ENOUGH_TOKENS = 16_384  # in a pass: more at once are no faster
ENOUGH_CHARACTERS = 16_384  # of recorded answers in a pass, likewise


class Recipe(NamedTuple):
    """What a run needs to know of what it trains."""

    build: Callable[[int | None], PreTrainedModel | PeftModel]  # model with 8- or 4-bit weights
    collator: Callable[[list[dict]], dict[str, torch.Tensor]]
    # (model, batch): the loss summed over the batch's labels, and how many these are
    batch_loss: Callable[[torch.nn.Module, dict[str, torch.Tensor]], tuple[torch.Tensor, int]]
    flops_per_token: Callable[[PreTrainedModel | PeftModel, bool], float]  # with recomputation?
    recomputable: bool = True  # whether gradient checkpointing can save memory
    bits: tuple[int | None, ...] = (None, 8, 4)  # of weights, tried in turn until a batch fits


def confidence_recipe(settings: Settings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype):
    """The Recipe of a confidence run."""

    def build(bits: int | None) -> PeftModel:
        model, _ = initialize_model_with_tokens(
            settings.model_name,
            settings.adapter,
            settings.lora_r,
            settings.lora_alpha,
            settings.lora_dropout,
            settings.target_modules,
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            load_in_8bit=bits == 8,
            load_in_4bit=bits == 4,
            fp8=settings.fp8,
            backend=settings.backend,
            trust_remote_code=settings.trust_remote_code,
        )
        return model

    return Recipe(
        build,
        Collator(tokenizer.pad_token_id),
        partial(label_loss, ids=confidence_ids(tokenizer)),
        flops_per_token,
        recomputable=settings.adapter == "lora",
        bits=(None,) if settings.fp8 else (None, 8, 4),
    )


def largest_batch(
    model: PreTrainedModel | PeftModel,
    recipe: Recipe,
    encodings: datasets.Dataset,
    most: int,
    autocast: AbstractContextManager,
) -> int:
    """Records that can be trained on at a time: a divisor of `most`, measured on the longest ones.

    The memory that one and two records take gives an estimate, which is then tried.

    Returns:
        The batch size; 0 if not even one record fits.
    """
    lengths = list(encodings["length"])
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:most]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    limit = memory_limit() - 12 * trained  # Adam's two moments, and the buckets that DDP sums in

    devices = [model.device] if model.device.type == "cuda" else []

    def peak(count: int) -> float:
        batch = recipe.collator([encodings[i] for i in longest[:count]])
        batch = send_to_device(batch, model.device)
        peak_memory(reset=True)
        try:
            with torch.random.fork_rng(devices), autocast:
                loss, labels = recipe.batch_loss(model, batch)
            (loss / labels).backward()
        except torch.OutOfMemoryError:
            return math.inf
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return peak_memory()

    model.train()
    one = peak(1)
    if one > limit:
        return 0
    a_record = max(1, peak(min(2, len(longest))) - one)
    room = min(1 + (limit - one) / a_record, max(1, ENOUGH_TOKENS / np.median(lengths)))
    for size in range(int(min(room, len(longest))), 1, -1):
        if most % size == 0 and (taken := peak(size)) <= limit:
            say(f"the {size} longest records take {taken / 1e9:.1f} of {limit / 1e9:.1f} GB")
            return size
    return 1


PROGRESS = "processes.pt"  # of a checkpoint: the random generators and counts of each process
MOST_FAILED_SAVES = 3  # in a row, before a run ends


class LabelTrainer(Trainer):
    """Trainer whose loss, and whose logits, are only where a label is, which validates through its
    callbacks instead of a loss on a second dataset, and whose checkpoints are whole."""

    def __init__(
        self, recipe: Recipe, callbacks: list[TrainerCallback] | None = None, **kwargs: Any
    ) -> None:
        callbacks = [SafetyCallback(self), *(callbacks or [])]
        super().__init__(data_collator=recipe.collator, callbacks=callbacks, **kwargs)
        self.batch_loss = recipe.batch_loss
        recompute = self.args.gradient_checkpointing
        self.flops_per_token = recipe.flops_per_token(self.model, recompute)
        self.model_accepts_loss_kwargs = True  # we divide by the labels of the whole global batch
        self._loss_shifts_labels = False  # and the collator's labels hold no first column to drop
        lengths = list(self.train_dataset["length"])
        self.sampler = LengthGroupedSampler(lengths, global_batch_size(self.args), self.args.seed)
        # What this process has trained on: real tokens, labels, their summed cross-entropy
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        self.timed = (time.perf_counter(), 0.0)  # when, and of how many tokens, log() last told
        self.seconds, self.started = 0.0, 0.0  # of training: in earlier parts, and when this began
        self.update: list[tuple[torch.Tensor, dict]] = []  # losses and batches of an update
        self.grad_norm: torch.Tensor | float | None = None
        # Trainer would delete the last checkpoint at the end, before there is a final/
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.resumed: str | None = None  # the checkpoint that training went on from
        self.first_step = 0  # that checkpoint's
        self.last_saved: Path | None = None
        self.stopping = 0  # the signal that all processes have agreed to end by
        self.evaluation_pending = False  # due at this step, and left to whoever goes on
        self.failed_saves = 0  # in a row
        self.saved_best = (None, None, None)  # best metric, step and checkpoint, all saved

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss divided by the labels of all processes and accumulation steps."""
        loss, count = self.batch_loss(model, inputs)
        tokens = inputs["attention_mask"].sum()
        self.totals += torch.stack([tokens, tokens.new_tensor(count), loss.detach()])
        self.update.append((loss.detach(), inputs))
        if num_items_in_batch is None:
            return loss / count
        # Gradients are averaged over the replicas; this makes it a sum over them
        return loss / num_items_in_batch * replicas()

    def training_step(self, model: torch.nn.Module, inputs: dict, *rest: Any) -> torch.Tensor:
        try:
            return super().training_step(model, inputs, *rest)
        except (MemoryError, RuntimeError) as error:
            on_a_cpu = "t allocate memory" in str(error)
            if not (on_a_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))):
                raise
            rows, length = inputs["input_ids"].shape
            size = self.args.per_device_train_batch_size
            parts = 1 if size == 1 else 2 if size % 2 == 0 else size
            smaller = (
                f"--batch_size {size // parts} --gradient_accumulation_steps "
                f"{parts * self.args.gradient_accumulation_steps} makes the same update of smaller "
                "batches, "
                if parts > 1
                else ""
            )
            raise RunError(
                f"out of memory at step {self.state.global_step + 1} with {rows} records of "
                f"{length} tokens: {smaller}--gradient_checkpointing takes less memory as well, "
                "and with either the run goes on from its last checkpoint",
                on_all=False,
            ) from error

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        self.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.grad_norm

    def agree_on_update(self) -> None:
        """Before the weights change: whether any process was told to stop, and whether the loss is
        a number everywhere.

        Raises:
            RunError: naming the records, if it is not.
        """
        finite = torch.isfinite(torch.stack([loss for loss, _ in self.update]).float()).all()
        if self.grad_norm is not None and not self.args.fp16:  # whose scaler skips such steps
            norm = self.grad_norm
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            finite &= torch.isfinite(torch.as_tensor(norm, device=finite.device))
        flags = torch.stack([finite.new_tensor(interruption.signal, dtype=torch.int64), ~finite])
        if self.args.world_size > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self.stopping, failed = flags.tolist()
        interruption.join(self.stopping)
        if failed:
            sources = sorted(set(gather_object(self._offenders())))
            raise RunError(
                "the loss or its gradient is not a finite number at step "
                f"{self.state.global_step + 1} of {self.state.max_steps}: look at these records, "
                f"or lower --learning_rate {self.args.learning_rate:g}; the last checkpoint is "
                f"kept\n{listing(sources)}"
            )
        self.update.clear()

    def _offenders(self) -> list[str]:
        """The sources of the records without a finite loss of their own; if there are none, of the
        batches without one; if no process has any, of the whole update."""
        bad = [batch for loss, batch in self.update if not torch.isfinite(loss)]
        if not any(gather_object([len(bad)])):  # the gradient alone
            bad = [batch for _, batch in self.update]
        found = []
        alone = not (sharding() or self.is_deepspeed_enabled)
        for batch in bad:
            rows = len(batch["input_ids"])  # one, where a batch is flattened
            for i in range(rows if alone and rows == len(batch["source"]) else 0):
                one = {name: part[i : i + 1] for name, part in batch.items()}
                with torch.no_grad(), self.compute_loss_context_manager():
                    loss, _ = self.batch_loss(self.model, one)
                found += [] if torch.isfinite(loss) else one["source"]
        return found or [name for batch in bad for name in batch["source"]]

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        return self.sampler

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Runs the callbacks' on_evaluate; what they add to the metrics is logged and returned."""
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        try:
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
        except Stopped:
            # Else the checkpoint is there, or none is due
            if self.is_in_train and self.state.global_step > self.first_step:
                self.evaluation_pending = True
                self._save_checkpoint(self.model)
            raise
        if self.evaluation_pending:  # what was due where an earlier part of the run was stopped
            self.evaluation_pending = False
            if self._determine_best_metric(metrics, None):
                self.state.best_model_checkpoint = self.resumed
        if uses_unsloth(self.model):
            # To generate it turned checkpointing off, and keeps copies of the LoRA weights that the
            # next validation would answer by; nothing but this drops them
            self.model.for_training(use_gradient_checkpointing=False)
            if self.args.gradient_checkpointing:
                self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        self.log(metrics)
        self.timed = (self.timed[0] + time.perf_counter() - start, self.timed[1])
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a line with a loss: `tokens_per_second` of a process, padding and validation not
        counted (mean), `mfu`, its share of the GPU's peak FLOP/s, and `peak_memory_gb` (largest),
        with several processes also that of each."""
        if "loss" in logs:
            now = (time.perf_counter(), self.totals[0].item())
            speed = (now[1] - self.timed[1]) / (now[0] - self.timed[0])
            self.timed = now
            speeds, peaks = zip(*gather_object([(speed, peak_memory() / 1e9)]), strict=True)
            logs["tokens_per_second"] = sum(speeds) / len(speeds)
            logs["peak_memory_gb"] = max(peaks)
            if peak := gpu_peak_flops():
                logs["mfu"] = logs["tokens_per_second"] * self.flops_per_token / peak
            if len(peaks) > 1:
                logs |= {f"peak_memory_gb_process_{i}": value for i, value in enumerate(peaks)}
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Trains, on from a checkpoint if there is one.

        Raises:
            Stopped: after a signal, all that a resumed run needs being saved.
        """
        self.resumed, self.started = resume_from_checkpoint, time.perf_counter()
        self.last_saved = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.seconds += time.perf_counter() - self.started
        return result

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed from the very last step
            self.control.should_training_stop = True
            return
        self.sampler.set_epoch(epoch)  # which Trainer does not reach where it skips what was done
        super()._run_epoch(*args, epoch=epoch, **kwargs)
        if self.stopping:  # before anything is done that belongs to a run's end
            raise Stopped

    def _progress(self) -> dict[str, Any]:
        """What this process alone knows of how far it has come."""
        name, keys, *rest = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (name, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "totals": self.totals.tolist(),
            "logged": (self._tr_loss.item(), self._total_loss_scalar, self._globalstep_last_logged),
            "seconds": self.seconds + time.perf_counter() - self.started,
            "evaluation_pending": self.evaluation_pending,
        }

    def _read_progress(self) -> list[dict[str, Any]]:
        """_progress() of all processes that saved the checkpoint, which may have been others."""
        return torch.load(Path(self.resumed, PROGRESS), weights_only=True)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        states = self._read_progress()
        state = states[self.args.process_index % len(states)]
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"])

    def take_up_progress(self) -> None:
        """Goes on counting where the checkpoint stopped."""
        self.first_step = self.state.global_step
        if not self.resumed:
            return
        states, count, rank = self._read_progress(), self.args.world_size, self.args.process_index
        same = len(states) == count
        mine = states[rank : rank + 1] if same else states[rank::count]
        self.totals += sum(self.totals.new_tensor(state["totals"]) for state in mine)
        logged = [state["logged"] for state in (mine if same else states)]
        loss, self._total_loss_scalar, self._globalstep_last_logged = np.mean(logged, 0).tolist()
        self._tr_loss += loss
        self.timed = (time.perf_counter(), self.totals[0].item())
        self.seconds += states[0]["seconds"]
        self.evaluation_pending = self.args.eval_on_start = states[0]["evaluation_pending"]
        self.state.compute_steps(self.args, self.state.max_steps)  # intervals may have changed
        self.saved_best = self._best()

    def _best(self) -> tuple[float | None, int | None, str | None]:
        state = self.state
        return state.best_metric, state.best_global_step, state.best_model_checkpoint

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        """Saves a checkpoint that is whole or not there. If it cannot be, all processes know, and
        training goes on.

        Raises:
            RunError: when it is the third time in a row.
        """
        self.store_flos()
        folder = checkpoint_folder(self.args.output_dir, self.state.global_step)
        if best := self.state.best_global_step:
            place = checkpoint_folder(self.args.output_dir, best)
            if place == folder or place.is_dir():
                self.state.best_model_checkpoint = str(place)
        progress = gather_object([self._progress()])
        problems: list[str] = []
        new = staging(folder)
        for part in (
            lambda: self._prepare(new),
            lambda: self.save_model(str(new), _internal_call=True),
            lambda: self._write_state(new, progress),
            lambda: seal(new),
            lambda: self._put_in_place(folder),
        ):
            problem = None
            try:
                part()
            except SAVING_ERRORS as error:
                problem = no_room(folder.parent, error)
            problems = [problem for problem in gather_object([problem]) if problem]
            if problems:
                break
        if not problems:
            self.failed_saves, self.saved_best, self.last_saved = 0, self._best(), folder
            return
        if self.args.should_save:
            shutil.rmtree(new, ignore_errors=True)
        # What is not saved cannot be the best that comes back at the end
        state, self.failed_saves = self.state, self.failed_saves + 1
        state.best_metric, state.best_global_step, state.best_model_checkpoint = self.saved_best
        kept = f"the last one is {self.last_saved}" if self.last_saved else "there is none yet"
        told = f"{folder} cannot be saved: {problems[0]}; {kept}"
        if self.failed_saves == MOST_FAILED_SAVES:
            raise RunError(f"{told}; that was {MOST_FAILED_SAVES} in a row, and the run ends")
        say(f"warning: {told}; training goes on")

    def _prepare(self, new: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()

    def _write_state(self, new: Path, progress: list[dict[str, Any]]) -> None:
        errors: list[Exception] = []
        if self.is_deepspeed_enabled:  # what it would write between collectives by other means
            engine = self.model_wrapped
            engine._copy_recovery_script = lambda path: None
            engine.save_checkpoint = partial(
                type(engine).save_checkpoint, engine, save_latest=False
            )
        with errors_of_torch_save(errors):
            self._save_optimizer_and_scheduler(str(new))
            self._save_scaler(str(new))
            if self.args.should_save:
                torch.save(progress, new / PROGRESS)
        if errors:
            raise errors[0]
        if self.args.should_save:
            for part in (*self.callback_handler.callbacks, self.control):
                if isinstance(part, ExportableState):
                    self.state.stateful_callbacks[type(part).__name__] = part.state()
            self.state.save_to_json(str(new / "trainer_state.json"))
            if self.is_deepspeed_enabled:
                tag = f"global_step{self.model_wrapped.global_steps}"
                (new / "latest").write_text(tag, encoding="utf-8")

    def _put_in_place(self, folder: Path) -> None:
        """Gives a written checkpoint its name, and deletes the oldest ones that are too many."""
        if not self.args.should_save:
            return
        replace_folder(folder)
        try:
            self._delete_old(folder)
        except OSError as error:
            say(f"warning: old checkpoints cannot be deleted: {error}")
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _delete_old(self, folder: Path) -> None:
        known = checkpoints(folder.parent)
        known = known[: known.index(folder) + 1]  # later ones are damaged, and will be replaced
        needed = {str(folder), self.state.best_model_checkpoint}
        spare = [path for path in known if str(path) not in needed]
        too_many = len(known) - (self.save_total_limit or len(known))
        for path in spare[: max(0, too_many)]:
            shutil.rmtree(set_aside(path), ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if sharding() != "tp":
            super().save_model(output_dir, _internal_call)
            return
        # Gathers the parts of each matrix, for which all processes must call it
        self.model.save_pretrained(output_dir, is_main_process=self.args.should_save)
        if self.args.should_save:
            self.processing_class.save_pretrained(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Into the existing checkpoint folder; PEFT would add the whole embedding, Trainer a pickle
        options = {"save_embedding_layers": False} if isinstance(self.model, PeftModel) else {}
        self.model.save_pretrained(output_dir, state_dict=state_dict, **options)
        self.processing_class.save_pretrained(output_dir)


def global_batch_size(args: TrainingArguments) -> int:
    """Records in one update: at a time, times accumulation, times replicas."""
    return args.train_batch_size * args.gradient_accumulation_steps * replicas()


class SafetyCallback(TrainerCallback):
    """Has every update checked before it is made, and ends a run that was told to stop: its last
    step is saved, and what was due to be validated there is left to the run that goes on."""

    def __init__(self, trainer: LabelTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.take_up_progress()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.agree_on_update()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.stopping:
            epoch_ends = args.eval_strategy == "epoch" and math.isclose(state.epoch % 1, 0)
            self.trainer.evaluation_pending = control.should_evaluate or epoch_ends
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.stopping:
            control.should_evaluate = control.should_save = False


class ConsoleCallback(TrainerCallback):
    """What log() tells, with the time left: a progress bar on a terminal, else a line each."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first = time.perf_counter(), state.global_step
        on_terminal = state.is_world_process_zero and sys.stderr.isatty()
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", disable=not on_terminal
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        parts = [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s a process")
        parts += [f"MFU {logs['mfu']:.0%}"] if "mfu" in logs else []
        parts.append(f"peak {logs['peak_memory_gb']:.1f} GB")
        if not self.bar.disable:
            self.bar.set_postfix_str("  ".join(parts))
            return
        done = max(1, state.global_step - self.first)
        left = (time.perf_counter() - self.start) / done * (state.max_steps - state.global_step)
        parts = [f"step {state.global_step}/{state.max_steps}", *parts, f"{left:.0f} s left"]
        say("  ".join(parts))


class ProfileCallback(TrainerCallback):
    """Records updates 3 to 5 on the main process for TensorBoard's profiler and Perfetto."""

    def __init__(self, folder: str | Path) -> None:
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder)),
            profile_memory=True,
            record_shapes=True,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.profiler.step()

    def on_train_end(self, args, state, control, **kwargs):
        self.profiler.stop()


# ------------------------------------------------------------------------------------------------
# ValidationCallback


class EvaluationCallback(TrainerCallback):
    """Measures a model on samples of validation sets, and keeps what it found.

    Each evaluation adds `eval_<set>_<metric>`, and `eval_<metric>` as the mean over the sets, to
    the metrics that Trainer chooses its best model by (`--metric_for_best_model auroc`), NaN if
    undefined; prints a table, and appends a line to `validation.jsonl`.
    """

    means: tuple[str, ...] = ()  # metrics whose mean over the sets is one too

    def __init__(self, output_dir: str | Path, samples: dict[str, list]) -> None:
        self.output_dir, self.samples = Path(output_dir), samples
        self.writer = None  # a SummaryWriter, on the main process
        self.history: list[dict] = []  # the lines of validation.jsonl, on the main process
        self.last_step = -1

    def _validate_dataset(self, model: torch.nn.Module, name: str) -> tuple[dict, Any]:
        """The metrics of a sample with `runtime` in seconds, and what they were made from; the same
        on every process."""
        raise NotImplementedError

    def _table(self, figures: dict[str, dict]) -> str:
        raise NotImplementedError

    def _keep(self, model, step: int, figures: dict, scores: dict, means: dict) -> dict:
        """Writes what else belongs to an evaluation; returns what its line shall hold. Main process
        only."""
        return {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Takes up the history of the run that is resumed, up to the checkpoint's step."""
        path = self.output_dir / "validation.jsonl"
        if path.is_file():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            done = state.global_step - args.eval_on_start  # this step's is then still to be done
            self.history = [line for line in lines if line["step"] <= done]

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        self.last_step = state.global_step
        was_training = model.training
        model.eval()
        figures, scores = {}, {}
        for name in self.samples:
            figures[name], scores[name] = self._validate_dataset(model, name)
            for metric, value in figures[name].items():
                metrics[f"eval_{name}_{metric}"] = math.nan if value is None else value
        model.train(was_training)
        means = {}
        for metric in self.means:
            found = [figure.get(metric) for figure in figures.values()]
            values = [value for value in found if value is not None]
            means[metric] = sum(values) / len(values) if values else math.nan
            metrics[f"eval_{metric}"] = means[metric]
        if not state.is_world_process_zero or not figures:
            return
        say(f"\nvalidation at step {state.global_step}\n{self._table(figures)}\n")
        line = {"step": state.global_step, "epoch": state.epoch or 0.0}
        try:
            line |= self._keep(model, state.global_step, figures, scores, means)
        except SAVING_ERRORS as error:
            say(f"warning: {no_room(self.output_dir, error)}; this validation keeps no model")
        self.history.append({**line, "datasets": figures})
        try:
            lines = [json.dumps(line) + "\n" for line in self.history]
            write_text(self.output_dir / "validation.jsonl", "".join(lines))
        except OSError as error:
            say(f"warning: {no_room(self.output_dir, error)}; validation.jsonl is written later")

    def last_and_first(self) -> tuple[dict | None, dict | None]:
        """The figures of the last evaluation, and those before training."""
        last = self.history[-1]["datasets"] if self.history else None
        return last, next((line["datasets"] for line in self.history if line["step"] == 0), None)


class ValidationCallback(EvaluationCallback):
    """Measures how well the tags know which answers are right, on a fixed sample of each set.

    The sample is drawn once, by seed, and split over the processes in whole batches, so that each
    record is scored exactly once. Beside what every EvaluationCallback does, each validation draws
    `reliability.png`, which TensorBoard gets too, and keeps `best_accuracy/` and
    `best_calibration/`, by the mean over the sets, once training has begun.
    """

    means = tuple(
        "accuracy answer_accuracy calibration_error ece brier nll auroc mean_confidence "
        "missing_tag_rate wrong_domain_rate unparsed_rate".split()
    )

    def __init__(
        self,
        sets: dict[str, list[Record]],
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        output_dir: str | Path,
        generate: bool,
        batch_size: int = 32,
        seed: int = 42,
    ) -> None:
        """
        Args:
            sets: records by name; the sample is drawn from them.
            generate: whether the model answers, or the recorded answers are scored.
            batch_size: answers at a time on each process.
        """
        super().__init__(output_dir, {})
        self.tokenizer, self.settings, self.batch_size = tokenizer, settings, batch_size
        self.max_new_tokens = settings.max_new_tokens if generate else None
        self.score = Scorer(tokenizer, self.max_new_tokens)
        room = settings.max_seq_length - 2 - (MIN_ANSWER_TOKENS if generate else 0)
        for name, records in sets.items():
            if generate:  # the answer will take the recorded one's place
                records = [{**record, "response": ""} for record in records]
            sample = draw_sample(records, settings.val_samples, f"{seed} {name}")
            self.samples[name] = fit_records(tokenizer, sample, room, f"validation set {name}")

    def _validate_dataset(self, model: PeftModel, name: str) -> tuple[dict, list[Score]]:
        """Scores the sample of one set on all processes.

        Returns:
            The metrics of confidence_metrics() with `runtime` in seconds, and the scores in the
            order of the sample; the same on every process.
        """
        start = time.perf_counter()
        records = self.samples[name]
        state = PartialState()
        share = math.ceil(len(records) / state.num_processes)
        batches = self.score.batches(records, min(self.batch_size, share))
        mine = []
        for batch in batches[state.process_index :: state.num_processes]:
            if interruption.signal:
                break
            chosen = [records[i] for i in batch]
            results = self.score(model, chosen)
            for i, record, (confidence, emitted, response) in zip(
                batch, chosen, results, strict=True
            ):
                truth = record.get("answer") if self.max_new_tokens else None
                judged = judge_answer(record["dataset"], response, truth, record.get("options"))
                correct = bool(judged.correct) if self.max_new_tokens else record["confident"]
                mine.append(Score(i, confidence, emitted, correct, judged.extracted, response))
        if interruption.agreed():
            raise Stopped
        scores = sorted(gather_object(mine))
        if [score.index for score in scores] != list(range(len(records))):
            raise RuntimeError(
                f"validation of {name}: {len(scores)} scores, {len(records)} records"
            )
        if lost := [source(records[s.index]) for s in scores if not math.isfinite(s.confidence)]:
            raise RunError(
                f"validation of {name}: the confidence in {len(lost)} of {len(records)} answers is "
                f"not a finite number; look at these records, the model, and its precision\n"
                f"{listing(lost)}"
            )
        figures = confidence_metrics(scores, self.settings.calib_p_norm, self.settings.calib_beta)
        figures["runtime"] = time.perf_counter() - start
        return figures, scores

    def _table(self, figures: dict[str, dict]) -> str:
        return format_table(figures)

    def _keep(self, model, step, figures, scores, means) -> dict:
        for name, key, sign in (
            ("best_accuracy", "accuracy", 1),
            ("best_calibration", "calibration_error", -1),
        ):
            value = sign * means[key]
            earlier = [line[name] for line in self.history if line["step"] > 0 and name in line]
            if step > 0 and value > max((sign * best for best in earlier), default=-math.inf):
                save_adapter(model, self.tokenizer, self.output_dir / name, figures)
        figure = reliability_figure(scores, figures)
        figure.savefig(self.output_dir / "reliability.png", dpi=110)
        if self.writer is not None:
            self.writer.add_figure("validation/reliability", figure, step)
        return {
            "best_accuracy": means["accuracy"],
            "best_calibration": means["calibration_error"],
        }


TABLE_COLUMNS = {  # heading: metric
    "answers": "num_samples",
    "right": "answer_accuracy",
    "tag acc": "accuracy",
    "majority": "majority_accuracy",
    "AUROC": "auroc",
    "cal err": "calibration_error",
    "perfect": "calibration_error_if_perfect",
    "ECE": "ece",
    "Brier": "brier",
    "no tag": "missing_tag_rate",
}


def format_table(figures: dict[str, dict], before: dict[str, dict] | None = None) -> str:
    """A table of validation figures, a line for each set; with `before`, two lines."""
    rows = []
    for name, after in figures.items():
        if before:
            rows.append((f"{name} before", before[name]))
        rows.append((f"{name} after" if before else name, after))
    width = max(len(label) for label, _ in rows)
    lines = [" " * width + "".join(f"{heading:>10}" for heading in TABLE_COLUMNS)]
    for label, figure in rows:
        cells = ""
        for metric in TABLE_COLUMNS.values():
            value = figure.get(metric)
            text = (
                "-" if value is None else str(value) if metric == "num_samples" else f"{value:.3f}"
            )
            cells += f"{text:>10}"
        lines.append(f"{label:<{width}}{cells}")
    return "\n".join(lines)


def reliability_figure(scores: dict[str, list[Score]], figures: dict[str, dict]) -> Any:
    """A matplotlib Figure with a reliability diagram for each set: share correct by confidence, and
    how many there are."""
    from matplotlib.figure import Figure  # half a second, which one process alone need spend

    figure = Figure(figsize=(4.4 * len(scores), 5.6), layout="constrained")
    axes = figure.subplots(2, len(scores), squeeze=False, height_ratios=(3, 1), sharex=True)
    for i, (name, answers) in enumerate(scores.items()):
        diagram, histogram = axes[0, i], axes[1, i]
        confidence = [score.confidence for score in answers]
        correct = [score.correct for score in answers]
        count, mean, right = reliability_bins(confidence, correct).T
        diagram.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfect calibration")
        diagram.scatter(mean, right, s=12 + 240 * count / max(1, count.max()), alpha=0.7)
        error, auroc = figures[name]["calibration_error"], figures[name]["auroc"]
        diagram.set_title(
            f"{name}: {len(answers)} answers\ncalibration error {error:.3f}"
            + (f", AUROC {auroc:.3f}" if auroc is not None else "")
        )
        diagram.set(ylabel="share of answers right", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        diagram.legend(loc="upper left", frameon=False)
        right_and_wrong = [[c for c, ok in zip(confidence, correct) if ok == k] for k in (1, 0)]
        histogram.hist(
            right_and_wrong, bins=ECE_BINS, range=(0, 1), stacked=True, label=["right", "wrong"]
        )
        histogram.set(xlabel="confidence P(C)", ylabel="answers")
        histogram.legend(frameon=False)
    return figure


# ------------------------------------------------------------------------------------------------
# The run


def read_training_records(settings: Settings) -> list[Record]:
    """The tagged records of --train_data.

    Raises:
        InputError: if one has no tag, or if nothing can be learned from them.
    """
    records = read_records(settings.train_data, settings.skip_bad_records)
    records = records[: settings.max_train_samples]
    for record in records:
        if "response" not in record:
            raise InputError(
                f'{settings.train_data}:{record["line"]}: "tagged_response" is missing'
            )
    check_classes(records, settings.train_data)
    return records


def check_classes(records: list[Record], path: str) -> None:
    """Refuses data from which nothing can be learned, and warns of a domain that is one-sided."""
    counts = Counter(
        (DATASETS[record["dataset"]].domain, record["confident"]) for record in records
    )
    kinds = {confident for _, confident in counts}
    if len(kinds) == 1:
        only = "confident" if kinds.pop() else "unsure"
        raise InputError(
            f"all {len(records)} records of --train_data {path} are tagged {only}: "
            "the data must hold right and wrong answers"
        )
    for domain in sorted({domain for domain, _ in counts}):
        right, wrong = counts[domain, True], counts[domain, False]
        say(f"{domain}: {right + wrong} training records, {right} right, {wrong} wrong")
        if not (right and wrong):
            say(f"warning: domain {domain} has answers of one kind only and will learn just that")


def read_sets(items: list[str], skip_bad: bool = False) -> dict[str, list[Record]]:
    """The records of NAME=FILE or NAME=HUB_ID:SPLIT by name; those of a file with several datasets
    by NAME/DATASET."""
    sets = {}
    for item in items:
        name, _, path = item.partition("=")
        if Path(path).is_file():
            found = read_records(path, skip_bad)
        else:
            found = read_hub_dataset(name, path)
        datasets_in_it = sorted({record["dataset"] for record in found})
        for dataset in datasets_in_it:
            key = name if len(datasets_in_it) == 1 else f"{name}/{dataset}"
            sets[key] = [record for record in found if record["dataset"] == dataset]
    return sets


def choose_validation(
    settings: Settings, records: list[Record], seed: int
) -> tuple[list[Record], dict[str, list[Record]], bool]:
    """(training records, validation sets by name, whether the model generates the answers).

    Raises:
        InputError: naming the file and line of a record that lacks what this kind of validation
            needs.
    """
    if not settings.val_data:
        training, held = hold_out(records, 0.05, settings.val_samples, seed)
        if not held:
            raise InputError(
                f"--train_data {settings.train_data} has too few records to hold any out for "
                "validation: give --val_data NAME=PATH"
            )
        sets = {
            name: [record for record in held if record["dataset"] == name]
            for name in sorted({record["dataset"] for record in held})
        }
        say(f"held out of training for validation: {len(held)} of {len(records)} records")
    else:
        training, sets = records, read_sets(settings.val_data, settings.skip_bad_records)
    generate = settings.validation_answers or ("generate" if settings.val_data else "recorded")
    needed = "answer" if generate == "generate" else "confident"
    field_name = {"answer": '"answer"', "confident": '"tagged_response"'}[needed]
    for name, members in sets.items():
        for record in members:
            if record.get(needed) is None:
                raise InputError(
                    f"{record['file']}:{record['line']}: {field_name} is missing, which "
                    f"--validation_answers {generate} needs of validation set {name}"
                )
    return training, sets, generate == "generate"


RUN_FILES = (  # what a run leaves in its folder, and --overwrite_output_dir deletes
    "final best_accuracy best_calibration logs settings.yaml validation.jsonl reliability.png "
    "summary.json"
).split()

# Settings that may change when a run goes on: these change nothing of what is trained …
FREE_SETTINGS = set(
    "no_resume overwrite_output_dir hf_repo profile report_to run_name logging_steps save_steps "
    "save_total_limit per_device_eval_batch_size dataloader_num_workers ddp_timeout "
    "enable_jit_checkpoint".split()
)
# … and these only how an update is split, on which the last bits of a sum depend
SPLIT_SETTINGS = (
    "num_processes per_device_train_batch_size gradient_accumulation_steps global_batch_size "
    "gradient_checkpointing"
).split()
RESOLVED = set(  # what settings.yaml tells of a run besides its flags
    "global_batch_size content launch per_device_train_batch_size gradient_accumulation_steps "
    "gradient_checkpointing bits".split()
)
REMEDY = "give another --output_dir, or --overwrite_output_dir to delete that run"


def check_writable(folder: Path) -> None:
    """Makes a folder. InputError if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix="."):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written: {error.strerror}") from error


def read_settings(folder: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """The settings.yaml of a run's folder; empty if there is none.

    Raises:
        InputError: if it is not one that a run wrote, with the `remedy`.
    """
    path = folder / "settings.yaml"
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    whole = isinstance(saved, dict) and all(
        isinstance(saved.get(name), dict) and keys <= saved[name].keys()
        for name, keys in (("resolved", RESOLVED), ("versions", set()))
    )
    if not whole or not isinstance(saved.get("num_processes"), int):
        raise InputError(f"{path} is not what a run of this version wrote: {remedy}")
    return saved


def check_output_dir(
    folder: Path, earlier: dict[str, Any], saved: dict[str, Any], settings: RunSettings
) -> str | None:
    """Decides what becomes of what --output_dir holds; changes nothing.

    Args:
        earlier, saved: the settings of the run it holds, and of this one.

    Returns:
        The checkpoint to resume from: the last good one of an unfinished run.

    Raises:
        InputError: if the folder holds a finished run, a run of another kind, or files that are no
            run at all.
    """
    held = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if not held or (settings.overwrite_output_dir and not restarted(earlier)):
        return None
    if not earlier:
        raise InputError(
            f"--output_dir {folder} is not empty and holds no run of this script; {REMEDY}"
        )
    if "summary.json" in held:
        raise InputError(f"--output_dir {folder} holds a finished run; {REMEDY}")
    check_same_run(folder, earlier, saved)
    if settings.no_resume and not restarted(earlier):
        raise InputError(
            f"--output_dir {folder} holds an unfinished run, and --no_resume begins anew in an "
            f"empty folder only; {REMEDY}"
        )
    return last_checkpoint(folder)


def launch_id() -> str:
    """What torchrun calls this launch, restarts of it included; empty if it has no name."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "none").replace("none", "")


def restarted(earlier: dict[str, Any]) -> bool:
    """Whether torchrun or Slurm has started the run again: it goes on, whatever its flags say of an
    earlier one."""
    counts = "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"
    if any(int(os.environ.get(name) or 0) > 0 for name in counts):
        return True
    return bool(earlier and launch_id() and earlier["resolved"]["launch"] == launch_id())


def check_same_run(folder: Path, earlier: dict[str, Any], saved: dict[str, Any]) -> None:
    """Refuses to go on with other data, another model, or settings that train otherwise, and says
    what a run that goes on differently shares with the first one only up to rounding.

    Raises:
        InputError: with the list of differences.
    """
    ignored = {"versions", "resolved"} | FREE_SETTINGS | set(SPLIT_SETTINGS)
    differing = [
        f"--{key} was {earlier.get(key)!r} and is {saved.get(key)!r}"
        for key in sorted({*saved, *earlier} - ignored)
        if earlier.get(key) != saved.get(key)
    ]
    before, now = earlier["resolved"], saved["resolved"]
    for name in sorted({*before["content"], *now["content"]}):
        if before["content"].get(name) != now["content"].get(name):
            differing.append(f"the content of {name} has changed")
    if before["global_batch_size"] != now["global_batch_size"]:
        differing.append(
            f"an update had {before['global_batch_size']} records and has "
            f"{now['global_batch_size']} (--global_batch_size)"
        )
    if differing:
        raise InputError(
            f"--output_dir {folder} holds an unfinished run with other settings:\n"
            f"{listing(differing)}\n{REMEDY}"
        )
    changes = [
        f"{ALIASES.get(key, key)} was {earlier.get(key)}, is {saved.get(key)}"
        for key in SPLIT_SETTINGS
        if earlier.get(key) != saved.get(key)
    ]
    changes += [
        f"{name} was {number}, is {saved['versions'].get(name)}"
        for name, number in earlier["versions"].items()
        if number != saved["versions"].get(name)
    ]
    if changes:
        say(
            "warning: this run goes on with the same records in each update, and the last bits of "
            f"its sums and its dropout will differ: {'; '.join(changes)}"
        )


def last_checkpoint(folder: Path) -> str | None:
    """The last good checkpoint of a run; None if it had not saved any.

    Raises:
        InputError: if all there are have been damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            return str(path)
        say(f"warning: {path} is damaged and not used: {problem}")
    if found:
        raise InputError(f"every checkpoint in {folder} is damaged: {REMEDY}")
    return None


def content_of(settings: RunSettings) -> dict[str, str]:
    """What tells data and a model on this machine from others of the same name."""
    named = [getattr(settings, name, None) for name in ("train_data", "chat_data", "val_data")]
    paths = [item for value in named for item in (value if isinstance(value, list) else [value])]
    found = {}
    for item in filter(None, paths):
        place = Path(item if Path(item).exists() else item.partition("=")[2] or item)
        with suppress(OSError):  # whoever reads it says what is wrong
            files = [place] if place.is_file() else sorted(filter(Path.is_file, place.rglob("*")))
            sums = [f"{file.relative_to(place)} {sha256(file)}" for file in files]
            found[item] = hashlib.sha256("\n".join(sums).encode()).hexdigest()
    if getattr(settings, "tuning", None) != "scratch":
        with suppress(OSError, ValueError):
            found[settings.model_name] = model_identity(settings.model_name)
    return found


def model_identity(name: str) -> str:
    """A model folder's identity: names and sizes of its files, and their first and last MiB. Of a
    model of the Hugging Face Hub: its commit, where this machine has it."""
    if not Path(name).is_dir():
        return AutoConfig.from_pretrained(name)._commit_hash or ""
    key = hashlib.sha256()
    for path in sorted(filter(Path.is_file, Path(name).iterdir())):
        size = path.stat().st_size
        key.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            key.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            key.update(file.read())
    return key.hexdigest()


def settings_to_save(settings: Settings, training: dict[str, Any]) -> dict[str, Any]:
    """Every setting of the run by its flag's name, without secrets, and the libraries' versions."""
    flags = {**asdict(settings), **training}
    return {
        **({} if "task" in flags else {"task": "confidence"}),
        **{key: value for key, value in sorted(flags.items()) if not key.endswith("token")},
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
        },
    }


def gpu_has_bf16() -> bool:
    """Whether there is a GPU that computes in bfloat16 and does not emulate it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_precision(training: dict[str, Any]) -> torch.dtype:
    """Decides bf16 and fp16 where the command line does not; returns the base weights' dtype.

    accelerate takes its precision from the environment that `accelerate launch` sets; this
    overrules it, so that flag and configuration file cannot disagree.
    """
    if training["bf16"] is None:
        training["bf16"] = gpu_has_bf16() and not training["fp16"]
    training["fp16"] = bool(training["fp16"])
    kind = "bf16" if training["bf16"] else "fp16" if training["fp16"] else "no"
    os.environ["ACCELERATE_MIXED_PRECISION"] = kind
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[kind]


def one_machine() -> bool:
    """Whether a launcher started all processes of this run on this machine."""
    return os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE")


def keep_to_this_machine() -> None:
    """Has the processes of a run on one machine talk through its loopback interface alone."""
    if one_machine() and "lo" in psutil.net_if_addrs():
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")


def meet_anew(timeout: float) -> None:
    """Has processes that torchrun started again on one machine meet under names of their own: its
    agent keeps the store of the first attempt, where the addresses of dead processes stand (torch
    2.13). Agents of several machines do not count alike."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == "0" or not shared or not one_machine():
        return
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(*place, is_master=False)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=torch.distributed.PrefixStore(f"attempt {attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout),
    )


def load_no_code() -> None:
    """Has torch.load refuse a pickle that would run something, whatever its caller says: DeepSpeed
    would load any. The classes below are its own and hold data."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if under_deepspeed():
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        torch.serialization.add_safe_globals(known)


def make_training_arguments(
    training: dict[str, Any], global_batch: int | None
) -> TrainingArguments:
    """transformers' arguments; this is where the processes of a distributed run meet.

    A batch size that is `auto` stands at its largest, all that a process has of an update.

    Raises:
        InputError: with transformers' own words on a combination it refuses, or if no accumulation
            gives the global batch that was asked for.
    """
    metric = training.get("metric_for_best_model")
    defaults = {
        "use_cpu": not torch.cuda.is_available(),
        "eval_strategy": "steps",
        "eval_on_start": True,
        "greater_is_better": not metric.endswith(LOWER_IS_BETTER) if metric else None,
        "ddp_find_unused_parameters": False,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # what DDP can work with
        "disable_tqdm": True,
        "use_cache": True,  # into the saved configuration; training passes ask for none
    }
    report_to = [name for name in report_targets(training) if name != "tensorboard"]  # see run()
    batch, accumulation = split_update(
        training["per_device_train_batch_size"],
        training["gradient_accumulation_steps"],
        replicas(),
        global_batch,
    )
    chosen = {
        **defaults,
        **training,
        "enable_jit_checkpoint": False,  # what it does, and more, every run does: see Interruption
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "report_to": report_to,
        "remove_unused_columns": False,
    }
    if not torch.cuda.is_available():
        # With several processes accelerate would say cpu:0, and no checkpoint could be loaded there
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    try:
        args = TrainingArguments(**chosen)
    except (ValueError, TypeError) as error:
        raise InputError(f"transformers refuses these settings: {error}") from error
    args._n_gpu = min(1, args.n_gpu)  # a process without launcher would split batches over all GPUs
    return args


def split_update(
    batch: int | str, accumulation: int | str, world_size: int, global_batch: int | None
) -> tuple[int, int]:
    """(records at a time on a process, batches accumulated) of an update, what is `auto` decided.

    Raises:
        InputError: if they do not make the global batch that was asked for.
    """
    if batch == "auto":
        if accumulation != "auto":
            raise InputError(
                "--batch_size auto decides --gradient_accumulation_steps too: give "
                "--global_batch_size in its place"
            )
        batch, accumulation = max(1, (global_batch or GLOBAL_BATCH) // world_size), 1
    elif accumulation == "auto":
        accumulation = max(1, (global_batch or GLOBAL_BATCH) // (batch * world_size))
    if global_batch not in (None, batch * accumulation * world_size):
        raise InputError(
            f"--global_batch_size {global_batch} is not {batch} records at a time x {accumulation} "
            f"accumulation x {world_size} processes = {batch * accumulation * world_size}"
        )
    return batch, accumulation


def report_targets(training: dict[str, Any]) -> list[str]:
    """Where metrics are logged: TensorBoard unless --report_to says otherwise."""
    targets = training.get("report_to") or "tensorboard"
    return [targets] if isinstance(targets, str) else targets


def shorten_intervals(args: TrainingArguments, num_records: int) -> int:
    """Updates of the whole run. Longer intervals are cut to a quarter of it, with a warning:
    otherwise a short run would never validate or save before its end."""
    batches = math.ceil(num_records / (args.train_batch_size * replicas()))
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    for name in ("eval_steps", "save_steps"):
        interval = getattr(args, name)
        if interval > steps:
            setattr(args, name, max(1, steps // 4))
            say(
                f"warning: --{name} {interval:g} is longer than the run of {steps} steps; "
                f"shortened to {getattr(args, name)}"
            )
    return steps


def start_output_dir(folder: Path, saved: dict[str, Any], checkpoint: str | None) -> None:
    """Clears what an overwritten run left, or one without checkpoint; writes settings.yaml."""
    for path in [*folder.glob(".*.new"), *folder.glob(".*.old")]:  # of a run that was killed
        remove(path)
    if checkpoint and Path(checkpoint).parent.resolve() != folder.resolve():
        for name in ("validation.jsonl", "best_accuracy", "best_calibration"):
            path = Path(checkpoint).with_name(name)
            if path.exists():
                (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / name)
    if not checkpoint:
        for path in [*checkpoints(folder), *(folder / name for name in RUN_FILES)]:
            remove(path)
    write_text(folder / "settings.yaml", yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def must_be_written(path: Path) -> Iterator[None]:
    """Has a failure to write `path` within it end the run in one message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path} cannot be written: {no_room(path.parent, error)}; {GOES_ON}", on_all=False
        ) from error


def finish(
    trainer: LabelTrainer, validation: ValidationCallback, settings: Settings
) -> dict[str, Any]:
    """Writes final/ and the summary, pushes if asked, prints before and after."""
    folder = validation.output_dir
    after, before = validation.last_and_first()
    if trainer.is_world_process_zero():
        with must_be_written(folder / "final"):
            save_adapter(trainer.model, trainer.processing_class, folder / "final", after)
        say(f"\n{settings.adapter} adapter of {settings.model_name}\n{format_table(after, before)}")
    return end_run(
        trainer, validation, settings, adapter=settings.adapter, picture=folder / "reliability.png"
    )


def end_run(
    trainer: LabelTrainer,
    validation: EvaluationCallback,
    settings: RunSettings,
    picture: Path | None = None,
    **own: Any,
) -> dict[str, Any]:
    """Writes summary.json, with `own` in it, and pushes final/ if asked; says where things are.

    Returns:
        The summary (empty on other processes than the main one).
    """
    args, folder = trainer.args, validation.output_dir
    totals = trainer.accelerator.reduce(trainer.totals, "sum") / model_parallel_size()
    tokens, labels, loss = totals.tolist()
    if not trainer.is_world_process_zero():
        return {}
    after, before = validation.last_and_first()
    spent = sum(
        figure["runtime"] for line in validation.history for figure in line["datasets"].values()
    )
    runtime = trainer.seconds
    summary = {
        "status": "completed",
        "run_name": args.run_name or folder.name,
        "model_name": settings.model_name,
        **own,
        "num_processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "global_batch_size": global_batch_size(args),
        "steps": trainer.state.global_step,
        "train_loss": loss / labels,  # a label, over all processes (Trainer's: the main one)
        "train_runtime": runtime,
        "validation_runtime": spent,
        "train_tokens": int(tokens),
        "train_tokens_per_second": tokens / max(1e-9, runtime - spent),
        "validation": after,
        "validation_before_training": before,
    }
    with must_be_written(folder / "summary.json"):
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    if settings.hf_repo:
        create_repo(settings.hf_repo, exist_ok=True)
        upload_folder(repo_id=settings.hf_repo, folder_path=folder / "final")
        say(f"pushed {folder / 'final'} to {settings.hf_repo}")
    say(
        f"\n{summary['steps']} steps in {runtime:.0f} s, of them {spent:.0f} s validation; "
        f"result: {folder / 'final'}\n"
        + (f"picture: {picture}\n" if picture else "")
        + f"curves:  tensorboard --logdir {folder / 'logs'}"
    )
    return summary


def initialize_fitting_model(
    recipe: Recipe, settings: RunSettings, run: Run, encodings: datasets.Dataset
) -> PreTrainedModel | PeftModel:
    """The model that is to be trained; where the batch size is `auto`, the run gets one that fits.

    Gradient checkpointing, then 8-bit and 4-bit weights, are turned to only when not even one
    record fits without; all processes decide alike.

    Raises:
        InputError: if nothing fits.
    """
    args = run.args
    asked_bits = run.bits
    if not run.measure:
        run.keep(args, asked_bits)
        return recipe.build(asked_bits)
    ladder = [asked_bits] if asked_bits else list(recipe.bits)
    if settings.backend == "unsloth" and not asked_bits:
        ladder = [bits for bits in ladder if bits != 8]  # see check_unsloth()
    share, asked = args.per_device_train_batch_size, args.gradient_checkpointing
    for bits in ladder:
        model, size = None, 0
        with suppress(torch.OutOfMemoryError):
            model = recipe.build(bits)
        recomputing = [False, True] if recipe.recomputable else [False]
        for recompute in [True] if asked else recomputing:
            if model is not None:
                if recompute:
                    model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
                on = run.dtype != torch.float32
                autocast = torch.autocast(model.device.type, run.dtype, on)
                size = largest_batch(model, recipe, encodings, share, autocast)
            size = min(gather_object([size]))
            if size:
                args.per_device_train_batch_size = size
                args.gradient_accumulation_steps = share // size
                args.gradient_checkpointing = recompute
                run.keep(args, bits)
                why = "because nothing fits without"
                say(
                    f"--batch_size auto: {size} records at a time x {share // size} accumulation"
                    + (f", gradient checkpointing {why}" if recompute and not asked else "")
                    + (f", {bits}-bit weights {why}" if bits != asked_bits else "")
                )
                return model
        del model
        gc.collect()
        torch.cuda.empty_cache()
    raise InputError(
        f"not even one record of {max(encodings['length'])} tokens fits into memory, whatever was "
        "tried to save some: a smaller --max_seq_length, --load_in_4bit, or a larger GPU"
    )


def check_window(model: PeftModel, max_seq_length: int) -> None:
    """Refuses a model some of whose layers attend to fewer tokens than a sequence may have: a short
    record in a long batch would lie outside their window, with padding in it."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    if sliding and window and window < max_seq_length:
        raise InputError(
            f"some layers of this model attend to {window} tokens only, which an activated adapter "
            f"and recorded validation cannot work with: give --max_seq_length {window} or less"
        )


class Run(NamedTuple):
    """A run that may start: nothing in its folder has changed yet."""

    folder: Path
    saved: dict[str, Any]  # for settings.yaml
    checkpoint: str | None  # to resume from
    args: TrainingArguments
    dtype: torch.dtype  # of what is computed, and of frozen weights
    measure: bool  # whether the batch size is what memory will hold
    bits: int | None  # of quantised weights

    def keep(self, args: TrainingArguments, bits: int | None) -> None:
        """Notes for settings.yaml what `auto` became, which a run that goes on keeps."""
        names = "per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing"
        split = {name: getattr(args, name) for name in names.split()}
        self.saved["resolved"] |= {**split, "bits": bits}


def open_run(settings: RunSettings, training: dict[str, Any]) -> Run:
    """Looks into --output_dir and makes transformers' arguments; the processes meet here.

    Raises:
        InputError: on every process, if the main one cannot use its folder, or another machine's
            folder lacks the checkpoint to go on from.
    """
    dtype = resolve_precision(training)
    given = training.pop("resume_from_checkpoint", None)
    folder, saved = Path(training["output_dir"]), settings_to_save(settings, training)
    bits = 8 if settings.load_in_8bit else 4 if settings.load_in_4bit else None
    measure = training["per_device_train_batch_size"] == "auto"
    problem, earlier = None, {}
    try:
        check_writable(folder)
        earlier = find_earlier(folder, given, settings.overwrite_output_dir)
        if earlier:
            keep_split(training, settings, earlier)
            measure, bits = False, earlier["resolved"]["bits"]
    except InputError as error:
        problem = error
    keep_to_this_machine()
    meet_anew(float(training.get("ddp_timeout") or 1800))
    args = make_training_arguments(training, settings.global_batch_size)
    load_no_code()
    if args.world_size > 1:
        Watch.current = Watch(settings.script)
        Watch.current.start()
        say(f"Distributed training with {args.world_size} processes")
    flag = "gradient_checkpointing"
    if earlier and earlier.get(flag) == training.get(flag):
        args.gradient_checkpointing = earlier["resolved"][flag]
    saved["resolved"] = {
        "global_batch_size": global_batch_size(args),
        "content": {},
        "launch": launch_id(),
    }
    checkpoint = None
    if args.process_index == 0 and not problem:
        try:
            saved["resolved"]["content"] = content_of(settings)
            if given:
                checkpoint = check_given_checkpoint(Path(given), folder, earlier, saved)
            else:
                checkpoint = check_output_dir(folder, earlier, saved, settings)
        except InputError as error:
            problem = error
    # The main process decides: a machine may have disks of its own
    split = measure, bits, args.per_device_train_batch_size, args.gradient_accumulation_steps
    found = gather_object([(checkpoint, str(problem) if problem else None, split)])
    if problems := [problem for _, problem, _ in found if problem]:
        raise InputError(problems[0])
    if any(other != split for *_, other in found):
        raise InputError(
            f"the machines' --output_dir {folder} hold different runs: it must lie on a disk that "
            "all share, or be empty on each"
        )
    checkpoint = found[0][0]
    if not all(gather_object([checkpoint is None or Path(checkpoint, MANIFEST).is_file()])):
        raise InputError(
            f"{checkpoint} is not on every machine: --output_dir must lie on a disk that all share "
            "for a run to go on; --overwrite_output_dir begins it anew"
        )
    if checkpoint:
        args.eval_on_start = False
        check_resumable(Path(checkpoint), earlier, args.world_size)
    if measure and (sharding() or under_deepspeed()):
        raise InputError(
            "--batch_size auto measures a model that one process holds, and this launch splits it: "
            "give --batch_size N (plan_training.py memory says what fits)"
        )
    set_seed(args.seed)
    return Run(folder, saved, checkpoint, args, dtype, measure, bits)


def find_earlier(folder: Path, given: str | None, overwrite: bool) -> dict[str, Any]:
    """The settings of the run to go on with; empty if there is none, or it is to be deleted.

    Raises:
        InputError: if they cannot be read.
    """
    if given:
        return read_settings(Path(given).parent)
    try:
        earlier = read_settings(folder)
    except InputError:
        if overwrite:  # what is to be deleted need not be readable
            return {}
        raise
    return {} if overwrite and not restarted(earlier) else earlier


def keep_split(training: dict[str, Any], settings: RunSettings, earlier: dict[str, Any]) -> None:
    """Has a run that goes on split its updates as before, or with another number of processes so
    that they stay the same, unless the flags say now how.

    Raises:
        InputError: if the processes cannot share an update evenly.
    """
    flags = "per_device_train_batch_size gradient_accumulation_steps".split()
    if any(earlier.get(flag) != training.get(flag) for flag in flags):
        return  # told anew: check_same_run() looks whether it is the same update
    if earlier.get("global_batch_size") != settings.global_batch_size:
        return
    before = earlier["resolved"]
    whole, rest = divmod(before["global_batch_size"], replicas())
    if rest:
        raise InputError(
            f"the run in --output_dir has updates of {before['global_batch_size']} records, which "
            f"{replicas()} processes cannot share evenly: launch another number of them"
        )
    most = before["per_device_train_batch_size"]
    size = next(size for size in range(min(most, whole), 0, -1) if whole % size == 0)
    training |= dict(zip(flags, (size, whole // size)))


def check_given_checkpoint(
    checkpoint: Path, folder: Path, earlier: dict[str, Any], saved: dict[str, Any]
) -> str:
    """--resume_from_checkpoint. InputError if it is none, damaged, or of another run."""
    if not (checkpoint / MANIFEST).is_file() or not earlier:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} is no checkpoint of a run's folder; without "
            "the flag an unfinished run in --output_dir goes on from its last checkpoint"
        )
    if problem := damage(checkpoint):
        raise InputError(f"--resume_from_checkpoint {checkpoint} is damaged: {problem}")
    same = checkpoint.parent.resolve() == folder.resolve()
    if not same and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(
            f"--output_dir {folder} is not empty, and the checkpoint is not its; {REMEDY}"
        )
    check_same_run(checkpoint.parent, earlier | {"output_dir": saved["output_dir"]}, saved)
    return str(checkpoint)


def check_resumable(checkpoint: Path, earlier: dict[str, Any], processes: int) -> None:
    """Refuses what cannot go on in this launch. InputError says why."""
    if sharding() == "tp":
        raise InputError(
            "a tensor parallel run cannot go on from a checkpoint: --overwrite_output_dir begins "
            "it anew"
        )
    before = earlier["num_processes"]
    if processes != before and (under_deepspeed() or sharding() == "pp"):
        kind = "DeepSpeed" if under_deepspeed() else "a pipeline"
        raise InputError(
            f"{checkpoint} is of {before} processes, and {kind} saves each one's own part: launch "
            f"{before} again"
        )


def curves(folder: Path, checkpoint: str | None) -> SummaryWriter:
    """A writer for TensorBoard, which forgets what a run that goes on does again, and gives up in a
    word where the disk is full: the run must not end by it."""
    done = step_of(Path(checkpoint)) if checkpoint else None
    writer = SummaryWriter(str(folder), purge_step=None if done is None else done + 1)

    def forgiving(write: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except OSError as error:
                for name in names:
                    setattr(writer, name, lambda *args, **kwargs: None)
                say(f"warning: {no_room(folder, error)}; TensorBoard's curves end here")

        return wrapped

    names = "add_scalar add_text add_figure flush close".split()
    for name in names:
        setattr(writer, name, forgiving(getattr(writer, name)))
    return writer


def train(
    run: Run,
    settings: RunSettings,
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    encodings: datasets.Dataset,
    validation: EvaluationCallback,
    kind: type[LabelTrainer] = LabelTrainer,
) -> LabelTrainer:
    """Trains, validating through `validation`, and writes everything of a run but its end."""
    args = run.args
    steps = shorten_intervals(args, len(encodings))
    unit = "replicas" if model_parallel_size() > 1 else "processes"
    trainable = sum(parameter_count(p) for p in model.parameters() if p.requires_grad)
    say(
        f"{len(encodings)} records, {steps} steps of {global_batch_size(args)} records "
        f"({args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulation x "
        f"{replicas()} {unit}), {str(run.dtype).removeprefix('torch.')}, "
        f"{trainable:,} trainable parameters" + (" in stage 0" if sharding() == "pp" else "")
    )
    PartialState().wait_for_everyone()  # all have looked into the folder before one changes it
    if args.process_index == 0:
        with must_be_written(run.folder / "settings.yaml"):
            start_output_dir(run.folder, run.saved, run.checkpoint)
        if "tensorboard" in report_targets(run.saved):
            validation.writer = curves(run.folder / "logs", run.checkpoint)
    if run.checkpoint:
        say(f"resuming from {run.checkpoint}")
    writer = validation.writer
    try:
        trainer = kind(
            recipe,
            model=model,
            args=args,
            train_dataset=encodings,
            eval_dataset=[],  # Trainer asks for one; evaluate() runs the callback
            processing_class=tokenizer,
            callbacks=[validation, *([TensorBoardCallback(writer)] if writer else [])],
        )
    except ValueError as error:  # settings, model and strategy that do not go together
        raise InputError(f"transformers or accelerate refuses this launch: {error}") from error
    check_strategy(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ConsoleCallback())
    if settings.profile and args.process_index == 0:
        trainer.add_callback(ProfileCallback(run.folder / "logs"))
    interruption.training = True
    try:
        trainer.train(resume_from_checkpoint=run.checkpoint)
        # By --eval_strategy the last step may not be validated, or the best model have come back
        if validation.last_step != trainer.state.global_step or args.load_best_model_at_end:
            trainer.evaluate()
        if interruption.agreed():
            raise Stopped
    except Stopped as stop:
        raise Stopped(trainer.last_saved, agreed=True) from stop
    finally:
        interruption.training = False
    if writer:
        writer.close()
    return trainer


def run(argv: list[str] | None) -> dict[str, Any]:
    """The whole run, step by step. Returns the content of summary.json (empty on other ranks)."""
    settings, training = parse_command_line(argv)
    check_settings(settings, training)
    keep_freed_memory()
    run = open_run(settings, training)
    records = read_training_records(settings)
    records, validation_sets, generate = choose_validation(settings, records, run.args.seed)
    if strategy := sharding():
        raise InputError(
            f"a confidence run reads tags' rows and caches of a whole model, which {strategy} "
            "splits: launch with configs/strategies/ddp.yaml or zero2.yaml, with --load_in_4bit "
            "if the model is too large for a GPU"
        )
    tokenizer = load_tokenizer(settings.model_name, settings.trust_remote_code)
    add_confidence_tokens(tokenizer)
    encodings = encode_dataset(tokenizer, records, settings)
    recipe = confidence_recipe(settings, tokenizer, run.dtype)
    model = initialize_fitting_model(recipe, settings, run, encodings)
    if settings.adapter == "activated" or not generate:
        check_window(model, settings.max_seq_length)
    validation = ValidationCallback(
        validation_sets, tokenizer, settings, run.folder, generate,
        run.args.per_device_eval_batch_size, run.args.seed,
    )  # fmt: skip
    trainer = train(run, settings, recipe, model, tokenizer, encodings, validation)
    return finish(trainer, validation, settings)


def main(
    argv: list[str] | None = None,
    run: Callable[[list[str] | None], dict[str, Any]] = run,
    script: str = Settings.script,
) -> dict[str, Any]:
    """Trains as the command line says; if it cannot, exits with one message and the code that the
    head of this file tells of."""
    with interruption.listening():
        try:
            return run(argv)
        except (InputError, RunError) as error:
            code, agreed = (1, error.on_all) if isinstance(error, RunError) else (2, False)
            first = int(os.environ.get("LOCAL_RANK", "0")) == 0
            if Watch.current.first_to_tell() if Watch.current else first:
                report(script, str(error))
        except Stopped as stop:
            code, agreed = 128 + interruption.signal, stop.agreed
            say(f"{signal.Signals(interruption.signal).name}: {stop}")
        except Exception:
            if not torch.distributed.is_initialized():
                raise
            interruption.training = True  # the launcher's SIGTERM shall not come between
            if Watch.current:  # which ends this process if another's death was the reason
                Watch.current.join(2 * (Watch.interval + Watch.grace))
            traceback.print_exc()
            end_process(1)
    if agreed and Watch.current:
        Watch.current.leave()
    if torch.distributed.is_initialized():
        end_process(code)
    raise SystemExit(code)


def leave() -> None:
    """Ends a process of a distributed run here, all being written.

    Taking a gloo process group apart can abort the process, its threads still running, or hang it:
    the destructor waits, holding the interpreter's lock, for a thread that needs it. Both were
    seen, once in hundreds of runs.
    """
    if torch.distributed.is_initialized():
        if Watch.current:
            Watch.current.leave()
        atexit._run_exitfuncs()  # wandb and its like finish there
        end_process(0)


if __name__ == "__main__":
    main()
    leave()
