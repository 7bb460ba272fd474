"""Make the book's outer pages from its notebooks.

    python tools/docs.py readme     run nbs/index.ipynb, store its table of contents, write README.md
    python tools/docs.py maps       redraw the map at the top of every notebook, after a box was added
    python tools/docs.py build      write the site to _docs/ (with Quarto where there is one, else with smalldocs)
    python tools/docs.py serve      build, then show it on http://127.0.0.1:8000
"""
import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
KATEX = "0.16.11"  # npm package; smalldocs' pages ask a CDN for this one, ours bring it along
PARTS = {
    "0": "What you need", "1": "The networks", "2": "The diffusion", "3": "The data",
    "4": "The training", "5": "Using it", "6": "Judging it", "7": "Tutorials",
}


# What the notebooks say about themselves

def source(cell): return "".join(cell["source"])


def notebooks(nbs=ROOT / "nbs"):
    "Every notebook in reading order, index first"
    found = sorted(p for p in nbs.glob("*.ipynb") if not p.name.startswith(("_", ".")))
    return sorted(found, key=lambda p: p.stem != "index")


def opening(path):
    "The title and the promise of a notebook, from its first cell"
    first = source(json.loads(path.read_text(encoding="utf-8"))["cells"][0])
    return re.search(r"^# +(.+?) *$", first, re.M).group(1), re.search(r"^> *(.+?) *$", first, re.M).group(1)


def part(path):
    "The part of the book that a notebook belongs to, by its decade; None for the front page"
    return PARTS.get(path.name[0])


def contents(nbs=ROOT / "nbs"):
    "The table of contents as Markdown: one line for each notebook"
    lines = []
    for path in notebooks(nbs):
        if part(path) is None: continue
        if f"**{part(path)}**" not in lines: lines += ["", f"**{part(path)}**", ""]
        name = path.stem.replace("_", " ", 1).replace("__", r"\_\_")
        lines.append(f"- [{name}]({path.name}): {opening(path)[1]}")
    return "\n".join(lines).strip()


def page(name):
    "The name of a notebook's page: `12_model.unet.ipynb` is read at `model.unet.ipynb`"
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", name)


# README.md

LINK = re.compile(r"(\]\()(?!https?:|#|/|mailto:)([^)]+\))")


def as_markdown(nb):
    "A notebook as Markdown for the top of the repository: prose, shown code, and outputs that are Markdown or text"
    out = []
    for cell in nb["cells"]:
        text = source(cell).strip()
        if cell["cell_type"] == "markdown":
            out.append(text)
            continue
        directives = re.findall(r"^#\| *(\S+) *(\S*)", text, re.M)
        code = re.sub(r"^#\|.*\n?", "", text, flags=re.M).strip()
        if ("hide", "") in directives or not code: continue
        if ("echo:", "false") not in directives: out.append(f"```python\n{code}\n```")
        for data in (o.get("data", {}) for o in cell["outputs"]):
            plain = "".join(data.get("text/plain", ""))
            out.append("".join(data["text/markdown"]).strip() if "text/markdown" in data else f"```\n{plain}\n```")
    text = LINK.sub(r"\1nbs/\2", "\n\n".join(out))
    return text.replace("](nbs/../", "](") + "\n"


def run_index(nbs):
    "Run index.ipynb in its folder; return it with fresh outputs, clean"
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    nb = read_nb(nbs / "index.ipynb")
    shell = CaptureShell()
    shell.run(f"import os; os.chdir({str(nbs)!r})")
    shell.run_all(nb, exc_stop=True)
    clean_nb(nb)
    return nb


def readme():
    "Refresh the outputs of index.ipynb and write README.md from it"
    from execnb.nbio import nb2str, write_nb
    nb = run_index(ROOT / "nbs")
    write_nb(nb, ROOT / "nbs" / "index.ipynb")
    (ROOT / "README.md").write_text(as_markdown(json.loads(nb2str(nb))), encoding="utf-8")
    return ROOT / "README.md"


def maps():
    "Redraw the map of every notebook and store it there"
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    shell = CaptureShell(mpl_format="png")
    for path in notebooks():
        nb = read_nb(path)
        for cell in nb.cells:
            if cell.cell_type != "code" or not re.search(r"^#\| *echo: false", cell.source, re.M) or "sd_map(" not in cell.source: continue
            shell.cell(cell)
            if shell.exc: raise SystemExit(f"{path.name}: {shell.exc}")
            clean_nb(nb)
            write_nb(nb, path)


# The site

def settings():
    "The project's settings.ini"
    from nbdev.config import get_config
    return get_config(path=ROOT)


def relink(text, cfg):
    "Links of a notebook as the site needs them: pages without their number, files of the repository at its host"
    text = re.sub(r"\]\((\d+[a-zA-Z0-9]*_[^)/]+\.ipynb)", lambda m: f"]({page(m.group(1))}", text)
    return re.sub(r"\]\(\.\./([^)]+)\)", rf"]({cfg.git_url}/blob/{cfg.branch}/\1)", text)


def defines(code):
    "Does nbdev have to run this cell to show signatures? Yes when it exports, or does nothing but import"
    if re.search(r"^#\| *(export|default_exp)", code, re.M): return True
    try: tree = ast.parse(code)
    except SyntaxError: return False
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body)


def process(src, dst):
    "Make a notebook's page as nbdev_proc_nbs does (directives, signatures, links), but keep the stored outputs"
    from execnb.nbio import read_nb, write_nb
    from nbdev.processors import FilterDefaults
    nb = read_nb(src)
    for cell in nb.cells:
        if cell.cell_type == "code" and not defines(cell.source): cell.source = "#| eval: false\n" + cell.source
        if cell.cell_type == "markdown": cell.source = relink(cell.source, settings())
        for data in (o.get("data", {}) for o in cell.get("outputs", [])):
            if "text/markdown" in data: data["text/markdown"] = relink("".join(data["text/markdown"]), settings()).splitlines(True)
    FilterDefaults()(nb)
    for cell in nb.cells:  # nbdev keeps the number and renames the output; here the page itself is renamed
        if cell.cell_type == "raw": cell.source = re.sub(r"^output-file:.*\n", "", cell.source, flags=re.M)
    write_nb(nb, dst)


def sidebar(paths):
    "The sidebar: the front page, then one section for each decade of notebooks"
    rows = [{"text": "The book", "href": "index.ipynb"}]
    for path in paths:
        if part(path) is None: continue
        if rows[-1].get("section") != part(path): rows.append({"section": part(path), "contents": []})
        rows[-1]["contents"].append({"text": f"{path.name[:path.name.index('_')]} {opening(path)[0]}", "href": page(path.name)})
    return {"website": {"sidebar": {"contents": rows}}}


def website():
    "The site's title and addresses, from settings.ini"
    cfg = settings()
    home = f"{cfg.doc_host}{cfg.doc_baseurl}"
    values = {"title": cfg.title, "description": cfg.description, "repo-url": cfg.git_url, "repo-branch": cfg.branch}
    return {"website": {**values, "site-url": home}}


def prepare(work):
    "Fill `work` with everything that a renderer reads"
    import yaml
    from nbdev.doclinks import _build_modidx
    _build_modidx(skip_exists=True)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(ROOT / "nbs" / "images", work / "images")
    shutil.copy2(ROOT / "nbs" / "styles.css", work)
    shutil.copy2(ROOT / "_quarto.yml", work)
    paths = notebooks()
    for name, values in (("nbdev.yml", website()), ("sidebar.yml", sidebar(paths))):
        (work / name).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    for path in paths:
        print("page", path.name, flush=True)
        process(path, work / page(path.name))


def render(work):
    "Run Quarto where there is one, else smalldocs"
    quarto = shutil.which("quarto")
    command = [quarto, "render", "-M", "html-math-method:katex"] if quarto else [sys.executable, "-m", "smalldocs.cli", "render", "--quiet"]
    done = subprocess.run(command, cwd=work)
    if done.returncode: raise SystemExit(f"{' '.join(command)} failed with code {done.returncode}")
    return work / "_site"


def katex():
    "A folder with KaTeX from npm, fetched once; None when there is no npm or no registry"
    folder = ROOT / "build" / f"katex-{KATEX}"
    if (folder / "package" / "dist").is_dir(): return folder / "package" / "dist"
    if not shutil.which("npm"): return None
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"katex@{KATEX}"]
    try: subprocess.run(command, cwd=folder, check=True, timeout=120, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (subprocess.SubprocessError, OSError): return None
    with tarfile.open(next(folder.glob("*.tgz"))) as tar: tar.extractall(folder, filter="data")
    return folder / "package" / "dist"


def mend(site):
    "Let formulas come from the site itself, and links between pages be relative, so that all of it works offline"
    dist = katex()
    if dist: shutil.copytree(dist, site / "site_libs" / "katex", ignore=shutil.ignore_patterns("*.mjs", "README.md"))
    else: print("no KaTeX here: formulas will come from a CDN")
    pages = {p.relative_to(site).as_posix(): p.read_text(encoding="utf-8") for p in site.rglob("*.html")}
    ids = {name: set(re.findall(r'\sid="([^"]+)"', text)) for name, text in pages.items()}
    home = settings().doc_host + settings().doc_baseurl + "/"

    def local(match):
        name, _, anchor = unquote(match.group(1)).partition("#")
        if name not in pages: return match.group(0)
        whole = [a for a in (anchor, anchor.partition(".")[0]) if a in ids[name]]  # a method is shown with its class
        return f'href="{name}#{whole[0]}"' if whole else f'href="{name}"'

    for name, text in pages.items():
        up = "../" * name.count("/")
        if dist: text = re.sub(r"https://cdn\.jsdelivr\.net/npm/katex@[^/]+/dist/", f"{up}site_libs/katex/", text)
        text = re.sub(rf'href="{re.escape(home)}([^"]*)"', local, text)
        (site / name).write_text(text, encoding="utf-8")


def build(out):
    "Write the site to `out`; what was there before goes only when the new one is complete"
    work = out.parent / "_proc"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(work)
    site = render(work)
    mend(site)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(site, out)
    print(f"wrote {len(list(out.rglob('*.html')))} pages to {out}")


def server(folder, port):
    "An HTTP server of a folder, on loopback only"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Quiet, directory=str(folder)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["readme", "maps", "build", "serve"])
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the site")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    if args.what == "readme": return print(f"wrote {readme()}")
    if args.what == "maps": return maps()
    build(args.out.resolve())
    if args.what == "serve":
        print(f"http://127.0.0.1:{args.port}  (Ctrl-C ends)")
        try: server(args.out, args.port).serve_forever()
        except KeyboardInterrupt: pass


if __name__ == "__main__": main()
