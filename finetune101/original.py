"""The file names and flags of the original four scripts, on top of the same verbs."""

from __future__ import annotations

import itertools
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from finetune101.cli.console import expanded, guarded
from finetune101.cli.many_runs import search_watched
from finetune101.cli.one_run import USUAL_TRAINING, TrainingOptions, train_watched
from finetune101.cli.parse import RecipeFile, call
from finetune101.config import Flat, TrainConfig
from finetune101.errors import Refused
from finetune101.experiments.settings import USUAL_SEARCH, SearchOptions
from finetune101.host import place
from finetune101.run import Run, file_name, is_run, plots_folder

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

    Loader = DataLoader[tuple[Tensor, Tensor]]

MODEL = "resnet18"  # the original's network


def _script(verb: Callable[..., int], argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    name = verb.__name__.removesuffix("_as_original")
    return guarded(lambda: call(verb, expanded(words), prog=f"{name}.py", model=MODEL), verb=name)


def train(argv: Sequence[str] | None = None) -> int:
    """``python train.py``: trains, then writes EXP_best.pth and the curves to training_plots_finetune/ or _random/."""
    return _script(train_as_original, argv)


def train_as_original(
    config: Annotated[TrainConfig, Flat], options: Annotated[TrainingOptions, Flat] = USUAL_TRAINING
) -> int:
    """Train a network; its best weights are written to EXP_best.pth."""
    weights, before = weights_file(config.exp), Run(Path(config.runs) / config.exp)
    if weights.exists() and not before.has("config.json") and not options.overwrite:
        raise Refused(f"{weights} is there without its run, so it is not ours; move it, or add --overwrite")
    run = train_watched(config, options)
    if place().rank:
        return 0
    export(run)
    words = ["--exp", config.exp, "--batch_size", str(config.optim.batch_size)]
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
    plots = Path(plots_folder(config))
    plots.mkdir(exist_ok=True)
    curves = plots / f"{file_name(config.exp)}.png"
    shutil.copyfile(run.path / "curves.png", curves)
    print(f"Weights: {weights}. Curves: {curves}")


def search(space: Mapping[str, Sequence[Any]], argv: Sequence[str] | None = None) -> int:
    """``python search.py``: the grid over ``space``; writes gridsearch_results_EXP.json, resumes where it stopped."""

    def search_as_original(
        config: Annotated[TrainConfig, Flat],
        options: Annotated[SearchOptions, Flat] = USUAL_SEARCH,
        *,
        recipe_file: RecipeFile = None,
    ) -> int:
        """Search hyper-parameters; stopped, the same command goes on.

        Args:
            recipe_file: Start from a recipe file such as a search's winner.yaml.
        """
        table = Path(f"gridsearch_results_{file_name(config.exp)}.json")
        return search_watched(config, options, table, Path(), dict(space))

    return _script(search_as_original, argv)


def test(argv: Sequence[str] | None = None) -> int:
    """``python test.py --exp EXP``: test loss and accuracy of the run EXP, or of a foreign EXP_best.pth."""
    words = list(sys.argv[1:] if argv is None else argv)
    for i, (flag, value) in enumerate(itertools.pairwise(words)):
        if flag in ("--batch_size", "--batch-size") and value.startswith("--") and value[2:].isdigit():
            print(f"note: read --batch_size {value} as --batch_size {value[2:]}")
            words[i + 1] = value[2:]
    return _script(test_as_original, words)


def test_as_original(
    *, exp: str, batch_size: int = 64, data: str | None = None, runs: str = "runs", model: str = MODEL
) -> int:
    """Test loss and accuracy of the run EXP, or of a foreign file EXP_best.pth.

    Args:
        exp: Name of the run, of a file EXP_best.pth, or of the package's own network (released_finetune).
        batch_size: Images per step.
        data: Where the images are, if not where the run found them.
        runs: Folder of all runs.
        model: Network of a foreign EXP_best.pth.
    """
    if batch_size < 1:
        raise Refused(f"--batch_size is {batch_size}; give at least 1")
    from finetune101.deploy.released import score_released
    from finetune101.deploy.released_files import RELEASED
    from finetune101.evaluation.evaluate import evaluate
    from finetune101.evaluation.result import score_text

    run, file = Run(Path(runs) / exp), Path(f"{exp}_best.pth")
    if is_run(run.path):
        record = evaluate(run, data=data, batch_size=batch_size)
    elif exp in RELEASED:
        record = score_released(exp, data, batch_size)
    elif file.is_file():
        record = test_foreign(file, model, data, batch_size)
    else:
        train_it = shlex.join(["python", "train.py", "--exp", exp])
        raise Refused(f"neither {run.path} nor {file} is there; train it with {train_it}")
    print(score_text(record))
    if reason := run.stopped():
        print(f"Not the end of its training: {reason}")
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
    manifest = splits.make_split(index, config)
    preprocessing = lookup(MODEL).preprocessing

    def loader(subset: str) -> Loader:
        flip = v2.RandomHorizontalFlip() if subset == "train" else v2.Identity()
        files = ImageFiles(index.root, manifest.subsets[subset], manifest.labels(subset), preprocessing, flip)
        return DataLoader(files, batch_size=batch_size, shuffle=subset == "train", num_workers=num_workers)

    return loader("train"), loader("val"), loader("test")
