"""A live view of a run in TensorBoard: the columns of its result file, its settings, γ and β by layer."""

from importlib.util import find_spec
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from command_line.flag_types import SettingError
from run_settings import Settings, determining
from saved_runs.results import COLUMNS, Results

METRICS = ("val_accuracy", "test_accuracy")  # what TensorBoard lists beside the settings of each run


class Curves:
    """What TensorBoard shows of a run, in the folder tensorboard/NAME; nothing without `--tensorboard`.

    A context manager. TensorBoard drops what an earlier process has written of epochs that are made again. Where it has
    written nothing, the numbers of its epochs are added, without γ and β, which are not known any more.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.path / "tensorboard" / settings.run_name
        self.writer: Any = None

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer:
            self.writer.close()

    def add(self, network: nn.Module, earlier: Results | None, epoch: int, *numbers: float) -> None:
        """Add an epoch: its numbers in the order of `results.COLUMNS`, and the network's γ and β after it.

        `earlier` are the results before it, if there are any. OSError where they cannot be written.
        """
        if not self.settings.tensorboard:
            return
        if self.writer is None:
            self.open(epoch, earlier)
        self.add_numbers(epoch, *numbers)
        for name, layer in network.named_modules():
            if isinstance(layer, _BatchNorm) and layer.affine:
                if self.settings.input_norm == "bn":  # let the other layers be called as they are without it
                    name = "input" if name == "0" else name.removeprefix("1.")
                for letter, values in {"γ": layer.weight, "β": layer.bias}.items():
                    if values.requires_grad:  # β of the input layer stays 0
                        self.writer.add_histogram(f"{letter}/{name}", values, epoch, bins="auto")
        self.writer.flush()

    def open(self, epoch: int, earlier: Results | None) -> None:
        """Begin to write, from this epoch on."""
        from torch.utils.tensorboard import SummaryWriter  # it takes seconds, and most runs do without
        from torch.utils.tensorboard.summary import hparams

        files = list(self.folder.glob("events.*"))
        if epoch == 1:  # they are of a run that this one replaces
            for file in files:
                file.unlink()
        self.writer = SummaryWriter(self.folder, purge_step=epoch if files else None)
        settings = {name: "" if value is None else value for name, value in determining(self.settings).items()}
        for summary in hparams(settings, dict.fromkeys(METRICS, 0.0))[:2]:  # the third says that the run has ended
            self.writer.file_writer.add_summary(summary)
        if not files and earlier:
            for row in zip(*(earlier.columns[name].tolist() for name in COLUMNS), strict=True):
                self.add_numbers(*row)

    def add_numbers(self, epoch: int, *numbers: float) -> None:
        """Add the numbers of an epoch."""
        for name, number in zip(COLUMNS[1:], numbers, strict=True):
            self.writer.add_scalar(name, number, epoch)


def check_tensorboard() -> None:
    """SettingError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise SettingError("tensorboard", "there is no TensorBoard here: pip install tensorboard")
