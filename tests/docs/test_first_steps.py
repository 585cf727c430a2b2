"""The Dockerfile builds from what is there; the guide for assistants and the picture are true."""

import configparser
import re
import shlex
from xml.etree import ElementTree

from programs import ROOT

SETTINGS = configparser.ConfigParser(interpolation=None)
SETTINGS.read(ROOT / "setup.cfg", encoding="utf-8")


def instructions():
    """The instructions of the Dockerfile in order: name and rest."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]


def values(name):
    return [rest for kind, rest in instructions() if kind == name]


def test_the_image_has_a_python_that_the_package_takes():
    (python,) = [value for value in values("ARG") if value.startswith("PYTHON=")]
    assert (
        f"Programming Language :: Python :: {python.partition('=')[2]}"
        in SETTINGS["metadata"]["classifiers"].splitlines()
    )
    assert values("FROM") == ["python:${PYTHON}-slim"]


def test_what_is_copied_is_there_and_in_the_context():
    kept = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    ]
    copied = [name for value in values("COPY") for name in shlex.split(value)[:-1]]
    assert sorted(copied) == sorted(kept)
    assert all((ROOT / name).exists() for name in copied)
    # All that building the package reads.
    metadata = SETTINGS["metadata"]
    needed = {metadata["long_description"].removeprefix("file: "), metadata["license_files"]}
    assert needed | {"setup.cfg", "pyproject.toml", "ragjax"} <= set(copied)


def test_its_extras_exist_and_it_does_not_run_as_root():
    text = (ROOT / "Dockerfile").read_text("utf-8")
    named = re.findall(r"--build-arg EXTRA=(\w+)", text)
    assert named and set(named) <= set(SETTINGS["options.extras_require"])
    assert values("USER")[-1] not in ("root", "0")
    (command,) = values("CMD")
    script = re.search(r"/ragjax/(experiments/\w+\.py)", command)
    assert script and (ROOT / script[1]).exists()
    assert values("WORKDIR")[0] == "/ragjax"


def test_assistants_are_told_the_limits_that_tests_enforce_and_the_commands_of_ci():
    guide = (ROOT / "AGENTS.md").read_text("utf-8")
    assert len(guide.splitlines()) < 90
    style = (ROOT / "tests" / "test_style.py").read_text("utf-8")
    limits = re.search(
        r"^MOST_LINES, MOST_FILES, MOST_ARGUMENTS.*= (\d+), (\d+), (\d+)", style, re.M
    )
    assert f"at most {limits[1]} lines, a folder at most {limits[2]} modules" in guide
    assert f"few functions have more than {limits[3]}\n  arguments" in guide
    ci = (ROOT / ".ci" / "run").read_text("utf-8") + (ROOT / "README.md").read_text("utf-8")
    for command in ("ruff format", "ruff check", "pyrefly check", "python -m pytest -n auto"):
        assert command in guide and command in ci


def test_the_picture_shows_every_package_in_letters_that_can_be_read_on_a_phone():
    picture = ElementTree.parse(ROOT / "docs" / "_static" / "architecture.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    shown = {e.text for e in picture.iter() if e.get("class") == "name" and e.text}
    packages = {path.parent.name for path in (ROOT / "ragjax").glob("*/__init__.py")}
    assert shown == packages
    # What is drawn is as wide as the text of a page on a phone.
    assert float(picture.get("viewBox").split()[2]) <= 360
    assert (
        min(map(int, re.findall(r"font-size: (\d+)px", picture.find(f"{space}style").text))) >= 11
    )
    assert len(picture.find(f"{space}desc").text) > 100
    assert {picture.find(f"{space}{part}").get("id") for part in ("title", "desc")} == set(
        picture.get("aria-labelledby").split()
    )
