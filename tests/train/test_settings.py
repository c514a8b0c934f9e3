"""Recipes: every misspelt key, wrong value, missing file and contradiction is refused, all at once, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import yaml
from quietgoose.base.errors import RecipeError
from quietgoose.train.agreement import own_facts, refuse_differences
from quietgoose.train.recipe import ArmName, OptimizerSettings, RouterName, SourceSettings
from quietgoose.train.settings import (
    differences,
    load_recipe,
    parse_command,
    recipe_from_yaml,
    recipe_hash,
    recipe_to_yaml,
    training_settings,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": " b"}\n')
    return path


@pytest.fixture
def recipe_file(tmp_path: Path, rows: Path) -> Path:
    content = {
        "name": "test",
        "output": str(tmp_path / "run"),
        "stages": ["base", "experts", "gates"],
        "data": {
            "sequence_length": 64,
            "base": {"path": str(rows)},
            "experts": {"one": {"path": str(rows)}, "two": {"path": str(rows)}},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def refused(*arguments: object) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe([str(argument) for argument in arguments])
    return caught.value


def test_file_then_options(recipe_file: Path, rows: Path) -> None:
    command = parse_command([
        "--local_rank=1", "--config", str(recipe_file), "--experts.rank", "4", "--experts.train.optimizer.lr=1e-3",
        "--data.experts.three.path", str(rows), "--data.experts.three.limit=5", "--dry_run",
    ])  # fmt: skip
    recipe = command.recipe
    assert command.dry_run
    assert command.local_rank == 1
    assert (recipe.name, recipe.experts.rank, recipe.experts.train.optimizer.lr) == ("test", 4, 1e-3)
    assert list(recipe.data.experts) == ["one", "two", "three"]
    assert recipe.data.experts["three"].limit == 5
    assert recipe.gates.train.optimizer.lr == 5e-3, "the paper's default survives"
    assert isinstance(recipe.gates.train.optimizer, OptimizerSettings)
    assert isinstance(recipe.data.base, SourceSettings)
    assert isinstance(recipe.data.experts["three"], SourceSettings)


def test_written_recipe_reads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(["--config", str(recipe_file), "--experts.train.optimizer.betas", "[0.8, 0.95]"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe_to_yaml(recipe))
    assert recipe_from_yaml(copy) == recipe
    assert recipe.experts.train.optimizer.betas == (0.8, 0.95)


def test_hash_sees_training_settings_only(recipe_file: Path, tmp_path: Path) -> None:
    base = ["--config", str(recipe_file)]
    plain, moved = load_recipe(base), load_recipe([*base, "--output", str(tmp_path / "x"), "--checkpoint.every=7"])
    other = load_recipe([*base, "--experts.rank=3"])
    assert recipe_hash(plain) == recipe_hash(moved)
    assert recipe_hash(plain) != recipe_hash(other)
    assert differences(training_settings(plain), training_settings(other)) == {"experts.rank": "was 16, is 3"}


def test_misspelt_keys_all_at_once(recipe_file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("experts:\n  rnk: 8\n  train: {optimiser: {lr: 1}}\ndata:\n  experts:\n    one: {pth: x}\n")
    error = refused("--config", bad, "--gates.train.stps=3", "--dryrun", "--experts.rank.x=1")
    assert error.code == "QG-CFG-001"
    for text in (
        "'experts.rnk'. Did you mean 'rank'?", "'experts.train.optimiser'. Did you mean 'optimizer'?",
        "'data.experts.one.pth'. Did you mean 'path'?", "'gates.train.stps'. Did you mean 'steps'?",
        "'--dryrun' is unknown. Did you mean 'dry_run'?", "'experts.rank' has no parts",
    ):  # fmt: skip
        assert text in str(error), text


def test_wrong_values_all_at_once(recipe_file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("experts: {rank: many}\nbase: {dtype: float16}\n")
    error = refused("--config", recipe_file, "--config", bad, "--gates.train.steps=x")
    assert error.code == "QG-CFG-003"
    for text in ("experts.rank: 'many'", "base.dtype: 'float16'", "--gates.train.steps=x"):
        assert text in str(error), text


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--version=2"], "CFG-002", "reads version 1"),
        (["--experts.rank=0"], "CFG-003", "experts.rank: 0"),
        (["--gates.train.optimizer.lr=nan"], "CFG-003", "gates.train.optimizer.lr"),
        (["--checkpoint.keep=1"], "CFG-003", "checkpoint.keep: 1; allowed are 2"),
        (["--stages=[gates, experts]"], "CFG-004", "the order is experts, gates"),
        (["--stages=[experts]"], "CFG-020", "put 'base' before it"),
        (["--stages=[base, experts, gates, evaluate]"], "CFG-026", "no tasks"),
        (["--stages=[base, experts, gates, export]", "--router.k=3"], "CFG-009", "there are 2 experts"),
        (["--strategy=zero22"], "CFG-010", "Did you mean 'zero2'?"),
        (["--gates.train.strategy=zro0"], "CFG-010", "gates.train.strategy"),
        (["--base.attention=flash_attention_2"], "CFG-010", "set base.attention: auto or sdpa"),
        (["--data.sequence_length=512"], "CFG-008", "over base.nano.context 256"),
        (["--base.nano.heads=3"], "CFG-012", "base.nano.width"),
        (["--base.model=./nowhere"], "CFG-013", "no such file or folder"),
        (["--base.model=smolm2"], "CFG-013", "Did you mean 'smollm2'?"),
        (["--data.experts.one.path=./nowhere.jsonl"], "DATA-002", "nowhere.jsonl"),
        (["--data.collection=./nowhere"], "DATA-002", "no such folder"),
        (["--experts.load.mine=./nowhere"], "CFG-005", "adapter_model.safetensors"),
        (["--experts.load.a/b=./nowhere"], "SEC-002", "a/b"),
        (["--tracking.uri=file:///x"], "CFG-008", "file stores"),
        (["--tracking.credentials=./nowhere"], "CFG-005", "No such file"),
        (["--resume.mode=never", "--resume.step=5"], "CFG-008", "resume.step"),
        (["--evaluate.arms=[phatgose]"], "CFG-003", "phatgoose"),
    ],
)
def test_refused(recipe_file: Path, options: list[str], code: str, text: str) -> None:
    error = refused("--config", recipe_file, *options)
    assert f"QG-{code}" in str(error)
    assert text in str(error)


THINKING = ["--stages=[base,thoughts]", "--data.thoughts.path=steps:permutations-direct"]
EVALUATED = ["--stages=[base,thoughts,evaluate]", "--evaluate.thoughts.tasks.t=steps:permutations-direct"]


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--data.thoughts=null"], "CFG-011", "data.thoughts: is not set"),
        (["--data.thoughts.path=steps:permutation-direct"], "DATA-002", "Did you mean 'permutations-direct'"),
        (["--stages=[thoughts]"], "CFG-020", "'thoughts' needs the result of 'base'"),
        (["--stages=[thoughts, base]"], "CFG-004", "the order is base, thoughts"),
        (["--thoughts.over=routed"], "CFG-020", "'thoughts' needs the result of 'experts'"),
        (["--thoughts.over=rooted"], "CFG-110", "Did you mean 'routed'"),
        (["--thoughts.over=expert:won"], "CFG-110", "there is no expert 'won'"),
        (
            ["--stages=[base,experts,gates,thoughts]", "--thoughts.over=routed", "--router.name=oracle"],
            "CFG-110",
            "phatgoose",
        ),
        (["--thoughts.trainable=full"], "CFG-111", "thoughts.over: base in a recipe without experts"),
        (["--thoughts.trainable=full", "--strategy=zero3"], "CFG-111", "ZeRO-3"),
        (["--thoughts.trainable=full", "--base.dtype=bfloat16"], "CFG-111", "set it to float32"),
        (["--thoughts.trainable=embeddings", "--thoughts.control=no_thoughts"], "CFG-111", "trains nothing"),
        (
            ["--thoughts.trainable=embeddings", "--thoughts.preset=curriculum"],
            "CFG-111",
            "last stage of preset curriculum",
        ),
        (["--thoughts.preset=rlp", "--thoughts.control=pause"], "CFG-114", "leaves no term of the loss"),
        (["--thoughts.samples=1"], "CFG-114", "set at least 2"),
        (
            [*EVALUATED, "--thoughts.control=same_compute", "--evaluate.thoughts.arms=[thought, shuffled]"],
            "CFG-025",
            "add no_thought",
        ),
        (
            [
                *EVALUATED,
                "--evaluate.thoughts.arms=[untrained]",
                "--evaluate.thoughts.generated.g=steps:permutations-direct",
            ],
            "CFG-025",
            "none of them generates",
        ),
        (["--thoughts.tokens=0"], "CFG-", "thoughts.tokens is 0"),
        (["--thoughts.preset=default", "--thoughts.curriculum_sizes=[[3,1]]"], "CFG-113", "set it to curriculum"),
        (["--thoughts.preset=curriculum", "--thoughts.curriculum_sizes=[[3]]"], "CFG-113", "[tokens, lookahead]"),
        (["--thoughts.share=0.5"], "CFG-113", "set thoughts.anchors to random or entropy"),
        (["--thoughts.anchors=every_n", "--thoughts.share=0.5"], "CFG-113", "thoughts.share: is 0.5"),
        (["--thoughts.anchors=random", "--thoughts.every=3"], "CFG-113", "set thoughts.anchors to every_n"),
        (["--thoughts.start_like="], "CFG-112", "thoughts.start_like: is empty"),
        (["--thoughts.end_like="], "CFG-112", "thoughts.end_like: is empty"),
        (["--thoughts.temperature=2"], "CFG-", "make them equal"),
        (["--thoughts.tokens=250"], "CFG-008", "over the base's context 256"),
        (["--thoughts.rank=0"], "CFG-003", "thoughts.rank: 0"),
        (["--thoughts.rollout_chunk=-1"], "CFG-003", "thoughts.rollout_chunk: -1"),
        (["--thoughts.capture=off"], "CFG-003", "capture"),
        (["--thoughts.preset=papr"], "CFG-003", "papr"),
        (["--stages=[base,thoughts,evaluate]", "--evaluate.thoughts.arms=[thought]"], "CFG-026", "evaluate.thoughts"),
    ],
)
def test_thoughts_refused(recipe_file: Path, options: list[str], code: str, text: str) -> None:
    error = refused("--config", recipe_file, *THINKING, *options)
    assert f"QG-{code}" in str(error)
    assert text in str(error)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn"])
def test_thoughts_over_positions_that_depend_on_the_length(recipe_file: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 4096, "rope_parameters": rope}))
    given = ["--config", recipe_file, *THINKING, "--stages=[thoughts]", f"--base.model={folder}"]
    if kind == "yarn":
        assert load_recipe([str(one) for one in given]).base.model == str(folder)
        return
    error = refused(*given)
    assert error.code == "QG-CFG-105"
    assert f"of type '{kind}'" in str(error)


def test_thoughts_of_a_recipe(recipe_file: Path) -> None:
    from quietgoose.train.thought_settings import compute_ratio, final_config, thought_plan, training_steps

    recipe = load_recipe(["--config", str(recipe_file), *THINKING, "--thoughts.preset=paper", "--thoughts.tokens=5"])
    config = final_config(thought_plan(recipe.thoughts, (256,)))
    assert (config.tokens, config.advantage, config.policy_temperature, config.beta) == (5, "one_sided", 3.0, 1e6)
    assert config.banned == (256,)
    loose = load_recipe(["--config", str(recipe_file), *THINKING, "--thoughts.ratio_cap=0", "--thoughts.temperature=2"])
    assert final_config(thought_plan(loose.thoughts)).ratio_cap is None, "0 switches it off"
    short = ["--thoughts.preset=curriculum", "--thoughts.curriculum_sizes=[[4,2],[2,1]]"]
    plan = thought_plan(load_recipe(["--config", str(recipe_file), *THINKING, *short]).thoughts)
    assert [(one.tokens, one.distil_weight > 0) for one in plan.stages] == [(4, False), (2, False), (2, True)]
    assert final_config(plan) is plan.stages[1]
    same = load_recipe(["--config", str(recipe_file), *THINKING, "--thoughts.control=same_compute"]).thoughts
    thinking = load_recipe(["--config", str(recipe_file), *THINKING]).thoughts
    ratio = compute_ratio(thought_plan(thinking).stages[0], 64)
    assert ratio == (4 * 64 * 9 + 3 * (64 + 4 * 64 * 13)) / (3 * 64), "quiet-star.md section 4, FLOPs"
    assert training_steps(same, 64) == -(-200 * (4 * 9 + 3 * (1 + 4 * 13)) // 3)
    assert training_steps(thinking, 64) == 200
    assert thought_plan(same).stages[0].control == "no_thoughts"


def test_every_problem_is_listed(recipe_file: Path) -> None:
    error = refused("--config", recipe_file, "--experts.rank=0", "--strategy=x", "--base.nano.heads=3")
    assert "4 problems" in str(error)  # the third breaks two rules


def test_credentials_must_be_private(recipe_file: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.yaml"
    secret.write_text("token: abcdefgh\n")
    secret.chmod(0o644)
    assert "chmod 600" in str(refused("--config", recipe_file, "--tracking.credentials", secret))
    secret.chmod(0o600)
    assert load_recipe(["--config", str(recipe_file), "--tracking.credentials", str(secret)])
    secret.write_text("tokn: abcdefgh\n")
    assert "either token" in str(refused("--config", recipe_file, "--tracking.credentials", secret))


# ---------------------------------------------------------------------- S7: YAML that attacks


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("name: !!python/object/apply:os.system ['touch CANARY']\n", "line 1"),
        ("seed: 1\nname: !custom x\n", "line 2"),
        (BOMB, "aliases"),
        ("seed: 1\nname: a\nseed: 2\n", "line 3: key 'seed' is given twice, first in line 1"),
        ("experts: {rank: 1, rank: 2}\n", "line 1: key 'rank' is given twice"),
        ("name: [" * 60 + "]" * 60, "nested deeper"),
        ("name: 'open\n", "not YAML"),
        ("a: &a {b: *a}\n", "alias"),
        ("x: &x [1,1]\n" + "".join(f"k{i}: *x\n" for i in range(200)), "200 aliases"),
    ],
)
def test_s7_refused_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, wanted: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    error = refused("--config", "bad.yaml")
    assert error.code == "QG-CFG-007"
    assert wanted in str(error)
    assert not (tmp_path / "CANARY").exists()


def test_s7_huge_file_is_not_read(tmp_path: Path) -> None:
    huge = tmp_path / "huge.yaml"
    with huge.open("wb") as handle:
        handle.truncate(1 << 30)
    started = time.monotonic()
    assert refused("--config", huge).code == "QG-CFG-007"
    assert time.monotonic() - started < 1.0


def test_few_aliases_are_fine(recipe_file: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra.yaml"
    extra.write_text("experts: {train: &t {steps: 3}}\ngates: {train: *t}\n")
    recipe = load_recipe(["--config", str(recipe_file), "--config", str(extra)])
    assert (recipe.experts.train.steps, recipe.gates.train.steps) == (3, 3)


# ---------------------------------------------------------------------- no heavy imports, ranks agree


CHECK = (
    "import sys; from quietgoose.base.errors import QuietGooseError; from quietgoose.train.settings import load_recipe\n"
    "try: load_recipe(sys.argv[1:])\n"
    "except QuietGooseError as error: print(error)\n"
    "heavy = {'torch', 'transformers', 'deepspeed', 'mlflow', 'datasets'} & set(sys.modules); assert not heavy, heavy"
)


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ("", [], ""),
        ("nano_demo.yaml", [], ""),
        ("nano_demo.yaml", ["--experts.rank=0", "--evaluate.tasks.x=steps:purs-direct"], "Did you mean 'purse-direct'"),
        ("urepa_digits.yaml", ["--stages=[compare]", "--urepa.backbone.kind=sit"], "CFG-003"),
    ],
)
def test_checking_imports_no_torch(recipe_file: Path, recipe: str, options: list[str], said: str) -> None:
    path = ROOT / "launch" / "recipes" / recipe if recipe else recipe_file
    done = subprocess.run(
        [sys.executable, "-c", CHECK, "--config", str(path), *options], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert said or not done.stdout


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--seed", "abc"], "--seed abc: must be a whole number"),
        (["stray", "words"], "stray words: belongs to no option; settings are given as --section.key value"),
        (["--gates.train.steps=x", "--data.experts.one.limit", "q"], "2 problems"),
        (["--base.train.optimizer.betas=[1]"], "--base.train.optimizer.betas=[1]: must be a list of 2 values"),
        (["--compare.arms.plain=3"], "--compare.arms.plain=3: must be a mapping, as in {name: value}"),
    ],
)
def test_wrong_values_are_told_in_the_first_second(option: list[str], said: str) -> None:
    best = 1e9
    for _ in range(2):  # the better of two: the first imports what is not imported yet
        started = time.process_time()
        error = refused("--config", ROOT / "launch" / "recipes" / "nano_demo.yaml", *option)
        best = min(best, time.process_time() - started)
        assert error.code == "QG-CFG-003"
        assert said in str(error)
    assert best < 1.0


def test_arm_names_are_those_that_exist() -> None:
    from quietgoose.train.arms import ARMS

    assert set(get_args(ArmName)) == set(ARMS)


def test_recipes_know_every_router() -> None:
    from quietgoose.routing.routers import KINDS, ROUTERS
    from quietgoose.train.thought_settings import ROUTERS as EXPORTED

    assert set(get_args(RouterName)) == set(ROUTERS)
    assert set(EXPORTED) == set(KINDS)


def test_embedded_recipes_name_known_settings_only() -> None:
    from quietgoose.train.recipe import Recipe
    from quietgoose.train.safe_yaml import read_yaml
    from quietgoose.train.settings import _unknown_keys

    found = list((ROOT / "launch" / "recipes").glob("*.yaml"))
    assert found
    for path in found:
        assert _unknown_keys(read_yaml(path), Recipe, "") == []


def test_r15_ranks_that_differ_are_named(recipe_file: Path) -> None:
    facts = own_facts(load_recipe(["--config", str(recipe_file)]))
    refuse_differences([facts, dict(facts)])
    other = {**facts, "recipe experts.rank": "8", "code": "deadbeef"}
    with pytest.raises(RecipeError) as caught:
        refuse_differences([facts, other, facts])
    assert caught.value.code == "QG-DIST-004"
    assert caught.value.exit_code == 2
    assert "recipe experts.rank: 16 on rank 0, 2, 8 on rank 1" in str(caught.value)
    assert "deadbeef on rank 1" in str(caught.value)


def test_evaluation_reads_the_training_collection_unless_told_otherwise(recipe_file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "task").mkdir(parents=True)
        for split in ("train", "test"):
            row = '{"prompt": "a", "completion": " b", "target": "b"}\n'
            (tmp_path / name / "task" / f"{split}.jsonl").write_text(row)
    command = [
        "--config",
        str(recipe_file),
        "--stages",
        "[base,experts,gates,evaluate]",
        "--data.collection",
        str(tmp_path / "one"),
    ]
    assert load_recipe(command).evaluate.collection == str(tmp_path / "one")
    other = load_recipe([*command, "--evaluate.collection", str(tmp_path / "two")])
    assert other.evaluate.collection == str(tmp_path / "two")
