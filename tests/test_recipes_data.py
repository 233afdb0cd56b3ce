"""The data modules of the recipes: what a batch holds, against images made by hand."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch
import torchvision.datasets
from image_files import arrays, image_folder, npz
from torchvision.datasets import utils

from examples.image_classification import (
    Cifar10DataModule,
    ImageNetDataModule,
    Stl10DataModule,
    SvhnDataModule,
    data,
)


def by_hand(image, mean, std):
    """One image `(H, W, 3)` as the network gets it, pixel by pixel, in float64."""
    height, width, _ = image.shape
    out = np.empty((3, height, width))
    for c in range(3):
        for i in range(height):
            for j in range(width):
                out[c, i, j] = (float(image[i, j, c]) - mean[c]) / std[c]
    return out


CIFAR = ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
HALF = ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
STORED = [
    pytest.param(Cifar10DataModule, 32, CIFAR, 4, "reflect", True, id="cifar10"),
    pytest.param(SvhnDataModule, 32, HALF, 2, "constant", False, id="svhn"),
    pytest.param(Stl10DataModule, 96, HALF, 4, "constant", True, id="stl10"),
]


@pytest.mark.parametrize(("kind", "side", "norm", "pad", "border", "mirrors"), STORED)
def test_stored_images_are_augmented_as_said(kind, side, norm, pad, border, mirrors, tmp_path):
    given = arrays(side)
    module = kind(path=npz(tmp_path, **given), batch_size=4)
    module.setup("fit")

    x, y = next(iter(module.val_dataloader()))
    assert x.dtype == torch.float32
    assert x.shape == (4, 3, side, side)
    assert y.tolist() == given["y_test"].tolist()
    for image, raw in zip(x, given["x_test"], strict=True):
        np.testing.assert_allclose(image, by_hand(raw, *norm), rtol=0, atol=2e-6)  # float32
    if norm == HALF:
        assert -1 <= x.min() < -0.9 < 0.9 < x.max() <= 1

    sizes = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = np.pad(given["x_train"], sizes, mode=border)
    seen = set()
    for _ in range(10):
        for x, y in module.train_dataloader():
            pixels = (x * module.parts.train.std + module.parts.train.mean).round().byte()
            for image, label in zip(pixels.permute(0, 2, 3, 1).numpy(), y, strict=True):
                seen.add(_origin(image, padded[label], pad))
    for axis in (0, 1):
        assert {origin[axis] for origin in seen} == set(range(2 * pad + 1))
    assert {mirrored for *_, mirrored in seen} == ({False, True} if mirrors else {False})


def _origin(image, padded, pad):
    """Where in a padded image this one was cut, and whether it was mirrored."""
    side = len(image)
    for mirrored in (False, True):
        straight = image[:, ::-1] if mirrored else image
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                if np.array_equal(padded[top : top + side, left : left + side], straight):
                    return top, left, mirrored
    raise AssertionError("the image is no crop of the padded original")


@pytest.mark.parametrize(("kind", "side"), [p.values[:2] for p in STORED])
def test_stored_images_without_augmentation_and_held_out(kind, side, tmp_path):
    given = arrays(side, train=7)
    module = kind(path=npz(tmp_path, **given), augment=False, val_size=3, seed=5)
    parts = module.parts
    assert (len(parts.train), len(parts.val), len(parts.test)) == (4, 3, 4)
    labels = [*parts.train.labels.tolist(), *parts.val.labels.tolist()]
    assert sorted(labels) == list(range(7))
    for part in parts[:2]:
        x, y = part.__getitems__(list(range(len(part))))
        for image, label in zip(x, y, strict=True):
            raw = by_hand(given["x_train"][label], module.MEAN, module.STD)
            np.testing.assert_allclose(image, raw, rtol=0, atol=2e-6)
    again = kind(path=module.stored.path, val_size=3, seed=5).parts
    assert torch.equal(again.val.labels, parts.val.labels)


def as_torchvision_stores(kind, folder, given):
    """Writes arrays in the layout of the data set's own files."""
    if kind is Cifar10DataModule:
        folder = folder / "cifar-10-batches-py"
        folder.mkdir()
        parts = {"test_batch": (given["x_test"], given["y_test"])}
        for i, rows in enumerate(np.array_split(np.arange(6), 5)):
            parts[f"data_batch_{i + 1}"] = (given["x_train"][rows], given["y_train"][rows])
        for name, (x, y) in parts.items():
            rows = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
            (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": y.tolist()}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    elif kind is SvhnDataModule:
        from scipy.io import savemat

        for part in ("train", "test"):
            x, y = given[f"x_{part}"].transpose(1, 2, 3, 0), given[f"y_{part}"].copy()
            y[y == 0] = 10
            savemat(folder / f"{part}_32x32.mat", {"X": x, "y": y[:, None].astype(np.uint8)})
    else:
        (folder / "stl10_binary").mkdir()
        for part in ("train", "test"):
            x, y = given[f"x_{part}"].transpose(0, 3, 2, 1), given[f"y_{part}"] + 1
            (folder / "stl10_binary" / f"{part}_X.bin").write_bytes(x.tobytes())
            (folder / "stl10_binary" / f"{part}_y.bin").write_bytes(y.astype(np.uint8).tobytes())


@pytest.mark.parametrize(("kind", "side"), [p.values[:2] for p in STORED])
def test_torchvision_reads_the_same(kind, side, tmp_path, monkeypatch):
    given = arrays(side)
    as_torchvision_stores(kind, tmp_path, given)
    # Files this small fail torchvision's checksums; with them, nothing is left to download.
    for place in (utils, *(getattr(torchvision.datasets, n) for n in ("cifar", "svhn", "stl10"))):
        monkeypatch.setattr(place, "check_integrity", lambda *args: True)
    module = kind(torchvision_root=str(tmp_path), download=True)
    module.prepare_data()
    for ours, reference in zip(module.parts, kind(path=npz(tmp_path, **given)).parts, strict=True):
        assert torch.equal(ours.images, reference.images)
        assert torch.equal(ours.labels, reference.labels)


@pytest.mark.parametrize("kind", [Cifar10DataModule, SvhnDataModule, Stl10DataModule])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "path=None and torchvision_root=None: pass exactly one"),
        ({"path": "a.npz", "torchvision_root": "b"}, "pass exactly one"),
        ({"path": "a.npz", "download": True}, "needs `torchvision_root`"),
        ({"path": "a.npz", "val_size": -1}, "val_size=-1: pass 0 or"),
        ({"path": "a.npz", "batch_size": 0}, "batch_size=0: pass at least 1"),
    ],
)
def test_arguments_of_stored_images_are_checked(kind, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**given)


def test_files_of_stored_images_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data.path"):
        SvhnDataModule(path=str(tmp_path / "none.npz")).setup("fit")
    with pytest.raises(ValueError, match=r"must be uint8 \(6, 96, 96, 3\)"):
        Stl10DataModule(path=npz(tmp_path, **arrays(32))).setup("fit")
    given = arrays(32)
    with pytest.raises(ValueError, match=r"y_train .* labels in 1..10: number the 10 classes"):
        SvhnDataModule(
            path=npz(tmp_path, **{**given, "y_train": np.array([1, 2, 3, 4, 5, 10])})
        ).setup("fit")
    with pytest.raises(ValueError, match="val_size=6 leaves none of the 6"):
        SvhnDataModule(path=npz(tmp_path, **given), val_size=6).setup("fit")
    del given["y_test"]
    with pytest.raises(ValueError, match="lacks y_test"):
        SvhnDataModule(path=npz(tmp_path, **given)).setup("fit")


def test_svhn_through_torchvision_needs_scipy(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        SvhnDataModule(torchvision_root="data")
    SvhnDataModule(path="data/svhn.npz")


def test_imagenet_is_cut_and_normalised(tmp_path):
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    flat = np.full((50, 30, 3), (10, 100, 200), dtype=np.uint8)
    root = image_folder(tmp_path, [noise, flat])
    module = ImageNetDataModule(str(root), batch_size=2, num_workers=0)
    module.setup("fit")
    mean, std = (255 * np.array(values) for values in (module.MEAN, module.STD))
    ((x, y),) = module.val_dataloader()
    assert x.shape == (2, 3, 224, 224)
    assert y.tolist() == [0, 1]
    middle = by_hand(noise[16:240, 16:240], mean, std)
    np.testing.assert_allclose(x[0], middle, rtol=0, atol=2e-6)  # float32
    ((x, y),) = module.train_dataloader()
    assert x.shape == (2, 3, 224, 224)
    # However it is cut, resized and mirrored, an image of one colour stays one.
    colour = by_hand(flat[:1, :1], mean, std)
    np.testing.assert_allclose(x[y == 1][0], np.broadcast_to(colour, (3, 224, 224)), atol=2e-6)
    cuts = {float(module.train_dataloader().dataset[0][0].sum()) for _ in range(3)}
    assert len(cuts) == 3
    assert module.test_dataloader().dataset is module.predict_dataloader().dataset


def test_imagenet_folders_and_arguments_are_checked(tmp_path):
    for given, message in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "workers=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageNetDataModule("x", **given)
    with pytest.raises(FileNotFoundError, match="no folder 'train'.*--data.root"):
        ImageNetDataModule(str(tmp_path)).setup("fit")
    root = image_folder(tmp_path, np.zeros((2, 8, 8, 3), dtype=np.uint8))
    (root / "val" / "dog").rename(root / "val" / "wolf")
    with pytest.raises(ValueError, match="2 are in one of them only, 'dog' for instance"):
        ImageNetDataModule(str(root)).setup("fit")
