"""README.md from nbs/index.ipynb. With --check: exit code 1 when README.md is not what the notebook
makes."""
import argparse
import difflib
import posixpath
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter
from traitlets.config import Config

from specpred.stages import atomic_path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- made from nbs/index.ipynb by docs/readme.py: edit the notebook, not this file -->\n\n"
LINK = re.compile(r"(\]\(|\bsrc=\"|\bhref=\")([^)\s\"#:]+)(?=[)\s\"#])")


def from_root(found):
    "A link as seen from nbs/, as seen from the folder above."
    return found[1] + posixpath.normpath(posixpath.join("nbs", found[2]))


def readme(notebook):
    """The text of README.md; hidden cells and outputs are left out, links are relative to the
    folder above the notebook's."""
    settings = Config()
    settings.MarkdownExporter.preprocessors = [
        "nbconvert.preprocessors.ClearOutputPreprocessor",
        "nbconvert.preprocessors.RegexRemovePreprocessor",
    ]
    settings.RegexRemovePreprocessor.patterns = [r"\A\s*#\s*\|\s*(hide|default_exp)\b"]
    text, _ = MarkdownExporter(config=settings).from_filename(str(notebook))
    text = LINK.sub(from_root, text)
    text = re.sub(r"^#\s*\|.*\n", "", text, flags=re.M)
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return NOTE + re.sub(r"\n{3,}", "\n\n", lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Make README.md from nbs/index.ipynb.")
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit code 1 when README.md and the notebook differ",
    )
    parser.add_argument("--notebook", type=Path, default=ROOT/"nbs"/"index.ipynb")
    parser.add_argument("--readme", type=Path, default=ROOT/"README.md")
    given = parser.parse_args()
    made = readme(given.notebook)
    is_there = given.readme.read_text(encoding="utf-8") if given.readme.exists() else ""
    if not given.check:
        if made != is_there:
            with atomic_path(given.readme) as part: part.write_text(made, encoding="utf-8")
        print(f"{given.readme.name}: {'unchanged' if made == is_there else 'written'}")
    elif made != is_there:
        difference = difflib.unified_diff(
            is_there.splitlines(),
            made.splitlines(),
            given.readme.name,
            given.notebook.name,
            n=0,
            lineterm="",
        )
        sys.exit(
            "\n".join(
                [
                    *list(difference)[:20],
                    f"{given.readme.name} is not what {given.notebook.name} says: "
                    "edit the notebook, "
                    "then run `python docs/readme.py` and commit both.",
                ]
            )
        )
    else: print(f"{given.readme.name} is in sync with {given.notebook.name}")


if __name__ == "__main__": main()
