"""How fast this project validates, beside the way it is usually written, on the same machine.

    make benchmark                                                      # two CPU cores
    python benchmarks/validation_speed.py --model qwen2.5-7b --records 400   # on a GPU

  sequential  one prompt at a time: generate the answer, then a second forward pass over prompt and
              answer for the probability of the tag
  generate    this project: ValidationCallback with --validation_answers generate
  recorded    this project: the same answers, now as those in the data, are scored

The model's weights are random, so that it would never end an answer; each answer is ended at a
length drawn for its prompt from those of real answers, the same for all three.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import workload  # noqa: E402

import train_confidence_lora as confidence  # noqa: E402


def end_answers_at_planned_lengths(model, tokenizer) -> None:
    """Overrules the end-of-turn logit while generating; the rest of the model is as it was."""
    base = model.get_base_model()
    end, start = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")
    opening = len(confidence.tokenize(tokenizer, "<|im_start|>assistant\n"))
    prepare, seen = base.prepare_inputs_for_generation, []

    def planned(prompt: list[int]) -> int:
        share = np.random.default_rng(sum(prompt)).random()
        characters = np.interp(share, workload.SHARES, workload.ANSWER_CHARACTERS)
        return int(characters / workload.CHARACTERS_A_TOKEN)

    def remember(input_ids, *args, **kwargs):
        seen.append(input_ids)
        return prepare(input_ids, *args, **kwargs)

    def overrule(module, inputs, logits):
        if not seen:  # a pass that generates nothing
            return logits
        for i, row in enumerate(seen.pop().tolist()):
            body = len(row) - row[::-1].index(start) - 1 + opening
            prompt = [token for token in row[:body] if token != tokenizer.pad_token_id]
            logits[i, -1, end] = 1e4 if len(row) - body >= planned(prompt) else -1e4
        return logits

    base.prepare_inputs_for_generation = remember
    base.get_output_embeddings().register_forward_hook(overrule)


@torch.inference_mode()
def validate_sequentially(model, tokenizer, records, max_new_tokens: int) -> list:
    """The usual loop: generate, decode, judge, and a second pass for the probability."""
    ids = confidence.confidence_ids(tokenizer)
    c, u = ids.tags["READ"]
    scores = []
    for index, record in enumerate(records):
        prompt = confidence.build_prompt(tokenizer, record)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        answer = output[0, inputs["input_ids"].shape[1] :].tolist()
        stops = {tokenizer.eos_token_id, *ids.all}
        length = next((i for i, token in enumerate(answer) if token in stops), len(answer))
        whole = inputs["input_ids"][0].tolist() + answer[:length] + [ids.marker]
        logits = model(torch.tensor([whole], device=model.device)).logits[0, -1].float()
        response = tokenizer.decode(answer[:length], skip_special_tokens=True)
        judged = confidence.judge_answer("boolq", response, record["answer"])
        probability = torch.sigmoid(logits[c] - logits[u]).item()
        scores.append(
            confidence.Score(
                index, probability, None, bool(judged.correct), judged.extracted, response
            )
        )
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="small", help="a key of workload.MODELS")
    add("--adapter", default="lora", choices=["lora", "activated"])
    add("--records", type=int, default=200, help="answers that this project validates")
    add("--sequential_records", type=int, default=16, help="of them, answers one at a time")
    add("--max_new_tokens", type=int, default=256)
    add("--json", help="append the result to this file")
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    confidence.keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tokenizer = confidence.initialize_model_with_tokens(
            workload.make_model(folder / "model", options.model),
            options.adapter,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
        )
        records = confidence.read_records(
            workload.write_records(folder / "records.jsonl", options.records)
        )
        model.eval()
        end_answers_at_planned_lengths(model, tokenizer)
        settings = confidence.Settings(
            val_samples=options.records, max_new_tokens=options.max_new_tokens
        )

        def validate(members: list, generate: bool):
            callback = confidence.ValidationCallback(
                {"boolq": members}, tokenizer, settings, folder, generate, batch_size=256
            )
            start = time.perf_counter()
            figures, scores = callback._validate_dataset(model, "boolq")
            return time.perf_counter() - start, figures, scores

        few = records[: options.sequential_records]
        for generate in (True, False):
            validate(few[:2], generate)  # the first passes are slower
        start = time.perf_counter()
        sequential = validate_sequentially(model, tokenizer, few, options.max_new_tokens)
        seconds = {"sequential": (time.perf_counter() - start) / len(few)}
        batched_few = validate(few, True)[2]
        seconds["generate"], figures, scores = validate(records, True)
        answered = [{**r, "response": s.response} for r, s in zip(records, scores, strict=True)]
        seconds["recorded"], _, _ = validate(answered, False)

    for kind in ("generate", "recorded"):
        seconds[kind] /= len(records)
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(
        f"{options.model} ({options.adapter}) on {device}, --max_new_tokens", options.max_new_tokens
    )
    print(f"{'':12}{'answers':>9}{'ms an answer':>14}{'x sequential':>14}")
    for kind, value in seconds.items():
        count = len(few) if kind == "sequential" else len(records)
        print(f"{kind:12}{count:9}{1000 * value:14.1f}{seconds['sequential'] / value:14.1f}")
    pairs = list(zip(sequential, batched_few, strict=True))
    same = [(a, b) for a, b in pairs if a.response == b.response]
    differ = max(abs(a.confidence - b.confidence) for a, b in same)
    print(f"one at a time and in batches: {len(same)} of {len(few)} answers are the same, in which")
    print(f"P(C) differs by at most {differ:.1e}")
    if options.json:
        line = {"device": device, "model": options.model, "adapter": options.adapter}
        line |= {"seconds_an_answer": seconds, "figures": figures}
        with Path(options.json).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
