"""Development sessions: ``nox -l`` lists them, ``nox`` runs tests, lint and types.

All sessions share one environment, ``.nox/shared``. It is made from the pins in
``constraints.txt`` and made anew when what it was made from has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent.resolve()
CONSTRAINTS = ROOT / "constraints.txt"
SHARED = ROOT / ".nox" / "shared"
CLEAN = ROOT / ".nox" / "clean"
DIST = ROOT / "dist"

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["tests", "lint", "types"]


def _python_of(environment: Path) -> str:
    inside = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    return str(environment / inside)


def _make_environment(session: nox.Session, environment: Path) -> str:
    """Make an empty virtual environment in place of whatever is there."""
    session.run(sys.executable, "-m", "venv", "--clear", str(environment), external=True)
    return _python_of(environment)


def _pip_install(session: nox.Session, python: str, *arguments: str) -> None:
    pip_install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    session.run(*pip_install, "-c", str(CONSTRAINTS), *arguments, external=True)


def _fingerprint(pyproject: dict[str, object]) -> str:
    """Hash what the shared environment depends on, and nothing that only configures tools."""
    tables = {key: pyproject[key] for key in ("build-system", "project", "dependency-groups")}
    # An editable installation and the scripts of an environment know where they are.
    made_from = [json.dumps(tables, sort_keys=True), CONSTRAINTS.read_text("utf-8")]
    made_from += [sys.version, str(ROOT)]
    return hashlib.sha256("\0".join(made_from).encode()).hexdigest()


def _shared_python(session: nox.Session) -> str:
    """Return the interpreter of the shared environment, made first where it is out of date."""
    pyproject = nox.project.load_toml(ROOT / "pyproject.toml")
    fingerprint = _fingerprint(pyproject)
    stamp = SHARED / "made-from.sha256"
    if stamp.exists() and stamp.read_text("utf-8") == fingerprint:
        return _python_of(SHARED)

    session.log("making the shared environment; later sessions reuse it")
    python = _make_environment(session, SHARED)
    # The pip of a fresh environment may be too old for --group, so nox resolves the groups.
    # The build backend is among them: without build isolation its version is pinned too.
    _pip_install(session, python, *nox.project.dependency_groups(pyproject, "dev"))
    _pip_install(session, python, "--no-build-isolation", "--editable", f"{ROOT}[plot]")
    stamp.write_text(fingerprint, "utf-8")  # last: an interrupted installation leaves none
    return python


def _run_script(session: nox.Session, script: Path, *arguments: str) -> None:
    # Figures go to files, with or without a display.
    environment = {"MPLBACKEND": "Agg"}
    python = _shared_python(session)
    session.run(python, str(script), *arguments, env=environment, external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after -- go to pytest."""
    python = _shared_python(session)
    # Tests that share a cluster of processes run in one place.
    spread = ["-n", "2", "--dist", "loadgroup"]
    session.run(python, "-m", "pytest", *spread, *session.posargs, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, docstrings and formatting."""
    python = _shared_python(session)
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, strictly."""
    session.run(_shared_python(session), "-m", "mypy", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation with its gallery; a warning is an error."""
    strictly = ["-W", "--keep-going", "-n"]
    built = ROOT / "docs" / "_build" / "html"
    sphinx = [_shared_python(session), "-m", "sphinx", *strictly, "-b", "html"]
    session.run(*sphinx, "docs", str(built), *session.posargs, external=True)
    session.log(f"open {built / 'index.html'}")


@nox.session
def demo(session: nox.Session) -> None:
    """Find the mislabelled digits; arguments after -- go to the example."""
    _run_script(session, ROOT / "examples" / "mislabelled_digits.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run every benchmark."""
    scripts = sorted((ROOT / "benchmarks").glob("[!_]*.py"))
    if not scripts:
        session.error("there is no benchmarks/*.py")
    for script in scripts:
        _run_script(session, script, *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build sdist and wheel, install the wheel without extras elsewhere and import it."""
    for old in [*DIST.glob("hessops-*.whl"), *DIST.glob("hessops-*.tar.gz")]:
        old.unlink()
    # The wheel is built from the sdist, so both are tried.
    build_command = [_shared_python(session), "-m", "build", "--no-isolation"]
    session.run(*build_command, "--outdir", str(DIST), external=True)
    (wheel,) = DIST.glob("hessops-*.whl")

    python = _make_environment(session, CLEAN)
    _pip_install(session, python, str(wheel))
    with session.chdir(CLEAN):  # away from the sources
        session.run(python, "-c", IMPORT_CHECK, external=True)


IMPORT_CHECK = """
import pathlib, sys, hessops
assert (pathlib.Path(hessops.__file__).parent / "py.typed").exists(), "py.typed is missing"
extras = {"cupy", "dask", "distributed", "zarr", "matplotlib"} & set(sys.modules)
assert not extras, f"importing hessops imported {sorted(extras)}"
missing = [name for name in hessops.__all__ if not hasattr(hessops, name)]
assert not missing, f"__all__ names what is not there: {missing}"
print("hessops", hessops.__version__, "imports without the extras")
"""
