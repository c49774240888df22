"""The benchmark harness: rows, shapes, floors, checks, timing, resuming, guard."""

import math

import pytest
import torch

from mnops import ops
from mnops.bench import harness as load

rows, shapes, step, memory, timing = map(load, ("rows", "shapes", "step", "memory", "timing"))
stock, peers, harness, guard, machine = map(load, ("stock", "peers", "harness", "guard", "machine"))
LayerCase, NetworkCase = load("layer_case").LayerCase, load("network_case").NetworkCase

SMALL = shapes.Layer("small", "depthwise", 6, 6, 7, 9, 3, 2, 1, 1, "relu6", 1)
POINTWISE = shapes.Layer("thin", "pointwise", 6, 10, 5, 4, 1, 1, 0, 1, "silu", 1)
STEM = shapes.Layer("stem", "stem", 3, 8, 9, 8, 3, 2, 1, 1, "relu", 1)
TINY = shapes.Network("tiny", 0.25, 32, 4, (1,))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "rates", lambda device, dtype: (10.0, 100.0))
    monkeypatch.setattr(timing, "SAMPLE", {"cpu": 1e-4})
    monkeypatch.setattr(timing, "REST", 0.0)


@pytest.fixture
def options(tmp_path):
    def make(*names, **more):
        return harness.Options(names, tmp_path / "rows.csv", budget=0.0, rounds=(2, 2), **more)

    return make


# rows


def test_a_row_replaces_the_one_of_its_key_and_reads_back(tmp_path):
    row = {
        "suite": "ops",
        "case": "a, b",
        "contender": "x",
        "threads": 2,
        "machine": "m",
        "p50_ms": 1.23456789,
    }
    rows.write(tmp_path / "r.csv", [row, {**row, "contender": "y"}])
    rows.write(tmp_path / "r.csv", [{**row, "p50_ms": 2.0, "commit": "new"}])
    back = rows.read(tmp_path / "r.csv")
    assert [(r["contender"], r["p50_ms"], r["commit"]) for r in back] == [
        ("x", 2.0, "new"),
        ("y", 1.2346, ""),
    ]
    assert rows.key(back[0]) == rows.key(row)
    assert back[0]["saved_bytes"] is None
    assert list(tmp_path.iterdir()) == [tmp_path / "r.csv"]


def test_quantiles_are_linear_and_ratios_are_per_round():
    assert [rows.quantile([4, 1, 3, 2], q) for q in (0, 0.5, 1)] == [1, 2.5, 4]
    # a slow round hits both sides: the ratio does not see it
    row = rows.summarize([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert (row["ratio"], row["ratio_q1"], row["ratio_q3"]) == (2, 2, 2)
    assert row["p50_ms"] == 2000


# shapes and floors


@pytest.mark.parametrize("name", shapes.files())
def test_shape_files_hold_layers_that_exist(name):
    layers = shapes.layers(name)
    assert len({layer.name for layer in layers}) == len(layers)
    for layer in layers:
        assert layer.op in ("depthwise", "pointwise", "stem")
        assert layer.op != "depthwise" or layer.channels == layer.out_channels
        assert layer.act in stock.ACTIVATIONS
        assert min(LayerCase(layer, "chained", "train", 1, torch.float32).output_size) >= 1


def test_mobilenet_v1_file_is_the_network():
    found = {}
    net = stock.StockMobileNet()

    def note(conv, inputs, output):
        x = inputs[0]
        op = "stem" if x.shape[1] == 3 else "depthwise" if conv.groups > 1 else "pointwise"
        key = op, x.shape[1], output.shape[1], x.shape[2], conv.kernel_size[0], conv.stride[0]
        found[key] = found.get(key, 0) + 1

    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.register_forward_hook(note)
    with torch.device("meta"):
        net.to("meta")(torch.empty(1, 3, 224, 224))
    listed = {
        (c.op, c.channels, c.out_channels, c.height, c.kernel, c.stride): c.count
        for c in shapes.layers("mobilenet_v1")
    }
    assert listed == found


def test_floors_are_the_papers_counts():
    case = NetworkCase(shapes.networks()[0], "infer", 1, torch.float32)
    assert case.flops == 2 * 568_740_352
    layer = LayerCase(
        shapes.Layer("", "depthwise", 32, 32, 112, 112, 3, 1, 1, 1, "relu", 1),
        "chained",
        "train",
        16,
        torch.float32,
    )
    one = 16 * 32 * 112 * 112 * 4
    assert layer.bytes == 6 * one + 4 * 32 * 9 * 4  # 3I + 3O
    standalone = LayerCase(layer.layer, "standalone", "train", 16, torch.float32)
    assert standalone.bytes - layer.bytes == 4 * one  # 3I + 7O


def test_stock_network_has_the_state_dict_of_mnops():
    mnops = pytest.importorskip("mnops")
    ours, theirs = mnops.MobileNet(width_mult=0.25).state_dict(), stock.StockMobileNet(0.25).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# checks


@pytest.mark.parametrize("layer", [SMALL, POINTWISE, STEM], ids=lambda c: c.op)
@pytest.mark.parametrize("phase", ["train", "forward", "backward", "infer"])
@pytest.mark.parametrize("name", ["mnops", "mnops-nchw", "torch-nchw", "torch-channels_last"])
def test_contenders_agree_with_fp64(layer, phase, name):
    for form in ("chained", "standalone"):
        case = LayerCase(layer, form, phase, 2, torch.float32)
        peer = peers.PEERS[name]
        if peer.why_not(case, "cpu") is None:
            assert step.error(peer.build(case, "cpu").outputs(), peer.truth(case)) < 1e-4


# the gradients of a tiny network in bf16 are noise: not asked here
@pytest.mark.parametrize(
    ("phase", "dtype"), [("train", torch.float32), ("infer", torch.float32), ("infer", torch.bfloat16)]
)
def test_networks_agree_within_their_tolerance(phase, dtype):
    case = NetworkCase(TINY, phase, 4, dtype)
    for name in ("mnops", "torch-channels_last"):
        peer = peers.PEERS[name]
        assert step.error(peer.build(case, "cpu").outputs(), peer.truth(case)) <= step.tolerance(case, "cpu")


def test_error_sees_shapes_counts_and_nan():
    one = torch.ones(3)
    assert step.error([one], [one]) == 0
    assert step.error([2 * one], [one]) == pytest.approx(1)
    assert step.error([one, one], [one]) == math.inf
    assert step.error([torch.ones(4)], [one]) == math.inf
    assert step.error([one * math.nan], [one]) == math.inf


def test_wrong_and_failing_contenders_are_named_and_not_timed(options, monkeypatch):
    def garbage(module, x):
        return lambda x: module(x) * 1.5

    def dies(module, x):
        raise RuntimeError("no such\nkernel")

    for name, prepare in (("wrong", garbage), ("dead", dies)):
        monkeypatch.setitem(peers.PEERS, name, peers.Peer(name, "NCHW", prepare))
    case = LayerCase(SMALL, "standalone", "infer", 2, torch.float32)
    made = {r["contender"]: r for r in harness.run([case], options("torch-nchw", "wrong", "dead"))}
    assert made["wrong"]["check"] == "wrong"
    assert "p50_ms" not in made["wrong"]
    assert made["dead"]["check"] == "failed: RuntimeError: no such kernel"
    assert made["torch-nchw"]["check"] == "ok"
    assert made["torch-nchw"]["ratio"] == 1


def dying(calls):
    """A contender that runs so often and then dies."""

    def prepare(module, x):
        left = iter(range(calls))

        def run(x):
            if next(left, None) is None:
                raise RuntimeError("an illegal access")
            return module(x)

        return run

    return peers.Peer("dying", "NCHW", prepare)


@pytest.mark.parametrize("calls", [0, 3])
def test_who_dies_while_it_is_timed_does_not_keep_the_others_from_it(options, monkeypatch, calls):
    monkeypatch.setitem(peers.PEERS, "dying", dying(calls))
    case = LayerCase(SMALL, "standalone", "infer", 2, torch.float32)
    made = {r["contender"]: r for r in harness.run([case], options("dying", "torch-nchw"))}
    assert made["dying"]["check"] == "failed: RuntimeError: an illegal access" and "p50_ms" not in made["dying"]
    assert made["torch-nchw"]["check"] == "ok" and made["torch-nchw"]["rounds"] == 2
    [alone] = harness.run([case], options("dying", fresh=True))
    assert alone["check"].startswith("failed")


def test_a_lost_device_is_left_to_another_process_and_its_culprit_out(options, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "dying", dying(3))
    monkeypatch.setattr(machine, "lost", lambda device: True)
    case, both = LayerCase(SMALL, "standalone", "infer", 2, torch.float32), options("dying", "torch-nchw")
    with pytest.raises(harness.DeviceLost, match="dying: lost: RuntimeError: an illegal access"):
        harness.run([case], both)
    [row] = rows.read(both.results)
    assert (row["contender"], row["check"]) == ("dying", "lost: RuntimeError: an illegal access")
    assert [r["contender"] for r in harness.run([case], both)] == ["torch-nchw"]
    assert harness.run([case], both) == []


def test_the_command_goes_on_in_another_process_when_the_device_is_lost(monkeypatch):
    cli, started = load("cli"), []

    def loses(argv):
        raise harness.DeviceLost({"contender": "x", "check": "lost: y"})

    monkeypatch.setattr(cli, "run", loses)
    monkeypatch.setattr(cli.os, "execv", lambda python, command: started.append(command[4:]))
    cli.main(["all", "--seconds", "100", "--fresh"])
    [(*argv, left)] = started
    assert argv == ["all", "--seconds", "100", "--seconds"] and 99 < float(left) <= 100


def test_a_second_run_measures_nothing_again(options):
    case = LayerCase(SMALL, "standalone", "train", 2, torch.float32)
    assert len(harness.run([case], options("torch-nchw"))) == 1
    assert harness.run([case], options("torch-nchw")) == []
    assert len(harness.run([case], options("torch-nchw", "torch-channels_last"))) == 2
    assert len(harness.run([case], options("torch-nchw", fresh=True))) == 1


def test_no_case_begins_when_time_is_over(options):
    cases = [LayerCase(SMALL, "standalone", "train", batch, torch.float32) for batch in (1, 2, 3)]
    peer = "torch-nchw"
    assert len(harness.run(cases[:1], options(peer))) == 1
    assert harness.run(cases, options(peer, end=0.0)) == []  # the first is there, the others must wait
    assert len(harness.run(cases, options(peer))) == 2


def test_rows_are_complete(options):
    # In a process of its own.
    [row] = harness.run([NetworkCase(TINY, "train", 4, torch.float32)], options("torch-nchw"))
    left_out = {c for c in rows.COLUMNS if row.get(c) is None}
    assert left_out == {"capability", "triton", "driver"}  # those of a GPU
    assert row["saved_bytes"] > 0
    assert row["peak_bytes"] > row["saved_bytes"] / 2
    assert row["floor_ms"] == pytest.approx(1e3 * max(row["bytes"] / 10e9, row["flops"] / 100e9))


def test_absent_packages_say_so():
    assert "needs the package no_such_package" in peers.missing("no_such_package")
    assert peers.missing("torch") is None


# timing and memory


def test_interleaving_gives_one_sample_a_round_and_tells_its_progress():
    seen, shares = [], []

    def take(name):
        return lambda repeats, first: seen.append((name, repeats)) or timing.SAMPLE["cpu"]

    times = timing.interleave({"a": take("a"), "b": take("b")}, "cpu", 0.0, (3, 5), shares.append)
    assert {n: len(t) for n, t in times.items()} == {"a": 3, "b": 3}
    assert len(seen) == 10 and {name for name, _ in seen[-2:]} == {"a", "b"}  # two for warm-up, then in turns
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])


def test_saved_bytes_are_those_still_held_after_the_forward():
    x, w = torch.ones(8, 8, requires_grad=True), torch.ones(8, 8, requires_grad=True)

    def forward():
        y = x * w  # saves x and w, which were there before
        passing = torch.ones(1000, 1000)  # freed in between
        return (y[:4] * y[:4]).sum() + (y * y.detach()).sum() + 0 * passing.sum()  # saves y, by views of it

    assert 8 * 8 * 4 <= memory.saved_bytes(forward, "cpu") <= 8 * 8 * 4 + 8 * 64  # and a few scalars


def test_peak_is_what_is_held_at_once():
    def call(i):
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(2000, dtype=torch.uint8)
        del a
        return torch.empty(500, dtype=torch.uint8), b

    assert memory.peak_bytes(call, "cpu") == 3000


# guard


@pytest.mark.parametrize(("ratio", "found"), [(2.0, "ok"), (1.85, "ok"), (1.5, "slower"), (3.0, "ok")])
def test_guard_allows_the_spread_and_no_more(ratio, found):
    then = {"case": "a", "pass": "train", "check": "ok", "ratio": 2.0, "ratio_q1": 1.9, "ratio_q3": 2.1}
    now = {**then, "ratio": ratio, "ratio_q1": ratio, "ratio_q3": ratio}
    assert guard.verdict(now, then) == found
    assert guard.verdict({**now, "ratio_q3": 2 * ratio}, then) == "unclear"


def test_guard_subset_is_in_the_published_tables():
    for case in guard.subset():
        if case.suite == "ops":
            assert case.layer in shapes.layers("mobilenet_v1")
    assert {c.suite for c in guard.subset()} == {"ops", "net"}


# the command


def test_command_measures_what_is_asked(tmp_path, capsys):
    cli = load("cli")
    args = "ops --shapes hostile --select one-pixel --op depthwise --form standalone --pass infer"
    results = tmp_path / "r.csv"
    assert (
        cli.main(
            [
                *args.split(),
                "--peers",
                "torch-nchw",
                "--budget",
                "0",
                "--rounds",
                "2",
                "2",
                "--results",
                str(results),
            ]
        )
        == 0
    )
    [row] = rows.read(results)
    assert (row["case"], row["contender"], row["check"]) == ("dw3_one-pixel", "torch-nchw", "ok")
    for bad in (
        ["ops", "--shapes", "nothing"],
        ["net", "--networks", "nothing"],
        ["ops", "--peers", "nobody"],
    ):
        with pytest.raises(SystemExit):
            cli.main(bad)


def test_published_tables_are_valid_commands():
    cli = load("cli")
    for argv in (argv for tables in cli.TABLES.values() for argv in tables.values()):
        args = cli.parser().parse_args(argv.split())
        assert args.command in ("startup", "kernels") or cli._cases(args)


def test_micro_kernels_of_every_instruction_set_are_right(options):
    kernels = load("kernels")
    for name in kernels.instruction_sets():
        peer = kernels.KernelPeer(f"kernel-{name}", "NHWC", peers.eager, "mnops", ("forward", "backward"))
        for layer in (SMALL, POINTWISE):
            for phase in ("forward", "backward"):
                case = LayerCase(layer, "chained", phase, 2, torch.float32, "kernels")
                assert step.error(peer.build(case, "cpu").outputs(), peer.truth(case)) < 1e-4


def test_what_a_contender_dies_of_in_its_process_is_told():
    case = NetworkCase(TINY, "infer", 1, torch.float32)
    with pytest.raises(RuntimeError, match="KeyError: 'no such peer'"):
        harness.Apart("no such peer", case, "cpu", "call", 1)
    contender = harness.Apart("torch-nchw", case, "cpu", "call", 1)
    assert contender.sample(2, 0) > 0
    assert contender.outputs()[0].shape == case.truth()[0].shape
    contender.process.kill()
    with pytest.raises(RuntimeError, match="its process ended with -9"):
        contender.sample(1, 0)


def test_memory_that_mnops_keeps_is_counted():
    x = torch.ones(1, 16, 128, 128).to(memory_format=torch.channels_last).requires_grad_()
    assert memory.saved_bytes(lambda: ops.norm_act(ops.Pending(x, act="relu")), "cpu") == 4 * x.numel()


def test_the_fastest_backend_of_a_kind_of_layer_is_chosen(tmp_path, monkeypatch, capsys):
    choose, measured = load("choose"), pytest.importorskip("mnops.measured")

    def row(contender, ms, batch=1, shape="8x56x56->8 k3 s1 p1 d1 relu", check="ok", dtype="bfloat16", op="depthwise"):
        plain = dict(suite="ops", form="chained", op=op, shape=shape, dtype=dtype, capability="90")
        timed = {"contender": contender, "check": check, "commit": "c", "p50_ms": ms}
        return {**dict.fromkeys(rows.KEY, ""), **plain, **timed, "pass": "train", "batch": batch}

    table = [
        row("mnops-cuda", 1.0), row("mnops-triton", 2.0), row("torch-nchw", 0.1), row("mnops-reference", 9.0),
        row("mnops-cuda", 1.1, 256), row("mnops-triton", 1.0, 256),  # of which the reference has no row
        row("mnops-cuda", 0.1, dtype="float32", check="wrong"), row("mnops-triton", 3.0, dtype="float32"),
        row("mnops-triton", 1.0, shape="8x7x7->16 k1 s1 p0 d1 relu", op="pointwise"),
        {**row("mnops-cuda", 1.0, shape="4x7x7->4 k5 s2 p2 d1 relu"), "capability": ""},  # not of a GPU
    ]  # fmt: skip
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.csv")
    assert choose.run([]) == 2 and not measured.FILE.exists()
    assert choose.run(table) == 0
    assert "90 depthwise_conv2d cuda     1 kinds of layer" in capsys.readouterr().out
    assert measured.read(measured.FILE) == {
        90: {
            "depthwise_conv2d": {(2, 3, 1, 1, 8): "cuda", (4, 3, 1, 1, 8): "triton"},
            "pointwise_conv2d": {(2, 1, 1, 8, 16): "triton"},
        }
    }
    [line] = [line for line in measured.FILE.read_text().splitlines() if line.startswith("90,depthwise_conv2d,2")]
    assert line.endswith("cuda,triton,1.429")  # (2 + 1) / (1 + 1.1)
