"""Checkpoints, written so that a kill at any instant leaves the old file or the new one, never half of it."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import TrainError


def write_atomically(path: Path, write) -> None:
    """Calls write(file) on a temporary file, flushes it to the disk, and renames it to `path`."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)  # the rename itself is durable only once the directory is
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def make_folder(path: Path) -> None:
    """Makes the folder of a run's results, and those above it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise TrainError(f"--out {path}: cannot be made a folder ({e.strerror})") from e
    if not os.access(path, os.W_OK | os.X_OK):
        raise TrainError(f"--out {path}: must be a folder that may be written to")


def save(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of this command, or a plain state_dict, which comes back as {"model": state_dict}. Nothing
    in the file is executed: it may hold tensors and plain Python values only."""
    if not path.is_file():
        raise TrainError(f"checkpoint {path}: there is no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises half a dozen types here, by what is wrong with the file
        told = "it must hold tensors and plain values, as torch.save writes them"
        reason = told if isinstance(e, pickle.UnpicklingError) else str(e).strip().partition("\n")[0]
        raise TrainError(f"checkpoint {path}: is not a readable checkpoint ({reason})") from e
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        return dict(state)
    if isinstance(state, Mapping) and state and all(isinstance(v, Tensor) for v in state.values()):
        return {"model": dict(state)}
    raise TrainError(f"checkpoint {path}: must hold a state_dict, alone or under the key 'model'")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """load_state_dict after a check of every name and shape: the model is untouched when one does not fit."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise TrainError(f"checkpoint {path}: {name} is missing")
        if weights[name].shape != tensor.shape:
            raise TrainError(f"checkpoint {path}: {name} must be {tuple(tensor.shape)} for a model of this "
                             f"width and number of classes, got {tuple(weights[name].shape)}")
    extra = sorted(weights.keys() - own.keys())
    if extra:
        raise TrainError(f"checkpoint {path}: {extra[0]} is not a tensor of this model")
    model.load_state_dict(weights)


def check_settings(recorded: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Every setting in `wanted` must have its recorded value."""
    for name, value in wanted.items():
        if name in recorded and recorded[name] != value:
            raise TrainError(f"checkpoint {path}: was made with {name} = {_short(recorded[name])}, "
                             f"got {name} = {_short(value)}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
