import copy
import json

import pytest
import torch
from conftest import tagged_records
from test_model import batch_of, train_steps

from train_confidence_lora import (
    DATASETS,
    MARKER_TOKEN,
    build_prompt,
    confidence_ids,
    exact_logits,
    generate_answers,
    initialize_model_with_tokens,
    invoke_marker,
    load_base_model,
    pad,
    parse_record,
    plan_batches,
    prefill,
    score_batch,
    tag_probability,
    tokenize,
)


def records_of(count, seed=3):
    return [parse_record(json.dumps(record)) for record in tagged_records(count, seed)]


@pytest.fixture(params=["lora", "activated"])
def trained(request, tiny_models):
    """A model whose adapter does something, its tokenizer and the kind of adapter."""
    model, tokenizer = initialize_model_with_tokens(
        tiny_models["untied"], request.param, lora_dropout=0.0
    )
    train_steps(model, batch_of(tokenizer), steps=5)
    return model.eval(), tokenizer, request.param


def plain_probability(model, tokenizer, record, response_ids):
    """P(C) by PEFT's own one-pass forward over prompt, answer and marker, unpadded."""
    ids = confidence_ids(tokenizer)
    row = tokenize(tokenizer, build_prompt(tokenizer, record)) + response_ids + [ids.marker]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[:, -1]
    return tag_probability(logits, [ids.tags[DATASETS[record["dataset"]].domain]]).item()


def test_scoring_recorded_answers_in_a_batch_equals_one_plain_pass_each(trained):
    model, tokenizer, _ = trained
    records = records_of(12)
    scored = score_batch(model, tokenizer, records, None)
    for record, (probability, _, response) in zip(records, scored):
        expected = plain_probability(
            model, tokenizer, record, tokenize(tokenizer, record["response"])
        )
        assert probability == pytest.approx(expected, abs=1e-5)
        assert response == record["response"]


def test_scoring_generated_answers_equals_one_plain_pass_over_the_same_ids(trained):
    model, tokenizer, adapter = trained
    records = records_of(12)
    prompts = [build_prompt(tokenizer, record) for record in records]
    scored = score_batch(model, tokenizer, records, 8)
    ids = confidence_ids(tokenizer)
    with torch.inference_mode():
        if adapter == "activated":
            with model.disable_adapter():
                generated = generate_answers(model, tokenizer, prompts, 8, ids)
        else:
            generated = generate_answers(model, tokenizer, prompts, 8, ids, write_tags=True)
    for record, answer, (probability, _, response) in zip(records, generated.answers, scored):
        assert probability == pytest.approx(
            plain_probability(model, tokenizer, record, answer), abs=1e-5
        )
        assert response == tokenizer.decode(answer, skip_special_tokens=True)


def test_an_activated_adapter_leaves_the_base_models_answers_untouched(tiny_models):
    base = load_base_model(tiny_models["untied"]).eval()
    model, tokenizer = initialize_model_with_tokens(tiny_models["untied"], "activated")
    train_steps(model, batch_of(tokenizer), steps=5)
    model.eval()
    records = records_of(8)
    prompts = [build_prompt(tokenizer, record) for record in records]
    with torch.inference_mode():
        expected = generate_answers(base, tokenizer, prompts, 8).answers
    assert [response for _, _, response in score_batch(model, tokenizer, records, 8)] == [
        tokenizer.decode(answer, skip_special_tokens=True) for answer in expected
    ]


def force(model, tokenizer, token):
    """Makes the model write `token` whatever it reads."""
    head = model.get_base_model().get_output_embeddings()
    wanted = tokenizer.convert_tokens_to_ids(token)

    def hook(module, args, output):
        output[..., wanted] += 1e4
        return output

    return head.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("token", "expected"),
    [("<C_READ>", "C"), ("<U_READ>", "U"), ("<C_MED>", "other"), ("<|im_end|>", None)],
)
def test_the_emitted_tag_is_told_apart_and_p_is_read_without_it(token, expected, tiny_models):
    model, tokenizer = initialize_model_with_tokens(tiny_models["untied"])
    records = [record for record in records_of(8) if record["dataset"] == "demo_reading"]
    handle = force(model.eval(), tokenizer, token)
    scored = score_batch(model, tokenizer, records, 4)
    handle.remove()
    assert {emitted for _, emitted, _ in scored} == {expected}
    assert all(0 <= probability <= 1 for probability, _, _ in scored)


def test_an_answer_cut_off_is_not_finished(tiny_models):
    model, tokenizer = initialize_model_with_tokens(tiny_models["untied"])
    ids = confidence_ids(tokenizer)
    prompts = [build_prompt(tokenizer, record) for record in records_of(4)]
    handle = force(model.eval(), tokenizer, "A")
    cut_off = generate_answers(model, tokenizer, prompts, 5, ids)
    handle.remove()
    assert cut_off.finished == [False] * 4
    assert [len(answer) for answer in cut_off.answers] == [5] * 4
    handle = force(model, tokenizer, MARKER_TOKEN)
    suppressed = generate_answers(model, tokenizer, prompts, 5, ids)  # the base never writes it
    handle.remove()
    assert all(ids.marker not in answer for answer in suppressed.answers)


def test_generation_ignores_the_models_own_sampling_and_penalties(tiny_models):
    model, tokenizer = initialize_model_with_tokens(tiny_models["untied"])
    prompts = [build_prompt(tokenizer, record) for record in records_of(4)]
    expected = generate_answers(model.eval(), tokenizer, prompts, 8).answers
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    assert generate_answers(model, tokenizer, prompts, 8).answers == expected


def test_tag_probability_is_stable_in_half_precision():
    logits = torch.tensor([[60000.0, 0.0], [0.0, 60000.0], [1.0, 0.0]], dtype=torch.float16)
    probabilities = tag_probability(logits, [(0, 1)] * 3)
    assert probabilities.tolist() == pytest.approx([1.0, 0.0, 0.7310586])


def test_batches_hold_every_index_once_longest_first():
    batches = plan_batches([3, 9, 1, 9, 4], 2)
    assert batches == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize(
    ("left", "second", "kept"), [(True, [0, 0, 4], [0, 0, 1]), (False, [4, 0, 0], [1, 0, 0])]
)
def test_padding_is_masked_on_the_side_asked_for(left, second, kept):
    ids, mask = pad([[1, 2, 3], [4]], 0, left)
    assert ids.tolist() == [[1, 2, 3], second]
    assert mask.tolist() == [[1, 1, 1], kept]


def test_tag_logits_of_a_bf16_model_are_not_rounded_to_bf16(tiny_models):
    model, tokenizer = initialize_model_with_tokens(tiny_models["untied"], dtype=torch.bfloat16)
    ids = confidence_ids(tokenizer)
    rows = [tokenize(tokenizer, build_prompt(tokenizer, record)) for record in records_of(8)]
    padded, mask = pad(rows, 0)
    with torch.inference_mode():
        cache = prefill(model.eval(), padded)
        plain = invoke_marker(model, copy.deepcopy(cache), mask, ids.marker).float()[:, ids.all]
        exact = exact_logits(model, cache, mask, ids)[:, ids.all]
    torch.testing.assert_close(exact, plain, atol=0.02, rtol=0.02)
    assert (exact.bfloat16().float() != exact).float().mean() > 0.9
