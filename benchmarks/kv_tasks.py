"""Material for judging a KV cache: windows of text, and retrieval prompts whose rows all have one length.

    python benchmarks/kv_tasks.py --model MODEL        # prints one prompt of every cell

Rows of one length need no padding, so no method is helped or hurt by how it treats padding. Retrieval answers are digits;
the tokenizer must split them one by one (SmolLM2's and Llama 2's do). Three tasks, all within reach of a 135M model:

    passkey   one sentence with a five-digit key at a random depth of `length` tokens of filler
    codes     `lines` lines "The code of <word> is 4821.", one is asked for
    lines     LongEval's line retrieval (Li et al. 2023), "line <word>-<word>: REGISTER_CONTENT is <48213>"

After the lines comes filler (`tail_tokens`), so that no method can keep the answer just by keeping recent tokens.
Called by kv_quality.py.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SUFFIXES = (".txt", ".md", ".rst", ".gz")
CHARACTERS_PER_TOKEN = 6  # read at least this much text for a token


@dataclass(frozen=True)
class Windows:
    """tokens int64 [N, prefix + continuation]; source [N] names where a window comes from."""

    tokens: Tensor
    source: list[str]
    prefix: int


@dataclass(frozen=True)
class Cell:
    """One retrieval task at one size. int64 [N, length] each; rows correspond."""

    name: str
    context: Tensor
    question: Tensor
    answer: Tensor


def documents(path: Path | None) -> Iterator[str]:
    """Texts of a file, of the text files in a folder, or docstrings of Python's standard library."""
    if path is None:
        yield from docstrings()
        return
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"--text {path}: no {', '.join(SUFFIXES)} file there")
    for file in files:
        yield (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8")


def docstrings() -> Iterator[str]:
    """Docstrings of more than 200 characters, module by module, of the running Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield "\n\n".join(text for text in texts if text and len(text) > 200)


def text_windows(tokenizer: Any, text: Path | None, count: int, prefix: int, continuation: int) -> Windows:
    """`count` windows one after the other: half from `text`, half docstrings; all docstrings if `text` is None.

    Raises:
        ValueError: the texts are too short for that many.
    """
    sources = {"docstrings": None} if text is None else {text.name.split(".")[0]: text, "docstrings": None}
    found: list[Tensor] = []
    names: list[str] = []
    for i, (name, path) in enumerate(sources.items()):
        wanted = count - len(found) if i + 1 == len(sources) else (count + 1) // 2
        tokens = _tokens(tokenizer, path, wanted * (prefix + continuation))
        rows = tokens[: len(tokens) // (prefix + continuation) * (prefix + continuation)].view(
            -1, prefix + continuation
        )
        found.extend(rows[:wanted])
        names.extend([name] * min(wanted, len(rows)))
    if len(found) < count:
        raise ValueError(
            f"--windows {count}: the texts give {len(found)} of {prefix + continuation} tokens; name more with --text"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()  # batches mix the sources
    return Windows(torch.stack([found[i] for i in order]), [names[i] for i in order], prefix)


def _tokens(tokenizer: Any, path: Path | None, wanted: int) -> Tensor:
    parts: list[int] = []
    for text in documents(path):
        for start in range(0, len(text), 100_000):
            parts += tokenizer.encode(text[start : start + 100_000], add_special_tokens=False)
            if len(parts) >= wanted:
                return torch.tensor(parts[:wanted])
    return torch.tensor(parts)


class TaskMaker:
    """Builds cells for one tokenizer; the same seed gives the same rows."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.words = self._words()
        self.filler = self.encode(" " + FILLER)
        if len(self.encode("12345")) != 5:
            raise ValueError("tokenizer: does not split digits one by one, so answers cannot be scored by digit")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def passkey(self, length: int, samples: int) -> Cell:
        rows = []
        for draw in self._draws(f"passkey{length}", samples):
            key = f"{draw.randrange(10**5):05d}"
            start = self.encode("There is an important key hidden in this text. Find it and remember it.")
            needle = self.encode(f" The pass key is {key}. Remember it. {key} is the pass key.")
            space = length - len(start) - len(needle)
            depth = draw.randrange(space // 20, space * 9 // 10)
            question = self.encode(f"\nWhat is the pass key? The pass key is {key}")
            rows.append((start + self._fill(depth) + needle + self._fill(space - depth), question[:-5], question[-5:]))
        return self._cell(f"passkey {length}", rows)

    def codes(self, lines: int, samples: int, tail_tokens: int = 160) -> Cell:
        rows = []
        for draw in self._draws(f"codes{lines}", samples):
            words = draw.sample(self.words, lines)
            codes = [f"{draw.randrange(10**4):04d}" for _ in words]
            asked = draw.randrange(lines)
            text = "Remember these codes.\n" + "".join(f"The code of {w} is {c}.\n" for w, c in zip(words, codes))
            question = self.encode(f"\nThe code of {words[asked]} is {codes[asked]}")
            rows.append((self.encode(text) + self._fill(tail_tokens), question[:-4], question[-4:]))
        return self._cell(f"codes {lines}", rows)

    def lines(self, lines: int, samples: int, tail_tokens: int = 160) -> Cell:
        rows = []
        for draw in self._draws(f"lines{lines}", samples):
            words = draw.sample(self.words, 2 * lines)
            names = [f"{first}-{second}" for first, second in zip(words[::2], words[1::2])]
            values = [f"{draw.randrange(10**5):05d}" for _ in names]
            asked = draw.randrange(lines)
            text = "Below is a record of lines. Each line has a register content.\n"
            text += "".join(f"line {n}: REGISTER_CONTENT is <{v}>\n" for n, v in zip(names, values))
            question = self.encode(f"\nline {names[asked]}: REGISTER_CONTENT is <{values[asked]}")
            rows.append((self.encode(text) + self._fill(tail_tokens), question[:-5], question[-5:]))
        return self._cell(f"lines {lines}", rows)

    def by_name(self, name: str, samples: int) -> Cell:
        """`passkey 1024`, `codes 10`, `lines 5`."""
        kind, size = name.split()
        return {"passkey": self.passkey, "codes": self.codes, "lines": self.lines}[kind](int(size), samples)

    def _fill(self, count: int) -> list[int]:
        return (self.filler * (count // len(self.filler) + 1))[:count]

    def _draws(self, name: str, samples: int) -> Iterator[random.Random]:
        return (random.Random(f"{self.seed} {name} {i}") for i in range(samples))

    def _words(self) -> list[str]:
        """Lower-case words that are one token after a space and one after a hyphen, most frequent first."""
        found = []
        for index in range(300, min(16_000, len(self.tokenizer))):
            word = self.tokenizer.decode([index])
            name = word[1:]
            if not (word[:1] == " " and name.isascii() and name.isalpha() and name.islower() and 4 <= len(name) <= 9):
                continue
            if len(self.encode(f"-{name}:")) == 3 and len(self.encode(f" {name}-")) == 2:
                found.append(name)
        if len(found) < 100:
            raise ValueError(f"tokenizer: only {len(found)} words are one token, 100 are needed")
        return found

    @staticmethod
    def _cell(name: str, rows: list[tuple[list[int], list[int], list[int]]]) -> Cell:
        parts = list(zip(*rows))
        for part in parts:
            if len({len(row) for row in part}) != 1:
                raise ValueError(f"{name}: rows differ in length, {sorted({len(row) for row in part})}")
        context, question, answer = (torch.tensor(part) for part in parts)
        return Cell(name, context, question, answer)


def main() -> None:
    from quietgoose.train.base_models import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder in Hugging Face format")
    maker = TaskMaker(load_tokenizer(parser.parse_args().model))
    for name in ("passkey 256", "codes 5", "lines 5"):
        cell = maker.by_name(name, 1)
        for part in ("context", "question", "answer"):
            print(f"{name}, {part}: {maker.tokenizer.decode(getattr(cell, part)[0])!r}")


if __name__ == "__main__":
    main()
