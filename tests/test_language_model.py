"""The second recipe: chats, texts, both; every tuning; evaluation (rows P3, P5, G1, G2)."""

import json
import math
import random
import shutil

import pytest
import torch
from conftest import DEMO_MODEL, make_model, write_jsonl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import train_language_model as language
from train_confidence_lora import InputError, load_tokenizer, main, pad
from train_language_model import (
    CHATS,
    MAX_DOCUMENT_BYTES,
    TEXTS,
    BlockCollator,
    LanguageSettings,
    chat_segments,
    encode_chats,
    encode_texts,
    language_loss,
    mix,
    parse_chat,
    read_either,
    read_texts,
    rouge_l,
    run,
    train_tokenizer,
)

NAMES = "ann bob cat dan eve fay gus hal ida joe".split()
COLOURS = "red blue green black white pink gray gold teal brown".split()


def make_chats(count=10):
    """Chats of three turns, each about a person and a colour."""
    return [
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": f"Which colour does {name} like?"},
                {"role": "assistant", "content": f"{name.title()} likes {colour}."},
                {"role": "user", "content": "Say it again, please"},
                {"role": "assistant", "content": f"I said {colour} twice."},
                {"role": "user", "content": "Thanks!"},
                {"role": "assistant", "content": f"You are welcome, {name}: {colour} it is."},
            ]
        }
        for name, colour in zip(NAMES * (count // 10 + 1), COLOURS * (count // 10 + 1))
    ][:count]


def make_texts(count=60, seed=0):
    draw = random.Random(seed)
    return [
        {"text": f"Number {i} follows {i - 1}. " * draw.randint(1, 6) + "The end."}
        for i in range(count)
    ]


def records(rows, kind):
    parse = {CHATS: parse_chat, TEXTS: language.parse_text}[kind]
    return [{**parse(json.dumps(row)), "line": i} for i, row in enumerate(rows, 1)]


@pytest.fixture
def chat_file(tmp_path):
    return write_jsonl(tmp_path / "chats.jsonl", make_chats())


@pytest.fixture
def text_file(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", make_texts())


@pytest.fixture
def train(tmp_path):
    """Runs the recipe on the command line that is given; returns its summary."""

    def train(line, out="run"):
        common = f"--output_dir {tmp_path / out} --no_bf16 --max_seq_length 128 --num_epochs 1"
        return main([*common.split(), *line.split()], run, LanguageSettings.script)

    return train


SMALL = "--tuning scratch --hidden_size 64 --num_heads 4 --num_layers 2 --vocab_size 600"


# ------------------------------------------------------------------------------------------------
# Chats


def labelled_texts(tokenizer, encoding):
    """The text of each stretch of labels."""
    texts, stretch = [], []
    for label in [*encoding["labels"], -100]:
        if label != -100:
            stretch.append(label)
        elif stretch:
            texts.append(tokenizer.decode(stretch))
            stretch = []
    return texts


QWEN_3 = (  # earlier turns lose their thoughts, the last one has empty ones, as Qwen3's does
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ["{0}", "{1}", "{2}"]),
        (QWEN_3, ["{0}", "{1}", "<think>\n\n</think>\n\n{2}"]),
        (MISTRAL, [" {0}", " {1}", " {2}"]),
        (NO_END, ["{0}", "{1}", "{2}"]),
        (language.PLAIN_TEMPLATE, [" {0}", " {1}", " {2}"]),
    ],
)
def test_P3_labels_are_exactly_the_assistants_texts_with_their_end_of_turn(
    tokenizer, template, expected
):
    if template:
        tokenizer.chat_template = template
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    [record] = records(make_chats(1), CHATS)
    said = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
    [encoding] = encode_chats(tokenizer, [record], 256)
    wanted = [text.format(*said) + "<|im_end|>" for text in expected]
    assert labelled_texts(tokenizer, encoding) == wanted
    whole = tokenizer.decode(encoding["input_ids"])
    assert not whole.startswith("<|im_start|><|im_start|>")  # one beginning of sequence at most


def test_training_and_generation_see_the_same_prompt_tokens(tokenizer):
    [record] = records(make_chats(1), CHATS)
    [encoding] = encode_chats(tokenizer, [record], 256)
    prompt, _ = language.question_of(tokenizer, record)
    ids = language.tokenize(tokenizer, prompt)
    assert encoding["input_ids"][: len(ids)] == ids


def test_an_answer_that_repeats_the_users_words_is_found_at_its_own_place(tokenizer):
    turns = [("user", "yes"), ("assistant", "yes"), ("user", "yes yes"), ("assistant", "yes")]
    messages = [{"role": role, "content": content} for role, content in turns]
    segments = chat_segments(tokenizer, messages)
    assert [text for text, loss in segments if loss] == ["yes<|im_end|>"] * 2
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith("".join(text for text, _ in segments))


@pytest.mark.parametrize("answer", [*"astuer", "start", "user", "assistant", "im_end", "ss"])
@pytest.mark.parametrize("template", [None, QWEN_3, NO_END, language.PLAIN_TEMPLATE])
def test_an_answer_that_stands_in_the_templates_own_words_is_found_behind_them(
    tokenizer, answer, template
):
    if template:
        tokenizer.chat_template = template
    messages = [{"role": "user", "content": "Pick a, b or c"}]
    messages.append({"role": "assistant", "content": answer})
    [(prompt, none), (said, every)] = chat_segments(tokenizer, messages)
    rendered = tokenizer.apply_chat_template(
        messages[:1], tokenize=False, add_generation_prompt=True
    )
    assert (prompt, none, every) == (rendered, 0, language.ALL)
    assert said.endswith(f"{answer}<|im_end|>")


def test_a_chat_that_the_assistant_begins_is_learnt_and_one_that_the_template_refuses_is_named(
    tokenizer,
):
    hello = [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Hi"}]
    rows = [{"messages": [*hello, {"role": "assistant", "content": "Well?"}]}]
    [encoding] = encode_chats(tokenizer, records(rows, CHATS), 256)
    assert labelled_texts(tokenizer, encoding) == ["Hello!<|im_end|>", "Well?<|im_end|>"]
    tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    [encoding] = encode_chats(tokenizer, records(make_chats(1), CHATS), 256)
    assert encoding["skipped"] == "line 1: no system, please"


def test_a_turns_end_that_is_special_without_a_name_is_learnt_and_ends_generation(
    tokenizer, tiny_models
):
    tokenizer.add_tokens(AddedToken("<|eot|>", special=True))
    tokenizer.chat_template = NO_END.replace("\n{% endfor", "<|eot|>\n{% endfor")
    [encoding] = encode_chats(tokenizer, records(make_chats(1), CHATS), 256)
    assert [text[-8:] for text in labelled_texts(tokenizer, encoding)] == [".<|eot|>"] * 3
    model = AutoModelForCausalLM.from_pretrained(tiny_models["untied"])
    language.stop_at_turn_end(model, tokenizer)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|eot|>")]
    assert model.generation_config.eos_token_id == sorted(ends)


def test_a_chat_too_long_loses_its_end_and_one_whose_answer_does_not_begin_is_skipped(tokenizer):
    rows = make_chats(2)
    rows[1]["messages"][1]["content"] = "word " * 200
    encodings = list(encode_chats(tokenizer, records(rows, CHATS), 60))
    assert [row["cut"] for row in encodings] == [True, True]
    assert len(encodings[0]["input_ids"]) == 60
    assert encodings[0]["skipped"] == ""
    assert encodings[1]["skipped"] == "line 2: no answer begins in its first 60 tokens"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"user": "q", "assistant": "a"},
    ],
)
def test_P3_the_forms_of_a_chat_mean_the_same(row):
    wanted = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert parse_chat(json.dumps(row))["messages"] == wanted


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "no chat"}, 'no "messages"'),
        ({"messages": "no list"}, 'no "messages"'),
        ({"messages": [{"role": "user", "content": "q"}]}, "no message of the assistant"),
        ({"messages": [{"role": "king", "content": "q"}]}, "unknown role 'king'"),
        ({"messages": [{"role": "user", "content": " "}]}, "a message of the user has no text"),
        ({"conversations": [{"from": "human"}]}, "a message of the user has no text"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "unknown role None"),
        ({"instruction": "q", "output": "\ud800"}, "half a surrogate pair"),
        ({"user": None, "assistant": 3}, "a message of the assistant has no text"),
        ([], "a record is a JSON object"),
    ],
)
def test_a_line_that_is_no_chat_is_refused_with_its_reason(row, reason, tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [*make_chats(1), row])
    with pytest.raises(InputError, match=reason):
        language.read_records(path, parse=parse_chat)


# ------------------------------------------------------------------------------------------------
# Texts


def test_P3_blocks_hold_every_token_once_and_each_but_a_documents_first_carries_loss(tokenizer):
    rows = records([*make_texts(40), {"text": "a long one " * 60}], TEXTS)
    blocks = list(encode_texts(tokenizer, rows, 64))
    assert {len(block["input_ids"]) for block in blocks[:-1]} <= {63, 64}
    documents, document = [], []
    for block in blocks:
        for token, label, position in zip(
            block["input_ids"], block["labels"], block["position_ids"]
        ):
            assert (label == -100) == (position == 0)
            if position:
                document.append(token)
            elif not document or document[-1] == tokenizer.eos_token_id:
                documents.append([])
                document = documents[-1]
                document.append(token)
            else:  # a document goes on in this block: its last token is context
                assert token == document[-1]
    wanted = [[*language.tokenize(tokenizer, row["text"]), tokenizer.eos_token_id] for row in rows]
    assert documents == wanted


def test_P3_no_document_attends_to_another(tiny_models):
    """The loss of documents in one block is that of each alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models["untied"]).eval()
    tokenizer = load_tokenizer(tiny_models["untied"])
    rows = records(make_texts(12), TEXTS)
    collator = BlockCollator(tokenizer.pad_token_id)
    blocks = list(encode_texts(tokenizer, rows, 10_000))
    assert len(blocks) == 1
    packed, count = language_loss(model, collator(blocks))
    alone = [language_loss(model, collator(list(encode_texts(tokenizer, [r], 512)))) for r in rows]
    assert count == sum(labels for _, labels in alone)
    assert packed.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-5)
    flat = BlockCollator(tokenizer.pad_token_id, flatten=True)(
        [next(encode_texts(tokenizer, [row], 512)) for row in rows]
    )  # what flash attention gets: one row, taken apart by positions
    loss, labels = language_loss(model, flat)
    assert labels == count
    assert loss.item() == pytest.approx(packed.item(), rel=1e-5)


def test_a_model_that_attends_across_documents_is_refused(tokenizer):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=2, word_embed_proj_dim=32, max_position_embeddings=256,
    )  # fmt: skip
    blocks = list(encode_texts(tokenizer, records(make_texts(12), TEXTS), 128))
    batch = BlockCollator(tokenizer.pad_token_id)(blocks)
    with pytest.raises(InputError, match="opt lets the texts of a block see each other"):
        language_loss(OPTForCausalLM(config), batch)


def test_P3_a_folder_of_texts_is_read_and_empty_files_are_no_documents(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("# One", encoding="utf-8")
    (tmp_path / "a.txt").write_text("two", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    write_jsonl(tmp_path / "d.jsonl", make_texts(2))
    texts = [record["text"] for record in read_texts(str(tmp_path))]
    assert texts[:2] == ["two", "# One"]
    assert len(texts) == 4
    with pytest.raises(InputError, match="holds no text"):
        read_texts(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match=r"cannot read .*latin.txt"):
        read_texts(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"one\r\ntwo\xff", ":2: not UTF-8 (byte 0xff)"),
        (b"x" * 2**20 + b"\n\xc3", ":2: not UTF-8 (byte 0xc3)"),  # cut off inside a character
        (b"one\n\ntwo\0", ":3: a NUL character"),
        ("text".encode("utf-16"), ":1: it looks like UTF-16: save it as UTF-8"),
    ],
)
def test_a_document_that_is_no_text_is_refused_with_its_line(content, reason, tmp_path):
    (tmp_path / "a.md").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_texts(str(tmp_path))
    assert f"{tmp_path / 'a.md'}{reason}" in str(error.value)


def test_a_document_keeps_its_text_whatever_its_lines_end_in(tmp_path):
    text = "é" * 2**20  # a character lies across the pieces it is read in
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r" + text.encode())
    [record] = read_texts(str(tmp_path))
    assert record["text"] == "one\ntwo\n" + text
    assert (record["file"], record["line"]) == (str(tmp_path / "a.txt"), 1)


def test_a_document_above_the_limit_and_an_empty_path_are_refused(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)
    with pytest.raises(InputError, match="larger than 256 MiB"):
        read_texts(str(tmp_path))
    with pytest.raises(InputError, match="holds no text"):
        read_texts("")


def test_either_kind_is_told_by_its_first_good_line(tmp_path):
    chat, text = json.dumps(make_chats(1)[0]), json.dumps({"text": "a"})
    for name, line in (("chats", chat), ("texts", text)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(f"broken\n{line}\n")
        [record] = read_either(str(path), skip_bad=True)
        assert (record["dataset"], record["line"]) == (name, 2)
        with pytest.raises(InputError, match=r"jsonl:1: not JSON"):
            read_either(str(path))


@pytest.mark.parametrize(
    ("chats", "texts", "share"),
    [(20, 60, None), (20, 60, 0.5), (20, 60, 0.1), (3, 100, 0.3), (50, 2, 0.2)],
)
def test_P3_a_mix_keeps_its_share_and_loses_nothing(chats, texts, share):
    order = mix(chats, texts, share)
    assert set(order) == set(range(chats + texts))
    counts = [order.count(i) for i in range(chats + texts)]
    assert max(counts[:chats]) - min(counts[:chats]) <= 1
    assert max(counts[chats:]) - min(counts[chats:]) <= 1
    if share:
        have = sum(counts[:chats]) / len(order)
        assert have == pytest.approx(share, abs=0.02)
        assert 1 in (min(counts[:chats]), min(counts[chats:]))  # nothing is repeated needlessly


def test_P3_cpt_mixed_with_1000_texts_and_20_chats_trains_on_all_of_both(
    train, tmp_path, tokenizer, monkeypatch
):
    texts = write_jsonl(tmp_path / "texts.jsonl", make_texts(1000))
    chats = write_jsonl(tmp_path / "chats.jsonl", make_chats(20))
    seen = []
    whole = language.language_loss

    def counted(model, batch):
        seen.append(int((batch["labels"][:, 1:] != -100).sum()))
        return whole(model, batch)

    monkeypatch.setattr(language, "language_loss", counted)
    model = make_model(tmp_path / "model")
    summary = train(
        f"--task cpt_mixed --model_name {model} --train_data {texts} --chat_data {chats} "
        "--evaluation off --batch_size 16 --gradient_accumulation_steps 1 --max_seq_length 256"
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = [len(language.tokenize(tokenizer, row["text"])) for row in make_texts(1000)]
    rows = encode_chats(tokenizer, records(make_chats(20), CHATS), 256)
    answers = [sum(label != -100 for label in row["labels"]) for row in rows]
    assert sum(seen) == sum(documents) + sum(
        answers
    )  # a document's first is not learnt, its end is
    assert summary["status"] == "completed"
    assert summary["validation"] is None


# ------------------------------------------------------------------------------------------------
# Loss


@pytest.mark.parametrize("at_once", [7, 1024])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_and_its_gradients_are_those_of_all_logits_at_once(
    tiny_models, monkeypatch, at_once, checkpointing
):
    monkeypatch.setattr(language, "LOGITS_AT_ONCE", at_once)
    model = AutoModelForCausalLM.from_pretrained(tiny_models["tied"])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    tokenizer = load_tokenizer(tiny_models["tied"])
    rows = list(encode_chats(tokenizer, records(make_chats(4), CHATS), 128))
    batch = BlockCollator(tokenizer.pad_token_id)(rows)
    loss, count = language_loss(model, batch)
    loss.backward()
    gradients = {name: part.grad.clone() for name, part in model.named_parameters()}
    model.zero_grad()
    reference = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss * count
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    for name, part in model.named_parameters():
        torch.testing.assert_close(gradients[name], part.grad, rtol=1e-4, atol=1e-5)
    assert "forward" not in model.get_output_embeddings().__dict__


def test_a_model_that_changes_its_logits_after_the_head_has_the_right_loss():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.3,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    ids, mask = pad([[5, 6, 7, 8], [9, 10, 11]], 0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)}
    loss, count = language_loss(model, batch)
    reference = model(input_ids=ids, labels=batch["labels"]).loss
    assert not language.head_is_last(model)
    assert loss.item() / count == pytest.approx(reference.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------
# Runs


def test_P3_ten_chats_are_learnt_by_heart_and_reproduced(train, chat_file, tmp_path, monkeypatch):
    """ROUGE-L goes to 1.0, the answers end by themselves, and a plain load of final/ says them."""
    summary = train(
        f"--task sft {SMALL} --train_data {chat_file} --val_data {chat_file} --evaluation generate "
        "--max_steps 300 --learning_rate 3e-3 --lr_scheduler_type constant_with_warmup "
        "--batch_size 10 --gradient_accumulation_steps 1 --eval_strategy no --logging_steps 100"
    )
    figures = summary["validation"]["chats"]
    assert summary["validation_before_training"]["chats"]["rougeL"] < 0.3
    assert figures["rougeL"] == 1.0
    assert figures["loss"] < 0.05
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    for record in records(make_chats(3), CHATS):
        prompt, answer = language.question_of(tokenizer, record)
        ids = torch.tensor([language.tokenize(tokenizer, prompt)])
        written = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(written) == f"{answer}<|im_end|>"
    assert model.config.use_cache


@pytest.mark.parametrize(
    "tuning", ["lora", "qlora", "qlora --load_in_8bit", "full", "lora --target_modules q_proj"]
)
def test_every_tuning_lowers_the_loss_and_its_result_reloads(train, tmp_path, chat_file, tuning):
    model = make_model(tmp_path / "model")
    summary = train(
        f"--task sft --model_name {model} --tuning {tuning} --train_data {chat_file} "
        f"--val_data {chat_file} --max_steps 12 --learning_rate 5e-3 --batch_size 5 "
        "--gradient_accumulation_steps 2 --lora_r 8"
    )
    before = summary["validation_before_training"]["chats"]["loss"]
    assert summary["validation"]["chats"]["loss"] < before - 0.3
    assert summary["validation"]["chats"]["perplexity"] == pytest.approx(
        math.exp(summary["validation"]["chats"]["loss"])
    )
    base = AutoModelForCausalLM.from_pretrained(model)
    final = tmp_path / "run" / "final"
    if tuning == "full":
        trained = AutoModelForCausalLM.from_pretrained(final)
        moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), base.parameters())]
        assert all(moved)
    else:
        from peft import PeftModel

        trained = PeftModel.from_pretrained(base, final)
        names = {name.split(".")[-4] for name, _ in trained.named_parameters() if "lora_B" in name}
        assert ("down_proj" in names) == ("target_modules" not in tuning)
        assert all(p.abs().sum() > 0 for n, p in trained.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_G1_a_model_from_dimensions_trains_on_texts_with_a_tokenizer_of_its_own(
    train, text_file, tmp_path, model_type
):
    summary = train(
        f"--task cpt {SMALL} --model_type {model_type} --train_data {text_file} --max_steps 20 "
        "--learning_rate 3e-3 --max_grad_norm 1.0 --batch_size 4 --gradient_accumulation_steps 1 "
        "--save_steps 10 --gradient_checkpointing"
    )  # G2: clipping, save interval, gradient checkpointing, batch and epochs are flags
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert model.config.hidden_size == 64
    assert model.config.num_hidden_layers == 2
    assert model.config.num_attention_heads == 4
    assert model.config.max_position_embeddings == 128
    assert len(tokenizer) <= 600
    assert len(tokenizer) <= model.config.vocab_size < len(tokenizer) + 64
    text = "Any text, even ünïcode 漢字 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    after, before = (summary[key]["texts"] for key in ("validation", "validation_before_training"))
    assert after["loss"] < before["loss"] - 1
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        "checkpoint-10",
        "checkpoint-20",
    }


def test_a_resumed_run_from_scratch_keeps_its_tokenizer_and_ends_with_the_same_bytes(
    train, text_file, tmp_path
):
    line = (
        f"--task cpt {SMALL} --train_data {text_file} --max_steps 6 --save_steps 3 --batch_size 4 "
        "--gradient_accumulation_steps 1"
    )
    train(line)
    whole = (tmp_path / "run/final/model.safetensors").read_bytes()
    tokenizer = (tmp_path / "run/final/tokenizer.json").read_bytes()

    for name in ("final", "checkpoint-6"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "summary.json").unlink()
    train(line)
    assert (tmp_path / "run/final/tokenizer.json").read_bytes() == tokenizer
    assert (tmp_path / "run/final/model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--train_data nowhere.jsonl", "--train_data nowhere.jsonl does not exist"),
        ("--task cpt_mixed", "--task cpt_mixed needs --chat_data FILE"),
        ("--chat_data {data}", "--chat_data is for --task cpt_mixed"),
        ("--chat_share 0.5", "--chat_share 0.5: a share of 0.001 to 0.999"),
        ("--tuning full --load_in_4bit", "--tuning full trains the weights"),
        ("--tuning scratch --hidden_size 30 --num_heads 4", "is no multiple of 2 x --num_heads 4"),
        ("--tuning scratch --model_type nonsense", "--model_type nonsense"),
        ("--tokenizer_name x", "--tokenizer_name is for --tuning scratch"),
        ("--num_layers 0", "--num_layers is 0: give a number above 0"),
        ("--task cpt --evaluation generate", "cannot read|is missing|bad lines"),
        ("--target_modules nothing", "--target_modules"),
        ("--backend unsloth --tuning full", "--backend unsloth"),
        (
            "--evaluation off --load_best_model_at_end",
            "--load_best_model_at_end needs an evaluation",
        ),
        ("--max_seq_length 999999", "--max_seq_length 999999 is more than the model's"),
        ("--pipeline_parallel_size 0", "--pipeline_parallel_size is 0: give a number above 0"),
        ("--tuning scratch --model_type gpt_neo", "--model_type gpt_neo"),
        ("--taks sft", "unknown argument --taks, did you mean --task"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    line, message, train, chat_file, tmp_path, capsys
):
    import re

    with pytest.raises(SystemExit) as exit_info:
        train(
            f"--model_name {DEMO_MODEL} --train_data {chat_file} --val_data {chat_file} "
            "--max_steps 1 " + line.format(data=chat_file)
        )
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------
# Evaluation


def test_P5_rouge_l_is_what_its_definition_says():
    assert rouge_l("the cat sat", "the cat sat") == 1.0
    assert rouge_l("", "the cat sat") == 0.0
    assert rouge_l("猫が座った", "猫が座った") == rouge_l("Кот сидит", "кот сидит") == 1.0
    assert rouge_l("кот", "пёс") == 0.0
    # the longest common subsequence has 2 words: precision 2/3, recall 2/4
    assert rouge_l("the dog sat", "the cat sat down") == pytest.approx(2 * (2 / 3) * 0.5 / (7 / 6))


@pytest.mark.parametrize("beams", [1, 2])
def test_P5_generation_is_evaluated_with_the_cache_and_counts_what_is_empty(
    tmp_path, tokenizer, monkeypatch, beams
):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "m", spare_rows=64)).eval()
    with torch.no_grad():  # a model whose likeliest token is one that no tokenizer knows
        model.get_output_embeddings().weight[-1] = 0
        model.get_output_embeddings().weight.mul_(0)
    settings = LanguageSettings(evaluation="generate", max_seq_length=128, num_beams=beams)
    samples = {CHATS: records(make_chats(5), CHATS)}
    evaluation = language.LanguageEvaluation(samples, tokenizer, settings, tmp_path, 2)
    lengths = []
    forward = type(model).forward

    def watched(self, *args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    figures, _ = evaluation._validate_dataset(model, CHATS)
    assert figures["num_samples"] == 5
    assert figures["loss"] == pytest.approx(math.log(model.config.vocab_size), rel=1e-4)
    assert 0 <= figures["rougeL"] < 0.2
    assert 0 <= figures["empty_rate"] <= 1
    assert lengths.count(1) > 60  # one new token a pass, the rest from the cache


def test_P5_ids_that_no_tokenizer_knows_are_an_empty_answer(tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "m", spare_rows=64)).eval()
    head = model.get_output_embeddings()
    unknown = model.config.vocab_size - 1
    head.register_forward_hook(lambda m, a, out: out.index_fill(-1, torch.tensor(unknown), 1e4))
    settings = LanguageSettings(evaluation="generate", max_seq_length=128, max_new_tokens=4)
    samples = {CHATS: records(make_chats(3), CHATS)}
    evaluation = language.LanguageEvaluation(samples, tokenizer, settings, tmp_path, 2)
    figures = evaluation._rouge(model)
    assert figures == {"rougeL": 0.0, "empty_rate": 1.0}


def test_P5_evaluation_can_be_off_or_by_loss_alone(train, chat_file, tmp_path):
    base = f"--task sft --model_name {make_model(tmp_path / 'm')} --train_data {chat_file} "
    base += "--max_steps 1 --batch_size 2 --gradient_accumulation_steps 1 "
    assert train(base + "--evaluation off", "off")["validation"] is None
    assert not (tmp_path / "off" / "validation.jsonl").exists()
    figures = train(base + f"--evaluation loss --val_data {chat_file}", "loss")["validation"]
    assert set(figures["chats"]) == {"num_samples", "loss", "perplexity", "runtime"}


def test_P9_tensorboard_has_loss_memory_throughput_and_evaluation(train, chat_file, tmp_path):
    train(
        f"--task sft --model_name {make_model(tmp_path / 'm')} --train_data {chat_file} "
        f"--val_data {chat_file} --evaluation generate --max_steps 4 --eval_steps 2 "
        "--logging_steps 1 --batch_size 5 --gradient_accumulation_steps 1 --max_new_tokens 4"
    )
    events = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    steps = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in "loss learning_rate grad_norm tokens_per_second peak_memory_gb".split():
        assert steps[f"train/{tag}"] == [1, 2, 3, 4]
    for tag in "loss perplexity chats_loss chats_perplexity chats_rougeL".split():
        assert steps[f"eval/{tag}"] == [0, 2, 4]


def test_every_process_makes_as_many_passes_and_each_sequence_counts_once(monkeypatch, tokenizer):
    class State:
        process_index = 0

    monkeypatch.setattr(language, "PartialState", State)
    monkeypatch.setenv("WORLD_SIZE", "3")
    settings = LanguageSettings(max_seq_length=128)
    evaluation = language.LanguageEvaluation(
        {CHATS: records(make_chats(10), CHATS)}, tokenizer, settings, "nowhere", 2
    )
    counted, passes = [], set()
    for State.process_index in range(3):
        mine = list(evaluation._share(list(range(10))))
        passes.add(len(mine))
        counted += [i for indices, counts in mine if counts for i in indices]
    assert sorted(counted) == list(range(10))
    assert len(passes) == 1


def test_the_tokenizer_learns_the_data_and_the_templates_tokens_stay_whole():
    tokenizer = train_tokenizer((row["text"] for row in make_texts(60)), 400)
    assert len(tokenizer) <= 400
    assert len(tokenizer("Number")["input_ids"]) == 1
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True)
    assert (
        list(ids["input_ids"] if hasattr(ids, "keys") else ids).count(
            tokenizer.convert_tokens_to_ids("<|im_start|>")
        )
        == 1
    )
