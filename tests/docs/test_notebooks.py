"""The notebooks can be opened elsewhere: they install themselves, and keep nothing of a machine."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, load_script

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
BADGES = load_script("docs/badges.py")


def cells_of(name, kind="code"):
    path = next(path for path in NOTEBOOKS if path.stem == name)
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def install(name, **replaced):
    """Runs the install cell of a notebook, with other values of its constants."""
    source = cells_of(name)[0]
    for constant, value in replaced.items():
        source, count = re.subn(
            rf"^{constant} = .*$", f"{constant} = {value!r}", source, flags=re.M
        )
        assert count == 1
    exec(compile(source, f"{name}.ipynb", "exec"), {})


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What would be run where ragjax is not installed and there is no accelerator."""
    ran = []
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ragjax" else find_spec(name)
    )
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.setattr("shutil.which", lambda program: None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.chdir(tmp_path)
    return ran


@pytest.mark.parametrize("name", NAMES)
def test_the_install_cell_does_nothing_where_ragjax_is_there(monkeypatch, name):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    install(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_install_cell_asks_for_the_repository(commands, name):
    with pytest.raises(ValueError, match="put the repository's address into REPOSITORY"):
        install(name, REPOSITORY="")
    assert not commands


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hardware", ["", "cuda12", "tpu"])
def test_the_install_cell_installs_jax_for_the_hardware(commands, monkeypatch, name, hardware):
    if hardware == "cuda12":
        monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    if hardware == "tpu":
        found = {"accel*": [Path("/dev/accel0")]}
        monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(found.get(pattern, ())))
    install(name, REPOSITORY="https://host.test/ragjax.git")
    clone, pip = commands
    assert clone[:2] == ["git", "clone"] and "https://host.test/ragjax.git" in clone
    assert pip[:4] == [sys.executable, "-m", "pip", "install"]
    extras = f"notebooks,{hardware}" if hardware else "notebooks"
    assert pip[-1] == f"./{clone[-1]}[{extras}]"


@pytest.mark.parametrize("name", NAMES)
def test_a_second_try_does_not_clone_again(commands, name):
    Path("ragjax-source").mkdir()
    install(name, REPOSITORY="https://host.test/ragjax.git")
    assert [command[1:4] for command in commands] == [["-m", "pip", "install"]]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_has_a_badge_that_opens_this_notebook(name):
    (badge,) = BADGES.BADGE.finditer(cells_of(name, "markdown")[0])
    assert badge[2] == f"{name}.ipynb"


@pytest.mark.parametrize("page", BADGES.PAGES, ids=lambda page: page.name)
def test_every_badge_and_address_is_the_one_of_setup_cfg(page):
    text, address = page.read_text("utf-8"), "https://github.com/someone/ragjax"
    assert BADGES.addressed(text, BADGES.public_address()) == text  # else: python docs/badges.py
    public = BADGES.addressed(text, address)
    links = re.findall(r"\]\((https://colab\.research\.google\.com/github/[^)]*)\)", public)
    place = "https://colab.research.google.com/github/someone/ragjax/blob/main/"
    assert all(link.startswith(place) for link in links)
    assert all((ROOT / link.removeprefix(place)).exists() for link in links)
    assert BADGES.addressed(public, BADGES.public_address()) == text
    if page in NOTEBOOKS:
        json.loads(public)
        assert len(links) == public.count(f'REPOSITORY = \\"{address}\\"') == 1


def test_an_address_that_colab_does_not_open_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(BADGES, "ROOT", tmp_path)
    assert BADGES.public_address() == ""
    (tmp_path / "setup.cfg").write_text("[metadata]\nurl = https://github.com/some.one/rag-jax/\n")
    assert BADGES.public_address() == "https://github.com/some.one/rag-jax"
    (tmp_path / "setup.cfg").write_text("[metadata]\nurl = https://github.com/a/b.git\n")
    assert BADGES.public_address() == "https://github.com/a/b"
    (tmp_path / "setup.cfg").write_text("[metadata]\nurl = https://host.test/ragjax\n")
    with pytest.raises(ValueError, match="host.test.*OWNER/NAME"):
        BADGES.public_address()


def test_the_devices_are_split_before_jax_is_imported():
    cells = cells_of("tpu")
    flag = next(i for i, cell in enumerate(cells) if "force_host_platform_device_count" in cell)
    imports = [
        i
        for i, cell in enumerate(cells)
        for node in ast.walk(ast.parse(cell))
        if isinstance(node, ast.Import) and any(alias.name == "jax" for alias in node.names)
    ]
    assert imports and flag < min(imports)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_of_a_run_has_no_error_and_no_path_of_a_machine(path):
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            assert output["output_type"] != "error"
            text = json.dumps({key: output.get(key) for key in ("text", "data")})
            assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|usr)/", text)
