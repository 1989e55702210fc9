#!/usr/bin/env python3
"""Fine-tune a language model on chats or texts, or train one from scratch.

    python train_language_model.py --task sft --model_name Qwen/Qwen2.5-7B-Instruct \\
        --train_data chats.jsonl --output_dir checkpoints/chat
    python train_language_model.py --task cpt --tuning scratch --train_data texts/ \\
        --hidden_size 256 --num_heads 4 --num_layers 4 --output_dir checkpoints/gpt
    make train CONFIG=configs/runs/sft.yaml            # the same from a file, on what GPUs are here

A second recipe on the trainer of train_confidence_lora.py: a task is where the loss is. `sft` has
it on the assistant's turns of chats, `cpt` (continued pretraining) on every token of texts, and
`cpt_mixed` trains on both. Tuning is which parameters train: LoRA, LoRA over quantised weights,
all of them, or all from a random start.

The file reads in the order data flows: settings, records, chats as segments, texts in blocks,
tokenizer and model, loss, pipeline, evaluation, main.
"""

from __future__ import annotations

import codecs
import io
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

# Before the libraries: with --backend unsloth it imports that first, which patches them
from train_confidence_lora import (
    ALL,
    Collator,
    EvaluationCallback,
    InputError,
    LabelTrainer,
    Recipe,
    Run,
    RunSettings,
    Stopped,
    add_adapter,
    cache_encodings,
    check_run_settings,
    decode_line,
    draw_sample,
    encode_segments,
    end_run,
    flops_per_token,
    generate_answers,
    hold_out,
    initialize_fitting_model,
    interruption,
    keep_freed_memory,
    leave,
    load_base_model,
    load_tokenizer,
    logits_only_at,
    main,
    model_parallel_size,
    must_be_written,
    open_data,
    open_run,
    parameter_count,
    parse_command_line,
    parse_object,
    pipeline_parallel_size,
    plan_batches,
    read_lines,
    read_records,
    replace_folder,
    replicas,
    report_skipped,
    say,
    setting,
    sharding,
    source,
    staging,
    tensor_parallel_size,
    tokenize,
    train,
    without_mark,
)

# isort: split
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset, concatenate_datasets
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

# ------------------------------------------------------------------------------------------------
# Settings


@dataclass
class LanguageSettings(RunSettings):
    """Settings of a run on chats or texts."""

    script: ClassVar[str] = "train_language_model.py"
    purpose: ClassVar[str] = __doc__.split("\n")[0]
    training_defaults: ClassVar[dict[str, Any]] = {
        "output_dir": "checkpoints/language_model",
        "per_device_train_batch_size": "auto",
        "per_device_eval_batch_size": 16,
    }

    train_data: str = setting(
        "chats.jsonl",
        "sft: chats, JSON Lines; cpt and cpt_mixed: texts, a .txt, .md or .jsonl file or a folder",
    )
    task: str = setting(
        "sft",
        "sft: chats, loss on the assistant's turns; cpt: texts, loss everywhere; cpt_mixed: both",
        choices=["sft", "cpt", "cpt_mixed"],
    )
    chat_data: str | None = setting(None, "the chats of cpt_mixed, JSON Lines")
    chat_share: float | None = setting(
        None,
        "share of chats among the sequences of cpt_mixed: what is too few is repeated, nothing is "
        "left out; without it each is taken once",
    )
    tuning: str = setting(
        "lora",
        "lora; qlora: over 4-bit weights (or --load_in_8bit); full: every parameter; scratch: "
        "every parameter, from a random start",
        choices=["lora", "qlora", "full", "scratch"],
    )
    val_data: str | None = setting(
        None, "chats or texts to evaluate on; without it 5%% of the training records are held out"
    )
    evaluation: str = setting(
        "loss",
        "generate: ROUGE-L of generated answers to chats, and the loss; loss: loss and perplexity",
        choices=["generate", "loss", "off"],
    )
    max_new_tokens: int = setting(64, "longest answer that evaluation generates, tokens")
    num_beams: int = setting(1, "beams of that generation; 1: greedy")
    tokenizer_name: str | None = setting(
        None, "scratch: tokenizer to take; without it one is trained on the data"
    )
    model_type: str = setting("llama", "scratch: architecture, a model type of transformers")
    vocab_size: int = setting(50_000, "scratch: tokens of the trained tokenizer, at most")
    hidden_size: int = setting(1024, "scratch: width")
    num_heads: int = setting(16, "scratch: attention heads")
    num_layers: int = setting(12, "scratch: layers")
    pipeline_parallel_size: int = setting(
        1,
        "full, scratch: stages of a pipeline, each a process with its share of the layers; give "
        "--gradient_accumulation_steps several times as many, whose batches keep them all busy",
    )


def check_settings(settings: LanguageSettings, training: dict[str, Any]) -> None:
    """check_run_settings(), and what only this recipe can get wrong.

    Raises:
        InputError: naming the flag and the remedy.
    """
    check_run_settings(settings, training)
    for flag, path in (
        ("train_data", settings.train_data),
        ("chat_data", settings.chat_data),
        ("val_data", settings.val_data),
    ):
        if path is not None and not Path(path).exists():
            raise InputError(f"--{flag} {path} does not exist: give a file of chats or texts")
    mixed, share = settings.task == "cpt_mixed", settings.chat_share
    if mixed != (settings.chat_data is not None):
        raise InputError(
            "--task cpt_mixed needs --chat_data FILE beside the texts of --train_data"
            if mixed
            else f"--chat_data is for --task cpt_mixed: --task {settings.task} has --train_data"
        )
    if share is not None and not (mixed and 0.001 <= share <= 0.999):
        raise InputError(f"--chat_share {share}: a share of 0.001 to 0.999, for --task cpt_mixed")
    if settings.tuning in ("full", "scratch") and (settings.load_in_8bit or settings.load_in_4bit):
        raise InputError(
            f"--tuning {settings.tuning} trains the weights, which quantised ones cannot be: leave "
            "--load_in_8bit and --load_in_4bit out, or take --tuning qlora"
        )
    if settings.tuning == "scratch" and settings.hidden_size % (2 * settings.num_heads):
        raise InputError(
            f"--hidden_size {settings.hidden_size} is no multiple of 2 x --num_heads "
            f"{settings.num_heads}: each head needs an even width"
        )
    if settings.backend == "unsloth" and settings.tuning in ("full", "scratch"):
        raise InputError(
            f"--backend unsloth is for LoRA: leave it out with --tuning {settings.tuning}"
        )
    if settings.backend == "unsloth" and settings.task != "sft":
        raise InputError(
            "--backend unsloth would let the texts of a block attend to each other: leave it out "
            f"with --task {settings.task}"
        )
    if settings.evaluation == "off" and training.get("load_best_model_at_end"):
        raise InputError("--load_best_model_at_end needs an evaluation: --evaluation loss")
    if settings.tokenizer_name and settings.tuning != "scratch":
        raise InputError("--tokenizer_name is for --tuning scratch: a model has its own tokenizer")
    check_pipeline(settings, training)


def check_tuning(tuning: str) -> None:
    """Refuses what the launch's strategy cannot split. InputError names both."""
    split = sharding()
    if tuning == "qlora" and split:
        raise InputError(
            f"--tuning qlora and {split} exclude each other: quantised weights are not split; "
            "launch with configs/strategies/ddp.yaml or zero2.yaml, or take --tuning lora"
        )
    if tuning == "scratch" and split == "tp":
        raise InputError(
            "--tuning scratch cannot be built in parts: make the model with --max_steps 1 in one "
            "process, and train its final/ with --tuning full"
        )


# ------------------------------------------------------------------------------------------------
# Records: a chat is {"messages": [{"role", "content"}, …]}, a text is {"text"}; both keep the name
# of their kind as "dataset", and where they came from

CHATS, TEXTS = "chats", "texts"
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's names


def parse_chat(line: str) -> dict[str, Any]:
    """A line as a chat. Beside `messages` these forms are known: `conversations` (ShareGPT), and
    one question with its answer as `prompt`/`completion`, `instruction`(/`input`)/`output` or
    (`system`/)`user`/`assistant`.

    Raises:
        ValueError: with the reason, in words, why the line is none.
    """
    row = parse_object(line)
    if "messages" in row or "conversations" in row:
        turns = row.get("messages", row.get("conversations"))
    elif "completion" in row:
        turns = turns_of(user=row.get("prompt"), assistant=row["completion"])
    elif "output" in row:
        parts = [part for part in (row.get("instruction"), row.get("input")) if part]
        turns = turns_of(user="\n\n".join(map(str, parts)), assistant=row["output"])
    elif "assistant" in row:
        turns = turns_of(row.get("system"), row.get("user"), row["assistant"])
    else:
        turns = None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('no "messages": a list of {"role": …, "content": …}')
    messages = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = ROLES.get(role, role) if isinstance(role, str) else None
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"unknown role {role!r}; known are system, user, assistant, tool")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"a message of the {role} has no text")
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message of the assistant: nothing to learn")
    return {"messages": messages, "dataset": CHATS}


def turns_of(system: Any = None, user: Any = None, assistant: Any = None) -> list[dict]:
    roles = {"system": system, "user": user, "assistant": assistant}
    return [{"role": role, "content": text} for role, text in roles.items() if text is not None]


def parse_text(line: str) -> dict[str, Any]:
    """A line {"text": …} as a text. ValueError, with the reason, if it is none."""
    text = parse_object(line).get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError('"text" is missing or empty')
    return {"text": text, "dataset": TEXTS}


TEXT_FILES = (".txt", ".md", ".jsonl", ".jsonl.gz")
MAX_DOCUMENT_BYTES = 256 * 2**20  # of a .txt or .md file


def read_texts(path: str, skip_bad: bool = False) -> list[dict[str, Any]]:
    """The texts of a file, or of all files of a folder in the order of their names: a .txt or .md
    file is one document, a .jsonl file one a line.

    Raises:
        InputError: if there are none, or a file cannot be read.
    """
    place = Path(path)
    files = [place]
    if path and place.is_dir():
        files = sorted(part for part in place.rglob("*") if part.is_file())
    records = []
    for file in [file for file in files if file.name.endswith(TEXT_FILES)]:
        if file.suffix not in (".txt", ".md"):
            records += read_records(file, skip_bad, parse_text)
            continue
        text = read_document(file)
        if not text.isspace() and text:
            records.append({"text": text, "dataset": TEXTS, "file": str(file), "line": 1})
    if not records:
        raise InputError(f"{path!r} holds no text: give files that end in {', '.join(TEXT_FILES)}")
    return records


def read_document(path: Path) -> str:
    """A file as one text, its lines ending in \\n.

    Raises:
        InputError: with file, line and reason, if it is no text or larger than MAX_DOCUMENT_BYTES.
    """
    for _ in read_pieces(path):  # what is wrong at its end is known before much is held
        pass
    text = io.StringIO()
    for piece in read_pieces(path):
        text.write(piece)
    return text.getvalue()


def read_pieces(path: Path) -> Iterator[str]:
    """read_document() in pieces, with its errors."""
    line = 1
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    with open_data(path) as (file, _):
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"cannot read {path}: larger than {MAX_DOCUMENT_BYTES >> 20} MiB; split it, or "
                "make it a .jsonl file with a text in each line"
            )
        data = without_mark(path, file.read(2**20))
        while data:
            following = file.read(2**20)
            try:
                piece = decoder.decode(data, final=not following)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                byte = error.object[error.start]
                raise InputError(
                    f"cannot read {path}:{line}: not UTF-8 (byte 0x{byte:02x}); save it as UTF-8"
                ) from None
            if "\0" in piece:
                line += piece.count("\n", 0, piece.index("\0"))
                raise InputError(f"cannot read {path}:{line}: a NUL character; remove it")
            line += piece.count("\n")
            yield piece
            data = following


def read_either(path: str, skip_bad: bool = False) -> list[dict[str, Any]]:
    """Texts or chats, by what the file's first line that is an object is."""
    if not path.endswith((".jsonl", ".jsonl.gz")):
        return read_texts(path, skip_bad)
    for _, line in read_lines(path):
        with suppress(ValueError):
            first = parse_object(decode_line(line))
            if "messages" not in first and "text" in first:
                return read_texts(path, skip_bad)
            break
    return read_records(path, skip_bad, parse_chat)


def read_data(
    settings: LanguageSettings, seed: int
) -> tuple[list[dict], dict[str, list[dict[str, Any]]]]:
    """(training records, samples to evaluate on by kind).

    Raises:
        InputError: if there is too little to hold any out.
    """
    skip, most = settings.skip_bad_records, settings.max_train_samples
    chat_file = settings.train_data if settings.task == "sft" else settings.chat_data
    training = [] if settings.task == "sft" else read_texts(settings.train_data, skip)[:most]
    if chat_file:
        training += read_records(chat_file, skip, parse_chat)[:most]
    if settings.evaluation == "off":
        return training, {}
    if settings.val_data:
        held = read_either(settings.val_data, skip)
    else:
        if [record["dataset"] for record in training] == [TEXTS]:  # one book: its end is held out
            [book] = training
            at = math.ceil(0.95 * len(book["text"]))
            training, held = (
                [{**book, "text": part}] for part in (book["text"][:at], book["text"][at:])
            )
        else:
            training, held = hold_out(training, 0.05, settings.val_samples, seed)
        say(f"held out of training for evaluation: {len(held)} of {len(held) + len(training)}")
    if not held:
        raise InputError(
            f"--train_data {settings.train_data} has too few records to hold any out: give "
            "--val_data FILE or --evaluation off"
        )
    samples = {}
    for kind in (CHATS, TEXTS):
        if records := [record for record in held if record["dataset"] == kind]:
            samples[kind] = draw_sample(records, settings.val_samples, f"{seed} {kind}")
    if settings.evaluation == "generate" and CHATS not in samples:
        raise InputError("--evaluation generate answers chats, and there are none: take loss")
    return training, samples


def mix(chats: int, texts: int, share: float | None) -> list[int]:
    """Indices of `chats` sequences followed by `texts`: each once, and those of the kind that falls
    short of its share again and again, in turn, until it has it."""
    wanted_chats = chats if share is None else max(chats, round(texts * share / (1 - share)))
    wanted_texts = texts if share is None else max(texts, round(chats * (1 - share) / share))
    order = [i % chats for i in range(wanted_chats)]
    return order + [chats + i % texts for i in range(wanted_texts)]


# ------------------------------------------------------------------------------------------------
# Chats as segments: the loss is on what the assistant says, and on the end of its turn

PLAIN_TEMPLATE = (  # for a model that brings none
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def chat_segments(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> list[tuple[str, int]]:
    """The chat in the model's template, cut into (text, how many of its tokens carry loss).

    A turn of the assistant begins where the template would have it generate, and ends with the
    special token that follows its text; a template without one has the end-of-sequence token
    appended, since a model that never saw an end would not stop. The template writes a beginning-
    of-sequence token itself where the model wants one.

    Raises:
        ValueError: if a turn's text does not stand in the rendered chat.
    """

    def render(part: list[dict[str, str]], prompt: bool) -> str:
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)

    whole, segments, done, at = render(messages, False), [], 0, 0
    tokens = sorted(special_tokens(tokenizer), key=len, reverse=True)
    turn_end = re.compile(rf"\s*(?:{'|'.join(map(re.escape, tokens))})")
    for number, message in enumerate(messages):
        text, begin = message["content"].strip(), None
        if message["role"] == "assistant" and number:  # templates refuse a chat without messages
            prompt = render(messages[:number], True)
            if whole.startswith(prompt):  # else the template shows an earlier turn in another way
                begin = at = len(prompt)
        start = whole.find(text, at)
        if message["role"] != "assistant":
            if start >= 0:  # a template may leave out or move what is not the assistant's
                at = start + len(text)
            continue
        if start < 0:
            raise ValueError(f"the chat template changes the text of message {number + 1}")
        begin = start if begin is None else begin
        end = turn_end.match(whole, start + len(text))
        at = end.end() if end else start + len(text)
        segments.append((whole[done:begin], 0))
        segments.append((whole[begin:at] + ("" if end else tokenizer.eos_token), ALL))
        done = at
    return segments


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Also those that are special without a name: a template may end turns with such a one."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def stop_at_turn_end(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Has generation stop at the token that ends a turn: a base model's own end is another."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    end = tokenize(tokenizer, chat_segments(tokenizer, chat)[-1][0])[-1]
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    ends = {*known, tokenizer.eos_token_id, end} - {None}
    model.generation_config.eos_token_id = sorted(ends)


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, records: list[dict], max_tokens: int
) -> Iterator[dict[str, Any]]:
    """The encoding of each chat, what follows its last answer left out. One that is longer than
    `max_tokens` loses its end, and is skipped if no answer begins before it."""
    for record in records:
        try:
            [encoding] = encode_segments(tokenizer, [chat_segments(tokenizer, record["messages"])])
        except (ValueError, TemplateError) as error:  # templates refuse what they cannot show
            encoding, reason = {"input_ids": [], "labels": []}, str(error)
        else:
            reason = f"no answer begins in its first {max_tokens} tokens"
        ids, labels = encoding["input_ids"][:max_tokens], encoding["labels"][:max_tokens]
        learns = any(label != -100 for label in labels[1:])
        yield {
            "input_ids": ids,
            "labels": labels,
            "position_ids": list(range(len(ids))),
            "length": len(ids),
            "source": source(record),
            "cut": len(ids) < len(encoding["input_ids"]),
            "skipped": "" if learns else f"line {record['line']}: {reason}",
        }


# ------------------------------------------------------------------------------------------------
# Texts in blocks: documents one after the other, none of which attends to another


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, records: list[dict], max_tokens: int
) -> Iterator[dict[str, Any]]:
    """Blocks of `max_tokens` tokens (the last may be shorter) that hold all documents, each with
    its end-of-sequence token.

    Positions start anew with each document, which is how transformers keeps attention within it.
    Each token but a document's first carries loss exactly once: where a document goes on in the
    next block, its last token is repeated there as context.
    """
    block: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    documents: list[str] = []  # where those in the block came from

    def full() -> dict[str, Any]:
        done = {name: list(values) for name, values in block.items()}
        for values in block.values():
            values.clear()
        done |= {"source": " to ".join(dict.fromkeys([documents[0], documents[-1]])), "cut": False}
        documents.clear()
        return {**done, "length": len(done["input_ids"]), "skipped": ""}

    bos = tokenizer.bos_token if tokenize(tokenizer, "a") != tokenizer.encode("a") else None
    for start in range(0, len(records), 1000):
        part = records[start : start + 1000]
        segments = [
            [(bos or "", 0), (record["text"] + tokenizer.eos_token, ALL)] for record in part
        ]
        for record, encoding in zip(part, encode_segments(tokenizer, segments), strict=True):
            ids, at = encoding["input_ids"], 0
            while at < len(ids) - 1:
                if max_tokens - len(block["input_ids"]) < 2:  # one token alone would learn nothing
                    yield full()
                piece = ids[at : at + max_tokens - len(block["input_ids"])]
                documents.append(source(record))
                block["input_ids"] += piece
                block["labels"] += [-100, *piece[1:]]
                block["position_ids"] += range(len(piece))
                at += len(piece) - 1
    if block["input_ids"]:
        yield full()


@dataclass
class BlockCollator:
    """Collator whose batches have position ids where sequences hold several documents. With
    `flatten` they are one row without padding, which flash attention takes apart by them."""

    pad_token_id: int
    flatten: bool = False

    def __call__(self, encodings: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        if self.flatten:
            names = ("input_ids", "labels", "position_ids")
            joined = {name: [*chain(*(row[name] for row in encodings))] for name in names}
            starts = [i for i, position in enumerate(joined["position_ids"]) if position == 0]
            for i in starts:
                joined["labels"][i] = -100
            batch = {name: torch.tensor([values]) for name, values in joined.items()}
            batch["source"] = [row.get("source", "") for row in encodings]
            return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
        batch = Collator(self.pad_token_id)(encodings)
        rows = [row["position_ids"] for row in encodings]
        if any(row[-1] != len(row) - 1 for row in rows):
            length = batch["input_ids"].shape[1]
            rows = [[*row, *range(row[-1] + 1, row[-1] + 1 + length - len(row))] for row in rows]
            batch["position_ids"] = torch.tensor(rows)
        return batch


def make_collator(settings: LanguageSettings, tokenizer: PreTrainedTokenizerBase) -> BlockCollator:
    flatten = settings.attn_implementation == "flash_attention_2"
    return BlockCollator(tokenizer.pad_token_id, flatten)


def encode(
    tokenizer: PreTrainedTokenizerBase, records: list[dict], settings: LanguageSettings
) -> Dataset:
    """The training sequences of chats and texts, in the shares that --chat_share asks for, as a
    dataset of `input_ids`, `labels`, `position_ids` and `length`."""
    parts = []
    for kind, encoder in ((CHATS, encode_chats), (TEXTS, encode_texts)):
        if chosen := [record for record in records if record["dataset"] == kind]:
            options = {"max_tokens": settings.max_seq_length}
            path = settings.chat_data if kind == CHATS else None
            what = f"the {kind} of {path or settings.train_data}"
            parts.append(cache_encodings(encoder, tokenizer, chosen, options, what, __file__))
            if cut := sum(parts[-1]["cut"]):
                say(f"warning: {cut} of {what} lose their end to --max_seq_length")
    if len(parts) == 1:
        return parts[0].remove_columns("cut")
    order = mix(len(parts[0]), len(parts[1]), settings.chat_share)
    say(f"{len(parts[0])} chats and {len(parts[1])} blocks of text make {len(order)} sequences")
    return concatenate_datasets(parts).select(order).remove_columns("cut")


# ------------------------------------------------------------------------------------------------
# Tokenizer and model

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with the ChatML template; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def texts_of(records: list[dict]) -> Iterator[str]:
    for record in records:
        if "text" in record:
            yield record["text"]
        for message in record.get("messages", []):
            yield message["content"]


def find_tokenizer(
    settings: LanguageSettings, records: list[dict], run: Run
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or one for a model from scratch: the one that is named, or else one
    trained on the data by one process of each machine, which a run that goes on keeps.

    Raises:
        InputError: if there is none, or it has no end-of-sequence token.
    """
    if run.checkpoint and settings.tuning == "scratch":
        tokenizer = load_tokenizer(run.checkpoint)
    elif settings.tuning != "scratch" or settings.tokenizer_name:
        name = settings.tokenizer_name or settings.model_name
        tokenizer = load_tokenizer(name, settings.trust_remote_code)
    else:
        place = run.folder / ".tokenizer"
        with PartialState().local_main_process_first():
            if PartialState().is_local_main_process:
                train_tokenizer(texts_of(records), settings.vocab_size).save_pretrained(place)
        tokenizer = load_tokenizer(str(place))
    if tokenizer.eos_token is None:
        raise InputError(
            f"the tokenizer of {settings.tokenizer_name or settings.model_name} has no eos_token, "
            "without which nothing learns to end: set it in its tokenizer_config.json"
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def new_model(settings: LanguageSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model of the given dimensions with random weights, input and output embedding tied unless
    it is a pipeline's.

    Raises:
        InputError: if transformers knows no such architecture, or not with these dimensions.
    """
    rows = math.ceil(len(tokenizer) / 64) * 64  # what matrix products on GPUs are quickest with
    try:
        config = AutoConfig.for_model(
            settings.model_type,
            vocab_size=rows,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            max_position_embeddings=positions_needed(settings),
            tie_word_embeddings=pipeline_parallel_size() == 1,  # else two processes would share it
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = settings.num_heads
        if getattr(config, "intermediate_size", None):  # three matrices: as many weights as 2 x 4 h
            config.intermediate_size = math.ceil(settings.hidden_size * 8 / 3 / 64) * 64
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=settings.attn_implementation
        )
    except (ValueError, KeyError, ImportError, StrictDataclassError) as error:
        raise InputError(f"--model_type {settings.model_type}: {error}") from error
    say(f"a new {settings.model_type} of {model.num_parameters():,} parameters")
    return model


def language_recipe(
    settings: LanguageSettings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> Recipe:
    """What train() needs to know of a run on chats or texts. Weights that train are float32, those
    that are frozen are of `dtype` or quantised."""
    frozen, stages = settings.tuning in ("lora", "qlora"), pipeline_parallel_size()

    def of_this_process(model: PreTrainedModel) -> PreTrainedModel:
        return keep_stage(model, PartialState().process_index, stages) if stages > 1 else model

    def build(bits: int | None) -> torch.nn.Module:
        if settings.tuning == "scratch":
            return of_this_process(new_model(settings, tokenizer))
        if settings.tuning == "qlora":
            bits = bits or 4
        model = load_base_model(
            settings.model_name,
            dtype if frozen else torch.float32,
            settings.attn_implementation,
            load_in_8bit=bits == 8,
            load_in_4bit=bits == 4,
            backend=settings.backend,
            trust_remote_code=settings.trust_remote_code,
        )
        if not frozen:
            return of_this_process(model)
        return add_adapter(
            model,
            settings.target_modules,
            settings.backend,
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
        )

    return Recipe(
        build,
        make_collator(settings, tokenizer),
        language_loss if stages == 1 else pipeline_loss,
        flops_per_token if frozen else full_flops_per_token,
        bits=(None, 8, 4) if settings.tuning == "lora" else (None,),
    )


def full_flops_per_token(model: PreTrainedModel, recompute: bool) -> float:
    """6·N where every weight trains: forward, gradient by inputs, gradient by weights; with the
    forward repeated 8·N. N is the weights of the linear layers, the head among them."""
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return sum(parameter_count(module.weight) for module in linear) * (8 if recompute else 6)


# ------------------------------------------------------------------------------------------------
# Loss

LOGITS_AT_ONCE = 1024  # positions; the logits of more would take gigabytes


def language_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, int]:
    """Cross-entropy summed over the labels of a batch, and their number.

    Args:
        model: a causal model, or what wraps one.
        batch: what BlockCollator gives.
    """
    labels = batch["labels"][:, 1:]
    labelled = labels != -100  # by the position that predicts the label
    inputs = {name: batch[name][:, :-1] for name in ("input_ids", "position_ids") if name in batch}
    unwrapped = getattr(model, "module", model)
    if "position_ids" in batch:
        check_documents_apart(unwrapped)
    if sharding() != "tp" and head_is_last(unwrapped):  # tp: the head's hooks put it together
        with losses_in_place_of_logits(unwrapped, labelled, labels[labelled]):
            losses = model(**inputs, use_cache=False).logits
    else:
        with logits_only_at(unwrapped, labelled):
            logits = model(**inputs, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits.float(), labels[labelled], reduction="none"
        )
    return losses.sum(), int(labelled.sum())


def check_documents_apart(model: torch.nn.Module) -> None:
    """Refuses models that attend across the documents of a block whatever the positions say. Found
    out by a pass of two documents, once."""
    if hasattr(model, "_documents_apart"):
        return
    tokens = torch.arange(8, device=model.device)[None]
    positions = tokens % 4
    other = torch.where(tokens < 4, tokens + 8, tokens)  # another first document
    training = model.training
    model.eval()
    with torch.no_grad():
        one, two = (
            model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, -1].float()
            for ids in (tokens, other)
        )
    model.train(training)
    if not torch.allclose(one, two, rtol=1e-2, atol=1e-3 * one.abs().max().item()):
        raise InputError(
            f"a {model.config.model_type} lets the texts of a block see each other, so --task cpt "
            "and cpt_mixed are not for it: take a Llama, Mistral, Qwen, Gemma or GPT-2"
        )
    model._documents_apart = True


def head_is_last(model: torch.nn.Module) -> bool:
    """Whether the logits are what the head gives; Gemma 2, Granite and others change them after it.
    Found out by a pass of a few tokens, once."""
    if not hasattr(model, "_head_is_last"):
        seen = []
        handle = model.get_output_embeddings().register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        try:
            with torch.no_grad():
                tokens = torch.arange(8, device=model.device)[None]
                logits = model(input_ids=tokens, use_cache=False).logits
        finally:
            handle.remove()
        model._head_is_last = torch.equal(seen[0].float(), logits.float())
    return model._head_is_last


@contextmanager
def losses_in_place_of_logits(
    model: torch.nn.Module, wanted: torch.Tensor, labels: torch.Tensor
) -> Iterator[None]:
    """Within it the model's `logits` are the (n,) losses of its n labels, at the positions where
    the (batch, length) mask `wanted` is true. Logits are made LOGITS_AT_ONCE at a time and again
    for the backward, so that they never take more memory than that."""
    head = model.get_output_embeddings()
    make_logits, own = head.forward, head.__dict__.get("forward")

    def part(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = make_logits(hidden).float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    def losses(hidden: torch.Tensor) -> torch.Tensor:
        parts = zip(hidden[wanted].split(LOGITS_AT_ONCE), labels.split(LOGITS_AT_ONCE))
        return torch.cat([checkpoint(part, *pair, use_reentrant=False) for pair in parts])

    head.forward = losses
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


# ------------------------------------------------------------------------------------------------
# Pipeline: the processes hold one model, each a stretch of its layers, and pass on activations
#   accelerate launch --config_file configs/strategies/ddp.yaml --num_processes 2 \
#     train_language_model.py --pipeline_parallel_size 2 --tuning scratch --batch_size 4 …

PIPELINE_MODELS = ("llama", "mistral", "qwen2")  # whose forward is embedding, layers, norm, head


def check_pipeline(settings: LanguageSettings, training: dict[str, Any]) -> None:
    """Tells what asks for the strategy how many stages there are. InputError if they cannot be."""
    stages = settings.pipeline_parallel_size
    split = [os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("DEEPSPEED", "FSDP")]
    launch = f"accelerate launch --config_file configs/strategies/ddp.yaml --num_processes {stages}"
    for refused, reason in (
        (any(split) or tensor_parallel_size() > 1, f"splits the model itself: {launch}"),
        (os.environ.get("WORLD_SIZE") != str(stages), f"needs as many processes: {launch}"),
        (settings.tuning not in ("full", "scratch"), "is for --tuning full and scratch"),
        (settings.evaluation == "generate", "cannot generate: take --evaluation loss"),
        *(
            (training.get(name), f"and --{name} exclude each other: leave one of them out")
            for name in ("fp16", "torch_compile", "use_liger_kernel")
        ),
    ):
        if stages > 1 and refused:
            raise InputError(f"--pipeline_parallel_size {stages} {reason}")
    os.environ["PIPELINE_PARALLEL_SIZE"] = str(stages)


class Elsewhere(torch.nn.Module):
    """Stands where another process has a module: what comes in goes out."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


def keep_stage(model: PreTrainedModel, stage: int, stages: int) -> PreTrainedModel:
    """Leaves of the model one stage: an equal share of the layers, and to the first the embedding,
    to the last norm and head, under the names they have in the whole one.

    The model's own forward then takes hidden states as `input_ids` unless it is the first, and
    gives hidden states as `logits` unless it is the last.

    Raises:
        InputError: if the model cannot be cut so.
    """
    flag, kind = f"--pipeline_parallel_size {stages}", model.config.model_type
    if kind not in PIPELINE_MODELS or model.config.tie_word_embeddings:
        raise InputError(
            f"{flag} takes {', '.join(PIPELINE_MODELS)} whose output matrix is not their input "
            f"embedding, and this {kind} is none: launch with configs/strategies/fsdp2.yaml"
        )
    layers = model.model.layers
    if len(layers) < stages:
        raise InputError(f"{flag} is more than the model's {len(layers)} layers")
    for i in range(len(layers)):
        if i * stages // len(layers) != stage:
            layers[i] = Elsewhere()
    if stage > 0:
        model.model.embed_tokens = Elsewhere()
    if stage < stages - 1:
        model.model.norm = model.lm_head = Elsewhere()
    model._head_is_last = model._documents_apart = True  # which no pass of tokens could find out
    return model


class Stage(torch.nn.Module):
    """What a schedule calls: from hidden states to hidden states, at the last stage to the loss."""

    def __init__(self, model: PreTrainedModel, last: bool) -> None:
        super().__init__()
        self.model, self.last = model, last

    def forward(self, hidden: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        if self.last:
            return language_loss(self.model, {"input_ids": hidden, **batch})[0][None]
        positions = batch["position_ids"]
        return self.model(input_ids=hidden, position_ids=positions, use_cache=False).logits


def pipeline_loss(
    model: PreTrainedModel, *batches: dict[str, torch.Tensor], backward: bool = False
) -> tuple[torch.Tensor, int]:
    """language_loss() summed over batches, the same on all processes, which run them together; with
    `backward` the gradients of the mean loss are added to the parameters'.

    A schedule's shapes are fixed: rows are filled up to one length, and the last batch, if it is
    shorter, with rows that carry no label.
    """
    stage, stages, count = PartialState().process_index, pipeline_parallel_size(), len(batches)
    inputs, last, rows = {}, stage == stages - 1, len(batches[0]["labels"])
    for name, padding in (("input_ids", 0), ("position_ids", 0), ("labels", -100)):
        counted = (torch.ones_like(batch["labels"]).cumsum(1) - 1 for batch in batches)
        parts = [batch.get(name, positions) for batch, positions in zip(batches, counted)]
        whole = pad_sequence([row for part in parts for row in part], True, padding)
        missing = (0, 0, 0, rows * count - len(whole))
        inputs[name] = torch.nn.functional.pad(whole, missing, value=padding)
    labels = int((inputs["labels"][:, 1:] != -100).sum())
    tokens = inputs.pop("input_ids").chunk(count)
    hidden = torch.empty(*tokens[0].shape, model.config.hidden_size, device=model.device)
    hidden.requires_grad_()
    shapes = (hidden if stage else tokens[0], hidden[0, 0, :1] if last else hidden)
    part = PipelineStage(Stage(model, last), stage, stages, model.device, *shapes)
    schedule = (Schedule1F1B if backward and count >= stages else ScheduleGPipe)(
        part, count, (lambda loss, _: loss.sum() / labels) if backward else None, scale_grads=False
    )
    given = () if stage else (torch.cat(tokens),)
    losses = schedule.step(*given, target=inputs["labels"], **inputs)
    loss = losses.detach().sum() if last else torch.zeros((), device=model.device)
    dist.broadcast(loss, stages - 1)
    return loss, labels


class PipelineTrainer(LabelTrainer):
    """LabelTrainer of a stage. All processes have the same batches, and those of an update go
    through the pipeline together; a checkpoint has the whole model and each stage's optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Gives it accelerate's precision; train() would make it one of several equal replicas
        self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.batches: list[dict[str, torch.Tensor]] = []  # of the update, until all are here
        self.through_cpu = dist.new_group(backend="gloo")  # a GPU may have no room for all weights
        self.optimizer_file = f"optimizer_{self.args.process_index}_of_{self.args.world_size}.pt"

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        whole = {"num_processes": 1, "process_index": 0, "even_batches": False}
        vars(loader.batch_sampler).update(whole)  # accelerate's BatchSamplerShard
        return loader

    def training_step(self, model: torch.nn.Module, inputs: dict, *_: Any) -> torch.Tensor:
        self.batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self.batches = self.batches, []
        loss, labels = pipeline_loss(model.train(), *batches, backward=True)
        tokens = sum(batch["attention_mask"].sum() for batch in batches)
        self.totals += torch.stack([tokens, tokens.new_tensor(labels), loss])
        self.update = [(loss, batch) for batch in batches]
        return loss / labels

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        parameters = list(model.parameters())
        squares = torch.nn.utils.get_total_norm([p.grad for p in parameters]) ** 2
        dist.all_reduce(squares)
        most = self.args.max_grad_norm or math.inf
        torch.nn.utils.clip_grads_with_norm_(parameters, most, squares.sqrt())
        return squares.sqrt()

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> torch.Tensor:
        self.grad_norm = self._clip_grad_norm(model) if grad_norm is None else grad_norm
        return self.grad_norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        own = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
        parts = [{}] * self.args.world_size if self.args.process_index == 0 else None
        dist.gather_object(own, parts, group=self.through_cpu)
        if parts:
            self._save(output_dir, state_dict=dict(chain(*(part.items() for part in parts))))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        state = {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler}
        state = {name: part.state_dict() for name, part in state.items()}
        torch.save(state, Path(output_dir, self.optimizer_file))
        self.accelerator.wait_for_everyone()  # trainer_state.json follows: all else is there

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not Path(checkpoint, self.optimizer_file).is_file():
            raise InputError(f"{checkpoint} is of no pipeline of {self.args.world_size} processes")
        state = torch.load(Path(checkpoint, self.optimizer_file), self.args.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # That a checkpoint has the other stages' weights too is none
        super()._issue_warnings_after_load(load_result._replace(unexpected_keys=[]))


# ------------------------------------------------------------------------------------------------
# Evaluation


class LanguageEvaluation(EvaluationCallback):
    """Loss and perplexity on held-out chats and texts, and ROUGE-L of generated answers to chats.

    The sequences are split over the processes, which make the same number of passes each: where
    parameters are sharded every pass is one of all processes.
    """

    def __init__(
        self,
        samples: dict[str, list[dict]],
        tokenizer: PreTrainedTokenizerBase,
        settings: LanguageSettings,
        folder: Path,
        batch_size: int,
    ) -> None:
        super().__init__(folder, samples)
        self.tokenizer, self.settings, self.batch_size = tokenizer, settings, batch_size
        self.collator = make_collator(settings, tokenizer)
        self.sequences: dict[str, list[dict]] = {}
        for kind, records in samples.items():
            encoder = encode_chats if kind == CHATS else encode_texts
            rows = list(encoder(tokenizer, records, settings.max_seq_length))
            reasons = [row["skipped"] for row in rows if row["skipped"]]
            report_skipped(reasons, len(rows), f"the {kind} to evaluate on")
            self.sequences[kind] = [row for row in rows if not row["skipped"]]
            if kind == CHATS:
                kept = [record for record, row in zip(records, rows) if not row["skipped"]]
                self.samples = {**self.samples, CHATS: kept}
        self.means = ("loss", "perplexity")
        if settings.evaluation == "generate":
            self.means = ("loss", "perplexity", "rougeL")
            self.questions = self._find_questions()

    def _find_questions(self) -> list[tuple[str, str]]:
        """What comes before the last answer of each chat, and that answer."""
        questions, reasons, most = [], [], self.settings.max_seq_length
        for record in self.samples[CHATS]:
            question = question_of(self.tokenizer, record)
            if question and len(tokenize(self.tokenizer, question[0])) <= most:
                questions.append(question)
            else:
                what = f"over {most} tokens before" if question else "nothing before"
                reasons.append(f"line {record['line']}: {what} its last answer")
        report_skipped(reasons, len(self.samples[CHATS]), "the chats to answer")
        return questions

    def _validate_dataset(self, model: torch.nn.Module, name: str) -> tuple[dict, None]:
        start = time.perf_counter()
        figures = {"num_samples": len(self.samples[name]), **self._losses(model, name)}
        if name == CHATS and self.settings.evaluation == "generate":
            figures |= self._rouge(model)
        figures["runtime"] = time.perf_counter() - start
        return figures, None

    def _losses(self, model: torch.nn.Module, name: str) -> dict[str, float]:
        sequences, sums = self.sequences[name], []
        batch_loss = language_loss if pipeline_parallel_size() == 1 else pipeline_loss
        for indices, counts in self._share([row["length"] for row in sequences]):
            batch = self.collator([sequences[i] for i in indices])
            batch = send_to_device(batch, model.device)
            with torch.no_grad():
                loss, labels = batch_loss(model, batch)
            if counts:
                sums.append((loss.item(), labels))
        total, labels = (sum(column) for column in zip(*gather_object(sums), strict=True))
        loss = total / labels
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}

    def _rouge(self, model: torch.nn.Module) -> dict[str, float]:
        found = []
        for indices, counts in self._share([len(prompt) for prompt, _ in self.questions]):
            with torch.inference_mode():
                generated = generate_answers(
                    model,
                    self.tokenizer,
                    [self.questions[i][0] for i in indices],
                    self.settings.max_new_tokens,
                    num_beams=self.settings.num_beams,
                    synced_gpus=PartialState().num_processes > 1,
                )
            for i, answer in zip(indices, generated.answers):
                text = self.tokenizer.decode(answer, skip_special_tokens=True).strip()
                if counts:
                    found.append((i, rouge_l(text, self.questions[i][1]), not text))
        scores = sorted(gather_object(found))
        if [i for i, _, _ in scores] != list(range(len(self.questions))):
            raise RuntimeError(f"{len(scores)} answers to {len(self.questions)} chats")
        return {
            "rougeL": sum(score for _, score, _ in scores) / len(scores),
            "empty_rate": sum(empty for _, _, empty in scores) / len(scores),
        }

    def _share(self, lengths: list[int]) -> Iterator[tuple[list[int], bool]]:
        """This process's batches of indices. So that every process has as many, one whose share is
        shorter does its first again, which then does not count. Stopped is raised between two."""
        replica, part = divmod(PartialState().process_index, model_parallel_size())
        share = math.ceil(len(lengths) / replicas())
        batches = plan_batches(lengths, max(1, min(self.batch_size, share)))
        for first in range(0, len(batches), replicas()):
            if interruption.agreed():
                raise Stopped
            at = first + replica
            yield (batches[at], part == 0) if at < len(batches) else (batches[0], False)

    def _table(self, figures: dict[str, dict]) -> str:
        return "\n".join(
            f"{name}: " + "  ".join(f"{key} {value:.4g}" for key, value in row.items())
            for name, row in figures.items()
        )


def question_of(tokenizer: PreTrainedTokenizerBase, record: dict) -> tuple[str, str] | None:
    """(prompt up to the assistant's last turn, what it said there); None if nothing is before."""
    messages = record["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if last == 0:
        return None
    prompt = tokenizer.apply_chat_template(
        messages[:last], tokenize=False, add_generation_prompt=True
    )
    return prompt, messages[last]["content"].strip()


class Words:
    """Words of any script, and each character of those written without spaces. rouge-score's own
    tokenizer knows a to z alone: equal texts in other letters would have 0."""

    alone = "\u3040-\u30ff\u3400-\u9fff"  # kana and Chinese characters

    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"[{self.alone}]|[^\W{self.alone}]+", text.lower())


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), by rouge-score. Nothing is
    like nothing: an empty prediction has 0."""
    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return scorer.score(reference, prediction)["rougeL"].fmeasure


# ------------------------------------------------------------------------------------------------
# The run


def positions_needed(settings: LanguageSettings) -> int:
    """Tokens of the longest sequence, and of an answer generated to it."""
    answers = settings.max_new_tokens if settings.evaluation == "generate" else 0
    return settings.max_seq_length + answers


def check_length(model: torch.nn.Module, settings: LanguageSettings) -> None:
    """InputError if sequences may be longer than the model has positions."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most and most < (needed := positions_needed(settings)):
        raise InputError(
            f"--max_seq_length {settings.max_seq_length} is more than the model's {most} positions"
            f"{' leave room for answers' if needed > settings.max_seq_length else ''}: give "
            f"{most - needed + settings.max_seq_length} or less"
        )


def save_model(trainer: LabelTrainer, folder: Path) -> None:
    """Writes model or adapter, and tokenizer. All processes take part, since each may hold but a
    part of it; the folder changes its content at once or not at all."""
    with must_be_written(folder):
        trainer.save_model(str(staging(folder)))
        if trainer.is_world_process_zero():
            replace_folder(folder)


def run(argv: list[str] | None) -> dict[str, Any]:
    """The whole run, step by step. Returns the content of summary.json (empty on other ranks)."""
    settings, training = parse_command_line(argv, LanguageSettings)
    check_settings(settings, training)
    keep_freed_memory()
    run = open_run(settings, training)
    records, samples = read_data(settings, run.args.seed)
    check_tuning(settings.tuning)
    tokenizer = find_tokenizer(settings, records, run)
    encodings = encode(tokenizer, records, settings)
    recipe = language_recipe(settings, tokenizer, run.dtype)
    model = initialize_fitting_model(recipe, settings, run, encodings)
    check_length(model, settings)
    if settings.task != "cpt":
        stop_at_turn_end(model, tokenizer)
    evaluation = LanguageEvaluation(
        samples, tokenizer, settings, run.folder, run.args.per_device_eval_batch_size
    )
    kind = LabelTrainer if pipeline_parallel_size() == 1 else PipelineTrainer
    trainer = train(run, settings, recipe, model, tokenizer, encodings, evaluation, kind)
    save_model(trainer, run.folder / "final")
    return end_run(trainer, evaluation, settings, task=settings.task, tuning=settings.tuning)


if __name__ == "__main__":
    main(None, run, LanguageSettings.script)
    leave()
