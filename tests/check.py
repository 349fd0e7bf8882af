"""All checks, cheap ones first: what `make test` and continuous integration run.

1. style: ruff; no tuple as a statement; modules import earlier chapters only
2. specpred/ is what nbdev exports from nbs/, notebooks are clean, README.md is index.ipynb
3. tests/, two at a time: the notebooks' own checks, and a smoke run that many tests look at

`python tests/check.py --style` makes the first of them only.
"""
import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
READ_BY_PEOPLE = ("nbs", "tests", "docs", "benchmarks")


def run(*command, cwd=ROOT, **kwargs):
    return subprocess.run([str(part) for part in command], cwd=cwd, **kwargs)


def sources():
    "Every code cell and every script, each with its place."
    for folder in READ_BY_PEOPLE:
        for path in sorted((ROOT/folder).glob("*.py")):
            yield path.relative_to(ROOT), path.read_text()
        for path in sorted((ROOT/folder).glob("*.ipynb")):
            for cell in json.loads(path.read_text())["cells"]:
                if cell["cell_type"] == "code":
                    yield f"{path.relative_to(ROOT)} [{cell['id']}]", "".join(cell["source"])


def tuples_as_statements():
    "Statements such as `a.append(x), b.append(y)`, which ruff does not see."
    problems = []
    for place, source in sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple):
                problems.append(f"{place}:{node.lineno}: a tuple as a statement")
    return problems


def imported_modules(tree):
    "Names of this package's modules that the statements import, anywhere."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("specpred."):
            yield node.module.partition(".")[2]
        elif isinstance(node, ast.ImportFrom) and node.module == "specpred":
            yield from (alias.name for alias in node.names)


def imports_of_later_chapters():
    "An appendix counts as coming right after the last chapter that it imports."
    chapters, imports = {}, {}
    for path in sorted((ROOT/"specpred").glob("*.py")):
        if notebook := re.search(r"File to edit: \.\./nbs/(\w+)\.ipynb", path.read_text()):
            chapters[path.stem] = notebook[1]
            imports[path.stem] = set(imported_modules(ast.parse(path.read_text())))
    for module in [name for name, notebook in chapters.items() if notebook.startswith("appendix")]:
        chapters[module] = max((chapters[name] for name in imports[module]), default="00") + "~"
    return [f"specpred/{module}.py imports {name}, which is no earlier chapter"
        for module, names in imports.items() for name in sorted(names)
        if chapters.get(name, "~") >= chapters[module]]


def style():
    if run(BIN/"ruff", "check", "--quiet", *READ_BY_PEOPLE).returncode: return ["ruff: see above"]
    return tuples_as_statements() + imports_of_later_chapters()


def fresh_export(copy):
    "Exports and cleans in a copy, so that a check never changes the working tree."
    for name in ("nbs", "settings.ini", "setup.py", "README.md"):
        make = shutil.copytree if (ROOT/name).is_dir() else shutil.copy
        make(ROOT/name, copy/name)
    run("git", "init", "--quiet", cwd=copy, check=True)  # or nbdev looks for settings further up
    quiet = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # with it nbdev exports nothing
    for command in ("nbdev_export", "nbdev_clean"):
        run(BIN/command, cwd=copy, check=True, env=quiet)


def not_in_sync():
    problems = []
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/"specpred"
        copy.mkdir()
        fresh_export(copy)
        for folder, suffix, command in (("specpred", "py", "export"), ("nbs", "ipynb", "clean")):
            here, there = ROOT/folder, copy/folder
            names = {path.name for path in (*here.glob(f"*.{suffix}"), *there.glob(f"*.{suffix}"))}
            _, different, missing = filecmp.cmpfiles(here, there, names, shallow=False)
            problems += [f"{folder}/{name}: run nbdev_{command}" for name in different + missing]
    for path in sorted((ROOT/"nbs").glob("*.ipynb")):
        if '"output_type"' in path.read_text():
            problems.append(f"nbs/{path.name} holds outputs: clear them in Jupyter and save")
    if run(sys.executable, "docs/readme.py", "--check").returncode: problems.append("README.md")
    return problems


def pytest():
    threads = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = run(sys.executable, "-m", "pytest", "tests", "-q", "-ra", "--durations=15",
        "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", env=threads)
    return ["tests have failed"]*bool(done.returncode)


def main():
    for check in (style,) if "--style" in sys.argv else (style, not_in_sync, pytest):
        print(f"\n=== {check.__name__.replace('_', ' ')}", flush=True)
        if problems := check(): sys.exit("\n".join(problems))


if __name__ == "__main__": main()
