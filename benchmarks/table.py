"""The README's performance table and the claims on speed, from results/speed/: ``python benchmarks/table.py``.

Writes the table into both READMEs, between their speed marks, and the speed.* claims into results/claims.json.
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
    "| ratio (range) | claim |": "| 倍数（范围） | 声明 |",
    "whole training epoch against the bare step": "完整训练轮与裸训练步之比",
    "peak memory, the worst of these": "峰值内存（最差者）",
    "predict on 2,000 JPEGs, warm (model loading": "predict 处理 2,000 张 JPEG，预热后（另需载入模型",
    "beside it)": "）",
    "second start: import torch to the first step (done after": "第二次启动：从 import torch 到第一步（完成于",
    "frozen features of two networks; with us the output layer as well": "两个网络的冻结特征；我们还包括输出层",
    "fine-tuning EfficientNet-Lite0: 20 epochs, scaled up;": "微调 EfficientNet-Lite0：20 轮（按比例推算）；",
    "bf16 less fp32, validation, mean of": "bf16 减 fp32，验证准确率，均值，运行数",
    " points": " 个百分点",
    "images/s": "张/秒",
    "epoch, ": "一轮，",
    "(bare step)": "（裸训练步）",
    " without bf16": "（处理器无 bf16）",
}


def claim(name: str, value: float, unit: str, n: int, spread: Any, command: str) -> dict[str, Any]:
    """One entry of claims.json."""
    fields = {
        "kind": "recorded",
        "value": value,
        "unit": unit,
        "n": n,
        "spread": spread,
        "command": command,
        "evidence": "speed",
    }
    return {"id": f"speed.{name}", **fields}


def rows(folder: Path = RESULTS / "speed") -> tuple[list[str], list[dict[str, Any]]]:
    """Lines of the table and claims, of everything that has been measured and lies in ``folder``."""
    lines, claims = (
        ["| what | plain loop, num_workers=0 | finetune101 | ratio (range) | claim |", "|---|---|---|---|---|"],
        [],
    )

    def add(what: str, plain: str, ours: str, ratio: str, entry: dict[str, Any]) -> None:
        lines.append(f"| {what} | {plain} | {ours} | **{ratio}** | `{entry['id']}` |")
        claims.append(entry)
        for side, text in (("plain", plain), ("finetune101", ours)):  # the numbers beside the ratio are claims as well
            number, _, unit = text.partition(" ")
            if unit:
                claims.append(
                    {**entry, "id": f"{entry['id']}.{side}", "value": float(number), "unit": unit, "spread": None}
                )

    def read(name: str) -> Any:
        """NAME.json, or None when it has not been measured."""
        file = folder / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    memory = []
    for model in ("resnet18", "mobilenet_v2", "efficientnet_lite0", "alexnet", "efficientnet_lite0_fp32"):
        if found := read(f"paired_{model}"):
            low, high = found["ratio_range"]
            memory.append(found["memory_ratio"])
            rates = f"{found['plain_images_per_s']} images/s", f"{found['ours_images_per_s']} images/s"
            entry = claim(f"epoch.{model}", found["ratio"], "times", found["pairs"], found["ratio_range"], PAIRED)
            add(
                f"epoch, {model.replace('_fp32', ' without bf16')}",
                *rates,
                f"{found['ratio']} ({low} to {high})",
                entry,
            )
    if memory:
        entry = claim("memory", max(memory), "times", len(memory), [min(memory), max(memory)], PAIRED)
        add("peak memory, the worst of these", "1", f"{max(memory)}", f"{max(memory)}", entry)
    if found := read("benchmark"):
        row, command = found["rows"][0], "finetune101 benchmark --models efficientnet_lite0 --repeats 7"
        rates = f"{row['step_images_per_s']} images/s (bare step)", f"{row['whole_images_per_s']} images/s"
        entry = claim("whole_vs_step", row["whole_vs_step"], "times", 7, row["range"], command)
        add("whole training epoch against the bare step", *rates, f"{row['whole_vs_step']}", entry)
    if found := read("predict"):
        rates = f"{found['plain_images_per_s']:.0f} images/s", f"{found['warm_images_per_s']:.0f} images/s"
        low, high = found["ratio_range"]
        entry = claim(
            "predict", found["ratio"], "times", found["pairs"], found["ratio_range"], "python benchmarks/predict.py RUN"
        )
        start = f"predict on 2,000 JPEGs, warm (model loading {found['start_s']:.1f} s beside it)"
        add(start, *rates, f"{found['ratio']} ({low} to {high})", entry)
        loading = {"value": round(found["start_s"], 1), "unit": "s", "spread": None}
        claims.append({**entry, "id": "speed.predict.loading", **loading})
    if found := read("warm_start"):
        entry = claim("warm_start", found["seconds"], "s", len(found["all"]), None, "python benchmarks/warm_start.py")
        done = found["first_step_done_seconds"]
        claims.append({**entry, "id": "speed.warm_start.step_done", "value": done})
        what = f"second start: import torch to the first step (done after {done} s)"
        add(what, "–", f"{found['seconds']} s", "–", entry)
    if (ours := read("finetune_fast")) and (plain := read("paired_efficientnet_lite0")):
        ratio = round(plain["plain_20_epochs_s"] / ours["seconds"], 1)
        command = f"python benchmarks/time_to_accuracy.py: {ours['command']}"
        entry = claim("finetune", ratio, "times", 1, None, command)
        sides = f"{plain['plain_20_epochs_s']} s", f"{ours['seconds']} s"
        add("fine-tuning EfficientNet-Lite0: 20 epochs, scaled up; `finetune_fast`", *sides, f"{ratio}", entry)
        solved = {"value": ours["reached"]["seconds"], "unit": "s", "spread": None}
        claims.append({**entry, "id": "speed.finetune.output_layer", **solved})
    ours = read("time_to_reference")
    if (found := read("plain_features")) and ours:
        ratio, command = round(found["seconds"] / ours["seconds"], 1), "python benchmarks/plain_features.py"
        entry = claim("plain_features", ratio, "times", len(found["measurements"]), None, command)
        sides = f"{found['seconds']:.0f} s", f"{ours['seconds']} s"
        add("frozen features of two networks; with us the output layer as well", *sides, f"{ratio}", entry)
    if found := read("precision"):
        runs, command = len(found["runs"]), "python benchmarks/precision.py"
        entry = claim("bf16_less_fp32", found["mean_difference"], "points", runs, found["sd"], command)
        difference = f"{found['mean_difference']:+.2f} ± {found['sd']:.2f}"
        add(f"bf16 less fp32, validation, mean of {runs}", "–", f"{found['mean_difference']} points", difference, entry)
    return lines, claims


def main() -> None:
    """Writes table and claims, and prints the table."""
    lines, claims = rows()
    file = RESULTS / "claims.json"
    kept = [old for old in json.loads(file.read_text()) if not old["id"].startswith("speed.")]
    file.write_text(json.dumps(sorted(kept + claims, key=lambda one: str(one["id"])), indent=1) + "\n")
    for name, words in (("README.md", {}), ("README.zh-CN.md", CHINESE)):
        text = "\n".join(lines)
        for english, chinese in words.items():
            text = text.replace(english, chinese)
        readme = RESULTS.parent / name
        before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
