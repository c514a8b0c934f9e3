"""Token ids, which of them are trained, and the cache on disk."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from quietgoose.base.errors import DataError, SecurityError
from quietgoose.train.base_models import load_tokenizer
from quietgoose.train.data import tokens as module
from quietgoose.train.data.rows import BadRows, Row, RowReport
from quietgoose.train.data.tokens import TokenSettings, encode_rows, load_token_set, token_set, tokenizer_hash
from quietgoose.train.nano import nano_tokenizer
from quietgoose.train.recipe import SourceSettings

END = 257
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}<end>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
COLLECTION = Path(__file__).parents[3] / "shared" / "data" / "collection"


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE with merges, so that tokens can cross the border between prompt and completion."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the answer is yes or no; the answers are yes"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def encode(row, tokenizer, **rule):
    report = RowReport(taken=1)
    documents = list(encode_rows([row], tokenizer, TokenSettings(**{"length": 64, **rule}), BadRows("skip", report)))
    return documents, report


def pair(prompt, completion):
    return Row("here", prompt=prompt, completion=completion)


def test_completion_and_end_are_trained_and_the_prompt_is_not():
    [(ids, trained)], _ = encode(pair("ab", " c"), nano_tokenizer())
    assert ids == [97, 98, 32, 99, END]
    assert trained == [0, 0, 1, 1, 1]
    [(_, trained)], _ = encode(pair("ab", " c"), nano_tokenizer(), loss_on="all")
    assert trained == [1] * 5


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("the answer is", " yes"),
        ("the answer is ", "yes"),
        ("the ans", "wer"),
        ("", "yes"),
        ("the\n", " yes"),
        ("é", "é"),
    ],
)
def test_the_prompt_reads_as_at_inference(bpe, prompt, completion):
    """What stands before the trained tokens is exactly what the tokenizer gives for the prompt alone."""
    [(ids, trained)], _ = encode(pair(prompt, completion), bpe)
    border = trained.index(1)
    assert ids[:border] == bpe(prompt)["input_ids"]
    assert bpe.decode(ids[border:-1]) == completion
    assert (ids[-1], trained[border:]) == (bpe.eos_token_id, [1] * (len(ids) - border))
    if completion.startswith(" "):
        assert ids[:-1] == bpe(prompt + completion)["input_ids"]


def test_begin_token_comes_once(bpe):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = type(bpe.backend_tokenizer).from_str(bpe.backend_tokenizer.to_str())
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    begins = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    [(ids, trained)], _ = encode(pair("the", " yes"), begins)
    assert ids[:-1] == begins("the yes")["input_ids"]
    assert (ids.count(0), trained[0]) == (1, 0)
    begins.chat_template = "<s>" + CHAT.replace("<end>", "</s>")
    chat = Row("here", messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}))
    assert encode(chat, begins)[0][0][0].count(0) == 1


def test_chat_trains_what_the_assistant_says():
    tokenizer = nano_tokenizer()
    tokenizer.chat_template = None
    turns = [("system", "s"), ("user", "hi"), ("assistant", "yo"), ("user", "more"), ("assistant", "ok")]
    row = Row("here", messages=tuple({"role": role, "content": text} for role, text in turns))
    with pytest.raises(DataError, match=r"DATA-005 here: field messages needs a chat template"):
        encode(row, tokenizer)
    tokenizer.chat_template = CHAT
    [(ids, trained)], _ = encode(row, tokenizer, length=200)
    assert tokenizer.decode(ids) == "[system]s\n[user]hi\n[assistant]yo<end>\n[user]more\n[assistant]ok<end>"
    assert tokenizer.decode([i for i, t in zip(ids, trained) if t]) == "yo<end>ok<end>"
    tokenizer.chat_template = "{{ messages|length }}" + CHAT
    with pytest.raises(DataError, match=r"rewrites earlier messages"):
        encode(row, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses the messages .*roles must alternate"):
        encode(row, tokenizer)


def test_the_nano_writes_chat_rows_and_nothing_else_otherwise(tmp_path):
    tokenizer = nano_tokenizer()
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "more"), ("assistant", "ok")]
    chat = Row("here", messages=tuple({"role": role, "content": text} for role, text in turns))
    [(ids, trained)], _ = encode(chat, tokenizer)
    assert tokenizer.decode(ids) == "user: hi\nassistant: yo<end>\nuser: more\nassistant: ok<end>"
    assert tokenizer.decode([i for i, t in zip(ids, trained) if t]) == " yo<end> ok<end>"
    prompt = tokenizer.apply_chat_template(list(chat.messages[:3]), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids).startswith(prompt), "asked as it was trained"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template
    plain = nano_tokenizer()
    plain.chat_template = None
    for row in (pair("ab", " c"), Row("here", text="user: a")):
        assert encode(row, tokenizer) == encode(row, plain)


def test_long_text_is_cut_and_every_token_is_a_target_once():
    text = "abcdefghijklmnopqrstu"
    documents, _ = encode(Row("here", text=text), nano_tokenizer(), length=8)
    assert [len(ids) - 1 for ids, _ in documents] == [8, 8, 5]
    assert [i for ids, _ in documents for i in ids[1:]] == [*text.encode()[1:], END]
    assert all(sum(trained) == len(ids) for ids, trained in documents)


@pytest.mark.parametrize(("size", "fits"), [(62, True), (63, False)])
def test_over_long_rows_are_refused_at_the_exact_length(size, fits):
    documents, report = encode(pair("x" * size, " y"), nano_tokenizer())
    assert (len(documents), report.taken, report.skipped) == ((1, 1, 0) if fits else (0, 0, 1))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{n}+{n}=", "completion": f" {2 * n}"}) for n in range(50)))
    return SourceSettings(path=str(path))


def test_cache_is_hit_and_every_cause_of_change_misses(tmp_path, source, monkeypatch):
    tokenizer = nano_tokenizer()
    cache = tmp_path / "cache"

    def files(source=source, tokenizer=tokenizer, **rule):
        token_set(source, "e", tokenizer, TokenSettings(**{"length": 32, **rule}), cache, 0)
        return len(list(cache.glob("*.safetensors")))

    plain = token_set(source, "e", tokenizer, TokenSettings(32), None, 0)
    assert files() == 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "_build", lambda *a: pytest.fail("tokenised again"))
        kept = token_set(source, "e", tokenizer, TokenSettings(32), cache, 0)
    assert np.array_equal(kept.tokens_P, plain.tokens_P)
    assert np.array_equal(kept.trained_P, plain.trained_P)
    assert np.array_equal(kept.ends, plain.ends)
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1)  # leaves settings in the tokenizer
    assert files() == 1
    assert files(length=33) == 2
    assert files(loss_on="all") == 3
    assert files(source=SourceSettings(path=source.path, limit=3)) == 4
    other = nano_tokenizer()
    other.add_tokens(["+"])
    assert tokenizer_hash(other) != tokenizer_hash(tokenizer)
    assert files(tokenizer=other) == 5
    with open(source.path, "a") as handle:
        handle.write('\n{"prompt": "1", "completion": " 1"}')
    assert files() == 6


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, source, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    assert len(token_set(source, "e", nano_tokenizer(), TokenSettings(32), tmp_path / "file", 0)) == 50
    assert "cannot be used" in caplog.text

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_token_set", full)
    assert len(token_set(source, "e", nano_tokenizer(), TokenSettings(32), tmp_path / "cache", 0)) == 50
    assert "No space left" in caplog.text


def test_a_cache_this_program_did_not_write_is_refused_and_never_unpickled(tmp_path, source):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (canary,))

    cache = tmp_path / "cache"
    token_set(source, "e", nano_tokenizer(), TokenSettings(32), cache, 0)
    [path] = cache.glob("*.safetensors")
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    for content in (pickle.dumps(Bomb()), b"", good[:-3], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(SecurityError, match=r"SEC-001 .*delete the file") as caught:
            token_set(source, "e", nano_tokenizer(), TokenSettings(32), cache, 0)
        assert str(path) in str(caught.value)
    assert not canary.exists()
    path.write_bytes(good)
    assert len(load_token_set(path)) == 50


@pytest.mark.skipif(not COLLECTION.is_dir(), reason="the collection is not here")
def test_the_collection_reads_and_round_trips():
    tokenizer = nano_tokenizer()
    source = SourceSettings(path=str(COLLECTION / "mawps"), limit=100)
    tokens = token_set(source, "mawps", tokenizer, TokenSettings(2048), None, 0)
    ids, trained = tokens.document(99)
    text = tokenizer.decode(ids[: int(np.argmax(trained))])
    assert text.startswith("Solve this word problem")
    assert text.endswith("Number:")
