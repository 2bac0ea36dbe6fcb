"""What a small initial γ changes before the first step of a training, and in the first steps.

    python results/mechanism/mechanism.py --dataset digits --seeds 1-5

`equivalence.py` has the algebra: the logits start γ0 times as large, and so do all gradients of convolutions. Here, the
same is measured.
"""

import copy
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn, optim
from torch.optim.swa_utils import update_bn

import run_settings
import train
from command_line.endings import one_line_endings, say
from command_line.files import write_atomically
from command_line.flag_types import FlagError, Parser, as_typed, folder, whole
from experiment.plan import distinct, seed_range
from image_sets.batches import Batches
from image_sets.loading import ImageSet
from reporting.drawing import add_legend, label_axes, line_styles, make_axes, make_logarithmic, save
from reporting.tables import markdown
from run_settings import PAPER, Settings
from seeds import keep_random_states, make_deterministic
from training import preparation
from training.trial import check_network
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate

DIGITS = ("--batch_size=64", "--learning_rate=0.05")  # what the README trains digits with
TRAINED = ("baseline", "proposed")  # the methods whose first steps are looked at
BN_WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)
MEASURED = (0, 1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000)  # steps after which there is a measurement
CONVOLUTION = "convolution, from input to output"

# --- measurements ---------------------------------------------------------------------------------------------------


@dataclass
class AtInitialization:
    """What a network computes of a batch before its first step."""

    gradient_norms: dict[str, float]  # Euclidean norm of the gradient of the weights, for each of `convolutions`
    logit_deviation: float  # standard deviation of all logits of the batch
    loss: float  # cross-entropy, in nats


def measure_initialization(network: nn.Module, images: Tensor, labels: Tensor) -> AtInitialization:
    """Measure a network in training mode on one batch, as `Batches` gives it. The network is left as it is."""
    network = copy.deepcopy(network).train()
    network.zero_grad()
    logits = network(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    norms = {name: layer.weight.grad.norm().item() for name, layer in convolutions(network).items()}
    return AtInitialization(norms, logits.detach().std(correction=0).item(), loss.item())


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    """All convolutions that are trained by name, in the order of `network.named_modules()`; ValueError without any."""
    modules = network.named_modules()
    found = {name: layer for name, layer in modules if isinstance(layer, nn.Conv2d) and layer.weight.requires_grad}
    if not found:
        raise ValueError("the network has no convolution that is trained, and nothing to look at")
    return found


@dataclass
class FirstSteps:
    """The first steps of a training, in arrays (M,) with an element for each of M measurements."""

    steps: np.ndarray  # how many steps were made until then, int
    running: np.ndarray  # test accuracy in percent, as usual: with the running statistics of the batch norms
    estimated_anew: np.ndarray  # the same, of a copy whose statistics were estimated anew, with the weights as they are
    angles: dict[str, np.ndarray]  # between the weights and the initial ones, in degrees, for each of `convolutions`


def construct(settings: Settings, image_set: ImageSet) -> nn.Module:
    """The network of a run before its first step, with the random generators as they are then."""
    make_deterministic(settings.seed)
    return preparation.construct(settings, len(image_set.classes), image_set.size).to(settings.device)


def measure_first_steps(
    settings: Settings, image_set: ImageSet, steps: Iterable[int], num_images: int = 1000
) -> FirstSteps:
    """Train as `train.train` does, at the initial learning rate all along, and measure after some of the steps.

    Args:
        settings: those of the run, as `preparation.prepare` returns them.
        image_set: its data set, on its device.
        steps: after how many steps to measure; 0 is before the first.
        num_images: how many test images to measure on, and about how many training images to estimate statistics on.
    """
    network, wanted = construct(settings, image_set), set(steps)
    groups = adjust_weight_decay_and_learning_rate(network, settings.weight_decay, settings.learning_rate, settings.c)
    optimizer = optim.SGD(groups, momentum=settings.momentum)
    few = replace(image_set, splits={**image_set.splits, "test": image_set.sample("test", num_images)})
    train_batches, test_batches = (
        Batches(few, split, settings.batch_size, normalize=settings.input_norm == "dataset")
        for split in ("train", "test")
    )
    initial = {name: layer.weight.detach().clone() for name, layer in convolutions(network).items()}
    found: dict[int, tuple[float, float, list[float]]] = {}
    for step, batch in enumerate(chain.from_iterable(repeat(train_batches))):
        if step in wanted:
            with keep_random_states():
                anew = copy.deepcopy(network)
                update_bn(islice(train_batches, math.ceil(num_images / settings.batch_size)), anew)
                accuracies = [train.measure(one, test_batches, settings)[1] for one in (network, anew)]
            angles = [angle(initial[name], layer.weight) for name, layer in convolutions(network).items()]
            found[step] = (*accuracies, angles)
        if step == max(wanted):
            break
        train.train_one_epoch(network, [batch], optimizer, settings)
    running, estimated_anew, angles = map(np.array, zip(*found.values(), strict=True))
    return FirstSteps(np.array(list(found)), running, estimated_anew, dict(zip(initial, angles.T, strict=True)))


Measured = TypeVar("Measured", AtInitialization, FirstSteps)


def mean_over_seeds(measured: Sequence[Measured]) -> Measured:
    """The mean of measurements that differ in their seed alone, number by number."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: mean([value[name] for value in values]) for name in values[0]}
        return np.mean(values, axis=0).astype(np.asarray(values[0]).dtype)  # steps stay whole numbers

    return type(measured[0])(*(mean(values) for values in zip(*(vars(one).values() for one in measured), strict=True)))


def angle(one: Tensor, other: Tensor) -> float:
    """The angle between two tensors of the same shape, as vectors, in degrees."""
    one, other = (F.normalize(tensor.detach().double().flatten(), dim=0) for tensor in (one, other))
    half = math.atan2((one - other).norm().item(), (one + other).norm().item())  # exact for small angles too
    return math.degrees(2 * half)


# --- figures --------------------------------------------------------------------------------------------------------


def draw_initialization(measured: Mapping[float, AtInitialization]) -> Figure:
    """Gradients by depth, and scale of the logits and loss, by the initial γ."""
    by_depth, by_scale = make_axes(columns=2)
    norms = {f"initial γ {bn_weight:g}": list(at.gradient_norms.values()) for bn_weight, at in measured.items()}
    deviations, losses = np.array([(at.logit_deviation, at.loss) for at in measured.values()]).T
    of_scale = {"standard deviation of the logits": deviations, "loss (nats)": losses}
    bn_weights, styles = np.array(list(measured)), line_styles([*norms, *of_scale])
    for label, values in norms.items():
        by_depth.plot(range(1, len(values) + 1), values, label=label, **styles[label])
    for label, values in of_scale.items():
        by_scale.plot(bn_weights, values, label=label, **styles[label])
    proportional = deviations[-1] * bn_weights / bn_weights[-1]
    by_scale.plot(bn_weights, proportional, color="0.5", linewidth=1, label="in proportion to γ")
    label_axes(by_depth, CONVOLUTION, "norm of the gradient, log scale")
    make_logarithmic(by_depth, np.array([*norms.values()]))
    by_scale.set(xscale="log", xlabel="initial γ, log scale", ylabel="logits and loss, log scale")
    by_scale.set_xticks(bn_weights, [f"{bn_weight:g}" for bn_weight in bn_weights])
    by_scale.minorticks_off()
    make_logarithmic(by_scale, np.concatenate([*of_scale.values(), proportional]))
    by_scale.grid(alpha=0.3)
    add_legend(by_scale.figure)
    return by_scale.figure


def draw_statistics(runs: Mapping[str, FirstSteps]) -> Figure:
    """Test accuracy by step, with running statistics and with those that are estimated anew; a panel for each run."""
    panels = make_axes(columns=len(runs), sharey=True, squeeze=False)[0]
    styles = line_styles(labels := ("running statistics", "estimated anew"))
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        for label, values in zip(labels, (run.running, run.estimated_anew), strict=True):
            panel.plot(run.steps, values, label=label, **styles[label])
        label_axes(panel, "training step", "test accuracy (%)" if panel is panels[0] else "")
        panel.set_title(name)
    panels[0].set_ylim(0, 100)
    add_legend(panels[0].figure)
    return panels[0].figure


def draw_rotation(runs: Mapping[str, FirstSteps]) -> Figure:
    """How far the weights of each convolution have turned, by depth: a panel for each of three measurements."""
    steps = next(iter(runs.values())).steps
    places = np.unique(np.linspace(0, len(steps) - 1, 4).round().astype(int))[1:]  # not before the first
    panels, styles = make_axes(columns=len(places), width=3, sharey=True, squeeze=False)[0], line_styles(runs)
    for panel, place in zip(panels, places, strict=True):
        for name, run in runs.items():
            angles = [of_steps[place] for of_steps in run.angles.values()]
            panel.plot(range(1, len(angles) + 1), angles, label=name, **styles[name])
        label_axes(panel, CONVOLUTION, "angle to the initial weights (degrees)" if panel is panels[0] else "")
        panel.set_title(f"after {steps[place]} step{'s' * int(steps[place] > 1)}")
    panels[0].set_ylim(bottom=0)
    add_legend(panels[0].figure)
    return panels[0].figure


# --- the command ----------------------------------------------------------------------------------------------------


def tabulate_initialization(measured: Mapping[float, AtInitialization]) -> str:
    """What the first figure shows, as a Markdown table."""
    rows = []
    for bn_weight, at in measured.items():
        norms = list(at.gradient_norms.values())
        row = {"initial γ": f"{bn_weight:g}", "logits": f"{at.logit_deviation:.3g}", "loss": f"{at.loss:.3f}"}
        places = {"first": 0, "middle": len(norms) // 2, "last": -1}
        rows.append(row | {f"gradient, {name}": f"{norms[place]:.2g}" for name, place in places.items()})
    return markdown(rows, list(rows[0]))


def tabulate_first_steps(runs: Mapping[str, FirstSteps]) -> str:
    """What the other figures show, as a Markdown table."""
    rows = []
    for name, run in runs.items():
        for place, step in enumerate(run.steps):
            row = {"setting": name, "step": f"{step}", "running (%)": f"{run.running[place]:.1f}"}
            row |= {"estimated anew (%)": f"{run.estimated_anew[place]:.1f}"}
            angles = [of_steps[place] for of_steps in run.angles.values()]
            rows.append(row | {"median angle": f"{np.median(angles):.2f}°"})
    return markdown(rows, list(rows[0]))


def make_parser() -> Parser:
    """The flags of the command itself."""
    epilog = "All other flags are those of train.py, see python train.py --help."
    parser = Parser(prog="mechanism.py", description=__doc__.split("\n")[0], epilog=epilog)
    flag = parser.add_argument
    flag("--output", type=folder, help="folder for numbers and figures (default: mechanism-SETTINGS/ in results/)")
    flag("--dataset", default="digits", type=run_settings.dataset_name, help="as of train.py (default: %(default)s)")
    seeds_help = "whose mean is taken, such as 1-5 (default: 1)"
    flag("--seeds", nargs="+", default=[[1]], type=seed_range, metavar="SEEDS", help=seeds_help)
    flag("--steps", default=100, type=whole(1), help="training steps to look at (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: measure, write and print the numbers, draw; see `one_line_endings` for its exit codes."""
    with one_line_endings("mechanism.py"):
        parser = make_parser()
        args, others = parser.parse_known_args(argv)
        flags = [f"--dataset={args.dataset}", *(DIGITS if args.dataset == "digits" else ()), *others]
        first = preparation.prepare(run_settings.parse(flags, parser))
        for name in (*run_settings.COMPARED, "seed"):
            if vars(first)[name] != run_settings.DEFAULTS[name]:
                raise FlagError(f"argument --{name}: it is set here: leave it out")
        output = args.output or first.path / "results" / f"mechanism-{run_settings.experiment_name(first)}"
        output.mkdir(parents=True, exist_ok=True)
        seeds, steps = distinct(args.seeds), [*(step for step in MEASURED if step < args.steps), args.steps]
        of_seeds = f"mean of {len(seeds)} seeds" if seeds[1:] else f"seed {seeds[0]}"
        network = run_settings.describe_network(vars(first))
        title = f"{network}, learning rate {as_typed(first.learning_rate)}, {of_seeds}"
        say(f"{title}: one batch before training, then {args.steps} steps of {' and of '.join(TRAINED)}", "")
        at_first, by_step = {weight: [] for weight in BN_WEIGHTS}, {method: [] for method in TRAINED}
        for seed in seeds:
            runs = {name: replace(first, seed=seed, **PAPER[name]) for name in TRAINED}
            # with the statistics that the baseline needs; workers are of one pass over the images at a time
            image_set = preparation.load_images(replace(runs["baseline"], workers=0), report=say)
            for bn_weight, found in at_first.items():
                network = construct(replace(runs["proposed"], bn_weight=bn_weight), image_set)
                batch = next(iter(Batches(image_set, "train", first.batch_size, normalize=False)))
                found.append(measure_initialization(network, *batch))
            for name, settings in runs.items():
                check_network(settings, construct(settings, image_set), image_set)
                by_step[name].append(measure_first_steps(settings, image_set, steps))
        at_first = {bn_weight: mean_over_seeds(found) for bn_weight, found in at_first.items()}
        by_step = {name: mean_over_seeds(found) for name, found in by_step.items()}
        text = f"{tabulate_initialization(at_first)}\n\n{tabulate_first_steps(by_step)}\n"
        say(text)
        write_atomically(output / "mechanism.md", f"{title}\n\n{text}".encode())
        figures = {"initialization": draw_initialization(at_first), "running-statistics": draw_statistics(by_step)}
        for name, figure in (figures | {"rotation": draw_rotation(by_step)}).items():
            figure.suptitle(title, fontsize=10)
            say(*save(figure, output / f"mechanism-{name}"))


if __name__ == "__main__":
    main()
