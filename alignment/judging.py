"""What a judge says of samples: distances, precision and recall, class accuracy, nearest training images, each beside its floors.

A reference is `count` training images. Its floors are the same numbers for `count` other training images and for `count`
held-out ones: what samples that were perfect would get. Samples are judged only in the reference's count.

    reference = Reference.of(judge, train, test, settings)      # once for all arms
    reference.score(images_NCHW uint8, labels_N)                # Mapping[str, float]
    reference.floors                                            # {"train": ..., "test": ...}

Called by train/evaluate_images.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..base.errors import DataError
from ..base.seeding import generator
from .distances import Moments, frechet, frechet_spread, kernel_distance, nearest, precision_recall
from .fitting import Pixels
from .judge import Judge

PORTION = 1000
FEWEST = 16
CLOSE = 0.01
Features = Callable[[Tensor], Tensor]


class Measures(Protocol):
    """The numbers of train/image_settings.py's ImageEvaluation that are used here."""

    count: int
    neighbours: int
    subsets: int
    subset_size: int
    bootstrap: int


@dataclass(frozen=True)
class Reference:
    """Real images as the judge sees them. `count`: samples to judge, and real images on the other side. `centre_D`, `scale`:
    taken from the judge's features, so that those of the training images have mean 0 and on average unit variance.
    `inception`: a second network whose distance may be called FID."""

    judge: Judge
    settings: Measures
    count: int
    centre_D: Tensor
    scale: float
    features_ND: Tensor
    all_train_MD: Tensor
    close: float
    typical: float
    inception: tuple[Features, Moments] | None
    moments: Moments
    floors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @staticmethod
    def of(
        judge: Judge, train: Pixels, test: Pixels, settings: Measures, count: int, inception: Features | None = None
    ) -> Reference:
        """With its floors. The count is lowered to half the training or all held-out images, where those are fewer.
        DataError DATA-045 below 16."""
        count = judged_count(train, test, count)
        order = torch.randperm(len(train), generator=generator(0, "reference", "train"))
        held = torch.randperm(len(test), generator=generator(0, "reference", "test"))[:count]
        features_MD = _features_of(judge, train, torch.arange(len(train)))
        scale = float(features_MD.double().var(0).mean().sqrt().clamp_min(1e-12))
        centre_D = features_MD.mean(0)
        features_MD = (features_MD - centre_D) / scale
        held_ND = (_features_of(judge, test, held) - centre_D) / scale
        distance_N, _ = nearest(held_ND, features_MD)
        a, b = order[:count], order[count : 2 * count]
        twin = None
        if inception is not None:
            twin = (inception, Moments.of(_outside(inception, train, a, judge.device)))
        device_a = features_MD[a.to(features_MD.device)]
        made = Reference(
            judge, settings, count, centre_D, scale, device_a, features_MD, float(distance_N.quantile(CLOSE)),
            float(distance_N.median()), twin, Moments.of(device_a),
        )  # fmt: skip
        floors = {"train": made.score(_bytes_of(train, b, judge.device), train.labels[b], against_self=b)}
        floors["test"] = made.score(_bytes_of(test, held, judge.device), test.labels[held])
        object.__setattr__(made, "floors", floors)
        return made

    def score(self, images_NCHW: Tensor, labels_N: Tensor, against_self: Tensor | None = None) -> dict[str, float]:
        """Of `count` uint8 images. `against_self`: they are these training rows, whose nearest image is then left unsaid.

        jfd, jfd_sd            Frechet distance in the judge's features, and its bootstrap standard deviation
        kid, kid_se            kernel distance and its standard error
        precision, recall      by k-nearest-neighbour balls
        class_accuracy         share whose class by the judge is the label (judges of classes only)
        nearest_ratio          median distance to the nearest training image, over that of held-out images; below 1: closer
        copies                 share nearer to a training image than all but one per cent of held-out images; 0.01 expected
        fid                    with Inception weights only
        """
        if len(images_NCHW) != self.count:
            raise DataError(
                f"{len(images_NCHW)} samples against a reference of {self.count}: distances at different counts say nothing",
                code="DATA-045",
            )
        images = as_images(images_NCHW.to(self.judge.device))
        logits_NC, features_ND = self.judge.look(images)
        features_ND = (features_ND - self.centre_D) / self.scale
        options, random = self.settings, generator(0, "judging")
        kid, kid_se = kernel_distance(features_ND, self.features_ND, options.subsets, options.subset_size, random)
        precision, recall = precision_recall(features_ND, self.features_ND, options.neighbours)
        found = {
            "jfd": frechet(Moments.of(features_ND), self.moments),
            "jfd_sd": frechet_spread(features_ND, self.moments, options.bootstrap, random),
            "kid": kid,
            "kid_se": kid_se,
            "precision": precision,
            "recall": recall,
        }
        if self.judge.task == "classes":
            found["class_accuracy"] = float((logits_NC.argmax(1).cpu() == labels_N.cpu()).double().mean())
        if against_self is None:
            distance_N, _ = nearest(features_ND, self.all_train_MD)
            found["nearest_ratio"] = float(distance_N.median()) / max(self.typical, 1e-12)
            found["copies"] = float((distance_N < self.close).double().mean())
        if self.inception is not None:
            network, moments = self.inception
            outside = torch.cat([network(part.to(self.judge.device)) for part in images_NCHW.split(PORTION)])
            found["fid"] = frechet(Moments.of(outside), moments)
        return found


def judged_count(train: Pixels, test: Pixels, count: int) -> int:
    """How many samples are judged: at most half the training and all held-out images. DataError DATA-045 below 16."""
    count = min(count, len(train) // 2, len(test))
    if count < FEWEST:
        raise DataError(
            f"evaluate.images: {len(train)} training and {len(test)} held-out images allow {count} samples; judging needs {FEWEST}: "
            "set images.test or images.holdout, or leave 'evaluate' out of stages",
            code="DATA-045",
        )
    return count


def as_bytes(images_BCHW: Tensor) -> Tensor:
    """uint8 from [-1, 1], rounded: what a file would hold."""
    return ((images_BCHW.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def as_images(bytes_BCHW: Tensor) -> Tensor:
    """fp32 in [-1, 1] from uint8."""
    return bytes_BCHW.float() / 127.5 - 1.0


def _features_of(judge: Judge, images: Pixels, rows: Tensor) -> Tensor:
    parts = [judge.look(images.pixels(index_B, None, judge.device))[1] for index_B in rows.split(PORTION)]
    return torch.cat(parts)


def _bytes_of(images: Pixels, rows: Tensor, device: torch.device) -> Tensor:
    return torch.cat([as_bytes(images.pixels(index_B, None, device)) for index_B in rows.split(PORTION)])


def _outside(network: Features, images: Pixels, rows: Tensor, device: torch.device) -> Tensor:
    return torch.cat([network(as_bytes(images.pixels(part, None, device))) for part in rows.split(PORTION)])
