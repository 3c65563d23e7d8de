"""The table of accuracies on the page of results, from results/claims.json: ``python evidence/results_table.py``.

Writes it into the page and the Chinese page, between their marks, and adds training time and parameters of each row to
the claims.
"""

from __future__ import annotations

import json
from typing import Any

from claims import kind_of, minutes, runs_in
from publish import RESULTS
from texts import write_between

from finetune101.config import TrainConfig
from finetune101.evaluation.tested import read_manifest
from finetune101.files import write_json
from finetune101.models.build import build
from finetune101.recipes import RECIPES
from finetune101.run import Run

MARKS = ("<!-- accuracy: python evidence/results_table.py -->", "<!-- end of accuracy -->")
HEADS = {
    "docs/results.md": (
        "| network | start, recipe | split | top-1, % | mean per class, % | n | weights, M | min | claim |"
    ),
    "docs/zh/results.md": (
        "| 网络 | 初始权重，训练配方 | 划分 | top-1，% | 各类别平均准确率，% | n | 参数量（百万） | 分钟 | 结果编号 |"
    ),
}
CHINESE = {
    "convolutions from ImageNet": "卷积层来自 ImageNet",
    "random": "随机", "reference": "参考", "standard": "标准", "train + val": "训练 + 验证", ", ": "，", "; ": "；",
    " (": "（", ")": "）",
}  # fmt: skip
NETWORKS = {
    "alexnet": "AlexNet",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "efficientnet_lite2": "EfficientNet-Lite2",
    "efficientnet_lite02": "EfficientNet-Lite0 + 2",
    "efficientnet_lite012": "EfficientNet-Lite0 + 1 + 2",
    "resnet18": "ResNet-18",
}
UNTIMED = ("best.finetune.alexnet_features.reference",)
"""Rows whose runs shared the machine with other work, so that their time says nothing."""
# claims that a row is made of, without their last part, in the order of the table
STEMS = (
    "best.probe.any.reference",
    "best.finetune.efficientnet_lite0.reference",
    "best.finetune.efficientnet_lite2.reference",
    "best.finetune.any.reference",
    "best.finetune.alexnet_features.reference",
    "best.finetune.efficientnet_lite2.standard",
    "finetune.efficientnet_lite2.standard25",
    "probe.efficientnet_lite02.reference",
    "original.finetune.efficientnet_lite0.reference",
    "original.finetune.efficientnet_lite0_128px.reference",
    "best.scratch.efficientnet_lite0.reference",
    "best.scratch.resnet18.reference",
    "best.scratch.resnet18.standard",
    "original.scratch.efficientnet_lite0.reference",
    "original.scratch.resnet18.reference",
)


def row(stem: str, claims: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """The cells of the table's row, and the claims that it makes beside those that it shows."""
    top1, per_class = claims[f"{stem}.top1"], claims[f"{stem}.mean_per_class"]
    runs = [Run(folder) for folder in runs_in(RESULTS / top1["evidence"])]
    members = [Run(RESULTS / name) for name in runs[0].read_json("config.json").get("members", ())]
    described = [_described(run) for run in members or runs[:1]]
    weights = round(sum(one["weights"] for one in described) / 1e6, 1)
    time = None if stem in UNTIMED else minutes(RESULTS / top1["evidence"], RESULTS)
    spread = top1["spread"]
    accuracy = f"{top1['value']:.2f}"
    if isinstance(spread, list):
        accuracy += f" ({spread[0]:.2f}–{spread[1]:.2f})"
    elif spread is not None:
        accuracy += f" ± {spread:.2f}"
    names, starts = ([one[key] for one in described] for key in ("name", "start"))
    network = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) if members else names[0]
    split = read_manifest(runs[0]).protocol
    if not members and runs[0].config().data.fit_on == "train+val":
        split += ", train + val"
    cells = [network, "; ".join(dict.fromkeys(starts)), split, accuracy]
    cards = dict.fromkeys(_card(run) for run in members or runs)
    duration = f"{'–' if time is None else time} {', '.join(card for card in cards if card)}".strip()
    cells += [f"{per_class['value']:.2f}", str(top1["n"]), f"{weights}", duration, f"`{stem}.top1`"]
    made = {"n": len(runs), "spread": None, "command": top1["command"], "evidence": top1["evidence"]}
    extra = [{"id": f"{stem}.parameters", "value": weights, "unit": "million weights", **made}]
    if time is not None:
        extra.append({"id": f"{stem}.minutes", "value": time, "unit": "min", **made})
    return cells, extra


def _card(run: Run) -> str:
    """The GPU that trained ``run``, in a word; empty for a CPU."""
    name = run.read_json("env.json")["machine"].get("gpu", "").removeprefix("NVIDIA ")
    return f"({name.split()[0]})" if name else ""


def _described(run: Run) -> dict[str, Any]:
    """Network, start with recipe and size, and number of weights of one published run."""
    config = run.config()
    built = build(config.model.name, len(read_manifest(run).classes), pretrain=False)
    start = "ImageNet" if config.model.pretrain else "random"
    start = "convolutions from ImageNet" if config.model.random_layers else start
    recipe = f"`{_recipe(config)}`"
    if config.optim.epochs and run.read_json("test.json").get("frozen_backbone"):
        recipe += ", best epoch 0 (output layer alone)"
    return {
        "name": NETWORKS[config.model.name],
        "start": f"{start}, {recipe}, {config.model.size or built.preprocessing.size} px",
        "weights": sum(p.numel() for p in built.model.parameters()),
    }


def _recipe(config: TrainConfig) -> str | None:
    """The recipe that trains as ``config`` does: the one it was started with, or one that was named so later."""
    arm = [recipe for name, recipe in RECIPES.items() if name.startswith("scratch") != config.model.pretrain]
    same = [recipe.__name__ for recipe in arm if recipe("x", pretrain=config.model.pretrain).optim == config.optim]
    return config.recipe if config.recipe in same or not same else same[0]


def main() -> None:
    """Writes table and claims, and prints the table."""
    file = RESULTS / "claims.json"
    claims = {one["id"]: one for one in json.loads(file.read_text(encoding="utf-8"))}
    table = [row(stem, claims) for stem in STEMS if f"{stem}.top1" in claims]
    times = {f"{stem}.minutes" for stem in STEMS}
    claims = {name: one for name, one in claims.items() if name not in times}
    claims |= {claim["id"]: {**claim, "kind": kind_of(claim["id"])} for _, extra in table for claim in extra}
    write_json(file, sorted(claims.values(), key=lambda one: str(one["id"])))
    for name, head in HEADS.items():
        lines = [head, "|" + "---|" * head.count(" |")]
        for cells, _ in table:
            line = [_chinese(cell) for cell in cells] if "zh" in name else cells
            lines.append("| " + " | ".join(line) + " |")
        write_between(RESULTS.parent / name, MARKS, "\n".join(lines))
        print("\n".join(lines))


def _chinese(cell: str) -> str:
    if cell.startswith("`"):
        return cell
    for english, chinese in CHINESE.items():
        cell = cell.replace(english, chinese)
    return cell


if __name__ == "__main__":
    main()
