"""The runs that need a GPU, each plan in pieces of a few minutes: what is not done goes on with the next call.

python evidence/gpu_runs.py pack IMAGES --size 224           small JPEGs of all images, in tar files of 15 MB
python evidence/gpu_runs.py train PLAN --images TARS_OR_FOLDER --out OUT --minutes 8 [--only RUN]      on the GPU
python evidence/gpu_runs.py collect OUT... --split results/splits/reference_seed42.json                afterwards

``train`` keeps runs and images in runs/, so that a call on the same machine resumes what the time cut off. It leaves in
OUT the records of every run and the weights that count, in half precision and pieces of 15 MB. No test image
is scored there: ``collect`` puts the runs into runs/collected beside the split of the original images, and prints their
validation accuracy. ``finetune101 evaluate`` then tests the run that this accuracy chooses, once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from PIL import Image, ImageOps
from safetensors import safe_open
from tqdm import tqdm

from finetune101.data import splits
from finetune101.data.images import index_images
from finetune101.run import Run

RUNS = Path("runs") / "gpu"
PIECE = 15_000_000  # bytes
RECORDS = ("config.json", "env.json", "split.json", "metrics.jsonl")
BRINGING = 40  # seconds before the end of the time, for half precision and packing

SCRATCH = "--recipe scratch_long --no-pretrain"
LAST = "--val-every 1000"  # only the last epoch is validated, and so kept: EMA and cosine make the last one the best
STUDENT = f"{SCRATCH} {LAST} --mix 1 --mixup-alpha 1 --teacher-share 1 --label-smoothing 0 --epochs 200"
STEPS = "--train-sizes 96 128 160 192 224 --size 256 --cache-size 256"
FINETUNE = {
    "lite0": "--recipe finetune --model efficientnet_lite0",
    "lite2": "--recipe finetune --model efficientnet_lite2 --size 300 --cache-size 336 --train-sizes 260",
}


@dataclass(frozen=True)
class Stage:
    """Runs that may be trained side by side, ``jobs`` at a time: name -> flags. ``kept``: whose weights are brought."""

    runs: dict[str, str]
    jobs: int
    kept: bool = True


def _grid() -> Stage:
    """Learning rate x weight decay: 12 runs of ResNet-18, 100 epochs at 96 px."""
    size = "--size 96 --train-sizes 96 --cache-size 112 --epochs 100"
    pairs = [(rate, decay) for rate in ("0.1", "0.2", "0.4") for decay in ("5e-4", "1e-3", "2e-3", "3e-3")]
    flags = f"{SCRATCH} --model resnet18 {LAST} {size}"
    return Stage(
        {f"grid_{lr}_{decay}": f"{flags} --lr {lr} --weight-decay {decay}" for lr, decay in pairs}, 4, kept=False
    )


def _standard() -> Stage:
    """ResNet-18 on 30 images per class of three splits, with as many steps as 600 epochs of the reference split."""
    data = f"--protocol standard --fit-on train+val --epochs 1190 {STEPS}"
    runs = {f"standard_{seed}": f"{SCRATCH} --model resnet18 {data} --split-seed {seed}" for seed in (42, 43, 44)}
    return Stage(runs, jobs=3)


def _student(model: str, teachers: Sequence[str], temperature: int) -> str:
    names = " ".join((RUNS / name).as_posix() for name in teachers)
    return f"{STUDENT} {STEPS} --model {model} --teacher {names} --teacher-temperature {temperature}"


def _matching(kind: str, teachers: Sequence[str]) -> Stage:
    """Function matching for a fine-tuned network (Beyer et al., 2022), at three temperatures."""
    names = " ".join((RUNS / name).as_posix() for name in teachers)
    flags = f"{FINETUNE[kind]} --epochs 80 --mix 1 --mixup-alpha 1 --label-smoothing 0 --val-every 10"
    flags += f" --teacher {names} --teacher-share 1"
    return Stage({f"match_{kind}_t{t}": f"{flags} --teacher-temperature {t}" for t in (1, 2, 5)}, jobs=3)


BORN = {f"born_teacher{seed}": f"--model resnet18 --seed {seed}" for seed in (0, 1)}
BORN |= {"born_teacher2": "--model timm:resnetblur18 --seed 2"}
MATCHED = {f"teach_lite0_{seed}": f"{FINETUNE['lite0']} --seed {seed}" for seed in (0, 1, 2)}
MATCHED |= {f"teach_lite2_{seed}": f"{FINETUNE['lite2']} --seed {seed}" for seed in (0, 1)}
MATCHED |= {"teach_probe": "--recipe probe --model efficientnet_lite012"}

PLANS: dict[str, tuple[Stage, ...]] = {
    "resnet18_grid": (_grid(),),
    "resnet18_long": (
        Stage(
            {
                "long_mixup": f"{SCRATCH} --model resnet18 {LAST} {STEPS} --epochs 600 --mix 1 --mixup-alpha 0.2",
                "long_half": f"{SCRATCH} --model resnet18 {LAST} {STEPS} --epochs 600",
            },
            jobs=2,
        ),
    ),
    "resnet18_standard": (_standard(),),
    "lite0_scratch": (
        Stage(
            {
                f"lite0_scratch_{seed}": f"{SCRATCH} --model efficientnet_lite0 {LAST} --epochs 300 --mix 0.25"
                " --train-sizes 64 96 128 160 192 --size 224 --cache-size 224 --batch-size 207 --lr 0.16 --ema 0.9935"
                f" --seed {seed}"
                for seed in (0, 1, 2)
            },
            jobs=3,
        ),
    ),
    "born_again": (
        Stage({name: f"{SCRATCH} {LAST} {STEPS} --epochs 100 {flags}" for name, flags in BORN.items()}, 3, kept=False),
        *(Stage({f"born_t{t}": _student("timm:resnet18d", tuple(BORN), t)}, jobs=1) for t in (2, 4)),
    ),
    "match_lite0": (Stage(MATCHED, 3, kept=False), _matching("lite0", tuple(MATCHED))),
    "match_lite2": (Stage(MATCHED, 3, kept=False), _matching("lite2", tuple(MATCHED))),
}
"""Rows a to d of the random start, and function matching; a stage begins when the one before it has ended.

A run of resnet18_long or resnet18_standard sees 3.6 million images: 12 minutes at 5,000 images/s, to expect of an H200
at these sizes. So ``--only`` trains one of them, in two calls. Rate and weight decay of the best run of the grid are
given to the others by ``--flags "--lr ... --weight-decay ..."``.
"""
TINY = (
    "--epochs 2 --warmup-epochs 0 --size 64 --cache-size 64 --train-sizes 64 --batch-size 8 --threads 1 --device cpu"
    " --protocol reference --fit-on train --val-every 1"
)
"""What ``--tiny`` changes: two epochs of small images on a CPU, to try a plan before a GPU is at hand."""


def pack(images: Path, out: Path, size: int, quality: int = 90) -> list[Path]:
    """Writes all images of ``images``, squashed to ``size`` x ``size`` px, to tar files of at most 15 MB in ``out``."""
    index, pieces, room = index_images(images), [dict[str, bytes]()], PIECE
    for path in tqdm(index.paths, desc="pack", unit="img"):
        with Image.open(Path(index.root) / path) as image, io.BytesIO() as buffer:
            small = ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            small.save(buffer, "JPEG", quality=quality)
            content = buffer.getvalue()
        if room < len(content):
            pieces.append({})
            room = PIECE
        pieces[-1][path] = content
        room -= len(content) + 1024  # of tar's own for each file
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"images_{size}px_{number:02d}.tar" for number in range(len(pieces))]
    for file, piece in zip(files, pieces, strict=True):
        with tarfile.open(file, "w") as tar:
            for path, content in piece.items():
                member = tarfile.TarInfo(f"images/{path}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return files


def unpack(sources: Sequence[Path]) -> Path:
    """The folder of images: the one source itself, or what the tar files hold, unpacked below ``RUNS``."""
    if sources[0].is_dir():
        return sources[0]
    folder = RUNS.parent / "gpu_images"
    for source in sources:
        mark = folder / f"{source.name}.done"
        if not mark.is_file():
            with tarfile.open(source) as tar:
                tar.extractall(folder, filter="data")
            mark.touch()
    return folder / "images"


def is_done(name: str) -> bool:
    """Whether the run ``name`` has ended."""
    run = Run(RUNS / name)
    return run.has("config.json") and bool(records := run.metrics()) and records[-1]["epoch"] == _epochs(run)


def _epochs(run: Run) -> int:
    return run.config().optim.epochs


def train_one(name: str, flags: str, images: Path, deadline: float) -> None:
    """Trains the run ``name``, or goes on with it, until its end or the ``deadline`` (``time.monotonic``).

    Raises ValueError with the last line of a training that failed.
    """
    if is_done(name) or time.monotonic() > deadline:
        return
    run = Run(RUNS / name)
    command = [sys.executable, "-m", "finetune101", "train", "--exp", name, "--runs", RUNS.as_posix()]
    if run.has("config.json") and run.metrics():
        command += ["--resume"]
    else:
        command += ["--overwrite", "--data", str(images), *flags.split()]
    log = RUNS / f"{name}.log"
    with log.open("a", encoding="utf-8") as lines:
        training = subprocess.Popen(command, stdout=lines, stderr=lines)
        try:
            code = training.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            training.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                training.wait(20)  # it keeps its state, and needs seconds for it
            training.kill()
            training.wait()
            print(f"{name}: cut off after epoch {(run.metrics() or [{'epoch': 0}])[-1]['epoch']}", flush=True)
            return
    if code:
        raise ValueError(f"{name}: {log.read_text(encoding='utf-8').strip().splitlines()[-1]}")
    print(f"{name}: {score(run)}", flush=True)


def score(run: Run) -> str:
    """Validation accuracy and time of the kept epoch, as a line."""
    best = [record for record in run.metrics() if record["best"]][-1]
    top1 = "no validation" if best["val_top1"] is None else f"validation {best['val_top1']:.2f} %"
    return f"{top1}, epoch {best['epoch']}, {sum(record['seconds'] for record in run.metrics()):.0f} s"


def bring(names: Sequence[str], kept: Sequence[str], out: Path) -> None:
    """Writes the records of the runs ``names`` to ``out``, and of those in ``kept`` that ended the weights."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "records.tar.gz", "w:gz") as tar:
        for name in names:
            for file in RECORDS:
                if (RUNS / name / file).is_file():
                    tar.add(RUNS / name / file, f"{name}/{file}")
    for name in filter(is_done, kept):
        with safe_open(Run(RUNS / name).best, "pt") as file:
            info = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        small = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
        content = safetensors.torch.save(small, info)
        for number, start in enumerate(range(0, len(content), PIECE)):
            (out / f"{name}.{number:02d}").write_bytes(content[start : start + PIECE])


def train(plan: str, sources: Sequence[Path], out: Path, minutes: float, only: str, flags: str) -> None:
    """Trains what is missing of ``plan``, or of its run ``only``, for at most ``minutes``, and brings it back."""
    deadline = time.monotonic() + 60 * minutes - BRINGING
    RUNS.mkdir(parents=True, exist_ok=True)
    images = unpack(sources)
    names, kept = list[str](), list[str]()
    for stage in PLANS[plan]:
        chosen = {name: own for name, own in stage.runs.items() if only in ("", name)}
        names += chosen
        kept += chosen if stage.kept else ()
        with ThreadPoolExecutor(stage.jobs) as pool:
            ends = [pool.submit(train_one, name, f"{own} {flags}", images, deadline) for name, own in chosen.items()]
        bring(names, kept, out)  # also where one has failed
        for end in ends:
            end.result()
        if not all(map(is_done, chosen)):
            print("The time is over: give the command again, on the same machine, to go on")
            return


def collect(folders: Sequence[Path], split: Path, into: Path) -> None:
    """Puts brought runs below ``into`` as runs of the original images, whose ``split`` this is; prints their scores.

    Raises ValueError where a run was trained on other files than those of the split.
    """
    original = splits.read_split(split)
    for folder in folders:
        with tarfile.open(folder / "records.tar.gz") as tar:
            tar.extractall(into, filter="data")
            names = sorted({member.name.split("/")[0] for member in tar.getmembers()})
        for name in names:
            run = Run(into / name)
            packed = splits.from_json(run.read_json("split.json"))
            if packed.subsets != original.subsets or packed.classes != original.classes:
                raise ValueError(f"{name} was trained on other files than those of {split}")
            run.write_json("split.json", original.to_json())
            pieces = sorted(folder.glob(f"{name}.[0-9][0-9]"))
            if pieces:
                run.best.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
            print(f"{name}: {score(run) if pieces else 'not ended'}")


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack")
    packing.add_argument("images", type=Path)
    packing.add_argument("--size", type=int, default=224)
    packing.add_argument("--out", type=Path, default=Path("runs") / "packed")
    training = verbs.add_parser("train")
    training.add_argument("plan", choices=PLANS)
    training.add_argument("--images", type=Path, nargs="+", required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--minutes", type=float, default=8)
    training.add_argument("--only", default="", help="this run of the plan alone")
    training.add_argument("--flags", default="", help="flags of train for every run, such as --lr of the grid's best")
    training.add_argument("--tiny", action="store_true", help="two epochs of small images on a CPU")
    collecting = verbs.add_parser("collect")
    collecting.add_argument("folders", type=Path, nargs="+")
    collecting.add_argument("--split", type=Path, required=True)
    collecting.add_argument("--into", type=Path, default=Path("runs") / "collected")
    asked = parser.parse_args(words)
    if asked.verb == "pack":
        print(*pack(asked.images, asked.out, asked.size), sep="\n")
    elif asked.verb == "train":
        flags = f"{asked.flags} {TINY}" if asked.tiny else asked.flags
        train(asked.plan, asked.images, asked.out, asked.minutes, asked.only, flags)
    else:
        collect(asked.folders, asked.split, asked.into)


if __name__ == "__main__":
    main()
