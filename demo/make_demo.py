#!/usr/bin/env python3
"""Makes the demo: a tiny chat model trained from scratch, and questions it is partly wrong about.

    python demo/make_demo.py            # writes demo/model/, demo/questions.jsonl and
                                        # demo/test_questions.jsonl
    python demo/make_demo.py --bigger   # writes demo/bigger/, a model that was taught everything

The model (about a million parameters, byte-level tokenizer) lives in two small worlds and fails in
them the way language models fail, so that its mistakes can be foreseen from the question:

- demo_reading, yes or no: what does the basket hold? It reads lists well, has counted short lists
  only, and was never taught the word "without": it answers as if the word were not there.
- demo_medicine, four options: which illness has these symptoms? It knows the common illnesses, has
  met the rare ones only as wrong options, and one symptom alone often fits several.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from train_confidence_lora import Record, build_prompt  # noqa: E402

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTAINERS = "basket drawer shelf box bag crate trunk cart".split()
THINGS = (
    "apples plums figs pears lemons nuts beans onions carrots eggs cups plates spoons knives "
    "candles matches ropes nails books maps letters coins rings hats gloves shoes scarves "
    "buttons pencils brushes stones shells"
).split()
NUMBERS = "zero one two three four five six seven eight".split()
SYMPTOMS = (
    "fever cough rash headache nausea fatigue chills dizziness itching swelling thirst cramps "
    "sneezing wheezing numbness tremor jaundice insomnia sweating blisters hoarseness earache "
    "bruising palpitations"
).split()
ILLNESSES = (
    "influenza measles migraine asthma anemia gout malaria hepatitis diabetes bronchitis mumps "
    "shingles tetanus cholera scurvy beriberi pellagra kuru"
).split()
COMMON, RARE = ILLNESSES[:12], ILLNESSES[12:]  # nobody in the corpus has a rare one


def symptoms_of() -> dict[str, list[str]]:
    """Four symptoms for every illness, the same in every run."""
    draw = random.Random(7)
    return {illness: draw.sample(SYMPTOMS, 4) for illness in ILLNESSES}


SYMPTOMS_OF = symptoms_of()


def reading_question(draw: random.Random, negated: float, most_counted: int = 7) -> Record:
    """A list to read and a yes/no question about it.

    A share `negated` of the questions asks with "without"; three in ten count the things, in lists
    of at most `most_counted`.
    """
    container = draw.choice(CONTAINERS)
    kind = draw.random()
    held = draw.sample(THINGS, draw.randint(2, most_counted if kind < 0.3 else 7))
    context = f"The {container} holds {', '.join(held[:-1])} and {held[-1]}."
    if kind < 0.3:
        number = min(8, max(1, len(held) + draw.choice([-3, -2, -1, 0, 1, 2])))
        question = f"does the {container} hold more than {NUMBERS[number]} things"
        answer = len(held) > number
    else:
        asked = draw.choice(held)
        if draw.random() < 0.5:
            asked = draw.choice([thing for thing in THINGS if thing not in held])
        if kind < 0.3 + negated:
            question, answer = f"is the {container} without {asked}", asked not in held
        else:
            question, answer = f"does the {container} hold {asked}", asked in held
    return {"question": question, "context": context, "dataset": "demo_reading", "answer": answer}


def medicine_question(draw: random.Random, rare: float) -> Record:
    """Symptoms and four illnesses; a share `rare` of the patients has one of the rare ones."""
    illness = draw.choice(RARE if draw.random() < rare else COMMON)
    shown = draw.sample(SYMPTOMS_OF[illness], draw.choice([1, 2, 2, 3, 3]))
    others = draw.sample([other for other in ILLNESSES if other != illness], 3)
    options = draw.sample([illness, *others], 4)
    return {
        "question": f"a patient has {' and '.join(shown)}. which illness is it",
        "options": dict(zip("ABCD", options)),
        "dataset": "demo_medicine",
        "answer": "ABCD"[options.index(illness)],
    }


def answer_text(record: Record) -> str:
    if record["dataset"] == "demo_reading":
        return "Yes." if record["answer"] else "No."
    return f"The answer is {record['answer']}."


def corpus_record(draw: random.Random, everything: bool = False) -> Record:
    """What the model is trained on: no "without", no counting beyond four, no rare illness, unless
    it is to be taught `everything` that is asked."""
    if draw.random() < 0.5:
        if everything:
            return reading_question(draw, negated=0.2)
        return reading_question(draw, negated=0.0, most_counted=4)
    return medicine_question(draw, rare=0.3 if everything else 0.0)


def questions(count: int, seed: int) -> list[Record]:
    """`count` distinct questions of each world, as hard as the demo wants them."""
    draw, found = random.Random(seed), {}
    for make, share in ((reading_question, 0.2), (medicine_question, 0.3)):
        start = len(found)
        while len(found) < start + count:
            record = make(draw, share)
            found[json.dumps(record, sort_keys=True)] = record
    return list(found.values())


def train_tokenizer(draw: random.Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: whole words of the two worlds, and bytes for any other text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template="{{ messages[0]['content'] }}"
    )
    records = [corpus_record(draw) for _ in range(4000)]
    texts = [build_prompt(plain, record) + "\n" + answer_text(record) for record in records]
    tokenizer.train_from_iterator([*texts, "user\nassistant\n", "without"] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def make_batch(
    tokenizer, draw: random.Random, size: int, everything: bool
) -> dict[str, torch.Tensor]:
    """Chats padded on the right, labels on the answers alone."""
    rows = []
    for _ in range(size):
        record = corpus_record(draw, everything)
        prompt = tokenizer.encode(build_prompt(tokenizer, record), add_special_tokens=False)
        answer = tokenizer.encode(answer_text(record), add_special_tokens=False)
        rows.append((prompt, [*answer, tokenizer.eos_token_id]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((size, width), tokenizer.pad_token_id)
    labels = torch.full((size, width), -100)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": (ids != tokenizer.pad_token_id).long(),
    }


def train_model(
    tokenizer, steps: int, batch_size: int, learning_rate: float, everything: bool
) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.06,  # wide for its size: with 0.02 it does not learn to look back
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05)
    draw = random.Random(1)
    model.train()
    for step in range(1, steps + 1):
        loss = model(**make_batch(tokenizer, draw, batch_size, everything)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3500, help="training steps of the model")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--questions", type=int, default=3000, help="questions of each world")
    parser.add_argument("--test_questions", type=int, default=1000, help="likewise, to report on")
    parser.add_argument("--bigger", action="store_true", help="the model that knows everything")
    parser.add_argument("--output_dir", type=Path, default=HERE)
    arguments = parser.parse_args()

    set_seed(1)
    tokenizer = train_tokenizer(random.Random(0))
    steps, batch_size, rate = arguments.steps, arguments.batch_size, arguments.learning_rate
    model = train_model(tokenizer, steps, batch_size, rate, arguments.bigger)
    folder = arguments.output_dir / ("bigger" if arguments.bigger else "model")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if arguments.bigger:
        return
    known = set()
    for name, count, seed in (
        ("questions.jsonl", arguments.questions, 2),
        ("test_questions.jsonl", arguments.test_questions, 3),
    ):
        lines = [json.dumps(record) + "\n" for record in questions(count, seed)]
        new = [line for line in lines if line not in known]
        known.update(new)
        (arguments.output_dir / name).write_text("".join(new), encoding="utf-8")
        worlds = Counter(json.loads(line)["dataset"] for line in new)
        print(f"wrote {len(new)} questions to {name}: {dict(worlds)}")


if __name__ == "__main__":
    main()
