"""The generated parts of docs/ on the Chinese pages: headings and a sentence on each verb are Chinese."""

from __future__ import annotations

import re

ROWS = {
    "| network | size, px | million weights | ImageNet weights from | licence of the weights |": (
        "| 网络 | 图片尺寸，px | 权重数，百万 | ImageNet 权重的来源 | 权重的许可证 |"
    ),
    "| field | type | always | meaning |": "| 字段 | 类型 | 总有 | 含义 |",
    "| claim | value | unit | n | spread | kind |": "| 编号 | 值 | 单位 | 训练次数 | 离散程度 | 种类 |",
    "| message | what to do |": "| 错误信息 | 办法 |",
    "| setting | value |": "| 设置 | 值 |",
    "| argument | what it is |": "| 位置参数 | 含义 |",
    "| attribute | what it is |": "| 属性 | 含义 |",
    "| flags | what it does | default |": "| 参数 | 作用 | 默认值 |",
    "| data | what it does | default |": "| 数据 | 作用 | 默认值 |",
    "| augmentation | what it does | default |": "| 数据增强 | 作用 | 默认值 |",
    "| network | what it does | default |": "| 网络 | 作用 | 默认值 |",
    "| optimisation | what it does | default |": "| 优化 | 作用 | 默认值 |",
    "| machine | what it does | default |": "| 机器 | 作用 | 默认值 |",
    "## Functions": "## 函数",
    "## What they return": "## 返回的类",
}
"""A whole line -> the same in Chinese."""

CELLS = {
    "yes": "是", "on": "开", "off": "关", "recomputed": "重新计算", "recorded": "记录",
    "as its parts": "与各组成部分相同", "224, no other": "224，不能改",
}  # fmt: skip
"""A whole cell -> the same in Chinese."""

VERBS = {
    "data download": "下载、核对并解压 Caltech-101。",
    "data verify": "读每一张图片，报告有问题、重复或异常的图片；什么都不改动。",
    "data show": "把一些图片按原样和按训练时的样子画在一张图上。",
    "train": "训练一个实验。",
    "evaluate": "在测试集上评测实验。",
    "predict": "识别照片。",
    "card": "写出模型卡。",
    "explain": "显示网络关注照片的哪里，以及最相似的训练图片。",
    "embed": "把图片的特征和概率写成表格。",
    "export": "把网络导出为一个文件，供其他程序使用。",
    "serve": "在浏览器里试用网络。",
    "ensemble": "对多个实验的概率取平均。",
    "compare": "在同样的测试图片上比较两组实验。",
    "report": "生成实验、比较或研究的网页。",
    "study": "训练并测试一整套实验。",
    "search": "搜索超参数。",
    "search report": "生成说明一次搜索的网页。",
    "auto": "在给定的时间内，由照片文件夹得到一个测试过的网络。",
    "lr-find": "学习率测试：学习率多大合适。",
    "recipes": "列出训练配方。",
    "benchmark": "测量这台机器训练或识别的速度。",
    "cache": "列出或清理缓存文件夹。",
    "doctor": "检查这台机器，指出问题和修复的命令。",
    "demo": "在程序画出的图片上走完全程。",
}
"""Verb -> what it does, in a sentence."""


def in_chinese(part: str) -> str:
    """A generated ``part`` of a page as it stands on the Chinese page."""
    lines: list[str] = []
    is_code = False
    for line in part.splitlines():
        is_code ^= line.startswith("```")
        cells = line.split(" | ")
        if not is_code and line.startswith("| ") and len(cells) > 1:
            cells = [_cell(cell) for cell in cells]
        lines.append(line if is_code else ROWS.get(line) or " | ".join(cells))
        if not is_code and (heading := re.fullmatch(r"## finetune101 (.+)", line)) and heading[1] in VERBS:
            lines += ["", VERBS[heading[1]]]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """``text`` between two bars; the last one has the closing bar with it."""
    bare = text.removesuffix(" |")
    return CELLS.get(bare, bare) + text.removeprefix(bare)
