"""results/peers.md and the claims peers.*, from results/peers.json: ``python benchmarks/peers_table.py [FILE]``.

Claims are written for whole measurements of results/peers.json only, not for a trial with a --share.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune101.files import write_json

RESULTS = Path(__file__).resolve().parent.parent / "results"
TABLE = RESULTS / "peers.md"
OURS = "finetune101"
COMMAND = "python benchmarks/peers.py"

PAGE = Path(__file__).resolve().parent / "peers/page.md"  # the words around the tables
FILES = (RESULTS / "peers.json", RESULTS / "peers_native.json")  # the second without a limit, with bf16
MARK = "<!-- tables -->\n"
NAMES = {
    "efficientnet_lite0": "EfficientNet-Lite0",
    "resnet18": "ResNet-18",
    "ultralytics": "Ultralytics",
}

Row = dict[str, Any]


def median(values: Sequence[float]) -> str:
    """Median and range of seconds."""
    if not values:
        return "–"
    middle = f"{statistics.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f}–{max(values):.1f})"


def select(result: Row, task: str, network: str) -> dict[str, list[Row]]:
    """Peer -> its runs, the quickest first."""
    peers: dict[str, list[Row]] = {}
    for row in result["runs"]:
        if (row["task"], row["network"]) == (task, network):
            peers.setdefault(row["peer"], []).append(row)
    return dict(sorted(peers.items(), key=lambda item: statistics.median(row["seconds"] for row in item[1])))


def column(rows: Sequence[Row], key: str) -> list[float]:
    """All values of a key; lists, such as the epochs of each run, are put together."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def training_table(result: Row, network: str) -> list[str]:
    """Two epochs of a network."""
    peers = select(result, "train", network)
    if not peers:
        return []
    weights = result["settings"]["networks"][network]["weights"]
    lines = [f"## Two epochs of {NAMES[network]}", "", f"Weights: {weights}.", ""]
    titles = ("epoch, s", "validation, s", "whole command, s", "to the end of the first step, s", "memory, MB")
    lines += [f"| | {' | '.join(titles)} | val top-1 | workers | runs |", "|---" * (len(titles) + 4) + "|"]
    for peer, rows in peers.items():
        cells = [median(column(rows, key)) for key in ("train_s", "val_s", "seconds", "first_step_s")]
        memory = max(column(rows, "memory_mb"), default=0)
        top1 = statistics.median(row["val_top1"][-1] for row in rows)
        workers = rows[0].get("workers", "–")
        lines.append(
            f"| {shown_name(peer)} | {' | '.join(cells)} | {memory:,.0f} | {top1:.1f} | {workers} | {len(rows)} |"
        )
    return [*lines, ""]


def shown_name(peer: str) -> str:
    """The name of a peer in a table; ours is set in bold."""
    return f"**{OURS}**" if peer == OURS else NAMES.get(peer, peer)


def prediction_table(result: Row) -> list[str]:
    """Labels for many photos and for one."""
    many, one = (select(result, task, "efficientnet_lite0") for task in ("predict", "predict_one"))
    if not many:
        return []
    lines = [f"## Labels for {result['settings']['photos']} photos", ""]
    lines += [
        "One EfficientNet-Lite0, the same weights for everybody; the whole command, from its start to a table.",
        "",
    ]
    if "first_predict_s" in result:
        lines += [f"The first prediction of a run writes its ONNX file: {result['first_predict_s']:.1f} s, once.", ""]
    lines += ["| | all photos, s | one photo, s | memory, MB | right, % | runs |", "|---|---|---|---|---|---|"]
    for peer, rows in many.items():
        memory = max(column(rows, "memory_mb"), default=0)
        cells = [median(column(rows, "seconds")), median(column(one.get(peer, []), "seconds")), f"{memory:,.0f}"]
        lines.append(f"| {shown_name(peer)} | {' | '.join(cells)} | {rows[0]['right']:.1f} | {len(rows)} |")
    return [*lines, ""]


def two_minutes_table(result: Row) -> list[str]:
    """What each one's recommended way reaches in two minutes."""
    peers = select(result, "two_minutes", "efficientnet_lite0")
    if not peers:
        return []
    lines = ["## What two minutes reach", ""]
    lines += ["EfficientNet-Lite0 by each one's recommended rates, with as many epochs as fit into two minutes;"]
    lines += ["the best epoch of those that were validated.", ""]
    lines += ["| | val top-1 | whole command, s | epochs |", "|---|---|---|---|"]
    ordered = sorted(peers.items(), key=lambda item: -max(item[1][0]["val_top1"]))
    for peer, (row, *_) in ordered:
        lines.append(f"| {shown_name(peer)} | {max(row['val_top1']):.1f} | {row['seconds']:.0f} | {row['epochs']} |")
    return [*lines, ""]


def ratio(result: Row, task: str, network: str, key: str) -> Row | None:
    """How many times as long as finetune101 the fastest peer takes: of the medians, and run against run."""
    peers = select(result, task, network)
    ours = column(peers.pop(OURS, []), key)
    if not ours or not peers:
        return None
    medians = {peer: statistics.median(column(rows, key)) for peer, rows in peers.items()}
    fastest = min(medians, key=lambda peer: medians[peer])
    others, middle = column(peers[fastest], key), statistics.median(ours)
    return {
        "value": round(medians[fastest] / middle, 2),
        "range": [round(min(others) / max(ours), 2), round(max(others) / min(ours), 2)],
        "fastest": fastest,
        "runs": min(len(select(result, task, network)[OURS]), len(peers[fastest])),
        "seconds": {OURS: round(middle, 2), fastest: round(medians[fastest], 2)},
    }


def ratios(result: Row) -> Row:
    """What the claims peers.* say, by kind and network; what was not measured is left out."""
    kinds = {
        "predict": ("predict", "seconds", ("efficientnet_lite0",)),
        "epoch": ("train", "train_s", ("efficientnet_lite0", "resnet18")),
        "command": ("train", "seconds", ("efficientnet_lite0", "resnet18")),
    }
    values = {
        kind: {network: ratio(result, task, network, key) for network in networks}
        for kind, (task, key, networks) in kinds.items()
    }
    return {
        kind: {name: one for name, one in networks.items() if one}
        for kind, networks in values.items()
        if any(networks.values())
    }


def ratio_table(result: Row) -> list[str]:
    """finetune101 against the fastest peer."""
    words = {"predict": "prediction, whole command", "epoch": "an epoch", "command": "two epochs, whole command"}
    lines = ["## Against the fastest peer", "", "| | network | fastest peer | its time, s | ours, s | times as fast |"]
    lines.append("|---|---|---|---|---|---|")
    for kind, networks in result["ratios"].items():
        for network, one in networks.items():
            times = f"{one['seconds'][one['fastest']]:.1f} | {one['seconds'][OURS]:.1f}"
            low, high = one["range"]
            fastest = shown_name(one["fastest"])
            lines.append(
                f"| {words[kind]} | {NAMES[network]} | {fastest} | {times} | **{one['value']}** ({low} to {high}) |"
            )
    return [*lines, "", "The range is the fastest of one side against the slowest of the other.", ""]


def settings_lines(result: Row) -> list[str]:
    """Machine, limits and versions; what was not reached or failed."""
    settings, machine = result["settings"], result["settings"]["machine"]
    limit = "training is kept to AVX2 and fp32 for all" if settings["isa"] == "avx2" else "no limit"
    limit += ", bf16 where a library can" if settings["isa"] == "native" and machine["bf16"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"]["peers"].items())
    lines = [f"Machine: {machine['cores']} cores, {machine['processor']}; it has {machine['instructions']}; {limit}."]
    lines += [f"Python {machine['python']}, {versions}.", ""]
    if settings["share"] != 1:
        lines += [
            f"**A trial with a share of {settings['share']:g} of the classes: these figures are no evidence.**",
            "",
        ]
    for row in result["failures"]:
        lines += [f"Failed: {row['task']} of {row['network']} with {row['peer']}.", ""]
    lines += [f"Not reached in the time given: {name} and what follows." for name in result.get("not_reached", [])]
    return [*lines, ""]


def claims_of(result: Row, file: str = "peers.json") -> list[Row]:
    """The entries peers.* of claims.json; peers.native.* for what was measured without a limit."""
    native = result["settings"]["isa"] == "native"
    return [
        {
            "id": f"peers.{'native.' if native else ''}{kind}.{network}",
            "kind": "recorded",
            "value": one["value"],
            "unit": "times",
            "n": one["runs"],
            "spread": one["range"],
            "command": f"{COMMAND} --isa {result['settings']['isa']}",
            "evidence": f"{file}:ratios.{kind}.{network}.value",
        }
        for kind, networks in result["ratios"].items()
        for network, one in networks.items()
    ]


def tables_of(result: Row) -> list[str]:
    """Every table of one file of results."""
    lines = [*settings_lines(result), *ratio_table(result)]
    for network in NAMES:
        lines += training_table(result, network)
    return [*lines, *prediction_table(result), *two_minutes_table(result)]


def write_tables(file: Path) -> None:
    """Prints the tables of a file of results; one of ``FILES`` goes to ``TABLE``, and to the claims when whole."""
    result: Row = json.loads(file.read_text(encoding="utf-8"))
    result["ratios"] = ratios(result)
    write_json(file, result)
    print("\n".join(tables_of(result)))
    if file.resolve() not in FILES:
        return
    results = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in FILES if path.is_file()}
    tables = "\n".join(line for one in results.values() for line in tables_of(one)).rstrip("\n") + "\n"
    TABLE.write_text(PAGE.read_text(encoding="utf-8").replace(MARK, tables), encoding="utf-8")
    claims = json.loads((RESULTS / "claims.json").read_text(encoding="utf-8"))
    claims = [claim for claim in claims if not claim["id"].startswith("peers.")]
    for name, one in results.items():
        claims += claims_of(one, name) if one["settings"]["share"] == 1 else []
    text = json.dumps(sorted(claims, key=lambda claim: str(claim["id"])), indent=1)
    (RESULTS / "claims.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_tables(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "peers.json")
