"""The command line as a user meets it: what works, and every mistake as one sentence and exit code 2."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from commands import SMALL, refused
from safetensors.torch import load_file, save_file

import finetune101
from finetune101.cli.main import DATA_VERBS, VERBS, main
from finetune101.recipes import usual_scratch
from finetune101.run import Run


class Calls:
    """Unpickled, this would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch was_run",)


# what works


def test_help_needs_no_torch() -> None:
    code = "import sys\nfrom finetune101.cli.main import main\ntry:\n    main(['train', '--help'])\nfinally:\n"
    code += "    assert not {'torch', 'timm', 'torchvision', 'scipy', 'matplotlib'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--batch-size" in done.stdout and "--no-pretrain" in done.stdout


@pytest.mark.parametrize("verb", [*([name] for name in VERBS), *(["data", name] for name in DATA_VERBS)], ids=" ".join)
def test_every_verb_has_help(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "--help-all"):
        assert main([*verb, flag]) == 0
        assert f"usage: finetune101 {' '.join(verb)}" in capsys.readouterr().out


def test_the_short_help_has_the_most_used_flags_and_the_long_one_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    helps = []
    for flag in ("--help", "--help-all"):
        main(["train", flag])
        helps.append(capsys.readouterr().out)
    assert all("--epochs" in text and "--[no-]pretrain" in text for text in helps)
    assert ["--gamma" in text for text in helps] == [False, True]
    assert "Fixes initialisation, order and augmentation. Default: 0." in " ".join(helps[1].split())
    assert len(helps[0].splitlines()) < 40


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["data"], ["data", "--help"]], ids=" ".join)
def test_the_list_of_verbs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in ("data", *VERBS))


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"finetune101 {finetune101.__version__}\n"


def test_debug_shows_the_traceback_of_a_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["evaluate", str(tmp_path)]
    assert main(words) == main(["--debug", *words]) == 2
    assert capsys.readouterr().err.count("Traceback") == 1


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_verbs_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion"]) == 0
    script = capsys.readouterr().out
    wanted = {
        "tr": "train",
        "--debug train --epo": "--epochs",
        "train --no-o": "",
        "evaluate --ru": "--runs",
        "train --epo": "--epochs",
        "data ver": "verify",
        "data show --per": "--per-class",
    }
    for words, completed in wanted.items():
        ask = f"COMP_WORDS=(finetune101 {words}); COMP_CWORD={len(words.split())}; _finetune101; echo ${{COMPREPLY[@]}}"
        shell = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
        assert shell.stdout.strip() == completed


def test_train_writes_the_whole_run(runs: Path) -> None:
    run = Run(runs / "a")
    for name in ("config.json", "env.json", "split.json", "metrics.jsonl", "curves.png", "test.json", "last.pt"):
        assert run.has(name), name
    assert run.best.is_file() and list(run.path.glob("events.out.tfevents.*"))
    config = run.config()
    assert (config.model.name, config.optim.epochs, config.system.threads) == ("squeezenet1_1", 1, 1)
    assert (
        config.recipe == usual_scratch() and config.optim.warmup_epochs == 0 and set(config.augment.train_sizes) == {32}
    )


def test_flags_may_have_underscores(runs: Path, tiny_data: Path, here: Path) -> None:
    words = [*SMALL[:4], "--batch_size", "8", "--epochs", "1", "--no_pretrain", "--weight_decay", "0.5"]
    assert main(["train", "--exp", "x", "--data", str(tiny_data), *words]) == 0
    config = Run(here / "runs" / "x").config()
    assert not config.model.pretrain and config.optim.weight_decay == 0.5


def test_resume_takes_its_settings_from_the_run(runs: Path, here: Path) -> None:
    shutil.copytree(runs / "a", here / "runs" / "a")
    assert main(["train", "--exp", "a", "--resume"]) == 0
    assert Run(here / "runs" / "a").metrics() == Run(runs / "a").metrics()


def test_evaluate_prints_and_records_the_scores(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(runs / "a")
    before = run.read_json("test.json")
    assert main(["evaluate", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "Test loss:" in out and "Test accuracy:" in out and "(" in out and "/9" in out
    assert "Top-5 accuracy: 100.00 %" in out and "Mean per-class accuracy:" in out and "95 % interval" in out
    result = run.read_json("test.json")
    assert result.pop("times_scored") == before.pop("times_scored") + 1 and result == before
    with (run.path / "predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == run.read_json("split.json")["subsets"]["test"]
    assert sum(row["label"] == row["prediction"] for row in rows) == result["correct"] == round(result["top1"] * 0.09)


def test_other_subsets_are_not_recorded(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Run(runs / "a").read_json("test.json")
    assert main(["evaluate", "a", "--runs", str(runs), "--subset", "val"]) == 0
    assert "Val accuracy" in capsys.readouterr().out
    assert Run(runs / "a").read_json("test.json") == before


def test_validation_scores_agree_with_training(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = Run(runs / "a").metrics()
    assert main(["evaluate", "a", "--runs", str(runs), "--subset", "val"]) == 0
    assert f"Val accuracy: {record['val_top1']:.2f} %" in capsys.readouterr().out


def test_predict_prints_every_format(runs: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "a", str(tiny_data / "ball"), "--runs", str(runs), "--top-k", "2"]
    for flag in ([], ["--csv"], ["--json"]):
        capsys.readouterr()
        assert main([*words, *flag]) == 0
        out = capsys.readouterr().out
        assert out.count("image_00") == 12
        if flag == ["--csv"]:
            assert len(list(csv.reader(io.StringIO(out)))) == 13
        elif flag:
            assert len(json.loads(out)["predictions"]) == 12


def test_predict_reports_bad_images_and_does_the_rest(
    runs: Path, tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "bad.jpg").write_text("no image")
    good = str(tiny_data / "box" / "image_0001.jpg")
    capsys.readouterr()
    assert main(["predict", str(runs / "a"), "bad.jpg", good, "none.jpg"]) == 1
    streams = capsys.readouterr()
    assert good in streams.out
    failed = [line for line in streams.err.splitlines() if line.startswith("failed: ")]
    assert [line.split(": ")[1] for line in sorted(failed)] == ["bad.jpg", "none.jpg"]
    assert "Traceback" not in streams.err


def test_compare_writes_numbers_and_picture(runs: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a", "b", "--runs", str(runs), "--out", "ab"]) == 0
    assert "McNemar" in capsys.readouterr().out
    assert json.loads((here / "ab" / "comparison.json").read_text()) and (here / "ab" / "comparison.png").is_file()


def test_compare_tests_what_is_not_tested(runs: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        shutil.copytree(runs / name, here / "runs" / name)
    for file in ("test.json", "predictions.csv"):
        (here / "runs/b" / file).unlink()
    before = (here / "runs/a/test.json").read_bytes()
    assert main(["compare", "a", "b"]) == 2 and "evaluate" in capsys.readouterr().err
    assert main(["compare", "b", "typo", "--evaluate"]) == 2 and "typo" in capsys.readouterr().err
    assert main(["compare", "b", str(runs / "other"), "--evaluate"]) == 2 and "same split" in capsys.readouterr().err
    assert not (here / "runs/b/test.json").exists()  # the test images were not looked at
    assert main(["compare", "a", "b", "--evaluate"]) == 0
    assert "Test accuracy" in capsys.readouterr().out and (here / "runs/b/test.json").is_file()
    assert (here / "runs/a/test.json").read_bytes() == before


def test_compare_takes_groups(runs: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seeds in {"x": "ab", "y": "ba"}.items():
        for k, run in enumerate(seeds):
            shutil.copytree(runs / run, here / "runs" / name / f"{k}")
    assert main(["compare", "x", "runs/y/*"]) == 0
    out = capsys.readouterr().out
    assert "n = 2 runs" in out and "over images and runs" in out and "random: seed 1 gives the recorded" in out


def test_study_counts_runs_before_it_trains(tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", "--exp", "s", "--data", str(tiny_data), "--models", "squeezenet1_1", "--size", "32"]
    assert main([*words, "--train-per-class", "1,2", "--seeds", "2", "--splits", "3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("36 runs, 36 to do") and usual_scratch() in out and not (here / "runs").exists()
    more = ["--arms", "scratch", "--seeds", "1", "--epochs", "1", "--threads", "1"]
    assert main([*words, *more]) == 0
    assert "scratch" in capsys.readouterr().out and (here / "runs" / "s" / "study.json").is_file()


def test_search_ranks_writes_and_explains(tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(tiny_data), "--no-pretrain", *SMALL, "--grid", "lr=0.01,0.02", "--grid", "gamma=0.1,0.5"]
    words = ["search", "--exp", "s", *flags]
    assert main([*words, "--dry-run"]) == 0
    assert "4 trials, 0 of them finished; 4 epochs of 21 training images" in capsys.readouterr().out
    assert not (here / "runs" / "s").exists()
    assert main([*words, "--finalists", "1", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "  1. " in out and "  4. " in out and "finalist 1: " in out
    folder = here / "runs" / "s"
    rows = json.loads((folder / "gridsearch_results_s.json").read_text())
    assert len(rows) == 4 and set(rows[0][0]) == {"lr", "gamma"} and rows[0][1] >= rows[3][1]
    saved = json.loads((folder / "search.json").read_text())
    assert saved["points"] == 4 and saved["winner"]["point"] in [row[0] for row in rows]
    assert len(list((folder / "training_plots_random").glob("*.png"))) == 4
    kept = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    assert main([*words, "--finalists", "1", "--seeds", "2"]) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == kept
    assert main([*words, "--dry-run"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["search", "report", str(folder)]) == 0
    assert (folder / "report" / "report.html").is_file()
    assert main(["train", "--config", str(folder / "winner.yaml"), "--exp", "w", "--data", str(tiny_data)]) == 0
    config = Run(here / "runs" / "w").config()
    assert (config.optim.lr, config.optim.gamma) == tuple(saved["winner"]["point"].values())
    assert config.model.name == "squeezenet1_1" and not config.model.pretrain


# mistakes

TRAIN = ["train", "--exp", "x", "--data", "{data}", "--no-pretrain", *SMALL]
FINETUNE = [word for word in TRAIN if word != "--no-pretrain"]
# a token that the sentence must hold: the flag, the file or the way out
MISTAKES = {
    "no data": (["train", "--exp", "x"], "data download"),
    "no such data": (["train", "--exp", "x", "--data", "none"], "--data none"),
    "data path a file": (["train", "--exp", "x", "--data", "notes.txt"], "notes.txt"),
    "one class": (["train", "--exp", "x", "--data", "one"], "at least 2"),
    "empty class": (["train", "--exp", "x", "--data", "empty"], "empty/nothing"),
    "cut image": ([*TRAIN, "--data", "cut"], "cut/box/image_0002.jpg"),
    "cut image, no cache": ([*TRAIN, "--data", "cut", "--cache", "off"], "cut/box/image_0002.jpg"),
    "too few images": ([*TRAIN, "--data", "few"], "class ball"),
    "no folders protocol": ([*TRAIN, "--protocol", "folders"], "train/"),
    "too many per class": ([*TRAIN, "--protocol", "standard"], "--train-per-class 30"),
    "unknown model": ([*TRAIN, "--model", "resnet17"], "resnet18"),
    "unknown timm model": ([*TRAIN, "--model", "timm:resnet1"], "timm:"),
    "fixed size": (
        [*TRAIN, "--model", "vit_b_16"],
        "224 px",
    ),
    "no weights file": ([*FINETUNE, "--weights", "none.pth"], "none.pth"),
    "corrupt .pth": ([*FINETUNE, "--weights", "corrupt.pth"], "corrupt.pth"),
    "corrupt .safetensors": ([*FINETUNE, "--weights", "corrupt.safetensors"], "corrupt.safetensors"),
    "weights of another": ([*FINETUNE, "--weights", "alexnet.safetensors"], "squeezenet1_1"),
    "pickle": ([*FINETUNE, "--weights", "evil.pth"], "no code in it was run"),
    "weights and random": ([*TRAIN, "--weights", "corrupt.pth"], "--no-pretrain"),
    "negative rate": ([*TRAIN, "--lr", "-0.1"], "--lr"),
    "NaN rate": ([*TRAIN, "--lr", "nan"], "--lr"),
    "endless rate": ([*TRAIN, "--lr", "inf"], "--lr"),
    "batch size 0": ([*TRAIN, "--batch-size", "0"], "--batch-size"),
    "epochs 0": ([*TRAIN, "--epochs", "0"], "--epochs"),
    "unknown flag": (["train", "--exp", "x", "--batch-sise", "8"], "--batch-size"),
    "unknown flag with =": (["train", "--exp", "x", "--epoch=8"], "--epochs"),
    "unknown flag with _": (["train", "--exp", "x", "--weight_decai", "0"], "--weight-decay"),
    "unknown flag far off": (["train", "--exp", "x", "--zzzz"], "--help"),
    "stray word": (["train", "--exp", "x", "word"], "word"),
    "unknown flag of evaluate": (["evaluate", "a", "--batchsize", "8"], "--batch-size"),
    "unknown flag of search": (["search", "--exp", "x", "--gird", "lr=1"], "--grid"),
    "unknown verb": (["trian"], "train?"),
    "unknown data verb": (["data", "verfy"], "verify?"),
    "unknown recipe": (["train", "--exp", "x", "--recipe", "best"], "original"),
    "name of a folder above": ([*TRAIN, "--exp", ".."], "--exp"),
    "outside of runs": ([*TRAIN, "--exp", "../x"], "--exp"),
    "existing run": ([*TRAIN, "--exp", "a", "--runs", "{runs}"], "--resume"),
    "nothing to resume": ([*TRAIN, "--resume"], "no run named x"),
    "resume otherwise": (
        ["train", "--exp", "a", "--runs", "{runs}", "--resume", "--lr", "0.5"],
        "optim.lr",
    ),
    "no such split": ([*TRAIN, "--split", "none.json"], "none.json"),
    "split of other data": ([*TRAIN, "--split", "{runs}/a/split.json", "--data", "few"], "few"),
    "evaluate nothing": (["evaluate", "nope", "--runs", "{runs}"], "a, b, other"),
    "evaluate batch 0": (["evaluate", "{runs}/a", "--batch-size", "0"], "--batch-size"),
    "evaluate batch -1": (["evaluate", "{runs}/a", "--batch-size", "-1"], "--batch-size"),
    "evaluate other data": (["evaluate", "{runs}/a", "--data", "few"], "few"),
    "predict nothing": (["predict", "nope", "x.jpg"], "nope"),
    "predict top 0": (["predict", "{runs}/a", "x.jpg", "--top-k", "0"], "--top-k"),
    "compare nothing": (["compare", "{runs}/a", "nope"], "nope"),
    "compare one": (["compare", "a", "--runs", "{runs}"], "two runs"),
    "study of nothing": (["study", "--exp", "s", "--data", "few", "--seeds", "0"], "--seeds"),
    "study without data": (["study", "--exp", "s", "--data", "none"], "--data none"),
    "report nothing": (["report", "nope", "--runs", "{runs}"], "a, b, other"),
    "compare splits": (["compare", "a", "other", "--runs", "{runs}"], "split"),
    "search a NaN": (["search", *TRAIN[1:], "--grid", "lr=nan"], "lr is"),
    "search nothing": (["search", *TRAIN[1:], "--grid", "lr="], "lr"),
    "search an unknown": (["search", *TRAIN[1:], "--grid", "rate=1"], "rate"),
    "search a range": (["search", *TRAIN[1:], "--grid", "lr=0.1..1"], "--sampler"),
    "search for ever": (["search", *TRAIN[1:], "--sampler", "tpe"], "--trials"),
    "search time": (["search", *TRAIN[1:], "--grid", "lr=0.1", "--budget", "soon"], "--budget soon"),
    "search in no time": (["search", *TRAIN[1:], "--grid", "lr=0.1", "--budget", "1s"], "give a longer --budget"),
    "report of a run": (["search", "report", "{runs}/a"], "search"),
    "no such recipe file": (["train", "--exp", "x", "--config", "no.yaml"], "no.yaml"),
    "recipe and file": (["train", "--exp", "x", "--config", "a.yaml", "--recipe", "original"], "--recipe"),
    "no card": ([*TRAIN, "--precision", "fp16"], "fp16"),
    "wrong rate and no data": (["train", "--exp", "x", "--lr", "0"], "--lr"),
    "absolute name": ([*TRAIN, "--exp", "/tmp/x"], "--exp"),
    "huge rate": ([*TRAIN, "--lr", "1e30", "--epochs", "2"], "--lr"),
    "verify nothing": (["data", "verify", "--data", "none"], "--data none"),
}


@pytest.fixture
def traps(here: Path, tiny_data: Path) -> Path:
    """Everything that the mistakes need, in the current folder."""
    (here / "notes.txt").write_text("text")
    for root, counts in {"one": {"ball": 3}, "few": {"ball": 1, "box": 12}, "empty": {"ball": 3}}.items():
        for name, n in counts.items():
            (here / root / name).mkdir(parents=True)
            for i in range(1, n + 1):
                shutil.copy(tiny_data / name / f"image_{i:04d}.jpg", here / root / name)
    (here / "empty" / "nothing").mkdir()
    shutil.copytree(tiny_data, here / "cut")
    cut = here / "cut" / "box" / "image_0002.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    for name in ("corrupt.pth", "corrupt.safetensors"):
        (here / name).write_bytes(bytes(range(256)) * 8)
    (here / "evil.pth").write_bytes(pickle.dumps({"features.0.weight": Calls()}))
    small = {key: value[:1].clone() for key, value in torchvision.models.alexnet().state_dict().items()}
    save_file(small, here / "alexnet.safetensors")
    return here


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(
    mistake: str, traps: Path, runs: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = MISTAKES[mistake]
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    said = refused(capsys, *(word.replace("{data}", str(tiny_data)).replace("{runs}", str(runs)) for word in words))
    assert message in said
    assert not (traps / "was_run").exists()
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "--exp"),
        (["train", "--exp", "x", "--lr", "abc"], "--lr"),
        (["train", "--exp", "x", "--epochs", "1.5"], "--epochs"),
        (["train", "--exp", "x", "--device", "tpu"], "--device"),
        (["evaluate"], "run"),
    ],
)
def test_a_value_of_the_wrong_kind_is_explained(
    words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *words)


def test_a_reader_that_closes_early_is_no_error(here: Path) -> None:
    command = f"{sys.executable} -m finetune101 --help | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_search_refuses_a_bad_value_before_it_looks_for_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "lr is" in refused(capsys, "search", "--exp", "g", "--grid", "lr=-1", "--data", "nowhere")


def test_missing_weights_name_every_way(
    tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(here / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there: no network
    said = refused(capsys, *(word.replace("{data}", str(tiny_data)) for word in FINETUNE))
    for way in ("download failed", "--weights", "$FINETUNE101_WEIGHTS", "--no-pretrain", "--model efficientnet_lite0"):
        assert way in said
    assert not (here / "runs").exists()


def test_verify_tells_by_its_exit_code(tiny_data: Path, traps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", "--data", str(tiny_data)]) == 0
    assert main(["data", "verify", "--data", "cut"]) == 1
    assert "box/image_0002.jpg" in capsys.readouterr().out


def test_a_checkpoint_of_another_class_count(runs: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(here / "a")
    shutil.copytree(runs / "a", run.path)
    state = load_file(run.best)
    info = {"model": "squeezenet1_1", "epoch": "1", "preprocessing": "{}"}
    for key in ("classifier.1.weight", "classifier.1.bias"):
        state[key] = state[key][:2].clone()
    for classes, message in ((["ball", "box"], "knows other classes"), (["ball", "box", "stripes"], "does not fit")):
        whole = {**info, "preprocessing": preprocessing(runs), "classes": json.dumps(classes)}
        save_file(state, run.best, whole)
        assert message in refused(capsys, "evaluate", "a")


def preprocessing(runs: Path) -> str:
    from finetune101.evaluation.checkpoint import read_checkpoint

    return read_checkpoint(Run(runs / "a").best)[1]["preprocessing"]


@pytest.mark.parametrize("damage", ["gone", "cut", "text"])
def test_a_damaged_best_checkpoint(damage: str, runs: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(here / "a")
    shutil.copytree(runs / "a", run.path)
    if damage == "gone":
        run.best.unlink()
    else:
        run.best.write_bytes(run.best.read_bytes()[:5000] if damage == "cut" else b"text")
    said = refused(capsys, "evaluate", "a")
    assert "best.safetensors is missing" in said if damage == "gone" else "best.safetensors is damaged" in said


def test_skipped_images_are_left_out_and_recorded(traps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TRAIN[:3], "--data", "cut", *TRAIN[5:], "--skip-bad-images"]
    assert main(words) == 0
    assert "Left out 1 unreadable image(s)" in capsys.readouterr().out
    split = Run(traps / "runs" / "x").read_json("split.json")
    assert split["options"]["skipped"] == ["box/image_0002.jpg"]
    assert "box/image_0002.jpg" not in [path for paths in split["subsets"].values() for path in paths]
    assert main(["train", "--exp", "x", "--resume"]) == 0
    assert main(["evaluate", "x"]) == 0


def test_auto_says_what_a_new_user_has_to_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["auto", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("DATA", "--budget", "30m", "Ctrl-C", "RUNS/EXP"))
    assert "--device" in refused(capsys, "auto", "photos", "--device", "tpu")
