"""Every flag of a run in one block, the paper's settings by name, what makes runs comparable, and names of files.

Nothing here takes long to import, so that `--help` and a wrong flag are answered at once.
"""

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from command_line.flag_types import FlagError, Parser, as_typed, file_name, folder, number, whole

Value = str | int | float | bool | None


class Known(NamedTuple):
    """What is known of a data set before it is loaded."""

    num_train: int  # images that are trained on
    pixels: int  # height and width of an image
    num_classes: int


DATASETS = {"cifar10": Known(45_000, 32, 10), "cifar100": Known(45_000, 32, 100), "digits": Known(1_293, 8, 10)}
SMALL_IMAGE = 64  # pixels: up to here, images keep their size, stay decoded, and a ResNet gets the stem for small ones
LARGE_IMAGE = 224  # pixels of all others, unless another size is given
SCHEDULES = ("cos", "none")
STEMS = ("auto", "small", "own")
INPUT_NORMS = ("bn", "dataset")
SELECTIONS = ("best", "last")  # the epoch whose test accuracy counts: that of the best validation accuracy, the last
EQUIVALENTS = ("no", "logits", "logits+rates")
PRECISIONS = ("float32", "strict", "tf32", "bfloat16")
MAX_SEED = 88265  # from 0 to here, every seed makes draws of its own
OWN_SEED = "seed"  # as a split_seed: that of the run itself

COMPARED = ("bn_weight", "c", "input_norm", "equivalent")  # the flags in which settings that are compared differ
PAPER = {  # what it compares, by name
    "baseline": {"bn_weight": 1.0, "c": 1.0, "input_norm": "dataset"},
    "proposed": {"bn_weight": 0.1, "c": 100.0, "input_norm": "bn"},
    "init": {"bn_weight": 0.1, "c": 1.0, "input_norm": "bn"},
    "rate": {"bn_weight": 1.0, "c": 100.0, "input_norm": "bn"},
    "input": {"bn_weight": 1.0, "c": 1.0, "input_norm": "bn"},
}
NAMED = PAPER | {  # with those of equivalence.py
    "logits": {"bn_weight": 0.1, "c": 1.0, "input_norm": "bn", "equivalent": "logits"},
    "logits+rates": {"bn_weight": 0.1, "c": 100.0, "input_norm": "bn", "equivalent": "logits+rates"},
}
# from 1e-30 to 1e30: what float32 can hold, with room for a product of two
positive = number("a number from 1e-30 to 1e30", lambda x: 1e-30 <= x <= 1e30)
# flags that leave a run's numbers alone
WITHOUT_EFFECT = ("path", "name", "device", "checkpoint_seconds", "restart", "workers", "tensorboard")


def dataset_name(text: str) -> str:
    """The type of a flag that names a data set. Whether there is such a folder is not checked here."""
    if not text:
        raise argparse.ArgumentTypeError(f"must be {', '.join(DATASETS)} or the name of a folder in images/")
    return file_name(text)


def network_name(text: str) -> str:
    """The type of a flag that names a network. Whether there is such a one is not checked here: only torch can tell."""
    if not re.fullmatch(r"\w+|\w+(\.\w+)*:\w+", text):
        raise argparse.ArgumentTypeError(f"must be the name of a torchvision network or MODULE:FUNCTION, not {text!r}")
    return text


def seed_of_split(text: str) -> int | str:
    """The type of a flag that takes a seed or `OWN_SEED`."""
    try:
        return text if text == OWN_SEED else whole(0)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or the word {OWN_SEED}") from None


def make_parser() -> Parser:
    """Every flag of a run: what it may be, what it is for, its default."""
    parser = Parser(
        prog="train.py",
        description="Train a network by the method of 'Revisiting Batch Norm Initialization'.",
        usage="%(prog)s [FLAG ...]",
        allow_abbrev=False,
    )
    # as --help shows them, one after the other
    titles = ("the paper's method", "training", "files and device", "beyond the paper")
    method, training, files, beyond = (parser.add_argument_group(title).add_argument for title in titles)
    not_negative = number("0 or a number from 1e-30 to 1e30", lambda x: x == 0 or 1e-30 <= x <= 1e30)
    fraction = number("a number from 0 to below 1", lambda x: 0 <= x < 1)
    reduction = number("0 or 1 (no reduction) or a number from 1 to 1e30", lambda x: x == 0 or 1 <= x <= 1e30)

    # the order is that of the lines of a result file, and of the parts of a default name
    files("--path", default="", type=folder, help="folder of images/, networks/, results/ (default: the current one)")
    files("--name", default="", type=file_name, help="name of the run's files (default: made from the settings)")
    dataset_help = f"{', '.join(DATASETS)} or a folder in images/ with train/ and test/ (default: %(default)s)"
    training("--dataset", default="cifar10", type=dataset_name, help=dataset_help)
    network_help = "a torchvision network, or MODULE:FUNCTION of your own (default: %(default)s)"
    training("--network", default="resnet18", type=network_name, help=network_help)
    training("--batch_size", default=128, type=whole(1), help="images in a batch (default: %(default)s)")
    training("--num_epochs", default=180, type=whole(1), help="passes over the training images (default: %(default)s)")
    training("--learning_rate", default=0.1, type=positive, help="initial learning rate (default: %(default)s)")
    training("--scheduler", default="cos", choices=SCHEDULES, help="cosine or constant rate (default: %(default)s)")
    training("--momentum", default=0.9, type=fraction, help="momentum of SGD (default: %(default)s)")
    training("--weight_decay", default=1e-4, type=not_negative, help="weight decay (default: %(default)s)")
    files("--device", help="cpu, cuda, cuda:1 ... (default: the accelerator that torch finds, else cpu)")
    seconds_help = "least time between two checkpoints (default: %(default)g)"
    files("--checkpoint_seconds", default=60.0, type=not_negative, help=seconds_help)
    files("--restart", action="store_true", help="start over, replacing what an earlier run of this name left")
    files("--tensorboard", action="store_true", help="write curves for TensorBoard too")
    stem_help = "first layers of a ResNet: for small images, its own, or by the images' size (default: %(default)s)"
    beyond("--stem", default="auto", choices=STEMS, help=stem_help)
    beyond("--image_size", type=whole(1), help="height and width in pixels (default: their own if small, else 224)")
    beyond("--no_flip", action="store_true", help="never mirror an image")
    split_help = "seed that draws the validation images, or the word seed for the run's own (default: %(default)s)"
    beyond("--split_seed", default=0, type=seed_of_split, help=split_help)
    files("--workers", type=whole(0), help="processes that decode large images (default: the run's threads)")
    precision_help = "of products and convolutions (default: %(default)s)"
    beyond("--precision", default="float32", choices=PRECISIONS, help=precision_help)
    beyond("--compile", action="store_true", help="compile the network with torch.compile")
    equivalent_help = "train a network with γ = 1 and as small logits, or one that learns the same way (default: no)"
    beyond("--equivalent", default="no", choices=EQUIVALENTS, help=equivalent_help)
    method("--bn_weight", default=0.1, type=positive, help="initial γ of every batch norm (default: %(default)s)")
    method("--c", default=100.0, type=reduction, help="divides the learning rate of γ (default: %(default)g)")
    method("--input_norm", default="bn", choices=INPUT_NORMS, help="what normalizes the images (default: %(default)s)")
    training("--seed", default=1, type=whole(0), help="seed of every draw but the split's (default: %(default)s)")
    return parser


DEFAULTS = vars(make_parser().parse_args([]))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run from its flags, with a name. FlagError names the flag that is wrong.

    Whether the device and the network exist is not checked here: only torch can tell.
    """
    settings = make_parser().parse_args(argv)
    if settings.dataset in DATASETS:
        check_batch_size(settings, DATASETS[settings.dataset].num_train)
    settings.name = settings.name or default_name(settings)
    return settings


def as_arguments(settings: argparse.Namespace) -> list[str]:
    """The arguments of train.py of which `parse` makes these settings."""
    values = {name: value for name, value in vars(settings).items() if value != DEFAULTS[name]}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]


def check_batch_size(settings: argparse.Namespace, num_train: int) -> None:
    """FlagError where there are fewer training images than a batch has."""
    if settings.batch_size > num_train:
        raise FlagError(
            f"argument --batch_size: {settings.dataset} has {num_train} training images,"
            f" fewer than a batch of {settings.batch_size}"
        )


def split_seed(settings: Mapping[str, Value]) -> int:
    """The seed with which the images of a run with these settings are split."""
    return settings["seed"] if settings["split_seed"] == OWN_SEED else settings["split_seed"]


def compared(settings: Mapping[str, Value]) -> dict[str, Value]:
    """The flags of `COMPARED` among these settings; one that they lack is at its default."""
    return {name: settings.get(name, DEFAULTS[name]) for name in COMPARED}


def determining(settings: argparse.Namespace) -> dict[str, Value]:
    """The flags that determine a run's numbers, by name: all but those of `WITHOUT_EFFECT`."""
    return {name: value for name, value in vars(settings).items() if name not in WITHOUT_EFFECT}


def describe_network(settings: Mapping[str, Value]) -> str:
    """What is trained on what, as titles say it."""
    stem = f" (stem {settings['stem']})" * (settings["stem"] != DEFAULTS["stem"])
    return f"{settings['network']}{stem} on {settings['dataset']}"


def setting_name(settings: argparse.Namespace) -> str:
    """The part of a default name that stands for what the paper compares."""
    name = f"weight{as_typed(settings.bn_weight)}-c{as_typed(settings.c)}-{settings.input_norm}"
    return name if settings.equivalent == DEFAULTS["equivalent"] else f"{name}-{settings.equivalent}"


def experiment_name(settings: argparse.Namespace) -> str:
    """The part of a default name that an experiment's runs share: data set, network, what is not at its default."""
    others = {
        name: value
        for name, value in determining(settings).items()
        if name not in ("dataset", "network", "seed", *COMPARED) and value != DEFAULTS[name]
    }
    parts = [name if value is True else f"{name}={as_typed(value)}" for name, value in others.items()]
    return "-".join((settings.dataset, settings.network.replace(":", "."), *parts))


def default_name(settings: argparse.Namespace) -> str:
    """The name of a run whose user gives none: different for runs with different numbers. FlagError if too long."""
    name = f"{experiment_name(settings)}-{setting_name(settings)}-seed{settings.seed}"
    try:
        return file_name(name)
    except argparse.ArgumentTypeError:
        raise FlagError("argument --name: these settings are too long for a default name: give one") from None


def differences(
    one: Mapping[str, Value], other: Mapping[str, Value], apart_from: Collection[str] = ()
) -> dict[str, tuple[Value, Value]]:
    """The flags that determine a run's numbers and differ between two runs, with both values.

    Args:
        one: the settings of a run, as in its result file; a flag that is missing, because the file is older than the
            flag, was at its default.
        other: those of the other run.
        apart_from: flags that may differ.
    """
    names = [name for name in DEFAULTS if name not in (*WITHOUT_EFFECT, *apart_from)]
    values = {name: (one.get(name, DEFAULTS[name]), other.get(name, DEFAULTS[name])) for name in names}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}
