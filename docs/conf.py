"""Sphinx settings of the site. docs/build.py prepares the sources and calls Sphinx with this folder
as its configuration."""
import re
from configparser import ConfigParser
from importlib.metadata import files
from pathlib import Path

from fastcore.docments import docments

import specpred

_settings = ConfigParser(delimiters=["="])
_settings.read(Path(__file__).resolve().parent.parent/"settings.ini")

project = _settings["DEFAULT"]["title"]
author = _settings["DEFAULT"]["author"]
copyright = _settings["DEFAULT"]["copyright"]
release = version = specpred.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
master_doc = "index"

# the notebooks come with the outputs of the last run
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_block", "deflist"]
myst_heading_anchors = 4

# MathJax lies beside the pages, which therefore need no network
mathjax_path = "mathjax/tex-svg.js"

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["specpred.css"]
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"index": []}
html_theme_options = {
    "logo": {
        "text": project,
        "image_light": "_static/favicon.svg",
        "image_dark": "_static/favicon.svg",
    },
    "navbar_align": "left",
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_center": [],
    "footer_end": [],
}

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = (
    False  # what torch and fastai say of their own methods is in their own documentation
)
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80

_INLINE = re.compile(
    r"""(?P<literal>``.+?``|:[\w:]+:`.+?`) | `(?P<code>[^`]+)` | \$(?P<math>[^$\n]+)\$
    | (?P<emphasis>(?<![\w*])\*(?=[^\s*])[^*\n]*[^\s*]\*(?![\w*])) | (?P<special>[*|\\]|_(?!\w))""",
    re.X,
)
_ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")


def _as_rst(text):
    """A line of Markdown (`code`, $math$, *emphasis*) as reStructuredText; characters that mean
    something there lose that meaning."""
    def one(found):
        if found["literal"] or found["emphasis"]: return found[0]
        if found["code"]: return f"``{found['code']}``"
        if found["math"]: return f":math:`{found['math']}`"
        return "\\" + found["special"]
    return _INLINE.sub(one, text)


def _blocks(lines):
    "The lines between blank ones, as lists."
    block = []
    for line in [*lines, ""]:
        if line.strip(): block.append(line)
        elif block:
            yield block
            block = []


def _docstring_as_rst(lines):
    """Docstrings here are paragraphs and lists with Markdown's inline marks; Sphinx reads
    reStructuredText."""
    for block in _blocks(lines):
        for line in block:
            item = _ITEM.match(line)
            if item:
                yield from ("", f"* {_as_rst(line[item.end():].strip())}")
            elif _ITEM.match(block[0]): yield f"  {_as_rst(line.strip())}"
            else: yield _as_rst(line.strip())
        yield ""


def document_parameters(app, what, name, obj, options, lines):
    """Completes a docstring by what the comments beside its parameters say (docments), which
    autodoc does not see."""
    lines[:] = list(_docstring_as_rst(lines))
    if what not in ("function", "class", "method"): return
    for parameter, facts in docments(obj, full=True, returns=True).items():
        if not facts.get("docment"): continue
        comment = _as_rst(" ".join(facts["docment"].split()))
        lines.append(
            f":returns: {comment}" if parameter == "return" else f":param {parameter}: {comment}"
        )


def name_defaults(app, what, name, obj, options, signature, returned):
    """Classes and functions that are defaults, by their names: what Python prints of them, Sphinx
    cannot read."""
    plain = re.sub(
        r"<class '(?:[\w<>]+\.)*(\w+)'>|<function (?:[\w<>]+\.)*(\w+) at 0x\w+>",
        r"\1\2",
        signature or "",
    )
    return plain or None, returned


def copy_licences(app, exception):
    "The licence texts of the packages whose scripts, styles and fonts the site contains."
    if exception: return
    folder = Path(app.outdir)/"_static"/"licences"
    folder.mkdir(parents=True, exist_ok=True)
    for package in ("sphinx", "snowballstemmer", "pydata-sphinx-theme", "myst-nb", "pygments"):
        texts = [file.read_text(encoding="utf-8") for file in files(package)
            if file.stem in ("LICENSE", "COPYING")]
        (folder/f"{package}.txt").write_text("\n".join(texts), encoding="utf-8")


def setup(app):
    app.connect("build-finished", copy_licences)
    app.connect("autodoc-process-signature", name_defaults)
    app.connect("autodoc-process-docstring", document_parameters)
