"""The file names and flags of the original four scripts, on top of the same verbs."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune101.cli import main
from finetune101.cli.console import expanded, guarded
from finetune101.cli.parse import SearchArguments, parse, parse_train
from finetune101.errors import Refused
from finetune101.run import Run, file_name, is_run

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

    Loader = DataLoader[tuple[Tensor, Tensor]]

MODEL = "resnet18"  # the original's network


@dataclass(frozen=True, kw_only=True)
class TestArguments:
    """Test loss and accuracy of the run EXP, or of a foreign file EXP_best.pth."""

    __test__ = False  # no class of tests, whatever pytest thinks of its name
    exp: str
    """Name of the run, of a file EXP_best.pth, or of the package's own network (released_finetune)."""
    batch_size: int = 64
    """Images per step."""
    data: str | None = None
    """Where the images are, if not where the run found them."""
    runs: str = "runs"
    """Folder of all runs."""
    model: str = MODEL
    """Network of a foreign EXP_best.pth."""


def train(argv: Sequence[str] | None = None) -> int:
    """``python train.py``: trains, then writes EXP_best.pth and the curves to training_plots_finetune/ or _random/."""
    return guarded(lambda: _train(expanded(sys.argv[1:] if argv is None else argv)))


def _train(argv: Sequence[str]) -> int:
    arguments = parse_train(argv, prog="train.py", model=MODEL)
    weights, before = weights_file(arguments.config.exp), Run(Path(arguments.config.runs) / arguments.config.exp)
    if weights.exists() and not before.has("config.json") and not arguments.overwrite:
        raise Refused(f"{weights} is there without its run, so it is not ours; move it, or add --overwrite")
    run = main.run_training(arguments.config, resume=arguments.resume, overwrite=arguments.overwrite)
    export(run)
    words = ["--exp", arguments.config.exp, "--batch_size", str(arguments.config.optim.batch_size)]
    print(f"Test it: {shlex.join(['python', 'test.py', *words])}")
    return 0


def weights_file(exp: str) -> Path:
    """Where the original keeps the best weights of ``exp``."""
    return Path(f"{file_name(exp)}_best.pth")


def export(run: Run) -> None:
    """Writes the original's files for ``run``: <exp>_best.pth here, and its curves in the folder of its arm."""

    from finetune101.evaluation.checkpoint import read_checkpoint
    from finetune101.run import save_state

    config = run.config()
    state, _ = read_checkpoint(run.best)
    weights = weights_file(config.exp)
    save_state(weights, state)
    plots = Path("training_plots_finetune" if config.model.pretrain else "training_plots_random")
    plots.mkdir(exist_ok=True)
    curves = plots / f"{file_name(config.exp)}.png"
    shutil.copyfile(run.path / "curves.png", curves)
    print(f"Weights: {weights}. Curves: {curves}")


def search(space: Mapping[str, Sequence[Any]], argv: Sequence[str] | None = None) -> int:
    """``python search.py``: the grid over ``space``; writes gridsearch_results_EXP.json, resumes where it stopped."""
    return guarded(lambda: _search(space, expanded(sys.argv[1:] if argv is None else argv)))


def _search(space: Mapping[str, Sequence[Any]], argv: Sequence[str]) -> int:
    arguments = parse_train(argv, prog="search.py", model=MODEL, kind=SearchArguments)
    table = Path(f"gridsearch_results_{file_name(arguments.config.exp)}.json")
    return main.run_search(arguments, table, Path(), dict(space))


def test(argv: Sequence[str] | None = None) -> int:
    """``python test.py --exp EXP``: test loss and accuracy of the run EXP, or of a foreign EXP_best.pth."""
    return guarded(lambda: _test(expanded(sys.argv[1:] if argv is None else argv)))


def _test(argv: list[str]) -> int:
    if "--batch_size" in argv[:-1] or "--batch-size" in argv[:-1]:
        at = next(i for i, word in enumerate(argv) if word in ("--batch_size", "--batch-size")) + 1
        if argv[at].startswith("--") and argv[at][2:].isdigit():
            print(f"note: read --batch_size {argv[at]} as --batch_size {argv[at][2:]}")
            argv[at] = argv[at][2:]
    arguments = parse(TestArguments, argv, prog="test.py")
    if arguments.batch_size < 1:
        raise Refused(f"--batch_size is {arguments.batch_size}; give at least 1")
    from finetune101.deploy.released import RELEASED, score_released

    run, file = Run(Path(arguments.runs) / arguments.exp), Path(f"{arguments.exp}_best.pth")
    if is_run(run.path):
        from finetune101.evaluation.evaluate import evaluate

        result = evaluate(run, data=arguments.data, batch_size=arguments.batch_size)
    elif arguments.exp in RELEASED:
        result = score_released(arguments.exp, arguments.data, arguments.batch_size)
    elif file.is_file():
        result = test_foreign(file, arguments.model, arguments.data, arguments.batch_size)
    else:
        train_it = shlex.join(["python", "train.py", "--exp", arguments.exp])
        raise Refused(f"neither {run.path} nor {file} is there; train it with {train_it}")
    print(main.score_text(result))
    if told := run.stopped():
        print(f"Not the end of its training: {told}")
    return 0


def test_foreign(file: Path, model: str, data: str | None, batch_size: int) -> dict[str, Any]:
    """Scores a plain state dict on the reference test images with the original's preprocessing."""
    from finetune101.config import SystemConfig
    from finetune101.deploy.released import score_reference
    from finetune101.evaluation.checkpoint import TrainedNetwork
    from finetune101.machine import detect
    from finetune101.models.build import load_foreign
    from finetune101.models.table import lookup

    module, count = load_foreign(file, model)
    classes, world = [str(number) for number in range(count)], detect(SystemConfig())
    network = TrainedNetwork(model=module, preprocessing=lookup(model).preprocessing, classes=classes, world=world)
    return score_reference(network, data, batch_size, str(file))


def get_dataloaders(
    root_path: str = "./data",
    batch_size: int = 256,
    test_size: float = 0.2,
    val_size: float = 0.1,
    random_state: int = 42,
    num_workers: int = 0,
) -> tuple[Loader, Loader, Loader]:
    """The original's three loaders (train, val, test) of (float tensor N x 3 x 224 x 224, int64 N).

    ``root_path`` holds 101_ObjectCategories. Training images are shuffled and flipped at random; all are resized to
    224 x 224 and standardised with ImageNet's mean and deviation. Raises Refused when there are no images.
    """
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    from finetune101.config import DataConfig
    from finetune101.data import splits
    from finetune101.data.images import find_data, index_images
    from finetune101.data.torch_dataset import ImageFiles
    from finetune101.models.table import lookup

    config = DataConfig(root=root_path, test_size=test_size, val_size=val_size, split_seed=random_state)
    index = index_images(find_data(root_path))
    manifest = splits.make(index, config)
    preprocessing = lookup(MODEL).preprocessing

    def loader(subset: str) -> Loader:
        flip = v2.RandomHorizontalFlip() if subset == "train" else v2.Identity()
        files = ImageFiles(index.root, manifest.subsets[subset], manifest.labels(subset), preprocessing, flip)
        return DataLoader(files, batch_size=batch_size, shuffle=subset == "train", num_workers=num_workers)

    return loader("train"), loader("val"), loader("test")
