"""The page of a run or a comparison as a lab report: one document for a printer, with what such a report has to say."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from finetune101.evaluation.tested import confused_pairs
from finetune101.experiments.trials import read_trials
from finetune101.reports import compare, figures, groups, mistakes
from finetune101.reports.arm_tables import add_arms, add_result
from finetune101.reports.comparison import Comparison
from finetune101.reports.drawing import font_remark
from finetune101.reports.effects import analyse_variance, search_story, winner_words
from finetune101.reports.groups import Group, Tested
from finetune101.reports.hyperparameters import add_settings, add_setup
from finetune101.reports.page import Page, p_text
from finetune101.reports.pages import add_losses, arms_of, comparison_headline, draw_groups, run_headline, study_groups
from finetune101.reports.pages import study_folder as folder_of_study
from finetune101.reports.run_sections import add_facts
from finetune101.reports.search_page import add_search
from finetune101.run import open_run

SHOWN = 6  # images of confident mistakes
CONFUSED = 5  # pairs of classes in a sentence
MATRIX = 15  # classes of a confusion matrix that a printed page has room for


def write_assignment(
    target: str,
    out: Path,
    *,
    runs: str = "runs",
    lang: str = "en",
    gallery: bool = True,
    data: str | None = None,
    search: Path | None = None,
) -> Path:
    """Writes assignment.html and assignment.md about a tested run, a comparison or a study to ``out``.

    ``gallery`` shows mistakes as images, read from ``data`` or from where the run found them; ``search`` is the folder
    of a search whose result is told as well. Returns the page. Raises Refused when the target is none of these or not
    finished, ``search`` is no search, or the images are not there.
    """
    page = Page(out, lang, "assignment")
    page.remark = font_remark(lang)
    page.blanks = [page.words[f"lab_{blank}"] for blank in ("name", "number", "date")]
    sides = _sides(target, runs)
    root = mistakes.image_root(sides[0].runs, data) if gallery else None
    if len(sides) > 1:
        comparisons = compare.all_pairs(sides)
        starts = {group.runs[0].config.model.pretrain for group in sides}
        page.title = page.words["lab_title_compare" if len(starts) == 2 else "lab_title_other"]
        page.headline = comparison_headline(page, comparisons[0], sides)
        text = page.say("lab_task_compare", arms=page.words["comma"].join(group.name for group in sides))
        text += page.words["gap"] + page.words["lab_task_starts"] if len(starts) == len(sides) == 2 else ""
    else:
        comparisons = []
        page.title = page.words["lab_title"]
        page.headline = run_headline(page, sides[0].runs[0])
        text = page.words["lab_task_run"]
    page.add("words", "lab_task", text=text)
    add_setup(page, sides, key="lab_data")
    add_settings(page, sides, key="lab_method")
    add_losses(page, sides, key="lab_training")
    _results(page, sides, comparisons)
    if search is not None:
        add_search(page, search, "lab_search")
    _classes(page, sides, comparisons, root)
    _conclusion(page, search)
    add_facts(page, [run for group in sides for run in group.runs])
    titled = [section for section in page.sections if section["title"]]
    for number, section in enumerate(titled, 1):
        section["title"] = f"{number}. {section['title']}"
    return page.write()


def _sides(target: str, runs: str) -> list[Group]:
    """The groups of a comparison or a study, or one group with the run that ``target`` names."""
    if folder := folder_of_study(target, runs):
        return study_groups(folder)
    if (Path(target) / "comparison.json").is_file():
        return groups.shortened(compare.read_groups(Path(target)))
    run = groups.read_tested(open_run(target, runs))
    return [Group(name=run.config.exp, runs=(run,))]


def _results(page: Page, sides: Sequence[Group], comparisons: Sequence[Comparison]) -> None:
    """Accuracy and cost; of several arms also their curves, and whether chance explains the difference."""
    if not comparisons:
        add_result(page, sides[0], "lab_results")
        return
    arms = arms_of(comparisons, sides)
    add_arms(page, arms, sides, key="lab_results")
    tests = page.words["stop"].join(f"{arm.name} {arm.top1:.1f}%" for arm in arms)
    draw = partial(draw_groups, comparisons, sides, lang=page.lang)
    page.picture("lab_curves", draw, page.say("tested_alt", tests=tests))
    pair = comparisons[0].mcnemar[0]
    test = page.say("lab_mcnemar", a=pair.a, b=pair.b, only_a=pair.only_a, only_b=pair.only_b, p=p_text(pair.p))
    page.add("words", "lab_tests", text=test)


def _classes(page: Page, sides: Sequence[Group], comparisons: Sequence[Comparison], root: Path | None) -> None:
    """Which classes differ most, which are confused, and the mistakes that the first run is most sure of."""
    run, comma = sides[0].runs[0], page.words["comma"]
    if comparisons:
        rows = comparisons[0].classes
        best, worst = (
            comma.join(f"{row.name} ({round(row.gain):+d})" for row in part) for part in (rows[:4], rows[:-5:-1])
        )
        sentences = [page.say("lab_best", best=best, worst=worst)]
    else:
        shares = sorted(run.by_class().items(), key=lambda one: one[1])[:5]
        sentences = [page.say("lab_low", worst=comma.join(f"{name} ({share:.0f}%)" for name, share in shares))]
    for group in sides:
        if pairs := confused_pairs(group.runs[0].answers)[:CONFUSED]:
            text = comma.join(f"{label} → {prediction} ({count})" for label, prediction, count in pairs)
            sentences.append(page.say("lab_mistakes", arm=group.name, pairs=text))
    page.add("words", "lab_classes", text=page.join(sentences))
    if len(run.manifest.classes) <= MATRIX:
        _matrix(page, run, sides[0].name)
    if root and (chosen := mistakes.examples(run.answers, False, root)[:SHOWN]):
        page.add("gallery", "lab_gallery", arm=sides[0].name, examples=chosen)


def _conclusion(page: Page, search: Path | None) -> None:
    """What was found, in sentences, and room for the student's own words."""
    found = [page.headline]
    if search is not None:
        trials = read_trials(search)
        found += winner_words(trials, page.words)[:1]
        found += search_story(trials, analyse_variance(trials), None, {}, page.words)[:1]
    page.add("words", "lab_conclusion", text=page.join(found), room=True)


def _matrix(page: Page, run: Tested, name: str) -> None:
    """The confusion matrix of the run of this name."""
    matrix = mistakes.confusion_of(run.answers)
    draw = partial(figures.draw_confusion, matrix.names, matrix.counts, matrix.blocks, lang=page.lang)
    page.picture("lab_confusion", draw, page.words["confusion"], whole=True, arm=name)
