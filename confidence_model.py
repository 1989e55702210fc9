"""A trained adapter in use: answers with the probability that they are right, and exports.

    from confidence_model import ConfidenceModel

    model = ConfidenceModel.from_pretrained("checkpoints/demo_lora/final")
    [answer] = model.answer([{"question": "does the box hold figs", "dataset": "demo_reading",
                              "context": "The box holds figs and eggs."}])
    print(answer.text, answer.probability)

Both kinds of adapter are used alike. What post-hoc scaling was fitted (report_confidence.py
evaluate) lies beside the adapter and is applied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from reporting.statistics import Scaling
from train_confidence_lora import (
    DATASETS,
    MARKER_TOKEN,
    MIN_ANSWER_TOKENS,
    InputError,
    Record,
    Scorer,
    build_prompt,
    check_question,
    confidence_ids,
    fit_record,
    gpu_has_bf16,
    is_activated,
    judge_answer,
    load_base_model,
    load_tokenizer,
    parse_object,
    replace_folder,
    staging,
    tag_probability,
    tokenize,
    without_wrapper,
)

SCALING_FILE = "scaling.json"  # beside an adapter: how its confidence becomes a probability


class Answer(NamedTuple):
    """A model's answer to a question."""

    text: str
    probability: float  # that it is right: `confidence`, scaled if there is a scaling
    confidence: float  # P(C) / (P(C) + P(U)) at the tag's position
    tag: str | None  # written: "C" or "U" of the question's domain, "other", None if none
    extracted: str | None  # what judge_answer() reads from it: yes, a letter, a number; or None


def at(folder: str, name: str) -> str | None:
    """The path of an adapter's file, from its folder or the Hugging Face Hub; None if it has none.

    Raises:
        InputError: if there is no such adapter.
    """
    if Path(folder).is_dir():
        path = Path(folder, name)
        return str(path) if path.is_file() else None
    try:
        return cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder} is neither a folder nor on the Hub: {reason}") from error


def read_scaling(adapter: str) -> dict[str, Scaling]:
    """The scaling of each domain that lies beside an adapter; empty if there is none.

    Raises:
        InputError: if it cannot be read.
    """
    path = at(adapter, SCALING_FILE)
    if path is None:
        return {}
    try:
        saved = parse_object(Path(path).read_text(encoding="utf-8"))
        return {
            domain: Scaling(float(m["a"]), float(m["b"])) for domain, m in saved["maps"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"cannot read {path}: {error}; make it anew or delete it") from error


def load_adapter(
    adapter: str,
    model_name: str | None = None,
    dtype: torch.dtype | None = None,
    **loading: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A trained adapter on its base model, or what was made of it by `export`, and its tokenizer.

    Args:
        adapter: folder (as `final/` of a run) or repository of the Hugging Face Hub.
        model_name: base model, if it is elsewhere than where it was trained from.
        dtype: of the base's weights; by default bfloat16 on a GPU that has it, else float32.
        loading: for load_base_model(), as load_in_8bit.

    Raises:
        InputError: if it is no confidence adapter, or its base cannot be loaded.
    """
    merged = base_of(adapter) is None
    tokenizer = load_tokenizer(adapter, loading.get("trust_remote_code", False))
    ids = confidence_ids(tokenizer)
    if None in ids.all or tokenizer.unk_token_id in ids.all:
        raise InputError(f"{adapter} is no confidence adapter: its tokenizer has no tags")
    dtype = dtype or default_dtype()
    if merged:
        return load_base_model(adapter, dtype, **loading).eval(), tokenizer
    base = load_base_model(model_name or base_of(adapter), dtype, **loading)
    grow(base, tokenizer)
    return PeftModel.from_pretrained(base, adapter).eval(), tokenizer


def base_of(adapter: str) -> str | None:
    """The name or folder of an adapter's base model; None for a model that it was merged into.

    Raises:
        InputError: if there is neither.
    """
    if at(adapter, "adapter_config.json") is not None:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
        beside = Path(adapter).parent / "base"  # of an export that was moved
        return str(beside) if not Path(base).exists() and beside.is_dir() else base
    if at(adapter, "config.json") is None:
        raise InputError(
            f"no adapter in {adapter}: give the folder that a run left, as checkpoints/…/final"
        )
    return None


def default_dtype() -> torch.dtype:
    return torch.bfloat16 if gpu_has_bf16() else torch.float32


def window(model: torch.nn.Module, max_seq_length: int) -> int:
    """The longest sequence, tokens, that is asked for and that the model has positions for."""
    return min(max_seq_length, getattr(model.config, "max_position_embeddings", max_seq_length))


def grow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a model rows for all of its tokenizer's tokens, if it lacks some."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


class ConfidenceModel:
    """A model with a confidence adapter, for applications."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        scaling: dict[str, Scaling] | None = None,
        max_seq_length: int = 2048,
    ) -> None:
        """
        Args:
            scaling: of each domain; confidences of a domain without one are taken as they are.
            max_seq_length: longest question and answer, tokens; a longer passage loses its middle.
        """
        self.model, self.tokenizer, self.scaling = model.eval(), tokenizer, scaling or {}
        self.max_seq_length = window(model, max_seq_length)

    @classmethod
    def from_pretrained(
        cls, adapter: str | Path, *, max_seq_length: int = 2048, scale: bool = True, **loading: Any
    ) -> ConfidenceModel:
        """The adapter of a folder or of the Hugging Face Hub on its base model.

        Args:
            scale: whether to apply the scaling that lies beside the adapter.
            loading: see load_adapter().

        Raises:
            InputError: see load_adapter() and read_scaling().
        """
        scaling = read_scaling(str(adapter)) if scale else {}
        return cls(*load_adapter(str(adapter), **loading), scaling, max_seq_length)

    def answer(
        self, questions: list[Record], max_new_tokens: int = 256, batch_size: int = 32
    ) -> list[Answer]:
        """Answers questions, greedily.

        Args:
            questions: as in a data file: `question`, `dataset`, and `context` or `options` if any.
            max_new_tokens: longest answer.
            batch_size: answers at a time; fewer where memory does not suffice.

        Returns:
            An Answer for each question, in their order.

        Raises:
            InputError: naming the question that is none, or does not fit into max_seq_length.
        """
        return self._score(questions, max_new_tokens, batch_size)

    def judge(
        self, answered: list[Record], batch_size: int = 32, domain: str | None = None
    ) -> list[Answer]:
        """The probability that answers given before are right: as answer(), for questions that have
        a `response`, which is scored instead of a new one.

        Args:
            domain: whose tags are read, instead of those of each question's own, without scaling.
        """
        return self._score(answered, None, batch_size, domain)

    def _score(
        self,
        questions: list[Record],
        max_new_tokens: int | None,
        batch_size: int,
        domain: str | None = None,
    ) -> list[Answer]:
        fitting = [self._fit(i, record, max_new_tokens) for i, record in enumerate(questions)]
        scorer = Scorer(self.tokenizer, max_new_tokens)
        answers: dict[int, Answer] = {}
        for batch in scorer.batches(fitting, batch_size):
            chosen = [fitting[i] for i in batch]
            for i, record, (confidence, tag, text) in zip(
                batch, chosen, scorer(self.model, chosen, domain), strict=True
            ):
                scaling = self.scaling.get(DATASETS[record["dataset"]].domain)
                scaled = scaling is not None and domain is None
                probability = float(scaling.apply(confidence)) if scaled else confidence
                if max_new_tokens is None:
                    text = questions[i]["response"]  # of which the middle may not have been read
                judged = judge_answer(record["dataset"], text, None, record.get("options"))
                answers[i] = Answer(text, probability, confidence, tag, judged.extracted)
        return [answers[i] for i in range(len(fitting))]

    def _fit(self, i: int, record: Record, max_new_tokens: int | None) -> Record:
        try:
            check_question(record)
            if max_new_tokens is not None:  # the answer takes the place of what is there
                record = {**record, "response": ""}
            elif not isinstance(record.get("response"), str):
                raise ValueError('"response" is missing')
            room = self.max_seq_length - 2 - (MIN_ANSWER_TOKENS if max_new_tokens else 0)
            return fit_record(self.tokenizer, record, room)
        except ValueError as error:
            raise InputError(f"question {i}: {error}") from error


# ------------------------------------------------------------------------------------------------
# Exports: what servers can load that know nothing of trained token rows

MARK = "export.json"  # in a folder that an export wrote, and may replace


def export_merged(
    adapter: str,
    folder: str | Path,
    dtype: torch.dtype,
    check: Callable[[ConfidenceModel], None] | None = None,
    **loading: Any,
) -> Path:
    """Writes a model into which the adapter is merged, with the tags in its tokenizer.

    Args:
        adapter, loading: see load_adapter().
        folder: to write; an earlier export is replaced.
        dtype: of the weights, as torch.bfloat16.
        check: is given what was written, loaded anew, before it takes its place; what it raises
            leaves the earlier export where it is.

    Returns:
        `folder`.

    Raises:
        InputError: if the folder holds something else, or the adapter is an activated one, which
            leaves the model's answers as they were and so cannot be part of its weights.
    """
    with exporting(adapter, Path(folder)) as new:
        model, tokenizer = load_trained_rows(adapter, dtype, loading)
        if is_activated(model):
            raise InputError(
                f"{adapter} is an activated adapter, which acts after the answer alone and cannot "
                "be merged: use --rows_in_base, or train with --adapter lora"
            )
        model.merge_and_unload().save_pretrained(new)
        tokenizer.save_pretrained(new)
        copy_scaling(adapter, new)
        del model
        if check:
            check(ConfidenceModel.from_pretrained(new, dtype=dtype, scale=False))
    return Path(folder)


def export_rows_in_base(
    adapter: str,
    folder: str | Path,
    dtype: torch.dtype,
    check: Callable[[ConfidenceModel], None] | None = None,
    **loading: Any,
) -> Path:
    """Writes `base/`, the base model with the trained rows of marker and tags in its embedding and
    head, and `adapter/`, the LoRA without them: a plain one, which vLLM loads.

    Arguments and errors are those of export_merged(), but for activated adapters, which stay so.

    Returns:
        The folder of the adapter.
    """
    with exporting(adapter, Path(folder)) as new:
        model, tokenizer = load_trained_rows(adapter, dtype, loading)
        name = model.active_adapter
        config = model.peft_config[name]
        matrices = {
            key: value.contiguous()
            for key, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
            if ".lora_" in key
        }
        trained = []
        for part in embeddings(without_wrapper(model)):
            layer: TrainableTokensLayer = part.token_adapter
            trained.append((layer.token_indices[name], layer.trainable_tokens_delta[name].detach()))
        base = model.unload()
        with torch.no_grad():
            for part, (ids, rows) in zip(embeddings(base), trained, strict=True):
                part.weight[ids] = rows.to(part.weight.dtype)
        base.save_pretrained(new / "base")
        tokenizer.save_pretrained(new / "base")

        config.trainable_token_indices = None
        config.base_model_name_or_path = str(Path(folder).resolve() / "base")
        config.save_pretrained(new / "adapter")
        save_file(matrices, new / "adapter" / "adapter_model.safetensors", {"format": "pt"})
        tokenizer.save_pretrained(new / "adapter")
        copy_scaling(adapter, new / "adapter")
        del model, base
        if check:
            base_name = str(new / "base")
            check(ConfidenceModel.from_pretrained(
                new / "adapter", model_name=base_name, dtype=dtype, scale=False
            ))  # fmt: skip
    return Path(folder) / "adapter"


def load_trained_rows(
    adapter: str, dtype: torch.dtype, loading: dict[str, Any]
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """load_adapter() of one as training leaves it. InputError if it was exported before."""
    if base_of(adapter) is None:
        raise InputError(f"{adapter} is a merged model already: give the adapter it was made of")
    if PeftConfig.from_pretrained(adapter).trainable_token_indices is None:
        raise InputError(f"{adapter} has its rows in its base already: give the adapter it was of")
    return load_adapter(adapter, dtype=dtype, **loading)


def embeddings(model: PreTrainedModel) -> tuple[torch.nn.Module, torch.nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


@contextmanager
def exporting(adapter: str, folder: Path) -> Iterator[Path]:
    """An empty folder to export to, which takes the place of `folder` at the end if all went well.

    Raises:
        InputError: if `folder` holds what no export wrote, or cannot be written.
    """
    if folder.exists() and not (folder / MARK).is_file() and next(folder.iterdir(), None):
        raise InputError(f"{folder} exists and is no earlier export: give another folder")
    new = staging(folder)
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        (new / MARK).write_text(json.dumps({"adapter": str(adapter)}) + "\n", encoding="utf-8")
        yield new
        replace_folder(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def copy_scaling(adapter: str, folder: Path) -> None:
    if path := at(adapter, SCALING_FILE):
        shutil.copyfile(path, folder / SCALING_FILE)


@torch.inference_mode()
def plain_confidence(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, records: list[Record]
) -> np.ndarray:
    """P(C) (n,) of the records' responses as any server would read it: one pass over prompt, answer
    and marker, from the logits as the model gives them."""
    ids = confidence_ids(tokenizer)
    found = []
    for record in records:
        text = build_prompt(tokenizer, record), record["response"], MARKER_TOKEN
        row = [token for part in text for token in tokenize(tokenizer, part)]
        logits = model(input_ids=torch.tensor([row], device=model.device)).logits[:, -1]
        pair = ids.tags[DATASETS[record["dataset"]].domain]
        found.append(tag_probability(logits, [pair]).item())
    return np.array(found)
