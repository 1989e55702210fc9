#!/usr/bin/env python3
"""After training: is the confidence to be believed, where is the threshold, how is it served?

    python report_confidence.py evaluate --adapter checkpoints/qwen/final --data boolq=test.jsonl
    python report_confidence.py threshold checkpoints/qwen/report --target_precision 0.95
    python report_confidence.py route checkpoints/qwen/report --bigger bigger.jsonl --bigger_cost 20
    python report_confidence.py export checkpoints/qwen/final --merged exported/qwen

evaluate writes a folder, the other two add to it: report.html (one page, needs no network), PNGs,
report.json, scores.jsonl (a line per answer), threshold.json, route.json; and, beside the adapter,
scaling.json and the model card. Exit codes: 0 done; 1 the threshold that is asked for cannot be
reached, or an export differs from its adapter; 2 something to mend in the command or its files.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

SYSTEMS = {
    "adapter": "P(C) of the adapter",
    "scaled": "the same after scaling",
    "token_probability": "mean probability of the answer's own tokens, of the base model",
    "p_true": "P(True) asked of the base model",
    "bag_of_words": "a classifier of the words of question and answer",
    "base_rate": "the share of right answers among those kept for scaling, whatever the question",
    "always_confident": "always sure",
}
CHECKED = 32  # questions by which an export is compared with its adapter
MOST_DIFFERENT = 0.05  # in P(C), between them: 16 bits allow for a hundredth


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report_confidence.py", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    evaluate = commands.add_parser("evaluate", help="measure on held-out data; write the report")
    add = evaluate.add_argument
    add("--adapter", help="folder of an adapter, as checkpoints/…/final, or one of the Hub")
    add("--model_name", help="its base model if that has moved; without --adapter that model alone")
    add(
        "--data",
        nargs="+",
        metavar="NAME=PATH",
        required=True,
        help="held-out sets: NAME=FILE, or NAME=HUB_ID:SPLIT",
    )
    add("--output_dir", help="where the report goes; default: report/ beside the adapter")
    add(
        "--answers",
        choices=["generate", "recorded"],
        help="the model answers, or recorded answers are scored; default: as the data allows",
    )
    add(
        "--scaling",
        choices=["platt", "temperature", "none"],
        default="platt",
        help="post-hoc scaling of each domain, fitted on answers that are not tested on",
    )
    add("--scaling_data", nargs="+", default=[], metavar="NAME=PATH", help="what it is fitted on")
    add(
        "--scaling_share", type=float, default=0.3, help="else: the share of --data it is fitted on"
    )
    add(
        "--without",
        nargs="+",
        default=[],
        metavar="DOMAIN=ADAPTER",
        help="an adapter trained without a domain, to be tested on it by another domain's tags",
    )
    add("--train_data", help="tagged answers for the bag of words; default: the adapter's own")
    add("--assume_held_out", action="store_true", help="where nothing tells: --data is held out")
    add("--limit", type=int, help="the first so many records of each set only")
    add("--max_new_tokens", type=int, default=256, help="longest answer")
    add("--max_seq_length", type=int, default=2048, help="longest question and answer, tokens")
    add("--batch_size", type=int, default=64, help="answers at a time")
    add("--skip_bad_records", action="store_true", help="leave bad lines out")
    add("--calib_beta", type=int, default=100, help="calibration error: answers in a bin")
    add("--calib_p_norm", choices=["1", "2", "infty"], default="2", help="and its norm")
    add_loading(evaluate, ("float32", "bfloat16", "float16"))

    threshold = commands.add_parser("threshold", help="choose one by a report's scores")
    threshold.add_argument("report", help="folder that evaluate wrote")
    goal = threshold.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--target_precision", type=float, help="least share right of what is answered"
    )
    goal.add_argument("--coverage", type=float, help="share of questions answered")
    goal.add_argument("--share_routed", type=float, help="share of questions not answered")
    threshold.add_argument("--level", type=float, default=0.95, help="of confidence")

    route = commands.add_parser("route", help="simulate asking a bigger model below a threshold")
    route.add_argument("report", help="folder that evaluate wrote")
    route.add_argument(
        "--bigger",
        required=True,
        metavar="FILE",
        help="the same questions with the bigger model's tagged_response, as tag_answers.py writes "
        'them, or with "correct": true or false',
    )
    route.add_argument("--cost", type=float, default=1.0, help="of an answer of this model")
    route.add_argument("--bigger_cost", type=float, default=10.0, help="of one of the bigger model")
    for command in (threshold, route):
        command.add_argument("--system", help="whose confidence decides; default: the main one")

    export = commands.add_parser("export", help="write what servers can load")
    export.add_argument("adapter", help="folder of an adapter, or one of the Hub")
    export.add_argument("--model_name", help="its base model if that has moved")
    way = export.add_mutually_exclusive_group(required=True)
    way.add_argument("--merged", metavar="FOLDER", help="a model with the adapter merged into it")
    way.add_argument(
        "--rows_in_base",
        "--rows-in-base",
        metavar="FOLDER",
        help="base/ with the trained rows of the tags, and a plain LoRA: adapter/",
    )
    export.add_argument(
        "--questions", metavar="FILE", help="to compare them by; default: the run's training data"
    )
    export.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    add_loading(export, ("bfloat16", "float16"), "bfloat16")
    return parser


def add_loading(
    parser: argparse.ArgumentParser, dtypes: tuple[str, ...], default: str | None = None
) -> None:
    parser.add_argument("--dtype", choices=dtypes, default=default,
                        help="of the weights; default: "
                        + (default or "bfloat16 on a GPU that has it, else float32"))  # fmt: skip
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model's own code")
    for bits in (8, 4) if default is None else ():  # what is exported has 16
        parser.add_argument(
            f"--load_in_{bits}bit", action="store_true", help="the base's weights, as in training"
        )


if __name__ == "__main__" and not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
    build_parser().parse_args()  # answers here, before the imports below take their seconds

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard
from jinja2 import TemplateError
from sklearn.metrics import log_loss
from transformers import PreTrainedTokenizerBase
from yaml import YAMLError

from confidence_model import (
    SCALING_FILE,
    ConfidenceModel,
    base_of,
    default_dtype,
    export_merged,
    export_rows_in_base,
    plain_confidence,
    read_scaling,
    window,
)
from reporting import statistics
from reporting.baselines import bag_of_words, p_true, token_probability
from reporting.page import write_page
from reporting.statistics import Interval, Scaling
from train_confidence_lora import (
    CONFIDENCE_TOKENS,
    DATASETS,
    MIN_ANSWER_TOKENS,
    InputError,
    Record,
    RunError,
    build_prompt,
    calibration_error_if_perfect,
    check_confidence,
    check_question,
    check_sets,
    check_writable,
    content_of,
    draw_sample,
    fit_records,
    generate_answers,
    judge_answer,
    load_base_model,
    load_tokenizer,
    parse_object,
    plan_batches,
    question_key,
    read_records,
    read_sets,
    read_settings,
    say,
    source,
    split_tag,
    write_text,
)
from train_confidence_lora import report as report_error


def loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of load_adapter()."""
    names = "model_name trust_remote_code load_in_8bit load_in_4bit".split()
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None)}
    if arguments.dtype:
        given["dtype"] = getattr(torch, arguments.dtype)
    return given


# ------------------------------------------------------------------------------------------------
# evaluate: which records


def seen_questions(adapter: str, skip_bad: bool) -> tuple[dict[str, str], list[Record], dict]:
    """What the run has seen in whose folder an adapter lies.

    Returns:
        ({question key: "trained on" or "used to choose a checkpoint"}, its training file's records,
        its settings); all empty if there is no run.

    Raises:
        InputError: if its data is gone, or is not what it was.
    """
    saved = read_settings(
        Path(adapter).resolve().parent, "give --assume_held_out if you know what it has seen"
    )
    if not saved:
        return {}, [], {}
    data = SimpleNamespace(
        train_data=saved["train_data"], val_data=saved["val_data"], tuning="scratch"
    )
    for path, content in content_of(data).items():
        if saved["resolved"]["content"].get(path, content) != content:
            raise InputError(
                f"{path} is not what {adapter} was trained with: put that back, or give "
                "--assume_held_out if you know that --data was not part of it"
            )
    records = read_records(saved["train_data"], skip_bad)
    seen = {}
    for name, members in read_sets(saved["val_data"], skip_bad).items():
        for record in draw_sample(members, saved["val_samples"], f"{saved['seed']} {name}"):
            seen[question_key(record)] = "used to choose a checkpoint"
    seen |= {question_key(record): "trained on" for record in records}
    return seen, records, saved


def is_for_scaling(key: str, share: float) -> bool:
    """Decides by the question alone, as tag_answers.py does for its split, and independently."""
    digest = hashlib.sha256(f"scaling {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def choose_records(
    arguments: argparse.Namespace, seen: dict[str, str]
) -> tuple[list[Record], list[dict]]:
    """The records to be answered, each once, with its `key` and the name of its `set`, which is ""
    if scaling is fitted on it. And what became of each test file's records.

    Raises:
        InputError: if a set has no record left.
    """
    chosen, known = [], dict(seen)

    def take(flag: str, name: str, records: list[Record], share: float, into: str) -> dict:
        left_out, used = Counter(), 0
        for record in records[: arguments.limit]:
            key = question_key(record)
            reason = known.get(key)
            known.setdefault(key, "asked before")
            if reason is None and is_for_scaling(key, share):
                chosen.append({**record, "key": key, "set": ""})
                reason = "kept for scaling"
            if reason:
                left_out[reason] += 1
            else:
                chosen.append({**record, "key": key, "set": into})
                used += 1
        if not used:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            raise InputError(
                f"{flag} {name}: none of {left_out.total()} records is left to use ({reasons}): "
                "give more questions that the training has not seen"
            )
        count = left_out.total() + used
        account = {"set": name, "path": records[0]["file"], "records": count, "used": used}
        return {**account, "left_out": dict(left_out)}

    share = arguments.scaling_share
    if arguments.scaling_data or arguments.scaling == "none":
        share = 0.0
    skip_bad = arguments.skip_bad_records
    for name, records in read_sets(arguments.scaling_data, skip_bad).items():
        take("--scaling_data", name, records, 0.0, "")
    tested = read_sets(arguments.data, skip_bad).items()
    account = [take("--data", name, records, share, name) for name, records in tested]
    return chosen, account


def choose_answers(asked: str | None, records: list[Record]) -> bool:
    """Whether the model answers. InputError names the record that lacks what that needs."""
    if asked is None:
        generate = all(record.get("answer") is not None for record in records)
        asked = "generate" if generate else "recorded"
    key, name = {"generate": ("answer", "answer"), "recorded": ("confident", "tagged_response")}[
        asked
    ]
    for record in records:
        if record.get(key) is None:
            raise InputError(
                f'{record["file"]}:{record["line"]}: "{name}" is missing, which --answers {asked} '
                "needs"
            )
    return asked == "generate"


# ------------------------------------------------------------------------------------------------
# evaluate: answers and confidences


class Scores(NamedTuple):
    """Answers and what each system makes of them."""

    records: list[Record]  # with `set`, `response`, `correct`, `extracted`, `emitted`
    systems: dict[str, np.ndarray]  # confidence (n,) by system, in the order of SYSTEMS
    correct: np.ndarray  # (n,) bool

    def part(self, mask: np.ndarray) -> Scores:
        """Those where mask (n,) is true."""
        records = [record for record, wanted in zip(self.records, mask) if wanted]
        systems = {name: confidence[mask] for name, confidence in self.systems.items()}
        return Scores(records, systems, self.correct[mask])


def answer_alone(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """The answers of a model without adapter."""
    prompts = [build_prompt(tokenizer, record) for record in records]
    texts = [""] * len(records)
    for batch in plan_batches([len(prompt) for prompt in prompts], batch_size):
        chosen = [prompts[i] for i in batch]
        with torch.inference_mode():
            found = generate_answers(model, tokenizer, chosen, max_new_tokens)
        for i, ids in zip(batch, found.answers, strict=True):
            texts[i] = tokenizer.decode(ids, skip_special_tokens=True)
    return texts


def score_records(
    arguments: argparse.Namespace, records: list[Record], generate: bool, words: list[Record]
) -> Scores:
    """Has the records answered, or takes their recorded answers, and asks every system that needs
    no fitting on them. words: tagged records, other ones, to fit the bag of words on."""
    size, most = arguments.batch_size, arguments.max_new_tokens if generate else None
    options = loading(arguments)
    if arguments.adapter:
        adapted = ConfidenceModel.from_pretrained(
            arguments.adapter, scale=False, max_seq_length=arguments.max_seq_length, **options
        )
        model, tokenizer = adapted.model, adapted.tokenizer
    else:
        name, dtype = options.pop("model_name"), options.pop("dtype", default_dtype())
        tokenizer = load_tokenizer(name, arguments.trust_remote_code)
        model = load_base_model(name, dtype, **options).eval()
    room = window(model, arguments.max_seq_length) - 2 - (MIN_ANSWER_TOKENS if generate else 0)
    sets = {record["set"] for record in records if record["set"]}
    records = fit_records(tokenizer, records, room, "--data")
    if lost := sets - {record["set"] for record in records}:
        raise InputError(
            f"--data {lost.pop()}: no record fits --max_seq_length {arguments.max_seq_length} and "
            "the model's window"
        )
    systems, tags = {}, [None] * len(records)
    if arguments.adapter:
        found = adapted.answer(records, most, size) if generate else adapted.judge(records, size)
        systems["adapter"] = np.array([answer.confidence for answer in found])
        texts, tags = [answer.text for answer in found], [answer.tag for answer in found]
    elif generate:
        texts = answer_alone(model, tokenizer, records, most, size)
    else:
        texts = [record["response"] for record in records]
    answered = []
    for record, text, tag in zip(records, texts, tags, strict=True):
        truth = record.get("answer") if generate else None
        judged = judge_answer(record["dataset"], text, truth, record.get("options"))
        correct = bool(judged.correct) if generate else record["confident"]
        answered.append({**record, "response": text, "correct": correct, "emitted": tag,
                         "extracted": judged.extracted})  # fmt: skip
    systems["token_probability"] = token_probability(model, tokenizer, answered, size)
    systems["p_true"] = p_true(model, tokenizer, answered, size)
    asked = {record["key"] for record in records}
    words = [record for record in words if question_key(record) not in asked]
    if len({record["confident"] for record in words}) == 2:
        systems["bag_of_words"] = bag_of_words(words)(answered)
    systems["always_confident"] = np.ones(len(answered))
    return Scores(answered, systems, np.array([record["correct"] for record in answered]))


def domains_of(records: list[Record]) -> np.ndarray:
    return np.array([DATASETS[record["dataset"]].domain for record in records])


def fit_scalings(scores: Scores, system: str, method: str) -> dict[str, Scaling]:
    """The scaling of each domain that has the answers for it. One that gains less log-likelihood
    than it has parameters (Akaike's criterion) is noise: that domain is left as it is."""
    found, domains = {}, domains_of(scores.records)
    for domain in sorted(set(domains.tolist())):
        part = scores.part(domains == domain)
        confidence = part.systems[system]
        try:
            scaling = statistics.fit_scaling(confidence, part.correct, method)
        except ValueError as error:
            say(f"warning: domain {domain} is not scaled: {error}")
            continue
        before, after = (
            log_loss(part.correct, p, labels=[False, True], normalize=False)
            for p in (confidence, scaling.apply(confidence))
        )
        if before - after <= (2 if method == "platt" else 1):
            say(f"domain {domain}: scaling would gain nothing, it is left as it is")
            scaling = Scaling(1.0, 0.0)
        found[domain] = scaling
    return found


def scale(confidence: np.ndarray, domains: np.ndarray, maps: dict[str, Scaling]) -> np.ndarray:
    """Confidences (n,), each scaled by its domain's map, if there is one."""
    scaled = confidence.copy()
    for domain, scaling in maps.items():
        scaled[domains == domain] = scaling.apply(confidence[domains == domain])
    return scaled


# ------------------------------------------------------------------------------------------------
# evaluate: figures


def as_dict(interval: Interval, **more: float | None) -> dict[str, float | None]:
    """Plain numbers, which JSON and YAML can write."""
    figures = {**interval._asdict(), **more}
    return {name: None if value is None else float(value) for name, value in figures.items()}


def measure(
    arguments: argparse.Namespace, confidence: np.ndarray, scores: Scores, tags: bool = False
) -> dict[str, dict]:
    """Every figure of one system on a set, with its interval. tags: they were written by it."""
    right_tag = None
    if tags:
        right_tag = [r["emitted"] == ("C" if r["correct"] else "U") for r in scores.records]
    found = statistics.bootstrap_intervals(confidence, scores.correct, right_tag)
    figures = {name: as_dict(interval) for name, interval in found.items()}
    binning = {"p": arguments.calib_p_norm, "beta": arguments.calib_beta}
    figures["calibration_error"] = as_dict(
        statistics.calibration_interval(confidence, scores.correct, **binning),
        if_perfect=calibration_error_if_perfect(confidence, **binning),
    )
    figures["ece"] = as_dict(
        statistics.calibration_interval(confidence, scores.correct, kind="ece")
    )
    return figures


def rates_of(scores: Scores, tags: bool) -> dict[str, dict]:
    """Shares of the answers in which no answer could be found, which count as wrong, and of those
    that the adapter wrote no tag after, or another domain's."""
    count = len(scores.records)
    found = {"unparsed": sum(record["extracted"] is None for record in scores.records)}
    if tags:
        found["missing_tag"] = sum(record["emitted"] is None for record in scores.records)
        found["wrong_domain"] = sum(record["emitted"] == "other" for record in scores.records)
    return {
        name: as_dict(Interval(hits / count, *statistics.clopper_pearson(hits, count)))
        for name, hits in found.items()
    }


def groups(scores: Scores) -> Iterator[tuple[str, np.ndarray]]:
    """(name, mask) of each set, of a domain of several sets, and of all."""
    sets = np.array([record["set"] for record in scores.records])
    domains = domains_of(scores.records)
    names = sorted(set(sets.tolist()))
    for name in names:
        yield name, sets == name
    for domain in sorted(set(domains.tolist())):
        if len(set(sets[domains == domain])) > 1 and len(set(domains)) > 1:
            yield f"domain {domain}", domains == domain
    if len(names) > 1:
        yield "all", np.ones(len(sets), bool)


def figures_of(
    arguments: argparse.Namespace, scores: Scores, main: str
) -> tuple[dict[str, dict], dict[str, dict]]:
    """("sets" and "differences" of report.json)."""
    sets, differences = {}, {}
    for name, mask in groups(scores):
        part = scores.part(mask)
        systems = {
            system: measure(arguments, confidence, part, tags=system == "adapter")
            for system, confidence in part.systems.items()
        }
        answer_accuracy = systems[main].pop("answer_accuracy")
        for figures in systems.values():
            figures.pop("answer_accuracy", None)  # the same for all
        sets[name] = {
            "num_samples": len(part.records),
            "answer_accuracy": answer_accuracy,
            "rates": rates_of(part, tags="adapter" in systems),
            "systems": systems,
        }
        differences[name] = {
            system: {
                metric: as_dict(
                    statistics.paired_difference(
                        metric, part.systems[main], confidence, part.correct
                    )
                )
                for metric in ("auroc", "brier")
            }
            for system, confidence in part.systems.items()
            if system != main
        }
    return sets, differences


def leave_one_domain_out(
    arguments: argparse.Namespace,
    test: Scores,
    fitting: Scores,
    raw: str,
    main: str,
    words: list[Record],
) -> dict[str, dict]:
    """How each system that is fitted to domains does on one that it was not fitted to."""
    domains, found = domains_of(test.records), {}
    if len(set(domains)) == 1 and not arguments.without:
        return found
    adapters = dict(item.split("=", 1) for item in arguments.without)
    for domain in sorted(set(domains.tolist())):
        part = test.part(domains == domain)
        tried = {"main": (f"{SYSTEMS[main]}, fitted to this domain too", part.systems[main])}
        others = fitting.part(domains_of(fitting.records) != domain)
        if arguments.scaling != "none":
            with suppress(ValueError):  # too few answers, or of one kind
                scaling = statistics.fit_scaling(
                    others.systems[raw], others.correct, arguments.scaling
                )
                scaled = scaling.apply(part.systems[raw])
                tried["scaling"] = "scaling fitted on the other domains", scaled
        asked = {record["key"] for record in part.records}
        known = [
            record
            for record, own in zip(words, domains_of(words))
            if own != domain and question_key(record) not in asked
        ]
        if len({record["confident"] for record in known}) == 2:
            by_words = bag_of_words(known)(part.records)
            tried["bag_of_words"] = "a bag of words fitted on the other domains", by_words
        if domain in adapters:
            tags, confidence = score_without(arguments, domain, adapters[domain], part.records)
            description = f"{adapters[domain]}, trained without it; its {tags} tags are read"
            tried["adapter"] = description, confidence
        for name, (description, confidence) in tried.items():
            figures = measure(arguments, confidence, part)
            found[f"{domain}: {name}"] = {"description": description, "metrics": figures}
    return found


def score_without(
    arguments: argparse.Namespace, domain: str, adapter: str, records: list[Record]
) -> tuple[str, np.ndarray]:
    """(the domain whose tags are read, P(C) (n,)) of answers of a domain that an adapter was
    trained without.

    Raises:
        InputError: if it was trained with it.
    """
    _, training, _ = seen_questions(adapter, arguments.skip_bad_records)
    counts = Counter(domains_of(training).tolist())
    if not counts or counts[domain]:
        raise InputError(
            f"--without {domain}={adapter}: {counts[domain]} of its {counts.total()} training "
            f"records are of domain {domain}: give the adapter of a run without that domain"
        )
    [(tags, _)] = counts.most_common(1)
    adapted = ConfidenceModel.from_pretrained(
        adapter, scale=False, max_seq_length=arguments.max_seq_length, **loading(arguments)
    )
    found = adapted.judge(records, arguments.batch_size, domain=tags)
    return tags, np.array([answer.confidence for answer in found])


def evaluate(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    check_evaluate(arguments)
    seen, training, saved = read_run(arguments)
    words = training
    if arguments.train_data:
        words = read_records(arguments.train_data, arguments.skip_bad_records)
    words = [record for record in words if "confident" in record]
    records, account = choose_records(arguments, seen)
    check_domains(arguments, records)
    generate = choose_answers(arguments.answers, records)
    folder = report_folder(arguments)
    say(f"{len(records)} questions, {'to be answered' if generate else 'with recorded answers'}")

    scores = score_records(arguments, records, generate, words)
    for_test = np.array([record["set"] != "" for record in scores.records])
    fitting = scores.part(~for_test)
    raw = "adapter" if arguments.adapter else "token_probability"
    maps = fit_scalings(fitting, raw, arguments.scaling) if len(fitting.records) else {}
    add_fitted(scores, fitting, raw, maps)
    test, fitting = scores.part(for_test), scores.part(~for_test)
    main = "scaled" if maps else raw
    sets, differences = figures_of(arguments, test, main)
    report = {
        "title": arguments.adapter or arguments.model_name,
        "model_name": arguments.model_name or base_of(arguments.adapter),
        "adapter": arguments.adapter,
        "kind": saved.get("adapter"),
        "created": datetime.date.today().isoformat(),
        "answers": "generate" if generate else "recorded",
        "data": count_too_long(account, test),
        "training": training_of(training, saved),
        "versions": saved.get("versions", {}),
        "main": main,
        "systems": {name: SYSTEMS[name] for name in test.systems},
        "sets": sets,
        "differences": differences,
        "leave_one_domain_out": leave_one_domain_out(arguments, test, fitting, raw, main, words),
        "scaling": scaling_of(maps, arguments.scaling, fitting, test, raw) if maps else None,
    }
    write_report(folder, report, test)
    if arguments.adapter and Path(arguments.adapter).is_dir() and not arguments.limit:
        keep_beside(Path(arguments.adapter), report, test)
    seconds = time.perf_counter() - start
    say(
        f"{format_report(report)}\n\n{len(records)} answers in {seconds:.0f} s; page: "
        f"{folder / 'report.html'}"
    )
    return 0


def check_evaluate(arguments: argparse.Namespace) -> None:
    """InputError if the arguments cannot be meant, before a model is loaded."""
    check_sets(arguments.data, "--data")
    check_sets(arguments.scaling_data, "--scaling_data")
    if not (arguments.adapter or arguments.model_name):
        raise InputError("evaluate: give --adapter FOLDER, or --model_name for a model without one")
    if not 0 <= arguments.scaling_share < 1:
        raise InputError(f"--scaling_share {arguments.scaling_share}: give 0 to below 1")
    if arguments.scaling == "none" and arguments.scaling_data:
        raise InputError("--scaling_data is for scaling: leave it out, or --scaling none")
    for flag in ("limit", "batch_size", "max_new_tokens", "max_seq_length", "calib_beta"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise InputError(f"--{flag} {value}: give at least 1")
    for item in arguments.without:
        domain, _, adapter = item.partition("=")
        if domain not in CONFIDENCE_TOKENS or not adapter:
            raise InputError(f"--without {item}: write DOMAIN=ADAPTER, as READ=checkpoints/…/final")
    if arguments.adapter and base_of(arguments.adapter) is None:
        raise InputError(
            f"--adapter {arguments.adapter} is a merged model: evaluate the adapter it was made of"
        )


def check_domains(arguments: argparse.Namespace, records: list[Record]) -> None:
    """InputError if --without names a domain of which nothing is asked."""
    asked = set(domains_of([record for record in records if record["set"]]).tolist())
    for item in arguments.without:
        if item.partition("=")[0] not in asked:
            raise InputError(f"--without {item}: --data asks of {', '.join(sorted(asked))} only")


def read_run(arguments: argparse.Namespace) -> tuple[dict[str, str], list[Record], dict]:
    """seen_questions() of --adapter. Of one that nothing is known of, only if told to."""
    if not arguments.adapter:
        return {}, [], {}
    try:
        found = seen_questions(arguments.adapter, arguments.skip_bad_records)
    except InputError as error:
        if not arguments.assume_held_out:
            raise
        say(f"warning: {error}")
        return {}, [], {}
    if not found[2] and not arguments.assume_held_out:
        raise InputError(
            f"there is no settings.yaml beside {arguments.adapter} that tells what it was trained "
            "on: put its run's there, or give --assume_held_out if you know it has not seen --data"
        )
    return found


def report_folder(arguments: argparse.Namespace) -> Path:
    """Where the report goes. InputError if it cannot go there."""
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
    elif arguments.adapter and Path(arguments.adapter).is_dir():
        folder = Path(arguments.adapter).resolve().parent / "report"
        folder = Path(os.path.relpath(folder)) if folder.is_relative_to(Path.cwd()) else folder
    else:
        raise InputError("--output_dir is missing: say where the report shall go")
    check_writable(folder)
    return folder


def keep_beside(adapter: Path, report: dict[str, Any], test: Scores) -> None:
    """Puts the scaling of the domains that were evaluated beside the adapter, for serving, and the
    figures into its card."""
    path = adapter / SCALING_FILE
    domains = set(domains_of(test.records).tolist())
    scaling = report["scaling"] or {"maps": {}}
    try:
        others = {k: v._asdict() for k, v in read_scaling(str(adapter)).items() if k not in domains}
        if maps := {**others, **scaling["maps"]}:
            write_text(path, as_json({**scaling, "maps": maps}))
        else:
            path.unlink(missing_ok=True)
        write_card(adapter, report)
    except OSError as error:
        say(f"warning: {error}: neither scaling nor card can be put beside the adapter")


def add_fitted(scores: Scores, fitting: Scores, raw: str, maps: dict[str, Scaling]) -> None:
    """Adds the systems that were fitted on answers which are not tested on; orders them all."""
    if len(fitting.records):
        scores.systems["base_rate"] = np.full(len(scores.records), fitting.correct.mean())
    if maps:
        domains = domains_of(scores.records)
        scores.systems["scaled"] = scale(scores.systems[raw], domains, maps)
    ordered = {name: scores.systems[name] for name in SYSTEMS if name in scores.systems}
    scores.systems.clear()
    scores.systems.update(ordered)


def count_too_long(account: list[dict], test: Scores) -> list[dict]:
    """choose_records()'s account, less the records that --max_seq_length has no room for."""
    used = Counter(record["set"] for record in test.records)
    for entry in account:
        if lost := entry["used"] - used[entry["set"]]:
            entry["left_out"]["too long"] = lost
            entry["used"] -= lost
    return account


def scaling_of(
    maps: dict[str, Scaling], method: str, fitting: Scores, test: Scores, raw: str
) -> dict[str, Any]:
    """What was fitted, and what it changes on the test set; the adapter's scaling.json too."""
    before, after = test.systems[raw], test.systems["scaled"]
    nll_before, nll_after = (
        statistics.bootstrap_intervals(confidence, test.correct)["nll"]
        for confidence in (before, after)
    )
    change = statistics.paired_difference("nll", after, before, test.correct)
    return {
        "method": method,
        "num_samples": len(fitting.records),
        "maps": {domain: scaling._asdict() for domain, scaling in maps.items()},
        "nll_before": as_dict(nll_before),
        "nll_after": as_dict(nll_after),
        "nll_change": as_dict(change),
    }


def training_of(training: list[Record], saved: dict[str, Any]) -> dict[str, Any] | None:
    """How the adapter was made, as far as its run tells."""
    if not saved:
        return None
    right = sum(record["confident"] for record in training)
    names = (
        "train_data num_train_epochs global_batch_size learning_rate lora_r lora_alpha "
        "lora_dropout max_seq_length load_in_8bit load_in_4bit seed"
    ).split()
    flags = {**saved, **saved["resolved"]}
    counts = {"records": len(training), "right": right, "wrong": len(training) - right}
    return {**counts, **{name: flags[name] for name in names if flags.get(name) is not None}}


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_report(folder: Path, report: dict[str, Any], test: Scores) -> None:
    """Writes the report; what was chosen by an earlier one's scores goes with them."""
    for name in ("threshold.json", "route.json", "routing.png"):
        (folder / name).unlink(missing_ok=True)
    names = (
        "set key dataset question context options answer response extracted correct emitted"
    ).split()
    lines = []
    for i, record in enumerate(test.records):
        line = {name: record[name] for name in names if record.get(name) is not None}
        line["domain"] = DATASETS[record["dataset"]].domain
        line["source"] = source(record)
        line["confidence"] = {name: float(part[i]) for name, part in test.systems.items()}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(folder / "scores.jsonl", "".join(lines))
    write_text(folder / "report.json", as_json(report))
    draw(folder)


def draw(folder: Path) -> None:
    """write_page(). InputError if something in the folder is not what was written there."""
    try:
        write_page(folder)
    except (OSError, ValueError, KeyError, TemplateError) as error:
        raise InputError(f"{folder} cannot be drawn ({error}): evaluate makes it anew") from error


COLUMNS = {  # of the printed table, heading: metric; report.json has all
    "AUROC": "auroc",
    "cal err": "calibration_error",
    "Brier": "brier",
    "right at 80 %": "accuracy_at_80",
}


def format_report(report: dict[str, Any]) -> str:
    """The figures as tables, a line for each system, with 95 % intervals."""

    def cell(figure: dict[str, float | None] | None) -> str:
        if not figure or figure["value"] is None:
            return "-"
        if figure["low"] is None:
            return f"{figure['value']:.3f}"
        return f"{figure['value']:.3f} ({figure['low']:.3f}-{figure['high']:.3f})"

    lines = []
    width = max(map(len, report["systems"]))
    for name, part in report["sets"].items():
        perfect = part["systems"][report["main"]]["calibration_error"]["if_perfect"]
        lines.append(
            f"\n{name}: {part['num_samples']} answers, right: {cell(part['answer_accuracy'])}; "
            f"a perfect model's cal err stays below {perfect:.3f} here"
        )
        rates = part["rates"].items()
        lines.append(", ".join(f"{name} {rate['value']:.1%}" for name, rate in rates))
        lines.append(" " * width + "".join(f"{heading:>23}" for heading in COLUMNS))
        for system, figures in part["systems"].items():
            cells = "".join(f"{cell(figures.get(metric)):>23}" for metric in COLUMNS.values())
            lines.append(f"{system:<{width}}{cells}")
    return "\n".join(lines)


NEW_CARD = "---\nlibrary_name: peft\n---\n"
CARD_METRICS = {  # of the main system: its name in a model card's index
    "auroc": "AUROC of confidence",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "calibration_error": "calibration error",
    "aurc": "area under the risk-coverage curve",
}


def write_card(adapter: Path, report: dict[str, Any]) -> None:
    """Puts the figures into the adapter's model card, in the Hub's model-index form."""
    path = adapter / "README.md"
    try:
        card = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else NEW_CARD)
    except (ValueError, YAMLError) as error:
        say(f"warning: {path} gets no figures: {' '.join(str(error).split()):.200}")
        return
    results = []
    for name, part in report["sets"].items():
        main = part["systems"][report["main"]]
        figures = {"answer accuracy": part["answer_accuracy"]}
        figures |= {label: main[metric] for metric, label in CARD_METRICS.items()}
        results += [
            EvalResult(
                task_type="text-generation",
                task_name="confidence in its own answers",
                dataset_type=name,
                dataset_name=f"{name} ({part['num_samples']} held-out questions)",
                metric_type=label.lower().replace(" ", "_"),
                metric_name=label,
                metric_value=figure["value"],
                metric_args={"interval_95": [figure["low"], figure["high"]]},
            )
            for label, figure in figures.items()
            if figure["value"] is not None
        ]
    card.data.model_name = f"confidence adapter for {report['model_name']}"
    card.data.eval_results = results
    write_text(path, str(card))


# ------------------------------------------------------------------------------------------------
# threshold and route: decisions from a report's scores


class Report(NamedTuple):
    """What evaluate wrote, and whose confidence decides."""

    folder: Path
    system: str
    confidence: np.ndarray  # (n,) of that system
    correct: np.ndarray  # (n,) bool
    keys: list[str]  # of the questions


def read_report(folder: str, system: str | None) -> Report:
    """
    Raises:
        InputError: if the folder holds no report, or that has no such system.
    """
    try:
        figures = parse_object(Path(folder, "report.json").read_text(encoding="utf-8"))
        answers = read_records(Path(folder, "scores.jsonl"), parse=parse_object)
        if system not in (None, *figures["systems"]):
            raise InputError(f"--system {system}: there are {', '.join(figures['systems'])}")
        system = system or figures["main"]
        confidence = np.array([line["confidence"][system] for line in answers], float)
        correct = np.array([line["correct"] for line in answers], bool)
        keys = [line["key"] for line in answers]
        check_confidence(confidence, correct)
        for name in ("threshold.json", "route.json"):
            if (path := Path(folder, name)).is_file():
                parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder} is no report ({error}): make it with report_confidence.py evaluate"
        ) from error
    return Report(Path(folder), system, confidence, correct, keys)


def threshold(arguments: argparse.Namespace) -> int:
    for flag in ("target_precision", "coverage", "share_routed", "level"):
        value = getattr(arguments, flag)
        if value is not None and not 0 < value < 1:
            raise InputError(f"--{flag} {value}: give a number between 0 and 1")
    report = read_report(arguments.report, arguments.system)
    level, target, coverage = arguments.level, arguments.target_precision, arguments.coverage
    if target is not None:
        found = statistics.choose_threshold(report.confidence, report.correct, target, level)
    else:
        coverage = 1 - arguments.share_routed if coverage is None else coverage
        found = statistics.threshold_for_coverage(
            report.confidence, report.correct, coverage, level
        )
    result = {
        "system": report.system,
        "target_precision": target,
        "level": level,
        "reached": found is not None,
        "num_samples": len(report.correct),
        "num_accepted": found and found.num_accepted,
        "threshold": found and found.threshold,
        "precision": found and as_dict(found.precision),
        "coverage": found and as_dict(found.coverage),
    }
    write_text(report.folder / "threshold.json", as_json(result))
    if (path := report.folder / "route.json").is_file():  # which marks the threshold
        routed = parse_object(path.read_text(encoding="utf-8"))
        measure_routing(
            read_report(arguments.report, routed["system"]),
            routed["bigger"],
            routed["cost"],
            routed["bigger_cost"],
        )
    draw(report.folder)
    say(format_threshold(result))
    return 0 if found else 1


def format_threshold(result: dict[str, Any]) -> str:
    level = f"{result['level']:.0%} confidence"
    if not result["reached"]:
        return (
            f"cannot be reached: {result['num_samples']} answers show for no threshold, with "
            f"{level}, that {result['target_precision']:.1%} of those above it are right"
        )
    precision, coverage = result["precision"], result["coverage"]
    return (
        f"threshold {result['threshold']!r} of {result['system']}: answers "
        f"{coverage['value']:.1%} of the questions ({coverage['low']:.1%} to "
        f"{coverage['high']:.1%}), {precision['value']:.1%} of them right, at least "
        f"{precision['low']:.1%} with {level} ({result['num_accepted']} of "
        f"{result['num_samples']} answers)"
    )


def parse_bigger(line: str) -> dict[str, Any]:
    """A line of route's --bigger. ValueError, with the reason in words, if it is none."""
    record = parse_object(line)
    check_question(record)
    if isinstance(record.get("correct"), bool):
        return record
    if "tagged_response" not in record:
        raise ValueError('neither "correct": true or false nor "tagged_response" is there')
    domain = DATASETS[record["dataset"]].domain
    return {**record, "correct": split_tag(record["tagged_response"], domain)["confident"]}


def route(arguments: argparse.Namespace) -> int:
    for flag in ("cost", "bigger_cost"):
        value = getattr(arguments, flag)
        if not 0 <= value < float("inf"):
            raise InputError(f"--{flag} {value}: give 0 or more")
    report = read_report(arguments.report, arguments.system)
    result = measure_routing(report, arguments.bigger, arguments.cost, arguments.bigger_cost)
    draw(report.folder)
    say(format_route(result))
    return 0


def measure_routing(report: Report, path: str, cost: float, bigger_cost: float) -> dict[str, Any]:
    """What route.json holds, which is written: routing to the model whose answers `path` has."""
    answers = read_records(path, parse=parse_bigger)
    bigger = {question_key(record): record["correct"] for record in answers}
    paired = np.array([key in bigger for key in report.keys])
    if not paired.any():
        raise InputError(f"--bigger {path} has none of {report.folder}'s questions")
    if not paired.all():
        say(
            f"warning: {(~paired).sum()} of {len(paired)} questions are not in {path} and are left "
            'out; where that model gave no answer, write "correct": false'
        )
    confidence, correct = report.confidence[paired], report.correct[paired]
    bigger_correct = np.array([bigger[key] for key in report.keys if key in bigger])
    curves = statistics.routing_curves(confidence, correct, bigger_correct, cost, bigger_cost)
    figures = statistics.bootstrap_intervals(confidence, correct)
    names = "aurc accuracy_at_50 accuracy_at_80 accuracy_at_90".split()
    result = {
        "system": report.system,
        "bigger": path,
        "num_pairs": len(correct),
        "local_accuracy": float(correct.mean()),
        "bigger_accuracy": float(bigger_correct.mean()),
        "cost": cost,
        "bigger_cost": bigger_cost,
        "curves": {name: curve.tolist() for name, curve in curves.items()},
        "at_threshold": None,
        **{name: as_dict(figures[name]) for name in names},
    }
    if (chosen := chosen_threshold(report)) is not None:
        routed = confidence < chosen
        result["at_threshold"] = {
            "share_routed": float(routed.mean()),
            "accuracy": float(np.where(routed, bigger_correct, correct).mean()),
            "cost": float(cost + bigger_cost * routed.mean()),
        }
    write_text(report.folder / "route.json", as_json(result))
    return result


def chosen_threshold(report: Report) -> float | None:
    """The threshold that was chosen for the report's system, if one was."""
    path = report.folder / "threshold.json"
    chosen = parse_object(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return chosen["threshold"] if chosen.get("system") == report.system else None


def format_route(result: dict[str, Any]) -> str:
    lines = [
        f"{result['num_pairs']} questions; alone this model has {result['local_accuracy']:.1%} "
        f"right, the bigger one {result['bigger_accuracy']:.1%}",
        f"{'routed':>8}{'cost':>10}{'accuracy':>10}{'random':>10}{'perfect':>10}",
    ]
    curves = result["curves"]
    for share in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0):
        i = int(np.argmin(np.abs(np.array(curves["share_routed"]) - share)))
        accuracies = (curves[name][i] for name in ("accuracy", "random", "perfect"))
        lines.append(
            f"{curves['share_routed'][i]:>8.0%}{curves['cost'][i]:>10.2f}"
            + "".join(f"{accuracy:>10.1%}" for accuracy in accuracies)
        )
    if chosen := result["at_threshold"]:
        lines.append(
            f"at the threshold, which was chosen by these answers: {chosen['share_routed']:.1%} "
            f"routed, cost {chosen['cost']:.2f}, {chosen['accuracy']:.1%} right"
        )
    shares = (
        f"{result[f'accuracy_at_{share}']['value']:.1%} of the most confident {share} %"
        for share in (50, 80, 90)
    )
    lines.append(f"right without the bigger one: {', '.join(shares)}; "
                 f"AURC {result['aurc']['value']:.4f}")  # fmt: skip
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# export


def export(arguments: argparse.Namespace) -> int:
    records = questions_to_check(arguments)
    options = loading(arguments)
    adapted = ConfidenceModel.from_pretrained(arguments.adapter, scale=False, **options)
    texts = [answer.text for answer in adapted.answer(records, arguments.max_new_tokens)]
    records = [{**record, "response": text} for record, text in zip(records, texts)]
    before = np.array([answer.confidence for answer in adapted.judge(records)])
    del adapted
    folder = arguments.merged or arguments.rows_in_base

    def compare(exported: ConfidenceModel) -> None:
        after = np.array([answer.confidence for answer in exported.judge(records)])
        served = plain_confidence(exported.model, exported.tokenizer, records)
        worst, as_served = (float(np.abs(found - before).max()) for found in (after, served))
        say(
            f"{folder}: max |ΔP(C)| {worst:.5f} on {len(records)} answers; {as_served:.5f} read "
            f"from {arguments.dtype} logits, as a server does"
        )
        if not max(worst, as_served) <= MOST_DIFFERENT:
            raise RunError(
                f"{folder} would give other confidences than {arguments.adapter}, by up to "
                f"{max(worst, as_served):.3f}, and is not written: try --dtype float16"
            )

    way = export_merged if arguments.merged else export_rows_in_base
    way(arguments.adapter, folder, check=compare, **options)
    return 0


def questions_to_check(arguments: argparse.Namespace) -> list[Record]:
    """Some questions of --questions, or of the data that the adapter was trained on."""
    base_of(arguments.adapter)  # says if there is no adapter
    run = Path(arguments.adapter).resolve().parent
    path = arguments.questions or read_settings(run, "give --questions FILE").get("train_data")
    if path is None:
        raise InputError(
            f"{arguments.adapter} lies in no run that tells of questions: give --questions FILE"
        )
    return draw_sample(read_records(path, skip_bad=True), CHECKED, "export")


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    run = {"evaluate": evaluate, "threshold": threshold, "route": route, "export": export}
    try:
        code = run[arguments.command](arguments)
    except (InputError, RunError) as error:
        report_error("report_confidence.py", str(error))
        code = 1 if isinstance(error, RunError) else 2
    raise SystemExit(code)


if __name__ == "__main__":
    main()
