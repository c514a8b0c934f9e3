"""Images from every kind of source, batches as a pure function of the step, clear words for what is bad."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quietgoose.base.errors import DataError, RecipeError
from quietgoose.train.data.images import ImageLoader, ImageSet, open_both, open_images
from quietgoose.train.image_settings import ImageSettings


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def folder_of_images(root: Path, classes: dict[str, int], **options) -> Path:
    number = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for _ in range(count):
            picture(number, **options).save(root / name / f"{number:03d}.png")
            number += 1
    return root


def parquet(path: Path, seeds: range) -> Path:
    """Grey pictures with labels of three named classes."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    rows = {"picture": [picture(s, mode="L") for s in seeds], "label": [s % 3 for s in seeds]}
    features = Features({"picture": ImageColumn(), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def test_digits(cache: str) -> None:
    settings = ImageSettings(holdout=0.2, cache=cache)
    train, test = open_images(settings), open_images(settings, "test")
    assert len(train) + len(test) == 1797
    assert 280 < len(test) < 440
    assert train.shape == (1, 8, 8)
    assert train.num_classes == 10
    pixels = train.pixels(torch.arange(len(train)))
    assert pixels.dtype == torch.float32
    assert float(pixels.min()) == -1.0
    assert float(pixels.max()) == 1.0
    assert train.digest != test.digest
    assert open_images(settings).digest == train.digest  # found again


def test_every_byte_is_the_nearest_float_of_its_place_between_minus_one_and_one() -> None:
    rows = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    images = ImageSet(rows, np.zeros(1, dtype=np.int64), ("a",), "digest", flip=True)
    found = images.pixels(torch.tensor([0])).flatten()
    for byte, value in enumerate(found.numpy()):
        exact = Fraction(2 * byte - 255, 255)
        error = abs(Fraction(float(value)) - exact)
        for beside in (np.nextafter(value, np.float32(-2)), np.nextafter(value, np.float32(2))):
            assert error < abs(Fraction(float(beside)) - exact), byte
    assert torch.equal(
        images.pixels(torch.tensor([0]), torch.tensor([True])), images.pixels(torch.tensor([0])).flip(-1)
    )


def test_a_folder_by_class_with_its_own_test_split(tmp_path: Path, cache: str) -> None:
    folder_of_images(tmp_path / "set" / "train", {"cat": 5, "ant": 4})
    folder_of_images(tmp_path / "set" / "test", {"cat": 2})
    settings = ImageSettings(source=str(tmp_path / "set"), cache=cache)
    train, test = open_images(settings), open_images(settings, "test")
    assert train.classes == ("ant", "cat")
    assert train.labels.tolist() == [0] * 4 + [1] * 5
    assert test.labels.tolist() == [1, 1]
    first = np.asarray(Image.open(sorted((tmp_path / "set/train/ant").iterdir())[0])).transpose(2, 0, 1)
    assert np.array_equal(train.rows[0], first)
    folder_of_images(tmp_path / "set" / "test2", {"dog": 1})
    with pytest.raises(DataError, match=r"DATA-041.*'dog' is not among the training classes"):
        open_images(ImageSettings(source=str(tmp_path / "set"), test_split="test2", cache=cache))


def test_parquet_by_datasets(tmp_path: Path, cache: str) -> None:
    parquet(tmp_path / "train.parquet", range(10))
    parquet(tmp_path / "test.parquet", range(10, 14))
    settings = ImageSettings(source=str(tmp_path / "train.parquet"), test=str(tmp_path / "test.parquet"), cache=cache)
    train, test = open_images(settings), open_images(settings, "test")
    assert train.shape == (1, 8, 8)  # grey, as its first image is
    assert train.classes == ("a", "b", "c")
    assert train.labels.tolist() == [s % 3 for s in range(10)]
    assert np.array_equal(train.rows[4, 0], np.asarray(picture(4, mode="L")))
    assert len(test) == 4
    with pytest.raises(DataError, match=r"DATA-040.*'lable' is no column.*Did you mean 'label'"):
        open_images(ImageSettings(source=settings.source, label_column="lable", cache=cache))


def test_a_saved_dataset_with_splits_and_without_labels(tmp_path: Path, cache: str) -> None:
    from datasets import Dataset, DatasetDict

    made = {part: Dataset.from_dict({"image": [picture(s) for s in rows]}) for part, rows in
            (("train", range(6)), ("test", range(6, 9)))}  # fmt: skip
    DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    train = open_images(ImageSettings(source=str(tmp_path / "saved"), cache=cache))
    assert (len(train), train.num_classes, train.shape) == (6, 1, (3, 8, 8))


def test_a_folder_of_parquet_files_in_the_hub_s_layout(tmp_path: Path, cache: str, monkeypatch) -> None:
    import datasets
    from datasets import Dataset

    loads, real = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: loads.append(a) or real(*a))

    (tmp_path / "set" / "data").mkdir(parents=True)
    for part, rows in (("train", range(6)), ("test", range(6, 9))):
        cells = {"img": [picture(s) for s in rows], "label": [s % 2 for s in rows]}
        Dataset.from_dict(cells).to_parquet(str(tmp_path / "set" / "data" / f"{part}-00000-of-00001.parquet"))
    settings = ImageSettings(source=str(tmp_path / "set"), cache=cache)
    train, test = open_images(settings), open_images(settings, "test")
    assert (len(train), len(test), train.num_classes) == (6, 3, 2)
    loads.clear()
    train, test = open_both(settings)
    assert (len(train), len(test), len(loads)) == (6, 3, 1)
    assert np.array_equal(train.rows[5], np.asarray(picture(5)).transpose(2, 0, 1))
    with pytest.raises(DataError, match=r"DATA-040.*has no split 'trian'; it has train, test"):
        open_images(ImageSettings(source=str(tmp_path / "set"), split="trian", cache=cache))


def test_sizes_colours_and_limits(tmp_path: Path, cache: str) -> None:
    root = folder_of_images(tmp_path / "set", {"x": 6}, size=(12, 9))
    settings = ImageSettings(source=str(root), size=8, colour="grey", holdout=0.3, limit=2, cache=cache)
    train = open_images(settings)
    assert (len(train), train.shape) == (2, (1, 8, 8))
    picture(99, size=(10, 10)).save(root / "x" / "z.png")
    with pytest.raises(DataError, match=r"DATA-043.*z\.png: is 10x10 pixels, the first image 12x9; set images.size"):
        open_images(ImageSettings(source=str(root), holdout=0.3, cache=cache))


def test_a_bad_image_is_named_or_left_out(tmp_path: Path, cache: str) -> None:
    root = folder_of_images(tmp_path / "set", {"x": 20})
    (root / "x" / "005.png").write_bytes(b"not an image")
    torn = (root / "x" / "007.png").read_bytes()
    (root / "x" / "007.png").write_bytes(torn[: len(torn) // 2])
    settings = ImageSettings(source=str(root), holdout=0.3, cache=cache)
    with pytest.raises(DataError, match=r"DATA-042.*005\.png: is no image that can be decoded"):
        open_images(settings)
    settings.on_bad_image = "skip"
    train, test = open_images(settings), open_images(settings, "test")
    assert train.skipped + test.skipped == 2
    assert len(train) + len(test) == 18


def test_a_source_that_is_not_there(tmp_path: Path, cache: str) -> None:
    with pytest.raises(DataError, match=r"DATA-040.*no such file or folder"):
        open_images(ImageSettings(source=str(tmp_path / "nothing"), cache=cache))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"DATA-040.*no image in it"):
        open_images(ImageSettings(source=str(tmp_path / "empty"), cache=cache))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"DATA-040.*torn\.parquet: cannot be read as parquet"):
        open_images(ImageSettings(source=str(tmp_path / "torn.parquet"), cache=cache))


def test_batches_depend_on_the_step_alone_and_not_on_the_number_of_processes(cache: str) -> None:
    images = open_images(ImageSettings(flip=True, limit=50, cache=cache))
    whole = ImageLoader(images, 24, seed=3)
    parts = [ImageLoader(images, 24, 3, rank, 3) for rank in range(3)]
    for step in (0, 1, 7, 2):  # any order: nothing is remembered
        one, split = whole.at(step), [part.at(step) for part in parts]
        for name in ("images_BCHW", "labels_B", "index_B", "flipped_B"):
            assert torch.equal(getattr(one, name), torch.cat([getattr(batch, name) for batch in split]))
    assert torch.equal(ImageLoader(images, 24, 3).at(5).index_B, whole.at(5).index_B)
    assert not torch.equal(ImageLoader(images, 24, 4).at(5).index_B, whole.at(5).index_B)
    epochs = torch.cat([whole.at(step).index_B for step in range(25)])[:600].view(12, 50)
    assert torch.equal(epochs.sort(1).values, torch.arange(50).expand(12, 50))  # every row once an epoch
    assert not torch.equal(epochs[0], epochs[1])
    with pytest.raises(RecipeError, match=r"CFG-091.*choose a multiple of 5"):
        ImageLoader(images, 24, 3, 0, 5)


def test_mirrored_rows_are_told_and_mirrored(cache: str) -> None:
    images = open_images(ImageSettings(flip=True, limit=200, cache=cache))
    batch = ImageLoader(images, 200, seed=0).at(0)
    assert 60 < int(batch.flipped_B.sum()) < 140
    plain = images.pixels(batch.index_B)
    expected = torch.where(batch.flipped_B[:, None, None, None], plain.flip(-1), plain)
    assert torch.equal(batch.images_BCHW, expected)
    never = open_images(ImageSettings(limit=200, cache=cache))
    assert not ImageLoader(never, 200, seed=0).at(0).flipped_B.any()
    assert never.digest == images.digest


def test_labels_for_samples_have_the_data_s_proportions(tmp_path: Path, cache: str) -> None:
    root = folder_of_images(tmp_path / "set" / "train", {"rare": 10, "usual": 30})
    folder_of_images(tmp_path / "set" / "test", {"rare": 1, "usual": 1})
    images = open_images(ImageSettings(source=str(root.parent), cache=cache))
    labels = images.labels_for(100, seed=0)
    assert torch.bincount(labels).tolist() == [25, 75]
    assert not torch.equal(labels, labels.sort().values)


def test_latents_of_a_local_autoencoder(tmp_path: Path, cache: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    settings = ImageSettings(vae=str(tmp_path / "vae"), flip=True, limit=24, holdout=0.1, cache=cache)
    images = open_images(settings)
    assert images.pixel_shape == (1, 8, 8)
    assert images.shape == (4, 4, 4)
    loader = ImageLoader(images, 24, seed=0)
    batch = loader.at(0)
    assert torch.equal(batch.images_BCHW, loader.at(0).images_BCHW)
    vae.requires_grad_(False)
    posterior = vae.encode(images.pixels(batch.index_B, batch.flipped_B).expand(-1, 3, -1, -1)).latent_dist
    z = (batch.images_BCHW / vae.config.scaling_factor - posterior.mean) / posterior.std
    assert abs(float(z.mean())) < 0.1
    assert abs(float(z.std()) - 1.0) < 0.1
    other = loader.at(1)  # the next epoch draws afresh from the same posteriors
    same_row = other.images_BCHW[other.index_B.argsort()] - batch.images_BCHW[batch.index_B.argsort()]
    assert float(same_row.abs().mean()) > 1e-3
    decoded = images.decode(batch.images_BCHW)
    assert decoded.shape == (24, 1, 8, 8)
    assert float(decoded.abs().max()) <= 1.0
    with pytest.raises(DataError, match=r"DATA-044.*needs config.json"):
        open_images(ImageSettings(vae=str(tmp_path), cache=cache))


def test_both_parts_read_every_source_once(tmp_path: Path, cache: str, monkeypatch) -> None:
    from quietgoose.train.data import image_sources, latents

    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, sample_size=8, latent_channels=4
    )
    vae.save_pretrained(tmp_path / "vae")
    hashed, opened = [], []
    real = image_sources.sha256_file, latents.load_vae
    monkeypatch.setattr(image_sources, "sha256_file", lambda path: hashed.append(path.name) or real[0](path))
    monkeypatch.setattr(latents, "load_vae", lambda *a: opened.append(a) or real[1](*a))
    source, held = parquet(tmp_path / "train.parquet", range(5)), parquet(tmp_path / "test.parquet", range(5, 8))
    settings = ImageSettings(source=str(source), test=str(held), vae=str(tmp_path / "vae"), cache=cache)
    train, test = open_both(settings)
    assert (hashed, len(opened)) == (["train.parquet", "test.parquet"], 1)
    assert (len(train), len(test), train.shape, test.shape) == (5, 3, (4, 8, 8), (4, 8, 8))
    for images, part in ((train, "train"), (test, "test")):
        alone = open_images(settings, part)
        assert alone.digest == images.digest
        place_B = torch.arange(len(images))
        drawn = [one.inputs(place_B, torch.zeros(len(one), dtype=torch.bool), 3, place_B) for one in (images, alone)]
        assert torch.equal(*drawn)
    assert hashed == ["train.parquet", "test.parquet"]  # remembered
    parquet(source, range(6))
    assert len(open_both(settings)[0]) == 6
    assert hashed == ["train.parquet", "test.parquet", "train.parquet"]


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the CIFAR-10 parquet files are not here")
def test_cifar_parquet(cache: str) -> None:
    settings = ImageSettings(
        source=str(SHARED / "train.parquet"), test=str(SHARED / "test.parquet"), limit=300, flip=True, cache=cache
    )
    train = open_images(settings)
    assert (len(train), train.shape, train.num_classes) == (300, (3, 32, 32), 10)
