"""python -m mnops bench: what to measure, from the command line."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import choose, guard, harness, kernels, machine, rows, shapes, startup
from .harness import Options
from .network_case import NetworkCase, TorchvisionCase
from .peers import PEERS, Case

RESULTS = Path(__file__).parent / "results"
QUICK = machine.ROOT / "runs" / "bench-quick.csv"

# Each published table is one command, and `bench all` is all of them but the EXTRA ones: a quarter of an hour
# on two cores, most of it in compilers.
EXTRA = ("bfloat16", "kernels")
TABLES = {
    "cpu": {
        "depthwise": "ops --op depthwise --pass train --budget 3",
        "pointwise": "ops --op pointwise --form chained --pass train --budget 3 "
        "--peers mnops torch-nchw torch-channels_last",
        "roofline": "ops --op depthwise pointwise --form chained --pass forward backward --budget 1 "
        "--peers mnops",
        "training": "net --pass train",
        "inference": "net --pass infer",
        "torchvision": "net --networks --torchvision mobilenet_v2 mobilenet_v3_large efficientnet_b0 --pass train "
        "--peers mnops torch-nchw torch-channels_last torch-compile",
        "deployed": "net --networks --torchvision mobilenet_v2 mobilenet_v3_large efficientnet_b0 --pass infer "
        "--batch 1 16 --peers mnops mnops-fused torch-nchw torch-channels_last torch-compile torch-frozen "
        "onnxruntime openvino",
        "scaling": "net --networks 1.0-224 --pass train infer --batch 1 16 --threads 1 2 --budget 4 "
        "--peers mnops torch-channels_last onnxruntime openvino",
        "startup": "startup --peers mnops torch-channels_last torch-compile onnxruntime openvino",
        "kernels": "kernels --budget 1",
        "bfloat16": "net --networks 1.0-224 --pass train infer --batch 16 --dtype bfloat16 --budget 4 "
        "--peers mnops torch-nchw torch-channels_last",
    },
    "cuda": {  # what matters most comes first: time on a GPU may end
        "training": "net --networks 1.0-224 --pass train --batch 256 --dtype bfloat16 --launch graph "
        "--budget 3",
        "depthwise": "ops --op depthwise stem --form chained --pass train --batch 256 --dtype bfloat16 "
        "--launch graph --budget 1",
        "inference": "net --networks 1.0-224 --pass infer --batch 256 1 --dtype bfloat16 --launch graph "
        "--budget 2",
        "pointwise": "ops --op pointwise --form chained --pass train --batch 256 --dtype bfloat16 --launch graph "
        "--budget 1 --peers mnops-triton torch-nchw torch-channels_last",
        "roofline": "ops --op depthwise pointwise --form chained --pass forward backward --batch 256 "
        "--dtype bfloat16 --launch graph --budget 0.5 --peers mnops-cuda mnops-triton",
        "precisions": "ops --op depthwise --form chained --pass train --batch 256 --dtype float32 float16 "
        "--launch graph --budget 1",
        "standalone": "ops --op depthwise pointwise --form standalone --pass train --batch 256 --dtype bfloat16 "
        "--launch graph --budget 1",
        "calls": "net --networks 1.0-224 --pass train infer --batch 256 --dtype bfloat16 --budget 2 "
        "--peers mnops-cuda mnops-triton torch-channels_last torch-compile",
        "hostile": "ops --shapes mobilenet_v2 mobilenet_v3 hostile --op depthwise --form chained --pass train "
        "--batch 1 64 --dtype bfloat16 --launch graph --budget 0.5",
        # whose compiler takes minutes; MNOPS_AUTOTUNE=1 gives the same to mnops
        "autotune": "net --networks 1.0-224 --pass train infer --batch 256 --dtype bfloat16 --launch graph "
        "--budget 3 --peers mnops-triton torch-compile-max",
        "startup": "startup --peers mnops-triton torch-channels_last torch-compile",
    },
}
PEERS_OF = {
    "ops cpu": "mnops torch-nchw torch-channels_last torch-compile",
    "net cpu": "mnops mnops-recompute mnops-fused torch-nchw torch-channels_last torch-compile torch-frozen timm "
    "onnxruntime openvino xnnpack",
    # mnops by name of the backend: by default the reference serves on a GPU, until one has run the others' tests
    "ops cuda": "mnops-cuda mnops-triton torch-nchw torch-channels_last torch-compile",
    "net cuda": "mnops-cuda mnops-triton torch-nchw torch-channels_last torch-compile torch-frozen timm",
    "quick cuda": "mnops-cuda mnops-triton torch-channels_last torch-compile",
    "quick cpu": "mnops torch-nchw torch-channels_last onnxruntime openvino",
}


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser("python -m mnops bench", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)
    for name, what in (
        ("ops", "single layers against every peer"),
        ("net", "MobileNets against every peer"),
        ("kernels", "the micro-kernels of each instruction set on one thread, against copy bandwidth"),
        ("startup", "import, first forward, first training step"),
        ("guard", "rerun a short subset and compare its ratios with the committed ones"),
        ("choose", "from the rows of GPUs, which backend the registry is to pick for which layer"),
        ("all", "every published table: " + ", ".join(n for n in TABLES["cpu"] if n not in EXTRA)),
        ("table", "one published table"),
    ):
        p = commands.add_parser(name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if name == "table":
            p.add_argument("table", choices=dict.fromkeys([*TABLES["cpu"], *TABLES["cuda"]]))
        if name == "ops":
            p.add_argument("--shapes", nargs="+", default=["mobilenet_v1"], help="files of benchmarks/shapes")
            p.add_argument("--select", default="", metavar="REGEX", help="only layers whose name matches")
            p.add_argument("--op", nargs="+", default=["depthwise", "pointwise", "stem"])
            p.add_argument(
                "--form", nargs="+", default=["chained", "standalone"], choices=["chained", "standalone"]
            )
        if name == "net":
            p.add_argument("--networks", nargs="*", default=[n.name for n in shapes.networks()])
            help_ = "its networks, and timm/NAME, fused; for inference deployed"
            p.add_argument("--torchvision", nargs="*", default=[], metavar="MODEL", help=help_)
        if name in ("ops", "net"):
            passes = ["train", "infer"] + ["forward", "backward"] * (name == "ops")
            p.add_argument("--pass", dest="phase", nargs="+", default=["train", "infer"], choices=passes)
            p.add_argument("--batch", type=int, nargs="+", help="default: 16, or as the network's line says")
            p.add_argument(
                "--dtype",
                nargs="+",
                default=["float32"],
                choices=["float64", "float32", "float16", "bfloat16"],
            )
            p.add_argument(
                "--launch", default="call", choices=["call", "graph"], help="graph: CUDA graph replay"
            )
        if name not in ("table", "all", "choose"):
            p.add_argument("--peers", nargs="+", choices=PEERS, metavar="PEER", help=", ".join(PEERS))
            p.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
        p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        p.add_argument("--budget", type=float, help="seconds of timing per case (8, or the table's own)")
        p.add_argument("--rounds", type=int, nargs=2, default=(7, 40), metavar=("LEAST", "MOST"))
        p.add_argument("--seconds", type=float, help="begin no case after so many; the next call goes on")
        p.add_argument(
            "--quick", action="store_true", help="a trial: few cases and rounds, into " + str(QUICK.name)
        )
        p.add_argument(
            "--fresh", action="store_true", help="measure again what this commit has measured already"
        )
        p.add_argument("--results", type=Path, help="CSV file; default: benchmarks/results/<machine>.csv")
    return main


def main(argv: list[str]) -> int:
    """The command. Where a contender's kernel ruins the GPU's context another process goes on without it."""
    begin = time.monotonic()
    try:
        return run(argv)
    except harness.DeviceLost as e:
        print(f"{e}: another process goes on without it", file=sys.stderr, flush=True)
        again = [a for a in argv if a != "--fresh"]
        if seconds := parser().parse_args(argv).seconds:
            again += ["--seconds", str(max(1.0, seconds - (time.monotonic() - begin)))]
        os.execv(sys.executable, [sys.executable, "-m", "mnops", "bench", *again])


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.command == "choose":
        return choose.run(rows.read(args.results) if args.results else rows.read_all(RESULTS))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench: --device cuda needs a GPU that torch can use, and there is none")
    end = time.monotonic() + args.seconds if args.seconds else math.inf
    if args.command in ("table", "all"):
        given = [f"--{k}" for k in ("quick", "fresh") if getattr(args, k)]
        given += ["--budget", str(args.budget)] if args.budget else []
        given += ["--device", args.device, "--rounds", *map(str, args.rounds)]
        given += ["--results", str(args.results)] if args.results else []
        tables = TABLES[args.device]
        if args.command == "table" and args.table not in tables:
            raise SystemExit(f"bench: the tables on {args.device} are {', '.join(tables)}, got {args.table}")
        for name in [n for n in tables if n not in EXTRA] if args.command == "all" else [args.table]:
            print(f"{name}: python -m mnops bench {tables[name]}", flush=True)
            if (left := end - time.monotonic()) <= 0:
                print(f"{args.seconds:.0f} s are over: the next call goes on here")
                break
            run([*shlex.split(tables[name]), *given, *(["--seconds", str(left)] if args.seconds else [])])
        return 0
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True  # as every training recipe has it
    suite = "net" if args.command in ("net", "startup") else "ops"
    peers = args.peers or PEERS_OF[f"{'quick' if args.quick else suite} {args.device}"].split()
    published = RESULTS / f"{machine.slug(machine.name(args.device))}.csv"
    options = Options(
        tuple(peers),
        args.results or (QUICK if args.quick and args.command != "guard" else published),
        args.device,
        launch=getattr(args, "launch", "call"),
        budget=1.0 if args.quick else args.budget or 8.0,
        rounds=(5, 10) if args.quick else tuple(args.rounds),
        fresh=args.fresh or args.quick,
        end=end,
    )
    for threads in args.threads:
        now = replace(options, threads=threads)
        if args.command == "guard":
            return guard.run(now)
        if args.command in ("startup", "kernels"):
            {"startup": startup, "kernels": kernels}[args.command].run(now)
        else:
            harness.run(_cases(args), now)
    print(f"rows in {options.results}")
    return 0


def _cases(args: argparse.Namespace) -> list[Case]:
    dtypes = [getattr(torch, d) for d in args.dtype]
    if args.command == "net":
        networks = {n.name: n for n in shapes.networks()}
        unknown = set(args.networks) - set(networks)
        if unknown:
            raise SystemExit(f"bench: --networks must be of {', '.join(networks)}, got {', '.join(unknown)}")
        chosen = [networks[n] for n in (["0.25-224"] if args.quick else args.networks)]
        zoo = [shapes.Network(name, 1.0, 224, 16, (1, 16)) for name in args.torchvision]
        kinds = [(NetworkCase, n) for n in chosen] + [(TorchvisionCase, n) for n in zoo]
        return [
            kind(n, phase, batch, dtype)
            for kind, n in kinds
            for dtype in dtypes
            for phase in args.phase
            for batch in args.batch or ([n.train_batch] if phase == "train" else n.infer_batches)
        ]
    unknown = set(args.shapes) - set(shapes.files())
    if unknown:
        raise SystemExit(f"bench: --shapes must be of {', '.join(shapes.files())}, got {', '.join(unknown)}")
    layers = [
        c
        for file in args.shapes
        for c in shapes.layers(file)
        if c.op in args.op and re.search(args.select, c.name)
    ]
    layers = list(dict.fromkeys(layers))  # networks share layers
    layers = layers[:3] if args.quick else layers
    return harness.layer_cases(layers, args.form, args.phase, args.batch or [16], dtypes)
