"""Logs that a resumed run goes on with: rows past its checkpoint are dropped, as they will come again."""

import csv
import io
from pathlib import Path

from . import TrainError
from .checkpoint import write_atomically

STEP_FIELDS = ["step", "epoch", "lr", "loss", "accuracy", "images_per_second"]
EPOCH_FIELDS = ["step", "epoch", "lr", "loss", "accuracy", "test_loss", "test_accuracy", "test_top5",
                "seconds"]


class Csv:
    """A CSV file keyed by step, flushed at every row. Floats are written so that they read back equal."""

    def __init__(self, path: Path, fields: list[str], start: int) -> None:
        rows = []
        if start and path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file)
                        if None not in row.values() and row["step"].isdigit() and int(row["step"]) <= start]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))
        self._file = open(path, "a", newline="")  # noqa: SIM115 - held open for the run
        self._writer = csv.DictWriter(self._file, fields, extrasaction="ignore")

    def write(self, row: dict) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Log:
    """`steps.csv` and `epochs.csv` in `out`, and the same in TensorBoard's format if asked for."""

    def __init__(self, out: Path, start: int, tensorboard: bool) -> None:
        writer = summary_writer() if tensorboard else None
        self._steps = Csv(out / "steps.csv", STEP_FIELDS, start)
        self._epochs = Csv(out / "epochs.csv", EPOCH_FIELDS, start)
        self._board = writer and writer(out, purge_step=start + 1)

    def step(self, row: dict) -> None:
        self._steps.write(row)
        self._to_board("step", row)

    def epoch(self, row: dict) -> None:
        self._epochs.write(row)
        self._to_board("epoch", row)
        if self._board:
            self._board.flush()

    def _to_board(self, group: str, row: dict) -> None:
        for name, value in row.items():
            if self._board and name not in ("step", "epoch"):
                self._board.add_scalar(f"{group}/{name}", value, row["step"])

    def close(self) -> None:
        self._steps.close()
        self._epochs.close()
        if self._board:
            self._board.close()


def summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise TrainError(f"--tensorboard needs the package tensorboard ({e}): pip install tensorboard") from e
    return SummaryWriter
