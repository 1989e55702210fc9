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
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
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


if __name__ == "__main__" and not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
    build_parser().parse_args()  # answers here, before the imports below take their seconds

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard
from sklearn.metrics import log_loss
from transformers import PreTrainedTokenizerBase
from yaml import YAMLError

from confidence_model import (
    SCALING_FILE,
    ConfidenceModel,
    export_merged,
    export_rows_in_base,
    plain_confidence,
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
    check_question,
    check_sets,
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
    return {
        "model_name": arguments.model_name,
        "dtype": arguments.dtype and getattr(torch, arguments.dtype),
        "trust_remote_code": arguments.trust_remote_code,
    }


# ------------------------------------------------------------------------------------------------
# evaluate: which records


def seen_questions(run: Path, skip_bad: bool) -> tuple[dict[str, str], list[Record], dict]:
    """What the run that an adapter lies in has seen.

    Returns:
        ({question key: "trained on" or "used to choose a checkpoint"}, its training file's records,
        its settings); all empty if the folder holds no run.
    """
    saved = read_settings(run, "delete it and give --assume_held_out, or train anew")
    if not saved:
        return {}, [], {}
    records = read_records(saved["train_data"], skip_bad)
    seen = {}
    for name, members in read_sets(saved["val_data"], skip_bad).items():
        for record in draw_sample(members, saved["val_samples"], f"{saved['seed']} {name}"):
            seen[question_key(record)] = "used to choose a checkpoint"
    seen |= {question_key(record): "trained on" for record in records}
    return seen, records, saved


def is_for_scaling(record: Record, share: float) -> bool:
    """Decides by the question alone, as tag_answers.py does for its split, and independently."""
    digest = hashlib.sha256(f"scaling {question_key(record)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def choose_records(
    arguments: argparse.Namespace, seen: dict[str, str]
) -> tuple[list[Record], list[dict]]:
    """The records to be answered, each once, with the name of their `set`; it is "" for those that
    scaling is fitted on. And what became of each file's records.

    Raises:
        InputError: if a set has no record left.
    """
    chosen, account, known = [], [], dict(seen)
    for records in read_sets(arguments.scaling_data, arguments.skip_bad_records).values():
        for record in records:
            if known.setdefault(question_key(record), "in --scaling_data") == "in --scaling_data":
                chosen.append({**record, "set": ""})
    share = 0.0 if chosen or arguments.scaling == "none" else arguments.scaling_share
    for name, records in read_sets(arguments.data, arguments.skip_bad_records).items():
        left_out, used = Counter(), 0
        for record in records[: arguments.limit]:
            reason = known.get(question_key(record))
            known.setdefault(question_key(record), "asked before")
            if reason is None and is_for_scaling(record, share):
                chosen.append({**record, "set": ""})
                reason = "kept for scaling"
            if reason:
                left_out[reason] += 1
            else:
                chosen.append({**record, "set": name})
                used += 1
        if not used:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            raise InputError(
                f"--data {name}: none of its {len(records)} records is held out ({reasons}): give "
                "questions that the training has not seen"
            )
        account.append({"set": name, "path": records[0]["file"], "records": len(records),
                        "used": used, "left_out": dict(left_out)})  # fmt: skip
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
    arguments: argparse.Namespace, records: list[Record], generate: bool, training: list[Record]
) -> Scores:
    """Has the records answered, or takes their recorded answers, and asks every system that needs
    no fitting on them."""
    size, most = arguments.batch_size, arguments.max_new_tokens if generate else None
    options = loading(arguments)
    if arguments.adapter:
        adapted = ConfidenceModel.from_pretrained(
            arguments.adapter, scale=False, max_seq_length=arguments.max_seq_length, **options
        )
        model, tokenizer = adapted.model, adapted.tokenizer
    else:
        name, dtype = options.pop("model_name"), options.pop("dtype") or torch.float32
        tokenizer = load_tokenizer(name, arguments.trust_remote_code)
        model = load_base_model(name, dtype, **options).eval()
    room = arguments.max_seq_length - 2 - (MIN_ANSWER_TOKENS if generate else 0)
    records = fit_records(tokenizer, records, room, "--data")
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
    if len({record["confident"] for record in training}) == 2:
        systems["bag_of_words"] = bag_of_words(training)(answered)
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
        sets[name] = {"num_samples": len(part.records), "answer_accuracy": answer_accuracy,
                      "systems": systems}  # fmt: skip
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
    arguments: argparse.Namespace, test: Scores, fitting: Scores, raw: str, training: list[Record]
) -> dict[str, dict]:
    """How each system that is fitted to domains does on one that it was not fitted to."""
    domains, found = domains_of(test.records), {}
    if len(set(domains)) == 1 and not arguments.without:
        return found
    fitting_domains, training_domains = domains_of(fitting.records), domains_of(training)
    adapters = dict(item.split("=", 1) for item in arguments.without)
    for domain in sorted(set(domains.tolist())):
        part = test.part(domains == domain)

        def note(what: str, description: str, confidence: np.ndarray) -> None:
            figures = measure(arguments, confidence, part)  # noqa: B023  # called in this turn
            found[f"{domain}: {what}"] = {"description": description, "metrics": figures}  # noqa: B023

        note("fitted to it", "as above, for comparison", part.systems[raw])
        others = fitting.part(fitting_domains != domain)
        if len(set(others.correct)) == 2:
            scaling = statistics.fit_scaling(others.systems[raw], others.correct, arguments.scaling)
            note("scaling", "scaling fitted on the other domains",
                 scaling.apply(part.systems[raw]))  # fmt: skip
        known = [record for record, own in zip(training, training_domains) if own != domain]
        if len({record["confident"] for record in known}) == 2:
            note("bag_of_words", "fitted on the other domains", bag_of_words(known)(part.records))
        if domain in adapters:
            tags, confidence = score_without(arguments, domain, adapters[domain], part.records)
            note("adapter", f"{adapters[domain]}, trained without it; its {tags} tags are read",
                 confidence)  # fmt: skip
    return found


def score_without(
    arguments: argparse.Namespace, domain: str, adapter: str, records: list[Record]
) -> tuple[str, np.ndarray]:
    """(the domain whose tags are read, P(C) (n,)) of answers of a domain that an adapter was
    trained without.

    Raises:
        InputError: if it was trained with it.
    """
    _, training, _ = seen_questions(Path(adapter).parent, arguments.skip_bad_records)
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
    seen, training, saved = {}, [], {}
    if arguments.adapter:
        run = Path(arguments.adapter).parent
        seen, training, saved = seen_questions(run, arguments.skip_bad_records)
        if not saved and not arguments.assume_held_out:
            raise InputError(
                f"{run} has no settings.yaml that tells what the adapter was trained on: put its "
                "run's there, or give --assume_held_out if you know that --data was not part of it"
            )
    if arguments.train_data:
        training = read_records(arguments.train_data, arguments.skip_bad_records)
    training = [record for record in training if "confident" in record]
    records, account = choose_records(arguments, seen)
    generate = choose_answers(arguments.answers, records)
    folder = report_folder(arguments)
    say(f"{len(records)} questions, {'to be answered' if generate else 'with recorded answers'}")

    scores = score_records(arguments, records, generate, training)
    for_test = np.array([record["set"] != "" for record in scores.records])
    fitting = scores.part(~for_test)
    raw = "adapter" if arguments.adapter else "token_probability"
    maps = fit_scalings(fitting, raw, arguments.scaling) if len(fitting.records) else {}
    add_fitted(scores, fitting, raw, maps)
    test = scores.part(for_test)
    main = "scaled" if maps else raw
    sets, differences = figures_of(arguments, test, main)
    report = {
        "title": arguments.adapter or arguments.model_name,
        "model_name": arguments.model_name or saved.get("model_name"),
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
        "leave_one_domain_out": leave_one_domain_out(arguments, test, fitting, raw, training),
        "scaling": scaling_of(maps, arguments.scaling, fitting, test, raw) if maps else None,
    }
    write_report(folder, report, test)
    if arguments.adapter and Path(arguments.adapter).is_dir():
        if maps:
            write_text(Path(arguments.adapter, SCALING_FILE), as_json(report["scaling"]))
        write_card(Path(arguments.adapter), report)
    seconds = time.perf_counter() - start
    say(f"{format_report(report)}\n\n{len(records)} answers in {seconds:.0f} s; page: "
        f"{folder / 'report.html'}")  # fmt: skip
    return 0


def check_evaluate(arguments: argparse.Namespace) -> None:
    """InputError if the arguments cannot be meant, before a model is loaded."""
    check_sets(arguments.data, "--data")
    check_sets(arguments.scaling_data, "--scaling_data")
    if not (arguments.adapter or arguments.model_name):
        raise InputError("evaluate: give --adapter FOLDER, or --model_name for a model without one")
    if not 0 <= arguments.scaling_share < 1:
        raise InputError(f"--scaling_share {arguments.scaling_share}: give 0 to below 1")
    for item in arguments.without:
        domain, _, adapter = item.partition("=")
        if domain not in CONFIDENCE_TOKENS or not adapter:
            raise InputError(f"--without {item}: write DOMAIN=ADAPTER, as READ=checkpoints/…/final")


def report_folder(arguments: argparse.Namespace) -> Path:
    """Where the report goes. InputError if it cannot go there."""
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
    elif arguments.adapter and Path(arguments.adapter).is_dir():
        folder = Path(arguments.adapter).parent / "report"
    else:
        raise InputError("--output_dir is missing: say where the report shall go")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: {error.strerror}") from error
    return folder


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
    names = "set dataset question context options answer response extracted correct emitted".split()
    lines = []
    for i, record in enumerate(test.records):
        line = {name: record[name] for name in names if record.get(name) is not None}
        line["domain"] = DATASETS[record["dataset"]].domain
        line["source"] = source(record)
        line["key"] = question_key(record)
        line["confidence"] = {name: float(part[i]) for name, part in test.systems.items()}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(folder / "scores.jsonl", "".join(lines))
    write_text(folder / "report.json", as_json(report))
    write_page(folder)


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
    write_page(report.folder)
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
        f"threshold {result['threshold']:.6f} of {result['system']}: answers "
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
    answers = read_records(arguments.bigger, parse=parse_bigger)
    bigger = {question_key(record): record["correct"] for record in answers}
    paired = np.array([key in bigger for key in report.keys])
    if not paired.any():
        raise InputError(f"--bigger {arguments.bigger} has none of {report.folder}'s questions")
    if not paired.all():
        say(
            f"warning: {(~paired).sum()} of {len(paired)} questions are not in {arguments.bigger} "
            'and are left out; where that model gave no answer, write "correct": false'
        )
    confidence, correct = report.confidence[paired], report.correct[paired]
    bigger_correct = np.array([bigger[key] for key in report.keys if key in bigger])
    curves = statistics.routing_curves(
        confidence, correct, bigger_correct, arguments.cost, arguments.bigger_cost
    )
    figures = statistics.bootstrap_intervals(confidence, correct)
    names = "aurc accuracy_at_50 accuracy_at_80 accuracy_at_90".split()
    result = {
        "system": report.system,
        "bigger": arguments.bigger,
        "num_pairs": len(correct),
        "local_accuracy": float(correct.mean()),
        "bigger_accuracy": float(bigger_correct.mean()),
        "cost": arguments.cost,
        "bigger_cost": arguments.bigger_cost,
        "curves": {name: curve.tolist() for name, curve in curves.items()},
        "at_threshold": None,
        **{name: as_dict(figures[name]) for name in names},
    }
    if (chosen := chosen_threshold(report)) is not None:
        routed = confidence < chosen
        result["at_threshold"] = {
            "share_routed": float(routed.mean()),
            "accuracy": float(np.where(routed, bigger_correct, correct).mean()),
            "cost": float(arguments.cost + arguments.bigger_cost * routed.mean()),
        }
    write_text(report.folder / "route.json", as_json(result))
    write_page(report.folder)
    say(format_route(result))
    return 0


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
            f"at the threshold: {chosen['share_routed']:.1%} routed, cost {chosen['cost']:.2f}, "
            f"{chosen['accuracy']:.1%} right"
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
    if arguments.merged:
        written = export_merged(arguments.adapter, arguments.merged, **options)
    else:
        written = export_rows_in_base(arguments.adapter, arguments.rows_in_base, **options)
    exported = ConfidenceModel.from_pretrained(
        written, scale=False, **{**options, "model_name": None}
    )
    after = np.array([answer.confidence for answer in exported.judge(records)])
    served = plain_confidence(exported.model, exported.tokenizer, records)
    worst, as_served = (float(np.abs(found - before).max()) for found in (after, served))
    say(
        f"{written}: max |ΔP(C)| {worst:.5f} on {len(records)} answers; {as_served:.5f} read from "
        f"{arguments.dtype} logits, as a server does"
    )
    if not max(worst, as_served) <= MOST_DIFFERENT:
        raise RunError(
            f"{written} gives other confidences than {arguments.adapter}, by up to "
            f"{max(worst, as_served):.3f}: do not serve it; try --dtype float16"
        )
    return 0


def questions_to_check(arguments: argparse.Namespace) -> list[Record]:
    """Some questions of --questions, or of the data that the adapter was trained on."""
    path = arguments.questions or read_settings(Path(arguments.adapter).parent).get("train_data")
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
