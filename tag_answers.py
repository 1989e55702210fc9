#!/usr/bin/env python3
"""Make training data: a model answers questions, each answer is judged and tagged.

    python tag_answers.py --model_name Qwen/Qwen2.5-7B-Instruct --questions questions.jsonl \\
        --output tagged/qwen/qwen_all_tagged.jsonl
    accelerate launch --config_file train_config_4gpu.yaml tag_answers.py …   # on four GPUs

Questions are JSON Lines: {"question": …, "dataset": "boolq", "answer": true}, with "context" (a
passage) and "options" ({"A": …}) where there are any. Out come

    tagged/qwen/qwen_all_tagged.jsonl         for --train_data
    tagged/qwen/qwen_val_boolq.jsonl, …       for --val_data boolq=…, a tenth of each dataset
    tagged/qwen/qwen_answers/answers-0.jsonl  every answer as it came; a restart goes on from there

An answer that was cut off by --max_new_tokens, or in which no answer can be found, says nothing
about the model's knowledge: it is counted and left out, never tagged as unsure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train_confidence_lora import Record


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tag_answers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model_name", required=True, help="model on the Hub, or a folder")
    parser.add_argument("--questions", required=True, help="JSON Lines with the true answers")
    parser.add_argument("--output", required=True, help="training file, …_all_tagged.jsonl")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="share set apart")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--max_seq_length", type=int, default=2048, help="longest prompt, tokens")
    parser.add_argument("--batch_size", type=int, default=32, help="answers at a time, a process")
    parser.add_argument("--limit", type=int, help="answer only the first so many questions")
    parser.add_argument("--skip_bad_records", action="store_true", help="leave bad lines out")
    parser.add_argument("--seed", type=int, default=42, help="of the split")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    return parser


def is_validation(key: str, share: float, seed: int) -> bool:
    """Decides by a hash of the question's key: the same question falls on the same side whichever
    model answers it and whatever else is in the file."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


ANSWER = {"key": str, "response": str, "finished": bool}  # a line of answers-N.jsonl


def parse_answer(line: str) -> dict:
    """One line of an answers file. ValueError, with the reason in words, if it is none."""
    from train_confidence_lora import parse_object

    answer = parse_object(line)
    for name, kind in ANSWER.items():
        if not isinstance(answer.get(name), kind):
            raise ValueError(f'"{name}" must be a {kind.__name__}')
    return answer


def read_answers(folder: Path) -> dict[str, dict]:
    """Answers of earlier, interrupted runs by question key. What is no answer, as a line that a
    kill cut short, is dropped: its question is asked again."""
    from train_confidence_lora import parse_lines

    answers = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        found, _, _ = parse_lines(path, parse_answer)
        answers |= {answer["key"]: {name: answer[name] for name in ANSWER} for answer in found}
    return answers


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(new, path)


def answer_questions(arguments: argparse.Namespace, records: list[Record], folder: Path) -> None:
    """Answers this process's share of the questions that have no answer yet, a line each."""
    import torch
    from accelerate import PartialState

    import train_confidence_lora as confidence

    done = read_answers(folder)
    # under its own key, since what follows may shorten the passage
    waiting = [{**record, "key": confidence.question_key(record)} for record in records]
    waiting = [record for record in waiting if record["key"] not in done]
    # hours, since one process may have longer answers to write than the others
    cpu = not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(hours=6))
    state.wait_for_everyone()  # all have read the same answers before one adds to them
    if done:
        confidence.say(f"{len(records) - len(waiting)} questions were answered before, going on")
    if not waiting:
        return
    bf16 = confidence.gpu_has_bf16() if arguments.bf16 is None else arguments.bf16
    tokenizer = confidence.load_tokenizer(arguments.model_name)
    model = confidence.load_base_model(
        arguments.model_name, torch.bfloat16 if bf16 else torch.float32
    ).eval()
    fitting = confidence.fit_records(
        tokenizer, waiting, arguments.max_seq_length, f"--questions {arguments.questions}"
    )
    prompts = [confidence.build_prompt(tokenizer, record) for record in fitting]
    batches = confidence.plan_batches([len(prompt) for prompt in prompts], arguments.batch_size)
    batches = batches[state.process_index :: state.num_processes]
    start = time.perf_counter()
    with open(folder / f"answers-{state.process_index}.jsonl", "a", encoding="utf-8") as file:
        if file.tell():
            file.write("\n")  # a kill may have left half a line
        for number, batch in enumerate(batches, 1):
            with torch.inference_mode():
                generated = confidence.generate_answers(
                    model, tokenizer, [prompts[i] for i in batch], arguments.max_new_tokens
                )
            for i, ids, finished in zip(batch, generated.answers, generated.finished):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                response = text.replace("\0", "").strip()  # NUL, which no reader takes
                row = {"key": fitting[i]["key"], "response": response, "finished": finished}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            left = (time.perf_counter() - start) / number * (len(batches) - number)
            if number % 10 == 0 or number == len(batches):
                confidence.say(f"batch {number}/{len(batches)}  {left:.0f} s left")


def tag(records: list[Record], answers: dict[str, dict]) -> tuple[list[dict], Counter]:
    """Judges and tags the answers.

    Returns:
        The tagged records in the order of the questions, and counts of what became of the answers.
    """
    import train_confidence_lora as confidence

    tagged, counts = [], Counter()
    for record in records:
        answer = answers.get(confidence.question_key(record))
        if answer is None:
            counts["no answer (too long)"] += 1
            continue
        if not answer["finished"]:
            counts["cut off"] += 1
            continue
        judged = confidence.judge_answer(
            record["dataset"], answer["response"], record["answer"], record.get("options")
        )
        if judged.correct is None:
            counts["unparsed"] += 1
            continue
        counts["right" if judged.correct else "wrong"] += 1
        pair = confidence.CONFIDENCE_TOKENS[confidence.DATASETS[record["dataset"]].domain]
        kept = {key: value for key, value in record.items() if key not in ("file", "line")}
        kept["tagged_response"] = f"{answer['response']} {pair[not judged.correct]}"
        tagged.append(kept)
    return tagged, counts


def run(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    import train_confidence_lora as confidence

    output = Path(arguments.output)
    stem = output.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix("_all_tagged")
    if not 0 <= arguments.val_fraction < 1:
        raise confidence.InputError(f"--val_fraction {arguments.val_fraction}: give 0 to below 1")
    records = confidence.read_records(arguments.questions, arguments.skip_bad_records)
    records = records[: arguments.limit]
    for record in records:
        if record.get("answer") is None:
            where = f"{record['file']}:{record['line']}"
            raise confidence.InputError(f'{where}: "answer" is missing: nothing to judge by')
    unique = {confidence.question_key(record): record for record in records}
    if len(unique) < len(records):
        confidence.say(f"warning: {len(records) - len(unique)} questions appear twice; one is kept")
        records = list(unique.values())
    folder = output.with_name(f"{stem}_answers")
    check_same_run(folder, arguments)
    answer_questions(arguments, records, folder)

    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        write_tagged(arguments, records, output, stem, folder)


def write_tagged(
    arguments: argparse.Namespace, records: list[Record], output: Path, stem: str, folder: Path
) -> None:
    """Judges all answers, splits them, writes the training file and the validation files."""
    from train_confidence_lora import question_key

    tagged, counts = tag(records, read_answers(folder))
    train, validation = [], {}
    for record in tagged:
        if is_validation(question_key(record), arguments.val_fraction, arguments.seed):
            validation.setdefault(record["dataset"], []).append(record)
        else:
            train.append(record)
    write_lines(output, train)
    print(f"{len(records)} questions: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    print(f"{output}: {len(train)} records")
    for dataset, rows in sorted(validation.items()):
        path = output.with_name(f"{stem}_val_{dataset}.jsonl")
        write_lines(path, rows)
        print(f"{path}: {len(rows)} records")


def check_same_run(folder: Path, arguments: argparse.Namespace) -> None:
    """Refuses to mix answers of two models, or of two answer lengths, in one file.

    Raises:
        InputError: naming what differs.
    """
    from train_confidence_lora import InputError, parse_object, read_records

    settings = {key: getattr(arguments, key) for key in ("model_name", "max_new_tokens")}
    path = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            earlier, *_ = read_records(path, parse=parse_object)
            for key, value in settings.items():
                if (made := earlier.get(key)) != value:
                    raise InputError(
                        f"{folder} holds answers made with --{key} {made}, not {value}; "
                        "give another --output or delete that folder"
                    )
        else:
            new = path.with_name(f"settings.{os.getpid()}")  # every process writes the same
            new.write_text(json.dumps(settings), encoding="utf-8")
            os.replace(new, path)
    except OSError as error:
        raise InputError(f"--output {arguments.output}: {error.strerror}: {folder}") from error


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    from train_confidence_lora import InputError

    try:
        run(arguments)
    except InputError as error:
        print(f"tag_answers.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
    from train_confidence_lora import leave

    leave()
