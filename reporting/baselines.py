"""What an adapter's confidence is compared with: other ways to tell right answers from wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from transformers import PreTrainedTokenizerBase

from train_confidence_lora import (
    Record,
    as_prompt,
    base_model_only,
    build_prompt,
    constant,
    pad,
    plan_batches,
    positions,
    question_text,
    tokenize,
)

MOST_LOGITS = 2**28  # at once, each of four bytes
P_TRUE = (
    "Proposed answer: {}\n\nIs the proposed answer right? Answer with the letter.\n\nA. Yes\nB. No"
)


def token_probability(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    batch_size: int = 32,
) -> np.ndarray:
    """exp of the mean log-probability (n,) that the base model gives the tokens of each `response`,
    an adapter being off. An empty response has 0."""

    def score(batch: list[int]) -> list[float]:
        prompts = [tokenize(tokenizer, build_prompt(tokenizer, records[i])) for i in batch]
        answers = [tokenize(tokenizer, records[i]["response"]) for i in batch]
        longest = max(map(len, answers))
        rows = [prompt + answer for prompt, answer in zip(prompts, answers)]
        logits = last_logits(model, rows, longest + 1)[:, :-1]
        targets, _ = (part.to(model.device) for part in pad(answers, 0, left=True))
        chosen = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        return [
            chosen[k, longest - len(answer) :].mean().exp().item() if answer else 0.0
            for k, answer in enumerate(answers)
        ]

    lengths = [len(record["response"]) + 1 for record in records]
    return in_batches(score, lengths, batch_size, most_logits(model))


def p_true(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    batch_size: int = 32,
) -> np.ndarray:
    """P(True) (n,): the base model, an adapter being off, is shown its question and its `response`
    and asked whether that is right; the probability of yes, of the two letters that may answer.

    (Kadavath et al., https://arxiv.org/abs/2207.05221, without their examples.)
    """
    # The last token: some tokenizers begin what follows a space with a token of its own
    yes, no = (
        {tokenize(tokenizer, text)[-1] for text in (letter, f" {letter}")} for letter in "AB"
    )
    prompts = [
        as_prompt(tokenizer, f"{question_text(record)}\n\n{P_TRUE.format(record['response'])}")
        for record in records
    ]

    def score(batch: list[int]) -> list[float]:
        logits = last_logits(model, [tokenize(tokenizer, prompts[i]) for i in batch], 1)[:, 0]
        both = [logits[:, constant(tuple(ids), logits.device)].logsumexp(-1) for ids in (yes, no)]
        return torch.sigmoid(both[0] - both[1]).tolist()

    size = max(1, min(batch_size, most_logits(model)))
    return in_batches(score, [len(prompt) for prompt in prompts], size)


def last_logits(model: torch.nn.Module, rows: list[list[int]], count: int) -> torch.Tensor:
    """Float32 logits (batch, count, vocabulary) of the base model at each row's last tokens."""
    ids, mask = (part.to(model.device) for part in pad(rows, 0, left=True))
    with base_model_only(model):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            logits_to_keep=count,
            use_cache=False,
        )
    return output.logits.float()


def most_logits(model: torch.nn.Module) -> int:
    """Positions whose logits memory has room for."""
    return MOST_LOGITS // model.config.get_text_config().vocab_size


@torch.inference_mode()
def in_batches(
    score: Callable[[list[int]], list[float]],
    lengths: list[int],
    batch_size: int,
    most: float = math.inf,
) -> np.ndarray:
    """score() of each index (n,) in batches of like length, each of a total length of at most
    `most`; halved where memory does not suffice."""
    found = np.zeros(len(lengths))
    waiting = plan_batches(lengths, batch_size, most)
    while waiting:
        batch = waiting.pop(0)
        try:
            found[batch] = score(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            half = len(batch) // 2
            waiting[:0] = [batch[:half], batch[half:]]
    return found


def bag_of_words(records: list[Record]) -> Callable[[list[Record]], np.ndarray]:
    """A classifier of right and wrong answers by the words of question and answer alone, fitted on
    tagged records.

    Returns:
        A function from records with a `response` to their probabilities (n,) of being right.

    Raises:
        ValueError: if all records are of one kind.
    """

    def words(record: Record) -> str:
        return f"{question_text(record)}\n{record['response']}"

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    classifier: Pipeline = make_pipeline(vectorizer, LogisticRegression(C=10, max_iter=1000))
    classifier.fit([words(record) for record in records], [r["confident"] for r in records])
    return lambda asked: classifier.predict_proba([words(record) for record in asked])[:, 1]
