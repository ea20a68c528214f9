"""The report page: everything in it, nothing outside. And the scripts of figures/."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "figures"))
import compare
import poster
import analyze as report

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Collects tags and text, and insists that every tag is closed in order."""

    def __init__(self, source):
        super().__init__()
        self.tags = []
        self.open = []
        self.text = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def example():
    part = {
        "part": "distance, all layers",
        "untrained": 16.61,
        "CL": 15.24,
        "MIM": -0.0124,
        "hybrid": None,
        "difference": 2.7629,
        "interval": [2.4211, 3.1246],
        "interval_kind": "images only, one seed",
        "holds": True,
        "opposed": False,
    }
    claims = [
        {
            "claim": 4,
            "figure": "2, 3",
            "text": "CL attends globally & MIM <locally>",
            "verdict": "agrees (one seed)",
            "seeds": 1,
            "note": "",
            "parts": [part],
        },
        {
            "claim": 11,
            "figure": "11",
            "text": "a decoder helps",
            "verdict": "not testable",
            "seeds": 0,
            "note": "",
            "parts": [{"part": "NMI", "why": "needs a <decoder>"}],
        },
    ]
    model = dict.fromkeys(report.MODEL_FACTS) | {"name": "<b>moco</b>"}
    settings = {"data": "", "only": ["distance", "nmi"], "out": "a<b>c"}
    return {
        "edition": 2,
        "settings": settings,
        "versions": {"torch": "2.x"},
        "models": [model],
        "claims": claims,
    }


@pytest.fixture
def figures(tmp_path):
    Image.new("RGB", (40, 20), "orange").save(tmp_path / "one.png")
    lesson = "Why it <matters>.\n\n    NMI = I / √(H·H)\n\nWhat to look at."
    shared = {"lesson": lesson, "file": str(tmp_path / "one.png")}
    distance = {
        "name": "distance",
        "number": "3",
        "claim": 4,
        "title": "Far <b>out</b>",
    }
    toy = {"name": "toy", "number": "-", "claim": None, "title": "A toy"}
    return [{**distance, **shared}, {**toy, **shared}]


def write(tmp_path, results, figures):
    report.write_report(tmp_path / "report.html", results, figures)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_is_whole_and_asks_no_network(tmp_path, figures):
    source = write(tmp_path, example(), figures)
    page = Page(source)
    assert not re.search(r"https?://", source)
    assert "<!-- " not in source
    for tag in ("img", "script", "link", "iframe"):
        for attributes in page.all(tag):
            address = attributes.get("src") or attributes.get("href") or "data:"
            assert address.startswith("data:")
    assert "@import" not in source and "url(" not in source
    assert "<script" not in source


def test_every_figure_is_inlined_under_its_claim(tmp_path, figures):
    source = write(tmp_path, example(), figures)
    page = Page(source)
    content = base64.b64encode(Path(figures[0]["file"]).read_bytes()).decode()
    assert [image["src"][22:] for image in page.all("img")] == [content] * 2
    assert source.index('id="claim-4"') < source.index("Far &lt;b&gt;")
    assert source.index("Beyond the paper") < source.index("A toy</h3>")
    # A claim without a figure has a row in the table, but neither link nor chapter.
    assert [link["href"] for link in page.all("a")] == ["#claim-4"]
    assert 'id="claim-11"' not in source
    assert '<p class="equation">NMI = I / √(H·H)</p>' in source


def test_names_and_texts_are_escaped(tmp_path, figures):
    source = write(tmp_path, example(), figures)
    text = "".join(Page(source).text)
    for written in ("<b>moco</b>", "<locally>", "<decoder>", "<matters>", "a<b>c"):
        assert written in text
        assert written not in source


def test_table_of_claims(tmp_path, figures):
    text = " ".join(Page(write(tmp_path, example(), figures)).text)
    for number in (
        "16.610",
        "15.240",
        "−0.012",
        "–",
        "+2.763",
        "[+2.421, +3.125]",
        "holds",
    ):
        assert number in text
    assert "images only, one seed" in text
    assert "✓ agrees (one seed)" in text
    assert "– not testable" in text


def test_missing_numbers_are_dashes(tmp_path, figures):
    results = example()
    part = results["claims"][0]["parts"][0]
    part.update(difference=None, interval=[None, None], holds=False)
    source = write(tmp_path, results, figures)
    assert "<b>–</b> [–, –]" in source
    assert "undecided" in source


# ==== the poster ====


def poster_model(role, run, lam=None, **values):
    lam = {"CL": 1.0, "MIM": 0.0}.get(role, lam)
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3}
    facts = {"role": role, "name": f"{role} {lam}", "run": run, "lam": lam}
    return sizes | facts | {"decoder_depth": 0, "classes": [10], "values": values}


def test_poster_headings_follow_the_numbers():
    low, high = np.array([[0.3, 0.2, 0.1]]), np.array([[0.2, 0.3, 0.4]])
    assert poster.find_distance(high + 1, low) == "CL looks 1.1 px farther"
    assert poster.find_distance(low, high + 1) == "MIM looks 1.1 px farther"
    assert poster.find_nmi(low, high) == "CL ends in one map for all"
    assert poster.find_nmi(high, low) == "MIM ends in one map for all"
    assert poster.find_nmi(high, high) == "In the end CL 0.40, MIM 0.40"
    assert poster.find_frequency(low, high) == "MIM keeps more of the detail"
    assert poster.find_layers(high, low) == "Early MIM leads, late CL"
    assert poster.find_layers(high, low - 1) == "CL leads early and late"


def test_poster_names_no_leader_whom_seeds_do_not_show():
    # in one layer of each pair the two seeds differ by 0.22 and 0.4, in the other by 0
    cl = np.array([[0.5, 0.6], [0.5, 0.6]])
    late = np.array([[0.39, 0.5], [0.61, 0.5]])
    assert poster.find_layers(cl, late) == "Early nobody leads, late CL"
    near = np.array([[0.39, 0.4], [0.61, 0.8]])
    assert poster.find_layers(cl, near) == "Nobody leads"


def test_poster_averages_heads_and_leaves_out_what_cannot_be_compared():
    models = [
        poster_model("CL", 0, nmi=[[0.0, 1.0], [0.5, 0.5], [1.0, 1.0]]),
        poster_model("CL", 1),
        poster_model("hybrid", 0, lam=0.2, fourier=[[[0, -1], [0, -2]]] * 3),
        poster_model("hybrid", 0, lam=0.8),
        poster_model("MIM", 0) | {"depth": 5},
        poster_model("MIM", 0) | {"decoder_depth": 2},
    ]
    groups = poster.groups_of(models)
    kept = {
        role: [models.index(m) for m in strip(seeds)] for role, seeds in groups.items()
    }
    assert kept == {"CL": [0, 1], "hybrid": [2]}
    assert poster.curves_of(groups["CL"], "nmi").tolist() == [[0.5, 0.5, 1.0]]
    # after each attention and each MLP
    assert poster.curves_of(groups["hybrid"], "fourier").tolist() == [[-1, -2] * 3]


def strip(seeds):
    return [{key: m[key] for key in m if key != "rows"} for m in seeds]


def test_poster_draws_with_gaps(tmp_path):
    curves = {"distance": [[3.0, 4.0]] * 3, "layers": [0.3, 0.4, 0.2]}
    models = [poster_model(role, 0, **curves) for role in ("CL", "MIM", "untrained")]
    results = {"settings": {"data": "photos/cifar10"}, "models": models}
    (tmp_path / "results.json").write_text(json.dumps(results))
    figure = poster.draw_poster([tmp_path / "results.json"] * 2)
    assert len(figure.get_axes()) == 8
    texts = [row.get_suptitle() for row in figure.subfigs[:-1]]
    assert texts == ["photographs, cifar10 (one seed)"] * 2
    poster.plt.close(figure)


# ---- figures/compare.py ----


def test_two_names_are_compared_seed_by_seed(tmp_path, capsys):
    # the same for all images: the interval is over seeds alone
    last_nmi = {"whole": [0.5, 0.9, 0.7], "cut": [0.4, 0.6, 0.5]}
    models, samples = [], []
    for name, values in last_nmi.items():
        for seed, value in enumerate(values):
            models.append({"name": name, "seed": seed})
            samples.append({"nmi": np.full((6, 4), value)})
    # pairs go by seed, not by place
    models[0], models[1] = models[1], models[0]
    samples[0], samples[1] = samples[1], samples[0]
    report.write_results({"edition": 2, "models": models}, samples, tmp_path)
    compare.compare(tmp_path, "NMI, last layer", ["whole", "cut"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("whole: 0.700")
    # differences 0.1, 0.3, 0.2: mean 0.2, s 0.1, and t(0.975, 2) = 4.303
    assert lines[2] == "difference 0.200 [-0.048, 0.448], seeds and images, 3 seeds"
    with pytest.raises(report.UserError, match="measured of cut; whole"):
        compare.compare(tmp_path, "NMI, last layer", ["whole", "half"])
    with pytest.raises(report.UserError, match="parts are "):
        compare.compare(tmp_path, "NMI", ["whole", "cut"])
