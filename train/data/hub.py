"""Datasets by their name on the hub. Asks the hub once whether it answers; if it does not, only what was fetched before counts, and
no request is tried again (datasets alone tries six times, half a minute, before it says so).

Called by rows.py and image_sources.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

SECONDS = 10.0


def load_hub_dataset(name: str, **options: Any) -> Any:
    """`datasets.load_dataset` of `NAME` or `NAME:CONFIG`; raises what that raises. No code of a dataset is run."""
    import datasets

    path, _, configuration = name.partition(":")
    with nullcontext() if hub_answers(path) else without_network():
        return datasets.load_dataset(path, configuration or None, **options)


def hub_answers(path: str) -> bool:
    """Whether there is an answer about a dataset, be it that there is none of that name."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(path, timeout=SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return True  # load_dataset says what is wrong
    except Exception:  # of whichever client huggingface_hub comes with: no route, no name, no time, offline by setting
        return False
    return True


@contextmanager
def without_network() -> Iterator[None]:
    """The libraries of the hub read their caches only."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
