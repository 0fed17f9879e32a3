"""One file out of many modules: the same definitions, only those needed, and no change of meaning."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from latent_sft.export.bundle import bundle


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an importable, empty package `demo_pkg`."""
    folder = tmp_path / "demo_pkg"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [m for m in sys.modules if m.split(".")[0] == "demo_pkg"]:
        del sys.modules[name]


def write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)
    importlib.invalidate_caches()


def run(source: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    module = type(sys)("bundled")
    monkeypatch.setitem(sys.modules, "bundled", module)
    exec(source, module.__dict__)
    return module.__dict__


def test_renamed_and_whole_module_imports_mean_the_same(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(package, "base", "import math\n\n# why two\nTWO = 2\n\n\ndef area(r):\n    return math.pi * r**TWO\n")
    write(package, "tools", "from demo_pkg import base\n\n\ndef work(r):\n    return base.area(r) + base.TWO\n")
    write(
        package,
        "main",
        "from demo_pkg.tools import work as do\n\nSHIFT: int = None\n\n\ndef work(r):\n    return do(r) + SHIFT\n",
    )
    source, used = bundle("demo_pkg.main", "work", values={"SHIFT": "10"})
    assert run(source, monkeypatch)["work"](1.0) == pytest.approx(3.14159265 + 2 + 10)
    assert used == ["demo_pkg.base", "demo_pkg.tools", "demo_pkg.main"]
    assert "demo_pkg import" not in source
    assert "# why two\nTWO = 2" in source


def test_what_is_not_reached_is_left_out(package: Path) -> None:
    unused = "def unused():\n    return json.dumps(A)\n\n\ndef heavy():\n    import deepspeed\n    return deepspeed\n"
    write(package, "base", f"import json\nimport os\n\nA = os.sep\n\n\n{unused}")
    write(package, "main", "from demo_pkg.base import A\n\n\ndef f():\n    return A\n")
    source, _ = bundle("demo_pkg.main", "f", values={})
    assert "unused" not in source
    assert "import json" not in source
    assert "deepspeed" not in source
    assert "import os" in source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("if True:\n    A = 1\n", r"demo_pkg\.base:1: only definitions"),
        ("def f():\n    import os\n    return os\n\nA = f()\n", r"demo_pkg\.base:2: only definitions"),
    ],
)
def test_what_cannot_be_copied_is_refused(package: Path, text: str, message: str) -> None:
    write(package, "base", text)
    write(package, "main", "from demo_pkg.base import A\n\n\ndef f():\n    return A\n")
    with pytest.raises(ValueError, match=message):
        bundle("demo_pkg.main", "f", values={})


def test_two_helpers_of_one_name_are_refused(package: Path) -> None:
    write(package, "one", "def _h():\n    return 1\n\n\ndef one():\n    return _h()\n")
    write(package, "two", "def _h():\n    return 2\n\n\ndef two():\n    return _h()\n")
    write(
        package,
        "main",
        "from demo_pkg.one import one\nfrom demo_pkg.two import two\n\n\ndef f():\n    return one() + two()\n",
    )
    with pytest.raises(ValueError, match=r"'_h' is defined in demo_pkg\.one and demo_pkg\.two"):
        bundle("demo_pkg.main", "f", values={})


def test_an_entry_must_not_capture_a_name_used_elsewhere(package: Path) -> None:
    write(package, "one", "def f(n):\n    return f(n - 1) if n else 0\n")
    write(package, "main", "from demo_pkg.one import f as other\n\n\ndef f(n):\n    return other(n) + 1\n")
    with pytest.raises(ValueError, match="'f' is defined in"):
        bundle("demo_pkg.main", "f", values={})


def test_the_entry_must_exist(package: Path) -> None:
    write(package, "main", "A = 1\n")
    with pytest.raises(ValueError, match=r"demo_pkg\.main does not define 'g'"):
        bundle("demo_pkg.main", "g", values={})
