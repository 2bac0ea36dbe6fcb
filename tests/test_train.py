import copy
import hashlib
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, Subset

import run_settings
import train
from command_line.flag_types import FlagError, SettingError
from run_settings import determining
from saved_runs.results import read_results
from small import prepared
from training import preparation
from training.devices import speed_up

QUICK = ["--dataset", "digits", "--num_epochs", "2", "--batch_size", "48", "--device", "cpu"]
NUM_EPOCHS, BATCH_SIZE = 2, 32  # of the plain loop


def plain_loop(
    folder: Path,
    seed: int,
    bn_weight: float = 0.1,
    c: float = 100,
    input_norm: str = "bn",
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    stem: str = "small",
):
    """The method as a user would write it from its description, with nothing of this project: an image at a time."""
    complex_seed, split_seed = (int(hashlib.md5(str(n).encode()).hexdigest()[-8:], 16) for n in (seed, 0))
    np.random.seed(complex_seed)
    torch.manual_seed(complex_seed)

    plain = [torchvision.transforms.ToTensor()]
    if input_norm == "dataset":
        plain += [torchvision.transforms.Normalize((0.4916, 0.4823, 0.4467), (0.2472, 0.2437, 0.2618))]
    plain = torchvision.transforms.Compose(plain)

    def flip(image: Image.Image) -> torch.Tensor:
        return plain(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else image)

    complete_train = torchvision.datasets.CIFAR10(folder, transform=flip)
    complete_val = torchvision.datasets.CIFAR10(folder, transform=plain)
    test = torchvision.datasets.CIFAR10(folder, train=False, transform=plain)
    train_part, val_part = train_test_split(
        np.arange(len(complete_train)), test_size=0.1, stratify=complete_train.targets, random_state=split_seed
    )
    train_loader = DataLoader(Subset(complete_train, train_part), BATCH_SIZE, shuffle=True)
    val_loader = DataLoader(Subset(complete_val, val_part), BATCH_SIZE)
    test_loader = DataLoader(test, BATCH_SIZE)

    network = torchvision.models.resnet18(num_classes=10)
    if stem == "small":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, bn_weight)
    if input_norm == "bn":
        input_layer = nn.BatchNorm2d(3)
        nn.init.constant_(input_layer.weight, bn_weight * 0.58)
        input_layer.bias.requires_grad = False
        network = nn.Sequential(input_layer, network)

    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        [
            {"params": [p for name, p in named if name.endswith("bias")]},
            {"params": [p for name, p in named if name.endswith("weight") and p.dim() == 1], "lr": learning_rate / c},
            {"params": [p for name, p in named if p.dim() > 1], "weight_decay": weight_decay},
        ],
        lr=learning_rate,
        momentum=momentum,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_EPOCHS, eta_min=1e-8)

    rows, best_accuracy, best_weights = [], -1, None
    for epoch in range(1, NUM_EPOCHS + 1):
        network.train()
        train_loss = 0.0
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            train_loss += loss.item()
        scheduler.step()
        network.eval()
        val_loss, correct = 0.0, [0, 0]
        for part, loader in enumerate((val_loader, test_loader)):
            for images, labels in loader:
                with torch.no_grad():
                    logits = network(images)
                if loader is val_loader:
                    val_loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                for scores, label in zip(logits, labels, strict=True):
                    correct[part] += int(scores.argmax() == label)
        val_accuracy, test_accuracy = correct[0] / len(val_part) * 100, correct[1] / len(test) * 100
        rows.append((epoch, train_loss / len(train_loader), val_loss / len(val_part), val_accuracy, test_accuracy))
        if val_accuracy > best_accuracy:
            best_accuracy, best_weights = val_accuracy, copy.deepcopy(network.state_dict())
    return rows, best_weights


OTHERS = {"seed": 2, "bn_weight": 1, "c": 1, "input_norm": "dataset"}
OTHERS |= {"learning_rate": 0.03, "momentum": 0.7, "weight_decay": 0.1, "stem": "own"}


@pytest.mark.parametrize("settings", [{"seed": 1}, OTHERS], ids=["paper", "others"])
def test_same_numbers_as_a_plain_loop_digit_for_digit(small_cifar10, settings):
    rows, best_weights = plain_loop(small_cifar10, **settings)

    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += [f"--num_epochs={NUM_EPOCHS}", f"--batch_size={BATCH_SIZE}", "--name=x", "--device=cpu"]
    path = small_cifar10.parent
    results = train.main([*flags, "--path", str(path)])
    assert list(zip(*(results.columns[name].tolist() for name in results.columns), strict=True)) == rows
    weights = torch.load(path / "networks" / "x-best.pt", weights_only=True)
    assert list(weights) == list(best_weights)
    for name, value in best_weights.items():
        assert torch.equal(weights[name], value), name


def test_what_a_run_leaves_behind(small_network, tmp_path, capsys):
    results = train.main([*QUICK, "--path", str(tmp_path), "--num_epochs", "3", "--seed", "7"])
    name = "digits-resnet18-batch_size=48-num_epochs=3-weight0.1-c100-bn-seed7"
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == {
        f"results/{name}.csv",
        f"networks/{name}-best.pt",
        f"networks/{name}.lock",
    }

    written = read_results(tmp_path / "results" / f"{name}.csv")
    assert written.header == results.header
    for column, values in results.columns.items():
        np.testing.assert_array_equal(written.columns[column], values)
    assert results.columns["epoch"].tolist() == [1, 2, 3]
    expected = {"name": name, "dataset": "digits", "network": "resnet18", "batch_size": 48, "num_epochs": 3}
    expected |= {"learning_rate": 0.1, "scheduler": "cos", "momentum": 0.9, "weight_decay": 1e-4}
    expected |= {"bn_weight": 0.1, "c": 100.0, "input_norm": "bn", "seed": 7, "torch": torch.__version__}
    assert expected.items() <= results.header.items()

    val_accuracy = results.columns["val_accuracy"].tolist()
    best = val_accuracy.index(max(val_accuracy))
    assert results.test_accuracy == results.columns["test_accuracy"][best]

    out, err = capsys.readouterr()
    assert err == ""
    first, about_accuracies, *lines, last = out.splitlines()
    images = "digits, 144 training, 16 validation and 40 test images of 10 classes"
    size = 8 * 27 + 8 + 2 * 8 + 2 * 3 + 288 * 10 + 10
    assert first == f"resnet18, {size:,} parameters; {images}; cpu, float32; files in {tmp_path}"
    assert about_accuracies.startswith("an epoch has 3 steps: batch norm's running statistics")
    assert all(re.search(r", [\d,]+ images/s$", line) for line in lines)
    assert [line.split(":")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert last.startswith(f"best epoch {best + 1}: val accuracy {max(val_accuracy):.3f} %, test accuracy")
    assert f"{results.test_accuracy:.3f} %" in last and f"{name}.csv" in last and f"{name}-best.pt" in last


def test_best_weights_are_those_of_the_first_epoch_on_a_tie(small_network, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "measure", lambda *arguments: (1.0, 50.0))
    results = train.main([*QUICK, "--path", str(tmp_path), "--name", "x", "--num_epochs", "3"])
    assert results.best_epoch == 1
    steps = torch.load(tmp_path / "networks" / "x-best.pt", weights_only=True)["0.num_batches_tracked"].item()
    assert steps == 144 / 48


def test_constant_learning_rate_and_schedule(small_network, tmp_path, monkeypatch):
    rates = []

    def record(network, batches, optimizer, *arguments):
        for _ in batches:
            pass
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        return 1.0

    monkeypatch.setattr(train, "train_one_epoch", record)
    monkeypatch.setattr(train, "measure", lambda *arguments: (1.0, 50.0))
    flags = [*QUICK, "--path", str(tmp_path), "--name", "x", "--num_epochs", "4"]
    train.main([*flags, "--scheduler", "none"])
    assert rates == [[0.1, 0.1 / 100, 0.1]] * 4

    rates.clear()
    train.main([*flags, "--name", "y"])
    for epoch, (bias, scale, weight) in enumerate(rates):
        cosine = (1 + np.cos(np.pi * epoch / 4)) / 2
        assert bias == weight == pytest.approx(1e-8 + (0.1 - 1e-8) * cosine)
        assert scale == pytest.approx(1e-8 + (0.001 - 1e-8) * cosine)


def test_loss_that_is_not_finite(small_network, tmp_path, capsys, monkeypatch):
    flags = [*QUICK, "--path", str(tmp_path), "--name", "x"]
    one_epoch, networks = train.train_one_epoch, []

    def diverge_in_epoch_2(network, *arguments):
        networks.append(network)
        if len(networks) == 2:
            nn.init.constant_(network[-1].weight, float("nan"))
        return one_epoch(network, *arguments)

    monkeypatch.setattr(train, "train_one_epoch", diverge_in_epoch_2)
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 4
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: the loss of step 1 is nan") and err.count("\n") == 1
    assert read_results(tmp_path / "results" / "x.csv").columns["epoch"].tolist() == [1]


def test_validation_loss_that_is_not_finite(small_network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "measure", lambda *arguments: (float("inf"), 50.0))
    with pytest.raises(SystemExit) as stop:
        train.main([*QUICK, "--path", str(tmp_path), "--name", "x"])
    assert stop.value.code == 4
    assert "the validation loss after epoch 1 is inf" in capsys.readouterr().err


def test_loss_is_checked_where_it_is_not_read_at_every_step(monkeypatch):
    """As on a GPU: the first check of every step is taken away."""
    check, calls = train.check_finite, []

    def only_after_the_epoch(loss, what):
        calls.append(what)
        if len(calls) > 3:
            check(loss, what)

    monkeypatch.setattr(train, "check_finite", only_after_the_epoch)
    network = nn.Linear(2, 2)
    images = [torch.ones(4, 2), torch.full((4, 2), float("nan")), torch.ones(4, 2)]
    batches = [(image, torch.zeros(4, dtype=torch.int64)) for image in images]
    with pytest.raises(FloatingPointError, match="the loss of step 2 is nan"):
        settings = prepared(["--device", "cpu"])
        train.train_one_epoch(network, batches, torch.optim.SGD(network.parameters(), 0.1), settings)


def test_progress_bar(small_network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train.main([*QUICK, "--path", str(tmp_path), "--name", "x"])
    out, err = capsys.readouterr()
    assert re.search(r"\repoch 2/2(, loss \d+\.\d+)?, \S+ images/s, 100 %, 00:00 left ", err)
    assert "epoch 2/2: train loss" in out


WHOLE = "must be a whole number of at least 1, not "
POSITIVE = "must be a number from 1e-30 to 1e30, not "
NOT_NEGATIVE = "must be 0 or a number from 1e-30 to 1e30, not "
FRACTION = "must be a number from 0 to below 1, not "
REDUCTION = "must be 0 or 1 (no reduction) or a number from 1 to 1e30, not "
NAME = "must be at most 200 letters, digits and . _ + = - and start with a letter or digit, not "


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--batch_size", "0", WHOLE),
        ("--batch_size", "1294", "digits has 1293 training images, fewer than a batch of 1294"),
        ("--learning_rate", "0", POSITIVE),
        ("--learning_rate", "nan", POSITIVE),
        ("--learning_rate", "1e300", POSITIVE),
        ("--momentum", "1", FRACTION),
        ("--weight_decay", "-0.1", NOT_NEGATIVE),
        ("--bn_weight", "1e-60", POSITIVE),
        ("--c", "0.5", REDUCTION),
        ("--seed", "-1", "must be a whole number of at least 0, not "),
        ("--split_seed", "seeds", "must be a whole number of at least 0, not 'seeds', or the word seed"),
        ("--checkpoint_seconds", "-1", NOT_NEGATIVE),
        ("--name", "a/b", NAME),
        ("--name", "\N{GREEK SMALL LETTER GAMMA}" * 150, NAME),
        ("--path", __file__, "is none"),
        ("--path", "~nobody-has-this-name/x", "cannot be a folder"),
        ("--path", "x" * 300, "cannot be a folder"),
        ("--path", "a\nb", "must be one line of printable text"),
        ("--device", "gpu", "is not one of cpu ("),
        ("--device", "cuda:9", "is not one of cpu ("),
        ("--dataset", "mnist", "images/mnist: known without one are cifar10, cifar100, digits"),
        ("--dataset", "CIFAR-10", "images/CIFAR-10: did you mean cifar10?"),
        ("--dataset", "../images", "there is no folder /"),
        ("--dataset", "images/ice cream", "must be at most 200 letters"),
        (
            "--dataset",
            "/data/cifar10",
            "cifar10 is known without a folder: give cifar10, or /data/cifar10 another name",
        ),
        ("--dataset", "/", "must be cifar10, cifar100, digits or the name of a folder in images/"),
        ("--network", "my_networks.small", "must be the name of a torchvision network or MODULE:FUNCTION, not "),
        (
            "--network",
            "resnet19",
            "torchvision has no classification network 'resnet19': close are resnet18, resnet152",
        ),
        ("--network", "vgg16", "vgg16 has no batch norm, which the method is about: take vgg16_bn"),
        ("--network", "my_networks:small", "my_networks cannot be imported: ModuleNotFoundError: No module named"),
        ("--scheduler", "cosine", "choose from"),
        ("--bn", "0.1", "unrecognized arguments: --bn 0.1"),
        ("--momenta", "0.1", "unrecognized arguments: --momenta 0.1: did you mean --momentum?"),
        ("--lr", "0.1", "unrecognized arguments: --lr 0.1: did you mean --learning_rate?"),
        ("digits", "again", "unrecognized arguments: digits again"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, flag, value, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(["--dataset", "digits", flag, value])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert err.startswith("train.py: error: ")
    assert message.startswith("unrecognized") or f"argument {flag}: " in err
    with pytest.raises((FlagError, SettingError)) as error:  # from Python, the same sentence
        prepared(["--dataset", "digits", flag, value])
    assert " ".join(str(error.value.args[-1]).split()) in err
    if message.endswith("not "):
        assert repr(value) in err
    assert err.count("\n") == 1 and err.endswith("\n")
    assert not list(tmp_path.iterdir())


def test_compile_without_a_compiler(small_network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        train.main(["--dataset", "digits", "--compile", "--path", str(tmp_path)])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: there is no C++ compiler here") and error.count("\n") == 1


def test_only_whole_batches_are_compiled(small_network, monkeypatch):
    """Compiling takes long: it is done once for training and once for evaluation, not for short last batches."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: whole(f, backend="aot_eager", dynamic=dynamic))
    torch._dynamo.reset()
    counters.clear()
    settings = prepared(["--dataset", "digits", "--device", "cpu", "--batch_size", "16", "--compile"])
    plain, fast = (preparation.construct_network("", 10, "digits", 0.1) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    speed_up(fast, compiled=True)
    for training, size in [(True, 16), (True, 16), (True, 3), (False, 16), (False, 4), (True, 16), (False, 16)]:
        images = torch.rand(size, 3, 8, 8)
        with torch.inference_mode(not training):
            fast.train(training), plain.train(training)
            torch.testing.assert_close(train.compute_logits(fast, images, settings), plain(images))
    assert counters["stats"]["unique_graphs"] == 2
    assert fast.state_dict()["2.num_batches_tracked"] == 4


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_every_batch_goes_through_the_hooks_of_a_network(small_network, monkeypatch, flags):
    """Such as one that normalizes the images, whatever the size of the batch."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: whole(f, backend="aot_eager", dynamic=dynamic))
    settings = prepared(["--dataset", "digits", "--device", "cpu", "--batch_size", "16", *flags])
    network = preparation.construct_network("", 10, "digits", 0.1).eval()
    images = torch.rand(20, 3, 8, 8)
    expected = network(images * 3 - 1)
    network.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3 - 1,))
    speed_up(network, compiled=settings.compile)
    for batch, logits in zip(images.split(16), expected.split(16), strict=True):
        torch.testing.assert_close(train.compute_logits(network, batch, settings), logits)


def test_logits_in_bfloat16(small_network):
    """bfloat16 loses one part in 256 at every step, and more where batch norm subtracts what is nearly equal."""
    logits, gradients = [], []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(1)
        network = preparation.construct_network("", 10, "digits", 0.1)
        settings = prepared(["--dataset", "digits", "--device", "cpu", "--precision", precision])
        logits.append(train.compute_logits(network, torch.rand(16, 3, 8, 8), settings))
        logits[-1].logsumexp(1).sum().backward()
        gradients.append(network[1].weight.grad)
        assert logits[-1].dtype == gradients[-1].dtype == torch.float32
        assert all(b.dtype in (torch.float32, torch.int64) for b in network.buffers())
    assert 0 < (logits[1] - logits[0]).abs().max() <= 0.02 * logits[0].abs().max()
    assert 0 < (gradients[1] - gradients[0]).norm() <= 0.1 * gradients[0].norm()  # through twice the steps


def test_precision_set_before_does_not_change_a_run(small_network, tmp_path, monkeypatch):
    found = []
    whole = train.train_one_epoch

    def noted(*arguments):
        found.append(torch.backends.cudnn.conv.fp32_precision)
        return whole(*arguments)

    monkeypatch.setattr(train, "train_one_epoch", noted)
    with torch.backends.flags(fp32_precision="tf32"):
        train.main([*QUICK, "--path", str(tmp_path), "--num_epochs", "1", "--precision", "strict"])
    assert found == ["ieee"]


def test_default_names_differ_where_the_method_differs():
    flags = ["", "--seed 2", "--bn_weight 0.123456789", "--bn_weight 0.12345678", "--c 10", "--input_norm dataset"]
    flags += ["--dataset digits", "--network resnet34", "--batch_size 64", "--num_epochs 5", "--learning_rate 0.05"]
    flags += ["--scheduler none", "--momentum 0.5", "--weight_decay 0", "--stem own", "--compile"]
    flags += ["--image_size 48", "--no_flip", "--equivalent logits", "--split_seed 2", "--split_seed seed"]
    flags += ["--precision bfloat16", "--precision strict", "--precision tf32", "--debias"]
    names = {run_settings.parse(flag.split()).run_name for flag in flags}
    assert len(names) == len(flags)
    assert "cifar10-resnet18-weight0.1-c100-bn-seed1" in names
    assert "cifar10-resnet18-learning_rate=0.05-weight0.1-c100-bn-seed1" in names
    assert {flag.split()[0] for flag in flags if flag} == {f"--{name}" for name in determining(run_settings.parse([]))}


@pytest.mark.parametrize("name", ["name", "dataset", "network", "seed", "restart"])
def test_none_is_not_taken_for_a_word(name):
    with pytest.raises(SettingError, match=f"^{name}: must not be None$"):
        run_settings.Settings(**{name: None})


def test_default_name_that_no_file_could_have():
    others = "--batch_size 99 --num_epochs 12345678 --scheduler none --stem own --compile --precision bfloat16"
    numbers = "--learning_rate 0.12345678901234567 --momentum 0.12345678901234567 --weight_decay 0.1234567890123456"
    with pytest.raises(SettingError, match="name: these settings are too long for a default name: give one"):
        prepared([*others.split(), *numbers.split(), "--bn_weight", "0.12345678901234567"])


def test_path_in_every_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in (f"{tmp_path}/runs", f"{tmp_path}/runs/", "runs", "./runs/", "~/runs", "~/runs/"):
        assert prepared(["--path", spelling]).path.absolute() == tmp_path / "runs"
    assert prepared([]).path.absolute() == tmp_path


def test_defaults_of_the_paper():
    settings = vars(prepared(["--device", "cpu"]))
    expected = {"dataset": "cifar10", "network": "resnet18", "batch_size": 128, "num_epochs": 180}
    expected |= {"learning_rate": 0.1, "scheduler": "cos", "momentum": 0.9, "weight_decay": 1e-4}
    expected |= {"bn_weight": 0.1, "c": 100, "input_norm": "bn", "seed": 1, "path": Path().absolute()}
    assert expected.items() <= settings.items()


def test_missing_data_is_one_line(no_network, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--path", str(tmp_path / "new"), "--num_epochs", "1", "--device", "cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.startswith("train.py: error: CIFAR-10 is not in") and error.count("\n") == 1
