"""The page of step 5, driven in a headless browser as a person would, with the keyboard too."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from large_run import add_all_kinds_of_rows, write_run

from finetuning.report.__main__ import ScoreArguments, main
from finetuning.results import read_rows

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
MODELS = ["base", *(f"checkpoint-{100 * i}" for i in range(1, 6))]
ATTACKS = [
    "<script>window.attacked = 1</script>",
    "<img src=x onerror='window.attacked = 2'>",
    "</script><script>window.attacked = 3</script>",
    "<svg/onload=window.attacked=4>",
    "\"><iframe srcdoc='<script>parent.attacked=5</script>'>",
    "<!--<script>",
    "{{ 7 * 7 }} {% raw %} ${window.attacked = 6}",
    "<a href='javascript:window.attacked=7' autofocus onfocus='window.attacked=7'>x</a>",
    "<link rel=stylesheet href=http://127.0.0.1:9/x.css><img src=http://127.0.0.1:9/x.png>",
    "\u2028\u2029\\u003cscript>window.attacked=8</script>",
]


def score(run_dir) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "finetuning.report", "--output_dir", run_dir],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def large_run(tmp_path_factory):
    run_dir = write_run(tmp_path_factory.mktemp("large") / "run", 1000, MODELS)
    score(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """Opens a page, and fails if it asks for anything else than itself or if its script fails."""
    contexts = []

    def open_one(run_dir, query="?lang=en", color_scheme="light", width=1400):
        context = browser.new_context(color_scheme=color_scheme, viewport={"width": width, "height": 900})
        page = context.new_page()
        page.requests, page.faults = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("dialog", lambda dialog: page.faults.append(dialog.message))
        contexts.append((context, page))
        page.goto(f"file://{run_dir}/report.html{query}")
        return page

    yield open_one
    for context, page in contexts:
        outside = [url for url in page.requests if not url.startswith(("file://", "data:image/"))]
        assert outside == [] and page.faults == []
        context.close()


def shown(page) -> list[str]:
    return page.eval_on_selector_all("article", "cards => cards.map(card => card.id.slice(2))")


def count(page) -> str:
    page.wait_for_timeout(200)  # of the search, which waits for the next key
    return page.inner_text("#count")


@needs_browser
def test_the_table_of_models_sorts(large_run, open_page):
    page = open_page(large_run)
    column = page.eval_on_selector_all("#models-table th", "heads => heads.findIndex(h => h.textContent === 'ROUGE-1')")

    def values():
        return page.eval_on_selector_all(
            "#models-table tbody tr", f"rows => rows.map(row => Number(row.cells[{column}].dataset.value))"
        )

    page.click("#scores summary")
    page.click("#models-table th button:text-is('ROUGE-1')")
    assert values() == sorted(values(), reverse=True) and len(values()) == 6
    assert page.get_attribute(f"#models-table th:nth-child({column + 1})", "aria-sort") == "descending"
    page.focus("#models-table th button:text-is('ROUGE-1')")
    page.keyboard.press("Enter")
    assert values() == sorted(values())


@needs_browser
def test_samples_are_built_as_they_are_scrolled_to(large_run, open_page):
    page = open_page(large_run)
    few = len(shown(page))
    assert few < 60 and count(page) == "1000 of 1000 samples"
    page.evaluate("document.getElementById('end').scrollIntoView()")
    page.wait_for_selector(f"article:nth-of-type({few + 1})")
    assert page.locator("article").first.locator(".answer").count() == 7  # the reference and six models


@needs_browser
def test_search_and_filters_agree_with_the_rows(large_run, open_page):
    page = open_page(large_run)
    rows = {
        name: [json.loads(line) for line in (large_run / "predictions" / f"{name}.jsonl").open()] for name in MODELS
    }
    judged = {
        name: [json.loads(line) for line in (large_run / "qa_evaluation_results" / f"{name}.jsonl").open()]
        for name in MODELS
    }
    page.select_option("#filter", "unstopped")
    expected = {row["id"] for name in MODELS for row in rows[name] if row["finish_reason"] == "length"}
    assert count(page) == f"{len(expected)} of 1000 samples" and set(shown(page)) <= expected
    page.select_option("#of-model", "2")
    expected = {row["id"] for row in rows["checkpoint-200"] if row["finish_reason"] == "length"}
    assert count(page) == f"{len(expected)} of 1000 samples"
    page.select_option("#of-model", "")
    page.select_option("#filter", "failed")
    expected = {row["id"] for name in MODELS for row in judged[name] if row["status"] != "ok"}
    assert count(page) == f"{len(expected)} of 1000 samples"
    page.select_option("#filter", "regression")
    overall = {
        name: [
            sum(c["score"] for c in row["evaluation"].values()) / 6 if row["evaluation"] else None
            for row in judged[name]
        ]
        for name in MODELS
    }
    worse = {
        i
        for before, after in zip(MODELS, MODELS[1:], strict=False)
        for i, (a, b) in enumerate(zip(overall[before], overall[after], strict=True))
        if a is not None and b is not None and round(a, 2) - round(b, 2) >= 1
    }
    assert count(page) == f"{len(worse)} of 1000 samples"
    page.select_option("#filter", "")
    page.fill("#search", "00000000002a")
    assert count(page) == "1 of 1000 samples" and shown(page) == ["00000000002a"]
    page.fill("#search", "회의 는")
    assert 0 < int(count(page).split()[0]) < 1000
    page.keyboard.press("Escape")
    assert count(page) == "1000 of 1000 samples" and page.input_value("#search") == ""
    page.select_option("#order", "disagreement")
    first = shown(page)[0]
    spread = [
        max(s for s in scores if s is not None) - min(s for s in scores if s is not None)
        for scores in zip(*overall.values(), strict=True)
    ]
    assert spread[int(first, 16)] == pytest.approx(max(spread), abs=0.02)


@needs_browser
def test_a_link_leads_to_its_sample(large_run, open_page):
    page = open_page(large_run, "?lang=en#s=00000000019f")
    assert shown(page)[0] == "00000000019f"
    assert page.evaluate("document.activeElement.id") == "s-00000000019f"
    assert page.locator("article.linked").bounding_box()["y"] < 400
    page.click("#from-start")
    assert shown(page)[0] == "000000000000"
    page.fill("#search", "nothing has this")
    page.evaluate("location.hash = '#s=000000000003'")
    page.wait_for_selector("article.linked")
    assert shown(page)[0] == "000000000003" and page.input_value("#search") == ""
    page.evaluate("location.hash = '#s=nowhere'")
    assert count(page) == "there is no sample nowhere"


@needs_browser
def test_the_keyboard_is_enough(large_run, open_page):
    page = open_page(large_run)
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.id") == "s-" + shown(page)[1]
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.id") == "s-" + shown(page)[0]
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("jd")  # is text here
    assert page.input_value("#search") == "jd" and page.locator("ins").count() == 0
    page.keyboard.press("Escape")
    page.keyboard.press("d")
    assert page.locator("ins").count() > 0 and page.get_attribute("#differences", "aria-pressed") == "true"
    page.keyboard.press("d")
    assert page.locator("ins").count() == 0


@needs_browser
def test_differences_to_the_reference_are_word_by_word(large_run, open_page):
    page = open_page(large_run)
    nodes = page.evaluate(
        "differenceNodes('#Person1# asks a question, today.', '#Person1# asks two questions today')"
        ".map(n => [n.nodeName || '', n.textContent || n])"
    )
    kept = [text.strip() for name, text in nodes if name == "#text"]
    assert [name for name, _ in nodes if name in ("INS", "DEL")].count("INS") == 2
    assert {text for name, text in nodes if name == "DEL"} == {"a", "question,"}
    assert [word for word in kept if word] == ["#Person1#", "asks", "today"]


@needs_browser
def test_the_page_speaks_korean_and_is_dark_where_asked(large_run, open_page):
    page = open_page(large_run, "?lang=ko", "dark")
    assert page.inner_text("#samples") == "샘플 나란히 보기" and "개 샘플" in count(page)
    assert page.inner_text("h1:visible").startswith("checkpoint-500 사용")
    page.click("#details summary")
    assert "순위는 심사 모델의 종합 점수 기준입니다" in page.inner_text("#details")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(20, 23, 26)"
    page.click("#theme")
    assert page.evaluate(background) == "rgb(246, 247, 249)"
    page.click("#language")
    assert page.inner_text("h1:visible").startswith("Use checkpoint-500")
    assert "Ranked by the judge's overall score" in page.inner_text("#details")


@needs_browser
def test_nothing_that_a_model_or_dataset_wrote_runs(tmp_path, open_page):
    run_dir = write_run(tmp_path / "<b>run", 30, ["base", "checkpoint-1"], ATTACKS)
    score(run_dir)
    page = open_page(str(run_dir).replace("<", "%3C").replace(">", "%3E"))
    page.keyboard.press("d")
    for details in page.locator("details").all()[:12]:
        details.evaluate("node => { node.open = true }")
    page.evaluate("document.getElementById('end').scrollIntoView()")
    page.wait_for_timeout(300)
    assert page.evaluate("window.attacked") is None
    assert page.locator("article iframe, article img, article svg, article script, article a:not(.small)").count() == 0
    text = page.inner_text("#list")
    assert "<script>window.attacked = 1</script>" in text and "{{ 7 * 7 }}" in text


MISSING = {  # of one prediction or evaluation, by the column that has no text then
    "prediction": {"prediction": None, "finish_reason": "error", "error": "too long", "num_new_tokens": 0},
    "prediction and reason": {"prediction": None, "finish_reason": "error", "error": None, "num_new_tokens": 0},
    "references": {"references": []},
    "evaluation": {"status": "refusal", "evaluation": None, "error": None},
}


@needs_browser
@pytest.mark.parametrize("column", MISSING)
def test_the_page_works_where_a_text_is_missing(tmp_path, open_page, column):
    run_dir = write_run(tmp_path / "run", 6, ["base", "checkpoint-1"])
    folder = "qa_evaluation_results" if column == "evaluation" else "predictions"
    path = run_dir / folder / "checkpoint-1.jsonl"
    # the references of a sample are the same for all models
    for file in (path, path.with_stem("base")) if column == "references" else (path,):
        rows = read_rows(file)
        rows[2] |= MISSING[column]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = json.loads(path.with_suffix(".json").read_text())
    if rows[2].get("finish_reason") == "error":
        for values in info["metrics"]["per_sample"].values():
            values.pop(2)
        path.with_suffix(".json").write_text(json.dumps(info))
    main(ScoreArguments(output_dir=[str(run_dir)]))
    page = open_page(run_dir)
    assert len(shown(page)) == 6 and count(page) == "6 of 6 samples"
    page.fill("#search", "000000000002")
    assert count(page) == "1 of 6 samples"
    page.click("#language")
    assert page.inner_text("#samples") == "샘플 나란히 보기"
    json.loads((run_dir / "scores" / "verdict.json").read_text(), parse_constant=pytest.fail)


# --- All that a page may have to show, of thirty models -----------------------------------------------------------------

THIRTY = ["base", *(f"checkpoint-{100 * i}" for i in range(1, 30))]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    run_dir = write_run(tmp_path_factory.mktemp("full") / "run", 40, THIRTY)
    add_all_kinds_of_rows(run_dir, THIRTY)
    main(ScoreArguments(output_dir=[str(run_dir)]))
    return run_dir


@needs_browser
def test_the_first_line_of_the_page_says_which_model_to_use(full_run, open_page):
    page = open_page(full_run)
    verdict = json.loads((full_run / "scores" / "verdict.json").read_text())
    assert page.inner_text("body").split("\n")[0] == verdict["headline"][0]
    assert f"Use {verdict['use']}" in verdict["headline"][0]
    assert page.locator("#verdict p:visible").first.inner_text() == verdict["headline"][1]
    assert page.locator("details.fold[open]").count() == 0 and page.locator(".plots.first img:visible").count() == 2
    page.click("#language")
    assert page.inner_text("body").split("\n")[0] == verdict["headline_ko"][0]


@needs_browser
@pytest.mark.parametrize("width, color_scheme", [(390, "light"), (390, "dark"), (1400, "dark")])
def test_the_page_of_thirty_models_fits_the_screen(full_run, open_page, width, color_scheme):
    page = open_page(full_run, "?lang=ko", color_scheme, width)
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = (
        "[...document.querySelectorAll('main *')].filter(node => !node.closest('.scroll') && "
        "node.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert page.evaluate(outside) == 0
    assert page.evaluate("getComputedStyle(document.querySelector('.plots img')).filter !== 'none'") == (
        color_scheme == "dark"
    )
    page.click("#samples")
    assert page.locator("article").first.locator(".answer").count() == 31


@needs_browser
def test_long_and_odd_names_of_models_fit_the_screen(tmp_path, open_page):
    models = ["base", "$\\frac$", "x" * 200]
    run_dir = write_run(tmp_path / "run", 6, models)
    add_all_kinds_of_rows(run_dir, models)
    main(ScoreArguments(output_dir=[str(run_dir)]))
    page = open_page(run_dir, width=390)
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390 and len(shown(page)) == 6


@needs_browser
def test_judges_and_people_are_on_the_page_and_in_its_samples(full_run, open_page):
    page = open_page(full_run, "?lang=en#judges-and-people")
    said = page.inner_text("#judges-and-people")
    assert "Side by side, strict prefers checkpoint-2800 to checkpoint-2900" in said
    assert (
        "The scores are the means of a jury: kind, strict." in said
        and "Scores that people gave to the answers of checkpoint-2800, checkpoint-2900: 24." in said
    )
    assert page.locator("#pairs-table tbody tr").count() == 1 and page.locator("#jury-table tbody tr").count() == 60
    assert page.locator("#people-table tbody tr").count() == 3
    page.click("#jury-table th button:text-is('mean')")
    means = page.eval_on_selector_all(
        "#jury-table tbody tr", "rows => rows.map(row => Number(row.cells[3].dataset.value))"
    )
    assert means == sorted(means, reverse=True)
    page.fill("#search", "the prompt is too long")
    assert count(page) == "1 of 40 samples" and shown(page) == ["000000000000"]
    page.fill("#search", "000000000004")
    assert count(page) == "1 of 40 samples"
    text = page.inner_text("article")
    assert "side by side: checkpoint-2800 is preferred to checkpoint-2900" in text and "people: overall" in text
    page.fill("#search", "")
    page.select_option("#filter", "failed")
    assert "000000000001" in (count(page) and shown(page))
    page.select_option("#filter", "missing")
    assert count(page) == "1 of 40 samples" and shown(page) == ["000000000000"]
    page.select_option("#filter", "against")
    scores = {
        name: {row["id"]: row["evaluation"] for row in read_rows(full_run / "qa_evaluation_results" / f"{name}.jsonl")}
        for name in THIRTY[-2:]
    }
    overall = {
        name: {i: sum(c["score"] for c in judged.values()) for i, judged in its.items() if judged}
        for name, its in scores.items()
    }
    pairs = read_rows(full_run / "qa_evaluation_results" / "pairs" / "checkpoint-2800--checkpoint-2900.jsonl")
    second = {row["id"] for row in pairs if row["order"] == "BA" and row["evaluation"]["better"] == "second"}
    expected = {i for i in second if overall["checkpoint-2800"][i] < overall["checkpoint-2900"][i]}
    assert set(shown(page)) <= expected and count(page) == f"{len(expected)} of 40 samples"


@needs_browser
def test_models_are_chosen_with_the_keyboard(full_run, open_page):
    page = open_page(full_run)
    page.focus(".picker summary")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "no-models"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("Enter")
    assert page.locator("article").first.locator(".answer").count() == 1  # the reference
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    answers = page.locator("article").first.locator(".answer h4 span:first-child, .answer.reference h4")
    assert answers.all_inner_texts() == ["reference", "base"]


def test_the_page_is_one_file_of_bearable_size(large_run):
    page = (large_run / "report.html").read_bytes()
    assert len(page) < 15e6
    assert b"http://" not in page.replace(b"http://www.w3.org", b"") and b"https://" not in page
