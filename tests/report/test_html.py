"""report.html stands alone, obeys no stranger, and shows what the report says."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from every_case import HOSTILE, LONG, forward_report, rich_report

from pipeline.report.html import render_html
from pipeline.report.schema import Report
from pipeline.report.speed_csv import speed_csv
from pipeline.report.speed_panels import tiles
from pipeline.report.stage_cards import tree, unbroken

GOLDEN = Path(__file__).parent / "golden.html"
VOID = {"meta", "br", "img", "link", "input", "hr", "wbr"}


class Page(HTMLParser):
    """What a browser would find: elements, their addresses, the text; whether tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self.attributes: set[str] = set()
        self._open: list[str] = []
        self.misnested: list[str] = []
        self.feed(text)
        self.close()
        self.misnested += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name in {"src", "href", "action", "srcset", "data", "poster", "xlink:href", "formaction"}:
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name == "style":
                self.styles.append(value or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.misnested.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\u00a0", " ").split())


def normalised(page: str) -> str:
    """Without the style sheet, the embedded files and blank lines: what is left is what is told."""
    page = re.sub(r"<style>.*?</style>", "<style></style>", page, flags=re.DOTALL)
    page = re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,…", page)
    return "\n".join(line.strip() for line in page.splitlines() if line.strip()) + "\n"


@pytest.fixture(scope="module")
def rich() -> Report:
    return rich_report()


@pytest.fixture(scope="module")
def page(rich: Report) -> Page:
    return Page(render_html(rich))


def test_the_page_shows_what_it_showed_before(report: Report) -> None:
    """After a change that is meant: write normalised(render_html(report)) to golden.html, look at the difference, and
    look at the page."""
    assert normalised(render_html(report)) == GOLDEN.read_text()


def test_every_tag_is_closed_in_order_and_every_id_is_unique(page: Page) -> None:
    assert page.misnested == []
    assert len(page.ids) == len(set(page.ids))


def test_nothing_is_fetched_and_links_stay_inside(page: Page) -> None:
    outside = [a for a in page.addresses if not a.startswith(("#", "data:"))]
    assert outside == []
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert not set(page.tags) & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    assert not [name for name in page.attributes if name.startswith("on")]


def test_the_style_sheet_fetches_nothing(rich: Report) -> None:
    sheet = re.search(r"<style>(.*?)</style>", render_html(rich), re.DOTALL)
    assert sheet is not None
    assert "url(" not in sheet[1]
    assert "@import" not in sheet[1]


def test_the_browser_is_told_to_allow_nothing_but_the_styles(rich: Report) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', render_html(rich))
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert "script-src" not in policy[1]


def test_hostile_words_are_shown_and_not_obeyed(rich: Report, page: Page) -> None:
    text = render_html(rich)
    assert "<script" not in text
    assert "<img" not in text
    assert page.text.count(HOSTILE) >= 6  # description, note, gate, parameter, sample text, reasons
    assert "{{ 7 * 7 }}" in page.text


def test_hostile_names_stay_in_their_place(rich: Report) -> None:
    name = '"><script>alert(1)</script>'
    stages = [s.model_copy(update={"name": name}) if s.name == "fused" else s for s in rich.stages]
    stages = [s.model_copy(update={"parent": name}) if s.parent == "fused" else s for s in stages]
    page = render_html(rich.model_copy(update={"stages": tuple(stages), "recipe": name, "export": name}))
    assert "<script" not in page
    assert Page(page).misnested == []


def test_styles_hold_nothing_but_numbers(page: Page) -> None:
    assert page.styles
    assert all(re.fullmatch(r"((left|width|max-width|margin-top):-?[\d.]+(%|px);?)+", style) for style in page.styles)


def test_thirteen_stages_stay_below_a_megabyte_and_a_half(rich: Report) -> None:
    assert len(rich.stages) == 13
    assert len(render_html(rich).encode()) < 1_500_000


def test_every_stage_verdict_and_gate_is_there_in_words(rich: Report, page: Page) -> None:
    for stage in rich.stages:
        assert stage.name in page.text
    for word in ("faster", "equivalent", "inconclusive", "degraded", "broken", "identical", "not evaluated", "passed"):
        assert word in page.text
    for gate in rich.gates:
        assert gate.gate in page.text
    assert LONG in page.text


def test_the_target_is_named_and_no_figure_is_shown_as_its(page: Page) -> None:
    assert "The target is i7-1165g7; no measured figure here is one of the target." in page.text
    assert "none is a figure of the target" in page.text


def test_a_local_target_is_the_host(rich: Report) -> None:
    local = rich.model_copy(update={"hardware": {**rich.hardware, "name": "local"}})
    text = Page(render_html(local)).text
    assert "no measured figure here is one of the target" not in text
    assert "The target is this host." in text


def test_random_weights_are_said_to_make_perplexity_meaningless() -> None:
    text = Page(render_html(rich_report(random_weights=True))).text
    assert "perplexity means nothing here" in text
    assert "same top token" in text
    assert "held-out" not in text
    assert "Agreement with source on 19,999 tokens" in text
    assert not re.search(r"perplexity [\d(×]", text)


def test_the_report_can_be_saved_from_the_page(rich: Report, page: Page) -> None:
    saved = {kind: data for a in page.addresses if a.startswith("data:") for kind, data in [a[5:].split(";base64,")]}
    assert Report.model_validate_json(base64.b64decode(saved["application/json;charset=utf-8"])) == rich
    assert base64.b64decode(saved["text/csv;charset=utf-8"]).decode() == speed_csv(rich)


def test_the_table_of_speeds_has_a_line_for_every_stage_and_point(rich: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(speed_csv(rich))))
    points = [p for s in rich.stages for p in s.speed or ()]
    assert len(rows) == len(points) == 50
    assert [float(r["tokens_per_s"]) for r in rows] == [p.tokens_per_s.median for p in points]
    assert rows[0]["vs_baseline"] == ""
    assert rows[-1]["vs_baseline_verdict"] == "slower"
    assert {r["vs_baseline_inside_floor"] for r in rows} == {"", "True", "False"}
    assert {r["outliers"] for r in rows} == {"0", "2"}


def test_a_spreadsheet_is_given_no_formula(rich: Report) -> None:
    stages = tuple(s.model_copy(update={"name": "=1+1"}) if s.name == "int8" else s for s in rich.stages)
    rows = csv.DictReader(io.StringIO(speed_csv(rich.model_copy(update={"stages": stages}))))
    assert "'=1+1" in {r["stage"] for r in rows}


def test_the_sample_is_marked_where_it_leaves_the_baselines(rich: Report) -> None:
    marked = re.findall(r"<mark>(.*?)</mark>", render_html(rich), re.DOTALL)
    assert marked[0] == "."
    assert marked[1] == " and some more"
    assert len(marked) == 6


def test_a_chain_goes_straight_down_and_a_fork_to_the_right(rich: Report) -> None:
    rails = {b.stage.name: b.rails for b in tree(rich)}
    assert [b.stage.name for b in tree(rich)][:5] == ["source", "export_onnx", "cleanup", "fused", "int8"]
    assert rails["source"] == ""
    assert (rails["export_onnx"], rails["cleanup"], rails["fused"]) == ("├", "│↓", "│↓")
    assert (rails["int8"], rails["collapsed"], rails["int8_slow"]) == ("│├", "││↓", "│└")
    assert len(rails) == len(rich.stages)


def test_the_front_is_drawn_and_named(rich: Report, page: Page) -> None:
    assert "No other model was shown to beat int8, int4; the dashed line is the best of them." in page.text
    assert "broken, contradictory or not comparable: garbage, collapsed." in page.text
    assert render_html(rich).count("<polyline") == 2


def test_a_report_of_a_run_without_measurements_has_no_empty_charts(rich: Report) -> None:
    bare = [s.model_copy(update={"speed": None, "quality": None, "effect": None, "load": None}) for s in rich.stages]
    text = render_html(
        rich.model_copy(update={"stages": tuple(bare), "noise_floor": (), "gates": (), "pareto": (), "schedule": None})
    )
    assert "Quality was not measured in this run." in text
    assert "Speed was not measured in this run." in text
    assert "<svg" not in text
    assert Page(text).misnested == []


def test_a_report_of_a_source_alone_is_drawn(rich: Report) -> None:
    alone = rich.model_copy(update={"stages": rich.stages[:1], "pareto": (), "export": None})
    assert Page(render_html(alone)).misnested == []


def test_the_reports_schema_and_the_page_agree_on_json(rich: Report) -> None:
    assert json.loads(rich.to_json())["recipe"] in render_html(rich)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6.75 × source", "6.75\u00a0× source"),
        ("1.6 % of 5.5 MB", "1.6\u00a0% of 5.5\u00a0MB"),
        ("4 stages in 3 s", "4 stages in 3\u00a0s"),
    ],
)
def test_a_figure_keeps_its_unit(text: str, expected: str) -> None:
    assert unbroken(text) == expected


def exported(report: Report, name: str) -> dict[str, tuple[str, str, bool]]:
    """What stands at the top of the page of a report whose export is `name`."""
    return {t.what: (t.value, t.badge, t.doubtful) for t in tiles(report.model_copy(update={"export": name}))}


def test_an_undecided_figure_is_no_headline(rich: Report) -> None:
    top = exported(rich, LONG)
    assert top["decode speed"] == ("inconclusive", "inconclusive", True)
    assert top["prefill speed"] == ("0.995 ×", "equivalent", False)
    below = next(t for t in tiles(rich.model_copy(update={"export": LONG})) if t.doubtful)
    assert below.below == "1.007 ×, 95 %: 0.916–1.098"
    assert below.note == "reaches into the noise floor of 1.6 %, about 190 rounds may decide"


def test_garbage_has_no_figure_at_the_top(rich: Report) -> None:
    top = exported(rich, "collapsed")
    assert [top[what][0] for what in ("decode speed", "prefill speed", "perplexity")] == ["broken"] * 3


def test_what_changed_nothing_is_no_success_at_the_top() -> None:
    top = exported(forward_report(), "fuse_matmul_add_bias_into_gemm")
    assert top["forward speed"] == ("contradiction", "contradiction", True)


def test_whole_passes_are_shown_wherever_decode_and_prefill_are() -> None:
    page = Page(render_html(forward_report()))
    assert "Forward pass of 1024 tokens, batch 2" in page.text
    assert "45.4 ms a pass" in page.text
    assert "61 rounds in 5 launches; never looked whether all is decided (planned: after 100 rounds)" in page.text
    assert page.misnested == []


def test_points_that_differ_in_new_tokens_alone_are_charts_of_their_own(page: Page) -> None:
    assert "Decode of 64 tokens after 128, batch 1" in page.text
    assert "Decode of 256 tokens after 128, batch 1" in page.text


def test_the_flag_stands_beside_the_verdict_and_in_the_card(rich: Report, page: Page) -> None:
    flag = rich.stage("int8_slow").roofline
    assert flag is not None
    assert page.text.count("⚑ kernel not engaged") == len(rich.stage("int8_slow").speed or ()) + 2
    assert page.text.count(str(flag.flag)) == 3  # headline, sentence, facts


def test_the_changed_region_is_drawn_in_a_fold(rich: Report, page: Page) -> None:
    text = render_html(rich)
    fold = re.findall(r"<details.*?</details>", text, re.DOTALL)
    drawn = [f for f in fold if 'class="region"' in f]
    assert len(drawn) == 1
    assert "GroupQueryAttention" in drawn[0]
    assert "layer 0, one of 22 that changed alike; 3 further nodes are not shown" in page.text
    assert text.count(".region svg") == 1  # its style, once


def test_layers_are_drawn_and_the_first_and_most_are_marked(rich: Report) -> None:
    text = Page(render_html(rich)).text
    assert "Relative error by layer against fused, on 512 tokens, 4 of 4 layers matched" in text
    assert re.search(r"layer 0\s*0\.021\s*0\.021 by itself, first", text)
    assert re.search(r"layer 2\s*0\.17\s*0\.17 by itself, adds most", text)
    assert re.search(r"layer 0\s*not finite\s*first and adds most", text)


def test_the_reason_of_a_verdict_stands_beside_it(rich: Report) -> None:
    text = render_html(rich)
    assert re.search(r"degraded</span><span class=\"under reason\">perplexity 1.072 times the baseline", text)


def test_roofline_and_ablation_have_their_tables(page: Page) -> None:
    assert "computed from its profile, not measured" in page.text
    assert "The whole chain that ends in int8, against the same chain without the pass" in page.text


def test_a_chart_is_left_out_where_all_predict_alike() -> None:
    assert "<polyline" not in render_html(forward_report())
