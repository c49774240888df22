"""The Markdown tables of the report, each from the rows of one machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .rows import Row, quantile
from .selection import anyone, groups, network_layers, stock, usual_threads

# numbers and cases as the pages show them


def ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def mb(value: float | None) -> str:
    return f"{value / 1e6:.1f}" if value else ""


def ratio(row: Row) -> str:
    return f"{row['ratio']:.2f} [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]"


def floors(row: Row) -> str:
    return f"{row['p50_ms'] / row['floor_ms']:.2f}"


def work(row: Row) -> str:
    """What was done, with what is not the default."""
    form = "" if row["suite"] == "net" else f" {row['form']}"
    unusual = [row[c] for c, usual in (("dtype", "float32"), ("launch", "call")) if row[c] != usual]
    return ", ".join([f"{row['case']}{form} {row['pass']}, batch {row['batch']:.0f}", *unusual])


def markdown(columns: str, body: Sequence[Iterable[str]]) -> str:
    """A table, "" if it is empty; the columns after the first are numbers, to the right."""
    names = columns.split(" | ")
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n" if body else ""


# tables

NAMES = {"train": "training step", "infer": "inference"}


def headlines(table: list[Row]) -> str:
    """mnops against the best of all others: whole networks, and MobileNet's layers summed."""
    body = []
    for phase, what in NAMES.items():
        for g in groups(table, suite="net", threads=usual_threads(table), **{"pass": phase}):
            mine, other = g.mine, g.best(anyone)
            if mine and other:
                case = work(mine).replace(f" {phase}", "")
                both = [ms(mine["p50_ms"]), ms(other["p50_ms"]), other["contender"], ratio(other)]
                prefix = "MobileNet-" if mine["op"] == "mobilenet_v1" else "fused " if phase == "train" else "deployed "
                body.append([f"{what}, {prefix}{case}", *both, floors(mine)])
    for op in ("depthwise", "pointwise"):
        for form in ("chained", "standalone"):
            pairs = [(g.mine, g.best(stock)) for g in network_layers(table, op, form)]
            if found := [(mine, best) for mine, best in pairs if mine and best]:
                mine, best = (sum(r["p50_ms"] for r in side) for side in zip(*found))
                floor, least = sum(m["floor_ms"] for m, _ in found), min(b["ratio"] for _, b in found)
                what = f"{op}+BN+act, forward + backward, {form}: sum of {len(found)} MobileNet layers"
                both = [ms(mine), ms(best), "best PyTorch of each", f"{best / mine:.2f}, least {least:.2f}"]
                body.append([what, *both, f"{mine / floor:.2f}"])
    return markdown("what | mnops, ms | best other, ms | which | other / mnops [quartiles] | x floor", body)


def memory(table: list[Row]) -> str:
    """What the training step of the full network keeps and allocates."""
    usual = {"pass": "train", "batch": 16, "dtype": "float32", "launch": "call"}
    for g in groups(table, suite="net", case="1.0-224", threads=usual_threads(table), **usual):
        other = g.get("torch-channels_last")
        body = [
            [
                name,
                mb(r["saved_bytes"]),
                share(r, other, "saved_bytes"),
                mb(r["peak_bytes"]),
                share(r, other, "peak_bytes"),
            ]
            for name, r in g.items()
            if other and r["saved_bytes"]
        ]
        columns = "MobileNet-1.0-224 training step, batch 16 | kept for the backward, MB | of stock"
        return markdown(f"{columns} | allocated at most, MB | of stock", body)
    return ""


def share(row: Row, other: Row, column: str) -> str:
    return f"{row[column] / other[column]:.2f}" if row[column] and other[column] else ""


def network_table(table: list[Row]) -> str:
    body = []
    for g in groups(table, suite="net"):
        for r in sorted(g.values(), key=lambda r: r["p50_ms"]):
            time = f"{ms(r['p50_ms'])} ({ms(r['p20_ms'])} to {ms(r['p80_ms'])})"
            speed = f"{1e3 * r['batch'] / r['p50_ms']:.0f}"
            case = f"{work(r)}, {r['threads']:.0f} threads"
            kept = mb(r["saved_bytes"]), mb(r["peak_bytes"])
            body.append([case, r["contender"], time, ratio(r), speed, floors(r), *kept])
    columns = "network | contender | ms (p20 to p80) | time / mnops [quartiles] | images/s | x floor"
    return markdown(f"{columns} | kept MB | peak MB", body)


def layer_table(table: list[Row], suite: str) -> str:
    body = []
    for g in groups(table, suite=suite):
        own = g.mine or min(g.values(), key=lambda r: r["p50_ms"])
        other = g.best(anyone)
        beside = (
            [other["contender"], ms(other["p50_ms"]), ratio(other)]
            if other and other is not own
            else [""] * 3
        )
        gbs, gflops = (own[c] / own["p50_ms"] / 1e6 for c in ("bytes", "flops"))
        cached = "" if own["bytes"] > own["cache_bytes"] else " (fits the cache)"
        rates = [f"{gbs:.1f}", f"{gbs / own['copy_gbs']:.0%}{cached}", f"{gflops:.0f}"]
        body.append([work(own), own["contender"], ms(own["p50_ms"]), *beside, floors(own), *rates])
    columns = "layer | contender | ms | best other | ms | other / mnops [quartiles] | x floor"
    return markdown(f"{columns} | GB/s | of copy | GFLOP/s", body)


def startup_table(table: list[Row]) -> str:
    found = [r for g in groups(table, suite="startup") for r in sorted(g.values(), key=lambda r: r["p50_ms"])]
    return markdown(
        "first | contender | s", [[r["pass"], r["contender"], f"{r['p50_ms'] / 1e3:.2f}"] for r in found]
    )


def losses(table: list[Row]) -> str:
    """Where something else is faster than mnops, and what failed its check: said, not left out."""
    compared = [
        (g, r) for g in groups(table) if g.mine for r in g.values() if g.first["suite"] in ("ops", "net")
    ]
    lines = [
        f"- {work(r)}, {r['threads']:.0f} threads: {r['contender']} takes {ratio(r)} of mnops' time"
        for _, r in compared
        if r["ratio"] < 1 and not r["contender"].startswith("mnops")
    ]
    lines += [f"- {work(r)}: {r['contender']}: {r['check']}" for r in table if r["check"] != "ok"]
    return "\n".join([*lines, ""])


def conditions(table: list[Row]) -> str:
    """Machine, versions and rates, in a sentence."""
    copy, gemm = (quantile([r[c] for r in table if r[c]], 0.5) for c in ("copy_gbs", "gemm_gflops"))
    others = {r["backend"] for r in table if r["backend"] and not r["backend"].startswith(("mnops", "torch"))}
    versions = ", ".join(["torch " + ", ".join(sorted({r["torch"] for r in table})), *sorted(others)])
    where = f"{table[0]['machine']}, {usual_threads(table):.0f} threads"
    rates = f"copy {copy:.0f} GB/s, GEMM {gemm:.0f} GFLOP/s (medians over the cases)"
    return f"{where}; {versions}; fp32 unless said; {rates}; {max(r['date'] for r in table)}.\n"
