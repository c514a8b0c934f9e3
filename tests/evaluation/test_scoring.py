"""The tree equals plain one-by-one scoring; batching, splitting and padding change nothing."""

from __future__ import annotations

import pytest
import torch
from quietgoose.base.errors import DataError
from quietgoose.evaluation.encoding import EncodedItem, ItemRef, encode_task, padding
from quietgoose.evaluation.scoring import (
    LeafScores,
    collate,
    score_batch,
    scoring_attention,
    tree_batches,
    tree_mask,
    tree_rows,
)
from quietgoose.evaluation.tasks import make_task

ROWS = [
    {"prompt": "Q: the cat?\nA:", "completion": " yes", "choices": [" no", " yes"], "answer": 1},
    {
        "prompt": "Question: which colour has the sky at noon?\nAnswer:",
        "completion": " blue",
        "choices": [" blue", " a rather long green", " x", " sky blue pink"],
        "answer": 0,
    },
    {"prompt": "?", "completion": " b", "choices": [" a", " b", " c"], "answer": 1},
]


def plain(model, tokenizer, item: EncodedItem) -> list[tuple[float, float, int]]:
    """Slow and plain: each continuation alone in its own row, full logits."""
    found = []
    for leaf in item.leaves:
        ids = torch.tensor([[*item.prompt, *leaf, tokenizer.eos_token_id]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(item.prompt) - 1
        steps = [logp[start + step, token].item() for step, token in enumerate([*leaf, tokenizer.eos_token_id])]
        best = [logp[start + step].argmax().item() for step in range(len(leaf) + 1)]
        missed = sum(a != b for a, b in zip(best, [*leaf, tokenizer.eos_token_id], strict=True))
        found.append((sum(steps[:-1]), steps[-1], missed))
    return found


def tree(model, tokenizer, items, batch_tokens=4096, max_row=1024) -> LeafScores:
    scores = LeafScores.zeros(sum(len(item.leaves) for item in items), "cpu")
    for rows in tree_batches(tree_rows(items, max_row), batch_tokens, model.config.vocab_size):
        score_batch(model, collate(rows, tokenizer.eos_token_id, padding(tokenizer), "cpu"), scores)
    return scores


@pytest.mark.parametrize(("batch_tokens", "max_row"), [(4096, 1024), (1, 1024), (128, 48), (4096, 1)])
def test_tree_equals_one_by_one(random_model, tokenizer, batch_tokens, max_row):
    items = encode_task(make_task("t", ROWS), tokenizer, range(3), 256)
    scores = tree(random_model, tokenizer, items, batch_tokens, max_row)
    wanted = torch.tensor([row for item in items for row in plain(random_model, tokenizer, item)]).double()
    torch.testing.assert_close(scores.sum_L, wanted[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.end_L, wanted[:, 1], rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.missed_L, wanted[:, 2])


def test_eager_attention_gives_the_same(random_model, tokenizer):
    items = encode_task(make_task("t", ROWS), tokenizer, range(3), 256)
    sdpa = tree(random_model, tokenizer, items)
    random_model.set_attn_implementation("eager")
    try:
        eager = tree(random_model, tokenizer, items)
    finally:
        random_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(eager.sum_L, sdpa.sum_L, rtol=1e-5, atol=1e-5)


def test_leaves_do_not_see_each_other(random_model, tokenizer):
    items = encode_task(make_task("t", ROWS), tokenizer, [1], 256)
    changed = [EncodedItem(items[0].ref, items[0].prompt, (items[0].leaves[0], (9, 9, 9), *items[0].leaves[2:]), 0)]
    before, after = tree(random_model, tokenizer, items), tree(random_model, tokenizer, changed)
    keep = torch.tensor([0, 2, 3])
    torch.testing.assert_close(before.sum_L[keep], after.sum_L[keep], rtol=1e-6, atol=1e-6)
    assert not torch.isclose(before.sum_L[1], after.sum_L[1])


def test_mask_by_hand():
    mask = tree_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_batches_hold_every_row_once_within_budget():
    items = [EncodedItem(ItemRef("t", n), (5,) * (n % 37 + 1), ((6,) * (n % 5 + 1),) * 3, 0) for n in range(200)]
    rows = tree_rows(items)
    batches = tree_batches(rows, 512, 100)
    assert sorted(row.first_leaf for batch in batches for row in batch) == [3 * n for n in range(200)]
    widths = [-(-max(row.length for row in batch) // 8) * 8 for batch in batches]
    assert all(len(batch) * width <= 512 for batch, width in zip(batches, widths, strict=True))
    padded = sum(len(batch) * width for batch, width in zip(batches, widths, strict=True))
    assert padded < 1.3 * sum(row.length for row in rows)


def test_logits_only_where_needed(random_model, tokenizer):
    items = encode_task(make_task("t", ROWS), tokenizer, range(3), 256)
    seen = []
    head = random_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    tree(random_model, tokenizer, items)
    handle.remove()
    needed = sum(1 + sum(map(len, item.leaves)) for item in items)
    assert seen == [(1, needed, 258)]
    assert not head._forward_pre_hooks


def test_too_long_item_is_named(tokenizer):
    task = make_task("long", [ROWS[0], {**ROWS[0], "prompt": "x" * 300}])
    with pytest.raises(DataError, match=r"QG-DATA-004 task long, item 2: 305 tokens .* takes 256"):
        encode_task(task, tokenizer, range(2), 256)


def test_scoring_attention_restores_mode(random_model):
    random_model.train()
    with scoring_attention(random_model, 10):
        assert not random_model.training
    assert random_model.training
    random_model.eval()
    random_model.config.sliding_window = 8
    try:
        with pytest.raises(DataError, match="sliding window of 8"), scoring_attention(random_model, 10):
            pass
    finally:
        del random_model.config.sliding_window


def test_encoding_is_that_of_training(tokenizer):
    """Same ids as the training data gets, for a tokenizer with merges over the border and with a begin
    token."""
    from quietgoose.train.data import tokens
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index + 3 for index, letter in enumerate("abcd")}
    vocabulary = {"<eos>": 0, "<pad>": 1, "<bos>": 2, **letters, "bc": 7, "cd": 8}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c"), ("c", "d")]))
    engine.pre_tokenizer = pre_tokenizers.Split("x", "removed")
    engine.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    merging = PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")
    pairs = [("ab", "cd"), ("aa", "cd"), ("b", "d")]
    task = make_task("t", [{"prompt": p, "completion": c} for p, c in pairs])
    ours = [[*item.prompt, *item.leaves[0], 0] for item in encode_task(task, merging, range(3), None)]
    theirs = [ids for ids, _ in tokens._encode([[(p, False), (c, True)] for p, c in pairs], merging)]
    assert ours == theirs
    assert ours[0] == [2, 3, 4, 8, 0]
