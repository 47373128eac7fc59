"""`headshare sweep`: its points, going on after it was stopped, what it refuses, and its page in a browser."""

import csv
import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cli_model
import transformers
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select
from support import calls_of

import headshare_jax as hs
from headshare_jax import cli
from headshare_jax.convert import scores_file
from headshare_jax.matching.functional import _LayerScorer
from headshare_jax.methods import scored
from headshare_jax.slim import rounds
from headshare_jax.sweep.folder import DATA, PAGE, TABLE

CALIBRATION = "The quick brown fox jumps over the lazy dog. " * 40
HELD_OUT = "A slow green turtle creeps under the busy cat. " * 8
WINDOW = 64


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, texts, and a finished sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny_cli_model.saved(folder / "model")
    (folder / "calibration.txt").write_text(CALIBRATION)
    (folder / "held-out.txt").write_text(HELD_OUT)
    assert cli.run([*arguments(folder), "-o", str(folder / "report")]) == 0
    return folder


def arguments(folder: Path, **other: object) -> list[str]:
    """Of a sweep of two methods with one ratio each can do, and one that only `direct` can."""
    given = {
        "ratios": "0.2,0.7",
        "methods": "direct,fitted",
        "calibrate": folder / "calibration.txt",
        "calibrate-tokens": 4 * WINDOW,
        "text": folder / "held-out.txt",
        "seq-len": WINDOW,
    } | {name.replace("_", "-"): value for name, value in other.items()}
    model = given.pop("src", folder / "model")
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return ["sweep", str(model), *options]


@pytest.fixture
def copy(workplace: Path, tmp_path: Path) -> Path:
    """The finished sweep's folder, for a test's own use."""
    return shutil.copytree(workplace / "report", tmp_path / "report")


def data(report: Path) -> Any:
    return json.loads((report / DATA).read_text())


def test_points_are_what_the_library_gives(workplace: Path) -> None:
    record = data(workplace / "report")
    model = hs.load(workplace / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(workplace / "model")
    windows = hs.calibration_windows(tokenizer(CALIBRATION).input_ids, 4, WINDOW, 259)
    direct = hs.share(model, hs.sharing_map(hs.match(model), 0.2))
    by_function = hs.share(model, hs.sharing_map(hs.match_functional(model, windows), 0.2, chains="forbid"))
    fitted, report = hs.refit(model, by_function, windows)
    expected = [model, direct, fitted]
    points = [record["points"][place] for place in (0, 1, 3)]
    assert [(point["method"], point["ratio"]) for point in points] == [("dense", 0), ("direct", 0.2), ("fitted", 0.2)]
    for point, each in zip(points, expected, strict=True):
        measured = hs.perplexity(each, tokenizer(HELD_OUT).input_ids, seq_len=WINDOW)
        assert point["perplexity"] == pytest.approx(measured.token_perplexity, rel=1e-6)
        assert point["parameters"] == hs.ledger(each).stored
        assert point["protocol"] == measured.protocol
    assert points[2]["fit"]["blocks"][0]["fitted_rows"] == report.blocks[0].fitted_rows
    assert record["fingerprint"] == hs.fingerprint(model)
    assert record["points"][2]["relative"] == record["points"][2]["perplexity"] / points[0]["perplexity"]


def test_a_point_that_cannot_be_says_why(workplace: Path) -> None:
    point = data(workplace / "report")["points"][4]
    assert point["perplexity"] is None
    assert "of 4 receivers can be chosen" in point["reason"]


def test_the_table_holds_the_points(workplace: Path) -> None:
    with (workplace / "report" / TABLE).open() as file:
        rows = list(csv.DictReader(file))
    points = data(workplace / "report")["points"]
    assert [(row["method"], float(row["ratio"])) for row in rows] == [(p["method"], p["ratio"]) for p in points]
    assert [row["perplexity"] for row in rows] == [str(p["perplexity"] or "") for p in points]


def test_a_stopped_sweep_goes_on_where_it_was(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[float] = []
    perplexity = hs.perplexity

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(0)
        return perplexity(*args, **kwargs)

    matched = calls_of(monkeypatch, scored, "match")
    monkeypatch.setattr("headshare_jax.sweep.points.perplexity", stopping)
    command = [*arguments(workplace), "-o", str(tmp_path / "report")]
    assert cli.run(command) == 130
    assert not (tmp_path / "report" / DATA).exists()
    monkeypatch.setattr("headshare_jax.sweep.points.perplexity", perplexity)
    assert cli.run(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.run([*command, "--resume"]) == 0
    # One for both ratios and both runs.
    assert [match for _, match in matched] == ["qk"]
    for one, other in zip(data(tmp_path / "report")["points"], data(workplace / "report")["points"], strict=True):
        for name in ("method", "ratio", "reason"):
            assert one.get(name) == other.get(name)
        if other["perplexity"] is not None:
            assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)


def test_matching_that_was_stopped_in_a_sweep_goes_on_where_it_was(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[int] = []
    layer_costs = _LayerScorer.layer_costs

    def counting(scorer: _LayerScorer, ties: Any) -> Any:
        layers.append(scorer.layer)
        if layers == [0, 1]:
            raise KeyboardInterrupt
        return layer_costs(scorer, ties)

    monkeypatch.setattr(_LayerScorer, "layer_costs", counting)
    command = [*arguments(workplace, methods="fitted"), "-o", str(tmp_path / "report")]
    assert cli.run(command) == 130
    assert cli.run([*command, "--resume"]) == 0
    assert layers == [0, 1, 1, 2]


def test_a_finished_sweep_measures_nothing_again_and_takes_further_points(
    workplace: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = calls_of(monkeypatch, scored.ScoredMethod, "apply")
    assert cli.run([*arguments(workplace), "-o", str(copy), "--resume"]) == 0
    assert shared == []
    for name in (DATA, TABLE, PAGE):
        assert (copy / name).read_bytes() == (workplace / "report" / name).read_bytes(), name
    assert cli.run([*arguments(workplace, methods="direct,random"), "-o", str(copy), "--resume"]) == 0
    assert [method.name for method, *_ in shared] == ["random", "random"]


def test_a_sweep_of_something_else_is_never_continued(
    workplace: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "other.txt").write_text(HELD_OUT + CALIBRATION)
    other = tiny_cli_model.saved(workplace / "other", seed=1)
    cases: list[tuple[dict[str, object], str]] = [
        ({"src": other}, "another model"),
        ({"text": workplace / "other.txt"}, "another held-out text"),
        ({"calibrate": workplace / "other.txt"}, "another calibration text"),
        ({"seed": 5}, "another settings"),
    ]
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for changes, tokenizer in cases:
        assert cli.run([*arguments(workplace, **changes), "-o", str(copy), "--resume"]) == 2
        said = capsys.readouterr().err
        assert tokenizer in " ".join(said.split()), said
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_bad_input_is_refused_before_anything_is_made(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hs.save(hs.share(hs.load(workplace / "model"), hs.sharing_map(hs.match(hs.load(workplace / "model")), 0.3)),
            tmp_path / "shared")  # fmt: skip
    (tmp_path / "empty").mkdir()
    uncalibrated = ["sweep", str(workplace / "model"), "--text", str(workplace / "held-out.txt")]
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (arguments(workplace, ratios="0.1;0.3"), "--ratios"),
        (arguments(workplace, ratios="0.1"), "none of 6 units"),
        (arguments(workplace, ratios="1.5"), "below 1"),
        (arguments(workplace, methods="best"), "direct, refit"),
        (arguments(workplace, methods="direct,plan"), "plan needs a budget"),
        (arguments(workplace, tie="vk"), "tie"),
        (arguments(workplace, src=tmp_path / "shared"), "already shares"),
        (arguments(workplace, text=workplace / "absent.txt"), "absent.txt"),
        (arguments(workplace, calibrate_tokens=10**6), "give a longer text"),
        (uncalibrated, "--calibrate"),
    ]
    for command, tokenizer in cases:
        assert cli.run([*command, "-o", str(tmp_path / "report")]) == 2
        said = capsys.readouterr().err
        assert tokenizer in " ".join(said.split()), said
    assert cli.run([*arguments(workplace), "-o", str(tmp_path / "empty"), "--resume"]) == 2
    assert "not the folder of a sweep" in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_own_text_is_a_sweeps_where_it_is_asked_for(workplace: Path, tmp_path: Path) -> None:
    text = workplace / "calibration.txt"
    command = arguments(workplace, methods="slim", calibrate=f"3@{text}", budgets=0.9)
    del command[command.index("--ratios") : command.index("--ratios") + 2]
    assert cli.run([*command, "--calibrate", "1@own", "-o", str(tmp_path / "report")]) == 0
    _, point = data(tmp_path / "report")["points"]
    # The command of a point makes its model, which others than its text would not.
    assert "--own" not in (words := shlex.split(point["command"]))
    assert words[1:3] == ["share", str(workplace / "model")]
    assert cli.run([*words[1:3], str(tmp_path / "model"), *words[4:], "--no-eval"]) == 0
    assert (made := hs.open_checkpoint(tmp_path / "model").sharing) is not None
    assert json.loads(made.to_json()) == point["map"]


def test_slim_units_stand_beside_plan_and_drop(
    workplace: Path, tmp_path: Path, browser: Chrome, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = calls_of(monkeypatch, rounds, "measure")
    command = arguments(workplace, methods="plan,slim,drop")
    command[command.index("--ratios") : command.index("--ratios") + 2] = ["--budgets", "0.8,0.7"]
    assert cli.run([*command, "-o", str(tmp_path / "report")]) == 0
    # Of each method, the first two rounds are those of both budgets.
    assert len(measured) == 6
    points = data(tmp_path / "report")["points"]
    assert [(point["method"], point["budget"]) for point in points[1:]] == [
        (method, budget) for method in ("plan", "slim", "drop") for budget in (0.7, 0.8)
    ]
    for point in points[1:]:
        assert point["perplexity"] > 0
        assert point["attention_bytes"] <= point["budget"] * points[0]["attention_bytes"]
        # A sweep calibrates on what is given alone.
        assert ("--own 0" in point["command"]) == (point["method"] != "drop")
        assert (point["slim"] > 0) == (point["method"] != "drop") == bool(point["map"].get("slim"))
    opened(browser, tmp_path / "report" / PAGE, 390)
    choice = Select(browser.find_element(By.ID, "point"))
    choice.select_by_index(next(place for place, point in enumerate(points[1:]) if point["slim"]))
    (section,) = (each for each in browser.find_elements(By.CLASS_NAME, "point") if each.is_displayed())
    assert "values and outputs kept" in (section.get_attribute("textContent") or "")
    section.find_element(By.TAG_NAME, "summary").click()
    assert "slim" in section.find_element(By.CSS_SELECTOR, "details tbody").text
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.get_log("browser") == []


def test_scores_are_kept_whole(workplace: Path, tmp_path: Path) -> None:
    result = hs.match(hs.load(workplace / "model"), "random", seed=3)
    for each in (result, dataclasses.replace(result, scores=None)):
        scores_file.write(each, tmp_path / "scores.npz")
        stored = scores_file.read(tmp_path / "scores.npz")
        for field in dataclasses.fields(each):
            assert np.array_equal(getattr(stored, field.name), getattr(each, field.name)), field.name


def test_damaged_scores_are_named(copy: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scores,) = copy.glob("cache/weight_scores-*.npz")
    scores.write_bytes(scores.read_bytes()[:100])
    assert cli.run([*arguments(workplace), "-o", str(copy), "--resume"]) == 2
    assert "delete the file" in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        if "CI" in os.environ:
            pytest.fail("chromium and chromium-driver are not installed")
        pytest.skip("chromium and chromium-driver are not on this machine")
    options = ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options=options, service=Service(driver)) as started:
        yield started


def opened(browser: Chrome, page: Path, width: int) -> None:
    """Opens a page in a window of a width, in CSS pixels."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


@pytest.mark.parametrize("width", [1200, 390], ids=["desktop", "phone"])
def test_the_page_fits_and_is_without_errors(workplace: Path, browser: Chrome, width: int) -> None:
    opened(browser, workplace / "report" / PAGE, width)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    shown = [each.size for each in browser.find_elements(By.CSS_SELECTOR, "main svg") if each.is_displayed()]
    # Curves, one of the maps, and one of the scores.
    assert len(shown) == 3
    for drawn in shown:
        assert 300 < drawn["width"] <= width
    for wide in browser.find_elements(By.CSS_SELECTOR, ".scroll"):
        assert browser.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", wide)
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(set(ids)) == len(ids)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def test_pointing_shows_the_pair(workplace: Path, browser: Chrome) -> None:
    opened(browser, workplace / "report" / PAGE, 1200)
    section = next(each for each in browser.find_elements(By.CLASS_NAME, "score") if each.is_displayed())
    squares = section.find_element(By.TAG_NAME, "image")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", squares)
    # The middle of the square of receiver 2.0 and donor 1.1, the fifth and the fourth of six units.
    place = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", squares)
    x, y = place["x"] + 3.5 / 6 * place["width"], place["y"] + 4.5 / 6 * place["height"]
    actions = ActionBuilder(browser)
    actions.pointer_action.move_to_location(int(x), int(y))
    actions.perform()
    (kept,) = (workplace / "report").glob("cache/weight_scores-*.npz")
    scores = scores_file.read(kept).scores
    assert scores is not None
    told = section.find_element(By.TAG_NAME, "output").text
    assert told == f"receiver 2.0, donor 1.1: score {scores[4, 3]:.4f}"


def test_the_best_for_a_budget_is_a_command_that_makes_it(
    workplace: Path, tmp_path: Path, browser: Chrome, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(browser, workplace / "report" / PAGE, 390)
    choice = Select(browser.find_element(By.ID, "choice"))
    choice.select_by_index(len(choice.options) - 1)
    (section,) = (each for each in browser.find_elements(By.CLASS_NAME, "choice") if each.is_displayed())
    command = shlex.split(section.find_element(By.TAG_NAME, "code").text)
    section.find_element(By.TAG_NAME, "button").click()
    assert section.find_element(By.TAG_NAME, "button").text == "Copied"
    (point,) = (p for p in data(workplace / "report")["points"][1:] if shlex.split(p["command"]) == command)
    monkeypatch.chdir(tmp_path)
    assert cli.run(command[1:]) == 0
    model = hs.load(tmp_path / command[3])
    assert hs.ledger(model).stored == point["parameters"]
    tokens = hs.load_tokenizer(workplace / "model")(HELD_OUT).input_ids
    measured = hs.perplexity(model, tokens, seq_len=WINDOW)
    assert measured.token_perplexity == pytest.approx(point["perplexity"], rel=1e-5)


def test_the_page_says_what_of_the_text_methods_saw(workplace: Path, tmp_path: Path, browser: Chrome) -> None:
    opened(browser, workplace / "report" / PAGE, 1200)
    assert "None of the" in browser.find_element(By.TAG_NAME, "main").text
    assert not browser.find_elements(By.CLASS_NAME, "warning")
    (tmp_path / "seen.txt").write_text(CALIBRATION[9:])
    command = arguments(workplace, text=tmp_path / "seen.txt", ratios="0.2", methods="refit")
    assert cli.run([*command, "-o", str(tmp_path / "report")]) == 0
    opened(browser, tmp_path / "report" / PAGE, 1200)
    said = browser.find_element(By.CLASS_NAME, "warning").text
    assert "were in the text that methods were calibrated on" in said
    assert data(tmp_path / "report")["overlap"]["sentence"] == said


def test_choosing_a_point_shows_its_map_and_ledger(workplace: Path, browser: Chrome) -> None:
    opened(browser, workplace / "report" / PAGE, 1200)
    points = [point for point in data(workplace / "report")["points"] if "map" in point]
    choice = Select(browser.find_element(By.ID, "point"))
    assert len(choice.options) == len(points) == 3
    for place, point in enumerate(points):
        choice.select_by_index(place)
        (section,) = (each for each in browser.find_elements(By.CLASS_NAME, "point") if each.is_displayed())
        assert f"{point['parameters']:,}" in section.find_element(By.CLASS_NAME, "ledger").text
        titles = [each.get_attribute("textContent") or "" for each in section.find_elements(By.TAG_NAME, "title")]
        assert len(titles) == point["units"]
        pairs = [
            f"layer {unit['layer']}, unit {unit['unit']} uses qkv of layer {unit['donor'][0]}, unit {unit['donor'][1]}"
            for unit in point["map"]["receivers"]
        ]
        assert len(pairs) == point["receivers"]
        for pair in pairs:
            assert any(title.startswith(pair) for title in titles), titles
        section.find_element(By.TAG_NAME, "summary").click()
        rows = [row.text for row in section.find_elements(By.CSS_SELECTOR, "details tbody tr")]
        assert [row.split()[0] for row in rows] == [f"{u['layer']}.{u['unit']}" for u in point["map"]["receivers"]]


def test_without_scripts_the_page_shows_everything(workplace: Path, browser: Chrome) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(browser, workplace / "report" / PAGE, 1200)
        sections = browser.find_elements(By.TAG_NAME, "section")
        # Choices for budgets, maps and scores.
        assert len(sections) == len(browser.find_elements(By.CLASS_NAME, "choice")) + 3 + 2
        assert all(each.is_displayed() and each.find_element(By.TAG_NAME, "h3").is_displayed() for each in sections)
        assert not any(each.is_displayed() for each in browser.find_elements(By.TAG_NAME, "select"))
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
