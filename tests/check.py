"""All checks, in the order in which they are cheap: what `make test` and continuous integration run.

1. specpred/ is what nbdev exports from nbs/, and the notebooks are clean
2. every definition's checks in the notebooks (nbdev_test)
3. tests/ (whole pipeline: a smoke run from nothing), the last of which compares README.md with index.ipynb
"""
import filecmp, json, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def step(title):
    print(f"\n=== {title}", flush=True)


def run(*command, cwd=ROOT, **kwargs):
    return subprocess.run([str(c) for c in command], cwd=cwd, **kwargs)


def exported_in_sync():
    "Exports and cleans in a copy, so that a check never changes the working tree, and compares."
    problems = []
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/"specpred"
        for name in ("nbs", "settings.ini", "setup.py", "README.md"):
            source = ROOT/name
            shutil.copytree(source, copy/name, ignore=shutil.ignore_patterns(".ipynb_checkpoints")) if source.is_dir() else shutil.copy(source, copy/name)
        # git keeps nbdev from walking up to another checkout's settings
        run("git", "init", "--quiet", cwd=copy, check=True)
        quiet = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # with it set, nbdev exports nothing
        run(BIN/"nbdev_export", cwd=copy, check=True, env=quiet)
        run(BIN/"nbdev_clean", cwd=copy, check=True, env=quiet)
        modules = {p.name for folder in (ROOT/"specpred", copy/"specpred") for p in folder.glob("*.py")}
        for name in sorted(modules):
            here, fresh = ROOT/"specpred"/name, copy/"specpred"/name
            if not (here.exists() and fresh.exists() and filecmp.cmp(here, fresh, shallow=False)):
                problems.append(f"specpred/{name} is not what nbdev_export makes: run nbdev_export")
        for notebook in sorted((ROOT/"nbs").glob("*.ipynb")):
            if notebook.read_bytes() != (copy/"nbs"/notebook.name).read_bytes():
                problems.append(f"nbs/{notebook.name} is not clean: run nbdev_clean")
            if any(cell.get("outputs") for cell in json.loads(notebook.read_text())["cells"]):
                problems.append(f"nbs/{notebook.name} holds outputs: clear them (jupyter nbconvert --clear-output --inplace)")
    return problems


def notebook_checks():
    "nbdev_test reports success also when it finds no notebook: count them and report each."
    notebooks = sorted((ROOT/"nbs").glob("[0-9a-z]*.ipynb"))
    assert len(notebooks) >= 13, f"only {len(notebooks)} notebooks in nbs/"
    waiting, running, failed = list(notebooks), {}, []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    while waiting or running:
        while waiting and len(running) < 2:
            notebook = waiting.pop(0)
            log = tempfile.TemporaryFile("w+")
            running[notebook] = (subprocess.Popen([BIN/"nbdev_test", "--path", notebook, "--n_workers", "0"], cwd=ROOT,
                stdout=log, stderr=subprocess.STDOUT, env=environment), log, time.time())
        for notebook, (process, log, started) in list(running.items()):
            if process.poll() is None: continue
            del running[notebook]
            log.seek(0)
            text = log.read()
            good = process.returncode == 0 and "Success" in text
            print(f"{'passed' if good else 'FAILED'}  {notebook.name:32} {time.time() - started:5.1f} s", flush=True)
            if not good: failed.append(notebook.name), print(text, flush=True)
        time.sleep(0.1)
    print(f"notebooks: {len(notebooks) - len(failed)} passed, {len(failed)} failed", flush=True)
    return [f"checks of nbs/{name} failed" for name in failed]


def main():
    step("export in sync, notebooks clean")
    if problems := exported_in_sync(): sys.exit("\n".join(problems))
    step("checks of the definitions in the notebooks")
    if problems := notebook_checks(): sys.exit("\n".join(problems))
    step("tests of the whole pipeline")
    sys.exit(run(sys.executable, "-m", "pytest", "tests", "-q", "-ra", "--durations=10").returncode)


if __name__ == "__main__": main()
