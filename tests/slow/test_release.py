"""What is given away: the distributions, the site of docs/ and its notebook, each built as a user would.

`make test-slow` installs the tools.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import latent_sft

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
FEW = ["data.synthetic.num_train=256", "data.synthetic.num_validation=16", "data.validation_size=16"]
FEW += ["data.synthetic.num_test=16", "train.max_steps=2", "train.eval_every=2", "train.eval_examples=8"]
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}


def run(*words: object, cwd: Path, **environ: str) -> str:
    done = subprocess.run([*map(str, words)], cwd=cwd, env={**ENVIRON, **environ}, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the sdist, of a copy of what git tracks."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=source)
    return out


def test_the_distributions_pass_twine_and_have_one_version(dist: Path) -> None:
    names = sorted(path.name for path in dist.iterdir())
    version = latent_sft.__version__
    assert names == [f"latent_sft-{version}-py3-none-any.whl", f"latent_sft-{version}.tar.gz"]
    shown = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)
    assert shown.count("PASSED") == 2
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"constraints.txt", "configs/quickstart.yaml", "latent_sft/py.typed", "CHANGELOG.md"} <= held


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_an_installation_runs_the_quickstart_outside_the_repository(dist: Path, tmp_path: Path, kind: str) -> None:
    """In a new environment that sees the libraries of this one, and not this checkout."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    folder = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    libraries = [path for path in sys.path if path.endswith("site-packages")] or site.getsitepackages()
    (folder / "libraries.pth").write_text("\n".join(libraries))  # their own .pth files, editable installs, do not count
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    [package] = dist.glob(f"*.{kind}")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, package, cwd=tmp_path)
    away = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    where = run(python, "-c", "import latent_sft; print(latent_sft.__file__)", cwd=tmp_path, **away)
    assert Path(where.strip()).is_relative_to(tmp_path)
    command = tmp_path / "venv" / "bin" / "latent-sft"
    assert run(command, "--version", cwd=tmp_path, **away) == f"latent-sft {latent_sft.__version__}\n"
    assert "name: quickstart" in run(command, "config", "quickstart", cwd=tmp_path, **away)
    if kind == "tar.gz":  # the same files
        return
    run(command, "run", "quickstart", *FEW, cwd=tmp_path, **away)
    assert json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    exported = tmp_path / "runs/quickstart/export"
    solved = json.loads(run(command, "generate", exported, "bob has 3 . how many ?", "--json", cwd=tmp_path, **away))
    assert solved["answer"] is not None


def test_the_site_builds_strictly_and_every_link_of_it_leads_somewhere(tmp_path: Path) -> None:
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site", cwd=ROOT)
    pages = {page: page.read_text() for page in (tmp_path / "site").rglob("*.html") if page.name != "404.html"}
    broken, count = [], 0
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="?([^">\s]+)', text):
            if re.match(r"[a-z]+:|//|#", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve()
            target = target / "index.html" if target.is_dir() else target
            count += 1
            if not target.exists() or (anchor and not re.search(f'id="?{re.escape(anchor)}["> ]', pages[target])):
                broken.append((page.name, link))
    assert count > 1000 and not broken
    reference = pages[tmp_path / "site" / "api" / "index.html"]
    homes = {name: latent_sft._HOME[name] for name in latent_sft.__all__}
    assert not [name for name, home in homes.items() if f'id="latent_sft.{home}"' not in reference]


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    path = ROOT / "docs" / "quickstart.ipynb"
    assert path.stat().st_size < 10_000, "committed without outputs"
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    [settings] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    settings.source = f"settings = {[*FEW, f'run_dir={tmp_path}/run']}"
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the row of latents is drawn"
    printed = [output["text"] for output in outputs if output.get("name") == "stdout"]
    assert printed
