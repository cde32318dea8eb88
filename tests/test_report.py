"""What people look at: the page of an evaluation, the comparison of several, and other engines' predictions.

The pages are opened in headless Chromium, as people open them: from the disk.
"""

import csv
import io
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import run_short_form_eval as evaluation
from tests.stages import evaluate, read_metrics, read_page, read_predictions, write_dataset

ATTACK = "<script>document.title='changed'</script><img src=x onerror=\"document.title='changed'\">&amp;</script><!--"
PHONE = {"width": 390, "height": 844}


# ---- predictions of other engines ------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A file of predictions, in the form that its name asks for."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def score(predictions: Path, output: Path, *flags) -> dict:
    """Score another engine's predictions; gives the metrics."""
    given = ["--predictions", predictions, "--output_dir", output, "--dataset_split_name", "train", *flags]
    assert evaluation.main(list(map(str, given))) == 0
    return read_metrics(output)


@pytest.fixture(scope="module")
def evaluated(tiny_teacher, loaded, tmp_path_factory) -> Path:
    """The tiny teacher's results on the loaded clips."""
    return evaluate(tiny_teacher, loaded, tmp_path_factory.mktemp("evaluated"), "--dataset_config_name", "tiny")


@pytest.fixture
def dataset_flags(loaded) -> list[str]:
    columns = ["--text_column_name", "transcription", "--id_column_name", "name"]
    return ["--dataset_name", str(loaded), "--dataset_config_name", "tiny", *columns]


@pytest.mark.parametrize("name", ["engine.csv", "engine.tsv", "engine.jsonl"])
@pytest.mark.parametrize("column", ["hypothesis", "prediction", "text"])
def test_predictions_of_another_engine_are_scored_by_id_as_those_of_a_model(
    evaluated, dataset_flags, tmp_path, name, column
):
    rows = [{"id": row["id"], column: row["hypothesis"]} for row in read_predictions(evaluated)]
    random.Random(0).shuffle(rows)
    metrics = score(write_rows(tmp_path / name, rows), tmp_path / "out", *dataset_flags)
    ours = read_metrics(evaluated)
    same = ("scores", "details", "by_length", "confusions", "clips", "audio_seconds", "runaways", "silence")
    assert {name: metrics[name] for name in same} == {name: ours[name] for name in same}
    assert metrics["model"] == "engine"
    assert metrics["rtfx"] is None
    assert read_predictions(tmp_path / "out") == read_predictions(evaluated)
    heard = {clip["id"]: clip["audio"] for clip in read_page(tmp_path / "out" / "report.train.html")["clips"]}
    assert any(heard.values())
    assert heard == {clip["id"]: clip["audio"] for clip in read_page(evaluated / "report.train.html")["clips"]}


def test_a_table_with_excels_byte_order_mark_is_scored_by_its_ids(evaluated, dataset_flags, tmp_path):
    rows = [{"id": row["id"], "hypothesis": row["hypothesis"]} for row in read_predictions(evaluated)]
    table = write_rows(tmp_path / "engine.csv", rows[::-1])
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    metrics = score(table, tmp_path / "out", *dataset_flags)
    assert metrics["details"] == read_metrics(evaluated)["details"]


def test_predictions_without_ids_are_taken_in_their_order(evaluated, dataset_flags, tmp_path):
    rows = [{"text": row["hypothesis"]} for row in read_predictions(evaluated)]
    metrics = score(write_rows(tmp_path / "engine.csv", rows), tmp_path / "out", *dataset_flags)
    assert metrics["details"] == read_metrics(evaluated)["details"]
    with pytest.raises(SystemExit, match=r"--predictions has 23 rows for 24 clips: give it a column id, or all rows"):
        score(write_rows(tmp_path / "few.csv", rows[1:]), tmp_path / "few", *dataset_flags)


def test_rows_and_clips_that_do_not_match_are_named_and_not_scored(evaluated, dataset_flags, tmp_path, caplog):
    rows = [{"id": row["id"], "text": row["hypothesis"]} for row in read_predictions(evaluated)]
    names = [row["id"] for row in rows]
    rows[0]["id"] = "somebody else's"
    del rows[5]
    metrics = score(write_rows(tmp_path / "engine.csv", rows), tmp_path / "out", *dataset_flags)
    assert metrics["unusable"] == {"no prediction": [names[0], names[5]]}
    assert metrics["clips"] == 22
    messages = [record.getMessage() for record in caplog.records]
    assert "rows of --predictions that no clip has the id of: 1 (somebody else's)" in messages
    assert f"clips that --predictions has no row of: 2 ({names[0]}, {names[5]})" in messages
    rows[1]["id"] = rows[2]["id"]
    with pytest.raises(SystemExit, match=rf"--predictions has several rows of 1 \({rows[2]['id']}\)"):
        score(write_rows(tmp_path / "twice.csv", rows), tmp_path / "twice", *dataset_flags)


def test_predictions_may_bring_their_references_and_a_directory_of_ours_is_such_a_file(evaluated, tmp_path):
    metrics = score(evaluated, tmp_path / "out")
    ours = read_metrics(evaluated)
    assert metrics["details"] == ours["details"]
    assert metrics["scores"] == ours["scores"]
    rows = [{"reference": "はい、そうです。", "hypothesis": None}, {"reference": "三時", "hypothesis": "\ud8003時"}]
    metrics = score(write_rows(tmp_path / "own.jsonl", rows), tmp_path / "own", "--model_name_or_path", "acme/engine")
    assert metrics["model"] == "acme/engine"
    assert [row["id"] for row in read_predictions(tmp_path / "own")] == ["0", "1"]
    assert metrics["scores"]["readings"]["deletions"] == 6


def test_a_prediction_that_differs_in_punctuation_alone_is_not_listed_as_incorrect(tmp_path):
    rows = [
        {"reference": "はい、そうです。", "hypothesis": "はいそうです"},
        {"reference": "はい", "hypothesis": "いいえ"},
    ]
    score(write_rows(tmp_path / "engine.csv", rows), tmp_path / "out")
    with open(tmp_path / "out" / "incorrect_predictions.train.csv", encoding="utf-8", newline="") as file:
        assert [row["hypothesis"] for row in csv.DictReader(file)] == ["いいえ"]


def test_predictions_that_bring_their_references_may_say_why_a_clip_could_not_be_used(tmp_path):
    rows = [
        {"reference": "はい", "hypothesis": "はい", "problem": "", "seconds": 1.5},
        {"reference": "いいえ", "hypothesis": "", "problem": "no audio", "seconds": 2},
    ]
    metrics = score(write_rows(tmp_path / "engine.csv", rows), tmp_path / "out")
    assert metrics["unusable"] == {"no audio": ["1"]}
    assert (metrics["clips"], metrics["cer"], metrics["audio_seconds"]) == (1, 0, 3.5)
    assert score(tmp_path / "out", tmp_path / "again")["unusable"] == {"no audio": ["1"]}


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], r"cannot read --predictions .*engine\.jsonl: "),
        ("not json", [], r"cannot read --predictions .*engine\.jsonl: JSON was expected, not 'not json'"),
        ("", [], r"needs rows of named values"),
        ("[1, 2]", [], r"needs rows of named values"),
        ('{"words": "はい"}', [], r"needs a column of texts \(hypothesis, prediction, .*\); it has words"),
        ('{"text": "はい"}', [], r"needs a column `reference`, or --dataset_name; it has text"),
        ('{"text": "は", "reference": "は", "confidence": "?"}', [], r"has a confidence that is no number: '\?'"),
        ('{"text": "は", "reference": "、"}', [], r"nothing to score: every reference is empty"),
    ],
)
def test_a_file_that_cannot_be_scored_is_one_clear_line(tmp_path, content, flags, message):
    path = tmp_path / "engine.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=message) as error:
        score(path, tmp_path / "out", *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--concatenate_audio", "--push_to_hub", "--dry_run"])
def test_flags_that_need_a_model_do_not_go_with_predictions(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluation.main(["--predictions", "engine.csv", flag])
    assert f"{flag} does not go with --predictions" in capsys.readouterr().err


# ---- the browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None and "CI" not in os.environ:
        pytest.skip("no browser on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--mute-audio"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """A function that opens a page; whatever the page asks for outside of itself, or complains of, is an error."""
    opened = []

    def open_page(path: Path, **options) -> Page:
        page = browser.new_context(**options).new_page()
        complaints = []
        page.on("request", lambda request: complaints.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        opened.append((page, path, complaints))
        return page

    yield open_page
    for page, path, complaints in opened:
        page.context.close()
        assert [text for text in complaints if text != path.as_uri() and not text.startswith("data:audio/")] == []


def figures(page: Page, column: int) -> list[float]:
    """The figures of a column of the clips that are shown."""
    cells = page.locator(f"#rows .clip td:nth-child({column + 2})").all_inner_texts()
    return [float(text) for text in cells if text != "–"]


def shown(page: Page) -> list[str]:
    return page.locator("#rows .open").all_inner_texts()


def words_of(row: dict, kind: str) -> str:
    """Every text of a clip of the page's data, or of an opened row."""
    return "".join(piece if isinstance(piece, str) else piece[kind == "hypothesis"] for piece in row)


# ---- the page of an evaluation ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tiny_teacher, clips, tmp_path_factory) -> Path:
    """The page of clips whose names and texts contain HTML."""
    root = tmp_path_factory.mktemp("hostile")
    rows = [{"name": c["name"], "audio": c["audio"], "transcription": c["transcription"]} for c in clips[:6]]
    rows[0]["transcription"] = f"はい{ATTACK}</ol>"
    rows[1]["name"] = f'"><b>{ATTACK}'
    output = root / f"{ATTACK.replace('/', '')}"
    data = write_dataset(root / "data", rows)
    return evaluate(tiny_teacher, data, output, "--scorer", "reazon") / "report.train.html"


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """The page of 5,000 clips, scored without audio."""
    directory = tmp_path_factory.mktemp("many")
    draw = random.Random(0)
    rows = []
    for number in range(5_000):
        reference = "".join(draw.choices("今日は晴れです明日雨", k=draw.randint(1, 40)))
        hypothesis = "".join(letter for letter in reference if draw.random() < 0.98)
        confidence = round(draw.random(), 3)
        rows.append({"id": f"clip{number}", "reference": reference, "hypothesis": hypothesis, "confidence": confidence})
    rows[7]["hypothesis"] = "繰り返し" * 40
    rows[8] |= {"reference": "", "hypothesis": "ご視聴ありがとうございました"}
    score(write_rows(directory / "engine.jsonl", rows), directory, "--language", "zh")
    return directory / "report.train.html"


def test_hostile_texts_and_names_are_shown_as_texts(visit, hostile):
    page = visit(hostile)
    for button in page.locator(".open").all():
        button.click()
    assert "changed" not in page.title()
    assert page.locator("img, b, iframe, link, object").count() == 0
    assert page.locator("script").count() == 2
    assert ATTACK in page.locator("#clips").inner_text()


def test_only_the_page_s_own_script_may_run(visit, hostile):
    page = visit(hostile)
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    copy = hostile.parent / "copy.html"
    text = hostile.read_text(encoding="utf-8")
    copy.write_text(text.replace("</main>", "</main><script>document.title='changed'</script>"), encoding="utf-8")
    context = page.context.browser.new_context()
    other = context.new_page()
    other.goto(copy.as_uri())
    assert "changed" not in other.title()
    context.close()


def test_the_page_begins_with_what_one_wants_to_know_and_names_no_path(visit, hostile):
    page = visit(hostile)
    text = page.locator("main").inner_text()
    metrics = read_metrics(hostile.parent)
    for summary in (*metrics["scores"].values(), *metrics["details"].values()):
        assert f"{summary['rate']:.2f} %" in text
        assert f"{summary['low']:.2f} to {summary['high']:.2f} %" in text
    for group in metrics["by_length"]:
        if group["clips"]:
            assert f"{group['cer']['rate']:.2f} %" in text
    assert page.locator(".rate").inner_text() == f"{metrics['scores']['reazon']['rate']:.2f} %"
    assert f"{metrics['rtfx']} seconds of audio per second" in text
    assert "Sentence error rate (reazon)" in text
    assert "WER of the raw texts" in text  # spaces count there
    assert "WER (reazon)" not in text
    assert "tiny-whisper-v3 on data, train" in text
    assert str(hostile.parent.parent) not in hostile.read_text(encoding="utf-8")


def test_the_table_sorts_by_every_column(visit, many):
    page = visit(many)
    heads = page.locator("#clips th button")
    assert [text.removesuffix(" ▼") for text in heads.all_inner_texts()] == [
        "Clip", "CER (kotoba) %", "characters", "seconds", "confidence"
    ]  # fmt: skip
    assert figures(page, 0) == sorted(figures(page, 0), reverse=True)
    assert "clip8" not in shown(page)  # it has no rate, and comes last
    assert page.locator("#clips th").nth(1).get_attribute("aria-sort") == "descending"
    for column in (1, 3):
        heads.nth(column + 1).click()
        assert figures(page, column) == sorted(figures(page, column), reverse=True)
        heads.nth(column + 1).click()
        assert figures(page, column) == sorted(figures(page, column))
        assert page.locator("#clips th").nth(column + 1).get_attribute("aria-sort") == "ascending"
    heads.nth(0).click()
    assert shown(page)[:3] == ["clip0", "clip1", "clip2"]


def test_the_table_of_five_thousand_clips_filters_and_pages(visit, many):
    page = visit(many)
    rows = [row for row in read_page(many)["clips"]]
    count = page.locator("#count")
    assert count.inner_text() == "1 to 50 of 5000 clips"
    page.get_by_role("button", name="Next").click()
    assert count.inner_text() == "51 to 100 of 5000 clips"
    page.get_by_role("button", name="Previous").click()
    assert page.get_by_role("button", name="Previous").is_disabled()
    page.get_by_role("button", name="Next").click()
    page.get_by_label("Show").select_option("only wrong")
    wrong = sum("wrong" in row["kinds"] for row in rows)
    assert count.inner_text() == f"1 to 50 of {wrong} clips"
    page.get_by_label("Characters").select_option("32 to 63")
    long = sum("wrong" in row["kinds"] and 32 <= row["length"] <= 63 for row in rows)
    assert 0 < long < wrong
    assert count.inner_text() == f"1 to 50 of {long} clips"
    page.get_by_label("Characters").select_option("any length")
    page.get_by_label("Show").select_option("runaways")
    assert shown(page) == ["clip7"]
    page.get_by_label("Show").select_option("without a reference")
    assert shown(page) == ["clip8"]
    page.get_by_label("Show").select_option("all clips")
    page.get_by_label("Search").fill("ご視聴")  # only in a prediction
    assert shown(page) == ["clip8"]
    page.get_by_label("Search").fill("CLIP4999")
    assert shown(page) == ["clip4999"]
    page.get_by_label("Search").fill("nowhere")
    assert count.inner_text() == "no such clip"
    page.locator(".example").first.click()
    assert page.locator(".example").first.inner_text() in shown(page)


def test_a_row_opens_to_both_texts_in_two_lines_with_their_differences_marked(visit, hostile):
    page = visit(hostile)
    rows = {row["id"]: row for row in read_predictions(hostile.parent)}
    for button in page.locator(".open").all():
        button.focus()
        page.keyboard.press("Enter")
        assert button.get_attribute("aria-expanded") == "true"
        row = rows[button.inner_text()]
        for box, prefix in zip(page.locator(".aligned").all(), ("normalised_", ""), strict=True):
            lines = [box.locator(f".pair > :nth-child({line})").all_text_contents() for line in (1, 2)]
            texts = ["".join(line).replace("∅", "").replace("\xa0", " ") for line in lines]
            assert texts == [row[f"{prefix}reference"], row[f"{prefix}hypothesis"]]
        said = page.locator(".details .hidden").last.text_content()
        assert said.startswith(f"Reference: {row['reference']}. Prediction: {row['hypothesis']}.")
        lost, got = page.locator(".aligned del").first, page.locator(".aligned ins").first
        assert lost.evaluate("mark => getComputedStyle(mark).textDecorationStyle") == "dashed"
        assert int(got.evaluate("mark => getComputedStyle(mark).fontWeight")) >= 600
        tops = [mark.bounding_box()["y"] for mark in (lost, got)]
        assert tops[0] < tops[1]
        page.keyboard.press("Enter")
        assert page.locator(".aligned").count() == 0


def test_the_browser_plays_every_clip(visit, hostile, clips):
    page = visit(hostile)
    for button in page.locator(".open").all():
        button.click()
    lengths = [soundfile.info(io.BytesIO(clip["audio"])).duration for clip in clips[:6]]
    players = page.locator("audio").all()
    played = []
    for player in players:
        player.evaluate("audio => audio.play()")
        played.append(player.evaluate("audio => audio.duration"))
    assert sorted(played) == pytest.approx(sorted(lengths), abs=0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_follows_its_theme(visit, hostile, many, scheme):
    for path in (hostile, many):
        page = visit(path, viewport=PHONE, color_scheme=scheme)
        for button in page.locator(".open").all()[:3]:
            button.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.locator("#clips th button", has_text="characters").is_visible()
        bar = page.locator("svg.bar").first.bounding_box()
        assert bar["width"] > 60
        pixels = Image.open(io.BytesIO(page.screenshot())).convert("L")
        assert (pixels.getpixel((1, 1)) < 60) == (scheme == "dark")


def test_tables_have_captions_and_every_control_a_label(visit, hostile):
    page = visit(hostile)
    assert page.locator("table").count() == page.locator("table > caption").count() == 4
    assert page.locator("th:not([scope])").count() == 0
    for control in page.locator("input, select").all():
        assert control.evaluate("control => control.labels.length") == 1
    page.get_by_label("Search").focus()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "open":
            break
    assert page.evaluate("document.activeElement.className") == "open"


def test_one_huge_rate_does_not_crush_the_other_bars():
    summaries = [{"rate": rate, "low": rate, "high": rate} for rate in (8.0, 9.0, 10.0, 987.0)]
    assert evaluation.bar_scale(summaries) == 36
    assert evaluation.bar_scale(summaries[:2]) == 9
    assert evaluation.bar_scale([{"rate": None, "low": None, "high": None}]) == 1


# ---- comparison ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "warned"), [(["--language", "en"], 1), (["--task", "translate"], 1), (["--language", "fr"], 0)]
)
def test_english_of_another_engine_is_scored_with_a_warning_that_spellings_count(tmp_path, caplog, flags, warned):
    rows = [{"id": "clip", "reference": "The colour.", "text": "the color"}]
    metrics = score(write_rows(tmp_path / "engine.csv", rows), tmp_path / "out", *flags)
    warning = "without a tokenizer, British and American spellings count as different words"
    assert caplog.text.count(warning) == warned
    assert metrics["wer"] == 50


@pytest.mark.parametrize(
    ("task", "language", "word"), [("transcribe", "ja", "Sentence error rate"), ("translate", "en", "WER")]
)
def test_the_page_of_translations_is_of_texts_in_english(tmp_path, task, language, word):
    rows = [{"id": "clip", "reference": "The cat sat.", "text": "The cat ran."}]
    metrics = score(write_rows(tmp_path / "engine.csv", rows), tmp_path, "--language", "ja", "--task", task)
    page = (tmp_path / "report.train.html").read_text(encoding="utf-8")
    assert (metrics["language"], metrics["task"]) == ("ja", task)
    assert f'<td class="text" lang="{language}"><del>' in page and f'"language":"{language}"' in page
    assert f"{word} (" in page


@pytest.fixture(scope="module")
def compared(evaluated, tiny_teacher_v2, loaded, tmp_path_factory) -> list[Path]:
    """Results of two models on the same clips, of another engine, and of the second model on fewer clips."""
    root = tmp_path_factory.mktemp("compared")
    second = evaluate(tiny_teacher_v2, loaded, root / "second", "--dataset_config_name", "tiny")
    few = evaluate(tiny_teacher_v2, loaded, root / "few", "--dataset_config_name", "tiny", "--max_samples_per_split", 5)
    rows = [{"id": row["id"], "text": row["reference"]} for row in read_predictions(evaluated)]
    rows[3]["text"] = ATTACK
    flags = ["--dataset_name", loaded, "--dataset_config_name", "tiny", "--text_column_name", "transcription"]
    score(write_rows(root / "engine.csv", rows), root / "engine", *flags, "--id_column_name", "name")
    return [evaluated, second, root / "engine", few]


def test_evaluations_are_compared_in_a_table_and_as_json(compared, tmp_path, capsys):
    assert evaluation.main(["--compare", *map(str, compared), "--output_dir", str(tmp_path)]) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [
        *("Model", "Parameters", "Dataset", "Clips", "CER (kotoba) %", "CER (reazon) %", "CER (whisper) %"),
        *("CER (readings) %", "WER (words) %", "Against the first", "RTFx", "Seconds"),
    ]
    assert len(lines) == 6
    metrics = [read_metrics(path) for path in compared]
    assert [line[0] for line in lines[2:]] == [
        "tiny-whisper-v3", "tiny-whisper-v2", "engine", "tiny-whisper-v2 (few)"
    ]  # fmt: skip
    assert lines[2][4].startswith(f"{metrics[0]['cer']:.2f} (")
    assert lines[2][9] == ""
    assert lines[3][9].startswith(f"{metrics[1]['cer'] - metrics[0]['cer']:+.2f} (")
    assert lines[4][1] == lines[4][10] == ""
    assert lines[5][3] == "5"
    assert lines[5][9] == "other clips"
    written = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["evaluations"]
    assert [entry["against_first"] is None for entry in written] == [True, False, False, True]
    for name, test in written[1]["against_first"].items():
        rates = [entry["scores"][name]["rate"] for entry in written[:2]]
        assert test["difference"] == pytest.approx(rates[1] - rates[0])
        assert test["low"] <= test["difference"] <= test["high"]
    assert str(compared[0]) not in (tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_a_dry_run_of_a_comparison_prints_its_table_and_writes_nothing(compared, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["--compare", *map(str, compared), "--output_dir", str(output)]
    assert evaluation.main([*flags, "--dry_run"]) == 0
    assert not output.exists()
    said = capsys.readouterr().out
    assert evaluation.main(flags) == 0
    assert said == capsys.readouterr().out
    assert said.count("\n") == 6


def test_the_page_of_a_comparison_has_a_row_per_clip_with_all_models_side_by_side(visit, compared, tmp_path):
    assert evaluation.main(["--compare", *map(str, compared), "--output_dir", str(tmp_path)]) == 0
    page = visit(tmp_path / "comparison.html")
    heads = [text.removesuffix(" ▼") for text in page.locator("#clips th button").all_inner_texts()]
    models = ["tiny-whisper-v3 %", "tiny-whisper-v2 %", "engine %", "tiny-whisper-v2 (few) %"]
    assert heads == ["Clip", "widest difference %", *models, "characters", "seconds"]
    assert page.locator("#count").inner_text() == "1 to 24 of 24 clips"
    widest = figures(page, 0)
    assert widest == sorted(widest, reverse=True)
    page.get_by_label("Search").fill(ATTACK)
    page.locator(".open").click()
    assert page.locator(".details h3").all_inner_texts()[:3] == ["tiny-whisper-v3", "tiny-whisper-v2", "engine"]
    assert page.locator(".aligned").count() in (6, 8)
    for path, row in zip(compared[:3], page.locator(".aligned").all()[1::2], strict=False):
        name = page.locator(".open").inner_text()
        hypothesis = next(row["hypothesis"] for row in read_predictions(path) if row["id"] == name)
        heard = row.locator(".pair > :nth-child(2)").all_text_contents()
        assert "".join(heard).replace("∅", "") == hypothesis
    text = page.locator("main").inner_text()
    assert "p = 0." in text
    phone = visit(tmp_path / "comparison.html", viewport=PHONE)
    assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_the_page_of_a_comparison_tells_wrong_clips_and_runaways_apart(tmp_path):
    texts = {"right": "はい", "wrong": "いいえ", "runaway": "はい" * 20}
    rows = [{"id": name, "reference": "はい", "text": text} for name, text in texts.items()]
    score(write_rows(tmp_path / "engine.csv", rows), tmp_path / "engine")
    score(write_rows(tmp_path / "other.csv", rows), tmp_path / "other")
    compared = [str(tmp_path / "engine"), str(tmp_path / "other")]
    assert evaluation.main(["--compare", *compared, "--output_dir", str(tmp_path / "both")]) == 0
    kinds = {clip["id"]: clip["kinds"] for clip in read_page(tmp_path / "both" / "comparison.html")["clips"]}
    assert kinds == {"right": [], "wrong": ["wrong"], "runaway": ["runaway", "wrong"]}


def test_clips_of_equal_name_and_reference_have_a_row_each(tmp_path):
    directories = []
    for engine, texts in {"engine": ["はい", "いいえ", "はい"], "other": ["いいえ", "はい", "はい"]}.items():
        rows = [{"id": "clip", "reference": "はい", "text": text} for text in texts]
        score(write_rows(tmp_path / f"{engine}.csv", rows), tmp_path / engine)
        directories.append(str(tmp_path / engine))
    alone = read_page(tmp_path / "engine" / "report.train.html")["clips"]
    assert [clip["kinds"] for clip in alone] == [[], ["wrong"], []]
    assert evaluation.main(["--compare", *directories, "--output_dir", str(tmp_path / "both")]) == 0
    both = read_page(tmp_path / "both" / "comparison.html")["clips"]
    assert [clip["figures"][:3] for clip in both] == [[100, 0, 100], [100, 100, 0], [0, 0, 0]]
    assert [[text["model"] for text in clip["texts"]] for clip in both] == [["engine", "other"]] * 3


def test_comparing_what_is_no_evaluation_or_an_old_one_is_a_clear_error(evaluated, tmp_path):
    with pytest.raises(SystemExit, match=r"has no metric\.<split>\.json"):
        evaluation.main(["--compare", str(tmp_path)])
    old = shutil.copytree(evaluated, tmp_path / "old")
    metrics = read_metrics(old)
    del metrics["scores"]
    (old / "metric.train.json").write_text(json.dumps(metrics))
    with pytest.raises(SystemExit, match=r"is of an earlier version: evaluate again with --output_dir"):
        evaluation.main(["--compare", str(old)])
    (old / "all_predictions.train.csv").unlink()
    with pytest.raises(SystemExit, match=rf"all_predictions\.train\.csv is missing: .* --output_dir {old}$"):
        evaluation.main(["--compare", str(old)])
