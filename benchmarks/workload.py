"""What the benchmarks measure on: records as long as real ones, and a model in a 7B's proportions.

Nothing is downloaded: words are drawn from a seeded vocabulary, the tokenizer is trained on them,
and the model has random weights.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, set_seed

# Characters of 2,028 answers of Qwen2.5-7B-Instruct to BoolQ, and of its questions: the values
# below which these shares of them lie. Half of the answers are short, half run to the limit.
SHARES = (0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
ANSWER_CHARACTERS = (67, 323, 430, 663, 1985, 2474, 2637, 2713, 2838, 3153)
QUESTION_CHARACTERS = (20, 33, 35, 38, 43, 48, 55, 62, 79, 100)
CHARACTERS_A_TOKEN = 4.9  # of the words and the tokenizer below, about what Qwen's has on English

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MODELS = {
    "tiny": {  # for the tests of these scripts
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 3300,
    },
    # The head is 8 % of the weights that compute, as in Qwen2.5-7B; small enough for two cores
    "small": {
        "hidden_size": 256, "intermediate_size": 1353, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 3300,
    },
    # The vocabulary of Qwen2.5-7B over a narrow body: what logits everywhere cost in memory
    "wide_vocabulary": {
        "hidden_size": 128, "intermediate_size": 676, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 152064,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "rope_theta": 1e6,
    },
}  # fmt: skip


def vocabulary(draw: random.Random) -> list[str]:
    """1,500 words of 2 to 9 letters."""
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in "aeiou"]
    words = {"".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3)))) for _ in range(9000)}
    return sorted(words)[:1500]


def make_records(count: int, seed: int = 0) -> list[dict]:
    """Tagged records whose lengths are distributed as those of real answers."""
    draw = random.Random(seed)
    words = vocabulary(random.Random(0))
    draws = np.random.default_rng(seed)

    def text(characters: float) -> str:
        parts, length = [], 0
        while length < characters:
            parts.append(draw.choice(words))
            length += len(parts[-1]) + 1
        return " ".join(parts)

    lengths = [
        np.interp(draws.random(count), SHARES, quantiles)
        for quantiles in (QUESTION_CHARACTERS, ANSWER_CHARACTERS)
    ]
    return [
        {
            "question": text(question),
            "tagged_response": f"{text(answer)} <{draw.choice('CU')}_READ>",
            "dataset": "boolq",
            "answer": draw.random() < 0.6,
        }
        for question, answer in zip(*lengths, strict=True)
    ]


def write_records(path: Path, count: int, seed: int = 0) -> str:
    lines = [json.dumps(record) + "\n" for record in make_records(count, seed)]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of CHARACTERS_A_TOKEN."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        f"{record['question']} {record['tagged_response'].rpartition(' ')[0]} Answer yes or no."
        for record in make_records(300)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 3200),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(folder: Path, name: str) -> str:
    """A model of random weights with its tokenizer, in `folder`: bfloat16 on a GPU."""
    on_gpu = torch.cuda.is_available()
    tokenizer = make_tokenizer(MODELS[name]["vocab_size"])
    config = Qwen2Config(
        **MODELS[name],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if on_gpu else torch.float32
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
