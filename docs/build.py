"""The documentation site, from the executed notebooks of the last run: what `make docs` calls.

Nothing is executed again and nothing is fetched. Chapters that are no stage of the pipeline, or
have not run yet, are shown as they are in nbs/."""
import argparse
import contextlib
import importlib
import json
import posixpath
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from specpred.config import (PROFILES, InvalidInputError, MissingInputError, SpecpredError,
    get_paths, repo_root)
from specpred.stages import STAGES, atomic_path
from specpred.runner import last_executed

DOCS = Path(__file__).resolve().parent
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(.*?)\s*$")
NOTEBOOKS = """# Notebooks

The chapters are numbered in the order in which they are read and run. Each defines a part of the
library, shows it at work and, where it is a stage of the pipeline, ends with running it.
"""
API = """API reference
=============

What each notebook exports, as one module. Everything here is defined, explained and tried in the
notebook that the module's page names. A module imports only from those above it:

.. image:: ../figures/modules.png
   :alt: The modules in the order of reading, with arrows to those that each imports
   :width: 420px

.. toctree::
   :maxdepth: 1

{modules}
"""
CHAPTER_LINK = re.compile(r"\[([^\]]*)\]\((\w+)\.ipynb\)")
LINK = re.compile(r"(\]\(|\bsrc=\"|\bhref=\")([^)\s\"#:]+)(?=[)\s\"#])")


def newest_profile(data_dir):
    "The profile whose stages ran last. Raises `MissingInputError` when none ever ran."
    ran = {name: max(path.stat().st_mtime for path in found.values())
           for name in PROFILES if (found := last_executed(get_paths(name, data_dir)))}
    if not ran:
        folder = get_paths("demo", data_dir).root.parent
        raise MissingInputError(
            f"The site shows executed notebooks, and there are none in {folder}. "
            "Run `make demo` first (or `specpred reproduce --profile smoke`, "
            "which takes a few minutes)."
        )
    return max(ran, key=ran.get)


def directives(source):
    "The `#|` lines at the beginning of a code cell, and the rest of it."
    lines, found = source.splitlines(), []
    while lines and (match := DIRECTIVE.match(lines[0])):
        found.append(match[1])
        del lines[0]
    return found, "\n".join(lines).strip("\n")


def show_cell(cell):
    "The cell as a reader should see it, or None."
    if cell.cell_type != "code": return cell
    if "injected-parameters" in cell.metadata.get("tags", []): return None
    found, cell.source = directives(cell.source)
    if not cell.source or "hide" in found: return None
    tags = []
    if {"hide_input", "echo: false"} & set(found): tags.append("remove-input")
    if {"hide_output", "output: false"} & set(found): cell.outputs = []
    if "code-fold: true" in found: tags.append("hide-input")
    cell.metadata = nbformat.from_dict({"tags": tags})
    for output in cell.outputs:
        # a widget needs a running kernel; its text stays
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    cell.outputs = [o for o in cell.outputs if "data" not in o or o["data"]]
    return cell


def without_machine(value, folders):
    """Texts of outputs with this machine's folders shortened, e.g. /home/ann/specpred/data/demo to
    data/demo."""
    if isinstance(value, str):
        for folder, short in folders: value = value.replace(folder, short)
        return value
    if isinstance(value, list): return [without_machine(v, folders) for v in value]
    if isinstance(value, dict):
        return {
            k: v if k.startswith("image/") else without_machine(v, folders)
            for k, v in value.items()
        }
    return value


def run_note(nb, stage, paths):
    "One line on the run that the outputs are from."
    manifest = paths.manifests/f"{stage}.json"
    facts = json.loads(manifest.read_text()) if manifest.exists() else {}
    changes = nb.metadata.get("papermill", {}).get("parameters", {}).get("overrides", [])
    text = f"Outputs of the profile `{paths.root.name}`" + "".join(f", `{c}`" for c in changes)
    if facts:
        seconds = max(1, round(facts["wall_time_s"]))
        text += f", run on {facts['finished'][:10]} in {seconds} s "
        text += f"with {facts['peak_memory_mb']} MB of memory"
    return nbformat.v4.new_markdown_cell(f"{{.run-note}}\n{text}.")


def take_outputs(nb, executed):
    """Gives the cells the outputs that they had when they were executed; those whose code is
    another now get none. Whether there are such."""
    ran, changed = {cell.id: cell for cell in executed.cells if cell.cell_type == "code"}, False
    for cell in nb.cells:
        if cell.cell_type != "code" or "parameters" in cell.metadata.get("tags", []): continue
        same = cell.id in ran and ran[cell.id].source.strip() == cell.source.strip()
        cell.outputs, changed = ran[cell.id].outputs if same else [], changed or not same
    return changed


def toctree(caption, names):
    "A part of the sidebar."
    return "\n".join([
        "```{toctree}", f":caption: {caption}", ":maxdepth: 1", "", *names, "```", ""])


class Sources:
    "The files Sphinx reads, by name: notebooks, generated pages, and what they link to."
    def __init__(self, paths):
        self.paths, self.executed, self.files, self.changed = paths, last_executed(paths), {}, []
        self.notebooks = {p.stem: p for p in sorted((repo_root()/"nbs").glob("[!.]*.ipynb"))}
        if "index" not in self.notebooks:
            raise MissingInputError(
                f"{repo_root() / 'nbs' / 'index.ipynb'}, the landing page, is missing."
            )
        for name in self.notebooks: self.files[f"{name}.ipynb"] = self.notebook(name)
        self.files["notebooks.md"] = self.contents().encode()
        self.modules = sorted(
            p.stem for p in (repo_root()/"specpred").glob("*.py") if not p.stem.startswith("_")
        )
        for module in self.modules: self.files[f"api/{module}.rst"] = self.api_page(module).encode()
        self.files["api/index.rst"] = self.api_index(self.modules).encode()

    def notebook(self, name):
        """A notebook as it is in nbs/ with the outputs of its executed copy, if there is one,
        cleaned for readers."""
        ran, nb = name in self.executed, nbformat.read(self.notebooks[name], as_version=4)
        if ran:
            executed = nbformat.read(self.executed[name], as_version=4)
            if take_outputs(nb, executed): self.changed.append(name)
            nb.metadata = executed.metadata
        nb.cells = [shown for cell in nb.cells if (shown := show_cell(cell))]
        folders = [
            (str(self.paths.root.parent), "data"),
            (f"{repo_root()}/", ""),
            (str(repo_root()), "specpred"),
        ]
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = LINK.sub(self.link, CHAPTER_LINK.sub(self.chapter_link, cell.source))
            elif ran: cell.outputs = nbformat.from_dict(without_machine(cell.outputs, folders))
        if ran: nb.cells.insert(1, run_note(nb, name, self.paths))
        if name == "index":
            nb.cells.append(
                nbformat.v4.new_markdown_cell("```{toctree}\n:hidden:\n\nnotebooks\napi/index\n```")
            )
        nb.metadata = nbformat.from_dict(
            {
                "kernelspec": nb.metadata.get("kernelspec", {}),
                "language_info": {"name": "python", "pygments_lexer": "ipython3"},
            }
        )
        for number, cell in enumerate(nb.cells): cell.id = f"cell-{number}"
        return nbformat.writes(nb).encode()

    def link(self, found):
        "A link of a notebook to a file outside nbs/ (a figure, the licence) takes that file along."
        before, target = found.groups()
        path = posixpath.normpath(posixpath.join("nbs", target))
        source = repo_root()/path
        if path.startswith(("nbs/", "../")) or not source.is_file(): return found[0]
        self.files[path] = source.read_bytes()
        return before + path

    def chapter_link(self, found):
        "A link to a chapter that this checkout does not have becomes plain text."
        return found[1] if found[2] in STAGES and found[2] not in self.notebooks else found[0]

    def contents(self):
        "The page that lists the notebooks, from which the sidebar is made."
        chapters = [name for name in self.notebooks if name[0].isdigit()]
        appendices = [name for name in self.notebooks if name.startswith("appendix")]
        project = [name.removesuffix(".md") for name in sorted(self.files) if name.endswith(".md")]
        parts = dict(Chapters=chapters, Appendices=appendices, Project=project)
        return "\n".join([NOTEBOOKS, *(toctree(*part) for part in parts.items() if part[1])])

    def api_page(self, module):
        source = (repo_root()/"specpred"/f"{module}.py").read_text()
        notebook = re.search(r"File to edit: \S*?(\w+)\.ipynb", source)[1]
        title = f"specpred.{module}"
        return (
            f"{title}\n{'='*len(title)}\n\nDefined and explained in :doc:`../{notebook}`.\n\n"
            f".. automodule:: specpred.{module}\n   :members:\n   :show-inheritance:\n")

    def api_index(self, modules):
        self.files["figures/modules.png"] = (repo_root()/"figures"/"modules.png").read_bytes()
        return API.format(modules="\n".join(f"   {module}" for module in modules))

    def write(self, folder):
        """Writes what changed and removes what is gone, so that Sphinx reads again only what it has
        to."""
        folder.mkdir(exist_ok=True)
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            if path.relative_to(folder).as_posix() not in self.files: path.unlink()
        for name, content in self.files.items():
            path = folder/name
            if path.exists() and path.read_bytes() == content: continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def check_target(out):
    "Refuses to replace a folder that is no site."
    if not out.exists(): return
    is_site = out.is_dir() and ((out/"objects.inv").exists() or not any(out.iterdir()))
    if not is_site:
        raise InvalidInputError(
            f"{out} exists and is not a site made by this command, so it is not replaced; "
            "choose another --out."
        )


def sphinx(source, out, doctrees, modules):
    "Calls Sphinx; its warnings are errors."
    from sphinx.cmd.build import build_main
    # once, before Sphinx starts processes that would each import PyTorch
    for module in modules: importlib.import_module(f"specpred.{module}")
    quiet = [] if sys.stderr.isatty() else ["-q"]
    status = build_main(
        [
            "-b",
            "html",
            "-c",
            str(DOCS),
            "-d",
            str(doctrees),
            "-j",
            "auto",
            "-W",
            "--keep-going",
            *quiet,
            str(source),
            str(out),
        ]
    )
    if status: raise SpecpredError("Sphinx found the problems above; the site was not built.")


@contextlib.contextmanager
def workplace(out):
    "Folder for sources and Sphinx's memory: kept for the usual site, temporary for another."
    kept = DOCS/"_build"
    if out == kept/"html":
        kept.mkdir(exist_ok=True)
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="specpred-docs-") as folder: yield Path(folder)


def build(profile, data_dir, out):
    "Builds the site of one profile's last run in the folder `out`."
    started = time.time()
    check_target(out)
    profile = profile or newest_profile(data_dir)
    paths = get_paths(PROFILES[profile], data_dir)
    sources = Sources(paths)
    if not sources.executed:
        raise MissingInputError(
            f"No notebook has been executed for the profile {profile!r} in {paths.root}. "
            f"Run `make demo` first (or `specpred reproduce --profile {profile}`)."
        )
    with workplace(out) as work, atomic_path(out) as part:
        sources.write(work/"source")
        sphinx(work/"source", part, work/"doctrees", sources.modules)
    waiting = [
        name for name in STAGES if name in sources.notebooks and name not in sources.executed
    ]
    pages = [p for p in out.rglob("*.html") if "_static" not in p.parts]
    print(
        f"{len(pages)} pages, {len(sources.executed)} notebooks with "
        f"outputs of the profile {profile}"
        + (f" (without outputs: {', '.join(waiting)})" if waiting else "")
        + (
            f" (code changed since they ran, cells without outputs: {', '.join(sources.changed)})"
            if sources.changed
            else ""
        )
        + f", in {time.time() - started:.0f} s: {out / 'index.html'}"
    )


def main():
    parser = argparse.ArgumentParser(
        description="Build the documentation site from the executed notebooks of the last run."
    )
    parser.add_argument(
        "--profile",
        choices=list(PROFILES),
        help="whose run to show; the default is the one that ran last",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="folder that holds <profile>/; the default is data/ of the checkout",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=DOCS/"_build"/"html",
        help="folder of the site; the default is docs/_build/html",
    )
    given = parser.parse_args()
    try: build(given.profile, given.data_dir, given.out.expanduser().resolve())
    except (SpecpredError, OSError) as error: sys.exit(f"error: {error}")


if __name__ == "__main__": main()
