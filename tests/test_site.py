"""The documentation site of a smoke run: every page in a browser, every link, and what the build
promises."""
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from specpred.config import repo_root
from specpred.runner import last_executed

ROOT = repo_root()


def build(*arguments):
    "Runs docs/build.py as `make docs` does."
    return subprocess.run(
        [sys.executable, str(ROOT/"docs"/"build.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def site(smoke_run, tmp_path_factory):
    "Folder of the site made from the smoke run."
    out = tmp_path_factory.mktemp("site")/"html"
    done = build(
        "--profile", smoke_run.root.name, "--data-dir", smoke_run.root.parent, "--out", out
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"outputs of the profile {smoke_run.root.name}" in done.stdout.splitlines()[-1]
    return out


def pages_of(site):
    "The pages of a site; what lies in _static belongs to the theme."
    return sorted(p for p in site.rglob("*.html") if "_static" not in p.relative_to(site).parts)


class Page(HTMLParser):
    "The anchors that a page has, and the links and files that it asks for."
    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.files, self.text = {"", "top"}, [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href") is not None: self.links.append(attrs["href"])
        elif tag == "link" and attrs.get("href"): self.files.append(attrs["href"])
        elif tag in ("img", "script", "source", "iframe") and attrs.get("src"):
            self.files.append(attrs["src"])

    def handle_data(self, data): self.text.append(data)


def broken_links(site):
    """Links to pages, anchors and files that are not in the site, and files that would come from
    the network."""
    site = site.resolve()
    pages = {path.resolve(): Page(path) for path in pages_of(site)}
    broken = []
    for path, page in pages.items():
        for link in page.links + page.files:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.files and parts.scheme != "data":
                    broken.append(f"{path.relative_to(site)}: {link} comes from the network")
                continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target /= "index.html"
            if not target.is_file() or not target.is_relative_to(site):
                broken.append(f"{path.relative_to(site)}: {link} does not exist")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(site)}: {link} has no such anchor")
    return broken


def find_chromium():
    """Path of Chromium; continuous integration, which runs as root, installs Debian's package.
    Skips where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    may_install = os.environ.get("CI") == "true" and os.geteuid() == 0 and shutil.which("apt-get")
    if not found and may_install:
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(
                ["apt-get", "-qq", *command],
                check=True,
                timeout=600,
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            )
        found = shutil.which("chromium")
    if not found:
        pytest.skip(
            "there is no Chromium to open the pages with: apt-get install chromium "
            "(links are checked without it)"
        )
    return found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox"]
        )
        yield chromium
        chromium.close()


def open_page(browser, path, colour_scheme="light"):
    "What went wrong when a page was opened, as texts."
    context = browser.new_context(color_scheme=colour_scheme)
    page, wrong = context.new_page(), []
    page.on(
        "console",
        lambda message: message.type == "error" and wrong.append(f"console: {message.text}"),
    )
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on(
        "requestfailed", lambda request: wrong.append(f"missing: {request.url} ({request.failure})")
    )
    page.on(
        "request",
        lambda request: (
            request.url.startswith(("http:", "https:", "ws:"))
            and wrong.append(f"network: {request.url}")
        ),
    )
    page.goto(path.as_uri(), wait_until="networkidle")
    if page.locator(".math").count():
        page.wait_for_function(
            "window.MathJax && MathJax.startup && MathJax.startup.promise", timeout=20_000
        )
        page.evaluate("MathJax.startup.promise")
        raw = page.evaluate(
            "[...document.querySelectorAll('.math')]"
            ".filter(m => !m.querySelector('mjx-container svg')).map(m => m.textContent)"
        )
        bad = page.evaluate(
            "[...document.querySelectorAll('[data-mjx-error]')].map(m => m.dataset.mjxError)"
        )
        wrong += [f"formula not rendered: {m[:80]}" for m in raw] + [f"formula: {m}" for m in bad]
    empty = page.evaluate(
        "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.currentSrc)"
    )
    context.close()
    return wrong + [f"image without content: {source}" for source in empty]


def test_every_link_has_its_target(site):
    assert broken_links(site) == []


def test_the_site_carries_the_licences_of_what_it_contains(site):
    folder = site/"_static"
    texts = {path.name: path.read_text() for path in (folder/"licences").iterdir()}
    packages = "myst-nb", "pydata-sphinx-theme", "pygments", "snowballstemmer", "sphinx"
    assert sorted(texts) == [f"{package}.txt" for package in packages]
    assert all("Copyright" in text and "Redistribution" in text for text in texts.values())
    assert "Apache License" in (folder/"mathjax"/"LICENSE").read_text()
    listed = (ROOT/"docs"/"README.md").read_text()
    made_by_sphinx = {"documentation_options.js", "language_data.js"}
    scripts = {path.name for path in folder.rglob("*.js")} - made_by_sphinx
    assert [name for name in scripts if f"`{name}`" not in listed] == []
    assert {path.parent.parent.name for path in folder.rglob("*.woff2")} == {"fontawesome"}


def test_papers_behind_the_stellar_library_are_cited():
    citation, terms = ((ROOT/name).read_text() for name in ("CITATION.cff", "data/README.md"))
    dois = ("10.1046/j.1365-8711.2003.06897.x", "10.1111/j.1365-2966.2006.10699.x",
        "10.48550/arXiv.1705.10877", "10.1093/mnras/sty2169")
    assert all(doi in citation and doi in terms for doi in dois)
    assert "GENERAL PUBLIC LICENSE" in (ROOT/"data"/"COPYING").read_text()
    for name in ("LICENSE", "README.md"):
        assert "data/README.md" in (ROOT/name).read_text(), name


def test_every_page_opens_without_errors(site, browser):
    wrong = {
        p.relative_to(site).as_posix(): w for p in pages_of(site) if (w := open_page(browser, p))
    }
    assert wrong == {}


def test_landing_page_opens_in_the_dark(site, browser):
    assert open_page(browser, site/"index.html", "dark") == []


def test_every_notebook_and_module_has_its_page(site):
    notebooks = {p.stem for p in (ROOT/"nbs").glob("*.ipynb")}
    modules = {p.stem for p in (ROOT/"specpred").glob("*.py") if not p.stem.startswith("_")}
    assert {f"{name}.html" for name in notebooks} | {f"api/{name}.html" for name in modules} <= {
        p.relative_to(site).as_posix() for p in pages_of(site)
    }


def test_pages_show_the_outputs_of_the_run(site, smoke_run):
    executed = last_executed(smoke_run)
    assert executed
    for name, path in executed.items():
        text = "".join(Page(site/f"{name}.html").text)
        assert "Outputs of the profile smoke" in text, name
        cells = json.loads(path.read_text())["cells"]
        printed = [
            line.strip()
            for c in cells
            if c["cell_type"] == "code"
            and not any(line.startswith("#| hide") for line in c["source"])
            for o in c["outputs"]
            if o.get("name") == "stdout"
            for line in o["text"]
            if line.strip() and not set("/\x1b\r") & set(line)
        ]
        pictures = sum(
            "image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])
        )
        assert all(line in text for line in printed), (
            f"{name} lacks {[line for line in printed if line not in text][:3]}"
        )
        assert (site/f"{name}.html").read_text().count("<img") >= pictures


def test_outputs_are_shown_only_beside_the_code_that_made_them(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/"docs")
    from build import take_outputs
    from nbformat import v4
    def cells(prose, *codes):
        return v4.new_notebook(
            cells=[
                v4.new_markdown_cell(prose, id="prose"),
                *(v4.new_code_cell(c, id=f"c{k}") for k, c in enumerate(codes)),
            ]
        )
    executed, now = cells("old", "1 + 1", "f(2)"), cells("new", "1 + 1\n", "f(3)", "g()")
    for cell in executed.cells[1:]: cell.outputs = [v4.new_output("stream", text="out")]
    assert take_outputs(now, executed)
    assert [len(c.get("outputs", [])) for c in now.cells] == [0, 1, 0, 0] and now.cells[
        0
    ].source == "new"
    assert not take_outputs(cells("newer", "1 + 1", "f(2)"), executed)


def test_pages_hide_what_is_for_machines(site, smoke_run):
    for name in sorted(p.stem for p in (ROOT/"nbs").glob("*.ipynb")):
        text = "".join(Page(site/f"{name}.html").text)
        assert not any(line.lstrip().startswith("#|") for line in text.splitlines()), name
        assert "# Parameters" not in text, f"{name} shows the parameters that papermill injected"
        assert str(smoke_run.root.parent) not in text and str(ROOT) not in text, (
            f"{name} shows a folder of this machine"
        )


def test_reference_documents_parameters(site):
    text = "".join(Page(site/"api"/"config.html").text)
    assert "one of PROFILES, or a profile, which is returned with the changes made" in " ".join(
        text.split()
    )


def test_the_checks_find_what_is_wrong(tmp_path, browser):
    (
        tmp_path/"index.html"
    ).write_text("""<!doctype html><link rel="icon" href="data:,">
        <a href="other.html#nowhere">a</a><a href="gone.html">b</a>
        <a href="other.html#here">c</a><a href="https://example.org">d</a><img src="gone.png">
        <script>console.error("oh"); nothing()</script>""")
    (tmp_path/"other.html").write_text(
        '<!doctype html><link rel="icon" href="data:,"><h1 id="here">x</h1>'
        '<script src="https://example.org/x.js"></script>'
    )
    assert broken_links(tmp_path) == [
        "index.html: other.html#nowhere has no such anchor",
        "index.html: gone.html does not exist",
        "index.html: gone.png does not exist",
        "other.html: https://example.org/x.js comes from the network",
    ]
    found = " ".join(open_page(browser, tmp_path/"index.html"))
    assert all(
        part in found
        for part in ("console: oh", "nothing is not defined", "gone.png", "image without content")
    )
    assert "network: https://example.org/x.js" in " ".join(
        open_page(browser, tmp_path/"other.html")
    )


def test_without_a_run_the_build_says_what_to_do(tmp_path):
    done = build("--data-dir", tmp_path, "--out", tmp_path/"html")
    assert (
        done.returncode == 1
        and "make demo" in done.stderr
        and "Traceback" not in done.stderr
        and not (tmp_path/"html").exists()
    )


def test_a_folder_that_is_no_site_is_not_replaced(tmp_path, smoke_run):
    (tmp_path/"thesis.tex").write_text("years of work")
    done = build("--profile", "smoke", "--data-dir", smoke_run.root.parent, "--out", tmp_path)
    assert (
        done.returncode == 1
        and "not replaced" in done.stderr
        and (tmp_path/"thesis.tex").read_text() == "years of work"
    )


def test_readme_is_checked_against_the_landing_page(tmp_path):
    readme = tmp_path/"README.md"
    def call(*arguments):
        return subprocess.run(
            [sys.executable, str(ROOT/"docs"/"readme.py"), "--readme", str(readme), *arguments],
            capture_output=True,
            text=True,
        )
    assert call().returncode == 0 and call("--check").returncode == 0
    made = readme.read_text()
    assert made == (ROOT/"README.md").read_text()
    links = [part.split(")")[0] for part in made.split("](")[1:]]
    for link in [link for link in links if not link.startswith(("http", "#"))]:
        assert (ROOT/link).exists(), link
    readme.write_text(made.replace("galaxy", "planet", 1))
    done = call("--check")
    assert (
        done.returncode == 1
        and "README.md is not what index.ipynb says" in done.stderr
        and "+" in done.stderr
    )
