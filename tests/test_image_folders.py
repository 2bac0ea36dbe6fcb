import json
import os
import runpy
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from folders import CLASSES, make_folder, smooth_image
from image_sets import folders, statistics
from image_sets.folders import find_images, own_size, read_image, resize
from image_sets.loading import load_image_set

RANDOM = np.random.default_rng(1)


def pixels(file: Path) -> np.ndarray:
    """What is in a file read by this project, in the order in which PIL has it."""
    return read_image(file).permute(1, 2, 0).numpy()


def test_files_classes_and_labels(tmp_path):
    """What is hidden or of a system is no image: network drives keep a thumbnail for each, in a folder of its name."""
    folder = make_folder(tmp_path / ".data" / "beetles", num_train=7, num_test=4)
    inside = folder / "train" / "Käfer"
    (folder / "train" / ".cache").mkdir()
    (inside / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/0-checkpoint.jpg", "._0.jpg", "Thumbs.db"):
        (inside / name).write_text("of a notebook, or of another system")
    for name in ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found"):
        for above in (folder, folder / "train", inside):
            (above / name / "0.png").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(above / name / "0.png" / "SYNOPHOTO_THUMB_M.jpg")
    lines = []
    found = find_images(folder, lines.append)
    classes = sorted(CLASSES)
    expected = [
        (file, label)
        for part in ("train", "test")
        for label, name in enumerate(classes)
        for file in sorted((folder / part / name).glob("[0-9]*.jpg"))
    ]
    assert list(zip(found.images, found.labels, strict=True)) == expected and not lines
    assert found.classes == classes and found.num_train == 7
    assert found.files == found.images[:7] and found.folder == folder


def test_order_is_that_of_torchvision(tmp_path):
    """Of folders within folders, too."""
    for name in ("a", "a/b", "a/b-", "a/b-/c", "a/B", "a.b", "a b/c", "é"):
        for part in ("train", "test"):
            (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
            for file in ("2.png", "10.JPG", "ä.webp", "-.tiff", "B.png"):
                (tmp_path / part / name / file).touch()
    found = find_images(tmp_path)
    expected = [
        (Path(file), label) for part in ("train", "test") for file, label in ImageFolder(tmp_path / part).samples
    ]
    assert list(zip(found.images, found.labels, strict=True)) == expected and len(expected) == 80


LINKS = {
    "to a folder above": ("train/Käfer/again", "train"),
    "to the whole system": ("train/Käfer/again", "/"),
    "to a class of the other part": ("test/甲虫/again", "train/甲虫"),
    "to the training images": ("test", "train"),
    "to an image": ("test/甲虫/again.png", "train/甲虫/1.png"),
}


@pytest.mark.parametrize(("link", "target"), LINKS.values(), ids=LINKS)
def test_links_that_lead_somewhere_twice(tmp_path, link, target):
    folder = make_folder(tmp_path / "beetles", num_train=3, num_test=3, size=(8, 8))
    if link == "test":
        shutil.rmtree(folder / link)
    (folder / link).symlink_to(folder / target)
    with pytest.raises(ValueError, match=r" are the same, by a link: remove one") as error:
        find_images(folder)
    text = str(error.value)
    assert str(folder / link) in text and "\n" not in text


def test_two_links_that_lead_to_each_other(tmp_path):
    """Followed for ever, they would never end."""
    folder = make_folder(tmp_path / "beetles", num_train=3, num_test=3, size=(8, 8))
    for name in ("one", "two"):
        (folder / "train" / "Käfer" / name).symlink_to(folder / "train" / "Käfer")
    with pytest.raises(ValueError, match=r"Käfer/(one|two) and .*Käfer are the same"):
        find_images(folder)


def test_links_to_folders_elsewhere_are_followed(tmp_path):
    elsewhere = make_folder(tmp_path / "elsewhere", num_train=3, num_test=3, size=(8, 8))
    for part in ("train", "test"):
        (tmp_path / "beetles" / part).mkdir(parents=True)
        for name in CLASSES:
            (tmp_path / "beetles" / part / name).symlink_to(elsewhere / part / name)
    assert find_images(tmp_path / "beetles").num_train == 3


def test_files_that_are_left_out_are_counted(tmp_path):
    folder = make_folder(tmp_path / "beetles", num_train=3, num_test=3, size=(8, 8))
    inside = folder / "train" / "Käfer"
    for name in ("1.gif", "2.GIF", "3.avif", "4", "1.jpe", "2.jfif", ".hidden.gif", "Thumbs.db"):
        Image.new("RGB", (8, 8)).save(inside / name, format="jpeg")
    lines = []
    found = find_images(folder, lines.append)
    assert [line.partition("; ")[2] for line in lines] == ["left out are '2 .gif', '1 .avif', '1 without an ending'"]
    assert str(folder) in lines[0] and ".jpe .jfif" in lines[0] and len(found.labels) == 8
    (inside / "0.png").rename(inside / "0.jp2")
    for file in inside.glob("*.j[pf]*[ef]"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"train has no image of 'Käfer': .* left out are '2 .gif', .*'1 .jp2'"):
        find_images(folder)


def test_folder_with_the_name_of_a_known_data_set(tmp_path, forbidden_network):
    make_folder(tmp_path / "cifar10", num_train=3, num_test=3, size=(8, 8))
    with pytest.raises(ValueError, match=r"cifar10 is a data set that is known already: give the folder"):
        load_image_set("cifar10", tmp_path)


def test_val_in_place_of_test(tmp_path):
    folder = make_folder(tmp_path / "beetles", num_train=4, num_test=3)
    shutil.copytree(folder / "test", folder / "val")
    lines = []
    assert [file.parts[-3] for file in find_images(folder, lines.append).images[4:]] == ["test"] * 3
    assert lines == [f"{folder / 'val'} is not used: a tenth of {folder / 'train'} is for validation"]
    shutil.rmtree(folder / "test")
    assert [file.parts[-3] for file in find_images(folder, lines.append).images[4:]] == ["val"] * 3
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rm -r test", "has no folder test .or val.: images belong into .*/train/CLASS"),
        ("rm -r train", "has no folder train"),
        ("mkdir train/empty test/empty", "train has no image of 'empty': images end with .jpg .jpeg"),
        ("rm -r */甲虫 */beetle*", "train must have a folder for each class, at least two; it has 1"),
        ("for n in 1 2 3 4 5 6 7; do mkdir test/$n; done", "only one has '1', '2', '3', '4', '5' and 2 more"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, change, message):
    folder = make_folder(tmp_path / "beetles", num_train=3, num_test=3)
    assert os.system(f"cd {folder} && {change}") == 0
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        find_images(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("turn", [1, 2, 6])
def test_jpeg_has_the_pixels_that_pil_finds(tmp_path, mode, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    file = tmp_path / "image.jpg"
    smooth_image(RANDOM, 50, 71).convert(mode).save(file, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    assert expected.shape == ((50, 71, 3) if turn < 5 else (71, 50, 3))
    assert (pixels(file) == expected).all()


@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
@pytest.mark.parametrize("turn", [1, 6])
def test_size_is_that_of_the_pixels(tmp_path, ending, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    file = tmp_path / f"image.{ending}"
    image = smooth_image(RANDOM, 20, 30)
    image.save(file, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    expected = np.asarray(image) if turn == 1 else np.rot90(np.asarray(image), -1)
    assert own_size([file]) == expected.shape[:2] and (pixels(file) == expected).all()


def orientation(kind: int, count: int, value: bytes) -> bytes:
    """An EXIF whose only entry is an orientation of this type of TIFF's."""
    entry = struct.pack("<HHHI", 1, 0x0112, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry + bytes(4)


def test_turned_where_the_rest_of_the_exif_cannot_be_written_again(tmp_path):
    width = struct.pack("<HHI", 0x0100, 2, 4) + b"wide"  # a text, in the place of a number
    exif = orientation(3, 1, struct.pack("<H", 6))
    exif = exif[:14] + struct.pack("<H", 2) + width + exif[16:]
    file = tmp_path / "image.png"
    smooth_image(RANDOM, 20, 30).save(file, exif=exif)
    with Image.open(file) as image, pytest.raises((TypeError, ValueError, AttributeError, struct.error)):
        ImageOps.exif_transpose(image)
    with Image.open(file) as image:
        assert (pixels(file) == np.rot90(np.asarray(image), -1)).all()


SENSELESS = {
    "9": orientation(3, 1, struct.pack("<H", 9)),
    "text": orientation(2, 4, b"six"),
    "half": orientation(11, 1, struct.pack("<f", 6.5)),
    "beyond the end": orientation(5, 1, struct.pack("<I", 2**31)),
    "no EXIF": b"b'Exif\\x00\\x00MM'",
}


@pytest.mark.filterwarnings("ignore")  # as outside of tests
@pytest.mark.parametrize("exif", SENSELESS.values(), ids=SENSELESS)
def test_senseless_orientation_is_upright(tmp_path, exif):
    """For the size and for the pixels."""
    for ending in ("png", "jpg", "webp"):
        file = tmp_path / f"image.{ending}"
        smooth_image(RANDOM, 20, 30).save(file, exif=exif)
        expected = np.asarray(Image.open(file))
        assert own_size([file]) == (20, 30) == expected.shape[:2]
        assert (pixels(file) == expected).all()


def test_slightly_damaged_jpeg_is_read_as_pil_reads_it(tmp_path):
    """Whether the faster decoder, which refuses it, is installed or not."""
    file = tmp_path / "image.jpg"
    smooth_image(RANDOM, 80, 80).save(file, quality=90)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2] = b"\xff\xd3"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="Corrupt JPEG data"):
        simplejpeg.decode_jpeg(bytes(content))
    assert (pixels(file) == np.asarray(Image.open(file))).all()


def test_nothing_is_said_of_odd_exif_and_of_large_images(tmp_path, monkeypatch):
    file = tmp_path / "image.jpg"
    Image.new("RGB", (15, 10)).save(file, exif=SENSELESS["beyond the end"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with Image.open(file) as image:
            image.getexif()
        assert {one.category for one in said} == {Image.DecompressionBombWarning, UserWarning}
        said.clear()
        module = runpy.run_path(folders.__file__)
        assert module["read_image"](file).shape == (3, 10, 15) and module["own_size"]([file]) == (10, 15)
    assert not said


def test_grey_black_and_white_palette_and_transparency(tmp_path):
    grey = RANDOM.integers(0, 256, (4, 6), dtype=np.uint8)
    alpha = RANDOM.integers(0, 256, (4, 6), dtype=np.uint8)
    three = np.stack([grey] * 3, axis=-1)
    palette = Image.fromarray(grey, "P")
    palette.putpalette([255 - n // 3 for n in range(768)])
    images = {
        "grey": (Image.fromarray(grey), three),
        "grey and alpha": (Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), three),
        "alpha": (Image.fromarray(np.dstack([three, alpha])), three),
        "black and white": (Image.fromarray(grey > 128), (three > 128) * np.uint8(255)),
        "palette": (palette, 255 - three),
    }
    for name, (image, expected) in images.items():
        image.save(tmp_path / f"{name}.png")
        assert (pixels(tmp_path / f"{name}.png") == expected).all(), name
    palette.save(tmp_path / "transparent.png", transparency=bytes(range(256)))
    assert (pixels(tmp_path / "transparent.png") == 255 - three).all()


def test_16_bit_grey_keeps_its_upper_8_bits(tmp_path):
    values = np.array([[0, 255, 256, 12345, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "image.png")
    assert pixels(tmp_path / "image.png")[0].tolist() == [[0] * 3, [0] * 3, [1] * 3, [48] * 3, [255] * 3]


def tiff(values: np.ndarray, bits: int, white_is_zero: bool) -> bytes:
    """A grey image, its rows without gaps, as TIFF 6.0 describes it."""
    height, width = values.shape
    if bits == 12:
        data = bytes(np.packbits([[value >> n & 1 for n in reversed(range(12))] for value in values.flatten()]))
    else:
        data = values.astype(f"<u{bits // 8}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 122, 277: 1, 278: height}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value) for tag, value in tags.items())
    entries += struct.pack("<HHII", 279, 4, 1, len(data))
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags) + 1) + entries + bytes(4) + data


@pytest.mark.parametrize(("bits", "white_is_zero"), [(8, True), (12, False), (16, False), (16, True)])
def test_grey_tiff_uses_the_whole_scale(tmp_path, bits, white_is_zero):
    upper = RANDOM.integers(0, 256, (4, 6))
    values = (upper << bits - 8) + RANDOM.integers(0, 1 << bits - 8, (4, 6))
    (tmp_path / "image.tif").write_bytes(tiff(values, bits, white_is_zero))
    assert (pixels(tmp_path / "image.tif") == (255 - upper if white_is_zero else upper)[..., None]).all()


def test_pgm_of_more_than_8_bits(tmp_path):
    values = np.array([[0, 1, 500, 999, 1000]])
    for magic, data in (("P5", values.astype(">u2").tobytes()), ("P2", " ".join(map(str, values[0])).encode())):
        (tmp_path / "image.pgm").write_bytes(f"{magic}\n5 1\n1000\n".encode() + data)
        assert (abs(pixels(tmp_path / "image.pgm")[0] - values.T / 1000 * 255) <= 1).all()
        assert pixels(tmp_path / "image.pgm")[0, -1].tolist() == [255] * 3


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_file_that_is_no_image(tmp_path, content):
    file = tmp_path / "image.jpg"
    file.write_bytes(content)
    for read in (read_image, lambda file: own_size([file])):
        with pytest.raises(ValueError, match=r"image.jpg cannot be read as an image: it is not of a known kind$"):
            read(file)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_file_that_is_cut_short(tmp_path, ending):
    file = tmp_path / f"image.{ending}"
    smooth_image(RANDOM, 60, 60).save(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"image.{ending} cannot be read as an image: \S") as error:
        read_image(file)
    assert "\n" not in str(error.value)


def test_pixels_without_a_scale(tmp_path):
    for dtype in (np.int32, np.float32):
        Image.fromarray(np.ones((3, 3), dtype)).save(tmp_path / "image.tif")
        with pytest.raises(ValueError, match=r"image.tif .*have no scale of their own"):
            read_image(tmp_path / "image.tif")


def test_size_that_all_images_have(tmp_path):
    files = find_images(make_folder(tmp_path / "same", num_train=4, num_test=3, size=(64, 30))).images
    assert own_size(files) == (64, 30)
    smooth_image(RANDOM, 30, 64).save(files[3])
    assert own_size(files) is None
    smooth_image(RANDOM, 65, 65).save(files[0])
    assert own_size(files[:1]) is None


@pytest.mark.parametrize("shape", [(40, 70), (33, 33), (10, 300)])
@pytest.mark.parametrize("margin", [1, 256 / 224])
def test_resized_images_are_those_of_torchvision(shape, margin):
    image = v2.functional.pil_to_tensor(smooth_image(RANDOM, *shape))
    expected = v2.Compose([v2.Resize(round(24 * margin)), v2.CenterCrop(24)])(image)
    assert torch.equal(resize(image, (24, 24), margin), expected)


def test_images_of_one_small_size_are_kept_as_they_are(tmp_path):
    folder = make_folder(tmp_path / "small", num_train=30, num_test=6, size=(16, 20))
    image_set = load_image_set("small", tmp_path, workers=2)
    files = [f for part in ("train", "test") for f in sorted((folder / part).rglob("*.png"), key=lambda f: f.parts)]
    assert image_set.images.shape == (36, 3, 16, 20) and image_set.size == (16, 20) and image_set.flip
    for image, file in zip(image_set.images, files, strict=True):
        assert (image.permute(1, 2, 0).numpy() == np.asarray(Image.open(file))).all()
    assert [image_set.classes[label] for label in image_set.labels] == [file.parent.name for file in files]
    parts = {name: indices.tolist() for name, indices in image_set.splits.items()}
    assert {name: len(indices) for name, indices in parts.items()} == {"train": 27, "val": 3, "test": 6}
    assert parts["test"] == list(range(30, 36)) and sorted(parts["train"] + parts["val"]) == list(range(30))
    assert sorted(image_set.labels[image_set.splits["val"]].tolist()) == [0, 1, 2]

    resized = load_image_set("small", tmp_path, image_size=8, flip=False)
    assert resized.images.shape == (36, 3, 8, 8) and not resized.flip
    assert torch.equal(resized.images[3], resize(image_set.images[3], (8, 8)))


def test_built_in_images_of_another_size(small_cifar10):
    as_they_are, resized = (load_image_set("cifar10", small_cifar10, image_size=size) for size in (None, 48))
    assert resized.images.shape == (65, 3, 48, 48)
    assert torch.equal(resized.images, v2.functional.resize(as_they_are.images, [48, 48]))
    assert torch.equal(load_image_set("cifar10", small_cifar10, image_size=32).images, as_they_are.images)
    large = load_image_set("cifar10", small_cifar10, image_size=70, workers=0)
    [images] = large.take([torch.tensor([5, 7])])
    expected = v2.Compose([v2.Resize(80), v2.CenterCrop(70)])(as_they_are.images[[5, 7]])
    assert torch.equal(images, expected) and large.size == (70, 70)


def test_too_few_images_to_split(tmp_path):
    make_folder(tmp_path / "few", num_train=12, num_test=3, size=(8, 8))
    with pytest.raises(ValueError, match="12 training images of 3 classes are too few for a validation split: every"):
        load_image_set("few", tmp_path)


@pytest.mark.parametrize("image_size", [None, 70], ids=["kept", "streamed"])
def test_statistics_are_those_of_numpy_and_kept(tmp_path, monkeypatch, image_size):
    folder = make_folder(tmp_path / "small", num_train=30, num_test=6, size=(16, 16))
    image_set = load_image_set("small", tmp_path, image_size=image_size, workers=0)
    [images] = image_set.take([torch.arange(30)])
    values = images.double().numpy() / 255
    assert image_set.mean == pytest.approx(values.mean(axis=(0, 2, 3)), rel=1e-12)
    assert image_set.std == pytest.approx(values.std(axis=(0, 2, 3)), rel=1e-9)

    size = image_size or 16
    [file] = folder.glob("*.json")
    assert file.name == f"statistics-{size}x{size}.json"
    train_files = list((folder / "train").rglob("*.png"))
    made_from = json.loads(file.read_text())["made_from"]

    def load():  # with another split, as they are those of training and validation images together
        image_set = load_image_set("small", tmp_path, image_size=image_size, workers=0, split_seed=1)
        return image_set.mean, image_set.std

    kept = {**json.loads(file.read_text()), "mean": [0.1, 0.2, 0.3]}
    file.write_text(json.dumps(kept))
    assert load() == ((0.1, 0.2, 0.3), image_set.std)  # believed, and not computed again
    os.utime(train_files[3], (1e9, 1e9))  # older than before
    assert load() == (image_set.mean, image_set.std)
    assert json.loads(file.read_text())["made_from"] != made_from
    for damaged in ("", "[]", '{"mean": 1, "std": 2}', "[" * 100_000, "\ud800"):
        file.write_bytes(damaged.encode(errors="surrogatepass"))
        assert load() == (image_set.mean, image_set.std)
    Image.new("RGB", (16, 16), "white").save(train_files[0])
    assert load()[0] != image_set.mean
    train_files[0].unlink()
    before = json.loads(file.read_text())
    load()
    assert before != json.loads(file.read_text())


def test_statistics_that_cannot_be_kept(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "small", num_train=30, num_test=6, size=(16, 16))

    def refuse(file: Path, content: bytes) -> None:
        raise PermissionError(13, "cannot write it: Permission denied", str(file))

    monkeypatch.setattr(statistics, "write_atomically", refuse)
    reports = []
    assert load_image_set("small", tmp_path, statistics=False, report=reports.append).mean is None and not reports
    assert len(load_image_set("small", tmp_path, report=reports.append).mean) == 3 and not list(folder.glob("*.json"))
    [line] = reports
    assert "are computed each time" in line and "statistics-16x16.json" in line and "\n" not in line


def test_images_without_spread(tmp_path):
    folder = make_folder(tmp_path / "small", num_train=30, num_test=6, size=(4, 4))
    for file in folder.rglob("*.png"):
        Image.new("RGB", (4, 4), "red").save(file)
    with pytest.raises(ValueError, match="same value in a channel: use input_norm='bn'"):
        load_image_set("small", tmp_path)
