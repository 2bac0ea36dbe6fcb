"""What a training tells."""

from torch import nn

from batch_norm import SETTLED
from saved_runs.run import Run


def introduce(run: Run, network: nn.Module, numbers: str, steps: int) -> list[str]:
    """What a run does, in a line, with a second one where it is resumed and one where its first accuracies mislead."""
    settings = run.settings
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    what = f"{settings.network}, {millions:.1f} million parameters; {settings.dataset}, {numbers}"
    lines = [f"{what}; {settings.device}, {settings.precision}"]
    if run.results:
        lines.append(f"{settings.name} resumes at epoch {run.epochs[0]} of {settings.num_epochs}")
    if run.epochs[0] * steps < SETTLED:
        lines.append(
            f"an epoch has {steps} steps: for about {SETTLED} steps, batch norm's running statistics still depend on"
            " where they started, and accuracies say little"
        )
    return lines
