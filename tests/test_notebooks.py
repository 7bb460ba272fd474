"""The notebooks are the source: they export the package, they are clean, they run, they have one shape, and README follows them."""
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith(("_", ".")))
PARTS = [p for p in NOTEBOOKS if p.stem != "index"]
TUTORIALS = "7"  # the decade that exports nothing
JUDGES = ["diffusers", "transformers", "nbdev", "execnb", "datasets", "webdataset", "pytest", "accelerate", "peft"]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_part = pytest.mark.parametrize("path", PARTS, ids=lambda p: p.stem)


def run(*args, cwd=ROOT, timeout=300, **env):
    """Run this Python; stop it and everything it started when it takes too long; return code and output."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "PYTHONWARNINGS": "ignore", **env}
    env.pop("IN_TEST", None)  # nbdev exports nothing when this is set
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    process = subprocess.Popen([sys.executable, *args], cwd=cwd, env=env, **options)
    try: out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{args[-1]} took more than {timeout} s")
    return process.returncode, out


def cells(path, kind=None):
    """Sources of the cells of a notebook, all or of one kind."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in found if kind in (None, c["cell_type"])]


def copy_project(folder):
    """A copy of what nbdev and tools/docs.py need; the package itself holds nothing but its __init__ files."""
    for name in ("nbs", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs"))
    for name in ("settings.ini", "setup.py", "_quarto.yml"): shutil.copy2(ROOT / name, folder)
    for path in (ROOT / "sd_nb").rglob("__init__.py"):
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, folder / path.relative_to(ROOT))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A copy of the project whose package was just exported from the notebooks."""
    folder = copy_project(tmp_path_factory.mktemp("exported"))
    code, out = run("-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=folder)
    assert code == 0, out
    return folder


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    """A copy of the project whose notebooks were just cleaned."""
    folder = copy_project(tmp_path_factory.mktemp("cleaned"))
    code, out = run("-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=folder)
    assert code == 0, out
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A copy of the project in which notebooks may run and write."""
    return copy_project(tmp_path_factory.mktemp("scratch"))


def modules(folder):
    """Every module of the package in a folder, with its text."""
    found = sorted((folder / "sd_nb").rglob("*.py"))
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in found}


def test_package_is_what_the_notebooks_export(exported):
    """Exporting again changes no module, adds none and leaves none over (`nbdev_export` mends it)."""
    fresh, ours = modules(exported), modules(ROOT)
    assert set(fresh) == set(ours)
    assert [name for name in fresh if fresh[name] != ours[name]] == []


@each_notebook
def test_notebook_is_clean(path, cleaned):
    """Cleaning again changes nothing (`nbdev_clean` mends it)."""
    assert (cleaned / "nbs" / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8")


RUNNER = """
import sys
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
nb, skip = read_nb(sys.argv[1]), set(sys.argv[2].split())
shell = CaptureShell(mpl_format="png")
for cell in nb.cells:
    directives = {w for line in cell.source.splitlines() if line.startswith("#|") for w in line[2:].split()[:1]}
    if directives & skip or "#| eval: false" in cell.source: continue
    shell.cell(cell)
    if shell.exc: sys.exit(f"{cell.source}\\n\\n" + "".join(cell.outputs[-1]["traceback"]))
"""


@pytest.fixture(scope="module")
def runs(request, scratch):
    """The chosen notebooks, started side by side, one process and one thread on each core."""
    skip = re.search(r"^tst_flags = (.*)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M).group(1)
    chosen = [i.callspec.params["path"] for i in request.session.items if getattr(i, "originalname", "") == "test_notebook_runs"]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {path: pool.submit(run, "-c", RUNNER, path.name, skip, cwd=scratch / "nbs", OMP_NUM_THREADS="1") for path in chosen}
    pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(1800)  # waits for its turn
@each_notebook
def test_notebook_runs(path, runs):
    """Every cell runs, from top to bottom, in a fresh process."""
    code, out = runs[path].result()
    assert code == 0, out[-4000:]


@each_notebook
def test_stored_outputs_are_presentable(path):
    """What a reader sees holds no error and no path of somebody's machine."""
    outputs = [o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
    assert [o for o in outputs if o["output_type"] == "error"] == []
    texts = [{**o, "data": {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")}} for o in outputs]
    assert re.findall(r"/(?:home|root|work|Users)/\S*", json.dumps(texts)) == []


@each_part
def test_notebook_has_the_shape(path):
    """Title and promise, the map with its own box, the module it is named after, Summary and Exercises."""
    markdown, code = cells(path, "markdown"), cells(path, "code")
    module = path.stem.split("_", 1)[1]
    assert re.fullmatch(r"# \S.*\n\s*> \S.*\s*", markdown[0]), "the first cell is a title and a promise of one line"
    for heading in ("## Summary", "## Exercises"):
        assert any(re.search(f"^{heading} *$", text, re.M) for text in markdown), f"no {heading}"
    if path.name.startswith(TUTORIALS): return
    assert f"#| default_exp {module}" in "\n".join(code).splitlines(), f"does not export {module}"
    assert any(re.search(rf"sd_map\([\"']{re.escape(module)}[\"']\)", text) for text in code), "no map of where we are"


@pytest.mark.parametrize("path", PARTS[:-1], ids=lambda p: p.stem)
def test_notebook_leads_on(path):
    """The end of a notebook points to the next one to read."""
    assert re.search(r"^Next: .*\]\(\d+[^)]*\.ipynb\)", cells(path, "markdown")[-1], re.M)


@each_notebook
def test_links_between_notebooks_hold(path):
    """Every link to a file of the repository finds it."""
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", "\n".join(cells(path, "markdown")))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_readme_follows_the_index(scratch):
    """README.md and the outputs of index.ipynb are what `python tools/docs.py readme` writes."""
    code, out = run("tools/docs.py", "readme", cwd=scratch)
    assert code == 0, out
    for name in ("README.md", "nbs/index.ipynb"):
        assert (scratch / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8"), name


def test_readme_names_the_two_commands():
    """The main job and the tests are one command each, and .ci/run calls the same test command."""
    readme, gate = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    test = "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/pytest"
    assert "\npython3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/sd-nb demo\n" in readme
    assert f"\n{test}\n" in readme and f"\n{test}\n" in gate


IMPORTER = """
import importlib, pkgutil, sys
import sd_nb
for m in pkgutil.walk_packages(sd_nb.__path__, "sd_nb."): importlib.import_module(m.name)
print(" ".join(sorted(set(sys.modules) & set(sys.argv[1].split()))))
"""


def test_package_needs_no_judge():
    """Importing every module imports neither diffusers nor transformers nor anything else that only development has."""
    code, out = run("-c", IMPORTER, " ".join(JUDGES))
    assert code == 0, out
    assert out.strip().splitlines()[-1:] in ([], [""]), out


ABOVE = {  # part -> the parts of ours that it must not import: no arrow runs back up
    "model": "diffusion data train interop opening pipeline demo cli config viz".split(),
    "diffusion": "model data train interop opening pipeline demo cli config viz".split(),
    "viz": "model diffusion data train interop opening pipeline demo cli config".split(),
    "data": "train opening pipeline demo cli".split(),
    **{part: "data train pipeline demo generate convert download cli".split()
       for part in ("foreign", "interop", "seed", "single_file", "opening")},
    "lora": "data train demo generate convert download cli".split(),
    "pipeline": "data train demo generate convert download cli".split(),
    "edit": "data train demo generate convert download cli".split(),
    "convert": "data train pipeline demo generate cli".split(),
    "download": "data train pipeline generate convert cli".split(),
    "train": "demo generate convert download cli".split(),
}


def imports(name, text):
    """Full names of what a module imports, also inside its functions; nbdev writes our own names as relative ones."""
    package = name.split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*start, *filter(None, [node.module]), alias.name]) for alias in node.names)


def test_no_import_runs_back_up():
    """The ground floors import nothing of ours, and no part imports one that stands on it, not even inside a function."""
    wrong = []
    for name, text in modules(ROOT).items():
        above = ABOVE.get(Path(name).parts[1].removesuffix(".py"), [])
        wrong += [f"{name} imports {m}" for m in imports(name, text) if m.startswith("sd_nb.") and m.split(".")[1] in above]
    assert wrong == []


def test_code_is_tidy():
    """ruff finds nothing in the package, the tests and the tools."""
    code, out = run("-m", "ruff", "check", "sd_nb", "tests", "tools")
    assert code == 0, out
