"""The table of speed and the claims on speed, from results/speed/: ``python benchmarks/table.py``.

Writes the table into docs/speed.md and docs/zh/speed.md, between their marks, and the speed.* claims into
results/claims.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"
PAIRED = "python benchmarks/paired.py --data data/101_ObjectCategories"

MARKS = ("<!-- speed: python benchmarks/table.py -->", "<!-- end of speed -->")
CHINESE = {
    "| what | plain loop, num_workers=0 |": "| 内容 | 普通循环，num_workers=0 |",
    "| ratio (range) | claim |": "| 倍数（范围） | 结果编号 |",
    "whole training epoch against the bare step": "完整的一轮与纯训练步（不含数据读取）之比",
    "peak memory, the worst of these (more than 1: we use more)": "峰值内存，其中最差者（大于 1：我们用得更多）",
    "labels of 2,000 JPEGs by `fast/`, warm (model loading": "`fast/` 识别 2,000 张 JPEG，预热之后（载入模型另需",
    " beside it)": "）",
    "second start: import torch to the first step (done after": "第二次启动：import torch 到第一步开始（第一步完成于",
    "s) |": "s） |",
    "frozen features of two networks; with us the output layer as well": "两个网络的冻结特征；我们这边还包括输出层",
    "fine-tuning EfficientNet-Lite0: 20 epochs, scaled up; ": "微调 EfficientNet-Lite0：20 轮（按比例推算）；",
    "bf16 less fp32, validation, mean of": "bf16 减 fp32，验证准确率之差的平均，训练次数",
    " points": " 个百分点",
    "images/s": "张/秒",
    "epoch, ": "训练一轮，",
    " (bare step)": "（纯训练步）",
    " without bf16": "（处理器无 bf16）",
    " to ": " 至 ",
    " (": "（",
    ")**": "）**",
}


MODELS = ("resnet18", "mobilenet_v2", "efficientnet_lite0", "alexnet", "efficientnet_lite0_fp32")


def claim(name: str, value: float, unit: str, n: int, spread: Any, command: str) -> dict[str, Any]:
    """One entry of claims.json."""
    fields = {"value": value, "unit": unit, "n": n, "spread": spread, "command": command}
    return {"id": f"speed.{name}", "kind": "recorded", **fields, "evidence": "speed"}


def beside(entry: dict[str, Any], name: str, value: float, unit: str = "s") -> dict[str, Any]:
    """A claim on another number of the same measurement as ``entry``."""
    return {**entry, "id": f"{entry['id']}.{name}", "value": value, "unit": unit, "spread": None}


class Table:
    """Lines of the table and claims of everything that has been measured and lies in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [
            "| what | plain loop, num_workers=0 | finetune101 | ratio (range) | claim |",
            "|---|---|---|---|---|",
        ]
        self.claims: list[dict[str, Any]] = []

    def measured(self, name: str) -> Any:
        """NAME.json, or None when it has not been measured."""
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def add(self, what: str, plain: str, ours: str, ratio: str, entry: dict[str, Any]) -> dict[str, Any]:
        """A line, its claim, and a claim for each number with a unit beside the ratio; returns ``entry``."""
        self.lines.append(f"| {what} | {plain} | {ours} | **{ratio}** | `{entry['id']}` |")
        self.claims.append(entry)
        for side, text in (("plain", plain), ("finetune101", ours)):
            number, _, unit = text.partition(" ")
            if unit:
                self.claims.append(beside(entry, side, float(number), unit))
        return entry

    def epochs(self) -> None:
        """Training epochs and their memory."""
        memory = []
        for model in MODELS:
            if pairs := self.measured(f"paired_{model}"):
                low, high = pairs["ratio_range"]
                memory.append(pairs["memory_ratio"])
                rates = f"{pairs['plain_images_per_s']} images/s", f"{pairs['ours_images_per_s']} images/s"
                what = f"epoch, {model.replace('_fp32', ' without bf16')}"
                entry = claim(f"epoch.{model}", pairs["ratio"], "times", pairs["pairs"], pairs["ratio_range"], PAIRED)
                self.add(what, *rates, f"{pairs['ratio']} ({low} to {high})", entry)
        if memory:
            entry = claim("memory", max(memory), "times", len(memory), [min(memory), max(memory)], PAIRED)
            what, most = "peak memory, the worst of these (more than 1: we use more)", f"{max(memory)}"
            self.add(what, "1", most, most, entry)
        if benchmark := self.measured("benchmark"):
            row, command = benchmark["rows"][0], "finetune101 benchmark --models efficientnet_lite0 --repeats 7"
            rates = f"{row['step_images_per_s']} images/s (bare step)", f"{row['whole_images_per_s']} images/s"
            entry = claim("whole_vs_step", row["whole_vs_step"], "times", 7, row["range"], command)
            self.add("whole training epoch against the bare step", *rates, f"{row['whole_vs_step']}", entry)

    def use(self) -> None:
        """Prediction, and the start of a second training."""
        if predict := self.measured("predict"):
            rates = f"{predict['plain_images_per_s']:.0f} images/s", f"{predict['warm_images_per_s']:.0f} images/s"
            (low, high), command = predict["ratio_range"], "python benchmarks/predict.py RUN"
            entry = claim("predict", predict["ratio"], "times", predict["pairs"], predict["ratio_range"], command)
            what = f"labels of 2,000 JPEGs by `fast/`, warm (model loading {predict['start_s']:.1f} s beside it)"
            self.add(what, *rates, f"{predict['ratio']} ({low} to {high})", entry)
            self.claims.append(beside(entry, "loading", round(predict["start_s"], 1)))
        if start := self.measured("warm_start"):
            done = start["first_step_done_seconds"]
            what = f"second start: import torch to the first step (done after {done} s)"
            entry = claim(
                "warm_start", start["seconds"], "s", len(start["all"]), None, "python benchmarks/warm_start.py"
            )
            self.claims.append(beside(entry, "step_done", done))
            self.add(what, "–", f"{start['seconds']} s", "–", entry)

    def trainings(self) -> None:
        """Whole trainings, frozen features and precision."""
        ours, pairs = self.measured("finetune_fast"), self.measured("paired_efficientnet_lite0")
        if ours and pairs:
            ratio = round(pairs["plain_20_epochs_s"] / ours["seconds"], 1)
            sides = f"{pairs['plain_20_epochs_s']} s", f"{ours['seconds']} s"
            what = "fine-tuning EfficientNet-Lite0: 20 epochs, scaled up; `finetune_fast`"
            command = f"python benchmarks/time_to_accuracy.py: {ours['command']}"
            entry = self.add(what, *sides, f"{ratio}", claim("finetune", ratio, "times", 1, None, command))
            self.claims.append(beside(entry, "output_layer", ours["reached"]["seconds"]))
            best = max(epoch["val_top1"] for epoch in ours["epochs"])
            self.claims.append(beside(entry, "best_val_top1", best, "% of the validation images"))
        ours, features = self.measured("time_to_reference"), self.measured("plain_features")
        if ours and features:
            ratio, n = round(features["seconds"] / ours["seconds"], 1), len(features["measurements"])
            sides = f"{features['seconds']:.0f} s", f"{ours['seconds']} s"
            what = "frozen features of two networks; with us the output layer as well"
            entry = claim("plain_features", ratio, "times", n, None, "python benchmarks/plain_features.py")
            self.add(what, *sides, f"{ratio}", entry)
        if precision := self.measured("precision"):
            n, mean, sd = len(precision["runs"]), precision["mean_difference"], precision["sd"]
            entry = claim("bf16_less_fp32", mean, "points", n, sd, "python benchmarks/precision.py")
            what = f"bf16 less fp32, validation, mean of {n}"
            self.add(what, "–", f"{mean} points", f"{mean:+.2f} ± {sd:.2f}", entry)
            plain = {
                **beside(entry, "plain_kernels", precision["plain_kernels"], "points"),
                "spread": precision["plain_sd"],
            }
            self.claims.append(plain)


def rows(folder: Path = RESULTS / "speed") -> tuple[list[str], list[dict[str, Any]]]:
    """Lines of the table and claims, of everything that has been measured and lies in ``folder``."""
    table = Table(folder)
    table.epochs()
    table.use()
    table.trainings()
    return table.lines, table.claims


def main() -> None:
    """Writes table and claims, and prints the table."""
    lines, claims = rows()
    file = RESULTS / "claims.json"
    kept = [old for old in json.loads(file.read_text()) if not old["id"].startswith("speed.")]
    file.write_text(json.dumps(sorted(kept + claims, key=lambda one: str(one["id"])), indent=1) + "\n")
    for name, words in (("docs/speed.md", {}), ("docs/zh/speed.md", CHINESE)):
        text = "\n".join(lines)
        for english, chinese in words.items():
            text = text.replace(english, chinese)
        page = RESULTS.parent / name
        before, first, rest = page.read_text(encoding="utf-8").partition(MARKS[0]) if page.is_file() else ("", "", "")
        _, last, after = rest.partition(MARKS[1])
        if first and last:
            page.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")
        else:
            print(f"{page} has no place for the table: {MARKS[0]} ... {MARKS[1]}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
