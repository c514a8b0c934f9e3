"""Errors carry a stable code and an exit code, and survive the trip to another rank."""

from __future__ import annotations

import pickle

import pytest
from quietgoose.base.errors import ArtifactError, ExitCode, NameRefused, QuietGooseError, StopRequested, suggest


@pytest.mark.parametrize(
    "error",
    [
        ArtifactError("adapter.safetensors: sha256 differs", code="EXP-004"),
        StopRequested("SIGTERM: stopped after step 3", saved=True),
        NameRefused("expert name '../x'"),
    ],
)
def test_an_error_crosses_ranks_unchanged(error: QuietGooseError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.exit_code, type(copy)) == (str(error), error.code, error.exit_code, type(error))


def test_codes_and_exit_codes() -> None:
    assert str(ArtifactError("x", code="EXP-004")) == "QG-EXP-004 x"
    assert StopRequested("x", saved=True).exit_code == ExitCode.STOPPED_SAVED == 75
    assert StopRequested("x", saved=False).exit_code == ExitCode.STOPPED_NOT_SAVED == 76


def test_the_nearest_name_is_suggested() -> None:
    assert suggest("phatgose", ["arrow", "phatgoose"]) == " Did you mean 'phatgoose'?"
    assert suggest("zzz", ["arrow", "phatgoose"]) == ""
