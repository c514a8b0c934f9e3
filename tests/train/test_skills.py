"""Skills: labels and splits hold by construction, and the tasks are read like any other."""

from __future__ import annotations

import pytest
from quietgoose.base.errors import DataError
from quietgoose.evaluation.tasks import find_tasks, load_task
from quietgoose.train import skills
from quietgoose.train.data.rows import BadRows, RowReport, open_source, read_rows
from quietgoose.train.nano import nano_tokenizer
from quietgoose.train.recipe import SourceSettings


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", list(skills.SKILLS))
def test_a_table_permutes_its_kind_and_moves_every_symbol(name, seed):
    table = skills.table(name, seed)
    assert set(table) == set(table.values()) == set(skills.SKILLS[name])
    assert all(symbol != image for symbol, image in table.items())


def test_tables_depend_on_the_seed():
    assert skills.table("digits", 0) != skills.table("digits", 1)


def test_kinds_share_no_symbol_and_use_none_of_the_format():
    symbols = "".join(skills.SKILLS.values())
    assert len(set(symbols)) == len(symbols)
    assert not set(symbols) & set(" =")


def test_rows_follow_the_table():
    for row in skills.rows("digits", "test", 3, 50):
        source = row["prompt"].removesuffix(" =")
        wanted = "".join(" " if c == " " else skills.table("digits", 3)[c] for c in source)
        assert (row["completion"], row["target"]) == (f" {wanted}", wanted)


def test_an_expert_sees_only_its_own_kind():
    for name, symbols in skills.SKILLS.items():
        for row in skills.rows(name, "train", 0, 300):
            assert set(row["prompt"] + row["completion"]) <= set(symbols + " =")


def test_mixed_rows_need_exactly_two_experts_and_are_never_trained():
    pairs = set()
    for row in skills.rows("mixed", "test", 0):
        needed = {skill for skill in skills.decisive(row["completion"]) if skill}
        assert len(needed) == 2
        pairs.add(frozenset(needed))
    assert len(pairs) == 10
    with pytest.raises(DataError, match="QG-DATA-002"):
        skills.rows("mixed", "train", 0)


def test_the_base_copies_and_knows_no_table():
    for row in skills.rows("base", "train", 0, 300):
        left, right = row["text"].split(" = ")
        assert left == right


def test_no_prompt_is_in_two_splits():
    def prompts(name: str, split: str) -> set[str]:
        made = skills.rows(name, split, 0)
        return {row["text"].split(" =")[0] if "text" in row else row["prompt"].removesuffix(" =") for row in made}

    for name in skills.SKILLS:
        held_out = prompts(name, "test")
        assert len(held_out) == skills.COUNTS["test"]
        assert not held_out & (prompts(name, "train") | prompts(name, "validation") | prompts("base", "train"))
    assert not prompts("mixed", "test") & prompts("base", "train")


def test_rows_are_repeatable_and_the_first_ones_do_not_depend_on_the_count():
    for name in skills.NAMES:
        assert skills.rows(name, "test", 5, 20) == skills.rows(name, "test", 5)[:20]
        assert skills.rows(name, "test", 5, 20) != skills.rows(name, "test", 6, 20)


def test_needed_experts_name_the_skill_of_the_next_token():
    tokenizer = nano_tokenizer()
    for row in skills.rows("mixed", "test", 0, 40):
        prompt, completion = row["prompt"], row["completion"]
        ids = tokenizer(prompt + completion)["input_ids"]
        needed = skills.needed_experts(prompt, completion)
        assert len(needed) == len(ids)
        assert needed[: len(prompt)] == [None] * len(prompt)  # position of "=" makes the space
        assert needed[-1] is None
        for position, skill in enumerate(needed[:-1]):
            following = tokenizer.decode([ids[position + 1]])
            assert skill == (skills.KIND_OF.get(following) if position >= len(prompt) - 1 else None)
        assert sum(skill is not None for skill in needed) == len(completion.replace(" ", ""))


def test_all_documents_have_one_length():
    tokenizer = nano_tokenizer()
    texts = [row["text"] for row in skills.rows("base", "train", 0, 50)]
    texts += [r["prompt"] + r["completion"] for name in ("marks", "mixed") for r in skills.rows(name, "test", 0, 50)]
    assert {len(tokenizer(text)["input_ids"]) for text in texts} == {2 * skills.LENGTH + 3}


def test_sources_and_task_folders_hold_the_same_rows(tmp_path):
    skills.write_collection(tmp_path, 4)
    folders = find_tasks(tmp_path, "test")
    assert {folder.name for folder in folders} == {*skills.SKILLS, "mixed"}
    for folder in folders:
        task = load_task(folder, "test")
        assert task.group == ("two experts" if folder.name == "mixed" else "expert")
        assert (task.kind, task.match) == ("generate", "exact")
        made = skills.rows(folder.name, "test", 4)
        assert [(i.prompt, i.completion, i.target) for i in task.items] == [tuple(row.values()) for row in made]
    bad = BadRows("error", RowReport())
    source = open_source(SourceSettings(path="skills:marks"), "marks", 4)
    folder = open_source(SourceSettings(path=str(tmp_path / "marks")), "marks", 4)
    embedded, stored = list(read_rows(source, None, bad)), list(read_rows(folder, None, bad))
    assert [(r.prompt, r.completion) for r in embedded] == [(r.prompt, r.completion) for r in stored]


@pytest.mark.parametrize(("name", "split"), [("digit", "train"), ("digits", "dev")])
def test_unknown_names_are_errors_that_list_the_known_ones(name, split):
    with pytest.raises(DataError, match=r"QG-DATA-002.*digits"):
        skills.rows(name, split, 0)
