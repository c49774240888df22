"""python -m mnops COMMAND ...: a command is a module with main(argv) -> int, imported when asked for."""

import importlib
import sys

COMMANDS = {
    "info": ("mnops.info", "what was built, what this machine has, which backend serves which op"),
    "train": ("mnops.train.cli", "train MobileNet on a folder of images or the built-in ones, and test it"),
    "tables": ("mnops.tables", "the resource tables of the paper, as printed and as counted"),
    "grid": ("mnops.grid", "train the paper's models, width x resolution, and plot accuracy against cost"),
    "timm": ("mnops.timm", "run a script of timm's, as its train.py, with mnops' networks registered"),
    "bench": ("mnops.bench", "measure ops and networks against stock PyTorch"),
    "report": ("mnops.report", "tables of the measured results"),
}


def main(argv: list[str]) -> int:
    """Runs one command with the rest of the arguments; 2 for a wrong one, as argparse does."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m mnops COMMAND ...\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:8}{what}")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"mnops: command must be one of {', '.join(COMMANDS)}, got {argv[0]!r}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
