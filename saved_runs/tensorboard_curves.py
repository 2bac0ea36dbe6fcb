"""A live view of a run in TensorBoard: the columns of its result file, its settings, γ and β by layer."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from run_settings import Settings, determining
from saved_runs.results import COLUMNS, Results


class Curves:
    """What TensorBoard shows of a run, in the folder tensorboard/NAME; nothing unless its settings ask for it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.writer: Any = None

    def add(self, network: nn.Module, results: Results) -> None:
        """Show the last epoch of the results so far, and the network's γ and β after it.

        Of a run that goes on, epochs that are made again are replaced, and those of which nothing is shown yet are
        added, without γ and β. OSError where the files cannot be written.
        """
        if not self.settings.tensorboard:
            return
        last = results.num_epochs
        for epoch in range(last, last + 1) if self.writer else self.open(last):
            for name in COLUMNS[1:]:
                self.writer.add_scalar(name, results.columns[name][epoch - 1], epoch)
        for name, layer in network.named_modules():
            if isinstance(layer, _BatchNorm) and layer.affine:
                if self.settings.input_norm == "bn":  # let the other layers be called as they are without it
                    name = "input" if name == "0" else name.removeprefix("1.")
                for letter, values in {"γ": layer.weight, "β": layer.bias}.items():
                    if values.requires_grad:  # β of the input layer stays 0
                        self.writer.add_histogram(f"{letter}/{name}", values, last, bins="auto")
        self.writer.flush()

    def open(self, epoch: int) -> range:
        """Begin to write at this epoch; returns the epochs that are to be added."""
        from torch.utils.tensorboard import SummaryWriter  # it takes seconds, and most runs do without
        from torch.utils.tensorboard.summary import hparams

        folder = self.settings.path / "tensorboard" / self.settings.run_name
        earlier = list(folder.glob("events.*"))
        for file in earlier if epoch == 1 else []:  # of a run that this one replaces
            file.unlink()
        self.writer = SummaryWriter(folder, purge_step=epoch)
        settings = {name: "" if value is None else value for name, value in determining(self.settings).items()}
        for summary in hparams(settings, {"val_accuracy": 0.0, "test_accuracy": 0.0})[:2]:
            self.writer.file_writer.add_summary(summary)  # the third would say that the run has ended
        return range(epoch if earlier else 1, epoch + 1)

    def close(self) -> None:
        """End the thread that writes."""
        if self.writer:
            self.writer.close()
