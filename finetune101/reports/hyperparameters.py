"""What was set for each arm, and the data and network of a comparison in words: what a lab report has to say."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from finetune101.config import AugmentConfig, OptimConfig, TrainConfig
from finetune101.data.images import OFFICIAL_CLASSES
from finetune101.deploy.card import SOME_CALTECH
from finetune101.models.table import lookup
from finetune101.recipes import whole_epochs
from finetune101.reports.groups import Group, Tested
from finetune101.reports.page import Cell, Page, Words, sentence
from finetune101.reports.page import words as text

BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index", "relative_coords_table")
ORDER = (
    "network", "parameters", "start", "random", "trained", "recipe", "fit", "loss", "teacher", "optimizer", "lr",
    "backbone", "schedule", "decay", "batch", "epochs", "kept", "ema", "size", "augment", "norm", "precision", "seeds",
)  # fmt: skip
"""Settings in the order of the table; each has the word set_NAME."""


@functools.cache
def parameter_count(network: str, classes: int) -> int:
    """How many numbers training changes in ``network`` with an output for each of ``classes``."""
    entry = lookup(network)
    sizes = {name: one.numel() for name, one in entry.outline().items() if not name.endswith(BUFFERS)}
    head = sum(size for name, size in sizes.items() if name.startswith(entry.head))
    return sum(sizes.values()) - head + head * classes // 1000  # an outline has 1,000 outputs


def data_words(run: Tested, words: Words, splits: int = 1) -> str:
    """Two or three sentences on the images of ``run``: how many, who trains and tests, what validation chose."""
    manifest, kept = run.manifest, {name: len(paths) for name, paths in run.manifest.subsets.items()}
    classes = set(manifest.classes)
    folder = Path(run.run.image_folder() or run.env.get("data") or "").name
    if len(classes) == OFFICIAL_CLASSES and classes >= SOME_CALTECH:
        folder = "Caltech-101"
    values = {name: f"{count:,}" for name, count in kept.items()}
    options = {"train_per_class": run.config.data.train_per_class, **manifest.options, "seed": manifest.seed}
    few = "_few" if options.get("max_test_per_class") else ""
    sentences = [
        words["data_of"].format(
            **values,
            images=f"{sum(kept.values()):,}",
            classes=len(manifest.classes),
            name=words["data_named"].format(name=folder) if folder else "",
            how=words[f"how_{manifest.protocol}{few}"].format(**options),
        ),
        words["data_several"].format(n=splits) if splits > 1 else "",
        words["val_train" if run.config.data.fit_on == "train+val" else "val_choose" if kept["val"] else "val_none"],
    ]
    return words["gap"].join(one.strip() for one in sentences if one)


def network_words(groups: Sequence[Group], words: Words) -> str:
    """A sentence on each network of ``groups``."""
    classes = {group.runs[0].config.model.name: len(group.runs[0].manifest.classes) for group in groups}
    return words["gap"].join(
        words["network_of"].format(network=name, classes=count, millions=size / 1e6, tens_of_thousands=size / 1e4)
        for name, count in classes.items()
        for size in [parameter_count(name, count)]
    )


def add_setup(page: Page, groups: Sequence[Group], name: str = "", key: str = "setup") -> None:
    """Adds the sentences on data and network."""
    splits = {run.split for group in groups for run in group.runs}
    data = data_words(groups[0].runs[0], page.words, len(splits))
    page.add("words", key, name, data=data, network=network_words(groups, page.words))


def add_settings(page: Page, groups: Sequence[Group], name: str = "", key: str = "settings") -> None:
    """Adds a table with everything that was set, a column for each of ``groups``."""
    columns = [_settings(group, page.words) for group in groups]
    labels = [label for label in ORDER if any(label in column for column in columns)]
    none = page.words["v_none"]
    rows: list[tuple[str, list[Cell]]] = [
        (f"set_{label}", [text(column.get(label, none)) for column in columns]) for label in labels
    ]
    page.sheet(key, [group.name for group in groups], rows, name, corner=page.words["set_name"])


def _settings(group: Group, words: Words) -> dict[str, str]:
    """Label -> value of everything that was set for a group; what a recipe leaves out only where it matters."""
    run = group.runs[0]
    config, optim, model = run.config, run.config.optim, run.config.model
    ratio, whole = config.backbone_lr_ratio(), whole_epochs(config)
    solved = optim.epochs == 0  # the output layer alone, by a solver
    values = {
        "network": model.name,
        "parameters": f"{parameter_count(model.name, len(run.manifest.classes)) / 1e6:.2f}",
        "start": _start(config, words),
        "trained": words["v_head_only" if model.freeze or solved else "v_all"],
        "recipe": (Path(config.recipe or "").name or "–") + (words["v_cut"].format(whole=whole) if whole else ""),
        "loss": sentence(words, "v_smoothed" if optim.label_smoothing else "v_cross", value=optim.label_smoothing),
    }
    if solved:
        values["optimizer"] = words["v_solved"]
    else:
        values |= {
            "optimizer": words["v_nesterov" if optim.nesterov else "v_sgd"].format(momentum=optim.momentum),
            "lr": f"{optim.lr:g}",
            "backbone": "–" if model.freeze else f"{optim.lr * ratio:g} ({ratio:g} ×)",
            "schedule": _schedule(optim, words),
            "decay": f"{optim.weight_decay:g}"
            if optim.norm_weight_decay or not optim.weight_decay
            else words["v_no_norm_decay"].format(value=optim.weight_decay),
            "batch": f"{optim.batch_size}",
            "epochs": f"{optim.epochs}",
            "kept": words["comma"].join(f"{one.test.get('epoch', 0)}" for one in group.runs),
        }
    sizes = (*config.augment.train_sizes, model.size or lookup(model.name).preprocessing.size)
    values |= {
        "size": " → ".join(map(str, dict.fromkeys(sizes))) + " px",
        "augment": words["v_none"] if solved or model.cached_features else _augmentation(config.augment, words),
        "norm": words["v_norm_kept" if model.freeze_norm or solved else "v_norm_trained"],
    }
    if model.random_layers:
        values["random"] = words["comma"].join(model.random_layers)
    if optim.ema:
        values["ema"] = f"{optim.ema:g}"
    if optim.teacher:
        teachers = words["comma"].join(Path(name).name for name in optim.teacher)
        values["teacher"] = words["v_teacher"].format(
            runs=teachers, share=100 * optim.teacher_share, temperature=optim.teacher_temperature
        )
    if config.data.fit_on == "train+val":
        values["fit"] = words["v_train_val"]
    values["precision"] = str(run.env.get("world", {}).get("precision", "–"))
    values["seeds"] = words["comma"].join(f"{one.config.system.seed}" for one in group.runs)
    return values


def _start(config: TrainConfig, words: Words) -> str:
    """Where the weights came from before the first step."""
    model = config.model
    start = words["v_random" if not model.pretrain else "v_file" if model.weights else "v_imagenet"]
    return words["v_head_probe"].format(start=start) if model.head == "probe" else start


def _schedule(optim: OptimConfig, words: Words) -> str:
    """How the learning rate changes."""
    if optim.schedule == "step":
        return words["v_step"].format(gamma=optim.gamma, step_size=optim.step_size)
    return words["v_warmup" if optim.warmup_epochs else "v_cosine"].format(warmup=optim.warmup_epochs)


def _augmentation(augment: AugmentConfig, words: Words) -> str:
    """What is done to training images."""
    parts = [
        words["v_flip"] if augment.flip else "",
        words["v_crop"].format(share=100 * augment.crop_scale) if augment.crop_scale < 1 else "",
        words["v_trivial"] if augment.policy == "trivial" else "",
        words["v_erasing"].format(share=100 * augment.erasing) if augment.erasing else "",
        words["v_mixup" if augment.mixup_alpha else "v_mix"].format(share=100 * augment.mix, alpha=augment.mixup_alpha)
        if augment.mix
        else "",
    ]
    return words["comma"].join(filter(None, parts)) or words["v_none"]
