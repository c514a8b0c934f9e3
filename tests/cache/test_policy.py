"""A policy is refused before it runs, or it is what it says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from quietgoose.base.errors import RecipeError
from quietgoose.cache import PRESETS, Policy, resolve_policy
from quietgoose.kernels.saliency import SaliencyMode


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"salient_ratio": 1.2}, "salient_ratio is 1.2"),
        ({"salient_ratio": float("nan")}, "salient_ratio is nan"),
        ({"salient_ratio": True}, "salient_ratio is True"),
        ({"high_bits": 3}, "high_bits is 3; allowed: 2, 4 or 16"),
        ({"high_bits": 2, "low_bits": 4}, "low_bits is 4; allowed: at most high_bits, which is 2"),
        ({"probe_recent": 0.0, "probe_random": 0.0}, "probe_recent"),
        ({"probe_recent": 0.7, "probe_random": 0.7}, "probe_recent"),
        ({"probe_cap": 0}, "probe_cap is 0"),
        ({"flush_every": 0}, "flush_every is 0; allowed: an integer at least 1"),
        ({"flush_every": 12.5}, "flush_every is 12.5"),
        ({"sink_tokens": -1}, "sink_tokens is -1"),
        ({"max_query": 17}, "max_query is 17; allowed: an integer at least 1 and at most 16"),
        ({"saliency": "eq9"}, "Did you mean 'eq8'"),
        ({"sixteen_bit_layers": 3}, "sixteen_bit_layers is 3"),
        ({"sixteen_bit_layers": (-1,)}, "sixteen_bit_layers is -1"),
        ({"rounding": "up"}, "rounding is 'up'; allowed: nearest or queries"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Policy(**settings)
    assert words in str(caught.value)
    assert "CFG-050" in str(caught.value)


def test_dict_round_trip_is_json() -> None:
    policy = Policy(salient_ratio=0.5, saliency=SaliencyMode.ROW_LENGTH, sixteen_bit_layers=(0, 3), seed=7)
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_misspelt_setting_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'salient_ratio'"):
        resolve_policy({"salient_ration": 0.5})
    with pytest.raises(RecipeError, match="Did you mean 'paper'"):
        resolve_policy("papr")


def test_resolving() -> None:
    assert resolve_policy(None) == resolve_policy("default") == Policy()
    assert resolve_policy("paper").salient_ratio == 0.6
    assert resolve_policy({"preset": "paper", "seed": 3}) == Policy(salient_ratio=0.6, seed=3)
    policy = Policy(seed=9)
    assert resolve_policy(policy) is policy
    with pytest.raises(RecipeError, match="policy is 4"):
        resolve_policy(4)  # type: ignore[arg-type]


def test_presets_are_what_they_are_called() -> None:
    assert set(PRESETS) == {"default", "paper", "quality", "small", "lossless"}
    assert PRESETS["paper"].sink_tokens == PRESETS["paper"].recent_tokens == 0
    assert not PRESETS["lossless"].splits
    assert PRESETS["lossless"].high_bits == 16


def test_sixteen_bit_layers_are_lossless() -> None:
    policy = Policy(sixteen_bit_layers=(0,), sink_tokens=2)
    assert policy.for_layer(1) is policy
    first = policy.for_layer(0)
    assert (first.high_bits, first.salient_ratio, first.sink_tokens) == (16, 1.0, 2)
    assert not first.uses_attention


def test_importing_the_package_imports_no_transformers() -> None:
    code = "import sys, quietgoose.cache; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
