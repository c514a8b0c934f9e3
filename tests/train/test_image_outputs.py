"""What leaves an image run: grids of samples in MLflow, and an export whose U-Net is diffusers'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from quietgoose.alignment.backbone import build_backbone
from quietgoose.base.distributed import World
from quietgoose.base.errors import ArtifactError
from quietgoose.base.files import read_json
from quietgoose.train.export_images import export_sampler
from quietgoose.train.image_grid import grid_image, save_png
from quietgoose.train.image_sampling import draw_samples, velocity_of
from quietgoose.train.run_folder import RunFolder
from quietgoose.train.settings import load_recipe
from quietgoose.train.sinks import Sinks
from quietgoose.train.unet_folder import UNetCard, load_unet, save_unet

import quietgoose

DIGITS = Path(__file__).resolve().parents[2] / "launch/recipes/urepa_digits.yaml"
CPU = torch.device("cpu")
UNET2D = {
    "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 16,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip


def test_grids_of_samples_reach_mlflow_and_weights_do_not(tmp_path: Path) -> None:
    """As the pipeline ends a stage: its result, sent to a store on disk."""
    from mlflow.tracking import MlflowClient

    run = tmp_path / "run"
    run.mkdir()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = ["--output", str(run), "--tracking.uri", uri, "--tracking.system_metrics", "false"]
    recipe = load_recipe(["--config", str(DIGITS), *words])
    folder = RunFolder(run)
    random = torch.Generator().manual_seed(0)
    grids = {
        name: grid_image(torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=random), 10)
        for name in ("00000300_average_ode", "00000600_average_ode")
    }
    with Sinks(recipe, run, World(0, 1, 0)) as sinks, sinks.stage("evaluate"):
        with folder.staging("evaluate") as out:
            (out / "image_results.md").write_text("| JFD |\n")
            (out / "average.safetensors").write_bytes(b"weights")
            for name, picture in grids.items():
                save_png(picture, out / "samples" / f"{name}.png")
        folder.seal("evaluate", {})
        sinks.result("evaluate", folder.result("evaluate"))
    client = MlflowClient(uri)
    child = read_json(run / "run.json")["stages"]["evaluate"]
    assert {one.path for one in client.list_artifacts(child, "evaluate")} == {
        "evaluate/image_results.md",
        "evaluate/samples",
    }
    sent = {one.path for one in client.list_artifacts(child, "evaluate/samples")}
    assert sent == {f"evaluate/samples/{name}.png" for name in grids}
    for name, picture in grids.items():
        got = Image.open(client.download_artifacts(child, f"evaluate/samples/{name}.png", str(tmp_path)))
        assert got.size == picture.size
        assert got.tobytes() == picture.tobytes()


def test_an_export_of_diffusers_u_net_is_loaded_and_draws_the_same_images(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra 'images' is not installed")
    words = [
        "--urepa.backbone",
        json.dumps({"kind": "diffusers", "diffusers": UNET2D}),
        "--output",
        str(tmp_path / "run"),
    ]
    recipe = load_recipe(["--config", str(DIGITS), *words])
    unet = build_backbone(recipe.urepa.backbone, (1, 8, 8), 10, 0)
    random = torch.Generator().manual_seed(0)
    trained = {
        f"{kind}backbone.{name}": p.detach() + 0.05 * torch.randn(p.shape, generator=random)
        for kind in ("average/", "")
        for name, p in unet.named_parameters()
    }
    source, export = tmp_path / "urepa", tmp_path / "export"
    source.mkdir()
    export.mkdir()
    classes = tuple(map(str, range(10)))
    save_unet(UNetCard(recipe.urepa.backbone, (1, 8, 8), classes, "data", 5, "mid_block", "teacher"), trained, source)
    export_sampler(export, source, recipe, tmp_path / "none", 1)
    loaded = quietgoose.load(export, device="cpu")
    assert loaded.card.backbone == recipe.urepa.backbone
    own = dict(loaded.unet.named_parameters())
    assert {f"average/backbone.{name}" for name in own} == {name for name in trained if name.startswith("average/")}
    assert all(torch.equal(own[name], trained[f"average/backbone.{name}"]) for name in own)
    images = loaded.sample(6, seed=4, steps=3, method="euler", guidance=2.0, batch=6)
    settings = recipe.evaluate.images.samplers["ode"]
    settings.steps, settings.guidance, settings.batch = 3, 2.0, 6
    again = load_unet(source)
    drawn = draw_samples(
        velocity_of(again, CPU, half=False), torch.arange(6), (1, 8, 8), settings, 10, 4, CPU, lambda images: images
    )
    assert images.shape == (6, 1, 8, 8)
    assert torch.equal(images, drawn)
    assert not torch.equal(images, loaded.sample(6, seed=5, steps=3, method="euler", guidance=2.0, batch=6))

    manifest = read_json(export / "quietgoose.json")
    manifest["unet"]["backbone"]["diffusers"]["block_out_channels"] = [16, 16]
    (export / "quietgoose.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"EXP-004 .*tensors of another U-Net"):
        quietgoose.load(export, device="cpu")
