"""The settings of a run: one field a flag of `train.py`, with the paper's values as defaults.

Also the methods that the paper compares, what makes two runs comparable, and the names of files. Importing this is
quick.
"""

import argparse
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from command_line.flag_types import Parser, SettingError, as_typed, file_name, folder, number, whole

EXAMPLES = """examples:
  python train.py --dataset digits --num_epochs 5 --batch_size 64 --learning_rate 0.05  # a minute on a CPU
  python train.py --precision bfloat16 --compile  # the paper's training, fast on a GPU
  python train.py --bn_weight 1 --c 1 --input_norm dataset  # its baseline
  python train.py --dataset flowers --network my_networks:small  # images/flowers; small() in my_networks.py
"""

Value = str | int | float | bool | None


class Known(NamedTuple):
    """What is known of a data set before it is loaded."""

    num_train: int  # images that are trained on
    pixels: int  # height and width of an image
    num_classes: int


DATASETS = {"cifar10": Known(45_000, 32, 10), "cifar100": Known(45_000, 32, 100), "digits": Known(1_293, 8, 10)}
SMALL_IMAGE = 64  # pixels: up to here, images keep their size, stay decoded, and a ResNet gets the stem for small ones
LARGE_IMAGE = 224  # pixels of all others, unless another size is given
STEMS = ("auto", "small", "own")
INPUT_NORMS = ("bn", "dataset")
SELECTIONS = ("best", "last")  # the epoch whose test accuracy counts: that of the best validation accuracy, the last
PRECISIONS = ("float32", "strict", "tf32", "bfloat16")
MAX_SEED = 88265  # from 0 to here, every seed makes draws of its own
OWN_SEED = "seed"  # as a split_seed: that of the run itself

COMPARED = ("bn_weight", "c", "input_norm", "equivalent")  # the settings in which methods differ
PAPER = {  # the methods that it compares
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


def dataset_name(text: str) -> str:
    """The type of a setting that names a data set. Whether there is such a folder is not checked here."""
    text = text.rstrip("/")
    if not text:
        raise argparse.ArgumentTypeError(f"must be {', '.join(DATASETS)} or the name of a folder in images/")
    name = file_name(Path(text).name)
    return name if name == text else str(absolute(text))  # a path, which `Settings` refuses: it knows where images are


def network_name(text: str) -> str:
    """The type of a setting that names a network. Whether it exists is not checked here: only torch can tell."""
    if not re.fullmatch(r"\w+|\w+(\.\w+)*:\w+", text):
        raise argparse.ArgumentTypeError(f"must be the name of a torchvision network or MODULE:FUNCTION, not {text!r}")
    return text


def seed_of_split(text: str) -> int | str:
    """The type of a setting that takes a seed or `OWN_SEED`."""
    try:
        return text if text == OWN_SEED else whole(0)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or the word {OWN_SEED}") from None


def absolute(text: str) -> Path:
    """The type of a setting that names a folder, which stays the same when the current folder changes."""
    return folder(text).absolute()


# from 1e-30 to 1e30: what float32 can hold, with room for a product of two
positive = number("a number from 1e-30 to 1e30", lambda x: 1e-30 <= x <= 1e30)
not_negative = number("0 or a number from 1e-30 to 1e30", lambda x: x == 0 or 1e-30 <= x <= 1e30)
fraction = number("a number from 0 to below 1", lambda x: 0 <= x < 1)
reduction = number("0 or 1 (no reduction) or a number from 1 to 1e30", lambda x: x == 0 or 1 <= x <= 1e30)

# the groups of flags, in the order in which --help shows them
METHOD, TRAINING, FILES, BEYOND = GROUPS = "the paper's method", "training", "files and device", "beyond the paper"


def setting(
    group: str, default: Value | Path, help: str, type: Callable[[str], Any] = str, choices: Sequence[str] | None = None
) -> Any:
    """A field of `Settings`: `type` makes its value of the text after the flag, and refuses a wrong one."""
    options = {"action": "store_true"} if default is False else {"type": type, "choices": choices}
    return field(default=default, metadata={"group": group, "help": help, **options})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run. SettingError (a ValueError) names the first that is wrong.

    Whether device, network and images exist is not checked here: that takes torch.
    """

    # the order is that of the lines of a result file, and of the parts of a default name
    path: Path = setting(FILES, Path(), "folder of images/, networks/, results/ (default: the current one)", absolute)
    name: str = setting(FILES, "", "name of the run's files (default: made from the settings)", file_name)
    dataset: str = setting(
        TRAINING, "cifar10", f"{', '.join(DATASETS)} or a folder in images/ with train/ and test/", dataset_name
    )
    network: str = setting(TRAINING, "resnet18", "a torchvision network, or MODULE:FUNCTION of your own", network_name)
    batch_size: int = setting(TRAINING, 128, "images in a batch", whole(1))
    num_epochs: int = setting(TRAINING, 180, "passes over the training images", whole(1))
    learning_rate: float = setting(TRAINING, 0.1, "initial learning rate", positive)
    scheduler: str = setting(TRAINING, "cos", "learning rate: half a cosine, or constant", choices=("cos", "none"))
    momentum: float = setting(TRAINING, 0.9, "momentum of SGD", fraction)
    weight_decay: float = setting(TRAINING, 1e-4, "weight decay; biases, γ and β have none", not_negative)
    device: str | None = setting(FILES, None, "cpu, cuda, cuda:1 ... (default: the accelerator that torch finds)")
    checkpoint_seconds: float = setting(FILES, 60.0, "least time between two checkpoints", not_negative)
    restart: bool = setting(FILES, False, "start over and replace the earlier run of this name")
    tensorboard: bool = setting(FILES, False, "also write curves for TensorBoard")
    stem: str = setting(
        BEYOND, "auto", "a ResNet's first layers; small: 3×3, no pooling; auto: by image size", choices=STEMS
    )
    image_size: int | None = setting(
        BEYOND, None, "height and width in pixels (default: their own if alike and small, else 224)", whole(1)
    )
    no_flip: bool = setting(BEYOND, False, "never mirror an image")
    split_seed: int | str = setting(
        BEYOND, 0, "seed that draws the validation images; the word seed: the run's own", seed_of_split
    )
    workers: int | None = setting(
        FILES, None, "processes that decode large images (default: the run's threads)", whole(0)
    )
    precision: str = setting(BEYOND, "float32", "how matrix products and convolutions are rounded", choices=PRECISIONS)
    compile: bool = setting(BEYOND, False, "compile the network with torch.compile")
    debias: bool = setting(BEYOND, False, "evaluate without the starting values of batch norm's running statistics")
    equivalent: str = setting(
        BEYOND,
        "no",
        "train with γ = 1 instead: with the logits scaled, or with learning rates scaled too",
        choices=("no", "logits", "logits+rates"),
    )
    bn_weight: float = setting(METHOD, 0.1, "initial γ of every batch norm; 1 is usual", positive)
    c: float = setting(METHOD, 100.0, "divides the learning rate of γ; 0 means 1", reduction)
    input_norm: str = setting(METHOD, "bn", "a batch norm in front, or the data set's statistics", choices=INPUT_NORMS)
    seed: int = setting(TRAINING, 1, "seed of weights, batches and flips", whole(0))

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, checked(one.name, getattr(self, one.name), one.default, **one.metadata))
        if Path(self.dataset).is_absolute():
            raise SettingError("dataset", how_to_name(Path(self.dataset), self.path / "images"))
        if self.debias and self.equivalent == "logits+rates":  # whose running variances do not start at 1
            raise SettingError("debias", "does not go with --equivalent logits+rates: leave one of them out")
        if self.dataset in DATASETS:
            check_batch_size(self, DATASETS[self.dataset].num_train)
        try:
            file_name(self.run_name)
        except argparse.ArgumentTypeError:
            raise SettingError("name", "these settings are too long for a default name: give one") from None

    @property
    def run_name(self) -> str:
        """How the names of the run's files begin: `name`, or else one that differs where a run's numbers differ."""
        return self.name or f"{experiment_name(self)}-{method_name(self)}-seed{self.seed}"


def checked(name: str, value: Any, default: Value | Path, **metadata: Any) -> Any:
    """The value of a setting, of the type of its field. SettingError where it is not allowed."""
    if value is None:
        if default is not None:
            raise SettingError(name, "must not be None")
        return None
    if default is False:
        if not isinstance(value, bool):
            raise SettingError(name, f"must be True or False, not {value!r}")
        return value
    if metadata["choices"] and value not in metadata["choices"]:
        raise SettingError(name, f"must be one of {', '.join(metadata['choices'])}, not {value!r}")
    try:
        return metadata["type"](str(value))
    except argparse.ArgumentTypeError as error:
        raise SettingError(name, str(error)) from None


DEFAULTS = {one.name: one.default for one in fields(Settings)}
# settings that leave a run's numbers alone
WITHOUT_EFFECT = ("path", "name", "device", "checkpoint_seconds", "restart", "workers", "tensorboard")


def make_parser() -> Parser:
    """A parser with a flag for each field of `Settings`."""
    description = "Train a network by the method of 'Revisiting Batch Norm Initialization'."
    parser = Parser(prog="train.py", usage="%(prog)s [FLAG ...]", description=description, epilog=EXAMPLES)
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for one in fields(Settings):
        options = {key: value for key, value in one.metadata.items() if key != "group"}
        if one.default is not False and one.default not in (None, "", Path()):
            options["help"] += f" (default: {as_typed(one.default)})"
        groups[one.metadata["group"]].add_argument(f"--{one.name}", default=one.default, **options)
    return parser


def parse(argv: Sequence[str] | None = None, command: Parser | None = None) -> Settings:
    """The settings of a run from the flags of `train.py`. FlagError or SettingError names the one that is wrong.

    `command` is the parser of a command that has these flags beside its own, which may be meant by a wrong one.
    """
    parser = make_parser()
    parser.others = command.names if command else []
    return Settings(**vars(parser.parse_args(argv)))


def as_arguments(settings: Settings) -> list[str]:
    """The arguments of `train.py` of which `parse` makes these settings."""
    values = {name: value for name, value in vars(settings).items() if value != DEFAULTS[name]}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]


def check_batch_size(settings: Settings, num_train: int) -> None:
    """SettingError where there are fewer training images than a batch has."""
    if settings.batch_size > num_train:
        problem = f"has {num_train} training images, fewer than a batch of {settings.batch_size}"
        raise SettingError("batch_size", f"{settings.dataset} {problem}")


def how_to_name(folder: Path, images: Path) -> str:
    """What to do where a folder was given as a data set, and not the name of one that lies in `images`."""
    if folder.name in DATASETS:
        return f"{folder.name} is known without a folder: give {folder.name}, or {folder} another name"
    if not folder.is_dir():
        return f"there is no folder {folder}; those to train on are in {images}"
    if (images / folder.name).exists() and folder.samefile(images / folder.name):
        return f"give its name alone: {folder.name}"
    source, target = shlex.quote(str(folder)), shlex.quote(str(images))
    return f"{folder} is not in {images}: give {folder.name} after mkdir -p {target} && ln -s {source} {target}"


def split_seed(values: Mapping[str, Value]) -> int:
    """The seed with which the images of a run with these settings are split."""
    return values["seed"] if values["split_seed"] == OWN_SEED else values["split_seed"]


def compared(values: Mapping[str, Value]) -> dict[str, Value]:
    """The settings of `COMPARED` among these; one that is missing is at its default, a c of 0 is 1."""
    found = {name: values.get(name, DEFAULTS[name]) for name in COMPARED}
    return found | {"c": found["c"] or 1.0}  # both mean no reduction


def determining(settings: Settings) -> dict[str, Value]:
    """The settings that determine a run's numbers, by name: all but those of `WITHOUT_EFFECT`."""
    return {name: value for name, value in vars(settings).items() if name not in WITHOUT_EFFECT}


def describe_network(values: Mapping[str, Value]) -> str:
    """What is trained on what, as titles say it."""
    stems = {"auto": "", "small": " with first layers for small images", "own": " with its own first layers"}
    return f"{values['network']}{stems[values['stem']]} on {values['dataset']}"


def method_name(settings: Settings) -> str:
    """The part of a default name that stands for the method."""
    name = f"weight{as_typed(settings.bn_weight)}-c{as_typed(settings.c)}-{settings.input_norm}"
    return name if settings.equivalent == DEFAULTS["equivalent"] else f"{name}-{settings.equivalent}"


def experiment_name(settings: Settings) -> str:
    """The part of a default name that an experiment's runs share: data set, network, what is not at its default."""
    others = {
        name: value
        for name, value in determining(settings).items()
        if name not in ("dataset", "network", "seed", *COMPARED) and value != DEFAULTS[name]
    }
    parts = [name if value is True else f"{name}={as_typed(value)}" for name, value in others.items()]
    return "-".join((settings.dataset, settings.network.replace(":", "."), *parts))


def differences(
    one: Mapping[str, Value], other: Mapping[str, Value], apart_from: Collection[str] = ()
) -> dict[str, tuple[Value, Value]]:
    """The settings that determine a run's numbers and differ between the headers of two result files, with both values.

    One that is missing, because the file is older, was at its default.
    """
    names = [name for name in DEFAULTS if name not in (*WITHOUT_EFFECT, *apart_from)]
    values = {name: (one.get(name, DEFAULTS[name]), other.get(name, DEFAULTS[name])) for name in names}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}
